"""Metrics from all of an evaluation's outputs, or from counts that add up. Needs torch alone.

A metric that the samples do not define (the area under a curve where only one class occurs) is nan:
never a made-up number.
"""

import math

import torch
from torch import Tensor


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: the chance that a positive outranks a negative.

    Pairs of equal scores count one half (Mann and Whitney's statistic with mid-ranks), which makes
    it exactly the area under the curve by the trapezoidal rule.

    Args:
        scores: `[n]`, larger for what is rather taken for positive.
        positive: bool `[n]`.

    Returns:
        The area in [0, 1]; nan when there is no positive, no negative, or a score is nan.

    Source: Hanley and McNeil, Radiology 143 (1982).

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
        0.875
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives or bool(scores.isnan().any()):
        return math.nan
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[place]
    wins = float(ranks[positive].sum()) - positives * (positives + 1) / 2
    return wins / (positives * negatives)


def classification_auroc(outputs: Tensor, targets: Tensor) -> float:
    """Return the AUROC of a classifier's logits.

    Of two classes it ranks by the difference of the logits in float64, which orders samples as
    the probability of class 1 does and never saturates. Of more it is the plain mean, over the
    classes that occur among the targets, of the area of each against the rest, by its probability
    (softmax in float64).

    Args:
        outputs: Logits `[n, C]`.
        targets: Classes `[n]`.

    Returns:
        The area; nan when fewer than two classes occur.
    """
    logits = outputs.double()
    if logits.shape[-1] == 2:
        return auroc(logits[:, 1] - logits[:, 0], targets == 1)
    occurring = targets.unique().tolist()
    if len(occurring) < 2:
        return math.nan
    scores = logits.softmax(dim=-1)
    areas = [auroc(scores[:, c], targets == c) for c in occurring]
    return math.fsum(areas) / len(areas)


def recalls(correct: Tensor, occurring: Tensor) -> Tensor:
    """Return each class's share of its samples that are recognised, `[C]`; nan for an absent one.

    Args:
        correct: Samples of each class that are taken for it, `[C]`.
        occurring: Samples of each class, `[C]`.
    """
    return torch.where(occurring > 0, correct / occurring.clamp(min=1), math.nan)


def balanced_accuracy(correct: Tensor, occurring: Tensor) -> float:
    """Return the mean recall over the classes that occur; nan when none does."""
    found = recalls(correct, occurring)
    return float(found[occurring > 0].mean()) if bool((occurring > 0).any()) else math.nan


def macro_f1(correct: Tensor, occurring: Tensor, predicted: Tensor) -> float:
    """Return the mean F1 over the classes that occur among targets or predictions.

    Args:
        correct: Samples of each class that are taken for it, `[C]`.
        occurring: Samples of each class, `[C]`.
        predicted: Samples taken for each class, `[C]`.
    """
    total = occurring + predicted
    if not bool((total > 0).any()):
        return math.nan
    return float((2 * correct / total.clamp(min=1))[total > 0].mean())


def r2(outputs: Tensor, targets: Tensor) -> float:
    """Return the coefficient of determination, the plain mean over a target's components.

    Args:
        outputs: Predictions `[n, components]`.
        targets: Of the same shape.

    Returns:
        1 minus the ratio of squared errors to squared deviations from the mean; nan for fewer than
        two samples or a component that does not vary.
    """
    predicted, true = outputs.double(), targets.double()
    if len(true) < 2:
        return math.nan
    deviations = (true - true.mean(dim=0)).square().sum(dim=0)
    if not bool((deviations > 0).all()):
        return math.nan
    errors = (true - predicted).square().sum(dim=0)
    return float((1 - errors / deviations).mean())
