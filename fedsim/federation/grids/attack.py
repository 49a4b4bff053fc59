"""The Grid that lets Byzantine clients attack, and records who did."""

from dataclasses import replace

import numpy as np
import torch
from flwr.app import MessageType
from flwr.serverapp import Grid

from fedsim.federation.attacks.attack import Attack, Forge, Seen, Sees
from fedsim.federation.grids.wrapper import GridWrapper, Observed, training_round
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies


class AttackGrid(GridWrapper):
    """Replaces the updates that Byzantine clients reply to training; nothing else of a reply.

    A set-up exchange and evaluation stay as they are: the attacks are defined on the updates of a
    round. Clients whose training failed or is not finite do not attack. Stands inside an
    `AdmissionGrid`, which then judges what was forged.

    Args:
        inner: The Grid around which this one stands.
        attack: Who attacks, and with what.
        layout: The model's layout.
        seed: The scenario's seed.
    """

    def __init__(self, inner: Grid, attack: Attack, layout: Layout, *, seed: int) -> None:
        super().__init__(inner)
        self.attack, self.seed = attack, seed
        self._layout = layout
        self._attacked: set[int] = set()

    @property
    def layout(self) -> Layout:
        """The model's layout."""
        return self._layout

    def begin_round(self, server_round: int) -> None:
        """Forget who attacked in the round before."""
        self._attacked = set()
        super().begin_round(server_round)

    def observed(self) -> Observed:
        """Return who attacked in the round, besides what others have seen."""
        found = {"clients/byzantine": len(self._attacked)}
        record = {"byzantine": sorted(self._attacked)}
        return super().observed().joined(Observed(found, record))

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies, with those to training attacked."""
        replies = self.passed_on(cohort, timeout)
        if cohort.message_type != MessageType.TRAIN:
            return replies
        server_round = training_round(cohort)
        byzantine = self.attack.byzantine_clients(self.num_clients, self.seed, server_round)
        if self.attack.forge is None:
            self._attacked |= set(byzantine.tolist()) & set(cohort.client_ids.tolist())
            return replies
        self._attacked |= set(byzantine.tolist()) & set(replies.client_ids.tolist())
        return attacked(replies, self.attack.forge, byzantine, self.seed, self.attack.sees)


def attacked(
    replies: Replies,
    forge: Forge,
    byzantine: np.ndarray,
    seed: int,
    sees: Sees = "honest updates",
) -> Replies:
    """Return replies in which the Byzantine clients' models are reference + forged update.

    Args:
        replies: To training; they stay as they are.
        forge: See `Attack`.
        byzantine: The Byzantine clients' ids, whether they replied or not.
        seed: The scenario's seed.
        sees: What `forge` is told.
    """
    honest = replies.admit()  # nobody can compute with what is not finite
    places = np.flatnonzero(np.isin(honest.client_ids, byzantine))
    if not len(places):
        return replies
    assert honest.params is not None
    assert honest.reference is not None
    is_byzantine = torch.zeros(honest.num_clients, dtype=torch.bool)
    is_byzantine[places] = True
    seen = Seen(honest.update, is_byzantine, honest.client_ids, honest.server_round, seed)
    seen = seen.limited(sees)
    start = honest.reference if honest.reference.dim() == 1 else honest.reference[is_byzantine]
    params = honest.params.clone()  # the rows are the engine's
    params[is_byzantine] = (start + forge(seen)).to(params.dtype)
    built = {p: message for p, message in honest._built.items() if p not in places}
    return replace(honest, params=params, admitted=False, _built=built)
