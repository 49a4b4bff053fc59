"""What tables of a scenario may not be together."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from fedsim.basics.errors import (
    ScenarioError,
    nearest,
)
from fedsim.basics.import_paths import is_import_path
from fedsim.federation.deployment_table import WhoMustBeThere
from fedsim.federation.device_table import Devices
from fedsim.scenario import discovery
from fedsim.scenario.choice import Choice
from fedsim.scenario.clock_combinations import check_clock, check_jobs
from fedsim.scenario.expectations import METRIC_PHASES, MODEL_PHASES, Expectation
from fedsim.scenario.problems import ScenarioProblems
from fedsim.scenario.tables import (
    EvaluationTable,
)
from fedsim.strategy.flower import COHORT

_NOT_QUALITIES = ("_variance", "_undefined", "_untrained", "attack_success", "clients")
# data sets whose clients are generated one by one
_MADE_ON_DEMAND = ("synthetic", "zipf", "brittle")


def check_clients(
    problems: ScenarioProblems,
    choices: Mapping[str, Choice],
    fixed: Mapping[str, Any],
    clients: int,
) -> None:
    """Refuse what so many clients cannot do.

    Args:
        problems: Where problems go.
        choices: What the scenario's tables name, by table.
        fixed: Its tables with fixed keys.
        clients: Clients registered.
    """
    engine, evaluation = fixed["engine"], fixed["evaluation"]
    if evaluation is not None and evaluation.clients > clients:
        problems.add(
            f"[evaluation] clients = {evaluation.clients} with {clients} clients: at most "
            f"{clients} can evaluate"
        )
    for name in ("attack", "topology"):
        if choice := choices.get(name):
            problems.attempt(functools.partial(_check_made, choice, clients))
    if (participation := choices.get("participation")) is None:
        return
    expected = problems.attempt(lambda: int(participation.make().expected_cohort(clients)))
    if (devices := fixed["devices"]) is not None and devices.over_select > 1:
        problems.attempt(lambda: _check_over_selection(devices, participation, clients))
    check_jobs(problems, fixed["clock"], clients, expected)
    if (there := fixed["deployment"]) is not None:
        has_own_sites = "data" in choices and choices["data"].name == "sites"
        for why in _cannot_be_there(there, clients, has_own_sites=has_own_sites):
            problems.add(f"[deployment] {why}")
    strategy = choices.get("strategy")
    if strategy is not None and expected is not None and strategy.takes(COHORT):
        problems.attempt(lambda: strategy.make(expected_cohort=expected), where="[strategy] ")
    cohort = participation.table.get("cohort_size", clients)
    if engine is not None and engine.min_replies > cohort:
        problems.add(
            f"[engine] min_replies = {engine.min_replies}: a round has at most {cohort} replies"
        )


def _cannot_be_there(there: WhoMustBeThere, clients: int, *, has_own_sites: bool) -> Iterator[str]:
    """Say which sites cannot be required, or do without."""
    for client in there.required:
        if not 0 <= client < clients:
            yield f"required: client {client} does not exist; must be 0 to {clients - 1}"
    if there.min_sites is None:
        return
    if there.min_sites > clients:
        yield f"min_sites = {there.min_sites}: must be 1 to {clients}, how many there are"
    elif there.min_sites < clients and has_own_sites:
        yield (
            f'min_sites = {there.min_sites}: with [data] name = "sites" all {clients} must be '
            "there before round 1, for they agree on what their data are"
        )


def check_metric(problems: ScenarioProblems, metric: str, *, where: str) -> None:
    """Refuse a name that no metric of any run can have."""
    phase, _, name = metric.partition("/")
    if phase not in METRIC_PHASES or not name:
        guess = nearest(phase, METRIC_PHASES)
        hint = f"did you mean '{guess}/{name or 'loss'}'? " if guess and guess != phase else ""
        problems.add(
            f"{where} '{metric}' is not a metric that a run records; {hint}metrics are "
            f"phase/name with a phase of {', '.join(METRIC_PHASES)}"
        )


def check_combinations(
    problems: ScenarioProblems, choices: Mapping[str, Choice], fixed: Mapping[str, Any]
) -> None:
    """Refuse what each table allows and all together do not."""
    engine, evaluation = fixed["engine"], fixed["evaluation"]
    if engine is not None and engine.chunk_size is not None and engine.chunk_size < 2:
        problems.add(
            f"[engine] chunk_size = {engine.chunk_size}: must be at least 2 (a client that is "
            "computed alone takes other kernels and so gets other bits)"
        )
    check_clock(problems, choices, fixed)
    _check_sent(problems, choices.get("strategy"), choices.get("client"))
    _check_compression(problems, choices)
    data, partition = choices.get("data"), choices.get("partition")
    if data is None or partition is None:
        return
    if data.name in _MADE_ON_DEMAND and partition.name != "natural":
        problems.add(
            f'[partition] kind = "{partition.name}" with [data] name = "{data.name}": its clients '
            'are generated one by one and nothing is there to split; use kind = "natural"'
        )
    if evaluation is not None and evaluation.per_client and not evaluation.clients:
        problems.add(
            "[evaluation] per_client = true with [evaluation] clients = 0: say how many clients "
            "evaluate"
        )
    if evaluation is not None and evaluation.finetune is not None and not evaluation.clients:
        problems.add(
            "[evaluation] finetune with [evaluation] clients = 0: say how many clients fine-tune "
            "the model and evaluate it"
        )
    if (clients := partition.table.get("clients")) is not None:
        check_clients(problems, choices, fixed, clients)


def _check_sent(problems: ScenarioProblems, strategy: Choice | None, client: Choice | None) -> None:
    """Refuse a client procedure that does not use what the strategy sends."""
    if strategy is None or client is None:
        return
    _check_needed(problems, strategy, client)
    taken = client.make().takes
    for name in getattr(strategy.factory, "sends", ()):
        if name not in taken:
            fit = [f"the part {part}" for part in _parts_that_take(name)]
            problems.add(
                f'[client] name = "{client.name}": does not use the {name} that [strategy] name '
                f'= "{strategy.name}" sends; use one that takes parts, with {", ".join(fit)}'
            )


def _check_compression(problems: ScenarioProblems, choices: Mapping[str, Choice]) -> None:
    """Refuse compressed replies where what is lost does not cancel out, or is not what is sent."""
    client, strategy, attack = (choices.get(name) for name in ("client", "strategy", "attack"))
    if client is None:
        return
    for part in client.parts:
        if not getattr(part.factory, "compresses", False):
            continue
        if strategy is not None and not getattr(strategy.factory, "linear", False):
            known: dict[str, Any] = {
                each: discovery.strategy_factory(each) for each in discovery.names("strategies")
            }
            fit = [each for each, factory in known.items() if factory.linear]
            problems.add(
                f"[client.parts] {part.name}: compresses updates, and [strategy] name = "
                f'"{strategy.name}" is no rule that is linear in them, so that the errors of '
                f"compression would not cancel out; allowed: {', '.join(fit)}"
            )
        made = None if attack is None else problems.attempt(attack.make)
        if attack is not None and made is not None and made.forge is not None:
            problems.add(
                f"[client.parts] {part.name}: compresses updates, and [attack] kind = "
                f'"{attack.name}" replaces them by others, which no client compresses; leave one '
                "of them out, or take an attack on data"
            )


def _check_needed(problems: ScenarioProblems, strategy: Choice, client: Choice) -> None:
    """Refuse a part that waits for what the strategy does not send."""
    sends = getattr(strategy.factory, "sends", ())
    for part in client.parts:
        for name in getattr(part.factory, "needs", ()):
            if name not in sends:
                known: dict[str, Any] = {
                    each: discovery.strategy_factory(each) for each in discovery.names("strategies")
                }
                fit = [each for each, factory in known.items() if name in factory.sends]
                problems.add(
                    f"[client.parts] {part.name}: needs the {name} that a strategy sends, and "
                    f'[strategy] name = "{strategy.name}" sends none; allowed: {", ".join(fit)}'
                )


def _parts_that_take(name: str) -> list[str]:
    known: dict[str, Any] = {
        part: discovery.part_factory(part) for part in discovery.names("parts")
    }
    return [part for part, factory in known.items() if name in factory.takes]


def check_claims(
    problems: ScenarioProblems,
    expect: Mapping[str, Expectation],
    evaluation: EvaluationTable | None,
    strategy: Choice | None,
) -> None:
    """Refuse what waits for a metric that this scenario never records."""
    if evaluation is None:
        return
    name = None if strategy is None else strategy.name
    has_nodes = (
        strategy is None or is_import_path(strategy.name) or strategy.takes(discovery.TOPOLOGY)
    )
    watched = [("[expect]", metric) for metric in expect]
    if evaluation.stop is not None:
        watched.append(("[evaluation] stop.metric", evaluation.stop.metric))
        check_metric(problems, evaluation.stop.metric, where="[evaluation] stop.metric")
    if evaluation.keep_best is not None:
        watched.append(("[evaluation] keep_best", evaluation.keep_best))
        _check_tells_models_apart(problems, evaluation.keep_best)
    for where, metric in watched:
        if metric.startswith("local/") and not evaluation.clients:
            problems.add(
                f"{where} '{metric}' is never recorded with [evaluation] clients = 0: say how many "
                "clients evaluate"
            )
        if metric.startswith("finetuned/") and evaluation.finetune is None:
            problems.add(
                f"{where} '{metric}' is never recorded without [evaluation] finetune = "
                "{ epochs = 1, lr = 0.1 }"
            )
        if metric.startswith("pooled/") and not evaluation.pooled:
            problems.add(f"{where} '{metric}' is never recorded without [evaluation] pooled = true")
        if metric.startswith("robust/") and evaluation.robust is None:
            problems.add(
                f"{where} '{metric}' is never recorded without [evaluation] robust: say in which "
                "radii samples are moved, such as robust = { radii = [0.1] }"
            )
        if metric.startswith("nodes/") and not has_nodes:
            problems.add(
                f"{where} '{metric}' is never recorded with [strategy] name = \"{name}\": it has "
                'one model for all; say "test/..."'
            )


def _check_tells_models_apart(problems: ScenarioProblems, metric: str) -> None:
    """Refuse to call a model the best by what is not measured on models."""
    check_metric(problems, metric, where="[evaluation] keep_best")
    phase, _, name = metric.partition("/")
    if phase not in METRIC_PHASES or not name:
        return
    if phase not in MODEL_PHASES or name.endswith(_NOT_QUALITIES):
        problems.add(
            f"[evaluation] keep_best = '{metric}': does not say which model is better; must be a "
            f"metric of the task under {', '.join(f'{each}/' for each in MODEL_PHASES)}"
        )


def _check_made(choice: Choice, clients: int) -> None:
    choice.make().check(clients)


def _check_over_selection(devices: Devices, participation: Choice, clients: int) -> None:
    larger: Any = participation.make().over_selected(devices.over_select)
    try:
        larger.expected_cohort(clients)
    except ScenarioError:
        size = participation.table.get("cohort_size")
        raise ScenarioError(
            f"[devices] over_select = {devices.over_select:g}: times [participation] cohort_size "
            f"= {size} that is more than [partition] clients = {clients}; lower one of them"
        ) from None
