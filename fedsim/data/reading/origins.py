"""Where rows and columns come from: files of a folder (`files`), or the Hugging Face Hub.

Both are read by the `datasets` library, by its own readers alone: no script of a data set is ever
run, nothing is told to anybody, no progress bar is drawn.
"""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from fedsim.basics.errors import RunError, ScenarioError, nearest


class Written(NamedTuple):
    """How the values of a table of text are written.

    Attributes:
        decimal: What stands before the fraction of a number.
        column: Yields a column's values as they stand in the files, block by block.
    """

    decimal: str
    column: Callable[[str], Iterator[Sequence[str]]]


class Split(NamedTuple):
    """The rows of one split.

    Attributes:
        rows: A `datasets.Dataset`.
        place: Says in words where a row is, counted from 0 ("train.csv, row 3").
        owner: The column of the natural owner, where the files say it themselves.
        said: What was found about the files that the scenario does not say, in lines.
        text: How a table of text is written; None of another.
        note: Ends messages about its columns.
    """

    rows: Any
    place: Callable[[int], str]
    owner: str = ""
    said: tuple[str, ...] = ()
    text: Written | None = None
    note: str = ""


class Origin(Protocol):
    """Where a data set is read from."""

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the content, known without reading it, as JSON."""

    @property
    def description(self) -> dict[str, Any]:
        """What the manifest says of it; no machine paths."""

    def opened(self) -> contextlib.AbstractContextManager[Mapping[str, Split]]:
        """Return the splits "train" and, where there is one, "test"; they last until the exit."""


@dataclass(frozen=True)
class HubRepository:
    """A data set of the Hugging Face Hub.

    Attributes:
        name: What the scenario calls the data set.
        repository: "owner/name".
        config: Which of its configurations; None takes the only or default one.
        revision: Branch, tag or commit; None takes the newest at the first download.
        train: The split to train on.
        test: The split to hold out; None for none.
    """

    name: str
    repository: str
    config: str | None
    revision: str | None
    train: str
    test: str | None

    @property
    def identity(self) -> dict[str, Any]:
        """Repository, configuration, revision and splits."""
        return {**self.description, "train": self.train, "test": self.test}

    @property
    def description(self) -> dict[str, Any]:
        """Repository, configuration and revision."""
        given = {"config": self.config, "revision": self.revision}
        return {"hub": self.repository, **{k: v for k, v in given.items() if v is not None}}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Mapping[str, Split]]:
        """Download what is not in the cache of `datasets` yet, and read it."""
        splits = self._load()
        wanted = {"train": self.train} | ({"test": self.test} if self.test else {})
        for key, split in wanted.items():
            if split not in splits:
                guess = nearest(split, splits)
                hint = f"; did you mean '{guess}'?" if guess else ""
                raise ScenarioError(
                    f"[data] {key} = '{split}': {self.repository} has no such split{hint} "
                    f"allowed: {', '.join(splits)}"
                )
        yield {key: Split(splits[split], partial(_place, split)) for key, split in wanted.items()}

    @property
    def _by_hand(self) -> str:
        """How a scenario takes the files from a folder instead."""
        if self.name == "hub":
            return "say [data] name = 'folder' and set path"
        return "set [data] path"

    def _load(self) -> Any:
        datasets = library()
        where = f"[data] name = '{self.name}': {self.repository}"
        try:
            with quiet():
                return datasets.load_dataset(self.repository, self.config, revision=self.revision)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise ScenarioError(
                f"{where} is not to be had from the Hugging Face Hub: {error}"
            ) from error
        except OSError as error:
            raise RunError(
                f"{where} cannot be had from the Hugging Face Hub ({error}); connect to the "
                f"network once, or {self._by_hand} to a folder with its files"
            ) from error
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            raise ScenarioError(
                f"{where} is loaded by a script of its own, which fedsim never runs; use the "
                "revision 'refs/convert/parquet' if it has one, or download its files"
            ) from error
        except ValueError as error:
            reason = " ".join(str(error).split())
            key = "config" if "onfig" in reason else "repository"
            raise ScenarioError(f"[data] {key}: {self.repository}: {reason}") from error


def library() -> Any:
    """Return the module `datasets`, told to report to nobody."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # is read when it is imported
    import datasets

    return datasets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from drawing, from counting downloads and from its own words meanwhile."""
    datasets = library()
    shown, counts = datasets.is_progress_bar_enabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with warnings.catch_warnings():
            # its reader of CSV leaves files open, in objects that are young by then
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.filterwarnings("ignore", "Columns .* have mixed types")
            # pandas reads separators beyond ASCII with another engine, to the same values
            warnings.filterwarnings("ignore", "Falling back to the 'python' engine")
            yield
            gc.collect(1)
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _place(split: str, row: int) -> str:
    return f"split '{split}', row {row}"
