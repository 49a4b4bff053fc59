"""What `fedsim evidence` does, from its arguments to its page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.json_files import taking, write_json_atomic
from fedsim.basics.versions import versions
from fedsim.cli.compare_study import StudyAnswer
from fedsim.studies.cells.cell import locked
from fedsim.studies.cells.code import said_of_code
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.watching import StudyProgress
from fedsim.studies.comparison.tables import grid, number
from fedsim.studies.evidence.benchmark import BenchmarkResult, gather_benchmark
from fedsim.studies.evidence.benchmark_file import Benchmark
from fedsim.studies.evidence.benchmark_page import benchmark_document, benchmark_page
from fedsim.studies.evidence.benchmark_picture import draw_benchmark
from fedsim.studies.evidence.evidence import Evidence, gather
from fedsim.studies.evidence.file import Declaration
from fedsim.studies.evidence.kinds import KINDS, USUAL_KIND, Kind, read_study, shipped
from fedsim.studies.evidence.page import evidence_document, page
from fedsim.studies.evidence.study_file import find

_NAMED = ("fedsim", "python", "torch", "flwr", "numpy")  # versions that a page names


class EvidenceAsked(NamedTuple):
    """The arguments of `fedsim evidence`, see there."""

    studies: Sequence[str] = ()
    page: Path | None = None
    seeds: int | None = None
    out: Path = Path("studies/evidence")
    workers: int | None = None
    data: Path | None = None
    kind: str | None = None


def run_evidence(asked: EvidenceAsked, *, width: int, quiet: bool = False) -> StudyAnswer:
    """Make the missing runs of declared studies, write the page, and return the answer.

    Raises:
        ScenarioError: If a study's file is wrong, or studies are of two kinds; nothing has run
            then.
        BusyError: If another process works in the folder.
    """
    if asked.seeds is not None and asked.seeds < 2:
        raise ScenarioError(f"--seeds {asked.seeds}: must be >= 2")
    declared = _declared(asked)
    claims = [each for each in declared if isinstance(each, Declaration)]
    benchmarks = [each for each in declared if isinstance(each, Benchmark)]
    if claims and benchmarks:
        raise ScenarioError(
            f"{claims[0].path} is a claim and {benchmarks[0].path} a benchmark: a page holds one "
            "kind of studies; give them to two commands"
        )
    try:
        with (
            locked(asked.out),
            StudyProgress(quiet=quiet) as progress,
            Pool(asked.out, workers=asked.workers, watch=progress) as pool,
        ):
            code = said_of_code((s for each in declared for s in each.scenarios()), asked.out)
            if benchmarks:
                answer = _benchmarks(benchmarks, asked, pool, progress, width)
            else:
                answer = _claims(claims, asked, pool, progress, width)
    except KeyboardInterrupt as error:
        vars(error)["fedsim_go_on"] = "the same command"
        raise
    return answer._replace(lines=[*code, *answer.lines])


def _declared(asked: EvidenceAsked) -> list[Declaration | Benchmark]:
    """The studies that are asked for, read and checked."""
    kind = _kind(asked)
    names = asked.studies or list(shipped(kind))
    paths = [find(name) for name in names]
    stems = [path.stem for path in paths]  # what a study is called on the page
    if twice := next((name for name in stems if stems.count(name) > 1), None):
        raise ScenarioError(f"{twice}: is there twice")
    return [read_study(path)._replace(data=asked.data) for path in paths]


def _kind(asked: EvidenceAsked) -> Kind:
    if asked.kind is None:
        return USUAL_KIND
    if asked.studies:
        raise ScenarioError(
            f"--kind {asked.kind}: chooses among the studies that come with fedsim where none is "
            "named; leave it out"
        )
    for known in KINDS:
        if asked.kind == known:
            return known
    raise ScenarioError(f"--kind {unknown(asked.kind, 'a kind of study', KINDS)}")


def _claims(
    declared: Sequence[Declaration],
    asked: EvidenceAsked,
    pool: Pool,
    progress: StudyProgress,
    width: int,
) -> StudyAnswer:
    found: list[Evidence] = []
    for each in declared:
        progress.note(f"{each.name}: {each.document.title}")
        found.append(gather(each, asked.out, seeds=asked.seeds, pool=pool, expect=progress.expect))
    documents = [evidence_document(each) for each in found]
    place = _written(page(found, _under()), documents, asked, "evidence")
    rows = [
        [each["name"], finding["setting"], "best" if finding["best"] else "equal", row["arm"],
         number(row["minus"]["mean"], sign=True), str(row["verdict"])]
        for each in documents for finding in each["findings"] for row in finding["rows"]
        if row["minus"]
    ]  # fmt: skip
    head = ["study", "setting", "step", "minus", "difference", "the method is"]
    lines = [*grid(head, rows, width=width, left=4), "", str(place)]
    return StudyAnswer({"page": str(place), "studies": documents}, lines, failed=False)


def _benchmarks(
    declared: Sequence[Benchmark],
    asked: EvidenceAsked,
    pool: Pool,
    progress: StudyProgress,
    width: int,
) -> StudyAnswer:
    found: list[BenchmarkResult] = []
    for each in declared:
        progress.note(f"{each.name}: {each.document.title}")
        found.append(
            gather_benchmark(each, asked.out, seeds=asked.seeds, pool=pool, expect=progress.expect)
        )
    documents = [benchmark_document(each) for each in found]
    pictures = {each.name: f"{each.name}.png" for each in declared}
    place = _written(benchmark_page(found, _under(), pictures), documents, asked, "benchmark")
    for one in found:
        picture = place.parent / pictures[one.declared.name]
        with taking(picture):
            draw_benchmark(one, picture)
    rows = [
        [each["name"], setting["setting"], row["arm"], number(row["mean"]["mean"]),
         number(row["minus"][each["baselines"][0]]["mean"], sign=True), "*" if row["best"] else ""]
        for each in documents for setting in each["settings"] for row in setting["rows"]
    ]  # fmt: skip
    head = ["study", "setting", "arm", "mean", "minus baseline", "best"]
    lines = [*grid(head, rows, width=width, left=3), "", str(place)]
    return StudyAnswer({"page": str(place), "studies": documents}, lines, failed=False)


def _under() -> str:
    now = versions()
    return ", ".join(f"{name} {now[name]}" for name in _NAMED)


def _place(asked: EvidenceAsked, name: str) -> Path:
    return asked.page or asked.out / f"{name}.md"


def _written(
    text: str, documents: Sequence[dict[str, Any]], asked: EvidenceAsked, name: str
) -> Path:
    """Write the page, and beside the runs the document for programs; return the page's place."""
    place = _place(asked, name)
    with taking(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    with taking(asked.out / f"{name}.json"):
        write_json_atomic(asked.out / f"{name}.json", list(documents))
    return place
