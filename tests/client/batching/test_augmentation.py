import math

import numpy as np
import pytest
import torch

from fedsim.basics.errors import ScenarioError
from fedsim.basics.rng import generator
from fedsim.basics.samples import SampleSpec
from fedsim.client.batching.augmentation import Augmentation, augmentation_of
from fedsim.client.executor import CohortExecutor
from fedsim.client.procedure import ClientProcedure, Work
from tests.laws import federations as fed
from tests.laws.federations import SEED, SHAPE, InMemoryData, job, make_task, result_bits

EVERYTHING = {"crop": 2, "flip": 0.5, "noise": 0.1}
STEPS, BATCH = 4, 8


class Keeping(ClientProcedure):
    """Trains nothing and returns the features that every step was given, zero for padding."""

    @property
    def work(self):
        return Work(BATCH, None, STEPS)

    def begin(self, params, buffers, extra, state):
        seen = next(iter(params.values())).new_zeros((STEPS, BATCH, *SHAPE))
        return {"params": params, "buffers": buffers, "seen": seen, "step": torch.tensor(0)}

    def step(self, carry, batch, gradient, *, server_round):
        kept = batch.features * (batch.weights > 0).reshape(-1, *(1 for _ in SHAPE))
        kept = torch.nn.functional.pad(kept, (0,) * 7 + (BATCH - kept.shape[0],))
        here = (torch.arange(STEPS) == carry["step"]).reshape(-1, 1, *(1 for _ in SHAPE))
        seen = torch.where(here, kept, carry["seen"])
        return {**carry, "seen": seen, "step": carry["step"] + 1}, batch.weights.sum() * 0

    def finish(self, carry, state):
        return {"seen": carry["seen"]}, state


def executor_of(kind="vmap", augment=EVERYTHING, *, seed=SEED, procedure=None, data=None):
    return CohortExecutor(
        make_task("cnn"),
        procedure or Keeping(),
        data or InMemoryData(),
        seed=seed,
        kind=kind,
        augmentation=augmentation_of(augment, fed.SPEC),
    )


def seen_by(executor, client, members, server_round=1, **changes):
    result = executor.train(job(executor, members, server_round=server_round, **changes))
    return result.extra["seen"][members.index(client)]


def by_hand(image, shift, mirrored, crop):
    """A crop of the zero-padded image, then its mirror image."""
    padded = np.pad(image, ((0, 0), (crop, crop), (crop, crop)))
    down, right = shift
    cropped = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
    return cropped[:, :, ::-1] if mirrored else cropped


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 7)])
@pytest.mark.parametrize("crop", [0, 1, 3])
def test_crop_and_flip_are_those_of_the_padded_image(shape, crop):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(2, 9, *shape)).astype(np.float32)
    augmentation = Augmentation(crop=crop, flip=0.5)
    draws = [augmentation.draw(draw, 9, shape) for _ in range(2)]
    stacked = type(draws[0])(
        torch.stack([d.shift for d in draws]), torch.stack([d.mirrored for d in draws]), None
    )
    found = augmentation.apply(torch.from_numpy(images), stacked).numpy()
    for slot in range(2):
        for place in range(9):
            expected = by_hand(
                images[slot, place],
                draws[slot].shift[place].tolist(),
                bool(draws[slot].mirrored[place]),
                crop,
            )
            np.testing.assert_array_equal(found[slot, place], expected)


def test_draws_have_the_distributions_that_are_asked_for():
    draws = Augmentation(crop=2, flip=0.3, noise=0.5).draw(generator(0, "x"), 4000, (1, 2, 2))
    for axis in (0, 1):
        counts = torch.bincount(draws.shift[:, axis], minlength=5)
        assert len(counts) == 5
        assert (abs(counts / 4000 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 4000)).all()
    flipped = draws.mirrored.double().mean().item()
    assert abs(flipped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert abs(draws.noise.double().mean().item()) < 4 / math.sqrt(16000)
    assert abs(draws.noise.double().var().item() - 1) < 4 * math.sqrt(2 / 16000)
    noisy = Augmentation(noise=0.5).apply(torch.ones(4000, 1, 2, 2), draws)
    torch.testing.assert_close(noisy, 1 + 0.5 * draws.noise)


def test_what_a_client_sees_does_not_depend_on_neighbours_chunk_or_executor():
    expected = seen_by(executor_of(), 4, (4, 5))  # 20 samples: a short batch among full ones
    for members, kind, absent in (
        ((4,), "vmap", ()),
        ((0, 3, 4, 7), "vmap", ()),
        ((3, 4), "vmap", (3,)),
        ((3, 4), "loop", ()),
        ((4,), "loop", ()),
    ):
        assert torch.equal(seen_by(executor_of(kind), 4, members, absent=absent), expected)


@pytest.mark.parametrize("kind", ["vmap", "loop"])
def test_seeds_rounds_clients_and_steps_have_draws_of_their_own(kind):
    """All samples are the same noise-free image, so that what differs was drawn."""
    data = InMemoryData((20, 20))
    data._features["train"][:] = np.arange(16).reshape(SHAPE) + 1
    noise = {"noise": 1.0}
    seen = [
        seen_by(executor_of(kind, noise, data=data), 0, (0, 1)),
        seen_by(executor_of(kind, noise, data=data), 1, (0, 1)),
        seen_by(executor_of(kind, noise, data=data), 0, (0, 1), server_round=2),
        seen_by(executor_of(kind, noise, data=data, seed=1), 0, (0, 1)),
    ]
    samples = torch.cat([each.flatten(0, 1) for each in seen]).flatten(1)
    real = samples[samples.ne(0).any(dim=1)]
    assert len(real) == 4 * 28  # 20 and then 8 of 20 samples
    assert len(real.unique(dim=0)) == len(real)


def test_a_network_trained_with_augmentation_is_the_same_in_both_executors():
    results = []
    for kind in ("vmap", "loop"):
        procedure = fed.make_procedure(local_epochs=2)
        executor = executor_of(kind, procedure=procedure)
        results.append(executor.train(job(executor, (0, 3, 5))).params)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    plain = executor_of(augment=None, procedure=procedure)
    assert not torch.allclose(plain.train(job(plain, (0, 3, 5))).params[2], results[0][2])


def test_padding_beside_a_long_client_changes_no_bit():
    executor = executor_of(procedure=fed.make_procedure(batch_size=4))
    together = executor.train(job(executor, (3, 7)))
    assert result_bits(together, 0) == result_bits(executor.train(job(executor, (3,))), 0)


@pytest.mark.parametrize("kind", ["vmap", "loop"])
def test_evaluation_sees_the_samples_as_they_are(kind):
    data = InMemoryData(test_sizes=(3, 9, 0, 1, 2, 3, 4, 5))
    plain, augmented = (executor_of(kind, a, data=data) for a in (None, EVERYTHING))
    for members in ((1,), (0, 1, 2)):
        one, other = (e.evaluate(job(e, members, action="evaluate")) for e in (plain, augmented))
        assert [result_bits(one, r) for r in range(len(members))] == [
            result_bits(other, r) for r in range(len(members))
        ]


def test_nothing_drawn_for_augmentation_moves_dropout_or_the_order_of_samples():
    def trained(augment):
        executor = CohortExecutor(
            make_task("mlp_dropout"), fed.make_procedure(), InMemoryData(), seed=SEED,
            augmentation=augmentation_of(augment, fed.SPEC),
        )  # fmt: skip
        return executor.train(job(executor, (3, 5))).params

    assert torch.equal(trained({"noise": 1e-38}), trained(None))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"crop": -1}, r"\[task\] augment.crop = -1: must be >= 0"),
        ({"flip": 1.5}, r"\[task\] augment.flip = 1.5: must be in \[0, 1\]"),
        ({"noise": math.inf}, r"\[task\] augment.noise = inf: must be >= 0 and finite"),
    ],
)
def test_impossible_values_are_refused(augment, message):
    with pytest.raises(ScenarioError, match=message):
        augmentation_of(augment, fed.SPEC)


@pytest.mark.parametrize("key", ["crop", "flip"])
def test_what_is_no_image_is_neither_cropped_nor_flipped(key):
    with pytest.raises(
        ScenarioError, match=rf"\[task\] augment.{key} = 1: needs images .* \(30,\)"
    ):
        augmentation_of({key: 1}, SampleSpec((30,), 2))
    assert augmentation_of({"noise": 0.1}, SampleSpec((30,), 2)) is not None


def test_tokens_are_not_augmented():
    with pytest.raises(ScenarioError, match="features are tokens"):
        augmentation_of({"noise": 0.1}, SampleSpec((5,), 9, (), 9))


@pytest.mark.parametrize("augment", [None, {}, {"crop": 0, "flip": 0.0, "noise": 0.0}])
def test_an_augmentation_that_does_nothing_is_none(augment):
    assert augmentation_of(augment, fed.SPEC) is None
