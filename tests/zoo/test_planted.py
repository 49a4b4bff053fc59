"""Faults planted in fedsim, each of which the standing search must find."""

import contextlib

import pytest
from hypothesis import find, settings
from hypothesis import strategies as st

from fedsim.basics import generators, kept_state
from fedsim.client import trial
from tests.zoo.test_search import CLIENTS, EXECUTORS, SOME, composed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DRAWN = st.tuples(SOME, EXECUTORS, CLIENTS)
MOST = settings(max_examples=300, deadline=None, database=None)


def fails(drawn):
    """Whether the search would report these draws."""
    try:
        composed(*drawn)
    except Exception:
        return True
    return False


def a_leak_between_clients(patch):
    patch.setattr(kept_state.KeptState, "put_back", lambda self: None)


def a_dropped_attribute(patch):
    places = kept_state.KeptState._attributes

    def all_but_one(self):
        return (place for place in places(self) if place.name != "steps")

    patch.setattr(kept_state.KeptState, "_attributes", all_but_one)


def a_wrong_probe(patch):
    patch.setattr(trial, "_why_in_turn", lambda *_: None)
    patch.setattr(trial._Trial, "why_not_together", lambda *_: None)
    patch.setattr("fedsim.plan.why_loop", lambda *_: None)


def an_unseeded_generator(patch):
    patch.setattr(generators.random, "seed", lambda *_: None)


def masks_that_are_not_drawn(patch):
    patch.setattr(trial, "_irregular", lambda _: None)


@pytest.mark.parametrize(
    "fault",
    [a_leak_between_clients, a_dropped_attribute, a_wrong_probe, an_unseeded_generator,
     masks_that_are_not_drawn],
)  # fmt: skip
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    with contextlib.suppress(KeyboardInterrupt):
        assert fails(find(DRAWN, fails, settings=MOST))
