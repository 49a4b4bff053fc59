"""What clients return besides the model, stacked as a strategy's kernels take it."""

import torch
from torch import Tensor

from fedsim.basics.errors import RunError
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies


def returned_rows(replies: Replies, name: str, part: str, layout: Layout) -> Tensor:
    """Return tensors of the model's shapes that clients returned under a name, `[K, dim]`.

    It may be the replies' own memory, which nobody may change.

    Args:
        replies: The admitted replies.
        name: The first part of the tensors' names.
        part: The part of local training that returns them, for messages.
        layout: How the model's tensors lie in a flat vector.

    Raises:
        RunError: If clients returned none.
    """
    if not replies.num_clients:
        return torch.zeros((0, layout.dim), dtype=layout.dtype)
    start = f"{name}."
    extra = replies.extra.items()
    found = {key.removeprefix(start): t for key, t in extra if key.startswith(start)}
    if found.keys() != layout.slices.keys():
        raise RunError(_missing(replies, name, part))
    flat = layout.flat_behind(found)
    return layout.flatten(found) if flat is None else flat


def returned_numbers(replies: Replies, name: str, part: str) -> Tensor:
    """Return the number that each client returned under a name, float64 `[K]`.

    Raises:
        RunError: If clients returned none.
    """
    if not replies.num_clients:
        return torch.zeros(0, dtype=torch.float64)
    if name not in replies.extra:
        raise RunError(_missing(replies, name, part))
    return replies.extra[name].double().reshape(replies.num_clients)


def _missing(replies: Replies, name: str, part: str) -> str:
    return (
        f"round {replies.server_round}: clients returned no '{name}', which the strategy needs; "
        f'give them the part: [client] parts = [{{ name = "{part}" }}]'
    )
