"""Participation as it was recorded: who was there in which round, from a CSV or parquet file."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError, require_choice, unknown
from fedsim.federation.participation.participation import Participation
from fedsim.federation.participation.rates import Floats

Integers = npt.NDArray[np.int64]

_ROWS = ("round", "client", "available")
_SPELLS = ("client", "start", "end")
_TRUE, _FALSE = ("1", "true"), ("0", "false")
_MAX = 2**31 - 1


class _Spells(NamedTuple):
    """When clients were there, in the order of the first rounds; spells of a client are apart."""

    client: Integers
    start: Integers
    end: Integers  # the last round of the spell
    rounds: int  # T, the last round of the file


@final
class Trace(Participation):
    """Who takes part is read from a file: rows of rounds and clients, or spells of each client.

    The file's columns are `round` and `client` (and `available`, 0 or 1, if it lists those who were
    away too), or `client`, `start` and `end`, a spell from one round to another, both included.
    Rounds count from 1 and clients from 0. Who is not in the file never takes part.

    Args:
        path: A .csv file with a header, or a .parquet file.
        beyond: What comes after the last round of the file: "repeat" begins with its first round
            again, with "nobody" no client takes part any more.

    Raises:
        ScenarioError: If the file cannot be read, naming the file, the column and the row.
    """

    def __init__(self, *, path: str, beyond: Literal["repeat", "nobody"] = "repeat") -> None:
        try:
            require_choice("beyond", beyond, Literal["repeat", "nobody"])
        except ValueError as error:
            raise ScenarioError(f"[participation] {error}") from None
        self._where = f"path = '{os.fspath(path)}'"
        self._beyond = beyond
        try:
            status = Path(path).stat()
            self._spells = _read(str(path), status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise ScenarioError(
                f"[participation] {self._where}: cannot be read: {error.strerror}"
            ) from error
        except _BadTrace as error:
            raise ScenarioError(f"[participation] {self._where}{error}") from None
        spells = self._spells
        self._longest = int((spells.end - spells.start).max(initial=0)) + 1

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return who was there in the round."""
        spells = self._checked(num_clients)
        if server_round > spells.rounds:
            if self._beyond == "nobody":
                return np.zeros(0, dtype=np.int64)
            server_round = (server_round - 1) % spells.rounds + 1
        low = np.searchsorted(spells.start, server_round - self._longest + 1, side="left")
        high = np.searchsorted(spells.start, server_round, side="right")
        there = spells.end[low:high] >= server_round
        return np.sort(spells.client[low:high][there])

    def expected_cohort(self, num_clients: int) -> int:
        """Return the mean number of participants over the file's rounds, rounded; at least one."""
        return max(1, round(float(self.rates(num_clients).sum())))

    def rates(self, num_clients: int) -> Floats:
        """Return the share of the file's rounds in which each client takes part, float64 `[N]`."""
        spells = self._checked(num_clients)
        lengths = spells.end - spells.start + 1
        return np.bincount(spells.client, lengths, num_clients) / spells.rounds

    def manifest(self) -> dict[str, Any]:
        """Return the trace's extent and the hash of what it holds, wherever the file lies."""
        client, start, end, rounds = self._spells
        digest = hashlib.sha256(f"{rounds};".encode())
        for column in (client, start, end):
            digest.update(column.astype("<i8").tobytes())
        return {"rounds": rounds, "spells": len(client), "sha256": digest.hexdigest()}

    def _checked(self, num_clients: int) -> _Spells:
        highest = int(self._spells.client.max(initial=-1))
        if highest >= num_clients:
            raise ScenarioError(
                f"[participation] {self._where}: names client {highest}, and there are "
                f"{num_clients} clients, 0...{num_clients - 1}; set [partition] clients = "
                f"{highest + 1} or more"
            )
        return self._spells


class _BadTrace(ValueError):
    """What is wrong with a file; goes on after the file's name."""


@lru_cache(maxsize=4)
def _read(path: str, modified_ns: int, size: int) -> _Spells:
    """Read a file; a scenario asks for it several times while it is checked and built."""
    columns = _columns(path)
    if "round" in columns:
        rounds = _integers(columns, "round", 1)
        client = _integers(columns, "client", 0)
        last = int(rounds.max(initial=0))
        if "available" in columns:
            there = _flags(columns["available"])
            rounds, client = rounds[there], client[there]
        start = end = rounds
    else:
        client = _integers(columns, "client", 0)
        start, end = _integers(columns, "start", 1), _integers(columns, "end", 1)
        backwards = np.flatnonzero(end < start)
        if len(backwards):
            row = int(backwards[0])
            raise _BadTrace(
                f", row {row}: end = {end[row]} comes before start = {start[row]}: must not"
            )
        last = int(end.max(initial=0))
    if not len(client):
        raise _BadTrace(": no client takes part in any round")
    return _merged(client, start, end, last)


def _merged(client: Integers, start: Integers, end: Integers, last: int) -> _Spells:
    """Join a client's spells that overlap or follow each other, and order all by first round."""
    shift = client * (last + 2)  # one line of rounds on which clients never touch
    order = np.argsort(start + shift, kind="stable")
    begins, ends = (start + shift)[order], np.maximum.accumulate((end + shift)[order])
    first = np.concatenate([[True], begins[1:] > ends[:-1] + 1])
    closing = np.concatenate([np.flatnonzero(first)[1:] - 1, [len(begins) - 1]])
    who = client[order][first]
    begun, over = begins[first] - shift[order][first], ends[closing] - shift[order][first]
    by_round = np.lexsort((who, begun))
    return _Spells(who[by_round], begun[by_round], over[by_round], last)


def _columns(path: str) -> dict[str, Any]:
    """Return a file's columns by name, as Arrow arrays; those of a CSV file are text."""
    import pyarrow
    from pyarrow import csv, parquet

    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            table = parquet.read_table(path, use_threads=False)
        elif suffix == ".csv":
            text = dict.fromkeys({*_ROWS, *_SPELLS}, pyarrow.string())
            table = csv.read_csv(
                path,
                read_options=csv.ReadOptions(use_threads=False),
                convert_options=csv.ConvertOptions(column_types=text, strings_can_be_null=False),
            )
        else:
            raise _BadTrace(": must be a .csv or a .parquet file")
    except pyarrow.ArrowInvalid as error:
        words = " ".join(str(error).split())
        raise _BadTrace(f": is no {suffix[1:]} file: {words}") from None
    names = [name.strip() for name in table.column_names]
    wanted = _ROWS if "round" in names else _SPELLS
    for name in names:
        if name not in wanted:
            known = {*_ROWS, *_SPELLS} if not {"round", "start"} & set(names) else wanted
            raise _BadTrace(f": {unknown(name, 'a column of a trace', known)}")
        if names.count(name) > 1:
            raise _BadTrace(f": has two columns '{name}'")
    missing = [n for n in wanted if n not in names and n != "available"]
    if missing:
        raise _BadTrace(
            f": has no column '{missing[0]}'; a trace has round, client and perhaps available, or "
            "client, start and end"
        )
    return dict(zip(names, table.columns, strict=True))


def _integers(columns: dict[str, Any], name: str, lowest: int) -> Integers:
    import pyarrow
    from pyarrow import compute, types

    column = columns[name]
    allowed = f"must be an integer >= {lowest}"
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = compute.utf8_trim_whitespace(column)
        good = compute.fill_null(compute.match_substring_regex(column, r"^\d{1,10}$"), False)
        _refuse_first(name, column, ~good.to_numpy().astype(bool), allowed)
        column = compute.cast(column, pyarrow.int64())
    elif not types.is_integer(column.type):
        raise _BadTrace(f", column '{name}': holds {column.type}, {allowed}")
    _refuse_first(name, column, compute.is_null(column).to_numpy().astype(bool), allowed)
    values = column.to_numpy()
    _refuse_first(name, column, (values < lowest) | (values > _MAX), f"{allowed}, <= {_MAX}")
    integers: Integers = values.astype(np.int64)
    return integers


def _flags(column: Any) -> npt.NDArray[np.bool_]:
    words = [str(value).strip().lower() for value in column.to_pylist()]
    bad = np.array([word not in (*_TRUE, *_FALSE) for word in words], dtype=bool)
    _refuse_first("available", column, bad, "must be 0 or 1")
    return np.array([word in _TRUE for word in words], dtype=bool)


def _refuse_first(name: str, column: Any, bad: npt.NDArray[np.bool_], allowed: str) -> None:
    places = np.flatnonzero(bad)
    if len(places):
        row = int(places[0])
        value = column[row].as_py()
        raise _BadTrace(f", row {row}, column '{name}' = {value!r}: {allowed}")
