"""Live progress, read from the captured screen."""

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from fedsim.runs import progress as module
from fedsim.runs.progress import Progress


class Clock:
    """The seconds that a run thinks have gone by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def screen(terminal: bool) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=80,
        color_system=None,
        legacy_windows=False,
    )


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def play(progress: Progress, clock: Clock, rounds: Iterator[int] | range, seconds: float) -> None:
    for server_round in rounds:
        clock.now += seconds
        metrics = {"train/loss": 1 / (server_round + 1)}
        if server_round % 2 == 0:
            metrics["test/accuracy"] = server_round / 10
        progress.update(server_round, metrics, done=9, failed=1, absent=2)


def test_plain_lines_tell_round_time_left_clients_loss_and_accuracy(clock: Clock) -> None:
    console = screen(terminal=False)
    with Progress(10, console=console) as progress:
        progress.start(1)
        play(progress, clock, range(1, 5), seconds=2)
    lines = text(console).splitlines()
    assert len(lines) == 4
    words = " ".join(lines[0].split())
    assert words == "round 1/10 ETA 0:18 9 done, 1 failed, 2 absent loss 0.5000"
    # Accuracy was last measured in round 2; it stands until the next evaluation.
    assert lines[2].split()[-4:] == ["loss", "0.2500", "accuracy", "0.2000"]
    assert "ETA 0:12" in lines[3]
    assert "\x1b" not in text(console)


def test_fast_rounds_are_thinned_out_but_the_last_one_is_shown(clock: Clock) -> None:
    console = screen(terminal=False)
    with Progress(100, console=console) as progress:
        progress.start(1)
        play(progress, clock, range(1, 101), seconds=0.1)
    shown = [int(found) for found in re.findall(r"round +(\d+)/100", text(console))]
    assert shown[0] == 1
    assert shown[-1] == 100
    assert 18 <= len(shown) <= 22
    assert "took 0:10" in text(console).splitlines()[-1]


def test_run_that_stops_early_still_shows_its_last_round(clock: Clock) -> None:
    console = screen(terminal=False)
    progress = Progress(100, console=console)
    progress.start(1)
    play(progress, clock, range(1, 8), seconds=0.01)
    progress.stop()
    progress.stop()
    assert re.findall(r"round +(\d+)/100", text(console)) == ["1", "7"]


def test_slow_first_round_does_not_spoil_the_estimate(clock: Clock) -> None:
    console = screen(terminal=False)
    with Progress(40, console=console) as progress:
        progress.start(1)
        play(progress, clock, range(1, 2), seconds=60)
        play(progress, clock, range(2, 11), seconds=1)
    lines = text(console).splitlines()
    assert "ETA 39:00" in lines[0]
    assert "ETA 0:30" in lines[-1]


def test_resumed_run_estimates_from_its_own_rounds(clock: Clock) -> None:
    console = screen(terminal=False)
    with Progress(40, console=console) as progress:
        progress.start(31)
        play(progress, clock, range(31, 33), seconds=3)
    assert "ETA 0:24" in text(console).splitlines()[-1]


def test_quiet_progress_writes_nothing(clock: Clock) -> None:
    for terminal in (True, False):
        console = screen(terminal)
        with Progress(3, console=console, quiet=True) as progress:
            progress.start(1)
            play(progress, clock, range(1, 4), seconds=1)
            progress.note("client 3 failed")
        assert text(console) == ""


def test_notes_are_shown_as_they_are(clock: Clock) -> None:
    console = screen(terminal=False)
    with Progress(3, console=console) as progress:
        progress.note("round 2: client 17: [expect] is no markup, " + "long " * 30)
    assert text(console).splitlines() == [
        "round 2: client 17: [expect] is no markup, " + "long " * 30
    ]


def test_metrics_that_are_not_finite_are_shown(clock: Clock) -> None:
    console = screen(terminal=False)
    with Progress(3, console=console) as progress:
        progress.start(1)
        progress.update(1, {"train/loss": float("nan")}, done=1, failed=0, absent=0)
    assert "loss nan" in text(console)


def final_screen(output: str) -> list[str]:
    """What a terminal shows in the end: replay line ends, erased lines and upward moves."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[\??\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token == "\x1b[1A":
            row -= 1
        elif not token.startswith(("\x1b", "\r")):
            lines[row] += token
    return lines


def test_terminal_ends_with_two_lines_and_notes_above_them(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = screen(terminal=True)
    with Progress(4, console=console) as progress:
        progress.start(1)
        play(progress, clock, range(1, 3), seconds=1)
        progress.note("client 17 failed")
        play(progress, clock, range(3, 5), seconds=1)
    note, bar, facts, *rest = final_screen(text(console))
    assert note == "client 17 failed"
    assert re.fullmatch(r"round 4/4 ━{30} took 0:04 *", bar)
    assert facts.strip() == "9 done, 1 failed, 2 absent  loss 0.2000  accuracy 0.4000"
    assert not "".join(rest).strip()


def test_terminal_fits_eighty_columns(clock: Clock) -> None:
    console = screen(terminal=True)
    with Progress(10_000, console=console) as progress:
        progress.start(1)
        clock.now += 1000
        metrics = {"train/loss": 123.4567, "test/accuracy": 0.9876}
        progress.update(1234, metrics, done=100_000, failed=10_000, absent=10_000)
    _, *lines = final_screen(text(console))
    bar, facts = final_screen(text(console))[:2]
    assert "ETA" in bar
    assert "accuracy 0.9876" in facts
    assert all(len(line.rstrip()) <= 80 for line in lines)


def test_terminal_is_given_back_when_the_run_fails(clock: Clock) -> None:
    console = screen(terminal=True)
    progress = Progress(3, console=console)
    progress.start(1)
    assert text(console).count("\x1b[?25h") == 0  # the cursor is hidden meanwhile
    with pytest.raises(RuntimeError, match="boom"), progress:
        raise RuntimeError("boom")
    assert text(console).count("\x1b[?25l") == text(console).count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("seconds", "clock_face"),
    [(0, "0:00"), (59.6, "1:00"), (3599.5, "1:00:00"), (90061, "25:01:01")],
)
def test_durations_read_like_a_clock(seconds: float, clock_face: str) -> None:
    assert module.duration(seconds) == clock_face


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(1) as progress:
        progress.start(1)
        progress.update(1, {}, done=1, failed=0, absent=0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("round 1/1")
