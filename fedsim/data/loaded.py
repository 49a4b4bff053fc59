"""A data set read whole, and where it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from fedsim.basics.samples import SampleSpec
from fedsim.data import cache
from fedsim.data.federated import Arrays, Ints


class Loaded(NamedTuple):
    """A data set read whole.

    Attributes:
        train: What may be trained on.
        test: The official test split, if there is one.
        spec: What one sample looks like.
        groups: The number of each training sample's natural owner, `[n]`, if the data set says so.
        group_names: What the data set calls these owners, by number.
        test_fraction: Share of `train` that the server holds out when there is no `test`; None
            leaves it to the source.
        standardise: Which of "features" and "targets" get mean 0 and deviation 1 over the samples
            that are trained on; see `standardise`.
        notes: What the manifest says of what was read (names of classes, say), as JSON.
        said: What a user should know before training: what was chosen, and what looks like a
            mistake, in lines.
    """

    train: Arrays
    test: Arrays | None
    spec: SampleSpec
    groups: Ints | None = None
    group_names: tuple[str, ...] = ()
    test_fraction: float | None = None
    standardise: tuple[str, ...] = ()
    notes: Mapping[str, Any] = MappingProxyType({})
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class PooledSource:
    """A data set that can be loaded whole.

    Attributes:
        name: The data set's name.
        test_fraction: Stratified share of the samples that the server holds out; 0 when the data
            set has an official test split.
        identity: What decides the arrays (files, package versions), as JSON: the cache's key. None
            when only the arrays themselves can tell, so that they are loaded to be found.
        description: What the manifest says of the data set; no machine paths.
        load: Reads the arrays.
        test_origin: Where the test samples are from that are not drawn, for the manifest.
    """

    name: str
    test_fraction: float
    identity: dict[str, Any] | None
    description: dict[str, Any]
    load: Callable[[], Loaded]
    test_origin: str = "official test split"


def read_spec(loaded: cache.Content) -> SampleSpec:
    """Return the sample spec that a data set's cache entry holds."""
    shape, num_classes, target_shape, vocabulary = loaded.info["spec"]
    return SampleSpec(tuple(shape), num_classes, tuple(target_shape), vocabulary)
