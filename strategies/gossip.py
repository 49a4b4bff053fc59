"""Gossip averaging: every node trains its own model and averages it with its neighbours'.

The synchronous form is decentralised SGD: Lian et al., "Can Decentralized Algorithms Outperform
Centralized Algorithms?", NeurIPS 2017 (arXiv:1705.09056), Algorithm 1, with local steps as in
Koloskova et al., ICML 2020 (arXiv:2003.10422). The buffered form, the self weight and the start
from models of the nodes' own are those of Tian et al., arXiv:2404.04616, for whose corrected
average this is the control (`variance_corrected_gossip`).

Symbols: theta_j model of node j, R_j what it received, beta self_weight, R buffer_ratio,
W mixing_matrix.

Deviations:
- A node trains before it averages; Lian et al. take the gradient at the model from before averaging
  and may do both at once.
- In the buffered form all nodes are due in the first tick, as in the authors' simulator, and models
  arrive in the tick in which they are sent; one tick is one round.
- A message that is lost, or holds NaN or infinity, is left out: the others share its weight
  ("uniform") or the node keeps it ("metropolis", so that a pair of nodes which miss each other does
  not move the mean).
- A node keeps its own BatchNorm statistics and integers, as in the authors' code.
"""

from typing import ClassVar, final

from torch import Tensor

from fedsim.aggregators import BeforeName, Recipe, RuleName, Variant
from fedsim.aggregators.averaging import plain_average, variance_corrected_average
from fedsim.federation.topology.kinds import complete
from fedsim.federation.topology.mixing import Mixing
from fedsim.federation.topology.topology import Topology
from fedsim.strategy import Degenerate
from fedsim.strategy.gossip.state import Mail, Protocol, Start
from fedsim.strategy.gossip.strategy import GossipStrategy

__all__ = ["GossipAveraging", "plain_average", "variance_corrected_average"]


@final
class GossipAveraging(GossipStrategy):
    """Averages each node's model with those of its neighbours in a graph; there is no server.

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
        rule: What a node makes of its model and those received, in place of the received ones'
            mean: a rule of `robust`; the own model weighs self_weight besides.
        variant: Of the rule: "paper", "byzfl" or "flag".
        num_byzantine: f, how many of them may be anything; >= 0. None takes the most that they
            bear; where fewer arrive than a given f asks for, a node keeps its model.
        before: What is done to them first: "nnm", "bucketing", "clipping", "arc".
        num_selected: How many multi_krum averages; None takes n - f.
        clip_radius: tau of centred_clipping, which begins from the own model; None takes the median
            distance from it.
        clip_iterations: L of centred_clipping; None is 1.
        bucket_size: How many models "bucketing" puts together; None is 2.
        clip_norm: How far from the own model "clipping" lets one be; None takes the median.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate(
            {"topology": complete(), "mixing": "metropolis", "start": "shared"},
            "fedavg",
            {"weighted": False},
            tolerance=1e-12,
        ),
    )

    def __init__(
        self, *, topology: Topology | None = None, self_weight: float = 0.5,
        mixing: Mixing = "uniform", protocol: Protocol = "synchronous",
        interval: tuple[int, int] = (8, 12), send_every: int = 1, buffer_ratio: float = 1.0,
        message_loss: float = 0.0, start: Start = "own", rule: RuleName = "mean",
        variant: Variant = "paper", num_byzantine: int | None = None,
        before: tuple[BeforeName, ...] = (), num_selected: int | None = None,
        clip_radius: float | None = None, clip_iterations: int | None = None,
        bucket_size: int | None = None, clip_norm: float | None = None,
    ) -> None:  # fmt: skip
        if variant == "flower":
            raise ValueError(
                'variant = "flower": must be paper, byzfl or flag; Flower\'s weighs by examples, '
                "which nodes do not send"
            )
        recipe = Recipe(
            rule, variant, num_byzantine, tuple(before), num_selected, clip_radius,
            clip_iterations, bucket_size, clip_norm,
        )  # fmt: skip
        super().__init__(
            topology=topology, self_weight=self_weight, mixing=mixing, protocol=protocol,
            interval=interval, send_every=send_every, buffer_ratio=buffer_ratio,
            message_loss=message_loss, start=start, recipe=recipe,
        )  # fmt: skip

    def merge(self, own: Tensor, variances: Tensor, mail: Mail) -> Tensor:
        """Return beta theta_j + (1 - beta) mean(R_j)."""
        return own + (1 - mail.self_weight) * (mail.mean - own)
