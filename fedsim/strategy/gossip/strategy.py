"""Averaging without a server: every node keeps a model and mixes it with its neighbours'.

`GossipStrategy` holds all nodes' models and moves the messages; a strategy says what a node makes
of them, by the kernels of `fedsim.aggregators.averaging`.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators import Recipe
from fedsim.aggregators.sums import weighted_sum
from fedsim.basics import rng
from fedsim.basics.errors import RunError, require_choice, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.federation.topology.kinds import ring
from fedsim.federation.topology.mixing import Mixing
from fedsim.federation.topology.topology import Topology
from fedsim.messages.layout import Payload, TensorSpec
from fedsim.messages.replies import Replies
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import State
from fedsim.strategy.gossip.delivery import Delivery
from fedsim.strategy.gossip.diagnostics import GAP_NODES, beyond, gap_of, spread
from fedsim.strategy.gossip.state import GossipState, Mail, Protocol, Start, variances_of

if TYPE_CHECKING:
    pass


class GossipStrategy(FederatedStrategy, abc.ABC):
    """Moves the models between nodes; a concrete strategy says how a node averages them.

    The model of a round, which Flower passes on and the server evaluates, is the mean of all nodes'
    models. Nobody trains it, and what a wrapper does to it is without effect.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("interval", "buffer_ratio"), at("protocol", "synchronous")),
    )

    def __init__(
        self,
        *,
        topology: Topology | None = None,
        self_weight: float = 0.5,
        mixing: Mixing = "uniform",
        protocol: Protocol = "synchronous",
        interval: tuple[int, int] = (8, 12),
        send_every: int = 1,
        buffer_ratio: float = 1.0,
        message_loss: float = 0.0,
        start: Start = "own",
        recipe: Recipe | None = None,
    ) -> None:
        require_choice("mixing", mixing, Mixing)
        require_choice("protocol", protocol, Protocol)
        require_choice("start", start, Start)
        for name, share in (("self_weight", self_weight), ("message_loss", message_loss)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} = {share!r}: must be in [0, 1]")
        if len(interval) != 2 or not 1 <= interval[0] <= interval[1]:
            raise ValueError(f"interval = {list(interval)}: must be [a, b] with 1 <= a <= b")
        if send_every < 1:
            raise ValueError(f"send_every = {send_every!r}: must be >= 1")
        require_positive("buffer_ratio", buffer_ratio)
        self._topology = ring() if topology is None else topology
        self._self_weight = self_weight
        self._mixing: Mixing = mixing
        self._buffered = protocol == "buffered"
        self._interval = interval
        self._send_every = send_every
        self._buffer_ratio = buffer_ratio
        self._message_loss = message_loss
        self._start: Start = start
        self._recipe = recipe
        if recipe is not None and recipe != Recipe("mean"):
            for key, value, needed in (
                ("protocol", protocol, "synchronous"), ("mixing", mixing, "uniform")
            ):  # fmt: skip
                if value != needed:
                    raise ValueError(
                        f"{key} = {value!r} with rule = {recipe.rule!r}: a robust rule needs all "
                        f"models by themselves, alike; use {key} = {needed!r}"
                    )
        else:
            self._recipe = None

    @abc.abstractmethod
    def merge(self, own: Tensor, variances: Tensor, mail: Mail) -> Tensor:
        """Return a node's next model, float64 `[dim]`.

        Args:
            own: Its model, float64 `[dim]`.
            variances: float64 `[corrected]`, of its own tensors.
            mail: What it received.
        """

    def corrected(self) -> Sequence[TensorSpec]:
        """Return the tensors whose variances a node wants to know; by default none."""
        return ()

    def check(self, clients: int, cohort: int) -> None:
        """Refuse an f that a node's model and its neighbours' do not bear."""
        if self._recipe is None:
            return
        neighbours = self._topology.neighbours(clients, server_round=1, seed=self.seed)
        fewest = min(range(clients), key=lambda node: len(neighbours[node]))
        try:
            self._recipe.check(len(neighbours[fewest]) + 1)
        except ValueError as error:
            raise ValueError(
                f"{error}; node {fewest} has {len(neighbours[fewest])} neighbours and itself"
            ) from None

    def init(self, params: Tensor, clients: int) -> State:
        """Every node starts from its own initialisation, or all from the common model."""
        self._topology.graph(clients, server_round=1, seed=self.seed)  # refused before round 1
        models = torch.stack([self._first_model(params, node) for node in range(clients)])
        variances = [variances_of(model, [*self._matrix_parts().values()]) for model in models]
        rows = clients if self._buffered else 0
        return GossipState(
            tick=0,
            models=models,
            buffers={
                name: tensor.expand(clients, *tensor.shape).clone()
                for name, tensor in self.initial_buffers.items()
            },
            start_variances=torch.stack(variances),
            trainings=torch.zeros(clients, dtype=torch.int64),
            next_tick=torch.ones(clients, dtype=torch.int64),
            inbox=torch.zeros((rows, len(params) + len(self.corrected()) + 1), dtype=torch.float64),
            waiting=torch.zeros(rows, dtype=torch.int64),
        )

    def broadcast(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Every node goes on from its own model."""
        rows = torch.tensor(cohort, dtype=torch.int64)
        buffers = {name: stack[rows] for name, stack in state.buffers.items()}
        return Payload(), Payload(state.models[rows], buffers)

    def evaluated(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Every node evaluates its own model."""
        return self.broadcast(state, params, cohort)

    def select(self, state: State, cohort: np.ndarray) -> np.ndarray:
        """Those who are due to train; everybody in the synchronous protocol.

        Raises:
            RunError: If a node was not there in round 1.
        """
        late = cohort[cohort >= len(state.models)]
        if len(late):
            raise RunError(
                f"round {state.tick + 1}: client {late[0]} joined after round 1, and the graph has "
                f"{len(state.models)} nodes; start when all nodes are there"
            )
        due: np.ndarray = cohort[self._is_due(state)[cohort]]
        return due

    def personal_models(self, state: State) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Every node's model."""
        return state.models, state.buffers

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Let the nodes that are online send, receive and average.

        All of them average the others' models from before anybody has.
        """
        online = self._online_nodes(state, replies)
        state = self._trained(state, replies)
        nodes = len(state.models)
        clock = {"server_round": state.tick, "seed": self.seed}
        neighbours = self._topology.neighbours(nodes, **clock)
        mail = self._delivery
        arrived, lost = mail.delivered(state, neighbours, replies.client_ids, online)
        state, averaged = mail.averaged(
            state, neighbours, arrived, self._parts(self.corrected()), self.merge
        )
        first = state.models[0]
        honest = torch.ones(nodes)
        honest[sorted(self.dishonest)] = 0
        mean = first.double() + weighted_sum(honest, state.models, first) / float(honest.sum())
        sent = lost + sum(map(len, arrived.values()))
        metrics = {
            **spread(state, mean, self._matrix_parts(), self.dishonest),
            "messages": float(sent),
            "messages_lost": float(lost),
            "message_bytes": float(sent * state.models[0].nbytes),
        }
        if nodes <= GAP_NODES:
            graph = self._topology.graph(nodes, **clock)
            metrics["spectral_gap"] = gap_of(graph, self._mixing, self._self_weight)
        if self._buffered or self._recipe is not None:
            metrics["averaged"] = float(averaged)
        if self._recipe is not None:
            attacking = self.attacking(state.tick)
            metrics["nodes_beyond_f"] = float(
                beyond(self._recipe, arrived, attacking, self.dishonest)
            )
        return mean.to(params.dtype), state, metrics

    def _first_model(self, params: Tensor, node: int) -> Tensor:
        """A node's model before round 1.

        Its own initialisation, where none is declared, is the common model with the entries of
        every tensor permuted: of the same mean and variance, and not correlated.
        """
        if self._start == "shared":
            return params
        if (own := self.start_of(node)) is not None:
            return own.to(params)
        generator = rng.generator(self.seed, "own start", node)
        permuted = torch.empty_like(params)
        for part in self.layout.slices.values():
            order = generator.permutation(part.stop - part.start)
            permuted[part] = params[part][torch.from_numpy(order)]
        return permuted

    def _is_due(self, state: GossipState) -> np.ndarray:
        if not self._buffered:
            return np.ones(len(state.models), dtype=bool)
        due: np.ndarray = (state.next_tick <= state.tick + 1).numpy()
        return due

    def _online_nodes(self, state: GossipState, replies: Replies) -> list[int]:
        """Who replied, and who takes part without being due."""
        everyone = np.arange(len(state.models))
        online = everyone if self.participants is None else self.participants
        idle = online[~self._is_due(state)[online]]
        return sorted({*idle.tolist(), *replies.client_ids.tolist()})

    def _trained(self, state: GossipState, replies: Replies) -> GossipState:
        """The State after training, one tick later."""
        tick, trained = state.tick + 1, torch.tensor(replies.client_ids, dtype=torch.int64)
        models, trainings = state.models.clone(), state.trainings.clone()
        next_tick = state.next_tick.clone()
        buffers = {name: stack.clone() for name, stack in state.buffers.items()}
        assert replies.params is not None
        models[trained] = replies.params
        for name, stack in replies.buffers.items():
            buffers[name][trained] = stack
        trainings[trained] += 1
        for node in trained.tolist() if self._buffered else ():
            draw = rng.generator(self.seed, "training interval", tick, node)
            next_tick[node] = tick + int(draw.integers(self._interval[0], self._interval[1] + 1))
        return state._replace(
            tick=tick, models=models, buffers=buffers, trainings=trainings, next_tick=next_tick
        )

    @property
    def _delivery(self) -> Delivery:
        return Delivery(
            seed=self.seed,
            mixing=self._mixing,
            self_weight=self._self_weight,
            message_loss=self._message_loss,
            send_every=self._send_every,
            buffered=self._buffered,
            buffer_ratio=self._buffer_ratio,
            recipe=self._recipe,
        )

    def _matrix_parts(self) -> dict[str, slice]:
        slices = self.layout.slices
        return {s.name: slices[s.name] for s in self.layout.trainable if len(s.shape) >= 2}

    def _parts(self, specs: Sequence[TensorSpec]) -> list[slice]:
        return [self.layout.slices[spec.name] for spec in specs]
