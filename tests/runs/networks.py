"""Models of a user's own, for the tests of exporting. Need torch alone."""

import torch
from torch import nn


def numbered(*, feature_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A chain without names, with a chain inside."""
    inside = nn.Sequential(nn.Conv2d(feature_shape[0], 3, 3), nn.BatchNorm2d(3), nn.ELU(0.5))
    return nn.Sequential(inside, nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(num_classes))


class Twice(nn.Module):
    """Uses one layer twice, and is traced."""

    def __init__(self, *, width: int = 9, feature_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.inside = nn.Linear(feature_shape[-1] ** 2, width)
        self.again = nn.Linear(width, width)
        self.output = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.again(torch.tanh(self.again(torch.tanh(self.inside(images.flatten(1))))))
        return self.output(values)


class Looking(Twice):
    """Decides by the number of samples, which no program for any number can."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shown = [super(Looking, self).forward(image[None]) for image in images]
        return torch.cat(shown) if len(images) < 1000 else torch.cat(shown) * 1.0
