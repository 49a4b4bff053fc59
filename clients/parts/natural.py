"""Natural compression: a client rounds its update at random to powers of two.

Horvath, Ho, Horvath, Sahu, Canini and Richtarik, "Natural Compression for Distributed Deep
Learning", MSML 2022 (arXiv:1905.10988), definition 1, on the update of a round.

Symbols: none.

Deviations: what is smaller than the smallest normal number of the dtype becomes 0.
"""

from typing import final

from fedsim.client.compressors import Natural
from fedsim.client.error_feedback import ErrorFeedbackPart


@final
class NaturalCompression(ErrorFeedbackPart):
    """Sends sign and exponent of what every parameter moved by: 9 bits in float32, 12 in float64.

    Args:
        error_feedback: Whether what is not sent is kept and added to the next update.
    """

    def __init__(self, *, error_feedback: bool = False) -> None:
        super().__init__(Natural(), error_feedback=error_feedback)
