"""scripts/rewards/isolated.py around rewards that hang, die, print, fail and start processes of their own."""

import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "scripts" / "rewards" / "isolated.py"
REWARDS = r"""
import json, os, re, signal, subprocess, sys, threading, time

CALLS = []

def length(prompts, responses, answers):
    return [len(response) for response in responses]

def echo(prompts, responses, answers):
    return [1.0 for _ in responses], {"same": [p == r == a for p, r, a in zip(prompts, responses, answers)]}

def count_calls(prompts, responses, answers):
    CALLS.append(os.getpid())
    return [len(CALLS)], {"pid": [os.getpid()]}

def arrays(prompts, responses, answers):
    import numpy
    scores = numpy.arange(2, dtype="float32")
    return list(scores), {"words": numpy.array([1, 2]), "flag": [numpy.bool_(True), False]}

def not_numbers(prompts, responses, answers):
    return [None, float("nan"), float("-inf"), True]

def hang(prompts, responses, answers):
    for number in range(1, 32):
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            pass
    if responses[0] == "hang":
        time.sleep(1000)
    return [1.0]

def hang_with_the_interpreter(prompts, responses, answers):
    re.match(r"(a|a)*b", "a" * 60)  # a loop in C that lasts for years

def hang_after_the_answer(prompts, responses, answers):
    threading.Timer(0.05, re.match, args=(r"(a|a)*b", "a" * 60)).start()
    return [1.0]

def die(prompts, responses, answers):
    if responses[0] == "die":
        os._exit(7)
    return [1.0]

def grandchildren(prompts, responses, answers):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    program = subprocess.Popen(["sleep", "1000"])
    with open(responses[0], "w") as file:
        file.write(f"{os.getpid()} {child} {program.pid}\n")
    if answers[0] == "die":
        os._exit(7)
    time.sleep(1000)

def session_of_its_own(prompts, responses, answers):
    program = subprocess.Popen(["sleep", "30"], start_new_session=True)
    with open(responses[0], "w") as file:
        file.write(str(program.pid))
    time.sleep(1000)

def show_and_hang_with_the_interpreter(prompts, responses, answers):
    program = subprocess.Popen(["sleep", "1000"])
    with open(responses[0] + ".new", "w") as file:
        file.write(f"{os.getpid()} {program.pid}")
    os.rename(responses[0] + ".new", responses[0])
    re.match(r"(a|a)*b", "a" * 60)

def environment(prompts, responses, answers):
    raise ValueError(json.dumps(dict(os.environ)))

def prints(prompts, responses, answers):
    print("printed", '{"scores": [9]}')
    os.write(1, b"written\n")
    subprocess.run(["echo", "echoed"])
    print("said", file=sys.stderr)
    return [float(sys.stdin.read() == "")]

def fail(prompts, responses, answers):
    return [1 / len(responses[0])]

def leave(prompts, responses, answers):
    sys.exit("enough")

def no_numbers_at_all(prompts, responses, answers):
    return [object()]

def large(prompts, responses, answers):
    return [0.123456789] * 200_000, {"x": [1] * 200_000, "letters": [sum(map(len, responses))]}
"""


def load(reward: str, monkeypatch, seconds: float = 20.0, passed_on: str = "", file: Path = FILE):
    """The hook as ppo_llm.py imports it."""
    monkeypatch.setenv("REWARD", reward)
    monkeypatch.setenv("REWARD_SECONDS", str(seconds))
    monkeypatch.setenv("REWARD_ENV", passed_on)
    spec = importlib.util.spec_from_file_location("hook", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_reward.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def isolated(file, monkeypatch):
    """Makes isolated rewards, and ends their processes after the test."""
    rewards = []

    def make(name: str, **settings):
        rewards.append(load(f"{file}:{name}", monkeypatch, **settings))
        return rewards[-1]

    yield make
    for reward in rewards:
        if reward.process is not None:
            reward.end()


def call(reward, *responses: str, answer: str = ""):
    return reward([""] * len(responses), list(responses), [answer] * len(responses))


def has_ended(pid: int) -> bool:
    """Whether a process ends within 5 seconds. An orphan may stay a zombie where nobody collects it."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(500):
        try:
            if "State:\tZ" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


# ---- What goes in and comes out ----------------------------------------------------------------------------


def test_scores_come_back_in_order(isolated):
    assert call(isolated("length"), "", "a", "bb") == ([0, 1, 2], {})


def test_texts_arrive_as_they_were_sent_and_metrics_come_back(isolated):
    texts = ["two\nlines", 'a "quote" \\', "\u00fc\u4e2d\U0001f600", "\u2028", "\ud83d", "\x00", ""]
    scores, metrics = isolated("echo")(texts, texts, texts)
    assert scores == [1.0] * len(texts)
    assert metrics == {"same": [True] * len(texts)}


def test_the_process_is_kept_from_batch_to_batch(isolated):
    reward = isolated("count_calls")
    (first, pids), (second, same_pids) = call(reward, "a"), call(reward, "a")
    assert (first, second) == ([1], [2])
    assert pids == same_pids != {"pid": [os.getpid()]}


def test_the_deadline_of_an_answered_batch_does_not_touch_the_process_later(isolated, capfd):
    reward = isolated("count_calls", seconds=0.3)
    assert call(reward, "a")[0] == [1]
    time.sleep(1.5)
    assert call(reward, "a")[0] == [2]
    assert capfd.readouterr().err == ""


def test_numbers_of_numpy_become_plain_numbers(isolated):
    assert call(isolated("arrays"), "a", "b") == ([0.0, 1.0], {"words": [1, 2], "flag": [True, False]})


def test_what_is_no_number_comes_back_as_it_is_for_the_training_process_to_refuse(isolated):
    scores, _ = call(isolated("not_numbers"), "a", "b", "c", "d")
    assert scores[0] is None and scores[1] != scores[1] and scores[2:] == [float("-inf"), True]


def test_batches_and_answers_of_several_megabytes_pass(isolated):
    reward = isolated("large")
    for _ in range(2):
        scores, metrics = call(reward, *["x" * 30_000] * 100)
        assert scores == [0.123456789] * 200_000
        assert metrics == {"x": [1] * 200_000, "letters": [3_000_000]}


def test_what_the_function_prints_or_reads_does_not_disturb_the_answer(isolated, capfd):
    assert call(isolated("prints"), "a") == ([1.0], {})
    out, err = capfd.readouterr()
    assert out.splitlines() == ['printed {"scores": [9]}', "written", "echoed"]
    assert "said" in err


def test_a_file_may_use_its_neighbours_and_what_the_training_process_can_import(tmp_path, monkeypatch):
    (tmp_path / "http.py").write_text("raise RuntimeError('this is not the http of the standard library')")
    (tmp_path / "neighbour.py").write_text("SCORE = 3.0")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "installed.py").write_text("SCORE = 4.0")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses, urllib.request, installed, neighbour\n"
        "@dataclasses.dataclass\nclass Score:\n    x: float\n"
        "def f(prompts, responses, answers):\n    return [Score(neighbour.SCORE).x, installed.SCORE]\n")
    reward = load(f"{tmp_path}/mine.py:f", monkeypatch)
    assert call(reward, "a", "b") == ([3.0, 4.0], {})
    reward.end()


def test_a_copy_beside_files_with_the_names_of_modules_works_too(file, tmp_path, monkeypatch):
    (tmp_path / "isolated.py").write_text(FILE.read_text())
    (tmp_path / "json.py").write_text("raise RuntimeError('this is not the json of the standard library')")
    reward = load(f"{file}:length", monkeypatch, file=tmp_path / "isolated.py")
    assert call(reward, "a") == ([1], {})
    reward.end()


def test_the_function_sees_the_variables_that_are_named_and_no_other(isolated, monkeypatch):
    monkeypatch.setenv("API_KEY", "k")
    monkeypatch.setenv("OTHER", "o")
    monkeypatch.setenv("HF_TOKEN", "t")
    with pytest.raises(RuntimeError) as error:
        call(isolated("environment", passed_on="API_KEY, OTHER"), "a")
    seen = json.loads(str(error.value).split("ValueError: ")[1])
    seen.pop("LC_CTYPE", None)  # Python sets it where there is no locale
    expected = {"PATH", "HOME", "API_KEY", "OTHER"} & set(os.environ)
    assert seen == {name: os.environ[name] for name in expected}


def test_values_of_named_variables_are_not_shown_in_errors(isolated, monkeypatch, capfd):
    monkeypatch.setenv("API_KEY", "sk-0123456789")
    with pytest.raises(RuntimeError) as error:
        call(isolated("environment", passed_on="API_KEY"), "a")
    assert "sk-0123456789" not in str(error.value) + capfd.readouterr().err
    assert '"API_KEY": "<API_KEY>"' in str(error.value)


# ---- What goes wrong ---------------------------------------------------------------------------------------


def test_an_exception_is_shown_with_its_traceback_and_the_process_goes_on(isolated, capfd):
    reward = isolated("fail")
    assert call(reward, "abcd") == ([0.25], {})
    process = reward.process
    with pytest.raises(RuntimeError, match=r"\.py:fail failed: ZeroDivisionError: division by zero$"):
        call(reward, "")
    shown = capfd.readouterr().err
    assert shown.startswith("Traceback")
    assert re.search(r'my_reward\.py", line \d+, in fail\n    return \[1 / len\(responses\[0\]\)\]\n', shown)
    assert call(reward, "ab") == ([0.5], {})
    assert reward.process is process


@pytest.mark.parametrize(("name", "said"), [
    ("leave", "SystemExit: enough"), ("no_numbers_at_all", "TypeError: float\\(\\) argument"),
    ("missing", "has no attribute 'missing'")])
def test_other_failures_of_the_function_are_shown_too(isolated, name, said):
    with pytest.raises(RuntimeError, match=said):
        call(isolated(name), "a")


def test_a_file_that_cannot_be_imported_is_shown_with_its_traceback(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text("import no_such_thing")
    reward = load(f"{tmp_path}/mine.py:f", monkeypatch)
    with pytest.raises(RuntimeError, match="No module named 'no_such_thing'"):
        call(reward, "a")
    assert 'mine.py", line 1' in capfd.readouterr().err
    reward.end()


def test_a_function_that_hangs_and_ignores_signals_is_killed_and_the_next_batch_goes_on(isolated, capfd):
    reward = isolated("hang", seconds=0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"my_reward\.py:hang: no scores within 0\.5 seconds"):
        call(reward, "hang")
    assert time.monotonic() - began < 5
    assert re.search(r'my_reward\.py", line \d+ in hang\n', capfd.readouterr().err)  # where it hung
    process = reward.process
    assert call(reward, "go") == ([1.0], {})
    assert reward.process is not process


def test_the_deadline_holds_while_the_function_keeps_the_interpreter(isolated, capfd):
    reward = isolated("hang_with_the_interpreter", seconds=0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no scores within 0\.5 seconds"):
        call(reward, "a")
    assert time.monotonic() - began < 5
    assert "in hang_with_the_interpreter\n" in capfd.readouterr().err


def test_the_deadline_holds_while_the_batch_is_sent(isolated):
    reward = isolated("hang_after_the_answer", seconds=0.5)
    assert call(reward, "a") == ([1.0], {})
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match=r"no scores within 0\.5 seconds"):
        call(reward, *["x" * 1_000_000] * 4)  # more than the connection holds


def test_a_process_that_dies_is_said_at_once_and_the_next_batch_has_a_new_one(isolated):
    reward = isolated("die")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"my_reward\.py:die: its process ended with exit code 7"):
        call(reward, "die")
    assert time.monotonic() - began < 5
    assert call(reward, "go") == ([1.0], {})


def test_a_process_that_died_between_two_batches_is_replaced(isolated):
    reward = isolated("count_calls")
    call(reward, "a")
    reward.process.kill()
    reward.process.wait()
    assert call(reward, "a")[0] == [1]


@pytest.mark.parametrize(("end", "said"), [("hang", "no scores within"), ("die", "exit code 7")])
def test_what_the_function_started_ends_with_it(isolated, tmp_path, end, said):
    pids = tmp_path / "pids"
    with pytest.raises(RuntimeError, match=said):
        call(isolated("grandchildren", seconds=0.5), str(pids), answer=end)
    assert len(pids.read_text().split()) == 3
    assert all(has_ended(int(pid)) for pid in pids.read_text().split())


@pytest.mark.slow
def test_a_program_with_a_session_of_its_own_survives_as_security_md_says(isolated, tmp_path):
    path = tmp_path / "pid"
    with pytest.raises(RuntimeError, match="no scores within"):
        call(isolated("session_of_its_own", seconds=2), str(path))
    pid = int(path.read_text())
    state = Path(f"/proc/{pid}/status").read_text()
    os.kill(pid, signal.SIGKILL)
    assert "State:\tS" in state


def test_all_ends_when_the_training_process_is_killed_and_the_function_keeps_the_interpreter(file, tmp_path):
    pids = tmp_path / "pids"
    training = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("hook", {str(FILE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.reward([""], [{str(pids)!r}], [""])
"""
    reward = f"{file}:show_and_hang_with_the_interpreter"
    environment = os.environ | {"REWARD": reward, "REWARD_SECONDS": "1000", "REWARD_ENV": ""}
    process = subprocess.Popen([sys.executable, "-c", training], env=environment)
    while not pids.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(pids.read_text().split()) == 2
    assert all(has_ended(int(pid)) for pid in pids.read_text().split())


# ---- What is refused at the start --------------------------------------------------------------------------


def test_without_a_reward_the_import_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("REWARD", raising=False)
    with pytest.raises(RuntimeError, match="set REWARD=FILE.py:function"):
        runpy.run_path(str(FILE))


@pytest.mark.parametrize("reward", ["missing.py:f", "gsm8k", ""])
def test_a_reward_that_is_no_file_is_refused(monkeypatch, reward):
    with pytest.raises(RuntimeError, match="REWARD must be FILE.py:function of a file that exists"):
        load(reward, monkeypatch)


def test_a_variable_that_is_named_but_not_set_is_refused(file, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(RuntimeError, match="not set: NO_SUCH_KEY$"):
        load(f"{file}:length", monkeypatch, passed_on="PATH,NO_SUCH_KEY")
