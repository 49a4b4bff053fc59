"""What users met: one file for each case, named after it."""
