"""JSON that is one object and no list of rows: LEAF's users, a table of columns, or neither."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import twice_in
from fedsim.data.reading.origins import Split, library

_RECORDS = "write it with orient='records'"
_BY_ROW = (
    " (the file holds an object per column; if each is a row's, as pandas writes with "
    f"orient='index', {_RECORDS})"
)
OWNER = "user"  # the column that LEAF's owners become
Files = Mapping[str, Sequence[tuple[str, Path]]]  # by split, with what messages call them


class _JsonTable(NamedTuple):
    """What one file holds."""

    name: str
    columns: dict[str, list[Any]]
    leaf: bool
    by_row: bool = False  # whether its columns are objects, as its rows might be


def read_objects(files: Files) -> dict[str, Split] | None:
    """Read files that hold one object each; None where they hold rows, a list or one per line.

    Args:
        files: The files of each split.

    Raises:
        ScenarioError: Naming a file whose object is no table, or that is unlike the others.
    """
    tables: dict[str, list[_JsonTable]] = {}
    rows: list[str] = []
    for split, found in files.items():
        for name, file in found:
            document = _object(name, file)
            if document is None:
                rows.append(name)
            else:
                tables.setdefault(split, []).append(_table(name, document))
    if not tables:
        return None
    every = [table for parts in tables.values() for table in parts]
    other = rows or [table.name for table in every if table.leaf != every[0].leaf]
    if other:
        what = "LEAF's users" if every[0].leaf else "a table of columns"
        raise ScenarioError(f"{every[0].name} holds {what} and {other[0]} does not")
    return {split: _joined(split, parts) for split, parts in tables.items()}


def _object(name: str, file: Path) -> dict[str, Any] | None:
    """Return a file's only object; None where it begins with a list, or holds one object a line."""
    with file.open(encoding="utf-8-sig") as text:
        try:
            first = next((line for line in text if line.strip()), "")
            if first.lstrip().startswith("["):
                text.seek(0)
                _look_through(name, text)
                return None
            more = any(line.strip() for line in text)
            try:
                alone = json.loads(first, object_pairs_hook=partial(_once, name))
            except ScenarioError:
                raise
            except ValueError:
                text.seek(0)
                whole = partial(json.load, object_pairs_hook=partial(_once, name))
                alone, more = whole(text), False
        except UnicodeDecodeError as error:
            raise ScenarioError(
                f"{name} is no text in UTF-8 (byte {error.start}); save it as UTF-8"
            ) from None
        except ScenarioError:
            raise
        except ValueError as error:
            lines = first.rstrip()
            hint = ""
            if lines.startswith("{") and lines.endswith("},"):
                hint = "; do its lines end in commas? take them away, or put all between [ and ]"
            elif re.search(r"\}\s*\{", lines):
                hint = "; do several rows stand in a line? write one per line"
            raise ScenarioError(f"{name} is no JSON: {error}{hint}") from None
    return None if more or not isinstance(alone, dict) else alone


def _once(name: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; of a key that stands twice most readers would take the later value."""
    if (twice := twice_in(key for key, _ in pairs)) is not None:
        raise ScenarioError(f"{name} has the key '{twice}' twice in one object; write it once")
    return dict(pairs)


def _look_through(name: str, text: TextIO) -> None:
    """Refuse a list of rows in which a key stands twice; its reader says what else is wrong."""

    def row(pairs: Sequence[tuple[str, Any]]) -> None:
        _once(name, pairs)  # and nothing of it is kept

    try:
        json.load(text, object_pairs_hook=row, strict=False)
    except (ScenarioError, UnicodeDecodeError):
        raise
    except (ValueError, RecursionError):
        return


def _table(name: str, document: Mapping[str, Any]) -> _JsonTable:
    if "user_data" in document:
        return _leaf(name, document)
    columns: dict[str, list[Any]] = {}
    for key, values in document.items():
        # pandas writes a column as an object by row
        columns[key] = list(values.values()) if isinstance(values, dict) else values
    lengths = {len(v) if isinstance(v, list) else None for v in columns.values()}
    if len(lengths) != 1 or None in lengths:
        inside = [key for key, value in document.items() if _is_rows(value)]
        hint = f"; its rows seem to be in '{inside[0]}': write that alone" if inside else ""
        if document.keys() == {"columns", "index", "data"}:
            hint = f"; pandas writes this with orient='split': {_RECORDS}"
        raise ScenarioError(
            f"{name} holds one object ({', '.join([*document][:5]) or 'empty'}), expected rows (a "
            "list of objects, or one per line), columns of equal lengths, or LEAF's users and "
            f"user_data{hint}"
        )
    if all(isinstance(v, dict) for v in document.values()):
        _require_same_rows(name, document)
        return _JsonTable(name, columns, False, by_row=True)
    return _JsonTable(name, columns, False)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _require_same_rows(name: str, document: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse columns by row whose rows are not called alike, in the same order."""
    first, *rest = document
    for key in rest:
        if [*document[key]] != [*document[first]]:
            raise ScenarioError(f"{name}: columns '{first}' and '{key}' have other rows")


def _leaf(name: str, document: Mapping[str, Any]) -> _JsonTable:
    data = document["user_data"]
    users = document.get("users", [*data] if isinstance(data, dict) else None)
    if not isinstance(data, dict) or not isinstance(users, list):
        raise ScenarioError(f"{name}: LEAF's user_data must be a table by user, and users a list")
    if (twice := twice_in(map(str, users))) is not None:
        raise ScenarioError(f"{name}: user '{twice}' stands twice among its users")
    counts = document.get("num_samples", [None] * len(users))
    if len(counts) != len(users):
        raise ScenarioError(f"{name}: {len(users)} users and {len(counts)} num_samples")
    columns: dict[str, list[Any]] = {"x": [], "y": [], OWNER: []}
    for user, count in zip(users, counts, strict=True):
        held = data.get(str(user))
        if not isinstance(held, dict) or not all(isinstance(held.get(k), list) for k in "xy"):
            raise ScenarioError(f"{name}: user '{user}' has no lists x and y in user_data")
        if len(held["x"]) != len(held["y"]) or count not in (None, len(held["y"])):
            said = "" if count is None else f", and num_samples says {count}"
            raise ScenarioError(
                f"{name}: user '{user}' has {len(held['x'])} x and {len(held['y'])} y{said}"
            )
        columns["x"] += held["x"]
        columns["y"] += held["y"]
        columns[OWNER] += [str(user)] * len(held["y"])
    if unlisted := sorted(data.keys() - set(map(str, users))):
        raise ScenarioError(f"{name}: user '{unlisted[0]}' of user_data is not among its users")
    return _JsonTable(name, columns, True)


def _joined(split: str, tables: Sequence[_JsonTable]) -> Split:
    import pyarrow as pa

    columns = tables[0].columns
    if other := [table.name for table in tables if table.columns.keys() != columns.keys()]:
        raise ScenarioError(f"{tables[0].name} and {other[0]} have other columns")
    joined = {key: [v for table in tables for v in table.columns[key]] for key in columns}
    try:
        rows = library().Dataset.from_dict(joined)
    except (pa.ArrowException, TypeError, ValueError) as error:
        names = ", ".join(table.name for table in tables[:3])
        raise ScenarioError(f"{names}: its values cannot be columns: {error}") from error
    owner, note = OWNER if tables[0].leaf else "", _BY_ROW if tables[0].by_row else ""
    return Split(rows, _place(tables), owner=owner, note=note)


def _place(tables: Sequence[_JsonTable]) -> Callable[[int], str]:
    def place(row: int) -> str:
        for table in tables:
            owners = table.columns.get(OWNER) if table.leaf else None
            count = len(next(iter(table.columns.values())))
            if row < count and owners is not None:
                return (
                    f"{table.name}, user '{owners[row]}', sample {row - owners.index(owners[row])}"
                )
            if row < count:
                return f"{table.name}, row {row}"
            row -= count
        return f"row {row}"

    return place
