"""How much a policy changes when what it sees is recoloured: KL divergences along test episodes.

Paper: Xie et al. 2025, MDPO, Table 1 (random convolutions) and Figure 13 (brightness, contrast,
saturation, hue). Each agent plays test levels. The program perturbs each frame that the agent sees
several times and takes KL(pi(frame) || pi(perturbed frame)); mean and standard deviation are over
all frames and versions. The paper does not say how many versions there are, how large the kernels
are, how many layers of them there are, how convolved frames become pictures again, or how far
colours move. Ours: ten, 3 x 3, one (--conv-layers), each frame stretched to 0 to 255, factors of
0.5 to 1.5, any hue.

    python benchmark/analyses/robustness.py PPO=runs/<PPO> MDPO=runs/<MDPO> --out robustness.csv
    python benchmark/analyses/robustness.py runs/<folder> --perturb random_conv hue --images perturbed.png

It is for runs of mdpo.py and ppo_netrand.py and copies of them: `agent(obs)` gives logits and
values.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision.transforms.functional as colours
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from evaluate import load_runs, report
from record import frames_of, play

matplotlib.use("Agg")  # draws into files, without a display
Perturbation = Literal["random_conv", "brightness", "contrast", "saturation", "hue"]
FACTORS = {"hue": (-0.5, 0.5), **dict.fromkeys(("brightness", "contrast", "saturation"), (0.5, 1.5))}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # [METHOD=]FOLDER of some runs
    perturb: tuple[Perturbation, ...] = get_args(Perturbation)  # what is done to the frames, one at a time
    out: str | None = None  # .csv file for the table
    images: str | None = None  # .png file: a frame beside versions of it
    episodes: int = 10  # on test levels, of each agent
    steps: int = 1000  # the longest episode; one that goes on is cut
    draws: int = 10  # perturbed versions of a frame
    conv_layers: int = 1  # of random_conv: convolutions one after the other, with a ReLU between two
    seed: int = 0  # draws the levels, the actions and the perturbations
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.episodes, args.steps, args.draws, args.conv_layers) < 1 or args.seed < 0 or not args.perturb:
        common.fail("--episodes --steps --draws --conv-layers: at least 1; --seed: at least 0; --perturb: some")
    if args.out:
        common.check_out(args.out, ".csv")
    if args.images:
        common.check_out(args.images, ".png")
    rows, shown = [], None
    for run in load(args.runs, args.cuda):
        for number, agent in enumerate(run.agents(), 1):
            frames = seen(run, agent, args.episodes, args.steps, args.seed)  # [M, 3, 64, 64]
            if shown is None:
                shown = frames[min(50, len(frames) - 1)], has_box(run.args)
            for name in args.perturb:
                rng, boxed = stream(args.seed, name), has_box(run.args)
                change = partial(perturbed, name=name, rng=rng, boxed=boxed, layers=args.conv_layers)
                kl = divergences(agent, frames, change, args.draws)  # [M, draws]
                row = {"agent": number, "perturbation": name}
                row |= {"episodes": args.episodes, "frames": len(kl), "draws": args.draws}
                row["layers"] = args.conv_layers if name == "random_conv" else ""
                row |= {"kl_mean": kl.mean().item(), "kl_std": kl.std(correction=0).item()}
                rows.append(run.source() | row)
    report(rows, args.out)
    if args.images:
        draw(*shown, args.perturb, args.seed, args.conv_layers).savefig(args.images, dpi=130)
        print(args.images)


# ---- Agents and what they see ----
def load(texts, cuda):
    """The runs of [METHOD=]FOLDER, in fp32. The program ends if one is not of a PPO script."""
    runs = load_runs(texts, cuda)
    for run in runs:
        if "clip_coef" not in vars(run.args):
            common.fail(f"{run.folder}: this is for runs of mdpo.py and ppo_netrand.py and copies of them")
    return runs


def seen(run, agent, episodes, steps, seed):
    """What an agent sees in test episodes, one episode after the other. -> uint8 [M, 3, 64, 64]."""
    return frames_of(play(run, agent, "test", episodes, steps, seed))


def has_box(args):
    """Whether the velocity is painted into the frames. It is no colour, so it is never perturbed."""
    known = vars(args)
    return bool(known.get("plain_look") or known.get("paint_vel_info"))


# ---- Perturbations ----
def stream(seed, name):
    """The random numbers of a perturbation, the same for all agents and with all other flags."""
    entropy = (seed, get_args(Perturbation).index(name))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def perturbed(images, name, rng, boxed=False, layers=1):
    """One version of each image. uint8 [B, 3, H, W] -> the same. boxed: the velocity box stays."""
    versions = random_conv(images, rng, layers) if name == "random_conv" else recolour(images, name, rng)
    if boxed:
        versions[:, :, :13, :26] = images[:, :, :13, :26]
    return versions


def random_conv(images, rng, layers=1):
    """Each image after its own convolutions of standard normal weights. uint8 [B, 3, H, W] -> the same."""
    versions = images.float().reshape(1, -1, *images.shape[2:])  # [1, 3B, H, W], in B groups
    for layer in range(layers):
        kernels = torch.randn(len(images) * 3, 3, 3, 3, generator=rng)
        if layer > 0:
            versions = versions.relu()
        versions = torch.nn.functional.conv2d(versions, kernels, padding=1, groups=len(images))
    return rescaled(versions.view(images.shape))


def rescaled(images):
    """Each image's lowest value becomes 0 and its highest 255. [B, C, H, W] -> uint8."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    width = (high - low).clamp(min=torch.finfo(images.dtype).tiny)  # an image of a single value is black
    return (255 * (images - low) / width).round().to(torch.uint8)


def recolour(images, name, rng):
    """Each image's brightness, contrast, saturation or hue by its own factor. uint8 [B, 3, H, W] -> the same."""
    factors = torch.empty(len(images)).uniform_(*FACTORS[name], generator=rng).tolist()
    adjust = getattr(colours, f"adjust_{name}")
    return torch.stack([adjust(*pair) for pair in zip(images, factors, strict=True)])


# ---- The measure ----
@torch.no_grad()
def divergences(agent, frames, change, draws):
    """KL(pi(frame) || pi(change(frame))). uint8 [M, 3, 64, 64] -> float64 [M, draws], versions of each."""
    device, found = next(agent.parameters()).device, []
    for obs in frames.split(32):
        logits, _ = agent(obs.to(device))  # [B, A]
        others, _ = agent(change(obs.repeat_interleave(draws, 0)).to(device))  # [B * draws, A]
        kl = kl_divergence(logits.repeat_interleave(draws, 0), others)
        found.append(kl.view(-1, draws).cpu())
    return torch.cat(found)


def kl_divergence(logits, others):
    """KL(softmax(logits) || softmax(others)). [B, A], [B, A] -> float64 [B]."""
    log_probs, other_log_probs = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    return (log_probs.exp() * (log_probs - other_log_probs)).sum(-1)


def draw(frame, boxed, names, seed, layers=1, columns=8):
    """A frame [3, H, W] and versions of it, one row per perturbation -> figure."""
    size = 1.3 * columns, 1.4 * len(names) + 0.3
    figure, axes = plt.subplots(len(names), columns, figsize=size, squeeze=False)
    figure.set_layout_engine("constrained")
    for row, name in zip(axes, names, strict=True):
        versions = perturbed(frame.expand(columns - 1, -1, -1, -1), name, stream(seed, name), boxed, layers)
        for axis, image in zip(row, [frame, *versions], strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    axes[0, 0].set_title("as seen", fontsize=9)
    axes[0, 1].set_title("perturbed", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
