"""Holding a scenario's document against what its tables and factories allow.

Every problem is collected, one line each, with file, table and key.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedsim.basics.errors import (
    show,
    unknown,
)
from fedsim.scenario import signatures
from fedsim.scenario.combinations import check_claims, check_combinations, check_metric
from fedsim.scenario.expectations import Expectation
from fedsim.scenario.factory_tables import factory_tables
from fedsim.scenario.problems import ScenarioProblems
from fedsim.scenario.tables import (
    FACTORY_TABLES,
    FIXED_TABLES,
    NESTED,
    OPTIONAL_FIXED,
    OPTIONAL_TABLES,
    Head,
)


def validated(document: Mapping[str, Any], *, origin: str, folder: Path | None) -> dict[str, Any]:
    """Validate a whole document.

    Args:
        document: The scenario's keys and tables.
        origin: What messages call it.
        folder: Where relative paths are looked up first, or None.

    Returns:
        The scenario's fields by name, `origin` and `choices` among them, complete with defaults.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    problems = ScenarioProblems(origin, tables)
    allowed = [
        *Head.model_fields, *FACTORY_TABLES, *OPTIONAL_TABLES, *FIXED_TABLES, *OPTIONAL_FIXED,
        "expect",
    ]  # fmt: skip
    for key, value in document.items():
        if key not in allowed:
            what = "a table of a scenario" if isinstance(value, dict) else "a key of a scenario"
            problems.add(unknown(key, what, allowed))
        elif key not in Head.model_fields and not isinstance(value, dict):
            problems.add(f"[{key}] = {show(value)}: must be a table")

    given = {key: document[key] for key in Head.model_fields if key in document}
    head = _fixed(problems, Head, given, where="")
    fixed = {
        name: _fixed(problems, model, tables.get(name, {}), where=f"[{name}] ")
        for name, model in (FIXED_TABLES | OPTIONAL_FIXED).items()
    }
    for name, model in OPTIONAL_FIXED.items():
        if fixed[name] == model():  # says nothing
            fixed[name] = None
    expect = _expectations(problems, tables.get("expect", {}))
    task, choices = factory_tables(problems, tables, folder)
    check_combinations(problems, choices, fixed)
    check_claims(problems, expect, fixed["evaluation"], choices.get("strategy"))
    problems.raise_any()
    absent: dict[str, Any] = {name: {} for name in OPTIONAL_TABLES}
    made = {"task": task, **absent, **{name: choice.table for name, choice in choices.items()}}
    return {
        **dict(head or {}), **made, **fixed, "expect": expect, "origin": origin, "choices": choices
    }  # fmt: skip


def _fixed(
    problems: ScenarioProblems, model: type[BaseModel], table: Mapping[str, Any], *, where: str
) -> Any | None:
    if bad := signatures.find_unusable(table):
        name = next(key for key, value in table.items() if signatures.find_unusable(value))
        problems.add(f"{where}{name} = {show(table[name])}: {bad}")
        return None
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.add(where + _finding(model, detail, where))
    return None


def _finding(model: type[BaseModel], detail: ErrorDetails, where: str) -> str:
    """Word one finding about a fixed table."""
    *parents, key = [str(part) for part in detail["loc"]] or [""]
    owner: type[BaseModel] = model
    for parent in parents:
        owner = NESTED.get(parent, owner)
    place = ".".join([*parents, key])
    if detail["type"] == "extra_forbidden":
        if where.endswith('" '):  # a claim: [expect] "metric"
            return unknown(key, f"a key of {where.strip()}", owner.model_fields)
        table = ".".join(filter(None, [where.strip(" []"), *parents]))
        return unknown(key, f"a key of [{table}]", owner.model_fields)
    if detail["type"] == "missing":
        return f"'{place}' is missing"
    words = signatures.reason(detail)
    if not place:
        return words
    if detail["type"] == "value_error":
        return f"{place} {words}"
    return f"{place} = {show(detail['input'])}: {words}"


def _expectations(problems: ScenarioProblems, table: Mapping[str, Any]) -> dict[str, Expectation]:
    expect = {}
    for metric, claim in table.items():
        where = f'[expect] "{metric}" '
        check_metric(problems, metric, where="[expect]")
        if not isinstance(claim, dict):
            problems.add(f"{where}= {show(claim)}: must be a table such as {{ min = 0.9 }}")
            continue
        found = _fixed(problems, Expectation, claim, where=where)
        if found is not None:
            expect[metric] = found
    return expect
