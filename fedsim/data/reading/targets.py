"""Targets as classes or numbers, and the natural owners of samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Ints, Targets
from fedsim.data.reading import characters
from fedsim.data.reading.checks import Numbers, Unfit, all_whole, as_classes, count_classes
from fedsim.data.reading.mapping import Columns, Roles
from fedsim.data.reading.origins import Split
from fedsim.data.reading.texts import first_text, require_one_spelling
from fedsim.data.reading.values import (
    Column,
    is_float,
    kind_of,
    read_lists,
    to_labels,
    to_numbers,
    to_texts,
)

_CLASSES_OR_AMOUNTS = (
    "say [data] target_type = 'classes' if its values name classes, or 'numbers' if they are "
    "amounts"
)


def read_targets(
    splits: Mapping[str, Split], roles: Roles, columns: Columns
) -> tuple[dict[str, Targets], int, list[str]]:
    """Return the targets by split, C (0 for numbers) and the classes' names if they have any.

    Raises:
        ScenarioError: If they are neither.
    """
    types = splits["train"].rows.features
    parts = {
        name: [Column(split, column) for column in roles.target] for name, split in splits.items()
    }
    if roles.kind == "text":
        one = {name: as_characters(p[0]) for name, p in parts.items()}
        return dict(one), characters.VOCABULARY, []
    kind = kind_of(types[roles.target[0]])
    numbers = columns.target_type == "numbers" or len(roles.target) > 1 or kind == "list"
    if columns.target_type == "auto":
        numbers = numbers or is_float(types[roles.target[0]])
    if numbers:
        if columns.target_type == "classes":
            raise ScenarioError(
                f"[data] target = {list(roles.target)}: classes stand in one column of one value"
            )
        for column in roles.target:
            if kind_of(types[column]) == "text":
                raise ScenarioError(
                    f"column '{column}' holds text, and [data] target is to be numbers: "
                    f"{first_text(splits, column)}, or name another target"
                )
        amounts = {name: as_amounts(p) for name, p in parts.items()}
        if columns.target_type == "auto" and len(roles.target) == 1 and kind != "list":
            _require_fractions(parts["train"][0], amounts)
        return dict(amounts), 0, []
    single = {name: p[0] for name, p in parts.items()}
    require_one_spelling(splits, roles.target[0], "classes")
    return _class_targets(single, types[roles.target[0]], columns)


def _require_fractions(train: Column, amounts: Mapping[str, Numbers]) -> None:
    """Ask what whole numbers of fractional type are, such as pandas makes of holes in a column."""
    if all_whole(list(amounts.values())):
        first = ", ".join(str(value) for value in np.unique(amounts["train"])[:3])
        raise train.refused(
            Unfit(
                f"holds whole numbers written as fractions ({first}{', ...' * (len(first) > 8)}); "
                f"{_CLASSES_OR_AMOUNTS}"
            )
        )


def as_amounts(parts: Sequence[Column]) -> Numbers:
    """Return the numbers of one column, of several side by side, or of one of lists, `[n, ...]`."""
    if len(parts) == 1 and kind_of(parts[0].split.rows.features[parts[0].name]) == "list":
        return read_lists(parts[0], None)
    each = [np.concatenate(part.blocks(to_numbers)) for part in parts]
    return each[0] if len(each) == 1 else np.stack(each, axis=1)


def _class_targets(
    parts: Mapping[str, Column], type_: Any, columns: Columns
) -> tuple[dict[str, Targets], int, list[str]]:
    names = list(getattr(type_, "names", None) or [])
    train = parts["train"]
    values = {name: np.concatenate(part.blocks(to_labels)) for name, part in parts.items()}
    known = columns.num_classes or len(names)
    kind = values["train"].dtype.kind
    if not known and (kind in "Ub" or columns.target_type == "classes"):
        # text, booleans and, where it is said, any whole numbers: classes in sorted order
        found = np.unique(np.concatenate(list(values.values())))
        names = [str(value).lower() if kind == "b" else str(value) for value in found.tolist()]
        values = {name: np.searchsorted(found, part) for name, part in values.items()}
        known = len(found)
    if known == 1:
        raise train.refused(Unfit(f"holds '{names[0]}' alone, expected at least two classes"))
    try:
        known = known or count_classes(list(values.values()))
    except Unfit as unfit:
        raise train.refused(Unfit(f"{unfit}; {_CLASSES_OR_AMOUNTS}")) from unfit
    targets: dict[str, Targets] = {}
    for name, part in parts.items():
        try:
            targets[name] = as_classes(values[name], known)
        except Unfit as unfit:
            raise part.refused(unfit) from unfit
    return targets, known, names


def as_characters(column: Column) -> Ints:
    """Return a column of single characters as tokens, `[n]`."""
    return np.concatenate(column.blocks(_character))


def _character(values: Any) -> Ints:
    return characters.tokens(to_texts(values), 1).reshape(-1)


def read_groups(column: Column) -> tuple[Ints, tuple[str, ...]]:
    """Return each row's owner by number, and the owners' names in sorted order.

    Raises:
        ScenarioError: If the column holds what names nobody.
    """

    def convert(values: Any) -> npt.NDArray[Any]:
        own, numbers = np.unique(to_labels(values, "owners"), return_inverse=True)
        # few names are kept, not one per row
        new = [seen.setdefault(name, len(seen)) for name in own.tolist()]
        return np.asarray(new, dtype=np.int64)[numbers]

    seen: dict[Any, int] = {}
    numbers = np.concatenate(column.blocks(convert))
    rank = {name: place for place, name in enumerate(sorted(seen))}
    order = np.asarray([rank[name] for name in seen], dtype=np.int64)
    return order[numbers], tuple(str(name) for name in sorted(seen))
