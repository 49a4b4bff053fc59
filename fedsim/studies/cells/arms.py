"""Variants with reference arms beside them: `fedsim compare --arm`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedsim.basics.errors import ScenarioError
from fedsim.runs.arms import CENTRALISED, FEDERATED, LOCAL, arm_of
from fedsim.studies.cells.variants import Variant, fingerprint

ARM_AXIS = "arm"


def with_arms(variants: Sequence[Variant], arms: Sequence[str]) -> list[Variant]:
    """Return variants and, after them, their reference arms.

    Variants that share an arm (other strategies on the same data, say) have it once, under the
    labels that they have in common.

    Args:
        variants: What is compared.
        arms: The arms, see `fedsim.runs.arms.ARMS`; none leaves the variants as they are.

    Raises:
        ScenarioError: If an arm is there twice, unknown, or a scenario cannot have it.
    """
    if not arms:
        return list(variants)
    if twice := next((arm for arm in arms if list(arms).count(arm) > 1), None):
        raise ScenarioError(f"--arm {twice}: is there twice")
    made = [replace(v, labels={**v.labels, ARM_AXIS: FEDERATED}) for v in variants]
    for arm in arms:
        shared: dict[str, Variant] = {}
        for variant in variants:
            scenario = arm_of(variant.scenario, arm)
            key = fingerprint(scenario)
            labels = dict(variant.labels)
            if key in shared:
                known = shared[key].labels
                labels = {axis: x for axis, x in labels.items() if known.get(axis) == x}
            shared[key] = Variant({**labels, ARM_AXIS: arm}, scenario)
        made += shared.values()
    return made


def references(variants: Sequence[Variant]) -> dict[int, tuple[int, int]]:
    """Return by the place of each federated variant those of its (local, centralised) arms.

    Variants without both arms are left out.
    """
    found = {}
    for place, variant in enumerate(variants):
        if variant.labels.get(ARM_AXIS) != FEDERATED:
            continue
        arms = [_nearest(variant.labels, variants, arm) for arm in (LOCAL, CENTRALISED)]
        if arms[0] is not None and arms[1] is not None:
            found[place] = (arms[0], arms[1])
    return found


def _nearest(labels: Mapping[str, str], variants: Sequence[Variant], arm: str) -> int | None:
    """The place of an arm that has no label which these labels do not have."""
    fitting = [
        place
        for place, variant in enumerate(variants)
        if variant.labels.get(ARM_AXIS) == arm
        and all(labels.get(axis) == x for axis, x in variant.labels.items() if axis != ARM_AXIS)
    ]
    return max(fitting, key=lambda place: len(variants[place].labels), default=None)
