"""The pages name files, modules and objects that are there."""

import re
from pathlib import Path

import pytest

from tests.laws import house

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPS = ("benchmarks", "clients", "deploy", "docs", "fedsim", "scenarios", "strategies", "tests")
ROOM = re.compile(r"^### `(fedsim/\w+/)`$")
CODE = re.compile(r"`([^`\s]+)`")
FILE = re.compile(r"[\w./-]+(\.(py|md|toml|yml)|/)")
DOTTED = re.compile(r"(fedsim|strategies|clients)(\.\w+)+")


def missing(page):
    """Yield the names on a page that stand for nothing, with their lines."""
    room = None
    for number, line in enumerate(page.splitlines(), start=1):
        if line.startswith("#"):
            found = ROOM.match(line)
            room = ROOT / found[1] if found else None
        for name in CODE.findall(line):
            if FILE.fullmatch(name):
                inside = room is not None and (room / name).exists()
                meant = room is not None or (name.split("/")[0] in TOPS and "/" in name)
                if meant and not inside and not (ROOT / name).exists():
                    yield number, name
            elif DOTTED.fullmatch(name) and not is_there(name):
                yield number, name


def is_there(name):
    """Whether a dotted name is a module, or a word in the module that it begins with."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            left = parts[end:]
            return not left or left[0] in re.findall(r"\w+", file.read_text(encoding="utf-8"))
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_what_is_there(page):
    assert list(missing(page.read_text(encoding="utf-8"))) == []


def test_every_module_of_a_room_is_on_the_map():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {}
    for part in page.split("\n### ")[1:]:
        head, _, text = part.partition("\n")
        rooms[head.strip("`")] = set(CODE.findall(text.partition("\n## ")[0]))
    left_out = []
    for file in sorted((ROOT / "fedsim").rglob("*.py")):
        room, _, inside = file.relative_to(ROOT / "fedsim").as_posix().partition("/")
        if inside and file.name != "__init__.py" and inside not in rooms[f"fedsim/{room}/"]:
            left_out.append(f"{room}/{inside}")
    assert left_out == []


def test_the_table_of_rooms_is_the_law():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, flags=re.MULTILINE)
    said = {room: {*may.replace("`", "").split(", ")} - {"nothing"} for room, may in rows}
    assert {room: said[room] for room in house.MAY_IMPORT} == house.MAY_IMPORT


@pytest.mark.parametrize(
    "line",
    [
        "see `fedsim/engine/nowhere.py`",
        "see `tests/nowhere/`",
        "see `fedsim.engine.grid.Nothing`",
        "### `fedsim/engine/`\nsee `nowhere.py`",
    ],
)
def test_what_is_not_there_is_found(line):
    assert list(missing(line))


def test_files_of_a_users_own_are_no_concern():
    assert list(missing("a `model.py` beside it, in `runs/try`, and `package.module:name`")) == []
