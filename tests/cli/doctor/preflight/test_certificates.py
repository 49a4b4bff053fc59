"""A folder of certificates and keys, as the script makes it and with something wrong in it."""

import shutil

import pytest

from fedsim.cli.doctor.preflight import certificates
from tests.cli.doctor.preflight.servers import pair
from tests.deployment.test_compose import make_certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates") / "made"
    make_certificates(folder, [], authority=tmp_path_factory.mktemp("authority"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    (tmp_path / "made").chmod(0o700)
    return tmp_path / "made"


@pytest.fixture(scope="module")
def authority():
    return pair("the authority")


@pytest.fixture
def own(authority, tmp_path):
    """A folder with one service, whose certificate the test makes."""
    (tmp_path / "own").mkdir(mode=0o700)
    authority.write(tmp_path / "own" / "node" / "ca.crt")

    def write(**choices):
        shown = pair("node", **{"by": authority} | choices)
        shown.write(tmp_path / "own/node/server.pem", tmp_path / "own/node/server.key")
        return tmp_path / "own"

    return write


def wrong(folder):
    found = [each for each in certificates.look(folder) if each.state != "ok"]
    assert all(each.remedy for each in found)
    return {each.name: (each.state, each.found) for each in found}


def test_what_the_script_makes_is_in_order(folder):
    found = certificates.look(folder)
    assert {each.state for each in found} == {"ok"}
    assert [each.name for each in found] == [
        "public/ca.crt", "superlink/server.pem", "supernode-1/server.pem",
        "supernode-2/server.pem", "keys",
    ]  # fmt: skip
    assert all("364 days left" in each.found for each in found[1:-1])
    assert found[-1].found.startswith("6, ")


@pytest.mark.parametrize(
    ("days", "state", "said"),
    [
        ((-9, -1), "failed", "expired on "),
        ((-9, 29.5), "note", "29 days left"),
        ((-9, 0.5), "note", "0 days left"),
        ((1, 90), "failed", "not valid before "),
    ],
)
def test_a_certificate_that_ends_or_ended_is_named_with_what_renews_it(days, state, said, own):
    (finding,) = [each for each in certificates.look(own(days=days)) if "server" in each.name]
    assert (finding.name, finding.state) == ("node/server.pem", state)
    assert said in finding.found
    if days[0] < 0:
        assert finding.remedy.startswith("deploy/certificates.sh --renew node")


def test_one_with_thirty_days_left_is_in_order(own):
    assert wrong(own(days=(-1, 31))) == {}


def test_a_certificate_of_another_authority_is_named(own):
    found = wrong(own(by=pair("other")))
    assert found == {"node/server.pem": ("failed", "the ca.crt beside it does not vouch for it")}


def test_a_key_that_is_another_s_is_named(own):
    folder = own()
    pair("other").write(folder / "x", folder / "node/server.key")
    (folder / "x").unlink()
    found = wrong(folder)
    assert found == {"node/server.pem": ("failed", "server.key beside it is not its key")}
    (folder / "node/server.key").write_text("no key")
    assert "cannot be read" in wrong(folder)["node/server.pem"][1]


def test_a_certificate_that_is_none_is_named(folder):
    (folder / "superlink" / "server.pem").write_text("nothing")
    found = wrong(folder)
    assert found == {"superlink/server.pem": ("failed", "cannot be read: holds no certificate")}


@pytest.mark.parametrize("mode", [0o755, 0o701, 0o710])
def test_keys_that_others_can_reach_are_named(mode, folder):
    folder.chmod(mode)
    (state, said) = wrong(folder)["keys"]
    assert state == "failed"
    assert "supernode-1/server.key" in said
    assert "superlink-secret/superexec.secret" in said


def test_keys_that_are_closed_themselves_may_lie_in_an_open_folder(folder):
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if path.suffix in (".key", ".secret"):
            path.chmod(0o600)
    assert wrong(folder) == {}


def test_the_authority_s_key_among_what_nodes_are_given_is_named(folder):
    (folder / "public" / "authority.key").write_text("key")
    assert wrong(folder)["public/authority.key"][0] == "failed"


def test_a_folder_that_is_none_or_holds_none_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no certificate" in wrong(tmp_path / "empty")["certificates"][1]
    assert "there is no such folder" in wrong(tmp_path / "none")["certificates"][1]
    (tmp_path / "file").touch()
    assert "is a file" in wrong(tmp_path / "file")["certificates"][1]
