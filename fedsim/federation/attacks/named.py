"""The attacks by name: Byzantine clients, and links that lose packets.

An attack is a pure function from the updates that it sees to those that the Byzantine clients send,
an effect on the data that they train on, or both. The seed decides who attacks in which round.
"""

from collections.abc import Callable

from fedsim.federation.attacks.attack import Attack, Seen
from fedsim.federation.attacks.kinds import (
    alie,
    alie_z,
    backdoor,
    gaussian,
    infinity,
    ipm,
    label_flip,
    mimic,
    min_max,
    packet_loss,
    scaled_reverse,
    sign_flip,
    uniform,
)
from fedsim.federation.grids.attack import AttackGrid, attacked

__all__ = [
    "ATTACKS", "Attack", "AttackGrid", "Seen", "alie", "alie_z", "attacked", "backdoor", "gaussian",
    "infinity", "ipm", "label_flip", "mimic", "min_max", "packet_loss", "scaled_reverse",
    "sign_flip", "uniform",
]  # fmt: skip

ATTACKS: dict[str, Callable[..., Attack]] = {
    "uniform": uniform,
    "sign_flip": sign_flip,
    "scaled_reverse": scaled_reverse,
    "gaussian": gaussian,
    "infinity": infinity,
    "alie": alie,
    "ipm": ipm,
    "mimic": mimic,
    "min_max": min_max,
    "packet_loss": packet_loss,
    "label_flip": label_flip,
    "backdoor": backdoor,
}
