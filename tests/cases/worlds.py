"""A small federation for cases of strategies, and what interrupts a run of one."""

import contextlib

import fedsim
from fedsim.runs.loop import RoundLoop
from fedsim.scenario.scenario import Scenario

DOCUMENT = {
    "seed": 1,
    "rounds": 6,
    "task": {"model": "logistic"},
    "data": {"name": "breast_cancer"},
    "partition": {"kind": "iid", "clients": 6},
    "participation": {"kind": "full"},
    "client": {"name": "local_sgd", "batch_size": 32, "local_epochs": 1},
    "engine": {"kind": "inline"},
    "checkpoint": {"every": 2},
}


def scenario(name, /, **tables):
    """The small federation under a strategy; tables and keys given come before its own."""
    document = {**DOCUMENT, "strategy": {"name": name}}
    for key, value in tables.items():
        kind = value.get("kind") if isinstance(value, dict) else None
        own = {} if kind is not None else document.get(key, {})
        document[key] = {**own, **value} if isinstance(value, dict) else value
    return Scenario.from_resolved(document, origin="tests/cases.toml")


class PowerCut(Exception):
    """The process would be gone now."""


@contextlib.contextmanager
def power_cut(server_round):
    """Interrupt runs when a round begins."""
    begin = RoundLoop._round

    def cut(self, number, arrays):
        if number == server_round:
            raise PowerCut(f"round {number}")
        return begin(self, number, arrays)

    RoundLoop._round = cut
    try:
        yield
    finally:
        RoundLoop._round = begin


def broken_and_resumed(described, folder, server_round=3):
    """The result of a run that was interrupted before a round and resumed."""
    with contextlib.suppress(PowerCut), power_cut(server_round):
        fedsim.start(described, out=folder)
    return fedsim.resume(folder)


def both(described, folder, server_round=3):
    """Hashes of the model of an undisturbed run and of one that was interrupted and resumed."""
    whole = fedsim.start(described, out=folder / "whole")
    again = broken_and_resumed(described, folder / "broken", server_round)
    return whole.summary["params_sha256"], again.summary["params_sha256"]
