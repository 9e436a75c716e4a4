"""The GSM8K rules, the user's reward function and the shaping of scores."""

import concurrent.futures
import json
import math
import os
import subprocess
import sys
import time
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
    scores = ppo_llm.load_reward(Config())([""] * len(FORMS), responses, answers)
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
# load_reward, RewardFunction, score_responses.


def write_reward(tmp_path: Path, body: str, head: str = "") -> str:
    path = tmp_path / "my_reward.py"
    path.write_text(f"{head}\ndef score(prompts, responses, answers):\n    {body}\n")
    return f"{path}:score"


def reward_of(tmp_path: Path, body: str, head: str = "", **flags):
    return ppo_llm.load_reward(Config(reward=write_reward(tmp_path, body, head), **flags))


def measure(reward, texts: list[str], failed_score: float | None = None) -> tuple[torch.Tensor, dict]:
    examples = [Example(f"prompt {i}", f"answer {i}", [1]) for i in range(len(texts))]
    return ppo_llm.score_responses(reward, examples, texts, failed_score)


def scores_of(reward, texts: list[str]) -> torch.Tensor:
    return measure(reward, texts)[0]


def is_running(pid: int) -> bool:
    """Whether there is such a process, as a zombie too."""
    return Path(f"/proc/{pid}").exists()


def has_ended(pid: int) -> bool:
    """Whether a process has ended or does so at once; an orphan may stay a zombie where nobody collects it."""
    for _ in range(500):
        if not is_running(pid) or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.01)
    return False


def test_a_users_function_gets_prompts_responses_and_answers_in_order(tmp_path):
    body = "return [float(p[-1] + a[-1]) + len(r) / 10 for p, r, a in zip(prompts, responses, answers)]"
    assert scores_of(reward_of(tmp_path, body), ["", "x", "xx"]).tolist() == pytest.approx([0.0, 11.1, 22.2])


def test_a_users_file_may_use_its_own_imports_and_globals(tmp_path):
    (tmp_path / "beside.py").write_text("import math\nBONUS = math.pi\n")
    reward = reward_of(tmp_path, "return [beside.BONUS + math.e for _ in responses]", "import beside, math")
    assert scores_of(reward, ["a", "b"]).tolist() == pytest.approx([math.pi + math.e] * 2)


@pytest.mark.parametrize("head", ["from functools import partial\ndef f(x, p, r, a):\n    return [x] * len(r)\n"
                                  "score = partial(f, 3.0)", "class C:\n    def __call__(self, p, r, a):\n"
                                  "        return [3.0] * len(r)\nscore = C()"])
def test_a_reward_may_be_any_object_that_can_be_called(tmp_path, head):
    path = tmp_path / "my_reward.py"
    path.write_text(head)
    assert scores_of(ppo_llm.load_reward(Config(reward=f"{path}:score")), ["a", "b"]).tolist() == [3, 3]


def test_a_function_keeps_its_state_from_call_to_call_as_a_module_does(tmp_path):
    reward = reward_of(tmp_path, "CALLS.append(1); return [float(len(CALLS))] * len(responses)", "CALLS = []")
    assert [scores_of(reward, ["a"]).item() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("spec", ["gsm", "{}/missing.py:score", "{}/my_reward.py", "", ":f"])
def test_a_reward_that_is_no_file_and_no_model_is_refused_with_its_name(tmp_path, spec):
    spec = write_reward(tmp_path, "return []") and spec.format(tmp_path)
    with pytest.raises(UsageError, match="neither gsm8k, nor FILE.py:function") as error:
        ppo_llm.load_reward(Config(reward=spec))
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("name", ["missing", "", "NUMBER"])
def test_a_reward_file_without_the_function_is_refused(tmp_path, name):
    path = tmp_path / "my_reward.py"
    path.write_text("NUMBER = 3\n")
    with pytest.raises(UsageError, match=f"there is no function {name}"):
        ppo_llm.load_reward(Config(reward=f"{path}:{name}"))


def test_a_reward_file_that_cannot_be_imported_is_refused_with_the_reason_and_the_line(tmp_path):
    with pytest.raises(UsageError, match=r"No module named 'no_such_thing'.*my_reward\.py:1"):
        reward_of(tmp_path, "return []", "import no_such_thing")


@pytest.mark.parametrize("returned", ["[1.0]", "[1.0] * 4", "[]", "None", "2.0", "'abc'", "{'a': 1}"])
def test_anything_but_one_score_per_response_is_refused(tmp_path, returned):
    with pytest.raises(UsageError, match="must return 3 scores, one per response, not"):
        scores_of(reward_of(tmp_path, f"return {returned}"), ["a", "b", "c"])


@pytest.mark.parametrize("bad", ["None", "float('nan')", "float('inf')", "-float('inf')", "'1.0'", "[1.0]"])
def test_a_score_that_is_no_finite_number_is_refused_with_its_row_and_response(tmp_path, bad):
    with pytest.raises(UsageError, match="row 1") as error:
        scores_of(reward_of(tmp_path, f"return [1.0, {bad}, 0.0]"), ["first", "second", "third"])
    assert repr(eval(bad)) in str(error.value) and "second" in str(error.value)


def test_a_function_that_raises_ends_the_run_with_its_message_and_line(tmp_path):
    with pytest.raises(UsageError, match=r"ZeroDivisionError.*my_reward\.py:3"):
        scores_of(reward_of(tmp_path, "return [1 / 0]"), ["a"])


def test_zero_is_a_score_and_so_are_booleans_and_integers(tmp_path):
    reward = reward_of(tmp_path, "return [0.0, False, -0.0, True, 7, -2]", failed_score=-9.0)
    scores, metrics = measure(reward, list("abcdef"), -9.0)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0, 0, 0, 1, 7, -2] and metrics == {"failed": 0}


@pytest.mark.parametrize("returned", ["(len(x) for x in responses)", "numpy.array([0.0, 2.0])", "(0, numpy.int64(2))"])
def test_any_iterable_of_numbers_will_do(tmp_path, returned):
    assert scores_of(reward_of(tmp_path, f"return {returned}", "import numpy"), ["", "xx"]).tolist() == [0, 2]


def test_further_numbers_become_metrics(tmp_path):
    reward = reward_of(tmp_path, "return [1.0, 0.0], {'words': [3, 5], 'polite': [True, False]}")
    scores, metrics = measure(reward, ["a", "b"])
    assert scores.tolist() == [1, 0]
    assert {name: x.item() for name, x in metrics.items()} == {"words": 4, "polite": 0.5}


HANG = """
import os, signal, time
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
child = os.fork() if FORK else 1
if child == 0:
    os.closerange(0, 3)  # nobody shall wait for its output
    time.sleep(1000)
open(PIDS, "a").write(f"{os.getpid()} {child}\\n")
"""


@pytest.mark.parametrize("fork", [False, True])
def test_a_function_that_hangs_and_ignores_signals_is_killed_at_the_deadline(tmp_path, fork, capfd):
    head = f"FORK, PIDS = {fork}, {str(tmp_path / 'pids')!r}\n{HANG}"
    reward = reward_of(tmp_path, "time.sleep(1000)", head, reward_timeout=0.5)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"no answer within 0\.5 seconds"):
        scores_of(reward, ["a", "b"])
    assert time.monotonic() - began < 5
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split() if pid != "1"]
    assert len(pids) == 1 + fork
    assert not is_running(pids[0])  # waited for: not even a zombie
    assert all(map(has_ended, pids))
    assert 'my_reward.py", line 16 in score' in capfd.readouterr().err  # where it hung


@pytest.mark.parametrize("failure", ["time.sleep(1000)", "1 / 0", "os._exit(3)", "sys.exit()"])
def test_with_a_failed_score_only_the_rows_that_fail_get_it_and_are_counted(tmp_path, failure):
    body = f"if 'bad' in responses: {failure}\n    return [float(len(r)) for r in responses]"
    reward = reward_of(tmp_path, body, "import os, sys, time", reward_timeout=2.0, failed_score=-1.0)
    texts = ["x" * i for i in range(20)]
    texts[7] = "bad"
    scores, metrics = measure(reward, texts, -1.0)
    assert scores.tolist() == [*range(7), -1, *range(8, 20)]
    assert metrics["failed"].item() == 1 / 20
    assert scores_of(reward, ["x"] * 3).tolist() == [1, 1, 1]  # and it goes on


def test_a_score_that_is_no_number_counts_as_failed_where_there_is_a_failed_score(tmp_path):
    reward = reward_of(tmp_path, "return [1.0, None, 0.0]", failed_score=0.25)
    scores, metrics = measure(reward, ["a", "b", "c"], 0.25)
    assert scores.tolist() == [1, 0.25, 0]
    assert metrics["failed"].item() == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="failed on 2 of 3 responses"):
        measure(reward_of(tmp_path, "return [None, None, 0.0]", failed_score=0.25), ["a", "b", "c"], 0.25)


def test_a_reward_that_fails_on_many_responses_ends_the_run_all_the_same(tmp_path):
    body = "if 'bad' in responses: 1 / 0\n    return [1.0] * len(responses)"
    reward = reward_of(tmp_path, body, failed_score=0.0)
    assert measure(reward, ["bad"] * 2 + ["a"] * 18, 0.0)[1]["failed"].item() == 0.1
    with pytest.raises(UsageError, match="failed on 21 of 21|failed on 3 of 21"):
        measure(reward, ["bad"] * 3 + ["a"] * 18, 0.0)


def test_a_reward_that_only_hangs_is_given_up_after_a_tenth_of_the_rows(tmp_path):
    calls = tmp_path / "calls"
    body = f"open({str(calls)!r}, 'a').write('x'); time.sleep(1000)"
    reward = reward_of(tmp_path, body, "import time", reward_timeout=1.0, failed_score=0.0)
    began = time.monotonic()
    with pytest.raises(UsageError, match="failed on"):
        measure(reward, ["x"] * 40, 0.0)
    assert time.monotonic() - began < 20  # forty deadlines would be 40 s
    assert len(calls.read_text()) == 6  # the batch, and one row more than may fail


def test_the_deadline_holds_while_the_function_does_not_even_read(tmp_path):
    head = "import re, threading\ndef spin():\n    re.match(r'(a|a)*b', 'a' * 60)"  # keeps the interpreter to itself
    body = "threading.Thread(target=spin, daemon=True).start(); return [0.0] * len(responses)"
    reward, began = reward_of(tmp_path, body, head, reward_timeout=2.0), time.monotonic()
    with pytest.raises(UsageError, match="no answer within 2 seconds"):
        for _ in range(2):
            scores_of(reward, ["x" * 10**6] * 4)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("metrics", [
    "{'m': ['a', 'b']}", "{'m': [1, None]}", "{'m': [1]}", "{'m': 3}", "{'m': [[1], 2]}", "{'kl': [9, 9]}",
    "{'score': [1, 1]}", "{'kl_coef': [1, 1]}", "{'failed': [1, 1]}", "{'a\\nb': [1, 1]}"])
def test_a_metric_must_be_a_number_per_response_and_no_name_of_ours(tmp_path, metrics):
    with pytest.raises(UsageError, match="metric"):
        measure(reward_of(tmp_path, f"return [1.0, 0.0], {metrics}"), ["a", "b"])


def test_a_score_beyond_fp32_is_refused(tmp_path):
    with pytest.raises(UsageError, match="row 0"):
        measure(reward_of(tmp_path, "return [10 ** 400]"), ["a"])


def test_a_reward_may_use_a_process_pool(tmp_path):
    head = "from concurrent.futures import ProcessPoolExecutor\ndef one(r):\n    return float(len(r))"
    body = "\n    with ProcessPoolExecutor(1) as pool:\n        return list(pool.map(one, responses))"
    assert scores_of(reward_of(tmp_path, body, head), ["", "xx"]).tolist() == [0, 2]


def test_metrics_of_the_rows_are_put_together(tmp_path):
    body = "if 'bad' in responses: 1 / 0\n    return [1.0] * len(responses), {'n': [len(r) for r in responses]}"
    scores, metrics = measure(reward_of(tmp_path, body, failed_score=0.0), ["x", "bad", "xxx", "xxxxx"], 0.0)
    assert scores.tolist() == [1, 0, 1, 1]
    assert metrics["n"].item() == 3


def test_a_reward_can_be_called_from_any_thread(tmp_path):
    reward = reward_of(tmp_path, "return [1.0 * len(r) for r in responses]")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(scores_of, reward, ["", "xx"]).result(timeout=30).tolist() == [0, 2]


def test_a_function_sees_only_the_environment_that_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("JUDGE_URL", "http://judge")
    monkeypatch.setenv("JUDGE_KEY", "1234")
    head = "import os, pathlib\nFIRST = pathlib.Path('/proc/self/environ').read_text()"
    body = ("seen = [os.environ.get(x) for x in ('HF_TOKEN', 'JUDGE_URL', 'JUDGE_KEY')]\n"
            "    return [float(seen == [None, 'http://judge', '1234'] and 'secret' not in FIRST)]")
    assert scores_of(reward_of(tmp_path, body, head, reward_env="JUDGE_URL,JUDGE_KEY,ABSENT"), ["a"]).item() == 1
    assert scores_of(reward_of(tmp_path, body, head), ["a"]).item() == 0


def test_a_variable_that_is_not_set_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_URL", "http://judge")
    reward = reward_of(tmp_path, "return [float(os.environ['JUDGE_URL'] == 'http://judge')]", "import os",
                       reward_env=" JUDGE_URL, TYPO ")
    assert scores_of(reward, ["a"]).item() == 1
    assert "not set are TYPO" in capsys.readouterr().err


def test_the_process_ends_with_its_reward(tmp_path):
    reward = reward_of(tmp_path, "return [float(os.getpid())] * len(responses)", "import os")
    pid = int(scores_of(reward, ["a"]).item())
    assert is_running(pid)
    del reward
    assert not is_running(pid)


@pytest.mark.parametrize("hang", ["time.sleep(1000)", "re.match(r'(a|a)*b', 'a' * 60)"])
def test_a_function_that_hangs_ends_at_its_deadline_when_the_training_is_killed(tmp_path, hang):
    spec = write_reward(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {hang}",
                        "import os, re, time")
    config = f"ppo_llm.Config(reward={spec!r}, reward_timeout=3.0)"
    code = f"import ppo_llm; ppo_llm.load_reward({config})(['a'], ['b'], ['c'])"
    training = subprocess.Popen([sys.executable, "-c", code], cwd=Path(ppo_llm.__file__).parent)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert training.poll() is None
        time.sleep(0.05)
    training.kill()
    training.wait()
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_process_that_waits_ends_when_the_training_is_killed(tmp_path):
    spec = write_reward(tmp_path, "return [float(os.getpid())]", "import os")
    code = f"import os, ppo_llm; print(*ppo_llm.load_reward(ppo_llm.Config(reward={spec!r}))(['a'], ['b'], ['c'])[0])"
    code += "; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-uc", code], cwd=Path(ppo_llm.__file__).parent, stdout=subprocess.PIPE)
    assert done.returncode == -9 and has_ended(int(float(done.stdout)))


def test_what_a_function_prints_does_not_disturb_it(tmp_path, capfd):
    assert scores_of(reward_of(tmp_path, "print('judging'); return [2.0]"), ["a"]).item() == 2
    assert "judging" in capfd.readouterr().out


def test_responses_with_any_characters_reach_the_function_unchanged(tmp_path):
    texts = ["", "\n\r\x00\x85", "é漢🙂\ufffd", '"\\', " "]
    body = f"return [float(responses == {texts!r})] * 5"
    assert scores_of(reward_of(tmp_path, body), texts).tolist() == [1] * 5


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
