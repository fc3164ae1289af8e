"""Writes benchmark/results/README.md: our runs, and the papers' tables with ours in each cell, or "not run".

    python benchmark/report.py
    python benchmark/report.py --readme README.md      # and, between two marks in it, where the tables stand

From the CSVs in results/, which collect.py and throughput.py wrote, and the papers' numbers in published/. A run fills
a cell if it is the paper's, by its command and its steps; shorter ones are shown as such, apart from the papers'
tables. Made twice, it is the same.
"""

import dataclasses
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papers
import plot_aggregate
import plot_curves
import tyro
import zero_shot
from papers import NOT_RUN, fail, plain, read
from rliable import metrics

FLOORS = ("untrained", "random actions")  # methods that are drawn as a level line
OWN = ("aggregates.csv",)  # tables that this program writes
MARKS = "<!-- report -->", "<!-- /report -->"
RETURNS = {  # columns of the table of a file's runs
    "eval/test_return": "test",
    "eval/train_return": "train",
    "eval/full_look_return": "train, unseen look",
    "eval/color_easy_return": "color_easy",
    "eval/color_hard_return": "color_hard",
    "eval/video_easy_return": "video_easy",
    "eval/video_hard_return": "video_hard",
    "charts/episodic_return": "while learning",
}
EVALUATED = list(RETURNS)[:3]  # on levels and looks of Procgen


@dataclass
class Args:
    results: str = "benchmark/results"  # folder of the CSVs, and of README.md, the pictures and aggregates.csv
    readme: str | None = None  # a Markdown file to put the summary into, between <!-- report --> and <!-- /report -->
    reps: int = 2000  # bootstrap samples of an interval


def main():
    args = tyro.cli(Args)
    folder = Path(args.results)
    if args.reps < 1:
        fail(f"--reps {args.reps}: at least 1")
    try:
        readme = Path(args.readme).read_text() if args.readme else " ".join(MARKS)
        if not all(mark in readme for mark in MARKS):
            fail(f"--readme {args.readme}: no {' ... '.join(MARKS)} in it")
        rows = papers.load(path for path in folder.glob("*.csv"))
        report, summary = write(folder, rows, args.reps)
        (folder / "README.md").write_text(report)
        if args.readme:
            before, after = readme.split(MARKS[0])[0], readme.split(MARKS[1], 1)[1]
            Path(args.readme).write_text(f"{before}{MARKS[0]}\n{summary}\n{MARKS[1]}{after}")
    except (OSError, ValueError) as error:
        fail(error)
    print(folder / "README.md", *[args.readme] * bool(args.readme))


def write(folder, rows, reps):
    """Draws the pictures into a folder. -> the report, its summary."""
    ours = Ours(rows, reps)
    sections = {title: make(ours) for title, make in SECTIONS.items()}
    tables = [plot_aggregates(folder, ours, suite, key) for suite, key in AGGREGATES]
    pd.concat(tables).to_csv(folder / "aggregates.csv", index=False, lineterminator="\n")
    for file, runs in rows.groupby("file"):
        plot_runs(folder, file, runs)
    summary = summarise(sections)
    papers_part = "\n\n".join(f"### {title}\n\n{text}" for title, text in sections.items())
    parts = [HEAD, summary, LEGEND, "## Our runs", *(runs_section(folder, *item) for item in rows.groupby("file"))]
    parts += ["## The papers' tables", CELLS, papers_part, "## Speed", *speed_tables(folder), *other_tables(folder)]
    return "\n\n".join(parts) + "\n", summary


HEAD = """# Results

Written by `python benchmark/report.py` from the CSVs in this folder and the numbers of the papers in
[`published/`](../published/README.md)."""
LEGEND = f"""A cell holds a paper's number and below it ours. "{NOT_RUN}": no run of ours has that row's settings and
the paper's number of steps. What there is instead are the shortened runs below, which fill no cell."""
CELLS = """Upper line: the paper's. Lower line: ours, the mean ± standard deviation over runs, or an aggregate with its
95 % interval. A run belongs to a cell if its command has that row's arguments (`METHODS` in `benchmark/papers.py`) and
it was evaluated after the paper's number of steps. **Where a paper printed only aggregates or drew only figures, this
is said; no number is read off a figure.**"""


def summarise(sections):
    """How many cells of each part have a run."""
    lines = []
    for title, text in sections.items():
        cells, missing = text.count("<br>"), text.count(f"<br><sub>{NOT_RUN}")
        lines.append([title, cells, cells - missing])
    return table(["paper's tables", "cells", "of them with runs of ours"], lines)


# ---- Markdown ----
def table(header, lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *lines])


def folded(title, text):
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def cell(printed, ours):
    """The paper's above ours; small where there is none of ours."""
    return f"{printed}<br>" + (f"<sub>{ours}</sub>" if ours.startswith(NOT_RUN) else f"**{ours}**")


def printed(row):
    return row["value"] + (f" ± {row['std']}" if row["std"] else "")


def measured(values, digits=0):
    """ "12.3 ± 0.4 (3 runs)" of a task's runs."""
    if not values:
        return NOT_RUN
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread} ({len(values)} run{'s' * (len(values) > 1)})"


def amounts(file, name):
    """Rows of METHODS that a row of a paper is the best of: "DrQ+L2, 1e-3" and so on of "DrQ+L2"."""
    rows = papers.METHODS[file]
    return [name] if name in rows else [row for row in rows if row.rpartition(", ")[0] == name] or [name]


class Ours:
    """What our runs put into cells, from the rows of papers.load."""

    def __init__(self, rows, reps):
        self.rows, self.reps = rows, reps

    def task(self, file, name, key, task, mark=0, digits=0):
        """The text of one task's cell."""
        scores = [papers.scores(self.rows, file, name, key, mark).get(plain(task), []) for name in amounts(file, name)]
        return measured(max(scores, key=lambda values: np.mean(values or [-np.inf])), digits)

    def matrix(self, file, name, suite, key="eval/test_return", mark=0):
        """(normalised [runs, tasks], number of tasks with runs); None for the former if there is a task without."""
        scores, tasks = papers.scores(self.rows, file, name, key, mark), plot_aggregate.tasks_of(suite)
        there = sum(task in scores for task in tasks)
        return plot_aggregate.matrix(suite, scores, tasks) if there == len(tasks) else None, there

    def aggregates(self, file, name, suite, digits):
        """{metric: text of its cell} over all tasks of a suite."""
        known = [self.matrix(file, name, suite) for name in amounts(file, name)]
        there = max(there for _, there in known)
        matrix = max((m for m, _ in known if m is not None), key=metrics.aggregate_iqm, default=None)
        if matrix is None:
            text = NOT_RUN + f" ({there} of {len(plot_aggregate.tasks_of(suite))} tasks)" * bool(there)
            return dict.fromkeys(plot_aggregate.METRICS, text)
        values, ends = plot_aggregate.with_intervals(matrix, plot_aggregate.best(suite), self.reps)
        return {
            metric: interval_text(value, low, high, digits) + f" {len(matrix)} runs a task"
            for metric, value, low, high in zip(plot_aggregate.METRICS, values, *ends, strict=True)
        }


def interval_text(value, low, high, digits):
    return f"{value:.{digits}f}" + (f" ({low:.{digits}f}, {high:.{digits}f})" if np.isfinite(low) else "")


# ---- Pictures ----
AGGREGATES = (
    ("atari-100k", "eval/test_return"),
    ("dmc", "eval/test_return"),
    ("dmc-gb", "eval/video_easy_return"),
    ("dmc-gb", "eval/video_hard_return"),
    ("procgen-hard", "eval/test_return"),
)
FILES = {  # whose methods are ours in a suite's aggregates
    "atari-100k": ("drq_sam_reset_atari100k",),
    "dmc": ("sac_sam_reset_dmcm",),
    "dmc-gb": ("pieg_dmcgb",),
    "procgen-hard": ("mdpo_procgen",),
}


def picture(suite, key):
    look = key.removeprefix("eval/").removesuffix("_return")
    return f"aggregates_{suite}{f'_{look}' if look != 'test' else ''}.svg"


def plot_aggregates(folder, ours, suite, key):
    """Draws a suite's aggregates. -> their table."""
    whole = {}
    for file in FILES[suite]:
        for name in papers.METHODS[file]:
            matrix, _ = ours.matrix(file, name, suite, key)
            if matrix is not None:
                whole[name] = plot_aggregate.Scores(matrix, "the paper's steps")
    figure, lines = plot_aggregate.draw(suite, whole, plot_aggregate.tasks_of(suite), key, ours.reps, seed=0)
    save(figure, folder / picture(suite, key))
    return lines.assign(key=key)


def plot_runs(folder, file, runs):
    floor = next((floor for floor in FLOORS if floor in set(runs["method"])), None)
    save(plot_curves.draw_all(runs, floor, plot_curves.printed()), folder / f"{file}.svg")


def save(figure, path):
    plot_curves.save(figure, str(path))
    plt.close(figure)


# ---- Our runs ----
def runs_section(folder, file, runs):
    """The curves, last returns, commands and hardware of one CSV."""
    keys = [key for key in RETURNS if key in set(runs["key"])]
    lines, sources = [], []
    for (method, task), group in runs.groupby(["method", "task"], sort=False):
        last = group.sort_values("step", kind="stable").groupby(["key", "seed"])["value"].last()
        values = [last.get(key, pd.Series(dtype=float)).to_list() for key in keys]
        cells = [f"{np.mean(value):.4g}" if value else "" for value in values]
        lines.append([method, task, group["seed"].nunique(), length_of(group), *cells])
        for command, run in group.groupby("command", sort=False):
            about = run.iloc[0].fillna("")
            sources.append([method, about["seed"], f"`{command}`", about["commit"][:7], about["hardware"]])
    packages = ", ".join(f"`{line}`" for line in runs["packages"].dropna().unique())
    commands = table(["method", "seed", "command", "commit", "hardware"], sources) + f"\n\nPackages: {packages}."
    return "\n\n".join(
        [
            f"### [`{file}.csv`]({file}.csv)",
            f"![Return against steps of the runs in {file}.csv]({file}.svg)",
            "Last values, means over seeds:",
            table(["method", "task", "seeds", "length", *(RETURNS[key] for key in keys)], lines),
            folded("commands, commits and hardware", commands),
        ]
    )


def length_of(runs):
    """How the runs of a method compare with a paper's."""
    step, command = runs["step"].max(), runs["command"].iloc[0]
    cells, (script, _, args) = papers.cells(command), papers.recognised(command)
    if not script:
        return f"{step:,} steps of another program"
    default = dataclasses.replace(papers.arguments(script, ""), env_id=args.env_id)
    whole = cells[0][1] if cells else papers.definite(script, default).total_timesteps
    kind = "whole run" if step >= whole else "shortened run"
    return f"{kind}, {step:,} of {whole:,} steps" + ("" if cells else "; settings that are in no paper's table")


# ---- The papers' tables ----
MDPO = """Xie et al. 2025 draw their returns and print none, so there is no number to compare with; the nearest ones are
those of OpenAI's PPO below. Of their protocol:

{facts}

{drawn}

{games}"""


def mdpo(ours):
    file = "mdpo_procgen"
    rows, methods = read(file), papers.METHODS[file]
    drawn = [[row["method"], row["task"].replace("|", ", "), row["metric"], row["source"]] for row in missing(rows)]
    games = [
        [game, *(cell("figure", both(ours, file, name, game, EVALUATED[:2], 2)) for name in methods)]
        for game in plot_aggregate.tasks_of("procgen-hard")
    ]
    title = "return on unseen / training levels after 50M steps"
    return MDPO.format(
        facts=facts(rows, "mdpo"),
        drawn=folded("what is drawn or lost", table(["method", "games", "what", "where"], drawn)),
        games=folded(title, table(["game", *methods], games)),
    )


def facts(rows, script):
    """What is known of a paper's protocol beside the script's defaults."""
    args = papers.arguments(script, "")
    known = {
        "total_steps_per_agent": args.total_timesteps,
        "total_timesteps_per_worker": args.total_timesteps,
        "train_levels": papers.settings(args)["num_levels"],
        "training_levels": papers.settings(args)["num_levels"],
        "beta_fm_coefficient": getattr(args, "fm_coef", None),
        "clean_probability": getattr(args, "clean_prob", None),
    }
    rows = rows[rows["value"] != ""].to_dict("records")
    lines = [[row["metric"], row["value"], known.get(row["metric"], NOT_RUN), row["source"]] for row in rows]
    return table(["", "paper", f"`{script}.py`", "source"], lines)


def missing(rows):
    return rows[rows["value"] == ""].to_dict("records")


def both(ours, file, name, task, keys, digits=0):
    """Two returns of the same runs in a cell."""
    texts = [ours.task(file, name, key, task, digits=digits) for key in keys]
    return NOT_RUN if set(texts) == {NOT_RUN} else " / ".join(texts)


PROCGEN = """PPO as OpenAI published its runs with Procgen: 3 runs, mean ± standard deviation of the training loop's own
episodes around that many steps; test is the full distribution. In hard mode it learns from batches four times as large
as Xie et al.'s and ours. Ours: `mdpo.py --num-agents 1`, evaluated.

![Aggregates on Procgen]({picture})

{tables}

{scale}"""


def procgen(ours):
    file, parts = "procgen_ppo_openai", []
    single, means = papers.per_task().query("origin == @file"), read(file).query("metric == 'mean_normalised_return'")
    means = {(row["setting"], row["steps_or_frames"]): printed(row) for row in means.to_dict("records")}
    for name in papers.METHODS[file]:
        rows, (mode, levels) = single[single["name"] == name], name.removesuffix(" levels").split(", ")
        columns = list(dict.fromkeys(zip(rows["key"], rows["mark"], strict=True)))
        known = {(row["task"], row["key"], row["mark"]): printed(row) for row in rows.to_dict("records")}
        lines = [
            [task, *(cell(known[task, key, mark], ours.task(file, name, key, task, mark, 3)) for key, mark in columns)]
            for task in rows["task"].unique()
        ]
        mean = ["**mean, normalised**"]
        for key, mark in columns:
            matrix, _ = ours.matrix(file, name, f"procgen-{mode}", key, mark)
            own = NOT_RUN if matrix is None else f"{matrix.mean():.4f}"
            mean.append(cell(means[f"{mode}-{levels}; {short(key)} curve", str(mark)], own))
        header = ["game", *(f"{short(key)}, {mark // 10**6}M steps" for key, mark in columns)]
        parts.append(folded(f"{mode} mode, {levels} training levels", table(header, [*lines, mean])))
    scale = read("procgen_normalisation").pivot(index="game", columns="distribution_mode", values=["r_min", "r_max"])
    ends = [(end, mode) for mode in ("easy", "hard") for end in ("r_min", "r_max")]
    lines = [[game, *(row[end] for end in ends)] for game, row in scale.iterrows()]
    header = ["game", "easy: 0 is", "easy: 1 is", "hard: 0 is", "hard: 1 is"]
    return PROCGEN.format(
        picture=picture("procgen-hard", "eval/test_return"),
        tables="\n\n".join(parts),
        scale=folded("normalised returns: which return is 0 and which is 1", table(header, lines)),
    )


def short(key):
    return key.removeprefix("eval/").removesuffix("_return")


NETRAND = """No number of Lee et al. 2020's tables was at hand. Of its protocol (the script's 25M steps are ours, usual
on Procgen):

{facts}

{missing}

Ours, CoinRun in the plain look:

{runs}"""


def netrand(ours):
    file = "netrand_coinrun"
    gaps = [[row["task"], row["metric"], row["source"]] for row in missing(read(file))]
    lines = [
        [name, *(cell("not at hand", ours.task(file, name, key, "coinrun", digits=2)) for key in EVALUATED)]
        for name in papers.METHODS[file]
    ]
    return NETRAND.format(
        facts=facts(read(file), "ppo_netrand"),
        missing=table(["task", "what", "why it is missing"], gaps),
        runs=table(["method", *(RETURNS[key] for key in EVALUATED)], lines),
    )


ATARI = """Human-normalised scores after 100,000 steps. **Only aggregates are known**: the games' own scores in Lee et
al. 2023's appendix did not survive in the text at hand. Its optimality gaps are those of the appendix. The interval of
DER+SAM's mean does not contain the mean; both are as printed.

![Aggregates on Atari-100k]({picture})

**Lee et al. 2023, Tables 1 and 6.** DrQ's replay ratio is 2, DER's is not stated. In brackets: intervals of 95 %.

{tables_1_and_6}

**Lee et al. 2023, Table 3**, the method with shrink and perturb beside others'.

{table_3}

**Other implementations** (rliable's study, 100 runs a game; aggregates computed from its files). They are not Lee et
al.'s DER and DrQ.

{others}

{games}"""
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
    file, rows = "drq_sam_reset_atari100k", read("drq_sam_reset_atari100k")
    third = rows["source"].str.contains("Table 3")
    return ATARI.format(
        picture=picture("atari-100k", "eval/test_return"),
        tables_1_and_6=aggregated(ours, rows[~third], file, "atari-100k", 3, ATARI_COLUMNS),
        table_3=aggregated(ours, rows[third], file, "atari-100k", 3, ATARI_COLUMNS),
        others=others(read("atari100k_other_baselines").query("metric != 'score'")),
        games=folded("game by game: mean ± standard deviation over runs", games_table(ours, file)),
    )


def aggregated(ours, rows, file, suite, digits, columns):
    """A line a method and setting, a column a metric of {metric: title}, numbers with the interval that they have."""
    titles = list(dict.fromkeys(title for metric, title in columns.items() if metric in set(rows["metric"])))
    lines = []
    for (method, setting), group in rows.groupby(["method", "setting"], sort=False):
        name = f"{method}, {setting}" if setting.startswith("replay ratio") else method
        known, own = dict(group[["metric", "value"]].to_numpy()), ours.aggregates(file, name, suite, digits)
        line = dict.fromkeys(titles, "")
        for metric, value in known.items():
            if metric in columns:
                ends = [known[f"{metric}_ci95_{end}"] for end in ("low", "high") if f"{metric}_ci95_{end}" in known]
                value += f" ({', '.join(ends)})" if ends else ""
                line[columns[metric]] = cell(value, own.get(columns[metric], NOT_RUN))
        lines.append([name, *line.values()])
    return table(["method", *titles], lines)


def others(rows):
    """Aggregates of implementations that no script of ours is."""
    known = rows.pivot(index="method", columns="metric", values="value")
    metrics = [metric for metric in ATARI_COLUMNS if metric in known]
    lines = [[method, *(cell(row[metric], NOT_RUN) for metric in metrics)] for method, row in known.iterrows()]
    return table(["method", *(ATARI_COLUMNS[metric] for metric in metrics)], lines)


def games_table(ours, file):
    rows, own = read("atari100k_other_baselines"), ("DER", "DER+SAM+Reset", "DrQ", "DrQ+SAM+Reset")
    scores = {(row["task"], row["method"]): printed(row) for row in rows.to_dict("records")}
    methods, lines = list(dict.fromkeys(rows["method"])), []
    for row in read("atari_human_random").to_dict("records"):
        texts = [scores[row["game"], method] for method in methods]
        texts += [cell("lost", ours.task(file, name, EVALUATED[0], row["game_snake_case"], digits=1)) for name in own]
        lines.append([row["game"], row["random_score"], row["human_score"], *texts])
    header = ["game", "random", "human", *(f"{method}, 100 runs" for method in methods)]
    return table([*header, *(f"{name}, Lee et al." for name in own)], lines)


DMC = """Returns on the 11 tasks of DMC-M after 2M frames: 1M steps, or 500,000 of cheetah-run and reacher-easy.

![Aggregates on DMC-M]({picture})

**Lee et al. 2023, Table 2.** In brackets: intervals of 95 %.

{table_2}

The runs behind two of its rows are public (rl_with_resets, 10 seeds) and show how the others are to be read. rliable
gives the printed IQM and mean, to which the axes do not matter, but another median and narrower intervals; with runs
and tasks exchanged it gives the printed ones. So **the paper's median is one over runs of the mean over tasks, and its
intervals draw tasks again, not runs**. Ours are rliable's: compare IQM and mean with the table above, median and
intervals with the lines "rliable" below.

{exchanged}

The same, as `published/` has it:

{computed}

**Task by task.** DrQ-SAC and DrQ-SAC+Reset are computed from those runs; the cells of the paper's appendix did not
survive in the text at hand.

{tasks}"""
DMC_COLUMNS = {
    "return_iqm": "IQM",
    "return_median": "median",
    "return_median_of_task_means": "median",
    "return_mean": "mean",
}


def dmc(ours):
    file, rows = "sac_sam_reset_dmcm", read("sac_sam_reset_dmcm")
    table_2 = rows[rows["source"].str.contains("Table 2")]
    tasks = rows[rows["metric"] == "return_mean_over_seeds"].to_dict("records")
    known = {(row["task"], row["method"]): printed(row) for row in tasks}
    methods, lines = table_2["method"].unique(), []
    for task in dict.fromkeys(row["task"] for row in tasks):
        own = [ours.task(file, name, EVALUATED[0], task, digits=1) for name in methods]
        theirs = [known.get((task, name), "lost") for name in methods]
        lines.append([task, *map(cell, theirs, own)])
    return DMC.format(
        picture=picture("dmc", "eval/test_return"),
        table_2=aggregated(ours, table_2, file, "dmc", 0, DMC_COLUMNS),
        exchanged=exchanged(ours.reps),
        computed=aggregated(ours, rows[rows["setting"].str.endswith("last evaluation")], file, "dmc", 1, DMC_COLUMNS),
        tasks=table(["task", *methods], lines),
    )


def exchanged(reps):
    """rliable's aggregates of the published runs, and those with the axes exchanged."""
    lines, tasks = [], plot_aggregate.tasks_of("dmc")
    for name, scores in plot_aggregate.paper_runs("dmc", tasks, "eval/test_return").items():
        for how, matrix in (("rliable", scores.matrix), ("runs and tasks exchanged", scores.matrix.T)):
            values, ends = plot_aggregate.with_intervals(matrix, 1000, reps)
            texts = [interval_text(*numbers, 1) for numbers in zip(values, *ends, strict=True)]
            lines.append([name, how, *texts[:3]])
    return table(["published runs of", "", *plot_aggregate.METRICS[:3]], lines)


PIEG = """**Yuan et al. 2022 (workshop version), Table 1.** Returns in two of DMC-GB's looks. The paper says neither how
many runs nor how many steps (ours: 500,500). Our SVEA is DrQ-v2 with overlaid pictures, which is close to it.

![Aggregates in video_easy]({easy})

![Aggregates in video_hard]({hard})

{table_1}

Its text: +{gain} % on average in video_hard, {pairs} of 12 pairs as good or better, and {features} % less difference
between the features of two backgrounds than SVEA's.

**Table 2, DrawerWorld**, drawer-close. `benchmark/drawerworld.py` is made of another Meta-World, and its figures are
not to be set beside these. The text says +{success} % on average.

{table_2}

**Table 3, where the encoder is cut.** The paper does not say in which look; ours are video_easy / video_hard.

{table_3}"""


def pieg(ours):
    rows = read("pieg_dmcgb")
    text = {(row["task"], row["metric"]): row["value"] for row in rows.to_dict("records")}
    return PIEG.format(
        easy=picture("dmc-gb", "eval/video_easy_return"),
        hard=picture("dmc-gb", "eval/video_hard_return"),
        table_1=looks(ours, rows),
        gain=text["6 tasks mean", "gain_over_best_baseline_percent"],
        pairs=text["12 task-mode pairs", "pairs_competitive_or_better"],
        features=text["walker", "mean_intensity_decrease_percent"],
        success=text["all", "gain_percent_mean"],
        table_2=textures(rows[rows["metric"] == "success_rate_percent"]),
        table_3=layers(ours, rows[rows["setting"].str.startswith("encoder cut")]),
    )


def looks(ours, rows):
    known, lines = zero_shot.published(), []
    gains = rows[rows["metric"] == "gain_over_best_baseline_percent"].to_dict("records")
    gains = {(row["task"].replace("_", "-"), row["setting"]): f"+{row['value']} %" for row in gains}
    for task, look in known["PIE-G"]:
        own = [ours.task("pieg_dmcgb", name, f"eval/{look}_return", task) for name in known]
        theirs = [cells[task, look] for cells in known.values()]
        lines.append([task, look, *map(cell, theirs, own), gains.get((task, look), "")])
    return table(["task", "look", *known, "printed gain over the best baseline"], lines)


def textures(rows):
    known = rows.pivot(index="setting", columns="method", values="value").loc[rows["setting"].unique()]
    lines = [[texture, *(cell(f"{value} %", NOT_RUN) for value in row)] for texture, row in known.iterrows()]
    return table(["texture", *known], lines)


def layers(ours, rows):
    keys, lines = ("eval/video_easy_return", "eval/video_hard_return"), defaultdict(list)
    for row in rows.to_dict("records"):
        name = "PIE-G, " + re.search(r"layer \d", row["setting"])[0]
        lines[row["task"]].append(cell(printed(row), both(ours, "pieg_dmcgb", name, row["task"], keys)))
    return table(["task", *(f"layer {n}" for n in (1, 2, 3, 4))], [[task, *texts] for task, texts in lines.items()])


SECTIONS = {
    "Procgen, MDPO": mdpo,
    "Procgen, OpenAI's PPO": procgen,
    "CoinRun, network randomization": netrand,
    "Atari-100k, SAM and resets": atari,
    "DMC-M, SAM and resets": dmc,
    "DMC-GB and DrawerWorld, PIE-G": pieg,
}


# ---- Other CSVs ----
def speed_tables(folder):
    """Means over the iterations of throughput.py's CSVs."""
    parts = []
    for path in sorted(folder.glob("*.csv")):
        rows = pd.read_csv(path)
        if "steps_per_second" in rows:
            groups = rows.groupby(["name", "command", "precision", "hardware"], dropna=False, sort=False)
            lines = [
                [
                    name,
                    precision if precision == precision else "",
                    f"{group['steps_per_second'].mean():.4g}",
                    f"{group['peak_gb'].max():.2g}",
                    len(group),
                    f"`{command}`",
                    hardware,
                ]
                for (name, command, precision, hardware), group in groups
            ]
            header = ["program", "precision", "steps/s", "peak memory, GB", "iterations", "command", "hardware"]
            parts.append(f"[`{path.name}`]({path.name})\n\n{table(header, lines)}")
    return parts


def other_tables(folder):
    """CSVs of other programs as they are, without the columns that say where they were made."""
    parts, hidden = [], ["command", "commit", "packages", "hardware"]
    for path in sorted(folder.glob("*.csv")):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        if path.name not in OWN and not {"key", "steps_per_second"} & {*rows}:
            rows = rows.drop(columns=hidden, errors="ignore")
            parts.append(folded(f"<code>{path.name}</code>", table(list(rows), rows.to_numpy().tolist())))
    return ["## Other tables", *parts] if parts else []


if __name__ == "__main__":
    main()
