"""Promises about the text of the scripts: size, shape, options, shared functions, and the commands of the documents."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import ppo_classic
import ppo_llm
import ppo_llm_multigpu

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"ppo_llm": ppo_llm, "ppo_llm_multigpu": ppo_llm_multigpu, "ppo_classic": ppo_classic}
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in MODULES}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
# Lines today; lower a number when its file gets shorter, never raise it.
LEDGER = {"ppo_llm": 1923, "ppo_llm_multigpu": 2065, "ppo_classic": 861}
SHARED = ["UsageError", "warn", "clipped_policy_loss", "clipped_value_loss"]  # the same text in every file
OWN = ["Config", "check_config", "evaluate", "update", "save_checkpoint", "load_checkpoint", "checkpoints", "open_run",
       "save_summary", "collect_rollout", "compute_advantages", "compute_gae", "main"]  # same name, another task
TWIN_NEW = ["deepspeed_config", "in_step", "one_rank_first", "own_rows", "start_ranks"]
TWIN_DIFFERS = """Config Engine Learner build_models check_config cut_back generate load_lm log_metrics main
    save_checkpoint save_summary sum_over_ranks train_mini_batch union_over_ranks update warn whole_weights""".split()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / f"{name}.py" for name in MODULES)]
each_file = pytest.mark.parametrize("name", MODULES)


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def definitions(name: str) -> dict[str, str]:
    """Text of the functions and classes at the top level."""
    nodes = [node for node in TREES[name].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(SOURCES[name], node) for node in nodes}


def depth(node: ast.AST) -> int:
    """How many blocks deep; an elif stands beside its if, as it does for a reader."""
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        elif_depth = depth(node.orelse[0])
        children.remove(node.orelse[0])
    else:
        elif_depth = 0
    inner = max((depth(child) for child in children), default=0)
    return max(elif_depth, inner + isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)))


@each_file
def test_the_file_keeps_to_its_ledger(name):
    assert len(SOURCES[name].splitlines()) <= LEDGER[name]


@each_file
def test_functions_fit_on_a_screen(name):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(name)}
    assert {f: n for f, n in long.items() if n > (75 if f == "main" else 45)} == {}


@each_file
def test_nesting_is_at_most_three_deep(name):
    deep = {f.name: max(depth(child) for child in f.body) for f in functions(name)}
    assert max(deep.values()) >= 2
    assert {f: n for f, n in deep.items() if n > 3} == {}


@each_file
def test_lines_have_at_most_120_columns(name):
    assert [line for line in SOURCES[name].splitlines() if len(line) > 120] == []


def test_what_the_files_share_is_the_same_text():
    llm, classic = definitions("ppo_llm"), definitions("ppo_classic")
    assert {x: llm[x] for x in SHARED} == {x: classic[x] for x in SHARED}
    assert set(llm) & set(classic) <= {*SHARED, *OWN}, "a shared name that is neither listed as equal nor as its own"


def test_a_conversation_is_read_alike_where_a_reward_model_is_trained_and_where_it_scores():
    trainer = (ROOT / "scripts" / "train_reward_model.py").read_text()
    for name in ("conversation_ids", "score_conversations"):
        assert definitions("ppo_llm")[name] in trainer


def test_the_multi_gpu_file_differs_in_at_most_200_lines():
    done = subprocess.run(["diff", "ppo_llm.py", "ppo_llm_multigpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert len(re.findall("^[<>]", done.stdout, re.MULTILINE)) <= 200


def test_what_differs_in_the_multi_gpu_file_is_listed():
    one, many = definitions("ppo_llm"), definitions("ppo_llm_multigpu")
    assert sorted(set(many) - set(one)) == TWIN_NEW and set(one) <= set(many)
    assert sorted(name for name in one if one[name] != many[name]) == sorted(TWIN_DIFFERS)
    names = [field.name for field in dataclasses.fields(ppo_llm.Config)]
    fields = dataclasses.fields(ppo_llm_multigpu.Config)
    assert [field.name for field in fields][: len(names)] == names
    assert [(field.name, field.default) for field in fields[len(names) :]] == [
        ("zero_stage", 2), ("offload", "none"), ("ds_config", None), ("dist_timeout", 1800)]
    assert all(getattr(ppo_llm.DEMO, name) == getattr(ppo_llm_multigpu.DEMO, name) for name in names)


@each_file
def test_every_option_has_a_comment_on_its_line_and_is_read(name):
    node = next(node for node in TREES[name].body if getattr(node, "name", "") == "Config")
    body = SOURCES[name].splitlines()[node.lineno - 1 : node.end_lineno]
    for field in dataclasses.fields(MODULES[name].Config):
        line = next(line for line in body if line.startswith(f"    {field.name}: "))
        assert "  # " in line, f"{field.name} has no comment, so no help"
        read = re.search(rf"\b(?:config|c|self)\.{field.name}\b", SOURCES[name])
        assert read, f"{field.name} is an option that nothing reads"


@pytest.mark.parametrize("name", ["ppo_llm", "ppo_classic"])  # the twin's list is above
def test_the_command_line_is_the_golden_list(name):
    module = MODULES[name]
    lines = [f"{f.name} = {getattr(module.Config(), f.name)!r}" for f in dataclasses.fields(module.Config)]
    if name == "ppo_llm":
        lines = [f"{line}; demo {getattr(module.DEMO, line.split()[0])!r}" for line in lines]
    else:
        lines += [f"{preset}: {values!r}" for preset, values in module.PRESETS.items()]
    golden = ROOT / "tests" / "data" / ("golden_cli.txt" if name == "ppo_llm" else "golden_classic.txt")
    assert "\n".join(lines).replace(str(ROOT), "ROOT") + "\n" == golden.read_text(), "the command line has changed"


@each_file
def test_importing_has_no_side_effects(tmp_path, name):
    code = f"import os, random; random.seed(1); import {name}; print(os.listdir(), random.random())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    assert done.stdout == "[] 0.13436424411240122\n", done.stderr


def commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"(?:python|deepspeed|torchrun)\b[^\n`&#|;]*? ppo_\w+\.py[^\n`&#|]*", text)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documents_parse(command):
    words = [word for word in shlex.split(command) if word not in ("…", "...", "--help")]
    script, *arguments = words[next(i for i, word in enumerate(words) if word.startswith("ppo_")) :]
    module = MODULES[script.removesuffix(".py")]
    tyro.cli(module.Config, args=arguments, default=getattr(module, "DEMO", module.Config()), use_underscores=True)


@each_file
def test_the_pseudocode_names_functions_that_exist(name):
    module = MODULES[name]
    names = set(re.findall(r"\b([a-z_]+)\(", module.__doc__.split("Shapes:")[0]))
    known = names - {"range", "reward", "update", "optimization", "for", "forward", "step"}
    assert len(known) >= 5
    assert [x for x in known if not hasattr(module, x)] == []


def test_the_documents_name_nothing_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() if listed.returncode == 0 else [*(f"{name}.py" for name in MODULES), "README.md"]
    for name in files:
        if not name.endswith((".safetensors", ".png", "test_source.py")):
            text = (ROOT / name).read_text(errors="replace")
            assert not re.search(r"/(?:work|root|home)/\w", text), name


def test_the_readme_states_the_size_of_the_file_and_begins_with_a_command():
    readme = (ROOT / "README.md").read_text()
    for source in SOURCES.values():
        assert f"({len(source.splitlines())} lines)" in readme
    assert any("python ppo_llm.py" in line for line in readme.splitlines()[:15])
    assert 900 <= len(readme.split()) <= 1500
