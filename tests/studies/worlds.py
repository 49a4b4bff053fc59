"""Tiny scenarios for studies."""

from pathlib import Path

import numpy as np

from fedsim.data.sets.user import DataSet

TINY = """
seed = 3
rounds = {rounds}
[task]
model = "logistic"
[data]
name = "synthetic"
max_samples = 40
dimension = 6
classes = 3
[partition]
kind = "natural"
clients = 4
test_fraction = 0.25
[participation]
kind = "uniform"
cohort_size = 2
[client]
local_lr = 0.05
local_steps = 2
[evaluation]
clients = 4
[checkpoint]
every = 5
"""


def write(folder: Path, *, rounds: int = 5, name: str = "tiny") -> Path:
    """Write a scenario that takes milliseconds per round."""
    file = folder / f"{name}.toml"
    file.write_text(TINY.format(rounds=rounds), encoding="utf-8")
    return file


def large() -> DataSet:
    """32 MiB of features."""
    return DataSet(np.ones((8192, 1024), dtype=np.float32), np.arange(8192) % 2)
