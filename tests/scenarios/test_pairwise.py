"""Any two of data, partition, participation, model and strategy run, or are refused why not."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.runs import start as run
from fedsim.scenario import discovery
from fedsim.scenario.scenario import Scenario
from tests.data.tables import pictures, write
from tests.strategy.flower_world.worlds import ARGUMENTS

CLIENTS, SAMPLES = 4, 80
FROM_THE_NET = {"hub"}
BASE = {
    "data": "digits", "partition": "iid", "participation": "full", "model": "mlp",
    "strategy": "fedavg",
}  # fmt: skip
# what a choice needs of the others, where the base does not have it
NEEDS = {
    ("data", "shakespeare"): {"model": "char_lstm"},
    ("data", "synthetic"): {"partition": "natural"},
    ("data", "zipf"): {"partition": "natural"},
    ("data", "brittle"): {"partition": "natural"},
    ("model", "char_lstm"): {"data": "shakespeare"},
    ("model", "mcmahan_mnist"): {"data": "mnist"},
    ("model", "mcmahan_cifar"): {"data": "cifar10"},
    ("partition", "natural"): {"data": "folder"},
    ("partition", "grouped"): {"data": "folder"},
    ("partition", "flower:NaturalIdPartitioner"): {"data": "folder"},
    ("partition", "flower:GroupedNaturalIdPartitioner"): {"data": "folder"},
}
SLOW_MODELS = {"resnet18", "mcmahan_mnist", "mcmahan_cifar"}
KEYS = {
    "data": {
        "synthetic": {"dimension": 6, "classes": 3, "max_samples": 30, "test_clients": 4},
        "zipf": {"dimension": 12, "active": 3, "samples": 20, "test_clients": 4},
        "brittle": {"weak": 5, "samples": 20, "test_clients": 4},
    },
    "partition": {
        "natural": {},
        "flower:ContinuousPartitioner": {"strictness": 0.5},
        "flower:DirichletPartitioner": {"alpha": 1.0, "min_partition_size": 1},
        "flower:DistributionPartitioner": {
            "distribution_array": [[0.5] * CLIENTS] * 10,
            "num_unique_labels_per_partition": 2,
            "preassigned_num_samples_per_label": 1,
        },
        "flower:InnerDirichletPartitioner": {"partition_sizes": [10] * CLIENTS, "alpha": 1.0},
        "flower:PathologicalPartitioner": {"num_classes_per_partition": 2},
        "flower:ShardPartitioner": {"num_shards_per_partition": 2},
        "flower:SizePartitioner": {"partition_sizes": [10] * CLIENTS},
    },
    "participation": {"uniform": {"cohort_size": 3}},
    "model": {"mlp": {"hidden": [4]}, "mlp_dropout": {"hidden": [4]}, "char_lstm": {"hidden": 4}},
    "strategy": {f"flower:{name}": dict(keys) for name, keys in ARGUMENTS.items()},
}
for _name, _keys in KEYS["strategy"].items():
    if "AdaptiveClipping" in _name:
        _keys["clipped_count_stddev"] = 1.0  # by default too little for so few clients
    if "num_malicious_nodes" in _keys:
        _keys["num_malicious_nodes"] = 0  # more needs five clients, or seven


def covering_rows(factors):
    """Return rows, one value per factor, in which every two values of two factors meet.

    Greedy: each row begins with the first pair not met yet, and takes for every other factor the
    value that meets most of the row's values for the first time.
    """
    names = list(factors)
    unmet = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    )
    rows = []
    while unmet:
        row = dict(next(iter(unmet)))
        for name in names:
            if name in row:
                continue

            def meets(value, row=row, name=name):
                pairs = (sorted([(name, value), item], key=_order(names)) for item in row.items())
                return sum(tuple(pair) in unmet for pair in pairs)

            row[name] = max(factors[name], key=meets)
        for pair in itertools.combinations([(name, row[name]) for name in names], 2):
            unmet.pop(pair, None)
        rows.append(row)
    return rows


def _order(names):
    return lambda item: names.index(item[0])


def factors():
    """All that discovery finds without a network."""
    return {
        "data": [name for name in discovery.names("datasets") if name not in FROM_THE_NET],
        "partition": discovery.names("partitions"),
        "participation": discovery.names("participation"),
        "model": discovery.names("models"),
        "strategy": discovery.names("strategies") + discovery.flower_names(),
    }


def test_covering_rows_hold_every_pair():
    some = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False], "d": list(range(5))}
    rows = covering_rows(some)
    for one, other in itertools.combinations(some, 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(itertools.product(some[one], some[other]))
    assert len(rows) < 25  # of 60; the fewest there can be are 15


# A folder with a tiny data set for each that is read from files.


def _image_folders(root):
    seed = itertools.count()
    for name, image, label, classes, shape in (
        ("mnist", "image", "label", 10, (28, 28)),
        ("fashion_mnist", "image", "label", 10, (28, 28)),
        ("cifar10", "img", "label", 10, (32, 32, 3)),
        ("cifar100", "img", "fine_label", 100, (32, 32, 3)),
    ):
        kinds = {image: "image", label: [str(c) for c in range(classes)]}
        for split, count in (("train", SAMPLES), ("test", 10)):
            columns = {
                image: list(pictures(count, next(seed), shape)),
                label: [row % classes for row in range(count)],
            }
            types = dict(kinds)
            if name == "cifar100":
                columns["coarse_label"] = [row % 20 for row in range(count)]
                types["coarse_label"] = [str(c) for c in range(20)]
            write(root / name / f"{split}-00000-of-00001.parquet", columns, types)


def _owned_folders(root):
    owners = [f"owner {row % 6}" for row in range(SAMPLES)]
    write(
        root / "femnist" / "train-00000-of-00001.parquet",
        {
            "image": list(pictures(SAMPLES, 99)),
            "writer_id": owners,
            "hsf_id": [0] * SAMPLES,
            "character": [row % 62 for row in range(SAMPLES)],
        },
        {
            "image": "image",
            "writer_id": "string",
            "hsf_id": "int64",
            "character": [str(c) for c in range(62)],
        },
    )
    text = ["".join(chr(97 + (row + k) % 26) for k in range(81)) for row in range(600)]
    write(
        root / "shakespeare" / "train-00000-of-00001.parquet",
        {
            "character_id": [f"role {row // 120}" for row in range(600)],
            "x": [line[:80] for line in text],
            "y": [line[80] for line in text],
        },
        {"character_id": "string", "x": "string", "y": "string"},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairwise")
    _image_folders(root)
    _owned_folders(root)
    draw = np.random.default_rng(0)
    rows = [
        ",".join([*(f"{v:.3f}" for v in draw.normal(size=3)), f"site {row % 5}", str(row % 3)])
        for row in range(SAMPLES)
    ]
    (root / "folder.csv").write_text("\n".join(["a,b,c,site,kind", *rows]) + "\n")
    (root / "owners.csv").write_text(
        "\n".join(["sample,client", *(f"{row},{row % CLIENTS}" for row in range(40))]) + "\n"
    )
    trace = ["round,client", *(f"{r},{c}" for r in (1, 2) for c in range(r, CLIENTS))]
    (root / "trace.csv").write_text("\n".join(trace) + "\n")
    return root


def document(row, root):
    """The scenario of one row."""
    data = {"name": row["data"], **KEYS["data"].get(row["data"], {})}
    if row["data"] == "folder":
        data |= {"path": str(root / "folder.csv"), "target": "kind", "group": "site"}
    elif (root / row["data"]).is_dir():
        data["path"] = str(root / row["data"])
    partition = {"kind": row["partition"]}
    schema = discovery.schema("partitions", row["partition"])
    if "clients" in schema:
        partition["clients"] = CLIENTS
    partition |= KEYS["partition"].get(row["partition"], {})
    if "path" in schema:
        partition["path"] = str(root / "owners.csv")
    participation = {"kind": row["participation"]}
    participation |= KEYS["participation"].get(row["participation"], {})
    if row["participation"] == "trace":
        participation["path"] = str(root / "trace.csv")
    elif "rate" in discovery.schema("participation", row["participation"]):
        participation["rate"] = 0.75
    return {
        "rounds": 1,
        "data": data,
        "partition": partition,
        "participation": participation,
        "task": {"model": row["model"], **KEYS["model"].get(row["model"], {})},
        "strategy": {"name": row["strategy"], **KEYS["strategy"].get(row["strategy"], {})},
        "client": {"local_lr": 0.01, "local_steps": 1, "batch_size": 4},
        "engine": {"kind": "inline"},
    }


def outcome(row, root, out):
    """Run one row; return why it was refused, or None after holding what the run left."""
    try:
        scenario = Scenario.from_resolved(document(row, root), origin="row.toml")
        done = run.start(scenario, out=out)
    except ScenarioError as error:
        return str(error)
    records = JsonLines.read(done.folder / "metrics.jsonl")
    assert [record["round"] for record in records] == [0, 1]
    assert math.isfinite(records[1]["test/loss"])
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["held_out"]["samples"] > 0
    assert records[1]["clients/failed"] == 0
    return None


def hold(rows, root, tmp_path):
    """Run the rows; return how many ran, and the refusals."""
    refusals = {}
    for number, row in enumerate(rows):
        reason = outcome(row, root, tmp_path / str(number))
        if reason is None:
            continue
        for line in reason.splitlines():
            assert re.match(r"(row\.toml: )?\[\w+\] \S", line), (row, line)
            assert "is missing" not in line, (row, line)  # this file would have to give it
        refusals[tuple(row.values())] = reason
    return len(rows) - len(refusals), refusals


def test_some_rows_run_and_the_others_are_refused_with_a_reason(folders, tmp_path):
    rows = covering_rows({**factors(), "model": sorted({*factors()["model"]} - SLOW_MODELS)})
    ran, refusals = hold(rows[:: len(rows) // 24], folders, tmp_path)
    assert ran >= 5
    assert refusals


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_two_choices_run_together_or_are_refused_with_a_reason(folders, tmp_path):
    """Pairs that met only in refused rows meet once more among choices that fit everything."""
    rows = covering_rows(factors())
    ran, refusals = hold(rows, folders, tmp_path / "rows")
    met = {pair for row in rows if tuple(row.values()) not in refusals for pair in _pairs(row)}
    masked = dict.fromkeys(pair for row in rows for pair in _pairs(row) if pair not in met)
    alone = []
    for pair in masked:
        needed = {key: value for item in pair for key, value in NEEDS.get(item, {}).items()}
        alone.append({**BASE, **needed, **dict(pair)})
    alone = list({tuple(row.values()): row for row in alone}.values())
    ran_alone, refused_alone = hold(alone, folders, tmp_path / "alone")
    print(f"{len(rows)} rows, {ran} ran; {len(alone)} masked pairs, {ran_alone} ran alone")
    for row, reason in refused_alone.items():
        print(row, reason.splitlines()[0])
    refusals |= refused_alone
    running = [row for row in (*rows, *alone) if tuple(row.values()) not in refusals]
    for factor, values in factors().items():
        never = set(values) - {row[factor] for row in running}
        assert not never, f"{factor} {sorted(never)} never runs"


def _pairs(row):
    return itertools.combinations(row.items(), 2)
