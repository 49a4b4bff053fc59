"""Tensors of a module by name."""

from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors by name: its `state_dict` without extra state of other kinds."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
