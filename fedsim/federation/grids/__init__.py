"""Grids around a Grid, each under the name of what it applies."""
