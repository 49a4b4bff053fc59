"""Parts of local training, one change of what a client does per file."""
