"""What is told of every round besides the run folder: a display, TensorBoard, claims."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.basics.errors import nearest
from fedsim.runs.round_report import RoundReport
from fedsim.scenario.expectations import BY_CAUSE
from fedsim.scenario.recorded_metrics import watched
from fedsim.scenario.scenario import Scenario

if TYPE_CHECKING:
    from fedsim.runs.progress import Progress

_NAMED = 3  # failures of a round


class ProgressHook:
    """Shows rounds on a display.

    Args:
        progress: The display.
    """

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def round_ended(self, report: RoundReport) -> None:
        """Update the display and note failures by name."""
        metrics = report.metrics
        if report.server_round:
            self._progress.update(
                report.server_round,
                metrics,
                done=metrics["clients/replied"],
                failed=metrics["clients/failed"],
                absent=metrics["clients/absent"],
            )
        for failure in report.failed[:_NAMED]:
            self._progress.note(str(failure))


class TensorBoardHook:
    """Writes every numeric metric of a round as a scalar.

    Args:
        folder: Where event files go.
        first_round: The first round of this process; a resumed run hides what it runs again.
    """

    def __init__(self, folder: Path, first_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if first_round == 1 else first_round
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def round_ended(self, report: RoundReport) -> None:
        """Write the round's scalars and let them reach the disk."""
        for name, value in report.metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, report.server_round)
        self._writer.flush()


@dataclass(frozen=True)
class WatchHook:
    """Says after the first evaluated round which metrics somebody waits for and are not there.

    Attributes:
        scenario: The scenario.
        say: Called with a line for each.
    """

    scenario: Scenario
    say: Callable[[str], None]

    def round_ended(self, report: RoundReport) -> None:
        """Look at what the first evaluated round has recorded."""
        first = min(self.scenario.evaluation.every, self.scenario.rounds)
        if report.server_round != first:
            return
        for where, metric in watched(self.scenario):
            if metric not in report.metrics and not metric.startswith(BY_CAUSE):
                phase = metric.partition("/")[0]
                beside = sorted(name for name in report.metrics if name.startswith(f"{phase}/"))
                guess = nearest(metric, beside)
                hint = f"did you mean '{guess}'? " if guess else ""
                self.say(
                    f"{where} '{metric}': round {first} recorded none; {hint}recorded of "
                    f"{phase}/: {', '.join(beside) or 'nothing'}"
                )
