"""The core of a deployment, by default: two sites, TLS, and a SuperLink that is killed.

What more there is to it is tried by `make test-deploy`.
"""

import shutil
import subprocess
import time

import pytest

from fedsim.deployment.processes import Deployment
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment.runs_on_nodes import ROOT, started
from tests.deployment.sites_apart import SIZES, outcome, scenario, written


@pytest.mark.timeout(300)
def test_two_sites_under_tls_have_the_bits_of_a_simulation_though_the_superlink_is_killed(
    tmp_path, monkeypatch
):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: certificates cannot be made")
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    made = [tmp_path / "deploy" / "certificates.sh", "--authority", tmp_path / "authority"]
    subprocess.run(made, check=True, capture_output=True)
    files = written(tmp_path / "sites", SIZES[:2])
    for number, file in enumerate(files, start=1):
        monkeypatch.setenv(f"FEDSIM_SITE_{number}", str(file.parent))
    file = scenario(tmp_path, files, rounds=1)
    start(load(file), out=tmp_path / "simulated")
    overlays = [tmp_path / "deploy" / f"{name}.yml" for name in ("tls", "sites", "state")]
    out = tmp_path / "run"
    with Deployment(
        tmp_path / "docker-compose.yml", overlays=overlays, folder=tmp_path / "nodes"
    ) as deployment:
        settings = {"scenario": str(file), "out": str(out)}
        running = started(deployment, settings, until=(out / "nodes.json").exists)
        time.sleep(1.0)  # into the round
        assert not (out / "summary.json").exists()
        before = deployment.pids["superlink"]
        deployment.kill("superlink")
        deployment.restart("superlink")
        running.result()
        assert deployment.pids["superlink"] != before
    assert outcome(out) == outcome(tmp_path / "simulated")
