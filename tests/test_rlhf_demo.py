"""scripts/rlhf_demo.sh, shortened: preference pairs, reward model, PPO with and without KL, report."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    environment = os.environ | {"STEPS": "2", "PROMPTS": "30", "PAIR_PROMPTS": "150", "EPOCHS": "1",
                                "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "scripts" / "rlhf_demo.sh", folder], env=environment, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_pairs_prefer_a_right_answer_and_then_the_length_that_the_rule_likes(result):
    rows = [json.loads(line) for line in (result / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 40
    for row in rows:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert chosen["content"] != rejected["content"]
        assert row["prompt"][-1]["content"].endswith('final answer after "####".')  # what the policy will be asked


@pytest.mark.slow
def test_the_report_compares_the_start_and_both_policies(result):
    with open(result / "report.csv", newline="") as file:
        rows = {row["policy"]: {k: float(x) for k, x in row.items() if k != "policy"} for row in csv.DictReader(file)}
    assert list(rows) == ["start", "ppo_kl", "ppo_no_kl"]
    assert rows["start"]["win_rate"] == 0.5 and abs(rows["start"]["kl_per_response"]) < 1e-3
    assert all(row["prompts"] == 30 and row["win_rate_se"] < 0.1 for row in rows.values())
    assert (result / "report.png").stat().st_size > 10_000
    summary = json.loads((result / "ppo_no_kl" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["config"]["kl_ctrl_coef"] == 0
    assert (result / "reward_model" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_existing_folder_is_left_alone(result):
    before = sorted(path.name for path in result.iterdir())
    done = subprocess.run(["bash", ROOT / "scripts" / "rlhf_demo.sh", result], capture_output=True, text=True)
    assert done.returncode == 2 and "choose another folder" in done.stderr
    assert sorted(path.name for path in result.iterdir()) == before
