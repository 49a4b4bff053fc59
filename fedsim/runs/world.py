"""From a scenario to the objects that run it."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedsim.basics import kernels_in_use, project
from fedsim.basics.errors import ScenarioError, is_too_large, largest_number
from fedsim.basics.generators import seeded as seeded_draws
from fedsim.basics.import_paths import is_import_path
from fedsim.basics.reads import Reads, watching
from fedsim.basics.rng import derived_seed
from fedsim.basics.sources import NO_CODE, Code
from fedsim.client.plan import ExecutionPlan
from fedsim.data.federated import FederatedData
from fedsim.data.partitions.statistics import label_counts
from fedsim.data.preparation import prepare
from fedsim.engine.client_app import CohortApp
from fedsim.federation.attacks.attack import Attack
from fedsim.federation.devices import DeviceModel
from fedsim.federation.grids.waiting import check_minima
from fedsim.federation.participation.kinds import Participation
from fedsim.federation.topology.topology import Topology
from fedsim.messages.layout import Layout
from fedsim.runs.certain_failures import check_last_batches
from fedsim.runs.client_side import (
    attack_of,
    check_tensors,
    make_app,
    planned,
    task_and_procedure,
)
from fedsim.runs.notes import notes_of
from fedsim.runs.start_model import StartModel, own_start, with_weights
from fedsim.runs.timetables import ClockWork
from fedsim.runs.where_data_lie import check_where_data_lie
from fedsim.scenario.discovery import TOPOLOGY
from fedsim.scenario.recorded_metrics import check_watched
from fedsim.scenario.scenario import Scenario
from fedsim.strategy.adapter import as_ours
from fedsim.strategy.flower import COHORT, check_model
from fedsim.strategy.foreign import nested
from fedsim.tasks.task import Task

_LARGE_BATCH = 2**16  # up to here a batch larger than the data is a way to say "all of them"


@runtime_checkable
class WantsRates(Protocol):
    """A strategy that knows how often clients take part, as no real server does."""

    def declare_rates(self, rates: np.ndarray) -> None:
        """Take each client's probability of taking part in a round, float64 `[N]`."""


@dataclass(frozen=True)
class World:
    """What a scenario describes, built.

    Attributes:
        scenario: The scenario.
        data: The clients' data.
        participation: Who is selected when.
        attack: What attackers do to their replies, or None.
        topology: The graph of a strategy that averages over one, or None.
        plan: How the run computes.
        strategy: What the server decides.
        app: What runs on the clients.
        layout: How the tensors of messages lie in the flat vector.
        arrays: The initial model, without personal tensors.
        devices: What happens to selected clients inside a round, or None.
        weights: What the manifest says of the weights that the model starts from, or None.
        kept: Tensors of the model that no round changes on the server.
        personal: Tensors of the model that each client keeps to itself.
        notes: What a user should know of it before it runs, in lines.
        make_strategy: Makes the strategy once more, as another process would.
        code: The files behind what is named by import path, as they were imported.
        reads: What that code has read besides while it was built and tried.
    """

    scenario: Scenario
    data: FederatedData
    participation: Participation
    attack: Attack | None
    topology: Topology | None
    plan: ExecutionPlan
    strategy: Strategy
    app: CohortApp
    layout: Layout
    arrays: ArrayRecord
    devices: DeviceModel | None = None
    weights: dict[str, Any] | None = None
    kept: tuple[str, ...] = ()
    personal: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    make_strategy: Callable[[], Strategy] = field(kw_only=True)
    code: Code = NO_CODE
    reads: Reads = field(default_factory=lambda: Reads({}))


def build(
    scenario: Scenario,
    *,
    on_node: bool = False,
    draws_seeded: bool = False,
    data: FederatedData | None = None,
) -> World:
    """Build everything; nothing runs yet.

    Args:
        scenario: What to build.
        on_node: Whether only the clients' side is wanted: the model then starts from its
            initialisation, for the weights come with the server's first message.
        draws_seeded: Whether what a strategy draws when it is made, from the process's generators,
            is the seed's; in a deployment it is the operating system's, as all privacy noise.
        data: The clients' data, where they are not had by reading them all, as at a site of a
            deployment; None prepares what the scenario says.

    Raises:
        ScenarioError: If the parts do not fit each other, or into memory.
        RunError: If the data cannot be had.
    """
    try:
        return _build(scenario, on_node, draws_seeded, data)
    except (MemoryError, OverflowError, ValueError) as error:
        if not is_too_large(error):
            raise
        largest = largest_number({**scenario.resolved(), "engine": {}})
        raise ScenarioError(f"{largest}: is too large: {error}") from error


def _build(
    scenario: Scenario, on_node: bool, draws_seeded: bool, given: FederatedData | None
) -> World:
    scenario.open_folders()
    code = scenario.code
    kernels_in_use.keep(scenario.engine.bits)
    data = _data(scenario, given)  # whose content is compared, so what a loader reads need not be
    with watching(scenario.folders) as reads:
        built = _around(scenario, data, code, on_node, draws_seeded)
    project.has_read(reads.found)
    return replace(built, reads=Reads({**project.read_by_modules(code.files), **reads.found}))


def _around(
    scenario: Scenario, data: FederatedData, code: Code, on_node: bool, draws_seeded: bool
) -> World:
    task, procedure = task_and_procedure(scenario, data)
    takes_part = _takes_part(scenario, data)
    devices, selected = _devices(scenario, takes_part, data.num_clients)
    clock = None if scenario.clock is None else ClockWork(scenario, data, selected, devices)
    at_once = selected.expected_cohort(data.num_clients) if clock is None else clock.at_once
    plan, found = planned(scenario, data, task, procedure, at_once)
    attack = attack_of(scenario.choices.get("attack"), data)
    app = make_app(scenario, data, plan, found)
    topology = _topology(scenario, data)
    cohort = takes_part.expected_cohort(data.num_clients)
    make_strategy = functools.partial(
        _make_strategy, scenario, topology, cohort, seeded=draws_seeded
    )
    strategy = make_strategy()
    model = task.build_model(scenario.seed)
    if is_import_path(str(scenario.task.get("model", ""))):
        task.require_repeatable(scenario.seed, model)
    left_out = check_last_batches(
        scenario, data.to_try, task, model, procedure, alone=plan.executor == "loop"
    )
    start = with_weights(model, scenario.task, on_node=on_node)
    check_tensors(scenario, procedure, start.known())
    check_watched(scenario, task, model, attack)
    check_minima(
        nested(strategy), selected, clients=data.num_clients, rounds=scenario.rounds,
        seed=scenario.seed, evaluating=min(scenario.evaluation.clients, data.num_clients),
    )  # fmt: skip
    check_model(strategy, start.layout)
    _introduce(strategy, scenario, data, takes_part, attack, task, start, clock)
    start.check_buffers()
    start.check_evaluation(scenario.evaluation)
    return World(
        scenario, data, selected, attack, topology, plan, strategy, app, start.layout,
        start.arrays(), devices, start.weights, start.kept(), start.personal,
        notes_of(scenario, data, takes_part, plan, found, left_out, code, start.personal_note()),
        make_strategy=make_strategy, code=code,
    )  # fmt: skip


def _data(scenario: Scenario, given: FederatedData | None) -> FederatedData:
    """The clients' data."""
    evaluation = scenario.evaluation
    if (evaluation.clients or evaluation.pooled) and not scenario.partition.get("test_fraction"):
        asked = f"clients = {evaluation.clients}" if evaluation.clients else "pooled = true"
        raise ScenarioError(
            f"[evaluation] {asked}: clients evaluate on their local test splits, and [partition] "
            "test_fraction = 0 leaves them none; set it above 0"
        )
    data = given
    if data is None:
        data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    check_where_data_lie(scenario, data)
    if scenario.partition.get("clients") is None:
        scenario.check_clients(data.num_clients)
    _check_batch(scenario, data)
    if scenario.evaluation.robust is not None and data.spec.vocabulary:
        raise ScenarioError(
            f'[evaluation] robust with [data] name = "{scenario.data["name"]}": samples are moved '
            "by numbers, and these features are tokens"
        )
    return data


def _check_batch(scenario: Scenario, data: FederatedData) -> None:
    """Refuse a batch that is almost all padding: every step would need memory for it."""
    batch = scenario.choices["client"].make().work.batch_size
    held = data.manifest["data"].get("samples")  # text where samples are made on demand
    if isinstance(held, int) and batch > max(held, _LARGE_BATCH):
        largest = data.manifest["sizes"]["max"]
        raise ScenarioError(
            f"[client] batch_size = {batch}: all clients together hold fewer samples; must be at "
            f"most {largest}, those of the largest client, to train on all of them in one step"
        )


def _takes_part(scenario: Scenario, data: FederatedData) -> Participation:
    """Who takes part when."""
    takes_part: Participation = scenario.choices["participation"].make()
    if takes_part.needs_labels:
        # every client's labels are counted: of generated data this makes all of them once
        takes_part.learn_labels(label_counts(data, whole=True).counts, seed=scenario.seed)
    return takes_part


def _devices(
    scenario: Scenario, takes_part: Participation, num_clients: int
) -> tuple[DeviceModel | None, Participation]:
    """The clients' devices, and who is selected: with over-selection, more than take part."""
    devices, keep = scenario.devices, None
    if devices is None:
        return None, takes_part
    if devices.over_select > 1:
        keep = takes_part.expected_cohort(num_clients)
        takes_part = takes_part.over_selected(devices.over_select)
    return DeviceModel(devices, seed=scenario.seed, keep=keep), takes_part


def _topology(scenario: Scenario, data: FederatedData) -> Topology | None:
    """The graph of a strategy that averages over one."""
    if (choice := scenario.choices.get("topology")) is None:
        return None
    topology: Topology = choice.make()
    topology.graph(data.num_clients, server_round=1, seed=scenario.seed)  # or refused here
    return topology


def _make_strategy(
    scenario: Scenario, topology: Topology | None, cohort: int, *, seeded: bool
) -> Strategy:
    draws: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if seeded:
        draws = seeded_draws(derived_seed(scenario.seed, "strategy"))
    with draws:
        made: Strategy = scenario.choices["strategy"].make(**{TOPOLOGY: topology, COHORT: cohort})
        return made


def _introduce(
    strategy: Strategy,
    scenario: Scenario,
    data: FederatedData,
    takes_part: Participation,
    attack: Attack | None,
    task: Task,
    start: StartModel,
    clock: ClockWork | None,
) -> None:
    """Tell a strategy, and those inside of it, what they may know of the federation.

    Raises:
        ScenarioError: If one of them cannot work with it.
    """
    clients = data.num_clients
    for each in nested(strategy):
        told = as_ours(each)
        start.check_sent(getattr(each, "sends", ()))
        told.declare_buffers([spec.name for spec in start.layout.buffers])
        told.declare_seed(scenario.seed)
        try:
            told.check(clients, takes_part.expected_cohort(clients))
        except ValueError as error:
            raise ScenarioError(f"[strategy] {error}") from None
        if attack is not None:
            told.declare_byzantine(functools.partial(_byzantine, attack, clients, scenario.seed))
        told.declare_starts(
            functools.partial(own_start, task, start.layout, scenario.seed, start.pretrained)
        )
        if isinstance(each, WantsRates):
            rates = clock.rates() if clock is not None else None
            rates = takes_part.rates(clients) if rates is None else rates
            if rates is not None:
                each.declare_rates(rates)


def _byzantine(attack: Attack, clients: int, seed: int, server_round: int | None) -> list[int]:
    """Who attacks in a round; for None, in any, but nobody where everybody may."""
    found: list[int] = attack.byzantine_clients(clients, seed, server_round).tolist()
    return [] if server_round is None and len(found) == clients else found
