"""Where encoders put one frame and perturbed versions of it: a t-SNE map, and a number for how far they scatter.

Paper: Xie et al. 2025, MDPO, Figure 4: encodings [256] of versions of a bigfish frame behind random convolutions. The
frame is one that the first checkpoint's agent sees on a test level; all encoders get the same versions of it. t-SNE
keeps neighbours and not distances, so how tight a cloud looks means little: what to go by is the spread, the mean
distance between two encodings divided by their mean norm.

    python benchmark/tsne.py PPO=runs/<PPO> MDPO=runs/<MDPO> --out tsne.png
"""

from dataclasses import dataclass
from itertools import cycle

import checkpoints
import matplotlib.pyplot as plt
import robustness
import suites
import torch
import tyro
from sklearn.manifold import TSNE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
MARKERS = "osD^vP"


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[list[str]]  # [METHOD=]RUN: run folders or checkpoints of mdpo.py, ppo_netrand.py
    out: str  # .png file
    versions: int = 200  # of the frame, each behind a random convolution of its own
    step: int = 50  # of an episode, whose frame it is; the last one if the episode ends before
    perplexity: float = 30.0  # t-SNE's, about how many neighbours a point has
    seed: int = 0  # draws the level, the actions, the versions and the map
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.versions < 2 or min(args.step, args.seed) < 0 or not 0 < args.perplexity < args.versions:
        suites.fail("--versions: at least 2; --step --seed: at least 0; --perplexity: above 0 and below --versions")
    checkpoints.check(args.checkpoints, (args.out, ".png"))
    loaded = [robustness.load(path, args.cuda) for path in args.checkpoints]
    first, agents = loaded[0]
    for checkpoint, _ in loaded:
        if checkpoint.args.env_id != first.args.env_id:
            suites.fail(f"{checkpoint.path} played {checkpoint.args.env_id} and the first one {first.args.env_id}")
    frame = robustness.play(first, agents[0], args.seed, 1, args.step + 1)[-1]
    boxed = robustness.has_box(first.args)
    rng = robustness.stream(args.seed, "random_conv")
    versions = robustness.perturbed(frame.expand(args.versions, -1, -1, -1), "random_conv", rng, boxed)
    rows, labels, encodings = [], [], []
    for checkpoint, agents in loaded:
        for number, agent in enumerate(agents, 1):
            encodings.append(encode(agent, versions))
            about = {"agent": number, "versions": args.versions, "spread": spread(encodings[-1])}
            rows.append(checkpoint.source() | about)
            labels.append(checkpoint.method + f", agent {number}" * (len(agents) > 1))
    checkpoints.report(rows)
    points = TSNE(perplexity=args.perplexity, random_state=args.seed).fit_transform(torch.cat(encodings).numpy())
    names = [f"{label}: spread {row['spread']:.3f}" for label, row in zip(labels, rows, strict=True)]
    draw(frame, names, points.reshape(len(names), -1, 2)).savefig(args.out, dpi=130)
    print(args.out)


@torch.no_grad()
def encode(agent, images):
    """The encoder's output. uint8 [B, 3, 64, 64] -> [B, 256], on the CPU."""
    device = next(agent.parameters()).device
    return torch.cat([agent.encoder(part.to(device).float() / 255).cpu() for part in images.split(256)])


def spread(encodings):
    """Mean distance between two encodings, divided by their mean norm. [B, D] -> float."""
    encodings = encodings.double()
    return (torch.pdist(encodings).mean() / encodings.norm(dim=1).mean().clamp(min=1e-12)).item()


def draw(frame, names, points):
    """The frame [3, H, W] beside the points [series, B, 2], a name a series -> figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5.4), width_ratios=(1, 4))
    figure.set_layout_engine("constrained")
    left.imshow(frame.permute(1, 2, 0).numpy(), interpolation="nearest")
    left.set(xticks=[], yticks=[], title="the frame")
    for name, series, colour, marker in zip(names, points, cycle(COLOURS), cycle(MARKERS), strict=False):
        right.scatter(*series.T, s=16, c=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
    right.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    right.set_title("Encodings of the frame behind random convolutions", fontsize=11)
    right.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    return figure


if __name__ == "__main__":
    main()
