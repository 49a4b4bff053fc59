"""Law 3: a chunk trained as one batch equals its clients trained one at a time."""

import functools
import json

import pytest

from fedsim.client.overriding import stacks
from fedsim.scenario import discovery
from tests.laws import federations as fed
from tests.laws.federations import MODELS, VECTORISED, InMemoryData, initial_arrays, make_procedure

KINDS = ("loop", "batched", "vmap")
COSINE = {"kind": "cosine", "over": "steps", "length": 9, "warmup": 2, "floor": 0.1}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.01},
    "adam": {"optimizer": "adam", "local_lr": 0.01},
    "adam decayed": {"optimizer": "adam", "local_lr": 0.01, "weight_decay": 0.1},
    "adam moments": {"optimizer": "adam", "betas": (0.5, 0.9), "epsilon": 1e-3},
    "clipped": {"clip_norm": 0.5},
    "proximal": {"proximal": 0.3},
    "decaying steps": {"lr_decay": 0.5},
    "cosine over rounds": {"schedule": {"kind": "cosine", "length": 4, "warmup": 1}},
    "cosine over steps": {"local_epochs": 4, "schedule": COSINE},
    "cosine over steps with momentum": {"local_epochs": 3, "momentum": 0.9, "schedule": COSINE},
    "cosine over steps of adamw": {"optimizer": "adamw", "weight_decay": 0.1, "schedule": COSINE},
    "few steps": {"local_steps": 2},
    "many steps": {"local_steps": 9, "batch_size": 7},
    "two epochs": {"local_epochs": 2},
    "single samples": {"batch_size": 1, "local_steps": 5},
    "whole clients": {"batch_size": 256},
    "kept momentum": {"momentum": 0.9, "keep_optimizer": True},
    "kept moments": {"optimizer": "adam", "local_lr": 0.01, "keep_optimizer": True},
    "everything": {
        "momentum": 0.5,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "proximal": 0.1,
        "lr_decay": 0.9,
        "keep_optimizer": True,
    },
}
# unequal cohorts, so that memories are of unequal age; the last client has no sample
SIZES = (*fed.SIZES, 0)
COHORTS = (tuple(range(9)), (0, 3, 4, 6, 7), (1, 2, 3, 5, 8))


def outcome(kind, model, procedure, *, rounds, dtype, strategy="fedavg"):
    grid = fed.make_grid(
        model, procedure, InMemoryData(SIZES), kind=kind, dtype=dtype, chunk_size=4
    )
    arrays, records = fed.run_rounds(
        fed.make_strategy(strategy),
        grid,
        initial_arrays(model, dtype=dtype),
        grid.client_app.layout,
        rounds=rounds,
        cohorts=COHORTS,
    )
    return arrays, records, grid.store.export()


def assert_alike(one, other, tolerance):
    assert fed.largest_difference(one[0], other[0]) <= tolerance
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == pytest.approx(theirs[key], abs=tolerance) for key in mine)
    (clients, memories), (others, other_memories) = one[2], other[2]
    assert clients == others
    assert memories.keys() == other_memories.keys()
    for name, memory in memories.items():
        assert float((memory - other_memories[name]).abs().max()) <= tolerance


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_vectorised_exactly_over_three_rounds_in_float64(options):
    procedure = make_procedure("local_sgd", **options)
    one_by_one, *others = [
        outcome(kind, "mlp", procedure, rounds=3, dtype="float64") for kind in KINDS
    ]
    for other in others:
        assert_alike(one_by_one, other, 1e-9)


# who sends clients more than the model, and one who does not
SENDING = [name for name in fed.strategies() if discovery.strategy_factory(name).sends]
# every strategy with every procedure (one that needs parts with one of them), and every part with
# a strategy that sends what it needs
CASES = [
    (f"{strategy}-{kind}-{one}", strategy, kind, name, arguments)
    for one, name, arguments in fed.procedures()
    for strategy, kind in [
        *((strategy, "batched") for strategy in fed.strategies()),
        *((strategy, "vmap") for strategy in ("fedavg", *SENDING)),
    ]
    if one.endswith("-sgd") or not fed.parts_for(strategy)
] + [
    (f"{one}-{kind}", fed.strategy_beside(arguments), kind, name, arguments)
    for one, name, arguments in fed.part_procedures()
    for kind in KINDS
    if kind != "loop"
]


# a strategy that sends nothing more on one of the small models in turn, the others among slow tests
SMALL = [model for model in VECTORISED if model != "cnn"]


def _turns(model, strategy):
    place = fed.strategies().index(strategy) % len(SMALL)
    if strategy == "fedavg" or (strategy in SENDING and model == "mlp") or model == SMALL[place]:
        return []
    return [pytest.mark.slow]


@functools.cache
def one_by_one(model, strategy, name, arguments):
    """The outcome of clients that train one at a time; once for all that is held against it."""
    procedure = make_procedure(name, **json.loads(arguments))
    return outcome("loop", model, procedure, rounds=3, dtype="float64", strategy=strategy)


@pytest.mark.parametrize(
    ("model", "strategy", "kind", "name", "arguments"),
    [
        pytest.param(model, *case[1:], id=f"{model}-{case[0]}", marks=_turns(model, case[1]))
        for model in VECTORISED
        for case in CASES
    ],
)
def test_every_model_is_trained_together_exactly_over_three_rounds_in_float64(
    model, strategy, kind, name, arguments
):
    listed = arguments.get("parts") or fed.parts_for(strategy)
    arguments = arguments | ({"parts": listed} if listed else {})
    procedure = make_procedure(name, **arguments)
    if kind == "batched" and not (stacks(procedure) or model.startswith("cnn")):
        # a dense chain steps all clients at once; who cannot be stepped so is refused
        with pytest.raises(ValueError, match="the procedure steps one client at a time"):
            outcome(kind, model, procedure, rounds=1, dtype="float64", strategy=strategy)
        return
    together = outcome(kind, model, procedure, rounds=3, dtype="float64", strategy=strategy)
    assert_alike(one_by_one(model, strategy, name, json.dumps(arguments)), together, 1e-9)


@pytest.mark.parametrize("model", VECTORISED)
def test_one_round_in_float32_agrees_to_five_digits(model):
    one_by_one, *others = [
        outcome(kind, model, make_procedure(), rounds=1, dtype="float32") for kind in KINDS
    ]
    for other in others:
        assert_alike(one_by_one, other, 1e-5)


@pytest.mark.parametrize("model", VECTORISED)
def test_evaluation_agrees(model):
    data = InMemoryData(test_sizes=(1, 2, 3, 7, 20, 101, 110, 250))
    vectorised, looped = (
        fed.make_executor(model, data=data, kind=kind, dtype="float64") for kind in ("vmap", "loop")
    )
    one = vectorised.evaluate(fed.job(vectorised, range(8), action="evaluate"))
    other = looped.evaluate(fed.job(looped, range(8), action="evaluate"))
    assert (
        one.num_examples.tolist() == other.num_examples.tolist() == [1, 2, 3, 7, 20, 101, 110, 250]
    )
    for name, column in one.metrics.items():
        assert column.tolist() == pytest.approx(other.metrics[name].tolist(), abs=1e-12)


def test_only_batch_normalisation_falls_back_to_the_loop():
    assert [model for model in MODELS if fed.natural_kind(model) == "loop"] == [
        "cnn_batchnorm", "personal_norms",
    ]  # fmt: skip
