"""What of a user's model can be held, sent and made again; the rest is refused by name."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedsim.basics.errors import ScenarioError
from fedsim.basics.tensors import tensors_of

_NUMPY_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_OF_GRADIENTS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells whether two models begin alike: a checksum of each of their tensors and arrays."""
    found: dict[str, Any] = {**tensors_of(model), **dict(model.named_buffers())}
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor | np.ndarray):
                found[f"{place}.{name}".lstrip(".")] = value
    return {name: _checksum(value) for name, value in found.items()}


def _checksum(value: Tensor | np.ndarray) -> tuple[Any, ...]:
    """Shape and checksum of the bytes; the kind alone where there are none to be had."""
    if isinstance(value, Tensor):
        if is_lazy(value) or value.is_meta or value.is_quantized or value.layout != torch.strided:
            return (type(value).__name__,)
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif value.dtype.hasobject:
        return (str(value.dtype),)
    else:
        array = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return (*value.shape, zlib.crc32(array.data))


def require_kept(model: nn.Module) -> None:
    """Refuse what neither a message nor a file can hold, before anything is asked of the model.

    Raises:
        ScenarioError: Naming the module or tensor, and what is allowed.
    """
    for place, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ScenarioError(
                f"[task] model: '{place or type(model).__name__}' is compiled by torch.jit, and "
                "its tensors cannot be put in place; give the module as it was before"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ScenarioError(
                f"[task] model: '{name}' lies on the device 'meta' and holds no numbers; make it "
                "on the CPU"
            )
    for name, tensor in tensors_of(model).items():
        if is_lazy(tensor):
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = f"{kind}, {'quantized' if tensor.is_quantized else tensor.layout}"
        elif tensor.dtype in _NUMPY_DTYPES or tensor.is_floating_point():
            continue  # floating-point numbers get the dtype of the task
        raise ScenarioError(
            f"[task] model: '{name}' is {kind}, which cannot be sent or kept; allowed are dense "
            "tensors of floating-point numbers, integers and truth values"
        )


def require_complete(model: nn.Module) -> None:
    """Refuse a model of which training would change what nobody sends, or leave what it should.

    Raises:
        ScenarioError: Naming the tensor, and what to do.
    """
    held = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *held.items()]:
        if is_lazy(tensor):
            raise ScenarioError(
                f"[task] model: '{name}' has no shape yet after a pass in evaluation: its layer is "
                "used in training alone, or never; give the layer its sizes, or leave it out"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in held:
            raise ScenarioError(
                f"[task] model: parameter '{name}' is trained, and the model's state_dict() does "
                "not hold it under this name: what it does not hold is neither sent nor kept; let "
                "it hold all that is trained, or set requires_grad to False"
            )
        if any(getattr(parameter, hooks, None) for hooks in _OF_GRADIENTS):
            raise ScenarioError(
                f"[task] model: parameter '{name}' has a hook on its gradient, which would never "
                "run: gradients are taken with other tensors in its place; use [task] freeze, a "
                "part of local training, or a hook on the module"
            )
