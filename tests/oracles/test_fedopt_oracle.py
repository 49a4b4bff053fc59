"""Server optimisers against NumPy, every number of specs/fedopt.md (e), and Flower's strategies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.aggregators.server_optimizers import (
    SERVER_OPTIMIZERS,
    ServerAdagrad,
    ServerAdam,
    ServerSGD,
    ServerYogi,
)
from fedsim.engine.inline import InlineGrid
from fedsim.scenario import discovery
from strategies.fedadagrad import FedAdagrad
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedyogi import FedYogi
from tests.laws import federations as fed
from tests.oracles import fedopt_oracle as oracle
from tests.strategies.test_participation_baselines import START, made_up, replies

EPS = np.finfo(np.float64).eps
COHORTS = [(0, 1, 3), (0, 2), (), (0, 1, 2, 3, 4), (3,), (1, 2)]
ADAPTIVE = {"adagrad": ServerAdagrad, "adam": ServerAdam, "yogi": ServerYogi}
CASES = {
    "FedAdagrad": (FedAdagrad, {}, "adagrad", {"lr": 0.1}),
    "FedAdagrad with momentum, uniform": (
        FedAdagrad,
        {"server_lr": 0.5, "beta1": 0.3, "tau": 0.01, "weighted": False},
        "adagrad",
        {"lr": 0.5, "beta1": 0.3, "tau": 0.01},
    ),
    "FedAdam": (FedAdam, {}, "adam", {"lr": 0.1, "beta1": 0.9, "beta2": 0.99}),
    "FedAdam, corrected, from zero": (
        FedAdam,
        {"bias_correction": "adam", "v_init": "zero", "beta1": 0.5, "beta2": 0.7, "tau": 0.2},
        "adam",
        {"lr": 0.1, "beta1": 0.5, "beta2": 0.7, "tau": 0.2, "v0": 0.0, "correction": "steps"},
    ),
    "FedAdam as Flower's": (
        FedAdam,
        {"flower_compat": True, "v_init": "tau2", "bias_correction": "none", "weighted": False},
        "adam",
        {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "v0": 0.0, "correction": "rounds + 1"},
    ),
    "FedYogi": (FedYogi, {}, "yogi", {"lr": 0.1, "beta1": 0.9, "beta2": 0.99}),
    "FedYogi, uniform": (
        FedYogi,
        {"server_lr": 2.0, "beta1": 0.0, "beta2": 0.5, "weighted": False, "v_init": "zero"},
        "yogi",
        {"lr": 2.0, "beta2": 0.5, "v0": 0.0},
    ),
    "FedAvgM": (FedAvgM, {}, "sgd", {"lr": 1.0, "momentum": 0.9}),
    "FedAvgM, uniform": (
        FedAvgM,
        {"server_lr": 0.3, "momentum": 0.5, "weighted": False},
        "sgd",
        {"lr": 0.3, "momentum": 0.5},
    ),
}


def corrections(kind):
    """The exponent of the bias correction by round: rounds without replies count, or do not."""
    if kind is None:
        return None
    answered = np.cumsum([bool(cohort) for cohort in COHORTS])
    return (lambda t: t + 1) if kind == "rounds + 1" else (lambda t: int(answered[t - 1]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_strategies_equal_the_oracle_absences_included(case):
    make, arguments, rule, settings = case
    uniform = not arguments.get("weighted", True) and not arguments.get("flower_compat")
    settings = settings | {"correction": corrections(settings.get("correction"))}
    means = []
    for server_round, cohort in enumerate(COHORTS):
        updates = list(made_up(server_round, cohort).values())
        weights = [1] * len(cohort) if uniform else list(range(1, len(cohort) + 1))
        means.append(oracle.mean_update(updates, weights))
    expected = oracle.follow(rule, START.numpy(), means, **settings)

    strategy = make(**arguments)
    params, state = START, strategy.init(START, 5)
    before = params
    for server_round, (cohort, (m, v, x)) in enumerate(zip(COHORTS, expected, strict=True)):
        answered = replies(params, made_up(server_round, cohort))
        params, state, metrics = strategy.server_update(state, params, answered)
        np.testing.assert_allclose(params.numpy(), x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.m.numpy(), m, rtol=0, atol=1e-12)
        if rule != "sgd":
            np.testing.assert_allclose(state.v.numpy(), v, rtol=0, atol=1e-12)
        if cohort:
            assert metrics["step_norm"] == pytest.approx(float((params - before).norm()))
            assert metrics["update_norm"] == pytest.approx(np.linalg.norm(means[server_round]))
        else:
            assert metrics == {}
            assert params is before
        before = params


def moved(optimizer, means, x=0.0):
    """(moments, x) after every mean update, `[rounds, dim]` or `[rounds]`."""
    means = torch.as_tensor(np.array(means), dtype=torch.float64).reshape(len(means), -1)
    params = torch.full_like(means[0], x)
    moments, found = optimizer.init(params), []
    for mean in means:
        step, moments = optimizer.step(moments, mean)
        params = params + step
        found.append((moments, params))
    return found


# (e) 3: eta 1, tau 1e-3, v from tau^2, Delta = 0.1, 0.1, -0.05, beta_2 0.99
PRINTED = {
    "adagrad": (
        ServerAdagrad(lr=1.0),
        [(0.1, 0.010001, 0.990050), (0.1, 0.020001, 1.692174), (-0.05, 0.022501, 1.361056)],
    ),
    "adam": (
        ServerAdam(lr=1.0),
        [
            (0.01, 0.00010099, 0.905028),
            (0.019, 0.00019998, 2.159863),
            (0.0121, 0.00022298, 2.919316),
        ],
    ),
    "yogi": (ServerYogi(lr=1.0), [(None, None, x) for x in (0.904988, 2.156845, 2.911525)]),
}


@pytest.mark.parametrize(("optimizer", "rows"), PRINTED.values(), ids=PRINTED)
def test_the_scalar_runs_of_the_specification(optimizer, rows):
    for (moments, x), (m, v, position) in zip(
        moved(optimizer, [0.1, 0.1, -0.05]), rows, strict=True
    ):
        assert float(x) == pytest.approx(position, abs=5.1e-7)
        if m is not None:
            assert float(moments.m) == pytest.approx(m, abs=1e-12)
            assert float(moments.v) == pytest.approx(v, abs=5.1e-9)


@pytest.mark.parametrize(("rule", "make"), ADAPTIVE.items())
def test_the_scalar_runs_are_the_oracles(rule, make):
    deltas = [0.1, 0.1, -0.05, 0.0, 3.0, -1e-5]
    betas = {} if rule == "adagrad" else {"beta1": 0.9, "beta2": 0.99}
    expected = oracle.follow(rule, [0.0], [[d] for d in deltas], lr=1.0, **betas)
    for (moments, x), (m, v, position) in zip(moved(make(lr=1.0), deltas), expected, strict=True):
        np.testing.assert_allclose(moments.m, m, rtol=1e-13, atol=1e-300)
        np.testing.assert_allclose(moments.v, v, rtol=1e-13, atol=1e-300)
        np.testing.assert_allclose(x, position, rtol=1e-13)


VECTORS = st.lists(
    st.one_of(st.just(0.0), st.floats(-10, 10).filter(lambda d: abs(d) > 1e-6)),
    min_size=3,
    max_size=3,
)
RUNS = st.lists(VECTORS, min_size=1, max_size=5)


@given(update=VECTORS)
def test_without_memory_and_tau_adam_takes_the_sign(update):
    """(e) 1: beta_1 = beta_2 = 0, tau -> 0."""
    optimizer = ServerAdam(lr=0.5, beta1=0.0, beta2=0.0, tau=1e-30)
    [(_, x)] = moved(optimizer, [update])
    np.testing.assert_allclose(x, 0.5 * np.sign(update), rtol=4 * EPS)


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE)
@given(run=RUNS, tau=st.floats(1e3, 1e9))
def test_with_a_large_tau_it_is_federated_averaging(make, run, tau):
    """(e) 2: x += (eta / tau) Delta, with a relative error of at most sqrt(v) / tau."""
    found = moved(make(lr=tau, beta1=0.0, tau=tau, v_init="zero"), run)
    start = torch.zeros(3, dtype=torch.float64)
    for (moments, x), update in zip(found, run, strict=True):
        step, plain = (x - start).numpy(), np.array(update)
        bound = moments.v.sqrt().numpy() / tau * np.abs(plain)
        # x is rounded when the step is added to it, and when it is subtracted again
        rounding = 8 * EPS * (np.abs(x.numpy()) + np.abs(plain))
        assert (np.abs(step - plain) <= bound + rounding).all()
        start = x


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plain_descent_at_the_server_is_fedavg_bit_for_bit(momentum):
    """(e) 1: eta = 1 without momentum; the control has momentum."""
    one, other = FedAvg(), FedAvgM(momentum=momentum)
    params, mine, state = START, START, other.init(START, 5)
    for server_round, cohort in enumerate(COHORTS):
        made = made_up(server_round, cohort)
        params, _, _ = one.server_update(one.init(START, 5), params, replies(params, made))
        mine, state, _ = other.server_update(state, mine, replies(mine, made))
    assert torch.equal(params, mine) == (momentum == 0.0)


@given(run=RUNS, beta2=st.floats(0, 0.999))
def test_yogis_second_moment_moves_by_a_bounded_amount(run, beta2):
    """(e) 4: by at most (1 - beta_2) Delta^2, and not at all where nothing moves."""
    optimizer = ServerYogi(beta2=beta2)
    before = optimizer.init(torch.zeros(3)).v
    for (moments, _), update in zip(moved(optimizer, run), run, strict=True):
        square = torch.tensor(update, dtype=torch.float64) ** 2
        change = (moments.v - before).abs()
        slack = 4 * EPS * (before + square)
        assert (change <= (1 - beta2) * square + slack).all()
        assert torch.equal(moments.v[square == 0], before[square == 0])
        before = moments.v


def test_adam_forgets_where_nothing_moves_and_yogi_does_not():
    """(e) 4: v from 1 is 0.134 after 200 rounds of zero, Yogi's still 1."""
    nothing, rounds = torch.zeros(1, dtype=torch.float64), 200
    left = {}
    for name, optimizer in (("adam", ServerAdam()), ("yogi", ServerYogi())):
        moments = optimizer.init(nothing)._replace(v=torch.ones(1, dtype=torch.float64))
        for _ in range(rounds):
            _, moments = optimizer.step(moments, nothing)
        left[name] = float(moments.v)
    assert left["adam"] == pytest.approx(0.134, abs=5e-4)
    assert left["yogi"] == 1.0


@given(run=RUNS)
def test_second_moments_stay_above_zero_and_adagrads_grows(run):
    """(e) 5."""
    for make in ADAPTIVE.values():
        assert all((moments.v >= 0).all() for moments, _ in moved(make(), run))
    before = ServerAdagrad().init(torch.zeros(3)).v
    for moments, _ in moved(ServerAdagrad(), run):
        assert (moments.v >= before).all()
        before = moments.v


@given(run=RUNS, lr=st.floats(1e-3, 10))
def test_no_coordinate_moves_by_adagrads_step_size(run, lr):
    """(e) 5: |step| < eta without momentum."""
    moments = ServerAdagrad().init(torch.zeros(3))
    for update in run:
        step, moments = ServerAdagrad(lr=lr).step(moments, torch.tensor(update).double())
        assert (step.abs() < lr).all()


@pytest.mark.parametrize("make", SERVER_OPTIMIZERS.values(), ids=SERVER_OPTIMIZERS)
@given(run=RUNS, order=st.permutations(range(3)))
def test_the_order_of_coordinates_is_of_no_account(make, run, order):
    """(e) 5."""
    plain = moved(make(), run)[-1][1]
    turned = moved(make(), [[update[j] for j in order] for update in run])[-1][1]
    assert torch.equal(plain[list(order)], turned)


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE)
@given(run=RUNS, power=st.integers(-30, 30), v_init=st.sampled_from(["tau2", "zero"]))
def test_the_unit_of_the_updates_is_of_no_account(make, run, power, v_init):
    """(e) 6: Delta, tau and sqrt(v_{-1}) times c; a power of two, so that no bit may differ."""
    factor = 2.0**power
    plain = moved(make(v_init=v_init), run)[-1][1]
    scaled = make(v_init=v_init, tau=1e-3 * factor)
    turned = moved(scaled, np.array(run) * factor)[-1][1]
    # 0.001 squared is rounded once, times a power of two or not
    assert torch.equal(plain, turned)


@pytest.mark.parametrize(
    ("settings", "step"),
    [({}, 0.905), ({"flower_compat": True}, 0.675)],
    ids=["the paper", "Flower"],
)
def test_the_first_step_of_the_specification(settings, step):
    """(e) 7: |Delta| = 0.1, eta = 1."""
    [(_, x)] = moved(ServerAdam(lr=1.0, **settings), [0.1])
    assert float(x) == pytest.approx(step, abs=5e-4)


def test_flowers_first_step_tends_to_what_the_specification_says():
    """eta sqrt(1 + beta_2) / (1 + beta_1), about 0.742 eta, for |Delta| far above tau."""
    [(_, x)] = moved(ServerAdam(lr=1.0, flower_compat=True), [1e6])
    assert float(x) == pytest.approx(np.sqrt(1.99) / 1.9, rel=1e-6)
    assert float(x) == pytest.approx(0.742, abs=5e-4)


def test_kingmas_correction_gives_the_first_step_its_full_length():
    corrected = ServerAdam(lr=1.0, bias_correction="adam", v_init="zero", tau=1e-12)
    [(_, x)] = moved(corrected, [0.1])
    assert float(x) == pytest.approx(1.0, rel=1e-9)


FLOWERS = {
    "FedAdagrad": (FedAdagrad, {"server_lr": 0.1}, {"eta": 0.1, "tau": 0.001}),
    "FedAdam": (FedAdam, {"server_lr": 0.05, "beta1": 0.8}, {"eta": 0.05, "beta_1": 0.8}),
    "FedYogi": (FedYogi, {"server_lr": 0.5, "tau": 0.1}, {"eta": 0.5, "tau": 0.1}),
    "FedAvgM": (
        FedAvgM,
        {"server_lr": 0.7, "momentum": 0.6},
        {"server_learning_rate": 0.7, "server_momentum": 0.6},
    ),
}


def models(strategy):
    """The model after each of five rounds; nobody takes part in the third."""
    cohorts = ((0, 1, 2, 5), (3, 4, 7), (), (1, 6), (0, 2, 4, 6, 7))
    app = fed.make_app("mlp", fed.make_procedure("local_sgd", batch_size=256), dtype="float64")
    found = []

    class Keep:
        def round_ended(self, report):
            found.append(report.arrays)

    fed.run_rounds(
        strategy, InlineGrid(app, 8), fed.initial_arrays("mlp", dtype="float64"), app.layout,
        rounds=5, cohorts=cohorts, hooks=[Keep()],
    )  # fmt: skip
    return found


@pytest.mark.parametrize("name", FLOWERS)
def test_flower_compat_computes_what_the_installed_flower_does(name):
    make, mine, theirs = FLOWERS[name]
    compat = {} if make is FedAvgM else {"flower_compat": True}
    ours = models(make(**mine, **compat))
    flowers = models(discovery.strategy_factory(f"flower:{name}")(**theirs))
    assert len(ours) == len(flowers) == 6
    assert fed.largest_difference(ours[0], ours[-1]) > 1e-3
    for one, other in zip(ours, flowers, strict=True):
        assert fed.largest_difference(one, other) <= 1e-11
    if compat:  # the control: as the paper has it, they differ
        assert fed.largest_difference(models(make(**mine))[-1], flowers[-1]) > 1e-4


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_moments_are_not_changed_in_place(name):
    optimizer = SERVER_OPTIMIZERS[name]()
    moments = optimizer.init(START)
    mean = torch.ones(len(START), dtype=torch.float64)
    _, moments = optimizer.step(moments, mean)
    kept = (moments.m.clone(), moments.v.clone(), mean.clone())
    optimizer.step(moments, mean)
    assert all(map(torch.equal, kept, (moments.m, moments.v, mean)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_what_is_not_finite_is_no_key_of_an_optimiser(name, value):
    keys = discovery.schema("server_optimizers", name)
    fractions = [key for key, schema in keys.items() if isinstance(schema.default, float)]
    assert len(fractions) >= 2
    for key in fractions:
        with pytest.raises(ValueError, match=rf"^{key} = "):
            SERVER_OPTIMIZERS[name](**{key: value})


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (ServerSGD, {"momentum": 1.0}, r"momentum = 1.0: must be in \[0, 1\)"),
        (ServerSGD, {"lr": 0.0}, "lr = 0.0: must be > 0 and finite"),
        (ServerAdagrad, {"tau": 0.0}, "tau = 0.0: must be > 0 and finite"),
        (ServerAdam, {"beta1": -0.1}, r"beta1 = -0.1: must be in \[0, 1\)"),
        (ServerAdam, {"beta2": 1.0}, r"beta2 = 1.0: must be in \[0, 1\)"),
        (ServerAdam, {"bias_correction": "yes"}, "bias_correction = 'yes': must be none or adam"),
        (ServerYogi, {"beta2": 2.0}, r"beta2 = 2.0: must be in \[0, 1\)"),
        (ServerYogi, {"v_init": "one"}, "v_init = 'one': must be tau2 or zero"),
        (FedAdam, {"server_lr": -1.0}, "server_lr = -1.0: must be > 0 and finite"),
    ],
)
def test_impossible_numbers_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
