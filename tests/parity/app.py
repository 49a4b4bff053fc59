"""An ordinary Flower app, written with Flower's public API alone, and a way to run it on one
engine.

Its clients remember a momentum and counters in `Context.state`, answer queries, evaluate, run in a
lifespan and behind mods, and one of them raises in round 2.

As a program: `python app.py flower|ray|inline OUT.json [ADDRESS]` runs three strategies after one
another on ten nodes, all taking part in every round, and writes what came of it. Flower's own
simulation joins the Ray cluster at the address, where one is given.
"""

import json
import sys
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum

NODES, ROUNDS = 10, 3
FAILS = 3  # the partition whose client raises in round 2
FOUND: dict[str, dict] = {}


def count(context: Context, what: str) -> int:
    """Count one more in the node's memory."""
    counters = context.state.metric_records.get("counters", MetricRecord())
    context.state["counters"] = MetricRecord({**counters, what: counters.get(what, 0) + 1})
    return context.state["counters"][what]


def halves_the_update(message: Message, context: Context, call_next) -> Message:
    """A mod around every handler: half of a training's update gets through."""
    received = [a.copy() for a in message.content["arrays"].to_numpy_ndarrays()]
    reply = call_next(message, context)
    count(context, "halved")
    if "arrays" in reply.content:
        trained = reply.content["arrays"].to_numpy_ndarrays()
        halved = [r + 0.5 * (t - r) for r, t in zip(received, trained, strict=True)]
        reply.content["arrays"] = ArrayRecord(halved)
    return reply


def counts_evaluations(message: Message, context: Context, call_next) -> Message:
    """A mod around one handler."""
    reply = call_next(message, context)
    reply.content["metrics"]["evaluations"] = count(context, "evaluations")
    return reply


client_app = ClientApp()


@client_app.lifespan()
def lifespan(context: Context):
    """Count what begins and what ends."""
    count(context, "began")
    yield
    count(context, "ended")


@client_app.train(mods=[halves_the_update])
def train(message: Message, context: Context) -> Message:
    """Take one step of least squares with momentum on data of this partition."""
    partition = int(context.node_config["partition-id"])
    server_round = message.content["config"]["server-round"]
    calls = count(context, "trained")
    weight, bias = message.content["arrays"].to_numpy_ndarrays()
    draw = np.random.default_rng([partition, server_round])
    x = draw.standard_normal((10 + partition, weight.shape[0]))
    y = draw.standard_normal((10 + partition, weight.shape[1]))
    error = x @ weight + bias - y
    gradients = [x.T @ error / len(x), error.mean(axis=0)]
    if "momentum" in context.state:
        before = context.state["momentum"].to_numpy_ndarrays()
        gradients = [0.5 * m + g for m, g in zip(before, gradients, strict=True)]
    context.state["momentum"] = ArrayRecord(gradients)
    if partition == FAILS and server_round == 2:
        raise ValueError("the battery is empty")  # and the momentum above is not to be kept
    numbers = {"num-examples": len(x), "loss": float((error**2).mean()), "calls": calls}
    trained = [w - 0.1 * g for w, g in zip((weight, bias), gradients, strict=True)]
    content = {"arrays": ArrayRecord(trained), "metrics": MetricRecord(numbers)}
    return Message(RecordDict(content), reply_to=message)


@client_app.evaluate(mods=[counts_evaluations])
def evaluate(message: Message, context: Context) -> Message:
    """Report a number that depends on the model and the partition."""
    total = float(sum(a.sum() for a in message.content["arrays"].to_numpy_ndarrays()))
    partition = int(context.node_config["partition-id"])
    metrics = MetricRecord({"num-examples": 1 + partition, "value": total * (1 + partition)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this is and what it remembers, and forget everything."""
    memory = dict(context.state.metric_records.get("counters", MetricRecord()))
    for name in list(context.state):
        del context.state[name]
    who = int(context.node_config["partition-id"])
    content = RecordDict({"who": MetricRecord({"partition": who}), "memory": MetricRecord(memory)})
    return Message(content, reply_to=message)


def ask(grid: Grid) -> dict[int, tuple[int, dict]]:
    """Each node's partition, and what it remembered."""
    queries = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    return {
        reply.metadata.src_node_id: (
            reply.content["who"]["partition"],
            dict(reply.content["memory"]),
        )
        for reply in grid.send_and_receive(queries)
    }


class Watched:
    """Notes of every round whose replies were errors and whose model, if anyone's, came out."""

    def aggregate_train(self, server_round, replies):
        """Aggregate, and take notes."""
        replies = list(replies)
        who = {r.metadata.src_node_id: self.partitions[r.metadata.src_node_id] for r in replies}
        failed = [[who[r.metadata.src_node_id], r.error.code] for r in replies if r.has_error()]
        models = {
            who[r.metadata.src_node_id]: r.content["arrays"].to_numpy_ndarrays()
            for r in replies
            if r.has_content()
        }
        after, metrics = super().aggregate_train(server_round, replies)
        chosen = [
            partition
            for partition, model in models.items()
            if all(map(np.array_equal, model, after.to_numpy_ndarrays()))
        ]
        self.notes.append({"failed": sorted(failed), "chosen": chosen, "replies": sorted(models)})
        return after, metrics


STRATEGIES = {
    "FedAvg": (FedAvg, {}),
    "FedAdam": (FedAdam, {"eta": 0.05}),
    "Krum": (Krum, {"num_malicious_nodes": 2}),
}

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategies one after another and keep models, metrics and memories."""
    for name, (kind, arguments) in STRATEGIES.items():
        strategy = type(name, (Watched, kind), {})(min_available_nodes=NODES, **arguments)
        while len(list(grid.get_node_ids())) < NODES:
            pass
        strategy.partitions = {node: who for node, (who, _) in ask(grid).items()}
        strategy.notes = []
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(
                [np.random.default_rng(0).standard_normal((7, 3)), np.zeros(3)]
            ),
            num_rounds=ROUNDS,
            train_config=ConfigRecord({"unused": 1.0}),
        )
        FOUND[name] = {
            "arrays": [a.tolist() for a in result.arrays.to_numpy_ndarrays()],
            "train": [dict(m) for _, m in sorted(result.train_metrics_clientapp.items())],
            "evaluate": [dict(m) for _, m in sorted(result.evaluate_metrics_clientapp.items())],
            "rounds": strategy.notes,
            "memories": [memory for _, memory in sorted(ask(grid).values(), key=lambda i: i[0])],
        }


def run(engine: str, address: str = "local") -> dict[str, dict]:
    """Run the app on "flower" (Flower's own simulation), "ray" or "inline" (fedsim's engines)."""
    FOUND.clear()
    if engine == "flower":
        from flwr.simulation import run_simulation

        two_cpus = {"client_resources": {"num_cpus": 2}, "init_args": {"address": address}}
        run_simulation(server_app, client_app, NODES, backend_config=two_cpus)
    else:
        import fedsim

        one_cpu = {"client_resources": {"num_cpus": 1}}
        fedsim.run_simulation(server_app, client_app, NODES, engine, backend_config=one_cpu)
    return dict(FOUND)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(sys.argv[1], *sys.argv[3:])))
