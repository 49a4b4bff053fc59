"""What one table of a scenario names: its factory, looked up once, and the arguments for it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedsim.basics.import_paths import is_import_path
from fedsim.scenario import discovery, signatures
from fedsim.strategy import flower as flower_strategies

# what the tables of a scenario name that are one choice each; a task is a kind and a model
KINDS_OF_TABLES = {
    "data": "datasets",
    "partition": "partitions",
    "participation": "participation",
    "strategy": "strategies",
    "client": "clients",
    "attack": "attacks",
    "topology": "topologies",
}
_SELECTORS = {
    **dict.fromkeys(("datasets", "strategies", "clients", "parts", "server_optimizers"), "name"),
    "models": "model",
}
SERVER = "server"  # the key of [strategy] that names an optimiser, unless the factory has it


def selector_of(kind: str) -> str:
    """Return the key by which a table names a thing of a kind.

    Example:
        >>> selector_of("clients"), selector_of("attacks")
        ('name', 'kind')
    """
    return _SELECTORS.get(kind, "kind")


def inner_of(factory: Callable[..., Any]) -> str | None:
    """Return the argument of a wrapper's factory that is the strategy inside, or None."""
    return getattr(factory, "fedsim_inner", None)


class Choice:
    """A table that names a factory, with that factory.

    The factory is looked up at first use and kept. What is named by import path is the user's own
    and may be edited, or defined anew, between reading and running: Python is asked for it each
    time. To another process goes the table alone.

    Args:
        kind: What the table names, one of `discovery.KINDS` except "scenarios" and "tasks".
        table: The table; nobody changes it.
        factory: What makes the thing, where it has been looked up.
        inside: The choice of the strategy inside this one, where that has been made.
        server: The choice of its server optimiser, likewise.

    Example:
        >>> Choice("participation", {"kind": "uniform", "cohort_size": 3}).make().expected_cohort(9)
        3
    """

    def __init__(
        self,
        kind: str,
        table: Mapping[str, Any],
        factory: Callable[..., Any] | None = None,
        inside: "Choice | None" = None,
        server: "Choice | None" = None,
    ) -> None:
        self.kind, self.table = kind, table
        self._factory, self._inside, self._server = factory, inside, server

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, (self.kind, self.table)

    @property
    def name(self) -> str:
        """What the table calls the thing."""
        return str(self.table[selector_of(self.kind)])

    @property
    def factory(self) -> Callable[..., Any]:
        """What makes the thing; its keyword arguments are the table's other keys.

        Raises:
            ScenarioError: If there is none of that name; the message names the nearest.
        """
        if self._factory is None or self._is_own:
            self._factory = discovery.factory(self.kind, self.name)
        return self._factory

    @property
    def arguments(self) -> dict[str, Any]:
        """The table without the key that names the factory."""
        selector = selector_of(self.kind)
        return {key: value for key, value in self.table.items() if key != selector}

    @property
    def inside(self) -> "Choice | None":
        """The choice of the strategy inside this one, or None."""
        inner = inner_of(self.factory)
        if self._inside is None and inner is not None and inner in self.table:
            self._inside = Choice(self.kind, self.table[inner])
        return self._inside

    @property
    def parts(self) -> "list[Choice]":
        """The choices of the parts that a procedure's table lists."""
        return [Choice("parts", table) for table in self.table.get(discovery.PARTS, ())]

    @property
    def server(self) -> "Choice | None":
        """The choice of the optimiser that takes up this strategy's step, or None."""
        if self.kind != "strategies" or SERVER not in self.table or self.takes(SERVER):
            return None
        if self._server is None:
            self._server = Choice("server_optimizers", self.table[SERVER])
        return self._server

    @property
    def keys(self) -> dict[str, signatures.Key]:
        """The table's keys as the factory has them."""
        return discovery.keys_of(self.kind, self.name, self.factory)

    def having(
        self,
        values: Mapping[str, Any],
        inside: "Choice | None" = None,
        server: "Choice | None" = None,
    ) -> "Choice":
        """Return the same choice with some arguments added or replaced.

        Args:
            values: These arguments.
            inside: The choice of the strategy inside, where its table is among them.
            server: The choice of the server optimiser; its table is added.
        """
        more = {} if server is None else {SERVER: server.table}
        return Choice(self.kind, {**self.table, **values, **more}, self._factory, inside, server)

    def takes(self, argument: str) -> bool:
        """Return whether the factory has an argument, which need not be a key of the table."""
        return argument in inspect.signature(self.factory).parameters

    def make(self, **offered: Any) -> Any:
        """Build what the table describes.

        Args:
            **offered: Arguments that fedsim passes itself; the factory is given those that it
                takes and that are not None.

        Raises:
            ValueError: If a value is impossible.
        """
        factory, given, inside, server = self.factory, self.arguments, self.inside, self.server
        if inside is not None:
            given[str(inner_of(factory))] = inside
        if self.kind == "clients" and discovery.PARTS in given:
            given[discovery.PARTS] = [part.make() for part in self.parts]
        if server is not None:
            del given[SERVER]
        offered = {key: value for key, value in offered.items() if value is not None}
        if offered:
            takes = inspect.signature(factory).parameters
            given |= {key: value for key, value in offered.items() if key in takes}
        made = factory(**given)
        return made if server is None else made.use_server_optimizer(server.make())

    def asked_of_client(self) -> dict[str, dict[str, Any]]:
        """Return the parts that this strategy needs of its clients, with what it decides of each.

        A strategy of fedsim's says so in `parts`, a Flower's in `fedsim_asks`.
        """
        inside = self.inside
        asked = {} if inside is None else inside.asked_of_client()
        own: Any = getattr(self.factory, "fedsim_asks", getattr(self.factory, "parts", {}))
        if not isinstance(own, Mapping):  # a user's attribute of that name
            return asked
        return asked | {
            part: {key: self.table[mine] for key, mine in keys.items()}
            for part, keys in own.items()
        }

    @property
    def _is_own(self) -> bool:
        flowers = self.name.startswith(flower_strategies.PREFIX)
        return is_import_path(self.name) and not flowers
