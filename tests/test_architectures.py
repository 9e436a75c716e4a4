"""Every causal architecture works as it is: sampled = scored = the model's own logits. What cannot work is refused."""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GPT2_SHAPE, SHAPE, collect, make_config, make_lm, make_models, make_prompts, save_folder

import ppo_llm

# Grouped heads, windows, soft caps, attention sinks, ALiBi, learned and rotary positions, mixtures of experts
KINDS = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "phi3": {"partial_rotary_factor": 1.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"router_jitter_noise": 0.1},  # the noise must be off
    "gpt_oss": {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gemma": {"head_dim": 8},
    "olmo2": {},
    "starcoder2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "num_key_value_heads": None},  # as opt-350m, which projects
}
LESS_KNOWN = ("gemma", "olmo2", "starcoder2", "opt", "phi3", "qwen3")
MOST = [pytest.param(kind, marks=[pytest.mark.slow] if kind in LESS_KNOWN else []) for kind in KINDS]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny random model of a kind, made once."""

    @functools.cache
    def make(kind: str) -> Path:
        return save_folder(tmp_path_factory.mktemp(kind), make_lm(kind, **KINDS[kind]))

    return make


def own_logprobs(lm, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """By the model's own forward pass over one row."""
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("kind", MOST)
def test_sampled_and_scored_probabilities_are_the_models_own_and_the_first_ratio_is_one(kind, folder_of):
    config = make_config(folder_of(kind), temperature=0.8, rollout_slots=5)
    models = make_models(config)
    lm = transformers.AutoModelForCausalLM.from_pretrained(config.model).eval()
    rollout, metrics = collect(models, config)
    assert len(set(map(len, rollout.responses))) > 1
    scored = ppo_llm.score_tokens(models.actor.model, rollout, config)["logprobs"]
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        own = own_logprobs(lm, prompt, response, 0.8).exp()
        for x in (rollout.old_logprobs, scored):
            torch.testing.assert_close(x[i, : len(response)].exp(), own, rtol=0, atol=2e-6)
    assert metrics["reward/kl"].abs() < 1e-6
    found = ppo_llm.update("actor", models, rollout, 0, 3, 0.001, config)
    assert found["policy/ratio_first"] == pytest.approx(1, abs=1e-5)
    after = ppo_llm.score_tokens(models.actor.model, rollout, config)["logprobs"]
    assert (after - scored).abs().max() > 1e-3  # it has learned


@pytest.mark.parametrize("kind", MOST)
def test_greedy_tokens_are_those_of_transformers_generate(kind, folder_of):
    config = make_config(folder_of(kind), max_response_length=10, rollout_slots=3)
    lm = transformers.AutoModelForCausalLM.from_pretrained(config.model).eval()
    policy = ppo_llm.LanguageModel(lm, 64, False, config)
    stop_ids = {1, *range(20, 34)}
    prompts = make_prompts(6, longest=14)
    tokens, _ = ppo_llm.generate(policy, prompts, stop_ids, config, None)
    for prompt, response in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt])
        out = lm.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=10, do_sample=False,
                          eos_token_id=sorted(stop_ids), pad_token_id=0)
        assert out[0, len(prompt) :].tolist() == response


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "bloom"])
def test_gradient_checkpointing_recomputes_layers_and_changes_no_number(kind, folder_of):
    results = []
    for checkpointing in (False, True):
        config = make_config(folder_of(kind), gradient_checkpointing=checkpointing, critic="shared")
        models = make_models(config)
        layers = []
        for module in models.actor.model.lm.modules():
            if isinstance(module, torch.nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.register_forward_hook(lambda module, inputs, output, seen=layers: seen.append(module))
        rollout, _ = collect(models, config)
        layers.clear()
        part = rollout.take([0])
        loss, _ = ppo_llm.ppo_loss("actor", models, part, 0.0, config)
        models.actor.backward((loss * part.mask).sum())
        passes = len(layers)
        gradients = [weight.grad.clone() for weight in models.actor.weights if weight.grad is not None]
        models.actor.drop_gradient()
        found = ppo_llm.update("actor", models, rollout, 0, 3, 0.001, config)
        assert found["policy/ratio_first"] == pytest.approx(1, abs=1e-5)
        results.append((passes, gradients))
    (plain_passes, plain_gradients), (passes, gradients) = results
    assert passes >= 1.5 * plain_passes  # not 2: the norms outside the layers, and the last of a layer
    for x, y in zip(plain_gradients, gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Refused, in one sentence.


@pytest.mark.parametrize(("kind", "changes"), [
    ("mamba", {"state_size": 4, "num_hidden_layers": 2, "hidden_size": 32}),
    ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
])
def test_a_state_space_model_is_refused(kind, changes, tmp_path):
    shape = {"vocab_size": 64, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    shape |= changes if kind == "mamba" else SHAPE | changes
    lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape))
    config = make_config(save_folder(tmp_path / kind, lm))
    with pytest.raises(ppo_llm.UsageError, match="is a state-space model") as caught:
        make_models(config)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("option", ["model", "critic_model"])
def test_an_encoder_decoder_model_is_refused(option, t5, folder_of):
    config = make_config(folder_of("qwen2"), **{option: str(t5)})
    with pytest.raises(ppo_llm.UsageError, match="is an encoder-decoder model: only decoders are supported"):
        ppo_llm.load_tokenizer(config)


@pytest.mark.parametrize(("kind", "changes"), [
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48}),
    ("phi3", {"rope_parameters": LONGROPE | {"type": "longrope"}, "original_max_position_embeddings": 48}),
    ("llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 48}}),
    ("llama", {"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 48}}),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 48}),
    ("gemma3_text", {"head_dim": 8, "rope_parameters": {
        "full_attention": DYNAMIC | {"original_max_position_embeddings": 48},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
])
def test_positions_that_look_at_the_whole_pass_are_refused_where_they_would_change(kind, changes, tmp_path):
    transformers.AutoConfig.for_model(kind, **SHAPE | changes).save_pretrained(tmp_path)
    config = make_config(tmp_path, max_prompt_length=40, max_response_length=8)
    ppo_llm.check_sizes(config.model, config)
    config.max_response_length = 9
    with pytest.raises(ppo_llm.UsageError, match="= 49 tokens, but .* has positions for 48 that do not depend on"):
        ppo_llm.check_sizes(config.model, config)


def test_longrope_indeed_depends_on_the_longest_row_of_a_pass_beyond_its_original_length(tmp_path):
    """Why it is refused: the same row has other log-probs beside a longer one."""
    lm = make_lm("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16, partial_rotary_factor=1.0)
    policy = ppo_llm.LanguageModel(lm, 64, False, ppo_llm.Config())
    row = make_prompts(1, longest=12)[0] + [5] * 4
    alone, within, beyond = (policy.hidden([row, [7] * n])[0, : len(row)] for n in (1, 16, 17))
    torch.testing.assert_close(alone, within, rtol=0, atol=1e-5)
    assert (beyond - alone).abs().max() > 1e-2


@pytest.mark.parametrize("changes", [
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                         "original_max_position_embeddings": 64}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    {},
])
def test_positions_that_do_not_look_at_the_pass_reach_to_the_context(changes, tmp_path):
    transformers.AutoConfig.for_model("llama", **SHAPE | changes).save_pretrained(tmp_path)
    config = make_config(tmp_path, max_prompt_length=200, max_response_length=56)
    ppo_llm.check_sizes(config.model, config)
    config.max_prompt_length = 201
    with pytest.raises(ppo_llm.UsageError, match="= 257 tokens, but .* has positions for 256"):
        ppo_llm.check_sizes(config.model, config)


def test_the_positions_of_gpt2_are_counted_and_a_model_without_a_limit_has_none(tmp_path):
    transformers.GPT2Config(**GPT2_SHAPE).save_pretrained(tmp_path / "gpt2")
    config = make_config(tmp_path / "gpt2", max_prompt_length=250)
    with pytest.raises(ppo_llm.UsageError, match="= 258 tokens"):
        ppo_llm.check_sizes(config.model, config)
    transformers.BloomConfig(vocab_size=64, hidden_size=32).save_pretrained(tmp_path / "bloom")
    ppo_llm.check_sizes(str(tmp_path / "bloom"), config)


def test_the_critics_positions_are_checked_too(folder_of, tmp_path):
    transformers.AutoConfig.for_model("llama", **SHAPE | {"max_position_embeddings": 20}).save_pretrained(tmp_path)
    config = make_config(folder_of("qwen2"), critic_model=str(tmp_path))
    with pytest.raises(ppo_llm.UsageError, match=f"= 24 tokens, but {tmp_path} has positions for 20"):
        ppo_llm.load_tokenizer(config)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad, tmp_path):
    lm = make_lm()
    lm.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    config = make_config(save_folder(tmp_path / "m", lm))
    with pytest.raises(ppo_llm.UsageError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        make_models(config)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_without_weights_or_config_is_one_sentence(missing, tmp_path):
    folder = save_folder(tmp_path / "m", make_lm())
    (folder / missing).unlink()
    with pytest.raises(ppo_llm.UsageError, match=f"^model {folder}: ") as caught:
        config = make_config(folder)
        ppo_llm.build_models(None, config)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path):
    folder = save_folder(tmp_path / "m", make_lm(vocab_size=20))  # z, the last letter of a prompt, is token 28
    config = make_config(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ppo_llm.UsageError, match="token 21 of the tokenizer, but the model knows 20"):
        ppo_llm.load_examples(tokenizer, config)
