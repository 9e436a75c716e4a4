"""ppo_classic.py: formulas against independent computations, autoreset modes, learning, resume, faults, bad input."""

import csv
import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_in_a_terminal
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import ppo_classic
from ppo_classic import Agent, Batch, Config, Stream, UsageError, collect_rollout, compute_gae, ppo_loss, update

ROOT = Path(__file__).resolve().parents[1]
MODES = {"next": AutoresetMode.NEXT_STEP, "same": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}
ACTIONS = {
    "discrete": Discrete(5, start=2),
    "multi": MultiDiscrete([3, 2, 4]),
    "box": Box(-1, 1, (3,)),
    "one number": Box(-1, 1, (1,)),
}
SPACES = {
    "vector": Box(-1, 1, (3,)),
    "matrix": Box(-1, 1, (2, 3), np.float64),
    "bytes": Box(0, 255, (8,), np.uint8),
    "small image": Box(0, 255, (8, 8, 3), np.uint8),
    "discrete": Discrete(4),
    "dict": Dict(a=Box(-1, 1, (2,)), b=Discrete(3)),
    "tuple": Tuple((Box(-1, 1, (2,)), MultiBinary(2))),
    "pixels": Box(0, 255, (36, 40, 3), np.uint8),
    "channels first": Box(0, 255, (4, 36, 36), np.uint8),
}


class Toy(gym.Env):
    """Reward 1 per step, `limit` steps per episode, which end as `ends` says: terminated or truncated.

    Observations are ones, or the time; `fault` says what breaks in the second step.
    """

    def __init__(self, ends="truncated", sees="nothing", space=None, actions=None, fault="", limit=3):
        self.observation_space = space or Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = actions or Discrete(2)
        self.ends = ends
        self.sees = sees
        self.fault = fault
        self.limit = limit
        self.received = []

    def observe(self):
        if not isinstance(self.observation_space, Box):
            return self.observation_space.sample()
        value = self.t if self.sees == "time" else 1
        return np.full(self.observation_space.shape, value, self.observation_space.dtype)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return (self.observe() * math.inf if self.fault == "start" else self.observe()), {}

    def step(self, action):
        self.t += 1
        self.received.append(action)
        obs = self.observe()
        reward = 1.0
        ended = self.t == self.limit
        if self.fault == "raises" and self.t == 2:
            raise RuntimeError("the simulator lost its mind")
        if self.fault == "observation" and self.t == 2:
            obs = np.full_like(obs, np.nan)
        if self.fault == "reward" and self.t == 2:
            reward = math.nan
        return obs, reward, ended and self.ends == "terminated", ended and self.ends == "truncated", {}


class Target(gym.Env):
    """One step per episode; the reward is best where the action is `best`, and its distance is that of the interval."""

    observation_space = Box(-1, 1, (1,))

    def __init__(self, actions: Box, best: float):
        self.action_space = actions
        self.best = best

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        width = self.action_space.high[0] - self.action_space.low[0]
        return np.zeros(1, np.float32), -abs(float(action[0]) - self.best) / width, True, False, {}


def register(name: str, mode: AutoresetMode | None = None, entry_point=Toy, **kwargs) -> str:
    """An id for Toy(**kwargs); with a mode, one that has a native vector environment of that autoreset mode."""
    env_id = f"{name}-v0"
    native = None
    if mode:

        def native(num_envs, **_):
            return SyncVectorEnv([lambda: entry_point(**kwargs)] * num_envs, autoreset_mode=mode)

    gym.registry.pop(env_id, None)
    gym.register(
        env_id, entry_point=entry_point, kwargs=kwargs, vector_entry_point=native, disable_env_checker=True
    )
    return env_id


def tiny(**changes) -> Config:
    settings = {
        "num_envs": 2,
        "num_steps": 16,
        "num_minibatches": 2,
        "update_epochs": 2,
        "total_timesteps": 100,
        "hidden_size": 16,
        "eval_episodes": 3,
        "save_every": 2,
        "learning_rate": 1e-3,
    }
    return Config(**settings | changes)


def start(config: Config) -> tuple[Agent, Stream]:
    torch.manual_seed(config.seed)
    envs = ppo_classic.make_envs(config, config.num_envs)
    stream = Stream(envs, config.gamma)
    stream.restart(config.seed, ppo_classic.RESET, 0)
    agent = Agent(envs, config)
    set_rate(agent, config.learning_rate)
    return agent, stream


def set_rate(agent: Agent, rate: float) -> None:
    agent.optimizer.param_groups[0]["lr"] = rate


def weights(agent: Agent) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in agent.parameters()]).clone()


def one_update(agent: Agent, stream: Stream, config: Config, step: int = 0) -> dict:
    return update(agent, collect_rollout(agent, stream, step, config), step, config.kl_coef, config)


def values_of(agent: Agent, obs: list) -> np.ndarray:
    with torch.no_grad():
        return agent(agent.observe(np.array(obs)))[1].numpy()


def read_log(run_dir: Path, times: bool = False) -> list[dict]:
    with open(run_dir / "training_metrics.csv") as file:
        return [{k: x for k, x in row.items() if times or not k.startswith("time/")} for row in csv.DictReader(file)]


def read_summary(run_dir: Path) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((run_dir / "summary.json").read_text(), parse_constant=refuse)


def newest(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors = safetensors.torch.load_file(ppo_classic.checkpoints(run_dir)[-1] / "agent.safetensors")
    return {name: x.clone() for name, x in tensors.items()}  # the file is mapped into memory, and tests damage it


def saved_state(folder: Path) -> dict:
    with safetensors.safe_open(folder / "agent.safetensors", "pt") as file:
        return json.loads(file.metadata()["saved"])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in. No figures: drawing one takes longer than the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_classic, "draw_curves", lambda run: None)
    ppo_classic.warn_once.cache_clear()
    return tmp_path


# ---- Formulas -------------------------------------------------------------------------------------------------


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


def batch_of(agent: Agent, seed: int = 0, rows: int = 64) -> Batch:
    """A mini-batch in which ratios, values and advantages fall on both sides of every clip."""
    torch.manual_seed(seed)
    inputs = torch.randn(rows, math.prod(agent.space.shape))
    with torch.no_grad():
        outputs, values = agent(inputs)
        actions = torch.from_numpy(agent.head.sample(outputs.numpy(), np.random.default_rng(seed)))
        logprobs, _ = agent.head.evaluate(outputs, actions)
    logprobs = logprobs + 0.5 * torch.randn(rows)
    old_values = values + 0.4 * torch.randn(rows)
    return Batch(inputs, actions, logprobs, old_values, 2 * torch.randn(rows), torch.randn(rows))


@pytest.mark.parametrize("kind", ACTIONS)
def test_the_loss_and_its_gradient_are_those_of_the_papers_formulas(kind):
    env_id = register("Loss", space=Box(-1, 1, (6,)), actions=ACTIONS[kind])
    config = tiny(env_id=env_id, dual_clip=1.5, ent_coef=0.03, vf_coef=0.7)
    agent, _ = start(config)
    is_gaussian = isinstance(agent.head, ppo_classic.Gaussian)
    if is_gaussian:
        agent.head.log_std.data.copy_(torch.tensor([-0.5, 0.1, 0.3][: agent.head.num_outputs]))
    batch = batch_of(agent)
    agent.optimizer.zero_grad()
    loss, logged = ppo_loss(agent, batch, 0.3, config)
    loss.backward()
    found = [x.grad.clone() for x in agent.parameters()]

    agent.optimizer.zero_grad()
    outputs, values = agent(batch.inputs)
    if is_gaussian:
        policy = torch.distributions.Normal(outputs, agent.head.log_std.exp())
        logprobs, entropy = policy.log_prob(batch.actions).sum(1), policy.entropy().sum(1)
    else:
        sizes = [5] if kind == "discrete" else [3, 2, 4]
        parts = [torch.distributions.Categorical(logits=x) for x in outputs.split(sizes, 1)]
        logprobs = sum(part.log_prob(batch.actions[:, i]) for i, part in enumerate(parts))
        entropy = sum(part.entropy() for part in parts)
    expected = 0.0
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    for i in range(64):
        ratio, advantage = (logprobs[i] - batch.logprobs[i]).exp(), advantages[i]
        surrogate = min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if advantage < 0:
            surrogate = max(surrogate, 1.5 * advantage)
        change = (values[i] - batch.values[i]).clamp(-0.2, 0.2)
        errors = (values[i] - batch.returns[i]) ** 2, (batch.values[i] + change - batch.returns[i]) ** 2
        kl = ratio - 1 - ratio.log()
        expected = expected - surrogate + 0.7 * 0.5 * max(errors) - 0.03 * entropy[i] + 0.3 * kl
    (expected / 64).backward()
    assert loss.item() == pytest.approx(expected.item() / 64, abs=1e-5)
    for x, parameter in zip(found, agent.parameters(), strict=True):
        assert torch.allclose(x, parameter.grad, atol=2e-6)
    assert max(x.abs().max() for x in found) > 1e-2
    for name in ("policy/clipfrac", "policy/clipfrac_lower", "value/clipfrac"):
        assert 3 <= logged[name].sum() <= 61, name  # every branch is taken
    assert torch.allclose(logged["policy/entropy"], entropy, atol=1e-5)


PAST = {  # options of tests/data/record_classic_past.py
    "CartPole-v1": {"learning_rate": 1e-3, "kl_coef": 0.1},
    "Pendulum-v1": {"learning_rate": 1e-3, "gamma": 0.9, "norm_reward": "scale", "norm_obs": True, "ent_coef": 0.0},
    "Toy-v0": {"learning_rate": 3e-3, "dual_clip": 1.2, "clip_vloss": False, "norm_adv": False},
}
PAST_NAMES = {  # parameter: its name at that time
    "body.0": "0.0",
    "body.2": "0.2",
    "policy_layer": "0.4",
    "value_body.0": "1.0",
    "value_body.2": "1.2",
    "value_layer": "1.4",
    "head.log_std": "log_std",
}


def past_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return PAST_NAMES[name] if name in PAST_NAMES else f"{PAST_NAMES[layer]}.{kind}"


@pytest.mark.parametrize("env_id", PAST)
def test_an_update_gives_what_the_gradient_and_adam_written_by_hand_gave(env_id):
    sizes = {"num_envs": 2, "num_steps": 25, "num_minibatches": 3, "update_epochs": 3, "hidden_size": 8}
    config = Config(env_id=env_id, **sizes, **PAST[env_id])
    if env_id == "Toy-v0":
        register("Toy", space=Box(-1, 1, (3,)), actions=MultiDiscrete([3, 2, 4]))
    arrays = np.load(ROOT / "tests" / "data" / "classic_past.npz")
    recorded = {name.split("/", 1)[1]: torch.from_numpy(x) for name, x in arrays.items() if name.startswith(env_id)}
    ends = recorded["rows"].cumsum(0).tolist()
    agent, _ = start(config)
    agent.double()
    largest, mini_batches = 0.0, 0
    for step in range(20):
        for name, parameter in agent.named_parameters():
            moments = agent.optimizer.state[parameter]
            parameter.data.copy_(recorded[f"weight/{past_name(name)}"][step].view_as(parameter))
            moments["exp_avg"] = recorded[f"mean/{past_name(name)}"][step].view_as(parameter).clone()
            moments["exp_avg_sq"] = recorded[f"square/{past_name(name)}"][step].view_as(parameter).clone()
            moments["step"] = torch.tensor(float(mini_batches))
        rows = slice(([0] + ends)[step], ends[step])
        batch = Batch(*[recorded[f"rollout/{name}"][rows] for name in Batch.__annotations__])
        metrics = update(agent, batch, step, config.kl_coef, config)
        mini_batches += 9
        for name, parameter in agent.named_parameters():
            after = recorded[f"weight/{past_name(name)}"][step + 1].view_as(parameter)
            assert not torch.equal(after, recorded[f"weight/{past_name(name)}"][step].view_as(parameter))
            largest = max(largest, (parameter - after).abs().max().item())
            moment = recorded[f"square/{past_name(name)}"][step + 1].view_as(parameter)
            largest = max(largest, (agent.optimizer.state[parameter]["exp_avg_sq"] - moment).abs().max().item())
        found = [metrics[name] for name in ("policy/loss", "value/loss", "policy/approx_kl")]
        assert np.allclose(found, recorded["metrics"][step], rtol=1e-7, atol=1e-9)
    assert largest < 1e-8


def test_the_policy_in_numpy_is_that_in_torch():
    config = tiny(env_id="Pendulum-v1")
    agent, _ = start(config)
    obs = np.random.default_rng(0).standard_normal((7, 3)).astype("f4")
    with torch.no_grad():
        expected = agent(torch.from_numpy(obs))[0].numpy()
    assert np.allclose(agent.act(obs, None), expected, atol=1e-6) and np.abs(expected).max() > 1e-4
    agent.layers = []
    assert np.allclose(agent.act(obs, None), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIONS)
def test_sampled_actions_follow_the_log_probs(kind):
    agent, _ = start(tiny(env_id=register("Sampling", space=Box(-1, 1, (2,)), actions=ACTIONS[kind])))
    rng, rows = np.random.default_rng(0), 40_000
    outputs = np.tile(rng.standard_normal(agent.head.num_outputs).astype("f4"), (rows, 1))
    actions = agent.head.sample(outputs, rng)
    with torch.no_grad():
        logprobs, entropy = agent.head.evaluate(torch.from_numpy(outputs), torch.from_numpy(actions))
    assert -logprobs.mean() == pytest.approx(entropy[0].item(), abs=0.03)  # E[-log p] is the entropy
    if kind == "discrete":
        shares = np.bincount(actions[:, 0], minlength=5) / rows
        assert np.allclose(shares, torch.from_numpy(outputs[0]).softmax(0), atol=0.01)
    greedy = torch.from_numpy(agent.head.sample(outputs[:1], None))
    assert agent.head.evaluate(torch.from_numpy(outputs[:1]), greedy)[0] >= logprobs.max() - 1e-5


def test_the_logged_kl_is_of_old_against_new(monkeypatch):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    config = tiny(env_id=register("Three", actions=Discrete(3)))
    agent, _ = start(config)
    torch.manual_seed(0)
    actions = torch.multinomial(p, 100_000, replacement=True)[:, None]
    zeros = torch.zeros(len(actions))
    monkeypatch.setattr(agent, "forward", lambda inputs: (q.log().expand(len(actions), 3), zeros))
    batch = Batch(zeros[:, None], actions, p.log()[actions[:, 0]], zeros, zeros, zeros)
    _, logged = ppo_loss(agent, batch, 0.0, config)
    expected = (p * (p / q).log()).sum().item()  # KL(q, p) is 0.39
    assert logged["policy/approx_kl"].mean().item() == pytest.approx(expected, abs=0.01)


def unclipped_loss(advantages: list, **changes) -> np.ndarray:
    """The policy loss per row where all ratios are 1: minus the advantages that the loss uses."""
    agent, _ = start(tiny(**changes))
    batch = batch_of(agent, rows=len(advantages))
    batch.logprobs = agent.head.evaluate(agent(batch.inputs)[0], batch.actions)[0].detach()
    batch.advantages = torch.tensor(advantages)
    return ppo_loss(agent, batch, 0.0, tiny(**changes))[1]["policy/loss"].detach().numpy()


def test_advantages_are_normalised_per_mini_batch():
    x = np.array([4.0, -1.0, 2.0, 7.0, 5.0], "f4")
    assert np.allclose(unclipped_loss(x.tolist()), -(x - x.mean()) / x.std(ddof=1), atol=1e-5)
    assert np.allclose(unclipped_loss(x.tolist(), norm_adv=False), -x, atol=1e-5)


@pytest.mark.parametrize("row", [[3.0] * 8, [1e6] * 8, [0.95] * 7 + [0.0]])
def test_equal_rewards_give_finite_small_advantages(row):
    loss = unclipped_loss(row)
    assert np.isfinite(loss).all() and np.abs(loss).max() < 10
    assert (np.ptp(row) > 0) == (np.abs(loss).max() > 0)


def test_a_mini_batch_of_one_row_is_finite():
    config = tiny(num_minibatches=32)
    metrics = one_update(*start(config), config)
    assert math.isfinite(metrics["policy/loss"]) and metrics["optim/skipped_steps"] == 0


def test_value_clipping_with_an_infinite_range_is_no_clipping():
    x, old, returns = torch.randn(3, 50)
    unclipped, flags = ppo_classic.clipped_value_loss(x, old, returns, None)
    assert torch.equal(ppo_classic.clipped_value_loss(x, old, returns, 1e9)[0], unclipped)
    assert torch.allclose(unclipped, 0.5 * (x - returns) ** 2) and flags.sum() == 0


def test_the_kl_coefficient_doubles_and_halves_as_in_the_paper():
    assert [ppo_classic.adapt_kl_coef(1.0, kl, 0.01) for kl in (0.0151, 0.0149, 0.0067, 0.0066)] == [2, 1, 1, 0.5]


def test_running_moments_are_those_of_all_rows():
    rows = np.random.default_rng(0).standard_normal((300, 3)) * [1, 5, 0.1] + [0, 100, -3]
    moments = torch.tensor([[0.0] * 3, [1.0] * 3, [1e-4] * 3], dtype=torch.float64)
    for part in np.split(rows, [1, 20, 150]):
        ppo_classic.update_moments(moments, part)
    assert np.allclose(moments[0], rows.mean(0), rtol=1e-5) and np.allclose(moments[2], 300, rtol=1e-5)
    assert np.allclose(moments[1], rows.var(0), rtol=1e-2)


# ---- Autoreset modes: a value that is known in closed form ----------------------------------------------------


def learned_value(mode: str, ends: str) -> float:
    """V of the one state of Toy after TD(0) has converged; gamma 0.9. Endless reward 1 is worth 1 / (1 - 0.9) = 10."""
    env_id = register(f"Value{mode}", MODES[mode], ends=ends)
    sizes = {"num_envs": 3, "num_steps": 32, "num_minibatches": 1, "update_epochs": 8}
    config = tiny(env_id=env_id, gamma=0.9, gae_lambda=0.0, clip_vloss=False, norm_adv=False, **sizes)
    agent, stream = start(config)
    set_rate(agent, 3e-3)
    for step in range(120):
        one_update(agent, stream, config, step)
    return values_of(agent, [[1.0]]).item()


@pytest.mark.parametrize("mode", MODES)
def test_a_time_limit_does_not_change_the_value(mode):
    assert learned_value(mode, "truncated") == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("mode", ["next", *(pytest.param(mode, marks=pytest.mark.slow) for mode in list(MODES)[1:])])
def test_a_failure_does(mode):  # V = 1 + 0.9 * 2/3 * V: one step in three is the last one
    assert learned_value(mode, "terminated") == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("ends", ["truncated", "terminated"])
def test_all_modes_see_the_same_transitions_and_advantages(ends):
    found = {}
    for name, mode in MODES.items():
        env_id = register(f"Same{name}", mode, ends=ends, sees="time")
        config = tiny(env_id=env_id, num_envs=1, num_steps=24, gae_lambda=0.7)
        agent, stream = start(config)
        batch = collect_rollout(agent, stream, 0, config)
        assert len(batch.values) == (18 if name == "next" else 24)
        assert [length for _, length in stream.ended] == [3] * (6 if name == "next" else 8)
        found[name] = [x[:12] for x in (batch.inputs, batch.values, batch.advantages, batch.returns)]
    for name in ("same", "disabled"):
        for x, y in zip(found["next"], found[name], strict=True):
            assert torch.allclose(x, y, atol=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_truncation_bootstraps_from_the_final_observation_and_no_other(mode):
    env_id = register(f"Final{mode}", MODES[mode], sees="time")
    config = tiny(env_id=env_id, gae_lambda=0.0, num_steps=15)
    agent, stream = start(config)
    batch = collect_rollout(agent, stream, 0, config)
    final, first = values_of(agent, [[3.0], [0.0]])
    last_steps = batch.inputs[:, 0] == 2
    assert abs(final - first) > 1e-3 and last_steps.sum() >= 6
    assert np.allclose(batch.returns[last_steps], 1 + config.gamma * final, atol=1e-6)


def test_rows_that_are_no_transitions_are_in_no_loss_no_statistic_and_no_counter():
    env_id = register("Dummy", MODES["next"], sees="time")
    config = tiny(env_id=env_id, num_steps=24, norm_obs=True, norm_reward="scale")
    agent, stream = start(config)
    batch = collect_rollout(agent, stream, 0, config)
    mean, _, count = agent.obs_moments[:, 0]
    assert len(batch.values) == 36 and count == pytest.approx(36, abs=1e-3)
    assert mean == pytest.approx(1, abs=1e-3)  # of 0, 1, 2; the reset rows show 3
    assert agent.return_moments[2].item() == pytest.approx(36, abs=1e-3)


def test_the_reward_scale_starts_anew_with_every_episode():
    config = tiny(env_id=register("Scale", MODES["same"]), num_envs=1, num_steps=6, gamma=0.5, norm_reward="scale")
    agent, stream = start(config)
    config = dataclasses.replace(config, gae_lambda=0.0)
    batch = collect_rollout(agent, stream, 0, config)
    discounted = np.array([1, 1.5, 1.75] * 2)
    assert agent.return_moments[1].item() == pytest.approx(discounted.var(), rel=1e-3)
    rewards = batch.returns - 0.5 * values_of(agent, [[1.0]]).item()  # TD(0), and every state looks the same
    assert np.allclose(rewards, 1 / discounted.std(), rtol=1e-3)


# ---- Update ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_first_ratio_is_one(env_id):
    config = dataclasses.replace(ppo_classic.choose_preset(env_id), num_steps=64, num_envs=4, num_minibatches=4)
    agent, stream = start(config)
    for step in range(3):
        metrics = one_update(agent, stream, config, step)
        assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-5) and metrics["policy/ratio"] != 1


def test_learning_rate_zero_changes_nothing():
    agent, stream = start(tiny(learning_rate=0.0))
    before = weights(agent)
    metrics = one_update(agent, stream, tiny())
    assert torch.equal(before, weights(agent)) and metrics["policy/approx_kl"] < 1e-8


@pytest.mark.parametrize(("num_minibatches", "rows", "steps"), [(4, 10, 4), (2, 1, 1), (2, 2, 2), (4, 5, 3), (8, 9, 5)])
def test_every_row_is_used_once_per_epoch_also_when_mini_batches_are_ragged(monkeypatch, num_minibatches, rows, steps):
    config = tiny(num_envs=1, num_steps=12, num_minibatches=num_minibatches, update_epochs=3)
    agent, stream = start(config)
    whole = collect_rollout(agent, stream, 0, config)
    batch = Batch(*[x[:rows] for x in vars(whole).values()])
    seen = []

    def spy(agent, mini_batch, *rest):
        seen.append(mini_batch.returns)
        return ppo_loss(agent, mini_batch, *rest)

    monkeypatch.setattr(ppo_classic, "ppo_loss", spy)
    update(agent, batch, 0, 0.0, config)
    assert len(seen) == 3 * steps and min(map(len, seen)) >= 1
    for epoch in range(3):
        used = torch.cat(seen[steps * epoch : steps * (epoch + 1)])
        assert torch.equal(used.sort().values, batch.returns.sort().values)
    if rows > 4:
        assert not torch.equal(torch.cat(seen[:steps]), torch.cat(seen[steps : 2 * steps]))  # another order


def test_the_smallest_rollout_trains_where_every_second_step_is_a_reset(here):
    env_id = register("Short", MODES["next"], ends="terminated", limit=1)
    sizes = {"num_envs": 1, "num_steps": 2, "num_minibatches": 2, "total_timesteps": 9}
    ppo_classic.main(tiny(env_id=env_id, output_dir="run", **sizes))
    log = read_log(here / "run")
    assert [row["global_step"] for row in log] == [str(n) for n in range(1, 10)]
    assert all(math.isfinite(float(row["policy/loss"])) for row in log)


def test_logged_means_are_over_all_rows():
    config = tiny(update_epochs=1, num_minibatches=1, norm_adv=False)
    agent, stream = start(config)
    batch = collect_rollout(agent, stream, 0, config)
    metrics = update(agent, batch, 0, 0.0, config)
    assert metrics["policy/loss"] == pytest.approx(-batch.advantages.mean().item(), rel=1e-4)
    assert metrics["value/loss"] == pytest.approx(0.5 * (batch.advantages**2).mean().item(), rel=1e-4)
    explained = 1 - (batch.returns - batch.values).var() / batch.returns.var()
    assert metrics["value/explained_variance"] == pytest.approx(explained.item(), rel=1e-4)


def test_target_kl_ends_the_update_after_the_epoch():
    config = tiny(update_epochs=5, target_kl=1e-9, learning_rate=1e-2)
    agent, stream = start(config)
    metrics = one_update(agent, stream, config)
    taken = agent.optimizer.state[agent.policy_layer.bias]["step"]
    assert metrics["optim/epochs"] == 1 and taken == 2 and metrics["policy/kl_last"] > 1e-9
    assert one_update(agent, stream, tiny(update_epochs=5, target_kl=1e9), 1)["optim/epochs"] == 5 and taken == 12


def test_a_gradient_that_is_not_finite_is_skipped_and_said_and_three_in_a_row_end_the_run(capsys):
    agent, _ = start(tiny())
    parameters = list(agent.parameters())

    def step(factor: float) -> float:
        return ppo_classic.take_step(agent, factor * agent.policy_layer.weight.square().sum(), parameters, tiny())

    before = weights(agent)
    assert not math.isfinite(step(math.nan)) and torch.equal(before, weights(agent))
    assert "not finite" in capsys.readouterr().err
    assert math.isfinite(step(1.0)) and not torch.equal(before, weights(agent))
    step(math.inf)
    step(math.nan)
    with pytest.raises(UsageError, match="three gradients in a row are not finite"):
        step(math.nan)
    assert torch.isfinite(weights(agent)).all()


def test_the_gradient_norm_is_clipped(monkeypatch):
    agent, _ = start(tiny())
    norms = []
    monkeypatch.setattr(
        agent.optimizer, "step", lambda: norms.append(torch.cat([x.grad.flatten() for x in parameters]).norm().item())
    )
    parameters = [agent.policy_layer.weight, agent.value_layer.weight]
    loss = 1e3 * sum(x.sum() for x in parameters)
    assert ppo_classic.take_step(agent, loss, parameters, tiny(max_grad_norm=0.25)) > 10
    assert norms[0] == pytest.approx(0.25, rel=1e-4)


def test_the_penalty_keeps_the_policy_close():
    kl = {}
    for coefficient in (0.0, 30.0):
        config = tiny(kl_coef=coefficient, update_epochs=10, num_steps=64, ent_coef=0.0, clip_coef=10.0)
        agent, stream = start(dataclasses.replace(config, learning_rate=1e-2))
        for step in range(3):
            metrics = one_update(agent, stream, config, step)
        kl[coefficient] = metrics["policy/kl_last"]
    assert kl[30.0] < 0.3 * kl[0.0]


# ---- Spaces and presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_observation_and_action_spaces_train(space, kind):
    env_id = register("Spaces", space=SPACES[space], actions=ACTIONS[kind])
    config = tiny(env_id=env_id, norm_obs=True)
    agent, stream = start(config)
    before = weights(agent)
    for step in range(2):
        metrics = one_update(agent, stream, config, step)
    assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-4) and not torch.equal(before, weights(agent))
    assert agent.is_image == (space in ("pixels", "channels first"))


def test_bytes_are_divided_by_255_in_a_vector_in_pixels_and_inside_of_a_dict(capsys):
    ppo_classic.warn_once.cache_clear()
    agent, _ = start(tiny(env_id=register("Bytes", space=SPACES["bytes"])))
    assert agent.observe(np.full((1, 8), 255, np.uint8)).max() == 1
    agent, _ = start(tiny(env_id=register("Dim", space=Box(0, 51, (3,), np.uint8))))
    assert agent.observe(np.full((1, 3), 51, np.uint8)).max() == pytest.approx(0.2)
    agent, stream = start(tiny(env_id=register("Pixels", space=SPACES["pixels"])))
    white = torch.full((1, 3, 36, 40), 255, dtype=torch.uint8)
    assert torch.allclose(agent(white)[1], agent.value_layer(agent.body(torch.ones(1, 3, 36, 40)))[:, 0])
    inner = Dict(a=Box(0, 255, (40, 40, 3), np.uint8), b=Tuple((Box(0, 200, (2,)), Discrete(3))))
    _, stream = start(tiny(env_id=register("Mixed", space=inner)))
    pixels, numbers = stream.obs[:, :4800], stream.obs[:, 4800:4802]
    assert 0.9 < pixels.max() <= 1 and numbers.max() > 1.5 and stream.obs[:, 4802:].max() == 1
    assert capsys.readouterr().err.count("is flattened") == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_dict_of_observations_becomes_a_vector_in_every_autoreset_mode(mode):
    space = Dict(a=Box(-1, 1, (2,)), b=Discrete(3))

    def flat(**options):
        return ppo_classic.flatten(Toy(**options))

    config = tiny(env_id=register(f"Dict{mode}", MODES[mode], flat, space=space, limit=3), num_steps=16)
    agent, stream = start(config)
    batch = collect_rollout(agent, stream, 0, config)
    assert stream.mode == MODES[mode] and len(stream.ended) > 4
    assert batch.inputs.shape[1] == 5 and torch.equal(batch.inputs[:, 2:].sum(1), torch.ones(len(batch.inputs)))


def test_multi_discrete_actions_reach_the_environment():
    env_id = register("Multi", actions=MultiDiscrete([3, 2, 4], start=[1, 0, 5]))
    agent, stream = start(tiny(env_id=env_id))
    collect_rollout(agent, stream, 0, tiny(env_id=env_id))
    received = np.array([a for env in stream.envs.envs for a in env.unwrapped.received])
    assert (received.min(0) == [1, 0, 5]).all() and (received.max(0) == [3, 1, 8]).all()


def test_a_grid_of_actions_reaches_the_environment_as_a_grid():
    env_id = register("Grid", actions=MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, 7]]))
    config = tiny(env_id=env_id, num_steps=64)
    agent, stream = start(config)
    assert collect_rollout(agent, stream, 0, config).actions.shape[1] == 4
    received = np.array([a for env in stream.envs.envs for a in env.unwrapped.received])
    assert (received.min(0) == [[1, 0], [0, 7]]).all() and (received.max(0) == [[2, 2], [3, 11]]).all()


def test_box_actions_are_clipped_for_the_environment_and_stored_unclipped():
    env_id = register("Clip", actions=Box(np.float32([-0.5, 0.0]), np.float32([0.5, 7.0])))
    config = tiny(env_id=env_id, num_steps=64)
    agent, stream = start(config)
    batch = collect_rollout(agent, stream, 0, config)
    received = np.array([a for env in stream.envs.envs for a in env.unwrapped.received])
    assert received.dtype == np.float32
    assert received[:, 0].min() == -0.5 and received[:, 0].max() == 0.5 and received[:, 1].min() == 0
    assert batch.actions[:, 0].max() > 1 and batch.actions[:, 1].min() < -0.5
    with torch.no_grad():
        mean, _ = agent(batch.inputs)
    expected = torch.distributions.Normal(mean, 1.0).log_prob(batch.actions).sum(1)
    assert torch.allclose(batch.logprobs, expected, atol=1e-5)


FAR = Box(np.float32([0, -1, 5, -np.inf, -3e38]), np.float32([1000, 1, 6, np.inf, 3e38]))


def test_actions_are_scaled_where_the_bounds_are_far_off_and_nowhere_else(capsys):
    head = ppo_classic.Gaussian(FAR)
    assert "2 components" in capsys.readouterr().out
    assert np.allclose(head.to_env(np.full((1, 5), -1.0)), [[0, -1, 5, -1, -1]])
    assert np.allclose(head.to_env(np.full((1, 5), 0.5)), [[750, 0.5, 5.75, 0.5, 0.5]])
    assert np.allclose(head.to_env(np.full((1, 5), 2.0)), [[1000, 1, 6, 2, 2]])
    for env_id in ("Pendulum-v1", "MountainCarContinuous-v0"):
        space = gym.make(env_id).action_space
        assert np.array_equal(ppo_classic.Gaussian(space).to_env(space.high[None]), space.high[None])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_far_off_best_action_is_found():
    env_id = register("Far", entry_point=Target, actions=Box(0, 1000, (1,)), best=700.0)
    sizes = {"num_envs": 8, "num_steps": 64, "num_minibatches": 4, "update_epochs": 4}
    config = tiny(env_id=env_id, learning_rate=1e-2, ent_coef=0.0, **sizes)
    agent, stream = start(config)
    for step in range(60):
        one_update(agent, stream, config, step)
    assert agent.head.to_env(agent.act(np.zeros((1, 1)), None)).item() == pytest.approx(700, abs=40)


@pytest.mark.parametrize("space", [MultiBinary(3), Tuple((Discrete(2), Discrete(2)))])
def test_an_action_space_that_is_not_supported_is_refused_by_name(space):
    with pytest.raises(UsageError, match=type(space).__name__):
        start(tiny(env_id=register("Refused", actions=space)))


def test_an_observation_space_that_is_not_supported_is_refused_by_name():
    with pytest.raises(UsageError, match="Text|Sequence|Graph"):
        start(tiny(env_id=register("Refused", space=gym.spaces.Sequence(Discrete(3)))))


def preset_of(env_id: str) -> dict:
    defaults = vars(Config())
    return {name: x for name, x in vars(ppo_classic.choose_preset(env_id)).items() if x != defaults[name]}


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("MountainCarContinuous-v0", "box"),
        ("Pendulum-v1", "Pendulum"),
        ("MountainCar-v0", "MountainCar"),
        ("Acrobot-v1", "Acrobot"),
    ],
)
def test_presets_follow_from_the_environment(env_id, name):
    expected = {option: x for option, x in ppo_classic.PRESETS[name].items() if x != getattr(Config(), option)}
    assert preset_of(env_id) == {"env_id": env_id, **expected} and len(expected) > 3


def test_pixels_have_their_preset_and_small_images_have_not():
    assert preset_of(register("Pixels", space=SPACES["pixels"]))["norm_reward"] == "sign"
    assert "norm_reward" not in preset_of(register("Small", space=SPACES["small image"]))


@pytest.mark.parametrize("preset", ppo_classic.PRESETS)
def test_every_preset_names_options_that_exist_and_work(preset):
    ppo_classic.check_config(dataclasses.replace(Config(), **ppo_classic.PRESETS[preset]))


def test_native_vector_environments_are_used_where_they_exist():
    with closing(ppo_classic.make_envs(Config(), 2)) as envs:
        assert type(envs).__name__ == "CartPoleVectorEnv"
    with closing(ppo_classic.make_envs(Config(vectorization="sync"), 2)) as envs:
        assert isinstance(envs, SyncVectorEnv)
    with closing(ppo_classic.make_envs(Config(env_id="Acrobot-v1"), 2)) as envs:
        assert isinstance(envs, SyncVectorEnv)


def test_environments_get_different_seeds_and_the_same_seed_the_same_set():
    def observations(seed):
        _, stream = start(tiny(num_envs=4, vectorization="sync", seed=seed))
        return stream.obs.copy()

    assert len({tuple(x) for x in observations(1)}) == 4
    assert np.array_equal(observations(1), observations(1)) and not np.isin(observations(2), observations(1)).any()


def test_environments_of_a_module_are_found(here, monkeypatch):
    source = "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
    source += "gymnasium.register('Mine-v0', entry_point=CartPoleEnv, max_episode_steps=20)\n"
    (here / "my_own_module.py").write_text(source)
    monkeypatch.syspath_prepend(here)
    evaluation = ppo_classic.main(tiny(env_id="my_own_module:Mine-v0", output_dir="run"))
    assert 5 < evaluation["eval/score"] <= 20
    with pytest.raises(UsageError, match="no_such_module"):
        ppo_classic.choose_preset("no_such_module:Mine-v0")


def test_atari_takes_two_updates_through_its_native_vector_environment():
    pytest.importorskip("ale_py", reason="ale-py is not installed: pip install ale-py")
    config = ppo_classic.choose_preset("ALE/Breakout-v5")
    assert config.norm_reward == "sign"
    config = dataclasses.replace(config, num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1)
    agent, stream = start(config)
    assert agent.is_image and stream.obs.shape == (2, 4, 84, 84) and stream.mode == AutoresetMode.NEXT_STEP
    before = weights(agent)
    for step in range(2):
        metrics = one_update(agent, stream, config, step)
    print(f"Breakout: {metrics}")
    assert not torch.equal(before, weights(agent)) and math.isfinite(metrics["value/loss"])
    assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-4)


# ---- Runs: learning, artifacts, resume ------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(here):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo_classic.main(tiny(env_id="Pendulum-v1", output_dir=name, seed=seed, norm_obs=True))
    a, b, c = (read_log(here / name) for name in "abc")
    assert a == b and len(a) == 4 and a[0]["policy/loss"] != c[0]["policy/loss"]
    assert all(torch.equal(x, newest(here / "b")[name]) for name, x in newest(here / "a").items())


def die_at(monkeypatch, calls: list, count: int, how=KeyboardInterrupt) -> None:
    """Makes the rollout number `count` raise; calls gets the steps of all rollouts."""
    real = ppo_classic.collect_rollout

    def dies(agent, stream, step, c):
        calls.append(step)
        if len(calls) == count:
            raise how
        return real(agent, stream, step, c)

    monkeypatch.setattr(ppo_classic, "collect_rollout", dies)


@pytest.mark.parametrize(("env_id", "stop"), [("CartPole-v1", 2), ("Pendulum-v1", 3)])
def test_a_resumed_run_equals_a_straight_one_bitwise(here, monkeypatch, env_id, stop):
    config = tiny(env_id=env_id, norm_obs=True, norm_reward="scale", total_timesteps=190, kl_coef=0.1, kl_target=0.01)
    straight = ppo_classic.main(dataclasses.replace(config, output_dir="straight"))
    calls = []
    die_at(monkeypatch, calls, stop + 1)
    with pytest.raises(KeyboardInterrupt):  # as if killed: it saves nothing
        ppo_classic.main(dataclasses.replace(config, output_dir="broken"))
    resumed = ppo_classic.main(dataclasses.replace(config, output_dir="broken"))
    assert calls[stop + 1] == 2  # the newest checkpoint is that of step 2
    assert read_log(here / "broken") == read_log(here / "straight") and resumed == straight
    assert [int(row["step"]) for row in read_log(here / "broken")] == list(range(1, len(read_log(here / "broken")) + 1))
    for name, x in newest(here / "straight").items():
        assert torch.equal(x, newest(here / "broken")[name]), name


@pytest.mark.slow
def test_kill_minus_9_at_any_moment_and_the_same_command_again_equal_a_straight_run(here):
    flags = "--env_id Pendulum-v1 --num_steps 64 --num_envs 2 --total_timesteps 6000 --save_every 3 --eval_episodes 2"
    flags += " --num_minibatches 2 --update_epochs 3"
    command = [sys.executable, "-W", "ignore", str(ROOT / "ppo_classic.py"), *flags.split(), "--output_dir"]
    subprocess.run([*command, "straight"], check=True, capture_output=True)
    for moment in (0.2, 0.9, 0.5):
        log = here / "killed" / "training_metrics.csv"
        before = log.read_text() if log.exists() else ""
        process = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.read_text() == before):
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.wait()
    subprocess.run([*command, "killed"], check=True, capture_output=True)
    assert read_log(here / "killed") == read_log(here / "straight") and len(read_log(here / "killed")) == 47
    assert all(torch.equal(x, newest(here / "killed")[name]) for name, x in newest(here / "straight").items())


def test_a_finished_run_is_not_repeated_and_nothing_is_deleted(here):
    first = ppo_classic.main(tiny(output_dir="run"))
    before = read_log(here / "run", times=True)
    assert ppo_classic.main(tiny(output_dir="run")) == first
    assert read_log(here / "run", times=True) == before


def test_a_checkpoint_is_evaluated_without_training(here):
    first = ppo_classic.main(tiny(output_dir="run"))
    assert ppo_classic.main(tiny(output_dir="run", total_timesteps=0)) == first
    assert len(read_log(here / "run")) == 4


def test_changed_settings_are_said_and_kept_in_the_summary(here, capsys):
    ppo_classic.main(tiny(output_dir="run"))
    ppo_classic.main(tiny(output_dir="run", total_timesteps=256, gamma=0.5))
    assert "total_timesteps 100 -> 256, gamma 0.99 -> 0.5" in capsys.readouterr().err
    ppo_classic.main(tiny(output_dir="run", total_timesteps=256, gamma=0.5))
    assert capsys.readouterr().err == ""
    history = read_summary(here / "run")["history"]
    assert history == [{"step": 4, "changes": ["total_timesteps 100 -> 256", "gamma 0.99 -> 0.5"]}]
    rows = read_log(here / "run")
    assert 256 <= int(rows[-1]["global_step"]) < 256 + 32
    assert float(rows[4]["optim/lr"]) > float(rows[3]["optim/lr"])  # 1/2 of the new plan is left, of the old one 1/4


def test_the_header_tells_a_fresh_run_from_a_resumed_one(here, capsys):
    ppo_classic.main(tiny(output_dir="run", total_timesteps=64))
    fresh = capsys.readouterr().out
    assert "resumed from" not in fresh and fresh.count("run: run, to continue it: python") == 1
    ppo_classic.main(tiny(output_dir="run"))
    resumed = capsys.readouterr().out
    assert resumed.count("resumed from step_3, 94 of 100 environment steps: run/checkpoints/step_3\n") == 1


def test_the_learning_rate_falls_linearly_with_the_transitions(here):
    ppo_classic.main(tiny(output_dir="run", total_timesteps=320))
    rows = read_log(here / "run")
    assert float(rows[0]["optim/lr"]) == 1e-3
    for before, row in zip(rows, rows[1:], strict=False):
        assert float(row["optim/lr"]) == pytest.approx(1e-3 * (1 - int(before["global_step"]) / 320))
    ppo_classic.main(tiny(output_dir="constant", anneal_lr=False))
    assert {row["optim/lr"] for row in read_log(here / "constant")} == {"0.001"}


def test_the_learning_rate_in_the_log_is_that_of_adam(here):
    ppo_classic.main(tiny(output_dir="still", learning_rate=0.0))
    assert {row["policy/ratio_first"] for row in read_log(here / "still")} != set()
    assert max(float(row["policy/approx_kl"]) for row in read_log(here / "still")) < 1e-8


def test_the_last_step_is_saved_once_and_two_checkpoints_are_kept(here):
    ppo_classic.main(tiny(output_dir="run", total_timesteps=150))
    steps = [int(path.name[5:]) for path in ppo_classic.checkpoints(here / "run")]
    assert steps == [4, 5] and len(read_log(here / "run")) == 5


def test_a_run_leaves_the_artifacts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation = ppo_classic.main(tiny(seed=3))
    run_dir = (tmp_path / "output" / "ppo_metrics").resolve()
    assert run_dir.name.startswith("ppo_classic-CartPole-v1-seed3-")
    names = {"summary.json", "training_curves.png", "training_metrics.csv", "checkpoints", ".lock"}
    assert {path.name for path in run_dir.iterdir()} == names
    summary = read_summary(run_dir)
    assert summary["status"] == "finished" and summary["reason"] == "" and summary["last_evaluation"] == evaluation
    assert summary["config"] == dataclasses.asdict(tiny(seed=3))
    assert summary["resume_command"].startswith("python ") and run_dir.name in summary["resume_command"]
    assert summary["global_step"] == int(read_log(run_dir)[-1]["global_step"]) >= 100
    assert {"python", "torch", "gymnasium"} <= set(summary) and summary["seconds"] > 0
    assert re.fullmatch("[0-9a-f]{40}", summary["commit"] or "0" * 40) and "CPUs" in summary["machine"]
    picture = matplotlib.image.imread(run_dir / "training_curves.png")
    assert picture.shape[0] > 500 and picture.std() > 0.05


def test_statistics_are_frozen_in_evaluation_and_come_back_with_the_checkpoint(here):
    config = tiny(env_id="Pendulum-v1", norm_obs=True, norm_reward="scale", output_dir="run", eval_episodes=4)
    trained = ppo_classic.main(config)
    before = newest(here / "run")
    assert before["obs_moments"][2].min() > 100 and before["obs_moments"][0].abs().max() > 0.01
    assert before["return_moments"][1] != 1
    agent, _ = start(dataclasses.replace(config, seed=9))
    with closing(ppo_classic.Run(config)) as run:
        ppo_classic.load_checkpoint(run, agent)
    learned = ppo_classic.evaluate(agent, config)
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())
    agent.obs_moments[:2] = torch.tensor([[0.0], [1.0]])  # what a lost normaliser would be
    assert learned == trained and ppo_classic.evaluate(agent, config) != learned


def test_evaluation_gives_every_environment_its_share():
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

    agent, _ = start(tiny(env_id=register("Evaluation")))
    env_id = register("Share", entry_point=Counter)
    result = ppo_classic.evaluate(agent, tiny(env_id=env_id, eval_episodes=40))  # number i plays two of length i
    assert result["eval/score"] == pytest.approx(np.mean(np.arange(1, 21)))
    error = np.std(np.repeat(np.arange(1, 21), 2)) / math.sqrt(40)
    assert result["eval/standard_error"] == pytest.approx(error)


def test_an_evaluation_that_would_never_end_ends_and_says_so(capsys):
    ppo_classic.warn_once.cache_clear()
    config = tiny(env_id=register("Endless", limit=-1), eval_max_steps=50, eval_episodes=25)
    agent, _ = start(config)
    assert ppo_classic.evaluate(agent, config) == {"eval/score": 50, "eval/standard_error": 0}
    assert capsys.readouterr().err.count("did not end in 50 steps") == 1


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_an_evaluation_episode_that_ends_at_the_limit_is_not_endless(ends, capsys):
    ppo_classic.warn_once.cache_clear()
    env_id = register("Exact", limit=50, ends=ends)
    config = tiny(env_id=env_id, eval_max_steps=50, eval_episodes=45)
    agent, _ = start(config)
    assert ppo_classic.evaluate(agent, config)["eval/score"] == 50
    assert "did not end" not in capsys.readouterr().err


@pytest.mark.slow
def test_cartpole_is_learned(here):
    sizes = {"num_envs": 8, "num_steps": 64, "total_timesteps": 60_000}
    config = Config(learning_rate=1e-3, norm_reward="scale", eval_episodes=20, output_dir="run", **sizes)
    assert ppo_classic.main(config)["eval/score"] > 400


# ---- Guard rails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    ppo_classic.SafetensorError("I/O error: No space left on device"),
])
def test_a_failed_write_leaves_the_older_checkpoint_and_names_the_folder(here, monkeypatch, error):
    real = ppo_classic.save_file
    written = []

    def fails(tensors, path):
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"half of i")
            raise error
        return real(tensors, path)

    monkeypatch.setattr(ppo_classic, "save_file", fails)
    with pytest.raises(UsageError, match="run: .*No space"):
        ppo_classic.main(tiny(output_dir="run"))
    assert read_summary(here / "run")["status"] == "failed" and "No space" in read_summary(here / "run")["reason"]
    monkeypatch.setattr(ppo_classic, "save_file", real)
    assert [path.name for path in ppo_classic.checkpoints(here / "run")] == ["step_2"]
    ppo_classic.main(tiny(output_dir="run"))
    assert [int(row["step"]) for row in read_log(here / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["flipped in the header", "flipped", "cut", "no hashes", "other state", "empty"])
def test_the_newest_whole_checkpoint_is_used_and_a_damaged_one_is_said_and_kept(here, capsys, damage):
    ppo_classic.main(tiny(output_dir="run"))
    straight = newest(here / "run")
    _, newer = ppo_classic.checkpoints(here / "run")
    data = bytearray((newer / "agent.safetensors").read_bytes())
    if damage == "flipped in the header":
        data[20] ^= 1
    if damage == "flipped":
        data[-9] ^= 1
    if damage == "cut":
        data = data[:-100]
    (newer / "agent.safetensors").write_bytes(data)
    if damage == "no hashes":
        (newer / "hashes.json").unlink()
    if damage == "other state":
        (newer / "state.json").write_text((newer / "state.json").read_text().replace('"step": 4', '"step": 3'))
    if damage == "empty":
        shutil.rmtree(newer)
        newer.mkdir()
    ppo_classic.main(tiny(output_dir="run"))
    assert "step_4 is damaged" in capsys.readouterr().err
    assert [int(row["step"]) for row in read_log(here / "run")] == [1, 2, 3, 4]
    assert all(torch.equal(x, newest(here / "run")[name]) for name, x in straight.items())  # made again
    assert newer.with_name("step_4.old").is_dir()


def test_a_folder_begun_anew_keeps_the_old_files_and_says_so(here, capsys):
    ppo_classic.main(tiny(output_dir="run"))
    before = read_log(here / "run", times=True)
    (here / "run" / "thesis.tex").write_text("years")
    for path in ppo_classic.checkpoints(here / "run"):
        shutil.rmtree(path)
    ppo_classic.main(tiny(output_dir="run", seed=2))
    said = capsys.readouterr().err
    for name in ("training_metrics.csv", "summary.json"):
        assert f"{name} is kept as {name}.old" in said and (here / "run" / f"{name}.old").exists()
    assert len(before) == len((here / "run" / "training_metrics.csv.old").read_text().splitlines()) - 1
    assert len(read_log(here / "run")) == 4 and (here / "run" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("damage", ["deleted", "cut", "noise"])
def test_a_damaged_log_does_not_stop_a_resume(here, capsys, damage):
    ppo_classic.main(tiny(output_dir="run"))
    log = here / "run" / "training_metrics.csv"
    if damage == "deleted":
        log.unlink()
    if damage == "cut":
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    if damage == "noise":
        log.write_bytes(b"\xff\x00 no table")
    ppo_classic.main(tiny(output_dir="run", total_timesteps=150))
    assert [row["step"] for row in read_log(here / "run")] == ["5"]
    if damage != "deleted":
        assert "training_metrics.csv is kept as training_metrics.csv.old" in capsys.readouterr().err
        assert (here / "run" / "training_metrics.csv.old").exists()


def test_a_log_with_other_columns_is_kept_and_a_new_one_begins(here, monkeypatch, capsys):
    ppo_classic.main(tiny(output_dir="run"))
    before = (here / "run" / "training_metrics.csv").read_text()
    real = ppo_classic.update

    def edited(*arguments):
        metrics = real(*arguments)
        metrics["policy/my_loss"] = 7.0
        del metrics["policy/clipfrac_lower"]  # as many columns as before
        return metrics

    monkeypatch.setattr(ppo_classic, "update", edited)
    ppo_classic.main(tiny(output_dir="run", total_timesteps=200))
    rows = read_log(here / "run")
    assert rows[0]["step"] == "5" and {row["policy/my_loss"] for row in rows} == {"7.0"}
    assert float(rows[0]["policy/kl_coef"]) == 0
    assert (here / "run" / "training_metrics.csv.old").read_text() == before
    assert "training_metrics.csv is kept as training_metrics.csv.old" in capsys.readouterr().err


def test_an_environment_that_cannot_be_made_leaves_ctrl_c_as_it_was(here):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UsageError, match="env_id"):
        ppo_classic.make_envs(tiny(env_id="Acrobot-v1", vectorization="async"), -1)
    assert signal.getsignal(signal.SIGINT) is before


def test_rows_of_steps_that_are_made_again_are_kept_beside_the_log(here, monkeypatch, capsys):
    die_at(monkeypatch, [], 4)
    with pytest.raises(KeyboardInterrupt):
        ppo_classic.main(tiny(output_dir="run"))
    ppo_classic.main(tiny(output_dir="run"))
    assert [row["step"] for row in read_log(here / "run")] == ["1", "2", "3", "4"]
    old = (here / "run" / "training_metrics.csv.old").read_text().splitlines()
    assert len(old) == 4 and "kept as training_metrics.csv.old" in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_refused_with_the_settings_that_differ(here):
    ppo_classic.main(tiny(output_dir="run"))
    with pytest.raises(UsageError, match="step_4 does not fit .hidden_size 16 -> 32"):
        ppo_classic.main(tiny(output_dir="run", hidden_size=32))
    with pytest.raises(UsageError, match="env_id CartPole-v1 -> Acrobot-v1"):
        ppo_classic.main(tiny(output_dir="run", env_id="Acrobot-v1"))
    assert read_summary(here / "run")["status"] == "finished" and len(read_log(here / "run")) == 4
    path = ppo_classic.checkpoints(here / "run")[-1]
    state = json.loads((path / "state.json").read_text()) | {"format": 0}
    (path / "state.json").write_text(json.dumps(state))
    hashes = {name: ppo_classic.file_hash(path / name) for name in ("agent.safetensors", "state.json")}
    (path / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(UsageError, match="version of this file"):
        ppo_classic.main(tiny(output_dir="run"))


def test_a_folder_in_use_is_refused_with_the_process_that_has_it(here):
    (here / "run").mkdir()
    with open(here / "run" / ".lock", "w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="run is in use by process 4711"):
            ppo_classic.main(tiny(output_dir="run"))
    ppo_classic.main(tiny(output_dir="run"))


def test_a_folder_with_files_of_somebody_else_is_refused(here):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="mine is not empty and not the folder of a run"):
        ppo_classic.main(tiny(output_dir="mine"))
    assert [path.name for path in (here / "mine").iterdir()] == ["thesis.tex"]


@pytest.fixture
def listening():
    """The signals are heard as start() arranges it."""
    handlers = {number: signal.signal(number, ppo_classic.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    ppo_classic.STOP.clear()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_iteration_saves_and_says_how_to_continue(
    here, monkeypatch, capsys, listening, number, code
):
    real = ppo_classic.update

    def interrupted(agent, batch, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(agent, batch, step, *rest)

    monkeypatch.setattr(ppo_classic, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        ppo_classic.main(tiny(output_dir="run"))
    assert stopped.value.code == code
    assert [path.name for path in ppo_classic.checkpoints(here / "run")] == ["step_2", "step_3"]
    assert [row["step"] for row in read_log(here / "run")] == ["1", "2", "3"]
    assert read_summary(here / "run")["status"] == "stopped"
    assert "continue with: python" in capsys.readouterr().out
    monkeypatch.setattr(ppo_classic, "update", real)
    ppo_classic.STOP.clear()
    ppo_classic.main(tiny(output_dir="run"))
    assert [row["step"] for row in read_log(here / "run")] == ["1", "2", "3", "4"]
    assert read_summary(here / "run")["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [(1, 2), (1,)])  # `2>&1 | tee log` and `| tee log`
def test_ctrl_c_that_also_ends_who_reads_the_console_loses_nothing(here, broken):
    code = f"""
import os, signal, sys
import ppo_classic
real = ppo_classic.update
def interrupted(agent, batch, step, *rest):
    if step == 2:
        reader, writer = os.pipe()
        os.close(reader)
        for number in {broken}:
            os.dup2(writer, number)
        os.kill(os.getpid(), signal.SIGINT)
        ppo_classic.warn("nobody reads this")
        print("nor this", end="", flush=True)
    return real(agent, batch, step, *rest)
ppo_classic.update = interrupted
sys.exit(ppo_classic.start())
"""
    settings = dataclasses.asdict(tiny(output_dir="run"))
    flags = [f"--{name}={x}" for name, x in settings.items() if x != getattr(Config(), name)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *flags], text=True, capture_output=True,
                          env=environment)
    assert done.returncode == 130 and ("nobody reads this" in done.stderr) == (broken == (1,))
    assert [row["step"] for row in read_log(here / "run")] == ["1", "2", "3"]
    assert [path.name for path in ppo_classic.checkpoints(here / "run")] == ["step_2", "step_3"]
    assert read_summary(here / "run")["status"] == "stopped"


def test_a_second_signal_ends_at_once(monkeypatch, listening):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    os.kill(os.getpid(), signal.SIGINT)
    assert (ppo_classic.STOP, codes) == ([signal.SIGINT], [])
    os.kill(os.getpid(), signal.SIGTERM)  # as a launcher sends it after a Ctrl-C
    assert codes == []
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_a_signal_in_the_evaluation_ends_it(here, monkeypatch, listening):
    real = ppo_classic.evaluate

    def interrupted(agent, c):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(agent, c)

    monkeypatch.setattr(ppo_classic, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        ppo_classic.main(tiny(output_dir="run"))
    assert stopped.value.code == 143 and len(read_log(here / "run")) == 4  # nothing of the training is lost
    assert read_summary(here / "run")["status"] == "stopped"


@pytest.mark.slow
def test_ctrl_c_reaches_a_run_with_environments_in_processes(here):
    flags = ["--env_id=Acrobot-v1", "--vectorization=async", "--num_envs=2", "--output_dir=run"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "ppo_classic.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    while not (here / "run" / "training_metrics.csv").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "continue with" in out and "Traceback" not in err
    assert len(ppo_classic.checkpoints(here / "run")) == 1


def test_an_environment_that_raises_shows_itself_after_the_last_step_was_saved(here):
    ppo_classic.main(tiny(env_id=register("Raises"), output_dir="run", save_every=0))
    register("Raises", fault="raises", limit=60)
    with pytest.raises(RuntimeError, match="the simulator lost its mind"):
        ppo_classic.main(tiny(env_id="Raises-v0", output_dir="run", total_timesteps=256))
    summary = read_summary(here / "run")
    assert summary["status"] == "failed" and "the simulator lost its mind" in summary["reason"]


@pytest.mark.parametrize("method", ["step", "reset"])
@pytest.mark.parametrize("steps", [64, 0])  # in a rollout, and in the evaluation
def test_an_environment_that_cannot_read_its_file_is_not_taken_for_the_folder_of_the_run(
    here, monkeypatch, method, steps
):
    def breaks(self, *arguments, **options):
        raise FileNotFoundError("the maze is gone")

    monkeypatch.setattr(Toy, method, breaks)
    config = tiny(env_id=register("Maze"), output_dir="run", total_timesteps=steps)
    with pytest.raises(RuntimeError, match="the environment raised FileNotFoundError"):
        ppo_classic.main(config)
    assert read_summary(here / "run")["status"] == "failed"


def test_a_run_that_failed_in_its_first_step_can_be_started_again(here):
    register("First", fault="raises", limit=60)
    with pytest.raises(RuntimeError, match="the simulator lost its mind"):
        ppo_classic.main(tiny(env_id="First-v0", output_dir="run"))
    register("First")
    ppo_classic.main(tiny(env_id="First-v0", output_dir="run"))
    assert read_summary(here / "run")["status"] == "finished" and len(read_log(here / "run")) >= 4


@pytest.mark.parametrize("field", ["observation", "reward"])
def test_a_number_that_is_not_finite_is_named_and_the_steps_before_it_are_saved(here, monkeypatch, field):
    real = Toy.step

    def breaks(self, action):
        result = list(real(self, action))
        if len(self.received) == 50 and field == "observation":  # a reset is no step: 18 steps are 24 of the stream
            result[0] = result[0] * math.nan
        if len(self.received) == 50 and field == "reward":
            result[1] = math.inf
        return tuple(result)

    monkeypatch.setattr(Toy, "step", breaks)
    env_id = register("Nan", limit=1000)
    sentence = f"environment 0: its (next )?{field} is not finite, iteration 4, step [12]"
    with pytest.raises(UsageError, match=sentence):
        ppo_classic.main(tiny(env_id=env_id, output_dir="run", save_every=0, total_timesteps=500))
    assert [path.name for path in ppo_classic.checkpoints(here / "run")] == ["step_3"]
    assert read_summary(here / "run")["status"] == "failed"


@pytest.mark.parametrize("norm_obs", [False, True])  # clipping must not hide it
def test_an_infinite_observation_at_the_start_is_named(norm_obs):
    config = tiny(env_id=register("Infinite", fault="start"), norm_obs=norm_obs)
    agent, stream = start(config)
    with pytest.raises(UsageError, match="environment 0: its observation is not finite, iteration 1, step 0"):
        collect_rollout(agent, stream, 0, config)


def test_divergence_ends_the_run_with_the_last_good_checkpoint(here, monkeypatch):
    real = ppo_classic.ppo_loss
    calls = []

    def diverges(*arguments):
        calls.append(1)
        loss, logged = real(*arguments)
        return loss * (math.nan if len(calls) > 10 else 1.0), logged

    monkeypatch.setattr(ppo_classic, "ppo_loss", diverges)
    with pytest.raises(UsageError, match="three gradients in a row"):
        ppo_classic.main(tiny(output_dir="run"))
    assert [path.name for path in ppo_classic.checkpoints(here / "run")] == ["step_2"]
    assert read_summary(here / "run")["status"] == "failed"


@pytest.mark.parametrize("mode", [None, "whenever", "NextStep"])
def test_the_autoreset_mode_is_read_from_the_metadata_and_never_assumed(mode):
    envs = ppo_classic.make_envs(tiny(), 1)
    envs.metadata = {"autoreset_mode": mode}
    with pytest.raises(UsageError, match="autoreset_mode"):
        Stream(envs, 0.9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"total_timesteps": 31}, "total_timesteps = 31 is less than one batch: use at least 32"),
        ({"num_minibatches": 33}, "32 rows do not fill num_minibatches = 33: use at most 32"),
        ({"num_steps": 1}, "num_steps = 1 must be at least 2"),
        ({"gamma": 1.1}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"num_envs": 0}, "num_envs = 0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0 must be"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"kl_target": 0.1}, "kl_coef"),
        ({"target_kl": -0.1}, "target_kl"),
        ({"cuda": True}, "no GPU"),
    ],
)
def test_settings_that_cannot_work_are_refused(here, monkeypatch, changes, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=sentence):
        ppo_classic.main(tiny(**changes))
    assert list(here.iterdir()) == []


@pytest.fixture
def command_line(monkeypatch, capsys, listening):
    """Runs the script's command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ppo_classic.py", *flags])
        code = ppo_classic.start()
        return code, *capsys.readouterr()

    return run


def test_bad_input_is_one_sentence_and_exit_code_2(here, command_line):
    (here / "file").touch()
    for flags, sentence in (
        (["--env_id", "CartPoole-v1"], "CartPoole"),
        (["--total_timesteps", "5"], "error: total_timesteps = 5 is less than one batch: use at least 512\n"),
        (["--output_dir", "file"], "file"),
        (["--output_dir", "file/below"], "file/below"),
    ):
        code, _, error = command_line(*flags)
        assert code == 2 and sentence in error and len(error.splitlines()) == 1, error


def test_an_environment_is_found_in_the_folder_where_the_command_is_given(here, command_line):
    source = "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
    (here / "my_other_module.py").write_text(f"{source}gymnasium.register('Other-v0', CartPoleEnv)\n")
    flags = ["--env_id=my_other_module:Other-v0", "--total_timesteps=600", "--eval_episodes=1"]
    assert command_line(*flags)[0] == 0


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_exit_code_2(here):
    command = f"ulimit -f 60; {sys.executable} -W ignore {ROOT}/ppo_classic.py --output_dir run --save_every 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error:" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_script_alone_in_an_empty_folder_runs(here):
    shutil.copy(ROOT / "ppo_classic.py", here)
    command = [sys.executable, "ppo_classic.py", "--total_timesteps", "2000", "--eval_episodes", "2"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert "eval/score" in done.stdout and (here / "output" / "ppo_metrics" / "training_curves.png").exists()


def test_help_shows_the_options_in_groups_with_the_defaults_of_the_environment(here, command_line):
    code, shown, _ = command_line("--env_id", "Pendulum-v1", "--help")
    assert code == 0 and list(here.iterdir()) == []
    headings = [line for line in shown.splitlines() if re.fullmatch("[A-Z][a-z]+(, [a-z]+)*", line)]
    assert headings == ["Run", "Environment", "Network", "Loss", "Optimization", "Evaluation, logs, checkpoints"]
    options = re.findall(r"^  --(\w+) ", shown, re.MULTILINE)
    assert options == [field.name for field in dataclasses.fields(Config)]
    assert "--gamma float (default: 0.9)" in shown and "python ppo_classic.py --env_id" in shown


# ---- Console and trackers -------------------------------------------------------------------------------------


def test_the_console_is_a_table_of_fixed_columns_with_its_header_every_20_lines(here, capsys):
    ppo_classic.main(tiny(output_dir="run", total_timesteps=2000, eval_episodes=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("   ")]
    headers = [i for i, line in enumerate(lines) if "return" in line]
    assert headers == list(range(0, len(lines), 21)) and len(headers) == 2
    assert len({len(line) for line in lines}) == 1
    first, last = lines[1].split(), lines[-1].split()
    assert int(first[0]) < 40 and int(last[0]) >= 2000 and len(first) == len(lines[0].split())
    assert not any("\r" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "width"), [("xterm", 40), ("dumb", 200)])
def test_a_terminal_gets_a_bar_with_the_time_left_and_a_dumb_one_does_not(here, kind, width):
    flags = ["--total_timesteps=4000", "--eval_episodes=1", "--output_dir=run"]
    command = [sys.executable, "-W", "ignore", ROOT / "ppo_classic.py", *flags]
    code, shown = run_in_a_terminal(command, width, TERM=kind)
    assert code == 0, shown
    assert bool(re.findall(r"100%.*4000/4000 .*<00:00", shown)) == (kind != "dumb")
    lines = re.split("[\r\n]+", shown)
    assert max(len(line) for line in lines if not line.startswith("run:")) <= width
    tables = [line for line in lines if line.split()[:2] == ["step", "seconds"]]
    assert len(tables) == 1 and len(tables[0].split()) == min(9, width // 10)


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
    assert len(read_log(here / "run")) == 4 and read_summary(here / "run")["status"] == "finished"


def test_tensorboard_gets_the_metrics(here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    ppo_classic.main(tiny(output_dir="run", track="tensorboard"))
    assert list((here / "run" / "tensorboard").iterdir())
