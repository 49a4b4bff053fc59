"""What `fedsim evidence` does, from its arguments to its page."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import taking, write_json_atomic
from fedsim.cli.compare_study import StudyAnswer
from fedsim.runs.folder import versions
from fedsim.studies.cells.cell import locked
from fedsim.studies.cells.code import said_of_code
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.watching import StudyProgress
from fedsim.studies.comparison.tables import grid, number
from fedsim.studies.evidence import file as evidence_file
from fedsim.studies.evidence.evidence import gather
from fedsim.studies.evidence.page import evidence_document, page

_NAMED = ("fedsim", "python", "torch", "flwr", "numpy")  # versions that a page names


class EvidenceAsked(NamedTuple):
    """The arguments of `fedsim evidence`, see there."""

    studies: Sequence[str] = ()
    page: Path | None = None
    seeds: int | None = None
    out: Path = Path("studies/evidence")
    workers: int | None = None
    data: Path | None = None


def run_evidence(asked: EvidenceAsked, *, width: int, quiet: bool = False) -> StudyAnswer:
    """Make the missing runs of declared studies, write the page, and return the answer.

    Raises:
        ScenarioError: If a study's file is wrong; nothing has run then.
        BusyError: If another process works in the folder.
    """
    if asked.seeds is not None and asked.seeds < 2:
        raise ScenarioError(f"--seeds {asked.seeds}: must be >= 2")
    names = asked.studies or list(evidence_file.shipped())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ScenarioError(f"{twice}: is there twice")
    declared = [
        evidence_file.read(evidence_file.find(name))._replace(data=asked.data) for name in names
    ]
    place = asked.page or asked.out / "evidence.md"
    found = []
    try:
        with (
            locked(asked.out),
            StudyProgress(quiet=quiet) as progress,
            Pool(asked.out, workers=asked.workers, watch=progress) as pool,
        ):
            code = said_of_code((s for each in declared for s in each.scenarios()), asked.out)
            for each in declared:
                progress.note(f"{each.name}: {each.document.title}")
                one = gather(each, asked.out, seeds=asked.seeds, pool=pool, expect=progress.expect)
                found.append(one)
            documents = [evidence_document(each) for each in found]
            now = versions()
            under = ", ".join(f"{name} {now[name]}" for name in _NAMED)
            with taking(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(page(found, under), encoding="utf-8")
            with taking(asked.out / "evidence.json"):
                write_json_atomic(asked.out / "evidence.json", documents)
    except KeyboardInterrupt as error:
        vars(error)["fedsim_go_on"] = "the same command"
        raise
    rows = [
        [each["name"], finding["setting"], "best" if finding["best"] else "equal", row["arm"],
         number(row["minus"]["mean"], sign=True), str(row["verdict"])]
        for each in documents for finding in each["findings"] for row in finding["rows"]
        if row["minus"]
    ]  # fmt: skip
    head = ["study", "setting", "step", "minus", "difference", "the method is"]
    lines = [*code, *grid(head, rows, width=width, left=4), "", str(place)]
    document = {"page": str(place), "studies": documents}
    return StudyAnswer(document, lines, failed=False)
