"""The example of deploy/kubernetes as kubectl renders it, and what the page makes beside it."""

import functools
import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.deployment.kubernetes_files import (
    EXAMPLE,
    KUBERNETES,
    ROOT,
    SERVER,
    assert_restricted,
    check,
    command,
    composed,
    container,
    deployments,
    mounted,
    of_kind,
    site,
    sites,
)


@functools.cache
def rendered(folder):
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here: the overlays are not rendered")
    found = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return list(yaml.safe_load_all(found.stdout))


@pytest.fixture
def own_copy(tmp_path):
    """The files, to be changed; the overlay of site 1."""
    return shutil.copytree(KUBERNETES, tmp_path / "kubernetes") / "overlays/example/site-1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the page's commands make: files by namespace and name, and the folder that has them."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: certificates cannot be made")
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    part = page.partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
    (block,) = [
        each for each in re.findall(r"```sh\n(.*?)```", part, re.DOTALL) if "secret" in each
    ]
    folder = tmp_path_factory.mktemp("made")
    (folder / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "certificates.sh", folder / "deploy")
    stub = folder / "bin" / "kubectl"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> calls\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euc", block], cwd=folder, check=True, capture_output=True,
        env={**os.environ, "PATH": path, "XDG_DATA_HOME": str(folder / "authority")},
    )  # fmt: skip
    found = {}
    for line in (folder / "calls").read_text().splitlines():
        call = re.fullmatch(
            r"-n (\S+) create (?:secret generic|configmap) (\S+) --from-file=(\S+)", line
        )
        if call is None:
            assert line == "apply -k deploy/kubernetes/overlays/example"
            continue
        source = folder / call[3]
        files = source.iterdir() if source.is_dir() else [source]
        found[call[1], call[2]] = {file.name for file in files}
    return found, folder


def test_the_page_makes_every_secret_with_the_files_that_the_arguments_name(made):
    used: dict[tuple[str, str], set[str]] = {}
    for name, (deployment, place) in deployments().items():
        sources = mounted(deployment, "secret", "secretName") | mounted(
            deployment, "configMap", "name"
        )
        assert set(sources) == {"certificates", "secret"}, name
        words = command(deployment, place.literals)
        for volume, source in sources.items():
            wanted = {word.split("/")[1] for word in words if word.startswith(f"{volume}/")}
            assert wanted
            used.setdefault((place.namespace, source), set()).update(wanted)
    assert used == made[0]


def test_the_certificate_holds_the_names_by_which_the_superlink_is_asked_for(made):
    from cryptography import x509

    pem = (made[1] / "deploy/certificates/superlink/server.pem").read_bytes()
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    held = set(names.value.get_values_for_type(x509.DNSName))
    asked = {site(number).literals["superlink"].rsplit(":", 1)[0] for number in (1, 2)}
    assert asked | {"superlink"} <= held


def test_the_example_renders_to_the_whole_federation():
    resources = rendered(EXAMPLE)
    for resource in resources:
        check(resource)
    places = {
        (kind, each["metadata"]["namespace"], each["metadata"]["name"])
        for each in resources
        if (kind := each["kind"]) != "Namespace"
    }
    assert len(places) + 3 == len(resources)
    assert {each["metadata"]["name"] for each in resources if each["kind"] == "Namespace"} == {
        SERVER, *(each.namespace for each in sites())
    }  # fmt: skip
    found = of_kind(resources, "Deployment")
    assert found.keys() == composed().keys()
    for name, deployment in found.items():
        assert_restricted(deployment)
        assert container(deployment)["image"] == composed()[name]["image"]
        namespace = deployment["metadata"]["namespace"]
        for claim in mounted(deployment, "persistentVolumeClaim", "claimName").values():
            assert ("PersistentVolumeClaim", namespace, claim) in places
        for entry in container(deployment)["env"]:
            if "valueFrom" in entry:
                source = entry["valueFrom"]["configMapKeyRef"]["name"]
                assert ("ConfigMap", namespace, source) in places
    for each in sites():
        assert ("Service", each.namespace, each.literals["supernode"]) in places


def test_a_digest_takes_the_place_of_a_tag(own_copy):
    file = own_copy.parent / "kustomization.yml"
    digest = "sha256:" + "0" * 64
    file.write_text(file.read_text().replace("newTag: 0.1.0", f"digest: {digest}"))
    images = {
        container(each)["image"]
        for each in of_kind(rendered(own_copy.parent), "Deployment").values()
    }
    assert f"fedsim-superexec@{digest}" in images
    assert "fedsim-superexec:0.1.0" not in images


def test_without_dns_the_code_that_trains_knows_its_supernode_by_a_fixed_address(own_copy):
    file = own_copy / "kustomization.yml"
    more = "      - supernode-address=10.96.40.1\ncomponents: [../../../without-dns]\n"
    file.write_text(file.read_text() + more)
    resources = rendered(own_copy)
    for resource in resources:
        check(resource)
    assert of_kind(resources, "Service")["supernode-1"]["spec"]["clusterIP"] == "10.96.40.1"
    client = of_kind(resources, "Deployment")["superexec-client-1"]["spec"]["template"]["spec"]
    assert client["hostAliases"] == [{"ip": "10.96.40.1", "hostnames": ["supernode-1"]}]
    before = of_kind(rendered(EXAMPLE / "site-1"), "NetworkPolicy").keys()
    after = of_kind(resources, "NetworkPolicy").keys()
    assert before - after == {"superexec-client-dns-1"}
