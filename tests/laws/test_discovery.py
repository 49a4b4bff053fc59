"""The laws cover a new strategy or client procedure because its file is there."""

import re
import sys
from pathlib import Path

import pytest

import clients
import strategies
from fedsim.scenario import discovery
from fedsim.scenario.choice import Choice
from tests.laws import federations as fed

STRATEGY = '''
"""A strategy that nobody has registered."""

from typing import NamedTuple, final

from fedsim.strategy import FederatedStrategy


class Count(NamedTuple):
    rounds: int


@final
class Planted(FederatedStrategy):
    """Takes the first client's model.

    Args:
        factor: What the counter grows by.
    """

    def __init__(self, *, factor: int = 2) -> None:
        self._factor = factor

    def init(self, params, clients):
        return Count(0)

    def server_update(self, state, params, replies):
        after = Count(state.rounds + self._factor)
        return (replies.params[0] if len(replies.client_ids) else params), after, {"server_x": 1.0}
'''

PROCEDURE = '''
"""A client procedure that nobody has registered."""

from typing import final

from fedsim.client.procedure import ClientProcedure, Work


@final
class Halving(ClientProcedure):
    """Halves the model in every step."""

    def __init__(self, *, batch_size: int = 8) -> None:
        self._batch_size = batch_size

    @property
    def work(self):
        return Work(self._batch_size, 1, None)

    def begin(self, params, buffers, extra, state):
        return {"params": params, "buffers": buffers}

    def step(self, carry, batch, gradient, *, server_round):
        loss, _, buffers = gradient(carry["params"], carry["buffers"], batch)
        return {"params": {n: p / 2 for n, p in carry["params"].items()}, "buffers": buffers}, loss
'''


@pytest.fixture
def planted(tmp_path):
    """A new file in each of the two packages, which nothing mentions."""
    places = ((strategies, "planted", STRATEGY), (clients, "halving", PROCEDURE))
    for package, name, source in places:
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(source)
        package.__path__.append(str(folder))
    yield
    for package, name, _ in places:
        package.__path__.remove(str(tmp_path / package.__name__))
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


def test_a_new_file_is_covered_without_a_list_to_edit(planted):
    assert "planted" in fed.strategies()
    assert ("halving", "halving", {"batch_size": 50}) in fed.procedures()


def test_what_is_not_there_any_more_is_not_covered():
    assert "planted" not in fed.strategies()
    assert "halving" not in {name for _, name, _ in fed.procedures()}


def test_the_laws_run_what_they_find(planted):
    procedure = fed.make_procedure("halving", batch_size=8)
    grid = fed.make_grid("logistic", procedure)
    start = fed.initial_arrays()
    strategy = fed.make_strategy("planted")
    arrays, records = fed.run_rounds(
        strategy, grid, start, grid.client_app.layout, cohorts=((3, 4),)
    )
    # client 3 has 7 samples: one step a round
    assert (arrays["output.weight"].numpy() == start["output.weight"].numpy() / 4).all()
    assert strategy.state.rounds == 4
    assert records[-1]["server/server_x"] == 1.0


def test_the_classes_own_name_serves_too(planted):
    assert strategies.Planted is discovery.strategy_factory("planted")


@pytest.mark.parametrize("name", fed.strategies())
def test_every_strategy_is_built_without_an_argument(name):
    assert discovery.schema("strategies", name) is not None
    assert fed.make_strategy(name).state is None


@pytest.mark.parametrize("name", discovery.names("clients"))
def test_every_procedure_is_built_without_an_argument(name):
    assert Choice("clients", {"name": name}).make().work.batch_size >= 1


@pytest.mark.parametrize("name", fed.strategies())
def test_every_strategy_is_held_against_an_oracle(name):
    """Law 6: some test of it imports an oracle, and the oracle imports NumPy alone."""
    root = Path(__file__).parent.parent
    tests = [*root.glob("oracles/test_*.py"), *root.glob("strategies/test_*.py")]
    holding = [t.read_text() for t in tests if f"strategies.{name} import" in t.read_text()]
    oracles = set(re.findall(r"\b(\w+_oracle)\b", "\n".join(holding)))
    written = {file.stem: file.read_text() for file in root.glob("oracles/*_oracle.py")}
    found = oracles & {name for name in written if not name.startswith("test_")}
    assert found, f"no test of {name} in tests/oracles or tests/strategies uses an oracle"
    for oracle in found:
        modules = re.findall(r"^(?:import|from) (\w+)", written[oracle], flags=re.MULTILINE)
        assert set(modules) <= {"numpy", "math", "itertools"}, oracle
