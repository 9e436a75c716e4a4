"""Every folder of results names the code that made it, and says why it stands where that code has changed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "scripts"))

import table_hash  # noqa: E402

TABLES = [*sorted(path for path in RESULTS.glob("*") if path.is_dir()), *sorted(RESULTS.glob("*.md"))]
each_table = pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
SOURCE = '''"""What it does."""

import math


def area(radius: float) -> float:
    """Of a circle."""
    if radius < 0:
        radius = 0
    return f"{math.pi * radius**2:.{2}f}"  # rounded
'''


def outdated(evidence: dict) -> list[str]:
    """The files whose code is not the one that made the table, or that are gone."""
    found = []
    for file, expected in evidence["files"].items():
        path = ROOT / file
        if not path.is_file() or table_hash.code_hash(path.read_text()) != expected:
            found.append(file)
    return found


def problem(evidence: dict) -> str | None:
    """What is wrong with the evidence of a table, or None."""
    if not evidence.get("files") or not evidence.get("commit"):
        return "it names no files or no commit"
    if not all(re.fullmatch(r"[0-9a-f]{16}", found) for found in evidence["files"].values()):
        return "a hash has not 16 hexadecimal digits"
    changed = outdated(evidence)
    if changed and not evidence.get("why_it_stands", "").strip():
        return f"{', '.join(changed)} has changed since: make the table again, or say why it stands"
    return None


def test_there_are_tables():
    assert len(TABLES) >= 9


@each_table
def test_a_table_is_of_the_present_code_or_says_why_it_stands(table):
    path = table_hash.evidence_path(table)
    command = f"python scripts/table_hash.py FILES --write docs/results/{table.name}"
    assert path.is_file(), f"{path.relative_to(ROOT)} is missing: {command}"
    assert problem(json.loads(path.read_text())) is None


@each_table
def test_the_hashes_are_those_of_the_commit_that_is_named(table):
    evidence = json.loads(table_hash.evidence_path(table).read_text())
    git = ["git", "cat-file", "-e", f"{evidence['commit']}^{{commit}}"]
    try:
        known = subprocess.run(git, cwd=ROOT, capture_output=True).returncode == 0
    except FileNotFoundError:
        known = False
    if not known:
        pytest.skip("the history is not here")
    for file, expected in evidence["files"].items():
        assert table_hash.code_hash(table_hash.source_at(file, evidence["commit"])) == expected, file


def test_every_evidence_belongs_to_a_table():
    files = {*RESULTS.glob("*.made_with.json"), *RESULTS.glob("*/made_with.json")}
    assert files == {table_hash.evidence_path(table) for table in TABLES}


@pytest.mark.parametrize("old, new", [
    ("  # rounded", ""),
    ('"""Of a circle."""', '"""Of a disc,\n\n    in square metres."""'),
    ('"""What it does."""\n', ""),
    ('    """Of a circle."""\n', ""),
    ("        radius = 0", "          radius = 0"),
    ("import math\n\n\n", "import math\n"),
    ("if radius < 0:", "if radius < 0:  # impossible\n"),
])
def test_comments_docstrings_and_layout_do_not_change_the_hash(old, new):
    assert SOURCE.count(old) == 1
    assert table_hash.code_hash(SOURCE.replace(old, new)) == table_hash.code_hash(SOURCE)


@pytest.mark.parametrize("old, new", [
    ("radius < 0", "radius <= 0"), ("radius**2", "radius ** 3"), (".{2}f", ".{3}f"),
    ("math.pi *", "math.pi +"),
    ("    return", "        return"), ("radius = 0", "radius = 0.0"),
])
def test_changed_code_changes_the_hash(old, new):
    assert SOURCE.count(old) == 1
    assert table_hash.code_hash(SOURCE.replace(old, new)) != table_hash.code_hash(SOURCE)


def test_an_f_string_is_one_token_in_every_python():
    tokens = table_hash.code_tokens(SOURCE)
    assert 'f"{math.pi * radius**2:.{2}f}"' in tokens
    assert tokens.count("<indent>") == tokens.count("<dedent>") == 2


def test_a_changed_file_needs_a_sentence():
    evidence = {"commit": "abc", "files": {"ppo_llm.py": "0" * 16}}
    assert "ppo_llm.py has changed" in problem(evidence)
    assert "ppo_llm.py has changed" in problem(evidence | {"why_it_stands": " "})
    assert problem(evidence | {"why_it_stands": "the formulas are the same"}) is None
    assert "16 hexadecimal digits" in problem({"commit": "abc", "files": {"ppo_llm.py": "0"}})
    assert "no commit" in problem({"files": {"ppo_llm.py": "0" * 16}})
    assert "gone.py has changed" in problem({"commit": "abc", "files": {"gone.py": "0" * 16}})


def test_code_that_is_not_committed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(table_hash, "present_commit", lambda: "abc")
    monkeypatch.setattr(table_hash, "source_at", lambda file, commit: f"x = {1 if commit else 2}")
    with pytest.raises(SystemExit, match="commit it first"):
        table_hash.write_evidence(tmp_path, ["ppo_llm.py"])


def test_the_evidence_that_is_written_passes(tmp_path):
    path = table_hash.write_evidence(tmp_path / "table.md", ["ppo_llm.py"], "HEAD", "a reason")
    assert path.name == "table.made_with.json"
    evidence = json.loads(path.read_text())
    assert evidence["commit"] == "HEAD" and evidence["why_it_stands"] == "a reason"
    assert problem(evidence) is None
