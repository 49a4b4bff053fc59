"""The logs of processes."""

from pathlib import Path


def text_of(path: Path) -> str:
    """Return what a log holds so far; nothing when there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def last_lines(path: Path, lines: int = 30) -> str:
    """Return the end of a log under a line that names it, to be put behind a message."""
    last = "\n".join(text_of(path).splitlines()[-lines:])
    return f"\n--- last lines of {path.name}\n{last or '(empty)'}"
