"""A reward model from preference pairs, in one file: for `ppo_llm.py --reward FOLDER` and `--critic_model FOLDER`.

    python scripts/train_reward_model.py --model assets/demo --dataset pairs.jsonl --lr 1e-4
    python scripts/train_reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized
    python scripts/train_reward_model.py --dataset pairs.jsonl --eval_dataset held_out.jsonl --lora_rank 64 --lr 1e-4

    pairs = make_pairs(read_rows(dataset))                each: a prompt, a chosen and a rejected response
    for batch in pairs:
        chosen, rejected = score_conversations(model, batch)
        loss = bradley_terry_loss(chosen, rejected)       -log sigmoid(chosen - rejected)   (arXiv:2203.02155)
    center_scores(model, pairs)                           the mean score becomes 0, when asked
    evaluate(model, held_out)                             how often the chosen response has the higher score
    save_model(model, tokenizer)                          a plain Hugging Face sequence-classification folder

There is no resume: an interrupted run starts again in another folder. docs/reward_models.md: formats and rules.
"""

import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import datasets
import matplotlib.figure
import pandas
import peft
import torch
import transformers
import tyro
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

PROMPT_COLUMNS = ("prompt", "instruction", "conversations", "messages")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
METRICS = """step train/loss train/accuracy train/margin train/score eval/loss eval/accuracy eval/standard_error
    eval/margin eval/score eval/score_std optim/lr optim/grad_norm optim/skipped_steps time/pairs_per_second""".split()


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


@dataclass
class Config:
    seed: int = 1  # seeds the held-out split, the order of the pairs, the new score head and the adapters
    output_dir: str | None = None  # a new or empty folder; None: output/train_reward_model-DATASET-seedN-TIME
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the passes; the weights are fp32; auto: by device
    # Model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # a Hugging Face name or folder: language model, encoder, reward model
    lora_rank: int = 0  # train adapters of this rank and the score head, merged at the end; 0: train all weights
    lora_alpha: float | None = None  # adapters are scaled by lora_alpha / lora_rank; None: 2 * lora_rank
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, about 30 % slower
    # Data
    dataset: str = "trl-lib/ultrafeedback_binarized"  # NAME[:CONFIG[:SPLIT]], or a json, jsonl, csv or parquet file
    eval_dataset: str | None = None  # the same (its test split); None: a seeded tenth of the prompts of dataset
    prompt_column: str | None = None  # None: prompt, instruction (+ input), conversations or messages
    max_length: int = 1024  # tokens of a conversation; longer ones lose the first ones
    # Optimization
    total_epochs: int = 1  # passes over the pairs
    total_steps: int | None = None  # optimizer steps; None: from total_epochs
    train_batch_size: int = 64  # pairs per optimizer step
    micro_batch_size: int = 8  # pairs per pass; changes memory and speed only
    lr: float = 1e-5  # learning rate; adapters want about 1e-4
    warmup_steps: int = 0  # steps in which the learning rate rises; then it falls linearly, to 0 at the end
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # gradient norm is clipped to this
    center: bool = False  # shift the scores in the end, so that those of the training pairs have mean 0
    eval_every: int = 100  # steps between evaluations (also before the first step and at the end); 0: only these


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def check_config(c: Config) -> tuple:
    """Refuses sizes and models that cannot work; tokenizer and vocabulary size of the model. Raises UsageError."""
    may_be_0 = "lora_rank lr warmup_steps weight_decay eval_every".split()
    for name, x in vars(c).items():
        if type(x) in (int, float) and name != "seed" and not (0 < x < math.inf or x == 0 and name in may_be_0):
            raise UsageError(f"{name} must {'not be negative' if name in may_be_0 else 'be positive'}, not {x}")
    transformers.utils.logging.set_verbosity_error()  # its note on the new head is not for the user
    transformers.utils.logging.disable_progress_bar()
    try:
        own = AutoConfig.from_pretrained(c.model)
        tokenizer = AutoTokenizer.from_pretrained(c.model, padding_side="right", truncation_side="left")  # as saved
    except (OSError, ValueError) as error:
        raise UsageError(f"model {c.model}: {str(error).splitlines()[0]}") from error
    labels = own.num_labels if "SequenceClassification" in str(own.architectures) else 1
    if labels != 1 or type(own) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or own.is_encoder_decoder:
        raise UsageError(f"model {c.model} ({own.model_type}, labels: {labels}) cannot have a head with one score")
    context = min(tokenizer.model_max_length, getattr(own.get_text_config(), "max_position_embeddings", c.max_length))
    if c.max_length > context:
        raise UsageError(f"max_length = {c.max_length} exceeds the {context} tokens of {c.model}")
    return tokenizer, own.get_text_config().vocab_size


# ---- Data: rows -> two conversations -> token ids -------------------------------------------------------------------


@dataclass
class Pair:
    prompt: str  # the turns before the response: tells prompts apart
    chosen: list[int]  # token ids of the conversation that ends with the preferred response
    rejected: list[int]


def read_rows(source: str, split: str) -> list[dict]:
    """Rows of a local file or a Hub data set NAME[:CONFIG[:SPLIT]]. Raises UsageError with file:line."""
    path, where, rows = Path(source), source, []
    name, part, named_split = f"{source}::".split(":", 2)
    try:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                where = f"{path}:{number}"
                rows += [json.loads(line)] if line.strip() else []
        elif path.suffix == ".json":
            rows = json.loads(path.read_bytes())
        elif path.suffix in (".csv", ".parquet"):
            rows = datasets.load_dataset(path.suffix[1:], data_files=source, split="train").to_list()
        else:
            rows = datasets.load_dataset(name, part or None, split=named_split.rstrip(":") or split).to_list()
    except Exception as error:  # whatever the reader says, the user can only mend the source
        raise UsageError(f"{where}: {error.__cause__ or error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{source}: {'rows must be objects' if rows else 'no rows'}")
    return rows


def read_turns(value, role: str, what: str) -> list[dict]:
    """A text, a message or a list of messages, ShareGPT's too, as messages. Raises UsageError if one has no text."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    turns = [turn if isinstance(turn, dict) else {} for turn in (value if isinstance(value, list) else [value])]
    messages = [{"role": t.get("role", t.get("from")), "content": t.get("content", t.get("value"))} for t in turns]
    if not messages or not all(isinstance(x, str) and x.strip() for message in messages for x in message.values()):
        raise UsageError(f"no text in {what}")
    return [message | {"role": ROLES.get(message["role"], message["role"])} for message in messages]


def read_conversation(row: dict, side: str, prompt_column: str) -> list[dict]:
    """The messages of a row up to and including one of its two responses. Raises UsageError if they make none."""
    prompt = read_turns(row["system"], "system", "system") if row.get("system") else []
    if prompt_column:
        last = row.get(prompt_column)
        if prompt_column == "instruction" and isinstance(last, str) and row.get("input"):
            last = f"{last}\n{row['input']}"
        prompt += read_turns(last, "user", prompt_column)
    turns = read_turns(row.get(side), "assistant", side)
    whole = turns[0]["role"] != "assistant"
    if turns[-1]["role"] != "assistant" or (turns[: len(prompt)] != prompt if whole else not prompt):
        raise UsageError(f"{side} must be the row's prompt, if it repeats it, and then a response of the assistant")
    return turns if whole else prompt + turns


def conversation_ids(tokenizer, messages: list[dict], limit: int) -> list[int]:
    """Token ids of a conversation whose last message is the assistant's; beyond limit, the first ones are dropped."""
    if tokenizer.chat_template:  # it writes what special tokens there are: no second BOS
        return tokenizer.apply_chat_template(messages, return_dict=False)[-limit:]
    ids, eos = tokenizer("\n".join(message["content"] for message in messages)).input_ids, tokenizer.eos_token_id
    return (ids if eos is None or ids[-1:] == [eos] else [*ids, eos])[-limit:]


def make_pairs(rows: list[dict], tokenizer, config: Config, source: str) -> list[Pair]:
    """Rows -> pairs; says how many were shortened, and how many dropped as their responses are equal."""
    column = config.prompt_column or next((name for name in PROMPT_COLUMNS if name in rows[0]), "")
    has_prompt = column or isinstance(rows[0].get("chosen"), str)  # else the responses are whole conversations
    for name in ["chosen", "rejected", *[column or " or ".join(PROMPT_COLUMNS)] * bool(has_prompt)]:
        if name not in rows[0]:
            raise UsageError(f"{source}: no column {name}; there are {', '.join(rows[0])}")
    limit, pairs, shortened = config.max_length, [], 0
    for number, row in enumerate(rows, 1):
        try:
            conversations = [read_conversation(row, side, column) for side in ("chosen", "rejected")]
            ids = [conversation_ids(tokenizer, messages, limit + 1) for messages in conversations]
        except (UsageError, TemplateError) as error:  # a template may refuse roles, or their order
            raise UsageError(f"{source}: row {number}: {error}") from error
        shortened += max(map(len, ids)) > limit
        pair = Pair(json.dumps(conversations[0][:-1]), ids[0][-limit:], ids[1][-limit:])
        pairs += [pair] if pair.chosen != pair.rejected else []
    if len(pairs) < len(rows):
        warn(f"{source}: dropped {len(rows) - len(pairs)} of {len(rows)} rows, whose chosen and rejected are the same")
    if shortened:
        warn(f"{source}: {shortened} of {len(rows)} pairs have more than {limit} tokens and lost the first ones")
    if not pairs:
        raise UsageError(f"{source}: no pairs are left")
    return pairs


def load_pairs(tokenizer, config: Config) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; unless there is a data set for these, no prompt is in both. Raises UsageError."""
    train = make_pairs(read_rows(config.dataset, "train"), tokenizer, config, config.dataset)
    prompts = list(dict.fromkeys(pair.prompt for pair in train))
    if config.eval_dataset:
        held_out = make_pairs(read_rows(config.eval_dataset, "test"), tokenizer, config, config.eval_dataset)
        if shared := {pair.prompt for pair in held_out} & set(prompts):
            warn(f"{config.eval_dataset}: {len(shared)} of its prompts are in {config.dataset} too")
        return train, held_out
    if len(prompts) < 2:
        raise UsageError(f"{config.dataset}: all rows have the same prompt: give an eval_dataset")
    tenth = set(random.Random(f"{config.seed} held out").sample(prompts, max(1, len(prompts) // 10)))
    return [pair for pair in train if pair.prompt not in tenth], [pair for pair in train if pair.prompt in tenth]


# ---- Model, scores, loss, logs ---------------------------------------------------------------------------------------


def load_model(config: Config) -> nn.Module:
    """The model with a head of one score, in fp32 and without dropout; with lora_rank, adapters on its frozen trunk."""
    torch.manual_seed(config.seed)  # of a new head and of the adapters
    model = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=1, dtype=torch.float32)
    for module in model.modules():
        for key in [key for key, x in vars(module).items() if isinstance(x, float)]:
            if "drop" in key or isinstance(module, nn.Dropout):
                setattr(module, key, 0.0)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        trunk, linear = model.base_model_prefix, (nn.Linear, transformers.pytorch_utils.Conv1D)
        layers = [name for name, x in model.named_modules() if name.startswith(f"{trunk}.") and type(x) in linear]
        heads = [name for name, x in model.named_children() if name != trunk and list(x.parameters())]
        model = peft.get_peft_model(model, peft.LoraConfig(
            task_type="SEQ_CLS", r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank,
            target_modules=layers, modules_to_save=heads))
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).train(config.gradient_checkpointing)  # which does nothing in eval mode


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


def score_pairs(model: nn.Module, pairs: list[Pair], config: Config) -> tuple[Tensor, Tensor]:
    """Scores [B] of the chosen and of the rejected responses."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and model.device.type == "cuda")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):  # AdamW's steps need more than 8 bits
        return score_conversations(model, sequences, 2 * config.micro_batch_size).chunk(2)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log P(chosen is preferred) [B], where P is the sigmoid of the difference of the scores."""
    return -nn.functional.logsigmoid(chosen - rejected)


def pair_metrics(chosen: Tensor, rejected: Tensor, split: str) -> dict[str, float]:
    margin = chosen - rejected
    correct = (margin > 0).float() + 0.5 * (margin == 0)  # a tie is a guess
    means = {"loss": bradley_terry_loss(chosen, rejected), "accuracy": correct, "margin": margin,
             "score": (chosen + rejected) / 2}
    return {f"{split}/{name}": x.mean().item() for name, x in means.items()}


@torch.no_grad()
def evaluate(model: nn.Module, pairs: list[Pair], config: Config) -> dict[str, float]:
    chosen, rejected = score_pairs(model, pairs, config)
    metrics = pair_metrics(chosen, rejected, "eval")
    if not math.isfinite(metrics["eval/loss"]):
        raise UsageError(f"model {config.model}: its scores are not finite numbers")
    metrics["eval/standard_error"] = math.sqrt(metrics["eval/accuracy"] * (1 - metrics["eval/accuracy"]) / len(pairs))
    return metrics | {"eval/score_std": torch.cat([chosen, rejected]).std(correction=0).item()}


def train_batch(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Pair], config: Config) -> dict:
    """One optimizer step on the mean loss of a batch; left out, and counted, if the gradient is not finite."""
    batch, seen = sorted(batch, key=lambda pair: max(len(pair.chosen), len(pair.rejected))), []
    for start in range(0, len(batch), config.micro_batch_size):
        chosen, rejected = score_pairs(model, batch[start : start + config.micro_batch_size], config)
        (bradley_terry_loss(chosen, rejected).sum() / len(batch)).backward()
        seen.append(torch.stack([chosen, rejected]).detach())
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.grad_clip).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    metrics = {"optim/grad_norm": norm, "optim/skipped_steps": float(not math.isfinite(norm))}
    return pair_metrics(*torch.cat(seen, 1), "train") | metrics


@torch.no_grad()
def center_scores(model: nn.Module, pairs: list[Pair]) -> None:
    """Makes the mean score 0. A decoder's head has no bias, so its weight moves along the direction in which the states
    [B, H] that it reads have a mean but little variance: nearly a constant is taken from all scores."""
    head, states = [x for x in model.modules() if isinstance(x, nn.Linear) and x.out_features == 1][-1], []
    hook = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].flatten(0, -2)[-1]))
    shift = score_conversations(model, [ids for pair in pairs for ids in (pair.chosen, pair.rejected)], 1).mean()
    hook.remove()
    mean, covariance = torch.stack(states).mean(0), torch.stack(states).T.cov()
    ridge = 0.1 * covariance.diagonal().mean() * torch.eye(len(mean), device=mean.device)  # B may be less than H
    direction = torch.linalg.solve(covariance + ridge, mean)
    head.weight -= shift * direction / (direction @ mean)


def save_model(model: nn.Module, tokenizer, pairs: list[Pair], folder: Path, config: Config) -> None:
    """A plain folder whose tokenizer pads and cuts conversations as they were in training."""
    ends = {ids[-1] for pair in pairs for ids in (pair.chosen, pair.rejected)}  # padding must not be one of these
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    pad = next((i for i in special if i is not None and i not in ends), None)  # None: batches fail, not mislead
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    tokenizer.model_max_length, model.config.get_text_config().pad_token_id = config.max_length, pad
    for part in (model, tokenizer):
        part.save_pretrained(folder.with_name("temporary"))
    folder.with_name("temporary").rename(folder)


def log_metrics(run_dir: Path, step: int, metrics: dict) -> None:
    row = pandas.DataFrame([{"step": step} | metrics], columns=METRICS)
    row.to_csv(run_dir / "training_metrics.csv", mode="a", header=False, index=False)
    tqdm.write(f"step {step}: " + ", ".join(f"{name} {x:.4g}" for name, x in metrics.items()))


def save_summary(run_dir: Path, config: Config, sizes: dict, status: str) -> list[dict]:
    """summary.json and training_curves.png, made from training_metrics.csv. Returns the rows with an evaluation."""
    table = pandas.read_csv(run_dir / "training_metrics.csv")
    evaluations = table[table["eval/loss"].notna()].filter(regex="^(step|eval/)").to_dict("records")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    summary = {"status": status, "step": int(table["step"].max()), "pairs": sizes, "versions": versions,
               "first_evaluation": evaluations[:1], "last_evaluation": evaluations[-1:], "config": asdict(config)}
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2))
    (run_dir / "summary.tmp").replace(run_dir / "summary.json")  # never half written
    figure = matplotlib.figure.Figure(figsize=(10, 7), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, ("loss", "accuracy", "margin", "score"), strict=True):
        for split in ("train", "eval"):
            axis.plot("step", f"{split}/{name}", data=table[["step", f"{split}/{name}"]].dropna(), label=split)
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.savefig(run_dir / "training_curves.png", dpi=80)
    return evaluations


def open_run(config: Config) -> Path:
    """A new folder for the run. Raises UsageError if there is something in it."""
    name = f"{Path(config.dataset).stem.replace(':', '-')}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(config.output_dir or f"output/train_reward_model-{name}")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UsageError(f"{run_dir} is not an empty folder: choose another")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def main(config: Config) -> None:
    tokenizer, vocabulary = check_config(config)
    train, held_out = load_pairs(tokenizer, config)
    largest = max(max(pair.chosen + pair.rejected) for pair in train + held_out)
    if largest >= vocabulary:
        raise UsageError(f"model {config.model}: token {largest} of its tokenizer is none of its {vocabulary}")
    run_dir, sizes = open_run(config), {"train": len(train), "held_out": len(held_out)}
    per_epoch = math.ceil(len(train) / config.train_batch_size)
    total = config.total_steps or config.total_epochs * per_epoch
    print(f"run: {run_dir}\nfirst conversation: {tokenizer.decode(train[0].chosen)!r}\n{total} steps of"
          f" {config.train_batch_size} of {len(train)} pairs; {len(held_out)} held-out pairs")
    model = load_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    (run_dir / "training_metrics.csv").write_text(",".join(METRICS) + "\n")
    log_metrics(run_dir, 0, evaluate(model, held_out, config))
    save_summary(run_dir, config, sizes, "running")
    for step in tqdm(range(total), disable=not sys.stderr.isatty()):
        clock, (epoch, index) = time.perf_counter(), divmod(step, per_epoch)
        if index == 0:
            order = random.Random(f"{config.seed} epoch {epoch}").sample(train, len(train))
        batch = order[index * config.train_batch_size :][: config.train_batch_size]
        rise, fall = (step + 1) / (config.warmup_steps + 1), (total - step) / max(1, total - config.warmup_steps)
        optimizer.param_groups[0]["lr"] = lr = config.lr * min(rise, fall)
        metrics = train_batch(model, optimizer, batch, config) | {"optim/lr": lr}
        metrics["time/pairs_per_second"] = len(batch) / (time.perf_counter() - clock)
        if step + 1 == total:
            model = (model.merge_and_unload() if config.lora_rank else model).eval()  # evaluated as it is saved
            if config.center:
                center_scores(model, order[:1000])
        if step + 1 == total or (config.eval_every and (step + 1) % config.eval_every == 0):
            metrics |= evaluate(model, held_out, config)
        log_metrics(run_dir, step + 1, metrics)
    save_model(model, tokenizer, train + held_out, run_dir / "model", config)
    first, *_, last = save_summary(run_dir, config, sizes, "finished")
    for name in first:
        print(f"{name:30} {first[name]:10.4g} {last[name]:10.4g}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(tyro.cli(Config, use_underscores=True))
    except (UsageError, OSError) as error:  # the latter: weights that are missing, a full disk
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
