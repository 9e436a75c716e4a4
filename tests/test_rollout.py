"""Sampling, log-probs, values, the reference policy, a rollout hook, and what collect_rollout makes of them."""

import functools
import math
from pathlib import Path

import numpy
import pytest
import torch
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
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

import ppo_llm
from ppo_llm import Config, Example, LanguageModel, Rollout, forward, generate

STOP = {1, *range(20, 34)}


def make_policy(**config) -> LanguageModel:
    policy = LanguageModel(make_lm(), 64, True, Config(**config))
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


@functools.cache
def shared_policy() -> LanguageModel:
    """For tests that do not change it."""
    return make_policy()


def make_part(prompts: list, responses: list, **tensors) -> Rollout:
    mask = pad_sequence([torch.ones(len(r)) for r in responses], batch_first=True)
    return Rollout(prompts, responses, mask, mask * 0, **tensors)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_logp(lm, prompt: list, response: list, temperature: float = 1.0, size: int = 64) -> torch.Tensor:
    """Log-probabilities [T, V] of every token at every position of one response, by one ordinary pass."""
    with torch.no_grad():
        logits = plain(lm)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :size]
    return (logits / temperature).log_softmax(-1)


def plain_logprobs(lm, prompt: list, response: list, temperature: float = 1.0, size: int = 64) -> torch.Tensor:
    """Those [T] of the response's own tokens."""
    logp = plain_logp(lm, prompt, response, temperature, size)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]


def close(x, y, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def count_tokens(policy: LanguageModel) -> list[tuple[int, int]]:
    """Rows and columns of every pass from now on."""
    shapes = []
    embedding = policy.lm.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    return shapes


# ---------------------------------------------------------------------------------------------------------
# Tokens.


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_tokens_are_those_of_transformers_generate(slots):
    policy = shared_policy()
    prompts = make_prompts(7, longest=20)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = plain(policy.lm).generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=12, do_sample=False,
                                        eos_token_id=sorted(STOP), pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    assert len(set(map(len, expected))) > 1  # some rows leave the batch before others
    config = Config(rollout_slots=slots, max_response_length=12)
    assert generate(policy, prompts, STOP, config, None)[0] == expected


def test_each_token_lies_where_its_own_random_number_points():
    policy = shared_policy()
    prompts = make_prompts(7)
    config = Config(max_response_length=9, rollout_slots=3, temperature=0.8)
    responses, _ = generate(policy, prompts, STOP, config, noise())
    points = torch.rand(7, 9, generator=noise())
    for row, prompt, response in zip(points, prompts, responses, strict=True):
        cumulated = plain_logp(policy.lm, prompt, response, 0.8).exp().cumsum(-1)
        for t, token in enumerate(response):
            below = cumulated[t, token - 1].item() if token else 0.0
            assert below - 1e-5 <= row[t].item() <= cumulated[t, token].item() + 1e-5


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_is_sampled_does_not_depend_on_slots(count):
    policy = shared_policy()
    prompts = make_prompts(count, longest=20)
    expected = generate(policy, prompts, STOP, Config(max_response_length=9), noise())
    for slots in (1, 2, 3, 5):
        config = Config(rollout_slots=slots, max_response_length=9)
        tokens, logprobs = generate(policy, prompts, STOP, config, noise())
        assert tokens == expected[0]
        for x, y in zip(logprobs, expected[1], strict=True):
            close(x, y)


def test_what_is_sampled_for_a_prompt_does_not_depend_on_the_prompts_after_it_or_on_when_others_end():
    policy = shared_policy()
    prompts = make_prompts(9, longest=20)
    config = Config(max_response_length=9, rollout_slots=4)
    tokens, _ = generate(policy, prompts, STOP, config, noise())
    assert generate(policy, prompts[:4], STOP, config, noise())[0] == tokens[:4]
    others = [*prompts[:4], *make_prompts(5, seed=9, longest=3)]
    assert generate(policy, others, STOP, config, noise())[0][:4] == tokens[:4]
    longer, _ = generate(policy, prompts, set(), config, noise())
    assert [x[: len(y)] for x, y in zip(longer, tokens, strict=True)] == tokens
    assert set(map(len, longer)) == {9} != set(map(len, tokens))


def test_equal_prompts_get_random_numbers_of_their_own():
    tokens, _ = generate(shared_policy(), [[5, 9]] * 8, STOP, Config(max_response_length=9), noise())
    assert len(set(map(tuple, tokens))) > 4


def test_the_tokens_of_a_step_are_a_function_of_seed_and_step(folder):
    responses = {}
    for seed, step, slots in ((1, 0, 256), (1, 0, 3), (1, 1, 256), (2, 0, 256)):
        config = make_config(folder, seed=seed, rollout_slots=slots)
        models = make_models(config)
        prompts = [Example("", "", prompt) for prompt in make_prompts(8)]
        rollout, _ = ppo_llm.collect_rollout(models, lambda *texts: [0.0] * 8, prompts, step, 0.0, config)
        responses[seed, step, slots] = rollout.responses
    first = responses[1, 0, 256]
    assert responses[1, 0, 3] == first
    assert responses[1, 1, 256] != first
    assert responses[2, 0, 256] != first


def test_rows_that_have_ended_leave_the_batch_and_the_last_one_ends_the_pass():
    counter = make_counter()
    shapes = count_tokens(counter)
    prompts = [[29 - n] for n in (1, 5, 3, 7, 1)]
    tokens, _ = generate(counter, prompts, {30}, Config(max_response_length=20), None)
    assert [len(x) for x in tokens] == [2, 6, 4, 8, 2]
    assert [rows for rows, _ in shapes] == [5, 5, 3, 3, 2, 2, 1, 1]
    assert {columns for _, columns in shapes} == {1}


def test_prompts_of_similar_length_share_a_batch():
    policy = make_policy()
    shapes = count_tokens(policy)
    prompts = [[5] * n for n in (9, 2, 8, 1, 2)]
    generate(policy, prompts, STOP, Config(max_response_length=1, rollout_slots=2), noise())
    assert shapes == [(2, 2), (2, 8), (1, 9)]


def test_a_response_of_one_token_and_a_limit_of_one_token_work():
    policy = shared_policy()
    prompts = make_prompts(5)
    everything = set(range(64))
    for stop_ids, limit in ((everything, 8), (STOP, 1), (everything, 1)):
        config = Config(max_response_length=limit, rollout_slots=2)
        tokens, logprobs = generate(policy, prompts, stop_ids, config, noise())
        assert [len(x) for x in tokens] == [1] * 5 == [len(x) for x in logprobs]


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
    policy = shared_policy()
    count = 4000
    config = Config(max_response_length=1, temperature=temperature, rollout_slots=count)
    tokens, _ = generate(policy, [[5, 9, 40]] * count, STOP, config, noise())
    seen = torch.bincount(torch.tensor(tokens)[:, 0], minlength=64) / count
    right, wrong = (plain_logp(policy.lm, [5, 9, 40], [0], t)[0].exp() for t in (temperature, 1.5 - temperature))
    slack = 4 * (right * (1 - right) / count).sqrt() + 1e-3
    assert ((seen - right).abs() < slack).all()
    assert ((seen - wrong).abs() > slack).any()


def test_the_models_generation_config_does_not_shape_sampling():
    policy = make_policy()
    prompts = make_prompts(6)
    config = Config(max_response_length=10)
    expected = generate(policy, prompts, STOP, config, noise())
    policy.lm.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=2, top_p=0.5, repetition_penalty=1.5, min_new_tokens=5, eos_token_id=[1])
    tokens, logprobs = generate(policy, prompts, STOP, config, noise())
    assert tokens == expected[0]
    assert all(map(torch.equal, logprobs, expected[1]))


def test_sampling_depends_on_the_generator_alone():
    policy = shared_policy()
    prompts = make_prompts(6)
    config = Config(max_response_length=10)
    first, second, other = (generate(policy, prompts, STOP, config, noise(seed))[0] for seed in (1, 1, 2))
    assert first == second != other


# ---------------------------------------------------------------------------------------------------------
# Log-probs, entropy, values.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampling_and_of_training_are_those_of_a_plain_pass(temperature):
    policy = shared_policy()
    prompts = make_prompts(7, longest=20)
    config = Config(max_response_length=12, temperature=temperature, rollout_slots=4)
    responses, sampled = generate(policy, prompts, STOP, config, noise())
    outputs = forward(policy, make_part(prompts, responses), config)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        n = len(response)
        logp = plain_logp(policy.lm, prompt, response, temperature)
        expected = plain_logprobs(policy.lm, prompt, response, temperature)
        close(sampled[i], expected)
        close(outputs["logprobs"][i, :n], expected)
        close(outputs["entropy"][i, :n], torch.distributions.Categorical(logits=logp).entropy())
        with torch.no_grad():
            out = plain(policy.lm)(torch.tensor([prompt + response]), output_hidden_states=True)
            states = out.hidden_states[-1][0, len(prompt) - 1 : -1]
            close(outputs["values"][i, :n], policy.value_head(states)[:, 0])
        for x in outputs.values():
            assert not x[i, n:].any()
    assert set(outputs) == {"logprobs", "entropy", "values"}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_forward_pass_does_not_depend_on_padding_order_or_company(pooling):
    policy = make_policy(value_pooling=pooling)
    config = Config(temperature=0.8)
    prompts = make_prompts(9)
    responses = [[7 + i] * (1 + i) for i in range(9)]
    together = forward(policy, make_part(prompts, responses), config)
    backwards = forward(policy, make_part(prompts[::-1], responses[::-1]), config)
    for i in range(9):
        alone = forward(policy, make_part([prompts[i]], [responses[i]]), config)
        for name, x in together.items():
            close(x[i, : i + 1], alone[name][0])
            close(x[i, : i + 1], backwards[name][8 - i, : i + 1])


def test_only_values_runs_no_head_over_the_vocabulary(monkeypatch):
    policy = make_policy()
    part = make_part([[5, 9]], [[7, 8]])
    expected = forward(policy, part, Config())["values"]
    monkeypatch.setattr(policy, "logits", None)
    outputs = forward(policy, part, Config(), only_values=True)
    assert list(outputs) == ["values"]
    assert torch.equal(outputs["values"], expected)


@pytest.mark.parametrize("budget", [1, 40, 65, 200, 10**6])
def test_micro_batches_are_rectangles_within_the_budget_and_a_fifth_of_a_row_may_be_padding(budget):
    prompts = make_prompts(40, longest=30)
    responses = [[7] * (1 + 7 * i % 19) for i in range(40)]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    rows = list(range(2, 40))
    seen = []
    for group, part in ppo_llm.micro_batches(rows, make_part(prompts, responses), Config(micro_batch_tokens=budget)):
        found = [lengths[i] for i in group]
        assert len(group) == 1 or len(group) * max(found) <= budget
        assert max(found) <= 1.25 * min(found)
        assert part.responses == [responses[i] for i in group]
        assert part.mask.shape == (len(group), max(len(responses[i]) for i in group))
        seen += group
    assert sorted(seen) == rows


def test_micro_batches_are_as_few_as_the_budget_and_the_rule_of_similar_lengths_allow():
    part = make_part([[5] * n for n in (7, 11, 8, 9, 10, 19)], [[7]] * 6)
    for budget, expected in ((10**6, [[0, 2, 3], [4, 1], [5]]), (20, [[0, 2], [3], [4], [1], [5]])):
        config = Config(micro_batch_tokens=budget)
        assert [group for group, _ in ppo_llm.micro_batches(list(range(6)), part, config)] == expected


def test_taking_rows_takes_all_that_belongs_to_them_and_cuts_the_padding():
    part = make_part([[5], [6], [7]], [[8] * 5, [9], [10, 11]], scores=torch.tensor([1.0, 2.0, 3.0]))
    part.stopped = torch.tensor([True, False, True])
    part.old_values = torch.arange(15.0).view(3, 5)
    part.texts = ["a", "b", "c"]
    part.examples = [Example(text, "", []) for text in part.texts]
    taken = part.take([2, 1])
    assert taken.prompts == [[7], [6]] and taken.responses == [[10, 11], [9]]
    assert taken.mask.tolist() == [[1, 1], [1, 0]]
    assert taken.old_values.tolist() == [[10, 11], [5, 6]]
    assert taken.scores.tolist() == [3, 2] and taken.stopped.tolist() == [True, False]
    assert taken.texts == ["c", "b"] == [example.text for example in taken.examples]
    assert taken.returns is None and part.mask.shape == (3, 5)


def test_mean_pooling_gives_the_value_of_the_mean_of_all_states_so_far():
    policy = make_policy(value_pooling="mean")
    prompt, response = [5, 9, 12], [7, 8, 9]
    values = forward(policy, make_part([prompt], [response]), Config())["values"][0]
    out = plain(policy.lm)(torch.tensor([prompt + response]), output_hidden_states=True)
    states = out.hidden_states[-1][0]
    close(values, torch.stack([policy.value_head(states[: 3 + t].mean(0))[0] for t in range(3)]))


def test_ids_beyond_the_tokenizer_are_no_part_of_the_policy(tmp_path):
    lm = make_lm()
    lm.lm_head.weight.data[40:] = lm.lm_head.weight.data[:24] * 5  # likelier than any real token
    folder = save_folder(tmp_path / "m", lm, make_tokenizer(40))
    config = make_config(folder, max_response_length=20, kl_penalty="full")
    models = make_models(config)
    assert plain_logp(lm, [5, 9], [0])[0].argmax() >= 40
    rollout, metrics = collect(models, config)
    assert max(t for response in rollout.responses for t in response) < 40
    for prompt, response, logprobs in zip(rollout.prompts, rollout.responses, rollout.old_logprobs, strict=True):
        close(logprobs[: len(response)], plain_logprobs(lm, prompt, response, size=40))
    greedy, _ = generate(models.actor.model, [[5, 9]] * 2, {1}, config, None)
    assert max(map(max, greedy)) < 40


def test_the_head_in_chunks_gives_the_same_numbers_and_gradients(folder, monkeypatch):
    config = make_config(folder, kl_penalty="full", critic="shared", temperature=0.7)
    models = make_models(config)
    policy, reference = models.actor.model, models.reference
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise()))
    part = make_part(make_prompts(5), [[7 + i] * (1 + i) for i in range(5)])
    results = {}
    for size in (2**26, 64 * 4, 1):
        monkeypatch.setattr(ppo_llm, "LOGITS_PER_CHUNK", size)
        policy.zero_grad()
        outputs = forward(policy, part, config, reference)
        assert set(outputs) == {"logprobs", "entropy", "values", "kl"}
        sum((x * torch.arange(1, 6)).sum() for x in outputs.values()).backward()
        results[size] = [*outputs.values(), *(p.grad for p in policy.parameters())]
    for size in (64 * 4, 1):
        for x, y in zip(results[size], results[2**26], strict=True):
            close(x, y)


def test_the_head_never_sees_more_tokens_than_a_chunk(folder, monkeypatch):
    config = make_config(folder)
    policy = make_models(config).actor.model
    rows = []
    monkeypatch.setattr(ppo_llm, "LOGITS_PER_CHUNK", 64 * 3)
    real = policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden, temperature: (rows.append(len(hidden)), real(hidden, 1.0))[1])
    forward(policy, make_part([[5], [6]], [[7] * 5, [8] * 2]), config)
    assert rows == [3, 3, 1]


def test_full_kl_is_the_sum_over_the_vocabulary(folder):
    config = make_config(folder, kl_penalty="full", temperature=0.7)
    models = make_models(config)
    policy, reference = models.actor.model, models.reference
    reference.lm.lm_head.weight.data.mul_(0.5)
    kl = forward(policy, make_part([[5, 9]], [[7, 8, 9]]), config, reference)["kl"][0]
    logp, ref_logp = (plain_logp(model.lm, [5, 9], [7, 8, 9], 0.7) for model in (policy, reference))
    close(kl, torch.nn.functional.kl_div(ref_logp, logp, log_target=True, reduction="none").sum(-1))
    assert kl.min() > 0.01


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_dropout_is_off_in_every_pass(critic, tmp_path):
    lm = make_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    config = make_config(save_folder(tmp_path / "m", lm), critic=critic)
    models = make_models(config)
    metrics = take_steps(models, config)
    assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-6)
    assert metrics["reward/kl"].abs() < 1e-6
    part = make_part([[5, 9, 30]], [[7, 8, 9]])
    for learner in filter(None, (models.actor, models.critic)):
        once, twice = (forward(learner.model, part, config) for _ in range(2))
        assert all(torch.equal(once[name], twice[name]) for name in once)
    lm.train()
    assert not torch.allclose(lm(torch.tensor([[5, 9, 30]])).logits, lm(torch.tensor([[5, 9, 30]])).logits)


# ---------------------------------------------------------------------------------------------------------
# The models.


@pytest.mark.parametrize(("ids", "expected"), [(1, {1}), ([1, 9], {1, 9}), (None, {1}), (9, {1, 9})])
def test_stop_tokens_come_from_tokenizer_and_generation_config(ids, expected, folder, capsys):
    lm = make_lm()
    lm.generation_config.eos_token_id = ids
    assert ppo_llm.find_stop_ids(lm, make_tokenizer()) == expected
    tokens = ["<|endoftext|>", "g"] if 9 in expected else ["<|endoftext|>"]
    assert capsys.readouterr().out == f"stop tokens: {tokens}\n"


@pytest.mark.parametrize(("around", "stops"), [
    (("<|im_start|>", "<|im_end|>\n"), True),  # ChatML on a base model, whose eos is <|endoftext|>
    (("<|im_start|>", " <|im_end|>"), True),
    (("<|im_start|>", "\n"), False),
    (("<|im_start|>", "z"), False),  # ordinary text
    (("<|im_start|>", ""), False),
])
def test_the_special_token_that_the_chat_template_puts_after_a_turn_is_a_stop_token(around, stops, capsys):
    tokenizer = make_tokenizer(60)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    turn = f"'{around[0]}' + m['role'] + m['content'] + {around[1]!r}"
    tokenizer.chat_template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ppo_llm.find_stop_ids(make_lm(), tokenizer) == ({1, end} if stops else {1})
    assert ("<|im_end|>" in capsys.readouterr().out) == stops


def test_a_tokenizer_without_a_chat_template_stops_at_eos(folder):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert ppo_llm.find_stop_ids(make_lm(), tokenizer) == {1}


@pytest.mark.parametrize("special", [{"pad_token": "<|endoftext|>"}, {"pad_token": None}])
def test_a_tokenizer_without_a_pad_token_of_its_own_gives_the_same_rollout(special, folder):
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


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_fresh_value_head_says_zero(critic, folder):
    config = make_config(folder, critic=critic)
    assert not collect(make_models(config), config)[0].old_values.any()


# ---------------------------------------------------------------------------------------------------------
# The reference policy.


@pytest.mark.parametrize("kind", ["k1", "k3", "full"])
def test_the_first_kl_is_zero_when_the_reference_is_the_start(kind, folder):
    config = make_config(folder, kl_penalty=kind)
    rollout, metrics = collect(make_models(config), config)
    assert abs(metrics["reward/kl"]) < 1e-6 and rollout.kl.abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_policy_and_not_the_reference(checkpointing, folder):
    config = make_config(folder, lr=1e-2, gradient_checkpointing=checkpointing)
    models = make_models(config)
    part = make_part([[5, 9]], [[7, 8, 9]])
    roles = (models.reference, models.actor.model)
    before, policy_before = (forward(model, part, config)["logprobs"].detach() for model in roles)
    take_steps(models, config, 2)
    after, policy_after = (forward(model, part, config)["logprobs"].detach() for model in roles)
    assert torch.equal(after, before)
    assert (policy_after - policy_before).abs().max() > 1e-3
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
        start = plain_logprobs(models.reference.lm, prompt, response).exp()
        previous = plain_logprobs(models.actor.model.lm, prompt, response).exp()
        close(rollout.ref_logprobs[i, : len(response)].exp(), (1 - weight) * start + weight * previous)
    assert not rollout.ref_logprobs[rollout.mask == 0].any()


# ---------------------------------------------------------------------------------------------------------
# collect_rollout.


@pytest.fixture(scope="module")
def moved(folder):
    """A rollout of a policy that has left its reference, with a critic that has learned something."""
    config = make_config(folder, train_batch_size=16, max_response_length=9, lr=3e-3, kl_ctrl_coef=0.05, lam=0.9,
                         critic_lr=1e-3)
    models = make_models(config)
    torch.nn.init.normal_(models.critic.model.value_head.weight, generator=noise())
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
                "rollout/tokens": lengths.sum() + sum(map(len, rollout.prompts)),
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
    close(rollout.old_values, forward(models.critic.model, rollout, config)["values"])
    assert rollout.old_values.abs().max() > 0.1


def test_advantages_are_white_over_the_tokens_of_the_rollout(moved):
    rollout = moved[2]
    advantages = rollout.advantages[rollout.mask > 0]
    close(advantages.mean(), torch.tensor(0.0))
    close(advantages.var(), torch.tensor(1.0), 1e-4)


@pytest.mark.parametrize("budget", [1, 30])
def test_a_rollout_does_not_depend_on_micro_batches(budget, folder):
    rollouts = []
    for changes in ({}, {"micro_batch_tokens": budget}):
        config = make_config(folder, train_batch_size=16, kl_penalty="full", **changes)
        models = make_models(config)
        torch.nn.init.normal_(models.critic.model.value_head.weight, generator=noise())
        rollouts.append(collect(models, config)[0])
    one, other = rollouts
    assert one.responses == other.responses
    for name in ("old_logprobs", "ref_logprobs", "old_values", "kl", "rewards", "advantages", "returns"):
        close(getattr(one, name), getattr(other, name))


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
    samples = ppo_llm.evaluate(models, lambda *texts: [0.0] * 8, examples, 0.0, config)[1]
    assert [(x["stop_reason"], x["truncated"]) for x in samples] == [("length", True)] * 4


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
        expected = plain_logprobs(models.actor.model.lm, prompt, response, 0.7)
        close(rollout.old_logprobs[i, : len(response)], expected)
        close(rollout.ref_logprobs[i, : len(response)], expected)


def test_without_a_critic_a_rollout_has_no_values(folder):
    config = make_config(folder, adv_estimator="grpo", rollout_n=2)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    assert rollout.old_values is None and "value/explained_variance" not in metrics
    assert ppo_llm.describe_samples(rollout, "train", 1, models)[0]["value"] is None


@pytest.mark.parametrize("greedy", [False, True])
def test_probabilities_that_are_not_finite_give_valid_tokens_and_an_error_instead_of_a_crash(greedy, folder):
    config = make_config(folder)
    models = make_models(config)
    lm = models.actor.model.lm
    lm.lm_head.weight.data[7] = math.nan  # one NaN makes the whole softmax NaN
    tokens, _ = generate(models.actor.model, make_prompts(5), STOP, config, None if greedy else noise())
    assert all(0 <= token < 64 for response in tokens for token in response)
    with pytest.raises(ppo_llm.Diverged, match="old_logprobs are not finite"):
        collect(models, config)


def test_values_that_are_not_finite_are_an_error(folder):
    config = make_config(folder)
    models = make_models(config)
    models.critic.model.value_head.weight.data[0, 3] = math.inf
    with pytest.raises(ppo_llm.Diverged, match="old_values are not finite"):
        collect(models, config)


# ---------------------------------------------------------------------------------------------------------
# Old log-probs that are scored anew: bf16, and a rollout hook.


def test_in_fp32_the_samplers_logprobs_are_the_old_ones_and_the_first_ratio_is_one(folder):
    config = make_config(folder, temperature=0.7)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    assert not any("logprob_gap" in name for name in metrics) and rollout.is_weights is None
    scored = ppo_llm.score_tokens(models.actor.model, rollout, config)["logprobs"]
    close(scored, rollout.old_logprobs, 2e-6)
    found = ppo_llm.update("actor", models, rollout, 0, 3, 0.001, config)
    assert found["policy/ratio_first"] == pytest.approx(1, abs=2e-6)


def test_bf16_logprobs_come_from_the_updates_kind_of_pass_in_fp32(folder):
    config = make_config(folder, dtype="bfloat16")
    models = make_models(config)
    rollout, metrics = collect(models, config)
    assert rollout.old_logprobs.dtype == torch.float32 and 0 < metrics["rollout/logprob_gap"] < 2e-2
    assert 0.9 < metrics["rollout/is_weight_mean"] < 1.1 and metrics["rollout/is_capped"] == 0
    ratio = (forward(models.actor.model, rollout, config)["logprobs"] - rollout.old_logprobs).exp()
    close(ratio, torch.ones_like(ratio), 2e-2)


HOOK = """
import torch
import ppo_llm

calls = []

def generate(model, prompts, stop_ids, config, generator):
    calls.append((model, prompts, stop_ids, config, generator))
    responses, logprobs = ppo_llm.generate(model, prompts, stop_ids, config, generator)
    return responses, [x - OFFSET for x in logprobs]

def lists(model, prompts, stop_ids, config, generator):
    responses, logprobs = generate(model, prompts, stop_ids, config, generator)
    return responses, [x.tolist() for x in logprobs]

def broken(model, prompts, stop_ids, config, generator):
    raise KeyError("the engine is gone")
"""


def hook_config(folder: Path, tmp_path: Path, offset: float = 0.0, name: str = "generate", **changes) -> Config:
    path = tmp_path / "hook.py"
    path.write_text(HOOK.replace("OFFSET", str(offset)))
    return make_config(folder, rollout=f"{path}:{name}", **changes)


@pytest.mark.parametrize("name", ["generate", "lists"])
def test_a_hook_gets_token_ids_and_its_responses_are_trained_on(name, folder, tmp_path):
    config = hook_config(folder, tmp_path, name=name)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    builtin, _ = collect(make_models(make_config(folder)), make_config(folder))
    assert rollout.responses == builtin.responses
    assert metrics["rollout/logprob_gap"] < 1e-6
    close(rollout.is_weights, torch.ones_like(rollout.mask))
    calls = ppo_llm.sys.modules["rollout_hook"].calls
    assert calls[-1][0] is models.actor.model
    assert calls[-1][1:4] == (rollout.prompts, models.stop_ids, config)
    assert isinstance(calls[-1][4], torch.Generator)


def test_the_greedy_evaluation_gives_a_hook_no_generator(folder, tmp_path):
    config = hook_config(folder, tmp_path)
    models = make_models(config)
    examples = [Example("", "", prompt) for prompt in make_prompts(5)]
    ppo_llm.evaluate(models, lambda *texts: [0.0] * 5, examples, 0.001, config)
    assert ppo_llm.sys.modules["rollout_hook"].calls[-1][4] is None


@pytest.mark.parametrize(("cap", "offset"), [(2.0, 0.5), (2.0, 1.0), (1.2, 0.5), (2.0, -0.5)])
def test_the_logprobs_of_a_hook_are_scored_anew_and_their_tokens_weighted(cap, offset, folder, tmp_path):
    config = hook_config(folder, tmp_path, offset, rollout_is_cap=cap)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    probability = rollout.old_logprobs.exp()[rollout.mask > 0]
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        close(rollout.old_logprobs[i, : len(response)], plain_logprobs(models.actor.model.lm, prompt, response))
    weight = min(math.exp(offset), cap)
    close(rollout.is_weights[rollout.mask > 0], torch.full_like(probability, weight))
    gap = (probability - probability * math.exp(-offset)).abs().mean()
    expected = {"rollout/logprob_gap": gap, "rollout/is_weight_mean": weight, "rollout/is_weight_max": weight,
                "rollout/is_capped": float(weight == cap)}
    for name, x in expected.items():
        assert float(metrics[name]) == pytest.approx(float(x), rel=1e-4), name
    part = rollout.take([0, 1])
    weighted = ppo_llm.ppo_loss("actor", models, part, 0.0, config)[1]["policy/loss"]
    part.is_weights = None
    close(weighted, weight * ppo_llm.ppo_loss("actor", models, part, 0.0, config)[1]["policy/loss"])
    assert weighted.abs().max() > 0


def test_without_a_cap_the_tokens_of_a_hook_are_not_weighted(folder, tmp_path):
    config = hook_config(folder, tmp_path, 0.5, rollout_is_cap=None)
    rollout, metrics = collect(make_models(config), config)
    assert rollout.is_weights is None
    assert [name for name in metrics if "is_" in name] == [] and metrics["rollout/logprob_gap"] > 0.01


@pytest.mark.parametrize(("responses", "logprobs", "sentence"), [
    ([[5]], [[0.0]], "1 responses, 1 log-probs, 2 prompts"),
    ([[5], [6], [7]], [[0.0]] * 3, "3 responses, 3 log-probs, 2 prompts"),
    ([[5], [6]], [[0.0]], "2 responses, 1 log-probs, 2 prompts"),
    ([[5], []], [[0.0], []], "response 1 has 0 tokens and 0 log-probs, not 1 to 8 of both"),
    ([[5] * 9, [6]], [[0.0] * 9, [0.0]], "response 0 has 9 tokens and 9 log-probs, not 1 to 8 of both"),
    ([[5, 6], [6]], [[0.0], [0.0]], "response 0 has 2 tokens and 1 log-probs, not 1 to 8 of both"),
    ([[5], [64]], [[0.0], [0.0]], "response 1 has a token outside 0 to 63"),
    ([[5, -1], [6]], [[0.0] * 2, [0.0]], "response 0 has a token outside 0 to 63"),
    ([[5], [6]], [[0.0], [math.nan]], "response 1 has a log-prob that is not finite"),
    ([[5, 6], [6]], [[0.0, -math.inf], [0.0]], "response 0 has a log-prob that is not finite"),
])
def test_what_a_hook_returns_wrongly_is_one_sentence(responses, logprobs, sentence, folder, tmp_path):
    config = hook_config(folder, tmp_path)
    models = make_models(config)
    examples = [Example("", "", [5]), Example("", "", [6])]
    for wrap in (list, torch.tensor):
        models.generate = lambda *given, wrap=wrap: (responses, [wrap(x) for x in logprobs])
        with pytest.raises(ppo_llm.UsageError, match=sentence):
            ppo_llm.respond(models, examples, config, noise())


def test_what_a_hook_raises_is_not_swallowed(folder, tmp_path):
    config = hook_config(folder, tmp_path, name="broken")
    with pytest.raises(KeyError, match="the engine is gone"):
        collect(make_models(config), config)


@pytest.mark.parametrize("spec", ["nothing.py:generate", "{hook}:nothing", "{hook}"])
def test_a_hook_that_cannot_be_loaded_is_one_sentence(spec, folder, tmp_path, capsys):
    config = hook_config(folder, tmp_path)
    config.rollout = spec.format(hook=tmp_path / "hook.py")
    with pytest.raises(ppo_llm.UsageError, match="^rollout .*(cannot be loaded: |there is no file)"):
        make_models(config)


def test_tokens_of_a_hook_may_be_arrays_of_any_library(folder, tmp_path):
    config = hook_config(folder, tmp_path)
    models = make_models(config)
    examples = [Example("", "", [5, 6]), Example("", "", [6])]
    for wrap in (list, numpy.array, torch.tensor):
        models.generate = lambda *given, wrap=wrap: ([wrap([7, 8]), wrap([9])], [[-1.0, -1.0], [-2.0]])
        rollout = ppo_llm.respond(models, examples, config, noise())
        assert rollout.responses == [[7, 8], [9]] and type(rollout.responses[0][0]) is int


def test_a_hook_samples_without_gradients_in_training_and_in_evaluation(folder, tmp_path):
    config = hook_config(folder, tmp_path)
    models = make_models(config)
    seen = []

    def generate(*given):
        seen.append(torch.is_grad_enabled())
        return [[7]], [[-1.0]]

    models.generate = generate
    ppo_llm.respond(models, [Example("", "", [5])], config, noise())
    ppo_llm.evaluate(models, lambda examples, responses: [0.0], [Example("", "", [5])], 0.0, config)
    assert seen == [False, False]
