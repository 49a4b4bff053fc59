"""Two models whose outputs are mixed, evaluated as if they were one. Needs torch alone.

Both are laid out as one set of named tensors, so that what measures a model also measures the
mixture, of one client or, under vmap, of many.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from fedsim.client.procedure import Named

_SHARE, _FIRST, _SECOND = "mixture.share", "mixture.first.", "mixture.second."


def outputs_mixed(share: Tensor, first: Named, second: Named) -> Named:
    """Return the model whose outputs are share * f(first) + (1 - share) * f(second).

    Args:
        share: In [0, 1].
        first: One model's tensors by name.
        second: The other's.
    """
    return (
        {_SHARE: share}
        | {f"{_FIRST}{name}": tensor for name, tensor in first.items()}
        | {f"{_SECOND}{name}": tensor for name, tensor in second.items()}
    )


def is_mixture(named: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of two models, see `outputs_mixed`."""
    return _SHARE in named


def beside_statistics(model: Named, statistics: Named) -> Named:
    """Return a model with its statistics, which both models of a mixture have."""
    if not is_mixture(model):
        return {**model, **statistics}
    both = (_FIRST, _SECOND)
    return {**model, **{f"{each}{name}": t for each in both for name, t in statistics.items()}}


def outputs_of(model: nn.Module, named: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return a model's outputs, or those of a mixture.

    Args:
        model: The module of either.
        named: Its tensors, or those of `outputs_mixed`.
        features: Samples, `[n, ...]`.

    Example:
        >>> import torch
        >>> model, ones = nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)}
        >>> both = outputs_mixed(torch.tensor(0.25), ones, {"weight": torch.zeros(1, 1)})
        >>> outputs_of(model, both, torch.ones(1, 1))
        tensor([[0.2500]])
    """
    if not is_mixture(named):
        outputs: Tensor = functional_call(model, dict(named), (features,))
        return outputs
    share = named[_SHARE]
    first, second = (
        functional_call(
            model, {n.removeprefix(start): t for n, t in named.items() if n.startswith(start)},
            (features,),
        )
        for start in (_FIRST, _SECOND)
    )  # fmt: skip
    mixed: Tensor = share * first + (1 - share) * second
    return mixed
