"""What a user should know of a scenario before it runs, in lines."""

from fedsim.basics import kernels_in_use
from fedsim.basics.sources import Code
from fedsim.client.plan import ExecutionPlan
from fedsim.client.trial import Findings
from fedsim.data.federated import FederatedData
from fedsim.federation.participation.kinds import Participation
from fedsim.scenario.idle_keys import idle_keys
from fedsim.scenario.recorded_metrics import has_no_test
from fedsim.scenario.scenario import Scenario

_PLACES = 3  # that a note names


def notes_of(
    scenario: Scenario,
    data: FederatedData,
    takes_part: Participation,
    plan: ExecutionPlan,
    found: Findings | None,
    left_out: str | None,
    code: Code,
    personal: str | None,
) -> tuple[str, ...]:
    """Return the notes.

    Args:
        scenario: The scenario.
        data: The clients' data.
        takes_part: Who takes part.
        plan: How the run computes.
        found: What a trial of the user's code has found; None where none is in it.
        left_out: Who does not train for having one sample, or None.
        code: The files behind what is named by import path.
        personal: Which tensors each client keeps to itself, or None.
    """
    dropped = data.manifest.get("dropped", {"samples": 0})
    notes = [
        *data.said,
        f"[partition] {dropped['samples']} samples belong to no client: {dropped['reason']}"
        if dropped["samples"]
        else None,
        left_out,
        personal,
        _unmeasured(scenario),
        takes_part.note(data.num_clients),
        f"clients train one after another: {plan.reason}" if plan.executor == "loop" else None,
        *(found.notes if found is not None else ()),
        *kernels_in_use.notes(plan.bits),
        _beyond_portable(scenario),
        *idle_keys(scenario),
        _not_followed(code),
        _left_to_chance(code),
    ]
    return tuple(note for note in notes if note is not None)


def _unmeasured(scenario: Scenario) -> str | None:
    """Say that no accuracy of personal models, or of any, will be known."""
    evaluation = scenario.evaluation
    if has_no_test(scenario) and not evaluation.clients and not evaluation.pooled:
        return (
            "nothing measures the model: name the server's own file in [data] test, or let sites "
            "test it on a share of theirs, [partition] test_fraction with [evaluation] clients"
        )
    if not scenario.task.get("personal") or evaluation.clients:
        return None
    return (
        "[task] personal with [evaluation] clients = 0: only clients can measure models with "
        "tensors of their own, and none does; say how many evaluate"
    )


def _not_followed(code: Code) -> str | None:
    """Say which code of the user's own a later run cannot be held against."""
    if not code.unfollowed:
        return None
    return (
        f"code that decides the result and cannot be followed: {'; '.join(code.unfollowed)}; when "
        "it changes, nobody notices"
    )


def _left_to_chance(code: Code) -> str | None:
    """Say which lines of the user's own code may give another result from the same seed."""
    if not code.chance:
        return None
    more = len(code.chance) - _PLACES
    named = "; ".join(code.chance[:_PLACES]) + (f"; and {more} more" if more > 0 else "")
    return (
        f"code of your own may give another result in another process, whatever the seed: {named}"
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
