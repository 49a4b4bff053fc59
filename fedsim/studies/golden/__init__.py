"""Scenario regression: a scenario's recorded results, and whether it still has them.

`fedsim check` and the pytest plugin run a scenario twice: as it stands, which its claims and the
hashes of its recording are held against, and for its first rounds in float64, whose metrics are
held against the recorded ones number by number. A recording is a file beside the scenario,
`golden/NAME.json`, and only `fedsim golden --update` writes it.
"""
