"""What the promises about bits cost: `python -m benchmarks.bits [LOG]`.

Reads the log of a run such as

    python -m benchmarks.run --only W1,W2,W3 --systems fedsim-inline,bits --no-check --log LOG

and prints, per workload, the paired ratio of a round's time and its 95 % interval: pinned beside
unpinned, and portable beside fast.
"""

import sys
from pathlib import Path

from benchmarks.report import Log
from benchmarks.statistics import paired_ratio

PAIRS = {
    "pinned / unpinned": ("fedsim-inline", "fedsim-unpinned"),
    "portable / fast": ("fedsim-portable", "fedsim-inline"),
}


def main() -> None:
    """Print the ratios."""
    log = Log(Path(sys.argv[1] if len(sys.argv) > 1 else "bits.jsonl"))
    for workload in sorted({workload for workload, _ in log.turns}):
        for title, (one, other) in PAIRS.items():
            slow, fast = log.seconds(workload, one), log.seconds(workload, other)
            both = sorted(slow.keys() & fast.keys())
            median, low, high = paired_ratio([slow[r] for r in both], [fast[r] for r in both])
            print(
                f"{workload}  {title:18} {median:.3f} ({low:.3f} to {high:.3f}), {len(both)} pairs"
            )


if __name__ == "__main__":
    main()
