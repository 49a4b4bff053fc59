"""W6: the server's kernels alone, on 50 updates of 11.2 million float32, on one thread as in a run.

`gram` is the yardstick of what needs directions: one product U U^T, accumulated in float64 over
blocks of columns. `sort` is that of coordinate-wise rules: every column sorted, in blocks that are
transposed first (the fastest way that torch has here). Coordinate-wise kernels, whose time grows
with the columns alone, are given a part of them. A turn runs one kernel once.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import baton
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from strategies.coordinate_median import coordinate_median
from strategies.fedld import principal_gradient_aggregate
from strategies.flag import flag_aggregate

GRAM_COLUMNS = 2**13  # float64 blocks of 3 MB: the fastest of 2^12 to 2^18
SORT_COLUMNS = 2**14


def gram(updates: Tensor) -> Tensor:
    """Return U U^T in float64."""
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for block in updates.split(GRAM_COLUMNS, dim=1):
        wide = block.double()
        total.addmm_(wide, wide.T)
    return total


def sort(updates: Tensor) -> None:
    """Sort every column."""
    for block in updates.split(SORT_COLUMNS, dim=1):
        block.T.contiguous().sort(dim=1)


KERNELS: dict[str, Callable[[Tensor], object]] = {
    "gram": gram,
    "sort": sort,
    "flag": flag_aggregate,
    "fedld": principal_gradient_aggregate,
    "median": coordinate_median,
}


def main() -> None:
    """Run the kernel of the workload as often as the harness asks for it."""
    work = baton.workload()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(work["dim"], generator=generator)
    updates = torch.empty(work["clients"], work["dim"])
    for row in updates:
        row.copy_(common).add_(torch.randn(work["dim"], generator=generator))
    some = updates[:, : work["coordinates"]].contiguous()
    turns = baton.Baton(torch=torch.__version__, threads=1)
    going = turns.wait()
    while going:
        kernel = turns.turn["kernel"]
        KERNELS[kernel](some if kernel in ("sort", "median") else updates)
        going = turns.ended(dict)


if __name__ == "__main__":
    main()
