"""The backup drill of docs/deployment.md: a copy made while all is stopped is enough to go on."""

import shutil

import pytest

from fedsim.deployment.processes import Deployment
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment.runs_on_nodes import ROOT, started
from tests.deployment.sites_apart import SIZES, outcome, scenario, written

KEPT = "[checkpoint]\nevery = 1\n[deployment]\nwait_s = 60.0\n"
# as the page's table has them: the SuperLink's home, and the volumes
COPIED = ("superlink", ".volumes/runs", ".volumes/state-1", ".volumes/state-2")


@pytest.mark.deploy
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_from_a_copy_to_the_undisturbed_bits(tmp_path, monkeypatch):
    files = written(tmp_path / "sites", SIZES[:2])
    for number, file in enumerate(files, start=1):
        monkeypatch.setenv(f"FEDSIM_SITE_{number}", str(file.parent))
    file = scenario(tmp_path, files, rounds=4, strategy="scaffold", tables=KEPT)
    start(load(file), out=tmp_path / "simulated")
    overlays = [ROOT / "deploy" / f"{name}.yml" for name in ("sites", "state")]
    settings = {"scenario": str(file), "out": "runs/first"}
    there = tmp_path / "there"
    with Deployment(ROOT / "docker-compose.yml", overlays=overlays, folder=there) as deployment:
        out = there / ".volumes" / "runs" / "first"
        started(
            deployment, settings,
            until=lambda: any(
                len(f.read_text().splitlines()) > 1 for f in out.rglob("participation.jsonl")
            ),
        )  # fmt: skip
    assert not (out / "summary.json").exists()
    again = tmp_path / "again"
    for name in COPIED:  # what is mounted into a home is not in its volume
        shutil.copytree(there / name, again / name, ignore=shutil.ignore_patterns("secret"))
    shutil.rmtree(there)
    with Deployment(ROOT / "docker-compose.yml", overlays=overlays, folder=again) as deployment:
        deployment.flwr_run(ROOT, settings | {"resume": True}, timeout_s=300)
    assert outcome(again / ".volumes" / "runs" / "first") == outcome(tmp_path / "simulated")
