"""Residual networks with group or batch normalisation. Needs torch alone.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385). With group
normalisation (Wu and He, ECCV 2018, arXiv:1803.08494) a chunk of clients trains as one batch; batch
normalisation updates its running statistics in place, which `torch.func.vmap` cannot, so such
clients train one after another. Tensors are named as torchvision names them, so that its weights
fit.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from fedsim.basics.errors import ScenarioError
from fedsim.tasks.models.shapes import image_shape

Norm = Literal["group", "batch"]
Stem = Literal["auto", "cifar", "imagenet"]

_LARGE = 64  # images of at least this height and width get the stem for ImageNet


def resnet8(
    *,
    norm: Norm = "group",
    groups: int = 2,
    feature_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """ResNet-8: three stages of one block, 16, 32 and 64 channels.

    He et al.'s network for CIFAR-10 with n = 1, of 6n + 2 layers.

    Args:
        norm: Normalisation, "group" or "batch".
        groups: Groups of the group normalisation; must divide 16.
        feature_shape: Shape of one image.
        num_classes: Number of outputs.

    Raises:
        ScenarioError: If the features are not images of at least 4x4, or `groups` does not divide.

    Source: He et al., section 4.2.
    Deviations: a shortcut that changes shape is a 1x1 convolution (their option B).
    """
    stages = ((16, 1), (32, 1), (64, 1))
    return _ResNet("resnet8", stages, norm, groups, "cifar", feature_shape, num_classes)


def resnet18(
    *,
    norm: Norm = "group",
    groups: int = 2,
    stem: Stem = "auto",
    feature_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """ResNet-18: four stages of two blocks, 64 to 512 channels.

    Args:
        norm: Normalisation, "group" or "batch".
        groups: Groups of the group normalisation; must divide 64.
        stem: How images come in: "cifar" is a 3x3 convolution, "imagenet" a 7x7 one of stride 2
            with max-pooling; "auto" takes the latter from 64x64 on.
        feature_shape: Shape of one image.
        num_classes: Number of outputs.

    Raises:
        ScenarioError: If the features are not images of at least 4x4 (32x32 for "imagenet"), or
            `groups` does not divide.

    Source: He et al., table 1.
    Deviations: the stem for small images, and the normalisation.
    """
    stages = ((64, 2), (128, 2), (256, 2), (512, 2))
    return _ResNet("resnet18", stages, norm, groups, stem, feature_shape, num_classes)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(
        self, inside: int, outside: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(outside)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = norm(outside)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            projection = nn.Conv2d(inside, outside, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, norm(outside))

    def forward(self, values: Tensor) -> Tensor:
        shortcut = values if self.downsample is None else self.downsample(values)
        inner = self.relu(self.bn1(self.conv1(values)))
        return self.relu(self.bn2(self.conv2(inner)) + shortcut)  # type: ignore[no-any-return]


class _ResNet(nn.Module):
    def __init__(
        self,
        name: str,
        stages: tuple[tuple[int, int], ...],
        norm: Norm,
        groups: int,
        stem: Stem,
        feature_shape: tuple[int, ...],
        num_classes: int,
    ) -> None:
        super().__init__()
        large = len(feature_shape) == 3 and min(feature_shape[1:]) >= _LARGE
        deep = stem == "imagenet" or (stem == "auto" and large)
        channels, _, _ = image_shape(name, feature_shape, 32 if deep else 4)
        width = stages[0][0]
        if norm == "group" and (groups < 1 or width % groups):
            raise ScenarioError(f"[task] groups = {groups}: must divide {width}")

        def normalisation(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels)

        kernel, stride = (7, 2) if deep else (3, 1)
        self.conv1 = nn.Conv2d(
            channels, width, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn1 = normalisation(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if deep else nn.Identity()
        self._stages = len(stages)
        for number, (filters, blocks) in enumerate(stages, start=1):
            made = []
            for block in range(blocks):
                step = 2 if number > 1 and block == 0 else 1
                made.append(_Block(width, filters, step, normalisation))
                width = filters
            setattr(self, f"layer{number}", nn.Sequential(*made))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        values = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for number in range(1, self._stages + 1):
            values = getattr(self, f"layer{number}")(values)
        # a plain mean: adaptive pooling has no deterministic CUDA kernel
        return self.fc(values.mean(dim=(-2, -1)))  # type: ignore[no-any-return]
