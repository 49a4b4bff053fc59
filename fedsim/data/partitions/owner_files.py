"""Files that say which client a sample belongs to, read as columns: CSV, JSON, parquet."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import twice_in

SUFFIXES = (".csv", ".json", ".parquet")

NO_NAMES = "is its first line a row? then write the columns' names above it, sample and client"

Columns = dict[str, Sequence[Any]]

_MAP = '{"0": [4, 7], "1": [5]}'
# FedML's net_dataidx_map.txt, and a table of lists as Python prints it
_ENTRY = re.compile(r"(\d+)\s*:\s*\[([\d\s,]*)\]")
_ENTRIES = re.compile(r"\s*\{(\s*\d+\s*:\s*\[[\d\s,]*\]\s*,?)+\s*\}\s*")


def refused(path: str, why: str) -> ScenarioError:
    """Return the refusal of a file."""
    return ScenarioError(f"[partition] path = '{path}': {why}")


def read_columns(path: str, content: bytes) -> Columns:
    """Return a file's columns by name, or each client's samples by its number.

    Raises:
        ScenarioError: If it is not what its ending says, or holds neither.
    """
    return _READERS[Path(path).suffix.lower()](path, content)


def other_end(content: bytes) -> str:
    """Return what a file of another ending is that could be read, and the remedy."""
    text = content.decode("utf-8-sig", errors="replace")
    if _ENTRIES.fullmatch(text):
        return "; it holds each client's samples, as FedML writes them: let its name end in .json"
    if text.lstrip().startswith(("{", "[")):
        return "; it may be JSON: let its name end in .json"
    return ""


def _read_csv(path: str, content: bytes) -> Columns:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise refused(path, "is text in UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig").lstrip("\r\n")
        first = text.splitlines()[0] if text else ""
        separator = next((mark for mark in ",;\t|" if mark in first), ",")
        lines = io.StringIO(text, newline=None)  # any ends of lines
        rows = list(csv.reader(lines, strict=True, delimiter=separator))
    except (UnicodeDecodeError, csv.Error) as error:
        raise refused(path, f"is not CSV: {error}") from error
    names = [name.strip() for name in rows[0]] if rows else []
    body = [row for row in rows[1:] if row]
    if (twice := twice_in(filter(None, names))) is not None:
        hint = NO_NAMES if twice.lstrip("-").isdecimal() else "take one out"
        raise refused(path, f"has two columns '{twice}'; {hint}")
    for number, row in enumerate(body):
        if len(row) != len(names):
            comment = names[0].startswith(("#", "%", "//"))
            hint = "; take the lines above the names away" if comment else ""
            what = f"has {len(row)} values for {len(names)} columns"
            raise refused(path, f"row {number}: {what}{hint}")
    columns: list[tuple[Any, ...]] = list(zip(*body, strict=True)) or [()] * len(names)
    return dict(zip(names, columns, strict=True))


def _read_json(path: str, content: bytes) -> Columns:
    document = _parsed(path, content)
    if isinstance(document, list):
        if document and isinstance(document[0], list):
            raise refused(
                path,
                "is a list of lists, which may be clients' samples or pairs; name the clients: "
                f"{_MAP}, such as Python's json.dump(dict(enumerate(lists)), file) writes it",
            )
        if document and isinstance(document[0], int):
            raise refused(path, 'is a list of numbers; write {"client": [...]} if each is a client')
        names = list(document[0]) if document and isinstance(document[0], dict) else []
        if not all(isinstance(row, dict) and row.keys() == set(names) for row in document):
            raise refused(path, "every row must be a table with the same keys")
        return {name: [row[name] for row in document] for name in names}
    if not (isinstance(document, dict) and all(isinstance(c, list) for c in document.values())):
        what = "must be a list of rows, or a table of columns, or of each client's samples"
        if isinstance(document, dict) and document:
            key, value = next((k, v) for k, v in document.items() if not isinstance(v, list))
            what += f" ({_MAP}); '{key}' holds no list"
            if isinstance(value, dict):
                what += " but a table; pandas writes rows with orient='records'"
        raise refused(path, what)
    if document.keys() == {"columns", "index", "data"}:
        raise refused(
            path,
            "holds columns, index and data, as pandas writes them with orient='split'; write it "
            "with orient='records'",
        )
    return document


def _parsed(path: str, content: bytes) -> Any:
    """Return what JSON says, or each client's samples as FedML and Python write them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (twice := twice_in(key for key, _ in pairs)) is not None:
            raise refused(path, f"has the key '{twice}' twice in one table; write it once")
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=once)
    except ScenarioError:
        raise
    except ValueError as error:
        text = content.decode("utf-8-sig", errors="replace")
        if not _ENTRIES.fullmatch(text):
            raise refused(path, f"is not JSON: {error}") from error
        return once(
            [(key, list(map(int, re.findall(r"\d+", r)))) for key, r in _ENTRY.findall(text)]
        )


def _read_parquet(path: str, content: bytes) -> Columns:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise refused(path, f"is not parquet: {error}") from error
    return {name: table[name].to_pylist() for name in table.column_names}


_READERS = {".csv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}
