"""What decides kernels is pinned before libraries load, and what is in use is what they say."""

import json

import pytest
import torch

from fedsim.basics import kernels, kernels_in_use
from fedsim.basics.errors import ScenarioError
from tests.basics.processes import ended_process, run

SAY = "import json; from fedsim.basics.kernels_in_use import in_use, notes; "
PORTABLE = """
import json, fedsim, tempfile
scenario = fedsim.load_scenario("quickstart", ["rounds=2", "engine.kind=inline",
    "partition.clients=8", "participation.cohort_size=4", "engine.bits=portable"])
with tempfile.TemporaryDirectory() as folder:
    result = fedsim.start(scenario, out=folder + "/run")
print(json.dumps(result.summary["params_sha256"]))
"""
needs_avx2 = pytest.mark.skipif(
    kernels_in_use.why_not_portable() is not None, reason="portable bits need AVX2 and MKL"
)


def test_mkl_keeps_to_its_mode_from_the_first_product_on():
    said = run(f"import fedsim, torch; torch.ones(2, 2) @ torch.ones(2, 2); {SAY}"
               "print(json.dumps([in_use()['mkl'], notes('fast')]))")  # fmt: skip
    assert said[0].endswith(" AUTO") or said[0].endswith(" none")
    assert said[1] == []


@needs_avx2
def test_what_a_user_has_set_wins_and_is_told():
    said = run(
        f"import fedsim; {SAY} print(json.dumps(in_use()))",
        MKL_CBWR="COMPATIBLE", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="sse41",
    )  # fmt: skip
    assert said["mkl"].endswith(" COMPATIBLE")
    assert said["aten"] == "DEFAULT"
    assert said["onednn"].endswith(" up to SSE41")


@needs_avx2
def test_mkl_that_was_used_before_fedsim_was_imported_is_said_in_a_line():
    code = f"import torch; torch.ones(9, 9) @ torch.ones(9, 9); import fedsim; {SAY}"
    # asking MKL makes it read its variable: what is asked before fedsim is imported is unset
    code = code.replace("import fedsim;", "import ctypes, pathlib; "
                        "ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / 'lib' / "
                        "'libtorch_cpu.so')).mkl_serv_cbwr_get(1); import fedsim;", 1)  # fmt: skip
    said = run(f"{code} print(json.dumps([in_use()['mkl'], notes('fast')]))")
    assert said[0].endswith(" off")
    assert len(said[1]) == 1
    assert said[1][0].startswith("MKL was used before fedsim was imported")


@pytest.fixture(scope="module")
def portable_bits():
    return run(PORTABLE)


# each stands for another processor, or for another user's environment
@needs_avx2
@pytest.mark.parametrize(
    "others",
    [
        pytest.param(
            {"MKL_CBWR": "AVX2", "NPY_ENABLE_CPU_FEATURES": "X86_V3"}, marks=pytest.mark.slow
        ),
        {
            "MKL_CBWR": "SSE4_2", "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Prescott",
        },
    ],
    ids=["avx2", "sse"],
)  # fmt: skip
def test_portable_bits_do_not_depend_on_what_a_processor_would_choose(portable_bits, others):
    assert run(PORTABLE, **others) == portable_bits


@needs_avx2
def test_portable_bits_are_refused_where_libraries_have_taken_other_kernels():
    ended = ended_process(
        f"import torch; torch.ones(3) + 1\n{PORTABLE}", ATEN_CPU_CAPABILITY="default"
    )
    assert ended.returncode == 1
    refusal = ended.stderr.splitlines()[-1]
    assert "[engine] bits = 'portable': this process computes with other kernels (" in refusal
    assert "torch's instruction set is DEFAULT" in refusal
    assert "MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" in refusal


@needs_avx2
@pytest.mark.parametrize(
    ("before", "variables"),
    [
        ("numpy", {"OPENBLAS_CORETYPE": "Prescott"}),
        (
            "torch; torch.ones(3) + 1",
            kernels.settings("portable")
            | {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AUTO", kernels._NUMPY_ONLY: ""},
        ),
    ],
    ids=["NumPy", "torch"],
)
def test_a_process_that_cannot_be_pinned_stays_as_it_was(before, variables):
    load = 'fedsim.load_scenario("quickstart", ["engine.bits=portable"])'
    said = run(f"import fedsim, {before}; {SAY} from fedsim.basics.kernels import apart; "
               f"there = apart(); {load}; print(json.dumps([apart() == there, in_use()]))",
               **variables)  # fmt: skip
    assert said[0]
    assert said[1]["mkl"].endswith(" AUTO")
    assert kernels_in_use._not_portable(said[1])


@pytest.mark.slow
@needs_avx2
def test_the_environment_of_a_refusal_is_one_that_works(portable_bits):
    wanted = {k: v for k, v in kernels.settings("portable").items() if v is not None}
    assert run(f"import numpy, torch\n{PORTABLE}", **wanted) == portable_bits


def test_a_promise_may_be_asked_for_before_anything_is_imported():
    asked = "import json, fedsim; from fedsim.basics.kernels import pinned"
    assert run(f"{asked}; print(json.dumps(pinned()))", FEDSIM_BITS="portable") == "portable"
    assert run(f"{asked}; print(json.dumps(pinned()))") == "fast"


def test_an_impossible_promise_is_refused():
    ended = ended_process("import fedsim", FEDSIM_BITS="portabel")
    assert "FEDSIM_BITS = 'portabel': choose from fast, portable" in ended.stderr


def test_a_processor_without_avx2_cannot_have_portable_bits(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("vendor_id\t: Old\nflags\t\t: sse2 avx fma\n")
    reason = "needs an x86-64 processor with AVX2 and FMA"
    assert kernels_in_use.why_not_portable(tmp_path) == reason
    monkeypatch.setattr(kernels_in_use, "why_not_portable", lambda: reason)
    with pytest.raises(ScenarioError, match=f"'portable': {reason}; use bits = 'fast'"):
        kernels_in_use.keep("portable")


def test_the_kind_of_processor_is_what_the_system_says(tmp_path):
    (tmp_path / "proc").mkdir()
    told = (
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
        "model name\t: Somebody's\nflags\t\t: fpu sse2 avx2 fma avx512f amx_tile ssse3\n\n"
        "processor\t: 1\nvendor_id\t: Other\n"
    )
    (tmp_path / "proc/cpuinfo").write_text(told)
    found = kernels_in_use.in_use(tmp_path)
    assert found["processor"] == "GenuineIntel family 6 model 143"
    assert found["instructions"] == "amx_tile avx2 avx512f fma"
    assert kernels_in_use.decisive(found, "fast") == found
    assert found.keys() - kernels_in_use.decisive(found, "portable") == {
        "processor", "instructions",
    }  # fmt: skip


def test_a_child_keeps_its_own_promise():
    portable = kernels.environment("portable")
    assert portable["MKL_CBWR"] == "COMPATIBLE"
    assert portable["PATH"]
    fast = kernels.environment("fast")
    assert fast["MKL_CBWR"] == (kernels._GIVEN["MKL_CBWR"] or "AUTO")
    assert fast.get("OPENBLAS_CORETYPE") == kernels._GIVEN["OPENBLAS_CORETYPE"]


def test_what_is_in_use_can_be_written_down():
    found = kernels_in_use.in_use()
    assert json.loads(json.dumps(found)) == found
    assert all(isinstance(value, str) and value for name, value in found.items()
               if name != "instructions")  # fmt: skip
    assert found["aten"] == torch.backends.cpu.get_cpu_capability()
