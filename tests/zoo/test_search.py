"""The standing search: code that nobody wrote, held to plain torch and to itself.

`make zoo` goes on for an hour, with other draws each time; a find becomes a case.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ScenarioError
from fedsim.world import build
from tests.zoo.composed import PARTS
from tests.zoo.trained import check, scenario

pytestmark = [pytest.mark.hypothesis, pytest.mark.filterwarnings("ignore")]
SOME = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4)
EXECUTORS = st.sampled_from(["auto", "auto", "loop", "vmap", "batched"])
CLIENTS = st.fixed_dictionaries(
    {}, optional={"momentum": st.just(0.9), "local_epochs": st.just(2)}
)  # fmt: skip


def composed(parts, executor, client):
    """Train a composition as it is asked for; a refusal must come before round 1, by name."""
    task = {"model": "tests.zoo.composed:Composed", "parts": parts}
    refusal = None
    try:
        build(scenario("Composed", executor, task=task, client=client))
    except ScenarioError as error:
        refusal = str(error)
    if refusal is None:
        check("Composed", executor, task=task, **client)
    else:
        assert executor in ("vmap", "batched"), refusal
        assert f"executor = '{executor}'" in refusal


@given(parts=SOME, executor=EXECUTORS, client=CLIENTS)
def test_whatever_models_are_put_together(parts, executor, client):
    composed(parts, executor, client)
