"""The worst-case grid: every attack and every rule is in it; what a rule does not bear is blank."""

import pytest

from benchmarks import robustness
from fedsim.aggregators import rules
from fedsim.federation.attacks.named import ATTACKS


def test_every_attack_and_every_rule_is_in_the_grid():
    assert {table["kind"] for table in robustness.ATTACKS.values()} == set(ATTACKS)
    assert {options["rule"] for options in robustness.RULES.values()} == set(rules())


@pytest.mark.parametrize("attack", ["IPM, 10", "backdoor (not fooled)"])
def test_a_row_holds_the_rules_that_bear_so_many(attack):
    row = robustness.row(attack, 3, seed=1, rounds=2)
    assert set(robustness.RULES) - set(row) == {"Bulyan"}
    assert all(0 <= accuracy <= 1 for accuracy in row.values())
    if attack == "IPM, 10":
        assert row["mean"] < 0.3 < row["NNM + trimmed"]


def test_the_heat_map_is_drawn_with_blanks(tmp_path):
    cells = {f: dict.fromkeys(robustness.RULES, 0.5) for f in ("1", "2")}
    del cells["2"]["Bulyan"]
    robustness.draw(dict.fromkeys(["sign flip", "mimic"], cells), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000
