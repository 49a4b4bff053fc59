"""`fedsim.procedure`, where `fedsim.client` was."""

import pytest

from fedsim import client


@pytest.mark.parametrize("name", client.__all__)
def test_what_was_imported_from_the_former_place_is_the_same_with_a_warning(name):
    import fedsim.procedure

    with pytest.warns(DeprecationWarning, match=f"from fedsim.client import {name}"):
        found = getattr(fedsim.procedure, name)
    assert found is getattr(client, name)


def test_a_statement_of_users_goes_on_working():
    with pytest.warns(DeprecationWarning, match=r"fedsim\.client"):
        from fedsim.procedure import ClientProcedure
    assert ClientProcedure is client.ClientProcedure


def test_what_never_was_there_is_no_name():
    import fedsim.procedure

    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = fedsim.procedure.nothing_like_it
