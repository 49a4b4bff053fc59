"""Breaks the five strategies in every small way there is, and counts what nobody notices.

    python -m tests.mutation.run [--only fedld] [--report docs/mutation.md]

Each mutant lives in a process of its own, forked from this one, which sees the changed source in
place of the file. It is held against the strategy's small scenarios (`fedsim check`) and, if those
are content, against its doctests, its oracle, its own tests and the laws. A mutant that hangs is
noticed. Survivors need a reason in `survivors.toml`; without one the exit code is 1, and so it is
when fewer than 90 % are noticed.
"""

import argparse
import doctest
import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
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


def holds(files: Sequence[Path]) -> bool:
    """Whether `fedsim check` is content with scenarios."""
    from fedsim.checking.command import HELD, run_check

    return all(
        run_check([str(file)], tier=None, overrides=(), say=lambda _: None).worst == HELD
        for file in files
    )


def passes(strategy: str, tests: Sequence[str]) -> bool:
    """Whether a strategy's tests and the laws pass; Ray's workers would not see the change."""
    import pytest

    # not by pytest, which reads the file itself
    if doctest.testmod(importlib.import_module(f"strategies.{strategy}")).failed:
        return False
    # fedsim is imported already, and so its assertions are not rewritten: as well
    warns = "ignore::pytest.PytestAssertRewriteWarning"
    common = ["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-W", warns]
    common += ["-o", "addopts=", "-o", "timeout=0", "-m", "not slow and not gpu and not deploy"]
    if pytest.main([*common, *tests]) != pytest.ExitCode.OK:
        return False
    words = f"({strategy} or {strategy.replace('_', '')}) and not ray"
    return pytest.main([*common, "tests/laws", "-k", words]) == pytest.ExitCode.OK


def in_child(changed: _Changed | None, content: Callable[[], bool]) -> bool:
    """Return whether all are content, asked in a process that sees a changed source.

    Raises:
        RuntimeError: If they were asked about the file as it is.
    """
    child = os.fork()
    if child == 0:
        code = _NOTICED
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
            if changed is not None:
                sys.meta_path.insert(0, changed)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            if content():
                code = _CONTENT if changed is None or changed.is_used else _UNCHANGED
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == _UNCHANGED:
        raise RuntimeError("the file as it is was asked about, not the mutant")
    return code == _CONTENT


def stage_that_notices(strategy: str, mutant: Mutant | None) -> str | None:
    """Return the stage that notices a mutant, or None; without a mutant the file as it is."""
    file = ROOT / "strategies" / f"{strategy}.py"
    changed = None
    if mutant is not None:
        source = mutant.applied(file.read_text(encoding="utf-8"))
        changed = _Changed(f"strategies.{strategy}", file, source)
    asked = (
        lambda: holds(scenarios_of(strategy)),
        lambda: passes(strategy, STRATEGIES[strategy]),
    )
    for stage, content in zip(STAGES, asked, strict=True):
        if not in_child(changed, content):
            return stage
    return None


def prepare() -> None:
    """Import what takes long once, for all children; no strategy may be among it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import fedsim.engine.inline
    import fedsim.run  # noqa: F401

    torch.set_num_threads(1)
    if early := [name for name in sys.modules if name.startswith("strategies.")]:
        raise SystemExit(f"{early} would not be changed: they are imported already")


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(STRATEGIES), action="append")
    parser.add_argument("--at-most", type=int, default=24, help="mutants of a file")
    parser.add_argument("--keep", type=Path, help="write what became of each into this file")
    parser.add_argument("--kept", type=Path, action="append", help="take it from there")
    parser.add_argument("--report", type=Path, help="write the report into this file")
    given = parser.parse_args()
    fates = [
        Fate(**each) for file in given.kept or [] for each in json.loads(file.read_text("utf-8"))
    ] or list(_run(given.only or list(STRATEGIES), given.at_most))
    if given.keep:
        given.keep.write_text(json.dumps([fate._asdict() for fate in fates], indent=1), "utf-8")
    found = report(fates, tomllib.loads(REASONS.read_text("utf-8")))
    print(found.text)
    if given.report:
        given.report.write_text(found.text, "utf-8")
    return 0 if found.content else 1


def _run(strategies: Sequence[str], at_most: int) -> Iterator[Fate]:
    prepare()
    for strategy in strategies:
        if stage := stage_that_notices(strategy, None):
            raise SystemExit(f"{strategy}: its {stage} fail as it is")
        made = mutants((ROOT / "strategies" / f"{strategy}.py").read_text("utf-8"))
        chosen = spread(made, at_most)
        for place, mutant in enumerate(chosen, start=1):
            noticed = stage_that_notices(strategy, mutant)
            print(f"{strategy} {place}/{len(chosen)} line {mutant.line} "
                  f"{noticed or 'SURVIVES'}: {mutant.after}", flush=True)  # fmt: skip
            yield Fate(strategy, len(made), mutant.kind, mutant.before, mutant.after, noticed)


if __name__ == "__main__":
    sys.exit(main())
