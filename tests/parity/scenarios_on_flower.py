"""fedsim's scenarios on Flower's own simulation: `python scenarios_on_flower.py OUT.npz`.

Every case is a model and an optimiser, or a strategy; all cases run one after another in one
simulation of four nodes that all take part. "inline/CASE" is the model after two rounds on
InlineGrid, "flower/CASE" the same scenario's on Flower's grid behind a PartitionGrid.
"""

import sys

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.cohort import Cohort
from fedsim.messages.records import model_tensors
from fedsim.runs.loop import RoundLoop
from fedsim.runs.world import World, build
from fedsim.scenario import discovery
from fedsim.scenario.load import load

MODELS = ("logistic", "mlp", "cnn", "mlp_dropout", "cnn_batchnorm")
OPTIMIZERS = {"sgd": "local_lr=0.05", "adam": 'optimizer="adam", local_lr=0.002'}
CASES = [f"{model}-{optimizer}" for model in MODELS for optimizer in OPTIMIZERS]
CASES += [f"strategy-{name}" for name in discovery.names("strategies")]
WRAPPED = {
    "private": 'name="flower:DifferentialPrivacyClientSideAdaptiveClipping", noise_multiplier=0.1',
    "prox": 'name="flower:FedProx", proximal_mu=0.5',
    "fedau_with_adam": 'name="fedau", server={name="adam"}',
}
WRAPPED["private_ours"] = WRAPPED["private"] + ', strategy={name="fedvarp"}'
CASES += [f"strategy-{name}" for name in WRAPPED]
PERSONAL = "personal-sgd"  # the last: what clients keep of it lies in the nodes' contexts
CASES.append(PERSONAL)
FOUND: dict[str, np.ndarray] = {}


def world_of(case: str) -> World:
    """The scenario of a case, in float64, built."""
    model, choice = case.split("-")
    strategy = choice if model == "strategy" else "fedavg"
    named = WRAPPED.get(strategy, f'name="{strategy}"')
    optimizer = "sgd" if model == "strategy" else choice
    personal = ', personal=["output.*"]' if case == PERSONAL else ""
    model = "mlp" if model in ("strategy", "personal") else model
    return build(
        load(
            "quickstart",
            [
                f'task={{model="{model}", dtype="float64"{personal}}}',
                f"strategy={{{named}}}",
                "partition.clients=4",
                'participation={kind="full"}',
                f'client={{name="local_sgd", batch_size=64, {OPTIMIZERS[optimizer]}}}',
                "engine.chunk_size=2",
                "expect={}",
            ],
        )
    )


class Case(GridWrapper):
    """Tells the clients which case a message belongs to, by its group."""

    def __init__(self, inner: Grid, case: str) -> None:
        super().__init__(inner)
        self.case = case

    def send_and_receive(self, messages, *, timeout=None):
        """Send a cohort, or a foreign strategy's messages, under the case's name."""
        if isinstance(messages, Cohort):
            return self.inner.send_and_receive(messages.altered(group=self.case), timeout=timeout)
        named = [
            Message(m.content, m.metadata.dst_node_id, m.metadata.message_type, group_id=self.case)
            for m in messages
        ]
        return self.inner.send_and_receive(named, timeout=timeout)


class Cases(ClientApp):
    """One app for all cases: the message's group says which."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the case's own app does."""
        case = message.metadata.group_id or CASES[0]
        if case not in _apps:
            _apps[case] = world_of(case).app
        reply = _apps[case](message, context)
        if case == PERSONAL:
            require_no_output(message)
            require_no_output(reply)
        return reply


def require_no_output(message: Message) -> None:
    """Refuse a message with a tensor of the output layer in it."""
    for record in message.content.array_records.values():
        if any("output" in name for name in record):
            raise AssertionError(f"a personal tensor travels: {list(record)}")


_apps: dict[str, ClientApp] = {}


def train(world: World, grid: Grid) -> np.ndarray:
    """Run two rounds and return the flat model."""
    wrapped = ParticipationGrid(AdmissionGrid(grid, world.layout), world.participation, seed=1)
    last = RoundLoop(world.strategy, wrapped, 2).run(world.arrays)
    return model_tensors(world.layout, last)[0].numpy()


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all cases on Flower's grid."""
    nodes = PartitionGrid(grid, 4)
    for case in CASES:
        FOUND[f"flower/{case}"] = train(world_of(case), Case(nodes, case))


if __name__ == "__main__":
    for name in CASES:
        world = world_of(name)
        FOUND[f"inline/{name}"] = train(world, InlineGrid(world.app, 4))
    one_actor = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app, Cases(), 4, backend_config=one_actor)
    np.savez(sys.argv[1], **FOUND)
