"""Flower's ClientApp for the benchmark: a module of its own, so that actors import it once.

The pool is loaded once per actor and stays; a client is its `partition-id`.
"""

import functools
import json
import os
from collections.abc import Iterator

import baton
import torch
import torch_models
from flower_algorithms import LOCAL, Local
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

WORKLOAD = "FEDSIM_BENCHMARK_WORKLOAD"  # environment variable: actors are other processes

app = ClientApp()


@functools.cache
def resident() -> tuple:
    """Return what an actor keeps: workload, model, pool."""
    work = json.loads(os.environ[WORKLOAD])
    torch.set_num_threads(1)
    x, y, offsets = baton.pool(work)
    dtype = getattr(torch, work["dtype"])
    model = torch_models.make(work["model"]).to(dtype)
    return work, model, torch.from_numpy(x).to(dtype), torch.from_numpy(y), offsets


def batches(start: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a client's batches, in each epoch in an order of its own."""
    work, _, features, targets, _ = resident()
    for _ in range(work["epochs"]):
        order = start + torch.randperm(end - start)
        for rows in order.split(work["batch"]):
            yield features[rows], targets[rows]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local training from the model received."""
    work, model, _, _, offsets = resident()
    share = int(context.node_config["partition-id"]) % (len(offsets) - 1)
    start, end = int(offsets[share]), int(offsets[share + 1])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    local = Local(model, batches(start, end), work["lr"], work["strategy"], message, context)
    done = LOCAL[work["strategy"]["name"]](local)
    reply = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": end - start, **done.metrics}),
        **done.arrays,
    }
    return Message(content=RecordDict(reply), reply_to=message)
