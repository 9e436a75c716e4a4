"""SECURITY.md: what is never executed, what is kept out of logs and files, how hostile text is shown."""

import ast
import contextlib
import dataclasses
import io
import json
import pickle
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_config, make_lm, make_models, make_tokenizer, save_folder

import ppo_llm
from ppo_llm import Config, Example, UsageError

ROOT = Path(ppo_llm.__file__).parent
SCRIPTS = ["ppo_llm.py", "ppo_llm_multigpu.py", "ppo_classic.py"]
SECRETS = {"HF_TOKEN": "hf_secret1", "WANDB_API_KEY": "wandb_secret2", "REWARD_TOKEN": "reward_secret3",
           "SOME_VARIABLE": "value_secret4"}
ESCAPES = "a\x1b[2Jb\x07c\rd\x9be\u202ef\ng\x00"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """A file that hostile code would make; the test fails if it is there in the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from outside has been executed"


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder, no_figures):
    """A run that is resumed, with secrets in its environment: (folder, output, calls of pickle)."""
    target = tmp_path_factory.mktemp("run") / "run"
    config = make_config(folder, output_dir=str(target), total_steps=2, save_every=1, eval_every=1,
                         eval_dataset=str(folder / "prompts.jsonl"))
    calls = []
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            monkeypatch.setattr(module, name, lambda *_, name=name, **__: calls.append(name))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            ppo_llm.main(config)
            ppo_llm.main(dataclasses.replace(config, total_steps=3))
    assert "resumed from step_2 of 3" in out.getvalue()
    return target, out.getvalue(), calls


def write_hashes(checkpoint: Path) -> None:
    """What an attacker does too: the hashes find damage, they do not prove who wrote a file."""
    files = [path for path in checkpoint.iterdir() if path.name != "hashes.json"]
    hashes = {path.name: ppo_llm.file_hash(path) for path in files}
    (checkpoint / "hashes.json").write_text(json.dumps(hashes))


# ----------------------------------------------------------------------------------------------------------
# What is never executed: pickles.


@pytest.mark.slow
def test_a_run_and_its_resuming_read_no_pickle(run):
    assert run[2] == []


def test_a_run_leaves_safetensors_json_csv_and_pictures_only(run):
    files = [path.relative_to(run[0]) for path in run[0].rglob("*") if path.is_file()]
    files.remove(Path(".lock"))
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".csv", ".png", ".html",
                                               ".jinja"}
    assert {path.suffix for path in files if path.parts[0] == "checkpoints"} == {".safetensors", ".json"}


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_read_even_with_a_matching_hash(run, tmp_path, trap,
                                                                                     folder):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    checkpoint = ppo_llm.find_checkpoint(copy, None)
    (checkpoint / "actor.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    write_hashes(checkpoint)
    assert ppo_llm.is_whole(checkpoint)
    models = make_models(make_config(folder))
    with pytest.raises(ppo_llm.SafetensorError):
        models.actor.load(checkpoint / "actor.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_in_the_place_of_weights_is_not_executed(folder, tmp_path, trap, name):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save({"weight": Payload(trap)}, tmp_path / "model" / name)
    else:
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises((UsageError, ppo_llm.SafetensorError, pickle.UnpicklingError)):
        make_models(make_config(tmp_path / "model"))


# ----------------------------------------------------------------------------------------------------------
# What is never executed: code from models, data and configurations.

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Model: pass\n"


def with_code(folder: Path, target: Path, trap: Path, file: str, **changes) -> Path:
    """A model folder that brings Python code, which the changes of a JSON file name."""
    shutil.copytree(folder, target)
    (target / "code.py").write_text(CODE.format(str(trap)))
    settings = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(settings | changes))
    return target


def test_code_of_a_model_repository_is_off_by_default():
    assert Config().trust_remote_code is False and ppo_llm.DEMO.trust_remote_code is False


def test_a_model_that_needs_its_own_code_is_refused_in_a_sentence(folder, tmp_path, trap):
    names = {"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model"}
    model = with_code(folder, tmp_path / "model", trap, "config.json", model_type="unheard_of",
                      auto_map=names)
    with pytest.raises(UsageError, match="contains custom code"):
        ppo_llm.load_tokenizer(make_config(model))
    with pytest.raises(UsageError, match="contains custom code"):
        ppo_llm.load_reward(make_config(folder, reward=str(model)))


def test_code_beside_a_model_of_a_known_kind_is_not_executed(folder, tmp_path, trap):
    names = {"AutoConfig": "code.Model", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    model = with_code(folder, tmp_path / "model", trap, "config.json", auto_map=names)
    assert type(make_models(make_config(model)).actor.model.lm).__name__ == "Qwen2ForCausalLM"


def test_code_beside_a_tokenizer_is_not_executed(folder, tmp_path, trap):
    names = {"AutoTokenizer": ["code.Model", "code.Model"]}
    model = with_code(folder, tmp_path / "model", trap, "tokenizer_config.json", auto_map=names)
    with contextlib.suppress(UsageError):
        ppo_llm.load_tokenizer(make_config(model))


@pytest.mark.parametrize("name", SCRIPTS[:2])
def test_every_loader_of_transformers_is_told_whether_it_may_run_code(name):
    text = (ROOT / name).read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loaders = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("from_pretrained")]
    assert len(loaders) >= 3
    told = "trust_remote_code=config.trust_remote_code"
    assert all(told in call or "**options" in call for call in loaders)
    assert '"trust_remote_code": config.trust_remote_code}' in text  # the options of load_lm


def test_a_chat_template_cannot_reach_python():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UsageError, match="SecurityError"):
        ppo_llm.make_examples([{"prompt": "a"}], tokenizer, Config(reward="f.py:f"), "SOURCE", True)


@pytest.mark.parametrize("name", ["script.py", "folder"])
def test_a_data_set_with_a_loading_script_is_refused_and_not_executed(tmp_path, trap, name):
    script = tmp_path / name
    if name == "folder":
        script.mkdir()
        script = script / "folder.py"
    script.write_text(CODE.format(str(trap)))
    with pytest.raises(UsageError, match=name):
        ppo_llm.read_rows(str(tmp_path / name), "train")


def test_rows_answers_and_responses_are_text_for_the_built_in_rewards(trap):
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for response in (code, f"#### {code}", f"{{{{ {code} }}}}", f"#### {{{code}}}"):
        assert ppo_llm.gsm8k_reward([code], [response], [code]) == [0.0]
        assert ppo_llm.score_gsm8k_flexible(response, code) == 0.0


def test_nothing_in_a_row_names_a_reward_file(tmp_path, trap):
    (tmp_path / "evil.py").write_text(CODE.format(str(trap)))
    row = {"prompt": "a", "answer": "1", "reward": f"{tmp_path}/evil.py:f",
           "reward_model": {"ground_truth": "1"}}
    examples = ppo_llm.make_examples([row], make_tokenizer(), Config(reward="f.py:f"), "SOURCE", True)
    assert [example.answer for example in examples] == ["1"]


def test_nothing_in_a_checkpoint_names_a_reward_file(run, tmp_path, trap, folder, no_figures, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    checkpoint = ppo_llm.find_checkpoint(copy, None)
    (tmp_path / "evil.py").write_text(CODE.format(str(trap)))
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"] |= {"reward": f"{tmp_path}/evil.py:f", "rollout": f"{tmp_path}/evil.py:f",
                        "trust_remote_code": True}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_hashes(checkpoint)
    ppo_llm.main(make_config(folder, output_dir=str(copy), total_steps=3))
    said = capsys.readouterr()
    assert "resumed from step_3 of 3" in said.out and "trust_remote_code True → False" in said.err


@pytest.mark.parametrize("content", [
    "lr: !!python/object/apply:pathlib.Path.touch [{}]", "lr: !!python/object/new:os.system ['touch {}']",
    "!!python/module:code"])
def test_a_configuration_is_read_as_data(tmp_path, trap, content):
    (tmp_path / "options.yaml").write_text(content.format(trap))
    with pytest.raises(UsageError, match="could not determine a constructor"):
        ppo_llm.read_options(str(tmp_path / "options.yaml"))


@pytest.mark.parametrize("name", ["options.json", "options.yaml", "summary.json"])
def test_a_configuration_may_name_code_of_its_author_so_it_has_to_be_read_first(tmp_path, name):
    options = {"reward": "theirs.py:f", "rollout": "theirs.py:g", "trust_remote_code": True}
    content = {"config": options} if name == "summary.json" else options
    (tmp_path / name).write_text(json.dumps(content))
    config = ppo_llm.read_config(["--config", str(tmp_path / name)])
    assert (config.reward, config.rollout, config.trust_remote_code) == ("theirs.py:f", "theirs.py:g", True)


CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pickle.load",
         "pickle.loads",
         "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_call_nothing_that_executes_text_or_unpickles(name):
    tree = ast.parse((ROOT / name).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert not names & (CALLS - {"compile"}) and len(names) > 100
    assert not {keyword.arg for call in calls for keyword in call.keywords} & {"shell", "allow_pickle"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names}
    assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


# ----------------------------------------------------------------------------------------------------------
# What is kept out of logs and files.


def test_the_environment_and_tokens_are_in_no_file_and_not_on_the_console(run):
    files = [path for path in run[0].rglob("*") if path.is_file()]
    assert len(files) > 10
    for value in SECRETS.values():
        assert value not in run[1]
        assert [path for path in files if value.encode() in path.read_bytes()] == []


def test_the_summary_says_what_is_promised_and_nothing_of_the_environment(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    assert set(summary) == {
        "status", "reason", "step", "total_steps", "seconds", "resume_command", "first_evaluation",
        "last_evaluation",
        "versions", "commit", "machine", "settings_history", "config", "evaluation_hash"}
    text = json.dumps(summary)
    assert not re.search(r"HF_TOKEN|WANDB|PATH", text)


def test_no_flag_takes_a_token():
    for field in dataclasses.fields(Config):
        assert not re.search(r"secret|password|api_?key|_token$|^token$|auth", field.name)


def test_a_tracker_gets_the_settings_and_the_numbers_and_no_text(run, monkeypatch, folder, tmp_path):
    sent = []

    class Wandb:
        @staticmethod
        def init(**options):
            sent.append(options)
            return Wandb

        @staticmethod
        def log(metrics, step):
            sent.append(metrics)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    tracked = ppo_llm.Run(make_config(folder, output_dir=str(tmp_path / "run"), track="wandb"), 1)
    tracked.begin(0)
    tracked.add(1, {"reward/score": 1.0}, [{"prompt": "a private prompt", "response": "a private response"}])
    tracked.lock.close()
    assert sent[0]["config"] == dataclasses.asdict(tracked.config) and sent[1:] == [{"reward/score": 1.0}]
    assert not any(value in str(sent) for value in [*SECRETS.values(), "private"])


def test_files_are_written_below_the_output_folder_and_the_link_beside_it(folder, tmp_path, monkeypatch,
                                                                          no_figures):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ppo_llm.main(make_config(folder, total_steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert len(list((tmp_path / "output").iterdir())) == 2
    assert (tmp_path / "output" / "ppo_metrics").is_symlink()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# ----------------------------------------------------------------------------------------------------------
# How hostile text is shown.


def is_harmless(text: str) -> bool:
    """Whether a terminal would only show it."""
    return all(c.isprintable() or c == "\n" for c in text)


def test_printable_keeps_words_and_escapes_what_a_terminal_acts_on():
    for text in ("plain text", "\u00e9\u6f22\u5b57 \U0001f642 → ±", ""):
        assert ppo_llm.printable(text) == text
    shown = ppo_llm.printable(ESCAPES)
    assert shown == r"a\x1b[2Jb\x07c\rd\x9be\u202ef\ng\x00" and is_harmless(shown)
    assert ppo_llm.printable("\ud83d\t\u2028\u200b") == r"\ud83d\t\u2028\u200b"


class Log(ppo_llm.Run):
    """A Run whose console is looked at."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step = 0
        self.evaluations = []
        self.write_log(ppo_llm.pandas.DataFrame())
        self.is_tracked = False
        self.total = 1
        self.config = Config(model="m")


def test_a_response_on_the_console_is_escaped_and_cut_to_the_terminal(tmp_path, capsys, monkeypatch,
                                                                      no_figures):
    monkeypatch.setenv("COLUMNS", "60")
    metrics = {"eval/score": 0.5, "eval/standard_error": 0.1}
    sample = {"score": 1.0, "prompt": ESCAPES, "response": ESCAPES + "x" * 1000}
    monkeypatch.setattr(ppo_llm, "evaluate", lambda *_: (metrics, [sample]))
    Log(tmp_path).evaluate_if_due(0, None, None, [Example("a", "", [1])], 0.0)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert is_harmless(shown) and len(lines) == 2 and max(map(len, lines)) < 60
    assert lines[1].startswith(r"  sample, score 1: a\x1b[2Jb\x07c\rd\x9be\u202ef\ng\x00xxx")
    saved = (tmp_path / "samples.jsonl").read_text()
    assert is_harmless(saved) and json.loads(saved)["response"] == sample["response"]


def test_the_first_prompt_and_the_stop_tokens_are_escaped(tmp_path, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ppo_llm.DEMO.model)
    tokenizer.add_special_tokens({"eos_token": "<\x1b]0;title\x07>"})
    row = {"prompt": ESCAPES.replace("\x00", ""), "answer": "1"}
    examples = ppo_llm.make_examples([row], tokenizer, Config(reward="f.py:f"), "SOURCE", True)
    log = Log(tmp_path)
    log.command = "python"
    log.print_plan(tokenizer, examples, [])

    class Lm:
        generation_config = transformers.GenerationConfig()

    ppo_llm.find_stop_ids(Lm, tokenizer)
    shown = capsys.readouterr().out
    assert is_harmless(shown) and r"a\x1b[2Jb\x07c" in shown and r"<\x1b]0;title\x07>" in shown


def test_columns_and_errors_of_a_data_set_are_escaped_in_warnings_and_refusals(tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "a", ESCAPES: "b"}, {"prompt": "c"}]
    ppo_llm.make_examples(rows, make_tokenizer(), Config(reward="f.py:f"), "SOURCE", True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({ESCAPES: 1}) + "\n" for _ in range(128)))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", ["ppo_llm.py", "--dataset", str(tmp_path / "rows.jsonl")])
    assert ppo_llm.start() == 2
    shown = capsys.readouterr().err
    assert is_harmless(shown) and shown.count(r"a\x1b[2Jb\x07c") == 2
    assert [line.split(":")[0] for line in shown.splitlines()] == ["warning", "error"]


def test_the_table_of_a_run_holds_numbers_under_plain_names(run):
    header, *lines = (run[0] / "training_metrics.csv").read_text().splitlines()
    assert all(re.fullmatch(r"[\w/.-]+", name) for name in header.split(","))
    assert len(lines) == 4 and all(float(cell or 0) is not None for line in lines for cell in line.split(","))


@pytest.mark.parametrize("name", ["a\x1b[2J", "a,b", "a\nb", "=1+1", "../x", "<b>", ""])
def test_the_name_of_a_metric_cannot_be_hostile(name):
    with pytest.raises(UsageError) as error:
        ppo_llm.read_scores(([1.0], {name: [1.0]}), 1)
    assert is_harmless(ppo_llm.printable(str(error.value)))


@pytest.mark.slow
def test_a_model_whose_tokens_are_hostile_trains_and_is_logged_harmlessly(tmp_path, capsys, no_figures):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "\x1b[2J"})
    lm = make_lm(vocab_size=len(tokenizer))
    model = save_folder(tmp_path / "model", lm, tokenizer)
    capsys.readouterr()
    config = make_config(model, total_steps=1, output_dir=str(tmp_path / "run"), eval_every=1,
                         eval_dataset=str(model / "prompts.jsonl"))
    ppo_llm.main(config)
    shown = capsys.readouterr()
    assert is_harmless(shown.out.replace("\r", "")) and "\x1b" not in shown.err
    assert is_harmless((tmp_path / "run" / "samples.jsonl").read_text())
