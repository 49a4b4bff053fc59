"""A run of the repository on nodes, beside a test, and the same one in simulation."""

import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import fedsim
from fedsim.scenario.load import load

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = "scenarios/deploy_two_clients.toml"


def read_summary(folder: Path) -> dict:
    (summary,) = folder.rglob("summary.json")
    return json.loads(summary.read_text())


def started(deployment, settings, *, until=lambda: True, app=ROOT):
    """A run of an app that goes on beside the test, once something holds of it."""
    running = Future()

    def run():
        try:
            running.set_result(deployment.flwr_run(app, settings, timeout_s=900))
        except Exception as error:
            running.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not running.done() and not until():
        time.sleep(0.2)
    return running


def simulated(scenario: str, choices: str, out: Path) -> dict:
    """The summary of a run in this process."""
    fedsim.start(load(ROOT / scenario, [*choices.split(), "engine.kind=inline"]), out=out)
    return read_summary(out)
