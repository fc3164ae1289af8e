"""From runs to tables: which run fills which cell, rliable's aggregates, and every published number in the report."""

import csv
import re
import shutil
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

sys.path.insert(0, str(ROOT / "benchmark"))
import ablations
import papers
import plot_aggregate
import report

RESULTS = ROOT / "benchmark" / "results"
DRQ = "python algos/drq_sam_reset.py --env-id {} --no-sam --reset-every 0 --seed {}"


def rows_of(command, tasks=("krull",), seeds=(1,), steps=(50_000, 100_000), suite="atari-100k", key="eval/test_return"):
    """Rows as collect.py writes them, of runs called "mine", each evaluation with another return."""
    values = iter(range(1000, 10**6, 7))
    runs = [(task, seed, step) for task in tasks for seed in seeds for step in steps]
    return pd.DataFrame(
        [
            [
                "mine",
                suite,
                task,
                seed,
                step,
                key,
                float(next(values)),
                command.format(task, seed),
                "c0ffee",
                "torch==2",
                "x",
            ]
            for task, seed, step in runs
        ],
        columns=[
            "method",
            "suite",
            "task",
            "seed",
            "step",
            "key",
            "value",
            "command",
            "commit",
            "packages",
            "hardware",
        ],
    )


def loaded(tmp_path, *tables):
    for n, table in enumerate(tables):
        table.to_csv(tmp_path / f"{n}.csv", index=False)
    return papers.load(tmp_path.glob("*.csv"))


# ---- Which run fills which cell ----
def test_a_run_is_known_by_its_command_and_its_steps(tmp_path):
    rows = loaded(
        tmp_path,
        rows_of(DRQ, seeds=(1, 2)),
        rows_of(DRQ + " --batch-size 64", seeds=(3,)),  # other settings
        rows_of(DRQ, seeds=(4,), steps=(50_000, 99_000)),  # too short
        rows_of(DRQ + " --resume runs/x", seeds=(5,)),
        rows_of(DRQ.replace("algos/drq_sam_reset.py", "elsewhere.py"), seeds=(6,)),
    )
    ours = report.Ours(rows, reps=10)
    cell = partial(ours.task, "drq_sam_reset_atari100k", key="eval/test_return", task="krull")
    assert cell(name="DrQ") == "1014 ± 10 (2 runs)"  # the second evaluations: 1007 and 1021
    assert cell(name="DrQ+SAM") == cell(name="DER") == papers.NOT_RUN
    assert cell(name="DrQ", task="pong") == papers.NOT_RUN
    # The first evaluation after the paper's steps counts, not the last one of all.
    longer = report.Ours(loaded(tmp_path, rows_of(DRQ, steps=(50_000, 100_000, 200_000))), 10)
    assert longer.task("drq_sam_reset_atari100k", "DrQ", "eval/test_return", "krull").startswith("1007")


@pytest.mark.parametrize(
    ("command", "cells"),
    [
        ("algos/drq_sam_reset.py --env-id pong", [("drq_sam_reset_atari100k", "DrQ+SAM+Reset")]),
        ("algos/drq_sam_reset.py --env-id pong --precision bf16 --eval-every 5 --replay-ratio 2 --seed 3", 1),
        ("algos/drq_sam_reset.py --env-id pong --no-augment --no-sam", [("drq_sam_reset_atari100k", "DER+Reset")]),
        ("algos/drq_sam_reset.py --env-id pong --sam-rho 0.3", []),
        ("algos/drq_sam_reset.py --no-such-flag 1", []),
        ("algos/drq_sam_reset.py --evaluate runs/x", []),
        (
            "algos/drq_sam_reset.py --replay-ratio 8 --shrink-perturb 0.8",
            [("drq_sam_reset_atari100k", "DrQ+SAM+Reset+ShrinkPerturb, replay ratio 8")],
        ),
        (
            "algos/sac_sam_reset.py --env-id finger_turn_hard --sam-rho 0.01",
            [("sac_sam_reset_dmcm", "DrQ-SAC+SAM+Reset")],
        ),
        ("algos/drqv2_pieg.py", []),  # made-up textures are not the paper's pictures
        ("algos/drqv2_pieg.py --overlay-dir there", [("pieg_dmcgb", "PIE-G"), ("pieg_dmcgb", "PIE-G, layer 2")]),
        ("algos/drqv2_pieg.py --overlay-dir there --encoder-layer 4", [("pieg_dmcgb", "PIE-G, layer 4")]),
        ("algos/mdpo.py --env-id maze --num-levels 500", [("mdpo_procgen", "MDPO")]),
        (
            "algos/mdpo.py --num-agents 1",
            [("procgen_ppo_openai", "hard, 500 levels"), ("mdpo_procgen", "PPO")],
        ),
        ("algos/mdpo.py --num-agents 1 --num-levels 200", []),
        ("algos/ppo_netrand.py --plain-look --no-netrand", [("netrand_coinrun", "PPO")]),
        ("benchmark/drawerworld.py drqv2_pieg", []),
        ("ppo_procgen.py --env-id maze", []),
    ],
)
def test_cells_of_commands(command, cells):
    found = [cell for cell, _ in papers.cells(f"python {command}")]
    assert (found if isinstance(cells, list) else len(found)) == cells


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("sac_sam_reset layer-norm", "DrQ-SAC+LN"),
        ("layer_norm sac_sam_reset --seed 4", "DrQ-SAC+LN"),
        ("sac_sam_reset layer_norm --sam", None),
        ("sac_sam_reset l2_1e-3", "DrQ-SAC+L2, 1e-3"),
        ("sac_sam_reset other", None),
    ],
)
def test_cells_of_ablations(command, name, monkeypatch):
    """Which bring flags of their own along."""
    base = ["--no-sam", "--reset-every", "0"]
    rows = {name: (None, None, base) for name in ("layer_norm", "l2_1e-3")}
    monkeypatch.setattr(ablations, "ABLATIONS", {"sac_sam_reset": rows})
    found = papers.cells_without_seed.__wrapped__(f"python benchmark/ablations.py {command}")
    assert [cell for cell, _ in found] == ([("sac_sam_reset_dmcm", name)] if name else [])


def test_of_three_amounts_of_l2_the_best_is_in_the_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ablations, "ABLATIONS", {"drq_sam_reset": {name: (0, 0, []) for name in ("l2_1e-3", "l2_1e-5")}}
    )
    command = DRQ.replace("algos/drq_sam_reset.py", "benchmark/ablations.py drq_sam_reset l2_1e-{}")
    weak, strong = (rows_of(command.replace("1e-{}", f"1e-{n}"), seeds=(7, 8)) for n in (5, 3))
    ours = report.Ours(loaded(tmp_path, weak, strong.assign(value=strong["value"] + 50)), 5)
    assert ours.task("drq_sam_reset_atari100k", "DrQ+L2", "eval/test_return", "krull") == "1064 ± 10 (2 runs)"


def test_steps_that_a_cell_asks_for():
    """The paper's: 2M frames are 1M steps, or half of that where a step is four frames."""
    steps = {
        task: dict(papers.cells(f"python algos/sac_sam_reset.py --env-id {task}"))
        for task in ("walker-run", "cheetah-run")
    }
    assert [list(cells.values()) for cells in steps.values()] == [[1_000_000], [500_000]]


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
    tasks = plot_aggregate.tasks_of("atari-100k")
    assert len(tasks) == 26
    some = report.Ours(loaded(tmp_path, rows_of(DRQ, tasks[1:])), reps=20)
    cells = some.aggregates("drq_sam_reset_atari100k", "DrQ", "atari-100k", 3)
    assert set(cells.values()) == {"not run (25 of 26 tasks)"}
    rows = loaded(tmp_path, rows_of(DRQ, tasks, seeds=(1, 2)))
    cells = report.Ours(rows, reps=20).aggregates("drq_sam_reset_atari100k", "DrQ", "atari-100k", 3)
    last = rows[rows["step"] == 100_000].pivot(index="seed", columns="task", values="value")[tasks].to_numpy()
    known = papers.read("atari_human_random").set_index("game_snake_case").loc[tasks]
    low, high = known["random_score"].astype(float).to_numpy(), known["human_score"].astype(float).to_numpy()
    scores = (last - low) / (high - low)
    assert cells["IQM"].startswith(f"{metrics.aggregate_iqm(scores):.3f} (") and cells["IQM"].endswith("2 runs a task")
    assert cells["optimality gap"].startswith(f"{metrics.aggregate_optimality_gap(scores):.3f} (")


# ---- plot_aggregate.py ----
def test_the_figures_table(tmp_path, monkeypatch, capsys):
    table = tmp_path / "runs.csv"
    rows = rows_of(
        "python algos/mdpo.py --env-id {} --distribution-mode easy --seed {}", ("maze",), (1, 2), suite="procgen"
    )
    other = rows_of("python x.py --distribution-mode easy", ("miner",), suite="procgen").assign(method="elsewhere")
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
    command = "python algos/sac_sam_reset.py --env-id {} --no-sam --reset-every 0 --seed {}"
    rows = rows_of(command, tasks, (1, 2), steps=(10**6,), suite="dmc").assign(method="DrQ-SAC")
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
    loaded(tmp_path, rows_of(DRQ))
    with pytest.raises(SystemExit, match=r"^2$"):
        run(plot_aggregate, monkeypatch, *(flag.format(tmp_path) for flag in flags))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


# ---- The report ----
@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, text) of a report of a copy of the results, made with few bootstrap samples."""
    folder = tmp_path_factory.mktemp("results")
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, folder)
    (folder / "mine.md").write_text("before\n<!-- report -->\nold\n<!-- /report -->\nafter\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(report, monkeypatch, "--results", folder, "--readme", folder / "mine.md", "--reps", 3)
    return folder, (folder / "README.md").read_text()


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
    section = written[1].split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
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
        assert not numbers(" ".join(rows[list(columns)].to_numpy().ravel())) - numbers(written[1])


def test_shortened_runs_are_shown_as_such_and_fill_no_cell(written):
    runs, tables = written[1].split("## The papers' tables")
    assert "shortened run, 25,000 of 100,000 steps" in runs
    assert re.findall(r"<br>\*\*", tables) == []
    for file in ("drq_sam_reset_krull", "mdpo_starpilot_easy"):
        assert f"![Return against steps of the runs in {file}.csv]({file}.svg)" in runs


def test_a_whole_run_is_in_its_cell(tmp_path):
    rows = loaded(tmp_path, rows_of(DRQ, seeds=(1, 2)))
    section = report.atari(report.Ours(rows, reps=3))
    (line,) = [line for line in section.split("\n") if line.startswith("| Krull ")]
    assert "lost<br>**1014.0 ± 9.9 (2 runs)**" in line
    lines = report.summarise({"Atari": section}).split("\n")
    assert re.fullmatch(r"\| Atari \| \d+ \| 1 \|", lines[2])
    assert "| whole run, 100,000 of 100,000 steps | 1014 |" in report.runs_section(tmp_path, "0", rows)


def test_made_twice_it_is_the_same(written, monkeypatch):
    folder = written[0]
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "aggregates.csv", "drq_sam_reset_krull.svg", "aggregates_dmc.svg", "mine.md"} <= set(first)
    text = (folder / "mine.md").read_text()
    assert "old" not in text and re.fullmatch(r"before\n<!-- report -->\n(\|.*\n)+<!-- /report -->\nafter\n", text)
    run(report, monkeypatch, "--results", folder, "--readme", folder / "mine.md", "--reps", 3)
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_report_in_the_repository_is_of_its_results(written):
    """But for bootstrap intervals, which are of more samples there. If not: python benchmark/report.py."""

    def fixed(text):
        return [line for line in text.split("\n") if not re.search(r"\| (rliable|runs and tasks exchanged) \|", line)]

    assert fixed((RESULTS / "README.md").read_text()) == fixed(written[1])


@pytest.mark.parametrize("flags", [["--results", "{}/nowhere"], ["--readme", "{}/plain.md"], ["--reps", "0"]])
def test_report_says_what_is_wrong(flags, tmp_path, monkeypatch, capsys):
    loaded(tmp_path, rows_of(DRQ))
    (tmp_path / "plain.md").write_text("no marks")
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(tmp_path) for flag in flags]
    with pytest.raises(SystemExit, match=r"^2$"):
        run(report, monkeypatch, *([] if "--results" in flags else ["--results", tmp_path]), *flags)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
