"""What sites agree on before round 1, from what each says of its data.

All that follows from it is the same wherever the data lie: at their sites, or together in a
simulation.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.basics.errors import ScenarioError, nearest, printable
from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import json_sha256
from fedsim.data.reading import characters
from fedsim.data.reading.checks import Unfit, count_classes
from fedsim.data.reading.chosen import listed
from fedsim.data.sites.description import Description, named, standardised_fields
from fedsim.data.sites.moments import FeatureMoments
from fedsim.data.sites.tables import HowToRead

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Agreement:
    """What all sites agree on.

    Attributes:
        features: The columns of the features, in the order in which samples have them.
        kind: What they are.
        spec: What one sample looks like.
        preprocessing: What is done to images.
        target: The columns of the target.
        labels: The classes' names, in the order of their numbers; empty where they are numbers
            themselves, or amounts.
        statistics: Mean and deviation of what is standardised, as the manifest has them.
        train: Samples that each site trains on.
        test: Samples of each site's local test split.
        hashes: Hash of each site's samples.
    """

    features: tuple[str, ...]
    kind: str
    spec: SampleSpec
    preprocessing: Mapping[str, Any]
    target: tuple[str, ...]
    labels: tuple[str, ...]
    statistics: Mapping[str, Any]
    train: tuple[int, ...]
    test: tuple[int, ...]
    hashes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Agreement":
        """Return what `to_json` returned, from elsewhere."""
        shape, classes, target_shape, vocabulary = told["spec"]
        spec = SampleSpec(tuple(shape), classes, tuple(target_shape), vocabulary)
        names = ("features", "target", "labels", "train", "test", "hashes")
        return cls(**{**told, **{name: tuple(told[name]) for name in names}, "spec": spec})

    @property
    def sha256(self) -> str:
        """Hash of all of it."""
        return json_sha256(self.to_json())


def agree(told: Sequence[Description], how: HowToRead, names: Sequence[str]) -> Agreement:
    """Return what sites agree on.

    Args:
        told: What each says of its data, in the order of their numbers.
        how: How they read them.
        names: What messages call each site.

    Raises:
        ScenarioError: With a line for each site that differs, naming what differs.
    """
    usual = _usual(told, how)
    lines = [
        f"{n}: {why}" for n, each in zip(names, told, strict=True) for why in _odd(each, usual, how)
    ]
    if lines:
        raise ScenarioError("\n".join(lines))
    kinds = {each.target_kind for each in told}
    amounts = "amounts" in kinds
    labels, classes = ((), 0) if amounts else _classes(told, how, names)
    if amounts and how.columns.target_type == "auto" and all(each.whole for each in told):
        raise ScenarioError(
            f"column '{usual.target[0]}' holds whole numbers written as fractions at every site; "
            "say [data] target_type = 'classes' if its values name classes, or 'numbers' if they "
            "are amounts"
        )
    vocabulary = characters.VOCABULARY if usual.kind == "text" else 0
    shape = usual.target_shape if amounts else ()
    return Agreement(
        features=how.columns.features or usual.features,
        kind=usual.kind,
        spec=SampleSpec(usual.shape, classes, shape, vocabulary),
        preprocessing=usual.preprocessing,
        target=usual.target,
        labels=labels,
        statistics=_statistics(told, how, names, amounts=amounts, kind=usual.kind),
        train=tuple(each.train for each in told),
        test=tuple(each.test for each in told),
        hashes=tuple(each.sha256 for each in told),
    )


def _usual(told: Sequence[Description], how: HowToRead) -> Description:
    """The first site that has the columns of most; the first, where the scenario names them."""
    if how.columns.features is not None:
        return told[0]
    most, _ = Counter(frozenset(each.features) for each in told).most_common(1)[0]
    return next(each for each in told if frozenset(each.features) == most)


def _odd(each: Description, usual: Description, how: HowToRead) -> Iterator[str]:
    """Say in what a site differs from the usual one."""
    missing = [name for name in usual.features if name not in each.features]
    more = [name for name in each.features if name not in usual.features]
    if missing:
        several = "s" * (len(missing) > 1)
        yield f"lacks the column{several} {_quoted(missing)}{_meant(missing, more)}"
    if more:
        yield (
            f"has the column{'s' * (len(more) > 1)} {_quoted(more)}, which other sites lack; name "
            "those that are learnt from in [data] features"
        )
    if each.target != usual.target:
        yield (
            f"its target is {_quoted(each.target)}, that of other sites {_quoted(usual.target)}; "
            "name it in [data] target"
        )
    if each.kind != usual.kind or (not missing and not more and each.shape != usual.shape):
        yield (
            f"its features are {each.kind} of shape {list(each.shape)}, those of other sites "
            f"{usual.kind} of shape {list(usual.shape)}"
        )
    elif each.preprocessing != usual.preprocessing:
        yield f"its images are {_words(each)}, those of other sites {_words(usual)}"
    if not _alike(each.target_kind, usual.target_kind) and how.labels is None:
        yield (
            f"its target '{each.target[0]}' holds {each.target_kind}, that of other sites "
            f"{usual.target_kind}"
        )
    elif each.target_shape != usual.target_shape:
        yield (
            f"its targets have the shape {list(each.target_shape)}, those of other sites "
            f"{list(usual.target_shape)}"
        )
    if each.unlisted:
        assert how.labels is not None
        guess = nearest(named(each.unlisted[0]), how.labels)
        yield (
            f"its target holds {_quoted(map(named, each.unlisted))}, which is none of [data] "
            f"labels = {list(how.labels)}" + (f"; did you mean '{guess}'?" if guess else "")
        )


def _alike(one: str, other: str) -> bool:
    """Whole numbers at one site may be amounts at another."""
    return one == other or {one, other} == {"whole numbers", "amounts"}


def _words(each: Description) -> str:
    return ", ".join(f"{key} = {value}" for key, value in sorted(each.preprocessing.items()))


def _meant(missing: Sequence[str], more: Sequence[str]) -> str:
    guess = nearest(missing[0], more) if more else None
    return f"; is it what this site calls '{printable(guess)}'?" if guess else ""


def _quoted(names: Any) -> str:
    every = [f"'{printable(str(name))}'" for name in names]
    return listed(every, _SHOWN)


def _classes(
    told: Sequence[Description], how: HowToRead, names: Sequence[str]
) -> tuple[tuple[str, ...], int]:
    """The classes' names, if they have any, and C."""
    if told[0].kind == "text":
        return (), characters.VOCABULARY
    if how.labels is not None:
        return how.labels, len(how.labels)
    found = sorted({value for each in told for value in each.labels})
    numbers = all(each.target_kind == "whole numbers" for each in told)
    if not numbers or how.columns.target_type == "classes":
        if len(found) < 2:
            raise ScenarioError(
                f"column '{told[0].target[0]}' holds '{named(found[0])}' alone at all {len(names)} "
                "sites, expected at least two classes"
            )
        return tuple(named(value) for value in found), len(found)
    try:
        return (), count_classes([np.array(found)])
    except Unfit as unfit:
        raise ScenarioError(
            f"column '{told[0].target[0]}' {unfit}, at all sites together; say [data] target_type "
            "= 'classes' if its values name classes, or 'numbers' if they are amounts"
        ) from unfit


def _ordered(told: Description, field: str, features: Sequence[str]) -> FeatureMoments | None:
    """The moments that a site tells, with its features in this order."""
    moments = told.moments.get(field)
    if moments is None or field != "features" or told.features == tuple(features):
        return moments
    places = [told.features.index(name) for name in features]
    return moments._replace(mean=moments.mean[places], squares=moments.squares[places])


def _statistics(
    told: Sequence[Description],
    how: HowToRead,
    names: Sequence[str],
    *,
    amounts: bool,
    kind: str,
) -> dict[str, Any]:
    """Mean and deviation of what is standardised, from the sites' sums.

    Raises:
        ScenarioError: If sites do not tell them.
    """
    found = {}
    for field in standardised_fields(how, kind, amounts=amounts):
        parts = [_ordered(each, field, told[0].features) for each in told]
        if silent := [name for name, part in zip(names, parts, strict=True) if part is None]:
            key = "standardise" if field == "features" else "standardise_target"
            raise ScenarioError(
                f"{listed(silent, _SHOWN)}: does not tell its sums, which standardising needs: set "
                f"[data] {key} = false, or let the site tell them, [site] share"
            )
        found[field] = FeatureMoments.over([part for part in parts if part is not None]).rounded()
    return found
