"""Dropout whose masks are data, drawn from (seed, round, client, step). Needs torch alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
    """Replace torch's dropout layers by seeded ones, in place, and return the model.

    A layer that stands in several places is replaced by one and the same layer in all of them.
    """
    seeded: dict[nn.Module, SeededDropout] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.modules.dropout._DropoutNd) and type(child) in _DROPOUTS:
                if child not in seeded:
                    seeded[child] = SeededDropout(child.p, channels=_DROPOUTS[type(child)])
                parent._modules[name] = seeded[child]
    return model


def dropout_layers(model: nn.Module) -> dict[str, SeededDropout]:
    """Return the seeded dropout layers by the name of their noise buffer."""
    return {
        f"{name}.noise": module
        for name, module in model.named_modules()
        if isinstance(module, SeededDropout)
    }


def noise_shapes(
    model: nn.Module, layers: Mapping[str, SeededDropout], features: Tensor
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's noise for one sample, found by one forward pass.

    Args:
        model: The model.
        layers: Its dropout layers by buffer name.
        features: At least one sample, `[n, ...]`.

    Raises:
        ValueError: If a layer is used more than once in a forward pass.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if not layers:
        return shapes

    def record(name: str, module: SeededDropout, values: Tensor) -> None:
        if name in shapes:
            raise ValueError(
                f"dropout layer '{name.removesuffix('.noise')}' is used more than once in one "
                "forward pass; give each use a layer of its own"
            )
        full = tuple(values.shape[1:])
        shapes[name] = (*full[:1], *(1 for _ in full[1:])) if module.channels else full

    hooks = [
        module.register_forward_pre_hook(lambda m, args, n=name: record(n, m, args[0]))
        for name, module in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(features[:1].expand(2, *features.shape[1:]))  # some layers refuse a single sample
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return shapes
