"""Data of the user's own: a function named by import path, which returns a `DataSet`.

The function is called once when the data are prepared (and in `fedsim partition`), on every other
machine of the cluster once more; the workers of a machine map what it returned. What decides
whether stored arrays are the right ones is their content, never the loader's name or age, so that
nothing stale is ever used.
"""

import contextlib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import FedsimError, ScenarioError, printable
from fedsim.basics.import_paths import resolve
from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import Arrays, Features, Targets
from fedsim.data.loaded import Loaded, PooledSource
from fedsim.data.reading.checks import (
    Unfit,
    all_whole,
    as_array,
    as_classes,
    as_groups,
    as_numbers,
    as_tokens,
)
from fedsim.data.reading.chosen import look_alikes, row_numbers_of
from fedsim.data.reading.given import Numbered, given, numbered, require_same_kind
from fedsim.data.reading.mapping import is_nameless
from fedsim.data.reading.texts import is_number, remedy

Some = TypeVar("Some", Features, Targets)

_LOADERS_SEED = 0  # a data set is the same whatever the scenario's seed


class DataSet(NamedTuple):
    """What a loader of the user's own returns: arrays, torch tensors or nested lists.

    Attributes:
        features: `[n, ...]` numbers; or tokens (whole numbers) with `vocabulary`.
        targets: Classes, `[n]`: whole numbers 0 to C-1, text or truth values (numbered in sorted
            order), or a Categorical of pandas (in the order of its categories); or amounts as
            floats, `[n, ...]`.
        groups: The natural owner of each sample, `[n]` whole numbers or text, for
            `[partition] kind = "natural"`.
        test_features: The server's held-out samples; None holds `test_fraction` out at random.
        test_targets: Their targets.
        test_fraction: Share that the server holds out where no test samples are given, stratified
            by class (numbers: by the tenths of their distribution); in (0, 1).
        num_classes: C, when some class has no sample; None takes the largest class plus one.
        vocabulary: V, when the features are tokens from 0 to V-1; 0 when they are numbers.
    """

    features: Any
    targets: Any
    groups: Any = None
    test_features: Any = None
    test_targets: Any = None
    test_fraction: float = 0.2
    num_classes: int | None = None
    vocabulary: int = 0


def user_factory(path: str) -> Callable[..., PooledSource]:
    """Return the factory of a loader: its keys are the loader's arguments.

    Args:
        path: `package.module:function`.

    Raises:
        ScenarioError: If it cannot be imported or called.
    """
    where = f"[data] name = '{path}'"
    loader = resolve(path, what="[data] name")
    if not callable(loader):
        raise ScenarioError(
            f"{where}: names a {type(loader).__name__}, expected a function that returns a "
            "fedsim.data.DataSet"
        )

    def build(**arguments: Any) -> PooledSource:
        return PooledSource(
            name=path,
            test_fraction=0.0,
            identity=None,
            description={"name": path, "loader_sha256": _module_sha256(loader)},
            load=lambda: checked(_drawn_alike(loader, arguments, where), where),
            test_origin="given by the loader",
        )

    # a class that is called is its own constructor; its signature is the schema
    build.__signature__ = inspect.signature(loader, eval_str=True)  # type: ignore[attr-defined]
    build.__name__ = path
    build.__doc__ = inspect.getdoc(loader)
    return build


def checked(data: Any, where: str) -> Loaded:
    """Hold a loader's result against the needs of a federation.

    Args:
        data: What it returned.
        where: Begins every message.

    Raises:
        ScenarioError: Naming the field, the row and what is wrong.
    """
    if not isinstance(data, DataSet):
        raise ScenarioError(
            f"{where}: returned a {type(data).__name__}, expected a fedsim.data.DataSet"
        )
    at = partial(_named, where)
    with at("vocabulary"):
        vocabulary = _whole(data.vocabulary, 0, "0, or the number of tokens")
    with at("num_classes"):
        num_classes = 0
        if data.num_classes is not None:
            num_classes = _whole(data.num_classes, 2, "None, or a whole number >= 2")
    with at("features"):
        names = _column_names(data.features)
        _require_columns_of_numbers(data.features)
        raw = as_array(data.features)
        features = _features(raw, vocabulary)
        if len(features) < 2:
            raise Unfit(f"has {len(features)} samples, expected at least 2")
    with at("targets"):
        train = given(data.targets)
        _of_length(train.values, features)
    tested = None
    if data.test_targets is not None:
        with at("test_targets"):
            tested = given(data.test_targets)
            require_same_kind(tested, train)
    with at("targets"):
        made = numbered(train, tested, num_classes)
        num_classes = made.num_classes
        targets = _targets(made.train, num_classes)
    test, fraction = _held_out(data, made, features, targets, vocabulary, at)
    groups, owners = None, tuple[str, ...]()
    if data.groups is not None:
        with at("groups"):
            groups, owners = as_groups(_of_length(as_array(data.groups), features))
    said = [
        *look_alikes("targets of the loader", made.names),
        *look_alikes("groups of the loader", owners),
        *_said(raw, names, targets, vocabulary=vocabulary, num_classes=num_classes),
    ]
    notes = {"label_names": list(made.names)} if made.names else {}
    shape = () if num_classes else targets.shape[1:]
    spec = SampleSpec(features.shape[1:], num_classes, shape, vocabulary)
    return Loaded(
        Arrays(features, targets),
        test,
        spec,
        groups,
        owners,
        fraction,
        notes=notes,
        said=tuple(map(printable, said)),
    )


def _held_out(
    data: DataSet,
    made: Numbered,
    features: Features,
    targets: Targets,
    vocabulary: int,
    at: Callable[[str], contextlib.AbstractContextManager[None]],
) -> tuple[Arrays | None, float]:
    """The test set that a loader gives, or the share that is to be drawn."""
    if data.test_features is None and data.test_targets is None:
        with at("test_fraction"):
            if not isinstance(data.test_fraction, float) or not 0 < data.test_fraction < 1:
                raise Unfit(f"is {data.test_fraction!r}, expected a float in (0, 1)")
        return None, data.test_fraction
    with at("test_features"):
        test_features = _like(_features(as_array(data.test_features), vocabulary), features)
    with at("test_targets"):
        if made.test is None:
            raise Unfit("is None, expected an array `[n, ...]`")
        _of_length(made.test, test_features)
        test_targets = _like(_targets(made.test, made.num_classes), targets)
    return Arrays(test_features, test_targets), 0.0


def _said(
    raw: npt.NDArray[Any], names: list[str] | None, targets: Targets,
    *, vocabulary: int, num_classes: int,
) -> list[str]:  # fmt: skip
    """Warnings about columns and targets that may be something else than they seem."""
    said: list[str] = []
    if not vocabulary and raw.dtype.kind in "fiu":
        said += row_numbers_of(raw, names)
    if not num_classes and all_whole([targets]):
        said.append(
            "[data] targets of the loader are whole numbers as floats and are learnt as amounts; "
            "return whole numbers (astype(int)) or text if they name classes"
        )
    return said


@contextlib.contextmanager
def _named(where: str, field: str) -> Iterator[None]:
    """Say in which field, and in which row of it, something is wrong."""
    try:
        yield
    except Unfit as unfit:
        row = "" if unfit.row is None else f"[{unfit.row}]"
        raise ScenarioError(f"{where}: {field}{row} {unfit}") from unfit


def _column_names(features: Any) -> list[str] | None:
    """Return what a table of pandas calls its columns; None of anything else.

    Raises:
        Unfit: If one has no name: mostly the row numbers that pandas wrote into a file.
    """
    columns = getattr(features, "columns", None)
    if columns is None or not hasattr(features, "isna"):
        return None
    for place, name in enumerate(columns, start=1):
        parts = name if isinstance(name, tuple) else (name,)  # one per row of the heading
        if all(is_nameless(part) for part in parts):
            raise Unfit(
                f"has a column without a name, its {place}. ('{name}'), as row numbers have that "
                "pandas writes; read the file with index_col, or drop the column"
            )
    return list(map(str, columns))


def _require_columns_of_numbers(features: Any) -> None:
    """Name the column of a table of pandas that holds dates, or a text.

    Raises:
        Unfit: With the row of the text.
    """
    if not hasattr(features, "iloc") or not hasattr(features, "columns"):
        return
    for place, name in enumerate(features.columns):
        column = features.iloc[:, place]
        if getattr(column.dtype, "kind", "") in "mM":
            raise Unfit(
                f"holds dates or times in column '{name}'; make numbers of them, such as days "
                "since the first, or drop it"
            )
        if str(column.dtype) not in ("object", "str", "string", "category"):
            continue
        for row, value in enumerate(column):
            if isinstance(value, str):
                what = remedy(value, ".", str(name))
                what = "make it of numbers (astype(float))" if is_number(value) else what
                raise Unfit(f"is {value!r:.40} in column '{name}', a text; {what}, or drop it", row)


def _features(array: npt.NDArray[Any], vocabulary: int) -> Features:
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise Unfit(
            f"has shape {array.shape}, expected [n, ...] with at least one number per sample"
            + ("; reshape(-1, 1) makes it so" if array.ndim == 1 else "")
        )
    return as_tokens(array, vocabulary) if vocabulary else as_numbers(array)


def _targets(array: npt.NDArray[Any], num_classes: int) -> Targets:
    if num_classes:
        return as_classes(array, num_classes)
    if 0 in array.shape[1:]:
        raise Unfit(f"has shape {array.shape}, expected at least one number per sample")
    return as_numbers(array)


def _of_length(array: npt.NDArray[Any], samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if len(array) != len(samples):
        raise Unfit(f"has {len(array)} rows for {len(samples)} samples")
    return array


def _like(array: Some, trained_on: npt.NDArray[Any]) -> Some:
    if array.shape[1:] != trained_on.shape[1:]:
        raise Unfit(
            f"has samples of shape {array.shape[1:]}, those to train on {trained_on.shape[1:]}"
        )
    if len(array) == 0:
        raise Unfit("has no sample; leave it out to hold test_fraction out")
    return array


def _whole(value: Any, least: int, allowed: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise Unfit(f"is {value!r}, expected {allowed}")
    return int(value)


def _drawn_alike(loader: Callable[..., Any], arguments: dict[str, Any], where: str) -> Any:
    """What a loader returns; the generators of the process that it draws from begin alike."""
    from fedsim.basics.generators import seeded  # needs torch, and a scenario is read without

    with seeded(_LOADERS_SEED):
        return _called(loader, arguments, where)


def _called(loader: Callable[..., Any], arguments: dict[str, Any], where: str) -> Any:
    try:
        return loader(**arguments)
    except FedsimError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames[1:] if f.filename == _source_file(loader)] or frames
        place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
        words = " ".join(str(error).split())
        raise ScenarioError(f"{where}: raised {type(error).__name__}: {words} ({place})") from error


def _source_file(loader: Callable[..., Any]) -> str | None:
    return getattr(sys.modules.get(loader.__module__), "__file__", None)


def _module_sha256(loader: Callable[..., Any]) -> str | None:
    """Return the hash of the source of the loader's module; None where there is none to read."""
    file = _source_file(loader)
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
