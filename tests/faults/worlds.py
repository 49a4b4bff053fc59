"""Small federations with clients that do real harm, for the tests of faults.

A client's trouble is read from a file each time its data are asked for, so one engine serves many
tests.
"""

import dataclasses
import itertools
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp

from fedsim.basics.json_files import JsonLines
from fedsim.client.executor import CohortExecutor
from fedsim.data.federated import ClientRows, FederatedData
from fedsim.engine.grid import LocalGrid
from fedsim.runs import folder as run_folder
from fedsim.runs.client_side import make_app
from fedsim.runs.execute import RunResult, execute
from fedsim.runs.world import World, build
from fedsim.scenario.load import load
from tests.laws.dropping import DropOutGrid

SCENARIO = """
seed = 5
rounds = 3

[task]
model = "mlp"
hidden = [9]

[data]
name = "synthetic"
dimension = 8
classes = 3
max_samples = 30

[partition]
kind = "natural"
clients = 24
test_fraction = 0.2

[client]
local_lr = 0.1
momentum = 0.9
keep_optimizer = true
batch_size = 50

[engine]
kind = "inline"
chunk_size = 20

[checkpoint]
every = 1
"""
CULPRIT = 17  # the eighteenth of the twenty clients in the first chunk
EVERYBODY = tuple(range(24))


class TwoArguments(ValueError):
    """An exception that cannot be unpickled: its arguments are not its constructor's."""

    def __init__(self, sensor: str, value: float) -> None:
        super().__init__(f"sensor {sensor} gave {value}")


class Trouble:
    """What goes wrong with a client, as a file that clients read when they are asked.

    Args:
        folder: Where the file and the traces of what happened lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, kind: str, *, client: int = CULPRIT, times: int = 10**6) -> None:
        """From now on `kind` happens when `client` is asked, at most so many times."""
        self.end()
        for trace in self.folder.glob("happened.*"):
            trace.unlink()
        text = json.dumps({"kind": kind, "client": client, "times": times})
        (self.folder / "making").write_text(text)
        (self.folder / "making").rename(self.folder / "trouble.json")

    def end(self) -> None:
        """Nothing goes wrong any more."""
        (self.folder / "trouble.json").unlink(missing_ok=True)

    @property
    def happened(self) -> int:
        """How many times it has gone wrong since it was planned."""
        return len(list(self.folder.glob("happened.*")))

    def victim(self, timeout_s: float = 60.0) -> int:
        """Return the process in which it goes wrong, as soon as it has begun."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for trace in self.folder.glob("happened.*"):
                text = trace.read_text()
                if text:
                    return int(text)
            time.sleep(0.01)
        raise TimeoutError("nothing has gone wrong yet")

    def strike(self, client_ids: list[int], rows: ClientRows) -> ClientRows:
        """Do what is planned, in the process of whoever asks."""
        try:
            plan = json.loads((self.folder / "trouble.json").read_text())
        except FileNotFoundError:
            return rows
        if plan["client"] not in client_ids or not self._take_turn(plan["times"]):
            return rows
        return _strike(plan["kind"], client_ids.index(plan["client"]), rows)

    def _take_turn(self, times: int) -> bool:
        for turn in itertools.count():
            if turn == times:
                return False
            try:
                with (self.folder / f"happened.{turn}").open("x") as trace:
                    trace.write(str(os.getpid()))
            except FileExistsError:
                continue
            return True
        return False


def _strike(kind: str, place: int, rows: ClientRows) -> ClientRows:
    match kind:
        case "raise":
            raise ValueError("sample 3 is corrupt")
        case "raise what cannot be unpickled":
            raise TwoArguments("s1", 4.0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "os._exit":
            os._exit(0)
        case "sys.exit":
            sys.exit(0)
        case "sleep":
            time.sleep(3600)
        case "loop":
            while True:
                pass
        case "hang":
            re.match(r"(a+)+$", 64 * "a" + "b")  # native code that keeps the interpreter's lock
        case "pause":
            time.sleep(2)
        case "allocate":
            _exhaust()
        case "swell":
            _swell()
        case "nan":
            return _with_infinite_features(place, rows)
    return rows


def _exhaust() -> None:
    """Ask for more memory than the process may have."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        torch.ones(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _swell() -> None:
    """Take 6 GB of memory, slowly enough to be seen."""
    taken = []
    for _ in range(60):
        taken.append(np.ones(100 * 2**20, dtype=np.uint8))
        time.sleep(0.05)
    time.sleep(60)


def _with_infinite_features(place: int, rows: ClientRows) -> ClientRows:
    features = np.array(rows.features)
    features[rows.rows[place]] = np.inf
    return ClientRows(features, rows.targets, rows.rows)


class TroubledData(FederatedData):
    """Federated data of which one client may make trouble."""

    def __init__(self, inner: FederatedData, trouble: Trouble, split: str = "train") -> None:
        super().__init__(inner._recipe)
        self._inner, self._trouble, self._split = inner, trouble, split
        self.num_clients, self.spec = inner.num_clients, inner.spec
        self.manifest, self.manifest_sha256 = inner.manifest, inner.manifest_sha256

    def __reduce__(self):
        return TroubledData, (self._inner, self._trouble, self._split)

    def sizes(self, client_ids):
        return self._inner.sizes(client_ids)

    def clients(self, client_ids, *, split="train"):
        rows = self._inner.clients(client_ids, split=split)
        if split != self._split:
            return rows
        return self._trouble.strike([int(client) for client in client_ids], rows)

    @property
    def test(self):
        return self._inner.test


def small_world(
    folder: Path,
    *,
    trouble: Trouble | None = None,
    split: str = "train",
    sets: tuple[str, ...] = (),
) -> World:
    """Build the federation of `SCENARIO`, with overrides, in which there may be trouble."""
    file = folder / "faults.toml"
    file.write_text(SCENARIO)
    scenario = load(file, list(sets))
    world = build(scenario)
    if trouble is None:
        return world
    data = TroubledData(world.data, trouble, split)
    return dataclasses.replace(world, data=data, app=make_app(scenario, data, world.plan))


@dataclasses.dataclass(frozen=True)
class Done:
    """What a run left behind."""

    params: str
    failed: list[dict[str, str]]
    metrics: list[dict]
    log: str


def finish(
    world: World, out: Path, engine: LocalGrid, drops=None, *, keep_memories: bool = False
) -> Done:
    """Run a world over an engine, all that `fedsim run` writes included.

    Args:
        world: What to run.
        out: A folder for the run folder.
        engine: Over what.
        drops: The clients that drop out in a round, if any do.
        keep_memories: Whether the engine enters the run as an earlier one has left it.
    """
    folder = run_folder.create(out / f"run-{len(list(out.iterdir()))}", world.scenario)
    if not keep_memories:
        engine.store.restore([], {})
    grid = engine if drops is None else DropOutGrid(engine, drops)
    with folder.recording():
        result: RunResult = execute(world, folder, grid, seed=world.scenario.seed)
    records = JsonLines.read(folder.file("participation.jsonl"))
    return Done(
        params=result.summary["params_sha256"],
        failed=[record["failed"] for record in records],
        metrics=JsonLines.read(folder.file("metrics.jsonl")),
        log=folder.file("log.txt").read_text(),
    )


def is_alive(pid: int) -> bool:
    """Whether a process runs, zombies not counted."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Misshapen(ClientApp):
    """Answers message by message, as nodes do; one client's arrays have a shape too many."""

    def __init__(self, inner: ClientApp, client: int) -> None:
        super().__init__()
        self.inner, self.client = inner, client

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.inner(message, context)
        if context.node_config["partition-id"] == self.client:
            arrays = reply.content["arrays"]
            for name, array in list(arrays.items()):
                arrays[name] = Array(array.numpy()[None])
        return reply


class SlowBuild:
    """Makes an executor, after a while."""

    def __init__(self, build: Callable[[], CohortExecutor], seconds: float) -> None:
        self._build, self._seconds = build, seconds

    def __call__(self) -> CohortExecutor:
        time.sleep(self._seconds)
        return self._build()


class Unreadable:
    """Something that another process cannot unpickle."""

    def __reduce__(self):
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("this machine lacks a library")
