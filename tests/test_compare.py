"""scripts/compare.py: its commands parse, its statistics are right, its queue goes on where it stopped."""

import csv
import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import compare
import make_demo

import ppo_llm

ROOT = Path(__file__).resolve().parents[1]
NAMES = [*compare.CONFIGURATIONS, *compare.EXTRA, "gae_pretrained_critic_lr_4e-4"]


@pytest.fixture
def config(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    document = tmp_path / "document.md"
    document.write_text("Before.\n\n<!-- table -->\nold\n<!-- end of table -->\n\nAfter.\n")
    return compare.Config(output=tmp_path / "output", results=results, document=document)


def write_result(name: str, seed: int, end: float, config: compare.Config) -> None:
    """A made-up result whose greedy score rises evenly from 0.36 to `end`, with 100 tokens a step."""
    path = compare.result_path(name, seed, config)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, compare.COLUMNS)
        writer.writeheader()
        for step in range(compare.STEPS + 1):
            score = 0.36 + (end - 0.36) * step / compare.STEPS
            row = {"step": step, "generated_tokens": 100 * step, "seconds": step}
            if step % compare.EVAL_EVERY == 0:
                row["eval/score"] = score
            if step:
                row |= {"reward/score": score, "reward/kl": 0.01}
            writer.writerow(row)
    note = {"cpu_seconds": 20.0, "commit": "0123456789", "machine": "a machine", "versions": {"torch": "2"},
            "start_weights_sha256": "f00"}
    path.with_suffix(".json").write_text(json.dumps(note))


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_allowed_and_makes_64_responses_a_step(name, config):
    for flags in compare.commands(name, 3, config):
        parsed = ppo_llm.read_config(flags)
        ppo_llm.check_config(parsed)
        assert parsed.rollout_size == 64
        assert parsed.eval_every in (0, compare.EVAL_EVERY)
        assert compare.option(flags, "output_dir") == parsed.output_dir


def test_there_are_twelve_configurations_and_all_have_one_learning_rate(config):
    parsed = [ppo_llm.read_config(compare.commands(name, 1, config)[-1]) for name in compare.CONFIGURATIONS]
    assert len(parsed) == 12
    assert {run.lr for run in parsed} == {2e-4}
    assert {run.total_steps for run in parsed} == {compare.STEPS}
    assert {run.seed for run in parsed} == {1}


def test_the_value_model_of_its_own_is_trained_first_with_a_frozen_policy_and_another_seed(config):
    first, second = map(ppo_llm.read_config, compare.commands("gae_pretrained_critic", 2, config))
    assert (first.lr, first.total_steps, first.seed) == (0.0, compare.PRETRAINING, 1002)
    assert second.critic_model == f"{first.output_dir}/critic"
    assert second.lr > 0


def test_rows_with_another_rate_are_compared_with_the_first_at_that_rate(config):
    for seed in (1, 2, 3):
        write_result(compare.FIRST, seed, 0.5, config)
        write_result(f"{compare.FIRST}_lr_4e-4", seed, 0.6, config)
        write_result("grpo_4_lr_4e-4", seed, 0.8 + 0.001 * seed, config)
    assert ppo_llm.read_config(compare.commands("grpo_4_lr_4e-4", 1, config)[0]).lr == 4e-4
    lines = compare.table(compare.measured(config)).splitlines()
    cells = next(line for line in lines if "grpo_4_lr_4e-4" in line).split(" | ")
    assert cells[4].startswith("+0.202 [")
    assert cells[5] == "**yes**"


def test_a_run_without_kl_has_none_in_the_table(config):
    write_result("gae_no_kl", 1, 0.8, config)
    path = compare.result_path("gae_no_kl", 1, config)
    path.write_text(path.read_text().replace(",0.01,", ",,"))
    line = next(line for line in compare.table(compare.measured(config)).splitlines() if "gae_no_kl" in line)
    assert line.endswith("| not computed | 20 |")


def test_the_queue_goes_seed_by_seed_and_leaves_out_what_has_a_result(config):
    config = dataclasses.replace(config, seeds=(1, 2), only=("grpo_4", "rloo_4"))
    write_result("rloo_4", 1, 0.8, config)
    compare.result_path("grpo_4", 2, config).with_suffix(".part").touch()  # stopped while it was written
    assert compare.queue(config) == [("grpo_4", 1), ("grpo_4", 2), ("rloo_4", 2)]


def fake_start(flags: list[str], metrics: str) -> int:
    """Instead of ppo_llm.start(): leaves what a run leaves."""
    folder = Path(compare.option(flags, "output_dir"))
    (folder / "model").mkdir(parents=True)
    (folder / "training_metrics.csv").write_text(metrics)
    summary = {"commit": "abc", "machine": "a machine", "versions": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return 0


@pytest.fixture
def task(config):
    (config.output / "task").mkdir(parents=True)
    (config.output / "task" / "model.safetensors").write_bytes(b"weights")


METRICS = """step,eval/score,reward/score,reward/kl,rollout/response_length,time/rollout,time/score,\
time/update_actor
0,0.25,,,,,,
1,,0.5,0.0,10,1,2,3
2,0.75,0.5,0.1,20,1,2,3
"""


def test_a_stopped_queue_runs_only_what_is_left_and_sums_tokens_up(config, task, monkeypatch):
    monkeypatch.setattr(ppo_llm, "start", lambda: fake_start(sys.argv[1:], METRICS))
    config = dataclasses.replace(config, seeds=(1,), only=("grpo_4", "gae_pretrained_critic"), jobs=2)
    write_result("grpo_4", 1, 0.8, config)
    before = compare.result_path("grpo_4", 1, config).read_bytes()
    assert compare.run_queue(config) == 0
    assert compare.queue(config) == []
    assert compare.result_path("grpo_4", 1, config).read_bytes() == before
    rows = compare.read_rows(compare.result_path("gae_pretrained_critic", 1, config))
    assert [row["generated_tokens"] for row in rows] == ["1920", "2560", "3840"]  # 1,920 of its critic's run
    assert [row["seconds"] for row in rows] == ["12.0", "18.0", "24.0"]
    assert [row["eval/score"] for row in rows] == ["0.25", "", "0.75"]


def test_what_another_queue_has_made_meanwhile_is_not_run_again(config, task, monkeypatch):
    monkeypatch.setattr(ppo_llm, "start", lambda: 2)  # a run would fail
    monkeypatch.setattr(compare, "queue", lambda config: [("grpo_4", 1)])
    write_result("grpo_4", 1, 0.8, config)
    assert compare.run_queue(config) == 0


def test_a_run_that_fails_leaves_no_result_and_is_counted(config, task, monkeypatch):
    monkeypatch.setattr(ppo_llm, "start", lambda: 2)
    config = dataclasses.replace(config, seeds=(1,), only=("grpo_4",))
    assert compare.run_queue(config) == 1
    assert compare.queue(config) == [("grpo_4", 1)]


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert compare.interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0])) == 2.5
    # of five values a quarter of the second and of the fourth lie outside: (0.75 * 2 + 3 + 0.75 * 5) / 2.5
    assert compare.interquartile_mean(np.array([-9.0, 2.0, 3.0, 5.0, 99.0])) == pytest.approx(3.3)
    assert compare.interquartile_mean(np.array([0.7])) == 0.7


def test_the_band_holds_the_interquartile_mean_and_has_no_width_where_seeds_agree():
    x = np.array([0.1, 0.5, 0.6, 0.7, 0.9])
    low, high = compare.bootstrap_band(x)
    assert 0.1 <= low < compare.interquartile_mean(x) < high <= 0.9
    assert compare.bootstrap_band(np.full(5, 0.5)) == (0.5, 0.5)


def test_students_interval_by_hand():
    low, high = compare.difference_interval(np.array([0.0, 0.1, 0.2]), compare.T_95)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half))
    assert compare.difference_interval(np.array([0.1]), compare.T_95) == (-math.inf, math.inf)


def test_a_difference_within_noise_is_not_told_apart():
    first = {seed: {"end": end} for seed, end in enumerate((0.5, 0.6, 0.7))}
    noisy = {seed: {"end": end} for seed, end in enumerate((0.9, 0.5, 0.8))}
    higher = {seed: {"end": run["end"] + 0.1 + 0.001 * seed} for seed, run in first.items()}
    assert compare.compare_with_first(noisy, first, "end")[1] == "no"
    assert compare.compare_with_first(higher, first, "end")[1] == "**yes**"


def test_the_report_reads_equal_tokens_and_says_what_is_not_measured(config):
    for seed, end in enumerate((0.6, 0.7, 0.8), 1):
        write_result(compare.FIRST, seed, end, config)
        write_result("gae_pretrained_critic", seed, end, config)
    lines = compare.report(config).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines}
    assert cells[compare.FIRST][1:4] == ["3", "1,200", "0.700 [0.600, 0.800]"]
    assert cells["gae_pretrained_critic"][2] == "900"  # three of its twelve steps went into its critic
    assert cells["gae_pretrained_critic, its pre-training not counted"][2] == "1,200"
    assert cells["grpo_8"][2] == "not measured"
    assert "6 runs with ppo_llm.py of commit 0123456; a machine" in lines[-1]
    document = config.document.read_text()
    assert document.startswith("Before.\n\n<!-- table -->\n| configuration |")
    assert document.endswith("<!-- end of table -->\n\nAfter.\n")
    assert "\nold\n" not in document
    with (config.results / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = [float(row["end"]) for row in rows if row["configuration"] == compare.FIRST]
    assert ends == pytest.approx([0.6, 0.7, 0.8])
    for name in ("curves.png", "ends.png"):
        assert (config.results / name).read_bytes().startswith(b"\x89PNG")


def test_the_kinds_of_problems_are_spoiled_in_turn_as_often_as_told():
    args = make_demo.Args(fault=(0.85, 0.95, 0.99))
    rng = random.Random(1)
    kinds = set()
    for _ in range(300):
        problem = make_demo.make_problem(rng, 2)
        ending = make_demo.TWO_STEP[problem.kind].question.split("}")[-1]
        assert problem.question.endswith(ending)
        assert make_demo.fault_share(args, problem) == (0.85, 0.95, 0.99)[problem.kind % 3]
        kinds.add(problem.kind)
    assert kinds == set(range(15))


def test_the_shipped_problems_are_those_that_the_script_makes():
    problems = make_demo.make_rows(random.Random("test 1"), 600, 0.36, ())
    lines = (ROOT / "assets" / "demo" / "test.jsonl").read_text().splitlines()
    made = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    assert made == [json.loads(line) for line in lines]
