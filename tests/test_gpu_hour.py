"""scripts/gpu_hour.py without a GPU: what it measures, how it goes on, and all of it with tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark_llm  # noqa: E402
import gpu_hour  # noqa: E402
from benchmark_peers import scheduled  # noqa: E402
from gpu_hour import Config  # noqa: E402

import ppo_llm  # noqa: E402

NAMES = [
    ("smoke", "greedy tokens"), ("smoke", "two steps"), ("demo", "float32"), ("demo", "bfloat16"),
    ("shape", "published settings"), ("step", "published step"),
    ("decode", "64 rows, bfloat16, plain"), ("decode", "64 rows, bfloat16, static"),
    ("decode", "64 rows, bfloat16, engine"), ("decode", "256 rows, bfloat16, plain"),
    ("decode", "256 rows, bfloat16, static"), ("decode", "256 rows, bfloat16, engine"),
    ("decode", "64 rows, float32, plain"), ("decode", "64 rows, float32, static"),
    ("decode", "64 rows, float32, engine"), ("memory", "0.5B"), ("memory", "0.5B, checkpointing"),
    ("memory", "1.5B"), ("memory", "1.5B, checkpointing"), ("memory", "7B, checkpointing, LoRA"),
]


def read(folder: Path, file: str) -> list[dict]:
    return gpu_hour.read_rows(folder / f"{file}.csv")


@pytest.fixture
def queue(monkeypatch):
    """Two measurements that count their calls, in place of the real ones."""
    calls = []

    def good(config: Config) -> list[dict]:
        calls.append("good")
        return [{"seconds": 1.5}]

    def bad(config: Config) -> list[dict]:
        calls.append("bad")
        raise RuntimeError("no luck")

    monkeypatch.setattr(gpu_hour, "measurements", lambda config: [("a", "good", good), ("b", "bad", bad)])
    monkeypatch.setattr(gpu_hour, "tidy", lambda device: None)
    return calls


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_measurement_exists_in_its_order(dry_run):
    found = gpu_hour.measurements(Config(dry_run=dry_run))
    assert [entry[:2] for entry in found] == NAMES
    assert all(callable(function) for _, _, function in found)
    documented = {line.split()[0] for line in gpu_hour.__doc__.splitlines() if ".csv  " in line}
    assert documented == {f"{file}.csv" for file, _ in NAMES}


def test_only_chooses_files_and_rows():
    chosen = gpu_hour.measurements(Config(only="decode 256"))
    assert [entry[:2] for entry in chosen] == NAMES[9:12]
    assert len(gpu_hour.measurements(Config(only="memory"))) == 5


def test_finished_rows_are_skipped_and_failed_ones_are_not(queue, tmp_path):
    config = Config(dry_run=True, results=tmp_path)
    assert gpu_hour.main(config) == 1
    assert gpu_hour.main(config) == 1
    assert queue == ["good", "bad", "bad"]
    assert [row["seconds"] for row in read(tmp_path, "a")] == ["1.5"]
    assert [row["note"] for row in read(tmp_path, "b")] == ["failed: RuntimeError('no luck')"]
    assert "| good | 1.5 |" in (tmp_path / "table.md").read_text()


def test_other_code_or_another_machine_measures_again(queue, tmp_path, monkeypatch):
    config = Config(dry_run=True, results=tmp_path, only="good")
    gpu_hour.main(config)
    described = gpu_hour.describe(config)
    for changed in ({"code": "0" * 16}, {"machine": "another card"}):
        monkeypatch.setattr(gpu_hour, "describe", lambda config, changed=changed: described | changed)
        gpu_hour.main(config)
        assert len(read(tmp_path, "a")) == 1
    assert queue.count("good") == 3


def test_what_does_not_fit_is_a_finished_row(tmp_path, monkeypatch):
    def large(config: Config) -> list[dict]:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu_hour, "measurements", lambda config: [("memory", "7B", large)])
    config = Config(dry_run=True, results=tmp_path)
    assert gpu_hour.main(config) == 0
    row = read(tmp_path, "memory")[0]
    assert row["note"] == "out of memory"
    assert gpu_hour.is_finished(row, "7B", gpu_hour.describe(config))


def test_no_row_begins_when_the_time_is_up(queue, tmp_path):
    assert gpu_hour.main(Config(dry_run=True, results=tmp_path, minutes=-1.0)) == 0
    assert queue == []


def test_a_check_that_does_not_pass_ends_with_exit_code_1(tmp_path, monkeypatch):
    entry = ("smoke", "greedy tokens", lambda config: [{"passed": False}])
    monkeypatch.setattr(gpu_hour, "measurements", lambda config: [entry])
    assert gpu_hour.main(Config(dry_run=True, results=tmp_path)) == 1


def test_without_cuda_it_says_what_can_be_done(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry_run"):
        gpu_hour.main(Config(results=tmp_path))


def test_samples_are_compared_up_to_their_first_difference():
    plain = [{"tokens": [1, 2, 3], "logprobs": [0.0, 0.0, 0.0]}, {"tokens": [4], "logprobs": [0.0]}]
    other = [{"tokens": [1, 2, 9], "logprobs": [0.0, -100.0, -5.0]}, {"tokens": [4], "logprobs": [0.0]}]
    assert gpu_hour.compare_tokens(other, plain) == {
        "same_responses": 1, "share_before_difference": 0.75, "mean_probability_gap": pytest.approx(1 / 3)}


def test_the_static_loop_samples_what_the_plain_one_samples():
    config = Config(dry_run=True)
    work = gpu_hour.gsm8k_work(config, 8)
    models = gpu_hour.build(gpu_hour.SHAPES["tiny"], work.c, torch.device("cpu"))
    with torch.no_grad():
        for weight in models.actor.model.parameters():
            weight.mul_(8)  # a policy that is far from uniform
    results = []
    static = gpu_hour.StaticLoop("eager")
    static.step = static.choose  # not compiled: that takes seconds
    for loop in (ppo_llm.decode, static.decode, static.decode):
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(ppo_llm, "decode", scheduled(work, loop))
            generator = torch.Generator().manual_seed(1)
            results.append(ppo_llm.generate(models.actor.model, work.prompts, {-1}, work.c, generator))
    (responses, logprobs), *others = results
    assert [len(response) for response in responses] == [work.schedule[tuple(p)] for p in work.prompts]
    for tokens, found in others:
        assert tokens == responses
        assert torch.allclose(torch.cat(found), torch.cat(logprobs), atol=1e-5)


def test_the_published_shape_is_the_benchmarks():
    shape = dict(zip(benchmark_llm.FIELDS, benchmark_llm.SHAPES["qwen"], strict=True))
    assert shape.items() <= gpu_hour.SHAPES["0.5B"].items()


@pytest.mark.slow
def test_everything_runs_with_tiny_shapes(tmp_path):
    config = Config(dry_run=True, results=tmp_path / "results", output=tmp_path / "output")
    assert gpu_hour.main(config) == 0
    found = set()
    for path in config.folder.glob("*.csv"):
        found |= {(path.stem, row["name"]) for row in read(config.folder, path.stem)}
    assert found == set(NAMES)
    assert all(row["passed"] == "True" for row in read(config.folder, "smoke"))
    assert [row["step"] for row in read(config.folder, "shape")] == ["1", "2"]
    assert [float(row["ratio_gap"]) for row in read(config.folder, "demo")] == [0, 0]
    for row in read(config.folder, "decode"):
        assert row["same_responses"] == row["responses"] and float(row["tokens_per_s"]) > 0
    assert all(float(row["update_gib"]) > 0 for row in read(config.folder, "memory"))
    samples = json.loads(next(config.output.glob("*.json")).read_text())
    assert all(len(sample["tokens"]) == len(sample["logprobs"]) for sample in samples)
