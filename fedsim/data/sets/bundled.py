"""Scikit-learn's bundled data sets: small, and there without a network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import Arrays
from fedsim.data.loaded import Loaded, PooledSource

DIGITS_SCALE = 16  # the largest value of a pixel of digits


def digits(*, test_fraction: float = 0.2) -> PooledSource:
    """Scikit-learn's bundled 8x8 digits: 1,797 images of 10 classes, scaled to [0, 1].

    Args:
        test_fraction: Share that the server holds out, stratified by class; in (0, 1).

    Raises:
        ScenarioError: If `test_fraction` is outside its range.
    """
    return _bundled("digits", test_fraction, _load_digits)


def breast_cancer(*, standardise: bool = True, test_fraction: float = 0.2) -> PooledSource:
    """Scikit-learn's bundled breast cancer (Wisconsin): 569 samples, 30 features, 2 classes.

    Args:
        standardise: Whether features get mean 0 and deviation 1 over the training samples.
        test_fraction: Share that the server holds out, stratified by class; in (0, 1).

    Raises:
        ScenarioError: If `test_fraction` is outside its range.
    """
    load = partial(_load_breast_cancer, ("features",) if standardise else ())
    return _bundled("breast_cancer", test_fraction, load, standardise=standardise)


def diabetes(
    *, standardise: bool = True, standardise_target: bool = True, test_fraction: float = 0.2
) -> PooledSource:
    """Scikit-learn's bundled diabetes progression: 442 samples, 10 features, one number to predict.

    Args:
        standardise: Whether features get mean 0 and deviation 1 over the training samples.
        standardise_target: Whether the target does; the manifest holds its mean and deviation.
        test_fraction: Share that the server holds out, stratified by the tenths of the target's
            distribution; in (0, 1).

    Raises:
        ScenarioError: If `test_fraction` is outside its range.
    """
    chosen = {"features": standardise, "targets": standardise_target}
    fields = tuple(name for name, wanted in chosen.items() if wanted)
    return _bundled(
        "diabetes",
        test_fraction,
        partial(_load_diabetes, fields),
        standardise=standardise,
        standardise_target=standardise_target,
    )


def check_fraction(test_fraction: float) -> None:
    """Refuse a share that cannot be held out.

    Raises:
        ScenarioError: If it is not in (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise ScenarioError(f"[data] test_fraction = {test_fraction}: must be in (0, 1)")


def _bundled(
    name: str, test_fraction: float, load: Callable[[], Loaded], **choices: Any
) -> PooledSource:
    check_fraction(test_fraction)
    from importlib.metadata import version

    return PooledSource(
        name=name,
        test_fraction=test_fraction,
        identity={"scikit-learn": version("scikit-learn"), **choices},
        description={"name": name, "test_fraction": test_fraction},
        load=load,
    )


def _load_digits() -> Loaded:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = (bunch.images[:, None] / DIGITS_SCALE).astype(np.float32)
    return Loaded(Arrays(features, bunch.target.astype(np.int64)), None, SampleSpec((1, 8, 8), 10))


def _load_breast_cancer(standardise: tuple[str, ...]) -> Loaded:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    return Loaded(
        Arrays(bunch.data.astype(np.float32), bunch.target.astype(np.int64)),
        None,
        SampleSpec((30,), 2),
        standardise=standardise,
        notes={"label_names": [str(name) for name in bunch.target_names]},
    )


def _load_diabetes(standardise: tuple[str, ...]) -> Loaded:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)  # the scaled ones have statistics of all samples in them
    return Loaded(
        Arrays(bunch.data.astype(np.float32), bunch.target.astype(np.float32)),
        None,
        SampleSpec((10,), 0),
        standardise=standardise,
    )
