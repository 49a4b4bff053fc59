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

import copy
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.kept_state import KeptState
from fedsim.basics.loading import loads
from fedsim.basics.rng import derived_seed
from fedsim.basics.threads import with_threads
from fedsim.client import finetuning, ways
from fedsim.client.batching.augmentation import Augmentation
from fedsim.client.batching.dropout import seed_dropout
from fedsim.client.batching.poison import Poison
from fedsim.client.chains.chain import Chain, chain_of
from fedsim.client.chains.training import ChainTraining
from fedsim.client.compression import compress
from fedsim.client.evaluation import Evaluation
from fedsim.client.gradients import Gradients
from fedsim.client.inputs import Inputs
from fedsim.client.job import (
    ChunkJob,
    ChunkResult,
    ClientArrays,
    ExecutorKind,
    Settings,
    SettingsError,
    TaskLike,
)
from fedsim.client.local_evaluation import LocalEvaluation
from fedsim.client.names import ModelTensors
from fedsim.client.overriding import remembered, stacks
from fedsim.client.personal_tensors import told
from fedsim.client.perturbation import Units
from fedsim.client.procedure import Batch, ClientProcedure
from fedsim.client.robustness import RobustEvaluation
from fedsim.client.surroundings import Surroundings
from fedsim.client.ways import row_of
from fedsim.messages.layout import Layout, Rows

_SETTINGS_KEPT = 8  # executors under settings of a round's config


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
            after training: "average" returns them; "local" keeps them in the client's state, from
            which it goes on in its next round and evaluates, and returns what was received;
            "reset" forgets them and returns what was received.
        personal: Parameters and buffers that a client keeps in its state and that no message
            holds: what they are before it first trains, by name.
        poison: What attackers do to their samples; None when nobody attacks data.
        puts_back: Whether what model, procedure and task keep beside the tensors is put back for
            every client and evaluation, see `fedsim.basics.kept_state`; for code of the user's own.
        seeds_dropout: Whether torch's dropout layers take masks that are drawn before a pass; else
            they draw by themselves, in a loop.
        settings: What becomes of the procedure where a strategy tells clients so; None obeys none.
        adversary: How clients that evaluate move their samples besides; None leaves these alone.
        finetuning: How clients train what they receive before they evaluate it once more; None
            lets them evaluate it as it is.
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
        personal: Mapping[str, Tensor] | None = None,
        poison: Poison | None = None,
        puts_back: bool = False,
        seeds_dropout: bool = True,
        settings: Settings | None = None,
        adversary: RobustEvaluation | None = None,
        finetuning: ClientProcedure | None = None,
    ) -> None:
        self.task, self.data = task, data
        self._settings, self._adversary, self._finetuning = settings, adversary, finetuning
        self._tuner: CohortExecutor | None = None
        self._under: dict[str, CohortExecutor] = {}
        self.seed, self.kind, self.threads = seed, kind, threads
        self.device = torch.device(device)
        self.evaluation_batch, self.evaluation_step = evaluation_batch, Evaluation.step
        if self.device.type == "cuda" and deterministic:
            # cuBLAS reads it when its first handle is made
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        model = task.build_model(seed)
        whole = Layout.from_model(model)
        self.layout = whole.without(personal or {})
        self.model = (seed_dropout(model) if seeds_dropout else model).to(self.device)
        self._tensors = known_of(whole, personal or {})
        self.procedure = procedure = procedure.for_model(self._tensors)
        kept = KeptState([self.model, procedure, task], whole.names) if puts_back else None
        self.surroundings = Surroundings(seed, self.device, kept)
        self.inputs = Inputs(
            self.model,
            self.layout,
            procedure,
            data,
            self.surroundings,
            dtype=task.dtype,
            buffers=buffers,
            personal=personal or {},
            augmentation=augmentation,
            poison=poison,
        )
        self._gradients = Gradients(self.model, task, _units(data, self.device, task.dtype))
        self._chain_training = self._training_as_a_chain() if kind == "batched" else None
        # one client after another, with batches of their true sizes
        self._one_by_one = kind == "loop" or (
            self._chain_training is not None and self._chain_training.chain.convolves
        )

    def _training_as_a_chain(self) -> ChainTraining:
        chain = chain_of(self.model, self.data.spec.feature_shape)
        if chain is None:
            raise ValueError('kind = "batched": the model is no chain of known layers')
        if not (stacks(self.procedure) or chain.convolves):
            raise ValueError('kind = "batched": the procedure steps one client at a time')
        return self._training(chain, self.procedure)

    @property
    def pads(self) -> bool:
        """Whether the clients of a chunk wait for the one that takes most steps."""
        training = self._chain_training
        if training is None:
            return self.kind == "vmap"
        return ways.waits(self.procedure, self.inputs.whole.dim, training)

    @property
    def evaluates_with_memory(self) -> bool:
        """Whether a client's own state takes part when it evaluates."""
        return bool(self.inputs.remembered or self.inputs.start or self.procedure.has_own_model)

    def train(self, job: ChunkJob, out: Rows | None = None) -> ChunkResult:
        """Train the chunk's members.

        The loss of a member whose personal tensors are no longer finite is nan, so that its reply
        is refused: nothing else of it tells the server.

        Args:
            job: The chunk.
            out: Where the parameters go, `[C, dim]` or its rows; None allocates on the CPU.

        Raises:
            ValueError: If the payload does not follow this model's layout.
        """
        self._check(job)
        inputs, chain = self.inputs, self._chain_training
        with with_threads(self.threads), self.surroundings.around():
            self.model.train()
            if self._one_by_one or ways.trains_alone(inputs, job, chain):
                with self.surroundings.generators_put_back():
                    result = ways.train_one_by_one(inputs, self._gradients, job, out, chain)
            elif chain is not None:
                result = ways.train_together(inputs, job, out, chain)
            else:
                with loads("vmap"):
                    result = ways.train_vmap(inputs, self._gradients, job, out)
            part = self.procedure.compression if job.server_round else None
            if part is not None:  # a set-up exchange is not compressed
                result = compress(self.layout, job, result, part=part, seed=self.seed)
        return told(result, inputs.start)

    def surrounded_by(self, surroundings: Surroundings) -> None:
        """Have clients begin in other surroundings, for a trial that watches them."""
        self.surroundings = self.inputs.surroundings = surroundings

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
        procedure = self._settings.procedure(settings).for_model(self._tensors)
        told = ", ".join(f"{name} = {value!r}" for name, value in settings.items())
        if remembered(procedure, self.model) != remembered(self.procedure, self.model):
            raise SettingsError(
                f"{told}: clients would remember other tensors than under "
                "[client]; set it there, for all rounds"
            )
        if procedure.needs_classes and not self.data.spec.has_classes:
            raise SettingsError(f"{told}: needs targets that are classes")
        if procedure.needs_numbers and self.data.spec.vocabulary:
            raise SettingsError(f"{told}: needs features that are numbers")
        return self._doing(procedure, self.seed)

    def _doing(
        self, procedure: ClientProcedure, seed: int, *, attacked: bool = True
    ) -> "CohortExecutor":
        """This executor with another procedure, which draws by a seed."""
        made = copy.copy(self)
        made.procedure, made._under, made.seed = procedure, {}, seed
        made.surroundings = copy.copy(self.surroundings)
        made.surroundings.seed, made._finetuning = seed, None
        if self.surroundings.kept is not None:
            self.surroundings.kept.put_back()
            names = self.inputs.whole.names
            kept = KeptState([self.model, procedure, self.task], names)
            made.surroundings.kept = kept
        made.inputs = self.inputs.under(procedure, made.surroundings, attacked=attacked)
        if self._chain_training is not None:
            made._chain_training = self._training(self._chain_training.chain, procedure)
        return made

    def _training(self, chain: Chain, procedure: ClientProcedure) -> ChainTraining:
        gradients = self._gradients
        return ChainTraining(chain, self.task, procedure, gradients.loss, gradients.units)

    def rehearse(self, features: Tensor, targets: Tensor) -> None:
        """Let torch load what it loads at the first gradient; "batched" only.

        Args:
            features: Samples of two clients, `[2, n, ...]`.
            targets: Their targets.
        """
        training = self._chain_training
        if training is None:
            return
        shapes = self.inputs.noise_shape(features[0])
        noise = {n: torch.ones(features.shape[:2] + shape) for n, shape in shapes.items()}
        weights = torch.ones(features.shape[:2], dtype=self.task.dtype)
        batch = Batch(features, targets, weights, noise)
        params = {n: p.detach() for n, p in self.model.named_parameters()}
        with with_threads(self.threads):
            if self._one_by_one:
                first = Batch(features[0], targets[0], weights[0], row_of(noise, 0))
                training.gradient(params, {}, first)
            else:
                pairs = {n: torch.stack([p, p]) for n, p in params.items()}
                training.gradient(pairs, {}, batch)

    def evaluate(self, job: ChunkJob) -> ChunkResult:
        """Evaluate the model received on each member's local test split.

        A member that keeps tensors to itself evaluates with those that it has. Where tensors are
        personal the metric `personalised` says who has some: 1.0, and 0.0 before it trained.
        With fine-tuning there are metrics `finetuned/NAME` of what the members then have, of which
        nothing is kept.
        """
        self._check(job)
        with with_threads(self.threads), torch.no_grad(), self.surroundings.around():
            self.model.eval()
            local = LocalEvaluation(
                self.inputs,
                self.data,
                self._evaluation,
                self._one_by_one,
                self._adversary,
                self._gradients.alone,
            )
            received = local.of(job)
        if self._finetuning is None:
            return received
        if self._tuner is None:
            seed = derived_seed(self.seed, "finetune")
            tuning = self._finetuning.for_model(self._tensors)
            self._tuner = self._doing(tuning, seed, attacked=False)
        return finetuning.beside(received, self._tuner, job)

    def evaluate_arrays(
        self,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        features: np.ndarray,
        targets: np.ndarray,
        rows: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Evaluate one model on one set of samples; returns the task's metrics.

        Personal tensors are what they are before a client trains.

        Args:
            params: The model, `[dim]`.
            buffers: Its buffers.
            features: A pool of samples, `[n, ...]`.
            targets: Their targets.
            rows: Which of them, int64; None takes all.
        """
        named = self._named(params, buffers)
        with with_threads(self.threads), torch.no_grad(), self.surroundings.around():
            self.model.eval()
            pool = self.inputs.pool(features), self.inputs.pool(targets)
            chosen = torch.arange(len(targets)) if rows is None else torch.from_numpy(rows)
            return self._evaluation.one(named, pool, chosen.to(self.device))

    def evaluate_moved(
        self,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        features: np.ndarray,
        targets: np.ndarray,
        attack: RobustEvaluation,
    ) -> dict[str, float]:
        """Evaluate one model on samples that are moved to where it errs.

        Args:
            params: The model, `[dim]`.
            buffers: Its buffers.
            features: Samples, `[n, ...]`.
            targets: Their targets.
            attack: How far samples are moved, and how.
        """
        named = self._named(params, buffers)
        with with_threads(self.threads), torch.no_grad(), self.surroundings.around():
            self.model.eval()
            pool = self.inputs.pool(features), self.inputs.pool(targets)
            return attack.measure(self._evaluation, self._gradients.alone, named, pool, self.seed)

    def _named(self, params: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's tensors on the device."""
        named = {**self.layout.unflatten(params), **buffers, **self.inputs.start}
        named = {name: tensor.to(self.device) for name, tensor in named.items()}
        if self.surroundings.kept is not None:  # as for clients
            named = {n: t.clone() for n, t in named.items()}
        return named

    @property
    def _evaluation(self) -> Evaluation:
        return Evaluation(self.model, self.task, self.evaluation_batch, self.evaluation_step)

    def _check(self, job: ChunkJob) -> None:
        if job.layout != self.layout.fingerprint:
            raise ValueError(
                f"the model received has layout {job.layout}, this client's model has "
                f"{self.layout.fingerprint}; is [task] the same on server and client?"
            )


def known_of(whole: Layout, personal: Collection[str]) -> ModelTensors:
    """Return what a procedure may know of a model.

    Args:
        whole: How all tensors of the model lie.
        personal: Those that clients keep to themselves.
    """
    return ModelTensors(tuple(spec.name for spec in whole.trainable), frozenset(personal))


def _units(data: ClientArrays, device: torch.device, dtype: torch.dtype) -> Units | None:
    """The raw features' units where the data know that theirs are others."""
    known = getattr(data, "raw_units", None)
    return known and Units(*(torch.from_numpy(each).to(device, dtype) for each in known))
