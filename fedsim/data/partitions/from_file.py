"""A partition that is written down: a file says which client each sample belongs to."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.data.federated import Ints, Samples
from fedsim.data.partitions.partition import DROPPED, Assignment, PartitionRule, partition_rule

COLUMNS = ("sample", "client")
SUFFIXES = (".csv", ".json", ".parquet")


class _OwnerTable(NamedTuple):
    """What a file says: columns of whole numbers.

    Attributes:
        columns: "client", and "sample" where it is there.
        clients: How many clients there are at least.
        by_client: Whether it is a map from clients to their samples.
    """

    columns: dict[str, Ints]
    clients: int = 0
    by_client: bool = False


_MOST_CLIENTS = 10**7  # all exist, with samples or without; a larger number is a mistake


@partition_rule(clients="optional")
def file(*, path: str) -> PartitionRule:
    """Give each sample to the client that a file names.

    Samples are numbered from 0 in the order of the data set, its held-out samples included. Those
    that the server holds out stay with the server whatever the file says of them; those that the
    file does not name are dropped and counted. Clients are numbered from 0; those up to the largest
    number that own no sample exist and are empty.

    Args:
        path: A .csv, .json or .parquet file with a row per sample: columns `sample` and `client`,
            or `client` alone for samples 0, 1, ... in order. JSON is a list of rows, a table of
            columns, or each client's samples as FedML and NIID-Bench write them: {"0": [4, 7],
            "1": [5]}. There a sample may have several clients.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from error
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise _refused(path, f"must end in {', '.join(SUFFIXES)}")
    identity = {"file_sha256": hashlib.sha256(content).hexdigest()}
    return PartitionRule(partial(_from_file, path, content, identity), identity=identity)


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
    if (clients or 0) > _MOST_CLIENTS:
        raise ScenarioError(f"[partition] clients = {clients}: must be <= {_MOST_CLIENTS}")
    table = _table(path, content)
    named, holders = _pairs(path, table, total)
    count = max(int(holders.max(initial=DROPPED)) + 1, table.clients)
    if clients is not None and count > clients:
        allowed = f"clients = {clients} allows 0..{clients - 1}"
        raise _refused(path, f"names client {count - 1}; {allowed}")
    place = np.full(total, -1)
    place[here] = np.arange(len(here))
    inside = place[named] >= 0
    notes: dict[str, Any] = {
        **identity, "named_but_held_out": len(np.unique(named)) - len(np.unique(named[inside]))
    }  # fmt: skip
    rows, owners = place[named[inside]], holders[inside]
    by_row = np.argsort(rows, kind="stable")
    made = Assignment(
        owners[by_row], notes, max(clients or 0, count), "the file does not name them",
        rows=rows[by_row],
    )  # fmt: skip
    shared = int((np.bincount(rows, minlength=1) > 1).sum())
    if shared:
        notes["samples_of_several_clients"] = shared
        return made
    one_each = np.full(len(here), DROPPED, dtype=np.int64)
    one_each[rows] = owners
    return made._replace(owners=one_each, rows=None)


def _pairs(path: str, table: _OwnerTable, total: int) -> tuple[Ints, Ints]:
    """Return samples and their clients, held against how many there may be."""
    clients = table.columns["client"]
    samples = table.columns.get("sample", np.arange(len(clients)))
    if len(samples) != len(clients):
        raise _refused(path, f"{len(samples)} samples and {len(clients)} clients")
    for name, values, most in (
        ("sample", samples, total - 1),
        ("client", clients, _MOST_CLIENTS - 1),
    ):
        wrong = np.flatnonzero((values < 0) | (values > most))
        if len(wrong):
            row = int(wrong[0])
            where = f"client {clients[row]}" if table.by_client else f"row {row}"
            raise _refused(path, f"{where}: {name} = {values[row]}: must be in 0..{most}")
    pairs = np.stack([samples, clients if table.by_client else np.zeros_like(clients)])
    named, times = np.unique(pairs, axis=1, return_counts=True)
    if len(twice := np.flatnonzero(times > 1)):
        sample, client = named[:, twice[0]]
        if table.by_client:
            raise _refused(path, f"client {client}: names sample {sample} twice")
        rows = np.flatnonzero(samples == sample)[:2].tolist()
        raise _refused(path, f"names sample {sample} in rows {rows[0]} and {rows[1]}")
    return samples, clients


def _table(path: str, content: bytes) -> _OwnerTable:
    found = _READERS[Path(path).suffix.lower()](path, content)
    if Path(path).suffix.lower() == ".json" and "client" not in found and found:
        by_client = _by_client(path, found)
        if by_client is not None:
            return by_client
    return _OwnerTable(_columns(path, found))


def _by_client(path: str, document: dict[str, Sequence[Any]]) -> _OwnerTable | None:
    """Return the table of a map from client to samples; None where its keys are other names."""
    if not all(key.strip().isdecimal() for key in document):
        return None
    names = [int(key) for key in document]
    if max(names) >= _MOST_CLIENTS:
        raise _refused(path, f"client = {max(names)}: must be in 0..{_MOST_CLIENTS - 1}")
    held = [_whole_numbers(path, f"client {key}: sample", rows) for key, rows in document.items()]
    samples = np.concatenate(held)
    clients = np.repeat(np.array(names, dtype=np.int64), [len(rows) for rows in held])
    return _OwnerTable({"sample": samples, "client": clients}, max(names) + 1, by_client=True)


def _columns(path: str, table: dict[str, Sequence[Any]]) -> dict[str, Ints]:
    if "client" not in table:
        guess = nearest("client", table)
        hint = f"; is it '{guess}'?" if guess else ""
        found = ", ".join(table) or "none"
        if Path(path).suffix.lower() == ".json":
            hint += '; a table of each client\'s samples names clients by number, from "0"'
        raise _refused(path, f"has no column 'client' among {found}{hint}")
    if "" in table:
        place = [*table].index("") + 1
        raise _refused(path, f"column {place} has no name; write the file without row numbers")
    if unknown := sorted(table.keys() - set(COLUMNS)):
        raise _refused(path, f"column '{unknown[0]}' means nothing; allowed: {', '.join(COLUMNS)}")
    return {name: _whole_numbers(path, name, values) for name, values in table.items()}


def _whole_numbers(path: str, name: str, values: Sequence[Any]) -> Ints:
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError:  # lists among numbers
        array = np.empty(0)
    if array.ndim == 1 and array.dtype.kind in "iu" and len(array):
        return array.astype(np.int64)
    for row, value in enumerate(values):
        text = str(value).strip()
        if isinstance(value, bool) or not text.lstrip("-").isdecimal() or len(text) > 18:
            raise _refused(path, f"row {row}: {name} = {value!r}: must be a whole number")
    return np.array([int(value) for value in values], dtype=np.int64)


def _read_csv(path: str, content: bytes) -> dict[str, Sequence[Any]]:
    try:
        text = content.decode("utf-8-sig")
        first = text.partition("\n")[0]
        separator = next((mark for mark in ",;\t|" if mark in first), ",")
        rows = list(csv.reader(io.StringIO(text), strict=True, delimiter=separator))
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
        what = "must be a list of rows, or a table of columns, or of each client's samples"
        if isinstance(document, dict) and document:
            key = next(key for key, value in document.items() if not isinstance(value, list))
            what += f"; '{key}' holds no list"
        raise _refused(path, what)
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
