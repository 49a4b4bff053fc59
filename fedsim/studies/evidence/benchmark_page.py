"""What benchmarks showed, as a page of Markdown and as a document for programs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsim.runs.arms import LOCAL
from fedsim.studies.cells.variants import Axis
from fedsim.studies.comparison.intervals import LEVEL, Mean
from fedsim.studies.evidence.benchmark import BenchmarkResult, SettingScores
from fedsim.studies.evidence.benchmark_file import BenchmarkArm
from fedsim.studies.evidence.markdown import bracketed, code, scale_of, stamp_of, table
from fedsim.studies.tuning.report import tuned_document

_HEAD = """# Methods beside each other

Written by `fedsim evidence` from the runs of the benchmarks in `scenarios/studies`; no figure is
edited by hand. Each arm is judged by what its clients would use, on the clients' own test samples:
the shared model, or the client's own where the method gives it one. Every client counts alike. The
value of a run is the mean over the last tenth of its rounds; every seed redraws held-out samples,
partition, participation and initial model, alike for all arms.

**Tuned alike.** In every setting all arms try the same values of the keys that they share, and
those of a key of its own where an arm has one; 0 switches most methods off and makes them FedAvg,
or each client alone. The best is chosen by the same metric on samples that the clients keep back,
with seeds apart from those reported, which draw the same samples anew. A grid grows while a best
lies on its edge; the ends of what a key may be, such as 0, are no edges.

**How to read it.** Brackets are 95 % t-intervals over seeds, for differences those of the paired
differences. The best federated method of a column is bold, and with it all whose paired interval to
it holds 0. Nothing is corrected for many comparisons: where nothing differs, one interval in twenty
still leaves out 0. *Italics* mark what is no federated method: each client alone, or all samples in
one hand, trained as much. The **gap closed** is (method - alone) / (one hand - alone), with
Fieller's interval, which is left out where the two may be equal. A run that breaks off counts as
the study says.
"""

_VERDICTS = _BETTER, _WORSE, _UNKNOWN, _SAME = (
    "better",
    "worse",
    "not told apart",
    "the same in every seed",
)


def benchmark_page(
    found: Sequence[BenchmarkResult], versions: str, pictures: Mapping[str, str]
) -> str:
    """Return the page.

    Args:
        found: The benchmarks.
        versions: What they ran under, in words.
        pictures: Their pictures' paths as the page names them, by study.
    """
    parts = [_HEAD, f"Run under {versions}.\n", *_overview(found)]
    for each in found:
        parts += _benchmark(each, pictures.get(each.declared.name))
    return "\n".join(parts).rstrip() + "\n"


def _benchmark(found: BenchmarkResult, picture: str | None) -> list[str]:
    declared, document = found.declared, found.declared.document
    ran = f"{found.settings[0].rounds} rounds, seeds {found.seeds[0]} to {found.seeds[-1]}"
    settings = f" with {code(document.set)}" if document.set else ""
    lines = [
        f"## {document.title}", stamp_of(declared.name, declared.sha256), "",
        f"**Run**: `{document.scenario.rpartition('/')[2].removesuffix('.toml')}`{settings}: "
        f"{ran}. {document.remark}".rstrip(), "",
        *(f"- **{one.setting.title}**: {code(one.setting.set) or 'as the scenario says'}"
          for one in found.settings), "",
    ]  # fmt: skip
    if picture is not None:
        lines += [f"![{document.title}: means and worst tenths with intervals]({picture})", ""]
    lines += ["### What it shows", "", *_reading(found), ""]
    lines += _clients(found)
    for baseline in declared.baselines:
        lines += _differences(found, baseline)
    return lines + _worst(found) + _gaps(found) + _shared(found) + _chosen(found)


def _overview(found: Sequence[BenchmarkResult]) -> list[str]:
    """How often each method is better or worse than the baseline and than each client alone."""
    names = dict.fromkeys(
        arm.name for each in found for arm in each.declared.arms if arm.reference is None
    )
    settings = [(each.declared, one) for each in found for one in each.settings]
    rows = []
    for name in names:
        verdicts: tuple[list[str], list[str]] = ([], [])
        for declared, one in settings:
            place = next((at for at, arm in enumerate(declared.arms) if arm.name == name), None)
            others = (declared.baselines[0], declared.reference(LOCAL))
            for said, other in zip(verdicts, others, strict=True):
                if place is not None and other is not None and place != other:
                    said.append(_verdict(one, place, other))
        rows.append([name, *map(_counted, verdicts)])
    baselines = dict.fromkeys(each.declared.document.baselines[0] for each in found)
    head = ["method", f"against {_listed(list(baselines))}", "against each client alone"]
    return [
        "## All settings in one table", "",
        "In how many settings a method is better or worse, by the paired interval.", "",
        *table(head, rows), "",
    ]  # fmt: skip


def _counted(verdicts: Sequence[str]) -> str:
    """Return how often each verdict was given, such as "2 better, 1 worse"."""
    found = [(verdicts.count(each), each) for each in _VERDICTS]
    return ", ".join(f"{count} {each}" for count, each in found if count)


def _verdict(one: SettingScores, arm: int, other: int) -> str:
    """What the paired interval says of an arm against another one."""
    if arm in one.same(other):
        return _SAME
    return {True: _BETTER, False: _WORSE, None: _UNKNOWN}[one.better(arm, other)]


def _reading(found: BenchmarkResult) -> list[str]:
    """What the intervals say, setting by setting."""
    alone = found.declared.reference(LOCAL)
    others = [*found.declared.baselines, *([] if alone is None else [alone])]
    lines = []
    for one in found.settings:
        lines.append(f"- **{one.setting.title}**")
        lines += [f"  - {_against(one, other)}" for other in others]
    return lines


def _against(one: SettingScores, other: int) -> str:
    """Which federated arms are better or worse than another arm, in words."""
    arms = one.declared.arms
    held = [at for at, arm in enumerate(arms) if arm.reference is None and at != other]
    said = {at: _verdict(one, at, other) for at in held}
    groups = {each: [arms[at].name for at in held if said[at] == each] for each in _VERDICTS}
    shown = [f"{each.capitalize()}: {_listed(names)}." for each, names in groups.items() if names]
    return f"Against {arms[other].name}. {' '.join(shown)}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _clients(found: BenchmarkResult) -> list[str]:
    unit = _unit(found.declared.document.metric)
    return _by_arm(
        found,
        f"Clients' own test samples{unit}",
        "The mean over clients of the model that they use.",
        lambda one, arm: _bold(_mean(one.mean(arm), found), arm in one.best(lambda s: s.clients)),
    )


def _differences(found: BenchmarkResult, baseline: int) -> list[str]:
    def cell(one: SettingScores, arm: int) -> str:
        if arm == baseline:
            return ""
        held = one.minus(arm, baseline)
        shown = bracketed(Mean(*held[:4]), _scale(found), "+")
        return f"{shown}; p {held.p:.2g}"

    return _by_arm(
        found,
        f"Minus {found.declared.arms[baseline].name}{_points(found)}",
        "Seed by seed; p is of the two-sided sign-flip test.",
        cell,
    )


def _worst(found: BenchmarkResult) -> list[str]:
    def cell(one: SettingScores, arm: int) -> str:
        mean = one.worst(arm)
        if mean is None:
            return ""
        return _bold(_mean(mean, found), arm in one.best(lambda s: s.worst))

    return _by_arm(
        found,
        f"The worst tenth of the clients{_unit(found.declared.document.metric)}",
        "The mean over the tenth of the clients that are worst off, at least one of them.",
        cell,
    )


def _gaps(found: BenchmarkResult) -> list[str]:
    if found.settings[0].gap_closed(0) is None:
        return []

    def cell(one: SettingScores, arm: int) -> str:
        gap = one.gap_closed(arm)
        if gap is None or found.declared.arms[arm].reference is not None:
            return ""
        if not math.isfinite(gap.low):
            return f"{gap.ratio:.2f}"
        return f"{gap.ratio:.2f} [{gap.low:.2f}, {gap.high:.2f}]"

    return _by_arm(found, "Gap closed", "0 is each client alone, 1 all samples in one hand.", cell)


def _shared(found: BenchmarkResult) -> list[str]:
    shared = found.declared.document.shared
    if shared is None:
        return []

    def cell(one: SettingScores, arm: int) -> str:
        mean = one.shared(arm)
        if mean is None:
            return "none"
        shown = bracketed(mean, scale_of(shared), "")
        return _bold(shown, arm in one.best(lambda s: s.shared))

    return _by_arm(
        found,
        f"The shared model on the server's test set{_unit(shared)}",
        f"`{shared}`, under the settings that were chosen for the clients' own test samples; skew "
        "is the clients' alone. None: only the clients have whole models.",
        cell,
    )


def _chosen(found: BenchmarkResult) -> list[str]:
    def cell(one: SettingScores, arm: int) -> str:
        tuned = one.tuned[arm]
        chosen = code([_short(each) for each in tuned.settings(0)])
        return f"{chosen or 'every point broke off'}; {len(tuned.grid.points)} points"

    seeds = found.settings[0].tuned[0].seeds
    how = f"By the same metric, seed {seeds[0]}."
    if len(seeds) > 1:
        half = "after each seed the better half of an arm's points, three at least, went on"
        how = f"By the same metric, seeds {seeds[0]} to {seeds[-1]}; {half}."
    lines = _by_arm(found, "Chosen settings", how, cell)
    common = len(found.declared.common())
    for one in found.settings:
        lines += [*_grids(one, common), *_remarks(one), ""]
    return lines


def _grids(one: SettingScores, common: int) -> list[str]:
    """The grids of a setting as they ended."""
    shared = code([_short(_tried(axis)) for axis in one.tuned[0].grid.axes[:common]])
    own = [
        f"{arm.name} {code([_short(_tried(axis)) for axis in axes])}"
        for arm, tuned in zip(one.declared.arms, one.tuned, strict=True)
        if (axes := tuned.grid.axes[common:])
    ]
    return [f"Tried under *{one.setting.title}*: {'; '.join([f'all {shared}', *own])}."]


def _tried(axis: Axis) -> str:
    return f"{axis.key}={','.join(axis.values)}"


def _remarks(one: SettingScores) -> list[str]:
    """What a reader should know of a setting's figures besides."""
    lines = []
    for arm, tuned, scores in zip(one.declared.arms, one.tuned, one.scores, strict=True):
        for key in tuned.edges[0]:
            lines.append(f"- {arm.name}: the best `{key}` lies on the edge of what was tried.")
        if scores.broken_off:
            lines.append(f"- {arm.name}: {scores.broken_off} of the runs broke off.")
        if scores.untrained:
            in_some = f"in {scores.untrained} of the runs some client had never trained"
            lines.append(f"- {arm.name}: {in_some} and is left out of the means.")
    return ["", *lines] if lines else []


def _short(assignment: str) -> str:
    """An assignment without its table."""
    return assignment.partition("=")[0].rpartition(".")[2] + "=" + assignment.partition("=")[2]


def _by_arm(
    found: BenchmarkResult, title: str, words: str, cell: Callable[[SettingScores, int], str]
) -> list[str]:
    """A table of arms and settings; rows without a cell are left out, tables without rows too."""
    rows = []
    for place, arm in enumerate(found.declared.arms):
        cells = [cell(one, place) for one in found.settings]
        if any(cells):
            rows.append([_named(arm), *cells])
    if not rows:
        return []
    head = ["arm", *(one.setting.title for one in found.settings)]
    return [f"### {title}", "", words, "", *table(head, rows), ""]


def _named(arm: BenchmarkArm) -> str:
    return arm.name if arm.reference is None else f"*{arm.name}*"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _mean(mean: Mean, found: BenchmarkResult) -> str:
    return bracketed(mean, _scale(found), "")


def _scale(found: BenchmarkResult) -> float:
    return scale_of(found.declared.document.metric)


def _unit(metric: str) -> str:
    return ", %" if scale_of(metric) == 100 else ""


def _points(found: BenchmarkResult) -> str:
    return ", points" if _scale(found) == 100 else ""


def benchmark_document(found: BenchmarkResult) -> dict[str, Any]:
    """Return what a benchmark showed as one JSON-able document."""
    declared = found.declared
    settings = []
    for one in found.settings:
        best = one.best(lambda scores: scores.clients)
        rows = []
        for place, arm in enumerate(declared.arms):
            worst, shared = one.worst(place), one.shared(place)
            gap = one.gap_closed(place)
            rows.append(
                {
                    "arm": arm.name,
                    "reference": arm.reference,
                    "metric": declared.metric_of(arm),
                    "values": list(one.scores[place].clients),
                    "mean": one.mean(place)._asdict(),
                    "best": place in best,
                    "worst_decile": None if worst is None else worst._asdict(),
                    "shared": None if shared is None else shared._asdict(),
                    "minus": {
                        declared.arms[other].name: one.minus(place, other)._asdict()
                        for other in declared.baselines
                    },
                    "gap_closed": None if gap is None else gap._asdict(),
                    "broken_off": one.scores[place].broken_off,
                    "tuned": tuned_document(one.tuned[place]),
                }
            )
        settings.append({"setting": one.setting.title, "rows": rows})
    return {
        "name": declared.name,
        "title": declared.document.title,
        "sha256": declared.sha256,
        "baselines": declared.document.baselines,
        "level": LEVEL,
        "seeds": list(found.seeds),
        "settings": settings,
    }
