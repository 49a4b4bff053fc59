"""deploy/hospital: what its files say, and what its gateway lets through."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fedsim.basics.errors import RunError
from fedsim.deployment.processes import Deployment
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment import hospital
from tests.deployment.sites_apart import SIZES, outcome, scenario, written
from tests.deployment.test_compose import FLOWER, arguments, compose_client

ROOT = Path(__file__).resolve().parents[2]
FILES = ["server", "site", "operator"]
VARIABLES = {
    "FEDSIM_GATEWAY": "192.0.2.7", "FEDSIM_NODE": "1", "FEDSIM_PARTITION": "0",
    "FEDSIM_PARTITIONS": "2", "FEDSIM_SITE_FOLDER": "/srv/patients",
}  # fmt: skip


def document(name):
    return yaml.safe_load((hospital.HOSPITAL / f"{name}.yml").read_text())


def every_service():
    return [(name, s, t) for name in FILES for s, t in document(name)["services"].items()]


def overlay(name, service):
    return yaml.safe_load((ROOT / "deploy" / f"{name}.yml").read_text())["services"][service]


@pytest.mark.parametrize(("file", "name", "service"), every_service())
def test_a_service_may_write_nothing_and_do_nothing_that_it_need_not(file, name, service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"]) > 0
    assert 0 < service["pids_limit"] <= 512
    assert service["mem_limit"]
    # what is written to is memory, or one of the volumes that the file names
    for mount in service["volumes"]:
        volume = mount.split(":")[0]
        assert mount.endswith(":ro") or volume in document(file)["volumes"], mount


@pytest.mark.parametrize("file", FILES)
def test_every_network_but_the_one_to_the_outside_has_no_way_out(file):
    networks = document(file)["networks"]
    assert {n for n, t in networks.items() if not (t or {}).get("internal")} == {"outside"}
    outside = {s for s, t in document(file)["services"].items() if "outside" in t["networks"]}
    assert outside == {"server": {"gateway"}, "site": {"relay"}, "operator": {"operator"}}[file]


def test_the_gateway_alone_is_published_and_an_operator_s_relay_to_the_operator():
    ports = {name: t["ports"] for _, name, t in every_service() if "ports" in t}
    assert ports == {
        "gateway": ["${FEDSIM_BIND:-127.0.0.1}:8443:8443"],
        "operator": ["127.0.0.1:8000:8000"],
    }


@pytest.mark.parametrize(
    ("file", "name", "other"),
    [
        ("server", "superlink", ("auth", "superlink")),
        ("server", "superexec-server", ("tls", "superexec-server")),
        ("site", "supernode", ("auth", "supernode-1")),
        ("site", "superexec-client", ("tls", "superexec-client-1")),
    ],
)
def test_flower_s_services_are_started_as_under_the_overlays(file, name, other):
    """But for the SuperLink's database, and for the relay in the SuperLink's place."""

    def words(command):
        text = json.dumps(command)
        for old, new in (
            ("${FEDSIM_NODE}", "1"), ("relay-1:8000", "superlink:8000"),
            ("${FEDSIM_PARTITION:?is the number of the site, from 0}", "0"),
            ("${FEDSIM_PARTITIONS:?is how many sites there are}", "2"),
        ):  # fmt: skip
            text = text.replace(old, new)
        return set(arguments(json.loads(text))) - {("--database", "superlink.db")}

    command = document(file)["services"][name]["command"]
    assert words(command) == set(arguments(overlay(*other)["command"]))


def test_images_are_of_one_version_and_may_be_named_by_digest():
    images = {service["image"] for _, _, service in every_service()}
    assert images == {
        f"${{FEDSIM_SUPERLINK_IMAGE:-flwr/superlink:{FLOWER}}}",
        f"${{FEDSIM_SUPERNODE_IMAGE:-flwr/supernode:{FLOWER}}}",
        "${FEDSIM_SUPEREXEC_IMAGE:-fedsim-superexec:0.1.0}",
        "${FEDSIM_NGINX_IMAGE:-nginxinc/nginx-unprivileged:1.28}",
    }
    for _, _, service in every_service():
        built = service.get("build", {"args": {"FLOWER_VERSION": FLOWER}})
        assert built["args"] == {"FLOWER_VERSION": FLOWER}


def test_the_page_names_every_variable():
    page = (ROOT / "docs" / "deployment.md").read_text()
    text = "".join((hospital.HOSPITAL / f"{name}.yml").read_text() for name in FILES)
    for variable in set(re.findall(r"(?<!\$)\$\{(\w+)", text)):
        assert f"`{variable}`" in page, variable


@pytest.mark.parametrize("file", FILES)
def test_a_compose_client_accepts_the_file_and_misses_what_must_be_said(file, monkeypatch):
    client = compose_client()
    if client is None:
        pytest.skip("no docker compose client here: only the structure is checked")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    command = [*client, f"--file={hospital.HOSPITAL / file}.yml", "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = re.findall(r"\$\{(\w+):\?", (hospital.HOSPITAL / f"{file}.yml").read_text())
    assert (
        set(needed)
        == {"server": set(), "site": set(VARIABLES), "operator": {"FEDSIM_GATEWAY"}}[file]
    )
    if needed:
        monkeypatch.delenv(needed[-1])
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0
        assert needed[-1] in done.stderr


# In place of the SuperLink: it says yes to everything, and writes down what reaches it.
ANYBODY = """
import http.server, ssl, sys
class Yes(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self):
        left = int(self.headers.get("Content-Length", 0))
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        with open("reached", "a") as record:
            record.write(self.path + "\\n")
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"yes")
    do_GET = do_POST = answer
    def log_message(self, *words): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Yes)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("certificates/server.pem", "certificates/server.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    hospital.needed()
    return hospital.certificates(tmp_path_factory.mktemp("hospital") / "made")


class Gate:
    """The gateway before a server that says yes to everything."""

    def __init__(self, folder, made):
        self.folder, self.made = folder, made
        folder.mkdir(exist_ok=True)
        services = hospital.services(folder, [folder] * hospital.SITES, made)
        healthy = {"healthcheck": {"test": ["CMD", "test", "-d", "certificates"]}, "depends_on": {}}
        self.services = {
            "superlink": {
                "entrypoint": ["python", "-c", ANYBODY], "command": ["--port", "8000"],
                "volumes": [f"{made}/superlink:/app/certificates:ro"], **healthy,
            },
            "gateway": services["gateway"],
        }  # fmt: skip
        self.file = folder / "docker-compose.yml"
        self.file.write_text(yaml.safe_dump({"services": self.services}, width=10_000))

    @contextlib.contextmanager
    def open(self):
        with Deployment(self.file, folder=self.folder / "run") as deployment:
            self.deployment = deployment
            self.port = deployment._addresses.port("gateway", 8443)
            yield self

    def context(self, shown):
        context = ssl.create_default_context(cafile=str(self.made / "public" / "ca.crt"))
        if shown is not None:
            context.load_cert_chain(shown / "server.pem", shown / "server.key")
        return context

    def ask(self, shown, path, body=b"", headers=None):
        """What is answered to that certificate: a status, or None if it was not let in."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=self.context(shown), timeout=20
        )
        with contextlib.closing(connection):
            try:
                headers = headers or {}
                pieces = "Transfer-Encoding" in headers
                connection.request("POST", path, body, headers, encode_chunked=pieces)
                return connection.getresponse().status
            except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
                return None

    def reached(self):
        record = self.folder / "run" / "superlink" / "reached"
        found = record.read_text().splitlines() if record.exists() else []
        return [path for path in found if path != "/health"]


@pytest.fixture(scope="module")
def gate(tmp_path_factory, made):
    with Gate(tmp_path_factory.mktemp("gate"), made).open() as opened:
        yield opened


FLEET, CONTROL = "/v1/fleet/pull-messages", "/v1/control/start-run"
RUNTIME = "/v1/runtime/acquire-task"


@pytest.mark.parametrize(
    ("holder", "path", "status"),
    [
        ("relay-1", FLEET, 200), ("relay-2", FLEET, 200), ("operator", FLEET, 403),
        ("relay-1", CONTROL, 403), ("operator", CONTROL, 200),
        ("relay-1", RUNTIME, 403), ("operator", RUNTIME, 403),
        ("relay-1", "/health", 200), ("operator", "/health", 200),
        ("relay-1", "/", 403), ("operator", "/docs", 403), ("operator", "/openapi.json", 403),
    ],
)  # fmt: skip
def test_a_certificate_opens_the_interface_of_its_holder_alone(gate, made, holder, path, status):
    before = gate.reached()
    assert gate.ask(made / holder, path) == status
    went = [path] if status == 200 and path != "/health" else []
    assert gate.reached() == [*before, *went]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../runtime/acquire-task", "/v1/fleet/%2e%2e/runtime/acquire-task",
        "/v1/fleet/..%2fruntime/acquire-task", "//v1/runtime/acquire-task",
        "/v1/./runtime/acquire-task", "/V1/runtime/acquire-task", "/v1/fleet/x/../../runtime/y",
        "/v1/fleet/pull-messages/../../control/start-run", "/v1/runtime/acquire-task?/v1/fleet/x",
        "/v1/runtime/acquire-task#/v1/fleet/x", "/v1/fleet;/../runtime/acquire-task",
        "/v1%2fruntime/acquire-task", "http://superlink:8000/v1/runtime/acquire-task",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_reaches_another_interface(gate, made, path):
    """Whatever a server may make of a path: what reaches it must be of the holder's interface."""
    for holder, own in (("relay-1", "/v1/fleet/"), ("operator", "/v1/control/")):
        before = len(gate.reached())
        gate.ask(made / holder, path)
        assert all(
            re.fullmatch(own + r"[a-z-]+(\?.*)?", each) for each in gate.reached()[before:]
        ), gate.reached()[before:]


def another_authority(folder):
    return hospital.certificates(folder / "theirs") / "relay-1"


def of_a_service(folder):
    """A key by which a SuperNode listens, and which is no client's."""
    return folder / "made" / "supernode-1"


def made_by_itself(folder):
    """Signed by its own key, with the words that a relay's has."""
    own = folder / "own"
    own.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/OU=node/CN=relay-1", "-days", "9", "-keyout", own / "server.key",
         "-out", own / "server.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return own


def over(folder):
    """Valid in the past alone."""
    kept = folder / "over"
    shutil.copytree(folder / "made", kept)
    relay, authority = kept / "relay-1", folder / "authority"
    request = [
        "openssl",
        "req",
        "-new",
        "-key",
        relay / "server.key",
        "-subj",
        "/OU=node/CN=relay-1",
    ]
    asked = subprocess.run(request, check=True, capture_output=True).stdout
    (folder / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = f\n[f]\ndatabase = {folder}/db\nserial = {folder}/serial\n"
        "default_md = sha256\npolicy = p\nnew_certs_dir = {0}\n[p]\nOU = optional\n"
        "CN = supplied\n".format(folder)
    )
    (folder / "db").touch()
    (folder / "serial").write_text("1000")
    (folder / "asked").write_bytes(asked)
    subprocess.run(
        ["openssl", "ca", "-batch", "-config", folder / "ca.cnf", "-in", folder / "asked",
         "-keyfile", authority / "authority.key", "-cert", authority / "ca.crt", "-startdate",
         "20200101000000Z", "-enddate", "20200201000000Z", "-out", relay / "server.pem",
         "-notext"],
        check=True, capture_output=True,
    )  # fmt: skip
    return relay


@pytest.mark.parametrize(
    "shown", [None, another_authority, of_a_service, made_by_itself, over],
    ids=lambda s: "no certificate" if s is None else s.__name__.replace("_", " "),
)  # fmt: skip
def test_who_has_no_certificate_of_a_client_is_let_in_nowhere(gate, made, tmp_path, shown):
    if shown is not None:
        shutil.copytree(made, tmp_path / "made")
        shutil.copytree(made.parent / "authority", tmp_path / "authority")
        if shown is another_authority:
            shutil.rmtree(tmp_path / "authority")
        shown = shown(tmp_path)
    before = gate.reached()
    for path in (FLEET, CONTROL, RUNTIME, "/health"):
        assert gate.ask(shown, path) in (None, 400)
    assert gate.reached() == before
    assert gate.ask(made / "relay-1", FLEET) == 200  # the control


def test_plain_text_is_not_understood(gate):
    with socket.create_connection(("127.0.0.1", gate.port), 10) as plain:
        plain.sendall(f"POST {FLEET} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        assert b" 400 " in plain.recv(4096).split(b"\r\n")[0]


def test_a_certificate_that_is_called_back_opens_nothing_any_more(tmp_path, made):
    own = tmp_path / "made"
    shutil.copytree(made, own)
    shutil.copytree(made.parent / "authority", tmp_path / "authority")
    with Gate(tmp_path / "gate", own).open() as gate:
        assert gate.ask(own / "relay-2", FLEET) == 200
    hospital.certificates(own, "--revoke", "relay-2")
    with Gate(tmp_path / "gate", own).open() as gate:
        assert gate.ask(own / "relay-2", FLEET) in (None, 400)
        assert gate.ask(own / "relay-1", FLEET) == 200
        hospital.certificates(own, "--renew", "relay-2")
        assert gate.ask(own / "relay-2", FLEET) == 200


def test_two_gigabytes_are_kept_nowhere_and_reach_nobody(gate, made):
    """By what a request says of itself, and where it says nothing once it is too much."""
    before = gate.reached()
    said = {"Content-Length": str(2 << 30)}
    assert gate.ask(made / "relay-1", FLEET, b"x" * 10, said) == 413
    place = gate.folder / "run" / "gateway" / "run"
    kept = []

    def pieces():
        for number in range(2048):
            if number % 32 == 0:
                kept.append(sum(each.stat().st_size for each in place.rglob("*")))
            yield bytes(1 << 20)

    found = gate.ask(made / "relay-1", FLEET, pieces(), {"Transfer-Encoding": "chunked"})
    assert found in (None, 413)
    assert len(kept) > 1
    assert max(kept) < 80 << 20
    assert gate.reached() == before
    largest = bytes(20 << 20)  # a piece of a model, as Flower cuts it
    assert gate.ask(made / "relay-1", FLEET, largest) == 200


def test_the_gateway_s_log_says_who_asked_for_what(gate, made):
    gate.ask(made / "relay-2", CONTROL)
    deadline = time.monotonic() + 10
    wanted = re.compile(rf'CN=relay-2,OU=node \w+ 127.0.0.1 "POST {CONTROL} HTTP/1.1" 403')
    while not wanted.search(gate.deployment.log("gateway")):
        assert time.monotonic() < deadline, gate.deployment.log("gateway")
        time.sleep(0.05)


@pytest.mark.deploy
@pytest.mark.timeout(600)
def test_a_hospital_s_sites_have_the_bits_of_a_simulation_and_one_called_back_is_out(
    made, tmp_path
):
    """SuperLink, gateway, operator and two sites, each with its own file and a registered key."""
    own = tmp_path / "made"
    shutil.copytree(made, own)
    shutil.copytree(made.parent / "authority", tmp_path / "authority")
    files = written(tmp_path / "sites", SIZES[:2])
    file = scenario(tmp_path, files, rounds=2)
    start(load(file), out=tmp_path / "simulated")
    with hospital.deployed(tmp_path / "h", [each.parent for each in files], own) as deployment:
        settings = {"scenario": str(file), "out": str(tmp_path / "run")}
        deployment.flwr_run(ROOT, settings, timeout_s=400)
        assert outcome(tmp_path / "run") == outcome(tmp_path / "simulated")
        asked = set(
            re.findall(r'CN=([\w-]+),OU=\w+ \w+ \S+ "POST (/v1/\w+)/', deployment.log("gateway"))
        )
        assert asked == {
            ("operator", "/v1/control"), ("relay-1", "/v1/fleet"), ("relay-2", "/v1/fleet"),
        }  # fmt: skip
        for number in (1, 2):
            record = (tmp_path / "h" / f"files-{number}" / "audit.jsonl").read_text().splitlines()
            assert [json.loads(line)["instruction"] for line in record].count("train") == 2
        hospital.certificates(own, "--revoke", "relay-2")
        deployment.kill("gateway")
        deployment.restart("gateway")
        settings |= {"out": str(tmp_path / "without"), "wait-s": 20.0}
        with pytest.raises(RunError, match="no node holds partition 1"):
            deployment.flwr_run(ROOT, settings, timeout_s=200)
