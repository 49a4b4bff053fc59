"""Records from tensors and back: what is packed once need not be unpacked, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedsim.messages.layout import Layout
from fedsim.messages.records import (
    ArraysMismatchError,
    array_record,
    first_not_finite,
    kept_model_record,
    model_record,
    model_tensors,
)

NAMED = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3), "n": torch.tensor(4)}
LAYOUT = Layout.from_named(NAMED)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i8", "i4", "u1", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (2, 1, 3, 4), (10**4,)])
def test_a_record_holds_the_bytes_that_flower_would_have_made(dtype, shape):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = torch.from_numpy(values)
    record = array_record({"plain": tensor, "turned": tensor.t() if tensor.dim() == 2 else tensor})
    assert record["plain"] == Array(values)
    turned = np.ascontiguousarray(values.T) if values.ndim == 2 else values
    assert record["turned"] == Array(turned)
    np.testing.assert_array_equal(record["turned"].numpy(), turned)


def packed(change=0.0):
    params = LAYOUT.flatten(NAMED) + change
    return params, kept_model_record(LAYOUT, params, {"n": NAMED["n"]})


def test_the_record_that_was_packed_last_is_not_unpacked():
    params, record = packed()
    again, buffers = model_tensors(LAYOUT, record)
    assert torch.equal(again, params)
    assert torch.equal(buffers["n"], NAMED["n"])
    # another record of the same arrays is the same model
    other = ArrayRecord(dict(record.items()))
    assert model_tensors(LAYOUT, other)[0] is model_tensors(LAYOUT, record)[0]


@pytest.mark.parametrize("whose", ["packed", "params", "a view", "buffer"])
def test_a_record_holds_what_was_packed_whatever_is_done_to_tensors(whose):
    params, record = packed()
    again, buffers = model_tensors(LAYOUT, record)
    if whose == "packed":
        params += 1
    elif whose == "params":
        again += 1
    elif whose == "a view":
        again[2:4].zero_()
    else:
        buffers["n"] += 1
    found, counts = model_tensors(LAYOUT, record)
    assert torch.equal(found, LAYOUT.flatten(NAMED))
    assert int(counts["n"]) == 4


def test_a_kept_record_is_the_record_that_is_not_kept():
    params, record = packed(0.1)
    assert record == model_record(LAYOUT, params, {"n": NAMED["n"]})


@pytest.mark.parametrize("how", ["array", "data", "copy", "later", "fewer"])
def test_a_record_that_is_not_the_one_packed_is_read(how):
    _, record = packed()
    other = Array((NAMED["w"] * 2).numpy())
    if how == "array":
        record["w"] = other
    elif how == "data":
        record["w"].data = other.data
    elif how == "copy":
        record = copy.deepcopy(record)
        record["w"].data = other.data
    elif how == "later":
        doubled = LAYOUT.flatten({**NAMED, "w": NAMED["w"] * 2})
        record = model_record(LAYOUT, doubled, {"n": NAMED["n"]})
        packed(0.5)
    else:
        del record["b"]
        with pytest.raises(ArraysMismatchError):
            model_tensors(LAYOUT, record)
        return
    expected = LAYOUT.flatten({**NAMED, "w": NAMED["w"] * 2})
    assert torch.equal(model_tensors(LAYOUT, record)[0], expected)


def test_a_model_of_another_dtype_than_the_layouts_is_read():
    record = kept_model_record(LAYOUT, LAYOUT.flatten(NAMED), {"n": torch.tensor(4.0)})
    assert model_tensors(LAYOUT, record)[1]["n"].dtype == torch.int64


def test_a_model_whose_packing_rounds_is_read_as_it_was_packed():
    layout = Layout.from_named({"w": torch.zeros(2), "v": torch.zeros(1, dtype=torch.float64)})
    params = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    record = kept_model_record(layout, params, {})
    found, _ = model_tensors(layout, record)
    assert found[0] == torch.tensor(0.1).double() != params[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_whether_the_record_was_packed_here_or_not(value):
    params, _ = packed()
    params = params.clone()
    params[-1] = value
    record = kept_model_record(LAYOUT, params, {"n": NAMED["n"]})
    assert first_not_finite(record) == first_not_finite(copy.deepcopy(record)) == "b"


def test_numbers_whose_sum_is_out_of_range_are_finite():
    record = kept_model_record(LAYOUT, torch.full((LAYOUT.dim,), 3e38), {"n": NAMED["n"]})
    assert first_not_finite(record) is None
