"""What the tests of faults share: trouble in a folder, and a process whose children are killed."""

from pathlib import Path

import pytest

from tests.faults.killer import Killer
from tests.faults.worlds import Trouble


@pytest.fixture(scope="session")
def killer():
    """A process from which runs are forked; nothing of one is left for the next."""
    process = Killer(Path(__file__).resolve().parents[2])
    yield process
    process.close()


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """Trouble that is planned anew by each test of a module."""
    return Trouble(tmp_path_factory.mktemp("trouble"))


@pytest.fixture(autouse=True)
def _no_trouble_is_left(trouble):
    yield
    trouble.end()
