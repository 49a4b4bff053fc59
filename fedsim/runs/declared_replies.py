"""What clients' replies hold besides the model, as procedure and task have it.

A client of the server's own answers the same instructions on a few samples, and nodes are held to
what it returns: were it put to the vote, one of two nodes could have the other refused.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedsim.client.procedure import Work
from fedsim.client.watched import FewSamples
from fedsim.engine.inline import InlineGrid
from fedsim.messages.adapting import stacked
from fedsim.messages.cohort import Cohort
from fedsim.messages.parsing import ReplyForm
from fedsim.messages.replies import Replies
from fedsim.runs.client_side import make_app
from fedsim.runs.world import World

_SAMPLES, _LOOKED_AT = 4, 256


def declared_replies(world: World) -> Callable[[Cohort], ReplyForm | None]:
    """Return what says what the replies to some instructions hold besides the model.

    It trains a client of its own, for a step, the first time that instructions of a kind are
    given; it says None where no client has samples, or where such a client fails.
    """
    known: dict[tuple[object, ...], ReplyForm | None] = {}
    data = world.data.to_try
    looked_at = list(range(min(data.num_clients, _LOOKED_AT)))
    holding = np.flatnonzero(np.asarray(data.sizes(looked_at)) >= 2)[:1].tolist()
    plan = replace(world.plan, executor="loop")
    few = FewSamples(data, dict.fromkeys(holding, _SAMPLES))
    app = make_app(world.scenario, few, plan) if holding else None  # type: ignore[arg-type]

    def declares(cohort: Cohort) -> ReplyForm | None:
        kind = _kind(cohort)
        if kind not in known:
            known[kind] = None
            if app is not None:
                app.executor.inputs.shortened = _one_step
                grid = InlineGrid(app, data.num_clients)
                replies = grid.send_and_receive(_to(holding[0], cohort))
                known[kind] = _declared(stacked(replies))
        return known[kind]

    return declares


def _one_step(work: Work) -> Work:
    return work._replace(epochs=None, steps=1)


def _kind(cohort: Cohort) -> tuple[object, ...]:
    """What decides what replies hold: the instructions' type, arrays, and names of settings."""
    extra = {*cohort.shared.extra, *cohort.personal.extra}
    return cohort.message_type, tuple(sorted(extra)), tuple(sorted(cohort.config))


def _to(client: int, cohort: Cohort) -> Cohort:
    """The instructions of the cohort's first client, for another one."""
    return cohort.altered(
        client_ids=np.array([client]),
        personal=cohort.personal.rows([0]),
        own=None if cohort.own is None else cohort.own[:1],
        absent=None,
        work=None,
        node_ids=None,
    )


def _declared(replies: Replies | None) -> ReplyForm | None:
    """What the reply holds; None without any."""
    if replies is None or not replies.num_clients:
        return None
    named = {**replies.extra, **replies.encoded}
    arrays = sorted((n, tuple(stack.shape[1:]), str(stack.dtype)) for n, stack in named.items())
    return ReplyForm(tuple(arrays), tuple(sorted(replies.metrics)))
