"""scripts/rewards/format.py and permuted.py, and scripts/gsm8k_prompts.py."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import transformers

import ppo_llm

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts" / "rewards"
LAID_OUT = [
    "2 + 2 = 4\n4 * 3 = 12\n#### 12", "She has 2*3=6.\nSo 6-1=$5 are left.\n#### 5",
    "a = 1\nb = -2.5\n#### -2.5",
    "  1 + 1 = 2\n500 * 2 = 1,000\n#### 1,000\n", "1 + 1 = 7\n7 + 1 = 9\n#### 9",  # wrong, but laid out
]
NOT_LAID_OUT = [
    "", "#### 12", "4 * 3 = 12\n#### 12", "2 + 2 = 4\n4 * 3 = 12\n#### 13",
    "2 + 2 = 4\n4 * 3 = 12\nThe end: #### 12",
    "2 + 2 = 4\nand so\n#### 4", "1 = 1, 2 = 2\n3 = 3\n#### 3", "2 + 2 = 4\n4 * 3 = 12\n#### 12\nDone.",
]


def load(name: str):
    """The hook as ppo_llm.py imports it."""
    spec = importlib.util.spec_from_file_location("hook", FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward


@pytest.mark.parametrize(("responses", "score"), [(LAID_OUT, 1.0), (NOT_LAID_OUT, 0.0)])
def test_the_format_reward_looks_at_the_layout_only(responses, score):
    blank = [""] * len(responses)
    assert load("format.py")(blank, responses, blank) == [score] * len(responses)


def test_the_permuted_reward_deals_out_the_strict_scores_of_gsm8k_in_another_order():
    responses = [f"so #### {number}" for number in range(1100, 1150)]
    answers = [f"a solution\n#### 1,{number:03}" for number in range(100, 110)] + ["7"] * 40
    reward = load("permuted.py")
    scores = reward([""] * 50, responses, answers)
    assert sorted(scores) == [0.0] * 40 + [1.0] * 10
    assert scores != [1.0] * 10 + [0.0] * 40  # as they were earned
    assert reward([""] * 50, responses, answers) == scores  # the same batch is always dealt the same way


def test_questions_that_carry_the_instruction_are_the_prompts_of_reward_gsm8k(tmp_path):
    questions = [{"question": "How many\u2028?", "answer": "1 + 1 = 2\n#### 1,002"},
                 {"question": "What?", "answer": "#### 3"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
    script = runpy.run_path(str(ROOT / "scripts" / "gsm8k_prompts.py"))
    script["main"](tmp_path, tmp_path / "new")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ppo_llm.DEMO.model)
    for name in ("train.jsonl", "test.jsonl"):
        rows = ppo_llm.read_rows(str(tmp_path / "new" / name), "train")
        theirs = ppo_llm.make_examples(rows, tokenizer, ppo_llm.Config(reward="f.py:f"), "SOURCE", True)
        ours = ppo_llm.make_examples(questions, tokenizer, ppo_llm.Config(reward="gsm8k"), "SOURCE", True)
        assert [example.prompt for example in theirs] == [example.prompt for example in ours]
        assert [example.answer for example in theirs] == [row["answer"] for row in questions]
