"""What all tests share: one thread, a cache of their own, no network, one Ray cluster."""

import atexit
import contextlib
import errno
import functools
import gc
import ipaddress
import logging
import os
import socket
import warnings
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from fedsim.basics.kernels_in_use import in_use
from fedsim.basics.loading import spare_what_is_loaded
from tests import optimisations

ROOT = Path(__file__).resolve().parents[1]
_ON_RAY = ("ray_cluster", "lender", "lent_workers")  # fixtures

settings.register_profile("fedsim", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("thorough", deadline=None, max_examples=500)  # `make test-slow`
settings.register_profile("search", deadline=None, max_examples=60, database=None)  # `make zoo`
settings.load_profile("fedsim")

# Modules are no garbage: to look for it among all that tests import, meanwhile and at the end,
# takes three seconds of each process. One that only hands tests out imports no torch either.
gc.disable()
atexit.register(gc.freeze)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Look for garbage from the first test on, and not among what is there already."""
    spare_what_is_loaded()
    gc.enable()


@functools.cache
def _group(file):
    """What one of several processes runs together: a file, all that share Ray, all scenarios."""
    if file.endswith(".toml"):
        return "scenarios"
    text = (ROOT / file).read_text(encoding="utf-8")
    return "ray" if any(fixture in text for fixture in _ON_RAY) else file


class _Groups(LoadScopeScheduling):
    def _split_scope(self, nodeid):
        return _group(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config, log):
    return _Groups(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Let the largest groups come first, so that no process is left with one in the end."""
    first = ("ray", "scenarios", "tests/laws/test_types.py")
    items.sort(key=lambda item: _group(item.nodeid.partition("::")[0]) not in first)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Let full collections pass over what is there before a module's tests.

    Flower runs one per reply, and after some thousand tests each would take half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _few_loggers():
    """Let torch's forty loggers hand on to one: pytest attaches to every other, thrice a test."""
    import torch  # noqa: F401

    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    """Let libraries take their kernels now: no test's scenario pins others for those after it."""
    in_use()


@pytest.fixture(scope="session", autouse=True)
def _optimisations():
    with optimisations.forced(optimisations.asked()):
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    before = os.environ.get("FEDSIM_CACHE")
    os.environ["FEDSIM_CACHE"] = str(tmp_path_factory.mktemp("fedsim-cache"))
    yield
    if before is None:
        del os.environ["FEDSIM_CACHE"]
    else:
        os.environ["FEDSIM_CACHE"] = before


def _leaves_the_machine(probe, family, kind, address):
    if family not in (socket.AF_INET, socket.AF_INET6) or kind & socket.SOCK_DGRAM:
        return False  # connecting a datagram socket sends nothing; Ray learns its own address so
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address[0]).is_loopback:
            return False
    with socket.socket(family, socket.SOCK_DGRAM) as datagram:
        try:
            probe(datagram, address)
        except OSError:
            return True
        # from itself to itself: one of this machine's own addresses
        return datagram.getsockname()[0] != datagram.getpeername()[0]


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """Refuse connections that leave the machine, so that no test depends on one."""
    connect = socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            original = getattr(socket.socket, name)

            def guarded(self, address, _original=original):
                if _leaves_the_machine(connect, self.family, self.type, address):
                    raise OSError(errno.ENETUNREACH, f"a test connects to {address}")
                return _original(self, address)

            patch.setattr(socket.socket, name, guarded)
        yield


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray cluster of two logical CPUs for all tests; grids join it and leave it running."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    if ray.is_initialized():
        yield ray
        return
    with pytest.MonkeyPatch.context() as patch:
        # workers import the helpers that tests share
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with _leaks_of_ray():
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
        yield ray
        with _leaks_of_ray():
            ray.shutdown()


@pytest.fixture(scope="session")
def lender(ray_cluster):
    """Has workers for the grids of tests that end none: `lender.grid(...)` is a `RayGrid`."""
    from tests.engine.ray.lent import Lender

    with contextlib.closing(Lender()) as lender:
        yield lender


@pytest.fixture
def lent_workers(lender):
    """Let the grids that runs of a test begin have lent workers."""
    with lender.lending():
        yield


@contextlib.contextmanager
def _leaks_of_ray():
    """Ray opens files and starts processes without closing or awaiting them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
