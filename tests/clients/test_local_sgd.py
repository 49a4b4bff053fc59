import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.local_sgd import LocalSGD
from fedsim.client.procedure import Work
from fedsim.messages.layout import Payload
from tests.laws.federations import (
    SEED,
    InMemoryData,
    batches,
    initial_payload,
    job,
    local_sgd,
    make_executor,
    make_task,
    named_bits,
    result_bits,
)
from tests.oracles import sgd_oracle as oracle

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.1},
    "clipped": {"clip_norm": 0.2},
    "proximal": {"proximal": 0.7},
    "adam": {"optimizer": "adam"},
    "adam with other moments": {"optimizer": "adam", "betas": (0.5, 0.8), "epsilon": 1e-2},
    "adam with weight decay": {"optimizer": "adam", "weight_decay": 0.1, "clip_norm": 0.3},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "epsilon": 1e-2},
    "adamw, clipped": {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.3},
    "everything": {"momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.4, "proximal": 0.3},
}
CLIENTS = (0, 3, 4, 5)  # 1, 7, 20 and 45 samples


def as_oracle(layout, flat):
    named = layout.unflatten(flat)
    return {"W": named["output.weight"].numpy().copy(), "b": named["output.bias"].numpy().copy()}


def as_flat(layout, model):
    named = {
        "output.weight": torch.from_numpy(model["W"]),
        "output.bias": torch.from_numpy(model["b"]),
    }
    return layout.flatten(named)


def oracle_arguments(options, lr):
    renamed = {"clip_norm": "clip"}
    arguments = {renamed.get(key, key): value for key, value in options.items()}
    optimizer = arguments.pop("optimizer", "sgd")
    return {"lr": lr, "adam": optimizer != "sgd", "decoupled": optimizer == "adamw", **arguments}


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("kind", ["vmap", "loop"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_rounds_equal_the_oracle(options, kind, kept):
    data = InMemoryData()
    procedure = local_sgd(
        local_lr=0.2, lr_decay=0.5, batch_size=8, local_steps=7, keep_optimizer=kept, **options
    )
    executor = make_executor("logistic", procedure, data, kind=kind, dtype="float64")
    layout = executor.layout
    shared = initial_payload(executor)
    model = as_oracle(layout, shared.params)
    memories = {client: oracle.no_memory() for client in CLIENTS}
    state, has_state = {}, (False,) * len(CLIENTS)
    for server_round in (1, 2, 3):
        lr = 0.2 * 0.5 ** (server_round - 1)
        result = executor.train(
            job(
                executor, CLIENTS, server_round=server_round, shared=shared,
                state=state, has_state=has_state,
            )
        )  # fmt: skip
        models = []
        for row, client in enumerate(CLIENTS):
            memory = memories[client] if kept else oracle.no_memory()
            seen = batches(data, client, server_round, 8, 7)
            trained, memories[client], loss = oracle.client_update(
                model, seen, memory, **oracle_arguments(options, lr)
            )
            torch.testing.assert_close(
                result.params[row], as_flat(layout, trained), rtol=0, atol=1e-11
            )
            assert float(result.metrics["loss"][row]) == pytest.approx(loss, abs=1e-12)
            models.append(trained)
        model = oracle.server_update(model, models, [1, 7, 20, 45])
        shared = Payload(as_flat(layout, model))
        state, has_state = result.state, (kept,) * len(CLIENTS)


def torch_optimizer(options, parameters):
    decay = options.get("weight_decay", 0.0)
    if options.get("optimizer", "sgd") != "sgd":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options["optimizer"]]
        betas, epsilon = options.get("betas", (0.9, 0.999)), options.get("epsilon", 1e-8)
        return kind(parameters, lr=0.1, betas=betas, eps=epsilon, weight_decay=decay)
    momentum = options.get("momentum", 0.0)
    return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, weight_decay=decay)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_client_equals_torchs_own_optimizer(options):
    data = InMemoryData()
    procedure = local_sgd(local_lr=0.1, batch_size=16, local_epochs=2, **options)
    executor = make_executor("mlp", procedure, data, dtype="float64")
    result = executor.train(job(executor, (5,)))

    model = make_task("mlp", dtype="float64").build_model(SEED)
    received = [p.detach().clone() for p in model.parameters()]
    optimizer = torch_optimizer(options, model.parameters())
    for features, targets in batches(data, 5, 1, 16, 6):  # 45 samples: 3 batches a pass
        optimizer.zero_grad()
        outputs = model(torch.from_numpy(features))
        loss = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(targets))
        distance = sum(
            ((p - r) ** 2).sum() for p, r in zip(model.parameters(), received, strict=True)
        )
        (loss + options.get("proximal", 0.0) / 2 * distance).backward()
        if "clip_norm" in options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
        optimizer.step()
    expected = executor.layout.flatten({n: p.detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(result.params[0], expected, rtol=0, atol=1e-9)


@given(st.integers(0, 500), st.integers(1, 70), st.integers(1, 9))
def test_epochs_take_every_batch_of_every_pass(examples, batch_size, epochs):
    steps = Work(batch_size, epochs, None).num_steps(examples)
    assert (
        steps // epochs - 1
    ) * batch_size < examples <= steps // epochs * batch_size or not steps
    assert bool(steps) == bool(examples)


@given(st.integers(0, 500), st.integers(1, 70), st.integers(1, 9))
def test_steps_are_taken_whatever_the_size_unless_there_is_nothing(examples, batch_size, steps):
    assert Work(batch_size, None, steps).num_steps(examples) == (steps if examples else 0)


def test_a_step_size_of_zero_trains_nothing():
    executor = make_executor("mlp", LocalSGD(local_lr=0.0, momentum=0.9))
    chunk = job(executor, (3, 5))
    result = executor.train(chunk)
    assert torch.equal(result.params, chunk.shared.params.expand(2, -1))


def test_local_steps_of_one_pass_equal_one_epoch():
    by_epoch = make_executor("mlp", LocalSGD(batch_size=16, local_epochs=1))
    by_steps = make_executor("mlp", LocalSGD(batch_size=16, local_steps=3))
    one, other = (e.train(job(e, (5,))) for e in (by_epoch, by_steps))  # 45 samples
    assert result_bits(one, 0) == result_bits(other, 0)


def test_the_step_size_decays_by_round_and_not_by_participation():
    executor = make_executor("logistic", LocalSGD(local_lr=0.4, lr_decay=0.5, batch_size=256))
    halved = make_executor("logistic", LocalSGD(local_lr=0.1, batch_size=256))
    third = executor.train(job(executor, (4, 5), server_round=3))
    plain = halved.train(job(halved, (4, 5), server_round=3))
    assert torch.equal(third.params, plain.params)


def test_a_kept_optimizer_goes_on_where_it_stopped():
    kept = make_executor("mlp", LocalSGD(momentum=0.9, keep_optimizer=True), dtype="float64")
    fresh = make_executor("mlp", LocalSGD(momentum=0.9), dtype="float64")
    first = kept.train(job(kept, (4, 5)))
    again = kept.train(job(kept, (4, 5), state=first.state, has_state=(True, True)))
    anew = kept.train(job(kept, (4, 5)))
    assert not torch.equal(again.params, anew.params)
    assert torch.equal(anew.params, fresh.train(job(fresh, (4, 5))).params)


def test_only_members_without_a_memory_get_the_initial_one():
    executor = make_executor("mlp", LocalSGD(optimizer="adam", keep_optimizer=True))
    first = executor.train(job(executor, (4, 5)))
    mixed = executor.train(job(executor, (4, 5), state=first.state, has_state=(True, False)))
    both = executor.train(job(executor, (4, 5), state=first.state, has_state=(True, True)))
    neither = executor.train(job(executor, (4, 5)))
    assert result_bits(mixed, 0) == result_bits(both, 0)
    assert result_bits(mixed, 1) == result_bits(neither, 1)


@pytest.mark.parametrize("kind", ["vmap", "loop"])
def test_a_client_without_samples_hands_everything_back(kind):
    data = InMemoryData((20, 0))
    procedure = local_sgd(optimizer="adam", keep_optimizer=True, weight_decay=0.1, proximal=0.1)
    executor = make_executor("mlp", procedure, data, kind=kind)
    first = executor.train(job(executor, (0, 1)))
    memory = {name: torch.ones_like(tensor) for name, tensor in first.state.items()}
    chunk = job(executor, (0, 1), state=memory, has_state=(True, True))
    result = executor.train(chunk)
    assert torch.equal(result.params[1], chunk.shared.params)
    assert result.num_examples.tolist() == [20, 0]
    assert float(result.metrics["loss"][1]) == 0.0
    kept = {name: tensor[1] for name, tensor in result.state.items()}
    assert named_bits(kept) == named_bits({name: tensor[1] for name, tensor in memory.items()})


IMPOSSIBLE = [
    ("local_lr", -0.1),
    ("local_lr", float("nan")),
    ("local_epochs", 0),
    ("local_steps", 0),
    ("local_steps", -1),
    ("batch_size", 0),
    ("optimizer", "lion"),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("weight_decay", -1.0),
    ("betas", (0.9, 1.0)),
    ("betas", (0.9,)),
    ("epsilon", 0.0),
    ("clip_norm", 0.0),
    ("lr_decay", 0.0),
    ("lr_decay", 1.1),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_argument_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name} = ") as refusal:
        LocalSGD(**{name: value})
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_has_no_momentum_of_its_own(optimizer):
    with pytest.raises(ValueError, match=rf"momentum = 0\.9: {optimizer} has none of its own"):
        LocalSGD(optimizer=optimizer, momentum=0.9)


def test_every_client_has_moments_of_its_own():
    executor = make_executor("logistic", LocalSGD(momentum=0.9, keep_optimizer=True))
    one, other = executor.train(job(executor, (4, 5))).state["output.weight"]
    assert not torch.equal(one, other)
