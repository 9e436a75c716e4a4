"""Truncated importance sampling: weights where log-probs are scored anew, in bf16 and with a rollout hook."""

import contextlib
import dataclasses
import io
import math

import pytest
import torch
from conftest import collect, make_config, make_models, read_log

import ppo_llm
from ppo_llm import forward, importance_weights, loss_weights, ppo_loss, score_tokens, update

HOOK = '''
import torch
import ppo_llm


def shifted(model, prompts, stop_ids, config, generator):
    """The built-in rollout, which says that its tokens 0, 1, 2, 3 of 4 had p / 4, p / 1.5, p and 2 p."""
    responses, logprobs = ppo_llm.generate(model, prompts, stop_ids, config, generator)
    shifts = torch.tensor([0.25, 1 / 1.5, 1.0, 2.0]).log()
    shifted = [x + shifts[torch.tensor(response) % 4] for x, response in zip(logprobs, responses)]
    return responses, [x.tolist() for x in shifted]
'''
WEIGHTS = torch.tensor([2.0, 1.5, 1.0, 0.5])  # 4 is capped
IS_METRICS = {"rollout/is_weight_mean", "rollout/is_weight_max", "rollout/is_capped"}


@pytest.fixture(scope="module")
def hook(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("hooks") / "shift.py"
    path.write_text(HOOK)
    return f"{path}:shifted"


def expected_weights(rollout) -> torch.Tensor:
    """What the shifts of the hook make of min(old / sampled, 2): 1 in padding."""
    weights = torch.ones_like(rollout.mask)
    for row, response in enumerate(rollout.responses):
        weights[row, : len(response)] = WEIGHTS[torch.tensor(response) % 4]
    return weights


# ---------------------------------------------------------------------------------------------------------
# The formula.


def test_the_weights_have_their_hand_worked_values():
    old = torch.tensor([[0.5, 0.25, 0.3, 0.9, 0.6]]).log()
    sampled = torch.tensor([[0.4, 0.5, 0.3, 0.1, 0.2]]).log()
    weights = importance_weights(old, sampled, torch.ones(1, 5), 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.25, 0.5, 1.0, 2.0, 2.0]]))  # 9 and 3 are capped
    weights = importance_weights(old, sampled, torch.ones(1, 5), 5.0)
    torch.testing.assert_close(weights, torch.tensor([[1.25, 0.5, 1.0, 5.0, 3.0]]))


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf, 5.0])
def test_what_lies_outside_the_mask_has_weight_one(what):
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    weights = importance_weights(torch.tensor([[-1.0, what, -2.0, 0.0]]), torch.full((1, 4), -2.0), mask, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0, 1.0, 1.0]]))


def test_absurd_gaps_give_weights_from_zero_to_the_cap():
    old = torch.tensor([[-1000.0, 0.0]])
    weights = importance_weights(old, old.flip(1), torch.ones(1, 2), 2.0)
    assert weights.tolist() == [[0.0, 2.0]]


def test_no_gradient_flows_through_a_weight():
    old = torch.zeros(1, 3, requires_grad=True)
    sampled = torch.full((1, 3), 0.5, requires_grad=True)
    assert not importance_weights(old, sampled, torch.ones(1, 3), 2.0).requires_grad


@pytest.mark.parametrize("cap", [0.0, -1.0])
def test_a_cap_that_is_not_positive_is_refused(cap):
    with pytest.raises(ppo_llm.UsageError, match="rollout_is_cap cannot be"):
        ppo_llm.check_config(ppo_llm.Config(rollout_is_cap=cap))


# ---------------------------------------------------------------------------------------------------------
# A rollout hook whose log-probs are shifted.


def test_a_hook_that_shifts_its_log_probs_gets_the_weights_of_the_shift(hook, folder):
    config = make_config(folder, rollout=hook, train_batch_size=32)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    expected = expected_weights(rollout)
    torch.testing.assert_close(rollout.is_weights, expected, atol=1e-5, rtol=1e-5)
    inside = expected[rollout.mask > 0]
    assert set(inside.tolist()) == {2.0, 1.5, 1.0, 0.5}
    assert metrics["rollout/is_weight_mean"].item() == pytest.approx(inside.mean().item(), abs=1e-5)
    assert metrics["rollout/is_weight_max"].item() == 2.0
    assert metrics["rollout/is_capped"].item() == pytest.approx((inside == 2.0).float().mean().item())
    # |p_sampled - p_scored| over tokens, where the hook says p / 4, p / 1.5, p and 2 p
    probabilities = rollout.old_logprobs.exp()[rollout.mask > 0]
    gaps = torch.tensor([0.75, 1 / 3, 0.0, 1.0])[torch.tensor(sum(rollout.responses, [])) % 4] * probabilities
    assert metrics["rollout/logprob_gap"].item() == pytest.approx(gaps.mean().item(), rel=1e-4)


def test_with_a_hook_the_old_log_probs_are_those_of_the_policy_and_not_what_the_hook_says(hook, folder):
    config = make_config(folder, rollout=hook, ppo_mini_batch_size=8)
    models = make_models(config)
    rollout, metrics = collect(models, config)
    scored = score_tokens(models.actor.model, rollout, config)["logprobs"]
    assert torch.equal(rollout.old_logprobs, scored)
    assert abs(metrics["reward/kl"].item()) < 1e-6
    assert 1 <= update("actor", models, rollout, 0, 1, 0.001, config)["policy/ratio_first"] < 1 + 1e-5


@pytest.mark.parametrize("cap", [2.0, None])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_gradient_is_that_of_the_weighted_policy_gradient(mode, cap, hook, folder, gradients):
    config = make_config(folder, rollout=hook, train_batch_size=16, ppo_mini_batch_size=16, entropy_coeff=0.0,
                         loss_agg_mode=mode, rollout_is_cap=cap, micro_batch_tokens=50)
    models = make_models(config)
    rollout, _ = collect(models, config)
    update("actor", models, rollout, 0, 1, 0.0, config)
    weights = expected_weights(rollout) if cap else torch.ones_like(rollout.mask)
    weights = weights * loss_weights(rollout.mask, mode, 8.0)
    logprobs = forward(models.actor.model, rollout, config)["logprobs"]
    models.actor.model.zero_grad()
    (-weights * rollout.advantages * logprobs).sum().backward()  # at ratio 1 nothing is clipped
    ours = torch.cat([x.flatten() for x in gradients[0]])
    expected = torch.cat([w.grad.flatten() for w in models.actor.weights])
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_only_the_policy_loss_is_weighted_and_off_the_policy_it_is_the_clipped_one(hook, folder):
    config = make_config(folder, rollout=hook, critic="shared", entropy_coeff=0.1, use_kl_loss=True,
                         kl_loss_type="k2", clip_ratio_high=0.3)
    models = make_models(config)
    rollout, _ = collect(models, config)
    noise = torch.Generator().manual_seed(0)
    for name in ("old_logprobs", "returns", "advantages"):
        x = getattr(rollout, name)
        setattr(rollout, name, x + torch.randn(x.shape, generator=noise) * rollout.mask)
    weighted, logged = ppo_loss("actor", models, rollout, 0.3, config)
    without = dataclasses.replace(rollout, is_weights=None)
    plain, logged_plain = ppo_loss("actor", models, without, 0.3, config)

    ratio = (forward(models.actor.model, rollout, config)["logprobs"] - rollout.old_logprobs).exp()
    advantages = rollout.advantages
    loss = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.3))
    loss = torch.where(advantages < 0, torch.minimum(loss, -3.0 * advantages), loss)
    weights = expected_weights(rollout)
    inside = rollout.mask > 0
    difference = (weighted - plain)[inside]
    torch.testing.assert_close(difference, ((weights - 1) * loss)[inside], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logged["policy/loss"][inside], (weights * loss)[inside], atol=1e-4, rtol=1e-4)
    for name in logged.keys() - {"policy/loss"}:
        assert torch.equal(logged[name], logged_plain[name]), name


def test_weighted_gradients_do_not_depend_on_micro_batches(hook, folder, gradients):
    config = make_config(folder, rollout=hook, train_batch_size=16, ppo_mini_batch_size=8)
    models = make_models(config)
    rollout, _ = collect(models, config)
    results = []
    for tokens in (16384, 40, 1):
        gradients.clear()
        update("actor", models, rollout, 0, 1, 0.0, dataclasses.replace(config, micro_batch_tokens=tokens))
        results.append(torch.cat([x.flatten() for gradient in gradients for x in gradient]))
    for other in results[1:]:
        assert (other - results[0]).norm() <= 1e-5 * results[0].norm()


def test_off_is_the_gradient_without_weights_bitwise(hook, folder, gradients):
    config = make_config(folder, rollout=hook)
    models = make_models(config)
    off = dataclasses.replace(config, rollout_is_cap=None)
    rollout, metrics = collect(models, off)
    assert rollout.is_weights is None
    assert "rollout/logprob_gap" in metrics and not IS_METRICS & metrics.keys()
    update("actor", models, rollout, 0, 1, 0.0, off)
    weighted, _ = collect(models, config)
    update("actor", models, weighted, 0, 1, 0.0, config)
    update("actor", models, dataclasses.replace(weighted, is_weights=None), 0, 1, 0.0, config)
    assert len(gradients) == 6  # two mini-batches each
    for without, with_weights, removed in zip(gradients[:2], gradients[2:4], gradients[4:], strict=True):
        assert all(map(torch.equal, without, removed))
        assert not any(map(torch.equal, without, with_weights))


def test_a_run_through_the_hook_logs_the_weights_and_says_that_the_gap_is_large(
        hook, folder, tmp_path, capsys, no_figures):
    output = str(tmp_path / "run")
    ppo_llm.main(make_config(folder, rollout=hook, temperature=0.1, total_steps=2, output_dir=output))
    for row in read_log(tmp_path / "run"):
        assert 0.5 < row["rollout/is_weight_mean"] < 2 and row["rollout/is_weight_max"] == 2
        assert 0 < row["rollout/is_capped"] < 1 and row["rollout/logprob_gap"] > 0.03
    assert "the rollout is not of the policy that is trained" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# bf16, and the built-in rollout in fp32.


def test_a_bf16_run_weighs_its_tokens_by_nearly_one(folder, tmp_path, no_figures):
    config = make_config(folder, dtype="bfloat16", total_steps=3, lr=1e-5, output_dir=str(tmp_path / "run"))
    with contextlib.redirect_stdout(io.StringIO()):
        ppo_llm.main(config)
    for row in read_log(tmp_path / "run"):
        assert row["rollout/is_weight_mean"] == pytest.approx(1, abs=0.02)
        assert 1 < row["rollout/is_weight_max"] < 1.5  # bf16 rounds by the shape of a pass
        assert row["rollout/is_capped"] == 0
        assert 0 < row["rollout/logprob_gap"] < 3e-2
        assert row["policy/ratio_first"] == pytest.approx(1, abs=0.1)


def test_a_cap_below_one_caps_almost_every_token_in_bf16(folder):
    config = make_config(folder, dtype="bfloat16", rollout_is_cap=0.5)
    rollout, metrics = collect(make_models(config), config)
    assert metrics["rollout/is_capped"] == 1
    assert (rollout.is_weights[rollout.mask > 0] == 0.5).all()


def test_the_built_in_rollout_in_fp32_computes_no_weight(folder, monkeypatch):
    def refuse(*args):
        raise AssertionError("the sampler's log-probs are the old ones")

    monkeypatch.setattr(ppo_llm, "importance_weights", refuse)
    monkeypatch.setattr(ppo_llm, "score_anew", refuse)
    config = make_config(folder)
    rollout, metrics = collect(make_models(config), config)
    assert rollout.is_weights is None
    assert not (IS_METRICS | {"rollout/logprob_gap"}) & metrics.keys()
