"""Files that say which client has which sample are read, or refused by what is wrong in them."""

import json

import pytest

from fedsim.basics.errors import ScenarioError
from tests.cases.own_tables import read, rows, write

COUNT = 20
FEDML = "{\n0: [\n3, 1, 2\n]\n1: [\n4, 5, 19]\n}\n"


def divided(tmp_path, content, name, **keys):
    """What each of the clients holds of 20 rows, none held out by chance."""
    folder = tmp_path / "mine"
    write(folder / "x.csv", rows(COUNT))
    write(folder / "test.csv", rows(4))
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    found = read(folder, {"kind": "file", "path": str(tmp_path / name), **keys})
    return [mine.tolist() for mine in found.clients(range(found.num_clients)).rows]


def table(rows_of, header="sample,client"):
    return "\n".join([header, *(",".join(map(str, rows_of(n))) for n in range(COUNT))]) + "\n"


HALVES = [[n for n in range(COUNT) if n % 2 == half] for half in (0, 1)]


@pytest.mark.parametrize(
    "content", [FEDML, FEDML.replace("]\n1", "],\n1"), "{0: [3, 1, 2], 1: [4, 5, 19]}"]
)
def test_a_map_as_fedml_and_python_write_it_is_read(tmp_path, content):
    assert divided(tmp_path, content, "map.json") == [[1, 2, 3], [4, 5, 19]]
    with pytest.raises(ScenarioError, match=r"as FedML writes them: let its name end in .json"):
        divided(tmp_path, content, "net_dataidx_map.txt")


@pytest.mark.parametrize(
    "content",
    [
        table(lambda n: (n, n % 2)).replace("\n", "\r"),
        table(lambda n: (n, n % 2)).replace("\n", "\r\n").encode("utf-8-sig"),
        "\n\n" + table(lambda n: (n, n % 2)),
        table(lambda n: (n, f"0{n % 2}")),
    ],
)
def test_line_ends_blank_lines_and_padded_numbers_change_nothing(tmp_path, content):
    assert divided(tmp_path, content, "map.csv") == HALVES


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"0": [3], "1": [2], "0": [4]}', r"has the key '0' twice in one table; write it once"),
        ("{0: [3], 1: [2], 0: [4]}", r"has the key '0' twice in one table"),
        ('{"client": [1, 0], "client": [0, 1]}', r"has the key 'client' twice"),
        ('[{"sample": 0, "client": 1, "client": 0}]', r"has the key 'client' twice"),
        ('{"0": [3], "00": [4]}', r"names clients '0' and '00', which are the same number"),
        ('{"1": [3], " 1": [4]}', r"names clients '1' and ' 1', which are the same number"),
        ('{"1": [3], "\\uff11": [4]}', r"names clients '1' and '\uff11', which are the same numb"),
        ("[[3, 1], [2, 4]]", r'is a list of lists, .*name the clients: \{"0": \[4, 7\], "1"'),
        ("[[3, 1, 5], [2]]", r"json.dump\(dict\(enumerate\(lists\)\), file\) writes it"),
        ("[0, 1, 0]", r'list of numbers; write \{"client": \[...\]\} if each is a client'),
        ('{"columns": [], "index": [], "data": []}', r"orient='split'; write it with orient='rec"),
        ('{"sample": {"0": 1}, "client": {"0": 1}}', r"holds no list but a table; pandas writes r"),
        ('{"0": [1, 20], "1": [2]}', r"sample = 20: .*counted from 0, and it names none 0: subtr"),
    ],
)
def test_a_map_in_json_that_says_something_twice_or_otherwise(tmp_path, document, message):
    with pytest.raises(ScenarioError, match=rf"path = '.*map.json': .*{message}"):
        divided(tmp_path, document, "map.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(lambda n: (n + 1, n % 2)), r"row 19: sample = 20: .*; samples are counted from 0"),
        (table(lambda n: (n, ["0", "00", "1"][n % 3])), r"names clients '0' and '00', which are"),
        (table(lambda n: (n, n, 0), "sample,sample,client"), r"two columns 'sample'; take one out"),
        (table(lambda n: (n, 0, 1), "sample,client,client"), r"two columns 'client'; take one out"),
        (table(lambda n: (n, 0), "0,0"), r"two columns '0'; is its first line a row\? then"),
        (table(lambda n: (n, 1), "0,1"), r"among 0, 1; is its first line a row\? then write the"),
        (table(lambda n: (n, f"c{n % 2}")), r"'c0': must be a whole number; number the clients"),
        (
            table(lambda n: (n, 0, ""), "sample,client,"),
            r"column 3 has no name; take the separator",
        ),
        ("# mine\n" + table(lambda n: (n, 0)), r"take the lines above the names away"),
        (table(lambda n: (n, 0)).replace(",", ":"), r"'client' among sample:client; separate its"),
        (table(lambda n: (n, 0)).encode("utf-16"), r"is text in UTF-16; save it as UTF-8"),
    ],
)
def test_a_table_of_samples_and_clients_that_cannot_be_followed(tmp_path, content, message):
    with pytest.raises(ScenarioError, match=rf"path = '.*map.csv': .*{message}"):
        divided(tmp_path, content, "map.csv")


def test_clients_counted_from_1_are_called_that_where_they_do_not_fit(tmp_path):
    document = json.dumps({"1": HALVES[0], "2": HALVES[1]})
    with pytest.raises(ScenarioError, match=r"names client 2; .*counted from 0, and it names none"):
        divided(tmp_path, document, "map.json", clients=2)
    assert divided(tmp_path, document, "map.json") == [[], *HALVES]
