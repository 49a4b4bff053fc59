"""Functions of torch that differ between processors' makers under any settings, made equal.

MKL's elementary functions begin with the processor's approximate reciprocals (RCPPS, RSQRTPS),
whose last bits are each maker's own: `torch.sqrt` is not rounded as IEEE 754 asks, and differs in
one of eight numbers. oneDNN's LSTM and MKL's float32 Cholesky factor differ likewise. Under
portable bits these are computed by NumPy, whose kernels do without, in float64, or by torch's own
loops. Found by running each operation as two makers' processors would; `docs/architecture.md` says
which were tried.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _logit(values: np.ndarray, eps: float | None = None) -> np.ndarray:
    inside = values if eps is None else np.clip(values, eps, 1 - eps)
    found: np.ndarray = np.log(inside / (1 - inside))
    return found


_ELEMENTARY: dict[str, Callable[..., Any]] = {
    "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "log": np.log, "log2": np.log2,
    "log10": np.log10, "sqrt": np.sqrt, "tan": np.tan, "logit": _logit,
}  # fmt: skip
_OF_NUMPY = (torch.float32, torch.float64)
_KEY = "CPU"


@functools.cache
def replace_kernels() -> torch.library.Library:
    """Replace torch's kernels in this process, once and for as long as it lives.

    Returns:
        What holds the replacements.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that kernels are replaced
        for name, function in _ELEMENTARY.items():
            fresh, into, in_place = _elementary(name, function)
            library.impl(name, fresh, _KEY)
            library.impl(f"{name}.out", into, _KEY)
            library.impl(f"{name}_", in_place, _KEY)
        library.impl("linalg_cholesky_ex", _cholesky(), _KEY)
    torch.nn.LSTM.forward = _without_onednn(torch.nn.LSTM.forward)  # type: ignore[method-assign]
    return library


def _elementary(name: str, function: Callable[..., Any]) -> tuple[Callable[..., Tensor], ...]:
    """A function's three kernels: of a new tensor, of one that is given, of its argument."""
    original = _kernel(f"aten::{name}")

    def fresh(values: Tensor, *more: Any) -> Tensor:
        if values.dtype not in _OF_NUMPY:
            found: Tensor = original(values, *more)
            return found
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(function(values.detach().numpy(), *more)))

    def into(values: Tensor, *more: Any, out: Tensor) -> Tensor:
        found = fresh(values, *more)
        if out.shape != found.shape:
            out.resize_(found.shape)
        return out.copy_(found)

    def in_place(values: Tensor, *more: Any) -> Tensor:
        return values.copy_(fresh(values, *more))

    return fresh, into, in_place


def _cholesky() -> Callable[..., tuple[Tensor, Tensor]]:
    original = _kernel("aten::linalg_cholesky_ex")

    def factor(
        matrix: Tensor, *, upper: bool = False, check_errors: bool = False
    ) -> tuple[Tensor, Tensor]:
        wide = matrix.double() if matrix.dtype == torch.float32 else matrix
        found, info = original(wide, upper=upper, check_errors=check_errors)
        return found.to(matrix.dtype), info

    return factor


def _without_onednn(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def of_torch(*given: Any, **named: Any) -> Any:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return forward(*given, **named)
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    return of_torch


def _kernel(name: str) -> Callable[..., Any]:
    """Torch's own kernel of an operation."""
    kernel = torch.library.get_kernel(name, _KEY)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return functools.partial(kernel.call_boxed, keys)
