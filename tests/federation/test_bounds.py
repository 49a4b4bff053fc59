"""How much one client may weigh, and how far one reply may move the model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.federation.admission_table import Admission
from fedsim.federation.bounds import Bounds, update_norms
from fedsim.messages import codecs
from fedsim.messages.codecs import MEMORY
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies

DIM = 4


def replies(rows, *, counts=None, buffers=None, reference=None, **changes):
    """Those of a round in which every client was sent zeros."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    named = {"weight": torch.zeros(DIM)} | {n: b[0] for n, b in (buffers or {}).items()}
    layout = Layout.from_named(named)
    return Replies(
        server_round=3,
        layout=layout,
        client_ids=np.arange(len(rows)),
        params=rows,
        reference=torch.zeros(DIM) if reference is None else reference,
        buffers=buffers or {},
        extra={},
        num_examples=torch.tensor(counts or [10] * len(rows)),
        metrics={},
        staleness=torch.zeros(len(rows), dtype=torch.int64),
        **changes,
    )


def failed(found):
    return {f.client_id: (f.cause, f.reason) for f in found.failures}


def ones_times(*norms):
    return torch.stack([torch.full((DIM,), n / DIM**0.5) for n in norms])


def test_a_client_weighs_at_most_what_its_partition_holds():
    bounds = Bounds(lambda ids: 10 + ids)
    found = bounds.held(replies(ones_times(1, 1, 1), counts=[10, 12, 5]), {})
    assert found.client_ids.tolist() == [0, 2]
    assert failed(found) == {1: ("num-examples", "12 examples: its partition holds 11")}


def test_of_an_evaluation_counts_are_not_held_against_training_samples():
    evaluated = replace(
        replies(ones_times(1), counts=[99]), message_type="evaluate", params=None, reference=None
    )
    assert not Bounds(lambda ids: 10 + ids).held(evaluated, {}).failures


def test_a_norm_above_the_bound_is_refused_and_one_at_it_is_not():
    rows = torch.zeros(3, DIM)
    rows[0, 0], rows[1, 0], rows[2, 1] = 2.0, 2.0 + 2**-20, -1e30
    found = Bounds(table=Admission(max_update_norm=2.0)).held(replies(rows), {})
    assert found.client_ids.tolist() == [0]
    assert {c: cause for c, (cause, _) in failed(found).items()} == dict.fromkeys(
        (1, 2), "update norm"
    )
    assert failed(found)[2][1] == (
        "the update has norm 1e+30, above [admission] max_update_norm = 2"
    )


def test_norms_are_of_updates_and_not_of_models_and_never_overflow():
    rows = torch.full((2, DIM), 1e30)
    reference = torch.stack([torch.full((DIM,), 1e30), torch.zeros(DIM)])
    assert update_norms(replies(rows, reference=reference)) == pytest.approx([0.0, 2e30])


def test_a_multiple_of_the_median_needs_three_replies():
    bounds = Bounds(table=Admission(max_update_factor=4.0))
    assert not bounds.held(replies(ones_times(1, 1000)), {}).failures
    found = bounds.held(replies(ones_times(1, 2, 3, 1000, 8, 2.5)), {})
    assert found.client_ids.tolist() == [0, 1, 2, 4, 5]  # 4 * 2.75 = 11
    assert failed(found)[3][0] == "update norm"
    assert failed(found)[3][1].endswith(
        "above [admission] max_update_factor = 4 times the round's 2.75"
    )


@pytest.mark.parametrize("others", [3, 5, 21])
def test_less_than_half_of_the_clients_cannot_move_the_bound_beyond_the_honest_norms(others):
    rng = np.random.default_rng(others)
    honest = rng.uniform(0.5, 2.0, size=others)
    hostile = rng.uniform(1e3, 1e9, size=(others - 1) // 2)
    rows = ones_times(*honest, *hostile)
    found = Bounds(table=Admission(max_update_factor=5.0)).held(replies(rows), {})
    assert set(range(others, len(rows))) == {f.client_id for f in found.failures}


def test_a_reply_written_against_memory_is_bounded_by_what_it_adds():
    written = [codecs.sparse(torch.arange(DIM), row) for row in ones_times(1, 50)]
    stacked = {f"{MEMORY}.{n}": torch.stack([each[n] for each in written]) for n in written[0]}
    encoded = replies(torch.zeros(2, DIM), encoded=stacked)
    found = Bounds(table=Admission(max_update_norm=10)).held(encoded, {})
    assert failed(found)[1][0] == "update norm"
    assert found.client_ids.tolist() == [0]


def test_what_batch_normalisation_cannot_have_kept_is_refused():
    variances = torch.ones(4, 3)
    variances[1, 2] = -1e-3
    counted = torch.tensor([7, 7, 2**63 - 1, 3])
    given = replies(
        ones_times(1, 1, 1, 1),
        buffers={"norm.running_var": variances, "norm.num_batches_tracked": counted},
    )
    found = Bounds().held(given, {"norm.num_batches_tracked": torch.tensor(5)})
    assert found.client_ids.tolist() == [0]
    assert failed(found) == {
        1: ("buffers", "'norm.running_var' holds a negative variance"),
        2: ("buffers", "'norm.num_batches_tracked' must be in 5..1000000005: it counts batches"),
        3: ("buffers", "'norm.num_batches_tracked' must be in 5..1000000005: it counts batches"),
    }


def run(out, *choices):
    settings = ["engine.kind=inline", "expect={}", "rounds=4", "data.name=digits", *choices]
    fedsim.start(fedsim.load_scenario("quickstart", settings), out=out)
    rounds = JsonLines.read(out / "participation.jsonl")
    return json.loads((out / "summary.json").read_text()), [r["failed"] for r in rounds]


HOSTILE = "attack={kind='scaled_reverse', factor=1e6, clients=[1, 4]}"


@pytest.mark.parametrize("bound", ["max_update_norm=1e4", "max_update_factor=100.0"])
def test_attackers_beyond_the_bound_count_as_clients_that_failed(bound, tmp_path):
    plain = run(tmp_path / "plain", "participation={kind='full'}", HOSTILE)
    found = run(tmp_path / "found", "participation={kind='full'}", HOSTILE, f"admission.{bound}")
    assert plain[0]["final"]["test/accuracy"] < 0.5 < found[0]["final"]["test/accuracy"]
    assert all(each == {"1": "update norm", "4": "update norm"} for each in found[1])


def test_a_bound_that_nobody_reaches_changes_no_bit(tmp_path):
    plain = run(tmp_path / "plain")
    found = run(tmp_path / "found", "admission={max_update_norm=1e9, max_update_factor=1e6}")
    assert found[0]["params_sha256"] == plain[0]["params_sha256"]
    assert found[1] == plain[1]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("admission.max_update_norm=0", "max_update_norm = 0: must be > 0"),
        ("admission.max_update_factor=1.0", "max_update_factor = 1.0: must be > 1"),
        ("admission.max_norm=1.0", "did you mean 'max_update_norm'"),
    ],
)
def test_what_bounds_nothing_is_refused(table, why):
    with pytest.raises(ScenarioError, match=why):
        fedsim.load_scenario("quickstart", [table])


def test_an_empty_table_is_the_same_scenario():
    plain = fedsim.load_scenario("quickstart")
    assert fedsim.load_scenario("quickstart", ["admission={}"]).sha256 == plain.sha256
    bounded = fedsim.load_scenario("quickstart", ["admission.max_update_norm=1e9"])
    assert bounded.sha256 != plain.sha256
