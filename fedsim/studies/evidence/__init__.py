"""Declared studies and the page that they make."""
