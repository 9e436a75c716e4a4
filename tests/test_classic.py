"""ppo_classic.py: formulas against independent computations, autoreset modes, learning, resume, faults, bad input."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import matplotlib.figure
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import ppo_classic
from ppo_classic import Agent, Config, Stream, UsageError, collect_rollout, compute_gae, ppo_gradient, update

ROOT = Path(__file__).resolve().parents[1]
MODES = {"next": AutoresetMode.NEXT_STEP, "same": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing training_curves.png takes longer than these trainings; the script alone draws it."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **rest: Path(path).touch())


class Toy(gym.Env):
    """Reward 1 per step; the episode ends after `limit` steps, by a time limit or (ends="terminated") for good.

    sees="one": the observation is always 1. sees="time": it is the number of steps taken: `limit` in the final state.
    """

    def __init__(self, ends="truncated", sees="one", space=None, actions=None, fault=None, limit=3,
                 render_mode=None):
        self.observation_space = space or Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = actions or Discrete(2)
        self.ends, self.sees, self.fault, self.limit, self.received = ends, sees, fault, limit, []

    def observe(self):
        if not isinstance(self.observation_space, Box):
            return self.observation_space.sample()
        return np.full(self.observation_space.shape, self.t if self.sees == "time" else 1, self.observation_space.dtype)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return (self.observe() * math.inf if self.fault == "start" else self.observe()), {}

    def step(self, action):
        self.t += 1
        self.received.append(action)
        obs, reward, ended = self.observe(), 1.0, self.t == self.limit
        if self.fault == "raises" and self.t == 2:
            raise RuntimeError("the simulator lost its mind")
        if self.fault == "observation" and self.t == 2:
            obs = np.full_like(obs, np.nan)
        if self.fault == "reward" and self.t == 2:
            reward = math.nan
        return obs, reward, ended and self.ends == "terminated", ended and self.ends == "truncated", {}


def register(name: str, mode: AutoresetMode | None = None, **kwargs) -> str:
    """An id for Toy(**kwargs); with a mode, one that has a native vector environment of that autoreset mode."""
    env_id = f"{name}-v0"
    native = mode and (lambda num_envs, **_: SyncVectorEnv([lambda: Toy(**kwargs)] * num_envs, autoreset_mode=mode))
    gym.registry.pop(env_id, None)
    gym.register(env_id, entry_point=Toy, kwargs=kwargs, vector_entry_point=native, disable_env_checker=True)
    return env_id


def tiny(**changes) -> Config:
    settings = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 100,
                "hidden_size": 16, "eval_episodes": 3, "save_every": 2, "anneal_lr": True, "learning_rate": 1e-3}
    return Config(**settings | changes)


def start(config: Config) -> tuple[Agent, Stream]:
    torch.manual_seed(config.seed)
    envs = ppo_classic.make_envs(config, config.num_envs)
    stream = Stream(envs, config.env_id)
    stream.restart(config.seed, ppo_classic.RESET, 0)
    return Agent(envs, config), stream


def read_log(run_dir: Path, times: bool = False) -> list[dict]:
    with open(run_dir / "training_metrics.csv") as file:
        return [{k: x for k, x in row.items() if times or not k.startswith("time/")} for row in csv.DictReader(file)]


def newest(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(ppo_classic.checkpoints(run_dir)[-1] / "agent.safetensors")


# ---- Formulas -------------------------------------------------------------------------------------------------------


def test_gae_equals_a_double_loop_over_terminations_and_truncations():
    rng, gamma, lam = np.random.default_rng(0), 0.9, 0.8
    rewards, values, following = rng.standard_normal((3, 12, 4))
    terminated, truncated = rng.random((2, 12, 4)) < 0.2
    done = terminated | truncated
    advantages, returns = compute_gae(rewards, values, following, terminated, done, gamma, lam)
    for i in range(4):
        for t in range(12):
            expected, weight = 0.0, 1.0
            for k in range(t, 12):
                bootstrap = 0.0 if terminated[k, i] else following[k, i]
                expected += weight * (rewards[k, i] + gamma * bootstrap - values[k, i])
                weight *= gamma * lam
                if done[k, i]:
                    break
            assert advantages[t, i] == pytest.approx(expected, abs=1e-12)
    assert np.allclose(returns, advantages + values)


def batch_of(agent: Agent, seed: int = 0, rows: int = 64) -> tuple[np.ndarray, dict]:
    """Inputs and a mini-batch in which ratios, values and advantages fall on both sides of every clip."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype("f4")

    inputs = normal(rows, agent.layers[0][0][0].shape[1])
    outputs = agent.forward(inputs)
    noise = getattr(rng, agent.head.noise)(size=(rows, agent.head.num_outputs)).astype("f4")
    actions = agent.head.act(outputs[:, :-1], noise)
    logprobs = agent.head.evaluate(outputs[:, :-1], actions)[0] + 0.5 * normal(rows)
    batch = {"actions": actions, "logprobs": logprobs, "values": outputs[:, -1] + 0.4 * normal(rows),
             "returns": normal(rows), "advantages": 2 * normal(rows), "weights": np.abs(normal(rows)) / rows}
    return inputs, batch


ACTIONS = {"discrete": Discrete(5, start=2), "multi": MultiDiscrete([3, 2, 4]), "box": Box(-1, 1, (3,)),
           "one number": Box(-1, 1, (1,))}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ACTIONS)
def test_the_written_gradient_is_that_of_autograd_through_the_same_losses(kind, shared):
    env_id = register("Gradient", space=Box(-1, 1, (6,)), actions=ACTIONS[kind])
    config = tiny(env_id=env_id, shared_network=shared, dual_clip=1.5, ent_coef=0.03, vf_coef=0.7, max_grad_norm=1e9)
    agent, _ = start(config)
    is_gaussian = isinstance(agent.head, ppo_classic.Gaussian)
    if is_gaussian:
        agent.networks.log_std.data.copy_(torch.tensor([-0.5, 0.1, 0.3][: agent.head.num_outputs]))
    inputs, batch = batch_of(agent)
    d_outputs, d_log_std, ratio, terms = ppo_gradient(agent.head, agent.forward(inputs), batch, 0.2, 0.3, config)
    written = []
    agent.adam = lambda lr: written.append(agent.weights.grad.clone())
    agent.step(d_outputs, d_log_std, 0.0)

    t = {name: torch.from_numpy(x) for name, x in batch.items()}
    outputs = torch.cat([network(torch.from_numpy(inputs)) for network in agent.networks], 1)
    if is_gaussian:
        policy = torch.distributions.Normal(outputs[:, :-1], agent.networks.log_std.exp())
        logprobs, entropy = policy.log_prob(t["actions"]).sum(1), policy.entropy().sum(1)
    else:
        sizes = [5] if kind == "discrete" else [3, 2, 4]
        parts = [torch.distributions.Categorical(logits=x) for x in outputs[:, :-1].split(sizes, 1)]
        logprobs = sum(part.log_prob(t["actions"][:, i]) for i, part in enumerate(parts))
        entropy = sum(part.entropy() for part in parts)
    policy_loss, _, clipped, bounded = ppo_classic.clipped_policy_loss(
        logprobs, t["logprobs"], t["advantages"], 0.2, 0.2, 1.5)
    value_loss, value_clipped = ppo_classic.clipped_value_loss(outputs[:, -1], t["values"], t["returns"], 0.2)
    log_ratio = logprobs - t["logprobs"]
    loss = policy_loss + 0.7 * value_loss - 0.03 * entropy + 0.3 * (log_ratio.exp() - 1 - log_ratio)
    (loss * t["weights"]).sum().backward()
    assert min(clipped.sum(), bounded.sum(), value_clipped.sum()) >= 3  # every branch is taken
    assert agent.weights.grad.abs().max() > 1e-2
    assert torch.allclose(written[0], agent.weights.grad, atol=2e-7)
    assert np.allclose(terms[2], entropy.detach(), atol=1e-5)
    assert np.allclose(ratio, log_ratio.detach().exp(), rtol=1e-5)


def test_numpy_and_torch_give_the_same_outputs():
    agent, _ = start(tiny())
    inputs = np.random.default_rng(0).standard_normal((7, 4)).astype("f4")
    expected = torch.cat([network(torch.from_numpy(inputs)) for network in agent.networks], 1).detach()
    assert np.allclose(agent.forward(inputs), expected, atol=1e-6)
    assert np.allclose(agent.policy(inputs), expected[:, :-1], atol=1e-6)
    assert np.array_equal(agent.predict(np.tile(inputs, (300, 1)))[-7:], agent.predict(inputs)) or np.allclose(
        agent.predict(np.tile(inputs, (300, 1)))[-7:], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIONS)
def test_sampled_actions_follow_the_log_probs(kind):
    env_id = register("Sampling", space=Box(-1, 1, (2,)), actions=ACTIONS[kind])
    agent, _ = start(tiny(env_id=env_id))
    rng, rows = np.random.default_rng(0), 40_000
    outputs = np.tile(rng.standard_normal(agent.head.num_outputs).astype("f4"), (rows, 1))
    noise = getattr(rng, agent.head.noise)(size=outputs.shape).astype("f4")
    actions = agent.head.act(outputs, noise)
    logprobs, entropy, _ = agent.head.evaluate(outputs, actions)
    assert -logprobs.mean() == pytest.approx(entropy[0], abs=0.03)  # E[-log p] is the entropy
    if kind == "discrete":
        shares = np.bincount(actions[:, 0], minlength=5) / rows
        assert np.allclose(shares, torch.from_numpy(outputs[0]).softmax(0), atol=0.01)
    greedy = agent.head.act(outputs[:1], 0.0)
    assert agent.head.evaluate(outputs[:1], greedy)[0] >= logprobs.max() - 1e-5


def test_the_logged_kl_is_of_old_against_new():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    rng, head = np.random.default_rng(0), ppo_classic.Categorical(Discrete(3))
    actions = rng.choice(3, 100_000, p=p)[:, None]
    outputs = np.concatenate([np.tile(np.log(q), (len(actions), 1)), np.zeros((len(actions), 1))], 1).astype("f4")
    zeros = np.zeros(len(actions), "f4")
    batch = {"actions": actions, "logprobs": np.log(p)[actions[:, 0]].astype("f4"), "advantages": zeros,
             "values": zeros, "returns": zeros, "weights": zeros + 1}
    terms = ppo_gradient(head, outputs, batch, 0.2, 0.0, tiny())[3]
    assert terms[3].mean() == pytest.approx((p * np.log(p / q)).sum(), abs=0.01)  # KL(q, p) is 0.39


def test_advantages_are_normalised_per_mini_batch_over_the_mask():
    x = np.random.default_rng(0).standard_normal((3, 8)).astype("f4") * 5 + 2
    mask = np.ones_like(x)
    mask[2, 5:], x[2, 5:] = 0, 1e6
    white = ppo_classic.normalize_rows(x, mask)
    assert np.allclose(white[0], (x[0] - x[0].mean()) / x[0].std(ddof=1), atol=1e-5)
    assert np.allclose(white[2, :5], (x[2, :5] - x[2, :5].mean()) / x[2, :5].std(ddof=1), atol=1e-5)
    assert (white[2, 5:] == 0).all()


def test_the_gaussian_reads_its_deviation_from_the_weights_wherever_they_lie():
    agent, _ = start(tiny(env_id=register("Box", actions=Box(-1, 1, (2,)))))
    agent.head.parameter.data = torch.tensor([1.0, 2.0])  # other memory, as on a GPU
    assert agent.head.log_std.tolist() == [1.0, 2.0] and agent.head.parameter is agent.networks.log_std


@pytest.mark.parametrize("row", [[3.0] * 8, [1e6] * 8, [0.95] * 7 + [0.0]])
def test_equal_rewards_give_finite_small_advantages(row):
    white = ppo_classic.normalize_rows(np.array([row], "f4"), np.ones((1, len(row)), "f4"))
    assert np.isfinite(white).all() and np.abs(white).max() < 10
    assert (np.ptp(row) > 0) == (np.abs(white).max() > 0)


def test_a_mini_batch_of_one_row_is_finite():
    agent, stream = start(tiny(num_minibatches=32))
    rollout = collect_rollout(agent, stream, 0, tiny(num_minibatches=32))
    metrics = update(agent, rollout, 0, 1e-3, 0.2, 0.0, tiny(num_minibatches=32))
    assert math.isfinite(metrics["policy/loss"]) and metrics["optim/skipped_steps"] == 0


def test_value_clipping_with_an_infinite_range_is_no_clipping():
    x, old, returns = torch.randn(3, 50)
    unclipped, flags = ppo_classic.clipped_value_loss(x, old, returns, None)
    assert torch.equal(ppo_classic.clipped_value_loss(x, old, returns, 1e9)[0], unclipped)
    assert torch.allclose(unclipped, 0.5 * (x - returns) ** 2) and flags.sum() == 0


def test_the_kl_coefficient_doubles_and_halves_as_in_the_paper():
    assert [ppo_classic.adapt_kl_coef(1.0, kl, 0.01) for kl in (0.0151, 0.0149, 0.0067, 0.0066)] == [2, 1, 1, 0.5]


# ---- Autoreset modes: a value that is known in closed form -----------------------------------------------------------


def learned_value(mode: str, ends: str, **changes) -> float:
    """V of the one state of Toy after TD(0) has converged; gamma 0.9. Endless reward 1 is worth 1 / (1 - 0.9) = 10."""
    env_id = register(f"Value{mode}", MODES[mode], ends=ends)
    config = tiny(env_id=env_id, num_envs=3, num_steps=32, gamma=0.9, gae_lambda=0.0, clip_vloss=False,
                  num_minibatches=1, update_epochs=8, norm_adv=False, **changes)
    agent, stream = start(config)
    for step in range(120):
        rollout = collect_rollout(agent, stream, step, config)
        update(agent, rollout, step, 3e-3, 0.2, 0.0, config)
    return float(agent.predict(np.ones((1, 1), "f4"))[0, -1])


@pytest.mark.parametrize("mode", MODES)
def test_a_time_limit_does_not_change_the_value(mode):
    assert learned_value(mode, "truncated") == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_does(mode):  # V = 1 + 0.9 * 2/3 * V: one step in three is the last one
    assert learned_value(mode, "terminated") == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_counting_a_time_limit_as_a_failure_misses_the_value(mode):
    assert learned_value(mode, "truncated", bootstrap_truncated=False) == pytest.approx(2.5, rel=0.02)


def test_training_on_dummy_rows_misses_the_value():  # V = 3/4 + 0.9 V: one row in four has reward 0 and goes on
    assert learned_value("next", "truncated", mask_dummy_rows=False) == pytest.approx(7.5, rel=0.02)


@pytest.mark.parametrize("ends", ["truncated", "terminated"])
def test_all_modes_see_the_same_transitions_and_advantages(ends):
    found = {}
    for name, mode in MODES.items():
        env_id = register(f"Same{name}", mode, ends=ends, sees="time")
        config = tiny(env_id=env_id, num_envs=1, num_steps=24, gae_lambda=0.7)
        agent, stream = start(config)
        r = collect_rollout(agent, stream, 0, config)
        valid = r.valid[:, 0]
        assert valid.mean() == (0.75 if name == "next" else 1)
        assert [length for _, length in stream.ended] == [3] * (6 if name == "next" else 8)
        found[name] = [x[:-1][valid][:12, 0] if len(x) == 25 else x[valid][:12, 0] for x in
                       (r.inputs, r.rewards, r.terminated, r.done, r.values, r.advantages)]
    for name in ("same", "disabled"):
        for x, y in zip(found["next"], found[name], strict=True):
            assert np.allclose(x, y, atol=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_truncation_bootstraps_from_the_final_observation_and_no_other(mode):
    env_id = register(f"Final{mode}", MODES[mode], sees="time")
    config = tiny(env_id=env_id, num_envs=2, gae_lambda=0.0, num_steps=15)
    agent, stream = start(config)
    r = collect_rollout(agent, stream, 0, config)
    final, first = agent.predict(np.array([[3.0], [0.0]], "f4"))[:, -1]
    assert abs(final - first) > 1e-3
    assert np.allclose(r.returns[r.done], 1 + config.gamma * final, atol=1e-6) and r.done.sum() >= 6


def test_dummy_rows_touch_no_loss_no_statistic_and_no_counter():
    env_id = register("Dummy", MODES["next"], sees="time")
    config = tiny(env_id=env_id, num_steps=24, norm_obs=True, norm_reward="scale")
    agent, stream = start(config)
    r = collect_rollout(agent, stream, 0, config)
    assert agent.statistics["obs"].count == pytest.approx(r.valid.sum(), abs=1e-3) and r.valid.sum() == 36
    assert agent.statistics["obs"].mean == pytest.approx(1, abs=1e-3)  # of 0, 1, 2; the dummy rows show 3
    assert agent.statistics["returns"].count == pytest.approx(36, abs=1e-3)
    results = []
    for poison in (0.0, 1e9):
        agent, stream = start(config)
        r = collect_rollout(agent, stream, 0, config)
        for x in (r.advantages, r.returns, r.values, r.rewards, r.logprobs):
            x[~r.valid] += poison
        metrics = update(agent, r, 0, 1e-3, 0.2, 0.0, config)
        results.append((metrics, agent.weights.detach().clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_the_reward_scale_starts_anew_with_every_episode():
    config = tiny(env_id=register("Scale", MODES["same"]), num_envs=1, num_steps=6, gamma=0.5, norm_reward="scale")
    agent, stream = start(config)
    r = collect_rollout(agent, stream, 0, config)
    discounted = np.array([1, 1.5, 1.75] * 2)
    assert agent.statistics["returns"].var == pytest.approx(discounted.var(), rel=1e-3)
    assert np.allclose(r.rewards, 1 / discounted.std(), rtol=1e-3)


# ---- Update ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_first_ratio_is_one(env_id):
    config = dataclasses.replace(ppo_classic.choose_preset(env_id)[1], num_steps=64, num_envs=4, num_minibatches=4)
    agent, stream = start(config)
    for step in range(3):
        metrics = update(agent, collect_rollout(agent, stream, step, config), step, 3e-4, 0.2, 0.0, config)
        assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-5)


def test_learning_rate_zero_changes_nothing():
    agent, stream = start(tiny())
    before = agent.weights.detach().clone()
    metrics = update(agent, collect_rollout(agent, stream, 0, tiny()), 0, 0.0, 0.2, 0.0, tiny())
    assert torch.equal(before, agent.weights) and metrics["policy/approx_kl"] < 1e-8


def test_every_valid_row_is_used_once_per_epoch_also_when_mini_batches_are_ragged(monkeypatch):
    config = tiny(num_envs=1, num_steps=10, num_minibatches=4, update_epochs=3)
    agent, stream = start(config)
    rollout, seen = collect_rollout(agent, stream, 0, config), []

    def spy(head, outputs, batch, *rest):
        seen.append((batch["returns"], batch["weights"]))
        return ppo_gradient(head, outputs, batch, *rest)

    monkeypatch.setattr(ppo_classic, "ppo_gradient", spy)
    metrics = update(agent, rollout, 0, 1e-3, 0.2, 0.0, config)
    assert len(seen) == metrics["optim/updates"] == 12
    for epoch in range(3):
        used = [x for returns, weights in seen[4 * epoch : 4 * epoch + 4] for x in returns[weights > 0]]
        assert np.allclose(np.sort(used), np.sort(rollout.returns[rollout.valid]).astype("f4"))
    assert all(weights.sum() == pytest.approx(1) for _, weights in seen)


@pytest.mark.parametrize(("num_minibatches", "rows", "steps"), [(2, 1, 1), (2, 2, 2), (4, 5, 3), (8, 9, 5)])
def test_no_optimizer_step_is_taken_without_rows(num_minibatches, rows, steps):
    config = tiny(num_envs=1, num_steps=max(2, rows), num_minibatches=num_minibatches, update_epochs=1)
    agent, stream = start(config)
    rollout = collect_rollout(agent, stream, 0, config)
    rollout.valid[:] = np.arange(config.num_steps)[:, None] < rows
    assert update(agent, rollout, 0, 1e-3, 0.2, 0.0, config)["optim/updates"] == agent.updates == steps


def test_the_smallest_rollout_trains_where_every_second_step_is_a_reset(here):
    env_id = register("Short", MODES["next"], ends="terminated", limit=1)
    sizes = {"num_envs": 1, "num_steps": 2, "num_minibatches": 2, "total_timesteps": 9}
    ppo_classic.main(tiny(env_id=env_id, output_dir="run", **sizes))
    log = read_log(here / "run")
    assert [row["global_step"] for row in log] == [str(n) for n in range(1, 10)]
    assert all(math.isfinite(float(row["policy/loss"])) for row in log)


def test_logged_means_are_over_valid_rows():
    config = tiny(update_epochs=1, num_minibatches=1, norm_adv=False)
    agent, stream = start(config)
    r = collect_rollout(agent, stream, 0, config)
    metrics = update(agent, r, 0, 1e-3, 0.2, 0.0, config)
    valid = r.valid
    assert metrics["policy/loss"] == pytest.approx(-r.advantages[valid].mean(), rel=1e-4)
    assert metrics["value/loss"] == pytest.approx(0.5 * (r.advantages[valid] ** 2).mean(), rel=1e-4)
    explained = 1 - (r.returns - r.values)[valid].var() / r.returns[valid].var()
    assert metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-4)


def test_target_kl_ends_the_update_after_the_epoch_and_counters_are_those_of_real_steps():
    config = tiny(update_epochs=5, target_kl=1e-9)
    agent, stream = start(config)
    metrics = update(agent, collect_rollout(agent, stream, 0, config), 0, 1e-2, 0.2, 0.0, config)
    assert metrics["optim/epochs"] == 1 and metrics["optim/updates"] == agent.updates == 2
    assert metrics["policy/kl_last"] > 1e-9
    loose = tiny(update_epochs=5, target_kl=1e9)
    assert update(agent, collect_rollout(agent, stream, 1, loose), 1, 1e-2, 0.2, 0.0, loose)["optim/updates"] == 12


def test_a_gradient_that_is_not_finite_is_skipped_and_three_in_a_row_end_the_run():
    agent, _ = start(tiny())
    inputs, batch = batch_of(agent)
    agent.forward(inputs)
    before, bad = agent.weights.detach().clone(), np.full((64, 3), np.nan, "f4")
    assert not math.isfinite(agent.step(bad, None, 1e-3))
    assert torch.equal(before, agent.weights) and (agent.updates, agent.skipped) == (0, 1)
    agent.step(np.ones((64, 3), "f4"), None, 1e-3)
    assert torch.isfinite(agent.weights).all() and not torch.equal(before, agent.weights) and agent.updates == 1
    agent.step(bad, None, 1e-3)
    agent.step(bad, None, 1e-3)
    with pytest.raises(UsageError, match="not finite three times"):
        agent.step(bad, None, 1e-3)


def test_adam_is_that_of_torch():
    agent, _ = start(tiny())
    weights = torch.nn.Parameter(agent.weights.clone())
    optimizer = torch.optim.Adam([weights], eps=1e-5)
    for agent.updates in range(1, 30):
        gradient = torch.randn(len(weights)) * 10.0 ** torch.randint(-6, 1, (len(weights),))
        agent.weights.grad.copy_(gradient)
        agent.adam(lr=1e-3 / agent.updates)
        weights.grad, optimizer.param_groups[0]["lr"] = gradient, 1e-3 / agent.updates
        optimizer.step()
    assert torch.allclose(agent.weights, weights, atol=1e-7) and not torch.equal(agent.weights[:9], torch.zeros(9))


def test_the_gradient_norm_is_clipped():
    agent, _ = start(tiny(max_grad_norm=0.25))
    norms = []
    agent.adam = lambda lr: norms.append(agent.weights.grad.norm().item())
    agent.forward(np.ones((8, 4), "f4"))
    assert agent.step(np.full((8, 3), 100, "f4"), None, 1e-3) > 10
    assert norms[0] == pytest.approx(0.25, rel=1e-4)


def test_the_penalty_keeps_the_policy_close():
    kl = {}
    for coefficient in (0.0, 30.0):
        config = tiny(kl_coef=coefficient, update_epochs=10, num_steps=64, ent_coef=0.0, clip_coef=10.0)
        agent, stream = start(config)
        for step in range(3):
            metrics = update(agent, collect_rollout(agent, stream, step, config), step, 1e-2, 10.0, coefficient, config)
        kl[coefficient] = metrics["policy/kl_last"]
    assert kl[30.0] < 0.3 * kl[0.0]


def test_recomputed_advantages_come_from_the_values_of_the_moment():
    config = tiny(recompute_advantages=True, update_epochs=3)
    agent, stream = start(config)
    r = collect_rollout(agent, stream, 0, config)
    before = r.advantages.copy()
    update(agent, r, 0, 1e-2, 0.2, 0.0, config)
    assert not np.allclose(before, r.advantages)
    plain = tiny(update_epochs=3)
    agent, stream = start(plain)
    r = collect_rollout(agent, stream, 0, plain)
    before = r.advantages.copy()
    update(agent, r, 0, 1e-2, 0.2, 0.0, plain)
    assert np.array_equal(before, r.advantages)


# ---- Spaces and presets ----------------------------------------------------------------------------------------------


SPACES = {"vector": Box(-1, 1, (3,)), "matrix": Box(-1, 1, (2, 3), np.float64), "discrete": Discrete(4),
          "dict": Dict(a=Box(-1, 1, (2,)), b=Discrete(3)), "tuple": Tuple((Box(-1, 1, (2,)), MultiBinary(2))),
          "pixels": Box(0, 255, (36, 40, 3), np.uint8), "channels first": Box(0, 255, (4, 36, 36), np.uint8)}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_observation_and_action_spaces_train(space, kind):
    env_id = register("Spaces", space=SPACES[space], actions=ACTIONS[kind])
    config = tiny(env_id=env_id, norm_obs=True)
    agent, stream = start(config)
    before = agent.weights.detach().clone()
    for step in range(2):
        metrics = update(agent, collect_rollout(agent, stream, step, config), step, 1e-3, 0.2, 0.0, config)
    assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-4) and not torch.equal(before, agent.weights)
    assert agent.image == ("pixels" in space or "channels" in space)


def test_multi_discrete_actions_reach_the_environment():
    env_id = register("Multi", actions=MultiDiscrete([3, 2, 4], start=[1, 0, 5]))
    agent, stream = start(tiny(env_id=env_id))
    collect_rollout(agent, stream, 0, tiny(env_id=env_id))
    received = np.array([a for env in stream.envs.envs for a in env.unwrapped.received])
    assert (received.min(0) == [1, 0, 5]).all() and (received.max(0) == [3, 1, 8]).all()


def test_box_actions_are_clipped_for_the_environment_and_stored_unclipped():
    env_id = register("Clip", actions=Box(np.float32([-0.5, 0.0]), np.float32([0.5, 7.0])))
    config = tiny(env_id=env_id, num_steps=64)
    agent, stream = start(config)
    r = collect_rollout(agent, stream, 0, config)
    received = np.array([a for env in stream.envs.envs for a in env.unwrapped.received])
    assert received.dtype == np.float32
    assert received[:, 0].min() == -0.5 and received[:, 0].max() == 0.5 and received[:, 1].min() == 0
    assert r.actions[..., 0].max() > 1 and r.actions[..., 1].min() < -0.5
    mean = agent.policy(r.inputs[5])
    expected = torch.distributions.Normal(torch.from_numpy(mean), 1.0).log_prob(torch.from_numpy(r.actions[5])).sum(1)
    assert np.allclose(r.logprobs[5], expected, atol=1e-5)


@pytest.mark.parametrize("space", [MultiBinary(3), Tuple((Discrete(2), Discrete(2)))])
def test_an_action_space_that_is_not_supported_is_refused_by_name(space):
    with pytest.raises(UsageError, match=type(space).__name__):
        start(tiny(env_id=register("Refused", actions=space)))


def test_an_observation_space_that_is_not_supported_is_refused_by_name():
    with pytest.raises(UsageError, match="Text|Sequence|Graph"):
        start(tiny(env_id=register("Refused", space=gym.spaces.Sequence(Discrete(3)))))


@pytest.mark.parametrize(("env_id", "name"), [
    ("CartPole-v1", "discrete"), ("MountainCarContinuous-v0", "box"), ("Pendulum-v1", "Pendulum"),
    ("MountainCar-v0", "MountainCar"), ("Acrobot-v1", "Acrobot")])
def test_presets_follow_from_the_environment(env_id, name):
    found, config = ppo_classic.choose_preset(env_id)
    assert found == name and config.env_id == env_id
    ppo_classic.check_config(config)


def test_pixels_have_their_preset():
    found, config = ppo_classic.choose_preset(register("Pixels", space=SPACES["pixels"]))
    assert found == "pixels" and config.norm_reward == "sign" and config.clip_coef == 0.1


@pytest.mark.parametrize("preset", ppo_classic.PRESETS)
def test_every_preset_names_options_that_exist_and_work(preset):
    ppo_classic.check_config(dataclasses.replace(Config(), **ppo_classic.PRESETS[preset]))


def test_native_vector_environments_are_used_where_they_exist():
    with ppo_classic.closing(ppo_classic.make_envs(Config(), 2)) as envs:
        assert type(envs).__name__ == "CartPoleVectorEnv"
    with ppo_classic.closing(ppo_classic.make_envs(Config(vectorization="sync"), 2)) as envs:
        assert isinstance(envs, SyncVectorEnv)
    with ppo_classic.closing(ppo_classic.make_envs(Config(env_id="Acrobot-v1"), 2)) as envs:
        assert isinstance(envs, SyncVectorEnv)


def test_environments_get_different_seeds_and_the_same_seed_the_same_set():
    def observations(seed):
        _, stream = start(tiny(num_envs=4, vectorization="sync", seed=seed))
        return stream.obs.copy()

    assert len({tuple(x) for x in observations(1)}) == 4
    assert np.array_equal(observations(1), observations(1)) and not np.isin(observations(2), observations(1)).any()


def test_atari_takes_two_updates():
    pytest.importorskip("ale_py", reason="ale-py is not installed")
    name, config = ppo_classic.choose_preset("ALE/Breakout-v5")
    assert name == "pixels"
    config = dataclasses.replace(config, num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1)
    agent, stream = start(config)
    assert stream.obs.shape == (2, 4, 84, 84) and stream.mode == AutoresetMode.NEXT_STEP
    for step in range(2):
        metrics = update(agent, collect_rollout(agent, stream, step, config), step, 1e-3, 0.1, 0.0, config)
    assert agent.updates == 4 and math.isfinite(metrics["value/loss"])


# ---- Runs: learning, artifacts, resume -------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(here):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo_classic.main(tiny(env_id="Pendulum-v1", output_dir=name, seed=seed, norm_obs=True))
    a, b, c = (read_log(here / name) for name in "abc")
    assert a == b and len(a) == 4 and a[0]["policy/loss"] != c[0]["policy/loss"]
    assert all(torch.equal(x, newest(here / "b")[name]) for name, x in newest(here / "a").items())


@pytest.mark.parametrize(("env_id", "stop"), [("CartPole-v1", 2), ("Pendulum-v1", 3)])
def test_a_resumed_run_equals_a_straight_one_bitwise(here, monkeypatch, env_id, stop):
    config = tiny(env_id=env_id, norm_obs=True, norm_reward="scale", total_timesteps=190, kl_coef=0.1, kl_target=0.01)
    straight = ppo_classic.main(dataclasses.replace(config, output_dir="straight"))
    real, calls = ppo_classic.collect_rollout, []

    def dies(agent, stream, step, c):
        calls.append(step)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return real(agent, stream, step, c)

    monkeypatch.setattr(ppo_classic, "collect_rollout", dies)
    with pytest.raises(KeyboardInterrupt):
        ppo_classic.main(dataclasses.replace(config, output_dir="broken"))
    assert json.loads((here / "broken" / "summary.json").read_text())["status"] == "running"
    resumed = ppo_classic.main(dataclasses.replace(config, output_dir="broken"))
    assert calls[stop + 1] == 2  # the newest checkpoint is that of step 2
    assert read_log(here / "broken") == read_log(here / "straight") and resumed == straight
    assert [int(row["step"]) for row in read_log(here / "broken")] == list(range(1, len(read_log(here / "broken")) + 1))
    for name, x in newest(here / "straight").items():
        assert torch.equal(x, newest(here / "broken")[name]), name


def test_a_finished_run_is_not_repeated_and_nothing_is_deleted(here):
    first = ppo_classic.main(tiny(output_dir="run"))
    before = read_log(here / "run", times=True)
    assert ppo_classic.main(tiny(output_dir="run")) == first
    assert read_log(here / "run", times=True) == before


def test_the_total_is_the_total_and_a_longer_one_is_planned_anew_with_a_warning(here, capsys):
    ppo_classic.main(tiny(output_dir="run"))
    ppo_classic.main(tiny(output_dir="run", total_timesteps=256))
    assert "total_timesteps 100 -> 256" in capsys.readouterr().err
    rows = read_log(here / "run")
    assert 256 <= int(rows[-1]["global_step"]) < 256 + 32
    assert float(rows[4]["optim/lr"]) > float(rows[3]["optim/lr"])  # 1/2 of the new plan is left, of the old one 1/4


def test_rates_fall_linearly_with_the_transitions(here):
    ppo_classic.main(tiny(output_dir="run", anneal_clip=True, total_timesteps=320))
    rows = read_log(here / "run")
    assert float(rows[0]["optim/lr"]) == 1e-3 and float(rows[0]["optim/clip"]) == 0.2
    for before, row in zip(rows, rows[1:], strict=False):
        left = 1 - int(before["global_step"]) / 320
        assert float(row["optim/lr"]) == pytest.approx(1e-3 * left)
        assert float(row["optim/clip"]) == pytest.approx(0.2 * left)
    ppo_classic.main(tiny(output_dir="constant", anneal_lr=False))
    assert {row["optim/lr"] for row in read_log(here / "constant")} == {"0.001"}


def test_the_last_step_is_saved_once_and_two_checkpoints_are_kept(here):
    ppo_classic.main(tiny(output_dir="run", total_timesteps=150))
    steps = [int(path.name[5:]) for path in ppo_classic.checkpoints(here / "run")]
    assert steps == [4, 5] and len(read_log(here / "run")) == 5


def test_a_run_leaves_the_artifacts(here):
    evaluation = ppo_classic.main(tiny(seed=3))
    run_dir = (here / "output" / "ppo_metrics").resolve()
    assert run_dir.name.startswith("ppo_classic-CartPole-v1-seed3-")
    assert {path.name for path in run_dir.iterdir()} == {
        "summary.json", "training_curves.png", "training_metrics.csv", "checkpoints"}

    def refuse(constant):
        raise ValueError(constant)

    summary = json.loads((run_dir / "summary.json").read_text(), parse_constant=refuse)
    assert summary["status"] == "finished" and summary["last_evaluation"] == evaluation
    assert summary["config"] == dataclasses.asdict(tiny(seed=3)) and str(run_dir.name) in summary["resume_command"]
    assert summary["global_step"] == int(read_log(run_dir)[-1]["global_step"]) >= 100
    assert summary["resume_command"].startswith("python ")


def test_statistics_are_frozen_in_evaluation_and_come_back_with_the_checkpoint(here):
    config = tiny(env_id="Pendulum-v1", norm_obs=True, norm_reward="scale", output_dir="run", eval_episodes=4)
    trained = ppo_classic.main(config)
    before = newest(here / "run")
    assert before["obs.count"] > 100 and before["obs.mean"].abs().max() > 0.01 and before["returns.var"] != 1
    assert ppo_classic.main(dataclasses.replace(config, eval_only=True)) == trained  # to the last bit
    path = ppo_classic.checkpoints(here / "run")[-1]
    assert ppo_classic.main(dataclasses.replace(config, eval_only=True, output_dir=None, resume=str(path))) == trained
    assert all(torch.equal(x, newest(here / "run")[name]) for name, x in before.items())
    agent, _ = start(config)
    ppo_classic.load_checkpoint(path, agent, config)
    learned = ppo_classic.evaluate(agent, config, 4)
    agent.statistics["obs"].mean[:], agent.statistics["obs"].var[:] = 0, 1  # what a lost normaliser would be
    assert learned == trained and ppo_classic.evaluate(agent, config, 4) != learned


def test_evaluation_gives_every_environment_its_share(monkeypatch):
    class Counter(Toy):
        made = 0

        def reset(self, seed=None, options=None):
            if not hasattr(self, "length"):
                Counter.made += 1
                self.length = Counter.made
            return super().reset(seed=seed)

        def step(self, action):
            self.t += 1
            return self.observe(), 1.0, self.t >= self.length, False, {}

    gym.registry.pop("Share-v0", None)
    gym.register("Share-v0", entry_point=Counter, disable_env_checker=True)
    agent, _ = start(tiny(env_id=register("Evaluation")))
    Counter.made = 0
    result = ppo_classic.evaluate(agent, tiny(env_id="Share-v0"), 40)  # environment i plays two episodes of length i
    assert result["eval/score"] == pytest.approx(np.mean(np.arange(1, 21)))
    error = np.std(np.repeat(np.arange(1, 21), 2), ddof=1) / math.sqrt(40)
    assert result["eval/standard_error"] == pytest.approx(error)


@pytest.mark.slow
def test_cartpole_is_learned(here):
    config = dataclasses.replace(Config(), total_timesteps=60_000, num_envs=8, num_steps=64, learning_rate=1e-3,
                                 norm_reward="scale", eval_episodes=20, output_dir="run")
    assert ppo_classic.main(config)["eval/score"] > 400


# ---- Faults ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_older_checkpoint(here, monkeypatch):
    real = ppo_classic.save_file

    def fails(tensors, path, metadata):
        if json.loads(metadata["saved"])["state"]["step"] == 4:
            Path(path).write_bytes(b"half of i")
            raise OSError(28, "No space left on device")
        return real(tensors, path, metadata)

    monkeypatch.setattr(ppo_classic, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        ppo_classic.main(tiny(output_dir="run"))
    monkeypatch.undo()
    os.chdir(here)
    assert [path.name for path in ppo_classic.checkpoints(here / "run")] == ["step_2"]
    ppo_classic.main(tiny(output_dir="run"))
    assert [int(row["step"]) for row in read_log(here / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("where", [0.02, 0.5, 0.999])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_or_refused_when_named(here, capsys, where):
    ppo_classic.main(tiny(output_dir="run"))
    older, newer = ppo_classic.checkpoints(here / "run")
    data = bytearray((newer / "agent.safetensors").read_bytes())
    data[int(where * len(data))] ^= 1
    (newer / "agent.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        ppo_classic.main(tiny(output_dir="other", resume=str(newer)))
    ppo_classic.main(tiny(output_dir="run"))
    assert "step_4 is no checkpoint, or damaged" in capsys.readouterr().err
    assert [int(row["step"]) for row in read_log(here / "run")] == [1, 2, 3, 4]
    assert ppo_classic.read_checkpoint(newer)[1]["state"]["step"] == 4  # made again


def test_a_truncated_checkpoint_and_an_empty_folder_are_damaged_too(here):
    ppo_classic.main(tiny(output_dir="run"))
    older, newer = ppo_classic.checkpoints(here / "run")
    (older / "agent.safetensors").write_bytes((newer / "agent.safetensors").read_bytes()[:-100])
    shutil.rmtree(newer)
    newer.mkdir()
    for folder in (older, newer):
        with pytest.raises(UsageError, match="damaged"):
            ppo_classic.read_checkpoint(folder)


def test_a_checkpoint_of_something_else_is_refused(here):
    ppo_classic.main(tiny(output_dir="run"))
    path = str(ppo_classic.checkpoints(here / "run")[-1])
    with pytest.raises(UsageError, match="hidden_size 16 -> 32"):
        ppo_classic.main(tiny(output_dir="a", resume=path, hidden_size=32))
    with pytest.raises(UsageError, match="env_id CartPole-v1 -> Acrobot-v1"):
        ppo_classic.main(tiny(output_dir="b", resume=path, env_id="Acrobot-v1"))


def test_a_checkpoint_of_another_format_is_refused(here):
    ppo_classic.main(tiny(output_dir="run"))
    path = ppo_classic.checkpoints(here / "run")[-1]
    tensors, saved = ppo_classic.read_checkpoint(path)
    file = path / "agent.safetensors"
    ppo_classic.save_file(tensors, file, {"saved": json.dumps(saved | {"format": 0})})
    (path / "sha256").write_text(hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(UsageError, match="version"):
        ppo_classic.main(tiny(output_dir="a", resume=str(path)))


def test_resume_must_finds_a_checkpoint_or_says_so(here):
    with pytest.raises(UsageError, match="no checkpoint"):
        ppo_classic.main(tiny(output_dir="run", resume="must"))
    with pytest.raises(UsageError, match="no checkpoint"):
        ppo_classic.main(tiny(output_dir="run", eval_only=True))
    ppo_classic.main(tiny(output_dir="run", resume="auto"))
    ppo_classic.main(tiny(output_dir="run", resume="must", total_timesteps=200))
    with pytest.raises(UsageError, match="not empty"):
        ppo_classic.main(tiny(output_dir="run", resume="never"))


def test_a_folder_with_other_files_is_refused(here):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="not empty"):
        ppo_classic.main(tiny(output_dir="mine"))
    assert (here / "mine" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("field", ["observation", "reward"])
def test_a_number_that_is_not_finite_is_named(here, field):
    ppo_classic.main(tiny(env_id=register("Nan"), output_dir="run"))
    register("Nan", fault=field)
    with pytest.raises(UsageError, match=rf"environment 0 gave a {field} .* iteration 6, step 2"):
        ppo_classic.main(tiny(env_id="Nan-v0", output_dir="run", total_timesteps=256))
    assert ppo_classic.read_checkpoint(ppo_classic.checkpoints(here / "run")[-1])


@pytest.mark.parametrize("norm_obs", [False, True])  # clipping must not hide it
def test_an_infinite_observation_at_the_start_is_named(norm_obs):
    config = tiny(env_id=register("Infinite", fault="start"), norm_obs=norm_obs)
    agent, stream = start(config)
    with pytest.raises(UsageError, match="environment 0 gave a observation that is not finite: iteration 1, step 0"):
        collect_rollout(agent, stream, 0, config)


@pytest.mark.parametrize(("mode", "fits"), [("NextStep", True), (None, False), ("whenever", False)])
def test_the_autoreset_mode_is_read_from_the_metadata_and_never_assumed(mode, fits):
    envs = ppo_classic.make_envs(tiny(), 1)
    envs.metadata = {"autoreset_mode": mode}
    if fits:
        assert Stream(envs, "Env-v0").mode == AutoresetMode.NEXT_STEP
        return
    with pytest.raises(UsageError, match="autoreset_mode"):
        Stream(envs, "Env-v0")


def test_an_environment_that_raises_is_named_and_the_checkpoint_stays(here):
    ppo_classic.main(tiny(env_id=register("Raises"), output_dir="run"))
    register("Raises", fault="raises")
    with pytest.raises(UsageError, match="environment Raises-v0 raised RuntimeError: the simulator lost its mind"):
        ppo_classic.main(tiny(env_id="Raises-v0", output_dir="run", total_timesteps=256))
    assert ppo_classic.read_checkpoint(ppo_classic.checkpoints(here / "run")[-1])


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"total_timesteps": 31}, "total_timesteps = 31 is less than one batch of 32 rows"),
    ({"num_minibatches": 33}, "32 rows do not fill num_minibatches"),
    ({"num_steps": 1}, "num_steps = 1 must lie between 2"),
    ({"gamma": 1.1}, "gamma"), ({"gamma": math.nan}, "gamma"), ({"num_envs": 0}, "num_envs = 0 must lie between"),
    ({"learning_rate": -1.0}, "learning_rate = -1.0 must lie"), ({"dual_clip": 0.5}, "dual_clip"),
    ({"kl_target": 0.1}, "kl_coef"), ({"target_kl": 0.0}, "target_kl = 0.0 must")])
def test_settings_that_cannot_work_are_refused(here, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        ppo_classic.main(tiny(**changes))
    assert list(here.iterdir()) == []


def test_bad_input_is_one_sentence_and_exit_code_2(here):
    def run(*flags):
        return subprocess.run([sys.executable, str(ROOT / "ppo_classic.py"), *flags], capture_output=True, text=True)

    unknown = run("--env_id", "CartPoole-v1")
    assert unknown.returncode == 2 and "CartPoole" in unknown.stderr and "Traceback" not in unknown.stderr
    small = run("--total_timesteps", "5")
    assert small.returncode == 2 and small.stderr == "error: total_timesteps = 5 is less than one batch of 512 rows\n"


@pytest.mark.parametrize(("env_id", "module", "hint"), [
    ("HalfCheetah-v5", "gymnasium.envs.mujoco.half_cheetah_v5", r"pip install 'gymnasium\[mujoco\]'"),
    ("ALE/Breakout-v5", "ale_py", "pip install ale-py"), ("LunarLander-v3", "Box2D", "gymnasium.box2d")])
def test_a_missing_package_is_named_with_its_installation(monkeypatch, env_id, module, hint):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("gymnasium.envs.box2d", "gymnasium.envs.box2d.lunar_lander"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UsageError, match=hint):
        ppo_classic.make_envs(Config(env_id=env_id), 1)


def test_the_script_alone_in_an_empty_folder_runs(here):
    shutil.copy(ROOT / "ppo_classic.py", here)
    command = [sys.executable, "ppo_classic.py", "--total_timesteps", "2000", "--eval_episodes", "2"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert "eval/score" in done.stdout and (here / "output" / "ppo_metrics" / "training_curves.png").exists()


def test_dry_run_prints_the_preset_and_starts_nothing(here):
    done = subprocess.run([sys.executable, str(ROOT / "ppo_classic.py"), "--env_id=Pendulum-v1", "--dry_run"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "preset Pendulum" in done.stdout and "gamma=0.9" in done.stdout
    assert list(here.iterdir()) == []


def test_a_worker_that_dies_ends_the_run_with_its_environment_named(here):
    config = tiny(vectorization="async", env_id="Acrobot-v1")
    agent, stream = start(config)
    stream.envs.processes[1].kill()
    with pytest.raises(UsageError, match="Acrobot-v1 raised"):
        for step in range(3):
            collect_rollout(agent, stream, step, config)
    for process in stream.envs.processes:
        process.terminate()
        process.join(5)
        assert not process.is_alive()
    stream.envs.closed = True  # close() would wait for an answer of the dead worker


def test_what_a_video_needs_is_asked_for_before_the_training(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(UsageError, match="moviepy"):
        ppo_classic.main(tiny(output_dir="run", capture_video=True))
    assert read_log(here / "run") == []


# ---- Trackers -------------------------------------------------------------------------------------------------------


def fake_wandb(log: list, fails: str = "") -> types.SimpleNamespace:
    def init(**settings):
        if fails == "init":
            raise ConnectionError("no network")
        log.append(settings)
        return types.SimpleNamespace(id="run-7", log=record)

    def record(metrics, step):
        if fails == "log":
            raise TimeoutError("no answer")
        log.append(step)

    return types.SimpleNamespace(init=init)


def test_a_resumed_run_keeps_its_identity_on_weights_and_biases(here, monkeypatch):
    log = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log))
    ppo_classic.main(tiny(output_dir="run", track="wandb"))
    ppo_classic.main(tiny(output_dir="run", track="wandb", total_timesteps=200))
    runs = [x for x in log if isinstance(x, dict)]
    assert [x["id"] for x in runs] == [None, "run-7"]
    steps = [x for x in log if isinstance(x, int)]
    assert steps == sorted(set(steps)) and len(steps) == len(read_log(here / "run"))


@pytest.mark.parametrize("fails", ["init", "log", "import"])
def test_a_tracker_that_fails_does_not_end_the_training(here, monkeypatch, capsys, fails):
    monkeypatch.setitem(sys.modules, "wandb", None if fails == "import" else fake_wandb([], fails))
    ppo_classic.main(tiny(output_dir="run", track="wandb"))
    assert capsys.readouterr().err.count("warning: track wandb") == 1
    assert len(read_log(here / "run")) == 4


def test_tensorboard_gets_the_metrics(here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    ppo_classic.main(tiny(output_dir="run", track="tensorboard"))
    assert list((here / "run" / "tensorboard").iterdir())
