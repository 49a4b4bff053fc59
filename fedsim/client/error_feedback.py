"""Compression of updates with error feedback: what is not sent now is sent later.

Seide et al., Interspeech 2014; Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD
and other Gradient Compression Schemes", ICML 2019 (arXiv:1901.09847), Algorithm 2, on a client's
update of a round in place of one gradient.

Symbols: e error, C the compression operator, Delta the update.
"""

import abc

from fedsim.client.compression import Compressed, CompressingPart, Outcome, begins
from fedsim.client.compressors import Compressor
from fedsim.client.procedure import Named
from fedsim.messages.codecs import MODEL, decoded

ERROR = "error"


class ErrorFeedbackPart(CompressingPart, abc.ABC):
    """Sends the model received plus C(Delta + e) and keeps e' = Delta + e - C(Delta + e).

    Args:
        compressor: C.
        error_feedback: Whether e is kept; without it e = 0.
    """

    def __init__(self, compressor: Compressor, *, error_feedback: bool) -> None:
        self._compressor, self._feedback = compressor, error_feedback

    def initial_state(self, params: Named) -> Named:
        """Return e = 0."""
        return begins(params, ERROR) if self._feedback else {}

    def compressed(self, outcome: Outcome) -> Compressed:
        """Return C(Delta + e), written against the model received, and the new e."""
        wanted = outcome.trained
        if self._feedback:
            wanted = wanted + outcome.kept[ERROR]
        encoded = self._compressor.encode(
            outcome.received, wanted, outcome.draw, feedback=self._feedback
        )
        params = decoded(outcome.received, encoded)
        kept = {ERROR: wanted - params} if self._feedback else {}
        return Compressed(MODEL, encoded, params, kept)
