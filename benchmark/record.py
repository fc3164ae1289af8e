"""Plays a checkpoint on levels it never saw and writes what it does: a grid of episodes, as H.264 (.mp4) or .gif.

Each cell is one episode; when it ends, it darkens and shows the return. Of a stack of frames it shows the newest one.

    python benchmark/record.py runs/<folder>                                   # runs/<folder>/episodes.mp4
    python benchmark/record.py runs/<folder> --out picture.gif --rows 2 --columns 4
    python benchmark/record.py runs/<folder> --split looks --columns 1     # drqv2_pieg.py: a row for each of five looks
"""

import dataclasses
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import imageio
import numpy as np
import torch
import tyro


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[str]  # run folder or checkpoint
    out: str | None = None  # .mp4 or .gif (default: episodes.mp4 beside the checkpoint)
    split: Literal["test", "train", "full_look", "looks"] = "test"  # levels; looks: DMC-GB's five, a row each
    dmcgb_dir: str | None = None  # DMC-GB's colours and clips (default: where the run had them)
    agent: int = 1  # which agent of the checkpoint plays, from 1
    seed: int = 0  # draws the levels and the actions
    rows: int = 3  # of the grid
    columns: int = 4  # of the grid
    steps: int = 600  # the longest video; episodes still under way are cut
    scale: int = 4  # screen pixels for each pixel of an observation
    fps: int = 15  # steps a second


def main():
    args = tyro.cli(Args)
    script = load_script(args.checkpoint)
    state = script.load_checkpoint(args.checkpoint)
    script_args = script.Args(**state["args"])
    if min(args.rows, args.columns, args.steps, args.scale, args.fps) < 1:
        script.fail("--rows --columns --steps --scale --fps: at least 1")
    out = Path(args.out) if args.out else script.checkpoint_path(args.checkpoint).parent / "episodes.mp4"
    if out.suffix not in (".mp4", ".gif") or not out.parent.is_dir():
        script.fail(f"--out {out}: an .mp4 or .gif file in a folder that exists")
    if args.split == "full_look" and not getattr(script_args, "plain_look", False):
        script.fail("--split full_look: that run was not trained with --plain-look")
    one = hasattr(script, "load_agent")  # in mdpo.py there may be two
    agents = [script.load_agent(script_args, state)] if one else script.load_agents(script_args, state)
    if not 1 <= args.agent <= len(agents):
        script.fail(f"--agent {args.agent}: the checkpoint holds {len(agents)}")
    script_args, splits, rows = dataclasses.replace(script_args, seed=args.seed), [args.split], args.rows
    if args.split == "looks":
        if not hasattr(script, "Mode"):
            script.fail("--split looks: those are of drqv2_pieg.py")
        splits = ["test", *get_args(script.Mode)]
        rows, script_args.dmcgb_dir = len(splits), args.dmcgb_dir or script_args.dmcgb_dir
    script_args.num_envs = rows * args.columns // len(splits)
    try:
        envs = SideBySide([script.make_envs(script_args, split) for split in splits])
    except (OSError, ValueError, RuntimeError) as error:  # of the looks' data
        script.fail(str(error))
    cells, returns = play(script, agents[args.agent - 1].eval(), script_args, envs, args.seed, args.steps)
    write(out, [grid(row, rows, args.columns, args.scale) for row in cells], args.fps)
    print(f"{out}: {len(cells)} steps, returns {' '.join(f'{value:g}' for value in returns)}")


def load_script(checkpoint):
    """The module of algos/ that wrote a checkpoint."""
    path = Path(checkpoint) / "checkpoint.pt" if Path(checkpoint).is_dir() else Path(checkpoint)
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "algos" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        print(f"error: {path} cannot be read as a checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
    return module


class SideBySide:
    """Vector environments as one."""

    def __init__(self, parts):
        self.parts, self.single_action_space = parts, parts[0].single_action_space

    def reset(self):
        return np.concatenate([part.reset()[0] for part in self.parts]), {}

    def step(self, actions):
        outcomes = [part.step(some) for part, some in zip(self.parts, np.split(actions, len(self.parts)), strict=True)]
        return *(np.concatenate(values) for values in list(zip(*outcomes, strict=True))[:4]), {}

    def close(self):
        for part in self.parts:
            part.close()


def play(script, agent, args, envs, seed, steps):
    """One episode an environment. -> frames, a list over time of lists of (image [3, H, W], return, ended); returns."""
    noise_rng = torch.Generator().manual_seed(seed)
    device, sampling = next(agent.parameters()).device, "noise" in inspect.signature(script.act).parameters
    alone = hasattr(script, "normalise_by_own")  # batch normalisation goes by one observation, as in evaluations
    if alone:
        script.normalise_by_own(agent, args)
    obs, _ = envs.reset()
    frames, returns, ended = [], np.zeros(len(obs)), np.zeros(len(obs), dtype=bool)
    gray = hasattr(script, "Replay") and obs.shape[1] < 9  # three frames of a replay are gray, and no picture's colours
    last = newest(obs, gray).copy()
    while len(frames) < steps and not ended.all():
        last[~ended] = newest(obs, gray)[~ended]
        frames.append(
            [(image.copy(), *about) for image, *about in zip(last, returns.copy(), ended.copy(), strict=True)]
        )
        inputs = [torch.as_tensor(obs).to(device)]
        if sampling:  # or the agent is greedy
            noise = torch.empty(len(obs), int(envs.single_action_space.n)).exponential_(generator=noise_rng)
            inputs.append(noise.to(device))
        groups = zip(*(part.split(1 if alone else len(obs)) for part in inputs), strict=True)
        actions = torch.cat([script.act(agent, *group)[0] for group in groups])
        obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        returns[~ended] += reward[~ended]
        ended |= terminated | truncated
    frames.append([(image, value, done) for image, value, done in zip(last, returns, ended, strict=True)])
    envs.close()
    return frames, returns


def newest(obs, gray):
    """The newest frame of each stack, gray or in colours. [N, C, H, W] -> [N, 3, H, W]."""
    return obs[:, -1:].repeat(3, axis=1) if gray else obs[:, -3:]


def grid(cells, rows, columns, scale):
    """[(image [3, H, W], return, ended)] -> picture [rows * H * scale, columns * W * scale, 3], thin lines between."""
    pictures = []
    for image, value, ended in cells:
        picture = np.ascontiguousarray(image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1))
        if ended:
            picture //= 3
        height = len(picture)
        text = ((4, height - 6), cv2.FONT_HERSHEY_SIMPLEX, height / 400)
        cv2.putText(picture, f"{value:g}", *text, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(picture, f"{value:g}", *text, (255, 255, 255), 1, cv2.LINE_AA)
        picture[-1], picture[:, -1] = 0, 0
        pictures.append(picture)
    return np.concatenate([np.concatenate(pictures[r * columns : (r + 1) * columns], axis=1) for r in range(rows)])


def write(path, pictures, fps):
    if path.suffix == ".gif":
        imageio.mimwrite(path, pictures, duration=1000 / fps, loop=0)
        return
    options = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}  # what every browser plays
    with imageio.get_writer(path, fps=fps, output_params=["-movflags", "+faststart"], **options) as video:
        for picture in pictures:
            video.append_data(picture)


if __name__ == "__main__":
    main()
