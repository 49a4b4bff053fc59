"""Tables and images in a folder of the user's own: which files there are, and reading them."""

import contextlib
import glob
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsim.basics.errors import ScenarioError
from fedsim.basics.home import expanded
from fedsim.data.reading.causes import in_our_words
from fedsim.data.reading.chosen import listed
from fedsim.data.reading.delimited import ANY_DIALECT, Dialect, find_dialect, not_utf8
from fedsim.data.reading.json_tables import read_objects
from fedsim.data.reading.origins import Split, Written, library, quiet
from fedsim.data.reading.owners import Owner, check_owners, count_rows, with_owners
from fedsim.data.reading.searching import (
    SUFFIXES,
    chosen,
    elsewhere,
    images,
    left_out,
    others,
    tables,
)
from fedsim.data.reading.types import texts_of, types_of_all
from fedsim.data.reading.what_it_is import by_suffix, what_is

# the reader of each format in `datasets`, and what it is told
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("parquet", {}),
    # types are guessed per block of rows and must not change between them
    "csv": ("csv", {"chunksize": 500_000}),
    "tsv": ("csv", {"chunksize": 500_000}),
    "json": ("json", {}),
    "images": ("imagefolder", {"drop_labels": False, "drop_metadata": True}),
}
SEPARATORS = {"csv": ",", "tsv": "\t"}  # that goes with an ending; others are found and said
_SHARD = re.compile(r"-\d+-of-\d+$")  # files of one table, as the Hub has them
_LISTED = 20  # files that the manifest names; of more it says how many


@dataclass(frozen=True)
class LocalFiles:
    """Files of one format below a folder.

    Attributes:
        root: The folder.
        format: One of `SUFFIXES`.
        files: The files of "train" and, where there are any, "test", sorted by name.
        dialect: What the scenario says of how tables of text are written.
        owner: What names the natural owner of a row, where its file or folder does.
        left: Names of tables in the folder that belong to neither split.
    """

    root: Path
    format: str
    files: dict[str, list[Path]]
    dialect: Dialect = ANY_DIALECT
    owner: Owner | None = None
    left: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Name, size and time of change of every file, and how they are read."""
        digest = hashlib.sha256()
        for split, files in self.files.items():
            for file in files:
                stat = file.stat()
                name = file.relative_to(self.root).as_posix()
                digest.update(f"{split}|{name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        how: dict[str, Any] = {"dialect": repr(self.dialect), "owner": self.owner}
        if self.left:  # what is said of them is stored with the arrays
            how["left"] = list(self.left)
        return {"format": self.format, "files": digest.hexdigest(), **how}

    @property
    def description(self) -> dict[str, Any]:
        """The files' names, relative to the folder."""
        names = [
            file.relative_to(self.root).as_posix()
            for split in self.files.values()
            for file in split
        ]
        return {"format": self.format, "files": names if len(names) <= _LISTED else len(names)}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Mapping[str, Split]]:
        """Read the files; what `datasets` writes for that lasts as long as it is needed."""
        named = {split: [(self._name(f), f) for f in found] for split, found in self.files.items()}
        with self._refused_here():
            for name, file in [pair for pairs in named.values() for pair in pairs]:
                if self.format != "images" and (wrong := what_is(file, self.format)):
                    raise ScenarioError(f"{name} {wrong}")
            options, said = self._written(named)
            splits = read_objects(named) if self.format == "json" else None
        if splits is not None:
            yield {name: self._owned(name, split, options) for name, split in splits.items()}
            return
        with tempfile.TemporaryDirectory(prefix="fedsim-") as scratch:
            loaded = self._load(self.files, scratch, options)
            found = {
                name: Split(
                    loaded[name],
                    self._place(name, options),
                    said=tuple(said),
                    text=self._as_written(name, options),
                )
                for name in self.files
            }
            yield {name: self._owned(name, split, options) for name, split in found.items()}

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    @contextlib.contextmanager
    def _refused_here(self) -> Iterator[None]:
        try:
            yield
        except ScenarioError as error:
            raise type(error)(f"[data] path = '{self.root}': {error}") from None

    def _written(
        self, named: Mapping[str, list[tuple[str, Path]]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the arguments with which `datasets` reads the files, and lines on those found."""
        if self.format not in SEPARATORS:
            return {}, self._pooled()
        every = [pair for pairs in named.values() for pair in pairs]
        dialect, said = find_dialect(every, SEPARATORS[self.format], self.dialect)
        return dialect.options, [*said, *self._pooled()]

    def _pooled(self) -> list[str]:
        """Say that several files are read as one, where each may be a client's."""
        names = [file.stem for file in self.files["train"]]
        left = f"[data] not read, as in neither split: {listed(self.left, 5)}; set train or test"
        said = [f"{left} to have it otherwise"] if self.left else []
        if self.owner or self.format == "images" or len(names) < 2 or _SHARD.search(names[0]):
            return said
        return [
            *said,
            f"[data] {len(names)} files are read as one table ({listed(names, 3)}); group = 'file' "
            "makes each a natural owner",
        ]

    def _owned(self, name: str, split: Split, options: dict[str, Any]) -> Split:
        if self.owner is None:
            return split
        return with_owners(
            split, self.files[name], self.owner, lambda file: self._rows_of(file, options)
        )

    def _rows_of(self, file: Path, options: dict[str, Any]) -> int:
        with quiet():
            counted = count_rows(file, self.format, options)
        if counted is not None:
            return counted
        with replace(self, files={"train": [file]}, owner=None).opened() as splits:
            return len(splits["train"].rows)

    def _load(self, files: Mapping[str, list[Path]], scratch: str, options: dict[str, Any]) -> Any:
        """Read all files of some splits together.

        Raises:
            ScenarioError: Naming the file that cannot be read, or saying that together they cannot.
        """
        cause = self._attempt(files, scratch, options)
        if isinstance(cause, str) and self.format in (*SEPARATORS, "parquet"):
            # the first rows of the first file decide on types, unless they are given
            all_files = [file for found in files.values() for file in found]
            with contextlib.suppress(ValueError, OSError), quiet():
                types = types_of_all(all_files, self.format, options)
                cause = self._attempt(files, scratch, {**options, "features": types})
        if not isinstance(cause, str):
            return cause
        every = [(split, file) for split, found in files.items() for file in found]
        for split, file in every if len(every) > 1 else ():
            reason = self._attempt({split: [file]}, scratch, options)
            if isinstance(reason, str):
                every, cause = [(split, file)], reason
                break
        if len(every) == 1:
            name = self._name(every[0][1])
            encoding = self.dialect.encoding or "utf-8"
            undecoded = not_utf8(name, encoding=encoding)
            why = undecoded if "codec can't decode" in cause else f"{name} cannot be read"
            raise ScenarioError(f"[data] path = '{self.root}': {why}: {in_our_words(cause)}")
        raise ScenarioError(
            f"[data] path = '{self.root}': its {self.format} files cannot be read together: "
            + in_our_words(cause)
            + ("; write a column's numbers alike in all of them" if "truncated" in cause else "")
        )

    def _attempt(
        self, files: Mapping[str, list[Path]], scratch: str, options: dict[str, Any]
    ) -> Any:
        """The splits that `datasets` reads, or what it says is wrong."""
        datasets = library()
        reader, fixed = _READERS[self.format]
        options = {**fixed, **options}
        # datasets takes names for patterns
        names = {split: [glob.escape(str(f)) for f in found] for split, found in files.items()}
        with quiet():
            try:
                return datasets.load_dataset(reader, data_files=names, cache_dir=scratch, **options)
            except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
                # datasets says what it did, and what went wrong in the cause
                cause = " ".join(str(error.__cause__ or error).split())
        # out here nothing holds the reader any more, and with it the file
        return cause

    def _as_written(self, split: str, options: dict[str, Any]) -> Written | None:
        if self.format not in SEPARATORS:
            return None

        def column(name: str) -> Iterator[list[str]]:
            for file in self.files[split]:
                with quiet():
                    yield from texts_of(file, name, options)

        return Written(options["decimal"], column)

    def _place(self, split: str, options: dict[str, Any]) -> Callable[[int], str]:
        def place(row: int) -> str:
            before = 0
            for file in self.files[split]:
                # only ever asked when something is wrong, so that reading again is cheap
                rows = 1 if self.format == "images" else self._rows_of(file, options)
                if row < before + rows:
                    name = self._name(file)
                    return name if self.format == "images" else f"{name}, row {row - before}"
                before += rows
            return f"split '{split}', row {row}"

        return place


def find_files(
    path: str,
    *,
    format_: str | None,
    train: str | None,
    test: str | None,
    several: str = "say which in [data] format",
    group: str | None = None,
    dialect: Dialect | None = None,
) -> LocalFiles:
    """Find the files of a data set, and which split each belongs to.

    A file belongs to a split when it lies in a folder of that name, or when its name begins with it
    (`train.csv`, `train-00000-of-00002.parquet`); both are looked for in `path` and in `path/data`.
    Images lie in folders named after their classes, these in `path` or in a split's folder.

    Args:
        path: The folder, or one file.
        format_: One of `SUFFIXES`; None takes the only one that is there.
        train: The split to train on; None takes "train" if it is there, else every file.
        test: The split to hold out; None takes "test" if it is there, else none.
        several: What to do where there are files of several formats.
        group: [data] group: "file" and "folder" take the natural owner from a file's place. With
            "folder" a folder holds a client's files, `train.csv` and `test.csv` or others.
        dialect: What the scenario says of how tables of text are written.

    Raises:
        ScenarioError: If there is no such folder, format or split.
    """
    root = expanded(path).absolute()
    where = f"[data] path = '{root}'"
    if root.is_file():
        kind = next((k for k, found in SUFFIXES.items() if root.suffix.lower() in found), None)
        kind = format_ if kind is None and format_ != "images" else kind
        if kind in (None, "images"):
            what = by_suffix(root)
            hint = f"; {root.name} is {what}" if what else ""
            raise ScenarioError(
                f"{where}: must be a folder, or a file of {_suffixes('images')}{hint}"
            )
        if format_ not in (None, kind):
            raise ScenarioError(
                f"[data] format = '{format_}': {root.name} is {kind} by its ending, leave it out"
            )
        for key, split in (("train", train), ("test", test)):
            if split is not None:
                raise ScenarioError(
                    f"[data] {key} = '{split}': {root.name} is one file, leave it out"
                )
        return _made(where, root.parent, str(kind), {"train": [root]}, None, dialect)
    if not root.is_dir():
        raise ScenarioError(f"{where}: no such folder or file")
    by_folder = group == "folder"
    by_kind = tables(root, (train or "train", test or "test") if by_folder else ())
    pictures = images(root) if format_ in (None, "images") else {}
    found = {kind: by_kind[kind] for kind in by_kind if format_ in (None, kind)}
    if pictures:
        found["images"] = pictures
    if not found:
        wanted = "files that can be read" if format_ is None else f"{format_} files"
        raise ScenarioError(
            f"{where}: holds no {wanted}{elsewhere(root, format_)}{others(root)}; tables end in "
            f"{_suffixes('images')}, images lie in folders named after their classes"
        )
    if len(found) > 1:
        raise ScenarioError(
            f"{where}: holds files of several formats ({', '.join(sorted(found))}): {several}"
        )
    ((kind, splits),) = found.items()
    try:
        files = chosen(splits, kind, train, test, owners=group in ("file", "folder"))
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}{elsewhere(root, kind)}") from None
    made = _made(where, root, kind, files, group, dialect)
    read = [file for found in files.values() for file in found]
    left = () if train or test else tuple(left_out(splits, read, kind))
    return replace(made, left=left)


def _made(
    where: str,
    root: Path,
    kind: str,
    files: dict[str, list[Path]],
    group: str | None,
    dialect: Dialect | None,
) -> LocalFiles:
    """Hold the scenario's keys about the files against the files."""
    dialect = dialect or ANY_DIALECT
    if kind not in SEPARATORS:
        for key in ("separator", "decimal", "encoding"):
            if getattr(dialect, key) is not None:
                raise ScenarioError(
                    f"[data] {key}: is about CSV and TSV, and the files are {kind}; leave it out"
                )
    owner: Owner | None = "file" if group == "file" else "folder" if group == "folder" else None
    if kind == "images" and owner is not None:
        raise ScenarioError(
            f"[data] group = '{owner}': is about tables, and images lie in folders of their "
            "classes; return them from a loader, with groups"
        )
    if len(files["train"]) == 1 and owner == "file":
        owner = None
    if owner is not None:
        splits = (root, root / "data", *(b / n for b in (root, root / "data") for n in files))
        try:
            check_owners(files["train"], owner, splits)
        except ScenarioError as error:
            raise ScenarioError(f"{where}: [data] group = '{owner}': {error}") from None
    return LocalFiles(root, kind, files, dialect, owner)


def _suffixes(without: str) -> str:
    names = [suffix for kind, found in SUFFIXES.items() if kind != without for suffix in found]
    return " ".join(names)
