"""Replies over a SuperLink are found soon, once each, and none after its time."""

import itertools
from types import SimpleNamespace

import pytest

from fedsim.federation.grids import prompt as module
from fedsim.federation.grids.prompt import PromptGrid, prompt


class Link:
    """A SuperLink with a clock: each instruction is answered after so many seconds."""

    def __init__(self, after):
        self.now, self.after, self.sent, self.looks = 0.0, list(after), {}, []
        self.numbers = itertools.count()

    def push_messages(self, messages):
        for seconds in self.after[: len(list(messages))]:
            self.sent[f"m{next(self.numbers)}"] = self.now + seconds
        return list(self.sent)

    def pull_messages(self, waiting):
        self.looks.append(self.now)
        self.now += 0.01
        return [
            SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=each))
            for each in sorted(waiting)
            if self.sent[each] <= self.now
        ]


def exchanged(monkeypatch, after, timeout=None):
    link = Link(after)

    def sleep(seconds):
        assert seconds > 0
        link.now += seconds

    monkeypatch.setattr(module.time, "monotonic", lambda: link.now)
    monkeypatch.setattr(module.time, "sleep", sleep)
    found = PromptGrid(link).send_and_receive(range(len(after)), timeout=timeout)
    return [each.metadata.reply_to_message_id for each in found], link


def test_every_reply_is_found_once_and_soon_after_it_came(monkeypatch):
    found, link = exchanged(monkeypatch, [4.0, 0.0, 1.0, 60.0])
    assert found == ["m1", "m2", "m0", "m3"]
    assert link.now < 60 + 3.1
    assert len(link.looks) < 0.3 * 60 / 0.2  # a SuperLink is not asked all the time


@pytest.mark.parametrize("after", [0.1, 2.0, 5.0])
def test_a_reply_waits_no_longer_than_a_share_of_what_it_took(monkeypatch, after):
    _, link = exchanged(monkeypatch, [after])
    assert link.now - after < 0.25 + 0.06 * after


def test_who_has_not_answered_in_time_is_not_waited_for(monkeypatch):
    found, link = exchanged(monkeypatch, [1.0, 30.0], timeout=10.0)
    assert found == ["m0"]
    assert 10.0 <= link.now < 10.1
    found, link = exchanged(monkeypatch, [9.99], timeout=10.0)
    assert found == ["m0"]


def test_nothing_is_asked_when_nothing_was_sent(monkeypatch):
    found, link = exchanged(monkeypatch, [])
    assert (found, link.looks) == ([], [])


def test_only_a_grid_of_flower_s_own_is_asked_more_often():
    from flwr.serverapp import Grid

    theirs = type("Theirs", (Grid,), {"__module__": "flwr.superlink.grid"})
    ours = type("Ours", (Grid,), {"__module__": "flwrish.grid"})
    for kind in (theirs, ours):
        kind.__abstractmethods__ = frozenset()
    assert isinstance(prompt(theirs()), PromptGrid)
    grid = ours()
    assert prompt(grid) is grid
