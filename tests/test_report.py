"""From runs to tables: which run fills which cell, rliable's aggregates, and every published number in the report."""

import csv
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from rliable import library, metrics
from test_curves import run

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "tables")]
import papers
import plot_aggregate
import report

RESULTS = ROOT / "benchmark" / "results"
BASE = {"reset_every": 0, "sam": False}  # DrQ's changes to drq_sam_reset.py
ATARI = "drq_sam_reset_atari100k"


def rows_of(
    script="drq_sam_reset",
    changed=BASE,
    tasks=("Krull",),
    seeds=(1,),
    steps=(50_000, 100_000),
    suite="atari-100k",
    default_steps=100_000,
    episodes=100,
):
    """Rows as collect.py writes them, of runs called "mine", each evaluation with another return."""
    rows = []
    for task in tasks:
        for seed in seeds:
            for step in steps:
                row = {"method": "mine", "suite": suite, "task": task, "seed": seed, "step": step}
                row |= {"key": "eval/test_return", "value": 1000.0 + 7 * len(rows), "script": script}
                row |= {"changed": papers.as_text(changed), "default_steps": default_steps, "episodes": episodes}
                command = f"python algos/{script}.py --env-id {task} --seed {seed}"
                rows.append(row | {"command": command, "commit": "c0ffee", "packages": "torch==2", "hardware": "x"})
    return pd.DataFrame(rows)


def loaded(tmp_path, *tables):
    for n, table in enumerate(tables):
        table.to_csv(tmp_path / f"{n}.csv", index=False)
    return papers.load(tmp_path.glob("*.csv"))


# ---- Which run fills which cell ----
def test_a_run_is_known_by_its_arguments_and_its_steps(tmp_path):
    rows = loaded(
        tmp_path,
        rows_of(seeds=(1, 2)),
        rows_of(changed=BASE | {"batch_size": 64}, seeds=(3,)),  # other settings
        rows_of(seeds=(4,), steps=(50_000, 99_000)),  # too short
        rows_of(script="mine", seeds=(5,)).assign(changed="", default_steps=""),  # a copy
        rows_of(script="drq_sam_reset crelu", seeds=(6,)),  # an ablation
        rows_of(changed=BASE | {"precision": "bf16"}, seeds=(7,)),
        rows_of(seeds=(8,), episodes=99),  # of the paper's 100 games
        rows_of(seeds=(9,)).drop(columns="episodes"),  # of a version that did not say
    )
    ours = report.Ours(rows, reps=10)
    cell = partial(ours.task, ATARI, key="eval/test_return", task="krull")
    assert cell(name="DrQ") == "1014 ± 10 (2 runs)"  # the second evaluations: 1007 and 1021
    assert cell(name="DrQ+SAM") == cell(name="DER") == papers.NOT_RUN
    assert cell(name="DrQ", task="pong") == papers.NOT_RUN
    assert cell(name="DrQ+CReLU") == "1007 (1 run)"
    # The first evaluation after the paper's steps counts, not the last one of all.
    longer = report.Ours(loaded(tmp_path, rows_of(steps=(50_000, 100_000, 200_000))), 10)
    assert longer.task(ATARI, "DrQ", "eval/test_return", "krull").startswith("1007")


def args_of(script, changes):
    """A script's arguments as args.json has them. The pictures to overlay need not be here."""
    module = papers.module(script)
    there = {"overlay_dir": str(ROOT)} if "overlay_dir" in changes else {}
    return dataclasses.replace(module.check(module.Args(**changes | there)), **changes)


METHODS = [(file, name) for file, methods in papers.METHODS.items() for name in methods]


@pytest.mark.parametrize(("file", "name"), METHODS)
def test_a_run_with_a_methods_arguments_is_known_as_it(file, name):
    """As they are in args.json, without defaults; however it is watched and wherever it runs."""
    method = papers.METHODS[file][name]
    script = method.script.split()[0]
    watched = {"seed": 3, "eval_every": 5_000, "precision": "tf32", "exp_name": "x", "cuda": False}
    changed, steps = papers.changes(script, args_of(script, method.changed | watched))
    assert changed == method.changed
    assert (file, name) in papers.cells(method.script, papers.as_text(changed))
    assert steps == args_of(script, {}).total_timesteps


@pytest.mark.parametrize(
    ("script", "changes", "cells"),
    [
        ("drq_sam_reset", {}, [(ATARI, "DrQ+SAM+Reset")]),
        ("drq_sam_reset", {"precision": "tf32", "eval_every": 5, "replay_ratio": 2}, [(ATARI, "DrQ+SAM+Reset")]),
        ("drq_sam_reset", {"precision": "bf16"}, []),
        ("drq_sam_reset", {"augment": False, "sam": False}, [(ATARI, "DER+Reset")]),
        ("drq_sam_reset", {"sam_rho": 0.3}, []),
        (
            "sac_sam_reset",
            {"env_id": "finger_turn_hard", "sam_rho": 0.01},
            [("sac_sam_reset_dmcm", "DrQ-SAC+SAM+Reset")],
        ),
        ("drqv2_pieg", {}, []),  # made-up textures are not the paper's pictures
        ("drqv2_pieg", {"overlay_dir": "there"}, [("pieg_dmcgb", "PIE-G"), ("pieg_dmcgb", "PIE-G, layer 2")]),
        ("mdpo", {"env_id": "maze", "num_levels": 500}, [("mdpo_procgen", "MDPO")]),
        ("mdpo", {"num_agents": 1}, [("procgen_ppo_openai", "hard, 500 levels"), ("mdpo_procgen", "PPO")]),
        ("mdpo", {"num_agents": 1, "num_levels": 200}, []),
        ("ppo_netrand", {"plain_look": True, "netrand": False}, [("netrand_coinrun", "PPO")]),
    ],
)
def test_cells_of_arguments(script, changes, cells):
    changed, _ = papers.changes(script, args_of(script, changes))
    assert papers.cells(script, papers.as_text(changed)) == cells


def test_of_three_amounts_of_l2_the_best_is_in_the_cell(tmp_path):
    weak, strong = (rows_of(f"drq_sam_reset l2_1e-{n}", seeds=(7, 8)) for n in (5, 3))
    ours = report.Ours(loaded(tmp_path, weak, strong.assign(value=strong["value"] + 50)), 5)
    assert ours.task(ATARI, "DrQ+L2", "eval/test_return", "krull") == "1064 ± 10 (2 runs)"


@pytest.mark.parametrize(("task", "steps"), [("walker-run", 1_000_000), ("cheetah-run", 500_000)])
def test_steps_that_a_cell_asks_for(task, steps):
    """The paper's: 2M frames are 1M steps, or half of that where a step is four frames."""
    args = args_of("sac_sam_reset", {"env_id": task, "total_timesteps": 1000})
    assert papers.changes("sac_sam_reset", args) == ({}, steps)


# ---- rliable ----
@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    return rng.normal(0.5, 0.4, (5, 7)), rng.normal(0.7, 0.4, (5, 7))


def test_aggregates_are_rliables(matrices):
    functions = [
        metrics.aggregate_iqm,
        metrics.aggregate_median,
        metrics.aggregate_mean,
        metrics.aggregate_optimality_gap,
    ]
    for matrix in matrices:
        values, ends = plot_aggregate.with_intervals(matrix, 1, reps=40, seed=3)
        np.random.seed(3)  # noqa: NPY002
        theirs, their_ends = library.get_interval_estimates(
            {"x": matrix}, lambda scores: np.array([function(scores) for function in functions]), reps=40
        )
        np.testing.assert_array_equal(values, theirs["x"])
        np.testing.assert_array_equal(ends, their_ends["x"])
        assert (ends[0] < values).all() and (values < ends[1]).all()


def test_profiles_and_improvements_are_rliables(matrices):
    taus = np.linspace(-1, 2, 9)
    shares, _ = plot_aggregate.estimates(matrices[0], lambda x: library.score_distributions(x, taus), reps=5, seed=0)
    theirs, _ = library.create_performance_profile({"x": matrices[0]}, taus, reps=5)
    np.testing.assert_array_equal(shares, theirs["x"])
    value, (low, high) = plot_aggregate.improvement(*matrices, reps=40)
    assert value == metrics.probability_of_improvement(*matrices)
    assert low < value < high < 1
    assert plot_aggregate.improvement(matrices[0] + 9, matrices[0], reps=5)[0] == 1


def test_aggregates_by_hand():
    """Runs 0 and 100 on each of four tasks, one task always 1000: means over runs are 50, 50, 50, 1000."""
    matrix = np.array([[0.0, 0, 0, 1000], [100, 100, 100, 1000]])
    values, _ = plot_aggregate.with_intervals(matrix, 1000, reps=5)
    np.testing.assert_allclose(values, [75, 50, 287.5, 712.5])  # IQM: of 0, 100, 100, 100
    single, ends = plot_aggregate.with_intervals(matrix[:1], 1000)
    assert single[2] == 250 and np.isnan(ends).all()


def test_a_cell_of_aggregates_needs_all_tasks(tmp_path):
    games = list(papers.read("atari_human_random")["game"])
    assert len(games) == 26
    some = report.Ours(loaded(tmp_path, rows_of(tasks=games[1:])), reps=20)
    cells = some.aggregates(ATARI, "DrQ", "atari-100k", 3)
    assert set(cells.values()) == {"not run (25 of 26 tasks)"}
    rows = loaded(tmp_path, rows_of(tasks=games, seeds=(1, 2)))
    cells = report.Ours(rows, reps=20).aggregates(ATARI, "DrQ", "atari-100k", 3)
    last = rows[rows["step"] == 100_000].pivot(index="seed", columns="task", values="value")[games].to_numpy()
    known = papers.read("atari_human_random").set_index("game").loc[games]
    low, high = known["random_score"].astype(float).to_numpy(), known["human_score"].astype(float).to_numpy()
    scores = (last - low) / (high - low)
    assert cells["IQM"].startswith(f"{metrics.aggregate_iqm(scores):.3f} (")
    assert cells["IQM"].endswith("2 runs per task")
    assert cells["optimality gap"].startswith(f"{metrics.aggregate_optimality_gap(scores):.3f} (")


# ---- plot_aggregate.py ----
def test_the_figures_table(tmp_path, monkeypatch, capsys):
    table = tmp_path / "runs.csv"
    rows = rows_of("mdpo", {"distribution_mode": "easy"}, ("maze",), (1, 2), suite="procgen-easy")
    other = rows_of("x", {}, ("miner",), suite="procgen-easy").assign(method="elsewhere", changed="")
    pd.concat([rows, other]).to_csv(table, index=False)
    out = tmp_path / "x.svg", tmp_path / "x.csv"
    flags = ("procgen-easy", table, "--tasks", "maze", "--out", out[0], "--csv", out[1], "--reps", "5")
    run(plot_aggregate, monkeypatch, *flags)
    lines = list(csv.DictReader(out[1].open()))
    assert list(lines[0]) == plot_aggregate.FIELDS
    assert {line["whose"] for line in lines} == {"ours", "published tasks"}
    mean = {line["method"]: line["value"] for line in lines if line["metric"] == "mean"}
    assert float(mean["mine"]) == pytest.approx((1014 - 5) / (10 - 5), abs=0.1)
    assert float(mean["PPO (OpenAI), easy, 200 levels, 25M"]) == pytest.approx((5.9 - 5) / 5, abs=0.25)
    before = [path.read_bytes() for path in out]
    run(plot_aggregate, monkeypatch, *flags)
    assert before == [path.read_bytes() for path in out]
    run(plot_aggregate, monkeypatch, "procgen-easy", table, "--out", out[0], "--reps", "5")
    assert "left out: mine, which has runs of 1 of 16 tasks" in capsys.readouterr().err


def test_ours_and_published_runs_of_one_name_stand_side_by_side(tmp_path):
    tasks = plot_aggregate.tasks_of("dmc")
    rows = rows_of("sac_sam_reset", BASE, tasks, (1, 2), steps=(10**6,), suite="dmc").assign(method="DrQ-SAC")
    mine, left_out = plot_aggregate.matrices("dmc", loaded(tmp_path, rows), tasks, "eval/test_return")
    assert mine["DrQ-SAC"].matrix.shape == (2, 11) and not left_out
    figure, _ = plot_aggregate.draw("dmc", mine, tasks, "eval/test_return", 3, 0)
    texts = [text.get_text() for text in figure.axes[-2].get_legend().get_texts()]
    assert texts == ["DrQ-SAC, ours", "DrQ-SAC, published runs", "DrQ-SAC+Reset, published runs"]
    plt.close(figure)


@pytest.mark.parametrize(
    "flags",
    [
        ["atari-100k", "{}/0.csv", "--out", "{}/x.svg", "--tasks", "tetris"],
        ["atari-100k", "{}/0.csv", "--out", "{}/x.pdf"],
        ["atari-100k", "{}/0.csv", "--out", "{}/no/x.svg", "--reps", "2"],
        ["atari-100k", "{}/0.csv", "--out", "{}/x.svg", "--reps", "0"],
        ["atari-100k", "{}/nowhere.csv", "--out", "{}/x.svg"],
        ["atari-100k", "{}/0.csv", "--out", "{}/x.svg", "--key", "eval/nothing"],
    ],
)
def test_plot_aggregate_says_what_is_wrong(flags, tmp_path, monkeypatch, capsys):
    loaded(tmp_path, rows_of())
    with pytest.raises(SystemExit, match=r"^2$"):
        run(plot_aggregate, monkeypatch, *(flag.format(tmp_path) for flag in flags))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


# ---- The report ----
def copy_results(folder):
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of a copy of the results, made with few bootstrap samples and without its pictures."""
    folder = tmp_path_factory.mktemp("results")
    copy_results(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report, "plot_runs", lambda *_: None)
        monkeypatch.setattr(report, "save", lambda figure, _: plt.close(figure))
        run(report, monkeypatch, "--results", folder, "--reps", 3)
    return (folder / "README.md").read_text()


def numbers(text):
    return Counter(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\d.]*\w)", text.replace("<br>", " ")))


@pytest.mark.parametrize("file", [*sorted(papers.METHODS), "atari100k_other_baselines"])
def test_every_published_number_is_in_the_report(file, written):
    """As often as it was published, in its own section, each beside ours or "not run"."""
    title = {
        "mdpo_procgen": "Procgen, MDPO",
        "procgen_ppo_openai": "Procgen, OpenAI's PPO",
        "netrand_coinrun": "CoinRun, network randomization",
        "sac_sam_reset_dmcm": "DMC-M, SAM and resets",
        "pieg_dmcgb": "DMC-GB and DrawerWorld, PIE-G",
    }.get(file, "Atari-100k, SAM and resets")
    section = written.split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
    rows = papers.read(file)
    published = numbers(" ".join(rows["value"]) + " " + " ".join(rows["std"]))
    assert published and not published - numbers(section)
    for line in section.split("\n"):  # no cell of the papers' without ours
        for text in re.findall(r"[^|]*<br>[^|]*", line):
            assert re.search(r"<br>(<sub>not run[^<]*</sub>|\*\*.+\*\*) $", text), text


def test_lookup_tables_are_in_the_report(written):
    for file, columns in (
        ("atari_human_random", ("random_score", "human_score")),
        ("procgen_normalisation", ("r_min", "r_max")),
    ):
        rows = papers.read(file)
        assert not numbers(" ".join(rows[list(columns)].to_numpy().ravel())) - numbers(written)


def test_shortened_runs_are_shown_as_such_and_fill_no_cell(written):
    runs, tables = written.split("## The papers' tables")
    assert "shortened run, 25,000 of 100,000 steps" in runs
    assert re.findall(r"<br>\*\*", tables) == []
    for file in ("drq_sam_reset_krull", "mdpo_starpilot_easy"):
        assert f"![Return against steps of the runs in {file}.csv]({file}.svg)" in runs


def test_a_whole_run_is_in_its_cell(tmp_path):
    rows = loaded(tmp_path, rows_of(seeds=(1, 2)))
    section = report.atari(report.Ours(rows, reps=3))
    (line,) = [line for line in section.split("\n") if line.startswith("| Krull ")]
    assert "lost<br>**1014.0 ± 9.9 (2 runs)**" in line
    lines = report.summarise({"Atari": section}).split("\n")
    assert re.fullmatch(r"\| Atari \| \d+ \| 1 \|", lines[2])
    assert "| whole run, 100,000 of 100,000 steps | 1014 |" in report.runs_section("0", rows)


def test_hours_and_parameters_of_whole_runs(tmp_path):
    """Of a run with a GPU, up to the evaluation that counts, which has a save before it and one after it."""
    runs = rows_of(seeds=(1, 2)).assign(parameters=6_868_842, hardware="NVIDIA H100, 16 cores x")
    runs.loc[runs["seed"] == 2, "hardware"] = "no GPU, 2 cores x"
    saves = [runs.assign(key="charts/hours", value=runs["step"] / 1e5 * hours, episodes="") for hours in (1.5, 2.0)]
    longer = runs.assign(key="charts/hours", value=9.0, episodes="", step=120_000)
    rows = loaded(tmp_path, pd.concat([runs, *saves, longer]), rows_of(seeds=(3,)))
    ours = report.Ours(rows, reps=3)
    assert ours.costs(ATARI, "DrQ") == {"parameters, M": "6.9", "GPU hours": "2.0 (NVIDIA H100)"}
    assert ours.costs(ATARI, "DrQ", ["Pong"]) == ours.costs(ATARI, "DrQ+SAM") == ours.costs(ATARI, "IRIS") == {}
    lines = report.runs_section("0", rows).split("\n")
    ends = [line.split(" | ")[-3:] for line in lines if "| `python" in line]
    assert ends[0] == ["9", "6,868,842", "NVIDIA H100, 16 cores x |"]
    assert ends[1:] == [["9", "6,868,842", "no GPU, 2 cores x |"], ["-", "-", "x |"]]


@pytest.mark.slow
def test_made_twice_it_is_the_same(written, tmp_path, monkeypatch):
    copy_results(tmp_path)
    run(report, monkeypatch, "--results", tmp_path, "--reps", 3)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"README.md", "aggregates.csv", "drq_sam_reset_krull.svg", "aggregates_dmc.svg"} <= set(first)
    assert first["README.md"].decode() == written
    run(report, monkeypatch, "--results", tmp_path, "--reps", 3)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_report_in_the_repository_is_of_its_results(written):
    """But for bootstrap intervals, which are of more samples there. If not: python benchmark/tables/report.py."""

    def fixed(text):
        lines = []
        for line in text.split("\n"):
            if line.count("| coins-") == 1:  # a method's returns in each split
                line = re.sub(r" \([\d.]+, [\d.]+\)", "", line)
            if not re.search(r"\| (rliable|runs and tasks exchanged) \|", line):
                lines.append(line)
        return lines

    assert fixed((RESULTS / "README.md").read_text()) == fixed(written)


@pytest.mark.parametrize("flags", [["--results", "{}/nowhere"], ["--reps", "0"]])
def test_report_says_what_is_wrong(flags, tmp_path, monkeypatch, capsys):
    loaded(tmp_path, rows_of())
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(tmp_path) for flag in flags]
    with pytest.raises(SystemExit, match=r"^2$"):
        run(report, monkeypatch, *([] if "--results" in flags else ["--results", tmp_path]), *flags)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_the_report_where_text_is_not_utf8_by_default(tmp_path):
    """As under LC_ALL=en_US.ISO-8859-1: written all the same, and with the same bytes."""
    shutil.copytree(RESULTS, tmp_path / "results")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = [sys.executable, ROOT / "benchmark" / "tables" / "report.py", "--results", tmp_path / "results"]
    subprocess.run(program, env=environment, check=True, cwd=ROOT)
    for name in ("README.md", "drq_sam_reset_krull.svg"):
        assert (tmp_path / "results" / name).read_bytes() == (RESULTS / name).read_bytes()
