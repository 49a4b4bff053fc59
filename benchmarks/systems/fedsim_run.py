"""fedsim: what `fedsim run` does with a scenario, every default on, from the file to the end.

The scenario is written out and given to `fedsim.start`, which is what the command calls; the
hook after each round is the progress display, told of a round after everything else has been: so a
turn holds metrics, records and checkpoints. The engine is the workload's: inline, or Ray with
so many workers.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import fedsim  # isort: skip  # pins kernels, before NumPy comes with what follows

import contextlib

import baton

from benchmarks import pool
from fedsim.runs import checkpoint
from fedsim.runs.progress import Progress
from fedsim.runs.start import start
from fedsim.scenario.load import load

FOREVER = 10**9
CHECKPOINT_EVERY = 10  # the default; the model of a turn that ends on one can be read from it


def scenario(work: dict[str, Any]) -> str:
    """Return the workload as a scenario's text."""
    shared = work["clients"] > pool.SHARES
    data = {"name": pool.SHARED} if shared else {"name": "benchmarks.pool:load"}
    tables: dict[str, dict[str, Any]] = {
        "task": {"model": work["model"], "dtype": work["dtype"], **work.get("task", {})},
        "data": {**data, "path": work["pool"], **({} if shared else {"clients": work["clients"]})},
        "partition": {"kind": "natural", **({"clients": work["clients"]} if shared else {})},
        "participation": {"kind": "uniform", "cohort_size": work["cohort"]},
        "strategy": work["strategy"],
        "client": {
            "name": "local_sgd",
            "local_lr": work["lr"],
            "local_epochs": work["epochs"],
            "batch_size": work["batch"],
        },
        "evaluation": {"every": FOREVER},
        "engine": work["engine"],
    }
    if "initial" in work:
        tables["task"]["weights"] = str(Path(work["initial"]).with_suffix(".safetensors"))
    lines = [f"rounds = {FOREVER}"]
    for table, keys in tables.items():
        lines += [
            "",
            f"[{table}]",
            *(f"{key} = {json.dumps(value)}" for key, value in keys.items()),
        ]
    return "\n".join(lines) + "\n"


class Turns(Progress):
    """Hands the baton over after each round, in place of the display."""

    def __init__(self, turns: baton.Baton, folder: Path) -> None:
        super().__init__(FOREVER, quiet=True)
        self._turns, self._folder = turns, folder

    def update(self, server_round: int, metrics: Any, **counts: int) -> None:
        """End the run when there is no further turn."""
        super().update(server_round, metrics, **counts)
        model, written = (partial(do, server_round) for do in (self._model, self._written))
        if not self._turns.ended(model, written):
            raise KeyboardInterrupt

    def _written(self, server_round: int) -> Path:
        """Wait for the last checkpoint, which is written while the next rounds are computed."""
        last = server_round - server_round % CHECKPOINT_EVERY
        while True:
            place = checkpoint.latest(self._folder / checkpoint.FOLDER)
            if place is not None and place.stem == f"round_{last:06d}":
                return place
            time.sleep(0.0005)

    def _model(self, server_round: int) -> dict[str, Any]:
        assert server_round % CHECKPOINT_EVERY == 0, "only a checkpoint holds the model"
        saved = checkpoint.load(self._written(server_round))
        assert saved.server_round == server_round
        return {name: tensor.numpy() for name, tensor in saved.model.items()}


def main() -> None:
    """Run rounds as the harness asks for them."""
    work = baton.workload()
    if work.get("unpinned"):
        os.environ.pop("MKL_CBWR")  # before MKL's first call: as if fedsim had not set it
    pool.register()
    with tempfile.TemporaryDirectory(prefix="fedsim-benchmark-") as folder:
        file, out = Path(folder, "benchmark.toml"), Path(folder, "run")
        file.write_text(scenario(work))
        turns = baton.Baton(
            fedsim=fedsim.__version__,
            torch=version("torch"),
            ray=version("ray"),
            flwr=version("flwr"),
            engine=work["engine"],
        )
        if turns.wait():
            with contextlib.suppress(KeyboardInterrupt):
                start(load(file), out=out, progress=Turns(turns, out))


if __name__ == "__main__":
    main()
