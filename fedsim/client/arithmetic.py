"""Arithmetic that is the same for one client's tensors and for several clients', a row each."""

from typing import Any

import torch
from torch import Tensor

from fedsim.client.procedure import Named


def along(numbers: Any, tensor: Tensor) -> Any:
    """Return a number, or one per client, as a factor of a tensor, or of each client's tensor.

    A plain number is one already.

    Example:
        >>> import torch
        >>> along(torch.ones(3), torch.zeros(3, 4, 5)).shape
        torch.Size([3, 1, 1])
    """
    if not isinstance(numbers, Tensor):
        return numbers
    return numbers.reshape(numbers.shape + (1,) * (tensor.dim() - numbers.dim()))


def inner_product(one: Named, other: Named, clients: torch.Size) -> Tensor:
    """Return the inner product of two sets of tensors, of one client `[]` or of several `[K]`.

    Args:
        one: Tensors by name.
        other: Others of the same names and shapes.
        clients: The dimensions before those of one client's tensors: none, or `[K]`.

    Example:
        >>> pair = {"w": torch.ones(2, 3)}
        >>> inner_product(pair, pair, torch.Size()), inner_product(pair, pair, torch.Size([2]))
        (tensor(6.), tensor([3., 3.]))
    """
    products = [(one[n] * other[n]).reshape(*clients, -1).sum(-1) for n in one]
    return torch.stack(products).sum(0)


def norm_of(named: Named, clients: torch.Size) -> Tensor:
    """Return the Euclidean norm of all tensors together, of one client or of each.

    Args:
        named: The tensors, a row per client where there are several.
        clients: Shape of what is one number per client: [] or [clients], as a step's loss has it.

    Example:
        >>> norm_of({"a": torch.ones(2, 3), "b": torch.ones(2, 1)}, torch.Size([2]))
        tensor([2., 2.])
    """
    return inner_product(named, named, clients).sqrt()
