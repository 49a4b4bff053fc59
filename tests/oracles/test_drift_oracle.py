"""SCAFFOLD, FedNova, FedDyn and FedProx against NumPy, and what their papers are about."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.samples import SampleSpec
from fedsim.client.executor import CohortExecutor
from fedsim.engine.inline import InlineGrid
from fedsim.messages.replies import Replies
from fedsim.tasks.named import make_task
from strategies.feddyn import FedDyn
from strategies.fednova import FedNova, normalised_weights
from strategies.fedprox import FedProx
from strategies.scaffold import Scaffold, scaffold_step
from tests.laws import federations as fed
from tests.oracles import drift_oracle as oracle
from tests.oracles import sgd_oracle
from tests.tiers import by_turns

COHORTS = ((0, 3, 5), (1, 2, 3, 4, 5), (0, 3, 7))
DATA = fed.InMemoryData()
LR, BATCH = 0.2, 8
CLASSES, FEATURES = 3, 16


def as_model(flat):
    cut = CLASSES * FEATURES
    return {"W": flat[:cut].reshape(CLASSES, FEATURES), "b": flat[cut:]}


def gradient(flat, features, targets):
    found = sgd_oracle.gradient(as_model(flat), features, targets)
    return np.concatenate([found["W"].reshape(-1), found["b"]])


def flat(record):
    named = {name: record[name].numpy().reshape(-1) for name in ("output.weight", "output.bias")}
    return np.concatenate([named["output.weight"], named["output.bias"]])


def steps_of(client, epochs):
    return epochs * -(-fed.SIZES[client] // BATCH)


def batches_of(server_round, client, epochs=2):
    return list(fed.batches(DATA, client, server_round, BATCH, steps_of(client, epochs)))


def run(name, strategy, *, kind=None, arguments=None, **client):
    parts = fed.parts_for(name, **(arguments or {}))
    procedure = fed.make_procedure(
        "local_sgd", local_lr=LR, batch_size=BATCH, local_epochs=2, parts=parts, **client
    )
    app = fed.make_app("logistic", procedure, DATA, dtype="float64", kind=kind)
    grid = InlineGrid(app, 8)
    start = fed.initial_arrays("logistic", dtype="float64")
    arrays, records = fed.run_rounds(strategy, grid, start, app.layout, rounds=3, cohorts=COHORTS)
    return flat(start), flat(arrays), records, grid.store.export()


def kept(exported, part):
    clients, tensors = exported
    rows = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{part}/")}
    whole = torch.cat([rows["output.weight"].flatten(1), rows["output.bias"]], dim=1).numpy()
    return dict(zip(clients, whole, strict=True))


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("option", ["I", "II"])
def test_three_rounds_of_scaffold_equal_the_oracle(option, kind):
    strategy = Scaffold(option=option, server_lr=0.7)
    start, found, records, exported = run(
        "scaffold", strategy, arguments={"option": option}, kind=kind
    )
    model, c, own = oracle.scaffold(
        start, COHORTS, batches_of, 8, gradient, lr=LR, server_lr=0.7, option=option
    )
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    np.testing.assert_allclose(strategy.state.control.numpy(), c, rtol=0, atol=1e-11)
    for client, mine in kept(exported, "ControlVariate").items():
        np.testing.assert_allclose(mine, own[client], rtol=0, atol=1e-11)
    assert records[-1]["server/control_norm"] == pytest.approx(np.linalg.norm(c), abs=1e-11)
    # c is the mean of all c_i, those of clients that never took part being 0
    np.testing.assert_allclose(c, np.mean(own, axis=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_three_rounds_of_fednova_equal_the_oracle(momentum, kind):
    start, found, records, _ = run("fednova", FedNova(server_lr=0.7), kind=kind, momentum=momentum)
    model = oracle.fednova(
        start, COHORTS, batches_of, fed.SIZES, gradient, lr=LR, momentum=momentum, server_lr=0.7
    )
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-10)
    if not momentum:
        assert records[-1]["server/local_steps_min"] == min(steps_of(c, 2) for c in COHORTS[-1])
        assert records[-1]["server/local_steps_max"] == max(steps_of(c, 2) for c in COHORTS[-1])


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_three_rounds_of_feddyn_equal_the_oracle(kind):
    strategy = FedDyn(alpha=0.3)
    start, found, records, exported = run("feddyn", strategy, arguments={"alpha": 0.3}, kind=kind)
    model, h, slopes = oracle.feddyn(start, COHORTS, batches_of, 8, gradient, lr=LR, alpha=0.3)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    np.testing.assert_allclose(strategy.state.drift.numpy(), -h / 0.3, rtol=0, atol=1e-11)
    for client, mine in kept(exported, "DynamicRegulariser").items():
        np.testing.assert_allclose(mine, slopes[client], rtol=0, atol=1e-11)
    assert records[-1]["server/drift_norm"] == pytest.approx(np.linalg.norm(h) / 0.3, abs=1e-10)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_three_rounds_of_fedprox_equal_the_oracle(kind):
    start, found, _, _ = run("fedprox", FedProx(mu=0.4), arguments={"mu": 0.4}, kind=kind)
    model = oracle.fedprox(start, COHORTS, batches_of, fed.SIZES, gradient, lr=LR, mu=0.4)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)


# --- kernels ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 40))
def test_at_equal_steps_fednovas_weights_are_the_examples_bit_for_bit(counts, steps):
    examples = torch.tensor(counts, dtype=torch.float64)
    tau = torch.full_like(examples, float(steps))
    assert torch.equal(normalised_weights(examples, tau), examples)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40)), min_size=1, max_size=9))
def test_fednovas_weights_are_those_of_the_paper(clients):
    counts, steps = (torch.tensor(each, dtype=torch.float64) for each in zip(*clients, strict=True))
    share = counts / counts.sum()
    expected = torch.where(
        steps > 0, (share * steps).sum() * share / steps.clamp(min=1) * counts.sum(), 0
    )
    torch.testing.assert_close(normalised_weights(counts, steps), expected, rtol=1e-13, atol=0)


def test_nobody_answered_and_nothing_moves():
    params, control = torch.ones(3), torch.full((3,), 0.5, dtype=torch.float64)
    moved, after = scaffold_step(params, torch.zeros(0, 3), control, torch.zeros(0, 3), 4)
    assert torch.equal(moved, params)
    assert torch.equal(after, control)


# --- two clients that pull apart ----------------------------------------------------------------

# F_i = a_i (w - t_i)^2; their mean is least at sum a_i t_i / sum a_i, and 7 local steps of each
# lead a client so near to its own t_i that the mean of where they end is elsewhere
CURVATURE, TARGET = np.array([0.2, 2.0]), np.array([1.0, -1.0])
OPTIMUM = (CURVATURE * TARGET).sum() / CURVATURE.sum()
STEPS = {"equal": (7, 7), "unequal": (2, 14)}


class TwoQuadratics:
    """The loss (x w - y)^2 with x = sqrt(a), y = sqrt(a) * t, as many times as there are steps."""

    num_clients = 2
    spec = SampleSpec((1,), 0, target_shape=(1,))

    def __init__(self, steps, target):
        root = np.sqrt(CURVATURE)
        self._steps = steps
        self._features = root.repeat(steps).reshape(-1, 1)
        self._targets = (root * target).repeat(steps).reshape(-1, 1)

    def sizes(self, client_ids):
        return np.array([self._steps[client] for client in client_ids])

    def clients(self, client_ids, *, split="train"):
        ends = np.cumsum([0, *self._steps])
        rows = [np.arange(ends[client], ends[client + 1]) for client in client_ids]
        return fed.ClientRows(self._features, self._targets, rows)


def fixed_point(name, steps, *, rounds=60, lr=0.05, target=TARGET, **arguments):
    """Where the weight stands after many rounds of both clients, one step per sample."""
    data = TwoQuadratics(steps, target)
    task = make_task({"kind": "regression", "model": "logistic", "dtype": "float64"}, data.spec)
    task.build_model = lambda seed: torch.nn.Linear(1, 1, bias=False).double()
    procedure = fed.local_sgd(local_lr=lr, batch_size=1, parts=fed.parts_for(name, **arguments))
    executor = CohortExecutor(task, procedure, data, seed=1, kind="loop")
    strategy = fed.make_strategy(name, **arguments)
    strategy.declare_layout(executor.layout)
    params = torch.zeros(1, dtype=torch.float64)
    state, memory, known = strategy.init(params, 2), {}, (False, False)
    for server_round in range(1, rounds + 1):
        shared, _ = strategy.broadcast(state, params, np.arange(2))
        job = fed.job(
            executor, (0, 1), server_round=server_round, shared=shared, state=memory,
            has_state=known,
        )  # fmt: skip
        result = executor.train(job)
        memory, known = result.state, (bool(result.state),) * 2
        replies = Replies(
            server_round, executor.layout, np.arange(2), result.params, params, {}, result.extra,
            result.num_examples, {}, torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
        params, state, _ = strategy.server_update(state, params, replies)
    return float(params)


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("scaffold", {"option": "I"}),
        ("scaffold", {"option": "II"}),
        ("feddyn", {"alpha": 4.0}),
    ],
    ids=["scaffold I", "scaffold II", "feddyn"],
)
def test_their_fixed_point_is_the_optimum(name, arguments, steps):
    assert fixed_point(name, steps, **arguments) == pytest.approx(OPTIMUM, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_that_of_averaging_is_not(steps):
    assert abs(fixed_point("fedavg", steps, weighted=False) - OPTIMUM) > 0.05
    # a proximal term draws the point nearer and does not bring it there
    near = fixed_point("fedprox", steps, mu=2.0, weighted=False)
    assert abs(near - OPTIMUM) > 1e-3


@pytest.mark.slow
def test_fednova_takes_the_inconsistency_of_unequal_steps_away():
    """With steps so small that clients do not drift, what is left is how many each takes.

    Its fixed point is off by the step size times curvature times steps, here some 1e-9. The optimum
    is at 0, where differences of models keep their digits.
    """
    target = np.array([1.0, -0.1])
    options = {"lr": 1e-10, "target": target, "server_lr": 3e8, "weighted": False, "rounds": 60}
    assert fixed_point("fednova", (2, 14), **options) == pytest.approx(0, abs=1e-8)
    assert abs(fixed_point("fedavg", (2, 14), **options)) > 0.05
