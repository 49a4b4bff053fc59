"""The received model's loss on a client's own samples, for strategies that are fair by it.

Li, Sanjabi, Beirami and Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020
(arXiv:1905.10497), Algorithm 2: F_k(w^t); Mohri, Sivek and Suresh, "Agnostic Federated Learning",
ICML 2019 (arXiv:1902.00146), Algorithm 1: L_k(w).

Symbols: F_k(w^t) received_loss.

Deviations: the mean is over the samples that the client trains on in the round, as often as it
does, which are all of its samples in an epoch; it costs a second pass in every step. Penalties of
other parts do not count.
"""

from typing import final

import torch

from fedsim.client.part import ClientPart, Here, Own, Trained
from fedsim.client.procedure import Named

RECEIVED_LOSS = "received_loss"


@final
class ReceivedLoss(ClientPart):
    """Returns the task's mean loss at the model received; 0 where a client has no samples."""

    stacks = True

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry the model received and a sum of losses."""
        first = next(iter(received.values()))
        none = torch.zeros((), dtype=first.dtype, device=first.device)
        return {"received": received, "sum": none, "seen": none}

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Leave the gradients, and add up the losses of the batch's samples."""
        loss, _, _ = here.gradient(own["received"], here.buffers, here.batch)
        count = here.batch.weights.sum(-1)
        return grads, {**own, "sum": own["sum"] + count * loss, "seen": own["seen"] + count}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Return the mean loss."""
        return {RECEIVED_LOSS: own["sum"] / own["seen"].clamp(min=1)}, state
