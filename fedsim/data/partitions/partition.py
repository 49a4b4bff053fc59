"""What a rule of division is, and the scenario keys that every rule has.

A rule gives each sample's owner, so that every sample belongs to exactly one client by
construction, or is dropped for a reason that the rule says. The rules are in
`fedsim.data.partitions.named`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Ints, Samples
from fedsim.data.partitions.skew import NO_SKEW, FeatureSkew

DROPPED = -1  # the owner of a sample that no client gets
DEFAULT_CLIENTS = 10


class Assignment(NamedTuple):
    """Who owns which sample.

    Attributes:
        owners: The client of each sample, `[n]`, or `DROPPED`.
        notes: What the manifest says of how it came about, as JSON.
        clients: Number of clients; None means as many as the scenario says.
        why_dropped: Why samples have no owner, if some have none.
        keeps_groups: Whether a natural owner's samples are all with one client.
        rows: Where samples may have several owners: which sample, ascending, each of `owners` is
            about; None where each has one.
    """

    owners: Ints
    notes: Mapping[str, Any] = MappingProxyType({})
    clients: int | None = None
    why_dropped: str | None = None
    keeps_groups: bool = False
    rows: Ints | None = None


class PartitionRule(NamedTuple):
    """How samples find their owners.

    Attributes:
        assign: `(samples, clients, seed) -> Assignment`; `clients` is None where the scenario may
            leave their number to the rule.
        natural: Whether it leaves samples where they come from, so that it suits generated clients.
        identity: What else decides the outcome (a file's hash), as JSON.
    """

    assign: Callable[[Samples, Any, int], Assignment]
    natural: bool = False
    identity: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Partition:
    """A rule of division with what every rule has.

    Attributes:
        rule: Who owns which sample.
        clients: Number of clients; None leaves it to the rule.
        parts: Parts that the rule divides the samples among where clients share them: client c
            holds part c mod `parts`; None gives each client a part of its own.
        test_fraction: Share of each client's samples in its local test split.
        label_noise: Share of a client's training labels that are drawn anew, uniformly over all
            classes: one for all clients, or one for each (of shared parts: for each part).
        skew: How the features of clients (of shared parts: parts) differ.
        centralised: Whether client 0 holds all training samples once they are divided.
    """

    rule: PartitionRule
    clients: int | None = DEFAULT_CLIENTS
    parts: int | None = None
    test_fraction: float = 0.0
    label_noise: float | tuple[float, ...] = 0.0
    skew: FeatureSkew = NO_SKEW
    centralised: bool = False

    def __post_init__(self) -> None:
        if self.clients is not None and self.clients < 1:
            raise ScenarioError(f"[partition] clients = {self.clients}: must be >= 1")
        self._check_parts()
        if not 0 <= self.test_fraction < 1:
            raise ScenarioError(
                f"[partition] test_fraction = {self.test_fraction}: must be in [0, 1)"
            )
        for share in self._shares():
            if not 0 <= share <= 1:
                raise ScenarioError(f"[partition] label_noise = {share}: must be in [0, 1]")
        self._check_lists(self.parts or self.clients)

    def assign(self, samples: Samples, seed: int) -> Assignment:
        """Return who owns which sample, with the number of clients (or parts) filled in.

        Raises:
            ScenarioError: If the rule cannot divide these samples.
        """
        wanted = self.parts or self.clients
        made = self.rule.assign(samples, wanted, seed)
        clients = made.clients if made.clients is not None else wanted
        assert clients is not None
        assert made.owners.shape == (samples.labels if made.rows is None else made.rows).shape
        if made.rows is not None:
            self._check_shared()
        if not (made.owners >= 0).any():
            why = made.why_dropped or "there are none"
            raise ScenarioError(f"[partition] no sample has an owner: {why}")
        self._check_lists(clients)
        return made._replace(clients=clients)

    def _check_shared(self) -> None:
        """Refuse what changes or holds out a client's samples where others hold them too."""
        for key, asked in (
            ("test_fraction", self.test_fraction > 0),
            ("label_noise", bool(np.any(self.label_noise))),
            ("parts", self.parts is not None),
            ("rotation, feature_noise, feature_shift and feature_scale", self.skew.active),
        ):
            if asked:
                raise ScenarioError(
                    f"[partition] {key}: samples belong to several clients each, and it would "
                    "reach those of the others; leave it out, or give each sample one client"
                )

    def _check_parts(self) -> None:
        if self.parts is None:
            return
        if self.clients is None:
            raise ScenarioError(
                f"[partition] parts = {self.parts}: says who shares samples among a given number "
                "of clients, and this rule takes it from the data; set clients, or leave parts out"
            )
        if not 1 <= self.parts <= self.clients:
            raise ScenarioError(
                f"[partition] parts = {self.parts}: must be from 1 to clients = {self.clients}"
            )

    def _shares(self) -> tuple[float, ...]:
        return self.label_noise if isinstance(self.label_noise, tuple) else (self.label_noise,)

    def _check_lists(self, clients: int | None) -> None:
        if isinstance(self.label_noise, tuple) and clients not in (None, len(self.label_noise)):
            raise ScenarioError(
                f"[partition] label_noise has {len(self.label_noise)} values for {clients} "
                "clients: give one number, or one per client"
            )
        self.skew.check(clients)


def _clients(*, clients: int = DEFAULT_CLIENTS) -> dict[str, Any]:
    """How many clients there are.

    Args:
        clients: Number of clients; >= 1 and at most the number of training samples.
    """
    return {"clients": clients}


def _clients_if_fewer(*, clients: int | None = None) -> dict[str, Any]:
    """How many clients there are, where the data say it already.

    Args:
        clients: Number of clients; >= 1. Left out, it is the rule's to say.
    """
    return {"clients": clients}


def _no_clients() -> dict[str, Any]:
    return {"clients": None}


def _common(
    *,
    parts: int | None = None,
    test_fraction: float = 0.0,
    label_noise: float | Sequence[float] = 0.0,
    rotation: float | Sequence[float] = 0.0,
    feature_noise: float = 0.0,
    feature_shift: float = 0.0,
    feature_scale: float = 0.0,
    centralised: bool = False,
) -> dict[str, Any]:
    """The keys that every rule has besides `clients`.

    Args:
        parts: Lets clients share samples, so that there may be more clients than samples: the rule
            divides them among so many parts, and client c holds part c mod `parts`; from 1 to
            `clients`. Left out, every client has a part of its own.
        test_fraction: Share of each client's samples in its local test split, in [0, 1).
        label_noise: Share of training labels redrawn uniformly over the classes, in [0, 1]; one, or
            one per client.
        rotation: Degrees by which a client's images are turned: r spreads the clients evenly over
            [-r, r] in the order of their ids; or one angle per client, counter-clockwise.
        feature_noise: Variance of the normal noise on the last client's features; client c of N has
            (c + 1)/N of it (Li et al., ICDE 2022, arXiv:2102.02079); in [0, 1e12].
        feature_shift: Standard deviation of the shift that each client draws for each feature (of
            images: channel), in standard deviations of that feature; in
            [0, 1e6].
        feature_scale: Standard deviation of the logarithm of the factor that each client draws for
            each feature's (channel's) distance from its mean; in [0, 10].
        centralised: Whether client 0 holds the training samples of all clients, and the others
            none; local test splits stay as they are. For a reference without a federation.
    """
    return {
        "parts": parts,
        "test_fraction": test_fraction,
        "label_noise": _as_tuple(label_noise),
        "centralised": centralised,
        "skew": FeatureSkew(_as_tuple(rotation), feature_noise, feature_shift, feature_scale),
    }


def _as_tuple(values: float | Sequence[float]) -> float | tuple[float, ...]:
    return tuple(values) if isinstance(values, Sequence) else values


_NUMBERS_OF_CLIENTS = {"given": _clients, "optional": _clients_if_fewer, "rule": _no_clients}


def partition_rule(
    *, clients: str = "given"
) -> Callable[[Callable[..., PartitionRule]], Callable[..., Partition]]:
    """Make a partition's factory of a function that returns a rule.

    Args:
        clients: "given" adds the key `clients` with a default, "optional" adds it with None, "rule"
            adds none.

    Returns:
        A decorator. The factory's keyword arguments are `clients`, the function's own and those of
        every rule; so are the `Args:` of its docstring.
    """
    number = _NUMBERS_OF_CLIENTS[clients]

    def decorate(rule: Callable[..., PartitionRule]) -> Callable[..., Partition]:
        parts: tuple[Callable[..., Any], ...] = (number, rule, _common)
        parameters = [inspect.signature(part).parameters for part in parts]
        signature = inspect.Signature([p for part in parameters for p in part.values()])

        def build(**arguments: Any) -> Partition:
            try:
                signature.bind(**arguments)
            except TypeError as error:
                raise ScenarioError(f"[partition] {rule.__name__}: {error}") from None
            size, made, rest = (
                part(**{key: arguments[key] for key in own if key in arguments})
                for part, own in zip(parts, parameters, strict=True)
            )
            return Partition(rule=made, **size, **rest)

        build.__name__ = build.__qualname__ = rule.__name__
        build.__module__ = rule.__module__
        build.__doc__ = _joined(*(inspect.getdoc(part) or "" for part in parts))
        build.__signature__ = signature  # type: ignore[attr-defined]
        return build

    return decorate


def _joined(before: str, own: str, after: str) -> str:
    """Return a docstring with the arguments of two others before and after its own."""
    head, _, rest = own.partition("\nArgs:\n")
    described, blank, tail = rest.partition("\n\n")
    if not rest:  # no arguments of its own: theirs stand before what follows the summary
        head, blank, tail = own, "", ""
    arguments = [part for part in (_args(before), described.rstrip("\n"), _args(after)) if part]
    return "\n".join([head.rstrip("\n"), "", "Args:", *arguments]) + (blank + tail)


def _args(text: str) -> str:
    return text.partition("\nArgs:\n")[2].rstrip("\n")


def check_clients(clients: int, samples: int) -> None:
    """Refuse more clients than samples.

    Raises:
        ScenarioError: Naming both numbers.
    """
    if clients > samples:
        raise ScenarioError(
            f"[partition] clients = {clients}: the data set has {samples} training samples; "
            f"use at most {samples}"
        )


def check_min_size(min_size: int, clients: int, samples: int) -> None:
    """Refuse a minimum size that so many samples cannot give so many clients.

    Raises:
        ScenarioError: Naming the largest reachable minimum.
    """
    if min_size * clients > samples:
        raise ScenarioError(
            f"[partition] min_size = {min_size}: {samples} samples give each of {clients} clients "
            f"at most {samples // clients}"
        )


def check_number(key: str, value: float, *, above: float | None = None, least: float = 0) -> None:
    """Refuse a number that is not finite, or too small.

    Args:
        key: The key in `[partition]`.
        value: Its value.
        above: What it must exceed, if it must.
        least: What it must reach otherwise.

    Raises:
        ScenarioError: Naming the key, the value and what is allowed.
    """
    holds = value >= least if above is None else value > above
    if not (math.isfinite(value) and holds):
        bound = f">= {least}" if above is None else f"> {above}"
        finite = "" if isinstance(value, int) and above is None else "finite and "
        raise ScenarioError(f"[partition] {key} = {value}: must be {finite}{bound}")


def owners_of(takers: Ints, order: Ints) -> Ints:
    """Return the owner of each sample when `takers` take samples in that order; the rest drop."""
    owners = np.full(len(order), DROPPED, dtype=np.int64)
    owners[order[: len(takers)]] = takers
    return owners
