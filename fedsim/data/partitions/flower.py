"""The partitioners of flwr-datasets by name: `flower:DirichletPartitioner`.

The only file that imports flwr_datasets, and only when a scenario names a partitioner or all are
listed: of it the partitioners alone are used, never the loader, whose telemetry is thus never
reached. A partitioner sees two columns, the labels and the owners, and not the samples.
"""

import contextlib
import importlib.util
import inspect
import io
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.import_paths import names_in_source
from fedsim.data.federated import Samples
from fedsim.data.partitions.partition import (
    DROPPED,
    Assignment,
    Partition,
    PartitionRule,
    check_clients,
    partition_rule,
)

PREFIX = "flower:"

_LABEL, _OWNER, _ROW = "label", "owner", "row"
_BY_OWNER = ("NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
_UNFIT = {
    "IdToSizeFncPartitioner": "needs a function, which no scenario can give it; use kind = 'sizes'",
    "VerticalEvenPartitioner": "divides the features of each sample, where fedsim divides samples",
    "VerticalSizePartitioner": "divides the features of each sample, where fedsim divides samples",
}
_GIVEN = ("num_partitions", "partition_by", "seed")

# What a partitioner raises of its own accord; anything else is a defect and keeps its traceback.
_REFUSALS = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError)


def names() -> list[str]:
    """Return the scenario names of flwr-datasets' partitioners, without importing any."""
    return sorted(PREFIX + name for name in _class_names() if name not in _UNFIT)


def flower_factory(kind: str) -> Callable[..., Partition]:
    """Return the factory of a partitioner: its constructor's arguments and every rule's keys.

    `num_partitions` is the key `clients`, `partition_by` the column that is meant, and the seed is
    derived from the scenario's.

    Args:
        kind: "flower:" and the name of a partitioner's class.

    Raises:
        ScenarioError: If there is none of that name, or it cannot divide samples.
    """
    name = kind.removeprefix(PREFIX)
    if name in _UNFIT:
        raise ScenarioError(f"[partition] kind = '{kind}': {_UNFIT[name]}")
    if name not in _class_names():
        raise ScenarioError(
            f"[partition] kind: {unknown(kind, 'a partitioner of flwr-datasets', names())}"
        )
    from flwr_datasets import partitioner

    cls = getattr(partitioner, name)
    signature = inspect.signature(cls, eval_str=True)

    def rule(**arguments: Any) -> PartitionRule:
        # refused here as far as it can be without data
        given = {"num_partitions": 1, "partition_by": _LABEL}
        _build(cls, kind, arguments, given)
        return PartitionRule(partial(_assign, cls, kind, arguments))

    rule.__name__ = kind
    rule.__doc__ = _described(cls)
    rule.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=_plain(parameter.annotation)
            )
            for parameter in signature.parameters.values()
            if parameter.name not in _GIVEN
        ]
    )
    return partition_rule(clients="given" if "num_partitions" in signature.parameters else "rule")(
        rule
    )


def _class_names() -> list[str]:
    """Read which classes flwr_datasets.partitioner offers: importing it takes seconds."""
    spec = importlib.util.find_spec("flwr_datasets")
    if spec is None or spec.origin is None:
        raise ScenarioError(
            "[partition] kind: flwr-datasets is not installed; install it with "
            "`pip install flwr-datasets`"
        )
    names = names_in_source("flwr_datasets.partitioner", "__all__")
    if names is not None:
        return [name for name in names if name != "Partitioner"]
    raise ScenarioError("[partition] kind: this version of flwr-datasets lists no partitioners")


def _assign(
    cls: type[Any],
    kind: str,
    arguments: Mapping[str, Any],
    samples: Samples,
    clients: int | None,
    seed: int,
) -> Assignment:
    by_owner = cls.__name__ in _BY_OWNER
    if by_owner and samples.groups is None:
        raise ScenarioError(
            f"[partition] kind = '{kind}': the data set does not say whose samples are whose"
        )
    if clients is not None:
        check_clients(clients, len(samples.labels))
    given = {
        "num_partitions": clients,
        "partition_by": _OWNER if by_owner else _LABEL,
        "seed": rng.derived_seed(seed, "partition"),
    }
    partitioner = _build(cls, kind, arguments, given)
    owners = np.full(len(samples.labels), DROPPED, dtype=np.int64)
    with _refusals(kind, arguments), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        partitioner.dataset = _table(samples)
        count = int(partitioner.num_partitions)
        table = partitioner.dataset  # the partitioner may have sorted it
        numbers = np.asarray(table[_ROW], dtype=np.int64)
        # only the rows' numbers are asked of a selection, and building one takes milliseconds
        table.select = lambda indices, **_: {_ROW: numbers[np.asarray(indices, dtype=np.int64)]}
        for client_id in range(count):
            rows = np.asarray(partitioner.load_partition(client_id)[_ROW], dtype=np.int64)
            if (owners[rows] != DROPPED).any() or len(np.unique(rows)) < len(rows):
                raise ValueError("gives a sample to two clients")
            owners[rows] = client_id
    said = sorted(
        {
            " ".join(str(each.message).split())
            for each in warned
            if issubclass(each.category, UserWarning)  # not what its libraries deprecate
        }
    )
    notes = {"flower_warnings": said} if said else {}
    why = f"{cls.__name__} gave them to nobody"
    return Assignment(owners, notes, count, why, keeps_groups=by_owner)


def _table(samples: Samples) -> Any:
    from datasets import Dataset

    columns = {_LABEL: samples.labels, _ROW: np.arange(len(samples.labels))}
    if samples.groups is not None:
        columns[_OWNER] = samples.groups
    return Dataset.from_dict(columns)


def _build(
    cls: type[Any], kind: str, arguments: Mapping[str, Any], offered: Mapping[str, Any]
) -> Any:
    """Build the partitioner from the scenario's arguments.

    Of `offered`, those are added that its constructor accepts.
    """
    parameters = inspect.signature(cls, eval_str=True).parameters
    given = {key: value for key, value in offered.items() if key in parameters}
    for key, value in arguments.items():
        given[key] = np.asarray(value) if _is_matrix(parameters[key].annotation) else value
    with _refusals(kind, arguments):
        return cls(**given)


@contextlib.contextmanager
def _refusals(kind: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Name the scenario's keys in what a partitioner refuses; keep its progress bars quiet."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except ScenarioError:
        raise
    except _REFUSALS as error:
        words = " ".join(str(error).split())
        if not words or isinstance(error, ArithmeticError):
            words = f"cannot divide these samples like that: {type(error).__name__}: {words}"
        given = "".join(f", {key} = {value!r}" for key, value in arguments.items())
        raise ScenarioError(f"[partition] kind = '{kind}'{given}: {words}") from error


def _plain(annotation: Any) -> Any:
    """Return a type without NumPy's arrays, which no scenario has: lists stand for them."""
    if _is_matrix(annotation):
        return list[list[float]]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if not _is_array(part)]
        return typing.Union[tuple(parts)]  # noqa: UP007 - the parts are known at run time alone
    return annotation


def _is_matrix(annotation: Any) -> bool:
    """Whether nothing but arrays is taken: flwr-datasets' distribution_array."""
    parts = typing.get_args(annotation) if not _is_array(annotation) else (annotation,)
    return bool(parts) and all(map(_is_array, parts))


def _is_array(annotation: Any) -> bool:
    return (typing.get_origin(annotation) or annotation) is np.ndarray


def _described(cls: type[Any]) -> str:
    """Return a Google docstring of a partitioner: its first line, and what it says of arguments."""
    text = inspect.getdoc(cls) or ""
    summary = text.split("\n\n")[0].replace("\n", " ").strip()
    _, _, section = text.partition("\nParameters\n----------\n")
    lines: list[str] = []
    wanted = False
    for line in re.split(r"\n\w+\n---", section)[0].splitlines():
        name, colon, _ = line.partition(":")
        if line and not line.startswith(" ") and colon:
            wanted = name.strip() not in _GIVEN
            lines += [f"    {name.strip()}:"] if wanted else []
        elif wanted and line:
            lines[-1] += f" {line.strip()}"
    return "\n".join([summary, "", "Args:", *lines]) if lines else summary
