"""What a task is: a model with its loss and metrics. Needs torch alone."""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.basics import rng
from fedsim.basics.errors import FedsimError, ScenarioError, is_too_large
from fedsim.basics.generators import seeded
from fedsim.basics.kept_state import KeptState
from fedsim.basics.samples import SampleSpec
from fedsim.basics.tensors import tensors_of
from fedsim.tasks.models.holding import fingerprint, require_complete, require_kept


class Task(abc.ABC):
    """A model with its loss and metrics.

    A task of the user's own subclasses this, implements `sample_losses`, `statistics` and `metrics`
    and is named by import path, `[task] kind = "package.module:Class"`; the keyword-only arguments
    that its constructor adds are its scenario keys. The functions are written for one batch without
    a client dimension and run under `torch.func.vmap`; statistics are sums, so that batches add up.

    Args:
        build: Makes the model, drawing from torch's global CPU generator.
        spec: What one sample looks like.
        dtype: dtype of the model's floating-point tensors.

    Attributes:
        dtype: The dtype of the model's floating-point tensors and of the features given to it.
        spec: What one sample looks like.
        wants_outputs: Whether `metrics_of_outputs` is to be called, with all outputs of a whole
            evaluation at once.
    """

    wants_outputs: bool = False

    def __init__(
        self, build: Callable[[], nn.Module], spec: SampleSpec, dtype: torch.dtype
    ) -> None:
        self._build, self.spec, self.dtype = build, spec, dtype

    @abc.abstractmethod
    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's loss `[batch]`."""

    @abc.abstractmethod
    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return sums over the batch from which `metrics` is computed once they are added up.

        Args:
            outputs: The model's outputs, `[batch, ...]`.
            targets: `[batch]` classes, or `[batch, *target_shape]` numbers.
            weights: `[batch]`, 1 for a sample and 0 for padding, whatever the padding row holds.

        Returns:
            Scalars or tensors of a fixed shape in float64, additive over batches.
        """

    @abc.abstractmethod
    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return metrics by name from summed statistics, always of the same names.

        Args:
            sums: A statistic that is a scalar as a float, any other as a float64 tensor.

        Returns:
            The metrics. What the samples do not define (anything over no sample at all) is nan; a
            client's "loss" must be a finite number.
        """

    def metrics_of_outputs(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return metrics which need all outputs of an evaluation at once; see `wants_outputs`.

        Args:
            outputs: The model's outputs of every sample, `[n, ...]` on the CPU; n may be 0.
            targets: Their targets.
        """
        return {}

    def output_shape(self) -> tuple[int, ...] | None:
        """Return the shape that the model must give for one sample; None leaves it unchecked."""
        return None

    def build_model(self, seed: int) -> nn.Module:
        """Return a freshly initialised model on the CPU, in training mode.

        Equal seeds give equal bits, whatever was drawn before: `random` and `numpy.random` are
        seeded as torch is, and all of them are left as they were.

        Raises:
            ScenarioError: If the factory raises, or does not give a trainable module with finite
                numbers and outputs that fit.
        """
        # of torch's only the CPU generator: forking CUDA's would start CUDA
        with seeded(rng.derived_seed(seed, "model")):
            model = self._called()
            if not isinstance(model, nn.Module):
                raise ScenarioError(
                    f"[task] model: the factory gave a {type(model).__name__}, "
                    "expected a torch.nn.Module"
                )
            require_kept(model)
            model = model.to(self.dtype)
            self._check(model)
        return model.train()

    def require_repeatable(self, seed: int, model: nn.Module) -> None:
        """Refuse a model that begins otherwise when it is built anew from the same seed.

        Args:
            seed: What it was built from.
            model: What was built, as it was given.

        Raises:
            ScenarioError: Naming the tensor: the factory draws from a generator that cannot be
                seeded from here.
        """
        first, again = fingerprint(model), fingerprint(self.build_model(seed))
        for name in first.keys() | again.keys():
            if first.get(name) != again.get(name):
                raise ScenarioError(
                    f"[task] model: built twice from one seed, '{name}' begins otherwise: the "
                    "factory draws from a generator that fedsim cannot seed, such as "
                    "numpy.random.default_rng() without a seed; give it one, or draw from torch, "
                    "random or numpy.random"
                )

    def _called(self) -> nn.Module:
        """What the factory gives; its own errors are told as the model's."""
        try:
            return self._build()
        except (FedsimError, MemoryError, OverflowError):
            raise
        except Exception as error:
            if is_too_large(error):
                raise
            words = " ".join(str(error).split())
            raise ScenarioError(
                f"[task] model: the factory raised {type(error).__name__}: {words}"
            ) from error

    def _check(self, model: nn.Module) -> None:
        kept = KeptState([model], model.state_dict().keys())
        outputs = self._outputs(model)  # lazy layers get their tensors by it
        kept.put_back()
        require_complete(model)
        for name, tensor in tensors_of(model).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ScenarioError(
                    f"[task] model: '{name}' holds NaN or infinity as the model is initialised; "
                    f"{_remedy(model, name)}"
                )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ScenarioError("[task] model: the model has no trainable parameter")
        wanted = self.output_shape()
        fits = isinstance(outputs, Tensor)
        if fits and wanted is not None:
            fits = tuple(outputs.shape) == (2, *wanted)
        if not fits:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            expected = "a tensor" if wanted is None else f"outputs of shape {(2, *wanted)}"
            raise ScenarioError(
                f"[task] model: for two samples the model gives {found}, expected {expected}"
            )

    def _outputs(self, model: nn.Module) -> Any:
        """What the model gives for two samples of zeros."""
        shape = (2, *self.spec.feature_shape)
        features = torch.zeros(shape, dtype=torch.int64 if self.spec.vocabulary else self.dtype)
        try:
            with torch.no_grad():
                return model.eval()(features)
        except (FedsimError, MemoryError, OverflowError):
            raise
        except Exception as error:  # of the user's own code
            if is_too_large(error):
                raise
            words = " ".join(str(error).split())
            if not isinstance(error, RuntimeError | ValueError | TypeError | IndexError):
                words = f"{type(error).__name__}: {words}"
            kind = "tokens" if self.spec.vocabulary else "features"
            raise ScenarioError(
                f"[task] model: the model cannot take {kind} of shape {self.spec.feature_shape}, "
                f"tried on two samples: {words}"
            ) from error


def _remedy(model: nn.Module, name: str) -> str:
    """What to do about a tensor that is not finite."""
    if name in dict(model.named_buffers()):
        return (
            "what is sent is finite: if it never changes, as a mask, say "
            "register_buffer(..., persistent=False), and it is no part of what is sent"
        )
    return "correct how it is initialised"
