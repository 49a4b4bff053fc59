"""What a run records is known before it begins, and nothing waits for what never comes."""

import pytest

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.runs.world import build
from fedsim.scenario.expectations import Expectation, check_expectations
from fedsim.scenario.scenario import Scenario

SPLIT = {"partition": {"kind": "iid", "clients": 4, "test_fraction": 0.3}}
WORLDS = {
    "classes": {
        **SPLIT,
        "task": {"metrics": ["accuracy", "macro_f1", "auroc", "per_class"]},
        "evaluation": {"clients": 3, "pooled": True, "robust": {"radii": [0.05, 0.1], "steps": 2}},
        "devices": {"partial": 0.5},
        "engine": {"kind": "inline", "on_failure": "retry"},
    },
    "own models": {
        **SPLIT,
        "strategy": {"name": "ditto"},
        "evaluation": {"clients": 3, "robust": {"radii": [0.05], "steps": 2}},
    },
    "own tensors": {
        **SPLIT,
        "task": {"personal": ["output"]},
        "evaluation": {"clients": 3, "robust": {"radii": [0.05], "steps": 2}},
    },
    "fine-tuned": {
        **SPLIT,
        "evaluation": {
            "clients": 3,
            "robust": {"radii": [0.05], "steps": 2},
            "finetune": {"lr": 0.1},
        },
    },
    "numbers": {"data": {"name": "diabetes"}, "task": {"model": "linear"}},
    "nodes": {"strategy": {"name": "gossip"}},
    "attacked": {
        "attack": {"kind": "backdoor"},
        "strategy": {"name": "robust", "rule": "coordinate_median"},
    },
    "attacked, without accuracy": {
        "attack": {"kind": "backdoor"},
        "task": {"metrics": ["macro_f1"]},
    },
}
CLOSED = (
    "test", "robust", "local", "finetuned", "personal", "pooled", "nodes", "clients", "comm",
    "time",
)  # fmt: skip


def scenario(**tables):
    document = {
        "rounds": 2,
        "data": {"name": "digits", "test_fraction": 0.9},
        "partition": {"kind": "iid", "clients": 4},
        "engine": {"kind": "inline"},
    }
    return Scenario.from_resolved({**document, **tables}, origin="tests/recorded.toml")


def refusal(**tables):
    with pytest.raises(ScenarioError) as caught:
        build(scenario(**tables))
    return str(caught.value)


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_run_records_is_what_may_be_claimed(world, tmp_path):
    result = fedsim.start(scenario(**WORLDS[world]), out=tmp_path / "run")
    recorded = set().union(*JsonLines.read(result.folder / "metrics.jsonl"))
    closed = {name for name in recorded if name.partition("/")[0] in CLOSED}
    assert len(closed) > 10
    build(scenario(**WORLDS[world], expect={name: {"min": 0.0} for name in closed}))
    for phase in {name.partition("/")[0] for name in closed}:
        words = refusal(**WORLDS[world], expect={f"{phase}/nothing": {"min": 0.0}})
        allowed = set(words.rpartition("allowed: ")[2].split(", "))
        # failures, and metrics that some clients' samples do not define, may never happen
        # (or rules bear no number of attackers, or every client has trained)
        ends = ("_undefined", "beyond_f", "_untrained")
        maybe = {n for n in allowed if "/failed/" in n or n.endswith(ends)}
        assert allowed - maybe == {n for n in closed if n.startswith(f"{phase}/")} - maybe


def test_the_nearest_metric_is_named_for_claims_and_for_stopping():
    claim = refusal(expect={"test/acuracy": {"min": 0.5}})
    assert claim == (
        "tests/recorded.toml: [expect] 'test/acuracy' is not a metric that test records here; did "
        "you mean 'test/accuracy'? allowed: test/accuracy, test/loss"
    )
    stop = refusal(evaluation={"stop": {"metric": "test/los", "target": 0.1, "mode": "min"}})
    assert "[evaluation] stop.metric 'test/los'" in stop
    assert "did you mean 'test/loss'" in stop


def test_a_metric_that_only_the_first_round_can_tell_is_asked_for_after_it(tmp_path, caplog):
    claims = {"train/los": {"max": 9.0}, "server/anything": {"min": 0.0}}
    fedsim.start(scenario(expect=claims), out=tmp_path / "run")
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [
        "[expect] 'train/los': round 1 recorded none; did you mean 'train/loss'? recorded of "
        "train/: train/loss, train/num_examples",
        "[expect] 'server/anything': round 1 recorded none; recorded of server/: nothing",
    ]


def test_nobody_who_failed_by_a_cause_is_a_count_of_none():
    claims = {"clients/failed/died": Expectation(max=0.0, last=2)}
    kept = check_expectations(claims, [{"clients/failed": 0}, {"clients/failed": 0}])[0]
    broken = check_expectations(claims, [{"clients/failed/died": 1}, {"clients/failed": 0}])[0]
    assert (kept["value"], kept["holds"]) == (0.0, True)
    assert (broken["value"], broken["holds"]) == (0.5, False)
