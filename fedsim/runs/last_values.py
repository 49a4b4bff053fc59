"""The last value of each metric of a run."""

from collections.abc import Mapping
from typing import Any

from fedsim.scenario.expectations import VIRTUAL_TIME


def standing(before: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that stand after a round.

    What is not measured in every round stands as it was last; who failed is of the last round
    alone, and how long a round took is no value of the run; the virtual time is one.

    Args:
        before: The values that stood before.
        record: What the round recorded.

    Example:
        >>> standing({"test/accuracy": 0.5, "clients/died": 1}, {"round": 2, "train/loss": 0.1})
        {'test/accuracy': 0.5, 'train/loss': 0.1}
    """
    over = ["clients/"]
    if "personal/clients" in record:  # once all have trained nobody is measured apart
        over.append("personal/")
    kept = {k: v for k, v in before.items() if not k.startswith(tuple(over))}
    new = {
        k: v
        for k, v in record.items()
        if k == VIRTUAL_TIME or (k != "round" and not k.startswith("time/"))
    }
    return {**kept, **new}
