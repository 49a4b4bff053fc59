"""The helper that runs a compose file's commands as processes, on services made of a shell line."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.deployment.addresses import Addresses
from fedsim.deployment.compose import interpolate, merge, read_services
from fedsim.deployment.flower_commands import config_value
from fedsim.deployment.processes import Deployment

ROOT = Path(__file__).resolve().parents[2]


def service(script: str, *, health: str = "test -e up", needs: str = "[]") -> str:
    return (
        f"    entrypoint: [sh, -c]\n    command: [{script!r}]\n    depends_on: {needs}\n"
        f"    healthcheck: {{test: [CMD, sh, -c, {health!r}]}}\n"
    )


def compose(folder: Path, **services: str) -> Path:
    path = folder / "compose.yml"
    path.write_text("services:\n" + "".join(f"  {n}:\n{body}" for n, body in services.items()))
    return path


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ports() -> Addresses:
    return Addresses(["link", "link-2", "node"], iter(range(4001, 4999)).__next__)


def test_the_same_port_of_the_same_service_is_the_same_everywhere():
    addresses = ports()
    assert addresses.rewrite("link", ["--port", "8000"]) == ["--port", "4001"]
    assert addresses.rewrite("node", ["link:8000", "--port", "8000"]) == [
        "127.0.0.1:4001",
        "--port",
        "4002",
    ]
    check = "import r; r.urlopen('http://127.0.0.1:8000/health')"
    assert addresses.rewrite("link", [check]) == [check.replace("8000", "4001")]
    assert addresses.rewrite("node", [check]) == [check.replace("8000", "4002")]


def test_a_service_whose_name_begins_with_another_ones_keeps_its_address():
    rewritten = ports().rewrite("node", ["link-2:8000", "link:8000", "my-link:8000"])
    assert rewritten == ["127.0.0.1:4001", "127.0.0.1:4002", "my-link:8000"]


@settings(deadline=None)
@given(words=st.lists(st.text(st.characters(codec="utf-8", exclude_characters=":"), max_size=12)))
def test_words_without_an_address_stay_as_they_are(words):
    kept = [word for word in words if word not in ("0.0.0.0", "--port")]
    assert ports().rewrite("link", kept) == kept


@settings(deadline=None)
@given(
    numbers=st.lists(
        st.tuples(st.sampled_from(["link", "node"]), st.integers(1, 65535)), min_size=1
    )
)
def test_different_ports_stay_different(numbers):
    addresses = Addresses(
        ["link", "node"], iter([n for n in range(1, 400) for _ in (0, 1)]).__next__
    )
    given_ports = {pair: addresses.port(*pair) for pair in numbers}
    assert len(set(given_ports.values())) == len(set(numbers))


def test_an_overlay_replaces_commands_and_adds_to_other_lists():
    base = {"s": {"command": ["a"], "volumes": ["v"], "environment": {"A": "1"}}}
    overlay = {"s": {"command": ["b"], "volumes": ["w"], "environment": {"B": "2"}}}
    assert merge(base, overlay) == {
        "s": {"command": ["b"], "volumes": ["v", "w"], "environment": {"A": "1", "B": "2"}}
    }
    assert base["s"]["command"] == ["a"]


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("${A:-x}:/app/data:ro", {}, "x:/app/data:ro"),
        ("${A:-x}:/app/data:ro", {"A": "/y"}, "/y:/app/data:ro"),
        ("${A:-x}", {"A": ""}, "x"),
        ("${A}", {}, ""),
        ("plain", {"plain": "no"}, "plain"),
        ('exec "$$0" $${A:+$$B}', {"A": "x"}, 'exec "$0" ${A:+$B}'),
        ("$$${A}", {"A": "x"}, "$x"),
    ],
)
def test_variables_are_replaced_as_compose_does(text, variables, expected):
    assert interpolate(text, variables) == expected


def test_the_compose_file_of_the_repository_is_read_whole():
    services = read_services(ROOT / "docker-compose.yml", [ROOT / "deploy" / "tls.yml"])
    assert list(services) == [
        "superlink",
        "superexec-server",
        "supernode-1",
        "supernode-2",
        "superexec-client-1",
        "superexec-client-2",
    ]
    command = services["supernode-2"].command
    assert command[:2] == ("sh", "-ec")
    assert command[3:6] == ("flower-supernode", "--root-certificates", "certificates/ca.crt")
    assert services["supernode-2"].needs == ("superlink",)
    assert services["superexec-server"].volumes["runs"] == "runs"
    certificates = ROOT / "deploy" / "certificates" / "supernode-2"
    assert services["supernode-2"].volumes["certificates"] == certificates


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    command: [x]\n", "service a has no entrypoint as a list"),
        ("    entrypoint: [x]\n", r"service a has no healthcheck of the form \[CMD, ...\]"),
        (service("x", needs="[b]"), "service a depends on 'b' is not a service of the file"),
        (service("x") + '    volumes: ["./a:/data"]\n', "service a mounts /data"),
    ],
)
def test_what_a_process_cannot_follow_is_refused(tmp_path, body, message):
    with pytest.raises(ScenarioError, match=message):
        read_services(compose(tmp_path, a=body))


def test_a_compose_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match=r"no\.yml is not a file"):
        read_services(tmp_path / "no.yml")


def test_a_service_starts_when_those_it_needs_are_healthy(tmp_path):
    late = service("sleep 0.4; touch up; sleep 60")
    # It ends at once, and the deployment with it, when the service it needs is not up.
    second = service("test -e ../first/up || exit 7; touch up; sleep 60", needs="[first]")
    with Deployment(compose(tmp_path, second=second, first=late), folder=tmp_path) as deployment:
        assert set(deployment.pids) == {"first", "second"}


def test_services_that_wait_for_one_another_are_refused(tmp_path):
    circle = compose(tmp_path, a=service("x", needs="[b]"), b=service("x", needs="[a]"))
    with pytest.raises(ScenarioError, match="services a, b wait for one another"):
        Deployment(circle, folder=tmp_path).__enter__()


def test_a_service_that_exits_is_named_with_the_end_of_its_log(tmp_path):
    broken = compose(tmp_path, good=service("touch up; sleep 60"), bad=service("echo oops; exit 3"))
    deployment = Deployment(broken, folder=tmp_path)
    with pytest.raises(RunError, match=r"service bad exited with code 3\n.*bad.log\noops"):
        deployment.__enter__()
    assert deployment.pids == {}


def test_a_service_that_never_gets_healthy_is_named_with_its_limit(tmp_path):
    slow = compose(tmp_path, slow=service("echo still busy; sleep 60", health="echo no; false"))
    with pytest.raises(RunError, match=r"slow was not healthy after 0.5 s\n(.*\n)+no$") as caught:
        Deployment(slow, folder=tmp_path, start_timeout_s=0.5).__enter__()
    assert "still busy" in str(caught.value)


def test_leaving_ends_every_process_and_its_children(tmp_path):
    family = service("sleep 60 & echo $! > child; touch up; sleep 60")
    with Deployment(compose(tmp_path, a=family), folder=tmp_path) as deployment:
        parent = deployment.pids["a"]
        child = int((tmp_path / "a" / "child").read_text())
        assert is_alive(parent)
        assert is_alive(child)
    assert wait_until(lambda: not is_alive(parent) and not is_alive(child))


def test_a_process_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.deployment.processes._GRACE_S", 0.2)
    deaf = service("trap '' TERM; touch up; while true; do sleep 0.1; done")
    with Deployment(compose(tmp_path, a=deaf), folder=tmp_path) as deployment:
        pid = deployment.pids["a"]
    assert wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaving_by_an_error_ends_every_process_too(tmp_path, error):
    pids = []

    def fail() -> None:
        with Deployment(
            compose(tmp_path, a=service("touch up; sleep 60")), folder=tmp_path
        ) as deployment:
            pids.extend(deployment.pids.values())
            raise error

    with pytest.raises(error):
        fail()
    assert len(pids) == 1
    assert wait_until(lambda: not is_alive(pids[0]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_services_end_when_the_process_that_started_them_dies_unawares(tmp_path, number):
    path = compose(tmp_path, a=service("sleep 60 & echo $! > child; touch up; sleep 60"))
    script = (
        "import sys, time\nfrom fedsim.deployment import Deployment\n"
        f"with Deployment({str(path)!r}, folder={str(tmp_path)!r}) as deployment:\n"
        "    print(deployment.pids['a'], flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        parent = int(owner.stdout.readline())
        child = int((tmp_path / "a" / "child").read_text())
        assert is_alive(child)
        owner.send_signal(number)
    assert wait_until(lambda: not is_alive(parent) and not is_alive(child))


def test_a_mount_is_a_link_and_a_named_volume_a_folder(tmp_path, monkeypatch):
    data = tmp_path / "elsewhere"
    data.mkdir()
    (data / "digits").write_text("7")
    monkeypatch.setenv("FEDSIM_DATA", str(data))
    body = service("cat data/digits && touch runs/here up && sleep 60") + (
        '    volumes: ["${FEDSIM_DATA:-./data}:/app/data:ro", "runs:/app/runs"]\n'
    )
    with Deployment(compose(tmp_path, a=body), folder=tmp_path) as deployment:
        assert deployment.log("a") == "7"
        assert (tmp_path / "a" / "runs" / "here").exists()


def test_services_share_a_volume_of_one_name_and_no_other(tmp_path):
    writes = service("echo told > kept/word; touch up; sleep 60") + (
        '    volumes: ["both:/app/kept"]\n'
    )
    reads = service("cat kept/word; ls apart; touch up; sleep 60", needs="[a]") + (
        '    volumes: ["both:/app/kept:ro", "own:/app/apart"]\n'
    )
    with Deployment(compose(tmp_path, a=writes, b=reads), folder=tmp_path) as deployment:
        assert deployment.log("b") == "told\n"


def test_a_volume_in_place_of_the_working_folder_outlives_a_restart(tmp_path):
    body = service("cat here 2>/dev/null; echo before > here; touch up; sleep 60") + (
        '    volumes: ["home:/app"]\n'
    )
    with Deployment(compose(tmp_path, a=body), folder=tmp_path) as deployment:
        assert deployment.log("a") == ""
        deployment.kill("a")
        deployment.restart("a")
        assert wait_until(lambda: deployment.log("a") == "before\n")


def test_every_service_has_a_flower_home_of_its_own_and_no_flower_variable_of_ours(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FLWR_LOG_LEVEL", "CRITICAL")
    body = service("echo $FLWR_HOME/$FLWR_LOG_LEVEL/$FLWR_TELEMETRY_ENABLED; touch up; sleep 60")
    with Deployment(compose(tmp_path, a=body, b=body), folder=tmp_path) as deployment:
        assert deployment.log("a") == f"{tmp_path}/a/.flwr//0\n"
        assert deployment.log("b") == f"{tmp_path}/b/.flwr//0\n"


def test_the_log_of_an_unknown_service_is_refused_with_the_nearest_name(tmp_path):
    deployment = Deployment(ROOT / "docker-compose.yml", folder=tmp_path)
    with pytest.raises(ScenarioError, match=r"'superlnk' is not .* did you mean 'superlink'"):
        deployment.log("superlnk")


@pytest.mark.parametrize("value", [[1], {"a": 1}, None, "a\nb", "'a' \"b\"", "'a'\\"])
def test_a_run_configuration_that_flwr_cannot_read_is_refused(tmp_path, value):
    deployment = Deployment(ROOT / "docker-compose.yml", folder=tmp_path)
    with pytest.raises(ScenarioError, match="run_config key = "):
        deployment.flwr_run(tmp_path, {"key": value})


def test_a_run_outside_the_context_is_refused(tmp_path):
    deployment = Deployment(ROOT / "docker-compose.yml", folder=tmp_path)
    with pytest.raises(RunError, match="inside the with statement"):
        deployment.flwr_run(tmp_path)


# Flower's own reader is the oracle.
@settings(deadline=None)
@given(value=st.booleans() | st.integers(-(2**62), 2**62) | st.floats(-1e300, 1e300) | st.text())
@example(value='partition={kind="iid", clients=20} engine.kind=inline')
@example(value="it's")
@example(value="C:\\data")
def test_what_is_not_refused_of_a_run_configuration_arrives_unchanged(value):
    try:
        text = config_value("key", value)
    except ScenarioError:
        assert isinstance(value, str)
        return
    assert parse_config_args([f"key={text}"]) == {"key": value}
