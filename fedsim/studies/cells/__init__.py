"""Cells of a study: one run each, made in processes of their own and kept."""
