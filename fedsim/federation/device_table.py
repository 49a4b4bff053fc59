"""What '[devices]' says; needs pydantic alone, for it is read before kernels are pinned."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_FASTEST = 8.0  # standard deviations beyond which no client is ever seen


class Devices(BaseModel):
    """`[devices]`: what happens to selected clients in a round.

    A client that drops out or is late does not answer: it counts as absent, not as failed. A client
    that does a part of its work is still weighed by all the samples that it holds.

    Attributes:
        drop_out: Probability that a selected client drops out in mid-round.
        partial: Probability that a client does only a part of its local work.
        min_work: The smallest such share; shares are uniform in [min_work, 1].
        speed_sigma: Spread of the clients' fixed speeds, log-normal around the median's 1.
        jitter_sigma: Spread of a client's speed from round to round, log-normal.
        deadline: When the round ends, in units of the median client's time for its whole work.
        late: Whether a client that is not done by then is discarded or does the share that fits.
        over_select: So many times the cohort's size are selected, and the first to finish kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    drop_out: float = Field(default=0.0, ge=0, lt=1)
    partial: float = Field(default=0.0, ge=0, le=1)
    min_work: float = Field(default=0.1, gt=0, le=1)
    speed_sigma: float = Field(default=0.0, ge=0, le=10)
    jitter_sigma: float = Field(default=0.0, ge=0, le=10)
    deadline: float | None = Field(default=None, gt=0)
    late: Literal["drop", "partial"] = "drop"
    over_select: float = Field(default=1.0, ge=1, le=100)

    def idle_speeds(self) -> str | None:
        """Say why the speeds change nothing where no clock reads them; None if they do."""
        if self.deadline is None and self.over_select == 1:
            for name in ("speed_sigma", "jitter_sigma"):
                if sigma := getattr(self, name):
                    return (
                        f"{name} = {sigma:g} changes nothing without a 'deadline' or an "
                        "'over_select' above 1: give one of them, or a [clock]"
                    )
        return None

    @model_validator(mode="after")
    def _shares_matter(self) -> Self:
        if self.min_work != 0.1 and not self.partial:
            raise ValueError(
                f"min_work = {self.min_work:g} changes nothing with partial = 0: say how often "
                "clients do a part of their work, or leave it out"
            )
        if self.late == "partial" and self.deadline is None:
            raise ValueError("late = 'partial' changes nothing without a 'deadline': give one")
        return self

    @model_validator(mode="after")
    def _somebody_is_done(self) -> Self:
        if self.deadline is None or self.late == "partial":
            return self
        spread = math.hypot(self.speed_sigma, self.jitter_sigma)
        soonest = (self.min_work if self.partial else 1.0) * math.exp(-_FASTEST * spread)
        if self.deadline < soonest:
            raise ValueError(
                f"deadline = {self.deadline:g}: no client is ever done by then; the soonest takes "
                f"{soonest:.3g} (the median client takes 1 for its whole work); give at least that"
            )
        return self
