"""The round loop: a strategy's four Flower methods over any Grid, with what Flower's `start` lacks.

Resume, hooks, early stop, time per phase, bytes, metrics per client and a policy for failures. With
every client taking part the model it ends with is that of `strategy.start`.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.client.job import OWN, PERSONALISED
from fedsim.federation.grids.clock import ClockGrid
from fedsim.federation.grids.participation import SubsetGrid
from fedsim.federation.grids.wrapper import GridWrapper, Observed
from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import clients_of, failures_of
from fedsim.messages.failures import Failure
from fedsim.messages.records import NUM_EXAMPLES
from fedsim.runs.client_metrics import client_metrics, personal_spread, recorded_as, spread
from fedsim.runs.client_settings import SettingsWatch
from fedsim.runs.foreign_calls import calls_of
from fedsim.runs.policy import EarlyStop, Policy
from fedsim.runs.round_metrics import (
    beyond_what_is_borne,
    participation_metrics,
    strategy_metrics,
    traffic,
)
from fedsim.runs.round_report import Hook, RoundReport
from fedsim.strategy.adapter import as_ours
from fedsim.strategy.foreign import nested

_log = logging.getLogger("fedsim")


@dataclass
class RoundLoop:
    """Runs rounds of a strategy over a grid.

    Attributes:
        strategy: Any Flower strategy.
        grid: Any Grid, with its wrappers.
        num_rounds: The last round.
        evaluate: Measures a model on the server's test set, or None.
        pooled: Measures a model on all clients' own test data together, or None.
        robust: Measures a model on test samples moved to where it errs, or None.
        kept: Tensors of the model that stay as they are, whatever the strategy makes of them
            (frozen parameters; statistics that clients keep or forget).
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        local_clients: Clients that evaluate on their own data, or None.
        policy: What becomes of failures.
        early_stop: When to end early.
        round_timeout_s: Seconds a round's training may take; None waits.
        seed: Seeds the global generators around strategies that draw from them; None (in a
            deployment) leaves them to the operating system, for privacy noise must not be
            predictable.
        hooks: Told of every round.
        watch: Looks at what the strategy tells clients; None lets it be.
    """

    strategy: Strategy
    grid: Grid
    num_rounds: int
    evaluate: Callable[[ArrayRecord], Mapping[str, float]] | None = None
    pooled: Callable[[ArrayRecord], Mapping[str, float]] | None = None
    robust: Callable[[ArrayRecord], Mapping[str, float]] | None = None
    kept: Collection[str] = ()
    evaluate_every: int = 1
    local_clients: np.ndarray | None = None
    policy: Policy = field(default_factory=Policy)
    early_stop: EarlyStop | None = None
    round_timeout_s: float | None = None
    seed: int | None = 0
    hooks: Sequence[Hook] = ()
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    watch: SettingsWatch | None = None

    def __post_init__(self) -> None:
        """Prepare the calls of the strategy."""
        self._calls, self._ours = calls_of(self.strategy, self.seed), as_ours(self.strategy)
        self._inside = [each for each in nested(self.strategy) if each is not self.strategy]

    def run(self, arrays: ArrayRecord, *, first_round: int = 1) -> ArrayRecord:
        """Run the rounds from `first_round` on and return the last model.

        Args:
            arrays: The model before `first_round`.
            first_round: Where to begin; later than 1 when a run is resumed (then `history` holds
                the records of the rounds before).

        Raises:
            RunError: If a round cannot stand, with the round, the client, the cause and the remedy.
        """
        internals.ensure_identity()
        self._ours.declare_setup_timeout(self.round_timeout_s)
        for server_round in range(first_round, self.num_rounds + 1):
            if self._is_over() or self._is_past(server_round):
                break
            arrays = self._round(server_round, arrays)
        if self.stopped is None:
            self._is_over()
        return arrays

    def _is_past(self, server_round: int) -> bool:
        """Whether a round would end after the last moment of a virtual clock."""
        if isinstance(self.grid, ClockGrid) and self.grid.is_over(server_round):
            self.stopped = "the next aggregation is later than [clock] stop_s"
        return self.stopped is not None

    def _is_last(self, server_round: int) -> bool:
        """Whether no round comes after this one, early stops apart."""
        is_last = server_round == self.num_rounds
        return is_last or (isinstance(self.grid, ClockGrid) and self.grid.is_over(server_round + 1))

    def _is_over(self) -> bool:
        if self.early_stop is not None:
            self.stopped = self.early_stop.reason(self.history)
        return self.stopped is not None

    def _round(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        begun = time.perf_counter()
        times: dict[str, float] = {}
        if isinstance(self.grid, GridWrapper):
            self.grid.begin_round(server_round)
        with _timed(times, "configure"):
            messages = self._calls.configure_train(server_round, arrays, self.grid)
        if server_round == 1:
            self._report_start(arrays)
        if self.watch is not None:
            self.watch.look(server_round, messages, training=True)
        with _timed(times, "train"), self._calls.sends(server_round):
            replies: Iterable[Message] = self.grid.send_and_receive(
                messages, timeout=self.round_timeout_s
            )
        sent = traffic(self.grid)
        observed = self.grid.observed() if isinstance(self.grid, GridWrapper) else Observed({}, {})
        failures = failures_of(replies)
        selected = self._asked(messages)
        for failure in failures:
            if failure.cause != "absent":
                _log.warning("%s", failure)
        self.policy.judge(server_round, len(selected), failures)
        with _timed(times, "aggregate"):
            after, trained = self._calls.aggregate_train(server_round, arrays, replies, selected)
            arrays = self._with_kept(arrays, after)
        metrics: dict[str, Any] = {
            **strategy_metrics(trained, replies),
            **participation_metrics(selected, failures),
            **observed.metrics,
            **sent,
        }
        metrics.update(beyond_what_is_borne(metrics, server_round))
        local: tuple[Mapping[str, Any], ...] = ()
        if server_round % self.evaluate_every == 0 or self._is_last(server_round):
            with _timed(times, "evaluate"):
                metrics.update(self._evaluate(arrays))
                measured, local = self._evaluate_locally(server_round, arrays)
                metrics.update(measured)
        times["round"] = time.perf_counter() - begun
        metrics.update({f"time/{name}_s": seconds for name, seconds in times.items()})
        self._report(
            RoundReport(server_round, arrays, metrics, selected, failures, observed.record, local)
        )
        return arrays

    def _asked(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The clients whose replies a round waits for: those asked, or those that a clock delivers.

        Strategies inside of a foreign one are told of the latter.
        """
        if not isinstance(self.grid, ClockGrid):
            return clients_of(messages)
        if self._inside:
            due = np.array(self.grid.due, dtype=np.int64)
            for each in self._inside:
                as_ours(each).declare_due(due)
        return self.grid.due

    def _with_kept(self, before: ArrayRecord, after: ArrayRecord) -> ArrayRecord:
        """The model after a round, with the tensors that no round changes as they were."""
        if not self.kept or after is before:
            return after
        return ArrayRecord({n: before[n] if n in self.kept else a for n, a in after.items()})

    def _evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Test metrics of the model, and those of every node's own model as mean and extremes."""
        found: dict[str, float] = {}
        if self.evaluate is not None:
            found |= {f"test/{name}": value for name, value in self.evaluate(arrays).items()}
        if self.pooled is not None:
            found |= {f"pooled/{name}": value for name, value in self.pooled(arrays).items()}
        if self.robust is not None:
            found |= {f"robust/{name}": value for name, value in self.robust(arrays).items()}
        return {**found, **self._of_nodes()}

    def _of_nodes(self) -> dict[str, float]:
        """Test metrics of every node's own model, as mean and extremes."""
        if self.evaluate is None:
            return {}
        found: dict[str, float] = {}
        columns: dict[str, list[float]] = {}
        for record in self._ours.personal_records():
            for name, value in self.evaluate(record).items():
                columns.setdefault(name, []).append(value)
        for name, values in columns.items():
            found[f"nodes/{name}"] = math.fsum(values) / len(values)
            found[f"nodes/{name}_min"], found[f"nodes/{name}_max"] = min(values), max(values)
        return found

    def _evaluate_locally(
        self, server_round: int, arrays: ArrayRecord
    ) -> tuple[dict[str, Any], tuple[Mapping[str, Any], ...]]:
        """Return (metrics over the clients that evaluate, each client's own)."""
        if self.local_clients is None or not len(self.local_clients):
            return {}, ()
        grid = SubsetGrid(self.grid, self.local_clients)
        messages = self._calls.configure_evaluate(server_round, arrays, grid)
        if self.watch is not None:
            self.watch.look(server_round, messages, training=False)
        with self._calls.sends(server_round):
            replies: Iterable[Message] = grid.send_and_receive(
                messages, timeout=self.round_timeout_s
            )
        sent = traffic(self.grid, "evaluate_")
        failures = failures_of(replies)
        for failure in failures:
            _log.warning("evaluation: %s", failure)
        replace(self.policy, min_replies=0).judge(server_round, len(grid.client_ids), failures)
        means = self.strategy.aggregate_evaluate(server_round, replies)
        apart = (NUM_EXAMPLES, PERSONALISED)
        found = {
            recorded_as(n): v
            for n, v in (means or {}).items()
            if n not in apart and not n.startswith(OWN)
        }
        found |= {**spread(replies), **personal_spread(replies)}
        return {**found, **sent}, tuple(client_metrics(replies))

    def _report_start(self, arrays: ArrayRecord) -> None:
        """Record round 0: the initial model, and the set-up exchange when the strategy held one."""
        setup = self._ours.setup_replies
        metrics: dict[str, Any] = self._evaluate(arrays)
        sent = traffic(self.grid)
        selected: tuple[int, ...] = ()
        failures: tuple[Failure, ...] = ()
        if setup is not None:
            failures = setup.failures
            selected = tuple(sorted({*setup.client_ids.tolist(), *(f.client_id for f in failures)}))
            metrics.update(participation_metrics(selected, failures))
            metrics.update(sent)
            for failure in failures:
                _log.warning("set-up: %s", failure)
            self.policy.judge(0, len(selected), failures)
        self._report(RoundReport(0, arrays, metrics, selected, failures))

    def _report(self, report: RoundReport) -> None:
        self.history.append({"round": report.server_round, **report.metrics})
        for hook in self.hooks:
            hook.round_ended(report)


@contextlib.contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        times[phase] = times.get(phase, 0.0) + time.perf_counter() - begun
