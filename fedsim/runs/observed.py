"""What a run's folder says so far, to somebody who looks on while it is written, or later.

Nothing is written, and no lock is kept. A file that is torn, broken or out of reach is named, and
what the others say is told all the same.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsim.basics.growing import GrowingLines
from fedsim.basics.json_files import JsonLines
from fedsim.basics.locks import is_held
from fedsim.messages.failures import CAUSES, Failure
from fedsim.runs.folder import LOG_FILE, METRICS_FILE, SCENARIO_FILE, SUMMARY_FILE
from fedsim.runs.last_values import standing
from fedsim.runs.on_nodes import NODES_FILE
from fedsim.runs.policy import missing

STATES = ("starting", "running", "completed", "failed", "interrupted", "unknown")
OTHER = "other"  # a cause that this version does not know
MOST_CLIENTS, MOST_METRICS = 100, 200  # that are told of one by one
_LOCK_FILE, _PARTICIPATION_FILE = "lock", "participation.jsonl"
_STAMPED = re.compile(r"(.+)-\d{8}T\d{6}Z-[0-9a-f]{4}")  # a folder that `fedsim run` named
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ([A-Z]+) (.*)")
_LOGGED_FAILURE = re.compile(r"client (\d{1,18}), round (\d{1,18}): ([a-z -]+): ")
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class ObservedRun:
    """One run, as its folder tells it.

    Attributes:
        folder: The run's folder.
        scenario: The scenario's name, or its title where no file tells the name.
        strategy: The strategy's name.
        planned: Rounds that the scenario asks for; None while that is not known.
        required: Clients whose failure ends the run, the first hundred.
        state: One of `STATES`.
        last_round: The last round that was recorded; None before the first.
        round_s: Seconds that it took; None where that was not recorded.
        last_time: When it was recorded, in seconds since 1970; before any, when the run began.
        replies: How many clients gave a reply that counts ("ok"), or none and why, over all rounds.
        traffic: Bytes to clients ("down") and from them ("up"), over all rounds.
        values: The last value of each metric, the first two hundred.
        failures: How often a client failed with which cause; drop-out is no failure. The first
            hundred clients that failed, and all that are required.
        failing: Clients that failed when they were last asked, and their causes, of the same.
        unlisted: Clients that failed and are none of them.
        unlisted_metrics: Metrics that are none of the two hundred.
        unreadable: Names of files that are there and cannot be read, or hold what they should not.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scenario, self.strategy = "", ""
        self.planned: int | None = None
        self.required: tuple[int, ...] = ()
        self.state = "unknown"
        self.last_time: float | None = None
        self.unreadable: set[str] = set()
        self._broken: set[str] = set()  # of the growing files, until they begin anew
        self._documents: dict[str, tuple[Any, Any]] = {}
        self._ended: str | None = None
        self._begin_log()
        self._begin_metrics()
        self._begin_participation()
        self._growing = {
            METRICS_FILE: self._lines(METRICS_FILE, self._begin_metrics, self._take_metrics),
            _PARTICIPATION_FILE: self._lines(
                _PARTICIPATION_FILE, self._begin_participation, self._take_participation
            ),
            LOG_FILE: self._lines(LOG_FILE, self._begin_log, self._take_log),
        }

    def look(self) -> None:
        """Read what is new in the folder."""
        self.unreadable = set()
        self._name()
        for name, lines in self._growing.items():
            self._guarded(name, lines.read)
        self.unreadable |= self._broken
        self._guarded(SUMMARY_FILE, lambda: self._document(SUMMARY_FILE))
        self.state = self._state_now()
        self.last_time = self._time_of(METRICS_FILE) or self._time_of(SCENARIO_FILE)
        self._of_the_unfinished_round()

    # what the files say

    def _name(self) -> None:
        """Read what the run is of."""

        def told() -> None:
            tables = self._document(SCENARIO_FILE)
            if tables is None:
                raise ValueError(f"{SCENARIO_FILE} is missing")
            self.strategy = str(tables["strategy"]["name"])
            self.planned = _whole(tables["rounds"])
            required = (tables.get("deployment") or {}).get("required", [])
            self.required = tuple(sorted({_whole(each) for each in required}))[:MOST_CLIENTS]
            self.scenario = str(tables.get("title") or "")

        def named() -> None:
            runs = self._document(NODES_FILE)
            if runs is not None and (path := runs["config"].get("scenario")):
                self.scenario = Path(path).stem

        self._guarded(SCENARIO_FILE, told)
        if stamped := _STAMPED.fullmatch(self.folder.name):
            self.scenario = stamped[1]
        self._guarded(NODES_FILE, named)

    def _begin_metrics(self) -> None:
        self._broken.discard(METRICS_FILE)
        self.last_round: int | None = None
        self.round_s: float | None = None
        self.traffic: Counter[str] = Counter()
        self.values: dict[str, float] = {}
        self.unlisted_metrics = 0

    def _take_metrics(self, record: Mapping[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self.last_round = _whole(record["round"])
        self.round_s = numbers.get("time/round_s")
        for name, value in numbers.items():
            for direction in ("down", "up"):
                if name.startswith("comm/") and name.endswith(f"{direction}link_bytes"):
                    self.traffic[direction] += int(value)
        values = standing(self.values, numbers)
        self.values = dict(list(values.items())[:MOST_METRICS])
        self.unlisted_metrics = len(values) - len(self.values)

    def _begin_participation(self) -> None:
        self._broken.discard(_PARTICIPATION_FILE)
        self._replies: Counter[str] = Counter()
        self._failures: Counter[tuple[int, str]] = Counter()
        self._failing: dict[int, str] = {}
        self._listed: dict[int, None] = {}
        self._beyond: set[int] = set()
        self._judged_round = -1

    def _take_participation(self, record: Mapping[str, Any]) -> None:
        selected = {_whole(client) for client in record["selected"]}
        server_round = _whole(record["round"])
        failures = [
            Failure(int(client), server_round, _known(cause), "")
            for client, cause in record["failed"].items()
        ]
        self._judged_round = server_round
        for client in selected & self._failing.keys():
            del self._failing[client]
        self._replies["ok"] += len(selected - missing(failures))
        for failure in failures:
            self._replies[failure.cause] += 1
            if failure.cause != "absent" and self._lists(failure.client_id):
                self._failures[failure.client_id, failure.cause] += 1
                self._failing[failure.client_id] = failure.cause

    def _begin_log(self) -> None:
        self._broken.discard(LOG_FILE)
        self._ended = None
        self._logged: dict[tuple[int, int], str] = {}

    def _take_log(self, line: bytes) -> None:
        found = _LOG_LINE.fullmatch(line.decode("utf-8", "replace"))
        if found is None:  # of a traceback
            return
        level, text = found.groups()
        ends = level == "ERROR" and text in ("failed", "interrupted")
        self._ended = text if ends else None
        if text.startswith("resumed from "):  # what failed before is asked again
            self._logged = {}
        elif failure := _LOGGED_FAILURE.match(text):
            client, server_round, cause = failure.groups()
            if len(self._logged) < MOST_CLIENTS:
                self._logged[int(server_round), int(client)] = _known(cause)

    def _of_the_unfinished_round(self) -> None:
        """Count who failed in a round that ended the run, which is then in the log alone."""
        self._logged = {k: v for k, v in self._logged.items() if k[0] > self._judged_round}
        self.replies, self.failures = Counter(self._replies), Counter(self._failures)
        self.failing = dict(self._failing)
        for (_, client), cause in sorted(self._logged.items()):
            self.replies[cause] += 1
            if self._lists(client):
                self.failures[client, cause] += 1
                self.failing[client] = cause
        self.unlisted = len(self._beyond)

    def _lists(self, client: int) -> bool:
        """Whether a client that failed is told of by itself."""
        if client in self._listed or client in self.required:
            return True
        if len(self._listed) < MOST_CLIENTS:
            self._listed[client] = None
            return True
        self._beyond.add(client)
        return False

    def _state_now(self) -> str:
        try:
            held: bool | None = is_held(self.folder / _LOCK_FILE)
        except FileNotFoundError:
            held = None
        except OSError:
            self.unreadable.add(_LOCK_FILE)
            return "unknown"
        if held:
            return "running"
        if (self.folder / SUMMARY_FILE).is_file():
            return "completed"
        if self._ended is not None:
            return self._ended
        # without a lock it has not come to round 1; with one, its process ended and said nothing
        return "starting" if held is None else "interrupted"

    # reading

    def _lines(
        self, name: str, begin: Callable[[], None], take: Callable[[Any], None]
    ) -> GrowingLines:
        def guarded(line: bytes) -> None:
            try:
                take(line if name == LOG_FILE else JsonLines.record(line))
            except _BROKEN:
                self._broken.add(name)

        return GrowingLines(self.folder / name, begin, guarded)

    def _guarded(self, name: str, read: Callable[[], object]) -> None:
        try:
            read()
        except (OSError, *_BROKEN):
            self.unreadable.add(name)

    def _document(self, name: str) -> Any:
        """What a JSON file holds, read again when it has changed; None while it is not there."""
        path = self.folder / name
        try:
            about = path.stat()
        except FileNotFoundError:
            return None
        mark = (about.st_ino, about.st_size, about.st_mtime_ns)
        known, content = self._documents.get(name, (None, None))
        if known != mark:
            if not path.is_file():
                raise OSError(f"{path}: is no plain file")
            content = json.loads(path.read_bytes())
            self._documents[name] = (mark, content)
        return content

    def _time_of(self, name: str) -> float | None:
        try:
            return (self.folder / name).stat().st_mtime
        except OSError:
            return None


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r}: must be a whole number >= 0")
    return value


def _known(cause: Any) -> str:
    return str(cause) if cause in CAUSES else OTHER
