"""Which cases of a kind run by default, and which among the slow tests."""

import pytest


def by_turns(values, every=3):
    """Cases of which one in `every`, the first one included, runs by default."""
    return [
        value if place % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for place, value in enumerate(values)
    ]


def slow(value):
    """A case that runs among the slow tests."""
    return pytest.param(value, marks=pytest.mark.slow)
