"""Live progress of a run: a moving bar on a terminal, plain lines everywhere else.

It may be lost, where standard error is full or closed, and ends no run.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

# Rounds that follow each other faster than this are not each worth a line or a repaint.
_PAUSE_S = 0.5

# The metrics shown, and what they are called there.
_WORDS = {
    "train/loss": "loss",
    "test/accuracy": "accuracy",
    "nodes/accuracy": "of the nodes",
    "personal/accuracy": "of the clients",
}


class Display:
    """A live picture on a terminal and lines that stay, on standard error by default.

    Args:
        console: Where to write.
        quiet: Show nothing.
    """

    def __init__(self, console: "Console | None", *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._live: Live | None = None

    def note(self, text: str) -> None:
        """Show a line that stays, such as a client that failed or why a fallback was taken."""
        self._print(text)

    def stop(self) -> None:
        """End the display; the terminal is as it was before. It may be called more than once."""
        live, self._live = self._live, None
        if live is not None:
            with self._losing():
                live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        with self._losing():
            console = self._live.console if self._live is not None else self._terminal()
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Show nothing any more once nothing can be shown."""
        try:
            yield
        except (OSError, ValueError):  # full, broken; closed, or of another alphabet
            self._quiet = True

    def _terminal(self) -> "Console":
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    def _begin(self, picture: Callable[[], "RenderableType"], *, transient: bool = False) -> None:
        """Show a picture that is drawn anew every second, where there is a terminal."""
        with self._losing():
            self._begin_on(self._terminal(), picture, transient=transient)

    def _begin_on(
        self, console: "Console", picture: Callable[[], "RenderableType"], *, transient: bool
    ) -> None:
        if not console.is_terminal:
            return
        from rich.live import Live

        # A repaint per second keeps the clock going through long rounds and costs the workers
        # nothing that could be measured.
        self._live = Live(
            get_renderable=picture, console=console, refresh_per_second=1, transient=transient
        )
        self._live.start(refresh=True)


class Progress(Display):
    """Shows the round, the time left, who answered, and how well the model does.

    On a terminal two lines are kept up to date; elsewhere a line is printed per round, rounds that
    follow faster than half a second apart being left out, except the last.

    Args:
        total_rounds: The run's number of rounds.
        console: Where to write; standard error by default, so that standard output stays a result.
        quiet: Show nothing.
    """

    def __init__(
        self, total_rounds: int, *, console: "Console | None" = None, quiet: bool = False
    ) -> None:
        super().__init__(console, quiet=quiet)
        self._total = total_rounds
        self._shown = -math.inf
        self._unshown = False
        self._started = 0.0
        self._first_round = 1
        self._round = 0
        self._first_ended = 0.0
        self._ended = 0.0
        self._answers = ""
        self._numbers: dict[str, float] = {}

    def start(self, first_round: int) -> None:
        """Begin; `first_round` is above 1 when a run is resumed."""
        self._first_round, self._round = first_round, first_round - 1
        self._started = self._first_ended = self._ended = time.monotonic()
        if not self._quiet:
            self._begin(self._picture)

    def update(
        self,
        server_round: int,
        metrics: Mapping[str, float],
        *,
        done: int,
        failed: int,
        absent: int,
    ) -> None:
        """Show a finished round.

        Args:
            server_round: Its number.
            metrics: What was recorded; metrics of earlier rounds are shown until they are replaced.
            done: Clients that answered.
            failed: Clients that failed.
            absent: Clients that never answered.
        """
        now = time.monotonic()
        self._round, self._ended = server_round, now
        if server_round <= self._first_round:
            self._first_ended = now
        # In the order of _WORDS, whichever was recorded first.
        known = {**self._numbers, **metrics}
        self._numbers = {metric: float(known[metric]) for metric in _WORDS if metric in known}
        if self._quiet:
            return
        self._answers = f"{done} done, {failed} failed, {absent} absent"
        self._unshown = True
        if now - self._shown >= _PAUSE_S or server_round >= self._total:
            self._show()

    def stop(self) -> None:
        """Show what is not shown yet, and end the display."""
        if self._unshown:
            self._show()
        super().stop()

    def _show(self) -> None:
        self._shown, self._unshown = time.monotonic(), False
        if self._live is not None:
            with self._losing():
                self._live.refresh()
            return
        width = len(str(self._total))
        line = f"round {self._round:>{width}}/{self._total}  {self._left():<11}  {self._facts()}"
        self._print(line)

    def _facts(self) -> str:
        numbers = [f"{_WORDS[metric]} {value:.4f}" for metric, value in self._numbers.items()]
        return "  ".join([self._answers, *numbers])

    def _left(self) -> str:
        """Say how long the rest will take at the pace of the rounds so far."""
        now = time.monotonic()
        rounds = self._round - self._first_round + 1
        if rounds <= 0:
            return "starting"
        if self._round >= self._total:
            return f"took {duration(self._ended - self._started)}"
        # The first round also waits for workers to start, so it only counts as long as it is alone.
        counted = rounds - 1 if rounds > 1 else 1
        pace = (self._ended - (self._first_ended if rounds > 1 else self._started)) / counted
        remaining = pace * (self._total - self._round) - (now - self._ended)
        return f"ETA {duration(max(remaining, 0.0))}"

    def _picture(self) -> "RenderableType":
        """Draw what stays at the foot of the terminal: a line with the bar, a line with numbers."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(f"round {self._round}/{self._total}", style="bold"),
            ProgressBar(
                total=self._total,
                completed=self._round,
                width=30,
                complete_style="green",
                finished_style="green",
            ),
            Text(self._left()),
        )
        return Group(line, Text(self._facts() if self._answers else "", style="dim"))


def duration(seconds: float) -> str:
    """Write a duration as a clock would.

    Example:
        >>> duration(7.4), duration(83), duration(3723)
        ('0:07', '1:23', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
