"""Nobody waits without an end for nodes that a simulation does not have."""

import sys
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp as OldServerApp
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as OldFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes

import fedsim
from fedsim.basics.errors import RunError, ScenarioError
from fedsim.federation.grids.waiting import check_minima
from fedsim.federation.participation.kinds import PARTICIPATION
from fedsim.messages.patience import Patience
from fedsim.runs.world import build
from tests.cases import worlds

BERNOULLI = {"participation": {"kind": "bernoulli", "rate": 0.3}}
pytestmark = pytest.mark.timeout(60)


class Mine(FedAvg):
    """As Flower's, with a log line."""

    def aggregate_train(self, server_round, replies):
        print("round", server_round)
        return super().aggregate_train(server_round, replies)


class Three(Mine):
    """Asks for three nodes."""

    def __init__(self):
        super().__init__(min_available_nodes=3)


class InTurn(FedAvg):
    """Two strategies, which it keeps in a dictionary and a list."""

    def __init__(self):
        super().__init__()
        self.first, self.others = {"a": FedAvg()}, [FedAvg()]
        self.others[0].myself = self

    def configure_train(self, server_round, arrays, config, grid):
        chosen = self.others[0] if server_round % 2 else self.first["a"]
        return chosen.configure_train(server_round, arrays, config, grid)


class Elsewhere(Three):
    """Takes whoever is there, whatever its minimum."""

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        return [Message(content, node, "train") for node in grid.get_node_ids()]


class Polls(Elsewhere):
    """Waits by itself, as Flower's examples do."""

    def configure_train(self, server_round, arrays, config, grid):
        while len(list(grid.get_node_ids())) < 10:
            time.sleep(0.1)
        return []


NAME = "tests.cases.test_08_waits_for_nodes_that_never_come:"


def test_a_subclass_goes_on_with_one_client_as_flowers_own_does(tmp_path):
    found = [
        fedsim.start(worlds.scenario(name, rounds=8, **BERNOULLI), out=tmp_path / str(place))
        for place, name in enumerate(("flower:FedAvg", f"{NAME}Mine"))
    ]
    assert found[0].summary["params_sha256"] == found[1].summary["params_sha256"]
    assert found[1].summary["rounds"] == 8


def test_strategies_in_a_strategy_s_containers_go_on_too(tmp_path):
    described = worlds.scenario(f"{NAME}InTurn", rounds=8, **BERNOULLI)
    assert fedsim.start(described, out=tmp_path / "run").summary["rounds"] == 8


@pytest.mark.parametrize(
    "tables",
    [{"partition": {"clients": 1}}, {"participation": {"kind": "uniform", "cohort_size": 1}}],
)
def test_a_federation_of_one_goes_on(tables, tmp_path):
    described = worlds.scenario(f"{NAME}Mine", rounds=2, **tables)
    assert fedsim.start(described, out=tmp_path / "run").summary["rounds"] == 2


def test_one_client_that_evaluates_is_enough(tmp_path):
    described = worlds.scenario(
        f"{NAME}Mine", rounds=1, evaluation={"clients": 1}, partition={"test_fraction": 0.2}
    )
    assert "local/loss" in fedsim.start(described, out=tmp_path / "run").summary["final"]


def test_a_minimum_that_somebody_chose_is_refused_before_round_1():
    described = worlds.scenario(f"{NAME}Three", rounds=30, **BERNOULLI)
    with pytest.raises(ScenarioError, match=r"round \d+: Three waits for 3 nodes .*min_available"):
        build(described)
    described = worlds.scenario(f"{NAME}Three", partition={"clients": 2})
    with pytest.raises(ScenarioError, match=r"round 1: Three waits for 3 nodes .* and 2 take part"):
        build(described)
    build(worlds.scenario(f"{NAME}Three"))
    build(worlds.scenario(f"{NAME}Elsewhere", partition={"clients": 2}))


def test_looking_ahead_leaves_a_chain_s_memory_as_it_was():
    chain = PARTICIPATION["markov"](rate=0.5)
    before = chain.state()
    sizes = {"clients": 6, "rounds": 5, "seed": 1, "evaluating": 0}
    with pytest.raises(ScenarioError):
        check_minima([FedAvg(min_train_nodes=6)], chain, **sizes)
    assert chain.state() == before


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("fedsim.messages.patience._LONG_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_whoever_polls_is_ended_and_named(tmp_path):
    described = worlds.scenario(f"{NAME}Polls", rounds=1)
    with pytest.raises(RunError, match=r"round 1: Polls.configure_train, line \d+, waits for nod"):
        fedsim.start(described, out=tmp_path / "run")


@pytest.mark.usefixtures("impatient")
def test_whoever_asks_often_and_works_in_between_waits_for_nothing():

    patience = Patience(lambda who, what, present: "waits")
    for _ in range(200):
        patience.asked(3, sys._getframe())
    for _ in range(8):
        patience.asked(3, sys._getframe())
        patience.sent()
        time.sleep(0.05)


client = ClientApp()


@client.train()
def _train(message, context):
    content = {"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def test_an_app_that_asks_for_more_nodes_than_there_are_ends_at_once():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        FedAvg(min_available_nodes=5).start(grid, ArrayRecord([np.zeros(2)]), num_rounds=1)

    with pytest.raises(
        RunError, match=r"FedAvg waits for 5 nodes \(min_available_nodes\), and num_"
    ):
        fedsim.run_simulation(server, client, 3, "inline")


@pytest.mark.usefixtures("impatient")
def test_an_app_that_polls_for_nodes_ends():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        while len(list(grid.get_node_ids())) < 4:
            time.sleep(0.1)

    with pytest.raises(RunError, match="num_supernodes = 3: no more will come"):
        fedsim.run_simulation(server, client, 3, "inline")


class Old(NumPyClient):
    def fit(self, parameters, config):
        return parameters, 1, {}


def test_an_old_server_that_asks_for_more_clients_than_there_are_ends_at_once():
    def components(context):
        start = ndarrays_to_parameters([np.zeros(2)])
        strategy = OldFedAvg(min_available_clients=5, initial_parameters=start)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    app = ClientApp(client_fn=lambda context: Old().to_client())
    with pytest.raises(RunError, match=r"waits for 5 clients .*num_supernodes = 3"):
        fedsim.run_simulation(OldServerApp(server_fn=components), app, 3, "inline")


class Counting(OldFedAvg):
    """Waits for clients by itself."""

    def configure_fit(self, server_round, parameters, client_manager):
        while client_manager.num_available() < 5:
            time.sleep(0.3)
        return super().configure_fit(server_round, parameters, client_manager)


class Listing(OldFedAvg):
    def configure_fit(self, server_round, parameters, client_manager):
        while len(client_manager.all()) < 5:
            time.sleep(0.3)
        return super().configure_fit(server_round, parameters, client_manager)


class Looking(OldFedAvg):
    """Asks how many there are, and waits for none."""

    def configure_fit(self, server_round, parameters, client_manager):
        assert client_manager.num_available() == len(client_manager) == 3
        assert len(client_manager.all()) == 3
        return super().configure_fit(server_round, parameters, client_manager)


def old(strategy):
    """Run an old server with such a strategy."""

    def components(context):
        start = ndarrays_to_parameters([np.zeros(2)])
        made = strategy(initial_parameters=start, fraction_evaluate=0.0)
        return ServerAppComponents(strategy=made, config=ServerConfig(num_rounds=2))

    app = ClientApp(client_fn=lambda context: Old().to_client())
    return fedsim.run_simulation(OldServerApp(server_fn=components), app, 3, "inline")


@pytest.mark.parametrize("strategy", [Counting, Listing])
def test_an_old_strategy_that_counts_clients_until_more_are_there_is_ended(strategy):
    begun = time.monotonic()
    with pytest.raises(RunError, match=rf"{strategy.__name__}\.configure_fit.* waits for nodes"):
        old(strategy)
    assert time.monotonic() - begun < 30


def test_one_that_only_looks_is_not():
    old(Looking)


def ask(nodes):
    """One message to each node."""
    content = RecordDict({"arrays": ArrayRecord([np.zeros(2)]), "config": ConfigRecord({})})
    return [Message(content, node, "train") for node in nodes]


def more_than_were_sent(grid, server_round):
    ids, found = list(grid.push_messages(ask(grid.get_node_ids()))), []
    while len(found) < len(ids) + 1:
        found += grid.pull_messages(ids)
        time.sleep(0.05)


def each_taken_off(grid, server_round):
    ids, found = set(grid.push_messages(ask(grid.get_node_ids()))), []
    while len(found) < 20:
        for reply in grid.pull_messages(ids):
            ids.discard(reply.metadata.reply_to_message_id)
            found.append(reply)
        time.sleep(0.05)


def never_sent(grid, server_round):
    while not list(grid.pull_messages(["abc"])):
        time.sleep(0.05)


def nothing_sent(grid, server_round):
    while not list(grid.send_and_receive([])):
        time.sleep(0.05)


def spins(grid, server_round):
    while not list(grid.pull_messages(())):
        pass


def looks_at_the_nodes_too(grid, server_round):
    while len(list(grid.get_node_ids())) and not list(grid.pull_messages(["abc"])):
        list(grid.get_node_ids())
        time.sleep(0.05)


PULLS = {
    more_than_were_sent: "has had every reply",
    each_taken_off: "no message at all",
    never_sent: "no message 'abc' was ever sent",
    nothing_sent: "no message at all",
    spins: "no message at all",
    looks_at_the_nodes_too: "(no message 'abc' was ever sent|waits for nodes)",
}


class Pulls(FedAvg):
    """Has a loop of its own, which pulls replies in some way."""

    way = more_than_were_sent

    def start(self, grid, initial_arrays, num_rounds=3, **others):
        for server_round in range(1, num_rounds + 1):
            type(self).way(grid, server_round)


class Configures(Elsewhere):
    """Pulls where it configures a round."""

    way = more_than_were_sent

    def configure_train(self, server_round, arrays, config, grid):
        type(self).way(grid, server_round)
        return super().configure_train(server_round, arrays, config, grid)


@pytest.fixture
def hasty(impatient, monkeypatch):
    monkeypatch.setattr("fedsim.messages.patience._BUSY_S", 0.3)
    monkeypatch.setattr("fedsim.messages.patience._AT_ONCE", 100)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("way", PULLS, ids=lambda way: way.__name__)
def test_whoever_pulls_replies_that_never_come_is_ended(way, monkeypatch):
    monkeypatch.setattr(Pulls, "way", staticmethod(way))
    server = ServerApp()

    @server.main()
    def main(grid, context):
        Pulls().start(grid, ArrayRecord([np.zeros(2)]))

    with pytest.raises(RunError, match=rf"Pulls \({way.__name__}, line .*{PULLS[way]}"):
        fedsim.run_simulation(server, client, 3, "inline")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("way", PULLS, ids=lambda way: way.__name__)
def test_a_scenarios_strategy_that_pulls_so_is_ended_with_its_round(way, monkeypatch, tmp_path):
    monkeypatch.setattr(Configures, "way", staticmethod(way))
    if way in (more_than_were_sent, each_taken_off):
        monkeypatch.setattr("tests.cases.test_08_waits_for_nodes_that_never_come.ask", lambda _: [])
    described = worlds.scenario(f"{NAME}Configures", rounds=2)
    with pytest.raises(RunError, match=rf"round 1: Configures \({way.__name__}, line .* waits for"):
        fedsim.start(described, out=tmp_path / "run")


@pytest.mark.usefixtures("hasty")
def test_whoever_pulls_once_more_or_while_others_work_waits_for_nothing():
    patience = Patience(lambda who, what, present: "waits")
    for _ in range(5):
        patience.pulled(["a"], None, sys._getframe())
        time.sleep(0.05)
        patience.sent()
    for _ in range(5):
        patience.pulled(["a"], None, sys._getframe())
        begun = time.process_time()
        while time.process_time() - begun < 0.05:
            pass


@pytest.mark.parametrize("wanted", [5, 5.0, np.int64(5), np.float64(5)])
def test_flowers_helper_called_directly_names_who_calls_it(wanted, monkeypatch, tmp_path):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        sample_nodes(grid, wanted, 1)

    with pytest.raises(RunError, match=r"main, line \d+, waits for 5 nodes, and num_supernodes"):
        fedsim.run_simulation(server, client, 3, "inline")
    monkeypatch.setattr(Configures, "way", staticmethod(lambda grid, _: picks(grid, wanted)))
    described = worlds.scenario(f"{NAME}Configures", rounds=2, partition={"clients": 4})
    with pytest.raises(
        RunError, match=r"round 1: Configures \(picks, line \d+\) waits for 5 nodes, and 4 take"
    ):
        fedsim.start(described, out=tmp_path / "run")


def picks(grid, wanted):
    return sample_nodes(grid, wanted, 1)
