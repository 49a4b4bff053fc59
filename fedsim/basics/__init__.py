"""What every room needs and no federation."""
