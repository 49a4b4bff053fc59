"""What runs on a device: one local procedure per file, found by its file name."""
