import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import example, given
from hypothesis import strategies as st

from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.messages import flower_internals as internals
from fedsim.messages.admission import finite_rows
from fedsim.messages.byte_counts import cohort_bytes, replies_bytes, sum_of_bytes
from fedsim.messages.cohort import SETUP, Cohort, MessagesError
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.records import SERVER_ROUND, model_record
from fedsim.messages.replies import Replies
from tests.laws import federations as fed

NAMED = {
    "w": torch.zeros(2, 3),
    "b": torch.zeros(3, dtype=torch.float64),
    "n.num_batches_tracked": torch.tensor(0),
    "n.running_mean": torch.zeros(2),
}
LAYOUT = Layout.from_named(NAMED)
BUFFERS = {"n.num_batches_tracked": torch.tensor(4), "n.running_mean": torch.ones(2)}


def cohort(client_ids=(0, 3, 5), **changes):
    fields = {
        "client_ids": np.array(client_ids, dtype=np.int64),
        "server_round": 2,
        "layout": LAYOUT,
        "shared": Payload(torch.arange(9.0, dtype=torch.float64), BUFFERS),
    }
    return Cohort(**{**fields, **changes})


def replies(client_ids=(0, 3, 5), **changes):
    count = len(client_ids)
    fields = {
        "server_round": 2,
        "layout": LAYOUT,
        "client_ids": np.array(client_ids, dtype=np.int64),
        "params": torch.arange(9.0 * count, dtype=torch.float64).reshape(count, 9),
        "reference": torch.ones(9, dtype=torch.float64),
        "buffers": {n: torch.stack([t] * count) for n, t in BUFFERS.items()},
        "extra": {},
        "num_examples": torch.arange(1, count + 1),
        "metrics": {"loss": torch.linspace(0, 1, count, dtype=torch.float64)},
        "staleness": torch.zeros(count, dtype=torch.int64),
    }
    return Replies(**{**fields, **changes})


def arrays_of(message):
    return {name: array.numpy().tolist() for name, array in message.content["arrays"].items()}


# --- a cohort is a lazy sequence of messages ------------------------------------------------------


def test_a_cohort_addresses_node_c_plus_2_for_client_c():
    assert [m.metadata.dst_node_id for m in cohort()] == [2, 5, 7]


def test_a_cohort_may_address_other_nodes():
    nodes = np.array([2**63 + 1, 17, 2**40], dtype=np.uint64)
    assert [m.metadata.dst_node_id for m in cohort(node_ids=nodes)] == nodes.tolist()


def test_messages_follow_flowers_convention():
    message = cohort(config={"local-lr": 0.5})[1]
    assert message.metadata.message_type == "train"
    assert message.metadata.group_id == "2"
    assert dict(message.content["config"]) == {"local-lr": 0.5, "server-round": 2}
    assert list(message.content["arrays"]) == list(NAMED)
    assert arrays_of(message) == {
        "w": [[0, 1, 2], [3, 4, 5]],
        "b": [6, 7, 8],
        "n.num_batches_tracked": 4,
        "n.running_mean": [1, 1],
    }
    assert [a.dtype for a in message.content["arrays"].values()] == [
        "float32", "float64", "int64", "float32"
    ]  # fmt: skip


def test_a_message_is_built_once_and_kept():
    sent = cohort()
    assert sent[1] is sent[1]
    assert list(sent)[2] is sent[-1]
    assert sent[0:2] == [sent[0], sent[1]]


def test_no_message_is_built_before_it_is_read(monkeypatch):
    built = []
    build = Cohort._build
    monkeypatch.setattr(Cohort, "_build", lambda self, i: built.append(i) or build(self, i))
    sent = cohort()
    assert len(sent) == 3
    assert cohort_bytes(sent) > 0
    assert not built
    sent[2], sent[2]
    assert built == [2]


def test_reading_beyond_the_end_is_an_index_error():
    with pytest.raises(IndexError):
        cohort()[3]


def test_a_shared_payload_is_one_content_for_all():
    contents = {id(message.content) for message in cohort()}
    assert len(contents) == 1


def test_personal_payloads_give_each_client_its_own():
    personal = Payload(
        torch.stack([torch.full((9,), float(k), dtype=torch.float64) for k in range(3)]),
        extra={"mask": torch.arange(3)},
    )
    sent = cohort(shared=Payload(None, BUFFERS, {"step": torch.tensor(1.5)}), personal=personal)
    assert len({id(message.content) for message in sent}) == 3
    for k, message in enumerate(sent):
        assert arrays_of(message)["b"] == [k] * 3
        assert arrays_of(message)["n.running_mean"] == [1, 1]
        assert message.content["extra"]["mask"].numpy() == k
        assert message.content["extra"]["step"].numpy() == 1.5


def test_an_altered_cohort_builds_its_own_messages():
    sent = cohort()
    before = sent[0]
    other = sent.altered(server_round=9)
    assert other[0].content["config"]["server-round"] == 9
    assert sent[0] is before


@pytest.mark.parametrize("ids", [(3, 0), (1, 1)])
def test_client_ids_that_do_not_ascend_are_refused(ids):
    with pytest.raises(ValueError, match="must ascend"):
        cohort(ids)


# --- foreign messages as a cohort -----------------------------------------------------------------


def foreign(nodes=(7, 2, 5), kind="train", contents=None):
    internals.ensure_identity()
    content = cohort(config={"x": 1})[0].content
    contents = contents or [content] * len(nodes)
    return [Message(c, node, kind) for node, c in zip(nodes, contents, strict=True)]


def test_a_foreign_strategys_messages_are_a_cohort_in_client_order():
    messages = foreign()
    sent = Cohort.from_messages(messages, LAYOUT)
    assert sent.client_ids.tolist() == [0, 3, 5]
    assert (sent.server_round, dict(sent.config)) == (2, {"x": 1})
    assert sent.shared.params.tolist() == list(range(9))
    assert [sent[0], sent[1], sent[2]] == [messages[1], messages[2], messages[0]]


def _settings(**values):
    return cohort(config=values)[0].content


NO_COHORTS = {
    "none": {"nodes": ()},
    "several rounds": {
        "nodes": (2, 3),
        "contents": [cohort(server_round=n)[0].content for n in (1, 2)],
    },
    "twice": {"nodes": (2, 2)},
    "no client": {"nodes": (1, 2)},
    "several contents": {"nodes": (2, 3), "contents": [RecordDict(), RecordDict()]},
    "query": {"kind": "query"},
    "no model": {"nodes": (2,), "contents": [RecordDict({"config": ConfigRecord({})})]},
}


def test_settings_that_differ_are_each_client_s_own():
    messages = foreign((3, 2), contents=[_settings(x=1, y=5), _settings(x=2, y=5)])
    sent = Cohort.from_messages(messages, LAYOUT)
    assert dict(sent.config) == {"y": 5}
    assert [dict(own) for own in sent.own] == [{"x": 2}, {"x": 1}]
    assert dict(sent.altered(ttl=1.0)[0].content["config"]) == {"server-round": 2, "x": 2, "y": 5}


@pytest.mark.parametrize("arguments", NO_COHORTS.values(), ids=NO_COHORTS)
def test_messages_that_are_no_cohort_are_left_alone(arguments):
    assert Cohort.from_messages(foreign(**arguments), LAYOUT) is None


def test_a_foreign_model_of_another_layout_is_refused():
    content = RecordDict({"arrays": ArrayRecord({})})
    with pytest.raises(ValueError, match=r"arrays are missing \['b'"):
        Cohort.from_messages(foreign(nodes=(2,), contents=[content]), LAYOUT)


# --- replies are a lazy sequence of messages ------------------------------------------------------


def test_replies_follow_flowers_convention():
    message = replies(extra={"c": torch.tensor([[1.0], [2.0], [3.0]])})[1]
    assert message.metadata.src_node_id == 5
    assert message.metadata.message_type == "train"
    assert dict(message.content["metrics"]) == {"num-examples": 2, "loss": 0.5}
    assert arrays_of(message)["b"] == [15, 16, 17]
    assert message.content["extra"]["c"].numpy().tolist() == [2]
    assert [a.dtype for a in message.content["arrays"].values()] == [
        "float32", "float64", "int64", "float32"
    ]  # fmt: skip


def test_a_reply_is_built_once_and_kept():
    received = replies()
    assert received[2] is received[2]
    assert next(iter(received)) is received[0]


def test_the_update_is_what_each_client_moved():
    assert torch.equal(replies().update[2], torch.arange(18.0, 27.0).double() - 1)
    own = torch.arange(27.0, dtype=torch.float64).reshape(3, 9)
    assert not replies(reference=own).update.any()


def test_replies_to_an_evaluation_hold_no_update():
    with pytest.raises(ValueError, match="no update"):
        _ = replies(params=None, reference=None).update


def test_a_fault_is_an_error_message_after_the_replies_and_an_absence_is_none():
    failures = (Failure(9, 2, "raised", "no luck"), Failure(4, 2, "absent", "was not there"))
    received = replies(failures=failures)
    assert (len(received), received.num_clients) == (4, 3)
    assert received[3].has_error()
    assert received[3].error.reason == "no luck"
    assert received[3].metadata.src_node_id == 11


def test_messages_become_the_stack_that_they_came_from():
    sent = cohort()
    received = replies(extra={"c": torch.tensor([[1.0], [2.0], [3.0]])})
    again = Replies.from_messages(list(received), sent)
    assert torch.equal(again.params, received.params)
    assert torch.equal(again.num_examples, received.num_examples)
    assert fed.named_bits(again.buffers) == fed.named_bits(received.buffers)
    assert fed.named_bits(again.extra) == fed.named_bits(received.extra)
    assert fed.named_bits(again.metrics) == fed.named_bits(received.metrics)
    assert torch.equal(again.reference, sent.shared.params)
    assert [again[k] is received[k] for k in range(3)] == [True] * 3


def test_replies_start_from_the_personal_model_that_their_client_received():
    own = torch.arange(27.0, dtype=torch.float64).reshape(3, 9)
    sent = cohort(shared=Payload(None, BUFFERS), personal=Payload(own))
    received = Replies.from_messages([replies()[2], replies()[0]], sent)
    assert received.client_ids.tolist() == [0, 5]
    assert torch.equal(received.reference, own[[0, 2]])


def test_selected_rows_keep_their_messages():
    received = replies()
    last = received[2]
    chosen = received.select(np.array([False, True, True]))
    assert chosen.client_ids.tolist() == [3, 5]
    assert chosen[1] is last
    assert chosen[0].metadata.src_node_id == 5
    assert torch.equal(chosen.params, received.params[1:])


def test_no_reply_is_an_empty_stack():
    nobody = Replies.from_messages([], cohort())
    assert nobody.params.shape == (0, 9)
    assert [f.client_id for f in nobody.failures] == [0, 3, 5]
    assert {n: t.shape[0] for n, t in nobody.buffers.items()} == dict.fromkeys(BUFFERS, 0)


# --- finite ---------------------------------------------------------------------------------------


@given(
    values=st.lists(
        st.sampled_from([0.0, -1.5, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]),
        min_size=12, max_size=12,
    ),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    shape=st.sampled_from([(4, 3), (3, 2, 2), (12,), (1, 12)]),
)  # fmt: skip
def test_rows_are_finite_exactly_when_every_number_of_theirs_is(values, dtype, shape):
    stack = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    expected = torch.isfinite(stack.reshape(shape[0], -1)).all(dim=1).numpy()
    np.testing.assert_array_equal(finite_rows(stack), expected)


# --- bytes ----------------------------------------------------------------------------------------


def real_bytes(messages):
    """The length of real messages, with ids of the length that Flower's have."""
    total = 0
    for number, message in enumerate(messages):
        internals.set_message_id(message, f"{number:064x}")
        total += internals.wire_bytes(message)
    return total


extras = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from([torch.zeros(1), torch.zeros(2, 40).double(), torch.tensor(7), torch.zeros(0)]),
    max_size=3,
)
rounds = st.integers(1, 10**6)
configs = st.dictionaries(
    st.sampled_from(["lr", "mode", "flag", "list", "größe"]),
    st.one_of(
        st.floats(), st.text(max_size=9), st.booleans(), st.lists(st.integers(0, 2**40), min_size=1)
    ),
)


@given(
    nodes=st.lists(st.integers(2, 2**62), min_size=1, max_size=6, unique=True),
    server_round=rounds,
    extra=extras,
    config=configs,
    kind=st.sampled_from(["train", "evaluate", SETUP]),
    ttl=st.floats(1, 1e6),
    personal=st.booleans(),
)
def test_a_cohorts_bytes_are_those_of_its_messages(
    nodes, server_round, extra, config, kind, ttl, personal
):
    count = len(nodes)
    own = {name: torch.stack([tensor] * count) for name, tensor in extra.items()}
    params = torch.arange(9.0, dtype=torch.float64)
    sent = cohort(
        range(count),
        node_ids=np.array(nodes, dtype=np.int64),
        server_round=server_round,
        shared=Payload(None if personal else params, BUFFERS, {} if personal else extra),
        personal=Payload(torch.stack([params] * count), {}, own) if personal else Payload(),
        config=config,
        message_type=kind,
        ttl=ttl,
    )
    assert cohort_bytes(sent) == real_bytes(sent)


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    clients=st.lists(st.integers(0, 2**62), min_size=1, max_size=6, unique=True).map(sorted),
    examples=st.lists(st.integers(-(2**40), 2**62), min_size=6, max_size=6),
    server_round=rounds,
    extra=extras,
    values=st.lists(finite, min_size=6, max_size=6),
    trained=st.booleans(),
    ttl=st.floats(1, 1e6),
)
@example(  # where the length of an integer on the wire changes
    clients=[0, 125, 126, 2**14 - 3, 2**14 - 2, 2**62],
    examples=[63, 64, -64, -65, 2**13 - 1, 2**13],
    server_round=9,
    extra={},
    values=[0.0, -0.0, 1.0, 1e300, 5e-324, 0.1],
    trained=True,
    ttl=43200.0,
)
def test_replies_bytes_are_those_of_their_messages(
    clients, examples, server_round, extra, values, trained, ttl
):
    count = len(clients)
    received = replies(
        clients,
        server_round=server_round,
        num_examples=torch.tensor(examples[:count]),
        extra={name: torch.stack([t] * count) for name, t in extra.items()},
        metrics={
            "loss": torch.tensor(values[:count], dtype=torch.float64),
            "größe": torch.ones(count),
        },
        message_type="train" if trained else "evaluate",
        ttl=ttl,
        **({} if trained else {"params": None, "reference": None, "buffers": {}}),
    )
    assert replies_bytes(received) == real_bytes(received)


@pytest.mark.parametrize("model", fed.MODELS)
def test_the_bytes_of_a_real_round_are_those_of_its_messages(model):
    app = fed.make_app(model)
    counting = ByteCountingGrid(InlineGrid(app, 8))
    strategy = fed.make_strategy("fedavg")
    strategy.declare_buffers([spec.name for spec in app.layout.buffers])
    sent = fed.configure(strategy, counting, fed.initial_arrays(model))
    received = counting.send_and_receive(sent)
    assert counting.take() == (real_bytes(sent), real_bytes(received))
    assert counting.take() == (0, 0)


def test_the_bytes_of_a_foreign_strategys_round_are_those_of_its_messages():
    app = fed.make_app()
    counting = ByteCountingGrid(InlineGrid(app, 8))
    sent = list(fed.configure(fed.make_strategy("flower:FedAvg"), counting, fed.initial_arrays()))
    down = real_bytes(sent)
    received = counting.send_and_receive(sent)
    assert counting.take() == (down, real_bytes(received))


def test_the_bytes_of_failures_are_counted():
    received = replies(failures=(Failure(9, 2, "raised", "no luck"), Failure(4, 2, "absent", "-")))
    assert replies_bytes(received) == real_bytes(received) > replies_bytes(replies())


def test_a_cohort_of_nobody_takes_no_bytes():
    assert cohort_bytes(cohort(())) == 0


# --- pushed and pulled ----------------------------------------------------------------------------


def test_a_pushed_cohort_is_pulled_by_its_messages_ids():
    app = fed.make_app()
    sender, pusher = InlineGrid(app, 8), InlineGrid(app, 8)
    strategy = fed.make_strategy("fedavg")
    expected = sender.send_and_receive(fed.configure(strategy, sender, fed.initial_arrays()))
    ids = list(pusher.push_messages(fed.configure(strategy, pusher, fed.initial_arrays())))
    assert len(set(ids)) == 8
    pulled = list(pusher.pull_messages(ids))
    assert [m.metadata.reply_to_message_id for m in pulled] == ids
    for one, other in zip(pulled, expected, strict=True):
        assert fed.record_bits(one.content["arrays"]) == fed.record_bits(other.content["arrays"])
    assert list(pusher.pull_messages(ids)) == []


@pytest.mark.parametrize("name", ["arrays", "model"])
def test_bytes_of_foreign_messages_are_those_that_are_sent(name):
    app = fed.make_app()
    record = model_record(app.layout, fed.initial_payload(app.executor).params, {})
    content = RecordDict({name: record, "settings": ConfigRecord({SERVER_ROUND: 1})})
    messages = [Message(content, node, MessageType.TRAIN) for node in (2, 3)]
    due = sum_of_bytes(messages)
    counting = ByteCountingGrid(InlineGrid(app, 8))
    counting.send_and_receive(messages)
    assert counting.take()[0] == due


def test_a_query_passes_by_and_is_refused_where_replies_are_admitted():
    class Answering(ClientApp):
        def __call__(self, message, context):
            return Message(RecordDict({"told": ConfigRecord({"x": 1})}), reply_to=message)

    app = fed.make_app()
    query = [Message(RecordDict(), 2, MessageType.QUERY)]
    (reply,) = ByteCountingGrid(InlineGrid(Answering(), 8)).send_and_receive(query)
    assert reply.content["told"]["x"] == 1
    with pytest.raises(MessagesError, match="messages of the kind 'query'"):
        AdmissionGrid(InlineGrid(app, 8), app.layout).send_and_receive(query)
