"""Robust rules: pure functions from updates, `[n, dim]`, to one, `[dim]`; each as its paper has it.

Every rule exists twice: as a function of one tensor, and as a function of `Updates`, which reads
replies in blocks and may be mixed beforehand. `Recipe` joins a rule and what comes before it.
"""

from fedsim.aggregators.bounds import BULYAN, KRUM, MAJORITY, Bound
from fedsim.aggregators.coordinatewise import coordinate_median, meamed, phocas, trimmed_mean
from fedsim.aggregators.geometric import centred_clipping, geometric_median, unit_mean
from fedsim.aggregators.recipe import BeforeName, Recipe, Round, RuleName, Variant, rules
from fedsim.aggregators.selection import bulyan, multi_krum

__all__ = [
    "BULYAN",
    "KRUM",
    "MAJORITY",
    "BeforeName",
    "Bound",
    "Recipe",
    "Round",
    "RuleName",
    "Variant",
    "bulyan",
    "centred_clipping",
    "coordinate_median",
    "geometric_median",
    "meamed",
    "multi_krum",
    "phocas",
    "rules",
    "trimmed_mean",
    "unit_mean",
]  # fmt: skip
