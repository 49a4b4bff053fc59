"""A partition that is written down: a file says which client each sample belongs to."""

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.data.federated import Ints, Samples
from fedsim.data.partitions.owner_files import NO_NAMES, SUFFIXES, other_end, read_columns, refused
from fedsim.data.partitions.partition import DROPPED, Assignment, PartitionRule, partition_rule

COLUMNS = ("sample", "client")


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
        raise refused(path, f"cannot be read: {error.strerror}") from error
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise refused(path, f"must end in {', '.join(SUFFIXES)}{other_end(content)}")
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
        hint = "" if (holders == 0).any() else "; clients are counted from 0, and it names none 0"
        raise refused(path, f"names client {count - 1}; {allowed}{hint}")
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
        raise refused(path, f"{len(samples)} samples and {len(clients)} clients")
    for name, values, most in (
        ("sample", samples, total - 1),
        ("client", clients, _MOST_CLIENTS - 1),
    ):
        wrong = np.flatnonzero((values < 0) | (values > most))
        if len(wrong):
            row = int(wrong[0])
            where = f"client {clients[row]}" if table.by_client else f"row {row}"
            counted = ""
            if values[row] == most + 1 and values.min() == 1:
                counted = f"; {name}s are counted from 0, and it names none 0: subtract 1"
            raise refused(path, f"{where}: {name} = {values[row]}: must be in 0..{most}{counted}")
    pairs = np.stack([samples, clients if table.by_client else np.zeros_like(clients)])
    named, times = np.unique(pairs, axis=1, return_counts=True)
    if len(twice := np.flatnonzero(times > 1)):
        sample, client = named[:, twice[0]]
        if table.by_client:
            raise refused(path, f"client {client}: names sample {sample} twice")
        rows = np.flatnonzero(samples == sample)[:2].tolist()
        raise refused(path, f"names sample {sample} in rows {rows[0]} and {rows[1]}")
    return samples, clients


def _table(path: str, content: bytes) -> _OwnerTable:
    found = read_columns(path, content)
    if Path(path).suffix.lower() == ".json" and "client" not in found and found:
        by_client = _by_client(path, found)
        if by_client is not None:
            return by_client
    return _OwnerTable(_columns(path, found))


def _by_client(path: str, document: dict[str, Sequence[Any]]) -> _OwnerTable | None:
    """Return the table of a map from client to samples; None where its keys are other names."""
    if not all(key.strip().isdecimal() for key in document):
        return None
    _require_one_spelling(path, [*document])
    names = [int(key) for key in document]
    if max(names) >= _MOST_CLIENTS:
        raise refused(path, f"client = {max(names)}: must be in 0..{_MOST_CLIENTS - 1}")
    held = [_whole_numbers(path, f"client {key}: sample", rows) for key, rows in document.items()]
    samples = np.concatenate(held)
    clients = np.repeat(np.array(names, dtype=np.int64), [len(rows) for rows in held])
    return _OwnerTable({"sample": samples, "client": clients}, max(names) + 1, by_client=True)


def _columns(path: str, table: dict[str, Sequence[Any]]) -> dict[str, Ints]:
    if "client" not in table:
        raise refused(
            path, f"has no column 'client' among {', '.join(table) or 'none'}{_meant(path, table)}"
        )
    if nameless := [name for name in table if not name or name.startswith("__index_level_")]:
        place = [*table].index(nameless[0]) + 1
        last = place == len(table) > 1 and not any(str(value) for value in table[nameless[0]])
        remedy = "take the separator at the lines' ends away"
        remedy = remedy if last else "write the file without row numbers"
        raise refused(path, f"column {place} has no name; {remedy}")
    if unknown := sorted(table.keys() - set(COLUMNS)):
        raise refused(path, f"column '{unknown[0]}' means nothing; allowed: {', '.join(COLUMNS)}")
    found = {name: _whole_numbers(path, name, values) for name, values in table.items()}
    written = [each.strip() for each in table["client"] if isinstance(each, str)]
    _require_one_spelling(path, written)
    return found


def _meant(path: str, table: dict[str, Sequence[Any]]) -> str:
    """Return what may be wrong with a file without clients, and the remedy."""
    if table and all(name.strip().lstrip("-").isdecimal() for name in table):
        return f"; {NO_NAMES}"
    if (
        len(table) == 1
        and len(parts := re.findall(r"\w+", next(iter(table)))) > 1
        and "client" in parts
    ):
        return "; separate its columns by commas"
    guess = nearest("client", table)
    hint = f"; is it '{guess}'?" if guess else ""
    if Path(path).suffix.lower() == ".json":
        hint += '; a table of each client\'s samples names clients by number, from "0"'
    return hint


def _require_one_spelling(path: str, names: Sequence[str]) -> None:
    """Refuse clients whose names differ and are the same number, such as 0 and 00."""
    seen: dict[int, str] = {}
    for name in dict.fromkeys(names):
        other = seen.setdefault(int(name), name)
        if other != name:
            raise refused(
                path,
                f"names clients '{other}' and '{name}', which are the same number: write them "
                "alike if they are one client, and as two numbers if they are two",
            )


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
            words = name == "client" and any(map(str.isalpha, text)) and isinstance(value, str)
            hint = "; number the clients from 0" if words else ""
            raise refused(path, f"row {row}: {name} = {value!r}: must be a whole number{hint}")
    return np.array([int(value) for value in values], dtype=np.int64)
