"""Who holds what: a data set held out, divided among clients and split, once per seed and rule."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsim import rng
from fedsim.data import cache
from fedsim.data.partition import (
    Partition,
    add_label_noise,
    choose,
    local_test_counts,
    stratified_counts,
)
from fedsim.data.source import (
    TENTHS,
    Ints,
    Recipe,
    Samples,
    array_sha256,
    json_sha256,
    size_summary,
)
from fedsim.errors import ScenarioError
from fedsim.samples import SampleSpec

if TYPE_CHECKING:
    from fedsim.data.pooled import PooledSource


def divide(
    source: "PooledSource", partition: Partition, recipe: Recipe, loaded: cache.Content
) -> cache.Content:
    """Hold the test set out, divide the rest among clients, and split theirs.

    Args:
        source: The data set.
        partition: The rule of division.
        recipe: What the data were asked for with.
        loaded: The data set's arrays, as the cache holds them.

    Returns:
        What the cache keeps of the division: each split's rows in client order with offsets, the
        held-out samples when they were drawn, and the manifest.

    Raises:
        ScenarioError: If the rule cannot divide this data set.
    """
    spec = read_spec(loaded)
    features, targets = loaded.arrays["features"], loaded.arrays["targets"]
    labels = targets if spec.has_classes else tenths(targets)
    classes = spec.num_classes or TENTHS
    class_sizes = np.bincount(labels, minlength=classes)
    arrays: dict[str, npt.NDArray[Any]] = {}
    if source.test_fraction:
        held_out_counts = stratified_counts(class_sizes, source.test_fraction)
        if held_out_counts.sum() in (0, len(targets)):
            raise ScenarioError(
                f"[data] test_fraction = {source.test_fraction}: of {len(targets)} samples it "
                "holds "
                f"out {held_out_counts.sum()}; some must be held out and some left to train on"
            )
        held_out = choose(labels, held_out_counts, rng.generator(recipe.seed, "held-out"))
        arrays |= {"test_features": features[held_out], "test_targets": targets[held_out]}
        test_hashes = {name: array_sha256(array) for name, array in arrays.items()}
        test_labels, available = labels[held_out], np.flatnonzero(~held_out)
    else:
        test_hashes = {
            name: loaded.info["sha256"][name] for name in ("test_features", "test_targets")
        }
        test_targets = loaded.arrays["test_targets"]
        test_labels = test_targets if spec.has_classes else tenths(test_targets)
        available = np.arange(len(targets))

    groups = loaded.arrays.get("groups")
    samples = Samples(labels[available], None if groups is None else groups[available])
    owners, notes = partition.owners(samples, recipe.seed)
    sizes = np.bincount(owners, minlength=partition.clients)
    test_counts = local_test_counts(sizes, partition.test_fraction)
    local_test = choose(owners, test_counts, rng.generator(recipe.seed, "local-test"))
    for name, part in (("train", ~local_test), ("local_test", local_test)):
        arrays[f"{name}_offsets"], arrays[f"{name}_rows"] = _by_client(
            owners[part], available[part], partition.clients
        )

    noisy: dict[str, Any] = {}
    if np.any(partition.label_noise):
        train = ~local_test
        arrays["train_targets"] = np.array(targets)
        arrays["train_targets"][available[train]] = add_label_noise(
            targets[available][train],
            owners[train],
            np.broadcast_to(np.asarray(partition.label_noise, dtype=np.float64), sizes.shape),
            spec.num_classes,
            recipe.seed,
        )
        notes = {**notes, "labels_changed": int((arrays["train_targets"] != targets).sum())}
        noisy = {"train_targets": array_sha256(arrays["train_targets"])}
    hashes = loaded.info["sha256"]
    content = {name: hashes[name] for name in ("features", "targets")} | test_hashes | noisy
    if not spec.has_classes:
        arrays["labels"] = labels
    assignment = {
        name: array_sha256(arrays[name])
        for name in ("train_offsets", "train_rows", "local_test_offsets", "local_test_rows")
    }
    manifest = {
        "data": {
            **source.description,
            "classes": spec.num_classes,
            "feature_shape": list(features.shape[1:]),
            "samples": len(targets),
            "samples_per_class": class_sizes.tolist(),
        },
        "held_out": {
            "samples": len(test_labels),
            "samples_per_class": np.bincount(test_labels, minlength=classes).tolist(),
            "drawn": "stratified by class" if source.test_fraction else "official test split",
        },
        "partition": {**recipe.partition, "seed": recipe.seed, **notes},
        "sizes": size_summary(sizes - test_counts),
        "local_test": {"samples": int(test_counts.sum()), "sizes": size_summary(test_counts)},
        "dropped": {"samples": 0, "reason": None},
        "sha256": content | assignment,
    }
    # who holds what is decided by these arrays alone, wherever they came from
    info = {"manifest": manifest, "manifest_sha256": json_sha256(content | assignment)}
    return cache.Content(arrays, info)


def _by_client(owners: Ints, rows: Ints, clients: int) -> tuple[Ints, Ints]:
    """Return (offsets `[clients + 1]`, rows sorted by client and then by number)."""
    offsets = np.zeros(clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(owners, minlength=clients), out=offsets[1:])
    return offsets, rows[np.argsort(owners, kind="stable")].astype(np.int64, copy=False)


def read_spec(loaded: cache.Content) -> SampleSpec:
    """Return the sample spec that a data set's cache entry holds."""
    shape, num_classes, target_shape, vocabulary = loaded.info["spec"]
    return SampleSpec(tuple(shape), num_classes, tuple(target_shape), vocabulary)


def tenths(targets: npt.NDArray[Any]) -> Ints:
    """Return the tenth of the targets' distribution that each lies in, 0 to 9.

    Equal targets lie in the same tenth; of targets with several numbers the first one counts.

    Example:
        >>> tenths(np.arange(20.0)).tolist()
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    """
    first = targets.reshape(len(targets), -1)[:, 0]
    ordered = np.sort(first)
    below: Ints = np.searchsorted(ordered, first, side="left").astype(np.int64)
    return below * TENTHS // max(len(first), 1)
