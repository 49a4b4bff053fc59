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
        ScenarioError: If that needs a home folder and there is none.
    """
    named = os.environ.get("FEDSIM_CACHE")
    if (named or "~").startswith("~") and home() is None:
        where = f"FEDSIM_CACHE = '{named}'" if named else "the data cache"
        raise ScenarioError(
            f"{where}: there is no home folder (HOME is unset and this user id has none): set "
            "FEDSIM_CACHE to a writable folder"
        )
    return expanded(named or "~/.cache/fedsim").absolute()
