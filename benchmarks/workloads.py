"""What is timed, on which systems, and what it has to show."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

RAY = ("fedsim-ray1", "fedsim-ray2")  # a target is for the best of these rows


@dataclass(frozen=True)
class Workload:
    """One epoch of SGD (batches of 20, step 0.1) per client and round, no evaluation.

    Attributes:
        title: What it is, for the report.
        model: One of `benchmarks.systems.torch_models`.
        clients: N, registered.
        cohort: K, per round.
        pool: Which pool the clients share.
        systems: Who runs it; None is everybody.
        strategy: A scenario's `[strategy]`, with every hyperparameter that a peer needs to know.
        gradients: How often a step of its clients takes a gradient.
    """

    title: str
    model: str
    clients: int = 100
    cohort: int = 20
    pool: str = "equal"
    systems: tuple[str, ...] | None = None
    strategy: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({"name": "fedavg"})
    )
    gradients: int = 1

    def arguments(self) -> dict[str, Any]:
        """Return what a system's script is told of it."""
        numbers = {"model": self.model, "clients": self.clients, "cohort": self.cohort}
        training = {"batch": 20, "epochs": 1, "lr": 0.1, "dtype": "float32"}
        return {**numbers, **training, "strategy": dict(self.strategy)}


@dataclass(frozen=True)
class System:
    """A script in an environment.

    Attributes:
        title: What it is, for the report.
        script: File in `benchmarks/systems`.
        environment: One of `benchmarks.environments`; None is the one that the harness runs in.
        arguments: What its script is told besides the workload.
        variables: Of its process.
    """

    title: str
    script: str
    environment: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    variables: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Target:
    """A ratio of times that must be reached.

    Attributes:
        slow: (workload, systems) that is divided: the best of these systems.
        fast: (workload, systems) that divides: the best of these systems.
        bound: The ratio's bound.
        sense: Whether the ratio must be at least or at most that.
    """

    slow: tuple[str, tuple[str, ...]]
    fast: tuple[str, tuple[str, ...]]
    bound: float
    sense: Literal["at least", "at most"] = "at least"


ONE_CORE = ("fedsim-inline", "flower-1")  # who runs other algorithms than FedAvg: ours, Flower


def _algorithm(title: str, name: str, gradients: int = 1, **settings: float) -> Workload:
    """An algorithm on W2's model, data and cohort."""
    table = MappingProxyType({"name": name, **settings})
    return Workload(title, "mlp", systems=ONE_CORE, strategy=table, gradients=gradients)


BASELINE = "W2-fedavg"  # what other algorithms' time is divided by
ALGORITHMS = {
    BASELINE: _algorithm("FedAvg", "fedavg"),
    "W2-fedprox": _algorithm("FedProx", "fedprox", mu=0.1),
    "W2-fednova": _algorithm("FedNova", "fednova"),
    "W2-scaffold": _algorithm("SCAFFOLD, option II", "scaffold"),
    "W2-feddyn": _algorithm("FedDyn", "feddyn", alpha=0.01),
    "W2-ditto": _algorithm("Ditto", "ditto", 2, strength=0.1),
}
PEERS = {
    "W1": Workload("logistic regression, N = 100, K = 20", "logistic"),
    "W2": Workload("MLP 784-200-200-10, N = 100, K = 20", "mlp"),
    "W3": Workload("CNN 16-32-64, N = 100, K = 20", "cnn"),
    "W4": Workload("logistic regression, N = 10,000, K = 100", "logistic", 10_000, 100),
    "W5": Workload(
        "logistic regression, N = 1,000,000, K = 100", "logistic", 1_000_000, 100,
        systems=("fedsim-inline", *RAY),
    ),
    "W7": Workload(
        "MLP, N = 100, K = 20, log-normal sizes of 20 to 2,000", "mlp", pool="lognormal"
    ),
}  # fmt: skip
WORKLOADS = {**PEERS, **ALGORITHMS}
CONTESTS = (  # what is interleaved with what
    ("W1",), ("W2",), ("W3",), ("W4", "W5"), ("W7",), tuple(ALGORITHMS),
)  # fmt: skip

SYSTEMS = {
    "fedsim-inline": System(
        "fedsim, inline", "fedsim_run.py", arguments={"engine": {"kind": "inline"}}
    ),
    "fedsim-ray1": System(
        "fedsim, Ray, 1 worker", "fedsim_run.py",
        arguments={"engine": {"kind": "ray", "workers": 1}},
    ),
    "fedsim-ray2": System(
        "fedsim, Ray, 2 workers", "fedsim_run.py",
        arguments={"engine": {"kind": "ray", "workers": 2}},
    ),
    "fedsim-unpinned": System(
        "fedsim, inline, kernels not pinned", "fedsim_run.py",
        arguments={"engine": {"kind": "inline"}, "unpinned": True},
    ),
    "fedsim-portable": System(
        "fedsim, inline, portable bits", "fedsim_run.py",
        arguments={"engine": {"kind": "inline", "bits": "portable"}},
        variables={"FEDSIM_BITS": "portable"},
    ),
    "flower": System(
        "Flower simulation, 2 workers", "flower_sim.py", "flower", arguments={"workers": 2}
    ),
    "flower-1": System(
        "Flower simulation, 1 worker", "flower_sim.py", "flower", arguments={"workers": 1}
    ),
    "pfl-1": System("pfl-research, 1 thread", "pfl_research.py", "pfl", arguments={"threads": 1}),
    "pfl-2": System("pfl-research, 2 threads", "pfl_research.py", "pfl", arguments={"threads": 2}),
    "fedjax": System("FedJAX", "fedjax_sim.py", "fedjax"),
    "torch": System("bare torch loop, 1 thread", "torch_loop.py"),
}  # fmt: skip
FAMILIES = {  # what a user names with --systems; the first row of each stands for it in the check
    "fedsim": ("fedsim-inline", *RAY),
    "flower": ("flower", "flower-1"),
    "pfl": ("pfl-1", "pfl-2"),
    "fedjax": ("fedjax",),
    "torch": ("torch",),
    "bits": ("fedsim-unpinned", "fedsim-portable"),  # beside fedsim-inline: what promises cost
}
ASIDE = ("bits",)  # families that run only when they are named

_BOUNDS = {
    "flower": {"W1": 12, "W2": 5, "W3": 2.5, "W4": 50},
    "pfl": {"W1": 4, "W2": 2, "W3": 2, "W4": 4, "W7": 2},
    "fedjax": {"W1": 1.3, "W2": 1.2, "W3": 5, "W4": 1.3},
}
TARGETS = (
    *(
        Target((workload, FAMILIES[peer]), (workload, RAY), bound)
        for peer, bounds in _BOUNDS.items()
        for workload, bound in bounds.items()
    ),
    Target(("W5", RAY), ("W4", RAY), 1.2, "at most"),
    Target(("W6", ("flag",)), ("W6", ("gram",)), 3, "at most"),
    Target(("W6", ("fedld",)), ("W6", ("gram",)), 3, "at most"),
    Target(("W6", ("median",)), ("W6", ("sort",)), 3, "at most"),
    *(
        Target((name, ONE_CORE[:1]), (BASELINE, ONE_CORE[:1]), 1.25 * work.gradients, "at most")
        for name, work in ALGORITHMS.items()
        if name != BASELINE
    ),
    *(Target((name, ONE_CORE[1:]), (name, ONE_CORE[:1]), 3) for name in ALGORITHMS),
)
BYTES_PER_CLIENT = 200  # of a registered client, W5 beside W4
KERNELS = ("gram", "flag", "fedld", "sort", "median")  # W6
LOSS_TOLERANCE = 0.10  # of the reference's loss
AGREEMENT = 1e-9  # of a model's largest number: how far two systems' may be apart in float64
DRAWN_TOLERANCE = 0.01  # nats; cohorts that differ leave what is nearly learned at other losses
REFERENCE = "torch"  # whose loss the others are held to
PYTHON = sys.executable
