"""The line between the driver and a worker, the worker being a real process."""

import multiprocessing
import os
import signal
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from fedsim.engine.pipe import Line, UnspeakableError, WorkerLine, wait

LONG = 40.0  # seconds; nothing here takes as long unless it is broken


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "pytest", "fedsim.engine.pipe"])


def run(name, code, up):
    line = WorkerLine(name)
    up.send("up")
    exec(textwrap.dedent(code), {"line": line, "os": os, "sys": sys, "time": time})


@pytest.fixture
def talk():
    """Start a process that answers over a line as the given code says."""
    lines, processes = [], []

    def start(code):
        line = Line()
        lines.append(line)
        reader, writer = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=run, args=(line.name, code, writer))
        process.start()
        processes.append(process)
        assert reader.recv() == "up"
        reader.close()
        writer.close()
        line.joined()
        return line, process

    yield start
    for line in lines:
        line.close()
    for process in processes:
        process.kill()
        process.join()


def answer(line, timeout_s=LONG):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if wait([line], deadline - time.monotonic()):
            return line.receive()
    raise TimeoutError


ECHO = """
    try:
        while True:
            line.send(line.receive())
    except EOFError:
        sys.exit(7)
"""


def test_what_is_said_comes_back_whole_however_long_it_is_and_the_line_ends_with_the_driver(talk):
    line, process = talk(ECHO)
    draw = torch.Generator().manual_seed(0)
    values = [
        {"none": torch.zeros(0, 3), "number": torch.tensor(4), "bits": torch.tensor([True, False])},
        torch.randn(700_000, generator=draw),  # longer than what the pipe holds, both ways
        torch.randn(30, 40, generator=draw).t()[::2],
        torch.ones(3, dtype=torch.bfloat16),
        (1 << 70, np.arange(3)),
    ]
    for value in values:
        line.send(value)
        torch.testing.assert_close(answer(line), value, rtol=0, atol=0)
    line.close()
    process.join(LONG)
    assert process.exitcode == 7


def test_a_tensor_that_was_said_may_be_written_to(talk):
    line, _ = talk(ECHO)
    value = torch.arange(4.0)
    line.send(value.expand(2, 4))
    said = answer(line)
    said += 1
    assert value.tolist() == [0, 1, 2, 3]
    assert said.tolist() == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("ending", ["os._exit(3)", "line.receive(); os._exit(3)"])
def test_a_worker_that_ends_is_noticed_at_once(talk, ending):
    line, _ = talk(ending)
    line.send("hello")
    with pytest.raises(EOFError):
        answer(line)


def test_a_worker_that_is_killed_while_it_speaks_has_said_nothing(talk):
    line, process = talk("""
        line.receive()
        line._writes.write((1 << 40).to_bytes(8, "little") + b"half")
        time.sleep(600)
    """)
    line.send("hello")
    assert wait([line], 1.0) == []
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        answer(line)


def test_a_worker_that_is_silent_holds_nobody_up(talk):
    silent, _ = talk("time.sleep(600)")
    echo, _ = talk(ECHO)
    silent.send(bytes(5_000_000))  # it does not even listen
    echo.send("here")
    begun = time.monotonic()
    done = []
    while not done:
        done = wait([silent, echo], LONG)
    assert done == [echo]
    assert echo.receive() == "here"
    assert wait([silent], 0.05) == []
    assert time.monotonic() - begun < LONG


def test_an_answer_that_nobody_took_is_not_the_answer_to_what_is_said_next(talk):
    line, _ = talk(ECHO)
    line.send("first")
    while not wait([line], LONG):
        pass
    line.send("second")
    assert answer(line) == "second"


def test_a_pipe_that_is_gone_is_not_taken_for_the_file_that_has_its_number_now(tmp_path):
    line = Line()
    name = line.name
    line.close()
    other = Line()
    (tmp_path / "file").write_text("content")
    with (tmp_path / "file").open("r+") as file:
        for path in (f"/proc/{os.getpid()}/fd/{file.fileno()}", other.name.writes):
            with pytest.raises(OSError, match="the pipe is gone"):
                WorkerLine(name._replace(reads=path))
            with pytest.raises(OSError, match="the pipe is gone"):
                WorkerLine(other.name._replace(writes=path, pipes=(other.name.pipes[0], 0)))
    other.close()
    assert (tmp_path / "file").read_text() == "content"


class _Unreadable:
    def __reduce__(self):
        return float, ("no number",)


def test_what_cannot_be_unpickled_says_so_and_the_line_goes_on(talk):
    line, _ = talk("""
        try:
            line.receive()
        except ValueError as error:
            line.send(f"there: {error}")
        line.receive()
        line._writes.write((4).to_bytes(8, "little") + b"what")
        line.receive()
        line.send("still here")
    """)
    line.send(_Unreadable())
    assert answer(line) == "there: ValueError: could not convert string to float: 'no number'"
    line.send("go on")
    with pytest.raises(UnspeakableError):
        answer(line)
    line.send("go on")
    assert answer(line) == "still here"


def test_what_cannot_be_pickled_is_refused_before_anything_is_said(talk):
    line, _ = talk(ECHO)
    with pytest.raises(UnspeakableError, match="lambda"):
        line.send(lambda: None)
    line.send("still here")
    assert answer(line) == "still here"
