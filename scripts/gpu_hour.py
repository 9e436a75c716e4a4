"""What is worth measuring on one GPU of 80 GB: one command, and the same again to go on where it stopped.

    python scripts/gpu_hour.py                     # all of it; writes docs/results/gpu/*.csv
    python scripts/gpu_hour.py --only decode       # only the files or rows whose name contains the word
    python scripts/gpu_hour.py --minutes 9         # begins no row after 9 minutes; the next call goes on
    python scripts/gpu_hour.py --dry_run           # tiny shapes on the CPU, half a minute
    python scripts/gpu_hour.py --before FILE       # without the history: FILE is ppo_llm.py of commit dc3ee96

It should take about 25 minutes: that is an estimate. A row is one measurement. A row that is finished,
with the ppo_llm.py that stands and on the same kind of machine, is not measured again; one that failed
is. What does not fit says "out of memory", and is finished too. Weights are random but for the demo's.
Random weights do not stop by themselves: where lengths are those of GSM8K, the response to each prompt
has a length from the schedule of benchmark_llm.py.

smoke.csv   Does CUDA do what the CPU does? "greedy tokens": of how many held-out responses of the demo,
            in fp32, all tokens are the CPU's. "two steps": distance of the first ratio from 1, and the
            first KL, in fp32.
demo.csv    The demo in fp32 and in bf16: score before and after with its standard error, seconds of the
            whole run and of a step (median), distance of the first ratio from 1; in bf16 also the mean
            over steps, and the largest, of logprob_gap and of the importance weights. In bf16 the passes
            of scoring and of the update round differently, so that the first ratio is not exactly 1.
shape.csv   Two steps with the published settings and Qwen2.5-0.5B's shape in bf16, prompts of 158 and
            responses of 512 tokens: distance of the first ratio from 1, mismatch of sampled and scored
            probabilities, tokens per second of each phase (rollout: response tokens; scoring: of prompts
            and responses, which three models or passes read; updates: as many, trained on), peak memory.
step.csv    Seconds of the published step, 256 prompts of 50 to 158 and responses of 44 to 512 tokens:
            the median of the steps after the first, the shortest, the longest, and the medians of the
            phases.
decode.csv  Generation alone, as in step.csv, at 64 and 256 rows: the plain loop, the same loop with a
            StaticCache and a compiled step, and the engine of dc3ee96. Response tokens per second of the
            faster of two timed turns, the seconds of both and of the first (which compiles and
            captures), peak memory above the start. Then how many responses are the plain loop's token by
            token, the share of tokens before the first difference, and the mean distance of the
            probabilities of those. In bf16 rounding parts them; the rows in fp32 show whether anything
            else does.
memory.csv  Peak memory of a rollout and of an update at full length (64 prompts of 1024, responses of
            512 tokens) beside the one that scripts/memory.py counts. reserved_gib is what the allocator
            took from the card.
"""

import contextlib
import csv
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import benchmark_llm
import memory
import table_hash
import torch
import tyro
from benchmark_peers import Laps, Work, config_before, load_before, scheduled, scheduled_engine
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, StaticCache

import ppo_llm  # benchmark_peers has put the repository on the path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
QWEN = {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHAPES = {
    "0.5B": {**QWEN, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
             "tie_word_embeddings": True},
    "1.5B": {**QWEN, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936,
             "tie_word_embeddings": True},
    "7B": {**QWEN, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
           "tie_word_embeddings": False},
    "tiny": {**QWEN, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 64,
             "tie_word_embeddings": True},
}
LAST_COLUMNS = ["note", "machine", "code"]
MISMATCH = ["rollout/logprob_gap", "rollout/is_weight_mean", "rollout/is_weight_max", "rollout/is_capped"]


@dataclass
class Config:
    dry_run: bool = False  # tiny shapes on the CPU: shows only that everything runs
    only: str = ""  # rows or files whose name contains this
    minutes: float = 60.0  # no row begins later than this
    before: Path | None = None  # ppo_llm.py of dc3ee96, where git cannot show it
    results: Path | None = None  # None: docs/results/gpu, with dry_run output/gpu_hour/results
    output: Path = ROOT / "output" / "gpu_hour"  # runs, and the tokens that decode compares

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def folder(self) -> Path:
        if self.results:
            return self.results
        return self.output / "results" if self.dry_run else ROOT / "docs" / "results" / "gpu"


# ---- What the measurements share -------------------------------------------------------------------------


class NoText:
    """Stands for the tokenizer of random weights: as many tokens as the model has, and no text."""

    eos_token_id = None
    chat_template = None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch_decode(self, responses: list[list[int]], **options) -> list[str]:
        return ["" for _ in responses]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]


@contextlib.contextmanager
def random_weights(shape: dict, device: torch.device) -> Iterator[Path]:
    """A model folder without weights: inside the block, loading it makes random ones on the device."""
    model_config = AutoConfig.for_model("qwen2", **shape)

    def make(auto_class: type, name: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
        torch.manual_seed(1)
        with device:
            return auto_class.from_config(model_config, dtype=dtype)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        model_config.save_pretrained(folder)
        for auto_class in (AutoModel, AutoModelForCausalLM):
            patches.enter_context(patch.object(auto_class, "from_pretrained", partial(make, auto_class)))
        yield Path(folder)


def build(shape: dict, c: ppo_llm.Config, device: torch.device) -> ppo_llm.Models:
    """Policy, critic and reference with random weights, from ppo_llm.build_models; no token stops."""
    with random_weights(shape, device) as folder:
        models = ppo_llm.build_models(NoText(shape["vocab_size"]), replace(c, model=str(folder)))
    models.stop_ids = {-1}
    return models


def coin(examples: list, responses: list) -> list[float]:
    """A reward that differs between responses: 0, 1, 0, 1 and so on."""
    return [float(i % 2) for i in range(len(responses))]


def train_steps(
    models: ppo_llm.Models, prompts: list[list[int]], c: ppo_llm.Config, count: int, work: Work | None = None
) -> list[dict]:
    """The metrics of some steps on the same prompts; with a Work, responses end at their scheduled length."""
    examples = [ppo_llm.Example("", "", prompt) for prompt in prompts]
    decode = scheduled(work, ppo_llm.decode) if work else ppo_llm.decode
    history = []
    for step in range(count):
        with patch.object(ppo_llm, "decode", decode):
            rollout, metrics = ppo_llm.collect_rollout(models, coin, examples, step, c.kl_coef, c)
        for role in ("critic", "actor"):
            metrics |= ppo_llm.update(role, models, rollout, step, count, c.kl_coef, c)
        metrics["response_tokens"] = rollout.mask.sum()
        history.append({name: float(x) for name, x in metrics.items()})
    return history


def tidy(device: torch.device) -> None:
    """Gives back what the row before has left."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reserved_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / GIB
    return None


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, vocabulary, (count, length), generator=generator).tolist()


def gsm8k_work(config: Config, rows: int | None = None) -> Work:
    """Prompts and lengths of responses as in GSM8K; rows None: a whole step."""
    size = "quick" if config.dry_run else "qwen"
    c = benchmark_llm.STEPS[size]
    if not config.dry_run:
        c = replace(c, max_prompt_length=158)  # the longest: the engine makes room for as much
    if rows is not None:
        c = replace(c, train_batch_size=rows, rollout_slots=rows)
    return benchmark_llm.make_work(size, "ragged" if config.dry_run else "gsm8k", config.device, c)


# ---- The measurements: each returns rows -----------------------------------------------------------------


def demo_config(config: Config, **changes) -> ppo_llm.Config:
    c = replace(ppo_llm.DEMO, device=str(config.device), **changes)
    if config.dry_run:
        c = replace(c, total_steps=2, train_batch_size=8, ppo_mini_batch_size=4, ppo_epochs=1,
                    max_response_length=8, eval_size=4)
    return c


def greedy_tokens(config: Config) -> list[dict]:
    """Greedy responses of the demo's model in fp32, on the device and on the CPU."""
    responses = []
    for device in ("cpu", str(config.device)):
        c = replace(demo_config(config), device=device, dtype="float32")
        tokenizer = ppo_llm.load_tokenizer(c)
        _, evals = ppo_llm.load_examples(tokenizer, c)
        models = ppo_llm.build_models(tokenizer, c)
        responses.append(ppo_llm.respond(models, evals[:64], c, None).responses)
    same = sum(a == b for a, b in zip(*responses, strict=True))
    return [{"responses": len(responses[0]), "same_responses": same, "passed": same == len(responses[0])}]


def read_run(folder: Path) -> list[dict]:
    """training_metrics.csv of a run, without what was not measured."""
    with (folder / "training_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        found.append({name: float(x) for name, x in row.items() if x})
    return found


def run_demo(config: Config, c: ppo_llm.Config) -> list[dict]:
    """ppo_llm.main from the beginning; the rows of its training_metrics.csv."""
    with tempfile.TemporaryDirectory() as folder:
        ppo_llm.main(replace(c, output_dir=f"{folder}/run"))
        return read_run(Path(folder) / "run")


def two_steps(config: Config) -> list[dict]:
    """The first ratio must be 1 and the first KL 0: sampling, scoring and training are the same policy."""
    rows = run_demo(config, demo_config(config, total_steps=2, dtype="float32", eval_every=0))
    ratio_gap = max(abs(row["policy/ratio_first"] - 1) for row in rows)
    first_kl = abs(rows[0]["reward/kl"])
    return [{"ratio_gap": ratio_gap, "first_kl": first_kl, "passed": ratio_gap < 1e-4 and first_kl < 1e-4}]


def demo(config: Config, dtype: str) -> list[dict]:
    """The whole demo in one dtype."""
    started = time.perf_counter()
    rows = run_demo(config, demo_config(config, dtype=dtype))
    row = {"dtype": dtype, "seconds": time.perf_counter() - started}
    scored = [row for row in rows if "eval/score" in row]
    for name, found in (("before", scored[0]), ("after", scored[-1])):
        row[name] = found["eval/score"]
        row[f"{name}_standard_error"] = found["eval/standard_error"]
    steps = [row for row in rows if "policy/ratio_first" in row]
    row["step_seconds"] = statistics.median(x["rollout/tokens"] / x["time/tokens_per_second"] for x in steps)
    row["ratio_gap"] = max(abs(x["policy/ratio_first"] - 1) for x in steps)
    for name in MISMATCH:
        values = [x[name] for x in steps if name in x]
        if values:
            short = name.removeprefix("rollout/")
            row[f"{short}_mean"] = statistics.mean(values)
            row[f"{short}_largest"] = max(values)
    return [row]


def phases(metrics: dict) -> dict[str, float]:
    """Seconds of the phases of a step."""
    return {"rollout": metrics["time/rollout"], "scoring": metrics["time/score"],
            "update_critic": metrics["time/update_critic"], "update_actor": metrics["time/update_actor"]}


def published_settings(config: Config) -> list[dict]:
    """Two steps of the published settings at full length, one row each."""
    shape = SHAPES["tiny" if config.dry_run else "0.5B"]
    c = benchmark_llm.STEPS["quick" if config.dry_run else "qwen"]
    c = replace(c, device=str(config.device), dtype="bfloat16")
    prompts = random_prompts(c.train_batch_size, 16 if config.dry_run else 158, shape["vocab_size"])
    laps = Laps(config.device, tidy=True)
    models = build(shape, c, config.device)
    history = train_steps(models, prompts, c, 2)
    laps.lap("steps")
    rows = []
    for number, metrics in enumerate(history, 1):
        ratio_gap = abs(metrics["policy/ratio_first"] - 1)
        row = {"step": number, "ratio_gap": ratio_gap, "kl": metrics["reward/kl"]}
        for name in MISMATCH:
            row[name.removeprefix("rollout/")] = metrics[name]
        tokens = metrics["rollout/tokens"]
        for name, seconds in phases(metrics).items():
            read = tokens
            if name == "rollout":
                read = metrics["response_tokens"]
            if name.startswith("update"):
                read = tokens * c.ppo_epochs
            row[f"{name}_tokens_per_s"] = read / seconds
        rows.append(row | {"peak_gib": laps.highest / 1024, "reserved_gib": reserved_gib(config.device)})
    return rows


def published_step(config: Config) -> list[dict]:
    """Seconds of the published step at GSM8K's lengths; the first one warms up."""
    work = gsm8k_work(config)
    c = replace(work.c, device=str(config.device))
    models = build(SHAPES["tiny" if config.dry_run else "0.5B"], c, config.device)
    history = train_steps(models, work.prompts, c, 2 if config.dry_run else 4, work)[1:]
    seconds = [sum(phases(metrics).values()) for metrics in history]
    row = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    row["steps"] = len(seconds)
    for name in phases(history[0]):
        row[name] = statistics.median(phases(metrics)[name] for metrics in history)
    tokens = history[0]["rollout/tokens"]
    return [row | {"responses_per_s": len(work.prompts) / row["seconds"], "tokens": tokens,
                   "tokens_per_s": tokens / row["seconds"], "reserved_gib": reserved_gib(config.device)}]


class StaticLoop:
    """ppo_llm.decode with a StaticCache and a compiled step; rows that have ended stay until all have."""

    def __init__(self, backend: str):
        mode = "reduce-overhead" if backend == "inductor" else None  # CUDA graphs
        self.step = torch.compile(self.choose, backend=backend, mode=mode, dynamic=False)
        self.cache = None  # kept from one call to the next: its addresses are in the graphs

    def choose(
        self, model: ppo_llm.LanguageModel, ids: Tensor, mask: Tensor, position: Tensor, noise: Tensor,
        cache: StaticCache,
    ) -> tuple[Tensor, Tensor]:
        """The next token of each row, where its random number falls in the cumulated distribution."""
        output = model.lm.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        logp = model.logits(output.last_hidden_state[:, -1], 1.0).log_softmax(-1)
        cumulated = logp.exp().cumsum(-1)
        point = noise * cumulated[:, -1]
        token = torch.searchsorted(cumulated, point[:, None], right=True).clamp(max=model.num_tokens - 1)
        return token, logp.gather(1, token)[:, 0]

    @torch.no_grad()
    def decode(
        self, model: ppo_llm.LanguageModel, prompts: list[list[int]], noise: Tensor, stop: Tensor,
        c: ppo_llm.Config,
    ) -> tuple[list[list[int]], list[Tensor]]:
        """As ppo_llm.decode, for sampling at temperature 1."""
        device = model.lm.device
        limit = c.max_response_length
        padded = [torch.tensor(prompt, device=device) for prompt in prompts]
        ids = pad_sequence(padded, batch_first=True, padding_side="left")
        seen = pad_sequence([torch.ones_like(x) for x in padded], batch_first=True, padding_side="left")
        position = (seen.cumsum(1) - 1).clamp(min=0)
        mask = nn.functional.pad(seen, (0, limit), value=1)  # causality hides what is not written yet
        if self.cache is None:
            self.cache = StaticCache(config=model.lm.config, max_cache_len=mask.shape[1])
        else:
            self.cache.reset()
        tokens = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(prompts), limit, device=device)
        lengths = torch.full((len(prompts),), limit, device=device)
        rows = torch.arange(len(prompts), device=device)  # that have not ended
        for t in range(limit):
            step = self.choose if t == 0 else self.step  # the prompts are read without graphs
            torch.compiler.cudagraph_mark_step_begin()
            token, logprob = step(model, ids, mask, position, noise[:, t].contiguous(), self.cache)
            ids = token.clone()  # a graph writes its results to the same place again
            tokens[:, t] = ids[:, 0]
            logprobs[:, t] = logprob
            ended = torch.isin(ids[rows, 0], stop)
            lengths[rows[ended]] = t + 1
            rows = rows[~ended]
            if len(rows) == 0:
                break
            position = position[:, -1:] + 1
        lengths = lengths.tolist()
        responses = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        return responses, [row[:length] for row, length in zip(logprobs, lengths, strict=True)]


def contestant(name: str, lm: PreTrainedModel, c: ppo_llm.Config, work: Work, config: Config) -> Callable:
    """generate(generator) -> (responses, logprobs), by the plain loop, the static one or the engine."""
    size = work.shape["vocab_size"]
    if name == "engine":
        old = load_before(config.before)
        old_config = config_before(old, c)
        model = old.LanguageModel(lm, size, False, old_config)
        engine = scheduled_engine(old, work)

        def generate(generator: torch.Generator):
            with patch.object(old, "Engine", engine):
                return old.generate(model, work.prompts, {-1}, old_config, generator)

        return generate
    model = ppo_llm.LanguageModel(lm, size, False, c)
    decode = ppo_llm.decode
    if name == "static":
        decode = StaticLoop("eager" if config.dry_run else "inductor").decode

    def generate(generator: torch.Generator):
        with patch.object(ppo_llm, "decode", scheduled(work, decode)):
            return ppo_llm.generate(model, work.prompts, {-1}, c, generator)

    return generate


def compare_tokens(found: list[dict], plain: list[dict]) -> dict:
    """Samples {"tokens", "logprobs"} beside those of the plain loop: the last three columns of decode.csv."""
    same = 0
    shared = 0
    distance = 0.0
    for a, b in zip(found, plain, strict=True):
        length = 0
        while length < min(len(a["tokens"]), len(b["tokens"])) and a["tokens"][length] == b["tokens"][length]:
            length += 1
        if a["tokens"] == b["tokens"]:
            same += 1
        shared += length
        ours = torch.tensor(a["logprobs"][:length]).exp()
        theirs = torch.tensor(b["logprobs"][:length]).exp()
        distance += (ours - theirs).abs().sum().item()
    total = sum(len(sample["tokens"]) for sample in plain)
    return {"same_responses": same, "share_before_difference": shared / total,
            "mean_probability_gap": distance / max(shared, 1)}


def decode(config: Config, rows: int, dtype: str, loop: str) -> list[dict]:
    """Generation alone, once to warm up and twice timed, with the same random numbers each time."""
    work = gsm8k_work(config, rows)
    with random_weights(work.shape, config.device) as folder:
        c = replace(work.c, model=str(folder), device=str(config.device), dtype=dtype)
        lm = ppo_llm.load_lm(c.model, AutoModelForCausalLM, c)
    generate = contestant(loop, lm, c, work, config)
    laps = Laps(config.device, tidy=True)
    for turn in ("first", "second", "third"):
        responses, logprobs = generate(torch.Generator(config.device).manual_seed(1))
        laps.lap(turn)
    timed = [laps.seconds["second"], laps.seconds["third"]]
    tokens = sum(len(response) for response in responses)
    row = {"rows": rows, "dtype": dtype, "loop": loop, "tokens_per_s": tokens / min(timed), "tokens": tokens,
           "seconds": min(timed), "most": max(timed), "first_seconds": laps.seconds["first"],
           "peak_gib": max(laps.peak.values()) / 1024, "responses": rows}
    samples = [{"tokens": x, "logprobs": y.tolist()} for x, y in zip(responses, logprobs, strict=True)]
    path = config.output / f"{config.device.type}-{rows}-{dtype}.json"
    if loop == "plain":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(samples))
    if path.is_file():
        return [row | compare_tokens(samples, json.loads(path.read_text()))]
    return [row | {"note": "not compared: the tokens of the plain loop are not here"}]


def peaks(config: Config, size: str, checkpointing: bool, lora_rank: int | None) -> list[dict]:
    """Memory of a rollout and of one optimizer step of critic and actor, at full length."""
    rows = 64
    prompt = 1024
    response = 512
    tokens = 16384
    if config.dry_run:
        rows = 4
        prompt = 16
        response = 8
        tokens = 64
    shape = SHAPES["tiny" if config.dry_run else size]
    c = ppo_llm.Config(
        device=str(config.device), dtype="bfloat16", train_batch_size=rows, ppo_mini_batch_size=rows,
        rollout_slots=rows, max_prompt_length=prompt, max_response_length=response, micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing, lora_rank=lora_rank)
    examples = [ppo_llm.Example("", "", ids) for ids in random_prompts(rows, prompt, shape["vocab_size"])]
    models = build(shape, c, config.device)
    laps = Laps(config.device, tidy=True)
    highest = {}
    rollout, _ = ppo_llm.collect_rollout(models, coin, examples, 0, c.kl_coef, c)
    laps.lap("rollout")
    highest["rollout"] = laps.highest
    laps.highest = 0.0
    for role in ("critic", "actor"):
        ppo_llm.update(role, models, rollout, 0, 1, c.kl_coef, c)
        laps.lap(f"update {role}")
    highest["update"] = laps.highest
    case = memory.Case(size, "", checkpointing, lora_rank is not None, rollout_slots=rows,
                       context=prompt + response, micro_batch_tokens=tokens)
    return [{"model": size, "checkpointing": checkpointing, "lora_rank": lora_rank,
             "rollout_gib": highest["rollout"] / 1024, "rollout_counted": memory.rollout_bytes(case) / GIB,
             "update_gib": highest["update"] / 1024, "update_counted": memory.update_bytes(case) / GIB,
             "reserved_gib": reserved_gib(config.device), "seconds": sum(laps.seconds.values())}]


def measurements(config: Config) -> list[tuple[str, str, Callable]]:
    """File, name of the row, and the function that measures it; what matters most comes first."""
    listed = [
        ("smoke", "greedy tokens", greedy_tokens),
        ("smoke", "two steps", two_steps),
        ("demo", "float32", partial(demo, dtype="float32")),
        ("demo", "bfloat16", partial(demo, dtype="bfloat16")),
        ("shape", "published settings", published_settings),
        ("step", "published step", published_step),
    ]
    for rows, dtype in ((64, "bfloat16"), (256, "bfloat16"), (64, "float32")):
        for loop in ("plain", "static", "engine"):
            function = partial(decode, rows=rows // 16 if config.dry_run else rows, dtype=dtype, loop=loop)
            listed.append(("decode", f"{rows} rows, {dtype}, {loop}", function))
    for name, size, checkpointing, lora_rank in (
        ("0.5B", "0.5B", False, None),
        ("0.5B, checkpointing", "0.5B", True, None),
        ("1.5B", "1.5B", False, None),
        ("1.5B, checkpointing", "1.5B", True, None),
        ("7B, checkpointing, LoRA", "7B", True, 64),
    ):
        function = partial(peaks, size=size, checkpointing=checkpointing, lora_rank=lora_rank)
        listed.append(("memory", name, function))
    return [entry for entry in listed if config.only in f"{entry[0]} {entry[1]}"]


# ---- The queue -------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """All rows with the columns of all of them; a killed run leaves the old file or the new one."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in LAST_COLUMNS))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns + LAST_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def describe(config: Config) -> dict:
    """What a row was measured on and with: the hash is that of ppo_llm.py."""
    machine = "dry run on the CPU" if config.dry_run else torch.cuda.get_device_name()
    code = table_hash.code_hash((ROOT / "ppo_llm.py").read_text())
    return {"machine": f"{machine}, torch {torch.__version__}", "code": code}


def is_finished(row: dict, name: str, made_with: dict) -> bool:
    """Whether a row is this measurement, by the same code on the same kind of machine, and did not fail."""
    same = all(row.get(key) == x for key, x in made_with.items())
    return row["name"] == name and same and not row.get("note", "").startswith("failed")


def measure(name: str, function: Callable, config: Config) -> list[dict]:
    """The rows of a measurement; one that does not fit, or fails, is a row that says so."""
    try:
        found = function(config)
    except torch.OutOfMemoryError:
        found = [{"note": "out of memory"}]
    except Exception as error:  # one measurement that fails costs none of the others
        traceback.print_exc()
        found = [{"note": " ".join(f"failed: {error!r:.300}".split())}]
    return [{"name": name, **row} for row in found]


def show(x) -> str:
    try:
        number = float(x)
    except ValueError:
        return x
    return x if number == int(number) else f"{number:.4g}"


def report(folder: Path) -> str:
    """table.md: all rows of all files in the folder."""
    sections = []
    for path in sorted(folder.glob("*.csv")):
        rows = read_rows(path)
        table = [list(rows[0]), *[[show(x) for x in row.values()] for row in rows]]
        sections.append(f"## {path.stem}\n\n{memory.markdown(table)}\n")
    text = "\n".join(sections)
    (folder / "table.md").write_text(text)
    return text


def name_the_code(folder: Path) -> None:
    """made_with.json, where git knows the code that has run."""
    try:
        table_hash.write_evidence(folder, ["ppo_llm.py", "scripts/gpu_hour.py"])
    except (OSError, subprocess.CalledProcessError, SystemExit) as error:
        print(f"made_with.json is not written: {error}")


def main(config: Config) -> int:
    """Exit code: 1 if a row failed or a check of smoke.csv did not pass."""
    if not config.dry_run and not torch.cuda.is_available():
        sys.exit("there is no CUDA here; --dry_run shows on the CPU that everything runs")
    made_with = describe(config)
    started = time.monotonic()
    for file, name, function in measurements(config):
        path = config.folder / f"{file}.csv"
        rows = read_rows(path)
        if any(is_finished(row, name, made_with) for row in rows):
            print(f"{file}: {name}: finished")
            continue
        if time.monotonic() - started > 60 * config.minutes:
            print("the time is up: the same command goes on from here")
            break
        print(f"{file}: {name}", flush=True)
        tidy(config.device)
        found = measure(name, function, config)
        write_rows(path, [row for row in rows if row["name"] != name] + [row | made_with for row in found])
        print(f"{file}: {name}: {(time.monotonic() - started) / 60:.1f} minutes since the start", flush=True)
    print(report(config.folder))
    if not config.dry_run:
        name_the_code(config.folder)
    rows = [row for path in config.folder.glob("*.csv") for row in read_rows(path)]
    return int(any(row["note"].startswith("failed") or row.get("passed") == "False" for row in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, use_underscores=True, description=__doc__)))
