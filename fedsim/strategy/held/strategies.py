"""The part of a checkpoint that a strategy has, and a test whether it comes back the same."""

import enum
import hashlib
import json
import logging
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.basics.errors import CheckpointError
from fedsim.basics.generators import seeded
from fedsim.basics.tensor_file import DTYPES
from fedsim.strategy.adapter import is_ours
from fedsim.strategy.base import SESSION_FIELDS, state_fields
from fedsim.strategy.held.kinds import Unheld, says_what_to_keep
from fedsim.strategy.held.reading import Reader
from fedsim.strategy.held.trust import Known, adopt, is_users, label_of
from fedsim.strategy.held.values import UnheldError
from fedsim.strategy.held.writing import Writer

GRAPH, TENSORS = "held:graph", "held:tensors"
_SMALL = 2**20  # bytes of a class's or module's value that is held whether it has changed or not
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
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        adopt(type(strategy))
        self.is_users = any(is_users(cls.__module__) for cls in type(strategy).__mro__)
        self._known = Known([type(strategy)])
        first = Writer(self._known)
        self._root(first)
        self._known = Known([type(strategy), *first.classes])
        self._fixed: Mapping[str, object] = first.fixed
        self._before = {
            place: (value, _digest(self._known, value, place))
            for place, value in _around(self._classes(first), strategy).items()
        }
        self._many = len(first.nodes)

    def hold(self) -> Held:
        """Return what a checkpoint holds now; tensors are not copied."""
        writer = Writer(self._known, self._fixed)
        try:
            graph = {"root": self._root(writer), "around": self._write_around(writer)}
        except UnheldError as reason:
            return Held({}, (Unheld("", str(reason)),))
        self._many = len(writer.nodes)
        state = self._plain_fields()
        if graph["root"] is not None or graph["around"]:
            places, state[TENSORS] = _together(writer.tensors)
            state[GRAPH] = json.dumps({**graph, "nodes": writer.nodes, "places": places})
        kinds = {f"{n[0]} {n[1] if isinstance(n[1], str) else ''}" for n in writer.nodes if n[1:]}
        return Held(state, tuple(writer.unheld), frozenset(kinds | {"nothing"}))

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
                for place, value in graph["around"] if not beside else ():
                    _put(self._known, place, reader.read(value))
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

    def _classes(self, writer: Writer) -> set[type]:
        found = {cls for each in writer.classes for cls in each.__mro__}
        found |= set(type(self._strategy).__mro__)
        found = {cls for cls in found if not issubclass(cls, enum.Enum)}
        return {cls for cls in found if is_users(cls.__module__)}

    def _write_around(self, writer: Writer) -> list[Any]:
        """Values of the user's classes and modules, where they are small or have changed."""
        found = []
        for place, value in _around(self._classes(writer), self._strategy).items():
            before, digest = self._before.get(place, (None, None))
            now = _digest(self._known, value, place)
            if now == digest and (now is None or now[1] > _SMALL) and value is before:
                continue
            found.append([place, writer.write(value, place)])
        return found


def try_out(memory: StrategyMemory, second: Strategy) -> str | None:
    """Restore a strategy's memory into a second one; name what comes back otherwise, or None."""
    with seeded(0):  # for what is drawn meanwhile
        return memory.differs(second)


def _write_root(writer: Writer, strategy: Strategy) -> Any:
    """Write a strategy: all attributes of a foreign one, of ours what is beside the State."""
    if says_what_to_keep(type(strategy)):
        return {"said": writer.write(strategy.state_dict(), "state_dict()")}  # type: ignore[attr-defined]
    one_half = [n for n in ("state_dict", "load_state_dict") if hasattr(strategy, n)]
    if len(one_half) == 1:
        writer.unheld.append(Unheld(one_half[0], "one of state_dict and load_state_dict only"))
    if not is_ours(strategy):
        writer.nodes.append(["self"])
        writer._seen[id(strategy)] = len(writer.nodes) - 1
        return {"attributes": writer._attributes(strategy, "")}
    if not is_users(type(strategy).__module__):
        return None
    writer.nodes.append(["self"])
    writer._seen[id(strategy)] = len(writer.nodes) - 1
    odd = {n: v for n, v in state_fields(strategy).items() if not _is_plain(v)}
    own = {n: v for n, v in vars(strategy).items() if n not in SESSION_FIELDS}
    fields = [[n, writer.write(v, f"state.{n}")] for n, v in odd.items()]
    return {"fields": fields, "attributes": [[n, writer.write(v, n)] for n, v in own.items()]}


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


# --- what lies around a strategy: values of its classes, and of modules that its methods name ---


def _around(classes: set[type], strategy: Strategy) -> dict[str, Any]:
    """Values by place, `class MODULE:NAME attribute` or `module MODULE name`."""
    if says_what_to_keep(type(strategy)):
        return {}
    found: dict[str, Any] = {}
    for cls in sorted(classes, key=label_of):
        for name, value in vars(cls).items():
            if not name.startswith("__") and name != "_abc_impl" and _is_data(value):
                found[f"class {label_of(cls)} {name}"] = value
        for function in vars(cls).values():
            names, scope = _names_in(function)
            module = scope.get("__name__", "")
            for name in sorted(names & scope.keys()) if is_users(module) else ():
                if _is_data(scope[name]):
                    found[f"module {module} {name}"] = scope[name]
    return found


def _names_in(function: Any) -> tuple[set[str], dict[str, Any]]:
    """The global names that a function of a class uses, and the module's values."""
    function = getattr(function, "__func__", function)
    function = function.fget if isinstance(function, property) else function
    if not isinstance(function, types.FunctionType):
        return set(), {}
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return names, function.__globals__


def _is_data(value: Any) -> bool:
    return not (
        callable(value)
        or hasattr(type(value), "__get__")
        or isinstance(value, types.ModuleType | logging.Logger)
    )


def _put(known: Known, place: str, value: Any) -> None:
    kind, owner, name = place.split(" ", 2)
    if kind == "class":
        cls = known.find(owner)
        if cls is not None:
            setattr(cls, name, value)
    else:
        module = sys.modules.get(owner)
        if module is not None and is_users(owner):
            setattr(module, name, value)


def _digest(known: Known, value: Any, place: str) -> tuple[str, int] | None:
    """The hash and size of a value; None of what cannot be held."""
    writer = Writer(known)
    try:
        root = writer.write(value, place)
    except UnheldError:
        return None
    if writer.unheld or writer.fixed:
        return None
    digest = hashlib.sha256(json.dumps([root, writer.nodes]).encode())
    for tensor in writer.tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest(), sum(t.nbytes for t in writer.tensors)


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
