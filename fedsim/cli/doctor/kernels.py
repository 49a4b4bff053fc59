"""Which kernels compute on this machine, and which promises about bits hold here."""

from collections.abc import Mapping
from typing import Any

from fedsim.cli.doctor.finding import Finding


def look(facts: Mapping[str, Any] | None) -> Finding:
    """Say what a run computes with, and whether its bits can be portable.

    Args:
        facts: What torch said of itself when it was imported: `kernels` and `not_portable`; None
            when it could not be imported.
    """
    used = (facts or {}).get("kernels")
    if facts is None or used is None:
        return Finding("bits", "note", "unknown without torch")
    with_ = (
        f"torch {used['aten']}, MKL {_last(used['mkl'])}, "
        f"oneDNN {_last(used['onednn'])}, NumPy {_last(used['numpy_simd'])}, "
        f"OpenBLAS {used['openblas']}"
    )
    if used["mkl"].endswith(" off"):
        found = f"may depend on who shares a chunk; {with_}"
        return Finding("bits", "note", found, "unset MKL_CBWR")
    if (reason := facts["not_portable"]) is not None:
        return Finding("bits", "note", f"fast, not portable ({reason}); {with_}")
    return Finding("bits", "ok", f"fast and portable; {with_}")


def _last(value: str) -> str:
    """The last word: the mode or the limit without the version, the highest of several sets."""
    return value.rpartition(" ")[2]
