"""Law 8: inputs are not mutated; state goes through a checkpoint and comes back bit for bit."""

import numpy as np
import pytest
import torch

from fedsim.engine.client_states import ClientStore
from fedsim.engine.inline import InlineGrid
from fedsim.messages.layout import Payload
from fedsim.messages.replies import Replies
from fedsim.runs import checkpoint
from fedsim.runs.checkpoint import Checkpoint
from fedsim.strategy.session import restore_fields
from tests.laws import federations as fed

CASES = [(model, *procedure[1:]) for model in fed.MODELS for procedure in fed.procedures()]
IDS = [f"{model}-{procedure[0]}" for model in fed.MODELS for procedure in fed.procedures()]
CASES += [case[1:] for case in fed.part_cases()]
IDS += [case[0] for case in fed.part_cases()]


def payload_bits(payload: Payload):
    named = {**payload.buffers, **{f"extra.{n}": t for n, t in payload.extra.items()}}
    return fed.named_bits(named | ({} if payload.params is None else {"params": payload.params}))


def replies_bits(replies: Replies):
    named = {"params": replies.params, "reference": replies.reference}
    named |= {"num_examples": replies.num_examples, "staleness": replies.staleness}
    for group in (replies.buffers, replies.extra, replies.metrics, replies.encoded):
        named |= group
    return fed.named_bits(named), replies.client_ids.tolist(), replies.failures


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_training_and_evaluating_leave_the_job_as_it_was(model, name, arguments):
    procedure = fed.make_procedure(name, **arguments)
    data = fed.InMemoryData(test_sizes=fed.SIZES)
    executor = fed.make_executor(model, procedure, data)
    first = executor.train(fed.job(executor, (3, 5)))
    own = torch.stack([first.params[1], first.params[0]])
    chunk = fed.job(
        executor,
        (3, 5),
        server_round=2,
        personal=Payload(own, extra={"more": torch.ones(2, 3)}),
        state=first.state,
        has_state=(True, False),
    )
    before = payload_bits(chunk.shared), payload_bits(chunk.personal), fed.named_bits(chunk.state)
    samples = (
        data.clients((3, 5)).features.copy(),
        data.clients((3, 5), split="test").features.copy(),
    )
    executor.train(chunk)
    executor.evaluate(fed.job(executor, (3, 5), action="evaluate", shared=chunk.shared))
    assert before == (
        payload_bits(chunk.shared), payload_bits(chunk.personal), fed.named_bits(chunk.state)
    )  # fmt: skip
    for split, copy in zip(("train", "test"), samples, strict=True):
        assert np.array_equal(data.clients((3, 5), split=split).features, copy)


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_a_result_does_not_change_when_the_next_chunk_is_trained(model, name, arguments):
    executor = fed.make_executor(model, fed.make_procedure(name, **arguments))
    first = executor.train(fed.job(executor, (3, 5)))
    before = [fed.result_bits(first, row) for row in (0, 1)]
    executor.train(fed.job(executor, (4, 6), state=first.state, has_state=(True, True)))
    assert [fed.result_bits(first, row) for row in (0, 1)] == before


def test_the_model_that_an_executor_holds_stays_as_it_was_built():
    executor = fed.make_executor("cnn_batchnorm")
    before = fed.named_bits(executor.model.state_dict())
    executor.train(fed.job(executor, (3, 5)))
    assert fed.named_bits(executor.model.state_dict()) == before


# every strategy on one of these in turn, on the others among the slow tests
KINDS = [("mlp", "float32"), ("mlp", "float64"), ("cnn_batchnorm", "float32")]
TURNS = [
    pytest.param(name, *kind, marks=[pytest.mark.slow] if (number + place) % 3 else [])
    for number, name in enumerate(fed.strategies())
    for place, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "model", "dtype"), TURNS)
def test_a_strategy_leaves_model_state_and_replies_as_they_were(name, model, dtype):
    app = fed.make_app_for(name, model, dtype=dtype)
    grid = InlineGrid(app, 8)
    strategy = fed.make_strategy(name)
    strategy.declare_buffers([spec.name for spec in app.layout.buffers])
    arrays = fed.initial_arrays(model, dtype=dtype)
    for server_round in (1, 2, 3):
        record = fed.record_bits(arrays)
        sent = fed.configure(strategy, grid, arrays, server_round)
        state = strategy.state
        state_before = fed.state_bits(state)
        sent_before = payload_bits(sent.shared), payload_bits(sent.personal)
        replies = grid.send_and_receive(sent)
        replies_before = replies_bits(replies)
        after, _ = strategy.aggregate_train(server_round, replies)
        assert fed.record_bits(arrays) == record
        assert fed.state_bits(state) == state_before
        assert (payload_bits(sent.shared), payload_bits(sent.personal)) == sent_before
        assert replies_bits(replies) == replies_before
        arrays = after


def through_a_file(folder, **fields):
    written = Checkpoint(
        server_round=2, scenario_sha256="s", plan={"chunk_size": 3}, versions={}, model={}, **fields
    )
    return checkpoint.load(checkpoint.save(folder, written, keep=1))


@pytest.mark.parametrize("name", fed.strategies())
def test_a_strategys_state_goes_through_a_checkpoint(name, tmp_path):
    """A strategy that takes up the saved state goes on as the one that never stopped."""
    app = fed.make_app_for(name, "mlp")
    strategy, other = fed.make_strategy(name), fed.make_strategy(name)
    grid = InlineGrid(app, 8)
    arrays = fed.initial_arrays("mlp")
    for server_round in (1, 2):
        replies = grid.send_and_receive(fed.configure(strategy, grid, arrays, server_round))
        arrays, _ = strategy.aggregate_train(server_round, replies)
    saved = through_a_file(tmp_path, strategy=dict(strategy.state._asdict()))
    assert fed.state_bits(restore_fields(strategy.state, saved.strategy)) == fed.state_bits(
        strategy.state
    )

    other.restore(saved.strategy)
    outcomes, kept = [], grid.store.export()
    for each in (strategy, other):
        grid.store.restore(*kept)
        sent = fed.configure(each, grid, arrays, 3)
        after, metrics = each.aggregate_train(3, grid.send_and_receive(sent))
        outcomes.append((fed.record_bits(after), dict(metrics), fed.state_bits(each.state)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(("model", "name", "arguments"), CASES, ids=IDS)
def test_clients_memories_go_through_a_checkpoint(model, name, arguments, tmp_path):
    executor = fed.make_executor(model, fed.make_procedure(name, **arguments))
    store, other = ClientStore(), ClientStore()
    for members in ((1, 4), (4, 6)):
        state, has_state = store.rows(members)
        chunk = fed.job(executor, members, state=state, has_state=has_state)
        store.commit(members, executor.train(chunk).state)
    clients, memories = store.export()
    assert clients == ([1, 4, 6] if memories else [])
    saved = through_a_file(tmp_path, clients=clients, client_state=memories)
    other.restore(saved.clients, saved.client_state)
    again, restored = other.export()
    assert (again, fed.named_bits(restored)) == (clients, fed.named_bits(memories))


def test_a_model_goes_through_a_checkpoint_in_its_order_with_its_bits(tmp_path):
    model = {
        "z": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 5e-324], dtype=torch.float64),
        "a": torch.tensor(7),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros((0, 3)),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    written = Checkpoint(2, "s", {}, {}, model=model)
    read = checkpoint.load(checkpoint.save(tmp_path, written, keep=1))
    assert list(read.model) == list(model)
    assert fed.named_bits(read.model) == fed.named_bits(model)


def test_committed_memories_do_not_share_memory_with_the_result():
    store = ClientStore()
    state = {"m": torch.ones(2, 3)}
    store.commit((0, 1), state)
    state["m"].zero_()
    assert store.rows((0, 1))[0]["m"].eq(1).all()


def test_rows_handed_out_do_not_share_memory_with_the_store():
    store = ClientStore()
    store.commit((0, 1), {"m": torch.ones(2, 3)})
    store.rows((0, 1))[0]["m"].zero_()
    assert store.rows((0, 1))[0]["m"].eq(1).all()
