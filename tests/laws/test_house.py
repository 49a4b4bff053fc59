"""How the code is laid out: rooms in layers, no circles, small files, one meaning for a name."""

import functools

import pytest

from tests.laws import house


@pytest.fixture
def plant(monkeypatch):
    """Puts files beside those of the product, for `house` alone."""
    known = dict(house.sources())

    def add(**files):
        texts = {f"fedsim/{name}.py": text for name, text in files.items()}
        house.forget()
        monkeypatch.setattr(house, "sources", functools.cache(lambda: known | texts))

    yield add
    monkeypatch.undo()
    house.forget()


def test_rooms_import_what_they_may_and_downwards_alone():
    assert house.against_the_layers() == []


def test_no_room_may_import_what_it_does_not():
    assert house.unused_permissions() == []


def test_every_room_has_its_layer_and_every_module_its_room():
    rooms = {house.room_of(house.module_of(file)) for file in house.sources()}
    assert rooms - {"", "__main__", "procedure"} == {r for layer in house.LAYERS for r in layer}
    assert house.MAY_IMPORT.keys() == {r for layer in house.LAYERS for r in layer}
    assert house.loose() == []


@pytest.mark.parametrize(
    "upwards",
    [
        "from fedsim.runs.loop import RoundLoop",
        "import fedsim.runs.loop",
        "def late():\n    from fedsim.runs import loop",
        "import typing\nif typing.TYPE_CHECKING:\n    from fedsim.runs.loop import Hook",
        "from strategies.fedavg import FedAvg",  # by name alone, not by import
    ],
)
def test_an_import_upwards_is_seen_however_it_is_written(plant, upwards):
    plant(**{"engine/planted": upwards})
    (found,) = house.against_the_layers()
    assert found.startswith("fedsim.engine.planted imports ")


def test_an_import_of_a_room_of_the_same_layer_is_seen(plant):
    plant(**{"data/planted": "from fedsim.tasks.task import Task\n"})
    assert house.against_the_layers() == ["fedsim.data.planted imports fedsim.tasks.task"]


def test_a_room_of_which_a_part_may_be_imported_is_closed_otherwise(plant):
    imports = "import fedsim.messages.layout\nimport fedsim.messages.replies\n"
    plant(**{"client/planted": imports})
    assert house.against_the_layers() == ["fedsim.client.planted imports fedsim.messages.replies"]


def test_packages_define_nothing(plant):
    assert house.defining_faces() == []
    plant(**{"engine/__init__": "VALUE = 1\n" * 2, "data/__init__": "def f(): ...\n"})
    assert sorted(house.defining_faces()) == [
        "fedsim/data/__init__.py",
        "fedsim/engine/__init__.py",
    ]


def test_no_module_lies_beside_the_rooms(plant):
    plant(planted="")
    assert house.loose() == ["fedsim/planted.py"]


def test_files_functions_and_classes_have_a_size_that_can_be_read():
    assert house.long_files(house.LARGE_FILE) == {}
    assert [each for each in house.functions() if each.lines > house.LONG_FUNCTION] == []
    assert [each for each in house.classes() if each.lines > house.LONG_CLASS] == []


def test_no_module_imports_itself_over_others():
    assert house.circles() == []


@pytest.mark.parametrize(
    "back",
    [
        "from fedsim.one import thing",
        "import fedsim.one",
        "def late():\n    from fedsim import one",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fedsim.one import Thing",
    ],
)
def test_a_circle_is_seen_however_it_is_closed(plant, back):
    plant(one="from fedsim.two import other\n", two="from fedsim.three import more\n", three=back)
    assert house.circles() == [["fedsim.one", "fedsim.three", "fedsim.two"]]


def test_a_class_name_stands_once():
    assert house.twice() == {}


def test_a_second_class_of_a_name_is_seen_inside_of_another_class_too(plant):
    plant(one="class Federation:\n    class Planted: ...\n", two="class Planted: ...\n")
    assert house.twice() == {"Planted": ["fedsim/one.py", "fedsim/two.py"]}


def test_long_files_functions_and_classes_are_counted(plant):
    body = "\n".join(f"    x{n} = {n}" for n in range(399))
    plant(one=f"def long():\n{body}\n", two=f"class Long:\n{body}\n    y = 0\n")
    assert house.long_files(400)["fedsim/two.py"] == 401
    assert "fedsim/one.py" not in house.long_files(400)
    assert house.Piece("fedsim/one.py", "long", 400) in house.functions()
    assert house.Piece("fedsim/two.py", "Long", 401) in house.classes()


def test_nobody_but_the_adapters_asks_what_kind_of_object_one_is():
    assert [*house.asked_for()] == []


def test_a_question_for_a_kind_of_object_is_counted_with_its_line(plant):
    before = [*house.asked_for()]
    plant(one="def f(x):\n    return isinstance(x, list | Cohort), isinstance(x, str)\n")
    assert {*house.asked_for()} - {*before} == {("fedsim/one.py", 2, "Cohort")}


def test_the_report_names_every_figure():
    report = house.report()
    for figure in ("rooms", "circles", "files above 400", "functions above 60", "stand twice 0"):
        assert figure in report
