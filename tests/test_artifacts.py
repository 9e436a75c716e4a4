"""A run's folder, its evaluations, and what it says on the way."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import collect, make_config, make_models, make_prompts, read_log, take_steps

import ppo_llm
from ppo_llm import Config, Example, check_health, evaluate, main

SCRIPT = Path(ppo_llm.__file__)
METRICS = set(re.findall(r"`(\w+/\w+)`", (SCRIPT.parent / "docs" / "metrics.md").read_text()))  # what is documented
METRICS -= {f"{split}/{name}" for split in ("reward", "eval") for name in ("NAME", "truncated", "failed")}  # optional
TOKEN_COLUMNS = "token logprob ref_logprob kl reward value advantage return ratio clipped".split()


def strict_json(text: str):
    """No NaN and no Infinity, which other readers refuse."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def read_samples(run_dir: Path) -> list[dict]:
    return [strict_json(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    config = make_config(folder, output_dir=str(tmp_path_factory.mktemp("finished") / "run"), kl_ctrl_coef=0.05,
                         lr=1e-2, eval_dataset=f"{folder}/prompts.jsonl", eval_every=2, print_samples=3)
    main(config)
    return config, Path(config.output_dir)


# ---------------------------------------------------------------------------------------------------------------------
# The folder.


def test_a_finished_run_leaves_these_files_and_no_other(finished):
    names = set("summary.json training_curves.png training_metrics.csv samples.jsonl checkpoints model".split())
    assert {path.name for path in finished[1].iterdir()} == names
    checkpoint = {path.name for path in (finished[1] / "checkpoints" / "step_3").iterdir()}
    assert checkpoint == {"actor.safetensors", "critic.safetensors", "state.json"}


def test_the_summary_says_how_the_run_began_and_ended(finished):
    config, run_dir = finished
    summary, rows = strict_json((run_dir / "summary.json").read_text()), read_log(run_dir)
    assert summary["status"] == "finished" and summary["step"] == 3
    assert Config(**summary["config"]) == config
    assert summary["versions"]["torch"] == torch.__version__
    for key, row in (("first_evaluation", rows[0]), ("last_evaluation", rows[-1])):
        assert summary[key] == [{name: x for name, x in row.items() if name == "step" or name.startswith("eval/")}]
        assert "eval/score" in summary[key][0]


def test_the_log_has_a_row_for_every_step_and_the_documented_columns(finished):
    run_dir = finished[1]
    columns = (run_dir / "training_metrics.csv").read_text().splitlines()[0].split(",")
    assert columns[0] == "step" and columns[1:] == sorted(columns[1:])
    rows = read_log(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/score" in row for row in rows] == [True, False, True, True]
    unused = {"eval/accuracy", "eval/accuracy_flexible", "eval/standard_error_flexible",  # of gsm8k
              "rollout/logprob_gap"}  # of bfloat16
    assert set(rows[3]) == {"step"} | METRICS - unused and set(rows[3]) == set(columns)
    assert all(math.isfinite(x) for row in rows for x in row.values())


def test_all_lines_of_the_log_end_alike(finished):
    assert b"\r" not in (finished[1] / "training_metrics.csv").read_bytes()


def test_the_curves_are_a_picture(finished):
    assert (finished[1] / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_sampled_token_has_one_number_per_column(finished):
    train = [sample for sample in read_samples(finished[1]) if sample["split"] == "train"]
    assert [sample["step"] for sample in train] == [1] * 3 + [2] * 3 + [3] * 3
    for sample in train:
        columns = "step split prompt response score stop_reason truncated".split() + TOKEN_COLUMNS
        assert set(sample) == set(columns)
        assert len({len(sample[name]) for name in TOKEN_COLUMNS}) == 1 <= len(sample["token"]) <= 8
        assert sample["truncated"] == (sample["stop_reason"] == "length") == (sample["token"][-1] != "<|endoftext|>")
        text = "".join(token for token in sample["token"] if not token.startswith("<"))
        assert sample["response"] == text and sample["prompt"].isalpha()


def test_the_rewards_of_a_sample_sum_to_its_score_minus_its_kl(finished):
    run_dir = finished[1]
    coefficients = {row["step"]: row.get("reward/kl_coef") for row in read_log(run_dir)}
    moved = 0
    for sample in read_samples(run_dir):
        if sample["split"] == "train":
            expected = sample["score"] - coefficients[sample["step"]] * sum(sample["kl"])
            assert sum(sample["reward"]) == pytest.approx(expected, abs=1e-5)
            moved += abs(sum(sample["kl"])) > 0.01
    assert moved


def test_the_columns_of_a_sample_belong_to_its_tokens(finished):
    for sample in read_samples(finished[1]):
        for name in ("logprob", "ref_logprob", "value") if sample["split"] == "train" else ():
            assert all(map(math.isfinite, sample[name])) and (name == "value" or max(sample[name]) <= 0)
        if sample["split"] == "train":
            kl = [x - y for x, y in zip(sample["logprob"], sample["ref_logprob"], strict=True)]
            assert sample["kl"] == pytest.approx(kl, abs=1e-6) and set(sample["clipped"]) <= {0.0, 1.0}


def test_evaluations_leave_samples_of_the_same_prompts_each_time(finished):
    evals = [sample for sample in read_samples(finished[1]) if sample["split"] == "eval"]
    assert [sample["step"] for sample in evals] == [0] * 3 + [2] * 3 + [3] * 3
    assert [sample["prompt"] for sample in evals[:3]] == [sample["prompt"] for sample in evals[3:6]]


def test_a_run_that_was_cut_short_says_it_is_running_and_how_to_resume_it(folder, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo_llm.Learner, "export", killed)
    config = make_config(folder, output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        main(config)
    summary = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "running" and summary["first_evaluation"] == []
    assert summary["resume_command"].startswith("python ")


def test_the_default_folder_names_the_run_and_a_link_leads_to_the_newest(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        main(make_config(folder, seed=seed, total_steps=1))
        link = Path("output", "ppo_metrics")
        assert link.is_symlink() and link.resolve().name.startswith(f"ppo_llm-prompts-seed{seed}-")
        assert (link / "summary.json").is_file()
    assert len(list(Path("output").glob("ppo_llm-*"))) == 2


def test_a_folder_called_ppo_metrics_is_not_replaced_by_the_link(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("output", "ppo_metrics").mkdir(parents=True)
    Path("output", "ppo_metrics", "mine.txt").write_text("keep")
    main(make_config(folder, total_steps=1))
    assert Path("output", "ppo_metrics", "mine.txt").read_text() == "keep"


def test_the_log_takes_a_new_metric_later_and_keeps_every_bit(tmp_path):
    (tmp_path / "training_metrics.csv").write_text("step\n")
    (tmp_path / "samples.jsonl").touch()
    rows = [{"step": 1, "b": 0.1 + 0.2}, {"step": 2, "b": math.nan}, {"step": 3, "a": 1 / 3, "b": 1e-300, "c": 5e-324}]
    for row in rows:
        ppo_llm.log_metrics(tmp_path, row["step"], {name: x for name, x in row.items() if name != "step"}, [], None)
    assert (tmp_path / "training_metrics.csv").read_text().splitlines()[0] == "step,a,b,c"
    assert read_log(tmp_path) == [rows[0], {"step": 2}, rows[2]]


@pytest.mark.parametrize("changes", [
    {}, {"critic": "shared"}, {"adv_estimator": "rloo", "rollout_n": 2}, {"dtype": "bfloat16", "use_kl_loss": True}])
def test_every_number_that_is_measured_is_documented(changes, folder):
    config = make_config(folder, **changes)
    models, gsm8k = make_models(config), dataclasses.replace(config, reward="gsm8k")
    metrics, _ = evaluate(models, lambda *args: [1.0], [Example("", "1", [5])], gsm8k)
    measured = set(take_steps(models, config)) | set(metrics)
    assert measured <= METRICS
    assert {"policy/loss", "eval/accuracy_flexible"} <= measured


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row_of_the_log(name, folder, tmp_path, monkeypatch):
    started, rows = [], []
    fake = SimpleNamespace(init=lambda **settings: started.append(settings),
                           log=lambda metrics, step: rows.append({"step": step} | metrics))
    monkeypatch.setitem(sys.modules, name, fake)
    config = make_config(folder, output_dir=str(tmp_path / "run"), track=name)
    main(config)
    assert [settings["config"] for settings in started] == [dataclasses.asdict(config)]
    assert rows == [pytest.approx(row) for row in read_log(tmp_path / "run")] and len(rows) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation.


@pytest.mark.parametrize("scores", [[1, 0, 0, 1, 1, 0, 0, 0], [0] * 5, [1] * 3, [1]])
def test_the_standard_error_of_zeros_and_ones_is_that_of_a_proportion(scores, folder):
    config = make_config(folder)
    examples = [Example("", "", prompt) for prompt in make_prompts(len(scores))]
    metrics, _ = evaluate(make_models(config), lambda *args: [float(x) for x in scores], examples, config)
    p = sum(scores) / len(scores)
    assert metrics["eval/score"] == pytest.approx(p)
    assert metrics["eval/standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / max(len(scores) - 1, 1)))


def test_an_evaluation_is_greedy_whatever_the_sampling_flags_say(folder):
    responses = []
    for changes in ({}, {"temperature": 2.0}, {"top_k": 3}, {"seed": 5}):
        config = make_config(folder, print_samples=9, **changes)
        examples = [Example("", "", prompt) for prompt in make_prompts(6)]
        _, samples = evaluate(make_models(config), lambda *args: [0.0] * 6, examples, config)
        responses.append([sample["response"] for sample in samples])
    assert len(responses[0]) == 6 and all(other == responses[0] for other in responses)


def test_an_evaluation_changes_nothing_in_the_models(folder):
    config = make_config(folder)
    models = make_models(config)
    before = [w.clone() for w in models.actor.masters]
    evaluate(models, lambda *args: [0.0] * 3, [Example("", "", p) for p in make_prompts(3)], config)
    assert all(map(torch.equal, before, models.actor.masters))
    assert torch.equal(collect(models, config)[0].old_logprobs, collect(make_models(config), config)[0].old_logprobs)


def test_eval_only_writes_an_evaluation_and_trains_nothing(folder, tmp_path, capsys):
    config = make_config(folder, output_dir=str(tmp_path / "run"), eval_only=True, eval_size=4,
                         eval_dataset=f"{folder}/prompts.jsonl")
    main(config)
    rows = read_log(tmp_path / "run")
    assert [set(row) for row in rows] == [{"step", "eval/score", "eval/standard_error"}]
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()
    summary = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["last_evaluation"][0]["eval/score"] == rows[0]["eval/score"]


def test_eval_only_of_a_checkpoint_evaluates_that_checkpoint(finished, folder, tmp_path):
    config, run_dir = finished
    main(dataclasses.replace(config, output_dir=str(tmp_path / "run"), eval_only=True,
                             resume=str(run_dir / "checkpoints" / "step_3")))
    trained = read_log(run_dir)
    assert trained[0]["eval/score"] != trained[3]["eval/score"]
    assert [row["eval/score"] for row in read_log(tmp_path / "run")] == [trained[3]["eval/score"]]


# ---------------------------------------------------------------------------------------------------------------------
# What is said.


def run_python(arguments: list, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def piped(folder, tmp_path_factory):
    """A run of three steps without a terminal: what it printed, and the folder it ran in."""
    flags = ["--model", folder, "--dataset", folder / "prompts.jsonl", "--reward", f"{folder}/reward.py:coin",
             "--device", "cpu", "--train_batch_size", 8, "--ppo_mini_batch_size", 4, "--max_prompt_length", 16,
             "--max_response_length", 8, "--total_steps", 3]
    cwd = tmp_path_factory.mktemp("piped")
    done = run_python([SCRIPT, *flags], cwd)
    assert done.returncode == 0, done.stderr.decode()
    return done, cwd


def test_a_piped_run_prints_one_line_per_step(piped):
    lines = piped[0].stdout.decode().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == ["step 1", "step 2", "step 3"]
    assert sum("first prompt: 'a<bot>'" in line for line in lines) == 1
    assert sum(line.startswith("stop tokens: <|endoftext|>") for line in lines) == 1


def test_a_piped_run_draws_no_progress_bar_and_no_traceback(piped):
    assert b"\r" not in piped[0].stdout + piped[0].stderr and b"Traceback" not in piped[0].stderr


@pytest.mark.slow
def test_the_resume_command_of_a_finished_run_trains_nothing_more(piped):
    run_dir = piped[1] / "output" / "ppo_metrics"
    log = read_log(run_dir)
    command = shlex.split(strict_json((run_dir / "summary.json").read_text())["resume_command"])
    again = run_python(command[1:], piped[1])
    assert command[0] == "python" and again.returncode == 0, again.stderr.decode()
    assert read_log(run_dir) == log and len(list((piped[1] / "output").iterdir())) == 2


@pytest.mark.parametrize(("metrics", "step", "sentence"), [
    ({"policy/ratio_first": 1.001}, 0, "first ratio is not 1"),
    ({"policy/ratio_first": 1.03, "rollout/logprob_gap": 0.001}, 0, "first ratio is not 1"),
    ({"reward/kl": 0.001}, 0, "first KL is not 0"),
    ({"reward/kl": -0.2}, 3, "KL is negative"),
    ({"reward/score_std": 7e-9}, 4, "all responses get the same score"),
    ({"rollout/eos_rate": 0.01}, 3, "hardly a response ends"),
    ({"policy/entropy": 1e-4}, 3, "entropy has collapsed"),
    ({"policy/clipfrac": 0.4}, 3, "over 30 % of the tokens are clipped"),
    ({"value/explained_variance": -2.0, "value/loss": 0.5}, 20, "worse than a constant"),
])
def test_each_warning_is_given_once_with_its_step(metrics, step, sentence, capsys):
    said = set()
    check_health(metrics, step, said)
    check_health(metrics, step, said)
    error = capsys.readouterr().err
    assert error.count(sentence) == error.count("\n") == 1 and error.startswith(f"warning: step {step + 1}: ")


@pytest.mark.parametrize(("metrics", "step"), [
    ({"reward/score_std": 0.0}, 0), ({"reward/score_std": 0.1}, 4),
    ({}, 0), ({"policy/ratio_first": 1.01, "rollout/logprob_gap": 0.001}, 0), ({"reward/kl": 0.5}, 1),
    ({"value/explained_variance": -0.1}, 5), ({"reward/kl": math.nan, "value/explained_variance": math.nan}, 30),
    ({"policy/ratio_first": 1.0, "reward/kl": 1e-7, "rollout/eos_rate": 0.5, "policy/entropy": 1.0,
      "policy/clipfrac": 0.1, "value/explained_variance": 0.5}, 0)])
def test_healthy_numbers_give_no_warning(metrics, step, capsys):
    check_health(metrics, step, set())
    assert capsys.readouterr().err == ""
