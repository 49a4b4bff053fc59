"""`fedsim plan`: what is tried and taken, and that its choice ends up in the scenario."""

import json
import tomllib
from dataclasses import replace
from typing import get_args

import pytest
import torch
import typer

from fedsim import cli
from fedsim.basics.errors import ScenarioError
from fedsim.runs.start import start
from fedsim.runs.world import build
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from fedsim.scenario.tables import Engine
from fedsim.studies.plan_search import Way, chosen, chunk_sizes, measure, with_engine, write

TINY = """# who trains
rounds = 2
[data]
name = "synthetic" # made on demand
[partition]
kind = "natural"
clients = 9
[participation]
kind = "uniform"
cohort_size = 4

[engine]
kind = "inline" # no Ray
"""
SETTINGS = {"kind": "inline", "executor": "loop", "chunk_size": 3, "threads": 1}


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


# --- measuring ------------------------------------------------------------------------------------


def test_every_executor_is_tried_or_refused_with_the_reason(tiny):
    batch_norm = ["task.model=cnn_batchnorm", "data={name='digits'}", "partition.kind=iid"]
    plans = measure(load(tiny, batch_norm), rounds=2)
    tried = {way.executor for way in plans.ways}
    assert tried.isdisjoint(plans.refused)
    assert tried | set(plans.refused) == set(
        get_args(Engine.model_fields["executor"].annotation)
    ) - {"auto"}
    assert tried == {"loop"}
    assert "BatchNorm" in plans.refused["vmap"]


def test_ways_are_measured_in_the_same_rounds_and_one_of_them_is_what_the_scenario_says(tiny):
    scenario = load(tiny)
    plans = measure(scenario, rounds=3)
    (now,) = [way for way in plans.ways if way.as_it_is]
    assert plans.now is now
    plan = build(scenario).plan
    assert (now.executor, now.chunk_size, now.threads, now.kind) == (
        plan.executor, plan.chunk_size, 1, "inline",
    )  # fmt: skip
    assert len({tuple(way.settings.values()) for way in plans.ways}) == len(plans.ways)
    assert {way.chunk_size for way in plans.ways} == {2, 4}
    assert all(len(way.seconds) >= 2 for way in plans.ways)
    assert now.times_faster(now) == (1, 1, 1)
    assert plans.best in plans.ways
    again = Scenario.from_resolved(
        {**scenario.resolved(), "engine": {**scenario.resolved()["engine"], **plans.best.settings}},
        "again",
    )
    assert build(again).plan.chunk_size == plans.best.chunk_size


def way(seconds, **options):
    options = {"executor": "vmap", "chunk_size": 4, **options}
    return Way(**options, seconds=dict(enumerate(seconds)))


def test_the_fastest_is_taken_if_it_is_worth_it():
    now = way([1.0, 1.0, 1.0], as_it_is=True)
    assert chosen([now, way([0.5, 0.5, 3.0])], now).median_s == 0.5
    assert chosen([now, way([0.97, 0.97, 0.97])], now) is now
    # the median of ratios, not the ratio of medians
    odd = way([0.9, 0.9, 1.1])
    assert chosen([replace(now, seconds={0: 0.9, 1: 1.2, 2: 0.9}), odd], odd) is odd


def test_of_equally_good_ones_the_plainest_is_taken():
    now = way([1.0] * 3, as_it_is=True)
    one, two = way([0.51] * 3), way([0.5] * 3, threads=2)
    assert chosen([now, two, one], now) is one
    workers = way([0.5] * 3, kind="ray", workers=4)
    assert chosen([now, workers, one], now) is one


@pytest.mark.parametrize(
    ("cohort", "default", "expected"),
    [(20, 10, [5, 10, 20]), (10_000, 32, [16, 32, 64]), (2, 2, [2]), (1, 2, [2]), (100, 2, [2, 4])],
)
def test_sizes_are_parts_of_the_cohort_that_memory_bears(cohort, default, expected):
    assert chunk_sizes(cohort, default) == expected


@pytest.mark.slow
def test_workers_are_tried_where_the_scenario_has_them(tiny, ray_cluster):
    plans = measure(load(tiny, ["engine.kind=ray"]), rounds=2, workers=2)
    assert {(way.kind, way.workers) for way in plans.ways} == {
        ("inline", 1), ("ray", 1), ("ray", 2),
    }  # fmt: skip
    assert plans.now.kind == "ray"


# --- threads --------------------------------------------------------------------------------------


def test_threads_are_part_of_the_plan_and_give_the_same_bits_every_time(tiny, tmp_path):
    assert build(load(tiny)).plan.threads == 1
    two = load(tiny, ["engine.threads=2"])
    assert build(two).plan.threads == 2
    before = torch.get_num_threads()
    hashes = {start(two, out=tmp_path / n).summary["params_sha256"] for n in ("a", "b")}
    assert len(hashes) == 1
    assert torch.get_num_threads() == before


def test_a_scenario_of_one_thread_is_the_one_that_says_nothing_of_threads(tiny):
    one, two = (load(tiny, [f"engine.threads={n}"]).sha256 for n in (1, 2))
    assert one == load(tiny).sha256 != two
    with pytest.raises(ScenarioError, match="threads"):
        load(tiny, ["engine.threads=0"])


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rounds = 3",
        TINY,
        TINY.rstrip("\n"),
        "[engine]\n",
        "[engine]",
        "[ engine ] # how\nexecutor = 'vmap' # why\nchunk_size=7#seven\n\n[data]\nname = 'x'\n",
        "[engine]\n\tchunk_size = 9\n[engine.client_resources]\nnum_cpus = 2\n",
        "[data]\nname = '[engine]'\nkind = 'x'\n[engine]\non_failure = \"stop\" # kind = 3\n",
    ],
)
def test_only_the_keys_of_the_engine_change_and_comments_stay(text):
    edited = with_engine(text, SETTINGS)
    wanted = tomllib.loads(text)
    wanted["engine"] = {**wanted.get("engine", {}), **SETTINGS}
    assert tomllib.loads(edited) == wanted
    for line in text.splitlines():
        _, mark, comment = line.partition("#")
        assert mark + comment in edited
    assert with_engine(edited, SETTINGS) == edited


@pytest.mark.parametrize(
    "text", ["engine.kind = 'ray'\n", "engine = {kind = 'ray'}\n", "[engine]\nkind = '''\nray'''\n"]
)
def test_a_table_written_in_another_way_is_left_to_the_user(tmp_path, text):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match='put in: kind = "inline"; executor = "loop"; chunk_si'):
        write(file, tmp_path / "b.toml", SETTINGS)
    assert not (tmp_path / "b.toml").exists()


def test_a_relative_path_is_not_torn_from_its_folder(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[data]\nname = "mnist"\npath = "mnist"\n')
    (tmp_path / "other").mkdir()
    with pytest.raises(ScenarioError, match=r"\[data\] path = 'mnist' is relative to the scenario"):
        write(file, tmp_path / "other" / "b.toml", SETTINGS)
    write(file, tmp_path / "b.toml", SETTINGS)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def fedsim(capsys):
    def fedsim(*arguments):
        command = typer.main.get_command(cli.app)
        with pytest.raises(SystemExit) as ended:
            command.main([str(a) for a in arguments], prog_name="fedsim")
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return fedsim


def test_the_choice_is_shown_and_written_beside_the_comments(fedsim, tiny):
    fast = tiny.with_name("fast.toml")
    code, out, err = fedsim("plan", tiny, "--rounds", 2, "--write", fast)
    assert code == 0
    assert "as it is" in out
    assert f"written to {fast}" in out
    assert "ways in this process" in err
    text = fast.read_text()
    assert "# who trains" in text
    assert 'kind = "inline" # no Ray' in text
    again = load(fast)
    assert replace(again, engine=load(tiny).engine, origin="") == replace(load(tiny), origin="")
    code, _, err = fedsim("plan", tiny, "--write", fast)
    assert (code, err) == (2, f"fedsim: --write {fast}: exists already\n")


def test_programs_read_all_ways(fedsim, tiny):
    code, out, err = fedsim("plan", tiny, "--rounds", 2, "-q", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["engine"]["executor"] in {way["executor"] for way in document["ways"]}
    assert [way["median_s"] for way in document["ways"]] == sorted(
        way["median_s"] for way in document["ways"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "1"], "--rounds 1: must be >= 2"),
        (["--workers", "0"], "--workers 0: must be >= 1"),
        (["--write", "nowhere/x.toml"], "--write nowhere/x.toml: there is no folder nowhere"),
        (["--set", "seed=3", "--write", "x.toml"], "--write with --set: put the changes into"),
    ],
)
def test_what_cannot_be_measured_is_refused(fedsim, tiny, arguments, words):
    code, _, err = fedsim("plan", tiny, *arguments)
    assert code == 2
    assert err.startswith(f"fedsim: {words}")
