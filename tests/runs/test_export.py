"""What `fedsim export` writes is used as its page says, in a process that cannot import fedsim."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fedsim.basics.errors import CheckpointError, RunError, ScenarioError
from fedsim.basics.json_files import read_json
from fedsim.runs import start as run
from fedsim.runs.export import export
from fedsim.runs.world import build
from fedsim.scenario.scenario import Scenario
from tests.basics.processes import QUICKLY
from tests.data.tables import png

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "rounds": 2,
    "engine": {"kind": "inline"},
    "client": {"local_lr": 0.05, "local_epochs": 1},
    "partition": {"kind": "iid", "clients": 4},
}
DIGITS = {"name": "digits"}
ENDING = """
import numpy as np
np.savez("out.npz", x=x.numpy(), outputs=outputs.numpy(), predicted=np.array(predicted))
assert "fedsim" not in {name.partition(".")[0] for name, m in sys.modules.items() if m is not None}
"""


def scenario(task, data, **tables):
    document = {**SMALL, "data": data, "task": {"dtype": "float64", **task}, **tables}
    return Scenario.from_resolved(document, "tests/export.toml")


def exported(of, tmp_path, **options):
    result = run.start(of, out=tmp_path / "run")
    export(result.folder, tmp_path / "model", **options)
    return result


# begins as `python use.py` does for every folder that it is told, but for the start of torch
USING = """
import os, runpy, sys, traceback

sys.modules["fedsim"] = None  # a network that is not written out needs the user's code alone
import numpy, safetensors.torch, torch

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.chdir(line.rstrip("\\n"))
        said, code = os.open("said.txt", os.O_WRONLY | os.O_CREAT), 1
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.path.insert(0, os.getcwd())
        try:
            runpy.run_path("use.py", run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def used():
    """Run the page's Python on samples, in a process of its own; return x, outputs, predicted."""
    process = subprocess.Popen(
        [sys.executable, "-c", QUICKLY + USING], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def used(folder, raw):
        if isinstance(raw, np.ndarray):
            np.save(folder / "samples.npy", raw)
        else:
            (folder / "samples.json").write_text(json.dumps(raw))
        page = (folder / "README.md").read_text()
        [lines] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
        (folder / "use.py").write_text(f"import sys\n{lines}{ENDING}")
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n", (folder / "said.txt").read_text()
        return np.load(folder / "out.npz")

    with process:
        yield used
        process.stdin.close()


def cross_entropy(outputs, targets):
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -logs[np.arange(len(targets)), targets].mean()


def holds(result, of, found, rows=slice(None)):
    """Hold outputs against fedsim's own evaluation of the same model."""
    test, final = build(of).data.test, result.summary["final"]
    outputs = found["outputs"][rows]
    assert np.array_equal(found["x"][rows], test.features), "samples are prepared to the bit"
    assert cross_entropy(outputs, test.targets) == pytest.approx(final["test/loss"], rel=1e-12)
    assert (outputs.argmax(axis=1) == test.targets).mean() == final["test/accuracy"]


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ({"model": "mlp", "hidden": [7]}, "network.py"),
        pytest.param({"model": "cnn_batchnorm"}, "network.py", marks=pytest.mark.slow),
        pytest.param({"model": "mlp_dropout", "hidden": [7]}, "network.py", marks=pytest.mark.slow),
        pytest.param(
            {"model": "tests.runs.networks:numbered"}, "network.py", marks=pytest.mark.slow
        ),
        pytest.param({"model": "resnet8"}, "network.pt2", marks=pytest.mark.slow),
        ({"model": "tests.runs.networks:Twice", "width": 5}, "network.pt2"),
        pytest.param(
            {"model": "tests.runs.networks:Looking", "width": 5}, None, marks=pytest.mark.slow
        ),
    ],
)
def test_networks_of_all_kinds_give_what_fedsim_measured(used, tmp_path, task, file):
    of = scenario(task, DIGITS)
    result = exported(of, tmp_path)
    raw = np.round(build(of).data.test.features * 16)
    holds(result, of, used(tmp_path / "model", raw))
    files = {each.name for each in (tmp_path / "model").iterdir()}
    assert ({"network.py", "network.pt2"} & files) == ({file} if file else set())


def test_standardised_columns_are_prepared_from_raw_ones_and_classes_have_their_names(
    used, tmp_path
):
    from sklearn.datasets import load_breast_cancer

    of = scenario({"model": "logistic"}, {"name": "breast_cancer"})
    result = exported(of, tmp_path)
    found = used(tmp_path / "model", load_breast_cancer().data)
    test = build(of).data.test
    rows = [int(np.flatnonzero((found["x"] == each).all(axis=1))[0]) for each in test.features]
    holds(result, of, found, rows)
    assert read_json(tmp_path / "model" / "labels.json") == ["malignant", "benign"]
    names = np.array(["malignant", "benign"])
    right = (found["predicted"][rows] == names[test.targets]).mean()
    assert right == result.summary["final"]["test/accuracy"]


def test_targets_that_were_standardised_come_back_in_their_own_unit(used, tmp_path):
    from sklearn.datasets import load_diabetes

    of = scenario({"model": "linear"}, {"name": "diabetes"})
    result = exported(of, tmp_path)
    bunch = load_diabetes(scaled=False)
    found = used(tmp_path / "model", bunch.data)
    test = build(of).data.test
    rows = [int(np.flatnonzero((found["x"] == each).all(axis=1))[0]) for each in test.features]
    error = found["outputs"][rows].reshape(-1) - test.targets.reshape(-1)
    rmse = np.sqrt((error**2).mean())
    assert rmse == pytest.approx(result.summary["final"]["test/rmse"], rel=1e-12)
    deviation = read_json(tmp_path / "model" / "preprocessing.json")["targets"]["std"]
    own = found["predicted"][rows].reshape(-1) - bunch.target[rows]
    # targets are rounded to float32 once they are standardised
    assert np.sqrt((own**2).mean()) == pytest.approx(rmse * deviation, rel=1e-5)
    assert not (tmp_path / "model" / "labels.json").exists()


def test_images_are_prepared_from_their_pixels(used, tmp_path):
    draw = np.random.default_rng(0)
    pixels = draw.integers(256, size=(40, 6, 5, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = tmp_path / "images" / ("train" if number < 30 else "test") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(png(image))
    data = {"name": "folder", "path": str(tmp_path / "images"), "standardise": True}
    of = scenario({"model": "cnn"}, data)
    result = exported(of, tmp_path)
    found = used(tmp_path / "model", pixels[30:].transpose(0, 3, 1, 2))
    test = build(of).data.test
    rows = [int(np.flatnonzero((found["x"] == e).all(axis=(1, 2, 3)))[0]) for e in test.features]
    assert sorted(rows) == list(range(10))
    holds(result, of, found, rows)
    assert read_json(tmp_path / "model" / "labels.json") == ["a", "b"]
    assert (
        "laid out as channels, height, width: 3x6x5"
        in (tmp_path / "model" / "README.md").read_text()
    )


@pytest.mark.slow
def test_text_is_prepared_from_characters(used, tmp_path):
    text = "It was the best of times, it was the worst of times~ " * 4
    rows = [{"x": text[i : i + 6], "y": text[i + 6]} for i in range(170)]
    (tmp_path / "text").mkdir()
    for name, part in (("train", rows[:120]), ("test", rows[120:])):
        (tmp_path / "text" / f"{name}.json").write_text(json.dumps(part))
    data = {
        "name": "folder", "path": str(tmp_path / "text"), "features": "x", "target": "y",
        "target_type": "characters",
    }  # fmt: skip
    of = scenario({"model": "char_lstm", "hidden": 5, "layers": 1}, data)
    result = exported(of, tmp_path)
    found = used(tmp_path / "model", [row["x"] for row in rows[120:]])
    assert (found["x"] == 80).any(), "a character that the vocabulary lacks"
    holds(result, of, found)
    assert len(read_json(tmp_path / "model" / "labels.json")) == 81


def test_the_best_model_is_another_one(tmp_path):
    of = scenario(
        {"model": "mlp", "hidden": [8]}, DIGITS, rounds=4, client={"local_lr": 0.9},
        evaluation={"keep_best": "test/loss"},
    )  # fmt: skip
    result = exported(of, tmp_path, best=True)
    best = result.summary["best"]
    kept = load_file(result.folder / "params-best.safetensors")
    written = load_file(tmp_path / "model" / "params.safetensors")
    assert all(np.array_equal(written[name], kept[name]) for name in kept)
    page = (tmp_path / "model" / "README.md").read_text()
    assert f"The best model of a federated run, after round {best['round']}." in page
    assert best["params_sha256"] in page
    export(result.folder, tmp_path / "last")
    assert result.summary["params_sha256"] in (tmp_path / "last" / "README.md").read_text()


def test_a_page_names_no_place_of_the_machine(tmp_path):
    exported(scenario({"model": "logistic"}, DIGITS), tmp_path)
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.fixture
def finished(tmp_path):
    return run.start(scenario({"model": "logistic"}, DIGITS), out=tmp_path / "run").folder


def test_what_cannot_be_exported_is_refused_by_its_reason(tmp_path, finished):
    with pytest.raises(ScenarioError, match=r"there is no such run folder; did you mean .*run'"):
        export(tmp_path / "runn", tmp_path / "model")
    with pytest.raises(ScenarioError, match=r"kept no best model; run it with \[evaluation\]"):
        export(finished, tmp_path / "model", best=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(ScenarioError, match=r"--to .*taken: is not empty"):
        export(finished, tmp_path / "taken")
    with pytest.raises(ScenarioError, match=r"--to .*file: is a file"):
        export(finished, tmp_path / "taken" / "file")
    summary = finished / "summary.json"
    whole = summary.read_text()
    summary.write_text(whole.replace('"rounds"', '"best": null, "rounds"', 1))
    with pytest.raises(ScenarioError, match="no round gave the metric"):
        export(finished, tmp_path / "model", best=True)
    summary.unlink()
    with pytest.raises(ScenarioError, match=r"has not ended, .*`fedsim resume .*` goes on with it"):
        export(finished, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_torn_or_altered_model_and_other_data_are_refused(tmp_path, finished):
    weights = finished / "params.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(RunError, match="torn"):
        export(finished, tmp_path / "model")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match=r"is not the model that summary.json speaks of"):
        export(finished, tmp_path / "model")
    weights.write_bytes(whole)
    manifest = finished / "manifest.json"
    manifest.write_text(json.dumps({**read_json(manifest), "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="the run began with data 000000000000"):
        export(finished, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_of_which_clients_keep_a_part_is_refused(tmp_path):
    of = scenario({"model": "mlp", "hidden": [7], "personal": ["output"]}, DIGITS)
    folder = run.start(of, out=tmp_path / "run").folder
    with pytest.raises(ScenarioError, match=r"\[task\] personal .* no whole model to export"):
        export(folder, tmp_path / "model")
