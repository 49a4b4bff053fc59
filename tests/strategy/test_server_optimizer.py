"""A linear rule whose step an optimiser takes up: `[strategy.server]`."""

import numpy as np
import pytest
import torch

from fedsim.aggregators.server_optimizers import (
    SERVER_OPTIMIZERS,
    ServerAdam,
    ServerSGD,
    ServerYogi,
)
from fedsim.basics.errors import ScenarioError
from fedsim.engine.inline import InlineGrid
from fedsim.messages.replies import Replies
from fedsim.scenario import discovery
from fedsim.scenario.scenario import Scenario
from fedsim.strategy import LinearStrategy, NoState
from fedsim.strategy.linear import why_no_server_optimizer
from fedsim.strategy.session import CallSession
from strategies.fedadam import FedAdam
from strategies.fedau import FedAU
from strategies.fedavg import FedAvg
from strategies.fedld import FedLD
from tests.laws import federations as fed
from tests.oracles import fedau_oracle, fedopt_oracle
from tests.strategies.test_participation_baselines import LAYOUT, START, made_up, replies

COHORTS = [(0, 1, 3), (0, 2), (), (0, 1, 2, 3, 4), (3,), (1, 2)]
LINEAR = [
    name
    for name in discovery.names("strategies")
    if why_no_server_optimizer(discovery.strategy_factory(name)) is None
]


def rounds(strategy, *, model="mlp", dtype="float64", count=4):
    """The model after every round over the engine; nobody takes part in the third."""
    cohorts = ((0, 1, 2, 5), (3, 4, 7), (), (1, 6, 7))
    app = fed.make_app(model, fed.make_procedure("local_sgd", batch_size=256), dtype=dtype)
    strategy.declare_buffers([spec.name for spec in app.layout.buffers])
    if hasattr(strategy, "declare_rates"):
        strategy.declare_rates(np.full(8, 0.4))
    found = []

    class Keep:
        def round_ended(self, report):
            found.append(report.arrays)

    fed.run_rounds(
        strategy, InlineGrid(app, 8), fed.initial_arrays(model, dtype=dtype), app.layout,
        rounds=count, cohorts=cohorts, hooks=[Keep()],
    )  # fmt: skip
    return found


def on_made_up_replies(strategy):
    """(model, State, moments) after every round, as the base class calls it."""
    params, found = START, []
    moments = strategy._server_optimizer.init(START)
    session = CallSession(LAYOUT, 5, strategy.init(START, 5), {}, moments=moments)
    for server_round, cohort in enumerate(COHORTS):
        answered = replies(params, made_up(server_round, cohort))
        params, _ = strategy._updated(session, params, answered)
        found.append((params, session.state, session.moments))
    return found


@pytest.mark.parametrize("server_lr", [1.0, 0.4])
@pytest.mark.parametrize("cutoff", [2, "none"])
def test_fedau_with_adam_equals_numpy_absences_included(cutoff, server_lr):
    took_part = [[n in cohort for n in range(5)] for cohort in COHORTS]
    weights, clients = fedau_oracle.follow(took_part, np.inf if cutoff == "none" else cutoff)
    zero, means = np.zeros(len(START)), []
    for t, cohort in enumerate(COHORTS):
        updates = made_up(t, cohort)
        step = fedau_oracle.fedau(zero, updates, weights[t], clients=5, lr=server_lr)
        means.append(step if cohort else None)
    expected = fedopt_oracle.follow(
        "adam", START.numpy(), means, lr=0.3, beta1=0.8, beta2=0.9, tau=0.01
    )
    strategy = FedAU(cutoff=cutoff, server_lr=server_lr).use_server_optimizer(
        ServerAdam(lr=0.3, beta1=0.8, beta2=0.9, tau=0.01)
    )
    found = on_made_up_replies(strategy)
    for (params, _, moments), (m, v, x) in zip(found, expected, strict=True):
        np.testing.assert_allclose(params.numpy(), x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(moments.m.numpy(), m, rtol=0, atol=1e-12)
        np.testing.assert_allclose(moments.v.numpy(), v, rtol=0, atol=1e-12)
    # the rule counted every round, the optimiser those with a reply
    state, moments = found[-1][1:]
    np.testing.assert_allclose(state.weights, [c.weight for c in clients], atol=1e-12)
    assert moments.steps == sum(map(bool, COHORTS))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LINEAR)
def test_plain_descent_leaves_every_linear_rule_bit_for_bit(name, dtype):
    plain = rounds(fed.make_strategy(name), dtype=dtype)
    taken_up = rounds(
        fed.make_strategy(name).use_server_optimizer(ServerSGD(lr=1.0, momentum=0.0)), dtype=dtype
    )
    for one, other in zip(plain, taken_up, strict=True):
        assert fed.record_bits(one) == fed.record_bits(other)


@pytest.mark.parametrize("name", LINEAR)
def test_an_optimiser_makes_another_rule_of_every_linear_one(name):
    """The control."""
    plain = rounds(fed.make_strategy(name))[-1]
    taken_up = rounds(fed.make_strategy(name).use_server_optimizer(ServerYogi()))[-1]
    assert fed.largest_difference(plain, taken_up) > 1e-3


@pytest.mark.parametrize("model", ["mlp", "cnn_batchnorm"])
def test_fedavg_with_adam_is_fedadam_bit_for_bit(model):
    one = rounds(FedAvg().use_server_optimizer(ServerAdam(lr=0.2)), model=model)
    other = rounds(FedAdam(server_lr=0.2), model=model)
    for mine, theirs in zip(one, other, strict=True):
        assert fed.record_bits(mine) == fed.record_bits(theirs)


def test_the_rules_own_step_size_scales_what_the_optimiser_sees():
    """A power of two in tau and server_lr alike changes no bit (scale)."""
    one = rounds(FedAvg(server_lr=4.0).use_server_optimizer(ServerAdam(tau=4e-3)))
    other = rounds(FedAvg().use_server_optimizer(ServerAdam(tau=1e-3)))
    for mine, theirs in zip(one, other, strict=True):
        assert fed.record_bits(mine) == fed.record_bits(theirs)


def test_flowers_own_start_gives_the_round_loops_bits():
    grids = [InlineGrid(fed.make_app("mlp", fed.make_procedure()), 8) for _ in range(2)]
    start = fed.initial_arrays("mlp")
    strategies = [FedAU().use_server_optimizer(ServerAdam()) for _ in range(2)]
    result = strategies[0].start(grid=grids[0], initial_arrays=start, num_rounds=3)
    arrays, _ = fed.run_rounds(strategies[1], grids[1], start, grids[1].client_app.layout, rounds=3)
    assert fed.record_bits(result.arrays) == fed.record_bits(arrays)


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_rules_step_does_not_depend_on_the_model(name):
    """What makes it a step that an optimiser can take up."""
    strategy = fed.make_strategy(name)
    draw = np.random.default_rng(3)
    x, total = (torch.from_numpy(draw.normal(size=len(START))) for _ in range(2))
    state = strategy.init(x, 5)
    step, _, _ = strategy.apply(state, torch.zeros_like(x), total, 2.5)
    moved, _, _ = strategy.apply(state, x, total, 2.5)
    torch.testing.assert_close(moved - x, step, rtol=0, atol=1e-14)


class Decaying(LinearStrategy):
    """Pulls the model towards zero besides."""

    def init(self, params, clients):
        return NoState()

    def weights(self, state, client_ids, num_examples):
        return num_examples.double()

    def apply(self, state, params, weighted_sum, weight_sum):
        if not weight_sum:
            return params, state, {}
        return 0.9 * params + weighted_sum / weight_sum, state, {}


def test_a_step_that_depends_on_the_model_is_refused():
    strategy = Decaying().use_server_optimizer(ServerAdam())
    with pytest.raises(ValueError, match=r"Decaying: the step of 'apply' depends on the model"):
        on_made_up_replies(strategy)


def test_moments_are_taken_up_again_and_only_by_who_has_them():
    def made():
        return FedAU().use_server_optimizer(ServerAdam())

    app = fed.make_app("mlp")
    grid, arrays, strategy = InlineGrid(app, 8), fed.initial_arrays("mlp"), made()
    for server_round in (1, 2):
        sent = fed.configure(strategy, grid, arrays, server_round)
        arrays, _ = strategy.aggregate_train(server_round, grid.send_and_receive(sent))
    fields = strategy._session.fields()
    assert {"server:m", "server:v", "server:steps", "weights"} <= set(fields)
    assert fields["server:steps"] == 2
    again = made()
    again.restore(fields)
    after = []
    for each in (strategy, again):
        sent = fed.configure(each, grid, arrays, 3)
        after.append(each.aggregate_train(3, grid.send_and_receive(sent))[0])
    assert fed.record_bits(after[0]) == fed.record_bits(after[1])

    without = FedAU()
    without.restore(fields)
    with pytest.raises(ValueError, match="of a server optimiser, and the strategy has none"):
        fed.configure(without, grid, arrays, 3)
    mine = {name: value for name, value in fields.items() if not name.startswith("server:")}
    bare = made()
    bare.restore(mine)
    with pytest.raises(ValueError, match="expected"):
        fed.configure(bare, grid, arrays, 3)


def test_what_takes_no_optimiser_says_why():
    with pytest.raises(ValueError, match="FedAdam is a server optimiser itself"):
        FedAdam().use_server_optimizer(ServerAdam())
    assert "no linear rule" in why_no_server_optimizer(FedLD)


# In a scenario.

DOCUMENT = {
    "rounds": 2,
    "data": {"name": "digits", "test_fraction": 0.9},
    "partition": {"kind": "iid", "clients": 4},
    "engine": {"kind": "inline"},
}


def scenario(**strategy):
    return Scenario.from_resolved({**DOCUMENT, "strategy": strategy}, origin="mine.toml")


def test_a_scenario_has_the_optimisers_keys_with_their_defaults():
    found = scenario(name="fedau", server={"name": "adam", "lr": 1})
    assert found.strategy["server"] == {
        "name": "adam", "lr": 1.0, "beta1": 0.9, "tau": 0.001, "v_init": "tau2",
        "flower_compat": False, "beta2": 0.99, "bias_correction": "none",
    }  # fmt: skip
    assert found.choices["strategy"].make()._server_optimizer == ServerAdam(lr=1.0)
    again = Scenario.from_resolved(found.resolved(), origin="mine.toml")
    assert (again, again.sha256) == (found, found.sha256)


def test_the_table_is_part_of_what_a_scenario_is_and_nothing_without_it():
    plain = scenario(name="fedau")
    assert "server" not in plain.strategy
    hashes = {
        each.sha256
        for each in (
            plain,
            scenario(name="fedau", server={"name": "adam"}),
            scenario(name="fedau", server={"name": "yogi"}),
            scenario(name="fedau", server={"name": "adam", "lr": 0.2}),
        )
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("rule", LINEAR)
def test_every_optimiser_goes_with_every_linear_rule(rule, name):
    made = scenario(name=rule, server={"name": name}).choices["strategy"].make()
    assert made._server_optimizer == SERVER_OPTIMIZERS[name]()


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            {"name": "fedau", "server": {"name": "adm"}},
            r"\[strategy\.server\] 'adm' is not a server optimiser; did you mean 'adam'\?",
        ),
        (
            {"name": "fedau", "server": {"name": "adam", "lrr": 1}},
            r"\[strategy\.server\] 'lrr' is not a key of adam; did you mean 'lr'\?",
        ),
        (
            {"name": "fedau", "server": {"name": "sgd", "beta1": 0.5}},
            r"\[strategy\.server\] 'beta1' is not a key of sgd",
        ),
        (
            {"name": "fedau", "server": {"name": "adam", "beta1": 1}},
            r"\[strategy\.server\] beta1 = 1\.0: must be in \[0, 1\)",
        ),
        ({"name": "fedau", "server": {}}, r"\[strategy\.server\] 'name' is missing; allowed: sgd"),
        (
            {"name": "fedau", "server": "adam"},
            r'\[strategy\] server = "adam": must be a table such as \{ name = "adam", lr = 0\.1 \}',
        ),
        (
            {"name": "fedau", "servr": {"name": "adam"}},
            r"\[strategy\] 'servr' is not a hyperparameter of fedau; did you mean 'server'\?",
        ),
        (
            {"name": "fedld", "server": {"name": "adam"}},
            r'\[strategy\.server\]: \[strategy\] name = "fedld" is no linear rule, .* goes with '
            r".*average_all, .*fedau, fedavg",
        ),
        (
            {"name": "fedadam", "server": {"name": "adam"}},
            r'\[strategy\.server\]: \[strategy\] name = "fedadam" is a server optimiser itself',
        ),
        (
            {"name": "flower:FedAvg", "server": {"name": "adam"}},
            r'\[strategy\] name = "flower:FedAvg" is no linear rule',
        ),
        (
            {
                "name": "flower:DifferentialPrivacyServerSideFixedClipping",
                "noise_multiplier": 0.1, "clipping_norm": 0.5,
                "strategy": {"name": "fedau", "server": {"name": "adm"}},
            },
            r"\[strategy\.strategy\.server\] 'adm' is not a server optimiser",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_table_key_and_the_nearest(strategy, message):
    with pytest.raises(ScenarioError, match=message):
        scenario(**strategy)


def test_a_strategy_with_an_argument_of_that_name_keeps_it():
    found = scenario(name="tests.strategy.test_server_optimizer:Served", server="mine")
    assert found.choices["strategy"].make().server == "mine"


class Served(Decaying):
    """Has a key `server` of its own."""

    def __init__(self, *, server: str = "") -> None:
        self.server = server


def test_replies_without_weight_are_no_observation():
    """Everybody who answered holds no sample: FedAvg does not move, nor does its optimiser."""
    strategy = FedAvg().use_server_optimizer(ServerAdam())
    answered = replies(START, made_up(0, (0, 1)))
    answered = Replies(**{**vars(answered), "num_examples": torch.zeros(2, dtype=torch.int64)})
    session = CallSession(LAYOUT, 5, strategy.init(START, 5), {}, moments=ServerAdam().init(START))
    after, _ = strategy._updated(session, START, answered)
    assert torch.equal(after, START)
    assert session.moments.steps == 0
