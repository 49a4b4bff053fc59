"""Which classes and functions a checkpoint may name."""

import pytest

from fedsim.messages.layout import Payload
from fedsim.strategy.declarations import NoState
from fedsim.strategy.held.trust import Known, label_of

KNOWN = Known([])


@pytest.mark.parametrize("thing", [Payload, NoState, Known.find])
def test_what_lies_where_its_label_says_is_found(thing):
    assert KNOWN.find(label_of(thing)) is thing


@pytest.mark.parametrize(
    ("label", "thing"),
    [
        ("fedsim.layout:Payload", Payload),  # the module is gone
        ("fedsim.strategy:NoState", NoState),  # a package now, which exports it
        ("fedsim.one.that.never.was:NoState", NoState),
    ],
)
def test_a_class_of_fedsim_is_found_where_it_moved_to(label, thing):
    assert KNOWN.find(label) is thing


@pytest.mark.parametrize(
    "label",
    [
        "fedsim.layout:Nothing",
        "fedsim.layout:Payload.nothing",
        "fedsim.layout:os",  # imported by some modules, defined by none
        "elsewhere.layout:Payload",
        "fedsims:Payload",
        "os:system",
        "fedsim.layout:",
        "",
    ],
)
def test_nothing_else_is_found_by_its_name(label):
    assert KNOWN.find(label) is None
