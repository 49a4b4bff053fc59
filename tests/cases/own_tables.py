"""Tables of a user's own, written where a test wants them, and what fedsim makes of them."""

import numpy as np

from fedsim.data.preparation import prepare

IID = {"kind": "iid", "clients": 2}
NATURAL = {"kind": "natural"}
SCENARIO = """
seed = 1
rounds = 1
[task]
model = "logistic"
[data]
name = "folder"
path = "patients.csv"
[partition]
kind = "iid"
clients = 2
[participation]
kind = "full"
[strategy]
name = "fedavg"
[client]
name = "local_sgd"
[engine]
kind = "inline"
"""


def rows(count=20, seed=0):
    """Two numbers and a class, 0 or 1, per row; the classes of the first half come first."""
    draw = np.random.default_rng(seed).normal(size=(count, 2)).round(3).tolist()
    return [[*numbers, int(n >= count // 2)] for n, numbers in enumerate(draw)]


def write(path, values, header="a,b,label", separator=","):
    """Write a table, its cells as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header.replace(",", separator)]
    lines += [separator.join(map(str, row)) for row in values]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path, partition=IID, **keys):
    """What clients hold of a file or folder; its cache lies beside it."""
    data = {"name": "folder", "path": str(path), **keys}
    return prepare(data, partition, seed=0, cache_dir=path.parent / "cache")
