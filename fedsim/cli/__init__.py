"""The command line: `fedsim run`, `resume`, `plan`, `compare`, `tune`, `list` and others.

Results go to standard output (with `--json` exactly one JSON document), everything else to standard
error. Exit codes: 0 done, 1 failed, 2 refused, 3 a claim of `[expect]` is broken, 130 interrupted,
143 terminated.

The commands stand in the order in which `fedsim --help` lists them, each in a module of its name.
Nothing heavy is imported before a command does its work.
"""

import atexit
import gc
import os
import sys

from fedsim.cli.app import FAILED, app, tell, unwritten

# commands register themselves, in the order of `fedsim --help`
# isort: off
from fedsim.cli import run  # noqa: F401
from fedsim.cli import resume  # noqa: F401
from fedsim.cli import export  # noqa: F401
from fedsim.cli import plan  # noqa: F401
from fedsim.cli import compare  # noqa: F401
from fedsim.cli import tune  # noqa: F401
from fedsim.cli import evidence  # noqa: F401
from fedsim.cli import check  # noqa: F401
from fedsim.cli import golden  # noqa: F401
from fedsim.cli import listing  # noqa: F401
from fedsim.cli import partition  # noqa: F401
from fedsim.cli import metrics  # noqa: F401
from fedsim.cli.doctor import command as doctor  # noqa: F401
from fedsim.cli.new import command as new  # noqa: F401
# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line of this process."""
    _hold_standard_streams()
    # at the end, to look for garbage among all that torch and Ray have made takes half a second
    atexit.register(gc.freeze)
    # Import paths in a scenario may name modules beside it; what is installed comes first.
    try:
        sys.path.append(os.getcwd())
    except FileNotFoundError:  # torch's libraries do not load there either
        print("fedsim: the working folder has been removed; go to another one", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        app()
    except OSError as error:  # a command's own are told by it: this is of its help
        tell(unwritten(error))
        raise SystemExit(FAILED) from None


def _hold_standard_streams() -> None:
    """Open those that are closed: the next file of a run would be taken for them by workers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:
                os.set_inheritable(number, True)
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
