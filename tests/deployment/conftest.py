"""What the deployment tests share: a small Flower app, and the compose file's processes."""

from pathlib import Path

import pytest

from fedsim.deployment.processes import Deployment
from tests.deployment.runs_on_nodes import ROOT

PYPROJECT = """
[project]
name = "proof"
version = "1.0.0"
description = "Two nodes that pull a model towards their own numbers"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "proof.server:app"
clientapp = "proof.client:app"

[tool.flwr.app.config]
out = ""
rounds = 3
culprit = -1
"""

SERVER = """
import json
import os
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0)
    config = ConfigRecord({"culprit": context.run_config["culprit"]})
    start = ArrayRecord([np.zeros(3)])
    rounds = context.run_config["rounds"]
    result = strategy.start(grid, start, num_rounds=rounds, train_config=config)
    (model,) = result.arrays.to_numpy_ndarrays()
    metrics = {r: dict(record) for r, record in result.train_metrics_clientapp.items()}
    summary = {"model": model.tolist(), "metrics": metrics, "home": os.environ["FLWR_HOME"]}
    (Path(context.run_config["out"]) / "summary.json").write_text(json.dumps(summary))
"""

CLIENT = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    partition = context.node_config["partition-id"]
    if partition == message.content["config"]["culprit"]:
        raise ValueError(f"partition {partition} has no data")
    calls = context.state["calls"]["count"] + 1 if "calls" in context.state else 1
    context.state["calls"] = MetricRecord({"count": calls})
    (model,) = message.content["arrays"].to_numpy_ndarrays()
    moved = (model + 1 + 2 * partition) / 2
    metrics = MetricRecord({"num-examples": 1 + 2 * partition, "calls": calls})
    reply = RecordDict({"arrays": ArrayRecord([moved]), "metrics": metrics})
    return Message(reply, reply_to=message)
"""


@pytest.fixture(scope="session")
def proof_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flower app of public API alone; nothing of fedsim is in it."""
    app = tmp_path_factory.mktemp("app") / "proof"
    (app / "proof").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "proof" / "__init__.py").touch()
    (app / "proof" / "server.py").write_text(SERVER)
    (app / "proof" / "client.py").write_text(CLIENT)
    return app


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with Deployment(
        ROOT / "docker-compose.yml", folder=tmp_path_factory.mktemp("plain")
    ) as running:
        yield running
