import numpy as np
import pytest
import torch

from fedsim.engine.inline import InlineGrid
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from fedsim.strategy.declarations import NoState
from strategies.fedavg import FedAvg
from tests.laws import federations as fed
from tests.oracles import sgd_oracle as oracle

LAYOUT = Layout.from_named({"w": torch.zeros(3, dtype=torch.float64)})


def replies(params, rows, counts):
    rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    return Replies(
        server_round=1,
        layout=LAYOUT,
        client_ids=np.arange(len(rows)),
        params=rows,
        reference=params,
        buffers={},
        extra={},
        num_examples=torch.tensor(counts, dtype=torch.int64),
        metrics={},
        staleness=torch.zeros(len(rows), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.25, 3.5, -2.0]),  # (1*[1,2,1] + 3*[0,4,-3]) / 4
        ({"weighted": False}, [0.5, 3.0, -1.0]),
        ({"server_lr": 0.5}, [0.625, 2.25, -0.5]),  # halfway from [1,1,1]
        ({"server_lr": 2.0}, [-0.5, 6.0, -5.0]),
    ],
    ids=["weighted", "uniform", "half a step", "two steps"],
)
def test_the_model_moves_by_the_mean_update(options, expected):
    start = torch.ones(3, dtype=torch.float64)
    two = replies(start, [[1.0, 2.0, 1.0], [0.0, 4.0, -3.0]], [1, 3])
    moved, state, metrics = FedAvg(**options).server_update(NoState(), start, two)
    assert moved.tolist() == expected
    assert (state, metrics) == (NoState(), {})


@pytest.mark.parametrize("rows", [[], [[5.0, 5.0, 5.0]]], ids=["no reply", "no sample"])
def test_the_model_stays_when_nobody_has_weight(rows):
    start = torch.ones(3, dtype=torch.float64)
    moved, _, _ = FedAvg().server_update(NoState(), start, replies(start, rows, [0] * len(rows)))
    assert torch.equal(moved, start)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_server_step_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match=r"server_lr = .*: must be > 0"):
        FedAvg(server_lr=value)


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "kept momentum"])
@pytest.mark.parametrize("options", [{}, {"server_lr": 0.5}, {"weighted": False}])
def test_three_rounds_equal_the_oracle(options, momentum):
    data = fed.InMemoryData()
    procedure = fed.make_procedure(
        "local_sgd",
        local_lr=0.3,
        batch_size=256,
        local_epochs=2,
        momentum=momentum,
        keep_optimizer=True,
    )
    app = fed.make_app("logistic", procedure, data, dtype="float64")
    start = fed.initial_arrays("logistic", dtype="float64")
    cohorts = ((0, 3, 5), (1, 2, 3, 4, 5), (0, 3, 7))
    arrays, records = fed.run_rounds(
        FedAvg(**options), InlineGrid(app, 8), start, app.layout, rounds=3, cohorts=cohorts
    )
    model = {"W": start["output.weight"].numpy(), "b": start["output.bias"].numpy()}
    memories = [oracle.no_memory() for _ in range(8)]
    losses = []
    for cohort in cohorts:
        found = data.clients(cohort)
        models, client_losses = [], []
        for client, rows in zip(cohort, found.rows, strict=True):
            mine = found.features[rows].reshape(len(rows), -1).astype(float), found.targets[rows]
            trained, memories[client], loss = oracle.client_update(
                model, [mine, mine], memories[client], lr=0.3, momentum=momentum
            )
            models.append(trained)
            client_losses.append(loss)
        counts = [len(rows) for rows in found.rows]
        losses.append(np.average(client_losses, weights=counts))
        model = oracle.server_update(model, models, counts, **options)
    np.testing.assert_allclose(arrays["output.weight"].numpy(), model["W"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(arrays["output.bias"].numpy(), model["b"], rtol=0, atol=1e-12)
    assert [r["train/loss"] for r in records[1:]] == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("model", fed.MODELS)
def test_flowers_own_start_gives_the_round_loops_bits(model):
    procedure = fed.make_procedure("local_sgd", momentum=0.9, keep_optimizer=True)
    started, looped = (InlineGrid(fed.make_app(model, procedure), 8) for _ in range(2))
    start = fed.initial_arrays(model)
    strategies = [FedAvg(server_lr=0.7) for _ in range(2)]
    for strategy in strategies:
        strategy.declare_buffers([spec.name for spec in started.client_app.layout.buffers])
    result = strategies[0].start(grid=started, initial_arrays=start, num_rounds=3)
    arrays, records = fed.run_rounds(
        strategies[1], looped, start, looped.client_app.layout, rounds=3
    )
    assert fed.record_bits(result.arrays) == fed.record_bits(arrays)
    for server_round in (1, 2, 3):
        metrics = result.train_metrics_clientapp[server_round]
        assert metrics["loss"] == records[server_round]["train/loss"]
        assert metrics["num-examples"] == records[server_round]["train/num_examples"] == 388
