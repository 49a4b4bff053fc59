"""Processes that run cells: a death takes one cell with it; none starts without room."""

import json
import os
import signal
from pathlib import Path

import pytest

from fedsim.basics import kernels_in_use
from fedsim.basics.json_files import read_json
from fedsim.basics.machine import usable_processors
from fedsim.studies.cells.cell import CELLS, cells_of, of_other_versions
from fedsim.studies.cells.machine import ASSUMED, has_room
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import of_scenarios
from tests.studies.worlds import write

needs_avx2 = pytest.mark.skipif(
    kernels_in_use.why_not_portable() is not None, reason="portable bits need AVX2 and MKL"
)


def system(root, *, free, quota="max 100000"):
    """A machine with so many bytes free."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(f"{quota}\n")
    return root


def test_there_is_room_for_as_many_as_memory_allows(tmp_path):
    three = system(tmp_path, free=3 * ASSUMED)
    assert has_room(0, 0, root=three)
    assert has_room(0, 1, root=three)
    assert not has_room(0, 2, root=three)  # those that have just begun will take theirs
    assert not has_room(3 * ASSUMED, 0, root=three)  # as much as the largest so far, and some more


def test_a_quota_counts_as_processors(tmp_path):
    usable = len(os.sched_getaffinity(0))
    assert usable_processors(system(tmp_path, free=0)) == usable
    assert usable_processors(system(tmp_path, free=0, quota="100000 100000")) == 1
    assert usable_processors(system(tmp_path, free=0, quota="50000 100000")) == 1


class Killing:
    """Kills the process that runs the first cell, and takes down what it is told."""

    def __init__(self):
        self.told = []

    def begun(self, cell):
        self.told.append(("begun", cell.seed))

    def at_round(self, cell, server_round):
        if cell.seed == 3 and server_round:
            me = os.getpid()
            for child in Path(f"/proc/self/task/{me}/children").read_text().split():
                if b"studies.cells.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    def ended(self, cell, reason):
        self.told.append(("ended", cell.seed, reason))


@pytest.mark.slow
def test_a_process_that_dies_takes_its_cell_with_it_and_no_other(tmp_path):
    (tmp_path / CELLS).mkdir()
    (variant,) = of_scenarios([str(write(tmp_path, rounds=400))], [], [])
    cells = cells_of([variant], (3, 4), tmp_path)
    watch = Killing()
    with Pool(tmp_path, workers=1, watch=watch) as pool:
        failed = pool.run(cells)
        assert list(failed) == [cells[0].folder]
        assert "was ended by SIGKILL; memory may have run out" in failed[cells[0].folder]
        assert [cell.finished for cell in cells] == [False, True]
        assert [what[:2] for what in watch.told] == [
            ("begun", 3), ("ended", 3), ("begun", 4), ("ended", 4),
        ]  # fmt: skip
        watch.at_round = lambda cell, server_round: None
        assert pool.run(cells[:1]) == {}  # and it goes on from its last checkpoint
    assert "resumed from round" in (cells[0].folder / "log.txt").read_text()


@needs_avx2
def test_every_cell_is_computed_with_the_kernels_that_its_scenario_asks_for(tmp_path):
    (tmp_path / CELLS).mkdir()
    file = str(write(tmp_path, rounds=1))
    asked = [of_scenarios([file], [], [f"engine.bits={bits}"]) for bits in ("fast", "portable")]
    cells = [cells_of(variants, (4,), tmp_path)[0] for variants in asked]
    with Pool(tmp_path, workers=1, watch=Killing()) as pool:
        assert pool.run(cells) == {}
    modes = [read_json(cell.folder / "versions.json")["mkl"].split()[1] for cell in cells]
    assert modes[1] == "COMPATIBLE"
    assert modes[0] == kernels_in_use.in_use()["mkl"].split()[1]
    assert of_other_versions(cells) == []
    document = read_json(cells[0].folder / "versions.json") | {"mkl": "1.0 off", "torch": "1.0"}
    (cells[0].folder / "versions.json").write_text(json.dumps(document))
    assert of_other_versions(cells) == ["mkl 1.0 off", "torch 1.0"]


@pytest.mark.slow
def test_the_data_of_one_cell_are_given_back_before_the_next(tmp_path):
    (tmp_path / CELLS).mkdir()
    file = tmp_path / "large.toml"
    file.write_text(
        'rounds = 1\n[task]\nmodel = "logistic"\n[data]\nname = "tests.studies.worlds:large"\n'
        '[partition]\nkind = "iid"\nclients = 4\n[client]\nlocal_steps = 1\n'
    )
    (variant,) = of_scenarios([str(file)], [], [])
    peaks = []
    with Pool(tmp_path, workers=1, watch=Killing()) as pool:
        for cell in cells_of([variant], range(11, 17), tmp_path):
            assert pool.run([cell]) == {}
            peaks.append(pool._largest)
    # a new seed holds other samples out, so every cell has data of its own
    assert peaks[-1] - peaks[1] < 2 * 2**25
