"""What stands between the server's decision and its clients."""
