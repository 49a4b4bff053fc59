"""The cohort executor: trains and evaluates a chunk of clients as one batch. Needs torch alone.

Three executors give the same numbers up to rounding. `batched` is for models that are chains of
known layers (`client.chains`), whose passes are written out: dense chains train a whole chunk by
batched products, chains with convolutions one client after another. `vmap` runs every step of the
whole chunk as one batched call under `torch.func.vmap`: clients of unequal size are padded, padding
steps are undone exactly, and padding samples carry weight 0. `loop` takes the clients one after
another with batches of their true sizes, for models that cannot be vectorised.

The bits of a client's result depend at most on the number of slots in its chunk (torch picks
kernels by shape), never on its neighbours or its place among them. Where clients train together
there are at least two slots: a lone client is doubled.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree

from fedsim.basics.generators import put_back, seed_all
from fedsim.basics.kept_state import KeptState
from fedsim.basics.loading import loads
from fedsim.basics.rng import derived_seed
from fedsim.basics.samples import SampleSpec
from fedsim.client.batching.augmentation import Augmentation
from fedsim.client.batching.batches import Batches
from fedsim.client.batching.dropout import dropout_layers, noise_shapes, seed_dropout
from fedsim.client.batching.poison import Poison
from fedsim.client.batching.schedule import Schedule, steps_taken
from fedsim.client.chains.chain import chain_of
from fedsim.client.chains.stepping import Stepping
from fedsim.client.chains.training import ChainTraining, owned
from fedsim.client.evaluation import Evaluation
from fedsim.client.procedure import (
    GUIDANCE,
    Batch,
    Carry,
    ClientProcedure,
    Descent,
    Gradient,
    Named,
    Objective,
    Work,
    descent_of,
    stacks,
)
from fedsim.messages.layout import Layout, Payload, Rows

ExecutorKind = Literal["batched", "vmap", "loop"]
Action = Literal["train", "evaluate"]

_POOLS_KEPT = 6  # features and targets of the train, local test and server test pools
_SETTINGS_KEPT = 8  # executors under settings of a round's config
LARGE = 100_000  # parameters from which steps cost more to take than to start
_STATISTICS = "buffers."  # what a client's own buffers are called in its memory


class ClientArrays(Protocol):
    """The data of federated clients, as `fedsim.data.FederatedData` offers it."""

    num_clients: int
    spec: SampleSpec

    def sizes(self, client_ids: Sequence[int]) -> Any:
        """Return each client's number of training samples."""

    def clients(self, client_ids: Sequence[int], *, split: str = "train") -> Any:
        """Return pooled features and targets with each client's row numbers."""


class SettingsError(ValueError):
    """A round's config asks for what these clients cannot do."""


class Settings(Protocol):
    """What a procedure's hyperparameters may be in a round, as `ClientSettings` offers it."""

    def overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters that a config gives other values."""

    def procedure(self, overrides: Mapping[str, Any]) -> ClientProcedure:
        """Return the procedure with these values."""


class TaskLike(Protocol):
    """Loss and metrics, as `fedsim.tasks.Task` offers them."""

    dtype: torch.dtype

    def build_model(self, seed: int) -> nn.Module:
        """Return the model with the initial parameters of that seed."""

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per sample."""

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return additive sums over the samples that are not padding."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
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
        work: The share of its local work that each member does, in (0, 1]; none given when all do
            the whole.
        clipping_norm: Bound on the Euclidean norm of each member's update; None does not clip.
        settings: Hyperparameters of the procedure that have other values for these members.
    """

    action: Action
    server_round: int
    client_ids: tuple[int, ...]
    absent: tuple[bool, ...]
    layout: str
    shared: Payload
    personal: Payload = field(default_factory=Payload)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    has_state: tuple[bool, ...] = ()
    work: tuple[float, ...] = ()
    clipping_norm: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk's members return, one row per member in client order.

    Attributes:
        params: `[C, dim]` after training, or its rows; None after evaluation.
        buffers: By name, `[C, ...]`, each in its own dtype.
        extra: What the procedure returns besides the model, `[C, ...]`.
        state: The members' memories after the round.
        num_examples: int64 `[C]`; 0 for a neutral slot.
        metrics: float64 `[C]` by name.
        samples: Over all steps of training, those of the members.
        computed: What the model was given for them, padding included.
        seconds: How long the worker took for it.
    """

    params: Rows | None
    buffers: dict[str, Tensor]
    extra: dict[str, Tensor]
    state: dict[str, Tensor]
    num_examples: Tensor
    metrics: dict[str, Tensor]
    samples: int = 0
    computed: int = 0
    seconds: float = 0.0


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
        kind: "batched", "vmap" or "loop" (see the module's text).
        threads: Threads of torch's kernels; part of the bits, hence pinned.
        device: Where to compute.
        deterministic: Whether a GPU is held to kernels that give the same bits every time.
        evaluation_batch: Samples per forward pass in evaluation; part of the bits.
        augmentation: What happens to training samples; None leaves them as they are.
        buffers: What becomes of the model's statistics (its buffers that are no frozen parameters)
            after training: "average" returns them; "local" keeps them in the client's memory, from
            which it goes on in its next round and evaluates, and returns what was received;
            "reset" forgets them and returns what was received.
        poison: What attackers do to their samples; None when nobody attacks data.
        puts_back: Whether what model, procedure and task keep beside the tensors is put back for
            every client and evaluation, see `fedsim.basics.kept_state`; for code of the user's own.
        seeds_dropout: Whether torch's dropout layers take masks that are drawn before a pass; else
            they draw by themselves, in a loop.
        settings: What becomes of the procedure where a strategy tells clients so; None obeys none.
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
        deterministic: bool = True,
        evaluation_batch: int = 1000,
        augmentation: Augmentation | None = None,
        buffers: Literal["average", "local", "reset"] = "average",
        poison: Poison | None = None,
        puts_back: bool = False,
        seeds_dropout: bool = True,
        settings: Settings | None = None,
    ) -> None:
        self.task, self.procedure, self.data = task, procedure, data
        self._settings = settings
        self._under: dict[str, CohortExecutor] = {}
        self._augmentation, self._poison = augmentation, poison
        self.seed, self.kind, self.threads = seed, kind, threads
        self.device = torch.device(device)
        self.evaluation_batch = evaluation_batch
        if self.device.type == "cuda" and deterministic:
            # cuBLAS reads it when its first handle is made
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        model = task.build_model(seed)
        self.layout = Layout.from_model(model)
        frozen = dict(model.named_parameters(remove_duplicate=False))
        statistics = [spec.name for spec in self.layout.buffers if spec.name not in frozen]
        # statistics that no reply holds, and those of them that a client remembers
        self._unsent = [] if buffers == "average" else statistics
        self._remembered = statistics if buffers == "local" else []
        self.model = (seed_dropout(model) if seeds_dropout else model).to(self.device)
        self._kept: KeptState | None = None
        if puts_back:
            self._kept = KeptState([self.model, procedure, task], self.layout.names)
        self._dropouts = dropout_layers(self.model)
        self._noise_shapes: dict[str, tuple[int, ...]] | None = None
        self._reused: Named = {}  # parameters of the chunk that is trained in place
        self._pools: dict[int, tuple[np.ndarray, Tensor]] = {}
        self._chain_training: ChainTraining | None = None
        if kind == "batched":
            chain = chain_of(self.model, data.spec.feature_shape)
            if chain is None:
                raise ValueError('kind = "batched": the model is no chain of known layers')
            if not (stacks(procedure) or chain.convolves):
                raise ValueError('kind = "batched": the procedure steps one client at a time')
            self._chain_training = ChainTraining(chain, task, procedure, self._loss)
        # one client after another, with batches of their true sizes
        self._one_by_one = kind == "loop" or (
            self._chain_training is not None and self._chain_training.chain.convolves
        )

    @property
    def pads(self) -> bool:
        """Whether the clients of a chunk wait for the one that takes most steps."""
        training = self._chain_training
        if training is None:
            return self.kind == "vmap"
        stepped = self.layout.dim < LARGE and descent_of(self.procedure, 1) is None
        return stepped and not training.chain.convolves

    @property
    def evaluates_with_memory(self) -> bool:
        """Whether a client's own memory takes part when it evaluates."""
        return bool(self._remembered)

    def train(self, job: ChunkJob, out: Rows | None = None) -> ChunkResult:
        """Train the chunk's members.

        Args:
            job: The chunk.
            out: Where the parameters go, `[C, dim]` or its rows; None allocates on the CPU.

        Raises:
            ValueError: If the payload does not follow this model's layout.
        """
        self._check(job)
        with _threads(self.threads), self._anew():
            self.model.train()
            if self._one_by_one or self._trains_alone(job):
                with self._generators_put_back():
                    return self._train_one_by_one(job, out)
            if self._chain_training is not None:
                return self._train_together(job, out, self._chain_training)
            with loads("vmap"):
                return self._train_vmap(job, out)

    def settings_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the procedure's hyperparameters that an instruction gives other values."""
        return {} if self._settings is None else self._settings.overrides(config)

    def under(self, settings: Mapping[str, Any]) -> "CohortExecutor":
        """Return this executor with other hyperparameters of its procedure.

        Args:
            settings: Hyperparameters by name, see `settings_of`; the last few are kept.

        Raises:
            ValueError: If a value is impossible.
            SettingsError: If these clients cannot have it.
        """
        kind = repr(sorted(settings.items()))
        made = self._under.pop(kind, None) or self._with(settings)
        self._under[kind] = made
        while len(self._under) > _SETTINGS_KEPT:
            self._under.pop(next(iter(self._under)))
        return made

    def _with(self, settings: Mapping[str, Any]) -> "CohortExecutor":
        assert self._settings is not None
        procedure = self._settings.procedure(settings)
        told = ", ".join(f"{name} = {value!r}" for name, value in settings.items())
        if _memory(procedure, self.model) != _memory(self.procedure, self.model):
            raise SettingsError(
                f"{told}: clients would remember other tensors than under "
                "[client]; set it there, for all rounds"
            )
        if procedure.needs_classes and not self.data.spec.has_classes:
            raise SettingsError(f"{told}: needs targets that are classes")
        made = copy.copy(self)
        made.procedure, made._under, made._reused = procedure, {}, {}
        if self._kept is not None:
            self._kept.put_back()
            made._kept = KeptState([self.model, procedure, self.task], self.layout.names)
        if self._chain_training is not None:
            chain = self._chain_training.chain
            made._chain_training = ChainTraining(chain, self.task, procedure, made._loss)
        return made

    def rehearse(self, features: Tensor, targets: Tensor) -> None:
        """Let torch load what it loads at the first gradient; "batched" only.

        Args:
            features: Samples of two clients, `[2, n, ...]`.
            targets: Their targets.
        """
        training = self._chain_training
        if training is None:
            return
        shapes = self._noise_shape(features[0])
        noise = {n: torch.ones(features.shape[:2] + shape) for n, shape in shapes.items()}
        weights = torch.ones(features.shape[:2], dtype=self.task.dtype)
        batch = Batch(features, targets, weights, noise)
        params = {n: p.detach() for n, p in self.model.named_parameters()}
        with _threads(self.threads):
            if self._one_by_one:
                first = Batch(features[0], targets[0], weights[0], _row(noise, 0))
                training.gradient(params, {}, first)
            else:
                pairs = {n: torch.stack([p, p]) for n, p in params.items()}
                training.gradient(pairs, {}, batch)

    def evaluate(self, job: ChunkJob) -> ChunkResult:
        """Evaluate the model received on each member's local test split.

        A member that keeps its statistics to itself evaluates with those that it has.
        """
        self._check(job)
        with _threads(self.threads), torch.no_grad(), self._anew():
            self.model.eval()
            return self._evaluate(job)

    def evaluate_arrays(
        self,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        features: np.ndarray,
        targets: np.ndarray,
        rows: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Evaluate one model on one set of samples; returns the task's metrics.

        Args:
            params: The model, `[dim]`.
            buffers: Its buffers.
            features: A pool of samples, `[n, ...]`.
            targets: Their targets.
            rows: Which of them, int64; None takes all.
        """
        named = self._to_device({**self.layout.unflatten(params), **buffers})
        if self._kept is not None:  # as for clients
            named = {n: t.clone() for n, t in named.items()}
        with _threads(self.threads), torch.no_grad(), self._anew():
            self.model.eval()
            pool = self._pool(features), self._pool(targets)
            chosen = torch.arange(len(targets)) if rows is None else torch.from_numpy(rows)
            return self._evaluation.one(named, pool, chosen.to(self.device))

    # --- training -------------------------------------------------------------------------

    def _train_together(
        self, job: ChunkJob, out: Rows | None, training: ChainTraining
    ) -> ChunkResult:
        """Train a dense chain: clients in descending order of their steps, one product for all."""
        members = list(range(len(job.client_ids)))
        doubled = members if len(members) > 1 else members * 2
        descent = self._descent(job)
        slots, batches = self._batches(job, doubled, longest_first=True, reuse=descent is not None)
        row_of = np.argsort(slots, kind="stable")[: len(members)]  # of each member
        picks = slice(0, len(members)) if slots == doubled else row_of
        with torch.no_grad():
            params, buffers, sent = self._received(job, slots, reuse=descent is not None)
            if descent is not None:
                memory = self._state(job, slots, params) if descent.keeps_moments else {}
                stepping = _stepping(descent, params, sent, memory)
                losses = training.descend_together(params, batches, stepping)
                extra: Named = {}
                state = stepping.moments if descent.keeps_moments else {}
            else:
                memory = self._state(job, slots, params)
                carry = vmap(self.procedure.begin)(params, buffers, sent, memory)
                carry = pytree.tree_map(Tensor.contiguous, carry)
                carry, losses = training.step_together(carry, batches, job.server_round)
                extra, state = vmap(self.procedure.finish)(carry, memory)
                # whoever takes no step hands back exactly what it received
                idle = torch.from_numpy(batches.schedule.steps == 0)
                params = _select(idle, params, carry["params"])
            flat = self._laid(params, out, row_of.tolist())
            extra, state = ({n: t[picks] for n, t in part.items()} for part in (extra, state))
        every = slice(0, len(members))
        schedule = batches.schedule
        return ChunkResult(
            params=flat,
            buffers=_rows(self._received_buffers(job, members), every),
            extra=_rows(extra, every),
            state=_rows(state, every),
            num_examples=schedule.num_examples[row_of],
            metrics={"loss": _mean(torch.from_numpy(losses), schedule.seen)[row_of]},
            samples=int(schedule.seen[row_of].sum()),
            computed=schedule.computed(leaving=descent is not None),
        )

    def _trains_alone(self, job: ChunkJob) -> bool:
        """Whether a dense chain trains one client after another.

        So it does where it is large and `step` must be called: its tensors stay in a cache then,
        and no client waits for a longer one. A descent has neither trouble.
        """
        dense = self._chain_training is not None
        return dense and self.layout.dim >= LARGE and self._descent(job) is None

    def _descent(self, job: ChunkJob) -> Descent | None:
        """What steps do that the executor may take itself."""
        for name in (*job.shared.extra, *job.personal.extra):
            if name.partition(".")[0] != GUIDANCE:
                return None
        descent = descent_of(self.procedure, job.server_round)
        if descent is not None and descent.largest > torch.finfo(self.layout.dtype).max:
            # a product takes no such factor; with `step` the client is found not finite
            return None
        return descent

    def _train_vmap(self, job: ChunkJob, out: Rows | None) -> ChunkResult:
        members = list(range(len(job.client_ids)))
        slots = members if len(members) > 1 else members * 2
        _, batches = self._batches(job, slots)
        plan = batches.schedule
        params, received, extra = self._received(job, slots)
        state = self._state(job, slots, params)
        buffers = self._own_statistics(job, slots, received)
        carry = vmap(self.procedure.begin)(params, buffers, extra, state)
        losses = torch.zeros(len(slots), dtype=torch.float64, device=self.device)

        def one_step(carry: Carry, batch: Batch) -> tuple[Carry, Tensor]:
            return self.procedure.step(carry, batch, self._gradient, server_round=job.server_round)

        for step in range(plan.num_steps):
            moved, loss = vmap(one_step)(carry, batches.together(step))
            counts = plan.samples(step)
            active = counts > 0
            carry = moved if plan.all_active(step) else _select(active, moved, carry)
            losses += torch.where(active, loss.double() * counts, 0.0)
        reply_extra, new_state = vmap(self.procedure.finish)(carry, state)
        # a client without steps hands back exactly what it received, whatever `begin` made of it
        params, buffers = carry["params"], {**buffers, **carry["buffers"]}
        keep = slice(0, len(members))
        buffers, new_state = self._parted(received, buffers, new_state)
        return ChunkResult(
            params=self._laid({n: p[keep] for n, p in params.items()}, out),
            buffers=_rows(buffers, keep),
            extra=_rows(reply_extra, keep),
            state=_rows(new_state, keep),
            num_examples=plan.num_examples[keep],
            metrics={"loss": _mean(losses.cpu(), plan.seen)[keep]},
            samples=int(plan.seen[keep].sum()),
            computed=plan.computed(),
        )

    def _train_one_by_one(self, job: ChunkJob, out: Rows | None) -> ChunkResult:
        members = list(range(len(job.client_ids)))
        training = self._chain_training
        descent = None if training is None else self._descent(job)
        gradient = self._gradient_single if training is None else training.gradient
        _, batches = self._batches(job, members, reuse=descent is not None)
        plan = batches.schedule
        params, received, extra = self._received(job, members)
        state = self._state(job, members, params)
        buffers = self._own_statistics(job, members, received)
        losses = torch.zeros(len(members), dtype=torch.float64)
        results: list[tuple[Named, Named, Named, Named]] = []
        for slot in members:
            memory = _row(state, slot)
            mine = {n: b.clone() for n, b in _row(buffers, slot).items()}
            if training is not None and descent is not None:
                trained, memory = owned(_row(params, slot)), owned(memory)
                stepping = _stepping(descent, trained, _row(extra, slot), memory)
                with torch.no_grad():
                    losses[slot] = training.descend_alone(trained, batches, slot, stepping)
                results.append((trained, mine, {}, memory))
                continue
            self._begin_anew(job.server_round, job.client_ids[slot])
            carry = self.procedure.begin(_row(params, slot), mine, _row(extra, slot), memory)
            for step in range(int(plan.steps[slot])):
                carry, loss = self.procedure.step(
                    carry, batches.single(slot, step), gradient, server_round=job.server_round
                )
                losses[slot] += float(loss) * int(plan.counts[slot, step])
            reply_extra, memory = self.procedure.finish(carry, memory)
            results.append((carry["params"], {**mine, **carry["buffers"]}, reply_extra, memory))
        stacked: list[Named] = [
            {n: torch.stack([r[part][n] for r in results]) for n in results[0][part]}
            for part in range(4)
        ]
        every = slice(0, len(members))
        buffers, new_state = self._parted(received, stacked[1], stacked[3])
        return ChunkResult(
            params=self._laid(stacked[0], out),
            buffers=_rows(buffers, every),
            extra=_rows(stacked[2], every),
            state=_rows(new_state, every),
            num_examples=plan.num_examples,
            metrics={"loss": _mean(losses, plan.seen)},
            samples=int(plan.seen.sum()),
            computed=int(plan.seen.sum()),
        )

    def _laid(self, params: Named, out: Rows | None, rows: list[int] | None = None) -> Rows:
        """The members' parameters where they are wanted, see `Layout.write`."""
        if out is not None and self.device.type == "cpu":
            self.layout.write(params, out, rows=rows)
            return out
        flat = self.layout.flatten(params, rows=rows).cpu()  # one way from a device for all
        if out is None:
            return flat
        for row, place in zip(flat, out, strict=True):
            place.copy_(row)
        return out

    def _begin_anew(self, *place: int) -> None:
        """Put back what a user's objects keep, and seed all generators for what is done next.

        Args:
            *place: Round and client of a training; nothing for an evaluation.
        """
        own: list[Any] = []
        if self._kept is not None:
            self._kept.put_back()
            own = self._kept.generators
        seed = derived_seed(self.seed, "layers" if place else "evaluation", *place)
        seed_all(seed, cuda=self.device.type == "cuda", own=own)

    @contextlib.contextmanager
    def _anew(self) -> Iterator[None]:
        """Begin anew, and put generators back at the end; nothing where only known code runs."""
        if self._kept is None:
            yield
            return
        with self._generators_put_back():
            self._begin_anew()
            try:
                yield
            finally:
                self._kept.put_back()

    def _generators_put_back(self) -> contextlib.AbstractContextManager[None]:
        return put_back(self.device if self.device.type == "cuda" else None)

    @property
    def _gradient(self) -> Gradient:
        def gradient(
            params: Named,
            buffers: Named,
            batch: Batch,
            objective: Objective | None = None,
            penalty: Objective | None = None,
        ) -> tuple[Tensor, Named, Named]:
            def loss_of(params: Named) -> tuple[Tensor, Tensor]:
                outputs = functional_call(
                    self.model, (params, buffers, dict(batch.noise)), (batch.features,)
                )
                return self._loss(outputs, batch, objective, penalty)

            grads, (_, loss) = grad_and_value(loss_of, has_aux=True)(params)
            return loss, grads, buffers

        return gradient

    @property
    def _gradient_single(self) -> Gradient:
        def gradient(
            params: Named,
            buffers: Named,
            batch: Batch,
            objective: Objective | None = None,
            penalty: Objective | None = None,
        ) -> tuple[Tensor, Named, Named]:
            # plain autograd: a model may update its buffers in place here
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
            named = {**leaves, **{n: b.clone() for n, b in buffers.items()}, **batch.noise}
            # whatever the model assigns anew is in `named` afterwards
            outputs = functional_call(self.model, named, (batch.features,))
            after = {n: _kept_as(n, named[n], b) for n, b in buffers.items()}
            if replaced := [n for n, leaf in leaves.items() if named[n] is not leaf]:
                raise ValueError(f"the model assigns its parameter '{replaced[0]}' anew in a pass")
            minimised, loss = self._loss(outputs, batch, objective, penalty)
            grads = torch.autograd.grad(minimised, list(leaves.values()), allow_unused=True)
            found = {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(leaves.items(), grads, strict=True)
            }
            return loss.detach(), found, after

        return gradient

    def _loss(
        self, outputs: Tensor, batch: Batch, objective: Objective | None, penalty: Objective | None
    ) -> tuple[Tensor, Tensor]:
        """Return (what is minimised, the objective without the penalty)."""
        if objective is not None:
            loss = objective(outputs, batch.targets, batch.weights)
        else:
            losses = self.task.sample_losses(outputs, batch.targets)
            # `where` and not a product: a padding sample's loss may be anything
            kept = torch.where(batch.weights > 0, losses, torch.zeros_like(losses))
            loss = kept.sum() / batch.weights.sum().clamp(min=1)
        if penalty is None:
            return loss, loss
        return loss + penalty(outputs, batch.targets, batch.weights), loss

    def _own_statistics(self, job: ChunkJob, slots: list[int], received: Named) -> Named:
        """The buffers that each slot goes on from: its own where it has some, or those received."""
        if not self._remembered or not job.state:
            return received
        known = torch.tensor([job.has_state[slot] for slot in slots], device=self.device)
        own = {n: job.state[_STATISTICS + n].to(self.device)[slots] for n in self._remembered}
        return {**received, **_select(known, own, {n: received[n] for n in own})}

    def _parted(self, received: Named, trained: Named, state: Named) -> tuple[Named, Named]:
        """Return (the buffers of the reply, the clients' memories)."""
        sent = {**trained, **{name: received[name] for name in self._unsent}}
        own = {_STATISTICS + name: trained[name] for name in self._remembered}
        return sent, {**state, **own}

    # --- evaluation -----------------------------------------------------------------------

    @property
    def _evaluation(self) -> Evaluation:
        return Evaluation(self.model, self.task, self.evaluation_batch)

    def _evaluate(self, job: ChunkJob) -> ChunkResult:
        members = list(range(len(job.client_ids)))
        present = [slot for slot in members if not job.absent[slot]]
        drawn = self.data.clients([job.client_ids[s] for s in present], split="test")
        pool = self._pool(drawn.features), self._pool(drawn.targets)
        rows = [torch.zeros(0, dtype=torch.int64)] * len(members)
        for slot, chosen in zip(present, drawn.rows, strict=True):
            rows[slot] = torch.from_numpy(np.asarray(chosen, dtype=np.int64))
        # a lone member is doubled, as in training
        slots = members if self._one_by_one or len(members) > 1 else [0, 0]
        params, buffers, _ = self._received(job, slots)
        named = {**params, **self._own_statistics(job, slots, buffers)}
        if self._one_by_one:
            metrics = []
            for slot in slots:
                if self._kept is not None:
                    self._begin_anew()  # nothing is left of the client before
                    self.model.eval()
                mine = rows[slot].to(self.device)
                metrics.append(self._evaluation.one(_row(named, slot), pool, mine))
        else:
            together = self._evaluation.together(named, pool, [rows[slot] for slot in slots])
            metrics = together[: len(members)]
        columns = {
            name: torch.tensor([row[name] for row in metrics], dtype=torch.float64)
            for name in metrics[0]
        }
        num_examples = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        # metrics over no samples are no numbers; such a client weighs nothing, as in training
        columns = {n: torch.where(num_examples > 0, c, 0.0) for n, c in columns.items()}
        return ChunkResult(None, {}, {}, {}, num_examples, columns)

    # --- inputs ---------------------------------------------------------------------------

    def _check(self, job: ChunkJob) -> None:
        if job.layout != self.layout.fingerprint:
            raise ValueError(
                f"the model received has layout {job.layout}, this client's model has "
                f"{self.layout.fingerprint}; is [task] the same on server and client?"
            )

    def _received(
        self, job: ChunkJob, slots: list[int], *, reuse: bool = False
    ) -> tuple[Named, Named, Named]:
        """Return (parameters, buffers, what else was sent) of each slot, contiguous but the last.

        Args:
            job: The chunk.
            slots: Its members in the order wanted.
            reuse: Whether the parameters may overwrite those that were returned for an earlier
                chunk: the system takes longer to hand out fresh memory than to copy them.
        """
        shared = {} if job.shared.params is None else self.layout.unflatten(job.shared.params)
        personal = {} if job.personal.params is None else self.layout.unflatten(job.personal.params)
        params = self._stacked(shared, personal, slots)
        if reuse and not personal:  # rows of their own are picked into fresh memory anyway
            shapes = {n: t.shape for n, t in params.items()}
            if {n: t.shape for n, t in self._reused.items()} != shapes:
                self._reused = {n: t.new_empty(t.shape) for n, t in params.items()}
            for name, tensor in params.items():
                self._reused[name].copy_(tensor)
            params = dict(self._reused)
        elif self._kept is not None:
            # a user's model may change its parameters in a pass, and others received them too
            params = {n: t.clone(memory_format=torch.contiguous_format) for n, t in params.items()}
        else:
            params = {n: t.contiguous() for n, t in params.items()}
        extra = self._stacked(job.shared.extra, job.personal.extra, slots)
        return params, self._received_buffers(job, slots), extra

    def _received_buffers(self, job: ChunkJob, slots: list[int]) -> Named:
        stacked = self._stacked(job.shared.buffers, job.personal.buffers, slots)
        return {n: t.contiguous() for n, t in stacked.items()}

    def _stacked(
        self, shared: Mapping[str, Tensor], personal: Mapping[str, Tensor], slots: list[int]
    ) -> Named:
        """Named tensors with a row per slot; what is shared is laid down once."""
        rows = {n: t.to(self.device)[slots] for n, t in personal.items()}
        lead = len(slots)
        common = {
            n: t.to(self.device).expand(lead, *t.shape) for n, t in shared.items() if n not in rows
        }
        return {**common, **rows}

    def _batches(
        self, job: ChunkJob, slots: list[int], *, longest_first: bool = False, reuse: bool = False
    ) -> tuple[list[int], Batches]:
        """Return (the slots in their order, their batches)."""
        present = sorted({slot for slot in slots if not job.absent[slot]})
        drawn = self.data.clients([job.client_ids[slot] for slot in present])
        rows = dict(zip(present, drawn.rows, strict=True))
        nothing = np.zeros(0, dtype=np.int64)
        work = self._work(job)
        pool = self._pool(drawn.features)
        if len(pool):  # before anybody trains: the pass may move what the model keeps
            self._noise_shape(self._cast(pool[:1]))

        def shares(slots: list[int]) -> list[float] | None:
            return [job.work[slot] for slot in slots] if job.work else None

        if longest_first:
            steps = steps_taken([rows.get(slot, nothing) for slot in slots], work, shares(slots))
            slots = [slots[place] for place in np.argsort(-steps, kind="stable")]
        mine = [rows.get(slot, nothing) for slot in slots]
        clients = [job.client_ids[slot] for slot in slots]
        schedule = Schedule(
            mine,
            clients,
            shares=shares(slots),
            work=work,
            seed=self.seed,
            server_round=job.server_round,
            device=self.device,
        )
        poisoned = None
        if self._poison is not None:
            poisoned = self._poison.of(job.server_round, clients, mine, schedule.indices)
        return slots, Batches(
            schedule,
            pool,
            self._pool(drawn.targets),
            dtype=self.task.dtype,
            augmentation=self._augmentation,
            noise_shapes=self._noise_shape,
            reuse=reuse,
            poisoned=poisoned,
        )

    def _work(self, job: ChunkJob) -> Work:
        return self.procedure.work if job.server_round else self.procedure.setup_work

    def _cast(self, features: Tensor) -> Tensor:
        return features.to(self.task.dtype) if features.is_floating_point() else features

    def _noise_shape(self, features: Tensor) -> dict[str, tuple[int, ...]]:
        if self._noise_shapes is None:
            self._noise_shapes = {}
            if self._dropouts:
                with self._generators_put_back():
                    found = noise_shapes(self.model, self._dropouts, features)
                self._noise_shapes = found
        return self._noise_shapes

    def _state(self, job: ChunkJob, slots: list[int], params: Named) -> Named:
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

    def _to_device(self, named: Mapping[str, Tensor]) -> Named:
        return {name: tensor.to(self.device) for name, tensor in named.items()}


def _stepping(descent: Descent, params: Named, sent: Named, memory: Named) -> Stepping:
    """Steps of these clients; a memory of moments goes on in place."""
    if not descent.momentum:
        moments: Named = {}
    elif descent.keeps_moments:
        moments = memory
    else:
        moments = {n: torch.zeros_like(p) for n, p in params.items()}
    guidance = {n: sent[f"{GUIDANCE}.{n}"] for n in params} if sent else {}
    return Stepping(descent, moments, guidance)


def _kept_as(name: str, tensor: Tensor, before: Tensor) -> Tensor:
    """The new value of a buffer, which must be like the one before."""
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        raise ValueError(
            f"buffer '{name}' is {before.dtype} {list(before.shape)} before a step and "
            f"{tensor.dtype} {list(tensor.shape)} after it; it must keep dtype and shape"
        )
    return tensor.detach()


def _memory(procedure: ClientProcedure, model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a client remembers under a procedure: names, shapes and dtypes."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state = procedure.initial_state(params)
    return {name: (tuple(t.shape), t.dtype) for name, t in state.items()}


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
