"""Proximal Policy Optimization for language models: the whole algorithm in one file.

    deepspeed ppo_llm_multigpu.py                                       # bundled demo on this machine's GPUs
    deepspeed ppo_llm_multigpu.py --model Qwen/Qwen2.5-0.5B-Instruct    # GSM8K with the published settings
    torchrun --nproc_per_node 2 ppo_llm_multigpu.py --device cpu        # the demo in two processes, no GPU

    for step in range(total_steps):
        collect_rollout(models, reward, prompts):
            responses, old_logprobs = generate(policy, prompts)
            scores = reward(prompts, responses)                              one number per response
            old_values = forward(critic, responses)
            kl = estimate_kl(old_logprobs, ref_logprobs)
            rewards = compute_rewards(scores, kl, kl_coef)                   on the last token, minus KL
            advantages, returns = compute_advantages(rewards, old_values)    GAE, or critic-free baselines
        update("critic"), for each epoch and mini-batch of the rollout:
            loss = clipped_value_loss(values, old_values, returns)
        update("actor"), for each epoch and mini-batch of the rollout:
            loss = clipped_policy_loss(logprobs, old_logprobs, advantages) - entropy_coeff * entropy (+ KL)
        kl_controller.update(kl)                                             moves kl_coef, when asked

Options, formulas, models, rollout, update and main are the algorithm; what every training script needs
(checks, data, rewards, logs) comes after them.

Shapes: B responses, T tokens of the longest response, N response tokens of a micro-batch, concatenated, H
hidden size, V vocabulary. [B, T] tensors are fp32, right-padded, 0 where `mask` is 0. values[:, t] is V of
the state before token t; logprobs[:, t] is the log-prob of token t.

Where this differs from the papers and from other code, on purpose:
1. A loss is a weighted sum whose weights are known before a mini-batch is cut into micro-batches
   (`loss_weights`): their size and the padding change the result only by rounding. Policy, value, entropy
   and KL losses share the weights.
2. Dual clip (arXiv:1912.09729) is on, c = 3. The value head starts at zero, so V = 0 and not noise at first,
   unless critic_model has a score head: that is kept.
3. Log-probs, entropy and KL are of the policy that samples: logits divided by the temperature; no top-p,
   no top-k.
4. A response cut at max_response_length counts as ended: V = 0 after it, nothing is bootstrapped (as verl
   and TRL).
5. Critic-free advantages are computed after the KL is subtracted from the rewards, as in verl;
   rloo_vectorized is an alias of rloo.
6. Prompt order, sampling noise and shuffles are functions of (seed, step): resuming needs no
   random-number state.
7. Where log-probs are scored anew (bf16, or a rollout hook), the policy loss of a token is multiplied by a
   truncated importance weight (`importance_weights`); the published GSM8K run had none of them.
   --rollout_is_cap None turns it off.
"""

import argparse
import contextlib
import copy
import faulthandler
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import datasets
import pandas
import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from tqdm.utils import disp_trim
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.modeling_layers import GradientCheckpointingLayer

HERE = Path(__file__).resolve().parent
GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
LOGITS_PER_CHUNK = 2**26  # fp32 logits that exist at once, 256 MB a copy
KL_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
KLPenalty = Literal["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "full"]
KLLoss = Literal[KLPenalty, "k1+", "kl+", "abs+", "k2+", "mse+", "k3+", "low_var_kl+"]
Estimator = Literal[
    "gae", "grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
STOP: list[int] = []  # the signals that have asked the run to stop


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


class Diverged(UsageError):
    """The numbers of the run are not finite any more: nothing is saved, the last checkpoint stays."""


# ---- Options ---------------------------------------------------------------------------------------------
# The defaults are the published GSM8K run (verl, Qwen2.5-0.5B-Instruct). Without --model, DEMO runs.


@dataclass
class Config:
    # Run
    seed: int = 1  # Seed of the prompt order, the sampling, the shuffles and the LoRA adapters.
    output_dir: str | None = None  # Folder of the run, continued if it holds one; None: output/NAME-TIME.
    resume: str | None = None  # Start from the weights, optimizer and step of this other run or checkpoint.
    device: str = "auto"  # Device: auto (cuda if there is one, else cpu), cpu, cuda, cuda:1 or mps.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Type of the weights; auto: bfloat16 on cuda.
    # Models
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # Hugging Face name or folder; without this flag the demo runs.
    critic: Literal["separate", "shared"] = "separate"  # A model of its own, or a value head on the policy.
    critic_model: str | None = None  # Start of the separate critic and of its value head; None: the policy.
    value_pooling: Literal["last", "mean"] = "last"  # States that the value head reads.
    reference: Literal["init", "previous", "mixed"] = "init"  # Policy that the KL is measured against.
    reference_mix: float = 0.5  # Weight of the previous policy in reference mixed.
    lora_rank: int | None = None  # Rank of the LoRA adapters that are trained; None: train all weights.
    lora_alpha: float | None = None  # An adapter counts lora_alpha / lora_rank times; None: twice.
    lora_target: str = "all-linear"  # Layers that get an adapter: all-linear, or names with commas.
    gradient_checkpointing: bool = False  # Recompute activations in backward: less memory, about 30 % slower.
    trust_remote_code: bool = False  # Run Python code that comes with a model repository.
    # Data
    dataset: str = "openai/gsm8k"  # Training prompts: demo, a file, or a Hub name, NAME[:CONFIG[:SPLIT]].
    eval_dataset: str | None = None  # Held-out prompts; None: the test split of demo or gsm8k, else none.
    prompt_column: str | None = None  # Prompts; None: question, instruction, prompt, messages, conversations.
    answer_column: str | None = None  # Answers; None: answer, output, ground_truth or reward_model.
    system_prompt: str | None = None  # Text put before every prompt as a system turn.
    max_prompt_length: int = 1024  # Tokens; longer training prompts are dropped, evaluation prompts cut.
    # Reward
    reward: str = "gsm8k"  # gsm8k, FILE.py:function(prompts, responses, answers), or a reward model.
    reward_attribution: Literal["terminal", "uniform", "discounted"] = "terminal"  # How the score is spread.
    attribution_discount: float = 0.95  # Discounted: weight of a token relative to the next one.
    missing_eos_penalty: float | None = None  # Subtracted from the score of a cut response; None: 0.
    # KL
    use_kl_in_reward: bool | None = None  # Subtract the KL from the reward; None: unless use_kl_loss.
    kl_penalty: KLPenalty = "k1"  # Estimator in the reward; only k1 has the right gradient there.
    kl_ctrl_type: Literal["fixed", "adaptive"] = "fixed"  # Whether the coefficient is steered to a target.
    kl_ctrl_coef: float = 0.001  # Coefficient of the KL in the reward; 0: no reference model is loaded.
    kl_ctrl_target: float | None = None  # Nats that adaptive holds; None: 0.1 per token, 6.0 per sequence.
    kl_ctrl_unit: Literal["token", "sequence"] = "token"  # Unit that kl_ctrl_target is in.
    kl_ctrl_horizon: int = 10000  # Responses over which the coefficient moves by at most 20 %.
    use_kl_loss: bool = False  # Make the KL a term of the actor's loss instead of the reward.
    kl_loss_coef: float = 0.001  # Coefficient of the KL in the loss, steered where kl_ctrl_type is adaptive.
    kl_loss_type: KLLoss = "k3+"  # Estimator in the loss; k2, full and the + forms have the right gradient.
    # Rollout
    train_batch_size: int = 256  # Number of prompts in a step.
    rollout_n: int = 1  # Number of responses to each prompt.
    max_response_length: int = 512  # Limit of a response in tokens; what is longer is cut there.
    temperature: float = 1.0  # Divides the logits, in sampling and in every log-probability.
    rollout: str = "builtin"  # builtin, or FILE.py:generate(model, prompts, stop_ids, config, generator).
    rollout_slots: int = 256  # Responses generated at a time; changes memory and speed only.
    rollout_is_cap: float | None = 2.0  # Cap of importance weights (deviation 7 above); None: off.
    # Advantage
    adv_estimator: Estimator = "gae"  # How advantages are estimated; only gae needs a critic.
    gamma: float = 1.0  # Discount of rewards per token.
    lam: float = 1.0  # Lambda of GAE, per token.
    lam_critic: float | None = None  # Another lambda for the returns (VC-PPO); None: lam.
    norm_adv_by_std: bool = True  # grpo: divide by the group's standard deviation (off: Dr. GRPO).
    whiten_advantages: bool | None = None  # Whiten advantages; None: as the estimator is defined.
    # Loss
    clip_ratio: float = 0.2  # The ratio new/old is clipped to 1 +- this.
    clip_ratio_low: float | None = None  # Lower side of that range; None: clip_ratio.
    clip_ratio_high: float | None = None  # Upper side of that range; None: clip_ratio.
    clip_ratio_c: float | None = 3.0  # Dual clip: bound where the advantage is negative; None: off.
    cliprange_value: float | None = 0.5  # Values move at most this far from the old ones; None: off.
    vf_coef: float = 0.1  # Weight of the value loss when critic is shared.
    entropy_coeff: float = 0.001  # Weight of the entropy bonus, per nat.
    loss_agg_mode: Aggregation = "token-mean"  # How the losses of tokens become one number.
    loss_scale_factor: float | None = None  # Divisor of seq-mean-token-sum-norm; None: max_response_length.
    # Optimization
    total_epochs: int = 15  # Number of passes over the data set.
    total_steps: int | None = None  # Steps (rollout + update); 0: only evaluate; None: from total_epochs.
    ppo_epochs: int = 1  # Number of passes over each rollout.
    ppo_mini_batch_size: int = 64  # Number of responses per optimizer step.
    critic_ppo_epochs: int | None = None  # Passes of the critic over each rollout; None: ppo_epochs.
    critic_ppo_mini_batch_size: int | None = None  # Responses per critic step; None: ppo_mini_batch_size.
    micro_batch_tokens: int = 16384  # Tokens per pass, padding included; changes memory and speed only.
    lr: float = 1e-6  # Learning rate of the policy.
    critic_lr: float = 1e-5  # Learning rate of the critic or of the value head.
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # After the warm-up, of all rates.
    warmup_steps: int = 0  # Steps (rollout + update) of linear warm-up of the learning rates.
    weight_decay: float = 0.01  # Weight decay of AdamW, for both models.
    grad_clip: float = 1.0  # The norm of a gradient is clipped to this.
    early_stop_kl: float | None = None  # Ends the actor's update when approx_kl of a mini-batch passes this.
    critic_warmup: int = 0  # First steps in which only the critic learns.
    critic_early_stop: bool = False  # End the critic's epochs when its held-out loss stops falling.
    # Evaluation
    eval_every: int = 10  # Steps between evaluations (greedy; also at the start and end); 0: never.
    eval_size: int | None = None  # Number of evaluation rows that are used; None: all.
    save_every: int = 50  # Steps between checkpoints; 0: only at the end.
    save_total_limit: int = 2  # Number of newest checkpoints that are kept.
    track: Literal["none", "wandb"] = "none"  # Where the metrics are sent, beside the folder of the run.
    # Ranks
    zero_stage: Literal[0, 2, 3] = 2  # ZeRO: 2 splits optimizer and gradients over the ranks, 3 weights too.
    offload: Literal["none", "optimizer", "all"] = "none"  # What ZeRO keeps in the CPU's memory.
    ds_config: str | None = None  # JSON file with entries that replace those of the DeepSpeed configuration.
    dist_timeout: int = 1800  # Seconds that a rank waits for the others before it ends the run.

    @property
    def rollout_size(self) -> int:  # B, responses per step
        return self.train_batch_size * self.rollout_n

    @property
    def uses_critic(self) -> bool:
        return self.adv_estimator == "gae"

    @property
    def kl_in_reward(self) -> bool:
        return not self.use_kl_loss if self.use_kl_in_reward is None else self.use_kl_in_reward

    @property
    def kl_coef(self) -> float:  # at the start; 0: no KL is used and no reference model is needed
        if self.use_kl_loss:
            return self.kl_loss_coef
        return self.kl_ctrl_coef if self.kl_in_reward else 0.0

    @property
    def kl_kind(self) -> str:  # estimator of the KL in use
        kind = self.kl_loss_type if self.use_kl_loss else self.kl_penalty
        return KL_ALIASES.get(kind, kind)

    @property
    def kl_metric(self) -> str:  # what the controller looks at
        return "reward/kl_sequence" if self.kl_ctrl_unit == "sequence" else "reward/kl"

    @property
    def kl_target(self) -> float | None:  # None: the coefficient is fixed
        if self.kl_ctrl_type == "fixed":
            return None
        usual = 6.0 if self.kl_ctrl_unit == "sequence" else 0.1
        return self.kl_ctrl_target or usual


DEMO = Config(
    model=str(HERE / "assets" / "demo"), dataset="demo", total_steps=25, train_batch_size=128, ppo_epochs=2,
    ppo_mini_batch_size=32, max_response_length=64, lr=3e-5, critic_lr=3e-4, lam=0.95, weight_decay=0.0)


# ---- Formulas: pure functions of tensors and numbers -----------------------------------------------------


def sum_over_ranks(x: Tensor) -> Tensor:
    """All statistics go through it, so that all ranks of ppo_llm_multigpu.py take the same branch."""
    return all_reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    return all_reduce(x, dist.ReduceOp.MAX)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1, over all ranks; 0 if the mask is empty. It carries no gradient."""
    x = x.detach().masked_fill(mask == 0, 0.0)
    total, count = sum_over_ranks(torch.stack([x.sum(), mask.sum()]))
    return total / count.clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the mask, 0 outside."""
    mean = masked_mean(x, mask)
    count = sum_over_ranks(mask.sum())
    variance = masked_mean((x - mean).square(), mask) * count / (count - 1).clamp(min=1)
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(mask == 0, 0.0)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate of KL(policy, reference) at each sampled token (joschu.net/blog/kl-approx.html).

    k1 = x = log(policy/reference) is unbiased, abs = |x|, k2 = x^2/2, k3 = exp(-x) - 1 + x is unbiased and at
    least 0; it is capped at 10 as in verl, where its gradient is 0.
    A trailing + keeps the value and takes the gradient of k2: in expectation that of KL(policy, reference).
    """
    if kind.endswith("+"):
        value = estimate_kl(logprobs, ref_logprobs, kind[:-1])
        surrogate = estimate_kl(logprobs, ref_logprobs, "k2")
        return value.detach() + surrogate - surrogate.detach()
    kind = KL_ALIASES.get(kind, kind)
    x = logprobs - ref_logprobs
    if kind == "k1":
        return x
    if kind == "abs":
        return x.abs()
    if kind == "k2":
        return 0.5 * x.square()
    if kind == "k3":
        y = (-x).clamp(-20, 20)
        return (torch.expm1(y) - y).clamp(-10, 10)
    raise ValueError(f"no KL estimator {kind!r}")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy, reference) at each position, summed over the vocabulary: logits [N, V] -> [N]."""
    logp = logits.log_softmax(-1)
    ref_logp = ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


@dataclass
class AdaptiveKLController:
    """Steers the KL coefficient towards a target (arXiv:1909.08593, section 2.2); None: it is fixed."""

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, num_responses: int) -> None:
        """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon, after coef was used."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * num_responses / self.horizon


def compute_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, discount: float = 0.0
) -> Tensor:
    """Rewards [B, T]: the scores [B] spread over the tokens, minus kl_coef * kl [B, T].

    Token t of L gets discount^(L-1-t) of the score, normalised to sum 1: 0 puts all on the last token, 1
    spreads it evenly.
    """
    tokens_from_here = mask.long().flip(1).cumsum(1).flip(1)
    tokens_after = (tokens_from_here - 1).clamp(min=0)
    weights = torch.full_like(mask, discount).pow(tokens_after) * mask
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-8)
    return (weights * scores[:, None] - kl_coef * kl).masked_fill(mask == 0, 0.0)


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv:1506.02438): advantages and returns = advantages + values, [B, T], un-whitened.

    Positions where mask is 0 are passed over without decay, as in verl. V = 0 after the last token.
    """
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(valid, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = next_advantage
    returns = advantages + values
    return advantages.masked_fill(mask == 0, 0.0), returns.masked_fill(mask == 0, 0.0)


def compute_group_advantages(scores: Tensor, group_size: int, estimator: str, by_std: bool = True) -> Tensor:
    """Advantages [B] of responses against the others to the same prompt, whose rows are adjacent."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if estimator == "grpo" and by_std:  # arXiv:2402.03300; without the division: Dr. GRPO, arXiv:2503.20783
        centred = centred / (groups.std(1, keepdim=True) + 1e-6)
    if estimator in ("rloo", "rloo_vectorized"):  # = score - mean of the others (arXiv:2402.14740)
        centred = centred * group_size / (group_size - 1)
    return centred.view(-1)


def compute_advantages(
    rewards: Tensor, values: Tensor | None, mask: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T]; advantages whitened where the estimator or whiten_advantages says so."""
    estimator = config.adv_estimator
    if estimator == "gae":
        advantages, returns = compute_gae(rewards, values, mask, config.gamma, config.lam)
        if config.lam_critic is not None:  # VC-PPO, arXiv:2503.01491
            _, returns = compute_gae(rewards, values, mask, config.gamma, config.lam_critic)
    elif estimator == "reinforce_plus_plus":  # arXiv:2501.03262: reward to go, no baseline
        advantages, returns = compute_gae(rewards, torch.zeros_like(mask), mask, config.gamma, 1.0)
    else:
        scores = compute_group_advantages(rewards.sum(1), config.rollout_n, estimator, config.norm_adv_by_std)
        advantages = returns = scores[:, None] * mask
    whiten = config.whiten_advantages
    if whiten is None:
        whiten = estimator in ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return advantages, returns


def importance_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(exp(old - sampled), cap) [B, T], for a sampler that is not the trained policy.

    Truncated importance sampling (arXiv:1802.01561, section 4.1, where it is rho; for rollouts of another
    engine: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). No
    gradient flows through it.
    """
    gap = (old_logprobs - sampled_logprobs).detach().masked_fill(mask == 0, 0.0)
    return gap.exp().clamp(max=cap)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
    clip_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), elementwise.

    clip_c is the dual clip (arXiv:1912.09729): where the advantage is negative the loss is at most
    -advantage * clip_c. Returns the loss, the ratio, 1 where the clipped term was the larger one, and 1 where
    clip_c bounded it.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # exp must not overflow
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    is_bounded = torch.zeros_like(is_clipped)
    if clip_c is not None:
        bound = -advantages * clip_c
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
    return loss, ratio.detach(), is_clipped.float(), is_bounded.float()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error, elementwise, of values, or of values clipped near old_values if worse.

    Also returns where the clipped one was worse (as in OpenAI's baselines, ppo2).
    """
    loss = (values - returns).square()
    is_clipped = torch.zeros_like(values)
    if cliprange is not None:
        clipped = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
        is_clipped = (clipped > loss).float()
        loss = torch.maximum(loss, clipped)
    return 0.5 * loss, is_clipped


def loss_weights(mask: Tensor, mode: str, scale: float) -> Tensor:
    """Weights [B, T] of a mini-batch: its loss is (token_loss * weights).sum(), over micro-batches and ranks.

    Those of token-mean and seq-mean-token-mean sum to 1; seq-mean-token-sum is mask / responses,
    seq-mean-token-sum-norm mask / scale.
    """
    lengths = mask.sum(1, keepdim=True)
    counts = torch.stack([mask.sum(), (lengths > 0).float().sum()])
    tokens, responses = sum_over_ranks(counts).clamp(min=1)
    if mode == "token-mean":
        return mask / tokens
    if mode == "seq-mean-token-sum":
        return mask / responses
    if mode == "seq-mean-token-mean":
        return mask / (lengths.clamp(min=1) * responses)
    return mask / scale  # seq-mean-token-sum-norm


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 a constant; NaN where all returns agree."""
    error = returns - values
    error_variance = masked_mean((error - masked_mean(error, mask)).square(), mask)
    variance = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    rounding = 1e-10 * masked_mean(returns.square(), mask)  # of means of equal numbers
    return torch.where(variance > rounding, 1 - error_variance / variance, torch.nan)


def learning_rate_factor(progress: float, per_step: int, total: int, warmup: int, schedule: str) -> float:
    """Learning rate over its base value. progress counts steps, and the part of a step that is done."""
    if progress < warmup:
        return min(1.0, (progress + 1 / per_step) / warmup)
    left = 1 - (progress - warmup) / max(total - warmup, 1e-8)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return 1.0


# ---- Models ----------------------------------------------------------------------------------------------
# Sequences of similar length share a rectangle [B, longest], padded on the right. Attention is causal, so no
# token sees the padding behind its sequence; only decode, which pads on the left, gives an attention mask.
# Models stay in eval mode, in training too: with dropout or router noise the first ratio would not be 1.


class LanguageModel(nn.Module):
    """A Hugging Face model that chooses among num_tokens and, where values are wanted, a linear value head.

    The head has the dtype of the other weights, and so an fp32 master where they have one; it computes in
    fp32. It has no bias, as the score heads of transformers have none.
    """

    def __init__(
        self, lm: nn.Module, num_tokens: int, with_values: bool, config: Config, adapter: str | None = None
    ):
        super().__init__()
        self.lm = lm
        self.num_tokens = num_tokens
        self.pooling = config.value_pooling
        self.adapter = adapter  # the LoRA adapter it uses, on a trunk that others may share; None: none
        self.has_logits = lm.get_output_embeddings() is not None and adapter != "critic"
        self.value_head = None
        if with_values:
            lm_config = lm.config.get_text_config()
            size = getattr(lm_config, "word_embed_proj_dim", lm_config.hidden_size)  # OPT projects
            self.value_head = nn.Linear(size, 1, bias=False, device=lm.device, dtype=lm.dtype)
            nn.init.zeros_(self.value_head.weight)

    def select_adapter(self) -> None:
        """The trunk computes with this model's adapter, the only one that gets a gradient, or with none."""
        if getattr(self.lm, "selected_adapter", None) == self.adapter:
            return
        self.lm.selected_adapter = self.adapter
        if self.adapter is None:
            self.lm.disable_adapters()
        else:
            self.lm.enable_adapters()
            self.lm.set_adapter(self.adapter)

    def hidden(self, sequences: list[list[int]]) -> Tensor:
        """Last hidden states [B, longest, H] of token sequences."""
        self.select_adapter()
        rows = [torch.tensor(sequence, device=self.lm.device) for sequence in sequences]
        ids = pad_sequence(rows, batch_first=True)
        return self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """fp32 logits [..., num_tokens] of the policy that samples."""
        config = self.lm.config.get_text_config()
        logits = self.lm.get_output_embeddings()(hidden)[..., : self.num_tokens].float()
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits / temperature

    def values(self, hidden: Tensor) -> Tensor:
        """Values [B, longest] of hidden states [B, longest, H]."""
        hidden = hidden.float()
        if self.pooling == "mean":  # of all states so far
            counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
            hidden = hidden.cumsum(1) / counts[:, None]
        return nn.functional.linear(hidden, self.value_head.weight.float()).squeeze(-1)


def whole_weights(*models: LanguageModel | None) -> contextlib.AbstractContextManager:
    """Around all use of weights: in ppo_llm_multigpu.py ZeRO-3 gathers them here, once for many passes."""
    weights = [w for model in filter(None, models) for w in model.parameters()]
    missing = [w for w in weights if hasattr(w, "ds_id") and not w.numel()]
    import deepspeed
    return deepspeed.zero.GatheredParameters(missing, enabled=bool(missing))


class Learner:
    """A model and its optimizer: nothing else touches an optimizer, a .grad or a checkpoint's weights."""

    def __init__(self, model: LanguageModel, lr: float, critic_lr: float, config: Config):
        self.model = model
        self.base_lr = lr
        self.grad_clip = config.grad_clip
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        model.select_adapter()
        named = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.names = list(named)
        self.weights = list(named.values())
        self.masters = self.weights  # masters and sums are DeepSpeed's, and fp32
        body = sum(w.requires_grad for w in model.lm.parameters())  # the value head is last
        groups = [
            {"params": self.masters[:body], "base_lr": lr},
            {"params": self.masters[body:], "base_lr": critic_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        self.stage = config.zero_stage
        if self.stage == 0 and model.lm.dtype != torch.float32:
            raise UsageError("zero_stage 0 keeps no fp32 masters of bfloat16 weights: give zero_stage 2 or 3")
        import deepspeed
        model.forward = lambda loss: loss  # engine(loss) prepares DeepSpeed's backward; the passes are ours
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(config, model.lm.dtype))
        self.parts = []  # this rank's masters, laid flat
        if self.stage == 2:
            self.parts = self.optimizer.single_partition_of_fp32_groups
        if self.stage == 3:
            self.optimizer.parameter_offload.destroy()  # whole_weights gathers, not these hooks
            self.parts = self.optimizer.fp32_partitioned_groups_flat
        for x in self.parts:
            means = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
            self.optimizer.state[x].update(means, step=torch.zeros((), device=x.device))
        if self.stage == 2:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of loss to what has been collected since the last step."""
        self.model.select_adapter()  # the reference may have come between: checkpointing computes again
        self.engine.backward(self.engine(loss * WORLD))  # DeepSpeed takes the mean of the ranks' gradients

    def clip_gradient(self) -> float:
        """Scales the gradient down to norm grad_clip, and returns the norm that it had."""
        if self.stage:  # ZeRO clips in its step
            self.optimizer.finalize_gradient_accumulation_boundary()
            zero = self.optimizer
            norms = zero._get_norm_groups() if self.stage == 3 else [zero.scaled_global_norm()]
            return math.nan if min(norms) < 0 else math.hypot(*norms)  # -1 stands for what is not finite
        self.engine.buffered_allreduce_fallback()
        return nn.utils.clip_grad_norm_(self.masters, self.grad_clip).item()

    @torch.no_grad()
    def step(self, lr_factor: float, grad_norm: float) -> None:
        """One AdamW step at lr_factor times the base rates.

        If the gradient is not finite, the step is skipped and counted. Raises Diverged at the third in a row.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            self.optimizer.step()
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.data.copy_(master)  # a weight in fp32 is its own master
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            warn("the gradient is not finite: this optimizer step is skipped")
        self.drop_gradient()
        if self.skipped_in_a_row == 3:
            raise Diverged("three gradients in a row are not finite: lower lr, critic_lr or the scores")

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad()
        if self.stage == 2:
            self.optimizer.averaged_gradients = {}
            self.optimizer.all_grad_tensors = {}
            self.optimizer.micro_step_id = -1

    def get_state(self, i: int) -> dict[str, Tensor]:
        """The fp32 master of the i-th weight, and what AdamW remembers of it."""
        if self.stage:  # put together by all ranks for rank 0, which writes it
            get = getattr(self.weights[i], "get_full_hp_param", None)  # ZeRO-2's
            if self.stage == 3:
                get = functools.partial(self.optimizer.get_full_hp_param, self.weights[i])
            state = {key or "weight": get(key) for key in (None, "exp_avg", "exp_avg_sq")}
            return {} if RANK else {**state, "step": self.optimizer.state[self.parts[0]]["step"].clone()}
        master = self.masters[i]
        return {"weight": master.detach(), **self.optimizer.state[master]}

    def set_state(self, i: int, state: dict[str, Tensor]) -> None:
        if self.stage:
            return self.set_part(self.weights[i], state)
        master = self.masters[i].data.copy_(state.pop("weight"))
        self.weights[i].data.copy_(master)
        for key, x in state.items():
            self.optimizer.state[self.masters[i]][key] = x.to(master.device)

    def set_part(self, weight: Tensor, state: dict[str, Tensor]) -> None:
        """This rank's part of what get_state has put together."""
        for x in self.parts if "step" in state else []:  # a weight that nothing uses has none
            self.optimizer.state[x]["step"].copy_(state["step"])
        for key in {"weight", "exp_avg", "exp_avg_sq"} & set(state):
            x = state[key]
            name = None if key == "weight" else key
            if self.stage == 2:
                weight.set_full_hp_param(x, name)
            else:  # every rank has an equal part, with zeros behind the end
                size = weight.ds_tensor.numel()
                flat = x.reshape(weight.ds_shape).flatten()
                x = nn.functional.pad(flat, (0, size * WORLD - len(flat))).split(size)[RANK]
                self.optimizer.set_local_hp_param(x, weight, name)
            if key == "weight":
                (weight.ds_tensor if self.stage == 3 else weight.data).copy_(x)

    def save(self, path: Path) -> None:
        """All that training changes, as `KIND/NAME of the weight` in one safetensors file."""
        self.model.select_adapter()  # DeepSpeed knows only weights that require a gradient
        tensors = {"skipped_steps": torch.tensor(self.skipped_steps)}
        for i, name in enumerate(self.names):
            for kind, x in self.get_state(i).items():
                tensors[f"{kind}/{name}"] = x.cpu().contiguous()
        if RANK:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        self.model.select_adapter()
        tensors = load_file(path)
        self.skipped_steps = int(tensors.pop("skipped_steps"))
        states = defaultdict(dict)
        for key, x in tensors.items():
            kind, _, name = key.partition("/")
            states[name][kind] = x
        for i, name in enumerate(self.names):
            self.set_state(i, states[name])


@dataclass
class Models:
    actor: Learner
    critic: Learner | None  # None: critic-free, or a value head on the actor
    reference: LanguageModel | None  # None: nothing uses it
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_ids: set[int]
    generate: Callable


def build_critic(config: Config) -> LanguageModel:
    """The separate critic. A reward model keeps its score head as the value head; otherwise that is zero."""
    name = config.critic_model or config.model
    auto_class = AutoModel
    if "SequenceClassification" in str(read_model_config(name, config).architectures):
        auto_class = AutoModelForSequenceClassification
    lm = load_lm(name, auto_class, config)
    trunk = lm.base_model
    if config.lora_rank:
        add_adapters(trunk, ["critic"], config)
    critic = LanguageModel(trunk, 0, True, config, "critic" if config.lora_rank else None)
    if auto_class is AutoModelForSequenceClassification:
        head = getattr(lm, "score", None)
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise UsageError(f"critic_model {name} has no linear score head without a bias")
        critic.value_head.weight.data.copy_(head.weight)
    return critic


def build_models(tokenizer, config: Config) -> Models:
    """Policy, critic, reference and their optimizers, as the options say."""
    lm = load_lm(config.model, AutoModelForCausalLM, config)
    num_tokens = min(len(tokenizer), lm.get_output_embeddings().weight.shape[0])  # Qwen2.5 has 271 rows more
    has_own_critic = config.uses_critic and config.critic == "separate"
    shares_trunk = config.lora_rank is not None and config.critic_model is None  # critic and policy
    if config.lora_rank:
        names = ["policy"]
        if has_own_critic and shares_trunk:
            names.append("critic")
        add_adapters(lm, names, config)

    reference = None
    if config.kl_coef and config.reference != "previous":
        frozen = lm if config.lora_rank else copy.deepcopy(lm).requires_grad_(False)
        reference = LanguageModel(frozen, num_tokens, False, config)  # without an adapter
    if reference and config.zero_stage == 3:
        import deepspeed
        deepspeed.zero.Init(reference, dtype=lm.dtype, config_dict_or_path=deepspeed_config(config, lm.dtype))
    critic = None
    if has_own_critic:
        if shares_trunk:
            value_model = LanguageModel(lm, num_tokens, True, config, "critic")
        else:
            value_model = build_critic(config)
        critic = Learner(value_model, config.critic_lr, config.critic_lr, config)
    adapter = "policy" if config.lora_rank else None
    policy = LanguageModel(lm, num_tokens, config.uses_critic and config.critic == "shared", config, adapter)
    actor = Learner(policy, config.lr, config.critic_lr, config)
    generator = generate if config.rollout == "builtin" else load_function(config.rollout, "rollout")
    return Models(actor, critic, reference, tokenizer, find_stop_ids(lm, tokenizer), generator)


# ---- Rollout ---------------------------------------------------------------------------------------------


@dataclass
class Example:
    text: str  # what the user asks: the last user message
    answer: str  # ground truth; "" where the data set has none
    prompt: list[int]  # token ids, ending where the response begins
    messages: list[dict] = field(default_factory=list)  # the conversation so far, as a reward model reads it


@dataclass
class Rollout:
    """What one step collects. Tensors are [B, T]; what is outside the mask has no effect."""

    prompts: list[list[int]]
    responses: list[list[int]]  # up to and including the stop token
    mask: Tensor  # 1.0 on response tokens
    old_logprobs: Tensor  # of the policy before the update
    is_weights: Tensor | None = None  # importance weights, where log-probs were scored anew
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
        """These rows, cut to their longest response."""
        width = max(len(self.responses[i]) for i in rows)
        part = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                part[name] = x[rows, :width] if x.dim() == 2 else x[rows]
            elif x:  # a list that is filled in
                part[name] = [x[i] for i in rows]
        return Rollout(**part)


@torch.no_grad()
def decode(
    model: LanguageModel, prompts: list[list[int]], noise: Tensor | None, stop: Tensor, config: Config
) -> tuple[list[list[int]], list[Tensor]]:
    """Responses to a batch of prompts, up to and including their stop token, and their tokens' log-probs."""
    device = model.lm.device
    limit = config.max_response_length
    tokens = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts), limit, device=device)
    lengths = torch.full((len(prompts),), limit, device=device)
    # Prompts end in the same column, with padding before them
    padded = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = pad_sequence(padded, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(x) for x in padded], batch_first=True, padding_side="left")
    position = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(prompts), device=device)  # of the prompts whose responses have not ended
    cache = DynamicCache(config=model.lm.config)
    for t in range(limit):
        output = model.lm.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        logp = model.logits(output.last_hidden_state[:, -1], config.temperature).log_softmax(-1)
        if noise is None:
            token = logp.argmax(-1)
        else:  # where the random number falls in the cumulated distribution
            cumulated = logp.exp().cumsum(-1)
            point = noise[rows, t] * cumulated[:, -1]
            token = torch.searchsorted(cumulated, point[:, None], right=True)[:, 0]
            token = token.clamp(max=model.num_tokens - 1)  # NaN falls behind the end
        tokens[rows, t] = token
        logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
        ended = torch.isin(token, stop)
        lengths[rows[ended]] = t + 1
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # what has ended leaves the batch
            cache.batch_select_indices(going)
            rows = rows[going]
            token = token[going]
            mask = mask[going]
            position = position[going]
        ids = token[:, None]
        position = position[:, -1:] + 1
        mask = nn.functional.pad(mask, (0, 1), value=1)
    lengths = lengths.tolist()
    responses = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return responses, [row[:length] for row, length in zip(logprobs, lengths, strict=True)]


def generate(
    model: LanguageModel, prompts: list[list[int]], stop_ids: set[int], config: Config,
    generator: torch.Generator | None,
) -> tuple[list[list[int]], list[Tensor]]:
    """Responses and the log-probs of their tokens, rollout_slots at a time; greedy without a generator.

    Each token has a random number of its own, drawn beforehand: the order of the rows does not change what
    is sampled. Only our flags shape the sampling, not the model's generation_config.
    """
    device = model.lm.device
    noise = None
    if generator is not None:
        shape = (WORLD, len(prompts), config.max_response_length)  # a response's, on whatever rank it is
        noise = torch.rand(shape, generator=generator, device=device)[RANK]
    stop = torch.tensor(sorted(stop_ids), device=device)
    model.select_adapter()
    responses = [None] * len(prompts)
    logprobs = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), config.rollout_slots):
        rows = by_length[start : start + config.rollout_slots]
        batch_noise = None if noise is None else noise[rows]
        found, found_logprobs = decode(model, [prompts[i] for i in rows], batch_noise, stop, config)
        for i, response, logprob in zip(rows, found, found_logprobs, strict=True):
            responses[i] = response
            logprobs[i] = logprob
    return responses, logprobs


def response_states(x: Tensor, part: Rollout) -> Tensor:
    """[B, longest, ...] -> [N, ...]: the states in which the response tokens are chosen."""
    pieces = []
    for row, prompt, response in zip(x, part.prompts, part.responses, strict=True):
        start = len(prompt) - 1
        pieces.append(row[start : start + len(response)])
    return torch.cat(pieces)


def forward(
    model: LanguageModel, part: Rollout, config: Config, reference: LanguageModel | None = None,
    only_values: bool = False,
) -> dict[str, Tensor]:
    """Of each response token [B, T]: values, logprobs and entropy, as far as the model has them.

    With a reference also kl, the full KL to it. [N, V] never exists whole: the head works chunk by chunk, and
    in training its chunks, where there is more than one, are computed again in backward.
    """
    sequences = [prompt + response for prompt, response in zip(part.prompts, part.responses, strict=True)]
    lengths = [len(response) for response in part.responses]

    def as_rows(x: Tensor) -> Tensor:  # [N] -> [B, T]
        return pad_sequence(x.split(lengths), batch_first=True)

    def head(states: Tensor, targets: Tensor, ref_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = model.logits(states, config.temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        kl = torch.zeros_like(entropy)
        if reference:
            kl = full_kl(logp, reference.logits(ref_states, config.temperature))
        return logp.gather(1, targets[:, None])[:, 0], entropy, kl

    outputs = {}
    hidden = model.hidden(sequences)
    if model.value_head is not None:
        outputs["values"] = as_rows(response_states(model.values(hidden), part))
    if only_values or not model.has_logits:
        return outputs
    states = response_states(hidden, part)
    ref_states = states.detach()
    if reference:
        with torch.no_grad():
            ref_states = response_states(reference.hidden(sequences), part)
    targets = torch.tensor([token for response in part.responses for token in response], device=states.device)
    size = max(1, LOGITS_PER_CHUNK // model.num_tokens)
    if torch.is_grad_enabled() and len(states) > size:
        head = functools.partial(checkpoint, head, use_reentrant=False)
    chunks = zip(states.split(size), targets.split(size), ref_states.split(size), strict=True)
    results = [head(*chunk) for chunk in chunks]
    logprobs, entropy, kl = map(torch.cat, zip(*results, strict=True))
    outputs["logprobs"] = as_rows(logprobs)
    outputs["entropy"] = as_rows(entropy)
    if reference:
        outputs["kl"] = as_rows(kl)
    return outputs


def micro_batches(rows: list[int], rollout: Rollout, config: Config) -> Iterator[tuple[list[int], Rollout]]:
    """Groups of rows of similar length whose rectangle is within micro_batch_tokens, or one longer row."""
    lengths = {i: len(rollout.prompts[i]) + len(rollout.responses[i]) for i in rows}
    group = []
    for i in sorted(rows, key=lengths.get):
        is_full = (len(group) + 1) * lengths[i] > config.micro_batch_tokens
        if group and (is_full or lengths[i] > 1.25 * lengths[group[0]]):  # a fifth of a row may be padding
            yield group, rollout.take(group)
            group = []
        group.append(i)
    if group:
        yield group, rollout.take(group)


@torch.no_grad()
def score_tokens(
    model: LanguageModel, rollout: Rollout, config: Config, reference: LanguageModel | None = None,
    only_values: bool = False,
) -> dict[str, Tensor]:
    """What forward() returns, for a whole rollout, micro-batch by micro-batch."""
    results = defaultdict(lambda: torch.zeros_like(rollout.mask))
    with whole_weights(model, reference):
        for rows, part in micro_batches(list(range(len(rollout.mask))), rollout, config):
            for name, x in forward(model, part, config, reference, only_values).items():
                results[name][rows, : x.shape[1]] = x
    return results


@torch.no_grad()
def respond(
    models: Models, examples: list[Example], config: Config, generator: torch.Generator | None
) -> Rollout:
    """Responses to the examples, sampled or, without a generator, greedy; not scored yet."""
    policy = models.actor.model
    prompts = [example.prompt for example in examples]
    with whole_weights(policy):
        responses, logprobs = models.generate(policy, prompts, models.stop_ids, config, generator)
    if config.rollout != "builtin":
        responses = check_responses(responses, logprobs, len(prompts), policy.num_tokens, config)
    logprobs = [torch.as_tensor(x, dtype=torch.float32, device=policy.lm.device) for x in logprobs]
    mask = pad_sequence([torch.ones_like(x) for x in logprobs], batch_first=True)
    logprobs = pad_sequence(logprobs, batch_first=True)
    stopped = torch.tensor([response[-1] in models.stop_ids for response in responses], device=mask.device)
    texts = models.tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollout(prompts, responses, mask, logprobs, stopped=stopped, examples=examples, texts=texts)


def measure_kl(models: Models, rollout: Rollout, config: Config) -> None:
    """Fills in ref_logprobs and kl, for the estimator in use."""
    rollout.kl = torch.zeros_like(rollout.mask)
    if not config.kl_coef:
        return
    rollout.ref_logprobs = rollout.old_logprobs  # reference previous
    if models.reference is not None:
        rollout.ref_logprobs = score_tokens(models.reference, rollout, config)["logprobs"]
    if config.reference == "mixed":  # log((1 - w) pi_init + w pi_previous), token by token
        w = torch.tensor(config.reference_mix, device=rollout.mask.device)
        mixed = torch.logaddexp(rollout.ref_logprobs + (1 - w).log(), rollout.old_logprobs + w.log())
        rollout.ref_logprobs = mixed.masked_fill(rollout.mask == 0, 0.0)
    if config.kl_kind == "full":
        rollout.kl = score_tokens(models.actor.model, rollout, config, models.reference)["kl"]
    else:
        rollout.kl = estimate_kl(rollout.old_logprobs, rollout.ref_logprobs, config.kl_kind)


def score_anew(models: Models, rollout: Rollout, config: Config) -> dict[str, Tensor]:
    """Computes old_logprobs with forward(): the sampler's are a hook's, or rounded otherwise in bf16.

    Fills in old_logprobs and, with a rollout_is_cap, is_weights. Returns how far they are from the sampler's.
    """
    mask = rollout.mask
    sampled = rollout.old_logprobs
    rollout.old_logprobs = score_tokens(models.actor.model, rollout, config)["logprobs"]
    gap = masked_mean((rollout.old_logprobs.exp() - sampled.exp()).abs(), mask)
    if config.rollout_is_cap is None:
        return {"rollout/logprob_gap": gap}
    weights = importance_weights(rollout.old_logprobs, sampled, mask, config.rollout_is_cap)
    rollout.is_weights = weights
    return {
        "rollout/logprob_gap": gap,
        "rollout/is_weight_mean": masked_mean(weights, mask),
        "rollout/is_weight_max": max_over_ranks((weights * mask).max()),
        "rollout/is_capped": masked_mean((weights >= config.rollout_is_cap).float(), mask),
    }


def assign_credit(models: Models, rollout: Rollout, kl_coef: float, config: Config) -> None:
    """Fills in old_values, kl, rewards, advantages and returns: what the update learns from."""
    if config.uses_critic:
        value_model = (models.critic or models.actor).model
        rollout.old_values = score_tokens(value_model, rollout, config, only_values=True)["values"]
    measure_kl(models, rollout, config)
    check_finite(rollout)
    scores = rollout.scores
    if config.missing_eos_penalty is not None:
        scores = torch.where(rollout.stopped, scores, scores - config.missing_eos_penalty)
    discount = 0.0  # terminal
    if config.reward_attribution == "uniform":
        discount = 1.0
    elif config.reward_attribution == "discounted":
        discount = config.attribution_discount
    reward_coef = kl_coef if config.kl_in_reward else 0.0
    rollout.rewards = compute_rewards(scores, rollout.kl, rollout.mask, reward_coef, discount)
    rollout.advantages, rollout.returns = compute_advantages(
        rollout.rewards, rollout.old_values, rollout.mask, config)


@torch.no_grad()
def collect_rollout(
    models: Models, reward: Callable, examples: list[Example], step: int, kl_coef: float, config: Config
) -> tuple[Rollout, dict]:
    """Samples and scores responses, and assigns credit to their tokens: the rollout and its metrics."""
    clock = clock_now()
    policy = models.actor.model
    rollout = respond(models, examples, config, seeded(policy.lm.device, config.seed, "sampling", step))
    mask = rollout.mask
    metrics = {"time/rollout": clock_now() - clock}
    scores, measured = score_responses(reward, examples, rollout.texts)
    rollout.scores = scores.to(mask.device)
    for name, x in measured.items():
        metrics[f"reward/{name}"] = x
    if policy.lm.dtype != torch.float32 or config.rollout != "builtin":
        metrics |= score_anew(models, rollout, config)
    assign_credit(models, rollout, kl_coef, config)
    rollout.ratio = mask.clone()
    rollout.clipped = torch.zeros_like(mask)

    lengths = mask.sum(1)
    everyone = torch.ones_like(lengths)
    if config.kl_coef:
        metrics["reward/kl"] = masked_mean(rollout.kl.sum(1) / lengths, everyone)
        metrics["reward/kl_sequence"] = masked_mean(rollout.kl.sum(1), everyone)
        metrics["reward/kl_coef"] = kl_coef
    if config.uses_critic:
        metrics["value/explained_variance"] = explained_variance(rollout.old_values, rollout.returns, mask)
    mean_score = masked_mean(rollout.scores, everyone)
    metrics["reward/score"] = mean_score
    metrics["reward/score_std"] = masked_mean((rollout.scores - mean_score).square(), everyone).sqrt()
    metrics["rollout/eos_rate"] = masked_mean(rollout.stopped.float(), everyone)
    metrics["rollout/response_length"] = masked_mean(lengths, everyone)
    metrics["rollout/tokens"] = sum_over_ranks(mask.sum() + sum(map(len, rollout.prompts)))
    metrics["time/score"] = clock_now() - clock - metrics["time/rollout"]
    return rollout, metrics


# ---- Update ----------------------------------------------------------------------------------------------


def ppo_loss(role: str, models: Models, part: Rollout, kl_coef: float, config: Config) -> tuple[Tensor, dict]:
    """The loss of each token of a micro-batch, [B, T], and what to log of each.

    The policy's terms for the "actor", the value loss for the "critic", both with a shared critic. To change
    PPO's loss, change it here: it is differentiated as it stands.
    """
    model = getattr(models, role).model
    uses_kl = role == "actor" and config.use_kl_loss and config.kl_coef > 0
    reference = models.reference if uses_kl and config.kl_kind == "full" else None
    outputs = forward(model, part, config, reference)
    loss = 0.0
    logged = {}
    if "values" in outputs:
        value_loss, value_clipped = clipped_value_loss(
            outputs["values"], part.old_values, part.returns, config.cliprange_value)
        loss = value_loss if role == "critic" else config.vf_coef * value_loss
        logged["value/loss"] = value_loss
        logged["value/clipfrac"] = value_clipped
    if role == "critic":
        return loss, logged

    logprobs = outputs["logprobs"]
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    policy_loss, ratio, clipped, bounded = clipped_policy_loss(
        logprobs, part.old_logprobs, part.advantages, low, high, config.clip_ratio_c)
    if part.is_weights is not None:
        policy_loss = policy_loss * part.is_weights
    loss = loss + policy_loss - config.entropy_coeff * outputs["entropy"]
    if uses_kl:
        kl = outputs["kl"] if reference else estimate_kl(logprobs, part.ref_logprobs, config.kl_kind)
        loss = loss + kl_coef * kl
    logged["policy/loss"] = policy_loss
    logged["policy/entropy"] = outputs["entropy"]
    logged["policy/ratio"] = ratio
    logged["policy/clipfrac"] = clipped
    logged["policy/clipfrac_lower"] = bounded
    logged["policy/approx_kl"] = estimate_kl(part.old_logprobs, logprobs, "k3")
    return loss, logged


def train_mini_batch(
    role: str, models: Models, rollout: Rollout, batch: list[int], lr_factor: float, kl_coef: float,
    config: Config,
) -> dict[str, float]:
    """One optimizer step on the summed gradients of the micro-batches, or none: see early_stop_kl.

    Returns "tokens", "stopped", "grad_norm", and what ppo_loss logs: names that end in /loss with the
    weights of the loss, anything else as the mean over tokens.
    """
    learner = getattr(models, role)
    mask = rollout.mask
    tokens = sum_over_ranks(mask[batch].sum())
    scale = config.loss_scale_factor or config.max_response_length
    weights = torch.zeros_like(mask)
    weights[batch] = loss_weights(mask[batch], config.loss_agg_mode, scale)
    sums = defaultdict(float)
    with whole_weights(learner.model, models.reference if config.kl_kind == "full" else None):
        for rows, part in in_step(micro_batches(batch, rollout, config), rollout):
            width = part.mask.shape[1]
            loss, logged = ppo_loss(role, models, part, kl_coef, config)
            learner.backward((loss * weights[rows, :width]).sum())
            for name, x in logged.items():
                share = weights[rows, :width] if name.endswith("/loss") else part.mask / tokens
                sums[name] += (x.detach() * share).sum()
            if role == "actor":
                rollout.ratio[rows, :width] = logged["policy/ratio"] * part.mask
                rollout.clipped[rows, :width] = logged["policy/clipfrac"] * part.mask
    totals = sum_over_ranks(torch.stack(list(sums.values()))).tolist()
    metrics = dict(zip(sums, totals, strict=True))
    metrics["tokens"] = tokens.item()
    metrics["grad_norm"] = learner.clip_gradient()
    stop_kl = config.early_stop_kl or math.inf
    metrics["stopped"] = metrics.get("policy/approx_kl", 0.0) > stop_kl
    if metrics["stopped"]:
        learner.drop_gradient()
    else:
        learner.step(lr_factor, metrics["grad_norm"])
    return metrics


def average(history: list[dict[str, float]]) -> dict[str, float]:
    """Means: of a loss over the mini-batches, of anything else over their tokens."""
    means = {}
    tokens = sum(metrics["tokens"] for metrics in history)
    for name in history[0]:
        if name.endswith("/loss"):
            means[name] = sum(metrics[name] for metrics in history) / len(history)
        elif "/" in name and name != "policy/ratio":  # update logs it as ratio_first
            means[name] = sum(metrics[name] * metrics["tokens"] for metrics in history) / tokens
    return means


def update(
    role: str, models: Models, rollout: Rollout, step: int, total: int, kl_coef: float, config: Config
) -> dict[str, float]:
    """The epochs of the "actor" (and a shared critic) or of the "critic", each a fresh permutation: metrics.

    With critic_early_stop a tenth of the rollout is held out: epochs end when the loss there stops falling.
    """
    clock = clock_now()
    learner = getattr(models, role)
    rows = list(range(config.rollout_size))
    held_out = []
    epochs = config.ppo_epochs
    size = config.ppo_mini_batch_size
    schedule_start = config.critic_warmup  # the actor's learning rate starts when the actor does
    if role == "critic":
        epochs = config.critic_ppo_epochs or epochs
        size = config.critic_ppo_mini_batch_size or size
        schedule_start = 0
        if config.critic_early_stop:
            held_out = rows[::10]
            rows = [i for i in rows if i % 10 != 0]
    updates = epochs * math.ceil(len(rows) / size)
    history = []
    best_loss = math.inf
    for epoch in range(epochs):
        for batch in shuffled_batches(rows, size, step, epoch, config):
            progress = step - schedule_start + len(history) / updates
            lr_factor = learning_rate_factor(
                progress, updates, total - schedule_start, config.warmup_steps, config.lr_schedule)
            history.append(train_mini_batch(role, models, rollout, batch, lr_factor, kl_coef, config))
            if role == "actor" and len(history) == 1:  # ratios from before the first optimizer step
                first_ratio = 1 + largest_gap(rollout, batch)
            if history[-1]["stopped"]:
                break
        if history[-1]["stopped"]:
            break
        if held_out:
            loss = held_out_loss(learner.model, rollout, held_out, config)
            if loss >= best_loss:
                break
            best_loss = loss
    prefix = "optim/" if role == "actor" else "optim/critic_"
    metrics = average(history)
    metrics[f"{prefix}lr"] = lr_factor * learner.base_lr
    metrics[f"{prefix}grad_norm"] = history[0]["grad_norm"]  # of the first mini-batch
    metrics["optim/skipped_steps"] = sum(x.skipped_steps for x in (models.actor, models.critic) if x)
    if role == "actor":
        metrics["policy/ratio_first"] = first_ratio
    metrics[f"time/update_{role}"] = clock_now() - clock
    return metrics


def shuffled_batches(
    rows: list[int], size: int, step: int, epoch: int, config: Config
) -> Iterator[list[int]]:
    """Mini-batches of the rows in an order that depends on the seed, the step and the epoch only."""
    order = torch.randperm(len(rows), generator=seeded("cpu", config.seed, "shuffle", step, epoch)).tolist()
    for start in range(0, len(rows), size):
        yield own_rows([rows[i] for i in order[start : start + size]], config)


def largest_gap(rollout: Rollout, batch: list[int]) -> float:
    """The largest distance of a ratio from 1 in a mini-batch."""
    gaps = (rollout.ratio[batch] - 1).abs() * rollout.mask[batch]
    return max_over_ranks(gaps.max() if batch else torch.tensor(0.0)).item()


def held_out_loss(critic: LanguageModel, rollout: Rollout, rows: list[int], config: Config) -> float:
    """The critic's loss on rows that it does not learn from, the mean over their tokens."""
    part = rollout.take(own_rows(rows, config))
    values = score_tokens(critic, part, config, only_values=True)["values"]
    loss, _ = clipped_value_loss(values, part.old_values, part.returns, config.cliprange_value)
    return masked_mean(loss, part.mask).item()


# ---- Main ------------------------------------------------------------------------------------------------


def prompt_order(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which examples a step uses: in every epoch a fresh permutation, without its incomplete last batch."""
    epoch, batch = divmod(step, num_examples // batch_size)
    order = torch.randperm(num_examples, generator=seeded("cpu", seed, "prompts", epoch)).tolist()
    return order[batch * batch_size : (batch + 1) * batch_size]


def main(config: Config) -> None:
    check_config(config)
    start_ranks(config)
    tokenizer = one_rank_first(load_tokenizer, config)
    examples, evals = one_rank_first(load_examples, tokenizer, config)
    if 0 < len(evals) < WORLD:
        raise UsageError(f"{len(evals)} evaluation rows are fewer than {WORLD} ranks")
    reward = load_reward(config)
    total = config.total_steps
    if total is None:
        total = config.total_epochs * (len(examples) // config.train_batch_size)
    with Run(config, total) as run:
        run.print_plan(tokenizer, examples, evals)
        models = build_models(tokenizer, config)
        evals = evals[RANK::WORLD]
        kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_ctrl_horizon)
        start = 0
        if run.checkpoint:
            start, kl_controller.coef = load_checkpoint(run, models)
        run.begin(start)
        for step in run.progress_bar(start):
            kl_coef = kl_controller.coef
            run.evaluate_if_due(step, models, reward, evals, kl_coef)
            clock = clock_now()
            order = prompt_order(len(examples), config.train_batch_size, step, config.seed)
            order = order[RANK * len(order) // WORLD : (RANK + 1) * len(order) // WORLD]
            batch = []
            for i in order:
                batch += [examples[i]] * config.rollout_n
            with run.saving_on_error(step, models, kl_coef):
                rollout, metrics = collect_rollout(models, reward, batch, step, kl_coef, config)
            if models.critic:
                metrics |= update("critic", models, rollout, step, total, kl_coef, config)
            if step >= config.critic_warmup:
                metrics |= update("actor", models, rollout, step, total, kl_coef, config)
                kl_controller.update(float(metrics.get(config.kl_metric, 0.0)), config.rollout_size)
            run.log_step(step + 1, metrics, rollout, models, clock_now() - clock)
            stopping = run.is_stopping()
            if stopping or run.is_save_due(step + 1):
                save_checkpoint(run, step + 1, models, kl_controller.coef)
            if stopping:
                run.stop(step + 1)
        run.evaluate_if_due(max(start, total), models, reward, evals, kl_controller.coef)
        if total > 0:
            export_models(run.folder, models, config)


# ==========================================================================================================
# The algorithm ends here. What follows is what every training script needs: checks, data, rewards, logs.
# ==========================================================================================================


# ---- Checks ----------------------------------------------------------------------------------------------


def warn(sentence: str) -> None:
    if RANK:
        return
    print(f"warning: {printable(sentence)}", file=sys.stderr)


def seeded(device: torch.device | str, *parts) -> torch.Generator:
    """A generator that depends on nothing but its arguments, such as (seed, "sampling", step)."""
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return torch.Generator(device).manual_seed(int(digest[:14], 16))


def clock_now() -> float:
    """Seconds, when the device has done what it was given: a phase is charged for its own work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


AT_MOST_1 = "reference_mix gamma lam lam_critic attribution_discount".split()
POSITIVE = """train_batch_size rollout_n max_prompt_length max_response_length temperature rollout_slots
    rollout_is_cap ppo_epochs ppo_mini_batch_size critic_ppo_epochs critic_ppo_mini_batch_size
    micro_batch_tokens lora_rank lora_alpha kl_ctrl_target kl_ctrl_horizon cliprange_value grad_clip
    loss_scale_factor early_stop_kl eval_size save_total_limit total_epochs""".split()


def check_config(c: Config) -> None:
    """Refuses what cannot work, before anything is loaded. Raises UsageError."""
    for name, x in vars(c).items():
        if isinstance(x, float) and not math.isfinite(x):
            raise UsageError(f"{name} cannot be {x}")
        if type(x) in (int, float) and name not in ("seed", "missing_eos_penalty", "entropy_coeff"):
            if x < 0 or (x == 0 and name in POSITIVE) or (x > 1 and name in AT_MOST_1):
                raise UsageError(f"{name} cannot be {x}")
    has_own_critic = c.uses_critic and c.critic == "separate"
    critic_flags = [c.critic_model, c.critic_ppo_epochs, c.critic_ppo_mini_batch_size, c.critic_warmup,
                    c.critic_early_stop]
    adaptive = c.kl_ctrl_type == "adaptive"
    mini_batch_sizes = [c.ppo_mini_batch_size, c.critic_ppo_mini_batch_size or 1]
    for is_wrong, sentence in (
        (c.device.startswith("cuda") and not torch.cuda.is_available(), f"device {c.device}: no CUDA here"),
        (not re.fullmatch(r"auto|cpu|(mps|cuda)(:\d+)?", c.device), f"there is no device {c.device}"),
        (c.clip_ratio_c is not None and c.clip_ratio_c <= 1, "clip_ratio_c must exceed 1"),
        (c.use_kl_in_reward and c.use_kl_loss, "use_kl_in_reward or use_kl_loss: choose one"),
        (c.reference == "previous" and (adaptive or not c.use_kl_loss),
         "reference previous needs use_kl_loss and kl_ctrl_type fixed: its KL is 0 until the update begins"),
        (c.kl_kind == "full" and c.reference != "init", "the full KL works with reference init only"),
        (adaptive and c.kl_coef == 0, "kl_ctrl_type adaptive needs a KL whose coefficient is not 0"),
        (adaptive and 0.2 * c.rollout_size >= c.kl_ctrl_horizon, "kl_ctrl_horizon must exceed a fifth of the"
         f" {c.rollout_size} responses of a step: the coefficient would fall below 0"),
        (any(critic_flags) and not has_own_critic,
         f"with critic {c.critic} and adv_estimator {c.adv_estimator} no critic has an optimizer of its own:"
         " of the critic_* flags at most critic_lr applies"),
        (c.critic_early_stop and ((c.critic_ppo_epochs or c.ppo_epochs) < 2 or c.rollout_size < 10),
         "critic_early_stop needs 2 epochs of the critic and 10 responses"),
        (not c.lora_rank and (c.lora_alpha or c.lora_target != "all-linear"), "lora_* flags need lora_rank"),
        (c.adv_estimator not in ("gae", "reinforce_plus_plus") and c.rollout_n < 2,
         f"adv_estimator {c.adv_estimator} compares responses to a prompt: rollout_n must be 2 or more"),
        (any(c.rollout_size % size for size in mini_batch_sizes),
         f"train_batch_size * rollout_n = {c.rollout_size} responses must divide into mini-batches:"
         f" {fitting_sizes(c.train_batch_size, c)}"),
        (c.train_batch_size % WORLD, f"train_batch_size = {c.train_batch_size} must divide by {WORLD}"),
        (":" in c.device, "device: every rank takes the GPU of its own number, so give cuda or cpu"),
        (c.critic_early_stop and c.rollout_size < 10 * WORLD, "critic_early_stop: 10 responses per rank"),
        (c.offload == "optimizer" and c.zero_stage == 0, "offload optimizer needs zero_stage 2 or 3"),
        (c.offload == "all" and c.zero_stage < 3, "offload all needs zero_stage 3"),
    ):
        if is_wrong:
            raise UsageError(sentence)
    warn_of_settings(c)


def fitting_sizes(num_prompts: int, config: Config) -> str:
    """Flags whose sizes fit so many prompts, with at least as many optimizer steps per epoch as now."""
    prompts = max(WORLD, min(num_prompts, config.train_batch_size) // WORLD * WORLD)
    responses = prompts * config.rollout_n
    wanted = max(1, responses * config.ppo_mini_batch_size // config.rollout_size)
    size = max(d for d in range(1, wanted + 1) if responses % d == 0)
    flags = f"use --train_batch_size {prompts} --ppo_mini_batch_size {size}"
    if config.critic_ppo_mini_batch_size:
        flags += f" --critic_ppo_mini_batch_size {size}"
    return flags


def warn_of_settings(c: Config) -> None:
    """Says what is allowed, but does not do what one would expect."""
    if c.kl_coef and c.kl_in_reward and c.kl_kind != "k1":
        warn(f"kl_penalty {c.kl_kind}: in the reward only k1 gives the gradient of KL(policy, reference)")
    if c.kl_coef and c.use_kl_loss and c.kl_kind in ("k1", "abs", "k3"):
        warn(f"kl_loss_type {c.kl_kind} lacks the gradient of KL(policy, reference); k2, full and + have it")
    usual = DEMO if c.model == DEMO.model else Config()
    idle = []
    for has_no_effect, names in (
        (not c.uses_critic, "lam lam_critic critic critic_lr cliprange_value value_pooling"),
        (not c.uses_critic or c.critic == "separate", "vf_coef"),
        (c.adv_estimator not in ("gae", "reinforce_plus_plus"), "gamma"),
        (c.adv_estimator != "grpo", "norm_adv_by_std"),
        (c.kl_ctrl_type == "fixed", "kl_ctrl_target kl_ctrl_horizon kl_ctrl_unit"),
        (not c.kl_in_reward, "kl_penalty kl_ctrl_coef"),
        (not c.use_kl_loss, "kl_loss_coef kl_loss_type"),
        (c.reference != "mixed", "reference_mix"),
        (c.reward_attribution != "discounted", "attribution_discount"),
        (c.loss_agg_mode != "seq-mean-token-sum-norm", "loss_scale_factor"),
        (c.total_steps is not None, "total_epochs"),
        (c.eval_every == 0, "eval_size eval_dataset"),
    ):
        if has_no_effect:
            idle += [name for name in names.split() if getattr(c, name) != getattr(usual, name)]
    if idle:
        warn(f"without effect beside the other options: {', '.join(idle)} (docs/choosing.md says why)")


def check_finite(rollout: Rollout) -> None:
    """Raises Diverged, on all ranks, if a log-prob or a value is not finite."""
    for name in ("old_logprobs", "ref_logprobs", "old_values"):
        x = getattr(rollout, name)
        if x is not None and sum_over_ranks((~torch.isfinite(x)).sum()) > 0:
            raise Diverged(f"{name} are not finite: the weights have diverged (lower lr and critic_lr)")


def check_health(metrics: dict, step: int, said: set[str]) -> None:
    """Says once, with its likely cause, what the numbers of a step show to be wrong."""
    m = defaultdict(lambda: math.nan, metrics)  # comparisons with NaN are false: what is missing is not wrong
    ratio_gap = 0.0 if "rollout/logprob_gap" in metrics else abs(m["policy/ratio_first"] - 1)
    for is_wrong, sentence in (
        (ratio_gap > 1e-4, "the first ratio is not 1: sampling and training disagree"),
        (m["rollout/logprob_gap"] > 3e-2, "sampled and scored probabilities are over 0.03 apart in the"
         " mean: the rollout is not of the policy that is trained"),
        (step == 0 and abs(m["reward/kl"]) > 1e-2, "the first KL is not 0: the reference is another policy"),
        (step == 4 and m["reward/score_std"] < 1e-6, "all responses have the same score: nothing is learned"),
        (m["reward/kl"] < -0.05, "the KL is negative: log-probs are not those of the sampler"),
        (m["reward/kl"] > 1, "the KL passes 1 per token: its coefficient is too low, or the optimizer's noise"
         " drives it (lower lr, or a larger batch)"),
        (m["rollout/eos_rate"] < 0.05, "hardly a response ends by itself: max_response_length is too short,"
         " the stop tokens are wrong, or the task has a fixed length and all is well"),
        (m["policy/entropy"] < 1e-3, "the entropy has collapsed: lower lr, raise entropy_coeff or the KL's"),
        (m["policy/clipfrac"] > 0.3, "over 30 % of the tokens are clipped: lower lr or ppo_epochs"),
        (m["value/explained_variance"] < -1 and m["value/loss"] > 0.1, "the critic is far worse than a"
         " constant: lower critic_lr, or begin with critic_warmup"),
        (m["value/loss"] > 100 + 100 * m["reward/score_std"] ** 2, "the values have left the range of the"
         " scores: lower critic_lr"),
    ):
        if is_wrong and sentence not in said:
            said.add(sentence)
            warn(f"step {step + 1}: {sentence}")


# ---- Ranks: processes with the same text and weights, and prompts and responses of their own -------------


def start_ranks(config: Config) -> None:
    """Joins the processes that the launcher has started; without a launcher there is one."""
    gpu = config.device != "cpu" and torch.cuda.is_available()
    solo = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({**solo, **os.environ, "DS_ACCELERATOR": "cuda" if gpu else "cpu"})
    import deepspeed
    deepspeed.utils.logger.setLevel("WARNING")
    all_reduce.patience = config.dist_timeout
    if gpu:
        torch.cuda.set_device(LOCAL_RANK)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of DeepSpeed, at every collective
    deepspeed.init_distributed("nccl" if gpu else "gloo", timeout=timedelta(seconds=config.dist_timeout))
    all_reduce(torch.zeros(1), dist.ReduceOp.SUM)  # from here on a rank that is stuck ends


def all_reduce(x: Tensor, operation) -> Tensor:
    faulthandler.dump_traceback_later(2 * all_reduce.patience, exit=True)  # a rank that is stuck shows where
    total = x.detach().clone().to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total, operation)
    return total.to(x.device)


def one_rank_first(function: Callable, *arguments, **options):
    """What function returns; one rank of a machine runs it first, the others find its downloads."""
    results = [function(*arguments, **options)] if LOCAL_RANK == 0 else []
    dist.barrier()
    return results[0] if results else function(*arguments, **options)


def from_rank_0(function: Callable, *arguments):
    """What function returns on rank 0, which alone runs it."""
    results = [function(*arguments) if RANK == 0 else None]
    dist.broadcast_object_list(results)
    return results[0]


def own_rows(rows: list[int], config: Config) -> list[int]:
    """Those of these rows of all ranks that are this rank's, by their numbers in its rollout."""
    size = config.rollout_size // WORLD
    return [i % size for i in rows if i // size == RANK]


def in_step(passes: Iterator, rollout: Rollout) -> list:
    """The passes, and as many without weight as another rank has more: each backward adds up all ranks'."""
    passes = list(passes)
    nothing = rollout.take([0])
    for name, x in vars(nothing).items():
        if isinstance(x, Tensor):
            setattr(nothing, name, torch.zeros_like(x))
    most = int(max_over_ranks(torch.tensor(len(passes))))
    return passes + [([], nothing)] * (most - len(passes))


def deepspeed_config(config: Config, dtype: torch.dtype) -> dict:
    """From our flags; entries of the file ds_config replace those for which there is no flag."""
    given = json.loads(Path(config.ds_config).read_text()) if config.ds_config else {}
    zero = {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    on_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload != "none":
        zero["offload_optimizer"] = on_cpu
    if config.offload == "all":
        zero["offload_param"] = on_cpu
    zero = {**zero, **given.get("zero_optimization", {}), "stage": config.zero_stage}
    return {"communication_data_type": "fp32", "zero_force_ds_cpu_optimizer": False, **given,
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": config.grad_clip,
            "zero_optimization": zero, "bf16": {"enabled": dtype == torch.bfloat16},
            "managed_gradient_accumulation": False,  # many backward, one step: else ZeRO-2 keeps the last
            "data_types": {"grad_accum_dtype": "fp32"}}


# ---- Loading models --------------------------------------------------------------------------------------


def read_model_config(name: str, config: Config):
    """The configuration of a model. Raises UsageError if it cannot do what is asked of it."""
    if Path(name, "adapter_config.json").is_file():
        raise UsageError(f"{name} is a LoRA adapter: merge it first (docs/reward_models.md has the command)")
    try:
        lm_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if name == DEMO.model:
            reason = "the bundled demo is not beside this script: give --model"
        raise UsageError(f"model {name}: {reason}") from error
    if lm_config.is_encoder_decoder:
        raise UsageError(f"{name} is an encoder-decoder model: only decoders are supported")
    if "SequenceClassification" in str(lm_config.architectures) and lm_config.num_labels != 1:
        raise UsageError(f"{name} has {lm_config.num_labels} outputs, a reward model has one")
    return lm_config


def check_sizes(name: str, config: Config) -> int:
    """How many tokens a model knows. Raises UsageError if its positions are too few for prompt + response."""
    lm_config = read_model_config(name, config).get_text_config()
    length = config.max_prompt_length + config.max_response_length
    limit = getattr(lm_config, "max_position_embeddings", None) or length
    ropes = getattr(lm_config, "rope_parameters", None) or {}
    for rope in [ropes, *ropes.values()]:  # they change for all rows of a pass when one row is longer
        if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic"):
            limit = rope.get("original_max_position_embeddings") or limit
    if length > limit:
        raise UsageError(f"max_prompt_length + max_response_length = {length} tokens, but {name} has"
                         f" positions for {limit} that do not depend on the other rows of a pass")
    return lm_config.vocab_size


def load_tokenizer(config: Config):
    """Also finds what is wrong with the models before their weights are loaded. Raises UsageError."""
    transformers.utils.logging.set_verbosity_error()  # its notes on unused heads and shards
    transformers.utils.logging.disable_progress_bar()
    known = check_sizes(config.model, config)
    known_by_critic = check_sizes(config.critic_model or config.model, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"tokenizer of {config.model}: {str(error).splitlines()[0]}") from error
    if known_by_critic < min(known, len(tokenizer)):
        raise UsageError(f"critic_model knows {known_by_critic} tokens, the policy {known}")
    return tokenizer


def load_lm(name: str, auto_class: type, config: Config) -> nn.Module:
    """A pretrained model in eval mode. Raises UsageError if it cannot be loaded or a weight is not finite."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    options = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    try:
        lm = one_rank_first(auto_class.from_pretrained, name, **options).to(device).eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name}: {str(error).splitlines()[0]}") from error
    if getattr(lm, "_is_stateful", False):
        raise UsageError(f"{name} is a state-space model: only those with an ordinary KV cache are supported")
    for key, weight in lm.named_parameters():
        if not torch.isfinite(weight).all():
            raise UsageError(f"{name}: weight {key} is not finite")
    if config.gradient_checkpointing:  # not transformers' own, which needs train mode
        for layer in lm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return lm


def add_adapters(lm: nn.Module, names: list[str], config: Config) -> None:
    """LoRA (arXiv:2106.09685): beside a target layer W x, alpha / rank * B (A x) with B = 0 at the start."""
    from peft import LoraConfig

    torch.manual_seed(config.seed)  # peft initialises A from the global generator
    alpha = config.lora_alpha or 2 * config.lora_rank
    targets = "all-linear"
    if config.lora_target not in ("all", "all-linear"):
        targets = [target.strip() for target in config.lora_target.split(",")]
        for target in targets:
            layers = [layer for name, layer in lm.named_modules() if f".{name}".endswith(f".{target}")]
            if not target or not layers or lm.get_output_embeddings() in layers:
                raise UsageError(f"lora_target {target!r}: no layer has this name, or it is the output head")
    lora = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    for name in names:
        with warnings.catch_warnings(action="ignore"):  # peft's, that there are two of them
            lm.add_adapter(lora, name)
    lm.selected_adapter = names[-1]


def find_stop_ids(lm: nn.Module, tokenizer) -> set[int]:
    """Where responses end: eos, those of generation_config, and what the chat template puts after a turn."""
    eos = lm.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Reply"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Reply")[2]
        ids = tokenizer(tail.strip(), add_special_tokens=False).input_ids
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            stop_ids.add(ids[0])
    tokens = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    print(f"stop tokens: {tokens}")
    return stop_ids


# ---- Data ------------------------------------------------------------------------------------------------


def read_rows(source: str, split: str) -> list[dict]:
    """Rows of a local file, the demo, or a Hub data set NAME[:CONFIG[:SPLIT]]. Raises UsageError."""
    path = HERE / "assets" / "demo" / f"{split}.jsonl" if source == "demo" else Path(source)
    datasets.disable_progress_bars()
    try:
        if re.search(r"\.jsonl?(\.gz)?$", path.name):
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8-sig") as file:
                rows = read_json(file.read())
        elif re.search(r"\.csv(\.gz)?$", path.name):  # text as it stands in the file
            with warnings.catch_warnings(action="error"):  # pandas only warns when it cuts long rows
                table = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
            rows = table.to_dict("records")
        elif path.suffix == ".parquet":
            rows = datasets.Dataset.from_parquet(source).to_list()
        elif path.is_dir():
            saved = datasets.load_from_disk(source)
            if isinstance(saved, dict) and split not in saved:
                raise ValueError(f"there is no split {split}; there are {', '.join(saved)}")
            rows = (saved[split] if isinstance(saved, dict) else saved).to_list()
        else:
            name, part, named_split = f"{source}::".split(":", 2)
            part = part or ("main" if name.endswith("gsm8k") else None)
            rows = datasets.load_dataset(name, part, split=named_split.rstrip(":") or split).to_list()
    except Exception as error:  # whatever the reader says, the user can only mend the source
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(f"{source}: {reason} (json, jsonl and csv in UTF-8, also .gz, parquet, a folder of"
                         " save_to_disk and names of the Hub can be read)") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{source}: {'rows must be objects' if rows else 'no rows'}")
    return rows


def read_json(text: str) -> list:
    """One JSON array, or one object per line; numbers stay the text that stands in the file."""
    read = functools.partial(json.loads, parse_int=str, parse_float=str, parse_constant=str)
    if text.lstrip().startswith("["):
        return read(text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(read(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def read_messages(value) -> list[dict]:
    """Turns of role and content, from text, OpenAI's parts or ShareGPT's from/value. Raises ValueError."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("there is no text and no list of turns")
    messages = []
    for turn in value:
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") or turn.get("value")
        if isinstance(content, list):
            if any(part["type"] != "text" for part in content):
                raise ValueError("a part of a turn is not text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not content.strip() or not role or turn.get("tool_calls"):
            raise ValueError("a turn has no text or no role, or calls tools")
        role = {"human": "user", "gpt": "assistant"}.get(role, role)  # ShareGPT's names
        messages.append({"role": role, "content": content})
    if all(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no turn to answer")
    return messages


def read_answer(value) -> str:
    """The ground truth as text; "" where there is none. Raises ValueError."""
    if isinstance(value, dict) and "ground_truth" in value:  # verl's reward_model
        value = value["ground_truth"]
    if isinstance(value, (list, dict, bytes)):
        raise ValueError(f"the answer is a {type(value).__name__}, not text or a number")
    if isinstance(value, bool):
        return str(value).lower()
    return "" if pandas.isna(value) else str(value)


def render(messages: list[dict], tokenizer, is_prompt: bool) -> list[int]:
    """Token ids of a conversation: up to where the assistant begins to speak, or (no prompt) as it is."""
    if tokenizer.chat_template:  # it writes what special tokens there are: no second BOS
        return tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt, return_dict=False)
    ids = tokenizer("\n".join(message["content"] for message in messages)).input_ids
    eos = tokenizer.eos_token_id
    if ids[-1:] == [eos]:  # a prompt has not ended
        ids = ids[:-1]
    return ids if is_prompt or eos is None else [*ids, eos]


def make_example(
    row: dict, prompt_column: str, answer_column: str | None, tokenizer, config: Config
) -> Example:
    """Raises ValueError, or what the tokenizer and its template raise, if the row cannot be used."""
    value = row.get(prompt_column)
    if isinstance(value, str):
        if prompt_column == "question" and config.reward == "gsm8k":
            value = f"{value} {GSM8K_INSTRUCTION}"
        if prompt_column == "instruction" and row.get("input"):
            value = f"{value}\n{row['input']}"
    messages = read_messages(value)
    answer = read_answer(row.get(answer_column))
    while messages[-1]["role"] == "assistant":
        answer = answer or messages[-1]["content"]
        messages.pop()
    if config.reward == "gsm8k":
        answer = answer.split("####")[-1].strip().replace(",", "")
    text = messages[-1]["content"]
    if config.system_prompt:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    prompt = render(messages, tokenizer, is_prompt=True)
    if not prompt:
        raise ValueError("the prompt has no tokens")
    return Example(text, answer, prompt, messages)


def find_column(columns: list[str], wanted: str | None, usual: str, source: str) -> str | None:
    """The wanted column (UsageError: it is missing), else the first usual one, else None."""
    for name in [wanted] if wanted else usual.split():
        if name in columns:
            return name
    if wanted:
        raise UsageError(f"{source}: there is no column {wanted!r}; there are {', '.join(columns)}")
    return None


def make_examples(rows: list[dict], tokenizer, config: Config, source: str, training: bool) -> list[Example]:
    """Rows -> examples. Evaluation rows that are too long are cut, never dropped. Raises UsageError."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    usual = "question instruction prompt messages conversations"
    prompt_column = find_column(columns, config.prompt_column, usual, source)
    usual_answers = "answer output ground_truth reward_model"
    answer_column = find_column(columns, config.answer_column, usual_answers, source)
    if prompt_column is None:
        raise UsageError(f"{source}: no column {usual.replace(' ', ', ')}; there are {', '.join(columns)}:"
                         " choose one with --prompt_column")
    limit = config.max_prompt_length
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            examples.append(make_example(row, prompt_column, answer_column, tokenizer, config))
        except Exception as error:  # the tokenizer's and its template's too
            raise UsageError(f"{source}: row {number}, column {prompt_column}: {error!r}") from error
    unanswered = sum(example.answer == "" for example in examples)
    if unanswered and config.reward == "gsm8k":
        raise UsageError(f"{source}: {unanswered} of {len(rows)} rows have no answer; reward gsm8k needs it")
    if unanswered:
        warn(f"{source}: {unanswered} of {len(rows)} rows have no answer (there are {', '.join(columns)}):"
             " the reward gets empty ones")
    replies = sum(read_messages(row[prompt_column])[-1]["role"] == "assistant" for row in rows)
    if replies:
        warn(f"{source}: {replies} conversations end with a turn of the assistant, which is cut off")
    overlong = sum(len(example.prompt) > limit for example in examples)
    if overlong:
        done = "dropped" if training else "cut on the left"
        warn(f"{source}: {overlong} of {len(rows)} prompts have more than {limit} tokens and were {done}")
    if training:
        return [example for example in examples if len(example.prompt) <= limit]
    return [replace(example, prompt=example.prompt[-limit:]) for example in examples]


def load_examples(tokenizer, config: Config) -> tuple[list, list]:
    """Training and evaluation examples; the second list is empty without an evaluation. Raises UsageError."""
    print(f"data set: {config.dataset} (--dataset chooses another)")
    rows = read_rows(config.dataset, "train")
    train = make_examples(rows, tokenizer, config, config.dataset, training=True)
    if not train:
        raise UsageError(f"{config.dataset}: no prompt has at most {config.max_prompt_length} tokens")
    if len(train) < config.train_batch_size:
        raise UsageError(f"{config.dataset}: {len(train)} prompts, but train_batch_size is"
                         f" {config.train_batch_size}: {fitting_sizes(len(train), config)}")
    source = config.eval_dataset
    name = config.dataset.split(":")[0]
    if source is None and name in ("demo", "gsm8k", "openai/gsm8k"):
        source = name
    evals = []
    if source is not None and config.eval_every > 0:
        rows = read_rows(source, "test")[: config.eval_size]
        evals = make_examples(rows, tokenizer, config, source, training=False)
    common = {tuple(example.prompt) for example in train} & {tuple(example.prompt) for example in evals}
    if common:
        warn(f"{len(common)} prompts of {config.dataset} are evaluation prompts too")
    known = read_model_config(config.model, config).get_text_config().vocab_size
    highest = max(max(example.prompt) for example in train + evals)
    if highest >= known:
        raise UsageError(f"{config.model}: token {highest} of the tokenizer, but the model knows {known}")
    return train, evals


# ---- Rewards: reward(examples, responses) -> scores, or (scores, {metric: a number per response}) --------


def score_gsm8k_strict(response: str, answer: str) -> float:
    """verl's rule: 1 if the last "#### NUMBER" of the last 300 characters, without commas, is the answer."""
    found = re.findall(r"#### (-?[0-9.,]+)", response[-300:])
    return float(bool(found) and found[-1].replace(",", "") == answer)


def score_gsm8k_flexible(response: str, answer: str) -> float:
    """1 if the last number after a "####", else the last number, is the answer: 1,000 = $1000 = 1000.00."""
    number = r"[-$]*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    found = re.findall(rf"####\s*({number})", response) or re.findall(number, response)
    if not found:
        return 0.0
    try:
        given, wanted = [float(re.sub("[,$]", "", text)) for text in (found[-1], answer)]
        return float(given == wanted)
    except ValueError:  # the answer is not a number, or the response has two minus signs
        return 0.0


def load_function(spec: str, option: str) -> Callable:
    """FILE.py:function, imported into this process. Raises UsageError."""
    path, _, name = spec.partition(":")
    module_name = f"{option}_{Path(path).stem}"
    if not name or not Path(path).is_file():
        raise UsageError(f"{option} {spec}: there is no file {path!r}, or no function is named after its :")
    try:
        sys.path.append(str(Path(path).resolve().parent))  # for what it imports
        found = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module
        found.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{option} {spec} cannot be loaded: {error!r}") from error


def check_responses(
    responses: list, logprobs: list, count: int, num_tokens: int, config: Config
) -> list[list[int]]:
    """The responses of a rollout hook as lists of numbers. Raises UsageError, on all ranks."""
    responses = [[int(token) for token in response] for response in responses]
    problem = None
    if len(responses) != count or len(logprobs) != count:
        problem = f"rollout: {len(responses)} responses, {len(logprobs)} log-probs, {count} prompts"
    for i, (tokens, logprob) in enumerate(zip(responses, logprobs, strict=False)):
        if not 1 <= len(tokens) <= config.max_response_length or len(logprob) != len(tokens):
            problem = (f"rollout: response {i} has {len(tokens)} tokens and {len(logprob)} log-probs, not 1"
                       f" to {config.max_response_length} of both")
        elif min(tokens) < 0 or max(tokens) >= num_tokens:
            problem = f"rollout: response {i} has a token outside 0 to {num_tokens - 1}"
        elif not torch.as_tensor(logprob).isfinite().all():
            problem = f"rollout: response {i} has a log-prob that is not finite"
    raise_on_all_ranks(problem)
    return responses


def raise_on_all_ranks(problem: str | None) -> None:
    """Raises UsageError if a rank has a problem: all save and end together."""
    if sum_over_ranks(torch.tensor(float(problem is not None))) > 0:
        raise UsageError(problem or "another rank has failed")


def load_reward_model(name: str, config: Config) -> Callable:
    """A sequence-classification model with one output, which reads conversations with its own tokenizer."""
    lm = load_lm(name, AutoModelForSequenceClassification, config)
    lm_config = lm.config.get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    limit = min(getattr(lm_config, "max_position_embeddings", 2**20), tokenizer.model_max_length)
    print(f"reward model: {name}, {limit} tokens (longer conversations lose their beginning)")

    @torch.no_grad()
    def reward(examples, responses):
        ids = []
        truncated = []
        for example, response in zip(examples, responses, strict=True):
            talk = [*example.messages, {"role": "assistant", "content": response}]
            tokens = render(talk, tokenizer, is_prompt=False)
            ids.append(tokens[-limit:])
            truncated.append(len(tokens) > limit)
        scores = torch.zeros(len(ids))
        nothing = torch.zeros(len(ids), 0)
        talks = Rollout(ids, [[]] * len(ids), nothing, nothing)  # conversations in the place of prompts
        for rows, part in micro_batches(list(range(len(ids))), talks, config):
            # a decoder's head reads the last token that is not padding: no row may end with the pad token
            last_tokens = {tokens[-1] for tokens in part.prompts}
            pad = min(set(range(len(rows) + 1)) - last_tokens)
            lm_config.pad_token_id = pad
            batch = [torch.tensor(tokens, device=lm.device) for tokens in part.prompts]
            mask = pad_sequence([torch.ones_like(x) for x in batch], batch_first=True)
            batch = pad_sequence(batch, batch_first=True, padding_value=pad)
            scores[rows] = lm(input_ids=batch, attention_mask=mask).logits[:, 0].float().cpu()
        return scores, {"truncated": truncated}

    return reward


def load_reward(config: Config) -> Callable:
    """The reward that the option names. Raises UsageError."""
    spec = config.reward
    if spec == "gsm8k":
        function = gsm8k_reward
    elif spec.split(":")[0].endswith(".py"):
        function = load_function(spec, "reward")
    elif "SequenceClassification" in str(read_model_config(spec, config).architectures):
        return load_reward_model(spec, config)
    else:
        raise UsageError(f"reward {spec!r} is neither gsm8k, nor FILE.py:function, nor a sequence classifier")

    def reward(examples, responses):
        return function([e.text for e in examples], responses, [e.answer for e in examples])

    return reward


def gsm8k_reward(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    return [score_gsm8k_strict(*pair) for pair in zip(responses, answers, strict=True)]


def to_number(x) -> float:
    """What a reward gave for a row; not a number where that is None or text."""
    if x is None or isinstance(x, str):
        return math.nan
    return float(x)


def read_scores(result, count: int) -> tuple[list, dict]:
    """Scores and metrics out of what a reward returned. Raises UsageError naming the row or metric."""
    scores, measured = result if isinstance(result, tuple) else (result, {})
    columns = {**measured, "score": scores}
    for name, column in columns.items():
        if name in TAKEN_NAMES or not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"the reward called a metric {name!r}, which is no name or is one of ours")
        if len(column) != count:
            raise UsageError(f"the reward returned {len(column)} numbers as {name!r} for {count} responses")
        columns[name] = [to_number(x) for x in column]
        for row, x in enumerate(columns[name]):
            if not abs(x) < 3e38:  # finite, in fp32 too
                raise UsageError(f"the reward's {name} of row {row} is {column[row]!r}, not a finite number")
    return columns.pop("score"), columns


def score_responses(reward: Callable, examples: list[Example], responses: list[str]) -> tuple[Tensor, dict]:
    """Scores [B], and the means of what else the reward measures. Raises UsageError, on all ranks."""
    problem = None
    try:
        scores, measured = read_scores(reward(examples, responses), len(responses))
    except UsageError as error:
        problem = str(error)
    except Exception as error:  # of the user's code
        traceback.print_exc()
        problem = f"the reward raised {error!r}"
    raise_on_all_ranks(problem)
    means = {}
    for name in union_over_ranks(list(measured)):
        x = torch.tensor(measured.get(name, []), dtype=torch.float64)
        means[name] = masked_mean(x, torch.ones_like(x))
    return torch.tensor(scores), means


def union_over_ranks(names: list[str]) -> list[str]:
    """All names that a rank has, sorted: what a reward measures may depend on the responses."""
    everyone = [names] * WORLD
    dist.all_gather_object(everyone, names)
    return sorted({name for names in everyone for name in names})


# ---- Evaluation and samples ------------------------------------------------------------------------------


def mean_and_error(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of x [B] over all ranks, and its standard error."""
    x = x.double()
    everyone = torch.ones_like(x)
    mean = masked_mean(x, everyone)
    variance = masked_mean((x - mean).square(), everyone)
    count = sum_over_ranks(everyone.sum())
    return mean, (variance / (count - 1).clamp(min=1)).sqrt()


def evaluate(
    models: Models, reward: Callable, examples: list[Example], kl_coef: float, config: Config
) -> tuple[dict, list[dict]]:
    """Greedy responses to all examples: mean score and standard error, GSM8K's accuracies, four samples."""
    rollout = respond(models, examples, config, generator=None)
    scores, measured = score_responses(reward, examples, rollout.texts)
    rollout.scores = scores.to(rollout.mask.device)
    metrics = {f"eval/{name}": x for name, x in measured.items()}
    metrics["eval/score"], metrics["eval/standard_error"] = mean_and_error(scores)
    if config.reward == "gsm8k":
        flexible = []
        for response, example in zip(rollout.texts, examples, strict=True):
            flexible.append(score_gsm8k_flexible(response, example.answer))
        accuracy, error = mean_and_error(torch.tensor(flexible))
        metrics["eval/accuracy"] = metrics["eval/score"]
        metrics["eval/accuracy_flexible"] = accuracy
        metrics["eval/standard_error_flexible"] = error
    samples = rollout.take(list(range(min(4, len(examples)))))
    if config.uses_critic:
        assign_credit(models, samples, kl_coef, config)
    else:  # a single response has no group to be compared with
        measure_kl(models, samples, config)
    return metrics, describe_samples(samples, "eval", 4, models)


def describe_samples(rollout: Rollout, split: str, count: int, models: Models) -> list[dict]:
    """The first responses as samples.jsonl has them, with one number per token for all that is known."""
    columns = {
        "logprob": "old_logprobs", "ref_logprob": "ref_logprobs", "kl": "kl", "reward": "rewards",
        "value": "old_values", "advantage": "advantages", "return": "returns", "ratio": "ratio",
        "clipped": "clipped",
    }
    samples = []
    for i, ids in enumerate(rollout.responses[:count]):
        stopped = rollout.stopped[i].item()
        sample = {
            "split": split, "prompt": rollout.examples[i].text, "response": rollout.texts[i],
            "score": rollout.scores[i].item(), "stop_reason": "stop" if stopped else "length",
            "truncated": not stopped, "token": models.tokenizer.convert_ids_to_tokens(ids),
        }
        for key, name in columns.items():
            x = getattr(rollout, name)
            sample[key] = None if x is None else x[i, : len(ids)].tolist()
        samples.append(sample)
    return samples


# ---- The folder of a run ---------------------------------------------------------------------------------


TAKEN_NAMES = "score_std kl kl_sequence kl_coef accuracy accuracy_flexible standard_error".split()
CURVES = {  # metric -> unit
    "eval/score": "mean over rows", "reward/score": "mean over responses", "reward/kl": "nats per token",
    "policy/entropy": "nats per token", "policy/clipfrac": "share of tokens",
    "policy/approx_kl": "nats per token",
    "value/loss": "half squared error", "value/explained_variance": "1 is perfect",
    "rollout/response_length": "tokens",
}
COLUMNS = {  # of the console -> metric
    "score": "reward/score", "KL": "reward/kl", "entropy": "policy/entropy",
    "length": "rollout/response_length", "clipped": "policy/clipfrac", "expl.var": "value/explained_variance",
}


def write_whole(path: Path, text: str) -> None:
    """Whoever reads path finds the old text or this one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def keep_old(path: Path) -> None:
    """Renames a file or folder to NAME.old; what has that name already stays."""
    if path.exists():
        old = path.with_name(f"{path.name}.old")
        if old.exists():
            old = path.with_name(f"{path.name}.{time.time_ns()}.old")
        path.replace(old)
        warn(f"{path} is kept as {old.name}")


def printable(text: str) -> str:
    """Text on one line, with what a terminal would act on as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def lock_folder(folder: Path):
    """Makes the folder of a run and keeps others out of it. Returns the open lock. Raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    if any(folder.iterdir()) and not path.exists():
        raise UsageError(f"{folder} is not empty and not the folder of a run: choose another output_dir")
    lock = open(path, "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise UsageError(f"{folder} is in use by process {lock.read()}") from error
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    return lock


def default_folder(config: Config) -> str:
    data = re.sub(r"[^\w.-]", "-", Path(config.dataset).stem)
    return f"output/{Path(__file__).stem}-{data}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def text_hash(x) -> str:
    return hashlib.sha256(repr(x).encode()).hexdigest()


class Run(contextlib.AbstractContextManager):
    """The folder of a run, with its lock, table, samples, summary and tracker; and the console."""

    def __init__(self, config: Config, total: int):
        if 0 < total <= config.critic_warmup:
            raise UsageError(f"critic_warmup = {config.critic_warmup} leaves the actor none of {total} steps")
        self.folder = Path(config.output_dir or from_rank_0(default_folder, config))
        self.config = config
        self.total = total
        self.start = None  # the step it begins at
        self.step = 0  # of the last row of training_metrics.csv
        self.columns = []  # of training_metrics.csv
        self.evaluations = []  # the rows that have one: {"step", "eval/score", ...}
        self.evaluation_hash = None  # of data and reward of the evaluations in training_metrics.csv
        self.said = set()  # by check_health
        self.settings_history = [{"step": 0, "config": asdict(config)}]
        self.is_tracked = config.track == "wandb"
        self.tracker = None
        self.tracker_id = f"{time.time_ns():x}"
        if RANK == 0:
            self.lock = lock_folder(self.folder)
        self.checkpoint = from_rank_0(find_checkpoint, self.folder, config.resume)
        self.continues = self.checkpoint in checkpoints(self.folder)
        self.command = f"deepspeed {shlex.join(sys.argv)}"  # what continues this run
        if not config.output_dir:
            self.command += f" --output_dir {self.folder}"

    def print_plan(self, tokenizer, examples: list[Example], evals: list[Example]) -> None:
        c = self.config
        self.data_hash = text_hash([(e.prompt, e.answer) for e in examples])
        if evals:
            self.evaluation_hash = text_hash([c.reward, *[(e.prompt, e.answer) for e in evals]])
        preset = "the demo" if c.model == DEMO.model else "the published GSM8K run"
        print(f"run: {self.folder}\nto continue it: {self.command}\noptions not given: those of {preset}")
        print(f"first prompt: {printable(tokenizer.decode(examples[0].prompt))}")
        print(f"{self.total} steps of {c.rollout_size} responses to {c.train_batch_size} of {len(examples)}"
              f" prompts, {c.ppo_epochs} epochs of mini-batches of {c.ppo_mini_batch_size}; {len(evals)}"
              " evaluation rows")

    def begin(self, start: int) -> None:
        """Logs and summary, from this step on."""
        self.start = start
        self.began = time.perf_counter()
        self.step = start
        self.evaluations = from_rank_0(self.restore_logs, start)
        if RANK:
            return
        shutil.rmtree(self.folder / "checkpoints" / "temporary", ignore_errors=True)  # of a killed run
        link = Path("output", "ppo_metrics")
        if self.folder.parent == link.parent and (link.is_symlink() or not link.exists()):
            link.unlink(missing_ok=True)
            link.symlink_to(self.folder.name)
        self.write_summary("running")

    def restore_logs(self, start: int) -> list[dict]:
        """Cuts training_metrics.csv and samples.jsonl at this step; without a checkpoint both begin anew.

        Returns the evaluations so far.
        """
        log = self.folder / "training_metrics.csv"
        samples = self.folder / "samples.jsonl"
        table = pandas.DataFrame()
        lines = []
        problem = None
        if self.checkpoint:
            print(f"resumed from {self.checkpoint.name} of {max(start, self.total)}: {self.checkpoint}")
        if self.continues:
            try:
                table, lines = self.cut_logs(start)
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = f"the logs cannot be read and begin anew: {error}"
        elif log.exists() or samples.exists():
            problem = f"{self.folder} has no checkpoint: the run begins anew"
        if problem:
            warn(problem)
            keep_old(log)
            keep_old(samples)
        if not self.continues:
            for name in ("summary.json", "model", "critic"):
                keep_old(self.folder / name)
        write_whole(samples, "".join(lines))
        table = self.drop_other_evaluations(table)
        self.write_log(table)
        evaluations = table.filter(regex="^eval/").dropna(how="all").dropna(axis=1)
        return evaluations.reset_index(names="step").to_dict("records")

    def drop_other_evaluations(self, table: pandas.DataFrame) -> pandas.DataFrame:
        """The table without evaluations of other data or by another reward."""
        try:
            found = json.loads((self.folder / "summary.json").read_text())["evaluation_hash"]
        except (OSError, ValueError, KeyError):
            found = None
        self.evaluation_hash = self.evaluation_hash or found
        names = [name for name in table if name.startswith("eval/")]
        if found in (None, self.evaluation_hash) or not names:
            return table
        warn("the evaluations so far are of other data or by another reward: the run is evaluated anew")
        keep_old(self.folder / "training_metrics.csv")
        return table.drop(columns=names)

    def cut_logs(self, start: int) -> tuple[pandas.DataFrame, list[str]]:
        """The rows and the samples up to this step. Raises ValueError if there are not all."""
        table = self.read_log().loc[:start]
        steps = range(start + 1 - len(table), start + 1)
        if len(table) == 0 or list(table.index) != list(steps):
            raise ValueError("training_metrics.csv lacks steps")
        with open(self.folder / "samples.jsonl") as file:  # a kill may have left half a line
            lines = [x for x in file if x.endswith("\n") and json.loads(x)["step"] <= start]
        if not lines:
            raise ValueError("samples.jsonl is empty")
        return table, lines

    def read_log(self) -> pandas.DataFrame:
        """training_metrics.csv without half a line at its end, as a full disk leaves it."""
        text = (self.folder / "training_metrics.csv").read_text()
        lines = io.StringIO(text[: text.rfind("\n") + 1])
        return pandas.read_csv(lines, index_col="step").astype(float)

    def write_log(self, table: pandas.DataFrame) -> None:
        self.columns = sorted(table)
        text = table[self.columns].to_csv(index_label="step", chunksize=100)  # larger chunks hold memory
        write_whole(self.folder / "training_metrics.csv", text)

    def progress_bar(self, start: int) -> Iterator[int]:
        """The steps that are left; on a terminal with a bar below the rows."""
        hidden = None  # unless stdout is a terminal
        if os.environ.get("TERM") == "dumb":
            hidden = True
        steps = range(start, self.total)
        return tqdm(steps, initial=start, total=self.total, file=sys.stdout, disable=hidden)

    def evaluate_if_due(
        self, step: int, models: Models, reward: Callable, examples: list[Example], kl_coef: float
    ) -> None:
        """Also when the run was stopped before the evaluation of the step that it is resumed from."""
        is_done = step in [row["step"] for row in self.evaluations]
        if is_done or not examples or (step < self.total and step % self.config.eval_every):
            return
        with self.saving_on_error(step, models, kl_coef):
            metrics, samples = evaluate(models, reward, examples, kl_coef, self.config)
            metrics = self.add(step, metrics, samples)
        self.evaluations.append({"step": step, **metrics})
        sample = printable(f"  sample, score {samples[0]['score']:.3g}: {samples[0]['response']}")
        error = metrics["eval/standard_error"]
        tqdm.write(f"evaluation at step {step}: {metrics['eval/score']:.4g} ± {error:.2g}")
        width = shutil.get_terminal_size().columns - 1
        tqdm.write(disp_trim(sample[:width], width))
        self.draw_curves()
        if step < self.total and self.is_stopping():
            save_checkpoint(self, step, models, kl_coef)
            self.stop(step)

    def is_save_due(self, step: int) -> bool:
        every = self.config.save_every
        return step == self.total or (every > 0 and step % every == 0)

    def add(self, step: int, metrics: dict, samples: list[dict]) -> dict[str, float]:
        """Into training_metrics.csv, samples.jsonl and the tracker. Returns the metrics as numbers."""
        metrics = {name: float(x) for name, x in metrics.items()}
        if RANK:
            return metrics
        row = pandas.DataFrame(metrics, index=[step])
        if step > self.step and set(row) <= set(self.columns):
            row = row.reindex(columns=self.columns)
            row.to_csv(self.folder / "training_metrics.csv", mode="a", header=False)
        else:  # the evaluation of a step that has its row, or a metric that is new
            self.write_log(row.combine_first(self.read_log()))
        self.step = step
        with open(self.folder / "samples.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
        if self.is_tracked:
            self.track(step, metrics)
        return metrics

    def track(self, step: int, metrics: dict[str, float]) -> None:
        """Sends them to wandb, whose failure does not end the run."""
        try:
            import wandb

            if self.tracker is None:
                self.tracker = wandb.init(
                    project="ppo_llm", name=self.folder.name, config=asdict(self.config),
                    id=self.tracker_id, resume="allow")
            self.tracker.log(metrics, step=step)
        except Exception as error:
            warn(f"wandb has failed, the run goes on without it: {error}")
            self.is_tracked = False

    def log_step(
        self, step: int, metrics: dict, rollout: Rollout, models: Models, seconds: float
    ) -> None:
        """A row of the table and of the console, and two samples."""
        metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / seconds
        metrics = self.add(step, metrics, describe_samples(rollout, "train", 2, models))
        check_health(metrics, step - 1, self.said)
        done = step - self.start
        left = (time.perf_counter() - self.began) / done * (self.total - step)
        cells = {"step": f"{step}/{self.total}"}
        for title, name in COLUMNS.items():
            cells[title] = f"{metrics[name]:.3g}" if name in metrics else "-"
        cells["seconds"] = f"{seconds:.1f}"
        cells["ETA"] = tqdm.format_interval(left)
        width = shutil.get_terminal_size((100, 24)).columns // 10 * 10  # in a pipe all columns
        if done % 20 == 1:
            tqdm.write("".join(f"{title:>10}" for title in cells)[:width])
        tqdm.write("".join(f"{cell:>10}" for cell in cells.values())[:width])

    def is_stopping(self) -> bool:
        """Whether a signal has asked any rank to stop."""
        return sum_over_ranks(torch.tensor(float(len(STOP)))) > 0

    def stop(self, step: int) -> None:
        """Ends the run after a step that has been saved: exit code 130 or 143."""
        tqdm.write(f"stopped after step {step}; continue with: {self.command}")
        sys.exit(128 + int(max_over_ranks(torch.tensor(max(STOP, default=0)))))

    @contextlib.contextmanager
    def saving_on_error(self, step: int, models: Models, kl_coef: float) -> Iterator[None]:
        """What the user's code raises costs no finished step; weights that have diverged are not saved."""
        try:
            yield
        except Diverged:
            raise
        except UsageError:  # on all ranks
            if step > self.start:
                save_checkpoint(self, step, models, kl_coef)
            raise

    def __exit__(self, kind, error, trace) -> None:
        if RANK:
            return
        if self.start is not None and error is None:
            self.draw_curves()
            self.write_summary("finished")
            self.print_end()
        elif self.start is not None:
            with contextlib.suppress(OSError):  # a full disk
                status = "stopped" if kind is SystemExit else "failed"
                self.write_summary(status, f"{kind.__name__}: {error}")
        self.lock.close()
        if isinstance(error, (OSError, SafetensorError)):
            raise UsageError(f"{self.folder}: {error}") from error

    def write_summary(self, status: str, reason: str | None = None) -> None:
        commit = None
        if shutil.which("git"):
            git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        summary = {
            "status": status, "reason": reason, "step": self.step,
            "total_steps": self.total, "seconds": round(time.perf_counter() - self.began, 3),
            "resume_command": self.command, "first_evaluation": self.evaluations[:1],
            "last_evaluation": self.evaluations[-1:],
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "commit": commit, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {gpu}",
            "settings_history": self.settings_history, "config": asdict(self.config),
            "evaluation_hash": self.evaluation_hash,
        }
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=2))

    def draw_curves(self) -> None:
        """training_curves.png; a fault in it does not end the run."""
        if RANK:
            return
        try:
            self.draw_panels()
        except Exception as error:
            warn(f"training_curves.png could not be drawn: {error!r}")

    def draw_panels(self) -> None:
        """3 x 3 panels, evaluations with their standard errors."""
        import gc

        import matplotlib.figure

        c = self.config
        table = self.read_log()
        figure = matplotlib.figure.Figure(figsize=(13, 9), layout="constrained")
        figure.suptitle(f"{Path(c.model).name}, data {c.dataset}, reward {c.reward}, seed {c.seed}")
        panels = figure.subplots(3, 3).flat
        for axis, name in zip(panels, CURVES, strict=True):
            axis.set(title=name, xlabel="step", ylabel=CURVES[name])
            axis.locator_params("x", integer=True)
            if name not in table:
                axis.set_title(f"{name}: not measured")
                continue
            curve = table[name].dropna()
            errors = None
            if name == "eval/score":
                errors = table["eval/standard_error"].dropna()
            elif len(curve) > 500:
                curve = curve[:: len(curve) // 250]
            axis.errorbar(curve.index, curve, errors, marker=".", capsize=3)
        figure.savefig(self.folder / "training_curves.png", dpi=80)
        gc.collect()  # a figure is a cycle of references: without this, memory grows with every evaluation

    def print_end(self) -> None:
        """A table of the evaluations before and after, and where to look."""
        if self.evaluations:
            print(f"{'step':>10}{'evaluation score':>20}")
        for row in self.evaluations[:1] + self.evaluations[1:][-1:]:
            score = f"{row['eval/score']:.4g} ± {row['eval/standard_error']:.2g}"
            print(f"{row['step']:>10}{score:>20}")
        inspector = HERE / "scripts" / "inspect_run.py"
        if inspector.is_file():
            subprocess.run([sys.executable, inspector, self.folder], stdout=subprocess.DEVNULL)
        for name in ("summary.json", "training_curves.png", "training_metrics.csv", "samples.jsonl",
                     "inspector.html", "checkpoints", "model", "critic"):
            if (self.folder / name).exists():
                print(self.folder / name)


# ---- Checkpoints and exports -----------------------------------------------------------------------------


STRUCTURE = "critic adv_estimator dtype lora_rank lora_alpha lora_target value_pooling".split()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, the oldest first."""
    found = [path for path in folder.glob("checkpoints/step_*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_whole(folder: Path) -> bool:
    """Whether the files of a checkpoint have the hashes that were written beside them."""
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        return all(file_hash(folder / name) == found for name, found in hashes.items())
    except (OSError, ValueError):
        return False


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The newest whole checkpoint of a run, else of what is to be resumed. Raises UsageError."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        warn(f"{path} is damaged: an older checkpoint is used, or none")
        keep_old(path)
    if resume is None:
        return None
    for path in [Path(resume), *reversed(checkpoints(Path(resume)))]:
        if is_whole(path):
            return path
    raise UsageError(f"resume {resume}: there is no whole checkpoint")


def save_checkpoint(run: Run, step: int, models: Models, kl_coef: float) -> None:
    """checkpoints/step_N: weights, optimizers, the KL coefficient. Whole or absent: renamed when written."""
    folder = run.folder / "checkpoints" / f"step_{step}"
    temporary = folder.with_name("temporary")
    models.actor.save(temporary / "actor.safetensors")
    if models.critic:
        models.critic.save(temporary / "critic.safetensors")
    if RANK:
        return dist.barrier()
    state = {
        "step": step, "kl_coef": kl_coef, "tracker_id": run.tracker_id, "data_hash": run.data_hash,
        "settings_history": run.settings_history, "config": asdict(run.config),
    }
    (temporary / "state.json").write_text(json.dumps(state))
    hashes = {path.name: file_hash(path) for path in temporary.iterdir()}
    (temporary / "hashes.json").write_text(json.dumps(hashes))
    if folder.exists():  # this step was saved before an error
        shutil.rmtree(temporary)
    else:
        temporary.replace(folder)
    for old in checkpoints(run.folder)[: -run.config.save_total_limit]:
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()  # a launcher ends all when one has gone


def load_checkpoint(run: Run, models: Models) -> tuple[int, float]:
    """Restores the learners. Returns (step, kl_coef). Raises UsageError if options do not fit to it."""
    state = json.loads((run.checkpoint / "state.json").read_text())
    if 0 < run.total < state["step"]:
        raise UsageError(f"{run.checkpoint} is past step {run.total}, the last: give more total_steps")
    changes = []
    for name, new in asdict(run.config).items():
        old = state["config"].get(name)
        if old == new or name in ("output_dir", "resume"):
            continue
        if name in STRUCTURE or (run.config.lora_rank and name in ("model", "critic_model")):
            raise UsageError(f"{run.checkpoint} was made with {name} {old}, not {new}")
        changes.append(f"{name} {old} → {new}")
    models.actor.load(run.checkpoint / "actor.safetensors")
    if models.critic:
        models.critic.load(run.checkpoint / "critic.safetensors")
    if run.continues:
        run.tracker_id = state["tracker_id"]
    run.settings_history = state["settings_history"]
    if changes:
        warn(f"settings have changed since step {state['step']}: {', '.join(changes)}")
        run.settings_history.append({"step": state["step"], "changes": changes})
    if state.get("data_hash") != run.data_hash:
        warn("the prompts are not what they were: other rows, or a chat template that writes the date")
    if run.config.kl_target is None or state["config"]["kl_ctrl_type"] == "fixed":  # nothing has moved it
        return state["step"], run.config.kl_coef
    return state["step"], state["kl_coef"]


def export_models(folder: Path, models: Models, config: Config) -> None:
    """model/ and critic/."""
    with whole_weights(models.actor.model):
        export_policy(folder / "model", models.actor.model, models.tokenizer)
    if models.critic:
        with whole_weights(models.critic.model):
            export_critic(folder / "critic", models.critic.model, models.tokenizer)
    elif config.uses_critic:
        print("no critic/: a shared critic is a head on the policy")


def export_policy(folder: Path, policy: LanguageModel, tokenizer) -> None:
    """A folder that AutoModelForCausalLM loads; with LoRA peft's, of the adapter."""
    if RANK:
        return
    policy.select_adapter()
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_critic(folder: Path, critic: LanguageModel, tokenizer) -> None:
    """A folder that --critic_model and AutoModelForSequenceClassification load: the value head is its score.

    A LoRA adapter is added to the weights, in fp32. What transformers has no class for is said, and left out.
    """
    if RANK:
        return
    if critic.pooling == "mean":
        print("no critic/: transformers' sequence classifiers do not read the mean of the states")
        return
    lm_config = copy.deepcopy(critic.lm.config)
    lm_config.num_labels = 1
    lm_config.dtype = torch.float32 if critic.adapter else critic.lm.dtype
    text_config = lm_config.get_text_config()
    if tokenizer.pad_token_id in range(text_config.vocab_size):
        text_config.pad_token_id = tokenizer.pad_token_id
    has_class = type(lm_config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    model = AutoModelForSequenceClassification.from_config(lm_config) if has_class else None
    if not isinstance(getattr(model, "score", None), nn.Linear):
        print("no critic/: transformers has no sequence classifier with a linear score head for this model")
        return
    weights = {}  # on the CPU: merged, they are larger than what the GPU holds
    for name, x in critic.lm.base_model.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace("base_layer.", "")] = x.cpu()
    for name, layer in critic.lm.base_model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = getattr(layer, "parameter_name", "weight")  # fused experts have other names
            name = f"{name.replace('.base_layer', '')}.{weight}"
            weights[name] = weights[name].float() + layer.get_delta_weight("critic").cpu()
    model.base_model.load_state_dict(weights)
    model.score.weight.data.copy_(critic.value_head.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Command line ----------------------------------------------------------------------------------------


def read_options(path: str) -> list[str]:
    """A JSON or YAML file of options, or the summary.json of a run, as arguments. Raises UsageError.

    output_dir and resume are left out: with the options of another run a new one begins.
    """
    import yaml  # YAML contains JSON

    try:
        options = yaml.safe_load(Path(path).read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"config {path}: {' '.join(str(error).split())}") from error
    if isinstance(options, dict):
        options = options.get("config", options)
    if not isinstance(options, dict):
        raise UsageError(f"config {path}: there are no options")
    arguments = []
    for name, x in options.items():
        if isinstance(x, bool) and Config.__annotations__.get(name) is bool:
            arguments.append(f"--{name}" if x else f"--no_{name}")
        elif name not in ("output_dir", "resume"):
            arguments.append(f"--{name}={x}")
    return arguments


def print_help(defaults: Config) -> None:
    """The options of Config in its groups; the comments in its source explain them."""
    print(__doc__.split("    for step")[0].strip())
    print("\nOptions (--config FILE reads them from JSON, YAML or the summary.json of a run):")
    for line in inspect.getsource(Config).splitlines():
        heading = re.fullmatch(r"    # (.+)", line)
        option = re.fullmatch(r"    (\w+): (.+) = .+?  # (.+)", line)
        if heading:
            print(f"\n{heading[1]}")
        elif option:
            name, kind, text = option.groups()
            choices = get_args(Config.__annotations__[name])
            if kind == "bool":
                kind = f"(--no_{name})"
            elif choices and "None" not in kind:
                kind = f"{{{','.join(map(str, choices))}}}"
            print(f"  --{name} {kind}\n      {text} Default: {getattr(defaults, name)}.")


def read_config(arguments: list[str]) -> Config:
    """Options of the command line, which win over those of --config FILE, over a preset."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    given, arguments = parser.parse_known_args(arguments)
    if given.config:
        arguments = read_options(given.config) + arguments
    has_model = any(argument.split("=")[0] == "--model" for argument in arguments)
    defaults = Config() if has_model else DEMO
    if "--help" in arguments or "-h" in arguments:
        print_help(defaults)
        sys.exit(0)
    try:
        return tyro.cli(Config, default=defaults, args=arguments, use_underscores=True)
    except SystemExit:
        print("The names of other trainers' options are in docs/coming_from.md.", file=sys.stderr)
        raise


class Console:
    """stdout or stderr. Nobody has to read it to the end: a Ctrl-C ends `| tee` too."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # where it cannot show a letter

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()  # here, where it may fail
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def ask_to_stop(number: int, frame) -> None:
    """Ctrl-C and SIGTERM: the first ends the run after its step, the same once more at once."""
    if number in STOP:  # a launcher sends SIGTERM after a Ctrl-C
        os._exit(128 + number)
    STOP.append(number)
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping when this step is done and saved; the same signal once more ends at once\n")


def start() -> int:
    """The command line. Returns the exit code: 0, or 2 with one sentence on what the user can mend."""
    sys.stdout = Console(sys.stdout)
    sys.stderr = Console(sys.stderr)
    if RANK:  # one rank speaks for all
        sys.stdout = open(os.devnull, "w")
    sys.argv = [x for x in sys.argv if not re.match("--local[-_]rank", x)]  # launchers add it
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # it would say so
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        main(read_config(sys.argv[1:]))
        return 0
    except torch.OutOfMemoryError:
        reason = ("out of memory: lower --micro_batch_tokens or --rollout_slots, add"
                  " --gradient_checkpointing, or train adapters with --lora_rank (docs/memory.md)")
    except (UsageError, OSError, SafetensorError) as error:  # a full disk, a folder that cannot be written
        reason = str(error)
    except Exception as error:
        ours = [x.name for x in traceback.extract_tb(error.__traceback__) if x.filename == __file__]
        traceback.print_exc()
        print(f"rank {RANK} failed in {ours[:3][-1]}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # at once, without waiting for the other ranks
    print(f"error: {printable(reason)} (rank {RANK})", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(start())
