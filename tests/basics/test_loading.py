"""Garbage is not looked for while something loads, and is looked for ever after."""

import gc

import pytest

from fedsim.basics import loading
from fedsim.basics.loading import loads
from tests.basics.processes import run


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch):
    monkeypatch.setattr(loading, "_loaded", set())


def test_the_first_use_alone_is_spared():
    for expected in (False, True):
        with loads("vmap"):
            assert gc.isenabled() == expected
        assert gc.isenabled()
    with loads("another"):
        assert not gc.isenabled()


def test_collections_go_on_after_an_error():
    with pytest.raises(ZeroDivisionError), loads("vmap"):
        _ = 1 / 0
    assert gc.isenabled()


def test_who_has_turned_them_off_keeps_them_off():
    gc.disable()
    try:
        with loads("vmap"):
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


SPARED = """
import gc, json
from fedsim.basics.loading import is_spared, spare_what_is_loaded
before, kept = is_spared(), []
kept.append(kept)
spare_what_is_loaded()
held = any(each is kept for each in gc.get_objects())
later = []
later.append(later)
del later
print(json.dumps([before, is_spared(), held, gc.collect() > 0]))
"""


def test_what_is_loaded_is_passed_over_and_what_comes_later_is_not():
    assert run(SPARED) == [False, True, False, True]
