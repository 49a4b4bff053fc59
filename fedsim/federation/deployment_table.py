"""What '[deployment]' says; needs pydantic alone, for it is read before kernels are pinned."""

from pydantic import BaseModel, ConfigDict, Field


class WhoMustBeThere(BaseModel):
    """`[deployment]`: which sites a run does not go on without, and how long it waits for them.

    Attributes:
        required: Clients whose reply must be in every round that selects them; the run ends when
            one of them fails, with its cause. In a simulation too.
        min_sites: How many sites must be there before round 1, if not all; the others have died in
            every round that selects them, until their nodes join. Not in a simulation, which has
            all of them.
        wait_s: Seconds to wait for all nodes before round 1.
        rejoin_s: Seconds that an instruction waits for a node that is gone, so that a SuperNode
            which is started again takes part in the same round; 0 goes on without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    required: list[int] = Field(default_factory=list)
    min_sites: int | None = Field(default=None, ge=1)
    wait_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    rejoin_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
