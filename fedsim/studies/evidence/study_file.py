"""What the files of all kinds of studies have in common: where they lie, how they are read."""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsim.basics.errors import ScenarioError, nearest, show, unknown
from fedsim.scenario import discovery
from fedsim.scenario.scenario import Scenario
from fedsim.scenario.signatures import reason

FOLDER = "studies"  # beside the scenarios

_Document = TypeVar("_Document", bound=BaseModel)


class EvidenceTable(BaseModel):
    """A table of a study's file: no other keys, no conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StudyContent(NamedTuple):
    """A study's file before its keys are looked at.

    Attributes:
        path: The file.
        raw: Its bytes.
        table: What they say.
    """

    path: Path
    raw: bytes
    table: dict[str, Any]

    def scenario(self, named: str) -> tuple[str, bytes]:
        """Return the file or name of the study's scenario, and all bytes that decide the study.

        Args:
            named: What the study says: a file beside it, or the name of one that comes with fedsim.
        """
        beside = self.path.parent / named
        if beside.is_file():
            return str(beside), self.raw + beside.read_bytes()
        return named, self.raw


def shipped_files() -> dict[str, Path]:
    """Return the files of all studies that come with fedsim, by name."""
    folder = next(iter(discovery.shipped_scenarios().values())).parent / FOLDER
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find(name: str) -> Path:
    """Return a study's file, given as a path or by the name of one that comes with fedsim.

    Raises:
        ScenarioError: If there is none.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_files()
    if name in known:
        return known[name]
    guess = nearest(name, known)
    hint = f"; did you mean '{guess}'?" if guess else ""
    raise ScenarioError(f"{name}: there is no such study{hint} (known: {', '.join(known)})")


def read_content(path: Path) -> StudyContent:
    """Read a study's file as TOML.

    Raises:
        ScenarioError: If it cannot be read, is no TOML, or is a scenario.
    """
    try:
        content = path.read_bytes()
        table = tomllib.loads(content.decode())
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ScenarioError(f"{path}: invalid TOML: {error}") from None
    if "arms" not in table and table.keys() & {"strategy", "partition", "client"}:
        raise ScenarioError(
            f"{path}: is a scenario, not a study, which names a scenario and [[arms]] of it; "
            f"`fedsim compare {path}` holds a scenario's variants beside each other"
        )
    return StudyContent(path, content, table)


def checked(
    document: type[_Document], content: StudyContent, tables: Mapping[str, type[BaseModel]]
) -> _Document:
    """Return a study's file as the document that it should be.

    Args:
        document: What it should be.
        content: The file.
        tables: What is in its tables, by name.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    try:
        return document.model_validate(content.table)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_finding(content.path, detail, document, tables) for detail in found]
        raise ScenarioError("\n".join(lines)) from None


def sha256_with_code(raw: bytes, scenarios: Iterable[Scenario]) -> str:
    """Return the hash of a study: its bytes, and the user's own code that its scenarios name."""
    code = "".join(sorted({scenario.code.sha256 for scenario in scenarios}))
    return hashlib.sha256(raw + code.encode()).hexdigest()


def _finding(
    path: Path, detail: Any, document: type[BaseModel], tables: Mapping[str, type[BaseModel]]
) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        inside = len(detail["loc"]) > 1
        owner = tables.get(str(detail["loc"][0]), document) if inside else document
        return f"{path}: {unknown(str(detail['loc'][-1]), 'a key here', owner.model_fields)}"
    if detail["type"] == "missing":
        return f"{path}: '{place}' is missing"
    if detail["type"] == "value_error":
        return f"{path}: {reason(detail)}"
    return f"{path}: {place} = {show(detail['input'])}: {reason(detail)}"
