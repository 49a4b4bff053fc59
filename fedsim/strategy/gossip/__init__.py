"""Averaging among nodes, without a server's model."""
