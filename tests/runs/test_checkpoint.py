"""Checkpoints: there whole or not at all, complete, and refused when they do not fit."""

import contextlib
import json
import resource
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedsim.basics.errors import CheckpointError
from fedsim.runs import checkpoint as checkpoints
from fedsim.runs.checkpoint import Checkpoint, latest, load, require, save
from fedsim.strategy.foreign import dump_attributes, load_attributes


def make(server_round: int = 4, **changes: object) -> Checkpoint:
    """A checkpoint in which every field has something in it."""
    random = torch.Generator().manual_seed(server_round)
    made = Checkpoint(
        server_round=server_round,
        scenario_sha256="a" * 64,
        plan={"executor": "vmap", "chunk_size": 5, "threads": 1},
        versions={"python": "3.11.7", "ray": None},
        model={
            "z.weight": torch.randn(3, 2, generator=random),
            "a.bias": torch.tensor([float("nan"), -0.0, float("inf")]),
            "norm.num_batches_tracked": torch.tensor(7),
            "empty": torch.zeros(0, 4, dtype=torch.float64),
        },
        strategy={
            "momentum": torch.randn(6, dtype=torch.float64, generator=random),
            "per_layer": {"b": torch.ones(2), "a": torch.zeros(1, dtype=torch.bool)},
            "history": [torch.tensor([1, 2]), torch.tensor([3])],
            "rounds": 4,
            "rate": 0.1 + 0.2,
            "name": "ünï",
            "started": True,
            "nothing": None,
        },
        clients=[2, 17, 10**6],
        client_state={"momentum": torch.randn(3, 6, generator=random)},
        participation={"phase": [1, 2], "cursor": {"at": 3}},
        offsets={"metrics.jsonl": 1234, "participation.jsonl": 0},
        elapsed_s=12.5,
    )
    return replace(made, **changes)


def equal(one: object, other: object) -> bool:
    """Whether two values are of the same types and equal bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(equal(value, other[name]) for name, value in one.items())
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


# What is saved comes back.


@pytest.mark.parametrize("name", [f.name for f in fields(Checkpoint)])
def test_a_field_comes_back_bit_for_bit(folder, name):
    saved = make()
    found = load(save(folder, saved, keep=1))
    assert equal(getattr(found, name), getattr(saved, name))


def test_tensors_come_back_in_their_order(folder):
    found = load(save(folder, make(), keep=1))
    assert list(found.model) == ["z.weight", "a.bias", "norm.num_batches_tracked", "empty"]
    assert list(found.strategy["per_layer"]) == ["b", "a"]


def test_a_run_before_its_first_round_has_no_strategy_state(folder):
    saved = make(0, strategy=None, clients=[], client_state={})
    found = load(save(folder, saved, keep=1))
    assert found.strategy is None
    assert found.clients == []
    assert found.client_state == {}


def test_an_empty_strategy_state_is_not_none(folder):
    assert load(save(folder, make(strategy={}), keep=1)).strategy == {}


def test_tensors_that_share_memory_or_are_not_contiguous_come_back(folder):
    whole = torch.arange(12.0).reshape(3, 4)
    saved = make(model={"all": whole, "turned": whole.T, "row": whole[1]})
    assert equal(load(save(folder, saved, keep=1)).model, saved.model)


def test_saving_changes_none_of_the_tensors(folder):
    saved, same = make(), make()
    save(folder, saved, keep=1)
    assert all(equal(getattr(saved, f.name), getattr(same, f.name)) for f in fields(Checkpoint))


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text()
numbers = st.floats(allow_nan=False, allow_infinity=False)
states = st.dictionaries(
    st.text(min_size=1).filter(lambda name: "/" not in name), scalars | numbers, max_size=5
)


@settings(max_examples=30)
@given(state=states)
def test_plain_values_of_a_state_come_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("plain") / "checkpoints"
    assert equal(load(save(folder, make(strategy=state), keep=1)).strategy, state)


@given(
    dtype=st.sampled_from(
        [torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]
    ),
    shape=st.lists(st.integers(0, 3), max_size=4),
)
def test_tensors_of_every_dtype_and_shape_come_back(tmp_path_factory, dtype, shape):
    folder = tmp_path_factory.mktemp("tensors") / "checkpoints"
    values = (torch.arange(int(np.prod(shape))) * 37 % 5).reshape(shape).to(dtype)
    saved = make(strategy={"values": values}, model={"values": values})
    found = load(save(folder, saved, keep=1))
    assert equal(found.model, saved.model)
    assert equal(found.strategy, saved.strategy)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_of_a_state_that_is_not_finite_comes_back(folder, value):
    found = load(save(folder, make(strategy={"best": value}), keep=1)).strategy
    assert equal(torch.tensor(found["best"]), torch.tensor(value))


# Files come and go whole.


def test_the_newest_checkpoints_are_kept(folder):
    for server_round in range(6):
        save(folder, make(server_round), keep=2)
    assert sorted(p.name for p in folder.iterdir()) == [
        "round_000004.safetensors",
        "round_000005.safetensors",
    ]


def test_the_latest_checkpoint_is_that_of_the_highest_round(folder):
    for server_round in (999_999, 1_000_000, 9):
        save(folder, make(server_round), keep=10)
    assert latest(folder) == folder / "round_1000000.safetensors"


def test_there_is_no_latest_checkpoint_without_a_folder_or_in_an_empty_one(folder):
    assert latest(folder) is None
    folder.mkdir()
    assert latest(folder) is None


def test_a_leftover_temporary_file_is_no_checkpoint_and_does_not_hinder(folder):
    save(folder, make(1), keep=2)
    (folder / "round_000002.tmp").write_bytes(b"torn")
    assert latest(folder) == folder / "round_000001.safetensors"
    assert load(save(folder, make(2), keep=2)).server_round == 2
    assert not list(folder.glob("*.tmp"))


def test_saving_a_round_again_replaces_it(folder):
    save(folder, make(2, elapsed_s=1.0), keep=2)
    assert load(save(folder, make(2, elapsed_s=9.0), keep=2)).elapsed_s == 9.0
    assert len(list(folder.iterdir())) == 1


def test_nothing_in_a_checkpoint_is_pickled(folder):
    place = save(folder, make(), keep=1)
    content = place.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert 8 + length + max(ends) == len(content)
    assert json.loads(header["__metadata__"]["fedsim"])["server_round"] == 4


# What is torn, altered or foreign is refused, with the file and a way out.


def refusal(place: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load(place)
    message = str(refused.value)
    assert message.startswith(f"{place}: ")
    assert not message.endswith(".")
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole"), make(), keep=1).read_bytes()


@given(data=st.data())
def test_a_torn_checkpoint_is_refused_wherever_it_was_torn(tmp_path_factory, whole, data):
    length = data.draw(st.integers(0, len(whole) - 1))
    place = tmp_path_factory.mktemp("torn") / "round_000004.safetensors"
    place.write_bytes(whole[:length])
    assert "is torn or not a checkpoint" in refusal(place)


@given(data=st.data())
def test_a_checkpoint_with_one_flipped_bit_is_refused(tmp_path_factory, whole, data):
    at = data.draw(st.integers(0, 8 * len(whole) - 1))
    place = tmp_path_factory.mktemp("flipped") / "round_000004.safetensors"
    altered = bytearray(whole)
    altered[at // 8] ^= 1 << at % 8
    place.write_bytes(bytes(altered))
    refusal(place)


def test_a_flipped_bit_of_a_tensor_is_told_from_a_torn_file(tmp_path, whole):
    place = tmp_path / "round_000004.safetensors"
    place.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not match its hash" in refusal(place)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"{}" * 40, b"\xff" * 64])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content):
    place = tmp_path / "round_000004.safetensors"
    place.write_bytes(content)
    assert "is torn or not a checkpoint" in refusal(place)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    place = tmp_path / "round_000004.safetensors"
    save_file({"weight": torch.ones(2)}, place, {"format": "pt"})
    assert "is a safetensors file but not a checkpoint of fedsim" in refusal(place)


def test_a_folder_in_a_checkpoint_s_place_is_refused(tmp_path):
    place = tmp_path / "round_000004.safetensors"
    place.mkdir()
    assert "is torn or not a checkpoint" in refusal(place)


def rewritten(place: Path, **changes: object) -> Path:
    """A checkpoint with a valid hash whose JSON text differs."""
    tensors, values = checkpoints._pack(make())
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    text = json.dumps(values)
    header = {"fedsim": text, "sha256": checkpoints._digest(text, tensors)}
    save_file(tensors, place, header)
    return place


def test_a_checkpoint_of_another_format_is_refused_naming_both(tmp_path):
    message = refusal(rewritten(tmp_path / "round_000004.safetensors", format=99))
    assert "has format 99, this fedsim reads format 1" in message
    assert "versions.json" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"order": {"model": ["no such tensor"], "strategy": [], "client": []}},
        {"order": ...},
        {"clients": ...},
        {"strategy": {"momentum": {"kind": "tensor", "more": 1}, "ghost": {"kind": "tensor"}}},
    ],
)
def test_a_checkpoint_whose_text_does_not_fit_its_tensors_is_refused(tmp_path, changes):
    refusal(rewritten(tmp_path / "round_000004.safetensors", **changes))


def test_a_refusal_names_the_older_checkpoint_to_resume_from(folder):
    for server_round in (1, 2, 3):
        save(folder, make(server_round), keep=3)
    place = folder / "round_000003.safetensors"
    place.write_bytes(place.read_bytes()[:-3])
    assert "delete it to resume from round_000002.safetensors" in refusal(place)
    place.unlink()
    assert load(latest(folder)).server_round == 2


def test_a_refusal_without_an_older_checkpoint_says_so(folder):
    place = save(folder, make(1), keep=1)
    place.write_bytes(place.read_bytes()[:-3])
    assert "start the run anew with `fedsim run`" in refusal(place)


def test_a_refusal_of_an_old_checkpoint_does_not_point_to_a_newer_one(folder):
    for server_round in (1, 2):
        save(folder, make(server_round), keep=2)
    place = folder / "round_000001.safetensors"
    place.write_bytes(place.read_bytes()[:-3])
    assert "round_000002" not in refusal(place)


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("scenario_sha256", "b" * 64, "another scenario sha256"),
        (
            "plan",
            {"executor": "vmap", "chunk_size": 3, "threads": 1},
            "chunk_size: checkpoint 5, now 3",
        ),
        ("plan", {"executor": "vmap", "threads": 1}, "chunk_size: checkpoint 5, now None"),
        (
            "versions",
            {"python": "3.12.1", "ray": None},
            "python: checkpoint '3.11.7', now '3.12.1'",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(tmp_path, name, other, words):
    place = tmp_path / "round_000004.safetensors"
    saved = make()
    expected = {n: getattr(saved, n) for n in ("scenario_sha256", "plan", "versions")}
    require(saved, place, **expected)
    with pytest.raises(CheckpointError) as refused:
        require(saved, place, **(expected | {name: other}))
    message = str(refused.value)
    assert message.startswith(f"{place}: ")
    assert words in message
    assert "start a new run" in message


# A disk that is full loses nothing.


@contextlib.contextmanager
def small_files():
    """Files of this process may not grow beyond 20 kB: writing more fails as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_is_named_and_nothing_is_lost(folder):
    first = save(folder, make(1), keep=1).read_bytes()
    large = make(2, model={"w": torch.ones(10_000)})
    with small_files(), pytest.raises(CheckpointError) as refused:
        save(folder, large, keep=1)
    message = str(refused.value)
    assert message.startswith(f"{folder / 'round_000002.safetensors'}: cannot be written: ")
    assert "make room and `fedsim resume` the run" in message
    assert [p.name for p in folder.iterdir()] == ["round_000001.safetensors"]
    assert (folder / "round_000001.safetensors").read_bytes() == first
    assert load(save(folder, large, keep=1)).server_round == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "checkpoints", make(), keep=1)
    assert (tmp_path / "checkpoints").read_text() == "a file"


# State that a checkpoint cannot hold is refused when it is saved, not when it is missed.


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        (np.ones(2), "ndarray"),
        ([1, 2], "list"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (1j, "complex"),
    ],
)
def test_a_state_of_an_unsupported_kind_is_refused_by_name(folder, value, kind):
    with pytest.raises(CheckpointError, match=rf"the strategy's 'memory' is a {kind};"):
        save(folder, make(strategy={"memory": value}), keep=1)
    assert latest(folder) is None


@pytest.mark.parametrize("value", [{"a": torch.ones(1), "b": 2}, [torch.ones(1), "b"]])
def test_a_state_that_mixes_tensors_with_values_is_refused_by_name(folder, value):
    with pytest.raises(CheckpointError, match="the strategy's 'memory' mixes tensors with"):
        save(folder, make(strategy={"memory": value}), keep=1)


# Strategies that are not fedsim's.


def record(*values: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.array(values, dtype=np.float32))})


def test_the_attributes_of_a_flower_strategy_survive_a_checkpoint(folder):
    strategy = FedAdam(eta=0.3, beta_1=0.5)
    strategy.current_arrays = {"w": np.array([1.0, 2.0], dtype=np.float32)}
    strategy.m_t = {"w": np.array([0.25, 0.5])}
    strategy.v_t = {"w": np.array([4.0, 8.0])}
    state = load(save(folder, make(strategy=dump_attributes(strategy)), keep=1)).strategy
    fresh = FedAdam(eta=9.0)
    load_attributes(fresh, state)
    assert fresh.eta == 0.3
    for name in ("current_arrays", "m_t", "v_t"):
        before, after = getattr(strategy, name)["w"], getattr(fresh, name)["w"]
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)


def test_array_records_of_a_flower_strategy_survive_a_checkpoint(folder):
    strategy = FedAvg()
    strategy.remembered = record(1.0, 2.0)
    state = load(save(folder, make(strategy=dump_attributes(strategy)), keep=1)).strategy
    fresh = FedAvg()
    load_attributes(fresh, state)
    assert isinstance(fresh.remembered, ArrayRecord)
    np.testing.assert_array_equal(fresh.remembered["w"].numpy(), [1.0, 2.0])


def test_a_strategy_inside_another_one_survives_a_checkpoint(folder):
    strategy, inside = FedAvg(), FedAdam(eta=0.3)
    strategy.inside, inside.m_t = inside, {"w": np.array([0.25, 0.5])}
    state = load(save(folder, make(strategy=dump_attributes(strategy)), keep=1)).strategy
    fresh = FedAvg()
    fresh.inside = kept = FedAdam(eta=9.0)
    load_attributes(fresh, state)
    assert fresh.inside is kept
    assert kept.eta == 0.3
    np.testing.assert_array_equal(kept.m_t["w"], [0.25, 0.5])


@pytest.mark.parametrize(
    "value",
    [[1.0, 2.0], {"a": 2.0}, {"a": [1, {"b": None}]}, {"w": torch.ones(1)}, torch.ones(2), [],
     b"a tree", {1, 2}, {1: 2.0}, [np.ones(1), 2.0], (1, (2, "a"))],
)  # fmt: skip
def test_values_that_a_flower_strategy_remembers_survive_a_checkpoint(folder, value):
    strategy = FedAvg()
    strategy.memory = value
    state = load(save(folder, make(strategy=dump_attributes(strategy)), keep=1)).strategy
    fresh = FedAvg()
    load_attributes(fresh, state)
    assert hasattr(fresh, "memory")
    assert equal(fresh.memory, value)


@pytest.mark.parametrize("value", [iter([1]), (i for i in "ab"), memoryview(b"a tree")])
def test_what_a_checkpoint_cannot_hold_of_a_flower_strategy_is_refused_by_name(value):
    strategy = FedAvg()
    strategy.memory = value
    with pytest.raises(CheckpointError, match="'memory'"):
        dump_attributes(strategy)


def test_attributes_of_a_checkpoint_of_before_are_read():
    strategy = FedAvg()
    strategy.inner = FedAdam(eta=9.0)
    held = {"beta": 0.5, "arrays:m": {"w": torch.ones(2)}, "json:losses": "[1, 2]"}
    load_attributes(strategy, {**held, "inner:inner:eta": 0.3, "record:r": {"w": torch.ones(1)}})
    assert (strategy.beta, strategy.losses, strategy.inner.eta) == (0.5, [1, 2], 0.3)
    np.testing.assert_array_equal(strategy.m["w"], [1.0, 1.0])
    np.testing.assert_array_equal(strategy.r["w"].numpy(), [1.0])


def test_the_configuration_of_a_flower_strategy_is_left_to_the_scenario():
    assert not {"train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"} & set(
        dump_attributes(FedAvg())
    )
