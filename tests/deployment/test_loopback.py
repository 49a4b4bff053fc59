"""`flwr run` against the compose file's own commands, on loopback."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedsim.basics.errors import RunError
from fedsim.deployment.addresses import free_port
from fedsim.deployment.processes import Deployment
from tests.deployment.runs_on_nodes import ROOT, SCENARIO, read_summary, simulated, started
from tests.tiers import slow

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]


def proof_model(rounds: int = 3) -> float:
    """What the proof app must end with: a client goes half the way to its own number."""
    model = 0.0
    for _ in range(rounds):
        replies = [(model + 1.0) / 2, (model + 3.0) / 2]
        model = (1 * replies[0] + 3 * replies[1]) / 4
    return model


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


# a strategy with a linear rule, one with a set-up exchange and extras, one with personal models;
# one whose server has an optimiser; replies compressed against the model received and against what
# is remembered; clients that train on poisoned data
@pytest.mark.parametrize(
    "choice",
    [
        "strategy.name=fedavg",
        slow("strategy.name=fedlex"),
        slow("strategy.name=variance_corrected_gossip"),
        slow("strategy.name=fedau strategy.server.name=adam"),
        slow("client.parts.top_k.share=0.1"),
        slow("strategy.name=ef21"),
        slow("attack.kind=label_flip attack.num_byzantine=1"),
    ],
)
def test_the_repository_runs_on_nodes_with_the_bits_of_a_simulation(deployment, choice, tmp_path):
    if choice != "strategy.name=fedavg":
        choice += " expect={}"
    expected = simulated(SCENARIO, choice, tmp_path / "simulated")
    settings = {"scenario": SCENARIO, "set": choice, "out": str(tmp_path / "deployed")}
    deployment.flwr_run(ROOT, settings, timeout_s=400)
    found = read_summary(tmp_path / "deployed")
    assert found["rounds"] == expected["rounds"] == 3
    has_the_bits(found, expected)


def has_the_bits(found, expected):
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
    expected = simulated(scenario, choice, tmp_path / "simulated")
    settings = {"scenario": scenario, "set": choice, "out": str(tmp_path / "deployed")}
    deployment.flwr_run(ROOT, settings, timeout_s=400)
    found = read_summary(tmp_path / "deployed")
    has_the_bits(found, expected)
    measured = [n for n in expected["final"] if n.startswith(("local/", "personal/"))]
    assert "personal/accuracy" in measured
    assert {n: found["final"][n] for n in measured} == {n: expected["final"][n] for n in measured}


@pytest.mark.slow
def test_nodes_of_any_kind_of_processor_have_portable_bits(tmp_path):
    apart, deployed, refused = (tmp_path / n for n in ("simulated", "deployed", "refused"))
    choice = "engine.bits=portable rounds=2 expect={}"
    command = "from fedsim.cli import main; main()"
    overrides = [word for each in choice.split() for word in ("--set", each)]
    subprocess.run(
        [sys.executable, "-c", command, "run", SCENARIO, "--out", str(apart), *overrides],
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
    has_the_bits(read_summary(deployed), read_summary(apart))
    # nothing is trained under a promise that is not kept: here NumPy has chosen other kernels, of
    # whatever the processor has, before the scenario is read
    other = tmp_path / "other.yml"
    lacks = {"environment": {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}}
    other.write_text(yaml.safe_dump({"services": {"superexec-client-1": lacks}}))
    with (
        Deployment(
            ROOT / "docker-compose.yml", overlays=[ROOT / "deploy" / "portable.yml", other],
            folder=tmp_path / "others",
        ) as others,
        pytest.raises(RunError, match=r"node of partition 0 computes with others .*NumPy"),
    ):  # fmt: skip
        others.flwr_run(ROOT, {**settings, "out": str(refused)}, timeout_s=400)


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
