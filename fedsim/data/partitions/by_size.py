"""Rules that look at sizes alone: every client's samples follow the law of all."""

from functools import partial

import numpy as np

from fedsim.basics import rng
from fedsim.data.federated import Samples
from fedsim.data.partitions.partition import (
    Assignment,
    PartitionRule,
    check_clients,
    check_min_size,
    check_number,
    partition_rule,
)
from fedsim.data.partitions.sizes import Law, check_law, law_sizes, law_weights


@partition_rule()
def iid() -> PartitionRule:
    """Shuffle the samples and deal them out; sizes differ by at most one."""
    return PartitionRule(_iid)


def _iid(samples: Samples, clients: int, seed: int) -> Assignment:
    check_clients(clients, len(samples.labels))
    owners = np.arange(len(samples.labels), dtype=np.int64) % clients
    return Assignment(rng.generator(seed, "partition").permutation(owners))


@partition_rule()
def sizes(
    *, law: Law = "log_normal", sigma: float = 1.0, exponent: float = 1.0, min_size: int = 1
) -> PartitionRule:
    """Shuffle the samples and deal them out in unequal sizes that follow a law.

    What a client lacks to `min_size` comes from the largest clients, which are cut down to one
    level; the manifest says how many samples that moved.

    Args:
        law: What sizes are proportional to, for client c of N: "equal" 1, "linear" c + 1, "square"
            (c + 1)^2, "exponential" e^c, "log_normal" e^(sigma z) with z standard normal, "power"
            (N - c)^-exponent.
        sigma: Standard deviation of the logarithm of "log_normal" sizes; >= 0.
        exponent: Of "power": the k-th largest client has k^-exponent of the largest; >= 0.
        min_size: Samples that each client has at least, its local test split included; >= 0.

    Source: flwr-datasets' LinearPartitioner, SquarePartitioner and ExponentialPartitioner; the
    log-normal law of Acar et al., ICLR 2021 (arXiv:2111.04263).
    Deviations: samples are shuffled before they are dealt out; rounding follows the largest
    remainders, where flwr-datasets gives what is left to the last client; sizes below the minimum
    are raised instead of refused.
    """
    check_law(law, sigma, exponent)
    check_number("min_size", min_size)
    return PartitionRule(partial(_sizes, law, sigma, exponent, min_size))


def _sizes(
    law: Law,
    sigma: float,
    exponent: float,
    min_size: int,
    samples: Samples,
    clients: int,
    seed: int,
) -> Assignment:
    total = len(samples.labels)
    check_clients(clients, total)
    check_min_size(min_size, clients, total)
    generator = rng.generator(seed, "partition")
    weights = law_weights(law, clients, generator, sigma=sigma, exponent=exponent)
    counts, moved = law_sizes(weights, total, min_size)
    owners = generator.permutation(np.repeat(np.arange(clients), counts))
    return Assignment(owners, {"moved_to_reach_min_size": moved})
