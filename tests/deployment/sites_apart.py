"""Sites with a table each, as nodes of a deployment in one process."""

import csv
import json
from types import SimpleNamespace

import numpy as np

from fedsim.deployment import flower_app
from tests.federation.grids.fleet import Fleet

COLUMNS = ("age", "pressure", "sugar")
SIZES = (14, 9, 23, 11)

SCENARIO = """
title = "Sites with a table each"
seed = 3
rounds = {rounds}
{head}
[data]
name = "sites"
target = "outcome"
{data}
[partition]
kind = "natural"
clients = {sites}
{partition}
[task]
model = "mlp"
{task}
[client]
name = "local_sgd"
batch_size = 4
local_lr = 0.1
local_epochs = 2

[participation]
kind = "{participation}"
{rate}
[strategy]
name = "{strategy}"

[engine]
kind = "inline"
{tables}
"""


def rows_of(site, size):
    """A site's patients: columns in the order of `COLUMNS`, and an outcome in words."""
    draw = np.random.default_rng(site)
    values = draw.normal(site, 1 + site, size=(size, len(COLUMNS)))
    sick = values.sum(axis=1) + draw.normal(size=size) > len(COLUMNS) * site
    sick[:2] = [True, False]
    return values, np.where(sick, "sick", "healthy")


def write(file, values, outcomes, columns=COLUMNS, target="outcome"):
    """Write a site's table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as text:
        rows = csv.writer(text)
        rows.writerow([*columns, target])
        rows.writerows(
            [*map(repr, map(float, row)), o] for row, o in zip(values, outcomes, strict=True)
        )


def written(folder, sizes=SIZES):
    """Write a table per site; return the files by site."""
    files = []
    for site, size in enumerate(sizes):
        files.append(folder / f"site_{site}" / "patients.csv")
        write(files[-1], *rows_of(site, size))
    return files


def scenario(folder, files, name="scenario.toml", **choices):
    """Write a scenario over the sites' files, which a simulation finds under their folders."""
    keys = {
        "rounds": 3, "head": "", "data": "", "sites": len(files), "partition": "", "task": "",
        "participation": "full", "rate": "", "strategy": "fedavg", "tables": "",
    } | choices  # fmt: skip
    keys["data"] = f'sites = "{files[0].parents[1]}/site_*"\n{keys["data"]}'
    file = folder / name
    file.write_text(SCENARIO.format(**keys))
    return file


class Sites(Fleet):
    """A node per site, whose node config names its own file."""

    def __init__(self, files, config, site_files=(), **options):
        self.files = list(files)

        def app(message, context):
            partition = int(context.node_config["partition-id"])
            if self.files[partition] is not None:
                context.node_config["data-path"] = str(self.files[partition])
            if site_files:
                context.node_config["site"] = str(site_files[partition])
            return flower_app.client_app(message, context)

        super().__init__(app, len(files), run_config=config, **options)


def deployed(file, files, out, *, grid=Sites, overrides="", resume=False, number=7, **options):
    """Run a scenario over nodes; return the run's folder."""
    config = {"scenario": str(file), "set": overrides, "out": str(out), "wait-s": 5.0}
    if resume:
        config["resume"] = True
    context = SimpleNamespace(run_config=config, run_id=number)
    flower_app.main(grid(files, config, **options), context)
    return out


def outcome(folder):
    """Hash of the model, and the numbers of all rounds but times and bytes."""
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    apart = ("time/", "comm/")
    kept = [{n: v for n, v in each.items() if not n.startswith(apart)} for each in rounds]
    return summary["params_sha256"], kept
