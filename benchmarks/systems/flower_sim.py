"""Flower's own simulation: `run_simulation` with Ray, a plain ClientApp, Flower's own strategies.

Two actors with one CPU each, data resident in them; evaluation is off. The hook after each round is
the strategy's `evaluate_fn`, which measures nothing.
"""

import json
import logging
import os
from importlib.metadata import version

import baton

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch
import torch_models
from flower_client import WORKLOAD, app
from flower_strategies import strategy
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

FOREVER = 10**9


class Done(Exception):
    """There is no further turn."""


def main() -> None:
    """Run rounds as the harness asks for them."""
    work = baton.workload()
    os.environ[WORKLOAD] = json.dumps(work)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = torch_models.make(work["model"], baton.initial(work))
    model.to(getattr(torch, work["dtype"]))
    turns = baton.Baton(
        flwr=version("flwr"), ray=version("ray"), torch=torch.__version__, workers=work["workers"]
    )
    if not turns.wait():
        return

    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        def between(server_round: int, arrays: ArrayRecord) -> None:
            if server_round and not turns.ended(
                lambda: {k: v.numpy() for k, v in arrays.to_torch_state_dict().items()}
            ):
                raise Done

        server_side = strategy(
            work["strategy"],
            work["clients"],
            fraction_train=work["cohort"] / work["clients"],
            fraction_evaluate=0.0,
            min_available_nodes=work["clients"],
            min_train_nodes=work["cohort"],
        )
        server_side.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=FOREVER,
            evaluate_fn=between,
        )

    run_simulation(
        server,
        app,
        num_supernodes=work["clients"],
        backend_config={
            "init_args": {"num_cpus": work["workers"], "include_dashboard": False},
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
