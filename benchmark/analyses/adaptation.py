"""How well a network keeps learning when its inputs or its labels change: SAM, resets and others on
32x32 images.

input: a hundred times, 500 new images join the training set. label: a hundred times, the classes
get new names at random, the same name for all images of a class. Then nothing changes any more.
Evaluations are on held-out images.

Paper: Lee et al. 2023 (PLASTIC), section 4, figure 2 and appendix 7.2, with SGD. SAM is the code of
sac_sam_reset.py. Checked against github.com/dojeon-ai/PLASTIC (3736071), synthetic/, for what the
paper leaves out. Deviations from it: batches are drawn with replacement, not in epochs. Layer
normalisation is over a pixel's channels, not over the whole map, and in all layers. CReLU is in all
layers too and keeps their widths.

    python benchmark/analyses/adaptation.py --out adaptation.csv --plot adaptation.png      # the paper: CIFAR-10
    python benchmark/analyses/adaptation.py --out short.csv --scale short --data synthetic  # half an hour on a CPU
    python benchmark/analyses/adaptation.py --out one.csv --tasks label --methods base layer_norm+crelu+sam+reset
    python benchmark/analyses/adaptation.py --out authors.csv --strides 3 1 1 --updates 500 --final-updates 0 \\
        --relabel shift --reset-every 10 --optimizers sgd                                   # the authors' code

Runs that are in --out already, made with the same flags, are not made again. The table and the plot
show all of them.
"""

import csv
import dataclasses
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn as nn
import torchvision
import tyro
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

PARTS = ("layer_norm", "crelu", "l2", "sam", "reset")
# What a scale sets, where no flag does. Both make 128 passes over the images, a fifth of them after the
# last change.
SCALES = {
    "paper": {
        "changes": 100,
        "updates": 400,
        "final_updates": 10_000,
        "chunk_images": 500,
        "test_images": 10_000,
    },
    "short": {
        "changes": 8,
        "updates": 80,
        "final_updates": 160,
        "chunk_images": 100,
        "test_images": 1_000,
    },
}
# (learning rate, weight decay). The paper does not say them. SGD's: reference code; the others: ours.
RATES = {
    ("paper", "input", "sgd"): (0.001, 0.0),
    ("paper", "label", "sgd"): (0.01, 0.001),
    ("paper", "input", "adam"): (0.001, 0.0),
    ("paper", "label", "adam"): (0.001, 0.0),
    ("short", "input", "sgd"): (0.03, 0.0),
    ("short", "label", "sgd"): (0.03, 0.001),
    ("short", "input", "adam"): (0.001, 0.0),
    ("short", "label", "adam"): (0.001, 0.0),
}
COLUMNS = ("task", "data", "method", "optimizer", "seed", "update", "key", "value")
COLUMNS += ("command", "commit", "packages", "hardware")
NAMES = {"sgd": "SGD", "adam": "Adam"}
MEASURES = {
    "final_test_accuracy": "final test accuracy",
    "mean_test_accuracy": "mean over changes",
    "train_accuracy": "final train accuracy",
    "active_backbone": "active units, convolutions",
    "active_head": "active units, head",
}  # of the table
script = common.load_script(common.ROOT / "algos" / "sac_sam_reset.py")


@dataclass
class Args:
    out: str  # CSV file that runs are added to
    plot: str | None = None  # .png or .svg: test accuracy against updates
    tasks: tuple[Literal["input", "label"], ...] = ("input", "label")  # what changes
    methods: tuple[str, ...] = ("base", *PARTS, "sam+reset")  # base, or parts joined by +
    optimizers: tuple[Literal["sgd", "adam"], ...] = ("sgd", "adam")  # SGD has a momentum of 0.9
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run each; draws images, labels, batches, weights
    data: Literal["cifar10", "synthetic"] = "cifar10"  # synthetic too if CIFAR-10 cannot be downloaded
    data_dir: str = "data"  # where CIFAR-10 is, or is downloaded to
    cuda: bool = True  # use a GPU if there is one

    scale: Literal["paper", "short"] = "paper"  # sets the next five; short: 800 updates, for a CPU
    changes: int | None = None  # how often inputs or labels change
    updates: int | None = None  # between changes, and between evaluations
    final_updates: int | None = None  # after the last change's own
    chunk_images: int | None = None  # images that a change of inputs adds; label: all from the start
    test_images: int | None = None  # images of an evaluation; train_accuracy is of at most as many
    batch_size: int = 128  # images per update
    strides: tuple[int, int, int] = (3, 3, 1)  # of the convolutions
    relabel: Literal["random", "shift"] = "random"  # label: permuted classes, or each class plus one
    learning_rate: float | None = None  # (default: the task's and optimizer's)
    weight_decay: float | None = None  # part of the gradient (default: the task's and optimizer's)
    l2: float = 1e-3  # l2: more weight decay
    sam_rho: float = 0.1  # sam: length of the step to the worst point nearby
    reset_every: int = 1  # reset: changes between resets of the fully connected layers, from change 2 on


def main():
    args = definite(tyro.cli(Args, description=__doc__))
    finished = finished_runs(args.out)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    data = load_data(args)
    args = dataclasses.replace(args, data=data.name)
    data = Data(data.name, *(value.to(device) for value in data[1:]))
    commands = {}
    for seed, task, optimizer, method in itertools.product(args.seeds, args.tasks, args.optimizers, args.methods):
        commands[command_of(args, task, method, optimizer, seed)] = task, method, optimizer, seed
    print(f"{data.name} data, {args.scale} scale: {len(commands)} runs, {len(finished & set(commands))} made before")
    about = about_this_machine(args, device)
    for command, (task, *rest) in commands.items():
        if command not in finished:
            start = time.monotonic()
            rows = train(data, args, task, *rest)
            append(args.out, [(task, data.name, *rest, *row, command, *about) for row in rows])
            print(task, data.name, *rest, f"{rows[-1][-1]:.1%} in {time.monotonic() - start:.0f} s", flush=True)
    results = pd.read_csv(args.out)
    results = results[results["command"].isin(commands)]
    print(table(results, args))
    if args.plot:
        draw(results, args)
        print(args.plot)


def definite(args):
    """The arguments with the scale's values where they are None. Wrong ones end the program."""
    for name, value in SCALES[args.scale].items():
        if getattr(args, name) is None:
            args = dataclasses.replace(args, **{name: value})
    for method in args.methods:
        if not parts_of(method) <= set(PARTS):
            common.fail(f"--methods {method}: not base, nor some of {' '.join(PARTS)} joined by +")
    for name in ("tasks", "methods", "optimizers", "seeds"):
        if not getattr(args, name):
            common.fail(f"{flag(name)}: at least one")
    for name in ("changes", "updates", "chunk_images", "test_images", "batch_size", "reset_every"):
        if getattr(args, name) < 1:
            common.fail(f"{flag(name)} {getattr(args, name)}: at least 1")
    for name in ("final_updates", "learning_rate", "weight_decay", "l2", "sam_rho"):
        if not (getattr(args, name) or 0) >= 0:
            common.fail(f"{flag(name)} {getattr(args, name)}: at least 0")
    if min(args.strides) < 1 or side_of(args.strides) < 1:
        common.fail(f"--strides {' '.join(map(str, args.strides))}: nothing is left of the image's 32 pixels")
    too_many = args.changes * args.chunk_images > 50_000 or args.test_images > 10_000
    if args.data == "cifar10" and too_many:
        common.fail("CIFAR-10 has 50,000 images for --changes x --chunk-images, 10,000 for --test-images")
    common.check_out(args.out, ".csv")
    if args.plot:
        common.check_out(args.plot, ".png", ".svg")
    return args


def parts_of(method):
    """{"sam", "reset"} from "sam+reset", nothing from "base"."""
    return set() if method == "base" else set(method.split("+"))


def flag(name):
    return "--" + name.replace("_", "-")


# ---- Images ----
class Data(NamedTuple):
    name: str  # cifar10 or synthetic
    images: torch.Tensor  # float32 [N, 3, 32, 32]
    labels: torch.Tensor  # int64 [N] in 0..9
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_data(args):
    """CIFAR-10, or the synthetic set where CIFAR-10 cannot be downloaded."""
    if args.data == "cifar10":
        try:
            return cifar10(args.data_dir, args.test_images)
        except (OSError, RuntimeError) as error:
            reason = common.first_line(error)
            print(f"CIFAR-10 cannot be downloaded ({reason}): all results are of the synthetic set instead")
    return synthetic(args.changes * args.chunk_images, args.test_images)


def cifar10(folder, num_test):
    """All training images, and the first num_test others, normalised. Errors: OSError, RuntimeError."""
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])[..., None, None]  # Reference code
    parts = []
    for train in (True, False):
        part = torchvision.datasets.CIFAR10(folder, train, download=True)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous().float()
        parts += images.div_(255).sub_(mean).div_(std), torch.tensor(part.targets)
    images, labels, test_images, test_labels = parts
    return Data("cifar10", images, labels, test_images[:num_test], test_labels[:num_test])


def synthetic(num_train, num_test, seed=0):
    """Images of CIFAR-10's shape in ten classes, of about zero mean and unit variance.

    A class is four smooth patterns. An image is one of them, moved by up to three pixels, under a random
    pattern that is as smooth, and noise. It takes many images to learn what tells the classes apart.
    """
    rng = torch.Generator().manual_seed(seed)
    patterns = smooth(10 * 4, rng).view(10, 4, 3, 32, 32)
    sets = []
    for count in (num_test, num_train):
        labels, kinds = torch.randint(10, (count,), generator=rng), torch.randint(4, (count,), generator=rng)
        rows, columns = (torch.arange(32) + torch.randint(-3, 4, (2, count, 1), generator=rng)) % 32  # [count, 32] each
        images = torch.empty(count, 3, 32, 32)
        for some in torch.arange(count).split(5_000):
            where = torch.arange(3)[:, None, None], rows[some, None, :, None], columns[some, None, None, :]
            images[some] = patterns[labels[some, None, None, None], kinds[some, None, None, None], *where]
            images[some] += smooth(len(some), rng) + torch.randn(len(some), 3, 32, 32, generator=rng)
        sets += images.div_(3**0.5), labels
    test_images, test_labels, images, labels = sets
    return Data("synthetic", images, labels, test_images, test_labels)


def smooth(count, rng):
    """Random images of about unit variance, without details. -> [count, 3, 32, 32]"""
    coarse = torch.randn(count, 3, 6, 6, generator=rng)
    images = F.interpolate(coarse, size=32, mode="bicubic")
    return images / images.std()


# ---- Network ----
class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels, of each pixel where there are some. [B, C, ...] -> the same."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class CReLU(nn.Module):
    """[B, C, ...] -> [B, 2C, ...]"""

    def forward(self, x):
        return torch.cat([x, -x], dim=1).relu()


def make_network(parts, strides):
    """Images [B, 3, 32, 32] -> logits [B, 10]. With the paper's strides 156,554 parameters. Paper: 7.2."""

    def activated(layer, width):
        norm = [ChannelNorm(width)] if "layer_norm" in parts else []
        return [layer, *norm, CReLU() if "crelu" in parts else nn.ReLU()]

    share = 2 if "crelu" in parts else 1  # CReLU doubles the channels, so the layer before it has half of them
    layers, n_in = [], 3
    for width, stride in zip((32, 64, 64), strides, strict=True):
        layers += activated(nn.Conv2d(n_in, width // share, 3, stride), width // share)
        n_in = width
    layers, n_in = [*layers, nn.Flatten()], n_in * side_of(strides) ** 2
    for width in (512, 128):
        layers += activated(nn.Linear(n_in, width // share), width // share)
        n_in = width
    return nn.Sequential(*layers, nn.Linear(n_in, 10))


def side_of(strides, side=32):
    """Pixels on a side of what the convolutions make of an image."""
    for stride in strides:
        side = (side - 3) // stride + 1
    return side


def reset_head(network):
    """New weights in the fully connected layers. Reference code: not in norms; the optimizer's moments are kept."""
    for layer in network:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


# ---- Learning ----
def train(data, args, task, method, optimizer, seed):
    """One run. -> [(update, key, value)], values in 0..1; the last one is final_test_accuracy.

    Images, labels and batches have a random stream of their own, so they are the same with all methods.
    """
    torch.manual_seed(seed)
    rng, device, parts = torch.Generator().manual_seed(seed), data.images.device, parts_of(method)
    network = make_network(parts, args.strides).to(device)
    optimizer = make_optimizer(network, parts, args, task, optimizer)
    rho = args.sam_rho if "sam" in parts else 0
    order = torch.randperm(len(data.images), generator=rng)[: args.changes * args.chunk_images]
    total = args.changes * args.updates + args.final_updates
    rows, test_accuracies = [], []
    for start in range(0, total, args.updates):
        change = start // args.updates
        if change < args.changes:
            seen, classes = situation(order, args, task, change, rng)
            if "reset" in parts and change > 0 and (change - 1) % args.reset_every == 0:
                reset_head(network)
        stop = min(start + args.updates, total)
        draws = torch.randint(len(seen), (stop - start, args.batch_size), generator=rng)
        classes = classes.to(device)
        labels, test_labels = classes[data.labels], classes[data.test_labels]
        for batch in seen[draws].to(device):
            update(network, optimizer, data.images[batch], labels[batch], rho)
        sample = seen[torch.randperm(len(seen), generator=rng)[: args.test_images]].to(device)
        test_accuracies.append(accuracy(network, data.test_images, test_labels))
        rows.append((stop, "train_accuracy", accuracy(network, data.images[sample], labels[sample])))
        rows.append((stop, "test_accuracy", test_accuracies[-1]))
    for part, share in active_units(network, data.test_images).items():
        rows.append((total, f"active_{part}", share))
    mean = sum(test_accuracies[: args.changes]) / args.changes
    rows.append((total, "mean_test_accuracy", mean))
    return [*rows, (total, "final_test_accuracy", test_accuracies[-1])]


def situation(order, args, task, change, rng):
    """The training set after a change, counted from 0: indices of images, and the label of each class [10]."""
    if task == "input":
        return order[: (change + 1) * args.chunk_images], torch.arange(10)
    if args.relabel == "shift":  # Reference code
        return order, (torch.arange(10) + change) % 10
    return order, torch.randperm(10, generator=rng)


def make_optimizer(network, parts, args, task, name):
    learning_rate, weight_decay = RATES[args.scale, task, name]
    learning_rate = learning_rate if args.learning_rate is None else args.learning_rate
    weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    if "l2" in parts:
        weight_decay += args.l2
    about = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if name == "adam":
        return torch.optim.Adam(network.parameters(), **about)
    return torch.optim.SGD(network.parameters(), momentum=0.9, **about)


def update(network, optimizer, images, labels, rho):
    """One step; with rho > 0 it follows the gradient at the worst point nearby. Paper: 3.2."""

    def backward():
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    backward()
    if rho > 0:
        params = list(network.parameters())
        saved = script.sam_perturb(params, rho)
        backward()
        script.sam_restore(params, saved)
    optimizer.step()


@torch.no_grad()
def accuracy(network, images, labels):
    """Share of the images whose greatest logit is their label's."""
    logits = torch.cat([network(part) for part in images.split(1_000)])
    return (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def active_units(network, images):
    """Share of the activations above zero: of all the convolutions' units, and of all the head's."""
    active, part, x = {"backbone": [], "head": []}, "backbone", images
    for layer in network:
        x = layer(x)
        if isinstance(layer, (nn.ReLU, CReLU)):
            active[part].append((x > 0).flatten())
        part = "head" if isinstance(layer, nn.Flatten) else part
    return {part: torch.cat(layers).float().mean().item() for part, layers in active.items()}


# ---- Results ----
def command_of(args, task, method, optimizer, seed):
    """The command of one run alone, with the flags that its numbers depend on."""
    args = dataclasses.replace(args, tasks=(task,), methods=(method,), optimizers=(optimizer,), seeds=(seed,))
    words = ["python", "benchmark/analyses/adaptation.py", "--out", "<file>.csv"]
    for field in dataclasses.fields(Args):
        value = getattr(args, field.name)
        same = value == SCALES[args.scale].get(field.name, field.default)
        if not same and field.name not in ("out", "plot", "data_dir", "cuda"):
            words += [flag(field.name), *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def about_this_machine(args, device):
    """(commit, packages, hardware), as collect.py writes them for a run."""
    about = script.describe(args)
    hardware, packages = about["hardware"], about["packages"]
    named = " ".join(f"{name}=={packages[name]}" for name in ("torch", "torchvision"))
    return about["commit"], named, f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores {hardware['cpu']}"


def finished_runs(path):
    """The commands of the runs in a CSV, which is made if there is none. Any other CSV ends the program."""
    try:
        with open(path, "a+", encoding="utf-8", newline="") as file:
            if file.tell() == 0:
                csv.writer(file).writerow(COLUMNS)
            file.seek(0)
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames) != COLUMNS:
                common.fail(f"--out {path}: there already, and not a CSV of this program")
            return {row["command"] for row in reader if row["key"] == "final_test_accuracy"}
    except (OSError, ValueError) as error:
        common.fail(f"--out {path}: {error}")


def append(path, rows):
    """Adds a run's rows to a CSV, all at once, so that it holds whole runs."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def table(results, args):
    """A Markdown table for each task and optimizer: mean ± standard deviation over seeds, best method first."""
    lines = []
    for (task, optimizer), runs in results.groupby(["task", "optimizer"], sort=False):
        last = runs.sort_values("update").groupby(["method", "seed", "key"])["value"].last().unstack()
        cells = last.groupby("method").agg(["mean", "std", "count"])
        about = f"{runs['data'].iloc[0]} data, {args.scale} scale"
        lines += ["", f"{task} adaptation, {NAMES[optimizer]}, {about}", ""]
        lines += [f"| method | seeds | {' | '.join(MEASURES.values())} |", "|---" * (2 + len(MEASURES)) + "|"]
        for method, row in cells.sort_values(("final_test_accuracy", "mean"), ascending=False).iterrows():
            values = [f"{row[key, 'mean']:.1%} ± {100 * row[key, 'std']:.1f}" for key in MEASURES]
            lines.append(f"| {method} | {row['final_test_accuracy', 'count']:.0f} | {' | '.join(values)} |")
    return "\n".join(lines).replace(" ± nan", "")


def draw(results, args):
    """One row per task, one column per optimizer: each method's mean over seeds, in a band of all seeds."""
    tasks, optimizers = results["task"].unique(), results["optimizer"].unique()
    size = 5.5 * len(optimizers), 0.8 + 3.6 * len(tasks)
    figure, axes = plt.subplots(
        len(tasks), len(optimizers), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    looks = itertools.product(("-", "--", ":"), ("black", *common.COLOURS))
    looks = dict(zip(results["method"].unique(), looks, strict=False))
    for (i, task), (j, optimizer) in itertools.product(enumerate(tasks), enumerate(optimizers)):
        axis = axes[i, j]
        runs = results[(results["task"] == task) & (results["optimizer"] == optimizer)]
        for method, (line, colour) in looks.items():
            some = runs[(runs["method"] == method) & (runs["key"] == "test_accuracy")]
            seeds = 100 * some.pivot(index="update", columns="seed", values="value")
            axis.plot(seeds.mean(axis=1), line, color=colour, linewidth=2, label=method)
            axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=colour, alpha=0.12, linewidth=0)
        axis.set_title(f"{task} adaptation, {NAMES[optimizer]}")
        axis.axvspan(args.changes * args.updates, runs["update"].max(), color="0.92", zorder=0)
        axis.axhline(10, color="0.5", linestyle=":", linewidth=1, zorder=1)
        axis.set_xlim(0, runs["update"].max())
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("updates (gray: no more changes; dotted: chance)" if i == len(tasks) - 1 else "")
        axis.set_ylabel("test accuracy in %" if j == 0 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 * len(optimizers), frameon=False)
    data, seeds = results["data"].iloc[0], results["seed"].nunique()
    figure.suptitle(f"{data} data, {args.scale} scale, {seeds} seed{'s' * (seeds > 1)}: mean, lowest and highest")
    figure.savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
