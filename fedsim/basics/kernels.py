"""Which kernels NumPy and torch compute with: settings that must stand before they are imported.

The same product of matrices has other last bits in other kernels, and a library picks its kernels
by the processor and, unless it is told otherwise, by where numbers lie in memory. There are two
promises about bits:

- `"fast"`: the same on one kind of machine. MKL's reproducibility mode is on, so that a client's
  bits never depend on who shares its chunk; it costs nothing that can be measured. Each library
  takes the best kernels that the processor has.
- `"portable"`: the same on every x86-64 processor with AVX2 and FMA, whatever its maker. Each
  library is held to kernels that all of them have.

Variables of the environment that a user has set win under `"fast"`, and are recorded;
`"portable"` needs them all. Nothing heavy is imported here.
"""

import functools
import os
from collections.abc import Mapping
from typing import Literal, get_args

Bits = Literal["fast", "portable"]

VARIABLE = "FEDSIM_BITS"  # what a process is pinned to when fedsim is imported

_PORTABLE = {
    "MKL_CBWR": "COMPATIBLE",  # torch's products and decompositions
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own loops
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "OPENBLAS_CORETYPE": "Haswell",  # products in NumPy and SciPy
}
_NUMPY = "NPY_DISABLE_CPU_FEATURES"
_NUMPY_ONLY = "NPY_ENABLE_CPU_FEATURES"  # NumPy refuses to start with both
_BEYOND_AVX2 = "X86_V4 AVX512_ICL AVX512_SPR"  # of NumPy 2.4 and later
_BEYOND_AVX2_BEFORE = (
    "AVX512F AVX512CD AVX512_KNL AVX512_KNM AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
)

VARIABLES = (*_PORTABLE, _NUMPY, _NUMPY_ONLY)
_GIVEN = {name: os.environ.get(name) for name in VARIABLES}  # by the user, before any pinning


def settings(bits: Bits) -> dict[str, str | None]:
    """Return what the variables must be for a promise; None is unset.

    Example:
        >>> settings("portable")["ONEDNN_MAX_CPU_ISA"]
        'AVX2'
    """
    if bits == "fast":
        return {**_GIVEN, "MKL_CBWR": _GIVEN["MKL_CBWR"] or "AUTO"}
    return {**_PORTABLE, _NUMPY: _numpy_features(), _NUMPY_ONLY: None}


def environment(bits: Bits) -> dict[str, str]:
    """Return the environment of a process that keeps a promise, whatever this one keeps."""
    wanted = settings(bits)
    kept = {name: value for name, value in os.environ.items() if name not in wanted}
    return kept | {name: value for name, value in wanted.items() if value is not None}


def pin(bits: Bits) -> None:
    """Set this process's variables.

    What NumPy and torch have read before stays as it is, so what is in use must be asked of them:
    see `fedsim.basics.kernels_in_use`. Torch reads its own at its first operation.
    """
    put(settings(bits))


def put(values: Mapping[str, str | None]) -> None:
    """Set variables of this process; None unsets one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pin_as_asked() -> None:
    """Pin this process to what the environment asks for, "fast" unless it says otherwise.

    Raises:
        ValueError: If it asks for what there is not.
    """
    asked = os.environ.get(VARIABLE) or "fast"
    if asked not in get_args(Bits):
        raise ValueError(f"{VARIABLE} = {asked!r}: choose from {', '.join(get_args(Bits))}")
    pin("portable" if asked == "portable" else "fast")


def pinned() -> Bits:
    """Return which promise this process's variables make."""
    return "portable" if stand("portable") else "fast"


def stand(bits: Bits) -> bool:
    """Tell whether this process's variables are those of a promise; a user's may be of both."""
    return all(os.environ.get(name) == value for name, value in settings(bits).items())


def apart() -> dict[str, str]:
    """Return this process's variables, without those that importing fedsim sets by itself."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {n: value for n, value in found.items() if (n, value) != ("MKL_CBWR", "AUTO")}


def shown(bits: Bits) -> str:
    """Return a promise's variables as a shell takes them."""
    return " ".join(
        f"{name}={value!r}" if " " in value else f"{name}={value}"
        for name, value in settings(bits).items()
        if value is not None
    )


@functools.cache
def _numpy_features() -> str:
    """NumPy's names of what lies beyond AVX2; it warns of names that it does not know."""
    from importlib import metadata  # for its weight: every start comes by here

    major, minor = (int(part) for part in metadata.version("numpy").split(".")[:2])
    if (major, minor) >= (2, 4):
        return _BEYOND_AVX2
    return _BEYOND_AVX2_BEFORE + (" AVX512_SPR" if major >= 2 else "")
