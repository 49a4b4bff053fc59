"""The kinds of studies: a claim of one paper, or a benchmark of many methods."""

from pathlib import Path
from typing import Literal, get_args

from fedsim.basics.errors import ScenarioError, nearest, show
from fedsim.studies.evidence import benchmark_file, file
from fedsim.studies.evidence.benchmark_file import Benchmark
from fedsim.studies.evidence.file import Declaration
from fedsim.studies.evidence.study_file import StudyContent, read_content, shipped_files

Kind = Literal["claim", "benchmark"]
KINDS: tuple[Kind, ...] = get_args(Kind)
USUAL_KIND: Kind = "claim"  # of a file that does not say


def read_study(path: Path) -> Declaration | Benchmark:
    """Read a study's file and check what it declares.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    content = read_content(path)
    if kind_of(content) == "benchmark":
        return benchmark_file.read(content)
    return file.read(content)


def shipped(kind: Kind) -> dict[str, Path]:
    """Return the studies of a kind that come with fedsim: their files by name."""
    return {
        name: path for name, path in shipped_files().items() if kind_of(read_content(path)) == kind
    }


def kind_of(content: StudyContent) -> Kind:
    """Return the kind of a study.

    Raises:
        ScenarioError: If it names another one.
    """
    kind = content.table.get("kind", USUAL_KIND)
    for known in KINDS:
        if kind == known:
            return known
    guess = nearest(str(kind), KINDS)
    hint = f"; did you mean '{guess}'?" if guess else ""
    raise ScenarioError(
        f"{content.path}: kind = {show(kind)}: must be {' or '.join(map(repr, KINDS))}{hint}"
    )
