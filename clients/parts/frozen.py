"""FedBABU's body-only training: tensors that keep their initial values.

Oh, Kim and Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR
2022 (arXiv:2106.06042), Algorithm 1: the body is trained and averaged, the head stays as it was
initialised, the same at all clients. A client is evaluated after fine-tuning what it received.

Symbols: theta_cls tensors, theta_ext the others.

Deviations: statistics of BatchNorm are no parameters and go on being measured. Fine-tuning is
`[evaluation] finetune`, of all tensors or of some.
"""

from collections.abc import Sequence
from typing import final

from fedsim.client.freezing import head_of
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.part import ClientPart
from fedsim.client.procedure import Work


@final
class Frozen(ClientPart):
    """Lets some tensors take no step in training; unlike `[task] freeze`, fine-tuning moves them.

    Args:
        tensors: Which: whole names, leading parts of names ("output") or patterns with `*`; None
            takes those of `[task] personal`, and freezes nothing where nothing is personal.

    Raises:
        ScenarioError: If a pattern names no trained tensor, or no tensor is left to train; once the
            model is known.

    Example:
        >>> part = Frozen(tensors=["output"])
        >>> known = ModelTensors(("hidden1.bias", "output.bias"))
        >>> part.for_model(known, Work(32, 1, None)).frozen
        (frozenset({'output.bias'}),)
    """

    stacks = True
    names_personal = "tensors"

    def __init__(self, *, tensors: Sequence[str] | None = None) -> None:
        self._patterns = tensors
        self._frozen: FrozenByEpoch = ()

    @property
    def strength(self) -> float:
        """0: what moves takes plain steps."""
        return 0.0

    @property
    def frozen(self) -> FrozenByEpoch:
        """The tensors, in every epoch."""
        return self._frozen

    def for_model(self, tensors: ModelTensors, work: Work) -> "Frozen":
        """Return the part with its tensors' names."""
        names = head_of("frozen", "tensors", self._patterns, tensors)
        made = Frozen(tensors=self._patterns)
        made._frozen = (names,) if names else ()
        return made
