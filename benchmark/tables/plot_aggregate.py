"""Aggregates over the tasks of a suite, ours beside the papers': a figure, and a tidy CSV of what it shows.

    python benchmark/tables/plot_aggregate.py atari-100k benchmark/results/*.csv --out atari.svg --csv aggregates.csv
    python benchmark/tables/plot_aggregate.py procgen-easy benchmark/results/*.csv --tasks starpilot --out starpilot.svg

Interquartile mean, median, mean and optimality gap with stratified bootstrap intervals of 95 %, performance profiles
and probabilities of improvement, all by rliable (Agarwal et al. 2021). A run counts with its last evaluation, a method
if it has a run of each task. Aggregates that a paper printed are shown as they are. Where a paper printed returns of
single tasks, their aggregate has no interval, and its interquartile mean is one over tasks, not over runs.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics

sys.path.insert(0, str(Path(__file__).parent.parent))
import papers
from common import COLOURS, check_out, fail, plain
from plot_curves import save

METRICS = ("IQM", "median", "mean", "optimality gap")
SUITES = ("atari-100k", "dmc", "procgen-easy", "procgen-hard", "dmc-gb")
FIELDS = ["suite", "method", "whose", "metric", "value", "low", "high", "runs", "tasks", "steps", "about"]
MARKERS = {"ours": "o", "published runs": "s", "published tasks": "d", "printed": "|", "computed": "|"}


@dataclass
class Args:
    suite: tyro.conf.Positional[Literal[SUITES]]  # dmc: the 11 tasks of DMC-M; dmc-gb: its 6, in one look
    results: tyro.conf.Positional[list[str]]  # CSV files of collect.py
    out: str  # .svg or .png
    csv: str | None = None  # the aggregates as a table
    tasks: tuple[str, ...] = ()  # aggregate over these alone (default: all of the suite)
    key: str = ""  # what is aggregated (default: eval/test_return; dmc-gb: eval/video_hard_return)
    reps: int = 2000  # bootstrap samples
    seed: int = 0  # draws them


def main():
    args = tyro.cli(Args)
    if args.reps < 1:
        fail(f"--reps {args.reps}: at least 1")
    check_out(args.out, ".svg", ".png")
    if args.csv:
        check_out(args.csv, ".csv")
    key = args.key or ("eval/video_hard_return" if args.suite == "dmc-gb" else "eval/test_return")
    try:
        rows = papers.load(args.results)
        tasks = tasks_of(args.suite, args.tasks)
        mine, left_out = matrices(args.suite, rows, tasks, key)
        figure, table = draw(args.suite, mine, tasks, key, args.reps, args.seed)
        save(figure, args.out)
        if args.csv:
            table.to_csv(args.csv, index=False, lineterminator="\n")
    except (OSError, ValueError) as error:
        fail(error)
    for method, count in left_out.items():
        print(f"left out: {method}, which has runs of {count} of {len(tasks)} tasks (--tasks)", file=sys.stderr)
    print(args.out)
    if args.csv:
        print(args.csv)


# ---- Scores ----
@dataclass
class Scores:
    """matrix [runs, tasks], normalised; the steps after which they were measured."""

    matrix: np.ndarray
    steps: str


def tasks_of(suite, wanted=()):
    """The suite's tasks in the spelling of `plain`, or the wanted ones of them."""
    tasks = sorted(papers.per_task().query("suite == @suite")["task"].unique())
    wanted = sorted({plain(task) for task in wanted})
    unknown = sorted(set(wanted) - set(tasks))
    if unknown:
        raise ValueError(f"--tasks {' '.join(unknown)}: {suite} has {' '.join(tasks)}")
    return wanted or tasks


def matrices(suite, rows, tasks, key):
    """({method: Scores} of collect.py's rows, {method: number of its tasks} of those without a run of each task)."""
    rows = rows[(rows["suite"] == suite) & (rows["key"] == key)]
    rows = rows.assign(task=rows["task"].map(plain)).sort_values("step", kind="stable")
    rows = rows[rows["task"].isin(tasks)]
    whole, left_out = {}, {}
    for method, runs in rows.groupby("method", sort=False):
        last = runs.groupby(["task", "seed", "command"], as_index=False).last()
        scores = {task: group["value"].to_numpy() for task, group in last.groupby("task")}
        if len(scores) < len(tasks):
            left_out[method] = len(scores)
        else:
            whole[method] = Scores(matrix(suite, scores, tasks), steps_text(last["step"]))
    return whole, left_out


def steps_text(steps):
    first, last = steps.min(), steps.max()
    return f"{first:,} steps" if first == last else f"{first:,} to {last:,} steps"


def matrix(suite, scores, tasks):
    """{task: returns of its runs} -> normalised [runs, tasks], with as many runs as the task with the fewest has."""
    runs = min(len(scores[task]) for task in tasks)
    columns = []
    for task in tasks:
        columns.append(normalised(suite, task, np.asarray(scores[task][:runs], float)))
    return np.stack(columns, axis=1)


def normalised(suite, task, returns):
    """Human-normalised on Atari, by Procgen's constants, and as they are on DeepMind Control (at most 1000)."""
    low, high = bounds(suite).get(plain(task), (0, 1))
    return (returns - low) / (high - low)


def bounds(suite):
    """{task: (return that is 0, return that is 1)}, from published/."""
    if suite == "atari-100k":
        table = papers.read("atari_human_random")[["game", "random_score", "human_score"]]
    elif suite.startswith("procgen"):
        table = papers.read("procgen_normalisation").query("distribution_mode == @suite.removeprefix('procgen-')")
        table = table[["game", "r_min", "r_max"]]
    else:
        return {}
    return {plain(task): (float(low), float(high)) for task, low, high in table.to_numpy()}


def best(suite):
    """The score from which on the optimality gap is 0."""
    return 1000 if suite.startswith("dmc") else 1


def unit_of(suite):
    if suite == "atari-100k":
        return "human-normalised score"
    return "return of an episode" if suite.startswith("dmc") else "normalised return"


# ---- Aggregates ----
def aggregate(matrix, gamma=1):
    """[runs, tasks] -> [4], in the order of METRICS."""
    return np.array(
        [
            metrics.aggregate_iqm(matrix),
            metrics.aggregate_median(matrix),
            metrics.aggregate_mean(matrix),
            metrics.aggregate_optimality_gap(matrix, gamma),
        ]
    )


def with_intervals(matrix, gamma=1, reps=2000, seed=0):
    """[runs, tasks] -> values [4], 95 % intervals [2, 4], which a single run has none of."""
    if len(matrix) < 2:
        return aggregate(matrix, gamma), np.full((2, len(METRICS)), np.nan)
    return estimates(matrix, partial(aggregate, gamma=gamma), reps, seed)


def estimates(scores, function, reps, seed):
    """rliable's value and interval of function(scores) -> [D]: runs are drawn again, task by task."""
    np.random.seed(seed)  # noqa: NPY002  Careful: whatever its random_state, rliable draws from this stream.
    values, intervals = library.get_interval_estimates({"": scores}, function, reps=reps)
    return values[""], intervals[""]


def improvement(x, y, reps=2000, seed=0):
    """Probability of improvement of runs x over y, both [runs, tasks] -> value, interval [2]."""
    values, ends = estimates((x, y), lambda *pair: np.array([metrics.probability_of_improvement(*pair)]), reps, seed)
    return values[0], ends[:, 0]


# ---- The table ----
def table_of(suite, mine, tasks, key, reps, seed):
    """FIELDS of all methods: ours, the papers' runs and tasks, and the aggregates that they printed."""
    single = {
        "ours": mine,
        "published runs": paper_runs(suite, tasks, key),
        "published tasks": paper_tasks(suite, tasks, key),
    }
    lines = []
    for whose, methods in single.items():
        for method, scores in methods.items():
            values, (lows, highs) = with_intervals(scores.matrix, best(suite), reps, seed)
            runs = len(scores.matrix) if whose != "published tasks" else ""
            for metric, *numbers in zip(METRICS, values, lows, highs, strict=True):
                texts = [f"{number:.4g}".replace("nan", "") for number in numbers]
                lines.append([suite, method, whose, metric, *texts, runs, len(tasks), scores.steps, ""])
    if tasks == tasks_of(suite) and key == "eval/test_return":
        lines += printed(suite, len(tasks))
    return pd.DataFrame(lines, columns=FIELDS)


def paper_runs(suite, tasks, key):
    """{method: Scores} of the runs that DMC-M's two first rows were computed from."""
    if (suite, key) != ("dmc", "eval/test_return"):
        return {}
    rows = papers.read("sac_sam_reset_dmcm_runs")
    rows = rows.assign(task=rows["task"].map(plain), value=rows["value"].astype(float))
    methods = {}
    for name, runs in rows.groupby("method"):
        scores = {task: group["value"].to_list() for task, group in runs.groupby("task")}
        methods[name] = Scores(matrix(suite, scores, tasks), "2,000,000 frames")
    return methods


def paper_tasks(suite, tasks, key):
    """{method: Scores} of what was printed task by task, as if each had one run; but for what is known better."""
    if suite == "atari-100k" and tasks == tasks_of(suite):
        return {}  # their aggregates over all runs are in published/
    rows = papers.per_task().query("suite == @suite and key == @key and task in @tasks")
    rows = rows[~rows["name"].isin(paper_runs(suite, tasks, key))]
    methods = {}
    for (name, mark), group in rows.groupby(["name", "mark"], sort=False):
        scores = {row.task: [float(row.value)] for row in group.itertuples()}
        steps = group["steps_or_frames"].iloc[0].split(" (")[0]
        if mark:
            steps = f"{mark:,} steps"
            name = f"{group['method'].iloc[0]}, {name}, {mark // 10**6}M"
        methods[name] = Scores(matrix(suite, scores, tasks), steps)
    return methods


PRINTED = {"atari-100k": ("drq_sam_reset_atari100k", "atari100k_other_baselines"), "dmc": ("sac_sam_reset_dmcm",)}
SHORT = {"iqm": "IQM", "median": "median", "mean": "mean", "gap": "optimality gap"}  # of hns_iqm, return_mean, ...


def printed(suite, tasks):
    """Lines of FIELDS: the aggregates that papers printed, and their intervals where they have some."""
    lines = []
    for file in PRINTED.get(suite, ()):
        rows = papers.read(file)
        rows = rows[rows["task"].str.match(r"\d+ (games|tasks)") & ~rows["setting"].str.contains("last evaluation")]
        for (method, setting), group in rows.groupby(["method", "setting"], sort=False):
            if setting.startswith(("replay ratio", "100 runs")):
                method = f"{method}, {setting}"
            known = dict(group[["metric", "value"]].to_numpy())
            steps, source = group["steps_or_frames"].iloc[0], group["source"].iloc[0].split(";")[0]
            whose = "computed" if "(computed)" in source else "printed"
            for metric, value in known.items():
                name = SHORT.get(metric.split("_", 1)[-1])
                if name:
                    ends = [known.get(f"{metric}_ci95_{end}", "") for end in ("low", "high")]
                    lines.append([suite, method, whose, name, value, *ends, "", tasks, steps, source])
    return lines


# ---- The figure ----
def draw(suite, mine, tasks, key, reps, seed):
    """(figure, table_of's table): a panel per metric; below, of what has several runs, profiles and who beats whom."""
    table = table_of(suite, mine, tasks, key, reps, seed)
    if table.empty:
        raise ValueError(f"nothing of {suite} in these CSVs with {key}")
    several = several_runs(mine, "ours") | several_runs(paper_runs(suite, tasks, key), "published runs")
    rows = table.drop_duplicates(["method", "whose"])
    heights = [1.3 + 0.24 * len(rows)]
    if several:
        pairs = len(several) * (len(several) - 1) / 2
        heights.append(max(3.6, 0.35 * pairs))
    figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_intervals(parts[0], table, rows, unit_of(suite))
    if several:
        left, right = parts[1].subplots(1, 2)
        draw_profiles(left, several, unit_of(suite), reps, seed)
        draw_improvements(right, several, reps, seed)
    return figure, table


def several_runs(methods, whose):
    """{label: matrix} of the methods with several runs."""
    return {f"{name}, {whose}": scores.matrix for name, scores in methods.items() if len(scores.matrix) > 1}


def draw_intervals(figure, table, rows, unit):
    """A panel per metric, a line per method, ours in colours, the papers' in black."""
    axes = figure.subplots(1, len(METRICS), sharey=True)
    colours, labels = [], []
    for n, row in enumerate(rows.itertuples()):
        ours = row.whose == "ours"
        colours.append(COLOURS[n % len(COLOURS)] if ours else "black")
        labels.append(f"{row.method}, {row.whose}" + (f", {row.steps}" if ours else ""))
    for axis, metric in zip(axes, METRICS, strict=True):
        for y, row in enumerate(rows.itertuples()):
            cell = table[(table["method"] == row.method) & (table["whose"] == row.whose) & (table["metric"] == metric)]
            if len(cell):
                value, low, high = pd.to_numeric(cell.iloc[0][["value", "low", "high"]])
                draw_interval(axis, y, value, low, high, colours[y], MARKERS[row.whose])
        axis.set_title(metric + (" \u2193" if metric == "optimality gap" else ""), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    figure.supxlabel(unit, fontsize=10)


def draw_interval(axis, y, value, low, high, colour, marker):
    axis.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
    axis.plot(value, y, marker, color=colour, markersize=9 if marker == "|" else 5)


def draw_profiles(axis, several, unit, reps, seed):
    """The share of runs with a score above tau, for each method with several runs."""
    every = np.concatenate([matrix.ravel() for matrix in several.values()])
    taus = np.linspace(min(every.min(), 0), every.max(), 51)
    for n, (name, matrix) in enumerate(several.items()):
        colour = COLOURS[n % len(COLOURS)]
        shares, (low, high) = estimates(matrix, lambda scores: library.score_distributions(scores, taus), reps, seed)
        axis.plot(taus, shares, color=colour, label=name)
        axis.fill_between(taus, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(xlabel=unit, ylabel="share of runs above it", ylim=(0, 1.02), title="performance profile")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def draw_improvements(axis, several, reps, seed):
    """How likely a run of one method is above one of another, for each pair of methods with several runs."""
    names, labels = list(several), []
    for n, worse in enumerate(names):
        for better in names[n + 1 :]:
            value, (low, high) = improvement(several[better], several[worse], reps, seed)
            draw_interval(axis, len(labels), value, low, high, COLOURS[0], "|")
            labels.append(f"{better}\nover {worse}")
    axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set(xlim=(0, 1), ylim=(len(labels) - 0.4, -0.6), xlabel="probability", title="probability of improvement")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
