"""Strategies of users that remember things in their own ways; each decides later rounds by them."""

import collections
import dataclasses
import functools
import itertools
import random
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from fedsim.strategy.linear import LinearStrategy


def arrays_of(record):
    return [array.numpy() for array in record.values()]


def record_of(names, arrays):
    return ArrayRecord(
        {n: Array(np.asarray(a, np.float32)) for n, a in zip(names, arrays, strict=True)}
    )


class HeavyBall:
    def __init__(self):
        self.velocity = None

    def step(self, old, new):
        moved = [n - o for o, n in zip(old, new, strict=False)]
        before = self.velocity
        self.velocity = (
            moved if before is None else [0.9 * v + m for v, m in zip(before, moved, strict=False)]
        )
        return [o + v for o, v in zip(old, self.velocity, strict=False)]


class Moving(FedAvg):
    """What they share: `moved(old, new)` says the next model."""

    current = None

    def configure_train(self, server_round, arrays, config, grid):
        self.current = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, list(replies))
        if arrays is None:
            return arrays, metrics
        after = self.moved(arrays_of(self.current), arrays_of(arrays))
        return record_of(arrays, after), metrics


class Helper(Moving):
    def __init__(self):
        super().__init__()
        self.helper = HeavyBall()

    def moved(self, old, new):
        return self.helper.step(old, new)


class LateHelper(Moving):
    helper = None

    def moved(self, old, new):
        self.helper = self.helper or HeavyBall()
        return self.helper.step(old, new)


class Noisy(Moving):
    """Draws from three generators of its own, and from torch's for everybody."""

    def __init__(self):
        super().__init__()
        self.numpy = np.random.default_rng(7)
        self.python = random.Random(7)
        self.torch = torch.Generator().manual_seed(7)
        self.legacy = np.random.RandomState(7)

    def moved(self, old, new):
        scale = 0.01 * (
            self.numpy.normal() + self.python.random() + self.legacy.normal()
            + float(torch.rand(1, generator=self.torch)) + float(torch.rand(1))
            + self.numpy.spawn(1)[0].random()
        )  # fmt: skip
        return [n + scale for n in new]


class Window(Moving):
    """The mean of the last three models, in a deque that a named tuple and a dict share."""

    def __init__(self):
        super().__init__()
        self.last = collections.deque(maxlen=3)
        self.shared = {1: self.last}

    def moved(self, old, new):
        self.last.append(tuple(new))
        assert self.shared[1] is self.last
        return [sum(layers) / len(self.last) for layers in zip(*self.last, strict=False)]


@dataclasses.dataclass
class Settings:
    step: float = 1.0
    best: float = np.inf
    seen: set = dataclasses.field(default_factory=set)


class Decaying(Moving):
    """Halves its step when the loss does not fall; keeps a dataclass, sets, NumPy's numbers."""

    def __init__(self):
        super().__init__()
        self.settings = Settings()
        self.round = np.int64(0)

    def moved(self, old, new):
        self.round += np.int64(1)
        self.settings.seen.add((int(self.round), "seen"))
        self.settings.step *= np.float64(0.9) ** len(self.settings.seen)
        return [o + self.settings.step * (n - o) for o, n in zip(old, new, strict=False)]


class TorchMomentum(Moving):
    """The server's step by torch's SGD with momentum and a schedule, made when a model is there."""

    optimizer = None

    def moved(self, old, new):
        if self.optimizer is None:
            self.params = [torch.nn.Parameter(torch.from_numpy(o.copy())) for o in old]
            self.optimizer = torch.optim.Adam(self.params, lr=0.05)
        for param, o, n in zip(self.params, old, new, strict=False):
            param.data = torch.from_numpy(o.copy())
            param.grad = torch.from_numpy(o - n)
        self.optimizer.step()
        return [param.detach().numpy().copy() for param in self.params]


class Enclosed(Moving):
    """The memory is in a closure, in a partial and in the class."""

    counted = [0]  # noqa: RUF012 - as users write it

    def __init__(self):
        super().__init__()
        velocity = 0.0

        def step(factor, moved):
            nonlocal velocity
            velocity = factor * velocity + moved
            return velocity

        self.step = functools.partial(step, 0.5)

    def moved(self, old, new):
        self.counted[0] += 1
        push = self.step(float(np.mean([np.mean(n - o) for o, n in zip(old, new, strict=False)])))
        return [n + push / self.counted[0] for n in new]


class Said:
    """Says itself what is to be kept."""

    def __init__(self):
        self.velocity, self.stream = 0.0, itertools.count()

    def state_dict(self):
        return {"velocity": self.velocity}

    def load_state_dict(self, state):
        self.velocity = state["velocity"]


class Saying(Moving):
    def __init__(self):
        super().__init__()
        self.helper = Said()

    def moved(self, old, new):
        self.helper.velocity += 0.1
        return [n * (1 - 0.01 * self.helper.velocity) for n in new]


class SayingAll(Moving):
    """Holds what no checkpoint can hold, and says what to keep of all."""

    def __init__(self):
        super().__init__()
        self.stream, self.turn = (0.9**i for i in itertools.count()), 0

    def state_dict(self):
        return {"turn": self.turn}

    def load_state_dict(self, state):
        for _ in range(state["turn"] - self.turn):
            next(self.stream)
        self.turn = state["turn"]

    def moved(self, old, new):
        self.turn += 1
        factor = next(self.stream)
        return [n * factor for n in new]


class Streaming(Moving):
    """Holds a generator function's place, which no checkpoint can hold."""

    def __init__(self):
        super().__init__()
        self.stream = (0.9**i for i in itertools.count())

    def moved(self, old, new):
        return [n * next(self.stream) for n in new]


class StreamingLater(Moving):
    stream = None

    def moved(self, old, new):
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 3:
            self.stream = iter([0.5, 0.25])
        return new


class Remembers(FedAvg):
    """Keeps every node's last loss, and the history of the mean."""

    def __init__(self):
        super().__init__()
        self.loss_of = {}
        self.history = []
        self.records = []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for message in replies:
            if message.has_content():
                self.loss_of[message.metadata.src_node_id] = message.content["metrics"]["loss"]
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.history.append((server_round, metrics["loss"]))
        self.records.append(MetricRecord({"round": server_round, "losses": [1.0, 2.0]}))
        return arrays, metrics


class Ours(NamedTuple):
    by_node: dict
    rounds: int


class OurOwn(LinearStrategy):
    """A strategy of fedsim's kind that remembers beside its State, and oddly in it."""

    def __init__(self):
        self.velocity = None

    def init(self, params, clients):
        return Ours({0: (1.0, 2.0)}, 0)

    def weights(self, state, client_ids, num_examples):
        return num_examples.double() / num_examples.sum()

    def apply(self, state, params, weighted_sum, weight_sum):
        self.velocity = (
            weighted_sum if self.velocity is None else 0.9 * self.velocity + weighted_sum
        )
        state = Ours({**state.by_node, state.rounds: (0.5, 1.0)}, state.rounds + 1)
        return (params + self.velocity * state.by_node[0][0]).to(params.dtype), state, {}
