"""The best model of a run: which round it is of, what is written, and what is refused."""

import math

import pytest
from safetensors.torch import load_file

from fedsim.basics.errors import CheckpointError, ScenarioError
from fedsim.basics.json_files import JsonLines, read_json
from fedsim.messages.records import array_record
from fedsim.runs import start as run
from fedsim.runs.best_model import Best, BestModel, best_of
from fedsim.runs.checkpoint import tensors_sha256
from fedsim.runs.client_metrics import is_error
from fedsim.runs.evaluation_data import on_the_test_set
from fedsim.runs.world import build
from fedsim.scenario.load import load

SMALL = [
    "partition.clients=8",
    "participation.cohort_size=4",
    "engine.kind=inline",
    "rounds=6",
    "task.hidden=[8]",
    "client.local_lr=0.5",  # so large that the loss is best in round 5
    "checkpoint.every=3",
]


def small(*overrides):
    return load("quickstart", [*SMALL, *overrides])


def records(metric, values):
    return [{"round": place, metric: value} for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("test/accuracy", [0.1, 0.8, 0.5], Best(1, 0.8)),
        ("test/loss", [2.0, 0.9, 1.0], Best(1, 0.9)),
        ("local/rmse_mean", [2.0, 0.9, 1.0], Best(1, 0.9)),
        ("nodes/loss_max", [2.0, 0.9, 1.0], Best(1, 0.9)),
        ("local/accuracy_worst_decile", [0.2, 0.3], Best(1, 0.3)),
        ("test/accuracy", [0.5, 0.7, 0.7], Best(1, 0.7)),
        ("test/accuracy", [0.3, 0.1 + 0.2], Best(0, 0.3)),  # larger by rounding alone
        ("test/accuracy", [math.nan, 0.2, math.nan], Best(1, 0.2)),
        ("test/accuracy", [None, 0.2, None], Best(1, 0.2)),
        ("test/accuracy", [math.nan], None),
        ("test/accuracy", [], None),
    ],
)
def test_the_best_is_the_first_of_the_best_values(metric, values, best):
    assert best_of(records(metric, values), metric) == best


def test_a_metric_over_clients_has_the_direction_of_the_metric():
    assert all(map(is_error, ("local/loss_mean", "local/mse_worst_decile", "nodes/rmse_min")))
    assert not any(map(is_error, ("local/accuracy_mean", "nodes/accuracy_min", "test/f1")))


@pytest.mark.parametrize("metric", ["test/accuracy", "test/loss"])
def test_the_kept_model_has_the_recorded_value(tmp_path, metric):
    scenario = small(f"evaluation.keep_best={metric}")
    result = run.start(scenario, out=tmp_path / "run")
    history = JsonLines.read(result.folder / "metrics.jsonl")
    best = best_of(history, metric)
    if metric == "test/loss":
        assert best.round == 5, "this test is of a best before the last round"
        assert result.summary["params_sha256"] != result.summary["best"]["params_sha256"]
    model = load_file(result.folder / "params-best.safetensors")
    said = {"metric": metric, **best._asdict(), "params_sha256": tensors_sha256(model)}
    assert read_json(result.folder / "summary.json")["best"] == said
    measured = on_the_test_set(build(scenario))(array_record(model))
    assert measured[metric.partition("/")[2]] == best.value


def test_keeping_changes_neither_the_hash_nor_a_bit(tmp_path):
    plain, kept = small(), small("evaluation.keep_best=test/accuracy")
    assert plain.sha256 == kept.sha256
    one, other = run.start(plain, out=tmp_path / "one"), run.start(kept, out=tmp_path / "other")
    assert one.summary["params_sha256"] == other.summary["params_sha256"]
    assert "best" not in one.summary
    assert not (one.folder / "params-best.safetensors").exists()


def test_only_models_that_a_checkpoint_needs_stay(tmp_path):
    scenario = small("evaluation.keep_best=test/loss", "checkpoint.every=1", "client.local_lr=0.05")
    result = run.start(scenario, out=tmp_path / "run")
    history = JsonLines.read(result.folder / "metrics.jsonl")
    assert best_of(history, "test/loss").round == 6, "every round is better than the one before"
    kept = sorted(file.name for file in (result.folder / "checkpoints").glob("best_*"))
    assert kept == ["best_000005.safetensors", "best_000006.safetensors"]


def test_a_finished_run_that_is_resumed_says_the_same(tmp_path):
    scenario = small("evaluation.keep_best=test/accuracy")
    first = run.start(scenario, out=tmp_path / "run")
    before = (first.folder / "params-best.safetensors").read_bytes()
    again = run.resume(first.folder)
    assert again.summary["best"] == first.summary["best"]
    assert (first.folder / "params-best.safetensors").read_bytes() == before


def test_a_run_whose_best_model_was_not_kept_is_not_resumed_as_if_it_were(tmp_path):
    folder = run.start(small(), out=tmp_path / "run").folder
    with pytest.raises(CheckpointError, match="it was not kept; resume the run with"):
        run.resume(folder, overrides=["evaluation.keep_best=test/accuracy"])
    assert run.resume(folder).summary["rounds"] == 6


def test_under_gossip_the_mean_of_the_nodes_is_kept(tmp_path):
    graph = ['strategy={name="gossip"}', "participation={kind='full'}"]
    scenario = small(*graph, "evaluation.keep_best=nodes/accuracy", "client.local_lr=0.3")
    result = run.start(scenario, out=tmp_path / "run")
    history = JsonLines.read(result.folder / "metrics.jsonl")
    best = best_of(history, "nodes/accuracy")
    assert result.summary["best"]["round"] == best.round
    model = load_file(result.folder / "params-best.safetensors")
    [at_best] = [record for record in history if record["round"] == best.round]
    measured = on_the_test_set(build(scenario))(array_record(model))
    assert measured["accuracy"] == at_best["test/accuracy"]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("test/acuracy", "did you mean 'test/accuracy'?"),
        ("tests/accuracy", "did you mean 'test/accuracy'?"),
        ("local/accuracy", r"never recorded with \[evaluation\] clients = 0"),
        ("pooled/accuracy", r"never recorded without \[evaluation\] pooled = true"),
        ("nodes/accuracy", "it has one model for all"),
        ("train/loss", "does not say which model is better; must be a metric of the task under"),
        ("comm/uplink_bytes", "does not say which model is better"),
        ("test/attack_success", "does not say which model is better"),
        ("accuracy", "is not a metric that a run records"),
    ],
)
def test_what_does_not_tell_models_apart_is_refused_before_a_folder_is_made(
    tmp_path, metric, words
):
    with pytest.raises(ScenarioError, match=words) as refused:
        run.start(small(f"evaluation.keep_best={metric}"), out=tmp_path / "run")
    assert "[evaluation] keep_best" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_where_no_round_has_a_value_nothing_is_kept(tmp_path):
    keeper = BestModel(tmp_path, "test/accuracy")
    keeper.take_up(records("test/accuracy", [None, math.nan]))
    assert keeper.unwritten() is None
    assert keeper.result() is None
