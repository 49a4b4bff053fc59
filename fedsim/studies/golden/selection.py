"""Which scenarios are checked. Imports nothing heavy: pytest asks at every start."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError, nearest, unknown

TIERS = ("fast", "slow", "gpu", "deploy")
_MARKS = ("data", "partition")  # the tables that every scenario has


class Selected(NamedTuple):
    """Scenarios to check, and how many were left out.

    Attributes:
        files: The scenarios' files.
        left_out: How many of other tiers there are beside them.
    """

    files: list[Path]
    left_out: int


def is_scenario(path: Path) -> bool:
    """Return whether a file looks like a scenario: it has the tables that every scenario has.

    One with a mistake in its TOML is one too, so that it is refused and not passed over.
    """
    document = _document(path)
    if document is not None:
        return all(isinstance(document.get(t), dict) for t in _MARKS)
    try:
        lines = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    except (OSError, UnicodeDecodeError):
        return False
    return lines.issuperset(f"[{table}]" for table in _MARKS)


def tier_of(path: Path) -> str:
    """Return the tier that a scenario's file says it is of; "fast" when it says none."""
    found = (_document(path) or {}).get("tier", TIERS[0])
    return found if isinstance(found, str) else TIERS[0]


def select(names: Sequence[str], tier: str | None = None) -> Selected:
    """Return the scenarios that are named, or lie in folders that are.

    Args:
        names: Files, folders, and names of scenarios that come with fedsim; none of them takes the
            folder `scenarios` here, or those that come with fedsim.
        tier: Which of the scenarios in folders are wanted; "all" for every one. None takes the
            fast ones. A file that is named is taken whatever its tier is.

    Raises:
        ScenarioError: If something named is not there, or nothing is selected.
    """
    if tier not in (None, "all", *TIERS):
        raise ScenarioError(f"--tier: {unknown(str(tier), 'a tier', ('all', *TIERS))}")
    from fedsim.scenario.discovery import shipped_scenarios
    from fedsim.scenario.load import find

    wanted = TIERS if tier == "all" else (tier or TIERS[0],)
    files: list[Path] = []
    others: list[Path] = []

    def take(found: Sequence[Path]) -> None:
        for each in found:
            (files if tier_of(each) in wanted else others).append(each)

    if not names:
        here = Path("scenarios")
        take(_in_folder(here) if here.is_dir() else list(shipped_scenarios().values()))
    for name in names:
        if Path(name).is_dir():
            if not (inside := _in_folder(Path(name))):
                raise ScenarioError(f"{name}: holds no scenario, a .toml file with [data] and "
                                    "[partition]")  # fmt: skip
            take(inside)
        else:
            files.append(find(name))
    if not files:
        raise ScenarioError(
            f"no scenario of tier {' or '.join(wanted)} among {len(others)}; say --tier "
            f"{nearest('slow', sorted({tier_of(each) for each in others})) or 'all'}"
        )
    unique = list(dict.fromkeys(files))
    return Selected(unique, len(set(others) - set(unique)))


def _in_folder(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.toml")) if is_scenario(file)]


def _document(path: Path) -> dict[str, object] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
