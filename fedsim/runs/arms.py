"""Reference arms of a scenario: the same task without a federation, trained as much.

`centralised` trains on all clients' samples in one hand, `local` leaves each client alone. What a
federation is worth lies between the two.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.client.procedure import Work
from fedsim.data.partitions.statistics import label_counts
from fedsim.data.preparation import prepare
from fedsim.scenario.scenario import Scenario

FEDERATED, CENTRALISED, LOCAL = "federated", "centralised", "local"
_OF_A_FEDERATION = (
    "strategy",
    "attack",
    "topology",
    "devices",
    "clock",
    "admission",
    "deployment",
    "expect",
)


def arm_of(scenario: Scenario, arm: str) -> Scenario:
    """Return a reference arm of a scenario.

    Args:
        scenario: The scenario.
        arm: "centralised" or "local".

    Raises:
        ScenarioError: If there is no such arm, or the scenario cannot have it.
    """
    if arm not in ARMS:
        raise ScenarioError(f"--arm {unknown(arm, 'an arm', ARMS)}")
    return ARMS[arm](scenario)


def centralised(scenario: Scenario) -> Scenario:
    """Return plain training on the samples of all clients in one hand.

    Client 0 holds them and trains in every round, with the scenario's task, optimiser, step size
    and batches. It takes so many steps per round that it sees as many samples as the clients who
    are expected to take part see together, to within half a batch (at least one step). An optimiser
    with moments keeps them between rounds. Parts of local training, attack, devices, graph and
    strategy are left out; local test splits stay with the clients.

    Raises:
        ScenarioError: If the client procedure cannot be told a number of steps.
    """
    choice = scenario.choices["client"]
    if "local_steps" not in choice.keys:
        raise ScenarioError(
            f"--arm {CENTRALISED}: [client] name = '{choice.name}' has no key local_steps, which "
            "says how much one client trains in place of a cohort"
        )
    data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    takes_part = scenario.choices["participation"].make()
    if takes_part.needs_labels:
        takes_part.learn_labels(label_counts(data, whole=True).counts, seed=scenario.seed)
    sizes = np.asarray(data.sizes(range(data.num_clients)))
    work = choice.make().work
    expected = math.fsum(
        rate * samples_seen(work, int(size))
        for rate, size in zip(takes_part.rates(data.num_clients), sizes, strict=True)
    )
    document = _without_a_federation(
        scenario, CENTRALISED, ("test", "pooled", "local", "finetuned")
    )
    document["partition"] = {**document["partition"], "centralised": True}
    alone = [1.0] + [0.0] * (data.num_clients - 1)
    document["participation"] = {"kind": "bernoulli", "rate": alone}
    document["task"] = {**document["task"], "personal": [], "buffers": "average"}
    client = {k: v for k, v in document["client"].items() if k != "local_epochs"}
    held = prepare(document["data"], document["partition"], seed=scenario.seed).sizes([0])
    steps = _steps(work, int(held[0]), expected)
    document["client"] = {**client, "local_steps": steps}
    if client.get("momentum") or client.get("optimizer") == "adam":
        document["client"]["keep_optimizer"] = True
    return Scenario.from_resolved(document, scenario.origin)


def local(scenario: Scenario) -> Scenario:
    """Return each client alone: all tensors are its own, and it trains whenever it takes part.

    Raises:
        ScenarioError: If no client evaluates: nobody else has models to measure.
    """
    if not scenario.evaluation.clients:
        raise ScenarioError(
            f"--arm {LOCAL}: only clients can measure models of their own, and [evaluation] "
            "clients = 0; --set evaluation.clients=N --set partition.test_fraction=0.2 lets N "
            "clients evaluate"
        )
    document = _without_a_federation(scenario, LOCAL, ("local", "finetuned"))
    document["task"] = {**document["task"], "personal": ["*"], "buffers": "average"}
    document["evaluation"]["pooled"] = False
    return Scenario.from_resolved(document, scenario.origin)


ARMS: dict[str, Callable[[Scenario], Scenario]] = {CENTRALISED: centralised, LOCAL: local}


def samples_seen(work: Work, num_examples: int) -> int:
    """Return how many samples a client with so many sees in one round, each time that it does.

    Example:
        >>> samples_seen(Work(10, 2, None), 23), samples_seen(Work(10, None, 4), 23)
        (46, 33)
    """
    per_pass, last = work.batches(num_examples)
    if not per_pass:
        return 0
    passes, left = divmod(work.num_steps(num_examples), per_pass)
    return passes * ((per_pass - 1) * work.batch_size + last) + left * work.batch_size


def _steps(work: Work, num_examples: int, expected: float) -> int:
    """How many steps on so many samples see as many as expected; at least one."""
    per_pass, last = work.batches(num_examples)
    if not per_pass:
        return 1
    mean = ((per_pass - 1) * work.batch_size + last) / per_pass
    return max(1, round(expected / mean))


def _without_a_federation(scenario: Scenario, arm: str, phases: tuple[str, ...]) -> dict[str, Any]:
    """The scenario's tables without what only a federation has.

    Args:
        scenario: The scenario.
        arm: What it becomes.
        phases: What is measured then; what waits for other metrics is left out.
    """
    document = {k: v for k, v in scenario.resolved().items() if k not in _OF_A_FEDERATION}
    document["title"] = f"{scenario.title or scenario.stem}: {arm}"
    document["engine"] = {**document["engine"], "min_replies": 1}
    if "parts" in document["client"]:  # a procedure of the user's own may have none
        document["client"] = {**document["client"], "parts": []}
    evaluation: dict[str, Any] = dict(document["evaluation"])
    stop: Mapping[str, Any] | None = evaluation.get("stop")
    if stop is not None and not stop["metric"].startswith(tuple(f"{p}/" for p in phases)):
        evaluation["stop"] = None
    kept = evaluation.get("keep_best")
    if kept is not None and not kept.startswith(tuple(f"{p}/" for p in phases)):
        evaluation["keep_best"] = None
    document["evaluation"] = evaluation
    return document
