"""A node that sends what it should not changes nothing: the bits are those of a run without it."""

import copy

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedsim.messages import flower_internals as internals
from tests.deployment.sites_apart import Sites, deployed, outcome, scenario, written

TABLES = "[admission]\nmax_update_norm = 50.0"


class Hostile(Sites):
    """The node of partition 0 answers every instruction to train in some other way."""

    def __init__(self, *given, send, **options):
        super().__init__(*given, **options)
        self.send = send

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        if {m.metadata.message_type for m in messages} != {"train"}:
            return replies
        found = []
        for reply in replies:
            mine = reply.metadata.src_node_id == self.nodes[0]
            found += self.send(self, reply) if mine else [reply]
        return found


def changed(change):
    def send(fleet, reply):
        change(reply.content)
        return [reply]

    return send


def of_model(make):
    """A reply whose arrays are made anew from those that were to be sent."""

    def change(content):
        (record,) = content.array_records.values()
        arrays = {name: array.numpy() for name, array in record.items()}
        content["arrays"] = ArrayRecord({n: as_array(a) for n, a in make(arrays).items()})

    return changed(change)


def as_array(values):
    if isinstance(values, Array):
        return values
    (array,) = ArrayRecord([values]).values()
    return array


def each(function):
    return of_model(lambda arrays: {n: function(a).astype(a.dtype) for n, a in arrays.items()})


def counting(count):
    def change(content):
        (metrics,) = content.metric_records.values()
        metrics["num-examples"] = count

    return changed(change)


def with_metric(value):
    def change(content):
        (metrics,) = content.metric_records.values()
        metrics["loss"] = value

    return changed(change)


def garbage(data):
    """An array that says it is one, and holds these bytes."""
    return of_model(
        lambda arrays: {
            n: Array(str(a.dtype), a.shape, "numpy.ndarray", data) for n, a in arrays.items()
        }
    )


# the header of an array of 16 TB, as `numpy.save` writes it, and no number
HUGE = b"\x93NUMPY\x01\x00\x76\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000,), }".ljust(117) + b"\n"
)

SENT = {
    "not a number": each(lambda a: a * np.nan),
    "infinity": each(lambda a: a + np.inf),
    "far away": each(lambda a: a + np.float32(1e30)),
    "somewhat far away": each(lambda a: a + np.float32(1e3)),
    "other names": of_model(lambda arrays: {f"x.{n}": a for n, a in arrays.items()}),
    "a tensor less": of_model(lambda arrays: dict(list(arrays.items())[1:])),
    "a tensor more": of_model(lambda arrays: {**arrays, "more": np.zeros(3, np.float32)}),
    "other shapes": of_model(lambda arrays: {n: a[..., None] for n, a in arrays.items()}),
    "another type": of_model(lambda arrays: {n: a.astype(np.float64) for n, a in arrays.items()}),
    "whole numbers": of_model(lambda arrays: {n: a.astype(np.int64) for n, a in arrays.items()}),
    "text": garbage(b"hello"),
    "nothing": garbage(b""),
    "a large header": garbage(HUGE),
    "64 MB of noise": garbage(b"\xff" * 2**26),
    "a pickle": garbage(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x93."),
    "more samples than it has": counting(10**9),
    "too many samples for anybody": counting(10**18),
    "less than none": counting(-5),
    "a loss that is none": with_metric(float("nan")),
    "no arrays": changed(lambda content: content.pop("arrays")),
    "no metrics": changed(lambda content: content.pop("metrics")),
}


def failing(fleet, reply):
    """The control: the node fails."""
    return [fleet._error(reply, 2, fleet.nodes[0], "it fails")]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A scenario, its files, and the outcome of a run in which the node fails."""
    folder = tmp_path_factory.mktemp("federation")
    files = written(folder / "data", sizes=(14, 9, 12))
    file = scenario(folder, files, tables=TABLES)
    there = deployed(file, files, folder / "run", grid=Hostile, send=failing)
    return file, files, outcome(there)


@pytest.mark.parametrize("what", SENT)
def test_what_a_node_should_not_send_changes_nothing_and_is_counted(what, without, tmp_path):
    file, files, expected = without
    there = deployed(file, files, tmp_path / "run", grid=Hostile, send=SENT[what])
    parameters, rounds = outcome(there)
    assert parameters == expected[0]
    assert [each["clients/failed"] for each in rounds[1:]] == [1, 1, 1]


GIGABYTES = 2 << 30


def two_gigabytes(whole):
    """Noise, or an array that is one, of other numbers than were asked for."""
    header = b""
    if whole:
        shape = f"({(GIGABYTES - 128) // 4},)"
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        header = b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n"
    return header + bytes(GIGABYTES - len(header))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_two_gigabytes_of_garbage_change_nothing_and_are_counted(whole, without, tmp_path):
    file, files, expected = without
    send = garbage(two_gigabytes(whole))
    there = deployed(file, files, tmp_path / "run", grid=Hostile, send=send)
    parameters, rounds = outcome(there)
    assert parameters == expected[0]
    assert [each["clients/failed"] for each in rounds[1:]] == [1, 1, 1]
    assert f"{GIGABYTES} bytes" in (there / "log.txt").read_text()  # it was not even read


def test_a_second_reply_takes_nothing_away_and_adds_nothing(without, tmp_path):
    file, files, expected = without

    def twice(fleet, reply):
        return [reply, copy.deepcopy(reply)]

    there = deployed(file, files, tmp_path / "run", grid=Hostile, send=twice)
    honest = deployed(file, files, tmp_path / "honest")
    assert outcome(there)[0] == outcome(honest)[0] != expected[0]
    assert [each["clients/failed"] for each in outcome(there)[1][1:]] == [1, 1, 1]


def test_a_reply_of_a_round_before_is_not_taken_for_this_one(without, tmp_path):
    file, files, expected = without
    kept = []

    def late(fleet, reply):
        kept.append(reply)
        return kept[-2:-1]  # what it answered a round before, if anything

    there = deployed(file, files, tmp_path / "run", grid=Hostile, send=late)
    assert outcome(there)[0] == expected[0]
    assert [each["clients/failed"] for each in outcome(there)[1][1:]] == [1, 1, 1]
    assert "answered none of this round's instructions" in (there / "log.txt").read_text()


def test_a_reply_to_another_node_s_instruction_is_not_taken(without, tmp_path):
    file, files, expected = without

    class Lying(Sites):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            replies = super().send_and_receive(messages, timeout=timeout)
            if {m.metadata.message_type for m in messages} != {"train"}:
                return replies
            # the first node's answer to its own instruction, as if it came from the second one
            internals.set_source(replies[0], self.nodes[1])
            return replies

    there = deployed(file, files, tmp_path / "run", grid=Lying)
    assert outcome(there)[0] == expected[0]
    assert [each["clients/failed"] for each in outcome(there)[1][1:]] == [1, 1, 1]
