"""What a site would tell the server of its data before round 1: in words, and never a row.

The data are read as a node reads them, under the site's own policy.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.basics.errors import FedsimError, SchemaError, printable
from fedsim.basics.kernels import settings, shown
from fedsim.cli.doctor.finding import Finding

if TYPE_CHECKING:
    from fedsim.deployment.site import SitePolicy
    from fedsim.scenario.scenario import Scenario

_SHOWN = 8  # names in a line
_FEW = 10  # samples of which sums tell much
_log = logging.getLogger("fedsim")


def scenario_of(
    path: str, overrides: Sequence[str], policy: "SitePolicy"
) -> tuple[Finding, "Scenario | None"]:
    """Read a scenario as a node does: what it may name and change is held to the site's file.

    Args:
        path: Its file or name.
        overrides: What `set` of the run-config would change.
        policy: What the site allows.
    """
    from fedsim.basics.import_paths import permitting
    from fedsim.scenario.load import load

    refused: list[str] = []

    def why_not(module: str | None) -> str | None:
        why = policy.why_not(module)
        if why is not None:
            refused.append(why)
        return why

    try:
        policy.require_overridable(overrides)
        with permitting(why_not):
            scenario = load(path, overrides)
    except FedsimError as error:
        remedy = "put it right"
        if refused:
            remedy = "what the app itself brings is allowed on a node: look from its folder"
        return Finding("scenario", "failed", str(error), remedy), None
    return Finding("scenario", "ok", f"{scenario.origin} is valid, and allowed at this site"), (
        scenario
    )


def kernels(
    scenario: "Scenario | None", given: Mapping[str, str], not_portable: str | None
) -> Finding:
    """Say whether this node's kernels are those that a scenario asks for.

    Args:
        scenario: The scenario; None for any.
        given: The variables of the environment, as they were before the scenario was read.
        not_portable: Why portable bits cannot be had on this machine; None if they can.
    """
    wrong = [name for name, value in settings("portable").items() if given.get(name) != value]
    asked = scenario is not None and scenario.promise == "portable"
    if not asked:
        said = "are not pinned, as bits = 'fast' wants" if wrong else "are pinned to portable ones"
        return Finding("kernels", "ok", said)
    if not_portable is not None:
        found = f"bits = 'portable' cannot be had here: it {not_portable}"
        return Finding("kernels", "failed", found, "another machine, or bits = 'fast'")
    if wrong:
        found = f"bits = 'portable' needs {', '.join(wrong)} set before Python starts"
        remedy = f"deploy/portable.yml, or in the SuperExec's environment: {shown('portable')}"
        return Finding("kernels", "failed", found, remedy)
    return Finding("kernels", "ok", "are pinned, as bits = 'portable' wants")


def look(
    scenario: "Scenario", file: Path, policy: "SitePolicy", partition: int
) -> tuple[list[Finding], dict[str, Any] | None]:
    """Read a site's data as a node does, and say what the server would be told.

    Args:
        scenario: A scenario whose sites have data of their own.
        file: Where this site's lie.
        policy: What the site allows.
        partition: The site's number.

    Returns:
        What was found, and what would be told; None if the data cannot be used.
    """
    from fedsim.basics.import_paths import permitting
    from fedsim.deployment.own_data import allowed
    from fedsim.deployment.site import place_of
    from fedsim.runs.own_sites import described

    remedy = "put the site's file right, or ask the scenario's author"
    try:
        with permitting(policy.why_not):
            could = described(scenario, str(file), partition)
        told = allowed(dict(could), policy)
    except SchemaError as error:
        return [Finding("told", "failed", str(error), remedy)], None
    except Exception as error:  # of whatever reads it: its text may quote rows
        _log.error("the site's data cannot be used: %s", error)
        found = f"nothing but that they cannot be read: {place_of(error)}"
        return [Finding("told", "failed", found, "its text is on standard error")], None
    return [
        _columns(told),
        Finding("told: counts", "ok", f"{told['train']} to train on, {told['test']} to test on"),
        _classes(told, scenario),
        *_sums(told, bool(could["moments"]), policy),
        Finding("told: hash", "ok", f"{told['sha256'][:12]}... of the samples"),
    ], told


def _columns(told: Mapping[str, Any]) -> Finding:
    names = _listed(told["features"])
    shape = "x".join(map(str, told["shape"])) or "one"
    target = f"target {_listed(told['target'])} ({told['target_kind']})"
    found = f"{names} ({told['kind']}, {shape} values of a sample); {target}"
    return Finding("told: columns", "ok", found)


def _classes(told: Mapping[str, Any], scenario: "Scenario") -> Finding:
    name, labels, unlisted = "told: classes", told["labels"], told["unlisted"]
    if unlisted:
        found = f"this site has others than [data] labels lists: {_listed(unlisted)}"
        return Finding(name, "failed", found, "the scenario's labels must name every class")
    if not labels:
        why = "the scenario lists them" if scenario.data.get("labels") else "the target has none"
        return Finding(name, "ok", f"none: {why}")
    found = f"{len(labels)}: {_listed(labels)}"
    if len(labels) >= told["train"] + told["test"] > 1:
        remedy = "is the target the right column? its values may name rows"
        return Finding(name, "note", f"{found}; every sample has a class of its own", remedy)
    return Finding(name, "ok", found)


def _sums(told: Mapping[str, Any], are_there: bool, policy: "SitePolicy") -> list[Finding]:
    """What is told for standardising, or why it is not."""
    name = "told: sums"
    if are_there and "sums" not in policy.share:
        found = "none: [site] share does not let them, and the scenario standardises"
        remedy = '[data] standardise = false in the scenario, or share = [..., "sums"]'
        return [Finding(name, "failed", found, remedy)]
    if not told["moments"]:
        return [Finding(name, "ok", "none: the scenario does not ask for them")]
    findings = []
    for field, moments in told["moments"].items():
        columns = told["features"] if field == "features" else told["target"]
        number, means = moments["number"], moments["mean"]
        spreads = [(each / number) ** 0.5 for each in moments["squares"]]
        names = columns if len(columns) == len(means) else [f"{n}" for n in range(len(means))]
        parts = [
            f"{printable(str(n))} {mean:.4g} +- {spread:.4g}"
            for n, mean, spread in zip(names, means, spreads, strict=True)
        ]
        found = f"mean and spread of {field}, over {number}: {_listed(parts)}"
        if told["train"] < _FEW:
            remedy = 'leave "sums" out of [site] share, or take part with more samples'
            found += f"; of {told['train']} samples they tell much of each"
            findings.append(Finding(name, "note", found, remedy))
        else:
            findings.append(Finding(name, "ok", found))
    return findings


def _listed(names: Sequence[Any]) -> str:
    shown_ = ", ".join(printable(str(each)) for each in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown_} and {more} more" if more > 0 else shown_
