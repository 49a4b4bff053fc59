"""Regression: targets are numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.basics.errors import ScenarioError, require_choice, require_different, unknown
from fedsim.basics.samples import SampleSpec
from fedsim.tasks import metrics as measures
from fedsim.tasks.task import Task

RegressionLoss = Literal["mse", "huber", "mae"]
RegressionMetric = Literal["mse", "rmse", "mae", "r2"]


@final
class Regression(Task):
    """A loss of the errors; of several numbers per target the mean over them.

    Args:
        build: Makes the model, drawing from torch's global CPU generator.
        spec: What one sample looks like.
        dtype: dtype of the model's floating-point tensors.
        loss: Squared error "mse", absolute error "mae", or "huber".
        huber_delta: Error from which on Huber's loss is linear; > 0.
        metrics: What is measured besides the loss: mean squared error, its root, mean absolute
            error, coefficient of determination (the mean over a target's numbers; not defined
            where one of them does not vary).

    Raises:
        ScenarioError: If there is no loss or metric of that name, or `huber_delta` is not above 0.

    Source: Huber, Annals of Mathematical Statistics 35 (1964), for "huber".
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        spec: SampleSpec,
        dtype: torch.dtype,
        *,
        loss: RegressionLoss = "mse",
        huber_delta: float = 1.0,
        metrics: Sequence[RegressionMetric] = ("rmse", "mae", "r2"),
    ) -> None:
        super().__init__(build, spec, dtype)
        try:
            require_choice("loss", loss, RegressionLoss)
        except ValueError as error:
            raise ScenarioError(f"[task] {error}") from None
        if not 0 < huber_delta < math.inf:
            raise ScenarioError(f"[task] huber_delta = {huber_delta}: must be > 0")
        if huber_delta != 1 and loss != "huber":
            raise ScenarioError(
                f"[task] huber_delta = {huber_delta}: changes nothing with loss = '{loss}', leave "
                "it out"
            )
        for name in metrics:
            if name not in get_args(RegressionMetric):
                problem = unknown(name, "a metric of regression", get_args(RegressionMetric))
                raise ScenarioError(f"[task] metrics: {problem}")
        self._loss, self._delta = loss, huber_delta
        require_different("[task] metrics", metrics)
        self._metrics = tuple(metrics)
        self.wants_outputs = "r2" in self._metrics

    def output_shape(self) -> tuple[int, ...]:
        """Return (n,): all of a target's numbers in one row."""
        return (math.prod(self.spec.target_shape),)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's loss `[batch]`."""
        predicted, true = _rows(outputs, targets)
        if self._loss == "mse":
            losses = functional.mse_loss(predicted, true, reduction="none")
        elif self._loss == "mae":
            losses = functional.l1_loss(predicted, true, reduction="none")
        else:
            losses = functional.huber_loss(predicted, true, reduction="none", delta=self._delta)
        return losses.mean(dim=-1)

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the sums of losses, squared and absolute errors, and samples."""
        counted = weights != 0
        predicted, true = _rows(outputs, targets)
        errors = predicted.double() - true.double()
        parts = {
            "loss": self.sample_losses(outputs, targets),
            "squared": errors.square().mean(dim=-1),
            "absolute": errors.abs().mean(dim=-1),
        }
        # where, not a product: padding may hold what gives nan, and nan times zero is nan
        sums = {
            name: torch.where(counted, part, 0).sum(dtype=torch.float64)
            for name, part in parts.items()
        }
        return {**sums, "examples": counted.sum(dtype=torch.float64)}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean loss, and those metrics asked for that sums determine."""
        examples = sums["examples"] or math.nan
        squared = sums["squared"] / examples
        every = {
            "mse": squared, "rmse": math.sqrt(squared), "mae": sums["absolute"] / examples
        }  # fmt: skip
        found = {"loss": sums["loss"] / examples}
        return found | {name: every[name] for name in self._metrics if name in every}

    def metrics_of_outputs(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the coefficient of determination."""
        return {"r2": measures.r2(*_rows(outputs, targets))}


def _rows(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions and targets, both `[batch, numbers]` in the outputs' dtype."""
    return outputs, targets.reshape(outputs.shape).to(outputs.dtype)
