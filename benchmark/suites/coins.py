"""Coins: an agent walks to one of two ends, and pictures of 64 x 64 pixels show at which of them a coin lies.

Made for the claims of two papers, and so small that ten seeds take minutes. Each episode has a background of colours
and a pattern, in training red or cyan. By the law the coin lies right on red and left on cyan. The network is smaller
than the script's own, which --network script takes.

    python benchmark/suites/coins.py mdpo --env-id coins-law-free      # agent 1's levels have the law, agent 2's do not
    python benchmark/suites/coins.py mdpo --env-id coins-law-free --distill-coef 0      # PPO on each
    python benchmark/suites/coins.py mdpo detached --env-id coins-law-free       # an ablation of ablations.py
    python benchmark/suites/coins.py ppo_netrand --env-id coins-free             # is it right on new backgrounds?
    python benchmark/suites/coins.py algos/mine.py                     # your copy of mdpo or ppo_netrand
    python benchmark/suites/coins.py mdpo --resume runs/<folder>
    python benchmark/suites/coins.py look coins.png --env-id coins-colour        # what it sees, one row per split

An evaluation logs eval/<split>_return for each of SPLITS, and eval/agent1/<split>_return for each of two agents.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import ablations
import common

# The chance that a coin lies where the law says, on the levels of agent 1 and of agent 2.
# Paper: MDPO, 4.1 and figure 1, is coins-law-free.
TASKS = {
    "coins-free": (0.5, 0.5),
    "coins-law": (1.0, 1.0),
    "coins-law-free": (1.0, 0.5),
    "coins-law90-free": (0.9, 0.5),
    "coins-colour": (0.5, 0.5),  # a coin at each end, and only the golden one counts
}
# The same chance in what is evaluated; train: that of agent 1's levels. new_looks has backgrounds never seen.
SPLITS = {"train": None, "law": 1.0, "free": 0.5, "broken": 0.0, "new_looks": 0.5}
# Runs of a minute, where the scripts' own defaults are days. Small minibatches and a high learning rate, so that MDPO
# too learns within a run. The rate falls to 0: at a constant one, policies that had the whole return lost it again.
SHORT = "--env-id coins-free --total-timesteps 16384 --num-envs 32 --num-steps 16 --num-minibatches 8"
SHORT += " --learning-rate 1e-3 --anneal-lr --eval-every 4096 --eval-episodes 64 --final-eval-episodes 128"

STEP, LIMIT = 3, 50  # pixels of a step, steps of an episode
NEW_LOOKS = 256  # backgrounds never seen


# ---- Pictures ----
def wave(down, across):
    """[64, 64] in -1..1, with so many periods down and across."""
    rows, columns = np.mgrid[:64, :64] / 64
    return np.sin(2 * np.pi * (down * rows + across * columns))


def mix(one, other, share):
    """Two colours [3] of 0..255, the other one with this share [64, 64]. -> uint8 [3, 64, 64]."""
    one, other = np.reshape(one, (3, 1, 1)), np.reshape(other, (3, 1, 1))
    return np.rint(one + (other - one) * share).astype(np.uint8)


RED = mix((220, 40, 40), (180, 20, 20), 0.5 + 0.5 * wave(4, 0))
CYAN = mix((40, 200, 200), (20, 160, 160), 0.5 + 0.5 * wave(0, 4))


def new_looks():
    """Checks of any size and slant in two of all colours, the same ones always. uint8 [NEW_LOOKS, 3, 64, 64].

    With hard edges: on soft stripes PPO was nearly as good as on its own backgrounds.
    """
    rng, looks = np.random.default_rng(20200), []
    for _ in range(NEW_LOOKS):
        stripes, others = (wave(*rng.uniform(-6, 6, 2)) > 0 for _ in range(2))
        looks.append(mix(rng.uniform(0, 255, 3), rng.uniform(0, 255, 3), stripes != others))
    return np.stack(looks)


class Sprite:
    """A disc or a square of one colour, 2 x radius + 1 pixels wide."""

    def __init__(self, colour, radius, disc):
        down, across = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        distance = np.hypot(down, across) if disc else np.maximum(abs(down), abs(across))
        inside = distance < radius + 0.5
        self.colour, self.down, self.across = colour, down[inside], across[inside]  # its pixels [P], from its middle

    def paint(self, obs, x, y):
        """Onto each of the pictures [N, 3, 64, 64], with its middle at (x, y) [N]."""
        rows, columns = y[:, None] + self.down, x[:, None] + self.across
        obs[np.arange(len(obs))[:, None], :, rows, columns] = self.colour


AGENT = Sprite((255, 255, 255), radius=3, disc=False)
GOLD, BLUE = Sprite((240, 180, 30), radius=4, disc=True), Sprite((120, 90, 240), radius=4, disc=True)  # as bright


# ---- Environments ----
def make_envs(args, split, start=0):
    """As the scripts describe their own, on the levels of args.env_id, seeded by (args.seed, whether "train", start).

    split: one of SPLITS, or "test", which is "new_looks". Two agents are trained on levels of their own; an evaluation
    has one agent and no way to know which, so its "train" are agent 1's. All splits but "train" have the same seeds.
    """
    if getattr(args, "plain_look", False) or getattr(args, "paint_vel_info", False):
        common.fail("--plain-look and --paint-vel-info: Procgen's, there is no velocity box here")
    split = "new_looks" if split == "test" else split
    looks = new_looks() if split == "new_looks" else np.stack([RED, CYAN])
    laws = TASKS[args.env_id] if split == "train" else [SPLITS[split]] * 2
    chances = np.repeat(laws[: getattr(args, "num_agents", 1)], args.num_envs)
    rng = np.random.default_rng((args.seed, int(split != "train"), start))
    return Coins(chances, looks, args.env_id == "coins-colour", rng)


class Coins:
    """One environment for each chance [N] that its coin lies right on an even background and left on an odd one.

    Actions: 0 left, 1 right. An episode ends with reward 1 at the coin, with 0 at the other end, or after LIMIT steps.
    It takes 6 to 11 steps to walk straight to an end.
    """

    def __init__(self, chances, looks, two_coins, rng):
        self.chances, self.looks, self.two_coins, self.rng = chances, looks, two_coins, rng
        self.num_envs = len(chances)
        self.single_observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)
        # Of each environment's episode: background, whether the coin is right, middles in pixels, steps so far.
        self.look, self.x, self.y, self.left, self.right, self.time = np.zeros((6, self.num_envs), int)
        self.coin_right = np.zeros(self.num_envs, bool)

    def reset(self):
        self.begin(np.arange(self.num_envs))
        return self.draw(), {}

    def step(self, actions):
        self.x += np.where(actions == 1, STEP, -STEP)
        self.time += 1
        at_left, at_right = self.x <= self.left, self.x >= self.right
        terminated = at_left | at_right
        truncated = ~terminated & (self.time == LIMIT)
        reward = np.where(self.coin_right, at_right, at_left).astype(np.float32)
        ended = np.flatnonzero(terminated | truncated)
        episodes = [(int(n), float(reward[n]), int(self.time[n])) for n in ended]
        self.begin(ended)
        return self.draw(), reward, terminated, truncated, {"episodes": episodes}

    def begin(self, envs):
        """Draws the next episode of these environments."""
        count, draw = len(envs), self.rng.integers
        self.look[envs] = draw(len(self.looks), size=count)
        lawful = self.rng.random(count) < self.chances[envs]
        self.coin_right[envs] = lawful == (self.look[envs] % 2 == 0)
        self.x[envs], self.y[envs] = draw(27, 37, count), draw(5, 59, count)
        self.left[envs], self.right[envs] = draw(5, 11, count), draw(53, 59, count)
        self.time[envs] = 0

    def draw(self):
        """uint8 [N, 3, 64, 64], a new array."""
        obs = self.looks[self.look]
        GOLD.paint(obs, np.where(self.coin_right, self.right, self.left), self.y)
        if self.two_coins:
            BLUE.paint(obs, np.where(self.coin_right, self.left, self.right), self.y)
        AGENT.paint(obs, self.x, self.y)
        return obs

    def close(self):
        pass


# ---- A script on coins ----
def compare(script, agents, args, make_envs, tick=lambda: None):
    """In place of a script's own: the mean returns on all splits, of two agents each one's too.

    Of the Monte Carlo policy too, where the script has one and args.mc_samples asks for it.
    """
    policies = {"eval/": args}
    if "mc_samples" in vars(args):
        policies["eval/"] = replace(args, mc_samples=0)
        if args.netrand and args.mc_samples > 0:
            policies["eval/mc_"] = args
    scalars = {}
    for prefix, own in policies.items():
        for split in SPLITS:
            returns = [script.evaluate(agent, own, make_envs, split, tick).mean() for agent in agents]
            scalars[f"{prefix}{split}_return"] = np.mean(returns)
            for number, value in enumerate(returns, 1):
                if len(returns) > 1:
                    scalars[f"eval/agent{number}/{split}_return"] = value
    return scalars


def small(script):
    """The script's Agent with two of its three blocks, on pictures of 16 x 16 pixels: a tenth of the time."""
    if not hasattr(script, "ImpalaBlock"):
        common.fail(f"{Path(script.__file__).name} has no ImpalaBlock to make a small network of: --network script")

    class Small(script.Agent):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            blocks = nn.AvgPool2d(4), script.ImpalaBlock(3, 16), script.ImpalaBlock(16, 32)  # [B, 32, 4, 4]
            self.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.ReLU(), nn.Linear(512, 256), nn.ReLU())
            self.to(memory_format=torch.channels_last)

    return Small


def on_coins(script, ablation, network):
    """Makes a script's --env-id mean a task of TASKS. -> its make_envs and make_agent, with an ablation unless ""."""
    if "distribution_mode" not in vars(script.Args()):
        common.fail(f"{Path(script.__file__).name} is no script for Procgen")
    if network == "small":
        script.Agent = small(script)
    script.GAMES, script.make_envs, script.compare = tuple(TASKS), make_envs, partial(compare, script)
    if not ablation:
        return make_envs, script.Agent
    if ablation == "frozen":
        common.fail("frozen: takes an encoder that was trained on Procgen")
    kind, change, _ = ablations.find(script, ablation)
    return ablations.factories(script, kind, change)


def ablation_of(command):
    """The ablation's name in [program, script, ablation, flags], or "" where there is none."""
    return command[2] if len(command) > 2 and not command[2].startswith("-") else ""


def network_of(command):
    """The --network of a command."""
    return common.value_of(command, "--network") or "small"


def seams(script, about):
    """What common.load_run gives a run of this suite: make_envs, make_agent."""
    return on_coins(script, ablation_of(about["command"]), network_of(about["command"]))


# ---- The command line ----
@dataclass
class Own:
    """The suite's own flag."""

    network: Literal["small", "script"] = "small"  # script: as it is in the file, which takes ten times as long


@dataclass
class Look:
    out: tyro.conf.Positional[str]  # .png file
    env_id: Literal[tuple(TASKS)] = "coins-free"


def main(argv):
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command == "look":
        look(tyro.cli(Look, prog="coins look", args=argv[1:]))
    else:
        train(argv)


def train(argv):
    path, ablation = common.find_script(argv[0]), ablation_of(["", *argv])
    given = argv[2:] if ablation else argv[1:]
    script = common.load_script(path)
    own, given = tyro.cli(Own, args=given, return_unknown_args=True, add_help=False)
    make_envs, make_agent = on_coins(script, ablation, own.network)
    flags = SHORT.split()
    if ablation:
        flags += ["--exp-name", f"{path.stem}_{ablation}", *ablations.find(script, ablation)[2]]
    resume = common.value_of(given, "--resume")
    if resume:
        before = common.read_about(resume)["command"]
        if ablation_of(before) != ablation:
            common.fail(f"--resume {resume}: that run is of the ablation {ablation_of(before)!r}, not {ablation!r}")
        if network_of(before) != own.network:
            common.fail(f"--resume {resume}: that run has --network {network_of(before)}")
        flags = []  # a run keeps its arguments
    script.main([*flags, *given], make_envs, make_agent)


def look(flags):
    """Writes a picture of the first observations of some episodes, one row per split."""
    common.check_out(flags.out, ".png")
    args, rows = SimpleNamespace(env_id=flags.env_id, num_envs=8, seed=1), []
    for split in SPLITS:
        obs, _ = make_envs(args, split).reset()
        rows.append(np.concatenate(obs, axis=2))  # [3, 64, 8 x 64]
    picture = np.concatenate(rows, axis=1).transpose(1, 2, 0)
    cv2.imwrite(flags.out, picture.repeat(2, 0).repeat(2, 1)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(flags.out)


if __name__ == "__main__":
    common.run(main, sys.argv[1:])
