"""The standing search: code that nobody wrote, held to plain torch and to itself.

`make zoo` goes on for an hour, with other draws each time; a find becomes a case.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.runs.world import build
from tests.cases import worlds
from tests.cases.own_tables import read
from tests.zoo import strategies, tables
from tests.zoo.composed import PARTS
from tests.zoo.trained import NoAnswerError, check, rounding_decides, scenario

pytestmark = [
    pytest.mark.hypothesis,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore"),
]
SOME = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4)
EXECUTORS = st.sampled_from(["auto", "auto", "loop", "vmap", "batched"])
CLIENTS = st.fixed_dictionaries(
    {}, optional={"momentum": st.just(0.9), "local_epochs": st.just(2)}
)  # fmt: skip


def composed(parts, executor, client):
    """Train a composition as it is asked for; a refusal must come before round 1, by name.

    Held to itself in any case, and to plain torch where that has an answer.
    """
    task = {"model": "tests.zoo.composed:Composed", "parts": parts}
    refusal = None
    try:
        build(scenario("Composed", executor, task=task, client=client))
    except ScenarioError as error:
        refusal = str(error)
    if refusal is None:
        with contextlib.suppress(NoAnswerError):
            check("Composed", executor, task=task, **client)
    else:
        assert executor in ("vmap", "batched"), refusal
        assert f"executor = '{executor}'" in refusal


@settings(max_examples=max(5, settings.default.max_examples // 2))
@given(parts=SOME, executor=EXECUTORS, client=CLIENTS)
@example(parts=["Pairs", "Centred", "Branching", "AlphaDrop"], executor="auto", client={})
def test_whatever_models_are_put_together(parts, executor, client):
    composed(parts, executor, client)


@pytest.mark.parametrize(
    ("parts", "decides"),
    [
        (["Twice", "Spectrum", "Rectified"], True),  # zeros, +-1e-17, and draws where it is below 0
        (["Twice", "Rectified"], False),
        (["Pairs", "Centred", "Branching", "AlphaDrop"], False),
    ],
)
def test_where_rounding_decides_plain_torch_has_no_answer_and_elsewhere_it_has(parts, decides):
    task = {"model": "tests.zoo.composed:Composed", "parts": parts}
    executor = build(scenario("Composed", "loop", task=task)).app._build_executor()
    assert rounding_decides(executor, 2, local_epochs=2) is decides


FEWER = settings(max_examples=max(3, settings.default.max_examples // 10))  # each runs thrice
CUTS = st.tuples(st.integers(2, 5), st.integers(1, 3))
TAKES_PART = st.sampled_from(
    [{"kind": "full"}, {"kind": "bernoulli", "rate": 0.6}, {"kind": "uniform", "cohort_size": 3}]
)


def interrupted(name, cut, every, takes_part):
    """Run a user's strategy undisturbed, and interrupted before a round and resumed."""
    described = worlds.scenario(
        f"tests.zoo.strategies:{name}",
        rounds=5,
        participation=takes_part,
        checkpoint={"every": every},
    )
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        sys.modules.pop(strategies.__name__, None)
        whole = fedsim.start(described, out=runs / "whole").summary
        sys.modules.pop(strategies.__name__, None)
        with contextlib.suppress(worlds.PowerCut), worlds.power_cut(cut):
            fedsim.start(described, out=runs / "broken")
        sys.modules.pop(strategies.__name__, None)
        again = fedsim.resume(runs / "broken").summary
    assert again["params_sha256"] == whole["params_sha256"], (name, cut, every, takes_part)
    assert again["final"] == whole["final"]


@FEWER
@given(name=st.sampled_from(sorted(strategies.HELD)), cuts=CUTS, takes_part=TAKES_PART)
def test_whatever_strategy_is_interrupted(name, cuts, takes_part):
    interrupted(name, *cuts, takes_part)


NET = """
from torch import nn

from {helper} import width


def net(feature_shape, num_classes):
    return nn.Sequential(nn.Linear(feature_shape[0], width()), nn.Linear(width(), num_classes))
"""
HELPER = "def width():\n    {where}\n    return WIDTH\n"
WHERE = ("from {values} import WIDTH", "import {values} as v; WIDTH = v.WIDTH", "WIDTH = {width}")
SCENARIO = """
seed = 1
rounds = 1
[task]
model = "{net}:net"
[data]
name = "breast_cancer"
[partition]
kind = "iid"
clients = 2
[participation]
kind = "full"
[engine]
kind = "inline"
"""


def written(folder, widths, where):
    """Run a project anew after each edit of the module in which a number stands."""
    names = {name: f"zoo_{name}" for name in ("net", "helper", "values")}
    (folder / "scenario.toml").write_text(SCENARIO.format(**names))
    (folder / "zoo_net.py").write_text(NET.format(**names))
    found = []
    for width in widths:
        text = HELPER.format(where=where.format(width=width, **names))
        (folder / "zoo_helper.py").write_text(text)
        (folder / "zoo_values.py").write_text(f"WIDTH = {width}\n")
        described = fedsim.load_scenario(folder / "scenario.toml")
        trained = build(described).layout.trainable[0].shape[0]
        found.append((width, trained, described.code.sha256))
    return found


def edited(widths, where):
    """Each run trains what its files say, and counts as the same code if and only if it is."""
    with tempfile.TemporaryDirectory() as folder:
        found = written(Path(folder), widths, where)
    assert [trained for _, trained, _ in found] == widths
    for width, _, code in found:
        for other, _, others in found:
            assert (code == others) == (width == other)


PLAIN = {"decimal": ".", "encoding": "utf-8", "separator": ","}


def table_read(table, said):
    """A table holds what was written, or is refused with the remedy; said in full, it is read."""
    content, names, numbers, classes = tables.written(table)
    known = {"separator": table.separator, "decimal": table.decimal, "encoding": table.encoding}
    keys = {"target": "label", "features": [n for n in names if n != "label"], **known}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine" / "patients.csv"
        file.parent.mkdir()
        file.write_bytes(content)
        data, refusal = None, ""
        try:
            data = read(file, standardise=False, **(keys if said else {"target": "label"}))
        except ScenarioError as error:
            refusal = str(error)
        if data is None:
            assert not said, refusal
            assert known != PLAIN, refusal
            assert "patients.csv" in refusal
            assert "say" in refusal
        else:
            drawn = data.clients([0])
            np.testing.assert_allclose(drawn.features, numbers, rtol=1e-6)
            np.testing.assert_array_equal(drawn.targets, classes)
            assert data.spec.num_classes == 3


@settings(max_examples=max(10, settings.default.max_examples))
@given(table=tables.TABLES, said=st.booleans())
def test_whatever_table_is_written(table, said):
    table_read(table, said)


WIDTHS = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@FEWER
@given(widths=WIDTHS, where=st.sampled_from(WHERE))
def test_whatever_is_edited(widths, where):
    edited(widths, where)
