"""What a site would tell the server, held to what a node does tell it; and what it never tells."""

import json

import pytest

from fedsim.basics.kernels import settings
from fedsim.cli.doctor.preflight import told
from fedsim.deployment.site import SitePolicy
from fedsim.scenario.load import load
from tests.deployment.sites_apart import Sites, deployed, rows_of, scenario, write, written

MANY = (14, 23)


class Listening(Sites):
    """Keeps what each node tells of its data."""

    def __init__(self, *given, heard, **options):
        super().__init__(*given, **options)
        self.heard = heard

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            if not reply.has_error() and "partition" in reply.content.config_records:
                record = reply.content.config_records["partition"]
                self.heard[record["partition-id"]] = json.loads(record["data"])
        return replies


def looked(file, data, *, share=("labels", "sums"), partition=0):
    findings, document = told.look(load(file), data, SitePolicy(share=share), partition)
    for each in findings:
        assert bool(each.remedy) == (each.state != "ok"), each
    return {each.name.removeprefix("told: "): each for each in findings}, document


@pytest.mark.parametrize("partition", ["", "test_fraction = 0.3"])
def test_it_is_what_a_node_really_tells_the_server(partition, tmp_path):
    files = written(tmp_path / "data", sizes=MANY)
    tables = "[evaluation]\nclients = 2" if partition else ""
    file = scenario(tmp_path, files, rounds=1, partition=partition, tables=tables)
    heard = {}
    deployed(file, files, tmp_path / "run", grid=Listening, heard=heard)
    for site in range(2):
        _, document = looked(file, files[site], partition=site)
        assert json.loads(json.dumps(document)) == heard[site]


def test_it_is_told_in_words_and_no_row_is_among_them(tmp_path):
    files = written(tmp_path / "data", sizes=MANY)
    found, document = looked(scenario(tmp_path, files), files[0])
    values, outcomes = rows_of(0, MANY[0])
    assert {each.state for each in found.values()} == {"ok"}
    assert found["columns"].found == (
        "age, pressure, sugar (numbers, 3 values of a sample); target outcome (text)"
    )
    assert found["counts"].found == "14 to train on, 0 to test on"
    assert found["classes"].found == f"2: {', '.join(sorted(set(outcomes)))}"
    age = values[:, 0].astype("float32").astype(float)
    assert f"over 14: age {age.mean():.4g} +- {age.std():.4g}" in found["sums"].found
    said = json.dumps([document, [each._asdict() for each in found.values()]])
    assert not any(repr(float(each))[:8] in said for each in values.reshape(-1))
    assert str(tmp_path) not in said


def test_what_the_site_s_file_does_not_let_be_told_is_not(tmp_path):
    files = written(tmp_path / "data", sizes=MANY)
    data = 'standardise = false\nlabels = ["healthy", "sick"]'
    found, document = looked(scenario(tmp_path, files, data=data), files[0], share=())
    assert {each.state for each in found.values()} == {"ok"}
    assert found["classes"].found == "none: the scenario lists them"
    assert found["sums"].found == "none: the scenario does not ask for them"
    assert (document["labels"], document["moments"]) == ([], {}) or not document["labels"]


@pytest.mark.parametrize(
    ("share", "data", "name", "said"),
    [
        ((), "", "told", "does not let it tell its classes"),
        (("labels",), "", "sums", "[site] share does not let them"),
    ],
)
def test_what_the_scenario_needs_and_the_site_does_not_tell_is_named(
    share, data, name, said, tmp_path
):
    files = written(tmp_path / "data", sizes=MANY)
    found, _ = looked(scenario(tmp_path, files, data=data), files[0], share=share)
    assert found[name].state == "failed"
    assert said in found[name].found


@pytest.mark.parametrize(
    ("data", "columns", "target", "said"),
    [
        ('features = ["age", "Sugar"]', ("age", "pressure", "sugar"), "outcome",
         "lacks the column 'Sugar' of the scenario; is it what this site calls 'sugar'?"),
        ("", ("age", "pressure", "sugar"), "result", "lacks the column 'outcome'"),
    ],
)  # fmt: skip
def test_a_column_that_the_scenario_needs_and_the_site_lacks_is_named(
    data, columns, target, said, tmp_path
):
    files = written(tmp_path / "data", sizes=MANY)
    values, outcomes = rows_of(0, 14)
    write(files[0], values, outcomes, columns=columns, target=target)
    found, document = looked(scenario(tmp_path, files, data=data), files[0])
    assert document is None
    assert found["told"].state == "failed"
    assert said in found["told"].found


def test_a_value_that_cannot_be_read_is_told_to_nobody_but_the_site(tmp_path, caplog):
    files = written(tmp_path / "data", sizes=MANY)
    lines = files[0].read_text().splitlines()
    files[0].write_text("\n".join([*lines[:3], "Jane Doe,1.0,2.0,sick", *lines[4:]]))
    found, document = looked(scenario(tmp_path, files), files[0])
    assert (document, found["told"].state) == (None, "failed")
    assert "Jane" not in str(found)
    assert "Jane" in caplog.text


def test_a_class_that_the_scenario_does_not_list_is_named(tmp_path):
    files = written(tmp_path / "data", sizes=MANY)
    file = scenario(tmp_path, files, data='labels = ["healthy", "ill"]')
    found, _ = looked(file, files[0])
    assert found["classes"].state == "failed"
    assert "sick" in found["classes"].found
    found, _ = looked(file, files[0], share=("sums",))
    assert "sick" not in found["classes"].found


def test_what_tells_much_of_single_samples_is_noted(tmp_path):
    files = written(tmp_path / "data", sizes=MANY)
    values, _ = rows_of(0, 9)
    write(files[0], values, [f"patient {n}" for n in range(9)])
    found, _ = looked(scenario(tmp_path, files), files[0])
    assert found["classes"].state == found["sums"].state == "note"
    assert "every sample has a class of its own" in found["classes"].found
    assert "of 9 samples they tell much of each" in found["sums"].found


def test_amounts_have_no_classes(tmp_path):
    files = written(tmp_path / "data", sizes=MANY)
    values, _ = rows_of(0, 14)
    write(files[0], values, values.sum(axis=1).tolist())
    data, task = "standardise_target = true", 'kind = "regression"'
    found, _ = looked(scenario(tmp_path, files, data=data, task=task), files[0])
    assert found["classes"].found == "none: the target has none"
    assert "(amounts)" in found["columns"].found


# The scenario under the site's policy.


def test_a_scenario_that_names_code_that_the_site_does_not_allow_is_named_and_not_imported(
    tmp_path,
):
    files = written(tmp_path / "data", sizes=MANY)
    file = scenario(tmp_path, files)
    (tmp_path / "spying.py").write_text(f"open('{tmp_path}/imported', 'w').close()\nnet = dict")
    file.write_text(file.read_text().replace('model = "mlp"', 'model = "spying:net"'))
    found, loaded = told.scenario_of(str(file), [], SitePolicy())
    assert (found.state, loaded) == ("failed", None)
    assert "module 'spying' is none of the app's own" in found.found
    assert not (tmp_path / "imported").exists()


def test_an_override_that_the_site_does_not_allow_is_named(tmp_path):
    file = str(scenario(tmp_path, written(tmp_path / "data", sizes=MANY)))
    found, loaded = told.scenario_of(file, ["rounds=9"], SitePolicy(overrides=("client",)))
    assert (found.state, loaded) == ("failed", None)
    assert "allowed: client" in found.found
    assert told.scenario_of(file, ["rounds=9"], SitePolicy())[1].rounds == 9


def test_a_scenario_that_is_none_is_named():
    found, loaded = told.scenario_of("quickstat", [], SitePolicy())
    assert (found.state, loaded) == ("failed", None)
    assert "did you mean 'quickstart'" in found.found


# Kernels.

PINNED = {name: value for name, value in settings("portable").items() if value is not None}


@pytest.mark.parametrize(
    ("bits", "given", "lacks", "state", "said"),
    [
        ("fast", {}, None, "ok", "are not pinned"),
        ("fast", PINNED, None, "ok", "are pinned"),
        ("portable", PINNED, None, "ok", "are pinned"),
        ("portable", PINNED | {"MKL_CBWR": "AUTO"}, None, "failed", "needs MKL_CBWR set"),
        ("portable", {}, None, "failed", "ATEN_CPU_CAPABILITY"),
        ("portable", PINNED | {"NPY_ENABLE_CPU_FEATURES": "AVX512F"}, None, "failed", "NPY_ENABLE"),
        ("portable", PINNED, "needs AVX2", "failed", "cannot be had here: it needs AVX2"),
    ],
)
def test_kernels_are_those_that_the_scenario_asks_for_or_named(bits, given, lacks, state, said):
    class Asking:
        promise = bits

    found = told.kernels(Asking(), given, lacks)
    assert found.state == state
    assert said in found.found
    assert bool(found.remedy) == (state == "failed")
