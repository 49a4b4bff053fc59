"""Which metrics a run of a scenario records, so that nothing waits for one that never comes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.import_paths import is_import_path
from fedsim.basics.samples import SampleSpec
from fedsim.basics.tensors import tensors_of
from fedsim.client.batching.poison import Trigger
from fedsim.client.evaluation import Evaluation
from fedsim.client.robustness import at_radius
from fedsim.federation.attacks.attack import Attack
from fedsim.messages.failures import CAUSES
from fedsim.scenario.expectations import failed_by
from fedsim.scenario.scenario import Scenario
from fedsim.tasks.task import Task

_SPREAD = ("mean", "worst_decile", "variance", "undefined")  # `client_metrics.spread`'s
_EXTREMES = ("min", "max")  # of the nodes' own models
_OF_A_CLOCK = ("started", "outstanding", "staleness_mean", "staleness_max")
_PHASES_OF_TIME = ("configure", "train", "aggregate", "evaluate", "round")


def check_watched(scenario: Scenario, task: Task, model: nn.Module, attack: Attack | None) -> None:
    """Refuse a claim, or a metric to stop at, that no round of the scenario records.

    What the server and the clients' procedures report is known once they have: see `WatchHook` in
    `fedsim/runs/hooks.py`.

    Args:
        scenario: The scenario.
        task: Its task.
        model: A model of the task.
        attack: The scenario's attack.

    Raises:
        ScenarioError: With one line per metric, naming the nearest that is recorded.
    """
    if lines := unrecorded(scenario, list(watched(scenario)), task, model, attack):
        raise ScenarioError("\n".join(f"{scenario.origin}: {line}" for line in lines))


def unrecorded(
    scenario: Scenario,
    watched: Sequence[tuple[str, str]],
    task: Task,
    model: nn.Module,
    attack: Attack | None,
) -> list[str]:
    """Return a line for each metric that no round of a scenario records, with the nearest that is.

    Args:
        scenario: The scenario.
        watched: (who waits for it, the metric).
        task: The scenario's task.
        model: A model of the task.
        attack: The scenario's attack.
    """
    lines: list[str] = []
    if not watched:
        return lines
    names = _recorded(scenario, _measured(task, model), attack)
    if (own := _of_own_models(scenario, model)) is not None:
        measured = _measured(task, model)
        told = _personal([*measured, *_moved(scenario, measured), *own])
        names["personal"] = [f"personal/{name}" for name in told]
    for where, metric in watched:
        phase = metric.partition("/")[0]
        known = names.get(phase)
        if (why := _without_a_model(scenario, phase)) is not None:
            lines.append(f"{where} '{metric}' is never recorded {why}")
            continue
        if known is not None and metric not in known:
            what = unknown(metric, f"a metric that {phase} records here", known)
            lines.append(f"{where} {what}")
    return lines


def watched(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """Give (who waits for it, the metric) for each metric that a scenario asks for."""
    yield from (("[expect]", metric) for metric in scenario.expect)
    if (stop := scenario.evaluation.stop) is not None:
        yield "[evaluation] stop.metric", stop.metric
    if (best := scenario.evaluation.keep_best) is not None:
        yield "[evaluation] keep_best", best


def _recorded(
    scenario: Scenario, measured: list[str], attack: Attack | None
) -> dict[str, list[str]]:
    """The names by phase; a phase whose names are not known beforehand is left out."""
    clients = ["selected", "replied", "absent", "failed", *map(failed_by, CAUSES)]
    if scenario.devices is not None:
        clients += ["late", "partial"]
    if scenario.engine.on_failure == "retry":
        clients.append("retried")
    if attack is not None:
        clients += ["byzantine", "byzantine_beyond_f"]
    clock = [] if scenario.clock is None else list(_OF_A_CLOCK)
    traffic = ["downlink_bytes", "uplink_bytes"]
    if scenario.evaluation.clients:
        traffic += [f"evaluate_{name}" for name in traffic]
    found = {
        "test": [*measured, *(["attack_success"] if _shows_success(attack, measured) else [])],
        "pooled": measured,
        "nodes": [*measured, *_with(measured, _EXTREMES)],
        "clients": clients,
        "comm": traffic,
        "time": [f"{name}_s" for name in (*_PHASES_OF_TIME, *(["virtual"] if clock else []))],
        "clock": clock,
    }
    moved = found["robust"] = _moved(scenario, measured)
    if scenario.task.get("personal"):
        found["personal"] = _personal([*measured, *moved])
    if not is_import_path(scenario.strategy["name"]):  # which may name its means as it likes
        own = [*measured, *moved]
        found["local"] = [*own, *_with(own, _SPREAD)]
        if scenario.evaluation.finetune is not None:
            found["finetuned"] = found["local"]
    return {phase: [f"{phase}/{name}" for name in names] for phase, names in found.items()}


def _moved(scenario: Scenario, measured: list[str]) -> list[str]:
    """The metrics on moved samples."""
    robust = scenario.evaluation.robust
    radii = [] if robust is None else robust.radii
    return [at_radius(name, radius) for radius in radii for name in measured]


def _personal(measured: list[str]) -> list[str]:
    ends = _with(measured, ("worst_decile", "untrained"))
    return [*measured, *ends, "clients", "clients_untrained"]


def _of_own_models(scenario: Scenario, model: nn.Module) -> list[str] | None:
    """What is told of clients' own models beside their metrics; None where they have none."""
    procedure = scenario.choices["client"].make()
    if not procedure.has_own_model:
        return None
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return list(procedure.own_model(params, procedure.initial_state(params))[1])


def _without_a_model(scenario: Scenario, phase: str) -> str | None:
    """Why nothing of a phase is measured, for who has the models to measure; None if it is."""
    personal, name = scenario.task.get("personal"), "accuracy"
    own = personal or scenario.choices["client"].make().has_own_model
    if phase == "personal" and not own:
        return "without [task] personal or a part that trains a model of the client's own"
    if phase == "personal" and not scenario.evaluation.clients:
        return "with [evaluation] clients = 0: say how many clients evaluate"
    if phase in ("test", "pooled", "robust", "nodes") and personal:
        return (
            "with [task] personal: the server has no whole model that it could measure; say "
            f'"personal/{name}" or "local/{name}_mean", with [evaluation] clients = K'
        )
    if phase in ("test", "robust", "nodes") and has_no_test(scenario):
        return "without [data] test: the server has no test set of its own; name its file there"
    return None


def has_no_test(scenario: Scenario) -> bool:
    """Return whether the server has no samples to test on: sites have theirs, and it need not."""
    return scenario.data.get("name") == "sites" and scenario.data.get("test") is None


def _shows_success(attack: Attack | None, measured: list[str]) -> bool:
    """Whether the success of a backdoor is measured, which takes the accuracy."""
    return attack is not None and isinstance(attack.effect, Trigger) and "accuracy" in measured


def _with(names: list[str], endings: tuple[str, ...]) -> list[str]:
    return [f"{name}_{ending}" for name in names for ending in endings]


def _measured(task: Task, model: nn.Module) -> list[str]:
    """The task's metrics, which have the same names whatever the samples: here, of none."""
    features, targets = _nothing(task.spec, task.dtype)
    state = tensors_of(model)
    rows = torch.zeros(0, dtype=torch.int64)
    was_training = model.training
    try:
        with torch.no_grad():
            evaluation = Evaluation(model.eval(), task, batch=1)
            return list(evaluation.one(state, (features, targets), rows))
    finally:
        model.train(was_training)


def _nothing(spec: SampleSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and targets of no sample."""
    kind = torch.int64 if spec.vocabulary else dtype
    features = torch.zeros((0, *spec.feature_shape), dtype=kind)
    if spec.has_classes:
        return features, torch.zeros(0, dtype=torch.int64)
    return features, torch.zeros((0, *spec.target_shape), dtype=dtype)
