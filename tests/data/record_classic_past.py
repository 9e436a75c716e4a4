"""Records what the hand-written update of ppo_classic.py did, in float64: tests/data/classic_past.npz.

    python tests/data/record_classic_past.py        # needs the history of the repository: it reads dc3ee96

Commit dc3ee96 is the last one in which gradient and Adam were written by hand. Here its text is changed
from float32 to float64, and 20 updates are made on each of three tasks. Recorded are the state before each
update (weights and Adam's two moments), the valid rows of its rollout, and the state after the last one.
tests/test_classic.py holds the update of today to it. Noise and shuffles are functions of (seed, step), so
they need not be recorded.
"""

import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, MultiDiscrete

FOLDER = Path(__file__).resolve().parent
UPDATES = 20
SIZES = {"num_envs": 2, "num_steps": 25, "num_minibatches": 3, "update_epochs": 3, "hidden_size": 8, "save_every": 1}
TASKS = {  # the options that differ from the defaults; sizes that leave ragged mini-batches
    "CartPole-v1": {"learning_rate": 1e-3, "kl_coef": 0.1},
    "Pendulum-v1": {"learning_rate": 1e-3, "gamma": 0.9, "norm_reward": "scale", "norm_obs": True, "ent_coef": 0.0},
    "Toy-v0": {"learning_rate": 3e-3, "dual_clip": 1.2, "clip_vloss": False, "norm_adv": False},
}


class Toy(gym.Env):
    """Random observations, three independent actions, episodes of five steps that end in a failure or a time limit."""

    observation_space = Box(-1, 1, (3,))
    action_space = MultiDiscrete([3, 2, 4])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def step(self, action):
        self.t += 1
        ended = self.t == 5
        fails = ended and self.np_random.random() < 0.5
        return self.observe(), float(action[0] == action[1]) - 0.1 * action[2], fails, ended and not fails, {}


def old_module() -> types.ModuleType:
    """ppo_classic.py of dc3ee96, in float64."""
    command = ["git", "show", "dc3ee96:ppo_classic.py"]
    text = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    source = text.stdout.replace('"f4"', '"f8"').replace("np.float32(", "np.float64(")
    source = source.replace("np.float32", "np.float64").replace(".to(self.device).float()", ".to(self.device)")
    module = types.ModuleType("old_ppo_classic")
    sys.modules["old_ppo_classic"] = module
    exec(compile(source, "old_ppo_classic", "exec"), module.__dict__)
    return module


def state_of(agent) -> dict[str, np.ndarray]:
    """Weights, and Adam's moments, by the names of the old networks."""
    names = [name for name, _ in agent.networks.named_parameters()]
    sizes = [x.numel() for x in agent.networks.parameters()]
    state = {}
    for kind, flat in (("weight", agent.weights), ("mean", agent.moments[0]), ("square", agent.moments[1])):
        for name, x in zip(names, flat.split(sizes), strict=True):
            state[f"{kind}/{name}"] = x.numpy().copy()
    return state


def record(old: types.ModuleType, env_id: str) -> dict[str, np.ndarray]:
    c = old.Config(env_id=env_id, **SIZES, **TASKS[env_id])
    torch.manual_seed(c.seed)
    envs = old.make_envs(c, c.num_envs)
    agent = old.Agent(envs, c)
    stream = old.Stream(envs, env_id)
    saved = []
    for step in range(UPDATES):
        stream.restart(c.seed, old.RESET, step)
        before = state_of(agent)
        moments = {"obs_mean": agent.statistics["obs"].mean, "obs_var": agent.statistics["obs"].var}
        r = old.collect_rollout(agent, stream, step, c)
        rows = {"inputs": r.inputs[:-1], "actions": r.actions, "logprobs": r.logprobs, "values": r.values}
        rows |= {"advantages": r.advantages, "returns": r.returns}
        for name, x in rows.items():
            before[f"rollout/{name}"] = x[r.valid].copy()
        before |= {f"moments/{name}": np.array(x) for name, x in moments.items()}
        metrics = old.update(agent, r, step, c.learning_rate, c.clip_coef, c.kl_coef, c)
        before["metrics"] = np.array([metrics["policy/loss"], metrics["value/loss"], metrics["policy/approx_kl"]])
        saved.append(before)
    arrays = {f"{env_id}/{step}/{name}": x for step, state in enumerate(saved) for name, x in state.items()}
    return arrays | {f"{env_id}/{UPDATES}/{name}": x for name, x in state_of(agent).items()}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    gym.register("Toy-v0", entry_point=Toy, disable_env_checker=True)
    old = old_module()
    arrays = {}
    for env_id in TASKS:
        arrays |= record(old, env_id)
    packed = {}  # an array per name, updates one after another: a thousand small arrays would be mostly headers
    for env_id in TASKS:
        for name in [x.split("/", 2)[2] for x in arrays if x.startswith(f"{env_id}/0/")]:
            keys = [f"{env_id}/{step}/{name}" for step in range(UPDATES + 1)]
            parts = [arrays[key] for key in keys if key in arrays]
            if name.startswith("rollout/"):
                packed[f"{env_id}/rows"] = np.array([len(x) for x in parts])
                packed[f"{env_id}/{name}"] = np.concatenate(parts)
            else:
                packed[f"{env_id}/{name}"] = np.stack(parts)
    np.savez_compressed(FOLDER / "classic_past.npz", **packed)
