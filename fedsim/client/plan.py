"""The execution plan: everything about *how* a run computes that can change a bit of its results.

A plan is derived from scenario values alone, never from workers, free memory or time, and is
written to the run folder and into checkpoints. Equal plan, equal bits.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, vmap

from fedsim.basics.errors import ScenarioError
from fedsim.basics.generators import put_back
from fedsim.basics.kept_state import KeptState
from fedsim.basics.kernels import Bits
from fedsim.basics.loading import loads
from fedsim.basics.rng import generator
from fedsim.basics.samples import SampleSpec
from fedsim.client.batching.dropout import dropout_layers, noise_shapes, seed_dropout
from fedsim.client.chains.chain import chain_of
from fedsim.client.job import ExecutorKind, TaskLike
from fedsim.client.vectorising import loop_reason
from fedsim.client.ways import LARGE

REDUCTION = "float64, client order, rounded once"
_MAX_CHUNK = 32
_MAX_SMALL_CHUNK = 64  # of models that are not LARGE
_CHUNK_BYTES = 2**30  # parameters, gradients, moments and activations of one chunk
_COPIES = 8
TRIED_ONCE = 1_000_000  # parameters from which a user's model is not tried twice
_NO_RULE = re.compile(r"not yet implemented the batching rule for ([\w:.]+?)\.? ")


@dataclass(frozen=True)
class ExecutionPlan:
    """How a run computes.

    Attributes:
        executor: "batched" trains a model whose passes are written out, "vmap" a chunk as one
            batch, "loop" one client after another.
        reason: Why that executor.
        chunk_size: Clients per chunk, at least 2.
        threads: Threads of torch's kernels.
        device: "cpu" or "cuda".
        deterministic: Whether a GPU is held to kernels that give the same bits every time.
        evaluation_batch: Samples per forward pass of the server's evaluation.
        reduction: How replies are summed.
        bits: What is promised about kernels: the same bits on one kind of machine ("fast"), or on
            every x86-64 processor with AVX2 ("portable").
    """

    executor: ExecutorKind
    reason: str
    chunk_size: int
    threads: int = 1
    device: str = "cpu"
    deterministic: bool = True
    evaluation_batch: int = 1000
    reduction: str = REDUCTION
    bits: Bits = "fast"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def make_plan(
    task: TaskLike,
    *,
    spec: SampleSpec,
    expected_cohort: int,
    executor: Literal["auto", "batched", "vmap", "loop"] = "auto",
    stacks: bool = False,
    chunk_size: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    deterministic: bool = True,
    evaluation_batch: int = 1000,
    bits: Bits = "fast",
    tried: bool = False,
) -> ExecutionPlan:
    """Derive a plan.

    Args:
        task: The task; its model decides whether clients can be vectorised.
        spec: What one sample looks like.
        expected_cohort: Clients per round as the scenario states them.
        executor: "auto" takes "batched" where it can be had, else vectorises what can be
            vectorised.
        stacks: Whether the client procedure's step takes several clients at once.
        chunk_size: Clients per chunk; None cuts the expected cohort into an even number of equal
            chunks, so that two workers have as much to do: of at most 32 clients, 64 of a model
            below 100,000 parameters, and no more than fit a fixed number of bytes.
        threads: Threads of torch's kernels.
        device: Where to compute.
        deterministic: Whether a GPU is held to deterministic kernels.
        evaluation_batch: Samples per forward pass of the server's evaluation.
        bits: What is promised about kernels.
        tried: Whether the user's code is tried later, and the executor with it.

    Raises:
        ScenarioError: If "batched" or "vmap" is asked for and the model does not allow it.
    """
    model = task.build_model(0)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    small = sum(p.numel() for p in model.parameters()) < LARGE
    why_not = why_not_batched(task, spec, stacks=stacks, device=device, model=model)
    if executor == "batched" and why_not:
        raise ScenarioError(
            f"[engine] executor = 'batched': {why_not}; use executor = 'auto', 'vmap' or 'loop'"
        )
    kind: ExecutorKind
    if executor in ("auto", "batched") and not why_not:
        kind = "batched"
        why = "asked for" if executor == kind else "the model is a chain of known layers"
    else:
        reason = why_loop(task, spec, model=model, tried=tried)
        if executor == "vmap" and reason:
            raise ScenarioError(
                f"[engine] executor = 'vmap': {reason}; use executor = 'auto' or 'loop', or "
                "another model"
            )
        kind = "loop" if reason or executor == "loop" else "vmap"
        asked = "asked for" if executor == kind else "the model vectorises over clients"
        why = reason or asked
    if chunk_size is None:
        most = _MAX_SMALL_CHUNK if small else _MAX_CHUNK
        fits = max(2, _CHUNK_BYTES // max(1, size * _COPIES))
        chunk_size = equal_chunks(expected_cohort, min(fits, most))
    return ExecutionPlan(
        kind, why, chunk_size, threads, device, deterministic, evaluation_batch, bits=bits
    )


def equal_chunks(cohort: int, most: int) -> int:
    """Return how many clients a chunk holds: an even number of chunks, as equal as can be.

    Example:
        >>> equal_chunks(20, 32), equal_chunks(100, 32), equal_chunks(100, 64), equal_chunks(1, 32)
        (10, 25, 50, 2)
    """
    pairs = max(1, -(-cohort // (2 * most)))
    return max(2, -(-cohort // (2 * pairs)))


def why_not_batched(
    task: TaskLike,
    spec: SampleSpec,
    *,
    stacks: bool,
    device: str = "cpu",
    model: nn.Module | None = None,
) -> str | None:
    """Say why training cannot be written out layer by layer, or None: by the model's layers.

    Args:
        task: The task.
        spec: What one sample looks like.
        stacks: Whether the client procedure's step takes several clients at once.
        device: Where to compute.
        model: The task's model; None builds it.
    """
    if device != "cpu":
        # products on a GPU may differ by how many there are, and clients leave as they finish
        return f"it computes on the cpu, not on {device}"
    chain = chain_of(task.build_model(0) if model is None else model, spec.feature_shape)
    if chain is None:
        return "the model is not a chain of layers that it knows"
    if not stacks and not chain.convolves:
        return "the client procedure's step takes one client at a time"
    return None


def why_loop(
    task: TaskLike, spec: SampleSpec, *, model: nn.Module | None = None, tried: bool = False
) -> str | None:
    """Say why the task's model cannot be vectorised, or None: by its layers, then by a trial.

    A trial that torch could only run client by client, operation by operation, counts as a refusal:
    the loop is faster than that, and says so.

    Args:
        task: The task.
        spec: What one sample looks like.
        model: The task's model, whose dropout is seeded; None builds it.
        tried: Whether a trial of all of the user's code comes later, which is enough where the
            model is large.
    """
    model = seed_dropout(task.build_model(0) if model is None else model)
    if reason := loop_reason(model):
        return reason
    if tried and sum(p.numel() for p in model.parameters()) >= TRIED_ONCE:
        return None
    kept = KeptState([model, task])
    try:
        with loads("vmap"):
            return _trial(task, model, spec)
    finally:
        kept.put_back()


def _trial(task: TaskLike, model: nn.Module, spec: SampleSpec) -> str | None:
    """Run one gradient of two identical clients under vmap, as training does."""
    features, targets = made_up_samples(task, spec)
    model.train()

    def gradient(
        params: dict[str, torch.Tensor], others: dict[str, torch.Tensor], *batch: torch.Tensor
    ) -> Any:
        def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
            outputs = functional_call(model, {**params, **others}, (batch[0],))
            return task.sample_losses(outputs, batch[1]).sum()

        return torch.func.grad(loss)(params)

    def twice(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.expand(2, *t.shape).contiguous() for n, t in named.items()}

    with (
        put_back(),
        inside(model) as entered,
        warnings.catch_warnings(record=True) as heard,
    ):
        warnings.simplefilter("always")
        try:
            layers = dropout_layers(model)
            shapes = noise_shapes(model, layers, features[0])
            noise = {n: torch.ones(3, *s) for n, s in shapes.items()}
            params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
            rest |= dict(model.named_buffers()) | noise
            one = {**params, **rest}
            vmap(gradient)(twice(params), twice(rest), features, targets)
            # another third sample must not move the first two: padding would not be harmless
            others = torch.cat([features[0][:2], features[1][2:]])
            first, second = (
                functional_call(model, dict(one), (x,))[:2] for x in (features[0], others)
            )
            if not torch.allclose(first, second, rtol=1e-4, atol=1e-6):
                return "a sample's output depends on the other samples of its batch"
        except Exception as error:  # whatever it is, it is reported and the loop serves
            first_line = str(error).strip().splitlines()[:1] or ["no message"]
            layers_entered = [f"{type(m).__name__} '{name}'" for name, m in entered if name]
            where = f" in {layers_entered[-1]}" if layers_entered else ""
            return (
                f"torch.func.vmap refuses the model{where} ({type(error).__name__}: "
                f"{first_line[0]})"
            )
    return without_a_rule(heard)


def without_a_rule(heard: Sequence[warnings.WarningMessage]) -> str | None:
    """Name the operations that torch could only run client by client, by what it warned of."""
    names = sorted({m[1] for each in heard if (m := _NO_RULE.search(str(each.message)))})
    return f"torch.func.vmap has no batching rule for {', '.join(names)}" if names else None


def made_up_samples(task: TaskLike, spec: SampleSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return made-up samples of two clients, three each: (features, targets)."""
    random = generator(0, "trial")
    shape = (2, 3, *spec.feature_shape)
    if spec.vocabulary:
        features = torch.from_numpy(random.integers(spec.vocabulary, size=shape))
    else:
        features = torch.from_numpy(random.standard_normal(shape)).to(task.dtype)
    if spec.has_classes:
        return features, torch.zeros((2, 3), dtype=torch.int64)
    return features, torch.zeros((2, 3, *spec.target_shape))


@contextlib.contextmanager
def inside(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Keep the layers that have been entered and not left, the innermost last."""
    entered: list[tuple[str, nn.Module]] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, _: entered.append((name, module))

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        entered.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)
        ]  # fmt: skip
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()
