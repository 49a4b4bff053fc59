"""A trial of a user's code before round 1: in training, with the real procedure, on real samples.

A model, a procedure or a task of the user's own trains two clients for a few steps, each beside
the other and alone. What they keep beside the tensors and which generators they draw from is seen
there; an executor that trains clients together is taken only where it gives what the loop over
clients gives. Needs torch alone.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import ScenarioError
from fedsim.basics.tensors import tensors_of
from fedsim.client.batching.dropout import why_not_seeded
from fedsim.client.differences import apart, changes, first_odd, largest, rows
from fedsim.client.executor import CohortExecutor
from fedsim.client.job import Action, ChunkJob, ChunkResult, ExecutorKind
from fedsim.client.procedure import ClientProcedure
from fedsim.client.vectorising import TRIED_ONCE, inside, without_a_rule
from fedsim.client.watched import FEW, FewSamples, PlainDescent, WatchedExecutor, Watching
from fedsim.messages.layout import Payload

_LOOKED_AT = 256  # clients among which those that are tried are looked for

# shares of the largest change of a tensor that rounding may make
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-8}
_SAME = 1e-5


class Findings(NamedTuple):
    """What a trial has found.

    Attributes:
        kind: The executor that is right.
        reason: Why it is not the best of those tried; None where it is.
        seeds_dropout: Whether dropout masks can be drawn before a pass.
        notes: What a user should know, in lines.
    """

    kind: ExecutorKind
    reason: str | None = None
    seeds_dropout: bool = True
    notes: tuple[str, ...] = ()


class _Trial(NamedTuple):
    """What is tried.

    Attributes:
        make: Makes an executor of a class for a procedure; the rest are keywords of
            `CohortExecutor`.
        procedure: The client procedure.
        data: The clients' samples.
        owned: What of the scenario is the user's, for messages.
        members: The two clients.
        batch: The most samples that a step of training has.
    """

    make: Callable[..., CohortExecutor]
    procedure: ClientProcedure
    data: Any
    owned: str
    members: tuple[int, ...]
    batch: int

    def made(
        self, kind: ExecutorKind, *, seeds_dropout: bool, small: bool = True, wide: bool = False
    ) -> WatchedExecutor:
        """An executor of a kind; a wide one computes in float64."""
        most: dict[int, int | None] = dict.fromkeys(self.members)
        if small:
            most |= zip(self.members, FEW, strict=False)
        executor = self.make(
            CohortExecutor,
            self.procedure,
            FewSamples(self.data, most),
            kind=kind,
            puts_back=True,
            seeds_dropout=seeds_dropout,
            wide=wide,
        )
        if small and executor.layout.dim >= TRIED_ONCE and len(self.members) > 1:
            most |= zip(self.members, (1, 2), strict=True)
        made = WatchedExecutor(executor, Watching(executor.surroundings), small, most)
        executor.surrounded_by(made.watch)
        executor.inputs.shortened = made.shortened
        executor.evaluation_step = max(FEW)
        return made

    def in_turn(self) -> tuple[WatchedExecutor, ChunkResult, str | None]:
        """Train one client after another: (executor, result, why dropout draws by itself)."""
        failed: Exception | None = None
        for small in (True, False):  # some models need more than a few samples
            loop = self.made("loop", seeds_dropout=True, small=small)
            irregular = self._irregular(loop)
            if irregular is not None:
                loop = self.made("loop", seeds_dropout=False, small=small)
            try:
                # the first once more, after another
                turns = (*self.members, self.members[0])
                return loop, loop.executor.train(_job(loop.executor, turns)), irregular
            except Exception as error:
                failed = failed or error
        assert failed is not None
        words = " ".join(str(failed).split()) or "no message"
        raise ScenarioError(
            f"{self.owned}: training fails before round 1, tried on samples of clients "
            f"{', '.join(map(str, self.members))}: {type(failed).__name__}: {words}"
        ) from failed

    def _irregular(self, loop: WatchedExecutor) -> str | None:
        """Why masks of dropout cannot be drawn before a pass, or None."""
        executor, inputs = loop.executor, loop.executor.inputs
        if not inputs.dropouts:
            return None
        drawn = self.data.clients(self.members[:1])
        # again and again where there are few
        rows = np.resize(np.asarray(drawn.rows[0]), self.batch)
        with loop.watch.generators_put_back():
            loop.watch.begin()  # as where the shapes of masks are found
            try:
                features = inputs.cast(torch.from_numpy(np.asarray(drawn.features[rows])))
                features = features.to(executor.device)
                return why_not_seeded(executor.model, inputs.dropouts, features)
            except Exception:  # training will say what is wrong
                return None

    def require_alike(self, loop: WatchedExecutor, result: ChunkResult) -> None:
        """Refuse what trains otherwise when it trains again after another client."""
        last = len(self.members)
        assert isinstance(result.params, Tensor)
        others = {**result.buffers, **result.extra, **result.state, **result.metrics}
        if all(torch.equal(each[0], each[last]) for each in (result.params, *others.values())):
            return
        found = changes(loop.executor, result)
        if odd := first_odd(rows(found, last, 1), rows(found, 0, 1), _SAME):
            kept = loop.watch.kept
            caches = [] if kept is None else kept.caches()
            such = "the time, a file or a variable of another module"
            if caches:
                such = f"what the lru_cache of {' or of '.join(caches[:3])} holds"
            raise ScenarioError(
                f"{self.owned}: trained twice from one start, on the same samples and with the "
                f"same seeds, a client {odd}; results would depend on who trained before in a "
                f"process. Something decides that fedsim cannot put back, such as {such}: keep it "
                "in a buffer or an attribute, and draw from a generator that is an attribute"
            )

    def why_not_together(
        self, kind: ExecutorKind, loop: CohortExecutor, result: ChunkResult
    ) -> str | None:
        """Why an executor does not give what the loop gives, or None.

        It is held to it in float64 too, where what is no rounding shows, unless the model is large
        or insists on another type.
        """
        why = self._odd(kind, loop, result, wide=False)
        if why or loop.layout.dim >= TRIED_ONCE or loop.layout.dtype == torch.float64:
            return why
        try:
            wide = self.made("loop", seeds_dropout=True, wide=True).executor
            expected = wide.train(_job(wide, self.members))
        except Exception:
            return None
        return self._odd(kind, wide, expected, wide=True)

    def _odd(
        self, kind: ExecutorKind, loop: CohortExecutor, result: ChunkResult, *, wide: bool
    ) -> str | None:
        tried = self.made(kind, seeds_dropout=True, wide=wide).executor
        why, found = self._ran(f"trained together by '{kind}'", tried, tried.train, "train")
        if why is None and found is not None:
            expected = rows(changes(tried, result), 0, len(self.members))
            share = _ROUNDING.get(tried.layout.dtype, max(_ROUNDING.values()))
            odd = first_odd(changes(tried, found), expected, share)
            why = odd and f"trained together by '{kind}', a client {odd}"
        return why or self._measured_otherwise(kind, tried, loop)

    def _measured_otherwise(
        self, kind: ExecutorKind, tried: CohortExecutor, loop: CohortExecutor
    ) -> str | None:
        """Why an executor does not evaluate as the loop does, or None; where neither can, None."""
        try:
            expected = loop.evaluate(_job(loop, self.members, "evaluate")).metrics
        except Exception:  # an evaluation on the server fails too, if there is one
            return None
        words = f"evaluated together by '{kind}'"
        why, found = self._ran(words, tried, tried.evaluate, "evaluate")
        if why is not None or found is None:
            return why
        share = _ROUNDING.get(tried.layout.dtype, max(_ROUNDING.values()))
        for name, values in expected.items():
            gap = apart(found.metrics[name], values)
            if gap > share * max(largest(values), 1.0):
                return f"{words}, a client's '{name}' differs by {gap:.2g}"
        return None

    def _ran(
        self,
        words: str,
        tried: CohortExecutor,
        run: Callable[[ChunkJob], ChunkResult],
        action: Action,
    ) -> tuple[str | None, ChunkResult | None]:
        """Let an executor work on both clients: (why it does not do, what came of it)."""
        with inside(tried.model) as entered, warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                found = run(_job(tried, self.members, action))
            except Exception as error:
                said = (" ".join(str(error).split()) or "no message")[:200]
                layers = [f" in {type(m).__name__} '{name}'" for name, m in entered if name]
                where = layers[-1] if layers else ""
                return f"{words}, clients fail{where} ({type(error).__name__}: {said})", None
        return without_a_rule(heard), found


def try_out(
    make: Callable[..., CohortExecutor],
    procedure: ClientProcedure,
    data: Any,
    kinds: Sequence[ExecutorKind],
    *,
    owned: str,
) -> Findings:
    """Try a user's code.

    Args:
        make: Makes an executor of a class for a procedure and data; takes the other keywords of
            `CohortExecutor` that a trial sets.
        procedure: The client procedure.
        data: The clients' samples.
        kinds: Executors that the model's layers allow, the best first; "loop" may always be had.
        owned: What of the scenario is the user's, for messages.

    Raises:
        ScenarioError: If nothing can be trained, or not twice alike.
    """
    members = _who_is_tried(data)
    if set(kinds) == {"loop"}:
        members = members[:1]  # nothing to hold beside what they do in turn
    if not members:
        return Findings("loop", "no client has two samples on which to try the user's code")
    trial = _Trial(make, procedure, data, owned, members, _largest_batch(procedure, data))
    try:
        loop, beside, irregular = trial.in_turn()
    except ScenarioError:
        if not procedure.takes:
            raise
        # it may want what its strategy sends, which is not known before round 1
        trial = trial._replace(procedure=PlainDescent())
        loop, beside, irregular = trial.in_turn()
    trial.require_alike(loop, beside)
    notes = _notes([*loop.watch.moved], [*loop.watch.drawn])
    why = _why_in_turn([*loop.watch.moved], [*loop.watch.drawn], irregular)
    if why is None and not loop.small and set(kinds) != {"loop"}:
        why = "it can be tried on whole batches alone, in turn"
    elif why is None:
        reasons: list[str] = []
        for kind in kinds:
            why = None if kind == "loop" else trial.why_not_together(kind, loop.executor, beside)
            if why is None:
                return Findings(kind, "; ".join(reasons) or None, True, notes)
            reasons.append(why)
        why = reasons[-1] if reasons else None
    return Findings("loop", why, irregular is None, notes)


def _who_is_tried(data: Any) -> tuple[int, ...]:
    """The first two clients that have two samples or more."""
    ids = list(range(min(int(data.num_clients), _LOOKED_AT)))
    sizes = np.asarray(data.sizes(ids))
    return tuple(client for client in ids if sizes[client] >= 2)[:2]


def _largest_batch(procedure: ClientProcedure, data: Any) -> int:
    """The most samples that a step of training has, as far as clients are looked at."""
    ids = list(range(min(int(data.num_clients), _LOOKED_AT)))
    return min(procedure.work.largest_batch, int(np.max(data.sizes(ids))))


def _job(executor: CohortExecutor, members: Sequence[int], action: Action = "train") -> ChunkJob:
    layout, state = executor.layout, tensors_of(executor.model)
    named = {name: state[name].detach().cpu().clone() for name in layout.names}
    sent = Payload(layout.flatten(named), {spec.name: named[spec.name] for spec in layout.buffers})
    nobody = (False,) * len(members)
    return ChunkJob(action, 1, tuple(members), nobody, layout.fingerprint, sent, has_state=nobody)


def _why_in_turn(keeps: Sequence[str], draws: Sequence[str], irregular: str | None) -> str | None:
    if keeps:
        return f"{keeps[0]} changes while a client trains"
    if others := [name for name in draws if name != "torch"]:
        return f"training draws from {' and '.join(others)}"
    return irregular or ("training draws from torch's generator" if draws else None)


def _notes(keeps: Sequence[str], draws: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if keeps:
        notes.append(
            f"{', '.join(keeps[:3])}{', ...' if len(keeps) > 3 else ''} changes while a client "
            "trains and does not travel with the model: each client starts every round, and each "
            "evaluation, with it as it was made (a buffer would be averaged)"
        )
    if others := [name for name in draws if name != "torch"]:
        notes.append(
            f"the user's code draws from {' and '.join(others)}: seeded for each client and round"
        )
    return tuple(notes)
