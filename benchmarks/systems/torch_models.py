"""The three models in torch, under the names that fedsim gives their parts."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn


def make(name: str, initial: Mapping[str, np.ndarray] | None = None) -> nn.Module:
    """Return the model `logistic`, `mlp` (784-200-200-10) or `cnn` (16-32 filters, 64 hidden)."""
    layers: dict[str, list[tuple[str, nn.Module]]] = {
        "logistic": [("flatten", nn.Flatten()), ("output", nn.Linear(784, 10))],
        "mlp": [
            ("flatten", nn.Flatten()),
            ("hidden1", nn.Linear(784, 200)),
            ("relu1", nn.ReLU()),
            ("hidden2", nn.Linear(200, 200)),
            ("relu2", nn.ReLU()),
            ("output", nn.Linear(200, 10)),
        ],
        "cnn": [
            ("conv1", nn.Conv2d(1, 16, 3, padding=1)),
            ("relu1", nn.ReLU()),
            ("pool1", nn.MaxPool2d(2)),
            ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
            ("relu2", nn.ReLU()),
            ("pool2", nn.MaxPool2d(2)),
            ("flatten", nn.Flatten()),
            ("hidden", nn.Linear(32 * 7 * 7, 64)),
            ("relu3", nn.ReLU()),
            ("output", nn.Linear(64, 10)),
        ],
    }
    model = nn.Sequential(OrderedDict(layers[name]))
    if initial is not None:
        model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in initial.items()})
    return model


def named(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the model's tensors as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
