"""Models that are chains of known layers, with both passes written out. Needs torch alone.

A chain works on the tensors of one client (values `[batch, ...]`) or on those of several, one row
each (values `[clients, batch, ...]`): a dense layer of all clients is one batched product. Nothing
here goes through autograd or `torch.func`, whose dispatch costs more than the arithmetic of small
models.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedsim.client.batching.dropout import SeededDropout
from fedsim.client.chains.stepping import Stepping
from fedsim.client.procedure import Named

_aten = torch.ops.aten
_NARROW = 16  # outputs below which weights times samples is the faster order of a product
_PLAIN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Layer(Protocol):
    """One layer; what `forward` keeps is what `backward` is given."""

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        """Return (outputs, what the backward pass needs)."""

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        """Return the objective's gradient by the layer's inputs, None when it is not wanted.

        Args:
            slope: The gradient by the layer's outputs; may be overwritten.
            kept: From the forward pass.
            tensors: The model's tensors.
            into: Where the gradients by the layer's tensors go, or what is done with them at once;
                None where they are not wanted.
            wanted: Whether the gradient by the inputs is wanted.
        """


class _Dense(NamedTuple):
    """`nn.Linear`."""

    weight: str
    bias: str | None

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        weight = tensors[self.weight]
        bias = None if self.bias is None else tensors[self.bias]
        if values.dim() == 2:
            return nn.functional.linear(values, weight, bias), values
        if weight.shape[1] < _NARROW <= values.shape[1]:
            turned = values.transpose(1, 2)
            if bias is None:
                outputs = torch.bmm(weight, turned)
            else:
                outputs = torch.baddbmm(bias.unsqueeze(2), weight, turned)
            # samples stay side by side: kernels along few outputs are slow
            return outputs.transpose(1, 2), values
        turned = weight.transpose(1, 2)
        if bias is None:
            return torch.bmm(values, turned), values
        return torch.baddbmm(bias.unsqueeze(1), values, turned), values

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        weight = tensors[self.weight]
        below = torch.matmul(slope, weight) if wanted else None
        if into is None:
            return below
        turned = slope.transpose(-1, -2)
        by_bias = None if self.bias is None else slope.sum(-2)
        if isinstance(into, Stepping):
            into.of_product(self.weight, weight, turned, kept)
            if by_bias is not None and self.bias is not None:
                into.of(self.bias, tensors[self.bias], by_bias)
        else:
            into[self.weight] = torch.matmul(turned, kept)
            if by_bias is not None and self.bias is not None:
                into[self.bias] = by_bias
        return below


class _Convolution(NamedTuple):
    """`nn.Conv2d` of one client."""

    weight: str
    bias: str | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        bias = None if self.bias is None else tensors[self.bias]
        outputs = torch.conv2d(
            values, tensors[self.weight], bias, self.stride, self.padding, self.dilation,
            self.groups,
        )  # fmt: skip
        return outputs, values

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        weight = tensors[self.weight]
        below, by_weight, by_bias = _aten.convolution_backward(
            slope, kept, weight, None if self.bias is None else [weight.shape[0]], self.stride,
            self.padding, self.dilation, False, [0, 0], self.groups,
            [wanted, into is not None, into is not None and self.bias is not None],
        )  # fmt: skip
        if into is None:
            return below if wanted else None
        for name, gradient in ((self.weight, by_weight), (self.bias, by_bias)):
            if name is None:
                continue
            if isinstance(into, Stepping):
                into.of(name, tensors[name], gradient)
            else:
                into[name] = gradient
        return below if wanted else None


class _MaxPool(NamedTuple):
    """`nn.MaxPool2d` of one client."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil: bool

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        outputs, places = _aten.max_pool2d_with_indices(values, *self)
        return outputs, (values, places)

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        values, places = kept
        if not wanted:
            return None
        below: Tensor = _aten.max_pool2d_with_indices_backward(slope, values, *self, places)
        return below


class _Rectifier:
    """`nn.ReLU`; it overwrites its input, which no other layer keeps."""

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        outputs = values.relu_()
        return outputs, outputs

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        return _aten.threshold_backward(slope, kept, 0) if wanted else None


class _Flattening(NamedTuple):
    """`nn.Flatten` of all but the batch; `shape` is that of one sample before."""

    shape: tuple[int, ...]

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        return values.flatten(values.dim() - len(self.shape)), None

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        if not wanted:
            return None
        below: Tensor = slope.unflatten(-1, self.shape)
        if len(self.shape) == 3 and below.dim() == 4:
            return below.contiguous(memory_format=torch.channels_last)
        return below


class _Dropping(NamedTuple):
    """`fedsim.client.batching.dropout.SeededDropout`."""

    noise: str
    p: float

    def forward(self, values: Tensor, tensors: Named, noise: Mapping[str, Tensor]) -> Any:
        if self.p == 0:
            return values, None
        if self.p == 1:
            return values * 0, values.new_zeros(())
        kept = (noise[self.noise] >= self.p).to(values.dtype)
        return values * kept / (1 - self.p), kept

    def backward(
        self, slope: Tensor, kept: Any, tensors: Named, into: Named | Stepping | None, wanted: bool
    ) -> Tensor | None:
        if not wanted or kept is None:
            return slope if wanted else None
        masked: Tensor = slope * kept
        return masked if self.p == 1 else masked / (1 - self.p)


class Chain:
    """A model as a chain of layers.

    Args:
        layers: The layers in order.

    Attributes:
        convolves: Whether a layer works on one client alone, so that clients go one at a time.
        spoils: Whether the forward pass overwrites the features.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = _pooled_first(layers)
        self.convolves = any(isinstance(layer, _Convolution | _MaxPool) for layer in layers)
        with_tensors = [isinstance(layer, _Dense | _Convolution) for layer in self.layers]
        # below the first layer that has tensors no gradient is needed
        self._first = with_tensors.index(True)
        self.spoils = any(isinstance(layer, _Rectifier) for layer in self.layers[: self._first])

    def forward(
        self, tensors: Named, features: Tensor, noise: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[Any]]:
        """Return (outputs, what `backward` needs); see `spoils`."""
        kept = []
        values = features
        for layer in self.layers:
            values, keeps = layer.forward(values, tensors, noise)
            kept.append(keeps)
        return values, kept

    def representations(self, kept: list[Any]) -> Tensor:
        """Return what went into the last layer, which must be linear.

        Raises:
            ValueError: If it is another one.
        """
        if not isinstance(self.layers[-1], _Dense):
            raise ValueError("the model's last module is no Linear layer")
        values: Tensor = kept[-1]
        return values

    def backward(
        self,
        slope: Tensor,
        kept: list[Any],
        tensors: Named,
        into: Named | Stepping,
        inner: Tensor | None = None,
    ) -> None:
        """Go back from the objective's gradient by the outputs; see `Layer.backward`.

        `inner` is a further gradient by what goes into the last layer.
        """
        for place in reversed(range(self._first, len(self.layers))):
            wanted = place > self._first
            below = self.layers[place].backward(slope, kept[place], tensors, into, wanted)
            if below is not None:
                slope = below if inner is None else below + inner
            inner = None

    def slope(self, slope: Tensor, kept: list[Any], tensors: Named) -> Tensor:
        """Go back from the objective's gradient by the outputs to that by the features."""
        for layer, keeps in zip(reversed(self.layers), reversed(kept), strict=True):
            below = layer.backward(slope, keeps, tensors, None, True)
            assert below is not None
            slope = below
        return slope

    def in_evaluation(self) -> "Chain":
        """Return the chain without its dropout, as a model is in evaluation."""
        return Chain([each for each in self.layers if not isinstance(each, _Dropping)])


def chain_of(model: nn.Module, feature_shape: Sequence[int]) -> Chain | None:
    """Return a model as a chain, or None when it is none that is known here.

    It must be an `nn.Sequential` (of such) of Linear, ReLU, Flatten, Identity, dropout, Conv2d and
    MaxPool2d, each used once, without hooks or own methods, every tensor trained and in one dtype.

    Args:
        model: The model; dropout layers may be torch's or seeded.
        feature_shape: Shape of one sample.

    Example:
        >>> chain_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2)).convolves
        False
        >>> chain_of(nn.Sequential(nn.Linear(4, 2), nn.LSTM(2, 2)), (4,)) is None
        True
    """
    leaves = _leaves(model, "")
    parameters = list(model.parameters())
    named = dict(model.named_parameters(remove_duplicate=False))
    dtypes = {parameter.dtype for parameter in parameters}
    if (
        leaves is None
        or len({id(module) for _, module in leaves}) < len(leaves)
        or len(named) != len(parameters)
        or not all(parameter.requires_grad for parameter in parameters)
        or len(dtypes) != 1
        or not dtypes <= {torch.float32, torch.float64}
    ):
        return None
    layers: list[Layer] = []
    shape = tuple(feature_shape)
    for name, module in leaves:
        made = _layer(name, module, shape)
        if made is None:
            return None
        layer, shape = made
        if layer is not None:
            layers.append(layer)
    return Chain(layers) if any(isinstance(x, _Dense | _Convolution) for x in layers) else None


def _leaves(module: nn.Module, name: str) -> list[tuple[str, nn.Module]] | None:
    """The layers of nested Sequentials in order, or None when something else holds layers."""
    own = vars(module).get("train") or vars(module).get("forward")
    hooked = any(getattr(module, hooks) for hooks in _PLAIN)
    if hooked or not isinstance(own, SeededDropout | None):
        return None
    if type(module) is not nn.Sequential:  # nor one that is parametrised, which holds layers
        return None if module._modules else [(name, module)]
    found = []
    for key, child in module._modules.items():
        inner = None if child is None else _leaves(child, f"{name}.{key}" if name else key)
        if inner is None:
            return None
        found += inner
    return found


def _layer(
    name: str, module: nn.Module, shape: tuple[int, ...]
) -> tuple[Layer | None, tuple[int, ...]] | None:
    """Return (the layer or None for nothing to do, the shape of a sample after it), if known."""
    prefix = f"{name}." if name else ""
    kind = type(module)
    if kind is nn.Identity:
        return None, shape
    if kind is nn.ReLU:
        return _Rectifier(), shape
    if kind in (nn.Dropout, nn.Dropout2d):
        return _Dropping(f"{prefix}noise", float(module.p)), shape  # type: ignore[arg-type]
    if isinstance(module, nn.Flatten) and kind is nn.Flatten:
        if module.start_dim != 1 or module.end_dim not in (-1, len(shape)) or not shape:
            return None
        return _Flattening(shape), (math.prod(shape),)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        if shape != (module.in_features,):
            return None
        bias = None if module.bias is None else f"{prefix}bias"
        return _Dense(f"{prefix}weight", bias), (module.out_features,)
    if len(shape) != 3:
        return None
    layer: Layer
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        layer = _Convolution(
            f"{prefix}weight",
            None if module.bias is None else f"{prefix}bias",
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )
    elif isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d and not module.return_indices:
        kernel, stride, padding, dilation = (
            list(_pair(length))
            for length in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        layer = _MaxPool(kernel, stride, padding, dilation, module.ceil_mode)
    else:
        return None
    with torch.no_grad():
        plain = torch.zeros((1, *shape), dtype=_dtype(module))
        return layer, tuple(module(plain).shape[1:])


def _dtype(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _pair(length: int | tuple[int, ...]) -> tuple[int, ...]:
    return (length, length) if isinstance(length, int) else length


def _pooled_first(layers: Sequence[Layer]) -> list[Layer]:
    """Put pooling before the rectifier that it follows: the same numbers from fewer values."""
    ordered = list(layers)
    for place in range(1, len(ordered)):
        if isinstance(ordered[place], _MaxPool) and isinstance(ordered[place - 1], _Rectifier):
            ordered[place - 1], ordered[place] = ordered[place], ordered[place - 1]
    return ordered
