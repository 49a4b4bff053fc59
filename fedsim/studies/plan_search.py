"""`fedsim plan`: which executor, chunk size, threads and workers suit a scenario, by measurement.

Ways to run are tried on the scenario's own data, strategy and cohorts: they take turns, a round
each, so that whatever else the machine does falls upon all of them, and are compared round by
round. Nothing of this happens in `fedsim run`, whose plan follows from the scenario alone; the
choice counts once it is written into one.
"""

import contextlib
import copy
import itertools
import math
import os
import re
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedsim.basics.errors import ScenarioError
from fedsim.basics.home import expanded
from fedsim.basics.threads import pinned_threads
from fedsim.engine.grid import LocalGrid
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.runs.client_side import make_app
from fedsim.runs.execute import wrapped_grid
from fedsim.runs.loop import RoundLoop
from fedsim.runs.policy import Policy
from fedsim.runs.world import World, build
from fedsim.scenario.scenario import Scenario
from fedsim.scenario.tables import WITH_PATHS, Engine

Kind = Literal["inline", "ray"]
_SLOW = 1.6  # times the fastest after two rounds: no further turns
_WORTH = 1.05  # times faster: less is not worth a change


@dataclass
class Way:
    """A way to run the scenario.

    Attributes:
        executor: As in `[engine]`.
        chunk_size: As in `[engine]`.
        threads: As in `[engine]`.
        kind: The engine.
        workers: Its workers; 1 for "inline".
        as_it_is: Whether it is what the scenario says now.
        seconds: By round that was measured.
    """

    executor: str
    chunk_size: int
    threads: int = 1
    kind: Kind = "inline"
    workers: int = 1
    as_it_is: bool = False
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `[engine]` that make a scenario run so."""
        workers = {"workers": self.workers} if self.kind == "ray" else {}
        names = ("kind", "executor", "chunk_size", "threads")
        return {name: getattr(self, name) for name in names} | workers

    @property
    def median_s(self) -> float:
        """Seconds a round, median."""
        return statistics.median(self.seconds.values()) if self.seconds else math.inf

    def times_faster(self, other: "Way") -> tuple[float, float, float] | None:
        """Return by how much it is faster than another: (median, lowest, highest) of the rounds."""
        both = sorted(self.seconds.keys() & other.seconds.keys())
        ratios = [other.seconds[r] / self.seconds[r] for r in both]
        return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


@dataclass(frozen=True)
class Plans:
    """What was measured.

    Attributes:
        ways: What was tried, the fastest first.
        now: How the scenario runs as it is.
        best: What to take: `now` unless another is faster by more than 5 %.
        refused: Why an executor is out of the question, by name.
    """

    ways: tuple[Way, ...]
    now: Way
    best: Way
    refused: Mapping[str, str]


def measure(
    scenario: Scenario,
    *,
    rounds: int = 7,
    workers: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Plans:
    """Try ways to run a scenario.

    Args:
        scenario: The scenario; Ray is tried if its engine is that.
        rounds: Rounds measured of every way that is not clearly slower; >= 2.
        workers: At most so many workers; None takes the scenario's, or as many as there are cores.
        note: Told what happens.

    Raises:
        ScenarioError: If the scenario cannot be built.
        RunError: If a client fails.
    """
    world = build(scenario)
    worlds, refused = _worlds(scenario, world)
    most = _most_workers(scenario, workers)
    now = Way(
        world.plan.executor, world.plan.chunk_size, world.plan.threads,
        scenario.engine.kind, most if scenario.engine.kind == "ray" else 1, as_it_is=True,
    )  # fmt: skip
    cohort = world.participation.expected_cohort(world.data.num_clients)
    inline = replace(now, kind="inline", workers=1, as_it_is=now.kind == "inline", seconds={})
    sizes = chunk_sizes(cohort, world.plan.chunk_size)
    tried = _different([inline, *(Way(name, size) for name in worlds for size in sizes)])
    now = next((way for way in tried if way.as_it_is), now)
    note(f"{len(tried)} ways in this process, up to {rounds} rounds each")
    with contextlib.ExitStack() as stack, pinned_threads():
        race = _WayRace(worlds, stack)
        race.run(tried, rounds)
        best = min(tried, key=lambda way: way.median_s)
        cores = os.cpu_count() or 1
        if cores > 1 and scenario.engine.device == "cpu":
            note(f"{best.executor} with several threads")
            several = sorted({2, cores} - {best.threads})
            more = [replace(best, threads=n, seconds={}, as_it_is=False) for n in several]
            first = [way for way in tried if way.as_it_is and way is not best]
            race.run([*first, best, *more], rounds)
            tried += more
        if now.kind == "ray":
            spread = _different([now, *_with_workers(best, cohort, most)])
            note(f"{len(spread)} ways on Ray, up to {most} workers")
            race.run([min(tried, key=lambda way: way.median_s), *spread], rounds)
            tried += spread
    tried.sort(key=lambda way: way.median_s)
    return Plans(tuple(tried), now, chosen(tried, now), refused)


def chunk_sizes(cohort: int, default: int) -> list[int]:
    """Return the sizes to try: parts of the cohort, none much above what memory sets as default.

    Example:
        >>> chunk_sizes(20, 10), chunk_sizes(1000, 32), chunk_sizes(3, 2)
        ([5, 10, 20], [16, 32, 64], [2, 3])
    """
    parts = {-(-cohort // n) for n in (1, 2, 4)} | {default // 2, default, default * 2}
    return sorted({size for size in parts if 2 <= size <= min(2 * default, max(2, cohort))})


def _with_workers(best: Way, cohort: int, most: int) -> list[Way]:
    """The best way with workers, its chunks such that all of them have work."""
    counts = sorted({1, -(-most // 2), most})
    return [
        replace(
            best, kind="ray", workers=n, chunk_size=max(2, -(-cohort // (n * each))), threads=1,
            seconds={}, as_it_is=False,
        )
        for n, each in itertools.product(counts, (1, 2))
        if n > 1 or each == 1
    ]  # fmt: skip


def _different(ways: Sequence[Way]) -> list[Way]:
    """The ways without those that are the same, what the scenario says now first."""
    found: dict[tuple[Any, ...], Way] = {}
    for way in sorted(ways, key=lambda way: not way.as_it_is):
        found.setdefault(tuple(way.settings.items()), way)
    return list(found.values())


def _worlds(scenario: Scenario, world: World) -> tuple[dict[str, World], dict[str, str]]:
    """The scenario built for every executor that its model allows, and why not for others."""
    worlds: dict[str, World] = {world.plan.executor: world}
    refused: dict[str, str] = {}
    names = get_args(Engine.model_fields["executor"].annotation)
    for name in names:
        if name != "auto" and name not in worlds:
            try:
                worlds[name] = build(scenario.with_overrides([f"engine.executor={name}"]))
            except ScenarioError as error:
                refused[name] = str(error).partition(": ")[2] or str(error)
    return worlds, refused


def _most_workers(scenario: Scenario, workers: int | None) -> int:
    cores = (os.cpu_count() or 1) / max(scenario.engine.client_resources.num_cpus, 1e-9)
    return workers or scenario.engine.workers or max(1, int(cores))


def chosen(ways: Sequence[Way], now: Way) -> Way:
    """Return the way to take: of those that are as good as the fastest, the plainest.

    Args:
        ways: What was tried.
        now: How the scenario runs as it is.
    """
    fastest = min(way.median_s for way in ways)
    good = [way for way in ways if way.median_s <= _WORTH * fastest]
    best = min(good, key=lambda way: (not way.as_it_is, way.threads, way.workers, way.median_s))
    faster = best.times_faster(now)
    gain = now.median_s / best.median_s if faster is None else faster[0]
    return best if gain > _WORTH else now


class _WayRace:
    """Rounds of several ways in turn: in a turn all of them train the same cohort."""

    def __init__(self, worlds: Mapping[str, World], stack: contextlib.ExitStack) -> None:
        self._worlds, self._stack = worlds, stack
        self._runs: dict[int, Callable[[int], float]] = {}
        self._round = 1  # which warms up

    def run(self, ways: Sequence[Way], rounds: int) -> None:
        """Let every way run so many rounds; those that are clearly slower stop after two."""
        for way in ways:
            if id(way) not in self._runs:
                grid = self._grid(way)
                self._runs[id(way)] = run = _runner(self._worlds[way.executor], grid)
                run(1)
        left = list(ways)
        for turn in range(rounds):
            self._round += 1
            for way in left if turn % 2 else reversed(left):
                way.seconds[self._round] = self._runs[id(way)](self._round)
            if turn == 1:
                fastest = min(way.median_s for way in left)
                left = [way for way in left if way.as_it_is or way.median_s < _SLOW * fastest]

    def _grid(self, way: Way) -> LocalGrid:
        world = self._worlds[way.executor]
        engine, clients = world.scenario.engine, world.data.num_clients
        plan = replace(world.plan, chunk_size=way.chunk_size, threads=way.threads)
        app = make_app(world.scenario, world.data, plan)
        if way.kind == "inline":
            return InlineGrid(app, clients)
        from fedsim.engine.ray.grid import RayGrid

        grid = RayGrid(
            app,
            clients,
            workers=way.workers,
            # so little that the workers of all ways fit in at once; they take turns
            client_resources={
                name: share / 100 for name, share in engine.client_resources.model_dump().items()
            },
            address=engine.address,
            startup_timeout_s=engine.startup_timeout_s,
            silence_timeout_s=engine.silence_timeout_s,
        )
        self._stack.enter_context(grid)
        assert grid.worker_pids  # all of them have started
        return grid


def _runner(world: World, engine: LocalGrid) -> Callable[[int], float]:
    """Return what runs a round of a scenario, without evaluation, and says how long it took."""
    scenario = world.scenario
    takes_part = copy.deepcopy(world.participation)
    loop = RoundLoop(
        strategy=copy.deepcopy(world.strategy),
        grid=ParticipationGrid(wrapped_grid(engine, world), takes_part, seed=scenario.seed),
        num_rounds=0,
        kept=world.kept,
        policy=Policy("stop"),
        seed=scenario.seed,
    )
    arrays = world.arrays

    def run(server_round: int) -> float:
        nonlocal arrays
        loop.num_rounds = server_round
        arrays = loop.run(arrays, first_round=server_round)
        return float(loop.history[-1]["time/round_s"])

    return run


# Writing the choice down.


def write(scenario: Path, out: Path, settings: Mapping[str, Any]) -> None:
    """Write a copy of a scenario with other keys of `[engine]`; comments and all else stay.

    Args:
        scenario: The file.
        out: The copy; must not exist.
        settings: The keys.

    Raises:
        ScenarioError: If the file says `[engine]` in a way that cannot be edited, or the copy
            cannot be written or would not mean the same.
    """
    text = scenario.read_text(encoding="utf-8")
    wanted = tomllib.loads(text)
    wanted["engine"] = {**wanted.get("engine", {}), **settings}
    edited = with_engine(text, settings)
    try:
        same = tomllib.loads(edited) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        keys = "; ".join(toml_lines(settings))
        raise ScenarioError(f"{scenario}: [engine] is written in a way of its own; put in: {keys}")
    for table, key in WITH_PATHS.items():
        path = expanded(str(wanted.get(table, {}).get(key) or "/"))
        if not path.is_absolute() and out.resolve().parent != scenario.resolve().parent:
            raise ScenarioError(
                f"--write {out}: [{table}] {key} = '{path}' is relative to the scenario's folder; "
                f"write into {scenario.parent}"
            )
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(edited)
    except OSError as error:
        raise ScenarioError(f"--write {out}: cannot be written: {error.strerror}") from error


def with_engine(text: str, settings: Mapping[str, Any]) -> str:
    r"""Return a scenario's text with keys of `[engine]` set.

    Example:
        >>> print(with_engine("[engine]\nkind = 'ray' # fast\n", {"kind": "inline", "threads": 2}))
        [engine]
        kind = "inline" # fast
        threads = 2
        <BLANKLINE>
    """
    lines = text.splitlines(keepends=True)
    heads = [n for n, line in enumerate(lines) if re.match(r"\s*\[\s*engine\s*\]", line)]
    if not heads:
        gap = "" if not text or text.endswith("\n") else "\n"
        return "".join([text, gap, "\n[engine]\n", *(f"{line}\n" for line in toml_lines(settings))])
    first = heads[0] + 1
    last = next((n for n in range(first, len(lines)) if lines[n].lstrip()[:1] == "["), len(lines))
    missing = dict(settings)
    for place in range(first, last):
        found = re.match(
            r"(\s*)(\w+)(\s*=\s*)('[^']*'|\"[^\"]*\"|[\w.+-]+)(.*)", lines[place], re.S
        )
        if found and found[2] in missing:
            value = _toml(missing.pop(found[2]))
            lines[place] = f"{found[1]}{found[2]}{found[3]}{value}{found[5]}"
    if lines[first - 1][-1] != "\n":
        lines[first - 1] += "\n"
    while last > first and not lines[last - 1].strip():
        last -= 1
    if last > first and lines[last - 1][-1] != "\n":
        lines[last - 1] += "\n"
    lines[last:last] = [f"{line}\n" for line in toml_lines(missing)]
    return "".join(lines)


def toml_lines(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as lines of a scenario."""
    return [f"{name} = {_toml(value)}" for name, value in settings.items()]


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
