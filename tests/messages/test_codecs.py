"""Vectors in few bytes: what is written is read again, and nothing else is."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.messages import codecs
from fedsim.messages.codecs import CODECS, EncodingError, decoded

DTYPES = [torch.float32, torch.float64]
FINITE = st.floats(allow_nan=False, allow_infinity=False)
FLOATS = st.floats(-1e6, 1e6, width=32, allow_nan=False)


def vector(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@given(st.integers(1, 20), st.lists(st.integers(0, 2**20 - 1), max_size=30))
def test_packed_numbers_are_read_again_from_as_few_bytes_as_they_take(bits, numbers):
    codes = np.array([number % 2**bits for number in numbers], dtype=np.int64)
    content = codecs.packed(codes, bits)
    assert content.dtype == torch.uint8
    assert len(content) == -(-len(codes) * bits // 8)
    assert codecs.unpacked(content, len(codes), bits).tolist() == codes.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=40), st.data())
def test_entries_are_written_as_they_are_and_the_others_are_the_base(dtype, pairs, data):
    base, wanted = (vector(each, dtype) for each in zip(*pairs, strict=True))
    places = sorted(data.draw(st.sets(st.integers(0, len(pairs) - 1))))
    encoded = codecs.sparse(torch.tensor(places, dtype=torch.int64), wanted)
    found = decoded(base, encoded)
    for place in range(len(pairs)):
        assert found[place] == (wanted if place in places else base)[place]
    size = encoded[codecs.PLACES].numel()
    # as many bits for each place as tell all places apart; none where all are sent
    told = 0 if len(places) == len(pairs) else len(places)
    assert size == -(-told * max(1, (len(pairs) - 1).bit_length()) // 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.integers(1, 300), st.data())
def test_levels_and_signs_are_read_as_they_were_written(dtype, values, steps, data):
    base = vector(values, dtype)
    some = [data.draw(st.integers(-steps, steps)) for _ in values]
    norm = torch.tensor(3.0, dtype=dtype)
    encoded = codecs.levels(norm, steps, np.array(some))
    found = decoded(base, encoded)
    assert torch.equal(found, base + norm * torch.tensor(some).to(dtype) / steps)
    assert encoded[codecs.LEVELS].numel() == -(-len(values) * (2 * steps).bit_length() // 8)
    positive = torch.tensor([s > 0 for s in some])
    bits = codecs.signs(norm, positive)
    assert torch.equal(decoded(base, bits), base + torch.where(positive, norm, -norm))
    assert bits[codecs.SIGNS].numel() == -(-len(values) // 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(FINITE, min_size=1, max_size=30), st.data())
def test_powers_of_two_lie_beside_what_was_written(dtype, values, data):
    wanted = vector(values, dtype)
    wanted = torch.where(wanted.isfinite(), wanted, 0)
    up = torch.tensor([data.draw(st.booleans()) for _ in values])
    encoded = codecs.powers(wanted, up)
    found = decoded(torch.zeros_like(wanted), encoded)
    bits = 9 if dtype == torch.float32 else 12
    assert encoded[codecs.POWERS].numel() == -(-len(values) * bits // 8)
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    for x, y, above in zip(wanted.tolist(), found.tolist(), up.tolist(), strict=True):
        if abs(x) < least:
            assert y == 0 or (above and abs(y) == least)
            continue
        mantissa, _ = np.frexp(abs(y))
        assert mantissa == 0.5
        assert np.sign(y) == np.sign(x)
        if abs(y) == abs(x):
            continue
        if above and abs(x) < most / 2:
            assert abs(x) < abs(y) <= 2 * abs(x)
        elif not above:
            assert abs(x) / 2 < abs(y) <= abs(x)


BASE = vector([1.0, 2.0, 3.0, 4.0, 5.0])
GOOD = {
    "sparse": codecs.sparse(torch.tensor([1, 3]), BASE),
    "levels": codecs.levels(torch.tensor(1.0).double(), 4, np.array([-4, 0, 1, 4, 2])),
    "signs": codecs.signs(torch.tensor(1.0).double(), BASE > 2),
    "powers": codecs.powers(BASE, BASE > 2),
}


def test_every_codec_is_here():
    assert GOOD.keys() == CODECS.keys()
    for name, encoded in GOOD.items():
        assert encoded.keys() == CODECS[name].names


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    "broken",
    [
        lambda t: t[:0],
        lambda t: torch.cat([t, t]),
        lambda t: t.reshape(-1, 1),
        lambda t: t.to(torch.int16),
        lambda t: t.to(torch.float16),
        lambda t: t.new_full(t.shape, 255 if t.dtype == torch.uint8 else -3),
    ],
    ids=["empty", "twice", "shape", "int16", "float16", "other numbers"],
)
def test_what_no_codec_can_have_written_is_refused_or_is_a_vector(name, broken):
    for key, tensor in GOOD[name].items():
        found = BASE
        with contextlib.suppress(EncodingError):
            found = decoded(BASE, {**GOOD[name], key: broken(tensor)})
        # refused, or other numbers that mean something else
        assert (found.shape, found.dtype) == (BASE.shape, BASE.dtype)


@pytest.mark.parametrize(
    ("encoded", "why"),
    [
        ({}, "none that a codec writes"),
        ({"sparse.values": BASE}, "none that a codec writes"),
        ({**GOOD["sparse"], "more": BASE}, "none that a codec writes"),
        ({**GOOD["sparse"], "sparse.places": codecs.packed(np.array([3, 1]), 3)}, "not ascending"),
        ({**GOOD["sparse"], "sparse.places": codecs.packed(np.array([3, 3]), 3)}, "not ascending"),
        ({**GOOD["sparse"], "sparse.places": codecs.packed(np.array([1, 7]), 3)}, "below 5"),
        ({**GOOD["levels"], "levels.steps": torch.tensor([0], dtype=torch.int32)}, "from 1 on"),
        ({**GOOD["levels"], "levels.steps": torch.tensor([3], dtype=torch.int32)}, "for 5 numbers"),
        ({**GOOD["powers"], "powers.powers": codecs.packed(np.full(5, 4095), 12)}, "range"),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_said_what_cannot_be(encoded, why):
    with pytest.raises(EncodingError, match=why):
        decoded(BASE, encoded)
