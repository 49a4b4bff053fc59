"""Fine-tuning before evaluation: what a client would gain by training the received model itself.

The control that explains personalisation: each client takes some steps from the model that it
received, on its own training samples, and is measured on its own test samples before and after.
Nothing of it is kept. Needs torch alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, final

import torch
from torch import Tensor

from fedsim.basics.errors import ScenarioError
from fedsim.basics.patterns import chosen
from fedsim.client.freezing import where_moving, which_move
from fedsim.client.job import FINETUNED, PERSONALISED, ChunkJob, ChunkResult
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.procedure import Batch, Carry, ClientProcedure, Descent, Gradient, Named, Work
from fedsim.messages.layout import Payload


@final
class FineTuning(ClientProcedure):
    """Passes of plain SGD over a client's training samples.

    Args:
        lr: Step size; > 0.
        epochs: Passes; >= 1.
        like: The work of the procedure that trains, whose batches these are.
        tensors: Patterns of the tensors that are trained, see `fedsim.basics.patterns`; None trains
            all.
    """

    stacks = True

    def __init__(
        self, lr: float, epochs: int, like: Work, tensors: Sequence[str] | None = None
    ) -> None:
        self._lr, self._work = lr, Work(like.batch_size, epochs, None, like.last_batch)
        self._patterns = tensors
        self._frozen: FrozenByEpoch = ()

    def for_model(self, tensors: ModelTensors) -> "FineTuning":
        """Return the procedure with the names of what it trains.

        Raises:
            ScenarioError: If a pattern names no trained tensor.
        """
        if self._patterns is None:
            return self
        made = copy.copy(self)
        try:
            still = frozenset(tensors.trained) - chosen(self._patterns, tensors.trained)
        except ValueError as error:
            raise ScenarioError(f"[evaluation] finetune.tensors: {error}") from None
        made._frozen = (still,) if still else ()
        return made

    @property
    def work(self) -> Work:
        """How much is trained before an evaluation."""
        return self._work

    def descent(self, server_round: int) -> Descent:
        """Return the step of SGD."""
        return Descent(self._lr, frozen=self._frozen)

    def begin(self, params: Named, buffers: Named, extra: Named, state: Named) -> Carry:
        """Start from the model received."""
        return {"params": params, "buffers": buffers}

    def step(
        self, carry: Carry, batch: Batch, gradient: Gradient, *, server_round: int
    ) -> tuple[Carry, Tensor]:
        """One step on one batch, of one client or of several."""
        loss, grads, buffers = gradient(carry["params"], carry["buffers"], batch)
        params = {n: p - self._lr * grads[n] for n, p in carry["params"].items()}
        if self._frozen:
            assert batch.epoch is not None
            moves = which_move(self._frozen, params, batch.epoch)
            params = where_moving(moves, params, carry["params"])
        return {"params": params, "buffers": buffers}, loss


def training(job: ChunkJob) -> ChunkJob:
    """Return the training that comes before a chunk's second evaluation, of what it received."""
    return replace(
        job,
        action="train",
        shared=replace(job.shared, extra={}),
        personal=replace(job.personal, extra={}),
        work=(),
        clipping_norm=None,
        settings={},
    )


def after(job: ChunkJob, tuned: ChunkResult) -> ChunkJob:
    """Return the evaluation of what a chunk's members have trained.

    Args:
        job: The evaluation of what they received.
        tuned: What came of `training`.
    """
    rows = tuned.params
    if isinstance(rows, list):
        rows = torch.stack(rows)
    return replace(
        job,
        shared=Payload(),
        personal=Payload(rows, tuned.buffers),
        state=tuned.state,
        has_state=(True,) * len(job.client_ids) if tuned.state else (),
    )


class Tuner(Protocol):
    """What trains and evaluates chunks, as `CohortExecutor` does."""

    def train(self, job: ChunkJob) -> ChunkResult:
        """Train a chunk's members."""

    def evaluate(self, job: ChunkJob) -> ChunkResult:
        """Evaluate what a chunk's members received."""


def beside(received: ChunkResult, tuner: Tuner, job: ChunkJob) -> ChunkResult:
    """Return an evaluation with metrics after fine-tuning beside its own, as `finetuned/NAME`.

    Args:
        received: The evaluation of what the chunk's members received.
        tuner: Fine-tunes, and evaluates what it has trained.
        job: The evaluation that was asked for.
    """
    tuned = tuner.evaluate(after(job, tuner.train(training(job))))
    more = {f"{FINETUNED}{n}": c for n, c in tuned.metrics.items() if n != PERSONALISED}
    return replace(received, metrics={**received.metrics, **more})
