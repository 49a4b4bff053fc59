"""Tensors that each client keeps to itself, by name. Needs torch alone."""

from collections.abc import Sequence

from torch import nn

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.patterns import is_meant
from fedsim.basics.tensors import tensors_of


def personal_names(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a model's personal tensors, in the model's own order.

    A parameter that several layers share is personal by any of its names, and is called by the
    first of them.

    Args:
        model: The model, its frozen parameters frozen.
        patterns: Whole names of parameters or buffers, leading parts of names ("output" for
            "output.weight"), or patterns with `*`, `?` and `[...]`.

    Raises:
        ScenarioError: If a pattern names no tensor of the model, or a frozen parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        >>> personal_names(model, ["*.bias", "1.running_*"])
        ('0.bias', '1.bias', '1.running_mean', '1.running_var')
    """
    tensors = tensors_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen: set[str] = set()
    for pattern in patterns:
        named = [name for name in tensors if is_meant(pattern, name)]
        if not named:
            layers = {name.rpartition(".")[0] for name in tensors} - {""}
            known = [*sorted(layers), *tensors]
            raise ScenarioError(
                f"[task] personal: {unknown(pattern, 'a tensor or layer of the model', known)}"
            )
        for name in named:
            parameter = parameters.get(name)
            if parameter is not None and not parameter.requires_grad:
                raise ScenarioError(
                    f"[task] personal: '{pattern}' names '{name}', which is frozen and so the same "
                    "for all clients; name trained parameters and statistics alone"
                )
            chosen.add(name if parameter is None else first[id(parameter)])
    return tuple(name for name in tensors if name in chosen)
