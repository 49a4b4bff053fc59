"""The topologies by name."""

from collections.abc import Callable

from fedsim.federation.topology.kinds import (
    barabasi_albert,
    complete,
    erdos_renyi,
    file,
    line,
    regular,
    ring,
    small_world,
    star,
    torus,
)
from fedsim.federation.topology.topology import Topology

TOPOLOGIES: dict[str, Callable[..., Topology]] = {
    "ring": ring,
    "line": line,
    "star": star,
    "torus": torus,
    "complete": complete,
    "regular": regular,
    "erdos_renyi": erdos_renyi,
    "small_world": small_world,
    "barabasi_albert": barabasi_albert,
    "file": file,
}
