"""What is learnt: a model, a loss and metrics. Needs torch alone.

Loss and statistics are written for one batch without a client dimension and run under
`torch.func.vmap`; statistics are sums, so that batches and clients add up.
"""

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim import rng
from fedsim.errors import ScenarioError, unknown
from fedsim.models import model_factory, shape_arguments
from fedsim.samples import SampleSpec

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Task(abc.ABC):
    """A model with its loss and metrics; concrete tasks are final.

    Attributes:
        dtype: The dtype of the model's floating-point tensors and of the features given to it.
    """

    dtype: torch.dtype

    @abc.abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """Return a freshly initialised model on the CPU, in training mode.

        Equal seeds give equal bits, whatever was drawn before; torch's global generator is left
        as it was.
        """

    @abc.abstractmethod
    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's loss `[batch]`."""

    @abc.abstractmethod
    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return sums over the batch from which `metrics` is computed once they are added up.

        Args:
            outputs: The model's outputs, `[batch, ...]`.
            targets: `[batch]`.
            weights: `[batch]`, 1 for a sample and 0 for padding, whatever the padding row holds.

        Returns:
            Scalars in float64, additive over batches and clients.
        """

    @abc.abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return metrics by name from summed statistics; over no sample at all they are nan."""


@final
class Classification(Task):
    """Cross-entropy over logits; the metrics are mean loss and accuracy.

    Args:
        build: Makes the model, drawing from torch's global CPU generator.
        feature_shape: Shape of one sample.
        num_classes: Number of logits that the model must give.
        dtype: dtype of the model's floating-point tensors.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        feature_shape: tuple[int, ...],
        num_classes: int,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self._build = build
        self._feature_shape = feature_shape
        self._num_classes = num_classes

    def build_model(self, seed: int) -> nn.Module:
        """Return a freshly initialised model, equal for equal seeds.

        Raises:
            ScenarioError: If the factory does not give a trainable module with a logit per class.
        """
        # only the CPU generator is forked and seeded: forking CUDA's would start CUDA
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.derived_seed(seed, "model"))
            model = self._build()
            if not isinstance(model, nn.Module):
                raise ScenarioError(
                    f"[task] model: the factory gave a {type(model).__name__}, "
                    "expected a torch.nn.Module"
                )
            model = model.to(self.dtype)
            self._check(model)
        return model.train()

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's cross-entropy `[batch]`."""
        return functional.cross_entropy(outputs, targets, reduction="none")

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the sums of losses, correct answers and samples."""
        counted = weights != 0
        # where, not a product: padding may hold what gives nan, and nan times zero is nan
        losses = torch.where(counted, self.sample_losses(outputs, targets), 0)
        correct = counted & (outputs.argmax(dim=-1) == targets)
        return {
            "loss": losses.sum(dtype=torch.float64),
            "correct": correct.sum(dtype=torch.float64),
            "examples": counted.sum(dtype=torch.float64),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return mean loss and accuracy."""
        examples = sums["examples"]
        if examples == 0:
            return {"loss": float("nan"), "accuracy": float("nan")}
        return {"loss": sums["loss"] / examples, "accuracy": sums["correct"] / examples}

    def _check(self, model: nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ScenarioError("[task] model: the model has no trainable parameter")
        features = torch.zeros((2, *self._feature_shape), dtype=self.dtype)
        try:
            with torch.no_grad():
                outputs = model.eval()(features)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ScenarioError(
                f"[task] model: the model cannot take features of shape {self._feature_shape}: "
                f"{error}"
            ) from error
        expected = (2, self._num_classes)
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ScenarioError(
                f"[task] model: for two samples the model gives {found}, expected logits of "
                f"shape {expected}"
            )


TASKS: dict[str, Callable[..., Task]] = {"classification": Classification}


def make_task(table: Mapping[str, Any], spec: SampleSpec) -> Task:
    """Build the task of a scenario's [task] table.

    Args:
        table: `kind`, `model`, `dtype` (each with a default) and the model factory's own keys.
        spec: What one sample of the data looks like.

    Raises:
        ScenarioError: If a name is unknown; impossible arguments show when the model is built.
    """
    arguments = dict(table)
    kind = arguments.pop("kind", "classification")
    name = arguments.pop("model", "logistic")
    dtype = arguments.pop("dtype", "float32")
    if kind not in TASKS:
        raise ScenarioError(f"[task] kind: {unknown(kind, 'a task', TASKS)}")
    if dtype not in DTYPES:
        raise ScenarioError(f"[task] dtype: {unknown(dtype, 'a dtype', DTYPES)}")
    factory = model_factory(name)
    shapes = shape_arguments(
        factory, feature_shape=spec.feature_shape, num_classes=spec.num_classes
    )
    build = functools.partial(factory, **arguments, **shapes)
    return TASKS[kind](build, spec.feature_shape, spec.num_classes, DTYPES[dtype])
