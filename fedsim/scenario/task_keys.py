"""The keys of `[task]` besides those of the model, held against what they may be."""

from collections.abc import Mapping
from typing import Any, Literal

from fedsim.basics.errors import ScenarioError
from fedsim.client.batching.augmentation import Augmentation
from fedsim.scenario import signatures
from fedsim.tasks.named import AUTO, GIVEN, TASKS, task_class
from fedsim.tasks.options import TaskOptions

# of `[task]` itself, whatever its kind
DTYPE = signatures.Key(
    "dtype",
    Literal["float32", "float64"],
    False,
    "float32",
    "dtype of the model's floating-point tensors.",
)


def keys(kind: str) -> dict[str, signatures.Key]:
    """Return the keys of a kind of task and those of every task; "auto" has those of all kinds.

    Raises:
        ScenarioError: If there is no such kind.
    """
    kinds = TASKS.values() if kind == AUTO else [task_class(kind)]
    found: dict[str, signatures.Key] = {}
    for each in kinds:
        found = {**signatures.keys(each, skip=GIVEN), **found}
    return found | signatures.keys(TaskOptions)


def check(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given keys, leaving out those that are at their default.

    So a scenario keeps its hash when keys are added to tasks.

    Args:
        kind: The kind of task.
        given: Some of the keys.

    Raises:
        ScenarioError: One line for each value that is of another type or impossible.
    """
    kinds = list(TASKS.values()) if kind == AUTO else [task_class(kind)]
    problems: list[str] = []
    table: dict[str, Any] = {}
    options = signatures.keys(TaskOptions)
    for name, value in given.items():
        if name in options:
            schemas = [options]
        else:
            schemas = [s for k in kinds if name in (s := signatures.keys(k, skip=GIVEN))]
        refusals = []
        for schema in schemas:
            try:
                found = signatures.check_value(schema[name].annotation, value)
            except ScenarioError as error:
                refusals.append(f"[task] {name}{error}")
                continue
            # while the kind is open a default may be another's, or the whole key
            is_open = kind == AUTO and name not in options
            if is_open or found != _plain(schema[name].default):
                table[name] = found
            break
        else:
            problems.append(refusals[0])
    if table.get("augment") == {}:
        problems.append("[task] augment = {}: says nothing; give crop, flip or noise")
    elif table.get("augment") is not None:
        try:
            complete = signatures.check(
                Augmentation, table["augment"], where="[task] augment", owner="a key of augment"
            )
            Augmentation(**complete)
        except ScenarioError as error:
            problems += str(error).splitlines()
        else:
            table["augment"] = complete
            if not any(complete.values()):
                del table["augment"]
    if "strict_weights" in table and "weights" not in table:
        problems.append("[task] strict_weights: says nothing without weights")
    if problems:
        raise ScenarioError("\n".join(problems))
    return table


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
