"""Well-known data sets of the Hugging Face Hub, with their columns and their preprocessing.

Each loads from the Hub, or from a folder with the same files (`path`). Normalisation constants are
the means and deviations per channel of the official training split, as commonly published, applied
after scaling to [0, 1].
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

from fedsim.basics.errors import ScenarioError
from fedsim.data.loaded import Loaded, PooledSource
from fedsim.data.reading import characters
from fedsim.data.reading.columns import read
from fedsim.data.reading.files import LocalFiles, find_files
from fedsim.data.reading.images import ImageFormat
from fedsim.data.reading.mapping import Columns
from fedsim.data.reading.origins import HubRepository, Origin
from fedsim.data.sets.bundled import check_fraction


class Preset(NamedTuple):
    """A data set with known columns.

    Attributes:
        name: Its name in a scenario.
        hub: Its repository on the Hugging Face Hub.
        columns: Which columns are what.
        test: Its official test split, if there is one.
    """

    name: str
    hub: str
    columns: Columns
    test: str | None


def _pictures(
    shape: tuple[int, int, int],
    num_classes: int,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    *,
    image: str,
    label: str,
    group: str | None = None,
) -> Columns:
    channels: Literal["grey", "rgb"] = "grey" if shape[0] == 1 else "rgb"
    images = ImageFormat(channels, shape[1:], False, mean, std, known_size=True)
    return Columns((image,), (label,), group, "classes", images, num_classes, standardise=False)


MNIST = Preset(
    "mnist",
    "ylecun/mnist",
    _pictures((1, 28, 28), 10, (0.1307,), (0.3081,), image="image", label="label"),
    "test",
)
FASHION_MNIST = Preset(
    "fashion_mnist",
    "zalando-datasets/fashion_mnist",
    _pictures((1, 28, 28), 10, (0.2860,), (0.3530,), image="image", label="label"),
    "test",
)
CIFAR10 = Preset(
    "cifar10",
    "uoft-cs/cifar10",
    _pictures(
        (3, 32, 32),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        image="img",
        label="label",
    ),
    "test",
)
CIFAR100 = Preset(
    "cifar100",
    "uoft-cs/cifar100",
    _pictures(
        (3, 32, 32),
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        image="img",
        label="fine_label",
    ),
    "test",
)
FEMNIST = Preset(
    "femnist",
    "flwrlabs/femnist",
    _pictures((1, 28, 28), 62, image="image", label="character", group="writer_id"),
    None,
)
SHAKESPEARE = Preset(
    "shakespeare",
    "flwrlabs/shakespeare",
    Columns(("x",), ("y",), "character_id", "characters", standardise=False),
    None,
)


def mnist(*, path: str | None = None) -> PooledSource:
    """MNIST: 28x28 handwritten digits of 10 classes, with its official test split held out.

    Args:
        path: Folder with `train-*.parquet` and `test-*.parquet` in the Hugging Face layout; None
            loads from the Hugging Face Hub.

    Raises:
        ScenarioError: If the folder does not hold these files.
    """
    return _source(MNIST, path)


def fashion_mnist(*, path: str | None = None) -> PooledSource:
    """Fashion-MNIST: 28x28 grey pictures of 10 kinds of clothes; official test split held out.

    Args:
        path: Folder with its files, as for mnist; None loads from the Hugging Face Hub.

    Raises:
        ScenarioError: If the folder does not hold these files.
    """
    return _source(FASHION_MNIST, path)


def cifar10(*, path: str | None = None, image: str = "img", label: str = "label") -> PooledSource:
    """CIFAR-10: 32x32 colour pictures of 10 classes, with its official test split held out.

    Args:
        path: Folder with its files, as for mnist; None loads from the Hugging Face Hub.
        image: Column of the images; copies elsewhere call it "image".
        label: Column of the classes.

    Raises:
        ScenarioError: If the folder does not hold these files.
    """
    return _source(_renamed(CIFAR10, image, label), path)


def cifar100(
    *, path: str | None = None, labels: Literal["fine", "coarse"] = "fine", image: str = "img"
) -> PooledSource:
    """CIFAR-100: 32x32 colour pictures of 100 classes, with its official test split held out.

    Args:
        path: Folder with its files, as for mnist; None loads from the Hugging Face Hub.
        labels: "fine" for the 100 classes, "coarse" for their 20 superclasses.
        image: Column of the images; copies elsewhere call it "image".

    Raises:
        ScenarioError: If the folder does not hold these files.
    """
    preset = _renamed(CIFAR100, image, f"{labels}_label")
    classes = 100 if labels == "fine" else 20
    return _source(preset._replace(columns=replace(preset.columns, num_classes=classes)), path)


def femnist(*, path: str | None = None, test_fraction: float = 0.1) -> PooledSource:
    """FEMNIST (LEAF): 28x28 characters of 62 classes by some 3,600 writers, its natural owners.

    Scaled to [0, 1] as in LEAF.

    Args:
        path: Folder with its files, as for mnist (no test split); None loads from the Hugging Face
            Hub.
        test_fraction: Share that the server holds out, stratified by class; in (0, 1).

    Raises:
        ScenarioError: If a value is outside its range, or the folder does not hold these files.
    """
    return _source(FEMNIST, path, test_fraction)


def shakespeare(*, path: str | None = None, test_fraction: float = 0.1) -> PooledSource:
    """Shakespeare (LEAF): 80 characters and the one that follows, by role, the natural owner.

    Characters are tokens of a vocabulary of 81: LEAF's 80, and one for all others.

    Args:
        path: Folder with its files (CSV or parquet, no test split); None loads from the Hugging
            Face Hub.
        test_fraction: Share that the server holds out: the end of each role's text, for samples
            overlap; the 80 samples before it, which reach into it, are left out; in (0, 1).

    Raises:
        ScenarioError: If a value is outside its range, or the folder does not hold these files.

    Deviations: LEAF splits each role's own samples; here the server holds the ends of all roles.
    """
    check_fraction(test_fraction)
    return _source(SHAKESPEARE, path, test_fraction)


PRESETS: dict[str, Callable[..., PooledSource]] = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "femnist": femnist,
    "shakespeare": shakespeare,
}


def _renamed(preset: Preset, image: str, label: str) -> Preset:
    return preset._replace(columns=replace(preset.columns, features=(image,), target=(label,)))


def _source(preset: Preset, path: str | None, test_fraction: float = 0.0) -> PooledSource:
    if preset.test is None:
        check_fraction(test_fraction)
    origin: Origin
    if path is None:
        origin = HubRepository(preset.name, preset.hub, None, None, "train", preset.test)
    else:
        origin = _files(preset, path)
    by_time = preset.columns.target_type == "characters"
    described = {"test_fraction": test_fraction} if test_fraction else {}
    return PooledSource(
        name=preset.name,
        test_fraction=0.0 if by_time else test_fraction,
        identity={
            **origin.identity,
            "columns": repr(preset.columns),
            **(described if by_time else {}),
        },
        description={"name": preset.name, **origin.description, **described},
        load=partial(_load, preset, origin, test_fraction if by_time else 0.0),
        test_origin="the end of each owner's text" if by_time else "official test split",
    )


def _files(preset: Preset, path: str) -> LocalFiles:
    try:
        several = "keep those of one format"
        found = find_files(path, format_=None, train=None, test=None, several=several)
        if preset.test is not None and "test" not in found.files:
            raise ScenarioError(
                f"[data] path = '{found.root}': holds no {found.format} files of the split 'test'"
            )
    except ScenarioError as error:
        if "did you mean" in str(error):
            raise
        raise ScenarioError(
            f"{error}; give the folder that holds {preset.name}'s files, or leave path out to load "
            f"{preset.hub} from the Hugging Face Hub"
        ) from error
    return found


def _load(preset: Preset, origin: Origin, ends: float) -> Loaded:
    loaded = read(origin, preset.columns, f"[data] name = '{preset.name}'")
    if ends:
        loaded = characters.hold_out_ends(loaded, ends, overlap=loaded.spec.feature_shape[0])
    return loaded._replace(said=())  # its columns are known, and its names are its authors'
