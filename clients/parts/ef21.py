"""EF21 at the client: it sends the compressed change of what the server remembers of it.

Richtarik, Sokolov and Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically
Faster Error Feedback", NeurIPS 2021 (arXiv:2106.05203), Algorithm 2, lines 4 to 6; with weights
Richtarik, Gasanov and Burlachenko, "Error Feedback Reloaded", ICLR 2024 (arXiv:2402.10774).

Symbols: g_i memory, C compressor, c_i what is sent, n w_i scale.

Deviations:
- The update of a round, -Delta_i, is in place of the gradient: after one full step of size gamma it
  is gamma times the gradient.
- A client keeps the memory before its last reply, too, and goes on from it where that reply was
  lost: the server says which round it remembers. A client that has neither starts from 0 and says
  so.
"""

from typing import ClassVar, final

import torch

from fedsim.basics.idle import Idle
from fedsim.client.compression import Compressed, CompressingPart, Outcome, begins
from fedsim.client.compressors import IDLE
from fedsim.client.compressors import compressor as named
from fedsim.client.procedure import Named
from fedsim.messages.codecs import MEMORY, SINCE, decoded

EF21 = "ef21"  # what the strategy sends: `ef21.since` and `ef21.scale`
BEFORE, ROUND, EARLIER = "before", "round", "earlier"


@final
class EF21Memory(CompressingPart):
    """Sends c_i = C(Delta_i / scale - g_i) and remembers g_i + c_i, as the server does.

    Args:
        compressor: "top_k", "random_k", "qsgd", "sign" or "natural".
        share: K / d of top_k and random_k, in (0, 1].
        levels: s of qsgd, from 1 on.

    Raises:
        ValueError: If an argument is impossible.
    """

    takes: ClassVar[tuple[str, ...]] = (EF21,)
    needs: ClassVar[tuple[str, ...]] = (EF21,)
    idle: ClassVar[tuple[Idle, ...]] = IDLE

    def __init__(self, *, compressor: str = "top_k", share: float = 0.05, levels: int = 8) -> None:
        self._compressor = named(compressor, share=share, levels=levels)

    def initial_state(self, params: Named) -> Named:
        """Return g_i = 0, of round 0."""
        numbers = {name: torch.zeros((), dtype=torch.float64) for name in (ROUND, EARLIER)}
        return begins(params, MEMORY, BEFORE) | numbers

    def compressed(self, outcome: Outcome) -> Compressed:
        """Return c_i, written against the g_i that the server has, and the new g_i."""
        kept, sent = outcome.kept, outcome.sent
        since = int(sent[f"{EF21}.since"]) if f"{EF21}.since" in sent else int(kept[ROUND])
        if since == int(kept[ROUND]):
            base = kept[MEMORY]
        elif since == int(kept[EARLIER]):
            base = kept[BEFORE]
        else:  # neither: this client forgot, or the server did
            base, since = torch.zeros_like(kept[MEMORY]), 0
        wanted = outcome.trained - outcome.received
        if f"{EF21}.scale" in sent:
            wanted = wanted / sent[f"{EF21}.scale"].to(wanted.dtype)
        encoded = self._compressor.encode(base, wanted, outcome.draw, feedback=True)
        rounds = [
            torch.tensor(float(r), dtype=torch.float64) for r in (outcome.server_round, since)
        ]
        after = {MEMORY: decoded(base, encoded), BEFORE: base, ROUND: rounds[0], EARLIER: rounds[1]}
        written = encoded | {SINCE: torch.tensor([since], dtype=torch.int32)}
        return Compressed(MEMORY, written, outcome.received, after)
