"""What a table names is looked up once in a process; a table alone goes to another one."""

import dataclasses
import pickle
from collections import Counter

import pytest

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.runs import start as runs
from fedsim.runs.world import build
from fedsim.scenario import discovery
from fedsim.scenario.choice import KINDS_OF_TABLES, Choice

SCENARIO = """
seed = 3
rounds = 2
task = { model = "mlp", hidden = [8] }
data = { name = "digits", test_fraction = 0.9 }
partition = { kind = "iid", clients = 6, test_fraction = 0.2 }
participation = { kind = "uniform", cohort_size = 4 }
client = { local_lr = 0.1, batch_size = 16 }
engine = { kind = "inline", chunk_size = 2 }
evaluation = { clients = 2 }
"""
ATTACKED = 'attack = { kind = "sign_flip", num_byzantine = 1 }'
GOSSIP = """
strategy = { name = "gossip" }
topology = { kind = "ring" }
"""
WRAPPED = """
[strategy]
name = "flower:DifferentialPrivacyServerSideFixedClipping"
noise_multiplier = 0.1
clipping_norm = 0.5
strategy = { name = "flower:FedAdam", eta = 0.1 }
"""
SERVER = 'strategy = { name = "fedau", server = { name = "adam" } }'
COMMON = {
    ("models", "mlp"), ("datasets", "digits"), ("partitions", "iid"),
    ("participation", "uniform"), ("clients", "local_sgd"),
}  # fmt: skip
OWN = """
from clients.local_sgd import LocalSGD


class Mine(LocalSGD):
    mark = "{mark}"
"""


@pytest.fixture
def looked_up(monkeypatch):
    """How often discovery finds a factory by its name, by kind and name."""
    found = Counter()

    def counted(function, *kind):
        def find(*arguments):
            key = (*kind, *arguments)
            if kind or key[0] not in ("strategies", "clients"):  # which these find below
                found[key] += 1
            return function(*arguments)

        return find

    for name, *kind in (("factory",), ("strategy_factory", "strategies"),
                        ("procedure_factory", "clients")):  # fmt: skip
        monkeypatch.setattr(discovery, name, counted(getattr(discovery, name), *kind))
    return found


def written(folder, text):
    file = folder / "scenario.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        (ATTACKED, {("strategies", "fedavg"), ("attacks", "sign_flip")}),
        (GOSSIP, {("strategies", "gossip"), ("topologies", "ring")}),
        (WRAPPED, {("strategies", "flower:FedAdam"),
                   ("strategies", "flower:DifferentialPrivacyServerSideFixedClipping")}),
        (SERVER, {("strategies", "fedau"), ("server_optimizers", "adam")}),
    ],
    ids=["attack", "topology", "a strategy around another", "a server optimiser"],
)  # fmt: skip
def test_each_table_is_looked_up_once_from_file_to_result(tmp_path, looked_up, tables, named):
    scenario = fedsim.load_scenario(written(tmp_path, SCENARIO + tables))
    assert looked_up == dict.fromkeys(COMMON | named, 1)
    fedsim.start(scenario, out=tmp_path / "run")
    assert looked_up == dict.fromkeys(COMMON | named, 1)


def test_an_app_looks_up_what_runs_on_clients_once_where_it_arrives(tmp_path, looked_up):
    world = build(fedsim.load_scenario(written(tmp_path, SCENARIO + ATTACKED)))
    looked_up.clear()
    arrived = pickle.loads(pickle.dumps(world.app))
    assert not looked_up
    executor = arrived.executor
    assert executor.settings_of({"lr-decay": 0.5}) == {"lr_decay": 0.5}
    executor.under({"lr_decay": 0.5})
    assert looked_up == {("clients", "local_sgd"): 1, ("attacks", "sign_flip"): 1}


def test_a_scenario_is_the_same_whatever_has_been_looked_up(tmp_path, looked_up):
    scenario = fedsim.load_scenario(written(tmp_path, SCENARIO + GOSSIP))
    looked_up.clear()
    arrived = pickle.loads(pickle.dumps(scenario))
    assert (arrived, arrived.resolved()) == (scenario, scenario.resolved())
    assert "choices" not in scenario.resolved()
    assert "choices" not in repr(scenario)
    assert not looked_up
    assert arrived.choices["strategy"].factory is scenario.choices["strategy"].factory
    assert looked_up == {("strategies", "gossip"): 1}
    tables = {name: getattr(scenario, name) for name in KINDS_OF_TABLES}
    plain = dataclasses.replace(scenario, choices={})
    assert len(pickle.dumps(scenario)) < len(pickle.dumps(tables)) + len(pickle.dumps(plain))


def test_choices_follow_the_tables(tmp_path, looked_up):
    scenario = fedsim.load_scenario(written(tmp_path, SCENARIO))
    assert sorted(scenario.choices) == sorted({*KINDS_OF_TABLES} - {"attack", "topology"})
    looked_up.clear()
    other = dataclasses.replace(scenario, seed=4, client={**scenario.client, "batch_size": 8})
    assert other.choices["strategy"] is scenario.choices["strategy"]
    assert other.choices["client"].make().work.batch_size == 8
    assert scenario.choices["client"].make().work.batch_size == 16
    assert looked_up == {("clients", "local_sgd"): 1}
    gossip = scenario.changed(strategy={"name": "gossip"})
    assert gossip.choices["topology"].table is gossip.topology


def test_what_is_the_users_own_is_what_its_file_says_when_it_is_used(tmp_path):
    """A notebook reads a scenario, edits the module and runs it."""
    (tmp_path / "mine_of_choice.py").write_text(OWN.format(mark="before"), encoding="utf-8")
    text = SCENARIO.replace("client = { ", 'client = { name = "mine_of_choice:Mine", ')
    scenario = fedsim.load_scenario(written(tmp_path, text))
    choice = scenario.choices["client"]
    assert choice.make().mark == choice.having({"local_lr": 0.2}).make().mark == "before"
    (tmp_path / "mine_of_choice.py").write_text(OWN.format(mark="after"), encoding="utf-8")
    world = build(scenario)
    assert choice.make().mark == choice.having({"local_lr": 0.2}).make().mark == "after"
    with runs.make_grid(world) as grid:
        assert grid.client_app.executor.procedure.mark == "after"


def test_an_unknown_name_is_refused_at_first_use():
    with pytest.raises(ScenarioError, match="did you mean 'fedavg'"):
        Choice("strategies", {"name": "fedavgg"}).make()


def test_what_is_offered_is_given_to_what_takes_it():
    def factory(*, rate=1.0, topology=None):
        return rate, topology

    choice = Choice("strategies", {"name": "fedavg", "rate": 0.5}, factory)
    assert choice.make(topology="ring", expected_cohort=3) == (0.5, "ring")
    assert choice.make(topology=None) == choice.make() == (0.5, None)
    assert choice.having({"rate": 2.0}).make() == (2.0, None)
