"""How clients train: the procedure's seam, batches, one client or a whole chunk. Torch alone."""

from typing import TYPE_CHECKING

from fedsim.basics.faces import lazy

if TYPE_CHECKING:
    from fedsim.client.part import ClientPart
    from fedsim.client.procedure import (
        GUIDANCE,
        Batch,
        Carry,
        ClientProcedure,
        Descent,
        Gradient,
        LastBatch,
        Named,
        Objective,
        Work,
    )

__all__ = [
    "GUIDANCE",
    "Batch",
    "Carry",
    "ClientPart",
    "ClientProcedure",
    "Descent",
    "Gradient",
    "LastBatch",
    "Named",
    "Objective",
    "Work",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Batch": "fedsim.client.procedure",
        "Carry": "fedsim.client.procedure",
        "ClientPart": "fedsim.client.part",
        "ClientProcedure": "fedsim.client.procedure",
        "Descent": "fedsim.client.procedure",
        "GUIDANCE": "fedsim.client.procedure",
        "Gradient": "fedsim.client.procedure",
        "LastBatch": "fedsim.client.procedure",
        "Named": "fedsim.client.procedure",
        "Objective": "fedsim.client.procedure",
        "Work": "fedsim.client.procedure",
    },
)
