"""The GSM8K rules, the user's reward function and the scores it may return."""

import concurrent.futures
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import ppo_llm
from ppo_llm import Config, Example, UsageError, score_gsm8k_flexible, score_gsm8k_strict

GSM8K_50 = Path(__file__).parent / "data" / "gsm8k_50.jsonl"
FORMS = [  # response, answer, strict, flexible
    ("#### 42", "42", 1, 1), ("#### -5", "-5", 1, 1), ("#### 0", "0", 1, 1), ("#### 1,000", "1000", 1, 1),
    ("#### 1,450,000", "1450000", 1, 1), ("**#### 42**", "42", 1, 1), ("#### 42 apples", "42", 1, 1),
    ("#### 42\n", "42", 1, 1), ("#### 3\nno, wait\n#### 42", "42", 1, 1),
    ("5 + 37 = 42\n#### 42", "42", 1, 1),
    ("#### 0.5", "0.5", 1, 1), ("##### 42", "42", 1, 1), ("#### 42,", "42", 1, 1),
    ("#### 42 and 7 more words", "42", 1, 1),  # what follows the marked number does not count
    ("#### 42.", "42", 0, 1), ("#### 42.0", "42", 0, 1), ("#### 42.00", "42", 0, 1), ("#### $42", "42", 0, 1),
    ("#### $3.50", "3.5", 0, 1), ("#### -$5", "-5", 0, 1), ("#### $-5", "-5", 0, 1), ("####42", "42", 0, 1),
    ("####  42", "42", 0, 1), ("####\n42", "42", 0, 1), ("#### 1,234.50", "1234.5", 0, 1),
    ("#### .5", "0.5", 0, 1),
    ("#### 007", "7", 0, 1), ("#### 42", "42.0", 0, 1), ("#### 1,000.", "1000", 0, 1),
    ("#### 42%", "42", 1, 1),
    ("It is 42.", "42", 0, 1), ("It is 42. Great, thanks", "42", 0, 1), ("42, indeed", "42", 0, 1),
    ("42", "42", 0, 1),
    ("\\boxed{42}", "42", 0, 1), ("She pays $1,000.", "1000", 0, 1), ("3 + 4 = 7", "7", 0, 1),
    ("It is #### forty, I mean 42", "42", 0, 1), ("the change is -3 dollars", "-3", 0, 1),
    ("#### 10 * 5 = 50", "50", 0, 0), ("#### 42 ... and so #### 43", "42", 0, 0), ("42 of 50", "42", 0, 0),
    ("#### --5", "-5", 0, 0), ("#### --5", "5", 0, 0), ("no number at all", "42", 0, 0), ("", "42", 0, 0),
    ("#### ", "42", 0, 0), ("#### .", "42", 0, 0), ("#### ,", "42", 0, 0), ("...", "42", 0, 0),
    ("$", "42", 0, 0),
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
    examples = [Example("", answer, [1]) for answer in answers]
    assert ppo_llm.load_reward(Config())(examples, responses) == [form[2] for form in FORMS]


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


# ----------------------------------------------------------------------------------------------------------
# The user's function: FILE.py:function(prompts, responses, answers).


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch):
    """What a reward file imports and adds to the path is gone after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("reward_") or name in ("beside", "colorsys"):
            del sys.modules[name]


def write_reward(tmp_path: Path, body: str, head: str = "", name: str = "my_reward") -> str:
    path = tmp_path / f"{name}.py"
    path.write_text(f"{head}\ndef score(prompts, responses, answers):\n    {body}\n")
    return f"{path}:score"


def reward_of(tmp_path: Path, body: str, head: str = "", name: str = "my_reward"):
    return ppo_llm.load_reward(Config(reward=write_reward(tmp_path, body, head, name)))


def measure(reward, texts: list[str]) -> tuple[torch.Tensor, dict]:
    examples = [Example(f"prompt {i}", f"answer {i}", [1]) for i in range(len(texts))]
    return ppo_llm.score_responses(reward, examples, texts)


def scores_of(reward, texts: list[str]) -> torch.Tensor:
    return measure(reward, texts)[0]


def refusal(reward, texts: list[str]) -> str:
    with pytest.raises(UsageError) as error:
        measure(reward, texts)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_users_function_gets_prompts_responses_and_answers_in_order(tmp_path):
    body = "return [float(p[-1] + a[-1]) + len(r) / 10 for p, r, a in zip(prompts, responses, answers)]"
    assert scores_of(reward_of(tmp_path, body), ["", "x", "xx"]).tolist() == pytest.approx([0.0, 11.1, 22.2])


def test_responses_with_any_characters_reach_the_function_unchanged(tmp_path):
    texts = ["", "\n\r\x00\x85", "\u00e9\u6f22\U0001f642\ufffd", '"\\', " "]
    body = f"return [float(responses == {texts!r})] * 5"
    assert scores_of(reward_of(tmp_path, body), texts).tolist() == [1] * 5


def test_a_reward_file_may_import_a_neighbour_module(tmp_path):
    (tmp_path / "beside.py").write_text("import math\nBONUS = math.pi\n")
    reward = reward_of(tmp_path, "return [beside.BONUS + math.e for _ in responses]", "import beside, math")
    assert scores_of(reward, ["a", "b"]).tolist() == pytest.approx([math.pi + math.e] * 2)


def test_a_reward_file_may_import_a_neighbour_module_when_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "beside.py").write_text("BONUS = 2.5\n")
    spec = write_reward(tmp_path / "rewards", "import beside; return [beside.BONUS]")
    monkeypatch.chdir(tmp_path)  # a relative path, and the folder changes before the call
    reward = ppo_llm.load_reward(Config(reward=os.path.relpath(spec, tmp_path)))
    monkeypatch.chdir("/")
    assert scores_of(reward, ["a"]).tolist() == [2.5]


@pytest.mark.parametrize("name", ["colorsys", "math", "http", "json", "torch", "ppo_llm", "score"])
def test_a_reward_file_with_the_name_of_a_module_shadows_nothing(tmp_path, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)  # nobody has imported it yet
    modules = {x: sys.modules.get(x) for x in ("math", "http", "json", "torch", "ppo_llm")}
    head = "import colorsys, http, json, math"
    body = "return [math.sqrt(4) + colorsys.rgb_to_hsv(0, 0, 1)[2] + len(json.loads('[1]'))]"
    assert scores_of(reward_of(tmp_path, body, head, name), ["a"]).tolist() == [4]
    assert {x: sys.modules.get(x) for x in modules} == modules
    assert not str(sys.modules["colorsys"].__file__).startswith(str(tmp_path))


def test_the_classes_of_a_reward_file_know_their_module(tmp_path):
    head = "from dataclasses import dataclass\n@dataclass\nclass Rule:\n    weight: float = 2.0\n"
    assert scores_of(reward_of(tmp_path, "return [Rule().weight]", head), ["a"]).tolist() == [2]


@pytest.mark.parametrize("head", [
    "from functools import partial\ndef f(x, p, r, a):\n    return [x] * len(r)\nscore = partial(f, 3.0)",
    "class C:\n    def __call__(self, p, r, a):\n        return [3.0] * len(r)\nscore = C()",
    "score = lambda p, r, a: [3.0 for _ in r]"])
def test_a_reward_may_be_any_object_that_can_be_called(tmp_path, head):
    path = tmp_path / "my_reward.py"
    path.write_text(head)
    assert scores_of(ppo_llm.load_reward(Config(reward=f"{path}:score")), ["a", "b"]).tolist() == [3, 3]


def test_a_function_keeps_its_state_from_call_to_call_as_a_module_does(tmp_path):
    reward = reward_of(tmp_path, "CALLS.append(1); return [float(len(CALLS))] * len(responses)", "CALLS = []")
    assert [scores_of(reward, ["a"]).item() for _ in range(3)] == [1, 2, 3]


def test_a_reward_can_be_called_from_any_thread(tmp_path):
    reward = reward_of(tmp_path, "return [1.0 * len(r) for r in responses]")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(scores_of, reward, ["", "xx"]).result(timeout=30).tolist() == [0, 2]


# ----------------------------------------------------------------------------------------------------------
# Rewards that cannot be loaded.


@pytest.mark.parametrize(("body", "reason"), [
    ("import no_such_thing", "No module named 'no_such_thing'"), ("def score(:", "SyntaxError"),
    ("1 / 0", "ZeroDivisionError"), ("other = 3", "no attribute 'score'")])
def test_a_reward_file_that_cannot_be_imported_shows_its_traceback_and_a_sentence(tmp_path, capsys, body,
                                                                                  reason):
    path = tmp_path / "my_reward.py"
    path.write_text(f"\n{body}\n")
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        ppo_llm.load_reward(Config(reward=f"{path}:score"))
    sentence = str(error.value)
    assert sentence.startswith(f"reward {path}:score cannot be loaded: ") and reason in sentence
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_reward_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(UsageError, match="missing.py:score: there is no file '.*missing.py'"):
        ppo_llm.load_reward(Config(reward=f"{tmp_path}/missing.py:score"))


def test_a_reward_file_without_a_function_is_told_so(tmp_path):
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(UsageError, match=r"mine\.py', or no function is named after its :"):
        ppo_llm.load_reward(Config(reward=f"{tmp_path}/mine.py"))


def test_a_reward_that_is_no_file_and_no_model_is_refused_with_its_name():
    with pytest.raises(UsageError, match="model gms8k: "):
        ppo_llm.load_reward(Config(reward="gms8k"))


# ----------------------------------------------------------------------------------------------------------
# What a reward may return.


@pytest.mark.parametrize("returned", [
    "[0.0, 2.0]", "(x := [0, 2])", "[False, 2]", "numpy.array([0.0, 2.0])",
    "numpy.array([0, 2], dtype='int8')",
    "torch.tensor([0.0, 2.0])", "torch.tensor([0.0, 2.0], requires_grad=True)",
    "torch.tensor([0, 2], dtype=torch.bfloat16)", "[torch.tensor(0.0), torch.tensor([2.0])]",
    "[numpy.float32(0), fractions.Fraction(2)]", "numpy.array([0.0, 2.0]), {}",
    "[0, 2], {'a': numpy.ones(2)}"])
@torch.no_grad()
def test_lists_arrays_and_tensors_of_numbers_are_scores(tmp_path, returned):
    scores = scores_of(reward_of(tmp_path, f"return {returned}", "import fractions, numpy, torch"),
                       ["", "xx"])
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [0, 2]


def test_zero_is_a_score_and_so_are_booleans_and_integers(tmp_path):
    scores, metrics = measure(reward_of(tmp_path, "return [0.0, False, -0.0, True, 7, -2]"), list("abcdef"))
    assert scores.tolist() == [0, 0, 0, 1, 7, -2] and metrics == {}


@pytest.mark.parametrize("returned",
                         ["[1.0]", "[1.0] * 4", "[]", "{'a': 1}", "numpy.ones(4)", "torch.ones(1)"])
def test_another_number_of_scores_is_refused_with_both_numbers(tmp_path, returned):
    sentence = refusal(reward_of(tmp_path, f"return {returned}", "import numpy, torch"), ["a", "b", "c"])
    assert re.fullmatch("the reward returned [014] numbers as 'score' for 3 responses", sentence)


@pytest.mark.parametrize("name", ["kl", "score_std", "accuracy", "a b", "", "x/y"])
def test_a_metric_with_a_name_of_ours_or_with_none_is_refused(tmp_path, name):
    sentence = refusal(reward_of(tmp_path, f"return [1.0] * 3, {{{name!r}: [1.0] * 3}}"), ["a", "b", "c"])
    assert sentence == f"the reward called a metric {name!r}, which is no name or is one of ours"


@pytest.mark.parametrize("returned", ["None", "2.0", "[[1], [2]], 3", "[1.0, {}]", "numpy.ones((2, 2))"])
def test_what_is_no_list_of_numbers_is_refused(tmp_path, returned):
    sentence = refusal(reward_of(tmp_path, f"return {returned}", "import numpy"), ["a", "b"])
    assert sentence.startswith("the reward raised TypeError(")


@pytest.mark.parametrize("bad",
                         ["None", "float('nan')", "float('inf')", "-float('inf')", "'1.0'", "'good'", "1e39",
                                 "numpy.float64('nan')", "torch.tensor(float('inf'))", "numpy.str_('1')"])
def test_a_score_that_is_no_finite_number_is_refused_with_its_row(tmp_path, bad):
    import numpy

    returned = f"return [1.0, {bad}, 0.0]"
    sentence = refusal(reward_of(tmp_path, returned, "import numpy, torch"), ["first", "second", "third"])
    value = eval(bad, {"numpy": numpy, "torch": torch})
    assert sentence == f"the reward's score of row 1 is {value!r}, not a finite number"


@pytest.mark.parametrize("array",
                         ["numpy.array([1.0, 0.0, numpy.nan])", "torch.tensor([1.0, 0.0, float('nan')])"])
def test_arrays_and_tensors_are_searched_for_what_is_not_finite_too(tmp_path, array):
    sentence = refusal(reward_of(tmp_path, f"return {array}", "import numpy, torch"), ["a", "b", "c"])
    assert sentence.startswith("the reward's score of row 2 is ") and "nan" in sentence


def test_text_that_has_one_character_per_response_is_not_taken_for_scores(tmp_path):
    assert "row 0 is '1'" in refusal(reward_of(tmp_path, "return '123'"), ["a", "b", "c"])


@pytest.mark.parametrize(("body", "reason"), [
    ("return [1 / 0]", "ZeroDivisionError('division by zero')"),
    ("raise KeyError('a\\nb')", "KeyError('a\\nb')"),
    ("return [10 ** 400]", "OverflowError"), ("return undefined", "NameError"),
    ("assert False, 'no'", "AssertionError")])
def test_a_function_that_raises_shows_its_traceback_and_then_one_sentence(tmp_path, capsys, body, reason):
    sentence = refusal(reward_of(tmp_path, body), ["a"])
    assert sentence.startswith("the reward raised ") and reason in sentence
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert "OverflowError" in reason or 'my_reward.py", line 3, in score' in shown


def test_a_sentence_that_the_function_means_for_the_user_is_shown_without_a_traceback(tmp_path, capsys):
    body = "raise ppo_llm.UsageError('set REWARD_URL')"
    assert refusal(reward_of(tmp_path, body, "import ppo_llm"), ["a"]) == "set REWARD_URL"
    assert "Traceback" not in capsys.readouterr().err


def test_a_reward_that_fails_is_asked_again_at_the_next_batch(tmp_path):
    reward = reward_of(tmp_path, "return [1.0 / len(r) for r in responses]")
    assert "ZeroDivisionError" in refusal(reward, ["a", ""])
    assert scores_of(reward, ["a", "bb"]).tolist() == [1, 0.5]


# ----------------------------------------------------------------------------------------------------------
# What a reward measures besides.


def test_further_numbers_become_metrics(tmp_path):
    body = "return [1.0, 0.0], {'words': [3, 5], 'polite': [True, False], 'a.b-c': torch.tensor([1.0, 2.0])}"
    scores, metrics = measure(reward_of(tmp_path, body, "import torch"), ["a", "b"])
    assert scores.tolist() == [1, 0]
    assert {name: x.item() for name, x in metrics.items()} == {"words": 4, "polite": 0.5, "a.b-c": 1.5}


def test_a_metric_may_be_there_for_some_batches_only(tmp_path):
    reward = reward_of(tmp_path, "return [1.0, 0.0], {'m': [1, 2]} if 'b' in responses else {}")
    assert measure(reward, ["a", "b"])[1]["m"].item() == 1.5
    assert measure(reward, ["a", "a"])[1] == {}


@pytest.mark.parametrize("metrics", [
    "{'m': ['a', 'b']}", "{'m': [1, None]}", "{'m': [1]}", "{'m': 3}", "{'m': [[1], 2]}", "{'kl': [9, 9]}",
    "{'kl_coef': [1, 1]}", "{'score_std': [1, 1]}", "{'standard_error': [1, 1]}", "{'a\\nb': [1, 1]}",
    "{'': [1, 1]}", "{'a,b': [1, 1]}", "{'../x': [1, 1]}", "{'m': [1, float('nan')]}", "{3: [1, 1]}", "3",
    "None"])
def test_a_metric_must_be_a_number_per_response_and_no_name_of_ours(tmp_path, metrics):
    assert refusal(reward_of(tmp_path, f"return [1.0, 0.0], {metrics}"), ["a", "b"]).startswith("the reward")


def test_a_metric_that_is_not_finite_names_itself_and_its_row(tmp_path):
    sentence = refusal(reward_of(tmp_path, "return [1.0, 0.0], {'words': [3, None]}"), ["a", "b"])
    assert sentence == "the reward's words of row 1 is None, not a finite number"


def test_a_metric_named_score_does_not_replace_the_scores(tmp_path):
    scores, metrics = measure(reward_of(tmp_path, "return [1.0, 0.0], {'score': [7, 8]}"), ["a", "b"])
    assert scores.tolist() == [1, 0] and metrics == {}


# ----------------------------------------------------------------------------------------------------------
# The penalty of responses that were cut.


def sums_of_rewards(scores: list, stopped: list, penalty: float | None) -> list[float]:
    """What assign_credit makes of scores, without a critic and without a KL."""
    config = Config(adv_estimator="reinforce_plus_plus", kl_ctrl_coef=0.0, missing_eos_penalty=penalty)
    rows = len(scores)
    rollout = ppo_llm.Rollout([[1]] * rows, [[2, 3]] * rows, torch.ones(rows, 2), torch.zeros(rows, 2))
    rollout.scores = torch.tensor(scores)
    rollout.stopped = torch.tensor(stopped)
    ppo_llm.assign_credit(None, rollout, 0.0, config)
    return rollout.rewards.sum(1).tolist()


@pytest.mark.parametrize(("penalty", "expected"), [
    (None, [2, 2, -1, 0]), (0.5, [1.5, 2, -1.5, 0]), (0.0, [2, 2, -1, 0]), (-0.5, [2.5, 2, -0.5, 0])])
def test_the_missing_eos_penalty_is_subtracted_from_the_scores_of_responses_that_were_cut(penalty, expected):
    assert sums_of_rewards([2.0, 2.0, -1.0, 0.0], [False, True, False, True], penalty) == expected
