"""A site's file, and the places that it names: readable, writable, and on a disk that stays."""

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import in_bytes
from fedsim.cli.doctor import machine
from fedsim.cli.doctor.finding import Finding

if TYPE_CHECKING:
    from fedsim.deployment.site import SitePolicy

_PASSING = {
    "tmpfs": "lies in memory, and is gone when the machine is started again",
    "ramfs": "lies in memory, and is gone when the machine is started again",
    "overlay": "lies in the container itself, and is gone with it",
}
_ROOM_NEEDED = 100 * 2**20
_MOST_FILES = 1000  # of a folder of data that are opened


def policy_of(file: Path | None) -> tuple[list[Finding], "SitePolicy | None"]:
    """Read a site's file as a node does.

    Args:
        file: The file; None takes that of FEDSIM_SITE, or what holds without one.

    Returns:
        What was found, and the policy; None if the file cannot be used.
    """
    from fedsim.deployment.site import VARIABLE, SitePolicy, read_policy

    variable = os.environ.get(VARIABLE)
    named = file or (Path(variable) if variable else None)
    if named is None:
        found = "none: a scenario may name the app's own modules, errors tell their place alone"
        remedy = "--site FILE, if the node's config names one"
        return [Finding("site file", "note", found, remedy)], SitePolicy()
    try:
        policy = read_policy(named)
    except ScenarioError as error:
        found = f"{error}; such a node answers nothing"
        return [Finding("site file", "failed", found, "put it right")], None
    findings = [Finding("site file", "ok", f"{named}: {_in_words(policy)}")]
    if stat.S_IMODE(named.stat().st_mode) & 0o022:
        found = f"{named}: others than its owner may change what this site allows"
        findings.append(Finding("site file", "note", found, f"chmod go-w {named}"))
    return findings, policy


def _in_words(policy: "SitePolicy") -> str:
    may = "anything but modules" if policy.overrides is None else ", ".join(policy.overrides)
    return "; ".join(
        (
            f"modules beside the app's own: {', '.join(policy.imports) or 'none'}",
            f"`set` may change {may or 'nothing'}",
            f"errors tell their {policy.errors}",
            f"of data it shares {' and '.join(policy.share) or 'neither labels nor sums'}",
        )
    )


def places(policy: "SitePolicy") -> list[Finding]:
    """Look at the places that a site's file, or its machine, names beside its data."""
    from fedsim.deployment.client_state import state_folder

    findings = []
    state = state_folder(policy)
    if state is None:
        found = "in the SuperNode's memory: a SuperNode that is started again has none"
        findings.append(Finding("state", "ok", f"{found} ([site] state)"))
    else:
        remedy = "let the user of the SuperExec write there, or name another folder"
        findings.append(_staying(machine.folder("state", state, remedy=remedy), state))
    if policy.audit is not None:
        findings.append(_staying(_audit(policy.audit), policy.audit))
    return findings


def _audit(file: Path) -> Finding:
    """Say whether a line can be added to the record; nothing is."""
    remedy = "let the user of the SuperExec write there: without its line nothing is answered"
    try:
        if file.exists():
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
        else:
            tempfile.TemporaryFile(dir=file.parent).close()
        free = shutil.disk_usage(file.parent).free
    except OSError as error:
        return Finding("audit", "failed", f"{file} cannot be written: {error.strerror}", remedy)
    found = f"{file}, {in_bytes(free)} free"
    if free < _ROOM_NEEDED:
        return Finding("audit", "failed", found, "free some space: a full disk stops the node")
    return Finding("audit", "ok", found)


def _staying(finding: Finding, path: Path) -> Finding:
    """Note where what is written does not stay."""
    kind = _PASSING.get(_file_system(path))
    if finding.state != "ok" or kind is None:
        return finding
    remedy = "mount a volume there, or name a folder on a disk"
    return finding._replace(state="note", found=f"{finding.found}; it {kind}", remedy=remedy)


def _file_system(path: Path) -> str:
    """The kind of file system that a path lies in; nothing where that is not known."""
    real = Path(os.path.realpath(path))
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    mounts = {Path(fields[1]): fields[2] for fields in map(str.split, lines) if len(fields) > 2}
    return next((mounts[each] for each in (real, *real.parents) if each in mounts), "")


def data(policy: "SitePolicy") -> tuple[Finding, Path | None]:
    """Say whether the site's data are there and can be read.

    Args:
        policy: What the site's file says.

    Returns:
        What was found, and where they lie; None if they cannot be read, or nothing names them.
    """
    from fedsim.basics.errors import SchemaError
    from fedsim.deployment.own_data import data_file

    try:
        file = data_file(policy, None)
    except SchemaError as error:
        remedy = "[site] data, or FEDSIM_SITE_DATA as the node's SuperExec has it"
        return Finding("data", "failed", str(error), remedy), None
    inner = sorted(each for each in file.rglob("*") if each.is_file()) if file.is_dir() else [file]
    try:
        if file.is_dir():
            os.listdir(file)
        for each in inner[:_MOST_FILES]:
            with each.open("rb") as opened:
                opened.read(1)
    except OSError as error:
        found = f"{error.filename or file} cannot be read: {error.strerror}"
        return Finding("data", "failed", found, "let the user of the SuperExec read it"), None
    size = in_bytes(sum(each.stat().st_size for each in inner))
    several = f", {len(inner)} files" if file.is_dir() else ""
    return Finding("data", "ok", f"{file}{several}, {size}"), file
