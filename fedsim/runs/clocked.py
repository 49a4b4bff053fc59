"""The Grid that a strategy is given: the round's participants, or those of a virtual clock."""

from flwr.serverapp import Grid

from fedsim.engine.ahead import Ahead
from fedsim.engine.grid import LocalGrid
from fedsim.federation.grids.clock import ClockGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.runs.timetables import ClockWork
from fedsim.runs.world import World
from fedsim.strategy.adapter import is_ours


def outermost(grid: Grid, world: World, engine: LocalGrid | None) -> ParticipationGrid | ClockGrid:
    """Return the Grid that a strategy is given.

    Args:
        grid: The Grid of all clients, with all that stands between them and a strategy.
        world: The scenario, built.
        engine: Where clients are virtual; it then trains ahead what a clock wants later.
    """
    scenario = world.scenario
    clock = scenario.clock
    if clock is None:
        return ParticipationGrid(grid, world.participation, seed=scenario.seed)
    work = ClockWork(scenario, world.data, world.participation, world.devices)
    made = ClockGrid(
        grid,
        work.timetable(),
        world.participation,
        seed=scenario.seed,
        tick_s=clock.tick_s,
        stop_s=clock.stop_s,
        moved=not is_ours(world.strategy),
    )
    if engine is not None:
        engine.ahead = Ahead(made.under_way)
    return made
