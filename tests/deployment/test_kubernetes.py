"""deploy/kubernetes: what can be said about its files without a cluster."""

import re

import pytest

from tests.deployment.kubernetes_files import (
    EXAMPLE,
    KUBERNETES,
    OLDEST,
    SERVER,
    assert_restricted,
    base,
    check,
    command,
    composed,
    container,
    deployments,
    kustomization,
    mounted,
    of_kind,
    sites,
    variables,
)
from tests.deployment.test_compose import FLOWER, arguments

BASES = ("server", "site")
SERVED = of_kind(base("server"), "Deployment")
KUSTOMIZATION_KEYS = {
    "apiVersion", "components", "configMapGenerator", "images", "kind", "namespace", "nameSuffix",
    "patches", "replacements", "resources",
}  # fmt: skip
# Where an argument differs from the compose file's, and why.
ON_PURPOSE = {
    "superlink:8000": f"superlink.{SERVER}.svc:8000",  # a SuperNode is in another namespace
    "127.0.0.1:9095": "0.0.0.0:9095",  # the kubelet asks at the Pod's address
}


@pytest.mark.parametrize("version", [OLDEST, "latest"])
@pytest.mark.parametrize("name", BASES)
def test_a_resource_is_of_the_schema_of_its_kind(name, version):
    for resource in base(name):
        check(resource, version)


@pytest.mark.parametrize(
    ("kind", "path", "key", "value"),
    [
        ("Deployment", "spec", "replica", 1),
        ("Deployment", "spec.template.spec.containers.0", "argument", ["--insecure"]),
        ("Deployment", "spec.template.spec.containers.0.livenessProbe", "periodSeconds", "30"),
        ("Deployment", "spec.template.spec.containers.0.securityContext", "runAsNonroot", True),
        ("Service", "spec.ports.0", "port", "8000"),
        ("NetworkPolicy", "spec", "egres", []),
        ("PersistentVolumeClaim", "spec", "accessModes", "ReadWriteOnce"),
    ],
)
def test_a_wrong_key_or_type_is_noticed(kind, path, key, value):
    untouched, resource = (next(iter(of_kind(base("server"), kind).values())) for _ in range(2))
    place = resource
    for step in path.split("."):
        place = place[int(step) if step.isdigit() else step]
    place[key] = value
    check(untouched)
    schemas = pytest.importorskip("kubernetes_validate")
    with pytest.raises(schemas.ValidationError):
        check(resource)


def test_every_file_is_used_and_a_kustomization_holds_known_keys():
    used = set()
    for file in KUBERNETES.rglob("kustomization.yml"):
        table = kustomization(file.parent)
        assert set(table) <= KUSTOMIZATION_KEYS, file
        places = [file.parent / name for name in table.get("resources", ())]
        used |= {file, *(place.resolve() for place in places if place.suffix)}
        assert all(place.exists() for place in places), file
    assert used == {path for path in KUBERNETES.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", composed())
def test_a_command_is_that_of_the_compose_file_but_where_it_differs_on_purpose(name):
    service = composed()[name]
    deployment, place = deployments()[name]
    is_node = name.startswith("supernode")
    wanted = [
        ON_PURPOSE.get(word, word) if is_node or ":9095" in word else word
        for word in service["command"]
    ]
    if name == "superlink":
        wanted += ["--database", "database/superlink.db"]
    entry, *words = command(deployment, place.literals)
    assert entry == service["entrypoint"][-1]
    assert sorted(arguments(words)) == sorted(arguments(wanted))


def test_services_are_those_of_the_compose_file_and_so_are_their_images():
    assert deployments().keys() == composed().keys()
    for name, (deployment, _) in deployments().items():
        assert container(deployment)["image"] == composed()[name]["image"]
    images = {image["name"]: image["newTag"] for image in kustomization(EXAMPLE)["images"]}
    assert {f"{name}:{tag}" for name, tag in images.items()} == {
        service["image"] for service in composed().values()
    }
    assert images["flwr/superlink"] == images["flwr/supernode"] == FLOWER


@pytest.mark.parametrize("name", composed())
def test_variables_are_those_of_the_compose_file(name):
    deployment, place = deployments()[name]
    text = " ".join(container(deployment)["args"])
    own = {key for key in variables(deployment, place.literals) if f"$({key})" in text}
    found = {k: v for k, v in variables(deployment, place.literals).items() if k not in own}
    # the database is named by an argument here
    wanted = {k: v for k, v in composed()[name]["environment"].items() if k != "FEDSIM_DATABASE"}
    assert found == wanted


@pytest.mark.parametrize("name", composed())
def test_mounts_are_those_of_the_compose_file_and_nothing_else_lasts(name):
    deployment, _ = deployments()[name]
    lasting = {
        volume["name"]
        for volume in deployment["spec"]["template"]["spec"]["volumes"]
        if "emptyDir" not in volume
    }
    wanted = {}  # an overlay's mount takes the place of the one that is there
    for volume in composed()[name]["volumes"]:
        target = re.search(r":(/app(?:/\w+)?)(:ro)?$", volume)
        wanted[target[1]] = target[2] is not None
    if name == "superlink":  # of its home, which has a volume of its own there
        assert wanted.pop("/app") is False
        wanted["/app/database"] = False
    assert set(wanted.items()) == {
        (mount["mountPath"], mount.get("readOnly", False))
        for mount in container(deployment)["volumeMounts"]
        if mount["name"] in lasting
    }


@pytest.mark.parametrize("name", deployments())
def test_a_pod_is_restricted_and_never_two_at_a_time(name):
    deployment, _ = deployments()[name]
    assert_restricted(deployment)
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    (namespace,) = of_kind(base("server" if name in SERVED else "site"), "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("pod", "runAsNonRoot", False),
        ("pod", "runAsUser", 0),
        ("container", "privileged", True),
        ("container", "capabilities", {"drop": ["NET_RAW"]}),
    ],
)
def test_what_is_not_restricted_is_noticed(where, key, value):
    deployment = of_kind(base("site"), "Deployment")["supernode"]
    spec = deployment["spec"]["template"]["spec"]
    (spec if where == "pod" else spec["containers"][0])["securityContext"][key] = value
    with pytest.raises(AssertionError):
        assert_restricted(deployment)


@pytest.mark.parametrize("name", deployments())
def test_probes_ask_where_the_service_listens(name):
    deployment, place = deployments()[name]
    told = dict(pair for pair in arguments(command(deployment, place.literals)) if len(pair) == 2)
    each = container(deployment)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if name.startswith("superexec"):
            assert each[probe]["grpc"] == {"port": 9095}
            assert told["--health-server-address"] == "0.0.0.0:9095"
        else:
            assert each[probe]["httpGet"] == {"path": "/health", "port": "https", "scheme": "HTTPS"}
            assert each["ports"] == [{"name": "https", "containerPort": int(told["--port"])}]


@pytest.mark.parametrize("name", BASES)
def test_a_service_leads_to_a_port_of_the_pods_that_it_selects(name):
    found = of_kind(base(name), "Deployment")
    services = of_kind(base(name), "Service")
    assert services
    for service in services.values():
        (one,) = [
            each
            for each in found.values()
            if service["spec"]["selector"].items()
            <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        ports = {port["name"]: port["containerPort"] for port in container(one)["ports"]}
        (port,) = service["spec"]["ports"]
        assert ports[port["targetPort"]] == port["port"]
    for each in found.values():
        wanted = each["spec"]["selector"]["matchLabels"].items()
        assert wanted <= each["spec"]["template"]["metadata"]["labels"].items()


def test_a_site_is_found_by_the_name_that_its_certificate_holds():
    assert [each.namespace for each in sites()] == ["fedsim-site-1", "fedsim-site-2"]
    for i, each in enumerate(sites()):
        assert each.literals == {
            "partition-id": str(i),
            "num-partitions": str(len(sites())),
            "superlink": f"superlink.{SERVER}.svc:8000",
            "supernode": "supernode" + each.suffix,
        }
    assert kustomization(KUBERNETES / "server")["namespace"] == SERVER


@pytest.mark.parametrize("name", deployments())
def test_a_claim_that_is_mounted_is_there_and_data_cannot_be_written(name):
    deployment, _ = deployments()[name]
    claims = of_kind(base("server" if name in SERVED else "site"), "PersistentVolumeClaim")
    assert set(mounted(deployment, "persistentVolumeClaim", "claimName").values()) <= set(claims)
    for volume in deployment["spec"]["template"]["spec"]["volumes"]:
        if volume["name"] == "data":
            assert volume["persistentVolumeClaim"]["readOnly"] is True


def test_a_key_is_mounted_by_its_service_alone():
    whose: dict[str, set[str]] = {}
    for name, (deployment, _) in deployments().items():
        for secret in mounted(deployment, "secret", "secretName").values():
            whose.setdefault(secret, set()).add(name)
    assert whose["superlink-tls"] == {"superlink"}
    assert whose["supernode-tls"] == {"supernode-1", "supernode-2"}
    assert whose["superlink-secret"] == {"superlink", "superexec-server"}
