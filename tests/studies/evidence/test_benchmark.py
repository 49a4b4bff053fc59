"""Benchmarks of `fedsim evidence`: the page holds what the runs say, files are checked first."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from fedsim.basics.json_files import JsonLines, read_json
from fedsim.cli import app, evidence_study
from fedsim.studies.evidence import benchmark
from fedsim.studies.evidence.benchmark import Scores, SettingScores, gather_benchmark
from fedsim.studies.evidence.benchmark_page import benchmark_page
from fedsim.studies.evidence.benchmark_picture import draw_benchmark
from fedsim.studies.evidence.kinds import read_study, shipped
from tests.studies.worlds import InThisProcess, MadeUpRuns, write

STUDY = """
kind = "benchmark"
title = "Two on tiny data"
scenario = "tiny.toml"
set = ["rounds=3"]
baselines = ["FedAvg"]
seeds = 2
broken_off = 0.25

[[arms]]
name = "FedAvg"

[[arms]]
name = "Ditto"
set = ['strategy={name="ditto"}']
metric = "personal/accuracy"
grid = ["strategy.strength=0,0.5"]

[[arms]]
name = "alone"
reference = "local"

[[arms]]
name = "one hand"
reference = "centralised"

[[settings]]
title = "tiny"

[tune]
grid = ["client.local_lr=0.1"]
seeds = 1
"""
ARMS = ("FedAvg", "Ditto", "alone", "one hand")


def evidence(*arguments):
    return CliRunner().invoke(app, ["evidence", *map(str, arguments)])


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "two.toml").write_text(STUDY)
    return tmp_path / "two.toml"


def arm_of(made):
    """Tell by a run's scenario which arm it is of."""
    if made["partition"]["centralised"]:
        return "one hand"
    if made["task"].get("personal") == ["*"]:
        return "alone"
    return "Ditto" if made["strategy"]["name"] == "ditto" else "FedAvg"


def recorded(out):
    """The last record of each run by (arm, seed, strength)."""
    found = {}
    for folder in (out / "cells").iterdir():
        if (folder / "summary.json").exists():
            made = read_json(folder / "scenario.json")
            key = arm_of(made), made["seed"], made.get("strategy", {}).get("strength")
            found[key] = JsonLines.read(folder / "metrics.jsonl")[-1]
    return found


def test_the_page_holds_what_the_runs_say(study, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_study, "Pool", InThisProcess)
    asked = [study, "--out", "out", "--page", "page.md", "--json"]
    ended = evidence(*asked)
    assert ended.exit_code == 0, ended.output
    ((setting,),) = (each["settings"] for each in json.loads(ended.stdout)["studies"])
    rows = {row["arm"]: row for row in setting["rows"]}
    assert tuple(rows) == ARMS
    runs = recorded(tmp_path / "out")

    # the point that is best on seeds apart, by the metric of the arm's own model
    tried = {s: runs["Ditto", 1003, s]["personal/accuracy"] for s in (0.0, 0.5)}
    strength = max(tried, key=lambda s: (tried[s], -s))
    assert f"strategy.strength={strength:g}" in rows["Ditto"]["tuned"]["best"][0]["set"]

    metrics = dict.fromkeys(ARMS, "local/accuracy_mean") | {"Ditto": "personal/accuracy"}
    worst = dict.fromkeys(ARMS, "local/accuracy_worst_decile")
    worst["Ditto"] = "personal/accuracy_worst_decile"
    values = {}
    for arm in ARMS:
        own = strength if arm == "Ditto" else None
        last = [runs[arm, seed, own] for seed in (3, 4)]
        values[arm] = np.array([record[metrics[arm]] for record in last])
        assert rows[arm]["values"] == pytest.approx(values[arm])
        worst_of = [record[worst[arm]] for record in last]
        assert rows[arm]["worst_decile"]["mean"] == pytest.approx(np.mean(worst_of))
        if arm == "alone":
            assert rows[arm]["shared"] is None  # the server has no model
        else:
            shared = [record["test/accuracy"] for record in last]
            assert rows[arm]["shared"]["mean"] == pytest.approx(np.mean(shared))

    own, alone, hand = (values[arm] for arm in ("FedAvg", "alone", "one hand"))
    interval = stats.ttest_rel(alone, own).confidence_interval(0.95)
    assert rows["alone"]["minus"]["FedAvg"]["low"] == pytest.approx(interval.low, nan_ok=True)
    room = (hand - alone).mean()
    gap = (own - alone).mean() / room if room else math.nan
    assert rows["FedAvg"]["gap_closed"]["ratio"] == pytest.approx(gap, nan_ok=True)

    page = (tmp_path / "page.md").read_text()
    assert f"<!-- two {read_study(study).sha256[:16]} -->" in page
    assert f"| *alone* | {100 * alone.mean():.2f} [" in page
    assert "![" in page
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")

    # the same command again runs nothing and says the same
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("cells/*/summary.json")}
    assert evidence(*asked).exit_code == 0
    assert (tmp_path / "page.md").read_text() == page
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ('kind = "benchmark"', 'kind = "benchmrk"', "did you mean 'benchmark'?"),
        ("baselines =", "baseline =", "'baseline' is not a key here; did you mean 'baselines'?"),
        ('["FedAvg"]', '["FedAgv"]', "did you mean 'FedAvg'?"),
        ('["FedAvg"]', '["alone"]', "'alone' is not a federated arm"),
        ('["FedAvg"]', '["FedAvg", "FedAvg"]', "baselines: a name is there twice"),
        ('reference = "local"', 'reference = "locl"', "did you mean 'local'?"),
        ('reference = "centralised"', 'reference = "local"', "'local' is there twice"),
        ('name = "Ditto"', 'name = "FedAvg"', "arms: a name is there twice"),
        ("strategy.strength=0", "strategy.strenght=0", "did you mean 'strength'?"),
        ("strategy.strength=0", "client.local_lr=0", "Ditto: grid client.local_lr: is there twice"),
        ("strength=0,0.5", "strength=0,-0.5", "strength = -0.5"),
        ('"personal/accuracy"', '"test/accuracy"', "local/accuracy_mean or personal/accuracy"),
        ('"personal/accuracy"', '"personl/accuracy"', "did you mean 'personal/accuracy'?"),
        ('grid = ["strategy.strength=0,0.5"]', '[[arms]]\nname = "again"', "are the same scenario"),
        ('ditto"}\']', 'ditto"}\', "client.local_lr=1"]',
         "Ditto: set client.local_lr=1: is replaced by grid client.local_lr"),
        ("broken_off = 0.25", "", "'broken_off' is missing"),
        ('title = "tiny"', "", "'settings.0.title' is missing"),
        ("[tune]", "[tuning]", "'tuning' is not a key here; did you mean 'tune'?"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_before_anything_runs(was, now, said, study):
    assert was in STUDY
    study.write_text(STUDY.replace(was, now))
    ended = evidence(study, "--out", "out")
    assert ended.exit_code == 2, ended.output
    assert said in ended.output
    assert not (study.parent / "out").exists()


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("set = [\"task.personal=['outptu']\"]", "tiny: FedAvg: [task] personal"),
        ('metric = "local/acuracy_mean"', "did you mean 'local/accuracy_mean'"),
    ],
)
def test_what_only_the_data_or_the_model_tell_is_refused_before_the_first_run(arm, said, study):
    study.write_text(STUDY.replace('name = "FedAvg"', f'name = "FedAvg"\n{arm}'))
    ended = evidence(study, "--out", "out", "--workers", "1")
    assert ended.exit_code == 2, ended.output
    assert said in ended.output
    assert not list((study.parent / "out/cells").iterdir())


def test_kinds_do_not_mix(study, tmp_path):
    ended = evidence(study, "fedau", "--out", "out")
    assert ended.exit_code == 2
    assert "two.toml a benchmark: a page holds one kind of studies" in ended.output
    ended = evidence(study, "--kind", "benchmark", "--out", "out")
    assert "where none is named" in ended.output
    ended = evidence("--kind", "benchmrak", "--out", "out")
    assert "did you mean 'benchmark'?" in ended.output
    assert not (tmp_path / "out").exists()


def of_seeds(study, **clients):
    """Return the scores of a setting by each arm's values over seeds."""
    declared = read_study(study)
    scores = [Scores(v, v, None if arm == "alone" else v, 0, 0) for arm, v in clients.items()]
    return SettingScores(declared, declared.document.settings[0], scores, [], 3)


def test_bold_is_the_best_with_all_that_do_not_differ_from_it(study):
    apart = of_seeds(
        study,
        FedAvg=[0.5, 0.45, 0.62],
        Ditto=[0.8, 0.7, 0.9],
        alone=[0.9, 0.9, 0.9],
        one_hand=[0.95, 0.9, 0.95],
    )
    assert apart.best(lambda s: s.clients) == {1}  # the references are no federated arms
    assert apart.best(lambda s: s.shared) == {1}
    assert apart.best(lambda s: None) == set()
    # FedAvg - alone = -0.4, -0.45, -0.28: half an interval is 0.217
    assert apart.better(0, 2) is False
    assert apart.better(2, 0) is True
    assert apart.gap_closed(0).ratio == pytest.approx(-1.13 / 0.1)
    # 0.01, -0.04, 0: half an interval is 0.066
    alike = of_seeds(
        study, FedAvg=[0.81, 0.66, 0.9], Ditto=[0.8, 0.7, 0.9], alone=[0.1] * 3, one_hand=[1.0] * 3
    )
    assert alike.best(lambda s: s.clients) == {0, 1}
    assert alike.better(0, 1) is None
    assert alike.same(0) == set()
    off = of_seeds(
        study, FedAvg=[0.5, 0.75], Ditto=[0.5, 0.75], alone=[0.1] * 2, one_hand=[1.0] * 2
    )
    assert off.same(0) == {1}


def test_what_broke_off_or_never_trained_is_counted_and_said(study, tmp_path):
    def record(made):
        if made["strategy"]["name"] == "ditto" and made["seed"] == 4:
            return None
        found = {"local/accuracy_mean": 0.5, "local/accuracy_worst_decile": 0.4}
        own = {"personal/accuracy": 0.75, "personal/accuracy_worst_decile": 0.5}
        return {**found, **own, "personal/clients_untrained": float(made["seed"] == 3)}

    declared, pool = read_study(study), MadeUpRuns(record)
    found = gather_benchmark(declared, tmp_path, pool=pool, expect=lambda missing, there: None)
    (setting,) = found.settings
    assert setting.scores[1] == Scores([0.75, 0.25], [0.5, 0.25], None, 1, 1)
    assert setting.scores[0] == Scores([0.5, 0.5], [0.4, 0.4], None, 0, 0)  # judged by all clients
    page = benchmark_page([found], "a version", {})
    assert "Ditto: 1 of the runs broke off." in page
    assert "Ditto: in 1 of the runs some client had never trained and is left out" in page
    assert "FedAvg: " not in page.partition("### Chosen settings")[2]
    assert "- Against FedAvg. Not told apart: Ditto." in page
    assert "- Against alone. Not told apart: Ditto. The same in every seed: FedAvg." in page
    assert "| FedAvg |  | 1 the same in every seed |" in page
    assert "| Ditto | 1 not told apart | 1 not told apart |" in page


def test_the_page_says_which_best_still_lies_on_an_edge(study, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "WIDENINGS", 1)
    study.write_text(STUDY.replace("local_lr=0.1", "local_lr=0.1,0.2"))
    pool = MadeUpRuns(lambda made: {"local/accuracy_mean": 1 - 1 / (1 + made["client"]["local_lr"]),
                                    "personal/accuracy": 0.5})  # fmt: skip
    declared = read_study(study)
    found = gather_benchmark(declared, tmp_path, pool=pool, expect=lambda missing, there: None)
    page = benchmark_page([found], "a version", {})
    assert "FedAvg: the best `client.local_lr` lies on the edge of what was tried." in page
    assert "worst tenth of the clients" not in page  # which no run has measured
    draw_benchmark(found, tmp_path / "drawn.png")


def test_the_benchmarks_of_fedsim_can_be_run_and_the_page_is_of_them(request):
    page = (request.config.rootpath / "docs/methods.md").read_text(encoding="utf-8")
    stamps = dict(re.findall(r"<!-- (\w+) (\w+) -->", page))
    found = {name: read_study(path).sha256[:16] for name, path in shipped("benchmark").items()}
    assert stamps == found
    assert "lies on the edge" not in page
    for picture in re.findall(r"\]\(([^)]*\.png)\)", page):
        assert (request.config.rootpath / "docs" / picture).is_file()
