"""The clients' side of a scenario: what is learnt and how, on a node and in every worker."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fedsim.basics import kernels_in_use
from fedsim.basics.errors import ScenarioError
from fedsim.basics.import_paths import of_main
from fedsim.basics.sent_project import SentProject
from fedsim.client.batching.augmentation import augmentation_of
from fedsim.client.batching.poison import Poison
from fedsim.client.executor import CohortExecutor
from fedsim.client.finetuning import FineTuning
from fedsim.client.gradients import last_linear
from fedsim.client.job import ExecutorKind
from fedsim.client.names import ModelTensors
from fedsim.client.overriding import stacks
from fedsim.client.plan import ExecutionPlan, make_plan
from fedsim.client.procedure import ClientProcedure
from fedsim.client.robustness import RobustEvaluation
from fedsim.client.trial import Findings, try_out
from fedsim.data.federated import FederatedData
from fedsim.engine.client_app import CohortApp
from fedsim.federation.attacks.attack import Attack
from fedsim.runs.client_settings import ClientSettings
from fedsim.runs.start_model import personal_start
from fedsim.scenario.choice import Choice
from fedsim.scenario.scenario import Scenario
from fedsim.scenario.tables import Finetune
from fedsim.tasks import named as tasks


def task_and_procedure(
    scenario: Scenario, data: FederatedData
) -> tuple[tasks.Task, ClientProcedure]:
    """Return what clients learn, and how.

    Args:
        scenario: The scenario.
        data: The clients' data.

    Raises:
        ScenarioError: If the data are none that can be learnt so.
    """
    task = task_of(scenario.task, data, scenario.data["name"])
    augmentation_of(scenario.task.get("augment"), data.spec)  # or refused here
    procedure: ClientProcedure = scenario.choices["client"].make()
    needs = procedure.needs_classes
    if needs and not data.spec.has_classes:
        raise ScenarioError(
            f'[client] {needs} with [data] name = "{scenario.data["name"]}": needs targets that '
            "are classes, and these are numbers"
        )
    needs = procedure.needs_numbers
    if needs and data.spec.vocabulary:
        raise ScenarioError(
            f'[client] {needs} with [data] name = "{scenario.data["name"]}": needs features that '
            "are numbers, and these are tokens"
        )
    needs = procedure.needs_representations
    if needs and last_linear(model := task.build_model(scenario.seed)) is None:
        *_, (name, last) = model.named_modules()
        raise ScenarioError(
            f'[client] {needs} with [task] model = "{scenario.task["model"]}": needs a model '
            f"whose last module is a Linear layer, and its last is {type(last).__name__} '{name}'"
        )
    return task, procedure


def planned(
    scenario: Scenario,
    data: FederatedData,
    task: tasks.Task,
    procedure: ClientProcedure,
    expected_cohort: int,
) -> tuple[ExecutionPlan, Findings | None]:
    """Return how a run computes, and what a trial of the user's code has found; None without any.

    Args:
        scenario: The scenario.
        data: The clients' data.
        task: What clients learn.
        procedure: How.
        expected_cohort: Clients per round.

    Raises:
        ScenarioError: If this machine, or what is the user's own, cannot compute so.
    """
    engine = scenario.engine
    if engine.device == "cuda":
        _require_cuda()
    plan = make_plan(
        task,
        spec=data.spec,
        expected_cohort=expected_cohort,
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
    return _tried(scenario, data, procedure, plan)


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
    options: dict[str, Any] = {}
    if found is not None:
        options |= {"puts_back": True, "seeds_dropout": found.seeds_dropout}
    if (adversary := robust_evaluation(scenario)) is not None:
        options["adversary"] = adversary
    # the first to be unpickled: what comes after it may name the project's modules
    paths = scenario.import_paths
    own = SentProject(scenario.folders if paths else None, of_main(paths))
    build_executor = functools.partial(
        make_executor, own, data, dict(scenario.task), scenario.choices["client"], scenario.seed,
        plan, scenario.choices.get("attack"), scenario.evaluation.finetune, **options,
    )  # fmt: skip
    return CohortApp(build_executor, plan)


def make_executor(
    own: SentProject,
    data: FederatedData,
    task: Mapping[str, Any],
    client: Choice,
    seed: int,
    plan: ExecutionPlan,
    attack: Choice | None = None,
    finetune: Finetune | None = None,
    **options: Any,
) -> CohortExecutor:
    """Return the executor of a process; `data` arrives as its recipe and opens the cache there.

    Args:
        own: Opened the project's folders when it arrived in this process.
        data: The clients' data.
        task: The scenario's table.
        client: What runs on clients; where it comes from another process it is looked up here.
        seed: The scenario's seed.
        plan: How the run computes.
        attack: Who attacks, or None.
        finetune: How clients train what they receive before they evaluate it once more, or None.
        **options: The executor's, for code of the user's own and robust evaluation.

    Raises:
        ScenarioError: If the process cannot keep the plan's promise about bits.
    """
    own.open()
    kernels_in_use.keep(plan.bits)
    procedure: ClientProcedure = client.make()
    poison = _poison(attack_of(attack, data), data, seed)
    given: dict[str, Any] = {"poison": poison, "settings": ClientSettings(client)}
    if finetune is not None:
        given["finetuning"] = fine_tuning(finetune, procedure)
    return _executor(data, task, seed, plan, CohortExecutor, procedure, data, **given, **options)


def fine_tuning(table: Finetune, procedure: ClientProcedure) -> FineTuning:
    """Return how clients of a procedure train what they receive before they evaluate it again."""
    return FineTuning(table.lr, table.epochs, procedure.work, table.tensors)


def check_tensors(scenario: Scenario, procedure: ClientProcedure, tensors: ModelTensors) -> None:
    """Refuse what names tensors that the model does not have, or leaves nothing to train.

    Args:
        scenario: The scenario.
        procedure: Its client procedure.
        tensors: What is known of its model.

    Raises:
        ScenarioError: Naming the key.
    """
    procedure.for_model(tensors)
    if (table := scenario.evaluation.finetune) is not None:
        fine_tuning(table, procedure).for_model(tensors)


def robust_evaluation(scenario: Scenario) -> RobustEvaluation | None:
    """Return how samples that models are measured on are moved; None where they are not."""
    table = scenario.evaluation.robust
    if table is None:
        return None
    box = None if table.box is None else (table.box[0], table.box[1])
    return RobustEvaluation(**{**table.model_dump(), "radii": tuple(table.radii), "box": box})


def attack_of(choice: Choice | None, data: FederatedData) -> Attack | None:
    """Return the attack that a table [attack] names, or None without one.

    Raises:
        ScenarioError: If the samples are none that can be attacked so.
    """
    if choice is None:
        return None
    attack: Attack = choice.make()
    try:
        if attack.effect is not None:
            attack.effect.check(data.spec)
    except ValueError as error:
        raise ScenarioError(f"[attack] {error}") from None
    return attack


def task_of(table: Mapping[str, Any], data: FederatedData, name: str | None = None) -> tasks.Task:
    """Return the task of a table [task] over the data, which messages call by `name`."""
    return tasks.make_task(table, data.spec, data=name)


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
    learnt = task_of(task, data)
    return made_of(
        learnt,
        procedure,
        seen,
        seed=seed,
        threads=plan.threads,
        device=plan.device,
        deterministic=plan.deterministic,
        evaluation_batch=plan.evaluation_batch,
        augmentation=augmentation_of(task.get("augment"), data.spec),
        buffers=tasks.options_of(task).buffers,
        personal=personal_start(learnt, task, seed),
        **settings,
    )


def _owned(scenario: Scenario) -> list[str]:
    """What trains and is the user's."""
    return [each for each in scenario.own_code if each.startswith(("[task]", "[client"))]


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
    asked, data = scenario.engine.executor, data.to_try
    if plan.executor == "batched" and asked == "auto":
        kinds = ("batched", "vmap")
    make = functools.partial(_executor, data, scenario.task, scenario.seed, plan)
    found = try_out(make, procedure, data, kinds, owned=", ".join(owned))
    if asked == plan.executor != found.kind:
        raise ScenarioError(
            f"[engine] executor = '{asked}': {found.reason}; use executor = 'auto' or 'loop'"
        )
    return replace(plan, executor=found.kind, reason=found.reason or plan.reason), found


def _poison(attack: Attack | None, data: FederatedData, seed: int) -> Poison | None:
    """What attackers do to their samples."""
    if attack is None or attack.effect is None:
        return None

    @functools.lru_cache(maxsize=4)
    def attackers(server_round: int) -> frozenset[int]:
        chosen = attack.byzantine_clients(data.num_clients, seed, server_round)
        return frozenset(chosen.tolist())

    return Poison(attack.effect, attackers, data.spec, seed)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise ScenarioError("[engine] device = 'cuda': torch sees no CUDA device here; use 'cpu'")
