"""The part of a checkpoint that a strategy has, and a test whether it comes back the same."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.basics.errors import CheckpointError
from fedsim.basics.generators import seeded
from fedsim.basics.tensor_file import DTYPES
from fedsim.strategy.adapter import is_ours
from fedsim.strategy.base import SESSION_FIELDS, state_fields
from fedsim.strategy.held.around import beyond, digest_of, is_left, load, put, uses
from fedsim.strategy.held.kinds import Unheld, says_what_to_keep, slots
from fedsim.strategy.held.reached import Reached, is_stream, reached_from
from fedsim.strategy.held.reading import Reader
from fedsim.strategy.held.trust import Known, adopt, is_users
from fedsim.strategy.held.values import UnheldError
from fedsim.strategy.held.writing import Writer

GRAPH, TENSORS = "held:graph", "held:tensors"
_SMALL = 2**20  # bytes of tensors that are laid beside one another
_MANY = 5_000  # objects from which looking at them after every round would take its time


class Held(NamedTuple):
    """What a checkpoint holds of a strategy.

    Attributes:
        state: Values by name, as a checkpoint takes them.
        unheld: What it cannot hold: with any, the state is not whole.
        kinds: The kinds of objects in it, by how they are written and their classes.
    """

    state: dict[str, Any]
    unheld: tuple[Unheld, ...]
    kinds: frozenset[str] = frozenset({"nothing"})


class StrategyMemory:
    """What one strategy remembers: its attributes, and its classes' and modules' own values.

    Made before round 1 (or before a run is taken up again), when the strategy is as its class makes
    it.

    Args:
        strategy: The strategy.

    Attributes:
        is_users: Whether some of its code is a user's own.
        beyond: What its code reaches and no checkpoint holds, in words: a resumed run begins with
            it as a new process makes it.
        caches: Functions with an `lru_cache` that its code reaches, by their names, and how often
            they had been called when no round had begun. Once a round calls one, what it remembers
            cannot be held.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        adopt(type(strategy))
        self.is_users = any(is_users(cls.__module__) for cls in type(strategy).__mro__)
        self._known = Known([type(strategy)])
        first = Writer(self._known)
        self._root(first)
        reached = self._reached(first)
        self._before = {
            place: (found.value, digest_of(self._known, found.value, place))
            for place, found in reached.places.items()
        }
        digests = [digest for _, digest in self._before.values() if digest is not None]
        around = {cls for digest in digests for cls in digest.classes}
        self._known = Known([type(strategy), *first.classes, *around])
        self._fixed = dict(first.fixed)
        for digest in digests:
            self._fixed |= digest.fixed
        self.beyond = beyond(reached, self._before)
        self.caches = uses(reached.caches)
        self._many = len(first.nodes)

    def hold(self) -> Held:
        """Return what a checkpoint holds now; tensors are not copied."""
        writer = Writer(self._known, self._fixed)
        try:
            root = self._root(writer)
            reached = self._reached(writer)
            graph = {"root": root, "around": self._write_around(writer, reached)}
        except UnheldError as reason:
            return Held({}, (Unheld("", str(reason)),))
        self._many = len(writer.nodes)
        state = self._plain_fields()
        if graph["root"] is not None or graph["around"]:
            places, state[TENSORS] = _together(writer.tensors)
            state[GRAPH] = json.dumps({**graph, "nodes": writer.nodes, "places": places})
        kinds = {f"{n[0]} {n[1] if isinstance(n[1], str) else ''}" for n in writer.nodes if n[1:]}
        called = [n for n, count in uses(reached.caches).items() if count != self.caches.get(n, 0)]
        unheld = (*writer.unheld, *(Unheld(name, "what its lru_cache holds") for name in called))
        return Held(state, unheld, frozenset(kinds | {"nothing"}))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Count no call of a function with an `lru_cache` that is made meanwhile: no round's."""
        caches = self._caches_now()
        before = uses(caches)
        yield
        for name, count in uses({**caches, **self._caches_now()}).items():
            self.caches[name] = self.caches.get(name, 0) + count - before.get(name, 0)

    def _caches_now(self) -> Mapping[str, Any]:
        writer = Writer(self._known, self._fixed)
        try:
            self._root(writer)
        except UnheldError:
            return {}
        return self._reached(writer).caches

    def unheld(self) -> tuple[Unheld, ...]:
        """Return what of its attributes a checkpoint could not hold now; of few objects only."""
        if self._many > _MANY:
            return ()
        writer = Writer(self._known, self._fixed)
        self._root(writer)
        self._many = len(writer.nodes)
        return tuple(writer.unheld)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give the strategy what `hold` returned.

        Raises:
            CheckpointError: If something of it cannot be made here.
        """
        self._restore(self._strategy, state, beside=False)

    def differs(self, second: Strategy) -> str | None:
        """Restore into a second strategy and name what does not come back as it was, or None."""
        held = self.hold()
        try:
            self._restore(second, held.state, beside=True)
        except CheckpointError as error:
            return str(error)
        mine = Writer(self._known, comparing=True)
        other = Writer(self._known, comparing=True)
        _write_root(mine, self._strategy), _write_root(other, second)
        return _first_difference(mine, other)

    def _restore(self, strategy: Strategy, state: Mapping[str, Any], *, beside: bool) -> None:
        fields = {name: v for name, v in state.items() if name not in (GRAPH, TENSORS)}
        if GRAPH in state:
            graph = json.loads(state[GRAPH])
            tensors = [state[TENSORS][n][a : a + size] for n, a, size in graph["places"]]
            reader = Reader(graph["nodes"], tensors, self._known, beside=beside)
            try:
                fields |= _read_root(reader, graph["root"], strategy)
                if not beside:
                    self._put_around(reader, graph["around"])
            except Exception as error:  # the user's own `load_state_dict` among what may fail
                what = str(error) if isinstance(error, UnheldError) else repr(error)
                raise CheckpointError(
                    f"{type(strategy).__name__} cannot be given back what it remembered: {what}"
                ) from error
        if is_ours(strategy) and fields:
            strategy.restore(fields)

    def _root(self, writer: Writer) -> Any:
        return _write_root(writer, self._strategy)

    def _plain_fields(self) -> dict[str, Any]:
        if not is_ours(self._strategy):
            return {}
        return {n: v for n, v in state_fields(self._strategy).items() if _is_plain(v)}

    def _reached(self, writer: Writer) -> Reached:
        """What the code of the strategy, and of all that it holds, reaches."""
        if says_what_to_keep(type(self._strategy)):
            return Reached({})
        classes = {*type(self._strategy).__mro__, *writer.classes}
        return reached_from(classes, writer.code())

    def _write_around(self, writer: Writer, reached: Reached) -> list[Any]:
        """Values that code reaches, where they are small or have changed."""
        found = []
        for place, (_, _, value) in reached.places.items():
            before, digest = self._before.get(place, (None, None))
            now = digest_of(self._known, value, place)
            if value is before and not is_stream(value) and is_left(digest, now):
                continue
            found.append([place, writer.write(value, place)])
        return found

    def _put_around(self, reader: Reader, around: Sequence[Any]) -> None:
        first = Writer(self._known)
        self._root(first)
        reached = self._reached(first)
        while load(reached, [place for place, _ in around]):
            reached = self._reached(first)
        for place, value in around:
            put(self._known, reached, place, reader, value)


def try_out(memory: StrategyMemory, second: Strategy) -> str | None:
    """Restore a strategy's memory into a second one; name what comes back otherwise, or None."""
    with seeded(0):  # for what is drawn meanwhile
        return memory.differs(second)


def _write_root(writer: Writer, strategy: Strategy) -> Any:
    """Write a strategy: all attributes of a foreign one, of ours what is beside the State."""
    if says_what_to_keep(type(strategy)):
        try:
            return {"said": writer.asked(strategy, "state_dict", "state_dict()")}
        except UnheldError as error:
            writer.unheld.append(Unheld("", "", failed=str(error)))
            return None
    one_half = [n for n in ("state_dict", "load_state_dict") if hasattr(strategy, n)]
    if len(one_half) == 1:
        writer.unheld.append(Unheld(one_half[0], "one of state_dict and load_state_dict only"))
    if not is_ours(strategy):
        writer.nodes.append(["self"])
        writer._seen[id(strategy)] = len(writer.nodes) - 1
        return {"attributes": writer._attributes(strategy, ""), **_slots(writer, strategy)}
    if not is_users(type(strategy).__module__):
        return None
    writer.nodes.append(["self"])
    writer._seen[id(strategy)] = len(writer.nodes) - 1
    odd = {n: v for n, v in state_fields(strategy).items() if not _is_plain(v)}
    own = {n: v for n, v in vars(strategy).items() if n not in SESSION_FIELDS}
    fields = [[n, writer.write(v, f"state.{n}")] for n, v in odd.items()]
    attributes = [[n, writer.write(v, n)] for n, v in own.items()]
    return {"fields": fields, "attributes": attributes, **_slots(writer, strategy)}


def _slots(writer: Writer, strategy: Strategy) -> dict[str, Any]:
    """A strategy's values in slots; with no key where its classes have none."""
    return {"slots": writer._in_slots(strategy, "")} if slots(type(strategy)) else {}


def _read_root(reader: Reader, root: Any, strategy: Strategy) -> dict[str, Any]:
    """Give a strategy its attributes; returns fields of its State."""
    if root is None:
        return {}
    if "said" in root:
        strategy.load_state_dict(reader.read(root["said"]))  # type: ignore[attr-defined]
        return {}
    reader.begin(strategy)
    fields = {name: reader.read(value) for name, value in root.get("fields", ())}
    kept = {n: v for n, v in vars(strategy).items() if n in SESSION_FIELDS}
    reader._give(strategy, root["attributes"], strategy)
    vars(strategy).update(kept)
    reader.give_slots(strategy, root.get("slots", ()), strategy)
    return fields


def _together(tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
    """Lay bytes `[n]` that are few beside one another: (name, start, size) of each, and by name."""
    places: list[Any] = []
    large: dict[str, Tensor] = {}
    small: list[Tensor] = []
    end = 0
    for tensor in tensors:
        if tensor.numel() >= _SMALL:
            places.append([str(len(places)), 0, tensor.numel()])
            large[places[-1][0]] = tensor
        else:
            places.append(["small", end, tensor.numel()])
            small.append(tensor.cpu())
            end += tensor.numel()
    return places, {**large, **({"small": torch.cat(small)} if small else {})}


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint takes a field of a State as it stands."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_tensor(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_tensor, value))
    return value is None or isinstance(value, bool | int | float | str) or _is_tensor(value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in DTYPES


def _first_difference(mine: Writer, other: Writer) -> str | None:
    """Where two graphs differ first, in words, or None."""
    pairs = zip(mine.nodes, other.nodes, strict=False)
    for place, (one, two) in enumerate(pairs):
        if json.dumps(one) != json.dumps(two):
            return _where(mine, place)
    if len(mine.nodes) != len(other.nodes):
        return _where(mine, min(len(mine.nodes), len(other.nodes)) - 1)
    for place, (one, two) in enumerate(zip(mine.tensors, other.tensors, strict=True)):
        if one.shape != two.shape or not torch.equal(one.cpu(), two.cpu()):
            return f"the numbers of array {place}"
    return None


def _where(writer: Writer, place: int) -> str:
    return f"'{writer.paths.get(place, 'its attributes')}' comes back otherwise"
