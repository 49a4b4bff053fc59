import logging
from typing import NamedTuple, final

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.aggregators.sums import average_buffers, mean_metrics
from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.participation import SubsetGrid
from fedsim.messages.cohort import SETUP
from fedsim.messages.layout import Payload
from fedsim.messages.records import array_record, model_tensors
from fedsim.messages.replies import Replies
from fedsim.scenario import discovery
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import NoState, Setup
from fedsim.strategy.linear import LinearStrategy
from fedsim.strategy.session import federation_size, restore_fields
from tests.laws import federations as fed


class Memory(NamedTuple):
    """What `Exploring` remembers."""

    sizes: Tensor
    rounds: int


@final
class Exploring(FederatedStrategy):
    """Asks some clients before round 1, sends each its own extra, and counts rounds."""

    def init(self, params, clients):
        return Memory(torch.zeros(clients, dtype=torch.int64), 0)

    def setup(self, state, params, clients):
        return Setup(np.array([1, 4]), Payload(extra={"probe": torch.tensor(2.5)}))

    def finish_setup(self, state, params, replies):
        sizes = state.sizes.clone()
        sizes[torch.from_numpy(replies.client_ids)] = replies.num_examples
        return state._replace(sizes=sizes)

    def broadcast(self, state, params, cohort):
        rank = torch.from_numpy(cohort).double()
        return Payload(params), Payload(extra={"rank": rank})

    def server_update(self, state, params, replies):
        mean = replies.params.mean(dim=0) if replies.num_clients else params
        return mean, state._replace(rounds=state.rounds + 1), {"rounds": state.rounds + 1}


@final
class Personal(FederatedStrategy):
    """Every client has a model of its own; the global one is their mean."""

    def init(self, params, clients):
        return Models(params.expand(clients, -1).clone())

    def broadcast(self, state, params, cohort):
        return Payload(), Payload(state.models[torch.from_numpy(cohort)])

    def server_update(self, state, params, replies):
        models = state.models.clone()
        models[torch.from_numpy(replies.client_ids)] = replies.params
        return models.mean(dim=0), Models(models), {}

    def evaluated(self, state, params, cohort):
        return Payload(), Payload(state.models[torch.from_numpy(cohort)])


class Models(NamedTuple):
    """One model per client."""

    models: Tensor


@final
class Halves(LinearStrategy):
    """A linear rule with unnormalised weights that remembers who answered."""

    def init(self, params, clients):
        return Seen(())

    def weights(self, state, client_ids, num_examples):
        return torch.full((len(client_ids),), 0.5, dtype=torch.float64)

    def apply(self, state, params, weighted_sum, weight_sum):
        return params + weighted_sum.to(params.dtype), state, {"weight_sum": weight_sum}

    def observe(self, state, replies):
        return Seen(tuple(replies.client_ids.tolist()))


class Seen(NamedTuple):
    """Who answered last."""

    clients: tuple[int, ...]


class RecordingGrid(InlineGrid):
    """Remembers the cohorts that it was sent."""

    def __init__(self, app, num_clients):
        super().__init__(app, num_clients)
        self.cohorts = []

    def send_and_receive(self, messages, *, timeout=None):
        self.cohorts.append(messages)
        return super().send_and_receive(messages, timeout=timeout)


@pytest.fixture
def app():
    return fed.make_app("logistic")


@pytest.fixture
def grid(app):
    return RecordingGrid(app, 8)


ARRAYS = fed.initial_arrays("logistic")


# --- state and session ----------------------------------------------------------------------------


def test_there_is_no_state_before_round_1_is_configured(grid):
    strategy = Exploring()
    assert strategy.state is None
    fed.configure(strategy, grid, ARRAYS)
    assert strategy.state.rounds == 0


def test_state_is_kept_from_round_to_round(grid):
    strategy = Exploring()
    fed.run_rounds(strategy, grid, ARRAYS, grid.client_app.layout, rounds=3)
    assert strategy.state.rounds == 3


def test_configuring_round_1_begins_anew(grid):
    strategy = Exploring()
    runs = [
        fed.run_rounds(strategy, grid, ARRAYS, grid.client_app.layout, rounds=2) for _ in range(2)
    ]
    assert fed.record_bits(runs[0][0]) == fed.record_bits(runs[1][0])
    assert strategy.state.rounds == 2


def test_evaluating_in_round_1_does_not_begin_anew(grid):
    strategy = Exploring()
    sent = fed.configure(strategy, grid, ARRAYS)
    strategy.aggregate_train(1, grid.send_and_receive(sent))
    strategy.configure_evaluate(1, ARRAYS, ConfigRecord({}), grid)
    assert strategy.state.rounds == 1


def test_a_restored_state_is_taken_up_without_another_set_up(grid):
    strategy = Exploring()
    strategy.restore({"sizes": torch.arange(8), "rounds": 5})
    fed.configure(strategy, grid, ARRAYS, 6)
    assert strategy.state.sizes.tolist() == list(range(8))
    assert strategy.state.rounds == 5
    assert grid.cohorts == []


def test_a_restored_state_with_other_fields_is_refused(grid):
    strategy = Exploring()
    strategy.restore({"sizes": torch.arange(8)})
    with pytest.raises(ValueError, match=r"has \['sizes'\], expected \['rounds', 'sizes'\]"):
        fed.configure(strategy, grid, ARRAYS, 6)


def test_restored_fields_replace_all_values():
    assert restore_fields(Seen(()), {"clients": (1,)}) == Seen((1,))


def test_aggregating_before_configuring_is_refused():
    with pytest.raises(RuntimeError, match="round 1: aggregate was called before configure"):
        Exploring().aggregate_train(1, [])


# --- what is sent ---------------------------------------------------------------------------------


def test_a_cohort_goes_to_every_node_that_the_grid_offers(grid):
    offered = SubsetGrid(grid, np.array([6, 1, 3]))
    sent = fed.configure(fed.make_strategy("fedavg"), offered, ARRAYS)
    assert sent.client_ids.tolist() == [1, 3, 6]
    assert [m.metadata.dst_node_id for m in sent] == [3, 5, 8]


def test_buffers_travel_with_the_model():
    app = fed.make_app("cnn_batchnorm")
    arrays = fed.initial_arrays("cnn_batchnorm")
    sent = fed.configure(fed.make_strategy("fedavg"), InlineGrid(app, 8), arrays)
    assert list(sent.shared.buffers) == [spec.name for spec in app.layout.buffers]
    assert fed.record_bits(sent[0].content["arrays"]) == fed.record_bits(arrays)


def test_the_set_up_exchange_asks_its_clients_before_round_1(grid):
    strategy = Exploring()
    _, records = fed.run_rounds(strategy, grid, ARRAYS, grid.client_app.layout)
    first = grid.cohorts[0]
    assert (first.message_type, first.server_round) == (SETUP, 0)
    assert first.client_ids.tolist() == [1, 4]
    assert float(first.shared.extra["probe"]) == 2.5
    assert strategy.state.sizes.tolist() == [0, 2, 0, 0, 20, 0, 0, 0]
    assert strategy.setup_replies.client_ids.tolist() == [1, 4]
    assert (records[0]["clients/selected"], records[0]["clients/replied"]) == (2, 2)
    assert len(grid.cohorts) == 3


def test_personal_extras_are_rows_in_client_order(grid):
    sent = fed.configure(Exploring(), SubsetGrid(grid, np.array([2, 7])), ARRAYS)
    assert [float(m.content["extra"]["rank"].numpy()) for m in sent] == [2.0, 7.0]


def test_personal_models_are_trained_and_evaluated_by_their_own_clients():
    data = fed.InMemoryData(test_sizes=fed.SIZES)
    app = fed.make_app("logistic", data=data)
    grid, strategy = InlineGrid(app, 8), Personal()
    arrays = ARRAYS
    for server_round, members in ((1, [0, 4]), (2, [4, 6])):
        sent = fed.configure(strategy, SubsetGrid(grid, np.array(members)), arrays, server_round)
        arrays, _ = strategy.aggregate_train(server_round, grid.send_and_receive(sent))
    start = model_tensors(app.layout, ARRAYS)[0]
    changed = strategy.state.models.ne(start).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 4, 6]
    mean, _ = model_tensors(app.layout, arrays)
    torch.testing.assert_close(mean, strategy.state.models.mean(dim=0))

    sent = strategy.configure_evaluate(2, arrays, ConfigRecord({}), grid)
    received = grid.send_and_receive(sent)
    for client in (4, 5):
        rows = data.clients((client,), split="test")
        expected = app.executor.evaluate_arrays(
            strategy.state.models[client],
            {},
            rows.features[rows.rows[0]],
            rows.targets[rows.rows[0]],
        )
        assert float(received.metrics["loss"][client]) == pytest.approx(expected["loss"], abs=1e-6)


# --- what comes back ------------------------------------------------------------------------------


def test_replies_and_their_messages_aggregate_alike(grid):
    outcomes = []
    for view in (lambda r: r, list):
        strategy = fed.make_strategy("fedavg")
        sent = fed.configure(strategy, grid, ARRAYS)
        arrays, metrics = strategy.aggregate_train(1, view(grid.send_and_receive(sent)))
        outcomes.append((fed.record_bits(arrays), dict(metrics)))
    assert outcomes[0] == outcomes[1]


def test_metrics_are_averaged_by_examples_beside_the_strategys_own(grid):
    strategy = Exploring()
    sent = fed.configure(strategy, grid, ARRAYS)
    received = grid.send_and_receive(sent)
    _, metrics = strategy.aggregate_train(1, received)
    expected = np.average(received.metrics["loss"], weights=received.num_examples)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-12)
    assert (metrics["num-examples"], metrics["rounds"]) == (388, 1)


def test_a_round_without_a_reply_leaves_the_model(grid):
    for name in fed.strategies():
        strategy = fed.starting_alike(name)
        fed.configure(strategy, grid, ARRAYS)
        arrays, metrics = strategy.aggregate_train(1, [])
        assert fed.record_bits(arrays) == fed.record_bits(ARRAYS)
        assert metrics["num-examples"] == 0


def test_an_evaluation_without_a_reply_has_no_metrics(grid):
    strategy = fed.make_strategy("fedavg")
    strategy.configure_evaluate(1, ARRAYS, ConfigRecord({}), grid)
    assert strategy.aggregate_evaluate(1, []) is None


# every strategy on one of these in turn, on the other one among the slow tests
TURNS = [
    pytest.param(name, *kind, marks=[pytest.mark.slow] if (number + place) % 2 else [])
    for number, name in enumerate(fed.strategies())
    for place, kind in enumerate((("mlp", "float64"), ("cnn_batchnorm", "float32")))
]


@pytest.mark.parametrize(("name", "model", "dtype"), TURNS)
def test_the_model_keeps_its_names_shapes_and_dtypes(name, model, dtype):
    app = fed.make_app_for(name, model, dtype=dtype)
    arrays = fed.initial_arrays(model, dtype=dtype)
    after, _ = fed.run_rounds(fed.make_strategy(name), InlineGrid(app, 8), arrays, app.layout)
    described = [[(n, a.dtype, a.shape) for n, a in r.items()] for r in (arrays, after)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", fed.strategies())
def test_a_local_step_size_of_zero_leaves_the_model(name):
    procedure = fed.make_procedure("local_sgd", local_lr=0.0, parts=fed.parts_for(name))
    app = fed.make_app("mlp", procedure)
    arrays = fed.initial_arrays("mlp")
    after, _ = fed.run_rounds(fed.starting_alike(name), InlineGrid(app, 8), arrays, app.layout)
    assert fed.record_bits(after) == fed.record_bits(arrays)


@pytest.mark.parametrize("name", fed.strategies())
def test_a_cohort_of_one_works(name):
    app = fed.make_app_for(name, "mlp")
    arrays = fed.initial_arrays("mlp")
    after, records = fed.run_rounds(
        fed.make_strategy(name), InlineGrid(app, 8), arrays, app.layout, cohorts=((5,), (2,))
    )
    assert [r["train/num_examples"] for r in records[1:]] == [45, 3]
    assert fed.record_bits(after) != fed.record_bits(arrays)


def test_a_linear_rule_gets_the_weighted_sum_and_learns_who_answered(app):
    strategy = Halves()
    start = torch.zeros(app.layout.dim)
    received = Replies(
        server_round=1,
        layout=app.layout,
        client_ids=np.array([2, 5]),
        params=torch.stack([start + 1, start + 3]),
        reference=start,
        buffers={},
        extra={},
        num_examples=torch.tensor([7, 7]),
        metrics={},
        staleness=torch.zeros(2, dtype=torch.int64),
    )
    params, state, metrics = strategy.server_update(Seen(()), start, received)
    assert params.unique().tolist() == [2.0]  # 0.5 * 1 + 0.5 * 3
    assert state == Seen((2, 5))
    assert metrics == {"weight_sum": 1.0}


def received_buffers(stacks, counts):
    return Replies(
        server_round=1,
        layout=None,
        client_ids=np.arange(len(counts)),
        params=None,
        reference=None,
        buffers=stacks,
        extra={},
        num_examples=torch.tensor(counts),
        metrics={"loss": torch.tensor([float(k) for k in range(len(counts))], dtype=torch.float64)},
        staleness=torch.zeros(len(counts), dtype=torch.int64),
    )


def test_buffers_are_averaged_by_examples_and_counters_take_the_largest():
    stacks = {
        "mean": torch.tensor([[1.0, 2.0], [5.0, 6.0]]),
        "half": torch.tensor([1.0, 2.0], dtype=torch.float16),
        "count": torch.tensor([3, 9]),
        "flag": torch.tensor([True, False]),
    }
    before = {name: stack[0] for name, stack in stacks.items()}
    after = average_buffers(before, received_buffers(stacks, [3, 1]))
    assert {n: t.tolist() for n, t in after.items()} == {
        "mean": [2.0, 3.0], "half": 1.25, "count": 9, "flag": True
    }  # fmt: skip
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in stacks.items()}


def test_buffers_stay_when_nobody_trained():
    before = {"mean": torch.tensor([1.0])}
    after = average_buffers(before, received_buffers({"mean": torch.tensor([[9.0]])}, [0]))
    assert after["mean"].tolist() == [1.0]


def test_the_mean_of_no_metric_is_zero():
    assert mean_metrics(received_buffers({}, [0, 0])) == {"num-examples": 0, "loss": 0.0}
    assert mean_metrics(received_buffers({}, [1, 3])) == {"num-examples": 4, "loss": 0.75}


# --- elsewhere than in the engine -----------------------------------------------------------------


class FlowersGrid(Grid):
    """A grid as Flower's are: node ids are random 64-bit numbers and it does not know what N is."""

    NODES = (2**64 - 3, 12, 2**63 + 5, 2**40)

    def __init__(self):
        self.answered = []

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self):
        return self.NODES

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        found = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.answered.append(node)
            moved = {
                n: a.numpy() + 1 + self.NODES.index(node)
                for n, a in message.content["arrays"].items()
            }
            record = array_record(
                {n: torch.from_numpy(a.astype(np.float32)) for n, a in moved.items()}
            )
            metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
            content = RecordDict({"arrays": record, "metrics": metrics})
            found.append(Message(content, reply_to=message))
        return found[::-1]


def test_a_strategy_runs_on_a_grid_whose_nodes_have_64_bit_ids():
    grid = FlowersGrid()
    strategy = fed.make_strategy("fedavg")
    result = strategy.start(grid=grid, initial_arrays=ARRAYS, num_rounds=2)
    assert sorted(set(grid.answered)) == sorted(FlowersGrid.NODES)
    moved = result.arrays["output.bias"].numpy() - ARRAYS["output.bias"].numpy()
    np.testing.assert_allclose(moved, 2 * 2.5, rtol=1e-6)


@pytest.mark.parametrize("name", fed.strategies())
def test_every_strategy_runs_on_such_a_grid(name):
    grid = FlowersGrid()
    strategy = fed.starting_alike(name)
    if vars(discovery.strategy_factory(name)).get("returns"):
        with pytest.raises(RunError, match="give them the part"):  # such nodes return models alone
            strategy.start(grid=grid, initial_arrays=ARRAYS, num_rounds=2)
        return
    result = strategy.start(grid=grid, initial_arrays=ARRAYS, num_rounds=2)
    asked = {node: grid.answered.count(node) for node in FlowersGrid.NODES}
    explores = "setup" in vars(discovery.strategy_factory(name))
    # two rounds of training and of evaluation, and what comes before them
    assert asked == dict.fromkeys(FlowersGrid.NODES, 4 + explores)
    before, after = (r["output.bias"].numpy() for r in (ARRAYS, result.arrays))
    assert np.isfinite(after).all()
    assert (after > before).all()  # all nodes' updates are positive


def test_the_federation_is_as_large_as_the_grid_says(grid):
    assert federation_size(grid) == 8
    assert federation_size(SubsetGrid(grid, np.array([1]))) == 8
    assert federation_size(FlowersGrid()) == 4


def test_the_summary_names_the_hyperparameters_and_nothing_else(caplog):
    with caplog.at_level(logging.INFO, logger="fedsim"):
        strategy = fed.make_strategy("fedavg")
        strategy.declare_buffers(["b"])
        strategy.summary()
    assert caplog.messages == ["strategy FedAvg {'server_lr': 1.0, 'weighted': True}"]


def test_a_strategy_without_memory_has_an_empty_state():
    assert NoState()._asdict() == {}


@pytest.mark.parametrize("name", fed.strategies())
def test_flowers_own_start_gives_the_round_loops_bits(name):
    """In any Flower app: `strategy.start(grid=...)`, without a round loop of ours around it."""
    started, looped = (InlineGrid(fed.make_app_for(name, "mlp"), 8) for _ in range(2))
    first = fed.initial_arrays("mlp")
    result = fed.make_strategy(name).start(grid=started, initial_arrays=first, num_rounds=3)
    arrays, records = fed.run_rounds(
        fed.make_strategy(name), looped, first, looped.client_app.layout, rounds=3
    )
    assert fed.record_bits(result.arrays) == fed.record_bits(arrays)
    last = result.train_metrics_clientapp[3]
    assert last["loss"] == records[3]["train/loss"]
