"""Values around a strategy, in a checkpoint: which are held, which cannot be, and back in place."""

import hashlib
import importlib
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsim.strategy.held.reached import Reached, is_stream
from fedsim.strategy.held.reading import Reader
from fedsim.strategy.held.trust import Known, is_users
from fedsim.strategy.held.values import UnheldError
from fedsim.strategy.held.writing import Writer

_SMALL = 2**20  # bytes of a value that is held whether it has changed or not


class Digest(NamedTuple):
    """What tells whether a value has changed.

    Attributes:
        text: The hash of what of it can be held.
        size: The bytes of its tensors.
        unheld: What of it cannot be held, in words; empty where all can.
        fixed: What of it can be held only as it was before round 1, by path.
        classes: The classes in it.
    """

    text: str
    size: int
    unheld: str
    fixed: Mapping[str, object]
    classes: frozenset[type]


def digest_of(known: Known, value: Any, place: str) -> Digest | None:
    """Return the digest of a value; None of one with too many objects."""
    writer = Writer(known)
    try:
        root = writer.write(value, place)
    except UnheldError:
        return None
    digest = hashlib.sha256(json.dumps([root, writer.nodes]).encode())
    for tensor in writer.tensors:
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    size = sum(tensor.nbytes for tensor in writer.tensors)
    unheld = writer.unheld[0].what if writer.unheld else ""
    return Digest(digest.hexdigest(), size, unheld, writer.fixed, frozenset(writer.classes))


def is_left(before: Digest | None, now: Digest | None) -> bool:
    """Whether a value that is the same object as before round 1 need not be held.

    That is one that has not changed and is large, or has parts that are made anew with every
    process; and one that could not be held then either, which `beyond` names.
    """
    if before is None or now is None:
        return before is now
    if now.unheld:
        return bool(before.unheld)
    return before.text == now.text and (bool(now.fixed) or now.size > _SMALL)


def beyond(
    reached: Reached, digests: Mapping[str, tuple[object, Digest | None]]
) -> tuple[str, ...]:
    """Name what code reaches and no checkpoint holds, as values without a form."""
    found = []
    for place, (value, digest) in digests.items():
        if not is_stream(value) and (digest is None or digest.unheld):
            _, owner, *name = place.split(" ")
            where = ".".join([*owner.replace(":", ".").split("."), *name])
            found.append(f"{where} ({digest.unheld if digest else 'too many objects'})")
    if not reached.whole:
        found.append("objects that could not all be looked at")
    return tuple(found)


def uses(caches: Mapping[str, Any]) -> dict[str, int]:
    """Return how often functions with an `lru_cache` were called, by their names."""
    return {label.replace(":", "."): sum(c.cache_info()[:2]) for label, c in caches.items()}


def load(reached: Reached, places: Sequence[str]) -> bool:
    """Import modules of places that functions import when they are called; whether any was."""
    modules = {place.split(" ")[1].partition(":")[0] for place in places}
    parents = {module.rpartition(".")[0] for module in modules}
    missing = sorted((modules | parents) & reached.imports - sys.modules.keys())
    for module in missing:
        importlib.import_module(module)  # as that function will in its next round
    return bool(missing)


def put(known: Known, reached: Reached, place: str, reader: Reader, value: Any) -> None:
    """Give a place what a checkpoint holds of it.

    Args:
        known: The classes that may be looked up.
        reached: What the code of the new strategy reaches.
        place: The place's name.
        reader: Reads the value.
        value: As `Writer.write` gave it.

    Raises:
        UnheldError: If there is no such place.
    """
    kind, label, *rest = place.split(" ")
    name = rest[0] if rest else ""
    if place in reached.places:
        owner, _, there = reached.places[place]
        made = reader.read(value, there)
    else:
        owner = _owner(known, reached, kind, label)
        made = reader.read(value, vars(owner)[name]) if name in vars(owner) else reader.read(value)
    if isinstance(owner, type | types.ModuleType):
        setattr(owner, name, made)


def _owner(known: Known, reached: Reached, kind: str, label: str) -> Any:
    """A class, function or module of the user's that code does not reach yet, by its name."""
    found = known.find(label) if kind != "module" else sys.modules.get(label)
    if found is None or not is_users(label.partition(":")[0]):
        raise UnheldError(f"the {kind} {label.replace(':', '.')}, which is not there")
    return found
