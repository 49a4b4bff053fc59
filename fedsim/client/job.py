"""The cohort executor's input and output, and the interfaces of the data and tasks that it uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fedsim.basics.samples import SampleSpec
from fedsim.client.procedure import ClientProcedure
from fedsim.messages.layout import Payload, Rows

ExecutorKind = Literal["batched", "vmap", "loop"]
Action = Literal["train", "evaluate"]

FINETUNED = "finetuned/"  # what metrics after fine-tuning begin with
PERSONALISED = "personalised"  # the metric that says who evaluated with tensors of its own
OWN = "own/"  # before the metrics of a client's own model, beside those of the model received


class ClientArrays(Protocol):
    """The data of federated clients, as `fedsim.data.FederatedData` offers it."""

    num_clients: int
    spec: SampleSpec

    def sizes(self, client_ids: Sequence[int]) -> Any:
        """Return each client's number of training samples."""

    def clients(self, client_ids: Sequence[int], *, split: str = "train") -> Any:
        """Return pooled features and targets with each client's row numbers."""


class SettingsError(ValueError):
    """A round's config asks for what these clients cannot do."""


class Settings(Protocol):
    """What a procedure's hyperparameters may be in a round, as `ClientSettings` offers it."""

    def overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters that a config gives other values."""

    def procedure(self, overrides: Mapping[str, Any]) -> ClientProcedure:
        """Return the procedure with these values."""


class TaskLike(Protocol):
    """Loss and metrics, as `fedsim.tasks.Task` offers them."""

    dtype: torch.dtype

    def build_model(self, seed: int) -> nn.Module:
        """Return the model with the initial parameters of that seed."""

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per sample."""

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return additive sums over the samples that are not padding."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return metrics from those sums."""


@dataclass(frozen=True)
class ChunkJob:
    """One chunk of a cohort: what it takes to train or evaluate these clients.

    Attributes:
        action: "train" or "evaluate".
        server_round: The round, from 1.
        client_ids: The chunk's members in client order.
        absent: Members whose slot stays neutral (dropped out, or the culprit of a fault).
        layout: Fingerprint of the layout that the payloads follow.
        shared: What all members receive.
        personal: What each receives, one row per member.
        state: The members' states, one row each; empty when none of them has any.
        has_state: Which members have trained before (the others get their initial state).
        work: The share of its local work that each member does, in (0, 1]; none given when all do
            the whole.
        clipping_norm: Bound on the Euclidean norm of each member's update; None does not clip.
        settings: Hyperparameters of the procedure that have other values for these members.
        rounds: The round by which each member draws, where they differ; none when all draw by
            `server_round`.
        slots: In how many slots the members are trained at least, the last one again and again: a
            member's bits depend on their number.
    """

    action: Action
    server_round: int
    client_ids: tuple[int, ...]
    absent: tuple[bool, ...]
    layout: str
    shared: Payload
    personal: Payload = field(default_factory=Payload)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    has_state: tuple[bool, ...] = ()
    work: tuple[float, ...] = ()
    clipping_norm: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[int, ...] = ()
    slots: int = 0

    def round_of(self, member: int) -> int:
        """The round by which a member draws."""
        return self.rounds[member] if self.rounds else self.server_round

    @property
    def members_in_slots(self) -> list[int]:
        """The member in each slot; a lone one is there twice, for torch takes other kernels."""
        members = list(range(len(self.client_ids)))
        return members + members[-1:] * (max(2, self.slots) - len(members))


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk's members return, one row per member in client order.

    Attributes:
        params: `[C, dim]` after training, or its rows; None after evaluation.
        buffers: By name, `[C, ...]`, each in its own dtype.
        extra: What the procedure returns besides the model, `[C, ...]`.
        state: The members' states after the round.
        num_examples: int64 `[C]`; 0 for a neutral slot.
        metrics: float64 `[C]` by name.
        samples: Over all steps of training, those of the members.
        computed: What the model was given for them, padding included.
        seconds: How long the worker took for it.
        encoded: What is sent in place of the parameters where replies are compressed, `[C, ...]`;
            `params` is then what the server reads from it.
    """

    params: Rows | None
    buffers: dict[str, Tensor]
    extra: dict[str, Tensor]
    state: dict[str, Tensor]
    num_examples: Tensor
    metrics: dict[str, Tensor]
    samples: int = 0
    computed: int = 0
    seconds: float = 0.0
    encoded: dict[str, Tensor] = field(default_factory=dict)
