"""Gossip averaging that keeps the models' variance.

Tian, Al-Ars, Kitsak and Hofstee, "Vanishing Variance Problem in Fully Decentralized Neural-Network
Systems", arXiv:2404.04616, Algorithm 3, and the authors' simulators; of the paper's body only the
first page was available. Averaging k uncorrelated tensors divides their variance by k, so models
that start independently shrink until they stop learning; the average is therefore stretched about
its mean to the variance of what it was made of.

Symbols: theta_j^l tensor l of node j, R_j what it received, beta self_weight, mu and var mean and
population variance over the entries of a tensor, tau^l target variance, R buffer_ratio.

Deviations:
- Algorithm 3 averages one set of models. The authors' code, followed here, mixes the received mean
  with the own model first and takes tau from the received alone; target = "all" includes the own
  with its weight, and then the factor is never below 1.
- Only tensors of two or more dimensions are corrected, as in the C++ code of the paper's time:
  biases start at variance 0. correct = "all" is the later PyTorch code.
- Instead of its 1e-4 added to both variances, which shifts the factor by per cents and compounds, a
  guard: without variance of its own (1e-12 of tau) the average stays as it is.
- Under weights that are not uniform, tau is the mean with the same weights.
- What holds of messages, buffers and times in `gossip` holds here.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from torch import Tensor

from fedsim.aggregators.averaging import (
    Target,
    rescale,
    target_variance,
    variance_corrected_average,
)
from fedsim.basics.errors import require_choice, require_positive
from fedsim.federation.topology.mixing import Mixing
from fedsim.federation.topology.topology import Topology
from fedsim.messages.layout import TensorSpec
from fedsim.strategy import Degenerate
from fedsim.strategy.gossip.state import Mail, Protocol, Start
from fedsim.strategy.gossip.strategy import GossipStrategy

__all__ = ["VarianceCorrectedGossip", "variance_corrected_average"]

Correct = Literal["weights", "all"]


@final
class VarianceCorrectedGossip(GossipStrategy):
    """Averages with the neighbours, and gives each tensor the variance that theirs have.

    Args:
        topology: The graph; a ring if left out. In a scenario: the table [topology].
        self_weight: beta, what the own model weighs in "uniform" mixing, in [0, 1].
        mixing: "uniform", neighbours alike; "metropolis", by degrees (keeps the mean over nodes).
        protocol: "synchronous", all train and average in every round; "buffered", each node at
            times of its own, once its buffer is full.
        interval: Rounds between two trainings of a node (buffered): [least, most], drawn uniformly.
        send_every: After how many trainings a node sends its model.
        buffer_ratio: R: a node averages once it holds R models per neighbour (buffered); > 0.
        message_loss: Probability with which a message to one neighbour is lost, in [0, 1].
        start: "own", a random initialisation per node; "shared", the same model for all.
        target: tau is the mean variance of the "received", or of "all" that is averaged.
        correct: "weights", tensors of two or more dimensions; "all", biases and the like too.
        target_scale: Factor on tau, for experiments: 1.01 explodes, 0.99 vanishes; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"start": "shared"}, "gossip", {"start": "shared"}, "identical models", 1e-12),
    )

    def __init__(
        self, *, topology: Topology | None = None, self_weight: float = 0.5,
        mixing: Mixing = "uniform", protocol: Protocol = "synchronous",
        interval: tuple[int, int] = (8, 12), send_every: int = 1, buffer_ratio: float = 1.0,
        message_loss: float = 0.0, start: Start = "own", target: Target = "received",
        correct: Correct = "weights", target_scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(
            topology=topology, self_weight=self_weight, mixing=mixing, protocol=protocol,
            interval=interval, send_every=send_every, buffer_ratio=buffer_ratio,
            message_loss=message_loss, start=start,
        )  # fmt: skip
        require_choice("target", target, Target)
        require_choice("correct", correct, Correct)
        require_positive("target_scale", target_scale)
        self._target: Target = target
        self._correct: Correct = correct
        self._target_scale = target_scale

    def corrected(self) -> Sequence[TensorSpec]:
        """The tensors that are corrected."""
        least = 2 if self._correct == "weights" else 0
        return [spec for spec in self.layout.trainable if len(spec.shape) >= least]

    def merge(self, own: Tensor, variances: Tensor, mail: Mail) -> Tensor:
        """Return mu(mix^l) + sqrt(tau^l / var(mix^l)) (mix^l - mu(mix^l)) for each tensor l."""
        mix = own + (1 - mail.self_weight) * (mail.mean - own)
        tau = target_variance(variances, mail.variances, mail.self_weight, self._target)
        for spec, wanted in zip(self.corrected(), tau.tolist(), strict=True):
            part = self.layout.slices[spec.name]
            mix[part] = rescale(mix[part], self._target_scale * wanted)
        return mix
