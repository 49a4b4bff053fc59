"""The errors that fedsim raises for its users, and the words that they are made of."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose."""


class ScenarioError(FedsimError, ValueError):
    """A scenario, an override or a command line was refused before round 1 (exit code 2)."""


class RunError(FedsimError, RuntimeError):
    """A run could not go on; the message names round, cause and remedy (exit code 1)."""


class CheckpointError(RunError):
    """A checkpoint is torn, foreign or incompatible with the scenario that wants it."""


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that looks most like `name`, or None when none is close.

    Example:
        >>> nearest("cutof", ["cutoff", "server_lr"])
        'cutoff'
    """
    matches = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(name: str, what: str, allowed: Iterable[str]) -> str:
    """Say that `name` is not `what`, with the nearest allowed name and all allowed ones.

    Example:
        >>> unknown("cutof", "a key of fedau", ["cutoff", "server_lr"])
        "'cutof' is not a key of fedau; did you mean 'cutoff'? allowed: cutoff, server_lr"
    """
    names = sorted(allowed)
    guess = nearest(name, names)
    hint = f"did you mean '{guess}'? " if guess else ""
    return f"'{name}' is not {what}; {hint}allowed: {', '.join(names) if names else 'none'}"


def require_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a value that a `Literal` does not list.

    Raises:
        ValueError: Naming the value and what is allowed.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} = {value!r}: must be {' or '.join(get_args(choices))}")
