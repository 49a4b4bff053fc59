"""Why a model or a procedure cannot be vectorised over clients, told by its layers or tried."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.conv import _ConvNd

from fedsim.basics.generators import put_back
from fedsim.basics.kept_state import KeptState
from fedsim.basics.loading import loads
from fedsim.basics.rng import generator
from fedsim.basics.samples import SampleSpec
from fedsim.client.batching.dropout import dropout_layers, noise_shapes, seed_dropout
from fedsim.client.chains.chain import chain_of
from fedsim.client.job import TaskLike

TRIED_ONCE = 1_000_000  # parameters from which a user's model is not tried twice
_NO_RULE = re.compile(r"not yet implemented the batching rule for ([\w:.]+?)\.? ")


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


def slower_together(model: nn.Module, device: str = "cpu") -> str | None:
    """Say why a model that can be vectorised trains faster client by client, or None.

    On a CPU the convolutions of several clients are computed as one grouped convolution. Where the
    layers are large, this takes longer than one client after another.

    Example:
        >>> slower_together(nn.Conv2d(512, 512, 3))
        'on a CPU the convolutions of a large model take longer for several clients at once'
        >>> slower_together(nn.Conv2d(8, 8, 3)) is None
        True
    """
    large = sum(p.numel() for p in model.parameters()) >= TRIED_ONCE
    if device == "cpu" and large and any(isinstance(m, _ConvNd) for m in model.modules()):
        return "on a CPU the convolutions of a large model take longer for several clients at once"
    return None


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
        except Exception as error:  # of any kind: it is reported, and the loop serves
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
