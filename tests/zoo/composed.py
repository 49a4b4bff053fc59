"""A model that is put together of inhabitants of the zoo, one after the other."""

import inspect

import torch
from torch import nn

from tests.zoo import models

PARTS = sorted(
    name
    for name, made in models.ZOO.items()
    if inspect.isclass(made)
    and issubclass(made, models.Base)
    and made.forward is models.Base.forward
    and name not in models.REFUSED
)


class Composed(models.Base):
    """The insides of several models in a row, on `[batch, HIDDEN]`.

    Args:
        parts: Their names, of `PARTS`; one name twice is two of them.
    """

    def __init__(self, *, parts: list[str]):
        super().__init__()
        self.parts = nn.ModuleList(models.ZOO[name]() for name in parts)

    def generators(self):
        """In the order in which fedsim finds them: attributes first, then variables."""
        own = [g for part in self.parts if hasattr(part, "mine") for g in part.generators()]
        shared = [part for part in self.parts if isinstance(part, models.ModuleDrawn)]
        return own + ([models.OF_THE_MODULE] if shared else [])

    def inner(self, h):
        for part in self.parts:
            h = torch.tanh(part.inner(h))
        return h
