"""Lines for the user on choices that the scenario left open, such as a table's columns.

Nothing is chosen in silence: each line names what was taken, and the keys that settle it.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.reading.mapping import Columns, Roles
from fedsim.data.reading.origins import Split
from fedsim.data.reading.values import is_float, is_whole, to_float64

_LISTED = 20  # columns or classes that a line names
_FEWEST_ROWS = 5  # fewer rise by chance
_FEWEST_OF_PART = 20  # hours of days and months of years begin again sooner
_MOST_PARTS = 100
_BATCH = 10_000  # rows that are held at a time
_SCREENED = 64  # rows that rule most columns out


def choices(
    columns: Columns,
    roles: Roles,
    num_classes: int,
    names: Sequence[str],
    channels: str,
    group: str | None,
) -> list[str]:
    """Return the line of what the scenario leaves open, or nothing.

    Args:
        columns: What the scenario says of its columns.
        roles: Which columns are read.
        num_classes: C; 0 where targets are numbers.
        names: The classes' names, where they have any.
        channels: "grey" or "rgb" where images were read.
        group: The column of the natural owner.
    """
    keys, found = [], []
    if columns.features is None:
        keys.append("features")
        found.append(f"features: {listed(roles.features)}")
    if columns.target is None or columns.target_type == "auto":
        keys += ["target"] * (columns.target is None)
        keys += ["target_type"] * (columns.target_type == "auto")
        found.append(f"target: {listed(roles.target)}, {_as_what(roles.kind, num_classes, names)}")
    if group is not None and columns.group is None:
        keys.append("group")
        found.append(f"group: {group}")
    if channels and columns.images.channels == "auto":
        keys.append("channels")
        found.append(f"channels: {channels}")
    if not found:
        return []
    return [f"[data] read as {'; '.join(found)} (set {', '.join(keys)} to have it otherwise)"]


def listed(names: Sequence[str], most: int = _LISTED) -> str:
    """Name some things, of many the first ones and how many they are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)})"


def _as_what(kind: str, num_classes: int, names: Sequence[str]) -> str:
    if kind == "text":
        return "the character that follows"
    if not num_classes:
        return "numbers"
    values = names or [str(number) for number in range(num_classes)]
    return f"{num_classes} classes ({listed(values)})"


def look_alikes(what: str, names: Iterable[str]) -> list[str]:
    """Return a line for names that differ in case, in blanks or in how they are written alone.

    Args:
        what: What they name, such as "classes of column 'label'".
        names: All different.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_plain(name), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if not groups:
        return []
    return [
        f"[data] {what}: {listed(groups, 5)} differ in case, blanks or "
        "how they are written alone and are counted apart; write them alike in the data if they "
        "are the same"
    ]


def row_numbers(split: Split, names: Sequence[str]) -> list[str]:
    """Return a line for each of these columns that seems to say where a row stands.

    Its values are whole numbers, all different, that rise from row to row or leave no number out;
    or they count the rows of each of several parts, as where files of sites were put together.
    """
    types = split.rows.features
    alive: dict[str, list[npt.NDArray[np.float64]]] = {
        name: [] for name in names if is_whole(types[name]) or is_float(types[name])
    }
    rows = split.rows.select_columns([*alive]).with_format("arrow") if alive else None
    for batch in () if rows is None else rows.iter(batch_size=_BATCH):
        for name in [*alive]:
            values = to_float64(batch.column(name).combine_chunks())
            if _may_count(values[:_SCREENED]) and _may_count(values):
                alive[name].append(values)
            else:
                del alive[name]
        if not alive:
            break
    return [
        _numbering(f"column '{name}'", found)
        for name, parts in alive.items()
        if (found := _counted(np.concatenate(parts)))
    ]


def row_numbers_of(features: npt.NDArray[Any], names: Sequence[str] | None) -> list[str]:
    """Return the same lines for a loader's features.

    Args:
        features: `[n, columns]`; of another shape nothing is said.
        names: What the columns are called, if they are.
    """
    if features.ndim != 2:
        return []
    head = features[:_SCREENED]
    whole, rises = head == np.floor(head), np.diff(head, axis=0) > 0
    differ = (np.diff(np.sort(head, axis=0), axis=0) > 0).all(axis=0)
    few = (~rises).sum(axis=0) * _FEWEST_OF_PART <= len(head)
    likely = np.flatnonzero(whole.all(axis=0) & (differ | few))
    return [
        _numbering(f"column '{names[n]}'" if names else f"column {n} of the loader", found)
        for n in likely.tolist()
        if (found := _counted(features[:, n].astype(np.float64)))
    ]


def _numbering(column: str, counted: str) -> str:
    return (
        f"[data] features: {column} numbers the rows ({counted}) and is learnt from; name the "
        "features without it, unless it is one"
    )


def _counted(values: npt.NDArray[np.float64]) -> str:
    """Say from where to where a column counts the rows; nothing if it does not."""
    if span := _span(values):
        return f"{span[0]} to {span[1]}, no value twice"
    if len(values) < 2 * _FEWEST_OF_PART or not (values == np.floor(values)).all():
        return ""
    begins = np.flatnonzero(np.diff(values, prepend=values[0] - 2) != 1)
    lengths = np.diff(begins, append=len(values))
    if len(begins) > _MOST_PARTS or lengths.min() < _FEWEST_OF_PART:
        return ""
    if (values[begins] != values[0]).any():
        return ""
    return f"{int(values[0])} to {int(values.max())}, begun {len(begins)} times"


def _may_count(values: npt.NDArray[np.float64]) -> bool:
    """Tell whether these may be a part of a column that counts rows, once or part by part."""
    if not (values == np.floor(values)).all():
        return False
    falls = int(np.count_nonzero(np.diff(values) <= 0))
    return falls * _FEWEST_OF_PART <= len(values) or _all_differ(values)


def _span(values: npt.NDArray[np.float64]) -> tuple[int, int] | None:
    if len(values) < _FEWEST_ROWS or not _all_differ(values):
        return None
    first, last = int(values.min()), int(values.max())
    rises = (np.diff(values) > 0).all()
    return (first, last) if rises or last - first == len(values) - 1 else None


def _all_differ(values: npt.NDArray[np.float64]) -> bool:
    """Tell whether these are whole numbers, each another."""
    return bool((values == np.floor(values)).all()) and len(np.unique(values)) == len(values)


def _plain(name: str) -> str:
    try:
        return str(float(name))
    except ValueError:
        text = unicodedata.normalize("NFKC", name).casefold()
        return " ".join(text.split())
