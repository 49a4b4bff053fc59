"""One site's own file or folder: what it holds, read without knowing any other site's."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError, SchemaError, nearest, printable
from fedsim.data.federated import Features
from fedsim.data.reading.chosen import listed, row_numbers
from fedsim.data.reading.columns import read_features
from fedsim.data.reading.delimited import ANY_DIALECT, Dialect
from fedsim.data.reading.files import LocalFiles, find_files
from fedsim.data.reading.mapping import Columns, Roles, find_roles
from fedsim.data.reading.origins import Split
from fedsim.data.reading.targets import as_amounts, as_characters
from fedsim.data.reading.texts import require_one_spelling
from fedsim.data.reading.values import Column, is_float, kind_of, to_labels

TargetKind = Literal["text", "truth values", "whole numbers", "amounts", "characters"]

_NAMED = 5  # columns in a message
_KINDS: dict[str, TargetKind] = {"U": "text", "b": "truth values"}


@dataclass(frozen=True)
class HowToRead:
    """How sites' files are read: alike at every site.

    Attributes:
        columns: Which columns are what.
        format: Format of the files; None takes the only one that is there.
        dialect: How tables of text are written, as far as the scenario says.
        labels: The classes' names in the order of their numbers; None finds them.
    """

    columns: Columns
    format: str | None = None
    dialect: Dialect = ANY_DIALECT
    labels: tuple[str, ...] | None = None


class SiteTable(NamedTuple):
    """What a site's file holds.

    Attributes:
        features: `[n, ...]` float32; int64 tokens of text.
        targets: As in the file: `[n]` text, truth values or int64; amounts float32 `[n, ...]`.
        target_kind: Which of these.
        roles: The columns that were read, and what the features are.
        preprocessing: What was done to images, as JSON.
        said: What its user should know, in lines.
    """

    features: Features
    targets: npt.NDArray[Any]
    target_kind: TargetKind
    roles: Roles
    preprocessing: dict[str, Any]
    said: tuple[str, ...]


def find_site(path: str | Path, how: HowToRead) -> LocalFiles:
    """Find a site's file, or the files of its folder, which are read as one table.

    Raises:
        ScenarioError: If there is nothing that can be read.
    """
    files = find_files(str(path), format_=how.format, train=None, test=None, dialect=how.dialect)
    if all(file.stat().st_size == 0 for found in files.files.values() for file in found):
        raise SchemaError("its file is empty")
    if "test" in files.files:
        raise ScenarioError(
            f"[data] path = '{path}': holds a test split ({files.files['test'][0].name}); a site "
            "has one table, of which [partition] test_fraction keeps a share to test on"
        )
    return files


def read_site(files: LocalFiles, how: HowToRead) -> SiteTable:
    """Read a site's table.

    Raises:
        ScenarioError: If a column is missing, ambiguous or holds what cannot be used.
    """
    columns = how.columns
    with contextlib.ExitStack() as stack:
        try:
            splits = stack.enter_context(files.opened())
        except SchemaError:  # which names the file
            raise SchemaError("its file holds no row") from None
        split = splits["train"]
        _require_columns(split, columns)
        roles = find_roles(splits, columns)
        features, preprocessing, said = read_features(splits, roles, columns)
        targets, kind = _targets(split, roles, columns)
        told = [*split.said, *said]
        if columns.features is None and roles.kind == "numbers":
            told += row_numbers(split, roles.features)
        return SiteTable(features["train"], targets, kind, roles, preprocessing, tuple(told))


def _require_columns(split: Split, columns: Columns) -> None:
    """Refuse a table without a row, or without columns that the scenario names.

    Raises:
        SchemaError: In words of the scenario, and with the names of columns at most.
    """
    if not len(split.rows):
        raise SchemaError("its file holds no row")
    wanted = (*(columns.features or ()), *(columns.target or ()))
    if missing := [name for name in wanted if name not in split.rows.column_names]:
        several = "s" * (len(missing) > 1)
        named = listed([f"'{name}'" for name in missing], _NAMED)
        guess = nearest(missing[0], split.rows.column_names)
        hint = f"; is it what this site calls '{printable(guess)}'?" if guess else ""
        raise SchemaError(f"its file lacks the column{several} {named} of the scenario{hint}")


def _targets(split: Split, roles: Roles, columns: Columns) -> tuple[npt.NDArray[Any], TargetKind]:
    """The targets as in the file."""
    parts = [Column(split, name) for name in roles.target]
    if roles.kind == "text":
        return as_characters(parts[0]), "characters"
    type_ = split.rows.features[roles.target[0]]
    several = len(roles.target) > 1 or kind_of(type_) == "list"
    if several and columns.target_type == "classes":
        raise ScenarioError(
            f"[data] target = {list(roles.target)}: classes stand in one column of one value"
        )
    fractions = columns.target_type == "auto" and is_float(type_)
    if several or fractions or columns.target_type == "numbers":
        return as_amounts(parts), "amounts"
    names = list(getattr(type_, "names", None) or [])
    require_one_spelling({"train": split}, roles.target[0], "classes")
    values = np.concatenate(parts[0].blocks(to_labels))
    if names:  # the file numbers them, and other sites' may number them otherwise
        return np.asarray(names, dtype=np.str_)[values], "text"
    return values, _KINDS.get(values.dtype.kind, "whole numbers")
