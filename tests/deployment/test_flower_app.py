"""The ServerApp of a scenario, on nodes that Flower would show it, in this process."""

import json
from types import SimpleNamespace

import pytest

import fedsim
from fedsim.basics.errors import CheckpointError, RunError, ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.deployment import flower_app
from fedsim.deployment.node_software import refusing
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.runs.folder import resuming
from tests.federation.grids.fleet import Fleet

SCENARIO = "scenarios/deploy_two_clients.toml"
ROUNDS = 3


class DiesInRound(Exception):
    """Stands for what ends a ServerApp."""


class Dying(Fleet):
    """Nodes that are asked to train for so many rounds, and of which the next call ends all."""

    def __init__(self, rounds, **given):
        super().__init__(flower_app.client_app, 2, **given)
        self.left = rounds

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if any(each.metadata.message_type == "train" for each in messages):
            self.left -= 1
            if self.left < 0:
                raise DiesInRound
        return super().send_and_receive(messages, timeout=timeout)


def run(out, *, rounds=99, number=7, **config):
    """Run the ServerApp as Flower does."""
    config = {
        "scenario": SCENARIO, "set": "checkpoint.every=1", "out": str(out), "wait-s": 5.0, **config,
    }  # fmt: skip
    nodes = Dying(rounds, run_config=config)
    flower_app.main(nodes, SimpleNamespace(run_config=config, run_id=number))
    return nodes


def outcome(folder):
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [{"round": r["round"], "loss": r.get("test/loss")}
              for r in JsonLines.read(folder / "metrics.jsonl")]  # fmt: skip
    return summary["params_sha256"], summary["rounds"], rounds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "run"
    fedsim.start(
        fedsim.load_scenario(SCENARIO, ["engine.kind=inline", "checkpoint.every=1"]), out=folder
    )
    return folder


def test_nodes_give_the_bits_of_a_simulation(undisturbed, simulated):
    assert outcome(undisturbed) == outcome(simulated)


@pytest.mark.parametrize("after", range(ROUNDS))
def test_a_server_app_that_ended_goes_on_to_the_undisturbed_bits(after, undisturbed, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DiesInRound):
        run(out, rounds=after)
    nodes = run(out, number=8, resume=True)
    assert outcome(out) == outcome(undisturbed)
    assert 99 - nodes.left == ROUNDS - after  # no round was trained again
    assert json.loads((out / "flower_runs.json").read_text())["runs"] == ["7", "8"]


def test_a_run_that_has_finished_is_not_trained_again(undisturbed, tmp_path):
    out = tmp_path / "run"
    run(out)
    assert run(out, resume=True).left == 99
    assert outcome(out) == outcome(undisturbed)


def test_a_simulation_does_not_go_on_with_it_and_says_what_does(undisturbed):
    with pytest.raises(ScenarioError, match=r"was run on SuperNodes.*cannot go on") as refused:
        fedsim.resume(undisturbed)
    told = f'scenario="{SCENARIO}" set="checkpoint.every=1" out="{undisturbed}" resume=true'
    command = f"flwr run . -c '{told}'"
    assert f"`{command}` goes on there" in str(refused.value)
    assert resuming(undisturbed) == command


def test_a_second_run_into_its_folder_is_refused_with_that_command(undisturbed):
    with pytest.raises(ScenarioError, match=r"holds a run already; `flwr run \. -c .*resume=true"):
        run(undisturbed)


def test_nodes_do_not_go_on_with_a_simulation(simulated):
    with pytest.raises(ScenarioError, match=r"was simulated; `fedsim resume .*` goes on"):
        run(simulated, resume=True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"out": ""}, "resume=true needs out"),
        ({"out": "nowhere"}, "nowhere: there is no such run folder"),
        ({"set": "seed=4"}, "scenario and set are of another run than out="),
        ({"scenario": "quickstart"}, "scenario and set are of another run than out="),
        ({"resume": "yes"}, 'resume="yes": must be true or false'),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(config, why, undisturbed):
    before = {file.name: file.read_bytes() for file in undisturbed.iterdir() if file.is_file()}
    with pytest.raises(ScenarioError, match=why):
        run(**{"out": undisturbed, "resume": True, **config})
    after = {file.name: file.read_bytes() for file in undisturbed.iterdir() if file.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ("strategy.name=scaffold", "ControlVariate/"),
        ("'task.personal=[\"output.*\"]'", "output.weight"),
        ("client.parts.top_k.share=0.5", "error"),
    ],
)
def test_what_nodes_have_forgotten_is_named(choice, kept, tmp_path):
    out = tmp_path / "run"
    run(out, set=choice + " expect={}")
    with pytest.raises(ScenarioError, match=rf"keep tensors from round to round .*{kept}"):
        run(out, set=choice + " expect={}", resume=True)


def test_data_that_have_changed_on_the_server_are_named(undisturbed, tmp_path):
    out = tmp_path / "run"
    run(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="data"):
        run(out, resume=True)


# --- what runs on the nodes -----------------------------------------------------------------------


class Unlike(Dying):
    """Nodes of which one says that it computes with something else."""

    def __init__(self, said, **given):
        super().__init__(99, **given)
        self.said = said

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if not reply.has_error() and "partition" in reply.content.config_records:
                told = reply.content.config_records["partition"]
                if told["partition-id"] == 1:
                    told["software"] = self.said(told["software"])
        return replies


def run_unlike(out, said, choices=""):
    config = {"scenario": SCENARIO, "set": choices, "out": str(out), "wait-s": 5.0}
    flower_app.main(Unlike(said, run_config=config), SimpleNamespace(run_config=config, run_id=7))
    return (out / "log.txt").read_text()


def with_torch(told):
    return json.dumps(json.loads(told) | {"torch": "2.11.0", "ray": None})


def test_the_folder_says_what_runs_on_each_node(undisturbed):
    (nodes,) = json.loads((undisturbed / "nodes.json").read_text())
    assert [each["partition"] for each in nodes] == [0, 1]
    here = json.loads((undisturbed / "versions.json").read_text())
    for node in nodes:
        assert node["software"] == {name: str(value) for name, value in here.items()}
    assert "than the server" not in (undisturbed / "log.txt").read_text()


def test_a_node_with_other_software_is_named_with_what_differs(undisturbed, tmp_path):
    out = tmp_path / "run"
    log = run_unlike(out, with_torch)
    assert "the node of partition 1 computes with others than the server (torch 2.11.0 and " in log
    assert log.count("than the server") == 1
    (nodes,) = json.loads((out / "nodes.json").read_text())
    assert nodes[1]["software"]["torch"] == "2.11.0"


@pytest.mark.parametrize(("said", "refused"), [(with_torch, True), (lambda told: told, False)])
def test_under_portable_bits_it_is_refused_before_round_1(said, refused):
    config = {"scenario": SCENARIO, "set": ""}
    nodes = PartitionGrid(
        Unlike(said, run_config=config), 2, timeout_s=5.0, why_not=refusing("portable")
    )
    if refused:
        with pytest.raises(RunError, match=r"partition 1 computes with others .*torch 2\.11"):
            len(nodes.nodes)
    else:
        assert len(nodes.nodes) == 2


@pytest.mark.parametrize("said", ["", "{", "[1]", "3", '{"torch": 3}'])
def test_what_a_node_says_may_be_nonsense_and_ends_nothing(said, tmp_path):
    run_unlike(tmp_path / "run", lambda _: said)
    assert outcome(tmp_path / "run")[1] == ROUNDS
