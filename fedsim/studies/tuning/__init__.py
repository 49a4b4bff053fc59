"""The search for values of a scenario's keys."""
