"""The parts of `[client]`: how a scenario lists them, what adds them, what is refused."""

import pytest

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.client.part import ClientPart
from fedsim.scenario.identity import identity_of
from fedsim.scenario.parts import spelled_out

INLINE = "engine.kind=inline"
MU = "client.parts=[{name='proximal', mu=0.5}]"


def load(*overrides, name="quickstart"):
    return fedsim.load_scenario(name, [INLINE, *overrides])


class Mine(ClientPart):
    """A part of a user's."""

    def __init__(self, *, strength_of_mine: float = 2.0) -> None:
        self.given = strength_of_mine


def test_a_part_is_complete_in_the_resolved_scenario_and_made_with_its_procedure():
    scenario = load("client.parts=[{name='margin', coefficient=1}]")
    margin = {"name": "margin", "coefficient": 1.0, "space": "probability", "reduction": "batch"}
    assert scenario.client["parts"] == [margin]
    again = fedsim.Scenario.from_resolved(scenario.resolved(), "again")
    assert (again.client, again.sha256) == (scenario.client, scenario.sha256)
    assert scenario.choices["client"].make().needs_classes == "margin.coefficient = 1.0"


@pytest.mark.parametrize(
    ("former", "part"),
    [
        (["client.proximal=0.5"], {"name": "proximal", "mu": 0.5}),
        (["client.margin=0.2", "client.margin_space=logit"],
         {"name": "margin", "coefficient": 0.2, "space": "logit", "reduction": "batch"}),
        (["client.setup_epochs=3"], {"name": "exploration", "epochs": 3, "lr": None}),
        (["client.guidance=gradient"], {"name": "guidance", "acts_on": "gradient"}),
    ],
)  # fmt: skip
def test_a_former_key_is_short_for_its_part(former, part):
    scenario = load(*former)
    assert scenario.client["parts"] == [part]
    listed = ", ".join(f"{k}={v!r}" for k, v in part.items() if v is not None)
    assert load(f"client.parts=[{{{listed}}}]").sha256 == scenario.sha256


def as_it_was(resolved, **given):
    """The table as it was written before there were parts, with all its keys."""
    defaults = {
        "proximal": 0.0, "margin": 0.0, "margin_space": "probability", "margin_reduction": "batch",
        "guidance": "step", "setup_epochs": None, "setup_lr": None,
    }  # fmt: skip
    own = {key: value for key, value in resolved["client"].items() if key != "parts"}
    return {**own, **defaults, **given}


def test_scenarios_of_before_keep_their_hash():
    resolved = load("client.margin=0.2").resolved()
    before = as_it_was(resolved, margin=0.2)
    assert identity_of({**resolved, "client": before}) == identity_of(resolved)
    old = fedsim.Scenario.from_resolved({**resolved, "client": before}, "old")
    assert old.sha256 == identity_of(resolved)
    assert load().sha256 != old.sha256


def test_a_former_key_at_its_default_adds_nothing():
    assert load("client.proximal=0.0", "client.guidance=step").client["parts"] == []


def test_an_override_finds_the_part_in_the_list():
    scenario = load(MU)
    for override in ("client.parts.proximal.mu=0.7", "client.proximal=0.7"):
        assert load(MU, override).client["parts"] == [{"name": "proximal", "mu": 0.7}]
        changed = scenario.with_overrides([override])
        assert changed.client["parts"] == [{"name": "proximal", "mu": 0.7}]
    # a value that says nothing by itself says something beside the list
    assert scenario.with_overrides(["client.proximal=0.0"]).client["parts"][0]["mu"] == 0.0


def test_the_order_of_parts_is_part_of_the_identity():
    one = "client.parts=[{name='proximal'}, {name='tests.scenario.test_client_table:Mine'}]"
    two = "client.parts=[{name='tests.scenario.test_client_table:Mine'}, {name='proximal'}]"
    assert load(one).sha256 != load(two).sha256


def test_a_part_of_a_users_own_is_named_by_import_path():
    scenario = load(
        "client.parts=[{name='tests.scenario.test_client_table:Mine', strength_of_mine=3}]"
    )
    assert scenario.client["parts"][0]["strength_of_mine"] == 3.0
    assert "tests.scenario.test_client_table:Mine" in scenario.import_paths
    assert scenario.own_code == ["[client.parts] name = 'tests.scenario.test_client_table:Mine'"]


def test_a_strategy_adds_the_part_that_it_needs_and_takes_it_along():
    scenario = load("strategy.name=fedlex")
    assert scenario.client["parts"] == [{"name": "guidance", "acts_on": "step"}]
    assert scenario.resolved()["client"]["parts"] == []
    assert load().with_overrides(["strategy={name='fedlex'}"]).sha256 == scenario.sha256
    assert scenario.with_overrides(["strategy={name='fedavg'}"]).client["parts"] == []
    own = load("strategy.name=fedlex", "client.parts.guidance.acts_on=gradient")
    assert own.client["parts"] == [{"name": "guidance", "acts_on": "gradient"}]
    assert own.resolved()["client"]["parts"] == own.client["parts"]


def test_a_part_that_is_listed_takes_what_it_does_not_say_from_the_strategy():
    ridge = "client.parts.personal_mixture.alpha_ridge=0.1"
    scenario = load("strategy={name='apfl', alpha=0.75}", ridge)
    (part,) = scenario.client["parts"]
    assert (part["alpha"], part["alpha_ridge"]) == (0.75, 0.1)
    changed = scenario.with_overrides(["strategy.alpha=0.25"])
    assert changed.client["parts"][0]["alpha"] == 0.25
    assert changed.client["parts"][0]["alpha_ridge"] == 0.1
    again = fedsim.Scenario.from_resolved(scenario.resolved(), "again")
    assert (again.client, again.sha256) == (scenario.client, scenario.sha256)


def test_what_the_strategy_decides_is_not_decided_twice():
    prox = 'strategy={name="flower:FedProx", proximal_mu=0.2}'
    resolved = load(prox).resolved()
    assert (
        identity_of({**resolved, "client": as_it_was(resolved, proximal=0.2)}) == load(prox).sha256
    )
    assert load(prox).client["parts"] == [{"name": "proximal", "mu": 0.2}]
    changed = load(prox).with_overrides(["strategy.proximal_mu=0.4"])
    assert changed.client["parts"] == [{"name": "proximal", "mu": 0.4}]
    with pytest.raises(ScenarioError, match=r"proximal: mu = 0\.5: must be 0\.2 as \[strategy\]"):
        load(prox, MU)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("client.parts=[{name='proximl'}]", "did you mean 'proximal'"),
        ("client.parts=[{name='proximal', muu=1}]", "'muu' is not a hyperparameter of proximal"),
        ("client.parts=[{name='proximal', mu=-1}]", "[client.parts] mu = -1.0: must be >= 0"),
        ("client.parts=[{name='proximal', mu='x'}]", 'mu = "x": must be a number'),
        ("client.parts=[{name='proximal'}, {name='proximal'}]", "Proximal is there twice"),
        ("client.parts=[{mu=1}]", "[client.parts] 'name' is missing"),
        ("client.parts=[3]", "must be a list of tables such as"),
        ("client.parts='proximal'", "must be a list of tables such as"),
        ("client.parts=[{name='proximal', local_lr=1}]", "is a key of [client]; write it there"),
        ("client.parts=[{name='tests.scenario.test_client_table:load'}]", "subclass of ClientPart"),
        ("client.part=[{name='proximal'}]", "'part' is not a hyperparameter of local_sgd; did you"),
        ("client.parts.proximal=3", "is a list; say which of its tables by name and key"),
    ],
)  # fmt: skip
def test_a_wrong_part_is_refused_with_what_is_right(given, words):
    with pytest.raises(ScenarioError) as refused:
        load(given)
    assert words in str(refused.value)


def test_a_file_that_says_a_part_twice_is_refused():
    with pytest.raises(ScenarioError, match='is short for mu of the part "proximal", which parts'):
        spelled_out({"proximal": 0.1, "parts": [{"name": "proximal"}]})
