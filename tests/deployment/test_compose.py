"""The compose files themselves: what can be said about them without starting anything."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fedsim.basics.kernels import settings

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted((ROOT / "deploy").glob("*.yml"))
# the version that the tests ran with, whichever is installed now
(FLOWER,) = re.findall(r"^flwr==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
# What the compose specification allows in a service, as far as these files use it.
SERVICE_KEYS = {
    "build",
    "cap_drop",
    "command",
    "depends_on",
    "deploy",
    "entrypoint",
    "environment",
    "extra_hosts",
    "healthcheck",
    "image",
    "init",
    "networks",
    "ports",
    "restart",
    "security_opt",
    "volumes",
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def services() -> dict[str, dict]:
    return load(ROOT / "docker-compose.yml")["services"]


def arguments(command: list[str]) -> list[tuple[str, ...]]:
    """Split a command into its flags, each with its value."""
    starts = [i for i, word in enumerate(command) if word.startswith("--")] + [len(command)]
    return [tuple(command[i:j]) for i, j in itertools.pairwise(starts)]


def compose_client() -> list[str] | None:
    for client in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(client[0]) is None:
            continue
        found = subprocess.run([*client, "version"], capture_output=True, check=False)
        if found.returncode == 0:
            return client
    return None


@pytest.mark.parametrize("count", range(len(OVERLAYS) + 1))
def test_a_compose_client_accepts_every_combination_of_overlays(count, monkeypatch):
    client = compose_client()
    if client is None:
        pytest.skip("no docker compose client here: only the structure is checked")
    monkeypatch.setenv("SUPERLINK_ADDRESS", "192.0.2.7")
    for overlays in itertools.combinations(OVERLAYS, count):
        files = [f"--file={path}" for path in (ROOT / "docker-compose.yml", *overlays)]
        done = subprocess.run([*client, *files, "config"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [ROOT / "docker-compose.yml", *OVERLAYS], ids=lambda p: p.name)
def test_a_service_holds_only_keys_of_the_compose_specification(path):
    document = load(path)
    assert {key for key in document if not key.startswith("x-")} <= {
        "services",
        "networks",
        "volumes",
    }
    for name, service in document["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS, name
        for flag in service.get("command", []):
            assert isinstance(flag, str), f"{name}: {flag!r} is not quoted"


def test_services_networks_and_volumes_that_are_named_exist():
    document = load(ROOT / "docker-compose.yml")
    for name, service in document["services"].items():
        assert set(service.get("depends_on", {})) <= set(document["services"]), name
        assert set(service["networks"]) <= set(document["networks"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith(("$", ".")) or source in document["volumes"], name


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.name)
def test_an_overlay_changes_only_services_of_the_base_file(path):
    assert set(load(path)["services"]) <= set(services())


def test_the_portable_overlay_pins_what_computes_as_fedsim_does():
    overlay = load(ROOT / "deploy" / "portable.yml")["services"]
    assert overlay.keys() == {name for name in services() if name.startswith("superexec-")}
    wanted = {name: value for name, value in settings("portable").items() if value is not None}
    for service in overlay.values():
        assert service == {"environment": wanted}


def test_every_image_is_pinned_to_the_flower_version_of_the_constraints():
    document = load(ROOT / "docker-compose.yml")
    images = {service["image"] for service in document["services"].values()}
    flower = {image for image in images if image.startswith("flwr/")}
    assert flower == {f"flwr/superlink:{FLOWER}", f"flwr/supernode:{FLOWER}"}
    for service in document["services"].values():
        assert service.get("build", {"args": {"FLOWER_VERSION": FLOWER}})["args"] == {
            "FLOWER_VERSION": FLOWER
        }
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"ARG FLOWER_VERSION={FLOWER}\nFROM flwr/superexec:${{FLOWER_VERSION}}\n" in dockerfile


def test_every_service_has_a_health_check_and_calls_nobody_outside():
    for name, service in services().items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        environment = service["environment"]
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0", name
        assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1", name
        assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1", name
        assert "--allow-runtime-dependency-installation" not in service["command"], name


def test_a_service_starts_after_the_one_it_connects_to_is_healthy():
    for name, service in services().items():
        text = " ".join(service["command"])
        peers = {other for other in services() if re.search(rf"(?<![\w-]){other}:\d", text)}
        assert set(service.get("depends_on", {})) == peers, name
        for condition in service.get("depends_on", {}).values():
            assert condition == {"condition": "service_healthy"}, name


def test_services_that_talk_share_a_network_and_no_third_one_is_on_a_runtime_api():
    members: dict[str, set[str]] = {}
    for name, service in services().items():
        for network in service["networks"]:
            members.setdefault(network, set()).add(name)
    assert members == {
        "fleet": {"superlink", "supernode-1", "supernode-2"},
        "server": {"superlink", "superexec-server"},
        "node-1": {"supernode-1", "superexec-client-1"},
        "node-2": {"supernode-2", "superexec-client-2"},
    }


def test_data_is_mounted_read_only_wherever_the_app_runs():
    for name, service in services().items():
        mounts = [volume for volume in service.get("volumes", []) if ":/app/data" in volume]
        wanted = ["${FEDSIM_DATA:-./data}:/app/data:ro"] if name.startswith("superexec") else []
        assert mounts == wanted, name


def test_only_the_superlink_is_published_and_only_on_this_machine():
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert ports == {"superlink": ["${FEDSIM_BIND:-127.0.0.1}:8000:8000"]}


def test_every_node_has_a_partition_of_its_own():
    nodes = [s for name, s in services().items() if name.startswith("supernode-")]
    for i, node in enumerate(nodes):
        config = f"partition-id={i} num-partitions={len(nodes)}"
        assert ("--node-config", config) in arguments(node["command"])


def test_tls_changes_a_command_only_where_it_says_how_to_trust():
    security = {
        "--insecure",
        "--root-certificates",
        "--ssl-ca-certfile",
        "--ssl-certfile",
        "--ssl-keyfile",
    }
    secured = load(ROOT / "deploy" / "tls.yml")["services"]
    assert set(secured) == set(services())
    for name, service in services().items():
        plain, tls = arguments(service["command"]), arguments(secured[name]["command"])
        assert ("--insecure",) in plain, name
        assert ("--insecure",) not in tls, name
        assert [a for a in plain if a[0] not in security] == [
            a for a in tls if a[0] not in security
        ], name
        assert set(service["healthcheck"]) == set(
            secured[name].get("healthcheck", service["healthcheck"])
        ), name


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: certificates cannot be made")
    folder = tmp_path_factory.mktemp("certificates") / "made"
    script = ROOT / "deploy" / "certificates.sh"
    subprocess.run([script, folder, "192.0.2.7", "fed.example.org"], check=True)
    return folder


@pytest.mark.parametrize("service", ["superlink", "supernode-1", "supernode-2"])
def test_a_certificate_names_its_service_and_comes_from_the_authority(certificates, service):
    from cryptography import x509

    authority = x509.load_pem_x509_certificate((certificates / "public/ca.crt").read_bytes())
    held = x509.load_pem_x509_certificate((certificates / service / "server.pem").read_bytes())
    held.verify_directly_issued_by(authority)
    names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    extra = ["fed.example.org"] if service == "superlink" else []
    assert names.get_values_for_type(x509.DNSName) == [service, "localhost", *extra]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", *(["192.0.2.7"] if extra else [])]
    # Python 3.13 verifies strictly and wants both key identifiers.
    held.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    held.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)


def test_no_key_is_shared_and_nobody_else_can_enter_the_folder(certificates):
    keys = {path.read_bytes() for path in certificates.rglob("*.key")}
    assert len(keys) == 4
    assert certificates.stat().st_mode & 0o777 == 0o700
    assert not [path.name for path in (certificates / "public").glob("*.key")]


def test_an_existing_authority_is_never_replaced(certificates):
    before = (certificates / "authority.key").read_bytes()
    script = ROOT / "deploy" / "certificates.sh"
    again = subprocess.run([script, certificates], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "already holds an authority" in again.stderr
    assert (certificates / "authority.key").read_bytes() == before
