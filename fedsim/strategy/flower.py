"""Flower's strategies, and wrappers of strategies from anywhere, as a scenario names them.

`flower:FedAdam` is Flower's class of that name. Fractions, minima and record names are not keys of
it: who takes part is the scenario's to say, and the names are fedsim's wire format.

A wrapper, such as Flower's four with differential privacy, takes the strategy inside it as a table:

    [strategy]
    name = "flower:DifferentialPrivacyServerSideFixedClipping"
    noise_multiplier = 1.0
    clipping_norm = 0.5
    strategy = { name = "flower:FedAdam", eta = 0.1 }

The noise that Flower's wrappers add is calibrated for a plain mean of `num_sampled_clients` clipped
updates; around a strategy that weighs or remembers updates the same numbers promise less privacy.
"""

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.import_paths import names_in_source

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedsim.messages.layout import Layout

PREFIX = "flower:"
_MODULE = "flwr.serverapp.strategy"
_NO_STRATEGIES = {"Result", "Strategy"}  # which that module offers besides
COHORT = "expected_cohort"  # the argument of strategies that count on so many clients per round
_SAMPLED = "num_sampled_clients"
_WRAPPED = "flower:FedAvg"  # what a wrapper wraps when the scenario does not say

_FIXED: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "arrayrecord_key": "arrays",
    "configrecord_key": "config",
    "train_loss_key": "loss",
    "accountant": None,  # an object, and in need of an extra of Flower's
    "eta_l": 0.0,  # printed by Flower and used by nobody: the clients' step is [client] local_lr
}
# What a strategy leaves to the clients: a part's keys, and which of its own they must equal.
_ASKS = {"FedProx": {"proximal": {"mu": "proximal_mu"}}}
_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "noise_multiplier": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "clipping_norm": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "initial_clipping_norm": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "clip_norm_lr": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "target_clipped_quantile": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "clipped_count_stddev": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "proximal_mu": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "client_learning_rate": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "num_malicious_nodes": (lambda v: v >= 0, ">= 0"),
    "num_nodes_to_select": (lambda v: v >= 1, ">= 1"),
    "beta": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "eta": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "beta_1": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "beta_2": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "tau": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "server_learning_rate": (lambda v: 0 < v < math.inf, "> 0 and finite"),
    "server_momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "q": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    _SAMPLED: (lambda v: v >= 1, ">= 1"),
}
# Replies of f clients that may be anything take so many in all: what papers prove, or Flower asks.
_REPLIES_NEEDED: dict[str, tuple[int, int]] = {
    "Krum": (2, 3),
    "MultiKrum": (2, 3),
    "Bulyan": (4, 3),
}
_WEIGHTS = ("num-examples", "loss")  # what clients measure in training
_DESCRIPTIONS = {
    _SAMPLED: "Clients per round that the noise is calibrated for; by default the number expected "
    "from [participation].",
    "strategy": "The strategy inside, a table like [strategy].",
    "target_clipped_quantile": "Target of the share clipped, in [0, 1]. Flower moves the bound by "
    "exp(-clip_norm_lr * (share clipped - target)), so away from the target: Andrew et al. count "
    "those who are not clipped.",
}


class Inside(Protocol):
    """What makes the strategy inside a wrapper."""

    @property
    def name(self) -> str:
        """Its scenario name."""

    def make(self, *, expected_cohort: int | None) -> "Strategy":
        """Build it, for so many clients per round."""


def names() -> list[str]:
    """Return the scenario names of Flower's strategies, such as `flower:FedAdam`."""
    listed = names_in_source(_MODULE, "__all__")  # importing them takes a second
    classes = _classes() if listed is None else set(listed) - _NO_STRATEGIES
    return sorted(PREFIX + name for name in classes if not _why_unfit(name))


def factory(name: str) -> Callable[..., "Strategy"]:
    """Return the factory of one of Flower's strategies.

    Args:
        name: `flower:` and the name of the class.

    Raises:
        ScenarioError: If there is none of that name, or a scenario cannot use it.
    """
    cls = _classes().get(name.removeprefix(PREFIX))
    if cls is None:
        raise ScenarioError(unknown(name, "a strategy of Flower", names()))
    if reason := _why_unfit(cls.__name__):
        raise ScenarioError(f"'{name}' {reason}")
    return adapted(cls, name, fixed=_FIXED, asks=_ASKS.get(cls.__name__, {}))


def inner_argument(cls: type[Any]) -> str | None:
    """Return the name of the argument by which a class takes a strategy to wrap, or None."""
    for parameter in inspect.signature(cls, eval_str=True).parameters.values():
        kind = parameter.annotation
        if inspect.isclass(kind) and issubclass(kind, _base()):
            return parameter.name
    return None


def adapted(
    cls: type[Any],
    name: str,
    *,
    fixed: Mapping[str, Any] | None = None,
    asks: Mapping[str, Mapping[str, str]] | None = None,
) -> Callable[..., "Strategy"]:
    """Return a factory of a foreign class whose keyword arguments are scenario keys.

    The factory's attribute `fedsim_inner` names the argument for the strategy inside (None for what
    wraps nothing): a table in the scenario, what makes that strategy when the factory is called.
    `fedsim_wrapped` is what it is by default, and `fedsim_asks` says which parts clients need, and
    which of a part's keys must equal which of the strategy's own.

    Args:
        cls: The strategy's class.
        name: Its scenario name.
        fixed: Arguments that fedsim sets itself.
        asks: What `fedsim_asks` is to say.
    """
    signature = inspect.signature(cls, eval_str=True)
    set_here = {key: value for key, value in (fixed or {}).items() if key in signature.parameters}
    inner = inner_argument(cls)

    def build(**given: Any) -> "Strategy":
        cohort = given.pop(COHORT, None)
        if inner is not None:
            if _SAMPLED in given and given[_SAMPLED] is None:
                given[_SAMPLED] = cohort
            inside: Inside = given[inner]
            given[inner] = made = inside.make(expected_cohort=cohort)
            if reason := _why_not_inside(made):
                where = f"[strategy.{inner}] name"
                raise ScenarioError(f'{where} = "{inside.name}": {reason}')
        if fixed:
            _check_bounds(given)
            if cohort is not None:
                _check_cohort(cls.__name__, given, cohort)
        if inner is not None and _SAMPLED in given:
            _check_noise(given)
        strategy: Strategy = cls(**set_here, **given)
        return strategy

    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name in set_here:
            continue
        changed: dict[str, Any] = {"kind": inspect.Parameter.KEYWORD_ONLY}
        if parameter.name == inner:
            changed |= {"annotation": dict[str, Any], "default": {"name": _WRAPPED}}
        elif inner is not None and parameter.name == _SAMPLED:
            changed |= {"annotation": int | None, "default": None}
        parameters.append(parameter.replace(**changed))
    if inner is not None or (fixed and cls.__name__ in _REPLIES_NEEDED):
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(COHORT, keyword, default=None, annotation=int | None))
    # What is left of the signature is the schema, keyword-only like that of our own factories.
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    build.fedsim_inner = inner  # type: ignore[attr-defined]
    build.fedsim_wrapped = _WRAPPED  # type: ignore[attr-defined]
    build.fedsim_asks = dict(asks or {})  # type: ignore[attr-defined]
    build.__name__ = name
    build.__doc__ = _google_style(cls, [parameter.name for parameter in parameters])
    return build


# What Flower's arithmetic does in place, which integers do not bear.
_SCALES = {"QFedAvg": "scales all tensors of the model in place, those of BatchNorm among"}
# What Flower's arithmetic cannot do with updates of no number.
_MEASURES_UPDATES = (
    "Krum", "MultiKrum", "Bulyan", "DifferentialPrivacyServerSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
)  # fmt: skip


def check_model(strategy: "Strategy", layout: "Layout") -> None:
    """Refuse a model that a strategy of Flower's cannot handle.

    Raises:
        ScenarioError: If it would have to clip or to scale integers, or to measure updates when
            clients share no parameter.
    """
    integers = [spec.name for spec in layout.buffers if not spec.dtype.is_floating_point]
    kind = type(strategy).__name__
    if _classes().get(kind) is not type(strategy):
        return
    if not layout.trainable and kind in _MEASURES_UPDATES:
        raise ScenarioError(
            f'[strategy] name = "{PREFIX}{kind}": measures updates, and with all parameters '
            '[task] personal there are none; use name = "fedavg", which then leaves every client '
            "alone"
        )
    if not integers:
        return
    wraps = inner_argument(type(strategy))
    does = "clips all tensors of the model and adds noise to" if wraps else _SCALES.get(kind)
    if does:
        raise ScenarioError(
            f"[strategy] name = \"{PREFIX}{kind}\": {does} them, and '{integers[0]}' holds "
            "integers; use a [task] model without BatchNorm"
        )


def _check_bounds(given: Mapping[str, Any]) -> None:
    """Refuse numbers outside of what Flower's arithmetic or the papers bear."""
    for key, value in given.items():
        holds, allowed = _BOUNDS.get(key, (None, ""))
        if holds is not None and value is not None and not holds(value):
            raise ValueError(f"{key} = {value!r}: must be {allowed}")
    if (weight := given.get("weighted_by_key", _WEIGHTS[0])) not in _WEIGHTS:
        what = "a metric that clients measure in training"
        raise ValueError(f"weighted_by_key: {unknown(str(weight), what, _WEIGHTS)}")


def _check_cohort(kind: str, given: Mapping[str, Any], cohort: int) -> None:
    """Refuse what so many clients per round cannot do."""
    if kind in _REPLIES_NEEDED:
        per_malicious, more = _REPLIES_NEEDED[kind]
        malicious = given.get("num_malicious_nodes", 0)
        most = max(0, (cohort - more) // per_malicious)
        if malicious > most:
            raise ValueError(
                f"num_malicious_nodes = {malicious} with {cohort} clients per round: must be at "
                f"most {most}, for a round needs {per_malicious} num_malicious_nodes + {more} "
                "replies"
            )
    selected = given.get("num_nodes_to_select", 1)
    if selected > cohort:
        raise ValueError(
            f"num_nodes_to_select = {selected} with {cohort} clients per round: must be at most "
            f"{cohort}"
        )
    sampled = given.get(_SAMPLED)
    if sampled is not None and sampled > cohort:
        raise ValueError(
            f"{_SAMPLED} = {sampled} with {cohort} clients per round: must be at most {cohort}; "
            "noise for more clients than there are promises less privacy than it says"
        )


def _check_noise(given: Mapping[str, Any]) -> None:
    """Refuse noise that cannot be calibrated."""
    sampled, noise = given[_SAMPLED], given.get("noise_multiplier", 0.0)
    if sampled is None:
        raise ValueError(f"'{_SAMPLED}' is missing: give the clients per round")
    if "clipped_count_stddev" not in given or not noise:
        return
    spread = given["clipped_count_stddev"]
    spread = sampled / 20 if spread is None else spread
    if noise >= 2 * spread:
        raise ValueError(
            f"noise_multiplier = {noise!r}: must be < {2 * spread:g}, twice clipped_count_stddev "
            f"(by default {_SAMPLED} / 20, here {sampled} / 20)"
        )


def _why_unfit(name: str) -> str | None:
    """Say why a scenario cannot name a strategy of Flower's, or return None."""
    if name.startswith("FedXgb"):
        return "aggregates boosted trees, where fedsim trains tensors"
    return None


def _why_not_inside(strategy: "Strategy") -> str | None:
    """Say why a strategy cannot stand inside a wrapper, or return None.

    A wrapper sees the model before and after a round and what clients return of it, nothing else.
    """
    from fedsim.strategy.adapter import is_ours
    from fedsim.strategy.base import FederatedStrategy

    if inner_argument(type(strategy)) is not None:
        return "wraps a strategy itself; allowed inside: strategies that do not"
    if not is_ours(strategy):
        return None
    kind = type(strategy)
    if kind.setup is not FederatedStrategy.setup:
        return "exchanges messages with clients before round 1, past the wrapper"
    if kind.personal_models is not FederatedStrategy.personal_models:
        return "keeps a model per node, and a wrapper handles one model for all"
    if strategy.sends:
        return f"sends clients {', '.join(strategy.sends)} besides the model, past the wrapper"
    if strategy.returns:
        back = ", ".join(strategy.returns)
        return f"needs of clients {back} besides their models, which a wrapper does not handle"
    return None


def _base() -> type:
    from flwr.serverapp.strategy import Strategy

    return Strategy


def _classes() -> dict[str, type[Any]]:
    """Flower's concrete strategies by class name."""
    module = importlib.import_module(_MODULE)
    classes: Iterable[tuple[str, Any]] = ((name, getattr(module, name)) for name in module.__all__)
    return {
        name: member
        for name, member in classes
        if inspect.isclass(member)
        and issubclass(member, _base())
        and not inspect.isabstract(member)
    }


def _google_style(cls: type[Any], arguments: Iterable[str]) -> str:
    """A NumPy-style docstring of Flower's with these arguments as an `Args:` section."""
    text = inspect.getdoc(cls) or ""
    summary = re.sub(r"^Message-based ", "", text.partition("\n\n")[0])
    summary = summary[:1].upper() + summary[1:]
    _, _, section = text.partition("\nParameters\n")
    described: dict[str, str] = {}
    name = None
    for line in section.splitlines()[1:]:
        if start := re.match(r"(\w+) ?: ", line):
            name = start[1]
            described[name] = ""
        elif name and line.startswith("    "):
            described[name] += f" {line.strip()}"
        elif line.strip():
            break
    described |= _DESCRIPTIONS
    told = [(key, described.get(key, "").strip()) for key in arguments]
    lines = [f"    {key}: {words}" for key, words in told if words]
    return "\n".join([summary, "", "Args:", *lines, ""])
