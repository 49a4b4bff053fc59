"""A site's file and the places that it names, with real faults in each."""

import os
from pathlib import Path

import pytest

from fedsim.cli.doctor.preflight import site
from fedsim.deployment.site import SitePolicy


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("FEDSIM_SITE", "FEDSIM_SITE_DATA", "FEDSIM_SITE_STATE"):
        monkeypatch.delenv(name, raising=False)


def one(findings, name):
    (found,) = [each for each in findings if each.name == name]
    assert bool(found.remedy) == (found.state != "ok"), found
    return found


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_site_file_is_read_as_on_a_node_and_told_in_words(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text('[site]\nimports = ["mine"]\noverrides = []\nshare = ["sums"]\n')
    findings, policy = site.policy_of(file)
    assert policy == SitePolicy(imports=("mine",), overrides=(), share=("sums",))
    words = one(findings, "site file").found
    for each in ("the app's own: mine", "`set` may change nothing", "it shares sums"):
        assert each in words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[site]\nimport = ["mine"]', "did you mean 'imports'"),
        ("[site", "cannot be read"),
        ('[site]\nstate = "here"', "must be an absolute path"),
        (None, "cannot be read"),
    ],
)
def test_a_site_file_that_no_node_could_use_is_named(text, said, tmp_path):
    if text is not None:
        (tmp_path / "site.toml").write_text(text)
    findings, policy = site.policy_of(tmp_path / "site.toml")
    assert policy is None
    found = one(findings, "site file")
    assert found.state == "failed"
    assert said in found.found


def test_without_an_option_the_machine_s_variable_names_the_file(tmp_path, monkeypatch):
    assert one(site.policy_of(None)[0], "site file").state == "note"
    (tmp_path / "site.toml").write_text('[site]\nerrors = "text"')
    monkeypatch.setenv("FEDSIM_SITE", str(tmp_path / "site.toml"))
    assert site.policy_of(None)[1] == SitePolicy(errors="text")


def test_a_site_file_that_others_may_change_is_noted(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text("[site]\n")
    file.chmod(0o664)
    assert [each.state for each in site.policy_of(file)[0]] == ["ok", "note"]
    file.chmod(0o644)
    assert [each.state for each in site.policy_of(file)[0]] == ["ok"]


def test_places_that_can_be_written_are_in_order_and_left_as_they_were(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "audit.jsonl").write_text("a line\n")
    before = everything(tmp_path)
    for audit in ("audit.jsonl", "new.jsonl"):
        policy = SitePolicy(state=tmp_path / "state", audit=tmp_path / audit)
        findings = site.places(policy)
        assert [each.name for each in findings] == ["state", "audit"]
        assert "failed" not in {each.state for each in findings}
    policy = SitePolicy(state=tmp_path / "state" / "not" / "yet")
    assert one(site.places(policy), "state").state != "failed"
    assert everything(tmp_path) == before


def test_a_state_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    found = one(site.places(SitePolicy(state=tmp_path / "file" / "state")), "state")
    assert found.state == "failed"
    assert "is no folder" in found.found
    found = one(site.places(SitePolicy(state=Path("/proc/1/state"))), "state")
    assert (found.state, "cannot be written" in found.found) == ("failed", True)


def test_a_state_of_the_machine_s_variable_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDSIM_SITE_STATE", str(tmp_path / "file"))
    assert one(site.places(SitePolicy()), "state").state == "failed"
    monkeypatch.delenv("FEDSIM_SITE_STATE")
    assert one(site.places(SitePolicy()), "state").found.startswith("in the SuperNode's memory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_places_that_this_user_may_not_write_are_named(tmp_path):
    (tmp_path / "state").mkdir(mode=0o500)
    (tmp_path / "audit.jsonl").touch(mode=0o400)
    policy = SitePolicy(state=tmp_path / "state", audit=tmp_path / "audit.jsonl")
    assert {each.state for each in site.places(policy)} == {"failed"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "no folder above it", "file above it"])
def test_an_audit_that_takes_no_line_is_named(kind, tmp_path):
    file = tmp_path / "audit.jsonl"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "file above it":
        (tmp_path / "above").touch()
        file = tmp_path / "above" / "audit.jsonl"
    else:
        file = tmp_path / "above" / "audit.jsonl"
    found = one(site.places(SitePolicy(audit=file)), "audit")
    assert found.state == "failed"
    assert f"{file} cannot be written: " in found.found


@pytest.mark.skipif(
    site._file_system(Path("/dev/shm")) != "tmpfs", reason="no memory that looks like a folder"
)
def test_what_lies_in_memory_alone_is_noted():
    found = one(site.places(SitePolicy(state=Path("/dev/shm/fedsim-state"))), "state")
    assert found.state == "note"
    assert "is gone when the machine is started again" in found.found
    assert not Path("/dev/shm/fedsim-state").exists()


def test_data_are_found_where_a_node_finds_them(tmp_path, monkeypatch):
    file = tmp_path / "patients.csv"
    found, path = site.data(SitePolicy())
    assert (found.state, path) == ("failed", None)
    assert "names no data" in found.found
    found, path = site.data(SitePolicy(data=file))
    assert (found.state, path) == ("failed", None)
    file.write_text("a,b\n1,2\n")
    assert site.data(SitePolicy(data=file))[1] == file
    monkeypatch.setenv("FEDSIM_SITE_DATA", str(tmp_path))
    found, path = site.data(SitePolicy())
    assert (path, found.state) == (tmp_path, "ok")
    assert "1 files, 8 B" in found.found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_this_user_may_not_read_are_named(tmp_path):
    (tmp_path / "patients.csv").touch(mode=0o200)
    assert "cannot be read" in site.data(SitePolicy(data=tmp_path))[0].found
