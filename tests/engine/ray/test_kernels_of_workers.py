"""A worker that computes with other kernels is found before it has done anything."""

import pytest
from torch.backends.cpu import get_cpu_capability

from fedsim.basics import kernels, kernels_in_use
from fedsim.basics.errors import RunError
from tests.basics.processes import run
from tests.faults.worlds import small_world

needs_avx2 = pytest.mark.skipif(
    kernels_in_use.why_not_portable() is not None, reason="portable bits need AVX2 and MKL"
)
RUNS = """
import json, tempfile, pathlib, fedsim, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # before any scenario pins
env = None
def run(rounds, bits, kind, planted):
    scenario = fedsim.load_scenario("quickstart", [f"rounds={rounds}", "engine.workers=2",
        "expect={}", "partition.clients=8", "participation.cohort_size=4", f"engine.bits={bits}",
        f"engine.kind={kind}"])
    global env
    from fedsim.engine.ray import workers  # brings NumPy: a scenario pins before
    env = env or workers._runtime_env
    started = []
    def runtime_env(variables):
        started.append(dict(variables))
        return env({**variables, **(planted if len(started) == 2 else {})})
    workers._runtime_env = runtime_env
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "run"
        try:
            said = fedsim.start(scenario, out=place).summary["params_sha256"]
        except fedsim.FedsimError as error:
            said = f"{type(error).__name__}: {error}"
        chunks = place / "chunks.jsonl"
        log = (place / "log.txt").read_text()
        return [said, log, chunks.read_text() if chunks.exists() else ""]
"""
PLANTED = {"ATEN_CPU_CAPABILITY": "default"}
NOT_OURS = {"DEFAULT": "avx2"}.get(get_cpu_capability(), "default")


@pytest.fixture(scope="module")
def portable():
    """In one process: a run here, one on two workers, and one whose second worker is another."""
    runs = [(2, "portable", "inline", {}), (2, "portable", "ray", {}),
            (2, "portable", "ray", PLANTED)]  # fmt: skip
    return run(f"{RUNS}\nprint(json.dumps([run(*each) for each in {runs!r}]))")


@needs_avx2
def test_a_worker_with_other_kernels_is_refused_under_portable_bits_and_told_of_under_fast(
    ray_cluster, tmp_path, monkeypatch
):
    from fedsim.engine.ray.grid import RayGrid

    monkeypatch.setattr(kernels, "apart", lambda: {"ATEN_CPU_CAPABILITY": NOT_OURS})
    with RayGrid(small_world(tmp_path).app, 24, workers=2) as grid:
        monkeypatch.setattr(kernels, "pinned", lambda: "portable")
        refusal = rf"^worker 0 on node 0 .* and {NOT_OURS.upper()}\), and bits = 'portable'"
        with pytest.raises(RunError, match=refusal):
            all(grid.worker_pids)  # waits for both
        monkeypatch.setattr(kernels, "pinned", lambda: "fast")
        assert len(grid.worker_pids) == 2
        (told,) = grid.incidents
    assert "(torch's instruction set " in told
    assert f" and {NOT_OURS.upper()}): the last bits of the result depend on who trained" in told


@needs_avx2
@pytest.mark.slow
def test_a_worker_started_with_other_settings_ends_a_portable_run_before_round_1(portable):
    said, _, chunks = portable[2]
    assert said.startswith("RunError: worker 1 did not start: [engine] bits = 'portable': this ")
    assert "torch's instruction set is DEFAULT" in said
    assert chunks == ""


@needs_avx2
@pytest.mark.slow
def test_portable_bits_are_those_of_workers_too(portable):
    (inline, *_), (on_ray, log, chunks) = portable[:2]
    assert len(inline) == 64
    assert on_ray == inline
    assert "other kernels" not in log
    assert {'"worker": 0', '"worker": 1'} <= {part for line in chunks.splitlines()
                                              for part in line.strip("{}").split(", ")}  # fmt: skip


@needs_avx2
@pytest.mark.slow
def test_a_fast_run_goes_on_with_another_worker_and_says_what_that_means():
    said, log, chunks = run(f"{RUNS}\nprint(json.dumps(run(300, 'fast', 'ray', {PLANTED!r})))")
    assert not said.startswith("RunError")
    assert chunks
    (line,) = [line for line in log.splitlines() if "other kernels" in line]
    assert "worker 1 on node 0" in line
    assert "(torch's instruction set AVX" in line
    assert " and DEFAULT): the last bits of the result depend on who trained what" in line
