"""What an agent of ppo_netrand.py makes of a look that it never saw: its features, and where on the picture it looks.

Paper: Lee et al. 2020, Network Randomization, Figures 3 (trajectories in the hidden space) and 4 (Grad-CAM). The agent
plays training levels in the look of --plain-look. The same levels in the full look get the same actions, so what it
would see there differs in the style alone, step by step. Its clean policy is measured, in fp32 on the CPU.

    python benchmark/analyses/looks.py runs/<PPO> runs/<PPO + netrand> --out looks

looks_trajectories.png: features of one episode, on their two main components. looks_grad_cam.png: where the logit of
the action comes from. looks.csv: the distance between the features of the two looks over all episodes, one row per run.
A ratio is that distance divided by the mean one between steps of the same look; 0 means that the look does not matter.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from record import play
from tsne import encode

matplotlib.use("Agg")  # draws into files, without a display
LOOKS = {"train": ("seen look", "#0072B2"), "full_look": ("unseen look", "#D55E00")}  # of each split: name, colour


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # run folders of ppo_netrand.py --plain-look, or of copies of it
    out: str  # folder, which exists, for the two pictures and the table
    episodes: int = 8  # the distances are means over them; the pictures show the first one
    steps: int = 200  # the longest episode; one that goes on is cut
    seed: int = 0  # draws the levels and the actions
    moments: int = 6  # of the first episode, columns of the Grad-CAM picture


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.episodes, args.moments) < 1 or args.steps < 2 or args.seed < 0 or not args.runs:
        common.fail("--episodes --moments: at least 1; --steps: at least 2; --seed: at least 0; some runs")
    out = Path(args.out)
    if not out.is_dir():
        common.fail(f"--out {out}: a folder that exists")
    runs = [common.load_run(text, cuda=False, cuda_required=False, precision="fp32") for text in args.runs]
    for run in runs:
        if not vars(run.args).get("plain_look"):
            common.fail(f"{run.folder}: was trained without --plain-look, so there is no look that it never saw")
    rows, trajectories, maps = [], [], []
    for run, label in zip(runs, labels(runs), strict=True):
        agent = run.agents()[0]
        both = play_both(run, agent, args.episodes, args.steps, args.seed)
        hidden = [features(agent, episodes) for episodes in both]  # [M, 256] each, M steps of all episodes
        about = {"label": label, "env_id": run.args.env_id, "seed": run.args.seed, "step": run.state["step"]}
        about |= {"commit": run.about["commit"], "episodes": args.episodes, "steps": len(hidden[0])}
        rows.append(about | distances(*hidden))
        first = both[0][0], both[1][0]
        trajectories.append((rows[-1], [features(agent, [episode]) for episode in first]))
        moments = np.linspace(0, len(first[0].obs) - 1, args.moments).round().astype(int)
        actions = torch.as_tensor(np.stack(first[0].actions))[moments]
        obs = np.stack([np.stack(episode.obs)[moments] for episode in first])  # [2, K, 3, 64, 64]
        cams = [grad_cam(agent, torch.as_tensor(look), actions) for look in obs]
        maps.append((label, moments, obs, torch.stack(cams).numpy()))
    draw_trajectories(trajectories).savefig(out / "looks_trajectories.png", dpi=130)
    draw_maps(maps).savefig(out / "looks_grad_cam.png", dpi=130)
    with open(out / "looks.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['label']}: cosine distance {row['cosine']:.3f}, {row['cosine_ratio']:.2f} of that in one look")


# ---- Runs and episodes ----
def labels(runs):
    """The method of each run; with the seed, and with the step, where that is needed to tell them apart."""
    names = ["PPO + netrand" if run.args.netrand else "PPO" for run in runs]
    seeds = [f"seed {run.args.seed}" for run in runs]
    steps = [f"step {run.state['step']}" for run in runs]
    for parts in (seeds, steps):
        names = [f"{name} {part}" if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]
    return names


def play_both(run, agent, count, steps, seed):
    """Episodes in both looks: the agent sees the seen one, and both get its actions. -> two lists of Episode."""
    seen, unseen = play(run, agent, "train", count, steps, seed, beside="full_look")
    for one, other in zip(seen, unseen, strict=True):
        for t, reward in enumerate(one.rewards):
            last = t + 1 == len(one.rewards)
            if t >= len(other.rewards) or other.rewards[t] != reward or (last and other.ended != one.ended):
                common.fail(f"{run.args.env_id}: the two looks part at step {t + 1}, they are not the same game here")
    return seen, unseen


def features(agent, episodes):
    """The encoder's output for all that was seen, one episode after the other. -> [M, 256]."""
    frames = []
    for episode in episodes:
        frames += episode.obs
    return encode(agent, torch.as_tensor(np.stack(frames)))


# ---- The two analyses ----
def distances(h_seen, h_unseen):
    """Mean distance of aligned steps, and its ratio to the mean over all pairs of different steps of the same look.

    [M, D], [M, D] -> dict. Both of the cosine, 1 - cos, and of the Euclidean distance.
    """
    hidden, found = torch.stack([h_seen, h_unseen]).double(), {}
    # The cosine distance is half the square of the Euclidean distance of unit vectors.
    for name, looks, power in (("cosine", F.normalize(hidden, dim=2), 2), ("euclidean", hidden, 1)):
        aligned = (looks[0] - looks[1]).norm(dim=1).pow(power).mean() / power
        within = torch.stack([torch.pdist(look).pow(power).mean() / power for look in looks]).mean()
        found |= {name: aligned.item(), f"{name}_ratio": (aligned / within).item()}
    return found


def project(*hidden):
    """PCA of some [M, D] together: each on the two main components. -> list of [M, 2], their shares of variance [2]."""
    together = torch.cat(hidden).double().numpy()
    mean = together.mean(0)
    _, scales, axes = np.linalg.svd(together - mean, full_matrices=False)
    return [(h.double().numpy() - mean) @ axes[:2].T for h in hidden], scales[:2] ** 2 / (scales**2).sum()


def grad_cam(agent, obs, actions):
    """Where the logits of the actions come from. uint8 [B, 3, H, W], int64 [B] -> [B, H, W], each map's greatest is 1.

    Grad-CAM (Selvaraju et al. 2017) on the encoder's last convolutional block. It leaves no gradient in the agent.
    """
    outputs = []
    hook = agent.encoder[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits, _ = agent(obs)  # [B, A]
    hook.remove()
    (block,) = outputs  # [B, 32, 8, 8]
    (gradient,) = torch.autograd.grad(logits.gather(1, actions[:, None]).sum(), block)
    maps = (gradient.mean((2, 3), keepdim=True) * block.detach()).sum(1, keepdim=True).relu()  # [B, 1, 8, 8]
    maps = F.interpolate(maps, size=obs.shape[2:], mode="bilinear").squeeze(1)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)  # 0 / 0: an empty map


# ---- Pictures ----
def draw_trajectories(trajectories):
    """[(row of the table, (h_seen, h_unseen) [T, 256])], a panel each -> figure."""
    figure, axes = plt.subplots(1, len(trajectories), figsize=(5 * len(trajectories), 5.4), squeeze=False)
    figure.set_layout_engine("constrained")
    figure.suptitle("Features of the same episode in two looks (grey: the same step)", fontsize=11)
    for axis, (row, hidden) in zip(axes[0], trajectories, strict=True):
        points, shares = project(*hidden)
        axis.plot(*np.stack(points).transpose(2, 0, 1), color="0.8", linewidth=0.7)
        for look, (name, colour) in zip(points, LOOKS.values(), strict=True):
            axis.plot(*look.T, ".-", color=colour, linewidth=1.2, markersize=4, label=name)
        starts = np.stack([look[0] for look in points]).T
        axis.plot(*starts, "o", markerfacecolor="none", markeredgecolor="black", markersize=9, label="first step")
        ratio = f"{row['cosine_ratio']:.2f} x that between steps of one look"
        axis.set_title(f"{row['label']}\ncosine distance {row['cosine']:.3f}, {ratio}", fontsize=10)
        axis.set(xlabel=f"component 1 ({shares[0]:.0%} of variance)", ylabel=f"component 2 ({shares[1]:.0%})")
        axis.set_aspect("equal", "datalim")
        axis.legend(frameon=False, fontsize=9)
    return figure


def draw_maps(maps):
    """[(label, moments [K], obs [2, K, 3, 64, 64], maps [2, K, 64, 64])], two rows each -> figure."""
    columns = len(maps[0][1])
    figure, axes = plt.subplots(2 * len(maps), columns, figsize=(2 * columns + 0.5, 4.3 * len(maps)), squeeze=False)
    figure.set_layout_engine("constrained")
    figure.suptitle("Where the logit of the action comes from (red: most, uncoloured: nothing)", fontsize=11)
    for n, (label, moments, obs, cams) in enumerate(maps):
        for row, look, cam, (name, _) in zip(axes[2 * n :], obs, cams, LOOKS.values(), strict=False):
            row[0].set_ylabel(f"{label}\n{name}")
            for axis, moment, image, heat in zip(row, moments, look, cam, strict=True):
                axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
                axis.imshow(heat, cmap="autumn_r", alpha=0.8 * heat, vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[], title=f"step {moment}" if name == "seen look" else "")
    return figure


if __name__ == "__main__":
    main()
