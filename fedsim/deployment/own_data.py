"""What a node answers in a scenario whose sites have data of their own, and what the server makes.

A node says what its data are before round 1, as far as its site's file allows. Every instruction
then carries what all sites agreed on, so that a node that was restarted needs to remember nothing.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, MessageType

from fedsim.basics.errors import SchemaError, printable
from fedsim.deployment.site import SitePolicy
from fedsim.deployment.site_loader import LOADER, loaded
from fedsim.engine.client_app import CohortApp, client_of, told_of_node
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.federation.grids.told import agreed_in
from fedsim.runs.own_sites import agreement_of, app_at_site, described
from fedsim.scenario.scenario import Scenario

if TYPE_CHECKING:
    from fedsim.runs.world import World

DATA_PATH = "data-path"  # the key of the node config
VARIABLE = "FEDSIM_SITE_DATA"
_log = logging.getLogger("fedsim")


def answer(
    message: Message, context: Context, policy: SitePolicy, load: Callable[[], Scenario]
) -> Message:
    """Answer a message from a site's own data.

    Args:
        message: The message.
        context: The node's.
        policy: What the site allows.
        load: Returns the scenario; the same function for the same scenario.

    Raises:
        SchemaError: If the site has no data that the scenario could use.
        ScenarioError: If they cannot be read, or are others than before round 1.
    """
    given, loader = (context.node_config.get(key) for key in (DATA_PATH, LOADER))
    named = None if given is None else Path(str(given))
    client = client_of(context)
    file = data_file(policy, named, None if loader is None else str(loader))
    if message.metadata.message_type.partition(".")[0] == MessageType.QUERY:
        told = allowed(described(load(), str(file), client), policy)
        return told_of_node(message, context, data=json.dumps(told))
    agreed = agreed_in(message)
    if agreed is None:
        raise SchemaError("the instruction does not say what the sites agreed on")
    return _app(load, str(file), client, agreed)(message, context)


@functools.cache
def _app(load: Callable[[], Scenario], file: str, client: int, agreed: str) -> CohortApp:
    """The ClientApp over the site's own data, built once."""
    return app_at_site(load(), file, client, agreed)


def data_file(policy: SitePolicy, named: Path | None, loader: str | None = None) -> Path:
    """Return where a site's data lie; what a loader gives is stored in a file.

    Args:
        policy: What the site's file says.
        named: What the node config names; None for nothing. Without either the machine's variable
            says it.
        loader: A loader that the node config names, in place of a file.

    Raises:
        SchemaError: If nothing names data, two name different ones, or they are not there.
        ScenarioError: If a loader may not be imported.
    """
    if (policy.data is not None and named not in (None, policy.data)) or (
        policy.loader is not None and loader not in (None, policy.loader)
    ):
        raise SchemaError("its site file and its node config name different data")
    file, function = policy.data or named, policy.loader or loader
    if function is not None and file is not None:
        raise SchemaError("it names both a file and a loader of its data; leave one out")
    if function is not None:
        return loaded(function, is_sites_own=policy.loader is not None)
    if file is None and (variable := os.environ.get(VARIABLE)):
        file = Path(variable)
    if file is None:
        raise SchemaError(
            f"names no data: set {DATA_PATH} or {LOADER} in --node-config, data or loader in its "
            f"site file, or {VARIABLE}"
        )
    if not file.exists():
        _log.error("%s: there is no such file or folder", file.absolute())
        raise SchemaError("its file is not there; the node's log says which")
    return file


def allowed(told: dict[str, Any], policy: SitePolicy) -> dict[str, Any]:
    """Return what a site says of its data, as far as its policy allows.

    Args:
        told: What it could say.
        policy: What its file says.

    Raises:
        SchemaError: If the scenario needs what the policy does not allow.
    """
    if "sums" not in policy.share:
        told["moments"] = {}
    if "labels" not in policy.share:
        if told["labels"]:
            raise SchemaError(
                "its site file does not let it tell its classes: name them in [data] labels of the "
                "scenario, or let it, [site] share"
            )
        if told["unlisted"]:
            _log.error("not among [data] labels: %s", told["unlisted"])
            told["unlisted"] = ["?"] * len(told["unlisted"])
    return told


def let_agree(nodes: PartitionGrid, world: "World") -> None:
    """Let every instruction carry what the sites agreed on, and take in no other data later."""
    agreed, hashes = agreement_of(world)

    def unfit(client: int, told: Mapping[str, Any]) -> str | None:
        if told.get("sha256") == hashes[client]:
            return None
        return (
            f"the data of partition {client} are others than before round 1 "
            f"({printable(str(told.get('sha256')))[:12]}, not {hashes[client][:12]})"
        )

    nodes.agree(agreed, unfit)
