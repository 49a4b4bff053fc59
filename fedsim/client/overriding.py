"""What still holds of a procedure or part of which a class below overrides some methods."""

from typing import Any

from torch import nn

from fedsim.client.procedure import ClientProcedure, Descent

_VMAPPED = ("initial_state", "begin", "finish")
_NO_STEPS = (
    "work",
    "setup_work",
    "needs_classes",
    "needs_numbers",
    "needs_representations",
    "holds_out",
    "takes",
    "knows",
    "idle",
    "has_own_model",
    "own_model",
    "compression",
)


def remembered(procedure: ClientProcedure, model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a client remembers under a procedure: names, shapes and dtypes."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state = procedure.initial_state(params)
    return {name: (tuple(t.shape), t.dtype) for name, t in state.items()}


def descent_of(procedure: ClientProcedure, server_round: int) -> Descent | None:
    """Return the procedure's descent, None where a class below has other steps than it tells of.

    A class that inherits `descent` and overrides a part of its steps is trained by its own steps.
    If it overrides `descent` too, it says that its descent is true.
    """
    if overridden_below(procedure, "descent", _NO_STEPS):
        return None
    return procedure.descent(server_round)


def stacks(procedure: ClientProcedure) -> bool:
    """Tell whether `step` takes several clients at once, as the class that has this step says."""
    if overridden_below(procedure, "stacks", (*_NO_STEPS, *_VMAPPED, "descent", "push")):
        return False
    return procedure.stacks


def overridden_below(instance: Any, name: str, other: tuple[str, ...]) -> bool:
    """Tell whether anything but `other` is overridden below the class that defines `name`.

    Args:
        instance: A procedure, or a part of one.
        name: An attribute of its class by which it says something of its methods.
        other: What may be overridden all the same.
    """
    if name in vars(instance):
        return False
    lineage = type(instance).__mro__
    definer = next(place for place, kind in enumerate(lineage) if name in vars(kind))
    below = [name for kind in lineage[:definer] for name in vars(kind)]
    below += [name for name, value in vars(instance).items() if callable(value)]
    skipped = (*other, "_abc_impl")
    return any(
        n not in skipped
        and not n.startswith("__")
        and any(n in vars(kind) for kind in lineage[definer:])
        for n in below
    )
