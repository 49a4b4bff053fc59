"""The memories of virtual clients; only clients that have trained take space."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class ClientStore:
    """Fixed-shape named tensors per client."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, client_ids: Sequence[int]) -> tuple[dict[str, Tensor], tuple[bool, ...]]:
        """Return (stacked memories `[K, ...]`, who has one); nothing is stacked when nobody has.

        Rows of clients without a memory are zero and to be replaced by their initial memory.
        """
        known = [self._rows.get(client) for client in client_ids]
        has = tuple(memory is not None for memory in known)
        sample = next((memory for memory in known if memory is not None), None)
        if sample is None:
            return {}, has
        stacked = {
            name: torch.stack([
                torch.zeros_like(tensor) if memory is None else memory[name] for memory in known
            ])
            for name, tensor in sample.items()
        }  # fmt: skip
        return stacked, has

    def commit(self, client_ids: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Replace the memories of these clients by the rows of `state`."""
        if state:
            for row, client in enumerate(client_ids):
                self._rows[client] = {name: tensor[row].clone() for name, tensor in state.items()}

    def export(self) -> tuple[list[int], dict[str, Tensor]]:
        """Return (clients in order, stacked memories) for a checkpoint."""
        clients = sorted(self._rows)
        stacked, _ = self.rows(clients)
        return clients, stacked

    def restore(self, client_ids: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Hold exactly these memories."""
        self._rows.clear()
        self.commit(client_ids, state)
