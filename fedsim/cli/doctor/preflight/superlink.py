"""Whether a node reaches its SuperLink: name, port, TLS, `/health`, clock.

Nothing but a request for `/health` is sent.
"""

import contextlib
import email.utils
import http.client
import socket
import ssl
import time
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.host_port import HostPort
from fedsim.cli.doctor.finding import Finding
from fedsim.cli.doctor.preflight import tls

_CLOCK_S, _CLOCK_NOTED_S = 300.0, 60.0  # Flower refuses signatures that are older
_NOT_HTTP = (http.client.HTTPException, OSError, ValueError)


class _Health(NamedTuple):
    """What was answered to `/health`: a status, and by how many seconds this clock is ahead."""

    status: int
    ahead_s: float | None


def look(
    address: HostPort, *, root: Path | None, insecure: bool, timeout_s: float = 10.0
) -> list[Finding]:
    """Look at each step on the way to a SuperLink, up to the first that keeps from the next.

    Args:
        address: Where it is.
        root: The authority's certificate; None takes the authorities of the system.
        insecure: Whether it speaks no TLS.
        timeout_s: How long each answer may take.
    """
    findings = [_resolved(address)]
    if findings[-1].state != "failed":
        findings.append(_connected(address, timeout_s))
    if findings[-1].state == "failed":
        return findings
    if insecure:
        return findings + _in_plain_text(address, timeout_s)
    secured, context = tls.look(address, root, timeout_s)
    findings += secured
    if context is None:
        if _asked(address, None, timeout_s) is not None:
            remedy = "start it with certificates (deploy/tls.yml), or say --insecure"
            findings[-1] = Finding("TLS", "failed", "it speaks plain HTTP, without TLS", remedy)
        return findings
    return findings + _answered(_asked(address, context, timeout_s))


def _resolved(address: HostPort) -> Finding:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "check the name, this machine's DNS, or give the IP address"
        return Finding("SuperLink", "failed", f"'{address.host}' is not known: {reason}", remedy)
    places = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
    said = places if places == address.host else f"{address.host} is {places}"
    return Finding("SuperLink", "ok", said)


def _connected(address: HostPort, timeout_s: float) -> Finding:
    begun = time.monotonic()
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except ConnectionRefusedError:
        remedy = "start the SuperLink, or check the port (8000 in docker-compose.yml)"
        return Finding("port", "failed", f"nothing listens at {address}", remedy)
    except TimeoutError:
        found = f"{address} does not answer within {timeout_s:g} s"
        return Finding("port", "failed", found, "let a firewall on the way pass it; check the port")
    except OSError as error:
        found = f"{address} is not to be reached: {error.strerror or error}"
        return Finding("port", "failed", found, "check address, routes and firewalls")
    took = (time.monotonic() - begun) * 1000
    return Finding("port", "ok", f"{address} accepts connections, in {took:.0f} ms")


def _in_plain_text(address: HostPort, timeout_s: float) -> list[Finding]:
    health = _asked(address, None, timeout_s)
    if health is None and tls.speaks_it(address, timeout_s):
        remedy = "--root-certificates FILE in place of --insecure, here and in the node's command"
        return [Finding("/health", "failed", "it speaks TLS, and --insecure was said", remedy)]
    return _answered(health)


def _answered(health: _Health | None) -> list[Finding]:
    if health is None:
        remedy = "is it a SuperLink? it listens on port 8000 in docker-compose.yml"
        return [Finding("/health", "failed", "what listens there does not speak HTTP", remedy)]
    if health.status != 200:
        remedy = "is it a SuperLink, and has it started? look at its log"
        return [Finding("/health", "failed", f"answers {health.status}", remedy)]
    return [Finding("/health", "ok", "answers 200"), _clock(health.ahead_s)]


def _clock(ahead_s: float | None) -> Finding:
    """Hold this machine's clock against the SuperLink's."""
    if ahead_s is None:
        remedy = f"see that the clocks agree within {_CLOCK_S / 60:.0f} minutes"
        return Finding("clock", "note", "the SuperLink does not tell its time", remedy)
    way = "ahead of" if ahead_s > 0 else "behind"
    found = f"{abs(ahead_s):.0f} s {way} the SuperLink's"
    remedy = "let both machines take their time from NTP: timedatectl set-ntp true"
    if abs(ahead_s) >= _CLOCK_S:
        found += f"; Flower refuses signatures of more than {_CLOCK_S:.0f} s"
        return Finding("clock", "failed", found, remedy)
    if abs(ahead_s) >= _CLOCK_NOTED_S:
        return Finding("clock", "note", found, remedy)
    return Finding("clock", "ok", f"within {max(1, abs(ahead_s)):.0f} s of the SuperLink's")


def _asked(address: HostPort, context: ssl.SSLContext | None, timeout_s: float) -> _Health | None:
    """What is answered to a request for `/health`; None if it is no HTTP."""
    connection = (
        http.client.HTTPConnection(*address, timeout=timeout_s)
        if context is None
        else http.client.HTTPSConnection(*address, timeout=timeout_s, context=context)
    )
    with contextlib.closing(connection):
        try:
            begun = time.time()
            connection.request("GET", "/health")
            answer = connection.getresponse()
            asked_at = (begun + time.time()) / 2
        except _NOT_HTTP:
            return None
        return _Health(answer.status, _ahead(answer.getheader("Date"), asked_at))


def _ahead(date: str | None, now: float) -> float | None:
    """By how many seconds a time is ahead of a header's, which tells whole seconds."""
    try:
        there = email.utils.parsedate_to_datetime(date or "").timestamp() + 0.5
    except ValueError:
        return None
    return now - there
