"""scripts/rlhf_demo.sh, shortened: preference pairs, reward model, PPO with and without KL, report."""

import csv
import json
import os
import runpy
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHORT = {"STEPS": "2", "BATCH": "32", "PAIR_PROMPTS": "100", "PROMPTS": "30", "EPOCHS": "1"}


def run_script(folder: Path, bin_folder: Path) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script with a python that only writes down how it is called: its end, and these commands."""
    bin_folder.mkdir(exist_ok=True)
    called = bin_folder / "commands"
    called.write_text("")
    (bin_folder / "python").write_text(f'#!/bin/sh\necho "$@" >> "{called}"\n')
    (bin_folder / "python").chmod(0o755)
    environment = os.environ | SHORT | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "scripts" / "rlhf_demo.sh", folder], env=environment, timeout=60,
                          capture_output=True, text=True)
    return done, called.read_text().splitlines()


def run_here(command: str) -> None:
    """A command in this process, so that torch is imported once for all."""
    arguments = shlex.split(command)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setattr("sys.argv", arguments)
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, command
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """The folder of the whole demo."""
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    done, commands = run_script(folder, folder.parent / "bin")
    assert done.returncode == 0, done.stderr
    assert len(commands) == 5
    for command in commands:
        run_here(command)
    return folder


@pytest.mark.slow
def test_pairs_prefer_a_right_answer_and_then_the_length_that_the_rule_likes(result):
    rows = [json.loads(line) for line in (result / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 30
    prompts = [json.loads(line)["prompt"] for line in (result / "prompts.jsonl").read_text().splitlines()]
    for row in rows:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert chosen["content"] != rejected["content"]
        assert row["prompt"] in prompts  # what the policy will be asked
        assert row["prompt"][-1]["content"].endswith('final answer after "####".')


@pytest.mark.slow
def test_the_policy_is_asked_what_the_pairs_are_about(result):
    sample = json.loads((result / "ppo_kl" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith('final answer after "####".')
    assert sample["prompt"].count("####") == 1


@pytest.mark.slow
def test_the_report_compares_the_start_and_both_policies(result):
    with open(result / "report.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["policy"] for row in table] == ["start", "ppo_kl", "ppo_no_kl"]
    rows = {row.pop("policy"): {name: float(x) for name, x in row.items()} for row in table}
    assert rows["start"]["win_rate"] == 0.5
    assert abs(rows["start"]["kl_per_response"]) < 1e-3
    assert all(row["prompts"] == 30 and row["win_rate_se"] < 0.1 for row in rows.values())
    assert rows["ppo_kl"]["kl_per_response"] != 0 != rows["ppo_no_kl"]["kl_per_response"]
    files = [next(result.glob(f"{name}/checkpoints/step_2/actor.*")) for name in ("ppo_kl", "ppo_no_kl")]
    assert files[0].read_bytes() != files[1].read_bytes()  # in the second step the KL is not 0
    assert (result / "report.png").stat().st_size > 10_000
    summary = json.loads((result / "ppo_no_kl" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["config"]["kl_ctrl_coef"] == 0
    assert (result / "reward_model" / "model" / "model.safetensors").is_file()


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    done, commands = run_script(tmp_path / "run", tmp_path / "bin")
    assert done.returncode == 2
    assert "choose another folder" in done.stderr
    assert commands == []
    assert list((tmp_path / "run").iterdir()) == []
