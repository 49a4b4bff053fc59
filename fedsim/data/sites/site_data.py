"""Federated data whose clients are sites: all in one process, or one site's, or none's.

A simulation reads every site's file. In a deployment a site's process reads its own and the server
none; what each has of the others is what they agreed on. Everything that decides a run follows from
that agreement, so that all three build the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import RunError
from fedsim.basics.samples import SampleSpec
from fedsim.data import cache
from fedsim.data.federated import (
    Arrays,
    ClientIds,
    ClientRows,
    DataRecipe,
    FederatedData,
    Ints,
    array_sha256,
    json_sha256,
    size_summary,
)
from fedsim.data.reading.checks import Unfit, as_classes, as_numbers
from fedsim.data.reading.standardise import applied
from fedsim.data.sites.agreement import Agreement
from fedsim.data.sites.description import named, split_rows
from fedsim.data.sites.tables import SiteTable

_STANDINS = 4096  # made-up samples, which clients share


class SamplesHere(NamedTuple):
    """What of the sites' samples lies in a process.

    Attributes:
        clients: Whose.
        content: Their "features" and "targets" one site after the other, with "offsets"; and those
            of the server's test set, "test_features" and "test_targets", empty without one.
    """

    clients: tuple[int, ...]
    content: cache.Content


class SiteData(FederatedData):
    """Clients that are sites.

    Args:
        agreement: What they agree on.
        held: What lies here.
        recipe: How it is had again.
        said: What a user should know, in lines.
    """

    def __init__(
        self, agreement: Agreement, held: SamplesHere, recipe: DataRecipe, said: Sequence[str] = ()
    ) -> None:
        super().__init__(recipe)
        self.agreement = agreement
        self.num_clients, self.spec = len(agreement.train), agreement.spec
        self.said = tuple(said)
        arrays = held.content.arrays
        self._pool = Arrays(arrays["features"], arrays["targets"])
        self._test = Arrays(arrays["test_features"], arrays["test_targets"])
        self._first = dict(zip(held.clients, arrays["offsets"].tolist(), strict=False))
        fraction, seed = float(recipe.partition.get("test_fraction") or 0.0), recipe.seed
        self._split = (fraction, seed)
        decisive = {
            "agreement": agreement.to_json(),
            "test": {name: array_sha256(a) for name, a in self._test._asdict().items()},
            "seed": seed,
            "test_fraction": fraction,
        }
        self.manifest = _manifest(agreement, recipe, len(self._test.targets))
        self.manifest_sha256 = json_sha256(decisive)

    @property
    def is_whole(self) -> bool:
        """Whether all sites' samples lie here, as in a simulation."""
        return len(self._first) == self.num_clients

    @property
    def to_try(self) -> FederatedData:
        """Made-up samples in place of the sites', of which no process need have any."""
        return StandIns(self)

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each site's number of training samples."""
        return np.asarray(self.agreement.train, dtype=np.int64)[self._checked(client_ids)]

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return the samples that lie here, and each site's rows of them in ascending order.

        Raises:
            RunError: If one of the sites' lie elsewhere.
        """
        ids = self._checked(client_ids, split)
        self.clients_read += len(ids)
        return ClientRows(*self._pool, [self._rows(client, split) for client in ids.tolist()])

    def _rows(self, client: int, part: str) -> Ints:
        if client not in self._first:
            here = ", ".join(f"client {each}'s" for each in self._first) or "none"
            raise RunError(
                f"the samples of client {client} lie at its own site; in this process lie {here}"
            )
        count = self.agreement.train[client] + self.agreement.test[client]
        train, test = split_rows(count, *self._split, client)
        return (train if part == "train" else test) + np.int64(self._first[client])

    @property
    def test(self) -> Arrays:
        """The server's own test set; empty where it has none."""
        return self._test


class StandIns(FederatedData):
    """As many samples as the sites have, of the same shape and kind, with made-up values.

    A user's model is tried on them before round 1: on the same ones at every site, on the server
    and in a simulation, so that all find the same.
    """

    def __init__(self, data: SiteData) -> None:
        super().__init__(data.recipe)
        self._data, self.num_clients, self.spec = data, data.num_clients, data.spec
        self.manifest, self.manifest_sha256 = data.manifest, data.manifest_sha256
        self._pool = _made_up(data.spec, min(_STANDINS, max(data.agreement.train)))

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each site's number of training samples."""
        return self._data.sizes(client_ids)

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return made-up samples; each client begins elsewhere among them."""
        ids = self._checked(client_ids, split)
        of_split = self._data.agreement.train if split == "train" else self._data.agreement.test
        pool = len(self._pool.targets)
        rows = [(np.arange(of_split[client]) + client) % pool for client in ids.tolist()]
        return ClientRows(*self._pool, rows)

    @property
    def test(self) -> Arrays:
        """The server's own test set."""
        return self._data.test


def _made_up(spec: SampleSpec, count: int) -> Arrays:
    draw = rng.generator(0, "stand-ins")
    features: Any = draw.standard_normal((count, *spec.feature_shape), dtype=np.float32)
    if spec.vocabulary:
        features = draw.integers(spec.vocabulary, size=(count, *spec.feature_shape))
    targets: Any = np.arange(count, dtype=np.int64) % max(spec.num_classes, 1)
    if not spec.has_classes:
        targets = draw.standard_normal((count, *spec.target_shape), dtype=np.float32)
    return Arrays(features, targets)


def fitted(table: SiteTable, agreement: Agreement) -> Arrays:
    """Return a site's samples as all sites agreed to have them.

    Args:
        table: What its file holds.
        agreement: What they agreed on.

    Raises:
        Unfit: If a target is none that they agreed on.
    """
    features: Any = table.features
    if table.roles.features != agreement.features:  # another order
        places = [table.roles.features.index(name) for name in agreement.features]
        features = np.ascontiguousarray(features[:, places])
    targets: Any = table.targets
    if agreement.labels:
        numbers = {name: number for number, name in enumerate(agreement.labels)}
        values, codes = np.unique(targets, return_inverse=True)
        names = [named(value) for value in values.tolist()]
        if unknown := [name for name in names if name not in numbers]:
            raise Unfit(f"holds '{unknown[0]}', which is none of the classes")
        table_of = np.array([numbers[name] for name in names], dtype=np.int64)
        targets = table_of[codes.reshape(-1)]
    elif agreement.spec.has_classes:
        targets = as_classes(targets, agreement.spec.num_classes)
    else:
        targets = as_numbers(targets)
    found = {"features": features, "targets": targets}
    for name, of_field in agreement.statistics.items():
        found[name] = _standardised(found[name], of_field)
    return Arrays(found["features"], found["targets"])


def _standardised(array: npt.NDArray[Any], statistics: Mapping[str, Any]) -> npt.NDArray[Any]:
    wide = (-1, 1, 1) if array.ndim == 4 else array.shape[1:]
    mean, deviation = (
        np.asarray(statistics[name], dtype=np.float32).reshape(wide) for name in ("mean", "std")
    )
    return applied(array, mean, deviation)


def content_of(sites: Sequence[Arrays], test: Arrays | None, spec: SampleSpec) -> cache.Content:
    """Return sites' samples one after the other, and the server's test set; see `SamplesHere`."""
    none = _nothing(spec)
    every = [none, *sites]
    offsets = np.cumsum([0, *(len(each.targets) for each in sites)], dtype=np.int64)
    test = none if test is None else test
    arrays = {
        "features": np.concatenate([each.features for each in every]),
        "targets": np.concatenate([each.targets for each in every]),
        "offsets": offsets,
        "test_features": test.features,
        "test_targets": test.targets,
    }
    return cache.Content(arrays, {})


def _nothing(spec: SampleSpec) -> Arrays:
    features: Any = np.zeros(
        (0, *spec.feature_shape), dtype=np.int64 if spec.vocabulary else np.float32
    )
    if spec.has_classes:
        return Arrays(features, np.zeros(0, dtype=np.int64))
    return Arrays(features, np.zeros((0, *spec.target_shape), dtype=np.float32))


def _manifest(agreement: Agreement, recipe: DataRecipe, tested: int) -> dict[str, Any]:
    train, test = np.array(agreement.train), np.array(agreement.test)
    target = list(agreement.target)
    data: dict[str, Any] = {
        "name": "sites",
        "columns": {
            "features": list(agreement.features),
            "target": target[0] if len(target) == 1 else target,
        },
        "preprocessing": dict(agreement.preprocessing),
        "classes": agreement.spec.num_classes,
        "feature_shape": list(agreement.spec.feature_shape),
        "samples": int(train.sum() + test.sum()),
    }
    if agreement.labels:
        data["label_names"] = list(agreement.labels)
    if agreement.spec.vocabulary:
        data["vocabulary"] = agreement.spec.vocabulary
    if agreement.statistics:
        data["standardised"] = dict(agreement.statistics)
    return {
        "data": data,
        "held_out": {
            "samples": tested, "drawn": "the server's own file" if tested else "none"
        },
        "partition": {**recipe.partition, "seed": recipe.seed},
        "clients": len(train),
        "sizes": size_summary(train),
        "local_test": {"samples": int(test.sum()), "sizes": size_summary(test)},
        "dropped": {"samples": 0, "reason": None},
        "sites": list(agreement.hashes),
    }  # fmt: skip
