"""Scenarios with a model or a procedure of a user's own, written where a test wants them."""

import itertools
import json
import textwrap

import fedsim
from fedsim.runs.world import build

_number = itertools.count()
SCENARIO = """
seed = 1
rounds = {rounds}
[task]
model = "{module}:{model}"
[data]
name = "breast_cancer"
[partition]
kind = "iid"
clients = 6
[participation]
kind = "full"
[strategy]
name = "fedavg"
[client]
name = "local_sgd"
batch_size = 32
local_epochs = 1
[engine]
kind = "inline"
"""


class Project:
    """A folder with a module and a scenario beside it."""

    def __init__(self, folder, code, text=SCENARIO):
        # a name of its own: what was imported stays in sys.modules
        self.module = f"own_code_{next(_number)}"
        self.folder, self.text = folder, text
        (folder / f"{self.module}.py").write_text(textwrap.dedent(code))

    def scenario(self, model="Net", *overrides, rounds=3):
        text = self.text.format(module=self.module, model=model, rounds=rounds)
        (self.folder / "scenario.toml").write_text(text)
        return fedsim.load_scenario(self.folder / "scenario.toml", list(overrides))

    def world(self, model="Net", *overrides, rounds=3):
        return build(self.scenario(model, *overrides, rounds=rounds))

    def run(self, model="Net", *overrides, rounds=3, name="run"):
        """The summary of a run; its folder is `self.folder / name`."""
        scenario = self.scenario(model, *overrides, rounds=rounds)
        return fedsim.start(scenario, out=self.folder / name).summary

    def plan(self, name="run"):
        return json.loads((self.folder / name / "plan.json").read_text())
