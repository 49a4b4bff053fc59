"""Whatever of a user's strategy differs after a round is state and comes back on a resume."""

import contextlib
import json
import logging
import re
import sysconfig
import threading

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

import fedsim
from fedsim.basics.errors import CheckpointError
from fedsim.basics.json_files import JsonLines
from fedsim.runs.checkpoint import latest
from fedsim.strategy.foreign import dump_attributes, load_attributes
from fedsim.strategy.held.strategies import StrategyMemory, try_out
from tests.cases import elsewhere, rememberers, worlds
from tests.tiers import by_turns

SHORT = {"rounds": 4, "checkpoint": {"every": 1}}


def untimed(folder):
    records = JsonLines.read(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def test_a_helper_s_velocity_survives_a_power_cut(tmp_path):
    described = worlds.scenario("tests.cases.rememberers:Helper", **SHORT)
    whole, again = worlds.both(described, tmp_path)
    assert whole == again
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "LateHelper", "Noisy", "Window", "Decaying", "TorchMomentum", "Enclosed", "Saying",
        "SayingAll", "Remembers", "OurOwn",
    ],
)  # fmt: skip
def test_each_way_of_remembering_survives_a_power_cut(name, tmp_path):
    described = worlds.scenario(f"tests.cases.rememberers:{name}")
    rememberers.Enclosed.counted[:] = [0]  # as a new process would have it
    whole = fedsim.start(described, out=tmp_path / "whole")
    rememberers.Enclosed.counted[:] = [0]
    again = worlds.broken_and_resumed(described, tmp_path / "broken", 4)
    assert whole.summary["params_sha256"] == again.summary["params_sha256"]


class Holder(FedAvg):
    """Holds whatever is put into it after it was made."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.rule = lambda value: value * self.factor
        self.factor = 1.0


def back(strategy):
    """A new strategy of the same class with what a checkpoint holds of this one."""
    fresh = type(strategy)()
    load_attributes(fresh, dump_attributes(strategy))
    return fresh


def test_what_two_attributes_share_they_share_again():
    strategy = Holder()
    strategy.list = strategy.same = [np.ones(2), torch.zeros(2)]
    strategy.flat = np.arange(6.0)
    strategy.parts = [strategy.flat[:2], strategy.flat[2:].reshape(2, 2)]
    strategy.layer = torch.nn.Linear(2, 2)
    strategy.row = strategy.layer.weight.detach()[0]
    strategy.itself = [strategy]
    fresh = back(strategy)
    assert fresh.same is fresh.list
    fresh.flat[3] = 70.0
    assert fresh.parts[1][0, 1] == 70.0
    fresh.row[0] = 5.0
    assert fresh.layer.weight[0, 0].item() == 5.0
    assert fresh.itself[0] is fresh


def test_layout_and_kind_of_numbers_are_kept():
    strategy = Holder()
    strategy.fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    strategy.small = np.float16(0.5)
    strategy.words = np.array(["a", "bc"])
    strategy.complex = torch.ones(2, dtype=torch.complex64)
    strategy.images = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    fresh = back(strategy)
    assert fresh.fortran.flags.f_contiguous
    assert not fresh.fortran.flags.c_contiguous
    assert type(fresh.small) is np.float16
    assert fresh.words.tolist() == ["a", "bc"]
    assert torch.equal(fresh.complex, strategy.complex)
    assert fresh.images.stride() == strategy.images.stride()


def test_a_function_that_sees_the_strategy_sees_the_one_that_came_back():
    strategy = Holder()
    strategy.factor = 3.0
    fresh = back(strategy)
    assert fresh.rule(2.0) == 6.0


@pytest.mark.slow  # torch imports its compiler at the first optimiser
def test_an_optimizer_made_in_a_round_goes_on_with_the_strategy_s_own_parameters():
    strategy = Holder()
    strategy.params = [torch.nn.Parameter(torch.ones(2))]
    strategy.optimizer = torch.optim.SGD(strategy.params, lr=0.1, momentum=0.9)
    for each in (strategy, fresh := _stepped(strategy)):
        each.params[0].grad = torch.ones(2)
        each.optimizer.step()
    assert torch.equal(fresh.params[0], strategy.params[0])
    assert fresh.params[0][0].item() == pytest.approx(1 - 0.1 - 0.19)


def _stepped(strategy):
    strategy.params[0].grad = torch.ones(2)
    strategy.optimizer.step()
    return back(strategy)


def test_a_function_that_took_another_s_place_is_named():
    strategy = Holder()
    memory = StrategyMemory(strategy)
    assert not memory.hold().unheld
    strategy.rule = lambda value: value + 1
    (unheld,) = memory.hold().unheld
    assert unheld.path == "rule"
    assert "which has changed since round 0" in unheld.what


class Fixed(FedAvg):
    """Says that it keeps something, and forgets the half of it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = 1, 2

    def state_dict(self):
        return {"one": self.one, "two": self.two}

    def load_state_dict(self, state):
        self.one = state["one"]


def test_what_comes_back_otherwise_is_found_by_trying():
    strategy = Fixed()
    memory = StrategyMemory(strategy)
    assert try_out(memory, Fixed()) is None
    strategy.two = 3
    assert "comes back otherwise" in try_out(memory, Fixed())


@pytest.mark.parametrize("value", [(i for i in range(3)), iter([1]), memoryview(b"x")])
def test_what_has_no_form_is_refused_by_its_name(value):
    strategy = Holder()
    strategy.memory = {"deep": [value]}
    with pytest.raises(CheckpointError, match=r"'memory\['deep'\]\[0\]'"):
        dump_attributes(strategy)


def test_a_checkpoint_makes_no_object_of_a_class_that_the_strategy_does_not_know():
    strategy = Holder()
    graph = json.loads(dump_attributes(strategy)["held:graph"])
    graph["nodes"].append(["object", "tempfile:TemporaryDirectory", [], []])
    graph["root"]["attributes"].append(["planted", {"@": len(graph["nodes"]) - 1}])
    with pytest.raises(CheckpointError, match="a TemporaryDirectory"):
        load_attributes(Holder(), {**dump_attributes(strategy), "held:graph": json.dumps(graph)})


class LateTwoFaced(rememberers.Moving):
    """From its second round on it holds a helper that forgets the half of what it says."""

    helper = None

    def moved(self, old, new):
        self.rounds = getattr(self, "rounds", 0) + 1
        if self.rounds == 2:
            self.helper = TwoFaced()
        return new


class TwoFaced:
    def __init__(self):
        self.kept = 0

    def state_dict(self):
        self.kept += 1
        return {"kept": self.kept}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("every", [1, 3])
def test_what_is_new_is_tried_before_it_is_relied_on(every, tmp_path, caplog):
    described = worlds.scenario(
        "tests.cases.test_05_resume_forgets_an_object:LateTwoFaced",
        rounds=3,
        checkpoint={"every": every},
    )
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.start(described, out=tmp_path / "run")
    (said,) = [r.getMessage() for r in caplog.records if "[strategy]" in r.getMessage()]
    kept = 1 if every == 1 else 0
    assert "was restored from a checkpoint to try it, and" in said
    assert f"would begin again after round {kept};" in said
    assert latest(result.folder / "checkpoints").name == f"round_{kept:06d}.safetensors"


def test_a_strategy_s_own_draws_when_it_is_made_are_the_seed_s(tmp_path):
    described = worlds.scenario("tests.cases.test_05_resume_forgets_an_object:Drawn", rounds=1)
    found = [fedsim.start(described, out=tmp_path / str(n)).summary for n in range(2)]
    assert found[0]["params_sha256"] == found[1]["params_sha256"]


class Drawn(rememberers.Moving):
    def __init__(self):
        super().__init__()
        self.share = np.random.random() + float(torch.rand(1))  # noqa: NPY002 - as users do

    def moved(self, old, new):
        return [n * self.share for n in new]


def test_a_strategy_of_an_installed_package_is_the_user_s_too(tmp_path, monkeypatch):
    place = tmp_path / "installed"
    place.mkdir()
    (place / "installed_strategy.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Helper:\n    pass\n"
        "class Late(FedAvg):\n    helper = None\n"
    )
    monkeypatch.syspath_prepend(str(place))
    paths = {**sysconfig.get_paths(), "purelib": str(place)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: paths)
    from installed_strategy import Helper, Late

    strategy = Late()
    strategy.helper = Helper()
    strategy.helper.value = 3
    assert StrategyMemory(strategy).is_users
    assert back(strategy).helper.value == 3


@pytest.mark.parametrize(
    "name",
    by_turns([
        "OtherModule", "ImportedLate", "ByFunction", "ByAttribute", "SharedList", "MutableDefault",
        "OtherClass", "ClassMethod", "FunctionAttribute", "BySingleton", "Slots", "Decorated",
        "CallableObject",
    ]),
)  # fmt: skip
def test_what_a_strategy_keeps_outside_of_itself_survives_a_power_cut(name, tmp_path, caplog):
    described = worlds.scenario(f"tests.cases.elsewhere:{name}", **SHORT)
    elsewhere.as_a_new_process()
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        whole = fedsim.start(described, out=tmp_path / "whole")
    assert not [r for r in caplog.records if "[strategy]" in r.getMessage()]
    elsewhere.as_a_new_process()
    with contextlib.suppress(worlds.PowerCut), worlds.power_cut(3):
        fedsim.start(described, out=tmp_path / "broken")
    elsewhere.as_a_new_process()
    again = fedsim.resume(tmp_path / "broken")
    assert whole.summary["params_sha256"] == again.summary["params_sha256"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Cached", "uses the lru_cache of tests.cases.elsewhere.Cached.first, which a checkpoint"),
        ("Database", "uses tests.cases.elsewhere.TABLE (a Connection), which a checkpoint"),
        ("Streaming", "remembers a generator in 'module tests.cases.elsewhere STREAM'"),
    ],
)
def test_what_cannot_be_held_outside_of_a_strategy_is_named_before_round_1(
    name, what, tmp_path, caplog
):
    described = worlds.scenario(f"tests.cases.elsewhere:{name}", **SHORT)
    caplog.set_level(logging.WARNING, logger="fedsim")
    with pytest.raises(worlds.PowerCut), worlds.power_cut(1):
        fedsim.start(described, out=tmp_path / "run")
    (said,) = [r.getMessage() for r in caplog.records if "[strategy]" in r.getMessage()]
    assert what in said
    assert "state_dict() and load_state_dict(state)" in said


@pytest.mark.parametrize(
    ("name", "saved"),
    [("CachedList", [0]), ("CachedResults", [0, 1, 2]), ("CachedBefore", [0, 1, 2])],
)
def test_what_a_cache_remembers_is_lost_to_no_resume(name, saved, tmp_path, caplog):
    """No checkpoint is written that lacks it; a strategy that says what it keeps has them all."""
    described = worlds.scenario(f"tests.cases.elsewhere:{name}", **SHORT)
    elsewhere.as_a_new_process()
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        whole = fedsim.start(described, out=tmp_path / "whole")
    said = [r.getMessage() for r in caplog.records if "[strategy]" in r.getMessage()]
    assert len(said) == (name != "CachedResults")
    assert all("none is written once a round has called it" in each for each in said)
    elsewhere.as_a_new_process()
    with contextlib.suppress(worlds.PowerCut), worlds.power_cut(3):
        fedsim.start(described, out=tmp_path / "broken")
    files = (tmp_path / "broken" / "checkpoints").iterdir()
    assert sorted(int(re.search(r"\d+", file.name)[0]) for file in files)[-1] == saved[-1]
    elsewhere.as_a_new_process()
    again = fedsim.resume(tmp_path / "broken")
    assert whole.summary["params_sha256"] == again.summary["params_sha256"]
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "broken")
