"""The clients' training samples in one hand: what a run without a federation would train on."""

import numpy as np

from fedsim.data.federated import (
    Arrays,
    ClientIds,
    ClientRows,
    DataRecipe,
    FederatedData,
    Ints,
    json_sha256,
)

HOLDER = 0


class CentralisedData(FederatedData):
    """A division of which client 0 holds all training samples, and the other clients none.

    Local test splits stay with their clients, so that all of them can measure the same model.

    Args:
        divided: The division.
        recipe: How it is had again.
    """

    def __init__(self, divided: FederatedData, recipe: DataRecipe) -> None:
        super().__init__(recipe)
        self._divided = divided
        self.num_clients, self.spec, self.said = divided.num_clients, divided.spec, divided.said
        self.manifest = {**divided.manifest, "centralised": {"client": HOLDER}}
        self.manifest_sha256 = json_sha256({"centralised": divided.manifest_sha256})
        self._all: ClientRows | None = None

    @property
    def _held(self) -> ClientRows:
        """The pool, and the rows of all training samples in it, each once and ascending."""
        if self._all is None:
            drawn = self._divided.clients(range(self._divided.num_parts))
            self._all = drawn._replace(rows=[np.unique(np.concatenate(drawn.rows))])
        return self._all

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return all training samples for client 0 and none for others."""
        ids = self._checked(client_ids)
        held = len(self._held.rows[0]) if (ids == HOLDER).any() else 0
        return np.where(ids == HOLDER, held, 0).astype(np.int64)

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return the pool, and each client's rows of it."""
        ids = self._checked(client_ids, split)
        if split == "test":
            return self._divided.clients(client_ids, split=split)
        self.clients_read += len(ids)
        none = np.zeros(0, dtype=np.int64)
        rows = [self._held.rows[0].copy() if each == HOLDER else none for each in ids.tolist()]
        return self._held._replace(rows=rows)

    def labels(self, client_ids: ClientIds) -> list[Ints]:
        """Return the labels of all training samples for client 0 and none for others."""
        ids = self._checked(client_ids)
        parts = self._divided.labels(range(self._divided.num_parts)) if HOLDER in ids else []
        none = np.zeros(0, dtype=np.int64)
        return [np.concatenate(parts) if each == HOLDER else none for each in ids.tolist()]

    @property
    def test(self) -> Arrays:
        """The server's held-out test set, which no client holds."""
        return self._divided.test
