"""Flower's ClientApp for the benchmark: a module of its own, so that actors import it once.

The pool is loaded once per actor and stays; a client is its `partition-id`.
"""

import functools
import json
import os

import baton
import torch
import torch_models
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

WORKLOAD = "FEDSIM_BENCHMARK_WORKLOAD"  # environment variable: actors are other processes

app = ClientApp()


@functools.cache
def resident() -> tuple:
    """Return what an actor keeps: workload, model, pool."""
    work = json.loads(os.environ[WORKLOAD])
    torch.set_num_threads(1)
    x, y, offsets = baton.pool(work)
    return work, torch_models.make(work["model"]), torch.from_numpy(x), torch.from_numpy(y), offsets


@app.train()
def train(message: Message, context: Context) -> Message:
    """One epoch of SGD from the model received."""
    work, model, features, targets, offsets = resident()
    share = int(context.node_config["partition-id"]) % (len(offsets) - 1)
    start, end = int(offsets[share]), int(offsets[share + 1])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=work["lr"])
    order = start + torch.randperm(end - start)
    for rows in order.split(work["batch"]):
        optimizer.zero_grad()
        cross_entropy(model(features[rows]), targets[rows]).backward()
        optimizer.step()
    reply = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": end - start}),
    }
    return Message(content=RecordDict(reply), reply_to=message)
