"""`fedsim.run_simulation`: Flower's signature, what it refuses, warns of, and gives to an app."""

import inspect
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation as flowers

import fedsim
from fedsim.basics.errors import RunError
from tests.basics.processes import QUICKLY


def client_app():
    """Reports what it was configured with, and what its lifespan has trained so far."""
    app = ClientApp()

    @app.lifespan()
    def lifespan(context: Context):
        before = context.state.array_records.get("weight", ArrayRecord([np.zeros(2)]))
        context.state["weight"] = ArrayRecord([0.5 * before.to_numpy_ndarrays()[0] + 1.0])
        yield
        context.state["over"] = MetricRecord({"lives": lives(context) + 1})

    def lives(context: Context) -> int:
        return int(context.state.metric_records.get("over", MetricRecord({"lives": 0}))["lives"])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        numbers = {"num-examples": 1, "lives": lives(context)}
        numbers |= {k: v for k, v in context.run_config.items() if not isinstance(v, str)}
        content = {"arrays": context.state["weight"], "metrics": MetricRecord(numbers)}
        return Message(RecordDict(content), reply_to=message)

    return app


def server_app(found, rounds=1, failing=False):
    app = ServerApp()

    @app.lifespan()
    def lifespan(context: Context):
        found.append("begun")
        yield
        found.append("ended")

    @app.main()
    def main(grid, context):
        for _ in range(rounds):
            asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
            found.append(list(grid.send_and_receive(asked)))
        found.append(dict(context.run_config))
        found.append(getattr(grid, "num_workers", None))
        if failing:
            raise ArithmeticError("the server's own")
        context.state["seen"] = MetricRecord({"rounds": rounds})

    return app


def run(found=None, *, rounds=1, failing=False, nodes=3, backend="inline", **arguments):
    server = server_app([] if found is None else found, rounds, failing)
    return fedsim.run_simulation(server, client_app(), nodes, backend, **arguments)


def test_flowers_arguments_are_taken_in_flowers_order_with_flowers_defaults():
    theirs = list(inspect.signature(flowers).parameters.values())
    mine = list(inspect.signature(fedsim.run_simulation).parameters.values())
    for their, my in zip(theirs, mine, strict=False):
        assert (my.name, my.kind, my.default) == (their.name, their.kind, their.default)
    assert all(more.kind is inspect.Parameter.KEYWORD_ONLY for more in mine[len(theirs) :])


def test_an_app_that_trains_in_its_lifespan_keeps_what_it_trained():
    found = []
    context = run(found, rounds=3)
    begun, *rounds, config, _, ended = found
    assert (begun, ended) == ("begun", "ended")
    assert config == {}
    for server_round, replies in enumerate(rounds):
        for reply in replies:
            weight = reply.content["arrays"].to_numpy_ndarrays()[0]
            np.testing.assert_array_equal(weight, np.full(2, 2 - 0.5**server_round))
            assert reply.content["metrics"]["lives"] == server_round
    assert context.state["seen"]["rounds"] == 3


def test_both_apps_read_the_run_s_configuration_as_flower_flattens_it():
    found = []
    run(found, run_config={"lr": 0.5, "data": {"size": 7, "deep": {"name": "x"}}})
    assert found[2] == {"lr": 0.5, "data.size": 7, "data.deep.name": "x"}
    numbers = found[1][0].content["metrics"]
    assert (numbers["lr"], numbers["data.size"]) == (0.5, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "rya"}, "backend_name: 'rya' is not a backend; did you mean 'ray'?"),
        (
            {"backend_config": {"client_resource": {}}},
            "backend_config: 'client_resource' is not a key of backend_config; did you mean "
            "'client_resources'?",
        ),
        (
            {"backend_config": {"client_resources": {"num_cpu": 1}}},
            "'num_cpu' is not a key of client_resources; did you mean 'num_cpus'?",
        ),
        (
            {"backend_config": {"client_resources": {"num_cpus": "1"}}},
            "backend_config['client_resources']['num_cpus'] = '1': must be a number >= 0",
        ),
        (
            {"backend_config": {"client_resources": {"num_gpus": -1}}},
            "backend_config['client_resources']['num_gpus'] = -1: must be a number >= 0",
        ),
        (
            {"backend_config": {"client_resources": {"num_cpus": 0}}},
            "a worker takes no CPU and no GPU; give one of them above 0",
        ),
        ({"backend_config": {"init_args": 3}}, "['init_args'] = 3: must be a mapping"),
        ({"run_config": {"a": {"b": [1]}}}, "run_config['a.b'] = [1]: must be true, false, a "),
        ({"nodes": 0}, "num_supernodes = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"enable_tf_gpu_growth": True}, "enable_tf_gpu_growth"),
        ({"backend_config": {"actor": {"tensorflow": 1}}}, "backend_config['actor']"),
        ({"backend_config": {"init_args": {"num_cpus": 1}}}, "backend_config['init_args']"),
        (
            {"backend_config": {"client_resources": {"num_cpus": 1}}},
            "backend_config['client_resources']",
        ),
        ({"workers": 2}, "workers"),
        ({"client_timeout_s": 3.0}, "client_timeout_s"),
    ],
)
def test_what_does_nothing_is_named(arguments, name, caplog):
    run(**arguments)
    assert [r.getMessage().partition(" does")[0] for r in caplog.records] == [name]


def test_an_ordinary_call_warns_of_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        run(backend_config={"actor": {}, "init_args": None}, run_config={"a": 1})
    assert not caplog.records


def test_what_the_server_raises_is_raised_and_the_clients_failures_are_told(caplog):
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise ValueError("the battery is empty")

    with pytest.raises(ArithmeticError, match="the server's own"):
        fedsim.run_simulation(server_app([], failing=True), app, 2, "inline")
    assert "client 1: ValueError: the battery is empty" in caplog.text


class Asked:
    """Stands for Ray's actors, none of which starts: notes what is asked for them."""

    def __init__(self):
        self.resources = []

    def options(self, num_cpus, num_gpus, **others):
        self.resources.append((num_cpus, num_gpus))
        return self

    def remote(self, *arguments):
        return self

    @property
    def ready(self):
        return self


def test_workers_take_what_client_resources_say(ray_cluster, monkeypatch):
    # Flower's default takes both CPUs
    for resources, workers, cpus in (({"num_cpus": 0.5}, 4, 0.5), ({}, 1, 2.0)):
        found, asked = [], Asked()
        monkeypatch.setattr(ray_cluster, "remote", lambda kind, asked=asked: asked)
        run(found, backend="ray", backend_config={"client_resources": resources}, rounds=0)
        assert found[-2] == workers
        assert asked.resources == [(cpus, 0.0)] * workers


def test_resources_that_the_machine_lacks_are_refused_by_name(ray_cluster):
    if ray_cluster.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    for resources, asked in (
        ({"num_cpus": 1, "num_gpus": 0.5}, "1 CPUs and 0.5 GPUs"),
        ({"num_cpus": 64}, "64 CPUs and 0 GPUs"),
    ):
        with pytest.raises(RunError) as refused:
            run(backend="ray", backend_config={"client_resources": resources})
        assert "2 CPUs and 0 GPUs, no node with room for one worker of " in str(refused.value)
        assert asked in str(refused.value)
        assert "client_resources" in str(refused.value)


def test_an_app_of_the_old_interface_runs():
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    class Client(NumPyClient):
        def __init__(self, partition):
            self.partition = partition

        def fit(self, parameters, config):
            return [parameters[0] + self.partition], 10, {}

    class Strategy(FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            models.append(parameters_to_ndarrays(parameters)[0])
            return parameters, metrics

    def server_fn(context):
        strategy = Strategy(
            fraction_evaluate=0.0, initial_parameters=ndarrays_to_parameters([np.zeros(3)])
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    def client_fn(context):
        return Client(context.node_config["partition-id"]).to_client()

    models = []
    fedsim.run_simulation(
        ServerApp(server_fn=server_fn), ClientApp(client_fn=client_fn), 4, "inline"
    )
    np.testing.assert_allclose(models, [[1.5] * 3, [3.0] * 3])


# A folder as `flwr new` makes it.

PROJECT = {
    "pyproject.toml": """
[project]
name = "my-app"
version = "1.0.0"

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "my_app.server_app:app"
clientapp = "my_app.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 2
train.step = 0.25
""",
    "my_app/__init__.py": "",
    "my_app/client_app.py": """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    (weight,) = message.content["arrays"].to_numpy_ndarrays()
    moved = weight + context.run_config["train.step"] * context.node_config["partition-id"]
    content = {"arrays": ArrayRecord([moved]), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
""",
    "my_app/server_app.py": """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(2)]),
        num_rounds=context.run_config["num-server-rounds"],
    )
    print("weight", *result.arrays.to_numpy_ndarrays()[0])
""",
    "simulate.py": QUICKLY
    + """
import tomllib

import fedsim
from my_app.client_app import app as client_app
from my_app.server_app import app as server_app

with open("pyproject.toml", "rb") as file:
    config = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
fedsim.run_simulation(server_app, client_app, 5, "inline", run_config=config)
""",
}


def test_an_app_folder_runs_with_a_script_of_a_few_lines(tmp_path):
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "simulate.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weight 1.0 1.0" in done.stdout  # two rounds of 0.25 times the mean partition, 2
