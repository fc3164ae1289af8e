# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "dm_control==1.0.50", "gymnasium==1.4.0", "mujoco==3.17.0", "numpy==2.4.6", "tensorboard==2.21.0",
#     "torch==2.14.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""SAC from pixels + SAM + Reset on DeepMind Control: soft actor-critic on shifted frames that does not lose plasticity.
Critic and actor take their gradients at the worst point nearby (sharpness-aware minimisation), which keeps the encoder
open to new inputs; every so often all but the encoder is drawn anew, which keeps it open to new targets.

Paper: Lee et al. 2023, Enhancing Generalization and Plasticity for Sample Efficient Reinforcement Learning (PLASTIC),
arXiv:2306.10711.
Checked against github.com/evgenii-nikishin/rl_with_resets (502ec52), on whose code the paper's is built, and for SAM
against the paper: its authors' repository holds later variants of both networks and SAM.
Deviations: a batch never holds the newest transition, so that environment and update can run side by side; an episode's
last observation takes a row of the replay, which holds a transition an episode less; resets count updates, not steps,
and come 999 steps later; evaluations play the same ten episodes each time, whatever the run's seed, not new ones.

    python algos/sac_sam_reset.py --env-id cheetah-run                           # the paper: 2M frames, 500k steps
    python algos/sac_sam_reset.py --env-id cheetah-run --no-sam --reset-every 0  # its baseline, SAC
    python algos/sac_sam_reset.py --env-id cheetah-run --sam-on critic
    python algos/sac_sam_reset.py --resume runs/<folder>                         # go on where a run stopped
    python algos/sac_sam_reset.py --evaluate runs/<folder>                       # 10 episodes
"""

# ---- 1. Imports ----
import copy
import ctypes
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

# Easy to miss: before torch is imported. glibc gives large blocks back to the kernel after each operation and faults
# them in again, up to half of a run on a CPU; with these M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) it keeps them.
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if libc.mallopt(-3, 2**30):  # an old glibc refuses it, and then the other one alone would do harm
        libc.mallopt(-1, 2**31 - 1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat a result bit for bit

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---- 2. Arguments ----
@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # second part of the run folder's name
    seed: int = 1  # one seed, one run (same machine, packages and number of threads)
    torch_deterministic: bool = True  # only kernels that repeat bit for bit
    cuda: bool = True  # use a GPU if there is one
    cuda_required: bool = False  # refuse to run without a GPU
    cuda_graphs: bool = True  # on a GPU: record acting and learning once and replay them
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # of the encoder (auto: tf32 on a GPU, else fp32)
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "holdout"  # project for --track
    wandb_entity: str | None = None  # team for --track
    runs_dir: str = "runs"  # where run folders are made
    save_minutes: float = 5.0  # minutes between safety checkpoints (0: never)
    exact_every: int = 10_000  # steps between bit-for-bit checkpoints, where environments start afresh (0: never)
    resume: str | None = None  # run folder or checkpoint to go on from
    evaluate: str | None = None  # run folder or checkpoint to evaluate, without training
    eval_every: int = 5_000  # steps between evaluations (0: never)
    eval_episodes: int = 10  # episodes an evaluation, agent and set of levels
    final_eval_episodes: int = 10  # episodes of the last evaluation
    eval_seed: int = 42  # draws the evaluated levels, the same ones each time

    env_id: str = "cheetah-run"  # the game (or its EnvPool id) or task; a wrong one is told the right ones
    action_repeat: int = 0  # frames a step (0: the task's)
    total_timesteps: int = 0  # steps an agent (PPO: rounded up to whole rollouts; DMC, 0: the paper's)
    # Paper: the method.
    sam: bool = True  # sharpness-aware minimisation; off: plain Adam
    sam_rho: float = 0.0  # rho, length of the step to the worst point nearby (DMC: 0, the task's)
    sam_on: Literal["both", "critic", "actor"] = "both"  # whose loss takes that step
    reset_every: int = 100_000  # updates between resets of the head (0: never)
    replay_ratio: int = 1  # updates a step
    # Paper: SAC, Table 5. Reference code, where it is silent: configs/drq.py and train_pixels.py.
    num_envs: int = 1  # N, parallel environments an agent
    learning_starts: int = 999  # random steps before the first update
    buffer_size: int = 100_000  # observations that the replay holds; then the oldest ones go (DrQ-v2: 0, the task's)
    batch_size: int = 512  # B, transitions an update (DrQ-v2: 0, the task's)
    gamma: float = 0.99  # discount
    initial_alpha: float = 0.1  # alpha, weight of the entropy, at first and after each reset
    tau: float = 0.005  # share of the online network that flows into the target network at each update
    learning_rate: float = 3e-4  # Adam
    adam_eps: float = 1e-8  # Adam's epsilon


# ---- 3. Environments ----
# The tasks of dm_control's suite, but for lqr, which has no time limit and whose actions have no bounds.
SUITE = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "stand walk trot run fetch",
    "finger": "spin turn_easy turn_hard",
    "fish": "upright swim",
    "hopper": "stand hop",
    "humanoid": "stand walk run run_pure_state",
    "humanoid_CMU": "stand walk run",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "walk run escape fetch",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "stand walk run",
}
# (frames a step, rho) of DMC-M, the paper's eleven tasks (10.2). Reference code: train_pixels.py:41-48; rho is that
# of PLASTIC's dmc/train_pixels.py:55, which sets cheetah apart where the paper's text sets quadruped apart.
DMC_M = {
    "acrobot-swingup": (2, 0.01),
    "cartpole-swingup_sparse": (2, 0.01),
    "cheetah-run": (4, 0.002),
    "finger-turn_easy": (2, 0.01),
    "finger-turn_hard": (2, 0.01),
    "hopper-hop": (2, 0.01),
    "quadruped-run": (2, 0.01),
    "quadruped-walk": (2, 0.01),
    "reacher-easy": (4, 0.01),
    "reacher-hard": (2, 0.01),
    "walker-run": (2, 0.01),
}
PLANET = {"cartpole-swingup": 8, "ball_in_cup-catch": 4}  # PlaNet's frames a step, where not 2 nor above
FRAMES = 2_000_000  # of a run. Paper: 7.4


def task_of(env_id):
    """("finger", "turn_hard") from finger-turn_hard, finger_turn_hard or finger-turn-hard. Errors: ValueError."""
    tasks = {(domain, task) for domain, line in SUITE.items() for task in line.split()}
    names = {f"{domain}_{task}".lower(): (domain, task) for domain, task in sorted(tasks)}
    name = env_id.lower().replace("-", "_")
    if name not in names:
        nearest = "-".join(names[difflib.get_close_matches(name, names, n=1, cutoff=0)[0]])
        raise ValueError(f"{env_id}: no such task, {nearest} is nearest of {' '.join(map('-'.join, names.values()))}")
    return names[name]


def definite(args):
    """The arguments with the task's own values where they are 0, and its name in one spelling."""
    try:
        task = "-".join(task_of(args.env_id))
    except ValueError as error:
        fail(f"--env-id {error}")
    repeat, rho = DMC_M.get(task, (PLANET.get(task, 2), 0.01))
    repeat = args.action_repeat or repeat
    steps = args.total_timesteps or FRAMES // repeat
    about = {"action_repeat": repeat, "sam_rho": args.sam_rho or rho, "total_timesteps": steps}
    return dataclasses.replace(args, env_id=task, **about)


@cache
def import_suite():
    """dm_control's suite, with a renderer that works here. Easy to miss: it cannot be changed after the import."""
    probe = "import mujoco as m; c = m.GLContext(8, 8); c.make_current()"
    probe += "; m.MjrContext(m.MjModel.from_xml_string('<mujoco/>'), 100); c.free()"
    wanted = os.environ.get("MUJOCO_GL")
    for name in (wanted,) if wanted else ("egl", "osmesa"):
        environment = os.environ | {"MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            from dm_control import suite

            return suite
    if wanted:
        fail(f"MUJOCO_GL={wanted} cannot render here; without it, egl and osmesa are tried")
    fail("nothing to render with; on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri")


def make_envs(args, split, restart=0):
    """args.num_envs copies of the task, drawn by (args.seed, split, restart); "test" differs by its seeds alone.

    reset() -> obs uint8 [N, 3, 64, 64], the last three frames in gray, the first one repeated; info.
    step(actions float32 [N, A] in -1..1) -> obs, reward float32 [N], summed over args.action_repeat frames, terminated
    bool [N], truncated bool [N] (by the time limit), info.
    An episode's end is followed by the next episode in the same step: obs is then the new one's first observation, and
    info["final_obs"] [N, 3, 64, 64] holds the last one of the old; it is obs where no episode ended.
    """
    suite, (domain, task) = import_suite(), task_of(args.env_id)
    seeds = np.random.SeedSequence((args.seed, int(split == "test"), restart)).generate_state(args.num_envs)
    tasks = [suite.load(domain, task, task_kwargs={"random": int(seed)}) for seed in seeds]
    return ControlEnvs(tasks, args.action_repeat, camera=2 if domain == "quadruped" else 0)


class ControlEnvs:
    """dm_control's environments with stacks of gray frames and repeated actions; an end begins the next episode."""

    def __init__(self, envs, repeat, camera):
        import gymnasium as gym

        spec = envs[0].action_spec()
        self.envs, self.repeat, self.camera, self.low, self.high = envs, repeat, camera, spec.minimum, spec.maximum
        self.single_observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.single_action_space = gym.spaces.Box(-1, 1, spec.shape, np.float32)

    def reset(self):
        for env in self.envs:
            env.reset()
        self.obs = np.stack([self.first(env) for env in self.envs])
        return self.obs, {}

    def step(self, actions):
        count = len(self.envs)
        rewards, terminated, truncated = np.zeros(count, np.float32), np.zeros(count, bool), np.zeros(count, bool)
        frames = np.empty((count, 1, 64, 64), np.uint8)
        for n, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            for _ in range(self.repeat):
                moment = env.step(self.low + (action.astype(np.float64) + 1) / 2 * (self.high - self.low))
                rewards[n] += moment.reward
                if moment.last():
                    terminated[n], truncated[n] = moment.discount == 0, moment.discount != 0
                    break
            frames[n] = self.frame(env)
        final_obs = np.concatenate([self.obs[:, 1:], frames], axis=1)
        self.obs = final_obs.copy()
        for n in np.flatnonzero(terminated | truncated):
            self.envs[n].reset()
            self.obs[n] = self.first(self.envs[n])
        return self.obs, rewards, terminated, truncated, {"final_obs": final_obs}

    def frame(self, env):
        """Reference code: wrappers/rgb2gray.py, the fractions of gray are cut off."""
        pixels = env.physics.render(64, 64, camera_id=self.camera)
        return np.dot(pixels, [0.299, 0.587, 0.114]).astype(np.uint8)

    def first(self, env):
        return np.repeat(self.frame(env)[None], 3, axis=0)

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
        for n_in, n_out in pairwise((channels, 32, 64, 128, 256)):
            layers += orthogonal(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), 2**0.5), nn.ReLU(inplace=True)
        self.encoder = Encoder(*layers, nn.Flatten(), bf16=args.precision == "bf16")  # [B, 4096]
        self.critic = Critic(4096, num_actions)
        self.actor = Actor(4096, num_actions)
        self.log_alpha = nn.Parameter(torch.tensor(args.initial_alpha).log())  # of the temperature
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU


class Encoder(nn.Sequential):
    """Layers that may run in bf16, on pictures turned by half a turn. [B, 3, 64, 64] in 0..1 -> float32 [B, 4096].

    Easy to miss: at stride 2 Flax's SAME pads behind alone, and padding=1 in effect before alone. On turned pictures
    the second is the first, kernels turned too; a padding by itself would take a fifth of the time.
    """

    def __init__(self, *layers, bf16):
        super().__init__(*layers)
        self.bf16 = bf16

    def forward(self, pixels):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return super().forward(pixels.flip(2, 3)).float()


class Critic(nn.Module):
    """Two estimates of the return, on one projection of their own. [B, n_in], [B, A] -> [2, B]."""

    def __init__(self, n_in, num_actions):
        super().__init__()
        self.project = projection(n_in)  # [B, 50]
        self.q1, self.q2 = (mlp(50 + num_actions, 1) for _ in range(2))

    def forward(self, hidden, actions):
        inputs = torch.cat([self.project(hidden), actions], dim=1)
        return torch.stack([self.q1(inputs), self.q2(inputs)]).squeeze(-1)


class Actor(nn.Module):
    """A normal distribution of actions before they are squashed. [B, n_in] -> mean [B, A], log_std [B, A] in -10..2."""

    def __init__(self, n_in, num_actions):
        super().__init__()
        self.project = projection(n_in)  # [B, 50]
        self.head = mlp(50, 2 * num_actions)
        mean, log_std = self.head[-1].weight.data.chunk(2)  # Reference code: two layers of gains sqrt 2 and 1
        nn.init.orthogonal_(mean, 2**0.5)
        nn.init.orthogonal_(log_std, 1.0)

    def forward(self, hidden):
        mean, log_std = self.head(self.project(hidden)).chunk(2, dim=1)
        return mean, -10 + 6 * (1 + log_std.tanh())


def projection(n_in):
    """[B, n_in] -> [B, 50] in -1..1. Reference code: Flax's initialisation and its LayerNorm's epsilon."""
    linear = nn.Linear(n_in, 50)
    # LeCun's normal, cut at two standard deviations; 0.8796 is what the cut leaves of the standard deviation.
    std = n_in**-0.5 / 0.87962566
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.LayerNorm(50, eps=1e-6), nn.Tanh())


def mlp(n_in, n_out):
    """Reference code: networks/common.py, gain sqrt 2 in every layer, the last one too."""
    first, second, last = (orthogonal(nn.Linear(*size), 2**0.5) for size in ((n_in, 256), (256, 256), (256, n_out)))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def orthogonal(layer, gain):
    """The layer with orthogonal weights and no bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def to_pixels(obs):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W] in 0..1, in the layout of the convolutions."""
    return obs.contiguous(memory_format=torch.channels_last).float() / 255  # Easy to miss: bytes are moved, not floats


# Modified from drq_sam_reset.py: sampled by the noise that is given, or the mean.
@torch.no_grad()
def act(agent, obs, normal=None):
    """Actions in -1..1, greedy ones if there is no noise. uint8 [B, 3, 64, 64], [B, A] -> ([B, A],)."""
    mean, log_std = agent.actor(agent.encoder(to_pixels(obs)))
    return (mean.tanh() if normal is None else squashed_gaussian(mean, log_std, normal)[0],)


# ---- 5. The method ----
@torch.no_grad()
def sam_perturb(params, rho):
    """Climbs to the worst point nearby, w + rho g / |g|. Returns the tensors of w, which stay as they are. Paper: 3.2.

    Easy to miss: one norm over all that is perturbed together, noise scales (sigma) too where there are any.
    """
    gradients = [param.grad for param in params]
    scale = rho / (nn.utils.get_total_norm(gradients) + 1e-12)
    saved = [param.data for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.data = torch.addcmul(param, gradient, scale)
    return saved


def sam_restore(params, saved):
    """Goes back to where `sam_perturb` came from, exactly: subtracting what was added would not."""
    for param, before in zip(params, saved, strict=True):
        param.data = before


@torch.no_grad()
def reset_agent(agent, target, optimizer, fresh):
    """Writes a fresh agent over all but the encoder and its Adam. Paper: 5.1. Reference code: train_pixels.py:238-274.

    Easy to miss: projections and temperature are drawn anew too; the target critic gets the online one's new weights,
    but keeps its own, older encoder.
    """
    learned, new = ([*a.critic.parameters(), *a.actor.parameters(), a.log_alpha] for a in (agent, fresh))
    torch._foreach_copy_(learned, new)
    torch._foreach_copy_(list(target.critic.parameters()), list(fresh.critic.parameters()))
    forget_moments(optimizer, learned)


@torch.no_grad()
def forget_moments(optimizer, params):
    """Makes Adam begin anew for these parameters, in place: moments and step counts are zero as at the start."""
    for param in params:
        for value in optimizer.state[param].values():
            value.zero_()


def squashed_gaussian(mean, log_std, normal):
    """A sample a = tanh(mean + std normal) and the log of its density. [B, A] x 3 -> [B, A], [B]. Paper: SAC, eq. 21.

    Easy to miss: log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which stays finite where tanh rounds to 1.
    """
    u = mean + log_std.exp() * normal
    log_density = -0.5 * normal.square() - log_std - 0.5 * math.log(2 * math.pi)  # of u
    return u.tanh(), (log_density - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)


def critic_targets(rewards, bootstrap, next_q, next_log_probs, alpha):
    """r + gamma (min Q' - alpha log pi). [B], [B], [2, B], [B], [] -> [B]. bootstrap: gamma, 0 behind a failure.

    Easy to miss: a time limit is no failure, and is bootstrapped. Paper: SAC, arXiv:1812.05905, eq. 3 and 5.
    """
    return rewards + bootstrap * (next_q.amin(0) - alpha * next_log_probs)


@torch.no_grad()
def soft_update(targets, params, tau):
    """target + tau (param - target) of each two tensors, in place."""
    torch._foreach_lerp_(targets, params, tau)


# Modified from drq_sam_reset.py: three frames, whose bytes make no integer to be moved as one.
def random_shift(images, offsets, pad):
    """Each image moved by offsets - pad pixels, its border repeated. [B, C, H, W], int64 [B, 2] -> as images.

    Paper: DrQ, arXiv:2004.13649: pad by repeating the border, then crop at (row, column) = offsets in 0..2 pad.
    """
    batch, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - pad).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:] - pad).clamp(0, width - 1)  # [B, W]
    index = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


# ---- 6. Losses, targets, replay ----
PAD = 4  # pixels that an image is shifted by at most


# Modified from drq_sam_reset.py: a ring of the newest rows; an end keeps its last observation; uniform, one step.
class Replay:
    """The newest transitions of a run, on the training device. Frames are kept once; stacks are built at sampling.

    Row i: the newest frame of observation i, the row where its episode began, the action, its reward, whether the
    episode failed with it. An episode's last observation has a row too, whose action means nothing; row `size` is the
    observation under way. Row i lies at i modulo the capacity, and in the file at i.
    """

    def __init__(self, capacity, obs_shape, num_actions, args, device):
        self.args, self.device, self.frames_a_stack = args, device, obs_shape[0]
        fields = [("frames", np.uint8, obs_shape[1:]), ("starts", np.int64), ("actions", np.float32, (num_actions,))]
        self.row = np.dtype([*fields, ("rewards", np.float32), ("dones", bool)])  # as in the file
        empty = {name: np.zeros(capacity, self.row[name]) for name in self.row.names}
        self.rows = {name: torch.from_numpy(values).to(device) for name, values in empty.items()}
        self.whole = np.zeros(capacity, bool)  # transitions whose frames are all there; known without asking the device
        self.size = self.start = self.saved = 0  # saved: rows on disk

    def begin(self, frame):
        """The first observation of an episode. The one under way ends as if at a time limit, unless it just began."""
        self.size += self.start < self.size
        self.start = self.size
        self.observe(frame)

    def observe(self, frame):
        lost = np.arange(self.size, self.size + self.frames_a_stack)  # itself, and stacks with the frame it replaces
        self.whole[lost % len(self.whole)] = False
        self.rows["frames"][self.size % len(self.whole)] = torch.as_tensor(frame)
        self.rows["starts"][self.size % len(self.whole)] = self.start

    def add(self, action, reward, done, next_frame):
        """A transition, and the frame after it, of the same episode even if it ends there."""
        for name, value in (("actions", torch.as_tensor(action)), ("rewards", reward), ("dones", done)):
            self.rows[name][self.size % len(self.whole)] = value
        self.whole[self.size % len(self.whole)] = True
        self.size += 1
        self.observe(next_frame)

    def sample(self, uniform):
        """Rows of transitions, each as likely. float64 [B] on the CPU -> int64 [B]."""
        places = np.flatnonzero(self.whole)
        places = places[(uniform.numpy() * len(places)).astype(np.int64)]
        return torch.from_numpy(self.size - (self.size - places) % len(self.whole))

    def gather(self, rows):
        """Stacks, actions, rewards and bootstrap factors of some rows. int64 [B] -> dict of [B, ...]."""
        both, size = torch.cat([rows, rows + 1]), len(self.whole)
        stacks = both[:, None] + torch.arange(1 - self.frames_a_stack, 1, device=self.device)  # [2B, 3]
        stacks = torch.maximum(stacks, self.rows["starts"][both % size][:, None])  # the first frame is repeated
        obs, next_obs = self.rows["frames"][stacks % size].chunk(2)
        places = rows % size
        batch = {"obs": obs, "next_obs": next_obs, "actions": self.rows["actions"][places]}
        bootstrap = self.args.gamma * ~self.rows["dones"][places]
        return batch | {"rewards": self.rows["rewards"][places], "bootstrap": bootstrap}

    def state_dict(self):
        """All but the rows, which `save` writes."""
        return {"size": self.size, "start": self.start}

    def load_state_dict(self, state):
        self.size, self.start = state["size"], state["start"]

    def save(self, path):
        """Appends the new rows to a file, flushed to disk. Easy to miss: before the checkpoint that counts them."""
        first = max(self.saved, self.size + 1 - len(self.whole))  # what was lost between two saves is a hole
        rows = np.empty(self.size + 1 - first, self.row)
        places = torch.arange(first, self.size + 1, device=self.device) % len(self.whole)
        for name, values in self.rows.items():
            rows[name] = values[places].cpu()
        path.touch()
        with open(path, "r+b") as file:
            file.truncate((self.saved + 1) * self.row.itemsize)  # what lies behind is of no checkpoint
            file.seek(first * self.row.itemsize)
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.size  # Easy to miss: the row under way is written again, in place.

    def load(self, path):
        """Reads the newest rows back, and the one under way."""
        if not path.is_file() or path.stat().st_size < (self.size + 1) * self.row.itemsize:
            fail(f"{path} is not there or shorter than the {self.size} rows of the checkpoint")
        first = max(self.size + 1 - len(self.whole), 0)
        rows = np.memmap(path, self.row, "r", shape=self.size + 1)[first:]
        places = np.arange(first, self.size + 1) % len(self.whole)
        for name, values in self.rows.items():
            values[torch.from_numpy(places)] = torch.from_numpy(np.ascontiguousarray(rows[name])).to(self.device)
        same = rows["starts"][:-1] == rows["starts"][1:]  # a row that the next one's episode does not share is its last
        same[: max(self.size + self.frames_a_stack - len(self.whole) - first, 0)] = False  # as `observe` has it
        self.whole[places[:-1]] = same
        self.saved = self.size


# ---- 7. Update ----
# Modified from drq_sam_reset.py: the rows are drawn beforehand.
DRAWS = ("rows", "offsets", "normal")  # what an update is given besides its networks and replay


def update(agent, target, optimizer, replay, draws, args):
    """One gradient step of critic, actor and temperature, and the target's step -> dict of detached [].

    draws: rows [B] of the replay, offsets [2, B, 2] of observations and next ones, normal [2, B, A], the noise of the
    actions in the same order. SAM's two passes share all of it, and the critic's targets. Reference code: the order.
    """
    batch = replay.gather(draws["rows"])
    shifted = (random_shift(batch[key], draws["offsets"][i], PAD) for i, key in enumerate(("obs", "next_obs")))
    obs, next_obs = map(to_pixels, shifted)
    alpha = agent.log_alpha.detach().exp()
    with torch.no_grad():
        next_actions, next_log_probs = squashed_gaussian(*agent.actor(agent.encoder(next_obs)), draws["normal"][1])
        next_q = target.critic(target.encoder(next_obs), next_actions)
        targets = critic_targets(batch["rewards"], batch["bootstrap"], next_q, next_log_probs, alpha)

    parts = {}

    def descend(name, loss_of, params, sam):
        """Adam on the gradient at the worst point nearby, or here."""
        for climbing in (True, False) if sam else (False,):
            loss, about = loss_of()
            optimizer.zero_grad()  # Easy to miss: Adam leaves what has no gradient as it is, moments included.
            loss.backward(inputs=params)
            if climbing:
                saved = sam_perturb(params, args.sam_rho)
        parts.update(about | {f"{name}_loss": loss.detach()})
        parts[f"{name}_grad_norm"] = nn.utils.get_total_norm([param.grad for param in params])
        if sam:
            sam_restore(params, saved)
        optimizer.step()

    def critic_loss():
        q = agent.critic(agent.encoder(obs), batch["actions"])  # [2, B]
        qf1_values, qf2_values = q.detach().mean(1)
        return (q - targets).square().sum(0).mean(), {"qf1_values": qf1_values, "qf2_values": qf2_values}

    critic = [*agent.encoder.parameters(), *agent.critic.parameters()]
    descend("qf", critic_loss, critic, args.sam and args.sam_on != "actor")
    soft_update(list(target.parameters()), critic, args.tau)

    with torch.no_grad():  # Easy to miss: the actor sees through the critic's new encoder, and never changes it.
        hidden = agent.encoder(obs)

    def actor_loss():
        actions, log_probs = squashed_gaussian(*agent.actor(hidden), draws["normal"][0])
        q = agent.critic(hidden, actions).amin(0)
        return (alpha * log_probs - q).mean(), {"entropy": -log_probs.detach().mean()}

    descend("actor", actor_loss, list(agent.actor.parameters()), args.sam and args.sam_on != "critic")

    def alpha_loss():
        alpha = agent.log_alpha.exp()
        surplus = parts["entropy"] + draws["normal"].shape[-1]  # Paper: the target entropy is minus the actions' number
        return alpha * surplus, {"alpha": alpha.detach()}

    descend("alpha", alpha_loss, [agent.log_alpha], False)  # of the entropy where SAM's last pass was
    return parts


class Captured:
    """A function of tensors as one CUDA graph: recorded at its first call, replayed on later inputs of those shapes.

    It returns a tuple or a dict of tensors. `parts` have a state_dict, whose tensors it changes in place; what the
    calls that warm up do to them is undone. Where it is not `on`, the function is called as it is.
    """

    def __init__(self, function, on, parts=()):
        self.function, self.on, self.parts, self.graph = function, on, parts, None

    def __call__(self, *inputs):
        if not self.on:
            return self.function(*inputs)
        if self.graph is None:
            self.record(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        copies = [value.clone() for _, value in leaves(self.outputs)]  # Easy to miss: each replay writes over them.
        return dict(zip(self.outputs, copies, strict=True)) if isinstance(self.outputs, dict) else tuple(copies)

    def record(self, inputs):
        self.inputs = [value.clone() for value in inputs]
        before = {name: value.clone() for name, value in self.tensors()}
        rng_state, stream = torch.cuda.get_rng_state(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Adam's, that it was made for a capture and runs without one
            for _ in range(3):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for name, value in self.tensors():
            value.copy_(before[name]) if name in before else value.zero_()  # Adam's state is made as zeros
        torch.cuda.set_rng_state(rng_state)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*self.inputs)

    def tensors(self):
        """(name, tensor) of all that the parts hold."""
        states = leaves([part.state_dict() for part in self.parts])
        return [(name, value) for name, value in states if isinstance(value, torch.Tensor)]


# ---- 8. Training ----
def train(args, make_envs=make_envs, make_agent=Agent):
    """Trains to args.total_timesteps and returns the agent. The factories are the seams for suites and networks."""
    check(args)
    args, device = set_up_torch(definite(args))
    state = load_checkpoint(args.resume) if args.resume else {"step": 0, "restarts": 0, "exact_step": 0, "exact": True}
    step, restarts, exact_step = state["step"], state["restarts"] + (not state["exact"]), state["exact_step"]
    if state.get("done") and step >= args.total_timesteps:
        fail(f"{args.resume} is at step {step} already: raise --total-timesteps, or --evaluate it")
    init_seed, *seeds = np.random.SeedSequence(args.seed).generate_state(5).tolist()
    torch.manual_seed(init_seed)
    explore_rng, sample_rng, noise_rng, augment_rng = (torch.Generator().manual_seed(seed) for seed in seeds)
    envs = make_envs(args, "train", restarts)
    num_actions, obs_shape = envs.single_action_space.shape[0], envs.single_observation_space.shape
    agent = make_agent(envs, args).to(device)
    target = nn.ModuleDict({"encoder": agent.encoder, "critic": agent.critic})
    target = copy.deepcopy(target).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    replay = Replay(args.buffer_size, obs_shape, num_actions, args, device)
    print(f"replay: {sum(values.nbytes for values in replay.rows.values()) >> 20} MB", flush=True)
    parts = {"agent": agent, "target": target, "optimizer": optimizer, "replay": replay, "explore_rng": explore_rng}
    parts |= {"sample_rng": sample_rng, "noise_rng": noise_rng, "augment_rng": augment_rng}
    parts["torch_rng"] = torch.default_generator
    if args.resume:
        restore(parts, state)
        replay.load(checkpoint_path(args.resume).parent / "replay.bin")
        print(f"step {step}: " + ("bit for bit" if state["exact"] else "continued, in fresh environments"))
    graphs = args.cuda_graphs and device.type == "cuda"
    optimizer.param_groups[0]["capturable"] = graphs  # Easy to miss: it is saved, and another device may read it.

    def draw():
        """The random numbers of an update, each kind from its own stream."""
        draws = {"rows": replay.sample(torch.rand(args.batch_size, dtype=torch.float64, generator=sample_rng))}
        draws["offsets"] = torch.randint(2 * PAD + 1, (2, args.batch_size, 2), generator=augment_rng)
        draws["normal"] = torch.randn(2, args.batch_size, num_actions, generator=noise_rng)
        return [draws[name].to(device, non_blocking=True) for name in DRAWS]

    def learn(*draws):
        return update(agent, target, optimizer, replay, dict(zip(DRAWS, draws, strict=True)), args)

    learner = Captured(learn, graphs, [agent, target, optimizer])
    policy = Captured(partial(act, agent), graphs)
    run = Run(args, device, state, done=step, goal=args.total_timesteps)
    obs, _ = envs.reset()
    replay.begin(obs[0, -1])
    episode_return, episode_length, rewards, scalars, seconds, counted = 0.0, 0, 0.0, [], 0.0, step

    def save(exact=False, done=False):
        if not np.isfinite(rewards):
            sys.exit(f"error: a reward is not finite at step {step}; what {run.folder} holds was left as it was")
        replay.save(run.folder / "replay.bin")
        about = {"step": step, "restarts": restarts, "exact_step": exact_step, "exact": exact, "done": done}
        run.save(about | capture(parts))

    exact = state["exact"]
    while step < args.total_timesteps:
        # Act.
        start = time.monotonic()
        if step < args.learning_starts:
            actions = torch.rand(1, num_actions, generator=explore_rng) * 2 - 1
        else:
            normal = torch.randn(1, num_actions, generator=explore_rng)
            (actions,) = policy(torch.as_tensor(obs).to(device), normal.to(device))
        actions = actions.cpu().numpy()

        # Learn. Deviation: before the environment steps, so that a GPU learns while it does.
        updates = args.replay_ratio * (step - args.learning_starts)
        for number in range(updates + 1, updates + args.replay_ratio + 1) if updates >= 0 else ():
            scalars.append(learner(*draw()))
            if args.reset_every and number % args.reset_every == 0 and step + 1 < args.total_timesteps:
                reset_agent(agent, target, optimizer, make_agent(envs, args).to(device))

        # Step.
        obs, reward, terminated, truncated, info = envs.step(actions)
        ended = bool(terminated[0] | truncated[0])
        replay.add(actions[0], float(reward[0]), bool(terminated[0]), info["final_obs"][0, -1])
        if ended:
            replay.begin(obs[0, -1])
        episode_return, episode_length = episode_return + float(reward[0]), episode_length + 1
        rewards += float(reward[0])
        step += 1
        seconds += time.monotonic() - start  # without evaluating and saving

        # Log, evaluate, save.
        exact = ended and crossed(step, args.exact_every, step - exact_step)
        if exact or step % 1000 == 0 or step == args.total_timesteps:
            run.log(step, {"charts/reward": rewards / (step - counted)})
            if scalars:
                losses = {key: torch.stack([row[key] for row in scalars]).mean().item() for key in scalars[0]}
                run.log(step, {f"losses/{key}": value for key, value in losses.items()})
            run.log(step, {"charts/SPS": (step - counted) / seconds, "charts/frames": args.action_repeat * step})
            rewards, scalars, seconds, counted = 0.0, [], 0.0, step
        if ended:
            run.log(step, {"charts/episodic_return": episode_return, "charts/episodic_length": episode_length})
            episode_return, episode_length = 0.0, 0
        if crossed(step, args.eval_every, 1) and step < args.total_timesteps:
            table = compare(agent, args, make_envs, args.eval_episodes, lambda: run.tick(save))
            run.log(step, eval_scalars(table))
        if exact:
            restarts, exact_step = restarts + 1, step  # Easy to miss: in every run, interrupted or not.
            envs.close()
            envs = make_envs(args, "train", restarts)
            obs, _ = envs.reset()
            replay.begin(obs[0, -1])
        run.tick(save, 1)
        if exact or run.save_due() or step >= args.total_timesteps:  # Easy to miss: before the long last evaluation.
            save(exact)

    envs.close()
    if args.eval_every > 0:
        table = compare(agent, args, make_envs, args.final_eval_episodes, lambda: run.tick(save))
        run.log(step, eval_scalars(table))
        report(table, step, run.folder)
    save(exact, done=True)
    run.close()
    return agent


def crossed(step, every, batch_size):
    """Whether the last batch crossed a multiple of `every` (0: never)."""
    return every > 0 and step // every > (step - batch_size) // every


# ---- 9. Evaluation, checkpoints and logs ----
def evaluate(agent, args, make_envs, episodes, tick=lambda: None):
    """Returns [episodes] of greedy episodes drawn by args.eval_seed, the same ones each time.

    Reference code: evaluation.py, the mode of the distribution. Touches no stream of training.
    """
    envs = make_envs(dataclasses.replace(args, seed=args.eval_seed, num_envs=1), "test")
    device, finished, total = next(agent.parameters()).device, [], 0.0
    agent.eval()
    obs, _ = envs.reset()
    while len(finished) < episodes:
        (actions,) = act(agent, torch.as_tensor(obs).to(device))
        obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        total += float(reward[0])
        if terminated[0] or truncated[0]:
            finished.append(total)
            total = 0.0
        tick()
    envs.close()
    agent.train()
    return np.array(finished)


# Modified from mdpo.py: one agent and one set of episodes, whose returns have one scale in all tasks.
def compare(agent, args, make_envs, episodes, tick=lambda: None):
    """The agent's returns: a list of one row."""
    returns = evaluate(agent, args, make_envs, episodes, tick)
    mean, std, median = float(returns.mean()), float(returns.std()), float(np.median(returns))
    return [{"split": "test", "episodes": episodes, "mean": mean, "std": std, "median": median}]


# Modified from mdpo.py: one agent and one set of episodes.
def eval_scalars(table):
    """What is logged of a table of `compare`."""
    return {"eval/test_return": table[0]["mean"]}


def report(table, step, folder):
    """Prints a table of `compare` and saves it as evaluation.csv."""
    rows = [["step", *table[0]], *([step, *row.values()] for row in table)]
    text = "\n".join(",".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) for row in rows)
    (folder / "evaluation.csv").write_text(text + "\n")
    print(text.replace(",", "\t"))


class Run:
    """A run's folder (arguments, source, metrics, events, checkpoints), its progress bar, and the wish to stop."""

    def __init__(self, args, device, state, done, goal):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = checkpoint_path(args.resume).parent if args.resume else Path(args.runs_dir) / name
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
            self.metrics = open(self.folder / "metrics.csv", "a", buffering=1)
        except OSError as error:
            fail(f"{self.folder} cannot be written: {error.strerror}")
        if not args.resume:
            (self.folder / "args.json").write_text(json.dumps(describe(args, device), indent=1))
            shutil.copy(__file__, self.folder)
        if args.track:
            import wandb

            about = {
                "project": args.wandb_project_name,
                "entity": args.wandb_entity,
                "config": dataclasses.asdict(args),
            }
            wandb.init(**about, id=self.folder.name, name=self.folder.name, resume="allow", sync_tensorboard=True)
        if args.resume and checkpoint_path(args.resume).name != "checkpoint.pt":
            save_checkpoint(self.folder / "checkpoint.pt", state)  # what it held lies on the way that is given up here
        size = min(state.get("metrics_bytes", 0), os.path.getsize(self.metrics.name))
        self.metrics.truncate(size)  # what was logged after the checkpoint is done again
        if size == 0:
            self.metrics.write("step,key,value\n")
        self.events = SummaryWriter(str(self.folder), purge_step=state["step"] + 1)
        self.args, self.last_save, self.last_line, self.stop_signal = args, time.monotonic(), time.monotonic(), 0
        self.on_signals(self.stop)
        self.terminal = sys.stderr.isatty()
        about = {"unit": "step", "unit_scale": True, "smoothing": 0, "dynamic_ncols": True}
        self.bar = tqdm(initial=done, total=goal, file=None if self.terminal else open(os.devnull, "w"), **about)

    def on_signals(self, handler):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # SIGUSR1: Slurm's warning before its time limit
            signal.signal(number, handler)

    def stop(self, number, _):
        """Signal handler: the run stops at its next tick; a second signal ends the program at once."""
        self.stop_signal = number
        self.on_signals(signal.SIG_DFL)

    def tick(self, save, steps=0):
        """Moves the bar. The state is whole here: if a signal came, it is saved and the program ends."""
        self.bar.update(min(steps, self.bar.total - self.bar.n))
        if not self.terminal and time.monotonic() > self.last_line + 30:
            print(self.bar, flush=True)
            self.last_line = time.monotonic()
        if self.stop_signal:
            save()
            self.close()
            print(f"stopped by {signal.Signals(self.stop_signal).name}; go on with --resume {self.folder}")
            sys.exit(128 + self.stop_signal)

    def log(self, step, values):
        """Writes {key: number} to metrics.csv and TensorBoard; one that is not finite ends the program with code 1."""
        for key, value in values.items():
            if not np.isfinite(value):
                self.close()
                sys.exit(f"error: {key} is {value} at step {step}; nothing of it was saved in {self.folder}")
            self.metrics.write(f"{step},{key},{value}\n")
            self.events.add_scalar(key, value, step)
        if "charts/episodic_return" in values:
            self.bar.set_postfix_str(f"return {values['charts/episodic_return']:.2f}", refresh=False)

    def save_due(self):
        return self.args.save_minutes > 0 and time.monotonic() - self.last_save > 60 * self.args.save_minutes

    def save(self, state):
        """The newest checkpoint, and the newest exact one if it is that too."""
        self.last_save = time.monotonic()
        os.fsync(self.metrics.fileno())
        state |= {"script": Path(__file__).stem, "args": dataclasses.asdict(self.args)}
        state["metrics_bytes"] = os.path.getsize(self.metrics.name)
        for name in ("exact.pt", "checkpoint.pt") if state["exact"] else ("checkpoint.pt",):
            save_checkpoint(self.folder / name, state)

    def close(self):
        for part in (self.bar, self.metrics, self.events):
            part.close()


def describe(args, device):
    """What args.json says of a run: all that it takes to run it again."""

    def shell(command):
        return subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True).stdout.strip()

    here = Path(__file__).resolve().parent
    hardware = {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "cores": os.cpu_count()}
    hardware |= {"cpu": shell("lscpu | sed -n 's/^Model name: *//p'"), "torch_threads": torch.get_num_threads()}
    packages = {package.name: package.version for package in importlib.metadata.distributions()}
    commit = shell("git describe --always --dirty --abbrev=40 --exclude '*'")
    return {"command": sys.argv, "args": dataclasses.asdict(args), "commit": commit, "hardware": hardware} | {
        "python": platform.python_version(),
        "packages": packages,
    }


def capture(parts):
    """{name: state} of generators and of whatever has a state_dict."""
    return {name: part.get_state() if hasattr(part, "get_state") else part.state_dict() for name, part in parts.items()}


def restore(parts, state):
    for name, part in parts.items():
        (part.set_state if hasattr(part, "set_state") else part.load_state_dict)(state[name])


def leaves(state, name=""):
    """("a.0.b", value) of each value in nested dicts, lists and tuples."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}.{key}".strip("."))
    else:
        yield name, state


def not_finite(state):
    """Name of the first number that is not finite in nested dicts and lists of tensors, or None."""
    numbers = ((name, torch.as_tensor(x)) for name, x in leaves(state) if isinstance(x, torch.Tensor | float))
    return next((name for name, x in numbers if not x.isfinite().all()), None)


def save_checkpoint(path, state):
    """Whole or not at all: written beside, flushed to disk, renamed. Numbers that are not finite are never saved."""
    if name := not_finite(state):
        sys.exit(f"error: {name} is not finite at step {state['step']}; {path} was left as it was")
    buffer, beside = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(state, buffer)
    try:
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        left = "the one that is there is whole" if path.exists() else "there is none yet"
        sys.exit(f"error: {path} could not be saved at step {state['step']}: {error.strerror}; {left}")


def checkpoint_path(path):
    return Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)


def load_checkpoint(path):
    path = checkpoint_path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path} cannot be read as a checkpoint: {getattr(error, 'strerror', None) or type(error).__name__}")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem or "args" not in state:
        fail(f"{path} is not a checkpoint of {Path(__file__).name}")
    return state


# Modified from ppo_netrand.py: where a checkpoint has it.
def load_agent(args, state, make_envs=make_envs, make_agent=Agent):
    """The agent of a checkpoint, for `compare` or `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(dataclasses.replace(args, num_envs=1), "test")
    agent = make_agent(envs, args).to(device)
    agent.load_state_dict(state["agent"])
    envs.close()
    return agent


def set_up_torch(args):
    """(arguments with a definite --precision, device), and torch's global switches set to them."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if args.cuda and gpu else "cpu")
    if args.cuda_required and device.type != "cuda":
        fail("--cuda-required: torch finds no GPU here")
    if args.precision == "auto":
        args = dataclasses.replace(args, precision="tf32" if device.type == "cuda" else "fp32")
    print(f"{args.precision} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}", flush=True)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if args.precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that was not written
    return args, device


def check(args):
    """Arguments out of range, before anything is made or written."""
    least = {"initial_alpha": 1e-6, "buffer_size": 8}
    positive = ("eval_episodes", "final_eval_episodes", "num_envs", "replay_ratio", "batch_size")
    least |= dict.fromkeys((*positive, "learning_starts"), 1)
    most = dict.fromkeys(("gamma", "tau", "num_envs"), 1)
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: from {low} to {high}")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot hold a slash")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: pip install wandb")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.cuda and torch.cuda.is_available():
        _, memory = torch.cuda.mem_get_info()
    folder = checkpoint_path(args.resume).parent if args.resume else Path(args.runs_dir).absolute()
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    disk += (folder / "replay.bin").stat().st_size if (folder / "replay.bin").exists() else 0  # a resumed run's own
    steps = definite(args).total_timesteps
    for name, rows, room in (("buffer-size", args.buffer_size, memory), ("total-timesteps", steps, disk)):
        if rows * 64 * 64 > room:
            fail(f"--{name}: {rows >> 8} MB of replay do not fit into {room >> 20} MB of memory or disk")


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# Modified from mdpo.py: one agent, and what an evaluation of it may change.
def main(flags=None, make_envs=make_envs, make_agent=Agent):
    """The command line. flags: instead of the program's own; the factories are train's."""
    args = tyro.cli(Args, args=flags)
    if not (args.resume or args.evaluate):
        return train(args, make_envs, make_agent)
    if args.resume and args.evaluate:
        fail("--resume and --evaluate: one of them")
    state = load_checkpoint(args.resume or args.evaluate)
    free = {"resume", "evaluate", "total_timesteps", "save_minutes", "cuda", "cuda_required", "cuda_graphs", "track"}
    free |= {"eval_seed", "eval_every", "eval_episodes", "final_eval_episodes", "wandb_project_name", "wandb_entity"}
    try:
        args = definite(tyro.cli(Args, args=flags, default=Args(**state["args"] | {"resume": None, "evaluate": None})))
    except TypeError as error:
        fail(f"the checkpoint is of another version of this script: {error}")
    if args.precision == "auto":
        args.precision = state["args"]["precision"]
    for name in state["args"].keys() - free:
        if getattr(args, name) != state["args"][name]:
            fail(f"--{name.replace('_', '-')} is {state['args'][name]} in that run and stays so")
    if args.resume:
        return train(args, make_envs, make_agent)
    check(args)
    agent = load_agent(args, state, make_envs, make_agent)
    table = compare(agent, args, make_envs, args.final_eval_episodes)
    report(table, state["step"], checkpoint_path(args.evaluate).parent)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's writer fails in its thread, and again in this one
    try:
        main()
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}; what was saved before is whole")
