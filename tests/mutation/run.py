"""Breaks the five strategies in small ways, and counts what nobody notices.

    python -m tests.mutation.run [--only fedld] [--keep fates.json] [--report docs/mutation.md]
    python -m tests.mutation.run --kept fates.json --again  # once a test was added

Each mutant lives in a process of its own, forked from this one, which sees the changed source in
place of the file. It is held against the strategy's small scenarios (`fedsim check`) and, if those
are content, against its doctests, its oracle, its own tests and the laws. A mutant that hangs is
noticed. Survivors need a reason in `survivors.toml`; without one the exit code is 1, and so it is
when fewer than 90 % are noticed. Who noticed a mutant is printed: a notice for a reason that has
nothing to do with the change (a busy machine, a broken test) is not one.
"""

import argparse
import doctest
import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tests.mutation.mutants import Mutant, mutants, spread
from tests.mutation.report import STAGES, Fate, report

ROOT = Path(__file__).resolve().parents[2]
REASONS = Path(__file__).with_name("survivors.toml")
LIMIT_S = 180  # of processor time for one stage
_CONTENT, _NOTICED, _UNCHANGED = 0, 1, 3
SMALL = 10  # rounds

# the files, and which tests are theirs besides the laws
STRATEGIES = {
    "fedld": ["tests/oracles/test_fedld_oracle.py"],
    "fedau": ["tests/oracles/test_fedau_oracle.py", "tests/strategies/test_fedau.py"],
    "fedlex": ["tests/oracles/test_fedlex_oracle.py"],
    "flag": ["tests/oracles/test_flag_oracle.py", "tests/strategies/test_flag.py"],
    "variance_corrected_gossip": [
        "tests/oracles/test_gossip_oracle.py",
        "tests/strategies/test_gossip.py",
    ],
}


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives a changed source for one module, whoever imports it."""

    def __init__(self, name: str, file: Path, source: str) -> None:
        self._name, self._file, self._source = name, file, source

    @property
    def is_used(self) -> bool:
        """Whether the module that is imported is the changed one."""
        return sys.modules[self._name].__loader__ is self

    def find_spec(self, name, path=None, target=None):
        """Find the changed module alone."""
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._file, loader=self)

    def get_filename(self, name):
        """Return the file that it stands for."""
        return str(self._file)

    def get_data(self, path):
        """Return the changed source."""
        return self._source.encode()


def scenarios_of(strategy: str) -> list[Path]:
    """Return a strategy's small scenarios."""
    found = []
    for file in sorted((ROOT / "scenarios").glob("*.toml")):
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        if document["strategy"]["name"] == strategy and document["rounds"] <= SMALL:
            found.append(file)
    return found


def wrong_scenario(files: Sequence[Path]) -> str | None:
    """Return the first scenario that `fedsim check` is not content with, and what became of it."""
    from fedsim.cli.check_study import HELD, run_check

    for file in files:
        answer = run_check([str(file)], tier=None, overrides=(), say=lambda _: None)
        if answer.worst != HELD:
            why = answer.lines[answer.lines.index("") + 1 :]  # below the table
            return f"{file.stem}: {answer.worst}: {why[0]}"
    return None


class _First:
    """Hears of a test run's first failure."""

    said: str | None = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.said is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.said = f"{report.nodeid}: {crash.message if crash else report.longreprtext}"

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)


def failing_test(strategy: str, tests: Sequence[str]) -> str | None:
    """Return the first of a strategy's tests and laws that fails; Ray would not see the change."""
    import pytest

    # not by pytest, which reads the file itself
    if doctest.testmod(importlib.import_module(f"strategies.{strategy}")).failed:
        return "its doctests"
    # fedsim is imported already, and so its assertions are not rewritten: as well
    warns = "ignore::pytest.PytestAssertRewriteWarning"
    common = ["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-W", warns]
    common += ["-o", "addopts=", "-o", "timeout=0", "-m", "not slow and not gpu and not deploy"]
    words = f"({strategy} or {strategy.replace('_', '')}) and not ray"
    for asked in (tests, ["tests/laws", "-k", words]):
        first = _First()
        code = pytest.main([*common, *asked], plugins=[first])
        if code != pytest.ExitCode.OK:
            return first.said or f"pytest ends with {code!r}"
    return None


def complaint(changed: _Changed | None, asked: Callable[[], str | None]) -> str | None:
    """Return what a process that sees a changed source finds wrong, or None.

    Raises:
        RuntimeError: If it was asked about the file as it is.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
        child = os.fork()
        if child == 0:
            code = _NOTICED
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 1))  # told, then ended
                if changed is not None:
                    sys.meta_path.insert(0, changed)
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
                    os.dup2(nowhere.fileno(), 2)
                said = asked()
                if said is None:
                    code = _CONTENT if changed is None or changed.is_used else _UNCHANGED
                answer.write(said or "")
            except BaseException as error:  # a fork must never go on as its parent would
                answer.write(f"{type(error).__name__}: {error}")
            finally:
                answer.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == _UNCHANGED:
            raise RuntimeError("the file as it is was asked about, not the mutant")
        if code == -signal.SIGXCPU:
            return f"no end within {LIMIT_S} s of processor time"
        answer.seek(0)
        return None if code == _CONTENT else " ".join(answer.read().split()) or f"ends with {code}"


def notice(strategy: str, mutant: Mutant | None) -> tuple[str, str] | None:
    """Return the stage that notices a mutant and what it says; without a mutant of the file."""
    file = ROOT / "strategies" / f"{strategy}.py"
    changed = None
    if mutant is not None:
        source = mutant.applied(file.read_text(encoding="utf-8"))
        changed = _Changed(f"strategies.{strategy}", file, source)
    asked = (
        lambda: wrong_scenario(scenarios_of(strategy)),
        lambda: failing_test(strategy, STRATEGIES[strategy]),
    )
    for stage, question in zip(STAGES, asked, strict=True):
        if said := complaint(changed, question):
            return stage, said
    return None


def prepare() -> None:
    """Import what takes long once, for all children; no strategy may be among it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import fedsim.engine.inline
    import fedsim.runs.start  # noqa: F401

    torch.set_num_threads(1)
    if early := [name for name in sys.modules if name.startswith("strategies.")]:
        raise SystemExit(f"{early} would not be changed: they are imported already")


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(STRATEGIES), action="append")
    parser.add_argument("--at-most", type=int, default=40, help="mutants of a file")
    parser.add_argument("--keep", type=Path, help="write what became of each into this file")
    parser.add_argument("--kept", type=Path, action="append", help="take it from there")
    parser.add_argument("--again", action="store_true", help="ask about kept survivors anew")
    parser.add_argument("--report", type=Path, help="write the report into this file")
    given = parser.parse_args()
    fates = [
        Fate(**each) for file in given.kept or [] for each in json.loads(file.read_text("utf-8"))
    ]
    if given.again or not fates:
        prepare()
        fates = list(_again(fates) if fates else _run(given.only or STRATEGIES, given.at_most))
    if given.keep:
        given.keep.write_text(json.dumps([fate._asdict() for fate in fates], indent=1), "utf-8")
    found = report(fates, tomllib.loads(REASONS.read_text("utf-8")))
    print(found.text)
    if given.report:
        given.report.write_text(found.text, "utf-8")
    return 0 if found.content else 1


def _run(strategies: Iterable[str], at_most: int) -> Iterator[Fate]:
    for strategy in strategies:
        if wrong := notice(strategy, None):
            raise SystemExit(f"{strategy}: its {wrong[0]} fail as it is: {wrong[1]}")
        made = _made(strategy)
        for mutant in spread(made, at_most):
            yield _fate(strategy, mutant, len(made))


def _again(fates: Iterable[Fate]) -> Iterator[Fate]:
    """Ask anew about those that survived: more tests notice no less."""
    for fate in fates:
        if fate.noticed is not None:
            yield fate
            continue
        made = _made(fate.strategy)
        place = fate.line, fate.before, fate.after
        (mutant,) = [each for each in made if (each.line, each.before, each.after) == place]
        yield _fate(fate.strategy, mutant, len(made))


def _made(strategy: str) -> list[Mutant]:
    return mutants((ROOT / "strategies" / f"{strategy}.py").read_text("utf-8"))


def _fate(strategy: str, mutant: Mutant, of: int) -> Fate:
    stage, said = notice(strategy, mutant) or (None, "")
    print(f"{strategy} line {mutant.line} {stage or 'SURVIVES'}: {mutant.after}\n    {said[:200]}",
          flush=True)  # fmt: skip
    return Fate(strategy, of, mutant.line, mutant.kind, mutant.before, mutant.after, stage)


if __name__ == "__main__":
    sys.exit(main())
