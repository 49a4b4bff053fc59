"""The base of every fedsim strategy: a Flower server strategy whose mathematics is pure.

A concrete strategy is final, lives in one file under `strategies/` and implements three methods
on stacked tensors:

    init(params, clients) -> State
    broadcast(state, params, cohort) -> (shared, personal)          (has a default)
    server_update(state, params, replies) -> (params, State, metrics)

A *linear rule* implements `weights` and `apply` in place of `server_update`, so that the one
weighted sum of the code base (`weighted_sum`) may be taken whole or in parts near the clients.

Flower passes the model each round; the State, a NamedTuple of tensors and numbers, is everything
else.
"""

import abc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.aggregators.server_optimizers import ServerOptimizer
from fedsim.aggregators.sums import average_buffers, mean_buffers, mean_metrics
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.records import (
    kept_model_record,
    model_record,
    model_tensors,
    named_tensors,
)
from fedsim.messages.replies import Replies
from fedsim.strategy.declarations import Degenerate, Setup, State
from fedsim.strategy.session import CallSession, federation_size

_log = logging.getLogger("fedsim")


class FederatedStrategy(Strategy, abc.ABC):
    """Packs and unpacks Flower's calls around pure methods on stacked tensors.

    Usable wherever Flower takes a strategy: `strategy.start(grid=..., initial_arrays=...)`, inside
    Flower's wrappers, and in fedsim's round loop.

    The model's tensors that are not trained are recognised by torch's names for BatchNorm
    statistics and by integer types; `declare_buffers` names them when that does not suffice.

    Attributes:
        degenerate: Settings in which the strategy becomes another one; a law holds it to them.
        sends: What it sends clients besides the model, by the first part of the tensors' names; a
            client procedure that does not take it is refused.
        parts: The parts of local training that it needs, and for each which of the part's keys must
            equal which of its own hyperparameters; a scenario gets them without asking.
        returns: What it needs of replies besides models, by the first part of the tensors' names.
        linear: Whether its step is linear in the updates, so that errors of compression that cancel
            out over clients or rounds do so in the model; other rules take no compressed replies.
        reads_staleness: Whether it looks at how old replies are.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = ()
    sends: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = MappingProxyType({})
    returns: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    reads_staleness: ClassVar[bool] = False

    _session: CallSession | None = None
    _declared_buffers: tuple[str, ...] | None = None
    _restored: Mapping[str, Any] | None = None
    _layout: Layout | None = None
    _initial_buffers: Mapping[str, Tensor] = MappingProxyType({})
    _seed: int = 0
    _starts: Callable[[int], Tensor] | None = None
    _byzantine: Callable[[int | None], Collection[int]] | None = None
    _setup_timeout_s: float | None = None
    _server_optimizer: ServerOptimizer | None = None  # a linear rule may be given one

    @abc.abstractmethod
    def init(self, params: Tensor, clients: int) -> State:
        """Return the State before round 1.

        Args:
            params: The initial model, `[dim]`.
            clients: N, the clients registered.
        """

    def broadcast(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Return (shared, personal): what the cohort receives; by default the model, shared.

        Args:
            state: The State.
            params: The model, `[dim]`.
            cohort: int64 `[K]`, the clients of this round in ascending order.
        """
        return Payload(params), Payload()

    @abc.abstractmethod
    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return (new model `[dim]`, new State, metrics); called with no replies too.

        Args:
            state: The State; it must not be changed in place.
            params: The model that was broadcast, `[dim]`.
            replies: The admitted replies, rows in client order.
        """

    def setup(self, state: State, params: Tensor, clients: int) -> Setup | None:
        """Return a set-up exchange to hold inside the first `configure_train`, or None."""
        return None

    def finish_setup(self, state: State, params: Tensor, replies: Replies) -> State:
        """Return the State after the set-up exchange."""
        return state

    def evaluated(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Return (shared, personal): what clients evaluate; by default the global model."""
        return Payload(params), Payload()

    def check(self, clients: int, cohort: int) -> None:
        """Refuse a federation that the strategy cannot serve; called before anything runs.

        Args:
            clients: N, the clients registered.
            cohort: Clients expected per round.

        Raises:
            ValueError: Naming the hyperparameter, its value and what is allowed.
        """

    def select(self, state: State, cohort: np.ndarray) -> np.ndarray:
        """Return those of the round's participants that train; by default all of them."""
        return cohort

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """Return float64 `[K]`, the weights of the mean of buffers; by default the examples."""
        return replies.num_examples.double()

    def personal_models(self, state: State) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Return every client's own model, (`[N, dim]`, buffers `[N, ...]`); None without any."""
        return None

    @property
    def layout(self) -> Layout:
        """How the model's tensors lie in the flat vector; known before `init` is called."""
        if self._layout is None:
            raise RuntimeError("the layout is known from the first configure_train on")
        return self._layout

    @property
    def initial_buffers(self) -> Mapping[str, Tensor]:
        """The model's buffers before round 1; known before `init` is called."""
        return self._initial_buffers

    @property
    def seed(self) -> int:
        """The seed of the strategy's own draws."""
        return self._seed

    @property
    def participants(self) -> np.ndarray | None:
        """The round's participants, int64, whether `select` lets them train or not.

        None where Flower's methods are not used: then everybody takes part.
        """
        return None if self._session is None else self._session.participants

    @property
    def dishonest(self) -> frozenset[int]:
        """The clients that attack in some rounds, for measures over the others alone."""
        return frozenset() if self._byzantine is None else frozenset(self._byzantine(None))

    def attacking(self, server_round: int) -> frozenset[int]:
        """The clients that attack in a round, for what is recorded; no rule may look."""
        return frozenset() if self._byzantine is None else frozenset(self._byzantine(server_round))

    def start_of(self, client: int) -> Tensor | None:
        """Return a client's own random initialisation, `[dim]`; None when none was declared."""
        return None if self._starts is None else self._starts(client)

    @property
    def state(self) -> State:
        """The State, or None before round 1 is configured."""
        return None if self._session is None else self._session.state

    def personal_records(self) -> Iterator[ArrayRecord]:
        """Yield every honest client's own model in client order; nothing without such models."""
        session = self._session
        personal = None if session is None else self.personal_models(session.state)
        if session is None or personal is None:
            return
        models, buffers = personal
        skipped = self.dishonest
        for row, params in enumerate(models):
            if row in skipped:
                continue
            mine = {name: stack[row] for name, stack in buffers.items()}
            common = session.buffers or self._initial_buffers
            yield model_record(session.layout, params, {**common, **mine})

    @property
    def setup_replies(self) -> Replies | None:
        """Who answered the set-up exchange, without the tensors; None if there was none."""
        return None if self._session is None else self._session.setup

    def restore(self, fields: Mapping[str, Any]) -> None:
        """Take up a State saved by a checkpoint; it is used at the next `configure_train`.

        Args:
            fields: The State's values by field name.
        """
        self._restored, self._session = dict(fields), None

    def declare_buffers(self, names: Sequence[str]) -> None:
        """Name the tensors that are not trained (BatchNorm statistics, frozen parameters)."""
        self._declared_buffers = tuple(names)

    def declare_layout(self, layout: Layout, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Say how the model's tensors lie, to call the pure methods without Flower's.

        Args:
            layout: The layout.
            buffers: The model's buffers before round 1, if it has any.
        """
        self._layout, self._initial_buffers = layout, dict(buffers or {})

    def declare_seed(self, seed: int) -> None:
        """Set the seed of the strategy's own draws (0 unless set)."""
        self._seed = seed

    def declare_setup_timeout(self, seconds: float | None) -> None:
        """Set the seconds that a set-up exchange may take; None waits for ever."""
        self._setup_timeout_s = seconds

    def declare_starts(self, starts: Callable[[int], Tensor]) -> None:
        """Say what random initialisation, `[dim]`, each client would have made by itself."""
        self._starts = starts

    def declare_byzantine(self, attackers: Callable[[int | None], Collection[int]]) -> None:
        """Say who attacks in a round, or who is not to be measured (None); no server knows."""
        self._byzantine = attackers

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's Cohort: every node that the grid offers."""
        session = self._open(server_round, arrays, config, grid)
        params, buffers = model_tensors(session.layout, arrays)
        session.params, session.buffers = params, buffers
        clients, nodes = session.present(grid)
        session.participants = clients
        if (selected := self.select(session.state, clients)) is not clients:
            chosen = np.isin(clients, selected)
            clients, nodes = clients[chosen], nodes[chosen]
        shared, personal = self.broadcast(session.state, params, clients)
        session.sent = session.cohort(
            server_round, config, clients, nodes, shared, personal, buffers
        )
        return session.sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return (new model, metrics averaged over clients by examples, and the strategy's own)."""
        session = self._require(server_round)
        assert session.params is not None
        assert session.buffers is not None
        stack = session.admitted(replies)
        weights = self.buffer_weights(session.state, stack) if session.buffers else None
        params, metrics = self._updated(session, session.params, stack)
        buffers = average_buffers(session.buffers, stack, weights)
        if (personal := self.personal_models(session.state)) is not None:
            models, own = personal  # everybody's count, present or not
            buffers.update(mean_buffers(own, torch.ones(len(models), dtype=torch.float64)))
        averaged = mean_metrics(stack)
        record = kept_model_record(session.layout, params.to(session.layout.dtype), buffers)
        return record, MetricRecord({**averaged, **metrics})

    def declare_due(self, client_ids: np.ndarray) -> None:
        """Say whose replies, int64 ids, a clock delivers to a strategy inside of a foreign one."""
        if self._session is not None:
            self._session.expect(client_ids)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluation's Cohort: every node that the grid offers."""
        session = self._open(server_round, arrays, config, grid, evaluating=True)
        params, buffers = model_tensors(session.layout, arrays)
        clients, nodes = session.present(grid)
        shared, personal = self.evaluated(session.state, params, clients)
        session.sent = session.cohort(
            server_round, config, clients, nodes, shared, personal, buffers,
            message_type=MessageType.EVALUATE,
        )  # fmt: skip
        return session.sent

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' metrics averaged by examples; None when nobody answered."""
        session = self._require(server_round)
        stack = session.admitted(replies)
        return MetricRecord(mean_metrics(stack)) if stack.num_clients else None  # type: ignore[arg-type]

    def summary(self) -> None:
        """Log the strategy's name and hyperparameters."""
        values = {k.lstrip("_"): v for k, v in vars(self).items() if k not in SESSION_FIELDS}
        if self._server_optimizer is not None:
            values["server"] = self._server_optimizer
        _log.info("strategy %s %s", type(self).__name__, values)

    def _updated(
        self, session: CallSession, params: Tensor, replies: Replies
    ) -> tuple[Tensor, dict[str, float]]:
        """Return (new model, metrics); the session gets the new State."""
        params, session.state, metrics = self.server_update(session.state, params, replies)
        return params, metrics

    def _open(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid,
        *, evaluating: bool = False,
    ) -> CallSession:  # fmt: skip
        if self._session is None or (server_round == 1 and not evaluating):
            layout = Layout.from_named(named_tensors(arrays), self._declared_buffers)
            params, buffers = model_tensors(layout, arrays)
            self._layout, self._initial_buffers = layout, buffers
            clients = federation_size(grid)
            state = self.init(params, clients)
            self._session = session = CallSession(layout, clients, state, {})
            if (optimizer := self._server_optimizer) is not None:
                session.moments = optimizer.init(params)
            if self._restored is not None:
                session.restore(self._restored)
                self._restored = None
            elif (setup := self.setup(state, params, clients)) is not None:
                admitted = session.exchange(
                    setup, params, buffers, config, grid, timeout=self._setup_timeout_s
                )
                session.state = self.finish_setup(state, params, admitted)
        return self._session

    def _require(self, server_round: int) -> CallSession:
        if self._session is None or self._session.sent is None:
            raise RuntimeError(
                f"round {server_round}: aggregate was called before configure; call "
                "configure_train first"
            )
        return self._session


SESSION_FIELDS = (
    "_session", "_declared_buffers", "_restored", "_layout", "_initial_buffers", "_seed", "_starts",
    "_byzantine",
    "_setup_timeout_s", "_server_optimizer",
)  # fmt: skip


def state_fields(strategy: FederatedStrategy) -> dict[str, Any]:
    """Return by name what a strategy remembers: its State, and its server optimiser's moments.

    What it was given back and has not used yet counts too.
    """
    if strategy._session is None:
        return dict(strategy._restored or {})
    return strategy._session.fields()
