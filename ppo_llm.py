"""Proximal Policy Optimization for language models: the whole algorithm in one file.

    python ppo_llm.py                                       # bundled demo: 5 minutes on a laptop, downloads nothing
    python ppo_llm.py --model Qwen/Qwen2.5-0.5B-Instruct    # GSM8K with the published settings, on a GPU
    python ppo_llm.py --adv_estimator grpo --rollout_n 8 --train_batch_size 16     # no critic: groups of 8 responses

    for step in range(total_steps):
        rollout = generate(policy, prompts)                             responses and their old_logprobs
        scores = reward(prompts, responses, answers)                    one number per response
        rewards = compute_rewards(scores, kl, kl_coef)                  on the last token, minus kl_coef * kl per token
        advantages, returns = compute_advantages(rewards, values)       GAE, or critic-free baselines
        for epoch, mini_batch in rollout:
            critic_loss = clipped_value_loss(values, old_values, returns)
            actor_loss = clipped_policy_loss(logprobs, old_logprobs, advantages) - entropy_coeff * entropy (+ kl)
        kl_controller.update(kl)                                        adaptive KL, when asked

Shapes: B sequences, T response tokens, N response tokens of a micro-batch in one row, H hidden size, V vocabulary.
[B, T] tensors are fp32, right-padded, 0 where `mask` is 0; index t of values and logprobs is the state before token t.

Where this differs from the papers and from other code, on purpose:
1. A loss is a weighted sum whose weights are known before the mini-batch is cut (`loss_weights`): micro-batch size and
   padding change memory and speed, never the result. Policy, value, entropy and KL losses share the weights.
2. Dual clip (arXiv:1912.09729) is on, c = 3. The value head starts at zero: V = 0, not noise, before the first update.
3. Log-probs, entropy and KL are of the policy that samples: logits divided by the temperature, never truncated.
4. A response cut at max_response_length counts as ended: V = 0 after it, nothing is bootstrapped (as verl and TRL).
5. Critic-free advantages use rewards that contain the KL, in verl's order; rloo_vectorized is rloo.
6. Prompt order, sampling noise and shuffles are functions of (seed, step): resuming needs no random-number state.
"""

import copy
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import datasets
import jinja2
import pandas
import torch
import transformers
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

HERE = Path(__file__).resolve().parent
GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
LOGITS_PER_CHUNK = 2**26  # fp32 logits that exist at once: 256 MB
OUR_MEASURES = """score score_std kl kl_sequence kl_coef accuracy accuracy_flexible standard_error
    standard_error_flexible failed""".split()  # of a reward, so no names for what a reward function measures
STRUCTURE = ("critic", "adv_estimator", "dtype", "lora_rank", "lora_alpha", "lora_target")  # a checkpoint depends on it
LOGPROBS, ENTROPY, VALUES, FULL_KL = range(4)  # what forward() returns
STOP: list[int] = []  # holds the SIGTERM that ends the run after its step, with a checkpoint
CHECK_EVERY = 8  # tokens decoded between two looks at which rows have finished
KL_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
KLPenalty = Literal["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "full"]
KLLoss = Literal[KLPenalty, "k1+", "kl+", "abs+", "k2+", "mse+", "k3+", "low_var_kl+"]
Estimator = Literal["gae", "grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


# ---- Config. Defaults: the published GSM8K run (verl, Qwen2.5-0.5B-Instruct). DEMO runs without --model --------------


@dataclass
class Config:
    # Run
    seed: int = 1  # seeds the prompt order, the sampling, the shuffles and the value head
    output_dir: str | None = None  # the run's folder; None: output/ppo_llm-DATASET-seedN-TIME
    resume: str = "auto"  # auto (continue what is in output_dir), never, must, or the path of a checkpoint
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 keeps fp32 masters; auto: by device
    deterministic: bool = False  # only deterministic kernels; slower on a GPU
    # Models
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # a Hugging Face name or folder; without this flag, the demo
    critic: Literal["separate", "shared", "adapter"] = "separate"  # own model; head on the policy; own LoRA adapter
    critic_model: str | None = None  # the separate critic starts from it, head too if a reward model; None: the policy
    value_head_init: Literal["zero", "normal"] = "zero"  # zero: V starts at 0; normal: N(0, 0.02), noise of +-10
    value_pooling: Literal["last", "mean"] = "last"  # the critic reads the last hidden state, or the mean of all so far
    reference: Literal["init", "previous", "mixed"] = "init"  # KL to the start, the policy of this rollout, or mixed
    reference_mix: float = 0.5  # weight of the previous policy in reference mixed
    lora_rank: int | None = None  # train LoRA adapters of this rank on the frozen policy (pip install peft); None: all
    lora_alpha: float | None = None  # an adapter counts lora_alpha / lora_rank times; None: twice
    lora_target: str = "all-linear"  # layers that get one: all-linear (but the output head), or names with commas
    merge_lora: bool = False  # export a plain model too, in fp32 (bf16 would round the adapter away)
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, about 30 % slower
    trust_remote_code: bool = False  # run Python code that comes with a model repository
    # Data
    dataset: str = "openai/gsm8k"  # demo, a Hub name NAME[:CONFIG[:SPLIT]], or a json, jsonl, csv or parquet file
    eval_dataset: str | None = None  # the same; None: the test split of demo and gsm8k, otherwise no evaluation
    prompt_column: str | None = None  # None: question, instruction (+ input), prompt or messages
    answer_column: str | None = None  # None: answer or output, where there is one
    system_prompt: str | None = None  # put before every prompt as a system turn
    max_prompt_length: int = 1024  # tokens
    overlong_prompt: Literal["drop", "truncate_left", "error"] = "drop"  # longer training prompts; evaluation truncates
    # Reward
    reward: str = "gsm8k"  # gsm8k (strict match), FILE.py:function(prompts, responses, answers), or a reward model
    reward_timeout: float = 300.0  # seconds a function may take to score a batch; then its process is killed
    reward_env: str = ""  # names, with commas, of the environment variables a function may see; it sees no other
    failed_score: float | None = None  # for responses a function fails on, which are counted; None: end with an error
    reward_attribution: Literal["terminal", "uniform", "discounted"] = "terminal"  # where the score goes
    attribution_discount: float = 0.95  # discounted: weight of a token relative to the next one
    missing_eos_penalty: float | None = None  # applied to the score of a response that was cut; None: no rule
    missing_eos_mode: Literal["subtract", "replace", "scale"] = "subtract"  # score - p, -p, or score * p
    overlong_buffer: int = 0  # score falls linearly by 1 over the last N tokens before the limit (DAPO)
    score_clip: float | None = None  # clip scores to [-c, c]
    whiten_rewards: bool = False  # scale the token rewards to unit variance, keeping their mean
    # KL against the reference policy
    use_kl_in_reward: bool | None = None  # None: unless use_kl_loss
    kl_penalty: KLPenalty = "k1"  # estimator in the reward; only k1 gives the gradient of KL(policy, reference)
    kl_ctrl_type: Literal["fixed", "adaptive"] = "fixed"  # adaptive: the coefficient is steered towards kl_ctrl_target
    kl_ctrl_coef: float = 0.001  # coefficient of the KL in the reward; 0: no reference model is loaded
    kl_ctrl_target: float | None = None  # KL to hold; None: 0.1 per token, 6.0 per sequence
    kl_ctrl_unit: Literal["token", "sequence"] = "token"  # of the target: mean per token (verl) or sum per sequence
    kl_ctrl_horizon: int = 10000  # responses over which the coefficient moves by at most 20 %
    use_kl_loss: bool = False  # KL as a term of the actor's loss instead of the reward
    kl_loss_coef: float = 0.001  # its coefficient (adaptive too, when kl_ctrl_type is)
    kl_loss_type: KLLoss = "k3+"  # estimator in the loss; k2, full and the + forms have the right gradient
    # Rollout
    train_batch_size: int = 256  # prompts per step
    rollout_n: int = 1  # responses per prompt
    max_response_length: int = 512  # tokens
    temperature: float = 1.0  # divides the logits, in sampling and in every log-probability
    top_p: float = 1.0  # nucleus sampling; below 1 the log-probs are still of the untruncated policy
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    rollout_slots: int = 256  # responses generated at a time
    # Advantage
    adv_estimator: Estimator = "gae"  # gae needs a critic, the others none
    gamma: float = 1.0  # discount per token
    lam: float = 1.0  # GAE lambda
    lam_critic: float | None = None  # another lambda for the returns the critic learns (VC-PPO); None: lam
    length_adaptive_alpha: float | None = None  # lambda = 1 - 1/(alpha * length) for the actor (VAPO; 0.05); None: lam
    norm_adv_by_std: bool = True  # grpo: divide by the group's standard deviation (off: Dr. GRPO)
    whiten_advantages: bool | None = None  # over all tokens of the rollout; None: as the estimator is defined
    # Loss
    clip_ratio: float = 0.2  # the ratio new/old is clipped to 1 +- this
    clip_ratio_low: float | None = None  # lower side; None: clip_ratio
    clip_ratio_high: float | None = None  # upper side; None: clip_ratio
    clip_ratio_c: float | None = 3.0  # dual clip: bound on the ratio where the advantage is negative; None: off
    cliprange_value: float | None = 0.5  # values move at most this far from the old ones; None: off
    vf_coef: float = 0.1  # weight of the value loss when critic is shared
    entropy_coeff: float = 0.001  # weight of the entropy bonus
    loss_agg_mode: Aggregation = "token-mean"  # how the losses of tokens become one number
    loss_scale_factor: float | None = None  # divisor of seq-mean-token-sum-norm; None: max_response_length
    # Optimization
    total_epochs: int = 15  # passes over the data set
    total_steps: int | None = None  # steps (rollout + update); None: from total_epochs
    ppo_epochs: int = 1  # passes over each rollout
    ppo_mini_batch_size: int = 64  # responses per optimizer step
    critic_ppo_epochs: int | None = None  # passes of the critic; None: ppo_epochs
    critic_ppo_mini_batch_size: int | None = None  # responses per step of the critic; None: ppo_mini_batch_size
    ppo_micro_batch_size: int | None = None  # responses per forward and backward; None: no such limit
    micro_batch_tokens: int = 16384  # tokens per pass; changes memory and speed only
    lr: float = 1e-6  # learning rate of the policy
    critic_lr: float = 1e-5  # learning rate of the critic or of the value head
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 0  # steps (rollout + update) of linear warm-up
    weight_decay: float = 0.01  # of AdamW
    grad_clip: float = 1.0  # gradient norm is clipped to this
    early_stop_kl: float | None = None  # end the actor's update when a mini-batch's approx_kl passes this
    critic_warmup: int = 0  # first steps in which only the critic learns
    critic_early_stop: bool = False  # end the critic's epochs when the value loss on a held-out tenth stops falling
    # Evaluation, logs, checkpoints
    eval_every: int = 10  # steps between greedy evaluations (also before the first step and at the end); 0: never
    eval_size: int | None = None  # evaluation rows; None: all
    eval_only: bool = False  # evaluate the model and exit
    print_samples: int = 2  # responses written to samples.jsonl per rollout and per evaluation
    save_every: int = 50  # steps between checkpoints; 0: only the final model
    save_total_limit: int = 2  # newest checkpoints that are kept
    track: Literal["none", "wandb", "trackio"] = "none"  # also send the metrics there (pip install it first)

    @property
    def rollout_size(self) -> int:  # B, responses per step
        return self.train_batch_size * self.rollout_n

    @property
    def uses_critic(self) -> bool:
        return self.adv_estimator == "gae"

    @property
    def on_policy(self) -> bool:  # one optimizer step per rollout: the old policy is the current one
        return self.ppo_epochs == 1 and self.ppo_mini_batch_size == self.rollout_size

    @property
    def kl_in_reward(self) -> bool:
        return not self.use_kl_loss if self.use_kl_in_reward is None else self.use_kl_in_reward

    @property
    def kl_coef(self) -> float:  # at the start; 0: no KL is used and no reference model is needed
        return self.kl_loss_coef if self.use_kl_loss else self.kl_ctrl_coef if self.kl_in_reward else 0.0

    @property
    def kl_kind(self) -> str:  # estimator of the KL in use
        kind = self.kl_loss_type if self.use_kl_loss else self.kl_penalty
        return KL_ALIASES.get(kind, kind)


DEMO = Config(model=str(HERE / "assets" / "demo"), dataset="demo", total_steps=60, train_batch_size=128, ppo_epochs=2,
              ppo_mini_batch_size=32, max_response_length=64, lr=3e-5, critic_lr=3e-4, lam=0.95, weight_decay=0.0)


def check_config(c: Config) -> None:
    """Refuses what cannot work, before anything is loaded. Raises UsageError."""
    own = [x for x in "model ppo_epochs ppo_mini_batch_size warmup early_stop".split() if vars(c)[f"critic_{x}"]]
    adaptive, size = c.kl_ctrl_type == "adaptive", c.rollout_size
    given = {name: x for name, x in vars(c).items() if type(x) in (int, float)}  # positive, unless it is named here:
    exempt = """seed failed_score missing_eos_penalty vf_coef entropy_coeff overlong_buffer reference_mix gamma lam
        lam_critic""".split()
    at_most_1 = "reference_mix gamma lam lam_critic attribution_discount top_p".split()
    may_be_0 = """kl_ctrl_coef kl_loss_coef top_k lr critic_lr warmup_steps critic_warmup eval_every save_every
        clip_ratio clip_ratio_low clip_ratio_high weight_decay print_samples""".split()
    refused = [(not math.isfinite(x), f"{name} must be finite") for name, x in given.items()]
    refused += [(not x > 0, f"{name} must be positive") for name, x in given.items() if name not in may_be_0 + exempt]
    refused += [(not given.get(name, 0) >= 0, f"{name} must not be negative") for name in may_be_0]
    refused += [(not 0 <= given.get(name, 0) <= 1, f"{name} must lie between 0 and 1") for name in at_most_1]
    refused += [
        (c.clip_ratio_c is not None and c.clip_ratio_c <= 1, "clip_ratio_c bounds the ratio and must exceed 1"),
        (not 0 <= c.overlong_buffer <= c.max_response_length, "overlong_buffer must lie within max_response_length"),
        (c.use_kl_in_reward and c.use_kl_loss, "use_kl_in_reward and use_kl_loss: one replaces the other, choose one"),
        (c.reference == "previous" and (not c.use_kl_loss or adaptive),
         "reference previous needs use_kl_loss and kl_ctrl_type fixed: its KL is 0 until the update begins"),
        (c.kl_kind == "full" and c.reference != "init", "the full KL works with reference init only"),
        (adaptive and c.kl_coef == 0, "kl_ctrl_type adaptive needs a KL whose coefficient is not 0"),
        (c.critic == "shared" and own, "critic shared has one optimizer: only critic_lr applies to its critic"),
        (c.critic == "adapter" and "model" in own, "critic adapter grows on the policy: critic_model does not apply"),
        (not c.lora_rank and (c.critic == "adapter" or c.merge_lora or c.lora_alpha or c.lora_target != "all-linear"),
         "critic adapter, merge_lora, lora_alpha and lora_target need lora_rank"),
        (not c.uses_critic and own, f"adv_estimator {c.adv_estimator} has no critic: no critic_* flag applies"),
        (c.adv_estimator not in ("gae", "reinforce_plus_plus") and c.rollout_n < 2,
         f"adv_estimator {c.adv_estimator} compares responses to the same prompt: rollout_n must be at least 2"),
        (size % max(c.ppo_mini_batch_size, 1) or size % max(c.critic_ppo_mini_batch_size or 1, 1),
         f"train_batch_size * rollout_n = {size} responses must divide into mini-batches: ppo_mini_batch_size ="
         f" {c.ppo_mini_batch_size}, critic_ppo_mini_batch_size = {c.critic_ppo_mini_batch_size}"),
        (c.critic_early_stop and (c.critic_ppo_epochs or c.ppo_epochs) < 2, "critic_early_stop needs 2 critic epochs"),
    ]
    for wrong, sentence in refused:
        if wrong:
            raise UsageError(sentence)
    warn_of_unsound(c)


def warn_of_unsound(c: Config) -> None:
    """What is allowed, but does not do what one would expect."""
    if c.kl_coef and c.kl_in_reward and c.kl_kind != "k1":
        warn(f"kl_penalty {c.kl_kind}: in the reward only k1 gives the gradient of KL(policy, reference)")
    if c.kl_coef and c.use_kl_loss and c.kl_kind in ("k1", "abs", "k3"):
        warn(f"kl_loss_type {c.kl_kind} lacks the gradient of KL(policy, reference): k1's is 0, k3's of the reverse KL")
    if c.top_p < 1 or c.top_k > 0:
        warn("top_p and top_k truncate the sampling, log-probs stay those of the whole policy: KL may turn negative")


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def clock_now() -> float:
    """Seconds, when the device has done what it was given: a phase is charged for its own work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seeded(device: torch.device | str, *parts) -> torch.Generator:
    """A generator that depends on nothing but its arguments, such as (seed, "sampling", step)."""
    return torch.Generator(device).manual_seed(int(hashlib.sha256(repr(parts).encode()).hexdigest()[:14], 16))


# ---- Data and rewards -----------------------------------------------------------------------------------------------


@dataclass
class Example:
    text: str  # what the user asks
    answer: str  # ground truth; "" where the data set has none
    prompt: list[int]  # token ids, ending where the response begins
    messages: list[dict] = field(default_factory=list)  # the conversation so far, as a reward model reads it


def read_rows(source: str, split: str) -> list[dict]:
    """Rows of a local file, the demo, or a Hub data set NAME[:CONFIG[:SPLIT]]. Raises UsageError with file:line."""
    path, where = HERE / "assets" / "demo" / f"{split}.jsonl" if source == "demo" else Path(source), source
    name, part, named_split = f"{source}::".split(":", 2)
    try:
        if path.suffix == ".jsonl":
            rows = []
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                where = f"{path}:{number}"
                rows += [json.loads(line)] if line.strip() else []
        elif path.suffix == ".json":
            rows = json.loads(path.read_bytes())
        elif path.suffix in (".csv", ".parquet"):
            rows = datasets.load_dataset(path.suffix[1:], data_files=source, split="train").to_list()
        else:
            part = part or ("main" if name.endswith("gsm8k") else None)
            rows = datasets.load_dataset(name, part, split=named_split.rstrip(":") or split).to_list()
    except Exception as error:  # whatever the reader says, the user can only mend the source
        raise UsageError(f"{where}: {error.__cause__ or error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{source}: {'rows must be objects' if rows else 'no rows'}")
    return rows


def find_column(columns: list[str], wanted: str | None, usual: str, needed: bool, source: str) -> str:
    """The wanted column, else the first usual one, else "". Raises UsageError with the columns present."""
    names = [wanted] if wanted else usual.split()
    found = [name for name in names if name in columns]
    if not found and (wanted or needed):
        near = "".join(f" (is it {x}?)" for x in difflib.get_close_matches(names[0], columns, n=1))
        raise UsageError(f"{source}: no column {' or '.join(names)}; there are {', '.join(columns)}{near}")
    return found[0] if found else ""


def render_prompt(messages: list[dict], tokenizer) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to speak."""
    if tokenizer.chat_template:  # it writes what special tokens there are: no second BOS
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = tokenizer("\n".join(message["content"] for message in messages)).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # a prompt has not ended


def make_examples(rows: list[dict], tokenizer, config: Config, source: str, training: bool) -> list[Example]:
    """Rows -> examples. GSM8K rows (`question`) get verl's instruction. Evaluation rows are cut, never dropped."""
    columns, is_gsm8k = list(rows[0]), config.reward == "gsm8k"
    prompt_column = find_column(columns, config.prompt_column, "question instruction prompt messages", True, source)
    answer_column = find_column(columns, config.answer_column, "answer output", is_gsm8k, source)
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    mode = config.overlong_prompt if training else "truncate_left"
    limit, overlong, examples = config.max_prompt_length, 0, []
    for number, row in enumerate(rows, 1):
        messages, answer = row.get(prompt_column), row.get(answer_column)
        if isinstance(answer, float):  # a CSV column with gaps: 18 has become 18.0, a gap NaN
            answer = int(answer) if answer.is_integer() else None if math.isnan(answer) else answer
        answer = "" if answer is None else str(answer)
        if "####" in answer or is_gsm8k:
            answer = answer.split("####")[-1].strip().replace(",", "")
        if isinstance(messages, str) and messages.strip():
            extra = f" {GSM8K_INSTRUCTION}" if prompt_column == "question" else ""
            extra += f"\n{row['input']}" if prompt_column == "instruction" and row.get("input") else ""
            messages = [{"role": "user", "content": messages + extra}]
        texts = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
        if not texts or len(texts) < len(messages) or not all(texts):
            raise UsageError(f"{source}: row {number} has no text in column {prompt_column!r}")
        ids = render_prompt(system + messages, tokenizer)
        overlong += len(ids) > limit
        if len(ids) > limit and mode == "error":
            raise UsageError(f"{source}: row {number} has {len(ids)} tokens, max_prompt_length is {limit}")
        if len(ids) <= limit or mode == "truncate_left":
            examples.append(Example(texts[-1], answer, ids[-limit:], system + messages))
    if overlong:
        done = "dropped" if mode == "drop" else "truncated on the left"
        warn(f"{source}: {overlong} of {len(rows)} prompts have more than {limit} tokens and were {done}")
    return examples


def load_examples(tokenizer, config: Config) -> tuple[list[Example], list[Example]]:
    """Training and evaluation examples; the second list is empty if nothing is to be evaluated. Raises UsageError."""
    name = config.dataset.split(":")[0]
    eval_source = config.eval_dataset or (name if name in ("demo", "gsm8k", "openai/gsm8k") else None)
    train = make_examples(read_rows(config.dataset, "train"), tokenizer, config, config.dataset, training=True)
    if len(train) < config.train_batch_size and not config.eval_only:
        raise UsageError(f"{config.dataset}: {len(train)} prompts, train_batch_size is {config.train_batch_size}")
    if eval_source is None and config.eval_only:
        raise UsageError("eval_only needs an eval_dataset")
    if eval_source is None or not (config.eval_every or config.eval_only):
        return train, []
    rows = read_rows(eval_source, "test")[: config.eval_size]
    evals = make_examples(rows, tokenizer, config, eval_source, training=False)
    if common := len({tuple(e.prompt) for e in train} & {tuple(e.prompt) for e in evals}):
        warn(f"{common} prompts of {config.dataset} are evaluation prompts too")
    return train, evals


def prompt_order(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which examples a step uses: in every epoch a fresh permutation, whose incomplete last batch is left out."""
    epoch, batch = divmod(step, num_examples // batch_size)
    order = torch.randperm(num_examples, generator=seeded("cpu", seed, "prompts", epoch)).tolist()
    return order[batch * batch_size : (batch + 1) * batch_size]


def score_gsm8k_strict(response: str, answer: str) -> float:
    """1 if the last "#### NUMBER" of the last 300 characters is the answer, as a string, commas apart (verl's rule)."""
    found = re.findall(r"#### (-?[0-9.,]+)", response[-300:])
    return float(bool(found) and found[-1].replace(",", "") == answer)


def score_gsm8k_flexible(response: str, answer: str) -> float:
    """1 if the number after the last "####", else the last number, equals the answer: 1,000 = $1000 = 1000.00."""
    number = r"[-$]*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    found = re.findall(rf"####\s*({number})", response) or re.findall(number, response)
    try:
        return float(bool(found) and float(re.sub("[,$]", "", found[-1])) == float(re.sub("[,$]", "", answer)))
    except ValueError:  # the answer is not a number, or the response has two minus signs
        return 0.0


REWARD_PROCESS = """
import faulthandler, importlib.util, json, socket, sys, traceback
number, path, name, *folders = sys.argv[1:]
sys.path += folders
connection, function = socket.socket(fileno=int(number)).makefile('rw'), None
for request in connection:  # until the training ends
    seconds, *columns = json.loads(request)
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # whatever it does, and whether or not anyone waits
    try:
        if function is None:  # a module with a name, so that the file may use process pools
            spec = importlib.util.spec_from_file_location('reward_file', path)
            module = sys.modules['reward_file'] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            function = getattr(module, name, None)
        if not callable(function):
            raise NameError(f'there is no function {name}')
        reply = function(*columns) if columns else []
        with_metrics = isinstance(reply, tuple) and len(reply) == 2 and isinstance(reply[1], dict)
        reply = [*(reply if with_metrics else (reply, {})), None]  # arrays and tensors of any library become lists
        reply = json.dumps(reply, default=lambda x: x.tolist() if hasattr(x, 'tolist') else list(x))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reply = json.dumps([None, None, f'{error!r} at {place.filename}:{place.lineno}'])
    print(reply, file=connection, flush=True)
    faulthandler.cancel_dump_traceback_later()
"""


def end_process(process: subprocess.Popen) -> None:
    """Kills a process, and what it started, whatever they are doing."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and abs(x) < 3e38  # finite, in fp32 too


class RewardFunction:
    """A user's FILE.py:function in a process of its own, which may hang or die; it is no sandbox.

    It sees no environment variables but those of reward_env. The function returns a score per response, or
    (scores, {metric: a number per response}). Raises UsageError.
    """

    def __init__(self, spec: str, config: Config):
        self.spec, self.timeout, self.failed_score = spec, config.reward_timeout, config.failed_score
        names = {name.strip() for name in config.reward_env.split(",")} - {""}
        self.environment = {name: os.environ[name] for name in names & set(os.environ)}
        if absent := names - set(os.environ):
            warn(f"reward_env: not set are {', '.join(sorted(absent))}")
        try:
            self.start()
        except RuntimeError as error:
            raise UsageError(f"reward {spec!r} cannot be loaded: {error}") from error

    def start(self) -> None:
        self.connection, theirs = socket.socketpair()
        path, _, name = self.spec.rpartition(":")
        folders = str(Path(path).resolve().parent), str(HERE)  # what it may import from
        process = subprocess.Popen(
            [sys.executable, "-uPc", REWARD_PROCESS, str(theirs.fileno()), path, name, *folders],
            env=self.environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        self.end = weakref.finalize(self, end_process, process)  # also when self is dropped, and at the exit
        self.ask(self.timeout)

    def ask(self, seconds: float, *columns: list) -> tuple[list, dict[str, list]]:
        """Scores and metrics; without columns the function is only loaded. Raises RuntimeError: what went wrong."""
        if not self.end.alive:
            self.start()
        began = time.monotonic()
        self.connection.settimeout(seconds + 1)  # by then it has said where it hangs, and has ended
        try:
            self.connection.sendall(json.dumps([seconds, *columns]).encode() + b"\n")
            scores, metrics, problem = json.loads(self.connection.makefile("rb").readline())
        except (OSError, ValueError):
            late = time.monotonic() - began >= seconds
            problem = f"no answer within {seconds:g} seconds (reward_timeout)" if late else "its process has ended"
            self.end()
        if problem is not None:
            raise RuntimeError(problem)
        count = len(columns[0]) if columns else 0
        if not isinstance(scores, list) or len(scores) != count:
            raise UsageError(f"reward {self.spec} must return {count} scores, one per response, not {str(scores):.60}")
        for name, x in metrics.items():
            if not isinstance(x, list) or len(x) != count or not all(map(is_number, x)):
                raise UsageError(f"reward {self.spec}: metric {name!r} must be {count} numbers, not {str(x):.60}")
            if name in OUR_MEASURES or not re.fullmatch(r"\w[\w.-]*", name):
                raise UsageError(f"reward {self.spec}: a metric cannot have the name {name!r}")
        return scores, metrics

    def __call__(self, *columns: list) -> tuple[list, dict[str, list]]:
        """Scores and metrics. With a failed_score, a batch that fails is scored row by row, and what fails is None.

        A row has a tenth of reward_timeout. When more than a tenth has failed, the rest is left out: the run will end.
        """
        try:
            return self.ask(self.timeout, *columns)
        except RuntimeError as error:
            if self.failed_score is None:
                raise UsageError(f"reward {self.spec} failed, at {columns[1][0][:80]!r}: {error}") from error
        scores, metrics = [], defaultdict(list)
        for row in zip(*columns, strict=True):
            try:
                score, measured = self.ask(self.timeout / 10, *([x] for x in row))
            except RuntimeError as error:
                warn(f"reward {self.spec} failed, at {row[1][:80]!r}: {error}")
                score, measured = [None], {}
            scores += score
            for name, x in measured.items():
                metrics[name] += x
            if scores.count(None) > max(1, len(columns[0]) // 10):
                break
        return scores, metrics


def conversation_ids(tokenizer, messages: list[dict], limit: int) -> list[int]:
    """Token ids of a conversation whose last message is the assistant's; beyond limit, the first ones are dropped."""
    if tokenizer.chat_template:  # it writes what special tokens there are: no second BOS
        return tokenizer.apply_chat_template(messages, return_dict=False)[-limit:]
    ids, eos = tokenizer("\n".join(message["content"] for message in messages)).input_ids, tokenizer.eos_token_id
    return (ids if eos is None or ids[-1:] == [eos] else [*ids, eos])[-limit:]


def score_conversations(model: nn.Module, sequences: list[list[int]], batch_size: int) -> Tensor:
    """Scores [B] in fp32 of token sequences by a sequence-classification model; similar lengths share a batch."""
    order, scores = sorted(range(len(sequences)), key=lambda i: len(sequences[i])), []
    for start in range(0, len(order), batch_size):
        rows = [torch.tensor(sequences[i]) for i in order[start : start + batch_size]]
        pad = min(set(range(len(rows) + 1)) - {int(row[-1]) for row in rows})  # a decoder's head reads the last token
        model.config.get_text_config().pad_token_id = pad  # that is not this one: no row may end with it
        ids = pad_sequence(rows, batch_first=True, padding_value=pad).to(model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        scores.append(model(input_ids=ids, attention_mask=mask).logits[:, 0].float())
    return torch.cat(scores)[torch.tensor(order).argsort().to(model.device)]


def is_reward_model(name: str, config: Config) -> bool:
    """Whether a model has a score head instead of an output head. Raises UsageError if it has several scores."""
    lm_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    is_classifier = "SequenceClassification" in str(lm_config.architectures)
    if is_classifier and lm_config.num_labels != 1:
        raise UsageError(f"{name} has {lm_config.num_labels} outputs, a reward model has one")
    return is_classifier


class RewardModel:
    """A sequence-classification model with one output, which reads conversations with its own tokenizer."""

    def __init__(self, name: str, config: Config):
        self.lm = load_lm(name, transformers.AutoModelForSequenceClassification, config)
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        context = getattr(self.lm.config.get_text_config(), "max_position_embeddings", 2**20)
        self.lm.config.use_cache = False
        self.limit, self.budget = min(context, self.tokenizer.model_max_length), config.micro_batch_tokens
        probes = ["Yes.", "No, not at all.", "I do not know what you mean.", "42 is the answer to all of this."]
        system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        scores, _ = self([[*system, {"role": "user", "content": "Is it so?"}]] * len(probes), probes, [])
        print(f"reward model: {name}, {self.limit} tokens (beginnings that exceed them are dropped), every response"
              f" ended by its chat template or eos; four different responses score {scores}")
        if len(set(scores)) == 1:
            warn(f"reward model {name} gives the same score to four different responses")

    @torch.no_grad()
    def __call__(self, prompts: list[list[dict]], responses: list[str], answers: list[str]) -> tuple[list, dict]:
        """Scores; and which conversations had to be cut."""
        talks = [p + [{"role": "assistant", "content": r}] for p, r in zip(prompts, responses, strict=True)]
        try:
            ids = [conversation_ids(self.tokenizer, messages, self.limit + 1) for messages in talks]
        except jinja2.TemplateError as error:
            raise UsageError(f"the reward model's chat template refuses {str(talks[0]):.200}: {error}") from error
        longest = min(max(map(len, ids)), self.limit)
        scores = score_conversations(self.lm, [x[-self.limit :] for x in ids], max(1, self.budget // longest))
        return scores.tolist(), {"truncated": [float(len(x) > self.limit) for x in ids]}


def load_reward(config: Config) -> Callable:
    """reward(prompts, responses, answers) -> scores, or scores and metrics. Raises UsageError."""
    if config.reward == "gsm8k":
        return lambda prompts, responses, answers: list(map(score_gsm8k_strict, responses, answers))
    if Path(config.reward.rpartition(":")[0]).is_file():
        return RewardFunction(config.reward, config)
    reason = "it has no score head"
    try:
        if is_reward_model(config.reward, config):
            return RewardModel(config.reward, config)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    raise UsageError(f"reward {config.reward!r} is neither gsm8k, nor FILE.py:function of a file that exists, nor a"
                     f" sequence-classification model: {reason}")


def score_responses(
    reward: Callable, examples: list[Example], texts: list[str], failed_score: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores [B], and the means of what else the reward measures. Raises UsageError naming a row without a number."""
    prompts = [e.messages if isinstance(reward, RewardModel) else e.text for e in examples]
    scores = reward(prompts, texts, [e.answer for e in examples])
    scores, metrics = scores if isinstance(scores, tuple) else (scores, {})
    failed = [row for row, x in enumerate(scores) if not is_number(x)]
    if failed and (failed_score is None or len(failed) > max(1, len(texts) // 10)):
        row, count = failed[0], f"{len(failed)} of {len(texts)}"
        raise UsageError(f"the reward failed on {count} responses: {scores[row]!r} for row {row}, {texts[row][:80]!r}")
    if failed_score is not None:
        metrics = metrics | {"failed": [row in failed for row in range(len(scores))]}
    means = {}
    for name in union_over_ranks(list(metrics)):
        x = torch.tensor(metrics.get(name, []), dtype=torch.float64)
        means[name] = masked_mean(x, torch.ones_like(x))
    return torch.tensor([float(failed_score if row in failed else x) for row, x in enumerate(scores)]), means


# ---- Models ---------------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A Hugging Face model that chooses among num_tokens and, where values are wanted, a linear head.

    The head has the dtype of the other weights, and so an fp32 master where they have one; it computes in fp32.
    """

    def __init__(self, lm: nn.Module, num_tokens: int, with_values: bool, config: Config, adapter: str | None = None):
        super().__init__()
        self.lm, self.num_tokens, self.pooling, self.value_head = lm, num_tokens, config.value_pooling, None
        self.adapter = adapter  # the LoRA adapter it computes with, on a trunk that others may share; None: none
        self.chooses = adapter != "critic" and lm.get_output_embeddings() is not None  # has token log-probs
        self.packs, self.engine = True, None
        self.own_attention = lm.own_attention = getattr(lm, "own_attention", lm.config._attn_implementation)
        AttentionInterface.register("packed", packed_attention)
        lm.set_attn_implementation("packed")
        if with_values:
            self.value_head = nn.Linear(lm.config.get_text_config().hidden_size, 1, device=lm.device, dtype=lm.dtype)
            noise = torch.randn(self.value_head.weight.shape, generator=seeded("cpu", config.seed, "value head"))
            nn.init.zeros_(self.value_head.bias)
            self.value_head.weight.data.copy_(noise * (0.02 if config.value_head_init == "normal" else 0.0))

    def select_adapter(self) -> None:
        """Makes the trunk compute with this model's adapter, the only one that gets a gradient, or with none."""
        if getattr(self.lm, "selected", self.adapter) == self.adapter:
            return
        self.lm.selected = self.adapter
        self.lm.enable_adapters() if self.adapter else self.lm.disable_adapters()
        if self.adapter:
            self.lm.set_adapter(self.adapter)

    def hidden(self, ids: Tensor, packed: "Packed") -> Tensor:
        """Last hidden states [N, H] of packed token ids [N]."""
        self.select_adapter()
        if self.packs:
            inputs = {"input_ids": ids[None], "position_ids": packed.position[None], "use_cache": False}
            return self.lm.base_model(**inputs, packed=packed).last_hidden_state[0]
        states, cache = [], packed.cache  # one sequence per pass, with the model's own attention and cache
        for sequence in ids.split(packed.lengths or 1):
            past = cache.get("past") if cache is not None and not packed.lengths else None
            output = self.lm.base_model(sequence[None], past_key_values=past, use_cache=cache is not None)
            states.append(output.last_hidden_state[0])
            if cache is not None:
                cache["past"] = output.past_key_values
        return torch.cat(states)

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """fp32 logits [..., num_tokens] of the policy that samples."""
        config = self.lm.config.get_text_config()
        logits = self.lm.get_output_embeddings()(hidden)[..., : self.num_tokens].float()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2; the scales are Cohere's and Granite's
        logits = logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)
        return logits / temperature


def whole_weights(*models: LanguageModel | None) -> AbstractContextManager:
    """Where weights are used; in ppo_llm_multigpu.py ZeRO-3 gathers them on entry, once for many passes."""
    return nullcontext()


class Learner:
    """A model and its optimizer: nothing else touches an optimizer, a .grad or a weight file."""

    def __init__(self, model: LanguageModel, lr: float, critic_lr: float, config: Config):
        self.model, self.base_lr, self.grad_clip, self.skipped_steps = model, lr, config.grad_clip, 0
        model.select_adapter()
        self.weights = [w for w in model.parameters() if w.requires_grad]
        # bf16 has 8 bits, too few for steps of 1e-6: masters and sums are fp32
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        body = sum(w.requires_grad for w in model.lm.parameters())  # then the value head, with its own learning rate
        groups = [{"params": self.masters[:body], "base_lr": lr}, {"params": self.masters[body:], "base_lr": critic_lr}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of loss to what has been collected since the last step."""
        self.model.select_adapter()  # a pass of the reference may have come between: checkpointing computes again
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master and weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad + weight.grad
                weight.grad = None

    def clip_gradient(self) -> Tensor:
        """Scales the gradient down to norm grad_clip, and returns the norm it had."""
        return nn.utils.clip_grad_norm_(self.masters, self.grad_clip)

    @torch.no_grad()
    def step(self, lr_factor: float, grad_norm: float) -> None:
        """One AdamW step at lr_factor times the base rates, skipped and counted if the gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        if math.isfinite(grad_norm):
            self.optimizer.step()
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.data.copy_(master)  # a weight in fp32 is its own master
        self.skipped_steps += not math.isfinite(grad_norm)
        self.drop_gradient()

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def export(self, folder: Path, tokenizer, config: Config) -> None:
        """A plain Hugging Face folder that AutoModelForCausalLM loads; with LoRA, peft's of the adapter, or both."""
        self.model.select_adapter()
        own = folder.with_name("adapter") if config.merge_lora else folder
        self.model.lm.save_pretrained(own)
        tokenizer.save_pretrained(folder)
        if config.merge_lora:
            from peft import PeftModel

            options = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
            base = AutoModelForCausalLM.from_pretrained(config.model, **options)
            PeftModel.from_pretrained(base, own).merge_and_unload().save_pretrained(folder)

    def get_state(self, i: int) -> dict[str, Tensor]:
        """The fp32 master of the i-th weight, and what AdamW remembers of it."""
        return {"weight": self.masters[i].detach()} | self.optimizer.state.get(self.masters[i], {})

    def set_state(self, i: int, state: dict[str, Tensor]) -> None:
        master = self.masters[i].data.copy_(state.pop("weight"))
        self.weights[i].data.copy_(master)
        self.optimizer.state[self.masters[i]].update((key, x.to(master.device)) for key, x in state.items())

    def save(self, path: Path) -> None:
        self.model.select_adapter()  # DeepSpeed knows only weights that require a gradient
        tensors = {"skipped_steps": torch.tensor(self.skipped_steps)}
        for i in range(len(self.weights)):
            tensors |= {f"{i}.{key}": x.cpu().contiguous() for key, x in self.get_state(i).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        self.model.select_adapter()
        tensors, states = load_file(path), defaultdict(dict)
        self.skipped_steps = int(tensors.pop("skipped_steps"))
        for name, x in tensors.items():
            index, key = name.split(".")
            states[int(index)][key] = x
        for i in range(len(self.weights)):
            self.set_state(i, states[i])


@dataclass
class Models:
    actor: Learner
    critic: Learner | None  # None: critic-free, or a value head on the actor
    reference: LanguageModel | None  # None: nothing uses it
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_ids: set[int]


def load_lm(name: str, auto_class: type, config: Config) -> nn.Module:
    """A pretrained model without dropout: with it the first ratio would not be 1, nor the first KL 0."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": config.trust_remote_code}
    lm = auto_class.from_pretrained(name, **options)
    for module in lm.modules():
        for key in [key for key, x in vars(module).items() if isinstance(x, float)]:
            if "drop" in key or isinstance(module, nn.Dropout):
                setattr(module, key, 0.0)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lm.to(device).eval()


def add_adapters(lm: nn.Module, names: list[str], config: Config) -> None:
    """LoRA (arXiv:2106.09685): beside every target layer W x, alpha / rank * B (A x) with B = 0 at the start."""
    from peft import LoraConfig

    torch.manual_seed(config.seed)  # peft initialises A from the global generator
    targets = [target.strip() for target in config.lora_target.split(",")]
    for target in targets:
        layers = [layer for name, layer in lm.named_modules() if target and f".{name}".endswith(f".{target}")]
        if targets != ["all-linear"] and (not layers or lm.get_output_embeddings() in layers):
            raise UsageError(f"lora_target {target}: no layer has this name, or it is the output head")
    targets = "all-linear" if targets == ["all-linear"] else targets
    for name in names:
        alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        lora = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        try:
            with warnings.catch_warnings(action="ignore"):  # peft's, that there are two of them
                lm.add_adapter(lora, name)
        except ValueError as error:
            raise UsageError(f"lora_target {config.lora_target}: {error}") from error
    lm.selected = names[-1]


def build_critic(num_tokens: int, config: Config) -> Learner:
    """The separate critic. A reward model keeps its score head as the value head."""
    name = config.critic_model or config.model
    scores = is_reward_model(name, config)
    lm = load_lm(name, transformers.AutoModelForSequenceClassification if scores else AutoModel, config)
    critic = LanguageModel(lm.base_model, num_tokens, True, config)
    if scores:
        head = getattr(lm, "score", None)
        if not isinstance(head, nn.Linear):
            raise UsageError(f"critic_model {name} has no linear score head after its last layer")
        critic.value_head.load_state_dict(head.state_dict(), strict=False)  # it may have no bias: that stays 0
    return Learner(critic, config.critic_lr, config.critic_lr, config)


def build_models(tokenizer, config: Config) -> Models:
    lm = load_lm(config.model, AutoModelForCausalLM, config)
    num_tokens = min(len(tokenizer), lm.get_output_embeddings().weight.shape[0])  # Qwen2.5 has 271 rows too many
    eos = lm.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    print(f"stop tokens: {' '.join(map(str, tokenizer.convert_ids_to_tokens(sorted(stop_ids))))}")
    reference = critic = None
    own_critic = config.uses_critic and config.critic != "shared" and not config.eval_only
    if config.lora_rank:
        add_adapters(lm, ["policy"] + ["critic"] * (own_critic and config.critic == "adapter"), config)
    if config.kl_coef and config.reference != "previous" and not config.eval_only:
        frozen = lm if config.lora_rank else copy.deepcopy(lm).requires_grad_(False)
        reference = LanguageModel(frozen, num_tokens, False, config)
    if own_critic and config.critic == "separate":
        critic = build_critic(num_tokens, config)
    elif own_critic:
        trunk = LanguageModel(lm, num_tokens, True, config, "critic")
        critic = Learner(trunk, config.critic_lr, config.critic_lr, config)
    with_values, adapter = config.uses_critic and config.critic == "shared", "policy" if config.lora_rank else None
    policy = LanguageModel(lm, num_tokens, with_values, config, adapter)
    return Models(Learner(policy, config.lr, config.critic_lr, config), critic, reference, tokenizer, stop_ids)


# ---- Packed passes and the rollout engine ---------------------------------------------------------------------------
# Sequences are laid end to end in one row of N tokens, so that no layer computes padding. Only attention has to know
# where they end: `packed_attention`, registered with transformers, serves three kinds of pass, told apart by `Packed`.
# Training and scoring: causal attention within each sequence. Prefill: the same, and keys and values are written to the
# KV slots of the prompts. Decode: one token for each slot, which attends to what its slot holds. Every slot has a write
# position of its own: a response that has ended makes room for the next prompt while the others go on, and when no
# prompt is left, the slots still at work move to the front. The host looks at the slots every CHECK_EVERY tokens only.
# On CUDA a decode step is a graph, captured once for each number of slots and replayed for the rest of the run, as the
# optimizer changes the weights in place. `check_passes` compares all of it with a plain pass of the model at the start;
# a model that it does not fit gets one sequence per pass and its own attention: slow, and said.


@dataclass
class Packed:
    """Where each of the N tokens of a pass belongs."""

    row: Tensor  # [N] its sequence
    position: Tensor  # [N] in that sequence
    lengths: list[int]  # tokens of each sequence; empty in decode
    starts: Tensor | None = None  # [sequences + 1] where each begins, and N; int32
    cache: dict | None = None  # layer -> keys and values [slots, capacity, heads, D]
    slot: Tensor | None = None  # [N] KV slot
    room: tuple[int, int] = (0, 0)  # slots, capacity
    reach: int = 0  # decode on the CPU: no slot holds more tokens

    @cached_property
    def place(self) -> Tensor:
        """[N] where pad() puts each token, in a rectangle laid out row by row."""
        return self.row * max(self.lengths) + self.position

    @cached_property
    def parts(self) -> list["Packed"]:
        """Neighbours of similar length, for attention on the CPU: it computes the padding of a rectangle."""
        parts, first = [], 0
        for end in range(1, len(self.lengths) + 1):
            if end == len(self.lengths) or not 0.8 <= self.lengths[end] / self.lengths[first] <= 1.25:
                tokens = slice(sum(self.lengths[:first]), sum(self.lengths[:end]))
                parts.append(Packed(self.row[tokens] - first, self.position[tokens], self.lengths[first:end]))
                first = end
        return parts

    def pad(self, x: Tensor) -> Tensor:
        """[N, ...] -> [sequences, longest, ...], 0 behind the end of a sequence."""
        shape = len(self.lengths), max(self.lengths), *x.shape[1:]
        if len(x) == shape[0] * shape[1]:
            return x.view(shape)
        return x.new_zeros(shape).flatten(0, 1).index_copy(0, self.place, x).view(shape)

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.place)  # on the CPU its gradient is far cheaper than indexing's


def pack(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Packed]:
    """Token ids [N] of the sequences, end to end, and where they belong."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0))
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(len(row)) - starts[row]
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    ids, row, position, starts = (x.to(device, non_blocking=True) for x in (ids, row, position, starts.int()))
    return ids, Packed(row, position, lengths.tolist(), starts)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
    sliding_window: int | None = None, packed: Packed | None = None, **others
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface has it: query [1, heads, N, D] -> [1, N, heads, D].

    Raises NotImplementedError for soft-capping, sinks and position biases, which it does not know.
    """
    if packed is None or any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError(f"packed attention does not fit {type(module).__name__}")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if packed.cache is not None:
        if module.layer_idx not in packed.cache:  # the flash kernel reads token by token, the CPU's head by head
            order = (0, 1, 2, 3) if has_flash(key) else (0, 2, 1, 3)
            packed.cache[module.layer_idx] = [torch.empty_permuted(
                (*packed.room, *x.shape[1:]), order, dtype=x.dtype, device=x.device).zero_() for x in (key, value)]
        keys, values = packed.cache[module.layer_idx]
        keys[packed.slot, packed.position], values[packed.slot, packed.position] = key, value
    if not packed.lengths:
        return attend_to_slots(query, keys, values, packed, scaling, sliding_window)[None], None
    window = sliding_window
    if has_flash(query):
        longest = max(packed.lengths)
        return flash_attention(query, key, value, packed.starts, packed.starts, max_q=longest, max_k=longest,
                               scale=scaling, window_size=(window - 1 if window else -1, 0))[None], None
    outputs, sizes = [], [len(part.row) for part in packed.parts]
    for part, *inputs in zip(packed.parts, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (part.pad(x).transpose(1, 2) for x in inputs)  # causal: the padding behind needs no mask
        mask, longest = None, q.shape[2]
        if window and longest > window:
            mask = torch.ones(longest, longest, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(part.unpad(out.transpose(1, 2)))
    return torch.cat(outputs)[None], None


def has_flash(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


def flash_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, **options) -> Tensor:
    """torch's flash kernel for packed half-precision tensors on CUDA, [N, heads, D]; torch 2.11 to 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # earlier versions take grouped heads unasked
        options["enable_gqa"] = True
    return varlen_attn(query, key, value, starts, key_starts, **options)


def attend_to_slots(query: Tensor, keys: Tensor, values: Tensor, packed: Packed, scale: float, window: int) -> Tensor:
    """One query for each of the first slots, [rows, heads, D], against all that its slot holds."""
    rows, capacity = len(query), packed.room[1]
    if has_flash(query):
        starts = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
        keys, values = keys[:rows].flatten(0, 1), values[:rows].flatten(0, 1)
        return flash_attention(query, keys, values, starts, starts * capacity, max_q=1, max_k=capacity, scale=scale,
                               window_size=(window - 1, 0) if window else (-1, -1), seqused_k=packed.position.int() + 1)
    places, last = torch.arange(packed.reach, device=query.device), packed.position[:, None]
    seen = (places <= last) & (places > last - (window or capacity))
    grouped = query.view(rows, keys.shape[2], -1, query.shape[-1])  # heads that share a key: a query of that length
    keys, values = (x[:rows, : packed.reach].transpose(1, 2) for x in (keys, values))
    out = nn.functional.scaled_dot_product_attention(grouped, keys, values, seen[:, None, None], scale=scale)
    return out.reshape(query.shape)


def capture(step: Callable, pool) -> Callable:
    """A CUDA graph of a function without arguments, as a function that replays it."""
    for _ in range(2):  # kernels are chosen and loaded before the capture
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


class Engine:
    """KV slots and the responses that grow in them. An idle slot is `done`: it does not move on; nobody reads it."""

    def __init__(self, model, room: tuple[int, int], stop_ids: list[int], limit: int, temperature, top_k, top_p):
        device, slots = model.lm.device, room[0]
        self.key = room, stop_ids, limit, temperature, top_k, top_p
        self.model, self.room, self.limit, self.temperature = model, room, limit, temperature
        self.warpers = ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        self.slot, self.stop = torch.arange(slots, device=device), torch.tensor(stop_ids, device=device)
        self.token, self.position, self.count = (torch.zeros_like(self.slot) for _ in range(3))
        self.done = torch.ones_like(self.slot, dtype=torch.bool)
        self.logprobs = torch.zeros(slots, self.limit + 1, device=device)  # the last column is for idle slots
        self.tokens, self.noise = self.logprobs.long(), self.logprobs.clone()
        self.cache, self.replays, self.greedy = {}, {}, False
        if device.type == "cuda" and model.packs:
            self.capture()

    def prefill(self, slots: list[int], prompts: list[list[int]], noise: Tensor | None) -> None:
        """Reads prompts into idle slots and chooses the first token of each response."""
        slot, (ids, packed) = torch.tensor(slots, device=self.slot.device), pack(prompts, self.slot.device)
        packed.cache, packed.room, packed.slot = self.cache, self.room, slot[packed.row]
        self.position[slot], self.count[slot], self.done[slot] = packed.starts.diff().long(), 0, False
        self.greedy = noise is None
        if noise is not None:
            self.noise[slot, : self.limit] = noise
        self.choose(self.model.hidden(ids, packed)[packed.starts[1:] - 1], slot)

    def step(self, rows: int, reach: int) -> None:
        """One more token for each of the first `rows` slots that is not done; nothing waits for the device."""
        slot = self.slot[:rows]
        packed = Packed(slot, self.position[:rows], [], cache=self.cache, slot=slot, room=self.room, reach=reach)
        hidden = self.model.hidden(self.token[:rows], packed)
        self.position[:rows] += ~self.done[:rows]
        self.choose(hidden, slot)

    def choose(self, hidden: Tensor, slot: Tensor) -> None:
        """Takes the next token of each slot, the likeliest or where its noise falls in the cumulated distribution."""
        logits = self.model.logits(hidden, self.temperature)
        logprobs, allowed, count = logits.log_softmax(-1), logits, self.count[slot]
        for warper in self.warpers:
            allowed = warper(None, allowed)
        if self.greedy:
            token = allowed.argmax(-1)
        else:
            cumulated = (allowed.softmax(-1) if self.warpers else logprobs.exp()).cumsum(-1)
            point = self.noise[slot, count] * cumulated[:, -1]
            token = torch.searchsorted(cumulated, point[:, None], right=True)[:, 0]
        self.tokens[slot, count], self.token[slot] = token, token
        self.logprobs[slot, count] = logprobs.gather(1, token[:, None])[:, 0]
        self.count[slot] += ~self.done[slot]
        self.done[slot] |= (token[:, None] == self.stop).any(1) | (self.count[slot] == self.limit)

    def rows_for(self, slots: int) -> int:
        """How many slots a step computes: as many as are asked for, or as the next larger graph has."""
        return min((rows for rows, _ in self.replays if rows >= slots), default=slots)

    def run(self, slots: int, reach: int, steps: int) -> None:
        """Some steps of the first `slots`."""
        rows = self.rows_for(slots)
        step = self.replays.get((rows, self.greedy), partial(self.step, rows, reach))
        for _ in range(steps):
            step()

    def move_to_front(self, slots: list[int]) -> None:
        """These slots become the first ones; in place, because graphs know the addresses."""
        pairs = [x for pair in self.cache.values() for x in pair]
        for x in (self.token, self.position, self.count, self.done, self.tokens, self.logprobs, self.noise, *pairs):
            x[: len(slots)] = x[slots]
        self.done[len(slots) :] = True

    def capture(self) -> None:
        """A graph of a step for each halving of the slots, the largest first in one pool; all slots are idle yet."""
        pool, (slots, capacity) = torch.cuda.graph_pool_handle(), self.room
        for rows in (slots >> i for i in range(slots.bit_length())):
            for self.greedy in (False, True):
                self.replays[rows, self.greedy] = capture(partial(self.step, rows, capacity), pool)


@torch.inference_mode()
def generate(
    model: LanguageModel, prompts: list[list[int]], stop_ids: set[int], c: Config, generator: torch.Generator | None
) -> tuple[list[list[int]], list[Tensor]]:
    """Responses up to and including their stop token, and the log-probs of their tokens; greedy without a generator.

    Each token has a random number of its own, drawn beforehand: slots and their order do not change what is sampled.
    Only our flags shape the sampling, not the model's generation_config.
    """
    device, results, on_cuda = model.lm.device, [None] * len(prompts), model.lm.device.type == "cuda"
    longest = max(c.max_prompt_length if on_cuda else 1, *map(len, prompts))  # the graphs are made for one capacity
    capacity = math.ceil((longest + c.max_response_length) / 64) * 64
    slots = min(c.rollout_slots, c.rollout_slots if on_cuda else len(prompts)) if model.packs else 1
    key = (slots, capacity), sorted(stop_ids), c.max_response_length, c.temperature, c.top_k, c.top_p
    if model.engine is None or model.engine.key != key:
        model.engine = Engine(model, *key)
    engine = model.engine
    noise = None if generator is None else torch.rand(
        len(prompts), c.max_response_length, generator=generator, device=device)
    queue, owner = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * slots
    while True:
        done, counts = engine.done.tolist(), engine.count.tolist()
        finished = [slot for slot, i in enumerate(owner) if i is not None and done[slot]]
        for slot, tokens in zip(finished, engine.tokens[finished].tolist(), strict=True):
            results[owner[slot]] = tokens[: counts[slot]], engine.logprobs[slot, : counts[slot]].clone()
            owner[slot] = None
        free, live = ([slot for slot, i in enumerate(owner) if (i is None) == idle] for idle in (True, False))
        if queue and free:
            fresh, budget = [], c.micro_batch_tokens
            while queue and len(fresh) < len(free) and (not fresh or len(prompts[queue[-1]]) <= budget):
                fresh.append(queue.pop())
                owner[free[len(fresh) - 1]] = fresh[-1]
                budget -= len(prompts[fresh[-1]])
            engine.prefill(free[: len(fresh)], [prompts[i] for i in fresh], None if noise is None else noise[fresh])
            continue
        if not live:
            return [tokens for tokens, _ in results], [logprobs for _, logprobs in results]
        steps = min(CHECK_EVERY, c.max_response_length - min(counts[slot] for slot in live))
        reach = max(len(prompts[owner[slot]]) + counts[slot] for slot in live) + steps
        if engine.rows_for(len(live)) < engine.rows_for(len(owner)):
            engine.move_to_front(live)
            owner = [owner[slot] for slot in live]
        engine.run(len(owner), min(capacity, math.ceil(reach / 64) * 64), steps)


# ---- PPO. Pure functions of tensors and numbers: no model, no config, no write to an argument -----------------------


def sum_over_ranks(x: Tensor) -> Tensor:
    """All statistics go through it, so that all ranks of ppo_llm_multigpu.py take the same branch."""
    return x


def union_over_ranks(names: list[str]) -> list[str]:
    """All names that a rank has, sorted: what a reward measures may depend on the responses."""
    return sorted(names)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1, over all ranks; 0 if the mask is empty. A statistic: it carries no gradient."""
    x = x.detach().masked_fill(mask == 0, 0.0)
    total, count = sum_over_ranks(torch.stack([x.sum(), mask.sum()]))
    return total / count.clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the mask, 0 outside; shift_mean=False keeps the mean."""
    mean, count = masked_mean(x, mask), sum_over_ranks(mask.sum())
    variance = masked_mean((x - mean).square(), mask) * count / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean).masked_fill(mask == 0, 0.0)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate of KL(policy, reference) at each sampled token (joschu.net/blog/kl-approx.html).

    k1 = x = log(policy/reference) is unbiased, abs = |x|, k2 = x^2/2, k3 = exp(-x) - 1 + x is unbiased and at least 0.
    A trailing + keeps the value and takes the gradient of k2: in expectation that of KL(policy, reference).
    """
    if kind.endswith("+"):
        surrogate = estimate_kl(logprobs, ref_logprobs, "k2")
        return estimate_kl(logprobs, ref_logprobs, kind[:-1]).detach() + surrogate - surrogate.detach()
    x, kind = logprobs - ref_logprobs, KL_ALIASES.get(kind, kind)
    if kind == "k3":
        y = (-x).clamp(-20, 20)
        return (torch.expm1(y) - y).clamp(-10, 10)
    return {"k1": x, "abs": x.abs(), "k2": 0.5 * x.square()}[kind]


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy, reference) at each position, summed over the vocabulary: logits [N, V] -> [N]."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


@dataclass
class AdaptiveKLController:
    """Steers the KL coefficient towards a target (arXiv:1909.08593, section 2.2); target None keeps it fixed."""

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, num_responses: int) -> None:
        """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon, after the step that used coef."""
        if self.target is not None:
            self.coef *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * num_responses / self.horizon


def compute_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, discount: float = 0.0) -> Tensor:
    """Rewards [B, T]: the scores [B] spread over the tokens, minus kl_coef * kl [B, T].

    Token t of L gets discount^(L-1-t) of the score, normalised to sum 1: 0 puts all on the last one, 1 spreads evenly.
    """
    tokens_after = (mask.long().flip(1).cumsum(1).flip(1) - 1).clamp(min=0)
    weights = torch.full_like(mask, discount).pow(tokens_after) * mask
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-8)
    return (weights * scores[:, None] - kl_coef * kl).masked_fill(mask == 0, 0.0)


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv:1506.02438): advantages and returns = advantages + values, [B, T], un-whitened; lam: number or [B].

    Masked tokens are transparent, as in verl: V and the sum pass over them without decay. V = 0 after the last token.
    """
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(valid, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = next_advantage
    return advantages.masked_fill(mask == 0, 0.0), (advantages + values).masked_fill(mask == 0, 0.0)


def compute_group_advantages(scores: Tensor, group_size: int, estimator: str, by_std: bool = True) -> Tensor:
    """Advantages [B] of responses against the others to the same prompt, whose rows are adjacent."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if estimator == "grpo" and by_std:  # arXiv:2402.03300; without the division: Dr. GRPO, arXiv:2503.20783
        centred = centred / (groups.std(1, keepdim=True) + 1e-6)
    if estimator in ("rloo", "rloo_vectorized"):  # = score - mean of the others (arXiv:2402.14740)
        centred = centred * group_size / (group_size - 1)
    return centred.view(-1)


def compute_advantages(rewards: Tensor, values: Tensor | None, mask: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Advantages, whitened over the rollout where the estimator or whiten_advantages says so, and returns; [B, T]."""
    estimator, gamma, lam, whiten = config.adv_estimator, config.gamma, config.lam, config.whiten_advantages
    if estimator == "gae":
        lam_critic = lam if config.lam_critic is None else config.lam_critic
        if config.length_adaptive_alpha is not None:  # VAPO (arXiv:2504.05118): lambda = 1 - 1 / (alpha * length)
            lam = (1 - 1 / (config.length_adaptive_alpha * mask.sum(1)).clamp(min=1)).clamp(0, 1)
        advantages, _ = compute_gae(rewards, values, mask, gamma, lam)
        _, returns = compute_gae(rewards, values, mask, gamma, lam_critic)
    elif estimator == "reinforce_plus_plus":  # arXiv:2501.03262: reward to go, no baseline
        advantages, returns = compute_gae(rewards, torch.zeros_like(mask), mask, gamma, 1.0)
    else:
        scores = compute_group_advantages(rewards.sum(1), config.rollout_n, estimator, config.norm_adv_by_std)
        advantages = returns = scores[:, None] * mask
    if whiten is None:
        whiten = estimator in ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    return (masked_whiten(advantages, mask) if whiten else advantages), returns


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, clip_c: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), elementwise: loss, ratio, was clipped, was clipped by clip_c.

    clip_c is the dual clip (arXiv:1912.09729): where the advantage is negative the loss is at most -advantage * clip_c.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, is_clipped, is_bounded = torch.maximum(unclipped, clipped), clipped > unclipped, torch.zeros_like(ratio)
    if clip_c is not None:
        bound = -advantages * clip_c
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
    return loss, ratio.detach(), is_clipped.float(), is_bounded.float()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error, elementwise, of values or of values within cliprange of old_values, whichever is worse.

    Also returns where the clipped one was worse (as in OpenAI's baselines, ppo2).
    """
    loss, is_clipped = (values - returns).square(), torch.zeros_like(values)
    if cliprange is not None:
        clipped = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
        loss, is_clipped = torch.maximum(loss, clipped), (clipped > loss).float()
    return 0.5 * loss, is_clipped


def loss_weights(mask: Tensor, mode: str, scale: float) -> Tensor:
    """Weights [B, T] of a mini-batch: its loss is (token_loss * weights).sum() over all micro-batches and ranks.

    The two mean modes sum to 1; seq-mean-token-sum is mask / responses, seq-mean-token-sum-norm mask / scale.
    """
    lengths = mask.sum(1, keepdim=True)
    tokens, responses = sum_over_ranks(torch.stack([mask.sum(), (lengths > 0).float().sum()])).clamp(min=1)
    return mask / {"token-mean": tokens, "seq-mean-token-sum": responses, "seq-mean-token-sum-norm": scale,
                   "seq-mean-token-mean": lengths.clamp(min=1) * responses}[mode]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a constant; NaN where all returns agree."""
    error_variance, variance = (
        masked_mean((x - masked_mean(x, mask)).square(), mask) for x in (returns - values, returns))
    rounding = 1e-10 * masked_mean(returns.square(), mask)  # a mean of equal numbers is not always that number
    return torch.where(variance > rounding, 1 - error_variance / variance, torch.nan)


def learning_rate_factor(progress: float, per_step: int, total: int, warmup: int, schedule: str) -> float:
    """Learning rate over its base value. progress counts steps, with the part of the step's updates already made."""
    if progress < warmup:
        return min(1.0, (progress + 1 / per_step) / warmup)
    left = 1 - (progress - warmup) / max(total - warmup, 1e-8)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule]


# ---- Rollout --------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """What one step collects. Tensors are [B, T], 0 outside the mask."""

    prompts: list[list[int]]
    responses: list[list[int]]  # up to and including the stop token
    mask: Tensor  # 1.0 on response tokens
    old_logprobs: Tensor  # of the policy that sampled
    ref_logprobs: Tensor | None = None  # of the reference policy
    old_values: Tensor | None = None  # of the critic before the update
    kl: Tensor | None = None  # estimate of KL(policy, reference); 0 where no KL is in use
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    ratio: Tensor | None = None  # new/old at the token's last visit in the update
    clipped: Tensor | None = None  # 1 where it was clipped there
    stopped: Tensor | None = None  # [B] True where the response ends with a stop token
    scores: Tensor | None = None  # [B] what the reward gave
    examples: list[Example] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # the responses, decoded

    def take(self, rows: list[int]) -> "Rollout":
        """Prompts, responses and [B, T] tensors of these rows, cut to their longest response."""
        width = max(len(self.responses[i]) for i in rows)
        tensors = {name: x[rows, :width] for name, x in vars(self).items() if isinstance(x, Tensor) and x.dim() == 2}
        return Rollout([self.prompts[i] for i in rows], [self.responses[i] for i in rows], **tensors)


def over_chunks(function: Callable, vocabulary: int, *tensors: Tensor) -> list[Tensor]:
    """function(*slices) over slices of tokens, recomputed in backward: [tokens, vocabulary] never exists whole."""
    parts = list(zip(*(x.split(max(1, LOGITS_PER_CHUNK // vocabulary)) for x in tensors), strict=True))
    if torch.is_grad_enabled() and len(parts) > 1:
        function = partial(checkpoint, function, use_reentrant=False)
    return [torch.cat(pieces) for pieces in zip(*(function(*part) for part in parts), strict=True)]


def forward(
    model: LanguageModel, part: Rollout, temperature: float, reference: LanguageModel | None = None, token_head=True
) -> list:
    """[log-probs, entropy, values, full_kl to the reference] of response tokens, [B, T]; None without that head."""
    ids, packed = pack([p + r for p, r in zip(part.prompts, part.responses, strict=True)], part.mask.device)
    targets, tokens = pack(part.responses, part.mask.device)
    first = torch.tensor([len(prompt) - 1 for prompt in part.prompts], device=part.mask.device)
    chosen = (packed.starts[:-1] + first)[tokens.row] + tokens.position  # the state in which each token is chosen
    hidden, values = model.hidden(ids, packed), None
    if model.value_head is not None:
        read = hidden.float()
        if model.pooling == "mean":  # the value head reads the mean of all states so far
            read = packed.unpad(packed.pad(read).cumsum(1)) / (packed.position + 1)[:, None]
        weight, bias = model.value_head.weight.float(), model.value_head.bias.float()
        values = tokens.pad(nn.functional.linear(read[chosen], weight, bias).squeeze(-1))
    if not (token_head and model.chooses):
        return [None, None, values, None]
    with torch.no_grad():
        ref_states = reference.hidden(ids, packed)[chosen] if reference else hidden.new_zeros(len(chosen), 0)

    def head(states: Tensor, ref_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = model.logits(states, temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        kl = full_kl(logp, reference.logits(ref_states, temperature)) if reference else torch.zeros_like(entropy)
        return logp.gather(1, targets[:, None])[:, 0], entropy, kl

    outputs = over_chunks(head, model.num_tokens, hidden[chosen], ref_states, targets)
    logprobs, entropy, kl = map(tokens.pad, outputs)
    return [logprobs, entropy, values, kl if reference else None]


def micro_batches(rows: list[int], rollout: Rollout, c: Config) -> Iterator[tuple[list[int], Rollout]]:
    """Rows within micro_batch_tokens and ppo_micro_batch_size: longest first, each into the first group with room."""
    groups: list[tuple[list[int], list[int]]] = []  # rows, their lengths
    for length, i in sorted((-len(rollout.prompts[i] + rollout.responses[i]), i) for i in rows):
        for group, lengths in groups:
            if sum(lengths) - length <= c.micro_batch_tokens and len(group) != c.ppo_micro_batch_size:
                break
        else:
            group, lengths = [], []
            groups.append((group, lengths))
        group.append(i)
        lengths.append(-length)
    for group, _ in groups:
        yield group, rollout.take(group)


@torch.no_grad()
def score_tokens(model: LanguageModel, rollout: Rollout, c: Config, reference=None, token_head: bool = True) -> list:
    """What forward() returns, for a whole rollout, micro-batch by micro-batch."""
    results: list[Tensor | None] = [None] * 4
    with whole_weights(model, reference):
        outputs = [(rows, forward(model, part, c.temperature, reference, token_head))
                   for rows, part in micro_batches(list(range(len(rollout.mask))), rollout, c)]
    for rows, heads in outputs:
        for head, x in enumerate(heads):
            if x is not None:
                results[head] = torch.zeros_like(rollout.mask) if results[head] is None else results[head]
                results[head][rows, : x.shape[1]] = x
    return results


def shape_scores(scores: Tensor, lengths: Tensor, stopped: Tensor, config: Config) -> Tensor:
    """Scores [B] after clipping, the rule for a missing stop token, and DAPO's overlong penalty (arXiv:2503.14476)."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        p = config.missing_eos_penalty
        cut = {"subtract": scores - p, "replace": torch.full_like(scores, -p), "scale": scores * p}
        scores = torch.where(stopped, scores, cut[config.missing_eos_mode])
    if config.overlong_buffer:
        excess = lengths - (config.max_response_length - config.overlong_buffer)
        scores = scores - excess.clamp(min=0) / config.overlong_buffer
    return scores


def measure_kl(models: Models, rollout: Rollout, config: Config) -> None:
    """Fills in ref_logprobs and kl, for the estimator in use."""
    rollout.ref_logprobs = rollout.old_logprobs  # reference previous
    if models.reference is not None:
        rollout.ref_logprobs = score_tokens(models.reference, rollout, config)[LOGPROBS]
    if config.reference == "mixed":  # log((1 - w) pi_init + w pi_previous), token by token
        w = torch.tensor(config.reference_mix, device=rollout.mask.device)
        mixed = torch.logaddexp(rollout.ref_logprobs + (1 - w).log(), rollout.old_logprobs + w.log())
        rollout.ref_logprobs = mixed.masked_fill(rollout.mask == 0, 0.0)
    if config.kl_kind == "full":
        rollout.kl = score_tokens(models.actor.model, rollout, config, models.reference)[FULL_KL]
    else:
        rollout.kl = estimate_kl(rollout.old_logprobs, rollout.ref_logprobs, config.kl_kind)


def respond(models: Models, examples: list[Example], config: Config, generator: torch.Generator | None) -> Rollout:
    """Responses to the examples, sampled or, without a generator, greedy; not scored yet."""
    policy, prompts = models.actor.model, [e.prompt for e in examples]
    with whole_weights(policy):
        responses, logprobs = generate(policy, prompts, models.stop_ids, config, generator)
    mask = pad_sequence([torch.ones_like(x) for x in logprobs], batch_first=True)
    stopped = torch.tensor([response[-1] in models.stop_ids for response in responses], device=mask.device)
    texts = models.tokenizer.batch_decode(responses, skip_special_tokens=True)
    logprobs = pad_sequence(logprobs, batch_first=True)
    return Rollout(prompts, responses, mask, logprobs, stopped=stopped, examples=examples, texts=texts)


@torch.no_grad()
def collect_rollout(
    models: Models, reward: Callable, examples: list[Example], step: int, kl_coef: float, config: Config
) -> tuple[Rollout, dict]:
    """Samples and scores responses, and turns the scores into advantages. Returns the rollout and its metrics."""
    clock, policy = clock_now(), models.actor.model
    rollout = respond(models, examples, config, seeded(policy.lm.device, config.seed, "sampling", step))
    metrics = {"time/rollout": clock_now() - clock}
    mask, sampled = rollout.mask, rollout.old_logprobs
    lengths, everyone = mask.sum(1), torch.ones_like(mask[:, 0])
    rollout.kl, rollout.ratio, rollout.clipped = torch.zeros_like(mask), mask.clone(), torch.zeros_like(mask)
    scores, measured = score_responses(reward, examples, rollout.texts, config.failed_score)
    rollout.scores = scores.to(mask.device)
    rounded = policy.lm.dtype != torch.float32 and not config.on_policy
    if rounded or policy.value_head is not None:
        logprobs, _, rollout.old_values, _ = score_tokens(policy, rollout, config, token_head=rounded)
    if models.critic:
        rollout.old_values = score_tokens(models.critic.model, rollout, config)[VALUES]
    if rounded:  # bf16 rounds by batch shape: take the update's kind of pass
        rollout.old_logprobs = logprobs
        metrics["rollout/logprob_gap"] = masked_mean((rollout.old_logprobs.exp() - sampled.exp()).abs(), mask)
    if config.kl_coef:
        measure_kl(models, rollout, config)
        metrics |= {"reward/kl": masked_mean(rollout.kl.sum(1) / lengths, everyone), "reward/kl_coef": kl_coef,
                    "reward/kl_sequence": masked_mean(rollout.kl.sum(1), everyone)}
    discount = {"terminal": 0.0, "uniform": 1.0, "discounted": config.attribution_discount}[config.reward_attribution]
    scores = shape_scores(rollout.scores, lengths, rollout.stopped, config)
    rollout.rewards = compute_rewards(scores, rollout.kl, mask, kl_coef if config.kl_in_reward else 0.0, discount)
    if config.whiten_rewards:
        rollout.rewards = masked_whiten(rollout.rewards, mask, shift_mean=False)
    rollout.advantages, rollout.returns = compute_advantages(rollout.rewards, rollout.old_values, mask, config)
    if config.uses_critic:
        metrics["value/explained_variance"] = explained_variance(rollout.old_values, rollout.returns, mask)
    metrics |= {f"reward/{name}": x for name, x in measured.items()}
    mean_score = masked_mean(rollout.scores, everyone)
    metrics |= {"reward/score": mean_score,
                "reward/score_std": masked_mean((rollout.scores - mean_score).square(), everyone).sqrt(),
                "rollout/eos_rate": masked_mean(rollout.stopped.float(), everyone),
                "rollout/response_length": masked_mean(lengths, everyone)}
    return rollout, metrics | {"time/score": clock_now() - clock - metrics["time/rollout"]}


@torch.no_grad()
def distance_from_plain(model: LanguageModel, prompts: list[list[int]], stop_ids: set[int], c: Config) -> float:
    """How far a policy's probabilities, in sampling and in packed passes, are from those of plain passes, at most.

    For a critic: the relative distance of its hidden states.
    """
    lm, c = model.lm, replace(c, max_response_length=8, temperature=1.0, rollout_slots=len(prompts))
    attention, responses = lm.config._attn_implementation, prompts
    if model.chooses:
        responses, sampled = generate(model, prompts, stop_ids, c, seeded(lm.device, "check"))
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    ids, packed = pack(sequences, lm.device)
    states = model.hidden(ids, packed)
    lm.set_attn_implementation(model.own_attention)
    net = lm if model.chooses else lm.base_model  # gives logits, or states
    plain = torch.cat([net(torch.tensor([x], device=lm.device))[0][0].float() for x in sequences])
    lm.set_attn_implementation(attention)
    if not model.chooses:
        return ((states - plain).norm() / plain.norm()).item()
    plain = plain[:, : model.num_tokens].softmax(-1)
    gap = (model.logits(states, 1.0).softmax(-1) - plain).abs().max()
    for start, prompt, logprobs in zip(packed.starts.tolist(), prompts, sampled, strict=False):
        first = start + len(prompt)
        expected = plain[torch.arange(first - 1, first - 1 + len(logprobs)), ids[first : first + len(logprobs)]]
        gap = torch.maximum(gap, (logprobs.exp() - expected).abs().max())
    return gap.item()


def check_passes(model: LanguageModel, prompts: list[list[int]], stop_ids: set[int], c: Config) -> None:
    """Makes sure that sampling and packed passes give what plain passes give; else sequences go one by one from now on.

    Raises UsageError if that is not enough.
    """
    name, tolerance = type(model.lm).__name__, 1e-4 if model.lm.dtype == torch.float32 else 5e-2
    for packs, attention in ((True, "packed"), (False, model.own_attention)):
        model.lm.set_attn_implementation(attention)
        model.packs, model.engine = packs, None
        try:
            found, model.engine = distance_from_plain(model, prompts, stop_ids, c), None
            fits = found <= tolerance
        except Exception as error:  # an unknown architecture may raise anything; the second way decides
            found, fits = repr(error), False
        if not sum_over_ranks(torch.tensor(float(not fits))).item():  # all ranks take the same way
            return None if packs else warn(f"{name} does not fit packed attention: slow, one row per pass")
    raise UsageError(f"{name} is not supported: its probabilities cannot be reproduced ({found})")


# ---- Update ---------------------------------------------------------------------------------------------------------


def ppo_loss(role: str, models: Models, part: Rollout, weights: Tensor, kl_coef: float, c: Config) -> tuple:
    """The loss of a micro-batch, a sum over its tokens, and what to log of each token.

    The policy's terms for the "actor", the value loss for the "critic", both with a shared critic.
    """
    model, old_logprobs, loss, logged = getattr(models, role).model, part.old_logprobs, 0.0, {}
    uses_kl = role == "actor" and c.use_kl_loss and c.kl_coef > 0
    reference = models.reference if uses_kl and c.kl_kind == "full" else None
    logprobs, entropy, values, kl = forward(model, part, c.temperature, reference)
    if values is not None:
        value_loss, value_clipped = clipped_value_loss(values, part.old_values, part.returns, c.cliprange_value)
        loss = value_loss if role == "critic" else c.vf_coef * value_loss
        logged = {"value/loss": value_loss, "value/clipfrac": value_clipped}
    if logprobs is None:
        return (loss * weights).sum(), logged
    if c.on_policy and model.lm.dtype != torch.float32:
        old_logprobs = logprobs.detach()  # as exact as a pass of its own, which collect_rollout has saved
    low = c.clip_ratio if c.clip_ratio_low is None else c.clip_ratio_low
    high = c.clip_ratio if c.clip_ratio_high is None else c.clip_ratio_high
    policy_loss, ratio, clipped, bounded = clipped_policy_loss(
        logprobs, old_logprobs, part.advantages, low, high, c.clip_ratio_c)
    loss = loss + policy_loss - c.entropy_coeff * entropy
    if uses_kl:
        loss = loss + kl_coef * (kl if reference else estimate_kl(logprobs, part.ref_logprobs, c.kl_kind))
    return (loss * weights).sum(), logged | {
        "policy/loss": policy_loss, "policy/entropy": entropy, "policy/clipfrac": clipped, "ratio": ratio,
        "policy/approx_kl": estimate_kl(old_logprobs, logprobs, "k3"), "policy/clipfrac_lower": bounded}


def train_mini_batch(
    role: str, models: Models, rollout: Rollout, batch: list[int], lr_factor: float, kl_coef: float, c: Config
) -> dict:
    """One optimizer step on the summed gradients of the micro-batches; none if approx_kl passes early_stop_kl.

    Returns the sums over tokens of what the loss logs (weighted for `.../loss`), and tokens, stopped, grad_norm.
    """
    learner, weights, sums = getattr(models, role), torch.zeros_like(rollout.mask), defaultdict(float)
    weights[batch] = loss_weights(rollout.mask[batch], c.loss_agg_mode, c.loss_scale_factor or c.max_response_length)
    with whole_weights(learner.model, models.reference if role == "actor" and c.kl_kind == "full" else None):
        for rows, part in micro_batches(batch, rollout, c):
            width = part.mask.shape[1]
            loss, logged = ppo_loss(role, models, part, weights[rows, :width], kl_coef, c)
            learner.backward(loss)
            if role == "actor":
                rollout.ratio[rows, :width] = logged.pop("ratio") * part.mask
                rollout.clipped[rows, :width] = logged["policy/clipfrac"]
            for name, x in logged.items():
                sums[name] += (x.detach() * (weights[rows, :width] if name.endswith("/loss") else part.mask)).sum()
    sums["tokens"] = rollout.mask[batch].sum()
    totals = torch.cat([sum_over_ranks(torch.stack(list(sums.values()))), learner.clip_gradient()[None]])
    result = dict(zip([*sums, "grad_norm"], totals.tolist(), strict=True))  # the step's only wait for the device
    stop_kl = math.inf if c.early_stop_kl is None else c.early_stop_kl
    result["stopped"] = result.get("policy/approx_kl", 0.0) > stop_kl * result["tokens"]
    if result["stopped"]:
        learner.drop_gradient()
        return result | {"grad_norm": math.nan}
    learner.step(lr_factor, result["grad_norm"])
    return result


def update(role: str, models: Models, rollout: Rollout, step: int, total: int, kl_coef: float, c: Config) -> dict:
    """The epochs of the "actor" (with the value loss, when the critic is shared) or of the separate "critic": metrics.

    Every epoch is a fresh permutation of the rollout. With critic_early_stop a tenth of it is held out, and the epochs
    of the critic end when its loss there stops falling.
    """
    clock, actor, learner = clock_now(), role == "actor", getattr(models, role)
    epochs = c.ppo_epochs if actor else c.critic_ppo_epochs or c.ppo_epochs
    size = c.ppo_mini_batch_size if actor else c.critic_ppo_mini_batch_size or c.ppo_mini_batch_size
    delay = c.critic_warmup if actor else 0  # the actor's schedule starts when it does
    held_out = [] if actor or not c.critic_early_stop else list(range(0, c.rollout_size, 10))
    rows = sorted(set(range(c.rollout_size)) - set(held_out))
    updates, history, losses = epochs * math.ceil(len(rows) / size), [], [math.inf]
    learner.model.train()  # dropout is 0; transformers checkpoints activations in this mode only
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=seeded("cpu", c.seed, "shuffle", step, epoch)).tolist()
        for start in range(0, len(rows), size):
            progress = step - delay + len(history) / updates
            lr_factor = learning_rate_factor(progress, updates, total - delay, c.warmup_steps, c.lr_schedule)
            batch = [rows[i] for i in order[start : start + size]]
            history.append(train_mini_batch(role, models, rollout, batch, lr_factor, kl_coef, c))
            if actor and len(history) == 1:
                first = 1 + ((rollout.ratio[batch] - 1) * rollout.mask[batch]).abs().max().item()
            if history[-1]["stopped"]:
                break
        if held_out:
            part = rollout.take(held_out)
            values = score_tokens(learner.model, part, c)[VALUES]
            loss, _ = clipped_value_loss(values, part.old_values, part.returns, c.cliprange_value)
            losses.append(masked_mean(loss, part.mask).item())
        if history[-1]["stopped"] or (held_out and losses[-1] >= losses[-2]):
            break
    learner.model.eval()
    tokens, names = sum(h["tokens"] for h in history), [name for name in history[0] if "/" in name]
    metrics = {n: sum(h[n] for h in history) / (len(history) if n.endswith("/loss") else tokens) for n in names}
    metrics |= {"policy/ratio_first": first} if actor else {}
    metrics["optim/skipped_steps"] = sum(x.skipped_steps for x in (models.actor, models.critic) if x)
    prefix = "optim/" if actor else "optim/critic_"
    return metrics | {f"{prefix}lr": lr_factor * learner.base_lr, f"{prefix}grad_norm": history[0]["grad_norm"],
                      f"time/update_{role}": clock_now() - clock}


# ---- Evaluation, logs, checkpoints ----------------------------------------------------------------------------------


def mean_and_error(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of x [B] over all ranks, and its standard error."""
    everyone = torch.ones_like(x)
    mean, count = masked_mean(x, everyone), sum_over_ranks(everyone.sum())
    return mean, (masked_mean((x - mean).square(), everyone) / (count - 1).clamp(min=1)).sqrt()


def evaluate(models: Models, reward: Callable, examples: list[Example], config: Config) -> tuple[dict, list[dict]]:
    """Greedy responses to all examples: mean score and standard error, both GSM8K accuracies, and a few samples."""
    rollout = respond(models, examples, config, generator=None)
    rollout.scores, measured = score_responses(reward, examples, rollout.texts, config.failed_score)
    metrics = {f"eval/{name}": x for name, x in measured.items()}
    metrics["eval/score"], metrics["eval/standard_error"] = mean_and_error(rollout.scores.double())
    if config.reward == "gsm8k":
        flexible = [score_gsm8k_flexible(text, e.answer) for text, e in zip(rollout.texts, examples, strict=True)]
        accuracy, error = mean_and_error(torch.tensor(flexible, dtype=torch.float64))
        metrics |= {"eval/accuracy": metrics["eval/score"], "eval/accuracy_flexible": accuracy,
                    "eval/standard_error_flexible": error}
    return metrics, describe(rollout, "eval", models, config)


def describe(r: Rollout, split: str, models: Models, config: Config) -> list[dict]:
    """The first print_samples responses as samples.jsonl has them, with one number per token for all that is known."""
    columns = {"logprob": r.old_logprobs, "ref_logprob": r.ref_logprobs, "kl": r.kl, "reward": r.rewards,
               "value": r.old_values, "advantage": r.advantages, "return": r.returns, "ratio": r.ratio,
               "clipped": r.clipped}
    return [{
        "split": split, "prompt": r.examples[i].text, "response": r.texts[i], "score": r.scores[i].item(),
        "stop_reason": "stop" if r.stopped[i] else "length", "truncated": not r.stopped[i].item(),
        "token": models.tokenizer.convert_ids_to_tokens(ids),
        **{name: None if x is None else x[i, : len(ids)].tolist() for name, x in columns.items()},
    } for i, ids in enumerate(r.responses[: config.print_samples])]


CURVES = """eval/score reward/score reward/kl policy/entropy policy/clipfrac policy/approx_kl value/loss
    value/explained_variance rollout/response_length""".split()


def check_health(metrics: dict, step: int, said: set[str]) -> None:
    """Says once, with its likely cause, what the numbers of a step show to be wrong."""
    m = defaultdict(lambda: math.nan, metrics)  # comparisons with NaN are false: what is not measured is not wrong
    tolerance = 2e-2 if "rollout/logprob_gap" in metrics else 1e-4  # bf16; fp32 rounds logits at 1e-7 of their size
    for wrong, sentence in (
        (abs(m["policy/ratio_first"] - 1) > tolerance, "the first ratio is not 1: sampling and training disagree"),
        (step == 0 and abs(m["reward/kl"]) > tolerance, "the first KL is not 0: the reference is another policy"),
        (step == 4 and m["reward/score_std"] < 1e-6, "all responses get the same score: nothing can be learned"),
        (m["reward/kl"] < -0.05, "KL is negative: top_p or top_k truncates, or log-probs are not those of the sampler"),
        (m["rollout/eos_rate"] < 0.05, "hardly a response ends by itself: max_response_length, stop tokens?"),
        (m["policy/entropy"] < 1e-3, "the entropy has collapsed: lower lr, raise entropy_coeff or the KL coefficient"),
        (m["policy/clipfrac"] > 0.3, "over 30 % of the tokens are clipped: lower lr or ppo_epochs"),
        (m["value/explained_variance"] < -1 and m["value/loss"] > 0.1, "the critic is far worse than a constant"),
    ):
        if wrong and sentence not in said:
            said.add(sentence)
            warn(f"step {step + 1}: {sentence}")


def write_whole(path: Path, text: str) -> None:
    """Whoever reads path finds the old text or this one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def log_metrics(run_dir: Path, step: int, metrics: dict, samples: list[dict], tracker) -> None:
    """A row of training_metrics.csv, lines of samples.jsonl, and a line of progress."""
    metrics, path = {name: float(x) for name, x in metrics.items()}, run_dir / "training_metrics.csv"
    table = pandas.read_csv(path, index_col="step")
    table = pandas.concat([table, pandas.DataFrame(metrics, index=[step])]).sort_index(axis=1)
    write_whole(path, table.to_csv(index_label="step"))
    with open(run_dir / "samples.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
    if tracker:
        tracker.log(metrics, step=step)
    line = ", ".join(f"{name} {metrics[name]:.4g}" for name in [*CURVES, "time/tokens_per_second"] if name in metrics)
    tqdm.write(f"step {step}: {line}")  # above the progress bar on a terminal, a plain line elsewhere


def save_summary(run_dir: Path, config: Config, status: str) -> list[dict]:
    """summary.json and training_curves.png, made from training_metrics.csv. Returns the rows with an evaluation."""
    import matplotlib.figure

    table = pandas.read_csv(run_dir / "training_metrics.csv")
    evaluations = table.filter(regex="^(step|eval/)").dropna(thresh=2).dropna(axis=1).to_dict("records")
    command = ["python", *sys.argv] + ([] if config.output_dir else ["--output_dir", str(run_dir)])
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    summary = {"status": status, "step": max(table["step"], default=0), "versions": versions,
               "first_evaluation": evaluations[:1], "last_evaluation": evaluations[-1:],
               "resume_command": shlex.join(command), "config": asdict(config)}
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=2))
    figure = matplotlib.figure.Figure(figsize=(13, 9), layout="constrained")
    for axis, name in zip(figure.subplots(3, 3).flat, CURVES, strict=True):
        axis.plot("step", name, data=table.reindex(columns=["step", name]).dropna())
        axis.set(title=name, xlabel="step")
    figure.savefig(run_dir / "training_curves.png", dpi=80)
    return evaluations


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoints/step_*[0-9]"), key=lambda path: int(path.name[5:]))  # the oldest first


def open_run(config: Config) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from (None: from the start). Raises UsageError.

    A folder is continued if the checkpoint lies in it, begun anew if its run died before the first one, else refused.
    """
    name = f"ppo_llm-{Path(config.dataset).stem.replace(':', '-')}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    own_dir, link = Path("output", name), Path("output", "ppo_metrics")
    run_dir = Path(config.output_dir or own_dir)
    newest = next(reversed(checkpoints(run_dir)), None)
    start = {"auto": newest, "never": None, "must": newest or run_dir}.get(config.resume, Path(config.resume))
    if start and not (start / "state.json").is_file():
        raise UsageError(f"resume {config.resume}: no checkpoint in {start}")
    continued = start is not None and run_dir.resolve() in start.resolve().parents
    if continued and config.eval_only:
        run_dir, continued = own_dir, False  # an evaluation of a run adds nothing to its folder
    summary = run_dir / "summary.json"
    died = not newest and summary.exists() and '"status": "running"' in summary.read_text()
    if any(run_dir.glob("*")) and not continued and not died:
        raise UsageError(f"{run_dir} is not empty and not continued (resume {config.resume}): choose another folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run_dir / "checkpoints" / "temporary", ignore_errors=True)  # what a killed run was writing
    if not continued:
        (run_dir / "training_metrics.csv").write_text("step\n")
        (run_dir / "samples.jsonl").write_text("")
    if run_dir == own_dir and (link.is_symlink() or not link.exists()):
        link.unlink(missing_ok=True)
        link.symlink_to(name)
    save_summary(run_dir, config, "running")
    return run_dir, start


def save_checkpoint(run_dir: Path, step: int, models: Models, kl_coef: float, config: Config) -> None:
    """checkpoints/step_N: weights, optimizers, the KL coefficient. Complete or absent: it is renamed when written."""
    folder, temporary = run_dir / "checkpoints" / f"step_{step}", run_dir / "checkpoints" / "temporary"
    models.actor.save(temporary / "actor.safetensors")
    if models.critic:
        models.critic.save(temporary / "critic.safetensors")
    state = {"step": step, "kl_coef": kl_coef, **{key: getattr(config, key) for key in (*STRUCTURE, "model")}}
    (temporary / "state.json").write_text(json.dumps(state))
    temporary.replace(folder)
    for old in checkpoints(run_dir)[: -config.save_total_limit]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, models: Models, config: Config) -> tuple[int, float]:
    """Restores the learners. Returns (step, kl_coef). Raises UsageError if they do not fit."""
    state = json.loads((folder / "state.json").read_text())
    for key in (*STRUCTURE, *["model"] * bool(config.lora_rank)):  # an adapter belongs to its model
        if state.get(key, getattr(Config, key)) != getattr(config, key):
            raise UsageError(f"{folder} was made with {key} {state.get(key)}, not {getattr(config, key)}")
    models.actor.load(folder / "actor.safetensors")
    if models.critic:
        models.critic.load(folder / "critic.safetensors")
    return state["step"], state["kl_coef"]


def cut_back(run_dir: Path, step: int) -> None:
    """Drops what a run did after this step, from which it takes another course."""
    for folder in checkpoints(run_dir):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    log, samples = run_dir / "training_metrics.csv", run_dir / "samples.jsonl"
    table = pandas.read_csv(log)
    write_whole(log, table[table["step"] <= step].to_csv(index=False))
    lines = [x for x in samples.read_text().splitlines(keepends=True) if x.endswith("\n")]  # the last may be half one
    write_whole(samples, "".join(line for line in lines if json.loads(line)["step"] <= step))


# ---- Main -----------------------------------------------------------------------------------------------------------


def prepare(config: Config) -> tuple:
    """Tokenizer, reward and examples: what can be wrong is found before a model is loaded. Raises UsageError."""
    check_config(config)
    transformers.utils.logging.set_verbosity_error()  # its notes on unused heads and shards are not for the user
    transformers.utils.logging.disable_progress_bar()
    length, sizes = config.max_prompt_length + config.max_response_length, []
    try:
        for name in (config.critic_model or config.model, config.model):
            if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
                raise UsageError(f"{name} is a LoRA adapter: export it with merge_lora, or go on from a checkpoint")
            lm_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code).get_text_config()
            context = getattr(lm_config, "max_position_embeddings", length)
            if length > context:
                raise UsageError(f"max_prompt_length + max_response_length = {length} exceed the {context} of {name}")
            is_reward_model(name, config)  # refuses a classifier of several classes
            sizes.append(lm_config.vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        hint = "the bundled demo is not beside this script: give --model" if name == DEMO.model else str(error)
        raise UsageError(f"model {name}: {hint.splitlines()[0]}") from error
    if sizes[0] < min(len(tokenizer), sizes[1]):
        raise UsageError(f"critic_model {config.critic_model} knows {sizes[0]} tokens, the policy {sizes[1]}")
    try:
        tracker = None if config.track == "none" else importlib.import_module(config.track)
        if config.lora_rank:
            importlib.import_module("peft")
    except ImportError as error:
        raise UsageError(f"an option needs a package that is missing: pip install {error.name}") from error
    train, evals = load_examples(tokenizer, config)
    return tokenizer, load_reward(config), train, evals, tracker


def main(config: Config) -> None:
    tokenizer, reward, train, evals, tracker = prepare(config)
    torch.use_deterministic_algorithms(config.deterministic)
    total = config.total_steps or config.total_epochs * (len(train) // config.train_batch_size)
    total = 0 if config.eval_only else total
    if 0 < total <= config.critic_warmup:
        raise UsageError(f"critic_warmup = {config.critic_warmup} leaves the actor none of {total} steps")
    run_dir, checkpoint_dir = open_run(config)
    first = (train or evals)[:2]
    print(f"run: {run_dir}\nfirst prompt: {tokenizer.decode(first[0].prompt)!r}\n{total} steps of {config.rollout_size}"
          f" responses to {config.train_batch_size} of {len(train)} prompts, {config.ppo_epochs} epochs of mini-batches"
          f" of {config.ppo_mini_batch_size}; {len(evals)} evaluation rows")
    models = build_models(tokenizer, config)
    for model in filter(None, (models.actor.model, models.critic and models.critic.model, models.reference)):
        with whole_weights(model):
            check_passes(model, [example.prompt[:64] for example in first], models.stop_ids, config)
    kl_name, usual_target = {"token": ("reward/kl", 0.1), "sequence": ("reward/kl_sequence", 6.0)}[config.kl_ctrl_unit]
    target = (config.kl_ctrl_target or usual_target) if config.kl_ctrl_type == "adaptive" else None
    kl_controller, start = AdaptiveKLController(config.kl_coef, target, config.kl_ctrl_horizon), 0
    if checkpoint_dir:
        start, kl_controller.coef = load_checkpoint(checkpoint_dir, models, config)
        cut_back(run_dir, start)
    if tracker:
        tracker.init(project="ppo_llm", name=run_dir.name, config=asdict(config))
    if evals and (config.eval_only or not checkpoint_dir):
        log_metrics(run_dir, start, *evaluate(models, reward, evals, config), tracker)
    save_summary(run_dir, config, "running")
    said: set[str] = set()
    for step in tqdm(range(start, total), file=sys.stdout, disable=None):  # None: a bar on a terminal only
        clock = clock_now()
        batch = prompt_order(len(train), config.train_batch_size, step, config.seed)
        examples = [train[i] for i in batch for _ in range(config.rollout_n)]
        rollout, metrics = collect_rollout(models, reward, examples, step, kl_controller.coef, config)
        if models.critic:
            metrics |= update("critic", models, rollout, step, total, kl_controller.coef, config)
        if step >= config.critic_warmup:
            metrics |= update("actor", models, rollout, step, total, kl_controller.coef, config)
        kl_controller.update(float(metrics.get(kl_name, 0.0)), config.rollout_size)
        seconds = clock_now() - clock
        tokens = sum_over_ranks(torch.tensor(sum(map(len, rollout.prompts + rollout.responses))))
        metrics["time/tokens_per_second"] = tokens / seconds
        samples, last = describe(rollout, "train", models, config), step + 1 == total
        stopping = sum_over_ranks(torch.tensor(len(STOP))).item() > 0
        if evals and (last or (step + 1) % config.eval_every == 0):
            eval_metrics, eval_samples = evaluate(models, reward, evals, config)
            metrics, samples = metrics | eval_metrics, samples + eval_samples
        log_metrics(run_dir, step + 1, metrics, samples, tracker)
        check_health(metrics, step, said)
        if last or stopping or (config.save_every and (step + 1) % config.save_every == 0):
            save_checkpoint(run_dir, step + 1, models, kl_controller.coef, config)
            save_summary(run_dir, config, "running")
        if stopping and not last:
            sys.exit(128 + signal.SIGTERM)
    if not config.eval_only:
        with whole_weights(models.actor.model):
            models.actor.export(run_dir / "model", tokenizer, config)
    evaluations = save_summary(run_dir, config, "finished")
    for name in evaluations[0] if evaluations else ():
        print(f"{name:30} {evaluations[0][name]:10.4g} {evaluations[-1][name]:10.4g}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda number, frame: STOP.append(number))
    defaults = Config() if any(argument.split("=")[0] == "--model" for argument in sys.argv) else DEMO
    try:
        main(tyro.cli(Config, default=defaults, use_underscores=True))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
