"""From files to prompts, and every refusal that must come before a model is loaded."""

import codecs
import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tokenizers
import transformers

import ppo_llm
from ppo_llm import DEMO, Config, UsageError

ROOT = Path(__file__).resolve().parents[1]
GSM8K_50 = Path(__file__).parent / "data" / "gsm8k_50.jsonl"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'  # verl's
ROWS = [{"question": "What is 2+2?", "answer": "#### 4"}, {"question": "And 3+3?", "answer": "#### 6"}]
CHAT = "{% for m in messages %}[ {{ m['role'] }} ] {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}> {% endif %}"


def make_tokenizer(template: str | None = CHAT, eos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens, with <s> before each text and, if asked, </s> after it."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    single = "<s> $A </s>" if eos else "<s> $A"
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def examples_of(rows: list[dict], tokenizer, training: bool = True, **flags) -> list[ppo_llm.Example]:
    return ppo_llm.make_examples(rows, tokenizer, Config(**{"reward": "file.py:f"} | flags), "SOURCE", training)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def refusal(function, *arguments) -> str:
    """The one sentence that the user would read."""
    with pytest.raises(UsageError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def refusal_of(rows: list[dict], tokenizer, **flags) -> str:
    return refusal(ppo_llm.make_examples, rows, tokenizer, Config(**flags), "SOURCE", True)


# ---------------------------------------------------------------------------------------------------------------------
# read_rows.


def test_every_file_format_gives_the_same_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        assert ppo_llm.read_rows(str(tmp_path / f"rows.{ending}"), "train") == ROWS


def test_the_demo_has_a_training_and_a_test_split_without_overlap():
    train, test = (ppo_llm.read_rows("demo", split) for split in ("train", "test"))
    assert len(train) > len(test) > 100
    assert not {row["question"] for row in train} & {row["question"] for row in test}


@pytest.mark.parametrize("content", [
    codecs.BOM_UTF8 + jsonl(ROWS).encode(), jsonl(ROWS, "\r\n"), jsonl(ROWS, "\n\n  \n"), jsonl(ROWS).rstrip()],
    ids=["byte order mark", "CRLF", "blank lines", "no newline at the end"])
def test_jsonl_from_other_systems_is_read(tmp_path, content):
    assert ppo_llm.read_rows(write(tmp_path / "rows.jsonl", content), "train") == ROWS


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    content = codecs.BOM_UTF8 + json.dumps(ROWS).encode()
    assert ppo_llm.read_rows(write(tmp_path / "rows.json", content), "train") == ROWS


def test_a_unicode_line_separator_within_a_string_does_not_end_the_row(tmp_path):
    rows = [{"prompt": "one\u2028two\u2029three\x85four \U0001f600 \u00e9"}]
    content = json.dumps(rows[0], ensure_ascii=False) + "\n"
    assert ppo_llm.read_rows(write(tmp_path / "rows.jsonl", content), "train") == rows


@pytest.mark.parametrize("line", [b"{'prompt': 1}", b'{"prompt": "a"', b'{"prompt": "\xe9"}', b"prompt"])
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path, line):
    path = write(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n' + line + b'\n{"prompt": "c"}\n')
    assert refusal(ppo_llm.read_rows, path, "train").startswith(f"{path}:4: ")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json", "missing.csv", "missing.parquet"])
def test_a_missing_file_is_refused_with_its_path(tmp_path, name):
    assert str(tmp_path / name) in refusal(ppo_llm.read_rows, str(tmp_path / name), "train")


@pytest.mark.parametrize(("name", "content", "phrase"), [
    ("rows.jsonl", "", "no rows"), ("rows.jsonl", "\n\n", "no rows"), ("rows.json", "[]", "no rows"),
    ("rows.json", "{}", "no rows"), ("rows.json", "", "Expecting value"),
    ("rows.jsonl", "[1]\n", "rows must be objects"), ("rows.json", '["a"]', "rows must be objects"),
    ("rows.jsonl", '{"prompt": "a"}\n"b"\n', "rows must be objects"), ("rows.json", "5", "rows must be objects"),
    ("rows.json", '{"data": [{"prompt": "a"}]}', "rows must be objects"),
    ("rows.csv", "", ""), ("rows.csv", "prompt\n", ""), ("rows.parquet", "not parquet", "")])
def test_a_file_without_rows_that_are_objects_is_refused_with_its_path(tmp_path, name, content, phrase):
    path = write(tmp_path / name, content)
    sentence = refusal(ppo_llm.read_rows, path, "train")
    assert sentence.startswith(path) and phrase in sentence


@pytest.mark.parametrize(("source", "expected"), [
    ("openai/gsm8k", ("openai/gsm8k", "main", "train")), ("gsm8k", ("gsm8k", "main", "train")),
    ("openai/gsm8k:socratic", ("openai/gsm8k", "socratic", "train")),
    ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")), ("a/b", ("a/b", None, "train")),
    ("a/b:c", ("a/b", "c", "train")), ("a/b:c:d", ("a/b", "c", "d")), ("a/b::d", ("a/b", None, "d"))])
def test_a_hub_name_means_name_configuration_and_split(monkeypatch, source, expected):
    calls = []

    def load_dataset(path, name=None, *, split=None):
        if path.endswith("gsm8k") and name is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['main', ...]")
        calls.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert ppo_llm.read_rows(source, "train") == ROWS
    assert calls == [expected]


def test_the_split_of_a_hub_name_may_be_a_slice(monkeypatch):
    splits = []

    def load_dataset(path, name=None, *, split=None):
        splits.append(split)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ppo_llm.read_rows("a/b:c:train[:10%]", "train")
    assert splits == ["train[:10%]"]


def test_gsm8k_is_evaluated_on_its_test_split(monkeypatch, tokenizer):
    calls = []

    def load_dataset(path, name=None, *, split=None):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("openai/gsm8k", "openai/gsm8k:main:train"):
        train, evals = ppo_llm.load_examples(tokenizer, Config(dataset=name, train_batch_size=1, ppo_mini_batch_size=1))
        assert len(train) == len(evals) == 2
    assert calls == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")] * 2


def test_a_hub_that_cannot_be_reached_is_the_users_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal(ppo_llm.read_rows, "someone/data", "train") == "someone/data: Couldn't reach the Hub"


# ---------------------------------------------------------------------------------------------------------------------
# Columns.


@pytest.mark.parametrize(("columns", "flags", "expected"), [
    (["question", "answer"], {}, ("question", "answer")), (["id", "prompt", "answer"], {}, ("prompt", "answer")),
    (["instruction", "input", "output"], {}, ("instruction", "output")),
    (["messages", "answer"], {}, ("messages", "answer")), (["prompt"], {"reward": "f.py:f"}, ("prompt", "")),
    (["instruction", "input"], {"reward": "f.py:f"}, ("instruction", "")),
    (["question", "answer", "text", "label"], {"prompt_column": "text", "answer_column": "label"}, ("text", "label")),
    (["prompt", "label"], {"answer_column": "label"}, ("prompt", "label"))])
def test_the_columns_of_every_known_format_are_found(tokenizer, columns, flags, expected):
    example = examples_of([{name: name for name in columns}], tokenizer, **{"reward": "gsm8k"} | flags)[0]
    assert (re.split(r"\s", example.text)[0], example.answer) == expected


@pytest.mark.parametrize(("columns", "flags", "wanted"), [
    (["text", "label"], {}, "question or instruction or prompt or messages"),
    (["prompt", "label"], {}, "answer or output"),  # the GSM8K reward needs an answer
    (["prompt", "answer"], {"prompt_column": "text"}, "text"),
    (["prompt", "answer"], {"answer_column": "label"}, "label"),
    (["prompt"], {"answer_column": "label", "reward": "f.py:f"}, "label")])
def test_an_unknown_column_is_refused_with_the_columns_there_are(tokenizer, columns, flags, wanted):
    sentence = refusal_of([{name: name for name in columns}], tokenizer, **flags)
    assert sentence == f"SOURCE: no column {wanted}; there are {', '.join(columns)}"


# ---------------------------------------------------------------------------------------------------------------------
# make_examples, render_prompt.


def test_a_gsm8k_question_gets_verls_instruction_after_one_space(tokenizer):
    example = examples_of(ROWS, tokenizer)[0]
    assert example.text == "What is 2+2? " + INSTRUCTION
    assert tokenizer.decode(example.prompt) == f"[ user ] What is 2+2? {INSTRUCTION} > "
    assert example.answer == "4"


@pytest.mark.parametrize(("row", "text"), [
    ({"instruction": "Translate.", "input": "hello"}, "Translate.\nhello"),
    ({"instruction": "Say something.", "input": ""}, "Say something."),
    ({"instruction": "Say something.", "input": None}, "Say something."),
    ({"instruction": "Say something."}, "Say something."), ({"prompt": "Hi"}, "Hi"),
    ({"prompt": "Hi", "input": "unused"}, "Hi"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "Hi")])
def test_only_a_question_gets_the_gsm8k_instruction_and_only_an_instruction_its_input(tokenizer, row, text):
    example = examples_of([row], tokenizer)[0]
    assert example.text == text
    assert tokenizer.decode(example.prompt) == f"[ user ] {text} > "


def test_chat_messages_are_kept_as_they_are(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    for column in ("messages", "prompt"):
        example = examples_of([{column: messages}], tokenizer)[0]
        assert tokenizer.decode(example.prompt) == "[ system ] Be brief. [ user ] Hi [ assistant ] Yes? [ user ] Bye > "
        assert example.text == "Bye"


def test_the_system_prompt_comes_first_and_once(tokenizer):
    rows = [{"prompt": "Hi"}, {"prompt": [{"role": "user", "content": "Ho"}]}]
    prompts = [tokenizer.decode(e.prompt) for e in examples_of(rows, tokenizer, system_prompt="Be brief.")]
    assert prompts == ["[ system ] Be brief. [ user ] Hi > ", "[ system ] Be brief. [ user ] Ho > "]


@pytest.mark.parametrize(("answer", "expected"), [
    ("5 + 5 = 10\n#### 10", "10"), ("#### 1,234", "1234"), ("#### 1,234,567\n", "1234567"), ("####  -3 ", "-3"),
    ("#### 1\n#### 2", "2"), ("18", "18"), (18, "18"), (2.5, "2.5"), ("a, b", "a, b"), (None, ""), ("", "")])
def test_the_ground_truth_is_the_number_after_the_mark_or_the_whole_answer(tokenizer, answer, expected):
    assert examples_of([{"prompt": "Hi", "answer": answer}], tokenizer)[0].answer == expected


@pytest.mark.parametrize(("answer", "expected"), [(0, "0"), (0.0, "0")])
def test_an_answer_of_zero_is_an_answer(tokenizer, answer, expected):
    assert examples_of([{"prompt": "Hi", "answer": answer}], tokenizer)[0].answer == expected


def test_a_whole_number_in_a_csv_column_with_gaps_stays_a_whole_number(tmp_path, tokenizer):
    path = write(tmp_path / "rows.csv", "prompt,answer\nHi,18\nHo,\n")  # pandas makes the column float: "18.0"
    assert [e.answer for e in examples_of(ppo_llm.read_rows(path, "train"), tokenizer)] == ["18", ""]


def test_real_gsm8k_rows_have_plain_numbers_as_ground_truth(tokenizer):
    examples = examples_of(ppo_llm.read_rows(str(GSM8K_50), "train"), tokenizer, max_prompt_length=4096)
    assert len(examples) == 50
    assert all(str(int(example.answer)) == example.answer for example in examples)
    assert all(example.text.endswith("? " + INSTRUCTION) or INSTRUCTION in example.text for example in examples)


@pytest.mark.parametrize("prompt", ["", "  \n", None, 7, [], [{"role": "user", "content": ""}], [{"role": "user"}],
                                    ["Hi"], float("nan")])
def test_a_row_without_text_is_refused_with_its_number_and_column(tokenizer, prompt):
    rows = [{"prompt": "Hi"}, {"prompt": "Ho"}, {"prompt": prompt}]
    assert refusal(examples_of, rows, tokenizer) == "SOURCE: row 3 has no text in column 'prompt'"


def test_a_column_that_is_nearly_right_is_suggested(tokenizer):
    sentence = refusal_of([{"questions": "a", "answer": "b"}], tokenizer)
    assert sentence.endswith("there are questions, answer (is it questions?)")
    assert "is it" not in refusal_of([{"x": "a", "answer": "b"}], tokenizer)


def test_prompts_that_are_trained_on_and_evaluated_are_counted(tmp_path, tokenizer, capsys):
    train = write(tmp_path / "train.jsonl", jsonl([{"prompt": x, "answer": "1"} for x in "abcd"]))
    test = write(tmp_path / "test.jsonl", jsonl([{"prompt": x, "answer": "2"} for x in "cdef"]))
    config = Config(dataset=train, eval_dataset=test, train_batch_size=1, reward="f.py:f")
    ppo_llm.load_examples(tokenizer, config)
    assert "2 prompts of" in capsys.readouterr().err
    ppo_llm.load_examples(tokenizer, dataclasses.replace(config, eval_dataset=train, eval_every=0))
    assert capsys.readouterr().err == ""


def test_a_row_that_lacks_the_column_is_refused_with_its_number(tokenizer):
    assert "row 2 has no text" in refusal(examples_of, [{"prompt": "Hi"}, {"text": "Ho"}], tokenizer)


def long_rows() -> list[dict]:
    return [{"prompt": f"{i} " + "x" * (50 if i in (1, 4, 7) else 1)} for i in range(10)]  # three of ten are too long


def test_overlong_training_prompts_are_dropped_and_counted(tokenizer, capsys):
    examples = examples_of(long_rows(), tokenizer, max_prompt_length=20)
    assert [e.text[0] for e in examples] == list("0235689")
    assert all(len(e.prompt) <= 20 for e in examples)
    assert capsys.readouterr().err == (
        "warning: SOURCE: 3 of 10 prompts have more than 20 tokens and were dropped\n")


def test_overlong_training_prompts_may_lose_their_beginning_instead(tokenizer, capsys):
    examples = examples_of(long_rows(), tokenizer, max_prompt_length=20, overlong_prompt="truncate_left")
    assert len(examples) == 10
    assert tokenizer.decode(examples[1].prompt) == "x" * 17 + " > "  # the end, where the response begins, is kept
    assert "3 of 10 prompts have more than 20 tokens and were truncated on the left" in capsys.readouterr().err


def test_overlong_training_prompts_may_be_refused(tokenizer):
    rows, flags = long_rows(), {"max_prompt_length": 20, "overlong_prompt": "error"}
    with pytest.raises(UsageError, match="row 2 has 64 tokens, max_prompt_length is 20"):
        examples_of(rows, tokenizer, **flags)  # "[ user ] " 9, "1 " 2, 50 letters, " > " 3


@pytest.mark.parametrize("mode", ["drop", "truncate_left", "error"])
def test_evaluation_never_drops_a_row(tokenizer, mode, capsys):
    examples = examples_of(long_rows(), tokenizer, training=False, max_prompt_length=20, overlong_prompt=mode)
    assert len(examples) == 10
    assert max(len(e.prompt) for e in examples) == 20
    assert "3 of 10 prompts" in capsys.readouterr().err


def test_a_prompt_of_exactly_the_limit_is_kept_without_a_warning(tokenizer, capsys):
    length = len(examples_of([{"prompt": "Hi"}], tokenizer)[0].prompt)
    assert len(examples_of([{"prompt": "Hi"}], tokenizer, max_prompt_length=length)) == 1
    assert capsys.readouterr().err == ""
    assert len(examples_of([{"prompt": "Hi"}], tokenizer, max_prompt_length=length - 1)) == 0


def test_fewer_prompts_than_a_batch_are_refused_with_both_numbers(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": f"{i}"} for i in range(5)]))
    sentence = refusal(ppo_llm.load_examples, tokenizer, Config(dataset=path, train_batch_size=8, reward="f.py:f"))
    assert "5 prompts" in sentence and "train_batch_size is 8" in sentence


def test_a_data_set_whose_prompts_are_all_too_long_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl(long_rows()))
    config = Config(dataset=path, train_batch_size=1, reward="f.py:f", max_prompt_length=3)
    assert "0 prompts" in refusal(ppo_llm.load_examples, tokenizer, config)


def test_eval_size_takes_the_first_evaluation_rows_and_eval_every_0_takes_none(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": f"{i}"} for i in range(5)]))
    config = Config(dataset=path, eval_dataset=path, train_batch_size=1, reward="f.py:f", eval_size=2)
    assert [e.text for e in ppo_llm.load_examples(tokenizer, config)[1]] == ["0", "1"]
    assert ppo_llm.load_examples(tokenizer, dataclasses.replace(config, eval_every=0))[1] == []
    assert len(ppo_llm.load_examples(tokenizer, dataclasses.replace(config, eval_every=0, eval_only=True))[1]) == 2


@pytest.mark.parametrize("eos", [False, True])
def test_a_template_that_writes_bos_gives_exactly_one(eos):
    tokenizer = make_tokenizer("{{ bos_token }}" + CHAT, eos)
    ids = ppo_llm.render_prompt([{"role": "user", "content": "Hi"}], tokenizer)
    assert ids.count(0) == 1 and ids[0] == 0
    assert 1 not in ids
    assert tokenizer.decode(ids) == "<s>[ user ] Hi > "


def test_a_template_without_bos_gives_none(tokenizer):
    assert 0 not in ppo_llm.render_prompt([{"role": "user", "content": "Hi"}], tokenizer)


@pytest.mark.parametrize("eos", [False, True])
def test_without_a_template_the_prompt_is_the_text_with_bos_and_without_eos(eos):
    tokenizer = make_tokenizer(None, eos)
    ids = ppo_llm.render_prompt([{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}], tokenizer)
    assert ids == [0, *tokenizer("Be\nHi", add_special_tokens=False).input_ids]


def test_a_changed_template_changes_the_prompts_at_once(tokenizer):
    before = examples_of([{"prompt": "Hi"}], tokenizer)[0].prompt
    after = examples_of([{"prompt": "Hi"}], make_tokenizer("Q: {{ messages[0]['content'] }} A:"))[0].prompt
    assert tokenizer.decode(before) == "[ user ] Hi > " and tokenizer.decode(after) == "Q: Hi A:"


def test_the_demo_prompt_is_one_user_turn_and_ends_where_the_assistant_begins():
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO.model)
    example = ppo_llm.make_examples(ROWS, tokenizer, DEMO, "demo", True)[0]
    assert tokenizer.decode(example.prompt) == (
        f"<|im_start|>user\nWhat is 2+2? {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")


# ---------------------------------------------------------------------------------------------------------------------
# prompt_order.


def epoch_of(num_examples: int, batch_size: int, epoch: int, seed: int = 0) -> list[int]:
    per_epoch = num_examples // batch_size
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return [i for step in steps for i in ppo_llm.prompt_order(num_examples, batch_size, step, seed)]


def test_an_epoch_is_a_permutation_without_repeats():
    for epoch in range(3):
        assert sorted(epoch_of(24, 6, epoch)) == list(range(24))


def test_the_incomplete_last_batch_of_an_epoch_is_left_out():
    order = epoch_of(23, 6, 0)
    assert len(order) == 18 == len(set(order))
    assert set(order) < set(range(23))
    assert set().union(*(epoch_of(23, 6, epoch) for epoch in range(10))) == set(range(23))  # not always the same rows


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_of(24, 6, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_prompts_of_a_step_depend_on_nothing_but_the_arguments():
    backwards = [ppo_llm.prompt_order(24, 6, step, 5) for step in reversed(range(12))][::-1]
    assert backwards == [ppo_llm.prompt_order(24, 6, step, 5) for step in range(12)]
    assert all(len(batch) == 6 for batch in backwards)


# ---------------------------------------------------------------------------------------------------------------------
# check_config.

REFUSED = [({name: 0}, f"{name} must be positive") for name in """train_batch_size rollout_n max_response_length
    max_prompt_length rollout_slots total_epochs total_steps ppo_epochs ppo_mini_batch_size critic_ppo_epochs
    critic_ppo_mini_batch_size ppo_micro_batch_size temperature micro_batch_tokens grad_clip save_total_limit eval_size
    loss_scale_factor score_clip kl_ctrl_horizon""".split()]
REFUSED += [
    ({"temperature": -1.0}, "temperature must be positive"), ({"train_batch_size": -4}, "train_batch_size must be"),
    ({"kl_ctrl_target": 0.0}, "kl_ctrl_target must be positive"), ({"kl_ctrl_target": -1.0}, "kl_ctrl_target must be"),
    ({"kl_ctrl_coef": -0.1}, "must not be negative"), ({"kl_loss_coef": -0.1}, "must not be negative"),
    ({"top_k": -1}, "must not be negative"), ({"reference_mix": 1.5}, "reference_mix must lie"),
    ({"reference_mix": -0.5}, "between 0 and 1"), ({"attribution_discount": 0.0}, "must be positive"),
    ({"attribution_discount": 1.1}, "between 0 and 1"), ({"top_p": 0.0}, "top_p must be positive"),
    ({"top_p": 1.5}, "top_p must lie between"), ({"gamma": 1.1}, "gamma must lie"), ({"lam": -0.1}, "lam must lie"),
    ({"clip_ratio_c": 1.0}, "clip_ratio_c"), ({"clip_ratio_c": 0.5}, "must exceed 1"),
    ({"overlong_buffer": 513}, "overlong_buffer must lie within"), ({"overlong_buffer": -1}, "must lie within"),
    ({"use_kl_in_reward": True, "use_kl_loss": True}, "one replaces the other"),
    ({"reference": "previous"}, "reference previous needs use_kl_loss"),
    ({"reference": "previous", "use_kl_loss": True, "kl_ctrl_type": "adaptive"}, "kl_ctrl_type fixed"),
    ({"reference": "previous", "use_kl_loss": True, "kl_loss_type": "full"}, "the full KL works with reference init"),
    ({"reference": "mixed", "kl_penalty": "full"}, "the full KL works with reference init only"),
    ({"kl_ctrl_type": "adaptive", "kl_ctrl_coef": 0.0}, "needs a KL whose coefficient is not 0"),
    ({"kl_ctrl_type": "adaptive", "use_kl_in_reward": False}, "needs a KL whose coefficient is not 0"),
    ({"critic_early_stop": True}, "critic_early_stop needs 2 critic epochs"),
    ({"critic_early_stop": True, "ppo_epochs": 4, "critic_ppo_epochs": 1}, "needs 2 critic epochs"),
    ({"train_batch_size": 10, "ppo_mini_batch_size": 4}, "= 10 responses must divide into mini-batches"),
    ({"train_batch_size": 5, "rollout_n": 5, "ppo_mini_batch_size": 10}, "= 25 responses must divide"),
    ({"train_batch_size": 8, "ppo_mini_batch_size": 16}, "= 8 responses must divide"),
    ({"train_batch_size": 12, "ppo_mini_batch_size": 6, "critic_ppo_mini_batch_size": 5}, "must divide"),
]
REFUSED += [({name: -1}, f"{name} must not be negative") for name in """lr critic_lr warmup_steps critic_warmup
    eval_every save_every clip_ratio clip_ratio_low clip_ratio_high""".split()]
CRITIC_FLAGS = [{"critic_model": "x"}, {"critic_ppo_epochs": 2}, {"critic_ppo_mini_batch_size": 64},
                {"critic_warmup": 1}, {"critic_early_stop": True, "ppo_epochs": 2}]
REFUSED += [({"critic": "shared"} | flags, "critic shared has one optimizer") for flags in CRITIC_FLAGS]
REFUSED += [({"adv_estimator": "rloo", "rollout_n": 4} | flags, "rloo has no critic") for flags in CRITIC_FLAGS]
REFUSED += [({"adv_estimator": name}, "rollout_n must be at least 2")
            for name in ("grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus_baseline")]


@pytest.mark.parametrize(("flags", "phrase"), REFUSED, ids=[" ".join(map(str, flags)) for flags, _ in REFUSED])
def test_a_combination_that_cannot_work_is_refused(flags, phrase):
    assert phrase in refusal(ppo_llm.check_config, Config(**flags))


@pytest.mark.parametrize("config", [
    Config(), DEMO, Config(adv_estimator="reinforce_plus_plus"), Config(adv_estimator="grpo", rollout_n=8),
    Config(use_kl_loss=True), Config(use_kl_loss=True, kl_loss_type="k2"), Config(kl_penalty="kl"),
    Config(use_kl_loss=True, kl_loss_type="full"), Config(use_kl_loss=True, kl_loss_type="mse"),
    Config(use_kl_loss=True, kl_loss_type="k1+"), Config(use_kl_loss=True, kl_loss_type="low_var_kl+"),
    Config(use_kl_loss=True, reference="previous"), Config(use_kl_loss=True, kl_ctrl_type="adaptive"),
    Config(use_kl_loss=True, kl_penalty="k3"), Config(use_kl_in_reward=False), Config(kl_loss_type="k3"),
    Config(kl_penalty="k3", kl_ctrl_coef=0.0), Config(kl_ctrl_type="adaptive"), Config(reference="mixed"),
    Config(critic="shared"), Config(critic_early_stop=True, critic_ppo_epochs=2), Config(clip_ratio_c=None),
    Config(overlong_buffer=512)])
def test_what_works_and_is_sound_passes_without_a_word(config, capsys):
    ppo_llm.check_config(config)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("flags", "phrase"), [
    *[({"kl_penalty": kind}, "in the reward only k1") for kind in ("abs", "k2", "mse", "k3", "low_var_kl", "full")],
    *[({"use_kl_loss": True, "kl_loss_type": kind}, "lacks the gradient of KL")
      for kind in ("k1", "kl", "abs", "k3", "low_var_kl")],
    ({"top_p": 0.9}, "KL may turn negative"), ({"top_k": 50}, "KL may turn negative")])
def test_what_is_allowed_but_unsound_is_warned_of_once(flags, phrase, capsys):
    ppo_llm.check_config(Config(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ") and phrase in lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command line: one sentence, exit code 2, before a model is loaded.


@pytest.fixture
def no_models(monkeypatch, tmp_path):
    def build_models(*_):
        raise AssertionError("a model was about to be loaded")

    monkeypatch.setattr(ppo_llm, "build_models", build_models)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("flags", "content", "phrase"), [
    ({"prompt_column": "text"}, jsonl(ROWS), "no column text; there are question, answer"),
    ({}, "", "no rows"),
    ({}, jsonl(ROWS), "2 prompts, train_batch_size is 4"),
    ({}, '{"question": "a", "answer": "b"}\n{oops}\n', "rows.jsonl:2: "),
    ({"max_prompt_length": 1}, jsonl(ROWS), "0 prompts"),
    ({"train_batch_size": 3}, jsonl(ROWS), "3 responses must divide"),
    ({"adv_estimator": "grpo"}, jsonl(ROWS), "rollout_n must be at least 2"),
    ({"max_response_length": 1500}, jsonl(ROWS), "max_prompt_length + max_response_length = 2524 exceed the 2048"),
    ({"model": "missing/folder"}, jsonl(ROWS), "model missing/folder: "),
    ({"critic_model": "missing/folder"}, jsonl(ROWS), "model missing/folder: "),
    ({"model": "."}, jsonl(ROWS), "model .: "),
    ({"use_kl_in_reward": True, "use_kl_loss": True}, jsonl(ROWS), "one replaces the other"),
    ({"reward": "missing.py:f"}, jsonl(ROWS * 2), "reward 'missing.py:f'"),
    ({"eval_dataset": "missing.jsonl"}, jsonl(ROWS * 2), "missing.jsonl"),
    ({"track": "trackio"}, jsonl(ROWS * 2), "pip install trackio"),
])
def test_the_users_mistakes_are_found_before_a_model_is_loaded(no_models, monkeypatch, flags, content, phrase):
    monkeypatch.setitem(sys.modules, "trackio", None)  # importing it fails, installed or not
    path = write(Path("rows.jsonl"), content)
    config = dataclasses.replace(DEMO, **{"dataset": path, "train_batch_size": 4, "ppo_mini_batch_size": 2} | flags)
    assert phrase in refusal(ppo_llm.main, config)
    assert os.listdir() == ["rows.jsonl"]  # and nothing was written


def test_a_missing_demo_asks_for_the_model_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(ppo_llm, "DEMO", dataclasses.replace(DEMO, model=str(tmp_path / "demo")))
    assert "give --model" in refusal(ppo_llm.prepare, ppo_llm.DEMO)


def test_a_mistake_on_the_command_line_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    write(tmp_path / "rows.jsonl", '{"question": "a", "answer": "b"}\n{oops}\n')
    flags = {"rows.jsonl:2: ": ["--dataset", "rows.jsonl"],
             "one replaces the other": ["--use_kl_loss", "--use_kl_in_reward", "True"]}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    launched = [subprocess.Popen([sys.executable, str(ROOT / "ppo_llm.py"), *words], cwd=tmp_path, env=environment,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for words in flags.values()]
    for phrase, process in zip(flags, launched, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and phrase in err
        assert out == ""
    assert os.listdir(tmp_path) == ["rows.jsonl"]
