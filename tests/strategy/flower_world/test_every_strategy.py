"""Every strategy that Flower ships, found in its package: it runs and resumes, or says why not."""

import inspect

import flwr.serverapp.strategy as flowers
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsim.basics.errors import ScenarioError
from fedsim.runs import start as run
from fedsim.runs.world import build
from fedsim.scenario import discovery
from tests.strategy.flower_world.worlds import ARGUMENTS, WRAPPERS, flower, records, scenario, train

SHIPPED = [
    name
    for name in flowers.__all__
    if inspect.isclass(getattr(flowers, name))
    and issubclass(getattr(flowers, name), flowers.Strategy)
    and not inspect.isabstract(getattr(flowers, name))
]
TREES = [name for name in SHIPPED if name.startswith("FedXgb")]
USABLE = [name for name in SHIPPED if name not in TREES]


def test_flower_ships_strategies_and_all_but_trees_are_listed():
    assert len(SHIPPED) > 10
    assert discovery.flower_names() == sorted(f"flower:{name}" for name in USABLE)


@pytest.mark.parametrize("name", TREES)
def test_strategies_of_boosted_trees_are_refused_with_the_reason(name):
    with pytest.raises(ScenarioError, match="aggregates boosted trees, where fedsim trains tens"):
        scenario(flower(name))


@pytest.mark.parametrize("name", USABLE)
def test_a_run_learns_and_resumes_to_the_undisturbed_bits(tmp_path, name):
    whole = run.start(scenario(flower(name)), out=tmp_path / "run")
    expected = records(whole)
    model = load_file(whole.folder / "params.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in model.values())
    losses = [record["test/loss"] for record in expected]
    assert len(losses) == 4
    assert len(set(losses)) == 4  # no round was skipped
    if name not in WRAPPERS:
        assert losses[3] < losses[0]
    for place in sorted((whole.folder / "checkpoints").iterdir())[2:]:
        place.unlink()
    (whole.folder / "summary.json").unlink()
    again = run.resume(whole.folder)
    assert again.summary["params_sha256"] == whole.summary["params_sha256"]
    assert records(again) == expected


@pytest.mark.parametrize("name", USABLE)
def test_an_argument_without_a_default_is_asked_for_by_name(name):
    signature = inspect.signature(getattr(flowers, name)).parameters.values()
    required = {p.name for p in signature if p.default is inspect.Parameter.empty}
    required -= {"strategy", "num_sampled_clients"}  # they have defaults here
    assert required <= ARGUMENTS.get(name, {}).keys()
    if not required:
        scenario({"name": f"flower:{name}"})
        return
    with pytest.raises(ScenarioError) as refused:
        scenario({"name": f"flower:{name}"})
    for argument in required:
        assert f"[strategy] '{argument}' is missing: give a" in str(refused.value)


def test_q_fair_averaging_weighs_by_the_loss_that_clients_report():
    fair, world = train(flower("QFedAvg", q=2.0), rounds=1)
    mean, _ = train({"name": "fedavg", "weighted": False}, rounds=1)
    assert world.strategy.train_loss_key == "loss"
    assert not np.allclose(fair, mean, atol=1e-4)
    # Li et al. 2020: with q = 0 the step is the plain mean of the updates
    none, _ = train(flower("QFedAvg", q=0.0), rounds=1)
    np.testing.assert_allclose(none, mean, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("FedAdam", {"eta": -1.0}, "eta = -1.0: must be > 0 and finite"),
        ("FedYogi", {"beta_1": 1.0}, "beta_1 = 1.0: must be in [0, 1)"),
        ("FedAdam", {"beta_2": -0.5}, "beta_2 = -0.5: must be in [0, 1)"),
        ("FedAdagrad", {"tau": 0.0}, "tau = 0.0: must be > 0 and finite"),
        ("FedAvgM", {"server_learning_rate": -5.0}, "server_learning_rate = -5.0: must be > 0"),
        ("FedAvgM", {"server_momentum": 1.0}, "server_momentum = 1.0: must be in [0, 1)"),
        ("QFedAvg", {"q": -1.0}, "q = -1.0: must be >= 0"),
        (
            "FedAvg",
            {"weighted_by_key": "num_examples"},
            "weighted_by_key: 'num_examples' is not a metric that clients measure in training; did "
            "you mean 'num-examples'? allowed: loss, num-examples",
        ),
        ("FedAdam", {"eta_l": 0.1}, "'eta_l' is not a hyperparameter of flower:FedAdam"),
        (
            "Krum",
            {"num_malicious_nodes": 3},
            "num_malicious_nodes = 3 with 8 clients per round: must be at most 2, for a round "
            "needs 2 num_malicious_nodes + 3 replies",
        ),
        ("Bulyan", {"num_malicious_nodes": 2}, "must be at most 1, for a round needs 4 num_mal"),
        (
            "MultiKrum",
            {"num_nodes_to_select": 9},
            "num_nodes_to_select = 9 with 8 clients per round: must be at most 8",
        ),
    ],
)
def test_what_flower_takes_and_no_round_can_do_is_refused(name, given, words):
    with pytest.raises(ScenarioError) as refused:
        build(scenario(flower(name, **given)))
    assert words in str(refused.value)


# FedProx leaves its term to the clients.


def test_fedprox_is_averaging_with_the_proximal_term_at_the_clients():
    prox, world = train(flower("FedProx", proximal_mu=0.5))
    assert world.scenario.client["parts"] == [{"name": "proximal", "mu": 0.5}]
    client = {"local_lr": 0.1, "batch_size": 16}
    same, _ = train({"name": "fedavg"}, client={**client, "proximal": 0.5})
    np.testing.assert_allclose(prox, same, atol=1e-6)
    without, _ = train({"name": "fedavg"})
    assert np.abs(prox - without).max() > 1e-3


def test_fedprox_with_another_term_at_the_clients_is_refused():
    client = {"local_lr": 0.1, "proximal": 0.3}
    with pytest.raises(ScenarioError) as refused:
        scenario(flower("FedProx"), client=client)
    assert str(refused.value).endswith(
        '[client.parts] proximal: mu = 0.3: must be 0.5 as [strategy] name = "flower:FedProx" has '
        "it; leave it out"
    )
    assert scenario(flower("FedProx"), client={**client, "proximal": 0.5})


def test_fedprox_inside_a_wrapper_asks_the_clients_too():
    private = flower("DifferentialPrivacyServerSideFixedClipping", strategy=flower("FedProx"))
    assert scenario(private).client["parts"] == [{"name": "proximal", "mu": 0.5}]


def test_a_client_procedure_without_what_a_strategy_leaves_to_it_is_refused():
    with pytest.raises(ScenarioError, match=r"takes no parts, and \[strategy\] name = \"flower"):
        scenario(flower("FedProx"), client={"name": "tests.strategy.flower_world.procedure:Still"})


def test_moments_of_batch_norm_s_counters_are_kept_too(tmp_path):
    # the arithmetic of 0-d arrays leaves NumPy scalars among the strategy's arrays
    task = {"model": "cnn_batchnorm"}
    whole = run.start(scenario(flower("FedYogi"), task=task), out=tmp_path / "run")
    expected = records(whole)
    for place in sorted((whole.folder / "checkpoints").iterdir())[2:]:
        place.unlink()
    (whole.folder / "summary.json").unlink()
    again = run.resume(whole.folder)
    assert again.summary["params_sha256"] == whole.summary["params_sha256"]
    assert records(again) == expected


@pytest.mark.parametrize("name", ["QFedAvg", *WRAPPERS])
def test_what_cannot_take_integers_is_refused_naming_the_tensor(name):
    with pytest.raises(ScenarioError) as refused:
        build(scenario(flower(name), task={"model": "cnn_batchnorm"}))
    assert "'norm1.num_batches_tracked' holds integers" in str(refused.value)
