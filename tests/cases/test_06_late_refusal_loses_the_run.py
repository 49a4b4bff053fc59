"""What a checkpoint cannot hold costs the resume and not the run, and is said when it is there."""

import json
import logging

import pytest
from flwr.serverapp.strategy import FedAvg

import fedsim
from fedsim.runs.checkpoint import latest
from fedsim.strategy.foreign import dump_attributes, load_attributes
from tests.cases import worlds


def test_losses_by_node_and_pairs_of_the_history_are_kept(tmp_path):
    described = worlds.scenario(
        "tests.cases.rememberers:Remembers", rounds=3, checkpoint={"every": 10}
    )
    result = fedsim.start(described, out=tmp_path / "run")
    assert (result.folder / "params.safetensors").is_file()
    assert latest(result.folder / "checkpoints").name == "round_000003.safetensors"
    from tests.cases.rememberers import Remembers

    strategy = Remembers()
    strategy.loss_of = {2: 0.5, 2**63: 0.25}
    strategy.history = [(1, 0.5), (2, 0.25)]
    fresh = Remembers()
    load_attributes(fresh, dump_attributes(strategy))
    assert fresh.loss_of == strategy.loss_of
    assert fresh.history == strategy.history


def test_what_cannot_be_kept_is_said_before_round_1_and_once(tmp_path, caplog):
    described = worlds.scenario(
        "tests.cases.rememberers:Streaming", rounds=3, checkpoint={"every": 1}
    )
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.start(described, out=tmp_path / "run")
    said = [r.getMessage() for r in caplog.records if "checkpoint cannot hold" in r.getMessage()]
    assert len(said) == 1
    assert "Streaming remembers a generator in 'stream'" in said[0]
    assert "state_dict() and load_state_dict(state)" in said[0]
    assert "`fedsim resume` would begin again after round 0" in said[0]
    assert json.loads((result.folder / "summary.json").read_text())["rounds"] == 3
    assert (result.folder / "params.safetensors").is_file()


def test_a_resume_of_such_a_run_is_the_run_from_where_it_could_still_be_held(tmp_path):
    described = worlds.scenario(
        "tests.cases.rememberers:Streaming", rounds=3, checkpoint={"every": 1}
    )
    whole, again = worlds.both(described, tmp_path, 3)
    assert whole == again


@pytest.mark.parametrize("every", [1, 10])
def test_what_comes_later_is_said_in_its_round_and_older_checkpoints_stay(tmp_path, caplog, every):
    described = worlds.scenario(
        "tests.cases.rememberers:StreamingLater", rounds=4, checkpoint={"every": every}
    )
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.start(described, out=tmp_path / "run")
    said = [r.getMessage() for r in caplog.records if "checkpoint cannot hold" in r.getMessage()]
    assert len(said) == 1
    kept = 2 if every == 1 else 0
    assert f"would begin again after round {kept}" in said[0]
    assert latest(result.folder / "checkpoints").name == f"round_{kept:06d}.safetensors"
    assert (result.folder / "params.safetensors").is_file()


class Raising(FedAvg):
    """Its `state_dict` fails from round 3 on, each time with another text."""

    turn = 0

    def aggregate_train(self, server_round, replies):
        self.turn = server_round
        return super().aggregate_train(server_round, replies)

    def state_dict(self):
        if self.turn >= 3:
            raise KeyError(f"velocity {self.turn}")
        return {"turn": self.turn}

    def load_state_dict(self, state):
        self.turn = state["turn"]


class RaisingPart(FedAvg):
    """Holds an object whose `state_dict` fails, from round 3 on."""

    def aggregate_train(self, server_round, replies):
        if server_round == 3:
            self.part = Raising()
            self.part.turn = 3
        return super().aggregate_train(server_round, replies)


class Deep(FedAvg):
    """A list in a list, 5000 times, from round 3 on."""

    def aggregate_train(self, server_round, replies):
        self.chain = None
        for _ in range(5_000 if server_round >= 3 else 5):
            self.chain = [self.chain]
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Raising", "a Raising whose state_dict() failed with KeyError: 'velocity 3', so that"),
        ("RaisingPart", "state_dict() failed with KeyError: 'velocity 3' in 'part', which"),
        ("Deep", "objects that refer to one another too deeply in 'chain[0]"),
    ],
)
def test_what_fails_as_it_is_held_costs_the_resume_alone(name, what, tmp_path, caplog):
    described = worlds.scenario(
        f"tests.cases.test_06_late_refusal_loses_the_run:{name}",
        rounds=4,
        checkpoint={"every": 1},
    )
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.start(described, out=tmp_path / "run")
    (said,) = [r.getMessage() for r in caplog.records if "[strategy]" in r.getMessage()]
    assert what in said
    assert "would begin again after round 2" in said
    assert (result.folder / "params.safetensors").is_file()
    assert latest(result.folder / "checkpoints").name == "round_000002.safetensors"
