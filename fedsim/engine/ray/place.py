"""Where Ray has its folder and sockets, and how its errors read; nothing here imports ray.

A socket's path has at most 107 bytes, of which Ray's names of sessions and sockets take 64; and Ray
takes ASCII alone. So where the folder for temporary files is long, or is written in other letters,
Ray gets a short one elsewhere.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import RunError

_LONGEST = 107 - 64  # bytes of the path of Ray's folder
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_OURS = re.compile(r"^fedsim\.(?:\w+\.)*\w+: ")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class RayPlace(NamedTuple):
    """Where Ray's folder is.

    Attributes:
        folder: In which it lies.
        why_not: Why it is not where temporary files are, in words; empty where it is.
    """

    folder: str
    why_not: str = ""


def place() -> RayPlace:
    """Return where Ray's folder can be.

    Raises:
        RunError: If nowhere; the message says which variable to set.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    usual = os.environ.get(name) or "/tmp"
    why = _unfit(os.path.join(usual, "ray"))
    if not why:
        return RayPlace(usual)
    if name == "RAY_TMPDIR":
        raise RunError(f"RAY_TMPDIR = '{usual}' {why}; set it to a short folder, such as /tmp")
    for folder in _SHORT:
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return RayPlace(folder, f"TMPDIR = '{usual}' {why}")
    raise RunError(
        f"TMPDIR = '{usual}' {why}; set TMPDIR or RAY_TMPDIR to a short folder that can be written"
    )


def make_folder() -> str | None:
    """Return a new folder for Ray, or None where its usual one will do.

    Raises:
        RunError: If there is no place for it, or it cannot be made.
    """
    found = place()
    if not found.why_not:
        return None
    try:
        return tempfile.mkdtemp(prefix="fedsim-ray-", dir=found.folder)
    except OSError as error:
        raise RunError(
            f"{found.why_not}, and {found.folder} cannot be written: {error.strerror}; set "
            "RAY_TMPDIR to a short folder that can be"
        ) from error


def in_words(error: BaseException) -> str:
    r"""Return what an error of Ray's says in one line: the last, which has the cause.

    Colours of a terminal and addresses of objects are no part of it.

    Example:
        >>> in_words(RuntimeError("Traceback of a worker:\nValueError: it is <A object at 0x7f>"))
        'ValueError: it is <A object>'
    """
    cause = getattr(error, "cause", None)
    text = _ADDRESS.sub("", _COLOURS.sub("", str(error if cause is None else cause)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _OURS.sub("", lines[-1]) if lines else type(error).__name__


def _unfit(folder: str) -> str:
    """Why a folder cannot be Ray's, in words."""
    path = str(Path(folder).absolute())
    if not path.isascii():
        return "has letters that Ray does not take"
    if (size := len(path)) > _LONGEST:
        return f"is too long for Ray's sockets ({size} characters with /ray, at most {_LONGEST})"
    return ""
