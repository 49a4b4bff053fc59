"""A chunk's inputs, laid out for its slots: received tensors, client states, samples, noise."""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from fedsim.client.batching.augmentation import Augmentation
from fedsim.client.batching.batches import Batches
from fedsim.client.batching.dropout import dropout_layers, noise_shapes
from fedsim.client.batching.poison import Poison, PoisonedSamples
from fedsim.client.batching.schedule import Schedule, held_out, steps_taken
from fedsim.client.job import ChunkJob, ClientArrays
from fedsim.client.personal_tensors import PERSONAL, beside
from fedsim.client.procedure import CLASS_COUNTS, ClientProcedure, Named, Work
from fedsim.client.surroundings import Surroundings
from fedsim.messages.layout import Layout, Rows

_POOLS_KEPT = 6  # features and targets of the train, local test and server test pools
_STATISTICS = "buffers."  # what a client's own buffers are called in its state


class Inputs:
    """Lays out what the slots of a chunk train or evaluate with, and what they trained.

    Args:
        model: The model, on the device.
        layout: How the tensors of messages lie in the flat vector.
        procedure: Local training.
        data: The clients' samples.
        surroundings: What the clients find around the model.
        dtype: Of floating-point features.
        buffers: What becomes of the model's statistics, see `CohortExecutor`.
        personal: The tensors that clients keep to themselves, as they are before one trains.
        augmentation: See `CohortExecutor`.
        poison: See `CohortExecutor`.

    Attributes:
        layout: See above.
        whole: How all tensors of the model lie, personal ones too.
        procedure: See above.
        surroundings: See above.
        device: Where all is laid.
        dropouts: Dropout layers whose masks are drawn before a pass.
        remembered: Statistics that a client keeps to itself.
        start: What personal tensors are before a client first trains, by name, on the device.
        shortened: What becomes of the procedure's local work, for a trial; None leaves it.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        procedure: ClientProcedure,
        data: ClientArrays,
        surroundings: Surroundings,
        *,
        dtype: torch.dtype,
        buffers: Literal["average", "local", "reset"],
        personal: Mapping[str, Tensor],
        augmentation: Augmentation | None,
        poison: Poison | None,
    ) -> None:
        self._model, self.layout, self.procedure, self._data = model, layout, procedure, data
        self.whole = Layout.from_model(model)
        self.surroundings = surroundings
        self.device, self._dtype = surroundings.device, dtype
        self.start = {name: tensor.to(self.device) for name, tensor in personal.items()}
        self._augmentation, self._poison = augmentation, poison
        frozen = dict(model.named_parameters(remove_duplicate=False))
        statistics = [spec.name for spec in layout.buffers if spec.name not in frozen]
        # statistics that no reply holds, and those of them that a client remembers
        self._unsent = [] if buffers == "average" else statistics
        self.remembered = statistics if buffers == "local" else []
        self.dropouts = dropout_layers(model)
        self._noise_shapes: dict[str, tuple[int, ...]] | None = None
        self._reused: Named = {}  # parameters of the chunk that is trained in place
        self._pools: dict[int, tuple[np.ndarray, Tensor]] = {}
        self.shortened: Callable[[Work], Work] | None = None

    def under(
        self, procedure: ClientProcedure, surroundings: Surroundings, *, attacked: bool = True
    ) -> "Inputs":
        """Return the same for another procedure, perhaps with nobody's samples attacked.

        Pools of samples are shared.
        """
        made = copy.copy(self)
        made._poison = self._poison if attacked else None
        made.procedure, made.surroundings, made._reused = procedure, surroundings, {}
        return made

    def received(
        self, job: ChunkJob, slots: list[int], *, reuse: bool = False, views: bool = False
    ) -> tuple[Named, Named, Named]:
        """Return (parameters, buffers, what else was sent) of each slot, contiguous but the last.

        Args:
            job: The chunk.
            slots: Its members in the order wanted.
            reuse: Whether the parameters may overwrite those that were returned for an earlier
                chunk: the system takes longer to hand out fresh memory than to copy them.
            views: Whether parameters that all share may be one row laid out for all by `expand`;
                nobody may change them.
        """
        shared = {} if job.shared.params is None else self.layout.unflatten(job.shared.params)
        personal = {} if job.personal.params is None else self.layout.unflatten(job.personal.params)
        params = _stacked(self.device, shared, personal, slots)
        extra = _stacked(self.device, job.shared.extra, job.personal.extra, slots)
        if self.start:
            params |= self._own(job, slots, {s.name for s in self.whole.trainable})
            params = {s.name: params[s.name] for s in self.whole.trainable}
            extra |= beside(extra, params, self.start)
        if views:
            return params, self.received_buffers(job, slots), extra
        if reuse and not personal:  # rows of their own are picked into fresh memory anyway
            shapes = {n: t.shape for n, t in params.items()}
            if {n: t.shape for n, t in self._reused.items()} != shapes:
                self._reused = {n: t.new_empty(t.shape) for n, t in params.items()}
            for name, tensor in params.items():
                self._reused[name].copy_(tensor)
            params = dict(self._reused)
        elif self.surroundings.kept is not None:
            # a user's model may change its parameters in a pass, and others received them too
            params = {n: t.clone(memory_format=torch.contiguous_format) for n, t in params.items()}
        else:
            params = {n: t.contiguous() for n, t in params.items()}
        return params, self.received_buffers(job, slots), extra

    def received_buffers(self, job: ChunkJob, slots: list[int]) -> Named:
        """Return the buffers that each slot received."""
        stacked = _stacked(self.device, job.shared.buffers, job.personal.buffers, slots)
        return {n: t.contiguous() for n, t in stacked.items()}

    def batches(
        self, job: ChunkJob, slots: list[int], *, longest_first: bool = False, reuse: bool = False
    ) -> tuple[list[int], Batches]:
        """Return (the slots in their order, their batches)."""
        present = sorted({slot for slot in slots if not job.absent[slot]})
        drawn = self._data.clients([job.client_ids[slot] for slot in present])
        rows = dict(zip(present, drawn.rows, strict=True))
        apart: dict[int, np.ndarray] = {}
        if share := self.procedure.holds_out:
            for slot, mine in rows.items():
                seed, client = self.surroundings.seed, job.client_ids[slot]
                rows[slot], apart[slot] = held_out(mine, share, seed=seed, client=client)
        nothing = np.zeros(0, dtype=np.int64)
        work = self.work(job)
        pool = self.pool(drawn.features)
        if len(pool):  # before anybody trains: the pass may move what the model keeps
            self.noise_shape(self.cast(pool[:1]))

        def shares(slots: list[int]) -> list[float] | None:
            return [job.work[slot] for slot in slots] if job.work else None

        if longest_first:
            steps = steps_taken([rows.get(slot, nothing) for slot in slots], work, shares(slots))
            slots = [slots[place] for place in np.argsort(-steps, kind="stable")]
        mine = [rows.get(slot, nothing) for slot in slots]
        rounds = [job.round_of(slot) for slot in slots]
        clients = [job.client_ids[slot] for slot in slots]
        schedule, poisoned = self._scheduled(rounds, clients, mine, work, shares=shares(slots))
        known: Named = {}
        if CLASS_COUNTS in self.procedure.knows:
            counts = _class_counts(mine, drawn.targets, self._data.spec.num_classes)
            known = {CLASS_COUNTS: counts.to(self.device, self.layout.dtype)}
        beside = None
        if share:
            held = [apart.get(slot, nothing) for slot in slots]
            size, count = work.batch_size, schedule.num_steps
            beside = self._held_out(rounds, clients, held, drawn, size, count)
        return slots, Batches(
            schedule,
            pool,
            self.pool(drawn.targets),
            dtype=self._dtype,
            augmentation=self._augmentation,
            noise_shapes=self.noise_shape,
            reuse=reuse,
            poisoned=poisoned,
            draws=self.procedure.draws,
            known=known,
            held_out=beside,
        )

    def _held_out(
        self,
        rounds: list[int],
        clients: list[int],
        rows: list[np.ndarray],
        drawn: Any,
        batch_size: int,
        steps: int,
    ) -> Batches:
        """Batches of samples that nobody trains on, none of them short, as they are."""
        work = Work(batch_size, None, steps, "drop")
        schedule, poisoned = self._scheduled(
            rounds, clients, rows, work, apart="held out ", least_steps=steps
        )
        return Batches(
            schedule,
            self.pool(drawn.features),
            self.pool(drawn.targets),
            dtype=self._dtype,
            augmentation=None,
            noise_shapes=self.noise_shape,
            poisoned=poisoned,
        )

    def _scheduled(
        self, rounds: list[int], clients: list[int], rows: list[np.ndarray], work: Work,
        **options: Any,
    ) -> tuple[Schedule, PoisonedSamples | None]:  # fmt: skip
        """Who takes which of these rows when, and what attackers make of them."""
        schedule = Schedule(
            rows, clients, work=work, seed=self.surroundings.seed, server_round=rounds,
            device=self.device, **options,
        )  # fmt: skip
        if self._poison is None:
            return schedule, None
        return schedule, self._poison.of(rounds, clients, rows, schedule.indices)

    def work(self, job: ChunkJob) -> Work:
        """Return the local work of each member that does all of it."""
        work = self.procedure.work if job.server_round else self.procedure.setup_work
        return work if self.shortened is None else self.shortened(work)

    def cast(self, features: Tensor) -> Tensor:
        """Return features as the model takes them."""
        return features.to(self._dtype) if features.is_floating_point() else features

    def noise_shape(self, features: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the shape of one sample's mask by dropout layer, found in a pass of the model.

        Args:
            features: Some samples, `[n, ...]`, of the task's dtype.
        """
        if self._noise_shapes is None:
            self._noise_shapes = {}
            if self.dropouts:
                with self.surroundings.generators_put_back():
                    self.surroundings.begin()  # a model may draw which layers it uses
                    found = noise_shapes(self._model, self.dropouts, features)
                self._noise_shapes = found
        return self._noise_shapes

    def state(self, job: ChunkJob, slots: list[int], params: Named) -> Named:
        """Return each slot's client state; the initial one where a client has none.

        Where all have one it may be the job's own, which nobody may change.

        Args:
            job: The chunk.
            slots: Its members in the order wanted.
            params: What they received, `[C, ...]`.
        """
        if job.state and all(job.has_state) and self.surroundings.kept is None:
            besides = {_STATISTICS + n for n in self.remembered} | {
                PERSONAL + n for n in self.start
            }
            saved = {n: t.to(self.device) for n, t in job.state.items() if n not in besides}
            in_order = slots == list(range(len(job.client_ids)))
            return saved if in_order else {n: t[slots] for n, t in saved.items()}
        first = {n: t.contiguous() for n, t in vmap(self.procedure.initial_state)(params).items()}
        if not job.state:
            return first
        known = torch.tensor([job.has_state[slot] for slot in slots], device=self.device)
        saved = {n: job.state[n].to(self.device)[slots] for n in first}
        state: Named = select(known, saved, first)
        return state

    def pool(self, array: np.ndarray) -> Tensor:
        """Return an array on the device; the last few pools stay there."""
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

    def own_statistics(self, job: ChunkJob, slots: list[int], received: Named) -> Named:
        """Return the buffers that each slot goes on from: its own if it has some, or `received`.

        Personal ones, which nobody receives, are among them.
        """
        personal = self._own(job, slots, {spec.name for spec in self.whole.buffers})
        received = {**received, **personal}
        if not self.remembered or not job.state:
            return received
        known = torch.tensor([job.has_state[slot] for slot in slots], device=self.device)
        own = {n: job.state[_STATISTICS + n].to(self.device)[slots] for n in self.remembered}
        return {**received, **select(known, own, {n: received[n] for n in own})}

    def parted(
        self, received: Named, params: Named, buffers: Named, extra: Named, state: Named
    ) -> tuple[Named, Named, Named]:
        """Return (buffers of the reply, what else is in it, the clients' states).

        Args:
            received: The buffers received.
            params: The parameters after training.
            buffers: The buffers after training.
            extra: What the procedure returns besides.
            state: What it keeps.
        """
        sent = {**buffers, **{name: received[name] for name in self._unsent}}
        own = {_STATISTICS + name: buffers[name] for name in self.remembered}
        if not self.start:
            return sent, extra, {**state, **own}
        trained = {**params, **buffers}
        own |= {PERSONAL + name: trained[name].clone() for name in self.start}
        sent = {name: tensor for name, tensor in sent.items() if name not in self.start}
        # what belongs to a personal tensor stays with the client too
        extra = {n: t for n, t in extra.items() if n.partition(".")[2] not in self.start}
        return sent, extra, {**state, **own}

    def _own(self, job: ChunkJob, slots: list[int], among: Collection[str]) -> Named:
        """Personal tensors of some names: each slot's own, or those that all start from."""
        names = [name for name in self.start if name in among]
        if not names:
            return {}
        lead = len(slots)
        first = {n: self.start[n].expand(lead, *self.start[n].shape).contiguous() for n in names}
        if not job.state:
            return first
        known = torch.tensor([job.has_state[slot] for slot in slots], device=self.device)
        saved = {n: job.state[PERSONAL + n].to(self.device)[slots] for n in names}
        own: Named = select(known, saved, first)
        return own

    def laid(self, params: Named, out: Rows | None, rows: list[int] | None = None) -> Rows:
        """Return the members' parameters where they are wanted, see `Layout.write`."""
        if out is not None and self.device.type == "cpu":
            self.layout.write(params, out, rows=rows)
            return out
        if rows is None and not self.layout.trainable:  # nothing shared tells how many there are
            rows = list(range(len(next(iter(params.values())))))
        flat = self.layout.flatten(params, rows=rows).cpu()  # one way from a device for all
        if out is None:
            return flat
        for row, place in zip(flat, out, strict=True):
            place.copy_(row)
        return out


def select(condition: Tensor, chosen: Any, other: Any) -> Any:
    """Return rows of `chosen` where the condition `[C]` holds, else of `other`, over trees."""

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(condition.view(-1, *(1,) * (new.dim() - 1)), new, old)

    return pytree.tree_map(pick, chosen, other)


def _class_counts(rows: list[np.ndarray], targets: np.ndarray, classes: int) -> Tensor:
    """How many training samples of each class each slot has, `[slots, classes]`."""
    counts = [np.bincount(np.asarray(targets[mine]), minlength=classes) for mine in rows]
    return torch.tensor(np.array(counts))


def _stacked(
    device: torch.device,
    shared: Mapping[str, Tensor],
    personal: Mapping[str, Tensor],
    slots: list[int],
) -> Named:
    """Named tensors with a row per slot; what is shared is laid down once."""
    rows = {n: t.to(device)[slots] for n, t in personal.items()}
    lead = len(slots)
    common = {n: t.to(device).expand(lead, *t.shape) for n, t in shared.items() if n not in rows}
    return {**common, **rows}
