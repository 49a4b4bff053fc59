"""Files of tensors: safetensors reads what was put in, whatever its dtype, shape and layout."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load

from fedsim.basics.tensor_file import DTYPES, write_tensors

shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


def made(shape, dtype, seed):
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype)


@given(
    drawn=st.dictionaries(
        st.text(min_size=1, max_size=5), st.tuples(shapes, st.sampled_from(list(DTYPES)))
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5)),
)
def test_safetensors_reads_what_was_written(tmp_path_factory, drawn, metadata):
    tensors = {name: made(*what, seed) for seed, (name, what) in enumerate(drawn.items())}
    file = io.BytesIO()
    write_tensors(file, tensors, metadata)
    read = load(file.getvalue())
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].double(), tensor.double())
    place = tmp_path_factory.getbasetemp() / "tensors"
    place.write_bytes(file.getvalue())
    with safe_open(place, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_views_are_written_as_what_they_show():
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": whole.t(), "part": whole[1::2, 2:5], "same": whole, "again": whole}
    file = io.BytesIO()
    write_tensors(file, tensors, {})
    read = load(file.getvalue())
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_lies_at_a_multiple_of_its_numbers_length():
    file = io.BytesIO()
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2, dtype=torch.float64)}
    write_tensors(file, {**tensors, "c": torch.ones(1, dtype=torch.float16)}, {"x": "y"})
    content = file.getvalue()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    assert content[start : start + 16] == torch.ones(2, dtype=torch.float64).numpy().tobytes()
    assert content[start + 16 : start + 18] == torch.ones(1, dtype=torch.float16).numpy().tobytes()


def test_a_dtype_that_the_format_does_not_have_is_no_key():
    with pytest.raises(KeyError):
        write_tensors(io.BytesIO(), {"c": torch.zeros(1, dtype=torch.complex64)}, {})
