"""Runs the tests as other processors would: `python -m tests.processors [arguments of pytest]`.

Each setting makes libraries take the kernels that they would take elsewhere. What is measured on
one processor and promised on all must hold under each; then tests marked `processors` run, among
them those under an emulated processor of another maker, where `qemu-x86_64` is installed.
"""

import os
import subprocess
import sys
import time

from fedsim.basics.kernels import VARIABLE, VARIABLES, settings
from fedsim.basics.kernels_in_use import in_use

OLD = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def processors() -> dict[str, dict[str, str]]:
    """What stands for which processor."""
    portable = {name: value for name, value in settings("portable").items() if value is not None}
    sets = in_use()["numpy_simd"]
    no_more = {} if sets == "none" else {"NPY_DISABLE_CPU_FEATURES": sets}
    return {
        "this one": {},
        "AVX2 of Intel's": {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
                            "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
        "AVX2 of anybody's": portable,
        "before AVX": {**OLD, "OPENBLAS_CORETYPE": "Prescott", **no_more},
    }  # fmt: skip


def main() -> int:
    """Run the tests under every setting; returns the worst exit code."""
    unpinned = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, VARIABLE)}
    arguments = sys.argv[1:]
    ended = []
    for name, variables in processors().items():
        said = " ".join(f"{key}={value!r}" for key, value in variables.items()) or "nothing set"
        print(f"\n=== {name}: {said}", flush=True)
        begun = time.monotonic()
        code = subprocess.call(
            [sys.executable, "-m", "pytest", *arguments], env={**unpinned, **variables}
        )
        ended.append((name, code, time.monotonic() - begun))
    print("\n=== tests marked `processors`", flush=True)
    begun = time.monotonic()
    marked = [sys.executable, "-m", "pytest", "-m", "processors", "tests/processors", "-rs"]
    ended.append(("marked", subprocess.call(marked, env=unpinned), time.monotonic() - begun))
    for name, code, seconds in ended:
        print(f"{'passed' if code == 0 else f'FAILED ({code})':12} {seconds:6.0f} s  {name}")
    return max(code for _, code, _ in ended)


if __name__ == "__main__":
    sys.exit(main())
