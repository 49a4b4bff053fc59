"""How long a node's client may compute."""

import json
import signal
import threading
import time

import pytest

from fedsim.basics.errors import RunError
from fedsim.deployment import own_data
from fedsim.deployment.time_limit import TookTooLong, at_most
from fedsim.engine.client_app import round_of
from tests.deployment.sites_apart import deployed, outcome, scenario, written


def sleeps():
    time.sleep(20)


def counts():
    while True:
        pass


def holds_exceptions_off():
    while True:
        try:
            counts()
        except Exception:
            continue


def in_a_thread(work):
    """What becomes of work in a thread that is not the main one."""
    found = []

    def run():
        try:
            work()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return found


@pytest.mark.parametrize("work", [sleeps, counts, holds_exceptions_off])
def test_work_is_interrupted_whatever_it_does(work):
    begun = time.monotonic()
    with pytest.raises(TookTooLong), at_most(0.3):
        work()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("work", [counts, holds_exceptions_off])
def test_work_in_any_thread_is_interrupted(work):
    def limited():
        with at_most(0.3):
            work()

    (error,) = in_a_thread(limited)
    assert isinstance(error, TookTooLong)


def test_work_that_is_over_in_time_is_never_interrupted_later():
    def limited():
        with at_most(0.05):
            pass
        time.sleep(0.2)

    limited()
    assert in_a_thread(limited) == []


def test_an_alarm_that_was_set_before_still_rings():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    own = signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with at_most(5):
            pass
        time.sleep(0.8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *own)
        signal.signal(signal.SIGALRM, before)
    assert len(rung) == 1


class Slow:
    """A site's answers, of which those of one partition take long from a round on."""

    def __init__(self, answer, from_round=2, partition=1):
        self.answer, self.from_round, self.partition = answer, from_round, partition

    def __call__(self, message, context, policy, scenario):
        trains = message.metadata.message_type == "train"
        is_late = trains and round_of(message) >= self.from_round
        if context.node_config["partition-id"] == self.partition and is_late:
            time.sleep(20)
        return self.answer(message, context, policy, scenario)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_client_that_takes_too_long_has_hung_as_in_an_engine(keeps, tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "answer", Slow(own_data.answer))
    files = written(tmp_path / "data", sizes=(14, 9, 12))
    strategy = "scaffold" if keeps else "fedavg"
    file = scenario(tmp_path, files, strategy=strategy, tables="client_timeout_s = 1.5")
    more = {}
    if keeps:
        site = tmp_path / "site.toml"
        site.write_text(f'[site]\nstate = "{tmp_path}/kept"\n')
        more = {"site_files": [site] * 3}
    out = deployed(file, files, tmp_path / "run", **more)
    rounds = [json.loads(line) for line in (out / "participation.jsonl").read_text().splitlines()]
    assert [each["failed"] for each in rounds] == [{}, {"1": "hung"}, {"1": "hung"}]
    assert "no answer within 1.5 s of its start" in (out / "log.txt").read_text()
    assert len(outcome(out)[1]) == 4


def test_the_policy_of_a_round_applies_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "answer", Slow(own_data.answer))
    files = written(tmp_path / "data", sizes=(14, 9, 12))
    tables = 'client_timeout_s = 1.0\non_failure = "stop"'
    file = scenario(tmp_path, files, tables=tables)
    with pytest.raises(RunError, match="client 1, round 2: hung: no answer within 1 s"):
        deployed(file, files, tmp_path / "run")
