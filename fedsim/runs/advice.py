"""What would make a run faster: rules of thumb on the numbers of a profile.

A rule is given a profile's report and returns (its gain, as a share of the time; what helps), or
None where it has nothing to say.
"""

import math
from collections.abc import Mapping
from typing import Any

from fedsim.basics.text import in_seconds

Advice = tuple[float, str]


def advice(report: Mapping[str, Any]) -> list[str]:
    """Say what would help, the largest gain first.

    Args:
        report: A profile's report.
    """
    rules = [_evaluation, _writing, _aggregation]
    if report["plan"] is not None and report["chunks_per_round"] is not None:
        rules += [_sharing_out, _handing_out, _loop, _padding]
    rules += [_start]
    found = [said for rule in rules if (said := rule(report)) is not None]
    if not found:
        return [f"nothing stands out: {_share(report, 'computing'):.0%} of a round is computing"]
    return [text for _, text in sorted(found, key=lambda each: -each[0])]


def _share(report: Mapping[str, Any], phase: str) -> float:
    return float(report["phases"][phase]["share"])


def _evaluation(report: Mapping[str, Any]) -> Advice | None:
    share = _share(report, "evaluation")
    if not 0.2 < share < 1:
        return None
    every = math.ceil(9 * share / (1 - share))
    return share, (
        f"evaluation takes {share:.0%}: [evaluation] every = {max(2, every)} takes most of that "
        "away (or fewer [evaluation] clients)"
    )


def _writing(report: Mapping[str, Any]) -> Advice | None:
    share = _share(report, "writing")
    if share <= 0.15:
        return None
    return share, f"metrics and checkpoints take {share:.0%}: a larger [checkpoint] every"


def _aggregation(report: Mapping[str, Any]) -> Advice | None:
    share = _share(report, "aggregation")
    if share <= 0.25:
        return None
    return share, (
        f"aggregation takes {share:.0%}, on the server alone: fewer clients per round, or a "
        "strategy that is a weighted sum"
    )


def _sharing_out(report: Mapping[str, Any]) -> Advice | None:
    """Workers without a chunk, or that wait for one with more to do."""
    workers, chunks = report["workers"], report["chunks_per_round"]
    if chunks >= workers:
        share = _share(report, "waiting")
        if share <= 0.15:
            return None
        return share, (
            f"workers wait {share:.0%} for the slowest: a smaller [engine] chunk_size than "
            f"{report['plan']['chunk_size']} shares work out more evenly"
        )
    idle = _share(report, "training") * (1 - chunks / workers)
    if idle <= 0:
        return None
    smaller = max(2, math.ceil(report["clients_per_round"] / workers))
    made = f"{chunks:g} chunk{'s' * (chunks != 1)} per round for {workers} workers"
    helps = (
        f"[engine] chunk_size = {smaller} lets more of them work"
        if smaller * chunks < report["clients_per_round"]
        else "there are too few clients per round for more; use fewer --workers"
    )
    return idle, f"{made}: {helps}"


def _handing_out(report: Mapping[str, Any]) -> Advice | None:
    share = _share(report, "transfer")
    if share <= 0.25:
        return None
    helps = (
        'a larger [engine] chunk_size, fewer --workers, or kind = "inline"'
        if report["workers"] > 1 or report["chunks_per_round"] > 1
        else "a larger cohort costs little more"
    )
    return share, f"handing work out takes {share:.0%}: there is little to do per chunk; {helps}"


def _loop(report: Mapping[str, Any]) -> Advice | None:
    plan, share = report["plan"], _share(report, "computing")
    if plan["executor"] != "loop" or plan["reason"] == "asked for" or share <= 0.2:
        return None
    text = f"clients train one after another: {plan['reason']}"
    return share, f"{text}; another model would train together"


def _padding(report: Mapping[str, Any]) -> Advice | None:
    """Of vmap alone, which trains all of a chunk as long as its longest client."""
    padding, computing = report["padding_share"], _share(report, "computing")
    gain = padding * computing
    if report["plan"]["executor"] != "vmap" or gain <= 0.2 * computing:
        return None
    return gain, (
        f"{padding:.0%} of the samples computed are padding, for clients of a chunk differ in "
        "size: a smaller [engine] chunk_size, or another executor; `fedsim plan` measures them"
    )


def _start(report: Mapping[str, Any]) -> Advice | None:
    begins = sum(report["starting_s"].values()) + (report["first_round_s"] or 0.0)
    running = report["rounds_s"]
    if not report["starts_workers"] or begins <= running:
        return None
    text = f"the start takes {in_seconds(begins)}, all other rounds {in_seconds(running)}"
    return 0.0, f'{text}: for so short a run [engine] kind = "inline" is sooner done'
