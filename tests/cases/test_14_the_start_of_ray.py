"""What goes wrong while Ray starts is said as fedsim says things, and ends as fedsim ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fedsim.basics.errors import RunError
from fedsim.cli.doctor import machine
from fedsim.engine.ray import cluster
from fedsim.engine.ray.place import make_folder, place
from tests.cases.own_projects import project

ROOT = Path(__file__).resolve().parents[2]
LONG = "a_folder_of_a_job_of_some_batch_system_with_a_name_that_says_everything"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A function that sets TMPDIR, or another variable, to a new folder below a short one."""

    def set_to(name, variable="TMPDIR"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        monkeypatch.setenv(variable, str(folder))
        return folder

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return set_to


@pytest.mark.parametrize(
    ("name", "why"), [(LONG, "is too long for Ray's sockets"), ("größe", "has letters that Ray")]
)
def test_ray_gets_a_short_folder_where_temporary_files_are_far_and_doctor_says_so(
    temporary, name, why
):
    folder = temporary(name)
    found = place()
    assert found.why_not.startswith(f"TMPDIR = '{folder}' {why}")
    made = make_folder()
    assert len(made) <= 43
    Path(made).rmdir()
    said = machine.sockets()
    assert said.state == "note"
    assert why in said.found


def test_a_short_folder_is_left_to_ray(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert make_folder() is None
    assert machine.sockets().state == "ok"


def test_the_users_own_folder_for_ray_is_named_when_it_will_not_do(temporary):
    temporary(LONG, "RAY_TMPDIR")
    with pytest.raises(RunError, match=r"RAY_TMPDIR = '.*' is too long .*set it to a short folder"):
        make_folder()
    assert machine.sockets().state == "failed"


def test_without_any_short_folder_the_variable_to_set_is_named(temporary, monkeypatch):
    temporary(LONG)
    monkeypatch.setattr("fedsim.engine.ray.place._SHORT", ("/proc/1/none",))
    with pytest.raises(RunError, match="set TMPDIR or RAY_TMPDIR to a short folder"):
        make_folder()
    assert machine.sockets().remedy == (
        "set TMPDIR or RAY_TMPDIR to a short folder that can be written"
    )


@pytest.mark.parametrize(
    "error", [OSError(2, "no such folder"), ValueError("what\n\x1b[31mlast\x1b[0m"), TimeoutError()]
)
def test_every_error_of_rays_start_is_said_in_one_line_with_a_remedy(monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster, "_standing_cluster", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match="Ray could not be started: ") as raised:
        cluster._start_ray(None, None, {"num_cpus": 1.0}, None)
    words = str(raised.value)
    assert words.endswith("try [engine] kind = 'inline'")
    assert "\n" not in words
    assert "\x1b" not in words


def test_a_folder_made_for_ray_goes_when_it_does_not_start(temporary, monkeypatch):
    temporary(LONG)
    seen = []

    def init(**arguments):
        seen.append(Path(arguments["_temp_dir"]))
        assert seen[0].is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster, "_standing_cluster", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(KeyboardInterrupt):
        cluster._start_ray(None, None, {"num_cpus": 1.0}, None)
    assert not seen[0].exists()


def test_the_way_to_end_on_sigterm_stands_while_ray_starts_and_rays_own_afterwards(monkeypatch):
    def ours(*_):
        raise KeyError("asked to end")

    utils = cluster.ray._private.utils
    rays = utils.set_sigterm_handler

    def starting():
        with cluster._own_handler():
            utils.set_sigterm_handler(lambda *_: sys.exit(15))  # as `ray.init` does
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(KeyError, match="asked to end"):
            starting()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert utils.set_sigterm_handler is rays


def environment(folder, **more):
    return {
        "PATH": os.defpath, "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1",
        **more,
    }  # fmt: skip


@pytest.mark.slow
def test_runs_from_several_threads_work_whatever_of_the_first_is_collected_late(tmp_path):
    project(tmp_path, engine="ray", rounds=2)
    script = """
        import gc, json, threading
        import fedsim
        import ray
        from fedsim.engine.ray.grid import RayGrid

        held, found = [], []
        put = ray.put

        def putting(value):
            reference = put(value)
            held.clear()  # the last moment at which what is left of the first session may go
            gc.collect()
            return reference

        ray.put = putting
        begin = RayGrid.__init__

        def beginning(self, *arguments, **named):
            begin(self, *arguments, **named)
            held.append(self)

        RayGrid.__init__ = beginning

        def run(number):
            scenario = fedsim.load_scenario("scenario.toml")
            result = fedsim.start(scenario, out=f"run{number}", workers=1)
            found.append(result.summary["params_sha256"])

        for number in range(3):
            thread = threading.Thread(target=run, args=(number,))
            thread.start()
            thread.join()
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, check=False, capture_output=True, text=True, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3, done.stderr
    assert len(set(found)) == 1


@pytest.mark.slow
def test_two_runs_at_a_time_share_one_session_which_the_last_one_ends(tmp_path):
    project(tmp_path, engine="ray")
    script = """
        import json, threading
        import fedsim
        found = {}

        def run(rounds):
            scenario = fedsim.load_scenario("scenario.toml", [f"rounds={rounds}"])
            result = fedsim.start(scenario, out=f"run{rounds}", workers=1)
            found[rounds] = result.summary["rounds"]

        threads = [threading.Thread(target=run, args=(rounds,)) for rounds in (2, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        import ray
        print(json.dumps([found[2], found[200], ray.is_initialized()]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, check=False, capture_output=True, text=True, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 200, False]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_an_interrupt_that_a_library_raises_in_place_of_ours_is_told_by_its_signal(
    number, code, said, tmp_path
):
    script = """
        import os, sys, time
        import typer
        from fedsim.cli.app import finish

        def as_ray_does():
            try:
                os.kill(os.getpid(), int(sys.argv[1]))
                time.sleep(5)
            except BaseException:
                pass
            raise KeyboardInterrupt

        try:
            finish(as_ray_does, as_json=False)
        except typer.Exit as ended:
            sys.exit(ended.exit_code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(int(number))],
        cwd=tmp_path, check=False, capture_output=True, text=True, env=environment(tmp_path),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, f"fedsim: {said}\n")


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 1.0, 2.0, 4.0, 8.0])
def test_sigterm_at_any_moment_of_the_start_ends_with_143_and_says_how_to_go_on(tmp_path, after_s):
    project(tmp_path, engine="ray", rounds=100_000)
    asked = [sys.executable, "-m", "fedsim", "run", "scenario.toml", "--out", "run", "--quiet"]
    process = subprocess.Popen(
        [*asked, "--workers", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=environment(tmp_path),
    )  # fmt: skip
    while not (tmp_path / "run" / "scenario.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(after_s)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    command = f"`fedsim resume {tmp_path / 'run'}` goes on from the last checkpoint"
    assert said.splitlines()[-2:] == ["fedsim: terminated", f"fedsim: {command}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [LONG, "größe"])
def test_a_run_where_temporary_files_are_far_trains_and_leaves_no_folder(tmp_path, name):
    project(tmp_path, engine="ray", rounds=2)
    (tmp_path / name).mkdir()
    before = set(Path("/tmp").glob("fedsim-ray-*"))
    asked = [sys.executable, "-m", "fedsim", "run", "scenario.toml", "--out", "run", "--quiet"]
    done = subprocess.run(
        [*asked, "--workers", "1"], cwd=tmp_path, check=False, capture_output=True, text=True,
        env=environment(tmp_path, TMPDIR=str(tmp_path / name)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(Path("/tmp").glob("fedsim-ray-*")) <= before


def test_a_fork_of_a_process_that_has_used_ray_is_told_so(monkeypatch):
    session = cluster.RaySession()
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_start_ray", lambda *_: (False, None))
    session.forked()  # before any use: as any other process
    session.enter(None, 1, {}, None)
    session.forked()
    with pytest.raises(RunError, match=r"fork of one that has used Ray.*'inline'.*'spawn'"):
        session.enter(None, 1, {}, None)


@pytest.mark.slow
def test_a_forked_process_ends_at_once_with_ray_and_runs_without(tmp_path):
    project(tmp_path, engine="ray")
    script = """
        import os, signal
        import fedsim
        fedsim.start(fedsim.load_scenario("scenario.toml"), out="first", workers=1)
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                fedsim.start(fedsim.load_scenario("scenario.toml"), out="second", workers=1)
            except fedsim.basics.errors.RunError as error:
                print(error, flush=True)
            inline = fedsim.load_scenario("scenario.toml", ["engine.kind=inline"])
            fedsim.start(inline, out="third")
            os._exit(0)
        print(os.waitpid(child, 0)[1], os.path.exists("third/summary.json"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, check=False, capture_output=True, text=True, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-2].startswith("this process is a fork of one that has used Ray")
    assert said[-1] == "0 True"
