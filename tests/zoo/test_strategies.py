"""Users' strategies, interrupted in round 3 and resumed: the bits of the undisturbed run.

Or it is said before round 1 that they cannot be held, and a resume begins again. Every run has
modules of its own, as another process would.
"""

import contextlib
import logging
import sys

import pytest

import fedsim
from fedsim.basics.json_files import JsonLines
from tests.cases import worlds
from tests.zoo import strategies

QUICK = ("Slots", "FlatMomentum", "ByLoss", "OfTheClass", "Ours")
TABLES = {"rounds": 5, "checkpoint": {"every": 1}}


def anew():
    sys.modules.pop(strategies.__name__, None)


def records(result):
    found = JsonLines.read(result.folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in found]


def whole_and_resumed(described, folder):
    anew()
    whole = fedsim.start(described, out=folder / "whole")
    anew()
    with contextlib.suppress(worlds.PowerCut), worlds.power_cut(4):
        fedsim.start(described, out=folder / "broken")
    anew()
    return whole, fedsim.resume(folder / "broken")


def require_same(whole, again):
    assert again.summary["params_sha256"] == whole.summary["params_sha256"]
    assert records(again) == records(whole)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in strategies.HELD],
)
def test_a_strategy_goes_on_as_if_nothing_had_happened(name, tmp_path, caplog):
    described = worlds.scenario(f"tests.zoo.strategies:{name}", **TABLES)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        whole, again = whole_and_resumed(described, tmp_path)
    require_same(whole, again)
    assert "checkpoint" not in caplog.text
    assert "resumed from round_000003" in (tmp_path / "broken" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["flower:FedAvg", "flower:FedYogi", "fedau"])
def test_a_wrapper_goes_on_with_what_it_wraps(inner, tmp_path):
    described = worlds.scenario(
        "tests.zoo.strategies:Wrapper", strategy={"strategy": {"name": inner}}, **TABLES
    )
    require_same(*whole_and_resumed(described, tmp_path))


@pytest.mark.parametrize(
    "name", [pytest.param("Stream"), pytest.param("Reading", marks=pytest.mark.slow)]
)
def test_what_cannot_be_held_is_said_before_round_1_and_begins_again(name, tmp_path, caplog):
    described = worlds.scenario(f"tests.zoo.strategies:{name}", **TABLES)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        whole, again = whole_and_resumed(described, tmp_path)
    require_same(whole, again)
    said = [r.getMessage() for r in caplog.records if "a checkpoint cannot hold" in r.getMessage()]
    assert len(said) == 3  # the undisturbed run, the broken one, and the resumed one
    assert all("would begin again after round 0" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 4])
def test_it_does_not_matter_when_checkpoints_are_written(every, tmp_path):
    described = worlds.scenario(
        "tests.zoo.strategies:Episodes", rounds=5, checkpoint={"every": every},
        participation={"kind": "bernoulli", "rate": 0.4},
    )  # fmt: skip
    require_same(*whole_and_resumed(described, tmp_path))
