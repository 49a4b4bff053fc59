"""Imports packages one after another in a process of its own, and says how each went.

Run as a script with the modules' names as arguments: a library that ends its process, exceeds its
memory or hangs takes only this one with it. Every line on standard output is one JSON list: module,
"begun", "ok" or "failed", and what there is to say of it.
"""

import atexit
import gc
import importlib
import json
import os
import sys
import time
from typing import Any, TextIO


def main(modules: list[str], report: TextIO) -> None:
    """Import the modules and report on each; of torch, on its devices and kernels too."""

    def say(*words: Any) -> None:
        print(json.dumps(words), file=report, flush=True)

    for name in modules:
        say(name, "begun", None)
        begun = time.perf_counter()
        try:
            module = importlib.import_module(name)
            found: Any = {**_cuda(module), **_kernels()} if name == "torch" else {}
        except BaseException as error:  # whatever a package raises is what is to be reported
            say(name, "failed", _in_one_line(error))
            continue
        say(name, "ok", {**found, "seconds": round(time.perf_counter() - begun, 3)})


def _cuda(torch: Any) -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(number) for number in range(count)]
    return {
        "built_for": torch.version.cuda or torch.version.hip,
        "devices": [{"name": each.name, "memory": each.total_memory} for each in properties],
    }


def _kernels() -> dict[str, Any]:
    """What this process computes with; nothing where that cannot be told."""
    try:
        import fedsim  # noqa: F401 - pins what decides it, as every run does
        from fedsim.basics.kernels_in_use import in_use, why_not_portable

        return {"kernels": in_use(), "not_portable": why_not_portable()}
    except Exception:  # torch works and is not as fedsim knows it: its own finding says which
        return {}


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    gc.disable()  # modules are no garbage: to look for it, now and at the end, takes a second
    atexit.register(gc.freeze)
    # what libraries print goes elsewhere, so that standard output is the report alone
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        main(sys.argv[1:], stdout)
