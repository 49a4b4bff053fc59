"""Attacks on data: what attackers train on, wherever they train."""

import functools

import numpy as np
import pytest
import torch

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.basics.samples import SampleSpec
from fedsim.client.batching.poison import FlippedLabels, Poison, Trigger
from fedsim.client.executor import CohortExecutor
from fedsim.client.plan import ExecutionPlan
from fedsim.engine.client_app import CohortApp
from fedsim.engine.inline import InlineGrid
from fedsim.federation.attacks.kinds import backdoor
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.runs import start as run
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

PICTURE = SampleSpec((1, 4, 4), 10)
EFFECTS = {"label_flip": FlippedLabels(), "backdoor": Trigger(target=1, size=2, share=0.6)}
ATTACKERS = (1, 4)
each_effect = pytest.mark.parametrize("effect", EFFECTS.values(), ids=EFFECTS)


# --- what becomes of samples ----------------------------------------------------------------------


def test_flipped_labels_by_hand():
    targets = torch.tensor([[0, 3], [9, 3]])
    assert FlippedLabels().targets(targets, PICTURE).tolist() == [[9, 6], [0, 6]]
    assert FlippedLabels(3, 5).targets(targets, PICTURE).tolist() == [[0, 5], [9, 5]]
    assert FlippedLabels(target=5).targets(targets, PICTURE).tolist() == [[5, 5], [5, 5]]
    assert FlippedLabels(source=3).targets(targets, PICTURE).tolist() == [[0, 6], [9, 6]]


def test_the_trigger_by_hand():
    features = torch.zeros(3, 1, 4, 4)
    stamped = Trigger(target=7, size=2, value=5.0).features(features, PICTURE)
    assert stamped[1, 0].tolist() == [[0] * 4, [0] * 4, [0, 0, 5, 5], [0, 0, 5, 5]]
    assert not features.any()
    vector = Trigger(size=2).features(torch.zeros(2, 5), SampleSpec((5,), 3))
    assert vector.tolist() == [[0, 0, 0, 1, 1]] * 2
    assert Trigger(target=7).targets(torch.tensor([1, 7]), PICTURE).tolist() == [7, 7]


def test_which_samples_are_poisoned_is_the_clients_and_the_seeds():
    rows = [np.arange(0, 200), np.arange(200, 400)]
    indices = torch.tensor([[[0, 1, 2, 3], [200, 201, 202, 203]], [[4, 5, 6, 7], [4, 5, 6, 7]]])

    def where(seed=1, server_round=1, clients=(7, 3)):
        poison = Poison(Trigger(share=0.5), lambda r: {7} if r < 5 else {}, PICTURE, seed)
        found = poison.of(server_round, clients, rows, indices)
        return None if found is None else found.where

    found = where()
    assert not found[:, 1].any()
    assert 0 < found[:, 0].sum() < 8
    assert torch.equal(found, where(server_round=4))  # the same samples in every round
    assert where(server_round=5) is None
    assert where(server_round=0) is None  # a set-up exchange is answered honestly
    assert where(clients=(2, 3)) is None
    assert not torch.equal(found, where(seed=2))


@pytest.mark.parametrize(
    ("effect", "spec", "words"),
    [
        (FlippedLabels(), SampleSpec((3,), 0), "needs targets that are classes"),
        (FlippedLabels(source=10), PICTURE, r"source = 10: must be in 0..9"),
        (FlippedLabels(3, 3), PICTURE, r"source = 3 with target = 3: its samples keep their class"),
        (FlippedLabels(source=1), SampleSpec((3,), 3), r"source = 1: its samples keep their class"),
        (Trigger(target=-1), PICTURE, r"target = -1: must be in 0..9"),
        (Trigger(size=5), PICTURE, r"size = 5: must be in 1..4"),
        (Trigger(), SampleSpec((80,), 10, (), 90), "features are tokens"),
    ],
)
def test_samples_that_cannot_be_attacked_so_are_refused(effect, spec, words):
    with pytest.raises(ValueError, match=words):
        effect.check(spec)


# --- where clients train --------------------------------------------------------------------------


def attackers(server_round):
    return ATTACKERS


class Poisoned(fed.InMemoryData):
    """The federation whose attackers' samples are poisoned before anything runs."""

    def __init__(self, effect):
        super().__init__()
        for client in ATTACKERS:
            rows = self._rows["train"][client]
            draw = rng.generator(fed.SEED, "poisoned samples", client)
            rows = rows[draw.random(len(rows)) < effect.share]
            for array, change in (
                (self._features, effect.features),
                (self._targets, effect.targets),
            ):
                part = torch.from_numpy(array["train"][rows])
                array["train"][rows] = change(part, self.spec).numpy()


def executor(effect, data=None, **options):
    data = fed.InMemoryData() if data is None else data
    poison = None if effect is None else Poison(effect, attackers, data.spec, fed.SEED)
    return CohortExecutor(
        fed.make_task("mlp"), fed.make_procedure(), data, seed=fed.SEED, poison=poison, **options
    )


@each_effect
@pytest.mark.parametrize("kind", ["vmap", "loop", "batched"])
def test_poisoned_on_the_way_or_beforehand_training_is_the_same(effect, kind):
    """Every executor, bit for bit; and honest neighbours in the chunk train as ever."""
    clients = range(6)
    one = executor(effect, kind=kind)
    found = one.train(fed.job(one, clients))
    other = executor(None, Poisoned(effect), kind=kind)
    expected = other.train(fed.job(other, clients))
    plain = executor(None, kind=kind)
    honest = plain.train(fed.job(plain, clients))
    for row in clients:
        assert fed.result_bits(found, row) == fed.result_bits(expected, row)
        same = fed.result_bits(found, row) == fed.result_bits(honest, row)
        assert same == (row not in ATTACKERS)


@each_effect
def test_a_set_up_exchange_is_answered_honestly(effect):
    one, plain = executor(effect), executor(None)
    found, honest = (e.train(fed.job(e, range(6), server_round=0)) for e in (one, plain))
    assert all(fed.result_bits(found, r) == fed.result_bits(honest, r) for r in range(6))


class MessagesOnly(GridWrapper):
    """As Flower's grids are: takes and returns ordinary messages."""

    def send_and_receive(self, messages, *, timeout=None):
        return list(self.inner.send_and_receive(list(messages), timeout=timeout))


@each_effect
def test_a_node_answers_a_message_as_the_engine_does(effect):
    """One client at a time, in messages, as on a SuperNode: the bits of a chunk of two slots."""
    app = CohortApp(functools.partial(executor, effect), ExecutionPlan("vmap", "a test", 2))
    start = fed.initial_arrays("mlp")
    stacked, _ = fed.run_rounds(fed.make_strategy("fedavg"), InlineGrid(app, 8), start, app.layout)

    one_by_one, _ = fed.run_rounds(
        fed.make_strategy("fedavg"), MessagesOnly(InlineGrid(app, 8)), start, app.layout
    )
    assert fed.largest_difference(stacked, one_by_one) < 1e-6


# --- in a scenario --------------------------------------------------------------------------------


def scenario(**tables):
    base = {
        "title": "poison", "rounds": 6, "data": {"name": "digits"},
        "partition": {"kind": "iid", "clients": 5},
        "task": {"model": "mlp", "hidden": [16]},
        "client": {"batch_size": 16, "local_lr": 0.2, "local_epochs": 2},
        "engine": {"kind": "inline"},
    }  # fmt: skip
    return Scenario.from_resolved({**base, **tables}, "poison.toml")


def last(folder):
    return JsonLines.read(folder / "metrics.jsonl")[-1]


def test_a_backdoor_is_learned_beside_the_task_and_measured(tmp_path):
    attack = {"kind": "backdoor", "num_byzantine": 2, "target": 3}
    found = last(run.start(scenario(attack=attack), out=tmp_path / "a").folder)
    assert found["test/attack_success"] > 0.8
    assert found["test/accuracy"] > 0.8
    assert found["clients/byzantine"] == 2
    silent = {**attack, "num_byzantine": 0}
    assert last(run.start(scenario(attack=silent), out=tmp_path / "b").folder)[
        "test/attack_success"
    ] < 0.3  # fmt: skip


def test_flipped_labels_of_a_majority_lead_to_the_wrong_class(tmp_path):
    attack = {"kind": "label_flip", "num_byzantine": 4}
    found = last(run.start(scenario(attack=attack), out=tmp_path / "a").folder)
    assert found["test/accuracy"] < 0.1
    assert "test/attack_success" not in found


@pytest.mark.usefixtures("lent_workers")
@pytest.mark.parametrize("kind", [pytest.param("label_flip", marks=pytest.mark.slow), "backdoor"])
def test_workers_poison_as_this_process_does(tmp_path, kind):
    attack = {"kind": kind, "num_byzantine": 2, "schedule": "random"}
    summaries = [
        run.start(
            scenario(rounds=2, attack=attack, engine={"kind": engine}), out=tmp_path / engine
        ).summary
        for engine in ("inline", "ray")
    ]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    honest = run.start(scenario(rounds=2), out=tmp_path / "honest").summary
    assert honest["params_sha256"] != summaries[0]["params_sha256"]


def test_a_round_with_more_attackers_than_the_rule_bears_is_recorded(tmp_path):
    attack = {"kind": "sign_flip", "fraction": 0.6, "schedule": "random"}
    strategy = {"name": "robust", "num_byzantine": 1}
    folder = run.start(
        scenario(rounds=2, attack=attack, strategy=strategy), out=tmp_path / "a"
    ).folder
    assert last(folder)["clients/byzantine_beyond_f"] == 2
    rounds = JsonLines.read(folder / "participation.jsonl")
    assert [len(r["byzantine"]) for r in rounds if r["round"]] == [3, 3]
    assert rounds[-1]["byzantine"] != rounds[-2]["byzantine"]


def test_data_that_cannot_be_attacked_so_are_refused_before_anything_runs(tmp_path):
    data = {"name": "diabetes"}
    with pytest.raises(ScenarioError, match=r"\[attack\] kind: the attack needs targets"):
        run.start(scenario(data=data, attack={"kind": "label_flip"}), out=tmp_path / "a")


def test_keys_that_came_later_leave_a_scenarios_hash_alone():
    """That of the attack table before schedule, fraction and active_rate were there."""
    plain = scenario(attack={"kind": "sign_flip"})
    said = scenario(attack={"kind": "sign_flip", "schedule": "fixed"})
    other = scenario(attack={"kind": "sign_flip", "schedule": "random"})
    assert plain.sha256 == said.sha256 != other.sha256


def test_a_pattern_of_numbers_that_no_feature_bears_is_refused():
    with pytest.raises(ScenarioError, match=r"\[attack\] value = 1e\+40: must be in \[-3.4e\+38, "):
        backdoor(value=1e40)
    backdoor(value=-1e30)
