"""The round loop: a strategy's four Flower methods over any Grid, with what Flower's `start` lacks.

Resume, hooks, early stop, time per phase, bytes, metrics per client and a policy for failures. With
every client taking part the model it ends with is that of `strategy.start`.
"""

import contextlib
import gc
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import FedsimError, RunError
from fedsim.basics.generators import seeded
from fedsim.basics.rng import derived_seed
from fedsim.client.executor import SettingsError
from fedsim.engine.client_settings import SettingsWatch
from fedsim.federation.grids.waiting import RoundNodesGrid, unchosen_minima_met
from fedsim.federation.grids.wrapper import (
    ByteCountingGrid,
    GridWrapper,
    Observed,
    SubsetGrid,
    failures_of,
)
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import MessagesError
from fedsim.messages.failures import Failure
from fedsim.messages.records import (
    CONFIG,
    NUM_EXAMPLES,
    SERVER_ROUND,
    ArraysMismatchError,
    first_not_finite,
)
from fedsim.messages.replies import Replies
from fedsim.runs.client_metrics import client_metrics, spread
from fedsim.runs.policy import EarlyStop, Policy, missing
from fedsim.runs.round_report import Hook, RoundReport
from fedsim.scenario.expectations import failed_by
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.foreign import nested

_log = logging.getLogger("fedsim")
_KEPT = (
    "; give every array its name, as in "
    "ArrayRecord({name: Array(values) for name, values in zip(arrays, new, strict=True)})"
)


@dataclass
class RoundLoop:
    """Runs rounds of a strategy over a grid.

    Attributes:
        strategy: Any Flower strategy.
        grid: Any Grid, with its wrappers.
        num_rounds: The last round.
        evaluate: Measures a model on the server's test set, or None.
        pooled: Measures a model on all clients' own test data together, or None.
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
        if isinstance(self.strategy, FederatedStrategy):
            self.strategy.declare_setup_timeout(self.round_timeout_s)
        for server_round in range(first_round, self.num_rounds + 1):
            if self._is_over():
                break
            arrays = self._round(server_round, arrays)
        self._is_over()
        return arrays

    def _is_over(self) -> bool:
        if self.early_stop is not None:
            self.stopped = self.early_stop.reason(self.history)
        return self.stopped is not None

    def _round(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        begun = time.perf_counter()
        times: dict[str, float] = {}
        if isinstance(self.grid, GridWrapper):
            self.grid.begin_round(server_round)
        config = ConfigRecord({})
        with _timed(times, "configure"), self._seeded(server_round, "configure"):
            messages = self._configure(server_round, arrays, config)
        if server_round == 1:
            self._report_start(arrays)
        if self.watch is not None:
            self.watch.look(server_round, messages, training=True)
        with _timed(times, "train"), self._sends(server_round, arrays):
            replies: Iterable[Message] = self.grid.send_and_receive(
                messages, timeout=self.round_timeout_s
            )
        traffic = self._traffic("")
        observed = self.grid.observed() if isinstance(self.grid, GridWrapper) else Observed({}, {})
        failures = failures_of(replies)
        selected = _clients_of(messages)
        for failure in failures:
            if failure.cause != "absent":
                _log.warning("%s", failure)
        self.policy.judge(server_round, len(selected), failures)
        with _timed(times, "aggregate"), self._seeded(server_round, "aggregate"):
            arrays, trained = self._aggregate(server_round, arrays, replies, selected)
        metrics: dict[str, Any] = {
            **_named_metrics(trained, replies),
            **_participation_metrics(selected, failures),
            **observed.metrics,
            **traffic,
        }
        metrics.update(_more_than_borne(metrics, server_round))
        local: tuple[Mapping[str, Any], ...] = ()
        if server_round % self.evaluate_every == 0 or server_round == self.num_rounds:
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

    def _configure(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> Sequence[Message]:
        if not isinstance(self.strategy, FederatedStrategy) and not list(self.grid.get_node_ids()):
            return []  # Flower's own strategies wait for ever for a first node
        with (
            self._named(server_round, "configured"),
            self._offered(server_round, self.grid) as grid,
        ):
            messages = self.strategy.configure_train(server_round, arrays, config, grid)
        messages = messages if isinstance(messages, Sequence) else list(messages)
        if not isinstance(self.strategy, FederatedStrategy):
            _number(messages, server_round)
        return messages

    def _aggregate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        replies: Iterable[Message],
        selected: Sequence[int],
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        if not isinstance(self.strategy, FederatedStrategy) and not _any(replies):
            _log.info("round %d: nobody %s; skipped", server_round, _who(selected))
            return arrays, None
        ours = isinstance(self.strategy, FederatedStrategy)
        quick = contextlib.nullcontext() if ours else _quick_collections()
        with self._named(server_round, "aggregated", replies), quick:
            after, metrics = self.strategy.aggregate_train(server_round, replies)
        if after is None:
            _log.warning(
                "round %d: %s kept the model as it was", server_round, type(self.strategy).__name__
            )
            return arrays, metrics
        self._require_model(server_round, arrays, after)
        if (name := first_not_finite(after)) is not None:
            raise RunError(
                f"round {server_round}: the aggregated '{name}' is not finite; the clients' "
                "replies were, so the strategy diverged: lower [strategy] server_lr or [client] "
                "local_lr"
            )
        if self.kept:
            after = ArrayRecord({n: arrays[n] if n in self.kept else a for n, a in after.items()})
        return after, metrics

    def _evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Test metrics of the model, and those of every node's own model as mean and extremes."""
        if self.evaluate is None:
            return {}
        found = {f"test/{name}": value for name, value in self.evaluate(arrays).items()}
        if self.pooled is not None:
            found |= {f"pooled/{name}": value for name, value in self.pooled(arrays).items()}
        personal = (
            self.strategy.personal_records()
            if isinstance(self.strategy, FederatedStrategy)
            else iter(())
        )
        columns: dict[str, list[float]] = {}
        for record in personal:
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
        with (
            self._seeded(server_round, "configure evaluation"),
            self._offered(server_round, grid) as offered,
        ):
            messages = self.strategy.configure_evaluate(
                server_round, arrays, ConfigRecord({}), offered
            )
        messages = messages if isinstance(messages, Sequence) else list(messages)
        if self.watch is not None:
            self.watch.look(server_round, messages, training=False)
        with self._sends(server_round, arrays):
            replies: Iterable[Message] = grid.send_and_receive(
                messages, timeout=self.round_timeout_s
            )
        traffic = self._traffic("evaluate_")
        failures = failures_of(replies)
        for failure in failures:
            _log.warning("evaluation: %s", failure)
        replace(self.policy, min_replies=0).judge(server_round, len(grid.client_ids), failures)
        means = self.strategy.aggregate_evaluate(server_round, replies)
        found = {f"local/{n}": v for n, v in (means or {}).items() if n != NUM_EXAMPLES}
        return {**found, **spread(replies), **traffic}, tuple(client_metrics(replies))

    def _traffic(self, prefix: str) -> dict[str, int]:
        grid: Grid = self.grid
        while isinstance(grid, GridWrapper):
            if isinstance(grid, ByteCountingGrid):
                down, up = grid.take()
                return {f"comm/{prefix}downlink_bytes": down, f"comm/{prefix}uplink_bytes": up}
            grid = grid.inner
        return {}

    def _report_start(self, arrays: ArrayRecord) -> None:
        """Record round 0: the initial model, and the set-up exchange when the strategy held one."""
        setup = (
            self.strategy.setup_replies if isinstance(self.strategy, FederatedStrategy) else None
        )
        metrics: dict[str, Any] = self._evaluate(arrays)
        traffic = self._traffic("")
        selected: tuple[int, ...] = ()
        failures: tuple[Failure, ...] = ()
        if setup is not None:
            failures = setup.failures
            selected = tuple(sorted({*setup.client_ids.tolist(), *(f.client_id for f in failures)}))
            metrics.update(_participation_metrics(selected, failures))
            metrics.update(traffic)
            for failure in failures:
                _log.warning("set-up: %s", failure)
            self.policy.judge(0, len(selected), failures)
        self._report(RoundReport(0, arrays, metrics, selected, failures))

    def _report(self, report: RoundReport) -> None:
        self.history.append({"round": report.server_round, **report.metrics})
        for hook in self.hooks:
            hook.round_ended(report)

    @contextlib.contextmanager
    def _sends(self, server_round: int, arrays: ArrayRecord) -> Iterator[None]:
        """Say in which round a strategy sends what cannot be answered.

        Raises:
            RunError: Naming round, strategy, cause and remedy.
        """
        who = f"round {server_round}: {type(self.strategy).__name__} sends"
        try:
            yield
        except MessagesError as error:
            raise RunError(f"{who} {error}") from error
        except SettingsError as error:
            raise RunError(f"{who} its clients {error}") from error
        except ArraysMismatchError as error:
            raise RunError(f"{who} another model than it was given: {error}{_KEPT}") from error

    def _require_model(self, server_round: int, before: ArrayRecord, after: Any) -> None:
        """Refuse an aggregate that is not the model.

        Raises:
            RunError: Naming round, strategy and what differs.
        """
        who = f"round {server_round}: {type(self.strategy).__name__} gives back"
        if not isinstance(after, ArrayRecord):
            raise RunError(f"{who} a {type(after).__name__}, where an ArrayRecord is due{_KEPT}")
        if after.keys() != before.keys():
            shown = ", ".join(f"'{name}'" for name in list(after)[:3])
            due = ", ".join(f"'{name}'" for name in list(before)[:3])
            raise RunError(
                f"{who} {len(after)} arrays called {shown}, where the model's {len(before)} are "
                f"called {due}{_KEPT}"
            )
        for name, array in after.items():
            if tuple(array.shape) != tuple(before[name].shape):
                raise RunError(
                    f"{who} '{name}' with shape {tuple(array.shape)}, expected "
                    f"{tuple(before[name].shape)}"
                )

    @contextlib.contextmanager
    def _offered(self, server_round: int, grid: Grid) -> Iterator[Grid]:
        """What a strategy is given to configure with; a foreign one cannot wait on it."""
        if isinstance(self.strategy, FederatedStrategy):
            yield grid
            return
        present = len(list(grid.get_node_ids()))
        with unchosen_minima_met(nested(self.strategy), present):
            yield RoundNodesGrid(grid, server_round)

    @contextlib.contextmanager
    def _named(
        self, server_round: int, what: str, replies: Iterable[Message] = ()
    ) -> Iterator[None]:
        """Say in which round a foreign strategy fails, and whose replies may be why.

        Raises:
            RunError: For any error but fedsim's own.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, FedsimError) or isinstance(self.strategy, FederatedStrategy):
                raise
            idle = _idle(replies)
            hint = f"; clients {idle} sent back the model they received" if idle else ""
            raise RunError(
                f"round {server_round}: {type(self.strategy).__name__} raised "
                f"{type(error).__name__} while it {what}: {error}{hint}"
            ) from error

    @contextlib.contextmanager
    def _seeded(self, server_round: int, purpose: str) -> Iterator[None]:
        """Seed the global generators that Flower's strategies draw from, and put them back."""
        if isinstance(self.strategy, FederatedStrategy) or self.seed is None:
            yield
            return
        with seeded(derived_seed(self.seed, purpose, server_round)):
            yield


def _number(messages: Iterable[Message], server_round: int) -> None:
    """Tell clients the round where a strategy does not, as all of Flower's do."""
    for message in messages:
        records = message.content.config_records
        if not records:
            message.content[CONFIG] = ConfigRecord({SERVER_ROUND: server_round})
        elif SERVER_ROUND not in (settings := next(iter(records.values()))):
            settings[SERVER_ROUND] = server_round


def _named_metrics(trained: MetricRecord | None, replies: Iterable[Message]) -> dict[str, Any]:
    """Strategy metrics under `train/` when clients measured them, else under `server/`."""
    named: dict[str, Any] = {}
    measured = set(replies.metrics) | {NUM_EXAMPLES} if isinstance(replies, Replies) else set()
    for name, value in (trained or {}).items():
        if isinstance(value, int | float):
            phase = "train" if name in measured or not measured else "server"
            named[f"{phase}/{name.replace('-', '_')}"] = value
    return named


def _participation_metrics(selected: Sequence[int], failures: Sequence[Failure]) -> dict[str, int]:
    causes = Counter(failure.cause for failure in failures)
    absent = causes.pop("absent", 0)
    counted = {f"clients/{failed_by(cause)}": count for cause, count in sorted(causes.items())}
    return {
        "clients/selected": len(selected),
        "clients/replied": len(set(selected) - missing(failures)),
        "clients/absent": absent,
        "clients/failed": sum(causes.values()),
        **counted,
    }


def _more_than_borne(metrics: Mapping[str, Any], server_round: int) -> dict[str, int]:
    """How many more clients attacked than the rule of the round bears, where both are known."""
    attackers, borne = metrics.get("clients/byzantine"), metrics.get("server/num_byzantine")
    if attackers is None or borne is None:
        return {}
    more = max(0, int(attackers) - int(borne))
    if more:
        _log.info(
            "round %d: %d clients attacked, and the rule bears %d", server_round, attackers, borne
        )
    return {"clients/byzantine_beyond_f": more}


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Let the garbage collector look at what comes only.

    Some of Flower's strategies make it run once per reply, 0.35 s each where torch is imported.
    """
    if gc.get_freeze_count():  # the caller's own doing
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _any(replies: Iterable[Message]) -> bool:
    return bool(len(replies) if isinstance(replies, Sequence) else list(replies))


def _who(selected: Sequence[int]) -> str:
    return "answered" if selected else "takes part"


def _idle(replies: Iterable[Message]) -> list[int]:
    """The clients that trained nothing, as far as stacked replies tell."""
    if not isinstance(replies, Replies) or replies.params is None or not replies.num_clients:
        return []
    still = (replies.update == 0).all(dim=1).numpy()
    return [int(client) for client in replies.client_ids[still]]


def _clients_of(messages: Sequence[Message]) -> tuple[int, ...]:
    ids = getattr(messages, "client_ids", None)
    if ids is not None:
        return tuple(ids.tolist())
    return tuple(sorted(internals.client_of(m.metadata.dst_node_id) for m in messages))


@contextlib.contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        times[phase] = times.get(phase, 0.0) + time.perf_counter() - begun
