"""What a strategy tells its clients in the config: keys of `[client]` are obeyed, others named."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message

from fedsim.basics.errors import RunError, ScenarioError, nearest, printable, show
from fedsim.client.clipping import CLIPPING_NORM
from fedsim.client.procedure import ClientProcedure
from fedsim.messages.adapting import configs_of
from fedsim.messages.records import SERVER_ROUND, WORK
from fedsim.scenario import discovery, signatures
from fedsim.scenario.choice import Choice
from fedsim.scenario.client_table import takes_parts, with_values
from fedsim.scenario.parts import FORMER, with_settings

_READ = {SERVER_ROUND, WORK, CLIPPING_NORM}
# Flower's own name of a setting, and names that people give: what they mean
_SENT_BY_FLOWER = {"proximal-mu": "proximal.mu"}
_MEANT = {
    "lr": "local_lr", "learning_rate": "local_lr", "eta": "local_lr", "epochs": "local_epochs",
    "num_epochs": "local_epochs", "steps": "local_steps", "num_steps": "local_steps",
    "mu": "proximal.mu", "proximal_mu": "proximal.mu", "batch": "batch_size",
    "wd": "weight_decay",
}  # fmt: skip


class ClientSettings:
    """The keys of a scenario's `[client]` table, and what a round's config makes of them.

    Args:
        client: What the table names.
    """

    def __init__(self, client: Choice) -> None:
        self._client, self._table = client, client.table
        self.name = client.name

    @functools.cached_property
    def keys(self) -> dict[str, signatures.Key]:
        """The procedure's keys by name, and those of its parts such as "proximal.mu"."""
        parts = [part.name for part in self._client.parts]
        return {**self._client.keys, **_keys_of_parts(parts)}

    @functools.cached_property
    def _further(self) -> dict[str, signatures.Key]:
        """Keys of parts that were the procedure's once; a config may give them, listed or not."""
        if not takes_parts(self._client):
            return {}
        return _keys_of_parts(dict.fromkeys(former.part for former in FORMER.values()))

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        """The keys' values in the table."""
        parts = {
            f"{part.name}.{key}": value
            for part in self._client.parts
            for key, value in part.arguments.items()
        }
        former = {f"{f.part}.{f.key}": f.default for f in FORMER.values()}
        return {**former, **self._table, **parts}

    def overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of `[client]` that a config gives another value, with these values.

        Raises:
            ScenarioError: If a value is of another type than the key's.
        """
        found: dict[str, Any] = {}
        for sent, value in config.items():
            key = self._key(sent)
            if key is None:
                continue
            try:
                known = self.keys.get(key) or self._further[key]
                given = signatures.check_value(known.annotation, value)
            except ScenarioError as error:
                raise ScenarioError(f"'{sent}'{error}") from None
            if given != self._values.get(key) or type(given) is not type(self._values.get(key)):
                found[key] = given
        return found

    def procedure(self, overrides: Mapping[str, Any]) -> ClientProcedure:
        """Return the procedure with some keys at other values.

        Raises:
            ValueError: If a value is impossible.
        """
        made: ClientProcedure = with_values(self._client, overrides).make()
        return made

    def unread(self, config: Mapping[str, Any]) -> list[str]:
        """Return the entries of a config that no client reads."""
        return [key for key in config if key not in _READ and self._key(key) is None]

    def idle(self, overrides: Mapping[str, Any]) -> list[str]:
        """Return why some of the keys have no effect beside others, in words."""
        table = with_settings(self._table, overrides)
        return [
            f"'{key}' is without effect with {why}"
            for idle in getattr(self._client.factory, "idle", ())
            if (why := idle.beside(table))
            for key in idle.keys
            if key in overrides
        ]

    def meant(self, key: str) -> str | None:
        """Return the key of `[client]` that looks most like a config's entry, or None."""
        plain = key.replace("-", "_").lower()
        known = _MEANT.get(plain)
        if known in self.keys:
            return known
        inside = [name for name in self.keys if plain in name.split("_")]
        return nearest(plain, self.keys) or next(iter(inside), None)

    def _key(self, sent: str) -> str | None:
        key = _SENT_BY_FLOWER.get(sent, sent.replace("-", "_"))
        if key in self.keys:
            return key
        if key in FORMER:
            key = f"{FORMER[key].part}.{FORMER[key].key}"
        # parts are looked up where one of their keys is meant
        return key if "." in key and key in self._further else None


def _keys_of_parts(names: Iterable[str]) -> dict[str, signatures.Key]:
    return {
        f"{part}.{name}": key
        for part in names
        for name, key in discovery.schema("parts", part).items()
    }


class SettingsWatch:
    """Looks at what a strategy sends before it is sent.

    Args:
        settings: What clients read.
        strategy: The strategy's name, for messages.
        tell: Tells the user.
    """

    def __init__(
        self, settings: ClientSettings, strategy: str, tell: Callable[[str], None]
    ) -> None:
        self._settings, self._strategy, self._tell = settings, strategy, tell
        self._told: set[str] = set()

    def look(self, server_round: int, messages: Sequence[Message], *, training: bool) -> None:
        """Name what nobody reads, once for each entry.

        Args:
            server_round: The round.
            messages: A cohort or messages.
            training: Whether clients are to train, else to evaluate: then no entry is obeyed, and
                one that is a key of `[client]` is no mistake.

        Raises:
            RunError: If a key of `[client]` has a value that it cannot have.
        """
        settings = self._settings
        for config in configs_of(messages):
            for key in settings.unread(config):
                self._say(key, server_round, self._unread(key, config[key]))
            if not training:
                continue
            try:
                overrides = settings.overrides(config)
                if overrides:
                    settings.procedure(overrides)
            except ValueError as error:
                raise RunError(
                    f"round {server_round}: {self._strategy} sends its clients {error}"
                ) from error
            for why in settings.idle(overrides):
                self._say(why, server_round, why)

    def _unread(self, key: str, value: Any) -> str:
        guess = self._settings.meant(key)
        hint = f"; did you mean '{guess}'?" if guess else ""
        keys = ", ".join(self._settings.keys)
        return (
            f"'{printable(key)}' = {show(value)}, which {self._settings.name} does not "
            f"read{hint} (it obeys the keys of [client]: {keys})"
        )

    def _say(self, what: str, server_round: int, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._tell(f"round {server_round}: {self._strategy} sends its clients {text}")
