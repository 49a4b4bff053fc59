"""A graph of `fedsim.strategy.held.writing` made objects again, in a new object of the same making.

What hangs at the same place in the new object is taken up in place where it is of the same class;
else it is made anew without calling its class, which is looked up and never imported.
"""

import array
import collections
import functools
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.strategy.held import values
from fedsim.strategy.held.trust import Known, label_of
from fedsim.strategy.held.values import UnheldError

_RECORDS = {cls.__name__: cls for cls in (ArrayRecord, MetricRecord, ConfigRecord, RecordDict)}
_MISSING = object()
_WORKING = object()


class Reader:
    """Reads values of one graph.

    Args:
        nodes: The graph's nodes.
        tensors: Its tensors.
        known: The classes and functions that may be looked up.
        beside: Whether the object that was written is still in use in this process: what both share
            then stays as it is.
    """

    def __init__(
        self,
        nodes: Sequence[Any],
        tensors: Sequence[Tensor],
        known: Known,
        *,
        beside: bool = False,
    ) -> None:
        self._nodes, self._tensors, self._known = nodes, tensors, known
        self._beside = beside
        self._built: dict[int, Any] = {}
        self._taken: set[int] = set()  # objects that are one node's already

    def read(self, value: Any, there: Any = _MISSING) -> Any:
        """Return the value of a JSON value.

        Args:
            value: As `Writer.write` gave it.
            there: What hangs at its place in the new object.

        Raises:
            UnheldError: If it cannot be made here.
        """
        if not isinstance(value, dict):
            return value
        place = value["@"]
        found = self._built.get(place, _MISSING)
        if found is _WORKING:
            raise UnheldError("an object inside of itself")
        if found is _MISSING:
            self._built[place] = _WORKING
            kind, *parts = self._nodes[place]
            found = self._built[place] = _READERS[kind](self, place, parts, there)
        return found

    def begin(self, owner: object) -> None:
        """Take the first node for the object that all hangs on."""
        self._built[0] = owner
        self._taken.add(id(owner))

    def _read_all(self, items: Sequence[Any], there: Any) -> list[Any]:
        beside = list(there) if isinstance(there, list | tuple | collections.deque) else []
        beside += [_MISSING] * (len(items) - len(beside))
        return [self.read(item, old) for item, old in zip(items, beside, strict=False)]

    # --- numbers --------------------------------------------------------------------------

    def _plain(self, place: int, parts: list[Any], there: Any) -> Any:
        name, given = parts
        return values.UNPACK[name](given)

    def _array(self, place: int, parts: list[Any], there: Any) -> np.ndarray:
        about, content = parts
        return values.unpack_array(about, self._tensors[content])

    def _view(self, place: int, parts: list[Any], there: Any) -> np.ndarray:
        root, (dtype, shape, strides, start) = parts
        whole = self.read(root)
        return np.ndarray(tuple(shape), dtype, whole, start, tuple(strides))

    def _objects(self, place: int, parts: list[Any], there: Any) -> np.ndarray:
        shape, items = parts
        made = np.empty(shape, dtype=object)
        made.reshape(-1)[:] = self.read(items)
        return made

    def _scalar(self, place: int, parts: list[Any], there: Any) -> Any:
        about, content = parts
        return values.unpack_array(about, self._tensors[content])[()]

    def _memory(self, place: int, parts: list[Any], there: Any) -> Tensor:
        device, content = parts
        memory: Tensor = self._tensors[content].clone().to(device)
        return memory

    def _tensor(self, place: int, parts: list[Any], there: Any) -> Tensor:
        memory, dtype, (shape, stride, offset), parameter, needs_grad, grad = parts
        storage = self.read(memory).untyped_storage()
        kind = getattr(torch, dtype.partition(".")[2])
        made = torch.empty(0, dtype=kind, device=storage.device)
        made = made.set_(storage, offset, shape, stride)
        if parameter:
            made = torch.nn.Parameter(made, requires_grad=needs_grad)
        elif needs_grad:
            made.requires_grad_()
        if grad is not None:
            made.grad = self.read(grad)
        return made

    # --- generators -----------------------------------------------------------------------

    def _bits(self, place: int, parts: list[Any], there: Any) -> Any:
        name, seeds, state = parts
        return values.unpack_bits(name, seeds, self.read(state))

    def _random_state(self, place: int, parts: list[Any], there: Any) -> Any:
        made = np.random.RandomState()
        made.set_state(self.read(parts[0]))
        return made

    def _torch_generator(self, place: int, parts: list[Any], there: Any) -> torch.Generator:
        device, content = parts
        return torch.Generator(device).set_state(self._tensors[content].clone())

    # --- containers -----------------------------------------------------------------------

    def _list(self, place: int, parts: list[Any], there: Any) -> list[Any]:
        made: list[Any] = []
        self._built[place] = made
        made.extend(self._read_all(parts[0], there))
        return made

    def _sequence(self, place: int, parts: list[Any], there: Any) -> Any:
        label, items, attributes = parts
        made = self._shell(place, label, _MISSING)
        list.extend(made, self._read_all(items, there))
        self._give(made, attributes, there)
        return made

    def _named_tuple(self, place: int, parts: list[Any], there: Any) -> Any:
        label, items = parts
        return tuple.__new__(self._class(label, there), self._read_all(items, there))

    def _fill(self, made: Any, items: list[Any], there: Any) -> None:
        for key, item in items:
            name = self.read(key)
            old = _MISSING
            if isinstance(there, dict) and isinstance(name, str | int):
                old = there.get(name, _MISSING)
            ordered = isinstance(made, collections.OrderedDict)
            put = collections.OrderedDict.__setitem__ if ordered else dict.__setitem__
            put(made, name, self.read(item, old))

    def _dict(self, place: int, parts: list[Any], there: Any) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        self._built[place] = made
        self._fill(made, parts[0], there)
        return made

    def _mapping(self, place: int, parts: list[Any], there: Any) -> Any:
        label, items, default, attributes = parts
        made = self._shell(place, label, _MISSING if type(there) is dict else there, fresh=True)
        if isinstance(made, collections.defaultdict):
            made.default_factory = self.read(default, getattr(there, "default_factory", _MISSING))
        self._fill(made, items, there)
        self._give(made, attributes, there)
        return made

    def _record(self, place: int, parts: list[Any], there: Any) -> Any:
        name, items = parts
        made = _RECORDS[name]()
        self._built[place] = made
        for key, item in items:
            made[key] = self.read(item)
        return made

    def _flower_array(self, place: int, parts: list[Any], there: Any) -> Array:
        about, content = parts
        return values.unpack_flower_array(about, self._tensors[content])

    # --- what has a name ------------------------------------------------------------------

    def _class(self, label: str, there: Any) -> Any:
        found = self._known.find(label)
        if found is None and label_of(type(there)) == label:
            found = type(there)
        if found is None:
            raise UnheldError(f"a {label.partition(':')[2]}")
        return found

    def _named(self, place: int, parts: list[Any], there: Any) -> Any:
        (label,) = parts
        found = self._known.find(label)
        if found is None and there is not _MISSING and label_of(there) == label:
            found = there
        if found is None:
            raise UnheldError(f"the function {label.partition(':')[2]}")
        return found

    def _fixed(self, place: int, parts: list[Any], there: Any) -> Any:
        return None if there is _MISSING else there

    def _function(self, place: int, parts: list[Any], there: Any) -> Any:
        label, cells, defaults, keywords, own = parts
        same = isinstance(there, types.FunctionType) and label_of(there) == label
        made = there if same else self._named(place, [label], there)
        self._built[place] = made
        if self._beside and self._known.find(label) is made:
            return made
        for cell, kept in zip(made.__closure__ or (), cells, strict=True):
            if kept is not None:
                cell.cell_contents = self.read(kept[0], _inside(cell))
        made.__defaults__ = self.read(defaults, made.__defaults__)
        made.__kwdefaults__ = self.read(keywords, made.__kwdefaults__)
        self._give(made, own, made)
        return made

    def _method(self, place: int, parts: list[Any], there: Any) -> Any:
        owner, name = parts
        return getattr(self.read(owner, getattr(there, "__self__", _MISSING)), name)

    def _partial(self, place: int, parts: list[Any], there: Any) -> Any:
        names = ("func", "args", "keywords")
        func, args, keywords = (
            self.read(part, getattr(there, name, _MISSING))
            for part, name in zip(parts, names, strict=True)
        )
        return functools.partial(func, *args, **keywords)

    def _namespace(self, place: int, parts: list[Any], there: Any) -> types.SimpleNamespace:
        made = self._built[place] = types.SimpleNamespace()
        self._give(made, parts[0], there)
        return made

    # --- objects --------------------------------------------------------------------------

    def _shell(self, place: int, label: str, there: Any, *, fresh: bool = False) -> Any:
        """The object of the new one's place, or a new one of that class, with nothing in it."""
        cls = self._class(label, there)
        if not fresh and type(there) is cls and id(there) not in self._taken:
            made = there
        else:
            made = cls.__new__(cls)
        self._taken.add(id(made))
        self._built[place] = made
        return made

    def _give(self, made: Any, attributes: list[Any], there: Any) -> None:
        if not attributes and not getattr(made, "__dict__", None):
            return
        before = dict(getattr(there, "__dict__", {}))
        given = {name: self.read(item, before.get(name, _MISSING)) for name, item in attributes}
        lost = {name for name, item in attributes if name not in before and self._is_fixed(item)}
        made.__dict__.clear()
        made.__dict__.update({name: v for name, v in given.items() if name not in lost})

    def _is_fixed(self, item: Any) -> bool:
        return isinstance(item, dict) and self._nodes[item["@"]][0] == "fixed"

    def _strategy(self, place: int, parts: list[Any], there: Any) -> Any:
        label, fields = parts
        made = self._shell(place, label, there)
        made.restore({name: self.read(item) for name, item in fields})
        return made

    def _said(self, place: int, parts: list[Any], there: Any) -> Any:
        label, state = parts
        cls = self._class(label, there)
        made = there if type(there) is cls and id(there) not in self._taken else cls()
        self._taken.add(id(made))
        self._built[place] = made
        made.load_state_dict(self.read(state))
        return made

    def _stated(self, place: int, parts: list[Any], there: Any) -> Any:
        label, state = parts
        made = self._shell(place, label, there)
        made.__setstate__(self.read(state))
        return made

    def _object(self, place: int, parts: list[Any], there: Any) -> Any:
        label, attributes, slots = parts
        made = self._shell(place, label, there)
        same = there if made is there or type(there) is type(made) else _MISSING
        self._give(made, attributes, same)
        self.give_slots(made, slots, same)
        return made

    def give_slots(self, made: Any, slots: Sequence[Any], there: Any) -> None:
        """Set an object's values in slots."""
        for name, item in slots:
            object.__setattr__(made, name, self.read(item, getattr(there, name, _MISSING)))


def _inside(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _of_all(make: Callable[[list[Any]], Any]) -> Callable[[Reader, int, list[Any], Any], Any]:
    return lambda reader, place, parts, there: make(reader._read_all(parts[0], there))


_READERS: dict[str, Callable[[Reader, int, list[Any], Any], Any]] = {
    "plain": Reader._plain,
    "array": Reader._array,
    "view": Reader._view,
    "objects": Reader._objects,
    "scalar": Reader._scalar,
    "memory": Reader._memory,
    "tensor": Reader._tensor,
    "bits": Reader._bits,
    "generator": lambda r, _, parts, t: np.random.Generator(r.read(parts[0])),
    "random state": Reader._random_state,
    "count": lambda r, _, parts, t: itertools.count(*parts[0]),
    "numbers": lambda r, _, parts, t: array.array(parts[0], parts[1]),
    "namespace": Reader._namespace,
    "seeds": lambda r, _, parts, t: values.unpack_seeds(parts[0]),
    "random": lambda r, _, parts, t: values.unpack_random(r.read(parts[0])),
    "torch generator": Reader._torch_generator,
    "list": Reader._list,
    "sequence": Reader._sequence,
    "tuple": _of_all(tuple),
    "named tuple": Reader._named_tuple,
    "dict": Reader._dict,
    "mapping": Reader._mapping,
    "set": _of_all(set),
    "frozenset": _of_all(frozenset),
    "deque": lambda r, _, parts, t: collections.deque(r._read_all(parts[0], t), parts[1]),
    "record": Reader._record,
    "flower array": Reader._flower_array,
    "numpy dtype": lambda r, _, parts, t: np.dtype(parts[0]),
    "member": lambda r, _, parts, t: r._class(parts[0], t)[parts[1]],
    "named": Reader._named,
    "fixed": Reader._fixed,
    "function": Reader._function,
    "method": Reader._method,
    "partial": Reader._partial,
    "strategy": Reader._strategy,
    "said": Reader._said,
    "stated": Reader._stated,
    "object": Reader._object,
}
