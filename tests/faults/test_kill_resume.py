"""Runs killed with SIGKILL and resumed end with the undisturbed run's bits (law 2)."""

import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from fedsim.basics import rng
from fedsim.basics.json_files import JsonLines, read_json
from fedsim.runs.observed import ObservedRun
from tests.faults.killer import COMMAND

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 7
SCENARIO = f"""
seed = 3
rounds = {ROUNDS}

[task]
model = "logistic"

[data]
name = "synthetic"
dimension = 6
classes = 3
max_samples = 20
test_clients = 5

[partition]
kind = "natural"
clients = 30
test_fraction = 0.3

[participation]
kind = "uniform"
cohort_size = 6

[client]
local_lr = 0.05
momentum = 0.9
keep_optimizer = true

[engine]
kind = "inline"
chunk_size = 4

[evaluation]
clients = 5
every = 2

[checkpoint]
every = 2
keep = 2
"""
LONG = (f"rounds={20 * ROUNDS}", "checkpoint.every=1")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kill.toml").write_text(SCENARIO)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(killer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "kill.toml").write_text(SCENARIO)
    code, output = killer.run(folder, "run", "kill.toml", "--out", "run", "--quiet")
    assert code == 0, output
    return _outcome(folder / "run")


def _outcome(run: Path) -> dict[str, object]:
    """All of a finished run that must not depend on whether it was ever interrupted."""
    summary = read_json(run / "summary.json")
    metrics = JsonLines.read(run / "metrics.jsonl")
    return {
        "params_sha256": summary["params_sha256"],
        "params.safetensors": (run / "params.safetensors").read_bytes(),
        "participation_sha256": summary["participation_sha256"],
        "participation": JsonLines.read(run / "participation.jsonl"),
        "final": summary["final"],
        "rounds": summary["rounds"],
        "metrics": [
            {name: value for name, value in record.items() if not name.startswith("time/")}
            for record in metrics
        ],
    }


def _check(run: Path, undisturbed: dict[str, object], rounds: int = ROUNDS) -> None:
    found = _outcome(run)
    recorded = [record["round"] for record in JsonLines.read(run / "metrics.jsonl")]
    assert recorded == list(range(rounds + 1))
    took_part = [record["round"] for record in JsonLines.read(run / "participation.jsonl")]
    assert took_part == list(range(1, rounds + 1))
    assert found == undisturbed
    assert not list(run.glob("checkpoints/*.tmp"))


@pytest.mark.parametrize(
    ("point", "turn", "state"),
    [("clients train", 8, "interrupted"), ("the run folder is there", 1, "starting")],
)
def test_a_killed_run_is_told_so_to_who_looks_on_until_it_goes_on(
    point, turn, state, killer, folder
):
    code, output = killer.run(
        folder, "run", "kill.toml", "--out", "run", "--quiet", point=point, turn=turn
    )
    assert code == -signal.SIGKILL, output
    run = ObservedRun(folder / "run")
    run.look()
    assert run.state == state
    assert killer.run(folder, "resume", "run", "--quiet")[0] == 0
    run.look()
    anew = ObservedRun(folder / "run")
    anew.look()
    assert (run.state, run.last_round) == ("completed", ROUNDS)
    assert (run.replies, run.traffic) == (anew.replies, anew.traffic)


# (where, at which time it is reached): which rounds these fall into follows from `SCENARIO`
POINTS = [
    ("the run folder is there", 1),
    ("clients train", 1),
    ("clients train", 8),
    ("replies are aggregated", 4),
    ("the model is evaluated", 3),
    ("clients evaluate", 3),
    ("half a line of metrics is written", 5),
    ("metrics are written", 1),
    ("metrics are written", 5),
    ("metrics are written", 8),
    ("a checkpoint is half written", 1),
    ("a checkpoint is half written", 3),
    ("a checkpoint is written and not renamed", 1),
    ("a checkpoint is written and not renamed", 2),
    ("a checkpoint is written and not renamed", 5),
    ("a checkpoint is renamed", 3),
    ("an old checkpoint is removed", 1),
    ("the final model is written", 1),
    ("the summary is written", 1),
]


@pytest.mark.parametrize(("point", "turn"), POINTS)
def test_a_run_killed_when(killer, folder, undisturbed, point, turn):
    arguments = ("run", "kill.toml", "--out", "run", "--quiet")
    code, output = killer.run(folder, *arguments, point=point, turn=turn)
    assert code == -signal.SIGKILL, output
    assert not (folder / "run" / "summary.json").exists()
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    _check(folder / "run", undisturbed)


def test_a_run_killed_at_every_resumption_ends_like_the_undisturbed_one(
    killer, folder, undisturbed
):
    code, _ = killer.run(
        folder, "run", "kill.toml", "--out", "run", "--quiet", point="clients train", turn=2
    )
    assert code == -signal.SIGKILL
    for point, turn in [
        ("replies are aggregated", 2),
        ("a checkpoint is renamed", 1),
        ("replies are aggregated", 1),
        ("half a line of metrics is written", 2),
        ("the model is evaluated", 1),
        ("a checkpoint is written and not renamed", 2),
        ("the summary is written", 1),
    ]:
        code, output = killer.run(folder, "resume", "run", "--quiet", point=point, turn=turn)
        assert code == -signal.SIGKILL, output
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    _check(folder / "run", undisturbed)


@pytest.mark.parametrize("point", ["the data are prepared", "the run folder is being made"])
def test_a_run_killed_before_its_folder_is_there_is_simply_started(
    killer, folder, undisturbed, point
):
    arguments = ("run", "kill.toml", "--out", "run", "--quiet")
    code, _ = killer.run(folder, *arguments, point=point)
    assert code == -signal.SIGKILL
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 2
    assert "run: there is no such run folder" in output
    code, output = killer.run(folder, *arguments)
    assert code == 0, output
    _check(folder / "run", undisturbed)


def test_resuming_a_finished_run_changes_nothing(killer, folder, undisturbed):
    killer.run(folder, "run", "kill.toml", "--out", "run", "--quiet")
    before = {p: p.read_bytes() for p in (folder / "run").glob("*.jsonl")}
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    assert {p: p.read_bytes() for p in (folder / "run").glob("*.jsonl")} == before
    _check(folder / "run", undisturbed)


def test_a_run_that_stopped_early_is_resumed_without_another_round(killer, folder):
    sets = ("--set", "evaluation.stop={metric='test/loss', mode='min', target=100.0}")
    arguments = ("run", "kill.toml", "--out", "run", "--quiet", *sets)
    code, _ = killer.run(folder, *arguments, point="the summary is written")
    assert code == -signal.SIGKILL
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
    assert "reached the target" in read_json(folder / "run" / "summary.json")["stopped"]


def test_a_killed_run_is_refused_another_seed_and_goes_on_without_it(killer, folder, undisturbed):
    killer.run(folder, "run", "kill.toml", "--out", "run", "--quiet", point="clients train", turn=8)
    code, output = killer.run(folder, "resume", "run", "--quiet", "--set", "seed=4")
    assert code == 2
    assert "--set seed=4 would change the result" in output
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    _check(folder / "run", undisturbed)


@pytest.mark.parametrize("rule", ["on_failure=stop", "min_replies=30"])
def test_a_run_that_may_not_fail_ends_with_exit_code_1_naming_who_did_and_goes_on_later(
    killer, folder, rule
):
    arguments = ("run", "kill.toml", "--out", "run", "--quiet", "--set", f"engine.{rule}")
    everybody = ("--set", "participation={kind='full'}", "--set", "evaluation.clients=0")
    code, output = killer.run(folder, *arguments, *everybody, point="a client raises", turn=4)
    assert code == 1
    assert "client 4, round 1: raised: OSError: its flash memory is worn out" in output
    assert f"`fedsim resume {folder / 'run'}` goes on from the last checkpoint" in output
    assert "client 4, round 1: raised: OSError" in (folder / "run" / "log.txt").read_text()
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    rounds = [record["round"] for record in JsonLines.read(folder / "run" / "metrics.jsonl")]
    assert rounds == list(range(ROUNDS + 1))


def test_a_run_that_is_asked_to_end_says_how_to_go_on(killer, folder, undisturbed):
    arguments = ("run", "kill.toml", "--out", "run", "--quiet")
    code, output = killer.run(folder, *arguments, point="it is asked to end", turn=8)
    assert code == 143, output
    assert output.splitlines() == [
        "fedsim: terminated",
        f"fedsim: `fedsim resume {folder / 'run'}` goes on from the last checkpoint",
    ]
    assert "interrupted" in (folder / "run" / "log.txt").read_text()
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 0, output
    _check(folder / "run", undisturbed)


def test_how_to_go_on_is_not_said_where_it_would_not_help(killer, folder):
    arguments = ("run", "kill.toml", "--out", "run", "--quiet")
    killer.run(folder, *arguments, point="clients train", turn=8)
    kept = (folder / "run" / "checkpoints").iterdir()
    newest = max(each for each in kept if each.suffix != ".tmp")
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-50])
    code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 1
    assert f"{newest.name}: is torn or not a checkpoint" in output
    assert "goes on from the last checkpoint" not in output
    newest.write_bytes(whole)
    with (folder / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = killer.run(folder, "resume", "run", "--quiet")
    assert code == 1
    assert "this run is still going on in another process" in output
    assert "goes on from the last checkpoint" not in output


# Real processes, from the start of the interpreter on, killed by others at random times.


def _start(folder: Path, *arguments: str, token: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--quiet"],
            cwd=folder,
            # a cluster of its own, whatever else stands on this machine
            env={**environment, "FEDSIM_TEST_TOKEN": token, "RAY_ADDRESS": "local"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _processes_of(token: str) -> list[str]:
    """The processes that inherited a token from the one that was given it."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            environment = (process / "environ").read_bytes()
            name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"FEDSIM_TEST_TOKEN={token}".encode() in environment and state not in "ZX":
            found.append(f"{process.name}: {name}")
    return found


def _left_after(token: str, timeout_s: float) -> list[str]:
    until = time.monotonic() + timeout_s
    while (left := _processes_of(token)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


@pytest.fixture(scope="module")
def long_undisturbed(killer, tmp_path_factory):
    """The undisturbed run of many rounds, and how long its process took."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "kill.toml").write_text(SCENARIO)
    begun = time.monotonic()
    sets = [word for assignment in LONG for word in ("--set", assignment)]
    process = _start(folder, "run", "kill.toml", "--out", "run", *sets, token="undisturbed")
    assert process.wait() == 0, (folder / "output.txt").read_text()
    return _outcome(folder / "run"), time.monotonic() - begun


def _kill_at_random(folder, engine, number, span_s):
    """Start a run, kill it at a time drawn from its number; returns whether it had a folder."""
    token = uuid.uuid4().hex
    sets = [word for assignment in LONG for word in ("--set", assignment)]
    arguments = ("--set", f"engine.kind={engine}", "--workers", "2")
    process = _start(folder, "run", "kill.toml", "--out", "run", *sets, *arguments, token=token)
    time.sleep(span_s * float(rng.generator(0, "kill", number).random()))
    process.kill()
    code = process.wait()
    assert code in (-signal.SIGKILL, 0)
    assert _left_after(token, 30) == []
    return (folder / "run").exists()


def _finish(folder, had_folder, engine):
    token = uuid.uuid4().hex
    sets = [word for assignment in LONG for word in ("--set", assignment)]
    again = ("resume", "run") if had_folder else ("run", "kill.toml", "--out", "run", *sets)
    arguments = ("--set", f"engine.kind={engine}", "--workers", "2")
    process = _start(folder, *again, *arguments, token=token)
    assert process.wait() == 0, (folder / "output.txt").read_text()
    assert _left_after(token, 30) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_a_random_time_is_resumed_to_the_same_bits(
    folder, long_undisturbed, number
):
    expected, seconds = long_undisturbed
    engine = "ray" if number % 3 == 0 else "inline"
    # Ray takes longer to start; a kill at the end of the span falls late into the run
    had_folder = _kill_at_random(folder, engine, number, seconds * (3 if engine == "ray" else 1))
    _finish(folder, had_folder, engine)
    _check(folder / "run", expected, 20 * ROUNDS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "started", ["gcs_server", "raylet/raylet", "dashboard/agent.py", "_WorkerProcess"]
)
def test_a_run_killed_while_ray_starts_leaves_no_process(folder, started):
    token = uuid.uuid4().hex
    sets = [word for assignment in LONG for word in ("--set", assignment)]
    arguments = ("--set", "engine.kind=ray", "--workers", "2")
    process = _start(folder, "run", "kill.toml", "--out", "run", *sets, *arguments, token=token)
    while not any(started in name for name in _processes_of(token)):
        assert process.poll() is None, (folder / "output.txt").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert _left_after(token, 30) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_ray_that_is_asked_to_end_says_how_to_go_on_and_leaves_no_process(folder):
    token = uuid.uuid4().hex
    sets = ("--set", "rounds=100000", "--set", "engine.kind=ray", "--workers", "1")
    process = _start(folder, "run", "kill.toml", "--out", "run", *sets, token=token)
    until = time.monotonic() + 120
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert (folder / "output.txt").read_text().splitlines() == [
        "fedsim: terminated",
        f"fedsim: `fedsim resume {folder / 'run'}` goes on from the last checkpoint",
    ]
    assert _left_after(token, 30) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_on_ray_may_be_finished_inline(folder, long_undisturbed):
    expected, seconds = long_undisturbed
    had_folder = _kill_at_random(folder, "ray", 100, 4 * seconds)
    _finish(folder, had_folder, "inline")
    _check(folder / "run", expected, 20 * ROUNDS)
