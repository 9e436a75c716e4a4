"""Plants one-line faults in a copy of ppo_llm.py and shows that the fast tests catch every one.

    python scripts/mutants.py                 # all, about 15 minutes on 2 cores; writes docs/results/mutants.md
    python scripts/mutants.py --only GAE      # those whose name contains the word; writes nothing

Each row: the fault, and the first test of `pytest -x -m "not slow"` that fails because of it. Exit code 1 if one
survives.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("test_math.py", "test_rewards.py", "test_data.py", "test_update.py", "test_rollout.py")  # catch the most

FAULTS: list[tuple[str, str, str]] = [  # name, text that occurs once in ppo_llm.py, what it becomes
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
    ("the start-up check lets everything pass", "if found <= tolerance:", "if True:"),
    ("weights per micro-batch", "loss, logged = loss_of(models, part, weights[rows, :width], kl_coef, c)",
     "loss, logged = loss_of(models, part, loss_weights(part.mask, c.loss_agg_mode, 1.0), kl_coef, c)"),
    ("entropy is punished", "loss = loss - c.entropy_coeff * entropy", "loss = loss + c.entropy_coeff * entropy"),
    ("vf_coef ignored", "loss = loss + c.vf_coef * value_loss", "loss = loss + value_loss"),
    ("controller moves before its coefficient is used", "rollout, metrics = collect_rollout(",
     "kl_controller.coef *= 1.2 if config.kl_ctrl_type == 'adaptive' else 1.0; rollout, metrics = collect_rollout("),
    ("a non-finite gradient is applied", "if math.isfinite(grad_norm):", "if True:"),
    ("dropout stays on", 'if "drop" in key or isinstance(module, nn.Dropout):', "if False:"),
    ("updates run in eval mode", "learner.model.train()  # dropout", "learner.model.eval()  # dropout"),
    ("mixed reference swaps its weights", "rollout.ref_logprobs + (1 - w).log(), rollout.old_logprobs + w.log()",
     "rollout.ref_logprobs + w.log(), rollout.old_logprobs + (1 - w).log()"),
    ("strict scoring takes the first number", "found[-1].replace", "found[0].replace"),
    ("resume forgets the KL coefficient", 'return state["step"], state["kl_coef"]', 'return state["step"], 0.001'),
    ("resume forgets the optimizer", "[int(index)]][key] = x", '[int(index)]][key] = x * (key == "weight")'),
    ("missing stop token punishes the others", "torch.where(stopped, scores, cut", "torch.where(~stopped, scores, cut"),
]  # fmt: skip


@dataclass
class Config:
    only: str = ""  # run the faults whose name contains this


def first_failure(old: str, new: str) -> str:
    """Name of the first failing test with `old` replaced by `new` in ppo_llm.py, or "" if all pass."""
    text = (ROOT / "ppo_llm.py").read_text()
    assert text.count(old) == 1, f"{text.count(old)} places for {old!r}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "output", "__pycache__", ".venv"))
        (copy / "ppo_llm.py").write_text(text.replace(old, new))
        tests = [f"tests/{name}" for name in FIRST]
        tests += [f"tests/{p.name}" for p in sorted((copy / "tests").glob("test_*.py"))
                  if p.name not in (*FIRST, "test_source.py")]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    assert found, f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return found[1]


def main(config: Config) -> None:
    text = (ROOT / "ppo_llm.py").read_text()
    missing = [name for name, old, _ in FAULTS if text.count(old) != 1]
    assert not missing, f"not one place in ppo_llm.py for: {missing}"
    failure = first_failure("def warn(sentence", "def warn(sentence")
    assert not failure, f"{failure} fails without a fault"
    lines, survivors = ["| fault | caught by |", "|---|---|"], 0
    for name, old, new in FAULTS:
        if config.only not in name:
            continue
        test = first_failure(old, new)
        survivors += not test
        lines.append(f"| {name} | {f'`{test}`' if test else '**survives**'} |")
        print(lines[-1], flush=True)
    caught = len(lines) - 2 - survivors
    lines += ["", f"{caught} of {len(lines) - 2} faults are caught. Command: `python scripts/mutants.py`"]
    print(lines[-1])
    if not config.only:
        path = ROOT / "docs" / "results" / "mutants.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main(tyro.cli(Config))
