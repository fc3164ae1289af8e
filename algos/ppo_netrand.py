# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5", "numpy==2.4.6", "PyQt5-Qt5==5.15.19", "tensorboard==2.21.0", "torch==2.14.0", "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Network randomization on Procgen: PPO that sees through a convolution drawn anew every iteration.
A feature-matching loss ties what it sees then to what it sees without: what survives any colours and textures remains.

Paper: Lee et al. 2020, Network Randomization: A Simple Technique for Generalization in Deep Reinforcement Learning.
Checked against github.com/pokaxpoka/netrand (8388251), losses and gradients; its Procgen settings: kaixin96/mixreg.
Deviations: Procgen, whose CoinRun has a plain and a full look (--plain-look), where the authors split old CoinRun's
themes; their --no-norm-reward --anneal-lr --anneal-clip --num-envs 32 are off, as in ports to Procgen; initialisation,
pooling and Adam's epsilon are PyTorch's; the velocity box is spared whole, 13 x 26 pixels, not 12 x 24.

    python algos/ppo_netrand.py --env-id coinrun                            # the paper's CoinRun: hard, 500 levels
    python algos/ppo_netrand.py --env-id coinrun --plain-look               # trained on one look, judged on all
    python algos/ppo_netrand.py --env-id coinrun --no-netrand               # its baseline, plain PPO
    python algos/ppo_netrand.py --resume runs/<folder>                      # go on where a run stopped
    python algos/ppo_netrand.py --evaluate runs/<folder> --mc-samples 20    # clean and Monte Carlo policy
"""

# ---- 1. Imports ----
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
from collections import deque
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
    exact_every: int = 2_000_000  # steps between bit-for-bit checkpoints, where environments start afresh (0: never)
    resume: str | None = None  # run folder or checkpoint to go on from
    evaluate: str | None = None  # run folder or checkpoint to evaluate, without training
    eval_every: int = 163_840  # steps between evaluations (0: never)
    eval_episodes: int = 128  # episodes an evaluation, agent and set of levels
    final_eval_episodes: int = 128  # episodes of the last evaluation
    eval_seed: int = 42  # draws the evaluated levels, the same ones each time

    env_id: str = "coinrun"  # the game (or its EnvPool id) or task; a wrong one is told the right ones
    distribution_mode: Literal["easy", "hard"] = "hard"  # difficulty of the levels (an EnvPool id has its own)
    num_levels: int = -1  # training levels (-1: 500 in hard mode, 200 in easy; 0: all there are)
    start_level: int = 0  # first training level
    plain_look: bool = False  # train on one theme without backgrounds, evaluate on the full look too (hard CoinRun)
    paint_vel_info: bool = False  # paint the velocity box that old CoinRun had (--plain-look does too)
    total_timesteps: int = 25_000_000  # steps an agent (PPO: rounded up to whole rollouts; DMC, 0: the paper's)
    # Paper: the method. What it leaves open is the authors' code's; mc_samples is in neither, 10 is ours.
    netrand: bool = True  # the method; off: PPO
    clean_prob: float = 0.1  # alpha, share of the iterations without a random kernel. Reference code: config.py:125
    clean_mode: Literal["skip", "identity"] = "skip"  # a clean iteration: no kernel but still one to match, or identity
    fm_coef: float = 0.002  # beta, weight of the feature-matching loss
    keep_vel_info: bool = True  # the random convolution leaves a painted velocity box as it is
    mc_samples: int = 10  # M, random kernels that the last evaluation averages over as well (0: clean policy alone)
    # Reference code: PPO's settings, config.py:56-61, train_random.py:43-49 and random_ppo2.py:79-82, 149-153 and 287.
    # Deviation: 64 environments and 25M steps, usual on Procgen; theirs are 32 and 256M a worker (config.py:41).
    num_envs: int = 64  # N, parallel environments an agent
    num_steps: int = 256  # T, steps of a rollout
    num_minibatches: int = 8  # minibatches an epoch
    update_epochs: int = 3  # epochs a rollout
    learning_rate: float = 5e-4  # Adam
    anneal_lr: bool = False  # learning rate falls linearly to 0
    norm_reward: bool = True  # divide rewards by their return's running deviation
    gamma: float = 0.999  # discount
    gae_lambda: float = 0.95  # GAE's lambda
    norm_adv: bool = True  # normalise advantages over each minibatch
    clip_coef: float = 0.2  # epsilon of the policy and of the value loss
    anneal_clip: bool = False  # epsilon falls linearly to 0 too
    clip_vloss: bool = True  # clip the value loss too
    ent_coef: float = 0.01  # c2, entropy bonus
    vf_coef: float = 0.5  # c1, value loss (which holds another 0.5)
    max_grad_norm: float = 0.5  # greatest global norm of an agent's gradient


# ---- 3. Environments ----
# (least, greatest) return in easy and in hard mode, for normalised returns. Reference code: train-procgen constants.py.
PROCGEN_RETURNS = {
    "bigfish": ((1, 40), (0, 40)),
    "bossfight": ((0.5, 13), (0.5, 13)),
    "caveflyer": ((3.5, 12), (2, 13.4)),
    "chaser": ((0.5, 13), (0.5, 14.2)),
    "climber": ((2, 12.6), (1, 12.6)),
    "coinrun": ((5, 10), (5, 10)),
    "dodgeball": ((1.5, 19), (1.5, 19)),
    "fruitbot": ((-1.5, 32.4), (-0.5, 27.2)),
    "heist": ((3.5, 10), (2, 10)),
    "jumper": ((1, 10), (1, 10)),
    "leaper": ((1.5, 10), (1.5, 10)),
    "maze": ((5, 10), (4, 10)),
    "miner": ((1.5, 13), (1.5, 20)),
    "ninja": ((3.5, 10), (2, 10)),
    "plunder": ((4.5, 30), (3, 30)),
    "starpilot": ((2.5, 64), (1.5, 35)),
}


def make_envs(args, split, restart=0):
    """Vector environment of `split`, whose levels are drawn by (args.seed, split, restart).

    "train": the args.num_levels training levels. "test": all levels there are. Both look as args.plain_look says.
    "full_look": the training levels, in the order of "train", in the full look: the style alone is new.
    reset() -> obs uint8 [N, 3, 64, 64], info.
    step(actions int64 [N]) -> obs, reward float32 [N], terminated bool [N], truncated bool [N], info.
    An episode's end is followed by the next one in the same step: obs is then the new episode's first observation.
    """
    envpool = import_envpool()
    game, mode = game_and_mode(args)
    num_levels = {"easy": 200, "hard": 500}[mode] if args.num_levels == -1 else args.num_levels
    levels = (0, 0) if split == "test" else (num_levels, args.start_level)
    plain = args.plain_look and split != "full_look"
    entropy = (args.seed, int(split == "test"), restart)
    envs = envpool.make_gymnasium(
        f"{game.capitalize()}{mode.capitalize()}-v0",
        num_envs=args.num_envs,
        seed=int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1),
        num_levels=levels[0],
        start_level=levels[1],
        restrict_themes=plain,  # of sprites and ground
        use_backgrounds=not plain,
        paint_vel_info=args.paint_vel_info or args.plain_look,
    )
    return SameStepReset(envs)


class SameStepReset:
    """EnvPool environments in which the step that ends an episode begins the next one.

    Easy to miss: left alone, EnvPool ignores the action after an episode's end and returns a transition without a
    meaning, which PPO would learn from. Resetting the ended environments at once leaves the stream of real ones as is.
    """

    def __init__(self, envs):
        self.envs = envs

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.envs.step(actions)
        ended = np.flatnonzero(terminated | truncated).astype(np.int32)
        if len(ended):
            obs[ended] = self.envs.reset(ended)[0]
        return obs, reward, terminated, truncated, info


def game_and_mode(args):
    """("bigfish", "hard") from a game's name and args.distribution_mode, or from EnvPool's BigfishHard-v0."""
    name = args.env_id.lower().removesuffix("-v0")
    for mode in ("easy", "hard"):
        if name.endswith(mode) and name.removesuffix(mode) in PROCGEN_RETURNS:
            return name.removesuffix(mode), mode
    if name not in PROCGEN_RETURNS:
        nearest = difflib.get_close_matches(name, PROCGEN_RETURNS, n=1, cutoff=0)[0]
        fail(f"--env-id {args.env_id}: no such game, {nearest} is nearest of {' '.join(PROCGEN_RETURNS)}")
    return name, args.distribution_mode


def import_envpool():
    """EnvPool, after the two Qt libraries that its Procgen draws with: the PyQt5-Qt5 package's, else the system's."""
    package = importlib.util.find_spec("PyQt5")
    folder = Path(package.submodule_search_locations[0]) / "Qt5" / "lib" if package else None
    try:
        for library in ("libQt5Core.so.5", "libQt5Gui.so.5"):
            ctypes.CDLL(str(folder / library) if folder else library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        cure = "apt-get install libgl1 libglib2.0-0" if folder else "pip install PyQt5-Qt5"
        fail(f"Procgen needs a library that is missing ({error}); try: {cure}")
    import envpool

    return envpool


# ---- 4. Networks ----
class Agent(nn.Module):
    """IMPALA encoder, policy head, value head: 626,256 parameters on Procgen. Reference code: policies.py:212-355."""

    def __init__(self, envs, args):
        super().__init__()
        channels = envs.single_observation_space.shape[0]
        blocks = [ImpalaBlock(n_in, n_out) for n_in, n_out in ((channels, 16), (16, 32), (32, 32))]  # [B, 32, 8, 8]
        self.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.ReLU(), nn.Linear(2048, 256), nn.ReLU())  # [B, 256]
        self.actor = orthogonal(nn.Linear(256, int(envs.single_action_space.n)), gain=0.01)
        self.critic = orthogonal(nn.Linear(256, 1), gain=1.0)
        self.bf16 = args.precision == "bf16"
        self.keep_box = args.keep_vel_info and (args.paint_vel_info or args.plain_look)
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU

    def features(self, obs, kernel=None):  # uint8 [B, 3, 64, 64], [3, 3, 3, 3] or None: as it is
        pixels = obs.to(torch.float32, memory_format=torch.channels_last) / 255
        if kernel is not None:
            pixels = randomise(pixels, kernel, self.keep_box)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder(pixels).float()  # [B, 256], after the ReLU; the heads are always fp32

    def heads(self, hidden):
        return self.actor(hidden), self.critic(hidden).squeeze(-1)  # logits [B, A], values [B]

    def forward(self, obs, kernel=None):
        return self.heads(self.features(obs, kernel))


class ImpalaBlock(nn.Module):
    """Convolution, pooling to half the size, two residual blocks. [B, n_in, H, W] -> [B, n_out, H/2, W/2]."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.residual = nn.Sequential(Residual(n_out), Residual(n_out))

    def forward(self, x):
        return self.residual(self.pool(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv1(self.conv0(x.relu()).relu())


def orthogonal(layer, gain):
    """The layer with orthogonal weights and no bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def act(agent, obs, noise):
    """Samples from the policy. obs [B, ...], noise ~ Exp(1) [B, A] -> actions, their log_probs, values, [B] each.

    argmax_a p(a)/noise(a) is a draw from p: the noise comes in from outside, so a captured call would stay random.
    """
    logits, values = agent(obs)
    log_probs = logits.log_softmax(-1)  # [B, A]
    actions = (log_probs - noise.log()).argmax(-1)
    return actions, log_probs.gather(1, actions[:, None]).squeeze(1), values


# ---- 5. The method ----
def random_kernel(generator):
    """A random convolution [3, 3, 3, 3] of standard deviation sqrt(2 / (27 + 27)), without a bias.

    Paper: Glorot normal. Reference code: policies.py:286, TensorFlow's, which is cut at two deviations and widened so
    that what is left has the deviation asked for.
    """
    std = (2 / (27 + 27)) ** 0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(3, 3, 3, 3), std=std, a=-2 * std, b=2 * std, generator=generator)


def randomise(obs, kernel, keep_box=False):
    """The observations through the random convolution. [B, 3, H, W] in 0..1, [3, 3, 3, 3] -> [B, 3, H, W], unbounded.

    keep_box: the velocity box, 13 x 26 pixels at the top left, is hidden from the convolution and stays as it is.
    """
    if not keep_box:
        return nn.functional.conv2d(obs, kernel, padding=1)
    hidden = obs.clone()
    hidden[:, :, :13, :26] = 0
    randomised = nn.functional.conv2d(hidden, kernel, padding=1)
    randomised[:, :, :13, :26] = obs[:, :, :13, :26]
    return randomised


def feature_matching_loss(h_random, h_clean):
    """Mean squared distance of the randomised features to the clean ones. [B, D], [B, D] -> []. Paper: L_FM.

    Deviation: the mean over the features too, as in random_ppo2.py:107; the paper's squared norm is D times larger.
    """
    return (h_random - h_clean.detach()).square().mean()  # Easy to miss: no gradient reaches the clean branch.


@torch.no_grad()
def monte_carlo_policy(agent, obs, kernels):
    """Mean over random kernels of the action probabilities. uint8 [B, ...], [M, 3, 3, 3, 3] -> [B, A]."""
    return torch.stack([agent(obs, kernel)[0].softmax(-1) for kernel in kernels]).mean(0)


def netrand_loss(agent, kernel, clean, clip_coef, batch, args):
    """PPO's loss on what the policy acted on, plus the feature matching. -> loss [], dict of parts [].

    clean: the policy of this iteration sees no kernel; its features are matched all the same (random_ppo2.py:125).
    """
    hidden = agent.features(batch["obs"], None if clean else kernel)  # [B, 256]
    logits, values = agent.heads(hidden)  # [B, A], [B]
    log_probs_all = logits.log_softmax(-1)
    # Easy to miss: not gather, whose repeatable gradient copies from the CPU in older torch and breaks a capture.
    log_probs = -nn.functional.nll_loss(log_probs_all, batch["actions"], reduction="none")
    policy_loss = clipped_policy_loss(log_probs, batch["log_probs"], batch["advantages"], clip_coef)
    value_clip = clip_coef if args.clip_vloss else float("inf")
    value_loss = clipped_value_loss(values, batch["values"], batch["returns"], value_clip)
    entropy = -(log_probs_all.exp() * log_probs_all).sum(-1).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    if args.netrand and args.fm_coef > 0:
        with torch.set_grad_enabled(clean):  # the clean branch of the matching needs no gradient
            other = agent.features(batch["obs"], kernel if clean else None)
        h_random, h_clean = (other, hidden) if clean else (hidden, other)
        parts["feature_matching_loss"] = feature_matching_loss(h_random, h_clean)
        loss = loss + args.fm_coef * parts["feature_matching_loss"]
    log_ratio = log_probs.detach() - batch["log_probs"]
    parts["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean()
    parts["clipfrac"] = ((log_ratio.exp() - 1).abs() > clip_coef).float().mean()
    return loss, parts


# ---- 6. Losses, targets, replay ----
def clipped_policy_loss(log_probs, old_log_probs, advantages, clip_coef):
    """Negative clipped surrogate. [B], [B], [B], float -> []. Paper: PPO, arXiv:1707.06347, eq. 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def clipped_value_loss(values, old_values, returns, clip_coef):
    """Half the squared error of the value, or of the one clipped around old_values if worse. [B] x 3, float -> []."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square()).mean()


def compute_gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """GAE's advantages, and returns, [T, N] each; dones[t]: the episode ended with step t. Paper: arXiv:1506.02438."""
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(last_values)
    for t in reversed(range(len(rewards))):
        next_values = last_values if t == len(rewards) - 1 else values[t + 1]
        delta = rewards[t] + gamma * next_values * (1 - dones[t]) - values[t]
        advantages[t] = running = delta + gamma * gae_lambda * (1 - dones[t]) * running
    return advantages, advantages + values


class RewardNormaliser:
    """Divides rewards by the running standard deviation of the discounted return, then clips them to +-10.

    Reference code: gym 0.23.1's NormalizeReward; the clip is baselines' VecNormalize's and MDPO's (main.py:48).
    """

    def __init__(self, num_envs, gamma):
        self.returns, self.gamma = np.zeros(num_envs), gamma
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards, dones):
        """Takes one step of all environments in. [N], bool [N] -> float64 [N]."""
        self.returns = self.returns * self.gamma + rewards
        batch_mean, batch_var, batch_count = self.returns.mean(), self.returns.var(), len(rewards)
        delta, total = batch_mean - self.mean, self.count + batch_count
        squares = self.var * self.count + batch_var * batch_count + delta**2 * self.count * batch_count / total
        self.mean, self.var, self.count = self.mean + delta * batch_count / total, squares / total, total
        self.returns[dones] = 0.0
        return np.clip(rewards / np.sqrt(self.var + 1e-8), -10, 10)

    def state_dict(self):
        """The statistics. The returns under way are left out: they end with the environments."""
        return {"mean": float(self.mean), "var": float(self.var), "count": float(self.count)}

    def load_state_dict(self, state):
        self.mean, self.var, self.count = state["mean"], state["var"], state["count"]


# ---- 7. Update ----
CPU_BATCH = 256  # images a pass on a CPU; the gradients of a minibatch's passes add up to the minibatch's own


def update(agent, optimizer, kernel, clean, clip_coef, batch, args):
    """One gradient step on a minibatch: a dict of [B, ...] -> dict of detached [].

    kernel [3, 3, 3, 3] or None, clean: the iteration's, as in netrand_loss. clip_coef: float64 [], epsilon.
    """
    optimizer.zero_grad()
    advantages = batch["advantages"]
    if args.norm_adv:  # Easy to miss: over the whole minibatch, before it is sliced.
        batch = batch | {"advantages": (advantages - advantages.mean()) / (advantages.std() + 1e-8)}
    size = CPU_BATCH if advantages.device.type == "cpu" else len(advantages)
    totals = {}
    for values in zip(*(value.split(size) for value in batch.values()), strict=True):
        loss, parts = netrand_loss(agent, kernel, clean, clip_coef, dict(zip(batch, values, strict=True)), args)
        share = len(values[0]) / len(advantages)
        (share * loss).backward()
        totals = {key: totals.get(key, 0) + share * part.detach() for key, part in parts.items()}
    totals["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    return totals


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
# Modified from mdpo.py: the episodes that end in clean iterations are kept apart from the others.
class Player:
    """What an agent has to itself: environments, the rollout they fill, a random stream, and the finished episodes."""

    def __init__(self, envs, make_agent, args, noise_seed, device):
        self.agent = make_agent(envs, args).to(device)
        self.noise_rng = torch.Generator().manual_seed(noise_seed)
        self.normaliser = RewardNormaliser(args.num_envs, args.gamma)
        self.finished = [deque(maxlen=100), deque(maxlen=100)]  # (return, length) of the last ones; [1]: clean
        shape, obs_shape = (args.num_steps, args.num_envs), envs.single_observation_space.shape
        keys = ("log_probs", "values", "rewards", "dones", "advantages", "returns")
        self.rollout = {key: torch.zeros(shape, device=device) for key in keys}
        self.rollout["actions"] = torch.zeros(shape, dtype=torch.int64, device=device)
        self.rollout["obs"] = torch.zeros(*shape, *obs_shape, dtype=torch.uint8, device=device)
        self.obs = torch.zeros(args.num_envs, *obs_shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.begin(envs)

    def begin(self, envs):
        """First episodes in fresh environments; what was under way in the old ones is dropped and not counted."""
        self.envs = envs
        self.obs.copy_(torch.as_tensor(envs.reset()[0]))
        self.normaliser.returns = np.zeros(envs.num_envs)
        self.episode_return, self.episode_length = np.zeros(envs.num_envs), np.zeros(envs.num_envs)

    def count(self, reward, done, clean):
        """Adds a step to the episodes under way, and those that ended with it to the finished ones of their kind."""
        self.episode_return += reward
        self.episode_length += 1
        ended = zip(self.episode_return[done].tolist(), self.episode_length[done].tolist(), strict=True)
        self.finished[clean].extend(ended)
        self.episode_return[done], self.episode_length[done] = 0.0, 0.0

    def state_dict(self):
        parts = {"agent": self.agent, "normaliser": self.normaliser, "noise_rng": self.noise_rng}
        return capture(parts) | {"finished": [list(kind) for kind in self.finished]}

    def load_state_dict(self, state):
        restore({"agent": self.agent, "normaliser": self.normaliser, "noise_rng": self.noise_rng}, state)
        for kind, episodes in zip(self.finished, state["finished"], strict=True):
            kind.extend(episodes)


def train(args, make_envs=make_envs, make_agent=Agent):
    """Trains to args.total_timesteps and returns the agent. The factories are the seams for suites and networks."""
    check(args)
    args, device = set_up_torch(args)
    state = load_checkpoint(args.resume) if args.resume else {"step": 0, "restarts": 0, "exact": True}
    step, restarts = state["step"], state["restarts"] + (not state["exact"])
    if state.get("done") and step >= args.total_timesteps:
        fail(f"{args.resume} is at step {step} already: raise --total-timesteps, or --evaluate it")
    init_seed, shuffle_seed, noise_seed, kernel_seed = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    torch.manual_seed(init_seed)
    shuffle_rng, kernel_rng = (torch.Generator().manual_seed(seed) for seed in (shuffle_seed, kernel_seed))
    player = Player(make_envs(args, "train", restarts), make_agent, args, noise_seed, device)
    agent, rollout = player.agent, player.rollout
    kernel = torch.zeros(3, 3, 3, 3, device=device) if args.netrand else None  # the iteration's
    # Tensors, so that captured calls see them change; epsilon in double precision, which rounds like a constant.
    rate = torch.tensor(args.learning_rate, device=device)
    clip_coef = torch.tensor(args.clip_coef, device=device, dtype=torch.float64)
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, fused=True)
    parts = {"optimizer": optimizer, "player": player, "shuffle_rng": shuffle_rng, "kernel_rng": kernel_rng}
    parts["torch_rng"] = torch.default_generator
    batch_size, updates = args.num_envs * args.num_steps, args.update_epochs * args.num_minibatches
    # The bar's share for collecting: a forward pass a step, where learning takes three an epoch, or four with a match.
    collecting = batch_size / (1 + args.update_epochs * (4 if args.netrand else 3))
    if args.resume:
        restore(parts, state)
        print(f"step {step}: " + ("bit for bit" if state["exact"] else "continued, in fresh environments"))
    elif device.type == "cpu" and args.total_timesteps > 2_000_000:
        print("this length is meant for a GPU; on a CPU, try --total-timesteps 100000")
    graphs = args.cuda_graphs and device.type == "cuda"
    group = optimizer.param_groups[0]
    group |= {"lr": rate.copy_(group["lr"]), "capturable": graphs}  # Easy to miss: a checkpoint's are another device's.
    keys = ("obs", "actions", "log_probs", "values", "advantages", "returns")
    batch = {key: rollout[key].flatten(0, 1) for key in keys}  # [T*N, ...], views

    def learn(clean, index):
        minibatch = {key: value[index] for key, value in batch.items()}
        return update(agent, optimizer, kernel, clean, clip_coef, minibatch, args)

    # Of each a version for clean iterations and one for the others: a captured call has no branches.
    seen = {clean: partial(agent, kernel=None if clean else kernel) for clean in (False, True)}
    policies = {clean: Captured(partial(act, seen[clean]), graphs) for clean in seen}
    learners = {clean: Captured(partial(learn, clean), graphs, [agent, optimizer]) for clean in seen}
    iterations = -(-args.total_timesteps // batch_size)
    run = Run(args, device, state, done=step, goal=iterations * batch_size)

    def save(exact=False, done=False):
        run.save({"step": step, "restarts": restarts, "exact": exact, "done": done} | capture(parts))

    exact = state["exact"]
    while step < args.total_timesteps:
        # Draw the kernel. Easy to miss: one for the whole iteration, or the ratios would compare two different inputs.
        start, clean = time.monotonic(), False
        if args.netrand:
            kernel.copy_(random_kernel(kernel_rng))
            clean = torch.rand((), generator=kernel_rng).item() < args.clean_prob
        if clean and args.clean_mode == "identity":
            nn.init.dirac_(kernel)  # which leaves nothing to match

        # Collect T steps from each environment.
        for t in range(args.num_steps):
            obs = rollout["obs"][t].copy_(player.obs, non_blocking=True)
            noise = torch.empty(args.num_envs, int(player.envs.single_action_space.n))
            noise = noise.exponential_(generator=player.noise_rng).to(device)
            actions, log_probs, values = policies[clean](obs, noise)
            next_obs, reward, terminated, truncated, _ = player.envs.step(actions.cpu().numpy())
            done = terminated | truncated  # Reference code: a time limit ends an episode like a failure does.
            row = {"actions": actions, "log_probs": log_probs, "values": values, "dones": done}
            row["rewards"] = player.normaliser(reward, done) if args.norm_reward else reward
            for key, value in row.items():
                rollout[key][t] = torch.as_tensor(value)
            player.obs.copy_(torch.as_tensor(next_obs))
            player.count(reward, done, clean)
            run.tick(save, collecting / args.num_steps)
        step += batch_size

        # Learn from them.
        with torch.no_grad():
            _, last_values = seen[clean](player.obs.to(device))
        rewards, values, dones = (rollout[key] for key in ("rewards", "values", "dones"))
        targets = compute_gae(rewards, values, dones, last_values, args.gamma, args.gae_lambda)
        for key, value in zip(("advantages", "returns"), targets, strict=True):
            rollout[key].copy_(value)
        run.log(step, {"charts/reward": rewards.mean().item(), "charts/clean": float(clean)})
        left = 1 - (step - batch_size) / args.total_timesteps
        if args.anneal_lr:
            rate.fill_(args.learning_rate * left)
        if args.anneal_clip:
            clip_coef.fill_(args.clip_coef * left)
        scalars = []
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_size, generator=shuffle_rng).to(device)
            for index in order.chunk(args.num_minibatches):
                scalars.append(learners[clean](index))
                run.tick(save, (batch_size - collecting) / updates)

        # Log, evaluate, save.
        losses = {key: torch.stack([row[key] for row in scalars]).mean().item() for key in scalars[0]}
        seconds = time.monotonic() - start  # without evaluating and saving
        unexplained = (batch["returns"] - batch["values"]).var() / batch["returns"].var()
        losses["explained_variance"] = 1 - unexplained.nan_to_num(1, 1).item()
        run.log(step, {f"losses/{key}": value for key, value in losses.items()})
        run.log(step, {"charts/SPS": batch_size / seconds, "charts/frames": step, "charts/learning_rate": rate.item()})
        if player.finished[clean]:
            returns, lengths = np.mean(player.finished[clean], axis=0).tolist()
            suffix = "_clean" if clean else ""
            run.log(step, {f"charts/episodic_return{suffix}": returns, f"charts/episodic_length{suffix}": lengths})
        if crossed(step, args.eval_every, batch_size) and step < args.total_timesteps:
            table = compare(agent, args, make_envs, args.eval_episodes, 0, lambda: run.tick(save))
            run.log(step, eval_scalars(table))
        if exact := crossed(step, args.exact_every, batch_size):
            restarts += 1  # Easy to miss: in every run, interrupted or not, or a resumed one would differ.
            player.envs.close()
            player.begin(make_envs(args, "train", restarts))
        if exact or run.save_due() or step >= args.total_timesteps:  # Easy to miss: before the long last evaluation.
            save(exact)

    player.envs.close()
    if args.eval_every > 0:
        table = compare(agent, args, make_envs, args.final_eval_episodes, args.mc_samples, lambda: run.tick(save))
        run.log(step, eval_scalars(table))
        report(table, step, run.folder)
    save(exact, done=True)
    run.close()
    return agent


def crossed(step, every, batch_size):
    """Whether the last batch crossed a multiple of `every` (0: never)."""
    return every > 0 and step // every > (step - batch_size) // every


# ---- 9. Evaluation, checkpoints and logs ----
def evaluate(agent, args, make_envs, split, episodes, mc_samples=0, tick=lambda: None):
    """Returns [episodes] of sampled actions on args.eval_seed's levels of `split`, the same ones each time.

    mc_samples: random kernels that each step's policy is averaged over (0: the clean policy).
    Each environment gives its first episodes/N, so that short ones are not favoured. Touches no stream of training.
    """
    args = dataclasses.replace(args, seed=args.eval_seed, num_envs=min(args.num_envs, episodes))
    envs, noise_rng = make_envs(args, split), torch.Generator().manual_seed(args.eval_seed)
    kernel_rng = torch.Generator().manual_seed(args.eval_seed)
    device, num_actions = next(agent.parameters()).device, int(envs.single_action_space.n)
    agent.eval()
    obs, _ = envs.reset()
    total, finished, quota = np.zeros(args.num_envs), [[] for _ in range(args.num_envs)], episodes // args.num_envs
    actions = np.zeros(args.num_envs, dtype=np.int64)
    while len(active := [n for n, returns in enumerate(finished) if len(returns) < quota]):  # the rest idles
        noise = torch.empty(args.num_envs, num_actions).exponential_(generator=noise_rng)
        seen, noise = torch.as_tensor(obs[active]).to(device), noise[active].to(device)
        if mc_samples:
            kernels = torch.stack([random_kernel(kernel_rng) for _ in range(mc_samples)]).to(device)
            chosen = (monte_carlo_policy(agent, seen, kernels) / noise).argmax(-1)  # as in act
        else:
            chosen, _, _ = act(agent, seen, noise)
        actions[active] = chosen.cpu().numpy()
        obs, reward, terminated, truncated, _ = envs.step(actions)
        total += reward
        for n in np.flatnonzero(terminated | truncated):
            finished[n].append(total[n])
            total[n] = 0.0
        tick()
    envs.close()
    agent.train()
    return np.array([returns[:quota] for returns in finished]).flatten()


# Modified from mdpo.py: one agent, with and without Monte Carlo sampling, and on the look it never saw.
def compare(agent, args, make_envs, episodes, mc_samples, tick=lambda: None):
    """The clean policy, and with mc_samples the Monte Carlo one, on unseen and on training levels: a list of rows."""
    game, mode = game_and_mode(args)
    low, high = PROCGEN_RETURNS[game][mode == "hard"]
    table = []
    for samples in sorted({0, mc_samples if args.netrand else 0}):
        for split in ("test", "train", "full_look") if args.plain_look else ("test", "train"):
            returns = evaluate(agent, args, make_envs, split, episodes, samples, tick)
            mean, std, median = float(returns.mean()), float(returns.std()), float(np.median(returns))
            row = {"mc_samples": samples, "split": split, "episodes": episodes, "mean": mean, "std": std}
            table.append(row | {"median": median, "normalised": (mean - low) / (high - low)})
    return table


# Modified from mdpo.py: one agent, whose Monte Carlo policy is logged under eval/mc_.
def eval_scalars(table):
    """What is logged of a table of `compare`."""
    scalars = {}
    for samples in {row["mc_samples"]: None for row in table}:
        rows = {row["split"]: row for row in table if row["mc_samples"] == samples}
        prefix = "eval/mc_" if samples else "eval/"
        for column, suffix in (("mean", ""), ("normalised", "_normalised")):
            scalars |= {f"{prefix}{split}_return{suffix}": row[column] for split, row in rows.items()}
            scalars[f"{prefix}gap{suffix}"] = rows["train"][column] - rows["test"][column]
    return scalars


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


def load_agent(args, state, make_envs=make_envs, make_agent=Agent):
    """The agent of a checkpoint, for `compare` or `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(dataclasses.replace(args, num_envs=1), "test")
    agent = make_agent(envs, args).to(device)
    agent.load_state_dict(state["player"]["agent"])
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
    least = {"num_levels": -1, "clip_coef": 1e-6, "max_grad_norm": 1e-6}
    least |= dict.fromkeys(("eval_episodes", "final_eval_episodes", "total_timesteps", "num_envs", "num_steps"), 1)
    least |= dict.fromkeys(("num_minibatches", "update_epochs"), 1)
    most = {"gamma": 1, "gae_lambda": 1, "clean_prob": 1, "num_levels": 2**31 - 1, "start_level": 2**31 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: from {low} to {high}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size < 2 * args.num_minibatches:
        fail(
            f"--num-minibatches {args.num_minibatches}: does not cut {batch_size} steps into equal parts of two or more"
        )
    size, memory = batch_size * 3 * 64 * 64, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.cuda and torch.cuda.is_available():
        _, memory = torch.cuda.mem_get_info()
    if size > memory:
        fail(f"--num-envs x --num-steps: {size >> 30} GB of observations do not fit into {memory >> 30} GB of memory")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot hold a slash")
    for name in ("eval_episodes", "final_eval_episodes"):
        if getattr(args, name) % min(args.num_envs, getattr(args, name)):
            fail(
                f"--{name.replace('_', '-')} {getattr(args, name)}: not a multiple of the {args.num_envs} environments"
            )
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: pip install wandb")
    game, mode = game_and_mode(args)
    if (args.plain_look or args.paint_vel_info) and game in ("chaser", "heist", "maze", "miner", "plunder"):
        fail(f"--plain-look and --paint-vel-info: {game} has no velocity to paint")
    if args.plain_look and (game, mode) == ("coinrun", "easy"):
        fail("--plain-look: easy coinrun has one theme anyway, it needs --distribution-mode hard")


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# Modified from mdpo.py: one agent, and --mc-samples may change when it is evaluated.
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
    free |= {"mc_samples"}
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
    table = compare(agent, args, make_envs, args.final_eval_episodes, args.mc_samples)
    report(table, state["step"], checkpoint_path(args.evaluate).parent)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's writer fails in its thread, and again in this one
    try:
        main()
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}; what was saved before is whole")
