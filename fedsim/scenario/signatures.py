"""A factory's keyword arguments are its scenario schema: checked and completed before the call."""

import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError

from fedsim.basics.errors import ScenarioError, nearest, show, unknown

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "a table",
    "sequence_type": "a list",
    "string_type": "a string",
    "tuple_type": "a list",
}

_WORDING = (
    ("Input should be", "must be"),
    ("List should have", "must have"),
    (" after validation", ""),
    ("Value error, ", ""),
    ("greater than or equal to", ">="),
    ("less than or equal to", "<="),
    ("greater than", ">"),
    ("less than", "<"),
)


class Key(NamedTuple):
    """One scenario key of a factory.

    Attributes:
        name: The key.
        annotation: The type that its values have.
        required: Whether a scenario must give it.
        default: What it is otherwise; None when required.
        description: What the factory's docstring says of it.
    """

    name: str
    annotation: Any
    required: bool
    default: Any
    description: str

    @property
    def type_name(self) -> str:
        """The type in words of the Python language, such as `float | None`."""
        return _type_name(self.annotation)


_OURS = ("fedsim", "strategies", "clients")
# keys of factories of fedsim's own: a scenario asks for the same some twenty times
_KNOWN: WeakKeyDictionary[Callable[..., Any], dict[tuple[frozenset[str], bool], dict[str, Key]]] = (
    WeakKeyDictionary()
)


def keys(
    factory: Callable[..., Any], *, skip: Collection[str] = (), foreign: bool = False
) -> dict[str, Key]:
    """Return the scenario keys of a factory by name, in the order of its signature.

    Args:
        factory: A class or function.
        skip: Arguments which the caller passes itself.
        foreign: Take every argument that can be given by name, and not the keyword-only ones alone:
            for factories from outside, which do not know that rule.

    Returns:
        The keys; an argument whose type or default has no TOML value (a function, a class) is left
        out if it has a default.
    """
    if getattr(factory, "__module__", "").partition(".")[0] not in _OURS:
        return _read(factory, skip, foreign=foreign)  # a user's may be altered in a notebook
    known = _KNOWN.setdefault(factory, {})
    asked = frozenset(skip), foreign
    if asked not in known:
        known[asked] = _read(factory, skip, foreign=foreign)
    return dict(known[asked])


def _read(factory: Callable[..., Any], skip: Collection[str], *, foreign: bool) -> dict[str, Key]:
    kinds: tuple[Any, ...] = (inspect.Parameter.KEYWORD_ONLY,)
    if foreign:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    described = _argument_descriptions(factory)
    found = {}
    for name, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        if parameter.kind not in kinds or name in skip:
            continue
        required = parameter.default is inspect.Parameter.empty
        untyped = parameter.annotation is inspect.Parameter.empty
        annotation = Any if untyped else parameter.annotation
        if not required and (
            _mentions_callable(annotation) or not _has_toml_value(annotation, parameter.default)
        ):
            continue
        default = None if required else parameter.default
        found[name] = Key(name, annotation, required, default, described.get(name, ""))
    return found


def check(
    factory: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    where: str,
    owner: str = "",
    skip: Collection[str] = (),
    foreign: bool = False,
    beside: Collection[str] = (),
) -> dict[str, Any]:
    """Hold keyword arguments against a factory's signature and fill in the defaults.

    Args:
        factory: A class or function.
        arguments: What the scenario gives.
        where: Begins every message, such as "scenarios/fedau.toml: [strategy]".
        owner: What to call the factory in messages; its own name by default.
        skip: Arguments which the caller passes itself; in a scenario they are unknown keys.
        foreign: See `keys`.
        beside: Further keys of the same table that the caller has taken out, to be proposed when a
            key is unknown.

    Returns:
        A complete, JSON-able table: the values given (integers become floats where the type is
        float), then the defaults, in the order of the signature.

    Raises:
        ScenarioError: One line for every key that is unknown, missing or of another type.

    Example:
        >>> def fedau(*, cutoff: int = 50, server_lr: float = 1.0): ...
        >>> check(fedau, {"server_lr": 2}, where="[strategy]")
        {'cutoff': 50, 'server_lr': 2.0}
        >>> check(fedau, {"cutof": 2}, where="[strategy]")
        Traceback (most recent call last):
        ...
        fedsim.basics.errors.ScenarioError: [strategy] 'cutof' is not a key of fedau; did you mean \
'cutoff'? allowed: cutoff, server_lr
    """
    owner = owner or f"a key of {getattr(factory, '__name__', 'it')}"
    schema = keys(factory, skip=skip, foreign=foreign)
    problems = [
        f"{where} {unknown(name, owner, [*beside, *schema])}"
        for name in arguments
        if name not in schema
    ]
    table: dict[str, Any] = {}
    for key in schema.values():
        if key.name in arguments:
            try:
                table[key.name] = check_value(key.annotation, arguments[key.name])
            except ScenarioError as error:
                problems.append(f"{where} {key.name}{error}")
        elif key.required:
            problems.append(f"{where} '{key.name}' is missing: give {_a(key.type_name)}")
        else:
            table[key.name] = _adapter(key.annotation).dump_python(
                key.default, mode="json", warnings=False
            )
    if problems:
        raise ScenarioError("\n".join(problems))
    return table


def _a(type_name: str) -> str:
    """A type's name after its article; `Any` is anything at all."""
    if type_name == "Any":
        return "a value"
    return f"{'an' if type_name[0] in 'aeiou' else 'a'} {type_name}"


def check_value(annotation: Any, value: Any) -> Any:
    """Return a TOML value as the JSON-able value of a type, or say why it is none.

    Raises:
        ScenarioError: If the value has another type; the message goes on after the key's name.

    Example:
        >>> check_value(float, 1)
        1.0
        >>> check_value(float, "0.1")
        Traceback (most recent call last):
        ...
        fedsim.basics.errors.ScenarioError:  = "0.1": must be a number
    """
    shown = show(value)
    if bad := find_unusable(value):
        raise ScenarioError(f" = {shown}: {bad}")
    adapter = _adapter(annotation)
    try:
        # JSON mode is strict about types and still takes a list for a tuple and text for a path.
        parsed = adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        if len(details) > 1 and _is_union(annotation):
            raise ScenarioError(f" = {shown}: must be {_type_name(annotation)}") from None
        first = details[0]
        if first["type"] in ("missing", "too_long", "too_short"):  # of a list of fixed length
            raise ScenarioError(f" = {shown}: must be {_type_name(annotation)}") from None
        place = "".join(f"[{part!r}]" for part in first["loc"])
        raise ScenarioError(f"{place} = {show(first['input'])}: {reason(first)}") from None
    return adapter.dump_python(parsed, mode="json", warnings=False)


def reason(detail: ErrorDetails) -> str:
    """Turn one finding of pydantic into our words.

    Example:
        >>> try:
        ...     TypeAdapter(int).validate_python("x", strict=True)
        ... except ValidationError as error:
        ...     print(reason(error.errors()[0]))
        must be an integer
    """
    if detail["type"] in _EXPECTED:
        return f"must be {_EXPECTED[detail['type']]}"
    message = detail["msg"]
    for theirs, ours in _WORDING:
        message = message.replace(theirs, ours)
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))
        guess = nearest(str(detail["input"]), allowed)
        return f"{message}; did you mean '{guess}'?" if guess else message
    return message[:1].lower() + message[1:]


def find_unusable(value: Any) -> str | None:
    """Say what in a TOML value no scenario can mean (a date, nan, an infinity), or return None.

    Example:
        >>> find_unusable([1.0, float("nan")])
        'must be a finite number'
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must fit into 64 bits, as TOML's integers do"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(find_unusable, value)), None)
    if value is None or isinstance(value, str | bool | int | float):
        return None
    kind = type(value).__name__
    return f"a {kind} has no meaning in a scenario; must be a number or text in quotes"


def summary_line(factory: Any) -> str:
    """Return the first line of a docstring, without its full stop.

    Example:
        >>> summary_line(summary_line)
        'Return the first line of a docstring, without its full stop'
    """
    text = inspect.getdoc(factory) or ""
    return text.split("\n", 1)[0].strip().rstrip(".")


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _type_name(annotation: Any) -> str:
    if _is_union(annotation):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(show(choice) for choice in typing.get_args(annotation))
    text = "None" if annotation is types.NoneType else inspect.formatannotation(annotation)
    return re.sub(r"\b(typing|pathlib|collections\.abc)\.", "", text)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _mentions_callable(annotation: Any) -> bool:
    if annotation is Callable or typing.get_origin(annotation) is Callable:
        return True
    return any(_mentions_callable(part) for part in typing.get_args(annotation))


def _has_toml_value(annotation: Any, default: Any) -> bool:
    """Whether a default can stand in a scenario: a class, a function or a tensor cannot."""
    if callable(default):
        return False
    try:
        _adapter(annotation).dump_python(default, mode="json", warnings=False)
    except (PydanticSerializationError, ValueError, TypeError):
        return False
    return True


def _argument_descriptions(factory: Any) -> dict[str, str]:
    """Read the `Args:` section of a Google docstring."""
    documented = [inspect.getdoc(factory) or ""]
    if inspect.isclass(factory):
        documented.append(inspect.getdoc(factory.__init__) or "")
    found: dict[str, str] = {}
    for text in documented:
        _, _, section = text.partition("\nArgs:\n")
        name = None
        for line in section.splitlines():
            if line and not line.startswith(" "):
                break
            if start := re.match(r"    (\w+):\s+(.*)", line):
                name = start[1]
                found[name] = start[2]
            elif name and line.strip():
                found[name] += " " + line.strip()
    return found
