"""Which tables and images lie in a folder, and which split each belongs to."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.data.reading.chosen import listed
from fedsim.data.reading.what_it_is import by_suffix

# by format
SUFFIXES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "json": (".jsonl", ".ndjson", ".json"),
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),
}
_TEST = {"test", "testing", "valid", "validation", "val", "dev", "eval", "holdout"}
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")

Splits = dict[str, list[Path]]  # by their own name, or by that of their folder and a slash


def tables(root: Path, clients_of: Sequence[str] = ()) -> dict[str, Splits]:
    """Return the tables in a folder by format and by the name that decides on their split.

    Args:
        root: The folder.
        clients_of: Where folders are clients': the splits, whose folders may hold theirs in turn.
    """
    found: dict[str, Splits] = {}
    bases = [base for base in (root, root / "data") if base.is_dir()]
    places = [(base, "") for base in bases]  # and the name of a split, or "" where files have it
    for base in bases:
        for folder in _folders(base):
            if folder in bases:
                continue
            of_split = not clients_of or any(_belongs(folder.name, n) for n in clients_of)
            places.append((folder, f"{folder.name}/" if of_split else ""))
            if clients_of and of_split:
                places += [(inner, f"{folder.name}/") for inner in _folders(folder)]
    for folder, split in places:
        for file in sorted(folder.iterdir()):
            if file.name.startswith(".") or file.name in _METADATA or not file.is_file():
                continue
            for kind, suffixes in SUFFIXES.items():
                if kind != "images" and file.suffix.lower() in suffixes:
                    found.setdefault(kind, {}).setdefault(split or file.stem, []).append(file)
    return found


def _folders(base: Path) -> list[Path]:
    return sorted(f for f in base.iterdir() if f.is_dir() and not f.name.startswith("."))


def images(root: Path) -> Splits:
    """Return the images below a folder by split: "" where there are class folders alone."""
    found: Splits = {}
    for outer in sorted(folder for folder in root.iterdir() if folder.is_dir()):
        for inner in [outer, *sorted(folder for folder in outer.iterdir() if folder.is_dir())]:
            images = [f for f in inner.iterdir() if f.suffix.lower() in SUFFIXES["images"]]
            if images:
                found.setdefault("" if inner == outer else f"{outer.name}/", []).extend(images)
    return found


def chosen(
    splits: Splits, kind: str, train: str | None, test: str | None, *, owners: bool = False
) -> dict[str, list[Path]]:
    """Return the files of "train" and perhaps "test".

    Args:
        splits: The files by what decides on their split.
        kind: Their format.
        train: The split to train on; None takes "train" if it is there, else every file.
        test: The split to hold out; None takes "test" if it is there.
        owners: Whether files or folders are named after their owners.

    Raises:
        ScenarioError: If there is nothing to train on, or a file's name says that it is for a test.
    """

    def of(split: str) -> list[Path]:
        parts = [files for name, files in splits.items() if _belongs(name, split)]
        return sorted(file for files in parts for file in files)

    for key, split in (("train", train), ("test", test)):
        if split is not None and not of(split):
            guess = nearest(split, [name.rstrip("/") for name in splits])
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise ScenarioError(f"holds no {kind} files of [data] {key} = '{split}'{hint}")
    files_of = {"train": of(train or "train"), "test": of(test or "test")}
    if not files_of["train"]:
        held_out = set(files_of["test"])
        loose = {name: files for name, files in splits.items() if not name.endswith("/")}
        if test is None and not held_out and not owners:
            _require_no_test(loose)
        files_of["train"] = sorted(
            f for files in loose.values() for f in files if f not in held_out
        )
    if not files_of["train"]:
        raise ScenarioError(
            f"holds no {kind} files to train on, such as those of a split 'train'{_meant(splits)}"
        )
    if twice := set(files_of["train"]) & set(files_of["test"]):
        raise ScenarioError(f"'{min(twice).name}' would be both trained on and held out")
    return {split: files for split, files in files_of.items() if files}


def _require_no_test(loose: Splits) -> None:
    """Refuse to train on a file whose name says that it is for a test, beside others."""
    told = [name for name in loose if _TEST & {*re.split(r"[^a-z]+", name.lower())}]
    rest = [name for name in loose if name not in told]
    if told and rest:
        shown = next((name for name in rest if "train" in name.lower()), rest[0])
        raise ScenarioError(
            f"'{loose[told[0]][0].name}' seems to hold samples for a test: say [data] train = "
            f"'{shown}' and test = '{told[0]}' if so, else give it another name"
        )


def _meant(splits: Splits) -> str:
    """Return the keys for splits that are called otherwise, such as Train and Test."""
    names = [name.rstrip("/") for name in splits]
    train = [name for name in names if "train" in name.lower()]
    test = [name for name in names if _TEST & {*re.split(r"[^a-z]+", name.lower())}]
    if not train:
        return ""
    more = f" and test = '{test[0]}'" if test else ""
    return f"; did you mean [data] train = '{train[0]}'{more}?"


def left_out(splits: Splits, read: Iterable[Path], kind: str) -> list[str]:
    """Name files, or folders of images, that belong to no split that is read."""
    left = {file for found in splits.values() for file in found} - {*read}
    if kind == "images":
        return sorted(name for name, files in splits.items() if left & {*files})
    return sorted(file.name for file in left)


def _belongs(name: str, split: str) -> bool:
    rest = name.removeprefix(split)
    return name.startswith(split) and (rest in ("", "/") or rest[0] in "-_.")


def elsewhere(root: Path, format_: str | None) -> str:
    """Name folders below that hold such files: one that may be meant, or several clients'."""
    suffixes = SUFFIXES[format_] if format_ else [s for found in SUFFIXES.values() for s in found]
    inside = [
        folder
        for folder in _folders(root)
        if any(file.suffix.lower() in suffixes for file in folder.iterdir())
    ]
    if len(inside) > 1:
        return (
            f"; {len(inside)} folders in it do ({listed([f.name for f in inside], 3)}): say [data] "
            "group = 'folder' if each is a client's"
        )
    return f"; did you mean '{inside[0]}'?" if inside else ""


def others(root: Path) -> str:
    """Say what one of the files is that are there and are not read."""
    for file in sorted(root.iterdir()):
        told = file.stem.lower() in ("readme", "license", "notes", "requirements")
        if file.is_file() and not told and (what := by_suffix(file)):
            return f"; {file.name} is {what}"
    return ""
