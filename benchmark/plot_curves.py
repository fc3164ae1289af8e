"""Draws return against steps from a CSV of collect.py: each seed thin, their mean bold.

python benchmark/plot_curves.py benchmark/results/<experiment>.csv --out curves.png
"""

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import tyro

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for the colour-blind


@dataclass
class Args:
    results: tyro.conf.Positional[str]  # CSV of collect.py
    out: str  # .png or .svg
    floor: str | None = None  # a method of the CSV to draw as a level line, such as an untrained policy


def main():
    args = tyro.cli(Args)
    try:
        data = pd.read_csv(args.results)
    except (OSError, ValueError) as error:
        print(f"error: {args.results}: {error}", file=sys.stderr)
        sys.exit(2)
    tasks = sorted(data["task"].unique())
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 5 * len(tasks), 3.8), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        draw(axis, data[data["task"] == task], args.floor)
        axis.set_title(task)
    axes[0, 0].set_ylabel("return of an episode")
    axes[0, -1].legend(frameon=False, fontsize=9)
    figure.savefig(args.out, dpi=160)
    print(args.out)


def draw(axis, data, floor):
    """One task: each method's return in evaluations on unseen and on training levels, and while it learned."""
    methods = [method for method in data["method"].unique() if method != floor]
    lines = {"eval/test_return": ("o-", "unseen levels"), "eval/train_return": ("s--", "training levels")}
    lines |= {"charts/episodic_return": (":", "while learning")}
    for colour, method in zip(COLOURS, methods, strict=False):
        for key, (line, levels) in lines.items():
            runs = data[(data["method"] == method) & (data["key"] == key)]
            seeds = runs.pivot_table(index="step", columns="seed", values="value")
            if seeds.shape[1] > 1:
                axis.plot(seeds, line, color=colour, linewidth=0.8, markersize=2, alpha=0.4)
            label = f"{method}, {levels} ({seeds.shape[1]} seed{'s' * (seeds.shape[1] > 1)})"
            axis.plot(seeds.mean(axis=1), line, color=colour, linewidth=2, markersize=5, label=label)
    level = data[(data["method"] == floor) & (data["key"] == "eval/test_return")]
    if len(level):
        axis.axhline(level["value"].mean(), linestyle="-.", color="black", label=f"{floor}, unseen levels")
    axis.set_xlabel("steps of each agent")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
