"""Keys without effect are named, and named when they are without effect only."""

import pytest

import fedsim
from fedsim.runs.world import build
from fedsim.scenario import discovery
from fedsim.scenario.idle_keys import idle_keys

GOSSIP = 'strategy={name="gossip", '


def lines(*overrides):
    return idle_keys(fedsim.load_scenario("quickstart", ["engine.kind=inline", *overrides]))


@pytest.mark.parametrize(
    ("idle", "said", "not_idle"),
    [
        (["client.betas=[0.5, 0.9]"], '0.9]: is without effect with optimizer = "sgd"',
         ["client.optimizer=adam"]),
        (["client.epsilon=1e-4"], "epsilon = 0.0001", ["client.optimizer=adam"]),
        (["client.keep_optimizer=true"], "and momentum = 0", ["client.momentum=0.5"]),
        (["client.margin_space=logit"],
         'margin: space = "logit": is without effect with coefficient = 0.0',
         ["client.margin=0.1"]),
        (["client.guidance=gradient"], '"fedavg", which sends no guidance',
         ["strategy.name=fedlex"]),
        (["client.parts=[{name='alternating'}]", "client.local_epochs=2", "task.model=mlp"],
         "alternating: is without effect with [task] personal = []: say there which tensors",
         ["task.personal=['output']", "client.local_epochs=3"]),
        (["client.parts=[{name='frozen'}]", "task.model=mlp"], "or name them by tensors",
         ["client.parts=[{name='frozen', tensors=['output']}]"]),
        (["client.setup_epochs=2"], "no set-up exchange", ["strategy.name=fedlex"]),
        ([GOSSIP + "interval=[1, 2]}"], '[strategy] interval = [1, 2]: is without',
         ["strategy.protocol=buffered"]),
        (["strategy.server={name='adam', flower_compat=true, v_init='zero'}"],
         '[strategy.server] v_init = "zero": is without effect with flower_compat = true',
         ["strategy.server.flower_compat=false"]),
        (["strategy={name='fedyogi', flower_compat=true, weighted=false}"],
         "[strategy] weighted = false: is without", ["strategy.flower_compat=false"]),
        ([GOSSIP + "buffer_ratio=0.5}"], '= "synchronous"', ["strategy.protocol=buffered"]),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_named(idle, said, not_idle):
    (line,) = lines(*idle)
    assert said in line
    assert not lines(*idle, *not_idle)


def test_masked_gradients_under_adam_are_warned_of():
    masked = ["strategy.name=fedlex", "client.guidance=gradient"]
    (line,) = lines(*masked, "client.optimizer=adam")
    assert "whose steps are as long whatever it says" in line
    assert not lines(*masked)


def test_epochs_beside_steps_are_named():
    (line,) = lines("client.local_steps=3")
    assert line == "[client] local_epochs = 5: is without effect with local_steps = 3"
    assert not lines("client.local_steps=3", "client.local_epochs=1")


@pytest.mark.parametrize(
    "strategy", ['{name="flower:FedAdam"}', '{name="flower:FedProx", proximal_mu=0.1}']
)
def test_strategies_of_others_are_believed(strategy):
    assert not lines(f"strategy={strategy}", "client.guidance=gradient")


def test_a_run_is_told_before_it_begins():
    scenario = fedsim.load_scenario("quickstart", ["client.epsilon=1e-4", "engine.kind=inline"])
    assert idle_keys(scenario)[0] in build(scenario).notes


@pytest.mark.parametrize("name", discovery.names("scenarios"))
def test_scenarios_that_come_with_fedsim_say_nothing_in_vain(name):
    assert not idle_keys(fedsim.load_scenario(name))
