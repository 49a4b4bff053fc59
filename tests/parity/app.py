"""An ordinary Flower app, written with Flower's public API alone, and a way to run it on one
engine.

As a program: `python app.py flower|ray|inline OUT.npz` runs three strategies after one another on
six nodes, all taking part in every round, and writes their final models.
"""

import sys

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum, Strategy

NODES, ROUNDS = 6, 3
RESULTS: dict[str, list[np.ndarray]] = {}
REPLIES: list[int] = []

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Take one step of least squares on data of this partition; count the calls in the state."""
    partition = int(context.node_config["partition-id"])
    calls = context.state.metric_records.get("calls", MetricRecord({"count": 0}))
    context.state["calls"] = MetricRecord({"count": calls["count"] + 1})
    weight, bias = message.content["arrays"].to_numpy_ndarrays()
    draw = np.random.default_rng([partition, message.content["config"]["server-round"]])
    x = draw.standard_normal((10 + partition, weight.shape[0])).astype(np.float32)
    y = draw.standard_normal((10 + partition, weight.shape[1])).astype(np.float32)
    error = x @ weight + bias - y
    weight = (weight - 0.05 * x.T @ error / len(x)).astype(np.float32)
    bias = (bias - 0.05 * error.mean(axis=0)).astype(np.float32)
    metrics = {
        "num-examples": len(x),
        "loss": float((error**2).mean()),
        "calls": calls["count"] + 1,
    }
    content = {"arrays": ArrayRecord([weight, bias]), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Report a number that depends on the model and the partition."""
    total = float(sum(a.sum() for a in message.content["arrays"].to_numpy_ndarrays()))
    partition = int(context.node_config["partition-id"])
    metrics = MetricRecord({"num-examples": 1 + partition, "value": total * (1 + partition)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategies one after another and keep the final models and metrics."""
    strategies: dict[str, Strategy] = {
        "FedAvg": FedAvg(min_available_nodes=NODES),
        "FedAdam": FedAdam(min_available_nodes=NODES, eta=0.05),
        "Krum": Krum(min_available_nodes=NODES, num_malicious_nodes=1),
    }
    for name, strategy in strategies.items():
        start = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord([start, np.zeros(3, np.float32)]),
            num_rounds=ROUNDS,
            train_config=ConfigRecord({"unused": 1.0}),
        )
        trained = result.train_metrics_clientapp[ROUNDS]
        evaluated = result.evaluate_metrics_clientapp[ROUNDS]
        numbers = [trained["loss"], trained["calls"], evaluated["value"]]
        RESULTS[name] = [*result.arrays.to_numpy_ndarrays(), np.array(numbers)]


def run(engine: str) -> dict[str, list[np.ndarray]]:
    """Run the app on "flower" (Flower's own simulation), "ray" or "inline" (fedsim's engines)."""
    RESULTS.clear()
    one_cpu = {"client_resources": {"num_cpus": 1}}
    if engine == "flower":
        from flwr.simulation import run_simulation

        run_simulation(server_app, client_app, NODES, backend_config=one_cpu)
    else:
        import fedsim

        fedsim.run_simulation(server_app, client_app, NODES, engine, backend_config=one_cpu)
    return dict(RESULTS)


if __name__ == "__main__":
    found = run(sys.argv[1])
    np.savez(
        sys.argv[2], **{f"{n}/{i}": a for n, arrays in found.items() for i, a in enumerate(arrays)}
    )
