"""An unmodified Flower app gives on fedsim's engines what it gives on Flower's own simulation."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.parity import app
from tests.parity.app import FAILS, NODES, ROUNDS, STRATEGIES

# Flower adds replies up in the order in which they arrive, fedsim in client order: ten numbers of
# size 1 in float64, over three rounds.
ROUNDING = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(scope="module")
def results(tmp_path_factory, ray_cluster, lender):
    """What came of the app on each engine; Flower's, which leaves Ray, in a process of its own."""
    address = ray_cluster.get_runtime_context().gcs_address
    out = tmp_path_factory.mktemp("parity") / "flower.json"
    done = subprocess.run(
        [sys.executable, app.__file__, "flower", str(out), address],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with lender.lending():
        ours = {engine: app.run(engine) for engine in ("inline", "ray")}
    return {**json.loads(json.dumps(ours)), "flower": json.loads(out.read_text())}


@pytest.mark.parametrize("engine", ["inline", "ray"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_models_and_metrics_are_those_of_flowers_simulation(results, strategy, engine):
    ours, theirs = results[engine][strategy], results["flower"][strategy]
    for mine, their in zip(ours["arrays"], theirs["arrays"], strict=True):
        np.testing.assert_allclose(mine, their, **ROUNDING)
    for phase in ("train", "evaluate"):
        assert len(ours[phase]) == len(theirs[phase]) == ROUNDS
        for mine, their in zip(ours[phase], theirs[phase], strict=True):
            assert mine.keys() == their.keys()
            for name, value in mine.items():
                assert value == pytest.approx(their[name], rel=1e-11), name


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_krum_chooses_the_clients_that_it_chooses_in_flowers_simulation(results, engine):
    ours, theirs = results[engine]["Krum"], results["flower"]["Krum"]
    chosen = [note["chosen"] for note in theirs["rounds"]]
    assert [len(choice) for choice in chosen] == [1] * ROUNDS
    assert [note["chosen"] for note in ours["rounds"]] == chosen
    assert ours["arrays"] == theirs["arrays"]  # one client's model, nothing added up: the same bits


@pytest.mark.parametrize("engine", ["inline", "ray", "flower"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_client_that_raises_is_the_one_failure_and_remembers_nothing_of_it(
    results, strategy, engine
):
    found = results[engine][strategy]
    everybody = list(range(NODES))
    for server_round, note in enumerate(found["rounds"], start=1):
        failed = [[FAILS, 2]] if server_round == 2 else []  # 2: the ClientApp raised
        assert note["failed"] == failed
        assert note["replies"] == [c for c in everybody if [c, 2] not in failed]
    for client, memory in enumerate(found["memories"]):
        trained = ROUNDS - (client == FAILS)
        # the query before round 1 forgets before it ends, the one that asks now has begun
        lives = trained + ROUNDS + 1
        assert memory == {
            "trained": trained,
            "halved": trained,
            "evaluations": ROUNDS,
            "began": lives,
            "ended": lives,
        }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inline_and_ray_give_the_same_bits(results, strategy):
    assert results["ray"][strategy] == results["inline"][strategy]
