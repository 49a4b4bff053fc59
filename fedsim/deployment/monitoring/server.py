"""The HTTP server that Prometheus asks: `/metrics` and `/health`."""

import logging
import socket
import socketserver
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from fedsim.basics.errors import ScenarioError
from fedsim.basics.host_port import HostPort
from fedsim.deployment.monitoring.families import families
from fedsim.deployment.monitoring.watch import Watch

_PATIENCE_S = 10.0  # with somebody who has connected and does not speak
_log = logging.getLogger("fedsim")


class MetricsServer(ThreadingHTTPServer):
    """Answers `/metrics` and `/health` of the runs that are watched.

    Args:
        address: Where to listen.
        watch: Looks at the runs.

    Raises:
        ScenarioError: If nothing can listen there.
    """

    daemon_threads = True

    def __init__(self, address: HostPort, watch: Watch) -> None:
        self.watch = watch
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Runs(watch))
        try:
            (family, *_, bound), *_ = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self.address_family = family
            super().__init__((str(bound[0]), int(bound[1])), _MetricsRequest)
        except OSError as error:
            raise ScenarioError(
                f"--listen {address.host}:{address.port}: nothing can listen there: "
                f"{error.strerror or error}; name an address of this machine and a port that is "
                "free"
            ) from error

    @property
    def url(self) -> str:
        """Where it is found."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}"

    def server_bind(self) -> None:
        """Bind, without asking for the name of the address, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with one request; one that is gone is no error."""
        _log.debug("a request of %s was not answered", client_address, exc_info=True)


class _Runs(Collector):
    """What is told at each scrape, one at a time."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._turn = watch, threading.Lock()

    def collect(self) -> Iterable[Metric]:
        with self._turn:
            return list(families(self._watch.look()))


class _MetricsRequest(BaseHTTPRequestHandler):
    """One request."""

    server: MetricsServer
    timeout = _PATIENCE_S
    server_version, sys_version = "fedsim", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, encode(self.server.registry), kind)
        elif path == "/health":
            why_not = self.server.watch.why_not()
            self._answer(503 if why_not else 200, f"{why_not or 'ok'}\n".encode())
        else:
            self._answer(404, b"there are /metrics and /health\n")

    do_HEAD = do_GET

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be silent: Prometheus asks four times a minute."""
