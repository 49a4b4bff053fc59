"""Images of a column as float32 `[n, channels, height, width]`, a bounded number at a time."""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.data.reading.checks import Numbers, Unfit
from fedsim.data.reading.origins import library

_GREY = ("1", "L", "LA", "I", "F", "I;16")  # modes of Pillow
_BATCH = 500  # encoded images that are held at a time

Channels = Literal["auto", "grey", "rgb"]


@dataclass(frozen=True)
class ImageFormat:
    """What images become.

    Attributes:
        channels: "grey" (1 channel), "rgb" (3), or "auto": grey if all images are.
        size: (height, width) that every image has; None takes the first one's.
        resize: Whether images of another size are resized (bilinear) instead of refused.
        known_size: Whether the data set is known to have that size, so that resizing is no help.
        mean: Per channel, subtracted after scaling to [0, 1]; empty for nothing.
        std: Per channel, divided by; empty for nothing.
        by_images: Whether `channels` was "auto" and the images have decided.
    """

    channels: Channels = "auto"
    size: tuple[int, int] | None = None
    resize: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    known_size: bool = False
    by_images: bool = False


class Decoded(NamedTuple):
    """The images of a column.

    Attributes:
        pixels: `[n, channels, height, width]`.
        settled: Their format, with what was open decided.
        odd: How many images were changed in a way that nobody asked for, by what was done.
    """

    pixels: Numbers
    settled: ImageFormat
    odd: Mapping[str, int]


class _Coloured(Exception):
    """An image in colour among grey ones, where the images decide on their channels."""


def decode(rows: Any, column: str, wanted: ImageFormat) -> Decoded:
    """Decode the images of a column, scaled to [0, 1] and normalised.

    Where `wanted.channels` is "auto" they are grey if all of them are, else RGB.

    Args:
        rows: A `datasets.Dataset`.
        column: The column of images.
        wanted: What they become.

    Raises:
        Unfit: Naming the row of an image that is missing, torn, of another size, or one of several
            in its file; or in colour where those before are grey and nobody asked for that.
    """
    try:
        return _decode(rows, column, wanted)
    except _Coloured:
        return _decode(rows, column, replace(wanted, channels="rgb", by_images=True))


def _decode(rows: Any, column: str, wanted: ImageFormat) -> Decoded:
    # the encoded bytes, decoded below: a third of the time that datasets needs to do it
    encoded = rows.cast_column(column, library().Image(decode=False)).select_columns([column])
    out = np.empty(0, dtype=np.float32)
    mean = std = np.float32(0)
    odd, restart = Counter[str](), wanted.channels == "auto"
    row = 0
    for batch in encoded.iter(batch_size=_BATCH):
        pixels = []
        for image in batch[column]:
            try:
                opened = _opened(image)
                if row == 0:
                    wanted = _settled(wanted, opened)
                if wanted.by_images:
                    _look(opened, wanted, odd, restart)
                pixels.append(_pixels(opened, wanted))
            except Unfit as unfit:
                raise Unfit(str(unfit), row) from unfit
            row += 1
        block = np.stack(pixels)
        if not out.size:
            out = np.empty((len(rows), *block.shape[1:]), dtype=np.float32)
            mean, std = (_per_channel(values) for values in (wanted.mean, wanted.std))
        part = out[row - len(block) : row]
        np.divide(block, np.float32(255), out=part)
        if wanted.mean:
            part -= mean
            part /= std
    return Decoded(out, wanted, odd)


def _look(image: Any, wanted: ImageFormat, odd: Counter[str], restart: bool) -> None:
    """Note what becomes of an image whose channels nobody asked for, or refuse it."""
    grey = image.mode in _GREY
    if wanted.channels == "grey" and not grey:
        if restart:
            raise _Coloured
        raise Unfit(
            "the image is in colour and those to train on are grey; say [data] channels = 'grey' "
            "or 'rgb'"
        )
    if wanted.channels == "rgb" and grey:
        odd["are grey among others in colour, and were made RGB ([data] channels settles it)"] += 1
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        odd["are transparent in parts, and the colours behind that were taken"] += 1


def _opened(image: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if image is None or (image["bytes"] is None and image["path"] is None):
        raise Unfit("the image is missing")
    try:
        source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
        with Image.open(source) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames > 1:
                raise Unfit(f"the file holds {frames} images, expected one")
            opened.load()
            return opened
    except UnidentifiedImageError as error:
        raise Unfit("the image cannot be decoded: it is in no known format") from error
    except Unfit:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise Unfit(f"the image cannot be decoded: {error}") from error


def _settled(wanted: ImageFormat, first: Any) -> ImageFormat:
    channels = wanted.channels
    if channels == "auto":
        channels = "grey" if first.mode in _GREY else "rgb"
        wanted = replace(wanted, by_images=True)
    size = wanted.size or (first.height, first.width)
    return replace(wanted, channels=channels, size=size)


def _pixels(image: Any, wanted: ImageFormat) -> npt.NDArray[np.uint8]:
    if image.mode in ("I", "F", "I;16"):
        raise Unfit(f"the image has mode '{image.mode}', expected 8 bits per channel")
    mode = "L" if wanted.channels == "grey" else "RGB"
    converted = image if image.mode == mode else image.convert(mode)
    assert wanted.size is not None
    height, width = wanted.size
    if converted.size != (width, height):
        if not wanted.resize:
            hint = "" if wanted.known_size else "; set [data] resize to make them equal"
            raise Unfit(
                f"the image is {image.width}x{image.height}, expected {width}x{height}{hint}"
            )
        from PIL import Image

        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(converted).reshape(height, width, -1)
    return pixels.transpose(2, 0, 1)


def _per_channel(values: tuple[float, ...]) -> Any:
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1)
