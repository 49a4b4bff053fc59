"""FedJAX: its own federated averaging (`fedjax.algorithms.fed_avg`) over `for_each_client`.

Data are in memory, clients are drawn by its `UniformGetClientSampler`, models are Haiku's. Rounds
are dispatched as JAX likes; the clock stops when the last model of a turn is there.
"""

import itertools
from importlib.metadata import version
from typing import Any

import baton
import fedjax
import haiku as hk
import jax
import jaxlib
import numpy as np
from fedjax.algorithms import fed_avg


def forward(name: str) -> Any:
    """Return a function from a batch to logits; images are `[n, 28, 28, 1]`."""

    def dense(batch: Any, widths: tuple[int, ...]) -> Any:
        return hk.nets.MLP(widths, name="mlp")(hk.Flatten()(batch["x"]))

    def cnn(batch: Any) -> Any:
        h = batch["x"]
        for number, filters in enumerate((16, 32), start=1):
            h = jax.nn.relu(hk.Conv2D(filters, 3, name=f"conv{number}")(h))
            h = hk.max_pool(h, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        h = jax.nn.relu(hk.Linear(64, name="hidden")(hk.Flatten()(h)))
        return hk.Linear(10, name="output")(h)

    return {
        "logistic": lambda batch: dense(batch, (10,)),
        "mlp": lambda batch: dense(batch, (200, 200, 10)),
        "cnn": cnn,
    }[name]


NAMES = {
    "logistic": {"mlp/~/linear_0": "output"},
    "mlp": {
        "mlp/~/linear_0": "hidden1",
        "mlp/~/linear_1": "hidden2",
        "mlp/~/linear_2": "output",
    },
    "cnn": {"conv1": "conv1", "conv2": "conv2", "hidden": "hidden", "output": "output"},
}


def from_torch(model: str, given: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Lay torch's tensors out as Haiku does: channels last."""
    made = {}
    for module, name in NAMES[model].items():
        weight = given[f"{name}.weight"]
        if weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif model == "cnn" and name == "hidden":
            weight = weight.reshape(64, 32, 7, 7).transpose(2, 3, 1, 0).reshape(-1, 64)
        else:
            weight = weight.T
        made[module] = {"w": weight.copy(), "b": given[f"{name}.bias"].copy()}
    return made


def to_torch(model: str, params: Any) -> dict[str, np.ndarray]:
    """Undo `from_torch`."""
    made = {}
    for module, name in NAMES[model].items():
        weight = np.asarray(params[module]["w"])
        if weight.ndim == 4:
            weight = weight.transpose(3, 2, 0, 1)
        elif model == "cnn" and name == "hidden":
            weight = weight.reshape(7, 7, 32, 64).transpose(3, 2, 0, 1).reshape(64, -1)
        else:
            weight = weight.T
        made[f"{name}.weight"], made[f"{name}.bias"] = weight, np.asarray(params[module]["b"])
    return made


def main() -> None:
    """Run rounds as the harness asks for them."""
    work = baton.workload()
    x, y, offsets = baton.pool(work)
    images = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    shares = len(offsets) - 1
    held = [
        {"x": images[start:end], "y": y[start:end].astype(np.int32)}
        for start, end in itertools.pairwise(offsets)
    ]
    data = fedjax.InMemoryFederatedData(
        {b"%07d" % client: held[client % shares] for client in range(work["clients"])}
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, work["cohort"], seed=0)
    model = fedjax.create_model_from_haiku(
        hk.transform(forward(work["model"])),
        {"x": images[:1], "y": y[:1]},
        lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits),
    )
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(learning_rate=work["lr"]),
        fedjax.optimizers.sgd(learning_rate=1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=work["batch"], num_epochs=1, seed=0),
    )
    start = from_torch(work["model"], baton.initial(work))
    state = algorithm.init(jax.tree_util.tree_map(jax.numpy.asarray, start))
    turns = baton.Baton(fedjax=version("fedjax"), jax=jax.__version__, jaxlib=jaxlib.__version__)
    going = turns.wait()
    while going:
        state, _ = algorithm.apply(state, sampler.sample())
        params = state.params
        going = turns.ended(
            lambda: to_torch(work["model"], params),  # noqa: B023
            lambda: jax.block_until_ready(params),  # noqa: B023
        )


if __name__ == "__main__":
    main()
