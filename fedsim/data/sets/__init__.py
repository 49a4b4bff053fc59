"""Data sets: named, of a format, or made by a user's function."""
