"""Starts Ray with one worker in a process of its own, and ends both."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from fedsim.cli.doctor.finding import Finding
from fedsim.cli.doctor.packages import environment_for_children

_REMEDY = "see the newest folder in /tmp/ray, or run without it: `--set engine.kind=inline`"

# RayGrid starts Ray as a run does, and joins a cluster that stands as a run does.
_CHILD = """
import json, os
report = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from flwr.clientapp import ClientApp
from fedsim.engine.ray.grid import RayGrid
from fedsim.basics.errors import RunError
try:
    with RayGrid(ClientApp(), 1, workers=1, startup_timeout_s={timeout_s}) as grid:
        print(json.dumps({{"workers": len(grid.worker_pids)}}), file=report, flush=True)
except RunError as error:
    print(json.dumps({{"error": str(error)}}), file=report, flush=True)
"""


def start(*, timeout_s: float = 60.0) -> Finding:
    """Start Ray and a worker, or say why that fails.

    Args:
        timeout_s: How long it may take; whatever has not ended by then is ended.
    """
    begun = time.monotonic()
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD.format(timeout_s=timeout_s / 2)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment_for_children(),
            start_new_session=True,
        )
    except OSError as error:
        return Finding("Ray worker", "failed", f"no process could be started for it: {error}")
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        found = f"Ray and one worker did not start within {timeout_s:g} s"
        return Finding("Ray worker", "failed", found, _REMEDY)
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    return _judged(output, errors, child.returncode, time.monotonic() - begun)


def _judged(output: str, errors: str, returncode: int, took_s: float) -> Finding:
    lines = output.splitlines()
    document = json.loads(lines[0]) if lines else {}
    if document.get("workers"):
        return Finding("Ray worker", "ok", f"Ray and one worker started in {took_s:.0f} s")
    said = errors.strip().splitlines() or [f"its process ended with exit code {returncode}"]
    reason = document.get("error") or said[-1]
    return Finding("Ray worker", "failed", reason, _REMEDY)
