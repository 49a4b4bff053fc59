"""Terms that are added to a local objective. Needs torch alone; written for vmap."""

from typing import Literal

import torch
from torch import Tensor

from fedsim.basics.errors import require_choice

Space = Literal["probability", "logit"]
Reduction = Literal["batch", "sample"]


def mean_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross-entropy of the samples that are not padding.

    Args:
        logits: `[batch, classes]`.
        targets: `[batch]`.
        weights: `[batch]`, 0 for padding.

    Example:
        >>> outputs, targets = torch.zeros(3, 2), torch.tensor([0, 1, 1])
        >>> round(float(mean_cross_entropy(outputs, targets, torch.tensor([1.0, 1.0, 0.0]))), 6)
        0.693147
    """
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    # `where` and not a product: padding may hold anything
    kept = torch.where(weights > 0, losses, torch.zeros_like(losses))
    return kept.sum() / weights.sum().clamp(min=1)


def margin_penalty(
    logits: Tensor,
    *,
    space: Space = "probability",
    reduction: Reduction = "batch",
    weights: Tensor | None = None,
) -> Tensor:
    """Return FedLD's margin penalty log(1 + ||A||^2), before its coefficient lambda.

    Args:
        logits: The network's outputs, `[batch, classes]`.
        space: What A is: the softmax "probability" of each row (the authors' code) or the "logit"
            rows themselves (as the paper's formula can be read).
        reduction: "batch" takes one Frobenius norm over the whole batch (the authors' code),
            "sample" the mean over samples of log(1 + ||A_b||^2).
        weights: `[batch]`, 0 for padding, which does not count; None counts every row.

    Returns:
        A scalar >= 0; with probabilities over the batch it lies in [log(1 + B/C), log(1 + B)].

    Raises:
        ValueError: If `space` or `reduction` is neither of its two.

    Source: Zeng et al., MICCAI 2024 (arXiv:2408.12300), Figure 1, and the authors' code.

    Example:
        >>> round(float(margin_penalty(torch.zeros(4, 2))), 6)  # log 3
        1.098612
    """
    require_choice("space", space, Space)
    require_choice("reduction", reduction, Reduction)
    rows = logits.softmax(dim=-1) if space == "probability" else logits
    squares = (rows * rows).sum(dim=-1)
    counted = torch.ones_like(squares) if weights is None else weights
    # `where` and not a product: padding may hold anything
    squares = torch.where(counted > 0, squares, torch.zeros_like(squares))
    if reduction == "batch":
        return torch.log1p(squares.sum())
    return torch.log1p(squares).sum() / (counted > 0).sum().clamp(min=1)
