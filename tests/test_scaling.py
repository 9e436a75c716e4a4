"""docs/scaling.md is what scripts/scaling.py makes of its formulas and of the counts that lie beside it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import memory  # noqa: E402
import scaling  # noqa: E402

COUNTS = json.loads(scaling.COUNTS.read_text())


def test_the_document_has_the_tables_of_the_script():
    document = scaling.DOCUMENT.read_text()
    for rows in (scaling.memory_table(), scaling.time_table(), scaling.count_table(COUNTS)):
        assert memory.markdown(rows) in document, "python scripts/scaling.py"


@pytest.mark.slow
def test_the_document_is_the_one_of_the_script():
    pytest.importorskip("deepspeed", reason="its estimators make a table")
    assert scaling.document(COUNTS) == scaling.DOCUMENT.read_text(), "python scripts/scaling.py"


def test_a_zero_2_step_holds_what_the_formula_says():
    shape = scaling.Shape(weights=1e9, kv_bytes=1000, layers=10, hidden=100, vocabulary=1000)
    parts = scaling.memory_parts(shape, stage=2, ranks=4)
    assert parts["states"] == 6e9 and parts["weights"] == 6e9
    assert parts["rollout"] - 12e9 == 64 * 1024 * 1000
    assert parts["update"] - 12e9 == pytest.approx(1e9 + 2e9 + 16384 * 100 * 80 + 1.5 * 2**30)
    assert scaling.memory_parts(shape, stage=3, ranks=4)["weights"] == 1.5e9 + 2e9


def test_zero_3_sends_half_the_gradient_and_gathers_more():
    shape = scaling.SHAPES["7B (Qwen2.5)"]
    two = scaling.seconds(shape, 8, 2)
    three = scaling.seconds(shape, 8, 3)
    per_link = 7 / 8 / scaling.NVLINK
    passes = scaling.PROMPTS * 500 / 8 / scaling.TOKENS  # of 4 mini-batches
    assert passes < 4
    gradient = 2 * 4 * 4 * shape.weights * per_link
    assert two["sent"] - three["sent"] == pytest.approx(gradient - 8 * shape.weights * per_link)
    assert two["update"] == three["update"] == pytest.approx(2 * 6 * shape.weights * 64000 / 400e12)


def test_the_counts_are_four_bytes_per_weight_of_gradient():
    for row in scaling.count_table(COUNTS)[1:]:
        stage, passes, steps, gradient, gathered, before = row
        assert int(passes) > int(steps) > 1
        assert gradient.startswith("4.0")
        if stage.startswith("0"):
            assert gathered == "0.00"
        else:
            assert gathered == ("2.00" if "bf16" in stage else "4.00")
        assert (before == "0.00") == (not stage.startswith("3"))


def test_the_largest_tensor_of_a_collective_counts():
    import torch

    whole = torch.zeros(10)
    assert scaling.largest_bytes([torch.zeros(3), whole, None, "sum"]) == 40
    assert scaling.largest_bytes([None]) == 0
    sent = {"reduce": 1, "reduce_scatter_tensor": 2, "all_gather": 4}
    assert scaling.sum_of(sent, "all_reduce", "reduce") == 3


@pytest.mark.slow
def test_two_ranks_count_what_the_table_says(tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    found = scaling.count(tmp_path, ["2 (fp32)"])
    assert found["weights"] == COUNTS["weights"]
    assert found["2 (fp32)"] == COUNTS["2 (fp32)"]
