"""critic/, the folder of the value model that a run leaves, as transformers and --critic_model read it."""

import contextlib
import io
import json

import pytest
import torch
import transformers
from conftest import collect, make_config, make_lm, make_models, make_tokenizer, save_folder, take_steps
from safetensors.torch import load_file

import ppo_llm
from ppo_llm import export_models, score_tokens

LORA = {"lora_rank": 4}
NO_CLASS = "no critic/: transformers has no sequence classifier with a linear score head for this model\n"
NO_MEAN = "no critic/: transformers' sequence classifiers do not read the mean of the states\n"
pytestmark = pytest.mark.usefixtures("no_figures")


def make_trained(folder, **changes):
    """Models after two steps of training (V is not 0, adapters have moved), a rollout, and their config."""
    config = make_config(folder, **changes)
    models = make_models(config)
    take_steps(models, config, 2)
    return models, collect(models, config, step=2)[0], config


def check_folder(folder, rollout, values, tolerance: float = 1e-5) -> None:
    """The reloaded classifier says these values, which differ, of the states in which the tokens are chosen.

    It reads the last token that is not padding: states behind a sampled pad token are left out.
    """
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).float()
    assert model.config.num_labels == 1
    compared = []
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        for t in range(len(response)):
            state = prompt + response[:t]
            if state[-1] != model.config.pad_token_id:
                with torch.no_grad():
                    logit = model(torch.tensor([state])).logits.item()
                assert values[row, t].item() == pytest.approx(logit, abs=tolerance)
                compared.append(logit)
    assert len(compared) > 10 and torch.tensor(compared).std() > 10 * tolerance


KINDS = {"qwen2": {}, "gpt2": {}, "gpt_neox": {}, "gemma2": {"head_dim": 8, "sliding_window": 6},
         "mixtral": {}, "bloom": {}, "llama": {"tie_word_embeddings": True},
         "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reloaded_classifier_says_v_at_the_last_token(kind, tmp_path, capsys):
    source = save_folder(tmp_path / "source", make_lm(kind, **KINDS[kind]))
    models, rollout, config = make_trained(source)
    export_models(tmp_path / "run", models, config)
    check_folder(tmp_path / "run" / "critic", rollout, rollout.old_values)
    assert "no critic/" not in capsys.readouterr().out


@pytest.mark.parametrize(("in_tokenizer", "in_model", "expected"), [
    (64, 5, 5),  # the tokenizer's is a token that the model does not know, and which is never fed
    (None, 5, 5),
    (2, 5, 2),
    (None, None, None)])
def test_the_pad_token_is_one_that_the_model_knows(in_tokenizer, in_model, expected, tmp_path):
    tokenizer = make_tokenizer(pad_token={64: "<far>", 2: "<bot>", None: None}[in_tokenizer])
    assert tokenizer.pad_token_id == in_tokenizer
    source = save_folder(tmp_path / "source", make_lm(pad_token_id=in_model), tokenizer)
    models, rollout, config = make_trained(source)
    export_models(tmp_path / "run", models, config)
    check_folder(tmp_path / "run" / "critic", rollout, rollout.old_values)
    settings = json.loads((tmp_path / "run" / "critic" / "config.json").read_text())
    assert settings.get("pad_token_id") == expected


@pytest.fixture(scope="module")
def first_run(folder, tmp_path_factory):
    """The folder of a run of two steps."""
    path = tmp_path_factory.mktemp("first") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        ppo_llm.main(make_config(folder, total_steps=2, output_dir=str(path)))
    return path


def test_a_run_leaves_a_plain_folder_with_a_tokenizer(first_run):
    files = {path.name for path in (first_run / "critic").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files
    weights = load_file(first_run / "critic" / "model.safetensors")
    assert weights["score.weight"].shape == (1, 32) and not any("lm_head" in name for name in weights)
    settings = json.loads((first_run / "critic" / "config.json").read_text())
    assert settings["architectures"] == ["Qwen2ForSequenceClassification"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(first_run / "critic")
    assert settings["pad_token_id"] == tokenizer.pad_token_id == 0


def test_a_run_that_starts_from_the_folder_has_the_v_of_the_old_one_at_step_0(first_run, folder, tmp_path):
    old = make_models(make_config(folder))
    old.critic.load(first_run / "checkpoints" / "step_2" / "critic.safetensors")
    config = make_config(folder, seed=7, total_steps=1, critic_model=str(first_run / "critic"),
                         output_dir=str(tmp_path / "run"))
    models = make_models(config)
    rollout, metrics = collect(models, config)
    expected = score_tokens(old.critic.model, rollout, config, only_values=True)["values"]
    torch.testing.assert_close(rollout.old_values, expected, atol=1e-6, rtol=1e-5)
    assert rollout.old_values.abs().max() > 0.01

    with contextlib.redirect_stdout(io.StringIO()):
        ppo_llm.main(config)
    check_folder(first_run / "critic", *read_samples(tmp_path / "run" / "samples.jsonl", config))


def read_samples(path, config):
    """A rollout of the samples of a run, and the values that stand there."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    prompts = []
    responses = []
    values = []
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        message = [{"role": "user", "content": sample["prompt"]}]
        prompts.append(ppo_llm.render(message, tokenizer, is_prompt=True))
        responses.append(tokenizer.convert_tokens_to_ids(sample["token"]))
        values.append(torch.tensor(sample["value"]))
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    masks = [torch.ones_like(x) for x in values]
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return ppo_llm.Rollout(prompts, responses, mask, mask * 0), padded


def test_the_folder_is_a_reward_model_too(first_run, folder):
    config = make_config(folder, reward=str(first_run / "critic"))
    with contextlib.redirect_stdout(io.StringIO()):
        reward = ppo_llm.load_reward(config)
    messages = [{"role": "user", "content": "abc"}]
    scores, _ = reward([ppo_llm.Example("abc", "", [], messages)], ["defg"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(first_run / "critic")
    talk = [*messages, {"role": "assistant", "content": "defg"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(first_run / "critic")
    with torch.no_grad():
        expected = model(torch.tensor([ppo_llm.render(talk, tokenizer, is_prompt=False)])).logits
    assert scores == pytest.approx(expected.flatten().tolist(), abs=1e-5) and scores != [0.0]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mixtral"])  # transposed layers; fused experts and a router
def test_a_lora_adapter_is_merged_into_the_folder(kind, tmp_path):
    source = save_folder(tmp_path / "source", make_lm(kind))
    models, rollout, config = make_trained(source, **LORA)
    export_models(tmp_path / "run", models, config)
    critic = tmp_path / "run" / "critic"
    moved = [w for name, w in models.critic.model.named_parameters() if "lora_B.critic" in name]
    assert moved and all((w != 0).any() for w in moved)
    assert not list(critic.glob("adapter*"))
    assert not any("lora" in name for name in load_file(critic / "model.safetensors"))
    check_folder(critic, rollout, rollout.old_values)


def test_the_export_of_an_adapter_leaves_the_models_as_they_are(folder, tmp_path):
    models, rollout, config = make_trained(folder, **LORA)
    names = {"actor": "logprobs", "critic": "values"}
    before = {}
    for role, x in names.items():
        before[role] = score_tokens(getattr(models, role).model, rollout, config)[x]
    export_models(tmp_path / "run", models, config)
    for role, x in names.items():
        assert torch.equal(score_tokens(getattr(models, role).model, rollout, config)[x], before[role])


def test_a_critic_model_with_an_adapter_of_its_own_is_exported_merged(first_run, folder, tmp_path):
    models, rollout, config = make_trained(folder, critic_model=str(first_run / "critic"), **LORA)
    export_models(tmp_path / "run", models, config)
    check_folder(tmp_path / "run" / "critic", rollout, rollout.old_values)


def test_a_bf16_adapter_is_merged_in_fp32_so_that_small_steps_survive(folder, tmp_path):
    models, _, config = make_trained(folder, dtype="bfloat16", critic_lr=1e-5, **LORA)
    export_models(tmp_path / "run", models, config)
    layer = models.critic.model.lm.model.layers[0].self_attn.q_proj
    step = 2.0 * layer.lora_B["critic"].weight.float() @ layer.lora_A["critic"].weight.float()
    weights = load_file(tmp_path / "run" / "critic" / "model.safetensors")
    merged = weights["model.layers.0.self_attn.q_proj.weight"]
    assert merged.dtype == torch.float32
    assert 0 < step.abs().max() < 1e-3  # bf16 has three digits: it would be lost
    torch.testing.assert_close(merged - layer.base_layer.weight.float(), step, atol=1e-7, rtol=1e-2)


def test_a_bf16_critic_is_exported_in_bf16(folder, tmp_path):
    models, rollout, config = make_trained(folder, dtype="bfloat16")
    export_models(tmp_path / "run", models, config)
    exported = tmp_path / "run" / "critic"
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype="auto")
    assert critic.dtype == torch.bfloat16
    assert torch.equal(critic.score.weight, models.critic.model.value_head.weight)


@pytest.mark.parametrize(("kind", "changes", "sentence"), [
    ("qwen2", {"value_pooling": "mean"}, NO_MEAN),
    ("qwen2", {"critic": "shared"}, "no critic/: a shared critic is a head on the policy\n"),
    ("granite", {}, NO_CLASS),  # transformers has no classifier of it
    ("qwen2", {"adv_estimator": "grpo", "rollout_n": 2}, "")])
def test_where_there_can_be_no_folder_a_sentence_says_why(kind, changes, sentence, tmp_path, capsys):
    source = save_folder(tmp_path / "source", make_lm(kind))
    config = make_config(source, **changes)
    models = make_models(config)
    capsys.readouterr()
    export_models(tmp_path / "run", models, config)
    assert capsys.readouterr().out == sentence
    assert not (tmp_path / "run" / "critic").exists() and (tmp_path / "run" / "model").exists()
