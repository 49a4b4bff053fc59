"""What a checkpoint cannot hold costs the resume and not the run, and is said when it is there."""

import json
import logging

import pytest

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
