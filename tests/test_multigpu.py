"""ppo_llm_multigpu.py in two processes on the CPU against ppo_llm.py in one: the same rollouts give the same update."""

import copy
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import multigpu_worker
import pytest
import torch
import transformers
from conftest import read_log
from safetensors.torch import load_file

import ppo_llm

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("multigpu_worker.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")),
                       reason="DeepSpeed compiles its CPU communication with g++ and ninja")]
PPO = {"train_batch_size": 16, "ppo_mini_batch_size": 8, "ppo_epochs": 2, "ppo_micro_batch_size": 2, "lr": 1e-4,
       "critic_lr": 1e-3, "device": "cpu", "max_prompt_length": 256, "weight_decay": 0.01, "temperature": 2.0,
       "max_response_length": 24}
GRPO = PPO | {"adv_estimator": "grpo", "train_batch_size": 4, "rollout_n": 4, "use_kl_loss": True, "kl_loss_coef": 0.05,
              "kl_loss_type": "full"}
BF16 = {"dtype": "bfloat16", "ppo_micro_batch_size": 1}  # the same passes in one process and in two: bf16 rounds each
LAYOUTS = {
    "zero0": {"zero_stage": 0}, "zero2": {}, "zero3": {"zero_stage": 3},
    "zero2-offload": {"offload": "optimizer"}, "zero3-offload": {"zero_stage": 3, "offload": "all"}}


def environment(**more) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2",
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more


class Ranks:
    """Two processes that are started and watched without a launcher, which would end one when the other ends."""

    def __init__(self, folder: Path, *command: str, **more):
        shared, self.outputs = environment(**more), [folder / f"rank{i}.txt" for i in range(2)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            with open(output, "w") as file:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=folder,
                    env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}))

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; ranks that do not end in time are killed, and the test fails."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"a rank did not end within {seconds} s:\n{self.text()}")
        finally:
            for process in self.processes:
                process.kill()

    def text(self) -> str:
        return "\n".join(f"--- rank {i}\n{path.read_text()[-3000:]}" for i, path in enumerate(self.outputs))

    def wait_for(self, sign: Path, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not sign.exists():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self.wait(1)
                pytest.fail(f"no {sign.name}:\n{self.text()}")
            time.sleep(0.05)


def run_worker(cases: list[dict], folder: Path, seconds: float) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    ranks = Ranks(folder, str(WORKER), str(folder / "cases.json"), str(folder / "two"))
    assert ranks.wait(seconds) == [0, 0], ranks.text()


def make_rollout(path: Path, settings: dict) -> None:
    """A rollout of the demo model with ragged lengths and all that an update needs."""
    config = ppo_llm.Config(**vars(ppo_llm.DEMO) | settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    models = ppo_llm.build_models(tokenizer, config)
    train, _ = ppo_llm.load_examples(tokenizer, config)
    examples = [example for example in train[: config.train_batch_size] for _ in range(config.rollout_n)]
    rollout, _ = ppo_llm.collect_rollout(models, lambda *x: [len(t) % 3 - 1.0 for t in x[1]], examples, 0, 0.05, config)
    assert len(set(map(len, rollout.responses))) > 3
    kept = {name: x for name, x in vars(rollout).items() if name in ("prompts", "responses")
            or isinstance(x, torch.Tensor) and x.dim() == 2}
    torch.save(kept, path)


def distance(one: Path, other: Path, what: str, start: Path | None = None) -> float:
    """Norm of the difference of all tensors `what` over the norm; with start, its maximum over the largest movement."""
    a, b = load_file(one), load_file(other)
    names = [name for name in a if name.endswith(f".{what}")]
    assert names and names == [name for name in a if name in b and name.endswith(f".{what}")]
    if start is None:
        gap, size = (math.sqrt(sum(x.double().square().sum() for x in xs)) for xs in (
            [a[n] - b[n] for n in names], [a[n] for n in names]))
        return gap / size
    begin = load_file(start)
    return (max((a[n] - b[n]).abs().max() for n in names) / max((a[n] - begin[n]).abs().max() for n in names)).item()


# ---------------------------------------------------------------------------------------------------------------------
# The same rollouts give the same update.

LORA = PPO | {"lora_rank": 8, "critic": "adapter", "lr": 1e-3}
ONE = {"ppo": PPO, "grpo": GRPO, "lora": LORA, "ppo-bf16": PPO | BF16, "grpo-bf16": GRPO | BF16,
       "lora-bf16": LORA | BF16, "shared": PPO | {"critic": "shared"},
       "recomputed": PPO | {"gradient_checkpointing": True},
       "hard": PPO | {"train_batch_size": 8, "ppo_mini_batch_size": 2, "ppo_epochs": 1}}
HARD = [{"early_stop_kl": 1e-9}, {"poison": True}, {}]  # a gradient is dropped, a step skipped, then all goes on
TWO = [(f"{name}-{layout}", name, layout) for name, layouts in {
    "ppo": ["zero0", "zero2", "zero3"], "grpo": ["zero0", "zero2", "zero3"], "ppo-bf16": ["zero2", "zero3"],
    "grpo-bf16": ["zero2", "zero3"], "lora": ["zero0", "zero2", "zero3"], "lora-bf16": ["zero2", "zero3"],
    "shared": ["zero2", "zero3"], "recomputed": ["zero2", "zero3"], "hard": LAYOUTS}.items() for layout in layouts]


@pytest.fixture(scope="module")
def updates(tmp_path_factory) -> Path:
    """All cases: `one` by ppo_llm.py, `two` by two ranks in one launch."""
    folder = tmp_path_factory.mktemp("updates")
    for name in ("ppo", "grpo"):
        make_rollout(folder / f"{name}.pt", ONE[name])
    cases = {name: {"name": name, "config": config, "export": name == "ppo", "rollout": str(folder / "ppo.pt"),
                    "updates": HARD if name == "hard" else [{}]} for name, config in ONE.items()}
    for name in ("grpo", "grpo-bf16"):
        cases[name]["rollout"] = str(folder / "grpo.pt")
    for name in ("ppo-bf16", "grpo-bf16", "lora-bf16"):  # of 16 responses, one a pass, rank 0 has the first 8
        cases[name]["ranks_order"] = 8
    two = [cases[name] | {"name": new, "ranks": LAYOUTS[layout]} for new, name, layout in TWO]
    two.append(cases["ppo"] | {"name": "dropped", "ranks": {}, "drop": True, "export": False})
    run_worker(two, folder, 400)
    with pytest.MonkeyPatch.context() as patch:  # the head's chunks are small in both
        patch.setattr(ppo_llm, "LOGITS_PER_CHUNK", ppo_llm.LOGITS_PER_CHUNK)
        multigpu_worker.main(ppo_llm, copy.deepcopy(list(cases.values())), folder / "one")
    return folder


def compare(one: Path, two: Path) -> dict[str, float]:
    """Relative error of the first gradient and, after 3 steps and at the end, of the weights by how far they moved."""
    errors = {}
    for path in one.glob("*_[13l]*.safetensors"):
        twin, start = two / path.name, path.with_name(path.name.split("_")[0] + "_start.safetensors")
        assert distance(start, two / start.name, "weight") == 0
        first = path.stem.endswith("_1")  # after one step AdamW's first mean is 0.1 times the clipped gradient
        error = distance(path, twin, "exp_avg") if first else distance(path, twin, "weight", start)
        errors[path.stem] = error
        assert error <= (1e-5 if first else 0.02), (path.stem, error)
    assert {x.split("_")[1] for x in errors} == {"1", "3", "last"}
    return errors


@pytest.mark.parametrize(("new", "name", "layout"), TWO)
def test_two_ranks_take_the_steps_of_one_process(new, name, layout, updates):
    print(new, {name: f"{error:.1e}" for name, error in compare(updates / "one" / name, updates / "two" / new).items()})
    ours, theirs = (json.loads((updates / x / "metrics.json").read_text()) for x in (f"one/{name}", f"two/{new}"))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4 if "bf16" not in name else 2e-3, nan_ok=True)


def test_the_flags_make_deepspeeds_configuration_and_a_file_replaces_entries(tmp_path):
    import ppo_llm_multigpu as twin

    file = tmp_path / "ds.json"
    given = {"communication_data_type": "bf16", "gradient_clipping": 7.0, "managed_gradient_accumulation": True,
             "zero_optimization": {"reduce_bucket_size": 99, "stage": 3}}
    file.write_text(json.dumps(given))
    made = twin.deepspeed_config(twin.Config(zero_stage=3, offload="all", grad_clip=2.0), torch.bfloat16)
    assert made["gradient_clipping"] == 2.0 and made["bf16"] == {"enabled": True}
    assert made["zero_optimization"]["stage"] == 3 and made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert {made["zero_optimization"][f"offload_{x}"]["device"] for x in ("optimizer", "param")} == {"cpu"}
    changed = twin.deepspeed_config(twin.Config(ds_config=str(file)), torch.float32)
    assert changed["zero_optimization"]["reduce_bucket_size"] == 99 and changed["communication_data_type"] == "bf16"
    # what the flags say, and what the sums of gradients rest on, no file can change
    assert changed["zero_optimization"]["stage"] == 2 and changed["gradient_clipping"] == 1.0
    assert changed["bf16"] == {"enabled": False} and changed["managed_gradient_accumulation"] is False
    with pytest.raises(twin.UsageError, match="there is no file missing.json"):
        twin.check_config(twin.Config(ds_config="missing.json"))


def test_a_dropped_micro_batch_does_not_go_unnoticed(updates):
    with pytest.raises(AssertionError, match="_1"):
        compare(updates / "one" / "ppo", updates / "two" / "dropped")


def test_a_gradient_is_dropped_and_a_step_skipped_where_the_test_says_so(updates):
    for folder in [updates / "one" / "hard", *(updates / "two").glob("hard-*")]:
        critic, actor, _, poisoned, *_, last = json.loads((folder / "metrics.json").read_text())
        assert math.isnan(poisoned["optim/grad_norm"]) or poisoned["optim/skipped_steps"] == 2
        assert critic["optim/skipped_steps"] == 0 and last["optim/skipped_steps"] == 2


def test_the_exported_models_are_whole_and_equal(updates):
    expected = load_file(updates / "one" / "ppo" / "model" / "model.safetensors")
    for layout in ("zero0", "zero2", "zero3"):
        folder = updates / "two" / f"ppo-{layout}" / "model"
        tensors = load_file(folder / "model.safetensors")
        assert {name: x.shape for name, x in tensors.items()} == {name: x.shape for name, x in expected.items()}
        for name, x in tensors.items():
            assert torch.allclose(x, expected[name], atol=1e-4), name
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
        assert "packed" not in (folder / "config.json").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs: the same command on one rank or two; checkpoints; the launchers.

RUN = {"total_steps": 3, "train_batch_size": 8, "ppo_mini_batch_size": 4, "eval_size": 5, "eval_every": 2, "lr": 1e-4,
       "save_every": 1, "save_total_limit": 9, "seed": 3, "device": "cpu", "print_samples": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three steps by one process and by two ranks, and runs of two ranks that go on from checkpoints of each other."""
    folder = tmp_path_factory.mktemp("runs")
    multigpu_worker.main(ppo_llm, [{"name": "one", "runs": [RUN | {"run": "straight"}]}], folder)
    foreign = str(folder / "one" / "straight" / "checkpoints" / "step_2")
    own = str(folder / "two" / "runs" / "zero3" / "checkpoints" / "step_2")
    two = [{"run": "zero2"}, {"run": "zero3", "zero_stage": 3}, {"run": "again3", "zero_stage": 3, "resume": own},
           {"run": "again2", "resume": own}, {"run": "again0", "zero_stage": 0, "resume": own},
           {"run": "foreign", "resume": foreign}]
    run_worker([{"name": "runs", "runs": [RUN | changes for changes in two]}], folder, 400)
    multigpu_worker.main(ppo_llm, [{"name": "one", "runs": [RUN | {"run": "again", "resume": own}]}], folder)
    return folder


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step_3"


@pytest.mark.parametrize("run", ["zero2", "zero3"])
def test_the_same_command_gives_the_same_run_on_one_rank_and_on_two(run, runs):
    one, two = (read_log(x) for x in (runs / "one" / "straight", runs / "two" / "runs" / run))
    assert [row["step"] for row in two] == [0, 1, 2, 3]
    for mine, other in zip(one, two, strict=True):
        assert set(mine) == set(other)
        for name in (name for name in mine if not name.startswith("time/")):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), (mine["step"], name)


def test_a_resumed_run_of_the_same_ranks_is_exact(runs):
    two = runs / "two" / "runs"
    for role in ("actor", "critic"):
        a, b = (load_file(last_checkpoint(two / run) / f"{role}.safetensors") for run in ("zero3", "again3"))
        assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("run", ["two/runs/again2", "two/runs/again0", "two/runs/foreign", "one/again"])
def test_a_checkpoint_goes_on_under_another_stage_or_number_of_ranks(run, runs):
    expected, start = runs / "two" / "runs" / "zero3" / "checkpoints" / "step_3", runs / "one" / "straight"
    for role in ("actor", "critic"):
        files = [x / f"{role}.safetensors" for x in (expected, last_checkpoint(runs / run))]
        assert distance(*files, "weight", start / "checkpoints" / "step_1" / f"{role}.safetensors") <= 0.02
        assert distance(*files, "exp_avg") <= 1e-3


def test_the_state_a_checkpoint_gives_back_is_what_it_holds(runs):
    tensors = load_file(runs / "two" / "runs" / "zero3" / "checkpoints" / "step_2" / "actor.safetensors")
    shapes = {name.removesuffix(".weight"): x.shape for name, x in tensors.items() if name.endswith(".weight")}
    for i, shape in shapes.items():
        assert tensors[f"{i}.exp_avg"].shape == tensors[f"{i}.exp_avg_sq"].shape == shape and shape.numel()
        assert tensors[f"{i}.step"] == 8  # 2 steps of 2 epochs of 2 mini-batches


def test_the_launcher_runs_the_file_copied_alone_to_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "ppo_llm_multigpu.py", tmp_path)
    launcher = [DEEPSPEED, "--num_gpus", "2", "--master_port", environment()["MASTER_PORT"]]
    demo = ROOT / "assets" / "demo"
    flags = f"""--model {demo} --dataset {demo}/train.jsonl --total_steps 1 --train_batch_size 4 --ppo_mini_batch_size 4
        --eval_every 0 --max_prompt_length 128 --max_response_length 24 --output_dir run""".split()
    done = subprocess.run([*launcher, "ppo_llm_multigpu.py", *flags], cwd=tmp_path, timeout=300, capture_output=True,
                          text=True, env=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1] and done.stdout.count("step 1:") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resume_command"].startswith("deepspeed ")


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable: what a process sees of two machines that share a file system."""
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    names = [f"ppo{os.getpid()}{x}" for x in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        cables = [f"{name[-8:]}v" for name in names]
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
        yield list(zip(names, cables, strict=True))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine permits no network namespaces: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


@pytest.mark.skipif(not shutil.which("ip"), reason="needs ip, of iproute2")
def test_two_hosts_without_ssh_run_the_demo(hosts, tmp_path):
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    launcher = "--hostfile hosts --no_ssh --master_addr 10.77.0.1 --master_port 29500 --node_rank".split()
    flags = "--total_steps 1 --train_batch_size 4 --ppo_mini_batch_size 4 --eval_every 0 --output_dir run".split()
    processes = [subprocess.Popen(
        ["ip", "netns", "exec", name, DEEPSPEED, *launcher, str(i), str(ROOT / "ppo_llm_multigpu.py"),
         *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(GLOO_SOCKET_IFNAME=cable)) for i, (name, cable) in enumerate(hosts)]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1]
    assert ["step 1:" in output for output in outputs] == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Faults, without a launcher that would end the others.

REWARD = """
import os, pathlib, time
def reward(prompts, responses, answers):
    rank, here = os.environ["RANK"], pathlib.Path({folder!r})
    (here / f"scoring{{rank}}").touch()
    while {wait}:
        time.sleep(0.05)
    if {fail}:
        raise ValueError("no score today")
    return [float(len(response)) for response in responses]
"""


def start(folder: Path, *flags: str, wait: str = "False", fail: str = "False") -> Ranks:
    (folder / "reward.py").write_text(REWARD.format(folder=str(folder), wait=wait, fail=fail))
    common = "--total_steps 3 --train_batch_size 4 --ppo_mini_batch_size 4 --eval_every 0 --device cpu --output_dir run"
    reward = "--reward", f"{folder}/reward.py:reward", "--reward_env", "RANK"
    return Ranks(folder, str(ROOT / "ppo_llm_multigpu.py"), *common.split(), *reward, *flags)


def test_when_a_rank_is_killed_the_other_ends_and_names_itself_and_its_phase(tmp_path):
    ranks = start(tmp_path, wait="rank == '1'")
    ranks.wait_for(tmp_path / "scoring1", 180)
    ranks.processes[1].kill()
    assert ranks.wait(150) == [1, -signal.SIGKILL]
    assert "rank 0 failed in collect_rollout" in ranks.text()


def test_when_a_rank_is_stuck_all_end_at_the_deadline_and_show_where(tmp_path):
    ranks = start(tmp_path, "--dist_timeout", "20", wait="rank == '1'")
    assert ranks.wait(180) == [1, 1]
    assert "rank 0 failed in collect_rollout" in ranks.text()
    assert "in ask" in ranks.outputs[1].read_text() and "in collect_rollout" in ranks.outputs[1].read_text()


def test_an_error_in_the_reward_of_one_rank_ends_all(tmp_path):
    ranks = start(tmp_path, fail="rank == '0'")
    assert ranks.wait(120) == [2, 1]
    assert "no score today') at " in ranks.outputs[0].read_text() and "(rank 0)" in ranks.outputs[0].read_text()
    assert "rank 1 failed in collect_rollout" in ranks.text()


def test_sigterm_to_one_rank_saves_the_same_step_on_all_and_the_run_goes_on_from_there(tmp_path):
    ranks = start(tmp_path, wait="not (here / 'go').exists()")
    ranks.wait_for(tmp_path / "scoring1", 180)
    ranks.processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert ranks.wait(150) == [143, 143], ranks.text()
    assert [path.name for path in ppo_llm.checkpoints(tmp_path / "run")] == ["step_1"]
    assert start(tmp_path).wait(180) == [0, 0]
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2, 3]


def test_a_size_that_the_ranks_cannot_share_is_one_sentence(tmp_path):
    ranks = start(tmp_path, "--train_batch_size", "5", "--ppo_mini_batch_size", "5")
    assert sorted(ranks.wait(120)) in ([1, 2], [2, 2])
    assert "error: train_batch_size = 5 must divide by the 2 ranks" in ranks.outputs[0].read_text()
    assert not (tmp_path / "run").exists()
