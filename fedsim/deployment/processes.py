"""A compose file's services as processes of this machine: the same commands, without containers.

`docker-compose.yml` says how a federation runs on real nodes. Here its very commands run on
loopback, so that a test can prove them where there is no Docker. Only what a container would have
given is put in place of it: addresses (`superlink:8000` becomes a free port of 127.0.0.1), a
working folder for each service with its mounts as links, and a Flower home of its own.

    with Deployment("docker-compose.yml") as deployment:
        run = deployment.flwr_run(".", {"scenario": "scenarios/deploy_two_clients.toml"})
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fedsim.basics.errors import RunError, ScenarioError, unknown
from fedsim.basics.home import expanded

LOOPBACK = "127.0.0.1"

# A command and a health check are one sentence each: an overlay replaces them whole, while other
# lists (volumes, networks) grow.
_REPLACED = frozenset({"command", "entrypoint", "test"})
_CONTAINER_HOME = "/app/"
_CONNECTION = "loopback"
_POLL_S = 0.1
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


class Service(NamedTuple):
    """One service of a compose file, as far as a process can follow it.

    Attributes:
        command: Entrypoint and arguments.
        environment: Variables that the file sets.
        volumes: Where a mount comes from, by its path below the working folder; None for a named
            volume.
        needs: Services that must be healthy before this one starts.
        health: Command that exits with 0 when the service is healthy.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    volumes: Mapping[str, Path | None]
    needs: tuple[str, ...]
    health: tuple[str, ...]


class FlowerRun(NamedTuple):
    """A finished `flwr run`.

    Attributes:
        run_id: Flower's number for the run.
        log: What the ServerApp logged, as streamed by `flwr run`.
        wall_time_s: From submission to the end of the run.
    """

    run_id: int
    log: str
    wall_time_s: float


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `overlay` put over it, as `docker compose -f base -f overlay` does.

    Example:
        >>> merge({"command": ["a"], "volumes": ["x"]}, {"command": ["b"], "volumes": ["y"]})
        {'command': ['b'], 'volumes': ['x', 'y']}
    """
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        elif isinstance(old, list) and isinstance(value, list) and key not in _REPLACED:
            merged[key] = [*old, *value]
        else:
            merged[key] = value
    return merged


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Return `text` with `${NAME}` and `${NAME:-default}` replaced from `variables`.

    Example:
        >>> interpolate("${DATA:-./data}:/app/data", {})
        './data:/app/data'
    """
    return re.sub(
        r"\$\{(\w+)(?::-([^}]*))?\}",
        lambda found: variables.get(found[1]) or found[2] or "",
        text,
    )


def read_services(compose_file: Path, overlays: Sequence[Path] = ()) -> dict[str, Service]:
    """Return the services of a compose file with its overlays, by name.

    Args:
        compose_file: The base file; the paths of all files are relative to its folder.
        overlays: Further files, each put over what came before.

    Raises:
        ScenarioError: If a file is missing or holds what a process cannot follow.
    """
    import yaml  # type: ignore[import-untyped]

    document: dict[str, Any] = {}
    for path in (compose_file, *overlays):
        if not path.is_file():
            raise ScenarioError(f"{path} is not a file; expected a compose file")
        document = merge(document, yaml.safe_load(path.read_text(encoding="utf-8")))
    root = compose_file.resolve().parent
    services = {
        name: _service(name, table, root) for name, table in document.get("services", {}).items()
    }
    for name, service in services.items():
        for need in service.needs:
            if need not in services:
                raise ScenarioError(
                    f"{compose_file}: service {name} depends on "
                    f"{unknown(need, 'a service of the file', services)}"
                )
    return services


def _service(name: str, table: Mapping[str, Any], root: Path) -> Service:
    command = [*table.get("entrypoint", ()), *table.get("command", ())]
    test = table.get("healthcheck", {}).get("test", [])
    if "entrypoint" not in table or not isinstance(table["entrypoint"], list):
        raise ScenarioError(
            f"service {name} has no entrypoint as a list, such as [flower-superlink]"
        )
    if test[:1] != ["CMD"]:
        raise ScenarioError(f"service {name} has no healthcheck of the form [CMD, ...]")
    volumes: dict[str, Path | None] = {}
    for mount in table.get("volumes", ()):
        source, target = interpolate(mount, os.environ).split(":")[:2]
        if not target.startswith(_CONTAINER_HOME):
            raise ScenarioError(
                f"service {name} mounts {target}: a process sees what is below {_CONTAINER_HOME}"
            )
        is_path = source.startswith((".", "/", "~"))
        volumes[target.removeprefix(_CONTAINER_HOME)] = root / expanded(source) if is_path else None
    return Service(
        command=tuple(map(str, command)),
        environment={key: str(value) for key, value in table.get("environment", {}).items()},
        volumes=volumes,
        needs=tuple(table.get("depends_on", ())),
        health=tuple(test[1:]),
    )


class Addresses:
    """Rewrites the addresses of a compose file to free ports of this machine.

    The rest of a command stays as it is.

    Args:
        services: The names that are addresses in the file.
        free_port: Gives a port that nobody uses.
    """

    def __init__(self, services: Sequence[str], free_port: Callable[[], int]) -> None:
        names = "|".join(map(re.escape, sorted(services, key=len, reverse=True)))
        self._address = re.compile(rf"(?<![\w.-])({names}|0\.0\.0\.0|127\.0\.0\.1):(\d+)\b")
        self._free_port = free_port
        self._services = frozenset(services)
        self._ports: dict[tuple[str, int], int] = {}

    def port(self, service: str, port: int) -> int:
        """Return the port of this machine that stands for `port` of `service`."""
        while (service, port) not in self._ports:
            free = self._free_port()
            if free not in self._ports.values():
                self._ports[service, port] = free
        return self._ports[service, port]

    def rewrite(self, service: str, words: Sequence[str]) -> list[str]:
        """Return the command of `service` with its addresses on this machine.

        Example:
            >>> addresses = Addresses(["link", "node"], iter([4001, 4002]).__next__)
            >>> addresses.rewrite("link", ["run", "--host", "0.0.0.0", "--port", "8000"])
            ['run', '--host', '127.0.0.1', '--port', '4001']
            >>> addresses.rewrite("node", ["run", "--superlink", "link:8000", "--port", "8000"])
            ['run', '--superlink', '127.0.0.1:4001', '--port', '4002']
        """

        def local(found: re.Match[str]) -> str:
            owner = found[1] if found[1] in self._services else service
            return f"{LOOPBACK}:{self.port(owner, int(found[2]))}"

        rewritten = [self._address.sub(local, word) for word in words]
        for i, word in enumerate(words):
            if word == "0.0.0.0":
                rewritten[i] = LOOPBACK
            if word == "--port" and i + 1 < len(words):
                rewritten[i + 1] = str(self.port(service, int(words[i + 1])))
        return rewritten


class Deployment:
    """A context in which the services of a compose file run as processes on loopback.

    Entering starts each service when those it depends on are healthy, by the file's own health
    checks, and returns when all are. Leaving ends exactly these processes and what they started,
    whatever the reason for leaving; should this process die without leaving, a guard ends them.

    Args:
        compose_file: The compose file.
        overlays: Compose files put over it, such as `deploy/tls.yml`.
        folder: Where the services live, with a log each; a temporary folder when None.
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
        start_timeout_s: float = 90.0,
    ) -> None:
        self.compose_file = Path(compose_file)
        self.services = read_services(self.compose_file, [Path(path) for path in overlays])
        self._folder = folder
        self._start_timeout_s = start_timeout_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._runs = itertools.count(1)
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
            self._addresses = Addresses(list(self.services), _free_port)
            self._commands = {
                name: self._addresses.rewrite(name, service.command)
                for name, service in self.services.items()
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
        return _text(self._log_path(service))

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
        arguments = [str(Path(app_dir).resolve()), _CONNECTION, "--stream"]
        for key, value in (run_config or {}).items():
            arguments += ["--run-config", f"{key}={_toml(key, value)}"]
        if not self._processes:
            raise RunError("flwr_run needs a running deployment: call it inside the with statement")
        config = self._home("flwr") / "config.toml"
        config.write_text(self._connection(), encoding="utf-8")
        log = self.folder / f"flwr-run-{next(self._runs)}.log"
        started = time.monotonic()
        in_time = self._flwr("run", arguments, log, timeout_s)
        wall_time_s = time.monotonic() - started
        text = _text(log)
        submitted = re.search(r"Successfully started run (\d+)", text)
        if submitted is None:
            raise RunError(f"flwr run did not submit {app_dir}{_tail(log)}")
        run_id = submitted[1]
        if not in_time:
            # The nodes would go on serving it, and the next run would wait for them.
            stopped = self.folder / f"flwr-stop-{run_id}.log"
            self._flwr("stop", [run_id, _CONNECTION], stopped, self._start_timeout_s)
            raise RunError(
                f"run {run_id} did not end within {timeout_s:g} s and was stopped{self._tails(log)}"
            )
        status = self._status(run_id)
        if status != "finished:completed":
            raise RunError(f"run {run_id} ended as {status}{self._tails(log)}")
        return FlowerRun(int(run_id), text, wall_time_s)

    def _start(self) -> None:
        waiting = dict(self.services)
        checks: dict[str, subprocess.Popen[bytes]] = {}
        deadlines: dict[str, float] = {}
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
                        checks[name] = self._check_health(name)
                    elif checks[name].poll() is not None and checks.pop(name).returncode == 0:
                        healthy.add(name)
                        del deadlines[name]
                    elif time.monotonic() > deadlines[name]:
                        raise RunError(
                            f"service {name} was not healthy after {self._start_timeout_s:g} s"
                            f"{_tail(self._log_path(name))}{_tail(self._health_path(name))}"
                        )
                time.sleep(_POLL_S)
        finally:
            _end(checks.values())

    def _start_service(self, name: str, service: Service) -> None:
        workspace = self._home(name).parent
        for target, source in service.volumes.items():
            place = workspace / target
            if source is None:
                place.mkdir(parents=True, exist_ok=True)
            elif not place.is_symlink():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(source.resolve(), target_is_directory=True)
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
                    f"{_tail(self._log_path(name))}"
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
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
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

    def _connection(self) -> str:
        """Return the configuration with which the `flwr` command finds the SuperLink."""
        name, command = next(
            (name, command)
            for name, command in self._commands.items()
            if command[0] == "flower-superlink"
        )
        address = f"{LOOPBACK}:{command[command.index('--port') + 1]}"
        if "--insecure" in command:
            trust = "insecure = true"
        else:
            certificate = command[command.index("--ssl-ca-certfile") + 1]
            trust = f"root-certificates = {json.dumps(str(self.folder / name / certificate))}"
        return (
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "{address}"\n{trust}\n'
        )

    def _status(self, run_id: str) -> str:
        """Return how Flower says that a run ended, such as `finished:completed`."""
        log = self.folder / f"flwr-list-{run_id}.log"
        arguments = [_CONNECTION, "--run-id", run_id, "--format", "json"]
        self._flwr("list", arguments, log, self._start_timeout_s)
        try:
            return str(json.loads(_text(log))["runs"][0]["status"])
        except (ValueError, LookupError) as error:
            raise RunError(f"flwr list did not tell how run {run_id} ended{_tail(log)}") from error

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

    def _tails(self, log: Path) -> str:
        """Return the last lines of a run's log and of what its clients wrote."""
        clients = [
            self._log_path(name)
            for name, command in self._commands.items()
            if command[0] == "flower-superexec"
        ]
        return "".join(_tail(path) for path in (log, *clients))

    def _tell_guard(self, word: str) -> None:
        pipe = self._guard.stdin
        assert pipe is not None
        pipe.write(f"{word}\n".encode())
        pipe.flush()

    def _end(self) -> None:
        _end(self._processes.values())
        self._processes.clear()
        self._tell_guard("done")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


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


def _toml(key: str, value: object) -> str:
    """Return a scalar as `flwr run --run-config` reads it: TOML, but no escapes in a string."""
    if not isinstance(value, bool | int | float | str):
        raise ScenarioError(
            f"run_config {key} = {value!r} is not a scalar; allowed: bool, int, float, str"
        )
    if not isinstance(value, str):
        return json.dumps(value)
    quote = '"' if "'" in value else "'"
    if quote in value or not value.isprintable() or (quote == '"' and "\\" in value):
        raise ScenarioError(
            f"run_config {key} = {value!r} is not a string that flwr reads; allowed: printable "
            "characters with one kind of quotes, and a backslash only beside double quotes"
        )
    return f"{quote}{value}{quote}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _tail(path: Path, lines: int = 30) -> str:
    last = "\n".join(_text(path).splitlines()[-lines:])
    return f"\n--- last lines of {path.name}\n{last or '(empty)'}"
