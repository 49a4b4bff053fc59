"""What a site says of its data before round 1, and never a row of them.

It says which columns it has and what kind of values, its classes, how many rows, sums for
standardising, and a hash.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Ints, array_sha256, json_sha256
from fedsim.data.partitions.drawing import choose, local_test_counts
from fedsim.data.reading.checks import all_whole
from fedsim.data.sites.moments import FeatureMoments, moments_of
from fedsim.data.sites.tables import HowToRead, SiteTable

_MOST_CLASSES = 10_000
_LABELS = {"text": str, "truth values": bool, "whole numbers": int, "characters": int}
_MOST = 10**9  # samples of a site, and numbers of a sample


@dataclass(frozen=True)
class Description:
    """What a site says of its data.

    Attributes:
        features: The columns of the features, in the file's order.
        kind: What they are: "numbers", "list", "image" or "text".
        shape: Shape of a sample's features.
        preprocessing: What was done to images.
        target: The columns of the target.
        target_kind: See `SiteTable`.
        target_shape: Shape of a target of amounts.
        labels: The different values of a target that names classes, sorted; empty for amounts, and
            where the scenario lists the classes.
        unlisted: Values that the scenario's list of classes does not have.
        whole: Whether all amounts are whole numbers.
        train: Samples that the site trains on.
        test: Samples of its local test split.
        moments: Mean and spread, over the samples trained on, of what is standardised.
        sha256: Hash of the site's samples.
        said: What its user should know, in lines; for a simulation, and not sent.
    """

    features: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    preprocessing: Mapping[str, Any]
    target: tuple[str, ...]
    target_kind: str
    target_shape: tuple[int, ...]
    labels: tuple[Any, ...]
    unlisted: tuple[Any, ...]
    whole: bool
    train: int
    test: int
    moments: Mapping[str, FeatureMoments]
    sha256: str
    said: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moments = {name: each.to_json() for name, each in self.moments.items()}
        return {**found, "moments": moments, "said": []}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Description":
        """Return what `to_json` returned, from elsewhere.

        Raises:
            ScenarioError: If it is none.
        """
        try:
            lists = {
                f.name: tuple(told[f.name])
                for f in dataclasses.fields(cls)
                if str(f.type).startswith("tuple")
            }
            moments = {
                name: FeatureMoments.from_json(each) for name, each in told["moments"].items()
            }
            found = cls(**{**told, **lists, "moments": moments})
            if not _is_sound(found):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ScenarioError("says nothing of its data that can be read") from None
        return found


def _is_sound(told: Description) -> bool:
    """Whether what a site says, which may be anything, holds together."""
    names = (*told.features, *told.target)
    whole = (*told.shape, *told.target_shape, told.train, told.test)
    labels = {type(each) for each in (*told.labels, *told.unlisted)}
    values = math.prod(told.shape)
    widths = {
        "features": told.shape[0] if len(told.shape) == 3 else values,
        "targets": math.prod(told.target_shape),
    }
    return (
        all(isinstance(each, str) for each in (*names, told.kind, told.target_kind, told.sha256))
        and all(type(each) is int and 0 <= each <= _MOST for each in whole)
        and bool(told.features and told.target and told.train)
        and 0 < values <= _MOST
        and len(labels) <= 1
        and labels <= {_LABELS.get(told.target_kind)}
        and len(told.labels) <= _MOST_CLASSES
        and len(told.sha256) == 64
        and isinstance(told.preprocessing, dict)
        and all(len(told.moments[field].mean) == widths[field] for field in told.moments)
    )


def split_rows(rows: int, test_fraction: float, seed: int, client: int) -> tuple[Ints, Ints]:
    """Return the rows that a site trains on and those of its local test split, ascending."""
    everyone = np.zeros(rows, dtype=np.int64)
    counts = local_test_counts(np.array([rows]), test_fraction)
    tested = choose(everyone, counts, rng.generator(seed, "local-test", client))
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def describe(
    table: SiteTable, how: HowToRead, *, test_fraction: float, seed: int, client: int
) -> Description:
    """Return what a site says of its data.

    Args:
        table: What its file holds.
        how: How it was read.
        test_fraction: Share of its samples in its local test split.
        seed: The scenario's seed.
        client: The site's number.

    Raises:
        ScenarioError: If its target has too many values for classes.
    """
    train, test = split_rows(len(table.features), test_fraction, seed, client)
    amounts = table.target_kind == "amounts"
    found = [] if amounts else np.unique(table.targets).tolist()
    if len(found) > _MOST_CLASSES:
        raise ScenarioError(
            f"column '{table.roles.target[0]}' holds {len(found)} different values, which are too "
            "many for classes; say [data] target_type = 'numbers' if they are amounts"
        )
    listed_ = how.labels
    unlisted = [] if listed_ is None else [v for v in found if named(v) not in listed_]
    arrays = {"features": table.features, "targets": table.targets}
    # whole numbers are amounts if another site's are
    numbers = amounts or table.target_kind == "whole numbers"
    fields = standardised_fields(how, table.roles.kind, amounts=numbers)
    moments = {field: moments_of(arrays[field], train) for field in fields}
    hashes = {"features": array_sha256(table.features), "targets": _targets_sha256(table)}
    return Description(
        features=table.roles.features,
        kind=table.roles.kind,
        shape=table.features.shape[1:],
        preprocessing=table.preprocessing,
        target=table.roles.target,
        target_kind=table.target_kind,
        target_shape=table.targets.shape[1:],
        labels=tuple(found) if listed_ is None else (),
        unlisted=tuple(unlisted),
        whole=amounts and all_whole([table.targets]),
        train=len(train),
        test=len(test),
        moments=moments,
        sha256=json_sha256(hashes),
        said=table.said,
    )


def standardised_fields(how: HowToRead, kind: str, *, amounts: bool) -> list[str]:
    """Return which of "features" and "targets" get mean 0 and deviation 1."""
    fields, columns = [], how.columns
    if columns.standardise or (columns.standardise is None and kind == "numbers"):
        fields.append("features")
    if columns.standardise_target and amounts:
        fields.append("targets")
    return fields


def _targets_sha256(table: SiteTable) -> str:
    if table.targets.dtype.kind != "U":
        return array_sha256(table.targets)
    names, numbers = np.unique(table.targets, return_inverse=True)
    return json_sha256({"names": names.tolist(), "numbers": array_sha256(numbers.reshape(-1))})


def named(value: Any) -> str:
    """Return what a class is called whose value stands in a file.

    Example:
        >>> named("benign"), named(True), named(3)
        ('benign', 'true', '3')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)
