"""Draws return against steps from CSVs of collect.py, a row a task: evaluations, those in DMC-GB's looks, training.

Each seed is thin, their mean, as far as all of them go, bold.

    python benchmark/plot_curves.py benchmark/results/<experiment>.csv --out curves.png --floor untrained
"""

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import tyro

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for the colour-blind
COLUMNS = {  # a panel's title, and the line of each key in it
    "evaluations": {
        "eval/test_return": ("o-", "test"),
        "eval/train_return": ("s--", "train"),
        "eval/full_look_return": ("^:", "train, unseen look"),
    },
    "looks it was not trained in": {
        "eval/color_easy_return": ("s-", "color_easy"),
        "eval/color_hard_return": ("s--", "color_hard"),
        "eval/video_easy_return": ("^-", "video_easy"),
        "eval/video_hard_return": ("^:", "video_hard"),
    },
    "while learning": {"charts/episodic_return": ("-", "training")},
}


@dataclass
class Args:
    results: tyro.conf.Positional[list[str]]  # CSV files of collect.py
    out: str  # .png or .svg
    floor: str | None = None  # a method of the CSV to draw as a level line, such as an untrained policy


def main():
    args = tyro.cli(Args)
    try:
        data = pd.concat([pd.read_csv(path) for path in args.results])
    except (OSError, ValueError) as error:
        fail(error)
    methods = [method for method in data["method"].unique() if method != args.floor]
    if len(methods) > len(COLOURS):
        fail(f"{len(methods)} methods, and colours for {len(COLOURS)}: draw some of them")
    colours, tasks = dict(zip(methods, COLOURS, strict=False)), sorted(data["task"].unique())
    columns = {title: lines for title, lines in COLUMNS.items() if data["key"].isin(lines).any()}
    size = 6 * len(columns), 0.6 + 4.8 * len(tasks)
    figure, axes = plt.subplots(
        len(tasks), len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for row, task in zip(axes, tasks, strict=True):
        for axis, (title, lines) in zip(row, columns.items(), strict=True):
            draw(axis, data[data["task"] == task], lines, colours, args.floor)
            axis.set_title(f"{task}, {title}")
        row[0].set_ylabel("return of an episode")
    figure.savefig(args.out, dpi=130)
    print(args.out)


def draw(axis, data, lines, colours, floor):
    """One panel: {key: (line style, what it is)} for each method of {method: colour}."""
    for method, colour in colours.items():
        for key, (line, levels) in lines.items():
            runs = data[(data["method"] == method) & (data["key"] == key)]
            seeds = runs.pivot_table(index="step", columns="seed", values="value")
            seeds = seeds.interpolate("index", limit_area="inside")  # seeds that were not logged at the same steps
            if seeds.empty:
                continue
            if seeds.shape[1] > 1:
                axis.plot(seeds, line, color=colour, linewidth=0.8, markersize=2, alpha=0.4)
            label = f"{method}, {levels} ({seeds.shape[1]} seed{'s' * (seeds.shape[1] > 1)})"
            axis.plot(seeds.dropna().mean(axis=1), line, color=colour, linewidth=2, markersize=5, label=label)
    level = data[(data["method"] == floor) & (data["key"] == "eval/test_return")]
    if len(level):
        axis.axhline(level["value"].mean(), linestyle="-.", color="black", label=f"{floor}, test")
    axis.set_xlabel("steps of each agent")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.has_data():
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize=9
        )  # below: crossed by none


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
