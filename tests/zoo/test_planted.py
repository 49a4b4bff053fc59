"""Faults planted in fedsim, each of which the standing search must find."""

import contextlib
import random

import pytest
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from fedsim.basics import generators, kept_state
from fedsim.basics.sources import NO_CODE
from fedsim.client import trial
from fedsim.client.batching.dropout import SeededDropout
from tests.zoo.test_search import CLIENTS, EXECUTORS, SOME, WHERE, WIDTHS, composed, edited

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DRAWN = st.tuples(SOME, EXECUTORS, CLIENTS)
MOST = settings(max_examples=200, deadline=None, database=None, derandomize=False)
GOES = 5  # each with other draws, as `make zoo` goes on


def fails(drawn, search=composed):
    """Whether the search would report these draws."""
    try:
        search(*drawn)
    except Exception:
        return True
    return False


def found(draws, condition):
    """The simplest draws that meet a condition."""
    for go in range(GOES):
        with contextlib.suppress(NoSuchExample):
            return find(draws, condition, settings=MOST, random=random.Random(go))
    raise AssertionError(f"nothing found in {GOES} goes")


def a_stale_study(patch):
    patch.setattr("fedsim.scenario.scenario.code_behind", lambda *_: NO_CODE)


def a_leak_between_clients(patch):
    patch.setattr(kept_state.KeptState, "put_back", lambda self: None)


def a_dropped_attribute(patch):
    places = kept_state.KeptState._of_owners

    def all_but_one(self):
        return (place for place in places(self) if place.name != "steps")

    patch.setattr(kept_state.KeptState, "_of_owners", all_but_one)


def a_wrong_probe(patch):
    patch.setattr(trial, "_why_in_turn", lambda *_: None)
    patch.setattr(trial._Trial, "why_not_together", lambda *_: None)
    patch.setattr("fedsim.client.plan.why_loop", lambda *_: None)


def an_unseeded_generator(patch):
    patch.setattr(generators.random, "seed", lambda *_: None)


def masks_that_are_not_drawn(patch):
    patch.setattr(trial, "why_not_seeded", lambda *_: None)
    patch.setattr(SeededDropout, "_drawn", lambda self, values: values)


@pytest.mark.parametrize(
    "fault",
    [a_leak_between_clients, a_dropped_attribute, a_wrong_probe, an_unseeded_generator,
     masks_that_are_not_drawn],
)  # fmt: skip
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    assert fails(found(DRAWN, fails))


def test_a_planted_stale_study_is_found(monkeypatch):
    a_stale_study(monkeypatch)
    draws = st.tuples(WIDTHS, st.sampled_from(WHERE))
    drawn = found(draws, lambda each: fails(each, edited))
    assert fails(drawn, edited)
