"""The engines: Grids whose clients are virtual."""
