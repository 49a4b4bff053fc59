"""What a `[task]` table says besides the kind, the model and their own keys. Needs torch alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

BufferPolicy = Literal["average", "local", "reset"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Keys of `[task]` that every kind of task and every model has.

    Args:
        weights: A safetensors file with what the model starts from, beside the scenario or by its
            whole path; its hash is in the manifest.
        strict_weights: Whether the file must hold exactly the model's tensors; otherwise what fits
            by name and shape is taken, and the rest (a new head) keeps its initialisation.
        freeze: Parameters that are not trained: whole names, leading parts ("layer1") or patterns
            ("*.bn1.*"). They stay as they are and out of the vector that is aggregated.
        augment: What happens to training images: `crop` (pixels of zero padding around a random
            crop of the old size), `flip` (probability of a mirror image), `noise` (standard
            deviation of Gaussian noise).
        buffers: What becomes of statistics such as BatchNorm's after local training: "average" on
            the server, with integers at their largest; "local", in the client's state, never sent;
            "reset", thrown away.
        personal: Parameters and buffers that each client keeps to itself: whole names, leading
            parts ("output") or patterns ("*norm*"). They are trained and evaluated with as all
            others, lie in the client's state and are in no message.
    """

    weights: str | None = None
    strict_weights: bool = True
    freeze: Sequence[str] = ()
    augment: dict[str, Any] | None = None
    buffers: BufferPolicy = "average"
    personal: Sequence[str] = ()


OPTION_KEYS = tuple(each.name for each in fields(TaskOptions))


def options_of(table: Mapping[str, Any]) -> TaskOptions:
    """Return the options among a validated `[task]` table's keys."""
    return TaskOptions(**{key: table[key] for key in OPTION_KEYS if key in table})
