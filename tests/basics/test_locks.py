"""One process at a time, and a look at whether there is one."""

import contextlib
import fcntl
import os
import threading
import time

import pytest

from fedsim.basics.errors import BusyError
from fedsim.basics.locks import is_held, one_at_a_time


def locked(file, busy="busy"):
    return one_at_a_time(file, making=contextlib.nullcontext(), busy=busy)


def test_a_look_tells_whether_a_lock_is_held(tmp_path):
    file = tmp_path / "lock"
    with locked(file):
        assert is_held(file)
    assert not is_held(file)


def test_a_look_takes_nothing_away(tmp_path):
    file = tmp_path / "lock"
    with locked(file):
        is_held(file)
        with pytest.raises(BusyError, match="busy"), locked(file):
            pass


def test_who_takes_a_lock_waits_for_a_look_to_be_over(tmp_path):
    file = tmp_path / "lock"
    file.touch()
    looking = os.open(file, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    ends = threading.Timer(0.05, os.close, [looking])
    ends.start()
    with locked(file):
        assert is_held(file)
    ends.join()


def test_who_finds_a_lock_taken_does_not_wait_long(tmp_path):
    file = tmp_path / "lock"
    with locked(file):
        begun = time.monotonic()
        with pytest.raises(BusyError), locked(file):
            pass
        assert time.monotonic() - begun < 5


def test_a_pipe_in_place_of_a_lock_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "lock")
    assert not is_held(tmp_path / "lock")
