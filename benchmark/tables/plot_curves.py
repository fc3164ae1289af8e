"""Draws return against steps from CSVs of collect.py, a row a task: evaluations, those in DMC-GB's looks, training.

Each seed is thin, their mean, as far as all of them go, bold, in a band of their standard deviation. Level lines are
what papers printed of the same task.

    python benchmark/plot_curves.py benchmark/results/<experiment>.csv --out curves.png --floor untrained
"""

import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import papers
import tyro
from papers import fail

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
LEVELS = ("#000000", "#777777")  # of what papers printed
DASHES = ((0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARK = 50_000_000  # of what was printed after several numbers of steps, what is drawn


@dataclass
class Args:
    results: tyro.conf.Positional[list[str]]  # CSV files of collect.py
    out: str  # .png or .svg
    floor: str | None = None  # a method of the CSV to draw as a level line, such as an untrained policy
    published: tuple[str, ...] = ()  # files of benchmark/published/ without .csv (default: all; none: no level lines)


def main():
    args = tyro.cli(Args)
    try:
        levels = printed(args.published)
        save(draw_all(papers.load(args.results), args.floor, levels), args.out)
    except (OSError, ValueError) as error:
        fail(error)
    print(args.out)


def printed(files=()):
    """What papers printed of single tasks, papers.per_task, of these files of published/ or of all."""
    rows = papers.per_task()
    if unknown := set(files) - set(rows["origin"]) - {"none"}:
        raise ValueError(f"--published {' '.join(unknown)}: there are {' '.join(rows['origin'].unique())} none")
    rows = rows[rows["mark"].isin((0, MARK))]
    return rows[rows["origin"].isin(files)] if files else rows


def draw_all(data, floor=None, printed=None):
    """The figure of papers.load's rows, with level lines of papers.per_task's."""
    methods = [method for method in data["method"].unique() if method != floor]
    scale = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(methods)))  # for more methods than COLOURS
    colours = dict(zip(methods, COLOURS if len(methods) <= len(COLOURS) else scale, strict=False))
    tasks = sorted(data["task"].unique())
    columns = {title: lines for title, lines in COLUMNS.items() if data["key"].isin(lines).any()}
    if not columns:
        raise ValueError("no return of an episode in these CSVs")
    figure, axes = plt.subplots(len(tasks), len(columns), squeeze=False, sharey="row", layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        rows = data[data["task"] == task]
        for axis, (title, lines) in zip(row, columns.items(), strict=True):
            draw(axis, rows, lines, colours, floor, levels_of(rows, lines, printed))
            axis.set_title(f"{task}, {title}")
        row[0].set_ylabel("return of an episode")
    labels = [axis.get_legend_handles_labels()[1] for axis in axes.flat]
    rows = max(-(-len(texts) // legend_columns(texts)) for texts in labels)
    figure.set_size_inches(6 * len(columns), (4 + 0.18 * rows) * len(tasks))
    return figure


def levels_of(rows, lines, printed):
    """{label: value} of what was printed of these rows' task in a panel."""
    if printed is None:
        return {}
    task, suite = papers.plain(rows["task"].iloc[0]), rows["suite"].iloc[0]
    level = printed[(printed["task"] == task) & (printed["suite"] == suite) & printed["key"].isin(lines)]
    steps = level["steps_or_frames"].str.extract(r"^(\d+)(?: env)?(.*)")
    after = [f", {int(n):,}{unit or ' steps'}" if n == n else "" for n, unit in steps.to_numpy()]
    labels = level["method"] + ", " + level["key"].map(lambda key: lines[key][1]) + after
    return dict(zip(labels, level["value"].astype(float), strict=True))


def draw(axis, data, lines, colours, floor, levels=None):
    """One panel: {key: (line style, what it is)} for each method of {method: colour}, and levels {label: return}."""
    for method, colour in colours.items():
        for key, (line, what) in lines.items():
            runs = data[(data["method"] == method) & (data["key"] == key)]
            seeds = runs.pivot_table(index="step", columns="seed", values="value")
            seeds = seeds.interpolate("index", limit_area="inside")  # seeds that were not logged at the same steps
            if seeds.empty:
                continue
            mean, spread = seeds.dropna().mean(axis=1), seeds.dropna().std(axis=1)
            if seeds.shape[1] > 1:
                axis.plot(seeds, line.strip("os^"), color=colour, linewidth=0.8, alpha=0.5)
                axis.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
            label = f"{method}, {what} ({seeds.shape[1]} seed{'s' * (seeds.shape[1] > 1)})"
            axis.plot(mean, line, color=colour, linewidth=2, markersize=5, label=label)
    keys = [key for key in ("eval/test_return", "charts/episodic_return") if key in set(data["key"])]
    level = data[(data["method"] == floor) & data["key"].isin(keys[:1])]
    if len(level):
        axis.axhline(level["value"].mean(), linestyle="-.", color="black", label=f"{floor}, test")
    draw_levels(axis, levels or {})
    axis.set_xlabel("steps of each agent")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    labels = axis.get_legend_handles_labels()[1]
    if labels:  # a legend below is crossed by no line
        about = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "frameon": False, "fontsize": 8.5}
        axis.legend(**about, ncols=legend_columns(labels))


def legend_columns(labels):
    return 2 if len(labels) > 6 and max(map(len, labels)) < 40 else 1


def draw_levels(axis, levels):
    """Level lines, without making the panel more than half as high again: what is above is in the legend alone."""
    low, high = axis.get_ylim()
    top = high + (high - low) / 2
    for n, (label, value) in enumerate(levels.items()):
        style = {"color": LEVELS[n // len(DASHES) % len(LEVELS)], "linestyle": DASHES[n % len(DASHES)], "linewidth": 1}
        if value <= top:
            axis.axhline(value, label=f"published {label}: {value:.4g}", **style)
        else:
            axis.plot([], [], " ", marker="$\\uparrow$", color="black", label=f"above, published {label}: {value:.4g}")


def save(figure, path):
    """Writes a .png or .svg, the same bytes each time. Errors: OSError, ValueError."""
    if not path.endswith((".png", ".svg")):
        raise ValueError(f"--out {path}: .png or .svg")
    style = {"svg.hashsalt": "holdout", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
    with matplotlib.rc_context(style):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.endswith(".svg") else None)
    if path.endswith(".svg"):  # half as large: tenths of a pixel, no names of groups, no indentation
        text = re.sub(r"(\d\.\d)\d+", r"\1", Path(path).read_text())
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        Path(path).write_text(re.sub(r"\s*\n\s*", " ", text).replace("> <", "><") + "\n")


if __name__ == "__main__":
    main()
