"""`fedsim doctor`: what is there, what is missing, and how to get it.

Every probe is guarded on its own, so that a machine on which much is wrong still gets a whole
report. Nothing is imported here that may be missing: packages are tried in a process of their own.
"""

import io
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import in_bytes
from fedsim.cli.doctor import kernels, machine, packages, ray_start
from fedsim.cli.doctor.finding import Finding, State

__all__ = ["Finding", "Report", "State", "examine", "in_bytes"]

_LABELS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "failed": ("FAILED", "bold red"),
}


class Report(NamedTuple):
    """What was found.

    Attributes:
        findings: One for everything that was looked at.
        refused: Whether the scenario itself is wrong, whatever the machine.
        told: What a site would say of its data; None where that was not looked at.
    """

    findings: list[Finding]
    refused: bool = False
    told: Mapping[str, Any] | None = None

    @property
    def ready(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.state != "failed" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "ready": self.ready,
            "fedsim": fedsim.__version__,
            "platform": platform.platform(),
            "findings": [finding._asdict() for finding in self.findings],
            **({} if self.told is None else {"told": self.told}),
        }

    def lines(self, *, width: int, colour: bool) -> list[str]:
        """Return the report for people, each line at most `width` characters wide."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        failed = sum(finding.state == "failed" for finding in self.findings)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in _folded(self.findings):
            label, style = _LABELS[finding.state]
            words = Text(finding.found)
            if finding.remedy:
                words.append(f"\n-> {finding.remedy}", style="bold")
            table.add_row(Text(label, style=style), Text(finding.name), words)
        verdict = "ready" if not failed else f"{failed} to put right, see FAILED"
        console = Console(
            file=io.StringIO(),
            width=width,
            force_terminal=colour,
            color_system="standard" if colour else None,
            legacy_windows=False,
        )
        with console.capture() as captured:
            console.print(table)
            console.print(Text(f"\n{verdict}", style="bold"))
        return [line.rstrip() for line in captured.get().splitlines()]


def examine(
    scenario: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    start_ray: bool = False,
    timeout_s: float = 60.0,
) -> Report:
    """Look at everything that a run needs.

    Args:
        scenario: A scenario's file or name: whether this machine can run it is looked at too.
        overrides: Assignments as `fedsim run` takes them.
        start_ray: Whether Ray and a worker are really started.
        timeout_s: How long that may take.
    """
    installed = packages.look()
    findings = [*installed.findings, *_machine(installed)]
    if start_ray:
        findings.append(
            Finding("Ray worker", "failed", "cannot be started, see ray above")
            if any(each.name == "ray" and each.state == "failed" for each in findings)
            else ray_start.start(timeout_s=timeout_s)
        )
    findings += _optional()
    if scenario is None:
        return Report(findings)
    try:
        from fedsim.cli.doctor import scenario as scenarios
        from fedsim.scenario.load import load

        loaded = load(scenario, overrides)
        with loaded.named_in_refusals():
            findings += scenarios.look(loaded, installed)
    except ScenarioError as error:
        findings += [Finding("scenario", "failed", line) for line in str(error).splitlines()]
        return Report(findings, refused=True)
    except ImportError as error:
        found = f"cannot be checked: {error}"
        findings.append(Finding("scenario", "failed", found, "put the packages right first"))
        return Report(findings)
    if loaded.engine.kind == "inline":
        findings = [
            _without_need(each) if each.name in ("ray", machine.SOCKETS) else each
            for each in findings
        ]
    return Report(findings)


def _machine(installed: packages.Packages) -> Iterator[Finding]:
    torch = installed.torch
    yield machine.processors()
    yield kernels.look(torch.facts if torch is not None and torch.ok else None)
    yield machine.graphics(torch.facts if torch is not None and torch.ok else None)
    yield machine.memory()
    yield machine.shared_memory()
    sockets = machine.sockets()
    if sockets.state != "ok":
        yield sockets
    yield machine.cache()
    yield machine.folder("runs", Path("runs"), remedy="name another folder: --out DIR")


def _optional() -> Iterator[Finding]:
    """What some uses need and most do not."""
    for program, use, remedy in (
        ("docker", "for nodes in containers", "https://docs.docker.com/engine/install"),
        ("openssl", "for certificates of nodes", "apt-get install openssl"),
    ):
        path = shutil.which(program)
        if path is None:
            yield Finding(program, "note", f"not here; only {use}", remedy)
        else:
            yield Finding(program, "ok", path)


def _without_need(finding: Finding) -> Finding:
    return finding._replace(state="note") if finding.state == "failed" else finding


def _folded(findings: Sequence[Finding]) -> list[Finding]:
    """Put what is lesser and well on one line."""
    shown: list[Finding] = []
    together: list[Finding] = []
    for finding in findings:
        if not (finding.lesser and finding.state == "ok"):
            shown.append(finding)
            continue
        if not together:
            place = len(shown)
        together.append(finding)
    if together:
        names = ", ".join(f"{each.name} {each.found.partition(',')[0]}" for each in together)
        shown.insert(place, Finding("others", "ok", names))
    return shown
