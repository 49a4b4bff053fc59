"""Rules that count classes: each client holds few of them."""

from functools import partial
from typing import Literal

import numpy as np

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError, require_choice
from fedsim.data.federated import Ints, Samples
from fedsim.data.partitions.drawing import hand_out
from fedsim.data.partitions.partition import (
    Assignment,
    PartitionRule,
    check_clients,
    check_number,
    owners_of,
    partition_rule,
)

Mode = Literal["random", "deterministic", "first-deterministic"]


@partition_rule()
def pathological(
    *, classes_per_client: int = 2, class_assignment_mode: Mode = "random"
) -> PartitionRule:
    """Give each client exactly so many classes; a class is divided evenly among who has it.

    Args:
        classes_per_client: Classes that each client holds samples of; >= 1 and at most the number
            of classes.
        class_assignment_mode: "random": each client draws its classes; "deterministic": client c
            has classes c, c + 1, ... modulo their number; "first-deterministic": client c has class
            c modulo their number and draws the others.

    Samples of a class that no client has are dropped and counted.

    Source: flwr-datasets' PathologicalPartitioner.
    Deviations: samples of a class are shuffled before they are divided.
    """
    check_number("classes_per_client", classes_per_client, least=1)
    require_choice("class_assignment_mode", class_assignment_mode, Mode)
    key = "classes_per_client"
    return PartitionRule(partial(_few_classes, key, classes_per_client, class_assignment_mode))


@partition_rule()
def label_quantity(*, labels_per_client: int = 2) -> PartitionRule:
    """Give client c class c modulo their number and others at random (#C = k of NIID-Bench).

    A class is divided evenly among who has it.

    Args:
        labels_per_client: k, classes that each client holds samples of; >= 1 and at most the number
            of classes.

    Source: Li et al., ICDE 2022 (arXiv:2102.02079), quantity-based label imbalance; that each
    client has a first class in turn is the authors' code. It is `pathological` with
    class_assignment_mode = "first-deterministic".
    Deviations: a class that no client has (fewer clients than classes) is dropped and counted.
    """
    check_number("labels_per_client", labels_per_client, least=1)
    return PartitionRule(
        partial(_few_classes, "labels_per_client", labels_per_client, "first-deterministic")
    )


def _few_classes(
    key: str, held: int, mode: Mode, samples: Samples, clients: int, seed: int
) -> Assignment:
    check_clients(clients, len(samples.labels))
    present, classes, class_sizes = np.unique(
        samples.labels, return_inverse=True, return_counts=True
    )
    if held > len(present):
        raise ScenarioError(
            f"[partition] {key} = {held}: the training samples have {len(present)} classes; "
            f"use at most {len(present)}"
        )
    generator = rng.generator(seed, "partition")
    has = np.zeros((clients, len(present)), dtype=np.bool_)
    np.put_along_axis(has, _chosen(clients, len(present), held, mode, generator), True, axis=1)
    holders = has.sum(axis=0)
    for label, size, wanted in zip(present, class_sizes, holders, strict=True):
        if wanted > size:
            raise ScenarioError(
                f"[partition] {key} = {held} with clients = {clients}: {wanted} clients share the "
                f"{size} samples of class {label}, and each must get one; lower one of the two"
            )
    # as evenly as whole samples go; the first of a class's clients get one more
    each, more = np.divmod(class_sizes, np.maximum(holders, 1))
    counts = np.where(has, each + (np.cumsum(has, axis=0) <= more), 0)
    owners = hand_out(classes.reshape(-1), counts.T, generator)
    nobody = present[holders == 0].tolist()
    return Assignment(owners, why_dropped=f"no client was given class {nobody}" if nobody else None)


def _chosen(
    clients: int, classes: int, held: int, mode: Mode, generator: np.random.Generator
) -> Ints:
    """Return the numbers of each client's classes, `[clients, held]`."""
    first = np.arange(clients)[:, None] % classes
    if mode == "deterministic":
        return np.asarray((first + np.arange(held)) % classes, dtype=np.int64)
    keys = generator.random((clients, classes))
    if mode == "first-deterministic":
        np.put_along_axis(keys, first, -1.0, axis=1)
    return np.asarray(keys.argsort(axis=1, kind="stable")[:, :held], dtype=np.int64)


@partition_rule()
def shards(*, shards_per_client: int = 2) -> PartitionRule:
    """Sort the samples by class, cut them into equal shards, and give each client some at random.

    Args:
        shards_per_client: Shards that each client gets; >= 1. Clients times shards is at most the
            number of training samples.

    Source: McMahan et al., AISTATS 2017 (arXiv:1602.05629), section 3.
    Deviations: where samples do not divide evenly, shards differ by one sample (flwr-datasets'
    ShardPartitioner drops the rest); samples of a class are shuffled before they are cut.
    """
    check_number("shards_per_client", shards_per_client, least=1)
    return PartitionRule(partial(_shards, shards_per_client))


def _shards(shards_per_client: int, samples: Samples, clients: int, seed: int) -> Assignment:
    total, shards = len(samples.labels), clients * shards_per_client
    if shards > total:
        raise ScenarioError(
            f"[partition] shards_per_client = {shards_per_client} with clients = {clients}: "
            f"{total} training samples cannot be cut into {shards} shards; lower one of the two"
        )
    generator = rng.generator(seed, "partition")
    order = np.lexsort((generator.random(total), samples.labels))
    sizes = np.full(shards, total // shards)
    sizes[: total % shards] += 1
    takers = generator.permutation(np.repeat(np.arange(clients), shards_per_client))
    return Assignment(owners_of(np.repeat(takers, sizes), order))
