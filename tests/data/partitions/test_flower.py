"""The partitioners of flwr-datasets by name give what flwr-datasets itself gives."""

import re
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets import partitioner as flwr_partitioners

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Samples
from fedsim.data.partitions import flower
from fedsim.data.partitions.named import partition_factory
from fedsim.data.partitions.partition import DROPPED
from fedsim.data.preparation import prepare
from fedsim.scenario import discovery, signatures

LABELS = rng.generator(5, "t").integers(0, 6, 700)
OWNERS = rng.generator(6, "t").integers(0, 23, 700)

# the arguments that each needs, and the values that this file gives to the optional ones
ARGUMENTS = {
    "ContinuousPartitioner": {"strictness": 0.7},
    "DirichletPartitioner": {"alpha": 0.5, "min_partition_size": 1, "self_balancing": True},
    "DistributionPartitioner": {
        "distribution_array": [[1.0, 2.0]] * 6,
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 1,
    },
    "ExponentialPartitioner": {},
    "GroupedNaturalIdPartitioner": {"group_size": 4, "mode": "drop-reminder"},
    "IidPartitioner": {},
    "InnerDirichletPartitioner": {"partition_sizes": [100, 200, 300], "alpha": 2},
    "LinearPartitioner": {},
    "NaturalIdPartitioner": {},
    "PathologicalPartitioner": {"num_classes_per_partition": 2},
    "ShardPartitioner": {"shard_size": 20},
    "SizePartitioner": {"partition_sizes": [100, 200, 300]},
    "SquarePartitioner": {},
}


def made(name, seed=9, groups=OWNERS, **more):
    factory = partition_factory(f"flower:{name}")
    takes = signatures.keys(factory)
    clients = {"clients": 6} if "clients" in takes else {}
    keys = signatures.check(factory, {**clients, **ARGUMENTS[name], **more}, where="[partition]")
    return factory(**keys).assign(Samples(LABELS, groups), seed)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_owners_are_those_that_flwr_datasets_gives(name):
    cls = getattr(flwr_partitioners, name)
    given = {"num_partitions": 6, "seed": rng.derived_seed(9, "partition")}
    given["partition_by"] = "owner" if "NaturalId" in name else "label"
    takes = cls.__init__.__annotations__
    arguments = {
        key: np.array(value) if key == "distribution_array" else value
        for key, value in ARGUMENTS[name].items()
    }
    theirs = cls(**arguments, **{key: value for key, value in given.items() if key in takes})
    columns = {"label": LABELS, "owner": OWNERS, "row": np.arange(700)}
    theirs.dataset = Dataset.from_dict(columns)
    ours = made(name)
    assert ours.clients == theirs.num_partitions
    expected = np.full(700, DROPPED)
    for client_id in range(theirs.num_partitions):
        expected[theirs.load_partition(client_id)["row"]] = client_id
    np.testing.assert_array_equal(ours.owners, expected)
    assert ours.keeps_groups == ("NaturalId" in name)


def test_all_that_divide_samples_are_listed_and_the_others_say_why_not():
    assert {name.removeprefix("flower:") for name in flower.names()} == ARGUMENTS.keys()
    everything = {name for name in flwr_partitioners.__all__ if name != "Partitioner"}
    for name in everything - ARGUMENTS.keys():
        with pytest.raises(ScenarioError, match=r"needs a function|divides the features"):
            partition_factory(f"flower:{name}")
    listed = {entry.name: entry for entry in discovery.describe("partitions")}
    assert set(flower.names()) <= set(listed)
    assert "Dirichlet" in listed["flower:DirichletPartitioner"].description
    keys = listed["flower:DirichletPartitioner"].keys
    assert "seed" not in keys
    assert "partition_by" not in keys
    assert keys["alpha"].required
    assert all(key.description for entry in listed.values() for key in entry.keys.values())


def test_the_seed_decides():
    for name in ("DirichletPartitioner", "PathologicalPartitioner", "ShardPartitioner"):
        np.testing.assert_array_equal(made(name, 1).owners, made(name, 1).owners)
        assert (made(name, 1).owners != made(name, 2).owners).any()


def test_what_a_partitioner_warns_of_and_leaves_out_is_in_the_manifest(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = prepare(
            {"name": "digits"},
            {"kind": "flower:SizePartitioner", "partition_sizes": [100, 200], "rotation": 10.0},
            seed=0,
            cache_dir=tmp_path,
        )
    assert data.num_clients == 2
    assert data.sizes([0, 1]).tolist() == [100, 200]
    dropped = data.manifest["dropped"]
    assert dropped == {"samples": 1438 - 300, "reason": "SizePartitioner gave them to nobody"}
    assert "smaller than the size" in data.manifest["partition"]["flower_warnings"][0]


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("DirichletPartitioner", {"alpha": -1.0}, "Alpha values should be strictly greater"),
        ("DirichletPartitioner", {"min_partition_size": 500}, r"max number of attempts \(10\)"),
        ("PathologicalPartitioner", {"num_classes_per_partition": 7}, "greater than the number"),
        ("SizePartitioner", {"partition_sizes": [701]}, "greater than the size of the dataset"),
        ("GroupedNaturalIdPartitioner", {"group_size": 0}, "cannot divide .* by zero"),
        ("ShardPartitioner", {"shard_size": None}, "shard_size needs to be specified"),
    ],
)
def test_what_a_partitioner_refuses_names_the_key_and_its_own_words(name, keys, message):
    ((key, value),) = keys.items()
    words = (
        rf"\[partition\] kind = 'flower:{name}', .*{key} = {re.escape(str(value))}.*: .*{message}"
    )
    with pytest.raises(ScenarioError, match=words):
        made(name, **keys)


def test_owners_are_needed_where_the_partitioner_goes_by_them():
    with pytest.raises(ScenarioError, match="NaturalIdPartitioner': the data set does not say"):
        made("NaturalIdPartitioner", groups=None)


def test_an_unknown_partitioner_is_refused_with_the_nearest():
    with pytest.raises(ScenarioError, match="did you mean 'flower:DirichletPartitioner'"):
        partition_factory("flower:DirichletPartitoner")


def test_ten_thousand_clients_take_seconds():
    factory = partition_factory("flower:DirichletPartitioner")
    began = time.perf_counter()
    partition = factory(clients=10_000, alpha=1.0, min_partition_size=0)
    assert partition.assign(Samples(np.arange(60_000) % 10), 0).clients == 10_000
    assert time.perf_counter() - began < 20


def test_nothing_is_imported_before_it_is_named_and_nothing_is_ever_sent(monkeypatch):
    code = (
        "import sys, fedsim.data\nfrom fedsim.data.partitions import flower\n"
        "print(len(flower.names()) > 10, 'flwr_datasets' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True False\n"

    def refuse(*_):
        raise AssertionError("something was sent")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    made("DirichletPartitioner")
    from flwr_datasets.common import telemetry

    assert telemetry.state["executor"] is None
