"""The parts of one procedure together: each method of them, one part after another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from fedsim.client.bound import in_place_of, sum_of
from fedsim.client.compression import CompressingPart
from fedsim.client.freezing import frozen_by_any
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.overriding import overridden_below
from fedsim.client.part import ClientPart, Here, Own, Trained
from fedsim.client.procedure import Draw, Gradient, Named, Objective, Work

_NO_OBJECTIVE: Callable[..., Any] = ClientPart.objective
_NO_MODEL: Callable[..., Any] = ClientPart.own_model
_NO_PUSH: Callable[..., Any] = ClientPart.push
_NO_FINISH: Callable[..., Any] = ClientPart.finish
_NO_STATE: Callable[..., Any] = ClientPart.initial_state
_PLAIN = (
    "takes", "knows", "needs", "idle", "needs_classes", "needs_numbers", "needs_representations",
    "setup_work", "setup_step_size", "compressed", "for_model", "frozen", "names_personal",
    "holds_out",
)  # fmt: skip
# what may be overridden below a class that says it stacks, or that it is linear
_ONE_BY_ONE = (
    *_PLAIN, "initial_state", "begin", "finish", "push", "strength", "guides", "own_model",
    "measured", "companion", "companion_of", "accompanied",
)  # fmt: skip
_BESIDE_STRENGTH = (
    *_PLAIN, "stacks", "initial_state", "begin", "finish", "guides", "own_model", "measured"
)  # fmt: skip


class Parts(Sequence[ClientPart]):
    """The parts of one procedure, each method of them one after another.

    Args:
        parts: The parts, no two of one class.

    Raises:
        ValueError: If a part is there twice, or two of them replace the task's loss or compress.
    """

    def __init__(self, parts: Sequence[ClientPart] = ()) -> None:
        self._parts = {type(part).__name__: part for part in parts}
        if len(self._parts) < len(parts):
            names = [type(part).__name__ for part in parts]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"parts: {twice} is there twice; give each part once")
        compressing = [n for n, p in self._parts.items() if p.compresses]
        if len(compressing) > 1:
            raise ValueError(
                f"parts: {' and '.join(compressing)} each compress the reply; give one of them"
            )
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

    def __iter__(self) -> Iterator[ClientPart]:
        return iter(self._parts.values())

    def for_model(self, tensors: ModelTensors, work: Work) -> "Parts":
        """Return the parts as they train a certain model, see `ClientPart.for_model`."""
        return Parts([part.for_model(tensors, work) for part in self])

    @property
    def frozen(self) -> FrozenByEpoch:
        """The tensors that one of them freezes, by epoch."""
        return frozen_by_any([part.frozen for part in self])

    @property
    def takes(self) -> tuple[str, ...]:
        """What they use of what a strategy sends."""
        return tuple(dict.fromkeys(name for part in self for name in part.takes))

    @property
    def knows(self) -> tuple[str, ...]:
        """What they ask to know of the client's training samples."""
        return tuple(dict.fromkeys(name for part in self for name in part.knows))

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
    def compression(self) -> CompressingPart | None:
        """The one that compresses the reply, or None."""
        return next((part for part in self if isinstance(part, CompressingPart)), None)

    @property
    def draws(self) -> Mapping[str, Draw]:
        """What all of them ask to have drawn, by purpose."""
        return {purpose: draw for part in self for purpose, draw in part.draws.items()}

    @property
    def holds_out(self) -> float:
        """The largest share of the client's samples that one of them holds out."""
        return max((part.holds_out for part in self), default=0.0)

    @property
    def needs_representations(self) -> str | None:
        """The first hyperparameter that needs a linear last layer, or None."""
        return next((why for part in self if (why := part.needs_representations)), None)

    @property
    def companion(self) -> tuple[str, float, float | None] | None:
        """(the part, a, step size) of the one that has a companion; None where none has."""
        found = [(n, *each) for n, p in self._parts.items() if (each := p.companion) is not None]
        return found[0] if found else None

    def companion_of(self, own: Mapping[str, Own]) -> tuple[Named, Named]:
        """Return (where the companion starts, what is added to its gradient)."""
        name = next(n for n, p in self._parts.items() if p.companion is not None)
        return self._parts[name].companion_of(own[name])

    def accompanied(self, own: Mapping[str, Own], companion: Named) -> dict[str, Own]:
        """Return what each carries on after the companion's steps."""
        name = next(n for n, p in self._parts.items() if p.companion is not None)
        return {**own, name: self._parts[name].accompanied(own[name], companion)}

    @property
    def guides(self) -> Literal["step", "gradient"] | None:
        """Where a guidance acts, None where no part makes it act."""
        return next((where for part in self if (where := part.guides)), None)

    @property
    def strength(self) -> float | None:
        """The sum of their strengths; None where one of them is not linear."""
        total = 0.0
        if sum(part.companion is not None for part in self) > 1:
            return None
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
            # a function alone leaves what else the gradient has as it is
            gradient = made if hasattr(made, "by_features") else in_place_of(gradient, made)
        return gradient

    def look(self, here: Here, own: Mapping[str, Own]) -> dict[str, Own]:
        """Return what the objectives and penalties of a step see of each."""
        return {name: part.look(here, own[name]) for name, part in self._parts.items()}

    def objective(self, own: Mapping[str, Own]) -> Objective | None:
        """Return what is minimised in place of the task's loss, or None."""
        found = (part.objective(own[name]) for name, part in self._parts.items())
        return next((each for each in found if each is not None), None)

    def penalty(self, own: Mapping[str, Own]) -> Objective | None:
        """Return the sum of their penalties, or None."""
        return sum_of([part.penalty(own[name]) for name, part in self._parts.items()])

    def inner_penalty(self, own: Mapping[str, Own]) -> Objective | None:
        """Return the sum of their penalties of what goes into the last layer, or None."""
        return sum_of([part.inner_penalty(own[name]) for name, part in self._parts.items()])

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

    def stepped(self, own: Mapping[str, Own], here: Here, params: Named) -> dict[str, Own]:
        """Return what each carries on after a step."""
        return {name: part.stepped(own[name], here, params) for name, part in self._parts.items()}

    @property
    def has_own_model(self) -> bool:
        """Whether clients have a model of their own beside the one that they send."""
        return any(type(part).own_model is not _NO_MODEL for part in self)

    def own_model(self, params: Named, state: Named) -> Named:
        """Return the client's own model: that of the last part that has one."""
        for name, part in self._parts.items():
            params = part.own_model(params, _of(name, state))
        return params

    def measured(self, state: Named) -> Named:
        """Return numbers that tell of the parts' client state."""
        found: Named = {}
        for name, part in self._parts.items():
            found |= part.measured(_of(name, state))
        return found

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


def _joined(by_part: Mapping[str, Named]) -> Named:
    return {f"{name}/{key}": t for name, named in by_part.items() for key, t in named.items()}


def _of(name: str, state: Named) -> Named:
    start = f"{name}/"
    return {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}
