"""A site's data that lie in no file: a function of the site's own returns them, as a table.

What it returns is stored as a file at the site, and read as such a file is: what is said of it and
what is trained on are those of the same table in a file.
"""

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.basics.errors import RunError, SchemaError
from fedsim.basics.home import cache_root
from fedsim.basics.import_paths import permitting, resolve

if TYPE_CHECKING:
    import pyarrow

LOADER = "data-loader"  # the key of the node config


@functools.cache
def loaded(path: str, *, is_sites_own: bool) -> Path:
    """Call a loader, once in a process, and return the file that holds what it gave.

    Args:
        path: `package.module:function`, called without arguments; it returns a DataFrame of
            pandas, a Table of pyarrow, or columns by name.
        is_sites_own: Whether the site's file names it, which is the permission to import it.

    Raises:
        ScenarioError: If it cannot be imported, or may not be.
        SchemaError: If it returns no table.
        RunError: If the site's cache cannot be written.
    """
    allowed = permitting(lambda _: None) if is_sites_own else contextlib.nullcontext()
    with allowed:
        loader = resolve(path, what=f"[site] {LOADER if not is_sites_own else 'loader'}")
    if not callable(loader):
        raise SchemaError(f"its loader is of type {type(loader).__name__}, expected a function")
    content = _parquet(_table(loader()))
    folder = cache_root() / "site-loader" / hashlib.sha256(path.encode()).hexdigest()[:16]
    file = folder / f"{hashlib.sha256(content).hexdigest()}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not file.exists():
            making = folder / f".making-{os.getpid()}"
            with open(os.open(making, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(content)
            making.replace(file)
        for before in folder.glob("*.parquet"):
            if before != file:
                before.unlink(missing_ok=True)
    except OSError as error:
        raise RunError("the site's cache cannot be written") from error
    return file


def _table(given: Any) -> "pyarrow.Table":
    import pyarrow

    if isinstance(given, pyarrow.Table):
        return given
    if hasattr(given, "columns") and hasattr(given, "iloc"):
        return pyarrow.Table.from_pandas(given, preserve_index=False)
    if isinstance(given, Mapping):
        return pyarrow.table({str(name): values for name, values in given.items()})
    raise SchemaError(
        f"its loader returned a {type(given).__name__}, expected a table: a DataFrame of pandas, a "
        "Table of pyarrow, or columns by name"
    )


def _parquet(table: "pyarrow.Table") -> bytes:
    from pyarrow import parquet

    buffer = io.BytesIO()
    # what libraries note of themselves would make the same table another file elsewhere
    parquet.write_table(table.replace_schema_metadata(None), buffer)
    return buffer.getvalue()
