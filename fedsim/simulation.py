"""`run_simulation`: a drop-in for Flower's, on fedsim's engine."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim import flower_internals as internals
from fedsim.engine.local import LocalGrid
from fedsim.errors import unknown

_log = logging.getLogger("fedsim")
_BACKENDS = ("ray", "inline")
_CONFIG_KEYS = ("init_args", "client_resources", "actor")
_RESOURCE_KEYS = ("num_cpus", "num_gpus")
_FLOWER_RESOURCES = {"num_cpus": 2.0, "num_gpus": 0.0}


def run_simulation(
    server_app: ServerApp,
    client_app: ClientApp,
    num_supernodes: int,
    backend_name: str = "ray",
    backend_config: Mapping[str, Any] | None = None,
    enable_tf_gpu_growth: bool = False,
    verbose_logging: bool = False,
    *,
    run_config: Mapping[str, Any] | None = None,
    workers: int | None = None,
    client_timeout_s: float | None = None,
) -> Context:
    """Run an unmodified Flower ServerApp and ClientApp on virtual clients.

    Takes the arguments of `flwr.simulation.run_simulation`, and differs in what it gives: node ids
    are partition + 2, the same in every run; replies come in client order; a worker that dies is
    replaced and the client is named; torch in the workers and the driver's kernels use one thread.

    Args:
        server_app: Runs here, with the engine as its grid.
        client_app: Runs in the workers.
        num_supernodes: How many virtual clients there are.
        backend_name: "ray", or "inline" for this process.
        backend_config: `init_args` for `ray.init`, `client_resources` with `num_cpus` (2 by
            default, as in Flower) and `num_gpus` of one worker. `actor` concerns TensorFlow alone
            and does nothing here.
        enable_tf_gpu_growth: Taken for compatibility; set TF_FORCE_GPU_ALLOW_GROWTH instead.
        verbose_logging: Whether DEBUG messages are logged.
        run_config: The run's configuration, as `flwr run --run-config` gives it.
        workers: At most so many workers.
        client_timeout_s: Seconds a client may take; None waits for ever.

    Returns:
        The ServerApp's context, with whatever it put into `context.state`.

    Raises:
        ValueError: If the configuration has an unknown key or value.
        RunError: If the engine cannot start.
    """
    config = dict(backend_config or {})
    _refuse_unknown(config, _CONFIG_KEYS, "a key of backend_config")
    resources = {**_FLOWER_RESOURCES, **dict(config.get("client_resources") or {})}
    _refuse_unknown(resources, _RESOURCE_KEYS, "a key of client_resources")
    if backend_name not in _BACKENDS:
        raise ValueError(f"backend_name: {unknown(backend_name, 'a backend', _BACKENDS)}")
    if config.get("actor") or enable_tf_gpu_growth:
        _log.warning(
            "TensorFlow options do nothing here; set TF_FORCE_GPU_ALLOW_GROWTH=true instead"
        )
    if verbose_logging:
        logging.getLogger("flwr").setLevel(logging.DEBUG)
        _log.setLevel(logging.DEBUG)
    settings: dict[str, Any] = {"run_config": run_config, "client_timeout_s": client_timeout_s}
    if backend_name == "ray":
        settings |= {
            "workers": workers,
            "client_resources": resources,
            "init_args": config.get("init_args"),
        }
    context = Context(
        run_id=1,
        node_id=internals.SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config or {}),
    )
    with _grid(backend_name, client_app, num_supernodes, settings) as grid, pinned_threads():
        internals.ensure_identity()
        server_app(grid, context)
    for incident in grid.incidents:
        _log.warning("%s", incident)
    return context


@contextlib.contextmanager
def pinned_threads() -> Iterator[None]:
    """One thread for this process's kernels: more change bits and slow the workers down."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def _grid(name: str, app: ClientApp, clients: int, settings: dict[str, Any]) -> LocalGrid:
    if name == "inline":
        from fedsim.engine.inline import InlineGrid

        return InlineGrid(app, clients, **settings)
    from fedsim.engine.ray import RayGrid

    return RayGrid(app, clients, **settings)


def _refuse_unknown(found: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    for key in found:
        if key not in allowed:
            raise ValueError(f"backend_config: {unknown(key, what, allowed)}")
