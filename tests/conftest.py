"""What the tests share: tiny random models in ordinary Hugging Face folders, and configs that use them on the CPU."""

import copy
import csv
import fcntl
import functools
import json
import os
import pty
import random
import string
import struct
import subprocess
import sys
import termios
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.figure
import pytest
import tokenizers
import torch
import transformers

import ppo_llm

torch.set_num_threads(1)

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1,
         "bos_token_id": None, "initializer_range": 0.2, "tie_word_embeddings": False}
GPT2_SHAPE = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "pad_token_id": 0,
              "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2,
              "tie_word_embeddings": False}
REWARD = """
def count(prompts, responses, answers):  # part of 8 tokens that are the answer
    return [response.count(answer) / 8 for response, answer in zip(responses, answers)]

def constant(prompts, responses, answers):
    return [1.0 for _ in responses]

def coin(prompts, responses, answers):  # 0 or 1, as good as random
    return [float(sum(map(ord, response)) % 2) for response in responses]
"""


def make_tokenizer(size: int = 64, **special) -> transformers.PreTrainedTokenizerFast:
    """One letter or digit per token, from a = 3, with nothing for other characters: what Qwen2's class can load."""
    words = ["<pad>", "<|endoftext|>", "<bot>", *(string.ascii_letters + string.digits)][:size]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    special = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"} | special
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}")
    return fast


def make_lm(kind: str = "qwen2", seed: int = 0, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    shape = (GPT2_SHAPE if kind == "gpt2" else SHAPE) | changes
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape)).eval()


def plain(lm: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy that computes attention as transformers does: what the packed passes are compared with."""
    twin = copy.deepcopy(lm)
    twin.set_attn_implementation("eager")
    return twin


def save_folder(folder: Path, lm: transformers.PreTrainedModel, tokenizer=None) -> Path:
    """A Hugging Face folder, with 10 prompts and three rewards beside the weights."""
    lm.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": string.ascii_letters[i : 2 * i + 1], "answer": "e"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run_in_a_terminal(command: list, width: int, **environment: str) -> tuple[int, str]:
    """Exit code of a command on a pseudo-terminal of this width, and all that it showed."""
    terminal, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    environment = os.environ | {"COLUMNS": str(width)} | environment
    process = subprocess.Popen([str(x) for x in command], stdout=worker, stderr=worker, env=environment)
    os.close(worker)
    shown = b""
    try:
        while chunk := os.read(terminal, 1000):
            shown += chunk
    except OSError:  # how the end of a pseudo-terminal is told
        os.close(terminal)
    return process.wait(), shown.decode()


LONG = ("test_multigpu", "test_reliability", "test_update", "test_checkpoint", "test_classic", "test_command_line")


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take longest come first: a file stays on one worker, and at the end none should wait."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module
def pytest_runtest_setup():
    """ppo_classic.py takes all cores where it sees pixels; another number of threads rounds in another way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("qwen2"), make_lm())


@pytest.fixture(scope="session")
def flat_folder(tmp_path_factory) -> Path:
    """A tied model whose first policy is nearly uniform: where learning tests begin."""
    return save_folder(tmp_path_factory.mktemp("flat"), make_lm(tie_word_embeddings=True, initializer_range=0.02))


@pytest.fixture(scope="module")
def no_figures():
    """For tests that do not look at training_curves.png: drawing it takes longer than training."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **rest: Path(path).touch())
        yield


def make_config(folder: Path, **changes) -> ppo_llm.Config:
    settings = {"model": str(folder), "dataset": str(folder / "prompts.jsonl"), "reward": f"{folder}/reward.py:coin",
                "device": "cpu", "train_batch_size": 8, "ppo_mini_batch_size": 4, "max_prompt_length": 16,
                "max_response_length": 8, "eval_every": 0, "save_every": 0, "total_steps": 3, "lr": 1e-3,
                "critic_lr": 1e-2, "weight_decay": 0.0}
    return ppo_llm.Config(**settings | changes)


def make_models(config: ppo_llm.Config) -> ppo_llm.Models:
    """The models of a config; about one response in three ends before max_response_length = 8."""
    models = ppo_llm.build_models(transformers.AutoTokenizer.from_pretrained(config.model), config)
    models.stop_ids |= set(range(20, 30))
    return models


def make_prompts(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    choice = random.Random(seed)
    return [[choice.randrange(3, 64) for _ in range(choice.randrange(1, longest + 1))] for _ in range(count)]


@functools.cache
def load_reward(spec: str):
    """A reward, loaded once."""
    return ppo_llm.load_reward(ppo_llm.Config(reward=spec))


def collect(models: ppo_llm.Models, config: ppo_llm.Config, step: int = 0, kl_coef: float | None = None):
    """A rollout of the config's size and its metrics."""
    prompts = make_prompts(config.train_batch_size, seed=step)
    examples = [ppo_llm.Example("", "", prompt) for prompt in prompts for _ in range(config.rollout_n)]
    reward = load_reward(config.reward)
    coefficient = config.kl_coef if kl_coef is None else kl_coef
    return ppo_llm.collect_rollout(models, reward, examples, step, coefficient, config)


def take_steps(models: ppo_llm.Models, config: ppo_llm.Config, count: int = 1) -> dict:
    """Some steps of training, without logs. The metrics of the last one."""
    for step in range(count):
        rollout, metrics = collect(models, config, step)
        for role in ["critic"] * bool(models.critic) + ["actor"]:
            metrics |= ppo_llm.update(role, models, rollout, step, count, config.kl_coef, config)
    return metrics


def read_log(run_dir: Path) -> list[dict]:
    """The rows of training_metrics.csv; what was not measured is left out."""
    with open(run_dir / "training_metrics.csv", newline="") as file:
        return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


@pytest.fixture
def gradients(monkeypatch) -> list:
    """The gradient of every mini-batch; the weights stay as they are."""
    kept = []

    def keep(learner):
        kept.append([w.grad.clone() for w in learner.masters if w.grad is not None])
        return 1.0

    monkeypatch.setattr(ppo_llm.Learner, "clip_gradient", keep)
    monkeypatch.setattr(ppo_llm.Learner, "step", lambda learner, lr_factor, grad_norm: learner.drop_gradient())
    return kept
