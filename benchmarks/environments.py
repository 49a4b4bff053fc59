"""An environment of its own for each peer, made from the configured package index."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = {
    "flower": ("flwr[simulation]==1.41.0", "ray==2.55.1", "torch==2.13.0", "numpy==2.4.6"),
    "pfl": ("pfl==0.6.0", "torch==2.13.0", "numpy==2.4.6"),
    "fedjax": (
        "fedjax==0.0.17",
        "jax==0.4.20",
        "jaxlib==0.4.20",
        "dm-haiku==0.0.10",
        "flax==0.7.5",
        "optax==0.2.2",
        "numpy==1.26.4",
        "scipy==1.12.0",
    ),
}


class CannotInstall(Exception):
    """A peer's packages are not to be had here."""


def python_of(name: str, root: Path) -> Path:
    """Return the interpreter of a peer's environment, which is made if it is not there.

    Args:
        name: One of `REQUIREMENTS`.
        root: Where environments are kept.

    Raises:
        CannotInstall: With the end of pip's output.
    """
    wanted = [sys.version, *REQUIREMENTS[name]]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    place = root / name
    python, stamp = place / "bin" / "python", place / "installed"
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    shutil.rmtree(place, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotInstall(f"{' '.join(command[1:4])}: {done.stderr.strip()[-500:]}")
    stamp.write_text(digest)
    return python


def packages(python: Path) -> dict[str, str]:
    """Return the versions of everything that an environment holds."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {each["name"]: each["version"] for each in json.loads(listed)}
