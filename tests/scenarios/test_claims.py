"""The scenarios that come with fedsim keep their claims, and break them without their mechanism.

`[expect]` is written by hand from what the papers claim and what was seen; `fedsim run` exits 0
when it holds and 3 when it does not. That the fast ones hold, `scenarios/` itself tests.
"""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.scenario import discovery
from fedsim.scenario.load import load
from fedsim.studies.golden.recording import place_of

ROOT = Path(__file__).resolve().parents[2]
TEST_DATA = Path(os.environ.get("FEDSIM_TEST_DATA") or ROOT.parent / "shared" / "data")
SCENARIOS = {name: load(name) for name in discovery.shipped_scenarios()}
FAST = [name for name, scenario in SCENARIOS.items() if scenario.tier == "fast"]
SLOW = [name for name, scenario in SCENARIOS.items() if scenario.tier == "slow"]

# What takes the algorithm's own mechanism away, and nothing else.
WITHOUT = {
    "fedld_label_noise": ['strategy={name="fedavg", weighted=false}'],  # directions -> mean
    "fedau_label_correlated": ["strategy.cutoff=1"],  # weights -> 1
    "fedlex_large_steps": ["strategy.floor=1.0"],  # guidance -> 1
    "flag_uniform_attackers": ['strategy={name="fedavg", server_lr=0.3}'],  # flag -> mean
    "fedadam_sparse_features": ['strategy={name="fedavg"}'],  # Adam's step -> the mean
    "fedadagrad_defaults": ['strategy={name="fedavg"}'],  # Adagrad's step -> the mean
    "fedyogi_defaults": ['strategy={name="fedavg"}'],  # Yogi's step -> the mean
    "fedavgm_defaults": ["strategy.momentum=0.0"],  # momentum -> none
    "fal_brittle_features": ["strategy.radius=0.0"],  # moved samples -> the samples
    "fedsam_label_noise": ["strategy.rho=0.0"],  # the worst point near by -> the point itself
    "fedlc_label_skew": ["strategy.tau=0.0"],  # margins -> none
    "fedntd_label_skew": ["strategy.beta=0.0"],  # distillation -> none
    "moon_label_skew": ["strategy.mu=0.0"],  # contrast -> none
    "qfedavg_unequal_losses": ["strategy.q=0.0"],  # powers of losses -> 1
    "afl_unequal_losses": ["strategy.mixture_lr=0.0"],  # mixture -> uniform
    "fedrs_label_skew": ["strategy.alpha=1.0"],  # restricted softmax -> softmax
    "fedexp_defaults": ["strategy.epsilon=1e18"],  # extrapolation -> 1
    "variance_corrected_gossip_own_starts": ["strategy.name=gossip"],  # correction -> none
    "fedfix_slow_classes": ["strategy.weights=naive"],  # one over the rate -> 1
    "fedfix_defaults": ["strategy.weights=naive"],
    # a server that waits for nobody -> one that waits for all
    "fedbuff_stragglers": [
        'clock={trigger="all", stop_s=20.0, job={law="log_normal", sigma=1.0}}',
    ],
    "fedasync_old_models": ["strategy.staleness=constant"],  # less of old models -> as much
    "scaffold_two_classes": ['strategy={name="fedavg", weighted=false}'],  # variates -> none
    "feddyn_two_classes": ["strategy.alpha=0.0"],  # regulariser -> none
    "ditto_two_classes": ["client.parts.personal_model.lr=0.0"],  # the own model never moves
    "apfl_two_classes": ["strategy.alpha=0.0", "strategy.adaptive=false"],  # nothing is mixed in
    "pfedme_two_classes": ["strategy.inner_lr=1e-6"],  # the own model is the shared one
    "fedrep_two_classes": ["task.personal=[]"],  # one model for all, trained as a whole
    "fedbabu_two_classes": ["evaluation.finetune.lr=1e-9"],  # the head stays at evaluation, too
    "ef21_two_classes": [  # what is remembered of clients -> nothing
        'strategy={name="fedavg", weighted=false}',
        'client.parts=[{name="top_k", share=0.02, error_feedback=false}]',
    ],
    "fedavg_personal_output": ["task.personal=[]"],  # one model for all
    "fedavg_personal_body": ["task.personal=[]"],
    "fedavg_personal_norms": ["task.personal=[]"],
}


def run(name, folder, *overrides):
    """Run a scenario as a user does; returns (exit code, claims)."""
    settings = [f"--set={each}" for each in ("engine.kind=inline", *overrides)]
    ended = CliRunner().invoke(app, ["run", name, *settings, "--out", str(folder), "--json"])
    summary = json.loads((folder / "summary.json").read_text())
    return ended.exit_code, summary["expect"]


def test_every_algorithm_has_a_claim_and_a_way_to_lose_it():
    five = {"fedld", "fedau", "fedlex", "flag", "variance_corrected_gossip"}
    assert {SCENARIOS[name].strategy["name"] for name in WITHOUT} >= five
    assert {SCENARIOS[name].strategy["name"] for name in SLOW} >= five
    assert set(WITHOUT) <= set(FAST)


def test_every_fast_scenario_is_recorded():
    files = discovery.shipped_scenarios()
    assert [name for name in FAST if not place_of(files[name]).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_without_its_mechanism_they_do_not(name, tmp_path):
    code, claims = run(name, tmp_path / "run", *WITHOUT[name])
    assert code == 3, claims
    assert not any(claim["holds"] for claim in claims)


@pytest.mark.slow
def test_fedrep_loses_to_one_model_where_clients_are_alike(tmp_path):
    """The other side of its claim: a head of one's own is learnt from few samples then."""
    alike = 'partition={kind="iid", clients=20, test_fraction=0.3}'
    found = []
    for name, personal in (("own", '["output"]'), ("one", "[]")):
        _, claims = run("fedrep_two_classes", tmp_path / name, alike, f"task.personal={personal}")
        found.append(claims[0]["value"])
    assert found[0] + 0.2 < found[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("name", FAST)
def test_they_hold_on_other_seeds_too(name, seed, tmp_path):
    code, claims = run(name, tmp_path / "run", f"seed={seed}")
    assert code == 0, claims


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "seed"), [*((name, 1) for name in SLOW), ("fedavg_mnist_cnn", 2)])
def test_the_slow_scenarios_claims_hold(name, seed, tmp_path):
    folder = TEST_DATA / SCENARIOS[name].data["name"]
    if not folder.is_dir():
        pytest.skip(f"no parquet folder at {folder}; set FEDSIM_TEST_DATA")
    code, claims = run(name, tmp_path / "run", f"data.path={folder}", f"seed={seed}")
    assert code == 0, claims
