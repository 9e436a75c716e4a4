"""The token inspector: what it reads, and what its page does in headless Chromium, driven by playwright."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from conftest import make_config

import ppo_llm

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import inspect_run  # noqa: E402

HOSTILE = (
    "</script><img src=x onerror=\"document.title='broken'\">\u202egnp.exe\u0007\x1b[31m\u200b__DATA__ & <!--"
)
PROMPT = "How many balls does Amy hold?"


def make_sample(step: int, split: str, prompt: str, tokens: list[str], score: float, **columns) -> dict:
    """A line of samples.jsonl; a column is a list of numbers, or None where it was not measured."""
    names = "logprob ref_logprob kl reward value advantage return ratio clipped".split()
    sample = {
        "step": step,
        "split": split,
        "prompt": prompt,
        "response": "".join(tokens),
        "score": score,
        "stop_reason": "stop",
        "truncated": False,
        "token": tokens,
        **dict.fromkeys(names),
    }
    return sample | columns


def make_rollout(
    step: int, prompt: str, tokens: list[str], score: float, clipped: int = 0, critic: bool = True
) -> dict:
    """A training sample with every column, or without values: the advantage of token t is t - 1."""
    count = len(tokens)
    columns = {
        "logprob": [-0.5] * count,
        "ref_logprob": [-0.25] * count,
        "kl": [-0.25] * count,
        "reward": [0.0] * (count - 1) + [score],
        "advantage": [t - 1.0 for t in range(count)],
        "return": [score] * count,
        "ratio": [1.0] * count,
        "clipped": [0.0] * (count - 1) + [float(clipped)],
    }
    if critic:
        columns["value"] = [0.125 + step / 100] * count
    return make_sample(step, "train", prompt, tokens, score, **columns)


def write_run(folder: Path, samples: list[dict], critic: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    variance = "0.5" if critic else ""
    rows = ["step,eval/score,eval/standard_error,reward/score,value/explained_variance", "0,0.25,0.125,,"]
    rows += [f"{step},,,0.5,{variance}" for step in (1, 2)] + [f"3,0.75,0.0625,0.5,{variance}"]
    (folder / "training_metrics.csv").write_text("\n".join(rows) + "\n")
    config = {"model": "/data/someone/models/tiny", "dataset": "demo", "reward": "gsm8k", "seed": 1}
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "config": config}))
    return folder


def write_demo(folder: Path, critic: bool = True) -> Path:
    """Two evaluations of one prompt, three steps of two rollouts, one hostile; two have a clipped token."""
    samples = [make_sample(0, "eval", PROMPT, ["Ġhold", "Ċ", "<|im_end|>"], 0.0, logprob=[-3.0, -2.0, -1.0])]
    for step in (1, 2, 3):
        samples.append(make_rollout(step, "easy", ["Ġ3", "4", "<|im_end|>"], step % 2, step == 2, critic))
        samples.append(make_rollout(step, HOSTILE, ["ä½", "ł", HOSTILE, "Ġend"], 0.5, step == 3, critic))
    samples.append(make_sample(3, "eval", PROMPT, ["Ġkeep", "<|im_end|>"], 1.0, logprob=[-0.5, -0.25]))
    return write_run(folder, samples, critic)


def page_data(page: Path) -> dict:
    """The data of a page, read back without a browser."""
    text = page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(text)


# ---- Tokens as text ----------------------------------------------------------------------------------------


def test_the_byte_alphabet_is_the_one_of_the_tokenizers_library():
    assert set(inspect_run.ALPHABET) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(inspect_run.ALPHABET.values()) == list(range(256))


@pytest.mark.parametrize("text", [" hold", "\n\ttab", "naïve – 你好 🙂", "\x00\x7f\xad"])
def test_byte_level_tokens_are_read_as_the_tokenizers_library_writes_them(text):
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        text
    )
    whole = pieces[0][0]
    assert inspect_run.decode_tokens([whole], False) == [text]
    letters = inspect_run.decode_tokens(list(whole), False)  # one token for each byte
    assert "".join(piece for piece in letters if not piece.startswith("⟨")) == text


def test_a_character_in_several_tokens_is_shown_at_the_last_of_them():
    assert inspect_run.decode_tokens(["ä½", "ł", "Ġhold"], False) == ["⟨E4 BD⟩", "你", " hold"]


def test_bytes_that_are_no_text_are_replaced_and_a_special_token_stands_for_itself():
    assert inspect_run.decode_tokens(["ä½", "<|im_end|>", "A"], False) == ["⟨E4 BD⟩", "\ufffd<|im_end|>", "A"]


def test_sentencepiece_tokens_are_recognised_and_read():
    tokens = ["▁hold", "ing", "<0xE4>", "<0xBD>", "<0xA0>", "</s>"]
    assert inspect_run.is_sentencepiece(tokens)
    expected = [" hold", "ing", "⟨E4⟩", "⟨BD⟩", "你", "</s>"]
    assert inspect_run.decode_tokens(tokens, True) == expected
    assert not inspect_run.is_sentencepiece(["Ġhold", "<｜begin▁of▁sentence｜>"])


# ---- Reading a run -----------------------------------------------------------------------------------------


def test_the_page_has_every_measured_number_and_nothing_for_the_others(tmp_path):
    data = page_data(inspect_run.write_inspector(write_demo(tmp_path / "run")))
    assert len(data["samples"]) == data["all_samples"] == 8
    evaluation = data["samples"][0]
    assert evaluation["text"] == [" hold", "\n", "<|im_end|>"]
    assert evaluation["logprob"] == [-3, -2, -1]
    assert "value" not in evaluation
    rollout = data["samples"][2]
    assert rollout["advantage"] == [-1, 0, 1]
    assert rollout["clipped"] == [0, 0, 0]
    assert data["metrics"]["eval/score"] == [[0, 0.25], [3, 0.75]]


def test_model_text_cannot_leave_the_data_and_no_path_is_shown(tmp_path):
    page = inspect_run.write_inspector(write_demo(tmp_path / "run"))
    assert HOSTILE in page_data(page)["samples"][3]["text"]
    text = page.read_text()
    assert text.count("<script") == 2
    assert "<img" not in text
    assert "someone" not in text


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    sample = make_sample(1, "train", "p", ["a", "b", "c"], 1.0, kl=[math.nan, math.inf, 0.123456789])
    data = page_data(inspect_run.write_inspector(write_run(tmp_path, [sample])))
    assert data["samples"][0]["kl"] == [None, None, 0.12346]


def test_a_last_line_that_is_not_finished_is_left_out_and_said(tmp_path, capsys):
    run = write_demo(tmp_path / "run")
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "spl')
    assert len(inspect_run.read_samples(run)) == 8
    assert "last line" in capsys.readouterr().err


def test_a_damaged_line_is_named(tmp_path):
    run = write_demo(tmp_path / "run")
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2][:40] + "\n"
    (run / "samples.jsonl").write_text("".join(lines))
    with pytest.raises(inspect_run.UsageError, match="line 3"):
        inspect_run.read_samples(run)


@pytest.mark.parametrize("max_tokens", [1, 30, 90, 200])
def test_steps_are_left_out_evenly_and_the_first_and_the_last_stay(max_tokens):
    samples = [make_rollout(step, "p", ["a", "b", "c"], 1.0) for step in range(1, 31)]
    kept = [sample["step"] for sample in inspect_run.thin_out(samples, max_tokens)]
    assert kept[0] == 1
    assert kept[-1] == 30
    assert 3 * len(kept) <= max(max_tokens, 6)
    assert len(set(kept[i + 1] - kept[i] for i in range(len(kept) - 2))) <= 1
    assert (len(kept) == 30) == (max_tokens >= 90)


@pytest.mark.slow
def test_what_ppo_llm_writes_can_be_inspected(folder, tmp_path, no_figures):
    evaluation = f"{folder}/prompts.jsonl"
    config = make_config(
        folder, output_dir=str(tmp_path / "run"), total_steps=1, eval_dataset=evaluation, eval_every=1
    )
    ppo_llm.main(config)
    data = page_data(inspect_run.write_inspector(tmp_path / "run"))
    rollout = next(sample for sample in data["samples"] if sample["split"] == "train")
    assert {"text", *inspect_run.COLUMNS} <= set(rollout)
    assert {sample["step"] for sample in data["samples"] if sample["split"] == "eval"} == {0, 1}
    assert data["run"]["seed"] == 1


def test_a_run_without_samples_is_refused_with_a_sentence(tmp_path):
    command = [sys.executable, str(SCRIPTS / "inspect_run.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


# ---- The page, in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the inspector's page is not tested: there is no chromium (apt-get install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="the inspector's page is not tested: there is no playwright (pip install playwright)",
    )
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of a run; there must be no error, and no request but for the file itself."""
    faults = []
    pages = []
    addresses = []

    def open_run(run: Path, address: str = "", **limit):
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(f"{inspect_run.write_inspector(run, **limit).as_uri()}#{address}")
        pages.append(page)
        return page

    yield open_run
    for page in pages:
        page.close()
    assert faults == []
    assert all("inspector.html" in address for address in addresses)


def response_of(page) -> str:
    return page.locator(".response").last.text_content()


def test_the_page_opens_with_the_last_evaluation_beside_the_first(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"))
    assert page.locator(".panel h2").all_text_contents() == ["Before training", "Step 3"]
    assert page.locator(".response").all_text_contents() == [" hold↵\n<|im_end|>", " keep<|im_end|>"]
    assert page.locator("#prompt").text_content() == PROMPT
    assert "0.250 ± 0.125  →  0.750 ± 0.063" in page.locator("#headline").text_content()
    about = page.locator("#about").text_content().split("  ·  ")
    assert about == ["run", "model tiny", "data demo", "reward gsm8k", "seed 1", "finished"]


def test_pointing_at_a_token_shows_all_its_numbers(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=1&step=1")
    assert not page.locator("#hover").is_visible()
    page.locator(".token").nth(2).hover()
    card = page.locator("#hover")
    assert card.is_visible()
    numbers = dict(pair.locator("span").all_text_contents() for pair in card.locator("#numbers > div").all())
    assert numbers == {
        "token": "3 of 3",
        "log-prob": "−0.5 (p 0.6065)",
        "reference log-prob": "−0.25",
        "KL": "−0.25",
        "reward": "1",
        "value": "0.135",
        "advantage": "1",
        "return": "1",
        "ratio": "1",
        "clipped": "no",
    }
    page.locator("#prompt").hover()
    assert not card.is_visible()


def test_what_was_not_measured_is_said_and_cannot_be_chosen(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=0")
    page.locator(".token").last.hover()
    assert page.locator("#numbers .missing").count() == 8
    assert page.locator("#quantities button:enabled").all_text_contents() == ["log-prob"]


def test_the_colour_follows_the_chosen_quantity(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=1&step=1")

    def backgrounds() -> list[str]:
        return [token.evaluate("token => token.style.background") for token in page.locator(".token").all()]

    low, middle, high = backgrounds()
    assert "--down" in low
    assert "/ 0)" in middle or "/ 0.000)" in middle
    assert "--up" in high
    page.get_by_role("button", name="reward").click()
    assert backgrounds() != [low, middle, high]
    assert page.locator("#quantities [aria-pressed=true]").text_content() == "reward"
    assert page.locator("#meaning").text_content().startswith("Reward")


def test_the_slider_and_the_arrow_keys_go_through_the_steps(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=1&step=1")
    assert page.locator("#stepname").text_content() == "step 1 of 3"
    page.locator("#slider").fill("2")
    assert page.locator("#stepname").text_content() == "step 2 of 3"
    assert page.locator(".panel h2").all_text_contents() == ["Step 2"]
    assert page.locator(".panel .score").text_content() == "score 0"
    page.keyboard.press("ArrowRight")
    assert page.locator("#stepname").text_content() == "step 3 of 3"
    page.keyboard.press("ArrowRight")
    assert page.locator("#stepname").text_content() == "step 3 of 3"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#stepname").text_content() == "step 1 of 3"
    page.keyboard.press("ArrowDown")
    assert response_of(page).startswith("⟨E4 BD⟩你")
    page.keyboard.press("ArrowUp")
    assert response_of(page) == " 34<|im_end|>"


def test_the_slider_of_an_evaluation_prompt_stops_where_there_is_an_evaluation(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=0&step=0")
    page.keyboard.press("ArrowRight")
    assert page.locator("#stepname").text_content() == "step 3 of 3"
    page.locator("#slider").fill("1")
    assert page.locator("#stepname").text_content() == "step 0 of 3"


def test_filters_by_score_and_by_clipped_leave_what_fits(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=1&step=1")
    assert page.locator("#count").text_content() == "8 of 8 samples"
    page.locator("#low").fill("0.5")
    assert page.locator("#count").text_content() == "6 of 8 samples"
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.locator("#low").evaluate("input => input.blur()")
    page.keyboard.press("ArrowRight")  # from step 1 to 3: the score of step 2 is 0
    assert page.locator("#stepname").text_content() == "step 3 of 3"
    page.locator("#low").fill("")
    page.locator("#onlyclipped").check()
    assert page.locator("#count").text_content() == "2 of 8 samples"
    assert page.locator(".token.clipped").count() == 1
    page.locator("#high").fill("-1")
    assert page.locator("#count").text_content() == "no sample passes the filters"


def test_hostile_text_is_shown_and_never_interpreted(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=2&step=1")
    assert page.title() == "Token inspector: run"
    assert page.locator("img").count() == 0
    shown = page.locator(".token").nth(2).text_content()
    assert shown == (
        "</script><img src=x onerror=\"document.title='broken'\">U+202Egnp.exe␇␛[31mU+200B__DATA__ & <!--"
    )
    assert page.locator("#prompt").text_content() == shown
    page.locator(".token").nth(2).hover()
    assert page.locator("#hover img").count() == 0


def test_the_critic_is_set_against_the_scores(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"), "row=1&step=1")
    titles = page.locator("#calibration circle title").all_text_contents()
    # V is 0.135 at step 1 (scores 1 and 0.5), 0.145 at 2 (0 and 0.5), 0.155 at 3 (1 and 0.5); 7 tokens each
    assert titles == [
        "V 0.135: final score 0.75 ± 0.25, 7 tokens",
        "V 0.145: final score 0.25 ± 0.25, 7 tokens",
        "V 0.155: final score 0.75 ± 0.25, 7 tokens",
    ]
    page.locator("#part").select_option("first third of the response")
    first = page.locator("#calibration circle title").first.text_content()
    assert first == "V 0.135: final score 0.75 ± 0.25, 2 tokens"
    assert page.locator("#variance circle").count() == 3


def test_a_run_without_critic_says_so_and_shows_its_advantages(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run", critic=False), "row=1&step=1")
    assert "no critic" in page.locator("#calibration").text_content()
    assert "no critic" in page.locator("#variance").text_content()
    assert page.get_by_role("button", name="value").is_disabled()
    assert page.locator(".panel .plot text.label").all_text_contents() == ["advantage"]
    page.locator(".token").first.hover()
    assert page.locator("#numbers .missing span").first.text_content() == "value"


def test_two_samples_of_one_prompt_stand_side_by_side(open_page, tmp_path):
    samples = [
        make_rollout(1, "same", ["a"], 0.0, critic=False),
        make_rollout(1, "same", ["b"], 1.0, critic=False),
    ]
    page = open_page(write_run(tmp_path / "run", samples, critic=False))
    assert page.locator(".panel h2").all_text_contents() == ["Step 1", "Same prompt, another sample"]
    assert page.locator(".panel .score").all_text_contents() == ["score 0", "score 1"]


def test_light_and_dark_follow_the_system_and_the_key(open_page, tmp_path):
    page = open_page(write_demo(tmp_path / "run"))
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.emulate_media(color_scheme="dark")
    page.goto(page.url.split("#")[0] + "?again")
    assert page.evaluate("document.documentElement.className") == "dark"


def test_pointing_at_the_chart_points_at_the_token_above_it(open_page, tmp_path):
    page = open_page(write_run(tmp_path / "run", [make_rollout(1, "long", ["Ġword", "Ċ"] * 200, 1.0)]))
    plot = page.locator(".plot svg").first
    wide = (plot.bounding_box()["width"] - 46 - 8) / 400  # axis labels on the left, a margin on the right
    plot.hover(position={"x": 46 + 380.5 * wide, "y": 150})
    token = page.locator(".token.near")
    assert token.count() == 1
    assert page.locator("#numbers div").first.text_content() == "token381 of 400"
    box = token.bounding_box()
    response = page.locator(".response").bounding_box()
    assert response["y"] <= box["y"] <= response["y"] + response["height"]


@pytest.mark.parametrize("width", [380, 1280, 2400])
def test_a_long_response_fits_into_every_width(open_page, tmp_path, width):
    samples = [make_rollout(step, "long", ["Ġword", "x" * 90, "Ċ"] * 200, step / 2) for step in (1, 2)]
    page = open_page(write_run(tmp_path / "run", samples))
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_page_of_150_000_tokens_draws_its_calibration(open_page, tmp_path):
    samples = [make_rollout(step, "long", ["Ġword"] * 1000, step / 150) for step in range(1, 151)]
    run = write_run(tmp_path / "run", samples)
    page = open_page(run, max_tokens=200_000)
    assert page.locator("#calibration svg circle").count() > 0
