"""The command line: what it prints where, its exit codes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import typer

from fedsim import cli
from fedsim.basics.errors import RunError, ScenarioError
from fedsim.runs import folder as run_folder
from fedsim.scenario import discovery
from fedsim.scenario.expectations import check_expectations
from fedsim.scenario.scenario import Scenario
from fedsim.strategy import flower as flower_strategies

ROOT = Path(__file__).resolve().parents[2]

VALID = """
rounds = 3
[data]
name = "digits"
[partition]
kind = "iid"
clients = 5
"""


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def fedsim(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command line, in this process."""

    def fedsim(*arguments: Any) -> Result:
        capfd.readouterr()
        command = typer.main.get_command(cli.app)
        with pytest.raises(SystemExit) as ended:
            command.main([str(argument) for argument in arguments], prog_name="fedsim")
        out, err = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, out, err)

    return fedsim


@pytest.fixture(autouse=True)
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty working folder, with a data cache of the tests' own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path_factory.getbasetemp() / "fedsim-cache"))
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (folder / "mine.toml").write_text(text, encoding="utf-8")
        return Path("mine.toml")

    return write


# Twelve wrong scenarios, and some more.

TABLES = '[data]\nname = "digits"\n[partition]\nkind = "iid"\nclients = 5\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(VALID + "[strateg]\n", "did you mean 'strategy'?", id="unknown table"),
        pytest.param(
            VALID + "[client]\nlocal_epoch = 2\n",
            "[client] 'local_epoch' is not a hyperparameter of local_sgd; did you mean "
            "'local_epochs'? allowed: ",
            id="unknown key",
        ),
        pytest.param(
            VALID + '[strategy]\nname = "fedavgg"\n',
            "[strategy] 'fedavgg' is not a strategy; did you mean 'fedavg'?",
            id="unknown strategy",
        ),
        pytest.param(
            VALID + '[task]\nmodel = "cn"\n',
            "'cn' is not a model; did you mean 'cnn'?",
            id="unknown model",
        ),
        pytest.param(
            VALID.replace("digits", "digit"),
            "[data] 'digit' is not a data set; did you mean 'digits'?",
            id="unknown data set",
        ),
        pytest.param(
            VALID.replace("iid", "dirchlet"),
            "[partition] 'dirchlet' is not a partition; did you mean 'dirichlet'?",
            id="unknown partition",
        ),
        pytest.param(
            VALID + '[participation]\nkind = "unifrom"\n',
            "[participation] 'unifrom' is not a participation rule; did you mean 'uniform'?",
            id="unknown participation",
        ),
        pytest.param(
            VALID + '[client]\nlocal_lr = "0.1"\n',
            '[client] local_lr = "0.1": must be a number',
            id="wrong type",
        ),
        pytest.param(
            VALID + "[client]\nlocal_lr = -0.1\n",
            "[client] local_lr = -0.1: must be >= 0",
            id="negative number",
        ),
        pytest.param(
            VALID + '[client]\noptimizer = "sdg"\n', "did you mean 'sgd'?", id="unknown optimiser"
        ),
        pytest.param(
            VALID + '[participation]\nkind = "uniform"\ncohort_size = 6\n',
            "cohort_size = 6: more than all clients, use at most 5",
            id="cohort larger than the federation",
        ),
        pytest.param(
            VALID.replace("iid", "dirichlet") + "alpha = 0\n",
            "[partition] alpha = 0.0: must be finite and > 0",
            id="impossible alpha",
        ),
        pytest.param(
            VALID.replace("[data]", "[data"),
            "invalid TOML: expected ']' at the end of a table declaration (at line 3, column 6)",
            id="invalid TOML",
        ),
        pytest.param(
            VALID + '[expect]\n"test/accuracy" = { last = 5 }\n',
            "[expect] \"test/accuracy\" needs a 'min', a 'max' or both",
            id="claim without a bound",
        ),
        pytest.param(
            VALID + "[expect]\naccuracy = { min = 0.9 }\n",
            "[expect] 'accuracy' is not a metric that a run records",
            id="claim on what is never recorded",
        ),
        pytest.param(
            VALID + "[engine]\nchunk_size = 1\n",
            "[engine] chunk_size = 1: must be at least 2",
            id="chunk of one",
        ),
        pytest.param(
            VALID.replace('name = "digits"', 'name = "mnist"\npath = "nowhere"'),
            "nowhere",
            id="missing data folder",
        ),
        pytest.param(VALID.replace("rounds = 3", "rounds = 0"), "rounds = 0", id="no rounds"),
    ],
)
def test_wrong_scenario_is_refused_before_round_1(
    fedsim: Any, write: Any, folder: Path, text: str, expected: str, no_start: None
) -> None:
    ended = fedsim("run", write(text))
    assert ended.code == 2
    assert expected in ended.err
    assert ended.err.startswith("fedsim: mine.toml: ")
    assert len(ended.err.splitlines()) == 1
    assert ended.out == ""
    assert [entry.name for entry in folder.iterdir()] == ["mine.toml"]


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run module that must not be reached."""
    module = types.ModuleType("fedsim.runs.start")
    monkeypatch.setitem(sys.modules, "fedsim.runs.start", module)


def test_doctor_refuses_what_it_cannot_look_at(fedsim: Any) -> None:
    ended = fedsim("doctor", "--timeout", "0")
    assert (ended.code, ended.err) == (2, "fedsim: --timeout 0: must be > 0 and finite\n")
    ended = fedsim("doctor", "--set", "rounds=3")
    assert (ended.code, ended.err) == (2, "fedsim: --set rounds=3: needs a SCENARIO to change\n")


@pytest.mark.parametrize("command", ["run", "partition"])
def test_missing_scenario_file_is_refused(fedsim: Any, command: str) -> None:
    ended = fedsim(command, "quickstrt.toml")
    assert ended.code == 2
    assert "there is no such scenario file; did you mean 'quickstart'?" in ended.err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine.kind", "--set engine.kind: must be table.key=value"),
        ("engine.knd=ray", "[engine] 'knd' is not a key of [engine]; did you mean 'kind'?"),
        ("rounds=three", 'rounds = "three": must be an integer'),
    ],
)
def test_bad_override_is_refused(fedsim: Any, write: Any, override: str, expected: str) -> None:
    ended = fedsim("run", write(VALID), "--set", override)
    assert ended.code == 2
    assert expected in ended.err


def test_partition_that_the_data_cannot_give_is_refused_with_the_file(
    fedsim: Any, write: Any
) -> None:
    path = write(VALID.replace("iid", "dirichlet") + "min_size = 1000\n")
    ended = fedsim("partition", path)
    assert ended.code == 2
    assert ended.err.startswith("fedsim: mine.toml: [partition] min_size = 1000: ")
    assert "287" in ended.err  # 1,438 training samples among five clients


def test_several_problems_are_several_lines(fedsim: Any, write: Any) -> None:
    ended = fedsim("run", write("rounds = 0\n[engin]\n" + TABLES))
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 2


def test_refusal_is_one_json_document_when_json_is_asked_for(fedsim: Any, write: Any) -> None:
    ended = fedsim("run", write("rounds = 0\n" + TABLES), "--json")
    assert ended.code == 2
    assert ended.document["exit_code"] == 2
    assert "rounds = 0" in ended.document["error"]
    assert "rounds = 0" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [["rnu"], ["run"], ["run", "x", "--worker", "1"], ["run", "x", "--workers", "many"], []],
)
def test_wrong_usage_exits_with_2(fedsim: Any, arguments: list[str]) -> None:
    ended = fedsim(*arguments)
    assert ended.code == 2
    assert "Usage: fedsim" in ended.err + ended.out


def test_zero_workers_are_refused(fedsim: Any, write: Any) -> None:
    ended = fedsim("run", write(VALID), "--workers", "0")
    assert ended.code == 2
    assert "--workers 0: must be >= 1" in ended.err


# Help.


def command_line(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


def test_help_teaches() -> None:
    ended = command_line("--help")
    assert ended.returncode == 0
    for word in ("fedsim run quickstart", "resume", "list", "partition", "Exit codes: 0 done"):
        assert word in ended.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["list"], ["list", "scenarios"]]
)
def test_what_should_come_at_once_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'ray', 'flwr', 'datasets', 'sklearn', 'matplotlib', 'pandas', 'scipy'}\n"
        "atexit.register(lambda: print('imported:', sorted(heavy & sys.modules.keys())))\n"
        "from fedsim.cli import main\n"
        "main()"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("imported: []\n")


def test_names_read_from_the_source_are_those_of_the_registries() -> None:
    for kind in discovery.KINDS:
        if kind not in ("strategies", "clients", "parts", "scenarios"):
            assert discovery.names(kind) == list(discovery._registry(kind))
    assert flower_strategies.names() == sorted(
        f"flower:{name}" for name in flower_strategies._classes() if not name.startswith("FedXgb")
    )


@pytest.mark.parametrize("command", ["run", "resume", "plan", "list", "partition"])
def test_help_of_every_command_has_examples(fedsim: Any, command: str) -> None:
    ended = fedsim(command, "--help")
    assert ended.code == 0
    assert ended.out.count(f"fedsim {command} ") >= 2
    assert "Examples:" in ended.out
    assert "\\[" not in ended.out


def test_version_is_told(fedsim: Any) -> None:
    assert fedsim("--version").out == "fedsim 0.1.0\n"


# Listing.


def test_list_names_everything(fedsim: Any) -> None:
    ended = fedsim("list", "--json")
    assert ended.code == 0
    document = ended.document
    assert list(document) == list(discovery.KINDS)
    assert {"fedavg", "flower:FedAdam", "flower:Krum"} <= set(document["strategies"])
    assert "local_sgd" in document["clients"]
    assert {"digits", "mnist", "synthetic"} <= set(document["datasets"])
    assert {"iid", "dirichlet", "natural"} <= set(document["partitions"])
    assert {"full", "uniform", "bernoulli"} <= set(document["participation"])
    assert {"logistic", "mlp", "cnn"} <= set(document["models"])
    assert "quickstart" in document["scenarios"]
    plain = fedsim("list")
    assert all(name in plain.out for names in document.values() for name in names)


def test_list_of_a_kind_shows_keys_defaults_and_descriptions(fedsim: Any) -> None:
    entries = {e["name"]: e for e in fedsim("list", "partitions", "--json").document["partitions"]}
    assert entries["dirichlet"]["keys"]["alpha"]["default"] == 0.5
    assert entries["dirichlet"]["keys"]["alpha"]["type"] == "float"
    assert "Dirichlet" in entries["dirichlet"]["description"]
    assert "alpha = 0.5" in fedsim("list", "partitions").out


def test_list_of_a_name_explains_its_keys(fedsim: Any) -> None:
    ended = fedsim("list", "clients", "local_sgd")
    assert ended.code == 0
    assert "local_lr = 0.1   (float)" in ended.out
    assert "Heavy-ball momentum" in ended.out
    assert fedsim("list", "strategies", "flower:FedAdam").out.count("beta_1") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["strategy"], "did you mean 'strategies'?"),
        (["strategies", "fedavgg"], "did you mean 'fedavg'?"),
        (["datasets", "mnst"], "did you mean 'mnist'?"),
        (["scenarios", "quick"], "did you mean 'quickstart'?"),
    ],
)
def test_list_of_an_unknown_name_is_refused(
    fedsim: Any, arguments: list[str], expected: str
) -> None:
    ended = fedsim("list", *arguments)
    assert ended.code == 2
    assert expected in ended.err


# Partition.


def test_partition_is_counted_and_drawn(fedsim: Any, write: Any, folder: Path) -> None:
    path = write(VALID)
    document = fedsim("partition", path, "--png", "who.png", "--json").document
    assert document["clients"] == 5
    assert document["samples"] + document["held_out"] == 1797
    assert sum(row["samples"] for row in document["labels"]) == document["samples"]
    assert (folder / "who.png").read_bytes().startswith(b"\x89PNG")
    plain = fedsim("partition", path)
    assert f"{document['samples']} in training, {document['held_out']} held out" in plain.out
    assert document["manifest_sha256"] in plain.out


def test_picture_that_cannot_be_written_is_refused(fedsim: Any, write: Any) -> None:
    ended = fedsim("partition", write(VALID), "--png", "nowhere/who.png")
    assert ended.code == 2
    assert "--png nowhere/who.png: cannot be drawn: the folder nowhere does not" in ended.err


# Running and resuming. What runs is not the subject here, so a stand-in records the calls.


class Runs:
    """A stand-in for `fedsim.runs.start`."""

    class RunResult(NamedTuple):
        """What a run gives back."""

        folder: Path
        summary: dict[str, Any]

    def __init__(self) -> None:
        self.accuracy = 0.95
        self.calls: list[Any] = []
        self.during: Callable[[], None] = lambda: None

    def start(
        self,
        scenario: Scenario,
        *,
        out: Path | None,
        workers: int | None,
        progress: Any,
        profile: Any,
    ) -> RunResult:
        assert profile is None  # unless it is asked for
        self.calls.append((scenario, out, workers))
        folder = run_folder.create(out, scenario)
        with folder.recording():
            progress.start(1)
            print("a library prints")
            os.write(1, b"so does a worker\n")
            self.during()
            metrics = {"train/loss": 0.5, "test/accuracy": self.accuracy}
            progress.update(1, metrics, done=5, failed=0, absent=0)
        return self.RunResult(folder.path, self.summary(scenario))

    def resume(
        self, run: Path, *, workers: int | None, overrides: list[str], progress: Any
    ) -> RunResult:
        self.calls.append((run, workers, overrides))
        return self.RunResult(run, self.summary(run_folder.open_existing(run).scenario()))

    def summary(self, scenario: Scenario) -> dict[str, Any]:
        final = {"test/accuracy": self.accuracy, "test/loss": float("nan")}
        return {
            "rounds": 1,
            "final": final,
            "params_sha256": "ab" * 32,
            "participation_sha256": "cd" * 32,
            "wall_time_s": 1.5,
            "expect": check_expectations(scenario.expect, [final]),
        }


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    runs = Runs()
    module = types.ModuleType("fedsim.runs.start")
    module.start, module.resume = runs.start, runs.resume  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedsim.runs.start", module)
    return runs


CLAIM = VALID + '[expect]\n"test/accuracy" = { min = 0.9, last = 5 }\n'


def test_run_prints_folder_metrics_hash_and_verdicts(fedsim: Any, write: Any, runs: Runs) -> None:
    ended = fedsim("run", write(CLAIM), "--out", "first", "--workers", 2)
    assert ended.code == 0
    scenario, out, workers = runs.calls[0]
    assert (scenario.rounds, out, workers) == (3, Path("first"), 2)
    for word in ("first", "test/accuracy", "0.95", "ab" * 32, "holds"):
        assert word in ended.out
    assert "round 1/3" in ended.err


def test_json_result_is_alone_on_standard_output(fedsim: Any, write: Any, runs: Runs) -> None:
    ended = fedsim("run", write(CLAIM), "--json", "--out", "first")
    assert ended.code == 0
    assert ended.document["params_sha256"] == "ab" * 32
    assert ended.document["folder"] == "first"
    assert ended.document["exit_code"] == 0
    assert ended.document["final"]["test/loss"] == "nan"
    assert "a library prints" in ended.err
    assert "so does a worker" in ended.err


def test_broken_claim_exits_with_3_and_a_table(fedsim: Any, write: Any, runs: Runs) -> None:
    runs.accuracy = 0.85
    ended = fedsim("run", write(CLAIM))
    assert ended.code == 3
    header, row = ended.out.splitlines()[-2:]
    assert header.split() == ["claim", "measured", "verdict"]
    assert row.split("   ")[0] == "test/accuracy mean of the last 5 >= 0.9"
    assert row.split()[-2:] == ["0.85", "BROKEN"]
    assert fedsim("run", write(CLAIM), "--json").document["exit_code"] == 3


def test_quiet_run_shows_no_progress(fedsim: Any, write: Any, runs: Runs) -> None:
    ended = fedsim("run", write(VALID), "--quiet")
    assert ended.code == 0
    assert ended.err == ""


def test_failed_run_is_one_line_and_names_log_and_resume_command(
    fedsim: Any, write: Any, runs: Runs, folder: Path
) -> None:
    def fail() -> None:
        raise RunError("round 2: client 3 sent nan")

    runs.during = fail
    ended = fedsim("run", write(VALID), "--out", "my run", "--quiet")
    assert ended.code == 1
    assert ended.err.splitlines()[0] == "fedsim: round 2: client 3 sent nan"
    assert "my run/log.txt" in ended.err
    assert f"`fedsim resume '{folder / 'my run'}'`" in ended.err
    assert "Traceback" not in ended.err
    assert "Traceback" in (folder / "my run" / "log.txt").read_text()


def test_crash_is_one_line_with_the_traceback_in_the_log(
    fedsim: Any, write: Any, runs: Runs, folder: Path
) -> None:
    runs.during = lambda: [][1]
    ended = fedsim("run", write(VALID), "--out", "first", "--quiet", "--json")
    assert ended.code == 1
    assert "fedsim: IndexError: list index out of range" in ended.err.splitlines()
    assert "Traceback" not in ended.err
    assert "IndexError" in (folder / "first" / "log.txt").read_text()
    assert ended.document["folder"] == "first"
    assert ended.document["exit_code"] == 1


def test_crash_before_there_is_a_run_folder_keeps_its_traceback_too(
    fedsim: Any, write: Any, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setitem(sys.modules, "fedsim.runs.start", None)
    ended = fedsim("run", write(VALID), "--quiet")
    assert ended.code == 1
    first, second = ended.err.splitlines()
    assert first.startswith("fedsim: ModuleNotFoundError: ")
    log = Path(second.removeprefix("fedsim: the traceback is in "))
    assert log.parent == folder
    assert "Traceback" in log.read_text()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Take interrupts as Python does, also where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_interrupted_run_exits_with_130_and_the_resume_command(
    fedsim: Any, write: Any, runs: Runs
) -> None:
    runs.during = lambda: signal.raise_signal(signal.SIGINT)
    ended = fedsim("run", write(VALID), "--out", "first", "--quiet")
    assert ended.code == 130
    assert ended.err.splitlines() == [
        "fedsim: interrupted",
        f"fedsim: `fedsim resume {Path('first').absolute()}` goes on from the last checkpoint",
    ]


def test_refusal_inside_a_run_exits_with_2_and_names_the_file(
    fedsim: Any, write: Any, runs: Runs
) -> None:
    def refuse() -> None:
        raise ScenarioError("[task] hidden = [0]: each width must be >= 1")

    runs.during = refuse
    ended = fedsim("run", write(VALID), "--quiet")
    assert ended.code == 2
    assert ended.err == "fedsim: mine.toml: [task] hidden = [0]: each width must be >= 1\n"


def test_run_folder_in_use_is_refused(fedsim: Any, write: Any, runs: Runs) -> None:
    assert fedsim("run", write(VALID), "--out", "first").code == 0
    again = fedsim("run", write(VALID), "--out", "first")
    assert again.code == 2
    assert f"`fedsim resume {Path('first').absolute()}` goes on with it" in again.err


def test_resume_passes_what_was_asked_on(fedsim: Any, write: Any, runs: Runs) -> None:
    fedsim("run", write(CLAIM), "--out", "first")
    arguments = ["first", "--workers", 1, "--set", "engine.kind=inline", "--json"]
    ended = fedsim("resume", *arguments)
    assert ended.code == 0
    assert runs.calls[-1] == (Path("first"), 1, ["engine.kind=inline"])
    assert ended.document["folder"] == "first"


def test_resume_refuses_what_is_no_run_or_no_scenario_value(
    fedsim: Any, write: Any, runs: Runs
) -> None:
    fedsim("run", write(VALID), "--out", "first")
    assert "no such run folder; did you mean 'first'?" in fedsim("resume", "frist").err
    ended = fedsim("resume", "first", "--set", "engine.kind=rai")
    assert ended.code == 2
    assert "first/scenario.json: [engine] kind" in ended.err


def test_console_script_finds_modules_of_the_working_folder(folder: Path) -> None:
    (folder / "my_models.py").write_text(
        "from torch import nn\n"
        "def tiny(*, feature_shape, num_classes, width: int = 3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    ended = command_line("list", "models", "my_models:tiny", "--json", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    (entry,) = json.loads(ended.stdout)["models"]
    assert list(entry["keys"]) == ["width"]


def test_every_command_is_documented_for_both_output_forms() -> None:
    command = typer.main.get_command(cli.app)
    assert isinstance(command, click.Group)
    assert set(command.commands) == {
        "run", "resume", "plan", "compare", "tune", "check", "golden", "list", "partition",
        "doctor", "new", "evidence", "export", "metrics",
    }  # fmt: skip
    for name, each in command.commands.items():
        assert "--json" in {option for p in each.params for option in p.opts}, name
