"""Where encoders put one frame and perturbed versions of it: a t-SNE map, and a number for how far
they scatter.

Paper: Xie et al. 2025, MDPO, Figure 4: encodings [256] of versions of a bigfish frame after random
convolutions. The frame is one that the first run's agent sees on a test level; all encoders get the
same versions of it. t-SNE keeps neighbours and not distances, so the size of a cloud means little.
Compare the spread instead: the mean distance between two encodings, divided by their mean norm.

    python benchmark/analyses/tsne.py PPO=runs/<PPO> MDPO=runs/<MDPO> --out tsne.png

It is for runs of mdpo.py and ppo_netrand.py and copies of them: `agent.encoder(pixels)` gives the
encodings.
"""

import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import robustness
from evaluate import report

COLOURS = (*common.COLOURS, "black")
MARKERS = "osD^vP"


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # [METHOD=]FOLDER of some runs
    out: str  # .png file
    versions: int = 200  # of the frame, each after a random convolution of its own
    step: int = 50  # of an episode, whose frame it is; the last one if the episode is shorter
    perplexity: float = 30.0  # t-SNE's: about how many neighbours a point has
    seed: int = 0  # draws the level, the actions, the versions and the map
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.versions < 2 or min(args.step, args.seed) < 0:
        common.fail("--versions: at least 2; --step --seed: at least 0")
    if not 0 < args.perplexity < args.versions:
        common.fail(f"--perplexity {args.perplexity}: above 0 and below --versions")
    common.check_out(args.out, ".png")
    runs = robustness.load(args.runs, args.cuda)
    for run in runs:
        if run.args.env_id != runs[0].args.env_id:
            games = f"{run.args.env_id} and the first one {runs[0].args.env_id}"
            common.fail(f"{run.folder} played {games}")
    agents = [run.agents() for run in runs]
    frame = robustness.seen(runs[0], agents[0][0], 1, args.step + 1, args.seed)[-1]
    rng = robustness.stream(args.seed, "random_conv")
    boxed = robustness.has_box(runs[0].args)
    copies = frame.expand(args.versions, -1, -1, -1)
    versions = robustness.perturbed(copies, "random_conv", rng, boxed)
    rows, names, encodings = [], [], []
    for run, group in zip(runs, agents, strict=True):
        for number, agent in enumerate(group, 1):
            encodings.append(encode(agent.eval(), versions))
            row = {"agent": number, "versions": args.versions, "spread": spread(encodings[-1])}
            rows.append(run.source() | row)
            if encodings[-1].shape != encodings[0].shape:
                common.fail(f"{run.folder}: its encodings are not as long as those of the first run")
            label = f"{run.method}, agent {number}" if len(group) > 1 else run.method
            names.append(f"{label}: spread {row['spread']:.3f}")
    report(rows)
    mapping = TSNE(perplexity=args.perplexity, random_state=args.seed)
    points = mapping.fit_transform(torch.cat(encodings).numpy())
    draw(frame, names, points.reshape(len(names), -1, 2)).savefig(args.out, dpi=130)
    print(args.out)


@torch.no_grad()
def encode(agent, images):
    """The encoder's output. uint8 [B, 3, 64, 64] -> [B, 256], on the CPU."""
    device, encodings = next(agent.parameters()).device, []
    for part in images.split(256):
        encodings.append(agent.encoder(part.to(device).float() / 255).cpu())
    return torch.cat(encodings)


def spread(encodings):
    """Mean distance between two encodings, divided by their mean norm. [B, D] -> float."""
    encodings = encodings.double()
    return (torch.pdist(encodings).mean() / encodings.norm(dim=1).mean().clamp(min=1e-12)).item()


def draw(frame, names, points):
    """The frame [3, H, W] beside the points [series, B, 2], one name per series -> figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5.4), width_ratios=(1, 4))
    figure.set_layout_engine("constrained")
    left.imshow(frame.permute(1, 2, 0).numpy(), interpolation="nearest")
    left.set(xticks=[], yticks=[], title="the frame")
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for name, series, (colour, marker) in zip(names, points, styles, strict=False):
        right.scatter(*series.T, s=16, c=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
    right.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    right.set_title("Encodings of the frame after random convolutions", fontsize=11)
    right.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    return figure


if __name__ == "__main__":
    main()
