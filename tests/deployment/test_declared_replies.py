"""What a reply must hold is procedure's and task's to say: no node has another's reply refused."""

import json

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedsim.messages.parsing import ReplyForm
from fedsim.runs.declared_replies import declared_replies
from tests.deployment.sites_apart import Sites, deployed, outcome, scenario, written
from tests.laws import federations as fed
from tests.tiers import by_turns

CASES = {
    "averaging": {},
    "an extra array": {"strategy": "scaffold"},
    "set-up exchange": {"strategy": "fedlex"},
    "compressed": {"strategy": "ef21"},
    "sites test": {
        "partition": "test_fraction = 0.3", "tables": "[evaluation]\nclients = 2",
    },
}  # fmt: skip


class Hostile(Sites):
    """A node whose replies hold more than was asked for, or less."""

    def __init__(self, *given, alter, **options):
        super().__init__(*given, **options)
        self.alter = alter

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            asked = not reply.has_error() and "partition" not in reply.content.config_records
            if asked and reply.metadata.src_node_id == self.nodes[0]:
                self.alter(reply.content)
        return replies


def another_metric(content):
    (metrics,) = content.metric_records.values()
    metrics["a"] = 0.0


def another_array(content):
    content["extra"] = ArrayRecord(
        {**content.array_records.get("extra", {}), "a": fed_array(np.zeros(2))}
    )


def fed_array(values):
    (array,) = ArrayRecord([values]).values()
    return array


def no_loss(content):
    (metrics,) = content.metric_records.values()
    metrics.pop("loss")


def case(tmp_path, name, **more):
    choices = {**CASES[name], **more}
    files = written(tmp_path / "data", sizes=(14, 9))
    file = scenario(tmp_path, files, **choices)
    return file, files


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("alter", [another_metric, another_array])
def test_what_one_of_two_nodes_adds_is_left_and_nobody_is_refused(name, alter, tmp_path):
    file, files = case(tmp_path, name)
    if alter is another_array and name == "sites test":
        pytest.skip("an evaluation's reply holds no array")
    honest = outcome(deployed(file, files, tmp_path / "honest"))
    found = deployed(file, files, tmp_path / "hostile", grid=Hostile, alter=alter)
    assert outcome(found) == honest
    assert [each.get("clients/failed") for each in honest[1][1:]] == [0, 0, 0]


def test_what_lacks_a_metric_is_refused_though_its_name_comes_first(tmp_path):
    file, files = case(tmp_path, "averaging", tables='on_failure = "skip"')
    found = deployed(file, files, tmp_path / "run", grid=Hostile, alter=no_loss)
    records = [
        json.loads(line) for line in (found / "participation.jsonl").read_text().splitlines()
    ]
    failed = [each.get("failed") for each in records if each["round"]]
    assert failed == [{"0": "metrics"}] * 3


@pytest.mark.parametrize("name", by_turns(fed.strategies(), 6))
def test_of_every_strategy_it_is_what_honest_nodes_send(name, monkeypatch, tmp_path):
    told = []

    def noting(world):
        declares = declared_replies(world)

        def also(cohort):
            told.append(declares(cohort))
            return told[-1]

        return also

    monkeypatch.setattr("fedsim.runs.declared_replies.declared_replies", noting)
    held = []
    fits = ReplyForm.has_arrays
    monkeypatch.setattr(
        ReplyForm, "has_arrays", lambda self, row: held.append(self.by_vote) or fits(self, row)
    )
    files = written(tmp_path / "data", sizes=(14, 9, 12, 8, 7))
    graph = "[topology]\nkind = 'ring'" if "gossip" in name else ""
    file = scenario(tmp_path, files, strategy=name, rounds=2, tables=graph)
    deployed(file, files, tmp_path / "run")
    assert told
    assert None not in told
    assert not any(held)
