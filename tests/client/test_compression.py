"""Compressed replies: what operators lose, what is sent, on nodes as in the engine."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.errors import ScenarioError
from fedsim.client.compressors import COMPRESSORS, compressor
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.messages import flower_internals as internals
from fedsim.messages.codecs import decoded
from fedsim.messages.replies import Replies
from fedsim.runs import start as run
from fedsim.scenario import discovery
from fedsim.scenario.choice import Choice
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False).filter(lambda x: abs(x) > 1e-6 or x == 0)
VECTORS = st.lists(NUMBERS, min_size=1, max_size=24)
PARTS = [n for n in discovery.names("parts") if Choice("parts", {"name": n}).factory.compresses]


class Fixed:
    """A generator that draws one number over and over."""

    def __init__(self, number):
        self._number = number

    def random(self, count):
        return np.full(count, self._number)


def applied(name, values, *, draw=None, feedback=True, share=0.3, levels=4):
    """C(v) for a base of zeros."""
    operator, v = (
        compressor(name, share=share, levels=levels),
        torch.tensor(values, dtype=torch.float64),
    )
    nothing = torch.zeros_like(v)
    return v, decoded(nothing, operator.encode(nothing, v, draw, feedback=feedback))


def lost(v, sent):
    return float((sent - v).square().sum())


# --- operators ------------------------------------------------------------------------------------


@given(VECTORS, st.floats(0.01, 1))
def test_top_k_loses_no_more_than_its_contraction_says_and_keeps_the_first_of_equal_ones(
    values, share
):
    v, sent = applied("top_k", values, share=share)
    kept = max(1, round(share * len(values)))
    alpha = compressor("top_k", share=share, levels=1).contraction(len(values))
    assert alpha == kept / len(values)
    assert lost(v, sent) <= (1 - alpha) * float(v.square().sum()) * (1 + 1e-12)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept]
    for place, value in enumerate(values):
        assert float(sent[place]) == (value if place in order else 0)


@given(VECTORS)
def test_the_sign_loses_no_more_than_its_contraction_says(values):
    v, sent = applied("sign", values)
    assert lost(v, sent) <= (1 - 1 / len(values)) * float(v.square().sum()) * (1 + 1e-9) + 1e-9
    mean = v.abs().mean()
    torch.testing.assert_close(sent, torch.where(v >= 0, mean, -mean), rtol=1e-12, atol=0)


GRID = [(i + 0.5) / 64 for i in range(64)]


@given(VECTORS)
def test_natural_compression_is_unbiased_and_loses_an_eighth_at_most(values):
    found = [applied("natural", values, draw=Fixed(u)) for u in GRID]
    v = found[0][0]
    mean = torch.stack([sent for _, sent in found]).mean(dim=0)
    assert bool(((mean - v).abs() <= v.abs() / 64 + 1e-12).all())  # the grid is 64 numbers fine
    error = np.mean([lost(v, sent) for _, sent in found])
    assert error <= (1 / 8 + 1 / 64) * float(v.square().sum()) + 1e-12


@given(VECTORS, st.integers(1, 9))
def test_qsgd_is_unbiased_and_loses_omega_at_most(values, levels):
    found = [applied("qsgd", values, draw=Fixed(u), feedback=False, levels=levels) for u in GRID]
    v = found[0][0]
    norm, d = float(v.norm()), len(values)
    mean = torch.stack([sent for _, sent in found]).mean(dim=0)
    assert bool(((mean - v).abs() <= norm / levels / 64 + 1e-9).all())
    omega = min(d / levels**2, np.sqrt(d) / levels)
    error = np.mean([lost(v, sent) for _, sent in found])
    assert error <= (omega + d / 64 / levels**2) * norm**2 + 1e-9
    # under feedback it is as much shorter as makes it a contraction
    alpha = compressor("qsgd", share=1, levels=levels).contraction(d)
    shorter = applied("qsgd", values, draw=Fixed(0.5), levels=levels)[1]
    plain = applied("qsgd", values, draw=Fixed(0.5), levels=levels, feedback=False)[1]
    torch.testing.assert_close(shorter, plain * alpha, rtol=1e-9, atol=1e-12)


def test_random_places_are_unbiased_when_scaled_and_a_contraction_when_not():
    values = [3.0, -1.0, 0.5, 2.0, -4.0]
    draw = np.random.default_rng(0)
    options = {"draw": draw, "share": 0.4}
    scaled = [applied("random_k", values, feedback=False, **options) for _ in range(2000)]
    v = scaled[0][0]
    mean = torch.stack([sent for _, sent in scaled]).mean(dim=0)
    # one draw of an entry has the standard deviation |v| * sqrt(d / K - 1)
    assert bool(((mean - v).abs() <= 5 * v.abs() * np.sqrt(1.5 / 2000)).all())
    errors = [lost(*applied("random_k", values, **options)) for _ in range(2000)]
    assert np.mean(errors) == pytest.approx(0.6 * float(v.square().sum()), rel=0.05)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_nothing_changes_to_nothing_and_a_broken_update_stays_broken(name):
    draw = np.random.default_rng(0)
    _, sent = applied(name, [0.0] * 7, draw=draw)
    assert sent.tolist() == [0.0] * 7
    broken = applied(name, [1.0, float("nan"), 2.0, float("inf")], draw=draw, share=1.0)[1]
    assert not bool(broken.isfinite().all()) or name == "natural"


def test_what_is_impossible_is_refused():
    for name, settings, why in [
        ("topk", {}, "did you mean 'top_k'"),
        ("top_k", {"share": 0.0}, r"share = 0.0: must be in \(0, 1\]"),
        ("random_k", {"share": 1.5}, r"share = 1.5: must be in \(0, 1\]"),
        ("qsgd", {"levels": 0}, "levels = 0: must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=why):
            compressor(name, **{"share": 0.1, "levels": 4, **settings})


# --- engine and nodes -----------------------------------------------------------------------------


def app_with(part, model="mlp", **options):
    return fed.make_app(model, fed.make_procedure(parts=[{"name": part}]), **options)


def sent_to(app, strategy="fedavg", server_round=1):
    grid = ByteCountingGrid(InlineGrid(app, 8))
    made = fed.make_strategy(strategy)
    made.declare_buffers([spec.name for spec in app.layout.buffers])
    return grid, fed.configure(made, grid, fed.initial_arrays("mlp"), server_round)


def test_every_operator_has_a_part():
    assert {*COMPRESSORS, "ef21"} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_the_bytes_counted_are_those_of_the_messages_and_fewer_than_the_models(part):
    strategy = "ef21" if part == "ef21" else "fedavg"
    grid, sent = sent_to(app_with(part), strategy)
    received = grid.send_and_receive(sent)
    total = 0
    for number, message in enumerate(received):
        internals.set_message_id(message, f"{number:064x}")
        total += internals.wire_bytes(message)
    assert grid.take()[1] == total
    plain, sent = sent_to(fed.make_app("mlp", fed.make_procedure()))
    plain.send_and_receive(sent)
    assert total < plain.take()[1]


@pytest.mark.parametrize("part", PARTS)
def test_messages_are_read_to_the_bits_of_the_engine(part):
    strategy = "ef21" if part == "ef21" else "fedavg"
    grid, sent = sent_to(app_with(part), strategy)
    ours = grid.send_and_receive(sent)
    read = Replies.from_messages(list(ours), sent)
    assert fed.tensor_bits(read.params) == fed.tensor_bits(ours.params)
    assert fed.named_bits(read.encoded) == fed.named_bits(ours.encoded)
    assert not read.failures


@pytest.mark.parametrize("part", PARTS)
def test_a_node_answers_as_the_engine_does_and_remembers_as_much(part):
    strategy = "ef21" if part == "ef21" else "fedavg"
    app = app_with(part)
    for server_round in (1, 2):
        grid, sent = sent_to(app, strategy, server_round)
        replies = grid.send_and_receive(sent)
        context = Context(1, 5, {"partition-id": 3}, RecordDict(), {})
        message = list(sent)[3]
        reply = app(message, context)
        expected = list(replies)[3].content["arrays"]
        assert fed.record_bits(reply.content["arrays"]) == fed.record_bits(expected)
        clients, state = grid.inner.store.export()
        if state:
            mine = context.state.array_records["client-state"]
            rows = {n: t[clients.index(3)] for n, t in state.items()}
            assert {n: a.numpy().tobytes() for n, a in mine.items()} == {
                n: t.numpy().tobytes() for n, t in rows.items()
            }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model.sparse.places": np.array([255], np.uint8)}, "cannot be read"),
        ({"model.sparse.values": np.ones(3, np.float64)}, "cannot be read"),
        ({"model.sparse.values": np.ones((2, 2), np.float32)}, "cannot be read"),
        ({"memory.signs.scale": np.ones(1, np.float32)}, "written against two things"),
        ({"model.signs.scale": np.ones(1, np.float32)}, "none that a codec writes"),
        ({"output.bias": np.ones(3, np.float32)}, "unknown"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else None,
)
def test_a_reply_that_no_codec_can_have_written_is_refused(change, why):
    grid, sent = sent_to(app_with("top_k"))
    messages = list(grid.send_and_receive(sent))
    good = messages[2].content["arrays"]
    broken = {n: a.numpy() for n, a in good.items()} | change
    messages[2].content["arrays"] = ArrayRecord(
        dict(zip(broken, ArrayRecord(list(broken.values())).values(), strict=True))
    )
    read = Replies.from_messages(messages, sent)
    (failure,) = read.failures
    assert failure.client_id == 2
    assert why in failure.reason
    assert read.num_clients == 7


def test_a_reply_that_is_not_finite_is_refused_and_its_error_forgotten():
    app = fed.make_app(
        "mlp", fed.make_procedure(parts=[{"name": "top_k"}]), fed.InMemoryData(broken=(4,))
    )
    grid, sent = sent_to(app)
    admitted = grid.send_and_receive(sent).admit()
    assert [f.client_id for f in admitted.failures] == [4]
    assert 4 not in grid.inner.store.export()[0]


def test_what_clients_keep_to_themselves_is_neither_sent_nor_made_up_for():
    procedure = fed.make_procedure(parts=[{"name": "top_k", "share": 0.2}])
    app = fed.make_app("personal_output", procedure)
    layout = app.layout
    result = app.executor.train(fed.job(app.executor, (3, 4)))
    assert result.encoded["model.sparse.values"].shape == (2, round(0.2 * layout.dim))
    assert not result.state["TopKUpdate/error.output.weight"].any()
    assert result.state["TopKUpdate/error.hidden1.weight"].any()


# --- scenarios ------------------------------------------------------------------------------------

TABLES = {
    "data": {"name": "digits"},
    "partition": {"kind": "iid", "clients": 4},
    "client": {"parts": [{"name": "top_k"}]},
    "engine": {"kind": "inline"},
    "rounds": 1,
}


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"strategy": {"name": "flag"}}, "no rule that is linear in them"),
        ({"strategy": {"name": "coordinate_median"}}, "no rule that is linear in them"),
        ({"strategy": {"name": "flower:FedAvg"}}, "no rule that is linear in them"),
        ({"attack": {"kind": "sign_flip"}}, "replaces them by others"),
        ({"strategy": {"name": "ef21"}}, "each compress the reply"),
        ({"client": {"parts": [{"name": "top_k"}, {"name": "sign"}]}}, "each compress the reply"),
        ({"client": {"parts": [{"name": "ef21"}]}}, "needs the ef21 that a strategy sends"),
        ({"client": {"parts": [{"name": "top_k", "share": 2.0}]}}, "share = 2.0: must be in"),
        (
            {"client": {}, "strategy": {"name": "ef21", "compressor": "topk"}},
            "did you mean 'top_k'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_together_is_refused_before_round_1(tables, why):
    with pytest.raises(ScenarioError, match=why):
        Scenario.from_resolved({**TABLES, **tables}, origin="tests/compression.toml")


def test_constants_of_another_number_of_clients_are_refused(tmp_path):
    strategy = {"name": "ef21", "client_smoothness": [1.0, 2.0]}
    tables = {**TABLES, "client": {}, "strategy": strategy}
    with pytest.raises(ScenarioError, match="2 constants for 4 clients"):
        run.start(Scenario.from_resolved(tables, origin="tests/ef21.toml"), out=tmp_path / "run")


def test_an_attack_on_data_may_stand_beside_it():
    tables = {**TABLES, "attack": {"kind": "label_flip", "num_byzantine": 1}}
    assert Scenario.from_resolved(tables, origin="tests/compression.toml")
