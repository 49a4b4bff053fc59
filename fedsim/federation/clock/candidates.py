"""Who could begin a job in a round."""

from fedsim.basics.rng import generator
from fedsim.federation.clock.timetable import Timetable
from fedsim.federation.participation.kinds import Participation


def candidates(
    timetable: Timetable,
    participation: Participation,
    server_round: int,
    *,
    num_clients: int,
    seed: int,
) -> list[int]:
    """Return the round's participants that are not at work, in the order in which they would begin.

    The order is drawn where not all of them can begin at once.

    Args:
        timetable: The jobs under way.
        participation: Who takes part in a round.
        server_round: The round.
        num_clients: N, the clients registered.
        seed: The scenario's seed.
    """
    there = participation.participants(server_round, num_clients=num_clients, seed=seed).tolist()
    busy, free = timetable.busy, timetable.free
    idle = [client for client in there if client not in busy] if busy else there
    if free is not None and free < len(idle):
        drawn: list[int] = generator(seed, "clock order", server_round).permutation(idle).tolist()
        return drawn
    return idle
