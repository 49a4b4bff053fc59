"""A disk that is really full, and data that cannot be read: named, and nothing is lost."""

import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.faults.killer import Killer
from tests.faults.test_kill_resume import ROOT, SCENARIO, _check, _outcome

MOUNT = 'mount -t tmpfs -o size=128k none "$0" && exec "$@"'


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """(killer, folder): runs that see a disk of 128 kB at `folder/disk`."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "disk").mkdir()
    (folder / "kill.toml").write_text(SCENARIO)
    prefix = ("unshare", "-rm", "sh", "-c", MOUNT, str(folder / "disk"))
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"this machine mounts no disk of one's own: {error}")
    killer = Killer(ROOT, *prefix)
    yield killer, folder
    killer.close()


@pytest.fixture(scope="module")
def undisturbed(small_disk):
    killer, folder = small_disk
    code, output = killer.run(folder, "run", "kill.toml", "--out", "whole", "--quiet")
    assert code == 0, output
    return _outcome(folder / "whole")


@pytest.mark.parametrize("room_kb", range(0, 56, 8))
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    small_disk, undisturbed, room_kb
):
    """The less room, the earlier a file finds none: the folder's first, the summary last."""
    killer, folder = small_disk
    disk = Path(f"/proc/{killer.pid}/root{folder}/disk")
    for old in disk.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    filler = disk / "filler"
    filler.write_bytes(bytes((128 - room_kb) * 1024))
    arguments = ("run", "kill.toml", "--out", "disk/run", "--quiet")
    code, output = killer.run(folder, *arguments)
    assert code in (1, 2), output
    assert "cannot" in output
    assert "No space left on device" in output
    assert "disk/run" in output
    assert "Traceback" not in output
    assert not (disk / "run" / "summary.json").exists()
    filler.unlink()
    begun = (disk / "run").exists()
    assert (f"`fedsim resume {folder}/disk/run` goes on" in output) == begun
    again = ("resume", "disk/run", "--quiet") if begun else arguments
    code, output = killer.run(folder, *again)
    assert code == 0, output
    _check(disk / "run", undisturbed)


@pytest.mark.slow
def test_data_that_became_unreadable_are_named_and_a_run_goes_on_when_they_are_back(
    killer, tmp_path
):
    """A run is killed, its parquet file is torn, refused by name, and mended."""
    random = np.random.default_rng(1)
    columns = {f"x{place}": random.normal(size=90) for place in range(4)}
    table = pyarrow.table({**columns, "label": random.integers(0, 3, size=90)})
    (tmp_path / "sensors").mkdir()
    file = tmp_path / "sensors" / "train.parquet"
    parquet.write_table(table, file)
    scenario = SCENARIO.replace('name = "synthetic"', 'name = "folder"\npath = "sensors"')
    for line in ("dimension = 6", "classes = 3", "max_samples = 20", "test_clients = 5"):
        scenario = scenario.replace(line + "\n", "")
    scenario = scenario.replace('kind = "natural"', 'kind = "iid"').replace(
        "clients = 30", "clients = 10"
    )
    (tmp_path / "kill.toml").write_text(scenario)
    code, output = killer.run(tmp_path, "run", "kill.toml", "--out", "whole", "--quiet")
    assert code == 0, output
    arguments = ("run", "kill.toml", "--out", "run", "--quiet")
    code, output = killer.run(tmp_path, *arguments, point="clients train", turn=8)
    assert code == -signal.SIGKILL, output
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file()}

    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, output = killer.run(tmp_path, "resume", "run", "--quiet")
    assert code in (1, 2)
    assert "sensors" in output
    assert "cannot be read" in output
    assert "Traceback" not in output
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file()}
    assert after == before

    file.write_bytes(whole)
    code, output = killer.run(tmp_path, "resume", "run", "--quiet")
    assert code == 0, output
    assert _outcome(tmp_path / "run") == _outcome(tmp_path / "whole")
