"""Tables and images in a folder of the user's own: which files there are, and reading them."""

import contextlib
import csv
import glob
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.basics.home import expanded
from fedsim.data.origins import Split, library, quiet
from fedsim.errors import ScenarioError

# suffixes by format, and the reader of each format in `datasets`
SUFFIXES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "json": (".jsonl", ".ndjson", ".json"),
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),
}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("parquet", {}),
    # types are guessed per block of rows and must not change between them
    "csv": ("csv", {"chunksize": 500_000}),
    "tsv": ("csv", {"chunksize": 500_000, "sep": "\t"}),
    "json": ("json", {}),
    "images": ("imagefolder", {"drop_labels": False, "drop_metadata": True}),
}
_LISTED = 20  # files that the manifest names; of more it says how many
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class LocalFiles:
    """Files of one format below a folder.

    Attributes:
        root: The folder.
        format: One of `SUFFIXES`.
        files: The files of "train" and, where there are any, "test", sorted by name.
    """

    root: Path
    format: str
    files: dict[str, list[Path]]

    @property
    def identity(self) -> dict[str, Any]:
        """Name, size and time of change of every file."""
        digest = hashlib.sha256()
        for split, files in self.files.items():
            for file in files:
                stat = file.stat()
                name = file.relative_to(self.root).as_posix()
                digest.update(f"{split}|{name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return {"format": self.format, "files": digest.hexdigest()}

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
        self._check_headers()
        with tempfile.TemporaryDirectory(prefix="fedsim-") as scratch:
            splits = self._load(self.files, scratch)
            yield {name: Split(splits[name], self._place(name, scratch)) for name in self.files}

    def _check_headers(self) -> None:
        """Refuse a table that has two columns of one name, of which the reader would rename one."""
        if self.format not in ("csv", "tsv"):
            return
        for file in (file for found in self.files.values() for file in found):
            separator = _READERS[self.format][1].get("sep", ",")
            with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
                header = next(csv.reader(lines, delimiter=separator), [])
            twice = [
                name for place, name in enumerate(header) if name.strip() and name in header[:place]
            ]
            if twice:
                name = file.relative_to(self.root).as_posix()
                raise ScenarioError(
                    f"[data] path = '{self.root}': {name} has two columns '{twice[0]}'"
                )

    def _load(self, files: Mapping[str, list[Path]], scratch: str) -> Any:
        """Read all files of some splits together.

        Raises:
            ScenarioError: Naming the file that cannot be read, or saying that together they cannot.
        """
        cause = self._attempt(files, scratch)
        if not isinstance(cause, str):
            return cause
        every = [(split, file) for split, found in files.items() for file in found]
        for split, file in every if len(every) > 1 else ():
            reason = self._attempt({split: [file]}, scratch)
            if isinstance(reason, str):
                every, cause = [(split, file)], reason
                break
        if len(every) == 1:
            name = every[0][1].relative_to(self.root).as_posix()
            raise ScenarioError(f"[data] path = '{self.root}': {name} cannot be read: {cause}")
        raise ScenarioError(
            f"[data] path = '{self.root}': its {self.format} files cannot be read together: {cause}"
        )

    def _attempt(self, files: Mapping[str, list[Path]], scratch: str) -> Any:
        """The splits that `datasets` reads, or what it says is wrong."""
        datasets = library()
        reader, options = _READERS[self.format]
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

    def _place(self, split: str, scratch: str) -> Callable[[int], str]:
        def place(row: int) -> str:
            before = 0
            for file in self.files[split]:
                name = file.relative_to(self.root).as_posix()
                if self.format == "images":
                    rows = 1
                else:  # only ever asked when something is wrong, so that reading again is cheap
                    rows = len(self._load({split: [file]}, scratch)[split])
                if row < before + rows:
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

    Raises:
        ScenarioError: If there is no such folder, format or split.
    """
    root = expanded(path).absolute()
    where = f"[data] path = '{root}'"
    if root.is_file():
        kind = next((k for k, found in SUFFIXES.items() if root.suffix.lower() in found), None)
        if kind in (None, "images"):
            raise ScenarioError(f"{where}: must be a folder, or a file of {_suffixes('images')}")
        if format_ not in (None, kind):
            raise ScenarioError(
                f"[data] format = '{format_}': {root.name} is {kind} by its ending, leave it out"
            )
        for key, split in (("train", train), ("test", test)):
            if split is not None:
                raise ScenarioError(
                    f"[data] {key} = '{split}': {root.name} is one file, leave it out"
                )
        return LocalFiles(root.parent, str(kind), {"train": [root]})
    if not root.is_dir():
        raise ScenarioError(f"{where}: no such folder or file")
    tables = _tables(root)
    images = _images(root) if format_ in (None, "images") else {}
    found = {kind: tables[kind] for kind in tables if format_ in (None, kind)}
    if images:
        found["images"] = images
    if not found:
        wanted = "files that can be read" if format_ is None else f"{format_} files"
        raise ScenarioError(
            f"{where}: holds no {wanted}{_elsewhere(root, format_)}; tables end in "
            f"{_suffixes('images')}, images lie in folders named after their classes"
        )
    if len(found) > 1:
        raise ScenarioError(
            f"{where}: holds files of several formats ({', '.join(sorted(found))}): {several}"
        )
    ((kind, splits),) = found.items()
    try:
        return LocalFiles(root, kind, _chosen(splits, kind, train, test))
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}{_elsewhere(root, kind)}") from None


_Splits = dict[str, list[Path]]  # by their own name, or by that of their folder and a slash


def _tables(root: Path) -> dict[str, _Splits]:
    """Return the tables in a folder by format and by the name that decides on their split."""
    found: dict[str, _Splits] = {}
    bases = [base for base in (root, root / "data") if base.is_dir()]
    for base in bases:
        folders = [f for f in base.iterdir() if f.is_dir() and f not in bases]
        for folder in [base, *folders]:
            for file in folder.iterdir():
                if file.name.startswith(".") or file.name in _METADATA or not file.is_file():
                    continue
                for kind, suffixes in SUFFIXES.items():
                    if kind != "images" and file.suffix.lower() in suffixes:
                        name = file.stem if folder in bases else f"{folder.name}/"
                        found.setdefault(kind, {}).setdefault(name, []).append(file)
    return found


def _images(root: Path) -> _Splits:
    """Return the images below a folder by split: "" where there are class folders alone."""
    found: _Splits = {}
    for outer in sorted(folder for folder in root.iterdir() if folder.is_dir()):
        for inner in [outer, *sorted(folder for folder in outer.iterdir() if folder.is_dir())]:
            images = [f for f in inner.iterdir() if f.suffix.lower() in SUFFIXES["images"]]
            if images:
                found.setdefault("" if inner == outer else f"{outer.name}/", []).extend(images)
    return found


def _chosen(
    splits: _Splits, kind: str, train: str | None, test: str | None
) -> dict[str, list[Path]]:
    """Return the files of "train" and perhaps "test"."""

    def of(split: str) -> list[Path]:
        parts = [files for name, files in splits.items() if _belongs(name, split)]
        return sorted(file for files in parts for file in files)

    for key, split in (("train", train), ("test", test)):
        if split is not None and not of(split):
            raise ScenarioError(f"holds no {kind} files of [data] {key} = '{split}'")
    chosen = {"train": of(train or "train"), "test": of(test or "test")}
    if not chosen["train"]:
        held_out = set(chosen["test"])
        loose = [files for name, files in splits.items() if not name.endswith("/")]
        chosen["train"] = sorted(f for files in loose for f in files if f not in held_out)
    if not chosen["train"]:
        raise ScenarioError(f"holds no {kind} files to train on, such as those of a split 'train'")
    if twice := set(chosen["train"]) & set(chosen["test"]):
        raise ScenarioError(f"'{min(twice).name}' would be both trained on and held out")
    return {split: files for split, files in chosen.items() if files}


def _belongs(name: str, split: str) -> bool:
    rest = name.removeprefix(split)
    return name.startswith(split) and (rest in ("", "/") or rest[0] in "-_.")


def _elsewhere(root: Path, format_: str | None) -> str:
    """Name a folder below that holds such files, which may be the one that is meant."""
    suffixes = SUFFIXES[format_] if format_ else [s for found in SUFFIXES.values() for s in found]
    for folder in sorted(folder for folder in root.iterdir() if folder.is_dir()):
        if any(file.suffix.lower() in suffixes for file in folder.iterdir()):
            return f"; did you mean '{folder}'?"
    return ""


def _suffixes(without: str) -> str:
    names = [suffix for kind, found in SUFFIXES.items() if kind != without for suffix in found]
    return " ".join(names)
