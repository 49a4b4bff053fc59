"""What happens inside a round: drop-out, partial work, speed, deadlines, over-selection."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.client.batching.schedule import steps_of
from fedsim.engine.inline import InlineGrid
from fedsim.federation.device_table import Devices
from fedsim.federation.devices import DeviceModel
from fedsim.federation.grids.absence import AbsenceGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.devices import DeviceGrid
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import Cohort
from fedsim.messages.records import WORK, model_record
from fedsim.runs.execute import execute
from fedsim.runs.folder import create
from fedsim.runs.start import make_grid
from fedsim.runs.world import build
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

EVERYBODY = np.arange(8_000)


def model(keep=None, seed=3, **table):
    return DeviceModel(Devices(**table), seed=seed, keep=keep)


def sigmas(found, expected, spread, count):
    """How many standard errors a mean of so many draws is off."""
    return abs(found - expected) / (spread / math.sqrt(count))


# --- the laws of what happens ---------------------------------------------------------------------


def test_clients_drop_out_with_the_given_probability_each_on_its_own():
    fates = model(drop_out=0.3).fates(5, EVERYBODY)
    assert sigmas(fates.dropped.mean(), 0.3, math.sqrt(0.21), 8_000) < 4
    pairs = fates.dropped[::2] & fates.dropped[1::2]
    assert sigmas(pairs.mean(), 0.09, math.sqrt(0.09 * 0.91), 4_000) < 4
    assert (fates.work == 1).all()
    assert not fates.late.any()


def test_partial_work_is_uniform_between_the_smallest_share_and_all():
    fates = model(partial=0.4, min_work=0.2).fates(5, EVERYBODY)
    part = fates.work[fates.work < 1]
    assert sigmas(len(part) / 8_000, 0.4, math.sqrt(0.24), 8_000) < 4
    assert part.min() >= 0.2
    for quantile in (0.25, 0.5, 0.75):  # of the uniform law on [0.2, 1]
        below = (part < 0.2 + 0.8 * quantile).mean()
        assert sigmas(below, quantile, math.sqrt(quantile * (1 - quantile)), len(part)) < 4


def test_a_client_s_speed_is_its_own_for_ever_and_log_normal_around_one():
    devices = model(speed_sigma=0.5, deadline=1e9)
    times = devices.fates(1, EVERYBODY).time
    np.testing.assert_array_equal(devices.fates(2, EVERYBODY).time, times)
    logs = np.log(times)
    assert sigmas(logs.mean(), 0, 0.5, 8_000) < 4
    assert sigmas(logs.var(), 0.25, 0.25 * math.sqrt(2), 8_000) < 4
    assert sigmas((times < 1).mean(), 0.5, 0.5, 8_000) < 4  # the median client takes one unit


def test_jitter_is_drawn_anew_in_every_round_and_multiplies_the_speed():
    steady = model(speed_sigma=0.5, deadline=1e9).fates(1, EVERYBODY).time
    shaken = model(speed_sigma=0.5, jitter_sigma=0.2, deadline=1e9)
    logs = [np.log(shaken.fates(t, EVERYBODY).time / steady) for t in (1, 2)]
    for log in logs:
        assert sigmas(log.var(), 0.04, 0.04 * math.sqrt(2), 8_000) < 4
    assert abs(np.corrcoef(*logs)[0, 1]) < 4 / math.sqrt(8_000)


def test_a_deadline_discards_those_who_are_slower_in_full_or_in_part():
    settings = {"speed_sigma": 0.6, "partial": 0.5, "min_work": 0.3, "drop_out": 0.1}
    free = model(**settings, deadline=1e9).fates(4, EVERYBODY)
    strict = model(**settings, deadline=1.1).fates(4, EVERYBODY)
    np.testing.assert_array_equal(strict.dropped, free.dropped)
    np.testing.assert_array_equal(strict.late, (free.time > 1.1) & ~free.dropped)
    np.testing.assert_array_equal(strict.work, free.work)
    cut = model(**settings, deadline=1.1, late="partial").fates(4, EVERYBODY)
    assert not cut.late.any()
    slow = free.time > 1.1
    # the share that fits: what was done by 1.1 of a work that takes time / work in full
    np.testing.assert_allclose(cut.work[slow], 1.1 / (free.time[slow] / free.work[slow]))
    np.testing.assert_array_equal(cut.work[~slow], free.work[~slow])
    assert cut.time.max() <= 1.1


@pytest.mark.parametrize("late", ["drop", "partial"])
def test_who_is_over_the_deadline_by_rounding_alone_is_in_time(late):
    clients = np.arange(50)
    time = float(model(speed_sigma=0.5, deadline=1e9).fates(1, clients).time.max())
    fates = model(speed_sigma=0.5, deadline=math.nextafter(time, 0), late=late).fates(1, clients)
    assert not fates.late.any()
    assert (fates.work == 1).all()


def test_of_an_over_selected_cohort_the_first_to_finish_are_kept():
    settings = {"speed_sigma": 0.6, "jitter_sigma": 0.1, "drop_out": 0.3, "over_select": 1.5}
    for server_round in range(1, 40):
        ids = np.arange(0, 30, 2)
        fates = model(keep=10, **settings).fates(server_round, ids)
        finishing = [i for i in range(15) if not fates.dropped[i]]
        first = sorted(finishing, key=lambda i: fates.time[i])[:10]
        assert np.flatnonzero(~fates.gone).tolist() == sorted(first)


def test_clients_that_finish_at_the_same_time_are_kept_by_lot():
    devices = model(keep=2, over_select=2.0)
    kept = np.zeros(4)
    for server_round in range(1, 4001):
        kept[~devices.fates(server_round, np.arange(4)).gone] += 1
    assert (np.abs(kept / 4000 - 0.5) <= 4 * math.sqrt(0.25 / 4000)).all()


def test_a_client_s_fate_does_not_depend_on_who_else_was_selected():
    settings = {"drop_out": 0.3, "partial": 0.5, "speed_sigma": 0.4, "deadline": 1.2}
    everybody, some = np.arange(40), np.array([3, 17, 31])
    whole, alone = model(**settings).fates(7, everybody), model(**settings).fates(7, some)
    for field in ("work", "time", "dropped", "late"):
        np.testing.assert_array_equal(getattr(whole, field)[some], getattr(alone, field))
    next_round = model(**settings).fates(8, everybody)
    other_seed = model(**settings, seed=4).fates(7, everybody)
    for other in (next_round, other_seed):
        assert not np.array_equal(other.work, whole.work)
        assert not np.array_equal(other.dropped, whole.dropped)


# --- partial work ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.21, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["vmap", "loop"])
def test_a_partial_client_is_one_that_was_trained_for_so_many_steps(share, kind):
    """The first ceil(share * steps) steps of the same schedule, whatever its neighbours do."""
    clients = (7, 4, 5)  # 200, 20 and 45 samples
    procedure = fed.make_procedure(momentum=0.9, batch_size=16)
    whole = fed.make_executor(procedure=procedure, kind=kind)
    steps = whole.procedure.work.num_steps(200)
    assert steps > 10
    few = math.ceil(share * steps)
    short = fed.make_procedure(momentum=0.9, batch_size=16, local_steps=few, local_epochs=1)
    expected = fed.make_executor(procedure=short, kind=kind)
    partial = whole.train(fed.job(whole, clients, work=(share, 1.0, 0.5)))
    alone = expected.train(fed.job(expected, clients))
    assert fed.result_bits(partial, 0) == fed.result_bits(alone, 0)
    assert partial.num_examples.tolist() == [200, 20, 45]  # what they hold, not what they saw
    full = whole.train(fed.job(whole, clients))
    assert fed.result_bits(partial, 1) == fed.result_bits(full, 1)
    assert fed.result_bits(partial, 2) != fed.result_bits(full, 2)


def test_a_share_of_the_steps_is_rounded_up_and_never_none():
    for steps in range(1, 60):
        for tenths in range(1, 11):
            assert steps_of(tenths / 10, steps) == max(1, -(-tenths * steps // 10))
    assert steps_of(1e-9, 50) == 1
    assert steps_of(0.5, 0) == 0


# --- over grids -----------------------------------------------------------------------------------


class Node(ClientApp):
    """Answers message by message, as a SuperNode does."""

    def __init__(self, app):
        super().__init__()
        self.app = app

    def __call__(self, message, context):
        return self.app(message, context)


class Counted(ByteCountingGrid):
    """Counts, and holds each count against the messages themselves."""

    def send_and_receive(self, messages, *, timeout=None):
        for number, message in enumerate(messages):
            internals.set_message_id(message, f"{number:064x}")  # as whoever sends it does
        sent = [internals.wire_bytes(message) for message in messages]
        replies = super().send_and_receive(messages, timeout=timeout)
        received = [internals.wire_bytes(reply) for reply in replies]
        assert self.take() == (sum(sent), sum(received))
        assert sent
        return replies


SETTINGS = {
    "drop_out": 0.2,
    "partial": 0.6,
    "speed_sigma": 0.5,
    "deadline": 1.3,
    "over_select": 1.5,
}
# with this seed, of the clients 0...7 some drop out, are late, or do a part: see the first test


def devices_around(engine, layout):
    devices = model(keep=6, seed=8, **SETTINGS)
    inner = AbsenceGrid(engine, devices)
    return DeviceGrid(AdmissionGrid(Counted(inner), layout), devices)


def cohort_of(app, clients=range(8)):
    payload = fed.initial_payload(app.executor)
    return Cohort(np.array(clients), 1, app.layout, payload, config={"rate": 0.5})


def messages_of(cohort):
    """A foreign strategy's messages, which share one content."""
    internals.ensure_identity()
    record = model_record(cohort.layout, cohort.shared.params, cohort.shared.buffers)
    config = ConfigRecord({"rate": 0.5, "server-round": 1})
    content = RecordDict({"arrays": record, "config": config})
    return [Message(content, int(c) + 2, "train", group_id="1") for c in cohort.client_ids]


@pytest.fixture(scope="module")
def app():
    return fed.make_app(procedure=fed.make_procedure(momentum=0.9), chunk_size=3)


@pytest.fixture(scope="module")
def outcome(app):
    """What fedsim's engine gives."""
    return devices_around(InlineGrid(app, 8), app.layout).send_and_receive(cohort_of(app))


def test_the_cohort_of_these_tests_has_every_fate(outcome):
    fates = model(keep=6, seed=8, **SETTINGS).fates(1, np.arange(8))
    assert fates.dropped.any()
    assert fates.late.any()
    assert ((fates.work < 1) & ~fates.gone).any()
    assert outcome.client_ids.tolist() == np.flatnonzero(~fates.gone).tolist()
    assert {f.client_id: f.cause for f in outcome.failures} == dict.fromkeys(
        np.flatnonzero(fates.gone).tolist(), "absent"
    )
    for failure in outcome.failures:
        assert ("was late" in failure.reason) == bool(fates.late[failure.client_id])


def test_the_engine_gives_each_client_the_bits_of_its_share_of_work(app, outcome):
    fates = model(keep=6, seed=8, **SETTINGS).fates(1, np.arange(8))
    executor = app.executor
    expected = {}
    for first in (0, 3, 6):
        ids = tuple(range(first, min(first + 3, 8)))
        gone = [c for c in ids if fates.gone[c]]
        if len(gone) < len(ids):
            chunk = fed.job(executor, ids, absent=gone, work=tuple(fates.work[list(ids)]))
            rows = executor.train(chunk).params
            expected |= {client: rows[place] for place, client in enumerate(ids)}
    for place, client in enumerate(outcome.client_ids.tolist()):
        assert torch.equal(outcome.params[place], expected[client])


def test_a_foreign_strategy_s_messages_get_the_same_fates_and_bits(app, outcome):
    sent = messages_of(cohort_of(app))
    engine = InlineGrid(app, 8)
    replies = devices_around(engine, app.layout).send_and_receive(sent)
    # whoever is gone keeps a neutral slot, so that nobody else's chunk changes
    undisturbed = InlineGrid(app, 8)
    undisturbed.send_and_receive(sent)
    chunks = [entry["clients"] for entry in undisturbed.chunk_log]
    assert [len(chunk) for chunk in chunks] == [3, 3, 2]
    assert [entry["clients"] for entry in engine.chunk_log] == chunks
    assert torch.equal(replies.params, outcome.params)
    assert [f[:3] for f in replies.failures] == [f[:3] for f in outcome.failures]
    assert WORK not in sent[0].content["config"]  # the strategy's own object is left alone


def test_nodes_that_answer_message_by_message_do_the_same_share(app):
    """A node trains its client in a two-slot chunk, hence the plan."""
    two = fed.make_app(procedure=fed.make_procedure(momentum=0.9), chunk_size=2)
    cohort = cohort_of(two, [2, 5])
    work = np.array([0.3, 1.0])
    nodes = InlineGrid(Node(two), 8)
    for batch in (cohort.altered(work=work), None):
        if batch is None:  # a foreign strategy's
            told = DeviceGrid(nodes, model(partial=1.0))
            told.model.fates = lambda *_: model().fates(1, cohort.client_ids)._replace(work=work)
            replies = list(told.send_and_receive(messages_of(cohort)))
        else:
            replies = list(nodes.send_and_receive(batch))
        expected = InlineGrid(two, 8).send_and_receive(cohort.altered(work=work))
        for place, reply in enumerate(replies):
            arrays = reply.content["arrays"]
            flat = np.concatenate([arrays[name].numpy().ravel() for name in two.layout.names])
            assert flat.tolist() == expected.params[place].tolist()


def test_over_nodes_only_those_who_do_not_drop_out_are_reached(app, outcome):
    for batch in (cohort_of(app), messages_of(cohort_of(app))):
        grid = devices_around(InlineGrid(Node(app), 8), app.layout)
        replies = grid.send_and_receive(batch)
        assert replies.client_ids.tolist() == outcome.client_ids.tolist()
        assert [f[:3] for f in replies.failures] == [f[:3] for f in outcome.failures]
        torch.testing.assert_close(replies.params, outcome.params, rtol=1e-5, atol=1e-6)


def test_a_plain_flower_client_finds_its_share_in_the_settings(app):
    told = {}

    class Plain(ClientApp):
        def __call__(self, message, context):
            told[message.metadata.dst_node_id - 2] = dict(message.content["config"])
            return Message(RecordDict({"m": MetricRecord({"num-examples": 1})}), reply_to=message)

    devices = model(partial=0.5)
    work = devices.fates(1, np.arange(8)).work
    for batch in (cohort_of(app), messages_of(cohort_of(app))):
        told.clear()
        list(DeviceGrid(InlineGrid(Plain(), 8), devices).send_and_receive(batch))
        for client in range(8):
            assert told[client].get(WORK, 1.0) == work[client]
            assert told[client]["rate"] == 0.5
            assert (WORK in told[client]) == (work[client] < 1)


def test_an_impossible_share_from_the_wire_is_refused(app):
    (message,) = messages_of(cohort_of(app, [3]))
    for share in (0.0, 1.5, "half"):
        message.content["config"][WORK] = share
        (reply,) = InlineGrid(Node(app), 8).send_and_receive([message])
        assert "'work' = " in reply.error.reason
        assert "must be in (0, 1]" in reply.error.reason


def test_evaluation_and_set_up_know_no_devices(app):
    grid = devices_around(InlineGrid(app, 8), app.layout)
    for kind in ("evaluate", "train.setup"):
        replies = grid.send_and_receive(cohort_of(app).altered(message_type=kind))
        assert replies.client_ids.tolist() == list(range(8))
        assert grid.observed().metrics == {"clients/late": 0, "clients/partial": 0}


# --- whole runs -----------------------------------------------------------------------------------

SCENARIO = """
seed = 5
rounds = 4

[task]
model = "logistic"

[data]
name = "synthetic"
dimension = 6
classes = 3
max_samples = 30

[partition]
kind = "natural"
clients = 24

[participation]
kind = "uniform"
cohort_size = 8

[client]
local_lr = 0.1
momentum = 0.9
keep_optimizer = true
batch_size = 4

[devices]
drop_out = 0.2
partial = 0.5
speed_sigma = 0.5
jitter_sigma = 0.1
deadline = 1.5
over_select = 1.5

[engine]
kind = "inline"
chunk_size = 5
"""


@pytest.fixture
def scenario(tmp_path):
    (tmp_path / "devices.toml").write_text(SCENARIO)
    return lambda *sets: load(tmp_path / "devices.toml", list(sets))


def run(scenario, out, engine=None):
    """Run a scenario; returns (params, participation, metrics without times)."""
    world = build(scenario)
    folder = create(out, scenario)
    with engine(world) if engine else make_grid(world) as grid:
        result = execute(world, folder, grid, seed=scenario.seed)
    metrics = [
        {k: v for k, v in record.items() if not k.startswith("time/")}
        for record in JsonLines.read(folder.file("metrics.jsonl"))
    ]
    participation = JsonLines.read(folder.file("participation.jsonl"))
    return result.summary["params_sha256"], participation, metrics


def test_a_run_records_who_was_late_and_who_did_how_much(scenario, tmp_path):
    loaded = scenario()
    _, participation, metrics = run(loaded, tmp_path / "run")
    devices, seen = build(loaded).devices, set()
    for record, measured in zip(participation, metrics[1:], strict=True):
        ids = np.array(record["selected"])
        assert len(ids) == 12
        fates = devices.fates(record["round"], ids)
        assert record["late"] == ids[fates.late].tolist()
        assert record["failed"] == {str(c): "absent" for c in ids[fates.gone].tolist()}
        part = ~fates.gone & (fates.work < 1)
        assert record["work"] == {
            str(c): w for c, w in zip(ids[part].tolist(), fates.work[part].tolist(), strict=True)
        }
        assert measured["clients/selected"] == 12
        assert measured["clients/replied"] == (~fates.gone).sum() <= 8
        assert measured["clients/absent"] == fates.gone.sum()
        assert measured["clients/late"] == fates.late.sum()
        assert measured["clients/partial"] == part.sum()
        assert measured["clients/failed"] == 0
        seen |= {name for name in ("late", "work") if record[name]}
    assert seen == {"late", "work"}


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_ray_workers_give_the_bits_of_this_process(scenario, tmp_path, lender, workers):
    inline = run(scenario(), tmp_path / "inline")
    ray = run(scenario(), tmp_path / "ray", lambda w: lender.grid(w.app, 24, workers=workers))
    assert ray == inline


def test_what_happens_does_not_depend_on_chunks_or_strategy(scenario, tmp_path):
    _, expected, _ = run(scenario(), tmp_path / "run")
    others = ("engine.chunk_size=2", "strategy.name=fedau", "strategy.name=flower:FedAdam")
    for number, override in enumerate(others):
        assert run(scenario(override), tmp_path / str(number))[1] == expected


@pytest.mark.parametrize("strategy", ["fedavg", "flower:FedAvg"])
def test_a_table_that_says_nothing_changes_nothing(scenario, tmp_path, strategy):
    document = scenario(f"strategy.name={strategy}").resolved()
    without = {name: table for name, table in document.items() if name != "devices"}
    silent = {**without, "devices": {"drop_out": 0.0, "deadline": None}}
    runs = [Scenario.from_resolved(d, "devices.toml") for d in (without, silent)]
    assert runs[0].sha256 == runs[1].sha256
    assert runs[1].devices is None
    found = [run(each, tmp_path / str(place)) for place, each in enumerate(runs)]
    assert found[0] == found[1]
    assert not any(name in record for record in found[0][2] for name in ("clients/late",))
    assert set(found[0][1][0]) == {"round", "selected", "failed"}


def test_a_resumed_run_meets_the_same_fates(scenario, tmp_path):
    from fedsim.runs.start import resume

    class Stop(Exception):
        pass

    class Hook:
        def round_ended(self, report):
            if report.server_round == 3:
                raise Stop

    expected = run(scenario(), tmp_path / "whole")
    loaded = scenario("checkpoint.every=1")
    world, folder = build(loaded), create(tmp_path / "broken", loaded)
    with make_grid(world) as grid, pytest.raises(Stop):
        execute(world, folder, grid, seed=loaded.seed, extra_hooks=[Hook()])
    result = resume(folder.path)
    assert result.summary["params_sha256"] == expected[0]
    assert JsonLines.read(folder.file("participation.jsonl")) == expected[1]


# --- the table ------------------------------------------------------------------------------------


def test_the_table_decides_results_and_comes_back_from_a_run_folder(scenario):
    loaded = scenario()
    again = Scenario.from_resolved(json.loads(json.dumps(loaded.resolved())), "devices.toml")
    assert again.devices == loaded.devices
    assert again.sha256 == loaded.sha256
    assert scenario("devices.drop_out=0.3").sha256 != loaded.sha256


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("devices.drop_out=1.0", r"\[devices\] drop_out = 1.0: must be < 1"),
        ("devices.partial=-1", r"\[devices\] partial = -1.*: must be >= 0"),
        ("devices.min_work=0", r"\[devices\] min_work = 0.*: must be > 0"),
        ("devices.deadline=0.0", r"\[devices\] deadline = 0.0: must be > 0"),
        ("devices.late=stop", r"\[devices\] late = \"stop\": must be 'drop' or 'partial'"),
        ("devices.over_select=0.5", r"\[devices\] over_select = 0.5: must be >= 1"),
        ("devices.dropout=0.5", r"'dropout' is not a key of \[devices\]; did you mean 'drop_out'?"),
        (
            "devices={speed_sigma=0.5}",
            r"\[devices\] speed_sigma = 0.5 changes nothing without a 'deadline' or an 'over_sel",
        ),
        ("devices={min_work=0.5}", r"min_work = 0.5 changes nothing with partial = 0"),
        ("devices={late='partial'}", r"late = 'partial' changes nothing without a 'deadline'"),
        (
            "devices={deadline=1e-9}",
            r"deadline = 1e-09: no client is ever done by then; the soonest takes 1 ",
        ),
        (
            "devices={deadline=1e-9, speed_sigma=0.3, partial=0.5, min_work=0.2}",
            r"deadline = 1e-09: no client is ever done by then; the soonest takes 0.0181 ",
        ),
        (
            "participation={kind='bernoulli'}",
            r"\[devices\] over_select = 1.5 with \[participation\] kind = \"bernoulli\": the rule "
            r"has no cohort size",
        ),
        (
            "devices.over_select=4.0",
            r"over_select = 4: times \[participation\] cohort_size = 8 that is more than "
            r"\[partition\] clients = 24",
        ),
    ],
)
def test_impossible_tables_are_refused_naming_key_and_value(scenario, override, message):
    with pytest.raises(ScenarioError, match=message):
        scenario(override)


def test_plain_arrays_of_a_foreign_strategy_stay_shared_when_shares_differ(app):
    """A strategy's one object for all stays one payload, not one per client."""
    cohort = Cohort.from_messages(messages_of(cohort_of(app)), app.layout)
    assert cohort.personal.is_empty
    sent = []

    class Spy(InlineGrid):
        def send_and_receive(self, messages, *, timeout=None):
            sent.extend(messages)
            return super().send_and_receive(messages, timeout=timeout)

    list(DeviceGrid(Spy(app, 8), model(partial=1.0)).send_and_receive(messages_of(cohort)))
    told = Cohort.from_messages(sent, app.layout)
    assert told.personal.is_empty
    assert (told.work < 1).all()
    assert told.config == cohort.config
    assert isinstance(sent[0].content["arrays"], ArrayRecord)
