"""A client's training in plain torch: autograd, `torch.optim` and the module itself, no vmap."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedsim.basics.generators import put_back, seed_all
from fedsim.basics.rng import derived_seed, generator
from tests.zoo import models

SEEDED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Drawn(nn.Module):
    """Dropout whose mask is the next of a stream, a row for each sample of a full batch."""

    def __init__(self, layer, stream, batch):
        super().__init__()
        self.p, self.stream, self.batch = layer.p, stream, batch
        self.channels = type(layer) is not nn.Dropout

    def forward(self, values):
        if not self.training:
            return values
        shape = list(values.shape[1:])
        if self.channels:
            shape[1:] = [1] * (len(shape) - 1)
        noise = self.stream.random((self.batch, *shape), dtype=np.float32)[: len(values)]
        return values * torch.from_numpy(noise >= self.p) / (1 - self.p)


def batches(rows, size, epochs, random):
    """Reshuffled passes, cut into batches of `size` and what is left."""
    for _ in range(epochs):
        order = random.permutation(rows)
        yield from (order[start : start + size] for start in range(0, len(rows), size))


def trained(
    model, client, features, targets, rows, *, seed, server_round, batch, drawn, epochs=1, **sgd
):  # fmt: skip
    """Train a module in place, and return it: one client, one round, from what it is now."""
    if drawn:
        stream = generator(seed, "dropout", server_round, client)
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if type(child) in SEEDED:
                    parent._modules[name] = Drawn(child, stream, batch)
    models.put_back()
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **sgd)
    own = model.generators() if hasattr(model, "generators") else []
    with put_back():
        seed_all(derived_seed(seed, "layers", server_round, client), own=own)
        order = generator(seed, "batches", server_round, client)
        for chosen in batches(rows, batch, epochs, order):
            x = torch.from_numpy(np.array(features[chosen])).double()
            optimiser.zero_grad()
            functional.cross_entropy(model(x), torch.from_numpy(targets[chosen])).backward()
            optimiser.step()
    models.put_back()
    return model
