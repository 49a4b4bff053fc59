"""The convolutional networks of federated averaging's paper. Needs torch alone.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017 (arXiv:1602.05629), section 3.
"""

from collections import OrderedDict

from torch import nn

from fedsim.tasks.models.shapes import image_shape


def mcmahan_mnist(*, feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """McMahan's MNIST CNN: two 5x5 convolutions with max-pooling, then a hidden layer of 512.

    On 28x28 grey images of 10 classes it has the 1,663,370 parameters that the paper prints; the
    convolutions (32 and 64 channels) keep height and width, as that number requires.

    Raises:
        ScenarioError: If the features are not images of at least 4x4.

    Source: McMahan et al., section 3, "a CNN with two 5x5 convolution layers (...)".
    Deviations: none.
    """
    channels, height, width = image_shape("mcmahan_mnist", feature_shape, 4)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, filters in enumerate((32, 64), start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, kernel_size=5, padding=2)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = filters
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(channels * (height // 4) * (width // 4), 512)
    layers["relu3"] = nn.ReLU()
    layers["output"] = nn.Linear(512, num_classes)
    return nn.Sequential(layers)


def mcmahan_cifar(*, feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """McMahan's CIFAR-10 CNN: two 5x5 convolutions, hidden layers of 384 and 192.

    The paper names TensorFlow's tutorial of 2016 ("two convolutional layers followed by two fully
    connected layers and then a linear transformation layer", about 10^6 parameters), and so does
    this: 64 channels, 3x3 max-pooling of stride 2. On the paper's crops of 24x24 it has 1,068,298
    parameters, on whole 32x32 images 1,756,426.

    Raises:
        ScenarioError: If the features are not images of at least 4x4.

    Source: McMahan et al., section 3, CIFAR experiments.
    Deviations: no local response normalisation (its backward pass has no deterministic CUDA
    kernel), torch's initialisation and no weight decay of the hidden layers alone; pooling pads
    both sides by one where the tutorial pads the far side.
    """
    channels, height, width = image_shape("mcmahan_cifar", feature_shape, 4)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in (1, 2):
        layers[f"conv{number}"] = nn.Conv2d(channels, 64, kernel_size=5, padding=2)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels, height, width = 64, (height + 1) // 2, (width + 1) // 2
    layers["flatten"] = nn.Flatten()
    layers["hidden1"] = nn.Linear(channels * height * width, 384)
    layers["relu3"] = nn.ReLU()
    layers["hidden2"] = nn.Linear(384, 192)
    layers["relu4"] = nn.ReLU()
    layers["output"] = nn.Linear(192, num_classes)
    return nn.Sequential(layers)
