"""Random-K: a client sends entries of its update at random places.

Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018 (arXiv:1809.07599),
Algorithm 1, on the update of a round.

Symbols: K / d share, m the error that is kept.

Deviations: places are sent, though a shared seed could tell them. Without error feedback what is
sent is scaled by d / K, so that its mean is the update.
"""

from typing import final

from fedsim.client.compressors import RandomK
from fedsim.client.error_feedback import ErrorFeedbackPart


@final
class RandomKUpdate(ErrorFeedbackPart):
    """Sends K of d parameters, drawn anew in every round, and their places.

    Args:
        share: K / d, in (0, 1]; at least one entry is sent.
        error_feedback: Whether what is not sent is kept and added to the next update.

    Raises:
        ValueError: If `share` is outside its range.
    """

    def __init__(self, *, share: float = 0.1, error_feedback: bool = False) -> None:
        super().__init__(RandomK(share), error_feedback=error_feedback)
