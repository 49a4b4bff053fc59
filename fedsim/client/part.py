"""What a part of local training is: one change of what a client does. Needs torch alone.

A concrete part lives in one file under `clients/parts/`, and a scenario names it in a list:
`[client] parts = [{ name = "proximal", mu = 0.1 }]`. A procedure that takes parts, such as
`local_sgd`, calls their methods in every step, each method for all parts in the order of the list.
Like a procedure, a part is made of pure functions over named tensors, which run for one client,
under `torch.func.vmap`, or, where it `stacks`, on several clients' tensors at once, one row each.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from fedsim.basics.idle import Idle
from fedsim.client.names import FrozenByEpoch, ModelTensors
from fedsim.client.procedure import Batch, Draw, Gradient, Named, Objective, Work

Own = dict[str, Any]  # what a part carries through a client's steps: a tree of tensors


class Here(NamedTuple):
    """Where a client stands before a step.

    Attributes:
        params: The trainable tensors by name.
        buffers: The model's buffers by name.
        batch: The step's samples.
        gradient: Gives loss and gradient at any parameters.
        step_size: eta_l, of this step: a number, or a tensor with one per client, see `along`.
    """

    params: Named
    buffers: Named
    batch: Batch
    gradient: Gradient
    step_size: float | Tensor

    def gradient_at(self, params: Named) -> Named:
        """Return the gradient of the task's loss on the same samples at other parameters."""
        return self.gradient(params, self.buffers, self.batch)[1]

    def outputs_at(self, params: Named) -> Tensor:
        """Return the model's outputs on the same samples at other parameters, without a graph."""
        return self.gradient.outputs(params, self.buffers, self.batch)

    def representations_at(self, params: Named) -> Tensor:
        """Return what goes into the last layer on the same samples, without a graph."""
        return self.gradient.representations(params, self.buffers, self.batch)


class Trained(NamedTuple):
    """What a client's training in a round came to.

    Attributes:
        received: The trainable tensors that it started from.
        params: Those that it ended with.
        steps: How many steps it took: a number, of the tensors' dtype; 0 without samples.
        path: The sum of the step sizes of these steps, likewise.
        momentum: The optimiser's, in [0, 1); None where it is none of SGD's.
    """

    received: Named
    params: Named
    steps: Tensor
    path: Tensor
    momentum: float | None


class ClientPart:
    """One change of local training as pure functions; concrete parts are final.

    Every method has a default that changes nothing. What a method gets as `own` is what `begin`
    returned, or what `gradient` made of it since. Nothing may branch on a tensor's value, call
    `.item()` or draw random numbers. Steps that a client does not take are undone by the executor.

    Attributes:
        takes: What it uses of what a strategy sends besides the model, by the first part of the
            tensors' names.
        knows: What it asks to know of the client's training samples, see `ClientProcedure`; `begin`
            finds it among what was sent.
        needs: What of this it cannot do without: a strategy that sends it must be chosen.
        stacks: Whether its methods also take several clients' tensors at once, one row each. A
            penalty or objective that uses `own` is then a `BoundObjective` one.
        idle: Which of its hyperparameters are without effect beside others.
        names_personal: The hyperparameter that names tensors, and for which those of `[task]
            personal` stand where it is None; the part is then without effect where nothing is.
        compresses: Whether it compresses the reply, see `fedsim.client.compression`.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    knows: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    stacks: ClassVar[bool] = False
    idle: ClassVar[tuple[Idle, ...]] = ()
    names_personal: ClassVar[str | None] = None
    compresses: ClassVar[bool] = False

    @property
    def needs_classes(self) -> str | None:
        """The hyperparameter that needs classes as targets ("coefficient = 0.1"), or None."""
        return None

    @property
    def needs_numbers(self) -> str | None:
        """The hyperparameter that needs features that are numbers ("radius = 0.1"), or None."""
        return None

    @property
    def draws(self) -> Mapping[str, Draw]:
        """What is to be drawn for the samples of a step, by a purpose that is its own.

        Every step finds it in `batch.drawn`. It depends on seed, round, client and step alone.
        """
        return {}

    @property
    def holds_out(self) -> float:
        """The share of the client's training samples that no step trains on, in [0, 1).

        Every batch brings some of them along, see `ClientProcedure.holds_out`.
        """
        return 0.0

    @property
    def needs_representations(self) -> str | None:
        """The hyperparameter that needs a model whose last layer is linear, or None."""
        return None

    @property
    def strength(self) -> float | None:
        """The number a of a change of the gradient that is linear: g + a * p + b; else None.

        The executor may then take the steps itself, with b from `push`, and call `begin`, `push`
        and `finish` alone. With a part whose change is not linear it cannot.
        """
        return None

    @property
    def frozen(self) -> FrozenByEpoch:
        """The tensors that take no step, by epoch of the round; the last entry is of all after it.

        They keep their optimiser's moments, too. In a set-up exchange all of them take their steps.
        A part that only freezes is linear.
        """
        return ()

    @property
    def guides(self) -> Literal["step", "gradient"] | None:
        """Where the guidance that a strategy sends acts, if this part makes it act."""
        return None

    def setup_work(self, work: Work) -> Work:
        """Return how much is trained in a set-up exchange, given how much it would be."""
        return work

    def setup_step_size(self, step_size: float) -> float:
        """Return the step size in a set-up exchange, given what it would be."""
        return step_size

    def for_model(self, tensors: ModelTensors, work: Work) -> "ClientPart":
        """Return the part as it trains a certain model; what it knows by itself, it leaves.

        Args:
            tensors: What is known of the model.
            work: How much is trained per round.

        Raises:
            ValueError: If it cannot train that model, or not in so much work.
        """
        return self

    def initial_state(self, params: Named) -> Named:
        """Return the part's client state before the client first trains."""
        return {}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Return what the part carries through the steps of a round.

        Args:
            received: The trainable tensors received.
            sent: What the strategy sent besides the model, all of it.
            state: The part's client state.
        """
        return {}

    def wrapped(self, gradient: Gradient, own: Own) -> Gradient:
        """Return another gradient in place of the task's, of other samples or at other points.

        A function will do: what else `gradient` has, such as `by_features`, is kept beside it.
        """
        return gradient

    def look(self, here: Here, own: Own) -> Own:
        """Return what `objective` and `penalty` get as `own` in this step; before the gradient."""
        return own

    def objective(self, own: Own) -> Objective | None:
        """Return what is minimised in place of the task's loss, or None; one part at most."""
        return None

    def penalty(self, own: Own) -> Objective | None:
        """Return a function of the outputs that is added to the objective, or None."""
        return None

    def inner_penalty(self, own: Own) -> Objective | None:
        """Return a function of what goes into the last layer, likewise added, or None."""
        return None

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Return (the gradients changed, what the part carries on); before any clipping."""
        return grads, own

    def direction(self, grads: Named, own: Own) -> Named:
        """Return the gradients changed after clipping and weight decay."""
        return grads

    def step(self, steps: Named, own: Own) -> Named:
        """Return what the parameters are reduced by, changed."""
        return steps

    @property
    def companion(self) -> tuple[float, float | None] | None:
        """(a, step size) of a model of the client's own that a descent may train, or None.

        Its steps are p <- p - eta * (g + a * p + b), where g is the gradient of the task's loss at
        p and b comes from `companion_of`; a step size of None is the procedure's. They do the same
        as `stepped`.
        """
        return None

    def companion_of(self, own: Own) -> tuple[Named, Named]:
        """Return (where the companion starts, b by name; nothing where it is 0)."""
        return {}, {}

    def accompanied(self, own: Own, companion: Named) -> Own:
        """Return what the part carries on after the companion's steps."""
        return own

    def stepped(self, own: Own, here: Here, params: Named) -> Own:
        """Return what the part carries on after a step, for what is trained beside the model.

        Args:
            own: What it carries.
            here: Where the client stood before the step.
            params: The parameters after it.
        """
        return own

    def own_model(self, params: Named, state: Named) -> Named:
        """Return the client's own model, with which it evaluates beside the one received.

        Args:
            params: The trainable tensors received for the evaluation.
            state: The part's client state; where the client has not trained, the initial one.
        """
        return params

    def measured(self, state: Named) -> Named:
        """Return numbers that tell of the part's client state, recorded as `personal/NAME`."""
        return {}

    def push(self, own: Own) -> Named:
        """Return b of a linear change by name, see `strength`; nothing where it is 0."""
        return {}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Return (extra tensors of the reply, the part's client state for its next round)."""
        return {}, state


def sent_as(name: str, sent: Named) -> Named:
    """Return what a strategy sent under a name, by the names of the model's tensors.

    Args:
        name: The first part of the tensors' names.
        sent: All that it sent besides the model.

    Example:
        >>> import torch
        >>> sent_as("control", {"control.output.bias": torch.zeros(2), "other": torch.ones(1)})
        {'output.bias': tensor([0., 0.])}
    """
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in sent.items() if key.startswith(start)}


def as_sent(name: str, tensors: Named) -> Named:
    """Return tensors under the names in which they travel; the opposite of `sent_as`."""
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}
