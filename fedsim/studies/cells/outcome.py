"""What one run came to, read from its folder."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import FedsimError, RunError, ScenarioError, nearest, printable
from fedsim.basics.json_files import JsonLines
from fedsim.runs.client_metrics import is_error
from fedsim.runs.folder import METRICS_FILE
from fedsim.scenario.expectations import METRIC_PHASES
from fedsim.scenario.scenario import Scenario

LAST = 0.1  # the share of a run's rounds whose mean is its value
_TRAFFIC = ("comm/downlink_bytes", "comm/uplink_bytes")
USUAL = ("test/accuracy", "test/rmse", "test/loss")  # what is compared unless another is named
_OF_CLIENTS = ("local", "finetuned", "personal")  # phases with a worst tenth of the clients
_NOT_MEASURES = ("round", "clients/", "comm/", "time/")


class Target(NamedTuple):
    """A value that a metric should reach.

    Attributes:
        metric: The metric.
        value: The value: at least for what should be large, at most for losses and errors.
    """

    metric: str
    value: float

    def reached(self, value: float) -> bool:
        """Return whether a value is as good as the target or better."""
        return value <= self.value if is_error(self.metric) else value >= self.value


class Cost(NamedTuple):
    """What was spent up to a round.

    Attributes:
        rounds: Rounds.
        bytes: Bytes of training's messages, both ways, a set-up exchange included.
        seconds: Seconds of the rounds' own.
    """

    rounds: float
    bytes: float
    seconds: float


NEVER = Cost(math.inf, math.inf, math.inf)


class RunOutcome(NamedTuple):
    """What one run came to.

    Attributes:
        value: The mean of the metric over the last rounds.
        worst: The mean over the same rounds of its mean over the worst tenth of the clients; None
            where clients did not evaluate.
        total: What the whole run cost.
        to_target: What it cost to reach the target; infinite if it never did, None without target.
        curve: The metric by round.
    """

    value: float
    worst: float | None
    total: Cost
    to_target: Cost | None
    curve: Mapping[int, float]


def parse_target(text: str) -> Target:
    """Read `metric=value`.

    Raises:
        ScenarioError: If it is anything else.

    Example:
        >>> parse_target("test/accuracy=0.9")
        Target(metric='test/accuracy', value=0.9)
    """
    metric, separator, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not separator or not math.isfinite(value):
        raise ScenarioError(
            f"--target {printable(text)}: must be metric=value, such as test/accuracy=0.9"
        )
    check_metric(metric.strip(), "--target")
    return Target(metric.strip(), value)


def check_metric(metric: str, option: str) -> None:
    """Refuse what no run can record.

    Raises:
        ScenarioError: Naming the phases that there are.
    """
    phase, _, name = metric.partition("/")
    if phase in METRIC_PHASES and name:
        return
    guess = nearest(phase, METRIC_PHASES)
    hint = f"did you mean '{guess}/{name or 'loss'}'? " if guess and guess != phase else ""
    raise ScenarioError(
        f"{option} {printable(metric)}: is not a metric that a run records; {hint}metrics are "
        f"phase/name with a phase of {', '.join(METRIC_PHASES)}"
    )


def refuse_unrecorded(scenario: Scenario, watched: Sequence[tuple[str, str | None]]) -> None:
    """Refuse metrics that no round of a scenario will record, before anything runs.

    Names that only a run can tell pass, and so does a scenario that cannot be built: its run says
    why.

    Args:
        scenario: The scenario.
        watched: (the option, its metric or None).

    Raises:
        ScenarioError: With a line for each, naming the nearest that is recorded.
    """
    named = [(option, metric) for option, metric in watched if metric is not None]
    if not named:
        return
    from fedsim.runs.world import build
    from fedsim.scenario.recorded_metrics import unrecorded
    from fedsim.tasks.named import make_task

    try:
        world = build(scenario)
    except FedsimError:
        return
    task = make_task(scenario.task, world.data.spec, data=scenario.data["name"])
    model = task.build_model(scenario.seed)
    if lines := unrecorded(world.scenario, named, task, model, world.attack):
        raise ScenarioError("\n".join(lines))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return a run's records, round by round.

    Raises:
        RunError: If there are none, or they cannot be read.
    """
    try:
        history = JsonLines.read(folder / METRICS_FILE)
    except OSError as error:
        raise RunError(f"{folder / METRICS_FILE}: cannot be read: {error.strerror}") from error
    if not history:
        raise RunError(f"{folder / METRICS_FILE}: holds no record")
    return history


def require_recorded(
    metric: str | None,
    history: Iterable[Mapping[str, Any]],
    option: str,
    *,
    usual: Sequence[str] = USUAL,
) -> str:
    """Return the metric that is compared: the one asked for, or the usual one that was recorded.

    Raises:
        ScenarioError: If the run never recorded it.
    """
    recorded = sorted({name for record in history for name in record})
    measures = [name for name in recorded if not name.startswith(_NOT_MEASURES)]
    if metric is None:
        found = next((each for each in usual if each in recorded), None)
        if found is None:
            raise ScenarioError(
                f"{option}: which metric is compared? runs recorded {', '.join(measures)}"
            )
        return found
    if metric in recorded:
        return metric
    guess = nearest(metric, measures)
    hint = f"did you mean '{guess}'? " if guess else ""
    raise ScenarioError(
        f"{option} {metric}: no run has recorded it; {hint}recorded: {', '.join(measures)}"
    )


def outcome_of(
    history: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    last: float = LAST,
    target: Target | None = None,
) -> RunOutcome:
    """Return what a run came to.

    Args:
        history: Its records.
        metric: The metric compared.
        last: The share of its rounds whose recorded values are averaged; at least the last one.
        target: What it should reach.

    Returns:
        The outcome; its value is nan if the run never recorded the metric.
    """
    curve = _recorded(history, metric)
    rounds = int(history[-1]["round"])
    worst = _recorded(history, worst_metric(metric))
    totals = list(_spent(history))
    to_target = None
    if target is not None:
        there = (
            cost
            for cost, record in zip(totals, history, strict=True)
            if record.get(target.metric) is not None and target.reached(record[target.metric])
        )
        to_target = next(there, NEVER)
    value = _late_mean(curve, rounds, last)
    worst_value = _late_mean(worst, rounds, last) if worst else None
    return RunOutcome(value, worst_value, totals[-1], to_target, curve)


def worst_metric(metric: str) -> str:
    """Return the name under which clients' worst tenth of a metric is recorded.

    That is the decile of the same models: `local/` and `finetuned/` measure what clients receive,
    `personal/` a model of each client's own.

    Example:
        >>> worst_metric("test/accuracy"), worst_metric("personal/accuracy")
        ('local/accuracy_worst_decile', 'personal/accuracy_worst_decile')
    """
    phase, _, name = metric.partition("/")
    of_clients = phase if phase in _OF_CLIENTS else "local"
    return f"{of_clients}/{name.removesuffix('_mean')}_worst_decile"


def _recorded(history: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    return {int(r["round"]): float(r[metric]) for r in history if r.get(metric) is not None}


def _late_mean(curve: Mapping[int, float], rounds: int, last: float) -> float:
    if not curve:
        return math.nan
    late = [value for at, value in curve.items() if at > rounds * (1 - last) + 1e-9]
    late = late or [curve[max(curve)]]
    if not all(map(math.isfinite, late)):
        return math.nan
    return math.fsum(late) / len(late)


def _spent(history: Iterable[Mapping[str, Any]]) -> Iterable[Cost]:
    sent, seconds = 0.0, 0.0
    for record in history:
        sent += sum(record.get(name) or 0 for name in _TRAFFIC)
        seconds += record.get("time/round_s") or 0.0
        yield Cost(record["round"], sent, seconds)
