"""Which samples there are, and which client holds them.

`prepare` is the way in. Data sets are listed in `DATASETS`, rules of division in `PARTITIONS`; a
factory's keyword arguments are its keys in a scenario. A user's own data set is a function that
returns a `DataSet`, named by import path.
"""

from typing import TYPE_CHECKING

from fedsim.basics.faces import lazy

if TYPE_CHECKING:
    from fedsim.data.federated import Arrays, ClientRows, FederatedData
    from fedsim.data.partitions.named import PARTITIONS
    from fedsim.data.preparation import prepare
    from fedsim.data.sets.formats import DATASETS
    from fedsim.data.sets.user import DataSet

__all__ = ["DATASETS", "PARTITIONS", "Arrays", "ClientRows", "DataSet", "FederatedData", "prepare"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Arrays": "fedsim.data.federated",
        "ClientRows": "fedsim.data.federated",
        "DATASETS": "fedsim.data.sets.formats",
        "DataSet": "fedsim.data.sets.user",
        "FederatedData": "fedsim.data.federated",
        "PARTITIONS": "fedsim.data.partitions.named",
        "prepare": "fedsim.data.preparation",
    },
)
