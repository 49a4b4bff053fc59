"""`tune_alike`: common keys are one grid for all methods, and no grid ends where a best lies."""

import math

import pytest

from fedsim.studies.cells.variants import Axis, Variant, of_scenarios
from fedsim.studies.tuning.alike import TunedMethod, tune_alike
from fedsim.studies.tuning.tune import ChoiceRule
from tests.studies.worlds import MadeUpRuns, write

SEEDS = [1003]
METRIC = "local/accuracy_mean"


def landscape(optima):
    """Return runs whose value falls with their distance from an optimum, in decades."""

    def record(made):
        at = {"local_lr": made["client"]["local_lr"], **made["strategy"]}
        best = optima[at["name"]]
        far = sum(abs(math.log10((at[key] + 1e-3) / (x + 1e-3))) for key, x in best.items())
        return {METRIC: 1 - 0.1 * far}

    return MadeUpRuns(record)


@pytest.fixture
def tuned(tmp_path):
    scenario = str(write(tmp_path))

    def method(name, *own):
        def make(grid, point):
            given = [f"{key}={value}" for key, value in zip(grid.keys, point, strict=True)]
            (made,) = of_scenarios([scenario], [], [f"strategy.name={name}", *given])
            return Variant({"arm": name}, made.scenario)

        return TunedMethod(name, own, make, METRIC)

    methods = [
        method("fedavg", Axis("strategy.server_lr", ("1", "2"))),
        method("fedprox", Axis("strategy.mu", ("0", "0.1", "1"))),
        method("apfl", Axis("strategy.alpha", ("0", "0.5", "1"))),
    ]
    common = (Axis("client.local_lr", ("0.1", "1")),)

    def asked(pool, widenings=4):
        rule = ChoiceRule(widenings=widenings)
        return tune_alike(methods, common, SEEDS, tmp_path, rule, pool)

    return asked


def test_a_common_grid_grows_for_all_and_an_own_one_for_its_method(tuned):
    optima = {
        "fedavg": {"local_lr": 0.1, "server_lr": 8.0},
        "fedprox": {"local_lr": 10.0, "mu": 0.0},
        "apfl": {"local_lr": 1.0, "alpha": 1.0},
    }
    pool = landscape(optima)
    found = tuned(pool)
    common = [one.grid.axes[0] for one in found]
    assert common[0].values == ("0.01", "0.1", "1", "10", "1e+02")
    assert common[0] == common[1] == common[2]
    assert [one.grid.axes[1].values for one in found] == [
        ("1", "2", "4", "8", "16"),
        ("0", "0.1", "1"),  # nothing lies below 0
        ("0", "0.5", "1"),  # a share of more than 1 is refused
    ]
    assert [one.settings(0) for one in found] == [
        ["client.local_lr=0.1", "strategy.server_lr=8"],
        ["client.local_lr=10", "strategy.mu=0"],
        ["client.local_lr=1", "strategy.alpha=1"],
    ]
    assert [list(one.edges[0]) for one in found] == [[], [], []]
    assert any("beyond it" in note for note in found[2].notes)
    # what is tried follows from the outcomes: all runs are there already
    ran = list(pool.ran)
    assert tuned(pool) == found
    assert pool.ran == ran
    assert len(set(ran)) == len(ran)


def test_a_best_that_wanders_beyond_what_may_be_tried_is_named(tuned):
    optima = {
        "fedavg": {"local_lr": 1.0, "server_lr": 1e12},
        "fedprox": {"local_lr": 0.1, "mu": 0.1},
        "apfl": {"local_lr": 1.0, "alpha": 0.5},
    }
    found = tuned(landscape(optima), widenings=2)
    assert [list(one.edges[0]) for one in found] == [["strategy.server_lr"], [], []]
    assert any("lies on the edge of what was tried" in note for note in found[0].notes)
