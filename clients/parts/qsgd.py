"""QSGD: a client rounds its update at random to a few levels.

Alistarh, Grubic, Li, Tomioka and Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding", NeurIPS 2017 (arXiv:1610.02132), section 3.1, on the update of a round.

Symbols: s levels.

Deviations: levels take a fixed number of bits in place of Elias coding. With error feedback, which
the paper does not have, what is sent is divided by 1 + omega.
"""

from typing import final

from fedsim.client.compressors import Quantisation
from fedsim.client.error_feedback import ErrorFeedbackPart


@final
class QSGD(ErrorFeedbackPart):
    """Sends the length of the update and a level from -s to s for each parameter.

    Args:
        levels: s, from 1 on.
        error_feedback: Whether what is not sent is kept and added to the next update.

    Raises:
        ValueError: If `levels` is outside its range.
    """

    def __init__(self, *, levels: int = 8, error_feedback: bool = False) -> None:
        super().__init__(Quantisation(levels), error_feedback=error_feedback)
