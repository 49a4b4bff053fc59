"""Law 11, of strategies: a hyperparameter that is infinite or no number is refused by name."""

import math

import pytest

from fedsim.scenario import discovery

FRACTIONS = [
    (name, key)
    for name in discovery.names("strategies")
    for key, schema in discovery.schema("strategies", name).items()
    if isinstance(schema.default, float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "key"), FRACTIONS)
def test_what_is_not_finite_is_no_hyperparameter(name, key, value):
    with pytest.raises(ValueError, match=rf"^{key} = "):
        discovery.strategy_factory(name)(**{key: value})
