"""What a study compares, and what it refuses before anything runs."""

from pathlib import Path

import numpy as np
import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.runs.world import build
from fedsim.studies.cells.cell import cells_of, in_one_process
from fedsim.studies.cells.variants import fingerprint, of_scenarios, parse_axis, parse_seeds
from tests.studies.worlds import write


def test_values_with_commas_of_their_own_stay_whole():
    text = 'strategy={name="fedavg", server_lr=0.5},{name="a,b"},x'
    assert parse_axis(text).values == ('{name="fedavg", server_lr=0.5}', '{name="a,b"}', "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition.alpha", "must be table.key=value,value"),
        ("partition.alpha=1,,2", "must be table.key=value,value"),
        ("partition.alpha=1,1", "1 is there twice"),
        ("seed=1,2", "seeds are given by --seeds"),
    ],
)
def test_what_is_no_axis_is_refused(text, said):
    with pytest.raises(ScenarioError, match=said):
        parse_axis(text)


def test_seeds_are_counted_from_the_scenarios_or_listed():
    assert parse_seeds("3", 5) == (5, 6, 7)
    assert parse_seeds("9,2", 5) == (9, 2)
    assert parse_seeds("9,", 5) == (9,)
    for wrong in ("", "0", "-1", "two", "1,1", "1.5", "²"):
        with pytest.raises(ScenarioError, match="--seeds"):
            parse_seeds(wrong, 5)


def test_every_combination_is_a_variant(tmp_path):
    axes = [parse_axis("strategy.name=fedavg,fedau"), parse_axis("client.local_lr=0.1,0.2")]
    found = of_scenarios([str(write(tmp_path))], axes, ["rounds=2"])
    assert [v.name for v in found] == [
        f"strategy.name={s}, client.local_lr={lr}" for s in ("fedavg", "fedau") for lr in (0.1, 0.2)
    ]
    assert {v.scenario.rounds for v in found} == {2}


def test_a_wrong_value_is_named_with_the_nearest_and_where_it_comes_from(tmp_path):
    axes = [parse_axis("strategy.name=fedavg,fedua"), parse_axis("client.local_lr=0.1,-1")]
    with pytest.raises(ScenarioError) as refused:
        of_scenarios([str(write(tmp_path))], axes, [])
    lr, name = sorted(str(refused.value).splitlines())
    assert "did you mean 'fedau'?" in name
    assert name.endswith("(with --vary strategy.name=fedua)")
    assert "local_lr = -1.0: must be >= 0" in lr
    assert lr.endswith("(with --vary client.local_lr=-1)")


def test_what_is_wrong_with_all_values_blames_none(tmp_path):
    axes = [parse_axis("client.local_lr=0.1,0.2")]
    with pytest.raises(ScenarioError) as refused:
        of_scenarios([str(write(tmp_path))], axes, ["client.local_stepz=1"])
    assert "did you mean 'local_steps'?" in str(refused.value)
    assert "--vary" not in str(refused.value)


def test_keys_left_over_from_another_strategy_are_explained(tmp_path):
    axes = [parse_axis("strategy.name=fedau,fedavg")]
    with pytest.raises(ScenarioError, match="whole tables replace them: --vary 'strategy="):
        of_scenarios([str(write(tmp_path))], axes, ["strategy.cutoff=5"])


def test_variants_that_are_the_same_scenario_are_refused(tmp_path):
    axes = [parse_axis("engine.workers=1,2")]
    with pytest.raises(ScenarioError, match="are the same scenario"):
        of_scenarios([str(write(tmp_path))], axes, [])


def test_files_that_a_scenario_names_count_by_their_content(tmp_path):
    path = write(tmp_path)
    trace = tmp_path / "trace.csv"
    rule = ['participation={kind="trace", path="trace.csv"}']

    def print_of(text):
        trace.write_text(text)
        (variant,) = of_scenarios([str(path)], [], rule)
        return fingerprint(variant.scenario)

    assert print_of("round,client\n1,0\n") == print_of("round,client\n1,0\n")
    assert print_of("round,client\n1,0\n") != print_of("round,client\n1,1\n")


def test_cells_are_told_apart_by_what_decides_their_result(tmp_path):
    (a,) = of_scenarios([str(write(tmp_path))], [], [])
    (b,) = of_scenarios([str(write(tmp_path))], [], ["engine.workers=2", "title=other"])
    (c,) = of_scenarios([str(write(tmp_path))], [], ["client.local_lr=0.2"])
    of = [[cell.folder for cell in cells_of([v], (1, 2), Path("s"))] for v in (a, b, c)]
    assert of[0] == of[1]
    assert not {*of[0]} & {*of[2]}
    assert len({*of[0]}) == 2


def test_a_seed_redraws_split_partition_participation_and_model():
    (variant,) = of_scenarios(["quickstart"], [], [])
    one, two = (build(in_one_process(variant.scenario, seed)) for seed in (1, 2))
    again = build(in_one_process(variant.scenario, 1))
    for key in ("features", "targets"):  # who was held out
        assert (getattr(one.data.test, key) == getattr(again.data.test, key)).all()
        assert (getattr(one.data.test, key) != getattr(two.data.test, key)).any()
    assert one.data.manifest["sizes"] != two.data.manifest["sizes"]
    assert one.data.manifest_sha256 == again.data.manifest_sha256
    took_part = [
        [
            list(w.participation.participants(r, num_clients=50, seed=w.scenario.seed))
            for r in (1, 2)
        ]
        for w in (one, two, again)
    ]
    assert took_part[0] == took_part[2] != took_part[1]
    starts = [np.concatenate([a.numpy().ravel() for a in w.arrays.values()]) for w in (one, two)]
    assert (starts[0] != starts[1]).any()
