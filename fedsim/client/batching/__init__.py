"""Batches: in which order samples come, and what is done to them."""
