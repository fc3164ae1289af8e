"""What an agent of ppo_netrand.py makes of a look that it never saw: its features, and where on the
picture it looks.

Paper: Lee et al. 2020, Network Randomization, Figures 3 (trajectories in the hidden space) and 4
(Grad-CAM). The agent plays training levels in the look of --plain-look. The same levels in the full
look get the same actions, so what it would see there differs in the style alone, step by step. Its
clean policy is measured, in fp32 on the CPU.

    python benchmark/analyses/looks.py runs/<PPO> runs/<PPO + netrand> --out looks

looks_trajectories.png: features of one episode, on their two main components. looks_grad_cam.png:
where the logit of the action comes from. looks.csv: the distance between the features of the two
looks over all episodes, one row per run. A ratio is that distance divided by the mean one between
steps of the same look; 0 means that the look does not matter.
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
from evaluate import load_runs
from record import frames_of, play
from tsne import encode

matplotlib.use("Agg")  # draws into files, without a display
LOOKS = {"seen look": common.COLOURS[0], "unseen look": common.COLOURS[1]}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # run folders of ppo_netrand.py --plain-look, or of copies
    out: str  # folder, which exists, for the two pictures and the table
    episodes: int = 8  # the distances are means over them; the pictures show the first one
    steps: int = 200  # the longest episode; one that goes on is cut
    seed: int = 0  # draws the levels and the actions
    moments: int = 6  # of the first episode, columns of the Grad-CAM picture


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.episodes, args.moments) < 1 or args.steps < 2 or args.seed < 0:
        common.fail("--episodes --moments: at least 1; --steps: at least 2; --seed: at least 0")
    out = Path(args.out)
    for name in ("looks.csv", "looks_trajectories.png", "looks_grad_cam.png"):
        common.check_out(out / name, Path(name).suffix)
    runs = load_runs(args.runs)
    for run in runs:
        if not vars(run.args).get("plain_look"):
            common.fail(f"{run.folder}: was trained without --plain-look, and saw all looks")
    rows, trajectories, maps = [], [], []
    for run, label in zip(runs, labels(runs), strict=True):
        agent = run.agents()[0]
        both = play_both(run, agent, args.episodes, args.steps, args.seed)
        row = {"label": label, "env_id": run.args.env_id, "seed": run.args.seed}
        row |= {"step": run.state["step"], "commit": run.about["commit"], "episodes": args.episodes}
        hidden, first, obs, cams = [], [], [], []  # of the seen look and of the unseen one
        length = len(both[0][0].obs)  # of the first episode
        moments = np.linspace(0, length - 1, args.moments).round().astype(int)
        actions = torch.as_tensor(np.stack(both[0][0].actions))[moments]
        for episodes in both:
            hidden.append(encode(agent, frames_of(episodes)))  # [M, 256], M steps of all episodes
            first.append(hidden[-1][:length])
            obs.append(frames_of(episodes[:1])[moments])  # [K, 3, 64, 64]
            cams.append(grad_cam(agent, obs[-1], actions))  # [K, 64, 64]
        rows.append(row | {"steps": len(hidden[0])} | distances(*hidden))
        trajectories.append((rows[-1], first))
        maps.append((label, moments, torch.stack(obs).numpy(), torch.stack(cams).numpy()))
    draw_trajectories(trajectories).savefig(out / "looks_trajectories.png", dpi=130)
    draw_maps(maps).savefig(out / "looks_grad_cam.png", dpi=130)
    with open(out / "looks.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        ratio = f"{row['cosine_ratio']:.2f} of that in one look"
        print(f"{row['label']}: cosine distance {row['cosine']:.3f}, {ratio}")


# ---- Runs and episodes ----
def labels(runs):
    """The method of each run; with the seed, and the step, where that is needed to tell them apart."""
    names = [run.method for run in runs]
    for key in ("seed", "step"):
        before = list(names)
        for n, run in enumerate(runs):
            if before.count(before[n]) > 1:
                value = run.args.seed if key == "seed" else run.state["step"]
                names[n] = f"{before[n]} {key} {value}"
    return names


def play_both(run, agent, count, steps, seed):
    """Episodes in both looks, with the actions of an agent that sees the first. -> two lists of Episode."""
    seen, unseen = play(run, agent, "train", count, steps, seed, beside="full_look")
    for one, other in zip(seen, unseen, strict=True):
        for t in range(len(one.rewards)):
            ends = []
            for episode in (one, other):
                ends.append(episode.ended and t == len(episode.rewards) - 1)
            if one.rewards[t] != other.rewards[t] or ends[0] != ends[1]:
                common.fail(f"{run.args.env_id}: the looks part at step {t + 1}, they are not one game")
    return seen, unseen


# ---- The two analyses ----
def distances(h_seen, h_unseen):
    """Mean distance of aligned steps, and its ratio to the mean over all pairs of steps of one look.

    [M, D], [M, D] -> dict. Both of the cosine distance, 1 - cos, and of the Euclidean one.
    """
    hidden, found = torch.stack([h_seen, h_unseen]).double(), {}
    # The cosine distance is half the square of the Euclidean distance of unit vectors.
    for name, looks, power in (("cosine", F.normalize(hidden, dim=2), 2), ("euclidean", hidden, 1)):
        aligned = (looks[0] - looks[1]).norm(dim=1).pow(power).mean() / power
        pairs = torch.stack([torch.pdist(look) for look in looks])
        within = pairs.pow(power).mean() / power
        found |= {name: aligned.item(), f"{name}_ratio": (aligned / within).item()}
    return found


def project(*hidden):
    """PCA of some [M, D] together. -> list of [M, 2] on the two main components, their shares of variance [2]."""
    together = torch.cat(hidden).double().numpy()
    mean = together.mean(0)
    _, scales, axes = np.linalg.svd(together - mean, full_matrices=False)
    points = [(part.double().numpy() - mean) @ axes[:2].T for part in hidden]
    return points, scales[:2] ** 2 / (scales**2).sum()


def grad_cam(agent, obs, actions):
    """Where the logits of the actions come from. uint8 [B, 3, H, W], int64 [B] -> [B, H, W].

    Grad-CAM (Selvaraju et al. 2017) on the encoder's last convolutional block. Each map's highest value
    is 1. It leaves no gradient in the agent.
    """
    outputs = []
    hook = agent.encoder[2].register_forward_hook(lambda _, __, output: outputs.append(output))
    logits, _ = agent(obs)  # [B, A]
    hook.remove()
    (block,) = outputs  # [B, 32, 8, 8]
    (gradient,) = torch.autograd.grad(logits.gather(1, actions[:, None]).sum(), block)
    weights = gradient.mean((2, 3), keepdim=True)  # [B, 32, 1, 1]
    maps = (weights * block.detach()).sum(1, keepdim=True).relu()  # [B, 1, 8, 8]
    maps = F.interpolate(maps, size=obs.shape[2:], mode="bilinear").squeeze(1)
    highest = maps.amax((1, 2), keepdim=True)
    return maps / highest.clamp(min=torch.finfo(maps.dtype).tiny)  # an empty map stays empty


# ---- Pictures ----
def draw_trajectories(trajectories):
    """[(row of the table, (h_seen, h_unseen) [T, 256])], a panel each -> figure."""
    panels = len(trajectories)
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 5.4), squeeze=False)
    figure.set_layout_engine("constrained")
    figure.suptitle("Features of the same episode in two looks (grey: the same step)", fontsize=11)
    for axis, (row, hidden) in zip(axes[0], trajectories, strict=True):
        points, shares = project(*hidden)
        axis.plot(*np.stack(points).transpose(2, 0, 1), color="0.8", linewidth=0.7)
        for look, (name, colour) in zip(points, LOOKS.items(), strict=True):
            axis.plot(*look.T, ".-", color=colour, linewidth=1.2, markersize=4, label=name)
        starts = np.stack(points)[:, 0].T
        axis.plot(*starts, "o", color="black", fillstyle="none", markersize=9, label="first step")
        ratio = f"{row['cosine_ratio']:.2f} x that between steps of one look"
        axis.set_title(f"{row['label']}\ncosine distance {row['cosine']:.3f}, {ratio}", fontsize=10)
        axis.set_xlabel(f"component 1 ({shares[0]:.0%} of variance)")
        axis.set_ylabel(f"component 2 ({shares[1]:.0%})")
        axis.set_aspect("equal", "datalim")
        axis.locator_params(nbins=6)  # or the numbers overlap
        axis.legend(frameon=False, fontsize=9)
    return figure


def draw_maps(maps):
    """[(label, moments [K], obs [2, K, 3, 64, 64], maps [2, K, 64, 64])], two rows each -> figure."""
    columns = len(maps[0][1])
    size = 2 * columns + 0.5, 4.3 * len(maps)
    figure, axes = plt.subplots(2 * len(maps), columns, figsize=size, squeeze=False)
    figure.set_layout_engine("constrained")
    title = "Where the logit of the action comes from (red: most, uncoloured: nothing)"
    figure.suptitle(title, fontsize=11)
    for n, (label, moments, obs, cams) in enumerate(maps):
        for row, look, cam, name in zip(axes[2 * n :], obs, cams, LOOKS, strict=False):
            row[0].set_ylabel(f"{label}\n{name}")
            for axis, image, heat in zip(row, look, cam, strict=True):
                axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
                axis.imshow(heat, cmap="autumn_r", alpha=0.8 * heat, vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
        for axis, moment in zip(axes[2 * n], moments, strict=True):
            axis.set_title(f"step {moment}")
    return figure


if __name__ == "__main__":
    main()
