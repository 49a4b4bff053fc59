"""Names a file's true format where its ending is wrong, or where no reader takes it."""

import codecs
from pathlib import Path

_BY_FIRST_BYTES = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, whose file `git lfs pull` fetches",
    ),
    (b"PK\x03\x04", "a zip archive, as Excel's workbooks are; unpack it, or save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old workbook of Excel or the like; save it as CSV"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"BZh", "compressed by bzip2; unpack it"),
    (b"\xfd7zXZ", "compressed by xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (b"PAR1", "parquet; let its name end in .parquet"),
    (b"ARROW1", "an Arrow file; save it as parquet"),
    (b"SQLite format 3", "a database of SQLite; export the table as CSV"),
    (b"\x89HDF", "HDF5; save its table as parquet, or return it from a loader"),
    (b"\x93NUMPY", "an array of NumPy; return it from a loader"),
    (b"\x80\x04\x95", "a pickle, which fedsim never opens; return what it holds from a loader"),
    (b"\x80\x05\x95", "a pickle, which fedsim never opens; return what it holds from a loader"),
    (b"\x89PNG", "a picture; pictures lie in folders named after their classes"),
    (b"\xff\xd8\xff", "a picture; pictures lie in folders named after their classes"),
)
_BY_FIRST_TEXT = (
    ("<", "HTML or XML, as a page that says why there is no file"),
    ("@relation", "ARFF; save it as CSV"),
    ("sep=", "CSV with a first line for Excel alone; take that line out"),
)
_BY_SUFFIX = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a workbook; save the sheet as CSV"),
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf5", ".pt", ".pth", ".rds"),
                    "of arrays; return them from a loader"),
    **dict.fromkeys((".pkl", ".pickle"), "a pickle, which fedsim never opens; use a loader"),
    **dict.fromkeys((".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"), "packed; unpack it"),
    **dict.fromkeys((".sav", ".dta", ".sas7bdat", ".feather", ".arrow", ".db", ".sqlite", ".arff"),
                    "of a kind that is not read; save it as CSV or parquet"),
    **dict.fromkeys((".txt", ".data", ".dat", ".test", ".tab", ""),
                    "perhaps a table: name it, and say [data] format = 'csv'"),
}  # fmt: skip


def what_is(file: Path, format_: str) -> str | None:
    """Say what a file is that cannot be of a format, by how it begins; None where it may be.

    Args:
        file: The file.
        format_: "parquet", "csv", "tsv" or "json".
    """
    with file.open("rb") as content:
        head = content.read(64)
    if not head.strip():
        return "is empty"
    if format_ == "parquet" and head.startswith(b"PAR1"):
        return None
    for start, what in _BY_FIRST_BYTES:
        if head.startswith(start):
            return f"is {what}"
    if format_ == "json" and (head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head):
        return "is text in UTF-16, or no text; JSON is in UTF-8: save it so"
    if format_ == "json" and head.startswith(codecs.BOM_UTF8 + b"["):
        return "begins with a byte-order mark; save it as UTF-8 without one"
    text = head.decode("latin-1").removeprefix("\xef\xbb\xbf").lstrip().lower()
    for word, what in _BY_FIRST_TEXT:
        if text.startswith(word):
            return f"is {what}"
    if format_ in ("csv", "tsv") and text.startswith(('{"', '[{"')):
        return "is JSON; let its name end in .json, or .jsonl with a row per line"
    if format_ == "json" and text[:1] not in "{[":
        return "is no JSON: that begins with { or ["
    if format_ == "json" and text[:1] == "[" and text[1:].lstrip()[:1] not in ("", "{"):
        return (
            "is a list of lists or of values, expected one of objects that name every value, as "
            "pandas writes with orient='records'"
        )
    return "is no parquet" if format_ == "parquet" else None


def by_suffix(file: Path) -> str | None:
    """Say what a file is that is not read, by the end of its name."""
    return _BY_SUFFIX.get(file.suffix.lower())
