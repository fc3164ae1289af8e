"""Writes benchmark/results/README.md: our runs, and the papers' tables with ours in each cell, or "not run".

    python benchmark/tables/report.py

From the CSVs in results/, which collect.py and throughput.py wrote, and the papers' numbers in published/. A run fills
a cell if it is the paper's, by its arguments and its steps; shorter ones are shown as such, apart from the papers'
tables. Made twice, it is the same.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plot_aggregate
import plot_curves
import plot_splits
import tyro
from rliable import metrics

sys.path.insert(0, str(Path(__file__).parent.parent))
import papers
from common import KEYS, fail, plain
from papers import NOT_RUN, read
from plot_aggregate import METRICS

FLOORS = ("untrained", "random actions")  # methods that are drawn as a level line
TEST, TRAIN, FULL_LOOK = "eval/test_return", "eval/train_return", "eval/full_look_return"
VIDEO_EASY, VIDEO_HARD = "eval/video_easy_return", "eval/video_hard_return"


@dataclass
class Args:
    results: str = "benchmark/results"  # folder of the CSVs, and of README.md, the pictures and aggregates.csv
    reps: int = 2000  # bootstrap samples of an interval


def main():
    args = tyro.cli(Args)
    folder = Path(args.results)
    if args.reps < 1:
        fail(f"--reps {args.reps}: at least 1")
    try:
        rows = papers.load(folder.glob("*.csv"), each_alone=True)
        text = write(folder, rows, args.reps)  # whole before the file is opened
        (folder / "README.md").write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        fail(error)
    print(folder / "README.md")


def write(folder, rows, reps):
    """Draws the pictures into a folder. -> the text of the report."""
    ours = Ours(rows, reps)
    sections = {title: make(ours) for title, make in SECTIONS.items()}
    tables = [plot_aggregates(folder, ours, suite, key) for suite, key in AGGREGATES]
    pd.concat(tables).to_csv(folder / "aggregates.csv", index=False, lineterminator="\n")
    parts = [HEAD, summarise(sections), LEGEND, "## Our runs"]
    for file, runs in rows.groupby("file"):
        if (runs["suite"] == "coins").all():
            parts.append(splits_section(folder, file, runs, reps))
            continue
        try:
            plot_runs(folder, file, runs)
        except ValueError as error:  # no returns
            print(f"skipped: {file}.csv: {error}", file=sys.stderr)
            continue
        parts.append(runs_section(file, runs))
    parts += ["## The papers' tables", CELLS]
    for title, text in sections.items():
        parts += [f"### {title}", text, f"**What differs in our runs**: {DIFFERENCES[title]}"]
    parts += ["## Speed", *speed_tables(folder), *other_tables(folder)]
    return paragraphs(*parts) + "\n"


HEAD = """# Results

Written by `python benchmark/tables/report.py` from the CSVs in this folder and the numbers of the papers in
[`published/`](../published/README.md)."""
LEGEND = f"""A cell holds a paper's number and below it ours. "{NOT_RUN}": no run of ours has that row's settings and
the paper's number of steps. What there is instead are the shortened runs below, which fill no cell."""
CELLS = """Upper line: the paper's. Lower line: ours, the mean ± standard deviation over runs, or an aggregate with its
95 % interval. A run belongs to a cell if it has that row's arguments (`METHODS` in `benchmark/tables/papers.py`), was
not run in bf16, and was evaluated after the paper's number of steps, in at least as many episodes as the script's last
evaluation has by default. GPU hours are hours of the process on a machine with a GPU, evaluations included; runs that
share a GPU each count in full. **Where a paper printed only aggregates or drew only figures, this is said; no number is
read off a figure.**"""


def summarise(sections):
    """How many cells of each part have a run."""
    lines = []
    for title, text in sections.items():
        cells, empty = text.count("<br>"), text.count(f"<br><sub>{NOT_RUN}")
        lines.append([title, cells, cells - empty])
    return table(["paper's tables", "cells", "of them with runs of ours"], lines)


# ---- Markdown ----
def paragraphs(*parts):
    return "\n\n".join(parts)


def table(header, lines):
    text = []
    for row in (header, ["---"] * len(header), *lines):
        text.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(text)


def folded(title, text):
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def cell(theirs, ours):
    """The paper's above ours; small where there is none of ours."""
    return f"{theirs}<br><sub>{ours}</sub>" if ours.startswith(NOT_RUN) else f"{theirs}<br>**{ours}**"


def printed(row):
    """A row of published/ as text."""
    return f"{row.value} ± {row.std}" if row.std else row.value


def interval_text(value, low, high, digits):
    text = f"{value:.{digits}f}"
    return f"{text} ({low:.{digits}f}, {high:.{digits}f})" if np.isfinite(low) else text


def short(key):
    return key.removeprefix("eval/").removesuffix("_return")


# ---- What our runs put into cells ----
def amounts(file, name):
    """Rows of METHODS that a row of a paper is the best of: "DrQ+L2, 1e-3" and so on of "DrQ+L2"."""
    rows = papers.METHODS[file]
    return [name] if name in rows else [row for row in rows if row.rpartition(", ")[0] == name]


class Ours:
    """Our runs, the rows of papers.load."""

    def __init__(self, rows, reps):
        self.rows, self.reps = rows, reps

    def task(self, file, name, key, task, mark=0, digits=0):
        """The text of one task's cell: "12.3 ± 0.4 (3 runs)"."""
        found = []
        for row in amounts(file, name):
            values = papers.scores(self.rows, file, row, key, mark).get(plain(task), [])
            if values and (not found or np.mean(values) > np.mean(found)):
                found = values
        if not found:
            return NOT_RUN
        mean = f"{np.mean(found):.{digits}f}"
        if len(found) == 1:
            return f"{mean} (1 run)"
        return f"{mean} ± {np.std(found, ddof=1):.{digits}f} ({len(found)} runs)"

    def costs(self, file, name, tasks=None):
        """{title: text of its cell} of the runs in a row's cells, of all tasks or of some: what learns, and how long.

        Hours of the whole process up to that evaluation, of runs with a GPU.
        """
        found = [papers.whole_runs(self.rows, file, row, TEST) for row in amounts(file, name)]
        if not found:
            return {}
        runs = pd.concat(found)
        if tasks:
            runs = runs[runs["task"].map(plain).isin(map(plain, tasks))]
        texts, sizes = {}, pd.to_numeric(runs["parameters"]).dropna()
        if len(sizes):
            texts["parameters, M"] = f"{sizes.mean() / 1e6:.1f}"
        on_gpu = runs[~runs["hardware"].str.startswith("no GPU")]
        hours = self.rows[self.rows["key"] == "charts/hours"]
        hours = on_gpu[[*papers.RUN, "step", "hardware"]].merge(hours[[*papers.RUN, "step", "value"]])
        if len(hours):
            cards = sorted({text.partition(",")[0] for text in hours["hardware"]})
            longest = hours.groupby(papers.RUN)["value"].max()
            texts["GPU hours"] = f"{longest.mean():.1f} ({', '.join(cards)})"
        return texts

    def both(self, file, name, task, keys, digits=0):
        """Two returns of the same runs in a cell."""
        texts = [self.task(file, name, key, task, digits=digits) for key in keys]
        return NOT_RUN if set(texts) == {NOT_RUN} else " / ".join(texts)

    def matrix(self, file, name, suite, key=TEST, mark=0):
        """(normalised [runs, tasks], number of tasks with runs); None for the former if there is a task without."""
        scores, tasks = papers.scores(self.rows, file, name, key, mark), plot_aggregate.tasks_of(suite)
        count = sum(task in scores for task in tasks)
        return plot_aggregate.matrix(suite, scores, tasks) if count == len(tasks) else None, count

    def aggregates(self, file, name, suite, digits):
        """{metric: text of its cell} over all tasks of a suite."""
        best, most = None, 0
        for row in amounts(file, name):
            matrix, count = self.matrix(file, row, suite)
            most = max(most, count)
            if matrix is not None and (best is None or metrics.aggregate_iqm(matrix) > metrics.aggregate_iqm(best)):
                best = matrix
        if best is None:
            text = f"{NOT_RUN} ({most} of {len(plot_aggregate.tasks_of(suite))} tasks)" if most else NOT_RUN
            return dict.fromkeys(METRICS, text)
        values, (lows, highs) = plot_aggregate.with_intervals(best, plot_aggregate.best(suite), self.reps)
        texts = {}
        for metric, value, low, high in zip(METRICS, values, lows, highs, strict=True):
            texts[metric] = interval_text(value, low, high, digits) + f" {len(best)} runs per task"
        return texts


# ---- Pictures ----
AGGREGATES = (
    ("atari-100k", TEST),
    ("dmc", TEST),
    ("dmc-gb", VIDEO_EASY),
    ("dmc-gb", VIDEO_HARD),
    ("procgen-hard", TEST),
)
FILES = {  # whose methods are ours in a suite's aggregates
    "atari-100k": "drq_sam_reset_atari100k",
    "dmc": "sac_sam_reset_dmcm",
    "dmc-gb": "pieg_dmcgb",
    "procgen-hard": "mdpo_procgen",
}


def picture(suite, key):
    look = "" if key == TEST else f"_{short(key)}"
    return f"aggregates_{suite}{look}.svg"


def plot_aggregates(folder, ours, suite, key):
    """Draws a suite's aggregates. -> their table."""
    whole = {}
    for name in papers.METHODS[FILES[suite]]:
        matrix, _ = ours.matrix(FILES[suite], name, suite, key)
        if matrix is not None:
            whole[name] = plot_aggregate.Scores(matrix, "the paper's steps")
    figure, lines = plot_aggregate.draw(suite, whole, plot_aggregate.tasks_of(suite), key, ours.reps, seed=0)
    save(figure, folder / picture(suite, key))
    return lines.assign(key=key)


def plot_runs(folder, file, runs):
    floor = None
    for name in FLOORS:
        if name in set(runs["method"]):
            floor = name
    save(plot_curves.draw_all(runs, floor, plot_curves.published()), folder / f"{file}.svg")


def save(figure, path):
    plot_curves.save(figure, str(path))
    plt.close(figure)


# ---- Our runs ----
def runs_section(file, runs):
    """The curves, last returns, commands and hardware of one CSV."""
    keys = [key for key in KEYS if key in set(runs["key"])]
    lines = []
    for (method, task), group in runs.groupby(["method", "task"], sort=False):
        last = group.sort_values("step", kind="stable").groupby(["key", "seed"])["value"].last()
        means = last.groupby("key").mean()
        line = [method, task, group["seed"].nunique(), length_of(group)]
        for key in keys:
            line.append(f"{means[key]:.4g}" if key in means else "")
        lines.append(line)
    return paragraphs(
        f"### [`{file}.csv`]({file}.csv)",
        f"![Return against steps of the runs in {file}.csv]({file}.svg)",
        "Last values, means over seeds:",
        table(["method", "task", "seeds", "length", *(KEYS[key] for key in keys)], lines),
        sources_of(runs),
    )


def sources_of(runs):
    """The commands, commits and hardware of the runs in a CSV, folded."""
    lines = []
    for (method, command), run in runs.groupby(["method", "command"], sort=False):
        about = run.iloc[0].fillna("")
        hours = run[run["key"] == "charts/hours"]["value"].max()
        hours = "-" if np.isnan(hours) else f"{hours:.2g}"
        size = f"{int(about['parameters']):,}" if about["parameters"] else "-"
        lines.append([method, about["seed"], f"`{command}`", about["commit"][:7], hours, size, about["hardware"]])
    packages = ", ".join(f"`{line}`" for line in runs["packages"].dropna().unique())
    commands = table(["method", "seed", "command", "commit", "hours", "parameters", "hardware"], lines)
    return folded("commands, commits and hardware", f"{commands}\n\nPackages: {packages}.")


def splits_section(folder, file, runs, reps):
    """The last returns of the methods in one CSV, in each split; draws its picture."""
    rows = plot_splits.table_of(plot_splits.chosen(runs), reps, seed=0)
    save(plot_splits.draw(rows), folder / f"{file}.svg")
    splits, lines = rows["split"].unique(), []
    for (task, method), group in rows.groupby(["task", "method"], sort=False):
        cells = {row.split: interval_text(row.iqm, row.low, row.high, 2) for row in group.itertuples()}
        line = [method, task, group["runs"].max(), f"{group['steps'].max():,}"]
        lines.append(line + [cells.get(split, "") for split in splits])
    return paragraphs(
        f"### [`{file}.csv`]({file}.csv)",
        f"![Returns of the methods in {file}.csv, one panel per split]({file}.svg)",
        "Last returns: the interquartile mean over seeds and its 95 % interval.",
        table(["method", "task", "seeds", "steps", *splits], lines),
        sources_of(runs),
    )


def length_of(runs):
    """How the runs of a method compare with a paper's."""
    step, run = runs["step"].max(), runs.iloc[0]
    if np.isnan(run["default_steps"]):
        return f"{step:,} steps of another program"
    cells = papers.cells(run["script"], run["changed"])
    whole = int(run["default_steps"])
    if cells:
        file, name = cells[0]
        whole = papers.METHODS[file][name].steps or whole
    kind = "whole run" if step >= whole else "shortened run"
    text = f"{kind}, {step:,} of {whole:,} steps"
    if not cells:
        text += "; settings that are in no paper's table"
    if step >= whole and runs["episodes"].max() < papers.episodes_of(run["script"]):
        text += "; evaluated in fewer episodes than its paper"
    return text


# ---- The papers' tables ----
def mdpo(ours):
    file = "mdpo_procgen"
    rows, methods = read(file), papers.METHODS[file]
    drawn = []
    for row in rows[rows["value"] == ""].itertuples():
        drawn.append([row.method, row.task.replace("|", ", "), row.metric, row.source])
    games = []
    for game in plot_aggregate.tasks_of("procgen-hard"):
        line = [game]
        for name in methods:
            line.append(cell("figure", ours.both(file, name, game, (TEST, TRAIN), 2)))
        games.append(line)
    return paragraphs(
        """Xie et al. 2025 draw their returns and print none, so there is no number to compare with; the nearest
ones are those of OpenAI's PPO below. Of their protocol:""",
        facts(rows, "mdpo"),
        folded("what is drawn or lost", table(["method", "games", "what", "where"], drawn)),
        folded("return on unseen / training levels after 50M steps", table(["game", *methods], games)),
    )


def facts(rows, script):
    """What is known of a paper's protocol beside the script's defaults."""
    args = vars(papers.checked(script, {}))
    known = {
        "total_steps_per_agent": args["total_timesteps"],
        "total_timesteps_per_worker": args["total_timesteps"],
        "train_levels": papers.LEVELS[args["distribution_mode"]],
        "training_levels": papers.LEVELS[args["distribution_mode"]],
        "beta_fm_coefficient": args.get("fm_coef"),
        "clean_probability": args.get("clean_prob"),
    }
    lines = []
    for row in rows[rows["value"] != ""].itertuples():
        lines.append([row.metric, row.value, known.get(row.metric, NOT_RUN), row.source])
    return table(["", "paper", f"`{script}.py`", "source"], lines)


def procgen(ours):
    file = "procgen_ppo_openai"
    parts = [procgen_table(ours, file, name) for name in papers.METHODS[file]]
    scale = read("procgen_normalisation").pivot(index="game", columns="distribution_mode", values=["r_min", "r_max"])
    lines = []
    for game, row in scale.iterrows():
        lines.append([game, row["r_min", "easy"], row["r_max", "easy"], row["r_min", "hard"], row["r_max", "hard"]])
    header = ["game", "easy: 0 is", "easy: 1 is", "hard: 0 is", "hard: 1 is"]
    return paragraphs(
        """PPO as OpenAI published its runs with Procgen: 3 runs, mean ± standard deviation of the training loop's own
episodes around that many steps; test is the full distribution. In hard mode it learns from batches four times as large
as Xie et al.'s and ours. Ours: `mdpo.py --num-agents 1`, evaluated.""",
        f"![Aggregates on Procgen]({picture('procgen-hard', TEST)})",
        *parts,
        folded("normalised returns: which return is 0 and which is 1", table(header, lines)),
    )


def procgen_table(ours, file, name):
    """Game by game in one mode and on one set of training levels, and the normalised mean."""
    single, means = papers.per_task().query("origin == @file and name == @name"), {}
    for row in read(file).query("metric == 'mean_normalised_return'").itertuples():
        means[row.setting, row.steps_or_frames] = printed(row)
    known = {(row.task, row.key, row.mark): printed(row) for row in single.itertuples()}
    columns = list(dict.fromkeys(zip(single["key"], single["mark"], strict=True)))
    lines = []
    for task in single["task"].unique():
        line = [task]
        for key, mark in columns:
            line.append(cell(known[task, key, mark], ours.task(file, name, key, task, mark, 3)))
        lines.append(line)
    mode, levels = name.removesuffix(" levels").split(", ")
    header, last = ["game"], ["**mean, normalised**"]
    for key, mark in columns:
        matrix, _ = ours.matrix(file, name, f"procgen-{mode}", key, mark)
        own = NOT_RUN if matrix is None else f"{matrix.mean():.4f}"
        last.append(cell(means[f"{mode}-{levels}; {short(key)} curve", str(mark)], own))
        header.append(f"{short(key)}, {mark // 10**6}M steps")
    return folded(f"{mode} mode, {levels} training levels", table(header, [*lines, last]))


def netrand(ours):
    file, keys = "netrand_coinrun", (TEST, TRAIN, FULL_LOOK)
    averaged = [key.replace("/", "/mc_") for key in keys]  # over random kernels, as in the paper
    rows = read(file)
    gaps = rows[rows["value"] == ""][["task", "metric", "source"]].to_numpy().tolist()
    lines = []
    for name in papers.METHODS[file]:
        line = [name]
        for key in averaged if name == "PPO+netrand" else keys:
            line.append(cell("not at hand", ours.task(file, name, key, "coinrun", digits=2)))
        lines.append(line)
    return paragraphs(
        """No number of Lee et al. 2020's tables was at hand. Of its protocol (the script's 25M steps are ours, usual
on Procgen):""",
        facts(rows, "ppo_netrand"),
        table(["task", "what", "why it is missing"], gaps),
        """Ours, CoinRun in the plain look, after as many steps. Of PPO+netrand the policy that averages over random
kernels, as in the paper.""",
        table(["method", *(KEYS[key] for key in keys)], lines),
    )


ATARI_COLUMNS = {
    "trace_fisher": "Tr(F)",
    "lambda_max_hessian": "λ max(H)",
    "params_millions": "parameters, M",
    "gpu_hours_per_run": "GPU hours",
    "hns_iqm": "IQM",
    "hns_median": "median",
    "hns_mean": "mean",
    "optimality_gap": "optimality gap",
}


def atari(ours):
    file = "drq_sam_reset_atari100k"
    rows = read(file)
    third = rows["source"].str.contains("Table 3")
    return paragraphs(
        """Human-normalised scores after 100,000 steps. **Only aggregates are known**: the games' own scores in Lee et
al. 2023's appendix did not survive in the text at hand. Its optimality gaps are those of the appendix. The interval of
DER+SAM's mean does not contain the mean; both are as printed.""",
        f"![Aggregates on Atari-100k]({picture('atari-100k', TEST)})",
        """**Lee et al. 2023, Tables 1 and 6.** DrQ's replay ratio is 2. In brackets: intervals of 95 %.""",
        aggregated(ours, rows[~third], file, "atari-100k", 3, ATARI_COLUMNS),
        "**Lee et al. 2023, Table 3**, the method with shrink and perturb beside others'.",
        aggregated(ours, rows[third], file, "atari-100k", 3, ATARI_COLUMNS),
        """**Other implementations** (rliable's study, 100 runs per game; aggregates computed from its files). They are
not Lee et al.'s DER and DrQ.""",
        others(read("atari100k_other_baselines").query("metric != 'score'")),
        folded("game by game: mean ± standard deviation over runs", games_table(ours, file)),
    )


def aggregated(ours, rows, file, suite, digits, columns):
    """A line per method and setting, a column per metric of {metric: title}, numbers with their intervals."""
    titles, lines = {}, []
    for metric, title in columns.items():
        if metric in set(rows["metric"]):
            titles[title] = ""
    for (method, setting), group in rows.groupby(["method", "setting"], sort=False):
        name = f"{method}, {setting}" if setting.startswith("replay ratio") else method
        known = dict(group[["metric", "value"]].to_numpy())
        own = ours.aggregates(file, name, suite, digits) | ours.costs(file, name)
        line = dict(titles)
        for metric, value in known.items():
            if metric in columns:
                if f"{metric}_ci95_low" in known:
                    value += f" ({known[f'{metric}_ci95_low']}, {known[f'{metric}_ci95_high']})"
                line[columns[metric]] = cell(value, own.get(columns[metric], NOT_RUN))
        lines.append([name, *line.values()])
    return table(["method", *titles], lines)


def others(rows):
    """Aggregates of implementations that no script of ours is."""
    known = rows.pivot(index="method", columns="metric", values="value").reindex(columns=list(ATARI_COLUMNS))
    known = known.dropna(axis=1).rename(columns=ATARI_COLUMNS)
    lines = []
    for method, row in known.iterrows():
        lines.append([method, *(cell(value, NOT_RUN) for value in row)])
    return table(["method", *known], lines)


def games_table(ours, file):
    rows, names = read("atari100k_other_baselines"), ("DER", "DER+SAM+Reset", "DrQ", "DrQ+SAM+Reset")
    scores = {(row.task, row.method): printed(row) for row in rows.itertuples()}
    methods, lines = rows["method"].unique(), []
    for row in read("atari_human_random").itertuples():
        line = [row.game, row.random_score, row.human_score]
        for method in methods:
            line.append(scores[row.game, method])
        for name in names:
            line.append(cell("lost", ours.task(file, name, TEST, row.game, digits=1)))
        lines.append(line)
    header = ["game", "random", "human"]
    for method in methods:
        header.append(f"{method}, 100 runs")
    for name in names:
        header.append(f"{name}, Lee et al.")
    return table(header, lines)


DMC_COLUMNS = {
    "return_iqm": "IQM",
    "return_median": "median",
    "return_median_of_task_means": "median",
    "return_mean": "mean",
}


def dmc(ours):
    file = "sac_sam_reset_dmcm"
    rows = read(file)
    table_2 = rows[rows["source"].str.contains("Table 2")]
    computed = rows[rows["setting"].str.endswith("last evaluation")]
    single = rows[rows["metric"] == "return_mean_over_seeds"]
    known = {(row.task, row.method): printed(row) for row in single.itertuples()}
    methods, lines = table_2["method"].unique(), []
    for task in single["task"].unique():
        line = [task]
        for name in methods:
            line.append(cell(known.get((task, name), "lost"), ours.task(file, name, TEST, task, digits=1)))
        lines.append(line)
    return paragraphs(
        "Returns on the 11 tasks of DMC-M after 2M frames: 1M steps, or 500,000 of cheetah-run and reacher-easy.",
        f"![Aggregates on DMC-M]({picture('dmc', TEST)})",
        """**Lee et al. 2023, Table 2.** In brackets: intervals of 95 %.""",
        aggregated(ours, table_2, file, "dmc", 0, DMC_COLUMNS),
        """The runs behind two of its rows are public (rl_with_resets, 10 seeds) and show how the others are to be read.
rliable gives the printed IQM and mean, to which the axes do not matter, but another median and narrower intervals; with
runs and tasks exchanged it gives the printed ones. So **the paper's median is one over runs of the mean over tasks, and
its intervals draw tasks again, not runs**. Ours are rliable's: compare IQM and mean with the table above, median and
intervals with the lines "rliable" below.""",
        exchanged(ours.reps),
        "The same, as `published/` has it:",
        aggregated(ours, computed, file, "dmc", 1, DMC_COLUMNS),
        """**Task by task.** DrQ-SAC and DrQ-SAC+Reset are computed from those runs; the cells of the paper's appendix
did not survive in the text at hand.""",
        table(["task", *methods], lines),
        "**Lee et al. 2023, section 7.1**, hours of a run on an RTX 3090:",
        run_times(ours, rows[rows["metric"] == "gpu_hours_per_run"], file),
    )


def run_times(ours, rows, file):
    """A line per set of tasks."""
    lines = []
    for row in rows.itertuples():
        own = ours.costs(file, row.method, row.task.split("|")).get("GPU hours", NOT_RUN)
        lines.append([row.setting, row.task.replace("|", ", "), cell(row.value, own)])
    return table(["", "tasks", "GPU hours"], lines)


def exchanged(reps):
    """rliable's aggregates of the published runs, and those with the axes exchanged."""
    lines = []
    for name, scores in plot_aggregate.paper_runs("dmc", plot_aggregate.tasks_of("dmc"), TEST).items():
        for how, matrix in (("rliable", scores.matrix), ("runs and tasks exchanged", scores.matrix.T)):
            values, (lows, highs) = plot_aggregate.with_intervals(matrix, 1000, reps)
            line = [name, how]
            for n in range(3):
                line.append(interval_text(values[n], lows[n], highs[n], 1))
            lines.append(line)
    return table(["published runs of", "", *METRICS[:3]], lines)


def pieg(ours):
    rows = read("pieg_dmcgb")
    text = {(row.task, row.metric): row.value for row in rows.itertuples()}
    gain = text["6 tasks mean", "gain_over_best_baseline_percent"]
    pairs = text["12 task-mode pairs", "pairs_competitive_or_better"]
    features = text["walker", "mean_intensity_decrease_percent"]
    return paragraphs(
        """**Yuan et al. 2022 (workshop version), Table 1.** Returns in two of DMC-GB's looks. The paper says neither
how many runs nor how many steps (ours: 500,500).""",
        f"![Aggregates in video_easy]({picture('dmc-gb', VIDEO_EASY)})",
        f"![Aggregates in video_hard]({picture('dmc-gb', VIDEO_HARD)})",
        looks(ours, rows),
        f"""Its text: +{gain} % on average in video_hard, {pairs} of 12 pairs as good or better, and {features} % less
difference between the features of two backgrounds than SVEA's.""",
        f"""**Table 2, DrawerWorld**, drawer-close. `benchmark/suites/drawerworld.py` is made of another Meta-World, and
its figures are not to be set beside these. The text says +{text["all", "gain_percent_mean"]} % on average.""",
        textures(rows[rows["metric"] == "success_rate_percent"]),
        """**Table 3, where the encoder is cut.** The paper does not say in which look; ours are video_easy /
video_hard.""",
        layers(ours, rows[rows["setting"].str.startswith("encoder cut")]),
    )


def looks(ours, rows):
    """Table 1: a line per task and look, a column per method."""
    single = rows[(rows["metric"] == "return") & rows["setting"].str.startswith("video")]
    known = {(row.task, row.setting, row.method): printed(row) for row in single.itertuples()}
    gains = {}
    for row in rows[rows["metric"] == "gain_over_best_baseline_percent"].itertuples():
        gains[row.task, row.setting] = f"+{row.value} %"
    methods, lines = single["method"].unique(), []
    for task, look in single[["task", "setting"]].drop_duplicates().to_numpy():
        line = [task.replace("_", "-"), look]
        for method in methods:
            own = NOT_RUN
            if method in papers.METHODS["pieg_dmcgb"]:
                own = ours.task("pieg_dmcgb", method, f"eval/{look}_return", task)
            line.append(cell(known[task, look, method], own))
        lines.append([*line, gains.get((task, look), "")])
    return table(["task", "look", *methods, "printed gain over the best baseline"], lines)


def textures(rows):
    """Table 2: a line per texture."""
    known, lines = rows.pivot(index="setting", columns="method", values="value"), []
    for texture, row in known.loc[rows["setting"].unique()].iterrows():
        lines.append([texture, *(cell(f"{value} %", NOT_RUN) for value in row)])
    return table(["texture", *known], lines)


def layers(ours, rows):
    """Table 3: a line per task, a column per layer."""
    lines = {}
    for row in rows.itertuples():
        name = "PIE-G, " + re.search(r"layer \d", row.setting)[0]
        own = ours.both("pieg_dmcgb", name, row.task, (VIDEO_EASY, VIDEO_HARD))
        lines.setdefault(row.task, [row.task]).append(cell(printed(row), own))
    return table(["task", "layer 1", "layer 2", "layer 3", "layer 4"], lines.values())


SECTIONS = {
    "Procgen, MDPO": mdpo,
    "Procgen, OpenAI's PPO": procgen,
    "CoinRun, network randomization": netrand,
    "Atari-100k, SAM and resets": atari,
    "DMC-M, SAM and resets": dmc,
    "DMC-GB and DrawerWorld, PIE-G": pieg,
}


# What differs, where a run fills a cell. The scripts' docstrings ("Deviations") have all of it.
DIFFERENCES = {
    "Procgen, MDPO": """EnvPool's Procgen in place of OpenAI's, as in all of Procgen's tables. Each evaluation plays one
episode per environment; theirs takes the first ten to finish.""",
    "Procgen, OpenAI's PPO": """batches of 16,384 in hard mode too, where theirs are of 65,536, and evaluations on fixed
levels in place of the training loop's own episodes.""",
    "CoinRun, network randomization": """Procgen's CoinRun in place of the old one, a split by looks instead of themes,
normalised rewards, 64 environments.""",
    "Atari-100k, SAM and resets": """EnvPool's Atari without the no-op frame after a lost life, and shifts by whole
pixels. Of DER the paper says only that it "optimizes its hyperparameters"; our rows of DER are DrQ's settings without
augmentation.""",
    "DMC-M, SAM and resets": """today's dm_control and MuJoCo (the versions stand with each run), and the same ten
episodes in all evaluations. Our quadrupeds have the other tasks' SAM radius: the paper sets it apart, but its text lost
the value.""",
    "DMC-GB and DrawerWorld, PIE-G": """today's dm_control and MuJoCo, crops to overlay from 10,000 pictures in place of
all of Places365, and normalisation by the frames that are seen in all evaluations. Our SVEA is DrQ-v2 with overlaid
pictures, which is close to it.""",
}


# ---- Other CSVs ----
def speed_tables(folder):
    """Means over the iterations of throughput.py's CSVs."""
    parts = []
    header = ["program", "precision", "steps/s", "peak memory, GB", "iterations", "command", "hardware"]
    for path in sorted(folder.glob("*.csv")):
        rows = papers.read_table(path)
        if rows is not None and "steps_per_second" in rows:
            lines = []
            for names, group in rows.groupby(["name", "command", "precision", "hardware"], sort=False):
                name, command, precision, hardware = names
                numbers = group[["steps_per_second", "peak_gb"]].apply(pd.to_numeric)
                speed, memory = f"{numbers['steps_per_second'].mean():.4g}", f"{numbers['peak_gb'].max():.2g}"
                lines.append([name, precision, speed, memory, len(group), f"`{command}`", hardware])
            parts.append(f"[`{path.name}`]({path.name})\n\n{table(header, lines)}")
    return parts


def other_tables(folder):
    """CSVs of other programs as they are, without the columns that say where they were made."""
    parts, hidden = ["## Other tables"], ["command", "commit", "packages", "hardware"]
    for path in sorted(folder.glob("*.csv")):
        rows = papers.read_table(path)
        if rows is None or path.name == "aggregates.csv":
            continue
        if not {"key", "steps_per_second"} & {*rows}:
            rows = rows.drop(columns=hidden, errors="ignore")
            parts.append(folded(f"<code>{path.name}</code>", table(list(rows), rows.to_numpy().tolist())))
    return parts if len(parts) > 1 else []


if __name__ == "__main__":
    main()
