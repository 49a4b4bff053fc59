"""`fedsim check` and `fedsim golden`, on scenarios of a project of its own."""

import contextlib
import json
import sys

import pytest
from typer.testing import CliRunner

from fedsim.basics import kernels_in_use
from fedsim.cli import app
from fedsim.cli import check_study as check
from fedsim.studies.cells.pool import Pool
from fedsim.studies.golden.measure import Measurer
from fedsim.studies.golden.recording import place_of, read

STRATEGY = """
from pathlib import Path

from strategies.fedavg import FedAvg

FACTOR = Path(__file__).with_suffix(".factor")


class Mine(FedAvg):
    def apply(self, state, params, weighted_sum, weight_sum):
        moved, state, metrics = super().apply(state, params, weighted_sum, weight_sum)
        factor = float(FACTOR.read_text()) if FACTOR.exists() else 1.0
        return params + factor * (moved - params), state, metrics
"""
SCENARIO = """
rounds = 4
[task]
model = "logistic"
[data]
name = "digits"
test_fraction = 0.8
[partition]
kind = "dirichlet"
clients = 6
alpha = 0.5
[participation]
kind = "uniform"
cohort_size = 3
[strategy]
name = "{module}:Mine"
[client]
local_lr = 0.1
[expect]
"test/accuracy" = {{ min = 0.2 }}
"""


MODULE = "mine_checked"


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder of modules, and processes that know it and run the scenarios of all tests here."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / f"{MODULE}.py").write_text(STRATEGY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        with Measurer(workers=1) as shared:
            patch.setattr(check, "Measurer", lambda: contextlib.nullcontext(shared))
            yield folder
    sys.modules.pop(MODULE, None)


@pytest.fixture
def project(modules, tmp_path, monkeypatch):
    """A folder with a scenario that names a strategy of its own."""
    (tmp_path / "mine.toml").write_text(SCENARIO.format(module=MODULE))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    (modules / f"{MODULE}.factor").unlink(missing_ok=True)


@pytest.fixture
def step_by(modules):
    """Lets the strategy drift: its step is so many times as long."""
    return lambda factor: (modules / f"{MODULE}.factor").write_text(repr(factor))


def fedsim(*arguments):
    ended = CliRunner().invoke(app, [str(a) for a in arguments])
    return ended.exit_code, ended.output


def record(why="first"):
    code, said = fedsim("golden", "--update", "mine.toml", "--why", why)
    assert code == 0, said
    return said


def test_what_is_recorded_holds_until_the_code_drifts(project, step_by):
    assert "recorded in golden/mine.json" in record()
    code, said = fedsim("check", "mine.toml")
    assert code == 0, said
    assert said.splitlines()[-1].split()[:6] == ["mine", "1", "of", "1", "same", "same"]
    step_by(1 + 1e-6)
    code, said = fedsim("check", "mine.toml")
    assert code == 3
    assert "mine: test/loss parts in round 1: recorded " in said
    assert "(tolerance " in said
    assert 'mine: if that is meant: fedsim golden --update mine.toml --why "..."' in said
    # too little for a metric in float64, and seen in the bits of the model
    step_by(1 + 1e-12)
    code, said = fedsim("check", "mine.toml")
    assert code == 3
    assert "parts in round" not in said
    assert "mine: trace.params_sha256: recorded" in said


def test_a_recording_moves_with_a_reason_alone(project, step_by):
    for arguments in (["--update"], ["--update", "--why", "  "]):
        code, said = fedsim("golden", "mine.toml", *arguments)
        assert code == 2
        assert "say why the recording moves" in said
    assert not place_of(project / "mine.toml").exists()
    record("first")
    assert "nothing to update" in record("again")
    step_by(0.9)
    assert "test/loss parts in round 1" in record("the step is shorter")
    found = read(place_of(project / "mine.toml"))
    assert [each["why"] for each in found.history] == ["first", "the step is shorter"]
    assert fedsim("check", "mine.toml")[0] == 0
    code, said = fedsim("golden", "mine.toml")
    assert "the step is shorter" in said


def test_claims_are_held_and_a_broken_one_is_not_recorded(project):
    file = project / "mine.toml"
    file.write_text(file.read_text().replace("min = 0.2", "min = 0.999"))
    code, said = fedsim("check", "mine.toml", "--json")
    document = json.loads(said[said.index("{") :])
    assert (code, document["exit_code"], document["checks"][0]["verdict"]) == (3, 3, "BROKEN")
    assert document["checks"][0]["drifts"] is None
    assert "not recorded" in document["checks"][0]["note"]
    code, said = fedsim("golden", "--update", "mine.toml", "--why", "x")
    assert code == 2
    assert "its claim on test/accuracy is broken" in said


def test_an_edited_scenario_says_so_and_a_torn_recording_is_refused(project):
    record()
    file = project / "mine.toml"
    whole = file.read_text()
    file.write_text(whole.replace("local_lr = 0.1", "local_lr = 0.2"))
    code, said = fedsim("check", "mine.toml")
    assert code == 3
    assert "mine: was edited since it was recorded" in said
    file.write_text(whole)
    code, said = fedsim("check", "mine.toml", "--set", "client.local_lr=0.2")
    assert code == 3
    assert "mine: --set makes it another scenario than was recorded" in said
    assert "golden --update" not in said
    file.write_text(f'title = "another"\n{whole}')  # which decides nothing
    assert fedsim("check", "mine.toml")[0] == 0
    place_of(file).write_text("{")
    code, said = fedsim("check", "mine.toml")
    assert code == 2
    assert "golden/mine.json" in said


def test_other_bits_of_another_environment_are_no_drift(project):
    record()
    place = place_of(project / "mine.toml")
    document = json.loads(place.read_text())
    document["environment"]["mkl"] = "2023.1 COMPATIBLE"
    document["params_sha256"] = document["trace"]["params_sha256"] = "0" * 64
    place.write_text(json.dumps(document))
    code, said = fedsim("check", "mine.toml")
    assert code == 0
    assert "mine: hashes of models differ, and may: mkl 2023.1 COMPATIBLE, here 20" in said
    assert "1 of 1  same       others" in said
    assert "nothing drifted; the environment is another" in record("another machine")
    assert [each["why"] for each in read(place).history] == ["first", "another machine"]
    assert "hashes of models" not in fedsim("check", "mine.toml")[1]


def test_folders_are_taken_by_tier_and_one_that_fails_does_not_stop_the_others(project):
    folder = project / "many"
    folder.mkdir()
    text = (project / "mine.toml").read_text()
    (folder / "good.toml").write_text(text)
    (folder / "slow.toml").write_text(f'tier = "slow"\n{text}')
    (folder / "other.toml").write_text("[tool]\nx = 1\n")
    (folder / "bad.toml").write_text(text.replace("local_lr", "local_lrr"))
    code, said = fedsim("check", "many")
    assert code == 2
    assert "good      1 of 1" in said
    assert "did you mean 'local_lr'" in said
    assert "1 scenarios of other tiers left out: --tier all" in said
    (folder / "bad.toml").write_text(text.replace("rounds = 4", "rounds = "))
    (folder / "other.toml").write_text("[tool]\nx =\n")
    code, said = fedsim("check", "many")
    assert code == 2
    assert "bad.toml: invalid TOML" in said
    assert "other" not in said.replace("other tiers", "")
    (folder / "bad.toml").unlink()
    (folder / "good.toml").unlink()
    code, said = fedsim("check", "many")
    assert code == 2
    assert "no scenario of tier fast among 1; say --tier slow" in said
    code, said = fedsim("check", "many", "--tier", "slwo")
    assert code == 2
    assert "did you mean 'slow'" in said
    code, said = fedsim("check", "many", "--data", "nowhere")
    assert (code, said.strip()) == (2, "fedsim: --data nowhere: there is no such folder")


@pytest.mark.parametrize(("dtype", "runs"), [("float32", 2), ("float64", 1)])
def test_a_short_scenario_in_float64_is_run_once(project, monkeypatch, dtype, runs):
    file = project / "mine.toml"
    file.write_text(file.read_text().replace("[task]", f'[task]\ndtype = "{dtype}"'))
    done = []
    run = Pool.run
    monkeypatch.setattr(Pool, "run", lambda pool, cells: done.extend(cells) or run(pool, cells))
    record()
    assert len(done) == runs
    found = read(place_of(file))
    assert found.trace.rounds == [0, 1, 2, 3, 4]
    assert (found.trace.params_sha256 == found.params_sha256) == (runs == 1)


def test_a_recording_holds_portable_bits_whatever_this_process_computes_with(project):
    record()
    found = read(place_of(project / "mine.toml"))
    # a strategy of one's own is code that fedsim cannot pin: what holds, holds on such a processor
    assert found.environment["bits"] == "fast"
    assert found.environment["mkl"].endswith(" COMPATIBLE")
    assert found.environment["aten"] == "AVX2"
    assert found.environment["processor"]
    file = project / "mine.toml"
    file.write_text(SCENARIO.replace("{module}:Mine", "fedavg").format())
    record("without code of its own")
    environment = read(place_of(file)).environment
    assert environment["bits"] == "portable"
    assert not {"processor", "instructions"} & set(environment)
    assert kernels_in_use.in_use()["mkl"].split()[1] != "off"
