"""Sites whose data lie in no file: a function of the site's own returns them."""

import textwrap

import pytest

from fedsim.basics.errors import RunError
from fedsim.deployment import site_loader
from fedsim.runs.start import start
from fedsim.scenario.load import load
from tests.deployment.sites_apart import Sites, deployed, outcome, rows_of, scenario, write, written

MODULE = """
import csv
import json
from pathlib import Path

FOLDER = Path(__file__).parent


def columns(site):
    calls = FOLDER / "calls"
    calls.write_text(calls.read_text() + f"{site} " if calls.exists() else f"{site} ")
    with (FOLDER / "data" / f"site_{site}" / "patients.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {n: [r[n] if n == "outcome" else float(r[n]) for r in rows] for n in rows[0]}


def zero():
    return columns(0)


def one():
    import pandas
    return pandas.DataFrame(columns(1), index=range(9))


def two():
    import pyarrow
    return pyarrow.table(columns(2))


def nothing():
    return [1, 2]


def quotes():
    raise ValueError("row 17: Jane Doe")


several = 3
"""


@pytest.fixture
def sites(tmp_path, monkeypatch):
    """Three files, a scenario, and a module of the sites' own that reads them."""
    files = written(tmp_path / "data", sizes=(14, 9, 12))
    name = f"hospital_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    site_loader.loaded.cache_clear()
    return files, scenario(tmp_path, files), name


def site_files(tmp_path, *lines):
    found = []
    for place, text in enumerate(lines):
        found.append(tmp_path / f"site_{place}.toml")
        found[-1].write_text(f"[site]\n{text}\n")
    return found


def test_tables_from_loaders_have_the_bits_of_the_files(sites, tmp_path):
    _, file, name = sites
    start(load(file), out=tmp_path / "simulated")
    mine = site_files(tmp_path, *(f'loader = "{name}:{each}"' for each in ("zero", "one", "two")))
    there = deployed(file, [None] * 3, tmp_path / "run", site_files=mine)
    assert outcome(there) == outcome(tmp_path / "simulated")
    assert (tmp_path / "calls").read_text().split() == ["0", "1", "2"]  # once in a process
    stored = list((tmp_path / "cache" / "site-loader").rglob("*.parquet"))
    assert len(stored) == 3
    assert {each.stat().st_mode & 0o777 for each in stored} == {0o600}


def test_data_that_changed_are_stored_anew_and_the_old_ones_are_not_kept(sites, tmp_path):
    _, _, name = sites
    first = site_loader.loaded(f"{name}:zero", is_sites_own=True)
    again = tmp_path / "data" / "site_0" / "patients.csv"
    write(again, *rows_of(7, 20))
    site_loader.loaded.cache_clear()
    second = site_loader.loaded(f"{name}:zero", is_sites_own=True)
    assert second.exists()
    assert not first.exists()


class Configured(Sites):
    """The first node's config names its loader, or what `node` says."""

    def __init__(self, files, config, *, node, **options):
        self.node = node
        super().__init__(files, config, **options)
        app = self.inner.client_app.app

        def told(message, context):
            if context.node_config["partition-id"] == 0:
                context.node_config.update(self.node)
            return app(message, context)

        self.inner.client_app.app = told


@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_loader_of_a_node_config_must_be_among_what_the_site_allows(is_allowed, sites, tmp_path):
    files, file, name = sites
    mine = site_files(tmp_path, f'imports = ["{name}"]' if is_allowed else "", "", "")
    options = {
        "site_files": mine, "grid": Configured, "node": {"data-loader": f"{name}:zero"},
    }  # fmt: skip
    if is_allowed:
        start(load(file), out=tmp_path / "simulated")
        there = deployed(file, [None, *files[1:]], tmp_path / "run", **options)
        assert outcome(there) == outcome(tmp_path / "simulated")
    else:
        with pytest.raises(RunError, match="none of the app's own"):
            deployed(file, [None, *files[1:]], tmp_path / "run", **options)
        assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "its loader returned a list, expected a table"),
        ("several", "its loader is of type int, expected a function"),
        ("missing", "ScenarioError at fedsim.basics.import_paths"),
        ("quotes", "ValueError at hospital_"),
    ],
)
def test_what_is_no_table_is_named_and_no_row_is_told(function, said, sites, tmp_path):
    files, file, name = sites
    mine = site_files(tmp_path, f'loader = "{name}:{function}"', "", "")
    with pytest.raises(RunError) as error:
        deployed(file, [None, *files[1:]], tmp_path / "run", site_files=mine)
    assert said in str(error.value)
    assert "Jane" not in str(error.value)


def test_a_site_has_a_file_or_a_loader(sites, tmp_path):
    files, file, name = sites
    mine = site_files(tmp_path, f'loader = "{name}:zero"', "", "")
    with pytest.raises(RunError, match="both a file and a loader"):
        deployed(file, files, tmp_path / "run", site_files=mine)
    mine = site_files(tmp_path, f'loader = "{name}:zero"\ndata = "{files[0]}"', "", "")
    with pytest.raises(RunError, match=r"ScenarioError at fedsim\.deployment\.site"):
        deployed(file, files, tmp_path / "again", site_files=mine)
