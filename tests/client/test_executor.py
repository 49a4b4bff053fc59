import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from clients.local_sgd import LocalSGD
from fedsim.basics.samples import SampleSpec
from fedsim.client.executor import CohortExecutor
from fedsim.client.procedure import ClientProcedure, Work
from fedsim.client.vectorising import loop_reason, why_loop
from fedsim.messages.layout import Payload, rows_at
from fedsim.tasks import named as tasks
from fedsim.tasks.classification import Classification
from tests.laws import federations as fed
from tests.laws.federations import (
    CLASSES,
    SEED,
    SHAPE,
    SPEC,
    InMemoryData,
    initial_payload,
    job,
    make_executor,
    make_task,
    result_bits,
)

KINDS = ["vmap", "loop"]
PIXELS = math.prod(SHAPE)


def custom(build, data=None, *, kind="vmap", procedure=None, dtype=torch.float32):
    """An executor of any model."""
    return CohortExecutor(
        Classification(build, SPEC, dtype),
        procedure or LocalSGD(batch_size=8),
        data or InMemoryData(),
        seed=SEED,
        kind=kind,
    )


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", fed.VECTORISED)
def test_num_examples_and_loss_are_each_clients_own(model, kind):
    executor = make_executor(model, kind=kind)
    result = executor.train(job(executor, range(8)))
    assert result.num_examples.tolist() == list(fed.SIZES)
    assert set(result.metrics) == {"loss"}
    assert ((result.metrics["loss"] > 0) & (result.metrics["loss"] < 3)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_that_it_reports(kind):
    executor = make_executor(
        "mlp", LocalSGD(local_lr=0.1, batch_size=16, local_epochs=5), kind=kind
    )
    first = executor.train(job(executor, (6, 7)))
    again = executor.train(job(executor, (6, 7), personal=Payload(first.params)))
    assert (again.metrics["loss"] < first.metrics["loss"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_is_padding_counts_for_nothing(kind):
    """The row that pads clients and the rows of others may hold anything."""
    clean = make_executor("mlp", data=InMemoryData(), kind=kind)
    data = InMemoryData()
    mine = np.concatenate(data.clients((2, 5)).rows)
    others = np.setdiff1d(np.arange(len(data.clients((2,)).features)), mine)
    data.clients((2,)).features[others] = np.nan
    dirty = make_executor("mlp", data=data, kind=kind)
    expected, found = (e.train(job(e, (2, 5))) for e in (clean, dirty))
    assert [result_bits(found, r) for r in (0, 1)] == [result_bits(expected, r) for r in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_results_go_where_they_are_asked_to(kind):
    executor = make_executor("mlp", kind=kind)
    out = torch.full((2, executor.layout.dim), math.nan)
    result = executor.train(job(executor, (4, 5)), out)
    assert result.params is out
    assert torch.equal(out, executor.train(job(executor, (4, 5))).params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("members", [(4,), (4, 5)])
def test_personal_tensors_are_their_members_own(kind, members):
    executor = make_executor("mlp", kind=kind, dtype="float64")
    start = initial_payload(executor).params
    rows = torch.stack([start * (k + 1) for k in range(len(members))])
    result = executor.train(job(executor, members, shared=Payload(), personal=Payload(rows)))
    for k, member in enumerate(members):
        alone = executor.train(job(executor, (member,), shared=Payload(start * (k + 1))))
        torch.testing.assert_close(result.params[k], alone.params[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_extras_reach_the_procedure_shared_and_personal_together(kind):
    class Adding(ClientProcedure):
        @property
        def work(self):
            return Work(16, 1, None)

        def begin(self, params, buffers, extra, state):
            shift = extra["shared"] + extra["mine"]
            return {"params": {n: p * 0 + shift for n, p in params.items()}, "buffers": buffers}

        def step(self, carry, batch, gradient, *, server_round):
            return carry, batch.weights.sum() * 0

    executor = make_executor("logistic", Adding(), kind=kind)
    start = initial_payload(executor)
    shared = Payload(start.params, extra={"shared": torch.tensor(10.0), "mine": torch.tensor(99.0)})
    personal = Payload(extra={"mine": torch.tensor([1.0, 2.0])})
    result = executor.train(job(executor, (4, 5), shared=shared, personal=personal))
    assert result.params.unique(dim=1).tolist() == [[11.0], [12.0]]


def test_memories_are_rows_of_their_members():
    class Counting(ClientProcedure):
        @property
        def work(self):
            return Work(16, 1, None)

        def initial_state(self, params):
            return {"rounds": next(iter(params.values())).new_zeros(())}

        def begin(self, params, buffers, extra, state):
            return {"params": params, "buffers": buffers}

        def step(self, carry, batch, gradient, *, server_round):
            return carry, batch.weights.sum() * 0

        def finish(self, carry, state):
            return {"seen": state["rounds"] * 10}, {"rounds": state["rounds"] + 1}

    for kind in KINDS:
        executor = make_executor("logistic", Counting(), kind=kind)
        state = {"rounds": torch.tensor([5.0, 123.0, 7.0])}
        chunk = job(executor, (2, 3, 4), state=state, has_state=(True, False, True))
        result = executor.train(chunk)
        assert result.state["rounds"].tolist() == [6.0, 1.0, 8.0]
        assert result.extra["seen"].tolist() == [50.0, 0.0, 70.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_in_which_nobody_has_samples_hands_everything_back(kind):
    executor = make_executor("mlp", data=InMemoryData((0, 0)), kind=kind)
    chunk = job(executor, (0, 1))
    result = executor.train(chunk)
    assert torch.equal(result.params, chunk.shared.params.expand(2, -1))
    assert result.num_examples.tolist() == [0, 0]
    assert result.metrics["loss"].tolist() == [0.0, 0.0]


def test_a_model_of_another_layout_is_refused_with_the_remedy():
    executor, other = make_executor("mlp"), make_executor("logistic")
    with pytest.raises(ValueError, match=r"has layout .* is \[task\] the same"):
        executor.train(job(other, (4, 5)))
    with pytest.raises(ValueError, match=r"has layout .* is \[task\] the same"):
        executor.evaluate(job(other, (4, 5), action="evaluate"))


def test_only_the_members_data_are_read():
    data = InMemoryData()
    executor = make_executor("mlp", data=data)
    executor.train(job(executor, (1, 4, 6), absent=(4,)))
    assert data.clients_read == 2


def test_the_number_of_threads_is_put_back():
    executor = make_executor("logistic")
    executor.threads = 2
    before = torch.get_num_threads()
    seen = []
    original = executor.task.sample_losses
    executor.task.sample_losses = lambda *a: seen.append(torch.get_num_threads()) or original(*a)
    executor.train(job(executor, (4, 5)))
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


# --- models of all kinds --------------------------------------------------------------------------


class Scaled(nn.Module):
    """Logits times a learned scalar, plus a frozen offset."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(PIXELS, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.ones(CLASSES), requires_grad=False)

    def forward(self, x):
        return self.output(x.flatten(1)) * self.scale + self.offset


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(PIXELS, PIXELS, bias=False)
        self.outer = nn.Linear(PIXELS, PIXELS, bias=False)
        self.outer.weight = self.inner.weight
        self.output = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        return self.output(torch.relu(self.outer(torch.relu(self.inner(x.flatten(1))))))


class Unused(nn.Module):
    """A parameter that no output depends on."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(PIXELS, CLASSES)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.output(x.flatten(1))


@pytest.mark.parametrize("build", [Scaled, Tied, Unused], ids=lambda build: build.__name__)
def test_scalar_frozen_tied_and_idle_tensors_train_alike_in_both_executors(build):
    vectorised, looped = (custom(build, kind=kind, dtype=torch.float64) for kind in KINDS)
    one, other = (e.train(job(e, (4, 5))) for e in (vectorised, looped))
    torch.testing.assert_close(one.params, other.params, rtol=0, atol=1e-9)
    assert not torch.equal(one.params[0], initial_payload(vectorised).params)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tensors_come_back_as_they_were(kind):
    executor = custom(Scaled, kind=kind)
    result = executor.train(job(executor, (4, 5)))
    assert result.buffers["offset"].eq(1).all()
    assert not result.params[:, executor.layout.slices["scale"]].eq(1).any()


def test_batchnorm_statistics_are_each_clients_own_and_the_models_stay():
    executor = make_executor("cnn_batchnorm")
    result = executor.train(job(executor, (1, 6, 7)))
    assert result.buffers["norm1.num_batches_tracked"].tolist() == [1, 3, 4]  # batches of 50
    means = result.buffers["norm1.running_mean"]
    assert not torch.equal(means[1], means[2])
    assert not executor.model.norm1.running_mean.any()


def test_one_batchnorm_client_equals_plain_torch():
    data = InMemoryData((45, 45))
    executor = make_executor("cnn_batchnorm", LocalSGD(local_lr=0.1, batch_size=45), data)
    result = executor.train(job(executor, (0, 1)))
    model = make_task("cnn_batchnorm").build_model(SEED).train()
    found = data.clients((0,))
    features = torch.from_numpy(found.features[found.rows[0]])
    targets = torch.from_numpy(found.targets[found.rows[0]])
    nn.functional.cross_entropy(model(features), targets).backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(
        result.params[0], executor.layout.flatten(expected), rtol=0, atol=1e-5
    )
    state = model.state_dict()
    for name in result.buffers:
        torch.testing.assert_close(result.buffers[name][0], state[name], rtol=0, atol=1e-5)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["mlp", "mlp_dropout"])
def test_local_evaluation_is_that_of_plain_torch_on_the_local_test_split(model, kind):
    data = InMemoryData(test_sizes=(1, 120, 3, 7, 20, 45, 100, 201))
    executor = make_executor(model, data=data, kind=kind, dtype="float64")
    result = executor.evaluate(job(executor, range(8), action="evaluate"))
    plain = make_task(model, dtype="float64").build_model(SEED).eval().requires_grad_(False)
    found = data.clients(range(8), split="test")
    assert result.params is None
    assert result.num_examples.tolist() == [1, 120, 3, 7, 20, 45, 100, 201]
    for row, rows in enumerate(found.rows):
        outputs = plain(torch.from_numpy(found.features[rows]).double())
        targets = torch.from_numpy(found.targets[rows])
        loss = float(nn.functional.cross_entropy(outputs, targets))
        accuracy = float((outputs.argmax(1) == targets).double().mean())
        assert float(result.metrics["loss"][row]) == pytest.approx(loss, abs=1e-12)
        assert float(result.metrics["accuracy"][row]) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_servers_evaluation_is_that_of_plain_torch(batch):
    executor = make_executor("cnn_batchnorm", dtype="float64")
    executor.evaluation_batch = batch
    start, test = initial_payload(executor), executor.data.test
    found = executor.evaluate_arrays(start.params, start.buffers, test.features, test.targets)
    plain = make_task("cnn_batchnorm", dtype="float64").build_model(SEED).eval()
    plain.requires_grad_(False)
    outputs, targets = (
        plain(torch.from_numpy(test.features).double()),
        torch.from_numpy(test.targets),
    )
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, targets)))
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_without_test_samples_is_no_failed_client(kind):
    sizes = (5, 0, 9, 4, 0, 3, 2, 1)
    grid = fed.make_grid("logistic", data=InMemoryData(test_sizes=sizes), kind=kind)
    arrays, strategy = fed.initial_arrays(), fed.make_strategy("fedavg")
    sent = strategy.configure_evaluate(1, arrays, ConfigRecord({}), grid)
    received = grid.send_and_receive(sent).admit()
    assert received.failures == ()
    assert received.num_examples.tolist() == list(sizes)
    metrics = strategy.aggregate_evaluate(1, received)
    some = [c for c in range(8) if sizes[c]]
    expected = np.average(received.metrics["loss"][some], weights=np.array(sizes)[some])
    assert metrics["loss"] == pytest.approx(expected, abs=1e-12)


# --- what cannot be vectorised, and what draws random numbers -------------------------------------


def model_with(layer):
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 6), layer(), nn.Linear(6, CLASSES))

    return build


class SharedDropout(nn.Module):
    """One dropout layer used at two places."""

    def __init__(self):
        super().__init__()
        drop = nn.Dropout(0.5)
        self.body = nn.Sequential(
            nn.Flatten(), drop, nn.Linear(PIXELS, 6), drop, nn.Linear(6, CLASSES)
        )

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.BatchNorm1d(2)), "BatchNorm1d '0' updates its running statistics"),
        (nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True)), "InstanceNorm1d '0'"),
        (nn.Sequential(nn.LSTM(2, 2)), "LSTM '0' has no batching rule"),
        (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), None),
        (nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2)), None),
    ],
    ids=["batchnorm", "instancenorm", "lstm", "batchnorm without statistics", "other norms"],
)
def test_the_reason_for_the_loop_names_the_layer(model, reason):
    found = loop_reason(model)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("layer", [nn.Dropout, nn.AlphaDropout], ids=lambda layer: layer.__name__)
def test_whatever_a_models_layers_draw_is_a_function_of_seed_round_and_client(layer):
    executor = custom(model_with(layer), kind="loop")
    chunk = job(executor, (4, 5))
    torch.manual_seed(1)
    first = executor.train(chunk)
    torch.manual_seed(2)
    assert torch.equal(executor.train(chunk).params, first.params)


def test_a_layer_that_draws_unseeded_numbers_is_not_taken_for_vectorisable():
    """Under vmap torch refuses it, in round 1 instead of before."""
    task = Classification(model_with(nn.AlphaDropout), SPEC, torch.float32)
    assert why_loop(task, SPEC) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropout_layer_used_twice_is_refused_by_name(kind):
    def train():
        executor = custom(SharedDropout, kind=kind)
        executor.train(job(executor, (4, 5)))

    with pytest.raises(ValueError, match="used more than once"):
        train()


@pytest.mark.parametrize("kind", KINDS)
def test_channel_dropout_drops_whole_channels(kind):
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 1)
            self.drop = nn.Dropout2d(0.5)
            self.output = nn.Linear(8 * PIXELS, CLASSES)

        def forward(self, x):
            return self.output(self.drop(self.conv(x)).flatten(1))

    executor = custom(
        Channels, kind=kind, procedure=LocalSGD(batch_size=1, local_steps=1, local_lr=1)
    )
    start = initial_payload(executor)
    moved = executor.train(job(executor, (4, 5))).params - start.params
    touched = executor.layout.unflatten(moved)["output.weight"].reshape(2, CLASSES, 8, PIXELS)
    dropped = touched.eq(0).all(dim=3).all(dim=1)  # [client, channel]
    whole = touched.ne(0).all(dim=3).all(dim=1)
    assert (dropped | whole).all()
    assert dropped.any()
    assert whole.any()


# --- other data than images of classes ------------------------------------------------------------


class OtherData(InMemoryData):
    """The same clients with tokens for features, or numbers for targets."""

    def __init__(self, spec, sizes=fed.SIZES, test_sizes=(3, 5, 0, 1, 7, 120, 2, 9)):
        super().__init__(sizes, test_sizes)
        draw = np.random.default_rng(4)
        self.spec = spec
        for split, features in self._features.items():
            count = len(features)
            if spec.vocabulary:
                self._features[split] = draw.integers(
                    spec.vocabulary, size=(count, *spec.feature_shape)
                )
                self._targets[split] = draw.integers(spec.num_classes, size=count)
            else:
                self._features[split] = draw.normal(size=(count, *spec.feature_shape)).astype("f")
                self._targets[split] = draw.normal(size=(count, *spec.target_shape)).astype("f")
                if spec.has_classes:
                    self._targets[split] = draw.integers(spec.num_classes, size=count)


OTHERS = {
    "characters": (SampleSpec((6,), 7, (), 7), {"model": "char_lstm", "hidden": 5}),
    "numbers": (SampleSpec((4,), 0), {"model": "mlp", "hidden": [3], "loss": "huber"}),
    "rows of numbers": (SampleSpec((4,), 0, (2, 3)), {"model": "linear", "loss": "mae"}),
    "images for a residual network": (SampleSpec((2, 4, 4), 3), {"model": "resnet8"}),
}


@pytest.mark.parametrize(("spec", "table"), OTHERS.values(), ids=OTHERS)
def test_other_tasks_train_and_evaluate_alike_in_both_executors(spec, table):
    data, found = OtherData(spec), []
    for kind in KINDS:
        executor = CohortExecutor(
            tasks.make_task({**table, "dtype": "float64"}, spec),
            LocalSGD(batch_size=8, local_steps=3, momentum=0.5),
            data,
            seed=SEED,
            kind=kind,
        )
        chunk = job(executor, (0, 3, 4))
        trained = executor.train(chunk)
        assert not torch.equal(trained.params[0], chunk.shared.params)
        measured = executor.evaluate(job(executor, (0, 2, 5), action="evaluate"))
        found.append((trained, measured))
    (one, measured), (other, again) = found
    torch.testing.assert_close(one.params, other.params, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.metrics["loss"], other.metrics["loss"], rtol=0, atol=1e-9)
    assert measured.num_examples.tolist() == again.num_examples.tolist() == [3, 0, 120]
    assert measured.metrics.keys() == again.metrics.keys()
    for name, column in measured.metrics.items():
        torch.testing.assert_close(column, again.metrics[name], rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("places", [(0, 1, 2), (4, 0, 2)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trained_rows_are_written_where_they_are_wanted(device, places, monkeypatch):
    executor = make_executor("mlp")
    params = {n: torch.stack([p.detach()] * 3) for n, p in executor.model.named_parameters()}
    for tensor in params.values():
        tensor.mul_(torch.arange(3.0).view(-1, *(1,) * (tensor.dim() - 1)))
    rows = torch.full((5, executor.layout.dim), -1.0)
    # what comes from a GPU comes at once; tensors of this process take that way as well
    monkeypatch.setattr(executor.inputs, "device", torch.device(device))
    executor.inputs.laid(params, rows_at(rows, places), [2, 0, 1])
    assert torch.equal(rows[list(places)], executor.layout.flatten(params)[[2, 0, 1]])
    assert (rows[[place for place in range(5) if place not in places]] == -1).all()
