"""Text as characters of a fixed vocabulary.

The first 80 tokens are the characters of LEAF (Caldas et al., 2018, arXiv:1812.01097) in its order;
token 80 stands for every other character. LEAF itself has no such token.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError
from fedsim.basics.ties import whole
from fedsim.data.federated import Arrays, Ints
from fedsim.data.loaded import Loaded
from fedsim.data.reading.checks import Unfit

CHARACTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
UNKNOWN = len(CHARACTERS)
VOCABULARY = UNKNOWN + 1


def tokens(texts: Sequence[str], length: int) -> Ints:
    """Return the tokens of texts of equal length, `[n, length]`.

    Raises:
        Unfit: Naming the row of a text of another length.

    Example:
        >>> tokens(["a1", "b~"], 2).tolist()
        [[53, 12], [54, 80]]
    """
    for row, text in enumerate(texts):
        if len(text) != length:
            raise Unfit(f"has {len(text)} characters, expected {length}", row)
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    found: Ints = _table()[np.minimum(codes, 128)].reshape(len(texts), length)
    return found


def hold_out_ends(loaded: Loaded, fraction: float, overlap: int) -> Loaded:
    """Hold out the end of each owner's text, where neighbouring samples share most characters.

    A random choice would hold out samples whose text is also trained on. So the last `fraction` of
    each owner's samples is held out, and the `overlap` samples before it, which reach into it, are
    left out altogether. Of an owner who would have nothing left to train on, nothing is held out.

    Args:
        loaded: Samples in the order of the text, with their owners.
        fraction: Share held out of each owner's samples, rounded down.
        overlap: How many samples reach into the next one's text.

    Raises:
        ScenarioError: If nothing can be held out.
    """
    groups = loaded.groups
    assert groups is not None
    sizes = np.bincount(groups, minlength=len(loaded.group_names))
    held_out = whole(sizes * fraction)
    held_out[sizes - held_out - overlap < 1] = 0
    left_out = np.where(held_out > 0, overlap, 0)
    order = np.argsort(groups, kind="stable")
    from_end = np.empty(len(groups), dtype=np.int64)
    from_end[order] = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(groups)) - 1
    test = from_end < held_out[groups]
    train = from_end >= (held_out + left_out)[groups]

    if not test.any():
        raise ScenarioError(
            f"[data] test_fraction = {fraction:g}: no owner's text is long enough to hold its end "
            f"out and leave {overlap} samples before it out; raise it, or use more text"
        )

    def rows(chosen: npt.NDArray[np.bool_]) -> Arrays:
        return Arrays(loaded.train.features[chosen], loaded.train.targets[chosen])

    notes = {
        **loaded.notes,
        "held_out_from": f"the last {fraction:g} of each owner's text",
        "left_out": {
            "samples": int(left_out.sum()),
            "reason": "their text reaches into the held-out text",
        },
    }
    return loaded._replace(train=rows(train), test=rows(test), groups=groups[train], notes=notes)


def _table() -> Ints:
    table = np.full(129, UNKNOWN, dtype=np.int64)
    for token, character in enumerate(CHARACTERS):
        table[ord(character)] = token
    return table
