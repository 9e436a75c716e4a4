"""Reward models in ppo_llm.py: any tokenizer, whole conversations, the score head as the critic's."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SHAPE, make_config, make_lm, make_models, make_tokenizer, read_log, save_folder

import ppo_llm
from ppo_llm import Config, Example, UsageError, forward

ROOT = Path(__file__).resolve().parents[1]


def save_reward_model(folder, tokenizer=None, kind="qwen2", labels=1, **changes):
    """A random sequence-classification model in an ordinary folder."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | {"num_labels": labels} | changes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return model


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Another vocabulary and another template: the same text has other ids."""
    tokenizer = make_tokenizer()
    vocabulary = {token: (i * 7 + 3) % 61 + 3 if i > 2 else i for token, i in tokenizer.get_vocab().items()}
    import tokenizers
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<|endoftext|>", "<bot>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>",
                                                pad_token="<pad>")
    turn = "{{ m['role'][0] }}{{ m['content'] }}<|endoftext|>"
    fast.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    return fast


def score(reward, talks: list[tuple[list[dict], str]]) -> tuple[torch.Tensor, dict]:
    examples = [Example("text", "", [1], messages) for messages, _ in talks]
    return ppo_llm.score_responses(reward, examples, [response for _, response in talks])


TALKS = [([{"role": "user", "content": "abc"}], "def"), ([{"role": "user", "content": "x"}], ""),
         ([{"role": "system", "content": "S"}, {"role": "user", "content": "abcdefgh"}], "ijklmnopq")]


@pytest.mark.parametrize("end", ["<|endoftext|>", "<pad>", "<bot>", ""])
@pytest.mark.parametrize("make", [make_tokenizer, word_tokenizer])
def test_scores_are_those_of_the_model_on_its_own_tokens_one_by_one(tmp_path, make, end, capsys):
    tokenizer = make()
    tokenizer.chat_template = word_tokenizer().chat_template.replace("<|endoftext|>", end)
    model = save_reward_model(tmp_path, tokenizer)
    scores, metrics = score(ppo_llm.load_reward(Config(reward=str(tmp_path), device="cpu")), TALKS)
    for (messages, response), found in zip(TALKS, scores, strict=True):
        text = "".join(f"{m['role'][0]}{m['content']}{end}" for m in messages) + f"a{response}{end}"
        ids = tokenizer(text).input_ids
        model.config.pad_token_id = None
        with torch.no_grad():
            assert found.item() == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    assert metrics["truncated"].item() == 0
    said = capsys.readouterr().out
    assert f"reward model: {tmp_path}, 256 tokens (longer conversations lose their beginning)\n" in said


def test_two_tokenizers_give_the_same_text_other_ids_so_raw_ids_would_be_seen(tmp_path):
    save_reward_model(tmp_path / "a", word_tokenizer())
    other = make_tokenizer()
    other.chat_template = word_tokenizer().chat_template
    save_reward_model(tmp_path / "b", other)
    first, second = (score(ppo_llm.load_reward(Config(reward=str(tmp_path / x), device="cpu")),
                           TALKS)[0] for x in "ab")
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("budget", [1, 20, 16384])
def test_scores_do_not_depend_on_batches(tmp_path, budget):
    save_reward_model(tmp_path)
    talks = [([{"role": "user", "content": "a" * (i % 7 + 1)}], "b" * (i % 5)) for i in range(17)]
    reward = ppo_llm.load_reward(Config(reward=str(tmp_path), device="cpu"))
    alone = [score(reward, [talk])[0].item() for talk in talks]
    reward = ppo_llm.load_reward(Config(reward=str(tmp_path), device="cpu", micro_batch_tokens=budget))
    together = score(reward, talks)[0]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) > 5


ENCODERS = {
    "bert": {},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
                               "position_buckets": 8, "max_relative_positions": -1, "share_att_key": True,
                               "norm_rel_ebd": "layer_norm", "pooler_hidden_size": 32},
    "roberta": {"pad_token_id": 0, "type_vocab_size": 1}, "modernbert": {"local_attention": 8}}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_classifier_is_a_reward_model_too(tmp_path, kind):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    model = save_reward_model(tmp_path, tokenizer, kind, **ENCODERS[kind])
    scores, _ = score(ppo_llm.load_reward(Config(reward=str(tmp_path), device="cpu")), TALKS)
    with torch.no_grad():
        texts = ["\n".join([m["content"] for m in messages] + [response]) for messages, response in TALKS]
        alone = [model(torch.tensor([tokenizer(text).input_ids + [1]])).logits.item() for text in texts]
    assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 3


def test_what_is_too_long_loses_its_beginning_and_is_counted(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = word_tokenizer().chat_template
    tokenizer.model_max_length = 12
    model = save_reward_model(tmp_path, tokenizer)
    model.config.pad_token_id = None
    talks = [([{"role": "user", "content": "abcdefghijkl"}], "mnop"),
             ([{"role": "user", "content": "a"}], "b")]
    scores, metrics = score(ppo_llm.load_reward(Config(reward=str(tmp_path), device="cpu")), talks)
    ids = tokenizer("uabcdefghijkl<|endoftext|>amnop<|endoftext|>").input_ids[-12:]
    with torch.no_grad():
        assert scores[0].item() == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    assert metrics["truncated"].item() == 0.5


def test_a_classifier_of_several_classes_is_refused(tmp_path):
    save_reward_model(tmp_path, labels=3)
    for flags in ({"reward": str(tmp_path)}, {"critic_model": str(tmp_path)}):
        config = make_config(save_folder(tmp_path / "p", make_lm()), **flags)
        with pytest.raises(UsageError, match="has 3 outputs, a reward model has one"):
            ppo_llm.load_tokenizer(config)
            ppo_llm.load_reward(config)


def test_a_language_model_is_no_reward_model(tmp_path):
    folder = save_folder(tmp_path / "lm", make_lm())
    with pytest.raises(UsageError, match="neither gsm8k, nor FILE.py:function, nor a sequence classifier"):
        ppo_llm.load_reward(Config(reward=str(folder)))


def test_the_critic_made_of_a_reward_model_keeps_its_score_head(tmp_path, folder):
    model = save_reward_model(tmp_path)
    config = make_config(folder, critic_model=str(tmp_path))
    models = make_models(config)
    head = models.critic.model.value_head
    assert torch.equal(head.weight, model.score.weight) and head.bias is None
    part = ppo_llm.Rollout([[5, 9, 30]], [[7, 8, 9]], torch.ones(1, 3), torch.zeros(1, 3))
    model.config.pad_token_id = None
    with torch.no_grad():
        values = forward(models.critic.model, part, config)["values"][0]
        expected = [model(torch.tensor([[5, 9, 30, 7, 8, 9][: 3 + t]])).logits.item() for t in range(3)]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)  # the reward model's score of the text so far


def test_an_encoder_is_refused_as_critic_model(tmp_path, folder):
    save_reward_model(tmp_path, kind="bert")
    with pytest.raises(UsageError, match="has no linear score head"):
        make_models(make_config(folder, critic_model=str(tmp_path)))


def test_a_template_that_refuses_a_conversation_is_a_sentence_at_the_first_scores(tmp_path):
    tokenizer = make_tokenizer()
    refuse = "{{ raise_exception('no system') }}"
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}" + refuse + "{% endif %}x"
    save_reward_model(tmp_path, tokenizer)
    reward = ppo_llm.load_reward(Config(reward=str(tmp_path), device="cpu"))
    assert len(score(reward, TALKS[:2])[0]) == 2
    with pytest.raises(UsageError, match="the reward raised TemplateError.'no system'"):
        score(reward, TALKS)


def test_a_critic_that_knows_fewer_tokens_than_the_policy_is_refused(tmp_path, folder):
    save_reward_model(tmp_path, vocab_size=40)
    with pytest.raises(UsageError, match="critic_model knows 40 tokens, the policy 64"):
        ppo_llm.load_tokenizer(make_config(folder, critic_model=str(tmp_path)))


@pytest.mark.parametrize("flag", ["reward", "critic_model", "model"])
def test_a_lora_folder_is_refused_with_where_the_merge_command_is(tmp_path, folder, flag):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')
    config = make_config(folder, **{flag: str(tmp_path)})
    with pytest.raises(UsageError,
                       match="is a LoRA adapter: merge it first .docs/reward_models.md has the command"):
        ppo_llm.load_tokenizer(config)
        ppo_llm.load_reward(config)


def test_the_merge_command_of_the_docs_makes_a_reward_model_of_a_lora_folder(tmp_path):
    import peft

    save_reward_model(tmp_path / "base", word_tokenizer())
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "score" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    text = (ROOT / "docs" / "reward_models.md").read_text()
    code = re.search(r"```python\n(.*?merge_and_unload.*?)```", text, re.DOTALL)[1]
    for name, path in (("BASE", "base"), ("ADAPTER", "adapter"), ("merged", "merged")):
        code = code.replace(f'"{name}"', repr(str(tmp_path / path)))
    exec(code, {})
    scores, _ = score(ppo_llm.load_reward(Config(reward=str(tmp_path / "merged"), device="cpu")), TALKS[:1])
    ids = word_tokenizer()("uabc<|endoftext|>adef<|endoftext|>").input_ids
    base.config.pad_token_id = None
    with torch.no_grad():
        expected = adapted(torch.tensor([ids])).logits.item()
    assert scores.item() == pytest.approx(expected, rel=1e-4, abs=1e-4) and abs(expected) > 1e-2


def test_an_encoder_decoder_is_refused(tmp_path):
    settings = '{"model_type": "t5", "architectures": ["T5ForSequenceClassification"]}'
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(UsageError, match="is an encoder-decoder model: only decoders are supported"):
        ppo_llm.load_reward(Config(reward=str(tmp_path)))


@pytest.mark.slow
def test_a_run_with_a_reward_model_logs_scores_and_truncations(tmp_path, folder, no_figures):
    save_reward_model(tmp_path / "rm", word_tokenizer())
    config = make_config(folder, reward=str(tmp_path / "rm"), critic_model=str(tmp_path / "rm"),
                         total_steps=2,
                         eval_dataset=str(folder / "prompts.jsonl"), eval_every=1,
                         output_dir=str(tmp_path / "run"))
    with contextlib.redirect_stdout(io.StringIO()):
        ppo_llm.main(config)
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["reward/score"]) and row["reward/truncated"] == 0 for row in rows[1:])
    assert all(row["eval/truncated"] == 0 for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len({sample["score"] for sample in samples}) > 1


def test_the_messages_of_a_conversation_reach_the_reward_model_with_the_system_prompt(tmp_path, folder):
    rows = [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}, {"role": "assistant", "content": "cut off"}]}]
    config = make_config(folder, system_prompt="S", reward="f.py:f")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    example = ppo_llm.make_examples(rows, tokenizer, config, "SOURCE", True)[0]
    assert [m["content"] for m in example.messages] == ["S", "a", "b", "c"]
    assert example.text == "c"
