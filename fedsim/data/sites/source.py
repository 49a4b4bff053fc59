"""The data set `sites`: every client's samples lie in a file of its own, at a site of its own."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsim.basics.errors import ScenarioError, printable
from fedsim.basics.home import expanded
from fedsim.data import cache
from fedsim.data.federated import Arrays, DataRecipe
from fedsim.data.reading.checks import Unfit
from fedsim.data.reading.chosen import choices, listed
from fedsim.data.reading.delimited import Decimal, Dialect
from fedsim.data.reading.files import LocalFiles
from fedsim.data.reading.images import Channels
from fedsim.data.reading.mapping import Roles, TargetType, columns_of
from fedsim.data.sites.agreement import Agreement, agree
from fedsim.data.sites.description import Description, describe
from fedsim.data.sites.site_data import SamplesHere, SiteData, content_of, fitted
from fedsim.data.sites.stored import stored_site
from fedsim.data.sites.tables import HowToRead, SiteTable, find_site, read_site

NAME = "sites"
_FORBIDDEN = ("parts", "label_noise", "rotation", "feature_noise", "feature_shift", "feature_scale")


@dataclass(frozen=True)
class SiteSource:
    """Sites' files, and how they are read.

    Attributes:
        pattern: Where a simulation finds the sites' files; None in a deployment.
        how: How they are read.
        test: The server's own test file, if it has one.
    """

    pattern: str | None
    how: HowToRead
    test: str | None


def sites(
    *,
    sites: str | None = None,
    target: str | Sequence[str] | None = None,
    features: str | Sequence[str] | None = None,
    labels: Sequence[str | int | bool] | None = None,
    target_type: TargetType = "auto",
    test: str | None = None,
    standardise: bool | None = None,
    standardise_target: bool = False,
    format: Literal["parquet", "csv", "tsv", "json", "images"] | None = None,  # noqa: A002
    resize: Sequence[int] | None = None,
    channels: Channels = "auto",
    separator: str | None = None,
    decimal: Decimal | None = None,
    encoding: str | None = None,
) -> SiteSource:
    """Data of which every site has its own file, or folder, and no other site's.

    In a deployment each node is told where its site's file lies, and nothing of it leaves but names
    and kinds of columns, classes, counts, sums and a hash. A simulation reads all files, and has
    the same bits. Needs `[partition] kind = "natural"`: client c is the c-th site.

    Args:
        sites: Where a simulation finds the sites: a pattern such as "data/*.csv", or a folder whose
            files, or folders, are one per site; in the order of their names. A deployment does not
            look at it.
        target: Column of the target, as for folder.
        features: Columns of the features, as for folder; sites may have them in another order.
        labels: The classes' names, in the order of their numbers; None takes those that sites tell,
            sorted.
        target_type: As for folder.
        test: The server's own file, to test the model on; None for none: sites then test it on a
            share of their own, `[partition] test_fraction` with `[evaluation] clients`.
        standardise: As for folder; sites tell sums, so that the mean is that of all together.
        standardise_target: As for folder.
        format: As for folder.
        resize: As for folder.
        channels: As for folder.
        separator: As for folder.
        decimal: As for folder.
        encoding: As for folder.

    Raises:
        ScenarioError: If a value is impossible.
    """
    named = None
    if labels is not None:
        named = tuple(str(each).lower() if isinstance(each, bool) else str(each) for each in labels)
        if len(named) < 2 or len(set(named)) < len(named):
            raise ScenarioError(
                f"[data] labels = {list(labels)}: must name two classes or more, each once"
            )
        if target_type not in ("auto", "classes"):
            raise ScenarioError(
                f"[data] labels: are of classes, and target_type = '{target_type}'; leave it out"
            )
        target_type = "classes"
    columns = columns_of(
        features, target, None, target_type, standardise, standardise_target, resize, channels
    )
    how = HowToRead(columns, format, Dialect(separator, decimal, encoding), named)
    return SiteSource(sites, how, test)


def over_files(source: SiteSource, recipe: DataRecipe) -> SiteData:
    """Return all sites' data, as a simulation has them.

    Args:
        source: The data set.
        recipe: What the data were asked for with.

    Raises:
        ScenarioError: If sites do not fit each other, naming each that differs.
    """
    check_partition(recipe.partition)
    if source.pattern is None:
        raise ScenarioError(
            "[data] sites is missing: a simulation needs to know where the sites' files lie, such "
            "as 'data/*.csv'; in a deployment each node is told where its own lies"
        )
    paths = _found(source.pattern)
    _check_count(recipe.partition, len(paths), source.pattern)
    names = [path.name for path in paths]
    files = [_at(path.name, path, source.how) for path in paths]
    tested = _test_files(source)
    key = _key(source, recipe, files, tested)

    def make() -> cache.Content:
        tables = [_read(name, f, source.how) for name, f in zip(names, files, strict=True)]
        told = [
            _described(name, table, source.how, recipe, client)
            for client, (name, table) in enumerate(zip(names, tables, strict=True))
        ]
        agreement = _agreed(told, source.how, names)
        parts = [_fitted(n, t, agreement) for n, t in zip(names, tables, strict=True)]
        content = content_of(parts, _test(source, tested, agreement), agreement.spec)
        said = [*_said(agreement, source.how), *_said_of(names, told)]
        return cache.Content(content.arrays, {"agreement": agreement.to_json(), "said": said})

    content = cache.entry(recipe.cache_dir, NAME, key, make)
    agreement = Agreement.from_json(content.info["agreement"])
    held = SamplesHere(tuple(range(len(paths))), content)
    return SiteData(agreement, held, recipe, content.info["said"])


def described_at_site(
    source: SiteSource, recipe: DataRecipe, path: str, client: int
) -> Description:
    """Return what a site says of its data.

    Args:
        source: The data set.
        recipe: What the data were asked for with.
        path: Where the site's file lies.
        client: The site's number.

    Raises:
        ScenarioError: If the file cannot be used.
    """
    check_partition(recipe.partition)
    table = stored_site(find_site(path, source.how), source.how, recipe)
    return _described("", table, source.how, recipe, client)


def at_site(
    source: SiteSource, recipe: DataRecipe, path: str, client: int, agreement: Agreement
) -> SiteData:
    """Return the federation's data as one site's process has them: its own samples alone.

    Args:
        source: The data set.
        recipe: What the data were asked for with.
        path: Where the site's file lies.
        client: The site's number.
        agreement: What all sites agreed on.

    Raises:
        ScenarioError: If the site's data are no longer those that it described.
    """
    check_partition(recipe.partition)
    files = find_site(path, source.how)
    key = {**_key(source, recipe, [files], None), "client": client, "agreed": agreement.sha256}

    def make() -> cache.Content:
        table = stored_site(files, source.how, recipe)
        told = _described("", table, source.how, recipe, client)
        if told.sha256 != agreement.hashes[client]:
            raise ScenarioError(
                "the site's data are others than those that it described before round 1: they were "
                "changed meanwhile; bring them back, or start a new run"
            )
        return content_of([_fitted("", table, agreement)], None, agreement.spec)

    content = cache.entry(recipe.cache_dir, NAME, key, make)
    return SiteData(agreement, SamplesHere((client,), content), recipe)


def at_server(source: SiteSource, recipe: DataRecipe, told: Sequence[Description]) -> SiteData:
    """Return the federation's data as a server has them: no site's samples, and its own test set.

    Args:
        source: The data set.
        recipe: What the data were asked for with.
        told: What each site says of its data, by its number.

    Raises:
        ScenarioError: If sites do not fit each other, naming each that differs.
    """
    check_partition(recipe.partition)
    names = [f"the site of partition {client}" for client in range(len(told))]
    agreement = _agreed(told, source.how, names)
    test = _test(source, _test_files(source), agreement)
    content = content_of([], test, agreement.spec)
    said = [*_said(agreement, source.how), *_said_of(names, told)]
    return SiteData(agreement, SamplesHere((), content), recipe, said)


def check_partition(partition: Mapping[str, Any]) -> None:
    """Refuse a division of what is divided already.

    Raises:
        ScenarioError: Naming the key.
    """
    if partition["kind"] != "natural":
        raise ScenarioError(
            f"[partition] kind = '{partition['kind']}': sites have their own samples already; use "
            "'natural'"
        )
    for key in _FORBIDDEN:
        if partition.get(key) not in (None, 0, 0.0):
            raise ScenarioError(
                f"[partition] {key} with [data] name = '{NAME}': sites' samples are taken as they "
                "are; leave it out, or simulate it with name = 'folder' and group = 'file'"
            )


def _check_count(partition: Mapping[str, Any], found: int, pattern: str) -> None:
    clients = partition.get("clients")
    if clients is not None and clients != found:
        raise ScenarioError(
            f"[partition] clients = {clients}: [data] sites = '{pattern}' finds {found}; say "
            f"{found}, or leave it out"
        )


def _found(pattern: str) -> list[Path]:
    """The sites' files or folders that a pattern or a folder names, by name."""
    where = f"[data] sites = '{pattern}'"
    root = expanded(pattern)
    if root.is_dir():
        found = [p for p in root.iterdir() if not p.name.startswith((".", "_"))]
    elif root.exists():
        raise ScenarioError(
            f"{where}: is one file, and every site has one; use a pattern such as 'data/*.csv'"
        )
    else:
        found = [Path(each) for each in glob.glob(str(root), recursive=True)]
    if not found:
        raise ScenarioError(f"{where}: finds no file and no folder in {Path.cwd()}")
    if len(found) < 2:
        raise ScenarioError(
            f"{where}: finds one site alone ({found[0].name}), expected two or more"
        )
    if len({path.is_dir() for path in found}) > 1:
        folders = [path.name for path in found if path.is_dir()]
        raise ScenarioError(
            f"{where}: finds files and folders ({listed(folders, 3)}); let all sites have one or "
            "the other"
        )
    if twice := {p.name for p in found if sum(q.name == p.name for q in found) > 1}:
        raise ScenarioError(f"{where}: finds two sites that are called '{min(twice)}'")
    return sorted((path.absolute() for path in found), key=lambda path: path.name)


def _at(name: str, path: Path, how: HowToRead) -> LocalFiles:
    try:
        return find_site(path, how)
    except ScenarioError as error:
        raise ScenarioError(f"[data] site '{name}': {error}") from None


def _read(name: str, files: LocalFiles, how: HowToRead) -> SiteTable:
    try:
        return read_site(files, how)
    except ScenarioError as error:
        raise ScenarioError(f"[data] site '{name}': {error}") from None


def _described(
    name: str, table: SiteTable, how: HowToRead, recipe: DataRecipe, client: int
) -> Description:
    fraction = float(recipe.partition.get("test_fraction") or 0.0)
    try:
        return describe(table, how, test_fraction=fraction, seed=recipe.seed, client=client)
    except ScenarioError as error:
        raise ScenarioError(f"[data] site '{name}': {error}" if name else str(error)) from None


def _agreed(told: Sequence[Description], how: HowToRead, names: Sequence[str]) -> Agreement:
    try:
        return agree(told, how, names)
    except ScenarioError as error:
        lines = [f"[data] name = '{NAME}': {line}" for line in str(error).splitlines()]
        raise ScenarioError("\n".join(lines)) from None


def _fitted(name: str, table: SiteTable, agreement: Agreement) -> Arrays:
    try:
        return fitted(table, agreement)
    except Unfit as unfit:
        at = "" if unfit.row is None else f"row {unfit.row}, "
        place = f"[data] site '{name}': " if name else ""
        raise ScenarioError(f"{place}{at}column '{agreement.target[0]}' {unfit}") from None


def _test_files(source: SiteSource) -> LocalFiles | None:
    return None if source.test is None else _at("test", expanded(source.test), source.how)


def _test(source: SiteSource, files: LocalFiles | None, agreement: Agreement) -> Arrays | None:
    """The server's test set, as sites agreed to have their samples."""
    if files is None:
        return None
    where = f"[data] test = '{source.test}'"
    try:
        table = read_site(files, source.how)
        if missing := [n for n in agreement.features if n not in table.roles.features]:
            raise ScenarioError(f"lacks the column '{missing[0]}', which sites have")
        found = fitted(table, agreement)
    except Unfit as unfit:
        raise ScenarioError(f"{where}: column '{agreement.target[0]}' {unfit}") from None
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}") from None
    if found.features.shape[1:] != agreement.spec.feature_shape:
        raise ScenarioError(
            f"{where}: its samples have the shape {list(found.features.shape[1:])}, those of the "
            f"sites {list(agreement.spec.feature_shape)}"
        )
    return found


def _key(
    source: SiteSource, recipe: DataRecipe, files: Sequence[LocalFiles], test: LocalFiles | None
) -> dict[str, Any]:
    """All that decides what is stored."""
    return {
        "files": [each.identity for each in files],
        "names": [[f.name for found in each.files.values() for f in found] for each in files],
        "test": None if test is None else test.identity,
        "how": repr(source.how),
        "seed": recipe.seed,
        "test_fraction": recipe.partition.get("test_fraction"),
    }


def _said(agreement: Agreement, how: HowToRead) -> list[str]:
    """What was chosen because the scenario does not say it, in a line."""
    roles = Roles(agreement.features, agreement.target, agreement.kind)
    channels = str(agreement.preprocessing.get("channels", ""))
    return choices(how.columns, roles, agreement.spec.num_classes, agreement.labels, channels, None)


def _said_of(names: Sequence[str], told: Sequence[Description]) -> list[str]:
    """What sites' files say of themselves, each line once, with the sites."""
    whose: dict[str, list[str]] = {}
    for name, each in zip(names, told, strict=True):
        for line in each.said:
            whose.setdefault(line, []).append(name)
    lines = [f"{line} (site {listed(found, 3)})" for line, found in whose.items()]
    orders = {each.features for each in told}
    if len(orders) > 1:
        odd = [n for n, each in zip(names, told, strict=True) if each.features != told[0].features]
        lines.append(
            f"[data] columns stand in another order at {listed(odd, 3)} than at {names[0]}: they "
            "are read by their names"
        )
    return [printable(line) for line in lines]
