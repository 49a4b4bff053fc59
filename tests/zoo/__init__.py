"""A zoo of user code: awkward models, strategies, loaders and tables, held to oracles."""
