"""Tensors that take no step in some epochs of a round. Needs torch alone.

An epoch is a pass over the client's own samples, so clients of unequal size are in different epochs
at the same step. A tensor that takes no step keeps its value and its optimiser's moments, as one
that torch does not train: neither weight decay nor momentum moves it.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import ScenarioError
from fedsim.basics.patterns import chosen
from fedsim.client.arithmetic import along
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.procedure import Named


def head_of(
    part: str, key: str, patterns: Sequence[str] | None, tensors: ModelTensors
) -> frozenset[str]:
    """Return the trained tensors that are trained apart from the others.

    Args:
        part: The part that asks, as a scenario calls it, for messages.
        key: Its key that has the patterns.
        patterns: See `fedsim.basics.patterns.is_meant`; None takes what clients keep to themselves.
        tensors: What is known of the model.

    Raises:
        ScenarioError: If a pattern names no trained tensor, or all of them are named.

    Example:
        >>> known = ModelTensors(("body.weight", "head.weight"), frozenset(["head.weight"]))
        >>> [head_of("frozen", "tensors", each, known) for each in (None, ["body"])]
        [frozenset({'head.weight'}), frozenset({'body.weight'})]
    """
    where = f"[client.parts] {part}: {key}"
    if patterns is None:
        found, said = tensors.personal & frozenset(tensors.trained), "None, with [task] personal"
    else:
        try:
            found, said = chosen(patterns, tensors.trained), str(list(patterns))
        except ValueError as error:
            raise ScenarioError(f"{where}: {error}") from None
    if found and len(found) == len(tensors.trained):
        raise ScenarioError(
            f"{where} = {said}: names every trained tensor; must leave some to train without them"
        )
    return found


def frozen_by_any(each: Sequence[FrozenByEpoch]) -> FrozenByEpoch:
    """Return what one or the other freezes in every epoch.

    Example:
        >>> found = frozen_by_any([(frozenset("a"),), (frozenset("b"), frozenset())])
        >>> [sorted(names) for names in found]
        [['a', 'b'], ['a']]
    """
    given = [by_epoch for by_epoch in each if any(by_epoch)]
    length = max((len(by_epoch) for by_epoch in given), default=0)
    return tuple(
        frozenset().union(*(by_epoch[min(epoch, len(by_epoch) - 1)] for by_epoch in given))
        for epoch in range(length)
    )


def which_move(frozen: FrozenByEpoch, names: Collection[str], epoch: Tensor) -> Named:
    """Return whether each tensor takes a step, of one client or of several, a row each.

    Args:
        frozen: The names that take none, by epoch.
        names: Of all tensors.
        epoch: The epoch that a client is in, `[]` or `[clients]`, int64.

    Returns:
        Truth values of the shape of `epoch`, by name.

    Example:
        >>> turns = (frozenset("a"), frozenset("b"))
        >>> which_move(turns, ["a", "b"], torch.tensor([0, 1, 5]))["a"].tolist()
        [False, True, True]
    """
    every = torch.arange(len(frozen), device=epoch.device)
    # no index: under vmap an epoch is a number that nobody may look at
    now = epoch.clamp(max=len(frozen) - 1).unsqueeze(-1) == every
    rows = {name: tuple(name not in fixed for fixed in frozen) for name in names}
    masks = {
        row: (now & torch.tensor(row, device=epoch.device)).any(-1) for row in set(rows.values())
    }
    return {name: masks[row] for name, row in rows.items()}


def where_moving(moves: Named, stepped: Named, before: Named) -> Named:
    """Return tensors after a step, those that take none as they were.

    Args:
        moves: Whether each takes a step, from `which_move`.
        stepped: The tensors after the step, by the same names.
        before: Those before it.
    """
    return {n: torch.where(along(moves[n], t), t, before[n]) for n, t in stepped.items()}


def still_rows(frozen: FrozenByEpoch, epochs: np.ndarray) -> Mapping[str, Tensor | None]:
    """Return which clients' tensors take no step, by name; names of which all do are left out.

    Args:
        frozen: The names that take none, by epoch.
        epochs: The epoch that each client is in, int64 `[clients]`.

    Returns:
        The clients' places, int64, or None where it is all of them.
    """
    now = [frozen[min(epoch, len(frozen) - 1)] for epoch in epochs.tolist()]
    found: dict[str, Tensor | None] = {}
    for name in frozenset().union(*now):
        places = [place for place, fixed in enumerate(now) if name in fixed]
        found[name] = None if len(places) == len(now) else torch.tensor(places)
    return found
