"""`fedsim metrics`: runs and a site's instructions, for Prometheus."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim.basics.errors import ScenarioError
from fedsim.cli.app import CommandOutcome, JsonOption, app, finish, tell


@app.command(
    epilog="""\b
Examples:
  fedsim metrics runs
  fedsim metrics runs --listen 0.0.0.0:9464 --runs 5
  fedsim metrics runs --audit /var/log/fedsim.jsonl
""",
)
def metrics(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", hidden=True)],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:9464",
    audit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A site's record of instructions too.")
    ] = None,
    runs: Annotated[
        int, typer.Option(metavar="N", help="Tell of the N newest runs; from 1 to 1000.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Serve what runs say of themselves to Prometheus, while they are written and afterwards.

    FOLDER holds run folders, or is one. `/metrics` has state, rounds, failures, bytes and metrics
    of each run, `/health` whether FOLDER can be read. Nothing is written. Ends when interrupted.
    """

    def produce() -> CommandOutcome:
        try:
            from fedsim.deployment.monitoring.server import MetricsServer
        except ModuleNotFoundError as error:
            if error.name != "prometheus_client":
                raise
            raise ScenarioError(
                "prometheus_client is not installed: pip install 'fedsim-engine[metrics]'"
            ) from None
        from fedsim.basics.host_port import read_host_port
        from fedsim.deployment.monitoring.watch import Watch

        address = read_host_port(listen, "--listen", such_as="127.0.0.1:9464")
        watch = Watch(folder, most=runs, audit=audit)
        with MetricsServer(address, watch) as server:
            found = watch.look().found
            tell(f"fedsim: {server.url}/metrics, runs below {folder}: {found}")
            server.serve_forever()
        return CommandOutcome({}, [])

    finish(produce, as_json=as_json)
