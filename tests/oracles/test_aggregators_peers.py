"""The robust rules against Flower's and, where it is there, byzfl's own on the same updates.

byzfl is not installed with the others, for it brings torchvision; its rules need neither that nor
anything else that is not here: `pip install --no-deps byzfl`.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from hypothesis import given
from hypothesis import strategies as st

from fedsim.aggregators import Recipe, Round, centred_clipping
from fedsim.aggregators.updates import Updates
from fedsim.messages.flower_internals import ensure_identity
from fedsim.messages.records import array_record

DIM = 9
seeds = st.integers(0, 2**32)


def random_updates(clients, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, DIM)))


def aggregate(rows, f, *, examples=None, seed=0, **recipe):
    made = Recipe(num_byzantine=f, **recipe)
    made.check(len(rows))
    centre = torch.zeros(DIM, dtype=torch.float64)
    return made.aggregate(
        Updates.of(rows), Round(f, np.random.default_rng(seed), centre, examples)
    ).numpy()


def assert_near(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# --- Flower ---------------------------------------------------------------------------------------


def flowers(strategy, rows, examples):
    """What a strategy of Flower's makes of updates that clients send as models."""
    ensure_identity()
    replies = []
    for node, (row, count) in enumerate(zip(rows, examples.tolist(), strict=True), 2):
        content = RecordDict({
            "arrays": array_record({"a": row[:4].reshape(2, 2).clone(), "b": row[4:].clone()}),
            "metrics": MetricRecord({"num-examples": count}),
        })  # fmt: skip
        asked = Message(RecordDict(), node, "train")
        replies.append(Message(content, reply_to=asked))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert isinstance(arrays, ArrayRecord)
    return np.concatenate([arrays["a"].numpy().ravel(), arrays["b"].numpy()])


FLOWERS = {
    "median": (lambda f: FedMedian(), {"rule": "coordinate_median"}),
    "trimmed mean": (lambda f: FedTrimmedAvg(beta=(f + 0.5) / 15), {"rule": "trimmed_mean"}),
    "krum": (lambda f: Krum(num_malicious_nodes=f), {"rule": "krum", "variant": "flower"}),
    "multi-krum": (
        lambda f: MultiKrum(num_malicious_nodes=f, num_nodes_to_select=5),
        {"rule": "multi_krum", "variant": "flower", "num_selected": 5},
    ),
    "multi-krum of one": (
        lambda f: MultiKrum(num_malicious_nodes=f), {"rule": "multi_krum", "variant": "flower"}
    ),
    "bulyan": (lambda f: Bulyan(num_malicious_nodes=f), {"rule": "bulyan", "variant": "flower"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWERS)
@pytest.mark.parametrize("f", [1, 3])
def test_flowers_rules_give_the_same(name, f):
    build, recipe = FLOWERS[name]
    for seed in range(5):
        rows = random_updates(15, seed)
        examples = torch.from_numpy(np.random.default_rng(seed).integers(1, 50, size=15))
        expected = flowers(build(f), rows, examples)
        assert_near(aggregate(rows, f, examples=examples.double(), **recipe), expected)


def test_flowers_bulyan_is_not_the_papers():
    """Taking the best scores at once is another rule; were it not, no variant would be needed."""
    rows = random_updates(15, 0)
    paper, flower = (aggregate(rows, 3, rule="bulyan", variant=v) for v in ("paper", "flower"))
    assert np.abs(paper - flower).max() > 1e-3


# --- byzfl ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byzfl():
    """byzfl's rules; its package as a whole imports what draws figures and loads images."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        pytest.skip("byzfl is not installed; pip install --no-deps byzfl")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    before = {name: module for name, module in sys.modules.items() if name.startswith("byzfl")}
    sys.modules["byzfl"] = package
    try:
        yield importlib.import_module("byzfl.aggregators")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "byzfl"]:
            del sys.modules[name]
        sys.modules.update(before)


BYZFL = {
    "average": (lambda lib, f: lib.Average(), {"rule": "mean"}),
    "median": (lambda lib, f: lib.Median(), {"rule": "coordinate_median"}),
    "trimmed mean": (lambda lib, f: lib.TrMean(f), {"rule": "trimmed_mean"}),
    "geometric median": (
        lambda lib, f: lib.GeometricMedian(), {"rule": "geometric_median", "variant": "byzfl"}
    ),
    "krum": (lambda lib, f: lib.Krum(f), {"rule": "krum", "variant": "byzfl"}),
    "multi-krum": (lambda lib, f: lib.MultiKrum(f), {"rule": "multi_krum", "variant": "byzfl"}),
    "meamed": (lambda lib, f: lib.Meamed(f), {"rule": "meamed"}),
    "centred clipping": (
        lambda lib, f: lib.CenteredClipping(tau=2.0, L=3),
        {"rule": "centred_clipping", "clip_radius": 2.0, "clip_iterations": 3},
    ),
    "nnm": (lambda lib, f: lambda rows: lib.TrMean(f)(lib.NNM(f)(rows)),
            {"rule": "trimmed_mean", "before": ["nnm"]}),
    "clipping": (lambda lib, f: lambda rows: lib.TrMean(f)(lib.Clipping(2.5)(rows)),
                 {"rule": "trimmed_mean", "before": ["clipping"], "clip_norm": 2.5}),
    "arc": (lambda lib, f: lambda rows: lib.TrMean(f)(lib.ARC(f)(rows)),
            {"rule": "trimmed_mean", "before": ["arc"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", BYZFL)
def test_byzfls_rules_give_the_same(byzfl, name):
    build, recipe = BYZFL[name]

    @given(seed=seeds, clients=st.integers(7, 16), f=st.integers(1, 3))
    def same(seed, clients, f):
        rows = random_updates(clients, seed)
        f = 0 if name == "average" else f
        assert_near(aggregate(rows, f, **recipe), build(byzfl, f)(rows.numpy().copy()))

    same()


def test_byzfls_centred_clipping_goes_on_from_the_round_before(byzfl):
    theirs, centre = byzfl.CenteredClipping(tau=1.0), torch.zeros(DIM, dtype=torch.float64)
    for seed in range(4):
        rows = random_updates(7, seed)
        centre = centred_clipping(rows, radius=1.0, centre=centre)
        assert_near(centre.numpy(), theirs(rows.numpy()))


def test_byzfls_bucketing_takes_as_many_at_a_time(byzfl):
    """The order is random there and here: the sum over buckets, by their size, is not."""
    rows = random_updates(11, 1)
    theirs = byzfl.Bucketing(3)(rows.numpy())
    recipe = Recipe(rule="mean", before=["bucketing"], bucket_size=11)
    recipe.check(11)
    assert len(theirs) == 4
    sizes = np.array([3, 3, 3, 2])
    np.testing.assert_allclose(sizes @ theirs / 11, aggregate(rows, 0, rule="mean"), atol=1e-12)


# --- the library released with the Flag Aggregator ------------------------------------------------

# What its rules give for 12 normal updates of 3 numbers and f = 2, by running them; it has no
# licence, so that it cannot be installed or copied.
FLAG = {
    ("coordinate_median", "flag"): [0.104900117153, -0.218791663933, -0.128534662944],
    ("trimmed_mean", "paper"): [-0.072129284193, -0.223631857939, -0.042423897886],
    ("meamed", "flag"): [0.209342924214, -0.307752399954, -0.072129537753],
    ("phocas", "paper"): [-0.053845569946, -0.307752399954, 0.066262652227],
    ("multi_krum", "flag"): [-0.28176078512, -0.274192207765, 0.049985887697],
    ("bulyan", "flag"): [-0.260652144382, -0.199108560783, 0.000467339501],
}


@pytest.mark.parametrize(("rule", "variant"), FLAG)
def test_the_flag_authors_rules_gave_the_same(rule, variant):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 3)))
    assert_near(aggregate(rows, 2, rule=rule, variant=variant), FLAG[rule, variant], 1e-11)
