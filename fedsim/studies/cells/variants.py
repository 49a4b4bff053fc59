"""The variants of a study: scenarios, or one scenario with `--vary key=value,value`."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsim.basics.errors import ScenarioError, nearest, printable
from fedsim.basics.home import expanded
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from fedsim.scenario.tables import WITH_PATHS

SCENARIO_AXIS = "scenario"


@dataclass(frozen=True)
class Variant:
    """One thing that is held beside others.

    Attributes:
        labels: What it is called, by axis, such as `{"strategy.name": "fedau"}`.
        scenario: The scenario; each cell has its own seed.
        given: Folders of runs that are there already, by seed; a variant that has them runs none.
        code: The hash of the user's own code that they are of; None takes it as it is now.
    """

    labels: Mapping[str, str]
    scenario: Scenario
    given: Mapping[int, Path] = field(default_factory=dict)
    code: str | None = None

    @property
    def name(self) -> str:
        """All labels in one line."""
        if not self.labels:
            return self.scenario.stem
        return ", ".join(
            label if axis == SCENARIO_AXIS else f"{axis}={label}"
            for axis, label in self.labels.items()
        )


@dataclass(frozen=True)
class Axis:
    """A key that varies.

    Attributes:
        key: The key, dotted.
        values: Its values as they were typed.
    """

    key: str
    values: tuple[str, ...]


def parse_axis(text: str, *, option: str = "--vary") -> Axis:
    """Read `table.key=value,value`.

    Values are TOML, bare words are strings; a comma inside of brackets, braces or quotes belongs to
    its value.

    Raises:
        ScenarioError: If it is anything else, or a value comes twice.

    Example:
        >>> parse_axis("strategy.name=fedavg,fedau").values
        ('fedavg', 'fedau')
        >>> parse_axis('task.hidden=[8, 8],[16]').values
        ('[8, 8]', '[16]')
    """
    key, separator, rest = text.partition("=")
    key = key.strip()
    values = tuple(part.strip() for part in _split(rest))
    if not separator or not key or not all(values):
        raise ScenarioError(
            f"{option} {printable(text)}: must be table.key=value,value, such as "
            "partition.alpha=0.1,1"
        )
    if key == "seed":
        raise ScenarioError(f"{option} {printable(text)}: seeds are given by --seeds")
    for value in values:
        if values.count(value) > 1:
            raise ScenarioError(f"{option} {printable(text)}: {printable(value)} is there twice")
    return Axis(key, values)


def refuse_replaced(
    axes: Sequence[Axis], option: str, others: Sequence[str], other_option: str
) -> None:
    """Refuse keys that are given and then replaced by what varies: they would be without effect.

    Args:
        axes: What varies.
        option: What varying it is called.
        others: Keys, or assignments of keys, that come before it.
        other_option: What giving them is called.

    Raises:
        ScenarioError: Naming both.

    Example:
        >>> refuse_replaced([Axis("seed", ("1", "2"))], "--vary", ["seed=9"], "--set")
        Traceback (most recent call last):
        ...
        fedsim.basics.errors.ScenarioError: --set seed=9: is replaced by --vary seed; leave one out
    """
    for other in others:
        key = other.partition("=")[0].strip()
        for axis in axes:
            if f"{key}.".startswith(f"{axis.key}."):
                raise ScenarioError(
                    f"{other_option} {printable(other)}: is replaced by {option} {axis.key}; leave "
                    "one out"
                )


def parse_seeds(text: str, first: int) -> tuple[int, ...]:
    """Read a number of seeds, or a list of them.

    Args:
        text: "10" for ten seeds from `first` on, "3,5,8" for these.
        first: The scenario's seed.

    Raises:
        ScenarioError: If it is neither.

    Example:
        >>> parse_seeds("3", 1), parse_seeds("7,5", 1)
        ((1, 2, 3), (7, 5))
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and part.isascii() for part in parts):
        raise ScenarioError(
            f"--seeds {printable(text)}: must be a number of seeds, or several seeds such as 1,2,5"
        )
    numbers = [int(part) for part in parts]
    if len(numbers) == 1 and "," not in text:
        if not numbers[0]:
            raise ScenarioError("--seeds 0: must be >= 1")
        return tuple(range(first, first + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise ScenarioError(f"--seeds {text}: a seed is there twice")
    return tuple(numbers)


def of_scenarios(
    paths: Sequence[str], axes: Sequence[Axis], overrides: Sequence[str]
) -> list[Variant]:
    """Return every scenario at every combination of values, all of them checked.

    Args:
        paths: Files, or names of scenarios that come with fedsim.
        axes: What varies.
        overrides: Assignments to all of them, before those that vary.

    Raises:
        ScenarioError: With one line for everything that is wrong; what is wrong with some values
            alone ends with these.
    """
    twice = next((axis for axis in axes if sum(a.key == axis.key for a in axes) > 1), None)
    if twice is not None:
        raise ScenarioError(f"--vary {twice.key}: is there twice; give all its values at once")
    names = _names(paths)
    variants, problems = [], _VariantProblems()
    for path in paths:
        for values in itertools.product(*(axis.values for axis in axes)):
            assigned = [f"{axis.key}={v}" for axis, v in zip(axes, values, strict=True)]
            labels = {SCENARIO_AXIS: names[path]} if len(paths) > 1 else {}
            labels |= {axis.key: v for axis, v in zip(axes, values, strict=True)}
            try:
                scenario = load(path, [*overrides, *assigned])
            except ScenarioError as error:
                problems.add(str(error), path, assigned)
            else:
                variants.append(Variant(labels, scenario))
                problems.passed(path)
    problems.raise_any(axes)
    refuse_equal(variants)
    return variants


class _VariantProblems:
    """What is wrong, each once, with the values that bring it about."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[str, ...]]] = {}
        self._passed: set[str] = set()

    def add(self, message: str, path: str, assigned: Sequence[str]) -> None:
        for line in message.splitlines():
            self._found.setdefault(line, []).append((path, *assigned))

    def passed(self, path: str) -> None:
        self._passed.add(path)

    def raise_any(self, axes: Sequence[Axis]) -> None:
        if not self._found:
            return
        lines = []
        for line, where in self._found.items():
            blamed = self._blamed(where, axes)
            assigned = "".join(f" --vary {a}" for a in blamed)
            shown = line.replace("--set", "--vary") if any(a in line for a in blamed) else line
            lines.append(f"{shown} (with{assigned})" if blamed else line)
        tables = {
            axis.key.partition(".")[0] for axis in axes if axis.key.endswith((".name", ".kind"))
        }
        hyper = [
            line
            for line in lines
            if "is not a hyperparameter of" in line or "is not a key of" in line
        ]
        if table := next((t for t in sorted(tables) if any(f"[{t}]" in h for h in hyper)), None):
            lines.append(
                f"the scenario's other keys of [{table}] stay as they are; whole tables replace "
                f'them: --vary \'{table}={{name="A", key=1}},{{name="B"}}\''
            )
        raise ScenarioError("\n".join(lines))

    def _blamed(self, where: list[tuple[str, ...]], axes: Sequence[Axis]) -> list[str]:
        """The assignments that all places of a problem share and that some values lack."""
        common = set.intersection(*(set(place[1:]) for place in where))
        alternatives = {f"{a.key}={v}" for a in axes for v in a.values if len(a.values) > 1}
        return [a for a in where[0][1:] if a in common & alternatives]


def refuse_equal(variants: Sequence[Variant]) -> None:
    """Refuse variants that are the same scenario: nothing could differ between them."""
    seen: dict[str, Variant] = {}
    for variant in variants:
        key = fingerprint(variant.scenario, variant.code)
        if key in seen:
            raise ScenarioError(
                f"{variant.name} and {seen[key].name} are the same scenario: nothing that decides "
                "a result differs between them"
            )
        seen[key] = variant


def fingerprint(scenario: Scenario, code: str | None = None) -> str:
    """Return a hash of what decides a run's result, files that it names and its code included.

    The scenario's own hash leaves paths out, for the data's is in the manifest; here nothing has
    been read yet, so a file counts by its content and a folder by its files' sizes and times.

    Args:
        scenario: The scenario.
        code: The hash of the user's own code; None takes it as it is now. Without any code it is
            empty and changes no hash.
    """
    digest = hashlib.sha256(scenario.sha256.encode())
    digest.update((scenario.code.sha256 if code is None else code).encode())
    document = scenario.resolved()
    for table, key in WITH_PATHS.items():
        if isinstance(path := (document.get(table) or {}).get(key), str):
            for part in _content(expanded(path)):
                digest.update(f"{table}:{part};".encode())
    return digest.hexdigest()


def _content(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open("rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest()
        return
    for where, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file_ = Path(where) / name
            try:
                found = file_.stat()
            except OSError:
                continue
            yield f"{file_.relative_to(path)}:{found.st_size}:{found.st_mtime_ns}"


def _split(text: str) -> list[str]:
    """Split at the commas that are in no bracket, brace or quote."""
    parts, depth, quote, begun = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append(text[begun:place])
            begun = place + 1
    return [*parts, text[begun:]]


def _names(paths: Sequence[str]) -> dict[str, str]:
    """What each scenario is called: its stem where that tells them apart, else as it was typed."""
    stems = [Path(path).stem for path in paths]
    for path in paths:
        if list(paths).count(path) > 1:
            raise ScenarioError(f"{path}: is there twice")
    return {
        path: stem if stems.count(stem) == 1 else path
        for path, stem in zip(paths, stems, strict=True)
    }


def choose(label: str, labels: Sequence[str], what: str) -> str:
    """Return the label if it is one of them.

    Raises:
        ScenarioError: Naming the nearest.
    """
    if label in labels:
        return label
    guess = nearest(label, labels)
    hint = f"; did you mean '{guess}'?" if guess else ""
    raise ScenarioError(f"{what} {printable(label)}: is none of {', '.join(labels)}{hint}")
