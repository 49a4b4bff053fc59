"""What pages of all kinds of studies are written with: tables, figures, stamps."""

from collections.abc import Sequence

from fedsim.studies.comparison.intervals import Mean

_SHOWN = 16  # digits of a study's hash


def stamp_of(name: str, sha256: str) -> str:
    """Return the line that names the study's file behind a section of a page."""
    return f"<!-- {name} {sha256[:_SHOWN]} -->"


def scale_of(metric: str) -> float:
    """Return 100 for shares, which pages show in per cent, and 1 for all else.

    Example:
        >>> scale_of("local/accuracy_mean"), scale_of("robust/accuracy@0.1"), scale_of("test/loss")
        (100.0, 100.0, 1.0)
    """
    return 100.0 if metric.partition("@")[0].removesuffix("_mean").endswith("accuracy") else 1.0


def bracketed(mean: Mean, scale: float, sign: str) -> str:
    """Return a mean with its interval in brackets.

    Args:
        mean: The mean.
        scale: What it is multiplied by: 100 shows per cent.
        sign: "+" shows the signs of positive numbers.

    Example:
        >>> bracketed(Mean(10, 0.5, 0.4, 0.6), 100, "+")
        '+50.00 [+40.00, +60.00]'
    """
    places = 2 if scale == 100 else 4
    low, middle, high = (
        f"{scale * value:{sign}.{places}f}" for value in (mean.low, mean.mean, mean.high)
    )
    return f"{middle} [{low}, {high}]"


def code(settings: Sequence[str]) -> str:
    """Return assignments as code."""
    return " ".join(f"`{each}`" for each in settings)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    body = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in body]
