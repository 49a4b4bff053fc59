"""The whole zoo behind one ClientApp, so that one set of workers trains all of its models."""

import copy
import dataclasses
import functools

import numpy as np

from fedsim.client.plan import ExecutionPlan
from fedsim.engine.client_app import CohortApp
from fedsim.runs.world import build
from tests.laws.many import OneFederation
from tests.zoo import models
from tests.zoo.data import SIZES
from tests.zoo.trained import scenario

NAMES = [name for name in models.ZOO if name not in models.REFUSED]
CLIENTS = len(SIZES)


@functools.cache
def world(name):
    return build(scenario(name, "auto"))


class _Everybody:
    """How many samples each client of all models has: what a cohort is cut into chunks by."""

    num_clients = CLIENTS * len(NAMES)

    def __init__(self, spec):
        self.spec = spec

    def sizes(self, client_ids):
        return np.array([SIZES[int(client) % CLIENTS] for client in client_ids])


def _for_all():
    executor = copy.copy(WholeZoo.of(NAMES[0]))
    executor.data = _Everybody(executor.data.spec)
    return executor


class WholeZoo(CohortApp):
    """Model i has the clients from `CLIENTS` i on; a chunk belongs to the model of its first."""

    def __init__(self):
        super().__init__(_for_all, ExecutionPlan("loop", "each model has its own", 2))

    def __reduce__(self):
        return WholeZoo, ()

    @staticmethod
    @functools.cache
    def of(name):
        """The executor of a model, as its scenario makes it."""
        return world(name).app._build_executor()

    def run_chunk(self, job, out=None):
        number = job.client_ids[0] // CLIENTS
        own = tuple(client - CLIENTS * number for client in job.client_ids)
        executor, asked = self.of(NAMES[number]), dataclasses.replace(job, client_ids=own)
        return executor.evaluate(asked) if job.action == "evaluate" else executor.train(asked, out)


def one_model(grid, name):
    """The clients of one model as a federation of their own."""
    return OneFederation(grid, CLIENTS * NAMES.index(name), CLIENTS)
