"""A reward model from preference pairs, for `ppo_llm.py --reward FOLDER` and `--critic_model FOLDER`.

    python scripts/train_reward_model.py --model assets/demo --dataset pairs.jsonl --lr 1e-4
    python scripts/train_reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset NAME --eval_every 50
    python scripts/train_reward_model.py --dataset pairs.jsonl --eval_dataset held_out.jsonl \
        --lora_rank 64 --lr 1e-4

    pairs = make_pairs(read_rows(dataset))                each: a prompt, a chosen and a rejected response
    for batch in pairs:
        chosen, rejected = score_conversations(model, batch)
        loss = bradley_terry_loss(chosen, rejected)       -log sigmoid(chosen - rejected)   (arXiv:2203.02155)
    center_scores(model, pairs)                           the mean score becomes 0, when asked
    evaluate(model, held_out)                             how often the chosen response has the higher score
    save_model(model, tokenizer)                          a plain Hugging Face sequence-classification folder

docs/reward_models.md has formats and rules. There is no resume: an interrupted run starts again elsewhere.
"""

import itertools
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
METRICS = [
    "step", "train/loss", "train/accuracy", "train/margin", "train/score", "eval/loss", "eval/accuracy",
    "eval/standard_error", "eval/margin", "eval/score", "eval/score_std", "optim/lr", "optim/grad_norm",
    "optim/skipped_steps", "time/pairs_per_second",
]
MAY_BE_0 = ["lora_rank", "lr", "warmup_steps", "weight_decay", "eval_every"]


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


@dataclass
class Config:
    seed: int = 1  # of the held-out split, the order of the pairs, the new score head and the adapters
    output_dir: str | None = None  # a new or empty folder; None: output/train_reward_model-DATASET-seedN-TIME
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the passes, weights are fp32; auto: by device
    # Model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # Hugging Face name or folder: decoder, encoder, reward model
    lora_rank: int = 0  # train adapters of this rank and the head, merged at the end; 0: train all weights
    lora_alpha: float | None = None  # adapters are scaled by lora_alpha / lora_rank; None: 2 * lora_rank
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, about 30 % slower
    # Data
    dataset: str = "trl-lib/ultrafeedback_binarized"  # NAME[:CONFIG[:SPLIT]]; json, jsonl, csv, parquet file
    eval_dataset: str | None = None  # the same (its test split); None: a tenth of the prompts of dataset
    prompt_column: str | None = None  # None: prompt, instruction (+ input), conversations or messages
    max_length: int = 1024  # tokens of a conversation; longer ones lose the first ones
    # Optimization
    total_epochs: int = 1  # passes over the pairs
    total_steps: int | None = None  # optimizer steps; None: from total_epochs
    train_batch_size: int = 64  # pairs per optimizer step
    micro_batch_size: int = 8  # pairs per pass; changes memory and speed only
    lr: float = 1e-5  # learning rate; adapters want about 1e-4
    warmup_steps: int = 0  # steps in which the learning rate rises; then it falls linearly to 0
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # gradient norm is clipped to this
    center: bool = False  # shift the scores in the end: those of the training pairs then have mean 0
    eval_every: int = 100  # steps between evaluations (also at the start and at the end); 0: only there


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def check_config(config: Config) -> tuple:
    """Refuses sizes and models that cannot work. Returns the tokenizer and the size of the vocabulary."""
    for name, x in vars(config).items():
        if type(x) not in (int, float) or name == "seed":
            continue
        if name in MAY_BE_0 and not 0 <= x < math.inf:
            raise UsageError(f"{name} must not be negative, not {x}")
        if name not in MAY_BE_0 and not 0 < x < math.inf:
            raise UsageError(f"{name} must be positive, not {x}")
    transformers.utils.logging.set_verbosity_error()  # its note on the new head is not for the user
    transformers.utils.logging.disable_progress_bar()
    try:
        own = AutoConfig.from_pretrained(config.model)
        tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="right", truncation_side="left")
    except (OSError, ValueError) as error:
        raise UsageError(f"model {config.model}: {str(error).splitlines()[0]}") from error
    labels = 1  # of the head that it will get
    if "SequenceClassification" in str(own.architectures):
        labels = own.num_labels
    known = type(own) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if not known or labels != 1 or own.is_encoder_decoder:
        kind = f"{own.model_type}, labels: {labels}"
        raise UsageError(f"model {config.model} ({kind}) cannot have a head with one score")
    text_config = own.get_text_config()
    context = getattr(text_config, "max_position_embeddings", config.max_length)
    context = min(context, tokenizer.model_max_length)
    if config.max_length > context:
        raise UsageError(f"max_length = {config.max_length} exceeds the {context} tokens of {config.model}")
    return tokenizer, text_config.vocab_size


# ---- Data: rows -> two conversations -> token ids ----------------------------------------------------------


@dataclass
class Pair:
    prompt: str  # the turns before the response: tells prompts apart
    chosen: list[int]  # token ids of the conversation that ends with the preferred response
    rejected: list[int]


def read_lines(path: Path) -> list[dict]:
    """The objects of a jsonl file. Raises UsageError with file:line."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
    return rows


def read_rows(source: str, split: str) -> list[dict]:
    """Rows of a local file or a Hub data set NAME[:CONFIG[:SPLIT]]. Raises UsageError."""
    path = Path(source)
    name, part, named_split = f"{source}::".split(":", 2)
    try:
        if path.suffix == ".jsonl":
            rows = read_lines(path)
        elif path.suffix == ".json":
            rows = json.loads(path.read_bytes())
        elif path.suffix in (".csv", ".parquet"):
            rows = datasets.load_dataset(path.suffix[1:], data_files=source, split="train").to_list()
        else:
            rows = datasets.load_dataset(name, part or None, split=named_split.rstrip(":") or split).to_list()
    except UsageError:
        raise
    except Exception as error:  # whatever the reader says, the user can only mend the source
        raise UsageError(f"{source}: {error.__cause__ or error}") from error
    if not rows:
        raise UsageError(f"{source}: no rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{source}: rows must be objects")
    return rows


def read_turns(value, role: str, what: str) -> list[dict]:
    """A text, a message or a list of messages, ShareGPT's too, as messages. Raises UsageError."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    turns = value if isinstance(value, list) else [value]
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise UsageError(f"no text in {what}")
        speaker = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        for text in (speaker, content):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"no text in {what}")
        messages.append({"role": ROLES.get(speaker, speaker), "content": content})
    if not messages:
        raise UsageError(f"no text in {what}")
    return messages


def read_conversation(row: dict, side: str, prompt_column: str) -> list[dict]:
    """The messages of a row up to and including one of its two responses. Raises UsageError."""
    prompt = []
    if row.get("system"):
        prompt = read_turns(row["system"], "system", "system")
    if prompt_column:
        asked = row.get(prompt_column)
        if prompt_column == "instruction" and isinstance(asked, str) and row.get("input"):
            asked = f"{asked}\n{row['input']}"
        prompt += read_turns(asked, "user", prompt_column)
    turns = read_turns(row.get(side), "assistant", side)
    if turns[0]["role"] == "assistant":  # the response alone
        fits = len(prompt) > 0
        conversation = prompt + turns
    else:
        fits = turns[: len(prompt)] == prompt
        conversation = turns
    if not fits or turns[-1]["role"] != "assistant":
        rule = "must be the row's prompt, if it repeats it, and then a response of the assistant"
        raise UsageError(f"{side} {rule}")
    return conversation


def conversation_ids(tokenizer, messages: list[dict], limit: int) -> list[int]:
    """Token ids of a conversation that ends with the assistant's turn: the last ones, at most limit."""
    if tokenizer.chat_template:  # it writes what special tokens there are: no second BOS
        return tokenizer.apply_chat_template(messages, return_dict=False)[-limit:]
    ids = tokenizer("\n".join(message["content"] for message in messages)).input_ids
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    return ids[-limit:]


def find_prompt_column(row: dict, config: Config, source: str) -> str:
    """The column with the prompts; "" if chosen and rejected are whole conversations. Raises UsageError."""
    column = config.prompt_column
    if column is None:
        column = next((name for name in PROMPT_COLUMNS if name in row), "")
    needed = ["chosen", "rejected"]
    if column:
        needed.append(column)
    elif isinstance(row.get("chosen"), str):  # a response alone
        needed.append(" or ".join(PROMPT_COLUMNS))
    for name in needed:
        if name not in row:
            raise UsageError(f"{source}: no column {name}; there are {', '.join(row)}")
    return column


def make_pairs(rows: list[dict], tokenizer, config: Config, source: str) -> list[Pair]:
    """Rows -> pairs; says how many were shortened, and how many dropped as their responses are equal."""
    column = find_prompt_column(rows[0], config, source)
    limit = config.max_length
    pairs = []
    shortened = 0
    for number, row in enumerate(rows, 1):
        try:
            conversations = [read_conversation(row, side, column) for side in ("chosen", "rejected")]
            chosen, rejected = (conversation_ids(tokenizer, turns, limit + 1) for turns in conversations)
        except (UsageError, TemplateError) as error:  # a template may refuse roles, or their order
            raise UsageError(f"{source}: row {number}: {error}") from error
        if max(len(chosen), len(rejected)) > limit:
            shortened += 1
        pair = Pair(json.dumps(conversations[0][:-1]), chosen[-limit:], rejected[-limit:])
        if pair.chosen != pair.rejected:
            pairs.append(pair)
    if len(pairs) < len(rows):
        dropped = f"dropped {len(rows) - len(pairs)} of {len(rows)} rows"
        warn(f"{source}: {dropped}, whose chosen and rejected are the same")
    if shortened:
        count = f"{shortened} of {len(rows)} pairs"
        warn(f"{source}: {count} have more than {limit} tokens and lost the first ones")
    if not pairs:
        raise UsageError(f"{source}: no pairs are left")
    return pairs


def load_pairs(tokenizer, config: Config) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; unless there is a data set for these, no prompt is in both."""
    train = make_pairs(read_rows(config.dataset, "train"), tokenizer, config, config.dataset)
    prompts = list(dict.fromkeys(pair.prompt for pair in train))
    if config.eval_dataset:
        held_out = make_pairs(read_rows(config.eval_dataset, "test"), tokenizer, config, config.eval_dataset)
        shared = {pair.prompt for pair in held_out} & set(prompts)
        if shared:
            warn(f"{config.eval_dataset}: {len(shared)} of its prompts are in {config.dataset} too")
        return train, held_out
    if len(prompts) < 2:
        raise UsageError(f"{config.dataset}: all rows have the same prompt: give an eval_dataset")
    size = max(1, len(prompts) // 10)
    tenth = set(random.Random(f"{config.seed} held out").sample(prompts, size))
    held_out = [pair for pair in train if pair.prompt in tenth]
    return [pair for pair in train if pair.prompt not in tenth], held_out


# ---- Model, scores, loss, logs -----------------------------------------------------------------------------


def choose_device(config: Config) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def turn_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, x in vars(module).items():
            is_rate = "drop" in name or isinstance(module, nn.Dropout)
            if is_rate and isinstance(x, float):
                setattr(module, name, 0.0)


def add_adapters(model: nn.Module, config: Config) -> nn.Module:
    """LoRA on every linear layer of the trunk; the head is trained as it is."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    trunk = model.base_model_prefix
    layers = [name for name, x in model.named_modules() if name.startswith(f"{trunk}.") and type(x) in linear]
    heads = [name for name, x in model.named_children() if name != trunk and list(x.parameters())]
    return peft.get_peft_model(model, peft.LoraConfig(
        task_type="SEQ_CLS", r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=layers, modules_to_save=heads))


def load_model(config: Config) -> nn.Module:
    """The model with a head of one score, in fp32; with lora_rank, adapters on its frozen trunk."""
    torch.manual_seed(config.seed)  # of a new head and of the adapters
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=1, dtype=torch.float32)
    turn_off_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        model = add_adapters(model, config)
    model.train(config.gradient_checkpointing)  # checkpointing does nothing in eval mode
    return model.to(choose_device(config))


def score_conversations(model: nn.Module, sequences: list[list[int]], batch_size: int) -> Tensor:
    """Scores [B] in fp32 of token sequences, in their order; similar lengths share a batch."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = []
    for start in range(0, len(order), batch_size):
        rows = [torch.tensor(sequences[i]) for i in order[start : start + batch_size]]
        # A decoder's head reads the last token that is not padding: no row may end with the padding token
        last_tokens = {int(row[-1]) for row in rows}
        pad = next(i for i in itertools.count() if i not in last_tokens)
        model.config.get_text_config().pad_token_id = pad
        ids = pad_sequence(rows, batch_first=True, padding_value=pad).to(model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        scores.append(model(input_ids=ids, attention_mask=mask).logits[:, 0].float())
    back = torch.tensor(order).argsort().to(model.device)
    return torch.cat(scores)[back]


def score_pairs(model: nn.Module, pairs: list[Pair], config: Config) -> tuple[Tensor, Tensor]:
    """Scores [B] of the chosen and of the rejected responses."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    bf16 = config.dtype == "bfloat16"
    if config.dtype == "auto":
        bf16 = model.device.type == "cuda"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):  # the weights stay in fp32
        return score_conversations(model, sequences, 2 * config.micro_batch_size).chunk(2)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log P(chosen is preferred) [B], where P is the sigmoid of the difference of the scores."""
    return -nn.functional.logsigmoid(chosen - rejected)


def pair_metrics(chosen: Tensor, rejected: Tensor, split: str) -> dict[str, float]:
    """Means over pairs; a tie counts as half a correct pair."""
    margin = chosen - rejected
    metrics = {
        "loss": bradley_terry_loss(chosen, rejected).mean(),
        "accuracy": (margin > 0).float().mean() + 0.5 * (margin == 0).float().mean(),
        "margin": margin.mean(),
        "score": torch.cat([chosen, rejected]).mean(),
    }
    return {f"{split}/{name}": x.item() for name, x in metrics.items()}


@torch.no_grad()
def evaluate(model: nn.Module, pairs: list[Pair], config: Config) -> dict[str, float]:
    chosen, rejected = score_pairs(model, pairs, config)
    metrics = pair_metrics(chosen, rejected, "eval")
    if not math.isfinite(metrics["eval/loss"]):
        raise UsageError(f"model {config.model}: its scores are not finite numbers")
    accuracy = metrics["eval/accuracy"]
    metrics["eval/standard_error"] = math.sqrt(accuracy * (1 - accuracy) / len(pairs))
    metrics["eval/score_std"] = torch.cat([chosen, rejected]).std(correction=0).item()
    return metrics


def train_batch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Pair], config: Config
) -> dict[str, float]:
    """One optimizer step on the mean loss of a batch; skipped, and counted, if the gradient is not finite."""
    batch = sorted(batch, key=lambda pair: max(len(pair.chosen), len(pair.rejected)))
    scores = []
    for start in range(0, len(batch), config.micro_batch_size):
        chosen, rejected = score_pairs(model, batch[start : start + config.micro_batch_size], config)
        loss = bradley_terry_loss(chosen, rejected).sum() / len(batch)
        loss.backward()
        scores.append(torch.stack([chosen, rejected]).detach())
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.grad_clip).item()
    skipped = not math.isfinite(norm)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    chosen, rejected = torch.cat(scores, 1)
    metrics = pair_metrics(chosen, rejected, "train")
    return metrics | {"optim/grad_norm": norm, "optim/skipped_steps": float(skipped)}


@torch.no_grad()
def center_scores(model: nn.Module, pairs: list[Pair]) -> None:
    """Makes the mean score 0: nearly a constant is taken from all scores.

    A decoder's head has no bias, so its weight moves along the direction in which the states [B, H] that it
    reads have a mean but little variance.
    """
    heads = [x for x in model.modules() if isinstance(x, nn.Linear) and x.out_features == 1]
    head = heads[-1]
    states = []
    hook = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].flatten(0, -2)[-1]))
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    shift = score_conversations(model, sequences, 1).mean()  # one by one, so that the last state counts
    hook.remove()
    states = torch.stack(states)
    mean = states.mean(0)
    covariance = states.T.cov()
    # A tenth of the mean variance is added in every direction, as B may be less than H
    ridge = 0.1 * covariance.diagonal().mean() * torch.eye(len(mean), device=mean.device)
    direction = torch.linalg.solve(covariance + ridge, mean)
    head.weight -= shift * direction / (direction @ mean)


def save_model(model: nn.Module, tokenizer, pairs: list[Pair], folder: Path, config: Config) -> None:
    """A plain folder whose tokenizer pads and cuts conversations as they were in training."""
    ends = {pair.chosen[-1] for pair in pairs} | {pair.rejected[-1] for pair in pairs}
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    special += tokenizer.all_special_ids
    free = [token for token in special if token is not None and token not in ends]
    pad = free[0] if free else None  # None: batches fail, which is better than scores of another token
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    tokenizer.model_max_length = config.max_length
    model.config.get_text_config().pad_token_id = pad
    temporary = folder.with_name("temporary")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


def log_metrics(run_dir: Path, step: int, metrics: dict) -> None:
    row = pandas.DataFrame([{"step": step} | metrics], columns=METRICS)
    row.to_csv(run_dir / "training_metrics.csv", mode="a", header=False, index=False)
    tqdm.write(f"step {step}: " + ", ".join(f"{name} {x:.4g}" for name, x in metrics.items()))


def plot(table: pandas.DataFrame, path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(10, 7), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, ("loss", "accuracy", "margin", "score"), strict=True):
        for split in ("train", "eval"):
            column = f"{split}/{name}"
            axis.plot("step", column, data=table[["step", column]].dropna(), label=split)
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=80)


def save_summary(run_dir: Path, config: Config, sizes: dict, status: str) -> list[dict]:
    """summary.json and training_curves.png from training_metrics.csv. Returns the rows with an evaluation."""
    table = pandas.read_csv(run_dir / "training_metrics.csv")
    evaluations = table[table["eval/loss"].notna()].filter(regex="^(step|eval/)").to_dict("records")
    summary = {
        "status": status,
        "step": int(table["step"].max()),
        "pairs": sizes,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "first_evaluation": evaluations[:1],
        "last_evaluation": evaluations[-1:],
        "config": asdict(config),
    }
    temporary = run_dir / "summary.tmp"  # renamed when whole
    temporary.write_text(json.dumps(summary, indent=2))
    temporary.replace(run_dir / "summary.json")
    plot(table, run_dir / "training_curves.png")
    return evaluations


def open_run(config: Config) -> Path:
    """A new folder for the run. Raises UsageError if there is something in it."""
    name = f"{Path(config.dataset).stem.replace(':', '-')}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(config.output_dir or f"output/train_reward_model-{name}")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UsageError(f"{run_dir} is not an empty folder: choose another")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def learning_rate(step: int, total: int, config: Config) -> float:
    """It rises for warmup_steps, then falls linearly, to 0 after the last step."""
    rise = (step + 1) / (config.warmup_steps + 1)
    fall = (total - step) / max(1, total - config.warmup_steps)
    return config.lr * min(rise, fall)


def train(
    model: nn.Module, pairs: list[Pair], held_out: list[Pair], run_dir: Path, config: Config
) -> nn.Module:
    """All steps, with their logs. Returns the model as it is to be saved: merged, and centred when asked."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    per_epoch = math.ceil(len(pairs) / config.train_batch_size)
    total = config.total_steps or config.total_epochs * per_epoch
    print(f"{total} steps of {config.train_batch_size} of {len(pairs)} pairs; {len(held_out)} held-out pairs")
    for step in tqdm(range(total), disable=not sys.stderr.isatty()):
        began = time.perf_counter()
        epoch, index = divmod(step, per_epoch)
        if index == 0:
            order = random.Random(f"{config.seed} epoch {epoch}").sample(pairs, len(pairs))
        start = index * config.train_batch_size
        batch = order[start : start + config.train_batch_size]
        lr = learning_rate(step, total, config)
        optimizer.param_groups[0]["lr"] = lr
        metrics = train_batch(model, optimizer, batch, config) | {"optim/lr": lr}
        metrics["time/pairs_per_second"] = len(batch) / (time.perf_counter() - began)
        done = step + 1
        if done == total:  # evaluated as it is saved
            if config.lora_rank:
                model = model.merge_and_unload()
            model.eval()
            if config.center:
                center_scores(model, order[:1000])
        if done == total or (config.eval_every and done % config.eval_every == 0):
            metrics |= evaluate(model, held_out, config)
        log_metrics(run_dir, done, metrics)
    return model


def main(config: Config) -> None:
    tokenizer, vocabulary = check_config(config)
    pairs, held_out = load_pairs(tokenizer, config)
    largest = max(max(pair.chosen + pair.rejected) for pair in pairs + held_out)
    if largest >= vocabulary:
        wrong = f"token {largest} of its tokenizer is none of its {vocabulary}"
        raise UsageError(f"model {config.model}: {wrong}")
    run_dir = open_run(config)
    print(f"run: {run_dir}\nfirst conversation: {tokenizer.decode(pairs[0].chosen)!r}")
    model = load_model(config)
    sizes = {"train": len(pairs), "held_out": len(held_out)}
    (run_dir / "training_metrics.csv").write_text(",".join(METRICS) + "\n")
    log_metrics(run_dir, 0, evaluate(model, held_out, config))
    save_summary(run_dir, config, sizes, "running")
    model = train(model, pairs, held_out, run_dir, config)
    save_model(model, tokenizer, pairs + held_out, run_dir / "model", config)
    evaluations = save_summary(run_dir, config, sizes, "finished")
    first = evaluations[0]
    last = evaluations[-1]
    for name in first:
        print(f"{name:30} {first[name]:10.4g} {last[name]:10.4g}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(tyro.cli(Config, use_underscores=True))
    except (UsageError, OSError) as error:  # the latter: weights that are missing, a full disk
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
