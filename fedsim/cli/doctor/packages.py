"""The packages that fedsim asks for: which versions are installed, and whether they import."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fedsim
from fedsim.cli.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "fedsim-engine"

_PROMINENT = ("flwr", "ray", "torch", "numpy", "datasets")

_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}  # where names differ
_WITHOUT_RAY = "; or run without it: `--set engine.kind=inline`"


class Imported(NamedTuple):
    """How the import of a module went.

    Attributes:
        ok: Whether it could be imported.
        reason: Why not.
        facts: What the child found out beside: `seconds`, and of torch `built_for` and `devices`.
    """

    ok: bool
    reason: str
    facts: Mapping[str, Any]


class Packages(NamedTuple):
    """What is installed.

    Attributes:
        findings: Python, fedsim and each package that it asks for.
        torch: How torch's import went; None when it is not installed.
    """

    findings: list[Finding]
    torch: Imported | None


def look(*, timeout_s: float = 120.0, only: Collection[str] = ()) -> Packages:
    """Look at Python, fedsim and every package that it asks for.

    Args:
        only: Packages that are looked at, for nodes whose versions should be the server's: one
            that is not the tested one is noted. Without any all are looked at, and may differ.
        timeout_s: How long imports may take; the package that is under way then is named, and what
            has not been tried by then gets as long again.
    """
    findings = [_python()]
    try:
        findings.append(_fedsim())
        requirements = [each for each in _requirements() if not only or each.name in only]
    except metadata.PackageNotFoundError as error:
        root = Path(fedsim.__file__).parents[1]
        found = f"{error.args[0]} is not installed as a package, so what it asks for is not known"
        findings.append(Finding("packages", "note", found, f"pip install -e {root}"))
        return Packages(findings, None)
    except ImportError as error:
        found = f"cannot be checked: {error}"
        findings.append(Finding("packages", "failed", found, "pip install packaging"))
        return Packages(findings, None)
    versions = {each.name: _version(each.name) for each in requirements}
    installed = [name for name, version in versions.items() if version is not None]
    imports = try_imports([_module(name) for name in installed], timeout_s=timeout_s)
    tested = _tested_versions()
    judged = [
        _judged(each, versions[each.name], imports.get(_module(each.name)), tested.get(each.name))
        for each in requirements
    ]
    if only:
        judged = [_noted(each, tested.get(each.name)) for each in judged]
    judged.sort(key=lambda each: (*_PROMINENT, each.name).index(each.name))
    return Packages([*findings, *judged], imports.get("torch"))


def try_imports(modules: Sequence[str], *, timeout_s: float) -> dict[str, Imported]:
    """Import modules in processes of their own.

    Args:
        modules: Their names; in this order, in one process as long as it survives.
        timeout_s: How long each of these processes may live.

    Returns:
        How it went, by module.
    """
    found: dict[str, Imported] = {}
    waiting = list(modules)
    while waiting:
        begun, how = None, ""
        output, ended = _child(waiting, timeout_s)
        for line in output.splitlines():
            name, how, detail = json.loads(line)
            begun = name
            if how == "ok":
                found[name] = Imported(True, "", detail)
            elif how == "failed":
                found[name] = Imported(False, detail, {})
        if how == "begun" and begun is not None:
            found[begun] = Imported(False, ended, {})
        elif ended:  # before the first module, or after the last
            found |= {name: Imported(False, ended, {}) for name in waiting if name not in found}
        waiting = [name for name in waiting if name not in found]
    return found


def _child(modules: Sequence[str], timeout_s: float) -> tuple[str, str]:
    """Return (what the child reported, why it ended early; empty when it did not)."""
    script = Path(__file__).with_name("import_child.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script), *modules],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode()  # bytes, whatever was asked for
        return text[: text.rfind("\n") + 1], f"its import was not done after {timeout_s:g} s"
    except OSError as error:
        return "", f"no process could be started for it: {error}"
    if done.returncode == 0:
        return done.stdout, ""
    said = done.stderr.strip().splitlines()
    words = f": {said[-1]}" if said else ""
    return done.stdout, f"the import ended its process ({_in_words(done.returncode)}){words}"


def _in_words(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"


def _judged(
    requirement: "Requirement", version: str | None, imported: Imported | None, tested: str | None
) -> Finding:
    name = requirement.name
    plain = f"{name}{requirement.specifier}"
    aside = _WITHOUT_RAY if name == "ray" else ""
    if version is None:
        return Finding(name, "failed", "not installed", f"pip install '{plain}'{aside}")
    if not requirement.specifier.contains(version, prereleases=True):
        wanted = f"{version}, and fedsim needs {requirement.specifier}"
        return Finding(name, "failed", wanted, f"pip install '{plain}'")
    if imported is None or not imported.ok:
        reason = "unknown" if imported is None else imported.reason
        found = f"{version} cannot be imported: {reason}"
        return Finding(name, "failed", found, f"pip install --force-reinstall '{plain}'{aside}")
    differs = tested is not None and tested != version.partition("+")[0]
    found = f"{version}, tested with {tested}" if differs else version
    return Finding(name, "ok", found, lesser=name not in _PROMINENT)


def _noted(finding: Finding, tested: str | None) -> Finding:
    """Note a version that is not the tested one."""
    if finding.state != "ok" or ", tested with " not in finding.found:
        return finding
    return finding._replace(state="note", remedy=f"pip install '{finding.name}=={tested}'")


def _python() -> Finding:
    version = platform.python_version()
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
        from packaging.specifiers import SpecifierSet
    except (metadata.PackageNotFoundError, KeyError, ImportError):
        return Finding("python", "ok", f"{version}, {sys.executable}")
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("python", "ok", f"{version} ({wanted}), {sys.executable}")
    remedy = "make a virtual environment with a Python that fits, and install fedsim there"
    return Finding("python", "failed", f"{version}, and fedsim needs {wanted}", remedy)


def _fedsim() -> Finding:
    installed = metadata.version(DISTRIBUTION)
    where = Path(fedsim.__file__).parent
    if installed == fedsim.__version__:
        return Finding("fedsim", "ok", f"{installed}, {where}")
    found = f"{fedsim.__version__} in {where}, installed as {installed}"
    return Finding("fedsim", "note", found, f"pip install -e {where.parent}")


def _requirements() -> "Iterator[Requirement]":
    """The packages that fedsim asks for, with those of their extras (Flower's simulation: Ray)."""
    from packaging.requirements import Requirement

    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield requirement
        for extra in requirement.extras:
            try:
                of_extras = metadata.requires(requirement.name) or []
            except metadata.PackageNotFoundError:
                continue  # it is named as missing itself
            for line in of_extras:
                each = Requirement(line)
                if each.marker is not None and _only_with(extra, each):
                    yield each


def _only_with(extra: str, requirement: "Requirement") -> bool:
    marker = requirement.marker
    assert marker is not None
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _module(name: str) -> str:
    return _MODULES.get(name.lower(), name.replace("-", "_"))


def _tested_versions() -> dict[str, str]:
    """The versions that the tests ran with, from `constraints.txt`; nothing without that file."""
    package = Path(fedsim.__file__).parent
    for file in (package / "constraints.txt", package.parent / "constraints.txt"):
        try:
            text = file.read_text(encoding="utf-8")
        except OSError:
            continue
        return dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))
    return {}


def environment_for_children() -> dict[str, str]:
    """The environment of this process, with the fedsim that it runs importable."""
    root = str(Path(fedsim.__file__).parents[1])
    paths = filter(None, [os.environ.get("PYTHONPATH"), root])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
