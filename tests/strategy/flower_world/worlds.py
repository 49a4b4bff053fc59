"""Small scenarios of Flower's strategies, and what a run of them leaves."""

import numpy as np

from fedsim.basics.json_files import JsonLines
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.messages.records import model_tensors
from fedsim.runs.loop import RoundLoop
from fedsim.runs.world import build
from fedsim.scenario import discovery
from fedsim.scenario.scenario import Scenario

# Arguments without a default, and those without which a strategy is plain averaging.
ARGUMENTS = {
    "Bulyan": {"num_malicious_nodes": 1},
    "FedAvgM": {"server_momentum": 0.9},
    "FedProx": {"proximal_mu": 0.5},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "QFedAvg": {"client_learning_rate": 0.1},
    "DifferentialPrivacyClientSideAdaptiveClipping": {"noise_multiplier": 0.3},
    "DifferentialPrivacyClientSideFixedClipping": {"noise_multiplier": 0.3, "clipping_norm": 0.5},
    "DifferentialPrivacyServerSideAdaptiveClipping": {"noise_multiplier": 0.3},
    "DifferentialPrivacyServerSideFixedClipping": {"noise_multiplier": 0.3, "clipping_norm": 0.5},
}
WRAPPERS = [name for name in ARGUMENTS if name.startswith("DifferentialPrivacy")]


def flower(name, **arguments):
    """The table of a strategy of Flower's."""
    return {"name": f"flower:{name}", **ARGUMENTS.get(name, {}), **arguments}


def scenario(strategy, **tables):
    document = {
        "seed": 3,
        "rounds": 3,
        "data": {"name": "digits", "test_fraction": 0.8},
        "partition": {"kind": "dirichlet", "clients": 8, "alpha": 1.0},
        "strategy": strategy,
        "client": {"local_lr": 0.1, "batch_size": 16},
        "engine": {"kind": "inline", "chunk_size": 4},
        "checkpoint": {"every": 1, "keep": 9},
    }
    return Scenario.from_resolved({**document, **tables}, origin="tests/flower_world.toml")


def grid(world, inner=None):
    engine = inner or InlineGrid(world.app, world.data.num_clients)
    seed = world.scenario.seed
    return ParticipationGrid(AdmissionGrid(engine, world.layout), world.participation, seed=seed)


def train(strategy, rounds=2, *, seed=0, inner=None, hooks=(), **tables):
    """The flat model after some rounds, and the world."""
    world = build(scenario(strategy, **tables))
    loop = RoundLoop(
        world.strategy,
        grid(world, None if inner is None else inner(world)),
        rounds,
        seed=seed,
        hooks=hooks,
    )
    return model_tensors(world.layout, loop.run(world.arrays))[0].numpy(), world


def records(result):
    """A run's metrics, times apart."""
    return [
        {key: value for key, value in record.items() if not key.startswith("time/")}
        for record in JsonLines.read(result.folder / "metrics.jsonl")
    ]


def ours():
    """The strategies that come with fedsim."""
    return discovery.names("strategies")


def clipped(update, bound):
    """Flat clipping, McMahan et al. 2018, in float64."""
    update = np.asarray(update, dtype=np.float64)
    return update * min(1.0, bound / max(np.sqrt((update**2).sum()), 1e-300))
