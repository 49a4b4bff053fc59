"""Who is linked to whom."""
