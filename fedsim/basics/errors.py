"""The errors that fedsim raises for its users, and the words that they are made of."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, get_args

from fedsim.basics.text import twice_in


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose."""


class ScenarioError(FedsimError, ValueError):
    """A scenario, an override or a command line was refused before round 1 (exit code 2)."""


class SchemaError(ScenarioError):
    """A site's data lack what the scenario asks for; said without anything that is in them."""


class RunError(FedsimError, RuntimeError):
    """A run could not go on; the message names round, cause and remedy (exit code 1).

    Attributes:
        resumable: Whether `fedsim resume` may go on once the cause is gone.
    """

    resumable: ClassVar[bool] = True


class BusyError(RunError):
    """Somebody else works in the run folder."""

    resumable = False


class CheckpointError(RunError):
    """A checkpoint is torn, foreign or incompatible with the scenario that wants it."""

    resumable = False


class UnwrittenCheckpointError(CheckpointError):
    """The disk takes no checkpoint; the older ones are there."""

    resumable = True


def is_too_large(error: BaseException) -> bool:
    """Return whether an error says that an array has no room in this or in any memory.

    Example:
        >>> import numpy
        >>> try:
        ...     numpy.zeros(2**62)
        ... except (MemoryError, ValueError) as error:
        ...     is_too_large(error)
        True
    """
    too_many = ("array is too big", "Maximum allowed")  # NumPy's, of sizes beyond any memory
    return isinstance(error, MemoryError | OverflowError) or (
        isinstance(error, ValueError) and str(error).startswith(too_many)
    )


def largest_number(tables: Mapping[str, Any]) -> str:
    """Name the largest whole number of a scenario's tables: what to blame for a lack of memory.

    Example:
        >>> largest_number({"data": {"name": "x"}, "partition": {"clients": 9, "alpha": 0.5}})
        '[partition] clients = 9'
    """
    found = [
        (number, table, key)
        for table, content in tables.items()
        if isinstance(content, Mapping)
        for key, value in content.items()
        for number in (value if isinstance(value, list | tuple) else [value])
        if isinstance(number, int) and not isinstance(number, bool)
    ]
    number, table, key = max(found, default=(0, "", ""))
    return f"[{table}] {key} = {number}" if table else "the scenario"


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that looks most like `name`, or None when none is close.

    Example:
        >>> nearest("cutof", ["cutoff", "server_lr"])
        'cutoff'
    """
    matches = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def printable(text: str) -> str:
    r"""Write what would break a line or steer a terminal as its escape.

    Example:
        >>> print(printable("two\nlines"))
        two\nlines
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unknown(name: str, what: str, allowed: Iterable[str]) -> str:
    """Say that `name` is not `what`, with the nearest allowed name and all allowed ones.

    Example:
        >>> unknown("cutof", "a key of fedau", ["cutoff", "server_lr"])
        "'cutof' is not a key of fedau; did you mean 'cutoff'? allowed: cutoff, server_lr"
    """
    names = sorted(allowed)
    guess = nearest(name, names)
    hint = f"did you mean '{guess}'? " if guess else ""
    shown, listed = printable(name), ", ".join(names) if names else "none"
    return f"'{shown}' is not {what}; {hint}allowed: {listed}"


def require_different(where: str, names: Sequence[str]) -> None:
    """Refuse a list that names something twice.

    Raises:
        ScenarioError: Naming it.
    """
    if (name := twice_in(names)) is not None:
        raise ScenarioError(f"{where}: '{name}' is there twice; name it once")


def require_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a value that a `Literal` does not list.

    Raises:
        ValueError: Naming the value and what is allowed.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} = {value!r}: must be {' or '.join(get_args(choices))}")


def require_at_least(name: str, value: float, least: float) -> None:
    """Refuse a number that is below a bound, or not finite.

    Raises:
        ValueError: Naming the value and what is allowed.

    Example:
        >>> require_at_least("mu", -0.1, 0)
        Traceback (most recent call last):
        ValueError: mu = -0.1: must be >= 0 and finite
    """
    if not least <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: must be >= {least:g} and finite")


def require_positive(name: str, value: float) -> None:
    """Refuse a number that is not above 0, or not finite.

    Raises:
        ValueError: Naming the value and what is allowed.

    Example:
        >>> require_positive("server_lr", 0.0)
        Traceback (most recent call last):
        ValueError: server_lr = 0.0: must be > 0 and finite
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r}: must be > 0 and finite")


def show(value: Any) -> str:
    """Write a value as the scenario file has it, as far as one line allows.

    Example:
        >>> show("0.1"), show(True), show([1, 2])
        ('"0.1"', 'true', '[1, 2]')
    """
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."
