"""`flwr run` against the compose file's own commands, on loopback."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml

import fedsim
from fedsim.basics.errors import RunError
from fedsim.deployment.addresses import free_port
from fedsim.deployment.processes import Deployment
from fedsim.scenario.load import load

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = "scenarios/deploy_two_clients.toml"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with Deployment(
        ROOT / "docker-compose.yml", folder=tmp_path_factory.mktemp("plain")
    ) as running:
        yield running


def proof_model(rounds: int = 3) -> float:
    """What the proof app must end with: a client goes half the way to its own number."""
    model = 0.0
    for _ in range(rounds):
        replies = [(model + 1.0) / 2, (model + 3.0) / 2]
        model = (1 * replies[0] + 3 * replies[1]) / 4
    return model


def read_summary(folder: Path) -> dict:
    (summary,) = folder.rglob("summary.json")
    return json.loads(summary.read_text())


def test_an_app_of_flower_alone_finishes_three_rounds_on_two_nodes(deployment, proof_app, tmp_path):
    run = deployment.flwr_run(proof_app, {"out": str(tmp_path)})
    summary = read_summary(tmp_path)
    assert summary["model"] == [proof_model()] * 3
    # A node keeps its state from one message to the next, though each has a process of its own.
    assert [summary["metrics"][str(r)]["calls"] for r in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert "Received 2 results and 0 failures" in run.log


def test_a_client_that_raises_leaves_its_reason_in_the_log_of_its_node(
    deployment, proof_app, tmp_path
):
    # Flower's FedAvg goes on with the replies it has.
    run = deployment.flwr_run(proof_app, {"out": str(tmp_path), "rounds": 1, "culprit": 1})
    assert "Received 1 results and 1 failures" in run.log
    assert "ValueError: partition 1 has no data" in deployment.log("superexec-client-2")
    assert "has no data" not in deployment.log("superexec-client-1")


def test_a_server_app_that_raises_fails_the_run_with_its_reason(deployment, proof_app, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(RunError, match=r"(?s)ended as finished:failed.*FileNotFoundError"):
        deployment.flwr_run(proof_app, {"out": str(missing), "rounds": 1})


def test_a_run_that_takes_too_long_is_stopped_and_the_nodes_are_free_again(
    deployment, proof_app, tmp_path
):
    with pytest.raises(RunError, match="did not end within 6 s and was stopped"):
        deployment.flwr_run(proof_app, {"out": str(tmp_path)}, timeout_s=6)
    deployment.flwr_run(proof_app, {"out": str(tmp_path), "rounds": 1}, timeout_s=90)
    assert read_summary(tmp_path)["model"] == [proof_model(rounds=1)] * 3


def test_an_app_that_cannot_be_submitted_is_told_with_the_reason(deployment, proof_app, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(proof_app, broken)
    text = (broken / "pyproject.toml").read_text()
    (broken / "pyproject.toml").write_text(text.replace('publisher = "fedsim"', ""))
    with pytest.raises(RunError, match=r'(?s)did not submit .*"publisher" missing'):
        deployment.flwr_run(broken)


def test_the_tls_overlay_carries_the_same_run_over_https(proof_app, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: certificates cannot be made")
    for name in ("docker-compose.yml", "deploy/tls.yml", "deploy/certificates.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(
        [tmp_path / "deploy" / "certificates.sh", "--authority", tmp_path / "authority"], check=True
    )
    with Deployment(
        tmp_path / "docker-compose.yml",
        overlays=[tmp_path / "deploy" / "tls.yml"],
        folder=tmp_path / "nodes",
    ) as deployment:
        for service in deployment.pids:
            assert "--insecure" not in deployment.command(service)
        out = tmp_path / "out"
        out.mkdir()
        deployment.flwr_run(proof_app, {"out": str(out)})
        assert read_summary(out)["home"].endswith("superexec-server/.flwr")
        assert "https://127.0.0.1" in deployment.log("superlink")
        assert "https://127.0.0.1" in deployment.log("supernode-1")
    assert read_summary(out)["model"] == [proof_model()] * 3


def test_a_superexec_without_the_secret_is_given_nothing_and_one_with_it_is(
    deployment, proof_app, tmp_path
):
    """The second half is the control: but for the secret, the stranger has all that it needs."""
    out = tmp_path / "out"
    out.mkdir()
    deployment.kill("superexec-server")
    try:
        with stranger(deployment, tmp_path / "without", secret=False):
            running = started(deployment, {"out": str(out), "rounds": 1}, app=proof_app)
            time.sleep(15.0)
            assert not running.done()
            assert not list(out.iterdir())
        with stranger(deployment, tmp_path / "with", secret=True):
            running.result()
    finally:
        deployment.restart("superexec-server")
    assert read_summary(out)["home"] == str(tmp_path / "with")


@contextlib.contextmanager
def stranger(deployment, folder, *, secret):
    """A SuperExec that knows the SuperLink's address, its certificate, and maybe the secret."""
    folder.mkdir()
    command = deployment.command("superexec-server")
    place = command.index("--superexec-auth-secret-file")
    if not secret:
        command = [*command[:place], *command[place + 2 :]]
    health = command.index("--health-server-address") + 1
    command[health] = f"127.0.0.1:{free_port()}"
    home = deployment.folder / "superexec-server"
    variables = {**os.environ, "FLWR_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with (folder / "log.txt").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=home, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


# a strategy with a linear rule, one with a set-up exchange and extras, one with personal models,
# one whose server has an optimiser; replies compressed against the model received and against what
# is remembered; clients that train on poisoned data
@pytest.mark.parametrize(
    "choice",
    [
        "strategy.name=fedavg",
        "strategy.name=fedlex",
        "strategy.name=variance_corrected_gossip",
        "strategy.name=fedau strategy.server.name=adam",
        "client.parts.top_k.share=0.1",
        "strategy.name=ef21",
        "attack.kind=label_flip attack.num_byzantine=1",
    ],
)
def test_the_repository_runs_on_nodes_with_the_bits_of_a_simulation(deployment, choice, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if "flwr" not in project["tool"] or not (ROOT / SCENARIO).is_file():
        pytest.skip(f"no [tool.flwr.app] or no {SCENARIO} yet")
    simulated, deployed = tmp_path / "simulated", tmp_path / "deployed"
    command = "from fedsim.cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", command, "run", SCENARIO, "--out", str(simulated)]
        + [word for each in choice.split() for word in ("--set", each)]
        + (["--set", "expect={}"] if choice != "strategy.name=fedavg" else []),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    settings = {"scenario": SCENARIO, "set": choice, "out": str(deployed)}
    deployment.flwr_run(ROOT, settings, timeout_s=400)
    expected, found = read_summary(simulated), read_summary(deployed)
    assert found["rounds"] == expected["rounds"] == 3
    assert found["params_sha256"] == expected["params_sha256"]
    # as many bytes came back, but for nodes' numbers, which are longer here
    sent, simulated_bytes = (each["final"]["comm/uplink_bytes"] for each in (found, expected))
    assert 0 <= sent - simulated_bytes <= 100


def test_nodes_keep_tensors_and_measure_with_them_as_a_simulation_does(deployment, tmp_path):
    """Each client's output layer lies in its own node, and has the bits that the engine keeps."""
    scenario = "scenarios/fedavg_personal_output.toml"
    choice = (
        "rounds=3 partition.clients=2 participation.cohort_size=2 engine.chunk_size=2 "
        "evaluation.clients=2 evaluation.every=1 expect={}"
    )
    simulated, deployed = tmp_path / "simulated", tmp_path / "deployed"
    overrides = [word for each in choice.split() for word in ("--set", each)]
    command = "from fedsim.cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", command, "run", scenario, "--out", str(simulated), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    settings = {"scenario": scenario, "set": choice, "out": str(deployed)}
    deployment.flwr_run(ROOT, settings, timeout_s=400)
    expected, found = read_summary(simulated), read_summary(deployed)
    assert found["params_sha256"] == expected["params_sha256"]
    # as many bytes came back, but for nodes' numbers, which are longer here
    sent, simulated_bytes = (each["final"]["comm/uplink_bytes"] for each in (found, expected))
    assert 0 <= sent - simulated_bytes <= 100
    measured = [n for n in expected["final"] if n.startswith(("local/", "personal/"))]
    assert "personal/accuracy" in measured
    assert {n: found["final"][n] for n in measured} == {n: expected["final"][n] for n in measured}


def test_nodes_of_any_kind_of_processor_have_portable_bits(deployment, tmp_path):
    simulated, deployed, refused = (tmp_path / n for n in ("simulated", "deployed", "refused"))
    choice = "engine.bits=portable rounds=2 expect={}"
    command = "from fedsim.cli import main; main()"
    overrides = [word for each in choice.split() for word in ("--set", each)]
    subprocess.run(
        [sys.executable, "-c", command, "run", SCENARIO, "--out", str(simulated), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    settings = {"scenario": SCENARIO, "set": choice}
    with Deployment(
        ROOT / "docker-compose.yml",
        overlays=[ROOT / "deploy" / "portable.yml"],
        folder=tmp_path / "nodes",
    ) as portable:
        portable.flwr_run(ROOT, {**settings, "out": str(deployed)}, timeout_s=400)
    expected, found = read_summary(simulated), read_summary(deployed)
    assert found["params_sha256"] == expected["params_sha256"]
    # as many bytes came back, but for nodes' numbers, which are longer here
    sent, simulated_bytes = (each["final"]["comm/uplink_bytes"] for each in (found, expected))
    assert 0 <= sent - simulated_bytes <= 100
    # without the overlay nothing is trained under a promise that is not kept
    with pytest.raises(RunError, match=r"(?s)'portable': this process computes with other kernels"):
        deployment.flwr_run(ROOT, {**settings, "out": str(refused)}, timeout_s=400)


def started(deployment, settings, *, until=lambda: True, app=ROOT):
    """A run of an app that goes on beside the test, once something holds of it."""
    running = Future()

    def run():
        try:
            running.set_result(deployment.flwr_run(app, settings, timeout_s=500))
        except Exception as error:
            running.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not running.done() and not until():
        time.sleep(0.2)
    return running


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


def test_a_server_app_that_is_killed_goes_on_to_the_undisturbed_bits(deployment, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    choices = "rounds=4 checkpoint.every=1"
    scenario = load(SCENARIO, [*choices.split(), "engine.kind=inline"])
    expected = fedsim.start(scenario, out=undisturbed).summary["params_sha256"]
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


def with_site_files(folder, file):
    """An overlay whose SuperNodes name that site file."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = {}
    for name in ("supernode-1", "supernode-2"):
        *command, config = document["services"][name]["command"]
        services[name] = {"command": [*command, f"{config} site='{file}'"]}
    overlay = folder / "sites.yml"
    overlay.write_text(yaml.safe_dump({"services": services}))
    return overlay


def test_a_site_is_asked_for_nothing_that_its_file_does_not_allow(tmp_path):
    record, file = tmp_path / "audit.jsonl", tmp_path / "site.toml"
    file.write_text(f'[site]\nimports = []\noverrides = ["rounds", "expect"]\naudit = "{record}"\n')
    with Deployment(
        ROOT / "docker-compose.yml",
        overlays=[with_site_files(tmp_path, file)],
        folder=tmp_path / "nodes",
    ) as nodes:
        out = tmp_path / "allowed"
        settings = {"scenario": SCENARIO, "set": "rounds=1 expect={}", "out": str(out)}
        nodes.flwr_run(ROOT, settings, timeout_s=400)
        assert read_summary(out)["rounds"] == 1
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        assert [line["instruction"] for line in lines].count("train") == 2
        assert all(line["error"] is None for line in lines)
        assert all(line["bytes_sent"] > 0 for line in lines if line["instruction"] == "train")
        settings |= {"set": "client.local_lr=0.3", "out": str(tmp_path / "refused")}
        with pytest.raises(RunError, match="allowed: rounds, expect"):
            nodes.flwr_run(ROOT, settings, timeout_s=400)
