"""Which sites a run does not go on without, and how long it waits for one that is gone."""

import pytest

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.runs.start import start
from fedsim.scenario.identity import identity_of
from fedsim.scenario.load import load
from tests.deployment.sites_apart import Sites, deployed, outcome, scenario, written

STRATEGIES = ["fedavg", "scaffold"]


class Killed(Sites):
    """A site's node is killed in mid-round, and is started again after some looks of the server."""

    def __init__(self, files, config, *, in_round, after_looks, partition=1, **options):
        super().__init__(files, config, **options)
        self.rounds, self.in_round, self.partition = 0, in_round, partition
        self.after_looks, self.looks = after_looks, None

    def get_node_ids(self):
        if self.looks is not None:
            self.looks += 1
            if self.looks == self.after_looks:
                self.restart(self.partition)
        return [node for node in super().get_node_ids() if node not in self.dead]

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if len(messages) > 1 and {m.metadata.message_type for m in messages} == {"train"}:
            self.rounds += 1
            if self.rounds == self.in_round:
                self.dead.add(self.nodes[self.partition])
                self.looks, self.listed = 0, False
        return super().send_and_receive(messages, timeout=timeout)


def federation(tmp_path, deployment, engine="", **choices):
    files = written(tmp_path / "data", sizes=(14, 9, 12))
    tables = f"{engine}\n[deployment]\n{deployment}"
    file = scenario(tmp_path, files, rounds=4, tables=tables, **choices)
    mine = []
    for site in range(3):
        mine.append(tmp_path / f"site_{site}.toml")
        mine[-1].write_text(f'[site]\nstate = "{tmp_path}/kept/{site}"\n')
    return file, files, {"site_files": mine}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_node_killed_in_mid_round_and_started_again_takes_part_in_that_round(strategy, tmp_path):
    retry = 'on_failure = "retry"'
    file, files, more = federation(tmp_path, "rejoin_s = 20.0", retry, strategy=strategy)
    start(load(file), out=tmp_path / "simulated")
    there = deployed(file, files, tmp_path / "run", grid=Killed, in_round=2, after_looks=4, **more)
    parameters, rounds = outcome(there)
    assert parameters == outcome(tmp_path / "simulated")[0]
    assert [each["clients/retried"] for each in rounds[1:]] == [0, 1, 0, 0]
    assert [each["clients/failed"] for each in rounds[1:]] == [0, 0, 0, 0]


def test_without_waiting_the_round_goes_on_without_it_and_says_so(tmp_path):
    """The control: it is the waiting that does it."""
    file, files, more = federation(tmp_path, "rejoin_s = 0.0", 'on_failure = "retry"')
    start(load(file), out=tmp_path / "simulated")
    there = deployed(file, files, tmp_path / "run", grid=Killed, in_round=2, after_looks=8, **more)
    parameters, rounds = outcome(there)
    assert parameters != outcome(tmp_path / "simulated")[0]
    assert rounds[2]["clients/failed"] == 1


def test_one_that_does_not_come_back_in_time_is_named(tmp_path):
    file, files, more = federation(tmp_path, "rejoin_s = 0.6")
    there = deployed(
        file, files, tmp_path / "run", grid=Killed, in_round=2, after_looks=10**6, **more
    )
    assert [each["clients/failed"] for each in outcome(there)[1][1:]] == [0, 1, 1, 1]
    assert "no node of partition 1 came back within 0.6 s" in (there / "log.txt").read_text()


@pytest.mark.parametrize("partition", [0, 1])
def test_the_failure_of_a_client_that_is_required_ends_the_run(partition, tmp_path):
    file, files, more = federation(tmp_path, "required = [1]")
    more |= {"grid": Killed, "in_round": 2, "after_looks": 10**6, "partition": partition}
    if partition == 1:
        with pytest.raises(
            RunError, match=r"client 1, round 2: died.*among \[deployment\] required"
        ):
            deployed(file, files, tmp_path / "run", **more)
    else:
        rounds = outcome(deployed(file, files, tmp_path / "run", **more))[1]
        assert rounds[2]["clients/failed"] == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("required = [3]", "client 3 does not exist; must be 0 to 2"),
        ("required = [-1]", "client -1 does not exist"),
        ("rejoin = 3.0", "did you mean 'rejoin_s'"),
        ("wait_s = 0.0", "wait_s = 0.0: "),
        ("min_sites = 4", "min_sites = 4: must be 1 to 3"),
        ("min_sites = 0", "min_sites = 0: "),
        ("min_sites = 2", "all 3 must be there before round 1"),
    ],
)
def test_what_is_impossible_is_refused(keys, expected, tmp_path):
    file, _, _ = federation(tmp_path, keys)
    with pytest.raises(ScenarioError, match=expected):
        load(file)


def test_the_least_number_of_sites_does_not_change_what_a_scenario_is_until_it_is_said(tmp_path):
    """A run that was begun before there was such a key can be gone on with."""
    file, _, _ = federation(tmp_path, "rejoin_s = 1.0")
    before = load(file).sha256
    resolved = load(file).resolved()
    assert resolved["deployment"].pop("min_sites") is None
    assert identity_of(resolved) == before
