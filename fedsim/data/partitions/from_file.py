"""A partition that is written down: a file says which client each sample belongs to."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.partition import DROPPED, Assignment, Rule, partition_rule
from fedsim.data.source import Ints, Samples
from fedsim.errors import ScenarioError, nearest

COLUMNS = ("sample", "client")
SUFFIXES = (".csv", ".json", ".parquet")

_MOST_CLIENTS = 10**7  # all exist, with samples or without; a larger number is a mistake


@partition_rule(clients="optional")
def file(*, path: str) -> Rule:
    """Give each sample to the client that a file names.

    Samples are numbered from 0 in the order of the data set, its held-out samples included. Those
    that the server holds out stay with the server whatever the file says of them; those that the
    file does not name are dropped and counted. Clients are numbered from 0; those up to the largest
    number that own no sample exist and are empty.

    Args:
        path: A .csv, .json or .parquet file with a row per sample: columns `sample` and `client`,
            or `client` alone for samples 0, 1, ... in order. JSON is a list of rows, or a table of
            columns.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from error
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise _refused(path, f"must end in {', '.join(SUFFIXES)}")
    identity = {"file_sha256": hashlib.sha256(content).hexdigest()}
    return Rule(partial(_from_file, path, content, identity), identity=identity)


def _from_file(
    path: str,
    content: bytes,
    identity: dict[str, str],
    samples: Samples,
    clients: int | None,
    seed: int,
) -> Assignment:
    here = np.arange(len(samples.labels)) if samples.rows is None else samples.rows
    total = len(samples.labels) if samples.in_dataset is None else samples.in_dataset
    owners = _owners(path, _columns(path, content), total)
    count = int(owners.max(initial=DROPPED)) + 1
    if (clients or 0) > _MOST_CLIENTS:
        raise ScenarioError(f"[partition] clients = {clients}: must be <= {_MOST_CLIENTS}")
    if clients is not None and count > clients:
        allowed = f"clients = {clients} allows 0..{clients - 1}"
        raise _refused(path, f"names client {count - 1}; {allowed}")
    held_by_server = (owners >= 0).sum() - (owners[here] >= 0).sum()
    notes = {**identity, "named_but_held_out": int(held_by_server)}
    why = "the file does not name them"
    return Assignment(owners[here], notes, max(clients or 0, count), why)


def _owners(path: str, columns: dict[str, Ints], total: int) -> Ints:
    """Return the client of every sample of the data set, or `DROPPED`."""
    clients = columns["client"]
    samples = columns.get("sample", np.arange(len(clients)))
    if len(samples) != len(clients):
        raise _refused(path, f"{len(samples)} samples and {len(clients)} clients")
    for name, values, most in (
        ("sample", samples, total - 1),
        ("client", clients, _MOST_CLIENTS - 1),
    ):
        wrong = np.flatnonzero((values < 0) | (values > most))
        if len(wrong):
            row = int(wrong[0])
            raise _refused(path, f"row {row}: {name} = {values[row]}: must be in 0..{most}")
    named, first, times = np.unique(samples, return_index=True, return_counts=True)
    if len(twice := np.flatnonzero(times > 1)):
        sample = named[twice[0]]
        rows = np.flatnonzero(samples == sample)[:2].tolist()
        raise _refused(path, f"names sample {sample} in rows {rows[0]} and {rows[1]}")
    owners = np.full(total, DROPPED, dtype=np.int64)
    owners[named] = clients[first]
    return owners


def _columns(path: str, content: bytes) -> dict[str, Ints]:
    table = _READERS[Path(path).suffix.lower()](path, content)
    if "client" not in table:
        guess = nearest("client", table)
        hint = f"; is it '{guess}'?" if guess else ""
        found = ", ".join(table) or "none"
        raise _refused(path, f"has no column 'client' among {found}{hint}")
    if unknown := sorted(table.keys() - set(COLUMNS)):
        raise _refused(path, f"column '{unknown[0]}' means nothing; allowed: {', '.join(COLUMNS)}")
    return {name: _whole_numbers(path, name, values) for name, values in table.items()}


def _whole_numbers(path: str, name: str, values: Sequence[Any]) -> Ints:
    array: npt.NDArray[Any] = np.asarray(values)
    if array.ndim == 1 and array.dtype.kind in "iu" and len(array):
        return array.astype(np.int64)
    for row, value in enumerate(values):
        text = str(value).strip()
        if isinstance(value, bool) or not text.lstrip("-").isdecimal() or len(text) > 18:
            raise _refused(path, f"row {row}: {name} = {value!r}: must be a whole number")
    return np.array([int(value) for value in values], dtype=np.int64)


def _read_csv(path: str, content: bytes) -> dict[str, Sequence[Any]]:
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refused(path, f"is not CSV: {error}") from error
    names = [name.strip() for name in rows[0]] if rows else []
    body = [row for row in rows[1:] if row]
    for number, row in enumerate(body):
        if len(row) != len(names):
            raise _refused(path, f"row {number}: has {len(row)} values for {len(names)} columns")
    columns: list[tuple[Any, ...]] = list(zip(*body, strict=True)) or [()] * len(names)
    return dict(zip(names, columns, strict=True))


def _read_json(path: str, content: bytes) -> dict[str, Sequence[Any]]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise _refused(path, f"is not JSON: {error}") from error
    if isinstance(document, list):
        names = list(document[0]) if document and isinstance(document[0], dict) else []
        if not all(isinstance(row, dict) and row.keys() == set(names) for row in document):
            raise _refused(path, "every row must be a table with the same keys")
        return {name: [row[name] for row in document] for name in names}
    if not (isinstance(document, dict) and all(isinstance(c, list) for c in document.values())):
        raise _refused(path, "must be a list of rows, or a table of columns")
    return document


def _read_parquet(path: str, content: bytes) -> dict[str, Sequence[Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise _refused(path, f"is not parquet: {error}") from error
    return {name: table[name].to_pylist() for name in table.column_names}


_READERS = {".csv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}


def _refused(path: str, why: str) -> ScenarioError:
    return ScenarioError(f"[partition] path = '{path}': {why}")
