"""Signs of life: who is silent, and who only works long."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from fedsim.engine import life, vigil
from fedsim.engine.life import Life, Silence
from fedsim.engine.vigil import Vigil

BUSY = "while True: pass"
LOCKED = "import re; re.match('(a+)+$', 64 * 'a' + 'b')"  # and nobody else can run
WAKING = "import time\nwhile True: time.sleep(0.01)"
ASLEEP = """
import threading, time

def beside():
    while True:
        time.sleep(0.01)

threading.Thread(target=beside).start()
threading.Lock().acquire(), time.sleep(600)
"""
POOL = ASLEEP.replace("time.sleep(0.01)", "pass")
PARENT = ASLEEP.replace("import threading", "import subprocess, threading").replace(
    "time.sleep(600)", "subprocess.run(['sleep', '600'])"
)


ALIVE = Life(begun=1, ticks=5, switches=5, wakes=5, waits=False, is_alone=True)


@pytest.fixture
def process(request):
    started = subprocess.Popen([sys.executable, "-c", request.param])
    time.sleep(0.5)
    yield started.pid
    started.kill()
    started.wait()


def _silent_s(pid, looks=4, pause_s=0.15):
    silence = Silence()
    for _ in range(looks):
        silence.looked(life.look(pid), 1.0)
        time.sleep(pause_s)
    return silence.seconds


@pytest.mark.parametrize("process", [BUSY, LOCKED, WAKING], indirect=True)
def test_a_process_that_does_anything_is_not_silent(process):
    assert _silent_s(process) < 3


@pytest.mark.parametrize("process", [ASLEEP], indirect=True)
def test_a_process_that_only_sleeps_is_silent_a_tenth_of_the_time(process):
    assert _silent_s(process, looks=11) == pytest.approx(1.0)


@pytest.mark.parametrize("process", [POOL, PARENT], ids=["threads", "processes"], indirect=True)
def test_a_process_that_waits_for_what_works_for_it_is_not_silent(process):
    assert _silent_s(process, pause_s=0.5) == 0


@pytest.mark.parametrize("process", [BUSY], indirect=True)
def test_a_process_that_is_stopped_is_silent_until_it_goes_on(process):
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.1)
    assert _silent_s(process) == 3  # the first look finds out nothing
    os.kill(process, signal.SIGCONT)
    time.sleep(0.1)
    assert _silent_s(process) == 0


def test_a_process_that_has_ended_is_no_news():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert life.look(ended.pid) is None
    assert _silent_s(ended.pid, pause_s=0) == 0


@pytest.mark.parametrize("process", [WAKING], indirect=True)
def test_a_process_is_killed_unless_its_number_is_another_s_by_now(process):
    begun = life.look(process).begun
    life.end(process, begun + 1)
    life.end(process, 0)
    assert life.look(process) is not None
    life.end(process, begun)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL


@dataclass
class Worker:
    node: int
    near: bool = False
    pid: int = 7
    begun: int = 1
    silence: Silence = field(default_factory=Silence)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(vigil.time, "monotonic", lambda: self.now)

    def lost(self, watcher, workers, seconds, step=5.0):
        """Who is lost after so many seconds, and what was lost before."""
        for _ in range(int(seconds / step)):
            self.now += step
            if found := watcher.lost(workers):
                return found
        return []


def test_workers_of_a_node_that_does_not_answer_are_lost_and_others_not(monkeypatch):
    clock, ticks = Clock(monkeypatch), iter(range(10**6))
    answers = {1: None, 2: {7: ALIVE._replace(waits=True)}, 3: {}}
    watcher = Vigil(
        60.0,
        lambda node, _: {7: ALIVE._replace(ticks=40 * next(ticks))} if node == 4 else answers[node],
    )
    workers = [Worker(1), Worker(2), Worker(3), Worker(4)]
    assert clock.lost(watcher, workers, 55) == []
    assert clock.lost(watcher, workers, 5) == workers[:1]
    assert clock.lost(watcher, workers[1:], 600) == []


def test_a_worker_that_stands_still_on_another_machine_is_lost(monkeypatch):
    clock, still = Clock(monkeypatch), ALIVE
    watcher = Vigil(60.0, lambda *_: {7: still, 8: still})
    workers = [Worker(1), Worker(1, pid=8, begun=2)]  # the second's number is another's by now
    assert clock.lost(watcher, workers, 60) == []
    assert clock.lost(watcher, workers, 5) == workers[:1]


def test_while_the_driver_was_stopped_nobody_was_silent(monkeypatch):
    clock = Clock(monkeypatch)
    watcher = Vigil(60.0, lambda *_: None)
    worker = Worker(1)
    clock.now += 3600
    assert watcher.lost([worker]) == []
    assert worker.silence.seconds == 10


def test_without_a_limit_nobody_is_asked(monkeypatch):
    def ask(*_):
        raise AssertionError

    assert Clock(monkeypatch).lost(Vigil(None, ask), [Worker(1)], 3600) == []
