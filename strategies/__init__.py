"""What the server decides: one algorithm per file, found by its file name.

`strategies.FedAvg` and `strategies.fedavg` both work: classes are exported by their modules' names.
"""

import importlib
import pkgutil


def __getattr__(name: str) -> object:
    """Import a strategy's class at first use."""
    for module in pkgutil.iter_modules(__path__):
        if module.name == name:
            return importlib.import_module(f"{__name__}.{name}")
        if module.name.replace("_", "") == name.lower():
            return getattr(importlib.import_module(f"{__name__}.{module.name}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
