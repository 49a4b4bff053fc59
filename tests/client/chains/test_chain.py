"""Models as chains of layers: both passes against autograd, and what a client's bits depend on."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from clients.local_sgd import LocalSGD
from fedsim.basics.errors import ScenarioError
from fedsim.client.batching.dropout import seed_dropout
from fedsim.client.chains.chain import chain_of
from fedsim.client.chains.stepping import Stepping
from fedsim.client.plan import make_plan
from fedsim.client.procedure import Descent
from fedsim.client.vectorising import made_up_samples, why_not_batched
from fedsim.runs import start as run
from fedsim.runs.world import build
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

SHAPE = (2, 8, 8)
MODELS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 3)),
    "narrow": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3, bias=False)),
    "nested, with dropout": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(128, 17), nn.ReLU(), nn.Dropout(0.4)),
        nn.Identity(),
        nn.Linear(17, 3),
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
}
CLIENTS, BATCH = 4, 5


def model_of(name):
    torch.manual_seed(3)
    return seed_dropout(MODELS[name]().double())


def tensors_of(model, clients):
    draw = torch.Generator().manual_seed(5)
    return {
        name: torch.stack([p.detach() + 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
                           for _ in range(clients)])
        for name, p in model.named_parameters()
    }  # fmt: skip


def samples(model, clients):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(clients, BATCH, *SHAPE, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (clients, BATCH), generator=draw)
    noise = {"1.2.noise": torch.rand(clients, BATCH, 17, generator=draw)}
    return x, y, noise if any("Dropout" in type(m).__name__ for m in model.modules()) else {}


def by_autograd(model, tensors, x, y, noise):
    """Outputs and gradients of the mean loss of one client."""
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    outputs = functional_call(model.train(), (leaves, noise), (x,))
    grads = torch.autograd.grad(nn.functional.cross_entropy(outputs, y), list(leaves.values()))
    return outputs.detach(), dict(zip(leaves, grads, strict=True))


def slope(outputs, y):
    """The mean loss's gradient by the logits."""
    return (outputs.softmax(-1) - nn.functional.one_hot(y, 3)) / y.shape[-1]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_one_client_are_those_of_autograd(name):
    model = model_of(name)
    chain = chain_of(model, SHAPE)
    tensors = {n: t[0] for n, t in tensors_of(model, 1).items()}
    x, y, noise = samples(model, 1)
    noise = {n: v[0] for n, v in noise.items()}
    expected, grads = by_autograd(model, tensors, x[0], y[0], noise)
    outputs, kept = chain.forward(tensors, x[0].clone(), noise)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    found = {}
    chain.backward(slope(outputs, y[0]), kept, tensors, found)
    assert found.keys() == grads.keys()
    for each, gradient in grads.items():
        torch.testing.assert_close(found[each], gradient, rtol=0, atol=1e-12)


DESCENTS = {
    "plain": Descent(0.3),
    "decay": Descent(0.3, 1 / 3),
    "momentum": Descent(0.3, 0.0, 0.5),
    "both": Descent(0.3, 1 / 3, 0.5),
    "both, guided gradients": Descent(0.3, 1 / 3, 0.5, guides_step=False),
}


@pytest.mark.parametrize("guided", [False, True], ids=["free", "guided"])
@pytest.mark.parametrize("descent", DESCENTS.values(), ids=DESCENTS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "convolutions"])
def test_several_clients_have_the_gradients_of_each_and_a_descent_takes_its_step(
    name, descent, guided
):
    model = model_of(name)
    chain = chain_of(model, SHAPE)
    assert not chain.convolves
    tensors = tensors_of(model, CLIENTS)
    x, y, noise = samples(model, CLIENTS)
    outputs, kept = chain.forward(tensors, x.clone(), noise)
    found = {}
    chain.backward(slope(outputs, y), kept, tensors, found)
    moved = {n: t.clone() for n, t in tensors.items()}
    outputs, kept = chain.forward(moved, x.clone(), noise)
    moments = {n: t / 7 for n, t in tensors.items()} if descent.momentum else {}
    factors = {n: t.sigmoid() for n, t in tensors.items()} if guided else {}
    taking = Stepping(descent, {n: m.clone() for n, m in moments.items()}, factors)
    chain.backward(slope(outputs, y), kept, moved, taking)
    for client in range(CLIENTS):
        own = {n: t[client] for n, t in tensors.items()}
        mine = {n: v[client] for n, v in noise.items()}
        _, grads = by_autograd(model, own, x[client], y[client], mine)
        for each, gradient in grads.items():
            torch.testing.assert_close(found[each][client], gradient, rtol=0, atol=1e-12)
            direction = gradient + descent.weight_decay * own[each]
            factor = factors[each][client] if guided else 1.0
            if not descent.guides_step:
                direction = factor * direction
            if descent.momentum:
                direction = 0.5 * moments[each][client] + direction
                torch.testing.assert_close(
                    taking.moments[each][client], direction, rtol=0, atol=1e-12
                )
            if descent.guides_step:
                direction = factor * direction
            step = own[each] - 0.3 * direction
            torch.testing.assert_close(moved[each][client], step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outputs", [3, 10, 40])
@pytest.mark.parametrize("inputs", [5, 64, 784])
def test_a_client_s_product_does_not_depend_on_how_many_there_are_or_where_it_is(inputs, outputs):
    draw = torch.Generator().manual_seed(inputs)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    chain = chain_of(model, (inputs,))
    x = torch.randn(12, 20, inputs, generator=draw)
    tensors = {
        "0.weight": torch.randn(12, outputs, inputs, generator=draw),
        "0.bias": torch.randn(12, outputs, generator=draw),
    }
    slopes = torch.randn(12, 20, outputs, generator=draw)

    def bits(rows):
        mine = {n: t[rows].clone() for n, t in tensors.items()}
        forward, kept = chain.forward(mine, x[rows].clone(), {})
        chain.backward(slopes[rows].clone(), kept, mine, Stepping(Descent(0.1), {}, {}))
        return [*forward.unbind(), *mine["0.weight"].unbind(), *mine["0.bias"].unbind()]

    whole = bits(list(range(12)))
    for rows in ([3, 4], [11, 3], [0, 3, 7], [9, 8, 3, 2, 1, 0, 5]):
        part, place, count = bits(rows), rows.index(3), len(rows)
        for kind in range(3):
            assert torch.equal(part[kind * count + place], whole[kind * 12 + 3])


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4)), SHAPE),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), (4,)),
        (lambda: nn.Sequential(Doubling(), nn.Linear(4, 2)), (4,)),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.LSTM(2, 2)), (4,)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.Flatten()), SHAPE),
        (lambda: nn.Sequential(nn.Linear(5, 2)), (4,)),
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), SHAPE),
    ],
)
def test_what_is_no_chain_of_known_layers_is_none(build, shape):
    assert chain_of(build(), shape) is None


def test_hooks_shared_layers_frozen_tensors_ties_and_own_methods_make_no_chain():
    def plain():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    assert chain_of(plain(), (4,)) is not None
    hooked = plain()
    hooked[1].register_forward_hook(lambda *_: None)
    frozen = plain()
    frozen[0].bias.requires_grad_(False)
    tied = plain()
    tied[2].weight = tied[0].weight
    layer = nn.Linear(4, 4)
    own, parametrised = plain(), plain()
    own[1].forward = lambda values: values
    nn.utils.parametrize.register_parametrization(parametrised[0], "weight", Doubling())
    for model in (hooked, frozen, tied, own, parametrised, nn.Sequential(layer, nn.ReLU(), layer)):
        assert chain_of(model, (4,)) is None


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "mlp_dropout"])
def test_a_plan_takes_the_written_out_passes_where_it_may(model):
    task = fed.make_task(model)
    asked = {"spec": fed.SPEC, "expected_cohort": 8, "stacks": True, "executor": "batched"}
    plan = make_plan(task, **asked)
    assert (plan.executor, plan.reason) == ("batched", "asked for")
    free = {**asked, "executor": "auto"}
    assert make_plan(task, **free).executor == "batched"
    assert make_plan(task, **free, device="cuda").executor == "vmap"
    with pytest.raises(ScenarioError, match=r"executor = 'batched': it computes on the cpu"):
        make_plan(task, **asked, device="cuda")
    assert why_not_batched(task, fed.SPEC, stacks=True, device="cuda") is not None
    dense = model != "cnn"
    assert (why_not_batched(task, fed.SPEC, stacks=False) is not None) == dense


def test_a_procedure_that_steps_one_client_at_a_time_is_not_given_several():
    class Single(LocalSGD):
        stacks = False

    with pytest.raises(ValueError, match="steps one client at a time"):
        fed.make_executor("mlp", Single(), kind="batched")
    assert math.isfinite(
        float(
            fed.make_executor("cnn", Single(), kind="batched")
            .train(fed.job(fed.make_executor("cnn"), (6, 7)))
            .metrics["loss"]
            .sum()
        )
    )


def _scenario(**tables):
    document = {
        "data": {"name": "digits"},
        "partition": {"kind": "dirichlet", "clients": 6, "alpha": 0.5},
        "task": {"model": "mlp", "hidden": [8], "dtype": "float64"},
        "client": {"local_lr": 0.1, "local_epochs": 2, "batch_size": 16},
        "engine": {"kind": "inline", "executor": "batched"},
        "rounds": 3,
    }
    return Scenario.from_resolved({**document, **tables}, origin="tests/chains.toml")


def test_a_run_has_the_numbers_of_the_other_executors_and_its_plan_says_so(tmp_path):
    final = {}
    for executor in ("batched", "vmap", "loop"):
        engine = {"kind": "inline", "executor": executor}
        done = run.start(_scenario(engine=engine), out=tmp_path / executor)
        assert json.loads((done.folder / "plan.json").read_text())["executor"] == executor
        final[executor] = load_file(done.folder / "params.safetensors")
    for other in ("vmap", "loop"):
        for name, tensor in final["batched"].items():
            torch.testing.assert_close(tensor, final[other][name], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("lent_workers")
def test_ray_workers_have_the_bits_of_this_process(tmp_path):
    hashes = set()
    for number, engine in enumerate(({"kind": "inline"}, {"workers": 2})):
        table = {**engine, "executor": "batched", "chunk_size": 2}
        done = run.start(_scenario(engine=table), out=tmp_path / str(number))
        hashes.add(done.summary["params_sha256"])
    assert len(hashes) == 1


def test_a_model_that_is_no_chain_is_refused_by_name():
    with pytest.raises(ScenarioError, match=r"executor = 'batched': the model is not a ch"):
        build(_scenario(task={"model": "cnn_batchnorm"}))


@pytest.mark.parametrize("model", ["mlp_dropout", "cnn"])
def test_a_rehearsal_changes_no_bit_of_what_follows(model):
    fresh, rehearsed = fed.make_executor(model), fed.make_executor(model)
    assert fresh.kind == "batched"
    rehearsed.rehearse(*made_up_samples(rehearsed.task, fed.SPEC))
    one, other = (each.train(fed.job(each, (3, 5))) for each in (fresh, rehearsed))
    assert [fed.result_bits(one, k) for k in (0, 1)] == [fed.result_bits(other, k) for k in (0, 1)]


@pytest.mark.parametrize("options", [{"clip_norm": 0.5}, {"optimizer": "adam"}], ids=str)
def test_large_dense_chains_take_steps_of_their_own_one_client_after_another(options, monkeypatch):
    procedure = LocalSGD(local_lr=0.1, batch_size=16, **options)
    made = {
        kind: fed.make_executor("mlp_dropout", procedure, kind=kind, dtype="float64")
        for kind in ("batched", "loop")
    }
    chunk = fed.job(made["batched"], (3, 5, 7))
    together, looped = (made[kind].train(chunk) for kind in ("batched", "loop"))
    monkeypatch.setattr("fedsim.client.ways.LARGE", made["batched"].layout.dim)
    alone = made["batched"].train(chunk)
    assert alone.computed == alone.samples < together.computed
    for other in (together, looped):
        torch.testing.assert_close(alone.params, other.params, rtol=0, atol=1e-9)
    among = made["batched"].train(fed.job(made["batched"], (1, 5)))
    assert fed.result_bits(among, 1) == fed.result_bits(alone, 1)


@pytest.mark.parametrize(
    "options",
    [{"local_lr": 1e39}, {"weight_decay": 1e39, "momentum": 0.5}, {"weight_decay": 1e38}],
    ids=str,
)
def test_steps_beyond_float32_end_in_what_is_not_finite(options):
    procedure = LocalSGD(**{"local_lr": 1e3, "local_steps": 3, **options})
    made = fed.make_executor("mlp", procedure, kind="batched")
    assert not made.train(fed.job(made, (5, 6))).params.isfinite().all()
