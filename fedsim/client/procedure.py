"""What a client procedure is: local work as pure functions over named tensors. Needs torch alone.

A concrete procedure lives in one file under `clients/`. The executor calls it for one client under
`torch.func.vmap`, so that the same few lines train one client or a whole chunk of them.
"""

import abc
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.idle import Idle
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.perturbation import ByFeatures, Units

Named = dict[str, Tensor]
Carry = dict[str, Any]
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
Losses = Callable[[Tensor, Tensor], Tensor]

LastBatch = Literal["keep", "drop", "merge"]

# What a procedure may ask to know of a client's training samples: how many of each class.
CLASS_COUNTS = "class_counts"

# What travels as `guidance.NAME`: a factor on each coordinate's local step, between 0 and 1.
GUIDANCE = "guidance"


class Batch(NamedTuple):
    """One step's samples of one client.

    Attributes:
        features: `[batch, ...]`; rows beyond the client's samples are padding.
        targets: `[batch]`.
        weights: `[batch]`, 1 for a sample and 0 for padding.
        noise: Uniform numbers in [0, 1) for each dropout layer, by the name of its buffer.
        drawn: What the procedure asked to have drawn, `[batch, ...]` by its purpose; see `Draw`.
        epoch: Which of the round's passes over the client's samples it is of, counted from 0,
            int64; None where nobody has counted.
        held_out: Some of the samples that the client trains on in no step, for other purposes; an
            empty tuple, which vmap does not look into, where none are held out.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor
    noise: Mapping[str, Tensor]
    drawn: Mapping[str, Tensor] = {}
    epoch: Tensor | None = None
    held_out: "Batch | tuple[()]" = ()


class Draw(NamedTuple):
    """What a procedure asks to have drawn for the samples of a step.

    Attributes:
        of: Draws from a generator for so many samples of that shape, float32 `[samples, ...]`.
        once: Whether a client draws once for the whole run, else anew in every step.
    """

    of: Callable[[np.random.Generator, int, tuple[int, ...]], np.ndarray]
    once: bool = False


class Gradient(Protocol):
    """Loss and gradient of the task's model, given by the executor."""

    @property
    def units(self) -> Units | None:
        """How the features were measured before they were standardised; None as they are."""

    def __call__(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
        inner: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (objective, gradients by name, buffers after the forward pass).

        The gradients are those of objective plus penalties.

        Args:
            params: Trainable tensors by name.
            buffers: The model's buffers by name.
            batch: The step's samples.
            objective: `(outputs, targets, weights) -> scalar` to minimise; None takes the task's
                loss averaged over the samples that are not padding.
            penalty: A function of the same kind that is added to the objective, or None.
            inner: Likewise, of the representations in place of the outputs.
        """

    def outputs(self, params: Named, buffers: Named, batch: Batch) -> Tensor:
        """Return the model's outputs on a batch, as in training but for their graph."""

    def representations(self, params: Named, buffers: Named, batch: Batch) -> Tensor:
        """Return what goes into the model's last layer, which must be linear, likewise."""

    def by_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the gradient of the task's mean loss by a model's outputs, at any outputs."""

    def by_features(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        losses: Losses | None = None,
        *,
        training: bool = False,
    ) -> ByFeatures:
        """Return outputs, losses and the losses' slope by the features; no buffer moves.

        Args:
            params: Trainable tensors by name.
            buffers: The model's buffers by name.
            batch: The samples.
            losses: `(outputs, targets) -> [batch]`, with a client dimension before where there are
                several; None takes the task's.
            training: Whether the model is as in training, BatchNorm by the statistics of these
                samples and dropout with the step's masks; else as in evaluation.
        """


class Descent(NamedTuple):
    """A step of gradient descent: p <- p - step_size * d, d = gradient + weight_decay * p.

    With momentum, m <- momentum * m + d takes the place of d. Where a guidance G is received, it is
    a factor on what p is reduced by, or on d.

    Attributes:
        step_size: eta; >= 0.
        weight_decay: L2 coefficient; >= 0.
        momentum: In [0, 1).
        guides_step: Whether a guidance acts on the step, else on d.
        keeps_moments: Whether m goes on from the client's state and is a part of it, by the names
            of the parameters; else m is 0 at the start of a round and forgotten at its end.
        pull: A further coefficient of the parameters in d; >= 0.
        pushes: Whether the procedure's `push` is a further term of d.
        looks_back: Whether the procedure's `finish` has more to do than to keep the moments.
        takes: What it accounts for of what a strategy sends.
        companion: The descent of a model of the client's own, on the same samples after these steps
            were taken, if there is one; see `ClientProcedure.companion`.
        factor: The factor in [0, 1] on the step size in a step of the round, counted from 0, the
            same for all clients; None is 1.
        frozen: The tensors that take no step, by epoch of the round. They keep m, too.
    """

    step_size: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    guides_step: bool = True
    keeps_moments: bool = False
    pull: float = 0.0
    pushes: bool = False
    looks_back: bool = False
    takes: tuple[str, ...] = (GUIDANCE,)
    companion: "Descent | None" = None
    factor: Callable[[int], float] | None = None
    frozen: FrozenByEpoch = ()

    def at(self, step: int) -> "Descent":
        """Return what a certain step of the round does."""
        if self.factor is None:
            return self
        return self._replace(step_size=self.step_size * self.factor(step), factor=None)

    def path(self, steps: Tensor) -> Tensor:
        """Return the sum of the sizes of the first steps, for each number of steps.

        Example:
            >>> Descent(0.5, factor=lambda step: 1 / (step + 1)).path(torch.tensor([0.0, 2.0]))
            tensor([0.0000, 0.7500])
        """
        if self.factor is None:
            return steps * self.step_size
        factors = map(self.factor, range(int(steps.max())))
        sums = torch.tensor([0.0, *itertools.accumulate(factors)], dtype=torch.float64)
        return (self.step_size * sums[steps.long()]).to(steps.dtype)

    @property
    def decay(self) -> float:
        """The coefficient of the parameters in d."""
        return self.weight_decay + self.pull

    @property
    def largest(self) -> float:
        """The largest factor that a step needs."""
        return max(self.step_size, self.decay, self.step_size * self.decay)


class Work(NamedTuple):
    """How much a client trains in one round.

    Attributes:
        batch_size: Samples per step; the last batch of an epoch holds what is left.
        epochs: Passes over the client's samples; None when `steps` counts.
        steps: Steps, going on into reshuffled passes; None when `epochs` counts.
        last_batch: What becomes of a last batch that is short: it is kept, dropped, or merged into
            the one before. Where it is the only one it is kept under all three, but a lone sample
            is trained on under "keep" alone.
    """

    batch_size: int
    epochs: int | None
    steps: int | None
    last_batch: LastBatch = "keep"

    def batches(self, num_examples: int) -> tuple[int, int]:
        """Return (batches of one pass over that many samples, samples in the last of them).

        Example:
            >>> [Work(10, 1, None, last).batches(23) for last in ("keep", "drop", "merge")]
            [(3, 3), (2, 10), (2, 13)]
        """
        full, left = divmod(num_examples, self.batch_size)
        if self.last_batch == "keep" or not left:
            return (full + 1, left) if left else (full, self.batch_size if full else 0)
        if not full:
            return (1, left) if left > 1 else (0, 0)
        return full, self.batch_size + (left if self.last_batch == "merge" else 0)

    @property
    def largest_batch(self) -> int:
        """The most samples that a step may have."""
        return 2 * self.batch_size - 1 if self.last_batch == "merge" else self.batch_size

    def num_steps(self, num_examples: int) -> int:
        """Return how many steps a client with that many samples takes (none without samples)."""
        per_epoch, _ = self.batches(num_examples)
        if not per_epoch:
            return 0
        return self.steps if self.steps is not None else (self.epochs or 0) * per_epoch


class Compression(Protocol):
    """What is sent in place of a model, see `fedsim.client.compression`."""

    def compressed(self, outcome: Any) -> Any:
        """Return what a client sends and keeps."""


class ClientProcedure(abc.ABC):
    """Local training as pure functions; concrete procedures are final.

    Every method sees one client's tensors without a client dimension. Under vmap nothing may branch
    on a tensor's value, call `.item()` or draw random numbers. Steps that a client does not take
    (padding) are undone by the executor, so no method needs to know of them.

    Attributes:
        takes: What it uses of what a strategy sends besides the model, by the first part of the
            tensors' names.
        stacks: Whether `step` also takes several clients' tensors at once, one row each, and gives
            a loss per client; `gradient` then does, too, and takes objectives of one client that
            use nothing of the carry, or are a `BoundObjective`. Such a step needs no vmap, whose
            dispatch costs more than the arithmetic of small models.
        knows: What it asks to know of the client's training samples; `begin` gets it among what was
            sent, under the same name. "class_counts" is how many the client has of each class,
            `[classes]`, of the parameters' dtype.
        idle: Which of its hyperparameters are without effect beside others.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    knows: ClassVar[tuple[str, ...]] = ()
    stacks: ClassVar[bool] = False
    idle: ClassVar[tuple[Idle, ...]] = ()

    @property
    @abc.abstractmethod
    def work(self) -> Work:
        """How much is trained per round."""

    @property
    def setup_work(self) -> Work:
        """How much is trained in a set-up exchange, round 0; by default as in any round."""
        return self.work

    @property
    def needs_classes(self) -> str | None:
        """The hyperparameter that needs classes as targets ("margin = 0.1"), or None."""
        return None

    @property
    def needs_numbers(self) -> str | None:
        """The hyperparameter that needs features that are numbers ("radius = 0.1"), or None."""
        return None

    @property
    def draws(self) -> Mapping[str, Draw]:
        """What is to be drawn for the samples of a step, by its purpose."""
        return {}

    @property
    def holds_out(self) -> float:
        """The share of a client's training samples that no step trains on, in [0, 1).

        They are drawn once for the run, at least two or none, and do not count in `num_examples`;
        every batch brings some of them along as `held_out`.
        """
        return 0.0

    @property
    def needs_representations(self) -> str | None:
        """The hyperparameter that needs a model whose last layer is linear, or None."""
        return None

    @property
    def follows_rounds(self) -> bool:
        """Whether a step may be another one in another round, as where step sizes decay.

        If not, clients whose work begins in different rounds are trained together.
        """
        return True

    def for_model(self, tensors: ModelTensors) -> "ClientProcedure":
        """Return the procedure as it trains a certain model; what it knows by itself, it leaves.

        Raises:
            ValueError: If it cannot train that model.
        """
        return self

    def descent(self, server_round: int) -> Descent | None:
        """Return what a step does when it is gradient descent on the task's loss, else None.

        The executor may then take the steps itself, inside of the backward pass, for clients that
        receive nothing but the model and what the descent takes. `begin` and `finish` are called
        where the descent says so; `finish` then finds what was trained in the carry as `params`,
        the number of steps as `steps`, the sum of their sizes as `path`, and the moments as
        `moments` where they are kept. Elsewhere `begin` must only carry what it is given and
        `finish` return no more than the moments.
        Rounding differs from that of `step`.
        """
        return None

    def push(self, carry: Carry) -> Named:
        """Return what the descent adds to the gradient in every step, by name."""
        return {}

    def companion(self, carry: Carry) -> tuple[Named, Named]:
        """Return (where the companion of a descent starts, what is added to its gradient)."""
        return {}, {}

    def accompanied(self, carry: Carry, companion: Named) -> Carry:
        """Return the carry with a companion's parameters after its descent."""
        return carry

    def initial_state(self, params: Named) -> Named:
        """Return the client's state before it first trains: fixed-shape named tensors."""
        return {}

    @abc.abstractmethod
    def begin(self, params: Named, buffers: Named, extra: Named, state: Named) -> Carry:
        """Return what the steps carry along; it must hold `params` and `buffers`.

        Args:
            params: The trainable tensors received.
            buffers: The buffers received.
            extra: What the strategy sent besides the model, shared and personal together.
            state: The client's state.
        """

    @abc.abstractmethod
    def step(
        self, carry: Carry, batch: Batch, gradient: Gradient, *, server_round: int
    ) -> tuple[Carry, Tensor]:
        """Return the carry after one step, and the step's loss (a scalar)."""

    def finish(self, carry: Carry, state: Named) -> tuple[Named, Named]:
        """Return (extra tensors of the reply, the client's state for its next round)."""
        return {}, state

    @property
    def compression(self) -> Compression | None:
        """What compresses the reply, by the executor; None where the model is sent as it is."""
        return None

    @property
    def has_own_model(self) -> bool:
        """Whether clients have a model of their own beside the one that they send."""
        return False

    def own_model(self, params: Named, state: Named) -> tuple[Named, Named]:
        """Return (the client's own model, numbers that tell of its state), for an evaluation.

        Args:
            params: The trainable tensors received.
            state: The client's state; where it has not trained, the initial one.
        """
        return params, {}
