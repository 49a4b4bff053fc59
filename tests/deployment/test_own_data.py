"""Sites that serve their own data: in a deployment each has its own alone, and the bits are those
of the simulation over all files."""

import json

import numpy as np
import pytest

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment.sites_apart import (
    COLUMNS,
    Sites,
    deployed,
    outcome,
    rows_of,
    scenario,
    write,
    written,
)
from tests.tiers import by_turns

STRATEGIES = ["fedavg", "fedau", "fedld", "fedlex", "flag"]


def simulated(file, out):
    start(load(file), out=out)
    return out


@pytest.mark.parametrize("strategy", by_turns(STRATEGIES, 4))
def test_the_bits_of_a_simulation_over_all_files(strategy, tmp_path):
    files = written(tmp_path / "data")
    write(tmp_path / "held_out.csv", *rows_of(9, 20))
    data = f'test = "{tmp_path}/held_out.csv"'
    file = scenario(tmp_path, files, data=data, strategy=strategy)
    there = deployed(file, files, tmp_path / "deployed")
    assert outcome(there) == outcome(simulated(file, tmp_path / "simulated"))


def test_who_is_absent_trains_at_no_site_and_sites_test_on_a_share_of_their_own(tmp_path):
    files = written(tmp_path / "data")
    file = scenario(
        tmp_path, files, rounds=5, participation="bernoulli", rate="rate = 0.6",
        partition="test_fraction = 0.3", tables="[evaluation]\nclients = 4\nper_client = true",
    )  # fmt: skip
    there = deployed(file, files, tmp_path / "deployed")
    found = outcome(there)
    assert found == outcome(simulated(file, tmp_path / "simulated"))
    assert any(each["clients/selected"] < 4 for each in found[1][1:])
    assert all("local/accuracy" in each and "test/loss" not in each for each in found[1][1:])
    local = (there / "local.jsonl").read_text()
    assert local == (tmp_path / "simulated" / "local.jsonl").read_text()


@pytest.mark.parametrize(
    "choices",
    [
        {"data": 'features = ["sugar", "age"]\nlabels = ["sick", "healthy"]'},
        {"data": "standardise = false"},
        {"partition": "test_fraction = 0.5", "data": 'target_type = "classes"'},
    ],
    ids=["columns and classes named", "not standardised", "half to test on"],
)
def test_whatever_the_scenario_says_of_the_data(choices, tmp_path):
    files = written(tmp_path / "data")
    tables = "[evaluation]\nclients = 4"
    partition = choices.pop("partition", "test_fraction = 0.2")
    file = scenario(tmp_path, files, partition=partition, tables=tables, **choices)
    there = deployed(file, files, tmp_path / "deployed")
    assert outcome(there) == outcome(simulated(file, tmp_path / "simulated"))


# --- sites that differ are named before round 1, alike in a deployment and in a simulation --------


DIFFERENT = {
    "a column less": (
        lambda f, v, o: write(f, v[:, :2], o, COLUMNS[:2]),
        r"lacks the column 'sugar'",
    ),
    "a column of another name": (
        lambda f, v, o: write(f, v, o, ("age", "pressure", "Sugar")),
        r"lacks the column 'sugar'; is it what this site calls 'Sugar'\?",
    ),
    "a column more": (
        lambda f, v, o: write(f, np.hstack([v, v[:, :1]]), o, (*COLUMNS, "dose")),
        r"has the column 'dose', which other sites lack; name those",
    ),
    "its target called otherwise": (
        lambda f, v, o: write(f, v, o, target="Outcome"),
        r"lacks the column 'outcome' of the scenario; is it what this site calls 'Outcome'",
    ),
    "numbers as classes": (
        lambda f, v, o: write(f, v, (o == "sick").astype(int)),
        r"its target 'outcome' holds whole numbers, that of other sites text",
    ),
    "no row": (lambda f, v, o: write(f, v[:0], o[:0]), r"its file holds no row"),
    "nothing in it": (lambda f, v, o: f.write_text(""), r"its file is empty"),
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("how", ["deployed", "simulated"])
def test_a_site_that_differs_is_named_with_what_differs(what, how, tmp_path):
    files = written(tmp_path / "data")
    change, expected = DIFFERENT[what]
    change(files[2], *rows_of(2, 12))
    file = scenario(tmp_path, files)
    out = tmp_path / "run"
    with pytest.raises((ScenarioError, RunError), match=expected) as error:
        simulated(file, out) if how == "simulated" else deployed(file, files, out)
    said = str(error.value)
    whose = "site_2" if how == "simulated" else "partition 2"
    assert whose in said
    assert not out.exists() or not (out / "metrics.jsonl").exists()


def test_all_sites_that_differ_are_named_at_once(tmp_path):
    files = written(tmp_path / "data")
    for site in (0, 3):
        DIFFERENT["a column more"][0](files[site], *rows_of(site, 12))
    DIFFERENT["a column of another name"][0](files[1], *rows_of(1, 12))
    file = scenario(tmp_path, files)
    with pytest.raises(ScenarioError) as error:
        deployed(file, files, tmp_path / "run")
    assert [f"partition {site}" in str(error.value) for site in range(4)].count(True) >= 2


def test_an_unknown_label_is_named_and_the_nearest_that_is_known(tmp_path):
    files = written(tmp_path / "data")
    values, outcomes = rows_of(1, 12)
    write(files[1], values, ["Sick" if o == "sick" else o for o in outcomes])
    file = scenario(tmp_path, files, data='labels = ["healthy", "sick"]')
    for run in (simulated, lambda f, out: deployed(f, files, out)):
        with pytest.raises(ScenarioError, match=r"holds 'Sick', .* did you mean 'sick'\?"):
            run(file, tmp_path / "run")


def test_columns_in_another_order_are_said_and_read_by_their_names(tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files)
    as_others = simulated(file, tmp_path / "before")
    values, outcomes = rows_of(1, 9)
    write(files[1], values[:, ::-1], outcomes, COLUMNS[::-1])
    again = simulated(file, tmp_path / "after")
    there = deployed(file, files, tmp_path / "deployed")
    assert outcome(again) == outcome(there) == outcome(as_others)
    for folder in (again, there):
        assert "columns stand in another order at" in (folder / "log.txt").read_text()


# --- what leaves a site, and what does not --------------------------------------------------------


class Listening(Sites):
    """Keeps every byte that nodes send before round 1."""

    def __init__(self, *given, heard, **options):
        super().__init__(*given, **options)
        self.heard = heard

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            if not reply.has_error() and "partition" in reply.content.config_records:
                self.heard.append(str(dict(reply.content.config_records["partition"])))
        return replies


def test_no_row_leaves_a_site_before_round_1(tmp_path):
    files = written(tmp_path / "data")
    heard = []
    deployed(scenario(tmp_path, files), files, tmp_path / "run", grid=Listening, heard=heard)
    told = "".join(heard)
    assert told.count("sha256") == 4
    for site in range(4):
        values, _ = rows_of(site, 12)
        assert not any(repr(float(each))[:10] in told for each in values.reshape(-1))
    assert str(tmp_path) not in told


def test_an_error_about_a_value_says_where_and_not_which(tmp_path):
    files = written(tmp_path / "data")
    text = files[1].read_text().splitlines()
    files[1].write_text("\n".join([*text[:3], "Jane Doe,1.0,2.0,sick", *text[4:]]))
    with pytest.raises(RunError, match="its text is in the node's log") as error:
        deployed(scenario(tmp_path, files), files, tmp_path / "run")
    assert "Jane" not in str(error.value)


@pytest.mark.parametrize(
    ("share", "data", "refused"),
    [
        ([], "", "does not let it tell its classes: name them in"),
        (["labels"], "", "partition 1: does not tell its sums"),
        ([], "standardise = false", "does not let it tell its classes"),
        ([], 'standardise = false\nlabels = ["healthy", "sick"]', None),
        (["sums"], 'labels = ["healthy", "sick"]', None),
        (["labels"], "standardise = false", None),
        (["sums", "labels"], "", None),
    ],
)
def test_a_site_tells_what_its_own_file_lets_it(share, data, refused, tmp_path):
    files = written(tmp_path / "data", sizes=(8, 8))
    mine = tmp_path / "site.toml"
    mine.write_text(f"[site]\nshare = {json.dumps(share)}")
    file = scenario(tmp_path, files, data=data, rounds=1)
    run = [file, files, tmp_path / "run"]
    if refused is None:
        assert outcome(deployed(*run, site_files=[mine, mine]))[0]
    else:
        with pytest.raises((ScenarioError, RunError), match=refused):
            deployed(*run, site_files=[mine, mine])


def test_a_value_that_the_scenario_does_not_list_may_stay_at_the_site(tmp_path):
    files = written(tmp_path / "data", sizes=(8, 8))
    values, outcomes = rows_of(1, 8)
    write(files[1], values, ["Jane Doe", *outcomes[1:]])
    mine = tmp_path / "site.toml"
    mine.write_text('[site]\nshare = ["sums"]')
    file = scenario(tmp_path, files, data='labels = ["healthy", "sick"]')
    with pytest.raises(ScenarioError, match="partition 1: its target holds") as error:
        deployed(file, files, tmp_path / "run", site_files=[mine, mine])
    assert "Jane" not in str(error.value)


# --- where a site's data lie is the site's to say -------------------------------------------------


def test_a_scenario_says_nothing_about_where_a_node_reads(tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files)
    expected = outcome(simulated(file, tmp_path / "simulated"))[0]
    there = deployed(file, files, tmp_path / "run", overrides="data.sites=/etc/passwd")
    assert outcome(there)[0] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "names no data: set data-path"), ("nowhere.csv", "its file is not there")],
)
def test_a_node_without_data_is_named(given, expected, tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files)
    missing = None if given is None else tmp_path / given
    with pytest.raises(RunError, match=expected) as error:
        deployed(file, [files[0], missing, *files[2:]], tmp_path / "run")
    assert str(tmp_path) not in str(error.value).replace(str(file), "")


def test_a_site_file_may_say_where_the_data_lie(tmp_path):
    files = written(tmp_path / "data", sizes=(8, 8))
    mine = []
    for site, data in enumerate(files):
        mine.append(tmp_path / f"site_{site}.toml")
        mine[-1].write_text(f'[site]\ndata = "{data}"')
    file = scenario(tmp_path, files)
    there = deployed(file, [None, None], tmp_path / "run", site_files=mine)
    assert outcome(there) == outcome(simulated(file, tmp_path / "simulated"))
    with pytest.raises(RunError, match="name different data"):
        deployed(file, files[::-1], tmp_path / "other", site_files=mine)


# --- data that change -----------------------------------------------------------------------------


class Changing(Sites):
    """A site's file changes after the sites agreed."""

    def send_and_receive(self, messages, *, timeout=None):
        kinds = {message.metadata.message_type for message in messages}
        if kinds == {"train"} and not getattr(self, "changed", False):
            self.changed = True
            write(self.files[1], *rows_of(77, 9))
        return super().send_and_receive(messages, timeout=timeout)


def test_data_that_change_after_the_sites_agreed_are_not_trained_on(tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files, tables='on_failure = "skip"')
    there = deployed(file, files, tmp_path / "run", grid=Changing)
    failed = [each["clients/failed"] for each in outcome(there)[1][1:]]
    assert failed == [1, 1, 1]


class Restarting(Sites):
    """A site's node is restarted after round 1, with its data or with others."""

    others = None

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        if {m.metadata.message_type for m in messages} == {"train"} and not self.dead:
            self.listed = False
            self.restart(1)
            if self.others is not None:
                self.files[1] = self.others
        return replies


@pytest.mark.parametrize("same", [True, False])
def test_a_node_that_is_restarted_goes_on_with_the_same_data_alone(same, tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files, tables='on_failure = "skip"')
    others = None if same else tmp_path / "others" / "patients.csv"
    if others is not None:
        write(others, *rows_of(77, 9))
    there = deployed(file, files, tmp_path / "run", grid=Restarting, others=others)
    failed = [each["clients/failed"] for each in outcome(there)[1][1:]]
    assert failed == ([0, 0, 0] if same else [0, 1, 1])
    log = (there / "log.txt").read_text()
    assert ("are others than before round 1" in log) is not same


def test_a_run_is_gone_on_with_over_the_same_data_alone(tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files, rounds=4, tables="[checkpoint]\nevery = 1")
    whole = outcome(deployed(file, files, tmp_path / "whole"))

    class Dying(Sites):
        rounds = 0

        def send_and_receive(self, messages, *, timeout=None):
            if {m.metadata.message_type for m in messages} == {"train"}:
                self.rounds += 1
                if self.rounds == 3:
                    raise KeyboardInterrupt
            return super().send_and_receive(messages, timeout=timeout)

    with pytest.raises(KeyboardInterrupt):
        deployed(file, files, tmp_path / "run", grid=Dying)
    write(files[3], *rows_of(78, 11))
    with pytest.raises(RunError, match="the run began with data"):
        deployed(file, files, tmp_path / "run", resume=True)
    write(files[3], *rows_of(3, 11))
    assert outcome(deployed(file, files, tmp_path / "run", resume=True)) == whole


# --- what a scenario with sites cannot have -------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"tables": "[evaluation]\npooled = true", "partition": "test_fraction = 0.2"}, "pooled"),
        ({"partition": "centralised = true"}, "centralised"),
    ],
)
def test_what_needs_all_samples_in_one_place_is_refused_on_nodes(choices, expected, tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files, **choices)
    with pytest.raises(ScenarioError, match=f"{expected}.*needs the samples of all clients"):
        deployed(file, files, tmp_path / "run")
    assert outcome(simulated(file, tmp_path / "simulated"))[0]


def test_in_a_deployment_the_scenario_says_how_many_sites_there_are(tmp_path):
    files = written(tmp_path / "data")
    file = scenario(tmp_path, files)
    file.write_text(file.read_text().replace("clients = 4\n", ""))
    with pytest.raises(ScenarioError, match="how many sites to wait for"):
        deployed(file, files, tmp_path / "run")
    assert outcome(simulated(file, tmp_path / "simulated"))[0]
