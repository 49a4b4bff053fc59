"""The best model of a run: `[evaluation] keep_best`.

Which round has the best model follows from the records alone. The model is written when a
checkpoint is, just before it, under the round's name, and stays while a checkpoint needs it. So a
run that was killed and resumed ends with the same model as one that was not: a best model from
before the checkpoint is on the disk, a later one is computed again.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.basics.errors import CheckpointError, UnwrittenCheckpointError
from fedsim.basics.json_files import sync_folder
from fedsim.basics.ties import exceeds
from fedsim.messages.records import named_tensors
from fedsim.runs.client_metrics import is_error

BEST_FILE = "params-best.safetensors"
_NAME = re.compile(r"best_(\d{6,})\.safetensors$")


class Best(NamedTuple):
    """The round after which the model was best.

    Attributes:
        round: The round; 0 is the model that the run began with.
        value: The metric's value there.
    """

    round: int
    value: float


def best_of(history: Iterable[Mapping[str, Any]], metric: str) -> Best | None:
    """Return the best of some records, the first among equals.

    Less is better of losses and errors, more of anything else. What is better by rounding alone is
    not better; what is not a number is never the best.

    Args:
        history: Records in the order of rounds, each with its `round`.
        metric: The metric, `phase/name`.

    Returns:
        The best; None where no record has a number.

    Example:
        >>> records = [{"round": r, "test/loss": v} for r, v in enumerate((2.0, 0.5, 0.7))]
        >>> best_of(records, "test/loss")
        Best(round=1, value=0.5)
    """
    trail = list(_improvements(history, metric))
    return trail[-1] if trail else None


def better(best: Best | None, record: Mapping[str, Any], metric: str) -> Best | None:
    """Return a record's value where it is better than the best before it, else None.

    Args:
        best: The best of the records before, or None.
        record: What was recorded of a round.
        metric: The metric.
    """
    value = record.get(metric)
    if value is None or math.isnan(value):
        return None
    sign = -1.0 if is_error(metric) else 1.0
    if best is not None and not exceeds(sign * value, sign * best.value):
        return None
    return Best(int(record["round"]), float(value))


class BestModel:
    """Keeps the best model of a run.

    Args:
        folder: The folder of the run's checkpoints.
        metric: What is watched, or None to keep nothing.
    """

    def __init__(self, folder: Path, metric: str | None) -> None:
        self._folder, self._metric = folder, metric
        self._trail: list[Best] = []  # each better than those before it
        self._unwritten: ArrayRecord | None = None

    def take_up(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Go on after these records.

        Raises:
            CheckpointError: If the best model of these rounds is not there.
        """
        if self._metric is None:
            return
        self._trail = list(_improvements(history, self._metric))
        if self._trail and not self._file(self._trail[-1].round).is_file():
            raise CheckpointError(
                f"{self._file(self._trail[-1].round)}: [evaluation] keep_best = '{self._metric}' "
                "asks for this model, the best so far, and it was not kept; resume the run with "
                "the keep_best that it began with, or without"
            )

    def round_ended(self, record: Mapping[str, Any], arrays: ArrayRecord) -> None:
        """Look at a round's record, with the model after it."""
        if self._metric is None:
            return
        best = self._trail[-1] if self._trail else None
        if (found := better(best, record, self._metric)) is not None:
            self._trail.append(found)
            self._unwritten = ArrayRecord(dict(arrays))

    def unwritten(self) -> tuple[int, dict[str, Tensor]] | None:
        """Return (round, tensors) of a best model that nobody was given to write yet."""
        arrays, self._unwritten = self._unwritten, None
        return None if arrays is None else (self._trail[-1].round, named_tensors(arrays))

    def write(self, server_round: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a best model beside the checkpoints, whole or not at all.

        Raises:
            UnwrittenCheckpointError: If the disk does not take it.
        """
        from safetensors.torch import save

        file = self._file(server_round)
        making = file.with_suffix(".tmp")  # a kill's is written anew: its round is run again
        try:
            self._folder.mkdir(exist_ok=True)
            with making.open("wb") as opened:
                opened.write(save(dict(tensors)))
                opened.flush()
                os.fsync(opened.fileno())
            making.rename(file)
            sync_folder(self._folder)
        except OSError as error:
            raise UnwrittenCheckpointError(
                f"{file}: cannot be written: {error.strerror}; make room and `fedsim resume` the "
                "run, nothing is lost up to its last checkpoint"
            ) from error

    def keep_for(self, rounds: Iterable[int]) -> None:
        """Remove the models that none of the checkpoints after these rounds needs."""
        trail = list(self._trail)  # a round may end meanwhile
        needed = {max((b.round for b in trail if b.round <= last), default=-1) for last in rounds}
        for file in self._folder.glob("best_*.safetensors"):
            match = _NAME.search(file.name)
            if match and int(match[1]) not in needed:
                file.unlink(missing_ok=True)

    def result(self) -> tuple[Best, bytes] | None:
        """Return the best of the rounds so far and its file's content; None where none is kept."""
        if not self._trail:
            return None
        return self._trail[-1], self._file(self._trail[-1].round).read_bytes()

    def _file(self, server_round: int) -> Path:
        return self._folder / f"best_{server_round:06d}.safetensors"


def _improvements(history: Iterable[Mapping[str, Any]], metric: str) -> Iterator[Best]:
    best: Best | None = None
    for record in history:
        if (found := better(best, record, metric)) is not None:
            best = found
            yield found
