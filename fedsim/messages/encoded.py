"""Replies that hold encoded tensors in place of the model's."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.messages.codecs import CODECS, MEMORY, MODEL, SINCE, EncodingError, decoded
from fedsim.messages.layout import Layout
from fedsim.messages.records import ArraysMismatchError, model_tensors, named_tensors

_NAMES = {f"{base}.{name}" for base in (MODEL, MEMORY) for c in CODECS.values() for name in c.names}
_NAMES.add(f"{MEMORY}.{SINCE}")


def is_encoded(record: ArrayRecord) -> bool:
    """Whether a reply's arrays hold what a codec wrote."""
    return bool(_NAMES & set(record))


def is_against_memory(encoded: Mapping[str, Tensor]) -> bool:
    """Whether what was sent is written against what the strategy has of the client."""
    return any(name.startswith(f"{MEMORY}.") for name in encoded)


def encoded_tensors(
    layout: Layout, record: ArrayRecord, received: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return (parameters `[dim]`, buffers, what the codec wrote) of a reply.

    What is written against what the strategy has of the client leaves the parameters as they were.

    Args:
        layout: Of the model.
        record: The reply's arrays.
        received: The parameters that the client started from, `[dim]`.

    Raises:
        ArraysMismatchError: If a name is missing or unknown, or no codec can have written this.
    """
    found = {name for name in record if name in _NAMES}
    _, buffers = model_tensors(
        Layout(tuple(s.name for s in layout.buffers), (), layout.buffers),
        ArrayRecord({name: array for name, array in record.items() if name not in found}),
        strict=True,
    )
    encoded = named_tensors(ArrayRecord({name: record[name] for name in sorted(found)}))
    bases = {name.partition(".")[0] for name in found}
    try:
        if len(bases) > 1:
            raise EncodingError(f"tensors {sorted(found)} are written against two things")
        if (since := encoded.get(f"{MEMORY}.{SINCE}")) is not None and since.shape != (1,):
            raise EncodingError(f"'{MEMORY}.{SINCE}' has shape {tuple(since.shape)}, not (1,)")
        params = decoded(received, _of_codec(encoded))
    except EncodingError as error:
        raise ArraysMismatchError("names", f"what is compressed cannot be read: {error}") from error
    return params if bases == {MODEL} else received, buffers, encoded


def read_memory(base: Tensor, encoded: Mapping[str, Tensor]) -> Tensor:
    """Return rows that are written against rows that the strategy has, `[K, dim]`.

    Args:
        base: What it has of these clients, `[K, dim]`.
        encoded: What was sent, `[K, ...]` by name.
    """
    rows = [
        decoded(row, _of_codec({name: stack[place] for name, stack in encoded.items()}))
        for place, row in enumerate(base)
    ]
    return torch.stack(rows) if rows else base.clone()


def _of_codec(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    told = {name.partition(".")[2]: tensor for name, tensor in encoded.items()}
    return {name: tensor for name, tensor in told.items() if name != SINCE}
