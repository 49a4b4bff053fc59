"""The `flwr` command at a deployment: how it finds the SuperLink, what it is told and answers."""

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.deployment.addresses import LOOPBACK
from fedsim.deployment.compose import Service
from fedsim.deployment.logs import last_lines, text_of

_CONNECTION = "loopback"
_LOOK_S = 2.0


class Entrance(NamedTuple):
    """Where the `flwr` command finds a deployment's SuperLink.

    Attributes:
        service: The service that listens: the SuperLink, or what stands before it.
        port: Its port in the compose file.
        certificate: That of the authority, in the service's folder; None without TLS.
    """

    service: str
    port: int
    certificate: str | None


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


class FlowerCommands:
    """`flwr run` at a deployment, and what is asked of the SuperLink around it.

    Args:
        perform: Runs a `flwr` command to its end: given its name, its arguments, the log that it
            writes and a limit in seconds, it returns False when the command took longer.
        client_logs: Returns the logs of the processes of clients.
        answer_s: How long the SuperLink may take to answer a question.
    """

    def __init__(
        self,
        perform: Callable[[str, Sequence[str], Path, float], bool],
        client_logs: Callable[[], Sequence[Path]],
        answer_s: float,
    ) -> None:
        self._perform, self._client_logs, self._answer_s = perform, client_logs, answer_s
        self._runs, self._asked = itertools.count(1), itertools.count(1)

    def run(
        self, folder: Path, app_dir: str | Path, arguments: Sequence[str], timeout_s: float
    ) -> FlowerRun:
        """Submit an app, wait for its end and return what it logged.

        Args:
            folder: Where logs go.
            app_dir: The app's folder, as messages call it.
            arguments: What `run_arguments` made of the app.
            timeout_s: How long the run may take.

        Raises:
            RunError: If the run fails or takes too long; it ends with the last lines of what the
                ServerApp and the clients logged.
        """
        log = folder / f"flwr-run-{next(self._runs)}.log"
        started = time.monotonic()
        in_time = self._perform("run", arguments, log, timeout_s)
        wall_time_s = time.monotonic() - started
        text = text_of(log)
        submitted = re.search(r"Successfully started run (\d+)", text)
        if submitted is None:
            raise RunError(f"flwr run did not submit {app_dir}{last_lines(log)}")
        run_id = submitted[1]
        if not in_time:
            # The nodes would go on serving it, and the next run would wait for them.
            stopped = folder / f"flwr-stop-{run_id}.log"
            self._perform("stop", [run_id, _CONNECTION], stopped, self._answer_s)
            raise RunError(
                f"run {run_id} did not end within {timeout_s:g} s and was stopped{self._ends(log)}"
            )
        status = self._end_of(folder, run_id, started + timeout_s)
        if status != "finished:completed":
            raise RunError(f"run {run_id} ended as {status}{self._ends(log)}")
        return FlowerRun(int(run_id), text, wall_time_s)

    def supernode(self, folder: Path, words: Sequence[str]) -> dict[str, Any]:
        """Ask by `flwr supernode`, and return what is answered.

        Raises:
            RunError: If it is refused, with what is said.
        """
        log = folder / f"flwr-supernode-{next(self._asked)}.log"
        self._perform("supernode", [*words, _CONNECTION, "--format", "json"], log, self._answer_s)
        text = text_of(log)
        with contextlib.suppress(ValueError):
            answer = json.loads(text[text.find("{") :])
            if isinstance(answer, dict) and answer.get("success"):
                return answer
        raise RunError(f"flwr supernode {' '.join(words)} was refused{last_lines(log)}")

    def _end_of(self, folder: Path, run_id: str, deadline: float) -> str:
        """Return how a run ended; a SuperLink that is started again has ended the stream alone."""
        while True:
            with contextlib.suppress(RunError):
                status = self._status(folder, run_id)
                if status.startswith("finished") or time.monotonic() > deadline:
                    return status
            if time.monotonic() > deadline:
                return self._status(folder, run_id)
            time.sleep(_LOOK_S)

    def _status(self, folder: Path, run_id: str) -> str:
        """Return what Flower says of a run, such as `finished:completed`."""
        log = folder / f"flwr-list-{run_id}.log"
        arguments = [_CONNECTION, "--run-id", run_id, "--format", "json"]
        self._perform("list", arguments, log, self._answer_s)
        try:
            return str(json.loads(text_of(log))["runs"][0]["status"])
        except (ValueError, LookupError) as error:
            raise RunError(
                f"flwr list did not tell how run {run_id} ended{last_lines(log)}"
            ) from error

    def _ends(self, log: Path) -> str:
        """The last lines of a run's log and of what its clients wrote."""
        return "".join(last_lines(path) for path in (log, *self._client_logs()))


def run_arguments(
    app_dir: str | Path, run_config: Mapping[str, bool | int | float | str]
) -> list[str]:
    """Return the arguments of `flwr run` for an app.

    Args:
        app_dir: Folder with the app's `pyproject.toml`.
        run_config: Values that replace those of `[tool.flwr.app.config]`.

    Raises:
        ScenarioError: If a value is none that `flwr` reads.
    """
    arguments = [str(Path(app_dir).resolve()), _CONNECTION, "--stream"]
    for key, value in run_config.items():
        arguments += ["--run-config", f"{key}={config_value(key, value)}"]
    return arguments


def entrance_of(services: Mapping[str, Service]) -> Entrance:
    """Return the SuperLink's own port, as its command has it."""
    name, command = next(
        (name, each.command)
        for name, each in services.items()
        if "flower-superlink" in each.command
    )
    certificate = None
    if "--insecure" not in command:
        certificate = command[command.index("--ssl-ca-certfile") + 1]
    return Entrance(name, int(command[command.index("--port") + 1]), certificate)


def connection(entrance: Entrance, port: int, folder: Path) -> str:
    """Return the configuration with which the `flwr` command finds the SuperLink.

    Args:
        entrance: Where it is found.
        port: The port of this machine that stands for the entrance's.
        folder: Where the services live.
    """
    trust = "insecure = true"
    if entrance.certificate is not None:
        certificate = folder / entrance.service / entrance.certificate
        trust = f"root-certificates = {json.dumps(str(certificate))}"
    return (
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
        f'[superlink.{_CONNECTION}]\naddress = "{LOOPBACK}:{port}"\n{trust}\n'
    )


def config_value(key: str, value: object) -> str:
    """Return a scalar as `flwr run --run-config` reads it: TOML, but no escapes in a string.

    Raises:
        ScenarioError: If it is no scalar, or a string that cannot be written without escapes.
    """
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
