"""From a scenario to the objects that run it."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedsim.basics import kernels_in_use
from fedsim.basics.errors import ScenarioError, is_too_large, largest_number
from fedsim.basics.generators import seeded as seeded_draws
from fedsim.basics.import_paths import of_main
from fedsim.basics.project import SentProject
from fedsim.basics.rng import derived_seed
from fedsim.basics.sources import NO_CODE, Code
from fedsim.basics.tensors import tensors_of
from fedsim.client.batching.augmentation import augmentation_of
from fedsim.client.batching.poison import Poison
from fedsim.client.executor import CohortExecutor
from fedsim.client.job import ExecutorKind
from fedsim.client.plan import ExecutionPlan, make_plan
from fedsim.client.procedure import ClientProcedure, stacks
from fedsim.client.trial import Findings, try_out
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
from fedsim.messages.records import array_record
from fedsim.runs.certain_failures import check_last_batches
from fedsim.runs.client_settings import ClientSettings
from fedsim.scenario import discovery
from fedsim.scenario.idle_keys import idle_keys
from fedsim.scenario.recorded_metrics import check_watched
from fedsim.scenario.scenario import Scenario
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.flower import check_model
from fedsim.strategy.foreign import nested
from fedsim.tasks import named as tasks
from fedsim.tasks.models.pretrained import Pretrained

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
        layout: How the model's tensors lie in the flat vector.
        arrays: The initial model.
        devices: What happens to selected clients inside a round, or None.
        weights: What the manifest says of the weights that the model starts from, or None.
        kept: Tensors of the model that no round changes on the server.
        notes: What a user should know of it before it runs, in lines.
        make_strategy: Makes the strategy once more, as another process would.
        code: The files behind what is named by import path, as they were imported.
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
    notes: tuple[str, ...] = ()
    make_strategy: Callable[[], Strategy] = field(kw_only=True)
    code: Code = NO_CODE


def build(scenario: Scenario, *, on_node: bool = False, draws_seeded: bool = False) -> World:
    """Build everything; nothing runs yet.

    Args:
        scenario: What to build.
        on_node: Whether only the clients' side is wanted: the model then starts from its
            initialisation, for the weights come with the server's first message.
        draws_seeded: Whether what a strategy draws when it is made, from the process's generators,
            is the seed's; in a deployment it is the operating system's, as all privacy noise.

    Raises:
        ScenarioError: If the parts do not fit each other, or into memory.
        RunError: If the data cannot be had.
    """
    try:
        return _build(scenario, on_node, draws_seeded)
    except (MemoryError, OverflowError, ValueError) as error:
        if not is_too_large(error):
            raise
        largest = largest_number({**scenario.resolved(), "engine": {}})
        raise ScenarioError(f"{largest}: is too large: {error}") from error


def _build(scenario: Scenario, on_node: bool, draws_seeded: bool) -> World:
    scenario.open_folders()
    code = scenario.code
    kernels_in_use.keep(scenario.engine.bits)
    evaluation = scenario.evaluation
    if (evaluation.clients or evaluation.pooled) and not scenario.partition.get("test_fraction"):
        asked = f"clients = {evaluation.clients}" if evaluation.clients else "pooled = true"
        raise ScenarioError(
            f"[evaluation] {asked}: clients evaluate on their local test splits, and [partition] "
            "test_fraction = 0 leaves them none; set it above 0"
        )
    data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    if scenario.partition.get("clients") is None:
        scenario.check_clients(data.num_clients)
    _check_batch(scenario, data)
    task = _task(scenario.task, data, scenario.data["name"])
    augmentation_of(scenario.task.get("augment"), data.spec)  # or refused here
    procedure = discovery.make_procedure(scenario.client)
    needs = procedure.needs_classes
    if needs and not data.spec.has_classes:
        raise ScenarioError(
            f'[client] {needs} with [data] name = "{scenario.data["name"]}": needs targets that '
            "are classes, and these are numbers"
        )
    takes_part: Participation = discovery.make("participation", scenario.participation)
    if takes_part.needs_labels:
        # every client's labels are counted: of generated data this makes all of them once
        takes_part.learn_labels(label_counts(data, whole=True).counts, seed=scenario.seed)
    devices, selected = _devices(scenario, takes_part, data.num_clients)
    engine = scenario.engine
    if engine.device == "cuda":
        _require_cuda()
    plan = make_plan(
        task,
        spec=data.spec,
        expected_cohort=selected.expected_cohort(data.num_clients),
        executor=engine.executor,
        stacks=stacks(procedure),
        chunk_size=engine.chunk_size,
        device=engine.device,
        deterministic=engine.deterministic,
        threads=engine.threads,
        evaluation_batch=scenario.evaluation.batch_size,
        bits=engine.bits,
        tried=bool(_owned(scenario)),
    )
    plan, found = _tried(scenario, data, procedure, plan)
    attack = _attack_of(scenario.attack, data)
    app = make_app(scenario, data, plan, found)
    topology: Topology | None = None
    if scenario.topology:
        topology = discovery.make("topologies", scenario.topology)
        topology.graph(data.num_clients, server_round=1, seed=scenario.seed)  # or refused here
    cohort = takes_part.expected_cohort(data.num_clients)
    make_strategy = functools.partial(
        _make_strategy, scenario, topology, cohort, seeded=draws_seeded
    )
    strategy = make_strategy()
    model = task.build_model(scenario.seed)
    left_out = check_last_batches(scenario, data, task, model, procedure)
    layout = Layout.from_model(model)
    options = tasks.options_of(scenario.task)
    pretrained, weights = None, None
    if options.weights is not None and not on_node:
        pretrained = Pretrained(options.weights, strict=options.strict_weights)
        weights = pretrained.put_into(model)
    check_watched(scenario, task, model, attack)
    check_minima(
        nested(strategy), selected, clients=data.num_clients, rounds=scenario.rounds,
        seed=scenario.seed, evaluating=min(evaluation.clients, data.num_clients),
    )  # fmt: skip
    check_model(strategy, layout)
    for each in nested(strategy):
        if isinstance(each, FederatedStrategy):
            each.declare_buffers([spec.name for spec in layout.buffers])
            each.declare_seed(scenario.seed)
            try:
                each.check(data.num_clients, cohort)
            except ValueError as error:
                raise ScenarioError(f"[strategy] {error}") from None
            if attack is not None:
                each.declare_byzantine(
                    functools.partial(_byzantine, attack, data.num_clients, scenario.seed)
                )
            each.declare_starts(
                functools.partial(_own_start, task, layout, scenario.seed, pretrained)
            )
        if isinstance(each, WantsRates):
            rates = takes_part.rates(data.num_clients)
            if rates is not None:
                each.declare_rates(rates)
    _check_buffers(options, model)
    state = tensors_of(model)
    arrays = array_record({name: state[name] for name in layout.names})
    return World(
        scenario, data, selected, attack, topology, plan, strategy, app, layout, arrays, devices,
        weights, _kept(layout, model, options),
        _notes(scenario, data, takes_part, plan, found, left_out, code),
        make_strategy=make_strategy, code=code,
    )  # fmt: skip


def _make_strategy(
    scenario: Scenario, topology: Topology | None, cohort: int, *, seeded: bool
) -> Strategy:
    draws: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if seeded:
        draws = seeded_draws(derived_seed(scenario.seed, "strategy"))
    with draws:
        return discovery.make_strategy(scenario.strategy, topology, cohort=cohort)


def _notes(
    scenario: Scenario,
    data: FederatedData,
    takes_part: Participation,
    plan: ExecutionPlan,
    found: Findings | None,
    left_out: str | None,
    code: Code,
) -> tuple[str, ...]:
    dropped = data.manifest.get("dropped", {"samples": 0})
    notes = [
        *data.said,
        f"[partition] {dropped['samples']} samples belong to no client: {dropped['reason']}"
        if dropped["samples"]
        else None,
        left_out,
        takes_part.note(data.num_clients),
        f"clients train one after another: {plan.reason}" if plan.executor == "loop" else None,
        *(found.notes if found is not None else ()),
        *kernels_in_use.notes(plan.bits),
        _beyond_portable(scenario),
        *idle_keys(scenario),
        _not_followed(code),
    ]
    return tuple(note for note in notes if note is not None)


def _not_followed(code: Code) -> str | None:
    """Say which code of the user's own a later run cannot be held against."""
    if not code.unfollowed:
        return None
    return (
        f"code that decides the result and cannot be followed: {'; '.join(code.unfollowed)}; when "
        "it changes, nobody notices"
    )


def _beyond_portable(scenario: Scenario) -> str | None:
    """Say what the promise of portable bits does not reach."""
    if scenario.engine.bits == scenario.promise:
        return None
    if scenario.engine.device != "cpu":
        return (
            "[engine] bits = 'portable' is about processors: a GPU computes, so the bits are those "
            "of its kind, of torch and of CUDA"
        )
    return (
        f"[engine] bits = 'portable' holds for {', '.join(scenario.own_code)} as far as it "
        "computes with torch and NumPy; kernels of its own are not pinned"
    )


def _check_batch(scenario: Scenario, data: FederatedData) -> None:
    """Refuse a batch that is almost all padding: every step would need memory for it."""
    batch = discovery.make_procedure(scenario.client).work.batch_size
    held = data.manifest["data"].get("samples")  # text where samples are made on demand
    if isinstance(held, int) and batch > max(held, _LARGE_BATCH):
        largest = data.manifest["sizes"]["max"]
        raise ScenarioError(
            f"[client] batch_size = {batch}: all clients together hold fewer samples; must be at "
            f"most {largest}, those of the largest client, to train on all of them in one step"
        )


def _check_buffers(options: tasks.TaskOptions, model: nn.Module) -> None:
    """Refuse a policy for statistics that the model does not have."""
    if options.buffers != "average" and not any(True for _ in model.buffers()):
        raise ScenarioError(
            f"[task] buffers = '{options.buffers}': the model has no statistics, as BatchNorm "
            "keeps them, that it could be about; leave it out"
        )


def _kept(layout: Layout, model: nn.Module, options: tasks.TaskOptions) -> tuple[str, ...]:
    """The tensors that no round changes on the server."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    average = options.buffers == "average"
    return tuple(s.name for s in layout.buffers if not average or s.name in parameters)


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


def _own_start(
    task: tasks.Task, layout: Layout, seed: int, pretrained: Pretrained | None, client: int
) -> Tensor:
    """The model that a client would have initialised by itself, `[dim]`."""
    model = task.build_model(derived_seed(seed, "own start", client))
    if pretrained is not None:
        pretrained.put_into(model)
    with torch.no_grad():
        return layout.flatten(tensors_of(model))


def make_app(
    scenario: Scenario, data: FederatedData, plan: ExecutionPlan, found: Findings | None = None
) -> CohortApp:
    """Return the ClientApp of a scenario; it travels as a recipe, never with the data.

    Args:
        scenario: The scenario.
        data: The clients' data.
        plan: The run's execution plan.
        found: What a trial of the user's code has found; None where none is in it.
    """
    options = {} if found is None else {"puts_back": True, "seeds_dropout": found.seeds_dropout}
    # the first to be unpickled: what comes after it may name the project's modules
    paths = scenario.import_paths
    own = SentProject(scenario.folders if paths else None, of_main(paths))
    build_executor = functools.partial(
        make_executor, own, data, dict(scenario.task), dict(scenario.client), scenario.seed, plan,
        dict(scenario.attack), **options,
    )  # fmt: skip
    return CohortApp(build_executor, plan)


def make_executor(
    own: SentProject,
    data: FederatedData,
    task: Mapping[str, Any],
    client: Mapping[str, Any],
    seed: int,
    plan: ExecutionPlan,
    attack: Mapping[str, Any] | None = None,
    **options: bool,
) -> CohortExecutor:
    """Return the executor of a process; `data` arrives as its recipe and opens the cache there.

    Args:
        own: Opened the project's folders when it arrived in this process.
        data: The clients' data.
        task: The scenario's table, as are `client` and `attack`.
        client: What runs on clients.
        seed: The scenario's seed.
        plan: How the run computes.
        attack: Who attacks, or None.
        **options: The executor's, for code of the user's own.

    Raises:
        ScenarioError: If the process cannot keep the plan's promise about bits.
    """
    own.open()
    kernels_in_use.keep(plan.bits)
    procedure = discovery.make_procedure(client)
    poison = _poison(_attack_of(attack, data), data, seed)
    given: dict[str, Any] = {"poison": poison, "settings": ClientSettings(client)}
    return _executor(data, task, seed, plan, CohortExecutor, procedure, data, **given, **options)


def _executor(
    data: FederatedData,
    task: Mapping[str, Any],
    seed: int,
    plan: ExecutionPlan,
    made_of: type[CohortExecutor],
    procedure: ClientProcedure,
    seen: Any,
    *,
    wide: bool = False,
    **options: Any,
) -> CohortExecutor:
    """An executor of some class, which sees the data or a part of them, perhaps in float64."""
    if wide:
        task = {**task, "dtype": "float64"}
    settings: dict[str, Any] = {"kind": plan.executor, **options}
    return made_of(
        _task(task, data),
        procedure,
        seen,
        seed=seed,
        threads=plan.threads,
        device=plan.device,
        deterministic=plan.deterministic,
        evaluation_batch=plan.evaluation_batch,
        augmentation=augmentation_of(task.get("augment"), data.spec),
        buffers=tasks.options_of(task).buffers,
        **settings,
    )


def _owned(scenario: Scenario) -> list[str]:
    """What trains and is the user's."""
    return [each for each in scenario.own_code if each.startswith(("[task]", "[client]"))]


def _tried(
    scenario: Scenario, data: FederatedData, procedure: ClientProcedure, plan: ExecutionPlan
) -> tuple[ExecutionPlan, Findings | None]:
    """The plan as a trial of the user's model, task and procedure leaves it, and what was found.

    Raises:
        ScenarioError: If they cannot be trained, or not by the executor that was asked for.
    """
    owned = _owned(scenario)
    if not owned:
        return plan, None
    kinds: tuple[ExecutorKind, ...] = (plan.executor,)
    asked = scenario.engine.executor
    if plan.executor == "batched" and asked == "auto":
        kinds = ("batched", "vmap")
    make = functools.partial(_executor, data, scenario.task, scenario.seed, plan)
    found = try_out(make, procedure, data, kinds, owned=", ".join(owned))
    if asked == plan.executor != found.kind:
        raise ScenarioError(
            f"[engine] executor = '{asked}': {found.reason}; use executor = 'auto' or 'loop'"
        )
    return replace(plan, executor=found.kind, reason=found.reason or plan.reason), found


def _attack_of(table: Mapping[str, Any] | None, data: FederatedData) -> Attack | None:
    """Return the attack of a table [attack].

    Raises:
        ScenarioError: If the samples are none that can be attacked so.
    """
    if not table:
        return None
    attack: Attack = discovery.make("attacks", table)
    try:
        if attack.effect is not None:
            attack.effect.check(data.spec)
    except ValueError as error:
        raise ScenarioError(f"[attack] {error}") from None
    return attack


def _byzantine(attack: Attack, clients: int, seed: int, server_round: int | None) -> list[int]:
    """Who attacks in a round; for None, in any, but nobody where everybody may."""
    found: list[int] = attack.byzantine_clients(clients, seed, server_round).tolist()
    return [] if server_round is None and len(found) == clients else found


def _poison(attack: Attack | None, data: FederatedData, seed: int) -> Poison | None:
    """What attackers do to their samples."""
    if attack is None or attack.effect is None:
        return None

    @functools.lru_cache(maxsize=4)
    def attackers(server_round: int) -> frozenset[int]:
        chosen = attack.byzantine_clients(data.num_clients, seed, server_round)
        return frozenset(chosen.tolist())

    return Poison(attack.effect, attackers, data.spec, seed)


def _task(table: Mapping[str, Any], data: FederatedData, name: str | None = None) -> tasks.Task:
    return tasks.make_task(table, data.spec, data=name)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise ScenarioError(
            "[engine] device = 'cuda': torch sees no CUDA device here; allowed here: cpu"
        )
