import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.inline import InlineGrid
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from strategies.fedlex import FedLEx, guidance
from tests.laws import federations as fed
from tests.oracles import fedlex_oracle as oracle
from tests.oracles import sgd_oracle

ORDERS = {False: "normalise-then-average", True: "average-then-normalise"}
START = (0.0, 0.0, 0.0, 0.0)
FINALS = [(0.1, -0.2, 0.4, 0), (0.3, 0, 0.3, 0.1)]


def kernel(initial, explored, dtype=torch.float64, **options):
    start = torch.tensor(np.asarray(initial), dtype=dtype)
    after = torch.tensor(np.asarray(explored), dtype=dtype)
    found = guidance(start, after, **options)
    assert (found.dtype, found.shape) == (dtype, start.shape)
    return found.numpy()


# --- numbers of the specification ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_printed_guidance(dtype):
    figure, code = (0.53125, 0.125, 1, 0.055556), (0.375, 0.125, 1, 0)
    assert kernel(START, FINALS, dtype) == pytest.approx(figure, abs=1e-6)
    assert kernel(START, FINALS, dtype, order=ORDERS[True]) == pytest.approx(code, abs=1e-6)
    assert oracle.guidance(np.zeros(4), np.array(FINALS)) == pytest.approx(figure, abs=1e-6)


def test_printed_maps_of_single_explorers():
    for final, printed in zip(FINALS, [(0.0625, 0.25, 1, 0), (1, 0, 1, 0.111111)], strict=True):
        assert kernel(START, [final]) == pytest.approx(printed, abs=1e-6)


def test_printed_guidance_of_given_deviations():
    """D = (1, 2, 3) and (10, 0, 5) are absolute deviations of these models from zero."""
    explored = [(1.0, 2, 3), (10, 0, 5)]
    absolute = {"deviation": "absolute"}
    assert kernel((0.0, 0, 0), explored, **absolute) == pytest.approx((0.5, 0.25, 0.75))
    first = kernel((0.0, 0, 0), explored, order=ORDERS[True], **absolute)
    assert first == pytest.approx((1, 0, 0.666667), abs=1e-6)


# --- what rounding makes of a constant deviation -----------------------------------------------


def trained_bias(seed, dtype, lr):
    """The output bias of a two-class softmax before and after 30 steps on random samples."""
    draw = np.random.default_rng(seed)
    x = torch.from_numpy(draw.normal(size=(40, 6))).to(dtype)
    y = torch.from_numpy(draw.integers(0, 2, size=40))
    bias = torch.from_numpy(draw.normal(0, 0.3, size=2)).to(dtype)
    weight, bias = torch.zeros(2, 6, dtype=dtype, requires_grad=True), bias.requires_grad_()
    start = bias.detach().clone()
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
        for each, slope in zip(
            (weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True
        ):
            each.data -= lr * slope
    return start, bias.detach()


@pytest.mark.parametrize("order", ORDERS.values())
@pytest.mark.parametrize("deviation", ["squared", "absolute"])
@pytest.mark.parametrize("lr", [1e-4, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_biases_that_always_move_equally_far_are_not_held_back(dtype, lr, deviation, order):
    for seed in range(40):
        start, after = trained_bias(seed, dtype, lr)
        found = guidance(start, after[None], deviation=deviation, order=order)
        assert found.tolist() == [1, 1], seed


@pytest.mark.parametrize("average_first", [False, True])
def test_a_difference_beyond_rounding_is_one(average_first):
    start, after = np.array([1.0, 1.0]), np.array([[1.5, 0.5 - 1e-12]])
    assert kernel(start, after, order=ORDERS[average_first]) == pytest.approx([0, 1])
    assert kernel(start, after, torch.float32, order=ORDERS[average_first]).tolist() == [1, 1]


# --- the kernel against the oracle -------------------------------------------------------------


@pytest.mark.parametrize("average_first", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2, 2), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guidance_equals_the_oracles(shape, absolute, average_first, dtype):
    random = np.random.default_rng(len(shape))
    single = np.float32 if dtype == torch.float32 else np.float64
    initial = random.normal(size=shape).astype(single)
    explored = random.normal(size=(5, *shape)).astype(single)
    expected = oracle.guidance(
        initial.astype(float), explored.astype(float),
        absolute=absolute, average_first=average_first,
    )  # fmt: skip
    deviation = "absolute" if absolute else "squared"
    found = kernel(initial, explored, dtype, deviation=deviation, order=ORDERS[average_first])
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6
    )


def test_explorers_that_diverged_are_dropped_and_nobody_leaves_no_restriction():
    explored = np.random.default_rng(0).normal(size=(3, 4))
    for bad in (np.nan, np.inf):
        broken = np.insert(explored, 1, np.full(4, bad), axis=0)
        np.testing.assert_array_equal(kernel(START, broken), kernel(START, explored))
        assert (kernel(START, np.full((2, 4), bad)) == 1).all()
    assert (kernel(START, np.zeros((0, 4))) == 1).all()


@pytest.mark.parametrize("order", ORDERS.values())
def test_a_constant_deviation_does_not_restrict(order):
    assert (kernel(START, [(0.5,) * 4, (0.0,) * 4], order=order) == 1).all()
    assert kernel((0.3,), [(0.7,)], order=order) == 1


EXPLORED = st.tuples(st.integers(0, 2**16), st.integers(1, 6), st.integers(2, 9))


@given(EXPLORED)
def test_maps_span_zero_to_one_whatever_the_explorers_scale_order_and_number(shape):
    seed, explorers, dim = shape
    random = np.random.default_rng(seed)
    initial, explored = random.normal(size=dim), random.normal(size=(explorers, dim))
    before = initial.copy(), explored.copy()
    found = kernel(initial, explored)
    assert ((found >= 0) & (found <= 1)).all()
    for each in explored:
        alone = kernel(initial, [each])
        assert (alone.min(), alone.max()) == (0, 1)
    factors = random.uniform(0.1, 10, size=(explorers, 1))
    rescaled = kernel(initial, initial + factors * (explored - initial))
    np.testing.assert_allclose(rescaled, found, rtol=0, atol=1e-9)
    np.testing.assert_allclose(kernel(initial, explored[::-1].copy()), found, rtol=0, atol=1e-14)
    twice = np.concatenate([explored, explored])
    for order in ORDERS.values():
        one, other = (kernel(initial, e, order=order) for e in (explored, twice))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(initial, before[0])
    np.testing.assert_array_equal(explored, before[1])


# --- whole rounds against the oracle ------------------------------------------------------------

COHORTS = ((0, 3, 5), (1, 2, 3, 4, 5), (0, 3, 7))
DATA = fed.InMemoryData()


def batches(client, count):
    found = DATA.clients((client,))
    rows = found.rows[0]
    mine = found.features[rows].reshape(len(rows), -1).astype(float), found.targets[rows]
    return [mine] * count


def named(record):
    return {"W": record["output.weight"].numpy(), "b": record["output.bias"].numpy()}


OPTIONS = {
    "the figure": ({}, {}),
    "the code's order": ({"order": ORDERS[True]}, {"average_first": True}),
    "absolute": ({"deviation": "absolute"}, {"absolute": True}),
    "a floor": ({"floor": 0.3}, {"floor": 0.3}),
}


@pytest.mark.parametrize(("options", "theirs"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mask", ["step", "gradient"])
def test_exploration_and_three_rounds_equal_the_oracle(options, theirs, mask):
    run(options, theirs, {"guidance": mask, "momentum": 0.9})


def test_the_servers_momentum_equals_the_oracle():
    run({"server_momentum": 0.9, "server_lr": 2.0}, {}, {}, momentum=0.9, server_lr=2.0)


def test_a_share_of_explorers_makes_one_map_for_all_rounds():
    run({"explorers": 0.5}, {}, {})


@pytest.mark.parametrize(
    ("share", "clients", "count"),
    [(0.01, 8, 1), (0.5, 5, 2), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_the_share_that_explores_is_rounded_down_and_at_least_one_does(share, clients, count):
    """0.29 * 100 is below 29 by rounding alone."""
    strategy = FedLEx(explorers=share)
    strategy.declare_seed(1)
    chosen = strategy.setup(None, torch.zeros(3), clients).clients.tolist()
    assert len(chosen) == count
    assert chosen == sorted(set(chosen) & set(range(clients)))


@pytest.mark.parametrize("mask", ["step", "gradient"])
def test_adam_equals_the_oracle(mask):
    run({}, {}, {"optimizer": "adam", "guidance": mask, "local_lr": 0.05}, lr=0.05)


def run(options, theirs, client, *, lr=0.3, momentum=0.0, server_lr=1.0):
    client = dict(client)
    arguments = {"local_lr": lr, "batch_size": 256, "local_epochs": 2}
    adam, mask = client.get("optimizer") == "adam", client.pop("guidance", "step")
    parts = [
        {"name": "guidance", "acts_on": mask},
        {"name": "exploration", "epochs": 3, "lr": client.pop("setup_lr", 0.2)},
    ]
    procedure = fed.make_procedure("local_sgd", **{**arguments, **client}, parts=parts)
    app = fed.make_app("logistic", procedure, DATA, dtype="float64")
    start = fed.initial_arrays("logistic", dtype="float64")
    before = fed.record_bits(start)
    strategy = FedLEx(**options)
    arrays, records = fed.run_rounds(
        strategy, InlineGrid(app, 8), start, app.layout, rounds=3, cohorts=COHORTS
    )
    assert fed.record_bits(start) == before  # exploring left the initial model alone

    initial = named(start)
    free = {name: np.ones_like(values) for name, values in initial.items()}
    explorers = strategy.state.explorers.tolist()
    assert len(explorers) == max(1, int(options.get("explorers", 1) * 8))
    assert len(strategy.state.maps) == (8 if len(explorers) == 8 else 1)
    local = {"lr": lr, "mask": mask}
    if adam:
        train = oracle.guided_adam
    else:
        train, local["momentum"] = oracle.guided_sgd, client.get("momentum", 0.0)
    maps = {
        c: train(
            initial, batches(c, 3), free, sgd_oracle.gradient,
            **{**local, "lr": 0.2},
        )
        for c in explorers
    }  # fmt: skip
    model, velocity = initial, {name: np.zeros_like(v) for name, v in initial.items()}
    for cohort in COHORTS:
        chosen = cohort if len(explorers) == 8 else explorers
        g = oracle.model_guidance(initial, [maps[c] for c in chosen], **theirs)
        models = [train(model, batches(c, 2), g, sgd_oracle.gradient, **local) for c in cohort]
        counts = [fed.SIZES[c] for c in cohort]
        model, velocity = oracle.server(
            model, velocity, models, counts, momentum=momentum, server_lr=server_lr
        )
    # Adam divides by what may be next to nothing, and so enlarges rounding errors
    tolerance = 1e-9 if adam else 1e-11
    for name, values in named(arrays).items():
        np.testing.assert_allclose(values, model[name], rtol=0, atol=tolerance)
    assert records[0]["clients/selected"] == len(explorers)  # the set-up exchange is round 0
    whole = oracle.model_guidance(initial, list(maps.values()), **theirs)
    flat = np.concatenate([values.reshape(-1) for values in whole.values()])
    assert records[1]["server/guidance_mean"] == pytest.approx(flat.mean(), abs=1e-10)
    assert records[1]["server/guidance_frozen"] == pytest.approx((flat == 0).mean(), abs=1e-10)


# --- what the mask does -------------------------------------------------------------------------


def chunk(optimizer, mask, g, lr=0.1):
    """One client's model after a round, with the guidance `g` sent."""
    procedure = fed.make_procedure(
        "local_sgd",
        optimizer=optimizer,
        local_lr=lr,
        local_epochs=3,
        parts=[{"name": "guidance", "acts_on": mask}],
    )
    executor = fed.make_executor("mlp", procedure, dtype="float64")
    layout, start = executor.layout, fed.initial_payload(executor)
    sent = {f"guidance.{n}": t for n, t in layout.unflatten(g(layout)).items()}
    job = fed.job(executor, (4, 6), shared=type(start)(start.params, start.buffers, sent))
    return executor.train(job).params, start.params


def some_guidance(layout):
    return torch.rand(layout.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_sgd_cannot_tell_a_masked_gradient_from_a_masked_step():
    (step, _), (gradient, _) = (chunk("sgd", m, some_guidance) for m in ("step", "gradient"))
    torch.testing.assert_close(step, gradient, rtol=0, atol=1e-12)


def test_adam_is_blind_to_a_masked_gradient_and_not_to_a_masked_step():
    def halved(layout):
        return torch.full((layout.dim,), 0.5, dtype=torch.float64)

    def whole(layout):
        return torch.ones(layout.dim, dtype=torch.float64)

    free, start = chunk("adam", "gradient", whole, lr=1e-3)
    blind, _ = chunk("adam", "gradient", halved, lr=1e-3)
    guided, _ = chunk("adam", "step", halved, lr=1e-3)
    assert float((blind - free).abs().max()) < 1e-3 * float((free - start).abs().max())
    assert float((guided - free).abs().max()) > 0.3 * float((free - start).abs().max())


@pytest.mark.parametrize("mask", ["step", "gradient"])
def test_guidance_zero_freezes_and_guidance_one_changes_no_bit(mask):
    nothing, start = chunk("sgd", mask, lambda layout: torch.zeros(layout.dim).double())
    assert torch.equal(nothing, start.expand_as(nothing))
    one, _ = chunk("sgd", mask, lambda layout: torch.ones(layout.dim).double())
    procedure = fed.make_procedure("local_sgd", local_lr=0.1, local_epochs=3)
    executor = fed.make_executor("mlp", procedure, dtype="float64")
    assert torch.equal(one, executor.train(fed.job(executor, (4, 6))).params)


def test_a_parameter_that_no_explorer_moved_never_moves():
    """A feature that is always zero has no gradient, hence deviation 0 and guidance 0."""
    data = fed.InMemoryData()
    data._features["train"][:, 0, 0, 0] = 0
    parts = [{"name": "guidance"}, {"name": "exploration", "epochs": 2}]
    procedure = fed.make_procedure("local_sgd", weight_decay=0.1, parts=parts)
    free = fed.make_procedure("local_sgd", parts=parts)
    start = fed.initial_arrays("logistic")
    moved = {}
    for name, each in (("decayed", procedure), ("free", free)):
        app = fed.make_app("logistic", each, data)
        arrays, _ = fed.run_rounds(FedLEx(), InlineGrid(app, 8), start, app.layout, rounds=3)
        before, after = (r["output.weight"].numpy() for r in (start, arrays))
        moved[name] = np.abs(after - before).max(axis=0)
    assert moved["free"][0] == 0
    assert moved["free"][1] > 0
    assert moved["decayed"][0] > 0  # decay moves it in the exploration already


def test_a_set_up_exchange_leaves_no_memory_behind():
    procedure = fed.make_procedure("local_sgd", momentum=0.9, keep_optimizer=True)
    app = fed.make_app("logistic", procedure)
    grid = InlineGrid(app, 8)
    strategy = FedLEx()
    fed.configure(strategy, grid, fed.initial_arrays("logistic"))
    assert strategy.setup_replies.num_clients == 8
    assert grid.store.export() == ([], {})


def test_before_anybody_explored_nothing_is_restricted():
    layout = Layout.from_named({"w": torch.zeros(3), "b": torch.zeros(2)})
    strategy, params = FedLEx(), torch.linspace(-1, 1, 5)
    strategy.declare_layout(layout)
    state = strategy.init(params, 4)
    sent, _ = strategy.broadcast(state, params, np.array([0, 2]))
    assert sent.extra.keys() == {"guidance.w", "guidance.b"}
    assert all((tensor == 1).all() for tensor in sent.extra.values())
    assert len(state.explorers) == len(state.maps) == 0
    moved, after, metrics = strategy.apply(state, params, torch.ones(5).double(), 2.0)
    torch.testing.assert_close(moved, params + 0.5)
    assert metrics == {"guidance_mean": 1.0, "guidance_frozen": 0.0}
    assert after.velocity.tolist() == [0.5] * 5


def test_a_client_without_samples_has_no_map():
    data = fed.InMemoryData((0, 20, 45, 0, 20, 45, 7, 1))
    app = fed.make_app("logistic", data=data)
    strategy, grid = FedLEx(), InlineGrid(app, 8)
    sent = fed.configure(strategy, grid, fed.initial_arrays("logistic"))
    assert strategy.setup_replies.num_clients == 8
    assert strategy.state.explorers.tolist() == [1, 2, 4, 5, 6, 7]
    guided = torch.cat([t.reshape(-1) for t in sent.shared.extra.values()])
    assert 0 < float(guided.mean()) < 1
    only_empty = fed.make_app("logistic", data=fed.InMemoryData((0,) * 8))
    strategy = FedLEx()
    sent = fed.configure(strategy, InlineGrid(only_empty, 8), fed.initial_arrays("logistic"))
    assert not len(strategy.state.explorers)
    assert all((t == 1).all() for t in sent.shared.extra.values())


@pytest.mark.parametrize("order", ORDERS.values())
def test_a_deviation_that_overflows_drops_its_explorer(order):
    explored = np.random.default_rng(0).normal(size=(3, 4))
    beside = np.insert(explored, 1, (1e200, 0, 1, 2), axis=0)
    found = kernel(START, beside, order=order)
    np.testing.assert_array_equal(found, kernel(START, explored, order=order))


def test_an_explorer_whose_deviation_overflows_in_one_place_has_no_map():
    explored = np.random.default_rng(0).normal(size=(3, 4))
    explored[1, 2] = 1e200
    layout = Layout.from_named({"w": torch.zeros(4).double()})
    strategy, params = FedLEx(), torch.zeros(4).double()
    strategy.declare_layout(layout)
    answered = Replies(
        server_round=0,
        layout=layout,
        client_ids=np.arange(3),
        params=torch.from_numpy(explored),
        reference=params,
        buffers={},
        extra={},
        num_examples=torch.ones(3, dtype=torch.int64),
        metrics={},
        staleness=torch.zeros(3, dtype=torch.int64),
    )
    state = strategy.finish_setup(strategy.init(params, 3), params, answered)
    assert state.explorers.tolist() == [0, 2]
    maps = [oracle.guidance(np.zeros(4), explored[[client]]) for client in (0, 2)]
    np.testing.assert_allclose(state.maps.numpy(), maps, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "value"), [("order", "none"), ("deviation", "cubed")])
def test_a_kernel_refuses_choices_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} = '{value}': must be"):
        guidance(torch.zeros(3), torch.ones(2, 3), **{name: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("explorers", 0.0), ("explorers", 1.5), ("deviation", "cubed"), ("order", "none"),
        ("floor", -0.1), ("floor", 1.1), ("server_lr", 0.0), ("server_lr", np.inf),
        ("server_momentum", 1.0),
    ],
)  # fmt: skip
def test_impossible_hyperparameters_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"{argument} = .*: must be"):
        FedLEx(**{argument: value})
