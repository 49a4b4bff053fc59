"""What declared studies showed, as a page of Markdown and as a document for programs."""

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from fedsim.studies.comparison.intervals import Mean, Paired
from fedsim.studies.evidence.evidence import NULL_BOUND, Evidence, Row, SettingFinding
from fedsim.studies.evidence.markdown import bracketed, code, scale_of, stamp_of, table
from fedsim.studies.tuning.tune import Tuned

_HEAD = f"""# Evidence

Written by `fedsim evidence` from the runs of the studies in `scenarios/studies`; no figure is
edited by hand. A study says what a paper claims, which arms are run (the method, its baseline,
controls that explain it) and where. The value of a run is the mean of the metric over the last
tenth of its rounds; every seed redraws held-out set, partition, participation and initial model,
alike for all arms. Brackets are 95 % t-intervals, for differences of the paired differences; p is
of the two-sided sign-flip test. At each one's best step, all arms tried the same grid, judged on
what clients keep to themselves, with seeds apart; it grew while some arm's best lay on its edge.
The method is **better** or **worse** where the interval leaves out 0, and otherwise no difference
is shown. A null control passes when its interval holds 0 and lies within {100 * NULL_BOUND:g} point
of it. A run that breaks off counts as the study says.
"""


def page(found: Sequence[Evidence], versions: str) -> str:
    """Return the page.

    Args:
        found: The studies.
        versions: What they ran under, in words.
    """
    parts = [_HEAD, f"Run under {versions}.\n", *_overview(found)]
    for each in found:
        parts += _study(each)
    return "\n".join(parts).rstrip() + "\n"


def stamp(evidence: Evidence) -> str:
    """Return the line that names the study's file behind a section of the page."""
    return stamp_of(evidence.declared.name, evidence.declared.sha256)


def _overview(found: Sequence[Evidence]) -> list[str]:
    """One row per comparison of a method with a baseline or control."""
    rows = []
    for evidence in found:
        for finding in evidence.findings:
            rows += [
                [evidence.declared.document.title, _where(finding), row.arm.name, row.arm.role,
                 _difference(row.minus, evidence), str(row.verdict)]
                for row in finding.rows if row.minus is not None
            ]  # fmt: skip
    head = ["method", "setting", "against", "as", "difference", "the method is"]
    return [*table(head, rows), ""]


def _study(evidence: Evidence) -> list[str]:
    document = evidence.declared.document
    seeds = evidence.seeds
    settings = f" with {code(document.set)}" if document.set else ""
    ran = (
        f"`{PurePath(document.scenario).stem}`{settings}: {evidence.findings[0].rounds} rounds, "
        f"seeds {seeds[0]} to {seeds[-1]}, `{document.metric}`"
    )
    lines = [
        f"## {document.title}", stamp(evidence), "",
        f"**Paper**: {document.paper}. **Claim**: {document.claim}", "",
        f"**Run**: {ran}. {document.remark}".rstrip(), "",
    ]  # fmt: skip
    for finding in evidence.findings:
        lines += [*_finding(finding, evidence), ""]
        if finding.best:
            lines += [*_grid(evidence.tuned[finding.setting.title]), ""]
    return lines


def _finding(finding: SettingFinding, evidence: Evidence) -> list[str]:
    setting = f" ({code(finding.setting.set)})" if finding.setting.set and not finding.best else ""
    rows = []
    for row in finding.rows:
        name = f"**{row.arm.name}**" if row.arm.role == "method" else row.arm.name
        rows.append(
            [
                name, row.arm.role, code(row.step),
                _mean(row, evidence), _difference(row.minus, evidence),
                _p(row.minus), row.verdict or "",
            ]
        )  # fmt: skip
    head = [
        "arm", "as", "step", f"mean{_unit(evidence)}",
        "the method minus it", "p; seeds above", "the method is",
    ]  # fmt: skip
    return [f"### {_where(finding)}{setting}", "", *table(head, rows)]


def _where(finding: SettingFinding) -> str:
    if finding.setting.null:
        return f"{finding.setting.title} (null control)"
    step = "at each one's best step" if finding.best else "at equal step"
    return f"{finding.setting.title}, {step}"


def _grid(tuned: Tuned) -> list[str]:
    """The validation metric of every point that was tried."""
    rows = []
    for method, name in enumerate(tuned.methods):
        cells = []
        for point in tuned.grid.points:
            one = next(c for c in tuned.candidates if c.method == method and c.point == point)
            mean = one.mean.mean
            if one.failure is not None or not math.isfinite(mean):
                cells.append("broke off")
                continue
            shown = f"{mean:.4f}" + (f" ({len(one.values)})" if not one.alive else "")
            cells.append(f"**{shown}**" if one is tuned.best[method] else shown)
        rows.append([name, *cells])
    head = [", ".join(tuned.grid.keys), *(", ".join(point) for point in tuned.grid.points)]
    notes = "".join(f" {note[:1].upper()}{note[1:]}." for note in tuned.notes)
    count = len(tuned.seeds)
    seeds = (
        f"seeds {tuned.seeds[0]} to {tuned.seeds[-1]}" if count > 1 else f"seed {tuned.seeds[0]}"
    )
    return [
        f"Steps, by `{tuned.metric}`, {seeds}; (n) was stopped after n seeds.{notes}",
        "",
        *table(head, rows),
    ]


def _scale(evidence: Evidence) -> float:
    return scale_of(evidence.declared.document.metric)


def _unit(evidence: Evidence) -> str:
    return ", %" if _scale(evidence) == 100 else ""


def _mean(row: Row, evidence: Evidence) -> str:
    lost = f"; {row.broken_off} broke off" if row.broken_off else ""
    return bracketed(row.mean, _scale(evidence), "") + lost


def _difference(minus: Paired | None, evidence: Evidence) -> str:
    return "" if minus is None else bracketed(Mean(*minus[:4]), _scale(evidence), "+")


def _p(minus: Paired | None) -> str:
    return "" if minus is None else f"{minus.p:.2g}; {minus.above}/{minus.n}"


def evidence_document(evidence: Evidence) -> dict[str, Any]:
    """Return what a study showed as one JSON-able document."""
    declared = evidence.declared
    return {
        "name": declared.name,
        "title": declared.document.title,
        "sha256": declared.sha256,
        "metric": declared.document.metric,
        "seeds": list(evidence.seeds),
        "findings": [
            {
                "setting": finding.setting.title,
                "best": finding.best,
                "null": finding.setting.null,
                "rows": [
                    {
                        "arm": row.arm.name,
                        "role": row.arm.role,
                        "step": list(row.step),
                        "mean": row.mean._asdict(),
                        "broken_off": row.broken_off,
                        "minus": row.minus._asdict() if row.minus else None,
                        "verdict": row.verdict,
                    }
                    for row in finding.rows
                ],
            }
            for finding in evidence.findings
        ],
    }
