"""The token inspector: one page that shows every sampled response of a run token by token.

    python scripts/inspect_run.py RUN                     # RUN/samples.jsonl -> RUN/inspector.html
    python scripts/inspect_run.py RUN --max_tokens 200000 # a larger page with more steps
    python scripts/inspect_run.py RUN --screenshot docs/inspector.png --view "row=1&color=advantage"

The page needs no server and no network: style, script and data are inside it, and its content security policy
forbids everything else. Text of the model is never interpreted as HTML. RUN is a folder that ppo_llm.py or
ppo_llm_multigpu.py has written.
"""

import base64
import codecs
import csv
import hashlib
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

TEMPLATE = Path(__file__).with_name("inspector.html")
COLUMNS = ["logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return", "ratio", "clipped"]
METRICS = ["eval/score", "eval/standard_error", "reward/score", "value/explained_variance"]
ABOUT = ["model", "dataset", "reward", "adv_estimator", "critic", "seed"]  # options that the page names
HEX_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how sentencepiece writes a byte that is in no piece
WORD_START = "\u2581"  # sentencepiece's mark for a space


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


@dataclass
class Config:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a run, with samples.jsonl
    max_tokens: int = 40_000  # tokens on the page, about 80 bytes each; beyond it steps are left out evenly
    screenshot: Path | None = None  # also draw the page into this PNG; needs playwright and Debian's chromium
    view: str = ""  # what the screenshot shows, as in the page's address: row=0&step=30&color=value&token=5


# ---- Tokens as text ----------------------------------------------------------------------------------------


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each of the 256 bytes, and the byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(256 + len(alphabet) - len(printable))] = byte
    return alphabet


ALPHABET = byte_alphabet()


def is_sentencepiece(tokens: list[str]) -> bool:
    """Whether raw tokens come from a sentencepiece vocabulary; else they are taken for byte-level BPE."""
    return any(token.startswith(WORD_START) or HEX_BYTE.fullmatch(token) for token in tokens)


def token_bytes(token: str, sentencepiece: bool) -> bytes | None:
    """The bytes that a raw token stands for; None for a special token, which stands for itself."""
    if sentencepiece:
        match = HEX_BYTE.fullmatch(token)
        if match:
            return bytes([int(match[1], 16)])
        return token.replace(WORD_START, " ").encode("utf-8", "surrogatepass")
    if token.startswith("<|") and token.endswith("|>"):
        return None
    if all(character in ALPHABET for character in token):
        return bytes(ALPHABET[character] for character in token)
    return None


def decode_tokens(tokens: list[str], sentencepiece: bool) -> list[str]:
    """Readable text of each raw token of a response.

    A character whose bytes are spread over several tokens is shown at the last of them; the others show their
    bytes, such as ⟨E4 BD⟩. Bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in tokens:
        data = token_bytes(token, sentencepiece)
        if data is None:
            texts.append(decoder.decode(b"", final=True) + token)
            decoder.reset()
            continue
        text = decoder.decode(data)
        if data and not text:
            text = f"⟨{data.hex(' ').upper()}⟩"
        texts.append(text)
    return texts


# ---- Reading a run -----------------------------------------------------------------------------------------


def read_samples(run_dir: Path) -> list[dict]:
    """The lines of samples.jsonl. A last line that a killed run left unfinished is left out.

    Raises UsageError if there is no sample, or if another line is damaged.
    """
    path = run_dir / "samples.jsonl"
    if not path.exists():
        raise UsageError(f"{path} does not exist: give the folder of a run of ppo_llm.py")
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines.pop():
        print("warning: the last line of samples.jsonl is not finished and left out", file=sys.stderr)
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(json.loads(line))
        except ValueError as error:
            raise UsageError(f"{path}, line {number} is damaged: {error}") from error
    if not samples:
        raise UsageError(f"{path} holds no sample yet")
    return samples


def read_metrics(run_dir: Path) -> dict[str, list]:
    """Metric -> [[step, number], ...] for the page's charts; an empty list where nothing was measured."""
    curves = {name: [] for name in METRICS}
    path = run_dir / "training_metrics.csv"
    if not path.exists():
        return curves
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name in METRICS:
                if row.get(name):
                    curves[name].append([int(float(row["step"])), tidy(float(row[name]))])
    return curves


def describe_run(run_dir: Path) -> dict:
    """What the head of the page says: the folder's name, the status, a few options; no path in full."""
    path = run_dir / "summary.json"
    summary = {}
    if path.exists():
        summary = json.loads(path.read_text(encoding="utf-8"))
    config = summary.get("config", {})
    about = {"name": run_dir.resolve().name, "status": summary.get("status")}
    for name in ABOUT:
        text = config.get(name)
        if isinstance(text, str):
            text = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
        about[name] = text
    return about


def tidy(x: float | bool | None) -> float | int | None:
    """Five significant digits; None for what JSON cannot hold."""
    if x is None or not math.isfinite(x):
        return None
    rounded = float(f"{x:.5g}")
    if rounded == int(rounded):
        return int(rounded)
    return rounded


def describe_sample(sample: dict, sentencepiece: bool) -> dict:
    """A line of samples.jsonl as the page has it: readable tokens, and the columns that were measured."""
    short = {name: sample.get(name) for name in ("step", "split", "prompt", "stop_reason")}
    short["score"] = tidy(sample.get("score"))
    short["text"] = decode_tokens(sample["token"], sentencepiece)
    for name in COLUMNS:
        numbers = sample.get(name)
        if numbers is not None:
            short[name] = [tidy(x) for x in numbers]
    return short


def thin_out(samples: list[dict], max_tokens: int) -> list[dict]:
    """Every step, or every 2nd, 4th, ... until max_tokens suffice. The first and the last always stay."""
    steps = sorted({sample["step"] for sample in samples})
    stride = 1
    while True:
        kept_steps = {*steps[::stride], *steps[-1:]}
        kept = [sample for sample in samples if sample["step"] in kept_steps]
        if stride >= len(steps) or sum(len(sample["token"]) for sample in kept) <= max_tokens:
            return kept
        stride *= 2


def choose_samples(samples: list[dict], max_tokens: int) -> list[dict]:
    """At most max_tokens tokens: evaluations take up to half of them, rollouts the rest."""
    evaluations = thin_out([sample for sample in samples if sample["split"] == "eval"], max_tokens // 2)
    left = max_tokens - sum(len(sample["token"]) for sample in evaluations)
    rollouts = thin_out([sample for sample in samples if sample["split"] != "eval"], left)
    return evaluations + rollouts


# ---- The page ----------------------------------------------------------------------------------------------


def fill_template(template: str, data: dict) -> str:
    """The page. The data holds no "<", so it cannot end its element; no script but the page's own may run."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before, after = template.replace("__SCRIPT_HASH__", f"sha256-{digest}").split("__DATA__")
    return before + text + after


def write_inspector(run_dir: Path, max_tokens: int = Config.max_tokens) -> Path:
    """Writes RUN/inspector.html and returns its path. Raises UsageError if the run has no samples."""
    samples = read_samples(run_dir)
    sentencepiece = any(is_sentencepiece(sample["token"]) for sample in samples)
    chosen = choose_samples(samples, max_tokens)
    data = {
        "run": describe_run(run_dir),
        "metrics": read_metrics(run_dir),
        "all_samples": len(samples),
        "samples": [describe_sample(sample, sentencepiece) for sample in chosen],
    }
    page = run_dir / "inspector.html"
    page.write_text(fill_template(TEMPLATE.read_text(encoding="utf-8"), data), encoding="utf-8")
    return page


def take_screenshot(page_file: Path, picture: Path, view: str) -> None:
    """The whole page as a PNG. Raises UsageError where playwright or Debian's chromium is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UsageError("--screenshot needs playwright: pip install playwright") from error
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UsageError("--screenshot needs chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.goto(f"{page_file.resolve().as_uri()}#{view}")
        page.screenshot(path=picture, full_page=True)
        browser.close()


def main(config: Config) -> None:
    page = write_inspector(config.run, config.max_tokens)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    if config.screenshot is not None:
        take_screenshot(page, config.screenshot, config.view)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, use_underscores=True))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
