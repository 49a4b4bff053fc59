"""Personal tensors: kept by the client, in no message, trained as if they had been sent."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import nn

from fedsim.client.executor import CohortExecutor
from fedsim.client.plan import ExecutionPlan
from fedsim.client.procedure import ClientProcedure, Work
from fedsim.engine.client_app import CohortApp
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import SETUP
from fedsim.messages.layout import Payload
from fedsim.messages.records import model_record, named_tensors
from fedsim.tasks.classification import Classification
from tests.laws import federations as fed
from tests.laws.federations import (
    SEED,
    SPEC,
    InMemoryData,
    job,
    make_executor,
    make_procedure,
    named_bits,
    result_bits,
)
from tests.tiers import by_turns

KINDS = ("loop", "batched", "vmap")
MODEL, OWN = "personal_output", ("output.weight", "output.bias")
NORMS = tuple(
    f"norm{number}.{part}"
    for number in (1, 2)
    for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)
PERSONAL = {MODEL: OWN, "personal_norms": NORMS}


def whole_model(executor):
    """The same model without personal tensors, on the same data with the same procedure."""
    task = fed.make_task(MODEL)  # the layout alone knows what is personal
    return CohortExecutor(task, executor.procedure, executor.data, seed=SEED, kind=executor.kind)


# --- the executor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PERSONAL)
def test_a_reply_holds_what_is_shared_and_the_state_what_is_personal(model):
    executor = make_executor(model)
    result = executor.train(job(executor, (3, 4, 6)))
    own = PERSONAL[model]
    assert not {*executor.layout.names} & {*own}
    assert {*executor.layout.names} | {*own} == {*executor.inputs.whole.names}
    assert set(result.state) == {f"personal.{name}" for name in own}
    assert not {*result.buffers} & {*own}
    assert result.params.shape == (3, executor.layout.dim)
    start = executor.task.build_model(SEED).state_dict()
    for name in own:
        assert not torch.equal(result.state[f"personal.{name}"][2], start[name]), name


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": 0.9}, {"optimizer": "adam"}, {"clip_norm": 0.5, "proximal": 0.1}],
    ids=["descent", "momentum", "adam", "stepped"],
)
def test_training_is_that_of_the_whole_model_bit_for_bit(kind, arguments):
    """From the client's own tensors and what is shared, a client trains as if all were sent."""
    executor = make_executor(MODEL, make_procedure(**arguments), kind=kind)
    whole, members = whole_model(executor), (3, 4, 6)
    first = executor.train(job(executor, members))
    shared = first.params[0]  # any model will do
    second = executor.train(
        job(executor, members, server_round=2, shared=Payload(shared), state=first.state,
            has_state=(True,) * 3)
    )  # fmt: skip
    for place in range(3):
        named = executor.layout.unflatten(shared)
        named |= {name: first.state[f"personal.{name}"][place] for name in OWN}
        sent = Payload(whole.layout.flatten(named))
        plain = whole.train(job(whole, members, server_round=2, shared=sent))
        trained = whole.layout.unflatten(plain.params[place])
        assert torch.equal(executor.layout.flatten(trained), second.params[place])
        for name in OWN:
            assert torch.equal(trained[name], second.state[f"personal.{name}"][place])
        assert torch.equal(plain.metrics["loss"][place], second.metrics["loss"][place])


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_clients_of_a_chunk_without_a_state_start_from_the_initial_tensors(kind):
    executor = make_executor(MODEL, kind=kind)
    first = executor.train(job(executor, (3, 4, 6)))
    mixed = executor.train(
        job(executor, (3, 4, 6), state=first.state, has_state=(True, False, True))
    )
    assert result_bits(mixed, 1) == result_bits(first, 1)
    assert result_bits(mixed, 0) != result_bits(first, 0)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_a_state_does_not_change_when_the_next_chunk_is_trained(kind):
    executor = make_executor(MODEL, kind=kind)
    result = executor.train(job(executor, (3, 4)))
    before = named_bits(result.state)
    executor.train(job(executor, (5, 6)))
    assert named_bits(result.state) == before


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_a_client_without_samples_keeps_the_tensors_that_it_has(kind):
    executor = make_executor(MODEL, data=InMemoryData((5, 0)), kind=kind)
    result = executor.train(job(executor, (0, 1)))
    start = executor.task.build_model(SEED).state_dict()
    assert all(torch.equal(result.state[f"personal.{n}"][1], start[n]) for n in OWN)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_a_guidance_leaves_personal_tensors_their_steps(kind):
    """A strategy knows shared parameters alone; stopping those lets a head train."""
    guided = make_procedure(parts=[{"name": "guidance"}])
    executor = make_executor(MODEL, guided, kind=kind)
    start = fed.initial_payload(executor)
    nothing = {f"guidance.{s.name}": torch.zeros(s.shape) for s in executor.layout.trainable}
    chunk = job(executor, (3, 4), shared=Payload(start.params, {}, nothing))
    result = executor.train(chunk)
    assert all(torch.equal(row, start.params) for row in result.params)
    initial = executor.task.build_model(SEED).state_dict()
    for name in OWN:
        assert not torch.equal(result.state[f"personal.{name}"][0], initial[name])


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_personal_tensors_that_are_not_finite_make_the_loss_nan_so_that_the_reply_is_refused(kind):
    """What is shared may still be finite: the last step alone has blown up the head."""
    executor = make_executor(MODEL, make_procedure(local_steps=1, batch_size=256), kind=kind)
    first = executor.train(job(executor, (3, 4)))
    spoiled = {name: stack.clone() for name, stack in first.state.items()}
    spoiled["personal.output.bias"][1, 0] = -torch.inf  # its class is never predicted
    result = executor.train(job(executor, (3, 4), state=spoiled, has_state=(True, True)))
    loss = result.metrics["loss"]
    assert torch.stack([*result.params]).isfinite().all()
    assert bool(loss[0].isfinite())
    assert bool(loss[1].isnan())


def test_evaluation_is_that_of_the_whole_model():
    data = InMemoryData(test_sizes=(5, 1, 30, 7, 2, 110, 9, 3))
    executor = make_executor(MODEL, data=data)
    whole, members = whole_model(executor), (0, 3, 5)
    trained = executor.train(job(executor, members))
    found = executor.evaluate(
        job(executor, members, action="evaluate", state=trained.state,
            has_state=(True, False, True))
    )  # fmt: skip
    assert found.metrics["personalised"].tolist() == [1.0, 0.0, 1.0]
    start = whole.task.build_model(SEED).state_dict()
    for place in range(3):
        named = executor.layout.unflatten(fed.initial_payload(executor).params)
        own = {n: trained.state[f"personal.{n}"][place] for n in OWN}
        named |= own if place != 1 else {n: start[n] for n in OWN}
        sent = Payload(whole.layout.flatten(named))
        plain = whole.evaluate(job(whole, members, action="evaluate", shared=sent))
        assert found.metrics["loss"][place] == plain.metrics["loss"][place]
    assert not found.state


def test_nobody_is_called_personalised_where_nothing_is_personal():
    executor = make_executor("mlp", data=InMemoryData(test_sizes=(5,) * 8))
    assert "personalised" not in executor.evaluate(job(executor, (0,), action="evaluate")).metrics


# --- all personal: every client alone -------------------------------------------------------------


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "kept momentum"])
def test_with_all_personal_a_client_is_trained_as_alone_bit_for_bit(kind, momentum):
    """Its solo run: the plain procedure on the whole model, handed its own result every round."""
    rounds, members = 3, (1, 3, 4, 6)
    procedure = make_procedure(momentum=momentum, keep_optimizer=True)
    shared = whole_model(make_executor(MODEL, procedure, kind=kind))
    start = shared.task.build_model(SEED).state_dict()
    alone = CohortExecutor(
        shared.task, procedure, shared.data, seed=SEED, kind=kind, personal=dict(start)
    )
    assert alone.layout.dim == 0
    app = CohortApp(lambda: alone, ExecutionPlan(kind, "a test", 2))
    grid = InlineGrid(app, 8)
    arrays, _ = fed.run_rounds(
        fed.make_strategy("fedavg"), grid, model_record(alone.layout, torch.zeros(0), {}),
        alone.layout, rounds=rounds, cohorts=(members,),
    )  # fmt: skip
    assert not arrays
    clients, kept = grid.store.export()
    assert tuple(clients) == members
    for place, client in enumerate(members):
        model, memory = fed.initial_payload(shared).params, {}
        for server_round in range(1, rounds + 1):
            result = shared.train(
                job(shared, (client,), server_round=server_round, shared=Payload(model),
                    state=memory, has_state=(bool(memory),))
            )  # fmt: skip
            model, memory = result.params[0].clone(), result.state
        for name, tensor in shared.layout.unflatten(model).items():
            assert torch.equal(tensor, kept[f"personal.{name}"][place]), (client, name)


# --- messages -------------------------------------------------------------------------------------


class Watching(GridWrapper):
    """Notes the names of all tensors in messages, and their numbers."""

    def __init__(self, inner):
        super().__init__(inner)
        self.down, self.up = [], []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.down += [self.named(message) for message in messages]
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.up += [self.named(message) for message in replies]
        return replies

    @staticmethod
    def named(message):
        records = message.content.array_records
        return {
            f"{record}/{name}": array.numpy().size
            for record, arrays in records.items()
            for name, array in arrays.items()
        }


@pytest.mark.parametrize("model", PERSONAL)
@pytest.mark.parametrize("strategy", ["fedavg", "fedlex", "flower:FedAdam"])
def test_no_message_of_the_engine_holds_a_personal_tensor(model, strategy):
    app = fed.make_app(model, data=InMemoryData(test_sizes=(5,) * 8))
    grid = Watching(InlineGrid(app, 8))
    fed.run_rounds(
        fed.make_strategy(strategy), grid, fed.initial_arrays(model), app.layout, rounds=2,
        local_clients=np.arange(8),
    )  # fmt: skip
    own, shared = PERSONAL[model], app.layout
    assert len(grid.down) == len(grid.up) >= 32
    for named in (*grid.down, *grid.up):
        assert not [name for name in named if name.endswith(own)]
        sent = {n.partition("/")[2]: size for n, size in named.items() if n.startswith("arrays/")}
        assert sent in (
            {},
            {s.name: s.size for s in (*shared.trainable, *shared.buffers)},
        )


def test_what_a_procedure_returns_of_a_personal_tensor_stays_with_the_client():
    class Telling(ClientProcedure):
        """Returns how far every parameter has moved, by its name."""

        work = Work(50, 1, None)

        def begin(self, params, buffers, extra, state):
            return {"params": params, "buffers": buffers, "from": params}

        def step(self, carry, batch, gradient, *, server_round):
            loss, grads, _ = gradient(carry["params"], carry["buffers"], batch)
            moved = {n: p - 0.1 * grads[n] for n, p in carry["params"].items()}
            return {**carry, "params": moved}, loss

        def finish(self, carry, state):
            moved = {f"moved.{n}": p - carry["from"][n] for n, p in carry["params"].items()}
            return moved, state

    for kind in ("loop", "vmap"):
        executor = make_executor(MODEL, Telling(), kind=kind)
        result = executor.train(job(executor, (3, 4)))
        assert set(result.extra) == {f"moved.{s.name}" for s in executor.layout.trainable}


# --- on a node ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PERSONAL)
def test_a_node_keeps_them_in_its_own_context_and_has_the_engines_bits(model):
    data = InMemoryData(test_sizes=(5, 1, 30, 7, 2, 110, 9, 3))
    app, client = fed.make_app(model, data=data, chunk_size=2), 4
    layout, start = app.layout, fed.initial_payload(app.executor)
    arrays = model_record(layout, start.params, start.buffers)
    internals.ensure_identity()
    context = Context(1, 3, {"partition-id": client, "num-partitions": 8}, RecordDict(), {})

    def ask(kind, server_round=1):
        config = ConfigRecord({"server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": config})
        return app(Message(content, dst_node_id=3, message_type=kind), context).content

    assert ask(MessageType.EVALUATE)["metrics"]["personalised"] == 0.0
    ask(SETUP, 0)
    assert "client-state" not in context.state  # a set-up exchange trains nobody
    kept = {}
    for server_round in (1, 2):
        reply = ask(MessageType.TRAIN, server_round)
        assert set(reply["arrays"]) == set(layout.names)
        assert set(reply.array_records) == {"arrays"}
        chunk = job(
            app.executor, (client, 5), server_round=server_round, state=kept,
            has_state=(bool(kept),) * 2,
        )  # fmt: skip
        kept = app.run_chunk(chunk).state
        saved = named_tensors(context.state["client-state"])
        assert set(saved) == {f"personal.{name}" for name in PERSONAL[model]}
        assert named_bits(saved) == named_bits({name: kept[name][0] for name in saved})
    assert ask(MessageType.EVALUATE)["metrics"]["personalised"] == 1.0


# --- clipping at the clients ----------------------------------------------------------------------


def test_a_bound_on_updates_is_about_what_is_shared():
    executor = make_executor(MODEL)
    free = executor.train(job(executor, (3, 4)))
    start = fed.initial_payload(executor).params
    app = CohortApp(lambda: executor, ExecutionPlan(executor.kind, "a test", 2))
    bound = float((free.params[0] - start).double().norm()) / 2
    clipped = app.run_chunk(job(executor, (3, 4), clipping_norm=bound))
    assert clipped.metrics["norm_bit"][0] == 1.0
    assert float((clipped.params[0] - start).double().norm()) == pytest.approx(bound, rel=1e-5)
    assert named_bits(clipped.state) == named_bits(free.state)


# --- what starts ----------------------------------------------------------------------------------


def test_an_executor_may_be_given_what_personal_tensors_start_from():
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))

    head = {"3.weight": torch.full((3, 4), 0.5), "3.bias": torch.zeros(3)}
    executor = CohortExecutor(
        Classification(build, SPEC, torch.float32), make_procedure(local_lr=0.0), InMemoryData(),
        seed=SEED, kind="batched", personal=head,
    )  # fmt: skip
    result = executor.train(job(executor, (3, 4)))
    assert all(torch.equal(result.state[f"personal.{n}"][1], t) for n, t in head.items())
