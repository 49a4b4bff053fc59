"""Portable bits on a processor of another maker, emulated down to its approximate reciprocals.

`qemu-x86_64` tells libraries that they run on the processor that it is told to be, so that MKL and
oneDNN take the kernels of its maker, and it rounds approximate reciprocals as no maker does.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.basics import kernels, kernels_in_use
from fedsim.studies.golden.recording import place_of, read
from fedsim.studies.golden.selection import tier_of

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = shutil.which("qemu-x86_64")
MAKERS = {"Intel": "Haswell-noTSX", "AMD": "EPYC"}
SCENARIOS = [f for f in sorted((ROOT / "scenarios").glob("*.toml")) if tier_of(f) == "fast"]
OPERATIONS = "import runpy; runpy.run_module('tests.processors.operations', run_name='__main__')"
MODELS = """
import json, sys, tempfile, fedsim
for file in sys.argv[1:]:
    scenario = fedsim.load_scenario(file, ["engine.kind=inline", "engine.bits=portable"])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([file, fedsim.start(scenario, out=folder + "/run").summary]), flush=True)
"""

pytestmark = [
    pytest.mark.processors,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-x86_64 here: apt-get install qemu-user"),
    pytest.mark.skipif(
        kernels_in_use.why_not_portable() is not None, reason="portable bits need AVX2 and MKL"
    ),
]


def run(code, *arguments, maker=None, bits="portable", to_its_end=True):
    """What code prints, run here or on an emulated processor."""
    emulated = [] if maker is None else [str(EMULATOR), "-cpu", MAKERS[maker]]
    ended = subprocess.run(
        [*emulated, sys.executable, "-c", code, *arguments],
        env={**kernels.environment(bits), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0 or not to_its_end, ended.stderr[-3000:]
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def here():
    return run(OPERATIONS, "portable")


@pytest.mark.parametrize("maker", MAKERS)
def test_every_operation_has_the_same_bits(here, maker):
    there = run(OPERATIONS, "portable", maker=maker)
    assert len(there) == len(here) > 500
    assert [pair for pair in zip(here, there, strict=True) if pair[0] != pair[1]] == []


def test_an_emulated_processor_is_another_one():
    # else the test above would say nothing; unpinned, oneDNN may crash in the emulator, and how
    # many operations differ depends on the processor below
    here = run(OPERATIONS, bits="fast")
    there = run(OPERATIONS, maker="Intel", bits="fast", to_its_end=False)
    assert sum(one != other for one, other in zip(here, there, strict=False)) > 10


@pytest.fixture(scope="module")
def emulated():
    lines = run(MODELS, *(str(file) for file in SCENARIOS), maker="Intel")
    return {Path(file).stem: summary for file, summary in map(json.loads, lines)}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda file: file.stem)
def test_every_scenario_has_its_recorded_bits(emulated, scenario):
    recorded = read(place_of(scenario))
    for name in ("params_sha256", "partition_sha256", "participation_sha256"):
        assert emulated[scenario.stem][name] == getattr(recorded, name), name
