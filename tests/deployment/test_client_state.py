"""What clients keep outlives their nodes and the run, in a folder of the site's."""

import json
from pathlib import Path

import pytest

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.engine.inline import InlineGrid
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment.sites_apart import Sites, deployed, outcome, scenario, written
from tests.tiers import slow

STATEFUL = {
    "optimiser": {"tables": "[checkpoint]\nevery = 1"},
    "personal": {
        "task": 'personal = ["output"]',
        "partition": "test_fraction = 0.3",
        "tables": "[evaluation]\nclients = 3\n[checkpoint]\nevery = 2",
    },
    "part of a strategy": {"strategy": "scaffold", "tables": "[checkpoint]\nevery = 1"},
    "some take part": {
        "strategy": "feddyn", "participation": "bernoulli", "rate": "rate = 0.6",
        "tables": "[checkpoint]\nevery = 2",
    },
}  # fmt: skip
ROUNDS = 5


class Died(Exception):
    """Stands for a power cut of the server's machine."""


class Cut(Sites):
    """The server ends in mid-round, once all have trained; or all nodes are started again."""

    def __init__(self, files, config, dies_in=None, restarts=None, **options):
        super().__init__(files, config, **options)
        self.config = config
        self.rounds, self.dies_in, self.restarts = 0, dies_in, restarts

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        if {m.metadata.message_type for m in messages} == {"train"}:
            self.rounds += 1
            if self.rounds == self.dies_in:
                raise Died
            if self.rounds == self.restarts:
                self.listed = False
                # what Flower kept for them is gone
                app = self.inner.client_app
                self.inner = InlineGrid(app, len(self.files), run_config=self.config)
                for partition in range(len(self.files)):
                    self.restart(partition)
        return replies


def federation(tmp_path, name, *, folders=True):
    """A scenario whose clients keep something, its files, and the sites' own files."""
    files = written(tmp_path / "data", sizes=(14, 9, 12))
    file = scenario(tmp_path, files, rounds=ROUNDS, **STATEFUL[name])
    if name == "optimiser":
        text = file.read_text()
        kept = 'optimizer = "adam"\nkeep_optimizer = true\nlocal_epochs'
        file.write_text(text.replace("local_epochs", kept))
    mine = []
    for site in range(len(files)):
        mine.append(tmp_path / f"site_{site}.toml")
        state = f'\nstate = "{tmp_path}/kept/{site}"' if folders else ""
        mine[-1].write_text(f"[site]{state}\n")
    return file, files, mine


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("after", [slow(1), 3])
def test_nodes_that_are_started_again_go_on_with_what_their_clients_kept(name, after, tmp_path):
    file, files, mine = federation(tmp_path, name)
    start(load(file), out=tmp_path / "simulated")
    there = deployed(file, files, tmp_path / "run", grid=Cut, restarts=after, site_files=mine)
    assert outcome(there) == outcome(tmp_path / "simulated")


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("dies_in", [slow(1), 3, slow(5)])
def test_a_run_whose_server_died_goes_on_to_the_undisturbed_bits(name, dies_in, tmp_path):
    file, files, mine = federation(tmp_path, name)
    start(load(file), out=tmp_path / "simulated")
    with pytest.raises(Died):
        deployed(file, files, tmp_path / "run", grid=Cut, dies_in=dies_in, site_files=mine)
    # other nodes, as after a power cut at every site
    there = deployed(file, files, tmp_path / "run", resume=True, site_files=mine)
    assert outcome(there) == outcome(tmp_path / "simulated")


def test_without_folders_of_all_sites_such_a_run_is_not_gone_on_with(tmp_path):
    file, files, mine = federation(tmp_path, "optimiser")
    with pytest.raises(Died):
        deployed(file, files, tmp_path / "run", grid=Cut, dies_in=3, site_files=mine)
    mine[1].write_text("[site]\n")
    with pytest.raises(ScenarioError, match=r"unless all have a folder for them \(\[site\] state"):
        deployed(file, files, tmp_path / "run", resume=True, number=8, site_files=mine)
    # a run that was refused is none that made the folder
    assert json.loads((tmp_path / "run" / "flower_runs.json").read_text())["runs"] == ["7"]


def test_without_a_folder_a_node_forgets_and_the_bits_are_others(tmp_path):
    """The control: it is the folder that does it."""
    file, files, mine = federation(tmp_path, "optimiser", folders=False)
    start(load(file), out=tmp_path / "simulated")
    there = deployed(file, files, tmp_path / "run", grid=Cut, restarts=1, site_files=mine)
    assert outcome(there) != outcome(tmp_path / "simulated")
    assert "and with it what clients keep" in (there / "log.txt").read_text()


def test_two_runs_keep_apart_what_their_clients_keep(tmp_path):
    file, files, mine = federation(tmp_path, "optimiser")
    one = deployed(file, files, tmp_path / "one", site_files=mine)
    other = deployed(file, files, tmp_path / "other", site_files=mine, number=8)
    assert outcome(one) == outcome(other)
    assert len(list((tmp_path / "kept" / "0").iterdir())) == 2


def test_the_folder_holds_what_a_resume_may_need_and_no_more(tmp_path):
    file, files, mine = federation(tmp_path, "optimiser")
    file.write_text(file.read_text().replace(f"rounds = {ROUNDS}", "rounds = 12"))
    deployed(file, files, tmp_path / "run", site_files=mine)
    (place,) = (tmp_path / "kept" / "1").glob("*/1")
    rounds = sorted(int(each.stem.rpartition("-")[2]) for each in place.iterdir())
    assert rounds == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("harm", ["torn", "changed"])
def test_a_state_that_is_damaged_is_not_trained_on(harm, tmp_path):
    file, files, mine = federation(tmp_path, "optimiser")
    with pytest.raises(Died):
        deployed(file, files, tmp_path / "run", grid=Cut, dies_in=3, site_files=mine)
    for path in Path(tmp_path / "kept" / "1").rglob("round-*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content[:40] if harm == "torn" else content)
    there = deployed(file, files, tmp_path / "run", resume=True, site_files=mine)
    failed = [each["clients/failed"] for each in outcome(there)[1][3:]]
    assert failed == [1] * len(failed)


def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_lost_silently(tmp_path):
    file, files, mine = federation(tmp_path, "optimiser")
    (tmp_path / "kept").write_text("a file in its place")
    with pytest.raises(RunError, match=r"RunError at fedsim\.deployment\.client_state"):
        deployed(file, files, tmp_path / "run", site_files=mine)


def test_the_machine_s_variable_names_the_folder_too(monkeypatch, tmp_path):
    file, files, mine = federation(tmp_path, "optimiser", folders=False)
    monkeypatch.setenv("FEDSIM_SITE_STATE", str(tmp_path / "kept"))
    deployed(file, files, tmp_path / "run", site_files=mine)
    (experiment,) = (tmp_path / "kept").iterdir()
    assert sorted(each.name for each in experiment.iterdir()) == ["0", "1", "2"]
    assert json.loads((tmp_path / "run" / "flower_runs.json").read_text())["runs"] == ["7"]
