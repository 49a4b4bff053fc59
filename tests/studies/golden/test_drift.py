"""What counts as drift, and how it is told."""

from dataclasses import replace

import pytest

from fedsim.studies.golden.drift import drifts
from fedsim.studies.golden.recording import MetricTrace, Recording

HERE = {"instruction_set": "x86_64 AVX512", "torch": "2.13.0", "threads": 1}
OLD = Recording(
    scenario_sha256="s" * 64,
    rounds=9,
    params_sha256="a" * 64,
    participation_sha256="b" * 64,
    partition_sha256="c" * 64,
    trace=MetricTrace(
        rounds=[0, 1, 2],
        metrics={
            "test/loss": [2.0, 1.0, 0.5],
            "train/loss": [None, 200.0, 100.0],
            "test/auroc": [float("nan"), float("inf"), 0.5],
        },
        params_sha256="d" * 64,
    ),
    environment=HERE,
)


def traced(**metrics):
    return replace(OLD, trace=replace(OLD.trace, metrics={**OLD.trace.metrics, **metrics}))


def test_what_is_the_same_has_not_drifted():
    assert drifts(OLD, OLD) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([2.0, 1.0 + 9e-9, 0.5], []),
        (
            [2.0, 1.0, 0.5 + 2e-8],
            ["test/loss parts in round 2: recorded 0.5, now 0.50000002 (tolerance 1.0e-08)"],
        ),
        (
            [2.0, 1.1, 9.0],
            ["test/loss parts in round 1: recorded 1, now 1.1 (tolerance 1.0e-08)"],
        ),
        ([2.0, None, 0.5], ["test/loss parts in round 1: recorded 1, now nothing"]),
        (
            [float("nan"), 1.0, 0.5],
            ["test/loss parts in round 0: recorded 2, now nan (tolerance 2.0e-08)"],
        ),
    ],
)
def test_a_metric_parts_in_the_first_round_beyond_its_tolerance(values, told):
    assert [str(each) for each in drifts(OLD, traced(**{"test/loss": values}))] == told


def test_large_values_are_held_relative_to_their_size():
    assert not drifts(OLD, traced(**{"train/loss": [None, 200.0 + 1e-6, 100.0]}))
    assert drifts(OLD, traced(**{"train/loss": [None, 200.0 + 3e-6, 100.0]}))


def test_what_is_not_finite_must_be_the_same_thing():
    assert drifts(OLD, traced(**{"test/auroc": [float("nan"), float("-inf"), 0.5]}))[0].round == 1
    assert drifts(OLD, traced(**{"test/auroc": [0.0, float("inf"), 0.5]}))[0].round == 0


def test_the_earliest_metric_comes_first_and_new_ones_count():
    now = traced(**{"test/loss": [2.0, 1.0, 0.6], "train/loss": [None, 1.0, 1.0]})
    assert [each.what for each in drifts(OLD, now)] == ["train/loss", "test/loss"]
    assert [each.what for each in drifts(OLD, traced(**{"server/new": [1.0, None, None]}))] == [
        "server/new"
    ]


@pytest.mark.parametrize("name", ["partition_sha256", "participation_sha256"])
def test_who_holds_what_and_who_was_selected_count_everywhere(name):
    now = replace(OLD, **{name: "e" * 64}, environment={**HERE, "torch": "2.11.0"})
    (drift,) = drifts(OLD, now)
    assert str(drift) == f"{name}: recorded {getattr(OLD, name)[:12]}, now eeeeeeeeeeee"


def test_models_are_compared_where_their_bits_may_be():
    now = replace(OLD, params_sha256="e" * 64, trace=replace(OLD.trace, params_sha256="f" * 64))
    assert [each.what for each in drifts(OLD, now)] == ["params_sha256", "trace.params_sha256"]
    for key in HERE:
        elsewhere = replace(now, environment={**HERE, key: "other"})
        assert drifts(OLD, elsewhere) == []


def test_of_an_edited_scenario_nothing_else_is_said():
    now = replace(traced(**{"test/loss": [0.0, 0.0, 0.0]}), scenario_sha256="t" * 64)
    (drift,) = drifts(OLD, now)
    assert drift.what == "scenario_sha256"
