import math
import random

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from fedsim.basics import rng
from fedsim.basics.errors import RunError, ScenarioError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.attacks import named as attacks
from fedsim.federation.attacks.attack import Attack, Seen
from fedsim.federation.attacks.kinds import alie_z
from fedsim.federation.attacks.named import ATTACKS
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.attack import AttackGrid, attacked
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.adapting import failures_of
from fedsim.messages.cohort import SETUP, Cohort
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.replies import Replies
from fedsim.scenario import signatures
from tests.laws import federations as fed

SEED, DIM = 7, 6
LAYOUT = Layout.from_named({"w": torch.zeros(DIM, dtype=torch.float64)})
FORGING = [kind for kind, make in ATTACKS.items() if make().forge is not None]
each_attack = pytest.mark.parametrize("kind", ATTACKS)
each_forging = pytest.mark.parametrize("kind", FORGING)


def seen(updates, byzantine=(1, 3), *, server_round=4, client_ids=None, dtype=torch.float64):
    updates = torch.as_tensor(updates, dtype=dtype)
    ids = np.arange(len(updates)) * 10 if client_ids is None else np.array(client_ids)
    is_byzantine = torch.zeros(len(updates), dtype=torch.bool)
    is_byzantine[list(byzantine)] = True
    return Seen(updates, is_byzantine, ids, server_round, SEED)


def random_updates(clients=5, dim=DIM):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(clients, dim)))


def replies(updates=None, *, reference=None, **changes):
    updates = random_updates() if updates is None else updates
    reference = torch.linspace(0, 1, DIM, dtype=torch.float64) if reference is None else reference
    fields = {
        "server_round": 4,
        "layout": LAYOUT,
        "client_ids": np.arange(len(updates)) * 10,
        "params": reference + updates,
        "reference": reference,
        "buffers": {},
        "extra": {"c": torch.arange(len(updates))},
        "num_examples": torch.arange(1, len(updates) + 1),
        "metrics": {"loss": torch.linspace(0, 1, len(updates), dtype=torch.float64)},
        "staleness": torch.zeros(len(updates), dtype=torch.int64),
    }
    return Replies(**{**fields, **changes})


# --- what each attack sends -----------------------------------------------------------------------


def test_uniform_sends_a_gradient_of_uniform_numbers():
    forged = attacks.uniform(scale=3.0).forge(seen(random_updates()))
    draws = [rng.generator(SEED, "attack", 4, client).random(DIM) for client in (10, 30)]
    np.testing.assert_array_equal(forged.numpy(), -3.0 * np.stack(draws))
    assert -3 < forged.min() < forged.max() <= 0


def test_two_uniform_attackers_point_the_same_way():
    """E[u v] / E[u^2] = (1/4) / (1/3)."""
    one, other = attacks.uniform().forge(seen(random_updates(5, 20_000)))
    cosine = one @ other / one.norm() / other.norm()
    assert cosine.item() == pytest.approx(0.75, abs=0.01)


def test_a_uniform_attack_does_not_depend_on_who_else_replies():
    alone = seen(random_updates(1), byzantine=(0,), client_ids=[30])
    forge = attacks.uniform().forge
    assert torch.equal(forge(alone)[0], forge(seen(random_updates()))[1])


def test_reversals_send_the_clients_own_update_backwards():
    updates = random_updates()
    assert torch.equal(attacks.sign_flip().forge(seen(updates)), -updates[[1, 3]])
    assert torch.equal(attacks.scaled_reverse().forge(seen(updates)), -10 * updates[[1, 3]])
    halved = attacks.scaled_reverse(factor=0.5).forge(seen(updates))
    assert torch.equal(halved, -0.5 * updates[[1, 3]])


def test_alie_stays_z_deviations_from_the_honest_mean():
    """Honest updates 1, 3, 8 and 0, 0, 3: means 4 and 1, variances 26/3 and 2."""
    updates = [[1, 0], [99, 99], [3, 0], [-99, 99], [8, 3]]
    forged = attacks.alie(z=1.5).forge(seen(updates))
    expected = [4 - 1.5 * math.sqrt(26 / 3), 1 - 1.5 * math.sqrt(2)]
    np.testing.assert_allclose(forged.numpy(), [expected, expected], rtol=1e-14)


def test_alies_default_z_is_the_papers_of_the_round():
    updates = random_updates(50)
    byzantine = range(12)
    forged = attacks.alie().forge(seen(updates, byzantine))
    honest = updates[12:]
    expected = honest.mean(dim=0) - alie_z(50, 12) * honest.std(dim=0, correction=0)
    torch.testing.assert_close(forged, expected.expand(12, -1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("clients", "num_byzantine", "z"),
    [
        (50, 24, 1.4261),  # s = 2: the quantile of 24/26
        (50, 12, 0.3360),  # s = 14: of 24/38
        (20, 8, 0.6745),  # s = 3: of 9/12
        (5, 1, 0.0),  # s = 2: of 2/4
        (4, 1, 0.0),  # s = 2: of 1/3, below the mean
        (2, 1, 0.0),
        (9, 6, 0.4307),  # more attackers than needed: still one supporter, of 2/3
    ],
)
def test_z_is_the_normal_quantile(clients, num_byzantine, z):
    assert alie_z(clients, num_byzantine) == pytest.approx(z, abs=5e-5)


def test_alie_with_nobody_honest_leaves_the_updates():
    updates = random_updates(3)
    assert torch.equal(attacks.alie().forge(seen(updates, (0, 1, 2))), updates)


@pytest.mark.parametrize(("dtype", "run"), [(torch.float32, 375), (torch.float64, 187)])
def test_lost_packets_are_runs_of_zeros(dtype, run):
    dim = 10 * run + 5
    updates = torch.ones(2, dim)
    forged = attacks.packet_loss(rate=0.5).forge(seen(updates, (0, 1), dtype=dtype))
    arrived = [rng.generator(SEED, "attack", 4, client).random(11) >= 0.5 for client in (0, 10)]
    for row, packets in zip(forged, arrived, strict=True):
        assert 0 < packets.sum() < 11
        for place, there in enumerate(packets):
            assert (row[place * run : (place + 1) * run] == float(there)).all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_packets_are_lost_at_the_rate(rate):
    updates = torch.ones(2, 20_000)
    forged = attacks.packet_loss(rate=rate, packet_bytes=8).forge(seen(updates, (0, 1)))
    assert (forged == 0).double().mean().item() == pytest.approx(rate, abs=0.01)


def test_a_packet_holds_at_least_one_coordinate():
    forged = attacks.packet_loss(rate=0.5, packet_bytes=1).forge(seen(torch.ones(5, 100)))
    assert 0 < forged.sum() < 200


def test_gaussian_sends_normal_numbers_of_each_attackers_own():
    forged = attacks.gaussian(mean=2.0, deviation=0.5).forge(seen(random_updates()))
    draws = [rng.generator(SEED, "attack", 4, c).normal(2.0, 0.5, DIM) for c in (10, 30)]
    np.testing.assert_array_equal(forged.numpy(), np.stack(draws))


def test_infinity_is_refused_by_admission_and_the_largest_number_is_not(app):
    for finite, refused in ((False, BYZANTINE), (True, [])):
        grid = AttackGrid(
            InlineGrid(app, 8), attacks.infinity(finite=finite, **NAMED), app.layout, seed=SEED
        )
        received = AdmissionGrid(grid, app.layout).send_and_receive(cohort(app))
        assert [f.client_id for f in failures_of(received)] == refused
        if finite:
            assert (received.params[BYZANTINE] == torch.finfo(torch.float32).max).all()


def test_ipm_reverses_the_honest_mean_and_turns_the_plain_mean_round():
    updates = random_updates(5)
    honest = updates[[0, 2, 4]].mean(dim=0)
    forged = attacks.ipm(factor=2.0).forge(seen(updates))
    torch.testing.assert_close(forged, (-2 * honest).expand(2, -1), rtol=1e-14, atol=0)
    for factor, sign in ((1.4, 1), (1.6, -1)):  # (n - f) / f is 1.5
        updates[[1, 3]] = attacks.ipm(factor=factor).forge(seen(updates))
        assert (sign * (updates.mean(dim=0) @ honest)).item() > 0


@pytest.mark.parametrize(("victim", "copied"), [(None, 0), (40, 4), (10, 0), (99, 0)])
def test_mimic_copies_one_honest_client(victim, copied):
    """Client 10 attacks itself, and there is no client 99."""
    updates = random_updates()
    forged = attacks.mimic(victim=victim).forge(seen(updates))
    assert torch.equal(forged, updates[[copied, copied]])


@pytest.mark.parametrize("direction", ["deviation", "mean", "sign"])
def test_min_max_goes_as_far_as_two_honest_updates_are_apart(direction):
    updates = random_updates(7) + 0.5
    forged = attacks.min_max(direction=direction).forge(seen(updates))[0]
    honest = updates[[0, 2, 4, 5, 6]].numpy()
    widest = max(np.linalg.norm(a - b) for a in honest for b in honest)
    reach = max(np.linalg.norm(forged.numpy() - a) for a in honest)
    assert reach == pytest.approx(widest, rel=1e-12)
    moved, mean = honest.mean(axis=0) - forged.numpy(), honest.mean(axis=0)
    bad = {"deviation": honest.std(axis=0), "mean": mean, "sign": np.sign(mean)}[direction]
    assert moved @ bad == pytest.approx(np.linalg.norm(moved) * np.linalg.norm(bad), rel=1e-12)


def test_min_max_among_copies_of_one_update_sends_it():
    updates = random_updates(1).expand(5, -1)
    torch.testing.assert_close(
        attacks.min_max().forge(seen(updates)), updates[:2], atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("direction", ["mean", "sign"])
@pytest.mark.parametrize("seed", range(10))
def test_a_mean_that_cancels_but_for_rounding_has_no_direction(direction, seed):
    """What is left of it points anywhere; its first digit would decide where the attack goes."""
    row = torch.from_numpy(np.random.default_rng(seed).normal(size=DIM))
    attack = torch.zeros(DIM, dtype=torch.float64)
    rows = torch.stack([1.7 * row, attack, 0.1 * row, attack, -(1.7 + 0.1) * row])
    forged = attacks.min_max(direction=direction).forge(seen(rows))
    torch.testing.assert_close(forged, torch.zeros_like(forged), atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", ["ipm", "mimic", "min_max", "alie"])
def test_with_nobody_honest_attackers_send_their_own(kind):
    updates = random_updates(3)
    assert torch.equal(ATTACKS[kind]().forge(seen(updates, (0, 1, 2))), updates)


SEES = {
    "nothing": ["uniform", "gaussian", "infinity"],
    "own update": ["sign_flip", "scaled_reverse", "packet_loss"],
    "honest updates": ["alie", "ipm", "mimic", "min_max"],
    "data": ["label_flip", "backdoor"],
}


def test_every_attack_says_what_it_sees():
    found = {sees: [k for k, make in ATTACKS.items() if make().sees == sees] for sees in SEES}
    assert {sees: sorted(kinds) for sees, kinds in SEES.items()} == {
        sees: sorted(kinds) for sees, kinds in found.items()
    }


@each_forging
def test_an_attack_sees_no_more_than_it_says(kind):
    """What it need not know may be anything."""
    attack = ATTACKS[kind]()

    def forged(updates):
        received = replies(updates)
        after = attacked(received, attack.forge, np.array([10, 30]), SEED, attack.sees)
        return after.params[[1, 3]]

    first, updates = random_updates(), random_updates()
    updates[[0, 2, 4]] *= 3
    others_tell = not torch.equal(forged(updates), forged(first))
    assert others_tell == (attack.sees == "honest updates")
    updates = random_updates()
    updates[[1, 3]] *= 3
    own_tells = not torch.equal(forged(updates), forged(first))
    assert own_tells == (attack.sees == "own update")


# --- who attacks ----------------------------------------------------------------------------------


def test_attackers_are_drawn_from_the_seed_for_the_whole_run():
    attack = attacks.sign_flip(num_byzantine=5)
    drawn = attack.byzantine_clients(100, SEED)
    assert drawn.dtype == np.int64
    assert len(drawn) == 5
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn.min() <= drawn.max() < 100
    assert drawn.tolist() == attack.byzantine_clients(100, SEED).tolist()
    assert drawn.tolist() != attack.byzantine_clients(100, SEED + 1).tolist()


def test_every_client_is_as_likely_to_attack():
    attack = attacks.sign_flip(num_byzantine=2)
    drawn = np.concatenate([attack.byzantine_clients(5, seed) for seed in range(1000)])
    assert np.bincount(drawn, minlength=5) == pytest.approx(400, abs=60)


def test_attackers_may_be_named():
    attack = attacks.sign_flip(clients=[4, 0])
    assert attack.byzantine_clients(5, SEED).tolist() == [0, 4]
    assert attacks.sign_flip(clients=[4, 0], num_byzantine=2).clients == [4, 0]
    assert len(attacks.sign_flip().byzantine_clients(5, SEED)) == 1


def test_nobody_need_attack():
    assert attacks.sign_flip(num_byzantine=0).byzantine_clients(5, SEED).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clients": [1], "num_byzantine": 3}, r"num_byzantine = 3: clients names 1; leave one"),
        ({"clients": [1, 3], "num_byzantine": 1}, r"num_byzantine = 1: clients names 2; leave"),
        ({"clients": [4, 0, 4]}, r"clients = \[4, 0, 4\]: a client is named twice"),
        ({"clients": []}, r"clients = \[\]: nobody is named"),
    ],
)
@each_attack
def test_attackers_that_contradict_each_other_are_refused_at_once(kind, arguments, words):
    with pytest.raises(ScenarioError, match=words):
        ATTACKS[kind](**arguments)


def test_a_victim_is_an_honest_client():
    with pytest.raises(ScenarioError, match=r"victim: there is no client 5; allowed: 0..4"):
        attacks.mimic(victim=5).check(5)
    with pytest.raises(ScenarioError, match=r"victim = 2: clients names it as an attacker"):
        attacks.mimic(victim=2, clients=[1, 2])
    attacks.mimic(victim=4).check(5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_byzantine": 6}, r"\[attack\] num_byzantine = 6: must be in 0..5"),
        ({"num_byzantine": -1}, r"\[attack\] num_byzantine = -1: must be in 0..5"),
        ({"clients": [2, 5]}, r"\[attack\] clients: there is no client 5; allowed: 0..4"),
        ({"clients": [-1]}, r"\[attack\] clients: there is no client -1"),
        ({"fraction": 0.19}, r"\[attack\] fraction = 0.19: of 5 clients nobody attacks; .* 0.2"),
    ],
)
@each_attack
def test_attackers_that_do_not_exist_are_refused(kind, arguments, words):
    attack = ATTACKS[kind](**arguments)
    with pytest.raises(ScenarioError, match=words):
        attack.check(5)
    with pytest.raises(ScenarioError, match=words):
        attack.byzantine_clients(5, SEED)


@pytest.mark.parametrize(
    ("fraction", "clients", "size"), [(0.3, 10, 3), (0.25, 10, 2), (0.29, 100, 29)]
)
def test_attackers_may_be_a_fraction(fraction, clients, size):
    """0.29 * 100 is a little less than 29 in floating point."""
    assert len(attacks.sign_flip(fraction=fraction).byzantine_clients(clients, SEED)) == size


def test_random_attackers_are_others_in_every_round():
    attack = attacks.sign_flip(num_byzantine=3, schedule="random")
    rounds = [attack.byzantine_clients(20, SEED, r).tolist() for r in range(1, 30)]
    assert all(len(set(attackers)) == 3 for attackers in rounds)
    assert len({tuple(attackers) for attackers in rounds}) > 20
    assert rounds == [attack.byzantine_clients(20, SEED, r).tolist() for r in range(1, 30)]
    assert attack.byzantine_clients(20, SEED).tolist() == list(range(20))  # anybody, some time


def test_intermittent_attackers_are_always_the_same_and_attack_at_their_rate():
    attack = attacks.sign_flip(num_byzantine=4, schedule="intermittent", active_rate=0.3)
    everyone = attacks.sign_flip(num_byzantine=4).byzantine_clients(20, SEED).tolist()
    assert attack.byzantine_clients(20, SEED).tolist() == everyone
    rounds = [attack.byzantine_clients(20, SEED, r).tolist() for r in range(1, 501)]
    assert all(set(attackers) <= set(everyone) for attackers in rounds)
    for client in everyone:
        assert sum(client in attackers for attackers in rounds) == pytest.approx(150, abs=40)
    named = attacks.sign_flip(clients=[2, 5], schedule="intermittent")
    assert {len(named.byzantine_clients(8, SEED, r)) for r in range(30)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fraction": 1.5}, r"fraction = 1.5: must be in \[0, 1\]"),
        ({"fraction": 0.1, "clients": [1]}, "fraction = 0.1: clients says who attacks"),
        ({"fraction": 0.1, "num_byzantine": 1}, "fraction = 0.1: num_byzantine says who attacks"),
        ({"schedule": "always"}, "schedule = 'always': must be fixed or random or intermittent"),
        ({"schedule": "random", "clients": [1]}, "draws who attacks, and clients names them"),
        ({"active_rate": 0.5}, 'active_rate = 0.5: is without effect with schedule = "fixed"'),
        ({"schedule": "intermittent", "active_rate": 0.0}, r"active_rate = 0.0: must be in \(0, 1"),
    ],
)
def test_impossible_schedules_are_refused(arguments, words):
    with pytest.raises(ScenarioError, match=words):
        attacks.alie(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("gaussian", {"deviation": -1.0}, "deviation = -1.0: must be >= 0"),
        ("min_max", {"direction": "up"}, "direction = 'up': must be deviation, mean or sign"),
        ("backdoor", {"size": 0}, "size = 0: must be >= 1"),
        ("backdoor", {"share": 0.0}, r"share = 0.0: must be in \(0, 1\]"),
        ("backdoor", {"boost": 0.0}, "boost = 0.0: must be > 0"),
    ],
)
def test_impossible_attacks_are_refused(kind, arguments, words):
    with pytest.raises(ScenarioError, match=words):
        ATTACKS[kind](**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"rate": 1.5}, r"\[attack\] rate = 1.5"), ({"packet_bytes": 0}, r"\[attack\] packet_bytes")],
)
def test_impossible_links_are_refused(arguments, words):
    with pytest.raises(ScenarioError, match=words):
        attacks.packet_loss(**arguments)


@each_attack
def test_every_attack_is_a_scenario_table(kind):
    keys = signatures.keys(ATTACKS[kind])
    assert {"num_byzantine", "clients"} <= keys.keys()
    assert all(key.description and not key.required for key in keys.values())
    given = signatures.check(ATTACKS[kind], {"clients": [1, 2]}, where="[attack]")
    assert ATTACKS[kind](**given).clients == [1, 2]


# --- what becomes of the replies ------------------------------------------------------------------


def bits(stack, rows):
    return fed.tensor_bits(stack[rows])


@each_forging
def test_honest_rows_and_everything_else_stay(kind):
    received = replies()
    params, update = received.params.clone(), received.update.clone()
    honest = [0, 2, 4]
    after = attacked(received, ATTACKS[kind]().forge, np.array([10, 30, 50]), SEED)
    assert bits(after.params, honest) == bits(received.params, honest)
    expected = ATTACKS[kind]().forge(seen(update))
    torch.testing.assert_close(after.update[[1, 3]], expected, rtol=0, atol=1e-14)
    for name in ("num_examples", "staleness", "reference"):
        assert torch.equal(getattr(after, name), getattr(received, name))
    assert after.client_ids.tolist() == received.client_ids.tolist()
    assert torch.equal(after.metrics["loss"], received.metrics["loss"])
    assert torch.equal(after.extra["c"], received.extra["c"])
    assert not after.admitted
    assert torch.equal(received.params, params)
    assert torch.equal(received.update, update)


def test_each_client_attacks_from_its_own_start():
    own = random_updates(5) * 3
    received = replies(torch.ones(5, DIM).double(), reference=own)
    after = attacked(received, attacks.sign_flip().forge, np.array([10]), SEED)
    torch.testing.assert_close(after.params[1], own[1] - 1)


def test_replies_without_an_attacker_pass_as_they_are():
    received = replies()
    assert attacked(received, attacks.sign_flip().forge, np.array([99]), SEED) is received


def test_models_keep_their_dtype():
    single = replies(
        random_updates().float(), reference=torch.zeros(DIM), layout=Layout.from_named(
            {"w": torch.zeros(DIM)}
        )
    )  # fmt: skip
    for kind in FORGING:
        make = ATTACKS[kind]
        after = attacked(single, make().forge, np.array([10, 30]), SEED)
        assert after.params.dtype == torch.float32


def test_messages_of_attackers_are_built_anew_and_those_of_others_kept():
    received = replies()
    before = list(received)
    after = attacked(received, attacks.sign_flip().forge, np.array([10]), SEED)
    assert [after[k] is before[k] for k in range(5)] == [True, False, True, True, True]
    forged = after[1].content["arrays"]["w"].numpy()
    np.testing.assert_array_equal(forged, after.params[1].numpy())


def test_attackers_see_only_what_is_finite_and_broken_ones_do_not_attack():
    updates = random_updates()
    updates[0, 2] = math.nan  # honest
    updates[3, 1] = math.inf  # Byzantine
    after = attacked(replies(updates), attacks.alie(z=1.0).forge, np.array([10, 30]), SEED)
    assert after.client_ids.tolist() == [10, 20, 40]
    assert torch.isfinite(after.params).all()
    assert [(f.client_id, f.cause) for f in after.failures] == [
        (0, "not finite"), (30, "not finite")
    ]  # fmt: skip


# --- as a Grid around a Grid ----------------------------------------------------------------------

BYZANTINE = [2, 5]
NAMED = {"clients": BYZANTINE}


def made(kind):
    """The attack, with packets small enough for some of a tiny model's to be lost."""
    return ATTACKS[kind](**NAMED, **({"packet_bytes": 8} if kind == "packet_loss" else {}))


class MessagesOnly(GridWrapper):
    """As Flower's grids are: takes and returns ordinary messages, in no order."""

    def send_and_receive(self, messages, *, timeout=None):
        received = list(self.inner.send_and_receive(list(messages), timeout=timeout))
        random.Random(1).shuffle(received)
        return received


@pytest.fixture(scope="module")
def app():
    return fed.make_app("mlp", data=fed.InMemoryData(test_sizes=fed.SIZES))


def cohort(app, client_ids=range(8), **changes):
    fields = {
        "client_ids": np.array(client_ids),
        "server_round": 3,
        "layout": app.layout,
        "shared": fed.initial_payload(app.executor),
    }
    return Cohort(**{**fields, **changes})


def answers(app, attack, sent, wrapper=lambda grid: grid):
    grid = AttackGrid(wrapper(InlineGrid(app, 8)), attack, app.layout, seed=SEED)
    return grid.send_and_receive(sent)


def replies_bits(received):
    named = {"params": received.params, "examples": received.num_examples, **received.metrics}
    return fed.named_bits(named), received.client_ids.tolist()


@each_forging
def test_stacked_replies_and_messages_are_attacked_alike(app, kind):
    attack = made(kind)
    stacked = answers(app, attack, cohort(app))
    for sent in (cohort(app), list(cohort(app))):
        unstacked = answers(app, attack, sent, MessagesOnly)
        assert replies_bits(unstacked) == replies_bits(stacked)
    assert replies_bits(answers(app, attack, list(cohort(app)))) == replies_bits(stacked)


@each_forging
def test_byzantine_rows_alone_are_replaced(app, kind):
    honest = InlineGrid(app, 8).send_and_receive(cohort(app))
    found = answers(app, made(kind), cohort(app))
    same = [bits(found.params, [row]) == bits(honest.params, [row]) for row in range(8)]
    assert [row for row in range(8) if not same[row]] == BYZANTINE


@each_forging
def test_the_same_seed_and_round_give_the_same_attack(app, kind):
    attack = ATTACKS[kind](num_byzantine=3)
    one, again = (answers(app, attack, cohort(app)) for _ in range(2))
    assert replies_bits(one) == replies_bits(again)


def test_another_round_draws_other_numbers(app):
    attack = attacks.uniform(**NAMED)
    one, other = (
        answers(app, attack, cohort(app, server_round=server_round)).update[BYZANTINE]
        for server_round in (3, 4)
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["evaluate", SETUP])
@pytest.mark.parametrize("wrapper", [lambda grid: grid, MessagesOnly])
def test_evaluation_and_set_up_are_left_alone(app, kind, wrapper):
    passed = []

    class Watching(GridWrapper):
        def send_and_receive(self, messages, *, timeout=None):
            passed.append(self.inner.send_and_receive(messages, timeout=timeout))
            return passed[-1]

    sent = cohort(app, message_type=kind)
    found = answers(app, attacks.sign_flip(**NAMED), sent, lambda grid: Watching(wrapper(grid)))
    assert {id(message) for message in found} == {id(message) for message in passed[0]}


def test_attackers_who_do_not_take_part_do_nothing(app):
    sent = cohort(app, (0, 1, 4))
    honest = InlineGrid(app, 8).send_and_receive(cohort(app, (0, 1, 4)))
    assert replies_bits(answers(app, attacks.sign_flip(**NAMED), sent)) == replies_bits(honest)


def test_a_personal_start_is_where_the_attack_goes_from(app):
    shared = fed.initial_payload(app.executor)
    own = torch.stack([shared.params * factor for factor in (1, 2, 3)])
    sent = cohort(app, (0, 2, 5), shared=Payload(None, shared.buffers), personal=Payload(own))
    honest = InlineGrid(app, 8).send_and_receive(sent)
    found = answers(app, attacks.sign_flip(**NAMED), sent)
    torch.testing.assert_close(found.params[1:], own[1:] - honest.update[1:])


def test_messages_of_several_kinds_are_refused(app):
    mixed = [*cohort(app, (0,)), *cohort(app, (1,), message_type="evaluate")]
    with pytest.raises(RunError, match="messages of the kinds evaluate, train in one call"):
        answers(app, attacks.sign_flip(**NAMED), mixed, MessagesOnly)


def test_nothing_sent_is_nothing_attacked(app):
    assert not len(answers(app, attacks.sign_flip(**NAMED), []))
    query = [Message(RecordDict(), 2, "query")]
    grid = AttackGrid(MessagesOnly(InlineGrid(app, 8)), attacks.alie(), app.layout, seed=SEED)
    assert len(grid.send_and_receive(query)) == 1


def test_a_forged_update_that_is_not_finite_is_refused_by_name(app):
    attack = attacks.scaled_reverse(factor=1e300, **NAMED)
    grid = AttackGrid(InlineGrid(app, 8), attack, app.layout, seed=SEED)
    received = AdmissionGrid(grid, app.layout).send_and_receive(cohort(app))
    assert [(f.client_id, f.cause) for f in failures_of(received)] == [
        (2, "not finite"), (5, "not finite")
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["fedavg", "flower:FedAvg"])
def test_a_run_is_attacked_whatever_the_strategy_and_costs_the_same_bytes(app, name):
    """Everybody's reversed update takes the model the opposite way."""

    def run(wrap):
        inner = wrap(ByteCountingGrid(InlineGrid(app, 8)))
        return fed.run_rounds(
            fed.make_strategy(name), inner, fed.initial_arrays("mlp"), app.layout, rounds=1
        )

    plain, records = run(lambda grid: grid)
    attack = attacks.sign_flip(clients=list(range(8)))
    reversed_, attacked_records = run(lambda grid: AttackGrid(grid, attack, app.layout, seed=SEED))
    start = fed.initial_arrays("mlp")
    for key in start:
        there, back = (arrays[key].numpy() - start[key].numpy() for arrays in (plain, reversed_))
        np.testing.assert_allclose(back, -there, rtol=0, atol=1e-6)
        assert np.abs(there).max() > 1e-3
    assert records[1]["comm/uplink_bytes"] == attacked_records[1]["comm/uplink_bytes"] > 0


def test_a_new_attack_is_one_function(app):
    def silence(*, num_byzantine=None, clients=None):
        return Attack(lambda seen: torch.zeros_like(seen.own), num_byzantine, clients)

    found = answers(app, silence(**NAMED), cohort(app))
    assert not found.update[BYZANTINE].any()


@pytest.mark.parametrize("wrapper", [lambda grid: grid, MessagesOnly])
@pytest.mark.parametrize("kind", ["alie", "label_flip"])
def test_who_attacked_in_a_round_is_recorded(app, kind, wrapper):
    attack = ATTACKS[kind](clients=[0, 2, 5], schedule="intermittent")
    grid = AttackGrid(wrapper(InlineGrid(app, 8)), attack, app.layout, seed=SEED)
    for server_round in (1, 2, 3, 4):
        grid.begin_round(server_round)
        for part in ((0, 1, 2), (3, 4)):  # as when some are asked again
            sent = cohort(app, part, server_round=server_round)
            grid.send_and_receive(sent if wrapper is not MessagesOnly else list(sent))
        now = set(attack.byzantine_clients(8, SEED, server_round).tolist()) & {0, 1, 2, 3, 4}
        assert grid.observed().record == {"byzantine": sorted(now)}
        assert grid.observed().metrics == {"clients/byzantine": len(now)}
