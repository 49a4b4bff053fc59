"""Regressions, perceptrons and convolutional networks. Needs torch alone."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from fedsim.basics.errors import ScenarioError
from fedsim.tasks.models.shapes import image_shape

Init = Literal["torch", "xavier"]


def logistic(*, feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            output=nn.Linear(math.prod(feature_shape), num_classes),
        )
    )


def linear(*, feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Linear regression: one linear layer, the same as `logistic` under a name for numbers."""
    return logistic(feature_shape=feature_shape, num_classes=num_classes)


def mlp(
    *,
    hidden: Sequence[int] = (200, 200),
    init: Init = "torch",
    feature_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """A multilayer perceptron with ReLU.

    Args:
        hidden: Width of each hidden layer; each >= 1, and none gives logistic regression.
        init: Initialisation, "torch" or "xavier" (uniform weights, zero biases).
        feature_shape: Shape of one sample.
        num_classes: Number of logits.

    Raises:
        ScenarioError: If a width is below 1.
    """
    return _initialised(_perceptron(hidden, None, feature_shape, num_classes), init)


def mlp_dropout(
    *,
    hidden: Sequence[int] = (200, 200),
    dropout: float = 0.5,
    feature_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """A multilayer perceptron with dropout after each hidden layer.

    Args:
        hidden: Width of each hidden layer; each >= 1.
        dropout: Probability that a hidden unit is dropped in training, in [0, 1).
        feature_shape: Shape of one sample.
        num_classes: Number of logits.

    Raises:
        ScenarioError: If a width is below 1 or `dropout` outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ScenarioError(f"[task] dropout = {dropout}: must be in [0, 1)")
    return _perceptron(hidden, dropout, feature_shape, num_classes)


def cnn(*, init: Init = "torch", feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The 16-32 CNN: two 3x3 convolutions with max-pooling, then a hidden layer of 64.

    Args:
        init: Initialisation, "torch" or "xavier" (uniform weights, zero biases).
        feature_shape: Shape of one image.
        num_classes: Number of logits.

    Raises:
        ScenarioError: If the features are not images of at least 4x4.
    """
    return _initialised(_convolutional("cnn", False, feature_shape, num_classes), init)


def cnn_batchnorm(*, feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The 16-32 CNN with batch normalisation after each convolution.

    Raises:
        ScenarioError: If the features are not images of at least 4x4.
    """
    return _convolutional("cnn_batchnorm", True, feature_shape, num_classes)


def _initialised(model: nn.Module, init: Init) -> nn.Module:
    """Initialise a model anew; torch's own initialisation has been done by then."""
    if init == "xavier":
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
    return model


def _perceptron(
    hidden: Sequence[int],
    dropout: float | None,
    feature_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    if any(width < 1 for width in hidden):
        raise ScenarioError(f"[task] hidden = {list(hidden)}: each width must be >= 1")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(feature_shape)
    for number, next_width in enumerate(hidden, start=1):
        layers[f"hidden{number}"] = nn.Linear(width, next_width)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout is not None:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        width = next_width
    layers["output"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)


def _convolutional(
    name: str, batchnorm: bool, feature_shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    channels, height, width = image_shape(name, feature_shape, 4)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, filters in enumerate((16, 32), start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, kernel_size=3, padding=1)
        if batchnorm:
            layers[f"norm{number}"] = nn.BatchNorm2d(filters)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = filters
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(channels * (height // 4) * (width // 4), 64)
    layers["relu3"] = nn.ReLU()
    layers["output"] = nn.Linear(64, num_classes)
    return nn.Sequential(layers)
