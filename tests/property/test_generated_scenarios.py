"""Generated scenarios, right and wrong: none crashes, and every refusal says what to do instead."""

import logging
import re
import tomllib

import pytest
import typer
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fedsim import cli
from fedsim.basics.errors import RunError, ScenarioError
from fedsim.runs.world import build
from fedsim.scenario import discovery
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from tests.property.scenario_documents import (
    ALL_TABLES,
    FACTORY_TABLES,
    TABLES,
    allowed_keys,
    broken,
    distance,
    documents,
    proposal,
    to_toml,
)

# What is there without a download, and models that are built in a moment.
HERE = {
    "data": [
        name
        for name in discovery.names("datasets")
        if not {"path", "repository"} & set(discovery.schema("datasets", name))
    ],
    "task": ["logistic", "mlp", "mlp_dropout", "cnn"],
}

# How a line of a refusal begins (after the file): with a table, a key outside of tables, or what is
# neither.
BEGINS = re.compile(r"\[\w+(\.\w+)*\] |\[\w+\] = |'.*' is not a (table|key) of a scenario|\w+ = ")
# What it must say: what is allowed, what is nearest, or what to do.
ADVISES = re.compile(
    r"must |allowed: |is missing|needs |use |leave |give |say |set it |at most|no such|"
    r"cannot be read|never recorded|name |is too large|holds no"
)

quick = settings(
    max_examples=2 * settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Everything that can be named is imported before anything is drawn; warnings are no matter."""
    for kind in discovery.KINDS:
        discovery.describe(kind)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.toml"


def refusal(file, document, overrides=()):
    """Load what a document says: the lines of its refusal without the file, or the scenario."""
    text = to_toml(document)
    tomllib.loads(text)
    file.write_text(text, encoding="utf-8")
    try:
        return load(file, overrides)
    except ScenarioError as error:
        lines = str(error).splitlines()
    for line in lines:
        assert line.startswith(f"{file}: "), line
    return [line.removeprefix(f"{file}: ") for line in lines]


def hold(lines):
    """Hold the lines of a refusal to naming a place, and to saying what to do."""
    for line in lines:
        assert line.isprintable()
        assert BEGINS.match(line), line
        assert ADVISES.search(line), line


@quick
@given(wrong=broken())
def test_what_is_wrong_is_refused_with_its_place_and_what_is_allowed(file, wrong):
    loaded = refusal(file, wrong.document)
    if isinstance(loaded, Scenario):
        assert not wrong.certain, wrong
        return
    hold(loaded)
    assert any(all(part in line for part in wrong.parts) for line in loaded), (wrong.parts, loaded)


@quick
@given(document=documents(careful=True) | documents(careful=False))
def test_a_scenario_is_read_back_the_same_or_refused(file, document):
    loaded = refusal(file, document)
    event("loaded" if isinstance(loaded, Scenario) else "refused")
    if not isinstance(loaded, Scenario):
        hold(loaded)
        return
    again = Scenario.from_resolved(loaded.resolved(), loaded.origin)
    assert again == loaded
    assert again.sha256 == loaded.sha256


@settings(quick, max_examples=60)
@given(document=documents(careful=True, only=HERE))
def test_what_can_be_loaded_can_be_built_or_is_refused(file, document):
    loaded = refusal(file, document)
    if not isinstance(loaded, Scenario):
        return
    try:
        with loaded.named_in_refusals():
            world = build(loaded)
    except ScenarioError as error:
        lines = str(error).splitlines()
        assert all(line.startswith(f"{file}: [") for line in lines), lines
        hold([line.removeprefix(f"{file}: ") for line in lines])
        event("refused when built")
    except RunError:
        event("its data cannot be had")
    else:
        assert world.data.num_clients >= 1
        event("built")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("client.batch_size=1000000000", "[client] batch_size = 1000000000: all clients together"),
        ("partition={kind='pathological', clients=4611686018427387904}", "[partition] clients = "),
        ("data={name='synthetic', dimension=4611686018427387904}", "is too large: "),
    ],
)
def test_a_number_that_no_memory_has_room_for_is_refused_by_name(override, expected):
    overrides = [override]
    if "synthetic" in override:
        overrides.append("partition={kind='natural', clients=50}")
    loaded = load("quickstart", overrides)
    with pytest.raises(ScenarioError) as caught, loaded.named_in_refusals():
        build(loaded)
    assert expected in str(caught.value)
    assert f" = {re.search(r'[0-9]{10,}', override)[0]}: " in str(caught.value)
    hold([str(caught.value).removeprefix("quickstart: ").removeprefix("quickstart.toml: ")])


# Overrides and command lines.


@st.composite
def assignments(draw):
    table = draw(st.sampled_from([*TABLES, "expect", "rounds", "title", "engin", "", "é"]))
    key = draw(st.sampled_from(["name", "kind", "clients", "a/b.min", "", '"x', "x.y.z"]))
    odd = ["1", "-1", "x", "{}", "{", "[", "nan", "'", '"a', "1979-05-27", "="]
    value = draw(st.sampled_from(odd) | st.text(max_size=5))
    return draw(st.sampled_from([f"{table}.{key}={value}", f"{table}={value}", f"{table}{value}"]))


@quick
@given(overrides=st.lists(assignments(), min_size=1, max_size=2))
def test_overrides_are_applied_or_refused(overrides):
    lines = []
    try:
        loaded = load("quickstart", overrides)
        assert Scenario.from_resolved(loaded.resolved(), loaded.origin) == loaded
    except ScenarioError as error:
        lines = str(error).splitlines()
    assert all(line.startswith(("quickstart: ", "--set ")) for line in lines), lines


WORDS = [
    "run", "resume", "list", "partition", "new", "--json", "--quiet", "--set", "--out", "--workers",
    "--png", "--client", "--version", "--help", "-q", "--", "-", "", "0", "-1", "99", "x.toml", ".",
    "quickstart", "strategies", "fedavg", "flower:", "a:b", "rounds=", "rounds=0", "é", "\x00", "/",
]  # fmt: skip


@quick
@given(arguments=st.lists(st.sampled_from(WORDS), max_size=5))
def test_command_lines_end_with_a_known_exit_code_and_no_traceback(
    file, arguments, capfd, monkeypatch
):
    monkeypatch.setattr("fedsim.runs.start.start", lambda *_, **__: pytest.skip("would run"))
    command = typer.main.get_command(cli.app)
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments), prog_name="fedsim")
    out, err = capfd.readouterr()
    assert ended.value.code in (0, 2), (arguments, err)
    assert "Traceback" not in out + err
    assert ended.value.code == 0 or err.strip()


# The measures by which this file judges.


def test_the_distance_counts_edits():
    assert distance("kitten", "sitting") == 3
    assert distance("", "abc") == 3
    assert distance("fedau", "fedavg") == 2


def test_a_proposal_is_asked_for_where_one_name_alone_is_near():
    assert proposal("clinets", "clients", ["clients", "alpha"]) == ("did you mean 'clients'?",)
    assert proposal("fedax", "fedau", ["fedau", "fedavg"]) == ()
    assert set(FACTORY_TABLES) <= set(ALL_TABLES)
    assert "server_lr" in allowed_keys("strategy", {"name": "fedavg"})
