"""The literal command of the README against a Hub cache made here, and the script alone in a folder."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tokenizers
import transformers
from conftest import make_lm, read_log

import ppo_llm

SCRIPT = Path(ppo_llm.__file__)
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PROMPT = """<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
<|im_start|>user
Ann has 0 apples and gets 3. How many now? Let's think step by step and output the final answer after "####".<|im_end|>
<|im_start|>assistant
"""
GENERATION = {"repetition_penalty": 1.1, "top_k": 20, "top_p": 0.8, "temperature": 0.7, "do_sample": True,
              "eos_token_id": [258, 256], "pad_token_id": 256, "bos_token_id": 256}


def save_qwen(folder: Path) -> None:
    """Qwen2.5's conventions in small: byte-level, tied, more embedding rows than tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    fast.add_tokens(["You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
                     ppo_llm.GSM8K_INSTRUCTION,
                     " apples and gets 3. How many now?"])  # sentences as tokens: short prompts
    fast.save_pretrained(folder)
    lm = make_lm(vocab_size=320, tie_word_embeddings=True, max_position_embeddings=2048, eos_token_id=258,
                 pad_token_id=None, initializer_range=0.02)
    lm.generation_config = transformers.GenerationConfig(**GENERATION)
    lm.save_pretrained(folder)


def load_dataset(path: str, name: str | None = None, *, split: str) -> datasets.Dataset:
    """GSM8K as the Hub has it, with fewer rows."""
    assert (path, name) == ("openai/gsm8k", "main"), "Config name is missing"
    count = {"train": 260, "test": 6}[split]
    return datasets.Dataset.from_list([
        {"question": f"Ann has {i} apples and gets 3. How many now?",
         "answer": f"{i}+3={i + 3}\n#### {i + 3}"}
        for i in range(count)])


def load_alone(folder: Path):
    """The script as a module, copied into a folder of its own."""
    shutil.copy(SCRIPT, folder)
    found = importlib.util.spec_from_file_location("ppo_llm_alone", folder / SCRIPT.name)
    module = importlib.util.module_from_spec(found)
    sys.modules["ppo_llm_alone"] = module
    found.loader.exec_module(module)
    return module


def command(module, words: list, cwd: Path) -> tuple[int, str, str]:
    """A command line, run in this process: (exit code, stdout, stderr)."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["ppo_llm.py", *map(str, words)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = module.start()
    out.seek(0)
    return code, out.read(), err.getvalue()


@pytest.fixture(scope="module")
def qwen_run(tmp_path_factory, no_figures):
    """The README's command for Qwen2.5-0.5B, cut to one step: (output, folder of the run)."""
    tmp = tmp_path_factory.mktemp("hub")
    cache = tmp / "hub" / f"models--{QWEN.replace('/', '--')}"
    revision = "0123456789" * 4
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    save_qwen(cache / "snapshots" / revision)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp / "hub"))
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        words = ["--model", QWEN, "--total_steps", 1, "--max_response_length", 4, "--eval_size", 4,
                 "--device", "cpu"]
        code, out, err = command(ppo_llm, words, tmp)
    assert code == 0, err
    return out, tmp / "output" / "ppo_metrics"


@pytest.mark.slow
def test_the_literal_qwen_command_makes_its_steps(qwen_run):
    rows = read_log(qwen_run[1])
    assert [row["step"] for row in rows] == [0, 1]
    assert all("eval/accuracy" in row for row in rows) and rows[1]["policy/ratio_first"] < 1 + 1e-5
    assert qwen_run[1].resolve().name.startswith("ppo_llm-gsm8k-seed1-")


def test_the_literal_qwen_command_renders_the_published_prompt(qwen_run):
    lines = [line for line in qwen_run[0].splitlines() if line.startswith("first prompt: ")]
    assert lines == ["first prompt: " + PROMPT.replace("\n", "\\n")]


def test_the_literal_qwen_command_stops_at_both_end_tokens(qwen_run):
    assert "stop tokens: ['<|endoftext|>', '<|im_end|>']\n" in qwen_run[0]


def test_the_literal_qwen_command_trains_with_the_published_settings(qwen_run):
    config = json.loads((qwen_run[1] / "summary.json").read_text())["config"]
    published = {"train_batch_size": 256, "ppo_mini_batch_size": 64, "ppo_epochs": 1, "lr": 1e-6,
                 "critic_lr": 1e-5,
                 "kl_ctrl_coef": 0.001, "gamma": 1.0, "lam": 1.0, "clip_ratio": 0.2, "entropy_coeff": 0.001,
                 "dataset": "openai/gsm8k", "reward": "gsm8k", "max_prompt_length": 1024, "temperature": 1.0}
    assert {name: config[name] for name in published} == published
    plan = "1 steps of 256 responses to 256 of 260 prompts, 1 epochs of mini-batches of 64; 4 evaluation rows"
    assert plan in qwen_run[0]
    assert "options not given: those of the published GSM8K run" in qwen_run[0]


def test_the_model_exported_from_qwen_keeps_qwens_generation_config(qwen_run):
    exported = json.loads((qwen_run[1] / "model" / "generation_config.json").read_text())
    assert {name: exported.get(name) for name in GENERATION} == GENERATION
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen_run[1] / "model")
    assert model.config.tie_word_embeddings and model.get_output_embeddings().weight.shape[0] == 320


def test_the_script_alone_in_a_folder_trains_on_a_model_and_a_file(folder, tmp_path, no_figures):
    shutil.copy(folder / "prompts.jsonl", tmp_path / "file.jsonl")
    words = ["--model", folder, "--dataset", "file.jsonl", "--reward", f"{folder}/reward.py:coin",
             "--total_steps", 2,
             "--device", "cpu", "--max_prompt_length", 64, "--max_response_length", 8, "--train_batch_size",
             8,
             "--ppo_mini_batch_size", 4]
    code, _, err = command(load_alone(tmp_path), words, tmp_path)
    assert code == 0, err
    assert [row["step"] for row in read_log(tmp_path / "output" / "ppo_metrics")] == [1, 2]


def test_the_script_alone_without_a_model_asks_for_one_in_a_sentence(tmp_path):
    code, out, err = command(load_alone(tmp_path), [], tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "give --model" in err
    assert not (tmp_path / "output").exists()


OFFLINE = """
import runpy, socket, sys
def refuse(*address):
    open("attempt", "a").write(f"{address[1:]}\\n")
    raise OSError("there is no network")
socket.socket.connect = socket.socket.connect_ex = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_network(folder: Path, cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    """ppo_llm.py, not told that there is no network, where every connection fails and is noted."""
    common = f"""{SCRIPT} --dataset {folder}/prompts.jsonl --reward {folder}/reward.py:coin --device cpu
        --total_steps 1 --train_batch_size 8 --ppo_mini_batch_size 4 --max_prompt_length 16
        --max_response_length 8
        --eval_every 0"""
    environment = {k: x for k, x in os.environ.items() if not k.startswith("HF_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", OFFLINE, *common.split(), *flags], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_on_local_files_makes_no_connection(folder, tmp_path):
    done = run_without_network(folder, tmp_path, "--model", str(folder))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "attempt").exists()


@pytest.mark.slow
def test_a_remote_model_without_network_is_one_sentence_in_half_a_minute(folder, tmp_path):
    began = time.monotonic()
    done = run_without_network(folder, tmp_path, "--model", "no-such/model")
    assert time.monotonic() - began < 60  # the imports of a busy machine included
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: model no-such/model: " in done.stderr
