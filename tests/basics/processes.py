"""Python in a process of its own, whose environment names the kernels that its libraries take."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fedsim.basics.kernels import VARIABLE, VARIABLES

ROOT = Path(__file__).resolve().parents[2]
# to look for garbage among all that torch makes, on the way and at the end, takes half a second
QUICKLY = "import atexit, gc; gc.disable(); atexit.register(gc.freeze)\n"


def run(code, *, wrapper=(), timeout=120, **variables):
    """Run code; returns what it has printed as its last line of JSON.

    Args:
        code: What to run.
        wrapper: What runs Python, such as an emulator.
        timeout: Seconds after which it is taken for hung.
        **variables: The environment's, besides those that pin no kernel.
    """
    ended = ended_process(code, wrapper=wrapper, timeout=timeout, **variables)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def ended_process(code, *, wrapper=(), timeout=120, **variables):
    """Run code; returns the process that has ended."""
    unpinned = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, VARIABLE)}
    return subprocess.run(
        [*wrapper, sys.executable, "-c", QUICKLY + code],
        env={**unpinned, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
