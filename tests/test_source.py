"""Promises about the text of ppo_llm.py: its size, its shape, its options, and the commands that the documents give."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import ppo_llm

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "ppo_llm.py").read_text()
TREE = ast.parse(SOURCE)
LEDGER = 1538  # lines of ppo_llm.py today; lower it whenever the file gets shorter, never raise it for convenience
FIELDS = [field.name for field in dataclasses.fields(ppo_llm.Config)]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ppo_llm.py"]


def functions() -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


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


def test_the_file_keeps_to_its_ledger():
    assert len(SOURCE.splitlines()) <= LEDGER


def test_functions_fit_on_a_screen():
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions()}
    assert {name: n for name, n in long.items() if n > (75 if name == "main" else 45)} == {}


def test_nesting_is_at_most_three_deep():
    deep = {f.name: max(depth(child) for child in f.body) for f in functions()}
    assert max(deep.values()) >= 2
    assert {name: n for name, n in deep.items() if n > 3} == {}


def test_lines_have_at_most_120_columns():
    assert [line for line in SOURCE.splitlines() if len(line) > 120] == []


def test_every_option_has_a_comment_on_its_line_and_is_read():
    body = ast.get_source_segment(SOURCE, next(n for n in TREE.body if getattr(n, "name", "") == "Config"))
    for name in FIELDS:
        line = next(line for line in body.splitlines() if line.startswith(f"    {name}: "))
        assert "  # " in line, f"{name} has no comment, so no help"
        assert re.search(rf"\b(?:config|c|self)\.{name}\b", SOURCE), f"{name} is an option that nothing reads"


def test_the_command_line_is_the_golden_list():
    lines = [f"{f.name} = {getattr(ppo_llm.Config(), f.name)!r}; demo {getattr(ppo_llm.DEMO, f.name)!r}"
             for f in dataclasses.fields(ppo_llm.Config)]
    text = "\n".join(lines).replace(str(ROOT), "ROOT") + "\n"
    assert text == (ROOT / "tests" / "data" / "golden_cli.txt").read_text(), "the command line has changed"


def test_importing_has_no_side_effects(tmp_path):
    code = "import os, random; random.seed(1); import ppo_llm; print(os.listdir(), random.random())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    assert done.stdout == "[] 0.13436424411240122\n", done.stderr


def commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"python ppo_llm\.py[^\n`&#|]*", text)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documents_parse(command):
    arguments = [a for a in shlex.split(command)[2:] if a not in ("…", "...", "--help")]
    tyro.cli(ppo_llm.Config, args=arguments, default=ppo_llm.DEMO, use_underscores=True)


def test_the_pseudocode_names_functions_that_exist():
    names = re.findall(r"\b([a-z_]+)\(", ppo_llm.__doc__.split("Shapes:")[0])
    known = [name for name in names if name not in ("range", "reward", "update", "optimization", "for")]
    assert len(known) >= 5
    assert [name for name in known if not hasattr(ppo_llm, name)] == []


def test_the_documents_name_nothing_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() if listed.returncode == 0 else ["ppo_llm.py", "README.md"]
    for name in files:
        if not name.endswith((".safetensors", ".png", "test_source.py")):
            text = (ROOT / name).read_text(errors="replace")
            assert not re.search(r"/(?:work|root|home)/\w", text), name


def test_the_readme_states_the_size_of_the_file_and_begins_with_a_command():
    readme = (ROOT / "README.md").read_text()
    assert f"({len(SOURCE.splitlines())} lines)" in readme
    assert any("python ppo_llm.py" in line for line in readme.splitlines()[:15])
    assert 900 <= len(readme.split()) <= 1500
