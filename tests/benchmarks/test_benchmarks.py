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
from benchmarks.run import difference
from benchmarks.statistics import Interval, median_interval, met, paired_ratio
from benchmarks.workloads import (
    AGREEMENT,
    ALGORITHMS,
    BASELINE,
    FAMILIES,
    ONE_CORE,
    SYSTEMS,
    TARGETS,
    WORKLOADS,
)
from tests.basics.processes import QUICKLY

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


def of_algorithms(apart):
    """A log in which SCAFFOLD takes 1.2 times FedAvg's time, and Flower 5 times fedsim's."""
    yield next(lines())
    for name, seconds in ((BASELINE, 0.1), ("W2-scaffold", 0.12)):
        for system, times in zip(ONE_CORE, (1, 5), strict=True):
            each = {"workload": name, "system": system}
            yield {"kind": "start", **each, "start_s": 1.0, "first_s": 1.0}
            for repeat in range(2):
                memory = {"all_pss": 2**20}
                turn = {"repeat": repeat, "rounds": 10, "seconds": 10 * seconds * times}
                yield {"kind": "turn", **each, **turn, "memory": memory}
    yield {
        "kind": "agreement", "workload": "W2-scaffold", "system": ONE_CORE[1],
        "reference": ONE_CORE[0], "difference": apart, "bound": AGREEMENT, "rounds": 10,
    }  # fmt: skip


def written_of_algorithms(tmp_path, apart):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(map(json.dumps, of_algorithms(apart))))
    report.write(raw, tmp_path)
    return (tmp_path / "benchmarks.md").read_text()


def test_other_algorithms_stand_beside_fedavg_and_flower(tmp_path):
    text = written_of_algorithms(tmp_path, 1e-14)
    inline, flower = (SYSTEMS[system].title for system in ONE_CORE)
    held = "1.20 | 1.20 to 1.20 | at most 1.25 | yes |"
    assert f"| W2-scaffold / {BASELINE} | {inline} | {inline} | {held}" in text
    assert f"| W2-scaffold | {flower} | {inline} | 5.00 | 5.00 to 5.00 | at least 3 | yes |" in text
    assert "| SCAFFOLD, option II | 1 | 120.0 | 1.20 (1.20 to 1.20) |" in text


@pytest.mark.parametrize("apart", [1e-3, float("nan")])
def test_algorithms_whose_models_are_apart_meet_no_target(tmp_path, apart):
    text = written_of_algorithms(tmp_path, apart)
    assert "W2-scaffold |" not in text
    assert f"| {BASELINE} | " in text


def test_the_difference_of_two_models_is_measured_by_the_largest_number():
    one = {"w": np.array([4.0, -8.0]), "b": np.array([0.5])}
    assert difference(one, {"w": np.array([4.0, -8.0]), "b": np.array([0.25])}) == 0.25 / 8
    assert np.isnan(difference(one, {"w": one["w"], "b": np.array([np.nan])}))


ASKED = """
import sys
sys.path.insert(0, {folder!r})
from flower_algorithms import LOCAL
from flower_strategies import strategy
for table in {tables!r}:
    print(table["name"] in LOCAL, type(strategy(table, 4, fraction_evaluate=0.0)).__name__)
"""


@pytest.mark.slow
def test_every_algorithm_has_a_client_and_a_server_at_flower():
    tables = [dict(work.strategy) for work in ALGORITHMS.values()]
    script = QUICKLY + ASKED.format(folder=str(contest.SYSTEMS_FOLDER), tables=tables)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == [
        "True FedAvg",
        "True FedProx",
        "True FedNova",
        "True Scaffold",
        "True FedDyn",
        "True FedAvg",
    ]
