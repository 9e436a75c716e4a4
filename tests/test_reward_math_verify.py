"""scripts/rewards/math_verify.py: equal in mathematics, however it is written."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "scripts" / "rewards" / "math_verify.py"
EQUAL = [  # response, answer
    ("so it is \\boxed{\\frac{1}{2}}", "1/2"), ("It is 0.5.", "1/2"), ("\\frac{1}{2}", "1/2"),
    ("2/4", "\\frac{1}{2}"), ("The answer is $x=3$.", "3"), ("The answer is 3", "x=3"), ("x = 3", "x=3"),
    ("She has 1100 apples.", "1,100"), ("It is 1,100.", "1100"), ("\\boxed{1{,}100}", "1100"),
    ("#### $1,100", "1,100"), ("#### 18", "18 + 0 = 18\n#### 18"), ("\\boxed{4}", "so it is $\\boxed{4}$"),
    ("4", "\\sqrt{16}"), ("-7", "-7.0"), ("5%", "0.05"), ("$\\boxed{(1, 2)}$", "(1,2)"),
    ("first 7, then 3", "3"), ("7", "$4$ of $7$"), ("0.5", "\\[\\frac{1}{2}\\]"),
    ("20", "18 and 2 more\n#### 20"), ("$(1, 2)$", "1 < x < 2"),
]
UNEQUAL = [
    ("\\boxed{\\frac{1}{3}}", "1/2"), ("11", "1,100"), ("x = 4", "x=3"), ("\\boxed{19}", "#### 18"),
    ("7", "-7"), ("first 3, then 7", "3"), ("no idea", "3"), ("", "3"), ("\\boxed{}", "3"),
    ("\\boxed{(2, 1)}", "(1, 2)"), ("$1 < x < 2$", "(1, 2)"),
]


def load(file: Path = FILE):
    """The hook as ppo_llm.py imports it: its file has the name of the package that it needs."""
    spec = importlib.util.spec_from_file_location("hook", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("math_verify", reason="math-verify is an optional package: pip install math-verify")
    return load()


def score(reward, response: str, answer: str) -> float:
    scores, _ = reward([""], [response], [answer])
    return scores[0]


@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_what_is_equal_scores_1(reward, response, answer):
    assert score(reward, response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), UNEQUAL)
def test_what_is_not_equal_scores_0(reward, response, answer):
    assert score(reward, response, answer) == 0.0


def test_a_batch_is_scored_in_order_and_answers_that_cannot_be_read_are_counted(reward):
    scores, metrics = reward([""] * 3, ["3", "3", "1/2"], ["3", "", "0.5"])
    assert scores == [1.0, 0.0, 1.0]
    assert metrics == {"unreadable_answer": [0.0, 1.0, 0.0]}


def test_without_the_package_the_import_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    with pytest.raises(RuntimeError, match="needs a package: pip install math-verify"):
        load()


def test_it_works_in_a_process_of_its_own_too(reward, monkeypatch):
    monkeypatch.setenv("REWARD", f"{FILE}:reward")
    monkeypatch.setenv("REWARD_ENV", "")
    isolated = load(FILE.with_name("isolated.py"))
    assert isolated(["", ""], ["3", "4"], ["x=3", "x=3"]) == ([1.0, 0.0], {"unreadable_answer": [0.0, 0.0]})
    isolated.end()
