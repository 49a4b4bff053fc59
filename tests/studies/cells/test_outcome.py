"""What is read of a run's records."""

import math

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.studies.cells.outcome import (
    NEVER,
    Cost,
    Target,
    outcome_of,
    parse_target,
    require_recorded,
)


def records(values, metric="test/accuracy", every=1):
    """Ten bytes up, twenty down and half a second a round; round 0 is the start."""
    made = [{"round": 0, metric: 0.0}]
    for at, value in enumerate(values, start=1):
        record = {"round": at, "comm/uplink_bytes": 10, "comm/downlink_bytes": 20}
        record |= {"time/round_s": 0.5}
        if at % every == 0:
            record[metric] = value
        made.append(record)
    return made


def test_the_value_is_the_mean_over_the_last_tenth_of_the_rounds():
    rising = [float(n) for n in range(1, 21)]
    assert outcome_of(records(rising), "test/accuracy").value == 19.5
    assert outcome_of(records(rising), "test/accuracy", last=0.5).value == 15.5
    assert outcome_of(records(rising), "test/accuracy", last=1.0).value == 10.5


def test_it_is_the_last_value_where_none_was_measured_so_late():
    assert outcome_of(records([1.0, 2.0, 3.0], every=2), "test/accuracy").value == 2.0


def test_what_is_not_finite_has_no_mean():
    assert math.isnan(outcome_of(records([1.0, math.nan]), "test/accuracy").value)
    assert math.isnan(outcome_of(records([1.0]), "nodes/accuracy").value)


def test_the_whole_run_and_the_way_to_the_target_are_paid_for():
    target = Target("test/accuracy", 0.7)
    found = outcome_of(records([0.5, 0.8, 0.6]), "test/accuracy", target=target)
    assert found.total == Cost(3, 90, 1.5)
    assert found.to_target == Cost(2, 60, 1.0)
    never = outcome_of(records([0.5, 0.6]), "test/accuracy", target=target)
    assert never.to_target == NEVER


def test_a_loss_reaches_its_target_from_above():
    target = Target("test/loss", 0.7)
    found = outcome_of(records([0.9, 0.8, 0.6], "test/loss")[1:], "test/loss", target=target)
    assert found.to_target.rounds == 3


def test_the_worst_clients_are_absent_unless_measured():
    history = records([0.5] * 10)
    assert outcome_of(history, "test/accuracy").worst is None
    history[-1]["local/accuracy_worst_decile"] = 0.25
    assert outcome_of(history, "test/accuracy").worst == 0.25


@pytest.mark.parametrize("text", ["test/accuracy", "test/accuracy=high", "test/accuracy=nan"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(ScenarioError, match="must be metric=value"):
        parse_target(text)


def test_a_metric_that_no_run_can_record_is_refused():
    with pytest.raises(ScenarioError, match="did you mean 'test/accuracy'"):
        parse_target("tets/accuracy=0.5")
    with pytest.raises(ScenarioError, match=r"did you mean 'test/accuracy'\? recorded: test/acc"):
        require_recorded("test/acuracy", records([1.0]), "--metric")
