"""Why a model cannot be vectorised over clients."""

from torch import nn


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
