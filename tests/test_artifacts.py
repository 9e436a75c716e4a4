"""A run's folder, its evaluations, and what it says on the way."""

import dataclasses
import inspect
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import pytest
import torch
from conftest import collect, make_config, make_models, make_prompts, read_log, run_in_a_terminal, take_steps
from test_reliability import in_a_process
from tqdm.utils import disp_len

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


@pytest.fixture
def quick(monkeypatch):
    """For tests that look at no picture and no page: drawing takes longer than training."""
    monkeypatch.setattr(ppo_llm.Run, "draw_curves", lambda run: None)
    monkeypatch.setattr(ppo_llm.Run, "print_end", lambda run: None)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    config = make_config(folder, output_dir=str(tmp_path_factory.mktemp("finished") / "run"), kl_ctrl_coef=0.05,
                         lr=1e-2, eval_dataset=f"{folder}/prompts.jsonl", eval_every=2)
    main(config)
    return config, Path(config.output_dir)


# ---- The folder --------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_these_files_and_no_other(finished):
    names = set("summary.json training_curves.png training_metrics.csv samples.jsonl checkpoints model critic".split())
    names |= {"inspector.html", ".lock"}
    assert {path.name for path in finished[1].iterdir()} == names
    checkpoint = {path.name for path in (finished[1] / "checkpoints" / "step_3").iterdir()}
    assert checkpoint == {"actor.safetensors", "critic.safetensors", "state.json", "hashes.json"}


def test_the_summary_says_how_the_run_began_and_ended(finished):
    config, run_dir = finished
    summary, rows = strict_json((run_dir / "summary.json").read_text()), read_log(run_dir)
    assert summary["status"] == "finished" and summary["step"] == 3
    assert Config(**summary["config"]) == config
    assert summary["versions"]["torch"] == torch.__version__ and summary["total_steps"] == 3
    assert summary["reason"] is None and summary["seconds"] > 0 and "CPUs" in summary["machine"]
    assert summary["settings_history"] == [{"step": 0, "config": summary["config"]}]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert summary["commit"] == head.stdout.strip()
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
              *(name for name in METRICS if re.match("rollout/(logprob_gap|is_)", name))}  # of bfloat16
    assert set(rows[3]) == {"step"} | METRICS - unused and set(rows[3]) == set(columns)
    assert all(math.isfinite(x) for row in rows for x in row.values())


def test_all_lines_of_the_log_end_alike(finished):
    assert b"\r" not in (finished[1] / "training_metrics.csv").read_bytes()


def test_the_curves_are_a_picture(finished):
    assert (finished[1] / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_sampled_token_has_one_number_per_column(finished):
    train = [sample for sample in read_samples(finished[1]) if sample["split"] == "train"]
    assert [sample["step"] for sample in train] == [1, 1, 2, 2, 3, 3]
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
    assert [sample["step"] for sample in evals] == [0] * 4 + [2] * 4 + [3] * 4
    assert [sample["prompt"] for sample in evals[:4]] == [sample["prompt"] for sample in evals[4:8]]


def test_a_run_that_was_cut_short_says_it_is_running_and_how_to_resume_it(folder, tmp_path, monkeypatch, quick):
    found = []

    def look(*args):
        found.append(strict_json((tmp_path / "run" / "summary.json").read_text()))

    monkeypatch.setattr(ppo_llm, "export_models", look)  # what a kill would leave
    main(make_config(folder, output_dir=str(tmp_path / "run")))
    assert found[0]["status"] == "running" and found[0]["first_evaluation"] == []
    assert found[0]["resume_command"].startswith("python ")


def test_the_default_folder_names_the_run_and_a_link_leads_to_the_newest(folder, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        main(make_config(folder, seed=seed, total_steps=1))
        link = Path("output", "ppo_metrics")
        assert link.is_symlink() and link.resolve().name.startswith(f"ppo_llm-prompts-seed{seed}-")
        assert (link / "summary.json").is_file()
    assert len(list(Path("output").glob("ppo_llm-*"))) == 2


def test_a_folder_called_ppo_metrics_is_not_replaced_by_the_link(folder, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    Path("output", "ppo_metrics").mkdir(parents=True)
    Path("output", "ppo_metrics", "mine.txt").write_text("keep")
    main(make_config(folder, total_steps=1))
    assert Path("output", "ppo_metrics", "mine.txt").read_text() == "keep"


def test_the_log_takes_a_new_metric_later_and_keeps_every_bit(folder, tmp_path, quick):
    rows = [{"step": 1, "b": 0.1 + 0.2}, {"step": 2, "b": math.nan}, {"step": 3, "a": 1 / 3, "b": 1e-300, "c": 5e-324}]
    with ppo_llm.Run(make_config(folder, output_dir=str(tmp_path)), 3) as run:
        run.begin(0)
        for row in rows:
            run.add(row["step"], {name: x for name, x in row.items() if name != "step"}, [])
    assert (tmp_path / "training_metrics.csv").read_text().splitlines()[0] == "step,a,b,c"
    assert read_log(tmp_path) == [rows[0], {"step": 2}, rows[2]]


def test_half_a_line_at_the_end_of_the_log_is_taken_off(folder, tmp_path, quick):
    config = make_config(folder, output_dir=str(tmp_path))
    with ppo_llm.Run(config, 20) as run:
        run.begin(0)
        run.add(3, {"a": 0.5}, [])
        with open(tmp_path / "training_metrics.csv", "a") as file:
            file.write("1")  # of "12,0.25": a whole line could not be told from it
        assert run.read_log().to_dict("index") == {3: {"a": 0.5}}
        run.add(4, {"a": 0.25, "b": 1.0}, [])
    assert (tmp_path / "training_metrics.csv").read_text() == "step,a,b\n3,0.5,\n4,0.25,1.0\n"


def logs_of(tmp_path) -> tuple[Path, Path]:
    (tmp_path / "training_metrics.csv").write_text("step,a,eval/score\n0,,0.5\n1,0.25,\n2,0.5,0.75\n3,1.0,\n")
    (tmp_path / "samples.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(4)))
    return tmp_path / "training_metrics.csv", tmp_path / "samples.jsonl"


def continued(folder, tmp_path) -> ppo_llm.Run:
    run = ppo_llm.Run(make_config(folder, output_dir=str(tmp_path)), 9)
    run.checkpoint = tmp_path / "checkpoints" / "step_2"
    run.continues = True
    run.lock.close()
    return run


def prepare(tmp_path) -> None:
    (tmp_path / ".lock").touch()


def test_logs_are_cut_at_the_step_of_the_checkpoint(folder, tmp_path, capsys):
    log, samples = logs_of(tmp_path)
    prepare(tmp_path)
    run = continued(folder, tmp_path)
    assert run.restore_logs(2) == [{"step": 0, "eval/score": 0.5}, {"step": 2, "eval/score": 0.75}]
    assert log.read_text().splitlines()[-1] == "2,0.5,0.75" and samples.read_text().count("\n") == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("before", "now", "kept"), [
    ("A", "A", True), ("A", "B", False), (None, "A", True), ("A", None, True)])  # None: no evaluation
def test_evaluations_of_other_data_are_not_those_of_this_run(before, now, kept, folder, tmp_path, capsys):
    log, _ = logs_of(tmp_path)
    prepare(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"evaluation_hash": before}))
    run = continued(folder, tmp_path)
    run.evaluation_hash = now
    assert len(run.restore_logs(2)) == (2 if kept else 0)
    assert ("0.75" in log.read_text()) == kept and run.evaluation_hash == (now or before)
    assert ("is evaluated anew" in capsys.readouterr().err) != kept
    assert (tmp_path / "training_metrics.csv.old").exists() != kept


@pytest.mark.parametrize("damage", ["letter", "digit", "missing row", "last rows", "no rows", "no samples", "noise"])
def test_a_damaged_log_is_kept_and_begins_anew(damage, folder, tmp_path, capsys):
    log, samples = logs_of(tmp_path)
    text = log.read_text()
    changed = {"letter": text.replace("1,0.25", "p,0.25"), "digit": text.replace("1,0.25", "9,0.25"),
               "missing row": text.replace("1,0.25,\n", ""), "last rows": text[: text.index("2,0.5")],
               "no rows": "step,a,eval/score\n", "noise": "\x00\x01 no table"}.get(damage, text)
    log.write_text(changed)
    if damage == "no samples":
        samples.write_text("")
    prepare(tmp_path)
    assert continued(folder, tmp_path).restore_logs(2) == []
    assert (tmp_path / "training_metrics.csv.old").read_text() == changed
    assert (tmp_path / "samples.jsonl.old").exists()
    assert "the logs cannot be read and begin anew" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_do_not_end_a_run(folder, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with ppo_llm.Run(make_config(folder, output_dir=str(tmp_path)), 3) as run:
        run.begin(0)
        run.add(1, {"a": 0.5}, [])
        run.print_end = lambda: None
    assert "training_curves.png could not be drawn: RuntimeError('no font')" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_the_evaluation_of_a_step_joins_its_row(folder, tmp_path, quick):
    with ppo_llm.Run(make_config(folder, output_dir=str(tmp_path)), 3) as run:
        run.begin(0)
        run.add(1, {"a": 0.5}, [])
        run.add(1, {"eval/score": 0.1 + 0.2}, [])
        run.add(2, {"a": 0.25}, [])
    expected = "step,a,eval/score\n1,0.5,0.30000000000000004\n2,0.25,\n"
    assert (tmp_path / "training_metrics.csv").read_text() == expected


def test_the_columns_of_the_log_are_in_alphabetical_order_whatever_a_step_measures_first(folder, tmp_path, quick):
    with ppo_llm.Run(make_config(folder, output_dir=str(tmp_path)), 3) as run:
        run.begin(0)
        run.add(1, {"b": 1.0, "a": 2.0}, [])
        assert (tmp_path / "training_metrics.csv").read_text() == "step,a,b\n1,2.0,1.0\n"


@pytest.mark.parametrize("changes", [
    {}, {"critic": "shared"}, {"adv_estimator": "rloo", "rollout_n": 2}, {"dtype": "bfloat16", "use_kl_loss": True}])
def test_every_number_that_is_measured_is_documented(changes, folder):
    config = make_config(folder, **changes)
    models, gsm8k = make_models(config), dataclasses.replace(config, reward="gsm8k")
    metrics, _ = evaluate(models, lambda *args: [1.0], [Example("", "1", [5])], 0.0, gsm8k)
    measured = set(take_steps(models, config)) | set(metrics)
    assert measured <= METRICS
    assert {"policy/loss", "eval/accuracy_flexible"} <= measured


def test_a_tracker_gets_every_row_of_the_log(folder, tmp_path, monkeypatch, quick):
    started = []
    rows = []
    tracker = SimpleNamespace(log=lambda metrics, step: rows.append({"step": step} | metrics))
    fake = SimpleNamespace(init=lambda **settings: (started.append(settings), tracker)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(folder, output_dir=str(tmp_path / "run"), track="wandb")
    main(config)
    assert [settings["config"] for settings in started] == [dataclasses.asdict(config)]
    assert rows == [pytest.approx(row) for row in read_log(tmp_path / "run")] and len(rows) == 3


# ---- Evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[1, 0, 0, 1, 1, 0, 0, 0], [0] * 5, [1] * 3, [1]])
def test_the_standard_error_of_zeros_and_ones_is_that_of_a_proportion(scores, folder):
    config = make_config(folder)
    examples = [Example("", "", prompt) for prompt in make_prompts(len(scores))]
    metrics, _ = evaluate(make_models(config), lambda *args: [float(x) for x in scores], examples, 0.0, config)
    p = sum(scores) / len(scores)
    assert metrics["eval/score"] == pytest.approx(p)
    assert metrics["eval/standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / max(len(scores) - 1, 1)))


def test_an_evaluation_is_greedy_whatever_the_sampling_flags_say(folder):
    responses = []
    for changes in ({}, {"temperature": 2.0}, {"seed": 5}, {"rollout_n": 2}):
        config = make_config(folder, **changes)
        examples = [Example("", "", prompt) for prompt in make_prompts(6)]
        _, samples = evaluate(make_models(config), lambda *args: [0.0] * 6, examples, 0.0, config)
        responses.append([sample["response"] for sample in samples])
    assert len(responses[0]) == 4 and all(other == responses[0] for other in responses)


def test_an_evaluation_changes_nothing_in_the_models(folder):
    config = make_config(folder)
    models = make_models(config)
    before = [w.clone() for w in models.actor.masters]
    evaluate(models, lambda *args: [0.0] * 3, [Example("", "", p) for p in make_prompts(3)], 0.0, config)
    assert all(map(torch.equal, before, models.actor.masters))
    assert torch.equal(collect(models, config)[0].old_logprobs, collect(make_models(config), config)[0].old_logprobs)


@pytest.mark.parametrize("changes", [{}, {"adv_estimator": "grpo", "rollout_n": 2}, {"critic": "shared"}])
def test_the_samples_of_an_evaluation_have_the_columns_that_the_run_knows(changes, folder):
    config = make_config(folder, **changes)
    examples = [Example("", "", prompt) for prompt in make_prompts(3)]
    _, samples = evaluate(make_models(config), lambda *args: [0.5] * 3, examples, 0.1, config)
    missing = {"ratio", "clipped"}  # of an update
    if "adv_estimator" in changes:
        missing |= {"reward", "value", "advantage", "return"}  # a single response has no group
    for sample in samples:
        assert {name for name in TOKEN_COLUMNS if sample[name] is None} == missing


def test_no_steps_write_an_evaluation_and_train_nothing(folder, tmp_path, quick):
    config = make_config(folder, output_dir=str(tmp_path / "run"), total_steps=0, eval_size=4, eval_every=1,
                         eval_dataset=f"{folder}/prompts.jsonl")
    main(config)
    rows = read_log(tmp_path / "run")
    assert [set(row) for row in rows] == [{"step", "eval/score", "eval/standard_error"}]
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()
    summary = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["last_evaluation"][0]["eval/score"] == rows[0]["eval/score"]


# ---- What is said ------------------------------------------------------------------------------------------


def run_script(arguments: list, cwd: Path):
    """The command line of ppo_llm.py without a terminal."""

    def function() -> int:
        sys.argv = [str(x) for x in arguments]
        os.environ.pop("COLUMNS", None)  # of the process that runs the tests
        return ppo_llm.start()

    return in_a_process(function, cwd)


@pytest.fixture(scope="module")
def piped(folder, tmp_path_factory):
    """A run of three steps: what it printed, and the folder it ran in."""
    flags = ["--model", folder, "--dataset", folder / "prompts.jsonl", "--reward", f"{folder}/reward.py:coin",
             "--device", "cpu", "--train_batch_size", 8, "--ppo_mini_batch_size", 4, "--max_prompt_length", 16,
             "--max_response_length", 8, "--total_steps", 3]
    cwd = tmp_path_factory.mktemp("piped")
    done = run_script([SCRIPT, *flags], cwd)
    assert done.code == 0, done.err
    return done, cwd


def test_a_piped_run_prints_one_line_per_step(piped):
    lines = piped[0].out.splitlines()
    rows = [line.split() for line in lines if re.match(r" +\d/3 ", line)]
    assert [row[0] for row in rows] == ["1/3", "2/3", "3/3"]
    titles = next(line.split() for line in lines if line.split()[:1] == ["step"])
    assert titles == ["step", *ppo_llm.COLUMNS, "seconds", "ETA"] and len(titles) == len(rows[0])
    log = read_log(piped[1] / "output" / "ppo_metrics")
    assert rows[2][1] == f"{log[2]['reward/score']:.3g}"
    assert sum("first prompt: a<bot>" in line for line in lines) == 1
    assert sum(line.startswith("stop tokens: ['<|endoftext|>'") for line in lines) == 1


def test_a_piped_run_says_at_its_start_how_to_continue_it_and_at_its_end_where_to_look(piped):
    lines = piped[0].out.splitlines()
    run_dir = (piped[1] / "output" / "ppo_metrics").resolve()
    assert lines[1] == f"run: output/{run_dir.name}"
    assert lines[2].startswith("to continue it: python ") and lines[2].endswith(f" --output_dir output/{run_dir.name}")
    names = ["summary.json", "training_curves.png", "training_metrics.csv", "samples.jsonl", "inspector.html",
             "checkpoints", "model", "critic"]
    assert lines[-len(names) :] == [f"output/{run_dir.name}/{name}" for name in names]


def test_a_piped_run_draws_no_progress_bar_and_no_traceback(piped):
    assert "\r" not in piped[0].out + piped[0].err and "Traceback" not in piped[0].err


def test_the_resume_command_of_a_finished_run_trains_nothing_more(piped):
    run_dir = piped[1] / "output" / "ppo_metrics"
    log = read_log(run_dir)
    command = shlex.split(strict_json((run_dir / "summary.json").read_text())["resume_command"])
    again = run_script(command[1:], piped[1])
    assert command[0] == "python" and again.code == 0, again.err
    assert read_log(run_dir) == log and len(list((piped[1] / "output").iterdir())) == 2


def make_console(folder, tmp_path, monkeypatch, width: int, **changes) -> ppo_llm.Run:
    """A run of 45 steps that only talks, on a terminal of this width."""
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("add", "draw_curves"):
        monkeypatch.setattr(ppo_llm.Run, name, lambda run, *x: x[1] if x else None)
    monkeypatch.setattr(ppo_llm, "describe_samples", lambda *x: [])
    run = ppo_llm.Run(make_config(folder, output_dir=str(tmp_path / "run"), **changes), 45)
    run.start = 0
    run.began = 0.0
    return run


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_console_has_fixed_columns_and_a_header_every_20_rows_at_any_width(
    width, folder, tmp_path, monkeypatch, capsys
):
    run = make_console(folder, tmp_path, monkeypatch, width)
    for step in range(1, 46):
        run.log_step(step, {"rollout/tokens": 100, "reward/score": step / 3}, None, None, 2.0)
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if "score" in line] == [0, 21, 42] and len(lines) == 48
    assert {len(line) for line in lines} == {min(width // 10, 9) * 10}
    assert lines[1].split()[:3] == ["1/45", "0.333", "-"]
    assert (lines[0].split()[-1] == "ETA") == (width == 200)  # the bar shows it on a narrow terminal


def test_an_evaluation_has_a_line_with_its_error_and_one_sample_of_the_width_of_the_terminal(
    folder, tmp_path, monkeypatch, capsys
):
    run = make_console(folder, tmp_path, monkeypatch, 60, eval_every=1)
    metrics = {"eval/score": 0.36, "eval/standard_error": 0.0196}
    samples = [{"score": 1.0, "response": "\x1b[31m" + "答案" * 200}]
    monkeypatch.setattr(ppo_llm, "evaluate", lambda *x: (metrics, samples))
    run.evaluate_if_due(45, None, None, ["a row"], 0.0)
    line, sample = capsys.readouterr().out.splitlines()
    assert line == "evaluation at step 45: 0.36 ± 0.02"
    assert sample.startswith("  sample, score 1: \\x1b[31m答案") and 58 <= disp_len(sample) <= 59


def test_a_finished_run_ends_with_a_table_of_the_evaluations_before_and_after(
    folder, tmp_path, monkeypatch, capsys
):
    run = make_console(folder, tmp_path, monkeypatch, 80)
    monkeypatch.setattr(ppo_llm, "HERE", tmp_path)  # without an inspector
    run.evaluations = [{"step": 0, "eval/score": 0.25, "eval/standard_error": 0.1}]
    run.print_end()
    header, before = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "evaluation", "score"] and before.split() == ["0", "0.25", "±", "0.1"]
    for step in (20, 45):
        run.evaluations.append({"step": step, "eval/score": step / 50, "eval/standard_error": 0.03})
    run.print_end()
    assert capsys.readouterr().out.splitlines()[2].split() == ["45", "0.9", "±", "0.03"]
    run.evaluations = []
    run.print_end()
    assert capsys.readouterr().out == ""


def test_where_the_output_takes_ascii_only_other_letters_are_escaped():
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    print("0.3 ± 0.1", file=ppo_llm.Console(terminal))
    assert written.getvalue() == b"0.3 \\xb1 0.1\n"


def test_an_output_that_is_no_file_or_was_closed_is_written_to_all_the_same():
    text = io.StringIO()
    print("0.3 ± 0.1", file=ppo_llm.Console(text))
    assert text.getvalue() == "0.3 ± 0.1\n"
    print("nobody reads this", file=ppo_llm.Console(None))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_terminal_gets_a_bar_with_the_time_left_and_a_dumb_one_does_not(kind, folder, tmp_path):
    flags = ["--model", folder, "--dataset", folder / "prompts.jsonl", "--reward", f"{folder}/reward.py:coin",
             "--train_batch_size", 8, "--ppo_mini_batch_size", 4, "--max_prompt_length", 16,
             "--max_response_length", 8, "--total_steps", 3, "--output_dir", tmp_path / "run"]
    code, shown = run_in_a_terminal([sys.executable, SCRIPT, *flags], 60, TERM=kind, NO_COLOR="1")
    assert code == 0, shown
    assert bool(re.search(r"100%.* 3/3 \[.*<00:00", shown)) == (kind == "xterm")
    rows = [line for line in re.split("[\r\n]+", shown) if re.match(r" +\d/3 ", line)]
    assert len(rows) == 3 and {len(row) for row in rows} == {60}
    assert not re.search(r"\x1b\[\d*m", shown)  # no colours


WARNINGS = [
    ({"policy/ratio_first": 1.001}, 0, "the first ratio is not 1: sampling and training disagree"),
    ({"rollout/logprob_gap": 0.04, "policy/ratio_first": 1.0}, 0, "the rollout is not of the policy that is trained"),
    ({"reward/kl": 0.02}, 0, "the first KL is not 0: the reference is another policy"),
    ({"reward/kl": -0.02}, 0, "the first KL is not 0: the reference is another policy"),
    ({"reward/score_std": 7e-9}, 4, "all responses have the same score: nothing is learned"),
    ({"reward/kl": -0.2}, 3, "the KL is negative: log-probs are not those of the sampler"),
    ({"reward/kl": 1.5}, 3, "its coefficient is too low, or the optimizer's noise drives it (lower lr, or a larger"),
    ({"rollout/eos_rate": 0.01}, 3, "the stop tokens are wrong, or the task has a fixed length and all is well"),
    ({"policy/entropy": 1e-4}, 3, "the entropy has collapsed: lower lr, raise entropy_coeff or the KL's"),
    ({"policy/clipfrac": 0.4}, 3, "over 30 % of the tokens are clipped: lower lr or ppo_epochs"),
    ({"value/explained_variance": -2.0, "value/loss": 0.5}, 20, "the critic is far worse than a constant"),
    ({"value/loss": 150.0, "reward/score_std": 0.5}, 20, "the values have left the range of the scores"),
]


@pytest.mark.parametrize(("metrics", "step", "sentence"), WARNINGS)
def test_each_warning_is_given_once_with_its_step_and_its_cause(metrics, step, sentence, capsys):
    said = set()
    check_health(metrics, step, said)
    check_health(metrics, step, said)
    error = capsys.readouterr().err
    assert error.count(sentence) == error.count("\n") == 1 and error.startswith(f"warning: step {step + 1}: ")


def test_every_sentence_about_a_runs_health_has_metrics_that_trigger_it_here():
    said = set()
    for metrics, step, _ in WARNINGS:
        check_health(metrics, step, said)
    source = inspect.getsource(check_health)
    assert len(said) == len(re.findall(r"^        \([^\n]*\bm\[|^        \(ratio_gap", source, re.MULTILINE)) == 11


@pytest.mark.parametrize(("metrics", "step"), [
    ({}, 0), ({"reward/score_std": 0.0}, 0), ({"reward/score_std": 0.1}, 4), ({"policy/ratio_first": 1.00005}, 0),
    ({"policy/ratio_first": 1.01, "rollout/logprob_gap": 0.001}, 0),  # bf16
    ({"reward/kl": 0.5}, 1), ({"reward/kl": 1e-3}, 0), ({"value/explained_variance": -2.0, "value/loss": 0.01}, 5),
    ({"reward/kl": math.nan, "value/explained_variance": math.nan}, 30),
    ({"value/loss": 150.0, "reward/score_std": 3.0}, 20),
    ({"policy/ratio_first": 1.0, "reward/kl": 1e-7, "rollout/eos_rate": 0.5, "policy/entropy": 1.0,
      "policy/clipfrac": 0.1, "value/explained_variance": 0.5}, 0)])
def test_healthy_numbers_give_no_warning(metrics, step, capsys):
    check_health(metrics, step, set())
    assert capsys.readouterr().err == ""
