"""Rules that divide a data set among clients."""
