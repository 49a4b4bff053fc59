"""What a run's folder says to somebody who looks on: state, rounds, failures, broken files."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fedsim.basics.errors import RunError
from fedsim.basics.json_files import JsonLines
from fedsim.runs.execute import execute
from fedsim.runs.folder import RunFolder, create
from fedsim.runs.observed import MOST_CLIENTS, MOST_METRICS, ObservedRun
from fedsim.runs.start import make_grid, resume, start
from fedsim.runs.world import build
from fedsim.scenario.load import load
from tests.deployment.sites_apart import Sites, deployed
from tests.deployment.test_who_must_be_there import Killed, federation

SCENARIO = """
title = "To be looked at"
seed = 3
rounds = 4
[task]
model = "logistic"
[data]
name = "synthetic"
dimension = 6
classes = 3
max_samples = 20
test_clients = 5
[partition]
kind = "natural"
clients = 12
[participation]
kind = "bernoulli"
rate = 0.7
[engine]
kind = "inline"
[checkpoint]
every = 1
"""


def looked(folder):
    run = ObservedRun(folder)
    run.look()
    return run


def told(run):
    """All that was read of a run but times."""
    apart = ("last_time", "round_s")
    return {k: v for k, v in vars(run).items() if not k.startswith("_") and k not in apart}


@pytest.fixture
def scenario(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(SCENARIO)
    return load(file)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "mine.toml").write_text(SCENARIO)
    return start(load(folder / "mine.toml"), out=folder / "run").folder


@pytest.fixture
def finished(kept, tmp_path):
    """A finished run of the test's own."""
    return Path(shutil.copytree(kept, tmp_path / "run"))


def test_a_finished_run_is_told_as_its_summary_has_it(finished):
    run = looked(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert run.state == "completed"
    assert (run.strategy, run.planned, run.last_round) == ("fedavg", 4, 4)
    assert run.values == summary["final"]
    records = JsonLines.read(finished / "metrics.jsonl")
    assert run.round_s == records[-1]["time/round_s"]
    assert run.traffic == {
        "up": sum(each.get("comm/uplink_bytes", 0) for each in records),
        "down": sum(each.get("comm/downlink_bytes", 0) for each in records),
    }
    assert run.traffic["up"] > 0
    taken = JsonLines.read(finished / "participation.jsonl")
    assert run.replies == {"ok": sum(len(each["selected"]) for each in taken)}
    assert run.failing == {}
    assert run.unreadable == set()


def test_a_run_that_is_going_on_is_told_round_by_round(scenario, tmp_path):
    world, folder = build(scenario), create(tmp_path / "run", scenario)
    run, seen = ObservedRun(folder.path), []

    class Looking:
        def round_ended(self, report):
            run.look()
            seen.append((run.state, run.last_round, run.replies["ok"]))

    run.look()
    assert (run.state, run.last_round) == ("starting", None)
    assert run.last_time == folder.file("scenario.json").stat().st_mtime
    with make_grid(world) as grid:
        execute(world, folder, grid, seed=scenario.seed, extra_hooks=[Looking()])
    taken = JsonLines.read(folder.file("participation.jsonl"))
    counts = [sum(len(e["selected"]) for e in taken if e["round"] <= n) for n in range(5)]
    assert seen == [("running", n, counts[n]) for n in range(5)]
    run.look()
    assert run.state == "completed"
    assert told(run) == told(looked(folder.path))
    assert run.last_time == folder.file("metrics.jsonl").stat().st_mtime


def test_a_run_that_was_interrupted_is_told_so_until_it_goes_on(scenario, tmp_path):
    world, folder = build(scenario), create(tmp_path / "run", scenario)

    class Ending:
        def round_ended(self, report):
            if report.server_round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder.recording(), make_grid(world) as grid:
        execute(world, folder, grid, seed=scenario.seed, extra_hooks=[Ending()])
    run = looked(folder.path)
    assert (run.state, run.last_round) == ("interrupted", 2)
    resume(folder.path)
    run.look()
    assert run.state == "completed"
    assert told(run) == told(looked(folder.path))


def test_a_site_that_died_is_named_with_its_rounds(tmp_path):
    file, files, more = federation(tmp_path, "rejoin_s = 0.0")
    options = {"grid": Killed, "in_round": 2, "after_looks": 10**6, **more}
    run = looked(deployed(file, files, tmp_path / "run", **options))
    assert run.scenario == "scenario"
    assert run.replies == {"ok": 3 + 2 * 3, "died": 3}
    assert run.failures == {(1, "died"): 3}
    assert run.failing == {1: "died"}
    assert run.state == "completed"


def test_a_required_site_that_ended_the_run_is_named_and_forgotten_when_it_is_back(tmp_path):
    file, files, more = federation(tmp_path, "required = [1]")
    options = {"grid": Killed, "in_round": 2, "after_looks": 10**6, **more}
    with pytest.raises(RunError):
        deployed(file, files, tmp_path / "run", **options)
    run = looked(tmp_path / "run")
    assert (run.state, run.last_round, run.required) == ("failed", 1, (1,))
    assert run.failing == {1: "died"}
    assert run.failures == {(1, "died"): 1}
    assert run.replies == {"ok": 3, "died": 1}
    deployed(file, files, tmp_path / "run", grid=Sites, resume=True, number=8, **more)
    run.look()
    assert (run.state, run.last_round) == ("completed", 4)
    assert (run.failing, run.failures) == ({}, {})
    assert run.replies == {"ok": 12}


def test_records_that_are_cut_back_are_counted_anew(finished):
    run = looked(finished)
    with JsonLines(finished / "participation.jsonl") as file:
        whole = (finished / "participation.jsonl").read_bytes().splitlines(keepends=True)
        file.truncate(len(whole[0]))
        file.append({"round": 2, "selected": [1, 2], "failed": {"2": "late"}})
    run.look()
    first = json.loads(whole[0])
    assert run.replies == {"ok": len(first["selected"]) + 1, "late": 1}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", b"{"),
        ("metrics.jsonl", b"[1]"),
        ("metrics.jsonl", b'{"round": "five"}'),
        ("metrics.jsonl", b'{"round": 5, "test/accuracy": 1' + b"0" * 400 + b"}"),
        ("metrics.jsonl", b"[" * 100_000),
        ("metrics.jsonl", b"\xff\xfe"),
        ("participation.jsonl", b'{"round": 5}'),
        ("participation.jsonl", b'{"round": 5, "selected": 7, "failed": {}}'),
        ("participation.jsonl", b'{"round": 5, "selected": [1], "failed": {"x": "late"}}'),
        ("participation.jsonl", b'{"round": 5, "selected": [1], "failed": [1]}'),
    ],
)
def test_a_broken_line_is_told_of_and_costs_nothing_else(name, line, finished):
    whole = looked(finished)
    with (finished / name).open("ab") as file:
        file.write(line + b"\n")
    run = looked(finished)
    assert run.unreadable == {name}
    assert told(run) | {"unreadable": set()} == told(whole)
    with JsonLines(finished / name) as file:
        file.truncate(file.offset - len(line) - 1)
    (finished / "again").write_bytes((finished / name).read_bytes())
    (finished / "again").rename(finished / name)
    run.look()
    assert told(run) == told(whole)


def test_a_half_written_line_is_not_broken(finished):
    with (finished / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 5, "te')
    run = looked(finished)
    assert (run.unreadable, run.last_round) == (set(), 4)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"rounds": 3}', b'{"strategy": 1}', None])
@pytest.mark.parametrize("name", ["scenario.json", "flower_runs.json"])
def test_a_broken_document_is_told_of_and_rounds_are_told_all_the_same(name, content, finished):
    (finished / name).unlink(missing_ok=True)
    if content is None:
        (finished / name).mkdir()
    else:
        (finished / name).write_bytes(content)
    run = looked(finished)
    assert run.unreadable == {name}
    assert (run.state, run.last_round) == ("completed", 4)


@pytest.mark.parametrize("name", ["metrics.jsonl", "participation.jsonl", "log.txt", "lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_neither_holds_up_nor_ends_a_look(name, kind, finished):
    (finished / name).unlink()
    make = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "loop": lambda path: path.symlink_to(path.name),
    }[kind]
    make(finished / name)
    run = looked(finished)
    if name == "lock":  # a folder may be locked too
        assert run.unreadable == ({"lock"} if kind == "loop" else set())
        assert run.state == ("unknown" if kind == "loop" else "completed")
    else:
        assert run.unreadable == {name}
        assert run.state == "completed"


def test_what_is_told_one_by_one_is_bounded(finished):
    many = 3 * MOST_CLIENTS
    document = json.loads((finished / "scenario.json").read_text())
    document["deployment"] = {"required": [many]}
    (finished / "scenario.json").write_text(json.dumps(document))
    with JsonLines(finished / "participation.jsonl") as file:
        failed = {str(client): "died" for client in range(many + 1)}
        file.append({"round": 5, "selected": [*range(many + 1)], "failed": failed})
    with JsonLines(finished / "metrics.jsonl") as file:
        file.append({"round": 5, **{f"server/{n}": n for n in range(MOST_METRICS + 7)}})
    run = looked(finished)
    assert len(run.failures) == len(run.failing) == MOST_CLIENTS + 1
    assert (many, "died") in run.failures
    assert run.unlisted == many - MOST_CLIENTS
    assert run.replies["died"] == many + 1
    assert len(run.values) == MOST_METRICS
    assert run.unlisted_metrics >= 7


def test_a_cause_of_another_version_is_other(finished):
    with JsonLines(finished / "participation.jsonl") as file:
        file.append({"round": 5, "selected": [1], "failed": {"1": "eaten"}})
    run = looked(finished)
    assert run.failing == {1: "other"}


def test_numbers_that_are_not_finite_are_told_as_such(finished):
    with JsonLines(finished / "metrics.jsonl") as file:
        file.append({"round": 5, "test/loss": float("inf"), "test/accuracy": None})
    run = looked(finished)
    assert run.values["test/loss"] == float("inf")
    assert run.unreadable == set()


def test_the_name_of_a_scenario_is_that_of_a_folder_of_its_own(scenario, tmp_path, monkeypatch):
    assert looked(create(tmp_path / "any", scenario).path).scenario == "To be looked at"
    monkeypatch.chdir(tmp_path)
    assert looked(create(None, scenario).path).scenario == "mine"


def test_nothing_is_written(finished):
    before = {path: path.stat().st_mtime_ns for path in [finished, *finished.rglob("*")]}
    looked(finished)
    assert {path: path.stat().st_mtime_ns for path in [finished, *finished.rglob("*")]} == before
    assert RunFolder(finished).file("lock").read_bytes() == b""
