"""Tensors that take no step in some epochs: every executor, exactness, optimisers, refusals."""

import numpy as np
import pytest
import torch

from clients.parts.alternating import Alternating
from clients.parts.frozen import Frozen
from fedsim.basics.errors import ScenarioError
from fedsim.client.chains.stepping import Stepping
from fedsim.client.freezing import still_rows, which_move
from fedsim.client.names import ModelTensors
from fedsim.client.overriding import descent_of, stacks
from fedsim.client.procedure import Descent, Work
from tests.laws import federations as fed
from tests.tiers import by_turns

KINDS = ("batched", "vmap", "loop")
CLIENTS = (0, 3, 4, 5)  # 1, 7, 20 and 45 samples: 1, 1, 3 and 6 steps an epoch
MODEL, HEAD = "personal_output", ("output.weight", "output.bias")
REP = {"name": "alternating", "head_epochs": 1}
BABU = {"name": "frozen"}
OPTIMISERS = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1, "keep_optimizer": True},
    "clipped": {"clip_norm": 0.3},
    "adam": {"optimizer": "adam", "keep_optimizer": True},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
}
# each executor, and each way to take a step: a descent, a procedure's own steps, with and without
# moments
WAYS = {
    f"{kind}, {optimiser}": (kind, OPTIMISERS[optimiser])
    for kind, optimiser in (
        ("batched", "sgd"), ("batched", "momentum"), ("batched", "adam"), ("vmap", "adam"),
        ("loop", "clipped"),
    )
}  # fmt: skip


def executor_of(kind, parts, *, model=MODEL, dtype="float64", **arguments):
    options = {"local_lr": 0.1, "batch_size": 8, "local_epochs": 2, **arguments}
    return fed.make_executor(model, fed.local_sgd(**options, parts=parts), kind=kind, dtype=dtype)


def rounds(executor, clients=CLIENTS, count=2):
    """The last of some rounds from the same model, which goes on from what the clients keep."""
    state = {}
    for server_round in range(1, count + 1):
        known = (bool(state),) * len(clients)
        job = fed.job(executor, clients, server_round=server_round, state=state, has_state=known)
        result = executor.train(job)
        state = result.state
    return result


def bits(result):
    return [fed.result_bits(result, row) for row in range(len(result.num_examples))]


# --- the same in every executor -------------------------------------------------------------------


@pytest.mark.parametrize("part", [REP, BABU], ids=["alternating", "frozen"])
@pytest.mark.parametrize("options", [OPTIMISERS["momentum"], OPTIMISERS["adam"]])
def test_executors_agree(part, options):
    found = [rounds(executor_of(kind, [part], **options)) for kind in KINDS]
    for other in found[:2]:
        torch.testing.assert_close(other.params, found[2].params, rtol=0, atol=1e-11)
        assert other.state.keys() == found[2].state.keys()
        for name, kept in found[2].state.items():
            torch.testing.assert_close(other.state[name], kept, rtol=0, atol=1e-11)


def test_with_sgd_both_are_a_descent_and_take_the_fast_way():
    for part in (REP, BABU):
        executor = executor_of("batched", [part])
        assert stacks(executor.procedure)
        assert descent_of(executor.procedure, 1).frozen


@pytest.mark.parametrize("kind", ["batched", "vmap"])
def test_a_client_does_not_depend_on_whether_its_neighbours_are_in_another_epoch(kind):
    """Clients of one chunk have unequally many steps an epoch."""
    executor = executor_of(kind, [REP], momentum=0.9)
    together = bits(rounds(executor))
    for place, client in enumerate(CLIENTS):
        one = rounds(executor, (client,) * len(CLIENTS))
        assert fed.result_bits(one, 0) == together[place]


# --- what does not move, and where nothing is frozen ----------------------------------------------


@pytest.mark.parametrize(("kind", "options"), WAYS.values(), ids=WAYS)
def test_a_frozen_tensor_keeps_every_bit(kind, options):
    """Neither weight decay nor momentum moves it, and its moments stay, too."""
    result = rounds(executor_of(kind, [BABU], **options))
    start = fed.make_task(MODEL, dtype="float64").build_model(fed.SEED).state_dict()
    for name, tensor in result.state.items():
        if name.startswith("personal."):
            assert (tensor == start[name.removeprefix("personal.")]).all()
        elif name.endswith(HEAD):
            assert not tensor.any(), name
        else:
            assert tensor[1:].any(), name


@pytest.mark.parametrize(("kind", "options"), WAYS.values(), ids=WAYS)
def test_where_nothing_is_frozen_it_changes_no_bit(kind, options):
    """Neither part has anything to freeze where no tensor is personal."""
    plain = rounds(executor_of(kind, [], model="mlp", **options))
    for part in (REP, BABU):
        assert bits(rounds(executor_of(kind, [part], model="mlp", **options))) == bits(plain)


@pytest.mark.parametrize(("kind", "options"), WAYS.values(), ids=WAYS)
def test_without_epochs_of_the_head_fedrep_is_fedbabu_bit_for_bit(kind, options):
    never = rounds(executor_of(kind, [{**REP, "head_epochs": 0}], **options))
    assert bits(never) == bits(rounds(executor_of(kind, [BABU], **options)))


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_a_client_that_does_part_of_its_work_may_train_its_head_alone(kind):
    executor = executor_of(kind, [REP], local_epochs=3)
    start = fed.initial_payload(executor).params
    job = fed.job(executor, CLIENTS, work=(1.0, 1 / 3, 1 / 3, 0.4))
    moved = [not torch.equal(row, start) for row in executor.train(job).params]
    assert moved == [True, False, False, True]


@pytest.mark.parametrize(("kind", "options"), WAYS.values(), ids=WAYS)
def test_a_set_up_exchange_trains_all_tensors(kind, options):
    options = {**options, "keep_optimizer": False}
    found = []
    for parts in ([], [REP], [BABU]):
        executor = executor_of(kind, parts, **options)
        found.append(bits(executor.train(fed.job(executor, CLIENTS, server_round=0))))
    assert found[1] == found[2] == found[0]


def test_convolutions_are_frozen_by_name():
    part = {"name": "alternating", "head": ["conv1"]}
    found = []
    for kind in KINDS:
        executor = executor_of(kind, [part], model="cnn")
        found.append(executor.train(fed.job(executor, (3, 4))).params)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-10)


def test_statistics_of_a_frozen_layer_go_on_being_measured():
    part = {"name": "frozen", "tensors": ["norm1"]}
    executor = executor_of("loop", [part], model="cnn_batchnorm", local_epochs=1)
    result = executor.train(fed.job(executor, (3, 4)))
    start = fed.initial_payload(executor)
    before, after = (executor.layout.unflatten(p) for p in (start.params, result.params[0]))
    assert torch.equal(before["norm1.weight"], after["norm1.weight"])
    assert not torch.equal(before["norm2.weight"], after["norm2.weight"])
    mean = "norm1.running_mean"
    assert not torch.equal(start.buffers[mean], result.buffers[mean][0])


# --- held to torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIMISERS.values(), ids=OPTIMISERS)
def test_it_is_torchs_optimiser_that_is_given_some_of_the_parameters(options):
    """Each phase has its own parameters; torch clips, decays and counts for these alone."""
    options = {**options, "keep_optimizer": False, "local_epochs": 3}
    client, executor = 5, executor_of("loop", [REP], **options)
    model = executor.task.build_model(fed.SEED)
    named = dict(model.named_parameters())
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    make = kind.get(options.get("optimizer"), torch.optim.SGD)
    more = {n: options[n] for n in ("momentum", "weight_decay") if n in options}
    if make is not torch.optim.SGD:
        more.setdefault("weight_decay", 0.0)
    head, body = ([named[n] for n in named if (n in HEAD) == which] for which in (True, False))
    optimisers = [make(tensors, lr=0.1, **more) for tensors in (head, body)]
    batches = list(fed.batches(fed.InMemoryData(), client, 1, 8, 18))
    for step, (features, targets) in enumerate(batches):
        phase = 0 if step < 6 else 1
        model.zero_grad()
        x = torch.from_numpy(features).view(-1, *fed.SHAPE)
        torch.nn.functional.cross_entropy(model(x), torch.from_numpy(targets)).backward()
        if "clip_norm" in options:
            torch.nn.utils.clip_grad_norm_((head, body)[phase], options["clip_norm"])
        optimisers[phase].step()
    result = executor.train(fed.job(executor, (client, client)))
    expected = executor.layout.flatten({n: p.detach() for n, p in named.items()})
    torch.testing.assert_close(result.params[0], expected, rtol=0, atol=1e-10)
    for name in HEAD:
        mine = result.state[f"personal.{name}"][0]
        torch.testing.assert_close(mine, named[name].detach(), rtol=0, atol=1e-10)


# --- the pieces -----------------------------------------------------------------------------------


def test_masks_and_rows_say_the_same():
    frozen = (frozenset("a"), frozenset("ab"), frozenset("c"))
    epochs = np.array([0, 1, 2, 7])
    moves = which_move(frozen, "abc", torch.from_numpy(epochs))
    still = still_rows(frozen, epochs)
    for name in "abc":
        rows = still[name]
        assert rows.tolist() == (~moves[name]).nonzero().flatten().tolist()
        for place, epoch in enumerate(epochs):
            assert which_move(frozen, [name], torch.tensor(epoch))[name] == moves[name][place]
    assert still_rows(frozen, epochs[:1]) == {"a": None}
    under_vmap = torch.func.vmap(lambda e: which_move(frozen, "abc", e))(torch.from_numpy(epochs))
    assert all(torch.equal(under_vmap[name], moves[name]) for name in "abc")


def test_a_step_of_some_rows_leaves_the_others_and_their_moments():
    tensors = {"w": torch.arange(6.0).view(3, 2)}
    stepping = Stepping(
        Descent(0.5, momentum=0.5, frozen=(frozenset("w"), frozenset())),
        {"w": torch.ones(3, 2)}, {},
    )  # fmt: skip
    stepping.at(0, np.array([1, 0, 1])).of("w", tensors["w"], torch.ones(3, 2))
    assert tensors["w"].tolist() == [[-0.75, 0.25], [2.0, 3.0], [3.25, 4.25]]
    assert stepping.moments["w"].tolist() == [[1.5, 1.5], [1.0, 1.0], [1.5, 1.5]]
    stepping.at(0, np.array([0, 0, 0])).of("w", tensors["w"], torch.full((3, 2), torch.nan))
    assert bool(tensors["w"].isfinite().all())


# --- refused --------------------------------------------------------------------------------------

KNOWN = ModelTensors(("hidden1.weight", "output.weight"), frozenset(["output.weight"]))


@pytest.mark.parametrize(
    ("part", "work", "message"),
    [
        (Frozen(tensors=["outptu"]), Work(8, 1, None), r"frozen: tensors: .*mean 'output'\?"),
        (Frozen(tensors=["*"]), Work(8, 1, None), r"tensors = \['\*'\]: names every trained"),
        (Alternating(head=["hiden1"]), Work(8, 2, None), r"head: .*mean 'hidden1'\?"),
        (Alternating(), Work(8, 1, None), "head_epochs = 1 with local_epochs = 1: no epoch"),
        (Alternating(head_epochs=0), Work(8, None, 5), "with local_steps = 5: epochs are counted"),
    ],
)
def test_what_the_model_or_the_work_does_not_allow_is_refused(part, work, message):
    with pytest.raises(ScenarioError, match=message):
        part.for_model(KNOWN, work)


def test_everything_personal_leaves_nothing_to_train():
    with pytest.raises(ScenarioError, match="names every trained tensor"):
        Frozen().for_model(ModelTensors(("a", "b"), frozenset("ab")), Work(8, 1, None))


def test_a_negative_number_of_epochs_is_refused():
    with pytest.raises(ValueError, match="head_epochs = -1: must be >= 0"):
        Alternating(head_epochs=-1)
