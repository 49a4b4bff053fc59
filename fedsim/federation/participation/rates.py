"""How often clients take part: at one rate, each at its own, or as their labels say."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError

DEFAULT_MIN_RATE = 0.02
Floats = npt.NDArray[np.float64]


class ClientRates:
    """Every client's rate: the share of rounds in which it takes part.

    Args:
        rate: One rate for all, in (0, 1], or one per client, each in [0, 1].
        label_alpha: None, or alpha_p of `label_rates`: then `rate` is the mean.
        min_rate: p_min of `label_rates`.

    Raises:
        ScenarioError: If an argument is outside its range.
    """

    def __init__(
        self, rate: float | Sequence[float], label_alpha: float | None, min_rate: float
    ) -> None:
        self._given = tuple(rate) if isinstance(rate, Sequence) else rate
        self._label_alpha, self._min_rate = label_alpha, min_rate
        self._learned: Floats | None = None
        if isinstance(self._given, tuple):
            _check_list(self._given, label_alpha)
        else:
            _check_one(self._given, label_alpha, min_rate)

    @property
    def needs_labels(self) -> bool:
        """Whether the rates follow the labels."""
        return self._label_alpha is not None

    @property
    def common(self) -> float | None:
        """The rate that all clients have, or None when each has its own."""
        return None if self.needs_labels or isinstance(self._given, tuple) else self._given

    def learn(self, counts: npt.NDArray[np.int64], *, seed: int) -> None:
        """Fix rates that follow the labels; others stay as they are."""
        if self._label_alpha is not None and not isinstance(self._given, tuple):
            self._learned = label_rates(
                counts,
                mean=self._given,
                alpha=self._label_alpha,
                minimum=self._min_rate,
                seed=seed,
            )

    def expected_cohort(self, num_clients: int) -> int:
        """Return the sum of the rates that the scenario gives, rounded; at least one."""
        if isinstance(self._given, tuple):
            return max(1, round(math.fsum(self.of(num_clients))))
        return max(1, round(num_clients * self._given))

    def stated(self, num_clients: int) -> float | Floats:
        """Return the rate or rates that the scenario gives, whatever the labels make of them."""
        return self.of(num_clients) if isinstance(self._given, tuple) else self._given

    def of(self, num_clients: int) -> Floats:
        """Return the rates, float64 `[N]`.

        Raises:
            ScenarioError: If they are not as many, or wait for labels.
        """
        if (common := self.common) is not None:
            return np.full(num_clients, common, dtype=np.float64)
        if isinstance(self._given, tuple):
            if len(self._given) != num_clients:
                raise ScenarioError(
                    f"[participation] rate has {len(self._given)} values for {num_clients} "
                    "clients: give one number, or one per client"
                )
            return np.array(self._given, dtype=np.float64)
        if self._learned is None:
            raise ScenarioError(
                f"[participation] label_alpha = {self._label_alpha}: the rates follow the clients' "
                "labels, which are not known yet; call learn_labels before the first round"
            )
        if len(self._learned) != num_clients:
            raise ScenarioError(
                f"[participation] label_alpha = {self._label_alpha}: the labels of "
                f"{len(self._learned)} clients are known, there are {num_clients}"
            )
        return self._learned.copy()


def label_rates(
    counts: npt.NDArray[np.int64], *, mean: float, alpha: float, minimum: float, seed: int
) -> Floats:
    """Return rates that follow the clients' labels.

    Client n with the class shares kappa_n takes part at the rate
    p_n = min(1, max(p_min, mean * C * sum_c kappa_nc q_c)), where q is one draw of a symmetric
    Dirichlet law over the C classes. Before the bounds and over all draws the mean of p_n is
    `mean`. A client without samples counts as one with equal shares: its rate is `mean`.

    Args:
        counts: Samples of each class, `[clients, classes]`.
        mean: The mean rate, in (0, 1].
        alpha: alpha_p of the Dirichlet law, > 0: the smaller, the more some classes are preferred.
        minimum: p_min, in (0, 1].
        seed: The scenario's seed.

    Returns:
        float64 `[clients]`.

    Source: the official code (IBM/fedau) of Wang and Ji, ICLR 2024 (arXiv:2306.03401).
    Deviations: rates are cut at 1, where the code would fail; it has no client without samples.
    """
    classes = counts.shape[1]
    sizes = counts.sum(axis=1, keepdims=True)
    shares = np.where(sizes > 0, counts / np.maximum(sizes, 1), 1 / classes)
    preferred = rng.generator(seed, "participation labels").dirichlet(np.full(classes, alpha))
    rates: Floats = np.clip(mean * classes * (shares @ preferred), minimum, 1.0)
    return rates


def _check_list(rates: tuple[float, ...], label_alpha: float | None) -> None:
    for client_id, value in enumerate(rates):
        if not 0 <= value <= 1:
            raise ScenarioError(
                f"[participation] rate = {value} for client {client_id}: must be in [0, 1]"
            )
    if not any(rates):
        raise ScenarioError("[participation] rate: at least one must be > 0")
    if label_alpha is not None:
        raise ScenarioError(
            f"[participation] label_alpha = {label_alpha} with a list of rates: the labels make "
            "the clients' rates; give one number, their mean"
        )


def _check_one(rate: float, label_alpha: float | None, min_rate: float) -> None:
    if not 0 < rate <= 1:
        raise ScenarioError(f"[participation] rate = {rate}: must be in (0, 1]")
    if label_alpha is None:
        if min_rate != DEFAULT_MIN_RATE:
            raise ScenarioError(
                f"[participation] min_rate = {min_rate} changes nothing without label_alpha: leave "
                "it out, or say how strongly the rates follow the labels"
            )
        return
    if not 0 < label_alpha <= 1e6:
        raise ScenarioError(f"[participation] label_alpha = {label_alpha}: must be in (0, 1e6]")
    if not 0 < min_rate <= rate:
        raise ScenarioError(
            f"[participation] min_rate = {min_rate}: must be > 0 and at most rate = {rate}"
        )
