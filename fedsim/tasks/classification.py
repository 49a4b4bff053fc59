"""Tasks whose targets are classes: classification, and the next character of a text."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.basics.errors import ScenarioError, require_different, unknown
from fedsim.basics.samples import SampleSpec
from fedsim.tasks import metrics as measures
from fedsim.tasks.task import Task

ClassMetric = Literal[
    "accuracy", "balanced_accuracy", "macro_f1", "auroc", "per_class", "perplexity"
]
_OF_COUNTS = ("balanced_accuracy", "macro_f1", "per_class")


class _Classes(Task):
    """Cross-entropy over logits, with metrics of choice."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        spec: SampleSpec,
        dtype: torch.dtype,
        metrics: Sequence[ClassMetric],
    ) -> None:
        super().__init__(build, spec, dtype)
        for name in metrics:
            if name not in get_args(ClassMetric):
                problem = unknown(name, "a metric of classes", get_args(ClassMetric))
                raise ScenarioError(f"[task] metrics: {problem}")
        require_different("[task] metrics", metrics)
        self._metrics = tuple(metrics)
        self._counts = any(name in _OF_COUNTS for name in self._metrics)
        self.wants_outputs = "auroc" in self._metrics

    def output_shape(self) -> tuple[int, ...]:
        """Return (C,): a logit per class."""
        return (self.spec.num_classes,)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's cross-entropy `[batch]`."""
        return functional.cross_entropy(outputs, targets, reduction="none")

    def slopes(
        self, outputs: Tensor, targets: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return (each sample's loss, the gradient of their weighted sum by the outputs).

        The bits of autograd at half its cost: the same two kernels, and nothing around them. They
        go along whichever of the classes and the samples lie apart in memory. None where a subclass
        has losses of its own.

        Args:
            outputs: `[..., batch, C]`.
            targets: `[..., batch]` classes.
            shares: `[..., batch]`, what each sample counts for in the sum.
        """
        if self._has_other_losses():
            return None
        # with few classes, ten times as fast where samples lie side by side
        side = -1 if outputs.is_contiguous() else -2
        logs = torch.log_softmax(outputs if side == -1 else outputs.mT, side)
        chosen = targets.unsqueeze(side)
        above = torch.zeros_like(logs).scatter_(side, chosen, -shares.unsqueeze(side))
        slopes = torch.ops.aten._log_softmax_backward_data(above, logs, side, logs.dtype)
        losses = -logs.gather(side, chosen).squeeze(side)
        return losses, slopes if side == -1 else slopes.mT

    def _has_other_losses(self) -> bool:
        """Whether a subclass has losses of its own."""
        return getattr(self.sample_losses, "__func__", None) is not _Classes.sample_losses

    def _measured(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the bits of `sample_losses`, without its gradient.

        Torch's cross-entropy imports a library of symbols under vmap, for a third of a second.
        """
        if self._has_other_losses():
            return self.sample_losses(outputs, targets)
        logs = torch.log_softmax(outputs, -1)
        return -logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the sums of losses, correct answers and samples, and what is asked for by class.

        Counts by class are `[C]`: samples, samples taken for it, and both. Of equal outputs the
        first class is taken; outputs are compared as they are, so that rounding may turn a sample
        on which two classes tie.
        """
        counted = weights != 0
        # where, not a product: padding may hold what gives nan, and nan times zero is nan
        losses = torch.where(counted, self._measured(outputs, targets), 0)
        predicted = outputs.argmax(dim=-1)
        correct = counted & (predicted == targets)
        sums = {
            "loss": losses.sum(dtype=torch.float64),
            "correct": correct.sum(dtype=torch.float64),
            "examples": counted.sum(dtype=torch.float64),
        }
        if self._counts:
            classes = torch.arange(self.spec.num_classes, device=targets.device)
            is_target = counted[:, None] & (targets[:, None] == classes)
            is_predicted = counted[:, None] & (predicted[:, None] == classes)
            sums["class_examples"] = is_target.sum(dim=0, dtype=torch.float64)
            sums["class_predicted"] = is_predicted.sum(dim=0, dtype=torch.float64)
            sums["class_correct"] = (is_target & is_predicted).sum(dim=0, dtype=torch.float64)
        return sums

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean loss, and those metrics asked for that sums determine."""
        examples = sums["examples"]
        loss = sums["loss"] / examples if examples else math.nan
        found = {"loss": loss}
        for name in self._metrics:
            if name == "accuracy":
                found[name] = sums["correct"] / examples if examples else math.nan
            elif name == "perplexity":
                found[name] = _exp(loss)
            elif name == "balanced_accuracy":
                found[name] = measures.balanced_accuracy(
                    sums["class_correct"], sums["class_examples"]
                )
            elif name == "macro_f1":
                found[name] = measures.macro_f1(
                    sums["class_correct"], sums["class_examples"], sums["class_predicted"]
                )
            elif name == "per_class":
                recalls = measures.recalls(sums["class_correct"], sums["class_examples"])
                found |= {f"accuracy_class_{c}": r for c, r in enumerate(recalls.tolist())}
        return found

    def metrics_of_outputs(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the area under the ROC curve."""
        return {"auroc": measures.classification_auroc(outputs, targets)}


class Classification(_Classes):
    """Cross-entropy over logits; what is measured is chosen by name.

    Args:
        build: Makes the model, drawing from torch's global CPU generator.
        spec: What one sample looks like.
        dtype: dtype of the model's floating-point tensors.
        metrics: What is measured besides the loss. "balanced_accuracy" is the mean recall over the
            classes that occur, "macro_f1" the mean F1 over the classes that occur or are predicted,
            "auroc" the exact area under the ROC curve (of more than two classes the mean over those
            that occur, each against the rest), "per_class" each class's accuracy under
            accuracy_class_C, "perplexity" the exponential of the loss.

    Raises:
        ScenarioError: If there is no metric of that name.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        spec: SampleSpec,
        dtype: torch.dtype,
        *,
        metrics: Sequence[ClassMetric] = ("accuracy",),
    ) -> None:
        super().__init__(build, spec, dtype, metrics)


class NextCharacter(_Classes):
    """Cross-entropy over the characters that may come next.

    Args:
        build: Makes the model, drawing from torch's global CPU generator.
        spec: What one sample looks like.
        dtype: dtype of the model's floating-point tensors.
        metrics: What is measured besides the loss, as for classification.

    Raises:
        ScenarioError: If there is no metric of that name.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        spec: SampleSpec,
        dtype: torch.dtype,
        *,
        metrics: Sequence[ClassMetric] = ("accuracy", "perplexity"),
    ) -> None:
        super().__init__(build, spec, dtype, metrics)


def _exp(loss: float) -> float:
    """The exponential; infinite where float64 ends."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan
