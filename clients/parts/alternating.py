"""FedRep's alternation: the head alone in the first epochs of a round, then the body alone.

Collins, Hassani, Mokhtari and Shakkottai, "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021 (arXiv:2102.07078), Algorithm 1: a client takes tau steps of its own
head with the body received, then steps of the body with that head, and sends the body.

Symbols: tau head_epochs (in passes over the client's samples), h head, phi the other tensors.

Deviations: both phases count in epochs, of which `[client] local_epochs` says the number in all;
the paper's analysis takes one step of the body, its experiments an epoch. Statistics of BatchNorm
are no parameters and go on being measured while their layer takes no step.
"""

from collections.abc import Sequence
from typing import final

from fedsim.basics.errors import ScenarioError, require_at_least
from fedsim.client.freezing import head_of
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.part import ClientPart
from fedsim.client.procedure import Work


@final
class Alternating(ClientPart):
    """Trains the head alone in the first epochs of a round, and all else alone in the others.

    Args:
        head_epochs: Epochs of the head, the first of a round; >= 0 and fewer than `local_epochs`. 0
            never trains the head.
        head: Which tensors are the head: whole names, leading parts of names ("output") or patterns
            with `*`; None takes those of `[task] personal`. Where nothing is personal, all tensors
            train in every epoch.

    Raises:
        ValueError: If `head_epochs` is negative.
        ScenarioError: If a pattern names no trained tensor, or no epoch or no tensor is left
            besides the head; once the model is known.

    Example:
        >>> known = ModelTensors(("hidden1.bias", "output.bias"), frozenset(["output.bias"]))
        >>> part = Alternating(head_epochs=1).for_model(known, Work(32, 2, None))
        >>> [sorted(names) for names in part.frozen]
        [['hidden1.bias'], ['output.bias']]
    """

    stacks = True
    names_personal = "head"

    def __init__(self, *, head_epochs: int = 1, head: Sequence[str] | None = None) -> None:
        require_at_least("head_epochs", head_epochs, 0)
        self._epochs, self._patterns = head_epochs, head
        self._frozen: FrozenByEpoch = ()

    @property
    def strength(self) -> float:
        """0: what moves takes plain steps."""
        return 0.0

    @property
    def frozen(self) -> FrozenByEpoch:
        """All but the head in the first epochs, the head in those that follow."""
        return self._frozen

    def for_model(self, tensors: ModelTensors, work: Work) -> "Alternating":
        """Return the part with its head's names."""
        head = head_of("alternating", "head", self._patterns, tensors)
        made = Alternating(head_epochs=self._epochs, head=self._patterns)
        if not head:
            return made
        said = f"[client.parts] alternating: head_epochs = {self._epochs}"
        if work.epochs is None:
            raise ScenarioError(
                f"{said} with local_steps = {work.steps}: epochs are counted, and a client may "
                "take fewer steps than one has; give local_epochs in place of local_steps"
            )
        if self._epochs >= work.epochs:
            raise ScenarioError(
                f"{said} with local_epochs = {work.epochs}: no epoch is left for the other "
                "tensors; must be < local_epochs"
            )
        body = frozenset(tensors.trained) - head
        made._frozen = (body,) * self._epochs + (head,)
        return made
