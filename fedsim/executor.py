"""The cohort executor: trains and evaluates a chunk of clients as one batch. Needs torch alone.

Two executors give the same numbers up to rounding. `vmap` runs every step of the whole chunk as one
batched call under `torch.func.vmap`: clients of unequal size are padded, padding steps are undone
exactly, and padding samples carry weight 0. `loop` takes the clients one after another with batches
of their true sizes, for models that cannot be vectorised.

The bits of a client's result depend on the number of slots in its chunk (torch picks kernels by
shape), never on its neighbours or its place among them. A chunk has at least two slots: a lone
client is doubled.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree

from fedsim.layout import Layout, Payload
from fedsim.procedure import Batch, Carry, ClientProcedure, Gradient, Named, Objective
from fedsim.rng import generator

ExecutorKind = Literal["vmap", "loop"]

_EVALUATION_STEP = 100  # samples per client and forward pass when many clients evaluate at once
_POOLS_KEPT = 6  # features and targets of the train, local test and server test pools


class ClientArrays(Protocol):
    """The data of federated clients, as `fedsim.data.FederatedData` offers it."""

    num_clients: int

    def clients(self, client_ids: Sequence[int], *, split: str = "train") -> Any:
        """Return pooled features and targets with each client's row numbers."""


class TaskLike(Protocol):
    """Loss and metrics, as `fedsim.tasks.Task` offers them."""

    dtype: torch.dtype

    def build_model(self, seed: int) -> nn.Module:
        """Return the model with the initial parameters of that seed."""

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per sample."""

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return additive sums over the samples that are not padding."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return metrics from those sums."""


@dataclass(frozen=True)
class ChunkJob:
    """One chunk of a cohort: what it takes to train or evaluate these clients.

    Attributes:
        action: "train" or "evaluate".
        server_round: The round, from 1.
        client_ids: The chunk's members in client order.
        absent: Members whose slot stays neutral (dropped out, or the culprit of a fault).
        layout: Fingerprint of the layout that the payloads follow.
        shared: What all members receive.
        personal: What each receives, one row per member.
        state: The members' memories, one row each; empty when none of them has any.
        has_state: Which members have trained before (the others get their initial memory).
    """

    action: Literal["train", "evaluate"]
    server_round: int
    client_ids: tuple[int, ...]
    absent: tuple[bool, ...]
    layout: str
    shared: Payload
    personal: Payload = field(default_factory=Payload)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    has_state: tuple[bool, ...] = ()


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk's members return, one row per member in client order.

    Attributes:
        params: `[C, dim]` after training; None after evaluation.
        buffers: By name, `[C, ...]`, each in its own dtype.
        extra: What the procedure returns besides the model, `[C, ...]`.
        state: The members' memories after the round.
        num_examples: int64 `[C]`; 0 for a neutral slot.
        metrics: float64 `[C]` by name.
    """

    params: Tensor | None
    buffers: dict[str, Tensor]
    extra: dict[str, Tensor]
    state: dict[str, Tensor]
    num_examples: Tensor
    metrics: dict[str, Tensor]


class SeededDropout(nn.Module):
    """Dropout whose mask is data: `noise` holds uniform numbers drawn from (seed, round, client).

    Scales by 1/(1-p) in training and is the identity in evaluation, as torch's own.
    """

    noise: Tensor

    def __init__(self, p: float, *, channels: bool = False) -> None:
        super().__init__()
        self.p = p
        self.channels = channels
        self.register_buffer("noise", torch.zeros(()), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Drop the values whose noise lies below p."""
        if not self.training or self.p == 0:
            return values
        if self.p == 1:
            return values * 0
        return values * (self.noise >= self.p).to(values.dtype) / (1 - self.p)


_DROPOUTS: dict[type[nn.Module], bool] = {
    nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True
}  # fmt: skip


def seed_dropout(model: nn.Module) -> nn.Module:
    """Replace torch's dropout layers by seeded ones, in place, and return the model."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.modules.dropout._DropoutNd) and type(child) in _DROPOUTS:
            setattr(model, name, SeededDropout(child.p, channels=_DROPOUTS[type(child)]))
        else:
            seed_dropout(child)
    return model


def loop_reason(model: nn.Module) -> str | None:
    """Say why a model cannot be vectorised over clients, or None when it can as far as is known.

    Example:
        >>> loop_reason(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        "BatchNorm1d '1' updates its running statistics in place"
        >>> loop_reason(nn.Linear(2, 2)) is None
        True
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        statistics = getattr(module, "track_running_stats", False)
        if isinstance(module, nn.modules.batchnorm._NormBase) and statistics:
            return f"{kind} '{name}' updates its running statistics in place"
        if isinstance(module, nn.RNNBase):
            return f"{kind} '{name}' has no batching rule in torch.func.vmap"
    return None


class CohortExecutor:
    """Trains and evaluates chunks of clients of one task, with one procedure, on one device.

    Args:
        task: Model, loss and metrics.
        procedure: Local training.
        data: The clients' samples.
        seed: The scenario's seed.
        kind: "vmap" or "loop" (see the module's text).
        threads: Threads of torch's kernels; part of the bits, hence pinned.
        device: Where to compute.
        evaluation_batch: Samples per forward pass in evaluation; part of the bits.
    """

    def __init__(
        self,
        task: TaskLike,
        procedure: ClientProcedure,
        data: ClientArrays,
        *,
        seed: int,
        kind: ExecutorKind = "vmap",
        threads: int = 1,
        device: str = "cpu",
        evaluation_batch: int = 1000,
    ) -> None:
        self.task, self.procedure, self.data = task, procedure, data
        self.seed, self.kind, self.threads = seed, kind, threads
        self.device = torch.device(device)
        self.evaluation_batch = evaluation_batch
        model = task.build_model(seed)
        self.layout = Layout.from_model(model)
        self.model = seed_dropout(model).to(self.device)
        self._dropouts = {
            f"{name}.noise": module
            for name, module in self.model.named_modules()
            if isinstance(module, SeededDropout)
        }
        self._noise_shapes: dict[str, tuple[int, ...]] | None = None
        self._pools: dict[int, tuple[np.ndarray, Tensor]] = {}

    def train(self, job: ChunkJob, out: Tensor | None = None) -> ChunkResult:
        """Train the chunk's members.

        Args:
            job: The chunk.
            out: Where the parameters go, `[C, dim]`; None allocates on the CPU.

        Raises:
            ValueError: If the payload does not follow this model's layout.
        """
        self._check(job)
        with _threads(self.threads):
            self.model.train()
            return self._train_loop(job, out) if self.kind == "loop" else self._train_vmap(job, out)

    def evaluate(self, job: ChunkJob) -> ChunkResult:
        """Evaluate the model received on each member's local test split."""
        self._check(job)
        with _threads(self.threads), torch.no_grad():
            self.model.eval()
            return self._evaluate(job)

    def evaluate_arrays(
        self,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        features: np.ndarray,
        targets: np.ndarray,
    ) -> dict[str, float]:
        """Evaluate one model on one set of samples; returns the task's metrics."""
        named = self._to_device({**self.layout.unflatten(params), **buffers})
        with _threads(self.threads), torch.no_grad():
            self.model.eval()
            pool = self._pool(features), self._pool(targets)
            rows = torch.arange(len(targets), device=self.device)
            return self.task.metrics(self._sums(named, pool, rows))

    # --- training -------------------------------------------------------------------------

    def _train_vmap(self, job: ChunkJob, out: Tensor | None) -> ChunkResult:
        members = list(range(len(job.client_ids)))
        slots = members if len(members) > 1 else members * 2
        plan = _Schedule(self, job, slots)
        received, state = self._received(job, slots), self._state(job, slots)
        params, buffers, extra = received
        carry = vmap(self.procedure.begin)(params, buffers, extra, state)
        start = (params, buffers)
        losses = torch.zeros(len(slots), dtype=torch.float64, device=self.device)

        def one_step(carry: Carry, batch: Batch) -> tuple[Carry, Tensor]:
            return self.procedure.step(carry, batch, self._gradient, server_round=job.server_round)

        for step in range(plan.num_steps):
            batch = plan.batch(step)
            moved, loss = vmap(one_step)(carry, batch)
            active = plan.counts_on_device[:, step] > 0
            carry = moved if plan.all_active(step) else _select(active, moved, carry)
            counts = plan.counts_on_device[:, step].double()
            losses += torch.where(active, loss.double() * counts, 0.0)
        reply_extra, new_state = vmap(self.procedure.finish)(carry, state)
        # a client without steps hands back exactly what it received, whatever `begin` made of it
        params, buffers = carry["params"], {**start[1], **carry["buffers"]}
        keep = slice(0, len(members))
        flat = self.layout.flatten({n: p[keep] for n, p in params.items()}, out)
        return ChunkResult(
            params=flat if out is not None else flat.cpu(),
            buffers=_rows(buffers, keep),
            extra=_rows(reply_extra, keep),
            state=_rows(new_state, keep),
            num_examples=plan.num_examples[keep],
            metrics={"loss": _mean(losses.cpu(), plan.seen)[keep]},
        )

    def _train_loop(self, job: ChunkJob, out: Tensor | None) -> ChunkResult:
        members = list(range(len(job.client_ids)))
        plan = _Schedule(self, job, members)
        (params, buffers, extra), state = self._received(job, members), self._state(job, members)
        results: list[tuple[Named, Named, Named, Named]] = []
        losses = torch.zeros(len(members), dtype=torch.float64)
        for slot in members:
            memory = _row(state, slot)
            mine = {n: b.clone() for n, b in _row(buffers, slot).items()}
            carry = self.procedure.begin(_row(params, slot), mine, _row(extra, slot), memory)
            for step in range(int(plan.steps[slot])):
                count = int(plan.counts[slot, step])
                carry, loss = self.procedure.step(
                    carry,
                    plan.single(slot, step),
                    self._gradient_single,
                    server_round=job.server_round,
                )
                losses[slot] += float(loss) * count
            reply_extra, memory = self.procedure.finish(carry, memory)
            results.append((carry["params"], {**mine, **carry["buffers"]}, reply_extra, memory))
        stacked: list[Named] = [
            {n: torch.stack([r[part][n] for r in results]) for n in results[0][part]}
            for part in range(4)
        ]
        every = slice(0, len(members))
        flat = self.layout.flatten(stacked[0], out)
        return ChunkResult(
            params=flat if out is not None else flat.cpu(),
            buffers=_rows(stacked[1], every),
            extra=_rows(stacked[2], every),
            state=_rows(stacked[3], every),
            num_examples=plan.num_examples,
            metrics={"loss": _mean(losses, plan.seen)},
        )

    @property
    def _gradient(self) -> Gradient:
        def gradient(
            params: Named, buffers: Named, batch: Batch, objective: Objective | None = None
        ) -> tuple[Tensor, Named, Named]:
            def loss_of(params: Named) -> Tensor:
                outputs = functional_call(
                    self.model, (params, buffers, dict(batch.noise)), (batch.features,)
                )
                return self._loss(outputs, batch, objective)

            grads, loss = grad_and_value(loss_of)(params)
            return loss, grads, buffers

        return gradient

    @property
    def _gradient_single(self) -> Gradient:
        def gradient(
            params: Named, buffers: Named, batch: Batch, objective: Objective | None = None
        ) -> tuple[Tensor, Named, Named]:
            # plain autograd: a model may update its buffers in place here
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
            after = {n: b.clone() for n, b in buffers.items()}
            outputs = functional_call(
                self.model, (leaves, after, dict(batch.noise)), (batch.features,)
            )
            loss = self._loss(outputs, batch, objective)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            named = {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(leaves.items(), grads, strict=True)
            }
            return loss.detach(), named, after

        return gradient

    def _loss(self, outputs: Tensor, batch: Batch, objective: Objective | None) -> Tensor:
        if objective is not None:
            return objective(outputs, batch.targets, batch.weights)
        losses = self.task.sample_losses(outputs, batch.targets)
        # `where` and not a product: a padding sample's loss may be anything
        kept = torch.where(batch.weights > 0, losses, torch.zeros_like(losses))
        return kept.sum() / batch.weights.sum().clamp(min=1)

    # --- evaluation -----------------------------------------------------------------------

    def _evaluate(self, job: ChunkJob) -> ChunkResult:
        members = list(range(len(job.client_ids)))
        present = [slot for slot in members if not job.absent[slot]]
        drawn = self.data.clients([job.client_ids[s] for s in present], split="test")
        pool = self._pool(drawn.features), self._pool(drawn.targets)
        rows = [torch.zeros(0, dtype=torch.int64)] * len(members)
        for slot, chosen in zip(present, drawn.rows, strict=True):
            rows[slot] = torch.from_numpy(np.asarray(chosen, dtype=np.int64))
        measure = self._sums_one_by_one if self.kind == "loop" else self._sums_together
        metrics = [self.task.metrics(sums) for sums in measure(job, pool, rows)]
        columns = {
            name: torch.tensor([row[name] for row in metrics], dtype=torch.float64)
            for name in metrics[0]
        }
        num_examples = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        return ChunkResult(None, {}, {}, {}, num_examples, columns)

    def _sums(self, named: Named, pool: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, float]:
        """The task's statistics of one model over the given rows, batch by batch."""
        sums: dict[str, float] = {}
        for start in range(0, max(len(rows), 1), self.evaluation_batch):
            index = rows[start : start + self.evaluation_batch]
            outputs = functional_call(self.model, named, (self._cast(pool[0][index]),))
            ones = torch.ones(len(index), dtype=self.task.dtype, device=self.device)
            for name, value in self.task.statistics(outputs, pool[1][index], ones).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _sums_one_by_one(
        self, job: ChunkJob, pool: tuple[Tensor, Tensor], rows: list[Tensor]
    ) -> list[dict[str, float]]:
        params, buffers, _ = self._received(job, list(range(len(rows))))
        return [
            self._sums({**_row(params, slot), **_row(buffers, slot)}, pool, mine.to(self.device))
            for slot, mine in enumerate(rows)
        ]

    def _sums_together(
        self, job: ChunkJob, pool: tuple[Tensor, Tensor], rows: list[Tensor]
    ) -> list[dict[str, float]]:
        slots = list(range(len(rows))) if len(rows) > 1 else [0, 0]
        params, buffers, _ = self._received(job, slots)
        longest = max(len(rows[slot]) for slot in slots)
        index = torch.zeros((len(slots), max(longest, 1)), dtype=torch.int64)
        weights = torch.zeros(index.shape, dtype=self.task.dtype)
        for place, slot in enumerate(slots):
            index[place, : len(rows[slot])] = rows[slot]
            weights[place, : len(rows[slot])] = 1
        index, weights = index.to(self.device), weights.to(self.device)

        def statistics(named: Named, x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return self.task.statistics(functional_call(self.model, named, (x,)), y, weight)

        sums: dict[str, Tensor] = {}
        # a constant step: how a client's samples are cut must not depend on its neighbours
        for start in range(0, index.shape[1], _EVALUATION_STEP):
            picked = index[:, start : start + _EVALUATION_STEP]
            weight = weights[:, start : start + _EVALUATION_STEP]
            short = _EVALUATION_STEP - picked.shape[1]
            picked, weight = (nn.functional.pad(t, (0, short)) for t in (picked, weight))
            part = vmap(statistics)(
                {**params, **buffers}, self._cast(pool[0][picked]), pool[1][picked], weight
            )
            sums = {n: sums[n] + v.double() if n in sums else v.double() for n, v in part.items()}
        return [{n: float(v[place]) for n, v in sums.items()} for place in range(len(rows))]

    # --- inputs ---------------------------------------------------------------------------

    def _check(self, job: ChunkJob) -> None:
        if job.layout != self.layout.fingerprint:
            raise ValueError(
                f"the model received has layout {job.layout}, this client's model has "
                f"{self.layout.fingerprint}; is [task] the same on server and client?"
            )

    def _received(self, job: ChunkJob, slots: list[int]) -> tuple[Named, Named, Named]:
        def stack(shared: Mapping[str, Tensor], personal: Mapping[str, Tensor]) -> Named:
            rows = {n: t.to(self.device)[slots] for n, t in personal.items()}
            lead = len(slots)
            common = {
                n: t.to(self.device).expand(lead, *t.shape)
                for n, t in shared.items()
                if n not in rows
            }
            return {**common, **rows}

        shared = {} if job.shared.params is None else self.layout.unflatten(job.shared.params)
        personal = {} if job.personal.params is None else self.layout.unflatten(job.personal.params)
        params = {n: t.contiguous() for n, t in stack(shared, personal).items()}
        buffers = {
            n: t.contiguous() for n, t in stack(job.shared.buffers, job.personal.buffers).items()
        }
        return params, buffers, stack(job.shared.extra, job.personal.extra)

    def _state(self, job: ChunkJob, slots: list[int]) -> Named:
        params, _, _ = self._received(job, slots)
        first = {n: t.contiguous() for n, t in vmap(self.procedure.initial_state)(params).items()}
        if not job.state:
            return first
        known = torch.tensor([job.has_state[slot] for slot in slots], device=self.device)
        saved = {n: job.state[n].to(self.device)[slots] for n in first}
        state: Named = _select(known, saved, first)
        return state

    def _pool(self, array: np.ndarray) -> Tensor:
        """The array on the device; the last few pools stay there."""
        held = self._pools.pop(id(array), None)
        if held is None:
            with warnings.catch_warnings():
                # maps are read-only on purpose; nothing here writes into them
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                held = (array, torch.from_numpy(np.asarray(array)).to(self.device))
        self._pools[id(array)] = held
        while len(self._pools) > _POOLS_KEPT:
            self._pools.pop(next(iter(self._pools)))
        return held[1]

    def _cast(self, features: Tensor) -> Tensor:
        return features.to(self.task.dtype) if features.is_floating_point() else features

    def _to_device(self, named: Mapping[str, Tensor]) -> Named:
        return {name: tensor.to(self.device) for name, tensor in named.items()}

    def _noise_shape(self, features: Tensor) -> dict[str, tuple[int, ...]]:
        """Input shape of every dropout layer for one sample, found by one forward pass."""
        if self._noise_shapes is None:
            shapes: dict[str, tuple[int, ...]] = {}

            def record(name: str, module: SeededDropout, values: Tensor) -> None:
                if name in shapes:
                    raise ValueError(
                        f"dropout layer '{name.removesuffix('.noise')}' is used more than once in "
                        "one forward pass; give each use a layer of its own"
                    )
                full = tuple(values.shape[1:])
                shapes[name] = (*full[:1], *(1 for _ in full[1:])) if module.channels else full

            hooks = [
                module.register_forward_pre_hook(lambda m, args, n=name: record(n, m, args[0]))
                for name, module in self._dropouts.items()
            ]
            training = self.model.training
            self.model.eval()
            try:
                with torch.no_grad():
                    self.model(features[:1])
            finally:
                self.model.train(training)
                for hook in hooks:
                    hook.remove()
            self._noise_shapes = shapes
        return self._noise_shapes


class _Schedule:
    """Which samples each slot takes in which step, and the noise of its dropout layers."""

    def __init__(self, executor: CohortExecutor, job: ChunkJob, slots: list[int]) -> None:
        self._executor = executor
        work = executor.procedure.work
        present = sorted({slot for slot in slots if not job.absent[slot]})
        ids = [job.client_ids[slot] for slot in present]
        drawn = executor.data.clients(ids) if ids else None
        rows = dict(zip(present, drawn.rows, strict=True)) if drawn is not None else {}
        nothing = np.zeros(0, dtype=np.int64)
        self._rows = [rows.get(slot, nothing) for slot in slots]
        sizes = [len(r) for r in self._rows]
        self.steps = np.array([work.num_steps(size) for size in sizes], dtype=np.int64)
        self.num_steps = int(self.steps.max(initial=0))
        self.num_examples = torch.tensor(sizes, dtype=torch.int64)
        batch = work.batch_size
        indices = np.zeros((len(slots), self.num_steps, batch), dtype=np.int64)
        self.counts = np.zeros((len(slots), self.num_steps), dtype=np.int64)
        order = dict[int, tuple[np.ndarray, np.ndarray]]()
        for place, slot in enumerate(slots):
            if self.steps[place]:
                if slot not in order:
                    order[slot] = _batches(
                        self._rows[place],
                        batch,
                        int(self.steps[place]),
                        generator(executor.seed, "batches", job.server_round, job.client_ids[slot]),
                    )
                indices[place, : self.steps[place]], self.counts[place, : self.steps[place]] = (
                    order[slot]
                )
        self.seen = torch.from_numpy(self.counts.sum(axis=1))
        device = executor.device
        self._indices = torch.from_numpy(indices).to(device)
        self.counts_on_device = torch.from_numpy(self.counts).to(device)
        self._position = torch.arange(batch, device=device)
        if drawn is not None and self.num_steps:
            self._features, self._targets = (
                executor._pool(drawn.features),
                executor._pool(drawn.targets),
            )
        self._noise_sources = [
            generator(executor.seed, "dropout", job.server_round, job.client_ids[slot])
            for slot in slots
        ]  # a doubled client draws the same numbers twice

    def all_active(self, step: int) -> bool:
        return bool((self.counts[:, step] > 0).all())

    def batch(self, step: int) -> Batch:
        """All slots' samples of one step, `[slots, batch, ...]`."""
        executor = self._executor
        index = self._indices[:, step]
        weights = self._position < self.counts_on_device[:, step, None]
        features = executor._cast(self._features[index])
        return Batch(
            features,
            self._targets[index],
            weights.to(executor.task.dtype),
            self._noise(features[0], [step < n for n in self.steps], len(self._position)),
        )

    def single(self, slot: int, step: int) -> Batch:
        """One slot's samples of one step without padding."""
        executor = self._executor
        count = int(self.counts[slot, step])
        index = self._indices[slot, step, :count]
        features = executor._cast(self._features[index])
        active = [place == slot for place in range(len(self.steps))]
        noise = self._noise(features, active, len(self._position))
        return Batch(
            features,
            self._targets[index],
            torch.ones(count, dtype=executor.task.dtype, device=executor.device),
            {name: values[slot, :count] for name, values in noise.items()},
        )

    def _noise(self, features: Tensor, active: Sequence[bool], batch: int) -> dict[str, Tensor]:
        executor = self._executor
        if not executor._dropouts:
            return {}
        shapes = executor._noise_shape(features)
        noise = {
            name: np.zeros((len(active), batch, *shapes[name]), dtype=np.float32)
            for name in executor._dropouts
        }
        for place, draws in enumerate(active):
            if draws:
                for values in noise.values():
                    self._noise_sources[place].random(out=values[place], dtype=np.float32)
        return {
            name: torch.from_numpy(values).to(executor.device) for name, values in noise.items()
        }


def _batches(
    rows: np.ndarray, batch: int, steps: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut reshuffled passes over `rows` into `steps` batches; padding repeats a sample."""
    indices = np.empty((steps, batch), dtype=np.int64)
    counts = np.empty(steps, dtype=np.int64)
    per_pass = -(-len(rows) // batch)
    padded = np.empty(per_pass * batch, dtype=np.int64)
    tail = len(rows) - (per_pass - 1) * batch
    for start in range(0, steps, per_pass):
        padded[: len(rows)] = random.permutation(rows)
        padded[len(rows) :] = padded[(per_pass - 1) * batch]
        take = min(per_pass, steps - start)
        indices[start : start + take] = padded.reshape(per_pass, batch)[:take]
        counts[start : start + take] = batch
        if take == per_pass:
            counts[start + per_pass - 1] = tail
    return indices, counts


def _select(condition: Tensor, chosen: Any, other: Any) -> Any:
    """Rows of `chosen` where the condition `[C]` holds, else of `other`, over whole trees."""

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(condition.view(-1, *(1,) * (new.dim() - 1)), new, old)

    return pytree.tree_map(pick, chosen, other)


def _rows(named: Mapping[str, Tensor], index: slice) -> dict[str, Tensor]:
    return {name: tensor[index].cpu() for name, tensor in named.items()}


def _row(named: Mapping[str, Tensor], slot: int) -> Named:
    return {name: tensor[slot] for name, tensor in named.items()}


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp(min=1)


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
