"""Law 2: a run that was interrupted anywhere and resumed is the run that was not, times apart.

Interrupted by an exception and by loss of later checkpoints; tests that kill processes are apart.
"""

import json
import shutil

import pytest

import fedsim
from fedsim.basics.errors import CheckpointError, RunError, ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.runs import start as runs
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

ROUNDS = 4
SCENARIOS = {
    "sgd": {},
    "momentum that clients keep": {
        "client": {"momentum": 0.9, "keep_optimizer": True, "lr_decay": 0.8},
        "participation": {"kind": "uniform", "cohort_size": 3},
    },
    "adam that clients keep": {
        "task": {"model": "mlp", "hidden": [8]},
        "client": {"optimizer": "adam", "local_lr": 0.01, "keep_optimizer": True},
        "participation": {"kind": "bernoulli", "rate": 0.4},
    },
    "dropout": {"task": {"model": "mlp_dropout", "hidden": [8]}},
    "batch normalisation": {
        "task": {"model": "cnn_batchnorm"},
        "evaluation": {"every": 3},
        "participation": {"kind": "uniform", "cohort_size": 2},
    },
    "a strategy of Flower's with moments": {"strategy": {"name": "flower:FedAdam", "eta": 0.05}},
    "exploration, and momentum at the server": {
        "strategy": {"name": "fedlex", "server_momentum": 0.5},
        "participation": {"kind": "uniform", "cohort_size": 3},
    },
    "gates of tensors": {"strategy": {"name": "fedld"}, "client": {"margin": 0.1}},
    "intervals, and chains of participation": {
        "strategy": {"name": "fedau"},
        "participation": {"kind": "markov", "rate": 0.5, "label_alpha": 0.5, "activation": 0.5},
    },
    "intervals, and Adam at the server": {
        "strategy": {"name": "fedau", "server": {"name": "adam", "bias_correction": "adam"}},
        "participation": {"kind": "bernoulli", "rate": 0.4},
    },
    "Yogi at the server, and noise around it": {
        "strategy": {
            "name": "flower:DifferentialPrivacyServerSideFixedClipping",
            "noise_multiplier": 0.01,
            "clipping_norm": 0.5,
            "strategy": {"name": "average_all", "server": {"name": "yogi"}},
        },
        "participation": {"kind": "uniform", "cohort_size": 3},
    },
    "updates of every client": {
        "strategy": {"name": "fedvarp"},
        "participation": {"kind": "cyclic", "rate": 0.5, "cycle": 3},
    },
    "attackers, and momentum at the server": {
        "strategy": {"name": "flag", "server_momentum": 0.9, "lr_decay": 0.5},
        "attack": {"kind": "uniform", "num_byzantine": 1},
    },
    "nodes with models and buffers of their own": {
        "task": {"model": "cnn_batchnorm"},
        "strategy": {
            "name": "variance_corrected_gossip",
            "protocol": "buffered",
            "interval": [1, 2],
            "message_loss": 0.3,
        },
        "topology": {"kind": "regular", "degree": 3, "every": 2},
        "evaluation": {"every": 3},
        "participation": {"kind": "bernoulli", "rate": 0.8},
    },
    "output layers that clients keep": {
        "task": {"model": "mlp", "hidden": [8], "personal": ["output"]},
        "client": {"momentum": 0.9, "keep_optimizer": True},
        "partition": {"kind": "iid", "clients": 6, "test_fraction": 0.3},
        "participation": {"kind": "uniform", "cohort_size": 2},
        "evaluation": {"clients": 6},
    },
    "output layers that clients train by themselves first": {
        "task": {"model": "mlp", "hidden": [8], "personal": ["output"]},
        "client": {
            "optimizer": "adam",
            "keep_optimizer": True,
            "local_epochs": 2,
            "parts": [{"name": "alternating"}],
        },
        "partition": {"kind": "iid", "clients": 6, "test_fraction": 0.3},
        "participation": {"kind": "uniform", "cohort_size": 2},
        "evaluation": {"clients": 6, "finetune": {"lr": 0.1, "tensors": ["output"]}},
    },
    "batch normalisation that clients keep": {
        "task": {"model": "cnn_batchnorm", "personal": ["*norm*"]},
        "participation": {"kind": "uniform", "cohort_size": 2},
    },
    "clients that evaluate": {
        "partition": {"kind": "iid", "clients": 6, "test_fraction": 0.3},
        "evaluation": {"clients": 4, "every": 2},
    },
    "an early stop": {
        "evaluation": {"stop": {"metric": "test/accuracy", "patience": 2}},
        "client": {"local_lr": 1e-9},
    },
}

# with its defaults, whatever a strategy remembers
SCENARIOS |= {f"strategy {name}": {"strategy": {"name": name}} for name in fed.strategies()}

# what clients keep for a part, and evaluate with
SCENARIOS |= {
    f"part {part['name']}": {
        "strategy": {"name": fed.strategy_beside({"parts": [part]})},
        "client": {"parts": [part]},
        "partition": {"kind": "iid", "clients": 6, "test_fraction": 0.3},
        "participation": {"kind": "uniform", "cohort_size": 3},
        "evaluation": {"clients": 6},
    }
    for part in fed.parts_with_state()
}


def scenario(**tables):
    document = {
        "seed": 3,
        "rounds": ROUNDS,
        "data": {"name": "digits", "test_fraction": 0.9},
        "partition": {"kind": "dirichlet", "clients": 6, "alpha": 0.5},
        "client": {"local_lr": 0.1, "batch_size": 16},
        "engine": {"kind": "inline", "chunk_size": 2},
        "checkpoint": {"every": 1, "keep": 100},
    }
    for name, table in tables.items():
        replaces = name in ("partition", "participation", "strategy", "attack", "topology")
        document[name] = table if replaces else {**document.get(name, {}), **table}
    return Scenario.from_resolved(document, origin="tests/law_02.toml")


def outcome(folder):
    """All that a run leaves behind, times apart."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("wall_time_s")
    summary["final"] = fed.without_times(summary["final"])
    return {
        "metrics": [fed.without_times(r) for r in JsonLines.read(folder / "metrics.jsonl")],
        "participation": (folder / "participation.jsonl").read_text(),
        "chunks": (folder / "chunks.jsonl").read_text(),
        "params": (folder / "params.safetensors").read_bytes(),
        "summary": summary,
    }


class Interruption:
    """A display that fails in a given round, once the round is recorded."""

    def __init__(self, server_round):
        self.server_round = server_round

    def start(self, first_round):
        self.first_round = first_round

    def update(self, server_round, metrics, *, done, failed, absent):
        if server_round == self.server_round:
            raise KeyboardInterrupt

    def note(self, message):
        pass

    def stop(self):
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Every scenario run through once, by name; made when first asked for."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            runs.start(scenario(**SCENARIOS[name]), out=folder)
            made[name] = folder
        return made[name]

    return run


# one checkpoint of each scenario, another in turn; the others among the slow tests
PLACES = [
    pytest.param(
        name, places, id=f"{name}-{title}",
        marks=[pytest.mark.slow] if title == "others" else [],
    )
    for turn, name in enumerate(SCENARIOS)
    for title, places in {
        "one": {turn % ROUNDS},
        "others": {*range(ROUNDS)} - {turn % ROUNDS},
    }.items()
]  # fmt: skip


@pytest.mark.parametrize(("name", "places"), PLACES)
def test_a_run_resumed_from_any_checkpoint_is_the_undisturbed_one(
    name, places, undisturbed, tmp_path
):
    expected = outcome(undisturbed(name))
    last = expected["summary"]["rounds"]
    for server_round in sorted({min(place, last - 1) for place in places}):
        folder = tmp_path / f"after_{server_round}"
        shutil.copytree(undisturbed(name), folder)
        (folder / "summary.json").unlink()
        for file in (folder / "checkpoints").iterdir():
            if int(file.stem.removeprefix("round_")) > server_round:
                file.unlink()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"round": 99, "test/accu')  # torn, as a kill leaves it
        fedsim.resume(folder)
        assert outcome(folder) == expected, f"resumed after round {server_round}"


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["momentum that clients keep", "batch normalisation"])
def test_a_run_ended_by_an_exception_goes_on_as_if_it_had_not_been(
    name, every, undisturbed, tmp_path
):
    for server_round in (1, 3):
        folder = tmp_path / f"in_{server_round}"
        changed = scenario(**SCENARIOS[name], checkpoint={"every": every, "keep": 2})
        with pytest.raises(KeyboardInterrupt):
            runs.start(changed, out=folder, progress=Interruption(server_round))
        assert not (folder / "summary.json").exists()
        fedsim.resume(folder)
        assert outcome(folder) == outcome(undisturbed(name))


def test_a_run_that_is_interrupted_again_and_again_still_ends_as_it_should(undisturbed, tmp_path):
    name = "adam that clients keep"
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runs.start(scenario(**SCENARIOS[name]), out=folder, progress=Interruption(1))
    for server_round in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            fedsim.resume(folder, progress=Interruption(server_round))
    fedsim.resume(folder)
    assert outcome(folder) == outcome(undisturbed(name))


def test_a_run_whose_client_state_is_lost_is_another_run(undisturbed, tmp_path):
    """The control: were client states not in the checkpoint, the tests above would notice."""
    from fedsim.runs import checkpoint

    name = "momentum that clients keep"
    folder = tmp_path / "run"
    shutil.copytree(undisturbed(name), folder)
    for file in (folder / "checkpoints").iterdir():
        if int(file.stem.removeprefix("round_")) > 2:
            file.unlink()
    place = checkpoint.latest(folder / "checkpoints")
    saved = checkpoint.load(place)
    assert saved.clients
    saved.clients.clear()
    saved.client_state.clear()
    checkpoint.save(place.parent, saved, keep=100)
    fedsim.resume(folder)
    assert outcome(folder)["params"] != outcome(undisturbed(name))["params"]


def test_resuming_a_finished_run_changes_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("sgd"), folder)
    fedsim.resume(folder)
    assert outcome(folder) == outcome(undisturbed("sgd"))


def test_a_run_fails_alike_when_its_failing_round_is_tried_again(tmp_path):
    """A client whose model diverges is refused by name; without any reply the run cannot stand."""
    folder = tmp_path / "run"
    changed = scenario(client={"local_lr": 1e39, "batch_size": 16})
    with pytest.raises(RunError) as first:
        runs.start(changed, out=folder)
    with pytest.raises(RunError) as second:
        fedsim.resume(folder)
    assert str(first.value) == str(second.value)
    assert "round 1" in str(first.value)


def test_what_changes_results_is_refused_when_resuming(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("sgd"), folder)
    with pytest.raises(ScenarioError, match="would change the result"):
        fedsim.resume(folder, overrides=["client.local_lr=0.5"])


def test_a_torn_checkpoint_is_refused_with_the_older_one_as_remedy(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("sgd"), folder)
    place = folder / "checkpoints" / f"round_{ROUNDS:06d}.safetensors"
    place.write_bytes(place.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"is torn .* resume from round_000003"):
        fedsim.resume(folder)
    place.unlink()
    fedsim.resume(folder)
    assert outcome(folder) == outcome(undisturbed("sgd"))


def test_a_changed_bit_in_a_checkpoint_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("sgd"), folder)
    place = folder / "checkpoints" / f"round_{ROUNDS:06d}.safetensors"
    content = bytearray(place.read_bytes())
    content[-5] ^= 1
    place.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="does not match its hash"):
        fedsim.resume(folder)


def test_a_checkpoint_of_another_scenario_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("sgd"), folder)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(undisturbed("dropout") / "checkpoints", folder / "checkpoints")
    with pytest.raises(CheckpointError, match="was made with another scenario"):
        fedsim.resume(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match="is not the folder of a run"):
        fedsim.resume(tmp_path)


def test_two_runs_of_one_scenario_are_equal(undisturbed, tmp_path):
    runs.start(scenario(**SCENARIOS["dropout"]), out=tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(undisturbed("dropout"))


def test_the_chunk_log_names_every_selected_client_once_per_round(undisturbed):
    folder = undisturbed("momentum that clients keep")
    chunks = JsonLines.read(folder / "chunks.jsonl")
    for record in JsonLines.read(folder / "participation.jsonl"):
        trained = [c for e in chunks if e["round"] == record["round"] for c in e["clients"]]
        assert sorted(trained) == record["selected"]
