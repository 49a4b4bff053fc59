"""Files that another process writes, read while they grow."""

import os

import pytest

from fedsim.basics.growing import GrowingLines


@pytest.fixture
def file(tmp_path):
    return tmp_path / "lines"


@pytest.fixture
def followed(file):
    """What is told of the file; None stands for a beginning."""
    told = []
    lines = GrowingLines(file, lambda: told.append(None), told.append)

    def read():
        told.clear()
        lines.read()
        return list(told)

    return read


def append(file, text):
    with file.open("ab") as opened:
        opened.write(text)


def test_a_line_is_told_once_and_only_when_it_is_whole(file, followed):
    assert followed() == []
    append(file, b"one\ntw")
    assert followed() == [None, b"one"]
    assert followed() == []
    append(file, b"o\nthree\n")
    assert followed() == [b"two", b"three"]


def test_a_file_that_is_cut_back_is_told_anew(file, followed):
    append(file, b"one\ntwo\nthree\n")
    followed()
    os.truncate(file, 4)
    append(file, b"2\n3\n4\n5\n")
    assert followed() == [None, b"one", b"2", b"3", b"4", b"5"]


def test_a_file_that_is_cut_back_and_grows_to_the_same_lines_is_not_told_twice(file, followed):
    append(file, b"one\ntwo\n")
    followed()
    os.truncate(file, 4)
    append(file, b"two\nthree\n")
    assert followed() == [b"three"]


def test_a_file_that_is_replaced_by_a_longer_one_is_told_anew(file, followed, tmp_path):
    append(file, b"one\n")
    followed()
    (tmp_path / "other").write_bytes(b"one\nother\n")
    (tmp_path / "other").rename(file)
    assert followed() == [None, b"one", b"other"]


def test_a_file_that_is_gone_has_nothing(file, followed):
    append(file, b"one\n")
    followed()
    file.unlink()
    assert followed() == [None]
    assert followed() == []


def test_what_is_no_plain_file_is_refused_and_not_waited_for(file, followed):
    os.mkfifo(file)
    with pytest.raises(OSError, match="is no plain file"):
        followed()


def test_a_line_without_end_is_refused(file, followed, monkeypatch):
    monkeypatch.setattr("fedsim.basics.growing._LONGEST", 10)
    append(file, b"short\n" + b"x" * 30)
    with pytest.raises(OSError, match="longer than 10 bytes"):
        followed()
