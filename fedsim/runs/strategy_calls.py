"""A strategy's Flower methods, called so that an error names the round."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import RunError
from fedsim.client.job import SettingsError
from fedsim.messages.cohort import MessagesError
from fedsim.messages.records import ArraysMismatchError, first_not_finite

_log = logging.getLogger("fedsim")
_KEPT = (
    "; give every array its name, as in "
    "ArrayRecord({name: Array(values) for name, values in zip(arrays, new, strict=True)})"
)


class StrategyCalls:
    """Calls a strategy of ours; those of others take more care, see `foreign_calls`.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._name = type(strategy).__name__

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return what clients are sent to train on."""
        return listed(self._strategy.configure_train(server_round, arrays, ConfigRecord({}), grid))

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
            RunError: Naming the round, if what the strategy makes of the replies is not the model,
                or not finite.
        """
        after, metrics = self._strategy.aggregate_train(server_round, replies)
        return self.model_after(server_round, arrays, after), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return what clients are sent to evaluate on."""
        return listed(
            self._strategy.configure_evaluate(server_round, arrays, ConfigRecord({}), grid)
        )

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

    def model_after(
        self, server_round: int, before: ArrayRecord, after: ArrayRecord | None
    ) -> ArrayRecord:
        """Return the model after a round: what the strategy gives back, or the one before it.

        Args:
            server_round: The round.
            before: The model before it.
            after: What the strategy gives back; None keeps the model.

        Raises:
            RunError: If that is not the model, or not finite.
        """
        if after is None:
            _log.warning("round %d: %s kept the model as it was", server_round, self._name)
            return before
        self._require_model(server_round, before, after)
        if (name := first_not_finite(after)) is not None:
            raise RunError(
                f"round {server_round}: the aggregated '{name}' is not finite; the clients' "
                "replies were, so the strategy diverged: lower [strategy] server_lr or [client] "
                "local_lr"
            )
        return after

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


def listed(messages: Iterable[Message]) -> Sequence[Message]:
    """Return what a strategy sends as a sequence; a cohort is one."""
    return messages if isinstance(messages, Sequence) else list(messages)
