"""Schedules of the local step size, over rounds or over the steps of a round. Needs torch alone.

A schedule is a factor in [0, 1] on the step size, for unit t = 0, 1, ...: linear warm-up, then
constant, in steps, or along a half cosine (Loshchilov and Hutter, "SGDR", ICLR 2017,
arXiv:1608.03983, equation 5, without restarts).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fedsim.basics.errors import nearest, show, unknown

Kind = Literal["constant", "step", "cosine"]
Over = Literal["rounds", "steps"]

_KEYS = {
    "constant": ("kind", "over", "warmup"),
    "step": ("kind", "over", "warmup", "every", "factor"),
    "cosine": ("kind", "over", "warmup", "length", "floor"),
}


class StepSizes(NamedTuple):
    """A schedule of step sizes.

    Attributes:
        kind: What follows the warm-up: "constant", "step" or "cosine".
        over: What a unit is: one of the "rounds" of the run, or of the "steps" of a round.
        warmup: Units over which the factor rises linearly, 1/(warmup + 1) first; the unit after
            them is the first of the schedule proper.
        length: Units until a cosine is at its floor, warm-up included; it stays there.
        floor: Where a cosine ends.
        every: Units between two steps down.
        factor: What a step down multiplies by.
    """

    kind: Kind = "constant"
    over: Over = "rounds"
    warmup: int = 0
    length: int = 1
    floor: float = 0.0
    every: int = 1
    factor: float = 0.1

    @property
    def changes(self) -> bool:
        """Whether the factor is ever anything but 1."""
        return self.kind != "constant" or self.warmup > 0

    def at(self, unit: int) -> float:
        """Return the factor of a unit, counted from 0.

        Example:
            >>> cosine = StepSizes("cosine", warmup=1, length=3)
            >>> [round(cosine.at(unit), 3) for unit in range(5)]
            [0.5, 1.0, 0.5, 0.0, 0.0]
        """
        return float(self.each(torch.tensor(unit, dtype=torch.float64)))

    def each(self, units: Tensor) -> Tensor:
        """Return the factors of units, whole numbers in a floating-point tensor of any shape."""
        since = (units - self.warmup).clamp(min=0)
        if self.kind == "cosine":
            turned = math.pi * (since / (self.length - self.warmup)).clamp(max=1)
            after = self.floor + (1 - self.floor) * (1 + torch.cos(turned)) / 2
        elif self.kind == "step":
            after = self.factor ** torch.floor(since / self.every)
        else:
            after = torch.ones_like(units)
        return torch.where(units < self.warmup, (units + 1) / (self.warmup + 1), after)


def step_sizes(table: Mapping[str, Any] | None) -> StepSizes:
    """Return the schedule that a table tells; None and an empty one leave the step size alone.

    Args:
        table: `kind`, `over` ("rounds" or "steps"), `warmup`; with kind "cosine" also `length` (no
            default) and `floor`, with "step" `every` (no default) and `factor`.

    Raises:
        ValueError: If a key is unknown, missing, of another kind of schedule, or impossible.

    Example:
        >>> step_sizes({"kind": "step", "every": 10, "factor": 0.5}).at(25)
        0.25
    """
    table = {} if table is None else dict(table)
    kind = table.get("kind", "constant")
    for name, value, choices in (
        ("kind", kind, get_args(Kind)),
        ("over", table.get("over", "rounds"), get_args(Over)),
    ):
        if value not in choices:
            guess = nearest(str(value), choices)
            hint = f"; did you mean {show(guess)}?" if guess else ""
            allowed = " or ".join(map(show, choices))
            raise ValueError(f"schedule.{name} = {show(value)}: must be {allowed}{hint}")
    for name in table:
        if name not in StepSizes._fields:
            raise ValueError(f"schedule: {unknown(name, 'a key of a schedule', StepSizes._fields)}")
        if name not in _KEYS[kind]:
            raise ValueError(
                f"schedule.{name} = {show(table[name])}: is no key of kind = {show(kind)}; "
                f"allowed: {', '.join(_KEYS[kind])}"
            )
    needed = {"cosine": "length", "step": "every"}.get(kind)
    if needed is not None and needed not in table:
        over = table.get("over", "rounds")
        raise ValueError(f"schedule: kind = {show(kind)} needs {needed}, a number of {over}")
    made = StepSizes(**table)
    _require_possible(made)
    return made


def _require_possible(made: StepSizes) -> None:
    cosine = made.kind == "cosine"
    least = made.warmup + 1 if cosine and isinstance(made.warmup, int) else 1
    for name, lowest in (("warmup", 0), ("length", least), ("every", 1)):
        value = getattr(made, name)
        if name == "length" and not cosine:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            more = ", more than warmup" if name == "length" and made.warmup else ""
            raise ValueError(
                f"schedule.{name} = {show(value)}: must be a whole number >= {lowest}{more}"
            )
    for name, above in (("floor", False), ("factor", True)):
        value = getattr(made, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 < value <= 1 if above else 0 <= value <= 1):
            allowed = "in (0, 1]" if above else "in [0, 1]"
            raise ValueError(f"schedule.{name} = {show(value)}: must be {allowed}")
