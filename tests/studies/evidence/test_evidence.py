"""`fedsim evidence`: its page holds what the runs say, and its files are checked first."""

import json
import math
import re

import pytest
from scipy import stats
from typer.testing import CliRunner

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines, read_json
from fedsim.cli import app
from fedsim.studies.comparison.intervals import Paired
from fedsim.studies.evidence.evidence import judged
from fedsim.studies.evidence.kinds import read_study, shipped
from fedsim.studies.evidence.study_file import find
from tests.studies.worlds import write

STUDY = """
title = "Half a step"
paper = "nobody"
claim = "half a step is as good as a whole one."
scenario = "tiny.toml"
seeds = 2
broken_off = 0.25

[[arms]]
name = "a whole step"
role = "baseline"

[[arms]]
name = "half a step"
role = "method"
set = ["strategy.server_lr=0.5"]

[[arms]]
name = "far too large"
role = "control"
set = ["client.local_lr=1e38"]

[[settings]]
title = "tiny"

[[settings]]
title = "two of them"
arms = ["a whole step"]
set = ["rounds=4"]
best = true

[[settings]]
title = "nothing is learned"
set = ["client.local_lr=0.0"]
arms = ["a whole step"]
null = true

[tune]
grid = ["client.local_lr=0.01,0.1"]
seeds = 1
"""


def evidence(*arguments):
    return CliRunner().invoke(app, ["evidence", *map(str, arguments)])


def late(folder):
    """The mean over the last tenth of the rounds; of so few, the last value."""
    return JsonLines.read(folder / "metrics.jsonl")[-1]["test/accuracy"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "half.toml").write_text(STUDY)
    return tmp_path / "half.toml"


def test_the_page_holds_what_the_runs_say(study, tmp_path):
    asked = [study, "--workers", "1", "--out", "out", "--page", "page.md", "--json"]
    ended = evidence(*asked)
    assert ended.exit_code == 0, ended.output
    (found,) = json.loads(ended.stdout)["studies"]

    made = {}
    for folder in (tmp_path / "out/cells").iterdir():
        if (folder / "summary.json").exists():
            table = read_json(folder / "scenario.json")
            key = (table["rounds"], table["strategy"]["server_lr"], table["client"]["local_lr"],
                   table["partition"]["test_fraction"], table["seed"])  # fmt: skip
            made[key] = late(folder)
    half, whole = ([made[5, lr, 0.05, 0.25, seed] for seed in (3, 4)] for lr in (0.5, 1.0))
    equal, short, best, null = found["findings"]
    method, baseline, control = equal["rows"]
    assert [row["role"] for row in equal["rows"]] == ["method", "baseline", "control"]
    assert method["mean"]["mean"] == pytest.approx(math.fsum(half) / 2)
    interval = stats.ttest_rel(half, whole).confidence_interval(0.95)
    assert baseline["minus"]["low"] == pytest.approx(interval.low)
    assert baseline["minus"]["high"] == pytest.approx(interval.high)
    # runs that broke off count as the study says
    assert control["broken_off"] == 2
    assert control["mean"]["mean"] == 0.25
    assert control["minus"]["mean"] == pytest.approx(math.fsum(half) / 2 - 0.25)

    # at its best step, each arm ran with what validation chose
    assert not short["best"]
    assert best["best"]
    for row, server_lr in zip(best["rows"], (0.5, 1.0), strict=True):
        (step,) = row["step"]
        chosen = float(step.partition("=")[2])
        values = [made[4, server_lr, chosen, 0.25, seed] for seed in (3, 4)]
        assert row["mean"]["mean"] == pytest.approx(math.fsum(values) / 2)
    assert null["rows"][1]["verdict"] == "passes"  # not a bit differs

    page = (tmp_path / "page.md").read_text()
    text = f"{100 * baseline['minus']['mean']:+.2f} [{100 * baseline['minus']['low']:+.2f}, "
    assert text in page
    assert f"<!-- half {read_study(study).sha256[:16]} -->" in page
    assert "half a step is as good as a whole one." in page

    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("cells/*/summary.json")}
    assert evidence(*asked).exit_code == 0
    assert (tmp_path / "page.md").read_text() == page
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("claim =", "claims =", "'claims' is not a key here; did you mean 'claim'?"),
        ('role = "control"', 'role = "contol"', "did you mean 'control'?"),
        ('role = "control"', 'role = "method"', "one must be the 'method'"),
        ('arms = ["a whole step"]', 'arms = ["a hole step"]', "did you mean 'a whole step'?"),
        ("server_lr=0.5", "server_lrr=0.5", "did you mean 'server_lr'?"),
        ("local_lr=0.01,0.1", "local_lr=0.01,-1", "local_lr = -1.0"),
        ("seeds = 1", 'metric = "test/accuracy"', "tuning must not see"),
        ("broken_off = 0.25", "", "'broken_off' is missing"),
        ("two of them", "tiny", "settings: a title is there twice"),
        ("server_lr=0.5", "server_lr=1.0", "are the same scenario"),
        (
            "client.local_lr=0.01",
            "strategy.server_lr=0.01",
            "half a step: set strategy.server_lr=0.5: is replaced by [tune] grid",
        ),
        ('title = "Half', 'kind = "clam"\ntitle = "Half', "did you mean 'claim'?"),
        ("[tune]", "[tuning]", "'tuning' is not a key here; did you mean 'tune'?"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(was, now, said, study):
    assert was in STUDY
    study.write_text(STUDY.replace(was, now))
    ended = evidence(study, "--out", "out")
    assert ended.exit_code == 2, ended.output
    assert said in ended.output
    assert not (study.parent / "out").exists()


def test_a_study_is_named_once(study):
    ended = evidence(study, study, "--out", "out")
    assert ended.exit_code == 2, ended.output
    assert "is there twice" in ended.output


def test_verdicts_follow_the_interval():
    assert judged(Paired(10, 0.02, 0.01, 0.03, 0.01, 9)) == "better"
    assert judged(Paired(10, 0.02, 0.01, 0.03, 0.01, 9), less=True) == "worse"
    assert judged(Paired(10, -0.02, -0.03, -0.01, 0.01, 1)) == "worse"
    assert judged(Paired(10, 0.02, -0.01, 0.05, 0.2, 6)) == "no difference shown"
    assert judged(Paired(2, 0.02, math.nan, math.nan, 0.5, 2)) == "no difference shown"
    for low, high, passes in ((-0.002, 0.003, True), (-0.011, 0.003, False), (0.001, 0.003, False)):
        expected = "passes" if passes else "fails"
        assert judged(Paired(10, (low + high) / 2, low, high, 1, 5), null=True) == expected


@pytest.fixture(scope="module")
def known():
    """The studies that come with fedsim, by name, each read as it is before it runs."""
    return {name: read_study(path) for name, path in shipped("claim").items()}


def test_the_studies_that_come_with_fedsim_can_be_run(known):
    assert len(known) == 16
    with pytest.raises(ScenarioError, match="did you mean 'fedau'"):
        find("fedua")


def test_the_page_is_of_the_studies_as_they_are(known, request):
    page = (request.config.rootpath / "docs/evidence.md").read_text(encoding="utf-8")
    stamps = dict(re.findall(r"<!-- (\w+) (\w+) -->", page))
    assert stamps == {name: study.sha256[:16] for name, study in known.items()}


def test_a_scenario_is_told_apart_from_a_study(study):
    (scenario,) = [file for file in study.parent.glob("*.toml") if file != study]
    ended = evidence(str(scenario))
    assert ended.exit_code == 2
    assert "is a scenario, not a study" in ended.output
    assert len(ended.output.strip().splitlines()) == 1
