"""What the server decides: one algorithm per file, found by its file name.

`strategies.FedAvg` and `strategies.fedavg` both work: a module's strategy is exported under its own
name.
"""

import importlib
import pkgutil


def __getattr__(name: str) -> object:
    """Import a module or the class that one of them defines, at first use."""
    modules = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    if name in modules:
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_"):
        # the module called like the class first; others (flag's FlagAggregator) are looked through
        modules.sort(key=lambda module: module.replace("_", "") != name.lower())
        for module in modules:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            mine = getattr(found, "__module__", None) == f"{__name__}.{module}"
            if mine and hasattr(found, "configure_train"):
                return found
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
