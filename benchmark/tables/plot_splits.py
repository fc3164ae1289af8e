"""Draws the last returns of methods in each split that they were evaluated in, one panel per split.

A dot is the interquartile mean over the seeds, a bar its 95 % stratified bootstrap interval (rliable). Of two agents
each one is a line of its own, and so is a Monte Carlo policy. From a CSV of collect.py with their keys:

    python benchmark/tables/collect.py runs --keys eval/ --out coins.csv
    python benchmark/tables/plot_splits.py coins.csv --out law.svg --methods apart mdpo --splits law free broken
    python benchmark/tables/plot_splits.py coins.csv --out coins.svg --csv coins_splits.csv
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import papers
from common import COLOURS, check_out, fail
from plot_aggregate import draw_interval, with_intervals
from plot_curves import save

KEY = re.compile(r"eval/(?:agent(?P<agent>\d)/)?(?P<mc>mc_)?(?P<split>\w+)_return")


@dataclass
class Args:
    results: tyro.conf.Positional[list[str]]  # CSV files of collect.py
    out: str  # .svg or .png
    methods: tuple[str, ...] = ()  # which, from top to bottom (default: all)
    splits: tuple[str, ...] = ()  # which, from left to right (default: all)
    csv: str | None = None  # the same as a table
    reps: int = 2000  # bootstrap samples
    seed: int = 0  # draws them


def main():
    args = tyro.cli(Args)
    if args.reps < 1:
        fail(f"--reps {args.reps}: at least 1")
    check_out(args.out, ".svg", ".png")
    if args.csv:
        check_out(args.csv, ".csv")
    try:
        rows = chosen(papers.load(args.results), args.methods, args.splits)
        table = table_of(rows, args.reps, args.seed)
        save(draw(table, args.splits), args.out)
        if args.csv:
            table.to_csv(args.csv, index=False, lineterminator="\n", float_format="%.4g")
    except (OSError, ValueError) as error:
        fail(error)
    print(args.out)
    if args.csv:
        print(args.csv)


def chosen(rows, methods=(), splits=()):
    """The last evaluation of each run under each key, with the columns agent, mc and split; methods as asked for."""
    rows = rows.join(rows["key"].str.extract(KEY)).dropna(subset="split").fillna({"agent": "", "mc": ""})
    run = ["task", "method", "seed", "command"]
    rows = rows.sort_values("step", kind="stable").groupby([*run, "key"], as_index=False, sort=False).last()
    pairs = rows.groupby(run)["agent"].transform("max") != ""
    rows = rows[~pairs | (rows["agent"] != "")]  # of two agents, not their mean
    for name, wanted in (("method", methods), ("split", splits)):
        there = rows[name].unique().tolist()
        unknown = [value for value in wanted if value not in there]
        if unknown:
            raise ValueError(f"--{name}s {' '.join(unknown)}: there are {' '.join(there)}")
        rows = rows[rows[name].isin(wanted or there)]
    return rows.sort_values("method", key=lambda names: names.map(place_in(methods)), kind="stable")


def place_in(wanted):
    """A function of a name: its place among the wanted ones; 0 for all where none is wanted."""
    return lambda name: wanted.index(name) if wanted else 0


def table_of(rows, reps, seed):
    """A row per task, method, agent and split."""
    lines = []
    places = ["task", "method", "agent", "mc", "split"]
    for (task, method, agent, mc, split), group in rows.groupby(places, sort=False):
        name = method + (f", agent {agent}" if agent else "") + (", Monte Carlo" if mc else "")
        values, (lows, highs) = with_intervals(group[["value"]].to_numpy(float), reps=reps, seed=seed)
        steps = group["step"].max()
        lines.append([task, name, split, values[0], lows[0], highs[0], len(group), steps])
    if not lines:
        raise ValueError("no return of a split in these CSVs; see collect.py --keys eval/")
    return pd.DataFrame(lines, columns=["task", "method", "split", "iqm", "low", "high", "runs", "steps"])


def draw(table, splits=()):
    """A panel per split, a line per method and agent, the first one on top."""
    splits, names = splits or table["split"].unique(), table[["task", "method"]].drop_duplicates().to_numpy().tolist()
    figure, axes = plt.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False, layout="constrained")
    figure.set_size_inches(3 + 2 * len(splits), 1 + 0.28 * len(names))
    for axis, split in zip(axes[0], splits, strict=True):
        for row in table[table["split"] == split].itertuples():
            y = names.index([row.task, row.method])
            draw_interval(axis, y, row.iqm, row.low, row.high, COLOURS[y % len(COLOURS)], "o")
        axis.set_title(split, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    one_task = table["task"].nunique() == 1
    labels = [method if one_task else f"{method} ({task})" for task, method in names]
    axes[0, 0].set_yticks(range(len(names)), labels, fontsize=8)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    if table["low"].fillna(table["iqm"]).min() >= 0:
        axes[0, 0].set_xlim(left=-0.02)
    figure.supxlabel(f"return of an episode, interquartile mean of {runs_text(table['runs'])}", fontsize=10)
    return figure


def runs_text(runs):
    fewest, most = runs.min(), runs.max()
    return f"{most} runs" if fewest == most else f"{fewest} to {most} runs"


if __name__ == "__main__":
    main()
