"""What the suites of robot arms share: environments as a script for DeepMind Control wants them, and the command line.

A Suite says what is its own; `main` trains a script on it, tests a run on its variants and shows them.
"""

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


@dataclass
class Suite:
    """Tasks, each in some variants."""

    name: str  # of the program and of its tables
    usage: str  # what --help prints
    tasks: tuple[str, ...]  # ("reach-duplo", ...); the first one is the default
    variants: tuple[str, ...]  # of a task; training is on the first one
    score: str  # what the rewards of a tested episode add up to
    make: Callable  # (task, variant, seed, size, training) -> one environment, as Stacks describes it
    check: Callable  # (variants): ends the program if one of them is missing


# ---- Environments ----
def make_envs(suite, args, split, start=0, size=84, gray=False):
    """args.num_envs environments of a suite's task, seeded by (args.seed, whether they are for training, start).

    split: "train" and "test" show the first variant, any other split is the name of a variant. All but "train" have
    the same seeds, so that variants differ in nothing else. What is returned is described at Stacks.
    """
    task = args.env_id.lower().replace("_", "-")
    if task not in suite.tasks:
        common.fail(f"--env-id {args.env_id}: no such task; there are {' '.join(suite.tasks)}")
    variant = suite.variants[0] if split in ("train", "test") else split
    suite.check([variant])
    training = split == "train"
    seeds = np.random.SeedSequence((args.seed, int(not training), start)).generate_state(args.num_envs)
    envs = [suite.make(task, variant, int(seed), size, training) for seed in seeds]
    return Stacks(envs, args.action_repeat, gray)


class Stacks:
    """Environments side by side, with stacks of three frames and repeated actions.

    reset() -> obs, info. step(actions float32 [N, A] in -1..1) -> obs, reward float32 [N], summed over the repeated
    actions, terminated bool [N], truncated bool [N] (by the time limit), info.
    obs: uint8 [N, 9, size, size], three RGB frames, the oldest first; in gray [N, 3, size, size].
    The step that ends an episode returns the first observation of the next one, which is one frame three times.
    info["final_obs"]: like obs, but with the last observation of each episode that ended.
    info["episodes"]: (environment, return, length) of each of them; the length is in steps, not in repeated actions.

    Each of `envs` has low and high [A], reset(), step(action [A] in low..high) -> (reward, terminated, truncated),
    frame() -> uint8 [size, size, 3], size and close().
    """

    def __init__(self, envs, repeat, gray=False):
        import gymnasium as gym

        self.envs, self.repeat, self.gray, size = envs, repeat, gray, envs[0].size
        self.num_envs, self.channels = len(envs), 1 if gray else 3
        self.single_observation_space = gym.spaces.Box(0, 255, (3 * self.channels, size, size), np.uint8)
        self.single_action_space = gym.spaces.Box(-1, 1, envs[0].low.shape, np.float32)

    def reset(self):
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self.obs = np.stack([self.first(env) for env in self.envs])
        return self.obs, {}

    def step(self, actions):
        rewards = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        final_obs = np.roll(self.obs, -self.channels, axis=1)
        for n, env in enumerate(self.envs):
            action = env.low + (actions[n].astype(np.float64) + 1) / 2 * (env.high - env.low)
            for _ in range(self.repeat):
                reward, terminated[n], truncated[n] = env.step(action)
                rewards[n] += reward
                if terminated[n] or truncated[n]:
                    break
            final_obs[n, -self.channels :] = self.frame(env)
        self.returns, self.lengths = self.returns + rewards, self.lengths + 1
        self.obs = final_obs.copy()
        episodes = []
        for n in np.flatnonzero(terminated | truncated):
            episodes.append((n, self.returns[n], self.lengths[n]))
            self.returns[n], self.lengths[n] = 0, 0
            self.obs[n] = self.first(self.envs[n])
        return self.obs, rewards, terminated, truncated, {"final_obs": final_obs, "episodes": episodes}

    def first(self, env):
        """Begins an episode. -> its first observation."""
        env.reset()
        return np.tile(self.frame(env), (3, 1, 1))

    def frame(self, env):
        """uint8 [3, size, size], or in gray [1, size, size]: the luma, rounded down, as in sac_sam_reset.py."""
        picture = env.frame()
        if self.gray:
            picture = np.dot(picture, [0.299, 0.587, 0.114]).astype(np.uint8)[..., None]
        return picture.transpose(2, 0, 1)

    def close(self):
        for env in self.envs:
            env.close()


@cache
def own_frames(path):
    """(size, gray) of the frames that a script makes for itself. Its first environment chooses the renderer too.

    Careful: only where torch is set up. The import of torch's compiler crashes after that of Mesa.
    """
    script = common.load_script(path)
    envs = script.make_envs(script.Args(env_id="cartpole-balance", action_repeat=1), "test")
    channels, size, _ = envs.single_observation_space.shape
    envs.close()
    return size, channels == 3


def seams(suite, script):
    """The make_envs and make_agent of a suite for a script, whose --env-id now means a task of the suite.

    A split of make_envs can also be the name of a variant.
    """
    if "action_repeat" not in vars(script.Args()):
        common.fail(f"{Path(script.__file__).name} is no script for DeepMind Control from pixels")
    script.TASKS = " ".join(suite.tasks)

    def make_suite_envs(args, split, start=0):
        size, gray = own_frames(script.__file__)
        return make_envs(suite, args, split, start, size, gray)

    return make_suite_envs, script.Agent


# ---- The command line ----
@dataclass
class Test:
    run: tyro.conf.Positional[str]  # run folder
    variants: tuple[str, ...] = ()  # what it is tested on (default: all)
    episodes: int = 100  # episodes per variant


@dataclass
class Look:
    out: tyro.conf.Positional[str]  # .png file
    env_id: str = ""  # the task (default: the first one)
    variants: tuple[str, ...] = ()  # what is shown, side by side (default: all)
    seed: int = 1  # draws where things are
    scale: int = 4  # screen pixels per pixel of an observation


def main(suite, argv):
    """Trains a script on a suite, tests a run on its variants, or shows them."""
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(suite.usage.strip())
    elif command == "test":
        test(suite, tyro.cli(Test, prog=f"{suite.name} test", args=argv[1:]))
    elif command == "look":
        look(suite, tyro.cli(Look, prog=f"{suite.name} look", args=argv[1:]))
    else:
        train(suite, common.find_script(command), argv[1:])


def train(suite, path, flags):
    """Runs a script with these flags on a suite's first variant."""
    for flag in flags:
        if flag.split("=")[0].replace("_", "-") == "--eval-modes":
            variants = " ".join(suite.variants)
            common.fail(f"--eval-modes: looks of DMC-GB; those of {suite.name} are {variants}, see `test`")
    suite.check(suite.variants[:1])
    script = common.load_script(path)
    make_suite_envs, make_agent = seams(suite, script)
    resumed = any(flag.split("=")[0] == "--resume" for flag in flags)
    task = [] if resumed else ["--env-id", suite.tasks[0]]
    script.main([*task, *flags], make_suite_envs, make_agent)


def test(suite, flags):
    """Plays episodes of each variant, prints their mean scores and writes them to <suite>.csv in the run's folder."""
    variants = flags.variants or suite.variants
    suite.check(variants)
    if flags.episodes < 1:
        common.fail(f"--episodes {flags.episodes}: at least 1")
    run = common.load_run(flags.run, eval_episodes=flags.episodes)
    script = run.script
    make_suite_envs, _ = seams(suite, script)
    (agent,) = run.agents(make_suite_envs)
    rows = []
    for variant in variants:
        scores = script.evaluate(agent, run.args, make_suite_envs, variant)
        mean, std = f"{scores.mean():.4g}", f"{scores.std():.4g}"
        rows.append([run.state["step"], variant, len(scores), mean, std])
        print(f"{variant:12} {suite.score} {mean} +- {std} in {len(scores)} episodes", flush=True)
    path = run.folder / f"{suite.name}.csv"
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "variant", "episodes", suite.score, "std"])
            writer.writerows(rows)
        print(path)
    except OSError as error:
        print(f"not written: {path}: {error.strerror}", file=sys.stderr)


def look(suite, flags):
    """Writes a picture of the first observations of the variants, from one seed, side by side."""
    variants = flags.variants or suite.variants
    common.check_out(flags.out, ".png")
    if flags.scale < 1:
        common.fail(f"--scale {flags.scale}: at least 1")
    suite.check(variants)
    own_frames(common.find_script("sac_sam_reset"))  # chooses the renderer
    args = Show(flags.env_id or suite.tasks[0], flags.seed)
    pictures = []
    for variant in variants:
        envs = make_envs(suite, args, variant)
        obs, _ = envs.reset()
        envs.close()
        newest = obs[0, -3:].transpose(1, 2, 0)
        picture = np.ascontiguousarray(newest.repeat(flags.scale, 0).repeat(flags.scale, 1))
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(picture, variant, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, width, cv2.LINE_AA)
        pictures.append(picture)
    cv2.imwrite(flags.out, np.concatenate(pictures, axis=1)[..., ::-1])
    print(flags.out)


@dataclass
class Show:
    """The arguments of a script that make_envs reads."""

    env_id: str
    seed: int
    num_envs: int = 1
    action_repeat: int = 2
