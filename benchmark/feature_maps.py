"""What an encoder of drqv2_pieg.py makes of one state under two backgrounds: maps of its features, and how they differ.

Paper: Yuan et al. 2022, PIE-G, Figures 2 and 5, and the average intensity of the difference of normalised feature maps
(3.1). How they are normalised is not said; here each map's least value is 0 and its greatest 1, over both backgrounds.
The agent plays in the look that it was trained in, and its actions are sent to the same task in the other look, so that
both show the same states. Batch normalisation goes by the running statistics, the same in both.

    python benchmark/feature_maps.py runs/<PIE-G> runs/<SVEA> --out docs

feature_maps.png: a row a checkpoint, the state in the middle of the episode: both pictures, both maps (mean over the
channels) and their difference. feature_maps.csv: the mean difference over all states and maps, a row a checkpoint.
"""

import csv
import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

matplotlib.use("Agg")  # draws into files, without a display
SCRIPT = Path(__file__).parent.parent / "algos" / "drqv2_pieg.py"
spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[list[str]]  # run folders or checkpoints of drqv2_pieg.py
    out: str  # folder, which exists, for the picture and the table
    mode: script.Mode = "video_hard"  # the other look
    dmcgb_dir: str = "data/dmcgb"  # DMC-GB's colours and clips
    steps: int = 50  # states that the difference is a mean over, one a step
    seed: int = 0  # draws the episode


def main():
    args = tyro.cli(Args)
    if not Path(args.out).is_dir() or args.steps < 1:
        script.fail("--out: a folder that exists; --steps: at least 1")
    rows = []
    for path in args.checkpoints:
        state = script.load_checkpoint(path)
        own = {"seed": args.seed, "dmcgb_dir": args.dmcgb_dir, "cuda": False}
        run_args = dataclasses.replace(script.Args(**state["args"]), **own)
        agent = script.load_agent(run_args, state).eval()
        try:
            seen = play(agent, run_args, args.mode, args.steps)
        except (OSError, ValueError, RuntimeError) as error:  # of the look's data
            script.fail(str(error))
        both = normalised(torch.stack([feature_maps(agent.encoder, obs) for obs in seen]))
        rows.append((f"{run_args.exp_name}, {run_args.encoder}", seen, both))
        print(f"{path}: {difference(both):.4f} between maps of 0 to 1")
    draw(rows).savefig(Path(args.out) / "feature_maps.png", dpi=130)
    with open(Path(args.out) / "feature_maps.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("checkpoint", "encoder", "mode", "states", "difference"))
        for path, (label, seen, both) in zip(args.checkpoints, rows, strict=True):
            writer.writerow((Path(path).name, label, args.mode, len(seen[0]), f"{difference(both):.5f}"))


@torch.no_grad()
def play(agent, args, mode, steps):
    """The same states in both looks: uint8 [2, S, 9, 84, 84]."""
    envs = [script.make_envs(args, split) for split in ("test", mode)]
    obs, seen = [env.reset()[0] for env in envs], []
    for _ in range(steps):
        seen.append(np.stack(obs)[:, 0])
        (actions,) = script.act(agent, torch.as_tensor(obs[0]))
        obs = [env.step(actions.numpy())[0] for env in envs]
    for env in envs:
        env.close()
    return torch.from_numpy(np.stack(seen, axis=1))


@torch.no_grad()
def feature_maps(encoder, obs):
    """Of the newest frame, or of the stack where the encoder takes it whole. uint8 [S, 9, 84, 84] -> [S, C, h, w]."""
    if hasattr(encoder, "resnet"):
        return encoder.resnet(script.to_pixels(obs[:, -3:]) - 0.5)
    return torch.nn.Sequential(*list(encoder)[:-1])(script.to_pixels(obs) - 0.5)


def normalised(both):
    """Each map in 0..1, over both looks; a map of one value is 0. [2, S, C, h, w] -> the same."""
    low, high = both.amin((0, 3, 4), keepdim=True), both.amax((0, 3, 4), keepdim=True)
    return (both - low) / (high - low).clamp(min=1e-12)


def difference(both):
    return (both[0] - both[1]).abs().mean().item()


def draw(rows):
    titles = ("trained in", "the other look", "features", "features there", "difference")
    figure, axes = plt.subplots(len(rows), 5, figsize=(10, 2.1 * len(rows) + 0.4), squeeze=False)
    for (label, seen, both), line in zip(rows, axes, strict=True):
        middle = seen.shape[1] // 2
        pictures = [obs[middle, -3:].permute(1, 2, 0).numpy() for obs in seen]
        maps = both[:, middle].mean(1).numpy()
        change = (both[0, middle] - both[1, middle]).abs().mean(0).numpy()
        for axis, image, title in zip(line, (*pictures, *maps, change), titles, strict=True):
            axis.imshow(image, vmin=0, vmax=None if image.ndim == 3 else max(maps.max(), 1e-12), cmap="viridis")
            axis.set_title(title if line is axes[0] else "", fontsize=9)
            axis.set_xticks([]), axis.set_yticks([])
        line[0].set_ylabel(f"{label}\n{difference(both):.3f}", fontsize=9)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
