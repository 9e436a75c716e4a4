"""Code tokens of the three scripts, by section or by function: python scripts/sizes.py [FILE ...] [--functions].

A code token is one of Python's tokenizer, without comments, docstrings, newlines and indents. Python 3.11 counts an
f-string as one token, later versions count its parts; the bounds in tests/test_source.py are those of 3.11.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_tokens(source: str) -> list[tuple[int, int]]:
    """First and last line of each token."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED and token.start[0] not in documented:
            found.append((token.start[0], token.end[0]))
    return found


def parts(source: str, by_function: bool) -> list[tuple[str, int, int]]:
    """Name, first line and line behind the last, of the sections or of the functions and classes."""
    lines = source.splitlines()
    if by_function:
        nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        return [(node.name, node.lineno, node.end_lineno + 1) for node in nodes]
    starts = [1] + [number for number, line in enumerate(lines, 1) if line.startswith("# ---- ")]
    ends = starts[1:] + [len(lines) + 1]
    names = ["docstring, imports"] + [lines[start - 1].strip("# -") for start in starts[1:]]
    return list(zip(names, starts, ends, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--functions", action="store_true")
    options = parser.parse_args()
    names = ("ppo_llm.py", "ppo_llm_multigpu.py", "ppo_classic.py")
    for path in options.files or [ROOT / name for name in names]:
        source = path.read_text()
        tokens = code_tokens(source)
        lines = {line for first, last in tokens for line in range(first, last + 1)}
        print(f"{path.name}: {len(tokens)} code tokens, {len(tokens) / len(lines):.1f} per code line")
        for name, start, end in parts(source, options.functions):
            count = sum(start <= first < end for first, _ in tokens)
            print(f"    {count:6} {name}")


if __name__ == "__main__":
    main()
