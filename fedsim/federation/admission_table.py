"""What '[admission]' says; needs pydantic alone, for it is read before kernels are pinned."""

from pydantic import BaseModel, ConfigDict, Field


class Admission(BaseModel):
    """`[admission]`: how far one reply may move the model.

    A reply beyond a bound is refused: its client has failed in that round, for the cause
    `update norm`. Both bounds are discontinuities: a norm on the edge is in or out by rounding.

    Attributes:
        max_update_norm: Largest Euclidean norm of an update, in the model's own units; of a reply
            that is compressed against what the server has of the client, of what it adds to that.
        max_update_factor: Largest norm as a multiple of the median of the round's norms; needs
            three replies to mean anything, and says nothing of fewer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_update_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_update_factor: float | None = Field(default=None, gt=1, allow_inf_nan=False)
