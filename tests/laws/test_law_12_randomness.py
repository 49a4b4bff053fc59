"""Law 12: randomness is a function of (seed, round, client, purpose) and of nothing else."""

import random

import numpy as np
import pytest
import torch

from fedsim.basics.rng import derived_seed, generator
from fedsim.client.executor import CohortExecutor
from fedsim.client.procedure import ClientProcedure, Work
from fedsim.federation.participation.kinds import PARTICIPATION
from fedsim.scenario import discovery
from tests.laws import federations as fed

STEPS, BATCH, HIDDEN = 6, 8, 15  # the last as in `federations`


class Recorder(ClientProcedure):
    """Trains nothing and returns which samples and which dropout noise every step was given."""

    def __init__(self, *, epochs=None, steps=STEPS):
        self._work = Work(BATCH, epochs, None if epochs else steps)

    @property
    def work(self):
        return self._work

    def begin(self, params, buffers, extra, state):
        samples = torch.full((STEPS, BATCH), -1.0, dtype=torch.float64)
        noise = torch.full((STEPS, BATCH, HIDDEN), -1.0)
        return {
            "params": params, "buffers": buffers, "samples": samples, "noise": noise,
            "step": torch.tensor(0),
        }  # fmt: skip

    def step(self, carry, batch, gradient, *, server_round):
        here = torch.arange(STEPS) == carry["step"]
        missing = BATCH - batch.targets.shape[0]  # the loop's batches are as short as they are
        kept = torch.where(batch.weights > 0, batch.features[:, 0, 0, 0].double(), -1.0)
        samples = torch.nn.functional.pad(kept, (0, missing), value=-1.0)
        noise = next(iter(batch.noise.values()), torch.zeros(batch.targets.shape[0], HIDDEN))
        noise = torch.where((batch.weights > 0)[:, None], noise, -1.0)
        noise = torch.nn.functional.pad(noise, (0, 0, 0, missing), value=-1.0)
        after = {
            **carry,
            "samples": torch.where(here[:, None], samples, carry["samples"]),
            "noise": torch.where(here[:, None, None], noise, carry["noise"]),
            "step": carry["step"] + 1,
        }
        return after, batch.weights.sum()

    def finish(self, carry, state):
        return {"samples": carry["samples"], "noise": carry["noise"]}, state


class NumberedData(fed.InMemoryData):
    """The first feature of every sample is its row number."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._features["train"][:, 0, 0, 0] = np.arange(len(self._features["train"]))


DATA = NumberedData()


def executor(kind="vmap", seed=fed.SEED, **work):
    return CohortExecutor(
        fed.make_task("mlp_dropout"), Recorder(**work), DATA, seed=seed, kind=kind
    )


def draws(worker, clients, server_round=1, **changes):
    result = worker.train(fed.job(worker, clients, server_round=server_round, **changes))
    return {
        client: fed.named_bits({name: stack[row] for name, stack in result.extra.items()})
        for row, client in enumerate(clients)
    }


def test_draws_do_not_depend_on_the_order_of_calls():
    calls = [(1, (0, 1, 4)), (1, (5, 6)), (2, (0, 4)), (3, (2, 3, 7)), (2, (5, 6, 7))]
    worker, other = executor(), executor()
    first = {call: draws(worker, call[1], call[0]) for call in calls}
    random.Random(1).shuffle(calls)
    assert all(draws(other, call[1], call[0]) == first[call] for call in calls)


def test_draws_do_not_depend_on_who_shares_the_chunk_or_on_the_executor():
    expected = draws(executor(), (4, 5))[4]
    assert draws(executor(), (4,))[4] == expected
    assert draws(executor(), (0, 3, 4, 7))[4] == expected
    assert draws(executor(), (3, 4), absent=(3,))[4] == expected
    assert draws(executor("loop"), (3, 4))[4] == expected


@pytest.mark.parametrize("kind", ["vmap", "loop"])
def test_rounds_clients_and_seeds_have_draws_of_their_own(kind):
    same_rows = NumberedData((20, 20))
    same_rows._rows["train"][1] = same_rows._rows["train"][0]
    worker = CohortExecutor(fed.make_task("mlp_dropout"), Recorder(), same_rows, seed=1, kind=kind)
    other = CohortExecutor(fed.make_task("mlp_dropout"), Recorder(), same_rows, seed=2, kind=kind)
    found = [
        *draws(worker, (0, 1), 1).values(),
        *draws(worker, (0, 1), 2).values(),
        draws(other, (0, 1), 1)[0],
    ]
    for name in ("samples", "noise"):
        assert len({each[name] for each in found}) == len(found)


@pytest.mark.parametrize("kind", ["vmap", "loop"])
@pytest.mark.parametrize("client", [0, 3, 4, 5])  # 1, 7, 20 and 45 samples
def test_every_epoch_is_a_permutation_of_the_clients_samples(client, kind):
    worker = executor(kind, epochs=1)
    samples = worker.train(fed.job(worker, (client, 6))).extra["samples"][0]
    rows = DATA.clients([client]).rows[0]
    assert sorted(samples[samples >= 0].tolist()) == rows.tolist()
    full, tail = divmod(len(rows), BATCH)
    counts = [BATCH] * full + [tail] * bool(tail)
    assert (samples >= 0).sum(dim=1).tolist() == counts + [0] * (STEPS - len(counts))


def test_passes_are_shuffled_anew():
    worker = executor(epochs=2)
    samples = worker.train(fed.job(worker, (4, 5))).extra["samples"][
        0
    ]  # 20 samples: 3 steps a pass
    first, second = samples[:3], samples[3:]
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist())
    assert first.tolist() != second.tolist()


def test_dropout_noise_is_uniform_and_new_in_every_step():
    worker = executor(steps=STEPS)
    noise = worker.train(fed.job(worker, (6, 7))).extra["noise"]
    assert 0 <= float(noise.min()) < 0.05
    assert 0.95 < float(noise.max()) < 1
    assert abs(float(noise.mean()) - 0.5) < 0.03
    assert len(torch.unique(noise)) > 0.99 * noise.numel()


@pytest.mark.parametrize("name", [None, *discovery.names("parts")])
def test_training_draws_nothing_from_the_global_generators(name):
    parts = [] if name is None else [{"name": name}]
    worker = fed.make_executor("mlp_dropout", fed.make_procedure(parts=parts))
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global generator is what this test is about
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    worker.train(fed.job(worker, (3, 5)))
    fed.make_task("mlp_dropout").build_model(5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("rule", PARTICIPATION)
def test_participation_does_not_depend_on_the_order_of_rounds(rule, tmp_path):
    trace = tmp_path / "trace.csv"
    if rule == "trace":
        rows = ["round,client", *(f"{t},{c}" for t in range(1, 18) for c in range(t % 4, 9, 3))]
        trace.write_text("\n".join(rows))
    arguments = {
        "uniform": {"cohort_size": 4},
        "bernoulli": {"rate": 0.4},
        "sine": {"rate": 0.4, "shift": "random"},
        "staircase": {"rate": 0.4},
        "trace": {"path": str(trace)},
    }.get(rule, {})
    rounds = list(range(1, 21))

    def draw(order):
        takes_part = PARTICIPATION[rule](**arguments)
        return {r: takes_part.participants(r, num_clients=9, seed=5).tolist() for r in order}

    assert draw(rounds) == draw(random.Random(2).sample(rounds, len(rounds)))
    if arguments and rule != "trace":
        assert len({tuple(cohort) for cohort in draw(rounds).values()}) > 10


def test_every_part_of_a_key_makes_a_stream_of_its_own():
    keys = [
        (0, "a", 1, 2),
        (1, "a", 1, 2),
        (0, "b", 1, 2),
        (0, "a", 2, 1),
        (0, "a", 12),
        (0, "a", 1),
    ]
    streams = {tuple(generator(*key).integers(2**60, size=4).tolist()) for key in keys}
    seeds = {derived_seed(*key) for key in keys}
    assert len(streams) == len(seeds) == len(keys)


def test_streams_are_pinned():
    """These numbers decide results: when they change, every recorded result changes."""
    raw = generator(1, "batches", 3, 17).bit_generator.random_raw(2)
    assert raw.tolist() == [0x0A6EC5751CEEE8FC, 0xB35EC216C8B88DF4]
    assert derived_seed(1, "init") == 1_566_810_643_653_112_250
