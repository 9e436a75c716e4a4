"""Sampling, log-probs, values, the reference policy, and what collect_rollout makes of them."""

import math

import pytest
import torch
import torch.nn.attention.varlen
from conftest import (
    collect,
    make_config,
    make_lm,
    make_models,
    make_prompts,
    make_tokenizer,
    plain,
    save_folder,
    take_steps,
)
from transformers import GenerationConfig

import ppo_llm
from ppo_llm import Config, Example, LanguageModel, Rollout, forward, generate

FAMILIES = {"qwen2": {}, "llama": {}, "gpt2": {}, "gemma": {"head_dim": 8}, "mistral": {"sliding_window": 8},
            "gemma3_text": {"head_dim": 8, "sliding_window": 8}, "gpt_neox": {"num_key_value_heads": None},
            "qwen3": {"head_dim": 16}, "olmo2": {}, "phi3": {"partial_rotary_factor": 1.0}, "starcoder2": {},
            "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25},
            "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": None}}
STOP = {1, *range(20, 34)}


def make_policy(kind: str = "qwen2", **config) -> LanguageModel:
    return LanguageModel(make_lm(kind, **FAMILIES[kind]), 64, True, Config(value_head_init="normal", **config))


def make_part(prompts: list, responses: list, **tensors) -> Rollout:
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in responses], batch_first=True)
    return Rollout(prompts, responses, mask, mask * 0, **tensors)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_logp(lm, prompt: list, response: list, temperature: float = 1.0, size: int = 64) -> torch.Tensor:
    """Log-probabilities [T, V] of every token at every position of one response, by one ordinary pass."""
    with torch.no_grad():
        logits = plain(lm)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :size]
    return (logits / temperature).log_softmax(-1)


def close(x, y, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_generate(kind, monkeypatch):
    policy, prompts, lengths = make_policy(kind), make_prompts(7, longest=20), set()
    lm = plain(policy.lm)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = lm.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=12, do_sample=False,
                                 eos_token_id=sorted(STOP), pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
        lengths.add(len(expected[-1]))
    assert len(lengths) > 1  # some rows leave the batch before others
    for slots, every in ((1, 8), (3, 1), (3, 3), (64, 1), (64, 3), (64, 8)):
        monkeypatch.setattr(ppo_llm, "CHECK_EVERY", every)
        tokens, _ = generate(policy, prompts, STOP, Config(rollout_slots=slots, max_response_length=12), None)
        assert tokens == expected, (slots, every)


def test_each_token_lies_where_its_own_random_number_points():
    policy, prompts = make_policy(), make_prompts(7)
    responses, _ = generate(policy, prompts, STOP, Config(max_response_length=9, rollout_slots=3), noise())
    points = torch.rand(7, 9, generator=noise())
    for row, prompt, response in zip(points, prompts, responses, strict=True):
        cumulated = plain_logp(policy.lm, prompt, response).exp().cumsum(-1)
        for t, token in enumerate(response):
            below = cumulated[t, token - 1].item() if token else 0.0
            assert below - 1e-5 <= row[t].item() <= cumulated[t, token].item() + 1e-5


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_what_is_sampled_does_not_depend_on_slots_or_on_the_number_of_steps_between_looks(count, slots, monkeypatch):
    policy, prompts, results = make_policy(), make_prompts(count, longest=20), []
    for size, every in ((64, 8), (slots, 1), (slots, 3)):
        monkeypatch.setattr(ppo_llm, "CHECK_EVERY", every)
        results.append(generate(policy, prompts, STOP, Config(rollout_slots=size, max_response_length=9), noise()))
    for tokens, logprobs in results[1:]:
        assert tokens == results[0][0]
        for x, y in zip(logprobs, results[0][1], strict=True):
            close(x, y)


def test_a_response_of_one_token_and_a_limit_of_one_token_work():
    policy, prompts = make_policy(), make_prompts(5)
    everything = set(range(64))
    for stop_ids, limit in ((everything, 8), (STOP, 1), (everything, 1)):
        config = Config(max_response_length=limit, rollout_slots=2)
        tokens, logprobs = generate(policy, prompts, stop_ids, config, noise())
        assert [len(x) for x in tokens] == [1] * 5 == [len(x) for x in logprobs]


def test_prompts_are_read_within_the_token_budget():
    policy = make_policy()
    widths = count_tokens(policy)
    generate(policy, [[5] * 6] * 5, STOP, Config(max_response_length=1, micro_batch_tokens=13), noise())
    assert widths == [12, 12, 6]


def test_steps_that_are_replayed_by_graphs_sample_the_same(monkeypatch):
    """A stand-in for CUDA graphs: what is replayed is the step for a fixed number of slots, whatever is idle there."""
    captured, replayed = [], []

    def capture(step, pool):
        step()
        captured.append(step.args[0])
        return lambda: (replayed.append(step.args[0]), step())

    monkeypatch.setattr(ppo_llm, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    policy, prompts, config = make_policy(), make_prompts(9), Config(rollout_slots=6, max_response_length=12)
    greedy, sampled = (generate(policy, prompts, STOP, config, x) for x in (None, noise()))
    with torch.inference_mode():
        policy.engine.capture()
    assert captured == [6, 6, 3, 3, 1, 1]  # the largest first, greedy and sampling
    for expected, generator in ((greedy, None), (sampled, noise()), (sampled, noise())):
        tokens, logprobs = generate(policy, prompts, STOP, config, generator)
        assert tokens == expected[0]
        for x, y in zip(logprobs, expected[1], strict=True):
            close(x, y)
    assert {3, 6} <= set(replayed) <= {1, 3, 6}


def flash_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                   seqused_k=None):
    """What torch documents of varlen_attn (2.11: no enable_gqa), sequence by sequence, aligned at the last token."""
    out = []
    for i, (a, b, c, d) in enumerate(zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False)):
        d = d if seqused_k is None else c + seqused_k[i]
        assert b - a <= max_q and d - c <= max_k and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        place = torch.arange(d - c)[None] - (torch.arange(b - a)[:, None] + (d - c) - (b - a))
        left, right = (10**6 if x < 0 else x for x in window_size)
        q, k, v = query[a:b].transpose(0, 1), key[c:d].transpose(0, 1), value[c:d].transpose(0, 1)
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill((place < -left) | (place > right), -math.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def later_stand_in(*args, enable_gqa=False, **options):  # torch 2.13
    assert enable_gqa
    return flash_stand_in(*args, **options)


@pytest.mark.parametrize("varlen_attn", [flash_stand_in, later_stand_in])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma3_text"])
def test_the_flash_path_calls_torchs_kernel_as_it_is_documented(kind, varlen_attn, monkeypatch):
    policy, prompts, config = make_policy(kind), make_prompts(7, longest=20), Config(max_response_length=12)
    monkeypatch.setattr(ppo_llm, "has_flash", lambda x: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    responses, sampled = generate(policy, prompts, STOP, config, noise())
    logprobs = forward(policy, make_part(prompts, responses), 1.0)[0]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected = plain_logp(policy.lm, prompt, response).gather(1, torch.tensor(response)[:, None])[:, 0]
        close(logprobs[i, : len(response)], expected)
        close(sampled[i], expected)


def make_counter() -> LanguageModel:
    """A real transformer that says n + 1 after n, and 0 after 63, for certain."""
    lm = make_lm(hidden_size=64)
    for layer in lm.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    lm.model.embed_tokens.weight.data.copy_(torch.eye(64))
    lm.lm_head.weight.data.copy_(torch.eye(64).roll(1, 0) * 10)
    return LanguageModel(lm, 64, False, Config())


def test_a_response_ends_with_its_stop_token_or_at_the_limit():
    prompts = [[5, 29], [9, 9, 9, 27], [3], [22]]
    tokens, logprobs = generate(make_counter(), prompts, {30}, Config(max_response_length=8), noise())
    assert tokens == [[30], [28, 29, 30], list(range(4, 12)), list(range(23, 31))]
    assert [len(x) for x in logprobs] == [1, 3, 8, 8]


def test_every_stop_token_ends_a_response():
    tokens, _ = generate(make_counter(), [[10], [16], [24]], {12, 17, 30}, Config(max_response_length=8), noise())
    assert tokens == [[11, 12], [17], [25, 26, 27, 28, 29, 30]]


def test_the_pad_token_in_mid_response_is_a_token_like_any_other():
    tokens, _ = generate(make_counter(), [[61]], {4}, Config(max_response_length=8), noise())
    assert tokens == [[62, 63, 0, 1, 2, 3, 4]]


def test_rows_in_other_slots_do_not_change_greedy_tokens_of_a_counter():
    prompts = [[n] for n in range(3, 60)]
    tokens, _ = generate(make_counter(), prompts, {30}, Config(max_response_length=64, rollout_slots=5), None)
    assert [len(x) for x in tokens] == [(30 - p[0] - 1) % 64 + 1 for p in prompts]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_follows_the_softmax_at_the_temperature(temperature):
    policy, count = make_policy(), 4000
    config = Config(max_response_length=1, temperature=temperature, rollout_slots=count)
    tokens, _ = generate(policy, [[5, 9, 40]] * count, STOP, config, noise())
    seen = torch.bincount(torch.tensor(tokens)[:, 0], minlength=64) / count
    right, wrong = (plain_logp(policy.lm, [5, 9, 40], [0], t)[0].exp() for t in (temperature, 1.5 - temperature))
    slack = 4 * (right * (1 - right) / count).sqrt() + 1e-3
    assert ((seen - right).abs() < slack).all()
    assert ((seen - wrong).abs() > slack).any()


@pytest.mark.parametrize(("setting", "kept"), [({"top_k": 5}, 5), ({"top_p": 0.4}, None), ({"top_k": 1}, 1)])
def test_top_k_and_top_p_truncate_sampling_but_not_the_logprobs(setting, kept):
    policy, count = make_policy(), 1000
    logp, order = plain_logp(policy.lm, [5, 9, 40], [0])[0].sort(descending=True)
    kept = kept or int((logp.exp().cumsum(0) < setting["top_p"]).sum()) + 1
    config = Config(max_response_length=1, rollout_slots=count, **setting)
    tokens, logprobs = generate(policy, [[5, 9, 40]] * count, STOP, config, noise())
    allowed = dict(zip(order[:kept].tolist(), logp[:kept], strict=True))
    assert {t[0] for t in tokens} == set(allowed)
    close(torch.cat(logprobs), torch.stack([allowed[t[0]] for t in tokens]))


def test_the_models_generation_config_does_not_shape_sampling():
    policy, prompts = make_policy(), make_prompts(6)
    config = Config(max_response_length=10)
    expected = generate(policy, prompts, STOP, config, noise())
    policy.lm.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=2, top_p=0.5, repetition_penalty=1.5, min_new_tokens=5, eos_token_id=[1])
    tokens, logprobs = generate(policy, prompts, STOP, config, noise())
    assert tokens == expected[0]
    assert all(map(torch.equal, logprobs, expected[1]))


def test_sampling_depends_on_the_generator_alone():
    policy, prompts, config = make_policy(), make_prompts(6), Config(max_response_length=10)
    first, second, other = (generate(policy, prompts, STOP, config, noise(seed))[0] for seed in (1, 1, 2))
    assert first == second != other


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs, entropy, values.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logprobs_of_sampling_and_of_training_are_those_of_a_plain_pass(kind, temperature):
    policy, prompts = make_policy(kind), make_prompts(7, longest=20)
    config = Config(max_response_length=12, temperature=temperature, rollout_slots=4)
    responses, sampled = generate(policy, prompts, STOP, config, noise())
    logprobs, entropy, values, _ = forward(policy, make_part(prompts, responses), temperature)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        n, logp = len(response), plain_logp(policy.lm, prompt, response, temperature)
        expected = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
        close(sampled[i], expected)
        close(logprobs[i, :n], expected)
        close(entropy[i, :n], torch.distributions.Categorical(logits=logp).entropy())
        with torch.no_grad():
            hidden = plain(policy.lm)(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
        close(values[i, :n], policy.value_head(hidden)[len(prompt) - 1 : -1, 0])
        for x in (logprobs, entropy, values):
            assert not x[i, n:].any()


@pytest.mark.parametrize(("kind", "setting", "packs"), [
    ("qwen2", {}, True), ("granite", {"logits_scaling": 4.0}, True), ("cohere", {"logit_scale": 0.25}, True),
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}, False),
    ("bloom", {"n_layer": 2, "n_head": 4}, False)])
def test_the_check_at_the_start_finds_out_how_to_pass_sequences(kind, setting, packs, capsys):
    lm = make_lm(kind, **setting)
    policy, prompts, config = LanguageModel(lm, 64, False, Config()), make_prompts(5), Config(max_response_length=12)
    ppo_llm.check_passes(policy, prompts[:2], STOP, config)
    assert policy.packs == packs
    assert ("slow" in capsys.readouterr().err) == (not packs)
    responses, sampled = generate(policy, prompts, STOP, config, noise())
    logprobs = forward(policy, make_part(prompts, responses), 1.0)[0]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected = plain_logp(lm, prompt, response).gather(1, torch.tensor(response)[:, None])[:, 0]
        close(logprobs[i, : len(response)], expected)
        close(sampled[i], expected)


def test_a_model_whose_logits_cannot_be_reproduced_is_refused(monkeypatch):
    policy = make_policy()
    real = policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden, temperature: real(hidden, temperature) + hidden[..., :1])
    ppo_llm.check_passes(policy, make_prompts(2), STOP, Config())  # adding the same to all logits changes nothing
    monkeypatch.setattr(policy, "logits", lambda hidden, temperature: real(hidden, temperature) * 1.01)
    with pytest.raises(ppo_llm.UsageError, match="cannot be reproduced"):
        ppo_llm.check_passes(policy, make_prompts(2), STOP, Config())


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_forward_pass_does_not_depend_on_padding_order_or_company(pooling):
    policy, prompts = make_policy(value_pooling=pooling), make_prompts(9)
    responses = [[7 + i] * (1 + i) for i in range(9)]
    together = forward(policy, make_part(prompts, responses), 0.8)[:3]
    backwards = forward(policy, make_part(prompts[::-1], responses[::-1]), 0.8)[:3]
    for i in range(9):
        alone = forward(policy, make_part([prompts[i]], [responses[i]]), 0.8)[:3]
        for x, y, z in zip(together, backwards, alone, strict=True):
            close(x[i, : i + 1], z[0])
            close(x[i, : i + 1], y[8 - i, : i + 1])


def count_tokens(policy: LanguageModel) -> list[int]:
    """Tokens of every pass from now on."""
    widths = []
    embedding = policy.lm.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    return widths


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[9, 8, 5, 5, 2, 1], [1, 7, 3, 8, 8], [4, 4], [6]])
def test_packed_attention_is_that_of_each_sequence_alone(lengths, window):
    heads = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, sum(lengths), 8, generator=heads).requires_grad_() for n in (4, 2, 2))
    _, packed = ppo_llm.pack([[5] * n for n in lengths], torch.device("cpu"))
    out = ppo_llm.packed_attention(None, query, key, value, None, scaling=0.3, sliding_window=window, packed=packed)[0]
    expected = []
    for q, k, v in zip(*(x[0].split(lengths, 1) for x in (query, key, value)), strict=True):
        scores = 0.3 * q @ k.repeat_interleave(2, 0).transpose(1, 2)
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (distance >= 0) & (distance < (window or 99))
        expected.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.repeat_interleave(2, 0))
    expected, weights = torch.cat(expected, 1).transpose(0, 1)[None], torch.randn(out.shape, generator=heads)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for x, y in zip(*(torch.autograd.grad((o * weights).sum(), (query, key, value), retain_graph=True)
                      for o in (out, expected)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_the_cpu_computes_little_padding_in_attention():
    _, packed = ppo_llm.pack([[5] * n for n in (100, 90, 81, 50, 45, 20, 3)], torch.device("cpu"))
    assert [part.lengths for part in packed.parts] == [[100, 90, 81], [50, 45], [20], [3]]


def test_no_pass_computes_a_token_of_padding():
    policy = make_policy()
    widths = count_tokens(policy)
    forward(policy, make_part([[5, 9, 12], [4]], [[7, 8, 9, 10], [11]]), 1.0)
    assert widths == [9]


def test_a_slot_is_refilled_as_soon_as_its_response_has_ended_and_the_tail_is_compacted(monkeypatch):
    monkeypatch.setattr(ppo_llm, "CHECK_EVERY", 2)
    counter = make_counter()
    widths, prompts = count_tokens(counter), [[29 - n] for n in (1, 5, 3, 7, 1)]
    tokens, _ = generate(counter, prompts, {30}, Config(max_response_length=20, rollout_slots=2), None)
    assert [len(x) for x in tokens] == [2, 6, 4, 8, 2]
    # two prompts; two steps end the first, whose slot takes the next prompt: lengths 2 and 8, then 2, 4 and 6 beside it
    assert sum(widths) < 2 * 8 + 2 * 5 + 14 and widths[0] == 2 and widths[-1] == 1


def test_mean_pooling_gives_the_value_of_the_mean_of_all_states_so_far():
    policy, prompt, response = make_policy(value_pooling="mean"), [5, 9, 12], [7, 8, 9]
    values = forward(policy, make_part([prompt], [response]), 1.0)[2][0]
    hidden = plain(policy.lm)(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
    close(values, torch.stack([policy.value_head(hidden[: 3 + t].mean(0))[0] for t in range(3)]))


def test_ids_beyond_the_tokenizer_are_no_part_of_the_policy(tmp_path):
    lm = make_lm()
    lm.lm_head.weight.data[40:] = lm.lm_head.weight.data[:24] * 5  # likelier than any real token
    config = make_config(save_folder(tmp_path / "m", lm, make_tokenizer(40)), max_response_length=20, kl_penalty="full")
    models = make_models(config)
    assert plain_logp(lm, [5, 9], [0])[0].argmax() >= 40
    rollout, metrics = collect(models, config)
    assert max(t for response in rollout.responses for t in response) < 40
    for prompt, response, logprobs in zip(rollout.prompts, rollout.responses, rollout.old_logprobs, strict=True):
        logp = plain_logp(lm, prompt, response, size=40)
        close(logprobs[: len(response)], logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    greedy, _ = generate(models.actor.model, [[5, 9]] * 2, {1}, config, None)
    assert max(map(max, greedy)) < 40


def test_the_head_in_chunks_gives_the_same_numbers_and_gradients(folder, monkeypatch):
    models = make_models(make_config(folder, kl_penalty="full", critic="shared"))
    policy, reference = models.actor.model, models.reference
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise()))
    part = make_part(make_prompts(5), [[7 + i] * (1 + i) for i in range(5)])
    results = {}
    for size in (2**26, 64 * 4, 1):
        monkeypatch.setattr(ppo_llm, "LOGITS_PER_CHUNK", size)
        policy.zero_grad()
        outputs = forward(policy, part, 0.7, reference)
        sum((x * torch.arange(1, 6)).sum() for x in outputs).backward()
        results[size] = [*outputs, *(p.grad for p in policy.parameters())]
    for size in (64 * 4, 1):
        for x, y in zip(results[size], results[2**26], strict=True):
            close(x, y)


def test_the_head_never_sees_more_tokens_than_a_chunk(folder, monkeypatch):
    policy, rows = make_models(make_config(folder)).actor.model, []
    monkeypatch.setattr(ppo_llm, "LOGITS_PER_CHUNK", 64 * 3)
    real = policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden, temperature: (rows.append(len(hidden)), real(hidden, 1.0))[1])
    forward(policy, make_part([[5], [6]], [[7] * 5, [8] * 2]), 1.0)
    assert rows == [3, 3, 1]


def test_full_kl_is_the_sum_over_the_vocabulary(folder):
    models = make_models(make_config(folder, kl_penalty="full"))
    policy, reference = models.actor.model, models.reference
    reference.lm.lm_head.weight.data.mul_(0.5)
    kl = forward(policy, make_part([[5, 9]], [[7, 8, 9]]), 0.7, reference)[3][0]
    logp, ref_logp = (plain_logp(model.lm, [5, 9], [7, 8, 9], 0.7) for model in (policy, reference))
    close(kl, torch.nn.functional.kl_div(ref_logp, logp, log_target=True, reduction="none").sum(-1))
    assert kl.min() > 0.01


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_dropout_is_off_in_every_pass(critic, tmp_path):
    lm = make_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    models = make_models(make_config(save_folder(tmp_path / "m", lm), critic=critic, value_head_init="normal"))
    part = make_part([[5, 9, 30]], [[7, 8, 9]])
    for learner in filter(None, (models.actor, models.critic)):
        quiet, trained = (forward(learner.model.train(mode), part, 1.0) for mode in (False, True))
        assert all(torch.equal(x, y) for x, y in zip(quiet, trained, strict=True) if x is not None)
    lm.train()
    assert not torch.allclose(lm(torch.tensor([[5, 9, 30]])).logits, lm(torch.tensor([[5, 9, 30]])).logits)


# ---------------------------------------------------------------------------------------------------------------------
# The models.


@pytest.mark.parametrize(("ids", "expected"), [(1, {1}), ([1, 9], {1, 9}), (None, {1}), (9, {1, 9})])
def test_stop_tokens_come_from_tokenizer_and_generation_config(ids, expected, tmp_path, capsys):
    lm = make_lm()
    lm.generation_config.eos_token_id = ids
    config = make_config(save_folder(tmp_path / "m", lm))
    models = ppo_llm.build_models(make_tokenizer(), config)
    assert models.stop_ids == expected
    assert f"stop tokens: <|endoftext|>{' g' if 9 in expected else ''}\n" in capsys.readouterr().out


@pytest.mark.parametrize("special", [{"pad_token": "<|endoftext|>"}, {"pad_token": None}])
def test_a_tokenizer_without_a_pad_token_of_its_own_gives_the_same_rollout(special, folder, tmp_path):
    rollouts = []
    for tokenizer in (make_tokenizer(), make_tokenizer(**special)):
        config = make_config(folder, max_response_length=30)
        models = ppo_llm.build_models(tokenizer, config)
        rollouts.append(collect(models, config)[0])
    one, other = rollouts
    assert one.responses == other.responses and one.texts == other.texts
    assert any(response[-1] == 1 for response in one.responses)
    assert torch.equal(one.mask, other.mask) and torch.equal(one.advantages, other.advantages)


def test_no_model_is_loaded_that_nothing_uses(folder):
    assert make_models(make_config(folder, kl_ctrl_coef=0.0)).reference is None
    assert make_models(make_config(folder, reference="previous", use_kl_loss=True)).reference is None
    assert make_models(make_config(folder)).reference is not None
    assert make_models(make_config(folder, adv_estimator="grpo", rollout_n=2)).critic is None
    assert make_models(make_config(folder, adv_estimator="grpo", rollout_n=2)).actor.model.value_head is None
    assert make_models(make_config(folder, critic="shared")).critic is None
    assert make_models(make_config(folder)).critic is not None


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_without_a_kl_coefficient_training_works_and_logs_no_kl(estimator, folder):
    config = make_config(folder, kl_ctrl_coef=0.0, adv_estimator=estimator, rollout_n=2)
    metrics = take_steps(make_models(config), config)
    assert not any("reward/kl" in name for name in metrics)
    assert all(map(math.isfinite, metrics.values()))


def test_a_zero_value_head_says_zero_and_a_normal_one_does_not(folder):
    for init, zero in (("zero", True), ("normal", False)):
        config = make_config(folder, value_head_init=init)
        rollout, _ = collect(make_models(config), config)
        assert (not rollout.old_values.any()) == zero


# ---------------------------------------------------------------------------------------------------------------------
# The reference policy.


@pytest.mark.parametrize("kind", ["k1", "k3", "full"])
def test_the_first_kl_is_zero_when_the_reference_is_the_start(kind, folder):
    config = make_config(folder, kl_penalty=kind)
    rollout, metrics = collect(make_models(config), config)
    assert abs(metrics["reward/kl"]) < 1e-6 and rollout.kl.abs().max() < 1e-5


def test_training_moves_the_policy_and_not_the_reference(folder):
    config = make_config(folder, lr=1e-2)
    models = make_models(config)
    part = make_part([[5, 9]], [[7, 8, 9]])
    before, policy_before = (forward(m, part, 1.0)[0] for m in (models.reference, models.actor.model))
    take_steps(models, config, 2)
    assert torch.equal(forward(models.reference, part, 1.0)[0], before)
    assert (forward(models.actor.model, part, 1.0)[0] - policy_before).abs().max() > 1e-3
    assert collect(models, config)[1]["reward/kl"] > 1e-3


def test_the_kl_loss_does_not_reach_the_weights_of_the_reference(folder):
    config = make_config(folder, use_kl_loss=True, kl_loss_type="full", lr=1e-2)
    models = make_models(config)
    before = [p.clone() for p in models.reference.parameters()]
    take_steps(models, config, 2)
    assert all(map(torch.equal, before, models.reference.parameters()))


def test_reference_previous_is_the_policy_that_sampled(folder):
    config = make_config(folder, reference="previous", use_kl_loss=True)
    models = make_models(config)
    take_steps(models, config, 2)
    rollout, metrics = collect(models, config)
    assert torch.equal(rollout.ref_logprobs, rollout.old_logprobs) and metrics["reward/kl"] == 0


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_reference_mixed_mixes_the_probabilities_of_start_and_previous_policy(weight, folder):
    config = make_config(folder, reference="mixed", reference_mix=weight, use_kl_loss=True, lr=1e-2)
    models = make_models(config)
    take_steps(models, config, 2)
    rollout, _ = collect(models, config)
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        start, previous = (plain_logp(m.lm, prompt, response).gather(1, torch.tensor(response)[:, None])[:, 0].exp()
                           for m in (models.reference, models.actor.model))
        close(rollout.ref_logprobs[i, : len(response)].exp(), (1 - weight) * start + weight * previous)
    assert not rollout.ref_logprobs[rollout.mask == 0].any()


# ---------------------------------------------------------------------------------------------------------------------
# collect_rollout.


@pytest.fixture(scope="module")
def moved(folder):
    """A rollout of a policy that has left its reference, with a critic that has learned something."""
    config = make_config(folder, train_batch_size=16, max_response_length=9, lr=3e-3, kl_ctrl_coef=0.05, lam=0.9,
                         value_head_init="normal", critic_lr=1e-3)
    models = make_models(config)
    take_steps(models, config, 1)
    return config, models, *collect(models, config, step=5)


def test_the_mask_is_one_exactly_on_the_tokens_of_the_response(moved):
    _, models, rollout, _ = moved
    assert rollout.mask.sum(1).tolist() == [len(r) for r in rollout.responses]
    for row, response in zip(rollout.mask, rollout.responses, strict=True):
        assert row[: len(response)].all() and not models.stop_ids & set(response[:-1])
    lengths = set(map(len, rollout.responses))
    assert rollout.mask.shape[1] == max(lengths) and len(lengths) > 2


def test_every_tensor_of_a_rollout_is_zero_outside_the_mask(moved):
    rollout = moved[2]
    names = "old_logprobs ref_logprobs old_values kl rewards advantages returns ratio clipped".split()
    for name in names:
        x = getattr(rollout, name)
        assert x.dtype == torch.float32 and not x[rollout.mask == 0].any(), name


def test_rewards_are_the_score_on_the_last_token_minus_the_kl_of_each(moved):
    config, _, rollout, _ = moved
    for i, response in enumerate(rollout.responses):
        expected = -0.05 * rollout.kl[i]
        expected[len(response) - 1] += rollout.scores[i]
        close(rollout.rewards[i], expected)
    assert rollout.kl.abs().max() > 0.01 and 0 < rollout.scores.mean() < 1


def test_logged_numbers_are_those_of_the_rollouts_tensors(moved):
    config, models, rollout, metrics = moved
    lengths = torch.tensor([len(r) for r in rollout.responses])
    sums = (rollout.old_logprobs - rollout.ref_logprobs).sum(1)
    valid = rollout.mask > 0
    error, returns = (rollout.returns - rollout.old_values)[valid], rollout.returns[valid]
    expected = {"reward/kl": (sums / lengths).mean(), "reward/kl_sequence": sums.mean(), "reward/kl_coef": 0.05,
                "reward/score": rollout.scores.mean(), "reward/score_std": rollout.scores.std(correction=0),
                "rollout/response_length": lengths.float().mean(),
                "rollout/eos_rate": sum(r[-1] in models.stop_ids for r in rollout.responses) / 16,
                "value/explained_variance": 1 - error.var() / returns.var()}
    assert {name for name in metrics if "time/" not in name} == set(expected)
    for name, x in expected.items():
        assert float(metrics[name]) == pytest.approx(float(x), rel=1e-4, abs=1e-6), name
    assert 0 < metrics["rollout/eos_rate"] < 1


def test_ratio_is_one_and_clipped_zero_before_the_update(moved):
    rollout = moved[2]
    assert torch.equal(rollout.ratio, rollout.mask) and not rollout.clipped.any()


def test_old_values_are_those_of_the_critic(moved):
    config, models, rollout, _ = moved
    values = forward(models.critic.model, rollout, 1.0)[2]
    close(rollout.old_values, values)
    assert rollout.old_values.abs().max() > 0.1


def test_advantages_are_white_over_the_tokens_of_the_rollout(moved):
    rollout = moved[2]
    advantages = rollout.advantages[rollout.mask > 0]
    close(advantages.mean(), torch.tensor(0.0))
    close(advantages.var(), torch.tensor(1.0), 1e-4)


@pytest.mark.parametrize("micro", [{"ppo_micro_batch_size": 1}, {"micro_batch_tokens": 1}, {"ppo_micro_batch_size": 3}])
def test_a_rollout_does_not_depend_on_micro_batches(micro, folder):
    rollouts = []
    for changes in ({}, micro):
        config = make_config(folder, train_batch_size=16, value_head_init="normal", kl_penalty="full", **changes)
        rollouts.append(collect(make_models(config), config)[0])
    one, other = rollouts
    assert one.responses == other.responses
    for name in ("old_logprobs", "ref_logprobs", "old_values", "kl", "rewards", "advantages", "returns"):
        close(getattr(one, name), getattr(other, name))


def test_whitened_rewards_keep_their_mean_and_get_unit_variance(folder):
    rewards = []
    for whiten in (False, True):
        config = make_config(folder, train_batch_size=16, whiten_rewards=whiten)
        rollout, _ = collect(make_models(config), config)
        rewards.append(rollout.rewards[rollout.mask > 0])
    close(rewards[0].mean(), rewards[1].mean())
    close(rewards[1].var(), torch.tensor(1.0), 1e-4)
    assert rewards[0].var() < 0.5


def test_responses_that_are_a_single_stop_token_are_trained_on(folder):
    config = make_config(folder)
    models = make_models(config)
    models.stop_ids = set(range(64))
    rollout, metrics = collect(models, config)
    assert rollout.mask.shape == (8, 1) and metrics["rollout/eos_rate"] == 1
    assert all(map(math.isfinite, take_steps(models, config).values()))


def test_responses_that_never_stop_are_full_length_and_count_as_cut(folder):
    config = make_config(folder, missing_eos_penalty=0.25, kl_ctrl_coef=0.0)
    models = make_models(config)
    models.stop_ids = set()
    rollout, metrics = collect(models, config)
    assert rollout.mask.shape == (8, 8) and rollout.mask.all() and metrics["rollout/eos_rate"] == 0
    close(rollout.rewards.sum(1), rollout.scores - 0.25)
    examples = [Example("", "", prompt) for prompt in rollout.prompts]
    samples = ppo_llm.evaluate(models, lambda *args: [0.0] * 8, examples, config)[1]
    assert [(x["stop_reason"], x["truncated"]) for x in samples] == [("length", True)] * 2


def test_only_responses_that_lack_every_stop_token_are_penalised(folder):
    config = make_config(folder, train_batch_size=16, missing_eos_penalty=5.0, kl_ctrl_coef=0.0)
    models = make_models(config)
    rollout, _ = collect(models, config)
    cut = [5.0 * (response[-1] not in models.stop_ids) for response in rollout.responses]
    assert {0.0, 5.0} == set(cut) and any(r[-1] in range(20, 30) for r in rollout.responses)
    close(rollout.rewards.sum(1), rollout.scores - torch.tensor(cut))


@pytest.mark.parametrize("reference", ["init", "mixed"])
def test_every_logprob_of_a_rollout_is_divided_by_the_temperature(reference, folder):
    config = make_config(folder, temperature=0.7, reference=reference)
    models = make_models(config)
    rollout, _ = collect(models, config)
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        expected = plain_logp(models.actor.model.lm, prompt, response, 0.7).gather(1, torch.tensor(response)[:, None])
        close(rollout.old_logprobs[i, : len(response)], expected[:, 0])
        close(rollout.ref_logprobs[i, : len(response)], expected[:, 0])


def test_bf16_logprobs_come_from_the_updates_kind_of_pass_in_fp32(folder):
    config = make_config(folder, dtype="bfloat16")
    models = make_models(config)
    rollout, metrics = collect(models, config)
    assert rollout.old_logprobs.dtype == torch.float32 and 0 < metrics["rollout/logprob_gap"] < 2e-2
    ratio = (forward(models.actor.model, rollout, 1.0)[0] - rollout.old_logprobs).exp()
    close(ratio, torch.ones_like(ratio), 2e-2)


def test_without_a_critic_a_rollout_in_bf16_has_no_values(folder):
    config = make_config(folder, dtype="bfloat16", adv_estimator="grpo", rollout_n=2)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    assert "rollout/logprob_gap" in metrics and rollout.old_values is None
    assert ppo_llm.describe(rollout, "train", models, config)[0]["value"] is None
