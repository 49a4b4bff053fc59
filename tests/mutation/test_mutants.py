"""What the mutation run changes, and what it says of it."""

import ast

import pytest

from tests.mutation.mutants import mutants, spread
from tests.mutation.report import Fate, report

SOURCE = '''
"""A number like 7 in a docstring is nothing that runs."""
from typing import ClassVar
import math


class Rule:
    declared: ClassVar[tuple[float, ...]] = (1e-12,)

    def half(self, x: "int | None", rows) -> float:
        assert x is not None
        if not 0 < x:
            raise ValueError(f"x = {x + 1}: must be > 0")
        rows[0] = math.floor(x) if x == 3 else -x
        return torch.where(x > 1, x / 2, rows.sum())
'''


def test_every_mutant_is_another_program_with_one_change():
    found = mutants(SOURCE)
    before = ast.dump(ast.parse(SOURCE))
    programs = {ast.dump(ast.parse(each.applied(SOURCE))) for each in found}
    assert before not in programs
    assert len(programs) == len(found)
    for each in found:
        old, new = SOURCE.splitlines(), each.applied(SOURCE).splitlines()
        assert len(old) == len(new)
        assert [n for n, pair in enumerate(zip(old, new, strict=True), 1) if len({*pair}) > 1] == [
            each.line
        ]
        assert (each.before, each.after) == (old[each.line - 1].strip(), new[each.line - 1].strip())


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("operator", "if not 0 <= x:"),
        ("number", "if not 1 < x:"),
        ("sign", "if (0 < x):"),
        ("left out", "pass"),
        ("name", "rows[0] = math.ceil(x) if x == 3 else -x"),
        ("operator", "rows[0] = math.floor(x) if x != 3 else -x"),
        ("sign", "rows[0] = math.floor(x) if x == 3 else (x)"),
        ("operator", "return torch.where(x > 1, x * 2, rows.sum())"),
        ("arguments", "return torch.where(x > 1, rows.sum(), x / 2)"),
        ("name", "return torch.where(x > 1, x / 2, rows.mean())"),
    ],
)
def test_slips_of_the_pen_are_among_them(kind, after):
    assert (kind, after) in {(each.kind, each.after) for each in mutants(SOURCE)}


def test_what_does_not_run_is_left_alone():
    lines = {each.before for each in mutants(SOURCE)}
    assert not any(word in line for line in lines for word in ("docstring", "ClassVar", "assert"))
    assert all(each.after == "pass" for each in mutants(SOURCE) if "raise" in each.before)


def test_some_are_taken_from_top_to_bottom():
    found = mutants(SOURCE)
    some = spread(found, 5)
    assert len(some) == len(set(some)) == 5
    assert some == sorted(some, key=found.index)
    assert some[0] == found[0]
    assert found.index(some[-1]) >= len(found) * 3 / 4
    assert spread(found, 1000) == found


def fates(noticed, survive, **changes):
    one = {"strategy": "rule", "of": 99, "line": 7, "kind": "sign", "before": "-x", "after": "(x)"}
    one |= changes
    return [Fate(**one, noticed="tests")] * noticed + [Fate(**one, noticed=None)] * survive


def test_the_report_is_content_with_nine_of_ten_and_reasons():
    reasons = {"rule": {"-x -> (x)": "x is 0 there"}}
    found = report(fates(19, 1), reasons)
    assert found.content
    assert "| `rule` | 20 of 99 | 0 | 19 | 1 | 95% |" in found.text
    assert "| `rule` | `-x` | `(x)` | x is 0 there |" in found.text
    assert not report(fates(17, 3), reasons).content  # 85 %
    assert not report(fates(10, 0), reasons).content  # too few to say
    without = report(fates(19, 1), {})
    assert not without.content
    assert "**no reason yet**" in without.text
