"""Proximal Policy Optimization for Gymnasium environments: the whole algorithm in one file, fast on one CPU core.

    python ppo_classic.py                                      # CartPole-v1, in less than a minute
    python ppo_classic.py --env_id HalfCheetah-v5              # MuJoCo
    python ppo_classic.py --env_id ALE/Breakout-v5 --cuda      # Atari, with the standard preprocessing
    python ppo_classic.py --env_id Pendulum-v1 --dry_run       # prints the settings chosen for an environment

    while global_step < total_timesteps:
        rollout = collect_rollout(agent, stream)               num_steps steps of num_envs environments
        advantages, returns = compute_gae(rewards, values)     time limits bootstrap, failures do not
        for epoch, mini_batch in rollout:
            outputs = forward(inputs)                          policy outputs and a value per row
            loss = (clipped_policy_loss(logprobs, old_logprobs, advantages) - ent_coef * entropy
                    + vf_coef * clipped_value_loss(values, old_values, returns))
            step(ppo_gradient(outputs))                        the gradient of that loss, and Adam

Shapes: T steps of N environments, [T, N]; M mini-batches of S rows; K policy outputs: logits, or means of a Gaussian.
Index t of inputs, values and log-probs is the state before action t. Arrays are numpy's, weights and pixels torch's.

Where this differs from the papers and from other code, on purpose:
1. `valid` is False on rows that are no transitions (the reset step of Gymnasium's NEXT_STEP mode): they enter no loss,
   no statistic, no counter. A time limit bootstraps from the final observation, in every autoreset mode.
2. Observation and return statistics belong to the agent: float64, shared by the environments, saved, frozen in
   evaluation, and constant during a rollout, so that old_logprobs are those of one policy.
3. The gradient of the loss at the network's outputs is written out (`ppo_gradient`), and tanh networks run forward and
   backward in numpy: for 64 rows the cost is the number of calls. Tests hold both to autograd.
4. Noise and shuffles are functions of (seed, iteration), and all environments are reset, with such a seed, after every
   periodic checkpoint (their episodes are cut and bootstrapped): a resumed run equals a straight one, bitwise.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy reads it once; threads only cost time on small matrices

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from numpy import ndarray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROLLOUT, SHUFFLE, RESET, EVALUATION = range(4)  # streams of random numbers, each a function of (seed, iteration)
HINTS = {"mujoco": "'gymnasium[mujoco]'", "imageio": "'gymnasium[mujoco]'", "box2d": "swig 'gymnasium[box2d]'",
         "ale": "ale-py opencv-python-headless", "envpool": "envpool", "moviepy": "moviepy", "pygame": "pygame"}


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


# ---- Config. The defaults are CleanRL's for classic control; PRESETS change them by environment ----------------------


@dataclass
class Config:
    # Run
    env_id: str = "CartPole-v1"  # a Gymnasium id; the defaults of the other options follow from it
    seed: int = 1  # seeds the weights, the noise, the shuffles and the environments
    output_dir: str | None = None  # the run's folder; None: output/ppo_classic-ENV-seedN-TIME
    resume: str = "auto"  # auto (continue what is in output_dir), never, must, or the path of a checkpoint
    cuda: bool = False  # use the GPU if there is one; small networks are faster on the CPU
    torch_deterministic: bool = True  # only deterministic kernels
    dry_run: bool = False  # print the settings and exit
    # Environment
    total_timesteps: int = 500_000  # steps of all environments together; rows that are no transitions do not count
    num_envs: int = 4  # N, environments
    num_steps: int = 128  # T, steps of each environment per rollout
    vectorization: Literal["auto", "sync", "async", "native", "envpool"] = "auto"  # auto: native where there is one
    norm_obs: bool = False  # normalise observations by running statistics, clipped to +-10
    norm_reward: Literal["none", "scale", "sign"] = "none"  # scale: by the deviation of the discounted return
    # Network
    hidden_size: int = 64  # units of each of the two tanh layers
    shared_network: bool = False  # policy and value share all layers but the last (always so with pixels)
    # Loss
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of GAE
    norm_adv: bool = True  # normalise the advantages of each mini-batch
    clip_coef: float = 0.2  # the ratio new/old is clipped to 1 +- this
    anneal_clip: bool = False  # clip_coef falls linearly to 0
    dual_clip: float | None = None  # bound on the ratio where the advantage is negative (arXiv:1912.09729)
    clip_vloss: bool = True  # values move at most clip_coef from the old ones
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    kl_coef: float = 0.0  # weight of a penalty KL(old, new); 0: none
    kl_target: float | None = None  # double or halve kl_coef to hold this KL (the PPO paper, section 4)
    bootstrap_truncated: bool = True  # off: a time limit counts as a failure (biased; for comparison)
    mask_dummy_rows: bool = True  # off: rows that are no transitions are trained on (biased; for comparison)
    # Optimization
    learning_rate: float = 2.5e-4  # of Adam
    anneal_lr: bool = True  # learning_rate falls linearly to 0
    num_minibatches: int = 4  # M, optimizer steps per epoch
    update_epochs: int = 4  # passes over each rollout
    max_grad_norm: float = 0.5  # gradient norm is clipped to this
    target_kl: float | None = None  # end the update after an epoch whose mean approx_kl passes this
    recompute_advantages: bool = False  # before every epoch, with the values of the moment
    # Evaluation, logs, checkpoints
    eval_episodes: int = 100  # at the end: frozen statistics, the likeliest action (pixels: sampled); 0: none
    eval_only: bool = False  # evaluate the checkpoint (of output_dir or resume) and exit
    capture_video: bool = False  # record an episode after the evaluation (pip install moviepy)
    save_every: int = 100  # iterations between checkpoints, of which two are kept; 0: only the last one
    track: Literal["none", "wandb", "tensorboard"] = "none"  # also send the metrics there (pip install it first)
    wandb_project_name: str = "ppo_classic"  # the project on Weights & Biases


MUJOCO = {"total_timesteps": 1_000_000, "num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10,
          "learning_rate": 3e-4, "ent_coef": 0.0, "norm_obs": True, "norm_reward": "scale"}
WIDE = {"total_timesteps": 1_000_000, "num_envs": 16, "norm_obs": True, "norm_reward": "scale", "learning_rate": 1e-3}
PRESETS = {  # by the name of the environment, else by the kind of its spaces
    "discrete": {}, "box": MUJOCO, "Swimmer": MUJOCO | {"gamma": 0.9999, "gae_lambda": 0.98},
    "pixels": {"total_timesteps": 10_000_000, "num_envs": 8, "clip_coef": 0.1, "norm_reward": "sign",
               "shared_network": True, "eval_episodes": 10},
    "Acrobot": WIDE | {"num_steps": 256, "num_minibatches": 16, "ent_coef": 0.0},
    "MountainCar": WIDE | {"num_minibatches": 8, "gae_lambda": 0.98, "ent_coef": 0.0},
    "LunarLander": WIDE | {"num_steps": 256, "num_minibatches": 32, "gamma": 0.999, "gae_lambda": 0.98},
    "Pendulum": MUJOCO | {"total_timesteps": 500_000, "num_envs": 4, "num_steps": 1024, "gamma": 0.9,
                          "learning_rate": 1e-3, "norm_obs": False},
}


def choose_preset(env_id: str, vectorization: str = "auto") -> tuple[str, Config]:
    """Name of the preset for an environment, and the settings. Raises UsageError if the environment cannot be made."""
    c, name = Config(env_id=env_id, vectorization=vectorization), env_id.split("/")[-1].split("-v")[0]
    if name not in PRESETS:
        with closing(make_envs(c, 1)) as envs:
            name = "box" if isinstance(envs.single_action_space, Box) else "discrete"
            name = "pixels" if is_image(envs.single_observation_space) else name
    return name, dataclasses.replace(c, **PRESETS[name])


def check_config(c: Config) -> None:
    """Refuses what cannot work before anything is made. Raises UsageError."""
    positive = "num_envs num_minibatches update_epochs hidden_size max_grad_norm kl_target target_kl"
    not_negative = "learning_rate clip_coef ent_coef vf_coef kl_coef eval_episodes save_every seed"
    ranges = {positive: (1e-12, 1e12), not_negative: (0, 1e12), "gamma gae_lambda": (0, 1), "dual_clip": (1, 1e12),
              "num_steps": (2, 1e12)}  # all rows of a single step can be resets
    for name, low, high in ((name, *limits) for names, limits in ranges.items() for name in names.split()):
        if getattr(c, name) is not None and not low <= getattr(c, name) <= high:
            raise UsageError(f"{name} = {getattr(c, name)} must lie between {low} and {high}")
    batch = c.num_envs * c.num_steps
    if c.total_timesteps < batch:
        raise UsageError(f"total_timesteps = {c.total_timesteps} is less than one batch of {batch} rows")
    if batch < c.num_minibatches:
        raise UsageError(f"num_envs * num_steps = {batch} rows do not fill num_minibatches = {c.num_minibatches}")
    if c.kl_target is not None and c.kl_coef == 0:
        raise UsageError("kl_target needs a kl_coef to start from")


# ---- Environments ---------------------------------------------------------------------------------------------------


def is_image(space: gym.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) == 3 and space.dtype == np.uint8


def make_envs(c: Config, num_envs: int, evaluation: bool = False, video_dir: Path | None = None) -> VectorEnv:
    """num_envs copies of env_id, native where there is a native one. Raises UsageError, with what to install."""
    mode = {"auto": "sync", "native": "vector_entry_point"}.get(c.vectorization, c.vectorization)
    atari, kwargs, wrappers = c.env_id.startswith("ALE/"), {}, [lambda env: (
        env if isinstance(env.observation_space, Box) else gym.wrappers.FlattenObservation(env))]
    try:
        if mode == "envpool":
            import envpool

            return envpool.make(c.env_id, env_type="gymnasium", num_envs=num_envs, seed=c.seed + 1000 * evaluation)
        if atari:  # the protocol of the published tables: no sticky actions; in training the loss of a life is an end
            import ale_py

            gym.register_envs(ale_py)
            kwargs = {"repeat_action_probability": 0.0}
        native = gym.spec(c.env_id).vector_entry_point is not None and c.vectorization == "auto" and video_dir is None
        if native or mode == "vector_entry_point":
            kwargs |= {"reward_clipping": False, "episodic_life": not evaluation} if atari else {}
            return gym.make_vec(c.env_id, num_envs, "vector_entry_point", **kwargs)
        if atari:
            kwargs["frameskip"] = 1
            wrappers += [gym.wrappers.AtariPreprocessing, lambda env: gym.wrappers.FrameStackObservation(env, 4)]
        if video_dir is not None:
            kwargs["render_mode"] = "rgb_array"
            wrappers.append(lambda env: gym.wrappers.RecordVideo(env, str(video_dir), lambda episode: True))
        return gym.make_vec(c.env_id, num_envs, mode, {"copy": False}, wrappers, **kwargs)  # we copy what we keep
    except Exception as error:  # whatever is wrong with it, the user can only install or choose another
        spec, sentence = gym.registry.get(c.env_id), (str(error).splitlines() or [repr(error)])[0]
        source = f"{c.env_id} {spec.entry_point if spec else ''} {mode} {sentence}".lower()
        hint = next((f"; pip install {HINTS[word]}" for word in HINTS if word in source), "")
        raise UsageError(f"env_id {c.env_id}: {sentence}{hint}") from error


class Stream:
    """A vector environment in any autoreset mode; `obs` [N, ...] is what the next actions answer."""

    def __init__(self, envs: VectorEnv, env_id: str):
        self.envs, self.env_id, self.ended = envs, env_id, []  # ended: [return, length] of each episode
        try:
            self.mode = AutoresetMode(envs.metadata.get("autoreset_mode"))
        except ValueError as error:
            raise UsageError(f"{env_id}: its metadata name no autoreset_mode of Gymnasium: {error}") from error

    def call(self, function: Callable, *args, **kwargs) -> tuple:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise UsageError(f"environment {self.env_id} raised {type(error).__name__}: {error}") from error

    def restart(self, *seed: int) -> None:
        """New episodes everywhere, a function of the numbers given."""
        self.obs, _ = self.call(self.envs.reset, seed=int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1))
        self.resetting = np.zeros(self.envs.num_envs, bool)
        self.returns, self.lengths, self.discounted = np.zeros((3, self.envs.num_envs))  # of the running episodes

    def step(self, actions: ndarray) -> tuple[ndarray, ndarray, ndarray, ndarray, dict]:
        """[N] arrays reward, terminated, done and valid (False where this was a reset and no transition).

        Also {i: final observation} of the truncated episodes whose last state `obs` does not show.
        """
        obs, reward, terminated, truncated, infos = self.call(self.envs.step, actions)
        valid, final = ~self.resetting, {}
        reward, done = reward * valid, (terminated | truncated) & valid
        self.returns += reward
        self.lengths += valid
        self.resetting = done if self.mode == AutoresetMode.NEXT_STEP else np.zeros_like(done)
        if done.any():
            self.ended += np.stack([self.returns, self.lengths], 1)[done].tolist()
            self.returns[done] = self.lengths[done] = 0
            if self.mode != AutoresetMode.NEXT_STEP:
                last = infos["final_obs"] if self.mode == AutoresetMode.SAME_STEP else obs
                final = {i: np.array(last[i]) for i in np.flatnonzero(truncated & ~terminated)}
            if self.mode == AutoresetMode.DISABLED:
                obs, _ = self.call(self.envs.reset, options={"reset_mask": done})
        self.obs = obs
        return reward, terminated & valid, done, valid, final


# ---- Agent ----------------------------------------------------------------------------------------------------------


class Categorical:
    """Discrete and MultiDiscrete actions: independent components, each with its block of logits. Actions [rows, C]."""

    noise = "gumbel"  # how numpy's Generator names what act() adds

    def __init__(self, space: Discrete | MultiDiscrete):
        sizes = [int(n) for n in np.ravel(space.n if isinstance(space, Discrete) else space.nvec)]
        self.space, self.start, self.num_outputs = space, np.ravel(space.start), sum(sizes)
        self.blocks = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]

    def act(self, logits: ndarray, noise: ndarray | float) -> ndarray:
        """Samples by the Gumbel-max rule; with noise 0, the likeliest actions."""
        noisy = logits + noise
        return np.concatenate([noisy[:, block].argmax(1, keepdims=True) for block in self.blocks], 1)

    def to_env(self, actions: ndarray) -> ndarray:
        return (actions + self.start).reshape(len(actions), *self.space.shape)

    def evaluate(self, logits: ndarray, actions: ndarray) -> tuple[ndarray, ndarray, list]:
        """Log-probs [rows], entropies [rows], and what gradient() needs."""
        saved = []
        for i, block in enumerate(self.blocks):
            x = logits[:, block] - logits[:, block].max(1, keepdims=True)
            logp = x - np.log(np.exp(x).sum(1, keepdims=True))
            chosen = actions[:, i : i + 1] == np.arange(block.stop - block.start)
            p = np.exp(logp)
            saved.append((logp, p, chosen, -(p * logp).sum(1, keepdims=True)))
        return sum((logp * chosen).sum(1) for logp, _, chosen, _ in saved), sum(x[3] for x in saved)[:, 0], saved

    def gradient(self, saved: list, d_logprobs: ndarray, d_entropy: ndarray) -> tuple[ndarray, None]:
        """[rows, K], by d log p(a) = onehot(a) - p and d entropy = -p (log p + entropy)."""
        g, h = d_logprobs[:, None], d_entropy[:, None]
        gradients = [g * chosen - p * (g + h * (logp + entropy)) for logp, p, chosen, entropy in saved]
        return np.concatenate(gradients, 1), None


class Gaussian:
    """Box actions: independent normals. The environment gets them clipped to its bounds; stored are the unclipped."""

    noise = "standard_normal"

    def __init__(self, space: Box):
        self.space, self.num_outputs = space, math.prod(space.shape)
        self.low, self.high = space.low.ravel(), space.high.ravel()
        self.parameter = nn.Parameter(torch.zeros(self.num_outputs))  # log_std, the same in all states

    @property
    def log_std(self) -> ndarray:
        return self.parameter.detach().cpu().numpy()  # [K], on the CPU a view

    def act(self, mean: ndarray, noise: ndarray | float) -> ndarray:
        return mean + np.exp(self.log_std) * noise

    def to_env(self, actions: ndarray) -> ndarray:
        clipped = np.minimum(np.maximum(actions, self.low), self.high)  # np.clip, without its overhead
        return clipped.reshape(len(actions), *self.space.shape).astype(self.space.dtype, copy=False)

    def evaluate(self, mean: ndarray, actions: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Log-probs [rows], entropies [rows], and what gradient() needs."""
        z = (actions - mean) * np.exp(-self.log_std)
        constant = np.float32(self.log_std.sum() + 0.5 * self.num_outputs * math.log(2 * math.pi))
        return -0.5 * (z * z).sum(1) - constant, np.full(len(z), constant + np.float32(0.5 * self.num_outputs)), z

    def gradient(self, z: ndarray, d_logprobs: ndarray, d_entropy: ndarray) -> tuple[ndarray, ndarray]:
        """[rows, K] and that of log_std [K], by d log p / d mean = z / std, d log p / d log_std = z^2 - 1."""
        weighted = z * d_logprobs[:, None]
        return weighted * np.exp(-self.log_std), (weighted * z).sum(0) - d_logprobs.sum() + d_entropy.sum()


def build_network(space: Box, blocks: list[tuple[int, float]], c: Config) -> nn.Sequential:
    """Two tanh layers, or the CNN of Mnih et al. (2015); orthogonal weights. blocks: size and gain of the outputs."""
    sizes, gains = zip(*blocks, strict=True)
    if is_image(space):
        depth, *side = sorted(space.shape)
        body = [nn.Conv2d(depth, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3),
                nn.ReLU(), nn.Flatten(), nn.LazyLinear(512), nn.ReLU(), nn.Linear(512, sum(sizes))]
        nn.Sequential(*body)(torch.zeros(1, depth, *side))  # gives the lazy layer its size
    else:
        h = c.hidden_size
        body = [nn.Linear(math.prod(space.shape), h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, sum(sizes))]
    for layer in (layer for layer in body if hasattr(layer, "weight")):
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
    for weight, gain in zip(body[-1].weight.data.split(sizes), gains, strict=True):
        nn.init.orthogonal_(weight, gain)
    return nn.Sequential(*body)


def mlp_forward(layers: list[tuple], x: ndarray) -> list[ndarray]:
    """What enters each linear layer (weight, bias, ...), with tanh between them, and last the output."""
    activations = [x]
    for weight, bias, *_ in layers:
        x = np.dot(x, weight.T)  # for a few rows half the time of @
        x += bias
        activations.append(x if weight is layers[-1][0] else np.tanh(x, out=x))
    return activations


def mlp_backward(layers: list[tuple], activations: list[ndarray], d_output: ndarray) -> None:
    """Writes the gradients of the layers (weight, bias, d_weight, d_bias), given that of the output [rows, K]."""
    for (weight, _, d_weight, d_bias), x in zip(reversed(layers), reversed(activations[:-1]), strict=True):
        np.dot(d_output.T, x, out=d_weight)
        d_output.sum(0, out=d_bias)
        if weight is not layers[0][0]:
            d_output = np.dot(d_output, weight) * (1 - x * x)  # x is a tanh: its derivative, from its value


class Agent:
    """Networks, action distribution, running statistics, Adam. All weights and gradients are views of flat vectors."""

    def __init__(self, envs: VectorEnv, c: Config):
        space, actions = envs.single_observation_space, envs.single_action_space
        for what, found, known in (("observation", space, Box), ("action", actions, (Box, Discrete, MultiDiscrete))):
            if not isinstance(found, known):
                raise UsageError(f"{c.env_id}: the {what} space {found} is not supported")
        self.head = Gaussian(actions) if isinstance(actions, Box) else Categorical(actions)
        self.image, self.norm_obs = is_image(space), c.norm_obs and not is_image(space)
        self.channels = 1 + int(np.argmin(space.shape)) if self.image else 0  # axis of [N, ...]
        policy, value = (self.head.num_outputs, 0.01), (1, 1.0)  # sizes of the outputs, and gains of their weights
        groups = [[policy, value]] if c.shared_network or self.image else [[policy], [value]]
        self.networks = nn.ModuleList(build_network(space, group, c) for group in groups)
        if isinstance(actions, Box):
            self.networks.log_std = self.head.parameter
        self.device = torch.device("cuda" if c.cuda and torch.cuda.is_available() else "cpu")
        parameters = list(self.networks.to(self.device).parameters())
        self.weights, sizes = torch.cat([p.data.flatten() for p in parameters]), [p.numel() for p in parameters]
        self.weights.grad = torch.zeros_like(self.weights)
        for p, w, g in zip(parameters, self.weights.split(sizes), self.weights.grad.split(sizes), strict=True):
            p.data, p.grad = w.view_as(p), g.view_as(p)
        self.moments = torch.zeros(2, len(self.weights), device=self.device)  # of Adam
        self.max_grad_norm, self.updates, self.skipped, self.failures = c.max_grad_norm, 0, 0, 0
        self.statistics = {"obs": RunningMeanStd(shape=space.shape), "returns": RunningMeanStd(shape=())}
        self.layers = []  # of tanh networks on the CPU, in numpy: views (weight, bias, d_weight, d_bias)
        if not self.image and self.device.type == "cpu":
            self.layers = [[(x.weight.data.numpy(), x.bias.data.numpy(), x.weight.grad.numpy(), x.bias.grad.numpy())
                            for x in network[::2]] for network in self.networks]

    def observer(self) -> Callable[[ndarray], ndarray]:
        """A function from observations [N, ...] to inputs: [N, D] float32, or pixels [N, channels, ...], uint8.

        It keeps the statistics of this moment, so that a rollout is of one policy.
        """
        if self.image:
            return lambda obs: np.moveaxis(obs, self.channels, 1)
        if not self.norm_obs:
            return lambda obs: obs.reshape(len(obs), -1).astype(np.float32, copy=False)
        mean, scale = self.statistics["obs"].mean.copy(), 1 / np.sqrt(self.statistics["obs"].var + 1e-8)
        return lambda obs: np.minimum(np.maximum((obs - mean) * scale, -10), 10).reshape(len(obs), -1).astype("f4")

    def forward(self, inputs: ndarray) -> ndarray:
        """Outputs [rows, K + 1], the value last; keeps what step() needs."""
        if self.layers:
            self.kept = [mlp_forward(layers, inputs) for layers in self.layers]
            return np.concatenate([x[-1] for x in self.kept], 1)
        inputs = torch.from_numpy(inputs).to(self.device).float() / (255 if self.image else 1)
        self.kept = torch.cat([network(inputs) for network in self.networks], 1)
        return self.kept.detach().cpu().numpy()

    @torch.no_grad()
    def predict(self, inputs: ndarray) -> ndarray:
        """Outputs [rows, K + 1] without a gradient, 1024 rows at a time."""
        return np.concatenate([self.forward(inputs[i : i + 1024]) for i in range(0, len(inputs), 1024)])

    def policy(self, inputs: ndarray) -> ndarray:
        """Policy outputs [N, K]; a separate value network is not run."""
        outputs = mlp_forward(self.layers[0], inputs)[-1] if self.layers else self.predict(inputs)
        return outputs[:, : self.head.num_outputs]

    def step(self, d_outputs: ndarray, d_log_std: ndarray | None, lr: float) -> float:
        """One Adam step, given the gradient [rows, K + 1] at the outputs of the last forward(). Returns its norm.

        It is skipped and counted if the gradient is not finite; three in a row raise UsageError.
        """
        k = self.head.num_outputs
        parts = [d_outputs[:, :k], d_outputs[:, k:]] if len(self.layers) == 2 else [d_outputs]
        for layers, activations, part in zip(self.layers, self.kept, parts, strict=True) if self.layers else ():
            mlp_backward(layers, activations, part)
        if not self.layers:
            self.kept.backward(torch.from_numpy(d_outputs).to(self.device))
        if d_log_std is not None:
            self.networks.log_std.grad.copy_(torch.from_numpy(d_log_std))
        norm = self.weights.grad.norm().item()
        self.failures = 0 if math.isfinite(norm) else self.failures + 1
        self.updates, self.skipped = self.updates + (self.failures == 0), self.skipped + (self.failures > 0)
        if self.failures == 0:
            self.weights.grad.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
            self.adam(lr)
        self.weights.grad.zero_()
        if self.failures == 3:
            raise UsageError("the gradient was not finite three times in a row: lower learning_rate?")
        return norm

    def adam(self, lr: float) -> None:
        """arXiv:1412.6980, as torch.optim.Adam(eps=1e-5), which would import torch's compiler first: a second."""
        (mean, square), gradient = self.moments, self.weights.grad
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        deviation = square.sqrt().div_(math.sqrt(1 - 0.999**self.updates)).add_(1e-5)
        self.weights.addcdiv_(mean, deviation, value=-lr / (1 - 0.9**self.updates))

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold to act, to evaluate inside the training band, and to go on learning."""
        state = self.networks.state_dict() | {"adam": self.moments}
        state |= {f"{name}.{x}": torch.tensor(getattr(statistics, x), dtype=torch.float64)
                  for name, statistics in self.statistics.items() for x in ("mean", "var", "count")}
        return {name: x.detach().cpu().clone() for name, x in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises RuntimeError or KeyError where the tensors are of another network."""
        moments = tensors.pop("adam")
        for name, x in [(name, x) for name in self.statistics for x in ("mean", "var", "count")]:
            setattr(self.statistics[name], x, tensors.pop(f"{name}.{x}").numpy()[()])
        self.networks.load_state_dict(tensors)
        self.moments.copy_(moments)


# ---- PPO. Pure functions of arrays and numbers; those that ppo_llm.py has too have the same text ---------------------


def compute_gae(rewards: ndarray, values: ndarray, next_values: ndarray, terminated: ndarray, done: ndarray,
                gamma: float, lam: float) -> tuple[ndarray, ndarray]:
    """GAE (arXiv:1506.02438): advantages and returns = advantages + values, [T, N].

    next_values is V of the state that followed: 0 after a failure (terminated), but not after a time limit. The sum
    ends with the episode (done) in both cases.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    decay, running, advantages = gamma * lam * (1 - done), 0.0, np.empty_like(deltas)
    for t in reversed(range(len(deltas))):
        advantages[t] = running = deltas[t] + decay[t] * running
    return advantages, advantages + values


def normalize_rows(x: ndarray, mask: ndarray) -> ndarray:
    """(x - mean) / (standard deviation + 1e-8) of each mini-batch [M, S], over its mask, with the unbiased variance."""
    count = mask.sum(1, keepdims=True).clip(min=1)
    centred = (x - (x * mask).sum(1, keepdims=True) / count) * mask
    return centred / (np.sqrt(np.square(centred).sum(1, keepdims=True) / (count - 1).clip(min=1)) + np.float32(1e-8))


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, clip_c: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), elementwise: loss, ratio, was clipped, was clipped by clip_c.

    clip_c is the dual clip (arXiv:1912.09729): where the advantage is negative the loss is at most -advantage * clip_c.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, is_clipped, is_bounded = torch.maximum(unclipped, clipped), clipped > unclipped, torch.zeros_like(ratio)
    if clip_c is not None:
        bound = -advantages * clip_c
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
    return loss, ratio.detach(), is_clipped.float(), is_bounded.float()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error, elementwise, of values or of values within cliprange of old_values, whichever is worse.

    Also returns where the clipped one was worse (as in OpenAI's baselines, ppo2).
    """
    loss, is_clipped = (values - returns).square(), torch.zeros_like(values)
    if cliprange is not None:
        clipped = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
        loss, is_clipped = torch.maximum(loss, clipped), (clipped > loss).float()
    return 0.5 * loss, is_clipped


def ppo_gradient(head: Categorical | Gaussian, outputs: ndarray, batch: dict, clip: float, kl_coef: float, c: Config):
    """The gradient [S, K + 1] at the outputs of sum(weights * loss) over the rows of a mini-batch, where

    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy + kl_coef * kl.
    Also that of log_std, the ratio [S] and the terms to log [7, S].
    """
    logprobs, entropy, saved = head.evaluate(outputs[:, :-1], batch["actions"])
    old_logprobs, advantages, returns, weights = (batch[x] for x in ("logprobs", "advantages", "returns", "weights"))
    tensors = map(torch.from_numpy, (logprobs, old_logprobs, advantages))
    policy_loss, ratio, clipped, bounded = map(Tensor.numpy, clipped_policy_loss(*tensors, clip, clip, c.dual_clip))
    values, tensors = outputs[:, -1], map(torch.from_numpy, (outputs[:, -1], batch["values"], returns))
    value_loss, value_clipped = map(Tensor.numpy, clipped_value_loss(*tensors, clip if c.clip_vloss else None))
    kl = ratio - 1 - (logprobs - old_logprobs)  # k3: unbiased for KL(old, new), and so is its gradient
    # A clipped row is constant; elsewhere the loss is -advantage * ratio, and d ratio / d logprob = ratio
    d_logprobs = weights * (advantages * ratio * (clipped + bounded - 1) + kl_coef * (ratio - 1))
    d_policy, d_log_std = head.gradient(saved, d_logprobs, -c.ent_coef * weights)
    d_values = c.vf_coef * weights * (values - returns) * (1 - value_clipped)
    terms = np.concatenate([policy_loss, value_loss, entropy, kl, clipped, bounded, value_clipped]).reshape(7, -1)
    return np.concatenate([d_policy, d_values[:, None]], 1), d_log_std, ratio, terms


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The adaptive penalty of the PPO paper (arXiv:1707.06347, section 4): doubled above 1.5 target, halved below."""
    return kl_coef * 2 if kl > 1.5 * target else kl_coef / 2 if kl < target / 1.5 else kl_coef


# ---- Rollout and update ---------------------------------------------------------------------------------------------


def collect_rollout(agent: Agent, stream: Stream, step: int, c: Config) -> SimpleNamespace:
    """Plays num_steps steps and computes advantages. Raises UsageError where a number is not finite."""
    head, observe, shape = agent.head, agent.observer(), (c.num_steps, c.num_envs)
    noise = getattr(np.random.default_rng([c.seed, ROLLOUT, step]), head.noise)(size=(*shape, head.num_outputs))
    noise, first, seen = noise.astype("f4"), observe(stream.obs), []
    r, actions = SimpleNamespace(last={}), head.act(noise[0], 0)  # last: {(t, i): a final state not in inputs[t + 1]}
    r.inputs = np.empty((c.num_steps + 1, *first.shape), first.dtype)  # [T + 1, N, ...] what the networks see
    r.actions = np.empty((c.num_steps, *actions.shape), actions.dtype)  # [T, N, C] unclipped
    r.rewards, r.inputs[0] = np.empty(shape), first
    r.terminated, r.done, r.valid = np.empty((3, *shape), bool)  # done: terminated, or cut by a time limit
    for t in range(c.num_steps):
        seen += [stream.obs.copy()] if agent.norm_obs else []
        r.actions[t] = actions = head.act(agent.policy(r.inputs[t]), noise[t])
        r.rewards[t], r.terminated[t], r.done[t], r.valid[t], final = stream.step(head.to_env(actions))
        r.inputs[t + 1] = observe(stream.obs)
        r.last |= {(t, i): observe(obs[None])[0] for i, obs in final.items()}
    seen = np.stack(seen) if agent.norm_obs else r.inputs  # as the environment gave it, before any clipping
    for name, x, first_step in (("observation", seen, 0), ("observation", r.inputs, 0), ("reward", r.rewards, 1)):
        for t, i in np.argwhere(~np.isfinite(x.reshape(*x.shape[:2], -1)).all(2))[:1]:
            raise UsageError(f"environment {i} gave a {name} that is not finite: iteration {step + 1}, step"
                             f" {t + first_step}")
    if agent.norm_obs:
        agent.statistics["obs"].update(seen[r.valid])  # of use from the next rollout on
    if c.norm_reward == "sign":
        r.rewards = np.sign(r.rewards)
    if c.norm_reward == "scale":
        scale_rewards(r, stream, agent, c)
    outputs = compute_advantages(agent, r, c)[: c.num_steps * c.num_envs, :-1]
    r.logprobs = head.evaluate(outputs, r.actions.reshape(len(outputs), -1))[0].reshape(shape)
    return r


def scale_rewards(r: SimpleNamespace, stream: Stream, agent: Agent, c: Config) -> None:
    """Divides by the deviation of the discounted return so far, which starts anew with every episode."""
    discounted = np.empty_like(r.rewards)
    for t in range(c.num_steps):
        discounted[t] = stream.discounted = stream.discounted * c.gamma + r.rewards[t]
        stream.discounted = stream.discounted * ~r.done[t]
    agent.statistics["returns"].update(discounted[r.valid])
    r.rewards = np.clip(r.rewards / np.sqrt(agent.statistics["returns"].var + 1e-8), -10, 10)


def compute_advantages(agent: Agent, r: SimpleNamespace, c: Config) -> ndarray:
    """Fills in values, advantages and returns, [T, N]; gives the outputs of the networks for all inputs."""
    outputs = agent.predict(r.inputs.reshape(-1, *r.inputs.shape[2:]))
    values = outputs[:, -1].reshape(r.inputs.shape[:2])
    next_values = values[1:].copy()  # in NEXT_STEP mode inputs[t + 1] is the final state of an episode done at t
    if r.last:
        next_values[tuple(zip(*r.last, strict=True))] = agent.predict(np.stack(list(r.last.values())))[:, -1]
    terminated, r.values = r.terminated if c.bootstrap_truncated else r.done, values[:-1]
    r.advantages, r.returns = compute_gae(r.rewards, r.values, next_values, terminated, r.done, c.gamma, c.gae_lambda)
    return outputs


def update(agent: Agent, r: SimpleNamespace, step: int, lr: float, clip: float, kl_coef: float, c: Config) -> dict:
    """update_epochs passes over the valid rows, in num_minibatches each; fewer when target_kl is passed. Metrics."""
    rng, valid = np.random.default_rng([c.seed, SHUFFLE, step]), r.valid | (not c.mask_dummy_rows)
    rows, variance, norms, epochs, first = np.flatnonzero(valid), r.returns[valid].var(), [], [], math.nan
    explained = 1 - (r.returns - r.values)[valid].var() / variance if variance > 1e-12 else math.nan
    size = math.ceil(len(rows) / c.num_minibatches)
    shape = math.ceil(len(rows) / size), size  # fewer than num_minibatches where some would have no rows at all
    mask = (np.arange(math.prod(shape)) < len(rows)).reshape(shape).astype("f4")  # 0 at the end of the last one
    data = {name: getattr(r, name) for name in ("actions", "logprobs", "values")} | {"inputs": r.inputs[:-1]}
    while len(epochs) < c.update_epochs:
        if epochs and c.recompute_advantages:
            compute_advantages(agent, r, c)
        data |= {"advantages": r.advantages, "returns": r.returns}
        order, terms = np.resize(rng.permutation(rows), shape), []
        shuffled = {name: x.reshape(-1, *x.shape[2:])[order] for name, x in data.items()}
        shuffled = {name: x.astype("f4") if x.dtype == np.float64 else x for name, x in shuffled.items()}
        shuffled["weights"] = mask / mask.sum(1, keepdims=True).clip(min=1)
        if c.norm_adv:
            shuffled["advantages"] = normalize_rows(shuffled["advantages"], mask)
        for m in range(len(order)):
            batch = {name: x[m] for name, x in shuffled.items()}
            outputs = agent.forward(batch["inputs"])
            d_outputs, d_log_std, ratio, logged = ppo_gradient(agent.head, outputs, batch, clip, kl_coef, c)
            first = first if norms else 1 + (np.abs(ratio - 1) * mask[0]).max().item()
            norms.append(agent.step(d_outputs, d_log_std, lr))
            terms.append(logged)
        epochs.append((np.stack(terms, 1) * mask).sum((1, 2)) / mask.sum())
        if c.target_kl is not None and epochs[-1][3] > c.target_kl:
            break
    names = """policy/loss value/loss policy/entropy policy/approx_kl policy/clipfrac policy/clipfrac_lower
        value/clipfrac"""
    return dict(zip(names.split(), np.mean(epochs, 0).tolist(), strict=True)) | {
        "policy/kl_last": epochs[-1][3].item(), "policy/ratio_first": first, "policy/kl_coef": kl_coef,
        "value/explained_variance": float(explained), "optim/lr": lr, "optim/clip": clip, "optim/grad_norm": norms[0],
        "optim/epochs": len(epochs), "optim/updates": agent.updates, "optim/skipped_steps": agent.skipped}


# ---- Evaluation, logs, checkpoints ----------------------------------------------------------------------------------


def evaluate(agent: Agent, c: Config, episodes: int, video_dir: Path | None = None) -> dict:
    """Mean return with frozen statistics; every environment plays its share of the episodes, however long they are."""
    count, head, observe, returns = min(episodes, 20), agent.head, agent.observer(), []
    left, rng = np.diff(np.arange(count + 1) * episodes // count), np.random.default_rng([c.seed, EVALUATION])
    with closing(make_envs(c, count, True, video_dir)) as envs:
        stream = Stream(envs, c.env_id)
        stream.restart(c.seed, EVALUATION)
        while left.any():
            noise = getattr(rng, head.noise)(size=(count, head.num_outputs)).astype("f4") if agent.image else 0.0
            _, _, done, _, _ = stream.step(head.to_env(head.act(agent.policy(observe(stream.obs)), noise)))
            returns += [x for (x, _), i in zip(stream.ended, np.flatnonzero(done), strict=True) if left[i] > 0]
            left, stream.ended = left - (done & (left > 0)), []
    error = np.std(returns, ddof=1) / math.sqrt(episodes) if episodes > 1 else 0.0
    return {"eval/score": float(np.mean(returns)), "eval/standard_error": float(error)}


def start_tracker(c: Config, run_dir: Path, state: dict) -> Callable[[dict, int], object]:
    """A function that takes metrics and global_step."""
    if c.track == "wandb":
        import wandb

        run = wandb.init(project=c.wandb_project_name, name=run_dir.name, config=dataclasses.asdict(c),
                         id=state["run_id"] or None, resume="allow")
        state["run_id"] = run.id
        return lambda metrics, step: run.log(metrics, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard")
    return lambda metrics, step: [writer.add_scalar(name, x, step) for name, x in metrics.items()]


def save_summary(run_dir: Path, c: Config, status: str, evaluation: dict) -> None:
    """summary.json, and training_curves.png from training_metrics.csv."""
    lines = (run_dir / "training_metrics.csv").read_text().splitlines()
    table = {name: column for name, *column in zip(*(line.split(",") for line in lines), strict=True)}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "gymnasium": gym.__version__}
    command = " ".join(["python", *sys.argv] + ([] if c.output_dir else ["--output_dir", str(run_dir)]))
    summary = {"status": status, "global_step": int(table["global_step"][-1]) if table else 0, "versions": versions,
               "last_evaluation": evaluation, "resume_command": command, "config": dataclasses.asdict(c)}
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2))
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    if status == "finished":
        import matplotlib.figure

        figure = matplotlib.figure.Figure(figsize=(14, 8))
        names = "rollout/return_100 policy/entropy policy/approx_kl policy/clipfrac value/loss value/explained_variance"
        for axis, name in zip(figure.subplots(2, 3).flat, names.split(), strict=True):
            axis.plot(np.array(table["global_step"], int), np.array(table[name], float))
            axis.set_title(name)  # against global_step
        figure.savefig(run_dir / "training_curves.png", dpi=80)


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoints/step_*[0-9]"), key=lambda path: int(path.name[5:]))  # the oldest first


def save_checkpoint(run_dir: Path, agent: Agent, state: dict, c: Config) -> None:
    """checkpoints/step_N: agent.safetensors, with the state as metadata, and its hash. Complete or absent: renamed."""
    temporary = run_dir / "checkpoints" / "temporary"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    text = json.dumps({"format": 1, "state": state, "config": dataclasses.asdict(c)})
    save_file(agent.tensors(), temporary / "agent.safetensors", {"saved": text})
    (temporary / "sha256").write_text(hashlib.sha256((temporary / "agent.safetensors").read_bytes()).hexdigest())
    os.replace(temporary, temporary.with_name(f"step_{state['step']}"))
    for old in checkpoints(run_dir)[:-2]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """Tensors and what belongs to them. Raises UsageError if the folder is damaged."""
    try:
        path = folder / "agent.safetensors"
        if hashlib.sha256(path.read_bytes()).hexdigest() != (folder / "sha256").read_text():
            raise ValueError("its hash is another")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["saved"])
    except Exception as error:
        raise UsageError(f"{folder} is no checkpoint, or damaged: {error}") from error


def load_checkpoint(folder: Path, agent: Agent, c: Config) -> dict:
    """Restores the agent, and returns the state. Raises UsageError if the checkpoint is of something else."""
    (tensors, saved), now = read_checkpoint(folder), dataclasses.asdict(c)
    for free in ("output_dir", "resume", "eval_only", "eval_episodes", "capture_video", "track"):
        now.pop(free)
    changed = ", ".join(f"{x} {saved['config'].get(x)} -> {now[x]}" for x in now if saved["config"].get(x) != now[x])
    try:
        if saved["format"] != 1 or saved["config"]["env_id"] != c.env_id:
            raise RuntimeError("another version or environment")
        agent.load(tensors)
    except (RuntimeError, KeyError) as error:
        raise UsageError(f"{folder} does not fit ({changed}): {str(error).splitlines()[0]}") from error
    if changed and not c.eval_only:
        warn(f"settings have changed since the checkpoint, schedules are planned anew: {changed}")
    agent.updates, agent.skipped = saved["state"]["updates"], saved["state"]["skipped"]
    return saved["state"]


def open_run(c: Config) -> tuple[Path, Path | None]:
    """The run's folder, and the newest whole checkpoint to go on from (None: from the start). Raises UsageError."""
    name = f"ppo_classic-{c.env_id.replace('/', '-')}-seed{c.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir, link = Path(c.output_dir or Path("output", name)), Path("output", "ppo_metrics")
    start = None if c.resume in ("auto", "never", "must") else Path(c.resume)
    for folder in reversed(checkpoints(run_dir) if c.resume in ("auto", "must") else []):
        try:
            start = start or (read_checkpoint(folder) and folder)
        except UsageError as error:
            warn(f"{error}; an older one is tried")
    if not start and (c.resume == "must" or c.eval_only):
        raise UsageError(f"resume {c.resume}: no checkpoint in {run_dir}")
    inside = start is not None and run_dir.resolve() in start.resolve().parents
    if c.eval_only:
        return run_dir if inside else start.parent, start
    died = (run_dir / "summary.json").exists() and '"status": "running"' in (run_dir / "summary.json").read_text()
    if run_dir.exists() and any(run_dir.iterdir()) and not inside and (checkpoints(run_dir) or not died):
        raise UsageError(f"{run_dir} is not empty and not continued (resume {c.resume}): choose another folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    path, step = run_dir / "training_metrics.csv", int(start.name[5:]) if inside else 0
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: step + 1] if inside else []))  # a row per step
    for later in (x for x in checkpoints(run_dir) if int(x.name[5:]) > step):
        shutil.rmtree(later)  # damaged, or of a course that is left
    if run_dir == Path("output", name) and (link.is_symlink() or not link.exists()):
        link.unlink(missing_ok=True)
        link.symlink_to(name)
    return run_dir, start


# ---- Main -----------------------------------------------------------------------------------------------------------


def train(agent: Agent, stream: Stream, state: dict, run_dir: Path, c: Config) -> None:
    """Iterations until total_timesteps: rollout, update, a row of training_metrics.csv, checkpoints."""
    track, tracker, last = c.track != "none", None, state["global_step"] >= c.total_timesteps
    stream.restart(c.seed, RESET, state["step"])
    while not last:
        clock, left = time.perf_counter(), 1 - state["global_step"] / c.total_timesteps
        lr, clip = c.learning_rate * (left if c.anneal_lr else 1), c.clip_coef * (left if c.anneal_clip else 1)
        rollout, middle = collect_rollout(agent, stream, state["step"], c), time.perf_counter()
        metrics, end = update(agent, rollout, state["step"], lr, clip, state["kl_coef"], c), time.perf_counter()
        steps, kl, episodes, stream.ended = int(rollout.valid.sum()), metrics.pop("policy/kl_last"), stream.ended, []
        state |= {"step": state["step"] + 1, "global_step": state["global_step"] + steps, "updates": agent.updates,
                  "skipped": agent.skipped, "recent": (state["recent"] + episodes)[-100:]}
        if c.kl_target is not None:
            state["kl_coef"] = adapt_kl_coef(state["kl_coef"], kl, c.kl_target)
        returns, lengths = np.mean(state["recent"] or [[math.nan] * 2], 0).tolist()
        metrics = {"step": state["step"], "global_step": state["global_step"], "rollout/episodes": len(episodes),
                   "rollout/return_100": returns, "rollout/length_100": lengths, **metrics, "time/rollout":
                   middle - clock, "time/update": end - middle, "time/steps_per_second": steps / (end - clock)}
        with open(run_dir / "training_metrics.csv", "a") as file:
            file.write(("" if file.tell() else ",".join(metrics) + "\n") + ",".join(map(str, metrics.values())) + "\n")
        try:  # a tracker that fails must not end the training
            tracker = tracker or (start_tracker(c, run_dir, state) if track else lambda metrics, step: None)
            tracker(metrics, state["global_step"])
        except Exception as error:
            warn(f"track {c.track}: {error} (pip install {c.track}?); the run goes on without")
            track, tracker = False, None
        last = state["global_step"] >= c.total_timesteps
        if last or (c.save_every and state["step"] % c.save_every == 0):
            save_checkpoint(run_dir, agent, state, c)
            stream.restart(c.seed, RESET, state["step"])
        if last or int(20 * left) > int(20 * (left - steps / c.total_timesteps)):
            shown = "rollout/return_100 policy/approx_kl policy/clipfrac value/explained_variance time/steps_per_second"
            print(f"step {state['global_step']}: " + ", ".join(f"{x} {metrics[x]:.4g}" for x in shown.split()))


def main(c: Config) -> dict:
    check_config(c)
    torch.manual_seed(c.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    # the same switch as use_deterministic_algorithms, which imports torch's compiler: over a second
    torch.set_deterministic_debug_mode("error" if c.torch_deterministic else "default")
    with closing(make_envs(c, c.num_envs)) as envs:
        agent, stream, evaluation = Agent(envs, c), Stream(envs, c.env_id), {}
        torch.set_num_threads(os.cpu_count() if agent.image else 1)
        run_dir, start = open_run(c)
        state = {"step": 0, "global_step": 0, "updates": 0, "skipped": 0, "kl_coef": c.kl_coef, "recent": [],
                 "run_id": ""}  # recent: [return, length] of the last 100 episodes
        state = load_checkpoint(start, agent, c) if start else state
        print(f"run: {run_dir}, from step {state['global_step']} of {c.total_timesteps}")
        if c.capture_video:  # what is missing for it shall be said now, not after the training
            make_envs(c, 1, True, run_dir / "videos").close()
        if not c.eval_only:
            save_summary(run_dir, c, "running", {})
            train(agent, stream, state, run_dir, c)
    if c.eval_episodes:
        evaluation = evaluate(agent, c, c.eval_episodes)
    if c.capture_video:
        evaluate(agent, c, 1, run_dir / "videos")
    if not c.eval_only:
        save_summary(run_dir, c, "finished", evaluation)
    print("".join(f"{name:22} {x:10.4g}\n" for name, x in evaluation.items()), end="")
    return evaluation


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env_id", "--env-id", default="CartPole-v1")
    parser.add_argument("--vectorization", default="auto")
    known = parser.parse_known_args()[0]  # the defaults of all other options follow from these two
    try:
        preset, defaults = choose_preset(known.env_id, known.vectorization)
        config = tyro.cli(Config, default=defaults, use_underscores=True)
        print(f"preset {preset}: {config}") if config.dry_run else main(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
