"""Runs held beside each other: intervals, tables, pictures."""
