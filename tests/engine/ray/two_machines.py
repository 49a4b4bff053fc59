"""Two machines of network, process and mount namespaces, for tests of a Ray cluster of both.

`alone(...)` runs a program on the first machine, and there `SecondMachine` makes the other one.
They see neither each other's processes nor each other's memory, and one cable joins them. All of it
ends with the program.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
_NET = "10.99.0"
FIRST = f"{_NET}.1"
_PORT = 6379
_TOOLS = ("unshare", "nsenter", "ip", "mount")


def why_not() -> str:
    """Why there can be no two machines here; empty where there can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(
        [*_apart(), "ip", "link", "add", "first", "type", "veth", "peer", "name", "second"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return tried.stderr.strip()


def _apart() -> list[str]:
    """The beginning of a command that runs on a machine of its own."""
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    own = ["--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
    return ["unshare", *user, *own]


class Ended(NamedTuple):
    """How a program ended: its code, None when its time was over, and what it wrote."""

    code: int | None
    out: str
    err: str


def alone(source: str, folder: Path, timeout_s: float, *arguments: str) -> Ended:
    """Run a Python program on the first machine; `folder` is empty on the second one."""
    # its address is there with or without a cable
    setup = f'ip link set lo up && ip addr add {FIRST}/32 dev lo && exec "$@"'
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    env = {**os.environ, "RAY_TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    command = [*_apart(), "sh", "-c", setup, "sh", sys.executable, "-c", source, *arguments]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        try:
            code = subprocess.run(
                command, stdout=said, stderr=complained, timeout=timeout_s, check=False, env=env
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        for file in (said, complained):
            file.seek(0)
        return Ended(code, said.read(), complained.read())


class SecondMachine:
    """Made on the first machine, with a cable between them.

    Args:
        number: The last of its address.
    """

    def __init__(self, number: int = 2) -> None:
        self.address = f"{_NET}.{number}"
        hidden = os.environ["RAY_TMPDIR"]
        setup = f"mount -t tmpfs none {hidden} && mount -t tmpfs none /dev/shm && ip link set lo up"
        own = ["--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
        self._keeper = subprocess.Popen(
            ["unshare", *own, "sh", "-c", f"{setup} && echo up && exec sleep infinity"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "up\n"
        keeper = self._keeper.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text()
        self._init = int(children.split()[0])
        cable = f"ip link add first type veth peer name second netns {self._init}"
        _do(f"{cable} && ip link set first up")
        _do(f"ip route add {self.address}/32 dev first src {FIRST}")
        self.do(f"ip addr add {self.address}/24 dev second && ip link set second up")

    def do(self, command: str) -> str:
        """Run a shell's command there and return what it prints."""
        return _do(f"exec {self._there} sh -c '{command}'")

    @property
    def _there(self) -> str:
        return f"nsenter --target {self._init} --net --pid --mount"

    def join(self, address: str, cpus: int = 1) -> None:
        """Start a Ray node there."""
        python = sys.executable
        self.do(
            f"{python} -m ray.scripts.scripts start --address={address} "
            f"--node-ip-address={self.address} --num-cpus={cpus} --disable-usage-stats"
        )

    def processes(self, word: str = "") -> list[int]:
        """The numbers, here, of the processes there whose command has this word in it."""
        inside = os.stat(f"/proc/{self._init}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self._init:
                try:
                    there = os.stat(entry / "ns/pid").st_ino == inside
                    command = (entry / "cmdline").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if there and word in command:
                    found.append(int(entry.name))
        return found

    def signal(self, number: signal.Signals, word: str = "") -> None:
        """Send a signal to the processes there whose command has this word in it."""
        for process in self.processes(word):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def end(self) -> None:
        """End what runs there, and switch it off for good."""
        self.signal(signal.SIGKILL)
        time.sleep(0.5)  # others learn of it while there is a cable
        self._keeper.kill()
        self._keeper.wait()
        _do("ip link del first || true")

    def unplug(self) -> None:
        """Pull the cable."""
        _do("ip link set first down")


def start_head(cpus: int = 1) -> str:
    """Start a Ray cluster on the first machine; return its address."""
    _do(
        f"{sys.executable} -m ray.scripts.scripts start --head --node-ip-address={FIRST} "
        f"--port={_PORT} --num-cpus={cpus} --include-dashboard=false --disable-usage-stats"
    )
    return f"{FIRST}:{_PORT}"


def wait_for_nodes(count: int, timeout_s: float = 90.0) -> None:
    """Wait until a cluster that this process has joined has just so many nodes."""
    import ray

    until = time.monotonic() + timeout_s
    while sum(node["Alive"] for node in ray.nodes()) != count:
        if time.monotonic() > until:
            raise TimeoutError(f"no {count} nodes within {timeout_s:g} s")
        time.sleep(0.1)


def _do(command: str) -> str:
    with tempfile.TemporaryFile("w+") as said:  # a pipe would be held open by what it starts
        done = subprocess.run(["sh", "-c", command], stdout=said, stderr=said, check=False)
        said.seek(0)
        if done.returncode:
            raise RuntimeError(f"{command}: {said.read()[-2000:]}")
        return said.read()
