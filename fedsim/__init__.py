"""fedsim: reproducible federated learning experiments on Flower and Ray.

Importing this package is cheap: what needs torch, Ray or Flower is imported when it is first used.
"""

import importlib
import os
from typing import Any

from fedsim.basics import kernels

# These libraries read their settings when they are first imported, so the defaults must stand
# before; what the user has set wins.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
kernels.pin_as_asked()

__version__ = "0.1.0"

# Exported name -> (module, name there), imported at first use.
_EXPORTS = {
    "CheckpointError": ("fedsim.basics.errors", "CheckpointError"),
    "FedsimError": ("fedsim.basics.errors", "FedsimError"),
    "InlineGrid": ("fedsim.engine.inline", "InlineGrid"),
    "RayGrid": ("fedsim.engine.ray.grid", "RayGrid"),
    "RunError": ("fedsim.basics.errors", "RunError"),
    "Scenario": ("fedsim.scenario.scenario", "Scenario"),
    "ScenarioError": ("fedsim.basics.errors", "ScenarioError"),
    "load_scenario": ("fedsim.scenario.load", "load"),
    "resume": ("fedsim.runs.start", "resume"),
    "run_simulation": ("fedsim.engine.simulation", "run_simulation"),
    "start": ("fedsim.runs.start", "start"),
}


def __getattr__(name: str) -> Any:
    """Import an exported name at its first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
