"""Runs what is missing of a study and holds its variants beside each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.basics.errors import ScenarioError
from fedsim.studies.cells import cell as cells_
from fedsim.studies.cells.arms import references
from fedsim.studies.cells.cell import Cell
from fedsim.studies.cells.outcome import (
    LAST,
    USUAL,
    RunOutcome,
    Target,
    outcome_of,
    read_history,
    refuse_unrecorded,
    require_recorded,
    worst_metric,
)
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import Variant, choose
from fedsim.studies.comparison.intervals import (
    Mean,
    Paired,
    Ratio,
    mean_interval,
    paired,
    paired_ratio,
)

# what is compared unless another metric is named where clients alone can measure their models
_OF_CLIENTS = ("local/accuracy_mean", "local/rmse_mean", "local/loss_mean")


@dataclass(frozen=True)
class Question:
    """What is compared.

    Attributes:
        metric: The metric; None takes test accuracy, or the error or loss where there is none.
        last: The share of a run's rounds whose mean counts, in (0, 1].
        target: A value whose cost is asked for, or None.
        baseline: The label that others of its axis are held against, or None for the first one.
    """

    metric: str | None = None
    last: float = LAST
    target: Target | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Difference:
    """A variant held against the one that differs from it in nothing but the baseline's axis.

    Attributes:
        variant: The variant's place.
        against: The place of the one that it is held against.
        paired: The differences over the seeds that both have.
    """

    variant: int
    against: int
    paired: Paired


@dataclass(frozen=True)
class Gap:
    """How much of what lies between its reference arms a federation gains.

    Attributes:
        variant: The federated variant's place.
        local: The place of the arm in which each client is alone.
        centralised: The place of the arm with all samples in one hand.
        closed: (federated - local) / (centralised - local), over the seeds that all three have.
    """

    variant: int
    local: int
    centralised: int
    closed: Ratio


@dataclass(frozen=True)
class Comparison:
    """Variants beside each other.

    Attributes:
        study: The study's folder.
        variants: What was compared.
        metric: The metric.
        question: What was asked.
        outcomes: What each run came to, by seed, per variant.
        folders: Where the runs are, likewise.
        differences: The paired differences; empty without an axis of two values.
        axis: The key along which variants are held against a baseline, or None.
        failures: Why runs failed, by name.
        notes: What a reader should know besides.
        gaps: What federated variants gain, where both reference arms are there.
    """

    study: Path
    variants: Sequence[Variant]
    metric: str
    question: Question
    outcomes: Sequence[Mapping[int, RunOutcome]]
    folders: Sequence[Mapping[int, Path]]
    differences: Sequence[Difference]
    axis: str | None
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    gaps: Sequence[Gap] = ()

    @property
    def keys(self) -> list[str]:
        """The axes."""
        return list(dict.fromkeys(key for variant in self.variants for key in variant.labels))

    def values(self, place: int) -> dict[int, float]:
        """Return a variant's values by seed."""
        return {seed: outcome.value for seed, outcome in self.outcomes[place].items()}

    def mean(self, place: int) -> Mean:
        """Return the mean of a variant's values."""
        return mean_interval(list(self.values(place).values()))

    def worst(self, place: int) -> Mean | None:
        """Return the mean over seeds of the worst tenth of the clients, where all measured it."""
        worst = [outcome.worst for outcome in self.outcomes[place].values()]
        numbers = [value for value in worst if value is not None]
        return mean_interval(numbers) if numbers and len(numbers) == len(worst) else None


def compare(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    study: Path,
    question: Question,
    pool: Pool,
) -> Comparison:
    """Run what is missing and hold the variants beside each other.

    Args:
        variants: What is compared.
        seeds: The seeds of each.
        study: The study's folder; what it holds is not run again.
        question: What is asked.
        pool: Runs what is missing.

    Returns:
        The comparison, of the runs that finished.

    Raises:
        ScenarioError: If the question cannot be asked of these runs.
    """
    axis, partners = _partners(variants, question.baseline)
    cells = cells_.cells_of(variants, seeds, study)
    # asked of the first run that is there, before hours are spent on a name that none records
    _metric(cells, question)
    missing = [cell for cell in cells if not cell.finished]
    if len(missing) == len(cells) and cells:
        target = None if question.target is None else question.target.metric
        asked = [("--target", target), ("--metric", question.metric)]
        refuse_unrecorded(cells[0].scenario, asked)
    failed = pool.run(missing, then=lambda cell: _metric([cell], question))
    failures = {cell.name: failed[cell.folder] for cell in cells if cell.folder in failed}
    metric = _metric(cells, question) or ""
    outcomes: list[dict[int, RunOutcome]] = [{} for _ in variants]
    folders: list[dict[int, Path]] = [{} for _ in variants]
    done = [cell for cell in cells if cell.finished]
    for cell in done:
        history = read_history(cell.folder)
        outcomes[cell.variant][cell.seed] = outcome_of(
            history, metric, last=question.last, target=question.target
        )
        folders[cell.variant][cell.seed] = cell.folder
    differences = []
    for place, against in partners.items():
        common = [seed for seed in outcomes[place] if seed in outcomes[against]]
        a, b = ([outcomes[p][seed].value for seed in common] for p in (place, against))
        differences.append(Difference(place, against, paired(a, b)))
    return Comparison(
        study, variants, metric, question, outcomes, folders, differences, axis, failures,
        _notes(done, outcomes, metric), _gaps(variants, outcomes),
    )  # fmt: skip


def _gaps(variants: Sequence[Variant], outcomes: Sequence[Mapping[int, RunOutcome]]) -> list[Gap]:
    found = []
    for place, (alone, together) in references(variants).items():
        three = [outcomes[each] for each in (place, alone, together)]
        common = [seed for seed in three[0] if seed in three[1] and seed in three[2]]
        own, low, high = ([of[seed].value for seed in common] for of in three)
        gained = [a - b for a, b in zip(own, low, strict=True)]
        room = [a - b for a, b in zip(high, low, strict=True)]
        found.append(Gap(place, alone, together, paired_ratio(gained, room)))
    return found


def _metric(cells: Sequence[Cell], question: Question) -> str | None:
    """Return the metric that the first finished cell has recorded; None if none has finished."""
    for cell in cells:
        if cell.finished:
            history = read_history(cell.folder)
            if question.target is not None:
                require_recorded(question.target.metric, history, "--target")
            alone = any(c.scenario.task.get("personal") == ["*"] for c in cells)
            usual = _OF_CLIENTS if alone else USUAL
            return require_recorded(question.metric, history, "--metric", usual=usual)
    return None


def _partners(
    variants: Sequence[Variant], baseline: str | None
) -> tuple[str | None, dict[int, int]]:
    """Return the axis of the baseline, and by place the variant that each is held against."""
    axes: dict[str, list[str]] = {}
    for variant in variants:
        for key, label in variant.labels.items():
            if label not in axes.setdefault(key, []):
                axes[key].append(label)
    axes = {key: labels for key, labels in axes.items() if len(labels) > 1}
    if not axes:
        if baseline is not None:
            raise ScenarioError(f"--baseline {baseline}: there is one variant alone")
        return None, {}
    axis, label = _axis_of(baseline, axes)
    found = {}
    for place, variant in enumerate(variants):
        wanted = {**variant.labels, axis: label}
        against = next((p for p, v in enumerate(variants) if dict(v.labels) == wanted), None)
        if against is not None and against != place:
            found[place] = against
    return axis, found


def _axis_of(baseline: str | None, axes: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    if baseline is None:
        axis = next(iter(axes))
        return axis, axes[axis][0]
    for axis, labels in axes.items():
        if baseline.startswith(f"{axis}="):
            return axis, choose(baseline.partition("=")[2].strip(), labels, f"--baseline {axis} =")
    with_it = [axis for axis, labels in axes.items() if baseline in labels]
    if not with_it:
        every = [label for labels in axes.values() for label in labels]
        choose(baseline, every, "--baseline")
    return with_it[0], baseline


def _notes(
    done: Sequence[Cell], outcomes: Sequence[Mapping[int, RunOutcome]], metric: str
) -> list[str]:
    notes = []
    measured = [o.worst is not None for of in outcomes for o in of.values()]
    if measured and not all(measured):
        some = "in some runs" if any(measured) else ""
        notes.append(
            f"worst 10 % of clients: not measured{' ' + some if some else ''} "
            f"({worst_metric(metric)}): --set evaluation.clients=N --set "
            "partition.test_fraction=0.2 lets N clients evaluate"
        )
    if others := cells_.of_other_versions(done):
        notes.append(
            f"some runs were made under other versions ({', '.join(others)}): their bits may differ"
        )
    return notes


def document_of(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as one JSON-able document."""
    variants = []
    for place, variant in enumerate(comparison.variants):
        outcomes = comparison.outcomes[place]
        worst = comparison.worst(place)
        variants.append(
            {
                **variant.labels,
                "name": variant.name,
                "mean": comparison.mean(place)._asdict(),
                "worst_decile": worst._asdict() if worst else None,
                "runs": [
                    {
                        "seed": seed,
                        "value": outcome.value,
                        "worst_decile": outcome.worst,
                        "total": outcome.total._asdict(),
                        "to_target": outcome.to_target._asdict() if outcome.to_target else None,
                        "folder": str(comparison.folders[place][seed]),
                    }
                    for seed, outcome in sorted(outcomes.items())
                ],
            }
        )
    names = [variant.name for variant in comparison.variants]
    target = comparison.question.target
    return {
        "study": str(comparison.study),
        "metric": comparison.metric,
        "last": comparison.question.last,
        "target": target._asdict() if target else None,
        "axis": comparison.axis,
        "variants": variants,
        "differences": [
            {"name": names[d.variant], "minus": names[d.against], **d.paired._asdict()}
            for d in comparison.differences
        ],
        "gaps": [
            {
                "name": names[gap.variant],
                "local": names[gap.local],
                "centralised": names[gap.centralised],
                **gap.closed._asdict(),
            }
            for gap in comparison.gaps
        ],
        "failures": dict(comparison.failures),
        "notes": list(comparison.notes),
    }
