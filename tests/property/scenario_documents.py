"""Scenarios as hypothesis draws them: from what discovery finds, whatever that comes to be.

A document is what a TOML file holds, as nested dicts. `documents` draws plausible ones: every value
has the type that its key asks for. `broken` draws one and does something wrong to it.
"""

import datetime
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from hypothesis import strategies as st

from fedsim.basics.errors import show
from fedsim.scenario import discovery, tables
from fedsim.scenario.choice import Choice
from fedsim.scenario.expectations import METRIC_PHASES

# table: (kind of thing in discovery, key that names one, whether a scenario must have the table)
FACTORY_TABLES = {
    "task": ("models", "model"),
    "data": ("datasets", "name"),
    "partition": ("partitions", "kind"),
    "participation": ("participation", "kind"),
    "strategy": ("strategies", "name"),
    "client": ("clients", "name"),
    "attack": ("attacks", "kind"),
    "topology": ("topologies", "kind"),
}
FIXED_TABLES = {**tables.FIXED_TABLES, **tables.OPTIONAL_FIXED}
MUST_HAVE = ("data", "partition")
HEAD = tuple(tables.Head.model_fields)

Document = dict[str, Any]


# TOML.


def to_toml(document: Mapping[str, Any]) -> str:
    """Write a document as TOML: one key per line, tables within tables inline."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in document.items() if not isinstance(v, dict)]
    for name, table in document.items():
        if isinstance(table, dict):
            lines.append(f"[{_key(name)}]")
            lines += [f"{_key(key)} = {_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _key(text: str) -> str:
    return text if text.isascii() and text.isidentifier() else _string(text)


def _string(text: str) -> str:
    # JSON's strings are TOML's, except for DEL
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(value)
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)


# Plausible documents.


def values(annotation: Any, *, careful: bool) -> st.SearchStrategy[Any]:
    """Small values of a key's type, as TOML has them; careful ones are within most ranges."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)

    def each(part: Any) -> st.SearchStrategy[Any]:
        return values(part, careful=careful)

    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([each(a) for a in arguments if a is not types.NoneType])
    if origin is tuple and Ellipsis not in arguments:
        return st.tuples(*map(each, arguments)).map(list)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(words(), each(arguments[1]), max_size=2)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return st.lists(each(arguments[0]), min_size=int(careful), max_size=4)
    reals = [0.25, 0.5, 0.75] if careful else [0.0, 0.05, 0.25, 0.5, 0.9, 1.0, 2.0]
    return {
        bool: st.booleans(),
        int: st.integers(1, 6) if careful else st.integers(0, 12),
        float: st.sampled_from(reals) | (st.nothing() if careful else st.integers(0, 3)),
        str: words(),
    }.get(annotation, st.just(1))


def words() -> st.SearchStrategy[str]:
    """Texts of any kind, paths among them."""
    return st.text("abcdef_-/.0", min_size=1, max_size=8)


@st.composite
def factory_table(
    draw: st.DrawFn, table: str, choices: Sequence[str], *, careful: bool
) -> Document:
    """A table that names a factory, with some of its keys."""
    kind, selector = FACTORY_TABLES[table]
    choice = draw(st.sampled_from(choices))
    found = {selector: choice}
    for key in schema(kind, choice).values():
        if key.required or draw(st.integers(0, 5)) == 0:
            found[key.name] = draw(values(key.annotation, careful=careful))
    return found


@st.composite
def fixed_table(draw: st.DrawFn, model: Any, *, careful: bool) -> Document:
    """A table of fixed keys, with some of them."""
    found = {}
    for key, field in model.model_fields.items():
        if draw(st.integers(0, 5)) == 0:
            parts = (field.annotation, *typing.get_args(field.annotation))
            inner = next((part for part in parts if hasattr(part, "model_fields")), None)
            if inner is None:
                found[key] = draw(values(field.annotation, careful=careful))
            else:
                found[key] = draw(fixed_table(inner, careful=careful))
    return found


schema = functools.cache(discovery.schema)


@functools.cache
def choices_of(table: str) -> list[str]:
    """What a table can name."""
    kind, _ = FACTORY_TABLES[table]
    return discovery.names(kind) + (discovery.flower_names() if kind == "strategies" else [])


@st.composite
def documents(
    draw: st.DrawFn, *, careful: bool, only: Mapping[str, Sequence[str]] | None = None
) -> Document:
    """A scenario whose values have the right types; what they say may still be impossible.

    Args:
        draw: Given by hypothesis.
        careful: Whether values are kept within what most keys allow.
        only: What a table may name, by table; everything that it can without an entry.
    """
    document: Document = {"rounds": draw(st.integers(1, 5)), "seed": draw(st.integers(0, 3))}
    if draw(st.integers(0, 3)) == 0:
        document["title"] = draw(st.text(st.characters(codec="utf-8"), max_size=10))
        document["tier"] = draw(st.sampled_from(["fast", "slow", "gpu", "deploy"]))
    for table in FACTORY_TABLES:
        if table in MUST_HAVE or draw(st.integers(0, 3)) == 0:
            choices = (only or {}).get(table) or choices_of(table)
            document[table] = draw(factory_table(table, choices, careful=careful))
    if careful and "topology" in document:
        name = document.get("strategy", {}).get("name", "fedavg")
        if not Choice("strategies", {"name": name}).takes(discovery.TOPOLOGY):
            del document["topology"]
    for table, model in FIXED_TABLES.items():
        if draw(st.integers(0, 3)) == 0:
            document[table] = draw(fixed_table(model, careful=careful))
    if draw(st.integers(0, 3)) == 0:
        metric = st.sampled_from([f"{phase}/loss" for phase in METRIC_PHASES])
        claim = st.fixed_dictionaries({"min": st.just(0.5)}, optional={"last": st.integers(1, 3)})
        document["expect"] = draw(st.dictionaries(metric, claim, max_size=2))
    return document


# What can be wrong with them.


class Wrong(NamedTuple):
    """A document with something wrong in it.

    Attributes:
        document: The document.
        parts: What some line of the refusal must hold, all of them.
        certain: Whether it must be refused; a huge number or a strange text may be right.
    """

    document: Document
    parts: tuple[str, ...]
    certain: bool = True


UNUSABLE = [
    math.nan, math.inf, -math.inf, datetime.date(1979, 5, 27), datetime.time(7, 32),
    datetime.datetime(1979, 5, 27, 7, 32),
]  # fmt: skip
ODD = [
    True, -1, 0, 7, 2**31, 2**63, 10**9, 10**20, -0.5, 1e-300, 1e300, 2.5, "", "x", "a:b", "fedavg",
    "\u0000", "\u2028", "\U0001f600", "~", "../..", "x" * 300, [], [1], [[1]], ["a"], [1, "a"], {},
    {"kind": 1}, {"a": {"b": [1]}},
]  # fmt: skip


@st.composite
def broken(draw: st.DrawFn) -> Wrong:
    """A document in which one thing is wrong, or strange."""
    document = draw(documents(careful=True))
    how = draw(st.sampled_from(_BREAKS))
    return draw(how(document))


@st.composite
def misspelt_table(draw: st.DrawFn, document: Document) -> Wrong:
    right = draw(st.sampled_from([name for name in document if len(name) > 3]))
    wrong = draw(misspelt(right, ALL_TABLES))
    return Wrong(
        {wrong if name == right else name: value for name, value in document.items()},
        (f"'{wrong}' is not a", *proposal(wrong, right, ALL_TABLES), "allowed: "),
    )


@st.composite
def misspelt_key(draw: st.DrawFn, document: Document) -> Wrong:
    table = draw(st.sampled_from([name for name in document if name in TABLES]))
    allowed = allowed_keys(table, document[table])
    right = draw(st.sampled_from(allowed))
    wrong = draw(misspelt(right, allowed))
    content = {key: value for key, value in document[table].items() if key != right}
    parts = (f"[{table}] '{wrong}' is not a", "allowed: ", *proposal(wrong, right, allowed))
    return Wrong(_with(document, table, {**content, wrong: 1}), parts)


@st.composite
def misspelt_choice(draw: st.DrawFn, document: Document) -> Wrong:
    table = draw(st.sampled_from(sorted(FACTORY_TABLES)))
    selector = FACTORY_TABLES[table][1]
    allowed = choices_of(table)
    right = draw(st.sampled_from(allowed))
    wrong = draw(misspelt(right, allowed))
    return Wrong(
        _with(document, table, {selector: wrong}),
        (f"[{table}] ", f"'{wrong}'", *proposal(wrong, right, allowed)),
    )


@st.composite
def unusable_value(draw: st.DrawFn, document: Document) -> Wrong:
    table, key = draw(places(document))
    value = draw(st.sampled_from(UNUSABLE))
    return Wrong(
        _set(document, table, key, value),
        (_where(table) + key, show(value)),
    )


@st.composite
def odd_value(draw: st.DrawFn, document: Document) -> Wrong:
    table, key = draw(places(document))
    return Wrong(_set(document, table, key, draw(st.sampled_from(ODD))), (), certain=False)


@st.composite
def table_of_no_table(draw: st.DrawFn, document: Document) -> Wrong:
    table = draw(st.sampled_from(TABLES))
    value = draw(st.sampled_from([value for value in ODD if not isinstance(value, dict)]))
    return Wrong(
        {table: value, **{k: v for k, v in document.items() if k != table}},
        (f"[{table}] = {show(value)}: must be a table",),
    )


@st.composite
def empty_table(draw: st.DrawFn, document: Document) -> Wrong:
    table = draw(st.sampled_from(("data", "partition", "attack")))  # without a default choice
    selector = FACTORY_TABLES[table][1]
    return Wrong(_with(document, table, {}), (f"[{table}] '{selector}' is missing; allowed: ",))


@st.composite
def missing_table(draw: st.DrawFn, document: Document) -> Wrong:
    table = draw(st.sampled_from(MUST_HAVE))
    return Wrong(
        {name: value for name, value in document.items() if name != table},
        (f"[{table}] '{FACTORY_TABLES[table][1]}' is missing; allowed: ",),
    )


@st.composite
def strange_key(draw: st.DrawFn, document: Document) -> Wrong:
    table = draw(st.sampled_from(["", *(name for name in document if name in TABLES)]))
    key = draw(st.text(st.characters(codec="utf-8"), max_size=6)) + "?"
    if not table:
        return Wrong({key: 1, **document}, ("is not a key of a scenario", "allowed: "))
    return Wrong(_with(document, table, {**document[table], key: 1}), (f"[{table}] ", "allowed: "))


_BREAKS = (
    misspelt_table, misspelt_key, misspelt_choice, unusable_value, odd_value, odd_value,
    table_of_no_table, empty_table, missing_table, strange_key,
)  # fmt: skip
TABLES = [*FACTORY_TABLES, *FIXED_TABLES]
ALL_TABLES = [*HEAD, *TABLES, "expect"]


def allowed_keys(table: str, content: Mapping[str, Any]) -> list[str]:
    """The keys that a table may have."""
    if table in FIXED_TABLES:
        return list(FIXED_TABLES[table].model_fields)
    kind, selector = FACTORY_TABLES[table]
    beside = ("dtype",) if table == "task" else ()
    return [selector, *beside, *schema(kind, content[selector])]


def places(document: Document) -> st.SearchStrategy[tuple[str, str]]:
    """Where a value stands or could stand: (table, key); the head is the table ""."""
    found = [("", key) for key in HEAD]
    for table in TABLES:
        if table in document:
            found += [(table, key) for key in document[table]]
            found += [(table, key) for key in allowed_keys(table, document[table])]
    return st.sampled_from(found)


@st.composite
def misspelt(draw: st.DrawFn, word: str, allowed: Sequence[str]) -> str:
    """A word with one letter too many or too few, another letter, or two that changed places."""
    at = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from("aeqxz_"))
    wrong = draw(
        st.sampled_from(
            [
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at:],
                word[:at] + letter + word[at + 1 :],
                word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            ]
        )
    )
    return wrong if wrong and wrong not in allowed else f"{word}x"


def proposal(wrong: str, right: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """What a refusal must propose: the right name, unless another one is nearly as near."""
    others = [distance(wrong, other) for other in allowed if other != right]
    near = distance(wrong, right)
    if len(right) < 4 or min(others, default=9) <= near + 1:
        return ()
    return (f"did you mean '{right}'?",)


def distance(a: str, b: str) -> int:
    """Levenshtein's: the letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _with(document: Document, table: str, content: Document) -> Document:
    return {**document, table: content}


def _set(document: Document, table: str, key: str, value: Any) -> Document:
    if not table:
        return {key: value, **{k: v for k, v in document.items() if k != key}}
    return _with(document, table, {**document[table], key: value})


def _where(table: str) -> str:
    return f"[{table}] " if table else ""
