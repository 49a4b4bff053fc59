"""How the code is laid out: no circles of modules, no class name that means two things."""

import pytest

from laws import house


@pytest.fixture
def plant(monkeypatch):
    """Puts files beside those of the product, for `house` alone."""
    known = dict(house.sources())

    def add(**files):
        texts = {f"fedsim/{name}.py": text for name, text in files.items()}
        monkeypatch.setattr(house, "sources", lambda: known | texts)
        house.trees.cache_clear()

    yield add
    house.trees.cache_clear()


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


def test_a_question_for_a_kind_of_object_is_counted_with_its_line(plant):
    before = [*house.asked_for()]
    plant(one="def f(x):\n    return isinstance(x, list | Cohort), isinstance(x, str)\n")
    assert {*house.asked_for()} - {*before} == {("fedsim/one.py", 2, "Cohort")}


def test_the_report_names_every_figure():
    report = house.report()
    for figure in ("rooms", "circles", "files above 400", "functions above 60", "stand twice 0"):
        assert figure in report
