"""Law 14: a reply reaches a strategy only as expected; what is refused is counted by its cause."""

import json
import math
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedsim
from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals
from fedsim.messages.admission import MAX_EXAMPLES, finite_rows
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.records import array_record
from fedsim.messages.replies import Replies
from fedsim.runs.policy import Policy
from tests.laws import federations as fed
from tests.laws.dropping import DropOutGrid

LAYOUT = Layout.from_named(
    {"w": torch.zeros(2, 3), "b": torch.zeros(3), "n.num_batches_tracked": torch.tensor(0)}
)
CLIENTS = 4
CULPRIT = 2  # the third of four clients


def cohort(client_ids=range(CLIENTS), **changes):
    buffers = {"n.num_batches_tracked": torch.tensor(5)}
    fields = {
        "client_ids": np.array(list(client_ids), dtype=np.int64),
        "server_round": 3,
        "layout": LAYOUT,
        "shared": Payload(torch.arange(9.0), buffers),
    }
    return Cohort(**{**fields, **changes})


def arrays(**changes):
    """A good reply's arrays with some replaced; None leaves one out."""
    named = {
        "w": np.ones((2, 3), np.float32),
        "b": np.ones(3, np.float32),
        "n.num_batches_tracked": np.array(6),
    }
    named = {name: value for name, value in {**named, **changes}.items() if value is not None}
    return ArrayRecord(
        {name: a if isinstance(a, Array) else Array(np.asarray(a)) for name, a in named.items()}
    )


def content(record=None, metrics=None, **more):
    found = RecordDict({"arrays": arrays() if record is None else record, **more})
    found["metrics"] = MetricRecord(
        {"num-examples": 7, "loss": 0.5} if metrics is None else metrics
    )
    return found


def without(key):
    whole = content()
    del whole[key]
    return whole


def payload(data=b"", *, stype="numpy.ndarray"):
    """An array as a client could write it by hand."""
    return Array(dtype="float32", shape=(3,), stype=stype, data=data)


def saved(array, *, allow_pickle=False):
    file = BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def zipped(array):
    file = BytesIO()
    np.savez(file, b=array)
    return file.getvalue()


class Bomb:
    """Unpickling this is the end."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a reply was unpickled')",)


NAN, INF = np.array([0, math.nan, 0], np.float32), np.array([0, 0, -math.inf], np.float32)

REFUSED = {
    "a missing tensor": ("names", content(arrays(b=None))),
    "a missing buffer": ("names", content(arrays(**{"n.num_batches_tracked": None}))),
    "an unknown tensor": ("names", content(arrays(c=np.ones(3)))),
    "no arrays": ("names", without("arrays")),
    "a name that speaks of shape": ("names", content(arrays(shape=np.ones(3)))),
    "another shape": ("shape", content(arrays(b=np.ones(4, np.float32)))),
    "a scalar for a vector": ("shape", content(arrays(b=np.float32(1)))),
    "the transposed matrix": ("shape", content(arrays(w=np.ones((3, 2), np.float32)))),
    "float64 for float32": ("dtype", content(arrays(b=np.ones(3)))),
    "integers for floats": ("dtype", content(arrays(b=np.ones(3, np.int32)))),
    "a float counter": ("dtype", content(arrays(**{"n.num_batches_tracked": np.float32(6)}))),
    "big-endian floats": ("dtype", content(arrays(b=np.ones(3, ">f4")))),
    "text": ("dtype", content(arrays(b=np.array(["a", "b", "c"])))),
    "complex numbers": ("dtype", content(arrays(b=np.ones(3, np.complex64)))),
    "NaN": ("not finite", content(arrays(b=NAN))),
    "infinity": ("not finite", content(arrays(b=INF))),
    "a negative count": ("num-examples", content(metrics={"num-examples": -1, "loss": 0.5})),
    "an absurd count": (
        "num-examples",
        content(metrics={"num-examples": MAX_EXAMPLES + 1, "loss": 0.5}),
    ),
    "a count beyond 64 bits": (
        "num-examples",
        content(metrics={"num-examples": 2**70, "loss": 0.5}),
    ),
    "a fractional count": ("num-examples", content(metrics={"num-examples": 7.0, "loss": 0.5})),
    "several counts": ("num-examples", content(metrics={"num-examples": [7, 7], "loss": 0.5})),
    "no count": ("num-examples", content(metrics={"loss": 0.5})),
    "no metrics": ("num-examples", without("metrics")),
    "a metric that is NaN": ("metrics", content(metrics={"num-examples": 7, "loss": math.nan})),
    "a metric beyond floats": ("metrics", content(metrics={"num-examples": 7, "loss": 10**400})),
    "odd extras": ("names", content(extra=ArrayRecord({"c": Array(np.ones(2))}))),
}
UNREADABLE = {
    "a pickled object": payload(saved(np.array([Bomb()] * 3, object), allow_pickle=True)),
    "no bytes": payload(),
    "noise": payload(b"\x93NUMPYnoise"),
    "half an array": payload(saved(np.ones(3, np.float32))[:-3]),
    "an archive": payload(zipped(np.ones(3, np.float32))),
    "a broken archive": payload(b"PK\x03\x04 and no more"),
    "another serialisation": payload(saved(np.ones(3, np.float32)), stype="torch.save"),
    "a header alone": payload(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': 0, }\n"),
    "dates": payload(saved(np.ones(3, "datetime64[s]"))),
    "records": payload(saved(np.ones(3, [("a", "<f4"), ("b", "<f4")]))),
}


def reply(instruction, answer):
    metadata = internals.reply_metadata(instruction.metadata, message_id="0" * 64, created_at=1.0)
    return internals.message_with(metadata, content=answer)


def replies_with(answer, sent):
    """One reply from each client, the culprit's as given, all others good and alike."""
    return [
        reply(message, answer if client == CULPRIT else content())
        for client, message in zip(sent.client_ids.tolist(), sent, strict=True)
    ]


def causes(replies):
    return [(failure.client_id, failure.cause) for failure in replies.failures]


@pytest.mark.parametrize(("cause", "answer"), REFUSED.values(), ids=REFUSED)
def test_a_bad_reply_is_refused_with_its_cause_and_nobody_elses(cause, answer):
    sent = cohort()
    admitted = Replies.from_messages(replies_with(answer, sent), sent).admit()
    assert causes(admitted) == [(CULPRIT, cause)]
    assert admitted.client_ids.tolist() == [0, 1, 3]
    assert torch.equal(admitted.params, torch.ones(3, 9))


@pytest.mark.parametrize("group", ["arrays", "extra"])
@pytest.mark.parametrize("array", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_array_is_refused_and_never_unpickled(array, group):
    answer = (
        content(arrays(b=array)) if group == "arrays" else content(extra=ArrayRecord({"c": array}))
    )
    sent = cohort()
    admitted = Replies.from_messages(replies_with(answer, sent), sent).admit()
    assert [failure.client_id for failure in admitted.failures] == [CULPRIT]
    assert admitted.failures[0].cause in ("names", "shape", "dtype")
    assert admitted.client_ids.tolist() == [0, 1, 3]


def test_extras_that_are_not_finite_are_refused():
    sent = cohort()
    extras = [np.ones(3, np.float32), np.ones(3, np.float32), NAN, INF]
    messages = [
        reply(message, content(extra=ArrayRecord({"c": Array(extra)})))
        for message, extra in zip(sent, extras, strict=True)
    ]
    admitted = Replies.from_messages(messages, sent).admit()
    assert causes(admitted) == [(2, "not finite"), (3, "not finite")]
    assert torch.equal(admitted.extra["c"], torch.ones(2, 3))


def test_every_failure_says_who_when_and_why():
    sent = cohort()
    admitted = Replies.from_messages(
        replies_with(content(arrays(b=np.ones(4, np.float32))), sent), sent
    )
    (failure,) = admitted.failures
    assert str(failure) == "client 2, round 3: shape: 'b' has shape (4,), expected (3,)"


def test_a_second_reply_does_not_count():
    sent = cohort()
    twice = [
        *replies_with(content(), sent),
        reply(sent[CULPRIT], content(arrays(b=np.full(3, 9, np.float32)))),
    ]
    admitted = Replies.from_messages(twice, sent).admit()
    assert causes(admitted) == [(CULPRIT, "twice")]
    assert torch.equal(admitted.params, torch.ones(4, 9))


def test_a_client_with_a_bad_and_a_good_reply_is_not_both_failed_and_counted():
    sent = cohort()
    good = content()
    for first, second in ((content(arrays(b=None)), good), (good, content(arrays(b=None)))):
        messages = [*replies_with(first, sent), reply(sent[CULPRIT], second)]
        admitted = Replies.from_messages(messages, sent).admit()
        failed = {client for client, cause in causes(admitted) if cause != "twice"}
        assert not failed & set(admitted.client_ids.tolist())


def test_a_stranger_does_not_count():
    sent = cohort()
    stranger = reply(cohort([9])[0], content())
    admitted = Replies.from_messages([stranger, *replies_with(content(), sent)], sent).admit()
    assert causes(admitted) == [(9, "stranger")]
    assert admitted.client_ids.tolist() == [0, 1, 2, 3]


def test_a_missing_reply_is_an_absence():
    sent = cohort()
    admitted = Replies.from_messages(replies_with(content(), sent)[:3], sent).admit()
    assert causes(admitted) == [(3, "absent")]


def test_an_error_is_a_failure_with_its_reason():
    sent = cohort()
    messages = replies_with(content(), sent)
    metadata = messages[CULPRIT].metadata
    messages[CULPRIT] = internals.message_with(metadata, error=Error(2, "no data on this device"))
    (failure,) = Replies.from_messages(messages, sent).admit().failures
    assert (failure.client_id, failure.cause) == (CULPRIT, "raised")
    assert "no data on this device" in failure.reason


def test_which_extras_are_odd_does_not_depend_on_the_order_of_arrival():
    sent = cohort([0, 1])
    messages = [
        reply(sent[0], content(extra=ArrayRecord({"c": Array(np.ones(2, np.float32))}))),
        reply(sent[1], content()),
    ]
    there = Replies.from_messages(messages, sent)
    back = Replies.from_messages(messages[::-1], sent)
    assert causes(there) == causes(back)
    assert there.client_ids.tolist() == back.client_ids.tolist()


def test_a_client_that_leaves_out_a_metric_does_not_silence_the_others():
    sent = cohort()
    answer = content(metrics={"num-examples": 7})
    admitted = Replies.from_messages(replies_with(answer, sent), sent).admit()
    assert causes(admitted) == [(CULPRIT, "metrics")]
    assert admitted.metrics["loss"].tolist() == [0.5] * 3


def test_stacks_of_the_engine_are_admitted_by_the_same_measure():
    sent = cohort()
    stack = Replies.from_messages(replies_with(content(), sent), sent)
    bad = {
        "params": (stack.params.clone().index_fill_(0, torch.tensor(1), math.nan), "not finite"),
        "num_examples": (torch.tensor([7, -1, 7, 7]), "num-examples"),
        "metrics": ({"loss": torch.tensor([0.5, math.inf, 0.5, 0.5]).double()}, "metrics"),
    }
    for field, (value, cause) in bad.items():
        admitted = replace(stack, **{field: value}).admit()
        assert causes(admitted) == [(1, cause)]
        assert admitted.client_ids.tolist() == [0, 2, 3]


def test_a_client_without_examples_is_admitted():
    sent = cohort()
    answer = content(metrics={"num-examples": 0, "loss": 0.0})
    assert not Replies.from_messages(replies_with(answer, sent), sent).admit().failures


# --- through the grid and the round loop ----------------------------------------------------------


class Tampering(GridWrapper):
    """Replaces one client's reply."""

    def __init__(self, inner, answer):
        super().__init__(inner)
        self.answer = answer

    def send_and_receive(self, messages, *, timeout=None):
        return [
            internals.message_with(message.metadata, content=self.answer)
            if message.metadata.src_node_id == internals.node_of(CULPRIT)
            else message
            for message in self.inner.send_and_receive(messages, timeout=timeout)
        ]


def logistic(**changes):
    named = {"output.weight": np.zeros((3, 16), np.float32), "output.bias": np.zeros(3, np.float32)}
    return array_record({n: torch.from_numpy(a) for n, a in {**named, **changes}.items()})


IN_A_RUN = {
    "names": content(ArrayRecord({"x": Array(np.ones(3, np.float32))})),
    "shape": content(logistic(**{"output.bias": np.zeros(4, np.float32)})),
    "dtype": content(logistic(**{"output.bias": np.zeros(3)})),
    "not_finite": content(logistic(**{"output.bias": NAN})),
    "num-examples": content(logistic(), metrics={"num-examples": -5}),
    "metrics": content(logistic(), metrics={"num-examples": 5, "loss": math.inf}),
}


@pytest.mark.parametrize("strategy", ["fedavg", "flower:FedAvg"])
@pytest.mark.parametrize("cause", IN_A_RUN)
def test_the_loop_counts_refused_replies_by_cause_and_goes_on(cause, strategy):
    app = fed.make_app()
    grid = Tampering(InlineGrid(app, 8), IN_A_RUN[cause])
    arrays, records = fed.run_rounds(
        fed.make_strategy(strategy), grid, fed.initial_arrays(), app.layout, rounds=2
    )
    for record in records[1:]:
        assert record[f"clients/failed/{cause}"] == record["clients/failed"] == 1
        assert (record["clients/selected"], record["clients/replied"]) == (8, 7)
    assert all(np.isfinite(array.numpy()).all() for array in arrays.values())


def test_a_refused_client_weighs_nothing():
    """The run equals one in which the client was asked and dropped out."""
    app = fed.make_app()
    outcomes = []
    for grid in (
        Tampering(InlineGrid(app, 8), IN_A_RUN["not_finite"]),
        DropOutGrid(InlineGrid(app, 8), lambda server_round: [CULPRIT]),
    ):
        arrays, _ = fed.run_rounds(
            fed.make_strategy("fedavg"), grid, fed.initial_arrays(), app.layout, rounds=2
        )
        outcomes.append(fed.record_bits(arrays))
    assert outcomes[0] == outcomes[1]


def test_a_refused_client_keeps_no_memory_of_the_round():
    """Memory is committed with the reply; a reply that does not count leaves none."""
    procedure = fed.make_procedure("local_sgd", momentum=0.9, keep_optimizer=True)
    grid = fed.make_grid("logistic", procedure, fed.InMemoryData(broken=(7,)))
    _, records = fed.run_rounds(
        fed.make_strategy("fedavg"), grid, fed.initial_arrays(), grid.client_app.layout, rounds=1
    )
    assert records[-1]["clients/failed/not_finite"] == 1
    assert grid.store.export()[0] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_whose_policy_is_to_stop_names_the_first_culprit():
    app = fed.make_app()
    grid = Tampering(InlineGrid(app, 8), IN_A_RUN["shape"])
    with pytest.raises(RunError, match=r"client 2, round 1: shape: .*on_failure = 'stop'"):
        fed.run_rounds(
            fed.make_strategy("fedavg"),
            grid,
            fed.initial_arrays(),
            app.layout,
            policy=Policy("stop"),
        )


def test_a_round_with_too_few_good_replies_ends_the_run():
    app = fed.make_app()
    grid = Tampering(InlineGrid(app, 8), IN_A_RUN["dtype"])
    with pytest.raises(RunError, match=r"round 1: 7 of 8 clients replied, .*min_replies = 8"):
        fed.run_rounds(
            fed.make_strategy("fedavg"),
            grid,
            fed.initial_arrays(),
            app.layout,
            policy=Policy(min_replies=8),
        )


def test_an_unreadable_reply_of_a_foreign_client_app_does_not_end_a_run():
    def answer(message, context):
        bad = context.node_config["partition-id"] == CULPRIT
        record = message.content["arrays"]
        if bad:
            record = ArrayRecord(dict.fromkeys(record, UNREADABLE["a pickled object"]))
        metrics = MetricRecord({"num-examples": 2, "loss": 0.5})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    app = ClientApp()
    app.train()(answer)
    layout = fed.make_executor().layout
    for strategy in ("fedavg", "flower:FedAvg"):
        _, records = fed.run_rounds(
            fed.make_strategy(strategy),
            AdmissionGrid(InlineGrid(app, 4), layout),
            fed.initial_arrays(),
            layout,
            rounds=1,
            cohorts=(range(4),),
        )
        assert records[-1]["clients/replied"] == 3


@pytest.mark.parametrize("remembers", [False, True])
def test_every_reply_of_a_round_is_looked_at_once(tmp_path, monkeypatch, remembers):
    """By the engine that keeps clients' states, the Grid that admits and the strategy together."""
    looked = []

    def counting(stack):
        looked.append(len(stack))
        return finite_rows(stack)

    monkeypatch.setattr("fedsim.messages.admission.finite_rows", counting)
    keeps = f"client.keep_optimizer={str(remembers).lower()}"
    scenario = fedsim.load_scenario(
        "quickstart", ["engine.kind=inline", "rounds=3", "client.momentum=0.9", keeps]
    )
    fedsim.start(scenario, out=tmp_path / "run")
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert looked == [each["clients/replied"] for each in records if each["round"] > 0]
