"""No rule's result hangs on rounding, on the order of clients or of columns, or on the unit.

Every rule, alone and after what may come before it, sees updates that are full of ties and the
same updates again: rounded otherwise (each entry by up to 1e-15 of itself), in another order of
rows and of columns, three times as long. What comes out may differ by rounding, unless the rule
has declared that it jumps there.
"""

import itertools
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch

from fedsim.aggregators import BeforeName, Recipe, Round, rules
from fedsim.aggregators.recipe import degree, jumps
from fedsim.aggregators.updates import Updates
from strategies.fedld import FedLD, principal_gradient_aggregate
from strategies.flag import FlagAggregator, flag_aggregate
from tests.property.kinds import KINDS

RULES = [(rule, variant) for rule, variants in rules().items() for variant in variants]
BEFORE = [(), *((name,) for name in get_args(BeforeName))]
each_rule = pytest.mark.parametrize(("rule", "variant"), RULES)
each_before = pytest.mark.parametrize(
    "before", BEFORE, ids=lambda names: "-".join(names) or "alone"
)
ALL = {"rounding", "clients", "columns", "scale"}


class Dealt:
    """A draw that puts the same clients into the same buckets, whatever their order."""

    def __init__(self, order):
        self.order = order

    def permutation(self, count):
        assert count == len(self.order)
        return self.order


def case(rule, variant, before, number):
    """A recipe, its f, rows of the number's kind and a generator for the rest."""
    draw = np.random.default_rng(number)
    kind = list(KINDS)[number % len(KINDS)]
    clients = int(draw.integers(1, 4)) + (number // len(KINDS)) % 11
    recipe = Recipe(rule, variant, before=before)
    f = recipe.bearable(clients)
    while True:  # the smallest n that bears one, mostly
        f = recipe.bearable(clients)
        if f or rule == "mean" or draw.random() < 0.3:
            break
        clients += 1
    dim = int(draw.integers(2, 9))
    return recipe, f, kind, KINDS[kind](draw, clients, dim), draw


def changed(rows, under, draw):
    """The rows changed, their new order, their columns' new order, the factor."""
    clients, columns, factor = np.arange(len(rows)), np.arange(rows.shape[1]), 1.0
    if "rounding" in under:
        rows = rows * (1 + 1e-15 * draw.uniform(-1, 1, size=rows.shape))
    if "clients" in under:
        clients = draw.permutation(len(rows))
    if "columns" in under:
        columns = draw.permutation(rows.shape[1])
    if "scale" in under:
        factor = 3.0
    return factor * rows[clients][:, columns], clients, columns, factor


def aggregate(recipe, f, rows, dealt, examples):
    centre = torch.zeros(rows.shape[1], dtype=torch.float64)
    given = Round(f, Dealt(dealt), centre, torch.from_numpy(examples))
    return recipe.aggregate(Updates.of(torch.from_numpy(rows)), given).numpy()


def left(under, declared, kind):
    """What a result must not jump under on rows of a kind."""
    return under - {each for one in declared if kind in one.on for each in one.under}


def jump(rule, variant, before, number, *, declared=None):
    """How far the result moves, in parts of the largest entry, and the kind of rows."""
    recipe, f, kind, rows, draw = case(rule, variant, before, number)
    power = degree(rule, variant)
    declared = jumps(rule, variant) if declared is None else declared
    under = left(ALL if power is not None else ALL - {"scale"}, declared, kind)
    dealt, examples = draw.permutation(len(rows)), draw.integers(1, 9, len(rows)).astype(float)
    found = aggregate(recipe, f, rows, dealt, examples)
    again, clients, columns, factor = changed(rows, under, draw)
    moved = aggregate(recipe, f, again, clients.argsort()[dealt], examples[clients])
    size = max(np.abs(rows).max(), np.abs(found).max(), 1e-300)
    return np.abs(moved - factor ** (power or 0) * found[columns]).max() / size, kind


def worst(rule, variant, before, numbers, *, declared=None):
    """The kinds on which the result jumps, and how far."""
    found = {}
    for number in numbers:
        far, kind = jump(rule, variant, before, number, declared=declared)
        if far > 1e-9:
            found[kind] = max(found.get(kind, 0), far)
    return found


@each_rule
def test_a_result_moves_by_rounding_alone(rule, variant):
    """Two draws of each kind, and one after each thing that may come before."""
    for before in BEFORE:
        numbers = range(len(KINDS) * (1 if before else 2))
        assert worst(rule, variant, before, numbers) == {}, before


@pytest.mark.slow
@each_before
@each_rule
def test_a_result_moves_by_rounding_alone_in_a_thousand_draws(rule, variant, before):
    assert worst(rule, variant, before, range(1000)) == {}


@pytest.mark.slow
@each_rule
def test_a_result_moves_by_rounding_after_two_things_before(rule, variant):
    for before in itertools.permutations(get_args(BeforeName), 2):
        assert worst(rule, variant, before, range(100)) == {}, before


# --- what is declared, and rules of strategies ----------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "variant"), [each for each in RULES if jumps(*each)], ids="-".join
)
def test_what_is_declared_to_jump_does(rule, variant):
    """Else the declaration only hides what it names."""
    kinds = {kind for declared in jumps(rule, variant) for kind in declared.on}
    assert kinds <= KINDS.keys()
    numbers = [n for n in range(3000) if list(KINDS)[n % len(KINDS)] in kinds]
    found = {
        kind
        for far, kind in (jump(rule, variant, (), n, declared=()) for n in numbers)
        if far > 1e-9
    }
    assert found == kinds


KERNELS = {
    **{
        f"fedld, keep {keep}": (FedLD, 1, partial(principal_gradient_aggregate, keep=keep))
        for keep in (0.5, 0.8, 1.0)
    },
    "flag": (FlagAggregator, 0, flag_aggregate),
    "flag, one pass": (FlagAggregator, 0, partial(flag_aggregate, iterations=1)),
    "flag, one dimension": (FlagAggregator, 0, partial(flag_aggregate, subspace_dim=1)),
    "flag, pairs": (FlagAggregator, 0, partial(flag_aggregate, pair_weight=0.1)),
}


def worst_of(kernel, power, declared, numbers):
    found = {}
    for number in numbers:
        draw = np.random.default_rng(number)
        kind = list(KINDS)[number % len(KINDS)]
        rows = KINDS[kind](draw, int(draw.integers(1, 14)), int(draw.integers(2, 9)))
        again, _, columns, factor = changed(rows, left(ALL, declared, kind), draw)
        first, second = (kernel(torch.from_numpy(each)).numpy() for each in (rows, again))
        size = max(np.abs(rows).max(), 1e-300) if power else 1
        far = np.abs(second - factor**power * first[columns]).max() / size
        if far > 1e-9:
            found[kind] = max(found.get(kind, 0), far)
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_flag_and_fedld_move_by_rounding_but_where_eigenvalues_are_equal(name):
    strategy, power, kernel = KERNELS[name]
    assert worst_of(kernel, power, strategy.jumps, range(140)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_flag_and_fedld_move_by_rounding_in_a_thousand_draws(name):
    strategy, power, kernel = KERNELS[name]
    assert worst_of(kernel, power, strategy.jumps, range(1000)) == {}


@pytest.mark.parametrize("name", ["fedld, keep 0.8", "flag, one dimension"])
def test_flag_and_fedld_jump_where_they_say(name):
    strategy, power, kernel = KERNELS[name]
    kinds, names = {kind for declared in strategy.jumps for kind in declared.on}, list(KINDS)
    found = set()
    for number in range(12_000):  # of a lattice one draw in fifty does, another on every processor
        if names[number % len(names)] in kinds - found:
            found |= worst_of(kernel, power, (), [number]).keys()
    assert found == kinds
