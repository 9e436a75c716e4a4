"""The update: numbers that do not depend on layout, the optimizer, the critic, and whether anything is learned."""

import dataclasses
import itertools
import math

import pytest
import torch
import transformers
from conftest import collect, make_config, make_lm, make_models, read_log, save_folder, take_steps

import ppo_llm
from ppo_llm import (
    Diverged,
    Learner,
    Rollout,
    forward,
    loss_weights,
    micro_batches,
    ppo_loss,
    train_mini_batch,
    update,
)

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
FREE = ["grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
pytestmark = pytest.mark.usefixtures("no_figures")


def weights_of(learner: Learner) -> list:
    return [w.detach().clone() for w in learner.masters]


def same(x: list, y: list) -> bool:
    return all(map(torch.equal, x, y))


@pytest.fixture
def steps(monkeypatch) -> list:
    """(learner, learning rates of its groups, weights) after every optimizer step."""
    kept, real = [], Learner.step

    def step(learner, lr_factor, grad_norm):
        real(learner, lr_factor, grad_norm)
        kept.append((learner, [g["lr"] for g in learner.optimizer.param_groups], weights_of(learner)))

    monkeypatch.setattr(Learner, "step", step)
    return kept


def make_models_with_values(config: ppo_llm.Config) -> ppo_llm.Models:
    """Models whose value head is random: one that says 0 would hide what happens to values."""
    models = make_models(config)
    model = (models.critic or models.actor).model
    torch.nn.init.normal_(model.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return models


def stale(rollout: Rollout) -> Rollout:
    """As after some updates: ratios, KLs and value errors on both sides of every clip."""
    noise, shape = torch.Generator().manual_seed(0), rollout.mask.shape
    for name in ("old_logprobs", "ref_logprobs", "old_values", "returns", "advantages"):
        x = getattr(rollout, name)
        if x is not None:
            setattr(rollout, name, x + torch.randn(shape, generator=noise) * rollout.mask)
    return rollout


def check_equal(results: list) -> None:
    """The first (gradients, metrics) and each other one agree."""
    (gradients, metrics), *others = results
    for other_gradients, other_metrics in others:
        assert {n for n in metrics if "time/" not in n} == {n for n in other_metrics if "time/" not in n}
        for name, x in metrics.items():
            if "time/" not in name:
                assert other_metrics[name] == pytest.approx(x, rel=1e-4, abs=1e-6), name
        assert len(gradients) == len(other_gradients) and gradients
        for one, other in zip(gradients, other_gradients, strict=True):
            x, y = (torch.cat([w.flatten() for w in gradient]) for gradient in (one, other))
            assert (y - x).norm() <= 1e-5 * x.norm()  # of the whole: an entry near 0 is all rounding


# ---------------------------------------------------------------------------------------------------------------------
# Layout.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("role", "critic", "kl"), [
    ("actor", "separate", "k3+"), ("critic", "separate", "k3+"), ("actor", "shared", "full")])
def test_micro_batches_change_no_gradient_and_no_metric(role, critic, kl, mode, folder, gradients):
    config = make_config(folder, train_batch_size=12, ppo_mini_batch_size=6, critic=critic, use_kl_loss=True,
                         kl_loss_type=kl, kl_loss_coef=0.3, entropy_coeff=0.1, loss_agg_mode=mode)
    models = make_models_with_values(config)
    rollout = stale(collect(models, config)[0])
    results = []
    for tokens in (16384, 1, 40):
        gradients.clear()
        smaller = dataclasses.replace(config, micro_batch_tokens=tokens)
        metrics = update(role, models, rollout, 0, 1, 0.3, smaller)
        results.append((list(gradients), metrics))
    assert len(gradients) == 2
    check_equal(results)


def naive_gradient(models: ppo_llm.Models, rollout: Rollout, kl_coef: float, config) -> torch.Tensor:
    """Of policy and value head: one left-padded pass of the whole batch, losses as papers write them."""
    model = models.actor.model
    policy = transformers.AutoModelForCausalLM.from_pretrained(config.model, attn_implementation="eager")
    head = model.value_head.weight.detach().clone().requires_grad_()
    widest = max(map(len, rollout.prompts))
    width = rollout.mask.shape[1]
    ids = torch.zeros(len(rollout.mask), widest + width, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids[row, widest - len(prompt) : widest + len(response)] = torch.tensor(prompt + response)
        attention[row, widest - len(prompt) : widest + len(response)] = 1
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = policy(ids, attention_mask=attention, position_ids=positions, output_hidden_states=True)
    logp = (output.logits[:, widest - 1 : -1] / config.temperature).log_softmax(-1)
    values = (output.hidden_states[-1][:, widest - 1 : -1] @ head[0])
    logprobs = logp.gather(-1, ids[:, widest:, None])[..., 0]
    ratio = (logprobs - rollout.old_logprobs).exp()
    surrogate = torch.minimum(rollout.advantages * ratio, rollout.advantages * ratio.clamp(0.8, 1.2))
    lowest = torch.maximum(surrogate, 3.0 * rollout.advantages)
    bounded = torch.where(rollout.advantages < 0, lowest, surrogate)
    entropy = -(logp.exp() * logp).sum(-1)
    kl = 0.5 * (logprobs - rollout.ref_logprobs).square()
    moved = rollout.old_values + (values - rollout.old_values).clamp(-0.5, 0.5)
    errors = torch.maximum((values - rollout.returns).square(), (moved - rollout.returns).square())
    loss = -bounded - config.entropy_coeff * entropy + kl_coef * kl + config.vf_coef * 0.5 * errors
    ((loss * rollout.mask).sum() / rollout.mask.sum()).backward()
    return torch.cat([w.grad.flatten() for w in (*policy.parameters(), head)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_a_naive_padded_step(temperature, folder, gradients):
    config = make_config(
        folder, train_batch_size=16, ppo_mini_batch_size=16, critic="shared", entropy_coeff=0.1, use_kl_loss=True,
        kl_loss_type="k2", micro_batch_tokens=50, temperature=temperature)
    models = make_models_with_values(config)
    rollout = stale(collect(models, config)[0])
    update("actor", models, rollout, 0, 1, 0.3, config)
    ours = torch.cat([gradient.flatten() for gradient in gradients[0]])
    naive = naive_gradient(models, rollout, 0.3, config)
    assert (ours - naive).norm() <= 6e-6 * naive.norm()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_padding_and_the_order_of_responses_change_no_gradient_and_no_metric(critic, folder, gradients):
    config = make_config(folder, train_batch_size=12, critic=critic, micro_batch_tokens=40)
    models = make_models_with_values(config)
    rollout = stale(collect(models, config)[0])
    shuffled = rollout.take(torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist())
    wide = dataclasses.replace(shuffled)
    for name, x in vars(shuffled).items():
        if torch.is_tensor(x) and x.dim() == 2:
            setattr(wide, name, torch.nn.functional.pad(x, (0, 5)))
    for role in ["actor"] + ["critic"] * (critic == "separate"):
        results = []
        for version in (rollout, shuffled, wide):
            gradients.clear()
            metrics = train_mini_batch(role, models, version, list(range(12)), 1.0, 0.0, config)
            results.append((list(gradients), metrics))
        check_equal(results)


def test_values_that_moved_less_than_the_clip_range_are_not_counted_as_clipped(folder):
    config = make_config(folder, cliprange_value=0.5, critic_lr=0.0)
    models = make_models_with_values(config)
    rollout, _ = collect(models, config)
    rollout.old_values = rollout.old_values + 0.1 * rollout.mask
    assert update("critic", models, rollout, 0, 1, 0.001, config)["value/clipfrac"] == 0


def test_a_row_of_one_token_and_a_row_of_three_weigh_as_their_tokens(folder, gradients):
    config = make_config(folder, train_batch_size=2, ppo_mini_batch_size=2, entropy_coeff=0.0, adv_estimator="rloo",
                         rollout_n=2, kl_ctrl_coef=0.0)
    models, results = make_models(config), []
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    rollout = Rollout([[5, 6], [9]], [[7], [8, 9, 10]], mask, mask * 0, advantages=mask * torch.tensor([[1.0], [-1.0]]),
                      ratio=mask.clone(), clipped=mask * 0)
    rollout.old_logprobs = forward(models.actor.model, rollout, config)["logprobs"].detach()
    for tokens in (16384, 1):
        gradients.clear()
        metrics = train_mini_batch("actor", models, rollout, [0, 1], 1.0, 0.0,
                                   dataclasses.replace(config, micro_batch_tokens=tokens))
        results.append((list(gradients), metrics))
        assert metrics["policy/loss"] == pytest.approx((-1 + 3) / 4, abs=1e-6)
    check_equal(results)


def test_logged_losses_and_fractions_are_means_over_the_tokens_of_the_mini_batches(folder, gradients):
    config = make_config(folder, train_batch_size=12, ppo_mini_batch_size=4, critic="shared", micro_batch_tokens=30)
    models = make_models(config)
    rollout = stale(collect(models, config)[0])
    metrics = update("actor", models, rollout, 0, 1, 0.0, config)
    valid = rollout.mask > 0
    outputs = forward(models.actor.model, rollout, config)
    log_ratio = (outputs["logprobs"] - rollout.old_logprobs)[valid]
    outside = (log_ratio > math.log(1.2)) & (rollout.advantages[valid] > 0)
    outside |= (log_ratio < math.log(0.8)) & (rollout.advantages[valid] < 0)
    assert metrics["policy/clipfrac"] == pytest.approx(outside.float().mean().item())
    assert metrics["policy/entropy"] == pytest.approx(outputs["entropy"][valid].mean().item(), rel=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)
    torch.testing.assert_close(rollout.ratio[valid], log_ratio.exp(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.clipped[valid], outside.float())
    assert 0.1 < metrics["policy/clipfrac"] < 0.9 and metrics["value/clipfrac"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_kl_loss_has_the_weights_of_the_policy_loss(mode, folder):
    config = make_config(folder, use_kl_loss=True, kl_loss_type="k2", loss_agg_mode=mode, entropy_coeff=0.0)
    models = make_models(config)
    rollout = stale(collect(models, config)[0])
    weights = loss_weights(rollout.mask, mode, 8)
    low = (ppo_loss("actor", models, rollout, 0.0, config)[0] * weights).sum()
    high = (ppo_loss("actor", models, rollout, 0.3, config)[0] * weights).sum()
    log_ratio = forward(models.actor.model, rollout, config)["logprobs"] - rollout.ref_logprobs
    expected = 0.3 * (0.5 * log_ratio.square() * weights).sum().item()
    assert (high - low).item() == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_entropy_lowers_the_loss_and_value_errors_raise_it_by_their_coefficients(folder):
    config = make_config(folder, critic="shared", entropy_coeff=0.0, vf_coef=0.0, cliprange_value=None)
    models = make_models_with_values(config)
    rollout = stale(collect(models, config)[0])
    outputs = forward(models.actor.model, rollout, config)
    losses = {}
    for name, changes in (("plain", {}), ("entropy", {"entropy_coeff": 0.1}), ("values", {"vf_coef": 0.3})):
        losses[name] = ppo_loss("actor", models, rollout, 0.0, dataclasses.replace(config, **changes))[0]
    gain = losses["plain"] - losses["entropy"]
    torch.testing.assert_close(gain, 0.1 * outputs["entropy"], atol=1e-5, rtol=1e-4)
    squares = 0.5 * (outputs["values"] - rollout.returns).square()
    torch.testing.assert_close(losses["values"] - losses["plain"], 0.3 * squares, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "needed"), [
    (10**6, 7),  # 2 | 3 | 4 5 | 8 10 | 13 15 | 19 | 26: the longest is at most 1.25 times the shortest
    (20, 8), (19, 9), (1, 10)])
def test_micro_batches_hold_every_row_once_within_both_limits(tokens, needed):
    lengths = [3, 18, 7, 12, 2, 25, 9, 1, 14, 4]
    mask = torch.ones(10, 1)
    rollout = Rollout([[5] * n for n in lengths], [[7]] * 10, mask, mask)
    config = ppo_llm.Config(micro_batch_tokens=tokens)
    groups = [rows for rows, part in micro_batches(list(range(10)), rollout, config)]
    assert sorted(sum(groups, [])) == list(range(10))
    for rows in groups:
        longest = max(lengths[i] + 1 for i in rows)
        assert longest * len(rows) <= tokens or len(rows) == 1
        assert longest <= 1.25 * min(lengths[i] + 1 for i in rows)
    assert len(groups) == needed


# ---------------------------------------------------------------------------------------------------------------------
# Ratio and gradient.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_mini_batch_has_ratio_one_and_clips_nothing(temperature, folder):
    config = make_config(folder, ppo_mini_batch_size=8, temperature=temperature, lr=1e-2)
    models = make_models(config)
    rollout, _ = collect(models, config)
    metrics = update("actor", models, rollout, 0, 1, 0.001, config)
    assert 1 <= metrics["policy/ratio_first"] < 1 + 1e-5
    assert metrics["policy/clipfrac"] == metrics["policy/clipfrac_lower"] == 0 and metrics["policy/approx_kl"] < 1e-8
    metrics = update("actor", models, rollout, 0, 1, 0.001, config)
    assert metrics["policy/ratio_first"] > 1.05
    assert metrics["policy/clipfrac"] > 0 and metrics["policy/approx_kl"] > 1e-3


def test_another_temperature_in_training_than_in_sampling_shows_in_the_first_ratio(folder):
    config = make_config(folder, temperature=0.7)
    models = make_models(config)
    rollout, _ = collect(models, config)
    metrics = update("actor", models, rollout, 0, 1, 0.001, dataclasses.replace(config, temperature=1.0))
    assert metrics["policy/ratio_first"] > 1.05


@pytest.mark.parametrize("responses", [[[7], [8]], [[7], [8, 9, 10]]])
def test_exactly_the_positions_that_choose_a_response_token_get_a_gradient(responses, folder, monkeypatch):
    config = make_config(folder, entropy_coeff=0.0, kl_ctrl_coef=0.0)
    models = make_models(config)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in responses], batch_first=True)
    part = Rollout([[5, 6, 30], [9]], responses, mask, mask * 0, advantages=mask)
    policy = models.actor.model
    seen = []
    real = policy.hidden

    def hidden(sequences):
        seen.append(real(sequences))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(policy, "hidden", hidden)
    part.old_logprobs = forward(policy, part, config)["logprobs"].detach()
    (ppo_loss("actor", models, part, 0.0, config)[0] * mask).sum().backward()
    found = (seen[-1].grad.abs().sum(-1) > 0).nonzero().tolist()
    first = [[0, 2 + t] for t in range(len(responses[0]))]
    second = [[1, t] for t in range(len(responses[1]))]
    assert found == first + second


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer.


def test_optimizer_steps_are_epochs_times_mini_batches(folder, steps):
    config = make_config(folder, train_batch_size=12, ppo_epochs=3, critic_ppo_epochs=2, critic_ppo_mini_batch_size=3)
    models = make_models(config)
    take_steps(models, config)
    counts = [sum(learner is one for learner, *_ in steps) for one in (models.actor, models.critic)]
    assert counts == [3 * 3, 2 * 4]
    for learner, count in zip((models.actor, models.critic), counts, strict=True):
        assert {int(state["step"]) for state in learner.optimizer.state.values()} == {count}


def test_every_epoch_visits_every_response_once_in_another_order(folder, monkeypatch):
    config, batches, real = make_config(folder, train_batch_size=12, ppo_epochs=2), [], train_mini_batch
    monkeypatch.setattr(ppo_llm, "train_mini_batch", lambda *args: (batches.append(args[3]), real(*args))[1])
    models = make_models(config)
    update("actor", models, collect(models, config)[0], 0, 1, 0.001, config)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_early_stop_ends_the_update_without_a_step_on_the_offending_mini_batch(folder, steps):
    config = make_config(folder, ppo_epochs=4, lr=1e-2, early_stop_kl=1e-4)
    models = make_models(config)
    rollout, _ = collect(models, config)
    metrics = update("actor", models, rollout, 0, 1, 0.001, config)
    assert len(steps) == 1  # the second of 2 x 4 mini-batches sees that the first one moved too far
    assert same(weights_of(models.actor), steps[0][2]) and all(w.grad is None for w in models.actor.masters)
    assert metrics["policy/approx_kl"] > 1e-4 / 2 and math.isfinite(metrics["optim/grad_norm"])
    update("actor", models, rollout, 0, 1, 0.001, dataclasses.replace(config, early_stop_kl=1e9))
    assert len(steps) == 1 + 8


@pytest.mark.parametrize("spoil", [False, True])
def test_the_learning_rate_follows_the_plan_whether_or_not_steps_are_skipped(spoil, folder, steps):
    config = make_config(folder, ppo_epochs=2, lr=1e-3, lr_schedule="linear", warmup_steps=1, critic="shared")
    models = make_models(config)
    for step in range(3):
        rollout, _ = collect(models, config, step)
        rollout.advantages[0, 0] = math.inf if spoil else 1.0
        metrics = update("actor", models, rollout, step, 3, 0.001, config)
    factors = [0.25, 0.5, 0.75, 1.0, *(1 - i / 8 for i in range(8))]
    assert [rates for _, rates, _ in steps] == [pytest.approx([1e-3 * f, 1e-2 * f]) for f in factors]
    assert metrics["optim/skipped_steps"] == (6 if spoil else 0)
    assert metrics["optim/lr"] == pytest.approx(1e-3 / 8)


def test_learning_rate_zero_changes_nothing(folder):
    for critic in ("separate", "shared"):
        config = make_config(folder, lr=0.0, critic_lr=0.0, critic=critic)
        models = make_models(config)
        before = [weights_of(learner) for learner in (models.actor, models.critic) if learner]
        take_steps(models, config, 2)
        after = [weights_of(learner) for learner in (models.actor, models.critic) if learner]
        assert all(map(same, before, after))


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(role, folder):
    config = make_config(folder, ppo_mini_batch_size=8)
    models = make_models(config)
    rollout, _ = collect(models, config)
    learner, x = (models.actor, rollout.advantages) if role == "actor" else (models.critic, rollout.returns)
    x[3, 0] = math.inf
    before = weights_of(learner)
    metrics = update(role, models, rollout, 0, 1, 0.001, config)
    assert learner.skipped_steps == 1 and same(weights_of(learner), before)
    x[3, 0] = 0.0
    metrics = update(role, models, rollout, 1, 2, 0.001, config)
    assert learner.skipped_steps == 1 and not same(weights_of(learner), before)
    assert all(w.isfinite().all() for w in learner.masters)
    assert metrics["optim/skipped_steps"] == 1


def test_the_third_gradient_in_a_row_that_is_not_finite_ends_the_run(folder):
    learner = make_models(make_config(folder)).actor
    for grad_norm in (math.nan, math.inf, 1.0, math.nan, math.nan):
        learner.step(1.0, grad_norm)
    assert learner.skipped_steps == 4
    with pytest.raises(Diverged, match="three gradients in a row"):
        learner.step(1.0, math.nan)


def test_the_gradient_is_clipped_to_grad_clip(folder, monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def step(optimizer, *args):
        gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = make_config(folder, ppo_mini_batch_size=8, grad_clip=0.01)
    models = make_models(config)
    metrics = update("actor", models, collect(models, config)[0], 0, 1, 0.001, config)
    assert norms == [pytest.approx(0.01, rel=1e-3)] and metrics["optim/grad_norm"] > 0.02


def test_bf16_weights_move_through_their_fp32_masters(folder):
    config = make_config(folder, dtype="bfloat16", lr=1e-6, critic_lr=1e-6)
    learner = make_models(config).actor
    mask = torch.ones(2, 32)
    part = Rollout([[*range(32)], [*range(32, 64)]], [[*range(32, 64)], [*range(32)]], mask, mask * 0)
    plain = [w.detach().clone().requires_grad_() for w in learner.weights]
    optimizer = torch.optim.AdamW(plain, lr=1e-6, weight_decay=0.0)
    before = weights_of(learner)
    for _ in range(100):
        learner.backward(forward(learner.model, part, config)["logprobs"].sum())
        for master, copy in zip(learner.masters, plain, strict=True):
            copy.grad = master.grad.to(copy.dtype, copy=True)
        optimizer.step()
        learner.step(1.0, learner.clip_gradient())
    rounded = [copy.detach().float() for copy in plain]

    def moved(after):
        pairs = zip(before, after, strict=True)
        return torch.cat([(x != y).flatten() for x, y in pairs]).float().mean()

    assert all(w.dtype == torch.bfloat16 for w in learner.weights)
    assert moved(weights_of(learner)) > 0.99 and moved(rounded) < 0.2
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in zip(learner.weights, learner.masters, strict=True))


def test_the_value_head_of_a_bf16_critic_has_an_fp32_master_too(folder):
    config = make_config(folder, dtype="bfloat16")
    models = make_models(config)
    head = models.critic.model.value_head.weight
    assert head.dtype == torch.bfloat16 and models.critic.weights[-1] is head
    assert models.critic.masters[-1].dtype == torch.float32
    take_steps(models, config)
    assert (head != 0).any() and torch.equal(head, models.critic.masters[-1].bfloat16())


def test_gradients_of_bf16_weights_are_summed_in_fp32(folder):
    config = make_config(folder, dtype="bfloat16")
    learner = make_models(config).actor
    mask = torch.ones(1, 3)
    part = Rollout([[5, 6]], [[7, 8, 9]], mask, mask * 0)
    sums = {}
    for count in (1, 300):
        for _ in range(count):
            learner.backward(forward(learner.model, part, config)["logprobs"].sum())
        sums[count] = [m.grad for m in learner.masters]
        learner.drop_gradient()
    for one, many in zip(sums[1], sums[300], strict=True):  # 8 bits stop counting at 256
        assert many.dtype == torch.float32
        torch.testing.assert_close(many, 300 * one, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing, dropout and router noise.


def count_layers(model: ppo_llm.LanguageModel, count: list[int]) -> None:
    """Counts how often the layers of a model compute."""
    for layer in model.lm.base_model.layers:
        layer.self_attn.register_forward_hook(lambda *args: count.append(1))


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_gradient_checkpointing_recomputes_every_layer_and_changes_no_gradient(role, folder, gradients):
    results = []
    counts = []
    for checkpointing in (False, True):
        config = make_config(folder, ppo_mini_batch_size=8, gradient_checkpointing=checkpointing)
        models = make_models(config)
        rollout, _ = collect(models, config)
        learner = models.actor if role == "actor" else models.critic
        calls = []
        count_layers(learner.model, calls)
        gradients.clear()
        metrics = update(role, models, rollout, 0, 1, 0.001, config)
        results.append((list(gradients), metrics))
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0] > 0
    check_equal(results)


def test_under_gradient_checkpointing_the_reference_stays_where_it_was(folder):
    config = make_config(folder, gradient_checkpointing=True)
    models = make_models(config)
    rollout, _ = collect(models, config)
    before = ppo_llm.score_tokens(models.reference, rollout, config)["logprobs"]
    assert torch.equal(before, rollout.ref_logprobs)
    take_steps(models, config)
    assert torch.equal(ppo_llm.score_tokens(models.reference, rollout, config)["logprobs"], before)
    after = ppo_llm.score_tokens(models.actor.model, rollout, config)["logprobs"]
    assert (after - before).abs().max() > 1e-3


def test_generation_keeps_its_cache_under_gradient_checkpointing(folder):
    config = make_config(folder, gradient_checkpointing=True)
    models = make_models(config)
    widths = []
    take_steps(models, config)
    embedding = models.actor.model.lm.model.embed_tokens
    embedding.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    ppo_llm.generate(models.actor.model, [[5, 6, 9]], set(), config, None)
    assert widths == [3] + [1] * 7


NOISY = {  # settings that make a model in train mode random
    "mixtral": {"router_jitter_noise": 0.1, "num_local_experts": 4, "attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
}


@pytest.fixture(scope="module", params=NOISY)
def noisy_folder(request, tmp_path_factory):
    lm = make_lm(request.param, **NOISY[request.param])
    ids = torch.tensor([[5, 9, 30]])
    lm.train()
    assert not torch.allclose(lm(ids).logits, lm(ids).logits, atol=1e-4)
    return save_folder(tmp_path_factory.mktemp(request.param), lm.eval())


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_dropout_and_router_noise_of_the_config_stay_off_in_training(critic, noisy_folder, gradients):
    results = []
    for checkpointing in (False, True):
        config = make_config(
            noisy_folder, ppo_mini_batch_size=8, critic=critic, gradient_checkpointing=checkpointing)
        models = make_models_with_values(config)
        rollout, metrics = collect(models, config)
        assert abs(metrics["reward/kl"].item()) < 1e-6
        gradients.clear()
        metrics = update("actor", models, rollout, 0, 1, 0.001, config)
        assert 1 <= metrics["policy/ratio_first"] < 1 + 1e-5
        assert metrics["policy/clipfrac"] == 0
        if critic == "separate":
            metrics |= update("critic", models, rollout, 0, 1, 0.001, config)
        results.append((list(gradients), metrics))
    check_equal(results)


# ---------------------------------------------------------------------------------------------------------------------
# The critic.


def test_a_shared_critic_has_one_optimizer_with_two_learning_rates(folder):
    for rates, moves in (((0.0, 1e-2), (False, True)), ((1e-3, 0.0), (True, False))):
        config = make_config(folder, critic="shared", lr=rates[0], critic_lr=rates[1])
        models = make_models_with_values(config)
        before = weights_of(models.actor)
        assert models.critic is None and models.actor.masters[-1] is models.actor.model.value_head.weight
        take_steps(models, config)
        after = weights_of(models.actor)
        assert (not same(before[:-1], after[:-1]), not same(before[-1:], after[-1:])) == moves


def test_a_separate_critic_and_the_policy_share_no_weight(folder):
    config = make_config(folder, lr=0.0)
    models = make_models(config)
    before = weights_of(models.actor), weights_of(models.critic)
    take_steps(models, config)
    assert same(before[0], weights_of(models.actor)) and not same(before[1], weights_of(models.critic))


def test_critic_warmup_holds_the_actor_still_and_delays_its_schedule(folder, tmp_path, steps):
    config = make_config(folder, output_dir=str(tmp_path / "run"), total_steps=4, critic_warmup=2, lr_schedule="linear")
    ppo_llm.main(config)
    rows = read_log(tmp_path / "run")
    assert ["optim/lr" in row for row in rows] == [False, False, True, True]
    assert [row["optim/lr"] for row in rows[2:]] == pytest.approx([0.75e-3, 0.25e-3])
    assert [row["optim/critic_lr"] for row in rows] == pytest.approx([1e-2 * (7 - 2 * i) / 8 for i in range(4)])
    first = steps[0][0]
    assert [learner is first for learner, *_ in steps] == [True] * 4 + [True, True, False, False] * 2


@pytest.mark.parametrize(("critic_lr", "stops"), [(1.0, True), (1e-4, False)])
def test_critic_early_stop_holds_out_a_tenth_and_ends_when_its_loss_rises(critic_lr, stops, folder, monkeypatch):
    config = make_config(folder, train_batch_size=40, critic_ppo_epochs=4, critic_early_stop=True, critic_lr=critic_lr,
                         ppo_mini_batch_size=20, cliprange_value=None)
    models, batches, real = make_models(config), [], train_mini_batch
    monkeypatch.setattr(ppo_llm, "train_mini_batch", lambda *args: (batches.append(args[3]), real(*args))[1])
    update("critic", models, collect(models, config)[0], 0, 1, 0.001, config)
    seen = sum(batches, [])
    assert set(seen) == set(range(40)) - {0, 10, 20, 30}
    assert (len(batches) < 8) == stops and len(seen) % 36 == 0


@pytest.mark.slow
def test_the_critic_learns_the_mean_of_what_it_sees(folder):
    config = make_config(folder, train_batch_size=32, reward=f"{folder}/reward.py:constant", kl_ctrl_coef=0.0,
                         ppo_mini_batch_size=32, ppo_epochs=30, cliprange_value=None)
    for critic_lr, learns in ((1e-2, True), (0.0, False)):
        config = dataclasses.replace(config, critic_lr=critic_lr)
        models = make_models(config)
        rollout, _ = collect(models, config)
        update("critic", models, rollout, 0, 1, 0.0, config)
        values = forward(models.critic.model, rollout, config)["values"][rollout.mask > 0]
        assert ((values - 1).abs().max() < 0.2) == learns


# ---------------------------------------------------------------------------------------------------------------------
# The KL coefficient.


@pytest.mark.parametrize("in_loss", [False, True])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_a_step_uses_the_coefficient_from_before_its_own_kl(unit, in_loss, folder, tmp_path, monkeypatch):
    used, real = {"actor": [], "critic": []}, ppo_loss
    monkeypatch.setattr(ppo_llm, "ppo_loss", lambda *args: (used[args[0]].append(args[3]), real(*args))[1])
    config = make_config(folder, output_dir=str(tmp_path / "run"), kl_ctrl_type="adaptive", kl_ctrl_unit=unit, lr=1e-2,
                         kl_ctrl_horizon=20, use_kl_loss=in_loss, kl_ctrl_coef=0.2, kl_loss_coef=0.2, total_steps=4,
                         kl_ctrl_target=0.02)
    ppo_llm.main(config)
    rows, controller = read_log(tmp_path / "run"), ppo_llm.AdaptiveKLController(0.2, 0.02, 20)
    for row in rows:
        assert row["reward/kl_coef"] == pytest.approx(controller.coef)
        controller.update(row["reward/kl" if unit == "token" else "reward/kl_sequence"], 8)
    assert len({row["reward/kl_coef"] for row in rows}) == 4 and rows[1]["reward/kl_coef"] < 0.2 < controller.coef * 1.2
    in_turn = [coefficient for coefficient, _ in itertools.groupby(used["actor"])]
    assert in_turn == pytest.approx([row["reward/kl_coef"] for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Learning.


def final_score(flat_folder, tmp_path, **changes) -> float:
    """Mean score of the last two steps; the score is the part of 8 tokens that are one of 64."""
    settings = {"reward": f"{flat_folder}/reward.py:count", "train_batch_size": 8, "rollout_n": 4, "lr": 5e-3,
                "ppo_mini_batch_size": 16, "ppo_epochs": 2, "total_steps": 15, "output_dir": str(tmp_path / "run")}
    ppo_llm.main(make_config(flat_folder, **settings | changes))
    rows = read_log(tmp_path / "run")
    assert all(map(math.isfinite, (x for row in rows for x in row.values()))) and rows[0]["reward/score"] < 0.06
    return (rows[-2]["reward/score"] + rows[-1]["reward/score"]) / 2


@pytest.mark.parametrize("estimator", ["gae", *(pytest.param(x, marks=pytest.mark.slow) for x in FREE)])
def test_every_estimator_learns_to_repeat_the_rewarded_token(estimator, flat_folder, tmp_path):
    assert final_score(flat_folder, tmp_path, adv_estimator=estimator) > 0.4


@pytest.mark.slow
def test_a_shared_critic_learns_too(flat_folder, tmp_path):
    assert final_score(flat_folder, tmp_path, critic="shared", critic_lr=5e-3) > 0.4


@pytest.mark.parametrize("estimator", ["gae", *(pytest.param(x, marks=pytest.mark.slow) for x in FREE)])
def test_with_learning_rate_zero_nothing_is_learned(estimator, flat_folder, tmp_path):
    assert final_score(flat_folder, tmp_path, adv_estimator=estimator, lr=0.0, total_steps=5) < 0.06


@pytest.mark.slow
def test_a_strong_kl_penalty_keeps_the_policy_near_its_start(flat_folder, tmp_path):
    assert final_score(flat_folder, tmp_path, kl_ctrl_coef=5.0) < 0.15
    assert read_log(tmp_path / "run")[-1]["reward/kl"] < 0.1


@pytest.mark.parametrize("estimator", ["gae", *FREE])
def test_equal_rewards_keep_everything_finite(estimator, folder):
    config = make_config(folder, adv_estimator=estimator, rollout_n=2, reward=f"{folder}/reward.py:constant")
    models = make_models(config)
    metrics = take_steps(models, config, 3)
    metrics.pop("value/explained_variance", None)  # not defined where all returns agree
    assert all(map(math.isfinite, metrics.values()))
    assert all(w.isfinite().all() for w in models.actor.masters)
    rollout, _ = collect(models, config)
    assert rollout.advantages.abs().max() < 20


def test_mini_batches_of_one_response_keep_everything_finite(folder):
    config = make_config(folder, ppo_mini_batch_size=1)
    metrics = take_steps(make_models(config), config, 2)
    assert all(map(math.isfinite, metrics.values()))


def test_a_kl_loss_with_coefficient_0_needs_no_reference_and_changes_nothing(folder):
    results = []
    for flags in ({"use_kl_loss": True, "kl_loss_coef": 0.0}, {"use_kl_in_reward": False}):
        config = make_config(folder, **flags)
        models = make_models(config)
        take_steps(models, config, 2)
        assert models.reference is None
        results.append(models.actor.masters)
    assert same(*results)


def test_ratio_and_clipped_are_0_outside_the_mask_after_the_update(folder):
    config = make_config(folder)
    models = make_models(config)
    rollout, _ = collect(models, config)
    update("actor", models, rollout, 0, 10, 0.0, config)
    assert (rollout.mask == 0).any()
    assert (rollout.ratio[rollout.mask == 0] == 0).all() and (rollout.clipped[rollout.mask == 0] == 0).all()


def test_a_held_out_tenth_is_scored_in_micro_batches_with_the_same_result(folder, monkeypatch):
    sizes, results, real = [], [], ppo_llm.forward

    def counted(model, part, *rest):
        sizes.append(len(part.mask))
        return real(model, part, *rest)

    monkeypatch.setattr(ppo_llm, "forward", counted)
    for tokens in (1, 16384):
        config = make_config(folder, critic_early_stop=True, ppo_epochs=2, train_batch_size=40, ppo_mini_batch_size=20,
                             micro_batch_tokens=tokens)
        models = make_models(config)
        rollout, _ = collect(models, config)
        sizes.clear()
        results.append(update("critic", models, rollout, 0, 10, 0.0, config)["value/loss"])
        assert (max(sizes) == 1) == (tokens == 1)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_the_clock_waits_for_the_device(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    assert ppo_llm.clock_now() <= ppo_llm.clock_now() and len(waits) == 2
