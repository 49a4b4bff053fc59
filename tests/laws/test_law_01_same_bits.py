"""Law 1: same scenario, same plan, same bits: whoever computes what, beside whom, and where."""

import functools

import numpy as np
import pytest
import torch

from fedsim.client.plan import ExecutionPlan
from fedsim.engine.client_app import CohortApp
from fedsim.engine.inline import InlineGrid
from tests.laws import federations as fed
from tests.laws.federations import (
    MODELS,
    InMemoryData,
    job,
    make_executor,
    make_procedure,
    record_bits,
    result_bits,
)
from tests.laws.many import OneFederation, only

PLAIN = [(model, *procedure[1:]) for model in MODELS for procedure in fed.procedures()]
CASES = [*PLAIN, *(case[1:] for case in fed.part_cases())]
IDS = [f"{model}-{procedure[0]}" for model in MODELS for procedure in fed.procedures()]
IDS += [case[0] for case in fed.part_cases()]
CLIENTS = len(fed.SIZES)


# --- the executor: neighbours, places, neutral slots ----------------------------------------------


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_a_clients_bits_do_not_depend_on_its_neighbours_or_its_place(model, name, arguments):
    executor = make_executor(model, make_procedure(name, **arguments), InMemoryData(broken=(7,)))
    expected = result_bits(executor.train(job(executor, (0, 1, 4))), 2)
    for place, members in ((1, (3, 4, 6)), (0, (4, 5, 6)), (1, (2, 4, 7))):
        result = executor.train(job(executor, members))
        assert result_bits(result, place) == expected, members


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_an_absent_neighbour_changes_nobodys_bits(model, name, arguments):
    executor = make_executor(model, make_procedure(name, **arguments))
    whole = executor.train(job(executor, (2, 4, 6)))
    for gone, place in ((6, 2), (2, 0)):
        result = executor.train(job(executor, (2, 4, 6), absent=(gone,)))
        for other in {0, 1, 2} - {place}:
            assert result_bits(result, other) == result_bits(whole, other)


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_an_absent_client_hands_back_what_was_sent(model, name, arguments):
    executor = make_executor(model, make_procedure(name, **arguments))
    chunk = job(executor, (4, 5), absent=(5,))
    result = executor.train(chunk)
    assert result.params is not None
    assert torch.equal(result.params[1], chunk.shared.params)
    assert all(torch.equal(t[1], chunk.shared.buffers[n]) for n, t in result.buffers.items())
    assert result.num_examples.tolist() == [20, 0]


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_a_lone_client_has_the_bits_of_a_chunk_of_two(model, name, arguments):
    executor = make_executor(model, make_procedure(name, **arguments))
    alone = executor.train(job(executor, (5,)))
    beside = executor.train(job(executor, (3, 5)))
    assert len(alone.num_examples) == 1
    assert result_bits(alone, 0) == result_bits(beside, 1)


@pytest.mark.parametrize("model", MODELS)
def test_an_evaluated_clients_bits_do_not_depend_on_its_neighbours(model):
    data = InMemoryData(test_sizes=(5, 130, 7, 100, 101, 1, 250, 3))
    executor = make_executor(model, data=data)
    expected = result_bits(executor.evaluate(job(executor, (0, 1, 4), action="evaluate")), 2)
    for place, members in ((0, (4, 5, 6)), (1, (3, 4, 7))):
        evaluated = executor.evaluate(job(executor, members, action="evaluate"))
        assert result_bits(evaluated, place) == expected
    gone = executor.evaluate(job(executor, (0, 4, 6), action="evaluate", absent=(0, 6)))
    assert result_bits(gone, 1) == expected


def test_training_twice_gives_the_same_bits():
    executor = make_executor("mlp_dropout")
    first = executor.train(job(executor, (1, 4, 6)))
    executor.train(job(executor, (0, 2, 3), server_round=5))
    again = executor.train(job(executor, (1, 4, 6)))
    assert all(result_bits(first, row) == result_bits(again, row) for row in range(3))


# --- engines --------------------------------------------------------------------------------------


@functools.cache
def _everybody():
    return InMemoryData(fed.SIZES * len(CASES), test_sizes=(5, 1, 30, 7, 2, 110, 9, 3) * len(CASES))


class ManyFederations(CohortApp):
    """One federation per case behind one ClientApp, so that one set of workers serves all cases.

    Case i holds the clients 8i...8i+7; a chunk belongs to the case of its first member.
    """

    def __init__(self):
        super().__init__(
            lambda: make_executor(data=_everybody()), ExecutionPlan("vmap", "a test", 3)
        )
        self._cases = {}

    def __reduce__(self):
        return ManyFederations, ()

    def case(self, number):
        if number not in self._cases:
            model, name, arguments = CASES[number]
            procedure = make_procedure(name, **arguments)
            self._cases[number] = make_executor(model, procedure, _everybody())
        return self._cases[number]

    def run_chunk(self, job, out=None):
        executor = self.case(job.client_ids[0] // CLIENTS)
        return executor.evaluate(job) if job.action == "evaluate" else executor.train(job, out)


@pytest.fixture(scope="module")
def inline():
    return InlineGrid(ManyFederations(), CLIENTS * len(CASES))


@pytest.fixture(scope="module")
def two_workers(lender):
    with lender.grid(ManyFederations(), CLIENTS * len(CASES), workers=2) as grid:
        assert len(grid.worker_pids) == 2  # both have started
        yield grid


def run_case(grid, number, strategy):
    """Two rounds of a case: 8 clients in three chunks, then 7 of them."""
    model = CASES[number][0]
    grid.chunk_log.clear()
    grid.store.restore([], {})
    arrays, records = fed.run_rounds(
        fed.make_strategy(strategy),
        OneFederation(grid, CLIENTS * number, CLIENTS),
        fed.initial_arrays(model),
        make_executor(model).layout,
        cohorts=(tuple(range(CLIENTS)), (0, 1, 2, 3, 5, 6, 7)),
        local_clients=np.arange(CLIENTS),
    )
    clients, memories = grid.store.export()
    return record_bits(arrays), records, clients, fed.named_bits(memories)


# the first strategy over every case, each other over half of them (an eighth in the default tests);
# a part beside the strategy that needs it
PAIRS = [
    pytest.param(
        number, strategy, id=f"{IDS[number]}-{strategy}",
        marks=[pytest.mark.slow] if place and (number + place) % 8 > 1 else [],
    )
    for place, strategy in enumerate(name for name in fed.strategies() if not fed.parts_for(name))
    for number in range(len(PLAIN))
    if not place or (number // 2 + number + place) % 2
] + [
    pytest.param(number, strategy, id=f"{IDS[number]}-{strategy}")
    for number in range(len(PLAIN), len(CASES))
    for strategy in [fed.strategy_beside(CASES[number][2])]
]  # fmt: skip


@pytest.mark.parametrize(("number", "strategy"), PAIRS)
def test_ray_workers_give_the_bits_of_the_inline_engine(inline, two_workers, number, strategy):
    expected = run_case(inline, number, strategy)
    chunks = len(inline.chunk_log)
    # three chunks to train and three to evaluate in each of two rounds, three of a set-up exchange
    assert chunks == 12 + 3 * (expected[1][0].get("clients/selected") == CLIENTS)
    assert bool(expected[2]) == fed.remembers(CASES[number][0], CASES[number][2])
    for workers in ((0,), (0, 1))[number >= len(PLAIN) :]:  # of parts, both workers alone
        with only(two_workers, *workers) as grid:
            assert run_case(grid, number, strategy) == expected
        assert [entry["outcome"] for entry in grid.chunk_log] == ["done"] * chunks
        assert {entry["worker"] for entry in grid.chunk_log} == set(workers)


def test_it_does_not_matter_which_worker_trained_which_chunk(inline, two_workers):
    strategy = next(name for name in fed.strategies() if not fed.parts_for(name))
    expected = run_case(inline, 0, strategy)
    firsts = []
    for order in ((0, 1), (1, 0)):
        with only(two_workers, *order) as grid:
            assert run_case(grid, 0, strategy) == expected
        firsts.append(next(e["worker"] for e in grid.chunk_log if e["chunk"] == 0))
    assert firsts == [0, 1]
