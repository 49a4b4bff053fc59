import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import nn

from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec
from fedsim.client.evaluation import Evaluation
from fedsim.tasks.classification import Classification, NextCharacter
from fedsim.tasks.metrics import auroc
from fedsim.tasks.named import make_task
from fedsim.tasks.regression import Regression

DIGITS = (1, 8, 8)


def task_of(model="logistic", *, feature_shape=DIGITS, num_classes=10, **table):
    return make_task({"model": model, **table}, SampleSpec(feature_shape, num_classes))


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _softmax_losses(logits, targets):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(axis=1))
    return log_z - shifted[np.arange(len(targets)), targets]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 9),
    padding=st.integers(0, 4),
)
def test_statistics_are_the_sums_over_samples_and_ignore_padding(seed, samples, padding):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, 10)) * 5
    targets = rng.integers(0, 10, samples)
    junk = np.full((padding, 10), np.nan)
    sums = task_of(dtype="float64").statistics(
        torch.from_numpy(np.concatenate([logits, junk])),
        torch.from_numpy(np.concatenate([targets, np.zeros(padding, dtype=np.int64)])),
        torch.tensor([1.0] * samples + [0.0] * padding, dtype=torch.float64),
    )
    assert sums["loss"].item() == pytest.approx(_softmax_losses(logits, targets).sum(), abs=1e-12)
    assert sums["correct"].item() == (logits.argmax(axis=1) == targets).sum()
    assert sums["examples"].item() == samples


def test_statistics_add_up_over_batches():
    task = task_of()
    torch.manual_seed(0)
    outputs, targets, ones = torch.randn(10, 10), torch.randint(10, (10,)), torch.ones(10)
    whole = task.statistics(outputs, targets, ones)
    first = task.statistics(outputs[:4], targets[:4], ones[:4])
    second = task.statistics(outputs[4:], targets[4:], ones[4:])
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + second[name], value, rtol=1e-12, atol=0)


def test_losses_and_statistics_under_vmap_equal_one_client_at_a_time():
    task = task_of(dtype="float64")
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 6, 10, generator=generator, dtype=torch.float64)
    targets = torch.randint(10, (4, 6), generator=generator)
    weights = (torch.rand(4, 6, generator=generator) < 0.7).double()
    losses = torch.func.vmap(task.sample_losses)(outputs, targets)
    sums = torch.func.vmap(task.statistics)(outputs, targets, weights)
    for i in range(4):
        torch.testing.assert_close(losses[i], task.sample_losses(outputs[i], targets[i]))
        for name, value in task.statistics(outputs[i], targets[i], weights[i]).items():
            torch.testing.assert_close(sums[name][i], value)


def test_gradients_of_the_loss_under_vmap_are_softmax_minus_one_hot():
    task = task_of(dtype="float64")
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 5, 10, generator=generator, dtype=torch.float64)
    targets = torch.randint(10, (3, 5), generator=generator)

    def total(logits, y):
        return task.sample_losses(logits, y).sum()

    grads = torch.func.vmap(torch.func.grad(total))(outputs, targets)
    expected = outputs.softmax(-1) - nn.functional.one_hot(targets, 10)
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


def test_metrics_are_means_over_the_samples():
    metrics = task_of().metrics({"loss": 6.0, "correct": 3.0, "examples": 4.0})
    assert metrics == {"loss": 1.5, "accuracy": 0.75}


def test_metrics_over_no_sample_are_nan():
    metrics = task_of().metrics({"loss": 0.0, "correct": 0.0, "examples": 0.0})
    assert metrics.keys() == {"loss", "accuracy"}
    assert all(np.isnan(value) for value in metrics.values())


def test_a_task_survives_pickling():
    task = task_of("mlp", hidden=[3], dtype="float64")
    assert bits(pickle.loads(pickle.dumps(task)).build_model(1)) == bits(task.build_model(1))


# --- which task it is -----------------------------------------------------------------------------

NUMBERS = SampleSpec((3,), 0)
TEXT = SampleSpec((5,), 12, (), 12)
SENTIMENT = SampleSpec((5,), 2, (), 12)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (SampleSpec(DIGITS, 10), Classification),
        (NUMBERS, Regression),
        (TEXT, NextCharacter),
        (SENTIMENT, Classification),
    ],
    ids=["classes", "numbers", "characters", "classes of texts"],
)
@pytest.mark.parametrize("table", [{}, {"kind": "auto"}], ids=["left out", "auto"])
def test_the_data_decide_what_is_learnt_when_the_kind_is_left_out(spec, kind, table):
    assert type(make_task(table, spec)) is kind


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("regression", SampleSpec(DIGITS, 10), "targets are 10 classes, not numbers"),
        ("classification", NUMBERS, "targets are numbers, not classes"),
        ("next_character", NUMBERS, "targets are numbers, not classes"),
        ("next_character", SampleSpec(DIGITS, 10), "features are numbers, not tokens"),
        ("next_character", SENTIMENT, "targets are 2 classes, not the 12 tokens of the text"),
    ],
)
def test_a_kind_that_does_not_fit_the_data_is_refused_naming_both(kind, spec, message):
    right = "regression" if not spec.has_classes else "classification"
    with pytest.raises(ScenarioError) as raised:
        make_task({"kind": kind}, spec, data="heart")
    assert str(raised.value) == (
        f'[task] kind = "{kind}" with [data] name = "heart": the {message}; '
        f'use kind = "{right}" or leave it out'
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "clasification"}, "'clasification' is not a task; did you mean 'classific"),
        ({"kind": "collections:OrderedDict"}, "must be a subclass of fedsim.tasks.Task"),
        ({"dtype": "float23"}, "'float23' is not a dtype; did you mean 'float32'"),
        ({"metrics": ["acuracy"]}, "'acuracy' is not a metric of classes; did you mean 'accuracy'"),
        ({"loss": "mae"}, "'loss' is not a key of classification, which the data make this task"),
    ],
)
def test_what_no_task_knows_is_refused(table, message):
    with pytest.raises(ScenarioError, match=message):
        make_task(table, SampleSpec(DIGITS, 10))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"metrics": ["accuracy"]}, "'accuracy' is not a metric of regression"),
        ({"loss": "hubber"}, r"\[task\] loss = 'hubber': must be mse or huber or mae"),
        (
            {"loss": "mae", "huber_delta": 0.5},
            "huber_delta = 0.5: changes nothing with loss = 'mae'",
        ),
        ({"metrics": ["mae", "mae"]}, r"\[task\] metrics: 'mae' is there twice"),
        ({"loss": "huber", "huber_delta": 0.0}, r"\[task\] huber_delta = 0.0: must be > 0"),
    ],
)
def test_what_no_regression_knows_is_refused(table, message):
    with pytest.raises(ScenarioError, match=message):
        make_task(table, NUMBERS)


class Hinge(Classification):
    """A task of somebody's own."""

    def __init__(self, build, spec, dtype, *, margin=1.0):
        super().__init__(build, spec, dtype)
        self.margin = margin

    def sample_losses(self, outputs, targets):
        return nn.functional.multi_margin_loss(
            outputs, targets, margin=self.margin, reduction="none"
        )


def test_a_users_own_task_is_built_by_import_path_with_its_own_keys():
    task = make_task({"kind": f"{__name__}:Hinge", "margin": 2.0}, SampleSpec(DIGITS, 10))
    outputs = torch.tensor([[1.0, 2.0, 0.0]])
    assert task.sample_losses(outputs, torch.tensor([0])).item() == pytest.approx((3 + 1) / 3)


# --- metrics, against scikit-learn ----------------------------------------------------------------


def measured(task, outputs, targets, *, batch=7):
    """All metrics of given outputs, added up over batches as the executor does."""
    outputs, targets = torch.as_tensor(outputs), torch.as_tensor(targets)
    rows = torch.arange(len(targets))
    return Evaluation(nn.Identity(), task, batch).one({}, (outputs, targets), rows)


def scored(seed, samples, classes, *, levels=None):
    """Logits and targets; with `levels` the logits take so few values that many are tied."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(samples, classes)) * 2
    if levels:
        logits = np.round(logits * levels) / levels
    return logits, draw.integers(classes, size=samples)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1), samples=st.integers(2, 60), levels=st.sampled_from([None, 1, 2])
)
def test_auroc_equals_scikit_learns_with_ties(seed, samples, levels):
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=samples)
    if levels:
        scores = np.round(scores * levels) / levels
    positive = draw.random(samples) < 0.4
    found = auroc(torch.from_numpy(scores), torch.from_numpy(positive))
    if positive.all() or not positive.any():
        assert math.isnan(found)
    else:
        assert found == pytest.approx(sk.roc_auc_score(positive, scores), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_classification_metrics_equal_scikit_learns(classes, levels):
    every = ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "per_class"]
    task = task_of(num_classes=classes, metrics=every, dtype="float64")
    logits, targets = scored(classes, 200, classes, levels=levels)
    found = measured(task, logits, targets)
    predicted = logits.argmax(axis=1)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    area = (
        sk.roc_auc_score(targets, logits[:, 1] - logits[:, 0])
        if classes == 2
        else sk.roc_auc_score(targets, torch.from_numpy(logits).softmax(1), multi_class="ovr")
    )
    expected = {
        "loss": sk.log_loss(targets, shares, labels=range(classes)),
        "accuracy": sk.accuracy_score(targets, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(targets, predicted),
        "macro_f1": sk.f1_score(targets, predicted, average="macro"),
        "auroc": area,
    }
    recalls = sk.recall_score(targets, predicted, average=None)
    expected |= {f"accuracy_class_{c}": recall for c, recall in enumerate(recalls)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_the_area_of_two_classes_is_that_of_the_probability_of_class_one():
    logits, targets = scored(1, 100, 2)
    task = task_of(num_classes=2, metrics=["auroc"])
    probability = torch.from_numpy(logits).softmax(1)[:, 1]
    expected = sk.roc_auc_score(targets, probability)
    assert measured(task, logits, targets)["auroc"] == pytest.approx(expected, abs=1e-12)


def test_the_area_of_two_classes_does_not_saturate_as_probabilities_do():
    logits = np.array([[0.0, 800.0], [0.0, 900.0], [0.0, 1.0]])
    task = task_of(num_classes=2, metrics=["auroc"])
    assert measured(task, logits, np.array([0, 1, 0]))["auroc"] == 1.0


def test_a_class_that_does_not_occur_leaves_the_means_to_the_others():
    task = task_of(num_classes=4, metrics=["balanced_accuracy", "macro_f1", "auroc", "per_class"])
    logits, targets = scored(2, 50, 4)
    targets = targets % 3
    logits[:, 3] = -10
    found = measured(task, logits, targets)
    predicted = logits.argmax(axis=1)
    shares = torch.from_numpy(logits).softmax(1).numpy()
    areas = [sk.roc_auc_score(targets == c, shares[:, c]) for c in range(3)]
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted), abs=1e-12
    )
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(targets, predicted, average="macro"), abs=1e-12
    )
    assert math.isnan(found["accuracy_class_3"])


@pytest.mark.parametrize("classes", [2, 3])
def test_the_area_where_one_class_occurs_is_not_a_number(classes):
    task = task_of(num_classes=classes, metrics=["accuracy", "auroc"])
    logits, _ = scored(3, 20, classes)
    found = measured(task, logits, np.ones(20, dtype=np.int64))
    assert math.isnan(found["auroc"])
    assert not math.isnan(found["accuracy"])


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("loss", ["mse", "huber", "mae"])
def test_regression_metrics_equal_scikit_learns(shape, loss):
    spec = SampleSpec((3,), 0, shape)
    delta = {"huber_delta": 0.7} if loss == "huber" else {}
    table = {"loss": loss, **delta, "metrics": ["mse", "rmse", "mae", "r2"]}
    task = make_task({**table, "dtype": "float64"}, spec)
    draw = np.random.default_rng(0)
    targets = draw.normal(size=(90, *shape)).astype(np.float32) + 1000
    outputs = targets.reshape(90, -1) + draw.normal(size=(90, math.prod(shape)))
    found = measured(task, outputs, targets)
    true = targets.reshape(90, -1).astype(np.float64)
    errors = np.abs(outputs - true)
    huber = np.where(errors < 0.7, errors**2 / 2, 0.7 * (errors - 0.35)).mean()
    squared = sk.mean_squared_error(true, outputs)
    expected = {
        "loss": {"mse": squared, "huber": huber, "mae": errors.mean()}[loss],
        "mse": squared,
        "rmse": math.sqrt(squared),
        "mae": sk.mean_absolute_error(true, outputs),
        "r2": sk.r2_score(true, outputs),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("targets", [[2.0], [2.0, 2.0, 2.0]], ids=["one sample", "no variation"])
def test_the_coefficient_of_determination_may_be_undefined(targets):
    found = measured(make_task({}, NUMBERS), torch.zeros(len(targets), 1), torch.tensor(targets))
    assert math.isnan(found["r2"])
    assert (found["rmse"], found["mae"]) == (2.0, 2.0)


def test_perplexity_is_the_exponential_of_the_loss():
    task = make_task({"hidden": 4, "model": "char_lstm"}, TEXT)
    found = measured(task, *scored(0, 40, 12))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert found.keys() == {"loss", "accuracy", "perplexity"}
    assert task.metrics({"loss": 1e6, "correct": 0.0, "examples": 1.0})["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("spec", "table"),
    [
        (SampleSpec(DIGITS, 3), {"metrics": ["accuracy", "macro_f1", "auroc", "per_class"]}),
        (NUMBERS, {"metrics": ["mse", "rmse", "mae", "r2"]}),
        (TEXT, {}),
    ],
    ids=["classification", "regression", "next character"],
)
def test_metrics_over_no_sample_are_nan_and_have_the_same_names(spec, table):
    task = make_task(table, spec)
    width = spec.num_classes or 1
    targets = np.array([0, 1, 2]) if spec.has_classes else np.zeros(3, dtype=np.float32)
    full = measured(task, np.eye(3, width), targets)
    empty = measured(task, np.zeros((0, width)), targets[:0])
    assert empty.keys() == full.keys()
    assert all(math.isnan(value) for value in empty.values())


@pytest.mark.parametrize("spec", [SampleSpec(DIGITS, 3), NUMBERS], ids=["classes", "numbers"])
def test_all_metrics_of_clients_together_are_those_of_each_alone(spec):
    """Under vmap, padded, as a chunk of clients is evaluated."""
    metrics = ["balanced_accuracy", "macro_f1", "auroc"] if spec.has_classes else ["rmse", "r2"]
    task = make_task({"metrics": metrics, "dtype": "float64"}, spec)
    model = task.build_model(0).eval()
    draw = np.random.default_rng(0)
    features = torch.from_numpy(draw.normal(size=(150, *spec.feature_shape)).astype(np.float32))
    targets = draw.integers(3, size=150) if spec.has_classes else draw.normal(size=150)
    pool = features, torch.from_numpy(targets)
    rows = [torch.arange(0, 5), torch.arange(0), torch.arange(5, 149), torch.arange(149, 150)]
    named = {n: t.detach() for n, t in model.state_dict().items()}
    stacked = {n: t.expand(4, *t.shape).contiguous() for n, t in named.items()}
    evaluation = Evaluation(model, task, 64)
    with torch.no_grad():
        together = evaluation.together(stacked, pool, rows)
        alone = [evaluation.one(named, pool, mine) for mine in rows]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-12, nan_ok=True)


def test_gradients_of_a_regression_are_those_of_its_equation():
    task = make_task({"dtype": "float64"}, SampleSpec((3,), 0, (2,)))
    outputs = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    gradient = torch.func.grad(lambda o: task.sample_losses(o, targets).sum())(outputs)
    assert gradient.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_measured_has_the_bits_of_the_loss(dtype):
    generator = torch.Generator().manual_seed(6)
    outputs = 9 * torch.randn(3, 7, 10, dtype=dtype, generator=generator)
    targets = torch.randint(10, (3, 7), generator=generator)
    weights = torch.ones(3, 7, dtype=dtype)
    task = task_of()
    together = torch.func.vmap(task.statistics)(outputs, targets, weights)["loss"]
    for slot in range(3):
        losses = task.sample_losses(outputs[slot], targets[slot])
        assert together[slot] == losses.sum(dtype=torch.float64)
        alone = task.statistics(outputs[slot], targets[slot], weights[slot])["loss"]
        assert alone == losses.sum(dtype=torch.float64)


def test_a_subclass_is_measured_by_its_own_losses():
    class Halved(Classification):
        def sample_losses(self, outputs, targets):
            return super().sample_losses(outputs, targets) / 2

    outputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    spec = SampleSpec((2,), 3)
    whole, half = (
        kind(lambda: nn.Linear(2, 3), spec, torch.float32).statistics(
            outputs, targets, torch.ones(4)
        )["loss"]
        for kind in (Classification, Halved)
    )
    assert half.item() == pytest.approx(whole.item() / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_have_the_bits_of_autograd(dtype):
    task = make_task({"model": "logistic"}, SampleSpec((4,), 7))
    draw = torch.Generator().manual_seed(3)
    outputs = 30 * torch.randn(50, 7, generator=draw, dtype=dtype)
    outputs[3, 2], outputs[4, 1] = torch.inf, torch.nan
    targets = torch.randint(7, (50,), generator=draw)
    shares = torch.rand(50, generator=draw, dtype=dtype) * (torch.arange(50) % 5 > 0)
    losses, slopes = task.slopes(outputs, targets, shares)
    leaf = outputs.clone().requires_grad_()
    expected = task.sample_losses(leaf, targets)
    (gradient,) = torch.autograd.grad((expected * shares).sum(), leaf)
    assert losses.numpy().tobytes() == expected.detach().numpy().tobytes()
    assert slopes.numpy().tobytes() == gradient.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_along_samples_have_the_bits_of_autograd_too(dtype):
    task = make_task({"model": "logistic"}, SampleSpec((4,), 7))
    draw = torch.Generator().manual_seed(3)
    across = 30 * torch.randn(3, 7, 20, generator=draw, dtype=dtype)
    across[0, 2, 3], across[1, 1, 4] = torch.inf, torch.nan
    targets = torch.randint(7, (3, 20), generator=draw)
    shares = torch.rand(3, 20, generator=draw, dtype=dtype) * (torch.arange(20) % 5 > 0)
    losses, slopes = task.slopes(across.mT, targets, shares)
    leaf = across.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * shares).sum(), leaf)
    assert losses.numpy().tobytes() == expected.detach().numpy().tobytes()
    assert slopes.mT.contiguous().numpy().tobytes() == gradient.numpy().tobytes()
    rows, by_row = task.slopes(across.mT.contiguous(), targets, shares)
    torch.testing.assert_close(losses, rows, equal_nan=True)
    torch.testing.assert_close(slopes, by_row, equal_nan=True)


def test_slopes_are_not_offered_where_the_losses_are_anothers():
    task = make_task({"model": "logistic"}, SampleSpec((4,), 7))
    task.sample_losses = lambda outputs, targets: outputs.sum(-1)
    assert task.slopes(torch.zeros(2, 7), torch.zeros(2, dtype=torch.int64), torch.ones(2)) is None
