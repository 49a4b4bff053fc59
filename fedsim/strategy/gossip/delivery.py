"""Mail among nodes: who receives what, and what it is averaged to."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators import Recipe, Round
from fedsim.aggregators.sums import weighted_sum
from fedsim.aggregators.updates import Updates
from fedsim.basics import rng
from fedsim.federation.topology.mixing import Mixing
from fedsim.federation.topology.topology import Neighbours
from fedsim.strategy.gossip.state import GossipState, Mail, variances_of

Merge = Callable[[Tensor, Tensor, Mail], Tensor]


class Delivery(NamedTuple):
    """The rules of one federation's mail.

    Attributes:
        seed: Of messages that are lost and of buckets.
        mixing: How the messages received weigh against each other.
        self_weight: What a node's own model weighs, under uniform mixing.
        message_loss: The probability that a message is lost.
        send_every: After how many of its trainings a node sends.
        buffered: Whether mail waits until enough has come.
        buffer_ratio: How much that is, in shares of the neighbours.
        recipe: A robust rule in place of the strategy's own; None without.
    """

    seed: int
    mixing: Mixing
    self_weight: float
    message_loss: float
    send_every: int
    buffered: bool
    buffer_ratio: float
    recipe: Recipe | None

    def delivered(
        self, state: GossipState, neighbours: Neighbours, trained: np.ndarray, online: list[int]
    ) -> tuple[dict[int, list[int]], int]:
        """Return whose models each node online has received, and how many messages were lost.

        Args:
            state: Every node after its training.
            neighbours: Of each node.
            trained: The nodes that trained.
            online: Those that can receive.
        """
        arrived: dict[int, list[int]] = {node: [] for node in online}
        lost = 0
        for sender in trained.tolist():
            if state.trainings[sender] % self.send_every:
                continue
            passes = np.full(len(neighbours[sender]), bool(state.models[sender].isfinite().all()))
            if self.message_loss:
                draw = rng.generator(self.seed, "message loss", state.tick, sender)
                passes &= draw.random(len(passes)) >= self.message_loss
            for receiver, through in zip(neighbours[sender].tolist(), passes, strict=True):
                if receiver in arrived and through:
                    arrived[receiver].append(sender)
                elif receiver in arrived:
                    lost += 1
        return arrived, lost

    def averaged(
        self,
        state: GossipState,
        neighbours: Neighbours,
        arrived: Mapping[int, list[int]],
        parts: Sequence[slice],
        merge: Merge,
    ) -> tuple[GossipState, int]:
        """Return the State after those with enough mail have averaged it, and how many they were.

        Args:
            state: Every node after its training.
            neighbours: Of each node.
            arrived: Whose models each node online has received.
            parts: Where the tensors lie whose variances a node wants to know.
            merge: What a node makes of its mail, see `GossipStrategy.merge`.
        """
        before = state.models
        variances = {node: variances_of(before[node], parts) for node in arrived}
        models, inbox, waiting = before.clone(), state.inbox.clone(), state.waiting.clone()
        dim, one, averaged = before.shape[1], torch.ones(1, dtype=torch.float64), 0
        sent = {
            sender: torch.cat([before[sender].double(), variances[sender], one])
            for sender in sorted({sender for senders in arrived.values() for sender in senders})
        }
        for node, senders in arrived.items():
            mail, count = torch.zeros(inbox.shape[1], dtype=torch.float64), len(senders)
            if senders:
                weights = [self._weight(neighbours, node, s) for s in senders]
                shares = torch.tensor(weights, dtype=torch.float64)
                mail = weighted_sum(shares, torch.stack([sent[s] for s in senders]), mail)
            if self.buffered:
                mail, count = mail + inbox[node], count + int(waiting[node])
                full = count >= self.buffer_ratio * len(neighbours[node])
                inbox[node], waiting[node] = (0, 0) if full else (mail, count)
                if not full:
                    continue
            if self.recipe is not None:
                merged = self._robust(before, node, senders, state.tick)
                if merged is not None:
                    models[node] = merged.to(models.dtype)
                    averaged += 1
            elif count:
                mean, own_weight = mail / mail[-1], self._own_weight(neighbours, node, mail[-1])
                own = before[node].double()
                letter = Mail(mean[:dim], mean[dim:-1], own_weight)
                models[node] = merge(own, variances[node], letter).to(models.dtype)
                averaged += 1
        return state._replace(models=models, inbox=inbox, waiting=waiting), averaged

    def _robust(
        self, before: Tensor, node: int, senders: Sequence[int], tick: int
    ) -> Tensor | None:
        """A node's next model by its robust rule, from its own model and those received.

        None when too few have arrived for its f: it keeps its own.
        """
        assert self.recipe is not None
        own = before[node]
        # as differences to its own, so that centred clipping begins there
        updates = Updates.of(before[sorted([node, *senders])], own)
        try:
            tolerated = self.recipe.check(len(updates))
        except ValueError:
            return None
        draw = rng.generator(self.seed, "buckets", tick, node)
        centre = torch.zeros(len(own), dtype=torch.float64)
        step = self.recipe.aggregate(updates, Round(tolerated, draw, centre))
        return own.double() + (1 - self.self_weight) * step

    def _weight(self, neighbours: Neighbours, node: int, other: int) -> float:
        """The weight of a received message: the same for all, or Metropolis and Hastings'."""
        if self.mixing == "uniform":
            return 1.0
        return 1 / (1 + max(len(neighbours[node]), len(neighbours[other])))

    def _own_weight(self, neighbours: Neighbours, node: int, received: Tensor) -> float:
        """The weight of the own model; by Metropolis-Hastings, that of lost messages is added."""
        if self.mixing == "uniform":
            return self.self_weight
        whole = sum(self._weight(neighbours, node, other) for other in neighbours[node].tolist())
        return 1 - min(whole, float(received))
