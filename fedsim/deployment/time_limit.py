"""How long a node's client may compute: `[engine] client_timeout_s`, without an engine.

An engine ends a worker that takes too long. On a node the process belongs to Flower, and a process
that ends is missed only after a minute: the work is interrupted in it instead, and the server is
told at once.
"""

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator

from flwr.app import Context, Error, Message, MessageType

from fedsim.messages.failures import HUNG_ON_A_NODE

_BOUND = (MessageType.TRAIN, MessageType.EVALUATE)


class TookTooLong(BaseException):
    """Raised in the midst of work; a client's `except Exception` does not hold it off."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what is done in this context after so many seconds.

    Code that is outside of Python (one operation of torch) is interrupted when it returns.

    Raises:
        TookTooLong: In the midst of the work.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with _by_alarm(seconds) if is_main and hasattr(signal, "setitimer") else _by_thread(seconds):
        yield


@contextlib.contextmanager
def _by_alarm(seconds: float) -> Iterator[None]:
    """A signal interrupts sleep too; whose alarm was set before has it again."""

    def over(number: int, frame: object) -> None:
        raise TookTooLong

    begun, handler = time.monotonic(), signal.signal(signal.SIGALRM, over)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            rest = left - (time.monotonic() - begun)
            signal.setitimer(signal.ITIMER_REAL, max(rest, 1e-3), every)


@contextlib.contextmanager
def _by_thread(seconds: float) -> Iterator[None]:
    worker, lock = threading.get_ident(), threading.Lock()
    is_over = False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(worker), ctypes.py_object(TookTooLong)
                )

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True


def answered_in_time(
    answer: Callable[[Message, Context], Message],
    message: Message,
    context: Context,
    limit_s: float | None,
) -> Message:
    """Answer a message, or say that it took too long.

    Args:
        answer: Answers it.
        message: An instruction.
        context: The node's.
        limit_s: Seconds for training or evaluating; None waits for ever.
    """
    if limit_s is None or message.metadata.message_type.partition(".")[0] not in _BOUND:
        return answer(message, context)
    try:
        with at_most(limit_s):
            return answer(message, context)
    except TookTooLong:
        why = f"no answer within {limit_s:g} s of its start; it was interrupted"
        return Message(Error(HUNG_ON_A_NODE, why), reply_to=message)
