import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.chunks import deal, extra_of
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout, Payload

SAMPLES = st.lists(st.integers(0, 2000), min_size=1, max_size=70)
WAYS = ("even", "alike")


@pytest.mark.parametrize("way", WAYS)
@given(samples=SAMPLES, size=st.integers(1, 20))
def test_everybody_is_dealt_once_into_chunks_of_the_lengths_of_spans(way, samples, size):
    chunks = deal(samples, size, way)
    assert sorted(place for chunk in chunks for place in chunk) == list(range(len(samples)))
    spans = [len(samples[first : first + size]) for first in range(0, len(samples), size)]
    assert [len(chunk) for chunk in chunks] == spans
    assert all(list(chunk) == sorted(chunk) for chunk in chunks)


@pytest.mark.parametrize("way", WAYS)
@given(held=st.integers(0, 9), count=st.integers(1, 40), size=st.integers(1, 20))
def test_clients_that_hold_as_many_stay_in_their_order(way, held, count, size):
    dealt = [place for chunk in deal([held] * count, size, way) for place in chunk]
    assert dealt == list(range(count))


@given(st.data(), st.integers(1, 12), st.integers(1, 6))
def test_alike_pads_no_more_than_any_other_way_where_chunks_are_equal(data, size, count):
    drawn = st.lists(st.integers(0, 2000), min_size=size * count, max_size=size * count)
    samples = data.draw(drawn)

    def padded(chunks):
        return sum(max(samples[place] for place in chunk) * len(chunk) for chunk in chunks)

    places = data.draw(st.permutations(range(len(samples))))
    others = [places[first : first + size] for first in range(0, len(places), size)]
    assert padded(deal(samples, size, "alike")) <= padded(others)


def test_even_gives_two_workers_nearly_as_much():
    random = np.random.default_rng(1)
    uneven, spans = [], []
    for _ in range(200):
        samples = np.clip(np.exp(random.normal(np.log(200), 1, 20)), 20, 2000).astype(np.int64)
        loads = [samples[list(chunk)].sum() for chunk in deal(samples, 10, "even")]
        uneven.append(max(loads) / samples.sum() - 0.5)
        spans.append(max(samples[:10].sum(), samples[10:].sum()) / samples.sum() - 0.5)
    assert np.mean(uneven) < 0.03 < 0.08 < np.mean(spans)


@given(st.lists(st.integers(0, 2000), min_size=4, max_size=40))
def test_even_leaves_the_two_that_hold_most_together(samples):
    samples = [*samples, 2001, 2002]
    chunks = deal(samples, 2 * -(-len(samples) // 4), "even")
    assert any({len(samples) - 2, len(samples) - 1} <= set(chunk) for chunk in chunks)


def test_equal_holders_go_in_client_order_among_unequal_ones():
    assert deal([5, 7, 5, 5], 2, "alike") == [(0, 1), (2, 3)]
    assert deal([5, 7, 5, 5], 2, "even") == [(0, 1), (2, 3)]


def test_what_clients_return_like_the_model_is_stacked_into_one_flat_tensor():
    model = torch.nn.Linear(3, 2)
    layout = Layout.from_model(model)
    made = torch.arange(5.0 * layout.dim).reshape(5, layout.dim)
    named = {f"control.{n}": t for n, t in layout.unflatten(made).items()}
    named["steps"] = torch.arange(5)
    ids = np.arange(5)
    cohort = Cohort(server_round=1, layout=layout, client_ids=ids, shared=Payload(made[0]))
    for chunks in ([(0, 1, 2), (3, 4)], [(0, 3), (1, 2, 4)]):
        parts = {p: {n: t[list(p)] for n, t in named.items()} for p in chunks}
        found = extra_of(cohort, parts)
        assert list(found) == list(named)
        assert torch.equal(found["steps"], named["steps"])
        mine = {n.removeprefix("control."): found[n] for n in named if n != "steps"}
        flat = layout.flat_behind(mine)
        assert flat is not None
        assert torch.equal(flat, made)
        assert flat.untyped_storage().data_ptr() == mine["weight"].untyped_storage().data_ptr()


def test_what_has_other_shapes_than_the_model_is_stacked_by_itself():
    layout = Layout.from_model(torch.nn.Linear(3, 2))
    cohort = Cohort(
        server_round=1, layout=layout, client_ids=np.arange(2), shared=Payload(torch.zeros(8))
    )
    odd = {"control.weight": torch.ones(2, 3, 2), "control.bias": torch.ones(2, 2)}
    found = extra_of(cohort, {(0, 1): odd})
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in odd.items()}
