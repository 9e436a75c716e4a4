"""Make the demo folder: a tiny chat model with a fixable bad habit, and grade-school word problems in GSM8K's format.

    python scripts/make_demo.py                  # 12-15 minutes on 2 CPU cores, writes assets/demo (5 MB)
    python scripts/make_demo.py --base assets/demo --steps 120 --lr 5e-4 --warmup 20 --fault 0.85 0.95 0.99 \
        --threads 1 --out output/compare/task    # the harder task of docs/ppo_or_grpo.md, 40 seconds on one core

The folder holds a Qwen2 model of about 1 M parameters with its own byte-level BPE tokenizer and ChatML template, and
train.jsonl / test.jsonl with {"question": ..., "answer": "...\n#### N"} rows whose answers are right. The model is
fine-tuned from random weights on freshly generated problems. One-step problems always come with a right solution; a
coin that knows nothing of the question spoils most two-step solutions with one typical mistake: the solution stops
after the first step, or adds where it should subtract. Greedy decoding therefore makes the mistake almost always, while
sampling at temperature 1 solves about one two-step problem in five: a policy-gradient method has a signal from its
first batch on, and the ability to reach a high accuracy is already in the weights.

No question of test.jsonl occurs in train.jsonl or in the fine-tuning data, not even with other names: the questions are
compared with every person's name replaced by the same word, and the script stops if two agree.
"""

import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
ANSWER_TOKENS = 25  # about the mean of a solution; it only sets the scale of the loss
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's own rule: words with their leading space, digits one by one, punctuation together with the line ends after it.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = (
    "Tom Anna Ben Lily Sam Mia Jack Emma Leo Zoe Max Ruth Paul Nina Adam Rosa Carl Jane Omar Lucy Ivan Ella Noah Sara "
    "Hugo Tina Luis Kate Mark Dora Finn Amy Eric Maya Joe Eva Ali Clara Ken Julia Peter Grace Dan Alice Oscar Vera"
).split()
OBJECTS = (
    "pens apples marbles stickers cards books coins shells eggs cookies cups balls toys stamps beads plums pears roses "
    "nuts keys bricks candles tickets buttons stones lemons flowers photos cakes kites"
).split()
PLACES = "shop school garden kitchen park library market barn garage museum attic hall".split()
BOXES = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("pack", "packs"), ("basket", "baskets"))


class Template(NamedTuple):
    """A question, the expressions that solve it (x is the first result), a line for each, the mistake it invites."""

    question: str
    exprs: tuple
    lines: tuple
    fault: str = ""


ONE_STEP = (
    Template(
        "{name} has {a} {obj}. Then {friend} gives {name} {b} more {obj}. How many {obj} does {name} have now?",
        ("a+b",), ("{name} has {s1} {obj} now.",),
    ),
    Template(
        "There are {a} {obj} on the table and {b} {obj} on the floor of the {place}. How many {obj} are there?",
        ("a+b",), ("There are {s1} {obj}.",),
    ),
    Template(
        "{name} finds {a} {obj} in the morning and {b} {obj} in the evening. How many {obj} does {name} find that day?",
        ("a+b",), ("{name} finds {s1} {obj}.",),
    ),
    Template(
        "There are {a} {obj} in the {place}. {name} takes {b} of them home. How many {obj} stay in the {place}?",
        ("a-b",), ("{s1} {obj} stay in the {place}.",),
    ),
    Template(
        "{name} has {a} {obj} and {friend} has {b} {obj}. How many more {obj} does {name} have than {friend}?",
        ("a-b",), ("{name} has {s1} more {obj}.",),
    ),
    Template(
        "{name} wants {a} {obj} for the {place} and already has {b} of them. How many {obj} are missing?",
        ("a-b",), ("{s1} {obj} are missing.",),
    ),
    Template(
        "{name} buys {a} {boxes} of {obj} at the {place}. Each {box} holds {b} {obj}. How many {obj} does {name} buy?",
        ("a*b",), ("{name} buys {s1} {obj}.",),
    ),
    Template(
        "In the {place} there are {a} rows with {b} {obj} in each row. How many {obj} are in the {place}?",
        ("a*b",), ("There are {s1} {obj}.",),
    ),
    Template(
        "{name} makes {b} {obj} every day. How many {obj} does {name} make in {a} days at the {place}?",
        ("a*b",), ("{name} makes {s1} {obj}.",),
    ),
    Template(
        "{name} shares {a} {obj} equally among {b} friends in the {place}. How many {obj} does each friend get?",
        ("a/b",), ("Each friend gets {s1} {obj}.",),
    ),
    Template(
        "{name} puts {a} {obj} into {b} {boxes}, the same number in each {box}. How many {obj} are in one {box}?",
        ("a/b",), ("One {box} holds {s1} {obj}.",),
    ),
)
TWO_STEP = (
    Template(
        "{name} buys {a} {boxes} with {b} {obj} in each {box}. Then {name} gives {c} {obj} to {friend}. "
        "How many {obj} does {name} have left?",
        ("a*b", "x-c"), ("{name} buys {s1} {obj}.", "Then {name} has {s2} {obj}."), "flip",
    ),
    Template(
        "{name} has {a} {obj} and finds {b} more in the {place}. On the way home {name} loses {c} of them. "
        "How many {obj} are left?",
        ("a+b", "x-c"), ("{name} has {s1} {obj}.", "After the way home it is {s2} {obj}."), "flip",
    ),
    Template(
        "There are {a} rows of {b} {obj} in the {place}. {c} of the {obj} are sold. How many {obj} are not sold?",
        ("a*b", "x-c"), ("There are {s1} {obj}.", "Not sold are {s2} {obj}."), "flip",
    ),
    Template(
        "{name} has {a} {obj} and loses {b} of them. Then {friend} takes {c} {obj} from {name}. How many {obj} remain?",
        ("a-b", "x-c"), ("{name} keeps {s1} {obj}.", "Then {s2} {obj} remain."), "flip",
    ),
    Template(
        "{name} has {c} dollars and buys {a} {obj} at the {place} for {b} dollars each. How many dollars are left?",
        ("a*b", "c-x"), ("The {obj} cost {s1} dollars.", "The money left is {s2} dollars."), "flip",
    ),
    Template(
        "The {place} needs {c} {obj}. {name} brings {a} {obj} and {friend} brings {b}. How many {obj} are missing?",
        ("a+b", "c-x"), ("Together they bring {s1} {obj}.", "Missing are {s2} {obj}."), "flip",
    ),
    Template(
        "{name} has {a} {obj}. {friend} has {b} more {obj} than {name}. How many {obj} do they have together?",
        ("a+b", "a+x"), ("{friend} has {s1} {obj}.", "Together they have {s2} {obj}."), "stop",
    ),
    Template(
        "{name} has {a} {obj}. {friend} has {b} fewer {obj} than {name}. How many {obj} do they have together?",
        ("a-b", "a+x"), ("{friend} has {s1} {obj}.", "Together they have {s2} {obj}."), "stop",
    ),
    Template(
        "{name} has {a} {obj}. {friend} has {b} times as many. How many {obj} do {name} and {friend} have in all?",
        ("a*b", "a+x"), ("{friend} has {s1} {obj}.", "In all they have {s2} {obj}."), "stop",
    ),
    Template(
        "{name} fills {a} {boxes} with {b} {obj} each and has {c} {obj} left over. How many {obj} did {name} have?",
        ("a*b", "x+c"), ("The {boxes} hold {s1} {obj}.", "With the rest it is {s2} {obj}."), "stop",
    ),
    Template(
        "{name} shares {a} {obj} equally among {b} friends. {friend} is one of them and already had {c} {obj}. "
        "How many {obj} does {friend} have now?",
        ("a/b", "x+c"), ("Each friend gets {s1} {obj}.", "So {friend} has {s2} {obj}."), "stop",
    ),
    Template(
        "{name} has {a} {obj} and buys {b} more at the {place}. {name} puts them into {c} equal {boxes}. "
        "How many {obj} are in each {box}?",
        ("a+b", "x/c"), ("{name} has {s1} {obj}.", "Each {box} gets {s2} {obj}."), "stop",
    ),
    Template(
        "{name} has {a} {obj} and gives {b} to {friend}. The rest goes into {c} equal {boxes}. "
        "How many {obj} are in each {box}?",
        ("a-b", "x/c"), ("{name} keeps {s1} {obj}.", "Each {box} gets {s2} {obj}."), "stop",
    ),
    Template(
        "{name} sells {a} {obj} in the morning and {b} in the evening at the {place}, for {c} dollars each. "
        "How many dollars does {name} get?",
        ("a+b", "x*c"), ("{name} sells {s1} {obj}.", "That brings {s2} dollars."), "stop",
    ),
    Template(
        "{name} bakes {a} cakes and {b} of them go wrong. The others are sold for {c} dollars each at the {place}. "
        "How many dollars does {name} get?",
        ("a-b", "x*c"), ("{s1} cakes are good.", "They bring {s2} dollars."), "stop",
    ),
)


class Problem(NamedTuple):
    """A question, its right solution, the spoiled one (empty for one-step problems), the question without names.

    kind is the place of its template in ONE_STEP or TWO_STEP.
    """

    question: str
    answer: str
    spoiled: str
    key: str
    kind: int


@dataclass
class Args:
    out: str = "assets/demo"  # folder to write
    seed: int = 1  # seeds problems, weights, batches and sampling
    train_rows: int = 4000  # rows of train.jsonl
    test_rows: int = 600  # rows of test.jsonl
    one_step: float = 0.36  # share of one-step problems; greedy accuracy comes out close to it
    fault: tuple[float, ...] = (0.8,)  # share of spoiled solutions; kind k of two-step problems has fault[k % len]
    base: str | None = None  # folder whose model and tokenizer are fine-tuned further; None: random weights
    vocab: int = 960  # tokens, a multiple of 64
    hidden: int = 128  # width of the model
    layers: int = 4  # blocks of the model
    intermediate: int = 448  # width of the MLP
    init: float = 0.08  # standard deviation of the first weights; the usual 0.02 learns to copy numbers far slower
    steps: int = 5000  # optimizer steps of the fine-tuning
    batch: int = 32  # problems per step
    lr: float = 3e-3  # peak learning rate
    warmup: int = 100  # steps of linear warmup before the cosine
    weight_decay: float = 0.01  # AdamW's
    threads: int = 2  # CPU threads


def draw_first(rng, op, small):
    """Two operands; small ones where the result is multiplied again."""
    if op == "+":
        return (rng.randint(2, 7), rng.randint(2, 7)) if small else (rng.randint(3, 45), rng.randint(3, 45))
    if op == "-":
        a = rng.randint(5, 16 if small else 80)
        return a, rng.randint(2, a - 2)
    if op == "*":
        return rng.randint(2, 9), rng.randint(2, 9)
    b = rng.randint(2, 9)
    return b * rng.randint(2, 9), b


def third_choices(expr, x):
    """Values of c that keep the second step exact and easy; the expressions without c need none."""
    if expr == "x-c":
        return range(2, x - 1)
    if expr == "c-x":
        return range(x + 2, min(x + 41, 100))
    if expr == "x*c":
        return range(2, 7) if x <= 12 else ()
    if expr == "x/c":
        return [c for c in range(2, 10) if x % c == 0 and 2 <= x // c <= 12]
    return range(2, 41)


def evaluate(expr, numbers):
    """("a-b", {"a": 9, "b": 4}) -> (5, "9-4=5")."""
    left, op, right = numbers[expr[0]], expr[1], numbers[expr[2]]
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
    return value, f"{left}{op}{right}={value}"


def draw_numbers(rng, template):
    """Operands a, b, c and results x, y with every result (the spoiled one too) within 2..99 and y != x."""
    exprs, small = template.exprs, template.exprs[-1] == "x*c"
    while True:
        numbers = dict(zip("ab", draw_first(rng, exprs[0][1], small), strict=True))
        numbers["x"] = evaluate(exprs[0], numbers)[0]
        if not 2 <= numbers["x"] <= 99:
            continue
        if len(exprs) == 1:
            return numbers
        choices = third_choices(exprs[1], numbers["x"])
        if not choices:
            continue
        numbers["c"] = rng.choice(choices)
        results = [evaluate(exprs[1], numbers)[0]]
        if template.fault == "flip":
            results.append(evaluate(exprs[1].replace("-", "+"), numbers)[0])
        if all(2 <= y <= 99 and y != numbers["x"] for y in results):
            return numbers


def solution(template, words, numbers, fault=""):
    """The lines of a solution and its final answer, right or with the given fault."""
    value, s1 = evaluate(template.exprs[0], numbers)
    lines, s2 = template.lines, ""
    if fault == "stop":
        lines = lines[:1]
    elif len(template.exprs) == 2:
        expr = template.exprs[1].replace("-", "+") if fault == "flip" else template.exprs[1]
        value, s2 = evaluate(expr, numbers)
    return "\n".join(line.format(s1=s1, s2=s2, **words) for line in lines) + f"\n#### {value}"


def make_problem(rng, steps):
    """A random problem of one or two steps."""
    templates = ONE_STEP if steps == 1 else TWO_STEP
    template = rng.choice(templates)
    name, friend = rng.sample(NAMES, 2)
    box, boxes = rng.choice(BOXES)
    words = {"name": name, "friend": friend, "obj": rng.choice(OBJECTS), "place": rng.choice(PLACES)}
    words |= {"box": box, "boxes": boxes}
    numbers = draw_numbers(rng, template)
    spoiled = solution(template, words, numbers, template.fault) if steps == 2 else ""
    nameless = words | {"name": "Someone", "friend": "Someone"}
    return Problem(
        template.question.format(**words, **numbers),
        solution(template, words, numbers),
        spoiled,
        template.question.format(**nameless, **numbers),
        templates.index(template),
    )


def make_rows(rng, count, one_step, banned):
    """Distinct problems with the exact share of one-step ones, shuffled; none has a key in banned."""
    seen, problems = set(banned), []
    while len(problems) < count:
        problem = make_problem(rng, 1 if len(problems) < round(one_step * count) else 2)
        if problem.key not in seen:
            seen.add(problem.key)
            problems.append(problem)
    rng.shuffle(problems)
    return problems


def make_tokenizer(problems, vocab):
    """A byte-level BPE with Qwen2's splitting rule, so that any UTF-8 text can be encoded and digits stay single."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"system\nuser\n{p.question} {SUFFIX}\nassistant\n{p.answer}" for p in problems]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(args, tokenizer):
    """A Qwen2 model with random weights whose special tokens are the tokenizer's."""
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=args.init,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def prompt_text(tokenizer, question):
    """The one user turn that every user of the demo sends."""
    messages = [{"role": "user", "content": f"{question} {SUFFIX}"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def fault_share(args, problem):
    return args.fault[problem.kind % len(args.fault)]


def sft_batches(args, tokenizer, banned):
    """Endless batches (ids, labels) of fresh problems; each pool is cut into batches of similar length."""
    rng, coin = random.Random(f"sft {args.seed}"), random.Random(f"fault {args.seed}")
    # The template is rendered once: jinja would cost more than the problem itself.
    head, tail = prompt_text(tokenizer, "\0").split("\0")
    while True:
        problems = []
        while len(problems) < 64 * args.batch:
            problem = make_problem(rng, 1 if rng.random() < args.one_step else 2)
            if problem.key not in banned:
                problems.append(problem)
        answers = [p.spoiled if p.spoiled and coin.random() < fault_share(args, p) else p.answer for p in problems]
        prompts = encode(tokenizer, [head + p.question + tail for p in problems])
        rows = sorted(zip(prompts, encode(tokenizer, [a + END for a in answers]), strict=True), key=prompt_length)
        batches = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
        rng.shuffle(batches)
        for batch in batches:
            yield pad_batch(batch, tokenizer.pad_token_id)


def prompt_length(row):
    """The sorting key of batches; with the response in it a batch would hold mostly right or mostly spoiled ones."""
    return len(row[0])


def pad_batch(rows, pad):
    """Right-padded ids, and labels that are -100 outside the responses."""
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([p + r + [pad] * (width - len(p) - len(r)) for p, r in rows])
    labels = torch.tensor([[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in rows])
    return ids, labels


def finetune(args, model, tokenizer, banned):
    """Plain supervised fine-tuning on the responses, with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    batches, start, embedding = sft_batches(args, tokenizer, banned), time.time(), model.get_input_embeddings()
    model.train()
    for step in range(args.steps):
        progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
        rate = args.lr * min(1, (step + 1) / args.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = next(batches)
        # Right padding needs no mask under causal attention, and only the responses need logits.
        hidden, targets = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1], labels[:, 1:]
        kept = targets != -100
        # A sum over a constant: the mean over a batch's tokens would weigh short solutions, thus the mistakes, more.
        loss = F.cross_entropy(F.linear(hidden[kept], embedding.weight), targets[kept], reduction="sum")
        loss = loss / (args.batch * ANSWER_TOKENS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def generate(model, tokenizer, problems, sample):
    """One response for each problem, greedy or sampled at temperature 1."""
    model.eval()
    texts = []
    for i in range(0, len(problems), 200):
        prompts = [prompt_text(tokenizer, p.question) for p in problems[i : i + 200]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=80, **options
        )
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def strict_correct(response, answer):
    """GSM8K's strict rule: the last "#### N" within the last 300 characters equals the true number as a string."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", response[-300:])
    return bool(found) and found[-1].replace(",", "") == answer.split("#### ")[-1].replace(",", "")


def operators(text):
    return re.findall(r"\d([-+*/])\d", text)


def mean(values):
    values = list(values)
    return sum(values) / max(1, len(values))


def accuracies(problems, responses):
    """Strict accuracy of one-step, two-step and all problems, and of two-step solutions with the right operations."""
    pairs = zip(problems, responses, strict=True)
    rows = [(p, strict_correct(r, p.answer), operators(r) == operators(p.answer)) for p, r in pairs]
    one = [right for p, right, _ in rows if not p.spoiled]
    two = [right for p, right, _ in rows if p.spoiled]
    sound = [right for p, right, same in rows if p.spoiled and same]
    return {"one-step": one, "two-step": two, "all": one + two, "two-step, right operations": sound}


def save(args, model, tokenizer, train, test):
    """Write the folder with the library's own calls."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for split, problems in (("train", train), ("test", test)):
        lines = [json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return sum(f.stat().st_size for f in out.iterdir())


def report(model, tokenizer, train, test):
    """Print sizes, token lengths, and the accuracies with their standard errors."""
    prompts = [len(ids) for ids in encode(tokenizer, [prompt_text(tokenizer, p.question) for p in train + test])]
    answers = [len(ids) for ids in encode(tokenizer, [p.answer + END for p in train + test])]
    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    print(f"vocabulary     {len(tokenizer)} (model: {model.config.vocab_size})")
    print(f"prompt tokens  mean {mean(prompts):.1f}, max {max(prompts)}")
    print(f"answer tokens  mean {mean(answers):.1f}, max {max(answers)}")
    for sample in (False, True):
        for kind, right in accuracies(test, generate(model, tokenizer, test, sample)).items():
            error = math.sqrt(mean(right) * (1 - mean(right)) / max(1, len(right)))
            mode = "sampled" if sample else "greedy"
            print(f"{mode:8s} {kind:27s} {mean(right):.3f} +- {error:.3f}  ({len(right)} problems)")


def main(args):
    start = time.time()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    test = make_rows(random.Random(f"test {args.seed}"), args.test_rows, args.one_step, ())
    banned = {p.key for p in test}
    train = make_rows(random.Random(f"train {args.seed}"), args.train_rows, args.one_step, banned)
    if banned & {p.key for p in train} or {p.question for p in test} & {p.question for p in train}:
        raise SystemExit("a test question occurs in train.jsonl")
    if args.base is None:
        tokenizer = make_tokenizer(train, args.vocab)
        model = make_model(args, tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        model = AutoModelForCausalLM.from_pretrained(args.base)
    finetune(args, model, tokenizer, banned)
    size = save(args, model, tokenizer, train, test)
    report(model, tokenizer, train, test)
    print(f"overlap        0 test questions in train.jsonl, compared with all names made equal\n"
          f"folder         {args.out}, {size / 1e6:.1f} MB\nseconds        {time.time() - start:.0f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
