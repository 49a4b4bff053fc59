"""The Ray cluster: joined or started, its room for workers, and how this process leaves it."""

import contextlib
import gc
import ipaddress
import logging
import math
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from fedsim.basics.errors import RunError
from fedsim.engine.ray.installed import ray
from fedsim.engine.ray.place import in_words, make_folder, place

_log = logging.getLogger("fedsim")


class RaySession:
    """Ray's session of this process, where a grid began it: the last grid ends it.

    Grids of several threads may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._grids = 0  # those that keep the session; 0 of one that somebody else began
        self._folder: str | None = None
        self._over = threading.Event()
        self._began = False  # ever, here or in the process that this is a fork of
        self._is_fork = False

    def forked(self) -> None:
        """Take note that this process is a fork: Ray's connections are the other's."""
        self._lock = threading.RLock()
        self._is_fork = self._is_fork or self._began or ray.is_initialized()

    def enter(
        self,
        address: str | None,
        workers: int | None,
        resources: Mapping[str, float],
        init_args: Mapping[str, Any] | None,
    ) -> tuple[bool, bool]:
        """Join the session of this process, or begin one; arguments as those of `_start_ray`.

        Returns:
            Whether it was there already or is a cluster's, and whether it must be left.

        Raises:
            RunError: In a fork of a process that has used Ray, where Ray would wait for ever.
        """
        if self._is_fork:
            raise RunError(
                "this process is a fork of one that has used Ray, and Ray does not work in it: "
                "give the run [engine] kind = 'inline', or start the process anew, as with "
                "multiprocessing.get_context('spawn')"
            )
        with self._lock:
            self._began = True
            joined = ray.is_initialized()
            if not joined:
                with _own_handler():
                    joined, self._folder = self._begun(
                        lambda: _start_ray(address, workers, resources, init_args)
                    )
                self._grids = 1
            elif self._grids:
                self._grids += 1
            return joined, self._grids > 0

    def _begun(self, start: Callable[[], tuple[bool, str | None]]) -> tuple[bool, str | None]:
        """Start Ray in a thread that stays: its processes end with the thread that began them."""
        if threading.current_thread() is threading.main_thread():
            return start()
        result: Future[tuple[bool, str | None]] = Future()
        over = self._over = threading.Event()

        def hold() -> None:
            try:
                result.set_result(start())
            except BaseException as error:
                result.set_exception(error)
            else:
                over.wait()

        threading.Thread(target=hold, name="ray", daemon=True).start()
        return result.result()

    def leave(self) -> None:
        """End the session when nobody is left in it."""
        with self._lock:
            self._grids = max(0, self._grids - 1)
            if self._grids:
                return
            if ray.is_initialized():
                # A session begun by another thread gives its objects the same names: references
                # that outlive this one would take those away when they are collected.
                gc.collect()
                ray.shutdown()
            self._over.set()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None


SESSION = RaySession()
os.register_at_fork(after_in_child=SESSION.forked)


@contextlib.contextmanager
def _own_handler() -> Iterator[None]:
    """Keep this process's way to end on SIGTERM, also while Ray starts, which sets its own."""
    ours = callable(signal.getsignal(signal.SIGTERM))
    before = ray._private.utils.set_sigterm_handler
    if ours:
        ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = before


def _start_ray(
    address: str | None,
    workers: int | None,
    resources: Mapping[str, float],
    init_args: Mapping[str, Any] | None,
) -> tuple[bool, str | None]:
    """Join the cluster at `address` or one that is up, else start one on this machine.

    Returns:
        Whether a cluster was joined, and the folder that was made for one that was started.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # if this process is killed while Ray starts, what Ray has started waits so long for the rest
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    extra = dict(init_args or {})
    named = address or extra.pop("address", None) or os.environ.get("RAY_ADDRESS")
    standing = None if named or extra else _standing_cluster()
    if named and not _answers(named):
        raise RunError(
            f"no Ray cluster answers at '{named}'; start one there with `ray start --head`, or "
            "leave "
            "[engine] address out"
        )
    if named or standing:
        try:
            ray.init(**{**quiet, "address": named or standing, **extra})
            if named and is_open_to_all(named):
                _log.warning(
                    "the Ray cluster at %s runs what anybody sends who reaches its ports: start "
                    "Ray and fedsim with RAY_AUTH_MODE=token on every machine, or keep to a "
                    "private network", named,
                )  # fmt: skip
            return True, None
        except Exception as error:
            if named:
                raise RunError(
                    f"no Ray cluster could be joined at '{named}': {in_words(error)}; start one "
                    "there with `ray start --head`, or leave [engine] address out"
                ) from error
    local = {**quiet, "address": "local", "include_dashboard": False}
    if workers is not None:
        # logical CPUs: asking for more workers than cores is allowed
        cores = os.cpu_count() or 1
        local["num_cpus"] = max(cores, math.ceil(workers * resources["num_cpus"]))
    folder = None if "_temp_dir" in extra else make_folder()
    if folder is not None:
        local["_temp_dir"] = folder
    try:
        ray.init(**{**local, **extra})
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        where = folder or place().folder
        raise RunError(
            f"Ray could not be started: {in_words(error)}; its logs are below {where}; try "
            "[engine] kind = 'inline'"
        ) from error
    return False, folder


def _standing_cluster() -> str | None:
    """The address of a cluster that `ray start` has left on this machine and that answers."""
    read = getattr(ray._private.utils, "read_ray_address", None)
    found = str((read() if read is not None else None) or "")
    return found if found and _answers(found) else None


def is_open_to_all(address: str) -> bool:
    """Tell whether a cluster is on a network and asks nobody for a token, as far as is known here.

    Example:
        >>> is_open_to_all("127.0.0.1:6379")
        False
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return False
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    if host in ("", "localhost"):
        return False  # "auto", "local": a cluster of this machine
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name


def _answers(address: str) -> bool:
    """Whether anybody listens at an address; Ray itself waits minutes for one that is gone."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return True  # "auto", "ray://...": for Ray to judge
    try:
        with socket.create_connection((host, int(port)), timeout=3.0):
            return True
    except OSError:
        return False


def node_here() -> str:
    """Return Ray's name of the node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def room(resources: Mapping[str, float]) -> int:
    """Return how many workers fit into the cluster, node by node, as Flower counts them.

    Args:
        resources: What one worker takes: `num_cpus` and `num_gpus`.
    """
    cpus, gpus = float(resources["num_cpus"]), float(resources["num_gpus"])
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [int(has.get("CPU", 0) / cpus)] if cpus else []
            fits += [int(has.get("GPU", 0) / gpus)] if gpus else []
            total += min(fits, default=0)
    return total


def how_many(resources: Mapping[str, float], cap: int | None) -> int:
    """Return how many workers to start: as many as fit, at most `cap`.

    Raises:
        RunError: If not even one fits.
    """
    total = room(resources)
    if total < 1:
        has = ray.cluster_resources()
        raise RunError(
            f"the Ray cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, no "
            f"node with room for one worker of {float(resources['num_cpus']):g} CPUs and "
            f"{float(resources['num_gpus']):g} GPUs; lower [engine] client_resources"
        )
    return total if cap is None else min(cap, total)
