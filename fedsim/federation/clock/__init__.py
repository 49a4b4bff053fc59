"""Virtual time: how long clients' jobs take, and when the server aggregates."""
