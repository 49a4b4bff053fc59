"""Which columns of a table are features, target and owner: as the scenario says, else found."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.data.reading.headers import headless
from fedsim.data.reading.images import Channels, ImageFormat
from fedsim.data.reading.origins import Split, library
from fedsim.data.reading.texts import first_text
from fedsim.data.reading.values import MIXED, kind_of

TargetType = Literal["auto", "classes", "numbers", "characters"]

_LISTED = 20  # columns that a message names
# what readers of pandas, and of R, call a column without a name
_NAMELESS = re.compile(
    r"\s*|Unnamed: \d+(\.\d+)*(_level_\d+)*|__index_level_\d+__|\.\.\.\d+|None|nan"
)
_TARGET_NAMES = ("label", "labels", "target", "class", "y")


@dataclass(frozen=True)
class Columns:
    """Which columns are what.

    Attributes:
        features: The columns of the features; None finds them.
        target: The columns of the target; None finds it.
        group: The column of the natural owner, if there is one.
        target_type: What the target is; "auto" decides by its column's type.
        images: What images become.
        num_classes: C, where it is known; 0 finds it.
        standardise: Whether features get mean 0 and deviation 1; None: columns of numbers do.
        standardise_target: Whether targets of numbers do.
    """

    features: tuple[str, ...] | None = None
    target: tuple[str, ...] | None = None
    group: str | None = None
    target_type: TargetType = "auto"
    images: ImageFormat = field(default_factory=ImageFormat)
    num_classes: int = 0
    standardise: bool | None = None
    standardise_target: bool = False


def columns_of(
    features: str | Sequence[str] | None,
    target: str | Sequence[str] | None,
    group: str | None,
    target_type: TargetType,
    standardise: bool | None,
    standardise_target: bool,
    resize: Sequence[int] | None,
    channels: Channels,
) -> Columns:
    """Return what a scenario says of its columns, from its keys.

    Raises:
        ScenarioError: If a value is impossible.
    """
    size = None
    if resize is not None:
        if len(resize) != 2 or min(resize) < 1:
            raise ScenarioError(
                f"[data] resize = {list(resize)}: must be [height, width], each >= 1"
            )
        size = (resize[0], resize[1])
    return Columns(
        features=_names("features", features),
        target=_names("target", target),
        group=group,
        target_type=target_type,
        images=ImageFormat(channels, size, resize=size is not None),
        standardise=standardise,
        standardise_target=standardise_target,
    )


def _names(key: str, given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or len(set(names)) < len(names):
        raise ScenarioError(
            f"[data] {key} = {list(names)}: must name one column or more, each once"
        )
    return names


class Roles(NamedTuple):
    """Which columns are read.

    Attributes:
        features: The columns of the features.
        target: The columns of the target.
        kind: What the features are: "image", "text", "numbers" or "list".
    """

    features: tuple[str, ...]
    target: tuple[str, ...]
    kind: str


def find_roles(splits: Mapping[str, Split], columns: Columns) -> Roles:
    """Find the columns that are not named, and hold all of them against what they must be.

    Args:
        splits: The data set's splits, with "train".
        columns: What the scenario says of its columns.

    Raises:
        ScenarioError: If a column is not there, not to be found, or of no use.
    """
    types = splits["train"].rows.features
    target = columns.target or (_find_target(splits["train"], columns),)
    features = columns.features or _find_features(splits["train"], target, columns)
    group = () if columns.group is None else (columns.group,)
    for key, names in (("features", features), ("target", target), ("group", group)):
        for split_name, split in splits.items():
            for name in names:
                _require_column(key, name, split_name, split)
    if both := set(features) & set(target):
        raise ScenarioError(f"column '{min(both)}' is named as a feature and as the target")
    kinds = {kind_of(types[name]) for name in features}
    for name in features:
        if kind_of(types[name]) == "text" and columns.target_type != "characters":
            raise ScenarioError(
                f"column '{name}' holds text, which is no number: {first_text(splits, name)}, "
                "leave the column out of [data] features, "
                "or say [data] target_type = 'characters' to learn the next character"
            )
        if kind_of(types[name]) not in ("image", "text", "numbers", "list"):
            raise ScenarioError(
                f"column '{name}' holds {_what(types[name])}, expected numbers or images; leave it "
                "out of [data] features"
            )
    if len(features) > 1 and kinds != {"numbers"}:
        raise ScenarioError(
            f"[data] features = {list(features)}: several columns must each hold one number; name "
            "one column of images, lists or text alone"
        )
    if columns.target_type == "characters" and kinds != {"text"}:
        raise ScenarioError(
            f"column '{features[0]}' holds {types[features[0]]}, expected text for [data] "
            "target_type = 'characters'"
        )
    return Roles(tuple(features), tuple(target), kinds.pop())


def _what(type_: Any) -> str:
    kind = kind_of(type_)
    if kind == "null":
        return "no value in any row"
    if kind.startswith(("timestamp", "date", "time", "duration")):
        return f"dates or times ({kind}), which can be numbers such as days since the first"
    if kind == "Json":  # what `datasets` makes of them
        return MIXED
    return str(type_)


def _require_column(key: str, name: str, split_name: str, split: Split) -> None:
    known = split.rows.column_names
    if name in known:
        return
    guess = nearest(name, known)
    hint = f"did you mean '{guess}'? " if guess else ""
    listed = ", ".join(known[:_LISTED]) + (", ..." if len(known) > _LISTED else "")
    leaf = " (the files are LEAF's: features x, target y, owners user)" if split.owner else ""
    raise ScenarioError(
        f"{key}: '{name}' is not a column of the {split_name} split; {hint}allowed: {listed}"
        f"{split.note or headless(known)}{leaf}"
    )


def _find_target(split: Split, columns: Columns) -> str:
    types: Mapping[str, Any] = split.rows.features
    taken = {*(columns.features or ()), columns.group}
    datasets = library()
    found = [n for n, t in types.items() if isinstance(t, datasets.ClassLabel) and n not in taken]
    found = found or [n for n in types if n.strip().lower() in _TARGET_NAMES and n not in taken]
    if len(found) != 1:
        which = f"{' and '.join(found)} could each be it" if found else "no name or type tells it"
        listed = ", ".join([*types][:_LISTED])
        raise ScenarioError(
            f"[data] target is missing, and {which}: name one of the columns {listed}"
            f"{split.note or headless([*types])}"
        )
    return found[0]


def _find_features(split: Split, target: Sequence[str], columns: Columns) -> tuple[str, ...]:
    types = split.rows.features
    rest = [name for name in types if name not in target and name != columns.group]
    images = [name for name in rest if kind_of(types[name]) == "image"]
    if len(images) == 1:
        return (images[0],)
    if not rest or len(images) > 1:
        which = f"{' and '.join(images)} all hold images" if images else "no column is left"
        raise ScenarioError(f"[data] features is missing, and {which}: name its column")
    _require_names(split, rest)
    return tuple(rest)


def is_nameless(name: object) -> bool:
    """Tell whether nobody named a column: readers of pandas then call it `Unnamed: 0`."""
    return _NAMELESS.fullmatch(str(name)) is not None


def _require_names(split: Split, rest: Sequence[str]) -> None:
    """Refuse to learn from a column that nobody named: mostly row numbers that pandas wrote."""
    unnamed = [name for name in rest if is_nameless(name)]
    if not unnamed:
        return
    place = split.rows.column_names.index(unnamed[0]) + 1
    at_end = place == len(split.rows.column_names) and unnamed[0].startswith("Unnamed: ")
    such = (
        "columns have where lines end in a separator"
        if at_end
        else "row numbers have that pandas writes"
    )
    named = [f'"{name}"' for name in rest if name not in unnamed]
    listed = ", ".join(named[:_LISTED]) + (", ..." if len(named) > _LISTED else "")
    raise ScenarioError(
        f"{split.place(0).rpartition(',')[0]}: column {place} has no name, as {such}: name the "
        f"features, such as [data] features = [{listed}], or take the column out"
    )
