"""What `[clock]` and other tables may not say together."""

from collections.abc import Mapping
from typing import Any

from fedsim.federation.clock_table import Clock
from fedsim.scenario.choice import Choice
from fedsim.scenario.problems import ScenarioProblems


def check_clock(
    problems: ScenarioProblems, choices: Mapping[str, Choice], fixed: Mapping[str, Any]
) -> None:
    """Refuse what a clock cannot do, and devices whose speeds nobody reads.

    Args:
        problems: Where problems go.
        choices: What the scenario's tables name, by table.
        fixed: Its tables with fixed keys.
    """
    clock, devices = fixed["clock"], fixed["devices"]
    if clock is None:
        if devices is not None and (idle := devices.idle_speeds()) is not None:
            problems.add(f"[devices] {idle}")
        return
    if clock.trigger == "all":
        return
    if devices is not None:
        for key, default in (("deadline", None), ("over_select", 1.0)):
            if (value := getattr(devices, key)) != default:
                problems.add(
                    f'[devices] {key} = {value:g} with [clock] trigger = "{clock.trigger}": the '
                    "trigger says whom the server waits for; leave it out, or take trigger = "
                    '"all"'
                )
    if "topology" in choices:
        problems.add(
            f'[clock] trigger = "{clock.trigger}" with [topology]: nodes that average with their '
            'neighbours have no server that aggregates; use trigger = "all"'
        )


def check_jobs(
    problems: ScenarioProblems, clock: Clock | None, clients: int, expected: int | None
) -> None:
    """Refuse jobs that so many clients cannot have.

    Args:
        problems: Where problems go.
        clock: `[clock]`, or None.
        clients: Clients registered.
        expected: Clients per round, where that is known.
    """
    if clock is None:
        return
    given = clock.job.seconds
    if given is not None and len(given) != clients:
        problems.add(
            f"[clock] job.seconds has {len(given)} numbers, and there are {clients} clients: give "
            "one per client"
        )
    if clock.concurrency is not None and clock.concurrency > clients:
        problems.add(
            f"[clock] concurrency = {clock.concurrency}: a client has one job at a time, and there "
            f"are {clients} clients; at most {clients}"
        )
    jobs = clock.concurrency or expected
    if clock.count is not None and jobs is not None and clock.count > jobs:
        problems.add(
            f"[clock] count = {clock.count} replies never come: {jobs} jobs are under way at a "
            f"time; at most {jobs}, or raise concurrency"
        )
