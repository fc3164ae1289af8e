"""Films a run's agent on levels that it never saw: a grid of episodes, as H.264 (.mp4) or .gif.

Each cell is one episode. When the episode ends, the cell darkens and shows the return. Of a stack
of frames it shows the newest one. The agent plays as in the run's evaluations: the program calls
the script's own `evaluate`.

    python benchmark/analyses/record.py runs/<folder>                                     # runs/<folder>/episodes.mp4
    python benchmark/analyses/record.py runs/<folder> --out picture.gif --rows 2 --columns 4
    python benchmark/analyses/record.py runs/<folder> --split looks --columns 1    # drqv2_pieg.py: one row per look
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import imageio
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import evaluate

LOOKS = ("test", "color_easy", "color_hard", "video_easy", "video_hard")  # the rows of --split looks


@dataclass
class Args:
    run: tyro.conf.Positional[str]  # run folder
    out: str | None = None  # .mp4 or .gif (default: episodes.mp4 in the run's folder)
    split: Literal["test", "train", "full_look", "looks"] = "test"  # levels; looks: DMC-GB's, one per row
    dmcgb_dir: str | None = None  # DMC-GB's colours and clips (default: where the run had them)
    agent: int = 1  # which agent of the run plays, from 1
    seed: int = 0  # draws the levels and the actions
    rows: int = 3  # of the grid
    columns: int = 4  # of the grid
    steps: int = 600  # the longest video; episodes that go on are cut
    scale: int = 4  # screen pixels per pixel of an observation
    fps: int = 15  # steps per second
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.rows, args.columns, args.steps, args.scale, args.fps) < 1 or args.seed < 0:
        common.fail("--rows --columns --steps --scale --fps: at least 1; --seed: at least 0")
    run = common.load_run(args.run, cuda=args.cuda, cuda_required=False)
    out = Path(args.out or run.folder / "episodes.mp4")
    common.check_out(out, ".mp4", ".gif")
    known = vars(run.args)
    if args.split == "full_look" and not known.get("plain_look"):
        common.fail("--split full_look: that run was not trained with --plain-look")
    if args.split == "looks" and "eval_modes" not in known:
        common.fail("--split looks: that run is not of drqv2_pieg.py or a copy of it")
    if args.dmcgb_dir:
        run.args.dmcgb_dir = args.dmcgb_dir
    agents = run.agents()
    if not 1 <= args.agent <= len(agents):
        common.fail(f"--agent {args.agent}: the run has {len(agents)}")
    splits, count = [args.split], args.rows * args.columns
    if args.split == "looks":
        splits, count = LOOKS, args.columns
    episodes = []
    for split in splits:
        episodes += play(run, agents[args.agent - 1], split, count, args.steps, args.seed)
    gray = "distribution_mode" not in known and "eval_modes" not in known  # Procgen and DMC-GB have colours
    length = max(len(episode.rewards) for episode in episodes)
    write(out, pictures(episodes, length, args.columns, args.scale, gray), args.fps)
    returns = [f"{sum(episode.rewards):g}{'' if episode.ended else ' (cut)'}" for episode in episodes]
    print(f"{out}: {length} steps, returns {' '.join(returns)}")


# ---- What an agent sees and does ----
@dataclass
class Episode:
    """An episode: what the agent saw, what it did then, and the reward of it, step by step."""

    obs: list = dataclasses.field(default_factory=list)
    actions: list = dataclasses.field(default_factory=list)
    rewards: list = dataclasses.field(default_factory=list)
    ended: bool = False  # not if it was cut


def play(run, agent, split, count, steps, seed=0, beside=None):
    """`count` episodes of the script's own evaluation, each cut after `steps` steps. -> list of Episode.

    beside: another split, whose environments get the same actions. -> two lists, of `split` and of `beside`.
    """
    splits, recorders = [split, beside] if beside else [split], []

    def make_envs(args, _, start=0):
        for name in splits:
            recorders.append(Recorder(evaluate.make_envs(run, args, name, start), count, steps))
        return Together(*recorders) if beside else recorders[0]

    changes = {"eval_seed": seed, "eval_episodes": count, "eval_envs": count, "mc_samples": 0}
    known = {name: value for name, value in changes.items() if name in vars(run.args)}
    run.script.evaluate(agent, dataclasses.replace(run.args, **known), make_envs, split)
    agent.eval()  # an evaluation leaves it in train mode
    played = [recorder.first_episodes() for recorder in recorders]
    return played if beside else played[0]


def frames_of(episodes):
    """What was seen in some episodes, one after the other. -> uint8 [M, ...]."""
    frames = []
    for episode in episodes:
        frames += episode.obs
    return torch.as_tensor(np.stack(frames))


class Recorder:
    """Environments that note their first `count` episodes, as many of each, and cut them after `steps` steps."""

    def __init__(self, envs, count, steps):
        self.envs, self.count, self.steps = envs, count, steps

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self):
        self.obs, info = self.envs.reset()
        self.quota = self.count // len(self.obs)
        self.episodes = [[Episode()] for _ in self.obs]
        return self.obs, info

    def step(self, actions):
        actions = actions.copy()  # the caller writes the next ones into the same array
        obs, reward, terminated, truncated, info = self.envs.step(actions)
        truncated, ends = truncated.copy(), list(info["episodes"])
        for n, episodes in enumerate(self.episodes):
            if len(episodes) > self.quota:
                continue
            episode = episodes[-1]
            episode.obs.append(self.obs[n])
            episode.actions.append(actions[n])
            episode.rewards.append(float(reward[n]))
            episode.ended = bool(terminated[n] or truncated[n])
            cut = not episode.ended and len(episode.rewards) == self.steps
            if cut:
                truncated[n] = True
                ends.append((n, sum(episode.rewards), self.steps))
                if len(self.episodes) == 1:  # the next episode is played in the same environment
                    obs, _ = self.envs.reset()
            if cut or episode.ended:
                episodes.append(Episode())
        self.obs = obs
        return obs, reward, terminated, truncated, info | {"episodes": ends}

    def first_episodes(self):
        """The episodes in the order of the environments."""
        found = []
        for episodes in self.episodes:
            found += episodes[: self.quota]
        return found


class Together:
    """Two vector environments that get the same actions. The agent sees the first one."""

    def __init__(self, seen, other):
        self.seen, self.other = seen, other

    def __getattr__(self, name):
        return getattr(self.seen, name)

    def reset(self):
        self.other.reset()
        return self.seen.reset()

    def step(self, actions):
        self.other.step(actions)
        return self.seen.step(actions)

    def close(self):
        self.other.close()
        self.seen.close()


# ---- Pictures ----
def pictures(episodes, length, columns, scale, gray):
    """The grid before each step and after the last one: pictures [rows * H * scale, columns * W * scale, 3]."""
    for t in range(length + 1):
        cells = [cell(episode, t, scale, gray) for episode in episodes]
        rows = []
        for first in range(0, len(cells), columns):
            rows.append(np.concatenate(cells[first : first + columns], axis=1))
        yield np.concatenate(rows)


def cell(episode, t, scale, gray):
    """An episode's picture before its step t [H * scale, W * scale, 3], with the return so far."""
    obs = episode.obs[min(t, len(episode.obs) - 1)]
    image = obs[-1:].repeat(3, axis=0) if gray else obs[-3:]  # the newest frame, uint8 [3, H, W]
    picture = np.ascontiguousarray(image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1))
    if episode.ended and t >= len(episode.rewards):
        picture //= 3
    height = len(picture)
    text, place = f"{sum(episode.rewards[:t]):g}", (4, height - 6)
    for colour, width in ((0, 0, 0), 3), ((255, 255, 255), 1):
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, height / 400, colour, width, cv2.LINE_AA)
    picture[-1], picture[:, -1] = 0, 0  # a thin line to the next cell
    return picture


def write(path, frames, fps):
    if path.suffix == ".gif":
        options = {"duration": 1000 / fps, "loop": 0}
    else:  # what every browser plays
        options = {"fps": fps, "codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}
        options["output_params"] = ["-movflags", "+faststart"]
    with imageio.get_writer(path, **options) as video:
        for frame in frames:
            video.append_data(frame)


if __name__ == "__main__":
    main()
