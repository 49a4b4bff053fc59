"""Scenarios whose clients are sites with data of their own, in a deployment.

A site's process says what its data are and has its own alone; the server has what sites say, and
its own test set.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.basics.errors import ScenarioError
from fedsim.data.preparation import asked_for
from fedsim.data.sites.agreement import Agreement
from fedsim.data.sites.description import Description
from fedsim.data.sites.site_data import SiteData
from fedsim.data.sites.source import NAME, SiteSource, at_server, at_site, described_at_site
from fedsim.engine.client_app import CohortApp
from fedsim.runs.world import World, build
from fedsim.scenario.scenario import Scenario


def has_own_sites(scenario: Scenario) -> bool:
    """Return whether every client of a scenario is a site that reads data of its own."""
    return bool(scenario.data.get("name") == NAME)


def sites_expected(scenario: Scenario) -> int:
    """Return how many sites a deployment waits for.

    Raises:
        ScenarioError: If the scenario does not say it.
    """
    clients = scenario.partition.get("clients")
    if clients is None:
        raise ScenarioError(
            f"[partition] clients is missing: a deployment with [data] name = '{NAME}' needs to "
            "know how many sites to wait for"
        )
    return int(clients)


def described(scenario: Scenario, path: str, client: int) -> dict[str, Any]:
    """Return what a site says of its data, as JSON.

    Args:
        scenario: The scenario.
        path: Where the site's file lies.
        client: The site's number.

    Raises:
        ScenarioError: If the file cannot be used.
    """
    source, recipe = _source(scenario)
    return described_at_site(source, recipe, path, client).to_json()


def data_at_site(scenario: Scenario, path: str, client: int, agreed: Mapping[str, Any]) -> SiteData:
    """Return a federation's data as one site's process has them.

    Args:
        scenario: The scenario.
        path: Where the site's file lies.
        client: The site's number.
        agreed: What all sites agreed on, as JSON.

    Raises:
        ScenarioError: If the site's data are no longer those that it described.
    """
    source, recipe = _source(scenario)
    return at_site(source, recipe, path, client, Agreement.from_json(agreed))


def data_at_server(scenario: Scenario, told: Sequence[Mapping[str, Any]]) -> SiteData:
    """Return a federation's data as the server has them.

    Args:
        scenario: The scenario.
        told: What each site says of its data, as JSON, by its number.

    Raises:
        ScenarioError: If sites do not fit each other, naming each that differs.
    """
    source, recipe = _source(scenario)
    read = []
    for client, each in enumerate(told):
        try:
            read.append(Description.from_json(each))
        except ScenarioError as error:
            raise ScenarioError(f"the site of partition {client} {error}") from None
    return at_server(source, recipe, read)


def app_at_site(scenario: Scenario, path: str, client: int, agreed: str) -> CohortApp:
    """Return the ClientApp of a scenario over one site's own data.

    Args:
        scenario: The scenario.
        path: Where the site's file lies.
        client: The site's number.
        agreed: What all sites agreed on, as text.

    Raises:
        ScenarioError: If the site's data are no longer those that it described.
    """
    data = data_at_site(scenario, path, client, json.loads(agreed))
    return build(scenario, on_node=True, data=data).app


def world_at_server(scenario: Scenario, told: Sequence[Mapping[str, Any]] | None) -> World:
    """Return a scenario, built over what sites say of their data.

    Args:
        scenario: The scenario.
        told: That, by their number; None where clients are no sites with data of their own.

    Raises:
        ScenarioError: If sites do not fit each other, naming each that differs.
    """
    return build(scenario, data=None if told is None else data_at_server(scenario, told))


def agreement_of(world: World) -> tuple[str, tuple[str, ...]]:
    """Return what the sites of a world agreed on, as text, and the hash of each site's samples."""
    assert isinstance(world.data, SiteData)
    agreement = world.data.agreement
    return json.dumps(agreement.to_json()), agreement.hashes


def _source(scenario: Scenario) -> tuple[SiteSource, Any]:
    source, _, recipe = asked_for(scenario.data, scenario.partition, seed=scenario.seed)
    assert isinstance(source, SiteSource)
    return source, recipe
