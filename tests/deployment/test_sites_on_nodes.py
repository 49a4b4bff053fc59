"""Four sites as processes, each with its own file, in a mount namespace without the others'."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fedsim.basics.errors import RunError
from fedsim.deployment.processes import Deployment
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment.runs_on_nodes import started
from tests.deployment.sites_apart import outcome, rows_of, scenario, write, written
from tests.tiers import by_turns

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SITES = 4
STRATEGIES = ["fedavg", "fedau", "fedld", "fedlex", "flag"]

# shows nothing of SITES but one of them, then goes on with the command
_HIDDEN = 'mount --bind "$1" "$2" && mount -t tmpfs none "$3" && shift 3 && exec "$@"'


def can_hide():
    """Whether this user may have a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def four_nodes(file, seen, kept):
    """The compose file with four nodes, which read what they see of the sites, and keep states."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = document["services"]
    for number in range(1, SITES + 1):
        node = yaml.safe_load(yaml.safe_dump(services["supernode-1"]))
        client = yaml.safe_load(yaml.safe_dump(services["superexec-client-1"]))
        config = f"partition-id={number - 1} num-partitions={SITES} data-path='{seen[number - 1]}'"
        node["command"][-1] = config
        client["command"] = [
            w.replace("supernode-1", f"supernode-{number}") for w in client["command"]
        ]
        client["depends_on"] = {f"supernode-{number}": {"condition": "service_healthy"}}
        secret = f"secret-node-{number}:/app/secret"
        node["volumes"], client["volumes"] = [secret], [f"{secret}:ro"]
        client["environment"] = client["environment"] | {"FEDSIM_SITE_STATE": f"{kept}/{number}"}
        if number > 1:
            services[f"supernode-{number}"] = node
            services[f"superexec-client-{number}"] = client
    services["supernode-1"]["command"][-1] = (
        f"partition-id=0 num-partitions={SITES} data-path='{seen[0]}'"
    )
    first = services["superexec-client-1"]
    first["volumes"] = ["secret-node-1:/app/secret:ro"]
    first["environment"] = first["environment"] | {"FEDSIM_SITE_STATE": f"{kept}/1"}
    link = services["superlink"]
    link["environment"] = link["environment"] | {"FEDSIM_DATABASE": "superlink.db"}
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The sites' files, and the scenario's folder; a server's own test set lies beside."""
    folder = tmp_path_factory.mktemp("federation")
    files = written(folder / "sites")
    write(folder / "held_out.csv", *rows_of(9, 20))
    return folder, files


@pytest.fixture(scope="module")
def deployment(sites, tmp_path_factory):
    if not can_hide():
        pytest.skip("no mount namespace of its own for this user (unshare -m): run it as root")
    folder, files = sites
    nodes = tmp_path_factory.mktemp("nodes")
    seen, within = [], {}
    for number, file in enumerate(files, start=1):
        place = nodes / f"own_{number}"
        place.mkdir()
        seen.append(place / file.name)
        hidden = ["unshare", "-m", "sh", "-c", _HIDDEN, "sh", file.parent, place, folder / "sites"]
        within[f"superexec-client-{number}"] = list(map(str, hidden))
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "sh"]
    within["superexec-server"] = [*hidden, str(folder / "sites")]
    compose = four_nodes(nodes / "docker-compose.yml", seen, nodes / "kept")
    with Deployment(compose, folder=nodes / "run", within=within) as running:
        yield running


@pytest.mark.parametrize("strategy", by_turns(STRATEGIES, 5))
def test_sites_apart_have_the_bits_of_a_simulation_over_their_files(
    deployment, sites, strategy, tmp_path
):
    folder, files = sites
    data = f'test = "{folder}/held_out.csv"'
    file = scenario(folder, files, f"{strategy}.toml", data=data, strategy=strategy, rounds=2)
    deployment.flwr_run(ROOT, {"scenario": str(file), "out": str(tmp_path / "run")}, timeout_s=400)
    start(load(file), out=tmp_path / "simulated")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "simulated")


def test_no_site_opens_another_s_file(deployment, sites):
    folder, files = sites
    for number in range(1, SITES + 1):
        pid = deployment.pids[f"superexec-client-{number}"]
        for file in files:
            inside = Path(f"/proc/{pid}/root{file}")
            assert not inside.exists()
            own = Path(f"/proc/{pid}/root{folder.parent}")
            assert own.exists()
        place = Path(f"/proc/{pid}/root") / str(deployment.folder.parent / f"own_{number}")[1:]
        assert (place / "patients.csv").read_bytes() == files[number - 1].read_bytes()
    server = deployment.pids["superexec-server"]
    assert not Path(f"/proc/{server}/root{files[0]}").exists()


def test_a_node_that_is_told_of_another_site_s_file_is_named_before_round_1(
    deployment, sites, tmp_path
):
    folder, files = sites
    mine = tmp_path / "site.toml"
    mine.write_text(f'[site]\ndata = "{files[0]}"')
    file = scenario(folder, files, "other.toml", rounds=1)
    command = deployment.command("supernode-2")
    assert os.path.exists(files[0])
    config = command.index("--node-config") + 1
    with pytest.raises(RunError, match=r"no node holds partition 1.*its file is not there"):
        _with_node_config(deployment, "supernode-2", config, f"site='{mine}'", file, tmp_path)


def _with_node_config(deployment, service, place, more, file, tmp_path):
    """Run with another node config of one node, and start that node again as it was."""
    commands = deployment._commands
    before = list(commands[service])
    own = before[place].rpartition(" data-path")[0]
    deployment.kill(service)
    commands[service] = [*before[:place], f"{own} {more}", *before[place + 1 :]]
    deployment.restart(service)
    try:
        settings = {"scenario": str(file), "out": str(tmp_path / "run"), "wait-s": 60.0}
        deployment.flwr_run(ROOT, settings, timeout_s=200)
    finally:
        deployment.kill(service)
        commands[service] = before
        deployment.restart(service)


def rounds_of(out):
    """The rounds that are over, as the run's folder has them."""
    found = [f.read_text().splitlines() for f in out.rglob("participation.jsonl")]
    return [json.loads(line) for lines in found for line in lines]


def until(running, out, server_round):
    """Wait until a round is over, or the run."""
    while not running.done() and len(rounds_of(out)) < server_round:
        time.sleep(0.2)


KILLED = """
on_failure = "retry"
retries = 3
[checkpoint]
every = 1
[deployment]
rejoin_s = 120.0
"""

# after which round, and what; a ServerApp dies with the SuperExec that has started it
KILLS = [
    (1, "supernode-2"), (1, "superexec-client-3"), (2, "superlink"), (3, "superexec-server"),
    (4, "supernode-4"), (4, "superexec-client-1"), (5, "superlink"), (6, "superexec-server"),
    (6, "supernode-1"), (7, "superexec-client-2"),
]  # fmt: skip


# the seed with which every site takes part in six of eight rounds
CHANCE = "seed=98"


def missed(out):
    """In how many rounds each site was not."""
    return [sum(site not in each["selected"] for each in rounds_of(out)) for site in range(SITES)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_whatever_is_killed_and_started_again_changes_no_bit(deployment, sites, strategy, tmp_path):
    """`kill -9` at ten points, over sites of unequal sizes that take part by chance."""
    folder, files = sites
    file = scenario(
        folder, files, f"killed_{strategy}.toml", strategy=strategy, rounds=8, tables=KILLED,
        participation="bernoulli", rate="rate = 0.75", data=f'test = "{folder}/held_out.csv"',
    )  # fmt: skip
    start(load(file, [CHANCE]), out=tmp_path / "simulated")
    assert missed(tmp_path / "simulated") == [2, 2, 2, 2]
    out = tmp_path / "run"
    settings = {"scenario": str(file), "out": str(out), "set": CHANCE}
    running = started(deployment, settings)
    for after, service in KILLS:
        until(running, out, after)
        assert not running.done(), running.result()
        time.sleep(1.0)  # into the round
        deployment.kill(service)
        deployment.restart(service)
        if service == "superexec-server":  # and with it the run, once Flower has missed it
            with pytest.raises(RunError):
                running.result()
            running = started(deployment, settings | {"resume": True})
    running.result()
    expected, found = outcome(tmp_path / "simulated"), outcome(out)
    assert found[0] == expected[0]
    assert [each["test/loss"] for each in found[1]] == [each["test/loss"] for each in expected[1]]
    assert sum(each.get("clients/retried", 0) for each in found[1]) >= 1
    assert [each.get("clients/failed", 0) for each in found[1]] == [0] * 9


@pytest.mark.slow
def test_sites_that_take_part_by_chance_have_the_bits_of_a_simulation(deployment, sites, tmp_path):
    """Eight rounds of unequal sites, each of which misses two, and nobody is killed."""
    folder, files = sites
    file = scenario(
        folder, files, "by_chance.toml", rounds=8, participation="bernoulli", rate="rate = 0.75",
    )  # fmt: skip
    start(load(file, [CHANCE]), out=tmp_path / "simulated")
    settings = {"scenario": str(file), "out": str(tmp_path / "run"), "set": CHANCE}
    deployment.flwr_run(ROOT, settings, timeout_s=500)
    assert missed(tmp_path / "run") == [2, 2, 2, 2]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "simulated")
