"""The files of deploy/hospital as services of one compose file, which processes can follow."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fedsim.deployment.compose import interpolate
from fedsim.deployment.flower_commands import Entrance
from fedsim.deployment.processes import Deployment

ROOT = Path(__file__).resolve().parents[2]
HOSPITAL = ROOT / "deploy" / "hospital"
SITES = 2
OPERATOR = Entrance("operator", 8000, "certificates/ca.crt")


def needed():
    """Skip, saying so, where the gateway cannot run."""
    for program in ("nginx", "openssl", "ssh-keygen", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here: the gateway of deploy/hospital was not run")


def certificates(folder, *words):
    """What deploy/certificates.sh and deploy/keys.sh make for a hospital."""
    script = [ROOT / "deploy" / "certificates.sh", "--authority", folder.parent / "authority"]
    made = [*script, "--gateway", *words, folder]
    subprocess.run(list(map(str, made)), check=True, capture_output=True)
    subprocess.run([ROOT / "deploy" / "keys.sh", folder], check=True, capture_output=True)
    return folder


def _filled(text, variables):
    """The file's services with the variables put in, as a compose client does; `$$` stays."""
    return yaml.safe_load(interpolate(text.replace("$$", "$$$$"), variables))["services"]


def services(folder, data, made):
    """All machines' services by the names that they are reached by."""
    given = {
        "FEDSIM_CERTIFICATES": str(made), "FEDSIM_GATEWAY": "127.0.0.1",
        "FEDSIM_PARTITIONS": str(SITES), "FEDSIM_DATA": str(folder / "empty"),
    }  # fmt: skip
    (folder / "empty").mkdir(exist_ok=True)
    found = _filled((HOSPITAL / "server.yml").read_text(), given)
    found |= _filled((HOSPITAL / "operator.yml").read_text(), given)
    found["operator"]["depends_on"] = {"gateway": {}}
    for number in range(1, SITES + 1):
        files = folder / f"files-{number}"
        files.mkdir(exist_ok=True)
        text = (HOSPITAL / "site" / "site.toml").read_text()
        (files / "site.toml").write_text(text.replace("/app/state", str(files)))
        site = given | {
            "FEDSIM_SITE_FILES": str(files),
            "FEDSIM_NODE": str(number), "FEDSIM_PARTITION": str(number - 1),
            "FEDSIM_SITE_FOLDER": str(data[number - 1]),
        }  # fmt: skip
        table = _filled((HOSPITAL / "site.yml").read_text(), site)
        table["relay"]["depends_on"] = {"operator": {}}
        table["supernode"]["depends_on"] = {f"relay-{number}": {}}
        table["superexec-client"]["depends_on"] = {f"supernode-{number}": {}}
        volumes = table["superexec-client"]["volumes"]
        table["superexec-client"]["volumes"] = [
            v.replace("state:", f"state-{number}:") for v in volumes
        ]
        found |= {f"{name}-{number}": each for name, each in table.items()}
    for each in found.values():  # of the file's folder, which this one is not
        each["volumes"] = [v.replace("./", f"{HOSPITAL}/", 1) for v in each.get("volumes", ())]
    return found


def deployed(folder, data, made, **options):
    """A deployment of the server, an operator and two sites, whose keys are registered."""
    folder.mkdir(exist_ok=True)
    file = folder / "docker-compose.yml"
    document = {"services": services(folder, data, made)}
    # `flwr` reads no variables, the launcher does
    file.write_text(yaml.safe_dump(document, width=10_000))

    def register(deployment):
        for number in range(1, SITES + 1):
            key = made / "public" / f"supernode-{number}.pub"
            deployment.supernode("register", str(key))

    return Deployment(
        file, folder=folder / "run", once_healthy={"operator": register}, entrance=OPERATOR,
        **options,
    )  # fmt: skip
