"""Problems of a scenario, gathered so that all are told at once."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedsim.basics.errors import (
    ScenarioError,
    is_too_large,
    largest_number,
    printable,
    show,
)
from fedsim.scenario.overrides import at_key
from fedsim.scenario.tables import WITH_PATHS

_T = TypeVar("_T")


class ScenarioProblems:
    """The problems found so far, one line each."""

    def __init__(self, origin: str, tables: Mapping[str, Any]) -> None:
        self.origin = origin
        self.tables = tables
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        """Add a line, once."""
        line = f"{self.origin}: {printable(text)}"
        if line not in self.lines:  # one mistake may be met in two places
            self.lines.append(line)

    def attempt(self, action: Callable[[], _T], *, where: str = "") -> _T | None:
        """Return what `action` does, or note why it refuses and return None."""
        try:
            return action()
        except ScenarioError as error:
            for line in str(error).splitlines():
                # Factories that know their table name it themselves.
                self.add(line if line.startswith("[") else f"{where}{line}")
        except (ValueError, MemoryError, OverflowError) as error:
            words = " ".join(str(error).split())
            if is_too_large(error):
                words = f"{largest_number(self.tables)}: is too large: {words}"
            self.add(words if words.startswith("[") else f"{where}{words}")
        except OSError as error:  # such as a name that is too long for a file
            self.add(f"{where}{self._of_file(error, where.partition(']')[0].lstrip('['))}")
        return None

    def _of_file(self, error: OSError, table: str) -> str:
        """Say which key of a table names the file that could not be opened."""
        wanted = str(error.filename)
        given = at_key(self.tables, table)
        for key, value in (given or {}).items() if isinstance(given, Mapping) else ():
            path = os.path.expanduser(value) if isinstance(value, str) else ""
            if not path or not Path(os.path.abspath(wanted)).is_relative_to(os.path.abspath(path)):
                continue
            inside = "" if wanted in (value, path) else f"{wanted}: "
            where = "" if os.path.isabs(path) else f" in the working folder {os.getcwd()}"
            return f"{key} = {show(value)}: {inside}{error.strerror}{where}"
        key = WITH_PATHS.get(table)
        named = f"{key} = " if isinstance(given, Mapping) and key in given else ""
        return f"{named}{show(error.filename)}: {error.strerror}"

    def raise_any(self) -> None:
        """Raise what has been found, if anything has.

        Raises:
            ScenarioError: With one line for each problem.
        """
        if self.lines:
            raise ScenarioError("\n".join(self.lines))
