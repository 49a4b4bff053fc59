"""APFL with mixed outputs and a held-out alpha against NumPy, on a network with a hidden layer."""

import numpy as np
import pytest
import torch

from clients.parts.personal_mixture import PersonalMixture
from fedsim.basics.rng import generator
from fedsim.client.batching.schedule import held_out, num_held_out
from fedsim.client.executor import CohortExecutor
from fedsim.client.robustness import RobustEvaluation
from fedsim.engine.inline import InlineGrid
from fedsim.messages.layout import Payload
from tests.laws import federations as fed
from tests.oracles import fedper_oracle as network
from tests.oracles import personal_oracle as oracle
from tests.oracles.test_fedper_oracle import COHORTS, NAMES
from tests.oracles.test_personal_oracle import Regressions, mixtures
from tests.tiers import by_turns

KINDS = ("batched", "vmap", "loop")
DATA = fed.InMemoryData(test_sizes=fed.SIZES)
LR, BATCH, EPOCHS, ALPHA = 0.2, 8, 2, 0.4
SHARE = 0.3  # of 7, 20 and 45 samples 2, 6 and 13; of 1, 2 and 3 none
NETWORK = (network.logits_of, network.cross_entropy, network.gradient_of)


def run(kind, *, model="mlp", cohorts=COHORTS, rounds=3, **options):
    """(the last shared model, every client's state by client) after some rounds."""
    part = {"name": "personal_mixture", "alpha": ALPHA, **options}
    procedure = fed.make_procedure(local_lr=LR, batch_size=BATCH, local_epochs=EPOCHS, parts=[part])
    app = fed.make_app(model, procedure, DATA, dtype="float64", kind=kind)
    grid = InlineGrid(app, 8)
    arrays, _ = fed.run_rounds(
        fed.make_strategy("fedavg"), grid, fed.initial_arrays(model, dtype="float64"), app.layout,
        rounds=rounds, cohorts=cohorts,
    )  # fmt: skip
    clients, state = grid.store.export()
    return arrays, {c: {n: t[place] for n, t in state.items()} for place, c in enumerate(clients)}


def drawn(rows, purpose, server_round, client, steps, *, drop):
    """Passes over rows in batches of 8, each permuted anew; `drop` leaves a short last one out."""
    random, found = generator(fed.SEED, purpose, server_round, client), []
    samples = DATA.clients([client])
    while len(rows) and len(found) < steps:
        order = random.permutation(rows)
        whole = len(order) - len(order) % BATCH if drop and len(order) >= BATCH else len(order)
        for start in range(0, whole, BATCH):
            picked = order[start : min(start + BATCH, whole)]
            features = samples.features[picked].reshape(len(picked), -1).astype(float)
            found.append((features, samples.targets[picked]))
    return found[:steps]


def parted(client, share):
    """(rows trained on, rows held out) as documented."""
    rows = DATA.clients([client]).rows[0]
    count = int(share * len(rows) + 1e-9)
    if count < 2:
        return rows, rows[:0]
    order = generator(fed.SEED, "held out", client).permutation(len(rows))
    return rows[np.sort(order[count:])], rows[np.sort(order[:count])]


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("share", [0.0, SHARE], ids=["the step's samples", "held out"])
def test_three_rounds_of_mixed_outputs_equal_the_oracle(share, kind):
    arrays, kept = run(kind, mix="outputs", alpha_held_out=share)
    state = fed.make_task("mlp", dtype="float64").build_model(fed.SEED).state_dict()
    x = {name: state[known].numpy() for name, known in NAMES.items()}
    known = {}
    for server_round, cohort in enumerate(COHORTS, start=1):
        models, counts = [], []
        for client in cohort:
            rows, apart = parted(client, share)
            steps = EPOCHS * -(-len(rows) // BATCH)
            batches = drawn(rows, "batches", server_round, client, steps, drop=False)
            beside = None
            if share:
                beside = drawn(apart, "held out batches", server_round, client, steps, drop=True)
            v, alpha = known.get(client, (x, ALPHA))
            stays = share and not len(apart)
            w, v, moved = oracle.apfl_outputs_client(
                x, v, alpha, batches, beside or None, NETWORK, lr=LR, alpha_lr=0 if stays else LR
            )
            known[client] = (v, moved)
            models.append(w)
            counts.append(len(rows))
        x = {n: np.average([w[n] for w in models], axis=0, weights=counts) for n in x}
    for name, full in NAMES.items():
        np.testing.assert_allclose(arrays[full].numpy(), x[name], rtol=0, atol=1e-11)
    for client, (v, alpha) in known.items():
        assert float(kept[client]["PersonalMixture/alpha"]) == pytest.approx(alpha, abs=1e-11)
        for name, full in NAMES.items():
            mine = kept[client][f"PersonalMixture/v.{full}"].numpy()
            np.testing.assert_allclose(mine, v[name], rtol=0, atol=1e-11)


def test_of_linear_models_outputs_mix_as_parameters_do():
    """With a hidden layer they do not."""
    options = {"rounds": 2, "alpha_held_out": SHARE}
    for model, alike in (("logistic", True), ("mlp", False)):
        (_, one), (_, other) = (run("batched", model=model, mix=mix, **options) for mix in
                                ("params", "outputs"))  # fmt: skip
        apart = max(
            float((one[client][name] - other[client][name]).abs().max())
            for client in one
            for name in one[client]
        )
        assert (apart < 1e-11) if alike else (apart > 1e-3)


@pytest.mark.parametrize("kind", ["batched", "loop"])
def test_a_client_measures_its_mixture_of_outputs(kind):
    parts = [{"name": "personal_mixture", "alpha": ALPHA, "mix": "outputs"}]
    procedure = fed.make_procedure(local_lr=LR, parts=parts)
    executor = fed.make_executor("mlp", procedure, DATA, kind=kind, dtype="float64")
    state = executor.train(fed.job(executor, (4, 5))).state
    job = fed.job(executor, (4, 5), action="evaluate", state=state, has_state=(True, False))
    measured = executor.evaluate(job).metrics
    start = executor.layout.unflatten(fed.initial_payload(executor).params)
    w = {name: start[known].numpy() for name, known in NAMES.items()}
    v = {name: state[f"PersonalMixture/v.{known}"][0].numpy() for name, known in NAMES.items()}
    alpha = float(state["PersonalMixture/alpha"][0])
    drawn = DATA.clients([4], split="test")
    features = drawn.features[drawn.rows[0]].reshape(len(drawn.rows[0]), -1).astype(float)
    mixed = alpha * network.logits_of(v, features) + (1 - alpha) * network.logits_of(w, features)
    loss, _ = network.cross_entropy(mixed, drawn.targets[drawn.rows[0]])
    assert float(measured["own/loss"][0]) == pytest.approx(loss, abs=1e-12)
    assert measured["own/loss"][1] == pytest.approx(float(measured["loss"][1]), abs=1e-12)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_mixed_outputs_of_statistics_and_moved_samples_are_measured(kind):
    """Buffers that clients keep, and samples that PGD moves, reach both models of the mixture."""
    model = "cnn_batchnorm" if kind == "loop" else "mlp_dropout"
    part = {"name": "personal_mixture", "alpha": 0.0, "adaptive": False, "mix": "outputs"}
    executor = CohortExecutor(
        fed.make_task(model, dtype="float64"), fed.make_procedure(parts=[part]), DATA, seed=3,
        kind=kind, buffers="local" if kind == "loop" else "average",
        adversary=RobustEvaluation(radii=(0.1,), steps=2),
    )  # fmt: skip
    state = executor.train(fed.job(executor, (4, 5))).state
    job = fed.job(executor, (4, 5), action="evaluate", state=state, has_state=(True, True))
    found = executor.evaluate(job).metrics
    for name in ("loss", "accuracy", "loss@0.1", "accuracy@0.1"):
        torch.testing.assert_close(found[f"own/{name}"], found[name], rtol=0, atol=1e-12)


# --- held-out samples -----------------------------------------------------------------------------


def test_how_many_are_held_out_and_that_they_stay_the_same():
    assert [num_held_out(n, 0.29) for n in (1, 6, 7, 100)] == [0, 0, 2, 29]
    rows = np.arange(100, 140)
    trained, held = held_out(rows, 0.25, seed=5, client=3)
    assert len(held) == 10
    assert sorted([*trained, *held]) == rows.tolist()
    again = held_out(rows, 0.25, seed=5, client=3)[1]
    assert np.array_equal(held, again)
    assert not np.array_equal(held, held_out(rows, 0.25, seed=5, client=4)[1])
    assert len(held_out(rows, 0.0, seed=5, client=3)[1]) == 0


@pytest.mark.parametrize("kind", ["batched", "loop"])
def test_held_out_samples_move_alpha_and_nothing_else(kind):
    """Were they other samples, the models would be the same bits."""

    class Otherwise(fed.InMemoryData):
        """What client 5 holds out has other labels."""

        def __reduce__(self):
            return object.__reduce__(self)

        def clients(self, client_ids, *, split="train"):
            found = super().clients(client_ids, split=split)
            targets = found.targets.copy()
            if split == "train":
                _, apart = parted(5, SHARE)
                targets[apart] = (targets[apart] + 1) % fed.CLASSES
            return found._replace(targets=targets)

    parts = [{"name": "personal_mixture", "alpha": ALPHA, "alpha_held_out": SHARE,
              "alpha_every": "round"}]  # fmt: skip
    results = []
    for data in (fed.InMemoryData(), Otherwise()):
        procedure = fed.make_procedure(local_lr=LR, batch_size=BATCH, local_epochs=2, parts=parts)
        executor = fed.make_executor("mlp", procedure, data, kind=kind)
        first = executor.train(fed.job(executor, (5, 4)))
        results.append(executor.train(fed.job(executor, (5, 4), state=first.state,
                                              has_state=(True, True), server_round=2)))  # fmt: skip
    one, other = results
    assert torch.equal(one.params, other.params)
    assert one.num_examples.tolist() == [45 - 13, 20 - 6]
    assert one.state["PersonalMixture/alpha"][0] != other.state["PersonalMixture/alpha"][0]
    assert one.state["PersonalMixture/alpha"][1] == other.state["PersonalMixture/alpha"][1]


def test_a_fixed_alpha_holds_nothing_out():
    assert PersonalMixture(adaptive=False, alpha_held_out=0.5).holds_out == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha_held_out": 1.0}, r"alpha_held_out = 1.0: must be in \[0, 1\)"),
        ({"mix": "output"}, "mix = .*'?output"),
        ({"mix": "outputs", "per_layer": True}, "outputs have one alpha"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PersonalMixture(**arguments)


@pytest.mark.slow
def test_alpha_trusts_v_less_on_samples_that_v_has_not_seen():
    """v fits its 15 samples of 20 features, so that on these alpha seems to pay.

    The mixture need not be better for it: what is held out is missing in training.
    """
    data = Regressions(0.6, seed=1)
    options = {"alpha": 0.5, "adaptive": True, "alpha_lr": 0.01, "rounds": 40}
    on_batches, apart = (mixtures(data, alpha_held_out=share, **options)[2] for share in (0, 0.34))
    assert apart < on_batches - 0.15


def test_payloads_name_no_mixture():
    """What is laid out for an evaluation is in no message and in no state."""
    parts = [{"name": "personal_mixture", "mix": "outputs"}]
    executor = fed.make_executor("mlp", fed.make_procedure(parts=parts))
    result = executor.train(fed.job(executor, (3, 4), shared=Payload(
        fed.initial_payload(executor).params)))  # fmt: skip
    assert not [n for n in (*result.state, *result.extra) if "mixture." in n]
