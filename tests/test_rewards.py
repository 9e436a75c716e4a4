"""The GSM8K rules, the user's reward function and the shaping of scores."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

import ppo_llm
from ppo_llm import Config, Example, UsageError, score_gsm8k_flexible, score_gsm8k_strict

GSM8K_50 = Path(__file__).parent / "data" / "gsm8k_50.jsonl"
FORMS = [  # response, answer, strict, flexible
    ("#### 42", "42", 1, 1), ("#### -5", "-5", 1, 1), ("#### 0", "0", 1, 1), ("#### 1,000", "1000", 1, 1),
    ("#### 1,450,000", "1450000", 1, 1), ("**#### 42**", "42", 1, 1), ("#### 42 apples", "42", 1, 1),
    ("#### 42\n", "42", 1, 1), ("#### 3\nno, wait\n#### 42", "42", 1, 1), ("5 + 37 = 42\n#### 42", "42", 1, 1),
    ("#### 0.5", "0.5", 1, 1), ("##### 42", "42", 1, 1), ("#### 42,", "42", 1, 1),
    ("#### 42 and 7 more words", "42", 1, 1),  # what follows the marked number does not count
    ("#### 42.", "42", 0, 1), ("#### 42.0", "42", 0, 1), ("#### 42.00", "42", 0, 1), ("#### $42", "42", 0, 1),
    ("#### $3.50", "3.5", 0, 1), ("#### -$5", "-5", 0, 1), ("#### $-5", "-5", 0, 1), ("####42", "42", 0, 1),
    ("####  42", "42", 0, 1), ("####\n42", "42", 0, 1), ("#### 1,234.50", "1234.5", 0, 1), ("#### .5", "0.5", 0, 1),
    ("#### 007", "7", 0, 1), ("#### 42", "42.0", 0, 1), ("#### 1,000.", "1000", 0, 1), ("#### 42%", "42", 1, 1),
    ("It is 42.", "42", 0, 1), ("It is 42. Great, thanks", "42", 0, 1), ("42, indeed", "42", 0, 1), ("42", "42", 0, 1),
    ("\\boxed{42}", "42", 0, 1), ("She pays $1,000.", "1000", 0, 1), ("3 + 4 = 7", "7", 0, 1),
    ("It is #### forty, I mean 42", "42", 0, 1), ("the change is -3 dollars", "-3", 0, 1),
    ("#### 10 * 5 = 50", "50", 0, 0), ("#### 42 ... and so #### 43", "42", 0, 0), ("42 of 50", "42", 0, 0),
    ("#### --5", "-5", 0, 0), ("#### --5", "5", 0, 0), ("no number at all", "42", 0, 0), ("", "42", 0, 0),
    ("#### ", "42", 0, 0), ("#### .", "42", 0, 0), ("#### ,", "42", 0, 0), ("...", "42", 0, 0), ("$", "42", 0, 0),
    ("#### 5", "-5", 0, 0), ("#### -5", "5", 0, 0), ("#### 421", "42", 0, 0), ("#### 4 2", "42", 0, 0),
    ("#### 42", "", 0, 0), ("#### 42", "forty-two", 0, 0), ("nothing", "", 0, 0), ("#### 1/2", "0.5", 0, 0),
]


@pytest.mark.parametrize(("response", "answer", "strict", "flexible"), FORMS)
def test_a_response_is_scored_by_both_gsm8k_rules(response, answer, strict, flexible):
    assert score_gsm8k_strict(response, answer) == strict
    assert score_gsm8k_flexible(response, answer) == flexible


def test_what_follows_the_first_marked_number_is_taken_literally():
    # "#### 10 * 5 = 50": the rule reads 10, as verl's does
    assert score_gsm8k_strict("#### 10 * 5 = 50", "10") == score_gsm8k_flexible("#### 10 * 5 = 50", "10") == 1


def test_the_strict_rule_looks_at_the_last_300_characters():
    answer = "#### 42"
    assert score_gsm8k_strict(answer + "." + "x" * (299 - len(answer)), "42.") == 1  # exactly 300 characters
    assert score_gsm8k_strict(answer + " " + "x" * (299 - len(answer)), "42") == 1
    assert score_gsm8k_strict(answer + " " + "x" * (300 - len(answer)), "42") == 0
    assert score_gsm8k_flexible(answer + " " + "x" * 1000, "42") == 1


def test_the_reward_named_gsm8k_is_the_strict_rule():
    responses, answers = [form[0] for form in FORMS], [form[1] for form in FORMS]
    scores = ppo_llm.load_reward("gsm8k")([""] * len(FORMS), responses, answers)
    assert scores == [form[2] for form in FORMS]


def test_a_long_response_of_digits_and_signs_is_scored_quickly():
    for text in ("-$" * 2000, "1," * 2000, "#### " * 1000, "." * 4000):
        assert score_gsm8k_flexible(text, "7") == 0  # a rule that backtracks would hang here


def answers_of(path: Path) -> list[tuple[str, str]]:
    """The solution as it is written, and the number after its mark, without commas."""
    solutions = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [(solution, solution[solution.rindex("#### ") + 5 :].replace(",", "")) for solution in solutions]


def check_answers(pairs: list[tuple[str, str]]) -> None:
    for solution, answer in pairs:
        for rule in (score_gsm8k_strict, score_gsm8k_flexible):
            assert rule(solution, answer) == 1, (solution, answer)
            for wrong in (f"{answer}1", f"1{answer}", str(int(answer) + 1), str(-int(answer) - 1), ""):
                assert rule(solution, wrong) == 0, (solution, wrong)


def test_both_rules_accept_gsm8ks_own_solutions_and_no_other_answer():
    pairs = answers_of(GSM8K_50)
    assert len(pairs) == 50
    assert {"-10", "-3", "1875"} <= {answer for _, answer in pairs}  # a sign and a comma are among them
    check_answers(pairs)


def test_both_rules_accept_all_8792_solutions_of_gsm8k():
    folder = os.environ.get("GSM8K_DIR")
    if not folder:
        pytest.skip("GSM8K_DIR names no folder with train.jsonl and test.jsonl")
    pairs = answers_of(Path(folder, "train.jsonl")) + answers_of(Path(folder, "test.jsonl"))
    assert len(pairs) == 8792
    check_answers(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# load_reward, score_responses.


def write_reward(tmp_path: Path, body: str) -> str:
    path = tmp_path / "my_reward.py"
    path.write_text(f"def score(prompts, responses, answers):\n    return {body}\n")
    return f"{path}:score"


def scores_of(reward, texts: list[str]) -> torch.Tensor:
    examples = [Example(f"prompt {i}", f"answer {i}", [1]) for i in range(len(texts))]
    return ppo_llm.score_responses(reward, examples, texts)


def test_a_users_function_gets_prompts_responses_and_answers_in_order(tmp_path):
    body = "[float(p[-1] + a[-1]) + len(r) / 10 for p, r, a in zip(prompts, responses, answers)]"
    scores = scores_of(ppo_llm.load_reward(write_reward(tmp_path, body)), ["", "x", "xx"])
    assert scores.tolist() == pytest.approx([0.0, 11.1, 22.2])


def test_a_users_file_may_use_its_own_imports_and_globals(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("import math\nBONUS = math.pi\ndef score(p, r, a):\n    return [BONUS + math.e for _ in r]\n")
    scores = scores_of(ppo_llm.load_reward(f"{path}:score"), ["a", "b"])
    assert scores.tolist() == pytest.approx([math.pi + math.e] * 2)


@pytest.mark.parametrize("spec", ["gsm", "{}/missing.py:score", "{}/my_reward.txt:score", "{}/my_reward.py", "", ":f"])
def test_a_reward_that_is_no_file_is_refused_with_its_name(tmp_path, spec):
    write_reward(tmp_path, "[]")
    (tmp_path / "my_reward.txt").write_text("")
    spec = spec.format(tmp_path)
    with pytest.raises(UsageError, match="neither gsm8k nor FILE.py:function") as error:
        ppo_llm.load_reward(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("name", ["missing", "", "NUMBER"])
def test_a_reward_file_without_the_function_is_refused(tmp_path, name):
    path = tmp_path / "my_reward.py"
    path.write_text("NUMBER = 3\n")
    with pytest.raises(UsageError, match="no function"):
        ppo_llm.load_reward(f"{path}:{name}")


@pytest.mark.parametrize(("returned", "count"), [([1.0], 1), ([1.0] * 4, 4), ([], 0)])
def test_a_wrong_number_of_scores_is_refused_with_both_numbers(returned, count):
    with pytest.raises(UsageError, match=f"{count} scores for 3 responses"):
        scores_of(lambda p, r, a: returned, ["a", "b", "c"])


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, "1.0", [1.0], 1j])
def test_a_score_that_is_no_finite_number_is_refused_with_its_row_and_response(bad):
    with pytest.raises(UsageError, match="row 1") as error:
        scores_of(lambda p, r, a: [1.0, bad, 0.0], ["first", "second", "third"])
    assert repr(bad) in str(error.value) and "second" in str(error.value)


def test_a_reward_that_returns_nothing_is_refused():
    with pytest.raises(UsageError, match="None"):  # a forgotten return
        scores_of(lambda p, r, a: None, ["a", "b"])


def test_zero_is_a_score_and_so_are_booleans_and_integers():
    scores = scores_of(lambda p, r, a: [0.0, False, -0.0, True, 7, -2], list("abcdef"))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0, 0, 0, 1, 7, -2]


def test_any_iterable_of_scores_will_do():
    assert scores_of(lambda p, r, a: (len(x) for x in r), ["", "xx"]).tolist() == [0, 2]


# ---------------------------------------------------------------------------------------------------------------------
# shape_scores.


def shaped(scores: list, lengths: list | None = None, stopped: list | None = None, **flags) -> list[float]:
    config = Config(max_response_length=20, **flags)
    lengths = torch.tensor([float(n) for n in lengths or [5] * len(scores)])
    stopped = torch.tensor([True] * len(scores) if stopped is None else stopped)
    return ppo_llm.shape_scores(torch.tensor(scores), lengths, stopped, config).tolist()


def test_without_rules_a_score_is_what_the_reward_gave():
    assert shaped([1.0, -3.0, 0.0], [20, 20, 1], [False, False, True]) == [1, -3, 0]


@pytest.mark.parametrize(("mode", "expected"), [("subtract", 1.5), ("replace", -0.5), ("scale", 1.0)])
def test_the_missing_eos_rule_touches_only_responses_that_were_cut(mode, expected):
    scores = shaped([2.0, 2.0], [20, 20], [False, True], missing_eos_penalty=0.5, missing_eos_mode=mode)
    assert scores == [expected, 2]  # 2 - .5, -.5, 2 * .5


def test_a_missing_eos_penalty_of_zero_is_a_rule_too():
    assert shaped([2.0], stopped=[False], missing_eos_penalty=0.0, missing_eos_mode="scale") == [0]
    assert shaped([2.0], stopped=[False], missing_eos_penalty=0.0, missing_eos_mode="replace") == [0]


def test_the_overlong_penalty_grows_from_0_to_1_over_the_buffer():
    # limit 20, buffer 8: nothing up to 12 tokens, then an eighth per token
    assert shaped([1.0] * 5, [1, 12, 13, 16, 20], overlong_buffer=8) == [1, 1, 0.875, 0.5, 0]


def test_scores_are_clipped_on_both_sides():
    assert shaped([-9.0, -2.0, 0.5, 2.0, 9.0], score_clip=2.0) == [-2, -2, 0.5, 2, 2]


@pytest.mark.parametrize(("mode", "expected"), [("subtract", -4.0), ("replace", -6.0), ("scale", 9.0)])
def test_scores_are_clipped_before_the_stop_rule_and_the_overlong_penalty_comes_last(mode, expected):
    # 9 is clipped to 2; the stop rule with 5 makes it -3, -5 or 10; then 1 off for a full buffer
    scores = shaped([9.0], [20], [False], score_clip=2.0, missing_eos_penalty=5.0, missing_eos_mode=mode,
                    overlong_buffer=4)
    assert scores == [expected]
