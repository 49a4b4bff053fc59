"""Asynchronous rules and timetables against an oracle, and every number of specs/async.md 1(e)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.aggregators.staleness import discount
from fedsim.federation.clock.job_times import JobTimes
from fedsim.federation.clock.rates import closed_form, followed
from fedsim.federation.clock.timetable import Timetable
from fedsim.federation.clock_table import JobTime
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from strategies.fedasync import FedAsync
from strategies.fedbuff import FedBuff
from strategies.fedfix import FedFix
from tests.oracles import async_oracle as oracle

F80 = [1 - i / 3 * 0.8 for i in range(4)]  # of four clients
TRIGGERS = {
    "all": ({}, lambda times, end: oracle.synchronous(times, end)),
    "arrival": ({}, lambda times, end: oracle.asynchronous(times, end)),
    "window": ({"window": 500}, lambda times, end: oracle.fixed(times, 0.5, end)),
    "count": ({"count": 2}, lambda times, end: oracle.buffered(times, 2, end)),
}


def timetable(times, trigger, *, tick_s=1e-3, **keys):
    jobs = JobTimes(
        JobTime(law="list", seconds=list(times)), tick_s=tick_s, seed=0, num_clients=len(times)
    )
    return Timetable(trigger, jobs.of, concurrency=len(times), **keys)


def events(table, clients, end):
    """(tick, [(client, version)]) of every aggregation up to a tick."""
    found = []
    while True:
        server_round = len(found) + 1
        period = table.plan(server_round, [c for c in range(clients) if c not in table.busy])
        if period.ends > end:
            return found
        table.go_to(period)
        there = sorted((job.client, job.server_round - 1) for job in period.due)
        found.append((period.ends, there))


def orderly(ticks):
    """Times of which no two sums that could meet are equal, so that no tie decides."""
    return [tick / 1000 for tick in ticks]


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("ticks", [(997, 199), (997, 733, 467, 199), (1009, 503, 211)])
def test_a_timetable_is_the_oracles(trigger, ticks):
    keys, schedule = TRIGGERS[trigger]
    times = orderly(ticks)
    expected = schedule(times, 30.0005)
    found = events(timetable(times, trigger, **keys), len(times), 30000)
    assert len(found) > 20
    assert [there for _, there in found] == [there for _, there in expected]
    np.testing.assert_allclose(
        [tick / 1000 for tick, _ in found], [moment for moment, _ in expected], atol=1e-9
    )


# In fifteenths of a second the times of F-80 with four clients are whole: 15, 11, 7, 3. Floats make
# sums unequal that are equal: their 949 and 371 are 950 (two replies come at the very end) and 370,
# where of those that come at once the lowest client is the first.
EXACT = {
    "all": ({}, 100, (1, 1, 1, 1), 0),
    "arrival": ({}, 950, (0.105, 0.143, 0.226, 0.526), 10),
    "half": ({"window": 15}, 200, (0.5, 0.5, 1, 1), 1),
    "fifth": ({"window": 6}, 500, (0.2, 0.25, 1 / 3, 1), 4),
    "count": ({"count": 2}, 370, (0.248, 0.345, 0.550, 0.857), 3),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_timetables_of_the_specification(name):
    keys, aggregations, often, oldest = EXACT[name]
    trigger = {"half": "window", "fifth": "window"}.get(name, name)
    thirtieths = [30, 22, 14, 6]
    found = events(timetable(thirtieths, trigger, tick_s=1.0, **keys), 4, 3000)
    assert len(found) == aggregations
    np.testing.assert_allclose(oracle.rates(found, 4), often, atol=8e-3)
    assert oracle.oldest(found) == oldest


def test_the_oracles_own_floats_give_the_specifications_numbers():
    asynchronous = oracle.asynchronous(F80, 100)
    assert len(asynchronous) == 949
    assert oracle.oldest(asynchronous) == 10
    assert len(oracle.synchronous(F80, 100)) == 100
    buffered = oracle.buffered(F80, 2, 100)
    assert len(buffered) == 371
    np.testing.assert_allclose(oracle.rates(buffered, 4), (0.248, 0.345, 0.550, 0.857), atol=5e-4)
    assert [len(oracle.fixed(F80, window, 100)) for window in (0.5, 0.2)] == [200, 500]


@given(
    ticks=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    window=st.integers(1, 500),
)
def test_no_update_of_a_window_is_older_than_its_bound(ticks, window):
    table = timetable(ticks, "window", tick_s=1.0, window=window)
    found = events(table, len(ticks), 40 * window)
    for n, (_, delivered) in enumerate(found):
        for client, version in delivered:
            assert n - version == -(-ticks[client] // window) - 1


@given(
    ticks=st.lists(st.integers(1, 300), min_size=2, max_size=6),
    trigger=st.sampled_from(["arrival", "count", "window"]),
    at_once=st.booleans(),
    stop=st.integers(1, 20),
)
def test_a_timetable_goes_on_from_where_it_was(ticks, trigger, at_once, stop):
    keys = {"count": 2, "window": 150, "at_once": at_once}
    table = timetable(ticks, trigger, tick_s=1.0, **keys)
    again = timetable(ticks, trigger, tick_s=1.0, **keys)
    for server_round in range(1, 30):
        order = [c for c in range(len(ticks)) if c not in table.busy]
        period = table.plan(server_round, order)
        assert table.plan(server_round, order) == period  # planning changes nothing
        assert len({job.client for job in (*period.due, *period.outstanding)}) == len(
            period.due
        ) + len(period.outstanding)
        assert list(period.due) == sorted(period.due)
        if server_round == stop:
            again.restore(table.now, list(reversed(table.jobs)))
        if server_round >= stop:
            assert again.plan(server_round, order).due == period.due
            again.go_to(again.plan(server_round, order))
        table.go_to(period)


@pytest.mark.parametrize("trigger", ["all", "arrival", "window"])
def test_rates_have_closed_forms(trigger):
    ticks = np.array([15, 11, 7, 3])
    known = closed_form(trigger, ticks, 5)
    table = timetable(ticks, trigger, tick_s=1.0, window=5)

    def order(_):
        return [c for c in range(4) if c not in table.busy]

    counted = followed(table, order, 4, 8000)
    np.testing.assert_allclose(known, counted, rtol=2e-3)
    # weights of one over the rate give every client its share
    assert sum(counted / known / 4) == pytest.approx(1, abs=2e-3)


# --- two quadratics -------------------------------------------------------------------------------

TIMES, CENTRES, LAYOUT = (1.0, 0.2), (0.0, 1.0), Layout.from_named({"x": torch.zeros(1).double()})


def models(strategy, trigger, end, lr, **keys):
    """The server's models, over real timetables, replies and rules."""
    table = timetable(TIMES, trigger, tick_s=0.1, **keys)
    known = closed_form(trigger, np.array([10, 2]), keys.get("window", 1))
    if isinstance(strategy, FedFix):
        strategy.declare_rates(known)
    x = torch.zeros(1, dtype=torch.float64)
    state, found = strategy.init(x, 2), [x]
    for n, (_, delivered) in enumerate(events(table, 2, end * 10)):
        starts = torch.stack([found[version] for _, version in delivered])
        centres = torch.tensor([CENTRES[client] for client, _ in delivered])[:, None]
        replies = Replies(
            server_round=n + 1,
            layout=LAYOUT,
            client_ids=np.array([client for client, _ in delivered], dtype=np.int64),
            params=starts - lr * (starts - centres),
            reference=starts,
            buffers={},
            extra={},
            num_examples=torch.ones(len(delivered), dtype=torch.int64),
            metrics={},
            staleness=torch.tensor([n - version for _, version in delivered]),
        ) if delivered else None  # fmt: skip
        if replies is not None:
            x, state, _ = strategy.server_update(state, found[-1], replies)
        found.append(x)
    return torch.cat(found).numpy()


LIMITS = {
    "all known": 0.5,
    "arrival naive": 0.8333,
    "arrival known": 0.503,
    "arrival estimated": 0.503,
    "half naive": 0.6667,
    "half known": 0.5006,
    "fifth naive": 0.8336,
    "fifth known": 0.5025,
}
WINDOWS = {"half": 5, "fifth": 2}


@pytest.mark.parametrize("name", LIMITS)
def test_two_quadratics_end_where_the_specification_says(name):
    trigger, weights = name.split()
    keys = {"window": WINDOWS[trigger]} if trigger in WINDOWS else {}
    kind = "window" if keys else trigger
    # the specification's naive asynchronous weight is 1, that of windows p
    lr = 2.0 if name == "arrival naive" else 1.0
    x = models(FedFix(weights=weights, server_lr=lr), kind, 1200, 0.01, **keys)
    assert x[2 * len(x) // 3 :].mean() == pytest.approx(LIMITS[name], abs=1e-3)


def test_weights_oscillate_as_the_specification_says():
    def swing(trigger, **keys):
        x = models(FedFix(), trigger, 400, 0.1, **keys)
        return np.ptp(x[len(x) // 2 :])

    assert swing("all") == pytest.approx(0, abs=1e-9)
    assert swing("window", window=5) == pytest.approx(0.025, abs=1e-3)
    assert swing("window", window=2) == pytest.approx(0.097, abs=1e-3)
    assert swing("arrival") == pytest.approx(0.138, abs=1e-3)
    x = models(FedFix(), "arrival", 400, 0.1)
    assert x[len(x) // 2 :].mean() == pytest.approx(0.5276, abs=1e-3)


@pytest.mark.parametrize("trigger", ["arrival", "window"])
def test_models_of_quadratics_equal_the_oracles(trigger):
    keys = {"window": 5} if trigger == "window" else {}
    x = models(FedFix(), trigger, 40, 0.1, **keys)
    schedule = (
        oracle.fixed(TIMES, 0.5, 40.0) if keys else oracle.asynchronous((1.0, 0.2), 40.0 + 1e-9)
    )
    rates = closed_form(trigger, np.array([10, 2]), 5)
    expected = oracle.quadratics(schedule, CENTRES, 0.1, 0.5 / rates)
    # in floats five times a fifth is not one: of two that come at once another may be first there
    ends = min(len(x), len(expected))
    assert np.abs(x[:ends] - expected[:ends]).max() < (1e-12 if keys else 0.2)


# --- rules ----------------------------------------------------------------------------------------

DIM = 3
FLAT = Layout.from_named({"w": torch.zeros(DIM, dtype=torch.float64)})


@st.composite
def rounds(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(draw(st.integers(2, 5))):
        ids = np.flatnonzero(random.random(5) < 0.6)
        found.append(
            (ids, random.normal(size=(len(ids), DIM)), random.normal(size=(len(ids), DIM)),
             random.integers(0, 9, len(ids)), random.integers(1, 30, 5)[ids])
        )  # fmt: skip
    return found


def replies(ids, starts, updates, ages, samples):
    starts = torch.tensor(starts)
    return Replies(
        server_round=1,
        layout=FLAT,
        client_ids=ids.astype(np.int64),
        params=starts + torch.tensor(updates),
        reference=starts,
        buffers={},
        extra={},
        num_examples=torch.tensor(samples, dtype=torch.int64),
        metrics={},
        staleness=torch.tensor(ages, dtype=torch.int64),
    )


def followed_by(strategy, given_rounds):
    x = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    state, found = strategy.init(x, 5), []
    for each in given_rounds:
        x, state, _ = strategy.server_update(state, x, replies(*each))
        found.append(x.numpy())
    return found


@given(given_rounds=rounds(), kind=st.sampled_from(["constant", "polynomial", "hinge"]))
def test_fedasync_equals_the_oracle(given_rounds, kind):
    strategy = FedAsync(mixing=0.7, staleness=kind, exponent=0.8, slope=3.0, after=2)
    x = np.linspace(-1, 1, DIM)
    for found, (_, starts, updates, ages, _) in zip(
        followed_by(strategy, given_rounds), given_rounds, strict=True
    ):
        x = oracle.fedasync(x, starts + updates, ages, 0.7, kind, 0.8, 3.0, 2)
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


@given(given_rounds=rounds(), most=st.sampled_from([None, 0, 3]), weighted=st.booleans())
def test_fedbuff_equals_the_oracle(given_rounds, most, weighted):
    strategy = FedBuff(
        max_staleness="none" if most is None else most, weighted=weighted, server_lr=0.7
    )
    x = np.linspace(-1, 1, DIM)
    for found, (_, _, updates, ages, samples) in zip(
        followed_by(strategy, given_rounds), given_rounds, strict=True
    ):
        held = samples if weighted else np.ones(len(samples))
        x = oracle.fedbuff(x, updates, ages, most, held, 0.7)
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


RATES = np.array([0.9, 0.5, 0.25, 1.0, 0.02])


@given(given_rounds=rounds(), weights=st.sampled_from(["known", "estimated", "naive"]))
def test_fedfix_equals_the_oracle(given_rounds, weights):
    strategy = FedFix(weights=weights, server_lr=0.6)
    strategy.declare_rates(RATES)
    x, counts = np.linspace(-1, 1, DIM), np.zeros(5)
    for n, (found, (ids, _, updates, _, _)) in enumerate(
        zip(followed_by(strategy, given_rounds), given_rounds, strict=True)
    ):
        counts[ids] += 1
        known = {"known": RATES, "naive": np.ones(5), "estimated": counts / (n + 1)}[weights]
        mine = dict(zip(ids.tolist(), updates, strict=True))
        x = oracle.fedfix(x, mine, np.full(5, 0.2), known, 0.6)
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


def test_fedfix_takes_those_it_does_not_know_for_the_mean_of_the_others():
    strategy = FedFix(weights="naive", importance="samples")
    x = torch.zeros(1, dtype=torch.float64)
    state = strategy.init(x, 4)
    update = np.array([[1.0], [1.0]])
    flat = Layout.from_named({"w": torch.zeros(1, dtype=torch.float64)})
    answered = replies(np.array([0, 2]), update * 0, update, [0, 0], [10, 30])
    x, state, _ = strategy.server_update(state, x, replace_layout(answered, flat))
    assert x.tolist() == [40 / 80]  # four clients of 20 on average
    assert state.samples.tolist() == [10, 0, 30, 0]


def replace_layout(given_replies, layout):
    return replace(given_replies, layout=layout)


def test_discounts_are_those_of_the_papers():
    ages = torch.tensor([0, 1, 3, 8, 15])
    np.testing.assert_allclose(
        discount(ages, "polynomial"), [1, 0.7071, 0.5, 0.3333, 0.25], atol=1e-4
    )
    assert discount(ages, "constant").tolist() == [1.0] * 5
    np.testing.assert_allclose(discount(ages, "hinge"), [1, 1, 1, 1 / 41, 1 / 111])
