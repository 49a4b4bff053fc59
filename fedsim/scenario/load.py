"""From a file, or the name of one that comes with fedsim, to a scenario."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.scenario import discovery
from fedsim.scenario.overrides import apply
from fedsim.scenario.scenario import Scenario, pin, with_folders
from fedsim.scenario.validation import validated


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read and validate a scenario file.

    Args:
        path: The file, or the name of a scenario that comes with fedsim ("quickstart").
        overrides: Assignments such as "engine.kind=inline"; values are TOML, bare words strings.

    Returns:
        The scenario, complete with defaults. When it names something by import path, its folder
        is searched for modules from now on, in place of that of a scenario before it.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    file, origin = _find(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{origin}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{origin}: is not UTF-8 text (at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        raise ScenarioError(f"{origin}: invalid TOML: {message[:1].lower()}{message[1:]}") from None
    apply(document, overrides)
    pin(document)
    document = with_folders(document, origin, file.parent)
    return Scenario(**validated(document, origin=origin, folder=file.parent))


def find(path: str | Path) -> Path:
    """Return a scenario's file.

    Args:
        path: The file, or the name of a scenario that comes with fedsim.

    Raises:
        ScenarioError: If there is none.
    """
    return _find(path)[0]


def _find(path: str | Path) -> tuple[Path, str]:
    """Return a scenario's file, and what messages call it."""
    file = Path(path)
    try:
        if file.is_file():
            return file, str(file)
    except OSError as error:  # such as a name that is too long
        raise ScenarioError(f"{file}: cannot be read: {error.strerror}") from error
    if file.is_dir():
        raise ScenarioError(f"{file}: is a folder; name one of its .toml files")
    known = discovery.shipped_scenarios()
    if file.parent == Path() and file.name.removesuffix(".toml") in known:
        return known[file.name.removesuffix(".toml")], file.name
    beside = {f.stem: f for f in file.parent.glob("*.toml")} if file.parent.is_dir() else {}
    guess = nearest(file.stem, {**known, **beside})
    hint = f"; did you mean '{beside.get(guess, guess)}'?" if guess else ""
    raise ScenarioError(
        f"{file}: there is no such scenario file{hint} (`fedsim list scenarios` names those that "
        "come with fedsim)"
    )
