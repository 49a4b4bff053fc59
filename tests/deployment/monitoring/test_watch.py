"""Which runs are told of, and what of them and of a site's record reaches Prometheus."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.deployment.monitoring.families import families
from fedsim.deployment.monitoring.watch import Watch
from fedsim.messages.failures import CAUSES
from fedsim.runs.observed import STATES
from tests.deployment.sites_apart import deployed
from tests.deployment.test_who_must_be_there import Killed, federation

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """A run over nodes that ended when a required one died; its site 0 has a record."""
    folder = tmp_path_factory.mktemp("failed")
    file, files, more = federation(folder, "required = [1]")
    mine = more["site_files"][0]
    mine.write_text(f'{mine.read_text()}audit = "{folder}/audit.jsonl"\n')
    options = {"grid": Killed, "in_round": 2, "after_looks": 10**6, **more}
    with pytest.raises(RunError):
        deployed(file, files, folder / "runs" / "first", **options)
    return folder


@pytest.fixture
def runs(failed, tmp_path):
    """A folder of the test's own with one run."""
    return Path(shutil.copytree(failed / "runs", tmp_path / "runs"))


def scraped(watch):
    """What Prometheus reads: the value of each series, which is there once."""

    class Once(Collector):
        def collect(self):
            return families(watch.look())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(found, name, **labels):
    """The value of the one series of that name with these labels among its own."""
    (one,) = [v for (n, has), v in found.items() if n == name and labels.items() <= set(has)]
    return one


def test_a_run_is_told_with_its_names_and_the_site_that_died(failed):
    found = scraped(Watch(failed / "runs", audit=failed / "audit.jsonl"))
    named = {"run": "first", "scenario": "scenario", "strategy": "fedavg"}
    for (name, labels), _ in found.items():
        if name.startswith("fedsim_run_"):
            assert named.items() <= set(labels), name
    states = {state: value(found, "fedsim_run_state", state=state) for state in STATES}
    assert states == dict.fromkeys(STATES, 0) | {"failed": 1}
    assert value(found, "fedsim_run_last_round") == 1
    assert value(found, "fedsim_run_planned_rounds") == 4
    assert value(found, "fedsim_run_replies_total", cause="ok") == 3
    assert value(found, "fedsim_run_client_failures_total", client="1", cause="died") == 1
    assert value(found, "fedsim_run_client_failing", client="1") == 1
    assert value(found, "fedsim_run_client_required", client="1") == 1
    assert 0 < value(found, "fedsim_run_metric", metric="train/loss") < 10
    ended = (failed / "runs" / "first" / "metrics.jsonl").stat().st_mtime
    assert value(found, "fedsim_run_last_round_end_timestamp_seconds") == ended
    assert value(found, "fedsim_run_last_round_seconds") > 0
    assert value(found, "fedsim_run_bytes_total", direction="up") > 0
    assert value(found, "fedsim_unreadable_files") == 0


def test_a_site_s_record_is_counted_as_it_stands(failed):
    found = scraped(Watch(failed / "runs", audit=failed / "audit.jsonl"))
    lines = [json.loads(line) for line in (failed / "audit.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["instruction"] == "train"]
    assert value(found, "fedsim_site_instructions_total", instruction="train") == len(trained) > 0
    sent = sum(line["bytes_sent"] for line in lines)
    assert value(found, "fedsim_site_bytes_sent_total") == sent > 0
    assert value(found, "fedsim_site_errors_total") == 0
    when = value(found, "fedsim_site_last_instruction_timestamp_seconds")
    assert abs(when - (failed / "audit.jsonl").stat().st_mtime) <= 2


def test_errors_and_foreign_instructions_of_a_record_are_counted(failed, tmp_path):
    audit = tmp_path / "audit.jsonl"
    watch = Watch(failed / "runs", audit=audit)
    assert not [name for name, _ in scraped(watch) if name == "fedsim_site_instructions_total"]
    line = json.loads((failed / "audit.jsonl").read_text().splitlines()[0])
    with audit.open("a") as file:
        for n in range(50):
            file.write(json.dumps(line | {"instruction": f"kind-{n}", "error": "3f"}) + "\n")
    found = scraped(watch)
    assert value(found, "fedsim_site_instructions_total") == 50
    assert value(found, "fedsim_site_instructions_total", instruction="other") == 50
    assert value(found, "fedsim_site_errors_total") == 50
    with audit.open("a") as file:
        file.write("no line of a record\n")
        file.write(json.dumps(line | {"instruction": "evaluate"}) + "\n")
    found = scraped(watch)
    assert value(found, "fedsim_unreadable_files") == 1
    assert value(found, "fedsim_site_instructions_total", instruction="evaluate") == 1


def test_the_newest_runs_alone_are_told_of(runs):
    for n in range(5):
        shutil.copytree(runs / "first", runs / "study" / f"cell-{n}")
        for path in (runs / "study" / f"cell-{n}").iterdir():
            os.utime(path, (1000 + n, 1000 + n))
    watch = Watch(runs, most=3)
    assert list(watch.look().runs) == ["first", "study/cell-3", "study/cell-4"]
    assert watch.look().found == 6
    (runs / "study" / "cell-0" / "log.txt").write_text("")  # something happens in an old one
    assert list(watch.look().runs) == ["first", "study/cell-0", "study/cell-4"]


def test_a_run_s_own_folder_may_be_watched(runs):
    assert list(Watch(runs / "first").look().runs) == ["first"]


def test_runs_in_the_making_and_links_are_no_runs(runs):
    shutil.copytree(runs / "first", runs / ".second.1a2b.tmp")
    (runs / "third").symlink_to(runs / "first")
    assert list(Watch(runs).look().runs) == ["first"]


def test_runs_come_and_go(runs):
    watch = Watch(runs)
    watch.look()
    shutil.copytree(runs / "first", runs / "second")
    assert list(watch.look().runs) == ["first", "second"]
    shutil.rmtree(runs / "first")
    seen = watch.look()
    assert (list(seen.runs), seen.unreadable) == (["second"], ())


def test_broken_files_of_one_run_are_counted_logged_once_and_keep_no_other_from_being_told(
    runs, caplog
):
    shutil.copytree(runs / "first", runs / "second")
    (runs / "first" / "scenario.json").write_text("{")
    with (runs / "first" / "metrics.jsonl").open("a") as file:
        file.write("broken\n")
    watch = Watch(runs)
    for _ in range(3):
        found = scraped(watch)
        assert value(found, "fedsim_unreadable_files") == 2
        assert value(found, "fedsim_run_last_round", run="second") == 1
        assert value(found, "fedsim_run_state", run="first", state="failed") == 1
    assert sorted(record.args[0].name for record in caplog.records) == [
        "metrics.jsonl",
        "scenario.json",
    ]


def test_names_that_are_no_text_are_told_and_no_series_is_there_twice(runs):
    odd = runs / os.fsdecode(b"odd-\xff")
    (runs / "first").rename(odd)
    with (odd / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "\\ud800": 1, "two\\nlines": 2, "\\"": 3}\n')
        long = "x" * 300
        file.write(f'{{"round": 3, "{long}1": 1, "{long}2": 2}}\n')
    found = scraped(Watch(runs))
    assert value(found, "fedsim_run_last_round", run="odd-\\udcff") == 3
    assert value(found, "fedsim_run_metric", metric="two\nlines") == 2


def test_a_folder_that_is_gone_is_said_and_the_rest_goes_on(runs):
    watch = Watch(runs)
    assert watch.why_not() == ""
    shutil.rmtree(runs)
    assert "cannot be read: No such file" in watch.why_not()
    found = scraped(watch)
    assert value(found, "fedsim_folder_readable") == 0
    assert value(found, "fedsim_runs_found") == 0
    runs.mkdir()
    assert watch.why_not() == ""


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [
        ("rums", {}, "rums: no such folder; did you mean '.*runs'"),
        ("runs/first/log.txt", {}, "is a file; runs lie in a folder"),
        ("runs", {"most": 0}, "--runs 0: must be from 1 to 1000"),
        ("runs", {"audit": "."}, r"--audit .*: is a folder"),
        ("runs", {"audit": "nowhere/audit.jsonl"}, "there is no folder .*nowhere"),
    ],
)
def test_what_cannot_be_watched_is_refused(folder, options, said, runs):
    if "audit" in options:
        options = {"audit": runs.parent / options["audit"]}
    with pytest.raises(ScenarioError, match=said):
        Watch(runs.parent / folder, **options)


# The example of rules for alerts.

RULES = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())


def rules():
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def test_alerts_ask_for_metrics_labels_and_values_that_are_served(failed):
    found = scraped(Watch(failed / "runs", audit=failed / "audit.jsonl"))
    labels: dict[str, set[str]] = {}
    for name, has in found:
        labels.setdefault(name, set()).update(label for label, _ in has)
    words = {"state": set(STATES), "cause": {*CAUSES, "other", "ok"}}
    asked = set()
    for rule in rules():
        for name, matchers in re.findall(r"(fedsim_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            asked.add(name)
            for label, values in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in labels[name], (rule["alert"], label)
                assert set(values.split("|")) <= words[label]
        told = {*re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])}
        assert told <= labels[re.search(r"fedsim_\w+", rule["expr"])[0]], rule["alert"]
    assert asked <= labels.keys()
    assert len(asked) >= 5


def test_every_alert_has_a_name_of_its_own_and_what_prometheus_needs():
    for rule in rules():
        assert {"alert", "expr", "labels", "annotations"} <= set(rule) | {"for"}
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


def test_the_page_tells_of_every_metric_that_is_served(failed):
    found = scraped(Watch(failed / "runs", audit=failed / "audit.jsonl"))
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert {name for name, _ in found} <= set(re.findall(r"`(fedsim_\w+)`", page))
