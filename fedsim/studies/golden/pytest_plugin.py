"""The pytest plugin: scenario files are tests.

`pytest scenarios/` collects every scenario there and holds it against its claims and its recording,
as `fedsim check` does. Scenarios of other tiers than `--fedsim-tier` (or the ini option
`fedsim_tier`, "fast" by default) are skipped; `fedsim_collect = false` collects none. Other TOML
files are left alone. Nothing heavy is imported before a scenario runs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedsim.studies.golden.selection import TIERS, is_scenario, tier_of

if TYPE_CHECKING:
    from fedsim.studies.golden.measure import Measurer

_MEASURER = pytest.StashKey["Measurer"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("fedsim", "scenarios of fedsim")
    group.addoption(
        "--fedsim-tier",
        choices=[*TIERS, "all"],
        help="Which scenarios are run: fast (default), slow, gpu, deploy, all.",
    )
    group.addoption(
        "--fedsim-set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="Override a value of every scenario, such as data.path=FOLDER; may be repeated.",
    )
    group.addoption(
        "--fedsim-data",
        metavar="DIR",
        help="Read data sets from the folders of their names in DIR.",
    )
    parser.addini("fedsim_tier", "Which scenarios are run, as --fedsim-tier.", default="fast")
    parser.addini(
        "fedsim_collect", "Whether scenario files are collected.", type="bool", default=True
    )


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker that every scenario has, and refuse a folder of data that is not there."""
    folder = config.getoption("--fedsim-data")
    if folder is not None and not Path(folder).is_dir():
        raise pytest.UsageError(f"--fedsim-data {folder}: there is no such folder")
    config.addinivalue_line("markers", "scenario(tier): a scenario file of fedsim")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "ScenarioFile | None":
    """Collect a scenario file."""
    if file_path.suffix != ".toml" or not parent.config.getini("fedsim_collect"):
        return None
    if not is_scenario(file_path):
        return None
    return ScenarioFile.from_parent(parent, path=file_path)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the processes that have run scenarios."""
    measurer = config.stash.get(_MEASURER, None)
    if measurer is not None:
        measurer.close()


def _measurer_of(config: pytest.Config) -> "Measurer":
    """The measurer of a session's scenarios; a process may run several sessions of pytest."""
    from fedsim.studies.golden.measure import Measurer

    if (measurer := config.stash.get(_MEASURER, None)) is None:
        measurer = config.stash[_MEASURER] = Measurer(workers=1)
    return measurer


class ScenarioFile(pytest.File):
    """A scenario file: one test."""

    def collect(self) -> Iterator[pytest.Item]:
        """Give its test."""
        yield ScenarioItem.from_parent(self, name=self.path.stem)


class _BrokenError(Exception):
    """A scenario's claims are broken or it has drifted; the message has a line for each."""


class ScenarioItem(pytest.Item):
    """A scenario as a test."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        tier = tier_of(self.path)
        self.add_marker(pytest.mark.scenario(tier))
        wanted = self.config.getoption("--fedsim-tier") or self.config.getini("fedsim_tier")
        if wanted not in (tier, "all"):
            reason = f"tier {tier}; --fedsim-tier {tier} runs it"
            self.add_marker(pytest.mark.skip(reason=reason))

    def runtest(self) -> None:
        """Check the scenario."""
        from fedsim.studies.golden.verdict import check

        folder = self.config.getoption("--fedsim-data")
        data = None if folder is None else Path(folder)
        verdict = check(
            self.path,
            self.config.getoption("--fedsim-set"),
            data=data,
            measurer=_measurer_of(self.config),
        )
        self.user_properties.append(("seconds", round(verdict.seconds, 3)))
        if remark := verdict.remark:
            self.add_report_section("call", "fedsim", f"{self.path.stem}: {remark}")
        if not verdict.holds:
            raise _BrokenError("\n".join(verdict.lines()))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Say what is wrong without a traceback, where fedsim itself says it."""
        from fedsim.basics.errors import FedsimError

        if isinstance(excinfo.value, _BrokenError | FedsimError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return what heads its failure."""
        return self.path, 0, f"scenario {self.path.stem}"
