"""ppo_llm_multigpu.py in two processes on the CPU against ppo_llm.py in one: the same rollouts give the same update."""

import copy
import dataclasses
import json
import math
import multiprocessing
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
import ppo_llm_multigpu as twin

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "assets" / "demo"
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
PPO = {"train_batch_size": 16, "ppo_mini_batch_size": 8, "ppo_epochs": 2, "micro_batch_tokens": 250, "lr": 1e-4,
       "critic_lr": 1e-3, "device": "cpu", "max_prompt_length": 256, "weight_decay": 0.01, "temperature": 2.0,
       "max_response_length": 24}
GRPO = PPO | {"adv_estimator": "grpo", "train_batch_size": 4, "rollout_n": 4, "use_kl_loss": True, "kl_loss_coef": 0.05,
              "kl_loss_type": "full"}
BF16 = {"dtype": "bfloat16", "micro_batch_tokens": 1}  # the same passes in one process and in two: bf16 rounds each
LAYOUTS = {
    "zero0": {"zero_stage": 0}, "zero2": {}, "zero3": {"zero_stage": 3},
    "zero2-offload": {"offload": "optimizer"}, "zero3-offload": {"zero_stage": 3, "offload": "all"}}


# ---------------------------------------------------------------------------------------------------------------------
# Without a launch.

def test_the_flags_make_deepspeeds_configuration_and_a_file_replaces_entries(tmp_path):
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
    # where the states lie is no promise of ours: the file may say otherwise than --offload
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "none"}}}))
    changed = twin.deepspeed_config(twin.Config(ds_config=str(file), offload="optimizer"), torch.float32)
    assert changed["zero_optimization"]["offload_optimizer"] == {"device": "none"}
    with pytest.raises(OSError, match="missing.json"):  # start() shows it as a sentence
        twin.deepspeed_config(twin.Config(ds_config="missing.json"), torch.float32)


@pytest.mark.parametrize(("sentence", "changes"), [
    ("train_batch_size = 7 must divide by 2", {"train_batch_size": 7, "ppo_mini_batch_size": 7}),
    ("every rank takes the GPU of its own number", {"device": "mps:0"}),
    ("10 responses per rank", {"critic_early_stop": True, "ppo_epochs": 2, "train_batch_size": 18,
                               "ppo_mini_batch_size": 9}),
    ("offload optimizer needs zero_stage 2 or 3", {"offload": "optimizer", "zero_stage": 0}),
    ("offload all needs zero_stage 3", {"offload": "all"})])
def test_what_two_ranks_cannot_do_is_one_sentence(sentence, changes, monkeypatch):
    monkeypatch.setattr(twin, "WORLD", 2)
    with pytest.raises(twin.UsageError, match=sentence):
        twin.check_config(twin.Config(**changes))


def test_every_row_belongs_to_one_rank_and_keeps_its_place(monkeypatch):
    monkeypatch.setattr(twin, "WORLD", 3)
    config = twin.Config(train_batch_size=6, rollout_n=2)
    rows = [11, 0, 5, 4, 7, 3, 8]
    found = []
    for rank in range(3):
        monkeypatch.setattr(twin, "RANK", rank)
        found += [4 * rank + i for i in twin.own_rows(rows, config)]
    assert found == [0, 3, 5, 4, 7, 11, 8]  # rank by rank, each in the order of the mini-batch


def test_a_rank_with_fewer_passes_adds_some_without_rows_and_with_zeros(monkeypatch):
    monkeypatch.setattr(twin, "max_over_ranks", lambda count: count + 2)  # another rank has two more
    rollout = twin.Rollout([[1], [2]], [[3, 4], [5]], torch.ones(2, 2), torch.ones(2, 2))
    passes = twin.in_step(iter([([1], rollout.take([1]))]), rollout)
    assert [rows for rows, _ in passes] == [[1], [], []]
    _, nothing = passes[-1]
    assert nothing.responses == [[3, 4]] and nothing.mask.sum() == nothing.old_logprobs.sum() == 0
    assert rollout.mask.sum() == 4, "the rollout keeps its own"


@pytest.mark.parametrize(("ranks", "prompts"), [(2, 6), (3, 6), (4, 4)])
def test_a_size_that_is_suggested_divides_by_the_ranks(ranks, prompts, monkeypatch):
    monkeypatch.setattr(twin, "WORLD", ranks)
    config = twin.Config(train_batch_size=64, ppo_mini_batch_size=16)
    assert twin.fitting_sizes(7, config) == f"use --train_batch_size {prompts} --ppo_mini_batch_size 1"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_noise_of_a_response_does_not_depend_on_the_number_of_ranks(ranks, monkeypatch):
    """The responses of all ranks, one after the other, are those of one process."""
    config = twin.Config(max_response_length=5, temperature=1.0)

    class Model:
        lm = type("Lm", (), {"device": torch.device("cpu")})
        select_adapter = staticmethod(lambda: None)

    seen = []
    monkeypatch.setattr(twin, "WORLD", ranks)
    monkeypatch.setattr(twin, "decode", lambda model, prompts, noise, *rest: (noise.tolist(), noise.tolist()))
    for rank in range(ranks):
        monkeypatch.setattr(twin, "RANK", rank)
        prompts = [[1] * (i + 1) for i in range(8)][8 * rank // ranks : 8 * (rank + 1) // ranks]
        seen += twin.generate(Model, prompts, {0}, config, twin.seeded("cpu", 3))[0]
    assert seen == torch.rand(8, 5, generator=ppo_llm.seeded("cpu", 3)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks, forked from a process that has imported everything.

has_compiler = bool(shutil.which("g++") and shutil.which("ninja"))
launches = [pytest.mark.slow, pytest.mark.skipif(not has_compiler, reason="DeepSpeed compiles with g++ and ninja")]


def launched(test):
    """Marks a test that starts ranks."""
    for mark in launches:
        test = mark(test)
    return test


def environment(**more) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), **more}


@pytest.fixture(scope="module")
def forks():
    """Starts processes in which all is imported but the file itself."""
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ppo_llm", "multigpu_worker", "deepspeed", "peft",
                                    "deepspeed.runtime.zero.muon.original_muon",
                                    "transformers.models.qwen2.modeling_qwen2"])
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), path]))
        for name, x in environment().items():
            patch.setenv(name, x)
        multiprocessing.forkserver.ensure_running()
    return context


class Ranks:
    """Processes without a launcher, which would end one when the other ends."""

    def __init__(self, forks, folder: Path, arguments: list[str] | None = None, world: int = 2):
        shared = environment(WORLD_SIZE=str(world))
        self.outputs = [folder / f"rank{i}.txt" for i in range(world)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            own = {"RANK": str(i), "LOCAL_RANK": str(i)}
            process = forks.Process(target=multigpu_worker.run_rank, args=(shared | own, folder, output, arguments))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; ranks that do not end in time are killed, and the test fails."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"a rank did not end within {seconds} s:\n{self.text()}"
        return codes

    def text(self) -> str:
        return "\n".join(f"--- rank {i}\n{path.read_text()[-3000:]}" for i, path in enumerate(self.outputs))

    def wait_for(self, sign: Path, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not sign.exists():
            if time.monotonic() > end or any(process.exitcode is not None for process in self.processes):
                self.wait(1)
                pytest.fail(f"no {sign.name}:\n{self.text()}")
            time.sleep(0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first problems of the demo: reading all takes longer than a step."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join((DEMO / "train.jsonl").read_text().splitlines(True)[:40]))
    return path


def make_rollout(path: Path, settings: dict) -> None:
    """A rollout of the demo model with ragged lengths and all that an update needs."""
    config = dataclasses.replace(ppo_llm.DEMO, **settings)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    models = ppo_llm.build_models(tokenizer, config)
    train, _ = ppo_llm.load_examples(tokenizer, config)
    examples = [example for example in train[: config.train_batch_size] for _ in range(config.rollout_n)]

    def reward(examples, responses):
        return [len(text) % 3 - 1.0 for text in responses]

    rollout, _ = ppo_llm.collect_rollout(models, reward, examples, 0, 0.05, config)
    assert len(set(map(len, rollout.responses))) > 3
    rollout.is_weights = (0.5 * torch.randn_like(rollout.mask)).exp().clamp(max=2.0)
    kept = {"prompts": rollout.prompts, "responses": rollout.responses}
    for name, x in vars(rollout).items():
        if isinstance(x, torch.Tensor) and x.dim() == 2:
            kept[name] = x
    torch.save(kept, path)


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


def direction_and_length(one: Path, other: Path, kind: str) -> tuple[float, float]:
    """Norm of the difference of all tensors of a kind, scaled to norm 1, and the ratio of their norms before that."""
    a = load_file(one)
    b = load_file(other)
    names = [name for name in a if name.startswith(f"{kind}/")]
    assert names and sorted(names) == sorted(name for name in b if name.startswith(f"{kind}/"))
    length_a = norm([a[n] for n in names])
    length_b = norm([b[n] for n in names])
    return norm([a[n].double() / length_a - b[n].double() / length_b for n in names]), length_b / length_a


def distance(one: Path, other: Path, kind: str, start: Path | None = None) -> float:
    """Norm of the difference of all tensors of a kind over the norm; with start, its maximum over the movement's."""
    a = load_file(one)
    b = load_file(other)
    names = [name for name in a if name.startswith(f"{kind}/")]
    assert names and sorted(names) == sorted(name for name in b if name.startswith(f"{kind}/"))
    if start is None:
        return norm([a[n] - b[n] for n in names]) / norm([a[n] for n in names])
    begin = load_file(start)
    movement = max((a[n] - begin[n]).abs().max() for n in names)
    return (max((a[n] - b[n]).abs().max() for n in names) / movement).item()


# ---------------------------------------------------------------------------------------------------------------------
# The same rollouts give the same update.

LORA = PPO | {"lora_rank": 8, "lr": 1e-3}  # the critic has an adapter of its own on the same trunk
ONE = {"ppo": PPO, "grpo": GRPO, "lora": LORA, "ppo-bf16": PPO | BF16, "grpo-bf16": GRPO | BF16,
       "lora-bf16": LORA | BF16, "shared": PPO | {"critic": "shared"},
       "recomputed": PPO | {"gradient_checkpointing": True},
       "held-out": PPO | {"critic_early_stop": True, "critic_ppo_epochs": 3, "ppo_epochs": 1},
       "hard": PPO | {"train_batch_size": 8, "ppo_mini_batch_size": 2, "ppo_epochs": 1}}
HARD = [{"early_stop_kl": 1e-9}, {"poison": True}, {}]  # a gradient is dropped, a step skipped, then all goes on
TWO = [(f"{name}-{layout}", name, layout) for name, layouts in {
    "ppo": ["zero0", "zero2", "zero3"], "grpo": ["zero0", "zero2", "zero3"], "lora": ["zero0", "zero2", "zero3"],
    "ppo-bf16": ["zero2"], "grpo-bf16": ["zero3"], "lora-bf16": ["zero2"], "shared": ["zero2", "zero3"],
    "recomputed": ["zero3"], "held-out": ["zero2"], "hard": LAYOUTS}.items() for layout in layouts]


@pytest.fixture(scope="module")
def updates(tmp_path_factory, forks, stuck) -> Path:
    """All cases: `one` by ppo_llm.py, `two` by two ranks in one launch."""
    folder = tmp_path_factory.mktemp("updates")
    for name in ("ppo", "grpo"):
        make_rollout(folder / f"{name}.pt", ONE[name])
    cases = {}
    for name, config in ONE.items():
        rollout = "grpo.pt" if name.startswith("grpo") else "ppo.pt"
        cases[name] = {"name": name, "config": config, "export": name in ("ppo", "lora"),
                       "rollout": str(folder / rollout), "updates": HARD if name == "hard" else [{}]}
        if name.endswith("bf16"):  # of 16 responses, one a pass, rank 0 has the first 8
            cases[name]["ranks_order"] = 8
    two = [cases[name] | {"name": new, "ranks": LAYOUTS[layout]} for new, name, layout in TWO]
    two.append(cases["ppo"] | {"name": "dropped", "ranks": {}, "drop": True, "export": False})
    (folder / "cases.json").write_text(json.dumps(two))
    ranks = Ranks(forks, folder)
    with pytest.MonkeyPatch.context() as patch:  # the head's chunks are small in both
        patch.setattr(ppo_llm, "LOGITS_PER_CHUNK", ppo_llm.LOGITS_PER_CHUNK)
        multigpu_worker.run_cases(ppo_llm, copy.deepcopy(list(cases.values())), folder / "one")
    assert ranks.wait(900) == [0, 0], ranks.text()
    return folder


def compare(one: Path, two: Path) -> dict[str, float]:
    """Relative error of the first gradient and, after 3 steps and at the end, of the weights by how far they moved.

    Clipping multiplies the whole gradient by grad_clip / norm. On a CPU torch adds the squares of a norm in fp32, one
    after the other, which makes that of the embedding 6e-6 too small; DeepSpeed's ZeRO adds them otherwise. So the
    direction is compared to 5e-7, and the length, which has this factor, to 5e-6.
    """
    errors = {}
    for path in sorted(one.glob("*_[13l]*.safetensors")):
        other = two / path.name
        start = path.with_name(path.name.split("_")[0] + "_start.safetensors")
        assert distance(start, two / start.name, "weight") == 0
        if path.stem.endswith("_1"):  # after one step AdamW's first mean is 0.1 times the clipped gradient
            errors[path.stem], length = direction_and_length(path, other, "exp_avg")
            bar = 5e-7  # measured: up to 3e-7
            assert abs(length - 1) <= 5e-6, (path.stem, length)
        else:
            errors[path.stem] = distance(path, other, "weight", start)
            bar = 0.02
        assert errors[path.stem] <= bar, (path.stem, errors[path.stem])
    assert {"actor_1", "actor_last"} <= set(errors)
    return errors


@launched
@pytest.mark.parametrize(("new", "name", "layout"), TWO)
def test_two_ranks_take_the_steps_of_one_process(new, name, layout, updates):
    errors = compare(updates / "one" / name, updates / "two" / new)
    print(new, {name: f"{error:.1e}" for name, error in errors.items()})
    ours, theirs = (json.loads((updates / x / "metrics.json").read_text()) for x in (f"one/{name}", f"two/{new}"))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4 if "bf16" not in name else 2e-3, nan_ok=True)


@launched
def test_a_dropped_micro_batch_does_not_go_unnoticed(updates):
    with pytest.raises(AssertionError, match="_1"):
        compare(updates / "one" / "ppo", updates / "two" / "dropped")


@launched
def test_a_gradient_is_dropped_and_a_step_skipped_where_the_test_says_so(updates):
    for folder in [updates / "one" / "hard", *(updates / "two").glob("hard-*")]:
        critic, actor, _, poisoned, *_, last = json.loads((folder / "metrics.json").read_text())
        assert math.isnan(poisoned["optim/grad_norm"]) or poisoned["optim/skipped_steps"] == 2
        assert critic["optim/skipped_steps"] == 0 and last["optim/skipped_steps"] == 2


@launched
@pytest.mark.parametrize("name", ["ppo", "lora"])
@pytest.mark.parametrize("layout", ["zero0", "zero2", "zero3"])
def test_the_exported_policy_and_critic_are_whole_and_equal(name, layout, updates):
    for part in ("model", "critic"):
        expected = updates / "one" / name / part
        found = updates / "two" / f"{name}-{layout}" / part
        weights = "adapter_model.safetensors" if (name, part) == ("lora", "model") else "model.safetensors"
        a = load_file(expected / weights)
        b = load_file(found / weights)
        assert {key: x.shape for key, x in a.items()} == {key: x.shape for key, x in b.items()}
        for key, x in a.items():
            assert torch.allclose(x, b[key], atol=1e-4), key
        assert sorted(path.name for path in expected.iterdir()) == sorted(path.name for path in found.iterdir())
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(found)
    assert critic.score.weight.abs().max() > 0  # it was zero at the start


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs: the same command on one rank or two; checkpoints; the launchers.

RUN = {"total_steps": 3, "train_batch_size": 8, "ppo_mini_batch_size": 4, "eval_size": 5, "eval_every": 2, "lr": 1e-4,
       "eval_dataset": "demo", "save_every": 1, "save_total_limit": 9, "seed": 3, "device": "cpu"}
HOOK = """
import torch
def generate(model, prompts, stop_ids, config, generator):  # made up from the prompt; some probabilities are wrong
    responses = [[7 + len(prompt) % 50, 9, max(stop_ids)][: 2 + len(prompt) % 2] for prompt in prompts]
    return responses, [torch.full((len(x),), -0.1 * len(x)) for x in responses]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks, data, no_figures) -> Path:
    """Three steps by one process and by two ranks, and runs of two ranks that go on from checkpoints of each other."""
    folder = tmp_path_factory.mktemp("runs")
    settings = RUN | {"dataset": str(data)}
    (folder / "hook.py").write_text(HOOK)
    hook = {"run": "hook", "rollout": f"{folder}/hook.py:generate", "total_steps": 1, "eval_every": 0}
    one = [{"run": "straight"}, hook]
    multigpu_worker.run_cases(ppo_llm, [{"name": "one", "runs": [settings | changes for changes in one]}], folder)
    foreign = str(folder / "one" / "straight" / "checkpoints" / "step_2")
    own = str(folder / "two" / "runs" / "zero3" / "checkpoints" / "step_2")
    two = [{"run": "zero2"}, {"run": "zero3", "zero_stage": 3}, {"run": "again3", "zero_stage": 3, "resume": own},
           {"run": "again2", "resume": own}, {"run": "again0", "zero_stage": 0, "resume": own},
           {"run": "foreign", "resume": foreign}, hook,
           {"run": "bf16", "dtype": "bfloat16", "total_steps": 1, "eval_every": 0}]
    (folder / "cases.json").write_text(json.dumps([{"name": "runs", "runs": [settings | changes for changes in two]}]))
    ranks = Ranks(forks, folder)
    assert ranks.wait(900) == [0, 0], ranks.text()
    multigpu_worker.run_cases(ppo_llm, [{"name": "one", "runs": [settings | {"run": "again", "resume": own}]}], folder)
    return folder


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step_3"


def compare_logs(one: Path, two: Path, steps: list[int]) -> None:
    """All metrics but times agree in every row."""
    ours = read_log(one)
    theirs = read_log(two)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == steps
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine) == set(other)
        for name in mine:
            if not name.startswith("time/"):
                assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), (mine["step"], name)


def read_samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@launched
@pytest.mark.parametrize("run", ["zero2", "zero3"])
def test_the_same_command_gives_the_same_run_on_one_rank_and_on_two(run, runs):
    one = runs / "one" / "straight"
    two = runs / "two" / "runs" / run
    compare_logs(one, two, [0, 1, 2, 3])  # with evaluations of 5 rows, 3 and 2 on the ranks
    ours, theirs = ([x for x in read_samples(path) if x["split"] == "train"] for path in (one, two))
    assert [x["step"] for x in theirs] == [1, 1, 2, 2, 3, 3], "only one rank writes samples"
    for key in ("prompt", "response", "score", "token"):
        assert [x[key] for x in ours[:2]] == [x[key] for x in theirs[:2]]
    steps = {x["step"] for x in read_samples(two) if x["split"] == "eval"}
    assert steps == {0, 2, 3}


@launched
def test_importance_weights_of_a_hook_are_those_of_one_process(runs):
    compare_logs(runs / "one" / "hook", runs / "two" / "runs" / "hook", [1])
    row = read_log(runs / "two" / "runs" / "hook")[0]
    assert row["rollout/logprob_gap"] > 0.1 and 0 < row["rollout/is_weight_mean"] < row["rollout/is_weight_max"]


@launched
def test_two_ranks_weigh_what_bfloat16_has_sampled(runs):
    row = read_log(runs / "two" / "runs" / "bf16")[0]
    assert 0 <= row["rollout/logprob_gap"] < 0.02 and row["rollout/is_weight_mean"] == pytest.approx(1, abs=0.1)
    assert row["policy/ratio_first"] == pytest.approx(1, abs=0.1) and row["optim/skipped_steps"] == 0


@launched
def test_a_resumed_run_of_the_same_ranks_is_exact(runs):
    two = runs / "two" / "runs"
    for role in ("actor", "critic"):
        a, b = (load_file(last_checkpoint(two / run) / f"{role}.safetensors") for run in ("zero3", "again3"))
        assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@launched
@pytest.mark.parametrize("run", ["two/runs/again2", "two/runs/again0", "two/runs/foreign", "one/again"])
def test_a_checkpoint_goes_on_under_another_stage_or_number_of_ranks(run, runs):
    expected = last_checkpoint(runs / "two" / "runs" / "zero3")
    start = runs / "one" / "straight" / "checkpoints" / "step_1"
    for role in ("actor", "critic"):
        files = [x / f"{role}.safetensors" for x in (expected, last_checkpoint(runs / run))]
        assert distance(*files, "weight", start / f"{role}.safetensors") <= 0.02
        assert distance(*files, "exp_avg") <= 1e-3


@launched
def test_a_checkpoint_of_two_ranks_is_whole(runs):
    folder = runs / "two" / "runs" / "zero3" / "checkpoints" / "step_2"
    assert ppo_llm.is_whole(folder)
    tensors = load_file(folder / "actor.safetensors")
    shapes = {name.removeprefix("weight/"): x.shape for name, x in tensors.items() if name.startswith("weight/")}
    assert len(shapes) > 10
    for name, shape in shapes.items():
        assert tensors[f"exp_avg/{name}"].shape == tensors[f"exp_avg_sq/{name}"].shape == shape and shape.numel()
        assert tensors[f"step/{name}"] == 8  # 2 steps of 2 epochs of 2 mini-batches


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable: what a process sees of two machines that share a file system.

    Their names and cables, or nothing where that is not permitted.
    """
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    names = [f"ppo{os.getpid()}{x}" for x in "ab"]
    cables = [f"{name[-8:]}v" for name in names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
        found = list(zip(names, cables, strict=True))
    except (OSError, subprocess.CalledProcessError):
        found = []
    yield found
    if shutil.which("ip"):
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


@launched
def test_the_launcher_runs_the_file_copied_alone_to_an_empty_folder_on_two_hosts_or_one(hosts, tmp_path, data):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    shutil.copy(ROOT / "ppo_llm_multigpu.py", tmp_path)
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    port = environment()["MASTER_PORT"]
    commands = [[DEEPSPEED, "--num_gpus", "2", "--master_port", port]]
    environments = [environment()]
    if hosts:
        flags = f"--hostfile hosts --no_ssh --master_addr 10.77.0.1 --master_port {port} --node_rank".split()
        commands = [["ip", "netns", "exec", name, DEEPSPEED, *flags, str(i)] for i, (name, _) in enumerate(hosts)]
        environments = [environment(GLOO_SOCKET_IFNAME=cable) for _, cable in hosts]
    flags = f"""--model {DEMO} --dataset {data} --total_steps 1 --train_batch_size 4 --ppo_mini_batch_size 4
        --eval_every 0 --max_prompt_length 128 --max_response_length 24 --output_dir run""".split()
    processes = []
    for command, own in zip(commands, environments, strict=True):
        processes.append(subprocess.Popen(
            [*command, "ppo_llm_multigpu.py", *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | own))
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {0}, "\n".join(output[-3000:] for output in outputs)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1]
    assert [output.count("  1/1  ") for output in outputs] == [1, 0][: len(outputs)], "one rank speaks"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resume_command"].startswith("deepspeed ")


# ---------------------------------------------------------------------------------------------------------------------
# Faults, without a launcher that would end the others.

REWARD = """
import os, pathlib, time
def reward(prompts, responses, answers):
    rank, here = os.environ["RANK"], pathlib.Path({folder!r})
    calls = len(list(here.glob(f"scoring{{rank}}_*")))
    (here / f"scoring{{rank}}_{{calls}}").touch()
    while {wait}:
        time.sleep(0.05)
    if {fail}:
        raise ValueError("no score today")
    return [{score} for response in responses]
"""


def start(forks, data: Path, folder: Path, *flags: str, wait: str = "False", fail: str = "False",
          score: str = "len(response)", world: int = 2) -> Ranks:
    """Three steps with a reward that waits or fails where it is told to."""
    (folder / "reward.py").write_text(REWARD.format(folder=str(folder), wait=wait, fail=fail, score=score))
    common = "--total_steps 3 --train_batch_size 4 --ppo_mini_batch_size 4 --eval_every 0 --device cpu --output_dir run"
    hook = ["--reward", f"{folder}/reward.py:reward", "--dataset", str(data)]
    return Ranks(forks, folder, [*common.split(), *hook, *flags], world)


def saved(folder: Path) -> list[str]:
    return [path.name for path in ppo_llm.checkpoints(folder / "run")]


@pytest.fixture(scope="module")
def stuck(forks, data, tmp_path_factory) -> Ranks:
    """Rank 1 scores for ever; the deadline passes while other tests run."""
    return start(forks, data, tmp_path_factory.mktemp("stuck"), "--dist_timeout", "20", wait="rank == '1'")


@launched
def test_when_a_rank_is_killed_the_other_ends_and_names_itself_and_its_phase(forks, data, tmp_path):
    ranks = start(forks, data, tmp_path, wait="rank == '1'")
    ranks.wait_for(tmp_path / "scoring1_0", 300)
    ranks.processes[1].kill()
    assert ranks.wait(300) == [1, -signal.SIGKILL]
    assert "rank 0 failed in collect_rollout" in ranks.text()


@launched
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_that_raises_on_one_rank_ends_all_and_costs_no_finished_step(rank, forks, data, tmp_path):
    ranks = start(forks, data, tmp_path, fail=f"rank == '{rank}' and calls == 1")
    assert ranks.wait(300) == [2, 2], ranks.text()
    texts = [path.read_text() for path in ranks.outputs]
    assert f"error: the reward raised ValueError('no score today') (rank {rank})" in texts[rank]
    assert f"error: another rank has failed (rank {1 - rank})" in texts[1 - rank]
    assert "Traceback" in texts[rank] and "Traceback" not in texts[1 - rank]
    assert saved(tmp_path) == ["step_1"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@launched
def test_three_skipped_steps_end_all_ranks_and_the_last_checkpoint_stays(forks, data, tmp_path):
    score = "1e30 if calls == 1 and rank == '1' else len(response)"
    ranks = start(forks, data, tmp_path, "--save_every", "1", "--ppo_mini_batch_size", "2", score=score)
    assert ranks.wait(300) == [2, 2], ranks.text()
    for rank, path in enumerate(ranks.outputs):
        assert "error: three gradients in a row are not finite" in path.read_text(), ranks.text()
        assert f"(rank {rank})" in path.read_text()
    assert saved(tmp_path) == ["step_1"]


@launched
def test_sigterm_to_one_rank_saves_the_same_step_on_all_and_another_number_of_ranks_goes_on(forks, data, tmp_path):
    ranks = start(forks, data, tmp_path, wait="not (here / 'go').exists()")
    ranks.wait_for(tmp_path / "scoring1_0", 300)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert ranks.wait(300) == [143, 143], ranks.text()
    assert saved(tmp_path) == ["step_1"]
    assert "stopped after step 1; continue with: deepspeed ppo_llm_multigpu.py" in ranks.outputs[0].read_text()
    assert "stopped" not in ranks.outputs[1].read_text().replace("stopping when", "")
    again = start(forks, data, tmp_path, world=1)
    assert again.wait(300) == [0], again.text()
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2, 3]


@launched
def test_when_a_rank_is_stuck_all_end_at_the_deadline_and_show_where(stuck):
    assert stuck.wait(300) == [1, 1]
    assert "rank 0 failed in collect_rollout" in stuck.text()
    text = stuck.outputs[1].read_text()
    assert "in reward" in text and "in collect_rollout" in text
