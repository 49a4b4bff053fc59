"""A user's own wrapper of a strategy, with Flower's public API alone."""

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy


class Shrinking(Strategy):
    """Shrinks the model that another strategy makes.

    Args:
        base: The strategy inside.
        factor: What every tensor is multiplied by.
    """

    def __init__(self, base: Strategy, factor: float = 0.5) -> None:
        self.base, self.factor = base, factor

    def configure_train(self, server_round, arrays, config, grid):
        """As the strategy inside."""
        return self.base.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        """As the strategy inside, shrunk."""
        arrays, metrics = self.base.aggregate_train(server_round, replies)
        shrunk = {n: Array(np.asarray(a.numpy() * self.factor)) for n, a in arrays.items()}
        return ArrayRecord(shrunk), metrics

    def configure_evaluate(self, server_round, arrays, config, grid):
        """As the strategy inside."""
        return self.base.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        """As the strategy inside."""
        return self.base.aggregate_evaluate(server_round, replies)

    def summary(self):
        """Say nothing."""
