"""Files and folders as the natural owners of the rows in them: a file, or a folder, per client."""

import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedsim.basics.errors import ScenarioError
from fedsim.data.reading.origins import Split

Owner = Literal["file", "folder"]


def name_of(file: Path, owner: Owner) -> str:
    """Return what a file's owner is called."""
    return file.stem if owner == "file" else file.parent.name


def check_owners(files: Sequence[Path], owner: Owner, loose: Sequence[Path]) -> None:
    """Refuse files to train on that do not tell their owners apart.

    Args:
        files: Those to train on.
        owner: What names an owner.
        loose: Folders that are no client's.

    Raises:
        ScenarioError: Naming a file.
    """
    if owner == "folder":
        for file in files:
            if file.parent in loose:
                raise ScenarioError(f"{file.name} lies in '{file.parent.name}', no client's folder")
    names = collections.Counter(name_of(file, owner) for file in files)
    twice = [name for name, times in names.items() if times > 1]
    if owner == "file" and twice:
        raise ScenarioError(f"two files to train on are called '{twice[0]}', so it names no owner")
    if len(names) < 2:
        raise ScenarioError(f"there is one {owner} to train on, so it divides nothing")


def with_owners(
    split: Split, files: Sequence[Path], owner: Owner, rows_of: Callable[[Path], int]
) -> Split:
    """Return the rows with their owners as a column; as they are if a column is called so.

    Args:
        split: The rows of the files, in their order.
        files: The files.
        owner: What names an owner, and the column.
        rows_of: How many rows a file has.
    """
    if owner in split.rows.column_names:
        return split
    counts = [rows_of(file) for file in files]
    assert sum(counts) == len(split.rows)
    names = np.repeat(np.array([name_of(file, owner) for file in files], dtype=object), counts)
    return split._replace(rows=split.rows.add_column(owner, names.tolist()))


def count_rows(file: Path, format_: str, options: dict[str, Any]) -> int | None:
    """Return how many rows a table has, quickly; None where only reading it tells.

    Args:
        file: The file.
        format_: Of `SUFFIXES`.
        options: What pandas reads it with.
    """
    if format_ == "parquet":
        from pyarrow import parquet

        found: int = parquet.ParquetFile(file).metadata.num_rows
        return found
    if format_ in ("csv", "tsv"):
        import pandas as pd

        return len(pd.read_csv(file, usecols=[0], low_memory=False, **options))
    return None
