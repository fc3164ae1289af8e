"""Draws return against steps from CSVs of collect.py, one row per task: evaluations, DMC-GB's looks, training.

Each seed is a thin line. Their mean, as far as all of them go, is bold, in a band of their standard deviation. Level
lines are what papers printed of the same task.

    python benchmark/tables/plot_curves.py benchmark/results/<experiment>.csv --out curves.png --floor untrained
    python benchmark/tables/plot_curves.py benchmark/results/<experiment>.csv --out active.png \
        --keys charts/active_backbone charts/active_head  # the share of active units, over training
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import papers
from common import COLOURS, KEYS, check_out, fail, plain

PANELS = {  # {title: {key: line}}
    "evaluations": {
        "eval/test_return": "o-",
        "eval/train_return": "s--",
        "eval/full_look_return": "^:",
    },
    "looks it was not trained in": {
        "eval/color_easy_return": "s-",
        "eval/color_hard_return": "s--",
        "eval/video_easy_return": "^-",
        "eval/video_hard_return": "^:",
    },
    "while learning": {"charts/episodic_return": "-"},
}
DASHES = ((0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # of what papers printed, black first, then gray
MARK = 50_000_000  # of what was printed after several numbers of steps, what is drawn


@dataclass
class Args:
    results: tyro.conf.Positional[list[str]]  # CSV files of collect.py
    out: str  # .png or .svg
    keys: tuple[str, ...] = ()  # what to draw instead of returns: keys of the CSV, a panel for each
    floor: str | None = None  # a method of the CSV to draw as a level line, such as an untrained policy
    published: tuple[str, ...] = ()  # files of benchmark/published/ without .csv (default: all; none: no level lines)


def main():
    args = tyro.cli(Args)
    check_out(args.out, ".png", ".svg")
    try:
        printed = published(args.published)
        save(draw_all(papers.load(args.results), args.floor, printed, args.keys), args.out)
    except (OSError, ValueError) as error:
        fail(error)
    print(args.out)


def published(files=()):
    """What papers printed of single tasks (papers.per_task), of these files of published/ or of all."""
    rows = papers.per_task()
    unknown = set(files) - set(rows["origin"]) - {"none"}
    if unknown:
        raise ValueError(f"--published {' '.join(unknown)}: there are {' '.join(rows['origin'].unique())} none")
    rows = rows[rows["mark"].isin((0, MARK))]
    return rows[rows["origin"].isin(files)] if files else rows


def draw_all(data, floor=None, printed=None, keys=()):
    """The figure of papers.load's rows, with level lines of papers.per_task's. keys: draws these, not returns."""
    methods = [method for method in data["method"].unique() if method != floor]
    if floor and floor not in set(data["method"]):
        raise ValueError(f"--floor {floor}: no such method; there are {', '.join(methods)}")
    tasks = sorted(data["task"].unique())
    panels = {title: lines for title, lines in PANELS.items() if data["key"].isin(lines).any()}
    if keys:
        panels = {key: {key: "-"} for key in keys}
        missing = set(keys) - set(data["key"])
        if missing:
            raise ValueError(f"--keys {' '.join(sorted(missing))}: there are {' '.join(data['key'].unique())}")
    if not panels:
        raise ValueError("no return of an episode in these CSVs")
    share = False if keys else "row"
    figure, axes = plt.subplots(len(tasks), len(panels), squeeze=False, sharey=share, layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        rows = data[data["task"] == task]
        for axis, (title, lines) in zip(row, panels.items(), strict=True):
            level = None if keys else floor  # a return
            draw(axis, rows, lines, colours_of(methods), level, levels_of(rows, lines, printed))
            axis.set_title(f"{task}, {title}")
        if not keys:
            row[0].set_ylabel("return of an episode")
    longest = max(legend_rows(axis) for axis in axes.flat)
    figure.set_size_inches(6 * len(panels), (4 + 0.18 * longest) * len(tasks))
    return figure


def colours_of(methods):
    """{method: colour}, each one's own."""
    if len(methods) <= len(COLOURS):
        return dict(zip(methods, COLOURS, strict=False))
    return dict(zip(methods, matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(methods))), strict=True))


def levels_of(rows, keys, printed):
    """{label: value} of what was printed of these rows' task, under these keys."""
    if printed is None:
        return {}
    task, suite = plain(rows["task"].iloc[0]), rows["suite"].iloc[0]
    levels = {}
    for row in printed[(printed["task"] == task) & (printed["suite"] == suite)].itertuples():
        if row.key in keys:
            steps = re.match(r"(\d+)(?: env)?(.*)", row.steps_or_frames)
            after = f", {int(steps[1]):,}{steps[2] or ' steps'}" if steps else ""
            trained = f" ({row.name})" if row.name.endswith("levels") else ""  # PPO on 200 or on all of them
            levels[f"{row.method}{trained}, {KEYS[row.key]}{after}"] = float(row.value)
    return levels


# ---- One panel ----
def draw(axis, data, lines, colours, floor, levels=None):
    """Draws {key: line style} for each method of {method: colour}, and levels {label: return}."""
    for method, colour in colours.items():
        for key, line in lines.items():
            draw_seeds(axis, data[(data["method"] == method) & (data["key"] == key)], line, colour)
    draw_floor(axis, data[data["method"] == floor])
    draw_levels(axis, levels or {})
    axis.set_xlabel("steps of each agent")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if legend_labels(axis):  # below, where no line crosses it
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "frameon": False, "fontsize": 8.5}
        axis.legend(**place, ncols=legend_columns(axis))


def draw_seeds(axis, runs, line, colour):
    """The seeds of a method under one key: thin, and their mean."""
    if runs.empty:
        return
    method, key = runs["method"].iloc[0], runs["key"].iloc[0]
    seeds = runs.pivot_table(index="step", columns="seed", values="value")
    seeds = seeds.interpolate("index", limit_area="inside")  # seeds that were not logged at the same steps
    shared = seeds.dropna()
    mean, spread = shared.mean(axis=1), shared.std(axis=1)
    count = f"{seeds.shape[1]} seeds"
    if seeds.shape[1] > 1:
        for _, seed in seeds.items():
            known = seed.dropna()
            marker = "." if len(known) == 1 else ""  # a single point has no line
            axis.plot(known, marker + line.strip("os^"), color=colour, linewidth=0.8, alpha=0.5)
        axis.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    else:
        count = "1 seed"
    if mean.empty:
        count += ", no steps in common"
    label = f"{method}, {KEYS.get(key, key)} ({count})"
    marker = "o" if len(mean) == 1 and line[0] == "-" else ""
    axis.plot(mean, marker + line, color=colour, linewidth=2, markersize=5, label=label)


def draw_floor(axis, runs):
    """A level line at the mean of a method's test returns, or of its training's where it was not tested."""
    for key in ("eval/test_return", "charts/episodic_return"):
        values = runs[runs["key"] == key]["value"]
        if len(values):
            label = f"{runs['method'].iloc[0]}, {KEYS[key]}"
            axis.axhline(values.mean(), linestyle="-.", color="black", label=label)
            return


def draw_levels(axis, levels):
    """Level lines that make the panel at most half as high again; those further above are in the legend alone."""
    low, high = axis.get_ylim()
    top = high + (high - low) / 2
    for n, (label, value) in enumerate(levels.items()):
        colour = "black" if n // len(DASHES) % 2 == 0 else "gray"
        if value <= top:
            style = {"color": colour, "linestyle": DASHES[n % len(DASHES)], "linewidth": 1}
            axis.axhline(value, label=f"published {label}: {value:.4g}", **style)
        else:
            axis.plot([], [], " ", marker="$\\uparrow$", color="black", label=f"above, published {label}: {value:.4g}")


def legend_labels(axis):
    return axis.get_legend_handles_labels()[1]


def legend_columns(axis):
    labels = legend_labels(axis)
    return 2 if len(labels) > 6 and max(map(len, labels)) < 40 else 1


def legend_rows(axis):
    return -(-len(legend_labels(axis)) // legend_columns(axis))


def save(figure, path):
    """Writes a .png or .svg, the same bytes each time. Errors: OSError."""
    style = {"svg.hashsalt": "holdout", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
    with matplotlib.rc_context(style):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.endswith(".svg") else None)
    if path.endswith(".svg"):  # half as large: tenths of a pixel, no names of groups, no indentation
        text = re.sub(r"(\d\.\d)\d+", r"\1", Path(path).read_text(encoding="utf-8"))
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        Path(path).write_text(re.sub(r"\s*\n\s*", " ", text).replace("> <", "><") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
