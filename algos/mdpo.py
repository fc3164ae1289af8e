# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5", "numpy==2.4.6", "PyQt5-Qt5==5.15.19", "tensorboard==2.21.0", "torch==2.14.0", "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""MDPO on Procgen: two PPO agents play apart and each also learns to act like the other on its own observations.
What only one of them has read into the pixels costs it the other's agreement: mutual distillation regularises.

Paper: Xie et al. 2025, Representation Convergence: Mutual Distillation is Secretly a Form of Regularization.
Checked against github.com/MyRepositories-hub/Mutual-Distillation-Policy-Optimization (1479b4e), losses and gradients.
Deviations: log_softmax where the authors add 1e-8 to the probabilities (within 1 % while those exceed 1e-6; below,
their gradient fades and ours does not); EnvPool's Procgen; fresh environments at each exact checkpoint; an evaluation
every ten iterations with the same number of episodes of each environment (theirs: the first ten to finish).

    python algos/mdpo.py --env-id bigfish                                   # the paper: hard, 500 levels, 2 x 50M steps
    python algos/mdpo.py --env-id bigfish --num-agents 1                    # its baseline, plain PPO
    python algos/mdpo.py --env-id bigfish --distill-coef 0                  # two agents that never meet
    python algos/mdpo.py --resume runs/<folder>                             # go on where a run stopped
    python algos/mdpo.py --evaluate runs/<folder>                           # unseen against training levels
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

    env_id: str = "bigfish"  # the game (or its EnvPool id) or task; a wrong one is told the right ones
    distribution_mode: Literal["easy", "hard"] = "hard"  # difficulty of the levels (an EnvPool id has its own)
    num_levels: int = -1  # training levels (-1: 500 in hard mode, 200 in easy; 0: all there are)
    start_level: int = 0  # first training level
    # Paper: appendix C, Table 2, from here on. Reference code, where it is silent: norm_adv trainer.py:51-53,
    # clip_vloss trainer.py:88-100, max_grad_norm main.py:34; and eval_seed main.py:115.
    total_timesteps: int = 50_000_000  # steps an agent (PPO: rounded up to whole rollouts; DMC, 0: the paper's)
    num_envs: int = 64  # N, parallel environments an agent
    num_steps: int = 256  # T, steps of a rollout
    num_minibatches: int = 8  # minibatches an epoch
    update_epochs: int = 3  # epochs a rollout
    num_agents: Literal[1, 2] = 2  # 2: MDPO; 1: PPO
    distill_coef: float = 1.0  # alpha, weight of the KL to the peer (0: the agents never meet)
    policy_loss: Literal["ppo", "spo"] = "ppo"  # clipped surrogate, or Simple Policy Optimization's quadratic penalty
    learning_rate: float = 5e-4  # Adam
    anneal_lr: bool = False  # learning rate falls linearly to 0
    gamma: float = 0.999  # discount
    gae_lambda: float = 0.95  # GAE's lambda
    norm_adv: bool = True  # normalise advantages over each minibatch
    clip_coef: float = 0.2  # epsilon of the policy and of the value loss
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

    "train": the args.num_levels training levels. "test": all levels there are.
    reset() -> obs uint8 [N, 3, 64, 64], info.
    step(actions int64 [N]) -> obs, reward float32 [N], terminated bool [N], truncated bool [N], info.
    An episode's end is followed by the next one in the same step: obs is then the new episode's first observation.
    """
    envpool = import_envpool()
    game, mode = game_and_mode(args)
    num_levels = {"easy": 200, "hard": 500}[mode] if args.num_levels == -1 else args.num_levels
    levels = {"train": (num_levels, args.start_level), "test": (0, 0)}[split]
    entropy = (args.seed, ("train", "test").index(split), restart)  # Reference code: both agents share their levels.
    envs = envpool.make_gymnasium(
        f"{game.capitalize()}{mode.capitalize()}-v0",
        num_envs=args.num_envs,
        seed=int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1),
        num_levels=levels[0],
        start_level=levels[1],
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
    """IMPALA encoder, policy head, value head: 626,256 parameters on Procgen. Reference code: agent.py, model.py."""

    def __init__(self, envs, args):
        super().__init__()
        channels = envs.single_observation_space.shape[0]
        blocks = [ImpalaBlock(n_in, n_out) for n_in, n_out in ((channels, 16), (16, 32), (32, 32))]  # [B, 32, 8, 8]
        self.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.ReLU(), nn.Linear(2048, 256), nn.ReLU())  # [B, 256]
        self.actor = orthogonal(nn.Linear(256, int(envs.single_action_space.n)), gain=0.01)
        self.critic = orthogonal(nn.Linear(256, 1), gain=1.0)
        self.bf16 = args.precision == "bf16"
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions on a CPU

    def forward(self, obs):  # uint8 [B, 3, 64, 64]
        pixels = obs.to(torch.float32, memory_format=torch.channels_last) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.encoder(pixels).float()  # [B, 256]; the heads are always fp32
        return self.actor(hidden), self.critic(hidden).squeeze(-1)  # logits [B, A], values [B]


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
def distillation_loss(logits, peer_logits):
    """KL(peer || own), the mean over the batch. [B, A], [B, A] -> []. Paper: eq. 18.

    Easy to miss: nothing is detached, so each agent is pulled towards its peer and pulls the peer towards itself.
    """
    log_probs, peer_log_probs = logits.log_softmax(-1), peer_logits.log_softmax(-1)
    return (peer_log_probs.exp() * (peer_log_probs - log_probs)).sum(-1).mean()


def distilling(args):
    return args.num_agents == 2 and args.distill_coef > 0


def agent_loss(agent, peer, batch, args):
    """One agent's RL loss and its KL to the peer on the agent's own observations. -> loss [], dict of parts [].

    Paper: L_RL + alpha * L_KL, eq. 5 and 18; without a peer it is PPO's (or SPO's) loss alone.
    """
    logits, values = agent(batch["obs"])  # [B, A], [B]
    log_probs_all = logits.log_softmax(-1)
    # Easy to miss: not gather, whose repeatable gradient copies from the CPU in older torch and breaks a capture.
    log_probs = -nn.functional.nll_loss(log_probs_all, batch["actions"], reduction="none")
    policy_loss_of = {"ppo": clipped_policy_loss, "spo": spo_policy_loss}[args.policy_loss]
    policy_loss = policy_loss_of(log_probs, batch["log_probs"], batch["advantages"], args.clip_coef)
    value_clip = args.clip_coef if args.clip_vloss else float("inf")
    value_loss = clipped_value_loss(values, batch["values"], batch["returns"], value_clip)
    entropy = -(log_probs_all.exp() * log_probs_all).sum(-1).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    if peer is not None:
        peer_logits, _ = peer(batch["obs"])
        parts["distillation_loss"] = distillation_loss(logits, peer_logits)
        loss = loss + args.distill_coef * parts["distillation_loss"]
    log_ratio = log_probs.detach() - batch["log_probs"]
    parts["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean()
    parts["clipfrac"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
    return loss, parts


# ---- 6. Losses, targets, replay ----
def clipped_policy_loss(log_probs, old_log_probs, advantages, clip_coef):
    """Negative clipped surrogate. [B], [B], [B], float -> []. Paper: PPO, arXiv:1707.06347, eq. 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def spo_policy_loss(log_probs, old_log_probs, advantages, clip_coef):
    """Simple Policy Optimization: a quadratic penalty whose optimum is at the clipping range. [B] x 3, float -> [].

    Reference code: Simple-Policy-Optimization, atari/trainer.py:88-92.
    """
    ratio = (log_probs - old_log_probs).exp()
    return -(ratio * advantages - advantages.abs() * (ratio - 1).square() / (2 * clip_coef)).mean()


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


def update(agents, optimizer, batches, args):
    """One gradient step of all agents, on a minibatch each: dicts of [B, ...] -> dict of detached [agents].

    Paper: Algorithm 1, the mean of the agents' losses. One backward pass an agent and slice: what is live stays small.
    Easy to miss: of two agents each loss is halved before its gradient is clipped. Reference code: trainer.py:71.
    """
    optimizer.zero_grad()
    per_agent = []
    for i, (agent, batch) in enumerate(zip(agents, batches, strict=True)):
        peer = agents[1 - i] if distilling(args) else None
        advantages = batch["advantages"]
        if args.norm_adv:  # Easy to miss: over the whole minibatch, before it is sliced.
            batch = batch | {"advantages": (advantages - advantages.mean()) / (advantages.std() + 1e-8)}
        size = CPU_BATCH if advantages.device.type == "cpu" else len(advantages)
        totals = {}
        for values in zip(*(value.split(size) for value in batch.values()), strict=True):
            loss, parts = agent_loss(agent, peer, dict(zip(batch, values, strict=True)), args)
            share = len(values[0]) / len(advantages)
            (share / len(agents) * loss).backward()
            totals = {key: totals.get(key, 0) + share * part.detach() for key, part in parts.items()}
        per_agent.append(totals)
    for agent, totals in zip(agents, per_agent, strict=True):  # Reference code: trainer.py:84-85, each agent by itself
        totals["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    return {key: torch.stack([totals[key] for totals in per_agent]) for key in per_agent[0]}


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
class Player:
    """What an agent has to itself: environments, the rollout they fill, a random stream, and the finished episodes."""

    def __init__(self, envs, make_agent, args, noise_seed, device):
        self.agent = make_agent(envs, args).to(device)
        self.noise_rng = torch.Generator().manual_seed(noise_seed)
        self.normaliser = RewardNormaliser(args.num_envs, args.gamma)
        self.finished = deque(maxlen=100)  # (return, length) of the last episodes
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

    def count(self, reward, done):
        """Adds a step to the episodes under way, and those that ended with it to the finished ones."""
        self.episode_return += reward
        self.episode_length += 1
        self.finished.extend(zip(self.episode_return[done].tolist(), self.episode_length[done].tolist(), strict=True))
        self.episode_return[done], self.episode_length[done] = 0.0, 0.0

    def state_dict(self):
        parts = {"agent": self.agent, "normaliser": self.normaliser, "noise_rng": self.noise_rng}
        return capture(parts) | {"finished": list(self.finished)}

    def load_state_dict(self, state):
        restore({"agent": self.agent, "normaliser": self.normaliser, "noise_rng": self.noise_rng}, state)
        self.finished.extend(state["finished"])


def train(args, make_envs=make_envs, make_agent=Agent):
    """Trains to args.total_timesteps and returns the agents. The factories are the seams for suites and networks."""
    check(args)
    args, device = set_up_torch(args)
    state = load_checkpoint(args.resume) if args.resume else {"step": 0, "restarts": 0, "exact": True}
    step, restarts = state["step"], state["restarts"] + (not state["exact"])
    if state.get("done") and step >= args.total_timesteps:
        fail(f"{args.resume} is at step {step} already: raise --total-timesteps, or --evaluate it")
    seeds = np.random.SeedSequence(args.seed).generate_state(2 + args.num_agents).tolist()
    init_seed, shuffle_seed, *noise_seeds = seeds
    torch.manual_seed(init_seed)
    shuffle_rng = torch.Generator().manual_seed(shuffle_seed)
    players = [Player(make_envs(args, "train", restarts), make_agent, args, seed, device) for seed in noise_seeds]
    agents = [player.agent for player in players]
    parameters = [parameter for agent in agents for parameter in agent.parameters()]
    rate = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a captured step would see it change
    optimizer = torch.optim.Adam(parameters, lr=rate, eps=1e-5, fused=True)  # Reference code: main.py:103
    parts = {"optimizer": optimizer, "shuffle_rng": shuffle_rng, "torch_rng": torch.default_generator}
    parts |= {f"player{i}": player for i, player in enumerate(players, 1)}
    batch_size, updates = args.num_envs * args.num_steps, args.update_epochs * args.num_minibatches
    # The bar's share for collecting: a forward pass a step, where learning takes three an epoch, or six with a peer.
    collecting = len(agents) * batch_size / (1 + args.update_epochs * (6 if distilling(args) else 3))
    if args.resume:
        restore(parts, state)
        print(f"step {step}: " + ("bit for bit" if state["exact"] else "continued, in fresh environments"))
    elif device.type == "cpu" and args.total_timesteps > 2_000_000:
        print("this length is meant for a GPU; on a CPU, try --distribution-mode easy --total-timesteps 100000")
    graphs = args.cuda_graphs and device.type == "cuda"
    group = optimizer.param_groups[0]
    group |= {"lr": rate.copy_(group["lr"]), "capturable": graphs}  # Easy to miss: a checkpoint's are another device's.
    keys = ("obs", "actions", "log_probs", "values", "advantages", "returns")
    batches = [{key: player.rollout[key].flatten(0, 1) for key in keys} for player in players]  # [T*N, ...], views

    def learn(index):
        minibatches = [{key: value[index] for key, value in batch.items()} for batch in batches]
        return update(agents, optimizer, minibatches, args)

    learn, policies = Captured(learn, graphs, [*agents, optimizer]), [Captured(partial(act, a), graphs) for a in agents]
    iterations = -(-args.total_timesteps // batch_size)
    run = Run(args, device, state, done=step * len(agents), goal=iterations * batch_size * len(agents))

    def save(exact=False, done=False):
        run.save({"step": step, "restarts": restarts, "exact": exact, "done": done} | capture(parts))

    exact = state["exact"]
    while step < args.total_timesteps:
        # Collect T steps from each environment of each agent.
        start = time.monotonic()
        for t in range(args.num_steps):
            for player, policy in zip(players, policies, strict=True):
                obs = player.rollout["obs"][t].copy_(player.obs, non_blocking=True)
                noise = torch.empty(args.num_envs, int(player.envs.single_action_space.n))
                noise = noise.exponential_(generator=player.noise_rng).to(device)
                actions, log_probs, values = policy(obs, noise)
                next_obs, reward, terminated, truncated, _ = player.envs.step(actions.cpu().numpy())
                done = terminated | truncated  # Reference code: a time limit ends an episode like a failure does.
                row = {"actions": actions, "log_probs": log_probs, "values": values}
                row |= {"rewards": player.normaliser(reward, done), "dones": done}
                for key, value in row.items():
                    player.rollout[key][t] = torch.as_tensor(value)
                player.obs.copy_(torch.as_tensor(next_obs))
                player.count(reward, done)
            run.tick(save, collecting / args.num_steps)
        step += batch_size

        # Learn from them.
        for player in players:
            rewards, values, dones = (player.rollout[key] for key in ("rewards", "values", "dones"))
            with torch.no_grad():
                _, last_values = player.agent(player.obs.to(device))
            targets = compute_gae(rewards, values, dones, last_values, args.gamma, args.gae_lambda)
            for key, value in zip(("advantages", "returns"), targets, strict=True):
                player.rollout[key].copy_(value)
        run.log(step, per_agent("charts", {"reward": [player.rollout["rewards"].mean().item() for player in players]}))
        if args.anneal_lr:
            rate.fill_(args.learning_rate * (1 - (step - batch_size) / args.total_timesteps))
        scalars = []
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_size, generator=shuffle_rng).to(device)  # Reference code: one for both agents
            for index in order.chunk(args.num_minibatches):
                scalars.append(learn(index))
                run.tick(save, (len(agents) * batch_size - collecting) / updates)

        # Log, evaluate, save.
        losses = {key: torch.stack([row[key] for row in scalars]).mean(0).tolist() for key in scalars[0]}
        seconds = time.monotonic() - start  # without evaluating and saving
        unexplained = [(batch["returns"] - batch["values"]).var() / batch["returns"].var() for batch in batches]
        losses["explained_variance"] = [1 - share.nan_to_num(1, 1).item() for share in unexplained]
        run.log(step, per_agent("losses", losses))
        run.log(step, {"charts/SPS": len(agents) * batch_size / seconds, "charts/frames": len(agents) * step})
        run.log(step, {"charts/learning_rate": rate.item()})
        if all(player.finished for player in players):
            recent = [np.mean(player.finished, axis=0).tolist() for player in players]
            returns, lengths = zip(*recent, strict=True)
            run.log(step, per_agent("charts", {"episodic_return": returns, "episodic_length": lengths}))
        if crossed(step, args.eval_every, batch_size) and step < args.total_timesteps:
            table = compare(agents, args, make_envs, args.eval_episodes, lambda: run.tick(save))
            run.log(step, eval_scalars(table))
        if exact := crossed(step, args.exact_every, batch_size):
            restarts += 1  # Easy to miss: in every run, interrupted or not, or a resumed one would differ.
            for player in players:
                player.envs.close()
                player.begin(make_envs(args, "train", restarts))
        if exact or run.save_due() or step >= args.total_timesteps:  # Easy to miss: before the long last evaluation.
            save(exact)

    for player in players:
        player.envs.close()
    if args.eval_every > 0:
        table = compare(agents, args, make_envs, args.final_eval_episodes, lambda: run.tick(save))
        run.log(step, eval_scalars(table))
        report(table, step, run.folder)
    save(exact, done=True)
    run.close()
    return agents


def crossed(step, every, batch_size):
    """Whether the last batch crossed a multiple of `every` (0: never)."""
    return every > 0 and step // every > (step - batch_size) // every


# ---- 9. Evaluation, checkpoints and logs ----
def evaluate(agent, args, make_envs, split, episodes, tick=lambda: None):
    """Returns [episodes] of sampled actions on args.eval_seed's levels of `split`, the same ones each time.

    Each environment gives its first episodes/N, so that short ones are not favoured. Touches no stream of training.
    """
    args = dataclasses.replace(args, seed=args.eval_seed, num_envs=min(args.num_envs, episodes))
    envs, noise_rng = make_envs(args, split), torch.Generator().manual_seed(args.eval_seed)
    device, num_actions = next(agent.parameters()).device, int(envs.single_action_space.n)
    agent.eval()
    obs, _ = envs.reset()
    total, finished, quota = np.zeros(args.num_envs), [[] for _ in range(args.num_envs)], episodes // args.num_envs
    actions = np.zeros(args.num_envs, dtype=np.int64)
    while len(active := [n for n, returns in enumerate(finished) if len(returns) < quota]):  # the rest idles
        noise = torch.empty(args.num_envs, num_actions).exponential_(generator=noise_rng)
        chosen, _, _ = act(agent, torch.as_tensor(obs[active]).to(device), noise[active].to(device))
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


def compare(agents, args, make_envs, episodes, tick=lambda: None):
    """Each agent on unseen and on training levels: a list of rows."""
    game, mode = game_and_mode(args)
    low, high = PROCGEN_RETURNS[game][mode == "hard"]
    table = []
    for i, agent in enumerate(agents, 1):
        for split in ("test", "train"):
            returns = evaluate(agent, args, make_envs, split, episodes, tick)
            mean, std, median = float(returns.mean()), float(returns.std()), float(np.median(returns))
            row = {"agent": i, "split": split, "episodes": episodes, "mean": mean, "std": std, "median": median}
            table.append(row | {"normalised": (mean - low) / (high - low)})
    return table


def eval_scalars(table):
    """What is logged of a table of `compare`."""
    columns = {}
    for column, suffix in (("mean", ""), ("normalised", "_normalised")):
        test, train = ([row[column] for row in table if row["split"] == split] for split in ("test", "train"))
        gap = [seen - unseen for seen, unseen in zip(train, test, strict=True)]
        columns |= {f"test_return{suffix}": test, f"train_return{suffix}": train, f"gap{suffix}": gap}
    return per_agent("eval", columns)


def per_agent(prefix, columns):
    """{key: [value of each agent]} -> {prefix/key: their mean} and, if they are two, {prefix/agent1/key: value}."""
    scalars = {f"{prefix}/{key}": sum(values) / len(values) for key, values in columns.items()}
    for key, values in columns.items():
        if len(values) > 1:
            scalars |= {f"{prefix}/agent{i}/{key}": value for i, value in enumerate(values, 1)}
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


def load_agents(args, state, make_envs=make_envs, make_agent=Agent):
    """The agents of a checkpoint, for `compare` or `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(dataclasses.replace(args, num_envs=1), "test")
    agents = [make_agent(envs, args).to(device) for _ in range(args.num_agents)]
    for i, agent in enumerate(agents, 1):
        agent.load_state_dict(state[f"player{i}"]["agent"])
    envs.close()
    return agents


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
    most = {"gamma": 1, "gae_lambda": 1, "num_levels": 2**31 - 1, "start_level": 2**31 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: from {low} to {high}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size < 2 * args.num_minibatches:
        fail(
            f"--num-minibatches {args.num_minibatches}: does not cut {batch_size} steps into equal parts of two or more"
        )
    size, memory = args.num_agents * batch_size * 3 * 64 * 64, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
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
    game_and_mode(args)


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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
    agents = load_agents(args, state, make_envs, make_agent)
    table = compare(agents, args, make_envs, args.final_eval_episodes)
    report(table, state["step"], checkpoint_path(args.evaluate).parent)


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's writer fails in its thread, and again in this one
    try:
        main()
    except OSError as error:  # a full disk, say
        sys.exit(f"error: {error}; what was saved before is whole")
