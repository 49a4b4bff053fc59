"""What '[clock]' says; needs pydantic alone, for it is read before kernels are pinned."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# keys that only some laws read, and which
_OF_LAWS = {
    "seconds": ("list",),
    "spread": ("linear",),
    "sigma": ("log_normal",),
    "jitter": ("log_normal",),
}
_NEEDED = {"list": "seconds", "linear": "spread"}


class JobTime(BaseModel):
    """`[clock.job]`: how long a client's local work takes, in virtual seconds.

    A job is what one client does with one model: download, local work, upload.

    Attributes:
        law: "constant", as long for all; "list", one number per client; "linear", from the slowest
            client 0 to the fastest; "log_normal", with a spread between clients and between jobs;
            "exponential", drawn anew for every job.
        job_s: Seconds of the local work of one job: of the median client under "log_normal", the
            mean under "exponential", of the slowest client under "linear".
        step_s: Seconds per local step, in place of `job_s`: who has more samples takes longer.
        seconds: Under "list", each client's seconds per job, in client order.
        spread: Under "linear", the fastest client's saving as a share of the slowest client's time,
            in [0, 1); 0.8 is the setting "F-80" of Fraboni et al. 2023.
        sigma: Under "log_normal", the standard deviation of the logarithm between clients.
        jitter: Likewise between the jobs of a client.
        download_s: Seconds until the model has arrived.
        upload_s: Seconds until the reply has arrived.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    law: Literal["constant", "list", "linear", "log_normal", "exponential"] = "constant"
    job_s: _Positive | None = None
    step_s: _Positive | None = None
    seconds: list[_Positive] | None = Field(default=None, min_length=1)
    spread: float | None = Field(default=None, ge=0, lt=1)
    sigma: float | None = Field(default=None, ge=0, le=10)
    jitter: float | None = Field(default=None, ge=0, le=10)
    download_s: _Seconds = 0.0
    upload_s: _Seconds = 0.0

    @model_validator(mode="after")
    def _keys_matter(self) -> Self:
        for key, laws in _OF_LAWS.items():
            if getattr(self, key) is not None and self.law not in laws:
                allowed = " or ".join(f'"{law}"' for law in laws)
                raise ValueError(
                    f'{key} changes nothing with law = "{self.law}": leave it out, or say law = '
                    f"{allowed}"
                )
        needed = _NEEDED.get(self.law)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"law = \"{self.law}\" needs the key '{needed}'")
        if self.law == "log_normal" and self.sigma is None and self.jitter is None:
            raise ValueError("law = \"log_normal\" needs 'sigma', 'jitter' or both")
        return self

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.job_s is not None and self.step_s is not None:
            raise ValueError("job_s and step_s: give one of them, for each says how long a job is")
        if self.law == "list":
            for key in ("job_s", "step_s"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f'{key} changes nothing with law = "list", which gives each client\'s '
                        "seconds: leave it out"
                    )
        return self


class Clock(BaseModel):
    """`[clock]`: when the server aggregates, in virtual time, and when clients start again.

    A round of the run is one aggregation.

    Attributes:
        trigger: "all" waits for everybody, as without a clock; "arrival" aggregates each reply as
            it comes; "count" waits for so many; "window" aggregates at fixed times.
        count: Replies per aggregation, under "count".
        window_s: Seconds between aggregations, under "window".
        restart: When a client that has answered makes room for the next job: "on_aggregation",
            with the new model, or "at_once", with the model of now.
        concurrency: Jobs at a time; None takes the clients of a round, as `[participation]` says.
        stop_s: The run ends before the first aggregation after this time.
        tick_s: Seconds of the smallest unit of time; times are whole numbers of it.
        job: How long a job takes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    trigger: Literal["all", "arrival", "count", "window"] = "all"
    count: int | None = Field(default=None, ge=1)
    window_s: _Positive | None = None
    restart: Literal["on_aggregation", "at_once"] = "on_aggregation"
    concurrency: int | None = Field(default=None, ge=1)
    stop_s: _Positive | None = None
    tick_s: _Positive = 1e-6
    job: JobTime = JobTime()

    @model_validator(mode="after")
    def _trigger_is_whole(self) -> Self:
        for key, trigger in (("count", "count"), ("window_s", "window")):
            given = getattr(self, key) is not None
            if given and self.trigger != trigger:
                raise ValueError(
                    f'{key} changes nothing with trigger = "{self.trigger}": leave it out, or say '
                    f'trigger = "{trigger}"'
                )
            if not given and self.trigger == trigger:
                raise ValueError(f"trigger = \"{trigger}\" needs the key '{key}'")
        return self

    @model_validator(mode="after")
    def _nobody_waits_for_nothing(self) -> Self:
        if self.trigger == "all":
            for key, default in (("restart", "on_aggregation"), ("concurrency", None)):
                if (value := getattr(self, key)) != default:
                    raise ValueError(
                        f"{key} = {value!r} changes nothing where the trigger is 'all', which "
                        "waits for everybody who was asked: leave it out, or take another trigger"
                    )
        most = self.concurrency
        if self.count is not None and most is not None and self.count > most:
            raise ValueError(
                f"count = {self.count} replies never come: only concurrency = {most} jobs are "
                f"under way at a time; at most {most}"
            )
        return self

    @model_validator(mode="after")
    def _ticks_are_fine(self) -> Self:
        if self.window_s is not None and self.window_s < self.tick_s:
            raise ValueError(
                f"window_s = {self.window_s:g} is shorter than tick_s = {self.tick_s:g}, the "
                "smallest unit of time; lower tick_s"
            )
        return self
