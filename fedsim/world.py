"""From a scenario to the objects that run it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim import discovery, tasks
from fedsim.attacks import Attack
from fedsim.client_app import CohortApp
from fedsim.data import FederatedData, prepare
from fedsim.data.statistics import label_counts
from fedsim.errors import ScenarioError
from fedsim.executor import CohortExecutor
from fedsim.layout import Layout
from fedsim.participation import Participation
from fedsim.plan import ExecutionPlan, make_plan
from fedsim.records import array_record
from fedsim.rng import derived_seed
from fedsim.scenario import Scenario
from fedsim.strategy import FederatedStrategy
from fedsim.topology import Topology


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
        participation: Who takes part when.
        attack: What attackers do to their replies, or None.
        topology: The graph of a strategy that averages over one, or None.
        plan: How the run computes.
        strategy: What the server decides.
        app: What runs on the clients.
        layout: How the model's tensors lie in the flat vector.
        arrays: The initial model.
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


def build(scenario: Scenario) -> World:
    """Build everything; nothing runs yet.

    Raises:
        ScenarioError: If the parts do not fit each other.
        RunError: If the data cannot be had.
    """
    if scenario.evaluation.clients and not scenario.partition.get("test_fraction"):
        raise ScenarioError(
            f"[evaluation] clients = {scenario.evaluation.clients}: clients evaluate on their "
            "local "
            "test splits, and [partition] test_fraction = 0 leaves them none; set it above 0"
        )
    data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    task = _task(scenario.task, data)
    takes_part: Participation = discovery.make("participation", scenario.participation)
    if takes_part.needs_labels:
        # every client's labels are counted: of generated data this makes all of them once
        takes_part.learn_labels(label_counts(data, whole=True).counts, seed=scenario.seed)
    engine = scenario.engine
    if engine.device == "cuda":
        _require_cuda()
    plan = make_plan(
        task,
        spec=data.spec,
        expected_cohort=takes_part.expected_cohort(data.num_clients),
        executor=engine.executor,
        chunk_size=engine.chunk_size,
        device=engine.device,
        deterministic=engine.deterministic,
        evaluation_batch=scenario.evaluation.batch_size,
    )
    app = make_app(scenario, data, plan)
    topology: Topology | None = None
    if scenario.topology:
        topology = discovery.make("topologies", scenario.topology)
        topology.graph(data.num_clients, server_round=1, seed=scenario.seed)  # or refused here
    strategy = discovery.make_strategy(scenario.strategy, topology)
    model = task.build_model(scenario.seed)
    layout = Layout.from_model(model)
    if isinstance(strategy, FederatedStrategy):
        strategy.declare_buffers([spec.name for spec in layout.buffers])
        strategy.declare_seed(scenario.seed)
        try:
            strategy.check(data.num_clients, takes_part.expected_cohort(data.num_clients))
        except ValueError as error:
            raise ScenarioError(f"[strategy] {error}") from None
        strategy.declare_starts(functools.partial(_own_start, task, layout, scenario.seed))
    if isinstance(strategy, WantsRates):
        rates = takes_part.rates(data.num_clients)
        if rates is not None:
            strategy.declare_rates(rates)
    state = model.state_dict()
    arrays = array_record({name: state[name] for name in layout.names})
    attack = discovery.make("attacks", scenario.attack) if scenario.attack else None
    return World(scenario, data, takes_part, attack, topology, plan, strategy, app, layout, arrays)


def _own_start(task: tasks.Task, layout: Layout, seed: int, client: int) -> Tensor:
    """The model that a client would have initialised by itself, `[dim]`."""
    with torch.no_grad():
        return layout.flatten(
            task.build_model(derived_seed(seed, "own start", client)).state_dict()
        )


def make_app(scenario: Scenario, data: FederatedData, plan: ExecutionPlan) -> CohortApp:
    """Return the ClientApp of a scenario; it travels as a recipe, never with the data."""
    build_executor = functools.partial(
        make_executor, data, dict(scenario.task), dict(scenario.client), scenario.seed, plan
    )
    return CohortApp(build_executor, plan)


def make_executor(
    data: FederatedData,
    task: Mapping[str, Any],
    client: Mapping[str, Any],
    seed: int,
    plan: ExecutionPlan,
) -> CohortExecutor:
    """Return the executor of a process; `data` arrives as its recipe and opens the cache there."""
    return CohortExecutor(
        _task(task, data),
        discovery.make_procedure(client),
        data,
        seed=seed,
        kind=plan.executor,
        threads=plan.threads,
        device=plan.device,
        deterministic=plan.deterministic,
        evaluation_batch=plan.evaluation_batch,
    )


def _task(table: Mapping[str, Any], data: FederatedData) -> tasks.Task:
    return tasks.make_task(table, data.spec)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise ScenarioError(
            "[engine] device = 'cuda': torch sees no CUDA device here; allowed here: cpu"
        )
