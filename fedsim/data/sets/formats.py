"""The data sets that a scenario can name, each a function from its keys to a source.

A function checks what it can without reading data, so that a scenario is refused at once; the data
are read when they are first needed on a machine.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from fedsim.basics.errors import ScenarioError
from fedsim.data.brittle import brittle
from fedsim.data.loaded import PooledSource
from fedsim.data.reading.columns import read
from fedsim.data.reading.delimited import Decimal, Dialect
from fedsim.data.reading.files import find_files
from fedsim.data.reading.images import Channels
from fedsim.data.reading.mapping import Columns, TargetType, columns_of
from fedsim.data.reading.origins import HubRepository, Origin
from fedsim.data.sets.bundled import breast_cancer, check_fraction, diabetes, digits
from fedsim.data.sets.presets import PRESETS
from fedsim.data.sites.source import SiteSource, sites
from fedsim.data.synthetic import GeneratedSource, synthetic
from fedsim.data.zipf import zipf


def folder(
    *,
    path: str,
    format: Literal["parquet", "csv", "tsv", "json", "images"] | None = None,  # noqa: A002
    features: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    group: str | None = None,
    target_type: TargetType = "auto",
    train: str | None = None,
    test: str | None = None,
    test_fraction: float = 0.2,
    standardise: bool | None = None,
    standardise_target: bool = False,
    resize: Sequence[int] | None = None,
    channels: Channels = "auto",
    separator: str | None = None,
    decimal: Decimal | None = None,
    encoding: str | None = None,
) -> PooledSource:
    """Any data of your own: a file or folder of parquet, CSV, TSV or JSON, or of images.

    Tables lie in `path` (or `path/data`, or a folder per split), images in folders named after
    their classes, these in `path` or in a folder per split. A file belongs to the split that its
    name begins with (`train.csv`, `test-00000-of-00001.parquet`). JSON is rows, one per line or in
    a list, a table of columns, or LEAF's users.

    Args:
        path: The file or folder.
        format: Format of the files; None takes the only one that is there.
        features: Column of images, lists or text, or columns of numbers; None takes the only column
            of images, else all that are left.
        target: Column of the target; several for several numbers. None takes the only column of
            named classes, or the one called label, labels, target, class or y.
        group: Column of the natural owner, for `[partition] kind = "natural"`; "file" or "folder"
            where every owner has a file of its own, or a folder. None takes LEAF's users.
        target_type: "classes", "numbers", "characters" (text, and the character that follows);
            "auto" takes fractional numbers as numbers; text, booleans, named classes and whole
            numbers 0 to C-1 as classes, and refuses other whole numbers and fractions that are all
            whole.
        train: The split to train on; None takes "train" if it is there, else every file.
        test: The split that the server holds out; None takes "test" if it is there.
        test_fraction: Share that the server holds out where there is no test split, stratified by
            class; in (0, 1).
        standardise: Whether features get mean 0 and deviation 1 over the training samples (images:
            per channel); None does so for columns of numbers. Images are always scaled to [0, 1].
        standardise_target: Whether a target of numbers does too.
        resize: [height, width] that images are resized to; None refuses images of unequal sizes.
        channels: "grey" (1), "rgb" (3), "auto": grey if all images are, else rgb.
        separator: What stands between values of CSV and TSV, " " for any number of blanks; None
            finds it.
        decimal: What stands before the fraction of a number there; None finds it.
        encoding: How their characters are encoded, such as "cp1252"; None takes UTF-8, or what a
            mark at the beginning says.

    Raises:
        ScenarioError: If the folder, a split or a value is impossible.
    """
    origin = find_files(
        path,
        format_=format,
        train=train,
        test=test,
        group=group,
        dialect=Dialect(separator, decimal, encoding),
    )
    columns = columns_of(
        features,
        target,
        group,
        target_type,
        standardise,
        standardise_target,
        resize,
        channels,
    )
    check_fraction(test_fraction)
    return _source("folder", origin, columns, 0.0 if "test" in origin.files else test_fraction)


def hub(
    *,
    repository: str,
    config: str | None = None,
    revision: str | None = None,
    features: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    group: str | None = None,
    target_type: TargetType = "auto",
    train: str = "train",
    test: str | None = None,
    test_fraction: float = 0.2,
    standardise: bool | None = None,
    standardise_target: bool = False,
    resize: Sequence[int] | None = None,
    channels: Channels = "auto",
) -> PooledSource:
    """Any data set of the Hugging Face Hub that needs no script to load.

    Args:
        repository: Its name, "owner/name".
        config: Which of its configurations; None takes the only or default one.
        revision: Branch, tag or commit; None takes the newest at the first download.
        features: Column of images, lists or text, or columns of numbers, as for folder.
        target: Column of the target; several for several numbers, as for folder.
        group: Column of the natural owner, for `[partition] kind = "natural"`.
        target_type: "classes", "numbers", "characters" or "auto", as for folder.
        train: The split to train on.
        test: The split that the server holds out; None draws `test_fraction` of the training split.
        test_fraction: Share that the server holds out without a test split, stratified by class;
            in (0, 1).
        standardise: Whether features get mean 0 and deviation 1, as for folder.
        standardise_target: Whether a target of numbers does too.
        resize: [height, width] that images are resized to; None refuses images of unequal sizes.
        channels: "grey" (1), "rgb" (3), "auto": grey if all images are, else rgb.

    Raises:
        ScenarioError: If a value is impossible.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ScenarioError(f"[data] repository = '{repository}': must be 'owner/name'")
    origin = HubRepository("hub", repository, config, revision, train, test)
    columns = columns_of(
        features,
        target,
        group,
        target_type,
        standardise,
        standardise_target,
        resize,
        channels,
    )
    check_fraction(test_fraction)
    return _source("hub", origin, columns, test_fraction if test is None else 0.0)


DATASETS: dict[str, Callable[..., PooledSource | GeneratedSource | SiteSource]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "diabetes": diabetes,
    **PRESETS,
    "folder": folder,
    "hub": hub,
    "sites": sites,
    "synthetic": synthetic,
    "zipf": zipf,
    "brittle": brittle,
}


def _source(name: str, origin: Origin, columns: Columns, test_fraction: float) -> PooledSource:
    drawn = {"test_fraction": test_fraction} if test_fraction else {}
    return PooledSource(
        name=name,
        test_fraction=test_fraction,
        identity={**origin.identity, "columns": repr(columns)},
        description={"name": name, **origin.description, **drawn},
        load=partial(read, origin, columns, _where(name, origin)),
        test_origin="the test split of the data set",
    )


def _where(name: str, origin: Origin) -> str:
    repository = origin.description.get("hub")
    return f"[data] name = '{name}'" + (f", {repository}" if repository else "")
