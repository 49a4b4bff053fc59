"""The calls of a strategy that is not ours: it cannot wait, draws what is seeded, and is named."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import FedsimError, RunError
from fedsim.basics.generators import seeded
from fedsim.basics.loading import is_spared
from fedsim.basics.rng import derived_seed
from fedsim.federation.grids.waiting import RoundNodesGrid, unchosen_minima_met
from fedsim.messages.adapting import stacked
from fedsim.messages.records import CONFIG, SERVER_ROUND
from fedsim.runs.strategy_calls import StrategyCalls, listed
from fedsim.strategy.adapter import is_ours
from fedsim.strategy.foreign import nested

_log = logging.getLogger("fedsim")


class ForeignCalls:
    """Calls a foreign strategy.

    It is offered nodes that it cannot wait for, draws from seeded generators, and need not tell
    clients the round.

    Args:
        strategy: Any Flower strategy.
        seed: Seeds the global generators around it; None leaves them as they are.
    """

    def __init__(self, strategy: Strategy, seed: int | None) -> None:
        self._strategy, self._seed = strategy, seed
        self._name = type(strategy).__name__
        self._calls = StrategyCalls(strategy)
        if not _is_flowers(own := type(strategy).start):
            _log.warning(
                "[strategy] %s: %s is never called: the rounds are fedsim's, and settings of "
                "clients belong into [client] or into what configure_train sends",
                self._name, own.__qualname__,
            )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return what clients are sent to train on.

        Raises:
            RunError: Naming the round, if the strategy fails.
        """
        with self._seeded(server_round, "configure"):
            if not list(grid.get_node_ids()):
                return []  # Flower's own strategies wait for ever for a first node
            with (
                self._named(server_round, "configured"),
                self._offered(server_round, grid) as offered,
            ):
                sent = self._strategy.configure_train(
                    server_round, arrays, ConfigRecord({}), offered
                )
            messages = self._readable(server_round, sent)
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
            RunError: Naming the round, if the strategy fails, or what it makes of the replies is
                not the model, or not finite.
        """
        if not _any(replies):
            _log.info("round %d: nobody %s; skipped", server_round, _who(selected))
            return arrays, None
        with (
            self._seeded(server_round, "aggregate"),
            self._named(server_round, "aggregated", replies),
            _quick_collections(),
        ):
            after, metrics = self._strategy.aggregate_train(server_round, replies)
        return self._calls.model_after(server_round, arrays, after), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return what clients are sent to evaluate on."""
        with (
            self._seeded(server_round, "configure evaluation"),
            self._offered(server_round, grid) as offered,
        ):
            sent = self._strategy.configure_evaluate(
                server_round, arrays, ConfigRecord({}), offered
            )
        return self._readable(server_round, sent)

    def sends(self, server_round: int) -> contextlib.AbstractContextManager[None]:
        """Say in which round the strategy sends what cannot be answered."""
        return self._calls.sends(server_round)

    def _readable(self, server_round: int, sent: Any) -> Sequence[Message]:
        """What the strategy sends, each message with all of its settings where clients look.

        Raises:
            RunError: If it sends nothing that could be messages, or settings that nobody reads.
        """
        if not isinstance(sent, Iterable):
            raise RunError(
                f"round {server_round}: {self._name} returned {type(sent).__name__} where it "
                "configured the round, expected messages: is a `return` missing?"
            )
        messages = listed(sent)
        for message in messages:
            content = message.content
            settings = list(content.config_records)
            read, others = (settings or [CONFIG])[0], [*settings[1:], *content.metric_records]
            unread = next((name for name in others if content[name]), None)
            if unread is not None:
                raise RunError(
                    f"round {server_round}: {self._name} sends a record '{unread}' that no client "
                    f"reads: settings are read from the first ConfigRecord alone ('{read}'); put "
                    "them there"
                )
        return messages

    @contextlib.contextmanager
    def _offered(self, server_round: int, grid: Grid) -> Iterator[Grid]:
        """What the strategy is given to configure with; it cannot wait on it."""
        present = len(list(grid.get_node_ids()))
        with unchosen_minima_met(nested(self._strategy), present):
            yield RoundNodesGrid(grid, server_round)

    @contextlib.contextmanager
    def _named(
        self, server_round: int, what: str, replies: Iterable[Message] = ()
    ) -> Iterator[None]:
        """Say in which round the strategy fails, and whose replies may be why.

        Raises:
            RunError: For any error but fedsim's own.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, FedsimError):
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
        if self._seed is None:
            yield
            return
        with seeded(derived_seed(self._seed, purpose, server_round)):
            yield


def calls_of(strategy: Strategy, seed: int | None) -> StrategyCalls | ForeignCalls:
    """Return what calls a strategy.

    Args:
        strategy: Any Flower strategy.
        seed: Seeds the global generators around a foreign strategy; None leaves them as they are.
    """
    return StrategyCalls(strategy) if is_ours(strategy) else ForeignCalls(strategy, seed)


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
    if is_spared():  # the process's own doing
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _is_flowers(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "flwr"


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
