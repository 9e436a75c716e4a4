"""Plants one-line faults in a copy of a script and shows that the fast tests catch every one.

    python scripts/mutants.py                              # ppo_llm.py
    python scripts/mutants.py --script ppo_classic         # ppo_classic.py
    python scripts/mutants.py --only GAE                   # those whose name contains the word; writes nothing

A row of the table that it writes: the fault, and the first test of `pytest -x -m "not slow"` that fails because of
it. The tests are those of the files that the fault is listed under and, where they pass, all others. A test file
runs in a fork of this process, which has imported torch and transformers already. Exit code 1 if a fault survives.
Writes docs/results/mutants.md, or mutants_classic.md.
"""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # a test file that takes longer hangs: the fault is caught
LEFT_OUT = (  # look at the text, at another script or at the history, which the copy has not
    "test_source.py", "test_classic.py", "test_multigpu.py", "test_benchmark.py", "test_evidence.py")

LLM_FAULTS: dict[str, list[tuple[str, str, str]]] = {  # tests: name, text that occurs once in ppo_llm.py, a fault
    "test_math.py": [
        ("GAE takes the value of the same token",
         "gamma * next_value - values[:, t]", "gamma * values[:, t] - values[:, t]"),
        ("GAE without lambda", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
        ("GAE resets at masked tokens", "delta + gamma * lam * next_advantage, next_advantage)",
         "delta + gamma * lam * next_advantage, 0 * next_advantage)"),
        ("value after a masked token",
         "next_value = torch.where(valid, values[:, t], next_value)", "next_value = values[:, t]"),
        ("returns from one lambda only", "config.gamma, config.lam_critic)", "config.gamma, config.lam)"),
        ("biased variance in whitening", "* count / (count - 1).clamp(min=1)\n    return ((x", "\n    return ((x"),
        ("whitening forgets the mean", "return ((x - mean) * torch.rsqrt", "return (x * torch.rsqrt"),
        ("mean over padding too", "total / count.clamp(min=1)", "total / mask.numel()"),
        ("clip has the wrong sign", "loss = torch.maximum(unclipped, clipped)",
         "loss = torch.minimum(unclipped, clipped)"),
        ("dual clip on positive advantages", "(advantages < 0) & (loss > bound)", "loss > bound"),
        ("clip_ratio_high ignored", "ratio.clamp(1 - clip_low, 1 + clip_high)",
         "ratio.clamp(1 - clip_low, 1 + clip_low)"),
        ("ratio is not clamped", "ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()",
         "ratio = (logprobs - old_logprobs).exp()"),
        ("value loss without its half", "return 0.5 * loss, is_clipped", "return loss, is_clipped"),
        ("value loss takes the better branch", "loss = torch.maximum(loss, clipped)",
         "loss = torch.minimum(loss, clipped)"),
        ("KL in the other direction", "x = logprobs - ref_logprobs", "x = ref_logprobs - logprobs"),
        ("k3 with the wrong sign", "(torch.expm1(y) - y)", "(torch.expm1(y) + y)"),
        ("+ forms keep the estimator's gradient", "return value.detach() + surrogate", "return value + surrogate"),
        ("full KL reversed", "(logp.exp() * (logp - ref_logp)).sum(-1)",
         "(ref_logp.exp() * (ref_logp - logp)).sum(-1)"),
        ("controller without its clip", "min(max(kl / self.target - 1, -0.2), 0.2)", "kl / self.target - 1"),
        ("controller turned around", "self.coef *= 1 + error", "self.coef *= 1 - error"),
        ("KL added to the reward", "scores[:, None] - kl_coef * kl", "scores[:, None] + kl_coef * kl"),
        ("score on the first token",
         "mask.long().flip(1).cumsum(1).flip(1)", "mask.long().cumsum(1)"),
        ("attributed scores do not sum to the score",
         "weights / weights.sum(1, keepdim=True).clamp(min=1e-8)", "weights"),
        ("grpo divides by the biased deviation",
         "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)"),
        ("rloo keeps its own score in the mean", "centred * group_size / (group_size - 1)", "centred * 1"),
        ("rows without tokens count", "(lengths > 0).float().sum()", "torch.ones_like(lengths).sum()"),
        ("token-mean over padding", "return mask / tokens", "return mask / mask.numel()"),
        ("explained variance from raw squares", "(error - masked_mean(error, mask)).square()", "error.square()"),
        ("the cosine ends too soon", "0.5 - 0.5 * math.cos(math.pi * left)", "0.5 - 0.5 * math.cos(left)"),
    ],
    "test_rollout.py": [
        ("temperature left out of training and sampling", "return logits / temperature", "return logits"),
        ("ids beyond the tokenizer are sampled", "(hidden)[..., : self.num_tokens].float()", "(hidden).float()"),
        ("state after the token", "start = len(prompt) - 1", "start = len(prompt)"),
        ("the stop token is cut off", "lengths[rows[ended]] = t + 1", "lengths[rows[ended]] = max(1, t)"),
        ("eos does not end a response", "stop_ids = {tokenizer.eos_token_id, *(", "stop_ids = {*("),
        ("the template's stop token is ignored", "stop_ids.add(ids[0])", "pass"),
        ("any text after a turn is a stop token", "ids and ids[0] in tokenizer.added_tokens_decoder", "ids"),
        ("one random number for a whole response", "noise[rows, t]", "noise[rows, 0]"),
        ("random numbers follow the rows that are left", "noise[rows, t] *", "noise[: len(rows), t] *"),
        ("random numbers follow the sorted batch", "else noise[rows]", "else noise[start : start + len(rows)]"),
        ("sampling ignores the step", 'config.seed, "sampling", step)', 'config.seed, "sampling", 0)'),
        ("sampling takes the token before", "point[:, None], right=True)[:, 0]", "point[:, None])[:, 0] - 1"),
        ("NaN is a token beyond the vocabulary", "token.clamp(max=model.num_tokens - 1)", "token"),
        ("log-probs that are not finite are trained on",
         "sum_over_ranks((~torch.isfinite(x)).sum()) > 0", "False"),
        ("the cache keeps the rows that have ended", "cache.batch_select_indices(going)",
         "cache.batch_select_indices(torch.arange(len(going)))"),
        ("positions count the padding", "position = (mask.cumsum(1) - 1).clamp(min=0)",
         "position = torch.ones_like(mask).cumsum(1) - 1"),
        ("positions stand still", "position = position[:, -1:] + 1", "position = position[:, -1:]"),
        ("padding is attended to", "mask = pad_sequence([torch.ones_like(x) for x in padded]",
         "mask = pad_sequence([torch.ones_like(x) for x in padded], padding_value=1"),
        ("rectangles of any lengths", "lengths[i] > 1.25 * lengths[group[0]]", "lengths[i] > 99 * lengths[group[0]]"),
        ("rectangles of equal lengths only", "lengths[i] > 1.25 * lengths[group[0]]", "lengths[i] > lengths[group[0]]"),
        ("micro-batches ignore the token budget", "(len(group) + 1) * lengths[i] > config.micro_batch_tokens", "False"),
        ("the budget counts no padding", "(len(group) + 1) * lengths[i] > config",
         "lengths[i] + sum(lengths[j] for j in group) > config"),
        ("rows of a micro-batch are not cut", "x[rows, :width] if x.dim() == 2 else x[rows]", "x[rows]"),
        ("a micro-batch takes the first rows", "part[name] = [x[i] for i in rows]", "part[name] = x[: len(rows)]"),
        ("scores of a pass go to other rows", "results[name][rows, : x.shape[1]] = x",
         "results[name][sorted(rows), : x.shape[1]] = x"),
        ("a hook's log-probs are believed",
         'or config.rollout != "builtin":\n        metrics', "or False:\n        metrics"),
        ("bf16 log-probs are the sampler's", "policy.lm.dtype != torch.float32 or", "False or"),
        ("what a hook returns is not checked", "    raise_on_all_ranks(problem)\n    return responses",
         "    return responses"),
        ("the evaluation samples", "respond(models, examples, config, generator=None)",
         "respond(models, examples, config, seeded(\"cpu\", 1))"),
        ("mean pooling sees what comes",
         "hidden.cumsum(1) / counts[:, None]", "hidden.mean(1, keepdim=True) + 0 * hidden"),
        ("mixed reference swaps its weights", "rollout.ref_logprobs + (1 - w).log(), rollout.old_logprobs + w.log()",
         "rollout.ref_logprobs + w.log(), rollout.old_logprobs + (1 - w).log()"),
        ("missing stop token punishes the others", "torch.where(rollout.stopped, scores, scores - ",
         "torch.where(~rollout.stopped, scores, scores - "),
        ("the reference is trained", "copy.deepcopy(lm).requires_grad_(False)", "lm"),
        ("the pass over the vocabulary is not chunked", "max(1, LOGITS_PER_CHUNK // model.num_tokens)", "2**40"),
    ],
    "test_importance.py": [
        ("importance weights turned around", "gap = (old_logprobs - sampled_logprobs)",
         "gap = (sampled_logprobs - old_logprobs)"),
        ("importance weights without their cap", ".exp().clamp(max=cap)", ".exp()"),
        ("importance weights carry a gradient", "(old_logprobs - sampled_logprobs).detach()",
         "(old_logprobs - sampled_logprobs)"),
        ("importance weights are 0 in the padding", ".masked_fill(mask == 0, 0.0)\n    return gap",
         ".masked_fill(mask == 0, -99.0)\n    return gap"),
        ("importance weights are not used", "policy_loss = policy_loss * part.is_weights", "pass"),
    ],
    "test_architectures.py": [
        ("Cohere's scale forgotten", "logits * (getattr(config, \"logit_scale\", None) or 1.0)", "logits"),
        ("Granite's scale forgotten", "logits / (getattr(config, \"logits_scaling\", None) or 1.0)", "logits"),
        ("Gemma 2's cap forgotten", "if cap is not None:", "if False:"),
        ("layers are not recomputed", "if config.gradient_checkpointing:", "if False:"),
        ("longrope is let through", '("longrope", "dynamic")', '("dynamic",)'),
        ("nested rope parameters are not read", "for rope in [ropes, *ropes.values()]", "for rope in [ropes]"),
        ("a state-space model is let through", 'getattr(lm, "_is_stateful", False)', "False"),
        ("NaN in the weights is let through", "if not torch.isfinite(weight).all():", "if False:"),
    ],
    "test_update.py": [
        ("weights per micro-batch", "learner.backward((loss * weights[rows, :width]).sum())",
         "learner.backward((loss * loss_weights(part.mask, config.loss_agg_mode, scale)).sum())"),
        ("entropy is punished", "policy_loss - config.entropy_coeff", "policy_loss + config.entropy_coeff"),
        ("vf_coef ignored", "else config.vf_coef * value_loss", "else value_loss"),
        ("the KL loss is not added", "loss = loss + kl_coef * kl", "loss = loss + 0 * kl"),
        ("gradients of micro-batches replace each other", "gradient if master.grad is None else master.grad + gradient",
         "gradient"),
        ("bf16 weights without fp32 masters", "else w.detach().float() for w", "else w.detach() for w"),
        ("controller moves before its coefficient is used", "kl_coef = kl_controller.coef\n",
         "kl_controller.coef *= 1.2 if config.kl_target else 1.0\n            kl_coef = kl_controller.coef\n"),
        ("a non-finite gradient is applied", "if math.isfinite(grad_norm):", "if True:"),
        ("skipped steps never end the run", "if self.skipped_in_a_row == 3:", "if False:"),
        ("skipped steps add up over the run", "self.skipped_in_a_row = 0\n            self", "self"),
        ("the gradient is not clipped",
         "clip_grad_norm_(self.masters, self.grad_clip)", "clip_grad_norm_(self.masters, 1e9)"),
        ("an early stop still takes its step", 'if metrics["stopped"]:\n        learner', "if False:\n        learner"),
        ("every epoch has the same order", '"shuffle", step, epoch)', '"shuffle", step)'),
        ("the held-out tenth is trained on", "rows = [i for i in rows if i % 10 != 0]", "pass"),
        ("the schedule starts before the actor", "schedule_start = config.critic_warmup", "schedule_start = 0"),
        ("the first ratio is not looked at", "1 + largest_gap(rollout, batch)", "1.0"),
        ("models train in train mode", ".to(device).eval()", ".to(device).train()"),
    ],
    "test_lora.py": [
        ("adapter not chosen before backward", "self.model.select_adapter()  # the reference", "pass  # the reference"),
        ("reference keeps the adapter", "self.lm.disable_adapters()", "pass"),
        ("adapters stay off", "self.lm.enable_adapters()", "pass"),
        ("the adapter of the pass before is kept", "self.lm.set_adapter(self.adapter)", "pass"),
        ("a pass does not choose its adapter", "self.select_adapter()\n        rows", "rows"),
        ("sampling does not choose its adapter", "model.select_adapter()\n    responses", "responses"),
        ("critic trains the policy's adapter", 'LanguageModel(lm, num_tokens, True, config, "critic")',
         'LanguageModel(lm, num_tokens, True, config, "policy")'),
        ("adapters start differently every time", "torch.manual_seed(config.seed)  # peft", "pass  # peft"),
        ("alpha ignored", "lora_alpha=alpha", "lora_alpha=config.lora_rank"),
    ],
    "test_data.py": [
        ("the instruction goes into every question", 'prompt_column == "question" and config.reward == "gsm8k"',
         'prompt_column == "question"'),
        ("answers of other rewards are cut",
         'if config.reward == "gsm8k":\n        answer =', "if True:\n        answer ="),
        ("columns are those of the first row",
         "column for row in rows for column", "column for row in rows[:1] for column"),
        ("a CSV is guessed at", "dtype=str, keep_default_na=False", "keep_default_na=True"),
        ("the assistant's last turn stays", 'while messages[-1]["role"] == "assistant":', "while False:"),
        ("long training prompts are kept", "if len(example.prompt) <= limit]", "]"),
        ("evaluation prompts lose their end", "example.prompt[-limit:]", "example.prompt[:limit]"),
        ("prompts repeat within an epoch",
         "torch.randperm(num_examples,", "torch.randint(num_examples, (num_examples,),"),
    ],
    "test_rewards.py test_reward_scoring.py test_reward_model.py": [
        ("strict scoring takes the first number", 'found[-1].replace(",", "")', 'found[0].replace(",", "")'),
        ("strict scoring reads the whole response", "response[-300:]", "response"),
        ("None is a score of 0",
         "isinstance(x, str):\n        return math.nan", "isinstance(x, str):\n        return 0.0"),
        ("scores that are not finite are trained on", "if not abs(x) < 3e38:", "if False:"),
        ("a metric may have our name", "if name in TAKEN_NAMES or not", "if not"),
        ("reward model padded with 0", "pad = min(set(range(len(rows) + 1)) - last_tokens)",
         "pad = 0"),
        ("reward model reads the beginning", "tokens[-limit:]", "tokens[:limit]"),
        ("reward model does not see the system prompt", "[*example.messages, {", "[*example.messages[-1:], {"),
        ("a reward model loses its head as the critic", "critic.value_head.weight.data.copy_(head.weight)", "pass"),
    ],
    "test_checkpoint.py test_artifacts.py": [
        ("resume forgets the KL coefficient", 'return state["step"], state["kl_coef"]', 'return state["step"], 0.001'),
        ("resume forgets the optimizer", "self.optimizer.state[self.masters[i]][key] = x.to(master.device)", "pass"),
        ("resume forgets the critic", 'models.critic.load(run.checkpoint / "critic.safetensors")', "pass"),
        ("a damaged checkpoint is used", "all(file_hash(folder / name) == found for name, found in hashes.items())",
         "True"),
        ("changed settings are not said", "if changes:", "if False:"),
        ("samples of repeated steps are kept twice", ' and json.loads(x)["step"] <= start]', "]"),
    ],
    "test_reliability.py": [
        ("diverged weights are saved", "        except Diverged:\n            raise\n", ""),
        ("two runs share a folder", "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    ],
}


CLASSIC_FAULTS: dict[str, list[tuple[str, str, str]]] = {"test_classic.py": [  # the same for ppo_classic.py
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
    ("discounted return crosses episodes", "np.where(self.over, 0.0, self.discounted) * self.gamma",
     "self.discounted * self.gamma"),
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
    ("clipped actions are stored", "actions = agent.act(obs, rng)",
     "actions = agent.head.to_env(agent.act(obs, rng)).reshape(c.num_envs, -1).astype('f4')"),
    ("actions are not clipped", "actions = actions.clip(self.space.low, self.space.high)", "pass"),
    ("far-off bounds are not scaled", "is_far = (low > 0)", "is_far = False & (low > 0)"),
    ("near bounds are scaled", "is_far = (low > 0)", "is_far = (low < 0)"),
    ("bytes are not divided", "            obs = obs / 255\n", "            pass\n"),
    ("bytes in a Dict are not divided", "np.where(is_byte, obs / 255, obs)", "obs.astype(float)"),
    ("pixels are not divided", "            inputs = inputs / 255\n", "            inputs = inputs.float()\n"),
    ("MultiDiscrete start forgotten", "*self.space.shape) + self.space.start", "*self.space.shape)"),
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
    ("an environment plays one episode of its share", "left[is_counted] -= 1", "left[is_counted] = 0"),
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
]}

SCRIPTS = {"ppo_llm": LLM_FAULTS, "ppo_classic": CLASSIC_FAULTS}


@dataclass
class Config:
    script: Literal["ppo_llm", "ppo_classic"] = "ppo_llm"  # which file the faults are planted in
    only: str = ""  # run the faults whose name contains this
    workers: int = 2  # faults at a time
    rest: bool = True  # where the listed files pass, run all others too


def run_pytest(folder: Path, files: list[str], log: Path) -> None:
    """In a process of its own: the tests of some files in a copy of the repository."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))  # conftest.py would do it
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    arguments = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-n", "0", "--rootdir", str(folder)]
    if files == ["test_classic.py"]:
        arguments.append("--noconftest")  # conftest.py imports transformers
    code = pytest.main([*arguments, *[f"tests/{name}" for name in files]])
    sys.stdout.flush()
    os._exit(code)


def first_failure(script: str, old: str, new: str, groups: list[list[str]]) -> str:
    """Name of the first failing test with `old` replaced by `new` in the script, or "" if all pass."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "output", "__pycache__", ".venv"))
        path = folder / f"{script}.py"
        path.write_text(path.read_text().replace(old, new))
        for files in groups:
            log = Path(parent) / "log"
            process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(folder, files, log))
            process.start()
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
                return f"{files[0]}: no end after {SECONDS} s"
            if process.exitcode < 0:
                return f"{files[0]}: ended by signal {-process.exitcode}"
            if process.exitcode != 0:
                output = log.read_text()
                found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)
                assert found, f"pytest ended with {process.exitcode}:\n{output[-2000:]}"
                return found[1]
    return ""


def preload() -> None:
    """Imports what ppo_llm.py and its tests import, but not the script itself: forks need not do it again."""
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    import ppo_llm  # noqa: F401

    del sys.modules["ppo_llm"]
    sys.path.pop(0)


def main(config: Config) -> None:
    text = (ROOT / f"{config.script}.py").read_text()
    fast = [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in LEFT_OUT]
    faults = []
    for names, rows in SCRIPTS[config.script].items():
        listed = [name for name in names.split() if (ROOT / "tests" / name).exists()]
        groups = [listed]
        if config.rest and config.script == "ppo_llm":
            groups.append([name for name in fast if name not in listed])
        faults += [(name, old, new, groups) for name, old, new in rows if config.only in name]
    missing = [name for name, old, _, _ in faults if text.count(old) != 1]
    assert not missing, f"not one place in {config.script}.py for: {missing}"
    if config.script == "ppo_llm":
        preload()

    def run(fault) -> str:
        return first_failure(config.script, *fault[1:])

    lines = ["| fault | caught by |", "|---|---|"]
    survivors = 0
    with ThreadPoolExecutor(config.workers) as pool:
        unharmed = {tuple(groups[0]): ("no fault", "", "", groups[:1]) for _, _, _, groups in faults}
        for failure in pool.map(run, unharmed.values()):
            assert not failure, f"{failure} fails without a fault"
        for (name, *_), test in zip(faults, pool.map(run, faults), strict=True):
            survivors += not test
            lines.append(f"| {name} | {f'`{test}`' if test else '**survives**'} |")
            print(lines[-1], flush=True)
    caught = len(faults) - survivors
    command = "python scripts/mutants.py" + ("" if config.script == "ppo_llm" else f" --script {config.script}")
    lines += ["", f"{caught} of {len(faults)} faults are caught. Command: `{command}`"]
    print(lines[-1])
    if not config.only:
        path = ROOT / "docs" / "results" / ("mutants.md" if config.script == "ppo_llm" else "mutants_classic.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main(tyro.cli(Config))
