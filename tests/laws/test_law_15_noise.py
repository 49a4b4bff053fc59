"""Law 15: privacy noise in a deployment comes from the operating system, never from the seed."""

import random

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.messages.records import array_record, named_tensors
from tests.laws import federations as fed


class Noisy(FedAvg):
    """A foreign strategy that adds noise of the global generators, as Flower's private ones do."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        noisy = {
            name: tensor
            + torch.from_numpy(np.random.normal(size=tensor.shape)).float()  # noqa: NPY002
            + random.random()
            for name, tensor in named_tensors(arrays).items()
        }
        return array_record(noisy), metrics


def outcome(seed, strategy=None):
    app = fed.make_app()
    arrays, _ = fed.run_rounds(
        strategy or Noisy(fraction_evaluate=0.0),
        InlineGrid(app, 8),
        fed.initial_arrays(),
        app.layout,
        seed=seed,
    )
    return fed.record_bits(arrays)


def seed_the_caller(value):
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - Flower's strategies draw from it


def callers_next_draws():
    return random.random(), float(np.random.random())  # noqa: NPY002


def test_without_a_seed_two_runs_draw_different_noise():
    seed_the_caller(1)
    assert outcome(None) != outcome(None)


def test_without_a_seed_the_global_generators_are_the_callers():
    """What the operating system seeded stays so: the loop neither sets nor restores them."""
    seed_the_caller(1)
    first = outcome(None)
    went_on = callers_next_draws()
    seed_the_caller(1)
    assert callers_next_draws() != went_on
    seed_the_caller(1)
    assert outcome(None) == first


def test_with_a_seed_two_runs_draw_the_same_noise_whatever_was_drawn_before():
    seed_the_caller(1)
    first = outcome(7)
    seed_the_caller(2)
    assert outcome(7) == first
    assert outcome(8) != first


def test_with_a_seed_rounds_draw_noise_of_their_own():
    drawn = []

    class Watching(Noisy):
        def aggregate_train(self, server_round, replies):
            drawn.append(float(np.random.random()))  # noqa: NPY002
            return super().aggregate_train(server_round, replies)

    outcome(7, Watching(fraction_evaluate=0.0))
    assert len(set(drawn)) == 2


def test_with_a_seed_the_callers_generators_are_put_back():
    seed_the_caller(1)
    expected = callers_next_draws()
    seed_the_caller(1)
    outcome(7)
    assert callers_next_draws() == expected


def test_the_callers_generators_are_put_back_when_a_strategy_fails():
    class Failing(Noisy):
        def aggregate_train(self, server_round, replies):
            super().aggregate_train(server_round, replies)
            raise ArithmeticError("no budget left")

    seed_the_caller(1)
    expected = callers_next_draws()
    seed_the_caller(1)
    with pytest.raises(RunError) as failed:
        outcome(7, Failing(fraction_evaluate=0.0))
    assert isinstance(failed.value.__cause__, ArithmeticError)
    assert callers_next_draws() == expected
