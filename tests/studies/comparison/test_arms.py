"""`fedsim compare --arm`: reference arms in tables, files and a study that is gone on with."""

import csv
import json

import pytest
from typer.testing import CliRunner

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import read_json
from fedsim.cli import app
from fedsim.studies.cells.arms import ARM_AXIS, references, with_arms
from fedsim.studies.cells.variants import of_scenarios, parse_axis
from fedsim.studies.comparison.intervals import paired_ratio

SCENARIO = """
seed = 3
rounds = 4
[task]
model = "logistic"
[data]
name = "digits"
[partition]
kind = "dirichlet"
alpha = 0.3
min_size = 10
clients = 6
test_fraction = 0.2
[participation]
kind = "full"
[client]
local_lr = 0.1
[evaluation]
clients = 6
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(SCENARIO)
    return str(path)


def fedsim(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_arms_that_variants_share_are_run_once(file):
    axes = [parse_axis("strategy.name=fedavg,fedau"), parse_axis("partition.alpha=0.3,1")]
    variants = with_arms(of_scenarios([file], axes, []), ["local", "centralised"])
    labels = [dict(variant.labels) for variant in variants]
    strategies = [(s, a) for s in ("fedavg", "fedau") for a in ("0.3", "1")]
    assert labels == [
        *({"strategy.name": s, "partition.alpha": a, ARM_AXIS: "federated"} for s, a in strategies),
        *({"partition.alpha": a, ARM_AXIS: "local"} for a in ("0.3", "1")),
        *({"partition.alpha": a, ARM_AXIS: "centralised"} for a in ("0.3", "1")),
    ]
    assert references(variants) == {0: (4, 6), 1: (5, 7), 2: (4, 6), 3: (5, 7)}


def test_one_arm_closes_no_gap_and_two_of_one_name_are_refused(file):
    variants = of_scenarios([file], [], [])
    assert references(with_arms(variants, ["centralised"])) == {}
    assert with_arms(variants, []) == variants
    with pytest.raises(ScenarioError, match="--arm local: is there twice"):
        with_arms(variants, ["local", "local"])


@pytest.mark.slow
def test_the_gap_closed_is_in_the_tables_and_in_the_files(file, tmp_path):
    arms = ("--arm", "centralised", "--arm", "local")
    done = fedsim("compare", file, *arms, "--seeds", 3, "--quiet", "--json", "--out", "study")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["metric"] == "local/accuracy_mean"
    values = {each["arm"]: [r["value"] for r in each["runs"]] for each in found["variants"]}
    assert list(values) == ["federated", "centralised", "local"]
    own, high, low = values.values()
    gained = [a - b for a, b in zip(own, low, strict=True)]
    room = [a - b for a, b in zip(high, low, strict=True)]
    [gap] = found["gaps"]
    expected = paired_ratio(gained, room)
    assert gap["name"] == "arm=federated"
    assert gap["ratio"] == pytest.approx(expected.ratio, rel=1e-12)
    assert {d["name"]: d["minus"] for d in found["differences"]} == {
        "arm=centralised": "arm=federated",
        "arm=local": "arm=federated",
    }
    with (tmp_path / "study" / "compare.csv").open() as rows:
        first = next(csv.DictReader(rows))
    assert float(first["gap_closed_mean"]) == pytest.approx(expected.ratio, rel=1e-12)
    again = fedsim("compare", "study", "--quiet")
    assert again.exit_code == 0, again.output
    assert "gap closed: (federated - local) / (centralised - local)" in again.stdout
    assert read_json(tmp_path / "study" / "compare.json")["gaps"] == [gap]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arm", "centralized"), "did you mean 'centralised'?"),
        (("--arm", "local", "--metric", "test/accuracy"), "say local/accuracy_mean"),
        (("--arm", "local", "--target", "test/accuracy=0.9"), "which only clients measure"),
        (("--arm", "local", "--set", "evaluation.clients=0"), "only clients can measure models"),
    ],
)
def test_what_an_arm_cannot_do_is_refused_before_anything_runs(file, tmp_path, arguments, words):
    done = fedsim("compare", file, *arguments, "--out", "study")
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert not (tmp_path / "study" / "cells").exists()
