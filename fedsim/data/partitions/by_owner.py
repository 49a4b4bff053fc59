"""Rules that leave samples with the owners that they come from: writers, roles, hospitals."""

from functools import partial
from typing import Any

import numpy as np

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Ints, Samples
from fedsim.data.partitions.partition import DROPPED, Assignment, PartitionRule, partition_rule
from fedsim.data.partitions.sizes import Law, check_law, law_sizes, law_weights


@partition_rule(clients="optional")
def natural() -> PartitionRule:
    """Leave the samples with the owners that they come from, each a client.

    Without `clients` every owner of a training sample is a client (of generated data there are
    ten); fewer are drawn uniformly without replacement, and the samples of the others are dropped
    and counted. Clients are in the order of the data set's owners.

    Source: McMahan et al., AISTATS 2017 (arXiv:1602.05629), section 3: each speaking role a client;
    flwr-datasets' NaturalIdPartitioner.
    """
    return PartitionRule(_natural, natural=True)


def _natural(samples: Samples, clients: int | None, seed: int) -> Assignment:
    owners, count = _numbered(samples, "natural")
    if clients is None or clients == count:
        return Assignment(owners, {"owners": count}, count, keeps_groups=True)
    _check_enough(clients, count)
    kept = np.sort(rng.generator(seed, "partition").permutation(count)[:clients])
    client_of = np.full(count, DROPPED, dtype=np.int64)
    client_of[kept] = np.arange(clients)
    why = f"{count - clients} of {count} owners were not drawn"
    return Assignment(client_of[owners], {"owners": count}, clients, why, keeps_groups=True)


@partition_rule()
def grouped(*, law: Law = "equal", sigma: float = 1.0, exponent: float = 1.0) -> PartitionRule:
    """Merge the owners that samples come from into so many groups, each a client.

    Owners are shuffled and dealt out; each group has at least one.

    Args:
        law: What the numbers of owners per group are proportional to, see `sizes`.
        sigma: Of the law "log_normal"; >= 0.
        exponent: Of the law "power"; >= 0.

    Source: flwr-datasets' GroupedNaturalIdPartitioner.
    Deviations: the number of groups is given instead of their size, owners are shuffled, and none
    is left out.
    """
    check_law(law, sigma, exponent)
    return PartitionRule(partial(_grouped, law, sigma, exponent))


def _grouped(
    law: Law, sigma: float, exponent: float, samples: Samples, clients: int, seed: int
) -> Assignment:
    owners, count = _numbered(samples, "grouped")
    _check_enough(clients, count)
    generator = rng.generator(seed, "partition")
    weights = law_weights(law, clients, generator, sigma=sigma, exponent=exponent)
    sizes, _ = law_sizes(weights, count, 1)
    client_of: Ints = generator.permutation(np.repeat(np.arange(clients), sizes))
    notes: dict[str, Any] = {"owners": count, "owners_per_client": _spread(sizes)}
    return Assignment(client_of[owners], notes, clients, keeps_groups=True)


def _numbered(samples: Samples, kind: str) -> tuple[Ints, int]:
    """Number the owners that have samples, in order; return each sample's and how many they are."""
    if samples.groups is None:
        raise ScenarioError(
            f'[partition] kind = "{kind}": the data set does not say whose samples are whose; use '
            'another kind, such as "iid" or "dirichlet"'
        )
    present, owners = np.unique(samples.groups, return_inverse=True)
    return owners.reshape(-1).astype(np.int64, copy=False), len(present)


def _check_enough(clients: int, owners: int) -> None:
    if clients > owners:
        raise ScenarioError(
            f"[partition] clients = {clients}: {owners} owners have training samples; "
            f"use at most {owners}"
        )


def _spread(sizes: Ints) -> dict[str, int]:
    return {"min": int(sizes.min()), "max": int(sizes.max())}
