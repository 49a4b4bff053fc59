"""A worker that computes with other kernels is found before it has done anything."""

import pytest
from basics.processes import run

from fedsim.basics import kernels_in_use

needs_avx2 = pytest.mark.skipif(
    kernels_in_use.why_not_portable() is not None, reason="portable bits need AVX2 and MKL"
)
RUN = """
import json, tempfile, pathlib, fedsim
scenario = fedsim.load_scenario("quickstart", ["rounds=%d", "engine.workers=2", "expect={}",
    "partition.clients=8", "participation.cohort_size=4", "engine.bits=%s", "engine.kind=%s"])
from fedsim.engine import ray as engine
env, started = engine._runtime_env, []
def planted(variables):
    started.append(dict(variables))
    return env({**variables, **(%s if len(started) == 2 else {})})
engine._runtime_env = planted
with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder) / "run"
    try:
        said = fedsim.start(scenario, out=place).summary["params_sha256"]
    except fedsim.FedsimError as error:
        said = f"{type(error).__name__}: {error}"
    log = (place / "log.txt").read_text()
    chunks = (place / "chunks.jsonl").read_text() if (place / "chunks.jsonl").exists() else ""
    print(json.dumps([said, log, chunks]))
"""


@needs_avx2
def test_a_worker_started_with_other_settings_ends_a_portable_run_before_round_1():
    said, _, chunks = run(RUN % (2, "portable", "ray", {"ATEN_CPU_CAPABILITY": "default"}))
    assert said.startswith("RunError: worker 1 did not start: [engine] bits = 'portable': this ")
    assert "torch's instruction set is DEFAULT" in said
    assert chunks == ""


@needs_avx2
def test_portable_bits_are_those_of_workers_too():
    inline, *_ = run(RUN % (2, "portable", "inline", {}))
    on_ray, log, chunks = run(RUN % (2, "portable", "ray", {}))
    assert on_ray == inline
    assert "other kernels" not in log
    assert {'"worker": 0', '"worker": 1'} <= {part for line in chunks.splitlines()
                                              for part in line.strip("{}").split(", ")}  # fmt: skip


@needs_avx2
@pytest.mark.slow
def test_a_fast_run_goes_on_with_another_worker_and_says_what_that_means():
    said, log, chunks = run(RUN % (300, "fast", "ray", {"ATEN_CPU_CAPABILITY": "default"}))
    assert not said.startswith("RunError")
    assert chunks
    (line,) = [line for line in log.splitlines() if "other kernels" in line]
    assert "worker 1 on node 0" in line
    assert "(torch's instruction set AVX" in line
    assert " and DEFAULT): the last bits of the result depend on who trained what" in line
