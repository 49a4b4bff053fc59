"""The scenario file, factories as schemas, and discovery by name."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
import strategies
from fedsim.basics.errors import ScenarioError
from fedsim.scenario import discovery, signatures
from fedsim.scenario.choice import Choice
from fedsim.scenario.expectations import Expectation, check_expectations
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from fedsim.tasks.options import TaskOptions
from tests.basics.processes import QUICKLY

ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """
[data]
name = "digits"
[partition]
kind = "iid"
clients = 5
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(path, overrides)
    return str(caught.value)


# Loading.


def test_minimal_scenario_is_completed_with_every_default(write: Any) -> None:
    scenario = load(write(MINIMAL))
    assert (scenario.seed, scenario.rounds, scenario.tier) == (0, 10, "fast")
    assert scenario.task == {"kind": "auto", "model": "logistic", "dtype": "float32"}
    assert scenario.data == {"name": "digits", "test_fraction": 0.2}
    assert scenario.partition == {
        "kind": "iid", "clients": 5, "parts": None, "label_noise": 0.0, "test_fraction": 0.0,
        "rotation": 0.0, "feature_noise": 0.0, "feature_shift": 0.0, "feature_scale": 0.0,
        "centralised": False,
    }  # fmt: skip
    assert scenario.participation == {"kind": "full"}
    assert scenario.strategy["name"] == "fedavg"
    assert scenario.strategy["server_lr"] == 1.0
    assert scenario.client["name"] == "local_sgd"
    assert scenario.client["local_epochs"] == 1
    assert (scenario.engine.kind, scenario.engine.workers) == ("ray", None)
    assert scenario.evaluation.stop is None
    assert (scenario.checkpoint.every, scenario.checkpoint.keep) == (10, 2)
    assert scenario.output.tensorboard is False
    assert scenario.expect == {}
    assert scenario.stem == "mine"


def test_integers_become_floats_so_that_both_spellings_are_the_same_scenario(write: Any) -> None:
    integer = load(write(MINIMAL + "[client]\nlocal_lr = 1\n"))
    real = load(write(MINIMAL + "[client]\nlocal_lr = 1.0\n"))
    assert type(integer.client["local_lr"]) is float
    assert integer == real
    assert integer.sha256 == real.sha256


def test_scenario_is_found_by_name_among_those_that_come_with_fedsim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("quickstart").stem == "quickstart"
    assert load("quickstart.toml") == load("quickstart.toml")


def test_file_in_the_working_folder_wins_over_a_scenario_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.toml").write_text(MINIMAL + '[task]\nmodel = "cnn"\n')
    assert load("quickstart.toml").task["model"] == "cnn"


@pytest.mark.parametrize("name", sorted(discovery.shipped_scenarios()))
def test_every_shipped_scenario_is_valid(name: str) -> None:
    assert load(name).title


def test_quickstart_is_the_job_that_the_readme_promises() -> None:
    scenario = load("quickstart")
    assert scenario.rounds <= 40
    assert scenario.data == {"name": "digits", "test_fraction": 0.2}
    assert scenario.partition["clients"] == 50
    assert (scenario.partition["kind"], scenario.partition["alpha"]) == ("dirichlet", 0.3)
    assert scenario.participation == {"kind": "uniform", "cohort_size": 10}
    assert scenario.strategy["name"] == "fedavg"
    assert scenario.expect["test/accuracy"] == Expectation(min=0.9, last=5)


def test_data_path_is_taken_beside_the_scenario_file_when_it_is_there(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_folder(tmp_path / "images")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(MNIST.format(path="images"))
    assert load(path).data["path"] == str(tmp_path / "images")


def test_data_path_is_else_taken_from_the_working_folder(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    parquet_folder(elsewhere / "images")
    monkeypatch.chdir(elsewhere)
    path = write(MNIST.format(path="images"))
    assert load(path).data["path"] == str(elsewhere / "images")


def test_resolved_scenario_does_not_name_the_user_but_is_read_back_the_same(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "alice"
    parquet_folder(home / "images")
    monkeypatch.setenv("HOME", str(home))
    scenario = load(write(MNIST.format(path=home / "images")))
    resolved = scenario.resolved()
    assert resolved["data"]["path"] == "~/images"
    assert "alice" not in json.dumps(resolved)
    assert Scenario.from_resolved(resolved, scenario.origin) == scenario


MNIST = """
[data]
name = "mnist"
path = "{path}"
[partition]
kind = "iid"
"""


def parquet_folder(folder: Path) -> None:
    """A folder that looks right to a scenario, which does not read data."""
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(b"")


# Overrides.


def test_overrides_replace_values_tables_and_metric_claims(write: Any) -> None:
    scenario = load(
        write(MINIMAL),
        [
            "rounds=3",
            "engine.kind=inline",
            "engine.client_resources.num_cpus=0.5",
            'partition={kind="dirichlet", clients=7, alpha=1}',
            "expect.test/accuracy.min=0.5",
            'expect."train/loss"={max=2.0, last=3}',
            "title = two words = one title",
        ],
    )
    assert scenario.rounds == 3
    assert scenario.engine.kind == "inline"
    assert scenario.engine.client_resources.num_cpus == 0.5
    assert scenario.partition["kind"] == "dirichlet"
    assert scenario.partition["alpha"] == 1.0
    assert scenario.expect == {
        "test/accuracy": Expectation(min=0.5),
        "train/loss": Expectation(max=2.0, last=3),
    }
    assert scenario.title == "two words = one title"


@pytest.mark.parametrize("override", ["rounds", "=3", "engine..kind=ray", ""])
def test_override_that_is_no_assignment_is_refused(write: Any, override: str) -> None:
    assert f"--set {override}: must be table.key=value" in refusal(write(MINIMAL), override)


def test_override_below_a_value_is_refused(write: Any) -> None:
    path = write("rounds = 3\n" + MINIMAL)
    assert "'rounds' is a value and has no keys" in refusal(path, "rounds.x=1")


def test_override_with_a_broken_list_is_refused_as_such(write: Any) -> None:
    message = refusal(write(MINIMAL), "client.betas=[0.9, ")
    assert message.startswith("--set client.betas=[0.9, : the value is invalid TOML")


def test_overrides_apply_to_a_scenario_from_a_run_folder(write: Any) -> None:
    path = write(MINIMAL)
    scenario = Scenario.from_resolved(load(path).resolved(), str(path))
    overrides = ["engine.workers=2", "evaluation.stop.target=0.9"]
    assert scenario.with_overrides(overrides) == load(path, overrides)
    assert scenario.with_overrides([]) == scenario


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e300))
@settings(deadline=None, max_examples=25)
def test_a_float_survives_override_resolution_and_json_bit_for_bit(value: float) -> None:
    scenario = load("quickstart", [f"client.local_lr={value!r}"])
    again = Scenario.from_resolved(json.loads(json.dumps(scenario.resolved())), "quickstart")
    assert again.client["local_lr"].hex() == float(value).hex()
    assert again == scenario


# Hashes.


@pytest.mark.parametrize(
    "override",
    [
        "title=other",
        "source=other",
        "tier=slow",
        "engine.kind=inline",
        "engine.workers=7",
        "engine.address=auto",
        "engine.client_timeout_s=3",
        "engine.startup_timeout_s=3",
        "engine.silence_timeout_s=3",
        "engine.state_limit_mb=0.5",
        "engine.client_resources.num_cpus=2",
        "checkpoint.every=1",
        "output.tensorboard=true",
        "evaluation.keep_best=test/accuracy",
        "expect.train/loss.max=9",
    ],
)
def test_hash_ignores_what_cannot_change_a_result(override: str) -> None:
    assert load("quickstart", [override]).sha256 == load("quickstart").sha256


@pytest.mark.parametrize(
    "override",
    [
        "seed=99",
        "rounds=39",
        "task.hidden=[3]",
        "data.test_fraction=0.3",
        "partition.alpha=0.31",
        "participation.cohort_size=9",
        "strategy.server_lr=0.9",
        "client.momentum=0.1",
        "engine.chunk_size=3",
        "engine.executor=loop",
        "engine.device=cuda",
        "engine.on_failure=stop",
        "engine.min_replies=2",
        "evaluation.every=2",
        "evaluation.stop.patience=3",
    ],
)
def test_hash_knows_what_decides_a_result(override: str) -> None:
    assert load("quickstart", [override]).sha256 != load("quickstart").sha256


def test_hash_does_not_depend_on_where_the_data_lie(write: Any, tmp_path: Path) -> None:
    hashes = set()
    for name in ("here", "there"):
        parquet_folder(tmp_path / name)
        hashes.add(load(write(MNIST.format(path=tmp_path / name))).sha256)
    assert len(hashes) == 1


def test_default_written_out_is_the_same_scenario(write: Any) -> None:
    plain = load(write(MINIMAL))
    spelt = load(write(MINIMAL + '[strategy]\nname = "fedavg"\nserver_lr = 1.0\n'))
    assert spelt.sha256 == plain.sha256


# Refusals; those that the command line must show are in test_cli.py.


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine.knd=ray"], "[engine] 'knd' is not a key of [engine]; did you mean 'kind'?"),
        (["engine.kind=rai"], "[engine] kind = \"rai\": must be 'ray' or 'inline'; did you mean"),
        (["engine.chunk_size=1"], "[engine] chunk_size = 1: must be at least 2"),
        (["engine.workers=true"], "[engine] workers = true: must be an integer"),
        (["engine.min_replies=6"], "[engine] min_replies = 6: a round has at most 5 replies"),
        (
            ["engine.client_resources.num_cpu=1"],
            "'num_cpu' is not a key of [engine.client_resources]; did you mean 'num_cpus'?",
        ),
        (
            ["engine.client_resources.num_cpus=0"],
            "[engine] client_resources takes no CPU and no GPU: give num_cpus or num_gpus above 0",
        ),
        (["engine=3"], "[engine] = 3: must be a table"),
        (["attack={}"], "[attack] 'kind' is missing; allowed: uniform, sign_flip"),
        (["topology={}"], '[topology] kind = "ring": [strategy] name = "fedavg" has a server'),
        (["strategy.nam=fedau"], "'nam' is not a hyperparameter of fedavg; did you mean 'name'?"),
        (["task.modl=cnn"], "did you mean 'model'?"),
        (["strategy.name=flowr:Krum"], "or did you mean 'flower:Krum'?"),
        (["seed=9223372036854775808"], "seed = 9223372036854775808: must fit into 64 bits"),
        (
            ["participation={kind='sine', period=4611686018427387904}"],
            "period = 4611686018427387904: must be in 2..1000000 rounds",
        ),
        (["client.local_lr='0.1'"], '[client] local_lr = "0.1": must be a number'),
        (["client.local_lr=nan"], "[client] local_lr = NaN: must be a finite number"),
        (["client.local_lr=1979-05-27"], "a date has no meaning in a scenario"),
        (["client.local_epochs=1.5"], "[client] local_epochs = 1.5: must be an integer"),
        (["client.local_epochs=true"], "[client] local_epochs = true: must be an integer"),
        (["client.optimizer=sdg"], "must be 'sgd', 'adam' or 'adamw'; did you mean 'sgd'?"),
        (["client.betas=[0.9]"], "[client] betas = [0.9]: must be tuple[float, float]"),
        (["client.betas=[0.9, 'x']"], '[client] betas[1] = "x": must be a number'),
        (["strategy.name=3"], "[strategy] name = 3: must be a string"),
        (["strategy.name=flower:FedAdm"], "did you mean 'flower:FedAdam'?"),
        (["strategy.name=flower:FedXgbBagging"], "aggregates boosted trees"),
        (["strategy.name=flower:QFedAvg"], "[strategy] 'client_learning_rate' is missing"),
        (
            ["strategy={name='flower:FedAvg', fraction_train=0.5}"],
            "'fraction_train' is not a hyperparameter of flower:FedAvg",
        ),
        (["strategy.name=no_such:Thing"], "[strategy] name = 'no_such:Thing': no module named"),
        (["client.name=json:loads"], "[client] name = 'json:loads': must be a subclass of"),
        (["task.kind=clasification"], "'clasification' is not a kind of a task; did you mean"),
        (["task.dtype=float16"], "[task] dtype: 'float16' is not a dtype of a task"),
        (["task.model=mlpp"], "'mlpp' is not a model; did you mean 'mlp'?"),
        (["task.feature_shape=[3]"], "'feature_shape' is not a key of logistic"),
        (["data={name='synthetic'}"], 'nothing is there to split; use kind = "natural"'),
        (
            ["partition={kind='grouped'}", "data={name='synthetic'}"],
            'kind = "grouped" with [data] name = "synthetic"',
        ),
        (["partition.kind=flower:IidPartitoner"], "did you mean 'flower:IidPartitioner'?"),
        (["partition={kind='file', path='no.csv'}"], "no.csv': cannot be read: No such file"),
        (["partition.rotation='x'"], '[partition] rotation = "x": must be float | Sequence[float]'),
        (["partition.clients=0"], "[partition] clients = 0: must be >= 1"),
        (["evaluation.clients=6"], "at most 5 can evaluate"),
        (["evaluation.stop.mode=max"], "[evaluation] stop needs a 'target', a 'patience' or both"),
        (["evaluation.stop={metric='loss', target=1}"], "'loss' is not a metric that a run"),
        (["expect.test/accuracy={}"], "[expect] \"test/accuracy\" needs a 'min', a 'max' or both"),
        (["expect.test/accuracy={min=2, max=1}"], "min = 2 is above max = 1"),
        (["expect.test/accuracy=0.9"], "must be a table such as { min = 0.9 }"),
        (["expect.tst/accuracy.min=1"], "did you mean 'test/accuracy'?"),
        (["expect.local/accuracy.min=1"], "never recorded with [evaluation] clients = 0"),
        (["participation={kind='bernoulli', rate=[0.5]}"], "rate has 1 values for 5 clients"),
        (["participation={kind='bernoulli', rate='x'}"], "must be float | Sequence[float]"),
    ],
)
def test_refusal_names_table_key_value_and_what_is_allowed(
    write: Any, overrides: list[str], expected: str
) -> None:
    path = write(MINIMAL)
    message = refusal(path, *overrides)
    assert expected in message
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1


def test_all_problems_are_reported_at_once_one_line_each(write: Any) -> None:
    path = write(
        """
        rounds = 0
        [data]
        name = "digit"
        [partition]
        kind = "iid"
        clinets = 3
        [client]
        local_lr = -1
        momentun = 0.9
        [engin]
        """
    )
    lines = refusal(path).splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"{path}: ") for line in lines)
    for word in ("rounds = 0", "'digits'", "'clients'", "'momentum'", "'engine'"):
        assert sum(word in line.split("allowed")[0] for line in lines) == 1, word


def test_missing_data_set_and_partition_are_named(write: Any) -> None:
    message = refusal(write("rounds = 3\n"))
    assert "[data] 'name' is missing; allowed: digits, breast_cancer, diabetes, mnist" in message
    assert (
        "[partition] 'kind' is missing; allowed: iid, sizes, dirichlet, dirichlet_client" in message
    )


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"title = '\xff'")
    assert refusal(path) == f"{path}: is not UTF-8 text (at byte 9)"


def test_folder_is_refused_as_a_scenario(tmp_path: Path) -> None:
    assert "is a folder; name one of its .toml files" in refusal(tmp_path)


def test_resolved_document_that_is_no_table_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"run/scenario\.json: is not a scenario"):
        Scenario.from_resolved([1], "run/scenario.json")  # type: ignore[arg-type]


def test_late_refusals_get_the_scenario_file_in_front(write: Any) -> None:
    scenario = load(write(MINIMAL))
    with pytest.raises(ScenarioError) as caught, scenario.named_in_refusals():
        raise ScenarioError("[partition] min_size = 9: too much")
    assert str(caught.value) == f"{scenario.origin}: [partition] min_size = 9: too much"


# Claims.


def outcome(claim: Expectation, values: list[Any]) -> dict[str, Any]:
    history = [{"round": r, "test/accuracy": v} for r, v in enumerate(values)]
    (found,) = check_expectations({"test/accuracy": claim}, history)
    return found


def test_claim_is_held_against_the_mean_of_the_last_values() -> None:
    found = outcome(Expectation(min=0.7, last=2), [0.0, 0.6, 0.9])
    assert found["value"] == pytest.approx(0.75)
    assert found["holds"] is True
    assert found["claim"] == "mean of the last 2 >= 0.7"
    assert outcome(Expectation(min=0.76, last=2), [0.0, 0.6, 0.9])["holds"] is False
    assert outcome(Expectation(min=0.5, max=0.74, last=2), [0.0, 0.6, 0.9])["holds"] is False


def test_claim_counts_only_rounds_that_recorded_the_metric() -> None:
    found = outcome(Expectation(min=0.5, last=2), [0.4, None, 0.8, None])
    assert found["value"] == pytest.approx(0.6)


def test_claim_uses_what_there_is_when_fewer_values_were_recorded() -> None:
    assert outcome(Expectation(min=0.5, last=5), [0.6])["holds"] is True


def test_bounds_of_a_claim_are_allowed_values() -> None:
    assert outcome(Expectation(min=0.5, max=0.5), [0.5])["holds"] is True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_metric_that_is_not_finite_breaks_every_claim(value: Any) -> None:
    assert outcome(Expectation(min=0.0), [0.9, value])["holds"] is False
    assert outcome(Expectation(max=1.0), [0.9, value])["holds"] is False


def test_metric_that_was_never_recorded_breaks_its_claim_and_is_named() -> None:
    (found,) = check_expectations({"local/loss": Expectation(max=9)}, [{"test/loss": 1.0}])
    assert found == {
        "metric": "local/loss",
        "claim": "<= 9 (never recorded)",
        "value": None,
        "holds": False,
    }


# Factories.


def example(
    *,
    rate: float = 0.5,
    steps: int | None = None,
    mode: Literal["a", "b"] = "a",
    sizes: tuple[int, ...] = (1, 2),
    path: Path | None = None,
    hook: Callable[[int], int] | None = None,
) -> None:
    """An example.

    Args:
        rate: How often,
            in both lines.
        steps: How many: or none.

    Returns:
        mode: Nothing.
    """


def test_arguments_are_completed_in_the_order_of_the_signature_as_json() -> None:
    table = signatures.check(example, {"sizes": [3], "rate": 1}, where="[x]")
    assert list(table.items()) == [
        ("rate", 1.0),
        ("steps", None),
        ("mode", "a"),
        ("sizes", [3]),
        ("path", None),
    ]
    assert json.loads(json.dumps(table)) == table


def test_defaults_are_json_able_too() -> None:
    assert signatures.check(example, {}, where="[x]")["sizes"] == [1, 2]


def test_null_is_a_value_only_where_none_is_allowed() -> None:
    assert signatures.check(example, {"steps": None}, where="[x]")["steps"] is None
    with pytest.raises(ScenarioError, match=r"\[x\] rate = null: must be a number"):
        signatures.check(example, {"rate": None}, where="[x]")


def test_every_wrong_argument_is_a_line() -> None:
    with pytest.raises(ScenarioError) as caught:
        signatures.check(example, {"rat": 1, "steps": "3", "mode": "c"}, where="[x]")
    assert len(str(caught.value).splitlines()) == 3


def test_positional_arguments_are_the_callers_and_no_keys() -> None:
    def factory(targets: list[int], *, alpha: float = 1.0, seed: int) -> None: ...

    assert signatures.check(factory, {}, where="[x]", skip=("seed",)) == {"alpha": 1.0}
    assert list(signatures.keys(factory, foreign=True)) == ["targets", "alpha", "seed"]


def test_required_argument_that_is_missing_is_named() -> None:
    def factory(*, alpha: float) -> None: ...

    with pytest.raises(ScenarioError, match=r"\[x\] 'alpha' is missing: give a float"):
        signatures.check(factory, {}, where="[x]")


def test_docstring_explains_the_keys() -> None:
    keys = signatures.keys(example)
    assert keys["rate"].description == "How often, in both lines."
    assert keys["steps"].description == "How many: or none."
    assert keys["mode"].description == ""
    assert keys["steps"].type_name == "int | None"
    assert "hook" not in keys


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_pass_unchanged_where_integers_are_due(value: int) -> None:
    assert signatures.check_value(int, value) == value


@given(st.one_of(st.booleans(), st.floats(), st.text(), st.lists(st.integers())))
def test_nothing_but_an_integer_is_taken_for_one(value: Any) -> None:
    with pytest.raises(ScenarioError):
        signatures.check_value(int, value)


# Discovery.


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", QUICKLY + code], check=True, cwd=ROOT, timeout=60)


def test_names_are_found_without_importing_torch() -> None:
    run_python(
        "import sys; from fedsim.scenario import discovery as d\n"
        "assert 'fedavg' in d.names('strategies')\n"
        "assert 'local_sgd' in d.names('clients')\n"
        "assert 'quickstart' in d.names('scenarios')\n"
        "assert 'torch' not in sys.modules and 'strategies.fedavg' not in sys.modules"
    )


def test_importing_fedsim_is_light_and_turns_telemetry_off() -> None:
    run_python(
        "import os, sys\n"
        "for n in ('FLWR_TELEMETRY_ENABLED', 'RAY_USAGE_STATS_ENABLED'): os.environ.pop(n, None)\n"
        "import fedsim, fedsim.cli\n"
        "heavy = {'torch', 'ray', 'flwr', 'datasets', 'sklearn', 'matplotlib', 'numpy', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0'\n"
        "assert os.environ['RAY_USAGE_STATS_ENABLED'] == '0'"
    )


def test_telemetry_setting_of_the_user_wins() -> None:
    run_python(
        "import os; os.environ['FLWR_TELEMETRY_ENABLED'] = '1'\n"
        "import fedsim\n"
        "assert os.environ['FLWR_TELEMETRY_ENABLED'] == '1'"
    )


def test_strategy_is_the_one_class_of_the_module_of_its_name() -> None:
    from fedsim.strategy.base import FederatedStrategy

    for name in discovery.names("strategies"):
        factory = discovery.strategy_factory(name)
        assert isinstance(factory, type)
        assert issubclass(factory, FederatedStrategy)
        assert factory.__module__ == f"strategies.{name}"
        assert factory.__name__.lower().startswith(name.replace("_", ""))
        assert getattr(strategies, factory.__name__) is factory
    assert discovery.strategy_factory("fedavg").__name__ == "FedAvg"  # type: ignore[attr-defined]


def test_import_path_names_a_strategy_or_procedure_of_the_users() -> None:
    strategy = discovery.strategy_factory("strategies.fedavg:FedAvg")
    assert strategy is discovery.strategy_factory("fedavg")
    procedure = discovery.procedure_factory("clients.local_sgd:LocalSGD")
    assert procedure is discovery.procedure_factory("local_sgd")


def test_module_with_two_strategies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from fedsim.strategy import LinearStrategy\n"
    source += "class One(LinearStrategy): ...\nclass Two(LinearStrategy): ...\n"
    (tmp_path / "twofold.py").write_text(source)
    monkeypatch.setattr(strategies.__spec__, "submodule_search_locations", [str(tmp_path)])
    monkeypatch.setattr(strategies, "__path__", [str(tmp_path)])
    with pytest.raises(ScenarioError, match=r"exactly one public subclass.*defines One, Two"):
        discovery.strategy_factory("twofold")
    monkeypatch.delitem(sys.modules, "strategies.twofold")


def test_flower_strategy_is_built_to_take_everybody() -> None:
    strategy = Choice("strategies", {"name": "flower:FedAdam", "eta": 0.5}).make()
    assert vars(strategy)["eta"] == 0.5
    assert vars(strategy)["fraction_train"] == 1.0
    assert vars(strategy)["fraction_evaluate"] == 1.0
    assert vars(strategy)["min_available_nodes"] == 1
    assert vars(strategy)["min_train_nodes"] == 1


def test_every_flower_strategy_listed_has_a_schema_of_toml_values() -> None:
    for name in discovery.flower_names():
        schema = discovery.schema("strategies", name)
        assert not [key for key in schema if key.startswith(("fraction_", "min_"))], name
        assert "train_metrics_aggr_fn" not in schema


@pytest.mark.parametrize("kind", [k for k in discovery.KINDS if k != "scenarios"])
def test_everything_listed_is_described_and_has_defaults_that_pass_its_own_check(
    kind: str,
) -> None:
    for entry in discovery.describe(kind):
        assert entry.description, entry.name
        given = {k.name: k.default for k in entry.keys.values() if not k.required}
        skip = discovery.given_by_fedsim(kind)
        factory = discovery.factory(kind, entry.name)
        if any(key.required for key in entry.keys.values()):
            continue
        plain = signatures.check(factory, {}, where="[x]", skip=skip)
        assert plain == signatures.check(factory, plain, where="[x]", skip=skip)
        options = set()
        if kind == "tasks":
            options = {"dtype", *(each.name for each in fields(TaskOptions))}
        assert set(plain) == set(given) - options


# The package.


def test_scenarios_inside_an_installed_package_are_found(tmp_path: Path) -> None:
    # As a wheel lays them out: the scenarios lie in the package, and no checkout is around.
    only_code = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedsim", tmp_path / "fedsim", ignore=only_code)
    (tmp_path / "fedsim" / "scenarios").mkdir()
    shutil.copy(ROOT / "scenarios" / "quickstart.toml", tmp_path / "fedsim" / "scenarios")
    code = "from fedsim.scenario import discovery as d; print(d.names('scenarios'), d.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout
    assert found.split() == [
        "['quickstart']",
        str(tmp_path / "fedsim" / "scenario" / "discovery.py"),
    ]


def test_version_is_the_one_that_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == fedsim.__version__


def test_exports_are_imported_when_they_are_used() -> None:
    assert fedsim.load_scenario is load
    assert fedsim.Scenario is Scenario
    assert "run_simulation" in dir(fedsim)
    with pytest.raises(AttributeError, match="no attribute 'run_simulatio'"):
        _ = fedsim.run_simulatio
