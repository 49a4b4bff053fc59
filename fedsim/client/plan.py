"""The execution plan: everything about *how* a run computes that can change a bit of its results.

A plan is derived from scenario values alone, never from workers, free memory or time, and is
written to the run folder and into checkpoints. Equal plan, equal bits.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedsim.basics.errors import ScenarioError
from fedsim.basics.kernels import Bits
from fedsim.basics.samples import SampleSpec
from fedsim.client.job import ExecutorKind, TaskLike
from fedsim.client.vectorising import slower_together, why_loop, why_not_batched
from fedsim.client.ways import LARGE

REDUCTION = "float64, client order, rounded once"
_MAX_CHUNK = 32
_MAX_SMALL_CHUNK = 64  # of models that are not LARGE
_CHUNK_BYTES = 2**30  # parameters, gradients, moments and activations of one chunk
_COPIES = 8


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
            vectorised and is not slower so.
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
        slower = slower_together(model, device) if executor == "auto" else None
        reason = slower or why_loop(task, spec, model=model, tried=tried)
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
