"""What an encoder of drqv2_pieg.py makes of one state under two backgrounds: maps of its features,
and how they differ.

Paper: Yuan et al. 2022, PIE-G, Figures 2 and 5, and the average intensity of the difference of
normalised feature maps (3.1). How they are normalised is not said; here each map's lowest value is
0 and its highest 1, over both backgrounds. The agent plays in the look that it was trained in. The
same task in the other look gets the same actions, so both show the same states. Batch normalisation
uses the running statistics in both.

    python benchmark/analyses/feature_maps.py runs/<PIE-G> runs/<SVEA> --out docs

feature_maps.png: one row per run, the state in the middle of the episode: both pictures, both maps
(mean over the channels) and their difference. feature_maps.csv: the mean difference over all states
and maps, one row per run.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from evaluate import load_runs
from record import frames_of, play

matplotlib.use("Agg")  # draws into files, without a display


Look = Literal["color_easy", "color_hard", "video_easy", "video_hard"]


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # run folders of drqv2_pieg.py, or of copies of it
    out: str  # folder, which exists, for the picture and the table
    mode: Look = "video_hard"  # the other look
    dmcgb_dir: str = "data/dmcgb"  # DMC-GB's colours and clips
    steps: int = 50  # states that the difference is a mean over, one per step
    seed: int = 0  # draws the episode


def main():
    args = tyro.cli(Args, description=__doc__)
    out = Path(args.out)
    if args.steps < 1 or args.seed < 0:
        common.fail("--steps: at least 1; --seed: at least 0")
    for name in ("feature_maps.png", "feature_maps.csv"):
        common.check_out(out / name, Path(name).suffix)
    runs = load_runs(args.runs)
    for run in runs:
        if "encoder_layer" not in vars(run.args):
            common.fail(f"{run.folder}: this is for runs of drqv2_pieg.py and copies of it")
        run.args.dmcgb_dir = args.dmcgb_dir
        run.args.eval_batch_norm = "running"
    rows = []
    for run in runs:
        agent = run.agents()[0]
        episodes = play(run, agent, "test", 1, args.steps, args.seed, beside=args.mode)
        seen = [frames_of(look) for look in episodes]  # uint8 [S, 9, 84, 84] each
        maps = [feature_maps(agent.encoder, obs, run.args.encoder) for obs in seen]
        both = normalised(torch.stack(maps))  # [2, S, C, h, w]
        rows.append((run.method, seen, both))
        print(f"{run.folder}: {difference(both):.4f} between maps of 0 to 1")
    draw(rows).savefig(out / "feature_maps.png", dpi=130)
    with open(out / "feature_maps.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("checkpoint", "method", "mode", "states", "difference"))
        for run, (label, seen, both) in zip(runs, rows, strict=True):
            found = f"{difference(both):.5f}"
            writer.writerow((run.folder.name, label, args.mode, len(seen[0]), found))


@torch.no_grad()
def feature_maps(encoder, obs, name):
    """Of the newest frame; with DrQ-v2's encoder, of the stack. uint8 [S, 9, 84, 84] -> [S, C, h, w]."""
    if name == "drqv2":
        layers = torch.nn.Sequential(*list(encoder)[:-1])  # without the one that flattens
        return layers(obs.float() / 255 - 0.5)
    return encoder.resnet(obs[:, -3:].float() / 255 - 0.5)


def normalised(both):
    """Each map in 0..1 over both looks; one of a single value is 0. [2, S, C, h, w] -> the same."""
    low, high = both.amin((0, 3, 4), keepdim=True), both.amax((0, 3, 4), keepdim=True)
    return (both - low) / (high - low).clamp(min=1e-12)


def difference(both):
    return (both[0] - both[1]).abs().mean().item()


def draw(rows):
    titles = ("trained in", "the other look", "features", "features there", "difference")
    figure, axes = plt.subplots(len(rows), 5, figsize=(10, 2.1 * len(rows) + 0.4), squeeze=False)
    for (label, seen, both), line in zip(rows, axes, strict=True):
        middle = len(seen[0]) // 2
        pictures = [obs[middle, -3:].permute(1, 2, 0).numpy() for obs in seen]
        maps = both[:, middle].mean(1).numpy()
        change = (both[0, middle] - both[1, middle]).abs().mean(0).numpy()
        highest = max(maps.max(), 1e-12)
        for axis, image, title in zip(line, (*pictures, *maps, change), titles, strict=True):
            axis.imshow(image, vmin=0, vmax=highest if image.ndim == 2 else None, cmap="viridis")
            axis.set_title(title if line is axes[0] else "", fontsize=9)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{label}\n{difference(both):.3f}", fontsize=9)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
