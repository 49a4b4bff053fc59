"""Systems side by side: all are started, then take turns, one round-robin pass per repeat."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SYSTEMS_FOLDER = Path(__file__).parent / "systems"
WARM_UP = 10  # rounds before the first timed turn, the very first apart
SETTLE_S = 0.2  # before each turn, for what the last system left running to come to rest
_LIMIT_S = 300.0  # without an answer a system is taken for hung


class Fallen(Exception):
    """A system ended or hung."""


class Entrant:
    """A system at work on a workload, in a process of its own.

    Args:
        name: What it is called in the log.
        command: Interpreter and script.
        work: The script's argument.
        errors: Where its standard error goes.
        environment: Variables besides those of this process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        work: Mapping[str, Any],
        errors: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.name, self.work, self._errors = name, dict(work), errors
        begun = time.perf_counter()
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [*command, json.dumps(self.work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.facts = self._answer()
        self.start_s = time.perf_counter() - begun
        self.rounds = 1

    def turn(
        self, rounds: int | None = None, save: Path | None = None, **more: Any
    ) -> dict[str, Any]:
        """Let it run rounds, as many as a turn has unless said otherwise.

        Args:
            rounds: How many; None takes `rounds` of this object.
            save: Where the aggregated model is wanted afterwards.
            **more: What else the script is told.

        Raises:
            Fallen: With the end of what it wrote on standard error.
        """
        asked = {"rounds": rounds or self.rounds, **more}
        if save is not None:
            asked["save"] = str(save)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._fallen("ended") from None
        return self._answer()

    def end(self) -> None:
        """End the process and all that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nobody else's
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], _LIMIT_S)[0]:
            raise self._fallen(f"gave no answer for {_LIMIT_S:.0f} s")
        line = out.readline()
        if not line:
            raise self._fallen("ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fallen(self, how: str) -> Fallen:
        self.end()
        return Fallen(f"{how}: {self._errors.read_text(errors='replace').strip()[-500:]}")


def turn_length(seconds_per_round: float, turn_s: float, *, unit: int, most: int = 400) -> int:
    """Return how many rounds a turn has: as many as fill it, in whole units.

    Example:
        >>> turn_length(0.03, 1.0, unit=10), turn_length(0.6, 1.0, unit=1)
        (40, 2)
    """
    return min(most, unit * math.ceil(turn_s / seconds_per_round / unit))


def passes(entrants: Iterable[Entrant], repeats: int) -> Iterable[tuple[int, Entrant]]:
    """Yield (repeat, entrant) in the order of turns: each pass begins one further on."""
    alive = list(entrants)
    for repeat in range(repeats):
        for place in range(len(alive)):
            yield repeat, alive[(place + repeat) % len(alive)]


def log(message: str) -> None:
    """Say what is going on."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)
