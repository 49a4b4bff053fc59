"""The compose files themselves: what can be said about them without starting anything."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fedsim.basics.kernels import settings
from fedsim.deployment.compose import read_services
from fedsim.deployment.processes import Deployment
from tests.tiers import slow

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "alerts.yml"  # of Prometheus: no compose file
OVERLAYS = sorted(set((ROOT / "deploy").glob("*.yml")) - {RULES})
ADDED = {"metrics.yml": {"metrics"}}  # services that the base file does not have
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


# what two overlays make of each other shows in pairs; all combinations would take minutes
@pytest.mark.parametrize("count", [0, slow(1), slow(2), len(OVERLAYS)])
def test_a_compose_client_accepts_overlays_alone_in_pairs_and_together(count, monkeypatch):
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
def test_an_overlay_changes_only_services_of_the_base_file_and_adds_those_it_is_for(path):
    assert set(load(path)["services"]) - set(services()) == ADDED.get(path.name, set())


def test_the_overlay_of_metrics_adds_a_service_that_only_reads():
    overlay = load(ROOT / "deploy" / "metrics.yml")
    added, beside = overlay["services"]["metrics"], services()["superexec-server"]
    alike = ("init", "restart", "cap_drop", "security_opt", "environment")
    assert {key: added[key] for key in alike} == {key: beside[key] for key in alike}
    assert added["image"] == f"{beside['image']}-metrics"
    assert added["build"]["args"] == beside["build"]["args"] | {"EXTRAS": "[metrics]"}
    health = {k: v for k, v in beside["healthcheck"].items() if k != "test"}
    assert {k: v for k, v in added["healthcheck"].items() if k != "test"} == health
    assert added["volumes"] == ["runs:/app/runs:ro"]
    assert "runs:/app/runs" in beside["volumes"]  # what it reads is what the server's app writes
    assert added["ports"] == ["${FEDSIM_BIND:-127.0.0.1}:9464:9464"]
    assert added["networks"] == list(overlay["networks"]) == ["metrics"]
    assert not {"metrics"} & set(load(ROOT / "docker-compose.yml")["networks"])
    assert "ARG EXTRAS=\n" in (ROOT / "Dockerfile").read_text()
    assert '"/app/build${EXTRAS}"' in (ROOT / "Dockerfile").read_text()


def test_the_service_of_metrics_starts_by_its_command_and_passes_its_health_check(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    document = {"services": load(ROOT / "deploy" / "metrics.yml")["services"]}
    (tmp_path / "alone.yml").write_text(yaml.safe_dump(document))
    with Deployment(tmp_path / "alone.yml", folder=tmp_path / "there") as deployment:
        assert "/metrics, runs below runs: 0" in deployment.log("metrics")


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
        "fleet-1": {"superlink", "supernode-1"},
        "fleet-2": {"superlink", "supernode-2"},
        "server": {"superlink", "superexec-server"},
        "node-1": {"supernode-1", "superexec-client-1"},
        "node-2": {"supernode-2", "superexec-client-2"},
    }


def test_data_is_mounted_read_only_wherever_the_app_runs():
    for name, service in services().items():
        mounts = [volume for volume in service.get("volumes", []) if ":/app/data" in volume]
        wanted = ["${FEDSIM_DATA:-./data}:/app/data:ro"] if name.startswith("superexec") else []
        assert mounts == wanted, name


def test_with_the_overlay_of_sites_a_node_s_clients_see_their_own_site_alone(monkeypatch):
    monkeypatch.setenv("FEDSIM_SITE_1", "/srv/rome")
    monkeypatch.delenv("FEDSIM_SITE_2", raising=False)
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    found = read_services(ROOT / "docker-compose.yml", [ROOT / "deploy" / "sites.yml"])
    assert found["superexec-client-1"].volumes["data"] == Path("/srv/rome")
    assert found["superexec-client-2"].volumes["data"] == ROOT / "sites" / "2"
    assert found["superexec-server"].volumes["data"] == ROOT / "data"
    for name, service in found.items():
        is_client = name.startswith("superexec-client")
        assert service.environment.get("FEDSIM_SITE_DATA") == ("data" if is_client else None)


def test_with_the_overlay_of_states_each_node_has_a_volume_of_its_own():
    document = load(ROOT / "deploy" / "state.yml")
    mounts = [each["volumes"] for each in document["services"].values()]
    assert mounts == [["superlink:/app"], ["state-1:/app/state"], ["state-2:/app/state"]]
    assert set(document["volumes"]) == {"superlink", "state-1", "state-2"}
    files = [ROOT / "deploy" / name for name in ("sites.yml", "state.yml")]
    found = read_services(ROOT / "docker-compose.yml", files)
    for name in ("superexec-client-1", "superexec-client-2"):
        assert found[name].environment["FEDSIM_SITE_STATE"] == "state"
        assert found[name].volumes.keys() == {"data", "secret", "state"}
    assert found["superlink"].environment["FEDSIM_DATABASE"] == "superlink.db"
    made = (ROOT / "Dockerfile").read_text()
    assert "/app/state" in made  # a volume takes the owner of the folder that the image has


def test_only_the_superlink_is_published_and_only_on_this_machine():
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert ports == {"superlink": ["${FEDSIM_BIND:-127.0.0.1}:8000:8000"]}


def test_authentication_adds_to_what_tls_says_and_changes_nothing():
    secured = load(ROOT / "deploy" / "tls.yml")["services"]
    for name, service in load(ROOT / "deploy" / "auth.yml")["services"].items():
        asked = [("--enable-supernode-auth",)]
        if name != "superlink":
            asked = [("--auth-supernode-private-key", "keys/supernode.key")]
            assert service["volumes"] == [f"./deploy/certificates/{name}-key:/app/keys:ro"]
        assert arguments(service["command"]) == [*arguments(secured[name]["command"]), *asked]


def test_every_node_has_a_partition_of_its_own():
    nodes = [s for name, s in services().items() if name.startswith("supernode-")]
    assert len(nodes) == 2
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
        "--superexec-auth-secret-file",
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


def make_certificates(folder, *words, authority, passphrase=None, check=True):
    """Run the script; the authority's key goes to a folder of the test's own."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: certificates cannot be made")
    script = ROOT / "deploy" / "certificates.sh"
    given = {} if passphrase is None else {"FEDSIM_AUTHORITY_PASSPHRASE": passphrase}
    return subprocess.run(
        [script, "--authority", authority, *words[:-1], folder, *(words[-1] if words else ())],
        capture_output=True, text=True, check=check, env={**os.environ, **given},
    )  # fmt: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return tmp_path_factory.mktemp("authority")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory, authority):
    folder = tmp_path_factory.mktemp("certificates") / "made"
    make_certificates(folder, ["192.0.2.7", "fed.example.org"], authority=authority)
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


def test_no_key_is_shared_and_nobody_else_can_enter_the_folders(certificates, authority):
    keys = {path.read_bytes() for path in certificates.rglob("*.key")}
    assert len(keys) == 3
    assert (authority / "authority.key").read_bytes() not in keys
    assert {f.stat().st_mode & 0o777 for f in (certificates, authority)} == {0o700}
    assert (authority / "authority.key").stat().st_mode & 0o777 == 0o600
    assert not [path.name for path in (certificates / "public").glob("*.key")]


def test_each_listening_service_has_a_secret_of_its_own(certificates):
    found = {path.parent.name: path.read_bytes() for path in certificates.rglob("*.secret")}
    assert found.keys() == {"superlink-secret", "supernode-1-secret", "supernode-2-secret"}
    assert len(set(found.values())) == 3
    assert {len(each) for each in found.values()} == {48}
    assert not list((certificates / "public").glob("*.secret"))


def sharers_of_secrets(found):
    """Which services see the secret at one place, each of which must ask for one."""
    whose: dict[str, set[str]] = {}
    for name, service in found.items():
        (mount,) = [volume for volume in service["volumes"] if ":/app/secret" in volume]
        whose.setdefault(mount.split(":/app/")[0], set()).add(name)
        asked = ("--superexec-auth-secret-file", "secret/superexec.secret")
        assert asked in arguments(service["command"])
    return whose


def test_a_secret_is_seen_by_the_service_and_its_superexec_alone():
    folder = "./deploy/certificates/{}-secret"
    assert sharers_of_secrets(load(ROOT / "deploy" / "tls.yml")["services"]) == {
        folder.format("superlink"): {"superlink", "superexec-server"},
        folder.format("supernode-1"): {"supernode-1", "superexec-client-1"},
        folder.format("supernode-2"): {"supernode-2", "superexec-client-2"},
    }


def test_without_tls_a_secret_is_made_in_memory_and_shared_in_the_same_way():
    assert sharers_of_secrets(services()) == {
        "secret-server": {"superlink", "superexec-server"},
        "secret-node-1": {"supernode-1", "superexec-client-1"},
        "secret-node-2": {"supernode-2", "superexec-client-2"},
    }
    volumes = load(ROOT / "docker-compose.yml")["volumes"]
    for name in ("secret-server", "secret-node-1", "secret-node-2"):
        assert volumes[name]["driver_opts"]["type"] == "tmpfs"
    for name, service in services().items():
        (mount,) = [volume for volume in service["volumes"] if ":/app/secret" in volume]
        assert mount.endswith(":ro") == name.startswith("superexec"), name


def test_a_secret_is_made_once_and_is_another_one_in_another_folder(tmp_path):
    script = read_services(ROOT / "docker-compose.yml")["superlink"].command[2]
    found = []
    for place in ("a", "b", "a"):
        (tmp_path / place / "secret").mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["sh", "-ec", script, "printf", "%s/", "--insecure"], cwd=tmp_path / place,
            env={**os.environ, "FEDSIM_DATABASE": "my file.db"}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert done.stdout == "--insecure/--database/my file.db/"
        held = tmp_path / place / "secret" / "superexec.secret"
        assert held.stat().st_mode & 0o777 == 0o600
        found.append(held.read_bytes())
    assert len(found[0]) == 48
    assert found[0] == found[2] != found[1]


def held(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_what_is_there_is_never_replaced_and_a_node_is_added(certificates, authority, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(certificates, folder)
    before, key = held(folder), (authority / "authority.key").read_bytes()
    make_certificates(folder, "--nodes", "3", [], authority=authority)
    after = held(folder)
    assert (authority / "authority.key").read_bytes() == key
    assert {path: after[path] for path in before} == before
    assert {str(path) for path in after.keys() - before.keys()} == {
        "supernode-3/ca.crt", "supernode-3/server.key", "supernode-3/server.pem",
        "supernode-3-secret/superexec.secret",
    }  # fmt: skip


def test_one_service_is_renewed_for_as_long_as_is_said(certificates, authority, tmp_path):
    from cryptography import x509

    folder = tmp_path / "renewed"
    shutil.copytree(certificates, folder)
    before = held(folder)
    make_certificates(folder, "--renew", "supernode-1", "--days", "30", [], authority=authority)
    after = held(folder)
    changed = {str(path) for path in before if after[path] != before[path]}
    assert changed == {"supernode-1/server.key", "supernode-1/server.pem"}
    new = x509.load_pem_x509_certificate((folder / "supernode-1/server.pem").read_bytes())
    assert (new.not_valid_after_utc - new.not_valid_before_utc).days == 30


def test_a_key_under_a_passphrase_is_of_no_use_without_it(tmp_path):
    folder, authority = tmp_path / "made", tmp_path / "authority"
    make_certificates(folder, [], authority=authority, passphrase="right")
    assert "ENCRYPTED" in (authority / "authority.key").read_text()
    before = held(folder)
    wrong = make_certificates(
        folder, "--renew", "superlink", [], authority=authority, passphrase="wrong", check=False
    )
    assert wrong.returncode == 1
    assert "authority.key" in wrong.stderr
    # neither half of the pair is another
    assert {path: held(folder)[path] for path in before} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--node", "3"], "choose from --nodes"),
        (["--nodes", "0"], "--nodes 0: must be a whole number above 0"),
        (["--days", "ten"], "--days ten: must be a whole number above 0"),
        (["--renew", "supernode-7"], "is none of superlink supernode-1 supernode-2"),
    ],
)
def test_wrong_words_make_nothing(words, said, tmp_path):
    folder = tmp_path / "made"
    found = make_certificates(folder, *words, [], authority=tmp_path / "a", check=False)
    assert found.returncode == 2
    assert said in found.stderr
    assert not folder.exists()


def test_an_authority_in_the_folder_that_is_copied_is_refused(tmp_path):
    found = make_certificates(tmp_path, [], authority=tmp_path / "a", check=False)
    assert found.returncode == 2
    assert "which is copied" in found.stderr
    assert not list(tmp_path.rglob("*.key"))


def test_certificates_of_another_authority_are_not_mixed_with_new_ones(certificates, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(certificates, folder)
    before = held(folder)
    found = make_certificates(folder, "--nodes", "3", [], authority=tmp_path / "b", check=False)
    assert found.returncode == 2
    assert "certificates of another authority" in found.stderr
    assert held(folder) == before


def test_an_image_is_built_from_what_it_copies_and_nothing_else():
    """No key, no data and no run goes to the machine that builds."""
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    patterns = [line for line in ignored if line and not line.startswith("#")]
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().split("\n")
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
        if not word.startswith("--")
    ]
    assert copied
    assert patterns[0] == "*"
    assert {p[1:] for p in patterns if p.startswith("!")} == set(copied)
    assert {"**/*.key", "**/*.pem"} <= set(patterns)


def make_keys(folder, *words, check=True):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen here: keys cannot be made")
    return subprocess.run(
        [ROOT / "deploy" / "keys.sh", *words, folder], check=check, capture_output=True, text=True
    )


def test_every_node_has_a_key_of_its_own_and_what_is_there_is_never_replaced(tmp_path):
    folder = tmp_path / "made"
    make_keys(folder)
    before = held(folder)
    assert {str(path) for path in before} == {
        "public/supernode-1.pub", "public/supernode-2.pub",
        "supernode-1-key/supernode.key", "supernode-2-key/supernode.key",
    }  # fmt: skip
    assert len(set(before.values())) == 4
    assert folder.stat().st_mode & 0o777 == 0o700
    make_keys(folder, "--nodes", "3")
    after = held(folder)
    assert {path: after[path] for path in before} == before
    assert len(after) == 6
    assert all(b"PRIVATE" not in after[path] for path in after if path.suffix == ".pub")


@pytest.mark.parametrize("words", [["--nodes"], ["--nodes", "none"], ["--nodes", "0"], ["--node"]])
def test_wrong_words_for_keys_are_refused(words, tmp_path):
    found = make_keys(tmp_path / "made", *words, check=False)
    assert found.returncode == 2
    assert not (tmp_path / "made").exists()
