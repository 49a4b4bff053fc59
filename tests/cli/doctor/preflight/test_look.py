"""`fedsim doctor --deployment` as a command: what it prints, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.cli.doctor.preflight.look import NodeOptions, prepare
from fedsim.deployment.addresses import free_port
from tests.cli.doctor.preflight.servers import pair, serving
from tests.deployment.sites_apart import scenario, written

ROOT = Path(__file__).resolve().parents[4]


def command(*words, **variables):
    return subprocess.run(
        [sys.executable, "-c", "from fedsim.cli import main; main()", "doctor", *map(str, words)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip


def test_a_node_with_all_in_order_is_ready_and_one_with_a_fault_is_not(tmp_path):
    files = written(tmp_path / "data", sizes=(14, 23))
    mine = tmp_path / "site.toml"
    mine.write_text(f'[site]\ndata = "{files[1]}"\naudit = "{tmp_path}/audit.jsonl"\n')
    authority = pair("the authority")
    with serving(tmp_path, pair("superlink", by=authority)) as address:
        ended = command(
            "--deployment", "--superlink", address, "--site", mine, "--json", "--partition", 1,
            "--root-certificates", authority.write(tmp_path / "ca.crt"),
            "--scenario", scenario(tmp_path, files), "--set", "rounds=2",
        )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    document = json.loads(ended.stdout)
    assert document["ready"] is True
    assert (document["told"]["train"], document["told"]["labels"]) == (23, ["healthy", "sick"])
    names = [each["name"] for each in document["findings"]]
    assert names[:5] == ["python", "fedsim", "flwr", "torch", "numpy"]
    assert {"/health", "clock", "site file", "audit", "kernels", "told: sums"} <= set(names)
    assert "ray" not in names


def test_a_fault_ends_with_1_and_is_said_with_what_to_do(tmp_path):
    port = free_port()
    ended = command("--deployment", "--superlink", f"127.0.0.1:{port}", "--insecure")
    assert ended.returncode == 1
    assert f"FAILED  port       nothing listens at 127.0.0.1:{port}" in ended.stdout
    assert "-> start the SuperLink" in ended.stdout
    assert ended.stdout.endswith("1 to put right, see FAILED\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--superlink", "a:1"], "--superlink: needs --deployment"),
        (["--certificates", "x"], "--certificates: needs --deployment"),
        (["--insecure"], "--insecure: needs --deployment"),
        (["--deployment", "--ray"], "--ray: a node of a deployment starts no Ray"),
        (["a", "--deployment", "--scenario", "b"], "--scenario b: a is named too"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, said):
    ended = command(*words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"fedsim: {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"insecure": True}, "--insecure: needs --superlink"),
        ({"root_certificates": Path("x")}, "--root-certificates: needs --superlink"),
        (
            {"superlink": "a:1", "insecure": True, "root_certificates": Path("x")},
            "--insecure: not together with --root-certificates",
        ),
        ({"superlink": "https://a:1"}, "--superlink https://a:1: must be HOST:PORT, such as super"),
        ({"superlink": "a:0"}, "ports are 1 to 65535"),
        ({"partition": -1}, "--partition -1: must be >= 0"),
        ({"overrides": ["rounds=1"]}, "--set rounds=1: needs a --scenario"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_anything_is(options, said):
    with pytest.raises(ScenarioError, match=said):
        prepare(NodeOptions(**options))
