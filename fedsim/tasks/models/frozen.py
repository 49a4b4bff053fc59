"""Parameters that are not trained. Needs torch alone."""

from collections.abc import Sequence

from torch import nn

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.patterns import is_meant


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of parameters, in place.

    Args:
        model: The model.
        patterns: Whole names, leading parts of names ("layer1" for "layer1.0.conv1.weight"), or
            patterns with `*`, `?` and `[...]`.

    Raises:
        ScenarioError: If a pattern names no parameter, or nothing is left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> freeze(model, ["0", "*.bias"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['1.weight']
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        chosen = [name for name in parameters if is_meant(pattern, name)]
        if not chosen:
            layers = {name.rpartition(".")[0] for name in parameters} - {""}
            known = [*sorted(layers), *parameters]
            raise ScenarioError(
                f"[task] freeze: {unknown(pattern, 'a parameter or layer of the model', known)}"
            )
        for name in chosen:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ScenarioError(f"[task] freeze = {list(patterns)}: nothing is left to train")
