"""Where the time of a run went, and what would help: what `fedsim run --profile` measures.

The round loop times its phases anyway. A profile adds what happens inside of training (how long
each worker computed, how long the others waited for it), what writing costs, and how many samples
were padding. The first round stands apart: workers start and load in it.
"""

import contextlib
import statistics
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.basics.text import in_seconds
from fedsim.runs.advice import advice

if TYPE_CHECKING:
    from fedsim.client.plan import ExecutionPlan
    from fedsim.engine.grid import LocalGrid
    from fedsim.engine.work import Work as EngineWork
    from fedsim.engine.work import WorkOutcome
    from fedsim.runs.round_report import Hook, RoundReport

_INSIDE = ("computing", "waiting", "transfer", "checking")  # of training
_PHASES = ("training", *_INSIDE, "aggregation", "evaluation", "broadcast", "writing", "other")
_WORDS = {
    "computing": "  computing (the mean worker)",
    "waiting": "  waiting for the slowest worker",
    "transfer": "  handing out and taking in",
    "checking": "  packing and checking replies",
    "writing": "metrics and checkpoints",
}
_OF_LOOP = {
    "train": "training",
    "aggregate": "aggregation",
    "evaluate": "evaluation",
    "configure": "broadcast",
}


class Profile:
    """Takes the times of one run.

    Args:
        begun: `time.perf_counter()` when the command began; None takes now.
    """

    def __init__(self, begun: float | None = None) -> None:
        self._begun = time.perf_counter() if begun is None else begun
        self._starting: dict[str, float] = {}
        self._rounds: list[dict[str, float]] = []
        self._inside: dict[str, float] = defaultdict(float)
        self._chunks: list[int] = []
        self._clients: list[int] = []
        self._samples = [0, 0]  # with padding, without
        self._workers, self._starts_workers = 1, False
        self._plan: ExecutionPlan | None = None

    @contextlib.contextmanager
    def starting(self, part: str) -> Iterator[None]:
        """Time a part of what comes before the first round."""
        begun = time.perf_counter()
        if not self._starting:
            self._starting["imports and scenario"] = begun - self._begun
        try:
            yield
        finally:
            self._starting[part] = time.perf_counter() - begun

    def watch(self, engine: "LocalGrid", plan: "ExecutionPlan") -> None:
        """Look on at an engine.

        Args:
            engine: The engine.
            plan: How it computes.
        """
        engine.watch = self._performed
        self._workers = getattr(engine, "num_workers", 1)
        self._starts_workers = hasattr(engine, "num_workers")
        self._plan = plan

    def timing(self, hooks: Sequence["Hook"]) -> "Hook":
        """Return a hook that calls these and times them."""
        return _Timed(self, hooks)

    def _performed(
        self, seconds: float, done: Sequence[tuple["EngineWork", "WorkOutcome"]]
    ) -> None:
        """Take note of the pieces of work that were done in one go."""
        busy: dict[int, float] = defaultdict(float)
        trained: list[int] = []
        for work, outcome in done:
            job = getattr(work, "job", None)
            if job is None or outcome.fault is not None:
                continue
            busy[outcome.worker] += outcome.value.seconds
            if job.action == "train":
                trained.append(len(work.clients))
                self._samples[0] += outcome.value.computed
                self._samples[1] += outcome.value.samples
        most, total = max(busy.values(), default=0.0), sum(busy.values())
        self._inside["busy"] += total
        if trained:
            self._chunks.append(len(trained))
            self._clients.append(sum(trained))
            mean = total / self._workers
            self._inside["computing"] += mean
            self._inside["waiting"] += most - mean
            self._inside["transfer"] += max(0.0, seconds - most)

    def ended(self, report: "RoundReport", writing_s: float) -> None:
        """Take note of the end of a round."""
        inside, self._inside = self._inside, defaultdict(float)
        if not report.server_round:
            return
        times = {
            name: float(report.metrics.get(f"time/{timed}_s", 0.0))
            for timed, name in _OF_LOOP.items()
        }
        whole = float(report.metrics.get("time/round_s", sum(times.values())))
        times["other"] = max(0.0, whole - sum(times.values()))
        times["writing"] = writing_s
        for name in _INSIDE[:-1]:
            times[name] = inside[name]
        known = sum(inside[name] for name in _INSIDE[:-1])
        times["checking"] = max(0.0, times["training"] - known) if known else 0.0
        times["busy"], times["round"] = inside["busy"], whole + writing_s
        self._rounds.append(times)

    # What it says.

    def report(self) -> dict[str, Any]:
        """Return the profile as plain values; seconds, and shares in [0, 1]."""
        later = self._rounds[1:] or self._rounds
        total = sum(times["round"] for times in later)
        phases = {
            name: {
                "total_s": sum(times[name] for times in later),
                "median_s": statistics.median([times[name] for times in later] or [0.0]),
                "share": sum(times[name] for times in later) / total if total else 0.0,
            }
            for name in _PHASES
        }
        first = self._rounds[0]["round"] if len(self._rounds) > 1 else None
        padded, real = self._samples
        busy = sum(times["busy"] for times in later)
        document: dict[str, Any] = {
            "starting_s": dict(self._starting),
            "first_round_s": first,
            "rounds": len(later),
            "rounds_s": total,
            "phases": phases,
            "workers": self._workers,
            "starts_workers": self._starts_workers,
            "idle_share": max(0.0, 1 - busy / (self._workers * total)) if total else 0.0,
            "padding_share": 1 - real / padded if padded else 0.0,
            "chunks_per_round": statistics.median(self._chunks) if self._chunks else None,
            "clients_per_round": statistics.median(self._clients) if self._clients else None,
            "plan": None if self._plan is None else self._plan.to_json(),
        }
        return {**document, "advice": advice(document)}

    def lines(self) -> list[str]:
        """Return what a person reads of it, 80 columns wide."""
        return screen(self.report())


class _Timed:
    """Hooks whose time is taken."""

    def __init__(self, profile: Profile, hooks: Sequence["Hook"]) -> None:
        self._profile, self._hooks = profile, hooks

    def round_ended(self, report: "RoundReport") -> None:
        """Tell the hooks, and the profile how long they took."""
        begun = time.perf_counter()
        for hook in self._hooks:
            hook.round_ended(report)
        self._profile.ended(report, time.perf_counter() - begun)


def screen(report: dict[str, Any]) -> list[str]:
    """Return a profile's report as lines of at most 80 columns."""
    rounds, after = report["rounds"], " after the first" * (report["first_round_s"] is not None)
    title = f"{rounds} round{'s' * (rounds != 1)}{after}: where the time went"
    lines = [f"{title:46}{'total':>9}{'median':>9}{'share':>7}"]
    for name, row in report["phases"].items():
        if row["total_s"] > 0 or name in ("training", "aggregation"):
            words = f"{_WORDS.get(name, name):46}"
            numbers = f"{in_seconds(row['total_s']):>9}{in_seconds(row['median_s']):>9}"
            lines.append(f"{words}{numbers}{row['share']:7.0%}")
    before = ", ".join(f"{name} {in_seconds(s)}" for name, s in report["starting_s"].items())
    if report["first_round_s"] is not None:
        before += f", first round {in_seconds(report['first_round_s'])}"
    count = report["workers"]
    lines += [
        "",
        *textwrap.wrap(f"before that: {before}", 80, subsequent_indent="  "),
        f"{count} worker{'s' * (count != 1)}, idle {report['idle_share']:.0%} of the time; "
        f"{report['padding_share']:.0%} of the samples computed are padding",
    ]
    for each in report["advice"]:
        lines += _folded(each)
    return lines


def _folded(text: str) -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
    )
