"""Which kernels this process really computes with, as the libraries themselves say.

The settings are in `fedsim.basics.kernels`; a library that was imported before they stood keeps its
own, so promises are held to what is in use.
"""

import ctypes
import functools
import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsim.basics import kernels
from fedsim.basics.errors import ScenarioError
from fedsim.basics.kernels import Bits

_MKL_MODES = {
    1: "off", 2: "AUTO", 3: "COMPATIBLE", 4: "SSE2", 5: "SSE3", 6: "SSSE3", 7: "SSE4_1",
    8: "SSE4_2", 9: "AVX", 10: "AVX2", 11: "AVX512_MIC", 12: "AVX512", 13: "AVX512_MIC_E1",
    14: "AVX512_E1",
}  # fmt: skip
_STRICT = 0x10000
_EVERYTHING = -1  # asks MKL for its mode and its flags
_TOLD = re.compile("avx2|fma|avx_vnni|avx512.*|amx.*|asimd.*|sve.*|bf16|i8mm")  # flags that matter
_OF_PROCESSORS = ("processor", "instructions")  # what portable bits do not depend on
_NEEDED = ("avx2", "fma")
PINNED = ("aten", "mkl", "onednn", "numpy_simd", "openblas")  # what portable bits set
_WORDS = {
    "mkl": "MKL's mode", "aten": "torch's instruction set", "onednn": "oneDNN's instruction set",
    "openblas": "OpenBLAS's kernels", "numpy_simd": "NumPy's instruction sets",
}  # fmt: skip


def in_use(root: Path = Path("/")) -> dict[str, str]:
    """Return what decides the bits of this process besides versions of packages.

    Args:
        root: Where `proc` is.

    Returns:
        `processor` (vendor, family and model), `instructions` (those that kernels are chosen by),
        `aten` (torch's instruction set), `mkl` and `onednn` (version, then mode or limit),
        `numpy_simd`, `openblas` (its kernels) and `libc`.
    """
    import torch

    said = torch.__config__.show()
    return {
        **processor(root),
        **_of_aten(),
        "mkl": f"{_version(said, r'Math Kernel Library Version ([0-9.]+)')} {_mkl_mode()}",
        "onednn": f"{_version(said, r'MKL-DNN v([0-9.]+)')} {_onednn_limit()}",
        **_of_numpy(),
        "libc": " ".join(platform.libc_ver()) or "unknown",
    }


def decisive(found: Mapping[str, Any], bits: Bits) -> dict[str, Any]:
    """Return the part of what is in use that bits depend on under a promise."""
    left_out = _OF_PROCESSORS if bits == "portable" else ()
    return {name: value for name, value in found.items() if name not in left_out}


def pin_portable() -> None:
    """Pin this process to portable bits, unless its libraries have taken other kernels already.

    Then nothing is changed, and `keep` will refuse them.
    """
    if "numpy" in sys.modules and _not_portable(_of_numpy()):
        return
    before = {name: os.environ.get(name) for name in kernels.VARIABLES}
    kernels.pin("portable")
    if "torch" not in sys.modules:
        return
    # a library that is asked reads its variable if it has not yet: MKL only after torch agrees
    if _not_portable(_of_aten()) or _not_portable(in_use()):
        kernels.put(before)


def keep(bits: Bits) -> None:
    """Hold this process to a promise, before anything is computed.

    Under portable bits kernels of torch's that are not are replaced, see `portable_torch`.

    Raises:
        ScenarioError: If the promise is portable bits and cannot be kept: naming what the machine
            lacks, or each library that has other kernels, and what to do.
    """
    if bits == "fast":
        return
    asked = "[engine] bits = 'portable'"
    if lacking := why_not_portable():
        raise ScenarioError(f"{asked}: {lacking}; use bits = 'fast'")
    if others := _not_portable(in_use()):
        raise ScenarioError(
            f"{asked}: this process computes with other kernels ({'; '.join(others)}): NumPy or "
            "torch was imported before the scenario was read; use `fedsim run`, or start Python "
            f"with the environment {kernels.shown('portable')}"
        )
    from fedsim.basics.portable_torch import replace_kernels

    replace_kernels()


def why_not_portable(root: Path = Path("/")) -> str | None:
    """Say why portable bits cannot be had on this machine with this torch, or None.

    Args:
        root: Where `proc` is.
    """
    import torch

    flags = _cpuinfo(root).get("flags", "").split()
    if platform.machine() not in ("x86_64", "AMD64") or not set(_NEEDED) <= set(flags):
        return "needs an x86-64 processor with AVX2 and FMA"
    if not torch.backends.mkl.is_available():
        return "needs a torch that is built with MKL, as PyTorch's own wheels for x86-64 are"
    return None


def notes(bits: Bits) -> list[str]:
    """Return what a user should know of this process's kernels before a run, in lines."""
    import torch

    if torch.backends.mkl.is_available() and _mkl_mode() == "off":
        return [
            "MKL was used before fedsim was imported, so its reproducibility mode is off: the last "
            "bits of a client may depend on who shares its chunk; import fedsim before torch, or "
            "set MKL_CBWR=AUTO"
        ]
    if bits == "fast" and kernels.pinned() == "portable" and not kernels.stand("fast"):
        return [
            f"this process computes portable bits, as {kernels.VARIABLE} or an earlier scenario "
            "asked: those of bits = 'fast' are others"
        ]
    return []


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Say in what two processes' kernels differ, the first one's value first.

    Example:
        >>> differences({"aten": "AVX512"}, {"aten": "AVX2"})
        "torch's instruction set AVX512 and AVX2"
    """
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return "; ".join(f"{_WORDS.get(n, n)} {here.get(n)} and {there.get(n)}" for n in names)


def _not_portable(found: Mapping[str, str]) -> list[str]:
    """The kernels in use that portable bits do not allow, in words."""
    wanted = kernels.settings("portable")
    beyond = set(str(wanted["NPY_DISABLE_CPU_FEATURES"]).split())
    holds: dict[str, Callable[[str], bool]] = {
        "mkl": lambda is_so: is_so.endswith(f" {wanted['MKL_CBWR']}"),
        "aten": lambda is_so: is_so.lower() == wanted["ATEN_CPU_CAPABILITY"],
        "onednn": lambda is_so: is_so.endswith(f" up to {wanted['ONEDNN_MAX_CPU_ISA']}"),
        "openblas": lambda is_so: is_so in (wanted["OPENBLAS_CORETYPE"], "none"),
        "numpy_simd": lambda is_so: not beyond & set(is_so.split()),
    }
    return [
        f"{_WORDS[name]} is {found[name]}"
        for name, as_wanted in holds.items()
        if name in found and not as_wanted(found[name])
    ]


def processor(root: Path = Path("/")) -> dict[str, str]:
    """Return the kind of processor, and the instructions that kernels are chosen by.

    Args:
        root: Where `proc` is.
    """
    told = _cpuinfo(root)
    names = {"vendor_id": "", "cpu family": "family ", "model": "model ",
             "CPU implementer": "implementer ", "CPU part": "part "}  # fmt: skip
    words = [word + told[name] for name, word in names.items() if name in told]
    flags = (told.get("flags") or told.get("Features") or "").split()
    return {
        "processor": " ".join(words) or platform.machine(),
        "instructions": " ".join(sorted(flag for flag in flags if _TOLD.fullmatch(flag))),
    }


def _cpuinfo(root: Path) -> dict[str, str]:
    """What the system says of the first processor."""
    try:
        first = (root / "proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _mkl_mode() -> str:
    """MKL's reproducibility mode in this process; asking it makes it read its variable."""
    import torch

    if not torch.backends.mkl.is_available():
        return "none"
    for place in (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", None):
        try:
            ask = ctypes.CDLL(None if place is None else str(place)).mkl_serv_cbwr_get
        except (OSError, AttributeError):
            continue
        mode = int(ask(_EVERYTHING))
        strict = " STRICT" if mode & _STRICT else ""
        return _MKL_MODES.get(mode & ~_STRICT, str(mode)) + strict
    return os.environ.get("MKL_CBWR", "off")  # it is another build's, and cannot be asked


def _onednn_limit() -> str:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return "unlimited" if limit is None else f"up to {limit.upper()}"


def _of_aten() -> dict[str, str]:
    import torch

    return {"aten": torch.backends.cpu.get_cpu_capability()}


def _of_numpy() -> dict[str, str]:
    """Asking NumPy and OpenBLAS changes nothing: they have read their variables when imported."""
    return {"numpy_simd": " ".join(_numpy_simd()) or "none", "openblas": _openblas()}


def _numpy_simd() -> list[str]:
    """Instruction sets beyond its baseline that NumPy has kernels for and uses."""
    from numpy import __version__

    core = "numpy._core" if int(__version__.partition(".")[0]) >= 2 else "numpy.core"
    inside = importlib.import_module(f"{core}._multiarray_umath")
    return [name for name in inside.__cpu_dispatch__ if inside.__cpu_features__.get(name)]


def _openblas() -> str:
    """The kernels of every OpenBLAS that is loaded."""
    return _openblas_with(tuple(sys.modules))


@functools.lru_cache(maxsize=1)
def _openblas_with(modules: tuple[str, ...]) -> str:
    """What `_openblas` says; libraries come with modules, and to ask takes a millisecond."""
    from threadpoolctl import threadpool_info

    found = {str(each.get("architecture")) for each in threadpool_info()
             if each.get("internal_api") == "openblas"}  # fmt: skip
    return " ".join(sorted(found)) or "none"


def _version(said: str, pattern: str) -> str:
    found = re.search(pattern, said)
    return found[1] if found else "unknown"
