# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5", "numpy==2.4.6", "tensorboard==2.21.0", "torch==2.14.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""DrQ + SAM + Reset on Atari-100k: Rainbow on augmented frames, learning from few steps without losing plasticity.
Each update takes the gradient at the worst point nearby (sharpness-aware minimisation), which keeps the network open to
new inputs; every so often its head is drawn anew, which keeps it open to new targets.

Paper: Lee et al. 2023, Enhancing Generalization and Plasticity for Sample Efficient Reinforcement Learning (PLASTIC).
Checked against github.com/dojeon-ai/PLASTIC (3736071), losses and gradients; where the two differ, as the paper has it.
Deviations: EnvPool's Atari, without the no-op frame that the authors play after each lost life; shifts by exactly whole
pixels, theirs interpolate; SAM's first gradient is not clipped, as only its direction counts; the evaluation's games
have seeds of their own, and there are evaluations during the run.

    python algos/drq_sam_reset.py --env-id boxing                           # the paper: 100k steps, replay ratio 2
    python algos/drq_sam_reset.py --env-id boxing --no-sam --reset-every 0  # its baseline, DrQ on Rainbow
    python algos/drq_sam_reset.py --env-id boxing --replay-ratio 8 --shrink-perturb 0.8
    python algos/drq_sam_reset.py --env-id boxing --no-augment              # on data-efficient Rainbow (DER)
    python algos/drq_sam_reset.py --resume runs/<folder>                    # go on where a run stopped
    python algos/drq_sam_reset.py --evaluate runs/<folder>                  # 100 games
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
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
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
    eval_every: int = 10_000  # steps between evaluations (0: never)
    eval_episodes: int = 10  # episodes an evaluation, agent and set of levels
    final_eval_episodes: int = 100  # episodes of the last evaluation
    eval_seed: int = 42  # draws the evaluated levels, the same ones each time
    eval_envs: int = 50  # games that an evaluation plays side by side
    eval_epsilon: float = 0.001  # share of random actions in an evaluation

    env_id: str = "pong"  # the game (or its EnvPool id) or task; a wrong one is told the right ones
    total_timesteps: int = 100_000  # steps an agent (PPO: rounded up to whole rollouts; DMC, 0: the paper's)
    # Paper: the method.
    sam: bool = True  # sharpness-aware minimisation; off: plain Adam
    sam_rho: float = 0.1  # rho, length of the step to the worst point nearby (DMC: 0, the task's)
    sam_scope: Literal["all", "backbone", "head"] = "all"  # what takes that step
    sam_noise: Literal["independent", "reuse", "none"] = "independent"  # noise of SAM's second pass; none: of its first
    reset_every: int = 40_000  # updates between resets of the head (0: never)
    reset_optimizer: Literal["all", "head"] = "all"  # whose Adam starts afresh at a reset
    shrink_perturb: float = 1.0  # alpha, share of the backbone that a reset keeps. Paper: 0.8 at replay ratios 4 and 8
    augment: bool = True  # shift and dim what is learned from (DrQ); off: data-efficient Rainbow
    replay_ratio: int = 2  # updates a step
    # Paper: Rainbow, Table 4. Reference code, where it is silent: configs/agent/drq.yaml.
    num_envs: int = 1  # N, parallel environments an agent
    learning_starts: int = 2_000  # random steps before the first update
    batch_size: int = 32  # B, transitions an update (DrQ-v2: 0, the task's)
    n_step: int = 10  # n, rewards before the bootstrap (DrQ-v2: 0, the task's)
    gamma: float = 0.99  # discount
    prioritized_replay_alpha: float = 0.5  # omega, exponent of the priorities
    prioritized_replay_beta: float = 0.4  # beta, exponent of the importance weights at first; 1 at last
    n_atoms: int = 51  # atoms of the return's distribution
    v_min: float = -10.0  # least return
    v_max: float = 10.0  # greatest return
    noisy_std: float = 0.5  # sigma_0, scale of the noisy layers' noise at first
    tau: float = 0.01  # share of the online network that flows into the target network at each update
    learning_rate: float = 1e-4  # Adam
    adam_eps: float = 1.5e-4  # Adam's epsilon
    max_grad_norm: float = 10.0  # greatest global norm of an agent's gradient


# ---- 3. Environments ----
# (random, human) score of the 26 games. Reference code: envs/atari.py:273-295; the same in rliable and rl_with_resets.
ATARI_SCORES = {
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7),
    "UpNDown": (533.4, 11693.2),
}


def make_envs(args, split, restart=0):
    """args.num_envs games, drawn by (args.seed, split, restart); "test" differs from "train" by its seeds alone.

    reset() -> obs uint8 [N, 4, 84, 84], the last four frames, zeros where the life was younger; info.
    step(actions int64 [N]) -> obs, reward float32 [N] as the game counts it, terminated bool [N], truncated bool [N],
    info, whose "life_lost" bool [N] says that a life ended and the game goes on: obs is then the next life's first.
    A game's end is followed by the next game in the same step: obs is then the new game's first observation.
    """
    import envpool

    entropy = (args.seed, int(split == "test"), restart)
    envs = envpool.make_gymnasium(
        f"{game_of(args)}-v5",
        num_envs=args.num_envs,
        seed=int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1),
        use_fire_reset=False,  # Reference code: envs/atari.py, no fire, and bilinear resizing
        use_inter_area_resize=False,
    )
    return AtariEnvs(envs)


class AtariEnvs:
    """EnvPool's games, whose stacks of frames begin with each life, and whose next game begins in the last one's step.

    Easy to miss: EnvPool's own episodic_life ignores the action after a lost life, and so does it after a game's end
    unless the game is reset at once. Its stacks run on over lost lives. Reference code: envs/atari.py:131-137.
    """

    def __init__(self, envs):
        self.envs = envs

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self):
        obs, info = self.envs.reset()
        self.lives, self.age = info["lives"], np.ones(len(obs), dtype=int)  # age: frames of the stack
        return self.begin_stacks(obs), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.envs.step(actions)
        lost = (info["lives"] < self.lives) & (info["lives"] > 0)
        ended = terminated | truncated
        self.lives, self.age = info["lives"], np.where(lost | ended, 1, self.age + 1)
        if ended.any():
            obs[ended] = self.envs.reset(np.flatnonzero(ended).astype(np.int32))[0]
        return self.begin_stacks(obs), reward, terminated, truncated, info | {"life_lost": lost & ~ended}

    def begin_stacks(self, obs):
        for n in np.flatnonzero(self.age < obs.shape[1]):
            obs[n, : -self.age[n]] = 0
        return obs


def game_of(args):
    """ "MsPacman" from mspacman, ms_pacman or MsPacman-v5."""
    name = args.env_id.lower().removesuffix("-v5").replace("_", "")
    games = {game.lower(): game for game in ATARI_SCORES}
    if name not in games:
        nearest = games[difflib.get_close_matches(name, games, n=1, cutoff=0)[0]]
        fail(f"--env-id {args.env_id}: no such game, {nearest} is nearest of {' '.join(ATARI_SCORES)}")
    return games[name]


# ---- 4. Networks ----
class Agent(nn.Module):
    """Three convolutions and a dueling noisy head for the return's distribution: 6,868,842 parameters with 6 actions.

    Reference code: models/backbones/cnn/nature.py:37-45 and models/policies/rainbow_policy.py.
    """

    def __init__(self, envs, args):
        super().__init__()
        channels, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
        first = nn.Conv2d(channels, 32, 8, stride=4), nn.ReLU()  # [B, 32, 20, 20]
        second = nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()  # [B, 64, 9, 9]
        third = nn.Conv2d(64, 64, 3), nn.ReLU()  # [B, 64, 7, 7]
        self.backbone = nn.Sequential(*first, *second, *third, nn.Flatten())  # [B, 3136]
        self.head = DuelingHead(3136, num_actions, args.n_atoms, args.noisy_std)
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms))
        self.bf16 = args.precision == "bf16"
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU

    def forward(self, pixels):  # [B, 4, 84, 84] in 0..1
        # Easy to miss: bf16 is for the head too, which holds nearly all of the weights.
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.backbone(pixels)  # [B, 3136]
            if hidden.requires_grad:  # Reference code: rainbow_policy.py:122, two streams' gradients in one backbone
                hidden.register_hook(lambda gradient: gradient * 2**-0.5)
            logits = self.head(hidden)
        return logits.float().log_softmax(-1)  # [B, A, atoms], log-probabilities of the return's atoms

    def values(self, log_probs):
        """Expected returns of the actions. [B, A, atoms] -> [B, A]."""
        return (log_probs.exp() * self.support).sum(-1)


class DuelingHead(nn.Module):
    """A stream for the state's value and one for the actions' advantages. [B, n_in] -> logits [B, A, atoms]."""

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
    """A linear layer whose weights carry noise of learned scale; none in eval mode. Paper: arXiv:1706.10295, 3.1(b)."""

    def __init__(self, n_in, n_out, std):
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(n_out, n_in).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((n_out, n_in), std * n_in**-0.5))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))
        self.bias_sigma = nn.Parameter(torch.full((n_out,), std * n_out**-0.5))
        self.register_buffer("noise", torch.zeros(n_in + n_out))  # of inputs and of outputs, by `set_noise`
        self.built = None  # by `built_once`

    def build(self):
        """Weight and bias with the noise in them; in eval mode, their means."""
        if not self.training:
            return self.weight, self.bias
        of_inputs, of_outputs = self.noise.split([self.weight.shape[1], self.weight.shape[0]])
        weight = torch.addcmul(self.weight, self.weight_sigma, of_outputs.outer(of_inputs))
        return weight, torch.addcmul(self.bias, self.bias_sigma, of_outputs)

    def forward(self, x):
        return nn.functional.linear(x, *(self.built or self.build()))


@contextmanager
def built_once(agent):
    """In this context the noisy layers build their weights once, at its beginning, and not in each forward pass."""
    layers = [layer for layer in agent.modules() if isinstance(layer, NoisyLinear)]
    for layer in layers:
        layer.built = layer.build()
    try:
        yield
    finally:
        for layer in layers:
            layer.built = None


def noise_of(agent):
    """The noise of each noisy layer, buffers to be written in place."""
    return [layer.noise for layer in agent.modules() if isinstance(layer, NoisyLinear)]


def set_noise(agent, normal):
    """Gives the noisy layers their part each of one vector of standard normal noise x, as sign(x) sqrt|x|."""
    buffers = noise_of(agent)
    noise = normal.sign() * normal.abs().sqrt()
    torch._foreach_copy_(buffers, noise.split([len(buffer) for buffer in buffers]))


def to_pixels(obs):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W] in 0..1, in the layout of the convolutions."""
    return obs.contiguous(memory_format=torch.channels_last).float() / 255  # Easy to miss: bytes are moved, not floats


# Modified from mdpo.py: the action of the greatest expected return; what explores is the noise of the layers.
@torch.no_grad()
def act(agent, obs):
    """The greedy actions and their expected returns. uint8 [B, 4, 84, 84] -> [B], [B]."""
    values, actions = agent.values(agent(to_pixels(obs))).max(-1)
    return actions, values


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
def reset_head(agent, target, fresh):
    """Writes a fresh head over that of the online and, the same one, over that of the target network. Paper: 5.1."""
    for network in (agent, target):
        torch._foreach_copy_(list(network.head.parameters()), list(fresh.head.parameters()))


@torch.no_grad()
def shrink_and_perturb(module, fresh, alpha):
    """alpha old + (1 - alpha) fresh, in place. Paper: arXiv:1910.08475; at each reset: D'Oro et al. 2023."""
    torch._foreach_lerp_(list(module.parameters()), list(fresh.parameters()), 1 - alpha)


@torch.no_grad()
def forget_moments(optimizer, params):
    """Makes Adam begin anew for these parameters, in place: moments and step counts are zero as at the start."""
    for param in params:
        for value in optimizer.state[param].values():
            value.zero_()


def random_shift(images, offsets, pad):
    """Each image moved by offsets - pad pixels, its border repeated. uint8 [B, 4, H, W], int64 [B, 2] -> as images.

    Paper: DrQ, arXiv:2004.13649: pad by repeating the border, then crop at (row, column) = offsets in 0..2 pad.
    """
    batch, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - pad).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:] - pad).clamp(0, width - 1)  # [B, W]
    index = rows[:, :, None] * width + columns[:, None, :]  # [B, H, W]
    pixels = images.permute(0, 2, 3, 1).contiguous().view(torch.int32)  # a pixel's four bytes move as one
    shifted = pixels.view(batch, -1).gather(1, index.flatten(1)).view(batch, height, width, 1)
    return shifted.view(torch.uint8).permute(0, 3, 1, 2)


def random_intensity(images, noise):
    """Each image brighter or darker by 5 % times its noise, which is cut at two. [B, C, H, W], [B] -> [B, C, H, W]."""
    return images * (1 + 0.05 * noise.clamp(-2, 2)).view(-1, 1, 1, 1)


def augmented(obs, offsets, noise, args):
    """What is learned from: shifted and dimmed pixels. uint8 [B, 4, 84, 84], [B, 2], [B] -> [B, 4, 84, 84]."""
    if not args.augment:
        return to_pixels(obs)
    return random_intensity(to_pixels(random_shift(obs, offsets, PAD)), noise)


# ---- 6. Losses, targets, replay ----
PAD = 4  # pixels that an image is shifted by at most


def project_distribution(next_probs, rewards, bootstrap, support):
    """Distribution of rewards + bootstrap * Z on the atoms of `support`. [B, atoms], [B], [B], [atoms] -> [B, atoms].

    bootstrap: gamma^n, or 0 where nothing follows. Each moved atom gives its mass to the two atoms around it, by
    nearness. Paper: C51, arXiv:1707.06887, Algorithm 1.
    """
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    moved = (rewards[:, None] + bootstrap[:, None] * support).clamp(support[0], support[-1])  # [B, atoms]
    nearness = 1 - (moved[:, None, :] - support[:, None]).abs() / spacing  # [B, atoms to, atoms from]
    return (nearness.clamp(min=0) * next_probs[:, None, :]).sum(-1)


def rainbow_loss(agent, target, batch, offsets, intensity, args):
    """Importance-weighted cross-entropy to the projected target. -> loss [], cross-entropies [B].

    offsets int64 [2, B, 2], intensity [2, B]: of the observations and of the next ones. Double Q-learning: the online
    network chooses the next action (with its noise, and within SAM from where it climbed to), the target rates it.
    """
    rows = torch.arange(len(batch["actions"]), device=offsets.device)
    obs = augmented(batch["obs"], offsets[0], intensity[0], args)
    next_obs = augmented(batch["next_obs"], offsets[1], intensity[1], args)
    with built_once(agent):
        log_probs = agent(obs)  # [B, A, atoms]
        with torch.no_grad():
            next_actions = agent.values(agent(next_obs)).argmax(-1)
    with torch.no_grad():
        next_probs = target(next_obs)[rows, next_actions].exp()  # [B, atoms]
        targets = project_distribution(next_probs, batch["returns"], batch["bootstrap"], agent.support)
    # Easy to miss: not gather, whose repeatable gradient copies from the CPU in older torch and breaks a capture.
    chosen = batch["actions"][:, None, None] == torch.arange(log_probs.shape[1], device=offsets.device)[:, None]
    cross_entropy = -(targets * (chosen * log_probs).sum(1)).sum(-1)
    return (batch["weights"] * cross_entropy).mean(), cross_entropy.detach()


class Replay:
    """All transitions of a run in order, on the training device. Frames are kept once; stacks are built at sampling.

    Row i: the newest frame of observation i, the row where its life began, the action, its reward, whether the life
    ended with it. Row `size` is the observation under way. Nothing is ever evicted.
    A row can be sampled once the n rows from it on are there, and the observation behind them. Reference code:
    per_buffer.py:108-131, where that window slides over the ends of lives and is cut at the first.
    """

    def __init__(self, capacity, obs_shape, args, device):
        self.args, self.device, self.frames_a_stack = args, device, obs_shape[0]
        fields = [("frames", np.uint8, obs_shape[1:]), ("starts", np.int64), ("actions", np.int64)]
        self.row = np.dtype([*fields, ("rewards", np.float32), ("dones", bool)])  # as in the file
        empty = {name: np.zeros(capacity + 1, self.row[name]) for name in self.row.names}
        self.rows = {name: torch.from_numpy(values).to(device) for name, values in empty.items()}
        # In units of 2^-32. Easy to miss: sums of whole numbers are exact, and the same in any order.
        self.priorities = torch.zeros(capacity + 1, dtype=torch.int64, device=device)  # 0: cannot be sampled
        self.greatest = torch.tensor(2**32, device=device)  # the running maximum, which new rows get
        self.size = self.first = self.start = self.saved = 0  # first: row after the last break, saved: rows on disk

    def begin(self, frame):
        """The first observation of new environments. What was under way is not known to have ended: it is dropped."""
        if self.size and not self.rows["dones"][self.size - 1]:
            self.priorities[max(self.size - self.args.n_step, 0) : self.size] = 0
            self.first = self.size
        self.start = self.size
        self.observe(frame)

    def observe(self, frame):
        self.rows["frames"][self.size] = torch.as_tensor(frame)
        self.rows["starts"][self.size] = self.start

    def add(self, action, reward, done, next_frame):
        """A transition, and the frame after it: of the next life if this one ended."""
        for name, value in (("actions", action), ("rewards", reward), ("dones", done)):
            self.rows[name][self.size] = value
        self.size += 1
        self.start = self.size if done else self.start
        self.observe(next_frame)
        if self.size - self.args.n_step >= self.first:
            self.priorities[self.size - self.args.n_step] = self.greatest

    def sample(self, uniform, beta):
        """One row from each of B equal shares of the priorities. uniform [B], beta [] -> rows [B], weights [B]."""
        cumulative = self.priorities.cumsum(0)
        total = cumulative[-1]
        shares = (torch.arange(len(uniform), device=self.device) + uniform) / len(uniform)
        points = (shares * total).long().clamp(max=total - 1)
        index = torch.searchsorted(cumulative, points, right=True)  # the first row whose sum exceeds the point
        probs, count = self.priorities[index] / total, (self.priorities > 0).sum()
        weights = (1 / (probs * count) + 1e-5) ** beta  # Reference code: per_buffer.py:175
        return index, (weights / weights.max()).float()

    def gather(self, index):
        """Stacks, actions, n-step returns and their bootstrap factors of some rows. [B] -> dict of [B, ...]."""
        n_step, gamma = self.args.n_step, self.args.gamma
        both = torch.cat([index, index + n_step])
        stacks = both[:, None] + torch.arange(1 - self.frames_a_stack, 1, device=self.device)  # [2B, 4]
        alive = stacks >= self.rows["starts"][both][:, None]  # zeros before a life's start, as when it was played
        frames = self.rows["frames"][stacks.clamp(min=0)] * alive[..., None, None]  # [2B, 4, H, W]
        obs, next_obs = frames.contiguous(memory_format=torch.channels_last).chunk(2)
        steps = torch.arange(n_step, device=self.device)
        window = index[:, None] + steps  # [B, n]
        dones = self.rows["dones"][window]
        before = dones.cumsum(1) - dones.long() == 0  # rewards up to the life's end
        returns = (self.rows["rewards"][window] * before * gamma**steps).sum(1)
        # Easy to miss: gamma^n always. A window that was cut ended with its life, and nothing follows.
        bootstrap = gamma**n_step * ~dones.any(1)
        batch = {"obs": obs, "next_obs": next_obs, "actions": self.rows["actions"][index]}
        return batch | {"returns": returns, "bootstrap": bootstrap}

    def prioritise(self, index, cross_entropy):
        """Priorities from the losses. Reference code: per_buffer.py:215, of the loss and not of an error of values."""
        priorities = (cross_entropy.double() ** self.args.prioritized_replay_alpha * 2**32).long()
        self.priorities[index] = priorities
        self.greatest.copy_(torch.maximum(self.greatest, priorities.max()))

    def state_dict(self):
        """All but the rows, which `save` writes."""
        counters = {"size": self.size, "first": self.first, "start": self.start}
        return counters | {"priorities": self.priorities[: self.size], "greatest": self.greatest}

    def load_state_dict(self, state):
        self.size, self.first, self.start = state["size"], state["first"], state["start"]
        self.priorities[: self.size] = state["priorities"].to(self.device)
        self.greatest.copy_(state["greatest"])

    def save(self, path):
        """Appends the new rows to a file, flushed to disk. Easy to miss: before the checkpoint that counts them."""
        rows = np.empty(self.size - self.saved, self.row)
        for name, values in self.rows.items():
            rows[name] = values[self.saved : self.size].cpu()
        if not np.isfinite(rows["rewards"]).all():
            sys.exit(f"error: a reward is not finite at step {self.size}; {path} was left as it was")
        with open(path, "ab") as file:
            file.truncate(self.saved * self.row.itemsize)  # what lies behind is of no checkpoint
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.size

    def load(self, path):
        """Reads `size` rows back."""
        if not path.is_file() or path.stat().st_size < self.size * self.row.itemsize:
            fail(f"{path} is not there or shorter than the {self.size} transitions of the checkpoint")
        rows = np.memmap(path, self.row, "r", shape=self.size)
        for name, values in self.rows.items():
            values[: self.size] = torch.from_numpy(rows[name].copy())
        self.saved = self.size


# ---- 7. Update ----
DRAWS = ("beta", "uniform", "noise", "offsets", "intensity")  # what an update is given besides its networks and replay


def update(agent, target, optimizer, replay, draws, args):
    """One gradient step on a prioritised batch, and the target network's step after it -> dict of detached [].

    draws: beta [], uniform [B], noise [passes, 2, K], offsets [passes, 2, B, 2], intensity [passes, 2, B]; what belongs
    to the two networks, or to observations and next ones, is drawn for itself, and in each of SAM's passes anew.
    """
    index, weights = replay.sample(draws["uniform"], draws["beta"])
    batch = replay.gather(index) | {"weights": weights}

    def gradient(i, params):
        """The gradient of pass i in param.grad, its loss, and new priorities. Reference code: both passes set them."""
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
        climbing = everything if args.sam_scope == "all" else list(getattr(agent, args.sam_scope).parameters())
        parts["sam_loss"] = gradient(0, climbing)["loss"]
        saved = sam_perturb(climbing, args.sam_rho)
    parts |= gradient(-1, everything)
    parts["grad_norm"] = nn.utils.clip_grad_norm_(everything, args.max_grad_norm)
    if args.sam:
        sam_restore(climbing, saved)
    optimizer.step()  # Easy to miss: from where the climb began, with the gradient of where it ended.
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), everything, args.tau)
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
    args, device = set_up_torch(args)
    state = load_checkpoint(args.resume) if args.resume else {"step": 0, "restarts": 0, "exact_step": 0, "exact": True}
    step, restarts, exact_step = state["step"], state["restarts"] + (not state["exact"]), state["exact_step"]
    if state.get("done") and step >= args.total_timesteps:
        fail(f"{args.resume} is at step {step} already: raise --total-timesteps, or --evaluate it")
    init_seed, *seeds = np.random.SeedSequence(args.seed).generate_state(5).tolist()
    torch.manual_seed(init_seed)
    explore_rng, sample_rng, noise_rng, augment_rng = (torch.Generator().manual_seed(seed) for seed in seeds)
    envs = make_envs(args, "train", restarts)
    agent = make_agent(envs, args).to(device)
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    replay = Replay(max(args.total_timesteps, step), envs.single_observation_space.shape, args, device)
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
    num_actions, noise_size = int(envs.single_action_space.n), sum(len(noise) for noise in noise_of(agent))
    last_update = args.replay_ratio * max(args.total_timesteps - args.learning_starts, 1)

    def draw(number):
        """The random numbers of an update, each kind from its own stream."""
        batch, passes = args.batch_size, 1 + args.sam
        beta = args.prioritized_replay_beta
        beta += (1 - beta) * min(number / last_update, 1)
        noise = torch.randn(passes, 2, noise_size, generator=noise_rng)
        if args.sam and args.sam_noise == "reuse":
            noise[1] = noise[0]
        elif args.sam and args.sam_noise == "none":
            noise[0] = 0
        draws = {"beta": torch.tensor(beta, dtype=torch.float64), "noise": noise}
        draws["uniform"] = torch.rand(batch, dtype=torch.float64, generator=sample_rng)
        draws["offsets"] = torch.randint(2 * PAD + 1, (passes, 2, batch, 2), generator=augment_rng)
        draws["intensity"] = torch.randn(passes, 2, batch, generator=augment_rng)
        return {name: draws[name].to(device, non_blocking=True) for name in DRAWS}

    def learn(*draws):
        return update(agent, target, optimizer, replay, dict(zip(DRAWS, draws, strict=True)), args)

    learner = Captured(learn, graphs, [agent, target, optimizer, replay])
    policy = Captured(partial(act, target), graphs)  # Reference code: base.py:107, the target network explores
    run = Run(args, device, state, done=step, goal=args.total_timesteps)
    obs, _ = envs.reset()
    replay.begin(obs[0, -1])
    episode_return, episode_length, rewards, scalars, seconds, counted = 0.0, 0, 0.0, [], 0.0, step

    def save(exact=False, done=False):
        replay.save(run.folder / "replay.bin")
        about = {"step": step, "restarts": restarts, "exact_step": exact_step, "exact": exact, "done": done}
        run.save(about | capture(parts))

    exact = state["exact"]
    while step < args.total_timesteps:
        # Act. Easy to miss: the noise of the target network's layers is that of its last update.
        start = time.monotonic()
        if step < args.learning_starts:
            actions = torch.randint(num_actions, (1,), generator=explore_rng)
        else:
            actions, _ = policy(torch.as_tensor(obs).to(device))
        actions = actions.cpu().numpy()
        obs, reward, terminated, truncated, info = envs.step(actions)
        ended = bool(terminated[0] | truncated[0])  # Reference code: a time limit ends a game like a failure does.
        life_lost = bool(info.get("life_lost", [False])[0])
        clipped = float(np.sign(reward[0]))
        replay.add(int(actions[0]), clipped, ended or life_lost, obs[0, -1])
        episode_return, episode_length = episode_return + float(reward[0]), episode_length + 1
        rewards += clipped
        step += 1

        # Learn.
        updates = args.replay_ratio * (step - args.learning_starts)
        for number in range(updates + 1, updates + args.replay_ratio + 1) if updates >= 0 else ():
            scalars.append(learner(*draw(number).values()))
            if args.reset_every and number % args.reset_every == 0 and step < args.total_timesteps:
                fresh = make_agent(envs, args).to(device)
                reset_head(agent, target, fresh)
                for network in (agent, target):
                    shrink_and_perturb(network.backbone, fresh.backbone, args.shrink_perturb)
                forget_moments(
                    optimizer, agent.parameters() if args.reset_optimizer == "all" else agent.head.parameters()
                )
        seconds += time.monotonic() - start  # without evaluating and saving

        # Log, evaluate, save.
        exact = ended and crossed(step, args.exact_every, step - exact_step)
        if exact or step % 1000 == 0 or step == args.total_timesteps:
            run.log(step, {"charts/reward": rewards / (step - counted)})
            if scalars:
                losses = {key: torch.stack([row[key] for row in scalars]).mean().item() for key in scalars[0]}
                run.log(step, {f"losses/{key}": value for key, value in losses.items()})
            run.log(step, {"charts/SPS": (step - counted) / seconds, "charts/frames": 4 * step})
            rewards, scalars, seconds, counted = 0.0, [], 0.0, step
        if ended:
            run.log(step, {"charts/episodic_return": episode_return, "charts/episodic_length": episode_length})
            episode_return, episode_length = 0.0, 0
        if crossed(step, args.eval_every, 1):
            if step >= args.learning_starts:
                run.log(step, active_units(agent, replay, args))
            if step < args.total_timesteps:
                table = compare(target, args, make_envs, args.eval_episodes, lambda: run.tick(save))
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
        table = compare(target, args, make_envs, args.final_eval_episodes, lambda: run.tick(save))
        run.log(step, eval_scalars(table))
        report(table, step, run.folder)
    save(exact, done=True)
    run.close()
    return target


def crossed(step, every, batch_size):
    """Whether the last batch crossed a multiple of `every` (0: never)."""
    return every > 0 and step // every > (step - batch_size) // every


# ---- 9. Evaluation, checkpoints and logs ----
def evaluate(agent, args, make_envs, episodes, tick=lambda: None):
    """Returns [episodes] of greedy whole games on args.eval_seed's games, the same ones each time.

    Paper: the target network, no noise, a random action now and then. A lost life empties the stack and no more.
    Each environment gives its first episodes/N, so that short ones are not favoured. Touches no stream of training.
    """
    args = dataclasses.replace(args, seed=args.eval_seed, num_envs=min(args.eval_envs, episodes))
    envs, explore_rng = make_envs(args, "test"), torch.Generator().manual_seed(args.eval_seed)
    device, num_actions = next(agent.parameters()).device, int(envs.single_action_space.n)
    agent.eval()
    obs, _ = envs.reset()
    total, finished, quota = np.zeros(args.num_envs), [[] for _ in range(args.num_envs)], episodes // args.num_envs
    while len(active := [n for n, returns in enumerate(finished) if len(returns) < quota]):  # the rest idles
        actions = torch.randint(num_actions, (args.num_envs,), generator=explore_rng).numpy()
        greedy = (torch.rand(args.num_envs, generator=explore_rng) >= args.eval_epsilon).numpy()
        chosen, _ = act(agent, torch.as_tensor(obs[active]).to(device))
        actions[active] = np.where(greedy[active], chosen.cpu().numpy(), actions[active])
        obs, reward, terminated, truncated, _ = envs.step(actions)
        total += reward
        for n in np.flatnonzero(terminated | truncated):
            finished[n].append(total[n])
            total[n] = 0.0
        tick()
    envs.close()
    agent.train()
    return np.array([returns[:quota] for returns in finished]).flatten()


# Modified from mdpo.py: one agent and one set of games; normalised is the score between random play and a human's.
def compare(agent, args, make_envs, episodes, tick=lambda: None):
    """The agent's scores: a list of one row."""
    low, high = ATARI_SCORES[game_of(args)]
    returns = evaluate(agent, args, make_envs, episodes, tick)
    mean, std, median = float(returns.mean()), float(returns.std()), float(np.median(returns))
    row = {"split": "test", "episodes": episodes, "mean": mean, "std": std, "median": median}
    return [row | {"random": low, "human": high, "normalised": (mean - low) / (high - low)}]


# Modified from mdpo.py: one agent and one set of games.
def eval_scalars(table):
    """What is logged of a table of `compare`."""
    return {"eval/test_return": table[0]["mean"], "eval/test_return_normalised": table[0]["normalised"]}


def active_units(agent, replay, args):
    """Shares of what is not zero behind the ReLUs of backbone and of head, without noise. Paper: on 512 transitions."""
    uniform = torch.rand(512, dtype=torch.float64, generator=torch.Generator().manual_seed(args.eval_seed))
    index, _ = replay.sample(uniform.to(replay.device), 1.0)
    active = {"backbone": [], "head": []}
    hooks = [
        module.register_forward_hook(lambda _, __, output, seen=seen: seen.append((output != 0).flatten()))
        for name, seen in active.items()
        for module in getattr(agent, name).modules()
        if isinstance(module, nn.ReLU)
    ]
    agent.eval()
    act(agent, replay.gather(index)["obs"])
    agent.train()
    for hook in hooks:
        hook.remove()
    return {f"charts/active_{name}": torch.cat(seen).float().mean().item() for name, seen in active.items() if seen}


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


# Modified from ppo_netrand.py: the target network, which acts.
def load_agent(args, state, make_envs=make_envs, make_agent=Agent):
    """The agent of a checkpoint, for `compare` or `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(dataclasses.replace(args, num_envs=1), "test")
    agent = make_agent(envs, args).to(device)
    agent.load_state_dict(state["target"])
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
    least = {"v_min": -sys.maxsize, "v_max": args.v_min + 1e-6, "n_atoms": 2, "max_grad_norm": 1e-6}
    least |= {"learning_starts": args.n_step + 1}
    positive = ("eval_episodes", "final_eval_episodes", "eval_envs", "total_timesteps", "num_envs", "replay_ratio")
    least |= dict.fromkeys((*positive, "batch_size", "n_step"), 1)
    most = dict.fromkeys(("gamma", "tau", "shrink_perturb", "eval_epsilon", "prioritized_replay_beta", "num_envs"), 1)
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: from {low} to {high}")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot hold a slash")
    for name in ("eval_episodes", "final_eval_episodes"):
        if getattr(args, name) % min(args.eval_envs, getattr(args, name)):
            fail(
                f"--{name.replace('_', '-')} {getattr(args, name)}: not a multiple of the {args.eval_envs} environments"
            )
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: pip install wandb")
    game_of(args)
    size, memory = args.total_timesteps * 84 * 84, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.cuda and torch.cuda.is_available():
        _, memory = torch.cuda.mem_get_info()
    folder = checkpoint_path(args.resume).parent if args.resume else Path(args.runs_dir).absolute()
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    disk += (folder / "replay.bin").stat().st_size if (folder / "replay.bin").exists() else 0  # a resumed run's own
    for room, name in ((memory, "memory"), (disk, "disk")):
        if size > room:
            fail(f"--total-timesteps: {size >> 20} MB of replay do not fit into {room >> 20} MB of {name}")


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
    free |= {"eval_envs", "eval_epsilon"}
    try:
        args = tyro.cli(Args, args=flags, default=Args(**state["args"] | {"resume": None, "evaluate": None}))
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
