"""scripts/presets, scripts/check_run.py and the figures of scripts/experiment.py."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_classic
import ppo_llm
import ppo_llm_multigpu

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import experiment  # noqa: E402

PRESETS = sorted((ROOT / "scripts" / "presets").glob("*.sh"))
RECIPES = [*PRESETS, ROOT / "scripts" / "pretrain_critic.sh"]


def test_the_presets_are_those_that_the_readme_promises():
    assert [path.stem for path in PRESETS] == ["classic", "gsm8k_grpo", "gsm8k_ppo", "multigpu", "rlhf"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_at_most_15_lines_and_is_bash(path):
    assert len(path.read_text().splitlines()) <= 15
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_hardware_minutes_and_what_is_expected_and_ends_with_a_check(path):
    text = path.read_text()
    assert re.search(r"GPU|CPU", text) and re.search("[Mm]inutes", text) and "xpected" in text
    assert "set -euo pipefail" in text and ("check_run.py" in text or "sys.exit(" in text)


RUNS = [path for path in RECIPES if path.stem != "rlhf"]  # which calls rlhf_demo.sh


@pytest.mark.parametrize("path", [*RUNS, ROOT / "scripts" / "rlhf_demo.sh"], ids=lambda path: path.stem)
def test_the_options_in_a_recipe_exist(path):
    text = path.read_text().replace("\\\n", " ")
    common = "".join(re.findall(r'^common="(.*)"', text, re.MULTILINE))
    found = re.findall(r"(ppo_\w+)\.py (.*)", text)
    assert found
    for script, words in found:
        module = {"ppo_llm": ppo_llm, "ppo_llm_multigpu": ppo_llm_multigpu, "ppo_classic": ppo_classic}[script]
        options = re.findall(r"--(\w+)", words + common)
        assert [option for option in options if option not in module.Config.__annotations__] == []


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs scripts/check_run.py in this process: (exit code, or the sentence it ends with; what it printed)."""

    def run(*words) -> tuple:
        monkeypatch.setattr(sys, "argv", ["check_run.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / "check_run.py"))
        return ended.value.code, capsys.readouterr().out

    return run


def test_the_check_passes_fails_or_says_what_is_missing(tmp_path, check):
    rows = ["step,eval/score,reward/score", "0,0.2,", "1,,0.5", "2,0.8,0.6"]
    (tmp_path / "training_metrics.csv").write_text("\n".join(rows) + "\n")
    assert check(tmp_path, "eval/score", 0.8) == (0, f"{tmp_path}: eval/score 0.8000, at least 0.8 is expected\n")
    assert check(tmp_path, "eval/score", 0.51, "--last", 2)[0] == 1
    assert check(tmp_path, "eval/score", 0.2, "--step", 0)[0] == 0
    assert "has no column 'eval/scores'; it has eval/score, reward/score" in check(tmp_path, "eval/scores", 0.5)[0]
    assert "has no eval/score of step 1" in check(tmp_path, "eval/score", 0.5, "--step", 1)[0]
    assert "does not exist: give the folder of a run" in check(tmp_path / "none", "eval/score", 0.5)[0]


@pytest.mark.parametrize("name", ["demo", "kl", "format", "gsm8k", "timing"])
def test_no_legend_of_an_experiment_lies_over_a_curve_and_no_curve_on_the_frame(name, tmp_path, monkeypatch):
    drawn = []
    draw = experiment.plot.draw_comparison
    monkeypatch.setattr(experiment.plot, "draw_comparison", lambda *x: drawn.append(draw(*x)) or drawn[-1])
    for path in (ROOT / "docs" / "results" / name).glob("*.csv"):
        shutil.copy(path, tmp_path)
    experiment.draw_curves(name, tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert len(drawn[0].legends) == 1
    for axis in drawn[0].axes:
        assert axis.get_legend() is None and axis.get_ylabel() and axis.get_xlabel()
        low, high = axis.get_ylim()
        for line in axis.get_lines():
            assert low < min(line.get_ydata()) and max(line.get_ydata()) < high
