"""The hash of a script's code, without comments and docstrings: it says which code made a table.

    python scripts/table_hash.py ppo_llm.py                        # the hash of the file as it stands
    python scripts/table_hash.py ppo_llm.py --commit dc3ee96       # as it was in that commit
    python scripts/table_hash.py ppo_llm.py scripts/experiment.py --write docs/results/demo
    python scripts/table_hash.py ppo_llm.py --write docs/results/kl --commit dc3ee96 --why "SENTENCE"

--write puts the commit and the hashes into made_with.json in the folder of the results, or beside a
single table (NAME.made_with.json beside NAME.md). Without --commit it is the present commit, whose code
must be that of the files: commit first, then measure. tests/test_evidence.py compares the hashes with
the code that stands; where they differ, `why_it_stands` has to say in a sentence why the table is still
shown.
"""

import argparse
import ast
import functools
import hashlib
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = {tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>", tokenize.NEWLINE: "<newline>"}
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)


def docstring_lines(source: str) -> set[int]:
    """The numbers of the lines on which the docstrings of modules, classes and functions stand."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_tokens(source: str) -> list[str]:
    """The tokens in order; indentation and ends of statements by name, so that their width does not count.

    An f-string is one token, as in Python 3.11: later versions take it apart, and hashes would differ.
    """
    documented = docstring_lines(source)
    lines = source.splitlines(keepends=True)
    tokens = []
    open_strings = []  # where the f-strings begin that have not ended
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            open_strings.append(token.start)
        elif kind == "FSTRING_END":
            start = open_strings.pop()
            if not open_strings:
                tokens.append(text_between(lines, start, token.end))
        elif open_strings or token.type in SKIPPED:
            continue
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            tokens.append(NAMED[token.type])  # also where a docstring begins a block
        elif token.start[0] not in documented:
            tokens.append(NAMED.get(token.type, token.string))
    return tokens


def text_between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The source from (line, column) to (line, column); lines count from 1."""
    whole = "".join(lines[start[0] - 1 : end[0]])
    return whole[start[1] : len(whole) - len(lines[end[0] - 1]) + end[1]]


@functools.cache
def code_hash(source: str) -> str:
    """16 hexadecimal digits of the SHA-256 of the code tokens."""
    return hashlib.sha256("\n".join(code_tokens(source)).encode()).hexdigest()[:16]


def source_at(file: str, commit: str | None) -> str:
    """The text of a file as it stands (commit None), or as it was; CalledProcessError if it was not there."""
    if commit is None:
        return (ROOT / file).read_text()
    git = ["git", "show", f"{commit}:{file}"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def present_commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def evidence_path(results: Path) -> Path:
    """made_with.json of a folder of results, or NAME.made_with.json beside a single table."""
    if results.suffix:
        return results.with_suffix(".made_with.json")
    return results / "made_with.json"


def write_evidence(
    results: Path, files: list[str], commit: str | None = None, why: str | None = None
) -> Path:
    """Writes which code made the results. Raises SystemExit if the files have changed since the commit."""
    hashes = {file: code_hash(source_at(file, commit)) for file in files}
    if commit is None:
        commit = present_commit()
        changed = [file for file in files if code_hash(source_at(file, commit)) != hashes[file]]
        if changed:
            sys.exit(f"the code of {', '.join(changed)} is not that of commit {commit}: commit it first")
    evidence = {"commit": commit, "files": hashes}
    if why:
        evidence["why_it_stands"] = why
    path = evidence_path(results)
    path.write_text(json.dumps(evidence, indent=2) + "\n")
    return path


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("files", nargs="+", help="paths from the repository's root")
    parser.add_argument("--commit", help="the files as they were in this commit")
    parser.add_argument("--write", type=Path, help="folder of results, or a table, that the files made")
    parser.add_argument("--why", help="why the table stands although the code has changed: one sentence")
    arguments = parser.parse_args()
    for file in arguments.files:
        print(code_hash(source_at(file, arguments.commit)), file)
    if arguments.write:
        print(write_evidence(arguments.write, arguments.files, arguments.commit, arguments.why))


if __name__ == "__main__":
    main()
