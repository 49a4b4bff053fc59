"""Who attacks, and with what."""
