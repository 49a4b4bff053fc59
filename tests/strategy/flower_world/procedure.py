"""A client procedure that moves nothing and has no hyperparameters."""

from fedsim.client.procedure import ClientProcedure, Work


class Still(ClientProcedure):
    """Hands back what it received."""

    @property
    def work(self):
        """One pass."""
        return Work(16, 1, None)

    def begin(self, params, buffers, extra, state):
        """Start from the model received."""
        return {"params": params, "buffers": buffers}

    def step(self, carry, batch, gradient, *, server_round):
        """Measure the loss and stay."""
        loss, _, _ = gradient(carry["params"], carry["buffers"], batch)
        return carry, loss
