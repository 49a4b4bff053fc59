"""Chains of known layers, both passes written out for all clients of a chunk."""
