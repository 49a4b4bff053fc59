"""Dropout whose masks are data, drawn from (seed, round, client, step). Needs torch alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


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
    """Return the shape of each layer's noise for one sample, found by one pass of training.

    A layer that takes no part in the pass has no shape. The model's tensors stay as they are; what
    else it keeps is the caller's to put back.

    Args:
        model: The model.
        layers: Its dropout layers by buffer name.
        features: At least one sample, `[n, ...]`.

    Raises:
        ValueError: If a layer's mask cannot be drawn before the pass, see `why_not_seeded`.
    """
    found = _uses(model, layers, features[:1].expand(2, *features.shape[1:])) if layers else {}
    for name, shapes in found.items():
        if len(shapes) > 1:
            raise ValueError(
                f"dropout layer '{name.removesuffix('.noise')}' is used more than once in one "
                "forward pass; give each use a layer of its own"
            )
    return {name: _of_sample(layers[name], shapes[0]) for name, shapes in found.items()}


def why_not_seeded(
    model: nn.Module, layers: Mapping[str, SeededDropout], features: Tensor
) -> str | None:
    """Say why masks cannot be drawn before a pass, a row for each sample, or None.

    So it is where a layer is used more than once, or on values whose first axis is not the batch.

    Args:
        model: The model.
        layers: Its dropout layers by buffer name.
        features: At least one sample, `[n, ...]`.
    """
    if not layers:
        return None
    one = features[:1]
    by_length = {n: _uses(model, layers, one.expand(n, *one.shape[1:])) for n in (2, 3)}
    for name, two in by_length[2].items():
        shown, three = f"dropout layer '{name.removesuffix('.noise')}'", by_length[3].get(name, [])
        if len(two) > 1:
            return f"{shown} is used {len(two)} times in one pass"
        if len(three) != 1 or (2, *two[0][1:]) != two[0] or (3, *two[0][1:]) != three[0]:
            return f"{shown} is not used along the batch: on {list(two[0])} for a batch of 2"
    return None


def _of_sample(layer: SeededDropout, shape: tuple[int, ...]) -> tuple[int, ...]:
    full = shape[1:]
    return (*full[:1], *(1 for _ in full[1:])) if layer.channels else full


def _uses(
    model: nn.Module, layers: Mapping[str, SeededDropout], features: Tensor
) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of what each layer is given in one pass of training."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, n=name: shapes.setdefault(n, []).append(tuple(args[0].shape))
        )
        for name, module in layers.items()
    ]
    training = model.training
    noise = {name: module.noise for name, module in layers.items()}
    # statistics move in training: those of this pass are no one's
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers() if name not in noise}
    model.train()
    try:
        for module in layers.values():
            module.noise = torch.ones_like(module.noise)  # keeps every value
        with torch.no_grad():
            functional_call(model, buffers, (features,))
    finally:
        model.train(training)
        for name, module in layers.items():
            module.noise = noise[name]
        for hook in hooks:
            hook.remove()
    return shapes
