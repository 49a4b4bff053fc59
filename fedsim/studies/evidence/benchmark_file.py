"""A benchmark, a kind of study of `fedsim evidence`: many methods beside each other, tuned alike.

A TOML file: a scenario, the arms (methods, and what each client alone or all samples in one hand
would give), the settings in which they are held beside each other, the grid that all arms try, and
a grid of each arm's own key. Each arm is judged by what its clients would use.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.runs.arms import LOCAL, arm_of
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.outcome import check_metric
from fedsim.studies.cells.variants import (
    Axis,
    Variant,
    of_scenarios,
    parse_axis,
    refuse_equal,
    refuse_replaced,
)
from fedsim.studies.evidence.file import ARM, assignments
from fedsim.studies.evidence.study_file import (
    EvidenceTable,
    StudyContent,
    checked,
    sha256_with_code,
)
from fedsim.studies.tuning.points import Grid, check
from fedsim.studies.tuning.tune import check_metric_is_no_test

_JUDGED_BY = "local/{}_mean or personal/{}"  # instead of a metric of the server's test set


class BenchmarkArm(EvidenceTable):
    """`[[arms]]`: one method, or a reference without a federation.

    Attributes:
        name: What it is called.
        set: Assignments to the scenario.
        grid: Keys of its own with the values that it tries, beside what all arms try.
        metric: What it is judged by where that is not the benchmark's metric: a model of each
            client's own has another name than one that all share.
        reference: The scenario without a federation: every client alone (`local`) or all samples
            in one hand (`centralised`). None is a federation.
    """

    name: str = Field(min_length=1)
    set: list[str] = Field(default=[])
    grid: list[str] = Field(default=[])
    metric: str | None = None
    reference: Literal["local", "centralised"] | None = None


class BenchmarkSetting(EvidenceTable):
    """`[[settings]]`: where the arms are held beside each other.

    Attributes:
        title: What it is called.
        set: Assignments to the scenario, before the arms'.
    """

    title: str = Field(min_length=1)
    set: list[str] = Field(default=[])


class BenchmarkTuning(EvidenceTable):
    """`[tune]`: how each arm's settings are chosen, in every setting anew.

    Attributes:
        grid: The keys and their values, which all arms try.
        seeds: So many seeds, apart from the others.
    """

    grid: list[str] = Field(min_length=1)
    seeds: int = Field(default=2, ge=1)


class _BenchmarkDocument(EvidenceTable):
    kind: Literal["benchmark"]
    title: str = Field(min_length=1)
    remark: str = ""
    scenario: str
    set: list[str] = Field(default=[])
    baselines: list[str] = Field(min_length=1)
    metric: str = "local/accuracy_mean"
    shared: str | None = "test/accuracy"
    seeds: int = Field(default=10, ge=2)
    last: float = Field(default=0.1, gt=0, le=1)
    broken_off: float
    arms: list[BenchmarkArm]
    settings: list[BenchmarkSetting] = Field(min_length=1)
    tune: BenchmarkTuning

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("arms: a name is there twice")
        federated = [arm.name for arm in self.arms if arm.reference is None]
        for name in self.baselines:
            if name not in federated:
                raise ValueError(f"baselines: {unknown(name, 'a federated arm', federated)}")
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError("baselines: a name is there twice")
        references = [arm.reference for arm in self.arms if arm.reference is not None]
        if twice := next((each for each in references if references.count(each) > 1), None):
            raise ValueError(f"arms: reference = '{twice}' is there twice")
        titles = [setting.title for setting in self.settings]
        if len(set(titles)) < len(titles):
            raise ValueError("settings: a title is there twice")
        return self


class Benchmark(NamedTuple):
    """A benchmark's file, read.

    Attributes:
        path: The file.
        sha256: The hash of its content, of its scenario's and of the user's own code.
        document: What it says.
        scenario: The scenario's file or name.
        data: A folder with a folder for each data set that is read from files, by its name.
    """

    path: Path
    sha256: str
    document: _BenchmarkDocument
    scenario: str
    data: Path | None = None

    @property
    def name(self) -> str:
        """The study's name."""
        return self.path.stem

    @property
    def arms(self) -> Sequence[BenchmarkArm]:
        """The arms, in the order of the file."""
        return self.document.arms

    @property
    def baselines(self) -> Sequence[int]:
        """The places of the arms that others are held against, in the order of the file."""
        names = [arm.name for arm in self.arms]
        return [names.index(name) for name in self.document.baselines]

    def reference(self, name: str) -> int | None:
        """Return the place of a reference arm, None without one."""
        return next((at for at, arm in enumerate(self.arms) if arm.reference == name), None)

    def metric_of(self, arm: BenchmarkArm) -> str:
        """Return what an arm is judged by."""
        return arm.metric or self.document.metric

    def common(self) -> tuple[Axis, ...]:
        """Return the axes that all arms try."""
        return self._axes(self.document.tune.grid, "[tune] grid")

    def own(self, arm: BenchmarkArm) -> tuple[Axis, ...]:
        """Return the axes that one arm tries beside the common ones."""
        return self._axes(arm.grid, f"{arm.name}: grid")

    def _axes(self, texts: Sequence[str], what: str) -> tuple[Axis, ...]:
        return tuple(parse_axis(text, option=f"{self.path}: {what}") for text in texts)

    def federated(
        self, setting: BenchmarkSetting, arm: BenchmarkArm, more: Sequence[str] = ()
    ) -> Variant:
        """Return an arm in a setting, a reference arm as the federation that it is made from.

        Raises:
            ScenarioError: If it is impossible.
        """
        overrides = [*self.document.set, *setting.set, *arm.set, *more]
        (made,) = of_scenarios([self.scenario], [], overrides)
        return Variant({ARM: arm.name}, made.scenario.with_data(self.data))

    def variant(
        self, setting: BenchmarkSetting, arm: BenchmarkArm, more: Sequence[str] = ()
    ) -> Variant:
        """Return an arm in a setting as it is run; all samples in one hand needs the data.

        Args:
            setting: The setting.
            arm: The arm.
            more: Assignments after all others, such as a point of the arm's grid.

        Raises:
            ScenarioError: If it is impossible.
        """
        made = self.federated(setting, arm, more)
        if arm.reference is None:
            return made
        return Variant(made.labels, arm_of(made.scenario, arm.reference))

    def scenarios(self) -> list[Scenario]:
        """Return the scenarios of all arms in all settings, reference arms as federations."""
        settings = self.document.settings
        return [self.federated(each, arm).scenario for each in settings for arm in self.arms]


def read(content: StudyContent) -> Benchmark:
    """Read a benchmark's file and check what it declares.

    Values of a grid are tried one key at a time and in the first setting; `gather_benchmark` tries
    the rest before anything runs.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    path = content.path
    document = checked(
        _BenchmarkDocument,
        content,
        {"arms": BenchmarkArm, "settings": BenchmarkSetting, "tune": BenchmarkTuning},
    )
    scenario, raw = content.scenario(document.scenario)
    declared = Benchmark(path, "", document, scenario)
    _check_metrics(declared)
    for arm in declared.arms:
        axes = (*declared.common(), *declared.own(arm))
        check(axes, random=False, option=f"{path}: {arm.name}: grid")
        refuse_replaced(axes, "grid", arm.set, f"{path}: {arm.name}: set")
    for number, setting in enumerate(document.settings):
        try:
            made = [declared.federated(setting, arm) for arm in declared.arms]
            for arm, variant in zip(declared.arms, made, strict=True):
                if arm.reference == LOCAL:
                    arm_of(variant.scenario, LOCAL)
            _refuse_equal(declared.arms, made)
            for arm in declared.arms if number == 0 else ():
                for more in _one_key_at_a_time((*declared.common(), *declared.own(arm))):
                    declared.federated(setting, arm, more)
        except ScenarioError as error:
            raise ScenarioError(f"{path}: {setting.title}: {error}") from error
    return declared._replace(sha256=sha256_with_code(raw, declared.scenarios()))


def _refuse_equal(arms: Sequence[BenchmarkArm], made: Sequence[Variant]) -> None:
    """Refuse federated arms that are the same scenario and try the same values."""
    groups: dict[tuple[str, ...], list[Variant]] = {}
    for arm, variant in zip(arms, made, strict=True):
        if arm.reference is None:
            groups.setdefault(tuple(arm.grid), []).append(variant)
    for each in groups.values():
        refuse_equal(each)


def _check_metrics(declared: Benchmark) -> None:
    document, path = declared.document, declared.path
    if document.shared is not None:
        check_metric(document.shared, f"{path}: shared")
    judges = [(f"{path}: metric", document.metric)]
    judges += [(f"{path}: {arm.name}: metric", arm.metric) for arm in document.arms if arm.metric]
    for option, metric in judges:
        check_metric(metric, option)
        check_metric_is_no_test(metric, option, _JUDGED_BY)


def _one_key_at_a_time(axes: Sequence[Axis]) -> Iterator[list[str]]:
    """Assignments in which each value of each axis occurs, other keys at their first value."""
    grid = Grid(tuple(axes))
    first = grid.points[0]
    yield assignments(grid.keys, first)
    for place, axis in enumerate(axes):
        for value in axis.values[1:]:
            yield assignments(grid.keys, (*first[:place], value, *first[place + 1 :]))
