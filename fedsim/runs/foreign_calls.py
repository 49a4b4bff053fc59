"""The calls of a strategy that is not ours: it cannot wait, draws what is seeded, and is named."""

import contextlib
import gc
import logging
from collections.abc import Iterable, Iterator, Sequence

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
            messages = listed(sent)
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
        return listed(sent)

    def sends(self, server_round: int) -> contextlib.AbstractContextManager[None]:
        """Say in which round the strategy sends what cannot be answered."""
        return self._calls.sends(server_round)

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
