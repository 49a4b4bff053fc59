"""Processes of a deployment that are killed, and what becomes of the run."""

import json

import pytest

from fedsim.basics.errors import RunError
from tests.deployment.runs_on_nodes import ROOT, SCENARIO, read_summary, simulated, started

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]


def test_a_node_that_is_killed_is_called_dead_and_takes_part_again_when_it_is_started(
    deployment, tmp_path
):
    out = tmp_path / "out"
    settings = {
        "scenario": SCENARIO, "out": str(out), "set": "rounds=8 engine.round_timeout_s=90",
    }  # fmt: skip

    def rounds():
        found = [f.read_text().splitlines() for f in out.rglob("participation.jsonl")]
        return [json.loads(line) for lines in found for line in lines]

    running = started(deployment, settings, until=lambda: len(rounds()) >= 3)
    deployment.kill("supernode-1")
    deployment.restart("supernode-1")
    running.result()
    failed = {r["round"]: r["failed"] for r in rounds() if r.get("failed")}
    assert len(rounds()) == 8
    # until Flower noticed it was gone, and no longer
    assert {cause for each in failed.values() for cause in each.values()} == {"died"}
    assert 1 <= len(failed) <= 4
    assert min(failed) in (4, 5)
    (log,) = out.rglob("log.txt")
    assert "partition 0 is now held by node" in log.read_text()


@pytest.mark.slow
def test_a_server_app_that_is_killed_goes_on_to_the_undisturbed_bits(deployment, tmp_path):
    out, choices = tmp_path / "out", "rounds=4 checkpoint.every=1"
    expected = simulated(SCENARIO, choices, tmp_path / "undisturbed")["params_sha256"]
    settings = {"scenario": SCENARIO, "out": str(out), "set": choices}

    def recorded():
        return [line for f in out.rglob("metrics.jsonl") for line in f.read_text().splitlines()]

    running = started(deployment, settings, until=lambda: len(recorded()) >= 2)
    deployment.kill("superexec-server")
    before = len(recorded())
    deployment.restart("superexec-server")
    with pytest.raises(RunError):  # of the run whose ServerApp is gone
        running.result()
    assert len(recorded()) == before < 5, "something still wrote after the kill"
    deployment.flwr_run(ROOT, {**settings, "resume": True}, timeout_s=300)
    summary = read_summary(out)
    assert (summary["params_sha256"], summary["rounds"]) == (expected, 4)
