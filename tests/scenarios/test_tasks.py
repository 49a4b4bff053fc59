"""Scenarios of tasks: kinds, metrics per site and pooled, weights, frozen layers, augmentation."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from safetensors.torch import load_file, save_file
from sklearn import metrics as sk

import fedsim
from fedsim.aggregators.sums import mean_metrics
from fedsim.basics.errors import CheckpointError, ScenarioError
from fedsim.basics.json_files import JsonLines, read_json
from fedsim.messages.records import array_record, model_tensors, named_tensors
from fedsim.messages.replies import Replies
from fedsim.runs import start as runs
from fedsim.runs.checkpoint import FOLDER
from fedsim.runs.client_metrics import spread
from fedsim.runs.client_side import task_of
from fedsim.runs.policy import EarlyStop
from fedsim.runs.world import build
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

HOSPITALS = {
    "seed": 2,
    "rounds": 3,
    "task": {"metrics": ["accuracy", "auroc"]},
    "data": {"name": "breast_cancer"},
    "partition": {
        "kind": "sizes", "law": "linear", "clients": 4, "test_fraction": 0.3, "feature_shift": 0.5
    },
    "client": {"local_lr": 0.1, "batch_size": 16},
    "engine": {"kind": "inline", "chunk_size": 2},
    "evaluation": {"clients": 4, "per_client": True, "pooled": True},
}  # fmt: skip
SMALL = {
    "rounds": 1,
    "data": {"name": "digits", "test_fraction": 0.9},
    "partition": {"kind": "iid", "clients": 3},
    "engine": {"kind": "inline", "chunk_size": 2},
}


def scenario(document=SMALL, **tables):
    return Scenario.from_resolved({**document, **tables}, origin="tests/task.toml")


def refusal(document=SMALL, **tables):
    with pytest.raises(ScenarioError) as caught:
        build(scenario(document, **tables))
    return str(caught.value)


def scores(world, arrays, features):
    """The log-odds that a logistic model gives, computed apart."""
    named = {n: t.numpy().astype(np.float64) for n, t in named_tensors(arrays).items()}
    logits = features.reshape(len(features), -1) @ named["output.weight"].T + named["output.bias"]
    return logits[:, 1] - logits[:, 0]


# --- four hospitals: per site and pooled ----------------------------------------------------------


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    described = scenario(HOSPITALS)
    result = fedsim.start(described, out=tmp_path_factory.mktemp("hospitals") / "run")
    return described, result


def test_every_site_and_all_of_them_together_have_the_area_that_scikit_learn_gives(hospitals):
    described, result = hospitals
    world = build(described)
    arrays = array_record(load_file(result.folder / "params.safetensors"))
    drawn = world.data.clients(range(4), split="test")
    areas, sizes = [], []
    for rows in drawn.rows:
        found = scores(world, arrays, drawn.features[rows].astype(np.float64))
        areas.append(sk.roc_auc_score(drawn.targets[rows] == 1, found))
        sizes.append(len(rows))
    assert len(set(sizes)) == 4
    lines = [r for r in JsonLines.read(result.folder / "local.jsonl") if r["round"] == 3]
    assert [line["client"] for line in lines] == [0, 1, 2, 3]
    assert [line["examples"] for line in lines] == sizes
    assert [line["auroc"] for line in lines] == pytest.approx(areas, abs=1e-12)
    every = np.concatenate(drawn.rows)
    pooled = scores(world, arrays, drawn.features[every].astype(np.float64))
    last = JsonLines.read(result.folder / "metrics.jsonl")[-1]
    expected = sk.roc_auc_score(drawn.targets[every] == 1, pooled)
    assert last["pooled/auroc"] == pytest.approx(expected, abs=1e-12)
    assert last["local/auroc"] == pytest.approx(np.average(areas, weights=sizes), abs=1e-12)
    assert last["local/auroc_mean"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert last["pooled/auroc"] != last["test/auroc"]


def test_round_zero_is_measured_on_the_pool_too(hospitals):
    first = JsonLines.read(hospitals[1].folder / "metrics.jsonl")[0]
    assert first["round"] == 0
    assert {"pooled/loss", "pooled/accuracy", "pooled/auroc"} <= first.keys()


def test_records_of_sites_are_resumed_without_gap_or_repetition(hospitals, tmp_path):
    described = scenario(HOSPITALS, checkpoint={"every": 1, "keep": 9})
    result = fedsim.start(described, out=tmp_path / "run")
    before = (result.folder / "local.jsonl").read_bytes()
    assert before == (hospitals[1].folder / "local.jsonl").read_bytes()
    newest = sorted((result.folder / FOLDER).iterdir())[2:]
    assert len(newest) == 2  # of rounds 2 and 3
    for place in newest:
        place.unlink()
    again = runs.resume(result.folder)
    assert (again.folder / "local.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"per_client": True}, "[evaluation] per_client = true with [evaluation] clients = 0"),
        ({"pooled": True}, "[evaluation] pooled = true: clients evaluate on their local test spl"),
        ({"pooled": 1}, "[evaluation] pooled = 1: must be true or false"),
        ({"poled": True}, "did you mean 'pooled'?"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(evaluation, message):
    assert message in refusal(evaluation=evaluation)


def test_a_claim_about_the_pool_without_one_is_refused():
    message = refusal(expect={"pooled/auroc": {"min": 0.9}})
    assert "'pooled/auroc' is never recorded without [evaluation] pooled = true" in message


# --- metrics that a client's samples do not define ------------------------------------------------


def replies_with(column, *, message_type="evaluate", name="auroc"):
    count = len(column)
    layout = build(scenario()).layout
    return Replies(
        server_round=1, layout=layout, client_ids=np.arange(count), params=None, reference=None,
        buffers={}, extra={}, num_examples=torch.arange(1, count + 1),
        metrics={
            "loss": torch.ones(count, dtype=torch.float64),
            name: torch.tensor(column, dtype=torch.float64),
        },
        staleness=torch.zeros(count, dtype=torch.int64), message_type=message_type,
    )  # fmt: skip


def test_an_undefined_metric_is_admitted_of_an_evaluation_and_only_there():
    column = [0.5, math.nan, 0.75]
    assert not replies_with(column).admit().failures
    trained = replies_with(column, message_type="train").admit()
    assert [(f.client_id, f.cause) for f in trained.failures] == [(1, "metrics")]
    infinite = replies_with([0.5, math.inf, 0.75]).admit()
    assert [(f.client_id, f.cause) for f in infinite.failures] == [(1, "metrics")]
    lost = replies_with(column, name="loss").admit()
    assert [(f.client_id, f.cause) for f in lost.failures] == [(1, "metrics")]


def test_means_are_over_the_clients_that_define_a_metric():
    replies = replies_with([0.5, math.nan, 0.75]).admit()
    found = mean_metrics(replies)
    assert found["auroc"] == pytest.approx((1 * 0.5 + 3 * 0.75) / 4)
    assert found["loss"] == 1.0
    assert math.isnan(mean_metrics(replies_with([math.nan] * 2).admit())["auroc"])


def test_the_spread_counts_the_clients_that_do_not_define_a_metric():
    found = spread(replies_with([0.5, math.nan, 0.75]).admit())
    assert found["local/auroc_mean"] == pytest.approx(0.625)
    assert found["local/auroc_undefined"] == 1
    assert "local/loss_undefined" not in found


@pytest.mark.parametrize("name", ["rmse", "mae", "mse", "perplexity"])
def test_the_worst_off_have_the_largest_errors(name):
    found = spread(replies_with([float(k) for k in range(20)], name=name).admit())
    assert found[f"local/{name}_worst_decile"] == pytest.approx(18.5)


def test_what_is_not_defined_is_never_the_best_of_an_early_stop():
    stop = EarlyStop("m", patience=2)
    assert stop.reason([{"m": v} for v in (math.nan, 0.1, 0.2)]) is None
    assert "not improved" in stop.reason([{"m": v} for v in (0.3, math.nan, 0.2)])


@pytest.mark.parametrize("strategy", ["fedavg", "flower:FedAvg"])
def test_sites_of_one_class_do_not_break_a_run_and_leave_no_made_up_number(tmp_path, strategy):
    tables = {
        "task": {"metrics": ["accuracy", "auroc"]},
        "strategy": {"name": strategy},
        "data": {"name": "digits", "test_fraction": 0.5},
        "partition": {
            "kind": "pathological", "classes_per_client": 1, "clients": 10, "test_fraction": 0.3
        },
        "evaluation": {"clients": 10, "per_client": True, "pooled": True},
    }  # fmt: skip
    result = fedsim.start(scenario(**tables), out=tmp_path / "run")
    last = JsonLines.read(result.folder / "metrics.jsonl")[-1]
    assert last["local/auroc_undefined"] == 10
    assert math.isnan(last["local/auroc"])
    assert 0 <= last["local/accuracy"] <= 1
    assert 0 <= last["pooled/auroc"] <= 1
    lines = JsonLines.read(result.folder / "local.jsonl")
    assert len(lines) == 10
    assert all(math.isnan(line["auroc"]) for line in lines)


def test_an_undefined_metric_goes_over_the_wire_as_it_goes_through_the_engine():
    grid = fed.make_grid("logistic", data=fed.InMemoryData(test_sizes=(1,) * 8))
    grid.client_app.executor.task.wants_outputs = True  # a single sample has no area
    strategy = fed.make_strategy("fedavg")
    sent = strategy.configure_evaluate(1, fed.initial_arrays(), ConfigRecord({}), grid)
    stacked = grid.send_and_receive(sent)
    parsed = Replies.from_messages(list(stacked), sent).admit()
    assert parsed.failures == ()
    assert parsed.metrics["auroc"].isnan().all()
    assert stacked.metrics["auroc"].isnan().all()
    assert torch.equal(parsed.metrics["loss"], stacked.metrics["loss"])


# --- kinds ----------------------------------------------------------------------------------------


def test_a_regression_runs_from_data_of_numbers_without_being_named(tmp_path):
    tables = {
        "rounds": 30,
        "task": {"model": "linear"},
        "data": {"name": "diabetes"},
        "client": {"local_lr": 0.1, "batch_size": 32},
        "evaluation": {"every": 30},
    }
    result = fedsim.start(scenario(**tables), out=tmp_path / "run")
    records = JsonLines.read(result.folder / "metrics.jsonl")
    assert {"test/loss", "test/rmse", "test/mae", "test/r2"} <= records[-1].keys()
    assert records[-1]["test/loss"] == pytest.approx(records[-1]["test/rmse"] ** 2)
    assert records[-1]["test/r2"] > 0.3 > records[0]["test/r2"]


def test_a_kind_that_does_not_fit_is_refused_before_anything_runs():
    message = refusal(task={"kind": "regression"})
    assert '[task] kind = "regression" with [data] name = "digits": the targets are 10' in message


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'?"),
        ({"metrics": "accuracy"}, '[task] metrics = "accuracy": must be a list'),
        ({"metrics": ["r2"]}, "'r2' is not a metric of classes"),
        ({"kind": "classification", "loss": "mae"}, "'loss' is not a key of logistic"),
        ({"kind": "nowhere:Task"}, "no module named 'nowhere'"),
        ({"freez": ["x"]}, "did you mean 'freeze'?"),
        ({"freeze": ["outptu"]}, "did you mean 'output'?"),
        ({"buffers": "averaged"}, "[task] buffers = \"averaged\": must be 'average', 'local' or"),
        ({"augment": {"crpo": 1}}, "'crpo' is not a key of augment; did you mean 'crop'?"),
        ({"augment": {"flip": 2.0}}, "[task] augment.flip = 2.0: must be in [0, 1]"),
        ({"augment": 3}, "[task] augment = 3: must be"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors': cannot be read: No such file"),
        ({"strict_weights": False}, "[task] strict_weights: says nothing without weights"),
    ],
)
def test_a_task_table_that_cannot_be_is_refused(task, message):
    assert message in refusal(task=task)


def test_a_penalty_on_classes_is_refused_where_targets_are_numbers():
    message = refusal(data={"name": "diabetes"}, client={"margin": 0.5})
    assert (
        '[client] margin.coefficient = 0.5 with [data] name = "diabetes": needs targets that'
        in message
    )


class EndsInARectifier(torch.nn.Sequential):
    """A model whose last module is no Linear layer."""

    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.ReLU())


def test_a_contrast_of_representations_is_refused_where_the_last_layer_is_another():
    model = "tests.scenarios.test_tasks:EndsInARectifier"
    for strategy in ({"name": "moon"}, {"name": "moon", "mu": 2.0}):
        message = refusal(task={"model": model}, strategy=strategy)
        mu = strategy.get("mu", 1.0)
        assert f'[client] mu = {mu} with [task] model = "{model}": needs a model whose' in message
        assert "last module is a Linear layer, and its last is ReLU '2'" in message
    build(scenario(task={"model": model}, strategy={"name": "moon", "mu": 0.0}))


def test_cropping_what_is_no_image_is_refused():
    message = refusal(HOSPITALS, task={"augment": {"crop": 1}})
    assert "[task] augment.crop = 1: needs images" in message


@pytest.mark.parametrize("key", [{"loss": "mse"}, {"huber_delta": 1.0}])
def test_another_tasks_key_is_refused_at_its_default_too(key):
    message = refusal(task=key)
    assert "is not a key of classification, which the data make this task" in message


def test_what_says_no_more_than_the_default_is_the_same_scenario():
    plain = scenario()
    for task in (
        {"kind": "auto"},
        {"kind": "classification"},
        {"kind": "classification", "metrics": ["accuracy"]},
        {"freeze": [], "buffers": "average", "strict_weights": True},
        {"augment": {"crop": 0}},
    ):
        assert scenario(task=task).sha256 == plain.sha256
    for task in (
        {"metrics": ["auroc"]},
        {"freeze": ["output.bias"]},
        {"buffers": "local"},
        {"augment": {"crop": 1}},
        {"kind": "regression"},
    ):
        assert scenario(task=task).sha256 != plain.sha256


def test_a_resolved_scenario_is_read_back_the_same():
    task = {"metrics": ["auroc"], "augment": {"noise": 0.1}, "freeze": ["output.bias"]}
    first = scenario(task=task, evaluation={"every": 2})
    again = Scenario.from_resolved(json.loads(json.dumps(first.resolved())), origin=first.origin)
    assert again == first
    assert first.task["augment"] == {"crop": 0, "flip": 0.0, "noise": 0.1}


def test_augmentation_moves_training_in_a_run(tmp_path):
    hashes = {
        fedsim.start(scenario(task=task), out=tmp_path / name).summary["params_sha256"]
        for name, task in (("a", {}), ("b", {"augment": {"crop": 1, "flip": 0.5}}))
    }
    assert len(hashes) == 2


# --- weights that training starts from ------------------------------------------------------------


def saved_model(path, seed=77):
    task = task_of({}, build(scenario()).data)
    save_file(dict(task.build_model(seed).state_dict()), path)
    return task.build_model(seed)


def test_a_run_starts_from_the_weights_beside_the_scenario_and_the_manifest_has_their_hash(
    tmp_path, monkeypatch
):
    model = saved_model(tmp_path / "start.safetensors")
    (tmp_path / "mine.toml").write_text(
        'rounds = 1\n[task]\nweights = "start.safetensors"\n[data]\nname = "digits"\n'
        '[partition]\nkind = "iid"\nclients = 3\n[engine]\nkind = "inline"\n'
    )
    monkeypatch.chdir("/")
    described = load(tmp_path / "mine.toml")
    params, _ = model_tensors(build(described).layout, build(described).arrays)
    assert torch.equal(params, build(described).layout.flatten(model.state_dict()))
    result = fedsim.start(described, out=tmp_path / "run")
    manifest = read_json(result.folder / "manifest.json")
    assert len(manifest["weights"]["sha256"]) == 64
    assert manifest["weights"]["taken"] == 2
    saved_model(tmp_path / "start.safetensors", seed=78)
    with pytest.raises(CheckpointError, match="the run began with weights"):
        runs.resume(result.folder)


def test_where_the_weights_lie_does_not_matter_and_whether_there_are_any_does(tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        saved_model(path)
    hashes = {scenario(task={"weights": str(path)}).sha256 for path in paths}
    assert len(hashes) == 1
    assert scenario().sha256 not in hashes


def test_a_node_needs_no_weights_of_its_own(tmp_path):
    path = tmp_path / "start.safetensors"
    saved_model(path)
    described = scenario(task={"weights": str(path)})
    path.unlink()
    assert build(described, on_node=True).app.layout.dim == build(scenario()).layout.dim
    with pytest.raises(ScenarioError, match="cannot be read"):
        build(described)


# --- on Ray ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("lent_workers")
def test_ray_workers_give_the_bits_of_this_process_with_everything_on(tmp_path):
    """Memories of statistics in training and evaluation, augmentation, frozen layers, areas."""
    tables = {
        "rounds": 3,
        "task": {
            "model": "cnn_batchnorm", "buffers": "local", "freeze": ["conv1"],
            "metrics": ["accuracy", "auroc"], "augment": {"crop": 1, "flip": 0.5, "noise": 0.1},
        },
        "data": {"name": "digits", "test_fraction": 0.8},
        "partition": {"kind": "dirichlet", "clients": 6, "alpha": 1.0, "test_fraction": 0.3},
        "participation": {"kind": "uniform", "cohort_size": 4},
        "evaluation": {"clients": 6, "per_client": True, "pooled": True},
    }  # fmt: skip
    ended = []
    for kind in ("inline", "ray"):
        engine = {"kind": kind, "chunk_size": 2, **({"workers": 2} if kind == "ray" else {})}
        result = fedsim.start(scenario(**tables, engine=engine), out=tmp_path / kind)
        records = [
            {name: repr(value) for name, value in record.items() if not name.startswith("time/")}
            for record in JsonLines.read(result.folder / "metrics.jsonl")
        ]
        local = (result.folder / "local.jsonl").read_bytes()
        ended.append((result.summary["params_sha256"], records, local))
    assert ended[0] == ended[1]
