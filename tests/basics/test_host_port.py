"""Addresses as they are written on a command line."""

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.host_port import HostPort, read_host_port


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9464", HostPort("127.0.0.1", 9464)),
        ("fed.example.org:1", HostPort("fed.example.org", 1)),
        ("[fe80::1]:65535", HostPort("fe80::1", 65535)),
    ],
)
def test_an_address_is_read_and_written(text, expected):
    found = read_host_port(text, "--listen", such_as="127.0.0.1:9464")
    assert found == expected
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    ["", "9464", "localhost", "127.0.0.1:", ":9464", "::1:9464", "a:70000", "a:-1", "a b:1",
     "http://a:1", "a:1/x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ScenarioError, match=r"--listen .*must be HOST:PORT, such as here:1, "):
        read_host_port(text, "--listen", such_as="here:1")


def test_a_port_that_nothing_can_be_reached_at_is_refused():
    assert read_host_port("a:0", "--listen", such_as="here:1").port == 0
    with pytest.raises(ScenarioError, match=r"ports are 1 to 65535$"):
        read_host_port("a:0", "--superlink", such_as="here:1", least=1)
