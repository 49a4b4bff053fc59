"""The data sets that a scenario can name, each a function from its keys to a source.

A function checks what it can without reading data, so that a scenario is refused at once; the data
are read when they are first needed on a machine.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.data.pooled import Loaded, PooledSource
from fedsim.data.source import Arrays, Features, Ints
from fedsim.data.synthetic import SyntheticSource, synthetic
from fedsim.errors import RunError, ScenarioError, nearest
from fedsim.samples import SampleSpec


def digits(*, test_fraction: float = 0.2) -> PooledSource:
    """Scikit-learn's bundled 8x8 digits: 1,797 images of 10 classes, scaled to [0, 1].

    Args:
        test_fraction: Share that the server holds out, stratified by class; in (0, 1).

    Raises:
        ScenarioError: If `test_fraction` is outside its range.
    """
    if not 0 < test_fraction < 1:
        raise ScenarioError(f"[data] test_fraction = {test_fraction}: must be in (0, 1)")
    from importlib.metadata import version

    return PooledSource(
        name="digits",
        test_fraction=test_fraction,
        identity={"scikit-learn": version("scikit-learn")},
        description={"name": "digits", "test_fraction": test_fraction},
        load=_load_digits,
    )


def _load_digits() -> Loaded:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = (bunch.images[:, None] / 16).astype(np.float32)
    return Loaded(Arrays(features, bunch.target.astype(np.int64)), None, SampleSpec((1, 8, 8), 10))


class ImagePreset(NamedTuple):
    """An image data set in the Hugging Face layout.

    Attributes:
        name: Its name in a scenario.
        hub: Its repository on the Hugging Face Hub.
        image: Column of the images.
        label: Column of the class labels.
        num_classes: Classes.
        shape: (channels, height, width); 1 channel is grey, 3 are red, green and blue.
        mean: Per channel, subtracted after scaling to [0, 1].
        std: Per channel, divided by.
    """

    name: str
    hub: str
    image: str
    label: str
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


MNIST = ImagePreset(
    name="mnist",
    hub="ylecun/mnist",
    image="image",
    label="label",
    num_classes=10,
    shape=(1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
)


def mnist(*, path: str | None = None) -> PooledSource:
    """MNIST: 28x28 handwritten digits of 10 classes, with its official test split held out.

    Args:
        path: Folder with `train-*.parquet` and `test-*.parquet` in the Hugging Face layout; None
            loads from the Hugging Face Hub.

    Raises:
        ScenarioError: If the folder does not hold these files.
    """
    return _images(MNIST, path)


DATASETS: dict[str, Callable[..., PooledSource | SyntheticSource]] = {
    "digits": digits,
    "mnist": mnist,
    "synthetic": synthetic,
}


def _images(preset: ImagePreset, path: str | None) -> PooledSource:
    if path is None:
        files = None
        origin: dict[str, Any] = {"hub": preset.hub}
        identity = origin
    else:
        files = _parquet_files(Path(path).expanduser().absolute(), preset)
        names = [file.name for split in files.values() for file in split]
        origin = {"files": names}
        stats = [file.stat() for split in files.values() for file in split]
        identity = {
            "files": [
                [name, stat.st_size, stat.st_mtime_ns]
                for name, stat in zip(names, stats, strict=True)
            ]
        }
    return PooledSource(
        name=preset.name,
        test_fraction=0.0,
        identity={**identity, "preset": list(preset)},
        description={"name": preset.name, **origin},
        load=lambda: _load_images(preset, files),
    )


def _parquet_files(folder: Path, preset: ImagePreset) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise ScenarioError(
            f"[data] path = '{folder}': no such folder; give the one that holds {preset.name}'s "
            f"train-*.parquet and test-*.parquet, or leave path out to load {preset.hub} from the "
            "Hugging Face Hub"
        )
    files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    for split, found in files.items():
        if not found:
            below = sorted(folder.rglob(f"{split}-*.parquet"))
            hint = f"; did you mean '{below[0].parent}'?" if below else ""
            raise ScenarioError(f"[data] path = '{folder}': holds no {split}-*.parquet{hint}")
    return files


def _load_images(preset: ImagePreset, files: dict[str, list[Path]] | None) -> Loaded:
    # datasets converts what it reads to arrow files: needed only until the images are decoded
    with tempfile.TemporaryDirectory(prefix="fedsim-") as scratch:
        splits = _from_hub(preset) if files is None else _from_parquet(files, scratch)
        train, test = (_decode(preset, splits[split], split) for split in ("train", "test"))
    return Loaded(train, test, SampleSpec(preset.shape, preset.num_classes))


def _from_hub(preset: ImagePreset) -> Any:
    import datasets

    try:
        return datasets.load_dataset(preset.hub)
    except OSError as error:
        raise RunError(
            f"[data] name = '{preset.name}': {preset.hub} cannot be had from the Hugging Face Hub "
            f"({error}); connect to the network, or set [data] path to a folder with its "
            "train-*.parquet and test-*.parquet"
        ) from error


def _from_parquet(files: dict[str, list[Path]], scratch: str) -> Any:
    import datasets

    names = {split: [str(file) for file in found] for split, found in files.items()}
    try:
        with _no_progress_bars():
            # the parquet reader by name: whatever else lies in the folder, no script is run
            return datasets.load_dataset("parquet", data_files=names, cache_dir=scratch)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise ScenarioError(
            f"[data] path = '{files['train'][0].parent}': its parquet files cannot be read: "
            f"{error.__cause__ or error}"
        ) from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _decode(preset: ImagePreset, split: Any, name: str) -> Arrays:
    import datasets

    where = f"[data] name = '{preset.name}', split '{name}'"
    for column in (preset.image, preset.label):
        if column not in split.column_names:
            guess = nearest(column, split.column_names)
            hint = f"; is it '{guess}'?" if guess else ""
            columns = ", ".join(split.column_names)
            raise ScenarioError(f"{where}: no column '{column}' among {columns}{hint}")
    # the encoded bytes, decoded below: a third of the time that datasets needs to do it
    encoded = split.cast_column(preset.image, datasets.Image(decode=False))
    pixels = np.empty((len(split), *preset.shape), dtype=np.uint8)
    row = 0
    for batch in encoded.select_columns([preset.image]).iter(batch_size=1000):
        for image in batch[preset.image]:
            pixels[row] = _pixels(image["bytes"], preset, f"{where}, row {row}")
            row += 1
    return Arrays(_normalised(pixels, preset), _labels(split, preset, where))


def _pixels(encoded: bytes | None, preset: ImagePreset, where: str) -> npt.NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    channels, height, width = preset.shape
    if encoded is None:
        raise ScenarioError(f"{where}: the image is missing")
    try:
        image = Image.open(io.BytesIO(encoded)).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ScenarioError(f"{where}: the image cannot be decoded: {error}") from error
    if image.size != (width, height):
        raise ScenarioError(
            f"{where}: the image is {image.width}x{image.height}, expected {width}x{height}"
        )
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _normalised(pixels: npt.NDArray[np.uint8], preset: ImagePreset) -> Features:
    shape = (len(preset.mean), 1, 1)
    mean = np.array(preset.mean, dtype=np.float32).reshape(shape)
    std = np.array(preset.std, dtype=np.float32).reshape(shape)
    features = pixels.astype(np.float32)
    features /= np.float32(255)
    features -= mean
    features /= std
    return features


def _labels(split: Any, preset: ImagePreset, where: str) -> Ints:
    labels = np.asarray(split[preset.label][:])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ScenarioError(
            f"{where}: column '{preset.label}' holds {labels.dtype}, expected integers from 0 to "
            f"{preset.num_classes - 1}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= preset.num_classes))
    if wrong.size:
        raise ScenarioError(
            f"{where}, row {wrong[0]}: {preset.label} = {labels[wrong[0]]}, expected 0 to "
            f"{preset.num_classes - 1}"
        )
    return labels.astype(np.int64)
