"""What was seen of runs, as metrics of Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from fedsim.deployment.monitoring.audit import ObservedAudit
from fedsim.deployment.monitoring.watch import Sighting
from fedsim.runs.observed import STATES, ObservedRun

_RUN = ("run", "scenario", "strategy")
_LONGEST = 200  # characters of a label

# name without `_total`, what it is, labels beside those of a run
_GAUGES = {
    "fedsim_run_state": ("1 for the state that the run is in", ("state",)),
    "fedsim_run_planned_rounds": ("Rounds that the scenario asks for", ()),
    "fedsim_run_last_round": ("The last round that was recorded", ()),
    "fedsim_run_last_round_seconds": ("Seconds that it took", ()),
    "fedsim_run_last_round_end_timestamp_seconds": (
        "When it was recorded; before any, when the run began", (),
    ),
    "fedsim_run_metric": ("The last value of a metric of the run", ("metric",)),
    "fedsim_run_client_failing": (
        "1 for a client that failed when it was last asked", ("client", "cause"),
    ),
    "fedsim_run_client_required": ("1 for a client whose failure ends the run", ("client",)),
    "fedsim_run_unlisted": (
        "Clients that failed, and metrics, beyond those that are listed", ("kind",),
    ),
}  # fmt: skip
_COUNTERS = {
    "fedsim_run_replies": (
        "Replies that counted (ok), and clients that gave none, by cause", ("cause",),
    ),
    "fedsim_run_bytes": ("Bytes to clients (down) and from them (up)", ("direction",)),
    "fedsim_run_client_failures": ("Failures of a client, by cause", ("client", "cause")),
}  # fmt: skip


def families(seen: Sighting) -> Iterator[Metric]:
    """Return what was seen as families of metrics, each series once.

    Args:
        seen: What a look found.
    """
    series: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in (*_GAUGES, *_COUNTERS)}
    for name, run in seen.runs.items():
        labels = (_label(name), _label(run.scenario), _label(run.strategy))
        for family, found in _of_run(run).items():
            for inner, value in found.items():
                series[family][(*labels, *map(_label, inner))] = value
    for name, (text, inner) in _GAUGES.items():
        yield _family(GaugeMetricFamily(name, text, labels=(*_RUN, *inner)), series[name])
    for name, (text, inner) in _COUNTERS.items():
        yield _family(CounterMetricFamily(name, text, labels=(*_RUN, *inner)), series[name])
    yield GaugeMetricFamily("fedsim_runs_found", "Run folders below the folder", seen.found)
    yield GaugeMetricFamily(
        "fedsim_folder_readable", "1 while the folder can be read", not seen.why_not
    )
    yield GaugeMetricFamily(
        "fedsim_unreadable_files",
        "Files and folders that cannot be read, or hold what they should not",
        len(seen.unreadable),
    )
    if seen.audit is not None:
        yield from _of_site(seen.audit)


def _of_run(run: ObservedRun) -> Mapping[str, Mapping[tuple[object, ...], float]]:
    """The series of a run, by family and further labels."""
    single = {
        "fedsim_run_planned_rounds": run.planned,
        "fedsim_run_last_round": run.last_round,
        "fedsim_run_last_round_seconds": run.round_s,
        "fedsim_run_last_round_end_timestamp_seconds": run.last_time,
    }
    return {
        **{name: {(): value} for name, value in single.items() if value is not None},
        "fedsim_run_state": {(state,): state == run.state for state in STATES},
        "fedsim_run_metric": {(name,): value for name, value in run.values.items()},
        "fedsim_run_client_failing": dict.fromkeys(run.failing.items(), 1),
        "fedsim_run_client_required": {(client,): 1 for client in run.required},
        "fedsim_run_unlisted": {
            ("clients",): run.unlisted, ("metrics",): run.unlisted_metrics,
        },
        "fedsim_run_replies": {(cause,): count for cause, count in run.replies.items()},
        "fedsim_run_bytes": {(way,): count for way, count in run.traffic.items()},
        "fedsim_run_client_failures": dict(run.failures.items()),
    }  # fmt: skip


def _of_site(audit: ObservedAudit) -> Iterator[Metric]:
    instructions = CounterMetricFamily(
        "fedsim_site_instructions", "Instructions that came to the site", labels=("instruction",)
    )
    yield _family(instructions, {(kind,): n for kind, n in audit.instructions.items()})
    yield CounterMetricFamily(
        "fedsim_site_bytes_sent", "Bytes of tensors that left it", audit.bytes_sent
    )
    yield CounterMetricFamily(
        "fedsim_site_errors", "Instructions that ended in an error", audit.errors
    )
    if audit.last_time is not None:
        yield GaugeMetricFamily(
            "fedsim_site_last_instruction_timestamp_seconds", "When the last came", audit.last_time
        )


def _family(
    family: GaugeMetricFamily | CounterMetricFamily, series: Mapping[tuple[str, ...], float]
) -> Metric:
    for labels, value in series.items():
        family.add_metric(labels, float(value))
    return family


def _label(value: object) -> str:
    """A label's value as text that UTF-8 can write, of bounded length."""
    return str(value).encode("utf-8", "backslashreplace").decode()[:_LONGEST]
