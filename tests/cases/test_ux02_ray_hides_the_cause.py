"""What a script or notebook defines trains on Ray too, and a start that fails says why."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.import_paths import of_main
from fedsim.basics.json_files import read_json
from fedsim.basics.sent_project import SentProject
from fedsim.cli import app
from fedsim.engine.ray.place import in_words
from tests.cases.own_projects import project

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys

import fedsim
import numpy as np
from clients.local_sgd import LocalSGD
from fedsim.data import DataSet
from fedsim.tasks import Classification
from torch import nn

SCALE = 3.0


class Net(nn.Module):
    def __init__(self, feature_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(feature_shape[0], num_classes)

    def forward(self, x):
        return self.layer(x) * SCALE


class Sgd(LocalSGD):
    pass


class Labels(Classification):
    pass


def load(n: int = 60):
    return DataSet(np.arange(2 * n, dtype=np.float32).reshape(n, 2) / n, np.arange(n) % 2)


if __name__ == "__main__":
    mine = [
        f"engine.kind={sys.argv[1]}",
        'task={model="__main__:Net", kind="__main__:Labels"}',
        'data={name="__main__:load"}',
        'client={name="__main__:Sgd"}',
    ]
    scenario = fedsim.load_scenario("scenario.toml", mine)
    print(fedsim.start(scenario, out=sys.argv[1], workers=2).summary["params_sha256"])
"""


class Raised(Exception):
    """As Ray words what an actor's process raised."""

    def __str__(self):
        return (
            "\x1b[36mray::WorkerProcess.__init__()\x1b[39m (pid=1, repr=<fedsim.WorkerProcess "
            "object at 0x7f>)\n  File x\n    raise ScenarioError(\n"
            "fedsim.basics.errors.ScenarioError: [task] model: no <Net object at 0x55aa> here\n\n"
        )


def test_a_worker_is_quoted_by_its_last_line_without_colours_and_addresses():
    assert in_words(Raised()) == "[task] model: no <Net object> here"
    assert in_words(Exception()) == "Exception"


def test_what_main_holds_is_taken_along_by_name(monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "net", len, raising=False)
    held = of_main(["__main__:net", "__main__:nothing", "json:loads"])
    assert held == {"net": len}
    make, arguments = SentProject(None, held).__reduce__()
    monkeypatch.delattr(main, "net")
    make(*arguments)
    assert main.net is len


def test_an_app_that_no_worker_can_be_sent_is_refused_before_ray_starts():
    import ray

    from fedsim.engine.ray.grid import RayGrid

    class Holding(ClientApp):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    before = ray.is_initialized()
    with pytest.raises(
        ScenarioError, match=r"cannot be sent to worker .*lock.*into a module"
    ) as it:
        RayGrid(Holding(), 2, workers=1)
    assert "--set" not in str(it.value)
    assert ray.is_initialized() == before


def test_a_run_of_a_script_says_in_another_process_where_it_goes_on(tmp_path, monkeypatch):
    main = sys.modules["__main__"]
    from torch import nn

    def net(feature_shape, num_classes):
        return nn.Linear(feature_shape[0], num_classes)

    file = project(tmp_path / "p", named="__main__:net")
    with monkeypatch.context() as patch:
        patch.setattr(main, "net", net, raising=False)
        result = fedsim.start(fedsim.load_scenario(file), out=tmp_path / "run")
    assert read_json(result.folder / "code.json")["files"]
    said = CliRunner().invoke(app, ["resume", str(result.folder)])
    assert said.exit_code == 2
    assert f"call `fedsim.resume('{result.folder}')` there" in said.stderr


@pytest.mark.slow
def test_a_script_trains_what_it_defines_on_ray_as_inline(tmp_path):
    project(tmp_path, rounds=2)
    (tmp_path / "script.py").write_text(SCRIPT)
    said = {}
    for kind in ("inline", "ray"):
        done = subprocess.run(
            [sys.executable, "script.py", kind],
            cwd=tmp_path, check=False, capture_output=True, text=True,
            env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[kind] = done.stdout.splitlines()[-1]
    assert said["ray"] == said["inline"]
