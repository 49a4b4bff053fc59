"""The addresses of a compose file as free ports of this machine."""

import re
import socket
from collections.abc import Callable, Sequence

LOOPBACK = "127.0.0.1"


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


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])
