"""Top-K: a client sends the entries of its update that are largest.

Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018 (arXiv:1809.07599),
Algorithm 1, on the update of a round.

Symbols: K / d share, m the error that is kept.

Deviations: of equal entries those with the lowest index are sent. New values of parameters are
sent, not differences, so that with share = 1 the bits of the model are those without compression.
"""

from typing import final

from fedsim.client.compressors import TopK
from fedsim.client.error_feedback import ErrorFeedbackPart


@final
class TopKUpdate(ErrorFeedbackPart):
    """Sends K of d parameters, those that moved most, and their places.

    Args:
        share: K / d, in (0, 1]; at least one entry is sent.
        error_feedback: Whether what is not sent is kept and added to the next update.

    Raises:
        ValueError: If `share` is outside its range.
    """

    def __init__(self, *, share: float = 0.1, error_feedback: bool = True) -> None:
        super().__init__(TopK(share), error_feedback=error_feedback)
