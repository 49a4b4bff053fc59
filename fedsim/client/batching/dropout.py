"""Dropout whose masks are data, drawn from (seed, round, client, step). Needs torch alone."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

_DROPOUTS: dict[type[nn.Module], bool] = {
    nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True
}  # fmt: skip
# torch takes values with another number of axes for one sample, whose channels come first
_AXES: dict[type[nn.Module], int] = {nn.Dropout1d: 3, nn.Dropout3d: 5}


class SeededDropout:
    """Stands in a dropout layer of torch's as its `forward`, and takes the mask as data.

    The layer's buffer `noise` holds uniform numbers drawn from (seed, round, client). What is kept
    is scaled by 1/(1-p); evaluation is the identity. The layer stays torch's own, with its type,
    `p`, `inplace` and hooks, so that code which looks for dropout layers finds it.

    A mask serves one use in one pass. A further use, or values that the mask does not fit, are
    dropped as torch's layer would, from torch's generator. Where activation checkpointing computes
    the layer once more in the backward pass it takes the mask of that use again.

    Args:
        layer: An `nn.Dropout`, or one of channels.
        name: What the layer is called in its model, for messages.

    Attributes:
        channels: Whether whole channels are dropped.
        watcher: Is told what the layer is given, and nothing is dropped; None outside of a probe.
    """

    def __init__(self, layer: nn.Module, name: str = "") -> None:
        self.layer, self.name = layer, name
        self.channels = _DROPOUTS[type(layer)]
        self.watcher: Callable[[Tensor], None] | None = None
        self._spent = self._mask = torch.zeros(())
        self._further = False  # whether the layer has been used once more in this pass
        layer.register_buffer("noise", torch.zeros(()), persistent=False)
        layer.__dict__["forward"] = self

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        """Drop the values whose noise lies below p."""
        layer, p = self.layer, float(self.layer.p)  # type: ignore[arg-type]
        if self.watcher is not None:
            self.watcher(input)
            return input
        if not layer.training or p == 0:
            return input
        noise = layer._buffers["noise"]
        assert noise is not None
        again = torch._C._current_graph_task_id() != -1  # autograd is in a backward pass
        if again and (noise is self._spent or not noise.dim()):
            noise = self._of_the_pass()
        elif noise is self._spent:
            self._further = True
        if not self._fits(noise, input) or not 0 < p <= 1:
            return self._drawn(input)
        # `functional_call` gives the buffer for one pass, and takes it away at its end
        layer._buffers["noise"] = self._spent
        if not again:
            self._mask, self._further = noise, False
        if layer.inplace:
            return input.mul_(0) if p == 1 else input.mul_(_kept(noise, p, input)).div_(1 - p)
        return input * 0 if p == 1 else input * _kept(noise, p, input) / (1 - p)

    def takes_for_one_sample(self, axes: int) -> bool:
        """Whether torch takes values with that many axes for one sample, and no batch of them."""
        return _AXES.get(type(self.layer), axes) != axes

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the noise for values of a shape, both `[batch, ...]`."""
        return (*shape[:2], *(1 for _ in shape[2:])) if self.channels else shape

    def _fits(self, noise: Tensor, values: Tensor) -> bool:
        shape = tuple(values.shape)
        if not shape or self.takes_for_one_sample(len(shape)):
            return False
        return tuple(noise.shape) == self.noise_shape(shape)

    def _of_the_pass(self) -> Tensor:
        """The mask that the layer has taken in the pass whose backward pass this is."""
        if self._further or self.layer._buffers["noise"] is not self._spent:
            raise RuntimeError(
                f"dropout layer '{self.name}' is computed once more in the backward pass, and "
                "which mask it had is not known; leave it out of what is checkpointed"
            )
        return self._mask

    def _drawn(self, values: Tensor) -> Tensor:
        """What torch's own layer makes of values."""
        try:
            dropped: Tensor = type(self.layer).forward(self.layer, values)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise RuntimeError(
                f"dropout layer '{self.name}' has no mask for values {list(values.shape)} or for "
                "this further use in one pass, and can draw none while clients train together; "
                "set [engine] executor = 'loop'"
            ) from error
        return dropped


def _kept(noise: Tensor, p: float, values: Tensor) -> Tensor:
    return (noise >= p).to(values.dtype)


def seed_dropout(model: nn.Module) -> nn.Module:
    """Have torch's dropout layers take masks that are drawn before a pass; return the model.

    A layer with a `forward` of its own is left as it is.
    """
    for name, module in model.named_modules():
        if type(module) in _DROPOUTS and not {"forward", "noise"} & vars(module).keys():
            SeededDropout(module, name)
    return model


def dropout_layers(model: nn.Module) -> dict[str, SeededDropout]:
    """Return what stands in the seeded dropout layers, by the name of their noise buffer."""
    return {
        f"{name}.noise": seeded
        for name, module in model.named_modules()
        if isinstance(seeded := vars(module).get("forward"), SeededDropout)
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
                f"{_shown(name)} is used more than once in one forward pass; give each use a "
                "layer of its own"
            )
    return {name: layers[name].noise_shape(shapes[0])[1:] for name, shapes in found.items()}


def why_not_seeded(
    model: nn.Module, layers: Mapping[str, SeededDropout], features: Tensor
) -> str | None:
    """Say why masks cannot be drawn before a pass, a row for each sample, or None.

    So it is where a layer is used more than once, in some passes only, or on values whose first
    axis is not the batch. Batches of two and of three samples are tried, and the one given.

    Args:
        model: The model.
        layers: Its dropout layers by buffer name.
        features: A batch as training has them, `[n, ...]`, of one sample or more.
    """
    if not layers:
        return None
    one = features[:1]
    passes = {n: _uses(model, layers, one.expand(n, *one.shape[1:])) for n in (2, 3)}
    if len(features) not in passes:
        passes[len(features)] = _uses(model, layers, features)
    for name in dict.fromkeys(name for found in passes.values() for name in found):
        used = {n: found.get(name, []) for n, found in passes.items()}
        if why := _irregular(layers[name], used):
            return f"{_shown(name)} is {why}"
    return None


def _irregular(layer: SeededDropout, used: Mapping[int, list[tuple[int, ...]]]) -> str | None:
    """What is irregular in the shapes that a layer is given in passes on so many samples."""
    for length, shapes in used.items():
        if len(shapes) > 1:
            return f"used {len(shapes)} times in one pass on {length} samples"
        if not shapes:
            return "used in some passes of training and not in others"
    sample = next(iter(used.values()))[0][1:]
    for length, (shape,) in used.items():
        if shape != (length, *sample):
            return f"not used along the batch: on {list(shape)} for a batch of {length}"
    if layer.takes_for_one_sample(1 + len(sample)):
        kind = type(layer.layer).__name__
        return f"a {kind}, which takes values of {1 + len(sample)} axes for one sample"
    return None


def _shown(name: str) -> str:
    return f"dropout layer '{name.removesuffix('.noise')}'"


def _uses(
    model: nn.Module, layers: Mapping[str, SeededDropout], features: Tensor
) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of what each layer is given in one pass of training, in the order of use."""
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def watcher(name: str) -> Callable[[Tensor], None]:
        return lambda values: shapes.setdefault(name, []).append(tuple(values.shape))

    training = model.training
    # statistics move in training: those of this pass are no one's
    buffers = {n: tensor.clone() for n, tensor in model.named_buffers() if n not in layers}
    model.train()
    try:
        for name, layer in layers.items():
            layer.watcher = watcher(name)
        with torch.no_grad():
            functional_call(model, buffers, (features,))
    finally:
        model.train(training)
        for layer in layers.values():
            layer.watcher = None
    return shapes
