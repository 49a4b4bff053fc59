"""What is said of a model's tensors by their names."""

from typing import NamedTuple

# The tensors that take no step, by epoch of a round; the last entry is of all that follow. Empty
# where every tensor takes every step. See `fedsim.client.freezing`.
FrozenByEpoch = tuple[frozenset[str], ...]


class ModelTensors(NamedTuple):
    """What a procedure may know of the model that it trains.

    Attributes:
        trained: Names of the trainable tensors, in the model's order.
        personal: Names of those tensors, buffers among them, that clients keep to themselves.
    """

    trained: tuple[str, ...]
    personal: frozenset[str] = frozenset()
