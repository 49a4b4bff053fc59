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
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.basics.errors import RunError
from fedsim.messages.cohort import SETUP, Cohort
from fedsim.messages.flower_internals import FIRST_NODE_ID
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.records import (
    NUM_EXAMPLES,
    kept_model_record,
    model_record,
    model_tensors,
    named_tensors,
)
from fedsim.messages.replies import Replies

_log = logging.getLogger("fedsim")
State = Any  # a NamedTuple of tensors, integers and floats
_COLUMNS = 2**16  # of a block of the weighted sum


class NoState(NamedTuple):
    """The State of a strategy that remembers nothing."""


class Degenerate(NamedTuple):
    """A setting in which a strategy becomes another one (law 5).

    Attributes:
        settings: The hyperparameters of the setting.
        becomes: The other strategy's scenario name.
        with_settings: The other strategy's hyperparameters.
        given: What must hold besides; "first round" holds for one round only.
        tolerance: The largest difference in float64; 0 asks for the same bits.
    """

    settings: Mapping[str, Any]
    becomes: str
    with_settings: Mapping[str, Any]
    given: Literal[
        "everyone takes part", "identical clients", "identical models", "first round"
    ] = "everyone takes part"
    tolerance: float = 0.0


@dataclass(frozen=True)
class Setup:
    """A set-up exchange before round 1.

    Attributes:
        clients: int64, who takes part.
        shared: What they receive besides the model.
    """

    clients: np.ndarray
    shared: Payload


@dataclass
class _CallSession:
    """What the base class keeps between Flower's calls; cleared when round 1 is configured."""

    layout: Layout
    num_clients: int
    state: State
    nodes: dict[int, int]
    participants: np.ndarray | None = None
    params: Tensor | None = None
    buffers: Mapping[str, Tensor] | None = None
    sent: Cohort | None = None
    setup: Replies | None = None


def weighted_sum(weights: Tensor, rows: Tensor, reference: Tensor | None = None) -> Tensor:
    """Return sum_k weights[k] * (rows[k] - reference[k]) in float64, added in client order.

    The only weighted sum of the code base: float64 accumulation in a fixed order, one rounding
    later by the caller. It goes over the columns in blocks that stay in the processor's cache,
    which changes no bit.

    Args:
        weights: float64 `[K]`; a row whose weight is zero is not looked at.
        rows: `[K, dim]`.
        reference: `[dim]`, or `[K, dim]` when each client started from its own; None for zero.

    Returns:
        float64 `[dim]`.
    """
    dim = rows.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=rows.device)
    counted = [(place, weight) for place, weight in enumerate(weights.tolist()) if weight]
    size = dim if rows.is_cuda else min(dim, _COLUMNS)  # a GPU has no use for small kernels
    many = max(1, _COLUMNS // max(1, size))  # rows whose difference is taken at once
    memory = torch.empty(many * size, dtype=torch.float64, device=rows.device)
    for first in range(0, dim, max(1, size)):
        span = slice(first, min(first + size, dim))
        part = total[span]
        shared = None if reference is None or reference.dim() > 1 else reference[span].double()
        for top in range(0, len(counted), many):
            places = [place for place, _ in counted[top : top + many]]
            block = _consecutive(rows, places)[:, span]
            apart = memory[: block.numel()].view(block.shape).copy_(block)
            if reference is not None:
                start = _consecutive(reference, places)[:, span] if shared is None else shared
                apart.sub_(start)
            for row, (_, weight) in zip(apart.unbind(0), counted[top:], strict=False):
                part.add_(row, alpha=weight)
    return total


def _consecutive(rows: Tensor, places: Sequence[int]) -> Tensor:
    """Return some rows, as a view where they follow one another."""
    if places[-1] - places[0] == len(places) - 1:
        return rows[places[0] : places[-1] + 1]
    return rows[list(places)]


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
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = ()
    sends: ClassVar[tuple[str, ...]] = ()

    _session: _CallSession | None = None
    _declared_buffers: tuple[str, ...] | None = None
    _restored: Mapping[str, Any] | None = None
    _layout: Layout | None = None
    _initial_buffers: Mapping[str, Tensor] = MappingProxyType({})
    _seed: int = 0
    _starts: Callable[[int], Tensor] | None = None
    _byzantine: Callable[[int | None], Collection[int]] | None = None
    _setup_timeout_s: float | None = None

    # --- what a strategy implements -------------------------------------------------------

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

    # --- what a strategy may use ----------------------------------------------------------

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

    # --- what the round loop uses besides Flower's methods --------------------------------

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

    # --- Flower's methods -----------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's Cohort: every node that the grid offers."""
        session = self._open(server_round, arrays, config, grid)
        params, buffers = model_tensors(session.layout, arrays)
        session.params, session.buffers = params, buffers
        clients, nodes = self._participants(grid, session)
        session.participants = clients
        chosen = np.isin(clients, self.select(session.state, clients))
        clients, nodes = clients[chosen], nodes[chosen]
        shared, personal = self.broadcast(session.state, params, clients)
        session.sent = self._cohort(
            server_round, config, clients, nodes, _with_buffers(shared, personal, buffers), personal
        )
        return session.sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return (new model, metrics averaged over clients by examples, and the strategy's own)."""
        session = self._require(server_round)
        assert session.sent is not None
        assert session.params is not None
        assert session.buffers is not None
        stack = (
            replies
            if isinstance(replies, Replies)
            else Replies.from_messages(replies, session.sent)
        )
        stack = _admitted(stack)
        buffer_weights = self.buffer_weights(session.state, stack)
        params, session.state, metrics = self.server_update(session.state, session.params, stack)
        buffers = average_buffers(session.buffers, stack, buffer_weights)
        if (personal := self.personal_models(session.state)) is not None:
            models, own = personal  # everybody's count, whoever took part
            buffers.update(mean_buffers(own, torch.ones(len(models), dtype=torch.float64)))
        averaged = mean_metrics(stack)
        record = kept_model_record(session.layout, params.to(session.layout.dtype), buffers)
        return record, MetricRecord({**averaged, **metrics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluation's Cohort: every node that the grid offers."""
        session = self._open(server_round, arrays, config, grid, evaluating=True)
        params, buffers = model_tensors(session.layout, arrays)
        clients, nodes = self._participants(grid, session)
        shared, personal = self.evaluated(session.state, params, clients)
        session.sent = self._cohort(
            server_round,
            config,
            clients,
            nodes,
            _with_buffers(shared, personal, buffers),
            personal,
            message_type=MessageType.EVALUATE,
        )
        return session.sent

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' metrics averaged by examples; None when nobody answered."""
        session = self._require(server_round)
        assert session.sent is not None
        stack = (
            replies
            if isinstance(replies, Replies)
            else Replies.from_messages(replies, session.sent)
        )
        stack = _admitted(stack)
        return MetricRecord(mean_metrics(stack)) if stack.num_clients else None  # type: ignore[arg-type]

    def summary(self) -> None:
        """Log the strategy's name and hyperparameters."""
        values = {k.lstrip("_"): v for k, v in vars(self).items() if k not in SESSION_FIELDS}
        _log.info("strategy %s %s", type(self).__name__, values)

    # --- packing --------------------------------------------------------------------------

    def _open(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid,
        *, evaluating: bool = False,
    ) -> _CallSession:  # fmt: skip
        if self._session is None or (server_round == 1 and not evaluating):
            layout = Layout.from_named(named_tensors(arrays), self._declared_buffers)
            params, buffers = model_tensors(layout, arrays)
            self._layout, self._initial_buffers = layout, buffers
            clients = federation_size(grid)
            state = self.init(params, clients)
            self._session = session = _CallSession(layout, clients, state, {})
            if self._restored is not None:
                session.state = restore_fields(state, self._restored)
                self._restored = None
            else:
                self._hold_setup(session, params, buffers, config, grid)
        return self._session

    def _hold_setup(
        self, session: _CallSession, params: Tensor, buffers: Mapping[str, Tensor],
        config: ConfigRecord, grid: Grid,
    ) -> None:  # fmt: skip
        setup = self.setup(session.state, params, session.num_clients)
        if setup is None:
            return
        shared = _with_buffers(Payload(params, {}, setup.shared.extra), Payload(), buffers)
        clients, nodes = setup.clients, setup.clients + FIRST_NODE_ID
        if not hasattr(grid, "num_clients"):  # Flower's: only the nodes seen have a number
            clients, nodes = self._participants(grid, session)
            asked = np.isin(clients, setup.clients)
            clients, nodes = clients[asked], nodes[asked]
        cohort = self._cohort(0, config, clients, nodes, shared, Payload(), message_type=SETUP)
        answered = grid.send_and_receive(cohort, timeout=self._setup_timeout_s)
        replies = (
            answered if isinstance(answered, Replies) else Replies.from_messages(answered, cohort)
        )
        admitted = _admitted(replies)
        session.state = self.finish_setup(session.state, params, admitted)
        session.setup = replace(admitted, params=None, reference=None, buffers={}, extra={})

    def _cohort(
        self, server_round: int, config: ConfigRecord, clients: np.ndarray, nodes: np.ndarray,
        shared: Payload, personal: Payload, *, message_type: str = MessageType.TRAIN,
    ) -> Cohort:  # fmt: skip
        assert self._session is not None
        return Cohort(
            client_ids=clients,
            server_round=server_round,
            layout=self._session.layout,
            shared=shared,
            personal=personal,
            config=dict(config),
            message_type=message_type,
            node_ids=None if nodes.dtype == np.int64 else nodes,
        )

    def _participants(self, grid: Grid, session: _CallSession) -> tuple[np.ndarray, np.ndarray]:
        """The round's clients and their nodes, in client order."""
        nodes = sorted(grid.get_node_ids())
        if hasattr(grid, "num_clients"):
            ours = np.array(nodes, dtype=np.int64)
            return ours - FIRST_NODE_ID, ours
        # a grid of Flower's: node ids are random 64-bit numbers and say nothing, so clients are
        # numbered as they are first seen
        for node in nodes:
            session.nodes.setdefault(node, len(session.nodes))
        nodes.sort(key=session.nodes.__getitem__)
        clients = np.array([session.nodes[node] for node in nodes], dtype=np.int64)
        return clients, np.array(nodes, dtype=np.uint64)

    def _require(self, server_round: int) -> _CallSession:
        if self._session is None or self._session.sent is None:
            raise RuntimeError(
                f"round {server_round}: aggregate was called before configure; call "
                "configure_train first"
            )
        return self._session


SESSION_FIELDS = (
    "_session", "_declared_buffers", "_restored", "_layout", "_initial_buffers", "_seed", "_starts",
    "_byzantine",
    "_setup_timeout_s",
)  # fmt: skip


class LinearStrategy(FederatedStrategy, abc.ABC):
    """A strategy that needs of the replies one weighted sum of updates and the weights' total."""

    @abc.abstractmethod
    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """Return float64 `[K]`, the weight of each reply; they need not add up to anything."""

    @abc.abstractmethod
    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return (new model, new State, metrics).

        Args:
            state: The State.
            params: The model that was broadcast, `[dim]`.
            weighted_sum: float64 `[dim]`, the sum of weight times update; zero when nobody
                answered.
            weight_sum: The sum of the weights.
        """

    def observe(self, state: State, replies: Replies) -> State:
        """Return the State after learning who answered; called after `apply`."""
        return state

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """Weigh buffers as updates, so that a reply counts in both or in neither."""
        return self.weights(state, replies.client_ids, replies.num_examples)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Take the weighted sum of the updates and apply it."""
        weights = self.weights(state, replies.client_ids, replies.num_examples)
        assert replies.params is not None
        assert replies.reference is not None
        total = weighted_sum(weights, replies.params, replies.reference)
        params, state, metrics = self.apply(state, params, total, float(weights.sum()))
        return params, self.observe(state, replies), metrics


def _admitted(replies: Replies) -> Replies:
    """Admit replies, and say who was refused when nobody before has.

    Raises:
        RunError: If replies came and every one of them was refused.
    """
    if replies.admitted:  # whoever admitted them has the failures, as the round loop does
        return replies
    admitted = replies.admit()
    refused = [f for f in admitted.failures if f.cause != "absent"]
    for failure in refused:
        _log.warning("%s", failure)
    if refused and not admitted.num_clients:
        raise RunError(f"every reply was refused; the first: {refused[0]}")
    return admitted


def federation_size(grid: Grid) -> int:
    """Return N, the clients registered with a grid (a round's participants may be fewer)."""
    known = getattr(grid, "num_clients", None)
    return int(known) if known is not None else len(list(grid.get_node_ids()))


def state_fields(strategy: FederatedStrategy) -> dict[str, Any]:
    """Return a strategy's State by field, one that it was given back and not yet used too."""
    if strategy._session is None:
        return dict(strategy._restored or {})
    return dict(strategy._session.state._asdict())


def restore_fields(state: State, fields: Mapping[str, Any]) -> State:
    """Return `state` with the saved values of all its fields.

    Raises:
        ValueError: If the saved fields are not the State's.
    """
    if set(fields) != set(state._fields):
        raise ValueError(f"the saved state has {sorted(fields)}, expected {sorted(state._fields)}")
    return state._replace(**fields)


def average_buffers(
    before: Mapping[str, Tensor], replies: Replies, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the buffers' weighted mean; integer ones take the largest value.

    Every buffer keeps its dtype. Without a reply that has weight, the buffers stay as they were.

    Args:
        before: The buffers of the round's model.
        replies: The admitted replies.
        weights: float64 `[K]`, at least 0; None takes the examples.
    """
    weights = replies.num_examples.double() if weights is None else weights
    return mean_buffers(replies.buffers, weights) or dict(before)


def mean_buffers(stacks: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Return the weighted mean of buffers `[K, ...]` by name; nothing if nobody has weight.

    Integer ones take the largest value. Every buffer keeps its dtype.
    """
    total = float(weights.sum())
    if not total:
        return {}
    after: dict[str, Tensor] = {}
    for name, stack in stacks.items():
        if stack.is_floating_point():
            zero = torch.zeros(stack[0].numel(), dtype=torch.float64)
            mean = weighted_sum(weights, stack.reshape(len(stack), -1), zero) / total
            after[name] = mean.reshape(stack.shape[1:]).to(stack.dtype)
        else:
            after[name] = stack.amax(dim=0)
    return after


def mean_metrics(replies: Replies) -> dict[str, int | float]:
    """Return the clients' metrics averaged by examples, and the examples in all.

    A metric that is nan is not defined on that client's samples: the mean is over the others, and
    nan when there are none.
    """
    weights = replies.num_examples.double()
    total = float(weights.sum())
    means: dict[str, int | float] = {NUM_EXAMPLES: int(replies.num_examples.sum())}
    for name, column in replies.metrics.items():
        undefined = column.isnan()
        if bool(undefined.any()):
            held = float(weights[~undefined].sum())
            summed = float((weights * column)[~undefined].sum())
            means[name] = summed / held if held else math.nan
            continue
        means[name] = float((weights * column).sum()) / total if total else 0.0
    return means


def _with_buffers(shared: Payload, personal: Payload, buffers: Mapping[str, Tensor]) -> Payload:
    more = {
        n: t for n, t in buffers.items() if n not in shared.buffers and n not in personal.buffers
    }
    return Payload(shared.params, {**shared.buffers, **more}, shared.extra)
