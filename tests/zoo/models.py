"""Models as users write them, each awkward in a way of its own.

Every model takes 12 numbers and gives 3 logits; images, sequences and tokens are made of the
numbers inside. `ZOO` names them all; what cannot be trained federated is in `REFUSED`.
"""

import collections
import copy
import functools
import itertools
import os
import random
import time
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

WIDTH, CLASSES, HIDDEN = 12, 3, 8
ZOO = {}
REFUSED = {}
CALLS = 0
SEEN = []
OF_THE_MODULE = np.random.default_rng(0)
FIRST = {}  # what classes and this module held at first, for the oracle


def inhabitant(made):
    """Take a class or function into the zoo."""
    ZOO[made.__name__] = made
    return made


def refused(words):
    """Take in what must be refused before round 1, with words of the refusal."""

    def take(made):
        REFUSED[made.__name__] = words
        return made

    return take


def put_back():
    """What classes and this module keep, as it was when it was imported."""
    if not FIRST:
        FIRST.update(calls=CALLS, seen=list(SEEN), steps=list(OfTheClass.steps))
    globals()["CALLS"] = FIRST["calls"]
    globals()["SEEN"] = list(FIRST["seen"])
    OfTheClass.steps = list(FIRST["steps"])
    OnTheClass.calls = 0


class Base(nn.Module):
    """Two dense layers; parts are replaced below."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def inner(self, h):
        return h

    def forward(self, x):
        return self.b(self.inner(torch.tanh(self.a(x))))


def chain(*layers):
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), *layers, nn.Linear(HIDDEN, CLASSES))


def as_image(x):
    return x.reshape(-1, 1, 3, 4)


def as_sequence(x):
    return x.reshape(-1, 4, 3)


def as_tokens(x):
    return (x.detach() * 2).round().long().clamp(-5, 5) + 5


# what a chain of known layers, and a plain one, make easy


@inhabitant
def Chain():
    return chain(nn.ReLU())


@inhabitant
def ChainInPlace():
    return chain(nn.ReLU(inplace=True), nn.Dropout(0.3))


@inhabitant
def ChainWithoutBias():
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


@inhabitant
def ChainHooked():
    made = chain(nn.ReLU())
    made[0].register_forward_hook(lambda module, inputs, outputs: outputs * 2)
    return made


@inhabitant
def ChainOfSubclasses():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(Doubling(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


@inhabitant
def ChainTwiceTheSame():
    same = nn.Linear(HIDDEN, HIDDEN)
    return chain(nn.ReLU(), same, nn.ReLU(), same)


@inhabitant
class ConvChain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(16, CLASSES),
        )  # fmt: skip


# dropout and noise


@inhabitant
class InTraining(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def inner(self, h):
        return self.drop(h) if self.training else h


@inhabitant
class InEvaluation(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def inner(self, h):
        return h if self.training else self.drop(h)


@inhabitant
class Twice(InTraining):
    def inner(self, h):
        return self.drop(torch.tanh(self.drop(h)))


@inhabitant
class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = (
            nn.Linear(3, HIDDEN),
            nn.Linear(HIDDEN, CLASSES),
            nn.Dropout(0.4),
        )

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(as_sequence(x).transpose(0, 1)))).mean(0))


@inhabitant
class Folded(TimeFirst):
    def forward(self, x):
        h = self.drop(torch.tanh(self.a(x.reshape(-1, 3))))
        return self.b(h.reshape(-1, 4, HIDDEN).mean(1))


@inhabitant
class SharedDrop(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)
        self.tail = nn.Sequential(nn.Tanh(), self.drop)

    def inner(self, h):
        return self.tail(self.drop(h))


@inhabitant
class TwoLayersOfIt(Base):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Dropout(0.3), nn.Dropout(0.6)

    def inner(self, h):
        return self.one(h) + self.two(h)


@inhabitant
class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout2d(0.4)
        self.b = nn.Linear(48, CLASSES)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.conv(as_image(x)))).flatten(1))


@inhabitant
class DropInPlace(InTraining):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4, inplace=True)

    def inner(self, h):
        return self.drop(h * 1)


@inhabitant
class FunctionalDrop(Base):
    def inner(self, h):
        return functional.dropout(h, 0.4, self.training)


@inhabitant
class AlphaDrop(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.AlphaDropout(0.3)

    def inner(self, h):
        return self.drop(h)


@inhabitant
class AlwaysDropping(Base):
    def inner(self, h):
        return functional.dropout(h, 0.4, training=True)


@inhabitant
class Depth(Base):
    def inner(self, h):
        keep = torch.rand(len(h), 1, dtype=h.dtype) > 0.3 if self.training else 1
        return h * keep


@inhabitant
class Gaussian(Base):
    def inner(self, h):
        return h + 0.1 * torch.randn_like(h) if self.training else h


@inhabitant
class Rectified(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.RReLU()

    def inner(self, h):
        return self.act(h)


@inhabitant
class Gumbel(Base):
    def inner(self, h):
        return functional.gumbel_softmax(h, tau=1.0) if self.training else h.softmax(-1)


@inhabitant
class PythonDrawn(Base):
    def inner(self, h):
        return h * random.random() if self.training else h


@inhabitant
class NumPyDrawn(Base):
    def inner(self, h):
        return h + torch.from_numpy(np.random.normal(0, 0.1, h.shape)).to(h) if self.training else h  # noqa: NPY002


@inhabitant
class OwnDrawn(Base):
    def __init__(self):
        super().__init__()
        self.mine = random.Random(3)

    def generators(self):
        return [self.mine]

    def inner(self, h):
        return h * self.mine.random() if self.training else h


@inhabitant
class ModuleDrawn(Base):
    def generators(self):
        return [OF_THE_MODULE]

    def inner(self, h):
        return h * OF_THE_MODULE.random() if self.training else h


# what is kept beside the tensors


@inhabitant
class Counter(Base):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def inner(self, h):
        if self.training:
            self.steps += 1
        return h * (0.5 + 0.1 * self.steps)


@inhabitant
class OfTheClass(Base):
    steps = [0]  # noqa: RUF012

    def inner(self, h):
        if self.training:
            type(self).steps[0] += 1
        return h * (0.5 + 0.1 * self.steps[0])


@inhabitant
class OnTheClass(Base):
    calls = 0

    def inner(self, h):
        if self.training:
            type(self).calls += 1
        return h * (0.5 + 0.1 * self.calls)


@inhabitant
class OfTheModule(Base):
    def inner(self, h):
        global CALLS
        if self.training:
            CALLS += 1
            SEEN.append(CALLS)
        return h * (0.5 + 0.1 * len(SEEN))


@inhabitant
class Deque(Base):
    def __init__(self):
        super().__init__()
        self.history = collections.deque([0.0], maxlen=2)

    def inner(self, h):
        if self.training:
            self.history.append(float(h.detach().abs().max()))
        return h * (1 + sum(self.history))


@inhabitant
class CachedMask(Base):
    mask = None

    def inner(self, h):
        if self.mask is None:
            self.mask = torch.linspace(0, 1, HIDDEN, dtype=h.dtype)
        return h * self.mask


@inhabitant
class Remembered(Base):
    def inner(self, h):
        self.last = h
        return h


@inhabitant
class Counted(Base):
    def __init__(self):
        super().__init__()
        self.numbers = itertools.count(1)

    def inner(self, h):
        return h / next(self.numbers) if self.training else h


@inhabitant
class HelperObject(Base):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def inner(self, h):
        if self.training:
            self.meter.add(float(h.detach().mean()))
        return h + self.meter.total


class Meter:
    def __init__(self):
        self.values = {"n": 0, "sum": 0.0}

    def add(self, value):
        self.values["n"] += 1
        self.values["sum"] += value

    @property
    def total(self):
        return self.values["sum"]


@inhabitant
class Unsaved(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def inner(self, h):
        if self.training:
            self.seen += 1
        return h * (0.5 + 0.1 * self.seen)


@inhabitant
class PlainTensor(Base):
    def __init__(self):
        super().__init__()
        self.seen = torch.zeros((), dtype=torch.float64)

    def inner(self, h):
        if self.training:
            self.seen.add_(1)
        return h * (0.5 + 0.1 * self.seen)


@inhabitant
class PlainArray(Base):
    def __init__(self):
        super().__init__()
        self.seen = np.zeros(2)

    def inner(self, h):
        if self.training:
            self.seen[0] += 1
        return h * (0.5 + 0.1 * float(self.seen[0]))


@inhabitant
class Assigned(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def inner(self, h):
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * h.detach().abs().max()
        return h / self.scale


@inhabitant
class InPlace(Assigned):
    def inner(self, h):
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * h.detach().abs().max())
        return h / self.scale


@inhabitant
class Integers(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def inner(self, h):
        if self.training:
            self.steps += 1
        return h * (0.5 + 0.1 * self.steps)


@inhabitant
class Flipping(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.tensor(True))

    def inner(self, h):
        on = self.on
        if self.training:
            self.on = ~self.on
        return torch.where(on, h, 0.5 * h)


@inhabitant
class LateBuffer(Base):
    def inner(self, h):
        if not hasattr(self, "shift"):
            self.register_buffer("shift", torch.full((HIDDEN,), 0.1, dtype=h.dtype))
        return h + self.shift


@inhabitant
class Hooked(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.a.register_forward_hook(self.count)

    def count(self, module, inputs, outputs):
        self.calls += module.training
        return outputs * (0.5 + 0.1 * self.calls)


@inhabitant
class Memo(Base):
    @functools.lru_cache(maxsize=2)  # noqa: B019
    def table(self, width):
        return torch.linspace(1, 2, width, dtype=torch.float64)

    def inner(self, h):
        return h * self.table(h.shape[-1])


@inhabitant
class TrainsOtherwise(Base):
    rate = 1.0

    def train(self, mode=True):
        self.rate = 0.5 if mode else 1.0
        return super().train(mode)

    def inner(self, h):
        return h * self.rate


# norms, and weights made of others


@inhabitant
def Batch():
    return chain(nn.BatchNorm1d(HIDDEN), nn.ReLU())


@inhabitant
def BatchUntracked():
    return chain(nn.BatchNorm1d(HIDDEN, track_running_stats=False), nn.ReLU())


@inhabitant
def BatchCumulative():
    return chain(nn.BatchNorm1d(HIDDEN, momentum=None), nn.ReLU())


@inhabitant
class BatchTwice(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def inner(self, h):
        return self.norm(torch.tanh(self.norm(h)))


@inhabitant
class BatchOfImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b = nn.Linear(48, CLASSES)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.conv(as_image(x)))).flatten(1))


@inhabitant
def Layered():
    return chain(nn.LayerNorm(HIDDEN), nn.GELU())


@inhabitant
class Grouped(BatchOfImages):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)


@inhabitant
class Instances(BatchOfImages):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)


@inhabitant
class WeightNormed(Base):
    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(self.a)


@inhabitant
class SpectralNormed(Base):
    def __init__(self):
        super().__init__()
        self.a = parametrizations.spectral_norm(self.a)


@inhabitant
class Orthogonal(Base):
    def __init__(self):
        super().__init__()
        self.a = parametrizations.orthogonal(self.a)


@inhabitant
class OldWeightNorm(Base):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a = nn.utils.weight_norm(self.a)


@inhabitant
class OldSpectralNorm(Base):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.spectral_norm(self.a)


@inhabitant
class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.b = nn.Embedding(11, HIDDEN, **options), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.b(self.table(as_tokens(x)).mean(1))


@inhabitant
class EmbeddedShort(Embedded):
    def __init__(self):
        super().__init__(max_norm=1.0)


@inhabitant
class EmbeddedPadded(Embedded):
    def __init__(self):
        super().__init__(padding_idx=5)


@inhabitant
class Bag(Embedded):
    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(11, HIDDEN, mode="mean")

    def forward(self, x):
        return self.b(self.table(as_tokens(x)))


# what parameters there are


@inhabitant
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.b = nn.Linear(WIDTH, CLASSES)
        self.c.weight = nn.Parameter(self.a.weight.T.clone())
        self.d = nn.Linear(WIDTH, HIDDEN)
        self.d.weight = self.a.weight

    def forward(self, x):
        return self.b(self.c(torch.tanh(self.a(x) + self.d(x))))


@inhabitant
class SharedLayer(Base):
    def __init__(self):
        super().__init__()
        self.same = nn.Linear(HIDDEN, HIDDEN)
        self.again = self.same

    def inner(self, h):
        return self.again(torch.tanh(self.same(h)))


@inhabitant
class Unused(Base):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


@inhabitant
class Frozen(Base):
    def __init__(self):
        super().__init__()
        self.a.weight.requires_grad_(False)


@inhabitant
class Empty(Base):
    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(0, HIDDEN))

    def inner(self, h):
        return h + self.prompt.sum()


@inhabitant
class Scalar(Base):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def inner(self, h):
        return h * self.scale


@inhabitant
class Listed(Base):
    def __init__(self):
        super().__init__()
        self.shifts = nn.ParameterList([torch.zeros(HIDDEN), torch.ones(HIDDEN)])
        self.named = nn.ParameterDict({"x": torch.ones(1)})

    def inner(self, h):
        return sum((h + shift for shift in self.shifts), torch.zeros(())) * self.named["x"]


@inhabitant
class Extra(Base):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        raise AssertionError("nobody asked")


@inhabitant
class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.LazyLinear(HIDDEN), nn.LazyBatchNorm1d(), nn.LazyLinear(3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


@inhabitant
class Ids(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("ids", torch.arange(HIDDEN))

    def inner(self, h):
        return h[:, self.ids]


@inhabitant
class Routed(Base):
    def __init__(self):
        super().__init__()
        self.routes = nn.ModuleDict({"x": nn.Linear(HIDDEN, HIDDEN), "y": nn.Identity()})
        self.only_in_training = nn.Linear(HIDDEN, HIDDEN)

    def inner(self, h):
        h = self.routes["x"](h) + self.routes["y"](h)
        return self.only_in_training(h) if self.training else h


@inhabitant
class Copied(Base):
    def __init__(self):
        super().__init__()
        self.c = copy.deepcopy(self.a)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) + torch.tanh(self.c(x)))


# sequences and attention


@inhabitant
class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.cell = kind(3, HIDDEN, batch_first=True, **options)
        self.b = nn.Linear(HIDDEN * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x):
        return self.b(self.cell(as_sequence(x))[0][:, -1])


@inhabitant
class Gated(Recurrent):
    def __init__(self):
        super().__init__(nn.GRU, bidirectional=True)


@inhabitant
class RecurrentDrop(Recurrent):
    def __init__(self):
        super().__init__(nn.LSTM, num_layers=2, dropout=0.4)


@inhabitant
class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.b = nn.LSTMCell(3, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        state = None
        for step in as_sequence(x).unbind(1):
            state = self.cell(step, state)
        return self.b(state[0])


@inhabitant
class Stateful(Recurrent):
    """Carries the hidden state from batch to batch, as truncated backpropagation does."""

    state = None

    def forward(self, x):
        state = self.state if self.state is not None and self.state[0].shape[1] == len(x) else None
        out, state = self.cell(as_sequence(x), state)
        if self.training:
            self.state = tuple(each.detach() for each in state)
        return self.b(out[:, -1])


@inhabitant
class Attentive(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.a, self.b = nn.Linear(3, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, dropout=dropout, batch_first=True)

    def forward(self, x):
        h = self.a(as_sequence(x))
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return self.b(self.attention(h, h, h, attn_mask=mask, need_weights=False)[0].mean(1))


@inhabitant
class AttentiveDrop(Attentive):
    def __init__(self):
        super().__init__(dropout=0.3)


@inhabitant
class Transformer(nn.Module):
    def __init__(self, batch_first=False):
        super().__init__()
        self.a, self.b = nn.Linear(3, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16, 0.2, batch_first=batch_first)

    def forward(self, x):
        h = self.a(as_sequence(x))
        if not self.layer.self_attn.batch_first:
            return self.b(self.layer(h.transpose(0, 1)).mean(0))
        return self.b(self.layer(h).mean(1))


@inhabitant
class TransformerBatchFirst(Transformer):
    def __init__(self):
        super().__init__(batch_first=True)


# control flow and operations that do not vectorise


@inhabitant
class Branching(Base):
    def inner(self, h):
        return h * 2 if h.square().mean() > 0.23 else h  # of two rows and their mean, h.mean() is 0


@inhabitant
class Items(Base):
    def inner(self, h):
        return h / max(1.0, h.abs().max().item())


@inhabitant
class Masked(Base):
    def inner(self, h):
        out = torch.zeros_like(h)
        out[h > 0] = h[h > 0]
        return out


@inhabitant
class Sorted(Base):
    def inner(self, h):
        return h.sort(dim=1).values.cumsum(1)


@inhabitant
class Spectrum(Base):
    def inner(self, h):
        return torch.fft.irfft(torch.fft.rfft(h), n=HIDDEN)


@inhabitant
class Solved(Base):
    def inner(self, h):
        eye = torch.eye(HIDDEN, dtype=h.dtype)
        return torch.linalg.solve(eye + 0.1 * h.T @ h / len(h), h.T).T


@inhabitant
class OwnFunction(Base):
    def inner(self, h):
        return Clamped.apply(h)


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.clamp(min=0)

    @staticmethod
    def backward(ctx, slope):
        (h,) = ctx.saved_tensors
        return slope * (h > 0) * 2


@inhabitant
class Recomputed(Base):
    def inner(self, h):
        return torch.utils.checkpoint.checkpoint(torch.sin, h, use_reentrant=False)


@inhabitant
class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.b = nn.ConvTranspose2d(1, 2, 2, stride=2), nn.LazyLinear(CLASSES)
        self.wrap = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.b(self.wrap(torch.relu(self.up(as_image(x)))).flatten(1))


@inhabitant
class Pairs(Base):
    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(HIDDEN, HIDDEN, HIDDEN)

    def inner(self, h):
        return self.pair(h, h)


# samples that know of each other


@inhabitant
class Centred(Base):
    def inner(self, h):
        return h - h.mean(0)


@inhabitant
class AcrossTheBatch(Base):
    def inner(self, h):
        return h * h.softmax(0) if self.training else h


@inhabitant
class Rolled(Base):
    def inner(self, h):
        return h + 0.1 * h.roll(1, 0)


@inhabitant
class Contrasted(Base):
    def inner(self, h):
        return functional.normalize(h, dim=0) + h @ h.T.mean(1, keepdim=True)


@inhabitant
class ChangesItsInput(Base):
    def forward(self, x):
        x.mul_(0.5)
        return super().forward(x)


@inhabitant
class NotContiguous(Base):
    def forward(self, x):
        return super().forward(x).T.contiguous().T


# refused before round 1, by name


@inhabitant
@refused("'steps' differs|trained twice")
class Clock(Base):
    def inner(self, h):
        return h * (time.perf_counter_ns() % 1000) / 1000 if self.training else h


@inhabitant
@refused("trained twice")
class System(Base):
    def inner(self, h):
        return h * int.from_bytes(os.urandom(2), "big") / 2**16 if self.training else h


@inhabitant
@refused("buffer 'seen' is torch.float64 \\[1\\]")
class Growing(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def inner(self, h):
        if self.training:
            self.seen = torch.cat([self.seen, h.detach()[0, :1]])
        return h


@inhabitant
@refused("its parameter 'a.weight' anew")
class Replacing(Base):
    def inner(self, h):
        if self.training:
            self.a.weight = nn.Parameter(self.a.weight.detach() * 0.9)
        return h


@inhabitant
@refused("'phase' is complex64")
class Complex(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))


@inhabitant
@refused("no trainable parameter")
class NothingToTrain(Base):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@inhabitant
@refused("training fails before round 1.*only for evaluation")
class FailsInTraining(Base):
    def inner(self, h):
        if self.training:
            raise RuntimeError("only for evaluation")
        return h
