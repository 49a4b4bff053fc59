"""All that is looked at before a node takes part: `fedsim doctor --deployment`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError
from fedsim.basics.host_port import HostPort, read_host_port
from fedsim.cli.doctor import packages
from fedsim.cli.doctor.examination import Report
from fedsim.cli.doctor.finding import Finding
from fedsim.cli.doctor.preflight import certificates, site, superlink, told

_DECIDING = ("flwr", "torch", "numpy")  # packages that a node and its server should have alike


class NodeOptions(NamedTuple):
    """What a node's engineer says of the node.

    Attributes:
        superlink: Where its SuperLink is; None to look at no connection.
        root_certificates: The authority's certificate; None takes the system's authorities.
        insecure: Whether the SuperLink speaks no TLS.
        site: The site's file; None takes that of FEDSIM_SITE.
        scenario: A scenario that it shall take part in; None to read no data.
        overrides: What `set` of the run-config would change.
        partition: The node's `partition-id`.
        certificates: A folder of certificates and keys; None to look at none.
    """

    superlink: str | None = None
    root_certificates: Path | None = None
    insecure: bool = False
    site: Path | None = None
    scenario: str | None = None
    overrides: Sequence[str] = ()
    partition: int | None = None
    certificates: Path | None = None

    def given(self) -> list[str]:
        """Return the options that were given."""
        apart = {"overrides"}
        return [
            f"--{name.replace('_', '-')}"
            for name, value in self._asdict().items()
            if name not in apart and value is not None and value is not False
        ]


def prepare(options: NodeOptions) -> Report:
    """Look at everything that a node needs; nothing is trained, and no server is told anything.

    Raises:
        ScenarioError: If the options do not go together.
    """
    address = _checked(options)
    environment = dict(os.environ)
    installed = packages.look(only=_DECIDING)
    findings = list(installed.findings)
    if address is not None:
        findings += superlink.look(
            address, root=options.root_certificates, insecure=options.insecure
        )
    if options.certificates is not None:
        findings += certificates.look(options.certificates)
    facts = installed.torch.facts if installed.torch is not None and installed.torch.ok else {}
    try:
        of_site = _site(options, environment, facts.get("not_portable"))
    except ImportError as error:
        found = f"cannot be looked at: {error}"
        return Report([*findings, Finding("site", "failed", found, "put the packages right first")])
    return of_site._replace(findings=[*findings, *of_site.findings])


def _site(options: NodeOptions, environment: dict[str, str], not_portable: str | None) -> Report:
    """Look at a site's file, its places, and what the server would be told of its data."""
    findings, policy = site.policy_of(options.site)
    if policy is None:
        return Report(findings)
    findings += site.places(policy)
    scenario = None
    if options.scenario is not None:
        found, scenario = told.scenario_of(options.scenario, options.overrides, policy)
        findings.append(found)
    if options.scenario is None or scenario is not None:
        findings.append(told.kernels(scenario, environment, not_portable))
    if scenario is None:
        if policy.data is not None:
            findings.append(site.data(policy)[0])
        return Report(findings)
    from fedsim.runs.own_sites import has_own_sites

    if not has_own_sites(scenario):
        said = "nothing of data: the scenario's are no site's own, every node reads its partition"
        return Report([*findings, Finding("told", "ok", said)])
    found, file = site.data(policy)
    findings.append(found)
    if file is None:
        return Report(findings)
    of_data, document = told.look(scenario, file, policy, options.partition or 0)
    return Report([*findings, *of_data], told=document)


def _checked(options: NodeOptions) -> HostPort | None:
    """Where the SuperLink is, if that was said.

    Raises:
        ScenarioError: If the options do not go together.
    """
    if options.insecure and options.root_certificates is not None:
        raise ScenarioError("--insecure: not together with --root-certificates; say one of them")
    if options.superlink is None:
        for name, given in (
            ("--insecure", options.insecure),
            ("--root-certificates", options.root_certificates is not None),
        ):
            if given:
                raise ScenarioError(f"{name}: needs --superlink HOST:PORT to look at")
    if options.overrides and options.scenario is None:
        raise ScenarioError(f"--set {options.overrides[0]}: needs a --scenario to change")
    if options.partition is not None and options.partition < 0:
        raise ScenarioError(f"--partition {options.partition}: must be >= 0")
    if options.superlink is None:
        return None
    return read_host_port(options.superlink, "--superlink", such_as="superlink:8000", least=1)
