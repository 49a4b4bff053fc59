"""Live progress of a study: a bar and what runs now on a terminal, a line per run elsewhere."""

import time
from typing import TYPE_CHECKING

from fedsim.runs.progress import Display, duration
from fedsim.studies.cells.cell import Cell

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class StudyProgress(Display):
    """Shows how many runs are done, what runs now, and the time left.

    Args:
        console: Where to write; standard error by default.
        quiet: Show nothing.
    """

    def __init__(self, *, console: "Console | None" = None, quiet: bool = False) -> None:
        super().__init__(console, quiet=quiet)
        self._total = self._done = 0
        self._expected = False
        self._began = time.monotonic()
        self._running: dict[str, tuple[Cell, int, float]] = {}

    def expect(self, total: int, there: int) -> None:
        """Begin, or go on with more runs.

        Args:
            total: Runs that are to be done from now on.
            there: Runs that are done already.
        """
        first, self._expected = not self._expected, True
        self._total += total
        if there and first and self._live is None:
            self.note(f"{there} {_runs(there)} there already, {total} missing")
        self._start()

    def begun(self, cell: Cell) -> None:
        """Show that a cell is being run."""
        self._running[cell.name] = (cell, 0, time.monotonic())

    def at_round(self, cell: Cell, server_round: int) -> None:
        """Show how far it is."""
        _, _, began = self._running[cell.name]
        self._running[cell.name] = (cell, server_round, began)

    def ended(self, cell: Cell, reason: str | None) -> None:
        """Show that it has finished, or why it failed."""
        _, _, began = self._running.pop(cell.name)
        self._done += 1
        took = duration(time.monotonic() - began)
        if reason is not None:
            self.note(f"failed: {cell.name}: {reason}")
        elif self._live is None:
            width = len(str(self._total))
            done = f"run {self._done:>{width}}/{self._total}"
            self.note(f"{done}  {self._left():<10}  {cell.name}  took {took}")

    def _start(self) -> None:
        if not self._quiet and self._live is None and self._total:
            self._begin(self._picture, transient=True)

    def _left(self) -> str:
        """Say how long the rest will take at the pace so far."""
        if not self._done:
            return "starting"
        elapsed = time.monotonic() - self._began
        return f"ETA {duration(elapsed / self._done * (self._total - self._done))}"

    def _picture(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        part = sum(at / cell.scenario.rounds for cell, at, _ in self._running.values())
        bar = ProgressBar(
            total=max(self._total, 1),
            completed=self._done + part,
            width=30,
            complete_style="green",
            finished_style="green",
        )
        line.add_row(Text(f"run {self._done}/{self._total}", style="bold"), bar, Text(self._left()))
        now = [
            Text(
                f"  {name}: round {at}/{cell.scenario.rounds}",
                style="dim",
                overflow="ellipsis",
                no_wrap=True,
            )
            for name, (cell, at, _) in self._running.items()
        ]
        return Group(line, *now)


def _runs(count: int) -> str:
    return "run is" if count == 1 else "runs are"
