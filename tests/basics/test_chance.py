"""What a source leaves to chance is found, and what is settled is not."""

import ast

import pytest

from fedsim.basics.chance import left_to_chance, of_this_process

LEFT = {
    "r = np.random.default_rng()": "default_rng has no seed",
    "r = default_rng(None)": "default_rng has no seed",
    "r = random.Random()": "Random has no seed",
    "def f(r=np.random.RandomState()): return r": "RandomState has no seed",
    "g = Generator(PCG64())": "PCG64 has no seed",
    "random.seed()": "seed asks the operating system",
    "np.random.seed()": "seed asks the operating system",
    "torch.seed()": "seed asks the operating system",
    "s = os.urandom(4)": "urandom asks the operating system",
    "s = secrets.randbelow(4)": "randbelow asks the operating system",
    "s = uuid.uuid4().int": "uuid4 asks the operating system",
    "torch.manual_seed(int(time.time()))": "manual_seed is seeded by the clock",
    "random.seed(datetime.now().microsecond)": "seed is seeded by the clock",
    "r = np.random.default_rng(os.getpid())": "default_rng is seeded by the clock",
    "k = hash(name) % 7": "hash of text is another in each process",
    "names = list(set(column))": "the order of a set of text decides",
    "for name in {'a', 'b'}: f(name)": "the order of a set of text decides",
    "x = [f(name) for name in set(names)]": "the order of a set of text decides",
    "m = dict(enumerate({r.name for r in rows}))": "the order of a set of text decides",
    "text = ','.join(set(names))": "the order of a set of text decides",
    "x = [read(f) for f in os.listdir(d)]": "listdir has the file system's order: sort it",
    "for f in Path(d).glob('*.csv'): read(f)": "glob has the file system's order: sort it",
    "fs = list(d.iterdir())": "iterdir has the file system's order: sort it",
}
SETTLED = [
    "r = np.random.default_rng(3)",
    "r = np.random.default_rng(seed=s)",
    "r = random.Random(4)",
    "random.seed(1); torch.manual_seed(2); np.random.seed(seed)",
    "began = time.time()",
    "self.env.seed()",
    "names = sorted(set(column))",
    "n = len(set(column))",
    "names = list(set(column))\nnames.sort()",
    "for name in sorted({'a', 'b'}): f(name)",
    "for n in {1, 2}: f(n)",
    "known = {f(x) for x in set(names)}",
    "x = [read(f) for f in sorted(os.listdir(d))]",
    "fs = sorted(p for p in Path(d).glob('*') if p.is_file())",
    "fs = os.listdir(d)\nfs.sort()\nx = [read(f) for f in fs]",
    "fs = list(d.iterdir())\nfor f in sorted(fs): read(f)",
    "self.hash(name)",
    "class A:\n    def __hash__(self):\n        return hash(self.name)",
]


def found(source):
    return left_to_chance(ast.walk(ast.parse(source)))


@pytest.mark.parametrize("source", LEFT)
def test_it_is_named_with_its_line(source):
    assert found("import os\n" + source) == [(2, LEFT[source])]


@pytest.mark.parametrize("source", SETTLED)
def test_what_a_seed_or_an_order_settles_is_not_named(source):
    assert found(source) == []


def test_hashes_are_the_same_in_each_process_once_they_are_seeded(monkeypatch):
    hashes = [LEFT["k = hash(name) % 7"], LEFT["names = list(set(column))"]]
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    assert all(map(of_this_process, hashes))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert not any(map(of_this_process, hashes))
    assert of_this_process("default_rng has no seed")
