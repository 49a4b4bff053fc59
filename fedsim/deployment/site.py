"""What a site lets a scenario that others wrote do on its node, and what leaves it besides replies.

A SuperNode names its site file in `--node-config "site='/etc/fedsim/site.toml'"`; where it does
not, and on the server, the variable FEDSIM_SITE of the SuperExec does:

    [site]
    imports = ["hospital_models"]      # modules that a scenario may name by import path
    overrides = ["client", "rounds"]   # what `set` in a run-config may change; none where empty
    errors = "place"                   # or "text": what an error reply says
    audit = "/var/log/fedsim.jsonl"    # a line for every instruction

Without a file, and without a key, a scenario may name modules of the app's own folder, `set` may
change everything but where modules lie, and an error reply says the error's type and place, never
its text: that may quote rows of the site's data.
"""

import contextlib
import importlib.util
import json
import logging
import os
import shlex
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedsim.basics.errors import ScenarioError, SchemaError, printable, show, unknown
from fedsim.basics.import_paths import is_import_path, permitting
from fedsim.basics.project import OURS, is_installed
from fedsim.basics.text import twice_in
from fedsim.messages.records import NUM_EXAMPLES

SITE = "site"  # the key of the node config, and the table of the file
VARIABLE = "FEDSIM_SITE"
_APP = Path(__file__).resolve().parents[2]  # where this package lies: the app's folder, if bundled
_ERRORS = ("place", "text")
SHARED = ("labels", "sums")
_OF_SOFTWARE = "fedsim.basics.kernels_in_use"  # whose errors say nothing of data
_log = logging.getLogger("fedsim")


@dataclass(frozen=True)
class SitePolicy:
    """What a site allows.

    Attributes:
        imports: Top-level modules that a scenario may name by import path, beside the app's own.
        overrides: Tables, and keys outside of tables, that `set` may change; None allows all but
            `modules`.
        errors: What an error reply says: the "place" in the code, or the error's "text" too.
        audit: A file that gets a line for every instruction; None for none.
        data: The site's file or folder, for scenarios whose sites have their own; None leaves it to
            the node config.
        loader: A function of the site's own that returns its data, in place of a file.
        state: A folder where clients' states outlive the node and its run; None for none.
        nodes: On the server: which partition each of Flower's nodes holds, pairs (node, partition);
            None takes the nodes' word.
        share: What the server is told of these data beside columns, counts and a hash: "labels",
            the values of the target's classes, and "sums", for standardising.
        metrics: Which numbers about training and evaluation the server is told, beside how many
            samples they are of; None tells those that the scenario asks for.
    """

    imports: tuple[str, ...] = ()
    overrides: tuple[str, ...] | None = None
    errors: str = "place"
    audit: Path | None = None
    data: Path | None = None
    loader: str | None = None
    state: Path | None = None
    nodes: tuple[tuple[int, int], ...] | None = None
    share: tuple[str, ...] = SHARED
    metrics: tuple[str, ...] | None = None

    def require_told(self, reply: Message) -> None:
        """Hold a reply back that says more than the site lets anybody know.

        Raises:
            ScenarioError: Naming the metrics that it would tell.
        """
        if self.metrics is None or not reply.has_content():
            return
        told = {name for record in reply.content.metric_records.values() for name in record}
        if more := sorted(told - {NUM_EXAMPLES, *self.metrics}):
            allowed = ", ".join(self.metrics) or "none"
            raise ScenarioError(
                f"metrics {', '.join(map(printable, more))}: this node's site file lets the server "
                f"know none of them ([site] metrics); it allows: {allowed}"
            )

    def why_not(self, module: str | None) -> str | None:
        """Say why a scenario may not use what a module defines; None if it may."""
        top = (module or "").partition(".")[0]
        if top and (top in self.imports or _is_apps_own(top)):
            return None
        named = f"module '{top}'" if top else "what belongs to no module"
        return (
            f"{named} is none of the app's own, and this node's site file does not allow it: the "
            "site can add it to [site] imports"
        )

    def require_overridable(self, overrides: Sequence[str]) -> None:
        """Refuse what a run-config may not change.

        Args:
            overrides: `table.key=value`, each.

        Raises:
            ScenarioError: If one of them is not the run-config's to change here.
        """
        for override in overrides:
            changed = override.partition("=")[0].strip()
            if changed == "modules":
                raise ScenarioError(
                    f"set = {show(override)}: where modules lie on a node is not a run-config's "
                    "to say; put them into the app"
                )
            if self.overrides is not None and changed.partition(".")[0] not in self.overrides:
                allowed = ", ".join(self.overrides) or "nothing"
                raise ScenarioError(
                    f"set = {show(override)}: this node's site file does not allow it; allowed: "
                    f"{allowed}"
                )


def read_policy(path: Path) -> SitePolicy:
    """Read a site file.

    Raises:
        ScenarioError: If it cannot be read, or holds what it may not; the message names the file
            and the nearest key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScenarioError(f"site file {path}: cannot be read: {error}") from error
    keys = list(SitePolicy.__dataclass_fields__)
    for name in tables:
        if name != SITE:
            raise ScenarioError(f"site file {path}: {unknown(name, 'a table', [SITE])}")
    given = tables.get(SITE, {})
    if not isinstance(given, dict):
        raise ScenarioError(f"site file {path}: site = {show(given)}: must be a table")
    for name in given:
        if name not in keys:
            raise ScenarioError(f"site file {path}: {unknown(name, 'a key of [site]', keys)}")
    _check(given, path)
    overrides, metrics = given.get("overrides"), given.get("metrics")
    return SitePolicy(
        imports=tuple(given.get("imports", ())),
        overrides=None if overrides is None else tuple(overrides),
        metrics=None if metrics is None else tuple(metrics),
        errors=given.get("errors", _ERRORS[0]),
        audit=Path(given["audit"]) if "audit" in given else None,
        data=Path(given["data"]) if "data" in given else None,
        loader=given.get("loader"),
        state=Path(given["state"]) if "state" in given else None,
        nodes=_read_nodes(given["nodes"], path) if "nodes" in given else None,
        share=tuple(given.get("share", SHARED)),
    )


def _check(given: Mapping[str, Any], path: Path) -> None:
    """Refuse values that a site file cannot have.

    Raises:
        ScenarioError: Naming the file, the key and what is allowed.
    """
    for name in ("imports", "overrides", "share", "metrics"):
        if name in given and not _are_names(given[name]):
            raise ScenarioError(
                f"site file {path}: [site] {name} = {show(given[name])}: must be a list of names"
            )
    errors = given.get("errors", _ERRORS[0])
    if errors not in _ERRORS:
        raise ScenarioError(
            f"site file {path}: [site] errors: {unknown(str(errors), 'a choice', _ERRORS)}"
        )
    for name in ("audit", "data", "state"):
        place = given.get(name)
        if place is not None and not (isinstance(place, str) and os.path.isabs(place)):
            raise ScenarioError(
                f"site file {path}: [site] {name} = {show(place)}: must be an absolute path"
            )
    loader = given.get("loader")
    if loader is not None and not (isinstance(loader, str) and is_import_path(loader)):
        raise ScenarioError(
            f"site file {path}: [site] loader = {show(loader)}: must be a function of the site's "
            "own, 'package.module:function'"
        )
    if loader is not None and "data" in given:
        raise ScenarioError(f"site file {path}: [site] data and loader: leave one of them out")
    for each in given.get("share", ()):
        if each not in SHARED:
            raise ScenarioError(
                f"site file {path}: [site] share: {unknown(str(each), 'a choice', SHARED)}"
            )


def _read_nodes(given: Any, path: Path) -> tuple[tuple[int, int], ...]:
    """The partition of each of Flower's nodes, by node.

    Raises:
        ScenarioError: If it is no table of them, or two hold one partition.
    """
    where = f"site file {path}: [site] nodes"
    if not isinstance(given, dict) or not given:
        raise ScenarioError(f"{where} = {show(given)}: must be a table, such as {{ 4711 = 0 }}")
    for node, partition in given.items():
        if not node.isdecimal() or type(partition) is not int or partition < 0:
            raise ScenarioError(
                f"{where}: {node} = {show(partition)}: must be Flower's number of a node and its "
                "partition, from 0"
            )
    if (twice := twice_in(map(str, given.values()))) is not None:
        raise ScenarioError(f"{where}: two nodes hold partition {twice}; each has its own")
    return tuple(sorted((int(node), partition) for node, partition in given.items()))


@dataclass
class _Instruction:
    """What is noted of an instruction while it is answered.

    Attributes:
        refused: Why something that the scenario names may not be used here.
        scenario_sha256: Of the scenario that was asked for, once it is known.
    """

    refused: list[str] = field(default_factory=list)
    scenario_sha256: str | None = None


# Answers an instruction under a policy; calls what it is given with the scenario's hash.
Answer = Callable[[Message, Context, SitePolicy, Callable[[str], None]], Message]


def at_site(answer: Answer, message: Message, context: Context) -> Message:
    """Answer an instruction as far as the node's site allows.

    Raises:
        ScenarioError: If the site does not allow what the scenario or the run-config asks for.
        SiteError: If answering fails in any other way, with the text in the node's log alone; or
            if the site's record cannot be written.
    """
    policy, noted, failed = SitePolicy(), _Instruction(), None

    def why_not(module: str | None) -> str | None:
        why = policy.why_not(module)
        if why is not None:
            noted.refused.append(why)
        return why

    def known(sha256: str) -> None:
        noted.scenario_sha256 = sha256

    reply = None
    try:
        policy = policy_of(context.node_config)
        with _noting(noted):
            policy.require_overridable(overrides_of(context))
        with permitting(why_not):
            answered = answer(message, context, policy, known)
        with _noting(noted):
            policy.require_told(answered)
        reply = answered
        return reply
    except Exception as error:
        failed = uuid.uuid4().hex[:8]
        _log.exception("error %s, which the server is told the place of", failed)
        if noted.refused:
            raise ScenarioError("; ".join(dict.fromkeys(noted.refused))) from None
        if isinstance(error, SchemaError):
            raise
        place = place_of(error)
        if policy.errors == "text" or f" at {_OF_SOFTWARE}:" in place:
            raise
        raise SiteError(f"{place}; its text is in the node's log, error {failed}") from None
    finally:
        if policy.audit is not None:
            _note(policy.audit, message, context, noted, reply, failed)


class SiteError(Exception):
    """An error at a site, told without its text."""


def place_of(error: BaseException) -> str:
    """Return an error's type and where in the code it was raised, without anything of its text.

    Example:
        >>> try:
        ...     json.loads("Jane Doe, born 1950")
        ... except ValueError as error:
        ...     print(place_of(error).rpartition(":")[0])
        JSONDecodeError at json.decoder
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    kind = type(error).__name__
    if trace is None:
        return kind
    return f"{kind} at {trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"


def policy_of(node_config: Mapping[str, Any]) -> SitePolicy:
    """Return the policy of the site whose node this is, or of the machine; see `read_policy`."""
    path = node_config.get(SITE) or os.environ.get(VARIABLE)
    return SitePolicy() if not path else read_policy(Path(str(path)))


@contextlib.contextmanager
def at_server(context: Context) -> Iterator[SitePolicy]:
    """Hold the server's side of a scenario to the policy of its machine, which is returned.

    Raises:
        ScenarioError: If the run-config changes what it may not.
    """
    policy = policy_of({})
    policy.require_overridable(overrides_of(context))
    with permitting(policy.why_not):
        yield policy


def overrides_of(context: Context) -> list[str]:
    """Return the overrides of a run-config, `table.key=value` each."""
    return shlex.split(str(context.run_config.get("set", "")))


@contextlib.contextmanager
def _noting(noted: _Instruction) -> Iterator[None]:
    """Note what the site refuses, for that is told in words."""
    try:
        yield
    except ScenarioError as error:
        noted.refused.append(str(error))
        raise


def _is_apps_own(top: str) -> bool:
    """Whether a module lies in the app's folder; of what is installed, and of fedsim, none does."""
    if top in OURS or not top.isidentifier() or is_installed(str(_APP)):
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    found = [Path(os.path.realpath(place)) for place in places if place and os.path.exists(place)]
    return bool(found) and all(_APP in place.parents for place in found)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _note(
    file: Path,
    message: Message,
    context: Context,
    noted: _Instruction,
    reply: Message | None,
    failed: str | None,
) -> None:
    """Add a line about an instruction to a site's own record."""
    sent = 0
    if reply is not None and reply.has_content():
        records = reply.content.array_records.values()
        sent = sum(len(array.data) for record in records for array in record.values())
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": str(context.run_id),
        "instruction": message.metadata.message_type,
        "round": message.metadata.group_id,
        "scenario": context.run_config.get("scenario"),
        "set": context.run_config.get("set"),
        "scenario_sha256": noted.scenario_sha256,
        "bytes_sent": sent,
        "error": failed,
    }
    try:
        with open(file, "a", encoding="utf-8") as record:
            record.write(json.dumps(line) + "\n")
    except OSError:
        _log.exception("[site] audit = '%s': cannot be written, so nothing is answered", file)
        raise SiteError("the site's record of instructions cannot be written") from None
