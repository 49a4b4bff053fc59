"""What runs on the nodes beside what runs on the server: written down, and compared."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.json_files import read_plain, taking, write_json_atomic
from fedsim.basics.kernels import Bits
from fedsim.basics.kernels_in_use import decisive, differences
from fedsim.basics.versions import versions
from fedsim.federation.grids.nodes import Node

NODES_FILE = "nodes.json"
_log = logging.getLogger("fedsim")


def unlike_server(software: Mapping[str, Any], promise: Bits, here: Mapping[str, Any]) -> str:
    """Say in what a node's software differs from this process's, as far as bits depend on it.

    Args:
        software: What the node tells of itself; a node that tells nothing differs in nothing.
        promise: The scenario's `[engine] bits`.
        here: The server's own, as `versions` tells it.
    """
    if not software:
        return ""
    ours, theirs = (
        {name: str(value) for name, value in decisive(found, promise).items() if name != "ray"}
        for found in (here, software)
    )  # nothing on a node is computed by Ray
    return differences(theirs, ours)


def refusing(promise: Bits) -> Callable[[Mapping[str, Any]], str | None]:
    """Return what says why a node cannot keep a promise about bits; under fast bits all can."""

    def why_not(software: Mapping[str, Any]) -> str | None:
        unlike = unlike_server(software, promise, versions()) if promise == "portable" else ""
        if not unlike:
            return None
        return (
            f"computes with others than the server ({unlike}), and bits = 'portable' are asked "
            "for: install the same there, or use bits = 'fast'"
        )

    return why_not


def recording(folder: Path, promise: Bits) -> Callable[[Sequence[Node]], None]:
    """Return what writes the nodes into a run's folder, and warns of those that differ.

    Args:
        folder: The run's folder.
        promise: The scenario's `[engine] bits`.
    """
    told: set[str] = set()

    def record(nodes: Sequence[Node]) -> None:
        document = [
            {"partition": client, "node": str(node.number), "software": dict(node.software)}
            for client, node in enumerate(nodes)
        ]
        file = folder / NODES_FILE
        before = read_plain(file) if file.is_file() else []
        with taking(file):
            write_json_atomic(file, [*before, document])
        here = versions()
        for client, node in enumerate(nodes):
            unlike = unlike_server(node.software, promise, here)
            if unlike and unlike not in told:
                told.add(unlike)
                _log.warning(
                    "the node of partition %d computes with others than the server (%s): the last "
                    "bits are not those of a simulation on this machine", client, unlike,
                )  # fmt: skip

    return record
