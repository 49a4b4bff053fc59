"""What a reply must be to reach a strategy."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from flwr.app import MessageType
from torch import Tensor

from fedsim.messages.cohort import SETUP

MAX_EXAMPLES = 10**9


def finite_rows(stack: Tensor) -> np.ndarray:
    """Return which rows of floats `[K, ...]` hold neither NaN nor infinity, bool `[K]`.

    A row's sum is finite only if all of it is; a row whose sum is not may still be (its sum is out
    of range), and is looked at number by number. One pass, ten times as fast as `isfinite`.
    """
    rows = stack if stack.dim() == 2 else stack.reshape(len(stack), -1)
    finite: np.ndarray = torch.isfinite(rows.sum(dim=1)).numpy()
    if not finite.all():
        for place in np.flatnonzero(~finite).tolist():
            finite[place] = bool(torch.isfinite(rows[place]).all())
    return finite


def refusals(
    stacks: Mapping[str, Tensor | None],
    num_examples: Tensor,
    metrics: Mapping[str, Tensor],
    *,
    message_type: str,
) -> Iterator[tuple[np.ndarray, str, str]]:
    """Yield which replies may not pass, bool `[K]`, with the cause and what is wrong in words.

    Args:
        stacks: Tensors of the replies by name, `[K, ...]`; integers are not looked at.
        num_examples: int64 `[K]`.
        metrics: float64 `[K]` by name.
        message_type: Of the instructions that were answered.
    """
    knob = "setup_lr" if message_type == SETUP else "local_lr"
    for name, stack in stacks.items():
        if stack is not None and stack.is_floating_point() and len(stack):
            what = f"'{name}' holds NaN or infinity; is {knob} too large?"
            yield ~finite_rows(stack), "not finite", what
    counts = num_examples.numpy()
    bounds = f"num-examples must be in 0..{MAX_EXAMPLES}"
    yield (counts < 0) | (counts > MAX_EXAMPLES), "num-examples", bounds
    for name, column in metrics.items():
        values = column.numpy()
        # in an evaluation nan says that the samples do not define a metric; a loss always is
        undefined = message_type == MessageType.EVALUATE and name != "loss"
        bad = np.isinf(values) if undefined else ~np.isfinite(values)
        yield bad, "metrics", f"metric '{name}' is not finite"
