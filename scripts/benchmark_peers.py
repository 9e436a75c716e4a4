"""Who takes part in benchmark_llm.py: ppo_llm.py, and the other ways to do the same work.

Each builds its models and returns run(laps), which does all its phases once, calls laps.lap(phase) at the end of each,
and returns how many response tokens it has made or trained on.
"""

import copy
import ctypes
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

import ppo_llm  # noqa: E402

PADDED_LOGITS = 2**30  # [rows, T, V] of the padded update has no more elements, 4 GiB in fp32


@dataclass
class Work:
    """What everyone has to do."""

    c: ppo_llm.Config
    shape: dict
    prompts: list[list[int]]
    schedule: dict[tuple, int]  # prompt -> tokens of its response
    tokenizer: transformers.PreTrainedTokenizerBase
    device: torch.device
    models: ppo_llm.Models | None = None  # those of ppo_llm.py, and its latest rollout
    rollout: ppo_llm.Rollout | None = None
    laps: "Laps | None" = None  # of the turn that is going on

    def limits(self, prompts: list[list[int]]) -> Tensor:
        return torch.tensor([self.schedule[tuple(prompt)] for prompt in prompts], device=self.device)

    def make(self, auto_class: type, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(
            "qwen2", **self.shape, max_position_embeddings=32768, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=None, eos_token_id=None, num_labels=1)
        with self.device:
            own = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            return auto_class.from_config(config, dtype=dtype or own).eval()


def memory(device: torch.device, peak: bool = False) -> float:
    """MiB in use, or the most since the last start: tensors on CUDA, else what Linux counts as resident."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    status = Path("/proc/self/status")
    found = re.search(rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) / 1024 if found else float("nan")


class Laps:
    """Seconds of one phase after the other, waited for, and the highest memory in each, in MiB above its start."""

    def __init__(self, device: torch.device, tidy: bool = False):
        self.device, self.tidy, self.seconds, self.peak, self.highest, self.collecting = device, tidy, {}, {}, 0.0, 0.0
        self.start()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif self.tidy and sys.platform == "linux":  # it takes time: not in timed turns
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.before, self.started = memory(self.device), time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase; what follows belongs to the next one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase], highest = time.perf_counter() - self.started, memory(self.device, peak=True)
        self.peak[phase], self.highest = highest - self.before, max(self.highest, highest)
        self.start()

    def sums(self) -> dict:
        """Seconds of both updates together and, if there is a rollout before them, of the step."""
        x = self.seconds
        if "update critic" in x:
            x = x | {"update": x["update actor"] + x["update critic"]}
        step = sum(self.seconds.values())
        return x | ({"step": step, "step without gc": step - self.collecting} if "scoring" in x else {})


def scheduled(work: Work, decode: Callable) -> Callable:
    """ppo_llm.decode, whose responses end at their scheduled length instead of at a stop token."""

    def scheduled_decode(model, prompts: list[list[int]], *rest):
        limits = work.limits(prompts)  # of the rows that have not ended
        count = 0

        def is_end(tokens: Tensor, stop: Tensor) -> Tensor:
            nonlocal limits, count
            count += 1
            ended = limits == count
            limits = limits[~ended]
            return ended

        with patch.object(torch, "isin", is_end):
            return decode(model, prompts, *rest)

    return scheduled_decode


def ours(work: Work) -> Callable:
    c = work.c
    size = work.shape["vocab_size"]
    lm = work.make(AutoModelForCausalLM)
    trunk = work.make(AutoModel)

    def timed_generate(*arguments):
        result = ppo_llm.generate(*arguments)
        work.laps.lap("rollout")
        return result

    reference = ppo_llm.LanguageModel(copy.deepcopy(lm).requires_grad_(False), size, False, c)
    actor = ppo_llm.Learner(ppo_llm.LanguageModel(lm, size, False, c), c.lr, c.critic_lr, c)
    critic = ppo_llm.Learner(ppo_llm.LanguageModel(trunk, size, True, c), c.critic_lr, c.critic_lr, c)
    work.models = ppo_llm.Models(actor, critic, reference, work.tokenizer, {-1}, timed_generate)  # -1: none stops
    examples = [ppo_llm.Example("", "", prompt) for prompt in work.prompts]

    def run(laps: Laps) -> int:
        work.laps = laps
        with patch.object(ppo_llm, "decode", scheduled(work, ppo_llm.decode)):
            work.rollout, _ = ppo_llm.collect_rollout(
                work.models, lambda examples, responses: [0.5] * len(responses), examples, 0, c.kl_coef, c)
        laps.lap("scoring")
        for role in ("critic", "actor"):
            ppo_llm.update(role, work.models, work.rollout, 0, 1000, c.kl_coef, c)
            laps.lap(f"update {role}")
        return int(work.rollout.mask.sum())

    return run


def load_before(file: Path | None = None, commit: str = "dc3ee96") -> ModuleType:
    """ppo_llm.py as it was with its inference engine and packed attention: from a file, else out of the history."""
    if file is None:
        git = ["git", "show", f"{commit}:ppo_llm.py"]
        shown = subprocess.run(git, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
        source = shown.stdout
    else:
        source = file.read_text()
    module = ModuleType("ppo_llm_before")
    module.__file__ = ppo_llm.__file__
    sys.modules["ppo_llm_before"] = module
    exec(compile(source, "ppo_llm_before.py", "exec"), module.__dict__)
    return module


def config_before(old: ModuleType, c: ppo_llm.Config):
    """The same settings for the version with the engine, as far as it has them."""
    names = {field.name for field in dataclasses.fields(old.Config)}
    return old.Config(**{name: x for name, x in vars(c).items() if name in names and name != "resume"})


def scheduled_engine(old: ModuleType, work: Work) -> type:
    """The engine, whose responses end at their scheduled length."""

    class ScheduledEngine(old.Engine):
        def __init__(self, model, room: tuple[int, int], *rest):
            self.limits = torch.zeros(room[0], dtype=torch.long, device=work.device)
            super().__init__(model, room, *rest)

        def prefill(self, slots: list[int], prompts: list[list[int]], noise: Tensor | None) -> None:
            self.limits[slots] = work.limits(prompts)
            super().prefill(slots, prompts, noise)

        def choose(self, hidden: Tensor, slot: Tensor) -> None:
            super().choose(hidden, slot)
            self.done[slot] |= self.count[slot] == self.limits[slot]

        def move_to_front(self, slots: list[int]) -> None:
            super().move_to_front(slots)
            self.limits[: len(slots)] = self.limits[slots]

    return ScheduledEngine


def before(work: Work) -> Callable:
    """The version with the engine (KV slots, refill, packed attention), whose code is in the history."""
    old = load_before()
    c = config_before(old, work.c)
    size = work.shape["vocab_size"]
    lm = work.make(AutoModelForCausalLM)
    trunk = work.make(AutoModel)

    engine = scheduled_engine(old, work)
    reference = old.LanguageModel(copy.deepcopy(lm).requires_grad_(False), size, False, c)
    actor = old.Learner(old.LanguageModel(lm, size, False, c), c.lr, c.critic_lr, c)
    critic = old.Learner(old.LanguageModel(trunk, size, True, c), c.critic_lr, c.critic_lr, c)
    models = old.Models(actor, critic, reference, work.tokenizer, {-1})
    examples = [old.Example("", "", prompt) for prompt in work.prompts]
    generate = old.generate

    def run(laps: Laps) -> int:
        def timed_generate(*arguments):
            result = generate(*arguments)
            laps.lap("rollout")
            return result

        with patch.multiple(old, Engine=engine, generate=timed_generate):
            rollout, _ = old.collect_rollout(
                models, lambda prompts, responses, answers: [0.5] * len(responses), examples, 0, c.kl_coef, c)
        laps.lap("scoring")
        for role in ("critic", "actor"):
            old.update(role, models, rollout, 0, 1000, c.kl_coef, c)
            laps.lap(f"update {role}")
        return int(rollout.mask.sum())

    return run


def stop_at(ends: Tensor) -> transformers.StoppingCriteriaList:
    return transformers.StoppingCriteriaList([lambda ids, scores, **others: ids.shape[1] >= ends])


def neutral(work: Work, **settings) -> transformers.GenerationConfig:
    """Plain sampling from the model's distribution."""
    return transformers.GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                                         max_new_tokens=max(work.schedule.values()), **settings)


def generate_all(cache: str, work: Work) -> Callable:
    """transformers' generate on all rows at once, left-padded; it ends with the longest response."""
    lm, settings = work.make(AutoModelForCausalLM), neutral(work, cache_implementation=cache)

    def run(laps: Laps) -> int:
        batch = work.tokenizer.pad({"input_ids": work.prompts}, return_tensors="pt").to(work.device)
        limits, width = work.limits(work.prompts), batch["input_ids"].shape[1]
        output = lm.generate(**batch, generation_config=settings, stopping_criteria=stop_at(limits + width))
        laps.lap("rollout")
        return int(limits.clamp(max=output.shape[1] - width).sum())

    return run


def generate_batch(work: Work) -> Callable:
    """transformers' continuous batching, set up once, with room for all rows at a time and no pages shared."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager

    lm, add_request = work.make(AutoModelForCausalLM), Manager.add_request
    settings = transformers.ContinuousBatchingConfig(
        num_blocks=sum(len(p) // 256 + n // 256 + 2 for p, n in work.schedule.items()), allow_block_sharing=False,
        max_batch_tokens=min(8192, max(256, sum(map(len, work.prompts)))))

    def add_scheduled(manager, input_ids: list[int], **options):
        return add_request(manager, input_ids, **options | {"max_new_tokens": work.schedule[tuple(input_ids)]})

    def run(laps: Laps) -> int:
        with patch.object(Manager, "add_request", add_scheduled):
            results = lm.generate_batch(work.prompts, generation_config=neutral(work, eos_token_id=-1),
                                        continuous_batching_config=settings, persistent_manager=True)
        laps.lap("rollout")
        errors = [str(result.error) for result in results.values() if result.error]
        if errors or len(results) < len(work.prompts):
            raise RuntimeError(errors[0] if errors else "it returned without all results")
        return sum(len(result.generated_tokens) for result in results.values())

    return run


def padded_losses(role: str, modules: dict, part: ppo_llm.Rollout, c: ppo_llm.Config) -> Tensor:
    """Of each token, [B, T]: left-padded prompts, right-padded responses, all logits of the responses at once."""
    device, width = part.mask.device, part.mask.shape[1]
    prompts, responses = ([torch.tensor(ids) for ids in rows] for rows in (part.prompts, part.responses))
    ones = pad_sequence([torch.ones_like(ids) for ids in prompts], True, padding_side="left")
    ids = torch.cat([pad_sequence(prompts, True, padding_side="left"), pad_sequence(responses, True)], 1).to(device)
    seen = torch.cat([ones.to(device), part.mask.long()], 1)
    inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        if role == "critic":
            trunk, head = modules["critic"]
            values = head(trunk(**inputs, use_cache=False).last_hidden_state[:, -width - 1 : -1]).float()[..., 0]
            return ppo_llm.clipped_value_loss(values, part.old_values, part.returns, c.cliprange_value)[0]
        logits = modules["actor"](**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    logp = logits.float().log_softmax(-1)  # [B, T, V]
    logprobs, entropy = logp.gather(2, ids[:, -width:, None])[..., 0], -(logp.exp() * logp).sum(-1)
    clips = c.clip_ratio, c.clip_ratio, c.clip_ratio_c
    loss = ppo_llm.clipped_policy_loss(logprobs, part.old_logprobs, part.advantages, *clips)[0]
    return loss - c.entropy_coeff * entropy


def padded(work: Work) -> Callable:
    """The update as one writes it first: padded passes, AdamW, autocast on CUDA."""
    c = work.c
    actor, trunk = (work.make(kind, torch.float32) for kind in (AutoModelForCausalLM, AutoModel))
    head = nn.Linear(trunk.config.hidden_size, 1, device=work.device)
    modules = {"critic": nn.ModuleList([trunk, head]), "actor": actor}
    optimizers = {role: torch.optim.AdamW(module.parameters(), lr=c.lr) for role, module in modules.items()}
    rows_at_once = max(1, PADDED_LOGITS // (c.max_response_length * work.shape["vocab_size"]))

    def train(role: str, batch: Tensor) -> int:
        parts = [work.rollout.take(rows.tolist()) for rows in batch.split(rows_at_once)]
        for part in parts:
            loss = (padded_losses(role, modules, part, c) * part.mask).sum() / work.rollout.mask[batch].sum()
            loss.backward()
        nn.utils.clip_grad_norm_(modules[role].parameters(), c.grad_clip)
        optimizers[role].step()
        optimizers[role].zero_grad()
        return sum(len(response) for part in parts for response in part.responses)

    def run(laps: Laps) -> int:
        tokens = 0
        for role in modules:
            for _ in range(c.ppo_epochs):
                batches = torch.randperm(len(work.prompts)).split(c.ppo_mini_batch_size)
                tokens += sum(train(role, batch) for batch in batches)
            laps.lap(f"update {role}")
        return tokens // (2 * c.ppo_epochs)

    return run


class FreeReward(nn.Module):
    """What TRL takes for a reward model, at no cost."""

    base_model_prefix = "backbone"

    def backbone(self, input_ids: Tensor, **others) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[torch.ones(*input_ids.shape, 1, device=input_ids.device)])

    def score(self, states: Tensor) -> Tensor:
        return states


def trl_trainer(work: Work) -> Callable:
    """TRL's PPOTrainer: one call of train() is one update. The first, which also imports, is left out."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo import ppo_trainer as module

    c, policy, data = work.c, work.make(AutoModelForCausalLM), Dataset.from_dict({"input_ids": work.prompts})
    generate, batch_generation, forward = policy.generate, module.batch_generation, module.forward
    collect, counted = module.gc.collect, {}

    def generate_scheduled(input_ids: Tensor, attention_mask: Tensor, **options):
        """Row i stops at its scheduled length; padding follows, which no token before it may look like."""
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        limits, width = work.limits([ids[seen].tolist() for ids, seen in rows]), input_ids.shape[1]
        output = generate(input_ids=input_ids, attention_mask=attention_mask, **options,
                          stopping_criteria=stop_at(limits + width))
        inside = torch.arange(output.sequences.shape[1] - width, device=limits.device) < limits[:, None]
        output.sequences[:, width:] = torch.where(inside, output.sequences[:, width:].clamp(min=1), 0)
        counted["tokens"] += int(inside.sum())
        return output

    policy.generate = generate_scheduled
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder, report_to="none", save_strategy="no", lr_scheduler_type="constant", learning_rate=c.lr,
            use_cpu=work.device.type == "cpu", bf16=work.device.type == "cuda", gradient_checkpointing=False,
            per_device_train_batch_size=c.train_batch_size, gradient_accumulation_steps=1, num_ppo_epochs=c.ppo_epochs,
            num_mini_batches=c.train_batch_size // c.ppo_mini_batch_size, total_episodes=c.train_batch_size,
            local_rollout_forward_batch_size=min(64, c.train_batch_size), temperature=c.temperature, kl_coef=c.kl_coef,
            response_length=max(work.schedule.values()), num_sample_generations=0, disable_tqdm=True)
        trainer = PPOTrainer(
            args=settings, processing_class=work.tokenizer, model=policy, ref_model=work.make(AutoModelForCausalLM),
            reward_model=FreeReward(), value_model=work.make(AutoModelForSequenceClassification), train_dataset=data,
            eval_dataset=data.select([0]))
    trainer.accelerator.print = lambda *words: None
    trainer.remove_callback(transformers.PrinterCallback)

    def run(laps: Laps) -> int:
        counted["tokens"] = 0

        def timed_generation(*arguments):
            result = batch_generation(*arguments)
            laps.lap("rollout")
            return result

        def timed_forward(*arguments):
            if torch.is_grad_enabled() and "scoring" not in laps.seconds:
                laps.lap("scoring")  # all before the first pass of the update
            return forward(*arguments)

        def timed_collect() -> None:
            started = time.perf_counter()
            collect()
            laps.collecting += time.perf_counter() - started

        with (patch.multiple(module, batch_generation=timed_generation, forward=timed_forward),
              patch.object(module.gc, "collect", timed_collect)):
            trainer.train()
        laps.lap("update")
        return counted["tokens"]

    run(Laps(work.device))
    return run


PEERS = {  # how a peer is called, and the phase in whose place it stands if it cannot run
    "dynamic": ("generate, dynamic cache", "rollout", partial(generate_all, "dynamic")),
    "static": ("generate, static cache", "rollout", partial(generate_all, "static")),
    "before": ("dc3ee96, with its engine", "step", before),
    "batch": ("generate_batch", "rollout", generate_batch), "padded": ("padded PyTorch", "update", padded),
    "trl": ("TRL PPOTrainer", "step", trl_trainer)}
