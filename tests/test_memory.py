"""docs/memory.md has the tables of scripts/memory.py, and their parts are the sizes of real tensors."""

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_hour  # noqa: E402
import memory  # noqa: E402

import ppo_llm  # noqa: E402


@pytest.mark.parametrize("heading", memory.TABLES)
def test_the_document_has_the_tables_of_the_script(heading):
    document = memory.DOCUMENT.read_text()
    assert memory.put_tables(document) == document, "python scripts/memory.py --write"
    assert memory.markdown(memory.TABLES[heading]()) in document


@pytest.mark.parametrize("heading", memory.TABLES)
def test_the_csv_has_the_rows_of_the_table(heading):
    text = (memory.RESULTS / memory.FILES[heading]).read_text()
    assert list(csv.reader(io.StringIO(text))) == memory.TABLES[heading]()


def test_a_changed_table_is_put_in_its_place():
    document = memory.DOCUMENT.read_text()
    row = "| 0.5B | defaults | 18.9 | 38.5 | 48 GB |"
    assert row in document
    assert memory.put_tables(document.replace(row, row.replace("18.9", "20.0"))) == document
    with pytest.raises(ValueError, match="no table under 'The parts'"):
        memory.put_tables(document.partition("## The parts")[0])


@pytest.mark.parametrize("name", memory.SHAPES)
def test_weights_and_cache_are_those_of_the_model(name):
    shape = memory.SHAPES[name]
    settings = gpu_hour.SHAPES[name]
    model_config = transformers.AutoConfig.for_model("qwen2", **settings)
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(model_config)
    assert sum(weight.numel() for weight in lm.parameters()) == pytest.approx(shape.weights, rel=1e-4)
    head_size = settings["hidden_size"] // settings["num_attention_heads"]
    per_layer = 2 * 2 * settings["num_key_value_heads"] * head_size  # keys and values, two bytes each
    assert shape.kv_bytes == settings["num_hidden_layers"] * per_layer
    assert (shape.layers, shape.hidden) == (settings["num_hidden_layers"], settings["hidden_size"])
    linear = [module for name, module in lm.named_modules()
              if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")]
    adapter = sum(64 * (module.in_features + module.out_features) for module in linear)
    assert adapter == pytest.approx(shape.adapter_weights, rel=0.02)


def test_the_head_works_in_chunks_of_that_size():
    assert memory.HEAD_CHUNK == 4 * ppo_llm.LOGITS_PER_CHUNK


def test_a_case_takes_what_its_parts_take():
    gib = memory.GIB
    case = memory.Case("1.5B", "")
    assert memory.at_rest(case) / gib == pytest.approx(2 * 20.13 + 2.88, abs=0.02)
    more = (memory.update_bytes(case) - memory.at_rest(case)) / gib
    assert more == pytest.approx(8.63 + 43.18 + 1.5, rel=1e-3)
    assert memory.at_rest(replace(case, trained_models=1, has_reference=False)) == 14 * 1543.7e6
    few_rows = replace(case, rollout_slots=64)
    assert memory.rollout_bytes(case) - memory.at_rest(case) == 4 * (
        memory.rollout_bytes(few_rows) - memory.at_rest(few_rows))


@pytest.mark.parametrize("peak, card", [(5.4, "8 GB"), (5.5, "12 GB"), (72.4, "80 GB"), (72.6, "141 GB"),
                                        (140, "none")])
def test_two_gib_of_a_card_stay_free(peak, card):
    assert memory.smallest_card(peak * memory.GIB).startswith(card)
