"""A compose file's services as processes of this machine: the same commands, without containers.

`docker-compose.yml` says how a federation runs on real nodes. Here its very commands run on
loopback, so that a test can prove them where there is no Docker. Only what a container would have
given is put in place of it: addresses (`superlink:8000` becomes a free port of 127.0.0.1), a
working folder for each service with its mounts as links, and a Flower home of its own.

    with Deployment("docker-compose.yml") as deployment:
        run = deployment.flwr_run(".", {"scenario": "scenarios/deploy_two_clients.toml"})
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsim.basics.errors import RunError, ScenarioError, unknown
from fedsim.deployment.addresses import Addresses, free_port
from fedsim.deployment.compose import Service, read_services
from fedsim.deployment.flower_commands import (
    Entrance,
    FlowerCommands,
    FlowerRun,
    connection,
    entrance_of,
    run_arguments,
)
from fedsim.deployment.logs import last_lines, text_of

_POLL_S = 0.1
_CHECK_EVERY_S = 0.5  # a health check is a process, which takes time from what it waits for
_GRACE_S = 5.0

# Reads one process group per line. When the pipe closes without the word `done`, the process that
# wrote to it died unawares (SIGKILL, os._exit), and what it had started must not live on.
_GUARD = """
groups=
while read -r word; do
    if [ "$word" = done ]; then exit 0; fi
    groups="$groups -$word"
done
kill -s TERM -- $groups 2>/dev/null
sleep 5
kill -s KILL -- $groups 2>/dev/null
"""


class Deployment:
    """A context in which the services of a compose file run as processes on loopback.

    Entering starts each service when those it depends on are healthy, by the file's own health
    checks, and returns when all are. Leaving ends exactly these processes and what they started,
    whatever the reason for leaving; should this process die without leaving, a guard ends them.

    Args:
        compose_file: The compose file.
        overlays: Compose files put over it, such as `deploy/tls.yml`.
        folder: Where the services live, with a log each; a temporary folder when None.
        within: For some services, the command that starts theirs, such as `unshare -m` for a
            namespace of its own.
        once_healthy: For some services, what is done before those that need theirs start, such as
            registering the keys of SuperNodes.
        entrance: Where `flwr` finds the SuperLink, if not at its own port.
        start_timeout_s: How long a service may take to become healthy.

    Raises:
        ScenarioError: If the file holds what a process cannot follow.
        RunError: On entering, if a service does not become healthy; it names the service and
            ends with the last lines of its log.
    """

    def __init__(
        self,
        compose_file: str | Path,
        *,
        overlays: Sequence[str | Path] = (),
        folder: str | Path | None = None,
        within: Mapping[str, Sequence[str]] | None = None,
        once_healthy: Mapping[str, Callable[["Deployment"], None]] | None = None,
        entrance: Entrance | None = None,
        start_timeout_s: float = 90.0,
    ) -> None:
        self.compose_file = Path(compose_file)
        self.services = read_services(self.compose_file, [Path(path) for path in overlays])
        self._folder, self._within = folder, dict(within or {})
        self._once_healthy, self._entrance = dict(once_healthy or {}), entrance
        self._start_timeout_s = start_timeout_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._flower = FlowerCommands(self._flwr, self._client_logs, start_timeout_s)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start every service and wait until all are healthy."""
        with contextlib.ExitStack() as stack:
            self.folder = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="fedsim-", ignore_cleanup_errors=True)
                )
                if self._folder is None
                else self._folder
            ).resolve()
            self._addresses = Addresses(list(self.services), free_port)
            self._commands = {
                name: [*self._within.get(name, ()), *self._addresses.rewrite(name, each.command)]
                for name, each in self.services.items()
            }
            self._guard = stack.enter_context(
                subprocess.Popen(
                    ["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, start_new_session=True
                )
            )
            stack.callback(self._end)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End every process that was started."""
        self._stack.close()

    @property
    def pids(self) -> dict[str, int]:
        """The process of each running service."""
        return {name: process.pid for name, process in self._processes.items()}

    def command(self, service: str) -> list[str]:
        """Return the command line that was started for `service`."""
        return list(self._commands[service])

    def log(self, service: str) -> str:
        """Return what `service` has written to its output so far."""
        return text_of(self._log_path(service))

    def kill(self, service: str) -> None:
        """End a service at once, as a power cut does; nothing of it has time to say so."""
        process = self._processes.pop(service)
        _signal(process, signal.SIGKILL)
        process.wait()

    def restart(self, service: str) -> None:
        """Start a service that was killed, by the same command; its log begins anew."""
        self._start_service(service, self.services[service])

    def flwr_run(
        self,
        app_dir: str | Path,
        run_config: Mapping[str, bool | int | float | str] | None = None,
        *,
        timeout_s: float = 240.0,
    ) -> FlowerRun:
        """Submit a Flower app with `flwr run`, wait for its end and return what it logged.

        Args:
            app_dir: Folder with the app's `pyproject.toml`.
            run_config: Values that replace those of `[tool.flwr.app.config]`.
            timeout_s: How long the run may take, from building the app's bundle on.

        Raises:
            RunError: If the run fails or takes too long, or a service dies meanwhile; it ends
                with the last lines of what the ServerApp and the clients logged.
        """
        arguments = run_arguments(app_dir, run_config or {})
        if not self._processes:
            raise RunError("flwr_run needs a running deployment: call it inside the with statement")
        self._write_connection()
        return self._flower.run(self.folder, app_dir, arguments, timeout_s)

    def supernode(self, *words: str) -> dict[str, Any]:
        """Ask the SuperLink by `flwr supernode`, such as `register KEY`, and return its answer.

        Raises:
            RunError: If it refuses, with what it says.
        """
        self._write_connection()
        return self._flower.supernode(self.folder, words)

    def _write_connection(self) -> None:
        entrance = self._entrance or entrance_of(self.services)
        port = self._addresses.port(entrance.service, entrance.port)
        (self._home("flwr") / "config.toml").write_text(
            connection(entrance, port, self.folder), encoding="utf-8"
        )

    def _start(self) -> None:
        waiting = dict(self.services)
        checks: dict[str, subprocess.Popen[bytes]] = {}
        deadlines: dict[str, float] = {}
        next_check: dict[str, float] = {}
        healthy: set[str] = set()
        try:
            while len(healthy) < len(self.services):
                for name in [n for n, s in waiting.items() if healthy.issuperset(s.needs)]:
                    self._start_service(name, waiting.pop(name))
                    deadlines[name] = time.monotonic() + self._start_timeout_s
                if not deadlines:
                    raise ScenarioError(
                        f"{self.compose_file}: services {', '.join(waiting)} wait for one another"
                    )
                self._check_alive()
                for name in list(deadlines):
                    if name not in checks:
                        if time.monotonic() >= next_check.get(name, 0.0):
                            checks[name] = self._check_health(name)
                    elif checks[name].poll() is not None:
                        if checks.pop(name).returncode == 0:
                            self._is_healthy(name)
                            healthy.add(name)
                            del deadlines[name]
                            continue
                        next_check[name] = time.monotonic() + _CHECK_EVERY_S
                    if time.monotonic() > deadlines[name]:
                        raise RunError(
                            f"service {name} was not healthy after {self._start_timeout_s:g} s"
                            f"{last_lines(self._log_path(name))}{last_lines(self._health_path(name))}"
                        )
                time.sleep(_POLL_S)
        finally:
            _end(checks.values())

    def _is_healthy(self, name: str) -> None:
        if name in self._once_healthy:
            self._once_healthy[name](self)

    def _start_service(self, name: str, service: Service) -> None:
        workspace = self._home(name).parent
        for target, source in service.volumes.items():
            place = workspace / target
            if isinstance(source, str):
                source = self.folder / ".volumes" / source
                source.mkdir(parents=True, exist_ok=True)
            # what is mounted as the working folder itself is that folder, which outlives a restart
            if target != "." and not place.is_symlink():
                place.parent.mkdir(parents=True, exist_ok=True)
                if source.suffix == ".conf":  # it names addresses, as a command does
                    (text,) = self._addresses.rewrite(name, [source.read_text(encoding="utf-8")])
                    place.write_text(text, encoding="utf-8")
                else:
                    place.symlink_to(source.resolve(), target_is_directory=True)
        for folder in service.memory:
            (workspace / folder).mkdir(parents=True, exist_ok=True)
        self._processes[name] = self._spawn(
            name, self._commands[name], service.environment, self._log_path(name)
        )
        self._tell_guard(str(self._processes[name].pid))

    def _check_health(self, name: str) -> subprocess.Popen[bytes]:
        command = self._addresses.rewrite(name, self.services[name].health)
        return self._spawn(name, command, self.services[name].environment, self._health_path(name))

    def _check_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RunError(
                    f"service {name} exited with code {process.returncode}"
                    f"{last_lines(self._log_path(name))}"
                )

    def _home(self, name: str) -> Path:
        home = self.folder / name / ".flwr"
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _log_path(self, service: str) -> Path:
        if service not in self.services:
            raise ScenarioError(
                unknown(service, f"a service of {self.compose_file}", self.services)
            )
        return self.folder / f"{service}.log"

    def _health_path(self, service: str) -> Path:
        return self.folder / f"{service}.health.log"

    def _spawn(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command in the folder of service `name`, at the head of a group of its own."""
        home = self._home(name)
        # Flower starts its app processes by name, so the folder of the executables leads PATH.
        executables = Path(sys.executable).parent
        variables = {
            **{key: value for key, value in os.environ.items() if not key.startswith("FLWR_")},
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
            "PYTHONUNBUFFERED": "1",
            **environment,
            "FLWR_HOME": str(home),
            "PATH": f"{executables}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        with log.open("wb") as output:
            return subprocess.Popen(
                command,
                cwd=home.parent,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _flwr(self, command: str, arguments: Sequence[str], log: Path, timeout_s: float) -> bool:
        """Run a `flwr` command to its end; False when it took too long and was ended."""
        deadline = time.monotonic() + timeout_s
        process = self._spawn("flwr", ["flwr", command, *arguments], {}, log)
        try:
            while process.poll() is None:
                self._check_alive()
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
        finally:
            _end([process])
        return True

    def _client_logs(self) -> list[Path]:
        """What the processes of clients write to."""
        return [
            self._log_path(name)
            for name, command in self._commands.items()
            if "flower-superexec" in command
        ]

    def _tell_guard(self, word: str) -> None:
        pipe = self._guard.stdin
        assert pipe is not None
        pipe.write(f"{word}\n".encode())
        pipe.flush()

    def _end(self) -> None:
        _end(self._processes.values())
        self._processes.clear()
        self._tell_guard("done")


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the groups that these processes lead: the leaders are asked first, the rest is killed."""
    leaders = list(processes)
    for leader in leaders:
        _signal(leader, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while any(leader.poll() is None for leader in leaders) and time.monotonic() < deadline:
        time.sleep(_POLL_S / 2)
    for leader in leaders:
        _signal(leader, signal.SIGKILL)
        leader.wait()


def _signal(leader: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)
