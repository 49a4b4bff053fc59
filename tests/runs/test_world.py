"""What a scenario's tables become in a run: attackers, graphs, rates, starts and noisy labels."""

import json
import time

import numpy as np
import pytest
import torch

import fedsim
from fedsim.basics.errors import CheckpointError, RunError, ScenarioError, UnwrittenCheckpointError
from fedsim.basics.json_files import JsonLines
from fedsim.data.partitions.skew import FeatureSkew, skewed
from fedsim.runs import checkpoint
from fedsim.runs import start as runs
from fedsim.runs.execute import execute
from fedsim.runs.manifest import write_plan
from fedsim.runs.world import build
from fedsim.scenario.scenario import Scenario

GOSSIP = {
    "strategy": {"name": "gossip"},
    "topology": {"kind": "line"},
    "task": {"model": "mlp", "hidden": [8], "init": "xavier"},
}


def scenario(**tables):
    document = {
        "seed": 3,
        "rounds": 2,
        "data": {"name": "digits", "test_fraction": 0.9},
        "partition": {"kind": "iid", "clients": 4},
        "client": {"local_lr": 0.1, "batch_size": 16},
        "engine": {"kind": "inline", "chunk_size": 2},
    }
    return Scenario.from_resolved({**document, **tables}, origin="tests/run.toml")


def records(result):
    return JsonLines.read(result.folder / "metrics.jsonl")


def refusal(**tables):
    with pytest.raises(ScenarioError) as caught:
        build(scenario(**tables))
    return str(caught.value)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [2, 6], ids=["on the way", "the last one"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_which_goes_on_later(
    tmp_path, monkeypatch, fails_at
):
    """It is written while later rounds are computed, of which none may be lost or kept twice."""
    asked = scenario(rounds=6, checkpoint={"every": 2}, client={"momentum": 0.9})
    whole = runs.start(asked, out=tmp_path / "whole")
    write = checkpoint.write

    def full(folder, packed, *, keep):
        time.sleep(0.05)  # the run goes on meanwhile
        if packed.server_round == fails_at:
            raise UnwrittenCheckpointError("no room for a checkpoint")
        return write(folder, packed, keep=keep)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", full)
        with pytest.raises(RunError, match="no room"):
            runs.start(asked, out=tmp_path / "torn")
    assert not (tmp_path / "torn" / "summary.json").exists()
    newest = max((tmp_path / "torn" / "checkpoints").iterdir())
    assert newest.name == f"round_{fails_at - 2:06d}.safetensors"
    resumed = runs.resume(tmp_path / "torn")
    assert resumed.summary["params_sha256"] == whole.summary["params_sha256"]
    rounds = [record["round"] for record in records(resumed)]
    assert rounds == [record["round"] for record in records(whole)] == list(range(7))


def test_what_ends_a_run_is_said_and_that_a_checkpoint_could_not_be_written_is_logged(
    tmp_path, monkeypatch, caplog
):
    write, append = checkpoint.write, JsonLines.append

    def full(folder, packed, *, keep):
        if packed.server_round == 2:
            time.sleep(0.3)  # until after round 3
            raise UnwrittenCheckpointError("no room for a checkpoint")
        return write(folder, packed, keep=keep)

    def stop(file, record):
        if record["round"] == 3:
            raise InterruptedError("in round 3")
        append(file, record)

    monkeypatch.setattr(checkpoint, "write", full)
    monkeypatch.setattr(JsonLines, "append", stop)
    with pytest.raises(InterruptedError, match="in round 3"):
        runs.start(scenario(rounds=6, checkpoint={"every": 2}), out=tmp_path / "run")
    assert "no room for a checkpoint" in caplog.text


# --- attackers ------------------------------------------------------------------------------------


def test_an_attacker_in_a_scenario_moves_the_mean_and_not_the_median(tmp_path):
    attack = {"kind": "uniform", "scale": 1e3, "clients": [2]}
    moved = {}
    for name in ("fedavg", "coordinate_median"):
        models = []
        for number, table in enumerate(({}, {"attack": attack})):
            changed = scenario(strategy={"name": name}, rounds=1, **table)
            result = fedsim.start(changed, out=tmp_path / f"{name}{number}")
            models.append(result.summary["params_sha256"])
            final = records(result)[-1]["test/loss"]
        moved[name] = final
        assert models[0] != models[1]
    assert moved["fedavg"] > 100
    assert moved["coordinate_median"] < 10


def test_what_attackers_send_is_judged_like_any_reply(tmp_path):
    attack = {"kind": "uniform", "scale": 1e39, "clients": [2]}
    result = fedsim.start(scenario(attack=attack), out=tmp_path / "run")
    assert [r["clients/failed/not_finite"] for r in records(result)[1:]] == [1, 1]


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"kind": "unifrom"}, "did you mean 'uniform'?"),
        ({"kind": "uniform", "num_byzantine": 5}, "num_byzantine = 5: must be in 0..4"),
        ({"kind": "uniform", "num_byzantin": 1}, "did you mean 'num_byzantine'?"),
        ({"kind": "alie", "clients": [4]}, "there is no client 4"),
        ({"num_byzantine": 1}, "'kind' is missing"),
    ],
)
def test_an_impossible_attack_is_refused(attack, words):
    message = refusal(attack=attack)
    assert "[attack]" in message
    assert words in message


# --- graphs ---------------------------------------------------------------------------------------


def test_nodes_start_from_models_of_their_own_and_are_evaluated_each(tmp_path):
    result = fedsim.start(scenario(**GOSSIP), out=tmp_path / "run")
    for record in records(result):
        low, mean, high = (record[f"nodes/accuracy{end}"] for end in ("_min", "", "_max"))
        assert low <= mean <= high
        assert record["nodes/loss_min"] < record["nodes/loss_max"]
    assert records(result)[-1]["server/consensus_distance"] > 0.1
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["topology"]["edges"] == 3
    assert (result.folder / "topology.png").read_bytes()[:4] == b"\x89PNG"


def test_starts_of_their_own_are_the_tasks_initialisation_from_seeds_apart():
    world = build(scenario(**GOSSIP))
    starts = [world.layout.unflatten(world.strategy.start_of(c)) for c in range(3)]
    common = {name: torch.from_numpy(a.numpy()) for name, a in world.arrays.items()}
    weights = [s["hidden1.weight"].reshape(-1) for s in (*starts, common)]
    assert not any(s[n].any() for s in starts for n in s if n.endswith("bias"))
    correlations = np.corrcoef(torch.stack(weights).numpy()) - np.eye(4)
    assert np.abs(correlations).max() < 4 / np.sqrt(weights[0].numel())
    again = build(scenario(**GOSSIP)).strategy.start_of(1)
    assert torch.equal(again, world.strategy.start_of(1))


def test_a_strategy_with_a_graph_takes_the_ring_unless_told_otherwise():
    changed = scenario(strategy={"name": "gossip"})
    assert changed.topology == {"kind": "ring"}
    assert build(changed).topology.kind == "ring"
    assert scenario().topology == {}
    assert "topology" not in scenario().resolved()


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"topology": {"kind": "ring"}}, '"fedavg" has a server and no graph'),
        ({**GOSSIP, "topology": {"kind": "rign"}}, "did you mean 'ring'?"),
        ({**GOSSIP, "topology": {"kind": "regular", "degree": 4}}, "degree = 4 with 4 nodes"),
        ({**GOSSIP, "topology": {"kind": "file", "path": "/nowhere"}}, "cannot be read"),
        (
            {**GOSSIP, "topology": {"kind": "regular", "degree": 1}},
            "100 draws of regular with 4 nodes",
        ),
    ],
    ids=["no graph", "unknown", "degree", "file", "pieces"],
)
def test_an_impossible_graph_is_refused(tables, words):
    message = refusal(**tables)
    assert "[topology]" in message
    assert words in message


def test_a_graph_from_a_file_counts_by_its_edges_and_not_by_its_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("0 1\n1 2\n2 3\n")
    tables = [{**GOSSIP, "topology": {"kind": "file", "path": str(tmp_path / n)}} for n in
              ("a.txt", "b.txt")]  # fmt: skip
    assert scenario(**tables[0]).sha256 == scenario(**tables[1]).sha256
    folder = tmp_path / "run"
    runs.start(scenario(**tables[0]), out=folder)
    (tmp_path / "a.txt").write_text("0 1\n1 2\n1 3\n")
    with pytest.raises(CheckpointError, match=r"the run began with topology .* bring the topology"):
        fedsim.resume(folder)


# --- rates, exploration, noise --------------------------------------------------------------------


def test_known_rates_are_those_of_the_participation(tmp_path):
    table = {"kind": "bernoulli", "rate": 0.5, "label_alpha": 0.3}
    changed = scenario(strategy={"name": "known_participation"}, participation=table)
    world = build(changed)
    expected = world.participation.rates(4)
    assert expected.min() < expected.max()
    result = fedsim.start(changed, out=tmp_path / "run")
    first = records(result)[1]
    chosen = JsonLines.read(result.folder / "participation.jsonl")[0]["selected"]
    weights = (1 / expected[chosen]).sum() / 4
    assert first["server/effective_participation"] == pytest.approx(weights)


def test_a_procedure_that_would_ignore_what_a_strategy_sends_is_refused(monkeypatch):
    from clients.local_sgd import LocalSGD

    monkeypatch.setattr(LocalSGD, "takes", ())
    message = refusal(strategy={"name": "fedlex"})
    assert '[client] name = "local_sgd": does not use the guidance' in message


def test_exploration_is_round_0_and_counts_its_bytes(tmp_path):
    result = fedsim.start(
        scenario(strategy={"name": "fedlex", "explorers": 0.5}), out=tmp_path / "run"
    )
    zero, first = records(result)[:2]
    assert zero["clients/selected"] == 2
    # two explorers receive the model; afterwards four clients receive it and the guidance
    assert first["comm/downlink_bytes"] > 3.5 * zero["comm/downlink_bytes"]


def test_noise_in_labels_changes_the_training_samples_of_whoever_has_it_alone(tmp_path):
    noise = [0.0, 1.0, 0.5, 0.0]
    partition = {"kind": "iid", "clients": 4, "test_fraction": 0.2}
    clean, noisy = (
        build(scenario(partition={**partition, "label_noise": n}, data={"name": "digits"})).data
        for n in (0.0, noise)
    )
    for split in ("train", "test"):
        shares = []
        for client in range(4):
            one, other = (d.clients((client,), split=split) for d in (clean, noisy))
            assert np.array_equal(one.rows[0], other.rows[0])
            rows = one.rows[0]
            shares.append(float((one.targets[rows] != other.targets[rows]).mean()))
        if split == "test":
            assert shares == [0, 0, 0, 0]
        else:  # of what is drawn anew, a tenth stays what it was
            assert shares[0] == shares[3] == 0
            assert shares[1] == pytest.approx(0.9, abs=0.08)
            assert shares[2] == pytest.approx(0.45, abs=0.08)
    assert np.array_equal(clean.test.targets, noisy.test.targets)
    assert clean.manifest_sha256 != noisy.manifest_sha256
    assert noisy.manifest["partition"]["labels_changed"] > 0


@pytest.mark.parametrize(
    ("noise", "words"),
    [(1.5, "label_noise = 1.5: must be in [0, 1]"), ([0.1] * 3, "has 3 values for 4 clients")],
)
def test_impossible_noise_is_refused(noise, words):
    assert words in refusal(partition={"kind": "iid", "clients": 4, "label_noise": noise})


# --- what goes wrong early ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"strategy": {"name": "known_participation", "rates": [0.5]}}, "rates has 1 values for 4"),
        ({"strategy": {"name": "multi_krum", "num_byzantine": 1}}, "num_byzantine = 1 with 4"),
        ({"expect": {"nodes/accuracy": {"min": 0.5}}}, "'nodes/accuracy' is never recorded"),
        ({"engine": {"retries": 5}}, "retries = 5 changes nothing with on_failure = 'skip'"),
        ({"task": {"buffers": "local"}}, "buffers = 'local': the model has no statistics"),
        ({"task": {"augment": {}}}, "[task] augment = {}: says nothing; give crop, flip or noise"),
        ({"task": {"augment": {"crop": 8}}}, "augment.crop = 8: must be at most 7, or a crop may"),
        ({"participation": {"kind": "sine", "shift": [1, 2]}}, "shift has 2 values for 4 clients"),
        ({"participation": {"kind": "sine", "min_rate": 0.05}}, "min_rate = 0.05 changes nothing"),
        ({"data": {"name": "synthetic", "alpha": 1e300}}, "alpha = 1e+300: must be in [0, 1e+06]"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_folder_is_made(tables, words):
    assert words in refusal(**tables)


def test_what_is_otherwise_than_asked_is_said_before_the_first_round(tmp_path, caplog):
    changed = scenario(
        rounds=1,
        partition={"kind": "pathological", "clients": 4, "classes_per_client": 1},
        participation={"kind": "sine", "rate": 0.8, "amplitude": 1.0, "period": 4},
    )
    fedsim.start(changed, out=tmp_path / "run")
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 2
    dropped = json.loads((tmp_path / "run/manifest.json").read_text())["dropped"]
    assert said[0] == (
        f"[partition] {dropped['samples']} samples belong to no client: {dropped['reason']}"
    )
    # over a period the rates are 0.8, min(1, 1.6), 0.8 and 0
    assert said[1] == (
        "[participation] rates are cut at 0 and 1 in some rounds: clients take part in 0.65 of "
        "the rounds on average, not in 0.8"
    )
    quiet = scenario(rounds=1, participation={"kind": "cyclic", "rate": 0.1, "cycle": 20})
    assert build(quiet).notes == ()
    rough = scenario(rounds=1, participation={"kind": "cyclic", "rate": 0.13, "cycle": 10})
    assert build(rough).notes == (
        "[participation] cycle = 10: clients are on for whole rounds of a cycle, in 0.1 of the "
        "rounds on average, where the rates are 0.13",
    )


def test_a_run_in_which_nobody_ever_replies_says_so(tmp_path, caplog):
    slow = {"deadline": 0.03, "speed_sigma": 0.5, "partial": 0.0}
    fedsim.start(scenario(devices=slow), out=tmp_path / "run")
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == ["no client replied in any round: the model is the one that the run began with"]
    caplog.clear()
    fedsim.start(scenario(), out=tmp_path / "other")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_skew_beyond_what_float32_holds_is_refused_with_its_client():
    values = np.full((40, 3), 1e37, dtype=np.float32)
    values[::2] = -values[::2]
    offsets, rows = np.arange(0, 44, 4), np.arange(40)
    with pytest.raises(ScenarioError, match=r"scale = 10.0: client \d+'s features are no longer"):
        skewed(values, offsets, rows, FeatureSkew(feature_scale=10.0), seed=0)


def test_a_graph_that_falls_into_pieces_later_ends_the_run_with_its_round(tmp_path):
    topology = {"kind": "erdos_renyi", "probability": 0.12, "every": 1}
    changed = scenario(
        strategy={"name": "gossip"}, topology=topology, rounds=60,
        partition={"kind": "iid", "clients": 6}, seed=1,
    )  # fmt: skip
    with pytest.raises(RunError, match=r"round \d+: .*100 draws of erdos_renyi"):
        fedsim.start(changed, out=tmp_path / "run")


def test_explorers_that_fail_are_named_in_the_log(tmp_path):
    changed = scenario(strategy={"name": "fedlex"}, client={"setup_lr": 1e39})
    with pytest.raises(RunError, match="round 0: 0 of 4 clients replied"):
        fedsim.start(changed, out=tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    for client in range(4):
        assert f"set-up: client {client}, round 0: not finite" in log
    assert "is setup_lr too large?" in log


def test_a_nodes_buffers_count_whether_it_took_part_or_not(tmp_path):
    """The mean model's BatchNorm statistics are those of all nodes, as its parameters are."""
    changed = scenario(
        task={"model": "cnn_batchnorm"}, strategy={"name": "gossip"}, rounds=2,
        participation={"kind": "uniform", "cohort_size": 2},
    )  # fmt: skip
    world = build(changed)
    folder = runs.run_folder.create(tmp_path / "run", changed)
    write_plan(world, folder)
    with runs.make_grid(world) as grid:
        execute(world, folder, grid, seed=3)
    from safetensors.torch import load_file

    model = load_file(folder.path / "params.safetensors")
    models, buffers = world.strategy.personal_models(world.strategy.state)
    for name, stack in buffers.items():
        if stack.is_floating_point():
            torch.testing.assert_close(model[name], stack.double().mean(dim=0).float())
    first = world.layout.unflatten(models)["conv1.weight"]
    torch.testing.assert_close(model["conv1.weight"], first.double().mean(dim=0).float())


def test_the_training_loss_is_without_the_margin_penalty(tmp_path):
    losses = []
    for margin in (0.0, 5.0):
        changed = scenario(
            client={"local_lr": 0.0, "margin": margin}, task={"model": "mlp", "hidden": [8]},
            engine={"kind": "inline", "executor": "loop"},
        )  # fmt: skip
        result = fedsim.start(changed, out=tmp_path / f"{margin}")
        losses.append(records(result)[-1]["train/loss"])
    assert losses[0] == losses[1]


def test_messages_between_nodes_follow_the_graph(tmp_path):
    counts = []
    for kind in ("line", "complete"):
        result = fedsim.start(scenario(**{**GOSSIP, "topology": {"kind": kind}}),
                              out=tmp_path / kind)  # fmt: skip
        last = records(result)[-1]
        counts.append(last["server/messages"])
        model = sum(a.numpy().nbytes for a in build(scenario(**GOSSIP)).arrays.values())
        assert last["server/message_bytes"] == last["server/messages"] * model
    assert counts == [6, 12]
