"""APFL, Ditto, pFedMe and Per-FedAvg against NumPy, and what their papers say of them."""

import numpy as np
import pytest
import torch

from clients.parts.personal_mixture import PersonalMixture
from fedsim.basics.samples import SampleSpec
from fedsim.client.executor import CohortExecutor
from fedsim.client.part import Here
from fedsim.client.procedure import Batch
from fedsim.engine.inline import InlineGrid
from fedsim.messages.layout import Payload
from fedsim.tasks.named import make_task
from strategies.apfl import APFL
from strategies.ditto import Ditto
from strategies.per_fedavg import PerFedAvg
from strategies.pfedme import PFedMe
from tests.laws import federations as fed
from tests.oracles import personal_oracle as oracle
from tests.oracles.test_drift_oracle import COHORTS, DATA, LR, batches_of, flat, gradient
from tests.tiers import by_turns

KINDS = ("batched", "vmap", "loop")


def run(strategy, part, *, kind, cohorts=COHORTS, **arguments):
    """Three rounds: (first model, last model, every client's state by client)."""
    procedure = fed.make_procedure(
        "local_sgd", local_lr=LR, batch_size=8, local_epochs=2, parts=[{"name": part, **arguments}]
    )
    app = fed.make_app("logistic", procedure, DATA, dtype="float64", kind=kind)
    grid = InlineGrid(app, 8)
    start = fed.initial_arrays("logistic", dtype="float64")
    arrays, _ = fed.run_rounds(strategy, grid, start, app.layout, rounds=3, cohorts=cohorts)
    clients, state = grid.store.export()
    kept = {c: {n: rows[place] for n, rows in state.items()} for place, c in enumerate(clients)}
    return flat(start), flat(arrays), kept


def vector(state, start):
    """A model that a client keeps under names that begin so."""
    named = [state[f"{start}{name}"].reshape(-1) for name in ("output.weight", "output.bias")]
    return torch.cat(named).numpy()


MIXTURES = {
    "the paper": ({}, {"alpha_lr": LR}),
    "fixed": ({"adaptive": False}, {"alpha_lr": None}),
    "once a round": ({"alpha_every": "round"}, {"alpha_lr": LR, "once": True}),
    "after the step": ({"order": "gauss_seidel"}, {"alpha_lr": LR, "after": True}),
    "ridge": ({"alpha_ridge": 0.02, "alpha_lr": 0.05}, {"alpha_lr": 0.05, "ridge": 0.02}),
}


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize(("options", "theirs"), MIXTURES.values(), ids=MIXTURES)
def test_three_rounds_of_apfl_equal_the_oracle(options, theirs, kind):
    start, found, kept = run(APFL(), "personal_mixture", kind=kind, alpha=0.4, **options)
    known = {}

    def train(server_round, client, x):
        v, alpha = known.get(client, (x, 0.4))
        batches = batches_of(server_round, client)
        w, *known[client] = oracle.apfl_client(x, v, alpha, batches, gradient, lr=LR, **theirs)
        return w

    model = oracle.averaged(start, COHORTS, train, fed.SIZES)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    assert kept.keys() == known.keys()
    for client, (v, alpha) in known.items():
        mine = kept[client]
        np.testing.assert_allclose(vector(mine, "PersonalMixture/v."), v, rtol=0, atol=1e-11)
        assert float(mine["PersonalMixture/alpha"]) == pytest.approx(alpha, abs=1e-11)


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_three_rounds_of_ditto_equal_the_oracle(strength, kind):
    start, found, kept = run(Ditto(), "personal_model", kind=kind, strength=strength)
    known = {}

    def train(server_round, client, x):
        w, known[client] = oracle.ditto_client(
            x, known.get(client, x), batches_of(server_round, client), gradient, lr=LR,
            strength=strength,
        )  # fmt: skip
        return w

    np.testing.assert_allclose(
        found, oracle.averaged(start, COHORTS, train, fed.SIZES), rtol=0, atol=1e-11
    )
    for client, v in known.items():
        np.testing.assert_allclose(vector(kept[client], "PersonalModel/"), v, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_three_rounds_of_pfedme_equal_the_oracle(kind):
    options = {"strength": 3.0, "inner_steps": 3, "inner_lr": 0.05}
    start, found, kept = run(PFedMe(), "moreau_envelope", kind=kind, **options)
    known = {}

    def train(server_round, client, x):
        w, known[client] = oracle.pfedme_client(
            x, batches_of(server_round, client), gradient, lr=LR, **options
        )
        return w

    np.testing.assert_allclose(
        found, oracle.averaged(start, COHORTS, train, fed.SIZES), rtol=0, atol=1e-11
    )
    for client, theta in known.items():
        mine = vector(kept[client], "MoreauEnvelope/")
        np.testing.assert_allclose(mine, theta, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("delta", [None, 1e-2])
def test_three_rounds_of_per_fedavg_equal_the_oracle(delta, kind):
    options = {} if delta is None else {"hessian": "difference", "difference": delta}
    start, found, kept = run(PerFedAvg(), "meta_gradient", kind=kind, adaptation_lr=0.1, **options)

    def train(server_round, client, x):
        batches = batches_of(server_round, client)
        return oracle.per_fedavg_client(x, batches, gradient, lr=LR, alpha=0.1, delta=delta)

    expected = oracle.averaged(start, COHORTS, train, fed.SIZES)
    # a difference of gradients has half their digits
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 if delta is None else 1e-9)
    assert not kept


ALONE = {
    "ditto": ({"name": "personal_model", "strength": 0.0}, "PersonalModel/"),
    "apfl": ({"name": "personal_mixture", "alpha": 1.0, "adaptive": False}, "PersonalMixture/v."),
}


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize(("part", "prefix"), ALONE.values(), ids=ALONE)
def test_an_own_model_that_nothing_ties_is_trained_alone_bit_for_bit(part, prefix, model, kind):
    """As the client would train that goes on from its own model in every round.

    Ditto's without its term, APFL's at alpha = 1; the shared one is averaging's.
    """
    executor = fed.make_executor(model, fed.make_procedure(parts=[part]), kind=kind)
    plain = fed.make_executor(model, fed.make_procedure(), kind=kind)
    start = fed.initial_payload(plain)
    state, alone = {}, torch.stack([start.params] * 2)
    for server_round in (1, 2):
        job = fed.job(
            executor, (3, 5), server_round=server_round, state=state, has_state=(bool(state),) * 2
        )
        result = executor.train(job)
        state = result.state
        shared = plain.train(fed.job(plain, (3, 5), server_round=server_round))
        assert torch.equal(result.params, shared.params)
        mine = fed.job(
            plain, (3, 5), server_round=server_round,
            shared=Payload(None, start.buffers), personal=Payload(alone),
        )  # fmt: skip
        alone = plain.train(mine).params
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        assert torch.equal(executor.layout.flatten(own), alone)


# --- APFL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "v", "alpha"), [("jacobi", 1.075, 0.65), ("gauss_seidel", 1.07, 0.612)]
)
def test_the_printed_step_of_a_scalar(order, v, alpha):
    """f = (theta - 2)^2 / 2 at w = 0, v = 1, alpha = 0.5 and step sizes of 0.1."""

    def slope(params, buffers, batch, objective=None, penalty=None):
        return torch.zeros(()), {"w": params["w"] - 2}, buffers

    part = PersonalMixture(alpha=0.5, order=order)
    shared = {"w": torch.zeros(1, dtype=torch.float64)}
    state = part.initial_state(shared) | {"v.w": torch.ones(1, dtype=torch.float64)}
    here = Here(shared, {}, Batch(*(torch.ones(1),) * 3, {}), slope, 0.1)
    own = part.stepped(part.begin(shared, {}, state), here, {"w": shared["w"] + 0.2})
    assert float(own["v"]["w"]) == pytest.approx(v, abs=1e-12)
    assert float(own["alpha"]["w"]) == pytest.approx(alpha, abs=1e-12)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_at_alpha_0_a_client_trains_and_measures_as_under_averaging_bit_for_bit(kind):
    data = fed.InMemoryData(test_sizes=fed.SIZES)
    parts = [{"name": "personal_mixture", "alpha": 0.0, "adaptive": False}]
    found = []
    for given in (parts, []):
        executor = fed.make_executor("mlp", fed.make_procedure(parts=given), data, kind=kind)
        result = executor.train(fed.job(executor, (3, 5)))
        job = fed.job(executor, (3, 5), action="evaluate", shared=Payload(result.params[0]),
                      state=result.state, has_state=(bool(given),) * 2)  # fmt: skip
        found.append((result, executor.evaluate(job).metrics))
    (mixed, measured), (plain, received) = found
    assert torch.equal(mixed.params, plain.params)
    for name, values in received.items():
        assert torch.equal(measured[f"own/{name}"], values)
        assert torch.equal(measured[name], values)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_at_alpha_0_the_private_model_never_moves_and_at_1_it_is_alone(kind):
    start, _, kept = run(APFL(), "personal_mixture", kind=kind, alpha=0.0, adaptive=False)
    for client in COHORTS[0]:
        assert np.array_equal(vector(kept[client], "PersonalMixture/v."), start)
    _, _, kept = run(APFL(), "personal_mixture", kind=kind, alpha=1.0, adaptive=False)
    for client in COHORTS[0]:  # from the first model on its own batches
        w = start
        for server_round, cohort in enumerate(COHORTS, start=1):
            for batch in batches_of(server_round, client) if client in cohort else ():
                w = w - LR * gradient(w, *batch)
        np.testing.assert_allclose(
            vector(kept[client], "PersonalMixture/v."), w, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("part", ["personal_mixture", "personal_model"])
def test_what_a_client_sends_does_not_depend_on_its_own_model(part, kind):
    procedure = fed.make_procedure(parts=[{"name": part}])
    executor = fed.make_executor("mlp", procedure, kind=kind)
    first = executor.train(fed.job(executor, (3, 5)))
    other = {n: t + 1 if t.dim() > 1 else t for n, t in first.state.items()}
    sent = [
        executor.train(fed.job(executor, (3, 5), state=state, has_state=(True, True))).params
        for state in (first.state, other)
    ]
    assert torch.equal(*sent)


def test_alpha_stays_where_the_models_are_alike_and_within_its_bounds():
    _, _, kept = run(APFL(), "personal_mixture", kind="batched", alpha=0.5, alpha_lr=50.0)
    alphas = [float(state["PersonalMixture/alpha"]) for state in kept.values()]
    assert all(0 <= alpha <= 1 for alpha in alphas)
    assert {0.0, 1.0} & set(alphas)
    cohort = ((3,),)  # one step: v = w when it is taken
    _, _, kept = run(
        APFL(), "personal_mixture", kind="loop", cohorts=cohort, alpha=0.3, alpha_every="round"
    )
    assert kept[3].keys() == {
        "PersonalMixture/alpha",
        "PersonalMixture/v.output.weight", "PersonalMixture/v.output.bias",
    }  # fmt: skip


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_every_layer_may_have_an_alpha_of_its_own(kind):
    parts = [{"name": "personal_mixture", "per_layer": True}]
    procedure = fed.make_procedure(local_steps=3, parts=parts)
    executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
    state = executor.train(fed.job(executor, (3, 5))).state
    alphas = {n: a for n, a in state.items() if n.startswith("PersonalMixture/alpha.")}
    assert len(alphas) == len(executor.layout.slices)
    assert len({float(a[0]) for a in alphas.values()}) > 1


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("part", ["personal_mixture", "personal_model", "moreau_envelope"])
def test_a_client_evaluates_its_own_model_beside_the_shared_one(part, kind):
    procedure = fed.make_procedure(parts=[{"name": part}])
    data = fed.InMemoryData(test_sizes=fed.SIZES)
    executor = fed.make_executor("mlp", procedure, data, kind=kind, dtype="float64")
    trained = executor.train(fed.job(executor, (4, 5)))
    job = fed.job(executor, (4, 5), action="evaluate", state=trained.state, has_state=(True, False))
    found = executor.evaluate(job).metrics
    assert found["personalised"].tolist() == [1.0, 0.0]
    # who has not trained measures the model received
    assert found["own/loss"][1] == found["loss"][1]
    start = fed.initial_payload(executor)
    shared = executor.layout.unflatten(start.params)
    mine, _ = procedure.own_model(shared, {n: t[0] for n, t in trained.state.items()})
    drawn = data.clients([4], split="test")
    flat_own = executor.layout.flatten(mine)
    alone = executor.evaluate_arrays(flat_own, {}, drawn.features, drawn.targets, drawn.rows[0])
    assert float(found["own/loss"][0]) == pytest.approx(alone["loss"], abs=1e-12)
    assert ("own/alpha" in found) == (part == "personal_mixture")


# --- linear regression with fewer samples than features -------------------------------------------


class Regressions:
    """20 clients with 15 samples of 20 features; their weights lie h apart from a common one."""

    num_clients = 20
    spec = SampleSpec((20,), 0, target_shape=(1,))

    def __init__(self, apart, seed=0):
        draw = np.random.default_rng(seed)
        common, own = draw.normal(size=20), draw.normal(size=(20, 20))
        self.weights = common + apart * own
        self.features = draw.normal(size=(20, 15, 20))
        noise = 0.5 * draw.normal(size=(20, 15))
        self.targets = np.einsum("cnd,cd->cn", self.features, self.weights) + noise

    def sizes(self, client_ids):
        return np.full(len(client_ids), 15)

    def clients(self, client_ids, *, split="train"):
        rows = [np.arange(15) + 15 * client for client in client_ids]
        return fed.ClientRows(self.features.reshape(-1, 20), self.targets.reshape(-1, 1), rows)

    def error(self, models):
        """The mean squared error on noiseless samples without end, averaged over the clients."""
        return float(((models - self.weights) ** 2).sum(axis=1).mean())


def mixtures(data, *, rounds=150, **arguments):
    """(every client's mixture, the shared model, the mean alpha) after rounds of 10 full steps."""
    task = make_task({"kind": "regression", "model": "logistic", "dtype": "float64"}, data.spec)
    task.build_model = lambda seed: zeroed(torch.nn.Sequential(torch.nn.Linear(20, 1, bias=False)))
    # the loss is (y - f)^2, twice the paper's
    part = {"name": "personal_mixture", **arguments}
    procedure = fed.local_sgd(local_lr=0.01, batch_size=15, local_steps=10, parts=[part])
    executor = CohortExecutor(task, procedure, data, seed=1, kind="batched")
    params, state, everybody = torch.zeros(20, dtype=torch.float64), {}, tuple(range(20))
    for server_round in range(1, rounds + 1):
        job = fed.job(
            executor, everybody, server_round=server_round, shared=Payload(params), state=state,
            has_state=(bool(state),) * 20,
        )  # fmt: skip
        result = executor.train(job)
        params, state = result.params.mean(0), result.state
    shared = executor.layout.unflatten(params)
    own = [procedure.own_model(shared, {n: t[c] for n, t in state.items()})[0] for c in everybody]
    models = torch.stack([executor.layout.flatten(each) for each in own]).numpy()
    return models, params.numpy(), float(state["PersonalMixture/alpha"].mean())


def zeroed(model):
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model.double()


def in_numpy(data, alpha, *, adaptive, rounds=150):
    shared, private = np.zeros(20), np.zeros((20, 20))
    alphas = np.full(20, alpha)
    for _ in range(rounds):
        found = []
        for client in range(20):
            features, targets = data.features[client], data.targets[client]

            def slope(w, x, y):
                return x.T @ (x @ w - y) / len(y)

            w, private[client], alphas[client] = oracle.apfl_client(
                shared, private[client], alphas[client], [(features, targets)] * 10, slope,
                lr=0.02, alpha_lr=0.02 if adaptive else None,
            )  # fmt: skip
            found.append(w)
        shared = np.mean(found, axis=0)
    return alphas[:, None] * private + (1 - alphas[:, None]) * shared, shared, alphas.mean()


@pytest.mark.parametrize("adaptive", [False, True], ids=["alpha = 0.25", "trained"])
def test_the_mixture_equals_the_oracle_over_many_rounds(adaptive):
    data = Regressions(0.6)
    alpha = 0.5 if adaptive else 0.25
    lr = {"alpha_lr": 0.01} if adaptive else {}  # of the loss that is twice as large
    found = mixtures(data, alpha=alpha, adaptive=adaptive, rounds=20, **lr)
    for mine, theirs in zip(
        found, in_numpy(data, alpha, adaptive=adaptive, rounds=20), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)


# section (f) of the specification: errors of the shared model, of the private one, of mixtures with
# alpha 0.25 and 0.5 and with a trained alpha, and where that ends on average
TABLE = {
    0.0: ("0.018", "4.15", "0.51", "1.37", "0.085", "0.04"),
    0.1: ("0.226", "4.20", "0.60", "1.43", "0.303", "0.05"),
    0.3: ("1.86", "4.66", "1.34", "1.95", "2.03", "0.18"),
    0.6: ("7.37", "6.22", "3.82", "3.73", "6.48", "0.45"),
    1.0: ("20.4", "9.93", "9.71", "7.97", "14.6", "0.61"),
}


class SpecifiedRegressions(Regressions):
    """The same, drawn client by client, with 200 noiseless test samples each."""

    def __init__(self, apart):
        draw = np.random.default_rng(0)
        self.weights = draw.normal(size=20) + apart * draw.normal(size=(20, 20))
        drawn = [[draw.normal(size=size) for size in ((15, 20), 15, (200, 20))] for _ in range(20)]
        self.features, noise, self.test_features = map(np.stack, zip(*drawn, strict=True))
        self.targets = np.einsum("cnd,cd->cn", self.features, self.weights) + 0.5 * noise

    def error(self, models):
        off = np.einsum("cnd,cd->cn", self.test_features, models - self.weights)
        return float((off**2).mean())


def row_of_the_table(apart, mixed):
    """The row; `mixed(data, alpha, adaptive)` gives (mixtures, shared model, mean alpha)."""
    data = SpecifiedRegressions(apart)
    fixed = {alpha: mixed(data, alpha, False) for alpha in (1.0, 0.25, 0.5)}
    trained = mixed(data, 0.5, True)
    errors = [data.error(models) for models, _, _ in (*fixed.values(), trained)]
    return [data.error(np.tile(fixed[0.25][1], (20, 1))), *errors, trained[2]]


def assert_printed(found, printed):
    """To the printed digits; one of the values, 7.9648, is printed as 7.97."""
    for value, text in zip(found, printed, strict=True):
        last = 10.0 ** -len(text.partition(".")[2])
        assert value == pytest.approx(float(text), abs=0.6 * last), (found, printed)


@pytest.mark.parametrize("apart", TABLE)
def test_the_oracle_gives_the_specifications_table(apart):
    def mixed(data, alpha, adaptive):
        """All clients at once: every step is linear in rows of their own."""
        grams = np.einsum("cnd,cne->cde", data.features, data.features) / 15
        aims = np.einsum("cnd,cn->cd", data.features, data.targets) / 15

        def slope(models, *_):
            return np.einsum("cde,ce->cd", grams, models) - aims

        shared, own, alphas = np.zeros(20), np.zeros((20, 20)), np.full(20, alpha)
        for _ in range(150):
            each = np.tile(shared, (20, 1))
            for _ in range(10):
                toward = slope(alphas[:, None] * own + (1 - alphas[:, None]) * each)
                gain = ((own - each) * toward).sum(axis=1)
                each = each - 0.02 * slope(each)
                own = own - 0.02 * alphas[:, None] * toward
                alphas = np.clip(alphas - 0.02 * gain, 0, 1) if adaptive else alphas
            shared = each.mean(axis=0)
        return alphas[:, None] * own + (1 - alphas[:, None]) * shared, shared, alphas.mean()

    assert_printed(row_of_the_table(apart, mixed), TABLE[apart])


@pytest.mark.slow
@pytest.mark.parametrize("apart", TABLE)
def test_the_engine_gives_the_specifications_table(apart):
    def mixed(data, alpha, adaptive):
        lr = {"alpha_lr": 0.01} if adaptive else {}  # of the loss that is twice as large
        return mixtures(data, alpha=alpha, adaptive=adaptive, **lr)

    assert_printed(row_of_the_table(apart, mixed), TABLE[apart])


@pytest.mark.slow
def test_a_mixture_is_better_than_either_model_where_clients_are_apart_and_few_samples_each():
    apart, alike = Regressions(0.6), Regressions(0.0)
    mixed, shared, _ = mixtures(apart, alpha=0.25, adaptive=False, rounds=80)
    alone, _, _ = mixtures(apart, alpha=1.0, adaptive=False, rounds=80)
    error = apart.error(mixed)
    assert error < 0.7 * min(apart.error(shared[None]), apart.error(alone))
    assert alike.error(mixtures(alike, alpha=0.25, adaptive=False, rounds=60)[1][None]) < 0.05


@pytest.mark.slow
def test_a_trained_alpha_grows_with_the_clients_distance():
    found = [
        mixtures(Regressions(apart), alpha=0.5, adaptive=True, alpha_lr=0.01, rounds=60)[2]
        for apart in (0.0, 0.3, 1.0)
    ]
    assert found[0] + 0.1 < found[1] < found[2] - 0.1
