"""The same fault is the same failure in the engine and on nodes behind Flower's Grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.engine.inline import InlineGrid
from fedsim.federation.admission_table import Admission
from fedsim.federation.bounds import Bounds
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.nodes import PartitionGrid
from tests.federation.grids.fleet import Fleet
from tests.laws import federations as fed

CLIENTS, CULPRIT = 4, 1
SIZES = fed.SIZES[:CLIENTS]


class Raising(fed.InMemoryData):
    """One client's samples cannot be read."""

    def clients(self, client_ids, *, split="train"):
        if CULPRIT in np.asarray(client_ids):
            raise OSError("patients.csv is torn")
        return super().clients(client_ids, split=split)


class Far(fed.InMemoryData):
    """One client's samples are so far from all others' that its update is huge, and finite."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._features["train"][self._rows["train"][CULPRIT]] *= 1e12


def sizes_but(client):
    """What the server knows of who holds how much: of one client, less than it says."""
    known = np.array(SIZES)
    known[client] -= 1
    return lambda ids: known[ids]


PLAIN, NONE = fed.InMemoryData, Bounds()
FAULTS = {
    "a client raises": (Raising(SIZES), NONE, "raised", "patients.csv is torn"),
    "training ends in nan": (PLAIN(SIZES, broken=(CULPRIT,)), NONE, "not finite", "NaN"),
    "more samples than it holds": (
        PLAIN(SIZES), Bounds(sizes_but(CULPRIT)), "num-examples", "its partition holds",
    ),
    "a huge update": (
        Far(SIZES), Bounds(table=Admission(max_update_norm=1e6)), "update norm", "max_update_norm",
    ),
    "an update unlike the others": (
        Far(SIZES), Bounds(table=Admission(max_update_factor=1e3)), "update norm", "the round's",
    ),
}  # fmt: skip


def round_of(grid, layout, bounds, absent):
    """A round's admitted replies."""
    held = AdmissionGrid(grid, layout, bounds)
    sent = fed.configure(fed.make_strategy("fedavg"), held, fed.initial_arrays())
    gone = [client in absent for client in sent.client_ids.tolist()]
    return held.send_and_receive(replace(sent, absent=sent.is_absent | gone), timeout=5.0)


@pytest.mark.parametrize("absent", [(), (3,)], ids=["all there", "one dropped out"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_one_cause_wherever_it_happens(fault, absent):
    data, bounds, cause, reason = FAULTS[fault]
    app = fed.make_app("logistic", fed.make_procedure(), data)
    engine = round_of(InlineGrid(app, CLIENTS), app.layout, bounds, absent)
    nodes = round_of(PartitionGrid(Fleet(app, CLIENTS), CLIENTS), app.layout, bounds, absent)
    for replies in (engine, nodes):
        found = {failure.client_id: failure for failure in replies.failures}
        assert {c: f.cause for c, f in found.items()} == {
            CULPRIT: cause, **dict.fromkeys(absent, "absent")
        }  # fmt: skip
        assert reason in found[CULPRIT].reason
    assert engine.client_ids.tolist() == nodes.client_ids.tolist()
    assert torch.equal(engine.params, nodes.params)  # and nobody else's bits are others
