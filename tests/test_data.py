"""From files to prompts: a row means what it says, and what cannot be read is refused in one sentence."""

import codecs
import csv
import dataclasses
import datetime
import gzip
import json
import re
from pathlib import Path

import datasets
import pytest
import tokenizers
import transformers
from conftest import make_config

import ppo_llm
from ppo_llm import DEMO, Config, UsageError

GSM8K_50 = Path(__file__).parent / "data" / "gsm8k_50.jsonl"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'  # verl's
ROWS = [{"question": "What is 2+2?", "answer": "#### 4"}, {"question": "And 3+3?", "answer": "#### 6"}]
CHAT = "{% for m in messages %}[ {{ m['role'] }} ] {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}> {% endif %}"
STRICT = """{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- m.content }}{% endfor %}"""  # as Gemma and Mistral have it
FORMATS = ("(json, jsonl and csv in UTF-8, also .gz, parquet, a folder of save_to_disk and names of the Hub"
           " can be read)")
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yes?"}


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
    config = Config(**{"reward": "file.py:f"} | flags)
    return ppo_llm.make_examples(rows, tokenizer, config, "SOURCE", training)


def example_of(row: dict, tokenizer, **flags) -> ppo_llm.Example:
    return examples_of([row], tokenizer, **flags)[0]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def read(path: Path, content: str | bytes) -> list[dict]:
    return ppo_llm.read_rows(write(path, content), "train")


def refusal(function, *arguments, **keywords) -> str:
    """The one sentence that the user would read."""
    with pytest.raises(UsageError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------
# read_rows: files.


def test_every_file_format_gives_the_same_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        packed = gzip.compress((tmp_path / name).read_bytes())
        (tmp_path / f"{name}.gz").write_bytes(packed)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz", "parquet"):
        assert ppo_llm.read_rows(str(tmp_path / f"rows.{name}"), "train") == ROWS, name


def test_the_demo_has_a_training_and_a_test_split_without_overlap():
    train, test = (ppo_llm.read_rows("demo", split) for split in ("train", "test"))
    assert len(train) > len(test) > 100
    assert not {row["question"] for row in train} & {row["question"] for row in test}


@pytest.mark.parametrize("content", [
    codecs.BOM_UTF8 + jsonl(ROWS).encode(), jsonl(ROWS, "\r\n"), jsonl(ROWS, "\n\n  \n"),
    jsonl(ROWS).rstrip(), json.dumps(ROWS), codecs.BOM_UTF8 + json.dumps(ROWS).encode(),
    "\n " + json.dumps(ROWS, indent=1)],
    ids=["byte order mark", "CRLF", "blank lines", "no last newline", "array", "array after a mark",
         "indented"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_lines_and_arrays_of_other_systems_are_read_whatever_the_file_is_called(tmp_path, ending, content):
    assert read(tmp_path / f"rows.{ending}", content) == ROWS


def test_a_single_json_object_is_a_single_row(tmp_path):
    assert read(tmp_path / "rows.json", '{"prompt": "a"}') == [{"prompt": "a"}]


@pytest.mark.parametrize("text",
                         ["one\u2028two\u2029three\x85four", "\U0001f600 \u00e9\u6f22", "a\nb\r\nc\td", " "])
def test_a_string_is_read_as_it_is_with_all_its_separators(tmp_path, text):
    for ascii_only in (True, False):
        content = json.dumps({"prompt": text}, ensure_ascii=ascii_only) + "\n"
        assert read(tmp_path / "rows.jsonl", content) == [{"prompt": text}]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "answer"], [text, "x"]])
    assert ppo_llm.read_rows(str(tmp_path / "rows.csv"), "train") == [{"prompt": text, "answer": "x"}]


NUMBERS = ["1.10", "1e400", "1E5", "-0", "12345678901234567890123", "0.1", "18.0", "1e-3"]
TEXTS = ["007", "1e3", "NA", "null", "nan", "NaN", "None", "N/A", "-", "inf", "1,000", "2020-01-02", "3/4",
         "12:30",
         "True", "false", "0x10", "+5", "1_000", " 5 ", "#N/A", "<NA>", '"', "'7'", "5%"]


@pytest.mark.parametrize("text", NUMBERS + TEXTS)
def test_a_csv_field_is_the_text_that_stands_in_the_file(tmp_path, tokenizer, text):
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer"], ["a", text], ["b", "1"], ["c", ""]])
    rows = ppo_llm.read_rows(str(tmp_path / "rows.csv"), "train")
    assert [row["answer"] for row in rows] == [text, "1", ""]
    assert [example.answer for example in examples_of(rows, tokenizer)] == [text, "1", ""]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_json_number_is_the_text_that_stands_in_the_file(tmp_path, tokenizer, text):
    rows = read(tmp_path / "rows.jsonl", f'{{"prompt": "a", "answer": {text}}}\n')
    assert example_of(rows[0], tokenizer).answer == text


@pytest.mark.parametrize(("written", "answer"), [
    ("true", "true"), ("false", "false"), ("null", ""), ('""', ""), ('"null"', "null"), ('"NA"', "NA"),
    ('"007"', "007"), ("0", "0"), ('" "', " ")])
def test_booleans_nulls_and_strings_of_json_are_told_apart(tmp_path, tokenizer, written, answer):
    rows = read(tmp_path / "rows.jsonl", f'{{"prompt": "a", "answer": {written}}}\n')
    assert example_of(rows[0], tokenizer).answer == answer


@pytest.mark.parametrize(("content", "rows"), [
    ('prompt,answer\n"one\ntwo","say ""x"", y"\n', [{"prompt": "one\ntwo", "answer": 'say "x", y'}]),
    ('prompt,answer\r\na,b\r\n', [{"prompt": "a", "answer": "b"}]),
    (codecs.BOM_UTF8 + b"prompt,answer\na,b\n", [{"prompt": "a", "answer": "b"}]),
    ("my prompt, answer \na,b\n", [{"my prompt": "a", " answer ": "b"}]),
    ("prompt,answer\n\na,b\n\n", [{"prompt": "a", "answer": "b"}]),
    ("prompt,answer\na\nb,c\n", [{"prompt": "a", "answer": ""}, {"prompt": "b", "answer": "c"}])],
    ids=["quoted newlines", "CRLF", "byte order mark", "spaces in names", "blank lines", "a short row"])
def test_csv_is_read_as_spreadsheets_write_it(tmp_path, content, rows):
    assert read(tmp_path / "rows.csv", content) == rows


@pytest.mark.parametrize("content", [
    "prompt,answer\na,1,000\nb,2\n", "prompt,answer\nb,2\na,1,000\n", "prompt,answer\na,1,000\nb,2,000\n"])
def test_a_csv_row_with_more_fields_than_the_header_is_refused_instead_of_cut(tmp_path, content):
    sentence = refusal(read, tmp_path / "rows.csv", content)
    assert sentence.startswith(f"{tmp_path}/rows.csv: ")
    assert "Length of header" in sentence or "Expected 2 fields in line 3, saw 3" in sentence


@pytest.mark.parametrize("line", [b"{'prompt': 1}", b'{"prompt": "a"', b"prompt", b'{"prompt": 007}',
                                  b'{"a": 1}{"b": 2}', b'{"prompt": "a\rb"}', b'{"prompt": "\x01"}'])
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    sentence = refusal(read, path, b'{"prompt": "a"}\n\n{"prompt": "b"}\n' + line + b'\n{"prompt": "c"}\n')
    assert sentence.startswith(f"{path}: line 4: ")


@pytest.mark.parametrize(("name", "content", "phrase"), [
    ("rows.jsonl", "", "no rows"), ("rows.jsonl", "\n\n", "no rows"), ("rows.json", "[]", "no rows"),
    ("rows.json", "", "no rows"), ("rows.csv", "prompt,answer\n", "no rows"),
    ("rows.csv", "", "No columns to parse"),
    ("rows.jsonl", "[1]\n", "rows must be objects"), ("rows.json", '["a"]', "rows must be objects"),
    ("rows.jsonl", '{"prompt": "a"}\n"b"\n', "rows must be objects"),
    ("rows.json", "[null]", "rows must be objects"), ("rows.json", "[[[]]]", "rows must be objects"),
    ("rows.json", "5", "rows must be objects"),
    ("rows.jsonl", '[{"a": 1}]\n[{"a": 2}]\n', "Extra data: line 2"),
    ("rows.jsonl", "[" * 100_000, "recursion"), ("rows.csv", 'prompt,answer\n"a,b\n', "EOF inside string"),
    ("rows.jsonl", jsonl(ROWS).encode("utf-16"), "utf-8"),
    ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "utf-8"),
    ("rows.jsonl", b'{"prompt": "\xe9"}\n', "utf-8"), ("rows.csv", b"prompt\n\xe9\n", "utf-8"),
    ("rows.jsonl.gz", jsonl(ROWS), "Not a gzipped file"), ("rows.parquet", "no parquet", ""),
    ("rows.txt", "text", "Couldn't find"), ("rows.tsv", "a\tb\n1\t2\n", "Couldn't find")])
def test_a_file_that_cannot_be_read_is_refused_with_its_path_and_the_reason(tmp_path, name, content, phrase):
    sentence = refusal(read, tmp_path / name, content)
    assert sentence.startswith(f"{tmp_path / name}: ") and phrase in sentence
    assert phrase in ("no rows", "rows must be objects") or sentence.endswith(FORMATS)


@pytest.mark.parametrize("name",
                         ["missing.jsonl", "missing.json.gz", "missing.csv", "missing.parquet", "no/where"])
def test_a_missing_file_is_refused_with_its_path_and_the_formats(tmp_path, name):
    sentence = refusal(ppo_llm.read_rows, str(tmp_path / name), "train")
    assert sentence.startswith(f"{tmp_path / name}: ") and sentence.endswith(FORMATS)


def test_what_save_to_disk_has_written_is_read_by_its_split(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert ppo_llm.read_rows(str(tmp_path / "one"), "train") == ROWS
    assert ppo_llm.read_rows(str(tmp_path / "one"), "test") == ROWS
    assert ppo_llm.read_rows(str(tmp_path / "two"), "train") == ROWS
    assert ppo_llm.read_rows(str(tmp_path / "two"), "test") == ROWS[:1]


def test_a_folder_that_is_no_data_set_or_lacks_the_split_is_refused(tmp_path):
    datasets.DatasetDict({"valid": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert "no split test; there are valid" in refusal(ppo_llm.read_rows, str(tmp_path / "saved"), "test")
    (tmp_path / "rows.jsonl").mkdir()
    for folder in (tmp_path, tmp_path / "rows.jsonl"):
        sentence = refusal(ppo_llm.read_rows, str(folder), "train")
        assert sentence.startswith(f"{folder}: ") and sentence.endswith(FORMATS)


def test_the_types_of_parquet_become_plain_text(tmp_path, tokenizer):
    answers = {"date": datetime.date(2020, 1, 2), "flag": True, "count": 18, "big": 2**62, "part": 0.1,
               "gap": None}
    row = {"prompt": "a", "turns": [USER, ASSISTANT]} | answers
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    rows = ppo_llm.read_rows(str(tmp_path / "rows.parquet"), "train")
    found = {name: example_of(rows[0], tokenizer, answer_column=name).answer for name in answers}
    assert found == {"date": "2020-01-02", "flag": "true", "count": "18", "big": str(2**62), "part": "0.1",
                     "gap": ""}
    assert example_of(rows[0], tokenizer, prompt_column="turns").answer == "Yes?"


# ----------------------------------------------------------------------------------------------------------
# read_rows: names of the Hub.


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """A Hub that has every data set; what is asked of it."""
    calls = []

    def load_dataset(path, name=None, *, split=None):
        if path.endswith("gsm8k") and name is None:
            raise ValueError("Config name is missing. Please pick one among: ['main', ...]")
        calls.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(("source", "expected"), [
    ("openai/gsm8k", ("openai/gsm8k", "main", "train")), ("gsm8k", ("gsm8k", "main", "train")),
    ("openai/gsm8k:socratic", ("openai/gsm8k", "socratic", "train")),
    ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")), ("a/b", ("a/b", None, "train")),
    ("a/b:c", ("a/b", "c", "train")), ("a/b:c:d", ("a/b", "c", "d")), ("a/b::d", ("a/b", None, "d")),
    ("a/b:c:train[:10%]", ("a/b", "c", "train[:10%]"))])
def test_a_hub_name_means_name_configuration_and_split(hub, source, expected):
    assert ppo_llm.read_rows(source, "train") == ROWS
    assert hub == [expected]


def test_gsm8k_is_evaluated_on_its_test_split(hub, folder, tokenizer):
    for name in ("openai/gsm8k", "openai/gsm8k:main:train"):
        config = make_config(folder, dataset=name, train_batch_size=1, eval_every=1, max_prompt_length=999,
                             reward="f.py:f", model=DEMO.model)
        train, evals = ppo_llm.load_examples(tokenizer, config)
        assert len(train) == len(evals) == 2
    assert hub == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")] * 2


def test_a_hub_that_cannot_be_reached_is_the_users_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sentence = refusal(ppo_llm.read_rows, "someone/data", "train")
    assert sentence == f"someone/data: Couldn't reach the Hub {FORMATS}"


# ----------------------------------------------------------------------------------------------------------
# Columns.


@pytest.mark.parametrize(("columns", "flags", "expected"), [
    (["question", "answer"], {}, ("question", "answer")),
    (["id", "prompt", "answer"], {}, ("prompt", "answer")),
    (["instruction", "input", "output"], {}, ("instruction", "output")),
    (["messages", "answer"], {}, ("messages", "answer")), (["prompt"], {}, ("prompt", "")),
    (["conversations", "ground_truth"], {}, ("conversations", "ground_truth")),
    (["instruction", "input"], {}, ("instruction", "")),
    (["question", "answer", "a text", "label"], {"prompt_column": "a text", "answer_column": "label"},
     ("a", "label")),
    (["prompt", "label"], {"answer_column": "label"}, ("prompt", "label"))])
def test_the_columns_of_every_known_format_are_found(tokenizer, columns, flags, expected):
    example = example_of({name: name for name in columns}, tokenizer, **flags)
    assert (re.split(r"\s", example.text)[0], example.answer) == expected


@pytest.mark.parametrize(("columns", "flags", "sentence"), [
    (["text", "label"], {},
     "no column question, instruction, prompt, messages, conversations; there are text, label:"
     " choose one with --prompt_column"),
    (["prompt", "answer"], {"prompt_column": "text"}, "there is no column 'text'; there are prompt, answer"),
    (["prompt", "answer"], {"answer_column": "label"},
     "there is no column 'label'; there are prompt, answer")])
def test_an_unknown_column_is_refused_with_the_columns_there_are(tokenizer, columns, flags, sentence):
    rows = [{name: name for name in columns}]
    assert refusal(examples_of, rows, tokenizer, **flags) == f"SOURCE: {sentence}"


def test_the_columns_are_those_of_all_rows_and_missing_answers_are_counted(tokenizer, capsys):
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "2"}, {"answer": "3", "prompt": "c"},
            {"prompt": "d", "answer": None}]
    assert [example.answer for example in examples_of(rows, tokenizer)] == ["", "2", "3", ""]
    assert capsys.readouterr().err == (
        "warning: SOURCE: 2 of 4 rows have no answer (there are prompt, answer): the reward gets empty"
        " ones\n")


def test_a_data_set_without_an_answer_column_says_so_once_with_its_columns(tokenizer, capsys):
    examples = examples_of([{"prompt": "a", "label": "1"}, {"prompt": "b", "label": "2"}], tokenizer)
    assert [example.answer for example in examples] == ["", ""]
    assert capsys.readouterr().err == (
        "warning: SOURCE: 2 of 2 rows have no answer (there are prompt, label): the reward gets empty ones\n")


def test_the_gsm8k_reward_refuses_rows_without_an_answer(tokenizer):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c", "answer": "####"}]
    sentence = refusal(examples_of, rows, tokenizer, reward="gsm8k")
    assert sentence == "SOURCE: 2 of 3 rows have no answer; reward gsm8k needs it"


def test_a_row_that_lacks_the_column_is_refused_with_its_number(tokenizer):
    sentence = refusal(examples_of, [{"prompt": "Hi"}, {"text": "Ho"}], tokenizer)
    assert sentence.startswith("SOURCE: row 2, column prompt: ")


# ----------------------------------------------------------------------------------------------------------
# Questions and answers.

GSM8K_LIKE = ["Shop 1, open\n#### Prices\n1,100 and up", "#### 1,100", "a, b", "x\n#### 7\n", " 18 ", "####"]


@pytest.mark.parametrize("answer", GSM8K_LIKE)
@pytest.mark.parametrize("column", ["question", "prompt", "text"])
def test_an_own_reward_gets_questions_and_answers_unchanged(tokenizer, column, answer):
    example = example_of({column: "What is 2+2?", "answer": answer}, tokenizer, prompt_column=column)
    assert (example.text, example.answer) == ("What is 2+2?", answer)
    assert tokenizer.decode(example.prompt) == "[ user ] What is 2+2? > "


def test_a_gsm8k_question_gets_verls_instruction_after_one_space(tokenizer):
    example = example_of(ROWS[0], tokenizer, reward="gsm8k")
    assert example.text == "What is 2+2? " + INSTRUCTION
    assert tokenizer.decode(example.prompt) == f"[ user ] What is 2+2? {INSTRUCTION} > "
    assert example.answer == "4"


@pytest.mark.parametrize("row",
                         [{"prompt": "Hi"}, {"instruction": "Hi"}, {"messages": [USER]},
                          {"question": [USER]}])
def test_only_a_question_in_text_gets_the_gsm8k_instruction(tokenizer, row):
    example = example_of(row | {"answer": "1"}, tokenizer, reward="gsm8k")
    assert example.text == "Hi"


@pytest.mark.parametrize(("answer", "expected"), [
    ("5 + 5 = 10\n#### 10", "10"), ("#### 1,234", "1234"), ("#### 1,234,567\n", "1234567"),
    ("####  -3 ", "-3"),
    ("#### 1\n#### 2", "2"), ("18", "18"), (18, "18"), (2.5, "2.5"), ("1,000", "1000"), (0, "0")])
def test_the_gsm8k_reward_gets_the_number_after_the_mark(tokenizer, answer, expected):
    assert example_of({"prompt": "Hi", "answer": answer}, tokenizer, reward="gsm8k").answer == expected


def test_real_gsm8k_rows_have_plain_numbers_as_ground_truth(tokenizer):
    rows = ppo_llm.read_rows(str(GSM8K_50), "train")
    examples = examples_of(rows, tokenizer, reward="gsm8k", max_prompt_length=4096)
    assert len(examples) == 50
    assert all(str(int(example.answer)) == example.answer for example in examples)
    assert [example.text for example in examples] == [f"{row['question']} {INSTRUCTION}" for row in rows]


@pytest.mark.parametrize("answer", [0, 0.0, False, "0"])
def test_an_answer_of_zero_is_an_answer(tokenizer, answer, capsys):
    assert example_of({"prompt": "Hi", "answer": answer}, tokenizer).answer == str(answer).lower()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("row", [
    {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "32"}},
    {"prompt": [USER], "reward_model": {"ground_truth": 32}}, {"prompt": [USER], "ground_truth": "32"},
    {"prompt": [USER], "answer": "32", "reward_model": {"ground_truth": "33"}}])
def test_the_ground_truth_of_verl_rows_is_the_answer(tokenizer, row, capsys):
    assert example_of(row, tokenizer).answer == "32"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("answer", "kind"), [
    (["32", "32 legs"], "list"), ([], "list"), ([["32"]], "list"), ({"value": "32"}, "dict"), ({}, "dict"),
    ({"ground_truth": ["32"]}, "list"), (b"32", "bytes")])
def test_an_answer_that_is_not_text_or_a_number_is_refused_with_its_row(tokenizer, answer, kind):
    sentence = refusal(examples_of, [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": answer}],
                       tokenizer)
    assert sentence.startswith("SOURCE: row 2, ")
    assert f"the answer is a {kind}, not text or a number" in sentence


# ----------------------------------------------------------------------------------------------------------
# Prompts and conversations.


@pytest.mark.parametrize(("row", "text"), [
    ({"instruction": "Translate.", "input": "hello"}, "Translate.\nhello"),
    ({"instruction": "Say something.", "input": ""}, "Say something."),
    ({"instruction": "Say something.", "input": None}, "Say something."),
    ({"instruction": "Say something."}, "Say something."), ({"prompt": "Hi"}, "Hi"),
    ({"prompt": "Hi", "input": "unused"}, "Hi"), ({"prompt": " Hi\n"}, " Hi\n"),
    ({"messages": [USER]}, "Hi")])
def test_only_an_instruction_gets_its_input_and_no_text_is_changed(tokenizer, row, text):
    example = example_of(row, tokenizer)
    assert example.text == text
    assert tokenizer.decode(example.prompt) == f"[ user ] {text} > "


@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_chat_messages_are_kept_as_they_are(tokenizer, column):
    messages = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT,
                {"role": "user", "content": "Bye"}]
    example = example_of({column: messages, "answer": "1"}, tokenizer)
    shown = tokenizer.decode(example.prompt)
    assert shown == "[ system ] Be brief. [ user ] Hi [ assistant ] Yes? [ user ] Bye > "
    assert example.text == "Bye" and example.messages == messages


def test_sharegpt_conversations_with_system_turns_are_read(tokenizer):
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Yes?"), ("human", "Bye"), ("gpt", "Ciao")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    example = example_of(row, tokenizer)
    shown = tokenizer.decode(example.prompt)
    assert shown == "[ system ] Be brief. [ user ] Hi [ assistant ] Yes? [ user ] Bye > "
    assert (example.text, example.answer) == ("Bye", "Ciao")


def test_last_turns_of_the_assistant_are_cut_off_and_become_the_answer_where_there_is_none(tokenizer, capsys):
    rows = [{"messages": [USER, ASSISTANT], "answer": "own"}, {"messages": [USER, ASSISTANT], "answer": ""},
            {"messages": [USER, {"role": "assistant", "content": "first"}, ASSISTANT], "answer": None},
            {"messages": [USER], "answer": "x"}]
    examples = examples_of(rows, tokenizer)
    assert [example.answer for example in examples] == ["own", "Yes?", "Yes?", "x"]
    assert {example.text for example in examples} == {"Hi"}
    assert {tokenizer.decode(example.prompt) for example in examples} == {"[ user ] Hi > "}
    assert capsys.readouterr().err == (
        "warning: SOURCE: 3 conversations end with a turn of the assistant, which is cut off\n")


def test_text_parts_of_a_content_are_joined(tokenizer):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    example = example_of({"messages": [{"role": "user", "content": parts}]}, tokenizer)
    assert example.text == "one two" and tokenizer.decode(example.prompt) == "[ user ] one two > "


PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
TOOL = {"role": "assistant", "content": "Let me look.",
        "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize("content", [
    [{"type": "text", "text": "What is it?"}, PICTURE], [PICTURE],
    [{"type": "image"}, {"type": "text", "text": "a"}],
    [{"type": "text", "text": None}], [{"text": "a"}], ["a"], [["a"]], [], {"type": "text", "text": "a"}, 7,
    None,
    "", " \n"])
def test_a_content_that_is_not_text_alone_is_refused_with_its_row_never_read_in_part(tokenizer, content):
    rows = [{"messages": [USER]}, {"messages": [{"role": "user", "content": content}]}]
    assert refusal(examples_of, rows, tokenizer).startswith("SOURCE: row 2, column messages: ")


@pytest.mark.parametrize("turns", [
    [USER, TOOL, {"role": "tool", "content": "4"}],
    [USER, TOOL | {"content": None}, {"role": "tool", "content": "4"}]])
def test_turns_that_call_tools_are_refused_because_the_call_would_be_lost(tokenizer, turns):
    assert "calls tools" in refusal(examples_of, [{"messages": turns}], tokenizer)


def test_the_empty_tool_calls_that_arrow_fills_in_are_no_calls(tokenizer):
    assert example_of({"messages": [USER | {"tool_calls": None}]}, tokenizer).text == "Hi"


@pytest.mark.parametrize("turns", [[], [ASSISTANT], [ASSISTANT, ASSISTANT]])
def test_a_conversation_without_a_turn_to_answer_is_refused(tokenizer, turns):
    sentence = refusal(examples_of, [{"messages": [USER]}, {"messages": turns}], tokenizer)
    assert sentence == "SOURCE: row 2, column messages: ValueError('there is no turn to answer')"


@pytest.mark.parametrize("prompt", [
    "", "  \n", None, 7, ["Hi"], [["Hi"]], {"role": "user"}, float("nan"), [{"role": "user"}],
    [{"content": "Hi"}],
    [{"role": "", "content": "Hi"}], [{"role": "user", "content": ""}],
    [{"role": "system", "content": ""}, USER]])
def test_a_row_without_text_or_role_is_refused_with_its_number_and_column(tokenizer, prompt):
    rows = [{"prompt": "Hi"}, {"prompt": "Ho"}, {"prompt": prompt}]
    sentence = refusal(examples_of, rows, tokenizer)
    assert sentence.startswith("SOURCE: row 3, column prompt: ")
    assert "no text" in sentence


def test_the_system_prompt_comes_first_and_once(tokenizer):
    rows = [{"prompt": "Hi"}, {"prompt": [USER]}]
    prompts = [tokenizer.decode(e.prompt) for e in examples_of(rows, tokenizer, system_prompt="Be brief.")]
    assert prompts == ["[ system ] Be brief. [ user ] Hi > "] * 2


def test_an_empty_system_prompt_is_none(tokenizer):
    assert example_of({"prompt": "Hi"}, tokenizer, system_prompt="").messages == [USER]


@pytest.mark.parametrize(("template", "row", "flags", "reason"), [
    (STRICT, {"prompt": "a"}, {"system_prompt": "S"}, "System role not supported"),
    (STRICT, {"messages": [{"role": "system", "content": "S"}, USER]}, {}, "System role not supported"),
    (STRICT, {"messages": [USER, USER]}, {}, "roles must alternate"),
    ("{{ messages[0].nothing.at_all }}", {"prompt": "a"}, {}, "nothing"),
    ("{{ ", {"prompt": "a"}, {}, "template"),
    ("{# writes nothing #}", {"prompt": "a"}, {}, "the prompt has no tokens"),
    (CHAT, {"prompt": "\ud83d"}, {}, "TypeError"), (None, {"prompt": "a\udc00"}, {}, "TypeError")])
def test_what_the_template_or_the_tokenizer_refuses_is_a_sentence_with_the_row(template, row, flags, reason):
    sentence = refusal(examples_of, [row], make_tokenizer(template), **flags)
    assert sentence.startswith("SOURCE: row 1, column ") and reason in sentence


def test_what_a_strict_template_accepts_is_read():
    example = example_of({"messages": [USER, ASSISTANT, USER]}, make_tokenizer(STRICT))
    assert [turn["content"] for turn in example.messages] == ["Hi", "Yes?", "Hi"]


def test_a_lone_surrogate_in_a_file_is_refused_with_its_row(tmp_path, tokenizer):
    rows = read(tmp_path / "rows.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud83d"}\n')
    sentence = refusal(examples_of, rows, tokenizer)
    assert sentence.startswith("SOURCE: row 2, ") and sentence.encode("utf-8")


@pytest.mark.parametrize("eos", [False, True])
def test_a_template_that_writes_bos_gives_exactly_one(eos):
    tokenizer = make_tokenizer("{{ bos_token }}" + CHAT, eos)
    ids = ppo_llm.render([USER], tokenizer, is_prompt=True)
    assert ids.count(0) == 1 and ids[0] == 0
    assert 1 not in ids
    assert tokenizer.decode(ids) == "<s>[ user ] Hi > "


def test_a_template_without_bos_gives_none(tokenizer):
    assert 0 not in ppo_llm.render([USER], tokenizer, is_prompt=True)


@pytest.mark.parametrize("eos", [False, True])
def test_without_a_template_the_prompt_is_the_text_with_bos_and_without_eos(eos):
    tokenizer = make_tokenizer(None, eos)
    messages = [{"role": "system", "content": "Be"}, USER]
    text = tokenizer("Be\nHi", add_special_tokens=False).input_ids
    assert ppo_llm.render(messages, tokenizer, is_prompt=True) == [0, *text]
    assert ppo_llm.render(messages, tokenizer, is_prompt=False) == [0, *text,
                                                                    1]  # what a reward model reads has ended


def test_a_changed_template_changes_the_prompts_at_once(tokenizer):
    before = example_of({"prompt": "Hi"}, tokenizer).prompt
    after = example_of({"prompt": "Hi"}, make_tokenizer("Q: {{ messages[0]['content'] }} A:")).prompt
    assert tokenizer.decode(before) == "[ user ] Hi > " and tokenizer.decode(after) == "Q: Hi A:"


def test_the_demo_prompt_is_one_user_turn_and_ends_where_the_assistant_begins():
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO.model)
    example = ppo_llm.make_examples(ROWS, tokenizer, DEMO, "demo", True)[0]
    assert tokenizer.decode(example.prompt) == (
        f"<|im_start|>user\nWhat is 2+2? {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")


# ----------------------------------------------------------------------------------------------------------
# Stop tokens: what the template puts after an assistant's turn ends a response too.


def chatml_tokenizer(end: str) -> transformers.PreTrainedTokenizerFast:
    """A base model's: eos is </s>, the template ends turns with another token."""
    tokenizer = make_tokenizer("{% for m in messages %}<|im_start|>{{ m.content }}" + end + "\n{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


class Lm:
    generation_config = transformers.GenerationConfig(eos_token_id=[7, 9])


@pytest.mark.parametrize(("end", "extra"), [
    ("<|im_end|>", ["<|im_end|>"]), ("\n<|im_end|>", ["<|im_end|>"]), ("</s>", []), ("", []), (" Next:", [])])
def test_the_special_token_after_an_assistants_turn_is_a_stop_token_and_all_are_printed(end, extra, capsys):
    tokenizer = chatml_tokenizer(end)
    found = ppo_llm.find_stop_ids(Lm, tokenizer)
    assert found == {1, 7, 9, *tokenizer.convert_tokens_to_ids(extra)}
    assert capsys.readouterr().out == f"stop tokens: {tokenizer.convert_ids_to_tokens(sorted(found))}\n"


def test_without_a_template_the_stop_tokens_are_those_of_tokenizer_and_generation_config():
    assert ppo_llm.find_stop_ids(Lm, make_tokenizer(None)) == {1, 7, 9}


# ----------------------------------------------------------------------------------------------------------
# Lengths and sizes.


def long_rows() -> list[dict]:
    """Three of ten prompts are too long for 20 tokens."""
    return [{"prompt": f"{i} " + "x" * (50 if i in (1, 4, 7) else 1), "answer": "1"} for i in range(10)]


def test_overlong_training_prompts_are_dropped_and_counted(tokenizer, capsys):
    examples = examples_of(long_rows(), tokenizer, max_prompt_length=20)
    assert [e.text[0] for e in examples] == list("0235689")
    assert all(len(e.prompt) <= 20 for e in examples)
    assert capsys.readouterr().err == (
        "warning: SOURCE: 3 of 10 prompts have more than 20 tokens and were dropped\n")


def test_overlong_evaluation_prompts_lose_their_beginning_and_no_row_is_dropped(tokenizer, capsys):
    examples = examples_of(long_rows(), tokenizer, training=False, max_prompt_length=20)
    assert len(examples) == 10
    assert max(len(e.prompt) for e in examples) == 20
    assert tokenizer.decode(examples[1].prompt) == "x" * 17 + " > "  # the end is kept
    assert capsys.readouterr().err == (
        "warning: SOURCE: 3 of 10 prompts have more than 20 tokens and were cut on the left\n")


def test_a_prompt_of_exactly_the_limit_is_kept_without_a_warning(tokenizer, capsys):
    row = {"prompt": "Hi", "answer": "1"}
    length = len(example_of(row, tokenizer).prompt)
    assert len(examples_of([row], tokenizer, max_prompt_length=length)) == 1
    assert capsys.readouterr().err == ""
    assert len(examples_of([row], tokenizer, max_prompt_length=length - 1)) == 0


def load(folder: Path, tokenizer, **flags) -> tuple[list, list]:
    """load_examples with a model that knows all bytes."""
    flags = {"train_batch_size": 1, "max_prompt_length": 999, "reward": "f.py:f", "model": DEMO.model} | flags
    return ppo_llm.load_examples(tokenizer, make_config(folder, **flags))


def test_fewer_prompts_than_a_batch_are_refused_with_sizes_that_fit(tmp_path, tokenizer, folder):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": f"{i}"} for i in range(64)]))
    sentence = refusal(load, folder, tokenizer, dataset=path, train_batch_size=256, ppo_mini_batch_size=64)
    assert sentence == (f"{path}: 64 prompts, but train_batch_size is 256:"
                        " use --train_batch_size 64 --ppo_mini_batch_size 16")


def test_a_data_set_whose_prompts_are_all_too_long_is_refused_with_the_limit(tmp_path, tokenizer, folder):
    path = write(tmp_path / "rows.jsonl", jsonl(long_rows()))
    sentence = refusal(load, folder, tokenizer, dataset=path, max_prompt_length=3)
    assert sentence == f"{path}: no prompt has at most 3 tokens"


def test_eval_size_takes_the_first_evaluation_rows_and_eval_every_0_takes_none(tmp_path, tokenizer, folder):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": f"{i}"} for i in range(5)]))
    flags = {"dataset": path, "eval_dataset": path, "eval_size": 2}
    assert [e.text for e in load(folder, tokenizer, eval_every=1, **flags)[1]] == ["0", "1"]
    assert load(folder, tokenizer, eval_every=0, **flags)[1] == []


def test_a_file_is_evaluated_on_nothing_unless_told(tmp_path, tokenizer, folder):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": "a"}]))
    assert load(folder, tokenizer, dataset=path, eval_every=1)[1] == []


def test_prompts_that_are_trained_on_and_evaluated_are_counted(tmp_path, tokenizer, folder, capsys):
    train = write(tmp_path / "train.jsonl", jsonl([{"prompt": x, "answer": "1"} for x in "abcd"]))
    test = write(tmp_path / "test.jsonl", jsonl([{"prompt": x, "answer": "2"} for x in "cdef"]))
    load(folder, tokenizer, dataset=train, eval_dataset=test, eval_every=1)
    assert capsys.readouterr().err == f"warning: 2 prompts of {train} are evaluation prompts too\n"
    load(folder, tokenizer, dataset=train, eval_dataset=test)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path, tokenizer, folder):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": "\u00e9"}]))
    sentence = refusal(load, folder, tokenizer, dataset=path, model=str(folder))
    assert re.search(r"token \d+ of the tokenizer, but the model knows 64$", sentence)


# ----------------------------------------------------------------------------------------------------------
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
    assert set().union(*(epoch_of(23, 6,
                                  epoch) for epoch in range(10))) == set(range(23))  # not always the same


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_of(24, 6, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_prompts_of_a_step_depend_on_nothing_but_the_arguments():
    backwards = [ppo_llm.prompt_order(24, 6, step, 5) for step in reversed(range(12))][::-1]
    assert backwards == [ppo_llm.prompt_order(24, 6, step, 5) for step in range(12)]
    assert all(len(batch) == 6 for batch in backwards)


# ----------------------------------------------------------------------------------------------------------
# Dated templates and changed data: a hash of all prompts is remembered.

DATED = "Today is {{ strftime_now('%d %B %Y') }}. {{ messages[0]['content'] }}"  # as Llama 3.2's


class Plan:
    """A Run, as far as print_plan needs one."""

    folder, command, total, config = "F", "C", 1, Config()
    print_plan = ppo_llm.Run.print_plan

    def hash_of(self, template: str, rows: list[dict]) -> str:
        tokenizer = make_tokenizer(template)
        self.print_plan(tokenizer, examples_of(rows, tokenizer), [])
        return self.data_hash


def test_the_hash_of_the_data_tells_days_and_rows_apart(monkeypatch):
    rows = [{"prompt": "Hi", "answer": "1"}]
    day, next_day = (DATED.replace("strftime_now('%d %B %Y')", f"'{day}'") for day in ("26 July", "27 July"))
    assert Plan().hash_of(day, rows) == Plan().hash_of(day, rows)
    assert len({Plan().hash_of(day, rows), Plan().hash_of(next_day, rows), Plan().hash_of(day, rows * 2),
                Plan().hash_of(day, [{"prompt": "Ho", "answer": "1"}]),
                Plan().hash_of(day, [{"prompt": "Hi", "answer": "2"}])}) == 5
    assert re.fullmatch("[0-9a-f]{64}", Plan().hash_of(DATED, rows))


@pytest.fixture(scope="module")
def dated_run(folder, tmp_path_factory, no_figures) -> Config:
    """A run of one step that has left a checkpoint."""
    config = make_config(folder, total_steps=1, output_dir=str(tmp_path_factory.mktemp("dated") / "run"))
    ppo_llm.main(config)
    return config


def test_a_checkpoint_holds_the_hash_and_other_data_are_said(dated_run, tmp_path, folder, capsys, no_figures):
    state = json.loads(Path(dated_run.output_dir, "checkpoints", "step_1", "state.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", state["data_hash"])
    again = dataclasses.replace(dated_run, output_dir=str(tmp_path / "again"), resume=dated_run.output_dir,
                                total_steps=2)
    ppo_llm.main(again)
    assert "prompts are not what" not in capsys.readouterr().err
    rows = read(tmp_path / "rows.jsonl", jsonl([{"prompt": x, "answer": "e"} for x in "bcdefghi"]))
    assert len(rows) == 8
    other = dataclasses.replace(again, output_dir=str(tmp_path / "other"),
                                dataset=str(tmp_path / "rows.jsonl"))
    ppo_llm.main(other)
    said = capsys.readouterr().err
    assert "prompts are not what they were: other rows, or a chat template that writes the date\n" in said
