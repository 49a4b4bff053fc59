"""The tables of a scenario: those with fixed keys as models, and which tables name a factory."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedsim.basics.kernels import Bits
from fedsim.federation.admission_table import Admission
from fedsim.federation.clock_table import Clock, JobTime
from fedsim.federation.deployment_table import WhoMustBeThere
from fedsim.federation.device_table import Devices

FACTORY_TABLES = ("task", "data", "partition", "participation", "strategy", "client")
OPTIONAL_TABLES = ("attack", "topology")  # factory tables that a scenario may leave out
# tables that name a file or folder, and under which key
WITH_PATHS = {
    "task": "weights",
    "data": "path",
    "partition": "path",
    "participation": "path",
    "topology": "path",
}


class Table(BaseModel):
    """A table with fixed keys, of these types and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ClientResources(Table):
    """What one worker takes of the machine, as Flower's `client_resources`."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_are_taken(self) -> Self:
        if not self.num_cpus and not self.num_gpus:
            raise ValueError("takes no CPU and no GPU: give num_cpus or num_gpus above 0")
        return self


class Engine(Table):
    """`[engine]`: where and how clients are computed."""

    kind: Literal["ray", "inline"] = "ray"
    workers: int | None = Field(default=None, ge=1)
    chunk_size: int | None = None
    executor: Literal["auto", "batched", "vmap", "loop"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)
    bits: Bits = "fast"
    device: Literal["cpu", "cuda"] = "cpu"
    deterministic: bool = True
    client_resources: ClientResources = ClientResources()
    address: str | None = None
    client_timeout_s: float | None = Field(default=None, gt=0)
    round_timeout_s: float | None = Field(default=None, gt=0)
    startup_timeout_s: float = Field(default=120.0, gt=0)
    silence_timeout_s: float = Field(default=60.0, gt=0)
    state_limit_mb: float | None = Field(default=None, gt=0)
    on_failure: Literal["skip", "retry", "stop"] = "skip"
    retries: int = Field(default=2, ge=1)
    min_replies: int = Field(default=1, ge=1)
    quorum: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _retries_happen(self) -> Self:
        if self.on_failure != "retry" and self.retries != 2:
            raise ValueError(
                f"retries = {self.retries} changes nothing with on_failure = '{self.on_failure}': "
                "leave it out, or say on_failure = 'retry'"
            )
        return self


class Stop(Table):
    """`[evaluation.stop]`: when a run ends before its last round."""

    metric: str = "test/accuracy"
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)
    mode: Literal["max", "min"] = "max"

    @model_validator(mode="after")
    def _has_a_reason(self) -> Self:
        if self.target is None and self.patience is None:
            raise ValueError("needs a 'target', a 'patience' or both")
        return self


class Robust(Table):
    """`[evaluation.robust]`: how samples of the test set are moved; see `RobustEvaluation`."""

    radii: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1)
    attack: Literal["pgd", "fgsm"] = "pgd"
    norm: Literal["inf", "2"] = "inf"
    steps: int = Field(default=20, ge=1)
    step: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    random_start: bool = False
    box: list[float] | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        names = [f"{radius:g}" for radius in self.radii]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"radii: {twice} is there twice; give each radius once")
        if self.attack == "fgsm" and (self.step is not None or self.random_start):
            key = "random_start" if self.random_start else "step"
            raise ValueError(f"{key} changes nothing with attack = 'fgsm': leave it out")
        if self.box is not None and not (len(self.box) == 2 and self.box[0] < self.box[1]):
            raise ValueError(f"box = {self.box}: must be the least value and a larger one")
        return self


class Finetune(Table):
    """`[evaluation.finetune]`: what clients train before they evaluate once more.

    Attributes:
        epochs: Passes over the client's own training samples.
        lr: Step size of SGD.
        tensors: Which tensors are trained, by name, leading part or glob; None trains all.
    """

    epochs: int = Field(default=1, ge=1)
    lr: float = Field(gt=0, allow_inf_nan=False)
    tensors: list[str] | None = Field(default=None, min_length=1)


class EvaluationTable(Table):
    """`[evaluation]`: what is measured, and how often."""

    every: int = Field(default=1, ge=1)
    clients: int = Field(default=0, ge=0)
    per_client: bool = False
    pooled: bool = False
    robust: Robust | None = None
    batch_size: int = Field(default=1000, ge=1)
    stop: Stop | None = None
    keep_best: str | None = None
    finetune: Finetune | None = None


class CheckpointTable(Table):
    """`[checkpoint]`: how often a run can be resumed from, and how many such points are kept."""

    every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)


class Output(Table):
    """`[output]`: what is written besides `metrics.jsonl`."""

    tensorboard: bool = False


class Head(Table):
    """The keys outside every table.

    Attributes:
        title: One line for people.
        source: What it reproduces.
        seed: The seed of every draw.
        rounds: The number of rounds.
        tier: When tests run it.
        modules: The folder of what is named by import path, several as in PYTHONPATH; "" looks
            beside the scenario's file and on `sys.path`.
    """

    title: str = ""
    source: str = ""
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=10, ge=1)
    tier: Literal["fast", "slow", "gpu", "deploy"] = "fast"
    modules: str = ""


# a scenario may leave them out
OPTIONAL_FIXED: dict[str, type[BaseModel]] = {
    "devices": Devices,
    "admission": Admission,
    "clock": Clock,
    "deployment": WhoMustBeThere,
}
FIXED_TABLES: dict[str, type[Table]] = {
    "engine": Engine,
    "evaluation": EvaluationTable,
    "checkpoint": CheckpointTable,
    "output": Output,
}
# tables within tables
NESTED: dict[str, type[BaseModel]] = {
    "client_resources": ClientResources,
    "stop": Stop,
    "finetune": Finetune,
    "job": JobTime,
}
