"""`fedsim check` and `fedsim golden`: what they do, and what they say."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import FedsimError, ScenarioError
from fedsim.studies.golden.measure import Measurer
from fedsim.studies.golden.recording import Recording, place_of, read
from fedsim.studies.golden.selection import select
from fedsim.studies.golden.verdict import Verdict, check, record

HELD, FAILED, REFUSED, BROKEN = "holds", "failed", "refused", "BROKEN"


class CheckAnswer(NamedTuple):
    """The answer of a command.

    Attributes:
        document: For programs.
        lines: For people.
        worst: The worst of `HELD`, `BROKEN`, `FAILED`, `REFUSED`.
    """

    document: dict[str, Any]
    lines: list[str]
    worst: str = HELD


def run_check(
    names: Sequence[str],
    *,
    tier: str | None,
    overrides: Sequence[str],
    say: Callable[[str], None],
    data: Path | None = None,
) -> CheckAnswer:
    """Check scenarios one after the other; one that fails does not keep the others from it.

    Args:
        names: Files, folders or names; see `selection.select`.
        tier: Which scenarios of folders.
        overrides: Assignments for every scenario.
        say: Told of each scenario when it is done.
        data: See `verdict.check`.

    Raises:
        ScenarioError: If nothing can be selected.
    """
    selected = select(names, tier)
    rows: list[tuple[str, str, str, str, str]] = []
    wrong: list[str] = []
    results: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    worst = HELD
    with Measurer() as measurer:
        for place, file in enumerate(selected.files, start=1):
            state, row, words, result = _one(file, overrides, data, measurer)
            worst = max(worst, state, key=[HELD, BROKEN, FAILED, REFUSED].index)
            rows.append(row)
            wrong += words
            if note := result.get("note"):
                notes.setdefault(note, []).append(file.stem)
            results.append({"scenario": str(file), "verdict": state, **result})
            say(f"{place}/{len(selected.files)}  {file.stem}: {state}")
    lines = [*_table(("scenario", "claims", "recording", "models", "time"), rows)]
    wrong += [f"{_names(stems)}: {note}" for note, stems in notes.items()]
    if wrong:
        lines += ["", *wrong]
    if selected.left_out:
        lines += ["", f"{selected.left_out} scenarios of other tiers left out: --tier all"]
    return CheckAnswer({"checks": results, "left_out": selected.left_out}, lines, worst)


def run_golden(
    names: Sequence[str],
    *,
    update: bool,
    why: str | None,
    overrides: Sequence[str],
    data: Path | None = None,
) -> CheckAnswer:
    """Show recordings, or record scenarios anew.

    Args:
        names: Scenarios: files, or names of those that come with fedsim.
        update: Whether to record.
        why: The reason, which the recording keeps; needed to record.
        overrides: Assignments for every scenario.
        data: See `verdict.check`.

    Raises:
        ScenarioError: If something is refused; scenarios before it are recorded.
        RunError: If a run fails.
    """
    if update and not (why and why.strip()):
        raise ScenarioError('golden --update: say why the recording moves: --why "..."')
    if why is not None and not update:
        raise ScenarioError("golden --why: says why a recording moves; say --update too")
    lines: list[str] = []
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        measurer = stack.enter_context(Measurer()) if update else None
        for file in select(names, "all").files:
            if update:
                before = read(place_of(file))
                made, moved, written = record(
                    file, str(why), overrides, data=data, measurer=measurer
                )
                edited = before is not None and before.code != made.code
                lines += _updated(file, moved, written, edited)
            else:
                found = read(place_of(file))
                lines += _history(file, found)
                if found is None:
                    continue
                made = found
            results.append({"scenario": str(file), **asdict(made)})
    return CheckAnswer({"recordings": results}, lines)


def _one(
    file: Path, overrides: Sequence[str], data: Path | None, measurer: Measurer
) -> tuple[str, tuple[str, str, str, str, str], list[str], dict[str, Any]]:
    """Check one scenario: its state, its row, what is wrong in lines, and what programs read."""
    try:
        verdict = check(file, overrides, data=data, measurer=measurer)
    except ScenarioError as error:
        return (
            REFUSED,
            (file.stem, "refused", "-", "-", "-"),
            str(error).splitlines(),
            _error(error),
        )
    except FedsimError as error:
        lines = [f"{file.stem}: {line}" for line in str(error).splitlines()]
        return FAILED, (file.stem, "failed", "-", "-", "-"), lines, _error(error)
    held = sum(claim["holds"] for claim in verdict.claims)
    claims = f"{held} of {len(verdict.claims)}" if verdict.claims else "none"
    row = (file.stem, claims, *_recorded(verdict), f"{verdict.seconds:.1f} s")
    lines = verdict.lines()
    apart = None if verdict.drifts is None else [each._asdict() for each in verdict.drifts]
    result = {"claims": verdict.claims, "drifts": apart, "note": verdict.remark}
    return HELD if verdict.holds else BROKEN, row, lines, result


def _recorded(verdict: Verdict) -> tuple[str, str]:
    """What the table says of the recording, and of the models' hashes."""
    if verdict.drifts is None:
        return "none", "-"
    if verdict.edited:
        return "EDITED", "-"
    models = [each for each in verdict.drifts if each.what.endswith("params_sha256")]
    rest = len(verdict.drifts) - len(models)
    same = "others" if verdict.note else "DRIFT" if models else "same"
    return f"{rest} DRIFT" if rest else "same", same


def _names(stems: Sequence[str]) -> str:
    return stems[0] if len(stems) == 1 else f"{stems[0]} and {len(stems) - 1} more"


def _error(error: Exception) -> dict[str, Any]:
    return {"error": str(error)}


def _updated(file: Path, moved: list[Any] | None, written: bool, edited: bool) -> list[str]:
    if moved is None:
        return [f"{file.stem}: recorded in {place_of(file)}"]
    if not written:
        return [f"{file.stem}: does what was recorded; nothing to update"]
    why = [f"  {drift}" for drift in moved] or [
        f"  nothing drifted; the {'code' if edited else 'environment'} is another"
    ]
    return [f"{file.stem}: recorded anew in {place_of(file)}", *why]


def _history(file: Path, found: Recording | None) -> list[str]:
    if found is None:
        return [f"{file.stem}: not recorded"]
    where = ", ".join(f"{key} {value}" for key, value in found.environment.items())
    reasons = [f"  {each['date']}  {each['why']}" for each in found.history]
    return [f"{file.stem}: {found.rounds} rounds, params {found.params_sha256[:12]} ({where})",
            *reasons]  # fmt: skip


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, tuple("─" * width for width in widths), *rows)
    ]
