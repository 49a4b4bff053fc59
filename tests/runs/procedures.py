"""A client procedure of a user's own, for tests."""

from typing import final

from fedsim.client import ClientProcedure, Work


@final
class OneStep(ClientProcedure):
    """One step of gradient descent on all samples.

    Args:
        size: Of the step.
    """

    def __init__(self, *, size: float = 0.1) -> None:
        self._size = size

    @property
    def work(self):
        return Work(1000, 1, None)

    def begin(self, params, buffers, extra, state):
        return {"params": params, "buffers": buffers}

    def step(self, carry, batch, gradient, *, server_round):
        loss, grads, buffers = gradient(carry["params"], carry["buffers"], batch)
        params = {n: p - self._size * grads[n] for n, p in carry["params"].items()}
        return {"params": params, "buffers": buffers}, loss
