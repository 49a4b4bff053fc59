"""The home folder, which not every user has, and the folder of stored data that lies in it."""

import os
from pathlib import Path

from fedsim.basics.errors import ScenarioError


def home() -> Path | None:
    """Return the user's home folder; None where neither HOME nor the system says one.

    So it is in a container with a user id that nobody has.
    """
    found = os.path.expanduser("~")
    return None if found == "~" or not os.path.isabs(found) else Path(found)


def nameless(text: str) -> str:
    """Return a text with `~` for the home folder, so that it names no user."""
    place = home()
    return text if place is None or len(str(place)) <= 1 else text.replace(str(place), "~")


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced, and as it stands where there is no home folder."""
    return Path(os.path.expanduser(path))


def cache_root() -> Path:
    """Return `$FEDSIM_CACHE`, or `~/.cache/fedsim`.

    Raises:
        ScenarioError: If that needs a home folder and there is none, or a file is in its place.
    """
    named = os.environ.get("FEDSIM_CACHE")
    if (named or "~").startswith("~") and home() is None:
        where = f"FEDSIM_CACHE = '{named}'" if named else "the data cache"
        raise ScenarioError(
            f"{where}: there is no home folder (HOME is unset and this user id has none): set "
            "FEDSIM_CACHE to a writable folder"
        )
    root = expanded(named or "~/.cache/fedsim").absolute()
    if (file := _file_above(root)) is not None:
        where = f"FEDSIM_CACHE = '{named}'" if named else f"the data cache {root}"
        if (named or "~").startswith("~") and (own := home()) and own.is_relative_to(file):
            where += f", HOME = '{own}'" if "HOME" in os.environ else f", the home folder '{own}'"
        raise ScenarioError(
            f"{where}: {file} is no folder but a file: set FEDSIM_CACHE to a writable folder"
        )
    return root


def _file_above(folder: Path) -> Path | None:
    """The file that stands where a folder or one above it should be, or None."""
    for each in (folder, *folder.parents):
        try:
            os.stat(each)
        except OSError:  # not there, or below a file
            continue
        return None if each.is_dir() else each
    return None
