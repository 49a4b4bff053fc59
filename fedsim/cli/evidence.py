"""fedsim evidence: declared studies and their page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.app import (
    AtOnceOption,
    CommandOutcome,
    DataOption,
    JsonOption,
    QuietOption,
    app,
    check_data,
    check_workers,
    finish,
    study_outcome,
    terminal_width,
)

if TYPE_CHECKING:
    pass


@app.command(
    epilog="""\b
Examples:
  fedsim evidence
  fedsim evidence fedau --seeds 3
  fedsim evidence my_study.toml --page my_evidence.md
  fedsim evidence --kind benchmark --page methods.md
""",
)
def evidence(
    studies: Annotated[list[str] | None, typer.Argument(metavar="[STUDY]...", hidden=True)] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page. Default: evidence.md or benchmark.md in the folder of the runs.",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Which studies that come with fedsim: claim (default) or benchmark.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="So many seeds instead of the study's own.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path(
        "studies/evidence"
    ),
    workers: AtOnceOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run declared studies and write what they show: each method beside what explains it.

    STUDY is a file, or the name of one that comes with fedsim; all of a kind when left out. A claim
    says what a paper says and what is run: at equal steps and at each one's best. A benchmark holds
    many methods beside each other, tuned alike. Runs that are there are not made again.
    """

    def produce() -> CommandOutcome:
        check_workers(workers)
        check_data(data)
        from fedsim.cli.evidence_study import EvidenceAsked, run_evidence

        asked = EvidenceAsked(studies or [], page, seeds, out, workers, data, kind)
        return study_outcome(run_evidence(asked, width=terminal_width(), quiet=quiet))

    finish(produce, as_json=as_json)
