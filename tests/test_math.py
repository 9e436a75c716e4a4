"""Every formula of ppo_llm.py against loops, closed forms, enumeration and hand-worked numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import ppo_llm
from ppo_llm import AdaptiveKLController, Config, estimate_kl, masked_mean, masked_whiten

ESTIMATORS = ["gae", "grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged_mask(lengths: list[int], width: int | None = None) -> torch.Tensor:
    return torch.tensor([[float(t < n) for t in range(width or max(lengths))] for n in lengths])


def holed_mask(seed: int, rows: int, width: int) -> torch.Tensor:
    """Masks with zeros anywhere: tool outputs in the middle of a response, and padding."""
    mask = (torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < 0.6).float()
    mask[:, 0], mask[0] = 1.0, 1.0
    return mask


def valid_values(x: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return np.array([value for value, keep in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if keep])


def spoil(x: torch.Tensor, mask: torch.Tensor, what: float) -> torch.Tensor:
    return torch.where(mask > 0, x, torch.tensor(what))


def close(x, y, tolerance: float = 1e-5) -> None:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---------------------------------------------------------------------------------------------------------------------
# masked_mean, masked_whiten.


@pytest.mark.parametrize("seed", range(3))
def test_masked_mean_is_the_mean_of_the_valid_values(seed):
    x, mask = normal(seed, 4, 9), holed_mask(seed, 4, 9)
    close(masked_mean(x, mask), valid_values(x, mask).mean())


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3)) == 0


def test_masked_mean_is_a_statistic_without_gradient():
    assert not masked_mean(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)).requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_whitened_values_agree_with_numpy_on_the_flattened_valid_tokens(seed):
    x, mask = 3 + 2 * normal(seed, 5, 7), holed_mask(seed, 5, 7)
    valid = valid_values(x, mask)
    expected = (valid - valid.mean()) / np.sqrt(valid.var(ddof=1) + 1e-8)
    close(masked_whiten(x, mask)[mask > 0], expected, 1e-4)


@pytest.mark.parametrize("what", [math.nan, math.inf, 1e9, -1e9])
def test_what_lies_outside_the_mask_never_reaches_the_whitened_values(what):
    x, mask = normal(1, 4, 6), holed_mask(1, 4, 6)
    clean, spoiled = (masked_whiten(y, mask) for y in (spoil(x, mask, 0.0), spoil(x, mask, what)))
    assert torch.equal(clean, spoiled)
    assert (spoiled[mask == 0] == 0).all()
    assert torch.equal(masked_mean(spoil(x, mask, what), mask), masked_mean(spoil(x, mask, 0.0), mask))


def test_whitening_an_empty_mask_gives_zeros():
    assert torch.equal(masked_whiten(torch.full((2, 3), math.nan), torch.zeros(2, 3)), torch.zeros(2, 3))


def test_whitening_a_single_valid_token_gives_zero():
    mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert torch.equal(masked_whiten(torch.full((2, 2), 5.0), mask), torch.zeros(2, 2))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.95, -7.3])
def test_whitening_equal_values_stays_small(value):
    assert masked_whiten(torch.full((3, 7), value), torch.ones(3, 7)).abs().max() < 0.1


def test_the_variance_of_one_zero_among_equal_scores_does_not_cancel():
    # [0, .95 x 7]: mean .83125, unbiased variance .1128125, so 0 -> -2.474874 and .95 -> .353553
    white = masked_whiten(torch.tensor([[0.0] + [0.95] * 7]), torch.ones(1, 8))
    close(white, [[-2.474874] + [0.353553] * 7], 1e-4)


def test_the_variance_survives_a_large_offset():
    # mean of x^2 minus the square of the mean would be noise here: fp32 has no digits left at 1e8
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    close(masked_whiten(x + 8192, torch.ones(1, 4)), masked_whiten(x, torch.ones(1, 4)), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# KL.


@pytest.mark.parametrize(("kind", "expected"), [
    ("k1", [math.log(2), -math.log(2), 0]), ("abs", [math.log(2), math.log(2), 0]),
    ("k2", [0.240227, 0.240227, 0]), ("k3", [0.193147, 0.306853, 0])])  # ln2^2/2; .5 - 1 + ln2; 2 - 1 - ln2
def test_the_kl_estimators_have_their_hand_worked_values(kind, expected):
    # the policy gives the token twice, half and once the reference's probability
    logprobs = torch.tensor([[0.5, 0.25, 0.3]]).log()
    ref_logprobs = torch.tensor([[0.25, 0.5, 0.3]]).log()
    close(estimate_kl(logprobs, ref_logprobs, kind), [expected])


@pytest.mark.parametrize(("alias", "kind"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3"), ("kl+", "k1+"),
                                             ("mse+", "k2+"), ("low_var_kl+", "k3+")])
def test_an_alias_is_the_same_estimator(alias, kind):
    x, y = normal(0, 4, 5), normal(1, 4, 5)
    assert torch.equal(estimate_kl(x, y, alias), estimate_kl(x, y, kind))


@pytest.mark.parametrize("kind", ["k4", "full", "", "+", "K1"])
def test_an_unknown_kl_estimator_is_refused(kind):
    with pytest.raises(ValueError, match="no KL estimator"):
        estimate_kl(torch.zeros(1, 1), torch.zeros(1, 1), kind)


def test_k3_is_never_negative_even_for_tiny_differences():
    x = torch.cat([normal(0, 20000) * 10.0**power for power in range(-9, 2)])
    assert estimate_kl(x, torch.zeros_like(x), "k3").min() >= 0


def test_k3_is_bounded_by_10():
    logprobs = torch.tensor([-1000.0, -15.0, 15.0, 1000.0], requires_grad=True)
    kl = estimate_kl(logprobs, torch.zeros(4), "k3")
    kl.sum().backward()
    assert kl.tolist() == [10, 10, 10, 10]
    assert logprobs.grad.tolist() == [0, 0, 0, 0]  # exp(1000) would have made it NaN


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "kl", "mse", "low_var_kl"])
def test_a_plus_form_has_the_value_of_its_estimator_and_the_gradient_of_k2(kind):
    ref, weights = normal(1, 3, 4), normal(2, 3, 4)
    logprobs = normal(0, 3, 4).requires_grad_()
    plus = estimate_kl(logprobs, ref, kind + "+")
    close(plus, estimate_kl(logprobs, ref, kind))
    (plus * weights).sum().backward()
    close(logprobs.grad, weights * (logprobs.detach() - ref))  # d(x^2/2)/dx = x


class Bandit:
    """One softmax choice among 6 tokens: expectations over it are exact sums."""

    def __init__(self):
        self.theta = normal(3, 6).double().requires_grad_()
        self.logp = self.theta.log_softmax(0)
        self.ref_logp = (normal(3, 6).double() + 0.5 * normal(4, 6).double()).log_softmax(0)
        self.p = self.logp.detach().exp()

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(x, self.theta, retain_graph=True, allow_unused=True)[0]

    def true_gradient(self, reverse: bool = False) -> torch.Tensor:
        pair = Categorical(logits=self.theta), Categorical(logits=self.ref_logp)
        return self.gradient(kl_divergence(*(pair[::-1] if reverse else pair)))

    def gradient_as_loss(self, kind: str) -> torch.Tensor:
        return self.gradient((self.p * estimate_kl(self.logp, self.ref_logp, kind)).sum())

    def gradient_as_reward(self, kind: str) -> torch.Tensor:
        return self.gradient((self.p * estimate_kl(self.logp, self.ref_logp, kind).detach() * self.logp).sum())


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_the_estimator_is_unbiased(kind):
    bandit = Bandit()
    exact = kl_divergence(Categorical(logits=bandit.theta), Categorical(logits=bandit.ref_logp))
    close((bandit.p * estimate_kl(bandit.logp, bandit.ref_logp, kind)).sum(), exact, 1e-9)
    assert exact > 0.05


@pytest.mark.parametrize("kind", ["k2", "k1+", "k2+", "k3+", "abs+"])
def test_as_a_loss_it_has_the_gradient_of_kl_from_policy_to_reference(kind):
    bandit = Bandit()
    close(bandit.gradient_as_loss(kind), bandit.true_gradient(), 1e-9)


def test_as_a_loss_k1_has_no_gradient():
    close(Bandit().gradient_as_loss("k1"), torch.zeros(6), 1e-12)


def test_as_a_loss_k3_has_the_gradient_of_the_reverse_kl():
    bandit = Bandit()
    close(bandit.gradient_as_loss("k3"), bandit.true_gradient(reverse=True), 1e-9)
    assert (bandit.gradient_as_loss("k3") - bandit.true_gradient()).abs().max() > 0.01


def test_as_a_reward_only_k1_has_the_gradient_of_kl_from_policy_to_reference():
    bandit = Bandit()
    close(bandit.gradient_as_reward("k1"), bandit.true_gradient(), 1e-9)
    for kind in ("abs", "k2", "k3"):
        assert (bandit.gradient_as_reward(kind) - bandit.true_gradient()).abs().max() > 0.01


def test_full_kl_and_its_gradient_agree_with_torch_distributions():
    ref_logits = normal(1, 7, 11)
    ours, theirs = (normal(0, 7, 11).requires_grad_() for _ in range(2))
    kl = ppo_llm.full_kl(ours, ref_logits)
    exact = kl_divergence(Categorical(logits=theirs), Categorical(logits=ref_logits))
    close(kl, exact)
    weights = normal(2, 7)
    (kl * weights).sum().backward()
    (exact * weights).sum().backward()
    close(ours.grad, theirs.grad)


# ---------------------------------------------------------------------------------------------------------------------
# AdaptiveKLController.


@pytest.mark.parametrize(("kl", "coef"), [
    (6.6, 0.2 * (1 + 0.1 * 0.0256)),  # 10 % above the target: error .1, times 256 / 10000
    (5.7, 0.2 * (1 - 0.05 * 0.0256)),  # 5 % below
    (60.0, 0.2 * (1 + 0.2 * 0.0256)),  # saturated above
    (0.0, 0.2 * (1 - 0.2 * 0.0256)),  # saturated below
    (-3.0, 0.2 * (1 - 0.2 * 0.0256)),  # sampling noise may make k1 negative
    (6.0, 0.2),  # on target: a fixed point
])
def test_the_kl_coefficient_moves_as_in_the_paper(kl, coef):
    controller = AdaptiveKLController(0.2, 6.0, 10000)
    controller.update(kl, 256)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_the_kl_coefficient_changes_only_when_updated_so_that_a_step_uses_the_old_one():
    controller = AdaptiveKLController(0.2, 6.0, 100)  # the caller reads coef first, then updates
    used = []
    for kl in (12.0, 12.0, 0.0):
        used.append(controller.coef)
        controller.update(kl, 50)
    assert used == pytest.approx([0.2, 0.22, 0.242])  # error +-.2, times 50 / 100
    assert controller.coef == pytest.approx(0.2178)


def test_without_a_target_the_kl_coefficient_is_fixed():
    controller = AdaptiveKLController(0.2, None, 10000)
    controller.update(1e9, 256)
    assert controller.coef == 0.2


# ---------------------------------------------------------------------------------------------------------------------
# compute_rewards.


@pytest.mark.parametrize("discount", [0.0, 1.0, 0.95])
def test_the_rewards_of_a_response_sum_to_its_score_minus_the_weighted_kl(discount):
    scores, kl, mask = normal(0, 6), normal(1, 6, 8), holed_mask(0, 6, 8)
    rewards = ppo_llm.compute_rewards(scores, kl, mask, 0.3, discount)
    for row in range(6):
        expected = scores[row].item() - 0.3 * valid_values(kl[row], mask[row]).sum()
        assert valid_values(rewards[row], mask[row]).sum() == pytest.approx(expected, abs=1e-5)
        assert rewards[row].sum().item() == pytest.approx(expected, abs=1e-5)


def test_a_terminal_score_sits_on_the_last_valid_token():
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]])
    rewards = ppo_llm.compute_rewards(torch.tensor([5.0, 6, 7, 8]), torch.zeros(4, 4), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 0, 5], [0, 6, 0, 0], [0, 0, 7, 0], [8, 0, 0, 0]]


def test_a_uniform_score_is_spread_evenly_over_the_valid_tokens():
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])
    rewards = ppo_llm.compute_rewards(torch.tensor([4.0, 4.0, 6.0]), torch.zeros(3, 4), mask, 0.1, 1.0)
    assert rewards.tolist() == [[1, 1, 1, 1], [2, 2, 0, 0], [3, 0, 3, 0]]


def test_discounted_attribution_gives_a_token_the_discount_times_the_next_ones_share():
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
    rewards = ppo_llm.compute_rewards(torch.tensor([2.0, 3.0]), torch.zeros(2, 5), mask, 0.1, 0.9)
    for row in range(2):
        shares = valid_values(rewards[row], mask[row])
        assert shares[:-1] / shares[1:] == pytest.approx(0.9, rel=1e-5)


def test_the_kl_is_charged_on_its_own_token():
    kl = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    rewards = ppo_llm.compute_rewards(torch.tensor([10.0]), kl, ragged_mask([3], 4), 0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 8.5, 0.0]]


@pytest.mark.parametrize("discount", [0.0, 1.0, 0.95])
def test_a_response_without_tokens_gets_no_reward(discount):
    rewards = ppo_llm.compute_rewards(torch.tensor([5.0, 1.0]), torch.ones(2, 3), ragged_mask([0, 2], 3), 0.1, discount)
    assert rewards[0].tolist() == [0, 0, 0]
    assert rewards[1].sum().item() == pytest.approx(0.8)


@pytest.mark.parametrize("discount", [0.0, 1.0, 0.95])
def test_kl_outside_the_mask_never_reaches_a_reward(discount):
    scores, kl, mask = normal(0, 5), normal(1, 5, 6), holed_mask(2, 5, 6)
    clean, spoiled = (ppo_llm.compute_rewards(scores, spoil(kl, mask, x), mask, 0.1, discount) for x in (0.0, math.nan))
    assert torch.equal(clean, spoiled)
    assert (spoiled[mask == 0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# compute_gae.


def gae_by_double_loop(rewards, values, mask, gamma, lam) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of decayed TD errors over the valid tokens of each row, as in the paper's eq. 16."""
    advantages, returns = torch.zeros_like(mask, dtype=torch.double), torch.zeros_like(mask, dtype=torch.double)
    for row in range(len(mask)):
        at = [t for t in range(mask.shape[1]) if mask[row, t]]
        r, v = [rewards[row, t].item() for t in at], [values[row, t].item() for t in at] + [0.0]
        for i, t in enumerate(at):
            advantages[row, t] = sum((gamma * lam) ** (j - i) * (r[j] + gamma * v[j + 1] - v[j])
                                     for j in range(i, len(at)))
            returns[row, t] = advantages[row, t] + v[i]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
@pytest.mark.parametrize("mask", [ragged_mask([1, 9, 4, 7, 0]), holed_mask(3, 5, 9)], ids=["padding", "holes"])
def test_gae_is_the_sum_of_decayed_td_errors(gamma, lam, mask):
    rewards, values = normal(0, 5, 9), normal(1, 5, 9)
    for ours, exact in zip(ppo_llm.compute_gae(rewards, values, mask, gamma, lam),
                           gae_by_double_loop(rewards, values, mask, gamma, lam), strict=True):
        close(ours, exact)


def test_gae_matches_a_hand_worked_example_of_four_tokens():
    # gamma .5, lambda .5; rewards 1 0 2 4; values 2 4 8 6; V = 0 after the last token
    # TD errors: 1 + .5*4 - 2 = 1; 0 + .5*8 - 4 = 0; 2 + .5*6 - 8 = -3; 4 + 0 - 6 = -2
    # advantages backwards, decay .25: -2; -3 - .5 = -3.5; 0 - .875 = -.875; 1 - .21875 = .78125
    rewards, values = torch.tensor([[1.0, 0, 2, 4]]), torch.tensor([[2.0, 4, 8, 6]])
    advantages, returns = ppo_llm.compute_gae(rewards, values, torch.ones(1, 4), 0.5, 0.5)
    assert advantages.tolist() == [[0.78125, -0.875, -3.5, -2]]
    assert returns.tolist() == [[2.78125, 3.125, 4.5, 4]]


@pytest.mark.parametrize("what", [math.nan, math.inf, 1e9])
def test_what_lies_outside_the_mask_never_reaches_advantages_or_returns(what):
    rewards, values, mask = normal(0, 6, 8), normal(1, 6, 8), holed_mask(4, 6, 8)
    clean, spoiled = (ppo_llm.compute_gae(spoil(rewards, mask, x), spoil(values, mask, x), mask, 0.99, 0.9)
                      for x in (0.0, what))
    for x, y in zip(clean, spoiled, strict=True):
        assert torch.equal(x, y)
        assert (y[mask == 0] == 0).all()


def test_masked_tokens_in_the_middle_of_a_response_are_as_good_as_removed():
    keep = [0, 1, 4, 5, 8]
    rewards, values, mask = normal(0, 1, 9), normal(1, 1, 9), torch.zeros(1, 9)
    mask[0, keep] = 1
    with_holes = ppo_llm.compute_gae(rewards, values, mask, 0.9, 0.8)
    without = ppo_llm.compute_gae(rewards[:, keep], values[:, keep], torch.ones(1, 5), 0.9, 0.8)
    for x, y in zip(with_holes, without, strict=True):
        assert torch.equal(x[:, keep], y)


def test_padding_never_changes_the_advantage():
    rewards, values, mask = normal(0, 3, 5), normal(1, 3, 5), ragged_mask([5, 2, 4])
    padded = [torch.cat([x, torch.full((3, 50), y)], 1) for x, y in ((rewards, 7.0), (values, 7.0), (mask, 0.0))]
    for short, long in zip(ppo_llm.compute_gae(rewards, values, mask, 0.9, 0.8),
                           ppo_llm.compute_gae(*padded, 0.9, 0.8), strict=True):
        assert torch.equal(short, long[:, :5])
        assert (long[:, 5:] == 0).all()


def test_with_gamma_and_lambda_1_the_advantage_is_the_score_minus_the_value():
    values, mask, scores = normal(1, 4, 6), ragged_mask([6, 1, 3, 5]), torch.tensor([1.0, 0.0, -2.0, 0.5])
    rewards = ppo_llm.compute_rewards(scores, torch.zeros(4, 6), mask, 0.0)
    advantages, returns = ppo_llm.compute_gae(rewards, values, mask, 1.0, 1.0)
    for row, t in itertools.product(range(4), range(6)):
        inside = mask[row, t].item()
        assert advantages[row, t].item() == pytest.approx(inside * (scores[row] - values[row, t]).item(), abs=1e-5)
        assert returns[row, t].item() == pytest.approx(inside * scores[row].item(), abs=1e-5)


def test_with_lambda_0_the_advantage_is_the_one_step_td_error():
    # rewards 0 0 1, values .5 .25 .75, gamma .8: 0 + .8*.25 - .5 = -.3; 0 + .8*.75 - .25 = .35; 1 - .75 = .25
    advantages, _ = ppo_llm.compute_gae(torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.25, 0.75]]),
                                        torch.ones(1, 3), 0.8, 0.0)
    close(advantages, [[-0.3, 0.35, 0.25]], 1e-6)


def test_a_response_cut_at_the_limit_bootstraps_nothing():
    # the last token of a full row: reward 0, value 3, nothing after it: advantage -3 and return 0
    advantages, returns = ppo_llm.compute_gae(torch.zeros(1, 4), torch.full((1, 4), 3.0), torch.ones(1, 4), 0.9, 0.7)
    assert advantages[0, -1] == -3
    assert returns[0, -1] == 0


def test_gae_leaves_its_arguments_alone():
    arguments = normal(0, 3, 4), normal(1, 3, 4), ragged_mask([4, 2, 1])
    copies = [x.clone() for x in arguments]
    ppo_llm.compute_gae(*arguments, 0.9, 0.8)
    assert all(torch.equal(x, y) for x, y in zip(arguments, copies, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# compute_group_advantages, compute_advantages.


SCORES = [1.0, 0.0, 0.0, 1.0, 3.0, -2.0, 0.5, 0.25]  # two prompts, four responses each


def groups_of(advantages: torch.Tensor, size: int = 4) -> np.ndarray:
    return advantages.numpy().reshape(-1, size)


def test_grpo_divides_the_centred_scores_by_the_unbiased_deviation_of_the_group():
    # 1 0 0 1: mean .5, deviation sqrt(4 * .25 / 3) = .5773503, so +-.5 / .5773513 = +-.8660239
    advantages = ppo_llm.compute_group_advantages(torch.tensor(SCORES), 4, "grpo")
    assert groups_of(advantages)[0] == pytest.approx([0.8660239, -0.8660239, -0.8660239, 0.8660239], abs=1e-6)
    second = np.array(SCORES[4:])
    assert groups_of(advantages)[1] == pytest.approx((second - second.mean()) / (second.std(ddof=1) + 1e-6), abs=1e-5)


def test_the_epsilon_of_grpo_is_one_millionth():
    # 0 and 2e-6: mean 1e-6, deviation sqrt(2) * 1e-6, so +-1 / (1.414214 + 1) = +-.414214
    advantages = ppo_llm.compute_group_advantages(torch.tensor([0.0, 2e-6]), 2, "grpo")
    close(advantages, [-0.414214, 0.414214], 1e-4)


@pytest.mark.parametrize(("estimator", "by_std"), [("grpo", False), ("reinforce_plus_plus_baseline", True),
                                                   ("reinforce_plus_plus_baseline", False)])
def test_the_plain_baseline_is_the_mean_of_the_group(estimator, by_std):
    advantages = ppo_llm.compute_group_advantages(torch.tensor(SCORES), 4, estimator, by_std)
    close(advantages, [0.5, -0.5, -0.5, 0.5, 2.5625, -2.4375, 0.0625, -0.1875])  # means .5 and .4375


@pytest.mark.parametrize("estimator", ["rloo", "rloo_vectorized"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_rloo_compares_each_response_with_the_mean_of_the_others(estimator, size):
    advantages = groups_of(ppo_llm.compute_group_advantages(torch.tensor(SCORES), size, estimator), size)
    for g, i in itertools.product(range(8 // size), range(size)):
        group = SCORES[g * size : (g + 1) * size]
        others = group[:i] + group[i + 1 :]
        assert advantages[g, i] == pytest.approx(group[i] - sum(others) / len(others), abs=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus_baseline"])
def test_a_group_whose_scores_agree_has_no_advantage(estimator):
    scores = torch.tensor([0.95] * 7 + [0.0] * 7)
    advantages = ppo_llm.compute_group_advantages(scores, 7, estimator)
    assert advantages.abs().max() < 0.1  # rounding of the mean, never +-1e6
    assert (advantages[7:] == 0).all()


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "rloo_vectorized", "reinforce_plus_plus_baseline"])
def test_a_group_knows_nothing_of_the_scores_of_another(estimator):
    both = ppo_llm.compute_group_advantages(torch.tensor(SCORES), 4, estimator)
    other = ppo_llm.compute_group_advantages(torch.tensor(SCORES[:4] + [100.0, -100.0, 7.0, 0.0]), 4, estimator)
    assert torch.equal(both[:4], other[:4])
    assert not torch.equal(both[4:], other[4:])


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = ragged_mask([6, 2, 5, 1, 3, 6, 4, 6])
    return normal(seed, 8, 6) * mask, normal(seed + 1, 8, 6) * mask, mask


def advantages_of(estimator: str, **flags) -> tuple[torch.Tensor, torch.Tensor]:
    config = Config(adv_estimator=estimator, rollout_n=4, **flags)
    rewards, values, mask = batch()
    return ppo_llm.compute_advantages(rewards, values if estimator == "gae" else None, mask, config)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_whitening_follows_the_definition_of_the_estimator_unless_the_flag_says_otherwise(estimator):
    mask = batch()[2]
    by_definition, on, off = (advantages_of(estimator, whiten_advantages=w, lam=0.9)[0] for w in (None, True, False))
    assert torch.equal(by_definition, off if estimator in ("grpo", "rloo", "rloo_vectorized") else on)
    plain, white = valid_values(off, mask), valid_values(on, mask)
    assert white == pytest.approx((plain - plain.mean()) / plain.std(ddof=1), abs=1e-4)
    assert abs(plain.std(ddof=1) - 1) > 1e-3  # so that whitening is visible
    assert (on[mask == 0] == 0).all() and (off[mask == 0] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_returns_are_never_whitened(estimator):
    on, off = (advantages_of(estimator, whiten_advantages=w)[1] for w in (True, False))
    assert torch.equal(on, off)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_critic_free_estimator_returns_its_plain_advantages_and_gae_adds_the_values(estimator):
    advantages, returns = advantages_of(estimator, whiten_advantages=False)
    rewards, values, mask = batch()
    close(returns, advantages + values if estimator == "gae" else advantages)


def test_gae_advantages_use_gamma_and_lambda_of_the_config():
    rewards, values, mask = batch()
    ours = advantages_of("gae", gamma=0.9, lam=0.7, whiten_advantages=False)
    for x, y in zip(ours, gae_by_double_loop(rewards, values, mask, 0.9, 0.7), strict=True):
        close(x, y)


def test_reinforce_plus_plus_is_the_discounted_reward_to_go():
    advantages, returns = advantages_of("reinforce_plus_plus", gamma=0.9, lam=0.3, whiten_advantages=False)
    rewards, _, mask = batch()
    for row, t in itertools.product(range(8), range(6)):
        to_go = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, 6)) * mask[row, t].item()
        assert returns[row, t].item() == pytest.approx(to_go, abs=1e-5)
        assert advantages[row, t].item() == pytest.approx(to_go, abs=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_group_scores_are_the_sums_of_the_rewards_with_their_kl(estimator):
    # equal scores, so that only the KL in the rewards can tell the responses apart: 0 on row 0, 1 per token on row 1
    mask, kl = ragged_mask([3, 3]), torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    rewards = ppo_llm.compute_rewards(torch.ones(2), kl, mask, 0.1)
    config = Config(adv_estimator=estimator, rollout_n=2, norm_adv_by_std=False, whiten_advantages=False)
    advantages, _ = ppo_llm.compute_advantages(rewards, None, mask, config)
    expected = 0.3 if estimator == "rloo" else 0.15  # scores 1 and .7
    close(advantages, [[expected] * 3, [-expected] * 3])


def test_norm_adv_by_std_switches_grpos_division():
    rewards = torch.tensor([[0.0, 4.0], [0.0, 0.0]])  # centred +-2, deviation 2.828427
    for flag, expected in ((True, 0.707107), (False, 2.0)):
        config = Config(adv_estimator="grpo", rollout_n=2, norm_adv_by_std=flag)
        close(ppo_llm.compute_advantages(rewards, None, torch.ones(2, 2), config)[0],
              [[expected] * 2, [-expected] * 2], 1e-5)


def test_lam_critic_changes_the_returns_only():
    rewards, values, mask = batch()
    advantages, returns = advantages_of("gae", lam=0.5, lam_critic=1.0)
    plain_advantages, plain_returns = advantages_of("gae", lam=0.5)
    assert torch.equal(advantages, plain_advantages)
    assert not torch.allclose(returns, plain_returns)
    close(returns, gae_by_double_loop(rewards, values, mask, 1.0, 1.0)[1])


def test_a_lam_critic_of_zero_is_not_the_same_as_none():
    rewards, values, mask = batch()
    returns = advantages_of("gae", lam=1.0, lam_critic=0.0)[1]
    close(returns, gae_by_double_loop(rewards, values, mask, 1.0, 0.0)[1])


# ---------------------------------------------------------------------------------------------------------------------
# clipped_policy_loss: ratio clipped to [.9, 1.3], dual clip at 3.


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped", "bounded"), [
    (0.5, 2.0, -1.0, -1.0, 0, 0),  # below and good: pulled back up, gradient -A * ratio
    (1.0, 2.0, -2.0, -2.0, 0, 0),
    (1.2, 2.0, -2.4, -2.4, 0, 0),  # within the upper side, beyond the lower one
    (2.0, 2.0, -2.6, 0.0, 1, 0),  # above and good: -A * 1.3, nothing more to gain
    (5.0, 2.0, -2.6, 0.0, 1, 0),  # the dual clip is for negative advantages only
    (0.5, -2.0, 1.8, 0.0, 1, 0),  # below and bad: -A * .9
    (1.0, -2.0, 2.0, 2.0, 0, 0),
    (2.0, -2.0, 4.0, 4.0, 0, 0),  # above and bad: pushed back down
    (5.0, -2.0, 6.0, 0.0, 0, 1),  # beyond c: -A * 3, no gradient
    (2.0, 0.0, 0.0, 0.0, 0, 0),
])
def test_the_clipped_surrogate_has_the_papers_value_and_gradient(ratio, advantage, loss, slope, clipped, bounded):
    old = torch.tensor([[-1.5]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    out = ppo_llm.clipped_policy_loss(logprobs, old, torch.tensor([[advantage]]), 0.1, 0.3, 3.0)
    out[0].sum().backward()
    for ours, expected in zip((out[0], logprobs.grad, *out[1:]), (loss, slope, ratio, clipped, bounded), strict=True):
        close(ours, [[expected]])


def test_without_clip_c_the_loss_of_a_bad_token_grows_with_the_ratio():
    old, advantages = torch.zeros(1, 2), torch.tensor([[-2.0, -2.0]])
    logprobs = torch.tensor([[5.0, 50.0]]).log().requires_grad_()
    loss, _, clipped, bounded = ppo_llm.clipped_policy_loss(logprobs, old, advantages, 0.2, 0.2, None)
    loss.sum().backward()
    close(loss, [[10.0, 100.0]])
    close(logprobs.grad, [[10.0, 100.0]])
    assert clipped.sum() == bounded.sum() == 0


def test_at_ratio_1_the_gradient_is_minus_the_advantage_on_every_token():
    old, advantages = normal(0, 4, 5) - 3, normal(1, 4, 5)
    logprobs = old.clone().requires_grad_()
    loss, ratio, clipped, bounded = ppo_llm.clipped_policy_loss(logprobs, old, advantages, 0.2, 0.2, 3.0)
    loss.sum().backward()
    assert torch.equal(logprobs.grad, -advantages)
    assert torch.equal(ratio, torch.ones(4, 5))
    assert clipped.sum() == bounded.sum() == 0


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("clip_c", [3.0, None])
def test_an_absurd_log_ratio_gives_a_finite_loss_and_gradient(gap, advantage, clip_c):
    logprobs = torch.tensor([[gap]], requires_grad=True)
    loss, ratio, _, _ = ppo_llm.clipped_policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, 0.2, clip_c)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.item() == 0  # the log-ratio is clamped to +-20
    assert ratio.item() == pytest.approx(math.exp(math.copysign(20, gap)), rel=1e-5)


def test_what_is_logged_of_the_policy_loss_carries_no_gradient():
    logprobs = torch.zeros(2, 2, requires_grad=True)
    _, *logged = ppo_llm.clipped_policy_loss(logprobs, torch.zeros(2, 2), torch.ones(2, 2), 0.2, 0.2, 3.0)
    assert not any(x.requires_grad for x in logged)


# ---------------------------------------------------------------------------------------------------------------------
# clipped_value_loss.


@pytest.mark.parametrize(("value", "target", "loss", "slope", "clipped"), [
    (1.25, 3.0, 1.53125, -1.75, 0),  # inside the range: half of 1.75 squared
    (2.0, 3.0, 1.125, 0.0, 1),  # too far towards the return: 1.5 is worse, no gradient
    (2.0, 0.0, 2.0, 2.0, 0),  # too far away from it: 2 is worse than 1.5
    (0.0, -1.0, 1.125, 0.0, 1),  # the lower side: .5 is worse than 0
    (0.0, 3.0, 4.5, -3.0, 0),
])
def test_the_clipped_value_loss_is_half_the_worse_squared_error(value, target, loss, slope, clipped):
    values = torch.tensor([[value]], requires_grad=True)  # old value 1, range .5
    ours, is_clipped = ppo_llm.clipped_value_loss(values, torch.ones(1, 1), torch.tensor([[target]]), 0.5)
    ours.sum().backward()
    assert (ours.item(), values.grad.item(), is_clipped.item()) == (loss, slope, clipped)


@pytest.mark.parametrize("cliprange", [None, math.inf, 1e3])
def test_a_value_loss_without_effective_clipping_is_half_the_squared_error(cliprange):
    values, old_values, returns = normal(0, 40, 50), normal(1, 40, 50), normal(2, 40, 50)
    loss, _ = ppo_llm.clipped_value_loss(values, old_values, returns, cliprange)
    close(2 * loss, torch.nn.functional.mse_loss(values, returns, reduction="none"))


@pytest.mark.parametrize("cliprange", [None, math.inf, 0.5])
def test_no_value_inside_the_range_counts_as_clipped(cliprange):
    # old + (value - old) is not always the value in fp32, and with a return of 0 every last digit shows
    old_values, values = 0.3 * normal(1, 40, 50).clamp(-1, 1), 0.1 * normal(0, 40, 50).clamp(-1, 1)
    assert ppo_llm.clipped_value_loss(values, old_values, torch.zeros(40, 50), cliprange)[1].mean() == 0


# ---------------------------------------------------------------------------------------------------------------------
# loss_weights.


def loss_by_loops(token_loss: torch.Tensor, mask: torch.Tensor, mode: str, scale: float) -> float:
    rows = [valid_values(x, m) for x, m in zip(token_loss, mask, strict=True)]
    rows = [row for row in rows if len(row)]
    if mode == "token-mean":
        return sum(row.sum() for row in rows) / sum(len(row) for row in rows)
    if mode == "seq-mean-token-sum":
        return sum(row.sum() for row in rows) / len(rows)
    if mode == "seq-mean-token-mean":
        return sum(row.mean() for row in rows) / len(rows)
    return sum(row.sum() for row in rows) / scale


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [ragged_mask([1, 6, 3, 0, 4]), holed_mask(5, 5, 6)], ids=["padding", "holes"])
def test_a_loss_is_the_weighted_sum_that_its_mode_describes(mode, mask):
    token_loss = normal(0, 5, 6)
    loss = (token_loss * ppo_llm.loss_weights(mask, mode, 512.0)).sum()
    close(loss, loss_by_loops(token_loss, mask, mode, 512.0))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_weights_of_a_mean_sum_to_one(mode):
    assert ppo_llm.loss_weights(ragged_mask([1, 6, 3, 0, 4]), mode, 512.0).sum().item() == pytest.approx(1, abs=1e-6)


def test_each_mode_has_its_hand_worked_weights():
    mask = ragged_mask([1, 3])  # 4 tokens, 2 responses
    expected = {"token-mean": [[0.25, 0, 0], [0.25] * 3], "seq-mean-token-sum": [[0.5, 0, 0], [0.5] * 3],
                "seq-mean-token-mean": [[0.5, 0, 0], [1 / 6] * 3], "seq-mean-token-sum-norm": [[0.1, 0, 0], [0.1] * 3]}
    for mode in MODES:
        close(ppo_llm.loss_weights(mask, mode, 10.0), expected[mode], 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_tokens_and_padding_leave_the_weights_alone(mode):
    weights = ppo_llm.loss_weights(ragged_mask([1, 6, 3]), mode, 64.0)
    padded = ppo_llm.loss_weights(ragged_mask([1, 6, 3, 0, 0], width=40), mode, 64.0)
    assert torch.equal(padded[:3, :6], weights)
    assert (padded[3:] == 0).all() and (padded[:, 6:] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_mini_batch_without_any_token_has_weight_zero(mode):
    assert torch.equal(ppo_llm.loss_weights(torch.zeros(2, 3), mode, 8.0), torch.zeros(2, 3))


def test_an_unknown_aggregation_is_refused_by_the_command_line():
    with pytest.raises(SystemExit):
        ppo_llm.read_config(["--loss_agg_mode", "mean"])


# ---------------------------------------------------------------------------------------------------------------------
# explained_variance.


def test_a_perfect_critic_explains_all_variance_whatever_its_offset():
    returns, mask = normal(0, 4, 5), ragged_mask([5, 2, 3, 1])
    close(ppo_llm.explained_variance(returns, returns, mask), 1.0)
    close(ppo_llm.explained_variance(returns + 3, returns, mask), 1.0)


def test_a_constant_critic_explains_nothing():
    close(ppo_llm.explained_variance(torch.full((4, 5), 0.3), normal(0, 4, 5), ragged_mask([5, 2, 3, 1])), 0.0)


def test_a_critic_of_the_wrong_sign_explains_less_than_nothing():
    returns = normal(0, 4, 5)
    close(ppo_llm.explained_variance(-returns, returns, torch.ones(4, 5)), -3.0)  # error 2R: variance 4 Var(R)


def test_explained_variance_divides_by_the_variance_of_the_returns_and_not_of_the_values():
    values, returns, mask = 0.3 * normal(0, 6, 7), normal(1, 6, 7), holed_mask(6, 6, 7)
    v, r = valid_values(values, mask), valid_values(returns, mask)
    close(ppo_llm.explained_variance(values, returns, mask), 1 - (r - v).var() / r.var())


def test_explained_variance_ignores_what_lies_outside_the_mask():
    values, returns, mask = normal(0, 4, 5), normal(1, 4, 5), holed_mask(7, 4, 5)
    clean, spoiled = (ppo_llm.explained_variance(spoil(values, mask, x), spoil(returns, mask, y), mask)
                      for x, y in ((0.0, 0.0), (math.nan, 1e9)))
    assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.7])
@pytest.mark.parametrize("values", [torch.zeros(3, 7), normal(0, 3, 7)], ids=["constant critic", "noisy critic"])
def test_explained_variance_is_nan_where_all_returns_agree(value, values):
    assert ppo_llm.explained_variance(values, torch.full((3, 7), value), torch.ones(3, 7)).isnan()


# ---------------------------------------------------------------------------------------------------------------------
# learning_rate_factor.


def schedule_of(name: str, steps: int, per_step: int, warmup: int) -> list[float]:
    """The factor of every update of a run."""
    return [ppo_llm.learning_rate_factor(step + update / per_step, per_step, steps, warmup, name)
            for step in range(steps) for update in range(per_step)]


def test_the_linear_schedule_warms_up_to_1_and_falls_by_equal_parts():
    # 4 steps of 2 updates, the first of them warm-up: 2 updates up, then 6 down
    close(schedule_of("linear", 4, 2, 1), [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], 1e-9)


def test_the_cosine_schedule_is_half_a_cosine():
    # cos(0), cos(60 deg), cos(120 deg): (1 + 1) / 2, (1 + .5) / 2, (1 - .5) / 2
    close(schedule_of("cosine", 3, 1, 0), [1, 0.75, 0.25], 1e-9)


def test_the_constant_schedule_is_constant_after_the_warm_up():
    close(schedule_of("constant", 5, 1, 2), [0.5, 1, 1, 1, 1], 1e-9)


def test_linear_and_cosine_end_at_zero():
    for name in ("linear", "cosine"):
        assert ppo_llm.learning_rate_factor(10, 3, 10, 2, name) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "per_step", "warmup"), [
    (1, 1, 0), (1, 12, 0), (7, 3, 0), (7, 3, 2), (5, 4, 5), (5, 4, 9), (100, 8, 10), (2, 7, 1)])
def test_the_learning_rate_rises_then_falls_and_is_never_negative(name, steps, per_step, warmup):
    factors = schedule_of(name, steps, per_step, warmup)
    peak = min(warmup * per_step, len(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert all(a < b for a, b in itertools.pairwise(factors[:peak]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(factors[peak:]))
    if warmup < steps:
        assert max(factors) == pytest.approx(1)
        updates = (steps - warmup) * per_step
        last = {"constant": 1, "linear": 1 / updates, "cosine": math.sin(math.pi / updates / 2) ** 2}[name]
        assert factors[-1] == pytest.approx(last, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# verl's formulas (core_algos.py, ray_trainer.py at b178a3cd5), written as they stand there: the same numbers
# on random tensors with holes in their masks.


def verl_masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / (mask.sum() + 1e-8)


def verl_whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    mean = verl_masked_mean(x, mask)
    n = mask.sum()
    variance = verl_masked_mean((x - mean) ** 2, mask) * n / (n - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def rollout_numbers(seed: int) -> tuple[torch.Tensor, ...]:
    """Rewards, values and a mask [16, 12] with holes: two prompts with eight responses each."""
    mask = holed_mask(seed, 16, 12)
    return normal(seed, 16, 12) * mask, normal(seed + 1, 16, 12) * mask, mask


@pytest.mark.parametrize("seed", range(3))
def test_gae_with_whitening_is_verls(seed):
    rewards, values, mask = rollout_numbers(seed)
    next_value = last_gae = 0.0
    columns = []
    for t in reversed(range(12)):
        delta = rewards[:, t] + 0.97 * next_value - values[:, t]
        gae = delta + 0.97 * 0.9 * last_gae
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        last_gae = gae * mask[:, t] + (1 - mask[:, t]) * last_gae
        columns.append(last_gae)
    advantages = torch.stack(columns[::-1], 1)
    ours, returns = ppo_llm.compute_advantages(rewards, values, mask, Config(gamma=0.97, lam=0.9))
    close(returns * mask, (advantages + values) * mask)
    close(ours * mask, verl_whiten(advantages, mask) * mask)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_critic_free_advantages_are_verls(estimator):
    rewards, _, mask = rollout_numbers(0)
    if estimator == "reinforce_plus_plus":
        mask = ragged_mask([12, 3, 7, 1] * 4)  # with holes verl cuts the credit there; ours passes over them
        rewards = rewards * mask
    scores = (rewards * mask).sum(1)
    advantages = torch.zeros(16)
    for row in range(16):
        group = scores[:8] if row < 8 else scores[8:]
        if estimator == "grpo":
            advantages[row] = (scores[row] - group.mean()) / (group.std() + 1e-6)
        elif estimator == "rloo":
            advantages[row] = scores[row] * 8 / 7 - group.mean() * 8 / 7
        else:
            advantages[row] = scores[row] - group.mean()
    expected = advantages[:, None] * mask
    if estimator == "reinforce_plus_plus":
        running = torch.zeros(16)
        for t in reversed(range(12)):
            running = rewards[:, t] + 0.97 * running
            expected[:, t] = running
            running = running * mask[:, t]
    if estimator.startswith("reinforce"):
        expected = verl_whiten(expected, mask) * mask
    config = Config(adv_estimator=estimator, rollout_n=8, gamma=0.97)
    close(ppo_llm.compute_advantages(rewards, None, mask, config)[0], expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_loss_with_importance_weights_is_verls(mode):
    logprobs, old, advantages, mask = (*(normal(seed, 16, 12) for seed in (0, 1, 2)), holed_mask(0, 16, 12))
    sampled = old + 0.5 * normal(3, 16, 12)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 0.1, 1 + 0.3))
    losses = torch.where(advantages < 0, torch.minimum(-advantages * 3.0, clipped), clipped)
    losses = losses * (old - sampled).clamp(-20, 20).exp().clamp(max=2.0)
    lengths = mask.sum(1)
    if mode == "token-mean":
        expected = verl_masked_mean(losses, mask)
    elif mode == "seq-mean-token-sum":
        expected = (losses * mask).sum(1).mean()
    elif mode == "seq-mean-token-mean":
        expected = ((losses * mask).sum(1) / (lengths + 1e-8)).mean()
    else:
        expected = (losses * mask).sum() / 12
    ours = ppo_llm.clipped_policy_loss(logprobs, old, advantages, 0.1, 0.3, 3.0)[0]
    ours = ours * ppo_llm.importance_weights(old, sampled, mask, 2.0)
    close((ours * ppo_llm.loss_weights(mask, mode, 12.0)).sum(), expected)


def test_the_value_loss_and_its_clipped_share_are_verls():
    values, old, returns, mask = (*(normal(seed, 16, 12) for seed in (0, 1, 2)), holed_mask(0, 16, 12))
    clipped = torch.clamp(values, old - 0.5, old + 0.5)
    errors = (values - returns) ** 2
    clipped_errors = (clipped - returns) ** 2
    loss, is_clipped = ppo_llm.clipped_value_loss(values, old, returns, 0.5)
    close(masked_mean(loss, mask), 0.5 * verl_masked_mean(torch.maximum(errors, clipped_errors), mask))
    close(masked_mean(is_clipped, mask), verl_masked_mean((clipped_errors > errors).float(), mask))


def test_rewards_with_kl_and_the_next_coefficient_are_verls():
    kl, mask = normal(0, 16, 12), ragged_mask([12, 3, 7, 1] * 4)
    scores = torch.zeros(16, 12)
    scores[torch.arange(16), mask.sum(1).long() - 1] = normal(1, 16)
    close(ppo_llm.compute_rewards(normal(1, 16), kl, mask, 0.2), (scores - 0.2 * kl) * mask)
    current = ((kl * mask).sum(1) / mask.sum(1)).mean().item()
    controller = AdaptiveKLController(0.2, 0.1, 10000)
    controller.update(current, 16)
    error = np.clip(current / 0.1 - 1, -0.2, 0.2)
    assert controller.coef == pytest.approx(0.2 * (1 + error * 16 / 10000), rel=1e-9)
