"""A strategy's Flower methods, called so that an error names the round."""

import contextlib
import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import FedsimError, RunError
from fedsim.basics.generators import seeded
from fedsim.basics.rng import derived_seed
from fedsim.client.job import SettingsError
from fedsim.federation.grids.waiting import RoundNodesGrid, unchosen_minima_met
from fedsim.messages.adapting import stacked
from fedsim.messages.cohort import MessagesError
from fedsim.messages.records import CONFIG, SERVER_ROUND, ArraysMismatchError, first_not_finite
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.foreign import nested

_log = logging.getLogger("fedsim")
_KEPT = (
    "; give every array its name, as in "
    "ArrayRecord({name: Array(values) for name, values in zip(arrays, new, strict=True)})"
)


class StrategyCalls:
    """Calls a strategy, ours or foreign.

    A foreign one is offered nodes that it cannot wait for, draws from seeded generators, and need
    not tell clients the round.

    Args:
        strategy: Any Flower strategy.
        seed: Seeds the global generators around a foreign strategy; None leaves them as they are.
    """

    def __init__(self, strategy: Strategy, seed: int | None) -> None:
        self._strategy, self._seed = strategy, seed
        self._name = type(strategy).__name__

    @property
    def _is_ours(self) -> bool:
        return isinstance(self._strategy, FederatedStrategy)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return what clients are sent to train on.

        Raises:
            RunError: Naming the round, if a foreign strategy fails.
        """
        with self._seeded(server_round, "configure"):
            if not self._is_ours and not list(grid.get_node_ids()):
                return []  # Flower's own strategies wait for ever for a first node
            with (
                self._named(server_round, "configured"),
                self._offered(server_round, grid) as offered,
            ):
                messages = self._strategy.configure_train(
                    server_round, arrays, ConfigRecord({}), offered
                )
            messages = messages if isinstance(messages, Sequence) else list(messages)
            if not self._is_ours:
                _number(messages, server_round)
            return messages

    def aggregate_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        replies: Iterable[Message],
        selected: Sequence[int],
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """Return (the model after a round, what the strategy measured).

        Args:
            server_round: The round.
            arrays: The model before it.
            replies: What came back.
            selected: The clients that were asked.

        Raises:
            RunError: Naming the round, if a foreign strategy fails, or what it makes of the replies
                is not the model, or not finite.
        """
        if not self._is_ours and not _any(replies):
            _log.info("round %d: nobody %s; skipped", server_round, _who(selected))
            return arrays, None
        quick = contextlib.nullcontext() if self._is_ours else _quick_collections()
        with (
            self._seeded(server_round, "aggregate"),
            self._named(server_round, "aggregated", replies),
            quick,
        ):
            after, metrics = self._strategy.aggregate_train(server_round, replies)
        if after is None:
            _log.warning("round %d: %s kept the model as it was", server_round, self._name)
            return arrays, metrics
        self._require_model(server_round, arrays, after)
        if (name := first_not_finite(after)) is not None:
            raise RunError(
                f"round {server_round}: the aggregated '{name}' is not finite; the clients' "
                "replies were, so the strategy diverged: lower [strategy] server_lr or [client] "
                "local_lr"
            )
        return after, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return what clients are sent to evaluate on."""
        with (
            self._seeded(server_round, "configure evaluation"),
            self._offered(server_round, grid) as offered,
        ):
            messages = self._strategy.configure_evaluate(
                server_round, arrays, ConfigRecord({}), offered
            )
        return messages if isinstance(messages, Sequence) else list(messages)

    @contextlib.contextmanager
    def sends(self, server_round: int) -> Iterator[None]:
        """Say in which round a strategy sends what cannot be answered.

        Raises:
            RunError: Naming round, strategy, cause and remedy.
        """
        who = f"round {server_round}: {self._name} sends"
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
        who = f"round {server_round}: {self._name} gives back"
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
        if self._is_ours:
            yield grid
            return
        present = len(list(grid.get_node_ids()))
        with unchosen_minima_met(nested(self._strategy), present):
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
            if isinstance(error, FedsimError) or self._is_ours:
                raise
            idle = _idle(replies)
            hint = f"; clients {idle} sent back the model they received" if idle else ""
            raise RunError(
                f"round {server_round}: {self._name} raised {type(error).__name__} while it "
                f"{what}: {error}{hint}"
            ) from error

    @contextlib.contextmanager
    def _seeded(self, server_round: int, purpose: str) -> Iterator[None]:
        """Seed the global generators that Flower's strategies draw from, and put them back."""
        if self._is_ours or self._seed is None:
            yield
            return
        with seeded(derived_seed(self._seed, purpose, server_round)):
            yield


def _number(messages: Iterable[Message], server_round: int) -> None:
    """Tell clients the round where a strategy does not, as all of Flower's do."""
    for message in messages:
        records = message.content.config_records
        if not records:
            message.content[CONFIG] = ConfigRecord({SERVER_ROUND: server_round})
        elif SERVER_ROUND not in (settings := next(iter(records.values()))):
            settings[SERVER_ROUND] = server_round


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
    stack = stacked(replies)
    if stack is None or stack.params is None or not stack.num_clients:
        return []
    still = (stack.update == 0).all(dim=1).numpy()
    return [int(client) for client in stack.client_ids[still]]
