"""Projects of users: a folder with a scenario and modules of its own, small and quick to run."""

from pathlib import Path

NET = """
from torch import nn


def net(feature_shape, num_classes):
    layers = nn.Linear(feature_shape[0], {units}), nn.ReLU(), nn.Linear({units}, num_classes)
    return nn.Sequential(*layers)
"""
SCENARIO = """
seed = 1
rounds = {rounds}
[task]
model = "{model}"
[data]
name = "{data}"
[partition]
kind = "iid"
clients = 4
[participation]
kind = "full"
[client]
local_lr = {local_lr}
local_steps = 1
[evaluation]
every = 50
[checkpoint]
every = 1
[engine]
kind = "{engine}"
"""


def project(
    folder: Path,
    *,
    units: int = 4,
    rounds: int = 1,
    named: str = "model:net",
    data: str = "breast_cancer",
    local_lr: float = 0.1,
    engine: str = "inline",
    **modules: str,
) -> Path:
    """Write a project and return its scenario's file.

    Args:
        folder: Where; it is made.
        units: Of the hidden layer of `model.py`.
        rounds: Of the scenario.
        named: The model that the scenario names.
        data: The data set that it names.
        local_lr: The step size.
        engine: Where clients train.
        **modules: Further modules, or others than `model`: text by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"model": NET.format(units=units), **modules}.items():
        place = (folder / name).with_suffix(".py")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    file = folder / "scenario.toml"
    text = SCENARIO.format(rounds=rounds, model=named, data=data, local_lr=local_lr, engine=engine)
    file.write_text(text, encoding="utf-8")
    return file
