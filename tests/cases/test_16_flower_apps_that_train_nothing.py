"""`run_simulation` names the replies that a plain app's server will not use, when they come."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server import ServerApp as OldServerApp
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as OldFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import fedsim

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the apps' own arithmetic


ODD = {
    "one for all": np.full(1, 5.0),  # NumPy would stretch it
    "a number": np.array(5.0),
    "longer": np.zeros(4),
    "complex": np.zeros(3) + 1j,
    "text": np.array(["1", "2", "3"]),
}
COUNTS = {"no examples": 0, "negative": -10, "too many": 10**30}


class Client(NumPyClient):
    def __init__(self, number, fault):
        self.number, self.fault = number, fault

    def fit(self, parameters, config):
        after = [parameters[0] + 1.0]
        mine = self.number == 2
        if self.fault == "nan" and mine:
            after = [after[0] * np.nan]
        if self.fault == "raises" and mine:
            raise ValueError("the battery is empty")
        if self.fault == "more arrays" and mine:
            after = after * 2
        if self.fault in ODD and mine:
            after = [ODD[self.fault]]
        count = COUNTS.get(self.fault, 10) if mine or self.fault == "no examples" else 10
        return after, count, {"deltas": [0.5, 1.5]} if self.fault == "list" else {}

    def evaluate(self, parameters, config):
        loss = np.nan if self.fault == "nan loss" and self.number == 1 else 1.0
        return float(loss), 10, {}


class Refusing(Client):
    """Says by Flower's status that it could not."""

    def to_client(self):
        client = super().to_client()
        client.fit = lambda ins: FitRes(
            Status(Code.FIT_NOT_IMPLEMENTED, "no data today"), ins.parameters, 0, {}
        )
        return client


def components(context):
    start = ndarrays_to_parameters([np.zeros(3)])
    strategy = OldFedAvg(initial_parameters=start)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))


def old(fault, caplog, kind=Client, backend="inline"):
    """The warnings of an app of the old interface."""
    app = ClientApp(
        client_fn=lambda context: kind(int(context.node_config["partition-id"]), fault).to_client()
    )
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        fedsim.run_simulation(OldServerApp(server_fn=components), app, 3, backend)
    return [r.getMessage() for r in caplog.records if r.name == "fedsim"]


def test_a_reply_that_is_not_finite_is_named_in_its_round_and_the_model_then(caplog):
    said = old("nan", caplog)
    assert said[0].startswith("client 2, round 1, train: reply is not finite: 'fitres.parameters'")
    assert any("the model that the server sends is not finite from here on" in s for s in said)
    assert sum("client 2" in line for line in said) == 1
    assert not any("client 0" in line or "client 1" in line for line in said)


@pytest.mark.slow
@pytest.mark.usefixtures("lent_workers")
def test_workers_replies_are_looked_at_too(caplog):
    said = old("nan", caplog, backend="ray")
    assert any(s.startswith("client 2, round 1, train: reply is not finite") for s in said)


def test_a_list_among_the_metrics_is_named_and_that_nobody_s_training_counted(caplog):
    said = old("list", caplog)
    for client in range(3):  # an old server asks them at once, from threads
        start = f"client {client}, round 1, train: metrics['deltas'] is a list, which a server"
        assert any(line.startswith(start) for line in said)
    (first, second) = [line for line in said if "nobody's training counted" in line]
    assert first.startswith("round 1, train: nobody's training counted, of 3 clients asked")
    assert second.startswith("round 2, train")


OTHERS = {
    "raises": "round 1, train: client 2: ValueError: the battery is empty",
    "more arrays": ", round 1, train: its ",
    "nan loss": "client 1, round 1, evaluate: reply is not finite: metric 'loss' = nan",
    "no examples": "round 1, train: nobody's training counted, of 3 clients asked (the first cause:"
    " client ",
    "one for all": "'fitres.parameters/0' is [",
    "a number": "'fitres.parameters/0' is [",
    "longer": "'fitres.parameters/0' is [",
    "complex": "client 2, round 1, train: 'fitres.parameters' '0' holds complex numbers",
    "text": "client 2, round 1, train: 'fitres.parameters' '0' holds text",
    "negative": "client 2, round 1, train: -10 examples: must be in 0..",
    "too many": f"client 2, round 1, train: {10**30} examples: must be in 0..",
}


@pytest.mark.parametrize(("fault", "line"), OTHERS.items())
def test_other_replies_that_are_lost_are_named(fault, line, caplog):
    try:
        said = old(fault, caplog)
    except Exception:  # what the app's server makes of it is the app's
        said = [r.getMessage() for r in caplog.records if r.name == "fedsim"]
    assert any(line in s for s in said), said
    assert sum("the battery is empty" in s and "raised:" not in s for s in said) <= 2


def test_a_status_that_is_not_ok_is_named(caplog):
    said = old("", caplog, kind=Refusing)
    assert "client 0, round 1, train: the client says FIT_NOT_IMPLEMENTED: no data today" in said


def test_nothing_is_said_of_an_app_that_trains(caplog):
    assert old("", caplog) == []


def new(answer, caplog, clients=3):
    """The warnings of an app of the new interface whose clients answer so."""
    app, server = ClientApp(), ServerApp()

    @app.train()
    def train(message, context):
        return answer(int(context.node_config["partition-id"]), message)

    @server.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=1)

    with caplog.at_level(logging.WARNING, logger="fedsim"):
        fedsim.run_simulation(server, app, clients, "inline")
    return [r.getMessage() for r in caplog.records if r.name == "fedsim"]


def reply(message, array, examples=1, **metrics):
    numbers = MetricRecord({"num-examples": examples, **metrics})
    content = {"arrays": ArrayRecord({"0": array}), "metrics": numbers}
    return Message(RecordDict(content), reply_to=message)


def test_the_new_interface_s_replies_are_looked_at_too(caplog):
    def answer(client, message):
        if client == 0:
            return Message(Error(7, "no network"), reply_to=message)
        value = np.nan if client == 1 else 1.0
        return reply(message, Array(np.full(2, value)), listed=[1.0, 2.0])

    said = new(answer, caplog)
    assert "round 1, train: client 0: no network" in said
    said.remove("round 1, train: client 0: no network")
    assert said[0].startswith("client 1, round 1, train: reply is not finite: 'arrays' ['0'] holds")
    assert len(said) == 1


def test_of_many_like_faults_some_are_named_and_all_are_counted(caplog):
    said = new(lambda _, message: Message(Error(7, "no network"), reply_to=message), caplog, 9)
    assert sum(line.endswith(": no network") for line in said) == 5
    assert "round 1, train: 4 more clients like these" in said
    assert sum("nobody's training counted, of 9 clients asked" in line for line in said) == 1
