"""What a part of local training is: one change of what a client does. Needs torch alone.

A concrete part lives in one file under `clients/parts/`, and a scenario names it in a list:
`[client] parts = [{ name = "proximal", mu = 0.1 }]`. A procedure that takes parts, such as
`local_sgd`, calls their methods in every step, each method for all parts in the order of the list.
Like a procedure, a part is made of pure functions over named tensors, which run for one client,
under `torch.func.vmap`, or, where it `stacks`, on several clients' tensors at once, one row each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.basics.idle import Idle
from fedsim.client.procedure import (
    Batch,
    Draw,
    Gradient,
    Named,
    Objective,
    Work,
    overridden_below,
)

Own = dict[str, Any]  # what a part carries through a client's steps: a tree of tensors


class Here(NamedTuple):
    """Where a client stands before a step.

    Attributes:
        params: The trainable tensors by name.
        buffers: The model's buffers by name.
        batch: The step's samples.
        gradient: Gives loss and gradient at any parameters.
    """

    params: Named
    buffers: Named
    batch: Batch
    gradient: Gradient

    def gradient_at(self, params: Named) -> Named:
        """Return the gradient of the task's loss on the same samples at other parameters."""
        return self.gradient(params, self.buffers, self.batch)[1]


class Trained(NamedTuple):
    """What a client's training in a round came to.

    Attributes:
        received: The trainable tensors that it started from.
        params: Those that it ended with.
        steps: How many steps it took: a number, of the tensors' dtype; 0 without samples.
        path: The sum of the step sizes of these steps, likewise.
        momentum: The optimiser's, in [0, 1); None where it is none of SGD's.
    """

    received: Named
    params: Named
    steps: Tensor
    path: Tensor
    momentum: float | None


class ClientPart:
    """One change of local training as pure functions; concrete parts are final.

    Every method has a default that changes nothing. What a method gets as `own` is what `begin`
    returned, or what `gradient` made of it since. Nothing may branch on a tensor's value, call
    `.item()` or draw random numbers. Steps that a client does not take are undone by the executor.

    Attributes:
        takes: What it uses of what a strategy sends besides the model, by the first part of the
            tensors' names.
        needs: What of this it cannot do without: a strategy that sends it must be chosen.
        stacks: Whether its methods also take several clients' tensors at once, one row each. One
            whose penalty or objective uses `own` does not.
        idle: Which of its hyperparameters are without effect beside others.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    stacks: ClassVar[bool] = False
    idle: ClassVar[tuple[Idle, ...]] = ()

    @property
    def needs_classes(self) -> str | None:
        """The hyperparameter that needs classes as targets ("coefficient = 0.1"), or None."""
        return None

    @property
    def needs_numbers(self) -> str | None:
        """The hyperparameter that needs features that are numbers ("radius = 0.1"), or None."""
        return None

    @property
    def draws(self) -> Mapping[str, Draw]:
        """What is to be drawn for the samples of a step, by a purpose that is its own.

        Every step finds it in `batch.drawn`. It depends on seed, round, client and step alone.
        """
        return {}

    @property
    def strength(self) -> float | None:
        """The number a of a change of the gradient that is linear: g + a * p + b; else None.

        The executor may then take the steps itself, with b from `push`, and call `begin`, `push`
        and `finish` alone. With a part whose change is not linear it cannot.
        """
        return None

    @property
    def guides(self) -> Literal["step", "gradient"] | None:
        """Where the guidance that a strategy sends acts, if this part makes it act."""
        return None

    def setup_work(self, work: Work) -> Work:
        """Return how much is trained in a set-up exchange, given how much it would be."""
        return work

    def setup_step_size(self, step_size: float) -> float:
        """Return the step size in a set-up exchange, given what it would be."""
        return step_size

    def initial_state(self, params: Named) -> Named:
        """Return the part's client state before the client first trains."""
        return {}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Return what the part carries through the steps of a round.

        Args:
            received: The trainable tensors received.
            sent: What the strategy sent besides the model, all of it.
            state: The part's client state.
        """
        return {}

    def wrapped(self, gradient: Gradient, own: Own) -> Gradient:
        """Return another gradient in place of the task's, of other samples or at other points.

        A function will do: what else `gradient` has, such as `by_features`, is kept beside it.
        """
        return gradient

    def objective(self, own: Own) -> Objective | None:
        """Return what is minimised in place of the task's loss, or None; one part at most."""
        return None

    def penalty(self, own: Own) -> Objective | None:
        """Return a function of the outputs that is added to the objective, or None."""
        return None

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Return (the gradients changed, what the part carries on); before any clipping."""
        return grads, own

    def direction(self, grads: Named, own: Own) -> Named:
        """Return the gradients changed after clipping and weight decay."""
        return grads

    def step(self, steps: Named, own: Own) -> Named:
        """Return what the parameters are reduced by, changed."""
        return steps

    def push(self, own: Own) -> Named:
        """Return b of a linear change by name, see `strength`; nothing where it is 0."""
        return {}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Return (extra tensors of the reply, the part's client state for its next round)."""
        return {}, state


class Parts(Sequence[ClientPart]):
    """The parts of one procedure, each method of them one after another.

    Args:
        parts: The parts, no two of one class.

    Raises:
        ValueError: If a part is there twice, or two of them replace the task's loss.
    """

    def __init__(self, parts: Sequence[ClientPart] = ()) -> None:
        self._parts = {type(part).__name__: part for part in parts}
        if len(self._parts) < len(parts):
            names = [type(part).__name__ for part in parts]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"parts: {twice} is there twice; give each part once")
        replacing = [n for n, p in self._parts.items() if type(p).objective is not _NO_OBJECTIVE]
        if len(replacing) > 1:
            raise ValueError(
                f"parts: {' and '.join(replacing)} each minimise something in place of the task's "
                "loss; give one of them"
            )

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        return list(self._parts.values())[index]

    @property
    def takes(self) -> tuple[str, ...]:
        """What they use of what a strategy sends."""
        return tuple(dict.fromkeys(name for part in self for name in part.takes))

    @property
    def stacks(self) -> bool:
        """Whether all of them take several clients at once."""
        return all(
            part.stacks and not overridden_below(part, "stacks", _ONE_BY_ONE) for part in self
        )

    @property
    def looks_back(self) -> bool:
        """Whether one of them keeps or returns something at the end of a client's training."""
        return any(
            type(part).finish is not _NO_FINISH or type(part).initial_state is not _NO_STATE
            for part in self
        )

    @property
    def pushes(self) -> bool:
        """Whether one of them adds to the gradient what is constant in a round."""
        return any(type(part).push is not _NO_PUSH for part in self)

    @property
    def needs_classes(self) -> str | None:
        """The first hyperparameter that needs classes as targets, or None."""
        return next((why for part in self if (why := part.needs_classes)), None)

    @property
    def needs_numbers(self) -> str | None:
        """The first hyperparameter that needs features that are numbers, or None."""
        return next((why for part in self if (why := part.needs_numbers)), None)

    @property
    def draws(self) -> Mapping[str, Draw]:
        """What all of them ask to have drawn, by purpose."""
        return {purpose: draw for part in self for purpose, draw in part.draws.items()}

    @property
    def guides(self) -> Literal["step", "gradient"] | None:
        """Where a guidance acts, None where no part makes it act."""
        return next((where for part in self if (where := part.guides)), None)

    @property
    def strength(self) -> float | None:
        """The sum of their strengths; None where one of them is not linear."""
        total = 0.0
        for part in self:
            if part.strength is None or overridden_below(part, "strength", _BESIDE_STRENGTH):
                return None
            total += part.strength
        return total

    def initial_state(self, params: Named) -> Named:
        """Return all parts' client state, each under its own name."""
        return _joined({name: part.initial_state(params) for name, part in self._parts.items()})

    def begin(self, received: Named, sent: Named, state: Named) -> dict[str, Own]:
        """Return what each part carries, by its name."""
        return {
            name: part.begin(received, sent, _of(name, state)) for name, part in self._parts.items()
        }

    def wrapped(self, gradient: Gradient, own: Mapping[str, Own]) -> Gradient:
        """Return the gradient as all parts have it, the first of them innermost."""
        for name, part in self._parts.items():
            made = part.wrapped(gradient, own[name])
            # a part that only changes what is called leaves the other ways as they are
            gradient = made if hasattr(made, "by_features") else _Beside(made, gradient)
        return gradient

    def objective(self, own: Mapping[str, Own]) -> Objective | None:
        """Return what is minimised in place of the task's loss, or None."""
        found = (part.objective(own[name]) for name, part in self._parts.items())
        return next((each for each in found if each is not None), None)

    def penalty(self, own: Mapping[str, Own]) -> Objective | None:
        """Return the sum of their penalties, or None."""
        found = (part.penalty(own[name]) for name, part in self._parts.items())
        penalties = [each for each in found if each is not None]
        if len(penalties) < 2:
            return penalties[0] if penalties else None

        def all_of_them(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return torch.stack([each(outputs, targets, weights) for each in penalties]).sum(0)

        return all_of_them

    def gradient(
        self, grads: Named, here: Here, own: Mapping[str, Own]
    ) -> tuple[Named, dict[str, Own]]:
        """Return (the gradients as they leave them, what each carries on)."""
        after: dict[str, Own] = {}
        for name, part in self._parts.items():
            grads, after[name] = part.gradient(grads, here, own[name])
        return grads, after

    def direction(self, grads: Named, own: Mapping[str, Own]) -> Named:
        """Return the gradients as they leave them after clipping and weight decay."""
        for name, part in self._parts.items():
            grads = part.direction(grads, own[name])
        return grads

    def step(self, steps: Named, own: Mapping[str, Own]) -> Named:
        """Return the steps as they leave them."""
        for name, part in self._parts.items():
            steps = part.step(steps, own[name])
        return steps

    def push(self, own: Mapping[str, Own]) -> Named:
        """Return the sum of what they add to the gradient, by name."""
        total: Named = {}
        for name, part in self._parts.items():
            for tensor, added in part.push(own[name]).items():
                total[tensor] = total[tensor] + added if tensor in total else added
        return total

    def finish(self, own: Mapping[str, Own], trained: Trained, state: Named) -> tuple[Named, Named]:
        """Return (extra tensors of the reply, all parts' client state)."""
        extra: Named = {}
        kept: dict[str, Named] = {}
        for name, part in self._parts.items():
            returned, kept[name] = part.finish(own[name], trained, _of(name, state))
            extra |= returned
        return extra, _joined(kept)


class _Beside:
    """A gradient in place of another one, whose other ways stay."""

    def __init__(self, called: Callable[..., Any], below: Gradient) -> None:
        self._called, self._below = called, below

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._called(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


def sent_as(name: str, sent: Named) -> Named:
    """Return what a strategy sent under a name, by the names of the model's tensors.

    Args:
        name: The first part of the tensors' names.
        sent: All that it sent besides the model.

    Example:
        >>> sent_as("control", {"control.output.bias": torch.zeros(2), "other": torch.ones(1)})
        {'output.bias': tensor([0., 0.])}
    """
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in sent.items() if key.startswith(start)}


def as_sent(name: str, tensors: Named) -> Named:
    """Return tensors under the names in which they travel; the opposite of `sent_as`."""
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


_NO_OBJECTIVE: Callable[..., Any] = ClientPart.objective
_NO_PUSH: Callable[..., Any] = ClientPart.push
_NO_FINISH: Callable[..., Any] = ClientPart.finish
_NO_STATE: Callable[..., Any] = ClientPart.initial_state
_PLAIN = (
    "takes", "needs", "idle", "needs_classes", "needs_numbers", "setup_work", "setup_step_size"
)  # fmt: skip
# what may be overridden below a class that says it stacks, or that it is linear
_ONE_BY_ONE = (*_PLAIN, "initial_state", "begin", "finish", "push", "strength", "guides")
_BESIDE_STRENGTH = (*_PLAIN, "stacks", "initial_state", "begin", "finish", "guides")


def _joined(by_part: Mapping[str, Named]) -> Named:
    return {f"{name}/{key}": t for name, named in by_part.items() for key, t in named.items()}


def _of(name: str, state: Named) -> Named:
    start = f"{name}/"
    return {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}
