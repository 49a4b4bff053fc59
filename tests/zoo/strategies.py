"""Strategies as users write them: each remembers something that decides its later rounds.

`Moving` leaves it to `moved(old, new)` to say the next model, from the model before the round and
the clients' mean.
"""

import collections
import dataclasses
import enum
import functools
import hashlib
import itertools
import random
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy

from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.linear import LinearStrategy

CALLS = {"rounds": 0}
scale = 1.0


def arrays_of(record):
    return [array.numpy() for array in record.values()]


def record_of(names, arrays):
    pairs = zip(names, arrays, strict=True)
    return ArrayRecord({n: Array(np.asarray(a, np.float32)) for n, a in pairs})


def between(old, new, share):
    return [o + share * (n - o) for o, n in zip(old, new, strict=True)]


def distance(old, new):
    return float(sum(np.abs(n - o).sum() for o, n in zip(old, new, strict=True)))


class Moving(FedAvg):
    current = None

    def configure_train(self, server_round, arrays, config, grid):
        self.current = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, list(replies))
        if arrays is None:
            return arrays, metrics
        return record_of(arrays, self.moved(arrays_of(self.current), arrays_of(arrays))), metrics


# --- Flower's own, extended ---


class WarmAdam(FedAdam):
    """FedAdam whose step grows over the first rounds."""

    def __init__(self):
        super().__init__(eta=0.02)
        self.steps = []

    def aggregate_train(self, server_round, replies):
        self.eta *= 1.2
        self.steps.append(self.eta)
        return super().aggregate_train(server_round, replies)


class RestartingYogi(FedYogi):
    """Forgets its moments in every third of its rounds."""

    def __init__(self):
        super().__init__(eta=0.05)
        self.age = 0

    def aggregate_train(self, server_round, replies):
        self.age += 1
        if self.age % 3 == 0:
            self.m_t = self.v_t = None
        return super().aggregate_train(server_round, replies)


class Momentum(FedAvgM):
    def __init__(self):
        super().__init__(server_momentum=0.8)


class GrowingProximal(FedProx):
    """A proximal term that doubles while the loss falls."""

    def __init__(self):
        super().__init__(proximal_mu=0.01)
        self.best = None

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics and (self.best is None or metrics["loss"] < self.best):
            self.best, self.proximal_mu = metrics["loss"], 2 * self.proximal_mu
        return arrays, metrics


# --- what they remember ---


class VelocityByName(Moving):
    def __init__(self):
        super().__init__()
        self.velocity = {}

    def moved(self, old, new):
        for place, (o, n) in enumerate(zip(old, new, strict=True)):
            self.velocity[place] = 0.9 * self.velocity.get(place, 0.0) + (n - o)
        return [o + self.velocity[place] for place, o in enumerate(old)]


class Best(Moving):
    """Goes back to the best model while it moves on by more than half as far."""

    def __init__(self):
        super().__init__()
        self.best, self.lowest, self.waited = None, float("inf"), 0

    def moved(self, old, new):
        far = distance(old, new)
        if far < 0.5 * self.lowest:
            self.best, self.lowest, self.waited = record_of(map(str, range(len(new))), new), far, 0
            return new
        self.waited += 1
        return between(arrays_of(self.best), new, 1 / self.waited)


class StochasticAverage(Moving):
    def __init__(self):
        super().__init__()
        self.mean, self.count = None, torch.zeros((), dtype=torch.int64)

    def moved(self, old, new):
        tensors = [torch.from_numpy(n.copy()) for n in new]
        self.count += 1
        self.mean = tensors if self.mean is None else [
            m + (t - m) / self.count for m, t in zip(self.mean, tensors, strict=True)
        ]  # fmt: skip
        return [m.numpy() for m in self.mean]


class Averaged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.bias = torch.nn.Parameter(torch.zeros(1))


class InAModule(Moving):
    """Its memory is a module's buffer and parameter."""

    def __init__(self):
        super().__init__()
        self.module = Averaged()

    def moved(self, old, new):
        far = distance(old, new)
        self.module.mean.mul_(0.5).add_(far)
        self.module.bias.data += 0.01 * self.module.mean
        return [n + float(self.module.bias.detach()) for n in new]


class TorchOptimizer(Moving):
    optimizer = None

    def moved(self, old, new):
        if self.optimizer is None:
            self.params = [torch.nn.Parameter(torch.from_numpy(o.copy())) for o in old]
            self.optimizer = torch.optim.SGD(self.params, lr=0.7, momentum=0.9, nesterov=True)
        for param, o, n in zip(self.params, old, new, strict=True):
            param.data.copy_(torch.from_numpy(o.copy()))
            param.grad = torch.from_numpy(o - n)
        self.optimizer.step()
        return [p.detach().numpy().copy() for p in self.params]


class FlatMomentum(Moving):
    """One flat vector and views of it, as those who flatten models have."""

    flat = None

    def moved(self, old, new):
        if self.flat is None:
            self.flat = np.zeros(sum(o.size for o in old), np.float32)
            ends = np.cumsum([o.size for o in old])[:-1]
            self.views = [
                part.reshape(o.shape)
                for part, o in zip(np.split(self.flat, ends), old, strict=True)
            ]
        for view, o, n in zip(self.views, old, new, strict=True):
            view *= 0.5
            view += n - o
        self.flat *= 0.99
        return [o + view for o, view in zip(old, self.views, strict=True)]


class Node:
    __slots__ = ("owner", "rate", "weight")

    def __init__(self, owner):
        self.owner, self.weight, self.rate = owner, 1.0, np.float32(0.9)


class Slots(Moving):
    """A helper with slots that refers back to its owner."""

    def __init__(self):
        super().__init__()
        self.node, self.turns = Node(self), 0

    def moved(self, old, new):
        self.turns += 1
        self.node.weight *= float(self.node.rate) ** self.node.owner.turns
        return between(old, new, self.node.weight)


@dataclasses.dataclass
class Episode:
    number: int
    reward: float
    children: list = dataclasses.field(default_factory=list)


class Episodes(Moving):
    """A tree of dataclasses that grows."""

    def __init__(self):
        super().__init__()
        self.root = Episode(0, 0.0)
        self.last = self.root

    def moved(self, old, new):
        episode = Episode(self.last.number + 1, distance(old, new))
        self.last.children.append(episode)
        self.last = episode
        depth, at = 0, self.root
        while at.children:
            depth, at = depth + 1, at.children[0]
        return between(old, new, 1 / depth)


class Phase(enum.Enum):
    EXPLORE = "explore"
    EXPLOIT = "exploit"


class Phases(Moving):
    def __init__(self):
        super().__init__()
        self.phase = Phase.EXPLORE
        self.seen = collections.Counter()

    def moved(self, old, new):
        self.seen[self.phase.name] += 1
        share = 0.5 if self.phase is Phase.EXPLORE else 1.5
        if self.seen["EXPLORE"] == 2:
            self.phase = Phase.EXPLOIT
        return between(old, new, share)


class Point(NamedTuple):
    round: int
    value: float


class History(Moving):
    """Named tuples, frozen sets, an ordered dict and a default dict."""

    def __init__(self):
        super().__init__()
        self.points, self.tags = [], frozenset()
        self.order, self.by = collections.OrderedDict(), collections.defaultdict(list)

    def moved(self, old, new):
        point = Point(len(self.points) + 1, distance(old, new))
        self.points.append(point)
        self.tags |= {point.round}
        self.order[point.round] = point
        self.order.move_to_end(point.round, last=False)
        self.by[point.round % 2].append(point.value)
        share = len(self.tags) * next(iter(self.order)) * len(self.by[0] or [1])
        return between(old, new, 1 / share)


class Annealing(Moving):
    """Accepts a round or not, by a generator of its own kind."""

    def __init__(self):
        super().__init__()
        self.chance = np.random.Generator(np.random.MT19937(5))
        self.heat = 1.0

    def moved(self, old, new):
        self.heat *= 0.8
        return new if self.chance.random() < self.heat else between(old, new, 0.1)


class Chained(Moving):
    """Noise from a chain of hashes, in bytes."""

    def __init__(self):
        super().__init__()
        self.link = b"start"

    def moved(self, old, new):
        self.link = hashlib.sha256(self.link).digest()
        noise = np.random.default_rng(int.from_bytes(self.link[:8], "little"))
        return [n + 0.01 * noise.normal(size=n.shape) for n in new]


class Ring(Moving):
    """A structured array as a ring."""

    def __init__(self):
        super().__init__()
        self.ring = np.zeros(3, dtype=[("round", "i4"), ("far", "f8")])
        self.turn = 0

    def moved(self, old, new):
        self.ring[self.turn % 3] = (self.turn, distance(old, new))
        self.turn += 1
        return between(old, new, 1 / (1 + self.ring["far"].mean()))


class GlobalDraws(Moving):
    """Draws from everybody's generators."""

    def moved(self, old, new):
        drawn = random.random() + np.random.normal() + float(torch.randn(1))  # noqa: NPY002
        return [n + 0.01 * drawn for n in new]


class Enclosed(Moving):
    def __init__(self):
        super().__init__()
        total = []

        def push(value):
            total.append(value)
            return sum(total)

        self.push = functools.partial(push)
        self.half = lambda value: value / (2 + len(total))

    def moved(self, old, new):
        return [n * (1 - 0.001 * self.half(self.push(1.0))) for n in new]


class OfTheClass(Moving):
    """Its memory is the class's, and the module's."""

    seen: ClassVar = []

    def moved(self, old, new):
        global scale
        scale *= 0.9
        CALLS["rounds"] += 1
        self.seen.append(CALLS["rounds"])
        return between(old, new, scale / len(self.seen))


# --- whom they ask, and what they tell ---


class OwnSampling(FedAvg):
    """Draws who trains by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(3)

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        count = min(2, len(messages))  # some rounds have fewer
        chosen = self.random.choice(len(messages), size=count, replace=False)
        return [messages[place] for place in sorted(chosen)]


class Queueing(FedAvg):
    """Asks the nodes in turn, three in a round."""

    def __init__(self):
        super().__init__()
        self.queue = collections.deque()
        self.shuffle = random.Random(9)

    def configure_train(self, server_round, arrays, config, grid):
        nodes = sorted(grid.get_node_ids())
        while len(self.queue) < 3:
            more = [n for n in nodes if n not in self.queue]
            self.shuffle.shuffle(more)
            self.queue.extend(more)
        asked = {self.queue.popleft() for _ in range(3)}
        messages = super().configure_train(server_round, arrays, config, grid)
        return [m for m in messages if m.metadata.dst_node_id in asked]


class ByLoss(FedAvg):
    """Gives each node the step that its last losses ask for."""

    def __init__(self):
        super().__init__()
        self.losses = {}

    def configure_train(self, server_round, arrays, config, grid):
        messages = []
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            last = self.losses.get(node, collections.deque([1.0]))
            own = {**message.content["config"], "local_lr": 0.1 * sum(last) / len(last)}
            content = {"arrays": message.content["arrays"], "config": ConfigRecord(own)}
            messages.append(Message(RecordDict(content), node, "train"))
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            mine = self.losses.setdefault(reply.metadata.src_node_id, collections.deque(maxlen=2))
            mine.append(reply.content["metrics"]["loss"])
        return super().aggregate_train(server_round, replies)


class Plateau(FedAvg):
    """Halves the clients' step when the loss does not fall by half."""

    def __init__(self):
        super().__init__()
        self.lr, self.last = np.float64(0.2), None

    def configure_train(self, server_round, arrays, config, grid):
        config["local_lr"] = float(self.lr)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.last is not None and metrics["loss"] > 0.5 * self.last:
            self.lr /= 2
        self.last = metrics["loss"]
        return arrays, metrics


class Switching(FedAvg):
    """Two of Flower's strategies in turn."""

    def __init__(self):
        super().__init__()
        self.both = {0: FedAdam(eta=0.05), 1: FedAvgM(server_momentum=0.5)}
        self.turn = 0

    def configure_train(self, server_round, arrays, config, grid):
        self.turn = server_round % 2
        return self.both[self.turn].configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        return self.both[self.turn].aggregate_train(server_round, replies)


class Wrapper(Strategy):
    """Wraps any strategy and keeps a share of the last update."""

    def __init__(self, strategy: Strategy):
        super().__init__()
        self.strategy, self.before, self.rest = strategy, None, None

    def configure_train(self, server_round, arrays, config, grid):
        self.before = arrays
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        old, new = arrays_of(self.before), arrays_of(arrays)
        rest = self.rest or [0.0] * len(old)
        moved = [n - o + r for o, n, r in zip(old, new, rest, strict=True)]
        self.rest = [0.3 * m for m in moved]
        after = [o + 0.7 * m for o, m in zip(old, moved, strict=True)]
        return record_of(arrays, after), metrics

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self):
        self.strategy.summary()


# --- of fedsim's kind ---


class Kept(NamedTuple):
    rounds: int
    last: dict


class Ours(LinearStrategy):
    """A State with a dictionary by number, and an attribute beside the State."""

    def __init__(self):
        self.pushes = []

    def init(self, params, clients):
        return Kept(0, {})

    def weights(self, state, client_ids, num_examples):
        return num_examples.double() / num_examples.sum()

    def apply(self, state, params, weighted_sum, weight_sum):
        self.pushes.append(float(weighted_sum.abs().sum()))
        last = {**state.last, state.rounds: weighted_sum}
        push = sum(last.values()) / len(self.pushes)
        return (params + push).to(params.dtype), Kept(state.rounds + 1, last), {}


class Signs(FederatedStrategy):
    """Steps by the sign of the mean update, by a helper's rate."""

    def __init__(self):
        self.rate = collections.deque([0.05], maxlen=2)

    def init(self, params, clients):
        return Kept(0, {"none": torch.zeros(1)})

    def server_update(self, state, params, replies):
        self.rate.append(0.9 * self.rate[-1])
        step = self.rate[0] * torch.sign(replies.update.mean(dim=0))
        return params + step, state._replace(rounds=state.rounds + 1), {}


# --- that no checkpoint can hold, or that say themselves what to keep ---


class Stream(Moving):
    def __init__(self):
        super().__init__()
        self.shares = (1 / (1 + place) for place in itertools.count())

    def moved(self, old, new):
        return between(old, new, next(self.shares))


class Reading(Moving):
    """Reads its steps from a file that it holds open."""

    def __init__(self):
        super().__init__()
        self.file = open(__file__, encoding="utf-8")  # noqa: SIM115 - as users do

    def moved(self, old, new):
        return between(old, new, 1 / (1 + len(self.file.readline())))

    def __del__(self):
        self.file.close()


class Counting(Moving):
    """Says itself what to keep of what has no other form."""

    def __init__(self):
        super().__init__()
        self.counter, self.turn = itertools.count(1), 0

    def state_dict(self):
        return {"turn": self.turn}

    def load_state_dict(self, state):
        self.turn = state["turn"]
        self.counter = itertools.count(self.turn + 1)

    def moved(self, old, new):
        self.turn = next(self.counter)
        return between(old, new, 1 / self.turn)


HELD = tuple(
    cls.__name__
    for cls in (
        WarmAdam, RestartingYogi, Momentum, GrowingProximal, VelocityByName, Best,
        StochasticAverage, InAModule, TorchOptimizer, FlatMomentum, Slots, Episodes, Phases,
        History, Annealing, Chained, Ring, GlobalDraws, Enclosed, OfTheClass, OwnSampling,
        Queueing, ByLoss, Plateau, Switching, Ours, Signs, Counting,
    )
)  # fmt: skip
UNHELD = (Stream.__name__, Reading.__name__)
