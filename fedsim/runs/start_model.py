"""The model that a run begins with."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedsim.basics.errors import ScenarioError
from fedsim.basics.rng import derived_seed
from fedsim.basics.tensors import tensors_of
from fedsim.client.executor import known_of
from fedsim.client.names import ModelTensors
from fedsim.messages.layout import Layout
from fedsim.messages.records import array_record
from fedsim.scenario.tables import EvaluationTable
from fedsim.tasks import named as tasks
from fedsim.tasks.models.personal import personal_names
from fedsim.tasks.models.pretrained import Pretrained

_NAMED = 6  # personal tensors named in a line; the manifest names all


class StartModel(NamedTuple):
    """The model before round 1.

    Attributes:
        model: The model, with the weights that it starts from.
        layout: How the tensors of messages lie in the flat vector: all but the personal ones.
        options: The options of its task.
        pretrained: Puts weights that were trained before into a model, or None.
        weights: What the manifest says of them, or None.
        personal: Names of the tensors that clients keep to themselves.
    """

    model: nn.Module
    layout: Layout
    options: tasks.TaskOptions
    pretrained: Pretrained | None
    weights: dict[str, Any] | None
    personal: tuple[str, ...] = ()

    def arrays(self) -> ArrayRecord:
        """Return the model as it is sent."""
        state = tensors_of(self.model)
        return array_record({name: state[name] for name in self.layout.names})

    def known(self) -> ModelTensors:
        """Return what client procedures may know of the model."""
        return known_of(Layout.from_model(self.model), self.personal)

    def kept(self) -> tuple[str, ...]:
        """Return the tensors that no round changes on the server."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        average = self.options.buffers == "average"
        return tuple(s.name for s in self.layout.buffers if not average or s.name in parameters)

    def personal_note(self) -> str | None:
        """Return which tensors stay with the clients, in a line; None where all are shared."""
        if not self.personal:
            return None
        tensors = tensors_of(self.model)
        mine = sum(tensors[name].numel() for name in self.personal)
        sent = sum(tensors[name].numel() for name in self.layout.names)
        more = len(self.personal) - _NAMED
        names = ", ".join(self.personal[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return (
            f"[task] personal: {names} ({mine:,} of {mine + sent:,} numbers) stay with each client "
            "and are in no message; the server tests no model"
        )

    def check_sent(self, sent: Sequence[str]) -> None:
        """Refuse a strategy that sends a tensor for every shared parameter where there are none.

        Args:
            sent: What the strategy sends besides the model.

        Raises:
            ScenarioError: Naming the key.
        """
        if sent and not self.layout.trainable:
            raise ScenarioError(
                f"[task] personal: all parameters are, so the {', '.join(sent)} that the strategy "
                'sends is of nothing; use [strategy] name = "fedavg", which then leaves every '
                "client alone"
            )

    def check_evaluation(self, evaluation: EvaluationTable) -> None:
        """Refuse to measure on the server what it does not have.

        Raises:
            ScenarioError: Naming the key.
        """
        if self.personal and evaluation.pooled:
            raise ScenarioError(
                "[evaluation] pooled = true with [task] personal: the server has no whole model "
                "that it could measure; use clients = K, which gives local/... and personal/..."
            )

    def check_buffers(self) -> None:
        """Refuse a policy for statistics that the model does not have.

        Raises:
            ScenarioError: Naming the key.
        """
        if self.options.buffers != "average" and not any(True for _ in self.model.buffers()):
            raise ScenarioError(
                f"[task] buffers = '{self.options.buffers}': the model has no statistics, as "
                "BatchNorm keeps them, that it could be about; leave it out"
            )


def with_weights(model: nn.Module, table: Mapping[str, Any], *, on_node: bool) -> StartModel:
    """Return what a run begins with.

    Args:
        model: The model as it is initialised; it is given the weights that `table` names.
        table: The scenario's table [task].
        on_node: Whether the weights come with the server's first message.

    Raises:
        ScenarioError: If the weights are not this model's.
    """
    options = tasks.options_of(table)
    personal = personal_names(model, options.personal)
    layout = Layout.from_model(model).without(personal)
    pretrained, weights = None, None
    if options.weights is not None and not on_node:
        pretrained = Pretrained(options.weights, strict=options.strict_weights)
        weights = pretrained.put_into(model)
    return StartModel(model, layout, options, pretrained, weights, personal)


def personal_start(task: tasks.Task, table: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Return the personal tensors as every client has them before it first trains, by name.

    They are those of the run's initial model: of the seed, or of the file of weights, which must
    then lie on every machine that trains clients.

    Args:
        task: The task.
        table: The scenario's table [task].
        seed: The scenario's seed.

    Raises:
        ScenarioError: If a pattern names nothing that can be personal, or the file cannot be read.
    """
    options = tasks.options_of(table)
    if not options.personal:
        return {}
    start = with_weights(task.build_model(seed), table, on_node=False)
    tensors = tensors_of(start.model)
    return {name: tensors[name].detach().clone() for name in start.personal}


def own_start(
    task: tasks.Task, layout: Layout, seed: int, pretrained: Pretrained | None, client: int
) -> Tensor:
    """Return the model that a client would have initialised by itself, `[dim]`."""
    model = task.build_model(derived_seed(seed, "own start", client))
    if pretrained is not None:
        pretrained.put_into(model)
    with torch.no_grad():
        return layout.flatten(tensors_of(model))
