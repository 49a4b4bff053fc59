"""What bits depend on besides a scenario: versions of what computes, and kernels in use."""

import functools
import platform
from importlib import metadata
from typing import Any

import fedsim
from fedsim.basics.kernels_in_use import in_use


def versions() -> dict[str, Any]:
    """Return the versions and the kernels of this process.

    The machine's kind is among it (`kernels_in_use.in_use`), its name is not.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "fedsim": fedsim.__version__,
    }
    found |= {package: _version(package) for package in ("flwr", "torch", "ray", "numpy")}
    found["system"] = platform.system()
    found["machine"] = platform.machine()
    return found | in_use()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
