"""The benchmark harness: its statistics, its target rule, the way systems take turns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import contest, report
from benchmarks.contest import Entrant, Fallen, passes, turn_length
from benchmarks.statistics import Interval, median_interval, met, paired_ratio
from benchmarks.workloads import FAMILIES, SYSTEMS, TARGETS, WORKLOADS

times = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)


@given(times)
def test_an_interval_holds_the_median_and_lies_within_the_values(values):
    found = median_interval(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.median == np.median(values)


def test_the_bootstrap_covers_the_true_median_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = random.lognormal(0, 0.5, size=(200, 15))  # its median is 1
    covered = sum(low <= 1 <= high for _, low, high in map(median_interval, samples))
    assert 175 <= covered <= 199


def test_a_ratio_is_taken_within_each_repeat():
    # the machine is three times slower in the second repeat: the pairs know nothing of it
    assert paired_ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_nothing_measured_is_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


@pytest.mark.parametrize(
    ("interval", "sense", "is_met"),
    [
        (Interval(5.0, 4.0, 6.0), "at least", True),
        (Interval(5.0, 3.9, 6.0), "at least", False),
        (Interval(3.0, 2.0, 4.0), "at most", True),
        (Interval(3.0, 2.0, 4.1), "at most", False),
    ],
)
def test_a_target_is_met_when_the_whole_interval_is_on_its_side(interval, sense, is_met):
    assert met(interval, 4.0, sense) is is_met


def test_every_target_names_rows_that_exist():
    rows = {(w, s) for w in WORKLOADS for s in SYSTEMS} | {
        ("W6", kernel) for kernel in report.KERNEL_TITLES
    }
    assert {(w, s) for t in TARGETS for w, systems in (t.slow, t.fast) for s in systems} <= rows
    assert {s for family in FAMILIES.values() for s in family} == set(SYSTEMS)


def test_a_turn_is_whole_units_and_never_none():
    assert turn_length(0.03, 1.0, unit=10) == 40
    assert turn_length(9.0, 1.0, unit=10) == 10
    assert turn_length(0.0001, 1.0, unit=1) == 400


def test_every_pass_has_everybody_once_and_begins_one_further_on():
    order = [(repeat, entrant) for repeat, entrant in passes(["a", "b", "c"], 2)]
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import baton
work = baton.workload()
turns = baton.Baton(said=work["say"])
print("noise on standard output")
going, rounds = turns.wait(), 0
while going:
    rounds += 1
    if rounds > work["falls_after"]:
        raise SystemExit("out of breath")
    going = turns.ended(lambda: dict(rounds=[rounds]))
"""


@pytest.fixture
def entrant(tmp_path):
    script = tmp_path / "system.py"
    script.write_text(SCRIPT.format(folder=str(contest.SYSTEMS_FOLDER)))
    work = {"say": "ready", "falls_after": 7}
    made = Entrant("it", [sys.executable, str(script)], work, tmp_path / "errors", {})
    yield made
    made.end()


def test_a_system_runs_the_rounds_of_its_turns_and_its_fall_is_told(entrant, tmp_path):
    assert entrant.facts["ready"] == {"said": "ready"}
    assert entrant.turn(2)["rounds"] == 2
    took = entrant.turn(5, tmp_path / "model.npz")
    assert took["seconds"] > 0
    assert took["memory"]["all_pss"] > 1_000_000
    with np.load(tmp_path / "model.npz") as saved:
        assert saved["rounds"] == [7]
    with pytest.raises(Fallen, match="out of breath"):
        entrant.turn(1)


def lines(**changes):
    """A log of two repeats of W1 in which Flower needs 15 times as long."""
    losses = {"fedsim-ray2": 0.1, "flower": 0.1, "torch": 0.1} | changes
    yield {
        "kind": "machine", "when": "", "cpu": "a", "cores": 2, "memory_bytes": 2**30, "system": "",
        "python": "", "commit": "", "load": 0.0, "repeats": 2,
    }  # fmt: skip
    for system, seconds in (("fedsim-ray2", 0.01), ("flower", 0.15), ("torch", 0.02)):
        each = {"workload": "W1", "system": system}
        yield {"kind": "start", **each, "start_s": 1.0, "first_s": 1.0}
        yield {
            "kind": "loss", **each, "loss": losses[system], "tolerance": 0.1, "reference": "torch"
        }  # fmt: skip
        for repeat in range(2):
            memory = {"all_pss": 2**20}
            turn = {"repeat": repeat, "rounds": 10, "seconds": 10 * seconds, "memory": memory}
            yield {"kind": "turn", **each, **turn}


def written(tmp_path, **changes):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(map(json.dumps, lines(**changes))))
    report.write(raw, tmp_path)
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000
    return (tmp_path / "benchmarks.md").read_text()


def test_the_report_holds_a_ratio_against_its_target(tmp_path):
    assert "| 15.00 | 15.00 to 15.00 | at least 12 | yes |" in written(tmp_path)


def test_a_system_whose_loss_differs_is_marked_and_meets_no_target(tmp_path):
    text = written(tmp_path, **{"fedsim-ray2": 0.12})
    assert "**differs: 0.1200, not 0.1000**" in text
    assert "at least 12" not in text


def test_an_unknown_workload_is_refused_before_anything_is_installed():
    asked = [sys.executable, "-m", "benchmarks.run", "--only", "W9"]
    done = subprocess.run(
        asked, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no 'W9'" in done.stderr


def test_cohorts_that_differ_may_leave_what_is_nearly_learned_at_other_losses(tmp_path):
    nearly = {"torch": 0.005, "flower": 0.009}
    assert "**differs" not in written(tmp_path, **nearly, **{"fedsim-ray2": 0.014})
    assert "**differs" in written(tmp_path, **nearly, **{"fedsim-ray2": 0.016})
