"""What `fedsim doctor` finds, and what it says of machines on which something is missing."""

import http.server
import importlib.metadata
import json
import os
import resource
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.machine import control_group_memory, processor_quota
from fedsim.cli.doctor import examination, machine, packages, ray_start
from fedsim.cli.doctor.finding import Finding

ROOT = Path(__file__).resolve().parents[3]


def found(findings, name):
    """The one finding of that name."""
    (finding,) = [each for each in findings if each.name == name]
    return finding


def command(*arguments, python=sys.executable, environment=None, limit=None, cwd=None):
    """Run the command line of another process and return it."""
    return subprocess.run(
        [python, "-c", "from fedsim.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )


# This machine, which has what the tests need.


@pytest.fixture(scope="module")
def here():
    return examination.examine()


def test_a_machine_that_runs_these_tests_lacks_nothing_needed(here):
    for finding in here.findings:
        assert finding.state != "failed", finding
    assert here.ready
    for name in ("flwr", "torch", "numpy", "datasets", "scikit-learn"):
        assert found(here.findings, name).found.startswith(importlib.metadata.version(name))


def test_what_flower_s_simulation_needs_is_looked_at_too(here):
    assert found(here.findings, "ray").found.startswith(importlib.metadata.version("ray"))


def test_the_report_fits_on_a_screen(here):
    lines = here.lines(width=80, colour=False)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "ready"


def test_nothing_heavy_is_imported_to_look():
    code = (
        "import sys, fedsim.cli.doctor.examination, fedsim.cli; "
        "heavy = {'torch', 'ray', 'flwr', 'numpy', 'datasets'}; print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


# Machines on which something is missing.


@pytest.fixture
def elsewhere(tmp_path):
    """A virtual environment of links to this one's packages, without some and with stand-ins."""

    def build(*, without=(), stand_ins=None, versions=None):
        here = Path(sysconfig.get_path("purelib"))
        there = tmp_path / "venv"
        site = there / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        site.mkdir(parents=True)
        (there / "bin").mkdir()
        (there / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
        (there / "pyvenv.cfg").write_text(f"home = {Path(os.path.realpath(sys.executable)).parent}")
        stand_ins = stand_ins or {}
        for entry in here.iterdir():
            name, _, rest = entry.name.removesuffix(".py").partition("-")
            if name in without or (name in stand_ins and not rest):
                continue
            if name in (versions or {}) and rest.endswith(".dist-info"):
                (site / f"{name}-{versions[name]}.dist-info").mkdir()
                text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions[name]}\n"
                (site / f"{name}-{versions[name]}.dist-info" / "METADATA").write_text(text)
                continue
            (site / entry.name).symlink_to(entry)
        for name, text in stand_ins.items():
            (site / f"{name}.py").write_text(text)
        return str(there / "bin" / "python")

    return build


QUICK = dict.fromkeys(("datasets", "flwr_datasets", "sklearn", "matplotlib", "tensorboard"), "")
TORCH = "class version:\n    cuda = hip = None\nclass cuda:\n    is_available = lambda: False\n"


def test_a_node_whose_versions_are_not_the_tested_ones_is_told_what_to_install(elsewhere, tmp_path):
    python = elsewhere(
        stand_ins={**QUICK, "torch": TORCH, "flwr": "", "numpy": ""},
        versions={"flwr": "1.30.0", "numpy": "2.4.0"},
    )
    here = {"PYTHONPATH": str(ROOT)}
    ended = command(
        "doctor", "--deployment", "--json", python=python, cwd=tmp_path, environment=here
    )
    assert ended.returncode == 1, ended.stderr
    by_name = {each["name"]: each for each in json.loads(ended.stdout)["findings"]}
    assert by_name["flwr"]["state"] == "failed"
    assert by_name["numpy"]["state"] == "note"
    assert by_name["numpy"]["found"].startswith("2.4.0, tested with ")
    assert by_name["numpy"]["remedy"].startswith("pip install 'numpy==")
    assert by_name["site"]["found"].startswith("cannot be looked at: ")
    assert "datasets" not in by_name


def test_packages_that_are_missing_wrong_or_broken_are_named_with_the_command_that_brings_them(
    elsewhere, tmp_path
):
    python = elsewhere(
        without=("ray", "threadpoolctl"),
        stand_ins={**QUICK, "torch": TORCH, "flwr": "", "safetensors": "1 / 0"},
        versions={"flwr": "1.30.0"},
    )
    ended = command("doctor", "--json", python=python, cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    document = json.loads(ended.stdout)
    assert document["ready"] is False
    assert document["exit_code"] == 1
    by_name = {each["name"]: each for each in document["findings"]}
    failed = {name for name, each in by_name.items() if each["state"] == "failed"}
    assert failed == {"flwr", "threadpoolctl", "safetensors"}
    assert by_name["threadpoolctl"]["found"] == "not installed"
    assert by_name["threadpoolctl"]["remedy"].startswith("pip install 'threadpoolctl>=")
    assert by_name["flwr"]["found"].startswith("1.30.0, and fedsim needs ")
    assert "ZeroDivisionError: division by zero" in by_name["safetensors"]["found"]


def test_without_ray_the_command_that_brings_it_and_the_way_around_it_are_named(
    elsewhere, tmp_path
):
    python = elsewhere(without=("ray",), stand_ins={**QUICK, "torch": TORCH, "flwr": ""})
    ended = command("doctor", python=python, cwd=tmp_path)
    assert ended.returncode == 1
    assert "FAILED" in ended.stdout
    words = " ".join(ended.stdout.split())
    assert "not installed -> pip install 'ray==" in words
    assert "or run without it: `--set engine.kind=inline`" in words
    assert words.endswith("1 to put right, see FAILED")
    assert ended.stderr == ""


@pytest.fixture
def broken_ray(tmp_path, monkeypatch):
    """Packages that are imported at once, and a Ray that cannot be."""
    stand_ins = {**QUICK, "torch": TORCH, "flwr": "", "ray": "raise ImportError('no libray.so')"}
    (tmp_path / "first").mkdir()
    for name, text in stand_ins.items():
        (tmp_path / "first" / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))


def test_an_inline_scenario_does_not_need_ray(broken_ray):
    report = examination.examine("quickstart", overrides=["engine.kind=inline"])
    assert found(report.findings, "ray").state == "note"
    assert "cannot be imported: ImportError: no libray.so" in found(report.findings, "ray").found
    assert found(report.findings, "its engine").found == "inline, in one process"
    assert report.ready
    report = examination.examine("quickstart", start_ray=True)
    failed = [each.name for each in report.findings if each.state == "failed"]
    assert failed == ["ray", "Ray worker"]


def test_a_scenario_that_is_wrong_is_refused_whatever_the_machine_has(broken_ray, tmp_path):
    (tmp_path / "mine.toml").write_text(DIGITS.replace("digits", "digit"))
    report = examination.examine(tmp_path / "mine.toml")
    assert report.refused
    refusal = found(report.findings, "scenario").found
    assert "[data] 'digit' is not a data set; did you mean 'digits'?" in refusal


def test_too_small_a_memory_limit_is_named_and_survived(tmp_path):
    ended = command("doctor", "--json", limit=(400 * 2**20,) * 2, cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    findings = [Finding(**each) for each in json.loads(ended.stdout)["findings"]]
    assert "`ulimit -v` allows 400.0 MiB" in found(findings, "memory").found
    assert found(findings, "memory").state == "failed"
    assert found(findings, "torch").state == "failed"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('libfoo.so.1: cannot open')", "ImportError: libfoo.so.1: cannot open"),
        ("raise KeyError", "KeyError"),
        ("import os; os.abort()", "the import ended its process (signal SIGABRT)"),
        ("import os; os._exit(7)", "the import ended its process (exit code 7)"),
        ("import sys; sys.exit('enough')", "SystemExit: enough"),
        ("import time; time.sleep(60)", "its import was not done after 1.5 s"),
    ],
)
def test_a_package_that_does_harm_when_imported_harms_nothing_else(
    tmp_path, monkeypatch, text, reason
):
    (tmp_path / "bad_package.py").write_text(text)
    (tmp_path / "good_package.py").write_text("print('I talk')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    went = packages.try_imports(["bad_package", "good_package"], timeout_s=1.5)
    assert not went["bad_package"].ok
    assert went["bad_package"].reason == reason
    assert went["good_package"].ok


def test_a_process_that_cannot_be_started_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    went = packages.try_imports(["json", "math"], timeout_s=5)
    assert [each.ok for each in went.values()] == [False, False]
    assert "no process could be started" in went["json"].reason
    assert "no process could be started" in ray_start.start(timeout_s=5).found


def test_ray_that_does_not_start_in_time_is_named_and_ended():
    begun = time.monotonic()
    finding = ray_start.start(timeout_s=0.3)
    assert finding.state == "failed"
    assert finding.found == "Ray and one worker did not start within 0.3 s"
    assert "engine.kind=inline" in finding.remedy
    assert time.monotonic() - begun < 10


@pytest.mark.slow
def test_ray_is_really_started_and_ended():
    finding = ray_start.start(timeout_s=100)
    assert finding.state == "ok", finding


# Folders.


def test_the_cache_says_what_it_holds_and_is_not_made_by_looking(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "a" / "b"))
    assert machine.cache().state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a" / "b" / "data").mkdir(parents=True)
    (tmp_path / "a" / "b" / "data" / "x.npy").write_bytes(b"0" * 3000)
    assert machine.cache().found.endswith("free, holds 2.9 KiB")


def test_a_cache_that_cannot_be_written_is_named_with_the_variable_to_set(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file" / "cache"))
    finding = machine.cache()
    assert finding.state == "failed"
    assert f"{tmp_path / 'file'} is no folder" in finding.found
    assert "FEDSIM_CACHE" in finding.remedy
    monkeypatch.setenv("FEDSIM_CACHE", "/proc/fedsim")
    assert "/proc/fedsim cannot be written" in machine.cache().found


def test_a_disk_that_takes_no_more_bytes_is_noticed(tmp_path):
    code = (
        "import resource; from pathlib import Path; from fedsim.cli.doctor import machine; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3, 3)); "
        "print(machine.folder('runs', Path('runs'), remedy='elsewhere'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "cannot be written: File too large" in done.stdout


def test_a_working_folder_that_is_gone_is_no_crash(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from fedsim.cli.doctor import machine; "
        "os.rmdir(os.getcwd()); print(machine.folder('runs', Path('runs'), remedy='elsewhere'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=gone
    )
    assert "state='failed'" in done.stdout


# Processors and memory, of trees that look like a machine's.


@pytest.fixture
def tree(tmp_path):
    """A function that writes files below a root."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"}


def test_the_tightest_quota_of_nested_control_groups_counts(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
        }
    )
    assert processor_quota(root) == 0.5
    finding = machine.processors(root)
    assert finding.state == "note"
    assert "a quota allows 0.5 at a time" in finding.found
    assert "--workers 1" in finding.remedy


def test_quotas_and_limits_of_the_first_version_are_read_too(tree):
    root = tree(
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n2:devices:/x\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(3 * 2**30),
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(2**30),
        }
    )
    assert processor_quota(root) == 1.5
    assert control_group_memory(root) == (3 * 2**30, 2**30)


def test_no_quota_is_no_limit(tree):
    root = tree({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n", **MEMINFO})
    assert processor_quota(root) is None
    (root / "proc/cpuinfo").write_text("vendor_id : Maker\ncpu family : 1\nmodel : 2\n")
    assert machine.processors(root).state == "ok"
    assert machine.processors(root).found.endswith(", Maker family 1 model 2")
    assert machine.memory(root).found == "8.0 GiB of 16.0 GiB available"


@pytest.mark.parametrize(
    ("limit", "used", "state"), [(400, 0, "failed"), (4096, 3000, "note"), (6000, 100, "ok")]
)
def test_memory_is_what_the_control_group_leaves(tree, limit, used, state):
    root = tree(
        {
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": str(limit * 2**20),
            "sys/fs/cgroup/job/memory.current": str(used * 2**20),
            **MEMINFO,
        }
    )
    finding = machine.memory(root)
    assert finding.state == state
    assert "its control group allows" in finding.found
    assert bool(finding.remedy) == (state != "ok")


def test_memory_that_cannot_be_read_is_unknown_and_no_crash(tree):
    assert machine.memory(tree({"proc/x": ""})).state == "note"
    assert "unknown" in machine.memory(tree({"proc/meminfo": "nonsense\n"})).found


def test_shared_memory_that_is_absent_or_small_is_noted(tmp_path):
    assert machine.shared_memory(tmp_path / "nowhere").state == "note"


@pytest.mark.parametrize(
    ("facts", "driver", "visible", "expected"),
    [
        (None, False, None, "unknown without torch"),
        ({"built_for": "12.8", "devices": []}, False, None, "no NVIDIA driver"),
        ({"built_for": None, "devices": []}, True, None, "built for processors alone"),
        ({"built_for": "12.8", "devices": []}, True, "", "CUDA_VISIBLE_DEVICES = '' hides"),
        ({"built_for": "12.8", "devices": []}, True, None, "torch for CUDA 12.8 sees no device"),
    ],
)
def test_why_torch_sees_no_device_is_said(tree, monkeypatch, facts, driver, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PATH", "")
    root = tree({"proc/driver/nvidia/version": "NVRM"} if driver else {"proc/x": ""})
    finding = machine.graphics(facts, root)
    assert expected in finding.found
    assert finding.state == "note"


def test_devices_are_listed_with_their_memory(tree):
    facts = {"built_for": "12.8", "devices": [{"name": "H100", "memory": 80 * 2**30}]}
    assert machine.graphics(facts).found == "H100 (80.0 GiB)"


# Scenarios on this machine.

DIGITS = """
[data]
name = "digits"
[partition]
kind = "iid"
clients = 5
"""


@pytest.fixture
def held(tmp_path, here):
    """A function that holds a scenario against this machine, without looking at it again."""

    def held(text, *overrides):
        from fedsim.cli.doctor.scenario import look
        from fedsim.scenario.load import load

        (tmp_path / "mine.toml").write_text(text)
        torch = packages.Imported(True, "", {"built_for": None, "devices": []})
        looked = packages.Packages(here.findings, torch)
        return look(load(tmp_path / "mine.toml", overrides), looked)

    return held


def test_a_scenario_that_this_machine_can_run_is_well(held):
    findings = held(DIGITS)
    assert {each.state for each in findings} == {"ok"}
    assert found(findings, "its data").found == "digits, needs no download"
    assert found(findings, "its parts").found == "fit each other; 5 clients"


def test_what_a_run_would_refuse_is_refused_though_each_table_is_valid(held):
    with pytest.raises(ScenarioError, match="test_fraction = 0 leaves them none"):
        held(DIGITS, "evaluation.clients=3")
    finding = found(held(DIGITS, "participation={kind='cyclic', rate=0.13, cycle=10}"), "its parts")
    assert finding.state == "note"
    assert "cycle = 10: clients are on for whole rounds" in finding.found


def test_a_device_that_is_not_there_is_missing_with_the_way_around_it(held):
    finding = found(held(DIGITS, "engine.device=cuda"), "its device")
    assert finding.state == "failed"
    assert "torch sees no CUDA device" in finding.found
    assert "--set engine.device=cpu" in finding.remedy


def test_a_worker_that_is_larger_than_the_machine_is_missing(held):
    finding = found(held(DIGITS, "engine.client_resources.num_cpus=4096"), "its engine")
    assert finding.state == "failed"
    assert "asks for 4096 processors" in finding.found
    many = found(held(DIGITS, "engine.workers=4096"), "its engine")
    assert (many.state, many.remedy) == ("note", f"--workers {os.cpu_count()} is as fast")


MNIST = DIGITS.replace("digits", "mnist")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that stands for the Hub on this machine and answers every request alike."""
    servers = []

    def hub(status):
        asked = []

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append((self.command, self.path))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return asked

    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


def test_data_that_the_hub_has_are_looked_up_and_not_fetched(held, hub, tmp_path):
    asked = hub(200)
    finding = found(held(MNIST), "its data")
    assert finding.state == "ok"
    assert "will be fetched: ylecun/mnist" in finding.found
    assert "not tried together" in found(held(MNIST), "its parts").found
    assert set(asked) == {("HEAD", "/api/datasets/ylecun/mnist")}
    assert not (tmp_path / "cache").exists()


def test_data_that_the_hub_does_not_have_are_missing(held, hub):
    hub(404)
    finding = found(held(MNIST), "its data")
    assert finding.state == "failed"
    assert "cannot be had: 404" in finding.found


def test_data_beyond_a_network_that_is_not_there_are_missing(held, hub, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        finding = found(held(MNIST), "its data")
    assert finding.state == "failed"
    assert "is not to be reached" in finding.found
    assert "[data] path" in finding.remedy
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "is not to be reached" in found(held(MNIST), "its data").found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in found(held(MNIST), "its data").found


def test_data_that_were_fetched_before_need_no_network(held, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub" / "datasets--ylecun--mnist" / "snapshots" / "1a2b").mkdir(parents=True)
    assert found(held(MNIST), "its data").found == "mnist, on this machine already"


KERNELS = {
    "processor": "Maker family 1 model 2", "aten": "AVX512", "mkl": "2024.2 AUTO",
    "onednn": "3.12.0 unlimited", "numpy_simd": "X86_V3 X86_V4", "openblas": "SkylakeX",
    "libc": "glibc 2.36",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason", "expected"),
    [
        ({}, None, ("ok", "fast and portable; torch AVX512, MKL AUTO", "")),
        ({}, "needs more", ("note", "fast, not portable (needs more); torch ", "")),
        ({"mkl": "2024.2 off"}, None, ("note", "may depend on who shares ", "unset MKL_CBWR")),
    ],
)
def test_kernels_and_the_promise_that_holds_are_told(changed, reason, expected):
    bits = examination.kernels.look({"kernels": {**KERNELS, **changed}, "not_portable": reason})
    state, words, remedy = expected
    assert (bits.state, bits.remedy) == (state, remedy)
    assert bits.found.startswith(words)
    assert "NumPy X86_V4, OpenBLAS SkylakeX" in bits.found


def test_kernels_are_unknown_without_torch():
    for facts in (None, {"built_for": None, "devices": []}):
        finding = examination.kernels.look(facts)
        assert (finding.state, finding.found) == ("note", "unknown without torch")
