"""What an agent of ppo_netrand.py makes of a look that it never saw: its features, and where on the picture it looks.

Paper: Lee et al. 2020, Network Randomization, Figures 3 (trajectories in the hidden space) and 4 (Grad-CAM). The agent
plays training levels in the one look of --plain-look, and its actions are sent to the same levels in the full look.
What it sees then differs in the style alone, step by step; it is judged with the clean policy, in fp32 on the CPU.

    python benchmark/looks.py runs/<PPO> runs/<PPO + netrand> --out looks

looks_trajectories.png: features of one episode, on their two main components. looks_grad_cam.png: where the logit of
the action comes from. looks.csv: distance of the two looks' features over all episodes, a row a checkpoint; a ratio is
the distance divided by the mean one between steps of the same look, 0 where the look does not matter.
"""

import csv
import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro

matplotlib.use("Agg")  # draws into files, without a display
SCRIPT = Path(__file__).parent.parent / "algos" / "ppo_netrand.py"
spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

LOOKS = {"train": ("seen look", "#0072B2"), "full_look": ("unseen look", "#D55E00")}  # of each split: name, colour


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[list[str]]  # run folders or checkpoints of ppo_netrand.py --plain-look
    out: str  # folder, which exists, for the two pictures and the table
    episodes: int = 8  # episodes that the distances are means over; the pictures show the first one
    steps: int = 200  # the longest episode; what is still under way is cut
    seed: int = 0  # draws the levels and the actions
    moments: int = 6  # of the first episode, columns of the Grad-CAM picture


def main():
    args = tyro.cli(Args)
    if min(args.episodes, args.moments) < 1 or args.steps < 2 or args.seed < 0:
        script.fail("--episodes --moments: at least 1; --steps: at least 2; --seed: at least 0")
    out = Path(args.out)
    if not out.is_dir():
        script.fail(f"--out {out}: a folder that exists")
    states = [load(path) for path in args.checkpoints]
    rows, trajectories, maps = [], [], []
    for path, label, state in zip(args.checkpoints, labels(states), states, strict=True):
        run_args = dataclasses.replace(state["args"], num_envs=args.episodes, seed=args.seed)
        agent = script.load_agent(run_args, state).eval()
        obs, actions, lengths = play(agent, run_args, args.steps)
        hidden = [features(agent, look, lengths) for look in obs]  # [M, 256] each, M steps of all episodes
        rows.append(describe(path, label, state, lengths) | distances(*hidden))
        trajectories.append((rows[-1], [features(agent, look[:, :1], lengths[:1]) for look in obs]))
        moments = np.linspace(0, lengths[0] - 1, args.moments).round().astype(int)
        cams = [grad_cam(agent, torch.as_tensor(look[moments, 0]), actions[moments, 0]) for look in obs]
        maps.append((label, moments, obs[:, moments, 0], torch.stack(cams).numpy()))
    draw_trajectories(trajectories).savefig(out / "looks_trajectories.png", dpi=130)
    draw_maps(maps).savefig(out / "looks_grad_cam.png", dpi=130)
    with open(out / "looks.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['label']}: cosine distance {row['cosine']:.3f}, {row['cosine_ratio']:.2f} of that in one look")


# ---- Checkpoints and episodes ----
def load(path):
    """A checkpoint, whose "args" become the script's Args, on the CPU in fp32; one without --plain-look is refused."""
    state = script.load_checkpoint(path)
    try:
        args = script.Args(**state["args"] | {"cuda": False, "cuda_required": False, "precision": "fp32"})
    except TypeError as error:
        script.fail(f"{path} is of another version of ppo_netrand.py: {error}")
    if not args.plain_look:
        script.fail(f"{path}: was trained without --plain-look, so there is no look that it never saw")
    return state | {"args": args}


def labels(states):
    """The method of each checkpoint; with seed, and with step, where that is needed to tell them apart."""
    names = ["PPO + netrand" if state["args"].netrand else "PPO" for state in states]
    seeds, steps = [f"seed {state['args'].seed}" for state in states], [f"step {state['step']}" for state in states]
    for parts in (seeds, steps):
        names = [f"{name} {part}" if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]
    return names


def play(agent, args, steps, make_envs=script.make_envs):
    """One episode an environment in both looks: the agent sees the seen one, and both get its actions.

    -> obs uint8 [2, T, N, 3, 64, 64], seen and unseen; actions int64 [T, N]; lengths [N], steps of each first episode.
    """
    looks = [make_envs(args, split) for split in LOOKS]
    noise_rng, num_actions = torch.Generator().manual_seed(args.seed), int(looks[0].single_action_space.n)
    obs, kept, chosen = [envs.reset()[0] for envs in looks], [], []
    lengths, ended = np.zeros(args.num_envs, dtype=int), np.zeros(args.num_envs, dtype=bool)
    while len(kept) < steps and not ended.all():
        kept.append(np.stack(obs))
        noise = torch.empty(args.num_envs, num_actions).exponential_(generator=noise_rng)
        actions, _, _ = script.act(agent, torch.as_tensor(obs[0]), noise)
        chosen.append(actions)
        lengths += ~ended
        seen, unseen = (envs.step(actions.numpy()) for envs in looks)
        if any((a != b)[~ended].any() for a, b in zip(seen[1:4], unseen[1:4], strict=True)):
            script.fail(f"{args.env_id}: the two looks part at step {len(kept)}, they are not the same game here")
        obs, ended = [seen[0], unseen[0]], ended | seen[2] | seen[3]
    for envs in looks:
        envs.close()
    return np.stack(kept, axis=1), torch.stack(chosen), lengths


@torch.no_grad()
def features(agent, obs, lengths):
    """Features of what was seen, without what followed the episodes. [T, N, 3, 64, 64], [N] -> [M, 256]."""
    steps = np.concatenate([obs[:length, n] for n, length in enumerate(lengths)])  # one episode after the other
    return torch.cat([agent.features(part) for part in torch.as_tensor(steps).split(256)])


def describe(path, label, state, lengths):
    """Where a row of the table comes from. The commit is its run folder's, if that is there."""
    about = script.checkpoint_path(path).parent / "args.json"
    commit = json.loads(about.read_text())["commit"] if about.is_file() else ""
    args = state["args"]
    source = {"label": label, "env_id": args.env_id, "seed": args.seed, "step": state["step"], "commit": commit}
    return source | {"episodes": len(lengths), "steps": int(lengths.sum())}


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
