"""scripts/benchmark_llm.py on a tiny model: every row is there, and everyone has made the same tokens."""

import csv
import dataclasses
import json
import re
import statistics
import sys

import conftest
import pytest
import torch
import transformers

sys.path.insert(0, str(conftest.Path(__file__).resolve().parents[1] / "scripts"))

import benchmark_llm
import benchmark_peers

import ppo_llm

pytestmark = pytest.mark.slow  # they time whole steps
ROWS = {
    "rollout": {"ppo_llm.py", "dc3ee96, with its engine", "generate, dynamic cache", "generate, static cache",
                "generate_batch"},
    "scoring": {"ppo_llm.py", "dc3ee96, with its engine"},
    "update actor": {"ppo_llm.py", "dc3ee96, with its engine", "padded PyTorch"},
    "update critic": {"ppo_llm.py", "dc3ee96, with its engine", "padded PyTorch"},
    "update": {"ppo_llm.py", "dc3ee96, with its engine", "padded PyTorch"},
    "step": {"ppo_llm.py", "dc3ee96, with its engine"},
    "step without gc": {"ppo_llm.py", "dc3ee96, with its engine"},
}


def read(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "trl", None)  # as where it is not installed
        benchmark_llm.main(benchmark_llm.Config(quick=True, device="cpu", threads=1, repeats=3, results=folder))
    return folder


def test_every_contestant_has_its_rows(results):
    rows = read(results / "quick_ragged_cpu.csv")
    timed = {phase: {row["who"] for row in rows if row["phase"] == phase and row["seconds"]} for phase in ROWS}
    assert timed == ROWS
    assert [row["note"].split(" (")[0] for row in rows if not row["seconds"]] == ["not installed"]


def test_everyone_makes_the_scheduled_tokens(results):
    work = benchmark_llm.make_work("quick", "ragged", torch.device("cpu"), benchmark_llm.QUICK)
    lengths = sorted(work.schedule.values())
    assert (lengths[0], lengths[-1]) == (2, 8)
    assert {row["tokens"] for row in read(results / "quick_ragged_cpu.csv")} - {""} == {str(sum(lengths))}
    note = json.loads((results / "quick_ragged_cpu.json").read_text())
    assert note["everyone_made_as_many"] and note["response_tokens"] == sum(lengths)


def test_ratios_are_of_the_same_turns(results):
    for row in read(results / "quick_ragged_cpu.csv"):
        seconds, times = ([float(row[name] or 1) for name in names.split()] for names in (
            "least seconds most", "times_least times_ours times_most"))
        assert seconds == sorted(seconds) and times == sorted(times) and seconds[0] > 0
        assert row["who"] != "ppo_llm.py" or times == [1, 1, 1]


def test_the_table_has_all_rows(results):
    table = (results / "table.md").read_text()
    rows = read(results / "quick_ragged_cpu.csv")
    assert len(re.findall(r"^\| (?!-|phase)", table, re.MULTILINE)) == len(rows)
    assert "## quick_ragged_cpu" in table and torch.__version__ in table


@pytest.mark.parametrize("size, least, most", [("demo", 0.9e6, 1.1e6), ("large", 9e6, 11e6),
                                                ("qwen", 494_032_768, 494_032_768)])
def test_sizes_are_those_they_are_called(size, least, most):
    work = benchmark_llm.make_work(size, "ragged", torch.device("meta"), benchmark_llm.STEPS[size])
    model = work.make(transformers.AutoModelForCausalLM)
    assert least <= sum(weight.numel() for weight in model.parameters()) <= most
    prompts, responses = list(map(len, work.prompts)), list(work.schedule.values())
    if size == "qwen":
        assert [statistics.mean(prompts), statistics.mean(responses), max(responses)] == [
            pytest.approx(104, abs=0.5), pytest.approx(278, abs=0.5), 512]
    else:
        assert [min(prompts), max(prompts), min(responses), max(responses)] == [13, 64, 10, 48]


def test_each_response_ends_at_its_scheduled_length():
    quick = dataclasses.replace(benchmark_llm.QUICK, rollout_slots=3)  # three batches
    work = benchmark_llm.make_work("quick", "ragged", torch.device("cpu"), quick)
    benchmark_peers.ours(work)(benchmark_peers.Laps(work.device))
    assert [len(response) for response in work.rollout.responses] == [work.schedule[tuple(p)] for p in work.prompts]


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_padded_losses_are_those_of_ppo_llm(role):
    work, c = benchmark_llm.make_work("quick", "ragged", torch.device("cpu"), benchmark_llm.QUICK), benchmark_llm.QUICK
    benchmark_peers.ours(work)(benchmark_peers.Laps(work.device))
    lm, part = work.models.actor.model.lm, work.rollout.take(list(range(c.ppo_mini_batch_size)))
    modules = {"actor": lm, "critic": (work.models.critic.model.lm, work.models.critic.model.value_head)}
    expected, _ = ppo_llm.ppo_loss(role, work.models, part, c.kl_coef, c)
    losses = benchmark_peers.padded_losses(role, modules, part, c)
    assert (losses * part.mask).sum().item() == pytest.approx((expected * part.mask).sum().item(), rel=1e-4)


def test_growth_writes_its_table(tmp_path):
    settings = {"quick": True, "growth": True, "device": "cpu", "threads": 1, "repeats": 1, "results": tmp_path}
    benchmark_llm.main(benchmark_llm.Config(**settings))
    rows = read(tmp_path / "growth.csv")
    assert [row["grows"] for row in rows] == list(benchmark_llm.GROWTH)
    assert all(float(row["step"]) > 0 and int(row["tokens"]) > 0 for row in rows)
