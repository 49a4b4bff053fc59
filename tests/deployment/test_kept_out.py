"""Who is kept out of a SuperLink with TLS that takes registered SuperNodes alone, on loopback."""

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.deployment.addresses import free_port

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
EXECUTABLES = Path(sys.executable).parent
COMES_ONLINE_S, STAYS_OUT_S = 60.0, 12.0


def environment(home):
    home.mkdir(parents=True, exist_ok=True)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("FLWR_")},
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{EXECUTABLES}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # fmt: skip


@contextlib.contextmanager
def process(words, home):
    """A process that is ended with the test; gives it and its log."""
    log = home / "log.txt"
    variables = environment(home)
    with log.open("wb") as output:
        started = subprocess.Popen(
            list(map(str, words)), env=variables, cwd=home, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield started, log
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(10)
        started.kill()
        started.wait()


class Link:
    """A SuperLink that takes registered nodes alone."""

    def __init__(self, folder, pair, trusted):
        self.folder, self.port = folder, free_port()
        self.words = [
            "flower-superlink", "--isolation", "process", "--host", "127.0.0.1", "--port",
            self.port, "--disable-runtime-dependency-installation", "--enable-supernode-auth",
            "--ssl-ca-certfile", pair / "ca.crt", "--ssl-certfile", pair / "server.pem",
            "--ssl-keyfile", pair / "server.key",
        ]  # fmt: skip
        self.home = folder / "flwr"
        environment(self.home)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{trusted}"\n'
        )

    def ask(self, *words, check=True):
        """Ask it by Flower's own command; returns what is answered, as JSON."""
        done = subprocess.run(
            ["flwr", "supernode", *map(str, words), "here", "--format", "json"],
            env=environment(self.home), capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        said = done.stdout[done.stdout.find("{") :]
        found = json.loads(said) if said.startswith("{") else {"success": False}
        assert found.get("success") or not check, done.stdout + done.stderr
        return found if found.get("success") else {}

    def online(self):
        """How many nodes are there."""
        return sum(each["status"] == "online" for each in self.ask("list")["nodes"])

    def node(self, home, *words):
        """A SuperNode of it, with some words in place of what it should be started with."""
        return process(
            ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--isolation", "process",
             "--host", "127.0.0.1", "--port", free_port(), "--node-config",
             "partition-id=0 num-partitions=1", *words],
            home,
        )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Certificates and keys, as the scripts make them."""
    for needed in ("openssl", "ssh-keygen"):
        if shutil.which(needed) is None:
            pytest.skip(f"no {needed} here: certificates and keys cannot be made")
    folder = tmp_path_factory.mktemp("made")
    for name in ("ours", "theirs"):
        words = ["--authority", folder / f"authority-{name}", folder / name]
        subprocess.run([ROOT / "deploy" / "certificates.sh", *words], check=True)
    subprocess.run([ROOT / "deploy" / "keys.sh", "--nodes", "3", folder / "ours"], check=True)
    return folder


@contextlib.contextmanager
def started(link):
    """The SuperLink, once it answers those that know it."""
    with process(link.words, link.folder / "superlink") as (running, log):
        deadline = time.monotonic() + COMES_ONLINE_S
        while not link.ask("list", check=False):
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield link


@pytest.fixture(scope="module")
def link(made, tmp_path_factory):
    trusted = made / "ours" / "public" / "ca.crt"
    with started(Link(tmp_path_factory.mktemp("link"), made / "ours" / "superlink", trusted)) as up:
        yield up


def key_of(made, number):
    return ["--auth-supernode-private-key", made / "ours" / f"supernode-{number}-key/supernode.key"]


def trusting(made, name="ours"):
    return ["--root-certificates", made / name / "public" / "ca.crt"]


def registered(link, made, number):
    return link.ask("register", made / "ours" / "public" / f"supernode-{number}.pub")["node-id"]


def comes_online(link, home, *words):
    """Whether a node that is started so is ever there."""
    assert link.online() == 0
    with link.node(home, *words) as (running, log):
        deadline = time.monotonic() + STAYS_OUT_S
        while time.monotonic() < deadline and running.poll() is None:
            if link.online():
                return True, log.read_text()
            time.sleep(0.5)
        return bool(link.online()), log.read_text()


@pytest.fixture(scope="module")
def first(link, made):
    """The first node is registered."""
    return registered(link, made, 1)


def test_a_registered_node_comes_in(link, made, first, tmp_path):
    """The control of all tests below."""
    there, log = comes_online(link, tmp_path / "node", *trusting(made), *key_of(made, 1))
    assert there, log
    deadline = time.monotonic() + COMES_ONLINE_S
    while link.online() and time.monotonic() < deadline:
        time.sleep(0.5)


def test_a_key_that_is_not_registered_is_kept_out(link, made, first, tmp_path):
    there, log = comes_online(link, tmp_path / "node", *trusting(made), *key_of(made, 2))
    assert not there, log


def test_a_key_whose_registration_was_taken_back_is_kept_out(link, made, first, tmp_path):
    link.ask("unregister", registered(link, made, 3))
    there, log = comes_online(link, tmp_path / "node", *trusting(made), *key_of(made, 3))
    assert not there, log


def test_a_node_without_a_key_is_kept_out(link, made, first, tmp_path):
    there, log = comes_online(link, tmp_path / "node", *trusting(made))
    assert not there, log


def test_a_node_that_trusts_another_authority_does_not_join(link, made, first, tmp_path):
    words = [*trusting(made, "theirs"), *key_of(made, 1)]
    there, log = comes_online(link, tmp_path / "node", *words)
    assert not there
    assert "certificate" in log.lower(), log


def test_plain_text_is_not_taken_for_tls(link, made, first, tmp_path):
    there, log = comes_online(link, tmp_path / "node", "--insecure", *key_of(made, 1))
    assert not there, log


def pair_of(made, folder, *, days=(-1, 30), address="127.0.0.1"):
    """A SuperLink's certificate by our authority, valid for these days and this address."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    authority = made / "authority-ours"
    signing = serialization.load_pem_private_key((authority / "authority.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    named = x509.IPAddress(ipaddress.ip_address(address))
    of_issuer = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([named]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(of_issuer),
            critical=False,
        )
        .sign(signing, hashes.SHA256())
    )
    folder.mkdir()
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    shutil.copy(authority / "ca.crt", folder / "ca.crt")
    return folder


@pytest.mark.parametrize(
    ("certificate", "joins"),
    [
        ({}, True),
        ({"days": (-30, -1)}, False),
        ({"days": (1, 30)}, False),
        ({"address": "192.0.2.7"}, False),
    ],
    ids=["in order", "expired", "not valid yet", "another's name"],
)
def test_a_superlink_whose_certificate_is_not_in_order_is_not_joined(
    certificate, joins, made, tmp_path
):
    trusted = made / "ours" / "public" / "ca.crt"
    pair = pair_of(made, tmp_path / "pair", **certificate)
    link = Link(tmp_path, pair, trusted)
    words = [*trusting(made), *key_of(made, 1)]
    with process(link.words, tmp_path / "superlink"):
        if joins:
            deadline = time.monotonic() + COMES_ONLINE_S
            while not link.ask("list", check=False) and time.monotonic() < deadline:
                time.sleep(0.5)
            registered(link, made, 1)
            assert comes_online(link, tmp_path / "node", *words)[0]
            return
        time.sleep(6.0)
        with link.node(tmp_path / "node", *words) as (_, log):
            deadline = time.monotonic() + COMES_ONLINE_S
            while "certificate" not in log.read_text().lower() and time.monotonic() < deadline:
                time.sleep(0.5)
            assert "certificate" in log.read_text().lower()
        assert link.ask("list", check=False) == {}  # nor by Flower's own command
