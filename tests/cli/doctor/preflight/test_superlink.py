"""The way to a SuperLink: each thing that can be wrong with it is really wrong here."""

import socket

import pytest

from fedsim.basics.host_port import HostPort
from fedsim.cli.doctor.preflight import superlink
from fedsim.deployment.addresses import free_port
from tests.cli.doctor.preflight.servers import pair, saying, serving


@pytest.fixture(scope="module")
def authority():
    return pair("the authority")


@pytest.fixture
def root(authority, tmp_path):
    return authority.write(tmp_path / "ca.crt")


def looked(address, root=None, *, insecure=False, timeout_s=5.0):
    """What was found, by name."""
    findings = superlink.look(address, root=root, insecure=insecure, timeout_s=timeout_s)
    found = {each.name: each for each in findings}
    assert len(found) == len(findings)
    for each in findings:
        assert bool(each.remedy) == (each.state != "ok"), each
    return found


def wrong(found):
    return {name for name, each in found.items() if each.state == "failed"}


def test_a_superlink_with_all_in_order_is_said_to_be_so(authority, root, tmp_path):
    shown = pair("superlink", by=authority)
    with serving(tmp_path, shown) as address:
        found = looked(address, root)
    assert list(found) == [
        "SuperLink", "port", "TLS", "authority", "its name", "certificate", "/health", "clock",
    ]  # fmt: skip
    assert {each.state for each in found.values()} == {"ok"}
    assert found["certificate"].found.endswith(", 364 days left")
    with serving() as address:
        found = looked(address, insecure=True)
    assert list(found) == ["SuperLink", "port", "/health", "clock"]
    assert {each.state for each in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("choices", "failed", "said"),
    [
        ({"days": (-9, -2)}, "certificate", "expired on "),
        ({"days": (2, 9)}, "certificate", "not valid before "),
        ({"names": ("superlink",)}, "its name", "'127.0.0.1' is none of its names: superlink"),
        ({"names": ("127.0.0.2",)}, "its name", "'127.0.0.1' is none of its names: 127.0.0.2"),
        ({"by": "other"}, "authority", "'CN=another authority' vouches for it"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_named(
    choices, failed, said, authority, root, tmp_path
):
    by = pair("another authority") if choices.get("by") else authority
    shown = pair("superlink", **{**choices, "by": by})
    with serving(tmp_path, shown) as address:
        found = looked(address, root)
    assert wrong(found) == {failed}
    assert said in found[failed].found
    # the clock, which may be to blame, is looked at all the same
    assert found["clock"].state == "ok"


def test_one_thing_that_is_wrong_hides_no_other(root, tmp_path):
    shown = pair("superlink", by=pair("other"), names=("superlink",), days=(-9, -2))
    with serving(tmp_path, shown) as address:
        found = looked(address, root)
    assert wrong(found) == {"authority", "its name", "certificate"}


def test_a_certificate_that_ends_soon_is_noted(authority, root, tmp_path):
    shown = pair("superlink", by=authority, days=(-1, 29.5))
    with serving(tmp_path, shown) as address:
        found = looked(address, root)
    assert wrong(found) == set()
    assert found["certificate"].state == "note"
    assert ", 29 days left" in found["certificate"].found


def test_an_authority_that_has_expired_itself_is_named(tmp_path):
    old = pair("old", days=(-9, -2))
    with serving(tmp_path, pair("superlink", by=old)) as address:
        found = looked(address, old.write(tmp_path / "ca.crt"))
    assert wrong(found) == {"authority's own"}


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"no certificate\n", "holds no certificate")]
)
def test_a_root_certificate_that_cannot_be_read_is_named(content, said, authority, tmp_path):
    file = tmp_path / "root.crt"
    if content is not None:
        file.write_bytes(content)
    with serving(tmp_path, pair("superlink", by=authority)) as address:
        found = looked(address, file)
    assert wrong(found) == {"authority"}
    assert said in found["authority"].found


def test_without_a_root_certificate_the_system_s_authorities_are_asked(authority, tmp_path):
    with serving(tmp_path, pair("superlink", by=authority)) as address:
        found = looked(address)
    assert wrong(found) == {"authority"}
    assert "none of this system's authorities" in found["authority"].found


def test_plain_text_where_tls_is_expected_is_told_and_the_reverse(authority, root, tmp_path):
    with serving() as address:
        found = looked(address, root)
    assert wrong(found) == {"TLS"}
    assert found["TLS"].found == "it speaks plain HTTP, without TLS"
    with serving(tmp_path, pair("superlink", by=authority)) as address:
        found = looked(address, insecure=True)
    assert wrong(found) == {"/health"}
    assert found["/health"].found == "it speaks TLS, and --insecure was said"


def test_a_port_at_which_nothing_listens_is_named_and_nothing_more_is_looked_at(root):
    found = looked(HostPort("127.0.0.1", free_port()), root)
    assert list(found) == ["SuperLink", "port"]
    assert "nothing listens at 127.0.0.1:" in found["port"].found


def test_a_name_that_is_not_known_is_named(root):
    found = looked(HostPort("superlink.invalid", 8000), root)
    assert list(found) == ["SuperLink"]
    assert found["SuperLink"].found.startswith("'superlink.invalid' is not known: ")


@pytest.mark.parametrize("insecure", [True, False])
def test_what_is_no_superlink_is_told(insecure, root):
    with saying(b"220 mail.example.org ESMTP\r\n") as address:
        found = looked(address, None if insecure else root, insecure=insecure)
    assert wrong(found) == {"/health" if insecure else "TLS"}


@pytest.mark.parametrize("insecure", [True, False])
def test_one_who_says_nothing_is_not_waited_for(insecure, root):
    with saying(b"", seconds=2.0) as address:
        found = looked(address, None if insecure else root, insecure=insecure, timeout_s=0.2)
    assert wrong(found) == {"/health" if insecure else "TLS"}


def test_a_port_that_takes_no_more_connections_is_not_waited_for(root):
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        found = looked(HostPort(*full.getsockname()), root, timeout_s=0.2)
    assert wrong(found) == {"port"}
    assert "does not answer within 0.2 s" in found["port"].found


def test_a_superlink_that_is_not_well_is_told():
    with serving(status=503) as address:
        found = looked(address, insecure=True)
    assert wrong(found) == {"/health"}
    assert found["/health"].found == "answers 503"


@pytest.mark.parametrize(
    ("ahead_s", "state", "said"),
    [
        (0, "ok", "within 1 s"),
        (-400, "failed", "400 s ahead of the SuperLink's"),
        (400, "failed", "s behind the SuperLink's"),
        (-100, "note", "100 s ahead of"),
        (-280, "note", "280 s ahead of"),
    ],
)
def test_clocks_that_differ_are_told(ahead_s, state, said):
    with serving(ahead_s=ahead_s) as address:
        found = looked(address, insecure=True)
    assert found["clock"].state == state
    words = found["clock"].found
    number = int("".join(c for c in words.partition(" s ")[0] if c.isdigit()))
    assert abs(number - max(1, abs(ahead_s))) <= 2
    assert said.replace("400 ", "").replace("100 ", "").replace("280 ", "") in words


def test_a_superlink_that_tells_no_time_is_noted():
    with serving(dated=False) as address:
        found = looked(address, insecure=True)
    assert found["clock"].state == "note"
