"""The report of a mutation run, `docs/mutation.md`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

STAGES = ("scenarios", "tests")
SHARE = 0.9  # must be noticed
LEAST = 20  # mutants of each file

HEAD = """\
# Mutation run

`make mutants` breaks the five strategies in small ways, one at a time (a sign, a bound, a number, a
branch, a name that is easily confused, a statement left out), and counts what nobody notices. A
mutant is held against the strategy's small recorded scenarios (`fedsim check`) and, if those are
content, against its doctests, its oracle, its own tests and the laws that name it. Of a file with
many mutants some are taken, evenly from its top to its bottom (`--at-most`). At least 90 % must be
noticed; each survivor has a reason in `tests/mutation/survivors.toml`. The run writes this page.
"""


class Fate(NamedTuple):
    """What became of a mutant.

    Attributes:
        strategy: Of which file it is.
        of: How many mutants that file has, those that were not taken included.
        line: Where, from 1 on.
        kind: What was changed.
        before: The line as it is.
        after: The line as it was.
        noticed: The stage that noticed it; None when it survived.
    """

    strategy: str
    of: int
    line: int
    kind: str
    before: str
    after: str
    noticed: str | None


class Report(NamedTuple):
    """The report's text, and whether enough was noticed and all else explained."""

    text: str
    content: bool


def report(fates: Sequence[Fate], reasons: Mapping[str, Mapping[str, str]]) -> Report:
    """Write the report.

    Args:
        fates: What became of each mutant.
        reasons: Why survivors may live: by strategy and "before -> after" with a line each.
    """
    strategies = dict.fromkeys(fate.strategy for fate in fates)
    lines = [
        HEAD,
        f"| Strategy | Mutants | by {' | by '.join(STAGES)} | survive | noticed |",
        "|---|---|---|---|---|---|",
    ]
    content = True
    for strategy in strategies:
        mine = [fate for fate in fates if fate.strategy == strategy]
        counts = [sum(fate.noticed == stage for fate in mine) for stage in (*STAGES, None)]
        share = 1 - counts[-1] / len(mine)
        content &= share >= SHARE and len(mine) >= LEAST
        cells = " | ".join(map(str, counts))
        lines.append(f"| `{strategy}` | {len(mine)} of {mine[0].of} | {cells} | {share:.0%} |")
    survivors = [fate for fate in fates if fate.noticed is None]
    noticed = 1 - len(survivors) / len(fates)
    lines += ["", f"Of all {len(fates)}, {noticed:.1%} are noticed.", "", "## Survivors", ""]
    lines += ["| Strategy | Was | Became | Why it may |", "|---|---|---|---|"]
    for fate in survivors:
        why = reasons.get(fate.strategy, {}).get(f"{fate.before} -> {fate.after}")
        content &= why is not None
        lines.append(
            f"| `{fate.strategy}` | `{_cell(fate.before)}` | `{_cell(fate.after)}` "
            f"| {why or '**no reason yet**'} |"
        )
    return Report("\n".join(lines) + "\n", content)


def _cell(code: str) -> str:
    return code.replace("|", "\\|")
