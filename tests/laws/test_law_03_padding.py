"""Law 3, padding: what a client learns does not depend on how long its neighbours train.

Clients of 0, 1, batch-1, batch and batch+1 samples stand beside one of 50 batches, so that nearly
all of their steps are padding. A client's bits depend on the number of slots in its chunk (torch
picks kernels by shape), so "itself alone" is shown twice: in a chunk of as many slots whose other
members are neutral, where it takes its own few steps and no more; and, for pairs, really alone,
which the executor doubles to two slots.
"""

import numpy as np
import pytest
import torch

from fedsim.basics.rng import generator
from fedsim.client.executor import CohortExecutor
from fedsim.client.procedure import GUIDANCE
from fedsim.messages.layout import Payload
from fedsim.tasks.named import make_task
from tests.laws import federations as fed
from tests.laws.federations import SEED, InMemoryData, initial_payload, job, result_bits
from tests.oracles import sgd_oracle as oracle

BATCH = 4
SIZES = (0, 1, BATCH - 1, BATCH, BATCH + 1, 50 * BATCH)
SMALL, BIG = tuple(range(5)), 5
PROCEDURES = {
    "sgd": {},
    "momentum and weight decay": {"momentum": 0.9, "weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
    "clipping": {"clip_norm": 0.3},
    "proximal": {"proximal": 0.5},
    "everything": {"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.3, "proximal": 0.5},
    "kept moments": {"optimizer": "adam", "weight_decay": 0.1, "keep_optimizer": True},
}


def executor_of(options, model="mlp", *, dtype="float32", **arguments):
    procedure = fed.local_sgd(local_lr=0.1, batch_size=BATCH, local_epochs=1, **options)
    return fed.make_executor(model, procedure, InMemoryData(SIZES), dtype=dtype, **arguments)


@pytest.mark.parametrize("kind", ["batched", "vmap"])
@pytest.mark.parametrize("options", PROCEDURES.values(), ids=PROCEDURES)
def test_beside_fifty_batches_every_size_has_the_bits_of_itself_among_neutral_slots(options, kind):
    executor = executor_of(options, kind=kind)
    everybody = range(len(SIZES))
    together = executor.train(job(executor, everybody))
    for client in SMALL:
        others = tuple(other for other in everybody if other != client)
        alone = executor.train(job(executor, everybody, absent=others))
        assert result_bits(together, client) == result_bits(alone, client)


@pytest.mark.parametrize("kind", ["batched", "vmap"])
@pytest.mark.parametrize("name", ["sgd", "everything", "kept moments"])
def test_in_a_pair_with_fifty_batches_every_size_has_the_bits_of_itself_alone(name, kind):
    executor = executor_of(PROCEDURES[name], kind=kind)
    for client in SMALL:
        together = executor.train(job(executor, (client, BIG)))
        alone = executor.train(job(executor, (client,)))
        assert result_bits(together, 0) == result_bits(alone, 0)


@pytest.mark.parametrize("kind", ["batched", "vmap"])
@pytest.mark.parametrize("model", ["logistic", "cnn", "mlp_dropout"])
def test_padding_changes_no_bit_of_any_model(model, kind):
    executor = executor_of(PROCEDURES["everything"], model, kind=kind)
    for client in (1, BATCH):
        together = executor.train(job(executor, (client, BIG)))
        alone = executor.train(job(executor, (client,)))
        assert result_bits(together, 0) == result_bits(alone, 0)


def test_padding_changes_no_bit_of_a_memory_in_later_rounds():
    executor = executor_of(PROCEDURES["kept moments"])
    state, has_state = {}, (False, False)
    own, known = {}, (False,)
    for server_round in (1, 2):
        together = executor.train(
            job(executor, (4, BIG), server_round=server_round, state=state, has_state=has_state)
        )
        alone = executor.train(
            job(executor, (4,), server_round=server_round, state=own, has_state=known)
        )
        assert result_bits(together, 0) == result_bits(alone, 0)
        state, has_state = together.state, (True, True)
        own, known = alone.state, (True,)


def test_the_long_client_is_padding_free_and_trains_all_its_batches():
    """The small ones would pass if nobody trained."""
    executor = executor_of({})
    together = executor.train(job(executor, range(len(SIZES))))
    start = initial_payload(executor).params
    moved = (together.params - start).norm(dim=1)
    assert moved[0] == 0
    assert (moved[1:] > 0).all()
    assert moved[BIG] > 3 * moved[1:BIG].max()


def batches(data, client):
    """The documented order of a first epoch, cut into batches."""
    found = data.clients([client])
    order = generator(SEED, "batches", 1, client).permutation(found.rows[0])
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        yield found.features[rows].reshape(len(rows), -1).astype(np.float64), found.targets[rows]


@pytest.mark.parametrize("kind", ["batched", "vmap", "loop"])
@pytest.mark.parametrize("options", PROCEDURES.values(), ids=PROCEDURES)
def test_every_size_beside_fifty_batches_equals_the_numpy_oracle(options, kind):
    executor = executor_of(options, "logistic", dtype="float64", kind=kind)
    layout, start = executor.layout, initial_payload(executor).params
    named = {n: t.numpy().copy() for n, t in layout.unflatten(start).items()}
    received = {"W": named["output.weight"], "b": named["output.bias"]}
    renamed = {"clip_norm": "clip"}
    arguments = {renamed.get(k, k): v for k, v in options.items() if k != "keep_optimizer"}
    adam = arguments.pop("optimizer", "sgd") == "adam"
    result = executor.train(job(executor, range(len(SIZES))))
    for client in range(len(SIZES)):
        trained, _, loss = oracle.client_update(
            received, batches(executor.data, client), oracle.no_memory(), lr=0.1, adam=adam,
            **arguments,
        )  # fmt: skip
        expected = {
            "output.weight": torch.from_numpy(trained["W"]),
            "output.bias": torch.from_numpy(trained["b"]),
        }
        torch.testing.assert_close(
            result.params[client], layout.flatten(expected), rtol=0, atol=1e-11
        )
        assert float(result.metrics["loss"][client]) == pytest.approx(loss, abs=1e-12)


WIDE = (200, 10, 35, 60, 85, 100, 120, 150, 180, 20)
UNEQUAL = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1},
    "momentum, kept": {"momentum": 0.9, "keep_optimizer": True},
    "momentum, guided gradients": {"momentum": 0.9, "guidance": "gradient"},
    "clipped": {"clip_norm": 0.5},
    "momentum, clipped": {"momentum": 0.9, "clip_norm": 0.5},
    "adam, clipped": {"optimizer": "adam", "clip_norm": 0.5},
}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        *((options, "batched") for options in UNEQUAL.values()),
        *((UNEQUAL[name], "vmap") for name in ("plain", "momentum, clipped", "adam, clipped")),
    ],
    ids=[*UNEQUAL, "plain-vmap", "momentum, clipped-vmap", "adam, clipped-vmap"],
)
def test_ten_unequal_clients_of_a_wide_model_have_the_bits_of_each_among_neutral_slots(
    options, kind
):
    """Kernels that reduce over many rows take other orders than over few."""
    procedure = fed.local_sgd(local_lr=0.1, batch_size=20, **options)
    executor = CohortExecutor(
        make_task({"model": "mlp"}, fed.SPEC), procedure, InMemoryData(WIDE), seed=SEED, kind=kind
    )
    start = initial_payload(executor)
    sent = {}
    if "guidance" in options:
        sent = executor.layout.unflatten(start.params.sigmoid())
    shared = Payload(start.params, extra={f"{GUIDANCE}.{n}": t for n, t in sent.items()})
    everybody = range(len(WIDE))
    together = executor.train(job(executor, everybody, shared=shared))
    for client in everybody:
        others = tuple(other for other in everybody if other != client)
        alone = executor.train(job(executor, everybody, absent=others, shared=shared))
        assert result_bits(together, client) == result_bits(alone, client)
