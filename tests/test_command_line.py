"""The command line: help, files of options, refusals in one sentence, and warnings of what has no effect."""

import dataclasses
import functools
import gzip
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_config

import ppo_llm
import ppo_llm_multigpu
from ppo_llm import DEMO, Config, UsageError

SCRIPT = Path(ppo_llm.__file__)
ROOT = SCRIPT.parent
GROUPS = ["Run", "Models", "Data", "Reward", "KL", "Rollout", "Advantage", "Loss", "Optimization",
          "Evaluation"]
POINTER = "The names of other trainers' options are in docs/coming_from.md."


@pytest.fixture(scope="module", autouse=True)
def source_is_parsed_once():
    """tyro parses the file anew for every class in which it looks for the comments of Config."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(inspect, "findsource", functools.cache(inspect.findsource))
        yield


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs a command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ppo_llm.py", *words])
        capsys.readouterr()
        try:
            code = ppo_llm.start()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_models(monkeypatch):
    """Fails where a model is about to be loaded."""

    def build_models(*_):
        raise AssertionError("a model was about to be loaded")

    monkeypatch.setattr(ppo_llm, "build_models", build_models)


def parse(*words: str) -> Config:
    return ppo_llm.read_config([*words])


def given(config: Config) -> dict:
    """What differs from the preset."""
    preset = DEMO if config.model == DEMO.model else Config()
    return {name: x for name, x in vars(config).items() if x != getattr(preset, name)}


# ----------------------------------------------------------------------------------------------------------
# --help.


@pytest.fixture
def help_text(command) -> str:
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    return out


def test_the_help_begins_with_the_examples_of_the_docstring_and_they_parse(help_text):
    examples = [line for line in help_text.split("Options (")[0].splitlines() if "python ppo_llm.py" in line]
    assert examples == [line for line in ppo_llm.__doc__.splitlines() if "python ppo_llm.py" in line]
    assert len(examples) == 3
    for example in examples:
        ppo_llm.check_config(parse(*shlex.split(example, comments=True)[2:]))
    assert help_text.startswith(ppo_llm.__doc__.splitlines()[0])
    assert "--config FILE" in help_text and "for step" not in help_text


def test_the_help_has_a_heading_for_each_group_and_every_option_once_in_its_order(help_text):
    found = re.findall(r"^(?:(\w+)|  --(\w+).*)$", help_text.split("of a run):")[1], re.MULTILINE)
    assert [heading for heading, _ in found if heading] == GROUPS
    assert [option for _, option in found if option] == [field.name for field in dataclasses.fields(Config)]
    counts = [len(re.findall("--", part)) for part in re.split(r"\n\n\w+\n", help_text)[1:]]
    assert len(counts) == len(GROUPS) and min(counts) >= 3


def test_every_option_has_a_sentence_its_type_or_choices_and_its_default(help_text):
    for field in dataclasses.fields(Config):
        kind, text, default = re.search(rf"  --{field.name} (.+)\n      (.+\.) Default: (.*)\.\n",
                                        help_text).groups()
        assert len(text.split()) >= 4 and text.count("  ") == 0
        assert default == str(getattr(DEMO, field.name))
        if field.type is bool:
            assert kind == f"(--no_{field.name})"
        assert not kind.startswith("Literal") and "typing" not in kind
    assert "--critic {separate,shared}\n" in help_text
    assert "--kl_loss_type {k1,kl,abs,k2,mse,k3,low_var_kl,full,k1+," in help_text


def test_the_help_of_the_twin_has_its_own_group_too(capsys):
    with pytest.raises(SystemExit, match="0"):
        ppo_llm_multigpu.read_config(["--help"])
    out = capsys.readouterr().out
    assert "\nRanks\n  --zero_stage {0,2,3}\n" in out and "--dist_timeout int" in out


def test_the_help_shows_the_defaults_of_the_preset_in_use(command):
    assert "--total_steps int | None" in command("-h")[1]
    assert "Default: 3e-05." in command("-h")[1]
    assert "Default: 1e-06." in command("--model", "some/model", "--help")[1]
    assert "Default: 1e-06." in command("--help", "--model=some/model")[1]


# ----------------------------------------------------------------------------------------------------------
# Presets and words.


def test_without_a_model_the_demo_is_run_and_with_one_the_published_run():
    assert parse() == DEMO
    assert parse("--model", "some/model") == Config(model="some/model")
    assert parse("--model=some/model") == Config(model="some/model")
    assert given(parse("--seed", "7")) == {"seed": 7}


@pytest.mark.parametrize(("words", "expected"), [
    (["--use_kl_loss"], {"use_kl_loss": True}), (["--no_norm_adv_by_std"], {"norm_adv_by_std": False}),
    (["--use_kl_in_reward", "False"], {"use_kl_in_reward": False}),
    (["--clip_ratio_c", "None"], {"clip_ratio_c": None}),
    (["--lr=1e-3"], {"lr": 1e-3}), (["--missing_eos_penalty", "-1"], {"missing_eos_penalty": -1.0}),
    (["--lr", "1", "--lr", "2"], {"lr": 2.0}),
    (["--system_prompt", "two words"], {"system_prompt": "two words"})])
def test_options_are_written_as_the_documents_write_them(words, expected):
    assert given(parse(*words)) == expected


@pytest.mark.parametrize("words", [
    "--learning_rate 1e-3", "--kl_coef 0.1", "--ppo_micro_batch_size 8", "--merge_lora", "--l 3", "--version",
    "extra",
    "lr=3", "--lr", "--lr abc", "--critic adapter", "--total_steps 3.5", "--seed 1.0", "--track trackio",
    "--use_kl_in_reward", "--ppo_epochs None", "True --use_kl_loss"])
def test_what_is_no_option_or_no_value_points_to_the_names_of_other_trainers_and_exits_with_2(command, words):
    code, out, err = command(*words.split())
    assert code == 2 and out == ""
    assert err.splitlines()[-1] == POINTER
    assert words.split()[0] in err.replace("\n", "")
    assert not os.listdir()


def test_the_names_that_the_pointer_promises_are_in_the_document():
    table = (ROOT / "docs" / "coming_from.md").read_text()
    for name in """learning_rate kl_coef ppo_micro_batch_size target_kl gae_lambda top_p score_clip merge_lora
            eval_only deterministic missing_eos_mode overlong_buffer reward_timeout whiten_rewards
            print_samples
            max_new_tokens             num_ppo_epochs cliprange ent_coef report_to""".split():
        assert f"`--{name}`" in table, name


def test_every_option_that_the_document_names_as_ours_exists():
    text = (ROOT / "docs" / "coming_from.md").read_text()
    section = text.split("## Names of other trainers")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    ours = {name for row in rows for name in re.findall(r"--(\w+)", row[2])}
    assert len(rows) > 30 and ours <= {field.name for field in dataclasses.fields(Config)}
    theirs = {name for row in rows for name in re.findall(r"--(\w+)", row[1])}
    assert not theirs & {field.name for field in dataclasses.fields(Config)}


# ----------------------------------------------------------------------------------------------------------
# --config FILE.


def from_file(path: Path, content: str, *words: str) -> dict:
    path.write_text(content)
    return given(parse("--config", str(path), *words))


@pytest.mark.parametrize(("content", "expected"), [
    ("lr: 1e-3", {"lr": 1e-3}), ("lr: 1E-3", {"lr": 1e-3}), ("lr: 0.001", {"lr": 1e-3}),
    ("lr: 1", {"lr": 1.0}),
    ("lr: '1e-3'", {"lr": 1e-3}), ("seed: -3", {"seed": -3}),
    ("missing_eos_penalty: -1", {"missing_eos_penalty": -1.0}),
    ("use_kl_loss: true", {"use_kl_loss": True}), ("use_kl_loss: yes", {"use_kl_loss": True}),
    ("use_kl_loss: false", {}), ("norm_adv_by_std: no", {"norm_adv_by_std": False}),
    ("use_kl_in_reward: true", {"use_kl_in_reward": True}), ("use_kl_in_reward: null", {}),
    ("clip_ratio_c: null", {"clip_ratio_c": None}), ("clip_ratio_c: None", {"clip_ratio_c": None}),
    ("clip_ratio_c:", {"clip_ratio_c": None}), ("total_steps: ~", {"total_steps": None}),
    ("system_prompt: two words", {"system_prompt": "two words"}),
    ("system_prompt: ''", {"system_prompt": ""}),
    ("system_prompt: '--lr 3'", {"system_prompt": "--lr 3"}),
    ("system_prompt: '- a'", {"system_prompt": "- a"}),
    ("system_prompt: 'a=b: {c}'", {"system_prompt": "a=b: {c}"}),
    ("prompt_column: '7'", {"prompt_column": "7"}),
    ("system_prompt: |\n  one\n  two\n", {"system_prompt": "one\ntwo\n"}),
    ("system_prompt: \u00e9", {"system_prompt": "\u00e9"}),
    ("# a comment\nlr: 1.0\n\nseed: 2", {"lr": 1.0, "seed": 2}), ("config:\n  seed: 2", {"seed": 2}),
    ("{}", {})])
def test_a_yaml_file_of_options_is_read(tmp_path, content, expected):
    assert from_file(tmp_path / "options.yaml", content) == expected


@pytest.mark.parametrize("name", ["options.json", "options.yaml", "options"])
def test_a_json_file_of_options_is_read(tmp_path, name):
    options = {"lr": 1e-7, "use_kl_loss": True, "clip_ratio_c": None, "kl_loss_type": "k2",
               "system_prompt": 'say "x"\n'}
    assert from_file(tmp_path / name, json.dumps(options)) == options
    assert from_file(tmp_path / name, json.dumps(options, indent=2)) == options
    assert from_file(tmp_path / name, '{"lr": 1e-3}') == {"lr": 1e-3}


@pytest.mark.parametrize(("content", "words", "expected"), [
    ("lr: 1", ["--lr", "5"], {"lr": 5.0}), ("lr: 1", ["--lr=5"], {"lr": 5.0}),
    ("use_kl_loss: true", ["--no_use_kl_loss"], {}),
    ("use_kl_loss: false", ["--use_kl_loss"], {"use_kl_loss": True}),
    ("clip_ratio_c: null", ["--clip_ratio_c", "2"], {"clip_ratio_c": 2.0}),
    ("lr: 1\nseed: 3", ["--lr", "5"], {"lr": 5.0, "seed": 3})])
def test_the_command_line_wins_wherever_it_stands(tmp_path, content, words, expected):
    path = tmp_path / "options.yaml"
    assert from_file(path, content, *words) == expected
    assert given(parse(*words, f"--config={path}")) == expected


def test_a_model_in_the_file_chooses_the_preset_as_the_flag_does(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("model: some/model\nseed: 3")
    assert parse("--config", str(path)) == Config(model="some/model", seed=3)


def test_output_dir_and_resume_are_not_taken_from_a_file(tmp_path):
    assert from_file(tmp_path / "o.yaml", "output_dir: old\nresume: other\nseed: 3") == {"seed": 3}
    assert from_file(tmp_path / "o.yaml", "output_dir: old", "--output_dir", "new") == {"output_dir": "new"}


def test_the_summary_of_a_run_is_a_file_of_options_that_makes_the_same_run(tmp_path, folder, no_figures):
    config = make_config(folder, total_steps=0, use_kl_loss=True, clip_ratio_c=None, norm_adv_by_std=False,
                         use_kl_in_reward=False, lr=1.5e-7, output_dir=str(tmp_path / "run"))
    ppo_llm.main(config)
    again = parse("--config", str(tmp_path / "run" / "summary.json"))
    assert again == dataclasses.replace(config, output_dir=None)
    assert parse("--config", str(tmp_path / "run" / "summary.json"), "--seed", "5").seed == 5


@pytest.mark.parametrize("content", [
    "learning_rate: 3", "nope: null", "lr: abc", "lr: [1, 2]", "kl_penalty: k9", "use_kl_loss: 'no'",
    "use_kl_loss: 3",
    "norm_adv_by_std: null", "1: 2", "two words: 3", "total_steps: 3.5", "optimizer:\n  lr: 3"])
def test_an_unknown_name_or_value_in_a_file_is_a_sentence_and_exit_code_2(command, content):
    Path("options.yaml").write_text(content)
    code, out, err = command("--config", "options.yaml")
    assert (code, out) == (2, "") and err.endswith(f"{POINTER}\n") and "Traceback" not in err


@pytest.mark.parametrize(("content", "phrase"), [
    (b"", "there are no options"), (b"- lr: 3", "there are no options"), (b"3", "there are no options"),
    (b"just text", "there are no options"), (b"config: 3", "there are no options"),
    (b"null", "there are no options"),
    (b"a: b: c", "mapping values are not allowed here"), (b"{", "line 1"), (b"lr: 1\n  seed: 2", "line 2"),
    ("lr: 1".encode("utf-16"), "utf-8"), (b"lr: \x00", "special characters"), (b"\xe9: 1", "utf-8"),
    (gzip.compress(b"lr: 1", mtime=0), "utf-8")])
def test_a_file_that_holds_no_options_is_a_sentence_and_exit_code_2(command, content, phrase):
    Path("options.yaml").write_bytes(content)
    code, out, err = command("--config", "options.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: config options.yaml: ") and phrase in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_config_that_is_no_file_is_a_sentence_and_exit_code_2(command, name):
    code, _, err = command("--config", name)
    assert code == 2 and err.startswith("error: ") and name in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------
# check_config.


def refusal(function, *arguments) -> str:
    """The one sentence that the user would read."""
    with pytest.raises(UsageError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


REFUSED = [({name: 0}, f"{name} cannot be 0") for name in """train_batch_size rollout_n max_response_length
    max_prompt_length rollout_slots total_epochs ppo_epochs ppo_mini_batch_size critic_ppo_epochs
    rollout_is_cap critic_ppo_mini_batch_size temperature micro_batch_tokens grad_clip
    save_total_limit eval_size
    lora_rank lora_alpha loss_scale_factor kl_ctrl_horizon kl_ctrl_target cliprange_value
    early_stop_kl""".split()]
REFUSED += [({name: x}, f"{name} cannot be {x}") for name in ("entropy_coeff", "missing_eos_penalty", "early_stop_kl")
            for x in (math.nan, math.inf, -math.inf)]
REFUSED += [({name: -1}, f"{name} cannot be -1") for name in """lr critic_lr warmup_steps
critic_warmup eval_every
    save_every clip_ratio clip_ratio_low clip_ratio_high kl_ctrl_coef kl_loss_coef weight_decay vf_coef
    total_steps train_batch_size temperature gamma lam reference_mix""".split()]
REFUSED += [({name: 1.1}, f"{name} cannot be 1.1") for name in
            "reference_mix gamma lam lam_critic attribution_discount".split()]
REFUSED += [({name: bad},
             f"{name} cannot be {bad}") for name in "lr temperature clip_ratio kl_ctrl_coef".split()
            for bad in (float("nan"), float("inf"), -float("inf"))]
REFUSED += [
    ({"clip_ratio_c": 1.0}, "clip_ratio_c must exceed 1"),
    ({"clip_ratio_c": 0.5}, "clip_ratio_c must exceed 1"),
    ({"device": "cuda"}, "device cuda: no CUDA here"), ({"device": "cuda:1"}, "device cuda:1: no CUDA here"),
    ({"use_kl_in_reward": True, "use_kl_loss": True}, "use_kl_in_reward or use_kl_loss: choose one"),
    ({"reference": "previous"}, "reference previous needs use_kl_loss"),
    ({"reference": "previous", "use_kl_loss": True, "kl_ctrl_type": "adaptive"}, "kl_ctrl_type fixed"),
    ({"reference": "previous", "use_kl_loss": True, "kl_loss_type": "full"},
     "the full KL works with reference init only"),
    ({"reference": "mixed", "kl_penalty": "full"}, "the full KL works with reference init only"),
    ({"kl_ctrl_type": "adaptive", "kl_ctrl_coef": 0.0}, "needs a KL whose coefficient is not 0"),
    ({"kl_ctrl_type": "adaptive", "use_kl_in_reward": False}, "needs a KL whose coefficient is not 0"),
    ({"kl_ctrl_type": "adaptive", "use_kl_loss": True, "kl_loss_coef": 0.0},
     "needs a KL whose coefficient is not 0"),
    ({"critic_early_stop": True}, "critic_early_stop needs 2 epochs of the critic"),
    ({"critic_early_stop": True, "ppo_epochs": 4, "critic_ppo_epochs": 1}, "needs 2 epochs of the critic"),
    ({"device": "bogus"}, "there is no device bogus"),
    ({"lora_alpha": 8.0}, "lora_* flags need lora_rank"),
    ({"lora_target": "q_proj"}, "lora_* flags need lora_rank"),
    ({"critic_early_stop": True, "ppo_epochs": 2, "train_batch_size": 8, "ppo_mini_batch_size": 8}, "10 responses"),
    ({"kl_ctrl_type": "adaptive", "kl_ctrl_horizon": 51, "train_batch_size": 256}, "kl_ctrl_horizon must exceed"),
    ({"train_batch_size": 10, "ppo_mini_batch_size": 4}, "= 10 responses must divide into mini-batches"),
    ({"train_batch_size": 5, "rollout_n": 5, "ppo_mini_batch_size": 10}, "= 25 responses must divide"),
    ({"train_batch_size": 8, "ppo_mini_batch_size": 16}, "= 8 responses must divide"),
    ({"train_batch_size": 12, "ppo_mini_batch_size": 6, "critic_ppo_mini_batch_size": 5}, "must divide")]
CRITIC_FLAGS = [{"critic_model": "x"}, {"critic_ppo_epochs": 2}, {"critic_ppo_mini_batch_size": 64},
                {"critic_warmup": 1}, {"critic_early_stop": True, "ppo_epochs": 2}]
NO_OPTIMIZER = "no critic has an optimizer of its own: of the critic_* flags at most critic_lr applies"
REFUSED += [({"critic": "shared"} | flags, NO_OPTIMIZER) for flags in CRITIC_FLAGS]
REFUSED += [({"adv_estimator": "rloo", "rollout_n": 4} | flags, NO_OPTIMIZER) for flags in CRITIC_FLAGS]
REFUSED += [({"adv_estimator": name}, "rollout_n must be 2 or more")
            for name in ("grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus_baseline")]


@pytest.mark.parametrize(("flags", "phrase"), REFUSED,
                         ids=[" ".join(map(str, flags)) for flags, _ in REFUSED])
def test_a_combination_that_cannot_work_is_refused(monkeypatch, flags, phrase):
    monkeypatch.setattr(ppo_llm.torch.cuda, "is_available", lambda: False)
    assert phrase in refusal(ppo_llm.check_config, Config(**flags))


SOUND = [
    {}, {"adv_estimator": "reinforce_plus_plus"}, {"adv_estimator": "grpo", "rollout_n": 8},
    {"use_kl_loss": True},
    {"use_kl_loss": True, "kl_loss_type": "k2"}, {"kl_penalty": "kl"},
    {"use_kl_loss": True, "kl_loss_type": "full"},
    {"use_kl_loss": True, "kl_loss_type": "mse"}, {"use_kl_loss": True, "kl_loss_type": "k1+"},
    {"use_kl_loss": True, "kl_loss_type": "low_var_kl+"}, {"use_kl_loss": True, "reference": "previous"},
    {"use_kl_loss": True, "kl_ctrl_type": "adaptive"}, {"use_kl_in_reward": False},
    {"kl_ctrl_type": "adaptive"},
    {"kl_penalty": "k3", "kl_ctrl_coef": 0.0}, {"reference": "mixed", "reference_mix": 0.1},
    {"critic": "shared"},
    {"critic": "shared", "vf_coef": 0.5}, {"critic_early_stop": True, "critic_ppo_epochs": 2},
    {"clip_ratio_c": None},
    {"kl_ctrl_type": "adaptive", "kl_ctrl_unit": "sequence", "kl_ctrl_target": 3.0}, {"lam_critic": 0.9},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 99.0}, {"total_steps": 0}, {"seed": -1},
    {"reward_attribution": "discounted", "attribution_discount": 0.5}, {"missing_eos_penalty": -1.0},
    {"adv_estimator": "grpo", "rollout_n": 2, "norm_adv_by_std": False}, {"entropy_coeff": -0.01},
    {"adv_estimator": "reinforce_plus_plus", "gamma": 0.9}, {"total_epochs": 3},
    {"lora_rank": 8, "lora_alpha": 8.0},
    {"critic_warmup": 4, "total_steps": 5}, {"eval_every": 0}]


@pytest.mark.parametrize("flags", SOUND, ids=[" ".join(flags) for flags in SOUND])
def test_what_works_and_is_sound_passes_without_a_word(flags, capsys):
    ppo_llm.check_config(Config(**flags))
    assert capsys.readouterr() == ("", "")


def test_the_demo_passes_without_a_word(capsys):
    ppo_llm.check_config(DEMO)
    assert capsys.readouterr() == ("", "")


UNSOUND = [({"kl_penalty": kind}, "in the reward only k1") for kind in ("abs", "k2", "mse", "k3",
                                                                        "low_var_kl", "full")]
UNSOUND += [({"use_kl_loss": True, "kl_loss_type": kind}, "lacks the gradient of KL")
            for kind in ("k1", "kl", "abs", "k3", "low_var_kl")]


@pytest.mark.parametrize(("flags", "phrase"), UNSOUND)
def test_what_is_allowed_but_unsound_is_warned_of_once(flags, phrase, capsys):
    ppo_llm.check_config(Config(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ") and phrase in lines[0]


# ----------------------------------------------------------------------------------------------------------
# Flags without effect.

NO_CRITIC = {"adv_estimator": "rloo", "rollout_n": 4}
IDLE = [  # (the setting, the flag that has no effect beside it)
    *[(NO_CRITIC, flag) for flag in ({"lam": 0.9}, {"lam_critic": 0.9}, {"critic": "shared"},
                                     {"critic_lr": 1e-3},
                                     {"cliprange_value": 0.2}, {"value_pooling": "mean"}, {"vf_coef": 0.5},
                                     {"gamma": 0.9}, {"norm_adv_by_std": False})],
    ({"adv_estimator": "reinforce_plus_plus"}, {"lam": 0.9}), ({"critic": "separate"}, {"vf_coef": 0.5}),
    ({"adv_estimator": "grpo", "rollout_n": 2}, {"gamma": 0.9}),
    ({"adv_estimator": "gae"}, {"norm_adv_by_std": False}),
    ({"kl_ctrl_type": "fixed"}, {"kl_ctrl_target": 0.2}), ({"kl_ctrl_type": "fixed"}, {"kl_ctrl_horizon": 5}),
    ({"kl_ctrl_type": "fixed"}, {"kl_ctrl_unit": "sequence"}), ({"use_kl_loss": True}, {"kl_penalty": "k3"}),
    ({"use_kl_loss": True}, {"kl_ctrl_coef": 0.1}), ({"use_kl_in_reward": False}, {"kl_ctrl_coef": 0.1}),
    ({"use_kl_loss": False}, {"kl_loss_coef": 0.1}), ({"use_kl_loss": False}, {"kl_loss_type": "k2"}),
    ({"reference": "init"}, {"reference_mix": 0.1}),
    ({"reward_attribution": "uniform"}, {"attribution_discount": 0.5}),
    ({"reward_attribution": "terminal"}, {"attribution_discount": 0.5}),
    ({"total_steps": 5}, {"total_epochs": 2}),
    ({"loss_agg_mode": "token-mean"}, {"loss_scale_factor": 9.0}), ({"eval_every": 0}, {"eval_size": 5}),
    ({"eval_every": 0}, {"eval_dataset": "rows.jsonl"})]


@pytest.mark.parametrize(("setting", "flag"), IDLE, ids=[" ".join([*flag, "beside", *x]) for x, flag in IDLE])
def test_a_flag_without_effect_is_warned_of_once_and_by_its_name(setting, flag, capsys):
    ppo_llm.check_config(Config(**setting | flag))
    assert capsys.readouterr().err == (f"warning: without effect beside the other options: {next(iter(flag))}"
                                       " (docs/choosing.md says why)\n")


def test_several_flags_without_effect_are_one_warning(capsys):
    ppo_llm.check_config(Config(**NO_CRITIC, lam=0.9, vf_coef=0.5, kl_loss_coef=0.1, reference_mix=0.1))
    assert capsys.readouterr().err == ("warning: without effect beside the other options: lam, vf_coef,"
                                       " kl_loss_coef,"
                                       " reference_mix (docs/choosing.md says why)\n")


def test_every_flag_of_the_table_is_tried_above():
    source = inspect.getsource(ppo_llm.warn_of_settings)
    source = source.split("for has_no_effect")[1].split("):\n        if")[0]
    table = {name for names in re.findall(r', "([\w ]+)"\),\n', source) for name in names.split()}
    assert len(table) >= 20
    assert table == {name for _, flag in IDLE for name in flag}


def test_the_demos_own_settings_count_as_its_defaults(capsys):
    ppo_llm.check_config(dataclasses.replace(DEMO, adv_estimator="grpo", rollout_n=4, train_batch_size=32))
    assert capsys.readouterr().err == ""  # lam 0.95 and critic_lr 3e-4 are the demo's


# ----------------------------------------------------------------------------------------------------------
# Sizes that fit.


@pytest.mark.parametrize(("rows", "flags", "advice"), [
    (64, {}, "use --train_batch_size 64 --ppo_mini_batch_size 16"),
    (100, {}, "use --train_batch_size 100 --ppo_mini_batch_size 25"),
    (7, {}, "use --train_batch_size 7 --ppo_mini_batch_size 1"),
    (1, {}, "use --train_batch_size 1 --ppo_mini_batch_size 1"),
    (64, {"rollout_n": 4}, "use --train_batch_size 64 --ppo_mini_batch_size 16"),
    (1000, {"train_batch_size": 30, "ppo_mini_batch_size": 8},
     "use --train_batch_size 30 --ppo_mini_batch_size 6"),
    (64, {"critic_ppo_mini_batch_size": 32},
     "use --train_batch_size 64 --ppo_mini_batch_size 16 --critic_ppo_mini_batch_size 16")])
def test_sizes_that_do_not_fit_are_answered_with_sizes_that_do(rows, flags, advice):
    assert ppo_llm.fitting_sizes(rows, Config(**flags)) == advice


def test_the_advised_sizes_always_pass_the_check():
    for rows in (1, 2, 7, 64, 97, 300):
        for flags in ({}, {"train_batch_size": 6, "ppo_mini_batch_size": 4}, {"rollout_n": 3},
                      {"train_batch_size": 5, "ppo_mini_batch_size": 64}, {"critic_ppo_mini_batch_size": 7}):
            advice = ppo_llm.fitting_sizes(rows, Config(**flags))
            sizes = re.findall(r"--(\w+) (\d+)", advice)
            config = dataclasses.replace(Config(**flags), **{name: int(x) for name, x in sizes})
            ppo_llm.check_config(config)
            assert config.train_batch_size <= rows
            assert config.ppo_mini_batch_size <= Config(**flags).ppo_mini_batch_size


def test_a_refusal_of_sizes_that_do_not_divide_says_which_do():
    sentence = refusal(ppo_llm.check_config, Config(train_batch_size=30, ppo_mini_batch_size=8))
    assert sentence == ("train_batch_size * rollout_n = 30 responses must divide into mini-batches:"
                        " use --train_batch_size 30 --ppo_mini_batch_size 6")


def test_own_data_of_64_rows_is_answered_with_sizes_that_work(command, no_models):
    rows = "".join(json.dumps({"question": f"{i}", "answer": "1"}) + "\n" for i in range(64))
    Path("rows.jsonl").write_text(rows)
    code, _, err = command("--dataset", "rows.jsonl")
    assert code == 2
    words = re.search(r"use (--train_batch_size 64 --ppo_mini_batch_size \d+)\n$", err)[1].split()
    with pytest.raises(AssertionError, match="a model was about to be loaded"):
        command("--dataset", "rows.jsonl", "--eval_every", "0", *words)


# ----------------------------------------------------------------------------------------------------------
# One sentence, exit code 2, before a model is loaded.

ROWS = [{"question": "What is 2+2?", "answer": "#### 4"}, {"question": "And 3+3?", "answer": "#### 6"}]
TWO_ROWS = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(("words", "content", "phrase"), [
    ("--prompt_column text", TWO_ROWS, "there is no column 'text'; there are question, answer"),
    ("", "", "no rows"), ("", '{"question": "a", "answer": "b"}\n{oops}\n', "rows.jsonl: line 2: "),
    ("", TWO_ROWS, "2 prompts, but train_batch_size is 4: use --train_batch_size 2 --ppo_mini_batch_size 1"),
    ("--max_prompt_length 1", TWO_ROWS, "no prompt has at most 1 tokens"),
    ("--train_batch_size 3", TWO_ROWS, "3 responses must divide into mini-batches: use --train_batch_size 3"),
    ("--adv_estimator grpo", TWO_ROWS, "rollout_n must be 2 or more"),
    ("--max_response_length 1500", TWO_ROWS, "max_prompt_length + max_response_length = 2524 tokens, but"),
    ("--model missing/folder", TWO_ROWS, "model missing/folder: "),
    ("--critic_model missing/folder", TWO_ROWS, "model missing/folder: "),
    ("--model .", TWO_ROWS, "model .: "),
    ("--use_kl_in_reward True --use_kl_loss", TWO_ROWS, "choose one"),
    ("--lr nan", TWO_ROWS, "lr cannot be nan"),
    ("--reward mine.py", TWO_ROWS * 2, "reward mine.py: there is no file 'mine.py', or no function is named"),
    ("--reward rows.jsonl", TWO_ROWS * 2, "model rows.jsonl: "),
    ("--eval_dataset missing.jsonl", TWO_ROWS * 2, "missing.jsonl: "),
    ("--dataset missing.jsonl", TWO_ROWS, "missing.jsonl: "), ("--dataset .", TWO_ROWS, ".: Directory"),
    ("--device cuda", TWO_ROWS, "device cuda: no CUDA here")])
def test_the_users_mistakes_are_one_sentence_before_a_model_is_loaded(
        command, no_models, monkeypatch, words, content, phrase):
    monkeypatch.setattr(ppo_llm.torch.cuda, "is_available", lambda: False)
    Path("rows.jsonl").write_text(content)
    sizes = ["--dataset", "rows.jsonl", "--train_batch_size", "4", "--ppo_mini_batch_size", "2"]
    code, _, err = command(*sizes, *words.split())
    assert code == 2 and "Traceback" not in err
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and phrase in errors[0]
    assert os.listdir() == ["rows.jsonl"]  # and nothing was written


def test_a_tokenizer_that_cannot_be_loaded_is_a_sentence(folder, tmp_path):
    for path in folder.glob("*"):
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    sentence = refusal(ppo_llm.load_tokenizer, make_config(tmp_path))
    assert sentence.startswith(f"tokenizer of {tmp_path}: ")


def test_a_missing_demo_asks_for_the_model_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(ppo_llm, "DEMO", dataclasses.replace(DEMO, model=str(tmp_path / "demo")))
    sentence = refusal(ppo_llm.load_tokenizer, ppo_llm.DEMO)
    assert sentence.endswith("the bundled demo is not beside this script: give --model")


@pytest.mark.parametrize(("error", "code", "sentence"), [
    (UsageError("what to mend"), 2, "error: what to mend\n"),
    (ppo_llm.Diverged("not finite"), 2, "error: not finite\n"),
    (OSError(28, "No space left on device", "output/x"), 2,
     "error: [Errno 28] No space left on device: 'output/x'\n"),
    (ppo_llm.torch.OutOfMemoryError("CUDA"), 2,
     "error: out of memory: lower --micro_batch_tokens or --rollout_slots,"),
    (ppo_llm.SafetensorError("header too large"), 2, "error: header too large\n"), (None, 0, "")])
def test_what_the_user_can_mend_is_a_sentence_and_exit_code_2(command, monkeypatch, error, code, sentence):
    def main(config):
        if error:
            raise error

    monkeypatch.setattr(ppo_llm, "main", main)
    found, _, err = command()
    assert found == code and err.startswith(sentence) and err.count("\n") == (1 if sentence else 0)


def test_a_fault_of_the_program_is_not_dressed_up_as_the_users(command, monkeypatch):
    def main(config):
        raise ZeroDivisionError

    monkeypatch.setattr(ppo_llm, "main", main)
    with pytest.raises(ZeroDivisionError):
        command()


@pytest.mark.slow
def test_as_a_process_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    words = ["--lr", "nan"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: lr cannot be nan\n")
    assert os.listdir(tmp_path) == []


def test_a_warm_up_of_the_critic_that_leaves_the_actor_no_step_is_refused(tmp_path):
    config = ppo_llm.Config(critic_warmup=5, output_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="critic_warmup = 5 leaves the actor none of 5 steps"):
        ppo_llm.Run(config, 5)
    assert not (tmp_path / "run").exists()
