"""Columns of tables as features, targets and owners.

What a column may hold is decided by its type: images, text (characters), numbers, lists of numbers.
Rows are read in bounded batches; a value that cannot be used is refused with file, row and column.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedsim.basics.errors import ScenarioError, printable
from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import Arrays, Features, Ints
from fedsim.data.loaded import Loaded
from fedsim.data.reading import characters
from fedsim.data.reading.checks import Unfit
from fedsim.data.reading.chosen import choices, look_alikes, row_numbers
from fedsim.data.reading.images import decode
from fedsim.data.reading.mapping import Columns, Roles, find_roles
from fedsim.data.reading.origins import Origin, Split
from fedsim.data.reading.targets import read_groups, read_targets
from fedsim.data.reading.texts import require_one_spelling
from fedsim.data.reading.values import Column, read_lists, read_numbers, to_texts


def read(origin: Origin, columns: Columns, where: str) -> Loaded:
    """Read a data set.

    Args:
        origin: Where from.
        columns: Which columns are what.
        where: Begins every message.

    Raises:
        ScenarioError: If a column is missing, ambiguous or holds what cannot be used.
    """
    with origin.opened() as splits:
        for name, split in splits.items():
            if len(split.rows) < (2 if name == "train" else 1):
                raise ScenarioError(f"{where}: its {name} split has {len(split.rows)} samples")
        try:
            return _read(splits, columns)
        except ScenarioError as error:
            raise ScenarioError(f"{where}: {error}") from error


def _read(splits: Mapping[str, Split], columns: Columns) -> Loaded:
    given = columns
    if columns.group is None and splits["train"].owner:
        columns = replace(columns, group=splits["train"].owner)
    roles = find_roles(splits, columns)
    notes: dict[str, Any] = {"columns": {"features": list(roles.features)}}
    target_names = list(roles.target)
    notes["columns"]["target"] = target_names[0] if len(target_names) == 1 else target_names
    if columns.group is not None:
        notes["columns"]["group"] = columns.group
    features, preprocessing, said = read_features(splits, roles, columns)
    targets, num_classes, label_names = read_targets(splits, roles, columns)
    if label_names:
        notes["label_names"] = label_names
    vocabulary = 0
    if roles.kind == "text":
        vocabulary = characters.VOCABULARY
        unknown = sum(int((part == characters.UNKNOWN).sum()) for part in features.values())
        notes |= {"vocabulary": vocabulary, "unknown_characters": unknown}
    standard = []
    if columns.standardise or (columns.standardise is None and roles.kind == "numbers"):
        standard.append("features")
    if columns.standardise_target and not num_classes:
        standard.append("targets")
    notes["preprocessing"] = preprocessing
    groups, group_names = None, tuple[str, ...]()
    if columns.group is not None:
        groups, group_names = read_groups(Column(splits["train"], columns.group))
        require_one_spelling({"train": splits["train"]}, columns.group, "owners")
    said = [
        *splits["train"].said,
        *choices(
            given, roles, num_classes, label_names, preprocessing.get("channels", ""), columns.group
        ),
        *said,
        *look_alikes(f"classes of column '{target_names[0]}'", label_names),
        *look_alikes(f"owners of column '{columns.group}'", group_names),
    ]
    if columns.features is None and roles.kind == "numbers":
        said += row_numbers(splits["train"], roles.features)
    arrays = {name: Arrays(features[name], targets[name]) for name in splits}
    train = arrays["train"]
    shape = () if num_classes else train.targets.shape[1:]
    spec = SampleSpec(train.features.shape[1:], num_classes, shape, vocabulary)
    return Loaded(
        train,
        arrays.get("test"),
        spec,
        groups,
        group_names,
        notes=notes,
        standardise=tuple(standard),
        said=tuple(map(printable, said)),
    )


def read_features(
    splits: Mapping[str, Split], roles: Roles, columns: Columns
) -> tuple[dict[str, Features], dict[str, Any], list[str]]:
    """Return features by split, how they were prepared, and what their user should know.

    Args:
        splits: The data set's splits.
        roles: Which columns are read.
        columns: What the scenario says of its columns.

    Raises:
        ScenarioError: If a value cannot be used, with its place.
    """
    found: dict[str, Features] = {}
    if roles.kind == "image":
        wanted, odd = columns.images, Counter[str]()
        for name, split in splits.items():
            try:
                made = decode(split.rows, roles.features[0], wanted)
            except Unfit as unfit:
                place = "" if unfit.row is None else f"{split.place(unfit.row)}: "
                raise ScenarioError(f"{place}{unfit}") from unfit
            found[name], wanted = made.pixels, made.settled
            odd.update(made.odd)
        how: dict[str, Any] = {"scaled_to": [0, 1], "channels": wanted.channels}
        if wanted.mean:
            how |= {"mean": list(wanted.mean), "std": list(wanted.std)}
        if wanted.resize:
            how["resized_to"] = list(wanted.size or ())
        return found, how, [f"[data] {count} images {what}" for what, count in odd.items()]
    for key, given in (
        ("resize", columns.images.resize),
        ("channels", columns.images.channels != "auto"),
    ):
        if given:
            what = f"column '{roles.features[0]}' holds {roles.kind}"
            raise ScenarioError(f"[data] {key}: is about images, and {what}; leave it out")
    shape: tuple[int, ...] | None = None
    for name, split in splits.items():
        if roles.kind == "text":
            found[name] = _text(Column(split, roles.features[0]), shape)
        elif roles.kind == "list":
            found[name] = read_lists(Column(split, roles.features[0]), shape)
        else:
            found[name] = read_numbers(split, roles.features)
        shape = found[name].shape[1:]
    return found, {}, []


def _text(column: Column, shape: tuple[int, ...] | None) -> Ints:
    length = [shape[0] if shape else 0]

    def convert(values: Any) -> Ints:
        texts = to_texts(values)
        length[0] = length[0] or len(texts[0])
        if not length[0]:
            raise Unfit("holds no character", 0)
        return characters.tokens(texts, length[0])

    return np.concatenate(column.blocks(convert))
