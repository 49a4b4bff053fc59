"""Fine-tuning before evaluation: its numbers, its bits, and that nothing of it is kept."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.runs import start as run
from fedsim.runs.world import build
from fedsim.scenario.identity import identity_of
from fedsim.scenario.scenario import Scenario
from tests.tiers import slow

CLIENTS = 5


def scenario(*, finetune=None, task=None, evaluation=None, engine=None, **tables):
    measured = {"clients": CLIENTS, **(evaluation or {})}
    if finetune is not None:
        measured["finetune"] = finetune
    document = {
        "rounds": 2,
        "seed": 4,
        "data": {"name": "digits"},
        "partition": {
            "kind": "dirichlet", "alpha": 0.5, "min_size": 8, "clients": CLIENTS,
            "test_fraction": 0.3,
        },
        "task": {"model": "logistic", "dtype": "float64", **(task or {})},
        "client": {"local_lr": 0.1, "batch_size": 1000},
        "engine": {"kind": "inline", "chunk_size": 2, **(engine or {})},
        "evaluation": measured,
        **tables,
    }  # fmt: skip
    return Scenario.from_resolved(document, "tests/finetune.toml")


def measured(of, folder, **options):
    result = run.start(of, out=folder, **options)
    history = JsonLines.read(result.folder / "metrics.jsonl")
    kept = [{n: v for n, v in r.items() if not n.startswith("time/")} for r in history]
    return result, kept


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("executor", ["auto", "loop"])
@pytest.mark.parametrize("tensors", [None, ["*.bias"]], ids=["all tensors", "some"])
def test_a_linear_model_takes_the_steps_of_gradient_descent(tmp_path, tensors, executor):
    """An independent oracle in NumPy: whole batches, so that no order is drawn."""
    tuned = {"epochs": 3, "lr": 0.2} | ({} if tensors is None else {"tensors": tensors})
    of = scenario(finetune=tuned, engine={"executor": executor})
    result, history = measured(of, tmp_path / "run")
    params = load_file(result.folder / "params.safetensors")
    data = build(of).data
    train, test = (data.clients(range(CLIENTS), split=split) for split in ("train", "test"))
    accuracies, losses, sizes = [], [], []
    for client in range(CLIENTS):
        weight, bias = params["output.weight"].copy(), params["output.bias"].copy()
        rows = train.rows[client]
        x, y = train.features[rows].reshape(len(rows), -1).astype(float), train.targets[rows]
        for _ in range(3):
            slope = softmax(x @ weight.T + bias)
            slope[np.arange(len(y)), y] -= 1
            slope /= len(y)
            weight -= 0.2 * slope.T @ x * (tensors is None)
            bias -= 0.2 * slope.sum(axis=0)
        rows = test.rows[client]
        x, y = test.features[rows].reshape(len(rows), -1).astype(float), test.targets[rows]
        chances = softmax(x @ weight.T + bias)
        accuracies.append((chances.argmax(axis=1) == y).mean())
        losses.append(-np.log(chances[np.arange(len(y)), y]).mean())
        sizes.append(len(y))
    last = history[-1]
    assert last["finetuned/loss_mean"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert last["finetuned/accuracy_mean"] == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert last["finetuned/loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-9)
    assert last["finetuned/loss_worst_decile"] == pytest.approx(max(losses), rel=1e-9)
    assert last["finetuned/accuracy_mean"] > last["local/accuracy_mean"]


def test_nothing_of_it_is_kept(tmp_path):
    moments = {"client": {"local_lr": 0.1, "momentum": 0.9, "keep_optimizer": True}}
    plain, without = measured(scenario(**moments), tmp_path / "plain")
    tuned, beside = measured(scenario(finetune={"lr": 0.5}, **moments), tmp_path / "tuned")
    assert tuned.summary["params_sha256"] == plain.summary["params_sha256"]
    others = [{n: v for n, v in r.items() if not n.startswith("finetuned/")} for r in beside]
    for record in (*others, *without):  # the replies hold more numbers
        record.pop("comm/evaluate_uplink_bytes", None)
    assert others == without


MODELS = [
    {"model": "mlp_dropout", "hidden": [7]},
    pytest.param({"model": "cnn"}, marks=pytest.mark.slow),
    {"model": "mlp", "hidden": [7], "personal": ["output"]},
    pytest.param({"model": "mlp", "hidden": [7], "personal": ["*"]}, marks=pytest.mark.slow),
    {"model": "cnn_batchnorm", "buffers": "local"},
]


@pytest.mark.parametrize("task", [MODELS[0], *map(slow, [MODELS[2], MODELS[4]]), MODELS[1]])
def test_executors_give_the_same_up_to_rounding(tmp_path, task):
    batches = {"local_lr": 0.1, "batch_size": 16}
    found = []
    for executor in ("auto", "loop"):
        of = scenario(
            finetune={"epochs": 2, "lr": 0.1}, task=task, client=batches,
            engine={"executor": executor},
        )  # fmt: skip
        found.append(measured(of, tmp_path / executor)[1])
    tuned = [name for name in found[0][-1] if name.startswith("finetuned/")]
    assert "finetuned/loss_mean" in tuned
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        for name in tuned:
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), name


@pytest.mark.usefixtures("lent_workers")
def test_workers_and_chunks_of_ray_have_the_bits_of_one_process(tmp_path):
    task = {"model": "mlp_dropout", "hidden": [7], "dtype": "float32"}
    batches = {"local_lr": 0.1, "batch_size": 16}
    inline = scenario(finetune={"lr": 0.1}, task=task, client=batches)
    ray = scenario(finetune={"lr": 0.1}, task=task, client=batches, engine={"kind": "ray"})
    one = measured(inline, tmp_path / "inline")[1]
    assert one == measured(ray, tmp_path / "ray", workers=2)[1]


def test_beside_models_of_clients_own_the_shared_one_is_tuned(tmp_path):
    plain = measured(scenario(strategy={"name": "ditto"}), tmp_path / "plain")[1]
    of = scenario(finetune={"lr": 0.2}, strategy={"name": "ditto"})
    tuned = measured(of, tmp_path / "tuned")[1]
    for name in ("personal/accuracy", "local/loss_mean", "personal/clients"):
        assert tuned[-1][name] == plain[-1][name]
    assert tuned[-1]["finetuned/loss_mean"] < tuned[-1]["local/loss_mean"]
    assert not any("own/" in name for name in tuned[-1])


@pytest.mark.parametrize("personal", [[], ["output.bias"]])
def test_a_node_that_gets_one_message_measures_the_same(tmp_path, personal):
    """A Flower strategy sends plain messages, one per client, as real nodes get them."""
    task = {"model": "mlp_dropout", "hidden": [7], "personal": personal}
    batches = {"local_lr": 0.1, "batch_size": 16}
    found = []
    for name in ("fedavg", "flower:FedAvg"):
        of = scenario(
            finetune={"epochs": 2, "lr": 0.1}, task=task, client=batches, strategy={"name": name}
        )
        found.append(measured(of, tmp_path / name.replace(":", "-"))[1])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        for name in (n for n in one if n.startswith("finetuned/")):
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), name


def test_draws_are_of_a_purpose_of_their_own(tmp_path):
    """With the same work as in training, other batches are drawn than in training."""
    batches = {"local_lr": 0.1, "batch_size": 8}
    of = scenario(finetune={"epochs": 1, "lr": 0.1}, client=batches, rounds=1)
    _, history = measured(of, tmp_path / "run")
    alone = scenario(client=batches, rounds=1, task={"personal": ["*"]})
    start = scenario(
        finetune={"epochs": 1, "lr": 0.1}, client={**batches, "local_lr": 0.0}, rounds=1
    )
    _, once = measured(alone, tmp_path / "alone")
    _, tuned = measured(start, tmp_path / "start")
    # from the same model, as many steps of the same size: near, and not the same
    assert tuned[-1]["finetuned/loss_mean"] == pytest.approx(once[-1]["local/loss_mean"], rel=0.2)
    assert tuned[-1]["finetuned/loss_mean"] != once[-1]["local/loss_mean"]
    assert history[-1]["finetuned/loss_mean"] < history[-1]["local/loss_mean"]


def test_the_hash_of_scenarios_without_it_stays():
    assert scenario().sha256 == scenario(evaluation={"finetune": None}).sha256
    tuned = scenario(finetune={"lr": 0.1})
    assert scenario().sha256 != tuned.sha256
    # nor does a key that came later change it
    before = tuned.resolved()
    assert before["evaluation"]["finetune"].pop("tensors", None) is None
    assert identity_of(before) == tuned.sha256
    assert scenario(finetune={"lr": 0.1, "tensors": ["output"]}).sha256 != tuned.sha256


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"finetune": {"lr": 0.0}}, r"\[evaluation\] finetune.lr = 0.0: must be > 0"),
        ({"finetune": {"epochs": 2}}, r"\[evaluation\] 'finetune.lr' is missing"),
        ({"finetune": {"lr": 0.1, "epoch": 2}}, r"did you mean 'epochs'\?"),
        ({"finetune": {"lr": 0.1, "tensors": []}}, "finetune.tensors"),
        ({"finetune": {"lr": 0.1}, "evaluation": {"clients": 0}}, "how many clients fine-tune"),
        ({"expect": {"finetuned/loss": {"max": 9.0}}}, r"never recorded without \[evaluation\]"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tables, words):
    with pytest.raises(ScenarioError, match=words):
        scenario(**tables)


def test_a_metric_that_no_client_measures_is_named_with_the_nearest(tmp_path):
    of = scenario(finetune={"lr": 0.1}, evaluation={"keep_best": "finetuned/acuracy_mean"})
    with pytest.raises(ScenarioError, match="did you mean 'finetuned/accuracy_mean'"):
        build(of)


def test_a_tensor_that_the_model_does_not_have_is_named_with_the_nearest():
    with pytest.raises(ScenarioError, match=r"finetune.tensors: 'outptu' .* mean 'output'\?"):
        build(scenario(finetune={"lr": 0.1, "tensors": ["outptu"]}))
