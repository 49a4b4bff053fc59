"""The types of columns by all rows of all files, where the first ones mislead."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.data.reading.origins import library

_ROWS = 100_000  # that are held at a time


def types_of_all(files: Sequence[Path], format_: str, options: Mapping[str, Any]) -> Any:
    """Return the `datasets.Features` that every row of some tables fits.

    Whole numbers among fractions are fractions; numbers or truth values among texts are texts, as
    they are written.

    Args:
        files: Tables with the same columns.
        format_: "parquet", "csv" or "tsv".
        options: What pandas reads them with.

    Raises:
        ValueError: If they have other columns, or pandas cannot read one.
    """
    datasets = library()
    if format_ == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        schemas = [parquet.read_schema(file).remove_metadata() for file in files]
        every = pa.unify_schemas(schemas, promote_options="permissive")
        return datasets.Features.from_arrow_schema(every)
    import pandas as pd

    found: dict[str, str] = {}
    names: list[str] | None = None
    for file in files:
        with pd.read_csv(file, chunksize=_ROWS, low_memory=False, **options) as blocks:
            for block in blocks:
                names = names or list(block.columns)
                if list(block.columns) != names:
                    raise ValueError(f"{file.name} has other columns than the file before it")
                for name in names:
                    found[name] = _common(found.get(name), _kind(block[name]))
    return datasets.Features({n: datasets.Value(found[n]) for n in names or ()})


def texts_of(file: Path, name: str, options: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the values of a column of a table of text as they are written, block by block.

    Args:
        file: The table.
        name: The column.
        options: What pandas reads it with.
    """
    import pandas as pd

    how = {"dtype": str, "keep_default_na": False, "usecols": lambda each: each == name}
    with pd.read_csv(file, chunksize=_ROWS, **how, **options) as blocks:
        for block in blocks:
            if name in block:  # a file may lack it, and its values are missing then
                yield block[name].tolist()


def _kind(column: Any) -> str:
    if column.isna().all():
        return "float64"
    return {"i": "int64", "u": "int64", "f": "float64", "b": "bool"}.get(
        column.dtype.kind, "string"
    )


def _common(before: str | None, here: str) -> str:
    if before in (None, here):
        return here
    return "float64" if {before, here} == {"int64", "float64"} else "string"
