"""What is learnt: a model, a loss and metrics, by name or import path. Needs torch alone."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.import_paths import is_import_path, resolve
from fedsim.basics.samples import SampleSpec
from fedsim.tasks.classification import Classification, NextCharacter
from fedsim.tasks.models.frozen import freeze
from fedsim.tasks.models.named import model_factory, shape_arguments
from fedsim.tasks.options import OPTION_KEYS, BufferPolicy, TaskOptions, options_of
from fedsim.tasks.regression import Regression
from fedsim.tasks.task import Task

__all__ = [
    "AUTO", "DTYPES", "TASKS", "BufferPolicy", "Classification", "NextCharacter", "Regression",
    "Task", "TaskOptions", "make_task", "options_of", "own_keys", "task_class",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "float64": torch.float64}
AUTO = "auto"  # the data decide
TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "next_character": NextCharacter,
}
GIVEN = ("build", "spec", "dtype")  # what every task's constructor is given first


def make_task(table: Mapping[str, Any], spec: SampleSpec, *, data: str | None = None) -> Task:
    """Build the task of a scenario's [task] table.

    Args:
        table: `kind`, `model`, `dtype` (each with a default), the keys of task and model, and those
            of `TaskOptions`.
        spec: What one sample of the data looks like.
        data: What the scenario calls the data, for messages.

    Raises:
        ScenarioError: If a name is unknown or the kind does not fit the data; impossible arguments
            of the model show when it is built.
    """
    arguments = {key: value for key, value in table.items() if key not in OPTION_KEYS}
    named = arguments.pop("kind", AUTO)
    name = arguments.pop("model", "logistic")
    dtype = arguments.pop("dtype", "float32")
    kind = _kind_of(spec) if named == AUTO else named
    factory = task_class(kind)
    _require_fit(factory, kind, spec, data)
    if dtype not in DTYPES:
        raise ScenarioError(f"[task] dtype: {unknown(dtype, 'a dtype', DTYPES)}")
    own = {key: arguments.pop(key) for key in own_keys(factory) if key in arguments}
    if named == AUTO:
        _refuse_others_keys(arguments, kind)
    model = model_factory(name)
    build = functools.partial(
        _built,
        functools.partial(model, **arguments, **shape_arguments(model, spec)),
        tuple(table.get("freeze", ())),
    )
    return factory(build, spec, DTYPES[dtype], **own)


def task_class(kind: str) -> type[Task]:
    """Return the task of a kind: one of `TASKS`, or the user's own by import path.

    Raises:
        ScenarioError: If there is none of that name, or what the path names is no task.
    """
    if is_import_path(kind):
        found = resolve(kind, what="[task] kind")
        if not (inspect.isclass(found) and issubclass(found, Task)):
            raise ScenarioError(f"[task] kind = '{kind}': must be a subclass of fedsim.tasks.Task")
        return found
    if kind not in TASKS:
        known = [*TASKS, AUTO]
        raise ScenarioError(
            f"[task] kind: {unknown(kind, 'a task', known)}, or 'package.module:Class'"
        )
    return TASKS[kind]


def own_keys(factory: Callable[..., Task]) -> list[str]:
    """Return the keys that a task adds to `[task]`: its constructor's keyword-only arguments."""
    return [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def _kind_of(spec: SampleSpec) -> str:
    """The kind that the data make a task whose kind is left open."""
    if not spec.has_classes:
        return "regression"
    # tokens with targets that are no tokens are texts to be classified
    return "next_character" if spec.num_classes == spec.vocabulary else "classification"


def _require_fit(factory: type[Task], kind: str, spec: SampleSpec, data: str | None) -> None:
    """Refuse a kind of fedsim's own for data of another kind; the user's own decides itself."""
    where = f'[task] kind = "{kind}"' + (f' with [data] name = "{data}"' if data else "")
    fitting = _kind_of(spec)
    if factory is Regression and spec.has_classes:
        found = f"targets are {spec.num_classes} classes, not numbers"
    elif factory in (Classification, NextCharacter) and not spec.has_classes:
        found = "targets are numbers, not classes"
    elif factory is NextCharacter and not spec.vocabulary:
        found = "features are numbers, not tokens"
    elif factory is NextCharacter and spec.num_classes != spec.vocabulary:
        found = (
            f"targets are {spec.num_classes} classes, not the {spec.vocabulary} tokens of the text"
        )
    else:
        return
    raise ScenarioError(f'{where}: the {found}; use kind = "{fitting}" or leave it out')


def _refuse_others_keys(arguments: Mapping[str, Any], kind: str) -> None:
    """Refuse a key of another kind of task, which a table that leaves the kind open may have."""
    others = {key for factory in TASKS.values() for key in own_keys(factory)}
    for key in arguments:
        if key in others:
            raise ScenarioError(
                f"[task] '{key}' is not a key of {kind}, which the data make this task; allowed: "
                f"{', '.join(own_keys(TASKS[kind])) or 'none'}"
            )


def _built(build: Callable[[], nn.Module], patterns: tuple[str, ...]) -> nn.Module:
    model = build()
    if patterns and isinstance(model, nn.Module):
        freeze(model, patterns)
    return model
