# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "envpool==1.2.5", "numpy==2.4.6", 'PyQt5-Qt5==5.15.19; platform_machine != "aarch64"',
#     "tensorboard==2.21.0", "torch==2.14.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""MDPO on Procgen: two PPO agents train side by side, and each also learns to predict the other's actions on its own
observations. A feature that only one of them relies on costs it the other's agreement, so it is unlearned.

Paper: Xie et al. 2025, Representation Convergence: Mutual Distillation is Secretly a Form of Regularization.
Checked against github.com/MyRepositories-hub/Mutual-Distillation-Policy-Optimization (1479b4e), losses and gradients.
Deviations: log_softmax, where the authors add 1e-8 to the probabilities (within 1 % while those exceed 1e-6; below,
their gradient fades and ours does not); EnvPool's Procgen, one pool of environments for both agents, which starts
afresh every --exact-every steps; evaluation plays one episode per environment, theirs the first ten to finish.

    python algos/mdpo.py --env-id bigfish                      # the paper: hard, 500 levels, 2 x 50M steps
    python algos/mdpo.py --env-id bigfish --num-agents 1       # its baseline, plain PPO
    python algos/mdpo.py --env-id bigfish --distill-coef 0     # two agents that never meet
    python algos/mdpo.py --resume runs/<folder>                # continue a run
"""

# ---- 1. Imports ----
import ctypes
import fcntl
import hashlib
import io
import json
import os
import platform
import re
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
    # The method. Paper: appendix C, Table 2.
    env_id: str = "bigfish"  # the game; unknown names print the valid ones
    num_agents: Literal[1, 2] = 2  # 2: MDPO; 1: PPO
    distill_coef: float = 1.0  # alpha, weight of the KL to the peer (0: the agents never meet)
    policy_loss: Literal["ppo", "spo"] = "ppo"  # clipped surrogate, or Simple Policy Optimization's quadratic penalty
    total_timesteps: int = 50_000_000  # steps of each agent, rounded up to whole rollouts
    distribution_mode: Literal["easy", "hard"] = "hard"  # difficulty of the levels
    num_levels: int = -1  # training levels (-1: 500 in hard mode, 200 in easy; 0: all there are)
    start_level: int = 0  # first training level

    # PPO. Paper: Table 2. Reference code, where it is silent: norm_adv trainer.py:51-53, clip_vloss trainer.py:88-100,
    # max_grad_norm main.py:34.
    num_envs: int = 64  # N, parallel environments of each agent
    num_steps: int = 256  # T, steps per rollout
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs per rollout
    learning_rate: float = 5e-4  # Adam
    anneal_lr: bool = False  # learning rate falls linearly to 0
    gamma: float = 0.999  # discount
    gae_lambda: float = 0.95  # GAE's lambda
    norm_adv: bool = True  # normalise advantages over each minibatch
    clip_coef: float = 0.2  # epsilon of the policy loss and of the value loss
    clip_vloss: bool = True  # clip the value loss too
    ent_coef: float = 0.01  # c2, entropy bonus
    vf_coef: float = 0.5  # c1, value loss (which contains another 0.5)
    max_grad_norm: float = 0.5  # clip each agent's gradient to this norm

    # Evaluation on unseen and on training levels.
    eval_every: int = 1_638_400  # steps between evaluations, 31 in a run (0: never)
    eval_episodes: int = 128  # episodes per evaluation, agent and set of levels
    final_eval_episodes: int = 0  # the same for the last evaluation (0: 128, or fewer in a short run)
    eval_seed: int = 42  # draws the evaluated levels

    # The run.
    seed: int = 1  # same seed, machine, packages and number of threads: same weights, bit for bit
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    runs_dir: str = "runs"  # where run folders are made
    resume: str | None = None  # run folder to continue
    exact_every: int = 2_000_000  # steps between bit-for-bit checkpoints and fresh environments (0: never)
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
GAMES = ("bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot", "heist")
GAMES += ("jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot")


def make_envs(args, split, start=0):
    """A x N environments of `split`, for A agents, seeded by (args.seed, split, start).

    "train": the args.num_levels training levels. "test": all levels there are.
    reset() -> obs uint8 [A N, 3, 64, 64], info.
    step(actions int64 [A N]) -> obs, reward float32, terminated bool, truncated bool, all [A N], info.
    The step that ends an episode returns the next episode's first observation, in a new array.
    info["episodes"]: (environment, return, length) of the episodes that ended with the step.
    """
    num_levels = {"easy": 200, "hard": 500}[args.distribution_mode] if args.num_levels == -1 else args.num_levels
    levels = {"train": (num_levels, args.start_level), "test": (0, 0)}[split]
    entropy = (args.seed, ("train", "test").index(split), start)
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
    about = {"num_envs": args.num_agents * args.num_envs, "num_levels": levels[0], "start_level": levels[1]}
    name = f"{args.env_id.capitalize()}{args.distribution_mode.capitalize()}-v0"
    return SameStepReset(import_envpool().make_gymnasium(name, seed=seed, **about))


class SameStepReset:
    """Resets an EnvPool environment in the step that ends its episode, and counts returns.

    Careful: without it, EnvPool ignores the action after an episode's end and returns a meaningless transition.
    """

    def __init__(self, envs):
        self.envs = envs

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self):
        obs, info = self.envs.reset()
        self.returns, self.lengths = np.zeros(len(obs)), np.zeros(len(obs), dtype=int)
        return obs, info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.envs.step(actions)
        self.returns, self.lengths = self.returns + reward, self.lengths + 1
        ended = np.flatnonzero(terminated | truncated).astype(np.int32)
        info["episodes"] = [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in ended]
        if len(ended):
            obs[ended] = self.envs.reset(ended)[0]
            self.returns[ended], self.lengths[ended] = 0, 0
        return obs, reward, terminated, truncated, info


def import_envpool():
    """EnvPool, after the Qt libraries that its Procgen draws with: the PyQt5-Qt5 package's or the system's."""
    package = find_spec("PyQt5")
    folder = package.submodule_search_locations[0] if package else ""
    libraries = ("libQt5Core.so.5", "libQt5Gui.so.5")
    cure = "pip install PyQt5-Qt5; apt-get install libgl1 libglib2.0-0, on aarch64 libqt5gui5 too"
    if sys.platform == "darwin":  # where EnvPool looks; what is in DYLD_FRAMEWORK_PATH comes first
        brew = "/opt/homebrew/opt/qt@5/lib"
        libraries = [f"{brew}/{name}.framework/Versions/5/{name}" for name in ("QtCore", "QtGui")]
        cure = f"brew install qt@5, or export DYLD_FRAMEWORK_PATH={folder}/Qt5/lib"
    try:
        for library in libraries:
            packaged = Path(folder, "Qt5/lib", library)
            ctypes.CDLL(str(packaged) if packaged.exists() else library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
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
def act(agents, obs, noise):
    """Samples from each agent's policy. [A, N, ...], Exp(1) noise [A, N, actions] -> dict of [A, N].

    argmax_a p(a) / noise(a) is a sample of p. The noise is an input, so that a CUDA graph stays random.
    """
    logits, values = forward_all(agents, obs)
    log_probs = logits.log_softmax(-1)  # [A, N, actions]
    actions = (log_probs - noise.log()).argmax(-1)
    chosen = log_probs.gather(-1, actions[..., None]).squeeze(-1)
    return {"actions": actions, "log_probs": chosen, "values": values}


def forward_all(agents, obs):
    """Each agent on its own observations. [A, N, ...] -> logits [A, N, actions], values [A, N]."""
    outputs = [agent(own) for agent, own in zip(agents, obs, strict=True)]
    logits, values = zip(*outputs, strict=True)
    return torch.stack(logits), torch.stack(values)


# ---- 5. The method ----
def distillation_loss(logits, peer_logits):
    """KL(peer || own), the mean over the batch. [B, A], [B, A] -> []. Paper: eq. 18.

    Careful: nothing is detached. Each agent is pulled to its peer and pulls the peer to itself.
    """
    log_probs, peer_log_probs = logits.log_softmax(-1), peer_logits.log_softmax(-1)
    return (peer_log_probs.exp() * (peer_log_probs - log_probs)).sum(-1).mean()


def agent_loss(agent, peer, batch, args):
    """An agent's RL loss and its KL to the peer on its own observations. -> loss [], dict of parts [].

    Paper: L_RL + alpha * L_KL, eq. 5 and 18; without a peer it is PPO's (or SPO's) loss alone.
    """
    logits, values = agent(batch["obs"])  # [B, A], [B]
    log_probs_all = logits.log_softmax(-1)
    # Not gather: in older torch its deterministic gradient breaks a CUDA graph.
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
    """Negative clipped surrogate. [B] x 3, float -> []. Paper: PPO, arXiv:1707.06347, eq. 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def spo_policy_loss(log_probs, old_log_probs, advantages, clip_coef):
    """SPO: a quadratic penalty whose optimum is at the clipping range. [B] x 3, float -> [].

    Reference code: Simple-Policy-Optimization, atari/trainer.py:88-92.
    """
    ratio = (log_probs - old_log_probs).exp()
    return -(ratio * advantages - advantages.abs() * (ratio - 1).square() / (2 * clip_coef)).mean()


def clipped_value_loss(values, old_values, returns, clip_coef):
    """Half the squared error of the value, or of the clipped one if that is worse. [B] x 3, float -> []."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square()).mean()


def compute_gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """GAE's advantages, and returns. [..., T, N] x 3, [..., N] -> [..., T, N] x 2.

    dones[..., t, :]: an episode ended with step t. Paper: arXiv:1506.02438.
    """
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(last_values)
    next_values = last_values
    for t in reversed(range(rewards.shape[-2])):
        going_on = 1 - dones[..., t, :]
        delta = rewards[..., t, :] + gamma * next_values * going_on - values[..., t, :]
        running = delta + gamma * gae_lambda * going_on * running
        advantages[..., t, :] = running
        next_values = values[..., t, :]
    return advantages, advantages + values


class RewardNormaliser:
    """Divides rewards by the running deviation of the agent's discounted return; clips them to +-10.

    Reference code: gym 0.23.1's NormalizeReward; the clip is baselines' and MDPO's (main.py:48).
    """

    def __init__(self, num_agents, num_envs, gamma):
        self.returns, self.gamma = np.zeros((num_agents, num_envs)), gamma
        self.mean, self.var, self.count = np.zeros(num_agents), np.ones(num_agents), 1e-4

    def __call__(self, rewards, dones):
        """Takes one step of all environments in. [A, N], bool [A, N] -> float64 [A, N]."""
        self.returns = self.returns * self.gamma + rewards
        mean, var, count = self.returns.mean(1), self.returns.var(1), rewards.shape[1]
        delta, total = mean - self.mean, self.count + count
        squares = self.var * self.count + var * count + delta**2 * self.count * count / total
        self.mean, self.var, self.count = self.mean + delta * count / total, squares / total, total
        self.returns[dones] = 0.0
        return np.clip(rewards / np.sqrt(self.var + 1e-8)[:, None], -10, 10)

    def state_dict(self):
        """The statistics. Unfinished returns are left out: they end with the environments."""
        return {"mean": self.mean.tolist(), "var": self.var.tolist(), "count": float(self.count)}

    def load_state_dict(self, state):
        self.mean, self.var, self.count = np.array(state["mean"]), np.array(state["var"]), state["count"]


# ---- 7. Update ----
CPU_BATCH = 256  # images per pass on a CPU; the passes' gradients add up to the minibatch's


def update(agents, optimizer, batches, args):
    """One gradient step of all agents, on a minibatch each: dicts of [B, ...] -> dict of detached [A].

    Paper: Algorithm 1, the mean of the agents' losses. A backward pass per agent and slice saves memory.
    Careful: of two agents, each loss is halved before its gradient is clipped (trainer.py:71).
    """
    optimizer.zero_grad()
    per_agent = []
    for i, (agent, batch) in enumerate(zip(agents, batches, strict=True)):
        peer = agents[1 - i] if len(agents) == 2 and args.distill_coef > 0 else None
        advantages = batch["advantages"]
        if args.norm_adv:  # over the whole minibatch, before it is sliced
            normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            batch = {**batch, "advantages": normalised}
        size = CPU_BATCH if advantages.device.type == "cpu" else len(advantages)
        totals = {}
        for first in range(0, len(advantages), size):
            part = {key: value[first : first + size] for key, value in batch.items()}
            share = len(part["obs"]) / len(advantages)
            loss, values = agent_loss(agent, peer, part, args)
            (share / len(agents) * loss).backward()
            for key, value in values.items():
                totals[key] = totals.get(key, 0) + share * value.detach()
        per_agent.append(totals)
    for agent, totals in zip(agents, per_agent, strict=True):  # Reference code: trainer.py:84-85
        totals["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    return default_collate(per_agent)


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
    """Trains and returns the agents. Pass your own factories to change the environments or the network."""
    args, device = set_up_torch(check(args))
    run = Run(args)
    envs = make_envs(args, "train", run.step)
    seeds = np.random.SeedSequence(args.seed).generate_state(2 + args.num_agents).tolist()
    torch.manual_seed(seeds[0])
    shuffle_rng = torch.Generator().manual_seed(seeds[1])
    noise_rngs = {f"noise_rng{a}": torch.Generator().manual_seed(seed) for a, seed in enumerate(seeds[2:], 1)}
    agents = nn.ModuleList(make_agent(envs, args) for _ in range(args.num_agents)).to(device)
    rate = torch.tensor(args.learning_rate, device=device)  # a CUDA graph sees a tensor change
    optimizer = torch.optim.Adam(agents.parameters(), lr=rate, eps=1e-5, fused=True)  # Reference code: main.py:103
    normaliser = RewardNormaliser(args.num_agents, args.num_envs, args.gamma)
    parts = {"agents": agents, "optimizer": optimizer, "normaliser": normaliser}
    parts.update(noise_rngs, shuffle_rng=shuffle_rng, torch_rng=torch.default_generator)
    run.restore(parts)
    graphs = args.cuda_graphs and device.type == "cuda"
    group = optimizer.param_groups[0]
    group["lr"] = rate.copy_(group["lr"])  # the checkpoint's may be on another device
    if args.resume and args.anneal_lr:  # more --total-timesteps stretch it
        following = args.learning_rate * (1 - run.step / args.total_timesteps)
        print(f"learning_rate: {rate.item():.3g} so far, {following:.3g} from here on", flush=True)
    group["capturable"] = graphs

    # A rollout [A, T, N, ...], and the same memory as one batch for each agent [A, T N, ...].
    shape, num_actions = (args.num_agents, args.num_steps, args.num_envs), int(envs.single_action_space.n)
    pixels = np.zeros((*shape, *envs.single_observation_space.shape), np.uint8)
    rollout = {"obs": torch.from_numpy(pixels).to(device)}
    rollout["actions"] = torch.zeros(shape, dtype=torch.int64, device=device)
    for key in ("log_probs", "values", "advantages", "returns"):
        rollout[key] = torch.zeros(shape, device=device)
    batches = {key: value.flatten(1, 2) for key, value in rollout.items()}
    batch_size = args.num_steps * args.num_envs

    def learn(index):
        minibatches = []
        for a in range(args.num_agents):
            minibatches.append({key: batch[a, index] for key, batch in batches.items()})
        return update(agents, optimizer, minibatches, args)

    learner, policy = Captured(learn, graphs), Captured(partial(act, agents), graphs)
    next_obs, _ = envs.reset()
    with run:
        while True:
            last = run.step >= args.total_timesteps
            if run.evaluation_due():  # also after a resume, if it was interrupted
                start = time.monotonic()
                episodes = final_episodes(args) if last else args.eval_episodes
                run.say(f"evaluating, {episodes} episodes per agent and set of levels")
                run.log(compare(agents, replace(args, eval_episodes=episodes), make_envs, run.tick))
                run.log({"charts/eval_episodes": episodes, "charts/eval_seconds": time.monotonic() - start})
                run.log({"charts/hours": run.hours()})
                run.evaluated = run.step
            if last:
                break

            # Collect T steps from each environment.
            start = time.monotonic()
            finished = [[] for _ in agents]  # (return, length) of episodes that end now
            rewards, dones = torch.zeros(shape), torch.zeros(shape)  # on the CPU, where they come from
            noise = torch.empty(*shape, num_actions)
            for own, noise_rng in zip(noise, noise_rngs.values(), strict=True):
                own.exponential_(generator=noise_rng)
            noise = noise.to(device)
            for t in range(args.num_steps):
                row = {"obs": torch.as_tensor(next_obs).to(device).unflatten(0, (args.num_agents, -1))}
                row.update(policy(row["obs"], noise[:, t]))
                for key, value in row.items():
                    rollout[key][:, t] = value
                actions = row["actions"].flatten().cpu().numpy()
                next_obs, reward, terminated, truncated, info = envs.step(actions)
                # Reference code: a time limit ends an episode like a failure does.
                done = (terminated | truncated).reshape(args.num_agents, -1)
                dones[:, t] = torch.from_numpy(done)
                rewards[:, t] = torch.from_numpy(normaliser(reward.reshape(args.num_agents, -1), done))
                for n, episode_return, length in info["episodes"]:
                    finished[n // args.num_envs].append((episode_return, length))
                run.tick(args.num_envs / 2)  # the bar counts playing and learning as half of a step

            # Learn from them.
            with torch.no_grad():
                obs = torch.as_tensor(next_obs).to(device).unflatten(0, (args.num_agents, -1))
                _, last_values = forward_all(agents, obs)
            values, last_values = rollout["values"].cpu(), last_values.cpu()  # GAE is many small operations
            advantages, returns = compute_gae(rewards, values, dones, last_values, args.gamma, args.gae_lambda)
            rollout["advantages"].copy_(advantages)
            rollout["returns"].copy_(returns)
            if args.anneal_lr:
                rate.fill_(args.learning_rate * (1 - run.step / args.total_timesteps))
            losses = []
            for _ in range(args.update_epochs):
                order = torch.randperm(batch_size, generator=shuffle_rng).to(device)  # Reference code: one for both
                for index in order.chunk(args.num_minibatches):
                    losses.append(learner(index))
                    run.tick(batch_size / 2 / (args.update_epochs * args.num_minibatches))
            run.step += batch_size

            # Log and save.
            run.log({"charts/frames": args.num_agents * run.step, "charts/learning_rate": rate.item()})
            run.log(per_agent("charts/reward", rewards.mean((1, 2)).tolist()))
            for key, value in default_collate(losses).items():
                run.log(per_agent(f"losses/{key}", value.mean(0).tolist()))  # waits for a GPU's last update
            run.log({"charts/SPS": args.num_agents * batch_size / (time.monotonic() - start)})
            unexplained = (returns - values).flatten(1).var(1) / returns.flatten(1).var(1)
            run.log(per_agent("losses/explained_variance", (1 - unexplained.nan_to_num(1, 1)).tolist()))
            if all(finished):
                means = np.array([np.mean(own, axis=0) for own in finished])  # [A, 2]
                run.log(per_agent("charts/episodic_return", means[:, 0]))
                run.log(per_agent("charts/episodic_length", means[:, 1]))
            if run.passed(args.exact_every, run.exact_step):  # in every run, resumed or not
                envs.close()
                envs = make_envs(args, "train", run.step)
                next_obs, _ = envs.reset()
                normaliser.returns[:] = 0
                run.save(exact=True)
            elif run.save_due():
                run.save()
        run.save()
    envs.close()
    return agents


def final_episodes(args):
    """Episodes of the last evaluation. By default fewer in a run so short that they would take longer than it."""
    return args.final_eval_episodes or min(128, max(4, args.total_timesteps // 400))


def evaluate(agent, args, make_envs, split, tick=lambda: None):
    """Returns [args.eval_episodes] of sampled actions on fixed levels of `split`.

    Each environment plays one episode, so that short ones are not favoured. No random stream of training is touched.
    """
    args = replace(args, seed=args.eval_seed, num_agents=1, num_envs=args.eval_episodes)
    envs, noise_rng = make_envs(args, split), torch.Generator().manual_seed(args.eval_seed)
    device, num_actions = next(agent.parameters()).device, int(envs.single_action_space.n)
    everyone, returns = list(range(args.num_envs)), {}
    active = everyone
    actions = np.zeros(args.num_envs, dtype=np.int64)
    bar = tqdm(total=args.num_envs, desc=f"evaluation, {split}", leave=False, disable=None)
    agent.eval()
    obs, _ = envs.reset()
    while active:
        playing = active if device.type == "cpu" else everyone  # cuDNN plans anew for each batch size
        noise = torch.empty(args.num_envs, num_actions).exponential_(generator=noise_rng)[playing]
        chosen = act([agent], torch.as_tensor(obs[playing])[None].to(device), noise[None].to(device))
        actions[playing] = chosen["actions"][0].cpu().numpy()
        obs, _, _, _, info = envs.step(actions)
        for n, episode_return, _ in info["episodes"]:
            bar.update(int(n not in returns))
            returns.setdefault(n, episode_return)  # an environment's first episode counts
        active = [n for n in active if n not in returns]  # the others idle
        tick()
    bar.close()
    envs.close()
    agent.train()
    return np.array([returns[n] for n in range(args.num_envs)])


def compare(agents, args, make_envs, tick=lambda: None):
    """{key: number} to log: the agents' mean returns on unseen and on training levels, and the gap."""
    test = [evaluate(agent, args, make_envs, "test", tick).mean() for agent in agents]
    train = [evaluate(agent, args, make_envs, "train", tick).mean() for agent in agents]
    scalars = per_agent("eval/test_return", test)
    scalars.update(per_agent("eval/train_return", train))
    scalars.update(per_agent("eval/gap", np.subtract(train, test)))
    return scalars


def per_agent(key, values):
    """The mean over agents under "group/name", and of two agents each one's under "group/agent1/name"."""
    scalars = {key: float(np.mean(values))}
    if len(values) > 1:
        for number, value in enumerate(values, 1):
            scalars[key.replace("/", f"/agent{number}/")] = float(value)
    return scalars


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
    """The agents of a checkpoint as a list, for `evaluate` and `act`."""
    args, device = set_up_torch(args)
    envs = make_envs(replace(args, num_envs=1), "test")
    agents = nn.ModuleList(make_agent(envs, args) for _ in range(args.num_agents)).to(device)
    agents.load_state_dict(state["agents"])
    envs.close()
    return list(agents)


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


# Arguments that a resumed run may change begin with these. More steps stretch --anneal-lr.
MAY_CHANGE = ("resume", "total_timesteps", "eval_every", "eval_episodes", "eval_seed", "final_eval_", "save_")
MAY_CHANGE += ("runs_dir", "cuda", "track", "wandb_")
POSITIVE = ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs")
POSITIVE += ("eval_episodes",)
SMALLEST = {**dict.fromkeys(POSITIVE, 1), "num_levels": -1, "clip_coef": 1e-6}
LARGEST = {"gamma": 1, "gae_lambda": 1, "num_steps": 2**40, "num_levels": 2**31 - 1, "start_level": 2**31 - 1}


def check(args):
    """The arguments in one spelling. Ends the program with one line if one of them makes no sense."""
    for name, value in vars(args).items():
        low, high = SMALLEST.get(name, 0), LARGEST.get(name, sys.maxsize)
        if isinstance(value, int | float) and not low <= value <= high:
            most = f" to {high}" if high < sys.maxsize or value > high else ""
            fail(f"--{name.replace('_', '-')} {value}: from {low}{most}")
    game, mode = args.env_id.lower().removesuffix("-v0"), args.distribution_mode
    if game not in GAMES and game.endswith(("easy", "hard")):  # EnvPool's BigfishHard-v0
        game, mode = game[:-4], game[-4:]
    if game not in GAMES:
        fail(f"--env-id {args.env_id}: no such game; there are {' '.join(GAMES)}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size < 2 * args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: does not cut {batch_size} steps into equal parts of 2 or more")
    if "/" in args.exp_name or not args.exp_name.isprintable():
        fail(f"--exp-name {args.exp_name!r}: is part of a folder's name, so no slash and no line break")
    if args.track and set(args.exp_name) & set(":;,#?'"):
        fail(f"--exp-name {args.exp_name}: is part of a W&B id, which cannot contain any of : ; , # ? '")
    if args.cuda_required and not torch.cuda.is_available():
        fail("--cuda-required: torch finds no GPU here")
    if args.track and not getattr(find_spec("wandb"), "origin", None):  # a mere folder called wandb has none
        fail("--track: pip install wandb")
    return replace(args, env_id=game, distribution_mode=mode)


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
