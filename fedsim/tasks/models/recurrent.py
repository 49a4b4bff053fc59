"""A language model of characters. Needs torch alone.

`torch.nn.LSTM` has no batching rule in `torch.func.vmap`. `StackedLSTM` computes the same from
linear maps and elementwise operations, step by step in time, so that a chunk of clients trains as
one batch; its weights carry torch's names.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.basics.errors import ScenarioError


def char_lstm(
    *,
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
    feature_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int,
) -> nn.Module:
    """A character LSTM: an embedding, stacked LSTM layers, logits after the last character.

    With the default widths, a vocabulary of V and V outputs it has 796,672 + 265 V parameters.

    Args:
        embedding: Width of a character's embedding; >= 1.
        hidden: Width of each LSTM layer; >= 1.
        layers: LSTM layers; >= 1.
        feature_shape: Shape of one sample: one dimension, the characters.
        num_classes: Number of outputs.
        vocabulary: V; tokens are 0...V-1.

    Raises:
        ScenarioError: If a width is below 1, or the features are not a row of tokens.

    Source: McMahan et al., AISTATS 2017 (arXiv:1602.05629), section 3, on Shakespeare: a learned
    8-dimensional embedding and two LSTM layers of 256.
    Deviations: the paper prints 866,578 parameters and no vocabulary, and no vocabulary gives this
    sum exactly with one bias per gate (263 gives 866,367, 264 gives 866,632). As in LEAF
    (arXiv:1812.01097) only the character after the last one is predicted.
    """
    for name, width in (("embedding", embedding), ("hidden", hidden), ("layers", layers)):
        if width < 1:
            raise ScenarioError(f"[task] {name} = {width}: must be >= 1")
    if not vocabulary or len(feature_shape) != 1:
        found = "tokens" if vocabulary else "numbers"
        raise ScenarioError(
            f"[task] model = 'char_lstm': needs rows of tokens, the data set's features are "
            f"{found} of shape {feature_shape}"
        )
    return _CharacterModel(vocabulary, embedding, hidden, layers, num_classes)


class StackedLSTM(nn.Module):
    """LSTM layers over sequences, `[batch, time, inputs] -> [batch, time, hidden]`.

    Equals `torch.nn.LSTM(inputs, hidden, layers, batch_first=True)` whose `bias_hh` are zero and
    stay so: one bias per gate, as in the papers.

    Args:
        inputs: Width of what comes in.
        hidden: Width of each layer.
        layers: Number of layers.
    """

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.hidden, self.layers = hidden, layers
        bound = hidden**-0.5  # torch's own initialisation
        for layer in range(layers):
            for name, shape in (
                (f"weight_ih_l{layer}", (4 * hidden, hidden if layer else inputs)),
                (f"weight_hh_l{layer}", (4 * hidden, hidden)),
                (f"bias_ih_l{layer}", (4 * hidden,)),
            ):
                values = torch.empty(shape).uniform_(-bound, bound)
                self.register_parameter(name, nn.Parameter(values))

    def forward(self, values: Tensor) -> Tensor:
        """Return the last layer's hidden states."""
        for layer in range(self.layers):
            recurrent = getattr(self, f"weight_hh_l{layer}")
            bias = getattr(self, f"bias_ih_l{layer}")
            driven = functional.linear(values, getattr(self, f"weight_ih_l{layer}"), bias)
            state = cell = values.new_zeros((values.shape[0], self.hidden))  # len() is no symbol
            outputs = []
            for now in driven.unbind(dim=1):
                gates = now + functional.linear(state, recurrent)
                enter, forget, candidate, leave = gates.chunk(4, dim=-1)
                cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
                state = leave.sigmoid() * cell.tanh()
                outputs.append(state)
            values = torch.stack(outputs, dim=1)
        return values


class _CharacterModel(nn.Module):
    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, layers: int, num_classes: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = StackedLSTM(embedding, hidden, layers)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(tokens))[:, -1])  # type: ignore[no-any-return]
