"""Strategies of users that remember things outside of their attributes: each counts its rounds."""

import functools
import sqlite3
import threading

from tests.cases import elsewhere_kept
from tests.cases.elsewhere_kept import HISTORY
from tests.cases.rememberers import Moving


class Counting(Moving):
    """What they share: the model shrinks by what `count()` says."""

    def moved(self, old, new):
        return [n * (1 - 0.01 * self.count()) for n in new]


class OtherModule(Counting):
    def count(self):
        elsewhere_kept.N += 1
        return elsewhere_kept.N


class ImportedLate(Counting):
    def count(self):
        from tests.cases import elsewhere_kept as kept

        setattr(kept, "N", kept.N + 1)  # noqa: B010 - as users do
        return kept.N


SEEN = []


def remember():
    SEEN.append(1)
    return len(SEEN)


class ByFunction(Counting):
    def count(self):
        return remember()


class ByAttribute(Counting):
    """The function is an attribute."""

    def __init__(self):
        super().__init__()
        self.count = remember


class SharedList(Counting):
    """Two modules name the same list."""

    def count(self):
        HISTORY.append(1)
        return elsewhere_kept.length()


class MutableDefault(Counting):
    def count(self, memory=[0], *, also={"n": 0}):  # noqa: B006
        memory[0] += 1
        also["n"] += 1
        return memory[0] + also["n"]


class Store:
    seen = {"n": 0}  # noqa: RUF012

    @classmethod
    def up(cls):
        cls.seen["n"] += 1
        return cls.seen["n"]


class OtherClass(Counting):
    def count(self):
        Store.seen["n"] += 1
        return Store.seen["n"]


class ClassMethod(Counting):
    def count(self):
        return Store.up()


def warm():
    warm.n = getattr(warm, "n", 0) + 1
    return warm.n


class FunctionAttribute(Counting):
    def count(self):
        return warm()


class Singleton:
    made = None

    def __new__(cls):
        if cls.made is None:
            cls.made = super().__new__(cls)
            cls.made.n = 0
        return cls.made


class BySingleton(Counting):
    def count(self):
        only = Singleton()
        only.n += 1
        return only.n


class Slots(Counting):
    __slots__ = ("__private", "public")

    def __init__(self):
        super().__init__()
        self.__private, self.public = [0], 0

    def count(self):
        self.__private[0] += 1
        self.public += 1
        return self.__private[0] + self.public


def counted(function):
    calls = 0

    @functools.wraps(function)
    def wrapped(*args):
        nonlocal calls
        calls += 1
        return calls

    return wrapped


class Decorated(Counting):
    @counted
    def count(self):
        return 0


class Callable:
    """Counts its calls; its lock and its function have no form in a checkpoint."""

    def __init__(self):
        self.n, self.lock, self.after = 0, threading.Lock(), lambda n: n + 1

    def __call__(self):
        with self.lock:
            self.n = self.after(self.n)
        return self.n


TICK = Callable()


class CallableObject(Counting):
    def count(self):
        return TICK()


class Cached(Counting):
    @functools.lru_cache(maxsize=1)  # noqa: B019
    def first(self):
        return len(self.current)

    def count(self):
        return self.first()


@functools.lru_cache
def kept_results():
    return [0]


class CachedList(Counting):
    """Remembers in what a function with a cache has returned."""

    def count(self):
        kept_results()[0] += 1
        return kept_results()[0]


@functools.lru_cache
def share(number):
    return 2 * number


class CachedResults(Counting):
    """Keeps results that are the same each time, and says what it remembers itself."""

    n = 0

    def __init__(self):
        super().__init__()
        share(1)

    def count(self):
        self.n += 1
        return share(1)

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class CachedBefore(Counting):
    """Calls a function with a cache when it is made, and in no round."""

    def __init__(self):
        super().__init__()
        self.share = share(2)

    def count(self):
        return self.share


TABLE = sqlite3.connect(":memory:")


class Database(Counting):
    def count(self):
        return TABLE.execute("select 1").fetchone()[0]


STREAM = (n for n in range(100))


class Streaming(Counting):
    def count(self):
        return next(STREAM)


def as_a_new_process():
    """Put everything back to what it is when the modules are loaded."""
    kept_results.cache_clear(), share.cache_clear()
    elsewhere_kept.N, Singleton.made, TICK.n = 0, None, 0
    vars(warm).clear()
    SEEN.clear(), HISTORY.clear()
    Store.seen["n"] = 0
    MutableDefault.count.__defaults__[0][0] = 0
    MutableDefault.count.__kwdefaults__["also"]["n"] = 0
    Decorated.count.__closure__[0].cell_contents = 0
