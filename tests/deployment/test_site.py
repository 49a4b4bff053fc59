"""What a site lets others' scenarios do on its node, and what of its errors leaves it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsim.basics import kernels_in_use
from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.import_paths import permitting, resolve
from fedsim.deployment import flower_app, site
from fedsim.deployment.site import SitePolicy, read_policy
from fedsim.federation.grids.nodes import PartitionGrid
from tests.deployment.site_code import SECRET
from tests.deployment.sites_apart import deployed, outcome, scenario, written
from tests.federation.grids.fleet import Fleet

SCENARIO = "scenarios/deploy_two_clients.toml"
OWN = "'task={model=\"tests.deployment.site_code:linear\"}'"


def fleet(overrides, file=None):
    """Two nodes of sites with that site file, asked for a scenario with these overrides."""

    def app(message, context):
        if file is not None:
            context.node_config["site"] = str(file)
        return flower_app.client_app(message, context)

    return Fleet(app, 2, run_config={"scenario": SCENARIO, "set": overrides})


def asked(overrides, file=None):
    """Ask the nodes for their partitions, as every run does first."""
    grid = PartitionGrid(fleet(overrides, file), 2, timeout_s=0.2)
    return len(grid.nodes)


@pytest.fixture
def site_file(tmp_path):
    def write(**keys):
        file = tmp_path / "site.toml"
        lines = [f"{name} = {json.dumps(value)}" for name, value in keys.items()]
        file.write_text("\n".join(["[site]", *lines]))
        return file

    return write


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "subprocess:getoutput",
        "tests.deployment.site_code:os.system",  # what a module of the app's own has imported
        "tests.deployment.site_code:__loader__.load_module",
        "fedsim.basics.import_paths:importlib.import_module",
        "runpy:run_path",
    ],
)
def test_a_run_config_runs_nothing_on_a_node_that_is_not_the_app_s_own(name, tmp_path):
    mark = tmp_path / "ran"
    table = f'data={{name="{name}",command="touch {mark}"}}'
    with pytest.raises(RunError, match=r"none of the app's own|belongs to no module"):
        asked(f"'{table}'")
    assert not mark.exists()


@pytest.mark.parametrize("path", ["posixpath:os.system", "tests.deployment.site_code:linear"])
def test_outside_of_nodes_import_paths_are_what_they_were(path):
    assert callable(resolve(path, what="here"))


def test_what_is_refused_in_a_context_is_refused_there_alone():
    with permitting(SitePolicy().why_not), pytest.raises(ScenarioError, match="add it to"):
        resolve("collections:OrderedDict", what="here")
    with permitting(SitePolicy(imports=("collections",)).why_not):
        assert resolve("collections:OrderedDict", what="here")
    assert resolve("collections:OrderedDict", what="here")


def test_what_an_allowed_module_has_imported_is_not_allowed_with_it():
    with (
        permitting(SitePolicy(imports=("posixpath",)).why_not),
        pytest.raises(ScenarioError, match="'posix'"),
    ):
        resolve("posixpath:os.system", what="here")


def test_nothing_of_an_app_that_is_installed_is_its_own(monkeypatch):
    assert SitePolicy().why_not("tests.deployment.site_code") is None
    monkeypatch.setattr(site, "_APP", Path("/usr/lib/python3/site-packages"))
    assert SitePolicy().why_not("tests.deployment.site_code")
    assert SitePolicy(imports=("tests",)).why_not("tests.deployment.site_code") is None


def test_an_app_s_own_model_and_plain_overrides_need_no_site_file():
    assert asked(f"{OWN} rounds=2") == 2


@pytest.mark.parametrize(
    ("allowed", "overrides", "refused"),
    [
        ([], "rounds=2", "rounds=2"),
        (["client"], "rounds=2", "rounds=2"),
        (["client"], "client.local_lr=0.1 data.name=iris", "data.name=iris"),
        (None, "modules=/tmp/evil", "modules=/tmp/evil"),
        (["modules"], "modules=/tmp/evil", "modules=/tmp/evil"),
    ],
)
def test_what_set_may_not_change_is_refused(allowed, overrides, refused, site_file):
    file = site_file() if allowed is None else site_file(overrides=allowed)
    with pytest.raises(RunError) as error:
        asked(overrides, file)
    assert refused in str(error.value)


def test_what_set_may_change_is_taken(site_file):
    assert asked("client.local_lr=0.1 rounds=2", site_file(overrides=["client", "rounds"])) == 2


@pytest.mark.parametrize(("errors", "quoted"), [(None, False), ("place", False), ("text", True)])
def test_an_error_tells_its_place_and_its_text_only_where_the_site_says_so(
    errors, quoted, site_file, monkeypatch, caplog
):
    monkeypatch.setenv("FEDSIM_TEST_QUOTES", "1")
    with pytest.raises(RunError) as error:
        asked(OWN, None if errors is None else site_file(errors=errors))
    assert (SECRET in str(error.value)) is quoted
    assert quoted or "ScenarioError at fedsim.tasks.task:" in str(error.value)
    assert SECRET in caplog.text  # the site's own log has it


def test_an_error_that_comes_of_another_leaves_no_text_of_either_behind(caplog):
    def answer(message, context, policy, known):
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise RuntimeError(f"no {error}") from error

    instruction = SimpleNamespace(metadata=SimpleNamespace(message_type="train", group_id="1"))
    context = SimpleNamespace(node_config={}, run_config={}, run_id=1)
    with pytest.raises(site.SiteError) as error:
        site.at_site(answer, instruction, context)
    assert SECRET not in str(error.value)
    assert "RuntimeError at tests.deployment.test_site:" in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    number = str(error.value).rpartition(" ")[2]
    assert f"error {number}" in caplog.text
    assert SECRET in caplog.text


def test_a_site_notes_every_instruction(site_file, tmp_path):
    record = tmp_path / "audit.jsonl"
    file = site_file(audit=str(record))
    asked("rounds=2", file)
    with pytest.raises(RunError):
        asked('\'data={name="os:system",command="true"}\'', file)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["error"] is None for line in lines] == [True, True, False, False]
    assert {line["instruction"] for line in lines} == {"query"}
    assert all(line["scenario"] == SCENARIO for line in lines)
    assert len(lines[0]["scenario_sha256"]) == 64
    assert lines[2]["scenario_sha256"] is None
    assert "os:system" in lines[2]["set"]


def test_a_site_whose_record_cannot_be_written_answers_nothing(site_file, tmp_path):
    with pytest.raises(RunError, match="record of instructions cannot be written"):
        asked("rounds=2", site_file(audit=str(tmp_path / "missing" / "audit.jsonl")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sites]", "did you mean 'site'"),
        ("[site]\nimport = []", "did you mean 'imports'"),
        ("[site]\nimports = 'torch'", "must be a list of names"),
        ("[site]\noverrides = [1]", "must be a list of names"),
        ("[site]\nmetrics = 'loss'", "must be a list of names"),
        ("[site]\nmetric = ['loss']", "did you mean 'metrics'"),
        ("[site]\nerrors = 'texts'", "did you mean 'text'"),
        ("[site]\naudit = 'log.jsonl'", "must be an absolute path"),
        ("site = 1", "must be a table"),
        ("[site", "cannot be read"),
    ],
)
def test_a_wrong_site_file_is_named_with_the_key(text, said, tmp_path):
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=said) as error:
        read_policy(file)
    assert str(file) in str(error.value)


def test_under_a_wrong_site_file_nothing_is_answered(tmp_path):
    with pytest.raises(RunError, match=r"ScenarioError at fedsim\.deployment\.site"):
        asked("rounds=2", tmp_path / "missing.toml")


@pytest.mark.parametrize("name", ["os:system", "tests.deployment.site_code:os.system"])
def test_nor_does_it_on_the_server(name, tmp_path):
    mark = tmp_path / "ran"
    overrides = f'\'data={{name="{name}",command="touch {mark}"}}\''
    context = SimpleNamespace(
        run_config={"scenario": SCENARIO, "set": overrides, "out": str(tmp_path / "run")}, run_id=1
    )
    with pytest.raises(ScenarioError, match="none of the app's own"):
        flower_app.main(fleet(overrides), context)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_the_machine_of_a_superexec_may_name_the_file_instead(site_file, monkeypatch):
    monkeypatch.setenv("FEDSIM_SITE", str(site_file(overrides=[])))
    with pytest.raises(RunError, match="allowed: nothing"):
        asked("rounds=2")
    context = SimpleNamespace(run_config={"scenario": SCENARIO, "set": "rounds=2"}, run_id=1)
    with pytest.raises(ScenarioError, match="allowed: nothing"):
        flower_app.main(fleet("rounds=2"), context)


def test_what_another_processor_would_be_needed_for_is_said_in_words(monkeypatch):
    """On any processor: also on one whose kernels are those of portable bits already."""
    found = kernels_in_use.in_use() | {"mkl": "2024.2 AUTO"}
    monkeypatch.setattr(kernels_in_use, "in_use", lambda: found)
    with pytest.raises(RunError, match="this process computes with other kernels"):
        asked("engine.bits=portable")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("3", "must be a table, such as"),
        ("{}", "must be a table, such as"),
        ("{ rome = 0 }", "rome = 0: must be Flower's number of a node and its partition"),
        ("{ 4711 = '0' }", '4711 = "0": must be'),
        ("{ 4711 = -1 }", "4711 = -1: must be"),
        ("{ 4711 = true }", "4711 = true: must be"),
        ("{ 4711 = 0, 4712 = 0 }", "two nodes hold partition 0"),
    ],
)
def test_a_server_s_file_that_binds_nodes_wrongly_is_refused(nodes, expected, tmp_path):
    file = tmp_path / "site.toml"
    file.write_text(f"[site]\nnodes = {nodes}\n")
    with pytest.raises(ScenarioError, match=re.escape(expected)):
        read_policy(file)


def test_the_server_holds_nodes_to_the_partitions_of_its_own_file(monkeypatch, tmp_path):
    file = tmp_path / "server.toml"
    monkeypatch.setenv("FEDSIM_SITE", str(file))
    nodes = fleet("rounds=1")
    config = {"scenario": SCENARIO, "set": "rounds=1", "out": str(tmp_path / "run"), "wait-s": 1.0}
    context = SimpleNamespace(run_config=config, run_id=1)
    first, second = nodes.nodes.values()
    file.write_text(f"[site]\nnodes = {{ {first} = 1, {second} = 0 }}\n")
    with pytest.raises(RunError, match="says partition 0, and holds 1"):
        flower_app.main(nodes, context)
    file.write_text(f"[site]\nnodes = {{ {first} = 0, {second} = 1 }}\n")
    config["out"] = str(tmp_path / "again")
    flower_app.main(nodes, context)
    assert (tmp_path / "again" / "summary.json").is_file()


EVALUATED = "[evaluation]\nclients = 3\nevery = 1\n"


def three_sites(tmp_path, evaluated, *own):
    """Runs three sites with these lines in their site files, by site; returns the run's folder."""
    files = written(tmp_path / "data", sizes=(14, 9, 12))
    mine = []
    for place, lines in enumerate(own):
        mine.append(tmp_path / f"site_{place}.toml")
        mine[-1].write_text(f"[site]\n{lines}\n")
    more = {"partition": "test_fraction = 0.3"} if evaluated else {}
    file = scenario(tmp_path, files, tables=EVALUATED if evaluated else "", **more)
    return deployed(file, files, tmp_path / "run", site_files=mine)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_site_that_allows_what_is_told_changes_nothing(evaluated, tmp_path):
    told = 'metrics = ["loss", "accuracy"]'
    for name in ("free", "held"):
        (tmp_path / name).mkdir()
    free = three_sites(tmp_path / "free", evaluated, "", "", "")
    held = three_sites(tmp_path / "held", evaluated, told, told, told)
    assert outcome(held) == outcome(free)
    assert ("local/accuracy" in outcome(free)[1][-1]) == evaluated


def test_what_a_site_does_not_allow_to_be_told_stays_there_and_is_named(tmp_path):
    run = three_sites(tmp_path, False, "", "metrics = []", "")
    rounds = [json.loads(line) for line in (run / "participation.jsonl").read_text().splitlines()]
    assert [each["failed"] for each in rounds] == [{"1": "raised"}] * 3
    assert (
        "metrics loss: this node's site file lets the server know none"
        in (run / "log.txt").read_text()
    )


def test_a_site_that_tells_its_loss_alone_is_not_evaluated_and_still_trains(tmp_path):
    every = 'metrics = ["loss", "accuracy"]'
    for name in ("free", "held"):
        (tmp_path / name).mkdir()
    free = outcome(three_sites(tmp_path / "free", True, every, every, every))
    run = three_sites(tmp_path / "held", True, every, 'metrics = ["loss"]', every)
    rounds = [json.loads(line) for line in (run / "participation.jsonl").read_text().splitlines()]
    assert [each["failed"] for each in rounds] == [{}] * 3
    found = outcome(run)
    assert found[0] == free[0]  # it has trained
    assert found[1][-1]["local/loss"] != free[1][-1]["local/loss"]  # and was not measured
    assert "metrics accuracy: this node's site file" in (run / "log.txt").read_text()
