"""What makes fedsim fast, forced: `FEDSIM_OPTIMISATIONS=off pytest tests/laws tests/parity`.

on    passes written out where the model allows it, memory shared with workers and pipes to them,
      checkpoints in the background, chunks even in samples, and the states of all clients on the
      disk
off   a loop over clients, everything through Ray, checkpoints at once, chunks in client order where
      who shares one changes no bit, memories in main memory

Without the variable everything is as in a run: as with `on`, but memories stay in main memory.
"""

import contextlib
import functools
import os
from concurrent.futures import Future

import pytest

VARIABLE = "FEDSIM_OPTIMISATIONS"
ALLOWED = ("on", "off")


def asked():
    """What the variable says; None where it is not set."""
    value = os.environ.get(VARIABLE)
    if value is not None and value not in ALLOWED:
        raise pytest.UsageError(f"{VARIABLE} = {value!r}: choose from {', '.join(ALLOWED)}")
    return value


class AtOnce:
    """An executor that does what is submitted before it returns."""

    def __init__(self, *arguments):
        pass

    def submit(self, function, *arguments):
        done = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self):
        pass


@functools.cache
def _shared_memory():
    """The engine's own way to find out whether memory can be shared, seen before it is replaced."""
    from fedsim.engine.ray import memory

    return memory._probe_arena


@functools.cache
def _deal():
    """The engine's own way to deal chunks, seen before it is replaced."""
    from fedsim.engine import chunks

    return chunks.deal


def _in_client_order(samples, size, way):
    """Chunks as they would be if all clients held as many samples, unless clients are padded."""
    return _deal()([0] * len(samples) if way == "even" else samples, size, way)


@contextlib.contextmanager
def forced(value):
    """Force optimisations on or off in this process; workers follow it, or read the variable."""
    if value is None:
        yield
        return
    from fedsim.engine import grid as local
    from fedsim.engine.client_states import ClientStore

    on, probe, deal = value == "on", _shared_memory(), _deal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.engine.ray.memory._probe_arena", probe if on else lambda: None)
        patch.setattr("fedsim.engine.chunks.deal", deal if on else _in_client_order)
        if on:
            patch.setattr(local, "ClientStore", lambda limit_mb: ClientStore(limit_mb or 1e-7))
        else:
            patch.setattr(local, "ClientStore", ClientStore)
            patch.setattr("fedsim.client.plan.why_not_batched", lambda *_, **__: "it is forced off")
            patch.setattr("fedsim.client.plan.why_loop", lambda *_, **__: "vmap is forced off")
            patch.setattr("fedsim.runs.recorder.ThreadPoolExecutor", AtOnce)
        yield
