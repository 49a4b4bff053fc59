"""What the tests of faults share: trouble in a folder."""

import pytest

from tests.faults.worlds import Trouble


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """Trouble that is planned anew by each test of a module."""
    return Trouble(tmp_path_factory.mktemp("trouble"))


@pytest.fixture(autouse=True)
def _no_trouble_is_left(trouble):
    yield
    trouble.end()
