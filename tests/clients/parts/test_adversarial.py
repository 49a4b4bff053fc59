"""The adversarial part: what it trains on, in every executor."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.parts import adversarial
from clients.parts.adversarial import Adversarial, divergence
from fedsim.basics.rng import generator
from fedsim.client.executor import CohortExecutor
from fedsim.client.perturbation import Units
from fedsim.client.procedure import Batch
from fedsim.tasks.named import make_task
from tests.clients.parts.test_model_contrastive import two_rounds
from tests.laws import federations as fed
from tests.tiers import by_turns, slow

CLIENTS = (0, 3, 4, 5)  # 1, 7, 20 and 45 samples
KINDS = ("batched", "vmap", "loop")


# parts that use each way to a gradient besides: the objective, the outputs, the representations
BESIDE = [
    {"name": "sharpness_aware", "rho": 0.2},
    {"name": "restricted_softmax", "alpha": 0.5},
    {"name": "not_true_distillation", "beta": 2.0},
    {"name": "model_contrastive", "mu": 2.0},
]


def executor_of(kind, model="mlp", *, data=None, **part):
    parts = [{"name": "adversarial", **part}] if part else []
    procedure = fed.local_sgd(local_lr=0.1, batch_size=8, local_steps=5, parts=parts)
    return fed.make_executor(model, procedure, data, kind=kind, dtype="float64")


def trained(kind, model="mlp", *, clients=CLIENTS, **part):
    executor = executor_of(kind, model, **part)
    return executor.train(fed.job(executor, clients)).params


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("plain", [{"radius": 0.0}, {"steps": 0}, {"share": 0.0}], ids=str)
def test_where_nothing_is_moved_it_changes_no_bit(plain, kind):
    assert torch.equal(trained(kind, **plain), trained(kind))
    assert Adversarial(**plain).strength == 0
    assert not Adversarial(**plain).draws


# only a model with dropout tells "kept" and "batch" apart
@pytest.mark.parametrize(
    ("model", "statistics"),
    [
        ("mlp", "kept"),
        pytest.param("mlp", "batch", marks=pytest.mark.slow),
        ("mlp_dropout", "kept"),
        ("mlp_dropout", "batch"),
        ("cnn", "kept"),
        pytest.param("cnn", "batch", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("loss", [slow("adversarial"), slow("trades"), "mixed"])
def test_every_executor_trains_alike(model, statistics, loss):
    part = {"radius": 0.3, "step": 0.1, "steps": 3, "loss": loss, "statistics": statistics}
    found = [trained(kind, model, **part) for kind in KINDS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)
    assert float((found[0] - trained("batched", model)).abs().max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("loss", ["adversarial", "trades", "mixed"])
def test_every_executor_trains_alike_beside_parts_that_use_all_of_a_gradient(loss, model):
    moving = {"name": "adversarial", "radius": 0.3, "step": 0.1, "steps": 2, "loss": loss}
    found = [two_rounds(kind, model, [moving, *BESIDE]) for kind in KINDS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)
    for each in (moving, *BESIDE):
        without = [part for part in (moving, *BESIDE) if part != each]
        change = float((found[-1] - two_rounds("loop", model, without)).abs().max())
        assert change > 1e-5, each["name"]


@pytest.mark.parametrize("part", [{"norm": "2"}, {"attack": "fgsm"}, {"box": (-0.2, 0.2)}], ids=str)
def test_every_executor_attacks_alike(part):
    found = [trained(kind, "cnn", radius=0.4, **part) for kind in KINDS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)


def test_dropout_is_still_while_samples_are_moved_unless_it_is_asked_for():
    kept, batch = (trained("vmap", "mlp_dropout", statistics=s) for s in ("kept", "batch"))
    assert float((kept - batch).abs().max()) > 1e-6
    without = [trained("vmap", "mlp", statistics=s) for s in ("kept", "batch")]
    assert torch.equal(*without)


# --- the gradient by features -------------------------------------------------------------------


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
@pytest.mark.parametrize("own", [False, True], ids=["the task's losses", "others"])
def test_slopes_by_features_are_autograds_in_every_executor(own, model):
    executor = executor_of("batched", model)
    params = {n: p.detach() for n, p in executor.model.named_parameters()}
    x = torch.randn(5, *fed.SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 0, 1])
    batch = Batch(x, y, torch.ones(5, dtype=torch.float64), {})
    losses = (lambda outputs, targets: outputs.square().sum(-1)) if own else None
    leaf = x.clone().requires_grad_()
    outputs = executor.model(leaf)
    each = losses(outputs, y) if own else nn.functional.cross_entropy(outputs, y, reduction="none")
    (expected,) = torch.autograd.grad(each.sum(), leaf)
    ways = [
        executor._chain_training.gradient,
        executor._gradients.together,
        executor._gradients.alone,
    ]
    for way in ways:
        found = way.by_features(params, {}, batch, losses)
        torch.testing.assert_close(found.slope, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.losses, each.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.outputs, outputs.detach(), rtol=0, atol=1e-12)
        assert not found.slope.requires_grad
    assert torch.equal(batch.features, x)


@pytest.mark.parametrize("training", [False, True])
def test_batchnorm_goes_by_its_statistics_or_the_samples_and_keeps_what_it_has(training):
    executor = executor_of("loop", "cnn_batchnorm")
    model = executor.model.train()
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    for name, buffer in buffers.items():
        if name.endswith("running_mean"):
            buffer += 0.3
    before = {n: b.clone() for n, b in buffers.items()}
    x = torch.randn(5, *fed.SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch(x, torch.tensor([0, 1, 2, 0, 1]), torch.ones(5, dtype=torch.float64), {})
    way = executor._gradients.alone
    found = way.by_features(params, buffers, batch, training=training)
    assert all(torch.equal(buffers[n], b) for n, b in before.items())
    assert model.training
    model.train(training)
    copies = {n: b.clone() for n, b in buffers.items()}
    with torch.no_grad():
        expected = torch.func.functional_call(model, {**params, **copies}, (x,))
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-12)
    other = way.by_features(params, buffers, batch, training=not training)
    assert float((other.outputs - found.outputs).abs().max()) > 1e-3


@pytest.mark.parametrize("statistics", ["kept", "batch"])
def test_the_step_itself_moves_the_statistics_and_the_attack_does_not(statistics):
    """As many moves of the running mean as there are steps, whatever the attack looks at."""
    executor = executor_of("loop", "cnn_batchnorm", steps=4, statistics=statistics)
    found = executor.train(fed.job(executor, (4,))).buffers
    counts = [b for n, b in found.items() if n.endswith("num_batches_tracked")]
    assert [int(c) for c in counts] == [5] * len(counts)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_moved_samples_are_constants(kind):
    """The step is the gradient at them, not that of how they follow from the model."""
    executor = executor_of(kind, "logistic", radius=0.3, step=0.1, steps=2, random_start=False)
    ways = executor._gradients
    way = {"batched": lambda: executor._chain_training.gradient, "vmap": lambda: ways.together}
    gradient = way.get(kind, lambda: ways.alone)()
    (part,) = executor.procedure.parts
    params = {n: p.detach() for n, p in executor.model.named_parameters()}
    x = torch.randn(4, *fed.SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = Batch(x, torch.tensor([0, 1, 2, 1]), torch.ones(4, dtype=torch.float64), {})
    moved = part._moved(gradient, params, {}, batch)
    assert not moved.requires_grad
    assert float((moved - x).abs().max()) == pytest.approx(0.2)
    _, found, _ = part.wrapped(gradient, {})(params, {}, batch)
    _, there, _ = gradient(params, {}, batch._replace(features=moved))
    assert all(torch.equal(found[n], there[n]) for n in there)


# --- what is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_a_clients_noise_is_its_own_whoever_shares_its_chunk(kind):
    together = trained(kind, radius=0.3)
    for place, client in enumerate(CLIENTS):
        alone = trained(kind, radius=0.3, clients=(client,))
        torch.testing.assert_close(alone[0], together[place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_the_share_of_clients_that_train_so_is_drawn_once_for_each(kind):
    members = tuple(range(8))
    chance = [generator(fed.SEED, adversarial.CLIENTS, c).random() for c in members]
    assert min(chance) < 0.5 < max(chance)
    plain, robust, some = (
        trained(kind, clients=members, **part)
        for part in ({"radius": 0.0}, {"radius": 0.3}, {"radius": 0.3, "share": 0.5})
    )
    for client in members:
        expected = robust if chance[client] < 0.5 else plain
        torch.testing.assert_close(some[client], expected[client], rtol=0, atol=1e-12)


# --- units --------------------------------------------------------------------------------------


class Standardised(fed.InMemoryData):
    """The features of another federation, standardised, with a manifest that says so."""

    deviation = np.linspace(0.5, 3, 16).reshape(fed.SHAPE).astype(np.float32)
    mean = np.linspace(-2, 2, 16).reshape(fed.SHAPE).astype(np.float32)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for split, features in self._features.items():
            self._features[split] = (features - self.mean) / self.deviation

    @property
    def raw_units(self):
        return self.mean.astype(np.float64), self.deviation.astype(np.float64)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_radius_and_box_are_in_the_units_of_the_raw_features(kind):
    data = Standardised()
    part = Adversarial(radius=0.3, step=0.1, steps=4, random_start=False, box=(-1.0, 1.5))
    executor = executor_of(kind, "logistic", data=data, radius=0.3)
    ways = executor._gradients
    gradient = executor._chain_training.gradient if kind == "batched" else ways.alone
    rows = data.clients([5]).rows[0]
    x = torch.from_numpy(data.clients([5]).features[rows]).double()
    y = torch.from_numpy(data.clients([5]).targets[rows])
    params = {n: p.detach() for n, p in executor.model.named_parameters()}
    batch = Batch(x, y, torch.ones(len(y), dtype=torch.float64), {})
    moved = part._moved(gradient, params, {}, batch)
    change = (moved - x) * torch.from_numpy(data.deviation)
    assert float(change.abs().max()) == pytest.approx(0.3, abs=1e-9)
    raw = moved * torch.from_numpy(data.deviation) + torch.from_numpy(data.mean)
    was = x * torch.from_numpy(data.deviation) + torch.from_numpy(data.mean)
    assert float((raw - was.clamp(min=1.5)).max()) <= 1e-9
    assert float((was.clamp(max=-1.0) - raw).max()) <= 1e-9


def test_units_come_from_the_manifest():
    data = fed.InMemoryData()
    assert data.raw_units is None
    data.manifest = {"data": {"standardised": {"features": {"mean": 0.1, "std": 0.4}}}}
    mean, deviation = data.raw_units
    assert mean.shape == deviation.shape == (1, 1, 1)
    units = executor_of("vmap", "mlp", data=data)._gradients.units
    assert isinstance(units, Units)
    assert units.deviation.dtype == torch.float64
    assert float(units.deviation) == pytest.approx(0.4)


# --- losses -------------------------------------------------------------------------------------


def test_the_divergence_is_kullbacks_and_leiblers():
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = one.softmax(-1).numpy(), other.softmax(-1).numpy()
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(divergence(one, other).numpy(), expected, rtol=0, atol=1e-12)
    assert torch.equal(divergence(one, one), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_other_parts_are_obeyed_beside_trades(kind):
    """A penalty sees the samples alone, and both penalties are added."""
    trades = {"name": "adversarial", "loss": "trades", "radius": 0.3}
    margin = {"name": "margin", "coefficient": 0.5}
    found = []
    for parts in ([trades, margin], [margin, trades], [trades]):
        procedure = fed.local_sgd(local_lr=0.1, batch_size=8, local_steps=5, parts=parts)
        executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
        found.append(executor.train(fed.job(executor, CLIENTS)).params)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert float((found[0] - found[2]).abs().max()) > 1e-4


def test_numbers_are_learnt_adversarially_too():
    spec = fed.SPEC._replace(num_classes=0, target_shape=(1,))
    data = fed.InMemoryData()
    data.spec = spec
    data._targets = {k: t.reshape(-1, 1).astype(np.float32) for k, t in data._targets.items()}
    table = {"kind": "regression", "model": "linear", "dtype": "float64"}
    found = []
    for kind in KINDS:
        parts = [{"name": "adversarial", "radius": 0.2}]
        procedure = fed.local_sgd(local_lr=0.05, batch_size=8, local_steps=5, parts=parts)
        task = make_task(table, spec)
        executor = CohortExecutor(task, procedure, data, seed=1, kind=kind)
        found.append(executor.train(fed.job(executor, CLIENTS)).params)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -1.0}, "radius = -1.0: must be >= 0 and finite"),
        ({"step": 0.0}, "step = 0.0: must be > 0 and finite"),
        ({"steps": -1}, "steps = -1: must be >= 0"),
        ({"beta": float("nan")}, "beta = nan: must be >= 0"),
        ({"share": 1.1}, r"share = 1.1: must be in \[0, 1\]"),
        ({"share_adversarial": -0.1}, r"share_adversarial = -0.1: must be in \[0, 1\]"),
        ({"norm": "1"}, "norm = '1': must be inf or 2"),
        ({"attack": "cw"}, "attack = 'cw': must be pgd or fgsm"),
        ({"box": (1.0, 0.0)}, "box = .*: must be two finite numbers"),
        ({"loss": "trades", "attack": "fgsm"}, 'loss = "trades" with attack = "fgsm"'),
        ({"loss": "trades", "random_start": False}, 'loss = "trades" with random_start = false'),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adversarial(**arguments)


def test_trades_needs_classes_and_moving_needs_numbers():
    assert Adversarial(loss="trades").needs_classes == 'loss = "trades"'
    assert Adversarial().needs_classes is None
    assert Adversarial().needs_numbers == "radius = 0.1"
    assert Adversarial(radius=0.0).needs_numbers is None
