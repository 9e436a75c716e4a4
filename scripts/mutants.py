"""Plants one-line faults in a copy of a script and shows that the fast tests catch every one.

    python scripts/mutants.py                              # ppo_llm.py, about 15 minutes on 2 cores
    python scripts/mutants.py --script ppo_classic         # ppo_classic.py, about 15 minutes
    python scripts/mutants.py --only GAE                   # those whose name contains the word; writes nothing

Each row: the fault, and the first test of `pytest -x -m "not slow"` that fails because of it. Exit code 1 if one
survives. Writes docs/results/mutants.md, or mutants_classic.md.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("test_math.py", "test_rewards.py", "test_data.py", "test_update.py", "test_rollout.py")  # catch the most

LLM_FAULTS: list[tuple[str, str, str]] = [  # name, text that occurs once in ppo_llm.py, what it becomes
    ("GAE takes the value of the same token",
     "gamma * next_value - values[:, t]", "gamma * values[:, t] - values[:, t]"),
    ("GAE without lambda", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    ("GAE resets at masked tokens", "delta + gamma * lam * next_advantage, next_advantage)",
     "delta + gamma * lam * next_advantage, 0 * next_advantage)"),
    ("value after a masked token",
     "next_value = torch.where(valid, values[:, t], next_value)", "next_value = values[:, t]"),
    ("returns from one lambda only", "mask, gamma, lam_critic)", "mask, gamma, lam)"),
    ("biased variance in whitening", "* count / (count - 1).clamp(min=1)", "* 1.0"),
    ("whitening forgets the mean", "white = (x - mean) *", "white = x *"),
    ("mean over padding too", "return total / count.clamp(min=1)", "return total / mask.numel()"),
    ("clip has the wrong sign",
     "loss, is_clipped, is_bounded = torch.maximum(", "loss, is_clipped, is_bounded = torch.minimum("),
    ("dual clip on positive advantages", "is_bounded = (advantages < 0) & (loss > bound)", "is_bounded = loss > bound"),
    ("clip_ratio_high ignored", "1 - clip_low, 1 + clip_high)", "1 - clip_low, 1 + clip_low)"),
    ("ratio is not clamped", "(logprobs - old_logprobs).clamp(-20, 20).exp()", "(logprobs - old_logprobs).exp()"),
    ("value loss without its half", "return 0.5 * loss, is_clipped", "return loss, is_clipped"),
    ("value loss takes the better branch", "loss, is_clipped = torch.maximum(loss, clipped)",
     "loss, is_clipped = torch.minimum(loss, clipped)"),
    ("KL in the other direction", "x, kind = logprobs - ref_logprobs,", "x, kind = ref_logprobs - logprobs,"),
    ("k3 with the wrong sign", "(torch.expm1(y) - y)", "(torch.expm1(y) + y)"),
    ("+ forms keep the estimator's gradient", "kind[:-1]).detach() + surrogate", "kind[:-1]) + surrogate"),
    ("full KL reversed", "(logp.exp() * (logp - ref_logp)).sum(-1)", "(ref_logp.exp() * (ref_logp - logp)).sum(-1)"),
    ("controller without its clip", "min(max(kl / self.target - 1, -0.2), 0.2)", "(kl / self.target - 1)"),
    ("controller turned around", "self.coef *= 1 +", "self.coef *= 1 -"),
    ("KL added to the reward", "- kl_coef * kl).masked_fill", "+ kl_coef * kl).masked_fill"),
    ("score on the first token",
     "tokens_after = (mask.long().flip(1).cumsum(1).flip(1) - 1)", "tokens_after = (mask.long().cumsum(1) - 1)"),
    ("grpo divides by the biased deviation",
     "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)"),
    ("rloo keeps its own score in the mean",
     "centred = centred * group_size / (group_size - 1)", "centred = centred * 1"),
    ("length-adaptive lambda upside down", "(1 - 1 / (config.length_adaptive_alpha * mask.sum(1)).clamp(min=1))",
     "(1 / (config.length_adaptive_alpha * mask.sum(1)).clamp(min=1))"),
    ("rows without tokens count", "(lengths > 0).float().sum()", "torch.ones_like(lengths).sum()"),
    ("token-mean over padding", '"token-mean": tokens,', '"token-mean": torch.ones_like(mask).sum(),'),
    ("explained variance from raw squares",
     "masked_mean((x - masked_mean(x, mask)).square(), mask) for x in", "masked_mean(x.square(), mask) for x in"),
    ("temperature left out of training and sampling", "return logits / temperature", "return logits"),
    ("state after the token",
     "[len(prompt) - 1 for prompt in part.prompts]", "[len(prompt) for prompt in part.prompts]"),
    ("the stop token is cut off", "tokens[: counts[slot]], engine", "tokens[: max(1, counts[slot] - 1)], engine"),
    ("positions run on across packed sequences",
     "position = torch.arange(len(row)) - starts[row]", "position = torch.arange(len(row))"),
    ("a slot sees one place too many", "seen = (places <= last)", "seen = (places <= last + 1)"),
    ("sliding window one too wide in decode", "(places > last - (window", "(places >= last - (window"),
    ("sliding window one too wide in training", ".triu(1 - window)", ".triu(-window)"),
    ("flash window one too wide", "window_size=(window - 1, 0) if window", "window_size=(window, 0) if window"),
    ("one random number for a whole response",
     "self.noise[slot, count]", "self.noise[slot, 0 * count]"),
    ("compaction forgets the counts", "for x in (self.token, self.position, self.count,",
     "for x in (self.token, self.position,"),
    ("micro-batches ignore the token budget", "sum(lengths) - length <= c.micro_batch_tokens", "True"),
    ("the start-up check lets everything pass", "fits = found <= tolerance", "fits = True"),
    ("parts of a pass keep the row numbers of the whole", "self.row[tokens] - first, ", "self.row[tokens], "),
    ("weights per micro-batch", "loss, logged = ppo_loss(role, models, part, weights[rows, :width], kl_coef, c)",
     "loss, logged = ppo_loss(role, models, part, loss_weights(part.mask, c.loss_agg_mode, 1.0), kl_coef, c)"),
    ("entropy is punished", "policy_loss - c.entropy_coeff * entropy", "policy_loss + c.entropy_coeff * entropy"),
    ("vf_coef ignored", "else c.vf_coef * value_loss", "else value_loss"),
    ("controller moves before its coefficient is used", "rollout, metrics = collect_rollout(",
     "kl_controller.coef *= 1.2 if config.kl_ctrl_type == 'adaptive' else 1.0; rollout, metrics = collect_rollout("),
    ("a non-finite gradient is applied", "if math.isfinite(grad_norm):", "if True:"),
    ("dropout stays on", 'if "drop" in key or isinstance(module, nn.Dropout):', "if False:"),
    ("updates run in eval mode", "learner.model.train()  # dropout", "learner.model.eval()  # dropout"),
    ("mixed reference swaps its weights", "rollout.ref_logprobs + (1 - w).log(), rollout.old_logprobs + w.log()",
     "rollout.ref_logprobs + w.log(), rollout.old_logprobs + (1 - w).log()"),
    ("strict scoring takes the first number", "found[-1].replace", "found[0].replace"),
    ("resume forgets the KL coefficient", 'return state["step"], state["kl_coef"]', 'return state["step"], 0.001'),
    ("resume forgets the optimizer", "state[self.masters[i]].update((key", "state[self.masters[i]].copy().update((key"),
    ("missing stop token punishes the others", "torch.where(stopped, scores, cut", "torch.where(~stopped, scores, cut"),
    ("adapter not chosen before backward", "self.model.select_adapter()  # a pass", "pass  # a pass"),
    ("reference keeps the adapter", "self.lm.enable_adapters() if self.adapter else self.lm.disable_adapters()",
     "self.lm.enable_adapters()"),
    ("critic trains the policy's adapter", 'LanguageModel(lm, num_tokens, True, config, "critic")',
     'LanguageModel(lm, num_tokens, True, config, "policy")'),
    ("adapters start differently every time", "torch.manual_seed(config.seed)  # peft", "pass  # peft"),
    ("a reward model loses its head as the critic", "critic.value_head.load_state_dict(head", "dict(head"),
    ("a reward function without a deadline",
     "dump_traceback_later(seconds, exit", "dump_traceback_later(seconds + 9, exit"),
    ("a reward process whose end nobody waits for", "settimeout(seconds + 1)", "settimeout(seconds + 9)"),
    ("a killed reward leaves its children", "os.killpg(process.pid, signal.SIGKILL)", "process.kill()"),
    ("a killed reward stays a zombie", "        os.killpg(process.pid, signal.SIGKILL)\n    process.wait()\n",
     "        os.killpg(process.pid, signal.SIGKILL)\n"),
    ("a reward sees all of the environment", "env=self.environment, pass_fds", "env=None, pass_fds"),
    ("a failed row ends the run", "            if self.failed_score is None:\n", "            if True:\n"),
    ("any number of rows may fail", "or len(failed) > max(1, len(texts) // 10)):", "):"),
    ("all rows of a reward that only fails", "if scores.count(None) > max(1, len(columns[0]) // 10):", "if False:"),
    ("a metric may have our name", "name in OUR_MEASURES or", "False or"),
    ("an adapter is resumed on another model", '*["model"] * bool(config.lora_rank)', "*[]"),
    ("adapters are merged in bf16", '{"dtype": torch.float32, "trust', '{"dtype": self.model.lm.dtype, "trust'),
    ("0.0 counts as missing", "enumerate(scores) if not is_number(x)]", "enumerate(scores) if not x]"),
    ("reward model padded with 0", "pad = min(set(range(len(rows) + 1)) - {int(row[-1]) for row in rows})", "pad = 0"),
    ("reward model reads the beginning", "[x[-self.limit :] for x in ids]", "[x[: self.limit] for x in ids]"),
    ("reward model does not see the system prompt", "ids[-limit:], system + messages)", "ids[-limit:], messages)"),
]  # fmt: skip


CLASSIC_FAULTS: list[tuple[str, str, str]] = [  # the same for ppo_classic.py, against tests/test_classic.py
    ("time limit counts as failure", "r.terminated if c.bootstrap_truncated else r.done", "r.done"),
    ("failure bootstraps", "gamma * next_values * (1 - terminated)", "gamma * next_values"),
    ("GAE crosses the end of an episode", "gamma * lam * (1 - done)", "gamma * lam * (1 - terminated)"),
    ("GAE without lambda", "decay, running, advantages = gamma * lam *", "decay, running, advantages = gamma *"),
    ("dummy rows are trained on", "r.valid | (not c.mask_dummy_rows)", "r.valid | True"),
    ("dummy rows count as transitions", "valid, final = ~self.resetting, {}",
     "valid, final = np.ones_like(self.resetting), {}"),
    ("dummy rows in the observation statistics", "update(seen[r.valid])", "update(np.concatenate(seen))"),
    ("dummy rows in the reward scale", "update(discounted[r.valid])", "update(discounted.flatten())"),
    ("SAME_STEP bootstraps from the next episode", "    if r.last:\n", "    if False:\n"),
    ("DISABLED mode never resets", 'options={"reset_mask": done}', 'options={"reset_mask": done & terminated}'),
    ("the final observation is that of the reset", "final = {i: np.array(last[i])", "final = {i: np.array(obs[i])"),
    ("discounted return crosses episodes", "stream.discounted = stream.discounted * ~r.done[t]",
     "stream.discounted = stream.discounted * ~r.terminated[t]"),
    ("clipped rows keep a gradient", "ratio * (clipped + bounded - 1)", "ratio * (bounded - 1)"),
    ("clipped values keep a gradient", "(values - returns) * (1 - value_clipped)", "(values - returns)"),
    ("entropy is punished", "d_logprobs, -c.ent_coef * weights", "d_logprobs, c.ent_coef * weights"),
    ("vf_coef ignored", "d_values = c.vf_coef * weights *", "d_values = weights *"),
    ("the penalty pushes away", "+ kl_coef * (ratio - 1))", "- kl_coef * (ratio - 1))"),
    ("the KL is the other way round", "kl = ratio - 1 - (logprobs - old_logprobs)",
     "kl = 1 / ratio - 1 + (logprobs - old_logprobs)"),
    ("derivative of tanh without its square", "(1 - x * x)", "(1 - x)"),
    ("clipped actions are stored", "r.actions[t] = actions = head.act(agent.policy(r.inputs[t]), noise[t])",
     "r.actions[t] = actions = head.to_env(head.act(agent.policy(r.inputs[t]), noise[t])).reshape(c.num_envs, -1)"),
    ("actions are not clipped", "np.minimum(np.maximum(actions, self.low), self.high)", "actions"),
    ("MultiDiscrete start forgotten", "(actions + self.start)", "actions"),
    ("noise ignored", "noisy = logits + noise", "noisy = logits + 0 * noise"),
    ("advantages normalised with the padding", "count = mask.sum(1, keepdims=True).clip(min=1)",
     "count = np.full((len(mask), 1), mask.shape[1], np.float32)"),
    ("padding rows weigh", 'shuffled["weights"] = mask /', 'shuffled["weights"] = np.ones_like(mask) /'),
    ("rows drawn with replacement", "rng.permutation(rows)", "rng.choice(rows, len(rows))"),
    ("no gradient clipping", "min(1.0, self.max_grad_norm / (norm + 1e-6))", "1.0"),
    ("a non-finite gradient is applied", "if self.failures == 0:", "if True:"),
    ("target_kl ignored", "epochs[-1][3] > c.target_kl", "False"),
    ("advantages never recomputed", "if epochs and c.recompute_advantages:", "if False:"),
    ("statistics do not come back", 'setattr(self.statistics[name], x, tensors.pop(f"{name}.{x}").numpy()[()])',
     'tensors.pop(f"{name}.{x}")'),
    ("resume forgets Adam", "self.moments.copy_(moments)", "pass"),
    ("Adam without its bias correction", "1 - 0.9**self.updates", "1"),
    ("resume forgets the KL coefficient", 'return saved["state"]', 'return saved["state"] | {"kl_coef": c.kl_coef}'),
    ("evaluation takes the first episodes to end", "if left[i] > 0]", "if left.any()]"),
    ("environments of one seed", "generate_state(1)[0] >> 1)", "generate_state(1)[0] * 0)"),
    ("no reset after a checkpoint", '            stream.restart(c.seed, RESET, state["step"])\n', "            pass\n"),
    ("damage goes unnoticed", 'raise ValueError("its hash is another")', "pass"),
    ("a batch may be missing", "if c.total_timesteps < batch:", "if False:"),
]  # fmt: skip
SCRIPTS = {"ppo_llm": LLM_FAULTS, "ppo_classic": CLASSIC_FAULTS}


@dataclass
class Config:
    script: Literal["ppo_llm", "ppo_classic"] = "ppo_llm"  # which file the faults are planted in
    only: str = ""  # run the faults whose name contains this


def tests_of(script: str) -> list[str]:
    """The tests that look at a script, those that catch the most first."""
    if script == "ppo_classic":
        return ["tests/test_classic.py", "--noconftest"]  # conftest.py imports transformers: half of the time
    rest = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    return [f"tests/{x}" for x in dict.fromkeys((*FIRST, *rest)) if x not in ("test_source.py", "test_classic.py")]


def first_failure(script: str, old: str, new: str) -> str:
    """Name of the first failing test with `old` replaced by `new` in the script, or "" if all pass."""
    text = (ROOT / f"{script}.py").read_text()
    assert text.count(old) == 1, f"{text.count(old)} places for {old!r}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "output", "__pycache__", ".venv"))
        (copy / f"{script}.py").write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        command += tests_of(script)
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    assert found, f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return found[1]


def main(config: Config) -> None:
    script, faults = config.script, SCRIPTS[config.script]
    text = (ROOT / f"{script}.py").read_text()
    missing = [name for name, old, _ in faults if text.count(old) != 1]
    assert not missing, f"not one place in {script}.py for: {missing}"
    failure = first_failure(script, "def warn(sentence", "def warn(sentence")
    assert not failure, f"{failure} fails without a fault"
    lines, survivors = ["| fault | caught by |", "|---|---|"], 0
    for name, old, new in faults:
        if config.only not in name:
            continue
        test = first_failure(script, old, new)
        survivors += not test
        lines.append(f"| {name} | {f'`{test}`' if test else '**survives**'} |")
        print(lines[-1], flush=True)
    caught = len(lines) - 2 - survivors
    command = "python scripts/mutants.py" + ("" if script == "ppo_llm" else f" --script {script}")
    lines += ["", f"{caught} of {len(lines) - 2} faults are caught. Command: `{command}`"]
    print(lines[-1])
    if not config.only:
        path = ROOT / "docs" / "results" / ("mutants.md" if script == "ppo_llm" else "mutants_classic.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main(tyro.cli(Config))
