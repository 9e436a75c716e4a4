"""Nine small tasks for people who have changed ppo_llm.py: each fails for one reason, and says which.

    python scripts/probes.py             # all, under two minutes on one CPU core
    python scripts/probes.py --only kl   # one of them

A random two-layer model with 24 tokens writes six tokens at a time. Nothing is downloaded and no file stays. The exit
code is 1 if a probe fails.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
import tyro  # noqa: E402

import ppo_llm  # noqa: E402

VOCABULARY = 24
LENGTH = 6
PROMPTS = [[1], [2]]
BASE = ppo_llm.Config(
    train_batch_size=64, ppo_mini_batch_size=16, ppo_epochs=4, max_prompt_length=2, max_response_length=LENGTH,
    lr=1e-3, critic_lr=3e-3, weight_decay=0.0, kl_ctrl_coef=0.0, entropy_coeff=0.0, cliprange_value=None, device="cpu")


@dataclass
class Options:
    only: Literal[
        "all", "constant", "last", "first", "prompt", "opposite", "kl", "clip", "stop", "resume"] = "all"  # which probe


class Numbers:
    """Decodes token ids into their numbers, which the rewards below read again."""

    def batch_decode(self, responses: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, ids)) for ids in responses]


def make_models(config: ppo_llm.Config) -> ppo_llm.Models:
    torch.manual_seed(1)
    shape = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False)
    lm = transformers.AutoModelForCausalLM.from_config(shape).eval()
    frozen = transformers.AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    frozen.load_state_dict(lm.state_dict())
    trunk = transformers.AutoModel.from_config(shape).eval()
    actor = ppo_llm.Learner(ppo_llm.LanguageModel(lm, VOCABULARY, False, config), config.lr, config.critic_lr, config)
    value_model = ppo_llm.LanguageModel(trunk, 0, True, config)
    critic = ppo_llm.Learner(value_model, config.critic_lr, config.critic_lr, config)
    reference = ppo_llm.LanguageModel(frozen, VOCABULARY, False, config)
    return ppo_llm.Models(actor, critic, reference, Numbers(), {-1}, ppo_llm.generate)


def train(
    models: ppo_llm.Models, config: ppo_llm.Config, reward: Callable, steps: range, kl_coef: float | None = None
) -> list[dict[str, float]]:
    """Metrics of each step; reward(prompt, tokens) -> score. It begins with kl_coef, None: that of the config."""
    if kl_coef is None:
        kl_coef = config.kl_coef
    controller = ppo_llm.AdaptiveKLController(kl_coef, config.kl_target, config.kl_ctrl_horizon)
    examples = []
    for i in range(config.train_batch_size):
        examples.append(ppo_llm.Example("", "", PROMPTS[i % 2]))

    def score(examples: list[ppo_llm.Example], responses: list[str]) -> list[float]:
        scores = []
        for example, response in zip(examples, responses, strict=True):
            scores.append(float(reward(example.prompt[0], [int(word) for word in response.split()])))
        return scores

    history = []
    for step in steps:
        rollout, metrics = ppo_llm.collect_rollout(models, score, examples, step, controller.coef, config)
        metrics["mean_value"] = ppo_llm.masked_mean(rollout.old_values, rollout.mask)
        metrics |= ppo_llm.update("critic", models, rollout, step, steps.stop, controller.coef, config)
        metrics |= ppo_llm.update("actor", models, rollout, step, steps.stop, controller.coef, config)
        controller.update(float(metrics.get("reward/kl", 0.0)), config.rollout_size)
        metrics["next_kl_coef"] = controller.coef
        history.append({name: float(x) for name, x in metrics.items()})
    return history


def is_low(token: int) -> bool:
    return token < VOCABULARY // 2


def replaced(**changes) -> ppo_llm.Config:
    return ppo_llm.replace(BASE, **changes)


def probe_constant() -> tuple[bool, str, str]:
    history = train(make_models(BASE), BASE, lambda prompt, tokens: 1.0, range(12))
    value = history[-1]["mean_value"]
    return abs(value - 1) < 0.1, f"V is {value:.3f}, the reward is always 1", (
        "the value loss, the returns or the critic's optimizer")


def probe_last() -> tuple[bool, str, str]:
    history = train(make_models(BASE), BASE, lambda prompt, tokens: is_low(tokens[-1]), range(25))
    score = history[-1]["reward/score"]
    return score > 0.9, f"score {score:.2f}, of {history[0]['reward/score']:.2f} at first", (
        "the sign of the advantages or of the policy loss, or the token that the score is put on")


def probe_first() -> tuple[bool, str, str]:
    history = train(make_models(BASE), BASE, lambda prompt, tokens: is_low(tokens[0]), range(40))
    score = history[-1]["reward/score"]
    return score > 0.9, f"score {score:.2f}, of {history[0]['reward/score']:.2f} at first", (
        "credit does not reach early tokens: compute_gae, gamma, or an off-by-one between values and tokens")


def probe_prompt() -> tuple[bool, str, str]:
    history = train(make_models(BASE), BASE, lambda prompt, tokens: prompt == 1, range(12))
    explained = history[-1]["value/explained_variance"]
    return explained > 0.9, f"explained variance {explained:.2f}, the prompt alone decides the reward", (
        "the critic does not see the prompt: positions, padding, or the state that its head reads")


def probe_opposite() -> tuple[bool, str, str]:
    def reward(prompt: int, tokens: list[int]) -> bool:  # what is right for one prompt is wrong for the other
        return is_low(tokens[0]) == (prompt == 1)

    score = train(make_models(BASE), BASE, reward, range(40))[-1]["reward/score"]
    return score > 0.9, f"score {score:.2f}, two prompts have opposite answers", (
        "the policy does not see the prompt, or scores and responses have lost their prompts on the way")


def probe_kl() -> tuple[bool, str, str]:
    config = replaced(kl_ctrl_type="adaptive", kl_ctrl_coef=0.1, kl_ctrl_target=0.05, kl_ctrl_horizon=64)
    history = train(make_models(config), config, lambda prompt, tokens: is_low(tokens[0]), range(60))
    kl = sum(metrics["reward/kl"] for metrics in history[-15:]) / 15
    return 0.03 < kl < 0.08, f"KL {kl:.3f} per token, target 0.05", (
        "the KL estimate, its sign in the reward, the reference model, or the controller")


def probe_clip() -> tuple[bool, str, str]:
    def reward(prompt: int, tokens: list[int]) -> bool:
        return is_low(tokens[0])

    fast = replaced(lr=1e-2)
    clipped = train(make_models(fast), fast, reward, range(2))[-1]["policy/clipfrac"]
    return clipped > 0.02, f"{clipped:.0%} of the tokens clipped at a rate of 1e-2", (
        "clipped_policy_loss, or the old log-probs (are they of the policy before the update?)")


def probe_stop() -> tuple[bool, str, str]:
    def reward(prompt: int, tokens: list[int]) -> bool:
        return is_low(tokens[0])

    stopping = replaced(lr=1e-2, early_stop_kl=0.02)
    models = make_models(stopping)
    train(models, stopping, reward, range(1))
    steps = int(next(iter(models.actor.optimizer.state.values()))["step"])
    planned = BASE.ppo_epochs * BASE.rollout_size // BASE.ppo_mini_batch_size
    return steps < planned, f"early stop after {steps} of {planned} optimizer steps at a rate of 1e-2", (
        "early_stop_kl, or approx_kl (is it measured against the policy before the update?)")


def probe_resume() -> tuple[bool, str, str]:
    def reward(prompt: int, tokens: list[int]) -> bool:
        return is_low(tokens[-1])

    with tempfile.TemporaryDirectory() as folder:
        config = replaced(
            kl_ctrl_type="adaptive", kl_ctrl_coef=0.1, kl_ctrl_target=0.05, kl_ctrl_horizon=64, output_dir=folder)
        straight = make_models(config)
        train(straight, config, reward, range(4))
        first = make_models(config)
        kl_coef = train(first, config, reward, range(2))[-1]["next_kl_coef"]
        with ppo_llm.Run(config, 4) as run:
            run.data_hash = ""
            ppo_llm.save_checkpoint(run, 2, first, kl_coef)
        second = make_models(config)
        with ppo_llm.Run(config, 4) as run:
            run.data_hash = ""
            step, kl_coef = ppo_llm.load_checkpoint(run, second)
        train(second, config, reward, range(step, 4), kl_coef)
    equal = True
    for role in ("actor", "critic"):
        for x, y in zip(getattr(straight, role).weights, getattr(second, role).weights, strict=True):
            equal = equal and torch.equal(x, y)
    return equal, "2 steps, save, load, 2 steps against 4 steps, bit for bit", (
        "a state that is not in the checkpoint, or a random number that depends on more than (seed, step)")


PROBES = {
    "constant": probe_constant, "last": probe_last, "first": probe_first, "prompt": probe_prompt,
    "opposite": probe_opposite, "kl": probe_kl, "clip": probe_clip, "stop": probe_stop, "resume": probe_resume,
}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    failed = 0
    for name, probe in PROBES.items():
        if options.only not in ("all", name):
            continue
        began = time.perf_counter()
        try:
            passed, found, cause = probe()
        except Exception as error:  # the next rung may still say more
            traceback.print_exc()
            passed, found, cause = False, f"raised {error!r}", "the last line of the traceback that is this project's"
        seconds = time.perf_counter() - began
        print(f"{'PASS' if passed else 'FAIL'}  {name:9} {found} ({seconds:.0f} s)", flush=True)
        if not passed:
            failed += 1
            print(f"      likely cause: {cause}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
