import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsim.messages.layout import Layout, Payload, TensorSpec, rows_at

shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


class Mixed(nn.Module):
    """Trainable, frozen and integer tensors, in an order of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.last = nn.Linear(3, 1, bias=False)


class Tied(nn.Module):
    """Two names for one parameter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.outer = nn.Linear(3, 3, bias=False)
        self.outer.weight = self.inner.weight


def test_a_models_tensors_keep_its_order():
    layout = Layout.from_model(Mixed())
    assert list(layout.names) == list(Mixed().state_dict())
    assert [s.name for s in layout.trainable] == [
        "first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight"
    ]  # fmt: skip
    assert [s.name for s in layout.buffers] == [
        "frozen", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    ]  # fmt: skip
    assert layout.dim == 6 + 3 + 3 + 3 + 3


def test_a_tied_parameter_is_there_once():
    layout = Layout.from_model(Tied())
    assert layout.names == ("inner.weight",)
    assert layout.dim == 9


def test_a_record_of_arrays_tells_buffers_by_name_and_integer_type():
    model = Mixed().requires_grad_(True)
    layout = Layout.from_named(model.state_dict())
    assert {s.name for s in layout.buffers} == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip


def test_declared_buffers_make_the_models_own_layout():
    model = Mixed()
    layout = Layout.from_model(model)
    declared = [spec.name for spec in layout.buffers]
    assert Layout.from_named(model.state_dict(), declared) == layout
    assert Layout.from_named(model.state_dict(), declared).fingerprint == layout.fingerprint


def test_an_unknown_buffer_is_refused():
    with pytest.raises(ValueError, match=r"buffers \['c'\] are not among the tensors \['a'\]"):
        Layout.from_named({"a": torch.zeros(1)}, ["c"])


def test_a_model_without_a_trainable_tensor_is_refused():
    with pytest.raises(ValueError, match="no trainable tensor"):
        Layout.from_model(nn.Linear(1, 1).requires_grad_(False))


@given(st.lists(shapes, min_size=1, max_size=5), st.lists(st.integers(0, 3), max_size=2))
def test_flattening_is_undone_by_unflattening(all_shapes, lead):
    named = {f"t{i}": torch.randn((*lead, *shape)) for i, shape in enumerate(all_shapes)}
    layout = Layout.from_named({f"t{i}": torch.zeros(shape) for i, shape in enumerate(all_shapes)})
    flat = layout.flatten(named)
    assert flat.shape == (*lead, layout.dim)
    back = layout.unflatten(flat)
    assert list(back) == list(named)
    assert all(torch.equal(back[name], named[name]) for name in named)


@given(st.lists(shapes, min_size=1, max_size=6))
def test_slices_partition_the_flat_vector_in_order(all_shapes):
    layout = Layout.from_named({f"t{i}": torch.zeros(shape) for i, shape in enumerate(all_shapes)})
    places = [p for s in layout.slices.values() for p in range(layout.dim)[s]]
    assert places == list(range(layout.dim))


def test_flattening_writes_into_the_place_given():
    layout = Layout.from_named({"a": torch.zeros(2), "b": torch.zeros(1)})
    out = torch.full((2, 3), -1.0)
    layout.write({"a": torch.ones(2, 2), "b": torch.zeros(2, 1)}, out)
    assert out.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_flattening_copies():
    layout = Layout.from_named({"a": torch.zeros(2)})
    source = torch.ones(2)
    flat = layout.flatten({"a": source})
    flat.zero_()
    assert source.tolist() == [1, 1]


def test_tensors_of_several_types_travel_in_the_widest_and_come_back_as_they_were():
    named = {
        "half": torch.tensor([0.5, 1.5], dtype=torch.float16),
        "double": torch.tensor([0.1]).double(),
    }
    layout = Layout.from_named(named)
    assert layout.dtype == torch.float64
    back = layout.unflatten(layout.flatten(named))
    assert {n: t.dtype for n, t in back.items()} == {"half": torch.float16, "double": torch.float64}
    assert all(torch.equal(back[n], named[n]) for n in named)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).double()},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ],
    ids=["name", "shape", "dtype", "number"],
)
def test_layouts_that_differ_have_different_fingerprints(other):
    layout = Layout.from_named({"a": torch.zeros(2, 3)})
    assert layout.fingerprint == Layout.from_named({"a": torch.ones(2, 3)}).fingerprint
    assert layout.fingerprint != Layout.from_named(other).fingerprint


def test_a_scalar_has_one_element():
    assert TensorSpec("s", (), torch.float32).size == 1


def test_rows_of_a_payload_are_the_clients_asked_for():
    payload = Payload(
        torch.arange(6.0).reshape(3, 2), {"b": torch.arange(3)}, {"c": torch.arange(3.0)}
    )
    for index, expected in (([2, 0], [2, 0]), (slice(1, 3), [1, 2])):
        rows = payload.rows(index)
        assert rows.params.tolist() == [[2.0 * e, 2.0 * e + 1] for e in expected]
        assert rows.buffers["b"].tolist() == rows.extra["c"].tolist() == expected


def test_a_payload_is_empty_when_it_carries_nothing():
    assert Payload().is_empty
    for full in (
        Payload(torch.zeros(1)),
        Payload(None, {"b": torch.zeros(1)}),
        Payload(extra={"c": torch.zeros(1)}),
    ):
        assert not full.is_empty


@pytest.mark.parametrize("places", [(0, 1, 2), (4, 1, 2)])
def test_rows_are_taken_in_the_order_asked_for_and_put_where_asked_for(places):
    layout = Layout.from_model(torch.nn.Linear(2, 3))
    named = {"weight": torch.randn(4, 3, 2), "bias": torch.randn(4, 3)}
    flat = layout.flatten(named)
    assert torch.equal(layout.flatten(named, rows=[2, 0, 3]), flat[[2, 0, 3]])
    out = torch.zeros(5, layout.dim)
    layout.write(named, rows_at(out, places), rows=[2, 0, 3])
    assert torch.equal(out[list(places)], flat[[2, 0, 3]])
    layout.write({n: t[:3] for n, t in named.items()}, rows_at(out, places))
    assert torch.equal(out[list(places)], flat[:3])
    assert not out[[place for place in range(5) if place not in places]].any()
