"""Nothing lost, nothing mixed, nothing silent: runs that are damaged, stopped, doubled or misled, and what they say.

A run here is the command line in a forked process: real signals, exit codes and messages without a second import.
"""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, make_models, read_log

import ppo_llm

ROOT = Path(ppo_llm.__file__).parent
REWARD = """
import os
import signal
calls = []

def coin(prompts, responses, answers):  # 0 or 1, as good as random, and a signal in one of its calls
    calls.append(1)
    for name in ("SIGINT", "SIGTERM"):
        if str(len(calls)) in os.environ.get(name, "").split():
            os.kill(os.getpid(), getattr(signal, name))
    if str(len(calls)) == os.environ.get("FAIL"):
        raise KeyError("no such column")
    return [float(sum(map(ord, response)) % 2) for response in responses]
"""


@dataclasses.dataclass
class Done:
    code: int
    out: str
    err: str


def in_a_process(function, cwd: Path, **environment) -> Done:
    """Calls function in a fork of this process: its exit code and what it wrote."""
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = cwd / "stdout.txt", cwd / "stderr.txt"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(cwd)
            os.environ.update({name: str(x) for name, x in environment.items()})
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            sys.stdout = open(1, "w", buffering=1)
            sys.stderr = open(2, "w", buffering=1)
            code = function()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Done(status, out.read_bytes().decode(), err.read_bytes().decode())


def flags(folder: Path, **changes) -> list[str]:
    """Five steps of 4 of 10 prompts with an evaluation after every other one, in the folder `run`."""
    settings = {
        "model": folder, "dataset": folder / "prompts.jsonl", "reward": f"{folder}/signals.py:coin", "device": "cpu",
        "train_batch_size": 4, "ppo_mini_batch_size": 2, "max_prompt_length": 16, "max_response_length": 8,
        "total_steps": 5, "lr": 1e-3, "critic_lr": 1e-2, "eval_every": 2, "eval_dataset": folder / "prompts.jsonl",
        "eval_size": 3, "save_every": 0, "output_dir": "run"}
    return [f"--{name}={x}" for name, x in (settings | changes).items() if x is not None]


def run(folder: Path, cwd: Path, prepare=None, environment=None, **changes) -> Done:
    """The command line in a process of its own, which prepare() may change before."""

    def function() -> int:
        sys.argv = ["ppo_llm.py", *flags(folder, **changes)]
        if prepare:
            prepare()
        return ppo_llm.start()

    return in_a_process(function, cwd, **(environment or {}))


def without_times(run_dir: Path) -> list[dict]:
    return [{name: x for name, x in row.items() if "time/" not in name} for row in read_log(run_dir)]


def results(run_dir: Path) -> tuple:
    """All that must be equal: the log without times, the samples, the weights and optimizers, the exported models."""
    newest = ppo_llm.checkpoints(run_dir)[-1]
    files = [*newest.glob("*.safetensors"), *run_dir.glob("model/*.safetensors"), *run_dir.glob("critic/*.safetensors")]
    weights = {str(path.relative_to(run_dir)): path.read_bytes() for path in files}
    return without_times(run_dir), (run_dir / "samples.jsonl").read_text(), weights


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def steps(run_dir: Path) -> list[float]:
    return [row["step"] for row in read_log(run_dir)]


def saved(run_dir: Path) -> list[str]:
    return [path.name for path in ppo_llm.checkpoints(run_dir)]


def first_fast(first, *others) -> list:
    """Cases of a test, each of which starts runs: all but the first are slow."""
    cases = [first]
    for case in others:
        values = case if isinstance(case, tuple) else (case,)
        cases.append(pytest.param(*values, marks=pytest.mark.slow))
    return cases


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def micro(folder, no_figures):
    """The model, with the reward that sends signals; a run's page is left out."""
    (folder / "signals.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo_llm.Run, "print_end", lambda run: None)
        yield folder


@pytest.fixture(scope="module")
def undisturbed(micro, tmp_path_factory) -> Path:
    """A whole run with a checkpoint after every step."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = run(micro, cwd, save_every=1, save_total_limit=9)
    assert done.code == 0, done.err
    return cwd / "run"


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    """The same run as it stood after step 4, in a folder that a test may damage."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_5")
    return tmp_path / "run"


# ---- C1, C6: checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first_fast("critic.safetensors", "actor.safetensors", "state.json", "hashes.json"))
def test_one_flipped_byte_in_a_file_of_a_checkpoint_is_found_and_the_older_one_is_used(
        name, copied, micro, undisturbed):
    flip(copied / "checkpoints" / "step_4" / name)
    damaged = (copied / "checkpoints" / "step_4" / name).read_bytes()
    done = run(micro, copied.parent, save_every=1, save_total_limit=9)
    assert done.code == 0 and "resumed from step_3" in done.out
    assert "step_4 is damaged: an older checkpoint is used" in done.err and "is kept as step_4.old" in done.err
    assert (copied / "checkpoints" / "step_4.old" / name).read_bytes() == damaged
    assert results(copied) == results(undisturbed)


@pytest.mark.parametrize("name", ["actor.safetensors", "critic.safetensors", "state.json", "hashes.json"])
@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_checkpoint_with_a_truncated_or_missing_file_is_not_used(name, harm, copied, capsys):
    path = copied / "checkpoints" / "step_4" / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    assert ppo_llm.find_checkpoint(copied, None).name == "step_3"
    assert "step_4 is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_begins_anew_and_keeps_what_there_was(copied, micro, undisturbed):
    for path in ppo_llm.checkpoints(copied):
        flip(path / "actor.safetensors")
    log = (copied / "training_metrics.csv").read_bytes()
    done = run(micro, copied.parent, save_every=1, save_total_limit=9)
    assert done.code == 0 and done.err.count("is damaged") == 4 and "the run begins anew" in done.err
    assert (copied / "training_metrics.csv.old").read_bytes() == log
    assert (copied / "samples.jsonl.old").exists() and (copied / "checkpoints" / "step_1.old").is_dir()
    for name in ("model.old", "critic.old", "summary.json.old"):
        assert (copied / name).exists() and f"is kept as {name}" in done.err
    assert results(copied) == results(undisturbed)


# ---- C2: two processes -----------------------------------------------------------------------------------


def test_a_second_process_in_the_same_folder_is_refused_with_the_number_of_the_first(micro, tmp_path):
    code = ("import fcntl, os, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
            " print(os.getpid(), end='', file=f, flush=True); print('locked', flush=True); sys.stdin.read()")
    (tmp_path / "run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run" / ".lock"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    done = run(micro, tmp_path)
    assert done.code == 2 and f"run is in use by process {other.pid}\n" in done.err and "Traceback" not in done.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    other.communicate()
    assert run(micro, tmp_path, total_steps=1).code == 0


@pytest.mark.slow
def test_of_two_runs_started_at_once_in_one_folder_one_trains_and_one_is_refused(micro, tmp_path, undisturbed):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    done = []
    threads = [
        threading.Thread(target=lambda cwd=cwd: done.append(run(micro, tmp_path / cwd, output_dir=tmp_path / "run")))
        for cwd in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(x.code for x in done) == [0, 2]
    assert steps(tmp_path / "run") == [0, 1, 2, 3, 4, 5]
    assert without_times(tmp_path / "run") == without_times(undisturbed)


# ---- C3: settings ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_changed_settings_are_said_and_kept_in_the_history_of_the_summary(copied, micro):
    done = run(micro, copied.parent, lr=5e-4, gamma=0.5, total_steps=6)
    assert done.code == 0
    said = "settings have changed since step 4: gamma 1.0 → 0.5, total_steps 5 → 6, lr 0.001 → 0.0005"
    assert said in done.err
    history = summary(copied)["settings_history"]
    assert [entry["step"] for entry in history] == [0, 4]
    assert history[0]["config"]["lr"] == 1e-3 and "lr 0.001 → 0.0005" in history[1]["changes"]
    assert summary(copied)["config"]["lr"] == 5e-4
    again = run(micro, copied.parent, lr=5e-4, gamma=0.5, total_steps=7)
    assert "since step 6: total_steps 6 → 7" in again.err and "lr" not in again.err.split("total_steps")[-1]
    assert [entry["step"] for entry in summary(copied)["settings_history"]] == [0, 4, 6]


@pytest.mark.slow
def test_settings_that_have_not_changed_are_not_said(copied, micro):
    done = run(micro, copied.parent, save_every=1, save_total_limit=9)
    assert done.code == 0 and "settings have changed" not in done.err
    assert [entry["step"] for entry in summary(copied)["settings_history"]] == [0]


# ---- C4: signals -----------------------------------------------------------------------------------------
# Calls of the reward: 1 evaluation at step 0, 2 and 3 the first two steps, 4 evaluation at step 2, 5 step 3, ...


@pytest.mark.parametrize(("name", "code", "call", "step"), first_fast(
    ("SIGINT", 130, 3, 2), ("SIGTERM", 143, 3, 2), ("SIGINT", 130, 1, 0), ("SIGTERM", 143, 1, 0),
    ("SIGINT", 130, 5, 3), ("SIGTERM", 143, 5, 3)))
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on_bit_by_bit(
        name, code, call, step, micro, undisturbed, tmp_path):
    done = run(micro, tmp_path, environment={name: call})
    assert done.code == code and "Traceback" not in done.err
    assert "stopping when this step is done and saved; the same signal once more ends at once" in done.err
    command = re.search(rf"^stopped after step {step}; continue with: python (ppo_llm.py .+)$", done.out, re.M)
    assert command and "--output_dir=run" in command[1]
    assert summary(tmp_path / "run")["status"] == "stopped" and saved(tmp_path / "run") == [f"step_{step}"]
    assert ("eval/score" in read_log(tmp_path / "run")[-1]) == (call == 1)  # that of step 2 is left to the next start
    again = run(micro, tmp_path)
    assert again.code == 0 and f"resumed from step_{step} of 5" in again.out
    assert "settings have changed" not in again.err
    assert results(tmp_path / "run")[:2] == results(undisturbed)[:2]
    weights = results(undisturbed)[2]
    assert results(tmp_path / "run")[2] == weights and len(weights) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "step"), [("update", 3), ("save_checkpoint", 4)])
def test_a_signal_in_an_update_or_while_a_checkpoint_is_written_loses_nothing(
        moment, step, micro, undisturbed, tmp_path):
    def prepare():
        real = getattr(ppo_llm, moment)

        def signalled(*args):
            if (args[0], args[3]) == ("actor", 2) or args[1] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        setattr(ppo_llm, moment, signalled)

    settings = {"save_every": 1, "save_total_limit": 9}
    done = run(micro, tmp_path, prepare, **settings)
    assert done.code == 130 and f"stopped after step {step}" in done.out
    assert run(micro, tmp_path, **settings).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.slow
def test_a_signal_in_the_last_step_leaves_the_evaluation_and_the_export_to_the_next_start(
        micro, undisturbed, tmp_path):
    done = run(micro, tmp_path, environment={"SIGTERM": 8})
    assert done.code == 143 and "stopped after step 5" in done.out and not (tmp_path / "run" / "model").exists()
    assert run(micro, tmp_path).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.parametrize("broken", [(1, 2), pytest.param((1,), marks=pytest.mark.slow)])  # `2>&1 | tee`, `| tee`
def test_ctrl_c_that_also_ends_who_reads_the_console_loses_nothing(broken, micro, undisturbed, tmp_path):
    def prepare():
        real = ppo_llm.update

        def signalled(*args):
            if (args[0], args[3]) == ("actor", 2):
                reader, writer = os.pipe()
                os.close(reader)
                for number in broken:
                    os.dup2(writer, number)
                os.kill(os.getpid(), signal.SIGINT)
                ppo_llm.warn("nobody reads this")
                print("nor this", end="", flush=True)
            return real(*args)

        ppo_llm.update = signalled

    done = run(micro, tmp_path, prepare)
    assert done.code == 130 and saved(tmp_path / "run") == ["step_3"]
    assert summary(tmp_path / "run")["status"] == "stopped"
    assert ("nobody reads this" in done.err) == (broken == (1,)) and "nor this" not in done.out
    assert run(micro, tmp_path).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_same_signal_once_more_ends_at_once(name, code, micro, tmp_path):
    def twice():
        real = ppo_llm.update

        def signalled(*args):
            for _ in range(2):
                os.kill(os.getpid(), getattr(signal, name))
            return real(*args)

        ppo_llm.update = signalled

    done = run(micro, tmp_path, twice)
    assert done.code == code and "stopped after" not in done.out and saved(tmp_path / "run") == []
    assert summary(tmp_path / "run")["status"] == "running"


def test_a_launchers_sigterm_after_a_ctrl_c_is_the_same_wish(micro, tmp_path):
    done = run(micro, tmp_path, environment={"SIGINT": "3", "SIGTERM": "3"})
    assert done.code == 143 and "stopped after step 2" in done.out and saved(tmp_path / "run") == ["step_2"]


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_is_continued_from_its_first_step(micro, undisturbed, tmp_path):
    def prepare():  # while the models are loaded
        real = ppo_llm.build_models
        ppo_llm.build_models = lambda *args: (os.kill(os.getpid(), signal.SIGINT), real(*args))[1]

    done = run(micro, tmp_path, prepare)
    assert done.code == 130 and saved(tmp_path / "run") == ["step_0"]
    assert run(micro, tmp_path).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


# ---- C5: exceptions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "step"), first_fast((3, 1), (4, 2), (5, 2)))  # 4: in an evaluation
def test_a_reward_that_raises_costs_no_finished_step(call, step, micro, undisturbed, tmp_path):
    done = run(micro, tmp_path, environment={"FAIL": call})
    assert done.code == 2 and "error: the reward raised KeyError('no such column')" in done.err
    assert "signals.py" in done.err  # the user's traceback
    assert saved(tmp_path / "run") == [f"step_{step}"]
    found = summary(tmp_path / "run")
    assert found["status"] == "failed" and "no such column" in found["reason"] and found["step"] == step
    assert run(micro, tmp_path).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.slow
def test_any_exception_in_a_rollout_costs_no_finished_step_and_shows_its_traceback(micro, undisturbed, tmp_path):
    def prepare():
        real = ppo_llm.generate
        calls = []

        def generate(*args):
            calls.append(1)
            if len(calls) == 5:
                raise ZeroDivisionError("in a rollout")
            return real(*args)

        ppo_llm.generate = generate

    done = run(micro, tmp_path, prepare)
    assert done.code == 1 and "ZeroDivisionError: in a rollout" in done.err and saved(tmp_path / "run") == ["step_2"]
    assert summary(tmp_path / "run")["reason"] == "ZeroDivisionError: in a rollout"
    assert run(micro, tmp_path).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


def test_an_exception_in_an_update_saves_nothing_because_the_weights_are_between_two_steps(micro, tmp_path):
    def prepare():
        real = ppo_llm.update
        ppo_llm.update = lambda *args: 1 / 0 if args[3] == 3 else real(*args)

    done = run(micro, tmp_path, prepare, save_every=2)
    assert done.code == 1 and saved(tmp_path / "run") == ["step_2"]
    assert summary(tmp_path / "run")["status"] == "failed"
    assert summary(tmp_path / "run")["reason"] == "ZeroDivisionError: division by zero"


def test_an_error_in_the_first_step_saves_nothing(micro, tmp_path):
    done = run(micro, tmp_path, environment={"FAIL": 2})
    assert done.code == 2 and saved(tmp_path / "run") == [] and summary(tmp_path / "run")["status"] == "failed"


def test_a_run_that_has_no_memory_left_says_which_flags_help(micro, tmp_path):
    def prepare():
        def generate(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        ppo_llm.generate = generate

    done = run(micro, tmp_path, prepare)
    assert done.code == 2 and "Traceback" not in done.err
    for flag in ("--micro_batch_tokens", "--rollout_slots", "--gradient_checkpointing", "--lora_rank"):
        assert flag in done.err.splitlines()[-1]


# ---- C7: divergence --------------------------------------------------------------------------------------


def test_a_learning_rate_of_1000_ends_with_exit_code_2_and_keeps_the_last_good_checkpoint(micro, tmp_path):
    good = run(micro, tmp_path, total_steps=2, save_every=1)
    before = (tmp_path / "run" / "checkpoints" / "step_2" / "actor.safetensors").read_bytes()
    done = run(micro, tmp_path, total_steps=60, lr=1e30, critic_lr=1e30)
    assert good.code == 0 and done.code == 2 and "Traceback" not in done.err
    assert re.search("^error: .*(not finite)", done.err, re.M) and "lower lr" in done.err
    assert summary(tmp_path / "run")["status"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "actor.safetensors").read_bytes() == before
    assert saved(tmp_path / "run")[-1] == "step_2"


def test_a_skipped_step_is_said_and_three_in_a_row_raise(folder, capsys):
    models = make_models(make_config(folder))
    learner = models.actor
    before = [weight.clone() for weight in learner.masters]
    capsys.readouterr()
    for number in (1, 2):
        learner.step(1.0, float("nan"))
        assert capsys.readouterr().err == "warning: the gradient is not finite: this optimizer step is skipped\n"
        assert learner.skipped_steps == number
    with pytest.raises(ppo_llm.Diverged, match="three gradients in a row are not finite: lower lr"):
        learner.step(1.0, float("inf"))
    assert all(map(torch.equal, before, learner.masters))


def test_steps_that_are_skipped_but_not_in_a_row_end_nothing(folder):
    learner = make_models(make_config(folder)).actor
    for norm in (float("nan"), float("nan"), 1.0, float("nan"), float("nan"), 1.0):
        for master in learner.masters:
            master.grad = torch.zeros_like(master)
        learner.step(1.0, norm)
    assert learner.skipped_steps == 4


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "old_values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_and_log_probs_that_are_not_finite_end_the_run_in_a_sentence(name, value):
    mask = torch.ones(2, 3)
    rollout = ppo_llm.Rollout([[5]] * 2, [[6, 7, 8]] * 2, mask, -mask, ref_logprobs=-mask, old_values=mask * 0)
    ppo_llm.check_finite(rollout)
    broken = mask.clone()
    broken[1, 2] = value
    setattr(rollout, name, broken)
    with pytest.raises(ppo_llm.Diverged, match=f"{name} are not finite: .*lower lr"):
        ppo_llm.check_finite(rollout)


# ---- C8: trackers ----------------------------------------------------------------------------------------


def fake_wandb(fails_in: str = "", starts: list | None = None, rows: list | None = None) -> SimpleNamespace:
    def init(**settings):
        if starts is not None:
            starts.append(settings)
        if fails_in == "init":
            raise RuntimeError("api key not configured")
        return SimpleNamespace(log=log)

    def log(metrics, step):
        if fails_in == "log":
            raise ConnectionError("no network")
        if rows is not None:
            rows.append({"step": step} | metrics)

    return SimpleNamespace(init=init)


@pytest.mark.parametrize(("fails_in", "sentence"), first_fast(
    ("log", "wandb has failed, the run goes on without it: no network"),
    ("init", "wandb has failed, the run goes on without it: api key not configured")))
def test_a_tracker_that_fails_does_not_end_the_run(fails_in, sentence, micro, undisturbed, tmp_path):
    prepare = lambda: sys.modules.update(wandb=fake_wandb(fails_in))  # noqa: E731
    done = run(micro, tmp_path, prepare, track="wandb")
    assert done.code == 0 and done.err.count(sentence) == 1 and "Traceback" not in done.err
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_where_wandb_is_not_installed(micro, tmp_path):
    done = run(micro, tmp_path, lambda: sys.modules.update(wandb=None), track="wandb", total_steps=1)
    assert done.code == 0 and "wandb has failed, the run goes on without it" in done.err


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(micro, tmp_path, monkeypatch):
    starts, rows = [], []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb("", starts, rows))
    config = make_config(micro, output_dir=str(tmp_path / "run"), track="wandb", total_steps=1)
    ppo_llm.main(config)
    ppo_llm.main(dataclasses.replace(config, total_steps=2))
    assert starts[0]["id"] == starts[1]["id"] and starts[1]["resume"] == "allow"
    assert [row["step"] for row in rows] == [1, 2]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_2" / "state.json").read_text())
    assert state["tracker_id"] == starts[0]["id"]


@pytest.mark.slow
def test_a_run_that_starts_from_another_ones_checkpoint_is_a_new_wandb_run(micro, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb("", starts))
    config = make_config(micro, output_dir=str(tmp_path / "one"), track="wandb", total_steps=1)
    ppo_llm.main(config)
    ppo_llm.main(dataclasses.replace(config, output_dir=str(tmp_path / "two"), resume=str(tmp_path / "one"),
                                     total_steps=2))
    assert starts[0]["id"] != starts[1]["id"]


# ---- C9: places that cannot be used ----------------------------------------------------------------------


def assert_one_sentence(done: Done, path) -> None:
    assert done.code == 2 and "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.err.splitlines()[-1] == errors[0] and str(path) in errors[0]


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_an_output_dir_that_is_a_file_or_below_one_is_refused_in_a_sentence(place, micro, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_sentence(run(micro, tmp_path, output_dir=place), place)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_dir_that_cannot_be_written_is_refused_in_a_sentence(micro, tmp_path):
    def prepare():  # what a read-only folder answers, also where the tests run as root
        real = Path.mkdir

        def mkdir(path, *args, **rest):
            if path.name == "run":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **rest)

        Path.mkdir = mkdir

    assert_one_sentence(run(micro, tmp_path, prepare), "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_dir_is_refused_in_a_sentence(micro, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    assert_one_sentence(run(micro, tmp_path), "run")


@pytest.mark.slow
@pytest.mark.parametrize("limit", first_fast(6000, 1000, 100_000))  # bytes: the summary, the log, the checkpoint
def test_a_full_disk_ends_the_run_in_a_sentence_and_the_same_command_goes_on(limit, micro, undisturbed, tmp_path):
    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(micro, tmp_path, prepare, save_every=1, save_total_limit=9)
    assert_one_sentence(done, "run")
    assert run(micro, tmp_path, save_every=1, save_total_limit=9).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(device, micro, tmp_path):
    assert_one_sentence(run(micro, tmp_path, device=device), device)


# ---- C10: logs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "harm"), first_fast(
    ("training_metrics.csv", "deleted"), ("training_metrics.csv", "garbage"), ("training_metrics.csv", "empty"),
    ("training_metrics.csv", "binary"), ("samples.jsonl", "deleted"), ("samples.jsonl", "garbage"),
    ("samples.jsonl", "empty"), ("samples.jsonl", "binary")))
def test_a_log_that_is_damaged_or_deleted_begins_anew_and_the_training_goes_on(name, harm, copied, micro, undisturbed):
    path = copied / name
    if harm == "deleted":
        path.unlink()
    else:
        path.write_bytes({"garbage": b"a,b\n{{{\n", "empty": b"", "binary": bytes(range(128, 256))}[harm])
    damaged = path.read_bytes() if path.exists() else None
    other = copied / {"training_metrics.csv": "samples.jsonl", "samples.jsonl": "training_metrics.csv"}[name]
    kept = other.read_bytes()
    done = run(micro, copied.parent, save_every=1, save_total_limit=9)
    assert done.code == 0 and "resumed from step_4 of 5" in done.out
    if (name, harm) != ("samples.jsonl", "empty"):  # which may also be a run without samples
        assert "the logs cannot be read and begin anew" in done.err
        assert damaged is None or path.with_name(f"{name}.old").read_bytes() == damaged
        assert other.with_name(f"{other.name}.old").read_bytes() == kept
    assert steps(copied)[-1] == 5
    assert results(copied)[2] == results(undisturbed)[2]


@pytest.mark.slow
def test_half_a_line_of_a_killed_run_is_dropped_and_nothing_else(copied, micro, undisturbed):
    with open(copied / "samples.jsonl", "a") as file:
        file.write('{"step": 1')
    done = run(micro, copied.parent, save_every=1, save_total_limit=9)
    assert done.code == 0 and "begin anew" not in done.err
    assert results(copied) == results(undisturbed)


# ---- C11, C12: what the header says ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_header_tells_a_fresh_run_from_a_resumed_one_and_from_one_that_starts_from_another(
        copied, micro, undisturbed):
    fresh = run(micro, copied.parent, total_steps=1, output_dir="other")
    assert "resumed from" not in fresh.out
    resumed = run(micro, copied.parent)
    assert resumed.out.count("resumed from step_4 of 5") == 1
    assert "resumed from step_5 of 5" in run(micro, copied.parent, total_steps=0).out
    started = run(micro, copied.parent, output_dir="third", resume=undisturbed / "checkpoints" / "step_2")
    assert started.out.count("resumed from step_2 of 5") == 1 and "begins anew" not in started.err


@pytest.mark.parametrize(("model", "preset"), first_fast(("model", "the published GSM8K run"), (None, "the demo")))
def test_the_header_says_which_preset_the_options_have_that_were_not_given(model, preset, micro, tmp_path):
    def prepare():
        ppo_llm.DEMO = dataclasses.replace(ppo_llm.DEMO, model=str(micro))

    if model:
        shutil.copytree(micro, tmp_path / "model")
    done = run(micro, tmp_path, prepare, total_steps=1, model=model)
    assert done.code == 0 and f"options not given: those of {preset}\n" in done.out


def test_a_local_model_without_a_data_set_says_what_it_is_going_to_load(micro, tmp_path):
    done = run(micro, tmp_path, dataset=None, eval_dataset=None)
    assert done.out.splitlines()[0] == "data set: openai/gsm8k (--dataset chooses another)"
    assert_one_sentence(done, "openai/gsm8k")  # offline here


# ---- C13: sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", first_fast(
    {"train_batch_size": 16, "ppo_mini_batch_size": 16, "critic_ppo_mini_batch_size": 4},
    {"train_batch_size": 256, "ppo_mini_batch_size": 64},
    {"train_batch_size": 12, "ppo_mini_batch_size": 6, "rollout_n": 3},
    {"train_batch_size": 9, "ppo_mini_batch_size": 4}))
def test_sizes_that_do_not_fit_are_answered_once_with_sizes_that_do(changes, micro, tmp_path):
    done = run(micro, tmp_path, **changes)
    assert_one_sentence(done, "use --train_batch_size")
    advice = re.findall(r"--(\w+) (\d+)", done.err.splitlines()[-1])
    changes = changes | {name: int(x) for name, x in advice}
    assert run(micro, tmp_path, total_steps=1, **changes).code == 0


def test_the_published_sizes_on_64_rows_are_answered_with_the_same_number_of_updates():
    config = ppo_llm.Config(train_batch_size=256, ppo_mini_batch_size=64)
    assert ppo_llm.fitting_sizes(64, config) == "use --train_batch_size 64 --ppo_mini_batch_size 16"


# ---- C14: flags without effect ---------------------------------------------------------------------------


GRPO = {"adv_estimator": "grpo", "rollout_n": 2}


@pytest.mark.parametrize(("changes", "names"), [
    (GRPO | {"lam": 0.9}, "lam"),
    (GRPO | {"critic": "shared", "value_pooling": "mean"}, "critic, value_pooling"),
    (GRPO | {"critic_lr": 1e-4, "cliprange_value": 0.2, "gamma": 0.9}, "critic_lr, cliprange_value, gamma"),
    (GRPO | {"lam_critic": 0.5}, "lam_critic"),
    ({"vf_coef": 0.5}, "vf_coef"),
    ({"norm_adv_by_std": False}, "norm_adv_by_std"),
    ({"kl_ctrl_target": 0.05, "kl_ctrl_horizon": 500}, "kl_ctrl_target, kl_ctrl_horizon"),
    ({"kl_ctrl_unit": "sequence"}, "kl_ctrl_unit"),
    ({"use_kl_loss": True, "kl_penalty": "k2", "kl_ctrl_coef": 0.1}, "kl_penalty, kl_ctrl_coef"),
    ({"kl_loss_coef": 0.1, "kl_loss_type": "k2"}, "kl_loss_coef, kl_loss_type"),
    ({"reference_mix": 0.2}, "reference_mix"),
    ({"attribution_discount": 0.5}, "attribution_discount"),
    ({"loss_scale_factor": 9.0}, "loss_scale_factor"),
    ({"total_steps": 5, "total_epochs": 3}, "total_epochs"),
    ({"eval_every": 0, "eval_size": 9, "eval_dataset": "demo"}, "eval_size, eval_dataset"),
])
def test_flags_without_effect_are_listed_in_one_warning(changes, names, capsys):
    ppo_llm.check_config(dataclasses.replace(ppo_llm.Config(), **changes))
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        f"warning: without effect beside the other options: {names} (docs/choosing.md says why)"]


@pytest.mark.parametrize("changes", [
    {}, {"lam": 0.9, "critic_lr": 1e-4}, {"critic": "shared", "vf_coef": 0.5}, GRPO | {"norm_adv_by_std": False},
    {"kl_ctrl_type": "adaptive", "kl_ctrl_target": 0.05, "kl_ctrl_horizon": 500},
    {"use_kl_loss": True, "kl_loss_coef": 0.1}, {"reference": "mixed", "reference_mix": 0.2},
    {"reward_attribution": "discounted", "attribution_discount": 0.5}, {"total_epochs": 3},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 9.0}, {"eval_size": 9}])
def test_flags_with_an_effect_are_not_warned_of(changes, capsys):
    ppo_llm.check_config(dataclasses.replace(ppo_llm.Config(), **changes))
    ppo_llm.check_config(dataclasses.replace(ppo_llm.DEMO))
    assert capsys.readouterr().err == ""


# ---- C15, C16: words of other programs -------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_run_writes_nothing_of_other_programs_to_stderr(micro, tmp_path):
    command = [sys.executable, ROOT / "ppo_llm.py", *flags(micro, total_steps=1)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: ")] == []


@pytest.mark.parametrize("name", first_fast(
    "learning_rate", "kl_coef", "ppo_micro_batch_size", "num_train_epochs"))
def test_another_trainers_option_is_answered_with_the_table_that_has_it(name, micro, tmp_path):
    done = run(micro, tmp_path, **{name: 1})
    assert done.code == 2 and "docs/coming_from.md" in done.err and "Traceback" not in done.err
    assert name in (ROOT / "docs" / "coming_from.md").read_text()


# ---- Anything else that a user can mend ------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused_and_untouched(micro, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert_one_sentence(run(micro, tmp_path), "run is not empty and not the folder of a run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_killed_run_ends_as_the_undisturbed_one(micro, undisturbed, tmp_path):
    for moment in (0.3, 0.6):
        pid = os.fork()
        if pid == 0:
            os.close(1)
            os.close(2)
            os.chdir(tmp_path)
            sys.argv = ["ppo_llm.py", *flags(micro, save_every=1, save_total_limit=9)]
            sys.stdout = open(os.devnull, "w")
            sys.stderr = sys.stdout
            ppo_llm.start()
            os._exit(0)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run(micro, tmp_path, save_every=1, save_total_limit=9).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


# ---- scripts/soak.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


EVENT = {"signal": "none", "exit_code": 0, "step": 9, "checkpoint": 9, "said_stopped": False, "traceback": False}


@pytest.mark.parametrize(("changes", "count"), [
    ({}, 0), ({"exit_code": 1}, 1), ({"traceback": True}, 1),
    ({"signal": "SIGKILL", "exit_code": -9, "checkpoint": 6}, 0),
    ({"signal": "SIGKILL", "exit_code": -9, "checkpoint": 5}, 1),
    ({"signal": "SIGINT", "exit_code": 130, "said_stopped": True, "checkpoint": 10}, 0),
    ({"signal": "SIGINT", "exit_code": 143, "said_stopped": True}, 1),
    ({"signal": "SIGTERM", "exit_code": 143}, 1),
    ({"signal": "SIGTERM", "exit_code": 143, "said_stopped": True, "checkpoint": 8}, 1),
    ({"signal": "SIGTERM", "step": 20}, 0)])
def test_the_soak_counts_every_broken_promise_of_a_start(changes, count, soak):
    assert len(soak.faults(EVENT | changes, soak.Soak(steps=20, save_every=3))) == count


@pytest.mark.parametrize(("checkpoint", "count"), [(20, 0), (18, 1)])
def test_a_signal_to_ranks_after_their_last_step_breaks_nothing_if_that_step_is_saved(checkpoint, count, soak):
    event = EVENT | {"signal": "SIGTERM", "step": 20, "exit_code": 1, "checkpoint": checkpoint}
    assert len(soak.faults(event, soak.Soak(steps=20, processes=2))) == count


def test_the_soak_finds_every_difference_but_times(soak, undisturbed, tmp_path):
    other = shutil.copytree(undisturbed, tmp_path / "run")
    log = other / "training_metrics.csv"
    rows = log.read_text().splitlines()
    column = next(i for i, name in enumerate(rows[0].split(",")) if name.startswith("time/"))
    cells = rows[2].split(",")
    cells[column] = "123.0"
    log.write_text("\n".join([*rows[:2], ",".join(cells), *rows[3:], ""]))
    assert soak.differences(undisturbed, other) == []
    flip(other / "model" / "model.safetensors")
    flip(other / "samples.jsonl")
    log.write_text("\n".join([*rows[:-1], ""]))
    assert soak.differences(undisturbed, other) == [
        "training_metrics.csv", "model/model.safetensors", "samples.jsonl"]


def test_the_soak_measures_the_growth_of_memory_from_a_step_on(soak):
    memory = [(1, 50.0), (199, 120.0), (200, 100.0), (201, 101.0), (300, 100.0)]
    assert soak.growth_after(memory, 200) == pytest.approx(0.01)
    assert soak.growth_after(memory, 400) is None
