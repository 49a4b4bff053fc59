"""What a run's models are measured on, besides each client's own data."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedsim.basics.errors import FedsimError, RunError, is_too_large, show
from fedsim.basics.rng import generator
from fedsim.client.batching.poison import Trigger
from fedsim.engine.work import describe
from fedsim.messages.records import model_tensors
from fedsim.runs.client_side import robust_evaluation
from fedsim.runs.world import World

Measure = Callable[[ArrayRecord], dict[str, float]]


@contextlib.contextmanager
def _failures_named(world: World, samples: str, count: int) -> Iterator[None]:
    """Say of an error of the user's own code that it came in an evaluation, and on what.

    Raises:
        RunError: Naming the model, the samples, how many at once, and where in the code.
    """
    try:
        yield
    except (FedsimError, MemoryError, OverflowError):
        raise
    except Exception as error:
        if is_too_large(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        batch = world.app.executor.evaluation_batch
        passes = f"{count} at once"
        if count > batch:
            last = f", the last {count % batch}" if count % batch else ""
            passes = f"{count}, {batch} at once{last}"
        raise RunError(
            f"[task] model = {show(world.scenario.task.get('model'))}: evaluation fails on "
            f"{samples} ({passes}): {describe(error)}; a model is evaluated in eval() mode on as "
            "many samples as there are: it must take any number of them"
        ) from error


def on_the_test_set(world: World) -> Measure:
    """Return what measures a model on the server's test set, and whether a backdoor opens it."""
    executor, triggered = world.app.executor, triggered_samples(world)

    def evaluate(arrays: ArrayRecord) -> dict[str, float]:
        params, buffers = model_tensors(world.layout, arrays)
        test = world.data.test
        with _failures_named(world, "the server's test samples", len(test.targets)):
            found = executor.evaluate_arrays(params, buffers, test.features, test.targets)
        if triggered is not None:
            with _failures_named(world, "samples with the backdoor", len(triggered[1])):
                taken = executor.evaluate_arrays(params, buffers, *triggered)
            # of a task that measures no accuracy it is not known
            found |= {"attack_success": taken["accuracy"]} if "accuracy" in taken else {}
        return found

    return evaluate


def on_moved_samples(world: World) -> Measure | None:
    """Return what measures a model on the server's test set, moved to where the model errs."""
    attack = robust_evaluation(world.scenario)
    if attack is None:
        return None

    def evaluate(arrays: ArrayRecord) -> dict[str, float]:
        params, buffers = model_tensors(world.layout, arrays)
        test = world.data.test
        with _failures_named(world, "the server's test samples, moved", len(test.targets)):
            return world.app.executor.evaluate_moved(
                params, buffers, test.features, test.targets, attack
            )

    return evaluate


def triggered_samples(world: World) -> tuple[np.ndarray, np.ndarray] | None:
    """The server's test samples of other classes with a backdoor's pattern, and its target."""
    effect = None if world.attack is None else world.attack.effect
    if not isinstance(effect, Trigger):
        return None
    spec, test = world.data.spec, world.data.test
    others = np.flatnonzero(np.asarray(test.targets) != effect.target)
    features = effect.features(torch.from_numpy(np.asarray(test.features)[others]), spec)
    return features.numpy(), np.full(len(others), effect.target, dtype=test.targets.dtype)


def on_pooled_splits(world: World) -> Measure:
    """Return what measures a model on the local test splits of all clients together."""
    drawn = world.data.clients(range(world.data.num_clients), split="test")
    rows = np.concatenate([np.asarray(mine, dtype=np.int64) for mine in drawn.rows])

    def evaluate(arrays: ArrayRecord) -> dict[str, float]:
        params, buffers = model_tensors(world.layout, arrays)
        with _failures_named(world, "the clients' test samples together", len(rows)):
            return world.app.executor.evaluate_arrays(
                params, buffers, drawn.features, drawn.targets, rows
            )

    return evaluate


def local_clients(world: World) -> np.ndarray | None:
    """Return the clients that evaluate locally, a sample fixed for the run; None where none do."""
    count, total = world.scenario.evaluation.clients, world.data.num_clients
    if not count:
        return None
    random = generator(world.scenario.seed, "local evaluation")
    return np.sort(random.choice(total, size=min(count, total), replace=False, shuffle=False))
