# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "dm_control==1.0.50", "gymnasium==1.4.0", "mujoco==3.17.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "torch==2.14.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""SAC from pixels + SAM + Reset on DeepMind Control: soft actor-critic on shifted frames that stays able to learn.
Critic and actor take the gradient at the worst point nearby (sharpness-aware minimisation), so that the encoder stays
open to new inputs. Every --reset-every updates all but the encoder is drawn anew, so that it stays open to new targets.

Paper: Lee et al. 2023, Enhancing Generalization and Plasticity for Sample Efficient Reinforcement Learning (PLASTIC).
Checked against github.com/evgenii-nikishin/rl_with_resets (502ec52), from which the paper's code was made. SAM follows
the paper, because its authors' repository holds later variants of both networks and of SAM.
Deviations: a batch never holds the newest transition, so that environment and update can run side by side; the last
observation of an episode takes a row of the replay, so it holds one transition less per episode; resets count updates,
not steps, and come 999 steps later; every evaluation plays the same ten episodes, whatever the run's seed; quadruped
has the other tasks' SAM radius, because the paper sets it apart but its text lost the value; environments start afresh
every --exact-every steps.

    python algos/sac_sam_reset.py --env-id cheetah-run                           # the paper: 2M frames, 500k steps
    python algos/sac_sam_reset.py --env-id cheetah-run --no-sam --reset-every 0  # its baseline, SAC
    python algos/sac_sam_reset.py --env-id cheetah-run --sam-on critic
    python algos/sac_sam_reset.py --resume runs/<folder>                         # continue a run
"""

# ---- 1. Imports ----
import copy
import ctypes
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

# Before torch is imported. glibc returns freed memory to the kernel; getting it back takes up to half the time.
# M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) make it keep the memory; an old glibc refuses the first.
if sys.platform == "linux" and ctypes.CDLL(None).mallopt(-3, 2**30):
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
if "__file__" not in globals():  # pasted into a notebook
    raise RuntimeError("save this text as a .py file and import that: each run keeps a copy of its script")

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---- 2. Arguments ----
@dataclass
class Args:
    # The method. Paper: section 5.
    env_id: str = "cheetah-run"  # the task; unknown names print the valid ones
    total_timesteps: int = 0  # steps of --action-repeat frames (0: the paper's 2M frames)
    action_repeat: int = 0  # frames per step (0: the task's)
    sam: bool = True  # sharpness-aware minimisation; off: plain Adam
    sam_rho: float = 0.0  # rho, length of the step to the worst point nearby (0: the task's)
    sam_on: Literal["both", "critic", "actor"] = "both"  # whose loss takes that step
    reset_every: int = 100_000  # updates between resets of all but the encoder (0: never)
    replay_ratio: int = 1  # updates per step

    # SAC. Paper: Table 5. Reference code, where it is silent: configs/drq.py and train_pixels.py.
    num_envs: int = 1  # N, parallel environments; training has one
    learning_starts: int = 999  # random steps before the first update
    buffer_size: int = 100_000  # observations in the replay; new ones overwrite the oldest
    batch_size: int = 512  # B, transitions per update
    learning_rate: float = 3e-4  # Adam
    adam_eps: float = 1e-8  # Adam's epsilon
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the online network that flows into the target network at each update
    initial_alpha: float = 0.1  # alpha, weight of the entropy, at first and after each reset

    # Evaluation on episodes with seeds of their own.
    eval_every: int = 5_000  # steps between evaluations (0: never)
    eval_episodes: int = 10  # episodes per evaluation
    final_eval_episodes: int = 0  # episodes of the last evaluation (0: 10, or fewer in a short run)
    eval_seed: int = 42  # draws the evaluated episodes, the same ones each time

    # The run.
    seed: int = 1  # same seed, machine, packages and number of threads: same weights, bit for bit
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    runs_dir: str = "runs"  # where run folders are made
    resume: str | None = None  # run folder to continue
    exact_every: int = 10_000  # steps between bit-for-bit checkpoints and fresh environments (0: never)
    save_minutes: float = 5.0  # minutes between the checkpoints in between (0: none)
    cuda: bool = True  # use a GPU if there is one
    cuda_required: bool = False  # refuse to run without a GPU
    cuda_graphs: bool = True  # on a GPU: record acting and learning once and replay them
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # bf16: encoder alone; auto: tf32 on GPU, fp32 on CPU
    torch_deterministic: bool = True  # only kernels that repeat bit for bit
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "holdout"  # project for --track
    wandb_entity: str | None = None  # team for --track


# ---- 3. Environments ----
# dm_control's suite without lqr, which has no time limit and no bounds of actions.
TASKS = """
    acrobot-swingup acrobot-swingup_sparse ball_in_cup-catch cartpole-balance cartpole-balance_sparse cartpole-swingup
    cartpole-swingup_sparse cartpole-two_poles cartpole-three_poles cheetah-run dog-stand dog-walk dog-trot dog-run
    dog-fetch finger-spin finger-turn_easy finger-turn_hard fish-upright fish-swim hopper-stand hopper-hop
    humanoid-stand humanoid-walk humanoid-run humanoid-run_pure_state humanoid_CMU-stand humanoid_CMU-walk
    humanoid_CMU-run manipulator-bring_ball manipulator-bring_peg manipulator-insert_ball manipulator-insert_peg
    pendulum-swingup point_mass-easy point_mass-hard quadruped-walk quadruped-run quadruped-escape quadruped-fetch
    reacher-easy reacher-hard stacker-stack_2 stacker-stack_4 swimmer-swimmer6 swimmer-swimmer15 walker-stand
    walker-walk walker-run
"""
# Frames per step where not 2: in the paper's eleven tasks (10.2, train_pixels.py:44-51), then in PlaNet's.
ACTION_REPEAT = {"cheetah-run": 4, "reacher-easy": 4, "cartpole-swingup": 8, "ball_in_cup-catch": 4}
# rho where not 0.01. Reference code: PLASTIC's dmc/train_pixels.py:55; the paper's text says quadruped instead.
SAM_RHO = {"cheetah-run": 0.002}
FRAMES = 2_000_000  # frames of a run. Paper: 7.4


def task_of(env_id):
    """finger-turn_hard, also for finger_turn_hard and finger-turn-hard. Errors: ValueError."""
    tasks = TASKS.split()
    names = {task.lower().replace("-", "_"): task for task in tasks}
    name = env_id.lower().replace("-", "_")
    if name not in names:
        raise ValueError(f"{env_id}: no such task; there are {' '.join(tasks)}")
    return names[name]


@cache
def import_suite():
    """dm_control's suite with a renderer that works here: what MUJOCO_GL says, or the first that does.

    MuJoCo reads MUJOCO_GL when it is imported.
    """
    probe = "import mujoco as m; c = m.GLContext(8, 8); c.make_current()"
    probe += "; m.MjrContext(m.MjModel.from_xml_string('<mujoco/>'), 100); c.free()"
    names = ["glfw"] if sys.platform == "darwin" else ["egl", "osmesa"]
    if os.environ.get("MUJOCO_GL"):
        names = [os.environ["MUJOCO_GL"].lower()]
    reasons = []
    for name in names:
        about = {"env": {**os.environ, "MUJOCO_GL": name}, "capture_output": True, "text": True}
        probed = subprocess.run([sys.executable, "-c", probe], **about)
        if probed.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            from dm_control import suite

            # cheetah sets a deprecated attribute, and says so in 200 characters for each environment.
            logging.getLogger("absl").addFilter(lambda record: "settotalmass" not in record.getMessage())
            return suite
        reasons.append(f"MUJOCO_GL={name}: {probed.stderr.strip().splitlines()[-1]}")
    fail(f"MuJoCo cannot render here: {'; '.join(reasons)} (on Debian: apt-get install libegl1 libgl1-mesa-dri)")


def make_envs(args, split, start=0):
    """N environments seeded by (args.seed, split, start). "test" differs from "train" by its seeds alone.

    reset() -> obs uint8 [N, 3, 64, 64], the last three frames in gray, or the first frame three times; info.
    step(actions float32 [N, A] in -1..1) -> obs, reward float32, terminated bool, truncated bool, all [N], info.
    The reward is the sum over args.action_repeat frames; the time limit truncates.
    The step that ends an episode returns the next episode's first observation, in a new array.
    info["final_obs"]: like obs, but with the last observation of each episode that ended with the step.
    info["episodes"]: (environment, return, length) of the episodes that ended with the step.
    """
    suite = import_suite()
    domain, task = args.env_id.split("-")
    entropy = (args.seed, ("train", "test").index(split), start)
    seeds = np.random.SeedSequence(entropy).generate_state(args.num_envs).tolist()
    envs = [suite.load(domain, task, task_kwargs={"random": seed}) for seed in seeds]
    return ControlEnvs(envs, args.action_repeat, camera=2 if domain == "quadruped" else 0)


class ControlEnvs:
    """dm_control's environments with stacks of gray frames and repeated actions, for `make_envs`."""

    def __init__(self, envs, repeat, camera):
        import gymnasium as gym

        spec = envs[0].action_spec()
        self.envs, self.repeat, self.camera = envs, repeat, camera
        self.low, self.high = spec.minimum, spec.maximum
        self.single_observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.single_action_space = gym.spaces.Box(-1, 1, spec.shape, np.float32)

    def reset(self):
        self.returns, self.lengths = np.zeros(len(self.envs)), np.zeros(len(self.envs), dtype=int)
        self.obs = np.stack([self.first(env) for env in self.envs])
        return self.obs, {}

    def step(self, actions):
        rewards = np.zeros(len(self.envs), np.float32)
        terminated, truncated = np.zeros(len(self.envs), bool), np.zeros(len(self.envs), bool)
        final_obs = np.roll(self.obs, -1, axis=1)
        for n, env in enumerate(self.envs):
            action = self.low + (actions[n].astype(np.float64) + 1) / 2 * (self.high - self.low)
            for _ in range(self.repeat):
                moment = env.step(action)
                rewards[n] += moment.reward
                if moment.last():
                    terminated[n], truncated[n] = moment.discount == 0, moment.discount != 0
                    break
            final_obs[n, -1] = self.frame(env)
        self.returns, self.lengths = self.returns + rewards, self.lengths + 1
        self.obs, episodes = final_obs.copy(), []
        for n in np.flatnonzero(terminated | truncated):
            episodes.append((int(n), float(self.returns[n]), int(self.lengths[n])))
            self.returns[n], self.lengths[n] = 0, 0
            self.obs[n] = self.first(self.envs[n])
        info = {"final_obs": final_obs, "episodes": episodes}
        return self.obs, rewards, terminated, truncated, info

    def first(self, env):
        """Begins an episode; its first observation."""
        env.reset()
        return np.stack([self.frame(env)] * 3)

    def frame(self, env):
        """uint8 [64, 64]. Reference code: wrappers/rgb2gray.py cuts fractions off."""
        pixels = env.physics.render(64, 64, camera_id=self.camera)
        return np.dot(pixels, [0.299, 0.587, 0.114]).astype(np.uint8)

    def close(self):
        for env in self.envs:
            env.physics.free()  # env.close() keeps the renderer's memory


# ---- 4. Networks ----
class Agent(nn.Module):
    """Encoder, critic and actor: 388,416 + 366,232 + 286,882 parameters with 6 actions, and the temperature.

    Reference code: agents/drq/networks.py and networks/policies.py.
    """

    def __init__(self, envs, args):
        super().__init__()
        num_actions, channels = envs.single_action_space.shape[0], envs.single_observation_space.shape[0]
        layers = []
        for n_in, n_out in ((channels, 32), (32, 64), (64, 128), (128, 256)):
            layers.append(orthogonal(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), 2**0.5))
            layers.append(nn.ReLU(inplace=True))
        self.encoder = Encoder(*layers, nn.Flatten(), bf16=args.precision == "bf16")  # [B, 4096]
        self.critic = Critic(4096, num_actions)
        self.actor = Actor(4096, num_actions)
        self.log_alpha = nn.Parameter(torch.tensor(args.initial_alpha).log())  # of the temperature
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU


class Encoder(nn.Sequential):
    """Layers that can run in bf16. [B, 3, 64, 64] in 0..1 -> float32 [B, 4096].

    Careful: Flax's SAME pads right and below at stride 2; padding=1 has an effect left and above only. On images
    turned by half a turn the two are the same. A padding layer would take a fifth of the time.
    """

    def __init__(self, *layers, bf16):
        super().__init__(*layers)
        self.bf16 = bf16

    def forward(self, pixels):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return super().forward(pixels.flip(2, 3)).float()


class Critic(nn.Module):
    """Two estimates of the return, on one shared projection. [B, n_in], [B, A] -> [2, B]."""

    def __init__(self, n_in, num_actions):
        super().__init__()
        self.project = projection(n_in)  # [B, 50]
        self.q1, self.q2 = mlp(50 + num_actions, 1), mlp(50 + num_actions, 1)

    def forward(self, hidden, actions):
        inputs = torch.cat([self.project(hidden), actions], dim=1)
        return torch.stack([self.q1(inputs), self.q2(inputs)]).squeeze(-1)


class Actor(nn.Module):
    """A normal distribution of actions before the tanh. [B, n_in] -> mean [B, A], log_std [B, A] in -10..2."""

    def __init__(self, n_in, num_actions):
        super().__init__()
        self.project = projection(n_in)  # [B, 50]
        self.head = mlp(50, 2 * num_actions)
        # Reference code: two layers, of gains sqrt 2 and 1.
        mean, log_std = self.head[-1].weight.data.chunk(2)
        nn.init.orthogonal_(mean, 2**0.5)
        nn.init.orthogonal_(log_std, 1.0)

    def forward(self, hidden):
        mean, log_std = self.head(self.project(hidden)).chunk(2, dim=1)
        return mean, -10 + 6 * (1 + log_std.tanh())


def projection(n_in):
    """[B, n_in] -> [B, 50] in -1..1. Reference code: Flax's initialisation and its LayerNorm's epsilon."""
    linear = nn.Linear(n_in, 50)
    # LeCun's normal, cut at two standard deviations; the cut leaves 0.8796 of the standard deviation.
    std = n_in**-0.5 / 0.87962566
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.LayerNorm(50, eps=1e-6), nn.Tanh())


def mlp(n_in, n_out):
    """[B, n_in] -> [B, n_out]. Reference code: networks/common.py, gain sqrt 2 also in the last layer."""
    first = orthogonal(nn.Linear(n_in, 256), 2**0.5)
    second = orthogonal(nn.Linear(256, 256), 2**0.5)
    last = orthogonal(nn.Linear(256, n_out), 2**0.5)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def orthogonal(layer, gain):
    """The layer with orthogonal weights and no bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def to_pixels(obs):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W] in 0..1, in the layout of the convolutions."""
    return obs.contiguous(memory_format=torch.channels_last).float() / 255  # moves bytes, not floats


@torch.no_grad()
def act(agent, obs, normal=None):
    """A sample, or without noise the mode. uint8 [B, 3, 64, 64], normal noise [B, A] -> dict of [B, A]."""
    mean, log_std = agent.actor(agent.encoder(to_pixels(obs)))
    if normal is None:
        return {"actions": mean.tanh()}
    actions, _ = squashed_gaussian(mean, log_std, normal)
    return {"actions": actions}


# ---- 5. The method ----
@torch.no_grad()
def sam_perturb(params, rho):
    """Climbs to the worst point nearby, w + rho g / |g|. Returns the tensors of w, unchanged. Paper: 3.2.

    Careful: one norm over all that is perturbed, also over noise scales (sigma) where there are any.
    """
    gradients = [param.grad for param in params]
    scale = rho / (nn.utils.get_total_norm(gradients) + 1e-12)
    saved = [param.data for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.data = torch.addcmul(param, gradient, scale)
    return saved


def sam_restore(params, saved):
    """Goes back to w exactly; subtracting what was added is not exact."""
    for param, before in zip(params, saved, strict=True):
        param.data = before


@torch.no_grad()
def reset_agent(agent, target, optimizer, fresh):
    """Writes a fresh agent over all but the encoder and its Adam. Paper: 5.1; PLASTIC's dmc/train_pixels.py:238-274.

    Careful: projections and temperature are fresh too. The target gets the same fresh critic, but keeps its encoder.
    """
    learned = [*agent.critic.parameters(), *agent.actor.parameters(), agent.log_alpha]
    new = [*fresh.critic.parameters(), *fresh.actor.parameters(), fresh.log_alpha]
    torch._foreach_copy_(learned, new)
    torch._foreach_copy_(list(target.critic.parameters()), list(fresh.critic.parameters()))
    forget_moments(optimizer, learned)


@torch.no_grad()
def forget_moments(optimizer, params):
    """Starts Adam afresh for these parameters, in place: its moments and step counts become zero."""
    for param in params:
        for value in optimizer.state[param].values():
            value.zero_()


def squashed_gaussian(mean, log_std, normal):
    """A sample tanh(mean + std normal) and its log density. [B, A] x 3 -> [B, A], [B]. Paper: SAC, eq. 21.

    Careful: log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) stays finite where tanh rounds to 1.
    """
    u = mean + log_std.exp() * normal
    log_density = -0.5 * normal.square() - log_std - 0.5 * math.log(2 * math.pi)  # of u
    return u.tanh(), (log_density - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)


def critic_targets(rewards, bootstrap, next_q, next_log_probs, alpha):
    """r + gamma (min Q' - alpha log pi). [B], [B], [2, B], [B], [] -> [B]. Paper: arXiv:1812.05905, eq. 3, 5.

    bootstrap: gamma, or 0 after a failure. A time limit is no failure.
    """
    return rewards + bootstrap * (next_q.amin(0) - alpha * next_log_probs)


def random_shift(images, offsets, pad):
    """Moves each image by offsets - pad pixels and repeats its border. [B, C, H, W], int64 [B, 2] -> as images.

    Paper: DrQ, arXiv:2004.13649: pad by repeating the border, then crop at (row, column) = offsets in 0..2 pad.
    """
    batch, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - pad).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:] - pad).clamp(0, width - 1)  # [B, W]
    index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


# ---- 6. Losses, targets, replay ----
PAD = 4  # an image is shifted by at most so many pixels
BLOCK = 8192  # rows of the replay that are on their way between device and disk at once


class Replay:
    """The newest transitions of a run, on the training device. Frames are kept once.

    Row i: the newest frame of observation i, the row where its episode began, the action, its reward, whether
    the episode failed with it. An episode's last observation has a row too, whose action means nothing. Row
    `size` is the observation under way. Row i lies at i modulo the capacity, and in the file at i.
    """

    def __init__(self, capacity, obs_shape, num_actions, args, device, path):
        self.args, self.device, self.path, self.frames_per_stack = args, device, path, obs_shape[0]
        fields = [("frames", np.uint8, obs_shape[1:]), ("starts", np.int64), ("rewards", np.float32)]
        fields += [("actions", np.float32, (num_actions,)), ("dones", bool)]
        self.row = np.dtype(fields)  # as in the file at `path`
        self.rows = {}
        for name in self.row.names:
            self.rows[name] = torch.from_numpy(np.zeros(capacity, self.row[name])).to(device)
        self.capacity, self.ready = capacity, np.zeros(capacity, np.int64)
        self.first_ready = self.past_ready = 0  # between them, modulo the capacity: rows to sample, the oldest first
        self.size = self.start = 0  # start: where this episode began
        self.saved = 0  # rows in the file, without the one under way

    def begin(self, frame):
        """The first observation of an episode. An interrupted one ends here as if by a time limit."""
        if self.start < self.size:
            self.size += 1
        self.start = self.size
        self.observe(frame)

    def observe(self, frame):
        self.rows["frames"][self.size % self.capacity] = torch.as_tensor(frame)
        self.rows["starts"][self.size % self.capacity].fill_(self.start)
        oldest = self.size - self.capacity + self.frames_per_stack  # the stacks of older rows have lost a frame
        while self.first_ready < self.past_ready and self.ready[self.first_ready % self.capacity] < oldest:
            self.first_ready += 1

    def add(self, action, reward, done, next_frame):
        """A transition, and the frame after it: of the same episode, also if it ends there."""
        place = self.size % self.capacity
        self.rows["actions"][place] = torch.as_tensor(action)
        self.rows["rewards"][place].fill_(reward)  # a kernel; an assignment would wait for a copy to the GPU
        self.rows["dones"][place].fill_(done)
        self.ready[self.past_ready % self.capacity] = self.size
        self.past_ready += 1
        self.size += 1
        self.observe(next_frame)

    def sample(self, uniform):
        """Rows of transitions, all equally likely. float64 [B] in 0..1, on the CPU -> int64 [B]."""
        count = self.past_ready - self.first_ready
        places = self.first_ready + (uniform.numpy() * count).astype(np.int64)
        return torch.from_numpy(self.ready[places % self.capacity])

    def gather(self, index):
        """Stacks, actions, rewards and bootstrap factors of some rows. int64 [B] -> dict of [B, ...]."""
        capacity = self.capacity
        both = torch.cat([index, index + 1])
        stacks = both[:, None] + torch.arange(1 - self.frames_per_stack, 1, device=self.device)  # [2B, 3]
        starts = self.rows["starts"][both % capacity]
        stacks = torch.maximum(stacks, starts[:, None])  # the first frame of an episode is repeated
        obs, next_obs = self.rows["frames"][stacks % capacity].chunk(2)
        actions, rewards = self.rows["actions"][index % capacity], self.rows["rewards"][index % capacity]
        bootstrap = self.args.gamma * ~self.rows["dones"][index % capacity]
        batch = {"obs": obs, "next_obs": next_obs, "actions": actions}
        return {**batch, "rewards": rewards, "bootstrap": bootstrap}

    def state_dict(self):
        """Appends the new rows to the file and flushes them to disk; returns all the rest."""
        first = max(self.saved, self.size + 1 - self.capacity)  # rows lost before a save leave a hole
        places = torch.arange(first, self.size + 1, device=self.device) % self.capacity
        if not self.rows["rewards"][places].isfinite().all():
            sys.exit(f"error: a reward is not finite at step {self.size} or before; {self.path} is as it was")
        self.path.touch()
        with open(self.path, "r+b") as file:
            # The row that was under way at the last save is always in the file: its checkpoint needs it.
            file.truncate((self.saved + 1) * self.row.itemsize)  # what follows belongs to no checkpoint
            file.seek(first * self.row.itemsize)
            for block in places.split(BLOCK):
                rows = np.empty(len(block), self.row)
                for name, values in self.rows.items():
                    rows[name] = values[block].cpu()
                file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.size
        return {"size": self.size, "start": self.start}

    def load_state_dict(self, state):
        """Takes the state and reads its newest rows back from the file, with the one under way."""
        self.size, self.start = state["size"], state["start"]
        if not self.path.is_file() or self.path.stat().st_size < (self.size + 1) * self.row.itemsize:
            fail(f"{self.path} does not hold the {self.size + 1} rows of the checkpoint")
        stored = np.memmap(self.path, self.row, "r", shape=self.size + 1)
        numbers = np.arange(max(self.size + 1 - self.capacity, 0), self.size + 1)
        for first in range(0, len(numbers), BLOCK):
            block = numbers[first : first + BLOCK]
            for name, values in self.rows.items():
                part = torch.from_numpy(stored[name][block]).to(self.device)
                values[torch.from_numpy(block % self.capacity)] = part
        starts = stored["starts"][numbers]
        ready = numbers[:-1][starts[:-1] == starts[1:]]  # the next row is of the same episode
        ready = ready[ready >= self.size - self.capacity + self.frames_per_stack]  # as `observe` has it
        self.ready[: len(ready)] = ready
        self.first_ready, self.past_ready = 0, len(ready)
        self.saved = self.size


# ---- 7. Update ----
def update(agent, target, optimizer, replay, draws, args):
    """One gradient step of critic, actor and temperature, and the target's step -> dict of detached [].

    draws: rows [B] of the replay, offsets [2, B, 2] of observations and next ones, and for the actions in both
    normal [2, B, A]. SAM's two passes share all of it, and the targets. Reference code: the order of the steps.
    """
    batch = replay.gather(draws["rows"])
    obs = to_pixels(random_shift(batch["obs"], draws["offsets"][0], PAD))
    next_obs = to_pixels(random_shift(batch["next_obs"], draws["offsets"][1], PAD))
    alpha = agent.log_alpha.detach().exp()
    with torch.no_grad():
        mean, log_std = agent.actor(agent.encoder(next_obs))
        next_actions, next_log_probs = squashed_gaussian(mean, log_std, draws["normal"][1])
        next_q = target.critic(target.encoder(next_obs), next_actions)
        targets = critic_targets(batch["rewards"], batch["bootstrap"], next_q, next_log_probs, alpha)
    parts = {}

    def descend(name, loss_of, params, sam):
        """Adam on the gradient at the worst point nearby, or here. loss_of() -> loss [], dict of parts []."""
        for climbing in [True, False] if sam else [False]:
            loss, about = loss_of()
            optimizer.zero_grad()  # Adam leaves what has no gradient as it is, moments included
            loss.backward(inputs=params)
            if climbing:
                saved = sam_perturb(params, args.sam_rho)
        parts.update(about)
        parts[f"{name}_loss"] = loss.detach()
        parts[f"{name}_grad_norm"] = nn.utils.get_total_norm([param.grad for param in params])
        if sam:
            sam_restore(params, saved)
        optimizer.step()

    def critic_loss():
        q = agent.critic(agent.encoder(obs), batch["actions"])  # [2, B]
        qf1_values, qf2_values = q.detach().mean(1)
        about = {"qf1_values": qf1_values, "qf2_values": qf2_values}
        return (q - targets).square().sum(0).mean(), about

    critic = [*agent.encoder.parameters(), *agent.critic.parameters()]
    descend("qf", critic_loss, critic, args.sam and args.sam_on != "actor")
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), critic, args.tau)
        hidden = agent.encoder(obs)  # Careful: the actor sees through the new encoder, and never changes it.

    def actor_loss():
        actions, log_probs = squashed_gaussian(*agent.actor(hidden), draws["normal"][0])
        q = agent.critic(hidden, actions).amin(0)
        return (alpha * log_probs - q).mean(), {"entropy": -log_probs.detach().mean()}

    descend("actor", actor_loss, list(agent.actor.parameters()), args.sam and args.sam_on != "critic")

    def alpha_loss():
        alpha = agent.log_alpha.exp()
        surplus = parts["entropy"] + draws["normal"].shape[-1]  # Reference code: drq_learner.py:91, minus A
        return alpha * surplus, {"alpha": alpha.detach()}

    descend("alpha", alpha_loss, [agent.log_alpha], False)  # with the entropy of the actor's last pass
    return parts


class Captured:
    """A function of tensors -> {name: tensor}. If `on`: three plain calls, then one CUDA graph, in the memory `pool`.

    Graphs can share a pool, because nothing that one leaves in it is read after another's replay.
    """

    def __init__(self, function, on, pool=None):
        self.function, self.on, self.pool, self.calls, self.graph = function, on, pool, 0, None
        self.stream = torch.cuda.Stream() if on else None

    def __call__(self, *inputs):
        if not self.on:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= 3:  # torch wants a few calls on another stream before it records
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs, self.graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.outputs = self.function(*self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            if own.shape != given.shape:
                raise ValueError(f"recorded with {own.shape}, called with {given.shape}")
            own.copy_(given)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}  # a replay overwrites the outputs


# ---- 8. Training and evaluation ----
def train(args, make_envs=make_envs, make_agent=Agent):
    """Trains and returns the agent. Pass your own factories to change the environments or the network."""
    args, device = set_up_torch(check(args))
    run = Run(args)
    envs = make_envs(args, "train", run.step)
    obs_shape, num_actions = envs.single_observation_space.shape, envs.single_action_space.shape[0]
    seeds = np.random.SeedSequence(args.seed).generate_state(5).tolist()
    torch.manual_seed(seeds[0])
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds[1:]]
    explore_rng, sample_rng, noise_rng, augment_rng = rngs
    agent = make_agent(envs, args).to(device)
    target = nn.ModuleDict({"encoder": agent.encoder, "critic": agent.critic})
    target = copy.deepcopy(target).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    replay = Replay(args.buffer_size, obs_shape, num_actions, args, device, run.folder / "replay.bin")
    parts = {"agent": agent, "target": target, "optimizer": optimizer, "replay": replay}
    parts.update(explore_rng=explore_rng, sample_rng=sample_rng, noise_rng=noise_rng)
    parts.update(augment_rng=augment_rng, torch_rng=torch.default_generator)
    run.restore(parts)
    graphs = args.cuda_graphs and device.type == "cuda"
    optimizer.param_groups[0]["capturable"] = graphs  # the checkpoint's may be of another device

    def draw():
        """The random numbers of an update, each kind from its own stream."""
        rows = replay.sample(torch.rand(args.batch_size, dtype=torch.float64, generator=sample_rng))
        offsets = torch.randint(2 * PAD + 1, (2, args.batch_size, 2), generator=augment_rng)
        normal = torch.randn(2, args.batch_size, num_actions, generator=noise_rng)
        return [values.to(device, non_blocking=True) for values in (rows, offsets, normal)]

    def learn(rows, offsets, normal):
        draws = {"rows": rows, "offsets": offsets, "normal": normal}
        return update(agent, target, optimizer, replay, draws, args)

    def measure():
        """The online network's active units on 512 transitions, as in the paper. --eval-seed draws them."""
        uniform = torch.rand(512, dtype=torch.float64, generator=torch.Generator().manual_seed(args.eval_seed))
        batch = replay.gather(replay.sample(uniform).to(device))
        pixels = to_pixels(batch["obs"])

        def forward():
            hidden = agent.encoder(pixels)
            agent.critic(hidden, batch["actions"])
            agent.actor(hidden)

        shares = active_units(agent, forward)
        return {f"charts/active_{name}": share for name, share in shares.items()}

    learner, policy = Captured(learn, graphs), Captured(partial(act, agent), graphs)
    obs, _ = envs.reset()
    replay.begin(obs[0, -1])
    rewards, losses, seconds = [], [], 0.0  # since the last log line
    with run:
        while True:
            last = run.step >= args.total_timesteps
            if run.evaluation_due():  # also after a resume, if it was interrupted
                start = time.monotonic()
                episodes = final_episodes(args) if last else args.eval_episodes
                run.say(f"evaluating, {episodes} episodes")
                run.log(compare([agent], replace(args, eval_episodes=episodes), make_envs, run.tick))
                run.log({"charts/eval_episodes": episodes, "charts/eval_seconds": time.monotonic() - start})
                run.log({"charts/hours": run.hours()})
                if run.step >= args.learning_starts:
                    run.log(measure())
                run.evaluated = run.step
            if last:
                break

            # Act.
            start = time.monotonic()
            if run.step < args.learning_starts:
                actions = torch.rand(1, num_actions, generator=explore_rng) * 2 - 1
            else:
                normal = torch.randn(1, num_actions, generator=explore_rng)
                actions = policy(torch.as_tensor(obs).to(device), normal.to(device))["actions"]
            actions = actions.cpu().numpy()

            # Learn. Deviation: before the environment steps, so that a GPU learns while it does.
            if run.step >= args.learning_starts:
                first = args.replay_ratio * (run.step - args.learning_starts) + 1
                for number in range(first, first + args.replay_ratio):
                    losses.append(learner(*draw()))
                    due = args.reset_every > 0 and number % args.reset_every == 0
                    if due and run.step + 1 < args.total_timesteps:
                        reset_agent(agent, target, optimizer, make_agent(envs, args).to(device))

            # Step.
            obs, reward, terminated, truncated, info = envs.step(actions)
            ended = bool(terminated[0] | truncated[0])
            replay.add(actions[0], float(reward[0]), bool(terminated[0]), info["final_obs"][0, -1])
            if ended:
                replay.begin(obs[0, -1])
            rewards.append(float(reward[0]))
            run.step += 1
            seconds += time.monotonic() - start  # without evaluating and saving

            # Log and save.
            for _, episode_return, length in info["episodes"]:
                run.log({"charts/episodic_return": episode_return, "charts/episodic_length": length})
            exact = ended and run.passed(args.exact_every, run.exact_step)
            if exact or run.step % 1000 == 0 or run.step >= args.total_timesteps:
                run.log({"charts/reward": sum(rewards) / len(rewards)})
                run.log({"charts/frames": args.action_repeat * run.step})
                run.log({"charts/SPS": len(rewards) / seconds})
                if losses:
                    for key, value in default_collate(losses).items():
                        run.log({f"losses/{key}": value.mean().item()})
                rewards, losses, seconds = [], [], 0.0
            run.tick(1)
            if exact:  # in every run, resumed or not
                envs.close()
                envs = make_envs(args, "train", run.step)
                obs, _ = envs.reset()
                replay.begin(obs[0, -1])
                run.save(exact=True)
            elif run.save_due():
                run.save()
        run.save()
    envs.close()
    return agent


def final_episodes(args):
    """Episodes of the last evaluation. By default fewer in a run so short that they would take longer than it."""
    return args.final_eval_episodes or min(10, max(2, args.total_timesteps // 200))


def evaluate(agent, args, make_envs, split, tick=lambda: None):
    """Returns [args.eval_episodes] of greedy episodes, drawn by args.eval_seed.

    Reference code: evaluation.py, the mode of the distribution. No random stream of training is touched.
    """
    envs = make_envs(replace(args, seed=args.eval_seed, num_envs=1), split)
    device, returns = next(agent.parameters()).device, []
    bar = tqdm(total=args.eval_episodes, desc=f"evaluation, {split}", leave=False, disable=None)
    agent.eval()
    obs, _ = envs.reset()
    while len(returns) < args.eval_episodes:
        actions = act(agent, torch.as_tensor(obs).to(device))["actions"]
        obs, _, _, _, info = envs.step(actions.cpu().numpy())
        for _, episode_return, _ in info["episodes"]:
            returns.append(episode_return)
            bar.update()
        tick()
    bar.close()
    envs.close()
    agent.train()
    return np.array(returns)


def compare(agents, args, make_envs, tick=lambda: None):
    """{key: number} to log: the mean return of the one agent."""
    return {"eval/test_return": float(evaluate(agents[0], args, make_envs, "test", tick).mean())}


@torch.no_grad()
def active_units(network, forward):
    """Shares of the units behind ReLUs that are not zero in forward(), without noise. Paper: 5.1.

    {name: share} of each nn.ReLU, however the network is changed, and of each child of the network that holds some.
    """
    layers, hooks = {}, []

    def note(name, module, inputs, output):
        layers[name] = (output != 0).flatten()

    for name, module in network.named_modules():
        if isinstance(module, nn.ReLU):
            hooks.append(module.register_forward_hook(partial(note, name)))
    network.eval()
    forward()
    network.train()
    for hook in hooks:
        hook.remove()
    shares = {name: active.float().mean().item() for name, active in layers.items()}
    for part, _ in network.named_children():
        inside = [active for name, active in layers.items() if name.startswith(f"{part}.")]
        if inside:
            shares[part] = torch.cat(inside).float().mean().item()
    return shares


# ---- 9. Checkpoints, logs, command line ----
class Run:
    """A run: its step, its folder, the `parts` that its checkpoints hold, its log and its progress bar.

    Environments cannot be saved. They start afresh after a resume, and in every run at multiples of
    --exact-every. A run resumed from such a point repeats the uninterrupted one bit for bit.
    """

    def __init__(self, args):
        self.args, self.handlers, self.stop = args, {}, 0
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = Path(args.resume or Path(args.runs_dir) / name)
        self.about = describe(args)
        self.state = {"step": 0, "evaluated": 0, "exact_step": 0, "exact": True, "metrics_bytes": 0}
        if args.resume:
            self.state = load_checkpoint(self.folder)
            before, now = self.state["about"], self.about
            for name, value in now["args"].items():
                if value != before["args"][name]:
                    now["sessions"][0]["changed"][name] = value
                    if not name.startswith(MAY_CHANGE):
                        fail(f"--{name.replace('_', '-')} is {before['args'][name]} in that run and stays so")
            self.about = {**before, "args": now["args"], "sessions": before["sessions"] + now["sessions"]}
        self.step = self.state["step"]  # steps of each agent
        self.evaluated = self.state["evaluated"]  # step of the last evaluation
        self.exact_step = self.state["exact_step"]  # step at which environments started afresh
        self.exact = self.state["exact"]  # nothing was played or learned since then
        self.earlier, self.began = self.state.get("hours", 0.0), time.monotonic()  # earlier: hours of other sessions
        if self.step >= args.total_timesteps and not self.evaluation_due():
            fail(f"{self.folder} is finished at step {self.step}: raise --total-timesteps")

    def restore(self, parts):
        """Takes what checkpoints hold; if the run is resumed, gives these parts their state back."""
        self.parts = parts
        self.about["parameters"] = 0  # that learn
        for optimizer in [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]:
            for group in optimizer.param_groups:
                self.about["parameters"] += sum(param.numel() for param in group["params"] if param.requires_grad)
        if self.args.resume:
            for name, part in parts.items():
                load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
                try:
                    load(self.state[name])
                except (RuntimeError, ValueError, KeyError) as error:  # a changed network, or a changed task
                    reason, _, _ = str(error).partition("\n")
                    fail(f"{self.folder} is not of this script as it is now, but of its copy there: {name}: {reason}")
            before, now = self.about["sessions"][-2:]
            other = [key for key in ("hardware", "python", "packages", "script") if before[key] != now[key]]
            how = "bit for bit" if self.exact and not other else "continued, in fresh environments"
            changed = f" (changed: {', '.join(other)})" if other else ""
            print(f"step {self.step}: {how}{changed}", flush=True)

    def __enter__(self):
        """Opens the files. From here on, a signal ends the run at its next tick, with a checkpoint."""
        if self.args.track:
            import wandb

            about = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            about.update(id=self.folder.name, name=self.folder.name, config=asdict(self.args))
            try:
                self.wandb = wandb.init(**about, resume="allow", sync_tensorboard=True)
            except Exception as error:  # no account, no network, a name it refuses
                reason, _, _ = str(error).partition("\n")
                fail(f"--track: {reason}")
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
            self.metrics = open(self.folder / "metrics.csv", "a", buffering=1)
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")
        try:
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{self.folder} cannot be written: another process is running it")
        except OSError as error:
            print(f"warning: a second process on this run would not be noticed: {error.strerror}", flush=True)
        if self.args.resume:  # what was logged after the checkpoint is done again
            self.metrics.truncate(self.state["metrics_bytes"])
        else:
            self.metrics.write("step,key,value\n")
        write_whole(self.folder / Path(__file__).name, Path(__file__).read_bytes())
        write_whole(self.folder / "args.json", json.dumps(self.about, indent=1).encode())
        self.state = None  # it holds all weights once more
        self.events = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        print(self.folder, flush=True)
        self.saved_at = time.monotonic()
        self.bar = tqdm(initial=self.step, total=self.args.total_timesteps, unit_scale=True, disable=None)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # SIGUSR1: Slurm's time is nearly over
                self.handlers[number] = signal.signal(number, self.on_signal)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for part in (self.bar, self.metrics, self.events):
            part.close()
        if self.args.track:
            self.wandb.finish()

    def on_signal(self, number, _):
        """The run saves and ends at its next tick; a second signal ends it at once."""
        self.stop = number
        signal.signal(number, self.handlers[number])

    def tick(self, steps=0):
        """Counts steps played or learned from. The state is whole here, so here a signal ends the run."""
        self.exact = self.exact and steps == 0
        self.bar.update(steps)
        if self.stop:
            self.save()
            name = signal.Signals(self.stop).name
            print(f"stopped by {name}; continue with --resume {self.folder}", flush=True)
            sys.exit(128 + self.stop)

    def log(self, values):
        """Writes {key: number} to metrics.csv and TensorBoard. One that is not finite ends the program."""
        for key, value in values.items():
            if not np.isfinite(value):
                self.fail(f"{key} is {value}")
            self.metrics.write(f"{self.step},{key},{value}\n")
            self.events.add_scalar(key, value, self.step)
            if key in ("charts/episodic_return", "eval/test_return"):
                self.say(f"{key} {value:.2f}")

    def say(self, text):
        self.bar.clear()
        print(f"step {self.step}: {text}", flush=True)

    def fail(self, what):
        sys.exit(f"error: {what} at step {self.step}; what was saved in {self.folder} is from before")

    def passed(self, every, last):
        """Whether a multiple of `every` (0: never) was passed since the step `last`."""
        return every > 0 and self.step // every > last // every

    def hours(self):
        """Of all sessions, with evaluations."""
        return self.earlier + (time.monotonic() - self.began) / 3600

    def evaluation_due(self):
        every, last = self.args.eval_every, self.step >= self.args.total_timesteps
        return self.passed(every, self.evaluated) or (last and every > 0 and self.step > self.evaluated)

    def save_due(self):
        late = time.monotonic() > self.saved_at + 60 * self.args.save_minutes
        return (late and self.args.save_minutes > 0) or self.step >= self.args.total_timesteps

    def save(self, exact=False):
        """Writes checkpoint.pt. exact: environments have just started afresh."""
        if exact:
            self.exact, self.exact_step = True, self.step
        state = {"script": Path(__file__).stem, "step": self.step, "evaluated": self.evaluated}
        state.update(exact=self.exact, exact_step=self.exact_step, hours=self.hours())
        for name, part in self.parts.items():
            save = part.get_state if isinstance(part, torch.Generator) else part.state_dict
            state[name] = save()
            for value in tree_leaves(state[name]):
                number = isinstance(value, torch.Tensor | float)
                if number and not torch.as_tensor(value).isfinite().all():
                    self.fail(f"{name} is not finite")
        os.fsync(self.metrics.fileno())
        state["metrics_bytes"] = os.path.getsize(self.metrics.name)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())
        self.saved_at = time.monotonic()


def write_whole(path, data):
    """Writes a file whole or not at all: beside its place, flushed to disk, then renamed."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_checkpoint(folder):
    """The state in a run's checkpoint.pt; "about" is what its args.json says."""
    try:
        state = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
        state["about"] = json.loads((Path(folder) / "args.json").read_text())
        if os.path.getsize(Path(folder) / "metrics.csv") < state["metrics_bytes"]:
            raise ValueError("metrics.csv has lost lines since the checkpoint")
        if state["script"] != Path(__file__).stem:
            raise ValueError(f"it is a run of {state['script']}.py")
    except Exception as error:
        fail(f"{folder} is no run that can be read: {str(error).splitlines()[0]}")
    return state


def load_agents(args, state, make_envs=make_envs, make_agent=Agent):
    """The agent of a checkpoint in a list, for `evaluate` and `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(replace(args, num_envs=1), "test")
    agent = make_agent(envs, args).to(device)
    agent.load_state_dict(state["agent"])
    envs.close()
    return [agent]


def describe(args):
    """What args.json says: all that it takes to make the run again, with a session for each start."""
    script = Path(__file__).resolve()
    git = f"git -C '{script.parent}' describe --always --dirty --abbrev=40 --exclude '*' 2>&1"
    said = subprocess.getoutput(git)
    if "dubious ownership" in said:
        print(f"warning: git does not trust the owner of {script.parent}, so no commit is recorded", flush=True)
    commit = re.search(r"(?m)^[0-9a-f]{40}(-dirty)?$", said)
    cpu = "{ lscpu | sed -n 's/^Model name: *//p' | grep . || sysctl -n machdep.cpu.brand_string; } 2>/dev/null"
    gpu = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else None
    hardware = {"gpu": gpu, "cpu": subprocess.getoutput(cpu), "cores": os.cpu_count()}
    hardware["torch_threads"] = torch.get_num_threads()
    command = sys.argv
    if "ipykernel" in sys.modules or hasattr(sys, "ps1"):  # called from a notebook or a prompt
        command = [script.name, repr(args)]
    about = {"command": command, "commit": commit[0] if commit else "", "hardware": hardware}
    about["script"] = hashlib.sha256(script.read_bytes()).hexdigest()
    about["python"] = platform.python_version()
    about["packages"] = {package.name: package.version for package in distributions()}
    session = {**about, "changed": {}}  # changed: the arguments that a resume changed
    return {**about, "args": json.loads(json.dumps(asdict(args))), "sessions": [session]}


def set_up_torch(args):
    """The arguments with a definite precision, and the device; sets torch's global switches."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.precision == "auto":
        args = replace(args, precision="tf32" if device.type == "cuda" else "fp32")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{args.precision} on {name}", flush=True)
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"  # convolutions
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    return args, device


# Arguments that a resumed run may change begin with these: nothing that is learned depends on them.
MAY_CHANGE = ("resume", "total_timesteps", "eval_every", "eval_episodes", "eval_seed", "final_eval_", "save_")
MAY_CHANGE += ("runs_dir", "cuda", "track", "wandb_")
POSITIVE = ("replay_ratio", "num_envs", "learning_starts", "batch_size", "eval_episodes")
SMALLEST = {**dict.fromkeys(POSITIVE, 1), "initial_alpha": 1e-6, "buffer_size": 8}
LARGEST = dict.fromkeys(("gamma", "tau", "num_envs"), 1)


def check(args):
    """The arguments in one spelling. Ends the program with one line if one of them makes no sense."""
    for name, value in vars(args).items():
        low, high = SMALLEST.get(name, 0), LARGEST.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            most = f" to {high}" if high < sys.maxsize or value > high else ""
            fail(f"--{name.replace('_', '-')} {value}: from {low}{most}")
    try:
        task = task_of(args.env_id)
    except ValueError as error:
        fail(f"--env-id {error}")
    repeat = args.action_repeat or ACTION_REPEAT.get(task, 2)
    steps = args.total_timesteps or FRAMES // repeat
    size, folder = 64 * 64 * steps, args.runs_dir if Path(args.runs_dir).exists() else "."
    if size > shutil.disk_usage(folder).free and not args.resume:
        fail(f"--total-timesteps: {size >> 20} MB of replay do not fit on the disk")
    if "/" in args.exp_name or not args.exp_name.isprintable():
        fail(f"--exp-name {args.exp_name!r}: is part of a folder's name, so no slash and no line break")
    if args.track and set(args.exp_name) & set(":;,#?'"):
        fail(f"--exp-name {args.exp_name}: is part of a W&B id, which cannot contain any of : ; , # ? '")
    if args.cuda_required and not torch.cuda.is_available():
        fail("--cuda-required: torch finds no GPU here")
    if args.track and not getattr(find_spec("wandb"), "origin", None):  # a mere folder called wandb has none
        fail("--track: pip install wandb")
    rho = args.sam_rho or SAM_RHO.get(task, 0.01)
    return replace(args, env_id=task, action_repeat=repeat, total_timesteps=steps, sam_rho=rho)


def fail(message):
    """Ends the program as a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(flags=None, make_envs=make_envs, make_agent=Agent):
    """The command line, or `flags` in its place. A resumed run begins with its last arguments."""
    args = tyro.cli(Args, args=flags)
    if args.resume:
        saved = load_checkpoint(args.resume)["about"]["args"]
        if saved.keys() != vars(args).keys():
            fail(f"{args.resume} is a run of another version of {Path(__file__).name}")
        args = tyro.cli(Args, args=flags, default=Args(**saved))
    try:
        return train(args, make_envs, make_agent)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason, _, _ = str(error).partition("\n")
        fail(f"out of memory: {reason}")


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread fails on a full disk too
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}; what was saved before is whole")
    except KeyboardInterrupt:  # before training, or a second one
        sys.exit("stopped at once; what was saved before is whole")
