"""Metrics for TensorBoard, beside `metrics.jsonl`."""

from pathlib import Path

from fedsim.runs.loop import RoundReport


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
