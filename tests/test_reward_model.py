"""scripts/train_reward_model.py: from preference pairs to a plain Hugging Face reward model, on tiny random models."""

import ast
import csv
import dataclasses
import json
import math
import random
import re
import runpy
import shlex
import string
import sys
from pathlib import Path

import datasets
import matplotlib.figure
import pytest
import tokenizers
import torch
import transformers
import tyro
from conftest import SHAPE, make_tokenizer, read_log

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import train_reward_model as script
from train_reward_model import Config, Pair, UsageError, conversation_ids, score_conversations

import ppo_llm

SCRIPT = Path(script.__file__)
ROOT = SCRIPT.parents[1]
DOCUMENT = ROOT / "docs" / "reward_models.md"
LETTERS = string.ascii_letters + string.digits
KINDS = ["qwen2", "gpt2", "bert"]


def make_classifier(kind: str = "qwen2", seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A tiny random model with a head of one score."""
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    shape = SHAPE | (gpt2 if kind == "gpt2" else {}) | {"num_labels": 1} | changes
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **shape)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def likes_e(count: int, seed: int = 0) -> list[dict]:
    """Pairs whose chosen response has more letters e than the rejected one."""
    chance, rows = random.Random(seed), []
    while len(rows) < count:
        prompt, one, other = ("".join(chance.choices("abcdefgh", k=chance.randrange(3, 8))) for _ in range(3))
        if one.count("e") > other.count("e"):
            rows.append({"prompt": f"{prompt}{len(rows)}", "chosen": one, "rejected": other})
    return rows


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Drawing training_curves.png takes longer than training. Only `trained`, which is made before this, draws it."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **rest: Path(path).touch())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A language model without a head, its tokenizer, and preference pairs."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen2", **SHAPE, attention_dropout=0.5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(padding_side="left").save_pretrained(folder)  # as for generation
    write_rows(folder / "pairs.jsonl", likes_e(400))
    write_rows(folder / "held_out.jsonl", likes_e(200, seed=1))
    return folder


def make_config(base: Path, **changes) -> Config:
    settings = {"model": str(base), "dataset": f"{base}/pairs.jsonl", "eval_dataset": f"{base}/held_out.jsonl",
                "device": "cpu", "max_length": 64, "train_batch_size": 16, "micro_batch_size": 16, "lr": 3e-3,
                "eval_every": 0}
    return Config(**settings | changes)


def train(base: Path, run_dir: Path, **changes) -> dict:
    """The summary of a finished run."""
    script.main(make_config(base, output_dir=str(run_dir), **changes))
    return json.loads((run_dir / "summary.json").read_text())


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def some_sequences(count: int = 12, seed: int = 0) -> list[list[int]]:
    """Of different lengths; the first ones end with 0, 1, 2, ..., among them pad (0) and eos (1)."""
    chance = random.Random(seed)
    return [[chance.randrange(3, 64) for _ in range(chance.randrange(1, 20))] + [i] for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The loss.


def test_the_loss_is_minus_log_sigmoid_of_the_margin():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.5, 0.0, 3.0])
    expected = [math.log(1 + math.exp(-1.5)), math.log(2), math.log(1 + math.exp(4))]
    assert script.bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_loss_is_the_probability_of_the_wrong_order():
    chosen, rejected = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([0.5, 3.0], requires_grad=True)
    script.bradley_terry_loss(chosen, rejected).sum().backward()
    wrong = [1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-4))]
    assert (-chosen.grad).tolist() == pytest.approx(wrong)
    assert rejected.grad.tolist() == pytest.approx(wrong)


def test_the_loss_of_a_huge_margin_is_finite():
    loss = script.bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert loss.tolist() == [2e4, 0]


def test_a_tie_counts_as_half_a_pair():
    metrics = script.pair_metrics(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 4.0, 0.0]), "eval")
    assert metrics["eval/accuracy"] == 2.5 / 4
    assert metrics["eval/margin"] == pytest.approx((1 + 0 - 1 + 4) / 4)
    assert metrics["eval/score"] == pytest.approx((1 + 4 + 7 + 4) / 8)


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> conversations -> token ids.

QUESTION, GOOD, BAD = "How many?\nTell me", "Seven.", "No idea."
USER, YES, NO = ({"role": role, "content": text} for role, text in
                 (("user", QUESTION), ("assistant", GOOD), ("assistant", BAD)))
SHAREGPT = {"conversations": [{"from": "human", "value": QUESTION}], "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD}}
FORMATS = {
    "text": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "messages after a prompt": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "whole conversations": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "whole conversations and their prompt": {"prompt": QUESTION, "chosen": [USER, YES], "rejected": [USER, NO]},
    "Alpaca": {"instruction": "How many?", "input": "Tell me", "chosen": GOOD, "rejected": BAD},
    "Alpaca without input": {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD},
    "ShareGPT": SHAREGPT,
    "messages": {"messages": [USER], "chosen": YES, "rejected": NO},
    "mixed": {"prompt": [USER], "chosen": GOOD, "rejected": [NO]},
}


def column_of(row: dict) -> str:
    return next((name for name in script.PROMPT_COLUMNS if name in row), "")


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_format_gives_the_same_two_conversations(name):
    row = FORMATS[name]
    assert script.read_conversation(row, "chosen", column_of(row)) == [USER, YES]
    assert script.read_conversation(row, "rejected", column_of(row)) == [USER, NO]


def test_a_system_turn_and_earlier_turns_stay_in_front():
    system, earlier = {"role": "system", "content": "Be brief."}, [USER, NO]
    sharegpt = SHAREGPT | {"conversations": [{"from": "system", "value": "Be brief."},
                                             {"from": "human", "value": QUESTION}, {"from": "gpt", "value": BAD},
                                             {"from": "human", "value": QUESTION}]}
    whole = {"chosen": [system, *earlier, USER, YES], "rejected": [system, *earlier, USER, NO]}
    for row in (sharegpt, whole):
        assert script.read_conversation(row, "chosen", column_of(row)) == [system, *earlier, USER, YES]
    row = FORMATS["Alpaca"] | {"system": "Be brief."}
    assert script.read_conversation(row, "chosen", "instruction") == [system, USER, YES]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_the_file_format_does_not_matter(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [FORMATS["text"], {"prompt": "ä, \"b\"", "chosen": "1", "rejected": "2"}]
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "json":
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())  # with a byte order mark
    elif suffix == "jsonl":
        path.write_bytes("".join(json.dumps(row) + "\r\n" for row in rows).encode())
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{suffix}")(path)
    assert script.read_rows(str(path), "train") == rows


def test_a_prompt_column_can_be_named():
    rows, config = [{"query": "abc", "chosen": "d", "rejected": "e"}], Config(prompt_column="query")
    pair, = script.make_pairs(rows, make_tokenizer(), config, "SOURCE")
    assert json.loads(pair.prompt) == [{"role": "user", "content": "abc"}]


def byte_tokenizer(template: str | None = None, prefix: str = "", suffix: str = "", **special):
    """Bytes as tokens; prefix and suffix are put around each text by the tokenizer itself."""
    marks = ["<s>", "</s>", "[CLS]", "[SEP]", "<pad>"]
    vocabulary = {word: i for i, word in enumerate(marks + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(marks)
    if prefix or suffix:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{prefix} $A {suffix}".strip(), special_tokens=[(mark, marks.index(mark)) for mark in marks])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    fast.chat_template = template
    return fast


CHAT = "<s>{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(("tokenizer", "text"), [
    (byte_tokenizer(CHAT, "<s>", bos_token="<s>", eos_token="</s>"), "<s>u:Hi</s>a:Yes</s>"),  # no second <s> or </s>
    (byte_tokenizer(None, "<s>", bos_token="<s>", eos_token="</s>"), "<s>Hi\nYes</s>"),
    (byte_tokenizer(None, "<s>", "</s>", bos_token="<s>", eos_token="</s>"), "<s>Hi\nYes</s>"),
    (byte_tokenizer(None, eos_token="</s>"), "Hi\nYes</s>"),
    (byte_tokenizer(None, "[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]"), "[CLS]Hi\nYes[SEP]"),
    (byte_tokenizer(None), "Hi\nYes"),
])
def test_a_conversation_is_rendered_by_the_template_or_by_the_tokenizers_own_rules(tokenizer, text):
    assert tokenizer.decode(conversation_ids(tokenizer, TALK, 100)) == text


@pytest.mark.parametrize("template", [CHAT, None])
def test_a_long_conversation_loses_its_first_tokens_only(template):
    tokenizer = byte_tokenizer(template, "<s>", bos_token="<s>", eos_token="</s>")
    whole = conversation_ids(tokenizer, TALK, 100)
    assert len(whole) > 4
    for limit in (1, 4, len(whole) - 1):
        assert conversation_ids(tokenizer, TALK, limit) == whole[-limit:]
    assert conversation_ids(tokenizer, TALK, len(whole)) == whole
    assert tokenizer.decode(whole[-4:]) == "Yes</s>"  # the response and its end


def test_shortened_and_equal_pairs_are_counted(capsys):
    rows = [{"prompt": "abc", "chosen": "d", "rejected": "e"}, {"prompt": "abc", "chosen": "d", "rejected": "d"},
            {"prompt": "a" * 20, "chosen": "d", "rejected": "e"}, {"prompt": "a", "chosen": "bc", "rejected": "ä"}]
    pairs = script.make_pairs(rows, make_tokenizer(), Config(max_length=10), "SOURCE")
    said = capsys.readouterr().err
    assert "SOURCE: dropped 1 of 4 rows" in said
    assert "SOURCE: 1 of 4 pairs have more than 10 tokens" in said
    assert [len(pair.chosen) for pair in pairs] == [4, 10, 3]
    assert pairs[1].chosen[-2:] != pairs[1].rejected[-2:]


def test_pairs_that_differ_only_before_the_cut_are_dropped(capsys):
    rows = [{"prompt": "a", "chosen": "d" + "e" * 20, "rejected": "f" + "e" * 20}, {"prompt": "a", **dict(
        chosen="b", rejected="c")}]
    assert len(script.make_pairs(rows, make_tokenizer(), Config(max_length=10), "SOURCE")) == 1
    assert "dropped 1 of 2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Scores.


def score_alone(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The head on the last token of a decoder, or what an encoder makes of the whole sequence, without any padding."""
    ids = torch.tensor([ids])
    if model.config.model_type == "bert":
        return model(ids).logits[0, 0]
    return model.score(model.base_model(ids).last_hidden_state[0, -1])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch_and_equal_a_plain_pass(kind):
    model, sequences = make_classifier(kind), some_sequences()
    with torch.no_grad():
        expected = torch.stack([score_alone(model, ids) for ids in sequences])
        assert expected.std() > 0.1
        for size in (1, 2, 5, 12, 100):
            scores = score_conversations(model, sequences, size)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        backwards = score_conversations(model, sequences[::-1], 5).flip(0)
        torch.testing.assert_close(backwards, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_padding_with_the_token_at_the_end_would_score_another_token(kind):
    # what score_conversations has to avoid: pad == eos, and a sequence that ends with eos
    model, ids = make_classifier(kind), [5, 6, 7, 1]
    model.config.pad_token_id = 1
    with torch.no_grad():
        right, shifted = score_alone(model, ids), model(torch.tensor([ids])).logits[0, 0]
        assert (right - shifted).abs() > 1e-2
        torch.testing.assert_close(shifted, score_alone(model, ids[:-1]))
        scores = score_conversations(model, [ids, ids[:2], [8, 9, 1, 4, 1, 1]], 3)
    torch.testing.assert_close(scores[0], right)


def test_as_many_endings_as_sequences_leave_an_id_for_padding():
    model = make_classifier(vocab_size=64)
    sequences = [[7] * length + [end] for length, end in zip(range(1, 33), range(32), strict=True)]
    with torch.no_grad():
        expected = torch.stack([score_alone(model, ids) for ids in sequences])
        torch.testing.assert_close(score_conversations(model, sequences, 32), expected, atol=1e-5, rtol=1e-5)


def make_pair(rows: int, seed: int = 0) -> list[Pair]:
    ids = some_sequences(2 * rows, seed)
    return [Pair("", a, b) for a, b in zip(ids[::2], ids[1::2], strict=True)]


def weights_after_a_step(kind: str = "qwen2", **changes) -> tuple[torch.Tensor, dict]:
    model = make_classifier(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = script.train_batch(model, optimizer, make_pair(6), Config(device="cpu", grad_clip=1e9, **changes))
    return torch.cat([w.detach().flatten() for w in model.parameters()]), metrics


@pytest.mark.parametrize("kind", KINDS)
def test_the_micro_batch_size_changes_neither_the_step_nor_the_metrics(kind):
    weights, metrics = weights_after_a_step(kind, micro_batch_size=6)
    for size in (1, 4):
        others, other_metrics = weights_after_a_step(kind, micro_batch_size=size)
        torch.testing.assert_close(others, weights, atol=1e-5, rtol=1e-5)
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    start = torch.cat([w.detach().flatten() for w in make_classifier(kind).parameters()])
    assert (weights - start).abs().max() > 1e-3


def test_a_step_is_the_gradient_of_the_mean_loss():
    weights, metrics = weights_after_a_step()
    model = make_classifier()
    margins = torch.stack([score_alone(model, p.chosen) - score_alone(model, p.rejected) for p in make_pair(6)])
    loss = torch.log(1 + torch.exp(-margins)).mean()
    loss.backward()
    expected = torch.cat([(w - 0.1 * (0 if w.grad is None else w.grad)).detach().flatten() for w in model.parameters()])
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_gradient_is_clipped_and_a_broken_one_is_left_out():
    model, pairs = make_classifier(), make_pair(4)
    before = [w.detach().clone() for w in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = script.train_batch(model, optimizer, pairs, Config(device="cpu", grad_clip=0.01))
    moved = sum((w - b).square().sum() for w, b in zip(model.parameters(), before, strict=True)).sqrt().item()
    assert metrics["optim/grad_norm"] > 0.1 and metrics["optim/skipped_steps"] == 0
    assert moved == pytest.approx(0.01, rel=1e-3)
    model.score.weight.data[0, 0] = math.inf
    before = [w.detach().clone() for w in model.parameters()]
    metrics = script.train_batch(model, optimizer, pairs, Config(device="cpu"))
    assert metrics["optim/skipped_steps"] == 1
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))


def test_scores_of_a_bfloat16_model_are_fp32():
    with torch.no_grad():
        assert score_conversations(make_classifier().bfloat16(), some_sequences(3), 2).dtype == torch.float32


def test_the_micro_batch_size_is_the_number_of_pairs_in_a_pass():
    model, sizes = make_classifier(), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output.logits)))
    config = Config(device="cpu", micro_batch_size=4)
    script.train_batch(model, torch.optim.SGD(model.parameters(), lr=0.1), make_pair(6), config)
    assert sizes == [8, 4]
    script.evaluate(model, make_pair(6), config)
    assert sizes[2:] == [8, 4]


def test_bfloat16_is_for_the_passes_only(base):
    exact, rounded = (make_config(base, dtype=dtype) for dtype in ("float32", "bfloat16"))
    model = script.load_model(rounded)
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    with torch.no_grad():
        gaps = [(x - y).abs().max() for x, y in zip(*(script.score_pairs(model, make_pair(8), config)
                                                      for config in (exact, rounded)), strict=True)]
    assert 0 < max(gaps) < 0.1


def test_dropout_is_off_with_and_without_checkpointing(base):
    plain, saving = (script.load_model(make_config(base, gradient_checkpointing=x)) for x in (False, True))
    assert saving.training and plain.config.attention_dropout == 0.5
    scores = [torch.stack(script.score_pairs(model, make_pair(4), make_config(base))) for model in (plain, saving)]
    for x in scores:
        x.sum().backward()
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(*(model.model.layers[0].mlp.up_proj.weight.grad for model in (plain, saving)))


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A finished run and the model that it had in memory."""
    run_dir, kept = tmp_path_factory.mktemp("trained") / "run", []
    with pytest.MonkeyPatch.context() as monkeypatch:
        save = script.save_model
        monkeypatch.setattr(script, "save_model", lambda model, *rest: (save(model, *rest), kept.append(model)))
        train(base, run_dir, total_epochs=4, eval_every=40)
    return run_dir, kept[0]


def held_out_pairs(base: Path) -> list[Pair]:
    config = make_config(base)
    return script.make_pairs(likes_e(200, seed=1), make_tokenizer(), config, "held out")


def scores_of(model, pairs: list[Pair]) -> torch.Tensor:
    with torch.no_grad():
        return score_conversations(model, [ids for pair in pairs for ids in (pair.chosen, pair.rejected)], 32)


def test_a_preference_is_learned_and_the_report_is_that_of_the_saved_model(base, trained):
    summary = json.loads((trained[0] / "summary.json").read_text())
    first, last = summary["first_evaluation"][0], summary["last_evaluation"][0]
    assert abs(first["eval/accuracy"] - 0.5) < 0.2
    assert last["eval/accuracy"] >= 0.9
    margin = scores_of(load(trained[0] / "model"), held_out_pairs(base)).view(-1, 2).diff().squeeze(1).neg()
    accuracy = (margin > 0).double().mean().item()
    assert last["eval/accuracy"] == pytest.approx(accuracy)
    assert last["eval/margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert last["eval/loss"] == pytest.approx(torch.log(1 + torch.exp(-margin)).mean().item(), rel=1e-4)
    assert last["eval/standard_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 200))


def test_with_learning_rate_0_nothing_is_learned(base, tmp_path):
    summary = train(base, tmp_path / "run", lr=0.0, total_steps=3)
    first, last = summary["first_evaluation"][0], summary["last_evaluation"][0]
    assert {k: v for k, v in last.items() if k != "step"} == {k: v for k, v in first.items() if k != "step"}
    assert abs(last["eval/accuracy"] - 0.5) < 0.2


def test_the_saved_folder_is_plain_and_scores_as_the_model_in_memory(base, trained):
    folder, pairs = trained[0] / "model", held_out_pairs(base)[:20]
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForSequenceClassification"]
    torch.testing.assert_close(scores_of(load(folder), pairs), scores_of(trained[1], pairs))
    trunk = transformers.AutoModel.from_pretrained(folder)  # what a critic starts from
    for name, weight in trunk.named_parameters():
        assert torch.equal(weight, trained[1].model.get_parameter(name)), name


def test_a_user_who_knows_only_transformers_gets_the_same_scores(base, trained):
    folder, pairs = trained[0] / "model", held_out_pairs(base)[:20]
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    assert len({len(text) for text in texts}) > 3
    with torch.no_grad():
        plain = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(plain, scores_of(trained[1], pairs), atol=1e-5, rtol=1e-5)
    assert tokenizer.model_max_length == 64 and tokenizer.padding_side == "right"
    assert tokenizer("abc" * 40 + "xyz", truncation=True).input_ids[-3:] == tokenizer("xyz").input_ids


@pytest.mark.parametrize(("special", "pad"), [
    ({"pad_token": "</s>", "eos_token": "</s>", "bos_token": "<s>"}, "<s>"),  # pad == eos, with which texts end
    ({"pad_token": "<pad>", "eos_token": "</s>"}, "<pad>"), ({"eos_token": "</s>", "unk_token": "<s>"}, "<s>"),
    ({"pad_token": "</s>", "eos_token": "</s>"}, None)])
def test_the_saved_padding_is_no_token_with_which_a_conversation_ends(tmp_path, special, pad):
    tokenizer = byte_tokenizer(None, **special)
    model, pairs = make_classifier(vocab_size=300), []
    for text in ("Yes", "Certainly", "No"):
        ids = conversation_ids(tokenizer, [{"role": "assistant", "content": text}], 100)
        pairs.append(Pair("", ids, ids))
    script.save_model(model, tokenizer, pairs, tmp_path / "model", Config())
    assert not (tmp_path / "temporary").exists()
    model, tokenizer = load(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.pad_token == pad and model.config.pad_token_id == tokenizer.pad_token_id
    alone = [score_alone(model, pair.chosen).item() for pair in pairs]
    batches = [[text] for text in ("Yes</s>", "Certainly</s>", "No</s>")]
    batches = [sum(batches, [])] if pad else batches  # without a padding token, only one by one
    with torch.no_grad():
        plain = [score for texts in batches for score in
                 model(**tokenizer(texts, padding=bool(pad), return_tensors="pt")).logits[:, 0].tolist()]
    assert plain == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_nothing_but_themselves_and_the_head_and_are_merged_in_the_end(kind, tmp_path, monkeypatch):
    folder, kept, save = tmp_path / kind, {}, script.save_model
    make_classifier(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_rows(folder / "pairs.jsonl", likes_e(100))

    def load_and_keep(config, load_model=script.load_model):
        kept["model"] = model = load_model(config)
        kept["trainable"] = {name for name, w in model.named_parameters() if w.requires_grad}
        kept["start"] = scores_of(model, pairs)
        return model

    def save_and_keep(model, *rest):
        kept["end"] = scores_of(model, pairs)
        save(model, *rest)

    monkeypatch.setattr(script, "load_model", load_and_keep)
    monkeypatch.setattr(script, "save_model", save_and_keep)
    pairs = script.make_pairs(likes_e(20, seed=2), make_tokenizer(), Config(), "SOURCE")
    original = load(folder)
    torch.testing.assert_close(scores_of(original, pairs), scores_of(load(folder), pairs), atol=0, rtol=0)
    train(folder, tmp_path / "run", eval_dataset=None, lora_rank=4, total_steps=12)
    assert all("lora_" in name or "score" in name or "classifier" in name for name in kept["trainable"])
    assert any("lora_" in name for name in kept["trainable"])
    assert any("lora_" not in name for name in kept["trainable"])
    torch.testing.assert_close(kept["start"], scores_of(original, pairs))  # adapters begin as nothing
    assert (kept["end"] - kept["start"]).abs().max() > 0.05
    saved = load(tmp_path / "run" / "model")
    torch.testing.assert_close(scores_of(saved, pairs), kept["end"], atol=1e-5, rtol=1e-5)
    assert not list((tmp_path / "run" / "model").glob("*adapter*"))
    before, after = original.state_dict(), saved.state_dict()
    assert before.keys() == after.keys()  # nothing of peft is left
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    head = {name for name in after if name.startswith(("score", "classifier"))}
    assert head <= moved
    for name in after.keys() - moved:
        assert "embed" in name or "norm" in name.lower() or "bias" in name or "wte" in name or "wpe" in name \
            or "ln_" in name, name
    for name in moved - head:  # a product of two matrices of rank 4
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-4) <= 4


def test_every_part_of_the_head_is_trained_beside_adapters(tmp_path):
    model = make_classifier("modernbert", cls_token_id=1, sep_token_id=2)  # with a dense layer before its classifier
    model.save_pretrained(tmp_path)
    model = script.load_model(Config(model=str(tmp_path), device="cpu", lora_rank=2))
    trainable = {name for name, w in model.named_parameters() if w.requires_grad}
    assert any(".head." in name for name in trainable) and any(".classifier." in name for name in trainable)
    assert not any(".model.model." in name and "lora_" not in name for name in trainable)
    assert model.peft_config["default"].lora_alpha == 4  # twice the rank
    model = script.load_model(Config(model=str(tmp_path), device="cpu", lora_rank=2, lora_alpha=7))
    assert model.peft_config["default"].lora_alpha == 7


@pytest.mark.slow
def test_adapters_are_merged_before_the_last_evaluation(base, tmp_path):
    summary = train(base, tmp_path / "run", lora_rank=8, lora_alpha=8, lr=1e-2, total_epochs=3,
                    gradient_checkpointing=True)
    assert summary["last_evaluation"][0]["eval/accuracy"] >= 0.85
    scores = scores_of(load(tmp_path / "run" / "model"), held_out_pairs(base))
    assert summary["last_evaluation"][0]["eval/score"] == pytest.approx(scores.mean().item(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_centring_takes_nearly_the_same_number_from_every_score(kind):
    model, chance = make_classifier(kind), random.Random(0)
    sequences = [[chance.randrange(3, 64) for _ in range(chance.randrange(5, 10))] + [2] for _ in range(600)]
    pairs = [Pair("", one, other) for one, other in zip(sequences[::2], sequences[1::2], strict=True)]
    with torch.no_grad():
        (model.classifier if kind == "bert" else model.score).weight += 1  # an offset, or not: any scores will do
        model.double()
    before = scores_of(model, pairs[:200]).double(), scores_of(model, pairs[200:]).double()
    script.center_scores(model, pairs[:200])
    after = scores_of(model, pairs[:200]).double(), scores_of(model, pairs[200:]).double()
    assert abs(after[0].mean()) < 1e-5
    assert abs(before[0].mean()) > 0.05
    others = after[1] - before[1]  # pairs that it has not seen
    assert others.mean() == pytest.approx(-before[0].mean().item(), rel=0.2)
    assert others.std() < abs(others.mean())


@pytest.mark.slow
def test_a_centred_model_is_saved_centred_and_ranks_as_before(base, trained, tmp_path):
    pairs = held_out_pairs(base)
    folder, model, states = tmp_path / "offset", load(trained[0] / "model"), []
    model.score.register_forward_hook(lambda module, inputs, output: states.append(inputs[0][0, -1]))
    with torch.no_grad():  # a reward model whose scores are too high
        for pair in pairs:
            score_conversations(model, [pair.chosen], 1)
        states = torch.stack(states)
        model.score.weight += 6 * torch.linalg.lstsq(states, torch.ones(len(states), 1)).solution.T
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    runs = {}
    for center in (False, True):
        run_dir = tmp_path / str(center)
        summary = train(base, run_dir, model=str(folder), lr=0.0, total_steps=1, center=center)
        runs[center] = summary["last_evaluation"][0]
        mean = scores_of(load(run_dir / "model"), pairs).mean().item()
        assert mean == pytest.approx(runs[center]["eval/score"], abs=1e-4)
    assert runs[False]["eval/score"] > 3
    assert abs(runs[True]["eval/score"]) < 0.15 * runs[True]["eval/score_std"]  # centred on other pairs
    assert abs(runs[True]["eval/accuracy"] - runs[False]["eval/accuracy"]) <= 0.015
    assert runs[True]["eval/margin"] == pytest.approx(runs[False]["eval/margin"], rel=0.1)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(base, tmp_path):
    runs = {name: tmp_path / name for name in ("one", "two", "other")}
    for name, run_dir in runs.items():
        train(base, run_dir, total_steps=2, seed=2 if name == "other" else 1, eval_dataset=None)
    one, two, other = (load(run_dir / "model").state_dict() for run_dir in runs.values())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_head_depends_on_the_seed_only(base):
    one, other, again = (script.load_model(make_config(base, seed=seed)).score.weight for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_tenth_of_the_prompts_is_held_out_and_no_prompt_is_on_both_sides(base, tmp_path):
    rows = [{"prompt": LETTERS[i % 40], "chosen": LETTERS[i % 61], "rejected": "99"} for i in range(120)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = [script.load_pairs(make_tokenizer(), Config(dataset=path, seed=seed)) for seed in (1, 1, 2)]
    for training, held_out in splits:
        ours, theirs = ({pair.prompt for pair in part} for part in (training, held_out))
        assert len(theirs) == 4 and len(ours) == 36 and not ours & theirs
        assert len(training) + len(held_out) == 120
    assert splits[0] == splits[1] != splits[2]


def test_prompts_that_training_and_evaluation_share_are_counted(base, tmp_path, capsys):
    path = write_rows(tmp_path / "held_out.jsonl", likes_e(400)[:3] + likes_e(5, seed=1))
    script.load_pairs(make_tokenizer(), make_config(base, eval_dataset=path))
    assert re.search(r"3 of its prompts are in .*pairs.jsonl too", capsys.readouterr().err)


def test_the_learning_rate_rises_and_then_falls_to_0(base, tmp_path):
    train(base, tmp_path / "run", lr=1e-3, warmup_steps=2, total_steps=6)
    rates = [row["optim/lr"] for row in read_log(tmp_path / "run")[1:]]
    assert rates == pytest.approx([1e-3 * x for x in (1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25)])


def test_every_epoch_sees_every_pair_once_in_another_order(base, tmp_path, monkeypatch):
    batches = []
    monkeypatch.setattr(script, "train_batch", lambda model, optimizer, batch, config: batches.append(batch) or {})
    monkeypatch.setattr(script, "evaluate", lambda *rest: {"eval/loss": 0.0})
    monkeypatch.setattr(script, "save_summary", lambda *rest: [{}, {}])
    script.main(make_config(base, output_dir=str(tmp_path / "run"), total_epochs=2, train_batch_size=64))
    assert [len(batch) for batch in batches] == [64] * 6 + [16] + [64] * 6 + [16]
    epochs = [[tuple(pair.chosen + pair.rejected) for batch in part for pair in batch]
              for part in (batches[:7], batches[7:])]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_gives_a_conversation_the_score_that_it_has_in_training(kind, tmp_path):
    make_classifier(kind).save_pretrained(tmp_path)
    make_tokenizer(model_max_length=32).save_pretrained(tmp_path)
    prompts = [[{"role": "user", "content": "abc"}], [{"role": "user", "content": "x" * 20}],
               [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]]
    responses = ["d", "y" * 20, "eeeee"]  # the second one is too long: it loses its beginning
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sequences = [conversation_ids(tokenizer, [*prompt, {"role": "assistant", "content": response}], 32)
                 for prompt, response in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        expected = score_conversations(load(tmp_path), sequences, 8)
    reward = ppo_llm.load_reward(ppo_llm.Config(reward=str(tmp_path), device="cpu"))
    examples = [ppo_llm.Example(prompt[-1]["content"], "", [1], prompt) for prompt in prompts]
    scores, metrics = ppo_llm.score_responses(reward, examples, responses)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    assert float(metrics["truncated"]) == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder.


def test_the_artifacts_of_a_run(trained):
    run_dir = trained[0]
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "model", "summary.json", "training_curves.png", "training_metrics.csv"]
    summary = json.loads((run_dir / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["status"] == "finished" and summary["step"] == 100
    assert summary["pairs"] == {"train": 400, "held_out": 200}
    assert summary["config"]["lr"] == 3e-3 and summary["versions"]["torch"] == torch.__version__
    with open(run_dir / "training_metrics.csv", newline="") as file:
        assert next(csv.reader(file)) == script.METRICS
    rows = read_log(run_dir)
    assert [row["step"] for row in rows] == list(range(101))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 40, 80, 100]
    assert all(set(script.METRICS) - set(row) == {name for name in script.METRICS if "eval" in name}
               for row in rows if row["step"] % 40 and row["step"] != 100)
    assert rows[100] | summary["last_evaluation"][0] == rows[100]
    assert (run_dir / "training_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_killed_run_leaves_is_whole(base, tmp_path, monkeypatch):
    def die(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train_batch", die)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "running"
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", die)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "other", total_steps=1)
    assert not (tmp_path / "other" / "model").exists()  # the weights were written, the tokenizer not


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_model", pytest.fail)
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="is not an empty folder"):
            train(base, taken)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_default_folder_names_script_data_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = script.open_run(Config(dataset="org/name:part", seed=7))
    assert re.fullmatch(r"output/train_reward_model-name-part-seed7-\d{8}-\d{6}", str(run_dir)) and run_dir.is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.

TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_ROWS = [  # rows, what is said
    ([{"prompt": "a", "better": "b", "worse": "c"}], "no column chosen; there are prompt, better, worse"),
    ([{"prompt": "a", "chosen": "b"}], "no column rejected; there are prompt, chosen"),
    ([{"query": "a", "chosen": "b", "rejected": "c"}], "no column prompt or instruction or conversations or messages"),
    ([TEXT, {"prompt": "a", "chosen": "", "rejected": "c"}], "row 2: no text in chosen"),
    ([TEXT, TEXT | {"rejected": " \n"}], "row 2: no text in rejected"),
    ([TEXT, TEXT | {"rejected": None}], "row 2: no text in rejected"),
    ([TEXT, TEXT | {"chosen": [{"role": "assistant", "content": ""}]}], "row 2: no text in chosen"),
    ([TEXT, TEXT | {"chosen": []}], "row 2: no text in chosen"),
    ([TEXT, TEXT | {"chosen": 7}], "row 2: no text in chosen"),
    ([TEXT, TEXT | {"chosen": [{"role": "assistant", "text": "b"}]}], "row 2: no text in chosen"),
    ([TEXT, TEXT | {"prompt": " "}], "row 2: no text in prompt"),
    ([TEXT, TEXT | {"prompt": float("nan")}], "row 2: no text in prompt"),
    ([TEXT, {"chosen": "b", "rejected": "c"}], "row 2: no text in prompt"),
    ([TEXT, TEXT | {"chosen": [USER]}], "row 2: chosen must be the row's prompt"),
    ([TEXT, TEXT | {"chosen": [USER, YES]}], "row 2: chosen must be the row's prompt"),  # another prompt
    ([{"chosen": [USER, YES, USER], "rejected": [USER, NO]}], "row 1: chosen must be the row's prompt"),
    ([{"chosen": [YES], "rejected": [NO]}], "row 1: chosen must be the row's prompt"),
    ([TEXT | {"rejected": "b"}] * 2, "no pairs are left"),
    ([TEXT, TEXT | {"chosen": "d"}], "all rows have the same prompt"),
    ([], "no rows"),
]


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is wrong has to be found before this."""
    monkeypatch.setattr(script, "load_model", lambda config: pytest.fail("a model was loaded"))


def refusal(config: Config) -> str:
    with pytest.raises(UsageError) as error:
        script.main(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS, ids=[str(i) for i in range(len(BAD_ROWS))])
def test_bad_rows_are_refused_with_their_number(base, tmp_path, no_model, rows, said):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refusal(make_config(base, dataset=path, eval_dataset=None, output_dir=str(tmp_path / "run")))
    assert said in message and path in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "content", "said"), [
    ("rows.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": \n', "rows.jsonl:3: "),
    ("rows.jsonl", b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}\n', "rows.jsonl:1: "),
    ("rows.jsonl", b"", "no rows"), ("rows.json", b"[]", "no rows"), ("rows.json", b"[1, 2]", "must be objects"),
    ("rows.json", b'{"data": []}', "must be objects"), ("rows.json", b"[{", "rows.json: "),
    ("rows.csv", b"", "rows.csv: "), ("rows.parquet", b"no parquet", "rows.parquet: "),
    ("missing.jsonl", None, "missing.jsonl: "),
])
def test_bad_files_are_refused_with_their_name_and_line(base, tmp_path, monkeypatch, no_model, name, content, said):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refusal(make_config(base, dataset=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["max_length", "total_epochs", "total_steps", "train_batch_size", "micro_batch_size",
                                  "grad_clip", "lora_alpha"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(base, no_model, name, value):
    assert refusal(make_config(base, **{name: value})) == f"{name} must be positive, not {value}"


@pytest.mark.parametrize("name", ["lr", "weight_decay", "warmup_steps", "lora_rank", "eval_every"])
def test_rates_must_not_be_negative_or_infinite(base, no_model, name):
    for value in (-1, math.nan, math.inf):
        assert refusal(make_config(base, **{name: value})) == f"{name} must not be negative, not {value}"


def test_models_that_cannot_score_are_refused(base, tmp_path, no_model):
    assert "missing" in refusal(make_config(base, model=str(tmp_path / "missing")))
    assert "exceeds the 256 tokens" in refusal(make_config(base, max_length=257))
    make_tokenizer().save_pretrained(tmp_path)
    for config, said in (
        (transformers.BertConfig(num_labels=3, architectures=["BertForSequenceClassification"]), "(bert, labels: 3)"),
        (transformers.T5Config(), "(t5, labels: 1)"), (transformers.ViTConfig(), "(vit, labels: 1)"),
    ):
        config.save_pretrained(tmp_path)
        assert said in refusal(make_config(base, model=str(tmp_path)))
    transformers.AutoConfig.for_model("qwen2", **SHAPE | {"vocab_size": 5}).save_pretrained(tmp_path)
    assert "of its tokenizer is none of its 5" in refusal(make_config(base, model=str(tmp_path)))


def test_weights_that_are_not_finite_are_refused(base, tmp_path):
    model = make_classifier()
    model.score.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    message = refusal(make_config(base, model=str(tmp_path / "broken"), output_dir=str(tmp_path / "b")))
    assert "not finite" in message


def test_a_template_that_refuses_a_conversation_names_its_row(base, tmp_path, no_model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['content'] == 'b' %}{{ raise_exception('Not b') }}{% endif %}x"
    rows = [{"prompt": prompt, "chosen": "c", "rejected": "d"} for prompt in "ab"]
    with pytest.raises(UsageError, match="SOURCE: row 2: Not b"):
        script.make_pairs(rows, tokenizer, Config(), "SOURCE")


def test_on_the_command_line_bad_input_is_one_sentence_and_exit_code_2(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    make_tokenizer().save_pretrained(tmp_path)
    pairs = ["--dataset", f"{base}/pairs.jsonl", "--max_length", "64"]
    for arguments, said in (
        (["--model", "missing", *pairs], "error: model missing: "),
        (["--model", str(base), "--dataset", "missing.jsonl"], "error: max_length = 1024 exceeds the 256 tokens"),
        (["--model", str(tmp_path), *pairs, "--output_dir", "run"], "error: Error no file named model.safetensors"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_reward_model.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        errors = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert len(errors) == 1 and errors[0].startswith(said), errors
    assert not list((tmp_path / "run").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The text of the script.

SOURCE = SCRIPT.read_text()
TREE = ast.parse(SOURCE)


def test_the_script_keeps_to_its_size_and_imports_nothing_from_the_repository():
    assert len(SOURCE.splitlines()) <= 570
    assert max(map(len, SOURCE.splitlines())) <= 110
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 45} == {}
    imported = {name.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    ours = {path.stem for folder in (ROOT, SCRIPT.parent) for path in folder.glob("*.py")}
    assert "torch" in imported and not imported & ours


def test_every_option_has_a_comment_and_is_read():
    node = next(node for node in TREE.body if getattr(node, "name", "") == "Config")
    body = SOURCE.splitlines()[node.lineno - 1 : node.end_lineno]
    for field in dataclasses.fields(Config):
        line = next(line for line in body if line.startswith(f"    {field.name}: "))
        assert "  # " in line, f"{field.name} has no help"
        assert re.search(rf"\b(?:config|c)\.{field.name}\b", SOURCE), f"{field.name} is an option that nothing reads"
        assert f"`{field.name}`" in DOCUMENT.read_text() or f"--{field.name}" in DOCUMENT.read_text(), field.name


def test_commands_in_the_docstring_and_the_document_parse():
    commands = re.findall(r"python scripts/train_reward_model\.py([^\n`&#|]*)",
                          (SOURCE + DOCUMENT.read_text()).replace("\\\n", " "))
    assert len(commands) >= 5
    for command in commands:
        tyro.cli(Config, args=shlex.split(command), use_underscores=True)


def test_importing_it_has_no_side_effects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random.seed(1)
    state = random.getstate(), torch.get_rng_state()
    runpy.run_path(str(SCRIPT), run_name="imported")
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")
