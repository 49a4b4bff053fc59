"""The files of deploy/kubernetes, read without kubectl, and what a policy in them allows."""

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from fedsim.deployment.compose import merge

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
EXAMPLE = KUBERNETES / "overlays" / "example"
SERVER = "fedsim-server"
DNS = "kube-dns"
# of which the page says that it is the oldest; a probe by gRPC is stable since then
OLDEST = "1.27"
Resource = dict[str, Any]


@functools.cache
def _read(path: Path) -> list[Resource]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def kustomization(folder: Path) -> Resource:
    (found,) = _read(folder / "kustomization.yml")
    return copy.deepcopy(found)


def base(name: str) -> list[Resource]:
    """Return the resources of a base, as its files say them."""
    folder = KUBERNETES / name
    return [
        copy.deepcopy(each)
        for file in kustomization(folder)["resources"]
        for each in _read(folder / file)
    ]


class Site(NamedTuple):
    """What the overlay of a site says."""

    namespace: str
    suffix: str
    literals: Mapping[str, str]


def site(number: int) -> Site:
    table = kustomization(EXAMPLE / f"site-{number}")
    (generator,) = table["configMapGenerator"]
    assert generator["name"] == "site"
    literals = dict(literal.split("=", 1) for literal in generator["literals"])
    return Site(table["namespace"], table["nameSuffix"], literals)


def sites() -> list[Site]:
    return [site(number) for number in (1, 2)]


def of_kind(resources: list[Resource], kind: str) -> dict[str, Resource]:
    return {each["metadata"]["name"]: each for each in resources if each["kind"] == kind}


def container(deployment: Resource) -> Resource:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def variables(deployment: Resource, literals: Mapping[str, str]) -> dict[str, str]:
    """Return a container's variables, those of the configmap `site` from its literals."""
    found = {}
    for entry in container(deployment)["env"]:
        if "value" not in entry:
            reference = entry["valueFrom"]["configMapKeyRef"]
            assert reference["name"] == "site"
        found[entry["name"]] = entry["value"] if "value" in entry else literals[reference["key"]]
    return found


def command(deployment: Resource, literals: Mapping[str, str]) -> list[str]:
    """Return command and arguments with `$(NAME)` put in, as the kubelet does."""
    known = variables(deployment, literals)
    words = [*container(deployment)["command"], *container(deployment)["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word) for word in words]


def composed() -> dict[str, Resource]:
    """Return the services of the compose file under the overlays that deploy/kubernetes follows."""
    document: Resource = {}
    for name in ("docker-compose.yml", "deploy/tls.yml", "deploy/sites.yml", "deploy/state.yml"):
        document = merge(document, _read(ROOT / name)[0])
    return document["services"]


def deployments() -> dict[str, tuple[Resource, Site]]:
    """Return the Deployments of the example by the names of the compose file's services."""
    found = {
        name: (each, Site(SERVER, "", {}))
        for name, each in of_kind(base("server"), "Deployment").items()
    }
    for each in sites():
        for name, deployment in of_kind(base("site"), "Deployment").items():
            found[name + each.suffix] = (deployment, each)
    return found


def check(resource: Resource, version: str = OLDEST) -> None:
    """Hold a resource to the schema of a version of Kubernetes, or of the `latest` known here."""
    schemas = pytest.importorskip("kubernetes_validate", reason="no schemas of Kubernetes here")
    wanted = schemas.latest_version() if version == "latest" else version
    schemas.validate(resource, wanted, strict=True)


def mounted(deployment: Resource, kind: str, key: str) -> dict[str, str]:
    """Return what is mounted of a kind of volume, by the volume's name."""
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    return {volume["name"]: volume[kind][key] for volume in volumes if kind in volume}


def assert_restricted(deployment: Resource) -> None:
    """What Pod security "restricted" asks for, and more."""
    spec = deployment["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert {spec["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {
        49999
    }
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    for each in spec["containers"]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any("hostPort" in port for port in each.get("ports", ()))
        assert set(each["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in each["resources"]["limits"]
        written = {m["mountPath"] for m in each["volumeMounts"] if not m.get("readOnly", False)}
        assert {"/tmp", "/app/.flwr"} <= written
    assert {volume["name"] for volume in spec["volumes"]} == {
        mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]
    }


class Pod(NamedTuple):
    """A Pod as a NetworkPolicy sees it."""

    name: str
    namespace: str
    labels: Mapping[str, str]


class Federation(NamedTuple):
    """Pods, labels of namespaces and policies of the example, and the cluster's DNS."""

    pods: list[Pod]
    namespaces: dict[str, Mapping[str, str]]
    policies: dict[str, list[Resource]]

    def may(self, sender: Pod, receiver: Pod, port: int) -> bool:
        """Whether both ends allow it: policies add up, and none that selects means all."""
        return self._lets("Egress", sender, receiver, port) and self._lets(
            "Ingress", receiver, sender, port
        )

    def selected(self, policy: Resource, namespace: str) -> list[Pod]:
        wanted = policy["spec"]["podSelector"]
        return [p for p in self.pods if p.namespace == namespace and _matches(wanted, p.labels)]

    def peers(self, peer: Resource, namespace: str) -> Iterator[Pod]:
        """Yield the Pods that a `to` or `from` means, seen from the policy's namespace."""
        for pod in self.pods:
            if "namespaceSelector" in peer:
                near = _matches(peer["namespaceSelector"], self.namespaces[pod.namespace])
            else:
                near = pod.namespace == namespace
            if near and _matches(peer.get("podSelector", {}), pod.labels):
                yield pod

    def _lets(self, direction: str, own: Pod, other: Pod, port: int) -> bool:
        rules, ends = ("egress", "to") if direction == "Egress" else ("ingress", "from")
        policies = [
            each["spec"]
            for each in self.policies.get(own.namespace, [])
            if direction in each["spec"]["policyTypes"]
            and own in self.selected(each, own.namespace)
        ]
        return not policies or any(
            port in {each["port"] for each in rule["ports"]}
            and any(other in self.peers(peer, own.namespace) for peer in rule[ends])
            for policy in policies
            for rule in policy.get(rules, [])
        )


def _matches(selector: Resource, labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "another kind of selector is not read here"
    return selector.get("matchLabels", {}).items() <= labels.items()


def federation() -> Federation:
    """Return the example as its policies see it: a server, two sites, a stranger, the DNS."""
    pods = [
        Pod(DNS, "kube-system", {"k8s-app": "kube-dns"}),
        Pod("stranger", "elsewhere", {"app.kubernetes.io/name": "supernode"}),
    ]
    namespaces: dict[str, Mapping[str, str]] = {
        name: {"kubernetes.io/metadata.name": name} for name in ("kube-system", "elsewhere")
    }
    policies: dict[str, list[Resource]] = {}
    for name, place in (("server", Site(SERVER, "", {})), *(("site", each) for each in sites())):
        resources = base(name)
        (namespace,) = of_kind(resources, "Namespace").values()
        namespaces[place.namespace] = namespace["metadata"]["labels"]
        policies[place.namespace] = list(of_kind(resources, "NetworkPolicy").values())
        for deployment, each in of_kind(resources, "Deployment").items():
            labels = each["spec"]["template"]["metadata"]["labels"]
            pods.append(Pod(deployment + place.suffix, place.namespace, labels))
    return Federation(pods, namespaces, policies)
