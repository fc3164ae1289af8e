# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "envpool==1.2.5", "numpy==2.4.6", "tensorboard==2.21.0",
#     "torch==2.14.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""DrQ + SAM + Reset on Atari-100k: Rainbow on augmented frames that stays able to learn. Each update takes
the gradient at the worst point nearby (sharpness-aware minimisation), which keeps the network open to new
inputs; every so often its head is drawn anew, which keeps it open to new targets.

Paper: Lee et al. 2023, Enhancing Generalization and Plasticity for Sample Efficient Reinforcement Learning (PLASTIC).
Checked against github.com/dojeon-ai/PLASTIC (3736071), losses and gradients; where they differ, the paper holds.
Deviations: Adam's epsilon is the code's 1.5e-4, where the paper's Table 4 prints 1.5e-5; EnvPool's Atari, without the
authors' no-op frame after a lost life; shifts by whole pixels, theirs interpolate; SAM's first gradient is not
clipped, because only its direction counts; the evaluation's games have their own seeds; evaluations during the run; a
batch never holds the newest transition, so that environment and update can run side by side; environments start afresh
every --exact-every steps.

    python algos/drq_sam_reset.py --env-id boxing  # the paper: 100k steps, replay ratio 2
    python algos/drq_sam_reset.py --env-id boxing --no-sam --reset-every 0  # its baseline, DrQ
    python algos/drq_sam_reset.py --env-id boxing --replay-ratio 8 --shrink-perturb 0.8
    python algos/drq_sam_reset.py --env-id boxing --no-augment  # nearly on data-efficient Rainbow (DER)
    python algos/drq_sam_reset.py --resume runs/<folder>  # continue a run
"""

# ---- 1. Imports ----
import copy
import ctypes
import fcntl
import hashlib
import io
import json
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
from functools import partial
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
    env_id: str = "Pong"  # the game; unknown names print the valid ones
    total_timesteps: int = 100_000  # steps of four frames
    sam: bool = True  # sharpness-aware minimisation; off: plain Adam
    sam_rho: float = 0.1  # rho, length of the step to the worst point nearby
    sam_scope: Literal["all", "backbone", "head"] = "all"  # the parameters that take that step
    sam_noise: Literal["independent", "reuse", "none"] = "independent"  # noise of SAM's passes (none: not in the first)
    reset_every: int = 40_000  # updates between resets of the head (0: never)
    reset_optimizer: Literal["all", "head"] = "all"  # whose Adam starts afresh
    shrink_perturb: float = 1.0  # alpha, share of the backbone that a reset keeps (D'Oro et al. 2023: 0.8)
    augment: bool = True  # shift and dim what is learned from (DrQ)
    replay_ratio: int = 2  # updates per step

    # Rainbow. Paper: Table 4. Reference code, where it is silent: configs/agent/drq.yaml.
    num_envs: int = 1  # N, parallel environments; training has one
    learning_starts: int = 2_000  # random steps before the first update
    batch_size: int = 32  # B, transitions per update
    n_step: int = 10  # n, rewards before the bootstrap
    learning_rate: float = 1e-4  # Adam
    adam_eps: float = 1.5e-4  # Adam's epsilon (Reference code; the paper prints 1.5e-5)
    max_grad_norm: float = 10.0  # clip the gradient to this norm
    gamma: float = 0.99  # discount
    tau: float = 0.01  # share of the online network that an update writes into the target's
    prioritized_replay_alpha: float = 0.5  # omega, exponent of the priorities
    prioritized_replay_beta: float = 0.4  # beta, exponent of the importance weights; rises to 1 over the run
    n_atoms: int = 51  # atoms of the return's distribution
    v_min: float = -10.0  # smallest return
    v_max: float = 10.0  # largest return
    noisy_std: float = 0.5  # sigma_0, initial scale of the noisy layers' noise

    # Evaluation on games with seeds of their own.
    eval_every: int = 10_000  # steps between evaluations (0: never)
    eval_episodes: int = 10  # games per evaluation
    final_eval_episodes: int = 0  # games of the last evaluation (0: 100, or fewer in a short run)
    eval_seed: int = 42  # draws the evaluated games
    eval_envs: int = 50  # games that are played side by side
    eval_epsilon: float = 0.001  # share of random actions (Reference code: drq.yaml)

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
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # of all products; auto: tf32 on GPU, fp32 on CPU
    torch_deterministic: bool = True  # only kernels that repeat bit for bit
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "holdout"  # project for --track
    wandb_entity: str | None = None  # team for --track


# ---- 3. Environments ----
GAMES = ("Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout", "ChopperCommand")
GAMES += ("CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero", "Jamesbond", "Kangaroo", "Krull")
GAMES += ("KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert", "RoadRunner", "Seaquest", "UpNDown")


def make_envs(args, split, start=0):
    """N games, seeded by (args.seed, split, start); "test" differs from "train" by its seeds alone.

    reset() -> obs uint8 [N, 4, 84, 84], the last four frames, zeros where the life is younger; info.
    step(actions int64 [N]) -> obs, reward float32, terminated bool, truncated bool, all [N], info.
    The step that ends a game returns the next game's first observation, in a new array.
    info["episodes"]: (environment, return, length) of the games that ended with the step.
    info["life_lost"] bool [N]: a life ended, and obs is the first of the next life.
    """
    import envpool

    entropy = (args.seed, ("train", "test").index(split), start)
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
    # Reference code: envs/atari.py, no fire, and bilinear resizing.
    about = {"num_envs": args.num_envs, "use_fire_reset": False, "use_inter_area_resize": False}
    return AtariEnvs(envpool.make_gymnasium(f"{args.env_id}-v5", seed=seed, **about))


class AtariEnvs:
    """Empties the stack of frames when a life ends, resets a game in the step that ends it, counts returns.

    Careful: EnvPool ignores the action after a game's end and, with its episodic_life, after each lost life;
    its stacks run on over lost lives. Reference code: envs/atari.py:131-137.
    """

    def __init__(self, envs):
        self.envs = envs

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self):
        obs, info = self.envs.reset()
        self.returns, self.lengths = np.zeros(len(obs)), np.zeros(len(obs), dtype=int)
        self.lives = info["lives"]
        self.age = np.ones(len(obs), dtype=int)  # frames since the life began
        return self.cut_stacks(obs), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.envs.step(actions)
        self.returns, self.lengths = self.returns + reward, self.lengths + 1
        done = terminated | truncated
        info["life_lost"] = (info["lives"] < self.lives) & (info["lives"] > 0) & ~done
        self.lives = info["lives"]
        self.age = np.where(info["life_lost"] | done, 1, self.age + 1)
        ended = np.flatnonzero(done).astype(np.int32)
        info["episodes"] = [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in ended]
        if len(ended):
            obs[ended] = self.envs.reset(ended)[0]
            self.returns[ended], self.lengths[ended] = 0, 0
        return self.cut_stacks(obs), reward, terminated, truncated, info

    def cut_stacks(self, obs):
        for n in np.flatnonzero(self.age < obs.shape[1]):
            obs[n, : -self.age[n]] = 0
        return obs


# ---- 4. Networks ----
class Agent(nn.Module):
    """Convolutions and a dueling noisy head for the return's distribution: 6,868,842 parameters, 6 actions.

    Reference code: models/backbones/cnn/nature.py:37-45 and models/policies/rainbow_policy.py.
    """

    def __init__(self, envs, args):
        super().__init__()
        first = nn.Conv2d(envs.single_observation_space.shape[0], 32, 8, stride=4), nn.ReLU()  # [B, 32, 20, 20]
        second = nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()  # [B, 64, 9, 9]
        third = nn.Conv2d(64, 64, 3), nn.ReLU()  # [B, 64, 7, 7]
        self.backbone = nn.Sequential(*first, *second, *third, nn.Flatten())  # [B, 3136]
        self.head = DuelingHead(3136, int(envs.single_action_space.n), args.n_atoms, args.noisy_std)
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms))
        self.bf16 = args.precision == "bf16"
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU

    def forward(self, pixels):  # [B, 4, 84, 84] in 0..1
        # bf16 is for the head too, because it holds nearly all of the weights.
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.backbone(pixels)  # [B, 3136]
            if hidden.requires_grad:  # Reference code: rainbow_policy.py:122, two streams' gradients
                hidden.register_hook(lambda gradient: gradient * 2**-0.5)
            logits = self.head(hidden)
        return logits.float().log_softmax(-1)  # [B, A, atoms], log-probabilities

    def values(self, log_probs):
        """Expected returns of the actions. [B, A, atoms] -> [B, A]."""
        return (log_probs.exp() * self.support).sum(-1)


class DuelingHead(nn.Module):
    """A stream for the value and one for the advantages. [B, n_in] -> logits [B, A, atoms]."""

    def __init__(self, n_in, num_actions, n_atoms, std):
        super().__init__()
        value = NoisyLinear(n_in, 512, std), nn.ReLU(), NoisyLinear(512, n_atoms, std)
        advantage = NoisyLinear(n_in, 512, std), nn.ReLU(), NoisyLinear(512, num_actions * n_atoms, std)
        self.value = nn.Sequential(*value, nn.Unflatten(1, (1, n_atoms)))  # [B, 1, atoms]
        self.advantage = nn.Sequential(*advantage, nn.Unflatten(1, (num_actions, n_atoms)))  # [B, A, atoms]

    def forward(self, hidden):
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(1, keepdim=True)


class NoisyLinear(nn.Module):
    """A linear layer with noise of learned scale; without it in eval mode. Paper: arXiv:1706.10295, 3.1(b)."""

    def __init__(self, n_in, n_out, std):
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(n_out, n_in).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((n_out, n_in), std * n_in**-0.5))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))
        self.bias_sigma = nn.Parameter(torch.full((n_out,), std * n_out**-0.5))
        self.register_buffer("noise", torch.zeros(n_in + n_out))  # of inputs, then of outputs

    def forward(self, x):
        if not self.training:
            return nn.functional.linear(x, self.weight, self.bias)
        of_inputs, of_outputs = self.noise.split([self.weight.shape[1], self.weight.shape[0]])
        weight = torch.addcmul(self.weight, self.weight_sigma, of_outputs.outer(of_inputs))
        bias = torch.addcmul(self.bias, self.bias_sigma, of_outputs)
        return nn.functional.linear(x, weight, bias)


def noise_of(agent):
    """The noise of each noisy layer: buffers to write in place."""
    return [layer.noise for layer in agent.modules() if isinstance(layer, NoisyLinear)]


def set_noise(agent, normal):
    """Gives each noisy layer its part of one vector x of normal noise, as sign(x) sqrt|x|."""
    buffers = noise_of(agent)
    noise = normal.sign() * normal.abs().sqrt()
    torch._foreach_copy_(buffers, noise.split([len(buffer) for buffer in buffers]))


def to_pixels(obs):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W] in 0..1, in the layout of the convolutions."""
    return obs.contiguous(memory_format=torch.channels_last).float() / 255  # moves bytes, not floats


@torch.no_grad()
def act(agent, obs):
    """The actions of the greatest expected return. The layers' noise explores. uint8 [B, ...] -> dict of [B]."""
    values, actions = agent.values(agent(to_pixels(obs))).max(-1)
    return {"actions": actions, "values": values}


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
def reset_head(agent, target, fresh):
    """Writes the same fresh head over that of the online and of the target network. Paper: 5.1."""
    for network in (agent, target):
        torch._foreach_copy_(list(network.head.parameters()), list(fresh.head.parameters()))


@torch.no_grad()
def shrink_and_perturb(module, fresh, alpha):
    """alpha old + (1 - alpha) fresh, in place. Paper: arXiv:1910.08475; at resets: D'Oro et al. 2023."""
    torch._foreach_lerp_(list(module.parameters()), list(fresh.parameters()), 1 - alpha)


@torch.no_grad()
def forget_moments(optimizer, params):
    """Starts Adam afresh for these parameters, in place: its moments and step counts become zero."""
    for param in params:
        for value in optimizer.state[param].values():
            value.zero_()


def random_shift(images, offsets, pad):
    """Moves each image by offsets - pad pixels; repeats its border. uint8 [B, 4, H, W], int64 [B, 2] -> as images.

    Paper: DrQ, arXiv:2004.13649: pad by repeating the border, crop at (row, column) = offsets in 0..2 pad.
    """
    batch, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - pad).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:] - pad).clamp(0, width - 1)  # [B, W]
    index = rows[:, :, None] * width + columns[:, None, :]  # [B, H, W]
    pixels = images.permute(0, 2, 3, 1).contiguous().view(torch.int32)  # four bytes as one
    shifted = pixels.view(batch, -1).gather(1, index.flatten(1)).view(batch, height, width, 1)
    return shifted.view(torch.uint8).permute(0, 3, 1, 2)


def random_intensity(images, noise):
    """Brightens each image by 5 % times its noise, clipped to +-2. [B, C, H, W], [B] -> [B, C, H, W]."""
    return images * (1 + 0.05 * noise.clamp(-2, 2)).view(-1, 1, 1, 1)


def augmented(obs, offsets, noise, args):
    """Shifted and dimmed pixels. uint8 [B, 4, 84, 84], [B, 2], [B] -> float32 [B, 4, 84, 84]."""
    if not args.augment:
        return to_pixels(obs)
    return random_intensity(to_pixels(random_shift(obs, offsets, PAD)), noise)


# ---- 6. Losses, targets, replay ----
PAD = 4  # an image is shifted by at most so many pixels
BLOCK = 8192  # rows of the replay that are on their way between device and disk at once


def project_distribution(next_probs, rewards, bootstrap, support):
    """Distribution of rewards + bootstrap * Z on `support`. [B, atoms], [B], [B], [atoms] -> [B, atoms].

    bootstrap: gamma^n, or 0 where nothing follows. Each moved atom gives its mass to the two atoms around it,
    by nearness. Paper: C51, arXiv:1707.06887, Algorithm 1.
    """
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    moved = (rewards[:, None] + bootstrap[:, None] * support).clamp(support[0], support[-1])  # [B, atoms]
    nearness = 1 - (moved[:, None, :] - support[:, None]).abs() / spacing  # [B, to, from]
    return (nearness.clamp(min=0) * next_probs[:, None, :]).sum(-1)


def rainbow_loss(agent, target, batch, offsets, intensity, args):
    """Importance-weighted cross-entropy to the projected target. -> loss [], cross-entropies [B].

    offsets int64 [2, B, 2], intensity [2, B]: of the observations and of the next ones. Double Q-learning: the
    online network chooses the next action (with its noise and, within SAM, where it climbed to), the target rates it.
    """
    rows = torch.arange(len(batch["actions"]), device=offsets.device)
    obs = augmented(batch["obs"], offsets[0], intensity[0], args)
    next_obs = augmented(batch["next_obs"], offsets[1], intensity[1], args)
    log_probs = agent(obs)  # [B, A, atoms]
    with torch.no_grad():
        next_actions = agent.values(agent(next_obs)).argmax(-1)
        next_probs = target(next_obs)[rows, next_actions].exp()  # [B, atoms]
        targets = project_distribution(next_probs, batch["returns"], batch["bootstrap"], agent.support)
    # Not gather: in older torch its deterministic gradient breaks a CUDA graph.
    every_action = torch.arange(log_probs.shape[1], device=offsets.device)
    chosen = batch["actions"][:, None, None] == every_action[:, None]  # [B, A, 1]
    cross_entropy = -(targets * (chosen * log_probs).sum(1)).sum(-1)
    return (batch["weights"] * cross_entropy).mean(), cross_entropy.detach()


def beta_at(number, args):
    """The exponent of the importance weights of an update: rises over the run from --prioritized-replay-beta to 1."""
    last = args.replay_ratio * max(args.total_timesteps - args.learning_starts, 1)
    return args.prioritized_replay_beta + (1 - args.prioritized_replay_beta) * min(number / last, 1)


class Replay:
    """All transitions of a run in order, on the training device. Frames are kept once; `gather` builds the stacks.

    Row i: the newest frame of observation i, the row where its life began, the action, its reward, whether the
    life ended with it. Row `size` is the observation under way. No row is ever dropped. A row can be sampled
    once the n rows from it on and the observation after them are there: a window that slides over the ends of
    lives and is cut at the first. Reference code: per_buffer.py:108-131.
    """

    def __init__(self, capacity, obs_shape, args, device, path):
        self.args, self.device, self.path, self.frames_per_stack = args, device, path, obs_shape[0]
        fields = [("frames", np.uint8, obs_shape[1:]), ("starts", np.int64), ("actions", np.int64)]
        self.row = np.dtype([*fields, ("rewards", np.float32), ("dones", bool)])  # as in the file at `path`
        self.rows = {}
        for name in self.row.names:
            self.rows[name] = torch.from_numpy(np.zeros(capacity + 1, self.row[name])).to(device)
        # Priorities are in units of 2^-32: sums of whole numbers are exact. 0: cannot be sampled.
        self.priorities = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
        self.greatest = torch.tensor(2**32, device=device)  # the greatest so far, which new rows get
        self.size = self.saved = 0  # rows, and how many of them are in the file
        self.first = self.start = 0  # rows at which these environments and this life began

    def begin(self, frame):
        """The first observation of new environments. The last rows of a life that they interrupt are lost."""
        if self.size and not self.rows["dones"][self.size - 1]:
            self.priorities[max(self.size - self.args.n_step, 0) : self.size] = 0
            self.first = self.size
        self.start = self.size
        self.observe(frame)

    def observe(self, frame):
        self.rows["frames"][self.size] = torch.as_tensor(frame)
        self.rows["starts"][self.size].fill_(self.start)

    def add(self, action, reward, done, next_frame):
        """A transition, and the frame after it: of the next life if this one ended."""
        for name, value in (("actions", action), ("rewards", reward), ("dones", done)):
            self.rows[name][self.size].fill_(value)  # a kernel; an assignment would wait for a copy to the GPU
        self.size += 1
        if done:
            self.start = self.size
        self.observe(next_frame)
        if self.size - self.args.n_step >= self.first:
            self.priorities[self.size - self.args.n_step] = self.greatest

    def sample(self, uniform, beta):
        """A row from each of B equal shares of the priorities. uniform [B], beta [] -> rows [B], weights [B]."""
        cumulative = self.priorities.cumsum(0)
        total = cumulative[-1]
        shares = (torch.arange(len(uniform), device=self.device) + uniform) / len(uniform)
        points = (shares * total).long().clamp(max=total - 1)
        index = torch.searchsorted(cumulative, points, right=True)  # first sum above the point
        probs, count = self.priorities[index] / total, (self.priorities > 0).sum()
        weights = (1 / (probs * count) + 1e-5) ** beta  # Reference code: per_buffer.py:175
        return index, (weights / weights.max()).float()

    def gather(self, index):
        """Stacks, actions, n-step returns and bootstrap factors of some rows. [B] -> dict of [B, ...]."""
        n_step, gamma = self.args.n_step, self.args.gamma
        both = torch.cat([index, index + n_step])
        stacks = both[:, None] + torch.arange(1 - self.frames_per_stack, 1, device=self.device)  # [2B, 4]
        alive = stacks >= self.rows["starts"][both][:, None]  # zeros before the life's start
        frames = self.rows["frames"][stacks.clamp(min=0)] * alive[..., None, None]  # [2B, 4, H, W]
        obs, next_obs = frames.contiguous(memory_format=torch.channels_last).chunk(2)
        steps = torch.arange(n_step, device=self.device)
        window = index[:, None] + steps  # [B, n]
        dones = self.rows["dones"][window]
        before = dones.cumsum(1) - dones.long() == 0  # rewards up to the life's end
        returns = (self.rows["rewards"][window] * before * gamma**steps).sum(1)
        # Careful: gamma^n always. A window that was cut ended with its life, and nothing follows.
        bootstrap = gamma**n_step * ~dones.any(1)
        actions = self.rows["actions"][index]
        return {"obs": obs, "next_obs": next_obs, "actions": actions, "returns": returns, "bootstrap": bootstrap}

    def prioritise(self, index, cross_entropy):
        """Priorities from the losses, not from errors of values. Reference code: per_buffer.py:215."""
        priorities = (cross_entropy.double() ** self.args.prioritized_replay_alpha * 2**32).long()
        self.priorities[index] = priorities
        self.greatest.copy_(torch.maximum(self.greatest, priorities.max()))

    def state_dict(self):
        """Appends the new rows to the file and flushes them to disk; returns all the rest."""
        if not self.rows["rewards"][self.saved : self.size].isfinite().all():
            sys.exit(f"error: a reward is not finite at step {self.size}; {self.path} is as it was")
        with open(self.path, "ab") as file:
            file.truncate(self.saved * self.row.itemsize)  # what follows belongs to no checkpoint
            for first in range(self.saved, self.size, BLOCK):
                past = min(first + BLOCK, self.size)
                rows = np.empty(past - first, self.row)
                for name, values in self.rows.items():
                    rows[name] = values[first:past].cpu()
                file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.size
        counters = {"size": self.size, "first": self.first, "start": self.start}
        return {**counters, "priorities": self.priorities[: self.size], "greatest": self.greatest}

    def load_state_dict(self, state):
        """Takes the state and reads its rows back from the file."""
        self.size, self.first, self.start = state["size"], state["first"], state["start"]
        self.priorities[: self.size] = state["priorities"].to(self.device)
        self.greatest.copy_(state["greatest"])
        if not self.path.is_file() or self.path.stat().st_size < self.size * self.row.itemsize:
            fail(f"{self.path} does not hold the {self.size} rows of the checkpoint")
        stored = np.memmap(self.path, self.row, "r", shape=self.size)
        for first in range(0, self.size, BLOCK):
            past = min(first + BLOCK, self.size)
            for name, values in self.rows.items():
                values[first:past] = torch.from_numpy(stored[name][first:past].copy())
        self.saved = self.size


# ---- 7. Update ----
DRAWS = ("beta", "uniform", "noise", "offsets", "intensity")  # the random numbers of an update


def update(agent, target, optimizer, replay, draws, args):
    """One gradient step on a prioritised batch, and the target network's after it -> dict of detached [].

    draws: beta [], uniform [B], noise [passes, 2, K], offsets [passes, 2, B, 2], intensity [passes, 2, B].
    SAM has two passes. The axis of 2: online and target network (noise), or observations and next ones.
    """
    index, weights = replay.sample(draws["uniform"], draws["beta"])
    batch = replay.gather(index)
    batch["weights"] = weights

    def gradient(i, params):
        """Pass i: the gradient in param.grad, and new priorities. Reference code: both passes set them."""
        for network, noise in zip((agent, target), draws["noise"][i], strict=True):
            set_noise(network, noise)
        loss, cross_entropy = rainbow_loss(agent, target, batch, draws["offsets"][i], draws["intensity"][i], args)
        replay.prioritise(index, cross_entropy)
        optimizer.zero_grad()
        loss.backward(inputs=params)
        return {"loss": loss.detach(), "cross_entropy": cross_entropy.mean()}

    everything = list(agent.parameters())
    parts = {}
    if args.sam:
        scope = agent if args.sam_scope == "all" else getattr(agent, args.sam_scope)
        climbing = list(scope.parameters())
        parts["sam_loss"] = gradient(0, climbing)["loss"]
        saved = sam_perturb(climbing, args.sam_rho)
    parts.update(gradient(-1, everything))
    parts["grad_norm"] = nn.utils.clip_grad_norm_(everything, args.max_grad_norm)
    if args.sam:
        sam_restore(climbing, saved)
    optimizer.step()  # Careful: from where the climb began, with the gradient of where it ended.
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), everything, args.tau)
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
    obs_shape, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
    seeds = np.random.SeedSequence(args.seed).generate_state(5).tolist()
    torch.manual_seed(seeds[0])
    explore_rng, sample_rng, noise_rng, augment_rng = [torch.Generator().manual_seed(seed) for seed in seeds[1:]]
    agent = make_agent(envs, args).to(device)
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    replay = Replay(max(args.total_timesteps, run.step), obs_shape, args, device, run.folder / "replay.bin")
    parts = {"agent": agent, "target": target, "optimizer": optimizer, "replay": replay}
    parts.update(explore_rng=explore_rng, sample_rng=sample_rng, noise_rng=noise_rng)
    parts.update(augment_rng=augment_rng, torch_rng=torch.default_generator)
    run.restore(parts)
    graphs = args.cuda_graphs and device.type == "cuda"
    optimizer.param_groups[0]["capturable"] = graphs  # the checkpoint's may be of another device
    noise_size = sum(len(noise) for noise in noise_of(agent))
    if args.resume:
        before = replace(args, total_timesteps=run.state["about"]["args"]["total_timesteps"])
        number = args.replay_ratio * max(run.step - args.learning_starts, 0)
        so_far, following = beta_at(number, before), beta_at(number, args)
        if so_far != following:  # more --total-timesteps stretch it
            print(f"prioritized_replay_beta: {so_far:.3g} so far, {following:.3g} from here on", flush=True)

    def draw(number):
        """The random numbers of an update, each kind from its own stream."""
        size, passes = args.batch_size, 2 if args.sam else 1
        noise = torch.randn(passes, 2, noise_size, generator=noise_rng)
        if args.sam and args.sam_noise == "reuse":
            noise[1] = noise[0]
        elif args.sam and args.sam_noise == "none":
            noise[0] = 0
        draws = {"beta": torch.tensor(beta_at(number, args), dtype=torch.float64), "noise": noise}
        draws["uniform"] = torch.rand(size, dtype=torch.float64, generator=sample_rng)
        draws["offsets"] = torch.randint(2 * PAD + 1, (passes, 2, size, 2), generator=augment_rng)
        draws["intensity"] = torch.randn(passes, 2, size, generator=augment_rng)
        return [draws[name].to(device, non_blocking=True) for name in DRAWS]

    def learn(*draws):
        return update(agent, target, optimizer, replay, dict(zip(DRAWS, draws, strict=True)), args)

    def measure():
        """The online network's active units on 512 transitions, as in the paper. --eval-seed draws them."""
        uniform = torch.rand(512, dtype=torch.float64, generator=torch.Generator().manual_seed(args.eval_seed))
        index, _ = replay.sample(uniform.to(device), 1.0)
        obs = replay.gather(index)["obs"]
        shares = active_units(agent, lambda: act(agent, obs))
        return {f"charts/active_{name}": share for name, share in shares.items()}

    # The target network acts. Reference code: base.py:107.
    learner, policy = Captured(learn, graphs), Captured(partial(act, target), graphs)
    obs, _ = envs.reset()
    replay.begin(obs[0, -1])
    rewards, losses, seconds = [], [], 0.0  # since the last log line
    with run:
        while True:
            last = run.step >= args.total_timesteps
            if run.evaluation_due():  # also after a resume, if it was interrupted
                start = time.monotonic()
                episodes = final_episodes(args) if last else args.eval_episodes
                run.say(f"evaluating, {episodes} games")
                run.log(compare([target], replace(args, eval_episodes=episodes), make_envs, run.tick))
                run.log({"charts/eval_episodes": episodes, "charts/eval_seconds": time.monotonic() - start})
                run.log({"charts/hours": run.hours()})
                if run.step >= args.learning_starts:
                    run.log(measure())
                run.evaluated = run.step
            if last:
                break

            # Act, with the noise of the last update in the layers.
            start = time.monotonic()
            if run.step < args.learning_starts:
                actions = torch.randint(num_actions, (1,), generator=explore_rng)
            else:
                actions = policy(torch.as_tensor(obs).to(device))["actions"]
            actions = actions.cpu().numpy()

            # Learn. Deviation: before the environment steps, so that a GPU learns while it does.
            if run.step >= args.learning_starts:
                first = args.replay_ratio * (run.step - args.learning_starts) + 1
                for number in range(first, first + args.replay_ratio):
                    losses.append(learner(*draw(number)))
                    due = args.reset_every > 0 and number % args.reset_every == 0
                    if due and run.step + 1 < args.total_timesteps:
                        fresh = make_agent(envs, args).to(device)
                        reset_head(agent, target, fresh)
                        for network in (agent, target):
                            shrink_and_perturb(network.backbone, fresh.backbone, args.shrink_perturb)
                        forgetful = agent if args.reset_optimizer == "all" else agent.head
                        forget_moments(optimizer, forgetful.parameters())

            # Step.
            obs, reward, terminated, truncated, info = envs.step(actions)
            # Reference code: a time limit ends a game like a failure does.
            ended = bool(terminated[0] | truncated[0])
            done = ended or bool(info.get("life_lost", [False])[0])
            clipped = float(np.sign(reward[0]))
            replay.add(int(actions[0]), clipped, done, obs[0, -1])
            rewards.append(clipped)
            run.step += 1
            seconds += time.monotonic() - start

            # Log and save.
            for _, episode_return, length in info["episodes"]:
                run.log({"charts/episodic_return": episode_return, "charts/episodic_length": length})
            exact = ended and run.passed(args.exact_every, run.exact_step)
            if exact or run.step % 1000 == 0 or run.step >= args.total_timesteps:
                run.log({"charts/reward": sum(rewards) / len(rewards)})
                run.log({"charts/SPS": len(rewards) / seconds, "charts/frames": 4 * run.step})
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
    return target


def final_episodes(args):
    """Episodes of the last evaluation. By default fewer in a run so short that they would take longer than it."""
    return args.final_eval_episodes or min(100, max(10, args.total_timesteps // 10_000 * 10))


def evaluate(agent, args, make_envs, split, tick=lambda: None):
    """Returns [args.eval_episodes] of greedy games drawn by args.eval_seed.

    Reference code: the target network, without noise, a random action now and then; a lost life empties the stack, no
    more. Each environment plays the same number of first games, so that short ones are not favoured. No random stream
    of training is touched.
    """
    num_envs = min(args.eval_envs, args.eval_episodes)
    quota = args.eval_episodes // num_envs
    args = replace(args, seed=args.eval_seed, num_envs=num_envs)
    envs, explore_rng = make_envs(args, split), torch.Generator().manual_seed(args.eval_seed)
    device, num_actions = next(agent.parameters()).device, int(envs.single_action_space.n)
    everyone, returns = list(range(num_envs)), [[] for _ in range(num_envs)]
    active = everyone
    bar = tqdm(total=args.eval_episodes, desc=f"evaluation, {split}", leave=False, disable=None)
    agent.eval()
    obs, _ = envs.reset()
    while active:
        actions = torch.randint(num_actions, (num_envs,), generator=explore_rng).numpy()
        greedy = (torch.rand(num_envs, generator=explore_rng) >= args.eval_epsilon).numpy()
        playing = active if device.type == "cpu" else everyone  # cuDNN plans anew for each batch size
        chosen = act(agent, torch.as_tensor(obs[playing]).to(device))["actions"].cpu().numpy()
        actions[playing] = np.where(greedy[playing], chosen, actions[playing])
        obs, _, _, _, info = envs.step(actions)
        for n, episode_return, _ in info["episodes"]:
            returns[n].append(episode_return)
            bar.update(int(n in active))
        active = [n for n in active if len(returns[n]) < quota]  # the others idle
        tick()
    bar.close()
    envs.close()
    agent.train()
    return np.array([own[:quota] for own in returns]).flatten()


def compare(agents, args, make_envs, tick=lambda: None):
    """{key: number} to log: the mean return of the one agent there is."""
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
    """The agents of a checkpoint as a list, for `evaluate` and `act`: the target network alone."""
    args, device = set_up_torch(args)
    envs = make_envs(replace(args, num_envs=1), "test")
    agent = make_agent(envs, args).to(device)
    agent.load_state_dict(state["target"])
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


# Arguments that a resumed run may change begin with these. Of these, learning depends on total_timesteps alone (beta).
MAY_CHANGE = ("resume", "total_timesteps", "eval_every", "eval_episodes", "eval_seed", "final_eval_", "save_")
MAY_CHANGE += ("eval_envs", "runs_dir", "cuda", "track", "wandb_")
POSITIVE = ("total_timesteps", "replay_ratio", "num_envs", "batch_size", "n_step")
POSITIVE += ("eval_episodes", "eval_envs")
SMALLEST = {**dict.fromkeys(POSITIVE, 1), "n_atoms": 2, "max_grad_norm": 1e-6}
SMALLEST.update(v_min=-sys.maxsize, v_max=-sys.maxsize)
SHARES = ("gamma", "tau", "shrink_perturb", "prioritized_replay_beta", "eval_epsilon")
LARGEST = dict.fromkeys((*SHARES, "num_envs"), 1)


def check(args):
    """The arguments in one spelling. Ends the program with one line if one of them makes no sense."""
    for name, value in vars(args).items():
        low, high = SMALLEST.get(name, 0), LARGEST.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            most = f" to {high}" if high < sys.maxsize or value > high else ""
            fail(f"--{name.replace('_', '-')} {value}: from {low}{most}")
    games = {game.lower(): game for game in GAMES}
    game = args.env_id.lower().removesuffix("-v5").replace("_", "")
    if game not in games:
        fail(f"--env-id {args.env_id}: no such game; there are {' '.join(GAMES)}")
    if args.v_max < args.v_min + 1e-6:
        fail(f"--v-max {args.v_max}: has to be more than --v-min {args.v_min}")
    if args.learning_starts <= args.n_step:
        fail(f"--learning-starts {args.learning_starts}: has to be more than --n-step {args.n_step}")
    for name, episodes in (("eval_episodes", args.eval_episodes), ("final_eval_episodes", final_episodes(args))):
        if episodes % min(args.eval_envs, episodes):
            fail(f"--{name.replace('_', '-')} {episodes}: not a multiple of --eval-envs {args.eval_envs}")
    size, folder = 84 * 84 * args.total_timesteps, args.runs_dir if Path(args.runs_dir).exists() else "."
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
    return replace(args, env_id=games[game])


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
