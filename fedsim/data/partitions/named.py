"""The rules of division that a scenario can name, each a factory of a `Partition`."""

from collections.abc import Callable

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.data.partitions import flower
from fedsim.data.partitions.by_label import label_quantity, pathological, shards
from fedsim.data.partitions.by_owner import grouped, natural
from fedsim.data.partitions.by_size import iid, sizes
from fedsim.data.partitions.dirichlet import dirichlet, dirichlet_client
from fedsim.data.partitions.from_file import file
from fedsim.data.partitions.partition import Partition

PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "sizes": sizes,
    "dirichlet": dirichlet,
    "dirichlet_client": dirichlet_client,
    "pathological": pathological,
    "label_quantity": label_quantity,
    "shards": shards,
    "natural": natural,
    "grouped": grouped,
    "file": file,
}


def partition_factory(kind: str) -> Callable[..., Partition]:
    """Return the factory of a rule of division; its keyword arguments are scenario keys.

    Args:
        kind: One of `PARTITIONS`, or "flower:" and the name of a partitioner of flwr-datasets.

    Raises:
        ScenarioError: If there is none of that name.
    """
    if kind.startswith(flower.PREFIX):
        return flower.flower_factory(kind)
    if kind not in PARTITIONS:
        known = unknown(kind, "a partition", PARTITIONS)
        raise ScenarioError(
            f"[partition] kind: {known}, or a partitioner of flwr-datasets, such as "
            "'flower:DirichletPartitioner'"
        )
    return PARTITIONS[kind]
