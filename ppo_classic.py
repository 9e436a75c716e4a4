"""Proximal Policy Optimization for Gymnasium environments: the whole algorithm in one file.

    python ppo_classic.py                                      # CartPole-v1, about a minute
    python ppo_classic.py --env_id HalfCheetah-v5              # MuJoCo: pip install "gymnasium[mujoco]"
    python ppo_classic.py --env_id ALE/Breakout-v5 --cuda      # Atari: pip install ale-py
    python ppo_classic.py --env_id my_module:MyEnv-v0          # an environment that my_module registers
    python ppo_classic.py --env_id Pendulum-v1 --help          # the options and their defaults

    while global_step < total_timesteps:
        batch = collect_rollout(agent, stream)                 num_steps steps of num_envs environments
            advantages, returns = compute_gae(rewards, values) time limits bootstrap, failures do not
        update(agent, batch)
            for epoch, mini_batch in batch:
                loss = ppo_loss(agent, mini_batch)             policy loss - entropy bonus + value loss
                take_step(agent, loss)                         gradient, clipping, Adam
        save_checkpoint(run, agent)
    evaluate(agent)

Shapes: T steps of N environments, [T, N]; rows: those of them that are transitions; K policy outputs: logits,
or means of a Gaussian. Index t of obs, inputs, values and logprobs is the state before action t. Environments
and acting use numpy arrays, learning uses torch.

Where this differs from the papers and from other code, on purpose:
1. `valid` is False on rows that are no transitions (the reset step of Gymnasium's NEXT_STEP mode): they enter
   no loss, no statistic, no counter. A time limit bootstraps from the final observation, in every autoreset
   mode.
2. Observation and return statistics belong to the agent: float64, shared by the environments, saved, frozen
   in evaluation, and constant during a rollout, so that old log-probs are those of one policy.
3. Noise and shuffles are functions of (seed, iteration), and all environments are reset, with such a seed,
   after every checkpoint (their episodes are cut and bootstrapped): a run that was killed and resumed equals
   a straight one, bitwise. A checkpoint made by Ctrl-C or SIGTERM is one more such reset.
"""

import fcntl
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.utils import update_mean_var_count_from_moments
from numpy import ndarray
from numpy.random import Generator, default_rng
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

ROLLOUT, SHUFFLE, RESET, EVALUATION = range(4)  # streams of random numbers, functions of (seed, iteration)
STOP: list[int] = []  # the signal that has asked to stop
COLUMNS = {  # of the console
    "return": "rollout/return_100",
    "length": "rollout/length_100",
    "entropy": "policy/entropy",
    "approx_kl": "policy/approx_kl",
    "clipped": "policy/clipfrac",
    "explained": "value/explained_variance",
    "steps/s": "time/steps_per_second",
}
CURVES = {  # panels of training_curves.png, columns of training_metrics.csv, and their units
    "rollout/return_100": "mean of 100 episodes; dot: evaluation",
    "rollout/length_100": "mean of 100 episodes, steps",
    "time/steps_per_second": "steps per second",
    "policy/entropy": "nats",
    "policy/approx_kl": "nats",
    "policy/clipfrac": "share of the ratios",
    "value/loss": "squared reward",
    "value/explained_variance": "share of the variance",
    "optim/grad_norm": "before clipping",
}


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


warn_once = functools.cache(warn)


# ---- Options. The defaults are CleanRL's for classic control; PRESETS change them by environment -----------


@dataclass
class Config:  # one line per option, whose comment is its sentence in --help; a line of comment is a heading
    # Run
    env_id: str = "CartPole-v1"  # Gymnasium id, or module:id; the other defaults follow from it
    seed: int = 1  # seeds the weights, the noise, the shuffles and the environments
    output_dir: str | None = None  # folder of the run, continued where it holds one; None: a new one
    cuda: bool = False  # use the GPU; networks of this size are faster on the CPU, unless they see pixels
    # Environment
    total_timesteps: int = 500_000  # steps of all environments together; 0: evaluate what is in output_dir
    num_envs: int = 4  # environments that are played side by side
    num_steps: int = 128  # steps of each environment per rollout
    vectorization: Literal["auto", "sync", "async"] = "auto"  # auto: the environment's own way, else sync
    norm_obs: bool = False  # normalise observations by running statistics, clipped to 10 deviations
    norm_reward: Literal["none", "scale", "sign"] = "none"  # scale: by the deviation of the discounted return
    # Network
    hidden_size: int = 64  # units of each of the two tanh layers; pixels have a network of their own
    # Loss
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    norm_adv: bool = True  # normalise the advantages of each mini-batch
    clip_coef: float = 0.2  # the ratio of new and old probability is clipped to 1 +- this
    dual_clip: float | None = None  # bound on the ratio where the advantage is negative (arXiv:1912.09729)
    clip_vloss: bool = True  # clip the change of the values to clip_coef, too
    ent_coef: float = 0.01  # weight of the entropy bonus, per nat
    vf_coef: float = 0.5  # weight of the value loss
    kl_coef: float = 0.0  # weight of a penalty KL(old, new), per nat; 0: none
    kl_target: float | None = None  # double or halve kl_coef to hold this KL, in nats (PPO paper, section 4)
    # Optimization
    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = True  # learning_rate falls linearly to 0
    num_minibatches: int = 4  # optimizer steps per epoch
    update_epochs: int = 4  # passes over each rollout
    max_grad_norm: float = 0.5  # the norm of the gradient is clipped to this
    target_kl: float | None = None  # end an update after an epoch whose mean approx_kl, in nats, passes this
    # Evaluation, logs, checkpoints
    eval_episodes: int = 100  # episodes at the end, likeliest actions (pixels: sampled) and frozen statistics
    eval_max_steps: int = 30_000  # an evaluation episode ends after so many steps, with its return then
    save_every: int = 100  # iterations between checkpoints, of which two are kept; 0: only the last one
    track: Literal["none", "wandb", "tensorboard"] = "none"  # sends the metrics there; pip install it first


MUJOCO = {
    "total_timesteps": 1_000_000,
    "num_envs": 1,
    "num_steps": 2048,
    "num_minibatches": 32,
    "update_epochs": 10,
    "learning_rate": 3e-4,
    "ent_coef": 0.0,
    "norm_obs": True,
    "norm_reward": "scale",
}
PIXELS = {
    "total_timesteps": 10_000_000,
    "num_envs": 8,
    "clip_coef": 0.1,
    "norm_reward": "sign",
    "eval_episodes": 10,
}
WIDE = {
    "total_timesteps": 1_000_000,
    "num_envs": 16,
    "norm_obs": True,
    "norm_reward": "scale",
    "learning_rate": 1e-3,
}
PENDULUM = {
    "total_timesteps": 500_000,
    "num_envs": 4,
    "num_steps": 1024,
    "gamma": 0.9,
    "learning_rate": 1e-3,
    "norm_obs": False,
}
PRESETS = {  # by the name of the environment, else by the kind of its spaces
    "discrete": {},
    "box": MUJOCO,
    "pixels": PIXELS,
    "Swimmer": MUJOCO | {"gamma": 0.9999, "gae_lambda": 0.98},
    "Acrobot": WIDE | {"num_steps": 256, "num_minibatches": 16, "ent_coef": 0.0},
    "MountainCar": WIDE | {"num_minibatches": 8, "gae_lambda": 0.98, "ent_coef": 0.0},
    "LunarLander": WIDE | {"num_steps": 256, "num_minibatches": 32, "gamma": 0.999, "gae_lambda": 0.98},
    "Pendulum": MUJOCO | PENDULUM,
}


# ---- Environments ------------------------------------------------------------------------------------------


def is_image(space: gym.Space) -> bool:
    """Three axes of bytes, large enough for the convolutions; a smaller one is treated as a vector."""
    if space.dtype != np.uint8 or len(space.shape) != 3:
        return False
    _, smaller_side, _ = sorted(space.shape)  # the least is the number of channels
    return smaller_side >= 36


def flatten(env: gym.Env) -> gym.Env:
    """Observations that are no Box, such as Dict and Tuple, become vectors; bytes in them are divided."""
    if isinstance(env.observation_space, Box):
        return env
    env = gym.wrappers.FlattenObservation(env)
    is_byte = env.observation_space.high == 255
    if is_byte.sum() > 36 * 36:
        warn_once("an image inside of the observation is flattened, not convolved")
    space = Box(-np.inf, np.inf, is_byte.shape, np.float64)
    return gym.wrappers.TransformObservation(env, lambda obs: np.where(is_byte, obs / 255, obs), space)


def make_envs(c: Config, num_envs: int, evaluation: bool = False) -> VectorEnv:
    """num_envs copies of env_id, native where there is a native one.

    Raises UsageError if it cannot be made: it is unknown, or a package that it needs is missing.
    """
    module, _, env_id = c.env_id.rpartition(":")
    options = {}
    if env_id.startswith("ALE/"):  # as in the published tables; in training a lost life is an end
        module = "ale_py"
        options = {
            "repeat_action_probability": 0.0,
            "reward_clipping": False,
            "episodic_life": not evaluation,
        }
    try:
        if module:
            importlib.import_module(module)
        if options or (c.vectorization == "auto" and gym.spec(env_id).vector_entry_point):
            return gym.make_vec(env_id, num_envs, "vector_entry_point", **options)
        if c.vectorization != "async":
            return gym.make_vec(env_id, num_envs, "sync", {"copy": False}, [flatten])  # we copy what we keep
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # its processes inherit this
        try:
            return gym.make_vec(env_id, num_envs, "async", {"copy": False}, [flatten])
        finally:
            signal.signal(signal.SIGINT, handler)
    except Exception as error:  # whatever is wrong with it, the user can only install or choose another
        raise UsageError(f"env_id {c.env_id}: {error or repr(error)}".split("\n")[0]) from error


class Stream:
    """A vector environment in any autoreset mode; `obs` [N, ...] is what the next actions answer."""

    def __init__(self, envs: VectorEnv, gamma: float):
        self.envs = envs
        self.gamma = gamma
        self.mode = envs.metadata.get("autoreset_mode")
        if not isinstance(self.mode, AutoresetMode):
            raise UsageError(f"{envs}: its metadata name no autoreset_mode of Gymnasium")
        self.ended = []  # [return, length] of the episodes that have ended

    def call(self, method: str, *arguments, **options) -> tuple:
        """What a method of the environments returns. Its OSError is not one of our files: RuntimeError."""
        try:
            return getattr(self.envs, method)(*arguments, **options)
        except OSError as error:
            raise RuntimeError(f"the environment raised {error!r}") from error

    def restart(self, *seed: int) -> None:
        """New episodes everywhere, a function of the numbers given."""
        number = np.random.SeedSequence(seed).generate_state(1)[0] >> 1
        self.obs, _ = self.call("reset", seed=int(number))
        self.over = np.zeros(self.envs.num_envs, bool)  # the last step ended an episode
        self.returns = np.zeros(self.envs.num_envs)  # of the running episodes
        self.lengths = np.zeros(self.envs.num_envs)
        self.discounted = np.zeros(self.envs.num_envs)  # return so far, discounted, for norm_reward

    def step(self, actions: ndarray) -> tuple[ndarray, ndarray, ndarray, ndarray]:
        """[N] arrays: the observations that followed, final ones too; rewards, terminated, and valid.

        valid is False where this step was a reset and no transition.
        """
        obs, rewards, terminated, truncated, infos = self.call("step", actions)
        is_reset = self.over & (self.mode == AutoresetMode.NEXT_STEP)
        valid = ~is_reset
        self.returns[self.over] = 0
        self.lengths[self.over] = 0
        rewards = np.where(valid, rewards, 0.0).astype(np.float64)
        self.returns += rewards
        self.lengths += valid
        self.discounted = np.where(self.over, 0.0, self.discounted) * self.gamma + rewards
        self.over = (terminated | truncated) & valid
        following = obs.copy()
        for i in np.flatnonzero(self.over):
            self.ended.append([float(self.returns[i]), float(self.lengths[i])])
            if self.mode == AutoresetMode.SAME_STEP:
                following[i] = infos["final_obs"][i]
        if self.mode == AutoresetMode.DISABLED and self.over.any():
            obs, _ = self.call("reset", options={"reset_mask": self.over})
        self.obs = obs
        return following, rewards, terminated & valid, valid


# ---- Agent -------------------------------------------------------------------------------------------------


class Categorical(nn.Module):
    """Discrete and MultiDiscrete actions: C independent components, each with its block of logits."""

    def __init__(self, space: Discrete | MultiDiscrete):
        super().__init__()
        self.space = space
        sizes = np.ravel(space.n if isinstance(space, Discrete) else space.nvec)
        ends = np.cumsum(sizes)
        first = ends - sizes  # logit of each component
        self.num_outputs = int(ends[-1])
        self.blocks = [slice(*bounds) for bounds in zip(first, ends, strict=True)]
        self.register_buffer("first", torch.from_numpy(first))

    def sample(self, logits: ndarray, rng: Generator | None) -> ndarray:
        """Actions [rows, C] by the Gumbel-max rule; without rng, the likeliest ones."""
        if rng is not None:
            logits = logits + rng.gumbel(size=logits.shape)
        chosen = [logits[:, block].argmax(1, keepdims=True) for block in self.blocks]
        return np.concatenate(chosen, 1)

    def to_env(self, actions: ndarray) -> ndarray:
        return actions.reshape(-1, *self.space.shape) + self.space.start

    def evaluate(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies in nats, [rows]."""
        blocks = [logits[:, block].log_softmax(1) for block in self.blocks]
        logprobs = torch.cat(blocks, 1)
        chosen = logprobs.gather(1, actions + self.first)
        entropy = -(logprobs.exp() * logprobs).sum(1)
        return chosen.sum(1), entropy


class Gaussian(nn.Module):
    """Box actions: independent normals. The environment gets them clipped to its bounds.

    Where the bounds are finite and do not contain 0 or lie beyond +-10, [-1, 1] stands for them: a policy
    that starts with mean 0 and deviation 1 would not find its way there.
    """

    def __init__(self, space: Box):
        super().__init__()
        self.space = space
        self.num_outputs = math.prod(space.shape)
        self.log_std = nn.Parameter(torch.zeros(self.num_outputs))  # the same in all states
        low = space.low.astype(np.float64)
        high = space.high.astype(np.float64)
        is_far = (low > 0) | (high < 0) | (low < -10) | (high > 10)
        is_far &= (low > -1e6) & (high < 1e6)  # where there are bounds at all
        self.scale = np.where(is_far, (high - low) / 2, 1.0)
        self.centre = np.where(is_far, low + self.scale, 0.0)
        if is_far.any():
            print(f"actions: [-1, 1] stands for the bounds of the environment in {is_far.sum()} components")

    def sample(self, mean: ndarray, rng: Generator | None) -> ndarray:
        """Actions [rows, K]; without rng, the means."""
        if rng is None:
            return mean
        noise = rng.standard_normal(mean.shape).astype(np.float32)
        log_std = self.log_std.detach().cpu().numpy()
        return mean + np.exp(log_std) * noise

    def to_env(self, actions: ndarray) -> ndarray:
        actions = actions.reshape(-1, *self.space.shape)
        actions = actions * self.scale + self.centre
        actions = actions.clip(self.space.low, self.space.high)
        return actions.astype(self.space.dtype)

    def evaluate(self, mean: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies in nats, [rows]."""
        z = (actions - mean) / self.log_std.exp()
        constant = self.log_std.sum() + 0.5 * self.num_outputs * math.log(2 * math.pi)
        logprobs = -0.5 * z.square().sum(1) - constant
        entropy = constant + 0.5 * self.num_outputs
        return logprobs, entropy.expand(len(z))


def build_body(space: Box, size: int) -> nn.Sequential:
    """Two tanh layers, or the CNN of Mnih et al. (2015); `size` outputs."""
    if not is_image(space):
        return nn.Sequential(
            nn.Linear(math.prod(space.shape), size),
            nn.Tanh(),
            nn.Linear(size, size),
            nn.Tanh(),
        )
    channels, *sides = sorted(space.shape)
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(size),
        nn.ReLU(),
    )
    body(torch.zeros(1, channels, *sides))  # gives the lazy layer its size
    return body


def update_moments(moments: Tensor, rows: ndarray) -> None:
    """Adds rows [rows, D] to mean, variance and count [3, D], in place (Chan et al., 1979)."""
    old = moments.cpu().numpy()
    rows = rows.astype(np.float64)
    new = update_mean_var_count_from_moments(*old, rows.mean(0), rows.var(0), len(rows))
    new = torch.from_numpy(np.stack(new))
    moments.copy_(new)


class Agent(nn.Module):
    """Networks, action distribution, running statistics and optimizer."""

    def __init__(self, envs: VectorEnv, c: Config):
        super().__init__()
        self.space = envs.single_observation_space
        actions = envs.single_action_space
        if not isinstance(self.space, Box) or not isinstance(actions, Box | Discrete | MultiDiscrete):
            raise UsageError(f"{c.env_id}: observations {self.space} or actions {actions} are not supported")
        self.is_image = is_image(self.space)
        self.norm_obs = c.norm_obs and not self.is_image
        self.head = Gaussian(actions) if isinstance(actions, Box) else Categorical(actions)
        size = 512 if self.is_image else c.hidden_size
        self.body = build_body(self.space, size)
        self.value_body = None if self.is_image else build_body(self.space, size)  # pixels share one
        self.policy_layer = nn.Linear(size, self.head.num_outputs)
        self.value_layer = nn.Linear(size, 1)
        for layer in self.modules():
            if hasattr(layer, "weight"):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.policy_layer.weight, 0.01)
        nn.init.orthogonal_(self.value_layer.weight, 1.0)
        moments = torch.tensor([[0.0], [1.0], [1e-4]], dtype=torch.float64)  # mean, variance, count so far
        self.register_buffer("obs_moments", moments.repeat(1, math.prod(self.space.shape)))
        self.register_buffer("return_moments", moments)
        self.device = torch.device("cuda" if c.cuda else "cpu")
        self.to(self.device)
        self.optimizer = torch.optim.Adam(self.parameters(), eps=1e-5, fused=True)
        self.failures = 0  # gradients in a row that were not finite
        self.layers = []  # of the policy in numpy: views of weight and bias
        if not self.is_image and not c.cuda:
            for layer in (self.body[0], self.body[2], self.policy_layer):
                weight = layer.weight.detach().numpy()
                bias = layer.bias.detach().numpy()
                self.layers.append((weight, bias))

    def observe(self, obs: ndarray) -> Tensor:
        """Inputs [rows, D], float32, or pixels [rows, channels, ...], uint8. Statistics stay as they are."""
        obs = obs.reshape(-1, *self.space.shape)
        if self.is_image:
            channel_axis = 1 + np.argmin(self.space.shape)
            obs = np.moveaxis(obs, channel_axis, 1)
            return torch.from_numpy(obs).to(self.device)
        obs = obs.reshape(len(obs), -1)
        if self.norm_obs:
            mean, var, _ = self.obs_moments.cpu().numpy()
            obs = (obs - mean) / np.sqrt(var + 1e-8)
            obs = obs.clip(-10, 10)
        elif self.space.dtype == np.uint8:
            obs = obs / 255
        obs = obs.astype(np.float32)
        return torch.from_numpy(obs).to(self.device)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Policy outputs [rows, K] and values [rows]."""
        if self.is_image:
            inputs = inputs / 255
        features = self.body(inputs)
        value_features = self.value_body(inputs) if self.value_body else features
        values = self.value_layer(value_features)[:, 0]
        return self.policy_layer(features), values

    def act(self, obs: ndarray, rng: Generator | None) -> ndarray:
        """Actions; a tanh network on the CPU runs in numpy, for a few rows in a third of torch's time."""
        inputs = self.observe(obs)
        if not self.layers:
            outputs, _ = self(inputs)
            return self.head.sample(outputs.detach().cpu().numpy(), rng)
        x = inputs.numpy()
        for weight, bias in self.layers[:-1]:
            x = np.tanh(np.dot(x, weight.T) + bias)
        weight, bias = self.layers[-1]
        return self.head.sample(np.dot(x, weight.T) + bias, rng)


# ---- PPO. Functions of tensors and arrays; those that ppo_llm.py has too have the same text ----------------


def compute_gae(
    rewards: ndarray,
    values: ndarray,
    next_values: ndarray,
    terminated: ndarray,
    done: ndarray,
    gamma: float,
    lam: float,
) -> tuple[ndarray, ndarray]:
    """GAE (arXiv:1506.02438): advantages and returns = advantages + values, [T, N].

    next_values is V of the state that followed: 0 after a failure (terminated), but not after a time limit.
    The sum ends with the episode (done) in both cases.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    decay = gamma * lam * (1 - done)
    advantages = np.empty_like(deltas)
    running = 0.0
    for t in reversed(range(len(deltas))):
        running = deltas[t] + decay[t] * running
        advantages[t] = running
    return advantages, advantages + values


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
    clip_c: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), elementwise.

    clip_c is the dual clip (arXiv:1912.09729): where the advantage is negative the loss is at most
    -advantage * clip_c. Returns the loss, the ratio, 1 where the clipped term was the larger one, and 1 where
    clip_c bounded it.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # exp must not overflow
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    is_bounded = torch.zeros_like(is_clipped)
    if clip_c is not None:
        bound = -advantages * clip_c
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
    return loss, ratio.detach(), is_clipped.float(), is_bounded.float()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error, elementwise, of values, or of values clipped near old_values if worse.

    Also returns where the clipped one was worse (as in OpenAI's baselines, ppo2).
    """
    loss = (values - returns).square()
    is_clipped = torch.zeros_like(values)
    if cliprange is not None:
        clipped = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
        is_clipped = (clipped > loss).float()
        loss = torch.maximum(loss, clipped)
    return 0.5 * loss, is_clipped


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The adaptive penalty of the PPO paper (arXiv:1707.06347, section 4)."""
    if kl > 1.5 * target:
        return kl_coef * 2
    if kl < target / 1.5:
        return kl_coef / 2
    return kl_coef


@dataclass
class Batch:
    """Rows of a rollout, on the agent's device."""

    inputs: Tensor  # [rows, D] or pixels
    actions: Tensor  # [rows, C] or, of a Gaussian, [rows, K]
    logprobs: Tensor  # [rows] of the policy that acted, as all below
    values: Tensor
    advantages: Tensor
    returns: Tensor


def ppo_loss(agent: Agent, batch: Batch, kl_coef: float, c: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a mini-batch, and what is logged of it, [rows]: the function to edit.

    All terms have one number per row (of torch's losses, reduction="none"). torch.autograd does the rest, and
    a tensor [rows] that is added to `logged` has its mean in training_metrics.csv.
    """
    outputs, values = agent(batch.inputs)
    logprobs, entropy = agent.head.evaluate(outputs, batch.actions)
    advantages = batch.advantages
    if c.norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    value_range = c.clip_coef if c.clip_vloss else None

    # The loss. Edit here: a term more, another weight, another loss; everything else stays as it is.
    policy_loss, ratio, clipped, bounded = clipped_policy_loss(
        logprobs, batch.logprobs, advantages, c.clip_coef, c.clip_coef, c.dual_clip
    )
    value_loss, value_clipped = clipped_value_loss(values, batch.values, batch.returns, value_range)
    log_ratio = logprobs - batch.logprobs
    kl = log_ratio.exp() - 1 - log_ratio  # k3: unbiased for KL(old, new), and so is its gradient
    loss = policy_loss - c.ent_coef * entropy + c.vf_coef * value_loss
    if kl_coef > 0:
        loss = loss + kl_coef * kl

    logged = {
        "policy/loss": policy_loss,
        "value/loss": value_loss,
        "policy/entropy": entropy,
        "policy/approx_kl": kl,
        "policy/clipfrac": clipped,
        "policy/clipfrac_lower": bounded,
        "policy/ratio": ratio,
        "value/clipfrac": value_clipped,
    }
    return loss.mean(), logged


# ---- Rollout and update ------------------------------------------------------------------------------------


@torch.no_grad()
def collect_rollout(agent: Agent, stream: Stream, step: int, c: Config) -> Batch:
    """Plays num_steps steps; gives the rows that are transitions.

    Raises UsageError if the environment gives a number that is not finite.
    """
    rng = default_rng([c.seed, ROLLOUT, step])
    steps = []
    for _ in range(c.num_steps):
        obs = stream.obs.copy()
        actions = agent.act(obs, rng)
        outcome = stream.step(agent.head.to_env(actions))
        steps.append([obs, actions, *outcome, stream.over, stream.discounted])
    arrays = [np.stack(column) for column in zip(*steps, strict=True)]  # [T, N, ...]
    obs, actions, following, rewards, terminated, valid, done, discounted = arrays
    del steps  # of pixels they take much memory
    check_numbers({"observation": obs, "next observation": following, "reward": rewards}, step)
    if c.norm_reward == "sign":
        rewards = np.sign(rewards)
    if c.norm_reward == "scale":
        update_moments(agent.return_moments, discounted[valid][:, None])
        deviation = math.sqrt(agent.return_moments[1].item() + 1e-8)
        rewards = (rewards / deviation).clip(-10, 10)

    inputs = agent.observe(obs)
    actions = torch.from_numpy(actions).flatten(0, 1).to(agent.device)
    outputs, values = agent(inputs)
    logprobs, _ = agent.head.evaluate(outputs, actions)
    _, next_values = agent(agent.observe(following))
    advantages, returns = compute_gae(
        rewards,
        values.cpu().numpy().reshape(valid.shape),
        next_values.cpu().numpy().reshape(valid.shape),
        terminated,
        done,
        c.gamma,
        c.gae_lambda,
    )
    if agent.norm_obs:
        update_moments(agent.obs_moments, obs[valid].reshape(valid.sum(), -1))  # for the next rollout
    advantages = torch.from_numpy(advantages).float().flatten().to(agent.device)
    returns = torch.from_numpy(returns).float().flatten().to(agent.device)
    rows = torch.from_numpy(np.flatnonzero(valid)).to(agent.device)  # from here on there are no others
    return Batch(*[x[rows] for x in (inputs, actions, logprobs, values, advantages, returns)])


def check_numbers(arrays: dict[str, ndarray], step: int) -> None:
    """Raises UsageError, naming environment and step, if a number of [T, N, ...] is not finite."""
    for name, x in arrays.items():
        bad = np.argwhere(~np.isfinite(x))
        if len(bad) > 0:
            t, i = bad[0][:2]
            place = f"iteration {step + 1}, step {t}"
            raise UsageError(f"environment {i}: its {name} is not finite, {place}")


def take_step(agent: Agent, loss: Tensor, parameters: list[nn.Parameter], c: Config) -> float:
    """One step of Adam along the clipped gradient of the loss. Returns the norm before clipping.

    A gradient that is not finite is skipped and said; three in a row raise UsageError.
    """
    agent.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, c.max_grad_norm).item()
    if math.isfinite(norm):
        agent.optimizer.step()
        agent.failures = 0
        return norm
    agent.failures += 1
    warn(f"a gradient is not finite (norm {norm}): this optimizer step is skipped")
    if agent.failures == 3:
        raise UsageError("three gradients in a row are not finite: lower learning_rate, look at the rewards")
    return norm


def update(agent: Agent, batch: Batch, step: int, kl_coef: float, c: Config) -> dict[str, float]:
    """update_epochs passes in num_minibatches mini-batches; fewer when target_kl is passed. Gives metrics."""
    rng = default_rng([c.seed, SHUFFLE, step])
    rows = len(batch.values)
    size = math.ceil(rows / c.num_minibatches)
    parameters = list(agent.parameters())
    norms = []
    logged = []
    for _ in range(c.update_epochs):
        order = torch.from_numpy(rng.permutation(rows)).to(agent.device)
        last_epoch = []
        columns = [x[order].split(size) for x in vars(batch).values()]
        for mini_batch in zip(*columns, strict=True):
            loss, terms = ppo_loss(agent, Batch(*mini_batch), kl_coef, c)
            norms.append(take_step(agent, loss, parameters, c))
            last_epoch.append(terms)
        logged += last_epoch
        last_kl = torch.cat([terms["policy/approx_kl"] for terms in last_epoch]).mean().item()
        if c.target_kl is not None and last_kl > c.target_kl:
            break
    metrics = {}
    for name in logged[0]:
        metrics[name] = torch.cat([terms[name] for terms in logged]).mean().item()
    metrics["policy/kl_last"] = last_kl
    first_gap = (logged[0]["policy/ratio"] - 1).abs().max()
    metrics["policy/ratio_first"] = 1 + first_gap.item()
    variance = batch.returns.var(correction=0).item()
    error = (batch.returns - batch.values).var(correction=0).item()
    metrics["value/explained_variance"] = 1 - error / variance if variance > 1e-12 else math.nan
    metrics["optim/grad_norm"] = norms[0]  # of the first mini-batch
    metrics["optim/epochs"] = len(logged) // len(last_epoch)
    metrics["optim/skipped_steps"] = sum(not math.isfinite(norm) for norm in norms)
    return metrics


# ---- Main --------------------------------------------------------------------------------------------------


def train(agent: Agent, stream: Stream, run: "Run", c: Config) -> None:
    """Iterations until total_timesteps: rollout, update, a row of training_metrics.csv, checkpoints."""
    state = run.state
    stream.restart(c.seed, RESET, state["step"])
    while state["global_step"] < c.total_timesteps:
        clock = time.perf_counter()
        left = 1 - state["global_step"] / c.total_timesteps
        lr = c.learning_rate * left if c.anneal_lr else c.learning_rate
        # A schedule of your own: agent.ent_coef = c.ent_coef * left, with a first value in Agent.__init__.
        agent.optimizer.param_groups[0]["lr"] = lr
        try:
            batch = collect_rollout(agent, stream, state["step"], c)
        except Exception:
            save_checkpoint(run, agent)  # the fault of the environment: what was learned before it is kept
            raise
        middle = time.perf_counter()
        metrics = update(agent, batch, state["step"], state["kl_coef"], c)
        end = time.perf_counter()

        state["step"] += 1
        state["global_step"] += len(batch.values)
        state["skipped"] += metrics["optim/skipped_steps"]
        state["recent"] = (state["recent"] + stream.ended)[-100:]
        mean_return, mean_length = np.mean(state["recent"] or [[math.nan, math.nan]], 0)
        row = {
            "step": state["step"],
            "global_step": state["global_step"],
            "rollout/episodes": len(stream.ended),
            "rollout/return_100": mean_return,
            "rollout/length_100": mean_length,
            **metrics,
            "policy/kl_coef": state["kl_coef"],
            "optim/lr": lr,
            "optim/skipped_steps": state["skipped"],  # of the whole run, in place of this update's
            "time/rollout": middle - clock,
            "time/update": end - middle,
            "time/steps_per_second": len(batch.values) / (end - clock),
        }
        stream.ended = []
        if c.kl_target is not None:
            state["kl_coef"] = adapt_kl_coef(state["kl_coef"], metrics["policy/kl_last"], c.kl_target)
        run.log(row)
        is_last = state["global_step"] >= c.total_timesteps or len(STOP) > 0
        if is_last or (c.save_every and state["step"] % c.save_every == 0):
            save_checkpoint(run, agent)
            stream.restart(c.seed, RESET, state["step"])
        if STOP:
            sys.exit(128 + STOP[0])


def main(c: Config) -> dict[str, float]:
    """A run: its folder, training, evaluation. Returns the evaluation.

    Raises UsageError for what the user can mend, and SystemExit(130 or 143) after Ctrl-C or SIGTERM.
    """
    check_config(c)
    torch.manual_seed(c.seed)
    torch.backends.cudnn.deterministic = True
    with closing(make_envs(c, c.num_envs)) as envs, closing(Run(c)) as run:
        agent = Agent(envs, c)
        torch.set_num_threads(os.cpu_count() if agent.is_image else 1)
        load_checkpoint(run, agent)
        run.write_summary("running")
        try:
            train(agent, Stream(envs, c.gamma), run, c)
            if c.eval_episodes:
                run.evaluation = evaluate(agent, c)
            run.write_summary("finished")
        except BaseException as error:
            status = "stopped" if isinstance(error, SystemExit) else "failed"
            with suppress(OSError):  # a full disk
                run.write_summary(status, repr(error))
            tqdm.write(f"{status} after step {run.state['global_step']}; continue with: {run.command}")
            if isinstance(error, OSError | SafetensorError):
                raise UsageError(f"{run.folder}: {error}") from error
            raise
        finally:
            draw_curves(run)
    for name, x in run.evaluation.items():
        print(f"{name:22} {x:10.4g}")
    return run.evaluation


# ---- The algorithm ends here; what follows is what every training script needs. Presets, checks, evaluation


def choose_preset(env_id: str) -> Config:
    """The settings for an environment. Raises UsageError if it cannot be made."""
    with closing(make_envs(Config(env_id=env_id), 1)) as envs:
        name = envs.spec.name  # Pendulum, of Pendulum-v1 and of module:Pendulum-v2
        if name not in PRESETS:
            name = "box" if isinstance(envs.single_action_space, Box) else "discrete"
            if is_image(envs.single_observation_space):
                name = "pixels"
    return Config(env_id=env_id, **PRESETS[name])


def check_config(c: Config) -> None:
    """Refuses what cannot work before anything is made. Raises UsageError."""
    smallest = {
        "num_envs": 1,
        "num_steps": 2,  # all rows of a single step can be resets
        "num_minibatches": 1,
        "update_epochs": 1,
        "hidden_size": 1,
        "dual_clip": 1,
        "eval_max_steps": 1,
    }
    for name, x in vars(c).items():
        low = smallest.get(name, 0)
        if isinstance(x, int | float) and not low <= x < math.inf:
            raise UsageError(f"{name} = {x} must be at least {low} and finite")
    if c.gamma > 1 or c.gae_lambda > 1:
        raise UsageError(f"gamma = {c.gamma} and gae_lambda = {c.gae_lambda} must be at most 1")
    rows = c.num_envs * c.num_steps
    if 0 < c.total_timesteps < rows:
        raise UsageError(f"total_timesteps = {c.total_timesteps} is less than one batch: use at least {rows}")
    if rows < c.num_minibatches:
        raise UsageError(f"{rows} rows do not fill num_minibatches = {c.num_minibatches}: use at most {rows}")
    if c.kl_target is not None and c.kl_coef == 0:
        raise UsageError("kl_target needs a kl_coef to start from, such as 0.1")
    if c.cuda and not torch.cuda.is_available():
        raise UsageError("cuda: torch sees no GPU here")


@torch.no_grad()
def evaluate(agent: Agent, c: Config) -> dict[str, float]:
    """Mean return with frozen statistics; every environment plays its share of the episodes."""
    count = min(c.eval_episodes, 20)
    left = np.diff(np.arange(count + 1) * c.eval_episodes // count)  # episodes that each has still to play
    rng = default_rng([c.seed, EVALUATION]) if agent.is_image else None
    returns = []
    with closing(make_envs(c, count, evaluation=True)) as envs:
        stream = Stream(envs, c.gamma)
        stream.restart(c.seed, EVALUATION)
        while left.any():
            if STOP:
                sys.exit(128 + STOP[0])
            stream.step(agent.head.to_env(agent.act(stream.obs, rng)))
            is_endless = (stream.lengths >= c.eval_max_steps) & ~stream.over
            is_counted = (stream.over | is_endless) & (left > 0)
            returns += stream.returns[is_counted].tolist()
            left[is_counted] -= 1
            left[is_endless] = 0
            if is_endless.any():
                warn_once(f"an evaluation episode did not end in {c.eval_max_steps} steps: it counts as is")
    error = np.std(returns) / math.sqrt(len(returns))
    return {"eval/score": np.mean(returns).item(), "eval/standard_error": error.item()}


# ---- The folder of a run: lock, log, summary, checkpoints --------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Whoever reads path finds the old text or this one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def keep_old(path: Path) -> None:
    """Renames a file or folder to NAME.old; what has that name already stays."""
    if path.exists():
        old = path.with_name(f"{path.name}.old")
        if old.exists():
            old = path.with_name(f"{path.name}.{time.time_ns()}.old")
        path.replace(old)
        warn(f"{path} is kept as {old.name}")


def lock_folder(folder: Path):
    """Makes the folder of a run and keeps others out of it. Returns the open lock. Raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / ".lock").exists():
        raise UsageError(f"{folder} is not empty and not the folder of a run: choose another output_dir")
    lock = open(folder / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise UsageError(f"{folder} is in use by process {lock.read()}") from error
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    return lock


class Run:
    """The folder of a run with its log and summary, this process's until close(); and the console."""

    def __init__(self, c: Config):
        name = f"ppo_classic-{c.env_id.replace('/', '-')}-seed{c.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.config = c
        self.clock = time.perf_counter()
        self.state = {"step": 0, "global_step": 0, "kl_coef": c.kl_coef, "skipped": 0, "tracker_id": None}
        self.state["recent"] = []  # [return, length] of the last 100 episodes
        self.state["history"] = []  # of settings that were changed between two starts
        self.evaluation = {}
        self.send = None  # takes a row and global_step to the tracker
        self.folder = Path(c.output_dir or f"output/{name}")
        self.lock = lock_folder(self.folder)
        self.command = shlex.join(["python", *sys.argv])
        if not c.output_dir:
            self.command += f" --output_dir {self.folder}"
            link = Path("output/ppo_metrics")
            if link.is_symlink() or not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(name)
        self.bar = None  # on a terminal, from the first step on
        self.lines = 0
        self.next_line = 0  # the step from which on one is due

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.lock.close()

    def log(self, row: dict[str, float]) -> None:
        """A row for training_metrics.csv, console and tracker. A tracker that fails is said and left out."""
        log = self.folder / "training_metrics.csv"
        header = ",".join(row)
        if self.lines == 0 and log.exists():
            if log.read_text().split("\n")[0] != header:
                keep_old(log)  # of a run with other metrics, before the file was edited
        with open(log, "a") as file:
            if file.tell() == 0:
                print(header, file=file)
            print(*row.values(), sep=",", file=file)
        self.show(row)
        try:
            if self.send is None:
                self.send = start_tracker(self)
            self.send(row, row["global_step"])
        except Exception as error:
            warn(f"track {self.config.track}: {error!r}; the run goes on without (is it installed?)")
            self.send = lambda row, step: None

    def show(self, row: dict[str, float]) -> None:
        """A line of the console's table for every fiftieth of the run, its header every 20 lines."""
        steps = row["global_step"]
        total = self.config.total_timesteps
        if self.bar is None:
            hidden = None  # unless stdout is a terminal
            if os.environ.get("TERM") == "dumb":
                hidden = True
            self.bar = tqdm(initial=steps, total=total, unit=" steps", file=sys.stdout, disable=hidden)
        self.bar.update(min(steps, total) - self.bar.n)
        if steps < min(total, self.next_line):
            return
        self.next_line = steps + total / 50
        cells = {"step": str(steps), "seconds": f"{time.perf_counter() - self.clock:.0f}"}
        for title, name in COLUMNS.items():
            cells[title] = f"{row[name]:.3g}"
        titles = list(cells)[: shutil.get_terminal_size((100, 24)).columns // 10]
        if self.lines % 20 == 0:
            tqdm.write("".join(f"{title:>10}" for title in titles))
        tqdm.write("".join(f"{cells[title]:>10}" for title in titles))
        self.lines += 1

    def write_summary(self, status: str, reason: str = "") -> None:
        """summary.json: how the run stands, and what it was made with."""
        summary = {
            "status": status,
            "reason": reason,
            "global_step": self.state["global_step"],
            "last_evaluation": self.evaluation,
            "config": vars(self.config),
            "history": self.state["history"],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gym.__version__,
            "commit": git_commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "seconds": round(time.perf_counter() - self.clock, 3),
            "resume_command": self.command,
        }
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=2))


def git_commit() -> str | None:
    """The commit of the repository that this file lies in."""
    folder = shlex.quote(str(Path(__file__).resolve().parent))
    status, text = subprocess.getstatusoutput(f"git -C {folder} rev-parse HEAD")
    return text if status == 0 else None


def start_tracker(run: Run) -> Callable[[dict, int], object]:
    """A function that takes a row and global_step."""
    if run.config.track == "wandb":
        import wandb

        tracked = wandb.init(
            project="ppo_classic", id=run.state["tracker_id"], resume="allow", config=vars(run.config)
        )
        run.state["tracker_id"] = tracked.id
        return tracked.log
    if run.config.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.folder / "tensorboard")

        def send(row: dict, step: int) -> None:
            for name, x in row.items():
                writer.add_scalar(name, x, step)

        return send
    return lambda row, step: None


def cut_log(path: Path, step: int) -> None:
    """Leaves the rows up to a step in training_metrics.csv; what is taken out of it is kept as .old."""
    lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
    steps = [line.split(",")[0] for line in lines]
    if steps and steps[-1] == str(step):
        return
    keep_old(path)
    if str(step) in steps:
        path.write_text("".join(lines[: steps.index(str(step)) + 1]))


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, the oldest first."""
    found = [path for path in folder.glob("checkpoints/step_*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_whole(folder: Path) -> bool:
    """Whether the files of a checkpoint have the hashes that were written beside them."""
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        return all(file_hash(folder / name) == found for name, found in hashes.items())
    except (OSError, ValueError):
        return False


def save_checkpoint(run: Run, agent: Agent) -> None:
    """checkpoints/step_N: agent with optimizer, state, and hashes. Whole or absent: renamed when written."""
    folder = run.folder / "checkpoints" / f"step_{run.state['step']}"
    temporary = folder.with_name("temporary")
    temporary.mkdir(parents=True, exist_ok=True)
    tensors = agent.state_dict()
    for i, parameter in enumerate(agent.parameters()):
        for name, x in agent.optimizer.state[parameter].items():
            tensors[f"adam.{i}.{name}"] = x
    save_file(tensors, temporary / "agent.safetensors")
    saved = {"format": 2, "config": vars(run.config), "state": run.state}
    (temporary / "state.json").write_text(json.dumps(saved, indent=2))
    hashes = {name: file_hash(temporary / name) for name in ("agent.safetensors", "state.json")}
    (temporary / "hashes.json").write_text(json.dumps(hashes, indent=2))
    if folder.exists():  # this step was saved before an error
        shutil.rmtree(temporary)
    else:
        temporary.replace(folder)
    for old in checkpoints(run.folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are renamed."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        warn(f"{path} is damaged: an older checkpoint is used, or none")
        keep_old(path)
    return None


def load_checkpoint(run: Run, agent: Agent) -> None:
    """Goes on from the newest whole checkpoint; without one begins anew and keeps what was there as .old."""
    path = find_checkpoint(run.folder)
    if path is None:
        keep_old(run.folder / "summary.json")
    else:
        restore(run, agent, path)
        steps = run.state["global_step"]
        print(f"resumed from {path.name}, {steps} of {run.config.total_timesteps} environment steps: {path}")
    cut_log(run.folder / "training_metrics.csv", run.state["step"])
    print(f"run: {run.folder}, to continue it: {run.command}")


def restore(run: Run, agent: Agent, path: Path) -> None:
    """Takes agent, optimizer and state from a checkpoint. Raises UsageError if it is of something else."""
    saved = json.loads((path / "state.json").read_text())
    now = vars(run.config)
    changes = []
    for name, x in now.items():
        before = saved["config"].get(name)
        if name not in ("output_dir", "eval_episodes", "eval_max_steps", "track") and before != x:
            changes.append(f"{name} {before} -> {x}")
    tensors = load_file(path / "agent.safetensors", str(agent.device))
    parameters = list(agent.parameters())
    try:
        if saved["format"] != 2 or saved["config"]["env_id"] != now["env_id"]:
            raise RuntimeError("it is of another environment, or version of this file")
        for name in [name for name in tensors if name.startswith("adam.")]:
            _, i, key = name.split(".")
            agent.optimizer.state[parameters[int(i)]][key] = tensors.pop(name)
        agent.load_state_dict(tensors)
    except (RuntimeError, IndexError) as error:
        raise UsageError(f"{path} does not fit ({', '.join(changes)}): {error}".split("\n")[0]) from error
    run.state |= saved["state"]
    if changes:
        warn(f"settings have changed since {path.name}: {', '.join(changes)}")
        run.state["history"].append({"step": run.state["step"], "changes": changes})


# ---- Console, curves, help, command line -------------------------------------------------------------------


def draw_curves(run: Run) -> None:
    """training_curves.png; a fault in it does not end the run."""
    try:
        draw_panels(run)
    except Exception as error:
        warn(f"training_curves.png could not be drawn: {error!r}")


def draw_panels(run: Run) -> None:
    """3 x 3 panels, from training_metrics.csv."""
    import matplotlib.figure

    path = run.folder / "training_metrics.csv"
    if not path.exists():
        return
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="", invalid_raise=False, ndmin=1)
    figure = matplotlib.figure.Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(f"ppo_classic.py on {run.config.env_id}, seed {run.config.seed}")
    axes = figure.subplots(3, 3).flatten()
    for axis, (name, unit) in zip(axes, CURVES.items(), strict=True):
        axis.plot(table["global_step"], table[name], linewidth=1)
        axis.set(title=name, xlabel="environment steps", ylabel=unit)
    if run.evaluation:
        score = run.evaluation["eval/score"]
        error = run.evaluation["eval/standard_error"]
        axes[0].errorbar(table["global_step"][-1:], score, error, marker="o", capsize=3)
    figure.savefig(run.folder / "training_curves.png", dpi=80)


def show_help(defaults: Config) -> None:
    """The options under the headings of Config, which are comments there, with an environment's defaults."""
    print(__doc__.split("\n\n    while")[0])
    for line in inspect.getsource(Config).splitlines()[2:]:
        declaration, _, sentence = line.strip().partition("# ")
        if not declaration:
            print(f"\n{sentence}")
            continue
        name, kind = declaration.split(" = ")[0].split(": ")
        if kind == "bool":
            kind = f"(--no_{name})"
        print(f"  --{name} {kind} (default: {getattr(defaults, name)})")
        print(textwrap.fill(sentence, 100, initial_indent="      ", subsequent_indent="      "))


class Console:
    """stdout or stderr. Nobody has to read it to the end: a Ctrl-C ends `| tee` too."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # where it cannot show a letter

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()  # here, where it may fail
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def ask_to_stop(number: int, frame) -> None:
    """Ctrl-C and SIGTERM: the first ends the run after its step, the same once more at once."""
    if number in STOP:  # a launcher sends SIGTERM after a Ctrl-C
        os._exit(128 + number)
    STOP.append(number)
    with suppress(OSError):
        os.write(2, b"\nstopping when this step is done and saved; the same signal once more ends at once\n")


def start() -> int:
    """The command line. Returns the exit code: 0, or 2 with one sentence on what the user can mend."""
    sys.stdout = Console(sys.stdout)
    sys.stderr = Console(sys.stderr)
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    sys.path.append(os.getcwd())  # where the module of an own environment may lie
    arguments = [x for x in sys.argv[1:] if x not in ("-h", "--help")]
    try:
        env_id = tyro.cli(Config, args=arguments, use_underscores=True).env_id  # the defaults follow from it
        defaults = choose_preset(env_id)
        if arguments != sys.argv[1:]:
            show_help(defaults)
        else:
            main(tyro.cli(Config, args=arguments, default=defaults, use_underscores=True))
    except (UsageError, OSError, SafetensorError) as error:  # a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(start())
