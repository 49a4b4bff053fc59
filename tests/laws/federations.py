"""Tiny federations for the laws: every discovered strategy and client procedure, every model.

Strategies and client procedures are found in `strategies/` and `clients/`, never listed here.
"""

import functools
import inspect
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord

from fedsim.basics.rng import generator
from fedsim.basics.samples import SampleSpec
from fedsim.client.chains.chain import chain_of
from fedsim.client.compression import Outcome
from fedsim.client.executor import CohortExecutor
from fedsim.client.job import ChunkJob
from fedsim.client.part import Trained
from fedsim.client.parts import Parts
from fedsim.client.plan import ExecutionPlan
from fedsim.client.vectorising import loop_reason
from fedsim.data.federated import Arrays, ClientRows, DataRecipe, FederatedData
from fedsim.data.preparation import reopen
from fedsim.engine.client_app import CohortApp
from fedsim.engine.inline import InlineGrid
from fedsim.federation.clock.job_times import JobTimes
from fedsim.federation.clock.timetable import Timetable
from fedsim.federation.clock_table import JobTime
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.clock import ClockGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.federation.participation.kinds import Participation
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.records import array_record
from fedsim.runs.loop import RoundLoop
from fedsim.runs.start_model import personal_start
from fedsim.scenario import discovery
from fedsim.scenario.choice import Choice
from fedsim.scenario.parts import spelled_out
from fedsim.tasks import named as tasks
from fedsim.tasks.models.personal import personal_names
from tests import optimisations

SIZES = (1, 2, 3, 7, 20, 45, 110, 200)
SHAPE, CLASSES, SEED = (1, 4, 4), 3, 11
SPEC = SampleSpec(SHAPE, CLASSES)
# by name, the keys of [task]; those with a `model` are that model with tensors of each client's own
MODELS = {
    "logistic": {},
    "mlp": {"hidden": [9]},
    "cnn": {},
    "mlp_dropout": {"hidden": [15], "dropout": 0.4},
    "cnn_batchnorm": {},
    "personal_output": {"model": "mlp", "hidden": [9], "personal": ["output"]},
    "personal_norms": {"model": "cnn_batchnorm", "personal": ["*norm*"]},
}
VECTORISED = [name for name in MODELS if name not in ("cnn_batchnorm", "personal_norms")]

# Small settings for whatever procedure takes them; the others keep their defaults.
_QUICK = {"local_lr": 0.05, "batch_size": 50, "local_epochs": 1}


class InMemoryData(FederatedData):
    """Clients of given sizes with class-dependent features; travels as it is.

    Args:
        sizes: Samples of each client.
        test_sizes: Samples of each client's local test split; None leaves all of them empty.
        seed: Of the samples.
        broken: Clients whose features are infinite, so that training them ends in NaN.
    """

    def __init__(self, sizes=SIZES, test_sizes=None, seed=0, broken=()):
        super().__init__(DataRecipe({}, {}, seed, Path(), reopen))
        self._arguments = (sizes, test_sizes, seed, broken)
        draw = np.random.default_rng(seed)
        self.num_clients, self.spec = len(sizes), SPEC
        self.manifest, self.manifest_sha256 = {"sizes": list(sizes)}, f"in memory {seed}"
        self._rows, self._features, self._targets = {}, {}, {}
        for split, counts in (("train", sizes), ("test", test_sizes or [0] * len(sizes))):
            total = int(sum(counts)) + 1  # a first row that belongs to nobody
            targets = draw.integers(CLASSES, size=total)
            features = draw.normal(size=(total, *SHAPE)) + targets.reshape(-1, 1, 1, 1) / CLASSES
            ends = np.cumsum([1, *counts])
            self._rows[split] = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
            for client in broken:
                features[self._rows[split][client]] = np.inf
            self._features[split] = features.astype(np.float32)
            self._targets[split] = targets
        test_targets = draw.integers(CLASSES, size=30)
        self._test = Arrays(draw.normal(size=(30, *SHAPE)).astype(np.float32), test_targets)

    def __reduce__(self):
        return InMemoryData, self._arguments

    def sizes(self, client_ids):
        return np.array([len(self._rows["train"][c]) for c in client_ids], dtype=np.int64)

    def clients(self, client_ids, *, split="train"):
        ids = self._checked(client_ids, split)
        self.clients_read += len(ids)
        rows = [self._rows[split][client] for client in ids]
        return ClientRows(self._features[split], self._targets[split], rows)

    @property
    def test(self):
        return self._test


def make_task(model="logistic", *, dtype="float32"):
    return tasks.make_task(_table(model, dtype), SPEC)


def _table(model, dtype):
    return {"model": model, "dtype": dtype, **MODELS[model]}


def remembers(model, arguments):
    """Whether clients with this model and these arguments of the procedure have a state."""
    kept = make_procedure(**arguments).initial_state({"w": torch.zeros(2)})
    return bool(kept or MODELS[model].get("personal"))


@functools.cache
def message_layout(model):
    """The layout of messages: without the tensors that clients keep to themselves."""
    built = make_task(model).build_model(0)
    return Layout.from_model(built).without(
        personal_names(built, MODELS[model].get("personal", ()))
    )


def procedures():
    """Every discovered procedure, in variants if it has several optimisers: (id, name, arguments).

    The second variant remembers its optimiser, so that client state takes part in every law.
    """
    found = []
    for name in discovery.names("clients"):
        takes = inspect.signature(discovery.factory("clients", name)).parameters
        quick = {key: value for key, value in _QUICK.items() if key in takes}
        if {"optimizer", "keep_optimizer"} <= takes.keys():
            kept = {"optimizer": "adam", "keep_optimizer": True}
            found += [(f"{name}-sgd", name, quick), (f"{name}-adam", name, {**quick, **kept})]
        else:
            found.append((name, name, quick))
    return found


def part_procedures():
    """The procedures that take parts, with each part alone: (id, name, arguments).

    What acts on personal tensors may do something else with the others: there is an epoch for each.
    """
    return [
        (
            f"{name}-{part}",
            name,
            {**arguments, "local_epochs": 2 if acts_on_personal(part) else 1}
            | {"parts": [{"name": part}]},
        )
        for one, name, arguments in procedures()
        if one.endswith("-sgd")
        for part in discovery.names("parts")
    ]


def acts_on_personal(part):
    """Whether a part acts on what clients keep to themselves, unless it names other tensors."""
    return discovery.part_factory(part).names_personal is not None


def parts_with_state():
    """The parts for which clients keep something between rounds, as tables."""
    tables = [{"name": part} for part in discovery.names("parts")]
    nothing = {"w": torch.zeros(2)}
    return [t for t in tables if Choice("parts", t).make().initial_state(nothing)]


# a dense model, one with convolutions, one that trains in a loop
PART_MODELS = ("mlp", "cnn", "cnn_batchnorm")


def part_cases():
    """Every part on one of three kinds of model, in turn: (id, model, name, arguments).

    Those that act on what clients keep to themselves are there with such tensors, too.
    """
    cases = [
        (f"{model}-{one}", model, name, arguments)
        for place, (one, name, arguments) in enumerate(part_procedures())
        for model in [PART_MODELS[place % len(PART_MODELS)]]
    ]
    return cases + [
        (f"personal_output-{one}", "personal_output", name, arguments)
        for one, name, arguments in part_procedures()
        if any(acts_on_personal(part["name"]) for part in arguments["parts"])
    ]


def strategy_beside(arguments):
    """A strategy that needs the parts of a procedure's arguments; averaging where none does."""
    listed = {part["name"] for part in arguments.get("parts", ())}
    needing = [name for name in strategies() if _names_of_parts(name) & listed]
    return needing[0] if needing else "fedavg"


@functools.cache
def _names_of_parts(strategy):
    return {part["name"] for part in parts_for(strategy)}


def make_procedure(name="local_sgd", **arguments):
    return local_sgd(**{**_QUICK, **arguments}) if name == "local_sgd" else of_name(name, arguments)


def parts_for(strategy, **arguments):
    """The parts that a strategy with these arguments needs of its clients."""
    if not arguments:
        return [dict(table) for table in _parts_by_default(strategy)]
    return _asked_for(strategy, arguments)


@functools.cache
def _parts_by_default(strategy):
    return _asked_for(strategy, {})


def _asked_for(strategy, arguments):
    table = {"name": strategy, **defaults_of(strategy), **arguments}
    asked = Choice("strategies", table).asked_of_client()
    return [{"name": part, **values} for part, values in asked.items()]


def defaults_of(strategy):
    keys = discovery.schema("strategies", strategy)
    return {name: key.default for name, key in keys.items() if not key.required}


def make_app_for(strategy, model="logistic", data=None, **options):
    """An app whose clients have the parts that a strategy needs."""
    procedure = make_procedure(parts=parts_for(strategy))
    return make_app(model, procedure, data, **options)


def returned_by_parts(strategy, layout, received, rows, sent):
    """What clients return besides their models by the parts that a strategy needs, `[K, ...]`."""
    parts = Parts([Choice("parts", table).make() for table in parts_for(strategy)])
    told = {name: torch.ones(CLASSES, dtype=received.dtype) for name in parts.knows}
    found = []
    for row in rows:
        start = layout.unflatten(received)
        # as many as the client's own numbers say, whichever its place
        state, steps = parts.initial_state(start), (row.sum().abs() * 1e3).floor() % 7 + 1
        trained = Trained(start, layout.unflatten(row), steps, 0.1 * steps, 0.0)
        found.append(parts.finish(parts.begin(start, {**sent, **told}, state), trained, state)[0])
    return {name: torch.stack([each[name] for each in found]) for name in found[0]} if found else {}


def encoded_by_parts(strategy, received, replies, sent, memories):
    """What clients send in place of models by the parts that a strategy needs, `[K, ...]`.

    Args:
        memories: What each client keeps for its part, by client; it is brought up to date.
    """
    parts = [Choice("parts", table).make() for table in parts_for(strategy)]
    part = next((each for each in parts if each.compresses), None)
    return {} if part is None else encoded_by(part, received, replies, sent, memories)


def encoded_by(part, received, replies, sent, memories):
    """The same for one part."""
    found = []
    for row, (client, trained) in enumerate(zip(replies.client_ids, replies.params, strict=True)):
        first = part.initial_state({"w": received})
        kept = memories.get(client, {n.partition(".")[0]: t for n, t in first.items()})
        mine = {name: t[row] for name, t in sent.extra.items()}
        draw = generator(SEED, "compression", replies.server_round, row)
        outcome = Outcome(replies.server_round, received, trained, kept, mine, draw)
        made = part.compressed(outcome)
        memories[client] = made.kept
        found.append({f"{made.base}.{name}": t for name, t in made.encoded.items()})
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def with_encoded(replies, encoded):
    """Replies that hold this in place of models, which stay as they were."""
    unmoved = replies.reference.expand(len(replies.client_ids), -1)
    return replace(replies, params=unmoved, encoded=encoded)


def of_name(name, arguments):
    return Choice("clients", {"name": name, **arguments}).make()


def local_sgd(**arguments):
    """Exactly these keys, former ones that are parts now too."""
    return of_name("local_sgd", spelled_out(arguments))


def strategies():
    return discovery.names("strategies")


def make_strategy(name, **arguments):
    return Choice("strategies", {"name": name, **arguments}).make()


def starting_alike(name):
    """The strategy, all of its clients starting from the model of the round."""
    apart = "start" in discovery.schema("strategies", name)
    return make_strategy(name, **({"start": "shared"} if apart else {}))


def natural_kind(model, procedure=None):
    """What a plan chooses on a CPU."""
    chain, otherwise = _kinds_of(model)
    if chain is not None and (chain.convolves or procedure is None or procedure.stacks):
        return "batched"
    return otherwise


@functools.cache
def _kinds_of(model):
    built = make_task(model).build_model(0)
    return chain_of(built, SHAPE), "loop" if loop_reason(built) else "vmap"


def _kind(model, procedure):
    if optimisations.asked() == "off":
        return "loop"
    return natural_kind(model, procedure)


def make_executor(model="logistic", procedure=None, data=None, *, kind=None, dtype="float32"):
    task = make_task(model, dtype=dtype)
    return CohortExecutor(
        task,
        make_procedure() if procedure is None else procedure,
        InMemoryData() if data is None else data,
        seed=SEED,
        kind=kind or _kind(model, procedure),
        personal=personal_start(task, _table(model, dtype), SEED),
    )


def make_app(model="logistic", procedure=None, data=None, *, chunk_size=3, **options):
    kind = options.get("kind") or _kind(model, procedure)
    build = functools.partial(make_executor, model, procedure, data, **options)
    return CohortApp(build, ExecutionPlan(kind, "a test", chunk_size))


def make_grid(*arguments, **options):
    app = make_app(*arguments, **options)
    return InlineGrid(app, app.executor.data.num_clients)


def initial_arrays(model="logistic", *, dtype="float32") -> ArrayRecord:
    state = _initial_state(model, dtype)
    return array_record({name: state[name].clone() for name in message_layout(model).names})


@functools.cache
def _initial_state(model, dtype):
    return make_task(model, dtype=dtype).build_model(SEED).state_dict()


def initial_payload(executor) -> Payload:
    """The first model, and numbers between 0 and 1 for what else the procedure needs."""
    state = executor.task.build_model(executor.seed).state_dict()
    layout = executor.layout
    buffers = {spec.name: state[spec.name].clone() for spec in layout.buffers}
    params = layout.flatten(state)
    needs = [name for part in getattr(executor.procedure, "parts", ()) for name in part.needs]
    extra = {
        f"{name}.{n}": t.sigmoid() for name in needs for n, t in layout.unflatten(params).items()
    }
    return Payload(params, buffers, extra)


def job(executor, client_ids, *, server_round=1, absent=(), action="train", **changes):
    fields = {
        "action": action,
        "server_round": server_round,
        "client_ids": tuple(client_ids),
        "absent": tuple(client in absent for client in client_ids),
        "layout": executor.layout.fingerprint,
        "shared": initial_payload(executor),
        "has_state": (False,) * len(client_ids),
    }
    return ChunkJob(**{**fields, **changes})


def batches(data, client, server_round, batch_size, steps):
    """The documented order: passes over the client's rows, each permuted anew and cut."""
    found = data.clients([client])
    draw = generator(SEED, "batches", server_round, client)
    while steps > 0:
        order = draw.permutation(found.rows[0])
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            if steps > 0:
                features = found.features[rows].reshape(len(rows), -1).astype(np.float64)
                yield features, found.targets[rows]
            steps -= 1


class Rota(Participation):
    """The given clients, one tuple per round, over and over."""

    def __init__(self, *cohorts):
        self.cohorts = cohorts

    def participants(self, server_round, *, num_clients, seed):
        cohort = self.cohorts[(server_round - 1) % len(self.cohorts)]
        return np.array(sorted(cohort), dtype=np.int64)

    def expected_cohort(self, num_clients):
        return len(self.cohorts[0])


def run_rounds(
    strategy, grid, arrays, layout, *, rounds=2, cohorts=(tuple(range(8)),), late=False, **options
):
    """Run rounds over a grid with the wrappers that a run has; returns (arrays, records).

    If `late`, two replies make a round, on a clock on which clients take unequal times.
    """
    wrapped = AdmissionGrid(ByteCountingGrid(grid), layout)
    if late:
        jobs = JobTimes(JobTime(law="linear", spread=0.8), tick_s=1e-3, seed=SEED, num_clients=8)
        table = Timetable("count", jobs.of, concurrency=8, count=2)
        wrapped = ClockGrid(wrapped, table, Rota(*cohorts), seed=SEED, tick_s=1e-3)
    else:
        wrapped = ParticipationGrid(wrapped, Rota(*cohorts), seed=SEED)
    loop = RoundLoop(strategy, wrapped, rounds, **options)
    return loop.run(arrays), [without_times(record) for record in loop.history]


def without_times(record):
    return {
        key: value
        for key, value in record.items()
        if key == "time/virtual_s" or not key.startswith("time/")
    }


def tensor_bits(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return (str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def named_bits(named):
    return {name: tensor_bits(tensor) for name, tensor in named.items()}


def state_bits(state):
    """All that a strategy remembers; tensors may be inside one level of mappings."""
    return {
        name: tensor_bits(value)
        if isinstance(value, torch.Tensor)
        else named_bits(value)
        if isinstance(value, dict)
        else value
        for name, value in state._asdict().items()
    }


def record_bits(record):
    return {name: (a.dtype, tuple(a.shape), a.numpy().tobytes()) for name, a in record.items()}


def result_bits(result, row):
    """All that a chunk returns of one client."""
    parts = {"params": result.params} if result.params is not None else {}
    parts["num_examples"] = result.num_examples
    for group in ("buffers", "extra", "state", "metrics", "encoded"):
        parts |= {f"{group}.{n}": t for n, t in getattr(result, group).items()}
    return {name: tensor_bits(tensor[row]) for name, tensor in parts.items()}


def configure(strategy, grid, arrays, server_round=1):
    return strategy.configure_train(server_round, arrays, ConfigRecord({}), grid)


def largest_difference(one, other):
    """The largest absolute difference between two records of arrays."""
    assert list(one) == list(other)
    return max(
        float(np.abs(one[name].numpy().astype(np.float64) - other[name].numpy()).max())
        for name in one
    )
