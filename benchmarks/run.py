"""Times fedsim beside its peers on the same work, in one run, and writes the report.

    python -m benchmarks.run                                     all of it (`make bench`)
    python -m benchmarks.run --only W1,W4 --systems fedsim,flower --repeats 3
    python -m benchmarks.run --report                            the report again, from the log

Everything that is measured goes to a raw log, one JSON object per line; `docs/benchmarks.md` and
its plot are made from that log alone. Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environments, pool, report
from benchmarks.contest import (
    SETTLE_S,
    SYSTEMS_FOLDER,
    WARM_UP,
    Entrant,
    Fallen,
    log,
    passes,
    turn_length,
)
from benchmarks.workloads import (
    AGREEMENT,
    ALGORITHMS,
    ASIDE,
    CONTESTS,
    FAMILIES,
    KERNELS,
    LOSS_TOLERANCE,
    PEERS,
    PYTHON,
    REFERENCE,
    SYSTEMS,
    WORKLOADS,
    Workload,
)

HERE = Path(__file__).parent
SAME_COHORT = 20  # clients of the check, all of whom take part
SHARE = 200  # samples of each of them
SCALING = (  # what varies, and the workloads: fedsim inline
    ("N", [("logistic", {}, n, 20) for n in (100, 1_000, 10_000, 100_000, 1_000_000)]),
    ("K", [("logistic", {}, 10_000, k) for k in (5, 20, 100, 500)]),
    ("model", [("mlp", {"hidden": [h, h]}, 100, 20) for h in (64, 200, 800)]),
)


class Bench:
    """One run of the harness.

    Args:
        options: The command line.
        record: Takes what is measured.
    """

    def __init__(
        self, options: argparse.Namespace, record: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._options, self._record = options, record
        self._cache: Path = options.cache
        self._errors = self._cache / "errors"
        self._models = self._cache / "models"
        for folder in (self._errors, self._models):
            folder.mkdir(parents=True, exist_ok=True)
        self._pythons: dict[str | None, str] = {None: PYTHON}
        for work in WORKLOADS.values():
            pool.make(self._cache / "pools", work.pool)
            pool.start_from(self._models, work.model)

    def install(self, names: Sequence[str]) -> None:
        """Make the environments of the systems; what cannot be had is recorded and left out."""
        for name in sorted({SYSTEMS[n].environment for n in names} - {None}):
            log(f"environment {name}")
            try:
                python = environments.python_of(name, self._options.environments)
            except environments.CannotInstall as error:
                self._record({"kind": "refused", "environment": name, "reason": str(error)})
                continue
            self._pythons[name] = str(python)
            versions = environments.packages(python)
            self._record({"kind": "environment", "name": name, "packages": versions})

    def check(self, workloads: Sequence[str], names: Sequence[str]) -> None:
        """Hold all families to one loss: the same clients, all of them, for ten rounds."""
        asked = [rows[0] for rows in FAMILIES.values() if {*rows} & {*names}]
        models = {(WORKLOADS[w].model, WORKLOADS[w].pool): w for w in reversed(workloads)}
        for name in models.values():
            of = WORKLOADS[name]
            work = Workload("", of.model, SAME_COHORT, SAME_COHORT, of.pool)
            log(f"check {name}: {work.model}, {work.pool}")
            with ThreadPoolExecutor(2) as side_by_side:  # nothing is timed
                list(side_by_side.map(lambda n: self._check(name, work, n), self._there(asked)))  # noqa: B023

    def _check(self, workload: str, work: Workload, name: str) -> None:
        try:
            entrant = self._enter(f"check-{workload}", work, name)
            try:
                self._lost("check", workload, work, name, entrant, WARM_UP)
            finally:
                entrant.end()
        except Fallen as error:
            self._fallen(workload, name, error)

    def agree(self, workloads: Sequence[str], names: Sequence[str]) -> None:
        """Hold the systems that run an algorithm to one model, in float64.

        All clients take part and take whole shares for batches, so that nothing is drawn. Of
        Ditto the shared model is compared, not the clients' own.
        """
        for name in workloads:
            asked = [s for s in self._there(names) if s in (ALGORITHMS[name].systems or ())]
            work = replace(ALGORITHMS[name], clients=SAME_COHORT, cohort=SAME_COHORT)
            log(f"agreement {name}: {', '.join(asked)}")
            found: dict[str, dict[str, np.ndarray]] = {}
            for system in asked:
                saved = self._models / f"agreement-{name}-{system}.npz"
                try:
                    whole = {"batch": SHARE, "epochs": 2, "dtype": "float64"}
                    entrant = self._enter(f"agreement-{name}", work, system, exact=whole)
                    try:
                        entrant.turn(WARM_UP, saved)
                    finally:
                        entrant.end()
                except Fallen as error:
                    self._fallen(name, system, error)
                    continue
                with np.load(saved) as file:
                    found[system] = {n: np.array(file[n]) for n in file.files}
            for system in asked[1:]:
                if {asked[0], system} <= found.keys():
                    apart = difference(found[asked[0]], found[system])
                    self._record(
                        {
                            "kind": "agreement", "workload": name, "system": system,
                            "reference": asked[0], "difference": apart, "bound": AGREEMENT,
                            "rounds": WARM_UP,
                        }
                    )  # fmt: skip

    def contest(self, workloads: Sequence[str], names: Sequence[str]) -> None:
        """Start every system on every workload, then let them take turns."""
        log(f"contest {', '.join(workloads)}")
        entrants: list[tuple[str, str, Entrant]] = []
        try:
            for workload in workloads:
                work = WORKLOADS[workload]
                for name in self._there(names):
                    if work.systems is None or name in work.systems:
                        self._start(workload, work, name, entrants)
            what = {id(entrant): (w, n) for w, n, entrant in entrants}
            for repeat, entrant in passes([e for *_, e in entrants], self._options.repeats):
                if id(entrant) not in what:
                    continue
                workload, name = what[id(entrant)]
                time.sleep(SETTLE_S)
                try:
                    took = entrant.turn()
                except Fallen as error:
                    self._fallen(workload, name, error)
                    del what[id(entrant)]
                    continue
                self._record(
                    {"kind": "turn", "workload": workload, "system": name, "repeat": repeat, **took}
                )
        finally:
            for *_, entrant in entrants:
                entrant.end()

    def _start(
        self, workload: str, work: Workload, name: str, entrants: list[tuple[str, str, Entrant]]
    ) -> None:
        log(f"  {workload} {name}")
        try:
            entrant = self._enter(workload, work, name)
            entrants.append((workload, name, entrant))
            first = entrant.turn(1)
            begun = {"start_s": entrant.start_s, "first_s": first["seconds"]}
            warm = self._lost("loss", workload, work, name, entrant, WARM_UP - 1)
        except Fallen as error:
            self._fallen(workload, name, error)
            entrants[:] = [each for each in entrants if each[:2] != (workload, name)]
            return
        # a fedsim turn is whole tens of rounds: each with its checkpoint
        unit = 10 if name.startswith("fedsim") else 2
        seconds = warm["seconds"] / warm["rounds"]
        entrant.rounds = turn_length(seconds, self._options.turn_seconds, unit=unit)
        if self._options.rounds:
            entrant.rounds = self._options.rounds
        self._record(
            {"kind": "start", "workload": workload, "system": name, **begun, **entrant.facts}
        )

    def kernels(self) -> None:
        """W6."""
        log("contest W6")
        work = {"clients": 50, "dim": self._options.dim, "coordinates": self._options.dim // 10}
        script = str(SYSTEMS_FOLDER / "kernels.py")
        entrant = Entrant(
            "kernels", [PYTHON, script], work, self._errors / "kernels", _one_thread("fedsim")
        )
        try:
            begun = {"start_s": entrant.start_s, "first_s": 0.0, **work, **entrant.facts}
            for kernel in KERNELS:
                self._record({"kind": "start", "workload": "W6", "system": kernel, **begun})
            for repeat in range(self._options.repeats):
                for kernel in KERNELS:
                    took = entrant.turn(1, kernel=kernel)
                    self._record(
                        {"kind": "turn", "workload": "W6", "system": kernel, "repeat": repeat}
                        | took
                    )
        except Fallen as error:
            self._fallen("W6", "kernels", error)
        finally:
            entrant.end()

    def scaling(self) -> None:
        """Rounds per second and memory of fedsim, inline, as one thing grows."""
        for axis, workloads in SCALING:
            log(f"scaling over {axis}")
            for model, task, clients, cohort in workloads:
                work = Workload("", model, clients, cohort)
                name = "fedsim-inline"
                try:
                    entrant = self._enter("scaling", work, name, {"task": task} if task else {})
                    try:
                        first = entrant.turn(1)
                        warm = entrant.turn(WARM_UP - 1)
                        seconds = warm["seconds"] / warm["rounds"]
                        rounds = turn_length(seconds, self._options.turn_seconds / 2, unit=10)
                        turns = [entrant.turn(rounds) for _ in range(3)]
                    finally:
                        entrant.end()
                except Fallen as error:
                    self._fallen(f"scaling over {axis}", name, error)
                    continue
                self._record(
                    {
                        "kind": "scale", "axis": axis, "model": model, "task": task,
                        "clients": clients, "cohort": cohort, "first_s": first["seconds"],
                        "rounds": rounds, "seconds": [turn["seconds"] for turn in turns],
                        "memory": turns[-1]["memory"],
                    }
                )  # fmt: skip

    def _there(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if SYSTEMS[name].environment in self._pythons]

    def _enter(
        self,
        workload: str,
        work: Workload,
        name: str,
        more: Mapping[str, Any] | None = None,
        exact: Mapping[str, Any] | None = None,
    ) -> Entrant:
        system = SYSTEMS[name]
        place = self._cache / "pools" / work.pool
        arguments = {
            **work.arguments(),
            "pool": str(place),
            **system.arguments,
            **(more or {}),
            **(exact or {}),
        }
        if more is None:
            arguments["initial"] = str(self._models / f"{work.model}.npz")
        family = name.partition("-")[0]
        environment = _one_thread(family)
        if family == "fedsim":
            environment["FEDSIM_CACHE"] = str(self._cache / "fedsim")
        environment |= system.variables
        command = [self._pythons[system.environment], str(SYSTEMS_FOLDER / system.script)]
        errors = self._errors / f"{workload}-{name}"
        return Entrant(name, command, arguments, errors, environment)

    def _lost(
        self, kind: str, workload: str, work: Workload, name: str, entrant: Entrant, rounds: int
    ) -> dict[str, Any]:
        """Run rounds and record the loss of the aggregated model over the whole pool."""
        saved = self._models / f"{kind}-{workload}-{name}.npz"
        took = entrant.turn(rounds, saved)
        with np.load(saved) as params:
            value = pool.loss(work.model, params, entrant.work["pool"])
        self._record(
            {
                "kind": kind, "workload": workload, "system": name, "loss": value,
                "rounds": WARM_UP, "tolerance": LOSS_TOLERANCE, "reference": REFERENCE,
            }
        )  # fmt: skip
        return took

    def _fallen(self, workload: str, name: str, error: Fallen) -> None:
        log(f"  {workload} {name} fell: {error}")
        self._record({"kind": "fallen", "workload": workload, "system": name, "reason": str(error)})


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Return by how much two models differ at most, divided by the largest number of the first."""
    largest = np.max([np.abs(tensor).max() for tensor in one.values()])
    apart = [np.abs(tensor - other[name]).max() for name, tensor in one.items()]
    return float(np.max(apart) / largest)  # nan where one of them is


def _one_thread(family: str) -> dict[str, str]:
    """Variables of a system's process: fedsim sees the repository, peers see nothing of it."""
    if family == "fedsim":
        return {"PYTHONPATH": str(HERE.parent)}
    return {"PYTHONPATH": ""}


def machine() -> dict[str, Any]:
    """Return what the report says of the machine, the repository and fedsim's own environment."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    total = Path("/proc/meminfo").read_text().split()[1]
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "kind": "machine",
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": int(total) * 1024,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": found.stdout.strip(),
        "load": os.getloadavg()[0],
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    everything = ",".join([*WORKLOADS, "W6", "scaling"])
    parser.add_argument("--only", default=everything, help=f"of {everything}")
    parser.add_argument(
        "--systems",
        default=",".join(f for f in FAMILIES if f not in ASIDE),
        help="families or rows",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, help="per turn; default: what fills --turn-seconds")
    parser.add_argument("--turn-seconds", type=float, default=1.0)
    parser.add_argument("--dim", type=int, default=11_200_000, help="of W6")
    parser.add_argument("--no-check", action="store_true", help="leave the same-cohort check out")
    parser.add_argument("--report", action="store_true", help="only write the report anew")
    parser.add_argument("--log", type=Path, default=HERE / "results" / "raw.jsonl")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache")
    parser.add_argument("--environments", type=Path, default=HERE / ".envs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args(arguments)
    for name in ("log", "cache", "environments", "docs"):
        setattr(options, name, getattr(options, name).absolute())
    options.only = options.only.split(",")
    rows = [row for name in options.systems.split(",") for row in FAMILIES.get(name, (name,))]
    options.rows = rows
    for given, known, option in (
        (options.only, [*WORKLOADS, "W6", "scaling"], "--only"),
        (rows, [*SYSTEMS], "--systems"),
    ):
        if wrong := [name for name in given if name not in known]:
            parser.error(f"{option}: no '{wrong[0]}'; choose from {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, and write the report."""
    options = _options(arguments)
    if not options.report:
        begun = time.monotonic()
        options.log.parent.mkdir(parents=True, exist_ok=True)
        first = {**machine(), "repeats": options.repeats}  # the log itself makes a checkout dirty
        with options.log.open("w") as file:

            def record(entry: Mapping[str, Any]) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()

            record(first)
            versions = environments.packages(Path(PYTHON))
            record({"kind": "environment", "name": "fedsim", "packages": versions})
            bench = Bench(options, record)
            bench.install(options.rows)
            timed = [w for w in WORKLOADS if w in options.only]
            if not options.no_check:
                bench.check([w for w in timed if w in PEERS], options.rows)
                bench.agree([w for w in timed if w in ALGORITHMS], options.rows)
            for contest in CONTESTS:
                if chosen := [w for w in contest if w in timed]:
                    bench.contest(chosen, options.rows)
            if "W6" in options.only:
                bench.kernels()
            if "scaling" in options.only:
                bench.scaling()
            record({"kind": "done", "seconds": time.monotonic() - begun})
        log(f"took {time.monotonic() - begun:.0f} s")
    report.write(options.log, options.docs)
    log(f"{options.docs / 'benchmarks.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
