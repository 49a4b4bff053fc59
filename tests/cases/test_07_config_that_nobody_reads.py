"""Keys of `[client]` in a config are obeyed, by round and by client; others are named."""

import logging
from typing import ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from safetensors.torch import load_file

import fedsim
from fedsim.basics.errors import RunError
from fedsim.basics.json_files import JsonLines
from fedsim.engine.inline import InlineGrid
from fedsim.messages.cohort import Cohort
from fedsim.runs.client_settings import ClientSettings
from fedsim.runs.world import build
from tests.cases import worlds

NAME = "tests.cases.test_07_config_that_nobody_reads:"


class Telling(FedAvg):
    """Sends some settings with every round."""

    settings: ClassVar = {}

    def configure_train(self, server_round, arrays, config, grid):
        config.update(self.settings)
        return super().configure_train(server_round, arrays, config, grid)


class Falling(Telling):
    settings: ClassVar = {"lr": 0.0}


class Still(Telling):
    settings: ClassVar = {"local_lr": 0.0}


class Negative(Telling):
    settings: ClassVar = {"local_lr": -1.0}


class Stranger(Telling):
    settings: ClassVar = {"campaign": "autumn", "server-round": 1}


class Keeps(Telling):
    settings: ClassVar = {"keep_optimizer": True, "momentum": 0.9}


class Idle(Telling):
    settings: ClassVar = {"local_epochs": 3}


class Halving(FedAvg):
    """A step size that falls with the rounds, twice the epochs in the second."""

    def configure_train(self, server_round, arrays, config, grid):
        config["local_lr"] = 0.1 / 2 ** (server_round - 1)
        config["local-epochs"] = server_round
        return super().configure_train(server_round, arrays, config, grid)


class ByNode(FedAvg):
    """Half of the nodes train, the others stay."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = []
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            own = ConfigRecord({**message.content["config"], "local_lr": 0.1 if node % 2 else 0.0})
            content = RecordDict({"arrays": message.content["arrays"], "config": own})
            messages.append(Message(content, node, "train"))
        return messages


class Proximal(FedProx):
    pass


class Unnamed(FedAvg):
    """Gives back its arrays without their names."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord([array.numpy() for array in arrays.values()]), metrics


class SendsUnnamed(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        nameless = ArrayRecord([array.numpy() for array in arrays.values()])
        return super().configure_train(server_round, nameless, config, grid)


class SendsTwice(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        return 2 * list(super().configure_train(server_round, arrays, config, grid))


class Silent(FedAvg):
    """Builds its messages itself and does not say which round it is."""

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays})
        return [Message(content, node, "train") for node in grid.get_node_ids()]


class Beside(FedAvg):
    """Sends settings in a record beside the one that clients read."""

    record: ClassVar = ConfigRecord({"local_lr": 0.0})

    def configure_train(self, server_round, arrays, config, grid):
        for message in super().configure_train(server_round, arrays, config, grid):
            content = RecordDict({**message.content, "hyper": self.record})
            yield Message(content, message.metadata.dst_node_id, "train")


class Measured(Beside):
    record: ClassVar = MetricRecord({"local_lr": 0.0})


class Nothing(Beside):
    record: ClassVar = ConfigRecord({})


class Forgetful(FedAvg):
    """Forgets to return what it made."""

    def configure_train(self, server_round, arrays, config, grid):
        super().configure_train(server_round, arrays, config, grid)


class Starting(FedAvg):
    """Means to give settings where Flower's own loop begins."""

    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, train_config=None, **rest):
        return super().start(
            grid, initial_arrays, num_rounds, timeout, ConfigRecord({"local_lr": 0.0}), **rest
        )


def run(name, folder, **tables):
    return fedsim.start(worlds.scenario(f"{NAME}{name}", **{"rounds": 2, **tables}), out=folder)


def said(caplog):
    return [r.getMessage() for r in caplog.records if "sends its clients" in r.getMessage()]


def test_an_entry_that_nobody_reads_is_named_once_with_the_key_it_may_mean(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        run("Falling", tmp_path / "run")
    (line,) = said(caplog)
    assert line.startswith(
        "round 1: Falling sends its clients 'lr' = 0.0, which local_sgd does not read; "
        "did you mean 'local_lr'?"
    )


def test_an_entry_that_means_nothing_is_named_and_the_round_is_not(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        run("Stranger", tmp_path / "run")
    (line,) = said(caplog)
    assert "'campaign' = \"autumn\", which local_sgd does not read" in line


EXECUTORS = {
    "batched": {},
    "vmap": {"engine": {"executor": "vmap"}},
    "loop": {"engine": {"executor": "loop"}},
    "adam": {"client": {"optimizer": "adam"}},
    "momenta": {"client": {"momentum": 0.9, "keep_optimizer": True}},
}


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param(t, id=n, marks=[pytest.mark.slow] * (n != "batched"))
        for n, t in EXECUTORS.items()
    ],
)
def test_a_step_of_zero_leaves_the_model_what_it_was(tables, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = run("Still", tmp_path / "run", **tables)
    start = build(worlds.scenario(f"{NAME}Still", **tables)).arrays
    for name, tensor in load_file(result.folder / "params.safetensors").items():
        torch.testing.assert_close(tensor, torch.from_numpy(start[name].numpy()), atol=1e-6, rtol=0)
    assert not said(caplog)


def test_settings_by_round_are_those_of_runs_with_them(tmp_path):
    told = run("Halving", tmp_path / "told", client={"local_lr": 0.3})
    first, second = (run("Telling", tmp_path / str(n), rounds=1, client={"local_lr": 0.1 / n,
                         "local_epochs": n}) for n in (1, 2))  # fmt: skip
    losses = [losses_of(each)[0] for each in (first, second)]
    assert losses_of(told)[0] == losses[0]
    assert losses_of(told)[1] < losses[1]


def losses_of(result):
    records = JsonLines.read(result.folder / "metrics.jsonl")
    return [record["train/loss"] for record in records[1:]]


@pytest.mark.parametrize(
    "executor", ["batched", "vmap", pytest.param("loop", marks=pytest.mark.slow)]
)
def test_each_client_obeys_its_own_settings(executor):
    world = build(worlds.scenario(f"{NAME}ByNode", engine={"executor": executor}))
    grid = InlineGrid(world.app, 6)
    messages = world.strategy.configure_train(1, world.arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    moved = (replies.update != 0).any(dim=1).tolist()
    assert moved == [node % 2 == 1 for node in (replies.client_ids + 2).tolist()]
    alone = build(worlds.scenario("flower:FedAvg", engine={"executor": executor}))
    whole = InlineGrid(alone.app, 6).send_and_receive(
        alone.strategy.configure_train(1, alone.arrays, ConfigRecord(), InlineGrid(alone.app, 6))
    )
    ours = replies.params[torch.tensor(moved)]
    torch.testing.assert_close(ours, whole.params[torch.tensor(moved)], atol=1e-6, rtol=0)


def test_a_node_of_a_deployment_obeys_them_too():
    world = build(worlds.scenario(f"{NAME}ByNode"))
    grid = InlineGrid(world.app, 6)
    for message in world.strategy.configure_train(1, world.arrays, ConfigRecord(), grid)[:2]:
        node = message.metadata.dst_node_id
        config = {"partition-id": node - 2, "num-partitions": 6}
        reply = world.app(message, Context(1, node, config, RecordDict(), {}))
        after = reply.content["arrays"]
        same = all((after[n].numpy() == a.numpy()).all() for n, a in world.arrays.items())
        assert same == (node % 2 == 0)


def test_messages_with_settings_of_their_own_are_a_cohort_that_gives_them_back():
    world = build(worlds.scenario(f"{NAME}ByNode"))
    grid = InlineGrid(world.app, 6)
    messages = world.strategy.configure_train(1, world.arrays, ConfigRecord(), grid)
    sent = Cohort.from_messages(messages, world.layout).altered(ttl=1.0)
    in_order = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    for place, message in enumerate(in_order):
        assert dict(sent[place].content["config"]) == dict(message.content["config"])
    assert [len(places) for places, _ in sent.alike()] == [3, 3]


@pytest.mark.slow
def test_by_client_settings_run_with_drop_out_attack_and_retries(tmp_path):
    result = run(
        "ByNode", tmp_path / "run", devices={"drop_out": 0.3}, engine={"on_failure": "retry"},
        attack={"kind": "sign_flip", "num_byzantine": 1},
    )  # fmt: skip
    assert result.summary["rounds"] == 2


def test_an_impossible_value_is_named_with_round_and_strategy(tmp_path):
    with pytest.raises(RunError, match=r"round 1: Negative sends its clients .*local_lr = -1\.0"):
        run("Negative", tmp_path / "run")


def test_what_would_change_the_clients_memory_is_refused(tmp_path):
    why = r"round 1: Keeps sends its clients .*would remember other tensors"
    with pytest.raises(RunError, match=why):
        run("Keeps", tmp_path / "run")


def test_a_setting_without_effect_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        run("Idle", tmp_path / "run", client={"local_steps": 2})
    (line,) = said(caplog)
    assert "'local_epochs' is without effect with local_steps = 2" in line


def test_the_proximal_term_of_a_subclass_of_fedprox_is_obeyed():
    settings: ClassVar = ClientSettings(
        build(worlds.scenario("flower:FedAvg")).scenario.choices["client"]
    )
    assert settings.overrides({"proximal-mu": 0.5}) == {"proximal.mu": 0.5}


@pytest.mark.parametrize("name", ["Unnamed", "SendsUnnamed"])
def test_arrays_without_names_get_a_sentence(name, tmp_path):
    with pytest.raises(RunError, match=rf"round 1: {name} (gives back|sends) .*'0', '1'.*ArrayRec"):
        run(name, tmp_path / "run")


def test_two_messages_to_one_client_get_a_sentence(tmp_path):
    with pytest.raises(RunError, match="round 1: SendsTwice sends several messages to client 0"):
        run("SendsTwice", tmp_path / "run")


def test_a_strategy_that_does_not_say_the_round_trains_in_it(tmp_path):
    found = run("Silent", tmp_path / "silent").summary["params_sha256"]
    assert found == run("Telling", tmp_path / "telling").summary["params_sha256"]


@pytest.mark.parametrize("name", ["Beside", "Measured"])
def test_settings_in_a_record_that_no_client_reads_are_refused_before_anything_is_trained(
    name, tmp_path
):
    with pytest.raises(RunError, match=rf"round 1: {name} sends a record 'hyper'.*\('config'\)"):
        run(name, tmp_path / "run")


def test_an_empty_record_beside_says_nothing_and_is_taken(tmp_path):
    assert run("Nothing", tmp_path / "run").summary["rounds"] == 2


def test_a_forgotten_return_is_named_with_round_and_strategy(tmp_path):
    with pytest.raises(RunError, match=r"round 1: Forgetful returned NoneType .*`return` missing"):
        run("Forgetful", tmp_path / "run")


def test_a_start_of_ones_own_is_named_for_it_is_never_called(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        run("Starting", tmp_path / "run")
        run("Telling", tmp_path / "plain")
    lines = [r.getMessage() for r in caplog.records if "never called" in r.getMessage()]
    assert [line.partition(":")[0] for line in lines] == ["[strategy] Starting"]
