"""What the test suites outside the scripts share: environments as a script wants them, and the command line.

A suite is a module like manipulation.py: TASKS, as a script's SUITE names them; VARIANTS, of which the first is trained
on; SCORE, what an episode's rewards add up to when it is tested; make_envs(args, split, restart=0, size=84,
gray=False), where split is "train", "test" (as trained on, other seeds) or a variant, and frames are what Stacks says;
check(variants), which ends the program if one is missing.
"""

import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import tyro


# ---- Environments ----
class Stacks:
    """Environments with stacks of three frames and repeated actions; an end begins the next episode.

    reset() -> obs uint8 [N, 9, size, size], three RGB frames, oldest first, the first one repeated, or in gray
    [N, 3, size, size]; info.
    step(actions float32 [N, A] in -1..1) -> obs, reward float32 [N], summed over the repeated steps, terminated
    bool [N], truncated bool [N] (by the time limit), info.
    An episode's end is followed by the next episode in the same step: obs is then the new one's first observation, and
    info["final_obs"], of obs' shape, holds the last one of the old; it is obs where no episode ended.
    Each of envs has size, low and high [A], reset(), step(action [A] in low..high) -> (reward, terminated, truncated),
    frame() -> uint8 [size, size, 3] and close().
    """

    def __init__(self, envs, repeat, gray=False):
        import gymnasium as gym

        self.envs, self.repeat, self.gray, size = envs, repeat, gray, envs[0].size
        self.frame_shape = (1 if gray else 3, size, size)
        self.single_observation_space = gym.spaces.Box(0, 255, (3 * self.frame_shape[0], size, size), np.uint8)
        self.single_action_space = gym.spaces.Box(-1, 1, envs[0].low.shape, np.float32)

    def reset(self):
        self.obs = np.stack([self.first(env) for env in self.envs])
        return self.obs, {}

    def step(self, actions):
        count = len(self.envs)
        rewards, terminated, truncated = np.zeros(count, np.float32), np.zeros(count, bool), np.zeros(count, bool)
        frames = np.empty((count, *self.frame_shape), np.uint8)
        for n, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            action = env.low + (action.astype(np.float64) + 1) / 2 * (env.high - env.low)
            for _ in range(self.repeat):
                reward, terminated[n], truncated[n] = env.step(action)
                rewards[n] += reward
                if terminated[n] or truncated[n]:
                    break
            frames[n] = self.frame(env)
        final_obs = np.concatenate([self.obs[:, self.frame_shape[0] :], frames], axis=1)
        self.obs = final_obs.copy()
        for n in np.flatnonzero(terminated | truncated):
            self.obs[n] = self.first(self.envs[n])
        return self.obs, rewards, terminated, truncated, {"final_obs": final_obs}

    def first(self, env):
        """Begins an episode. -> its first observation."""
        env.reset()
        return np.tile(self.frame(env), (3, 1, 1))

    def frame(self, env):
        """[3, size, size], or [1, size, size] in the gray of sac_sam_reset.py."""
        picture = env.frame()
        picture = np.dot(picture, [0.299, 0.587, 0.114]).astype(np.uint8)[..., None] if self.gray else picture
        return picture.transpose(2, 0, 1)

    def close(self):
        for env in self.envs:
            env.close()


def seeds_of(args, split, restart):
    """args.num_envs seeds. Easy to miss: all but training share theirs, so that variants differ by their look alone."""
    return np.random.SeedSequence((args.seed, int(split != "train"), restart)).generate_state(args.num_envs).tolist()


# ---- The command line ----
@dataclass
class Test:
    checkpoint: tyro.conf.Positional[str]  # run folder or checkpoint
    variants: tuple[str, ...] = ()  # what it is tested on (default: all)
    episodes: int = 100  # of each variant


@dataclass
class Look:
    out: tyro.conf.Positional[str]  # .png file
    env_id: str = ""  # the task (default: the one that is trained first)
    variants: tuple[str, ...] = ()  # what is shown, side by side (default: all)
    seed: int = 1  # draws where things are
    scale: int = 4  # screen pixels for each pixel of an observation


def main(suite, argv):
    """Trains a script on a suite, tests a checkpoint on its variants, or shows them."""
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(suite.__doc__.strip())
    elif command == "test":
        test(suite, tyro.cli(Test, prog=f"{name_of(suite)} test", args=argv[1:]))
    elif command == "look":
        look(suite, tyro.cli(Look, prog=f"{name_of(suite)} look", args=argv[1:]))
    else:
        if any(flag.split("=")[0].replace("_", "-") == "--eval-modes" for flag in argv):
            fail(f"--eval-modes: looks of DMC-GB; those of {name_of(suite)} are {' '.join(suite.VARIANTS)}, see `test`")
        suite.check(suite.VARIANTS[:1])
        script = load_script(command, suite)
        old = any(flag.startswith(("--resume", "--evaluate")) for flag in argv)  # a run that knows its task
        default = [] if old else ["--env-id", tasks_of(suite)[0]]
        script.main([*default, *argv[1:]], make_envs=partial(make_envs, script, suite))


def test(suite, flags):
    """Plays episodes of each variant and writes their mean score beside the checkpoint, as <suite>.csv."""
    variants = flags.variants or suite.VARIANTS
    suite.check(variants)
    if flags.episodes < 1:
        fail(f"--episodes {flags.episodes}: at least 1")
    script = load_script(script_name(flags.checkpoint), suite)
    state = script.load_checkpoint(flags.checkpoint)
    args = script.Args(**state["args"])
    agent = script.load_agent(args, state, partial(make_envs, script, suite))
    split = {"split": "test"} if "split" in inspect.signature(script.evaluate).parameters else {}  # or it has but one
    rows = [["step", "variant", "episodes", suite.SCORE, "std"]]
    for variant in variants:
        envs = partial(make_envs, script, suite, variant=variant)
        scores = script.evaluate(agent, args, envs, episodes=flags.episodes, **split)
        rows.append([state["step"], variant, len(scores), f"{scores.mean():.4g}", f"{scores.std():.4g}"])
        print(f"{variant:12} {suite.SCORE} {rows[-1][3]} +- {rows[-1][4]} in {len(scores)} episodes", flush=True)
    path = script.checkpoint_path(flags.checkpoint).parent / f"{name_of(suite)}.csv"
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    print(path)


def look(suite, flags):
    """Writes the first observation of each variant, one beside the other, from one seed."""
    variants = flags.variants or suite.VARIANTS
    if flags.scale < 1 or not flags.out.endswith(".png") or not Path(flags.out).absolute().parent.is_dir():
        fail(f"{flags.out} at --scale {flags.scale}: a .png file in a folder that exists, and a scale of at least 1")
    suite.check(variants)
    if "MUJOCO_GL" not in os.environ:
        load_script("sac_sam_reset").import_suite()
    args = SimpleNamespace(env_id=flags.env_id or tasks_of(suite)[0], seed=flags.seed, num_envs=1, action_repeat=2)
    pictures = []
    for variant in variants:
        envs = suite.make_envs(args, variant)
        frame = envs.reset()[0][0, -3:].transpose(1, 2, 0)
        envs.close()
        picture = np.ascontiguousarray(frame.repeat(flags.scale, 0).repeat(flags.scale, 1))
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(picture, variant, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, width, cv2.LINE_AA)
        pictures.append(picture)
    cv2.imwrite(flags.out, np.concatenate(pictures, axis=1)[..., ::-1])
    print(flags.out)


def make_envs(script, suite, args, split, restart=0, variant=None):
    """The suite's environments, of a variant where one is given, with the frames that the script is made for.

    Easy to miss: a replay builds stacks from an observation's newest frame, so it would mix up another kind. And
    the renderer is loaded only here, where torch is set up, as the import of torch's compiler crashes after Mesa's.
    """
    script.import_suite()
    frames = {} if hasattr(script, "Mode") else {"size": 64, "gray": True}  # DMC-GB's are in colours
    return suite.make_envs(args, variant or split, restart, **frames)


def name_of(suite):
    return Path(suite.__file__).stem


def tasks_of(suite):
    """["reach_duplo", "reach_site"] from {"reach": "duplo site"}."""
    return [f"{domain}_{task}" for domain, line in suite.TASKS.items() for task in line.split()]


def task_of(args, suite):
    """One of them from args.env_id, which may have hyphens."""
    name = args.env_id.lower().replace("-", "_")
    if name not in tasks_of(suite):
        fail(f"--env-id {args.env_id}: no such task, there are {' '.join(tasks_of(suite))}")
    return name


def load_script(name, suite=None):
    """A script of algos/ as a module of its own, whose tasks are those of the suite."""
    path = Path(__file__).parent.parent / "algos" / f"{name}.py"
    if not path.is_file():
        there = " ".join(sorted(other.stem for other in path.parent.glob("*.py")))
        fail(f"no command and no script {name!r}; commands: test look; scripts: {there}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if suite and not hasattr(module, "SUITE"):
        fail(f"{name} is no script for DeepMind Control from pixels")
    if suite:
        module.SUITE = suite.TASKS
    return module


def script_name(checkpoint):
    """Which script wrote a checkpoint."""
    path = Path(checkpoint) / "checkpoint.pt" if Path(checkpoint).is_dir() else Path(checkpoint)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["script"]
    except Exception as error:
        fail(f"{path} cannot be read as a checkpoint: {getattr(error, 'strerror', None) or type(error).__name__}")


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
