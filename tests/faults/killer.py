"""Runs the command line in child processes that kill themselves at a named point.

As a script it imports everything once and then forks a child for every line of JSON on its standard
input, `{"arguments": [...], "folder": "...", "point": "...", "turn": n}`, and answers each with the
child's wait status. So a run that is really killed costs no start of an interpreter.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = "from fedsim.cli import main; main()"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    """Kills the process at the n-th of the calls that matter."""

    def __init__(self, turn: int) -> None:
        self.left = turn

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            die()


def _around(owner: Any, name: str, hook: Callable[..., None], *, after: bool = False) -> None:
    """Call `hook` with the arguments of each call of `owner.name`, before or after it."""
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        if not after:
            hook(*args, **kwargs)
        value = original(*args, **kwargs)
        if after:
            hook(*args, **kwargs)
        return value

    setattr(owner, name, called)


def arm(point: str, turn: int) -> None:
    """Let this process kill itself when it reaches a point for the n-th time.

    At "a client raises" it lives on, and the client whose number is the turn raises; at "it is
    asked to end" it gets SIGTERM.
    """
    import fedsim.basics.json_files
    import fedsim.client.executor
    import fedsim.data.synthetic
    import fedsim.runs.manifest
    import fedsim.runs.summary
    import fedsim.runs.world
    import strategies.fedavg

    countdown = _Countdown(turn)

    def when(holds: Callable[..., bool]) -> Callable[..., None]:
        return lambda *args, **kwargs: countdown.tick() if holds(*args, **kwargs) else None

    always = when(lambda *args, **kwargs: True)
    match point:
        case "the data are prepared":
            _around(fedsim.runs.world, "prepare", always)
        case "the run folder is being made":
            _around(Path, "rename", when(lambda source, _: (source / "scenario.json").exists()))
        case "the run folder is there":
            _around(
                fedsim.runs.manifest,
                "write_json_atomic",
                when(lambda path, _: path.name == "plan.json"),
            )
        case "clients train":
            _around(fedsim.client.executor.CohortExecutor, "train", always)
        case "replies are aggregated":
            _around(strategies.fedavg.FedAvg, "apply", always)
        case "the model is evaluated":
            _around(fedsim.client.executor.CohortExecutor, "evaluate_arrays", always)
        case "clients evaluate":
            _around(fedsim.client.executor.CohortExecutor, "evaluate", always)
        case "half a line of metrics is written":
            _tear_lines(countdown)
        case "metrics are written":
            _around(
                fedsim.basics.json_files.JsonLines,
                "append",
                when(lambda file, _: file._path.name == "metrics.jsonl"),
                after=True,
            )
        case "a checkpoint is half written":
            _tear_checkpoints(countdown)
        case "a checkpoint is written and not renamed":
            _around(Path, "rename", when(lambda _, target: target.parent.name == "checkpoints"))
        case "a checkpoint is renamed":
            named = when(lambda _, target: target.parent.name == "checkpoints")
            _around(Path, "rename", named, after=True)
        case "an old checkpoint is removed":
            _around(
                Path,
                "unlink",
                when(lambda path, **_: path.parent.name == "checkpoints"),
                after=True,
            )
        case "the final model is written":
            _around(Path, "rename", when(lambda _, target: target.name == "params.safetensors"))
        case "the summary is written":
            _around(
                fedsim.runs.summary,
                "write_json_atomic",
                when(lambda path, _: path.name == "summary.json"),
            )
        case "it is asked to end":
            _around(fedsim.client.executor.CohortExecutor, "train", _asking_at(turn))
        case "a client raises":
            _around(fedsim.data.synthetic.SyntheticData, "clients", _raising_for(turn))
        case _:
            raise ValueError(f"'{point}' is no point at which a run can be killed")


def _raising_for(client: int) -> Callable[..., None]:
    def raise_for_it(_: Any, client_ids: Any, **__: Any) -> None:
        if client in client_ids:
            raise OSError("its flash memory is worn out")

    return raise_for_it


def _asking_at(turn: int) -> Callable[..., None]:
    calls = iter(range(1, turn + 1))

    def ask(*_: Any, **__: Any) -> None:
        if next(calls, None) == turn:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _tear_lines(countdown: _Countdown) -> None:
    import fedsim.basics.json_files

    original = fedsim.basics.json_files.JsonLines.append

    def append(file: Any, record: Any) -> None:
        if file._path.name == "metrics.jsonl":
            countdown.left -= 1
            if countdown.left == 0:
                file._file.write(b'{"round": 3, "train/lo')
                die()
        original(file, record)

    fedsim.basics.json_files.JsonLines.append = append  # type: ignore[method-assign]


def _tear_checkpoints(countdown: _Countdown) -> None:
    original = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = original(path, *args, **kwargs)
        if path.parent.name == "checkpoints" and path.suffix == ".tmp":
            countdown.left -= 1
            if countdown.left == 0:
                file.write(b"\x10" * 1000)
                file.flush()
                die()
        return file

    Path.open = opened  # type: ignore[method-assign, assignment]


class Killer:
    """A process from which runs are forked, used by the tests.

    Args:
        root: The project.
        prefix: A command that starts the one after it, such as `unshare`.
    """

    def __init__(self, root: Path, *prefix: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-u", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def run(self, folder: Path, *arguments: str, point: str = "", turn: int = 1) -> tuple[int, str]:
        """Run the command line in a child; returns (exit code or -signal, what it printed)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "arguments": arguments,
            "folder": str(folder),
            "point": point,
            "turn": turn,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        output = (folder / "output.txt").read_text()
        return os.waitstatus_to_exitcode(int(answer)), output

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def _serve() -> None:
    gc.disable()
    _import_everything()
    gc.freeze()  # no child looks for garbage among it, which would copy it too
    gc.enable()
    answers = os.dup(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            _child(order)
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{status}\n".encode())
    os._exit(0)  # to take apart all that torch has made takes half a second


def _import_everything() -> None:
    """Import here what every child would import anew."""
    for module in (
        "clients.local_sgd",
        "fedsim.cli",
        "fedsim.engine.inline",
        "fedsim.runs.progress",
        "fedsim.runs.start",
        "numpy.ctypeslib",
        "numpy.ma",
        "safetensors.torch",
        "strategies.fedavg",
        "threadpoolctl",
    ):
        importlib.import_module(module)
    import torch

    import fedsim.scenario.load

    fedsim.scenario.load.load("quickstart")  # which reads the signatures of all that it names

    # the first call under vmap imports more than all of the above
    torch.func.vmap(torch.func.grad(torch.sum))(torch.zeros(2, 2))


def _child(order: dict[str, Any]) -> None:
    os.chdir(order["folder"])
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    code = 70
    try:
        from fedsim.cli import main

        if order["point"]:
            arm(order["point"], order["turn"])
        sys.argv = ["fedsim", *order["arguments"]]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
