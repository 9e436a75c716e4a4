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
    ("time limit counts as failure", "        terminated,\n        done,\n        c.gamma",
     "        done,\n        done,\n        c.gamma"),
    ("failure bootstraps", "gamma * next_values * (1 - terminated)", "gamma * next_values"),
    ("GAE crosses the end of an episode", "gamma * lam * (1 - done)", "gamma * lam * (1 - terminated)"),
    ("GAE without lambda", "decay = gamma * lam *", "decay = gamma *"),
    ("reset rows are trained on", "np.flatnonzero(valid)", "np.arange(valid.size)"),
    ("reset rows count as transitions", "valid = ~is_reset", "valid = np.ones_like(is_reset)"),
    ("reset rows in the observation statistics", "obs[valid].reshape(valid.sum(), -1)", "obs.reshape(valid.size, -1)"),
    ("reset rows in the reward scale", "discounted[valid][:, None]", "discounted.reshape(-1, 1)"),
    ("SAME_STEP bootstraps from the next episode", 'following[i] = infos["final_obs"][i]', "pass"),
    ("DISABLED mode never resets", '{"reset_mask": self.over}', '{"reset_mask": self.over & terminated}'),
    ("discounted return crosses episodes", "stream.discounted = discounted[t] * ~done[t]",
     "stream.discounted = discounted[t]"),
    ("the scale of rewards is their count", "agent.return_moments[1].item()", "agent.return_moments[2].item()"),
    ("entropy is punished", "policy_loss - c.ent_coef * entropy", "policy_loss + c.ent_coef * entropy"),
    ("vf_coef ignored", "+ c.vf_coef * value_loss", "+ value_loss"),
    ("the penalty pushes away", "loss = loss + kl_coef * kl", "loss = loss - kl_coef * kl"),
    ("the KL is the other way round", "log_ratio = logprobs - batch.logprobs", "log_ratio = batch.logprobs - logprobs"),
    ("clip has the wrong sign", "loss = torch.maximum(unclipped, clipped)", "loss = torch.minimum(unclipped, clipped)"),
    ("dual clip on positive advantages", "is_bounded = (advantages < 0) & (loss > bound)",
     "is_bounded = loss > bound"),
    ("value loss takes the better branch",
     "loss = torch.maximum(loss, clipped)", "loss = torch.minimum(loss, clipped)"),
    ("value loss without its half", "return 0.5 * loss, is_clipped", "return loss, is_clipped"),
    ("advantages with the biased deviation", "advantages.std() + 1e-8", "advantages.std(correction=0) + 1e-8"),
    ("advantages are normalised with clip_vloss", "if c.norm_adv and", "if c.clip_vloss and"),
    ("entropy of the Gaussian without its half", "entropy = constant + 0.5 * self.num_outputs", "entropy = constant"),
    ("log-probs without the deviation", "z = (actions - mean) / self.log_std.exp()", "z = actions - mean"),
    ("components of a MultiDiscrete action share a block", "actions + self.first", "actions + 0 * self.first"),
    ("clipped actions are stored", "actions.append(agent.act(obs[t], rng))",
     "actions.append(agent.head.to_env(agent.act(obs[t], rng)).reshape(c.num_envs, -1).astype('f4'))"),
    ("actions are not clipped", "actions = actions.clip(self.space.low, self.space.high)", "pass"),
    ("far-off bounds are not scaled", "is_far = (low > 0)", "is_far = False & (low > 0)"),
    ("near bounds are scaled", "is_far = (low > 0)", "is_far = (low < 0)"),
    ("bytes are not divided", "            obs = obs / 255\n", "            pass\n"),
    ("bytes in a Dict are not divided", "np.where(is_byte, obs / 255, obs)", "obs.astype(float)"),
    ("pixels are not divided", "            inputs = inputs / 255\n", "            inputs = inputs.float()\n"),
    ("MultiDiscrete start forgotten", "actions = actions + self.space.start", "pass"),
    ("noise ignored", "logits = logits + rng.gumbel(size=logits.shape)", "pass"),
    ("rows drawn with replacement", "rng.permutation(rows)", "rng.choice(rows, rows)"),
    ("one order for all epochs", "order = torch.from_numpy(rng.permutation(rows))",
     "order = torch.from_numpy(default_rng(step).permutation(rows))"),
    ("no gradient clipping", "clip_grad_norm_(parameters, c.max_grad_norm)", "clip_grad_norm_(parameters, 1e9)"),
    ("a non-finite gradient is applied", "if math.isfinite(norm):", "if True:"),
    ("a fourth bad gradient in a row is awaited", "agent.failures == 3", "agent.failures == 4"),
    ("target_kl ignored", "last_kl > c.target_kl", "False"),
    ("the learning rate stands still", "lr = c.learning_rate * left if", "lr = c.learning_rate if"),
    ("the learning rate does not reach Adam", 'agent.optimizer.param_groups[0]["lr"] = lr', "pass"),
    ("resume forgets Adam", "agent.optimizer.state[parameters[int(i)]][key] = tensors.pop(name)", "tensors.pop(name)"),
    ("resume forgets the state", 'run.state |= saved["state"]', 'run.state |= saved["state"] | {"kl_coef": 0.1}'),
    ("no reset after a checkpoint", '            stream.restart(c.seed, RESET, state["step"])\n        if STOP',
     "            pass\n        if STOP"),
    ("statistics move in evaluation", "            stream.step(agent.head.to_env(agent.act(stream.obs, rng)))",
     "            agent.obs_moments[0] += 0.01; stream.step(agent.head.to_env(agent.act(stream.obs, rng)))"),
    ("evaluation takes the first episodes to end", "(stream.over | is_endless) & (left > 0)",
     "(stream.over | is_endless) & left.any()"),
    ("an endless evaluation", "left[is_endless] = 0", "pass"),
    ("environments of one seed", "generate_state(1)[0] >> 1", "generate_state(1)[0] * 0"),
    ("damage goes unnoticed", "all(file_hash(folder / name) == found for", "all(found for"),
    ("what was there is overwritten", "        path.replace(old)\n", "        path.unlink()\n"),
    ("two processes in one folder", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN"),
    ("changed settings go unsaid", "    if changes:\n", "    if False:\n"),
    ("a stop saves nothing", 'or len(STOP) > 0', ""),
    ("a stopped run is a failed one", '"stopped" if isinstance(error, SystemExit) else "failed"', '"failed"'),
    ("an environment that raises costs what was learned", "            save_checkpoint(run, agent)  # the fault",
     "            pass  # the fault"),
    ("a tracker that fails ends the run", "self.send = lambda row, step: None\n\n", "raise\n\n"),
    ("numbers that are not finite go unsaid", "        if len(bad) > 0:\n", "        if False:\n"),
    ("a batch may be missing", "if 0 < c.total_timesteps < rows:", "if False:"),
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
