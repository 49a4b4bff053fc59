"""Runs whose clients keep tensors to themselves: what is said, measured, kept and left alone."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.cli import app
from fedsim.messages.records import named_tensors
from fedsim.runs.checkpoint import FOLDER, latest, load
from fedsim.runs.world import build
from fedsim.scenario import discovery
from fedsim.scenario.choice import Choice
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed
from tests.tiers import by_turns

TABLES = {
    "seed": 3,
    "rounds": 3,
    "task": {"model": "mlp", "hidden": [8], "personal": ["output"]},
    "data": {"name": "digits", "test_fraction": 0.5},
    "partition": {"kind": "dirichlet", "clients": 6, "alpha": 0.5, "test_fraction": 0.3},
    "participation": {"kind": "uniform", "cohort_size": 2},
    "client": {"local_lr": 0.1, "batch_size": 16},
    "evaluation": {"clients": 6},
    "engine": {"kind": "inline", "chunk_size": 2},
    "checkpoint": {"every": 1, "keep": 100},
}
OWN = ("personal.output.weight", "personal.output.bias")


def scenario(**tables):
    document = {**TABLES}
    for name, table in tables.items():
        same = isinstance(table, dict) and name in ("task", "client", "evaluation", "engine")
        document[name] = {**document.get(name, {}), **table} if same else table
    return Scenario.from_resolved(document, origin="tests/personal.toml")


def run(folder, **tables):
    """Run; returns (records without times, last checkpoint)."""
    result = fedsim.start(scenario(**tables), out=folder)
    records = [fed.without_times(r) for r in JsonLines.read(result.folder / "metrics.jsonl")]
    return records, load(latest(result.folder / FOLDER))


def own(saved):
    """Every client's personal tensors."""
    return {
        client: {n: stack[place] for n, stack in saved.client_state.items()}
        for place, client in enumerate(saved.clients)
    }


# --- said before round 1 --------------------------------------------------------------------------


def test_what_is_personal_is_said_and_in_the_manifest(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.start(scenario(rounds=1), out=tmp_path / "run")
    said = "output.weight, output.bias (90 of 610 numbers) stay with each client"
    assert [said in record.getMessage() for record in caplog.records].count(True) == 1
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["personal"] == ["output.weight", "output.bias"]
    assert set(load_file(result.folder / "params.safetensors")) == {
        "hidden1.weight", "hidden1.bias",
    }  # fmt: skip


@pytest.mark.slow
def test_doctor_says_the_same(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[task]\nmodel = "mlp"\nhidden = [8]\npersonal = ["output"]\n[data]\nname = "digits"\n'
        '[partition]\nkind = "iid"\nclients = 3\n[engine]\nkind = "inline"\n'
    )
    told = " ".join(CliRunner().invoke(app, ["doctor", str(file)]).output.split())
    assert "[task] personal: output.weight, output.bias (90 of 610 numbers) stay with each" in told
    assert "only clients can measure models with tensors of their own, and none does" in told


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"task": {"personal": ["outputs"]}}, r"personal: 'outputs' is not .* mean 'output'\?"),
        ({"task": {"freeze": ["output"]}}, "'output' names 'output.weight', which is frozen"),
        ({"evaluation": {"pooled": True}}, "pooled = true with .task. personal: the server has no"),
        (
            {"evaluation": {"stop": {"target": 0.9}}},
            "stop.metric 'test/accuracy' is never recorded with .task. personal",
        ),
        ({"expect": {"test/loss": {"max": 1.0}}}, "'test/loss' is never recorded with .task. pe"),
        (
            {"expect": {"personal/loss": {"max": 1.0}}, "task": {"personal": []}},
            "'personal/loss' is never recorded without .task. personal",
        ),
        (
            {"expect": {"personal/loss": {"max": 1.0}}, "evaluation": {"clients": 0}},
            r"'personal/loss' is never recorded with .evaluation. clients = 0",
        ),
        (
            {"expect": {"personal/acuracy": {"max": 1.0}}},
            r"'personal/acuracy' is not .*; did you mean 'personal/accuracy'\?",
        ),
        (
            {"task": {"personal": ["*"]}, "strategy": {"name": "fedlex"}},
            "all parameters are, so the guidance that the strategy sends is of nothing",
        ),
        (
            {"client": {"parts": [{"name": "alternating"}]}},
            r"alternating: head_epochs = 1 with local_epochs = 1: no epoch is left",
        ),
        (
            {"client": {"parts": [{"name": "frozen", "tensors": ["outputs"]}]}},
            r"frozen: tensors: 'outputs' is not a trained tensor .* mean 'output'\?",
        ),
        (
            {"task": {"personal": ["*"]}, "client": {"parts": [{"name": "frozen"}]}},
            "frozen: tensors = None, with .task. personal: names every trained tensor",
        ),
        (
            {"task": {"personal": ["*"]}, "strategy": {"name": "flower:Krum"}},
            "measures updates, and with all parameters .task. personal there are none",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_round_1(tables, message):
    with pytest.raises(ScenarioError, match=message):
        build(scenario(**tables))


# --- measured -------------------------------------------------------------------------------------


def test_clients_that_never_trained_are_measured_apart_with_the_initial_tensors(tmp_path):
    records, saved = run(tmp_path / "run", evaluation={"per_client": True})
    last = records[-1]
    trained = set(saved.clients)
    assert 2 <= len(trained) < 6
    assert last["personal/clients"] == len(trained)
    assert last["personal/clients_untrained"] == 6 - len(trained)
    assert not any(name.startswith(("test/", "pooled/", "nodes/")) for name in last)
    rows = list(JsonLines.read(tmp_path / "run" / "local.jsonl"))
    mine = [row for row in rows if row["round"] == last["round"]]
    assert {row["client"] for row in mine if row["personalised"]} == trained
    for ending, group in (("", trained), ("_untrained", set(range(6)) - trained)):
        values = [row["accuracy"] for row in mine if row["client"] in group]
        assert last[f"personal/accuracy{ending}"] == pytest.approx(np.mean(values))
    share = sum(row["accuracy"] for row in mine) / len(mine)
    assert last["local/accuracy_mean"] == pytest.approx(share)
    assert not any("personalised" in name for name in last)


def test_the_summary_forgets_who_was_untrained_once_all_have_trained(tmp_path):
    records, _ = run(tmp_path / "run", participation={"kind": "full"})
    assert "personal/accuracy_untrained" not in records[-1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "personal/accuracy_untrained" not in summary["final"]
    assert summary["final"]["personal/clients"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "gains"),
    [
        ({"kind": "pathological", "classes_per_client": 2}, True),
        ({"kind": "iid"}, False),
    ],
    ids=["two classes", "iid"],
)
def test_a_personal_output_gains_on_skewed_clients_and_loses_on_equal_ones(
    partition, gains, tmp_path
):
    """Seen with seeds 1 and 2: 0.98 beside 0.80 and 0.85; on equal ones 0.76 to 0.82 and 0.93."""
    tables = {
        "rounds": 40,
        "partition": {**partition, "clients": 30, "test_fraction": 0.3},
        "participation": {"kind": "uniform", "cohort_size": 10},
        "data": {"name": "digits", "test_fraction": 0.2},
        "client": {"local_epochs": 2, "batch_size": 10},
        "evaluation": {"clients": 30, "every": 40},
        "checkpoint": {"every": 40},
    }
    found = [
        run(tmp_path / name, task={"hidden": [64], "personal": patterns}, **tables)[0][-1]
        for name, patterns in (("own", ["output"]), ("one", []))
    ]
    personal, single = (record["local/accuracy_mean"] for record in found)
    assert personal > single + 0.08 if gains else single > personal + 0.05


# --- the degenerate settings ----------------------------------------------------------------------


def test_with_nothing_personal_it_is_the_run_without_the_key(tmp_path):
    plain = {name: value for name, value in TABLES["task"].items() if name != "personal"}
    document = {**TABLES, "task": plain}
    without = Scenario.from_resolved(document, origin="tests/personal.toml")
    assert scenario(task={"personal": []}).sha256 == without.sha256 != scenario().sha256
    result = fedsim.start(without, out=tmp_path / "without")
    records, saved = run(tmp_path / "with", task={"personal": []})
    assert records == [
        fed.without_times(r) for r in JsonLines.read(result.folder / "metrics.jsonl")
    ]
    expected = load(latest(result.folder / FOLDER)).model
    assert fed.named_bits(saved.model) == fed.named_bits(expected)
    assert not saved.client_state


@pytest.mark.parametrize("model", ["mlp", "cnn_batchnorm"])
def test_with_all_personal_a_client_has_the_bits_of_its_solo_run(model, tmp_path):
    """The same scenario in which that client alone ever takes part."""
    task = {"model": model, "personal": ["*"], **({"hidden": [8]} if model == "mlp" else {})}
    tables = {
        "task": {**task},
        "client": {"momentum": 0.9, "keep_optimizer": True, "last_batch": "drop"},
        "evaluation": {"clients": 0},
    }
    document = {**TABLES, **tables, "client": {**TABLES["client"], **tables["client"]}}

    def finished(name, participation):
        made = Scenario.from_resolved(
            {**document, "participation": participation}, origin="tests/personal.toml"
        )
        result = fedsim.start(made, out=tmp_path / name)
        return load(latest(result.folder / FOLDER))

    together = own(finished("all", {"kind": "full"}))
    assert sorted(together) == [0, 1, 2, 3, 4, 5]
    for client in (0, 4):
        trace = tmp_path / f"only_{client}.csv"
        trace.write_text("round,client\n" + "".join(f"{r},{client}\n" for r in (1, 2, 3)))
        alone = own(finished(f"solo {client}", {"kind": "trace", "path": str(trace)}))
        assert list(alone) == [client]
        assert fed.named_bits(alone[client]) == fed.named_bits(together[client])


ALL_PERSONAL = {"task": {"personal": ["*"]}, "rounds": 2, "evaluation": {"clients": 0}}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The last checkpoint of averaging where everything is personal."""
    return run(tmp_path_factory.mktemp("averaged") / "run", **ALL_PERSONAL)[1]


@pytest.mark.parametrize("name", by_turns(fed.strategies()))
def test_with_all_personal_no_strategy_has_anything_to_decide(name, averaged, tmp_path):
    """What differs is what its parts of local training do at the clients."""
    tables, expected = dict(ALL_PERSONAL), averaged
    if Choice("strategies", {"name": name}).takes(discovery.TOPOLOGY):
        tables["topology"] = {"kind": "ring"}
    tables["strategy"] = {"name": name}
    if discovery.strategy_factory(name).sends:
        with pytest.raises(ScenarioError, match="all parameters are, so the"):
            run(tmp_path / "run", **tables)
        return
    _, found = run(tmp_path / "run", **tables)
    assert not found.model
    assert found.clients == expected.clients
    if parts := fed.parts_for(name):  # what clients do under averaging with the same parts
        client = {"parts": parts}
        _, expected = run(tmp_path / "alike", **tables | {"strategy": {}, "client": client})
    assert fed.named_bits(found.client_state) == fed.named_bits(expected.client_state)


# --- kept -----------------------------------------------------------------------------------------


def large_federation(limit, clients, rounds):
    return {
        "task": {"model": "mlp", "hidden": [200], "personal": ["output"]},
        "data": {"name": "synthetic", "max_samples": 4, "dimension": 20},
        "partition": {"kind": "natural", "clients": clients},
        "participation": {"kind": "uniform", "cohort_size": clients // 2},
        "client": {"local_lr": 0.1, "batch_size": 4},
        "evaluation": {"clients": 0},
        "engine": {"kind": "inline", **({"state_limit_mb": limit} if limit else {})},
        "checkpoint": {"every": rounds},
        "rounds": rounds,
    }


@pytest.mark.parametrize(
    ("clients", "limit"), [(200, 0.5), pytest.param(10_000, 64.0, marks=pytest.mark.slow)]
)
def test_heads_beyond_the_limit_lie_on_the_disk_and_change_no_bit(clients, limit, tmp_path):
    """A head takes 8,040 bytes: 77 MiB of 10,000 clients, under 64."""
    saved = []
    for name, bound in (("held", None), ("spilled", limit)):
        tables = large_federation(bound, clients, 4)
        made = Scenario.from_resolved({"seed": 3, **tables}, origin="tests/personal.toml")
        result = fedsim.start(made, out=tmp_path / name)
        saved.append(load(latest(result.folder / FOLDER)))
    held, spilled = saved
    assert len(held.clients) * 8040 > limit * 2**20
    assert held.clients == spilled.clients
    for name, stack in held.client_state.items():
        assert torch.equal(stack, spilled.client_state[name])
    assert fed.named_bits(held.model) == fed.named_bits(spilled.model)


def test_who_drops_out_keeps_the_tensors_that_it_had(tmp_path):
    """Its state is committed with its reply, and there is none."""
    records, saved = run(
        tmp_path / "run", devices={"drop_out": 0.5}, participation={"kind": "full"}, rounds=1
    )
    answered = int(records[-1]["clients/replied"])
    assert 0 < answered < 6
    assert len(saved.clients) == answered
    _, everybody = run(tmp_path / "all", participation={"kind": "full"}, rounds=1)
    present = own(everybody)
    for client, tensors in own(saved).items():
        assert fed.named_bits(tensors) == fed.named_bits(present[client])


@pytest.mark.parametrize(
    "tables",
    [
        {"attack": {"kind": "gaussian", "num_byzantine": 2}},
        {"attack": {"kind": "label_flip", "num_byzantine": 2}},
        {
            "strategy": {
                "name": "flower:DifferentialPrivacyClientSideFixedClipping",
                "noise_multiplier": 0.1,
                "clipping_norm": 0.5,
            }
        },
        {
            "strategy": {
                "name": "flower:DifferentialPrivacyServerSideFixedClipping",
                "noise_multiplier": 0.1,
                "clipping_norm": 0.5,
            }
        },
        {"strategy": {"name": "fedlex"}},
        {"strategy": {"name": "flower:FedAdam"}},
        {"strategy": {"name": "gossip", "start": "own"}, "topology": {"kind": "ring"}},
    ],
    ids=["gaussian", "label_flip", "dp at clients", "dp at the server", "fedlex", "adam", "gossip"],
)
def test_attacks_privacy_and_other_strategies_work_on_the_shorter_update(tables, tmp_path):
    records, saved = run(tmp_path / "run", participation={"kind": "full"}, **tables)
    assert records[-1]["clients/replied"] == 6
    assert set(saved.model) == {"hidden1.weight", "hidden1.bias"}
    assert set(saved.client_state) == set(OWN)
    assert all(bool(stack.isfinite().all()) for stack in saved.client_state.values())


@pytest.mark.parametrize("name", by_turns(fed.strategies()))
def test_every_strategy_decides_about_what_is_shared(name, tmp_path):
    tables = {"strategy": {"name": name}, "participation": {"kind": "full"}, "rounds": 2}
    if Choice("strategies", {"name": name}).takes(discovery.TOPOLOGY):
        tables["topology"] = {"kind": "ring"}
    records, saved = run(tmp_path / "run", **tables)
    assert records[-1]["clients/replied"] == 6
    assert set(saved.model) == {"hidden1.weight", "hidden1.bias"}
    start = named_tensors(build(scenario(**tables)).arrays)
    assert all(not torch.equal(saved.model[name], start[name]) for name in start)


def test_messages_are_shorter_by_what_is_personal(tmp_path):
    numbers = 4 * 90  # bytes of the output layer's numbers; names and headers come on top
    tables = {"rounds": 1, "evaluation": {"clients": 6}}
    own, whole = (
        run(tmp_path / name, task={"personal": patterns}, **tables)[0][-1]
        for name, patterns in (("own", ["output"]), ("whole", []))
    )
    for way, messages in (("downlink", 2), ("uplink", 2), ("evaluate_downlink", 6)):
        saved = whole[f"comm/{way}_bytes"] - own[f"comm/{way}_bytes"]
        assert messages * numbers < saved < messages * (numbers + 1000)


def test_personal_tensors_start_from_the_file_of_weights(tmp_path):
    start = build(scenario()).app.executor.task.build_model(7).state_dict()
    save_file(dict(start), tmp_path / "start.safetensors")
    task = {"weights": str(tmp_path / "start.safetensors")}
    _, saved = run(tmp_path / "run", task=task, client={"local_lr": 0.0})
    for tensors in own(saved).values():
        assert torch.equal(tensors["personal.output.weight"], start["output.weight"])
