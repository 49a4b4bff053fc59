"""Addresses of a host and a port, as they are written on a command line."""

import re
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError

_WRITTEN = re.compile(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s/]+)):(\d{1,5})")


class HostPort(NamedTuple):
    """A host and a port.

    Attributes:
        host: A name or an IP address.
        port: The port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_host_port(text: str, option: str, *, such_as: str, least: int = 0) -> HostPort:
    """Read a host and a port.

    Args:
        text: What was given, such as "127.0.0.1:9464" or "[::1]:9464".
        option: The option that it was given to.
        such_as: An example for who gave something else.
        least: The least port; 0 stands for a free one.

    Raises:
        ScenarioError: If it is none.

    Example:
        >>> read_host_port("[::1]:0", "--listen", such_as="127.0.0.1:9464")
        HostPort(host='::1', port=0)
    """
    found = _WRITTEN.fullmatch(text)
    if found is None or not least <= int(found[3]) <= 65535:
        free = ", and 0 takes a free one" if least == 0 else ""
        raise ScenarioError(
            f"{option} {text}: must be HOST:PORT, such as {such_as}, an IPv6 address in brackets; "
            f"ports are {least} to 65535{free}"
        )
    return HostPort(found[1] or found[2], int(found[3]))
