"""Scaled sign: a client sends one bit of every entry of its update, and their mean size.

Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", ICML 2019 (arXiv:1901.09847), Algorithm 2, on the update of a round.

Symbols: e the error that is kept.

Deviations: 0 counts as positive; one mean size of the whole model in place of one per layer.
"""

from typing import final

from fedsim.client.compressors import Signs
from fedsim.client.error_feedback import ErrorFeedbackPart


@final
class SignUpdate(ErrorFeedbackPart):
    """Sends the sign of what every parameter moved by, and the mean size.

    Args:
        error_feedback: Whether what is not sent is kept and added to the next update.
    """

    def __init__(self, *, error_feedback: bool = True) -> None:
        super().__init__(Signs(), error_feedback=error_feedback)
