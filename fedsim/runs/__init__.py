"""One run: what is known before its first round."""
