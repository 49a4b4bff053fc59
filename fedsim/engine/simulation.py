"""`run_simulation`: a drop-in for Flower's, on fedsim's engine."""

import logging
import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.basics import kernels, kernels_in_use
from fedsim.basics.errors import unknown
from fedsim.basics.threads import pinned_threads
from fedsim.engine.grid import LocalGrid
from fedsim.engine.plain_replies import ReplyWatch
from fedsim.messages import flower_internals as internals

_log = logging.getLogger("fedsim")
_BACKENDS = ("ray", "inline")
_CONFIG_KEYS = ("init_args", "client_resources", "actor")
_RESOURCE_KEYS = ("num_cpus", "num_gpus")
_WAITS = (
    "the server waits for {wanted} clients (min_available_clients), and num_supernodes = "
    "{present}: no more will come; ask for no more, or give run_simulation more supernodes"
)
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
    replaced and the client is named; torch in the workers and the driver's kernels use one thread;
    what the ServerApp raises is raised here. What is not honoured is logged by name.

    Args:
        server_app: Runs here, with the engine as its grid.
        client_app: Runs in the workers.
        num_supernodes: How many virtual clients there are.
        backend_name: "ray", or "inline" for this process.
        backend_config: `init_args` for `ray.init`, `client_resources` with `num_cpus` (2 by
            default, as in Flower) and `num_gpus` of one worker; fractions are allowed. `actor`
            concerns TensorFlow alone and does nothing here.
        enable_tf_gpu_growth: Taken for compatibility; set TF_FORCE_GPU_ALLOW_GROWTH instead.
        verbose_logging: Whether DEBUG messages are logged.
        run_config: The run's configuration: the table `[tool.flwr.app.config]` of an app's
            pyproject.toml as it stands (tables in it are flattened to dotted keys, as Flower does).
        workers: At most so many workers.
        client_timeout_s: Seconds a client may take; None waits for ever.

    Returns:
        The ServerApp's context, with whatever it put into `context.state`.

    Raises:
        ValueError: If the configuration has an unknown key or value.
        RunError: If the engine cannot start.
    """
    settings, idle = _settings(backend_name, dict(backend_config or {}), workers, client_timeout_s)
    settings["run_config"] = config = _flattened(run_config or {})
    _tell_idle({"enable_tf_gpu_growth": enable_tf_gpu_growth, **idle})
    if verbose_logging:
        logging.getLogger("flwr").setLevel(logging.DEBUG)
        _log.setLevel(logging.DEBUG)
    for note in kernels_in_use.notes(kernels.pinned()):
        _log.warning("%s", note)
    with _grid(backend_name, client_app, num_supernodes, settings) as grid, pinned_threads():
        return _served(server_app, grid, num_supernodes, config)


def _settings(
    backend_name: str,
    config: Mapping[str, Any],
    workers: int | None,
    client_timeout_s: float | None,
) -> tuple[dict[str, Any], dict[str, object]]:
    """The engine's arguments, and what the backend makes no use of, by name.

    Raises:
        ValueError: If the configuration has an unknown key or value.
    """
    resources, init_args = _check(backend_name, config), config.get("init_args")
    idle: dict[str, object] = {"backend_config['actor']": config.get("actor")}
    if backend_name == "ray":
        return {
            "workers": workers,
            "client_timeout_s": client_timeout_s,
            "client_resources": resources,
            "init_args": init_args,
        }, idle
    return {}, idle | {
        "backend_config['init_args']": init_args,
        "backend_config['client_resources']": config.get("client_resources"),
        "workers": workers is not None,
        "client_timeout_s": client_timeout_s is not None,
    }


def _tell_idle(idle: Mapping[str, object]) -> None:
    """Log what was given and does nothing."""
    for name, given in idle.items():
        if given:
            _log.warning("%s does nothing here: %s", name, _why_idle(name))


def _served(
    server_app: ServerApp, grid: LocalGrid, num_supernodes: int, config: Mapping[str, Any]
) -> Context:
    """Run the ServerApp on a grid, tell what was odd, and return its context."""
    context = Context(
        run_id=1,
        node_id=internals.SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(config),
    )
    internals.ensure_identity()
    watch = grid.reply_watch = ReplyWatch(lambda line: _log.warning("%s", line))
    try:
        with internals.no_endless_waiting(num_supernodes, _WAITS, grid.patience.asked):
            server_app(grid, context)
    finally:
        watch.flush()
        for incident in grid.incidents:
            if incident not in watch.said:
                _log.warning("%s", incident)
    return context


def _grid(name: str, app: ClientApp, clients: int, settings: dict[str, Any]) -> LocalGrid:
    if name == "inline":
        from fedsim.engine.inline import InlineGrid

        return InlineGrid(app, clients, **settings)
    from fedsim.engine.ray.grid import RayGrid

    return RayGrid(app, clients, **settings)


def _check(backend_name: str, config: Mapping[str, Any]) -> dict[str, float]:
    """Refuse a backend that cannot be; return what one worker takes."""
    if backend_name not in _BACKENDS:
        raise ValueError(f"backend_name: {unknown(backend_name, 'a backend', _BACKENDS)}")
    for key in config:
        if key not in _CONFIG_KEYS:
            raise ValueError(
                f"backend_config: {unknown(key, 'a key of backend_config', _CONFIG_KEYS)}"
            )
        if not isinstance(config[key], Mapping | NoneType):
            raise ValueError(f"backend_config['{key}'] = {config[key]!r}: must be a mapping")
    resources = {**_FLOWER_RESOURCES, **dict(config.get("client_resources") or {})}
    where = "backend_config['client_resources']"
    for key, value in resources.items():
        if key not in _RESOURCE_KEYS:
            raise ValueError(
                f"{where}: {unknown(key, 'a key of client_resources', _RESOURCE_KEYS)}"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise ValueError(f"{where}['{key}'] = {value!r}: must be a number >= 0")
    if not any(resources.values()):
        raise ValueError(f"{where}: a worker takes no CPU and no GPU; give one of them above 0")
    return resources


def _why_idle(name: str) -> str:
    if name in ("enable_tf_gpu_growth", "backend_config['actor']"):
        return "set the environment variable TF_FORCE_GPU_ALLOW_GROWTH=true instead"
    return "backend_name = 'inline' runs the clients one after another in this process"


def _flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The table with `{"a": {"b": 1}}` as `{"a.b": 1}`.

    Raises:
        ValueError: If a value is none that Flower's configuration has.
    """
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[f"{prefix}{key}"] = value
        else:
            raise ValueError(
                f"run_config['{prefix}{key}'] = {value!r}: must be true, false, a number or text"
            )
    return flat
