"""A claim, a kind of study of `fedsim evidence`: what a paper says, and what is run to see it.

A TOML file: the claim in words, a scenario, the arms (the method, its baseline, its controls), the
settings in which they are held beside each other, and the grid of step sizes that all of them try.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.outcome import check_metric
from fedsim.studies.cells.variants import (
    Variant,
    of_scenarios,
    parse_axis,
    refuse_equal,
    refuse_replaced,
)
from fedsim.studies.evidence.study_file import (
    EvidenceTable,
    StudyContent,
    checked,
    sha256_with_code,
)
from fedsim.studies.tuning.points import Grid, Point, check
from fedsim.studies.tuning.tune import check_metric_is_no_test

ARM = "arm"


class Arm(EvidenceTable):
    """`[[arms]]`: one thing that is run.

    Attributes:
        name: What it is called.
        role: The method itself, the baseline, or a control that explains it.
        set: Assignments to the scenario.
    """

    name: str = Field(min_length=1)
    role: Literal["method", "baseline", "control"]
    set: list[str] = Field(default=[])


class Setting(EvidenceTable):
    """`[[settings]]`: where the arms are held beside each other.

    Attributes:
        title: What it is called.
        set: Assignments to the scenario, before the arms'.
        arms: The arms that take part, by name; all when left out.
        best: Whether they are also held beside each other at each one's own best step.
        null: Whether nothing may differ here: a control of the comparison itself.
    """

    title: str = Field(min_length=1)
    set: list[str] = Field(default=[])
    arms: list[str] | None = None
    best: bool = False
    null: bool = False


class Tuning(EvidenceTable):
    """`[tune]`: how best steps are chosen.

    Attributes:
        grid: The keys and their values, which all arms try.
        seeds: So many seeds, apart from the others.
        set: Assignments that let the runs measure the metric.
        metric: What points are judged by; None takes `fedsim tune`'s.
    """

    grid: list[str] = Field(min_length=1)
    seeds: int = Field(default=3, ge=1)
    set: list[str] = Field(default=[])
    metric: str | None = None


class _Document(EvidenceTable):
    kind: Literal["claim"] = "claim"
    title: str = Field(min_length=1)
    paper: str = Field(min_length=1)
    claim: str = Field(min_length=1)
    remark: str = ""
    scenario: str
    set: list[str] = Field(default=[])
    metric: str = "test/accuracy"
    seeds: int = Field(default=10, ge=2)
    last: float = Field(default=0.1, gt=0, le=1)
    broken_off: float
    arms: list[Arm]
    settings: list[Setting] = Field(min_length=1)
    tune: Tuning | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("arms: a name is there twice")
        roles = [arm.role for arm in self.arms]
        if roles.count("method") != 1 or "baseline" not in roles:
            raise ValueError("arms: one must be the 'method', and one or more a 'baseline'")
        titles = [setting.title for setting in self.settings]
        if len(set(titles)) < len(titles):
            raise ValueError("settings: a title is there twice")
        for setting in self.settings:
            for name in setting.arms or []:
                if name not in names:
                    raise ValueError(f"settings, {setting.title}: {unknown(name, 'an arm', names)}")
            if setting.best and self.tune is None:
                raise ValueError(f"settings, {setting.title}: best = true needs a [tune]")
        return self


class Declaration(NamedTuple):
    """A claim's file, read.

    Attributes:
        path: The file.
        sha256: The hash of its content, of its scenario's and of the user's own code.
        document: What it says.
        scenario: The scenario's file or name.
        data: A folder with a folder for each data set that is read from files, by its name.
    """

    path: Path
    sha256: str
    document: _Document
    scenario: str
    data: Path | None = None

    @property
    def name(self) -> str:
        """The study's name."""
        return self.path.stem

    def arms_of(self, setting: Setting) -> list[Arm]:
        """Return the arms of a setting, the method first."""
        taking = [
            arm
            for arm in self.document.arms
            if setting.arms is None or arm.name in setting.arms or arm.role == "method"
        ]
        return sorted(taking, key=lambda arm: arm.role != "method")

    def variants(
        self, setting: Setting, points: Sequence[Sequence[str]] | None = None
    ) -> list[Variant]:
        """Return a setting's arms as they are run.

        Args:
            setting: The setting.
            points: Assignments to each arm, such as its own best step; None leaves them equal.

        Raises:
            ScenarioError: If one of them is impossible.
        """
        arms = self.arms_of(setting)
        given = points or [()] * len(arms)
        return [self.variant(setting, arm, point) for arm, point in zip(arms, given, strict=True)]

    def variant(self, setting: Setting, arm: Arm, more: Sequence[str] = ()) -> Variant:
        """Return one arm in a setting.

        Raises:
            ScenarioError: If it is impossible.
        """
        overrides = [*self.document.set, *setting.set, *arm.set, *more]
        (made,) = of_scenarios([self.scenario], [], overrides)
        return Variant({ARM: arm.name}, made.scenario.with_data(self.data))

    def scenarios(self) -> list[Scenario]:
        """Return the scenarios of all arms in all settings."""
        settings = self.document.settings
        return [variant.scenario for each in settings for variant in self.variants(each)]

    def grid(self) -> Grid:
        """Return the grid of step sizes."""
        assert self.document.tune is not None
        axes = [
            parse_axis(text, option=f"{self.path}: [tune] grid") for text in self.document.tune.grid
        ]
        check(axes, random=False)
        return Grid(tuple(axes))


def read(content: StudyContent) -> Declaration:
    """Read a claim's file and check every run that it declares.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    path = content.path
    document = checked(_Document, content, {"arms": Arm, "settings": Setting, "tune": Tuning})
    check_metric(document.metric, f"{path}: metric")
    scenario, raw = content.scenario(document.scenario)
    declared = Declaration(path, "", document, scenario)
    for setting in document.settings:
        try:
            refuse_equal(declared.variants(setting))
            if document.tune is not None and setting.best:
                check_metric_is_no_test(document.tune.metric)
                grid = declared.grid()
                for arm in declared.arms_of(setting):  # whose own values the grid would replace
                    refuse_replaced(grid.axes, "[tune] grid", arm.set, f"{arm.name}: set")
                keys = grid.keys
                for point in grid.points:
                    assigned = assignments(keys, point)
                    declared.variants(setting, [assigned] * len(declared.arms_of(setting)))
        except ScenarioError as error:
            raise ScenarioError(f"{path}: {setting.title}: {error}") from error
    return declared._replace(sha256=sha256_with_code(raw, declared.scenarios()))


def assignments(keys: Sequence[str], point: Point) -> list[str]:
    """Return a point of a grid as assignments.

    Example:
        >>> assignments(["client.local_lr"], ("0.1",))
        ['client.local_lr=0.1']
    """
    return [f"{key}={value}" for key, value in zip(keys, point, strict=True)]
